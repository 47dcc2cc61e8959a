#include "cuda/launch.h"
#include "cuda/residual_gate_kernel.cuh"

namespace shiva::cuda {
namespace {

// x [B, N, D], inclusion [B, N], kept [B, k] -> rows of x at kept [B, k, D], a copy of x
std::tuple<Tensor, Tensor> residual_gate(const Tensor& x, const Tensor& inclusion, const Tensor& kept) {
  constexpr char op[] = "residual_gate";
  const Tokens t = check_residual_gate(op, x, inclusion, kept, kPlace);
  const int64_t B = t.B, N = t.N, k = t.k;
  const Guard guard(op, x, inclusion, kept);
  const Tensor dense = with_dense_channels(x);
  const Tensor position = torch::stable::new_empty(x, {B, N}, ScalarType::Long);
  Tensor selected = torch::stable::new_empty(x, {B, k, t.D}), base = torch::stable::new_empty(x, {B, N, t.D});
  if (x.numel() == 0) return {selected, base};
  const Stream stream = current_stream(x);
  invert_index(data<int64_t>(t.index), B, k, N, data<int64_t>(position), stream);
  const Rows from = rows_of(dense);
  dispatch_access(common_alignment(t.row_bytes, from, rows_of(selected), rows_of(base)), [&](auto* type) {
    using Access = std::remove_pointer_t<decltype(type)>;
    SHIVA_LAUNCH(
        residual_gate_kernel<Access>, row_blocks(B * N), kRowThreads, 0, stream, from, data<int64_t>(position), B * N,
        N, k, t.row_bytes / static_cast<int64_t>(sizeof(Access)), data<Access>(selected), data<Access>(base));
  });
  check_launch(op);
  return {selected, base};
}

// -> grad_x [B, N, D], grad_inclusion [B, N]
std::tuple<Tensor, Tensor> residual_gate_backward(
    const Tensor& grad_selected, const Tensor& grad_base, const Tensor& x, const Tensor& kept) {
  constexpr char op[] = "residual_gate_backward";
  const Tokens t = check_residual_gate_backward(op, grad_selected, grad_base, x, kept, kPlace);
  const int64_t B = t.B, N = t.N;
  const Guard guard(op, x, grad_selected, grad_base, kept);
  const Tensor dense_x = with_dense_channels(x), dense_base = with_dense_channels(grad_base);
  const Tensor dense_selected = with_dense_channels(grad_selected);
  const Tensor position = torch::stable::new_empty(x, {B, N}, ScalarType::Long);
  Tensor grad_x = torch::stable::new_empty(x, {B, N, t.D});
  Tensor grad_inclusion = torch::stable::new_empty(x, {B, N}, accumulate_type(x));
  if (B * N == 0) return {grad_x, grad_inclusion};
  const Stream stream = current_stream(x);
  invert_index(data<int64_t>(t.index), B, t.k, N, data<int64_t>(position), stream);
  const Rows xs = rows_of(dense_x), bases = rows_of(dense_base), gates = rows_of(dense_selected);
  const uint64_t alignment = common_alignment(t.row_bytes, xs, bases, gates, rows_of(grad_x));
  dispatch(t.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    dispatch_pack<T>(alignment, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      SHIVA_LAUNCH(
          residual_gate_backward_kernel<P>, row_blocks(B * N), kRowThreads, 0, stream, gates, bases, xs,
          data<int64_t>(position), B * N, N, t.D / P::size, data<P>(grad_x), data<acc_t<T>>(grad_inclusion));
    });
  });
  check_launch(op);
  return {grad_x, grad_inclusion};
}

}  // namespace
}  // namespace shiva::cuda

SHIVA_REGISTER(m) {
  m.impl("residual_gate", TORCH_BOX(&shiva::cuda::residual_gate));
  m.impl("residual_gate_backward", TORCH_BOX(&shiva::cuda::residual_gate_backward));
}
