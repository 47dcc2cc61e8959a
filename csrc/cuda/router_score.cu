#include <algorithm>
#include <optional>

#include "cuda/launch.h"
#include "cuda/router_score_backward_kernel.cuh"
#include "cuda/router_score_kernel.cuh"
#include "cuda/router_score_simt_kernel.cuh"

namespace shiva::cuda {
namespace {

// Arguments of both ops, contiguous.
struct Router : RouterArguments {
  const char* op;
  Tensor x, w_in;  // [B, N, D], [H, D]
  double eps;
  Stream stream;

  template <typename T>
  RouterInput<T> input() const {
    using A = acc_t<T>;
    return {
        data<T>(x), data<T>(w_in),       data<A>(context),   data<A>(ln_weight), data<A>(ln_bias), data<A>(w_out), N,
        D,          static_cast<int>(H), static_cast<A>(eps)};
  }
};

Router contiguous(const char* op, const RouterArguments& arguments, const Tensor& x, const Tensor& w_in, double eps) {
  return {arguments, op, torch::stable::contiguous(x), torch::stable::contiguous(w_in), eps, current_stream(x)};
}

// Whether the code multiplies T on tensor cores and the rows can be copied 16 bytes at a time.
template <typename T>
bool has_mma(const Router& r) {
  const auto aligned = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0; };
  if (r.D % 8 != 0 || !aligned(r.x) || !aligned(r.w_in)) return false;
#if defined(SHIVA_SIMT)
  return true;
#else
  // What the running code was compiled for decides, not the device: on a new one it may be an old architecture's PTX.
  cudaFuncAttributes code = {};
  const bool known = cudaFuncGetAttributes(&code, router_score_kernel<MmaProduct<T, 64, 64, 5>>) == cudaSuccess;
  if (!known) (void)cudaGetLastError();  // else check_launch would raise it
  return known && code.ptxVersion >= (std::is_same_v<T, bf16> ? 80 : 75);
#endif
}

// The products of one element type. Hidden: all of H in one tile; Plain, TransposedB, Transposed: any matrices.
template <typename T, int kRows, int kColumns, int kStages>
struct Mma {
  using Hidden = MmaProduct<T, kRows, kColumns, kStages>;
  using Plain = MmaProduct<T, 64, 64, 5>;
  using TransposedB = MmaProduct<T, 64, 64, 3, false, true>;
  using Transposed = MmaProduct<T, 64, 64, 5, true, true>;
};
template <typename T>
struct Simt {
  using Hidden = SimtProduct<T>;
  using Plain = SimtProduct<T>;
  using TransposedB = SimtProduct<T, false, true>;
  using Transposed = SimtProduct<T, true, true>;
};

// Calls body with the products to use.
template <typename T, typename Body>
void choose_products(const Router& r, Body body) {
  if constexpr (sizeof(T) == 2) {
    if (has_mma<T>(r)) {
      if (r.H <= 64) return body(Mma<T, 64, 64, 5>());
      if (r.H <= 128) return body(Mma<T, 64, 128, 3>());
      return body(Mma<T, 32, 256, 2>());
    }
  }
  body(Simt<T>());
}

template <typename Product, bool kTransposeA, bool kTransposeB, typename Out>
void multiply(
    const Router& r, const MatrixView<typename Product::T>& a, const MatrixView<typename Product::T>& b, int64_t rows,
    int64_t columns, int64_t depth, int64_t split_depth, Out* out) {
  const int64_t splits = std::max<int64_t>(ceil_div(depth, split_depth), 1);
  const int64_t tiles = ceil_div(rows, Product::kRows) * ceil_div(columns, Product::kColumns);
  SHIVA_LAUNCH(
      (router_product_kernel<Product, kTransposeA, kTransposeB, Out>), grid_size(r.op, tiles * splits),
      Product::kThreads, 0, r.stream, a, b, rows, columns, depth, split_depth, out);
}

// hidden [B N, H] in the accumulation dtype, for an H that no tile holds.
template <typename Products, typename T>
Tensor project(const Router& r, const RouterInput<T>& in) {
  const Tensor hidden = torch::stable::new_empty(r.w_out, {r.B * r.N, r.H});
  multiply<typename Products::Plain, false, false>(
      r, {in.x, r.D, r.B * r.N, r.D}, {in.w_in, r.D, r.H, r.D}, r.B * r.N, r.H, r.D, std::max<int64_t>(r.D, 1),
      data<acc_t<T>>(hidden));
  return hidden;
}

template <typename Products, typename T>
void forward(const Router& r, const Tensor& scores) {
  using Product = typename Products::Hidden;
  const RouterInput<T> in = r.input<T>();
  auto* out = data<acc_t<T>>(scores);
  if (r.H <= Product::kColumns) {
    const unsigned blocks = grid_size(r.op, r.B * ceil_div(r.N, Product::kRows));
    SHIVA_LAUNCH(router_score_kernel<Product>, blocks, Product::kThreads, 0, r.stream, in, out);
  } else {
    const Tensor hidden = project<Products>(r, in);
    const unsigned blocks = grid_size(r.op, r.B * ceil_div(r.N, kWideRows));
    SHIVA_LAUNCH(router_score_wide_kernel<T>, blocks, kWideThreads, 0, r.stream, in, data<acc_t<T>>(hidden), out);
  }
}

// -> [B, N], float32 (float64 for float64)
Tensor router_score(
    const Tensor& x, const Tensor& context, const Tensor& w_in, const Tensor& ln_weight, const Tensor& ln_bias,
    const Tensor& w_out, double eps) {
  constexpr char op[] = "router_score";
  const RouterArguments checked = check_router_score(op, x, context, w_in, ln_weight, ln_bias, w_out, eps, kPlace);
  const Guard guard(op, x, context, w_in, ln_weight, ln_bias, w_out);
  const Router r = contiguous(op, checked, x, w_in, eps);
  Tensor scores = torch::stable::new_empty(x, {r.B, r.N}, accumulate_type(x));
  if (scores.numel() == 0) return scores;
  dispatch(r.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    choose_products<T>(r, [&](auto products) { forward<decltype(products), T>(r, scores); });
  });
  check_launch(op);
  return scores;
}

