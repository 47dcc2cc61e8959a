#include "cuda/ema_scan_kernel.cuh"
#include "cuda/launch.h"

namespace shiva::cuda {
namespace {

struct Chunks {
  unsigned blocks;
  int64_t parts;        // warps that share a row
  Tensor carry, decay;  // [B, chunks, D], [B, chunks]
};

Chunks chunks_of(const char* op, const Tensor& x, const Scan& t) {
  const int64_t chunks = ceil_div(t.M, kScanChunk), tiles = ceil_div(t.D, kScanChannels);
  const ScalarType type = accumulate_type(x);
  return {
      grid_size(op, t.B * chunks * tiles), tiles * kScanWarps, torch::stable::new_empty(x, {t.B, chunks, t.D}, type),
      torch::stable::new_empty(x, {t.B, chunks}, type)};
}

// x [B, M, D], p [B, M] -> e [B, M, D]
Tensor ema_scan(const Tensor& x, const Tensor& p) {
  constexpr char op[] = "ema_scan";
  const Scan t = check_ema_scan(op, x, p, kPlace);
  const Guard guard(op, x, p);
  const Tensor dense = with_dense_channels(x);
  Tensor out = torch::stable::new_empty(x, {t.B, t.M, t.D});
  if (out.numel() == 0) return out;
  const Chunks chunks = chunks_of(op, x, t);
  const Stream stream = current_stream(x);
  const Rows rows = rows_of(dense);
  dispatch(t.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    SHIVA_LAUNCH(
        (ema_carry_kernel<T, false>), chunks.blocks, kScanChannels, 0, stream, rows, data<A>(t.p), t.M, t.D,
        data<A>(chunks.carry), data<A>(chunks.decay));
    SHIVA_LAUNCH(
        ema_scan_kernel<T>, chunks.blocks, kScanChannels, 0, stream, rows, data<A>(t.p), data<A>(chunks.carry),
        data<A>(chunks.decay), t.M, t.D, data<T>(out));
  });
  check_launch(op);
  return out;
}

// -> grad_x [B, M, D], grad_p [B, M] in the accumulation dtype
std::tuple<Tensor, Tensor> ema_scan_backward(const Tensor& grad, const Tensor& x, const Tensor& p, const Tensor& e) {
  constexpr char op[] = "ema_scan_backward";
  const Scan t = check_ema_scan_backward(op, grad, x, p, e, kPlace);
  const Guard guard(op, x, grad, p, e);
  const Tensor dense_grad = with_dense_channels(grad), dense = with_dense_channels(x), dense_e = with_dense_channels(e);
  Tensor grad_x = torch::stable::new_empty(x, {t.B, t.M, t.D});
  const ScalarType wide = accumulate_type(x);
  if (grad_x.numel() == 0) return {grad_x, torch::stable::new_zeros(x, {t.B, t.M}, wide)};
  Tensor grad_p = torch::stable::new_empty(x, {t.B, t.M}, wide);
  const Chunks chunks = chunks_of(op, x, t);
  const Tensor part = torch::stable::new_empty(x, {chunks.parts, t.B, t.M}, wide);
  const Stream stream = current_stream(x);
  const Rows grads = rows_of(dense_grad), rows = rows_of(dense), averages = rows_of(dense_e);
  dispatch(t.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    SHIVA_LAUNCH(
        (ema_carry_kernel<T, true>), chunks.blocks, kScanChannels, 0, stream, grads, data<A>(t.p), t.M, t.D,
        data<A>(chunks.carry), data<A>(chunks.decay));
    SHIVA_LAUNCH(
        ema_scan_backward_kernel<T>, chunks.blocks, kScanChannels, 0, stream, grads, rows, averages, data<A>(t.p),
        data<A>(chunks.carry), data<A>(chunks.decay), t.B, t.M, t.D, data<T>(grad_x), data<A>(part));
    SHIVA_LAUNCH(
        ema_parts_kernel<A>, grid_size(op, ceil_div(t.B * t.M, kRowThreads)), kRowThreads, 0, stream, data<A>(part),
        chunks.parts, t.B * t.M, data<A>(grad_p));
  });
  check_launch(op);
  return {grad_x, grad_p};
}

}  // namespace
}  // namespace shiva::cuda

SHIVA_REGISTER(m) {
  m.impl("ema_scan", TORCH_BOX(&shiva::cuda::ema_scan));
  m.impl("ema_scan_backward", TORCH_BOX(&shiva::cuda::ema_scan_backward));
}
