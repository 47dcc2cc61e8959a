#include <algorithm>
#include <cstring>

#include "cpu/launch.h"
#include "cpu/modulate_kernels.h"

namespace shiva::cpu {
namespace {

// base [B, N, D] with rows index [B, k] += gate [B, D] * update [B, k, D]
Tensor scatter_residual(const Tensor& base, const Tensor& index, const Tensor& update, const Tensor& gate) {
  constexpr char op[] = "scatter_residual";
  const Tokens t = check_scatter_residual(op, "base", base, index, update, gate, kPlace);
  const int64_t B = t.B, N = t.N, D = t.D, row_bytes = t.row_bytes;
  Tensor out = new_empty(base, {B, N, D});
  const Tensor dense = with_dense_channels(base), dense_update = with_dense_channels(update);
  const Tensor gates = torch::stable::contiguous(gate);
  const Rows bases = rows_of(dense), updates = rows_of(dense_update);
  const std::vector<int64_t> position = inverse_index(op, t.index, N);
  parallel(B * N, 3 * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / N;
      const char* row = bases.at(b, i - b * N);
      char* to = data<char>(out) + i * row_bytes;
      if (position[i] >= 0)
        SHIVA_CALL_KERNEL(
            gated_add_row, t.dtype, row, updates.at(b, position[i]), data<char>(gates) + b * row_bytes, D, to);
      else
        std::memcpy(to, row, static_cast<size_t>(row_bytes));
    }
  });
  return out;
}

// grad [B, N, D] -> grad_update [B, k, D], grad_gate [B, D]; the gradient of base is grad itself
std::tuple<Tensor, Tensor> scatter_residual_backward(
    const Tensor& grad, const Tensor& index, const Tensor& update, const Tensor& gate) {
  constexpr char op[] = "scatter_residual_backward";
  const Tokens t = check_scatter_residual(op, "grad", grad, index, update, gate, kPlace);
  const int64_t B = t.B, D = t.D, k = t.k, row_bytes = t.row_bytes, chunks = ceil_div(k, kSumRows);
  Tensor grad_update = new_empty(grad, {B, k, D});
  Tensor grad_gate = new_empty(grad, {B, D});
  Tensor partial = torch::stable::new_zeros(grad, {B, chunks, D}, accumulate_type(grad));
  const int64_t partial_bytes = D * static_cast<int64_t>(partial.element_size());
  const Tensor dense = with_dense_channels(grad), dense_update = with_dense_channels(update);
  const Tensor gates = torch::stable::contiguous(gate);
  const Rows grads = rows_of(dense), updates = rows_of(dense_update), outs = rows_of(grad_update);
  const int64_t* tokens = data<int64_t>(t.index);
  parallel(B * chunks, 3 * row_bytes * kSumRows, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t b = c / chunks, first = (c % chunks) * kSumRows;
      for (int64_t j = first; j < std::min(first + kSumRows, k); ++j)
        SHIVA_CALL_KERNEL(
            gated_add_backward_row, t.dtype, grads.at(b, tokens[b * k + j]), updates.at(b, j),
            data<char>(gates) + b * row_bytes, D, outs.at(b, j), data<char>(partial) + c * partial_bytes);
    }
  });
  for (int64_t b = 0; b < B; ++b)
    SHIVA_CALL_KERNEL(
        reduce_partials, t.dtype, data<char>(partial) + b * chunks * partial_bytes, chunks, D, D,
        data<char>(grad_gate) + b * row_bytes);
  return {grad_update, grad_gate};
}

}  // namespace
}  // namespace shiva::cpu

STABLE_TORCH_LIBRARY_IMPL(shiva, CPU, m) {
  m.impl("scatter_residual", TORCH_BOX(&shiva::cpu::scatter_residual));
  m.impl("scatter_residual_backward", TORCH_BOX(&shiva::cpu::scatter_residual_backward));
}
