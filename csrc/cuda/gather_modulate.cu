#include "cuda/gather_modulate_kernel.cuh"
#include "cuda/inverse_index.cuh"
#include "cuda/launch.h"

namespace shiva::cuda {
namespace {

Strides strides_of(const Tensor& t) { return {t.size(0) > 1 ? t.stride(0) : 0, t.size(1) > 1 ? t.stride(1) : 0}; }

// Threads, in whole warps, for a row of D channels when each holds `channels` of them.
unsigned threads_for(int64_t D, int64_t channels) {
  return static_cast<unsigned>(ceil_div(ceil_div(D, channels), kWarp) * kWarp);
}

// Float64 values take two registers each.
template <typename T>
constexpr int kHalved = sizeof(acc_t<T>) == 8 ? 2 : 1;

struct Forward {
  const Tensor &x, &index, &shift, &scale;  // x with dense channels, the others contiguous
  int64_t rows, k, D;
  double eps;
  const Tensor& out;
  Stream stream;
};

template <typename T, int kWidth>
void modulate(const char* op, const Forward& f) {
  // Channels that a thread holds. Those that cannot be read in vectors need more registers for their addresses.
  constexpr int kWarpRowChannels = (kWidth == 1 ? 8 : 32) / kHalved<T>, kBlockRowChannels = 16 / kHalved<T>;
  const auto launch = [&](auto warp_row) {
    constexpr bool kWarpRow = decltype(warp_row)::value;
    constexpr int kPacks = (kWarpRow ? kWarpRowChannels : kBlockRowChannels) / kWidth;
    const unsigned threads = kWarpRow ? kWarpRowThreads : threads_for(f.D, kBlockRowChannels);
    SHIVA_LAUNCH(
        (gather_modulate_kernel<T, kWidth, kPacks, kWarpRow>),
        grid_size(op, ceil_div(f.rows, kWarpRow ? kWarpRowThreads / kWarp : 1)), threads, 0, f.stream, data<T>(f.x),
        strides_of(f.x), data<int64_t>(f.index), data<T>(f.shift), data<T>(f.scale), f.rows, f.k, static_cast<int>(f.D),
        static_cast<acc_t<T>>(f.eps), data<T>(f.out));
  };
  if (f.D <= kWarp * kWarpRowChannels) return launch(std::true_type());
  // Rows that cannot be read in vectors are rare enough to go the slow way as soon as they outgrow a warp.
  if constexpr (kWidth > 1)
    if (f.D <= kModulateThreads * kBlockRowChannels) return launch(std::false_type());
  SHIVA_LAUNCH(
      (gather_modulate_wide_kernel<T, kWidth>), grid_size(op, f.rows), kWideRowThreads, 0, f.stream, data<T>(f.x),
      strides_of(f.x), data<int64_t>(f.index), data<T>(f.shift), data<T>(f.scale), f.k, f.D,
      static_cast<acc_t<T>>(f.eps), data<T>(f.out));
}

// LayerNorm of the rows index [B, k] of x [B, N, D], * (1 + scale [B, D]) + shift [B, D] -> [B, k, D]
Tensor gather_modulate(const Tensor& x, const Tensor& index, const Tensor& shift, const Tensor& scale, double eps) {
  constexpr char op[] = "gather_modulate";
  const Tokens t = check_gather_modulate(op, x, index, shift, scale, eps, kPlace);
  const int64_t D = t.D;
  const Guard guard(op, x, index, shift, scale);
  const Tensor dense = with_dense_channels(x);
  const Tensor shifts = torch::stable::contiguous(shift), scales = torch::stable::contiguous(scale);
  Tensor out = torch::stable::new_empty(x, {t.B, t.k, D});
  if (out.numel() == 0) return out;
  const Forward f = {dense, t.index, shifts, scales, t.B * t.k, t.k, D, eps, out, current_stream(x)};
  dispatch(t.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kWidth = Vec<T>::size;
    const bool vectors = D % kWidth == 0 && rows_are_aligned(data<T>(dense), strides_of(dense), kWidth) &&
                         rows_are_aligned(data<T>(shifts), {D, 0}, kWidth) &&
                         rows_are_aligned(data<T>(scales), {D, 0}, kWidth);
    if (vectors)
      modulate<T, kWidth>(op, f);
    else
      modulate<T, 1>(op, f);
  });
  check_launch(op);
  return out;
}

template <typename T, int kWidth>
void modulate_backward(const char* op, const ModulateBackward<T>& m, int64_t B, int64_t D, Stream stream) {
  constexpr int kChannels = kWidth == 1 ? 2 : kHalved<T> == 2 ? 4 : 16;  // of a row, its gradient and two sums
  const unsigned blocks = grid_size(op, B * m.chunks);
  if (D <= kBackwardThreads * kChannels)
    SHIVA_LAUNCH(
        (gather_modulate_backward_kernel<T, kWidth, kChannels / kWidth>), blocks, threads_for(D, kChannels), 0, stream,
        m, static_cast<int>(D));
  else
    SHIVA_LAUNCH((gather_modulate_backward_wide_kernel<T, kWidth>), blocks, kWideRowThreads, 0, stream, m, D);
}

// Zeroes the rows of grad_x [B, N, D] that are not in index [B, k].
void zero_other_rows(const char* op, const Tensor& index, const Tensor& grad_x, Stream stream) {
  const int64_t B = grad_x.size(0), N = grad_x.size(1), k = index.size(1);
  const int64_t row_bytes = grad_x.size(2) * static_cast<int64_t>(grad_x.element_size());
  const Tensor position = torch::stable::new_empty(grad_x, {B, N}, ScalarType::Long);
  invert_index(data<int64_t>(index), B, k, N, data<int64_t>(position), stream);
  const unsigned blocks = grid_size(op, ceil_div(B * N, kWarpRowThreads / kWarp));
  if (row_bytes % 16 == 0)
    SHIVA_LAUNCH(
        zero_absent_rows_kernel<uint4>, blocks, kWarpRowThreads, 0, stream, data<int64_t>(position), B * N,
        row_bytes / 16, data<uint4>(grad_x));
  else
    SHIVA_LAUNCH(
        zero_absent_rows_kernel<uint16_t>, blocks, kWarpRowThreads, 0, stream, data<int64_t>(position), B * N,
        row_bytes / 2, data<uint16_t>(grad_x));
}

// grad [B, k, D] -> grad_x [B, N, D], grad_shift [B, D], grad_scale [B, D]
std::tuple<Tensor, Tensor, Tensor> gather_modulate_backward(
    const Tensor& grad, const Tensor& x, const Tensor& index, const Tensor& scale, double eps) {
  constexpr char op[] = "gather_modulate_backward";
  const Tokens t = check_gather_modulate_backward(op, grad, x, index, scale, eps, kPlace);
  const int64_t B = t.B, N = t.N, k = t.k, D = t.D;
  const Guard guard(op, x, grad, index, scale);
  const Tensor dense = with_dense_channels(x), dense_grad = with_dense_channels(grad);
  const Tensor scales = torch::stable::contiguous(scale);
  Tensor grad_x = torch::stable::new_empty(x, {B, N, D});
  Tensor grad_shift = torch::stable::new_empty(x, {B, D}), grad_scale = torch::stable::new_empty(x, {B, D});
  if (B == 0 || D == 0) return {grad_x, grad_shift, grad_scale};
  const int64_t chunk_rows = rows_per_chunk(B * k), chunks = ceil_div(k, chunk_rows);
  const Tensor partial = torch::stable::new_empty(x, {B, chunks, 2, D}, accumulate_type(x));
  const Stream stream = current_stream(x);
  if (N > 0) zero_other_rows(op, t.index, grad_x, stream);
  dispatch(t.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kWidth = Vec<T>::size;
    const Strides x_strides = strides_of(dense), grad_strides = strides_of(dense_grad);
    const ModulateBackward<T> m = {
        .grad = data<T>(dense_grad),
        .grad_strides = grad_strides,
        .x = data<T>(dense),
        .x_strides = x_strides,
        .index = data<int64_t>(t.index),
        .scale = data<T>(scales),
        .N = N,
        .k = k,
        .chunk_rows = chunk_rows,
        .chunks = chunks,
        .eps = static_cast<acc_t<T>>(eps),
        .grad_x = data<T>(grad_x),
        .partial = data<acc_t<T>>(partial),
    };
    const bool vectors = D % kWidth == 0 && rows_are_aligned(m.grad, grad_strides, kWidth) &&
                         rows_are_aligned(m.x, x_strides, kWidth) && rows_are_aligned(m.scale, {D, 0}, kWidth);
    if (k > 0 && vectors)
      modulate_backward<T, kWidth>(op, m, B, D, stream);
    else if (k > 0)
      modulate_backward<T, 1>(op, m, B, D, stream);
    SHIVA_LAUNCH(
        sum_chunks_kernel<T>, grid_size(op, B * ceil_div(2 * D, kWarp)), kSumWarps * kWarp, 0, stream, m.partial,
        chunks, 2 * D, D, data<T>(grad_shift), data<T>(grad_scale));
  });
  check_launch(op);
  return {grad_x, grad_shift, grad_scale};
}

}  // namespace
}  // namespace shiva::cuda

SHIVA_REGISTER(m) {
  m.impl("gather_modulate", TORCH_BOX(&shiva::cuda::gather_modulate));
  m.impl("gather_modulate_backward", TORCH_BOX(&shiva::cuda::gather_modulate_backward));
}
