#include <cstring>

#include "cpu/gate_kernels.h"
#include "cpu/launch.h"

namespace shiva::cpu {
namespace {

// x [B, N, D], inclusion [B, N], kept [B, k] -> rows of x at kept [B, k, D], a copy of x
std::tuple<Tensor, Tensor> residual_gate(const Tensor& x, const Tensor& inclusion, const Tensor& kept) {
  const Tokens t = check_residual_gate("residual_gate", x, inclusion, kept, kPlace);
  const int64_t B = t.B, N = t.N, k = t.k, row_bytes = t.row_bytes;
  Tensor selected = new_empty(x, {B, k, t.D});
  Tensor base = new_empty(x, {B, N, t.D});
  const Tensor dense = with_dense_channels(x);
  const Rows from = rows_of(dense);
  const std::vector<int64_t> position = inverse_index("residual_gate", t.index, N);
  char* to_base = data<char>(base);
  char* to_selected = data<char>(selected);
  parallel(B * N, 3 * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / N;
      const char* row = from.at(b, i - b * N);
      std::memcpy(to_base + i * row_bytes, row, static_cast<size_t>(row_bytes));
      if (position[i] >= 0)
        std::memcpy(to_selected + (b * k + position[i]) * row_bytes, row, static_cast<size_t>(row_bytes));
    }
  });
  return {selected, base};
}

// -> grad_x [B, N, D], grad_inclusion [B, N]
std::tuple<Tensor, Tensor> residual_gate_backward(
    const Tensor& grad_selected, const Tensor& grad_base, const Tensor& x, const Tensor& kept) {
  const Tokens t = check_residual_gate_backward("residual_gate_backward", grad_selected, grad_base, x, kept, kPlace);
  const int64_t B = t.B, N = t.N, D = t.D, row_bytes = t.row_bytes;
  Tensor grad_x = new_empty(x, {B, N, D});
  Tensor grad_inclusion = new_empty(x, {B, N}, accumulate_type(x));
  const Tensor dense_x = with_dense_channels(x), dense_base = with_dense_channels(grad_base);
  const Tensor dense_selected = with_dense_channels(grad_selected);
  const Rows xs = rows_of(dense_x), bases = rows_of(dense_base), gates = rows_of(dense_selected);
  const std::vector<int64_t> position = inverse_index("residual_gate_backward", t.index, N);
  const int64_t sum_bytes = static_cast<int64_t>(grad_inclusion.element_size());
  parallel(B * N, 4 * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / N, token = i - b * N;
      SHIVA_CALL_KERNEL(
          residual_gate_row, t.dtype, xs.at(b, token), bases.at(b, token),
          position[i] >= 0 ? gates.at(b, position[i]) : nullptr, D, data<char>(grad_x) + i * row_bytes,
          data<char>(grad_inclusion) + i * sum_bytes);
    }
  });
  return {grad_x, grad_inclusion};
}

}  // namespace
}  // namespace shiva::cpu

STABLE_TORCH_LIBRARY_IMPL(shiva, CPU, m) {
  m.impl("residual_gate", TORCH_BOX(&shiva::cpu::residual_gate));
  m.impl("residual_gate_backward", TORCH_BOX(&shiva::cpu::residual_gate_backward));
}
