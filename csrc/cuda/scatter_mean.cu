#include "cuda/launch.h"
#include "cuda/scatter_mean_kernel.cuh"

namespace shiva::cuda {
namespace {

Strides strides_of(const Tensor& t) { return {t.size(0) > 1 ? t.stride(0) : 0, t.size(1) > 1 ? t.stride(1) : 0}; }

template <typename T>
bool vectors(const Tensor& rows, int64_t D) {
  constexpr int kWidth = Vec<T>::size;
  return D % kWidth == 0 && rows_are_aligned(data<T>(rows), strides_of(rows), kWidth);
}

// Calls body with the element type and how many elements to move at once.
template <typename Body>
void dispatch_width(Dtype dtype, const Tensor& rows, int64_t D, Body body) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (vectors<T>(rows, D))
      body(type, std::integral_constant<int, Vec<T>::size>());
    else
      body(type, std::integral_constant<int, 1>());
  });
}

// start [B, M + 1], and order unless null; M > 0
void group_tokens(const char* op, const Tokens& t, int* start, int* order, Stream stream) {
  const int64_t ranges = ceil_div(t.k, kGroupRange);
  SHIVA_LAUNCH(
      group_tokens_kernel, grid_size(op, t.B * ranges), kGroupThreads, 0, stream, data<int64_t>(t.index), t.N, t.k,
      ranges, start, order);
}

// x [B, N, D], position [B, N] -> each group's mean [B, num_groups, D]
Tensor scatter_mean(const Tensor& x, const Tensor& position, int64_t num_groups) {
  constexpr char op[] = "scatter_mean";
  const Tokens t = check_scatter_mean(op, x, position, num_groups, kPlace);
  const int64_t B = t.B, N = t.N, D = t.D, M = t.k;
  const Guard guard(op, x, position);
  const Tensor dense = with_dense_channels(x);
  Tensor out = torch::stable::new_empty(x, {B, M, D});
  if (out.numel() == 0) return out;
  const Stream stream = current_stream(x);
  const Tensor start = torch::stable::new_empty(x, {B, M + 1}, ScalarType::Int);
  const Tensor order = torch::stable::new_empty(x, {B, N}, ScalarType::Int);
  group_tokens(op, t, data<int>(start), data<int>(order), stream);
  dispatch_width(t.dtype, dense, D, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kWidth = decltype(width)::value;
    SHIVA_LAUNCH(
        (scatter_mean_kernel<T, kWidth>), grid_size(op, ceil_div(B * M, kMeanThreads / kWarp)), kMeanThreads, 0, stream,
        data<T>(dense), strides_of(dense), data<int>(start), data<int>(order), B * M, N, M, D, data<T>(out));
  });
  check_launch(op);
  return out;
}

// grad [B, M, D] -> each token's share of its group's gradient [B, N, D]
Tensor scatter_mean_backward(const Tensor& grad, const Tensor& position) {
  constexpr char op[] = "scatter_mean_backward";
  const Tokens t = check_scatter_mean_backward(op, grad, position, kPlace);
  const int64_t B = t.B, N = t.N, D = t.D, M = t.k;
  const Guard guard(op, grad, position);
  const Tensor dense = with_dense_channels(grad);
  Tensor out = torch::stable::new_empty(grad, {B, N, D});
  if (out.numel() == 0) return out;
  const Stream stream = current_stream(grad);
  const Tensor start = torch::stable::new_empty(grad, {B, M + 1}, ScalarType::Int);
  group_tokens(op, t, data<int>(start), nullptr, stream);
  dispatch_width(t.dtype, dense, D, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kWidth = decltype(width)::value;
    SHIVA_LAUNCH(
        (scatter_mean_backward_kernel<T, kWidth>), grid_size(op, ceil_div(B * N, kMeanThreads / kWarp)), kMeanThreads,
        0, stream, data<T>(dense), strides_of(dense), data<int64_t>(t.index), data<int>(start), B * N, N, M, D,
        data<T>(out));
  });
  check_launch(op);
  return out;
}

}  // namespace
}  // namespace shiva::cuda

SHIVA_REGISTER(m) {
  m.impl("scatter_mean", TORCH_BOX(&shiva::cuda::scatter_mean));
  m.impl("scatter_mean_backward", TORCH_BOX(&shiva::cuda::scatter_mean_backward));
}
