#include <algorithm>
#include <memory>
#include <optional>

#include "cpu/gemm_kernels.h"
#include "cpu/launch.h"
#include "cpu/router_score_kernel.h"

namespace shiva::cpu {
namespace {

// Arguments of both ops, checked, with the small parameters in the accumulation dtype.
struct Router : RouterArguments {
  Tensor weight;  // [H] = ln_weight * w_out
  double offset;  // <ln_bias, w_out>
};

template <typename T>
void fold(Router& r) {
  double offset = 0;
  for (int64_t h = 0; h < r.H; ++h) {
    data<T>(r.weight)[h] = data<T>(r.ln_weight)[h] * data<T>(r.w_out)[h];
    offset += static_cast<double>(data<T>(r.ln_bias)[h]) * data<T>(r.w_out)[h];
  }
  r.offset = offset;
}

Router check(
    const char* op, const Tensor& x, const Tensor& context, const Tensor& w_in, const Tensor& ln_weight,
    const Tensor& ln_bias, const Tensor& w_out, double eps) {
  Router r{check_router_score(op, x, context, w_in, ln_weight, ln_bias, w_out, eps, kPlace), {}, 0};
  r.weight = new_empty(r.w_out, {r.H});
  if (r.dtype == Dtype::Float64)
    fold<double>(r);
  else
    fold<float>(r);
  return r;
}

// The three products below. In bfloat16 and float16 torch's GEMM knows every machine's matrix unit; in float32 and
// float64 its sums depend on the number of threads, so those are our own, with work split where no sum is.
constexpr int64_t kGemmRows = 64, kGemmColumns = 64;

bool own_gemm(const Router& r) { return r.dtype == Dtype::Float32 || r.dtype == Dtype::Float64; }

// a [M, L] times b [L, N] -> [M, N], both contiguous
Tensor multiply(const Router& r, const Tensor& a, const Tensor& b) {
  if (!own_gemm(r)) return torch::stable::contiguous(torch::stable::matmul(a, b));
  const int64_t M = a.size(0), L = a.size(1), N = b.size(1);
  Tensor out = new_empty(a, {M, N});
  parallel(ceil_div(M, kGemmRows), kGemmRows * L * N, [&](int64_t begin, int64_t end) {
    SHIVA_CALL_KERNEL(
        matmul_rows, r.dtype, a.data_ptr(), b.data_ptr(), begin * kGemmRows, std::min(end * kGemmRows, M), L, N,
        out.data_ptr());
  });
  return out;
}

// a [L, M] transposed times b [L, N] -> [M, N], both contiguous
Tensor multiply_transposed(const Router& r, const Tensor& a, const Tensor& b) {
  if (!own_gemm(r)) return torch::stable::matmul(torch::stable::transpose(a, 0, 1), b);
  const int64_t L = a.size(0), M = a.size(1), N = b.size(1);
  Tensor out = new_empty(a, {M, N});
  parallel(ceil_div(N, kGemmColumns), kGemmColumns * L * M, [&](int64_t begin, int64_t end) {
    SHIVA_CALL_KERNEL(
        matmul_transposed_columns, r.dtype, a.data_ptr(), b.data_ptr(), begin * kGemmColumns,
        std::min(end * kGemmColumns, N), L, M, N, out.data_ptr());
  });
  return out;
}

// x [B N, D] times w_in [H, D] transposed -> [B N, H], contiguous
Tensor project(const Router& r, const Tensor& flat_x, const Tensor& w_in) {
  const Tensor transposed = torch::stable::transpose(w_in, 0, 1);
  return multiply(r, flat_x, own_gemm(r) ? torch::stable::contiguous(transposed) : transposed);
}

Tensor flatten_tokens(const Router& r, const Tensor& x) {
  return torch::stable::reshape(torch::stable::contiguous(x), {r.B * r.N, r.D});
}

// hidden [B N, H] -> [B, N], float32 (float64 for float64)
Tensor score(const Router& r, const Tensor& hidden, double eps) {
  Tensor scores = new_empty(hidden, {r.B, r.N}, accumulate_type(hidden));
  const int64_t row_bytes = r.H * static_cast<int64_t>(hidden.element_size());
  const int64_t acc_bytes = static_cast<int64_t>(scores.element_size());
  const int64_t chunks = ceil_div(r.N, kSumRows);
  parallel(r.B * chunks, 16 * row_bytes * kSumRows, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> scratch(new double[static_cast<size_t>(r.H)]);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t b = c / chunks, first = (c % chunks) * kSumRows, row = b * r.N + first;
      SHIVA_CALL_KERNEL(
          router_epilogue, r.dtype, data<char>(hidden) + row * row_bytes, data<char>(r.context) + b * r.H * acc_bytes,
          data<char>(r.weight), r.offset, std::min(kSumRows, r.N - first), r.H, eps, scratch.get(),
          data<char>(scores) + row * acc_bytes);
    }
  });
  return scores;
}

// -> [B, N], float32 (float64 for float64); x w_in^T [B, N, H]
std::tuple<Tensor, Tensor> router_score_and_projection(
    const Tensor& x, const Tensor& context, const Tensor& w_in, const Tensor& ln_weight, const Tensor& ln_bias,
    const Tensor& w_out, double eps) {
  // The wrapper chooses between the two ops: the message names what the user called.
  const Router r = check("router_score", x, context, w_in, ln_weight, ln_bias, w_out, eps);
  if (r.B * r.N == 0) return {new_empty(x, {r.B, r.N}, accumulate_type(x)), new_empty(x, {r.B, r.N, r.H})};
  const Tensor hidden = project(r, flatten_tokens(r, x), w_in);
  return {score(r, hidden, eps), torch::stable::reshape(hidden, {r.B, r.N, r.H})};
}

