#include "cuda/launch.h"
#include "cuda/token_scatter_kernel.cuh"

namespace shiva::cuda {
namespace {

// base [B, N, D] with the rows index [B, k] replaced by src [B, k, D]
Tensor token_scatter(const Tensor& base, const Tensor& index, const Tensor& src) {
  constexpr char op[] = "token_scatter";
  const Tokens t = check_token_scatter(op, base, index, src, kPlace);
  const int64_t B = t.B, N = t.N;
  const Guard guard(op, base, index, src);
  const Tensor dense = with_dense_channels(base), dense_src = with_dense_channels(src);
  const Tensor position = torch::stable::new_empty(base, {B, N}, ScalarType::Long);
  Tensor out = torch::stable::new_empty(base, {B, N, t.D});
  if (out.numel() == 0) return out;
  const Stream stream = current_stream(base);
  invert_index(data<int64_t>(t.index), B, t.k, N, data<int64_t>(position), stream);
  replace_rows(rows_of(dense), rows_of(dense_src), data<int64_t>(position), B, N, t.row_bytes, data<char>(out), stream);
  check_launch(op);
  return out;
}

void token_scatter_(Tensor base, const Tensor& index, const Tensor& src) {
  constexpr char op[] = "token_scatter_";
  const Tokens t = check_token_scatter(op, base, index, src, kPlace);
  for (int64_t d = 0; d < 3; ++d)
    SHIVA_CHECK(
        base.size(d) <= 1 || base.stride(d) != 0, op,
        "base is expanded, its rows share memory; call it on base.clone()");
  const Guard guard(op, base, index, src);
  if (src.numel() == 0) return;
  const Tensor dense = with_dense_channels(base), dense_src = with_dense_channels(apart_from(src, base));
  [[maybe_unused]] const Stream stream = current_stream(base);
  const Rows to = rows_of(dense), from = rows_of(dense_src);
  dispatch_access(common_alignment(t.row_bytes, to, from), [&](auto* type) {
    using Access = std::remove_pointer_t<decltype(type)>;
    SHIVA_LAUNCH(
        token_scatter_in_place_kernel<Access>, row_blocks(t.B * t.k), kRowThreads, 0, stream, to,
        data<int64_t>(t.index), from, t.B * t.k, t.k, t.row_bytes / static_cast<int64_t>(sizeof(Access)));
  });
  check_launch(op);
  if (dense.data_ptr() != base.data_ptr()) torch::stable::copy_(base, dense);
}

// -> grad with the rows index set to zero [B, N, D], grad gathered at index [B, k, D]
std::tuple<Tensor, Tensor> token_scatter_backward(const Tensor& grad, const Tensor& index) {
  constexpr char op[] = "token_scatter_backward";
  const Tokens t = check_token_scatter_backward(op, grad, index, kPlace);
  const int64_t B = t.B, N = t.N, k = t.k;
  const Guard guard(op, grad, index);
  const Tensor dense = with_dense_channels(grad);
  const Tensor position = torch::stable::new_empty(grad, {B, N}, ScalarType::Long);
  Tensor grad_base = torch::stable::new_empty(grad, {B, N, t.D}),
         grad_src = torch::stable::new_empty(grad, {B, k, t.D});
  if (grad.numel() == 0) return {grad_base, grad_src};
  const Stream stream = current_stream(grad);
  invert_index(data<int64_t>(t.index), B, k, N, data<int64_t>(position), stream);
  const Rows from = rows_of(dense);
  dispatch_access(common_alignment(t.row_bytes, from, rows_of(grad_base), rows_of(grad_src)), [&](auto* type) {
    using Access = std::remove_pointer_t<decltype(type)>;
    SHIVA_LAUNCH(
        token_scatter_backward_kernel<Access>, row_blocks(B * N), kRowThreads, 0, stream, from, data<int64_t>(position),
        B * N, N, k, t.row_bytes / static_cast<int64_t>(sizeof(Access)), data<Access>(grad_base),
        data<Access>(grad_src));
  });
  check_launch(op);
  return {grad_base, grad_src};
}

}  // namespace
}  // namespace shiva::cuda

SHIVA_REGISTER(m) {
  m.impl("token_scatter", TORCH_BOX(&shiva::cuda::token_scatter));
  m.impl("token_scatter_", TORCH_BOX(&shiva::cuda::token_scatter_));
  m.impl("token_scatter_backward", TORCH_BOX(&shiva::cuda::token_scatter_backward));
}