// No projection, [0]: no kernel writes it yet. The backward computes it again, for which it reads x once more.
std::tuple<Tensor, Tensor> router_score_and_projection(
    const Tensor& x, const Tensor& context, const Tensor& w_in, const Tensor& ln_weight, const Tensor& ln_bias,
    const Tensor& w_out, double eps) {
  return {router_score(x, context, w_in, ln_weight, ln_bias, w_out, eps), torch::stable::new_empty(x, {0})};
}

struct Gradients {
  Tensor x, context, w_in, ln_weight, ln_bias, w_out;
};

// Tokens of one part of grad_w_in's sum, a multiple of 32; more than 16 parts would cost more to add than they save.
int64_t split_depth(int64_t tokens) { return std::max<int64_t>(ceil_div(ceil_div(tokens, 16), 32) * 32, 512); }

template <typename Products, typename T>
void backward(const Router& r, const Tensor& grad, const Gradients& out) {
  using A = acc_t<T>;
  using Product = typename Products::Hidden;
  const RouterInput<T> in = r.input<T>();
  const bool fused = r.H <= Product::kColumns;
  const int64_t tokens = r.B * r.N, padded_H = ceil_div(r.H, 8) * 8;
  const int64_t tiles = r.B * ceil_div(r.N, fused ? Product::kRows : kWideRows);
  const int64_t chunks = tiles * (fused ? Product::kThreads / Product::kColumns : 1);
  const auto sums = [&](const std::vector<int64_t>& size) { return torch::stable::new_empty(r.w_out, size); };
  const Tensor grad_hidden = torch::stable::new_empty(r.x, {tokens, padded_H});
  const Tensor context_sums = sums({chunks, r.H}), normal_sums = sums({chunks, r.H}), grad_sums = sums({tiles});
  const RouterGradients<T> hidden_out = {data<A>(grad),         data<T>(grad_hidden), static_cast<int>(padded_H),
                                         data<A>(context_sums), data<A>(normal_sums), data<A>(grad_sums)};
  if (fused) {
    SHIVA_LAUNCH(
        router_hidden_backward_kernel<Product>, grid_size(r.op, tiles), Product::kThreads, 0, r.stream, in, hidden_out);
  } else {
    const Tensor hidden = project<Products>(r, in);
    SHIVA_LAUNCH(
        router_wide_backward_kernel<T>, grid_size(r.op, tiles), kWideThreads, 0, r.stream, in, hidden_out,
        data<A>(hidden));
  }

  const MatrixView<T> from_hidden = {data<T>(grad_hidden), padded_H, tokens, padded_H};
  if (r.D > 0) {
    multiply<typename Products::TransposedB, false, true>(
        r, from_hidden, {in.w_in, r.D, r.H, r.D}, tokens, r.D, r.H, r.H, data<T>(out.x));
    const int64_t depth = split_depth(tokens), splits = ceil_div(tokens, depth), size = r.H * r.D;
    const Tensor partial = sums({splits, size});
    multiply<typename Products::Transposed, true, true>(
        r, from_hidden, {in.x, r.D, tokens, r.D}, r.H, r.D, tokens, depth, data<A>(partial));
    const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(ceil_div(size, 256), 65536));
    SHIVA_LAUNCH(
        router_add_splits_kernel<T>, blocks, 256, 0, r.stream, data<A>(partial), splits, size, data<T>(out.w_in));
  }

  const Tensor batch_normals = torch::stable::new_empty(r.x, {r.B, r.H}, ScalarType::Double);
  const int64_t column_blocks = ceil_div(r.H, kWarp);
  SHIVA_LAUNCH(
      router_add_chunks_kernel<A>, grid_size(r.op, r.B * column_blocks), kSumThreads, 0, r.stream,
      data<A>(context_sums), data<A>(normal_sums), chunks / r.B, static_cast<int>(r.H), data<A>(out.context),
      data<double>(batch_normals));
  SHIVA_LAUNCH(
      router_small_gradients_kernel<T>, grid_size(r.op, column_blocks), kSumThreads, 0, r.stream, in,
      data<double>(batch_normals), r.B, data<A>(grad_sums), tiles, data<A>(out.ln_weight), data<A>(out.ln_bias),
      data<A>(out.w_out));
}

