#include "cuda/launch.h"
#include "cuda/token_scatter_kernel.cuh"

namespace shiva::cuda {
namespace {

// Checks base [B, N, D], index [B, k], src [B, k, D]; returns the index as contiguous int64.
Tensor check_scatter(const char* op, const Tensor& base, const Tensor& index, const Tensor& src) {
  check_dim(op, "base", base, 3);
  floating_dtype(op, "base", base);
  const Tensor kept = checked_index(op, "index", index, base.size(0), base.size(1));
  check_shape(op, "src", src, {base.size(0), kept.size(1), base.size(2)});
  check_same_dtype(op, "src", src, "base", base);
  return kept;
}

// base [B, N, D] with the rows index [B, k] replaced by src [B, k, D]
Tensor token_scatter(const Tensor& base, const Tensor& index, const Tensor& src) {
  constexpr char op[] = "token_scatter";
  const Tensor kept = check_scatter(op, base, index, src);
  const int64_t B = base.size(0), N = base.size(1), D = base.size(2);
  const Guard guard(base);
  const Tensor dense = with_dense_channels(base), dense_src = with_dense_channels(src);
  const Tensor position = torch::stable::new_empty(base, {B, N}, ScalarType::Long);
  Tensor out = torch::stable::new_empty(base, {B, N, D});
  if (out.numel() == 0) return out;
  const Stream stream = current_stream(base);
  invert_index(data<int64_t>(kept), B, kept.size(1), N, data<int64_t>(position), stream);
  replace_rows(
      rows_of(dense), rows_of(dense_src), data<int64_t>(position), B, N, D * static_cast<int64_t>(base.element_size()),
      data<char>(out), stream);
  check_launch(op);
  return out;
}

void token_scatter_(Tensor base, const Tensor& index, const Tensor& src) {
  constexpr char op[] = "token_scatter_";
  const Tensor kept = check_scatter(op, base, index, src);
  for (int64_t d = 0; d < 3; ++d)
    SHIVA_CHECK(
        base.size(d) <= 1 || base.stride(d) != 0, op,
        "base is expanded, its rows share memory; call it on base.clone()");
  const int64_t B = base.size(0), k = kept.size(1);
  const int64_t row_bytes = base.size(2) * static_cast<int64_t>(base.element_size());
  const Guard guard(base);
  if (src.numel() == 0) return;
  const Tensor dense = with_dense_channels(base), dense_src = with_dense_channels(src);
  [[maybe_unused]] const Stream stream = current_stream(base);
  const Rows to = rows_of(dense), from = rows_of(dense_src);
  dispatch_access(common_alignment(row_bytes, to, from), [&](auto* type) {
    using Access = std::remove_pointer_t<decltype(type)>;
    SHIVA_LAUNCH(
        token_scatter_in_place_kernel<Access>, row_blocks(B * k), kRowThreads, 0, stream, to, data<int64_t>(kept), from,
        B * k, k, row_bytes / static_cast<int64_t>(sizeof(Access)));
  });
  check_launch(op);
  if (dense.data_ptr() != base.data_ptr()) torch::stable::copy_(base, dense);
}

// -> grad with the rows index set to zero [B, N, D], grad gathered at index [B, k, D]
std::tuple<Tensor, Tensor> token_scatter_backward(const Tensor& grad, const Tensor& index) {
  constexpr char op[] = "token_scatter_backward";
  check_dim(op, "grad", grad, 3);
  floating_dtype(op, "grad", grad);
  const int64_t B = grad.size(0), N = grad.size(1), D = grad.size(2);
  const Tensor kept = checked_index(op, "index", index, B, N);
  const int64_t k = kept.size(1), row_bytes = D * static_cast<int64_t>(grad.element_size());
  const Guard guard(grad);
  const Tensor dense = with_dense_channels(grad);
  const Tensor position = torch::stable::new_empty(grad, {B, N}, ScalarType::Long);
  Tensor grad_base = torch::stable::new_empty(grad, {B, N, D}), grad_src = torch::stable::new_empty(grad, {B, k, D});
  if (grad.numel() == 0) return {grad_base, grad_src};
  const Stream stream = current_stream(grad);
  invert_index(data<int64_t>(kept), B, k, N, data<int64_t>(position), stream);
  const Rows from = rows_of(dense);
  dispatch_access(common_alignment(row_bytes, from, rows_of(grad_base), rows_of(grad_src)), [&](auto* type) {
    using Access = std::remove_pointer_t<decltype(type)>;
    SHIVA_LAUNCH(
        token_scatter_backward_kernel<Access>, row_blocks(B * N), kRowThreads, 0, stream, from, data<int64_t>(position),
        B * N, N, k, row_bytes / static_cast<int64_t>(sizeof(Access)), data<Access>(grad_base), data<Access>(grad_src));
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
