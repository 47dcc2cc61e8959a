#include "cuda/inverse_index.cuh"
#include "cuda/launch.h"
#include "cuda/scatter_residual_kernel.cuh"

namespace shiva::cuda {
namespace {

Strides strides_of(const Tensor& t) { return {t.size(0) > 1 ? t.stride(0) : 0, t.size(1) > 1 ? t.stride(1) : 0}; }

// base or grad and update with dense channels, gate and index contiguous
struct Inputs {
  const Tensor &rows, &update, &gate, &index;
  int64_t B, N, k, D;
  Stream stream;

  template <typename T>
  bool vectors() const {
    constexpr int kWidth = Vec<T>::size;
    return D % kWidth == 0 && rows_are_aligned(data<T>(rows), strides_of(rows), kWidth) &&
           rows_are_aligned(data<T>(update), strides_of(update), kWidth) &&
           rows_are_aligned(data<T>(gate), {D, 0}, kWidth);
  }
};

template <typename T, int kWidth>
void add(const char* op, const Inputs& in, const Tensor& position, const Tensor& out) {
  SHIVA_LAUNCH(
      (scatter_residual_kernel<T, kWidth>), grid_size(op, ceil_div(in.B * in.N, kResidualThreads / kWarp)),
      kResidualThreads, 0, in.stream, data<T>(in.rows), strides_of(in.rows), data<T>(in.update), strides_of(in.update),
      data<T>(in.gate), data<int64_t>(position), in.B * in.N, in.N, in.D, data<T>(out));
}

// base [B, N, D] with rows index [B, k] += gate [B, D] * update [B, k, D]
Tensor scatter_residual(const Tensor& base, const Tensor& index, const Tensor& update, const Tensor& gate) {
  constexpr char op[] = "scatter_residual";
  const Tokens t = check_scatter_residual(op, "base", base, index, update, gate, kPlace);
  const int64_t B = t.B, N = t.N, D = t.D, k = t.k;
  const Guard guard(op, base, index, update, gate);
  const Tensor dense = with_dense_channels(base), dense_update = with_dense_channels(update);
  const Tensor gates = torch::stable::contiguous(gate);
  Tensor out = torch::stable::new_empty(base, {B, N, D});
  if (out.numel() == 0) return out;
  const Inputs in = {dense, dense_update, gates, t.index, B, N, k, D, current_stream(base)};
  const Tensor position = torch::stable::new_empty(base, {B, N}, ScalarType::Long);
  invert_index(data<int64_t>(t.index), B, k, N, data<int64_t>(position), in.stream);
  dispatch(t.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (in.vectors<T>())
      add<T, Vec<T>::size>(op, in, position, out);
    else
      add<T, 1>(op, in, position, out);
  });
  check_launch(op);
  return out;
}

template <typename T, int kWidth>
void backward(const char* op, const Inputs& in, const Tensor& grad_update, const Tensor& grad_gate) {
  const int64_t chunk_rows = rows_per_chunk(in.B * in.k), chunks = ceil_div(in.k, chunk_rows);
  const int64_t packs = ceil_div(in.D, kWidth), tiles = ceil_div(packs, kResidualThreads);
  const unsigned threads = static_cast<unsigned>(ceil_div(ceil_div(packs, tiles), kWarp) * kWarp);
  const Tensor partial = torch::stable::new_empty(in.rows, {in.B, chunks, in.D}, accumulate_type(in.rows));
  if (in.k > 0)
    SHIVA_LAUNCH(
        (scatter_residual_backward_kernel<T, kWidth>), grid_size(op, in.B * chunks * tiles), threads, 0, in.stream,
        data<T>(in.rows), strides_of(in.rows), data<T>(in.update), strides_of(in.update), data<T>(in.gate),
        data<int64_t>(in.index), in.k, in.D, chunk_rows, chunks, tiles, data<T>(grad_update), data<acc_t<T>>(partial));
  SHIVA_LAUNCH(
      sum_chunks_kernel<T>, grid_size(op, in.B * ceil_div(in.D, kWarp)), kSumWarps * kWarp, 0, in.stream,
      data<acc_t<T>>(partial), chunks, in.D, in.D, data<T>(grad_gate), nullptr);
}

// grad [B, N, D] -> grad_update [B, k, D], grad_gate [B, D]; the gradient of base is grad itself
std::tuple<Tensor, Tensor> scatter_residual_backward(
    const Tensor& grad, const Tensor& index, const Tensor& update, const Tensor& gate) {
  constexpr char op[] = "scatter_residual_backward";
  const Tokens t = check_scatter_residual(op, "grad", grad, index, update, gate, kPlace);
  const int64_t B = t.B, N = t.N, D = t.D, k = t.k;
  const Guard guard(op, grad, index, update, gate);
  const Tensor dense = with_dense_channels(grad), dense_update = with_dense_channels(update);
  const Tensor gates = torch::stable::contiguous(gate);
  Tensor grad_update = torch::stable::new_empty(grad, {B, k, D});
  Tensor grad_gate = torch::stable::new_empty(grad, {B, D});
  if (B == 0 || D == 0) return {grad_update, grad_gate};
  const Inputs in = {dense, dense_update, gates, t.index, B, N, k, D, current_stream(grad)};
  dispatch(t.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (in.vectors<T>())
      backward<T, Vec<T>::size>(op, in, grad_update, grad_gate);
    else
      backward<T, 1>(op, in, grad_update, grad_gate);
  });
  check_launch(op);
  return {grad_update, grad_gate};
}

}  // namespace
}  // namespace shiva::cuda

SHIVA_REGISTER(m) {
  m.impl("scatter_residual", TORCH_BOX(&shiva::cuda::scatter_residual));
  m.impl("scatter_residual_backward", TORCH_BOX(&shiva::cuda::scatter_residual_backward));
}
