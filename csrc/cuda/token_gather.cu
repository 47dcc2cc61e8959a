#include "cuda/launch.h"
#include "cuda/token_gather_kernel.cuh"

namespace shiva::cuda {
namespace {

// x [B, N, D], or [N, D] shared by all rows of index [B, k] -> [B, k, D]
Tensor token_gather(const Tensor& x, const Tensor& index) {
  constexpr char op[] = "token_gather";
  SHIVA_CHECK(x.dim() == 3 || x.dim() == 2, op, "x must have shape [B, N, D] or [N, D], got ", shape_of(x));
  check_dim(op, "x", x, x.dim());
  floating_dtype(op, "x", x);
  const int64_t N = x.size(x.dim() - 2), D = x.size(x.dim() - 1);
  const Tensor kept = checked_index(op, "index", index, x.dim() == 3 ? x.size(0) : index.size(0), N);
  const int64_t B = kept.size(0), k = kept.size(1), row_bytes = D * static_cast<int64_t>(x.element_size());
  const Guard guard(x);
  const Tensor dense = with_dense_channels(x);
  Tensor out = torch::stable::new_empty(x, {B, k, D});
  if (out.numel() == 0) return out;
  [[maybe_unused]] const Stream stream = current_stream(x);
  const Rows from = rows_of(dense);
  dispatch_access(common_alignment(row_bytes, from, rows_of(out)), [&](auto* type) {
    using Access = std::remove_pointer_t<decltype(type)>;
    SHIVA_LAUNCH(
        token_gather_kernel<Access>, row_blocks(B * k), kRowThreads, 0, stream, from, data<int64_t>(kept), B * k, k,
        row_bytes / static_cast<int64_t>(sizeof(Access)), data<Access>(out));
  });
  check_launch(op);
  return out;
}

// grad [B, k, D] -> rows of grad at index, zero elsewhere: [B, n, D], or their sum over B [n, D] when broadcast.
Tensor token_gather_backward(const Tensor& grad, const Tensor& index, int64_t n, bool broadcast) {
  constexpr char op[] = "token_gather_backward";
  check_dim(op, "grad", grad, 3);
  const Dtype dtype = floating_dtype(op, "grad", grad);
  SHIVA_CHECK(n >= 0, op, "n must not be negative, got ", n);
  const int64_t B = grad.size(0), k = grad.size(1), D = grad.size(2);
  const Tensor kept = checked_index(op, "index", index, B, n);
  check_shape(op, "index", kept, {B, k});
  const int64_t row_bytes = D * static_cast<int64_t>(grad.element_size());
  const Guard guard(grad);
  const Tensor dense = with_dense_channels(grad);
  const Tensor position = torch::stable::new_empty(grad, {B, n}, ScalarType::Long);
  Tensor out = broadcast ? torch::stable::new_empty(grad, {n, D}) : torch::stable::new_empty(grad, {B, n, D});
  if (out.numel() == 0) return out;
  const Stream stream = current_stream(grad);
  invert_index(data<int64_t>(kept), B, k, n, data<int64_t>(position), stream);
  const Rows from = rows_of(dense);
  const uint64_t alignment = common_alignment(row_bytes, from, rows_of(out));
  if (broadcast) {
    dispatch(dtype, [&](auto* element) {
      dispatch_pack<std::remove_pointer_t<decltype(element)>>(alignment, [&](auto* type) {
        using P = std::remove_pointer_t<decltype(type)>;
        const int64_t packs = D / P::size;
        SHIVA_LAUNCH(
            token_gather_table_backward_kernel<P>, row_blocks(n * ceil_div(packs, kWarp)), kRowThreads, 0, stream, from,
            data<int64_t>(position), B, n, packs, data<P>(out));
      });
    });
  } else {
    dispatch_access(alignment, [&](auto* type) {
      using Access = std::remove_pointer_t<decltype(type)>;
      SHIVA_LAUNCH(
          token_gather_backward_kernel<Access>, row_blocks(B * n), kRowThreads, 0, stream, from,
          data<int64_t>(position), B * n, n, row_bytes / static_cast<int64_t>(sizeof(Access)), data<Access>(out));
    });
  }
  check_launch(op);
  return out;
}

}  // namespace
}  // namespace shiva::cuda

SHIVA_REGISTER(m) {
  m.impl("token_gather", TORCH_BOX(&shiva::cuda::token_gather));
  m.impl("token_gather_backward", TORCH_BOX(&shiva::cuda::token_gather_backward));
}
