#include "cuda/launch.h"
#include "cuda/token_gather_kernel.cuh"

namespace shiva::cuda {
namespace {

// x [B, N, D], or [N, D] shared by all rows of index [B, k] -> [B, k, D]
Tensor token_gather(const Tensor& x, const Tensor& index) {
  constexpr char op[] = "token_gather";
  const Tokens t = check_token_gather(op, x, index, kPlace);
  const int64_t B = t.B, k = t.k;
  const Guard guard(op, x, index);
  const Tensor dense = with_dense_channels(x);
  Tensor out = torch::stable::new_empty(x, {B, k, t.D});
  if (out.numel() == 0) return out;
  [[maybe_unused]] const Stream stream = current_stream(x);
  const Rows from = rows_of(dense);
  dispatch_access(common_alignment(t.row_bytes, from, rows_of(out)), [&](auto* type) {
    using Access = std::remove_pointer_t<decltype(type)>;
    SHIVA_LAUNCH(
        token_gather_kernel<Access>, row_blocks(B * k), kRowThreads, 0, stream, from, data<int64_t>(t.index), B * k, k,
        t.row_bytes / static_cast<int64_t>(sizeof(Access)), data<Access>(out));
  });
  check_launch(op);
  return out;
}

// grad [B, k, D] -> rows of grad at index, zero elsewhere: [B, n, D], or their sum over B [n, D] when broadcast.
Tensor token_gather_backward(const Tensor& grad, const Tensor& index, int64_t n, bool broadcast) {
  constexpr char op[] = "token_gather_backward";
  const Tokens t = check_token_gather_backward(op, grad, index, n, kPlace);
  const int64_t B = t.B, D = t.D;
  const Guard guard(op, grad, index);
  const Tensor dense = with_dense_channels(grad);
  const Tensor position = torch::stable::new_empty(grad, {B, n}, ScalarType::Long);
  Tensor out = broadcast ? torch::stable::new_empty(grad, {n, D}) : torch::stable::new_empty(grad, {B, n, D});
  if (out.numel() == 0) return out;
  const Stream stream = current_stream(grad);
  invert_index(data<int64_t>(t.index), B, t.k, n, data<int64_t>(position), stream);
  const Rows from = rows_of(dense);
  const uint64_t alignment = common_alignment(t.row_bytes, from, rows_of(out));
  if (broadcast) {
    dispatch(t.dtype, [&](auto* element) {
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
          data<int64_t>(position), B * n, n, t.row_bytes / static_cast<int64_t>(sizeof(Access)), data<Access>(out));
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