Tensor router_score(
    const Tensor& x, const Tensor& context, const Tensor& w_in, const Tensor& ln_weight, const Tensor& ln_bias,
    const Tensor& w_out, double eps) {
  return std::get<0>(router_score_and_projection(x, context, w_in, ln_weight, ln_bias, w_out, eps));
}

// Sums the chunks' partials and finishes the gradients of the four small parameters, in double.
template <typename T>
void finish(
    const Router& r, const Tensor& grad, const Tensor& context_sums, const Tensor& normal_sums, int64_t chunks,
    const Tensor& grad_context, const Tensor& grad_ln_weight, const Tensor& grad_ln_bias, const Tensor& grad_w_out) {
  double total = 0;
  for (int64_t i = 0; i < r.B * r.N; ++i) total += data<T>(grad)[i];
  for (int64_t h = 0; h < r.H; ++h) {
    double normal = 0;
    for (int64_t b = 0; b < r.B; ++b) {
      double context = 0;
      for (int64_t c = b * chunks; c < (b + 1) * chunks; ++c) {
        context += data<T>(context_sums)[c * r.H + h];
        normal += data<T>(normal_sums)[c * r.H + h];
      }
      data<T>(grad_context)[b * r.H + h] = static_cast<T>(context);
    }
    const double w_out = data<T>(r.w_out)[h];
    data<T>(grad_ln_weight)[h] = static_cast<T>(w_out * normal);
    data<T>(grad_ln_bias)[h] = static_cast<T>(w_out * total);
    data<T>(grad_w_out)[h] = static_cast<T>(data<T>(r.ln_weight)[h] * normal + data<T>(r.ln_bias)[h] * total);
  }
}

// grad [B, N] -> gradients of x, context, w_in, ln_weight, ln_bias, w_out, each in its argument's dtype
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> router_score_backward(
    const Tensor& grad, const Tensor& x, const Tensor& context, const Tensor& w_in, const Tensor& ln_weight,
    const Tensor& ln_bias, const Tensor& w_out, double eps, const std::optional<Tensor>& projection) {
  constexpr char op[] = "router_score_backward";
  const Router r = check(op, x, context, w_in, ln_weight, ln_bias, w_out, eps);
  check_shape(op, "grad", grad, {r.B, r.N}, kPlace);
  if (projection) {
    check_shape(op, "projection", *projection, {r.B, r.N, r.H}, kPlace);
    check_same_dtype(op, "projection", *projection, "x", x);
  }
  const Tensor dense_grad = as_accumulate(op, "grad", grad, x);
  const ScalarType acc = accumulate_type(x);
  const int64_t chunks = ceil_div(r.N, kSumRows);
  Tensor context_sums = torch::stable::new_zeros(x, {r.B * chunks, r.H}, acc);
  Tensor normal_sums = torch::stable::new_zeros(x, {r.B * chunks, r.H}, acc);
  Tensor grad_context = new_empty(x, {r.B, r.H}, acc);
  Tensor grad_ln_weight = new_empty(x, {r.H}, acc);
  Tensor grad_ln_bias = new_empty(x, {r.H}, acc);
  Tensor grad_w_out = new_empty(x, {r.H}, acc);
  const Tensor flat_x = flatten_tokens(r, x);
  // Becomes the gradient at the pre-activation.
  const Tensor hidden = projection ? torch::stable::reshape(
                                         torch::stable::clone(torch::stable::contiguous(*projection)), {r.B * r.N, r.H})
                                   : project(r, flat_x, w_in);
  const int64_t row_bytes = r.H * static_cast<int64_t>(x.element_size());
  const int64_t acc_bytes = static_cast<int64_t>(dense_grad.element_size());
  parallel(r.B * chunks, 32 * row_bytes * kSumRows, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> scratch(new double[static_cast<size_t>(r.H)]);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t b = c / chunks, first = (c % chunks) * kSumRows, row = b * r.N + first;
      SHIVA_CALL_KERNEL(
          router_epilogue_backward, r.dtype, data<char>(hidden) + row * row_bytes,
          data<char>(r.context) + b * r.H * acc_bytes, data<char>(r.weight), data<char>(dense_grad) + row * acc_bytes,
          std::min(kSumRows, r.N - first), r.H, eps, scratch.get(), data<char>(context_sums) + c * r.H * acc_bytes,
          data<char>(normal_sums) + c * r.H * acc_bytes);
    }
  });
  const auto sum = acc == ScalarType::Double ? finish<double> : finish<float>;
  sum(r, dense_grad, context_sums, normal_sums, chunks, grad_context, grad_ln_weight, grad_ln_bias, grad_w_out);
  const Tensor grad_x = torch::stable::reshape(multiply(r, hidden, torch::stable::contiguous(w_in)), {r.B, r.N, r.D});
  const Tensor grad_w_in = multiply_transposed(r, hidden, flat_x);
  const auto cast = [](const Tensor& t, const Tensor& like) { return torch::stable::to(t, like.scalar_type()); };
  return {
      grad_x,
      cast(grad_context, context),
      grad_w_in,
      cast(grad_ln_weight, ln_weight),
      cast(grad_ln_bias, ln_bias),
      cast(grad_w_out, w_out)};
}

}  // namespace
}  // namespace shiva::cpu

STABLE_TORCH_LIBRARY_IMPL(shiva, CPU, m) {
  m.impl("router_score", TORCH_BOX(&shiva::cpu::router_score));
  m.impl("router_score_and_projection", TORCH_BOX(&shiva::cpu::router_score_and_projection));
  m.impl("router_score_backward", TORCH_BOX(&shiva::cpu::router_score_backward));
}