// grad [B, N] -> gradients of x, context, w_in, ln_weight, ln_bias, w_out, each in its argument's dtype
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> router_score_backward(
    const Tensor& grad, const Tensor& x, const Tensor& context, const Tensor& w_in, const Tensor& ln_weight,
    const Tensor& ln_bias, const Tensor& w_out, double eps, const std::optional<Tensor>& projection) {
  constexpr char op[] = "router_score_backward";
  if (projection) check_shape(op, "projection", *projection, {0}, kPlace);
  const RouterArguments checked = check_router_score(op, x, context, w_in, ln_weight, ln_bias, w_out, eps, kPlace);
  check_shape(op, "grad", grad, {checked.B, checked.N}, kPlace);
  const Guard guard(op, x, grad, context, w_in, ln_weight, ln_bias, w_out);
  const Router r = contiguous(op, checked, x, w_in, eps);
  const Tensor dense_grad = as_accumulate(op, "grad", grad, x);
  const bool empty = r.B * r.N == 0;
  const ScalarType acc = accumulate_type(x);
  const auto make = [&](const Tensor& like, ScalarType type) {
    const std::vector<int64_t> size(like.sizes().begin(), like.sizes().end());
    return empty ? torch::stable::new_zeros(like, size, type) : torch::stable::new_empty(like, size, type);
  };
  const Gradients out = {make(x, x.scalar_type()), make(context, acc), make(w_in, x.scalar_type()),
                         make(ln_weight, acc),     make(ln_bias, acc), make(w_out, acc)};
  if (!empty) {
    dispatch(r.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      choose_products<T>(r, [&](auto products) { backward<decltype(products), T>(r, dense_grad, out); });
    });
    check_launch(op);
  }
  const auto cast = [](const Tensor& t, const Tensor& like) { return torch::stable::to(t, like.scalar_type()); };
  return {
      out.x,
      cast(out.context, context),
      out.w_in,
      cast(out.ln_weight, ln_weight),
      cast(out.ln_bias, ln_bias),
      cast(out.w_out, w_out)};
}

}  // namespace
}  // namespace shiva::cuda

SHIVA_REGISTER(m) {
  m.impl("router_score", TORCH_BOX(&shiva::cuda::router_score));
  m.impl("router_score_and_projection", TORCH_BOX(&shiva::cuda::router_score_and_projection));
  m.impl("router_score_backward", TORCH_BOX(&shiva::cuda::router_score_backward));
}
