#include "cpu/ema_scan_kernel.h"

#include "cpu/launch.h"

namespace shiva::cpu {
namespace {

// x [B, M, D], p [B, M] -> e [B, M, D]
Tensor ema_scan(const Tensor& x, const Tensor& p) {
  const Scan t = check_ema_scan("ema_scan", x, p, kPlace);
  const int64_t M = t.M, D = t.D, tiles = ceil_div(D, kScanTile);
  const int64_t element = static_cast<int64_t>(x.element_size()), p_bytes = static_cast<int64_t>(t.p.element_size());
  Tensor out = new_empty(x, {t.B, M, D});
  const Tensor dense = with_dense_channels(x);
  const Rows rows = rows_of(dense);
  parallel(t.B * tiles, 2 * M * kScanTile * element, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tiles, first = (i - b * tiles) * kScanTile;
      SHIVA_CALL_KERNEL(
          ema_tile, t.dtype, rows.at(b, 0) + first * element, rows.row_stride, data<char>(t.p) + b * M * p_bytes, M,
          D - first < kScanTile ? D - first : kScanTile, data<char>(out) + b * M * t.row_bytes + first * element,
          t.row_bytes);
    }
  });
  return out;
}

// -> grad_x [B, M, D], grad_p [B, M] in the accumulation dtype
std::tuple<Tensor, Tensor> ema_scan_backward(const Tensor& grad, const Tensor& x, const Tensor& p, const Tensor& e) {
  const Scan t = check_ema_scan_backward("ema_scan_backward", grad, x, p, e, kPlace);
  const int64_t B = t.B, M = t.M, D = t.D, tiles = ceil_div(D, kScanTile);
  const int64_t element = static_cast<int64_t>(x.element_size()), p_bytes = static_cast<int64_t>(t.p.element_size());
  Tensor grad_x = new_empty(x, {B, M, D}), grad_p = new_empty(t.p, {B, M});
  const Tensor part = new_empty(t.p, {tiles, B, M});  // each tile's share of grad_p
  const Tensor dense_grad = with_dense_channels(grad), dense = with_dense_channels(x), dense_e = with_dense_channels(e);
  const Rows grads = rows_of(dense_grad), rows = rows_of(dense), averages = rows_of(dense_e);
  parallel(B * tiles, 4 * M * kScanTile * element, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tiles, tile = i - b * tiles, first = tile * kScanTile, offset = first * element;
      SHIVA_CALL_KERNEL(
          ema_tile_backward, t.dtype, grads.at(b, 0) + offset, grads.row_stride, rows.at(b, 0) + offset,
          rows.row_stride, averages.at(b, 0) + offset, averages.row_stride, data<char>(t.p) + b * M * p_bytes, M,
          D - first < kScanTile ? D - first : kScanTile, data<char>(grad_x) + b * M * t.row_bytes + offset, t.row_bytes,
          data<char>(part) + (tile * B + b) * M * p_bytes);
    }
  });
  SHIVA_CALL_KERNEL(add_parts, t.dtype, data<char>(part), tiles, B * M, data<char>(grad_p));
  return {grad_x, grad_p};
}

}  // namespace
}  // namespace shiva::cpu

STABLE_TORCH_LIBRARY_IMPL(shiva, CPU, m) {
  m.impl("ema_scan", TORCH_BOX(&shiva::cpu::ema_scan));
  m.impl("ema_scan_backward", TORCH_BOX(&shiva::cpu::ema_scan_backward));
}
