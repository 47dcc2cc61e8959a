#include <algorithm>

#include "cpu/launch.h"
#include "cpu/modulate_kernels.h"

namespace shiva::cpu {
namespace {

// LayerNorm of the rows index [B, k] of x [B, N, D], * (1 + scale [B, D]) + shift [B, D] -> [B, k, D]
Tensor gather_modulate(const Tensor& x, const Tensor& index, const Tensor& shift, const Tensor& scale, double eps) {
  const Tokens t = check_gather_modulate("gather_modulate", x, index, shift, scale, eps, kPlace);
  const int64_t k = t.k, D = t.D, row_bytes = t.row_bytes;
  Tensor out = new_empty(x, {t.B, k, D});
  const Tensor dense = with_dense_channels(x);
  const Tensor shifts = torch::stable::contiguous(shift), scales = torch::stable::contiguous(scale);
  const Rows rows = rows_of(dense);
  const int64_t* tokens = data<int64_t>(t.index);
  parallel(t.B * k, 4 * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / k;
      SHIVA_CALL_KERNEL(
          modulate_row, t.dtype, rows.at(b, tokens[i]), data<char>(shifts) + b * row_bytes,
          data<char>(scales) + b * row_bytes, D, eps, data<char>(out) + i * row_bytes);
    }
  });
  return out;
}

// grad [B, k, D] -> grad_x [B, N, D], grad_shift [B, D], grad_scale [B, D]
std::tuple<Tensor, Tensor, Tensor> gather_modulate_backward(
    const Tensor& grad, const Tensor& x, const Tensor& index, const Tensor& scale, double eps) {
  const Tokens t = check_gather_modulate_backward("gather_modulate_backward", grad, x, index, scale, eps, kPlace);
  const int64_t B = t.B, k = t.k, D = t.D, row_bytes = t.row_bytes;
  inverse_index("gather_modulate_backward", t.index, t.N);  // two threads would write one row
  Tensor grad_x = torch::stable::new_zeros(x, {B, t.N, D});
  Tensor grad_shift = new_empty(x, {B, D}), grad_scale = new_empty(x, {B, D});
  const int64_t chunks = ceil_div(k, kSumRows);
  // [B, chunks, 2, D]: chunks are fixed, so the sums do not depend on the number of threads.
  Tensor partial = torch::stable::new_zeros(x, {B, chunks, 2, D}, accumulate_type(x));
  const int64_t partial_bytes = D * static_cast<int64_t>(partial.element_size());
  const Tensor dense = with_dense_channels(x), dense_grad = with_dense_channels(grad);
  const Tensor scales = torch::stable::contiguous(scale);
  const Rows rows = rows_of(dense), grads = rows_of(dense_grad), outs = rows_of(grad_x);
  const int64_t* tokens = data<int64_t>(t.index);
  parallel(B * chunks, 6 * row_bytes * kSumRows, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t b = c / chunks, first = (c % chunks) * kSumRows;
      char* shift_sum = data<char>(partial) + 2 * c * partial_bytes;
      for (int64_t j = first; j < std::min(first + kSumRows, k); ++j) {
        const int64_t token = tokens[b * k + j];
        SHIVA_CALL_KERNEL(
            modulate_backward_row, t.dtype, grads.at(b, j), rows.at(b, token), data<char>(scales) + b * row_bytes, D,
            eps, outs.at(b, token), shift_sum, shift_sum + partial_bytes);
      }
    }
  });
  for (int64_t b = 0; b < B; ++b) {
    const char* sums = data<char>(partial) + 2 * b * chunks * partial_bytes;
    SHIVA_CALL_KERNEL(reduce_partials, t.dtype, sums, chunks, 2 * D, D, data<char>(grad_shift) + b * row_bytes);
    SHIVA_CALL_KERNEL(
        reduce_partials, t.dtype, sums + partial_bytes, chunks, 2 * D, D, data<char>(grad_scale) + b * row_bytes);
  }
  return {grad_x, grad_shift, grad_scale};
}

}  // namespace
}  // namespace shiva::cpu

STABLE_TORCH_LIBRARY_IMPL(shiva, CPU, m) {
  m.impl("gather_modulate", TORCH_BOX(&shiva::cpu::gather_modulate));
  m.impl("gather_modulate_backward", TORCH_BOX(&shiva::cpu::gather_modulate_backward));
}
