// Rows of base replaced at an index, into a new tensor or in place, and the backward's split of a gradient.
#pragma once

#include "cuda/row_copy.cuh"

namespace shiva::cuda {

// out[b, t] = src[b, position[b, t]], or base[b, t] where that is -1, rows of `count` accesses; rows = B n.
template <typename Access>
__global__ void __launch_bounds__(kRowThreads) token_scatter_kernel(
    Rows base, Rows src, const int64_t* position, int64_t rows, int64_t n, int64_t count, Access* out) {
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const int64_t b = row / n, place = position[row];
    copy_row<Access>(place >= 0 ? src.at<Access>(b, place) : base.at<Access>(b, row - b * n), count, out + row * count);
  }
}

// base[b, index[b, j]] = src[b, j]; rows = B k.
template <typename Access>
__global__ void __launch_bounds__(kRowThreads)
    token_scatter_in_place_kernel(Rows base, const int64_t* index, Rows src, int64_t rows, int64_t k, int64_t count) {
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const int64_t b = row / k;
    copy_row<Access>(src.at<Access>(b, row - b * k), count, base.at<Access>(b, index[row]));
  }
}

// grad_base[b, t] = grad[b, t], but zero where a position is given: that row is grad_src[b, position[b, t]]. rows = B
// n.
template <typename Access>
__global__ void __launch_bounds__(kRowThreads) token_scatter_backward_kernel(
    Rows grad, const int64_t* position, int64_t rows, int64_t n, int64_t k, int64_t count, Access* grad_base,
    Access* grad_src) {
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const int64_t b = row / n, place = position[row];
    Access* rest = grad_base + row * count;
    if (place >= 0) zero_row(count, rest);
    copy_row<Access>(grad.at<Access>(b, row - b * n), count, place >= 0 ? grad_src + (b * k + place) * count : rest);
  }
}

// ---- host

// Launches token_scatter_kernel: base [B, n, D], src [B, k, D], position [B, n] -> out [B, n, D], contiguous.
template <typename Stream>
void replace_rows(
    const Rows& base, const Rows& src, const int64_t* position, int64_t B, int64_t n, int64_t row_bytes, char* out,
    [[maybe_unused]] Stream stream) {
  const Rows to = {out, n * row_bytes, row_bytes};
  dispatch_access(common_alignment(row_bytes, base, src, to), [&](auto* type) {
    using Access = std::remove_pointer_t<decltype(type)>;
    SHIVA_LAUNCH(
        token_scatter_kernel<Access>, row_blocks(B * n), kRowThreads, 0, stream, base, src, position, B * n, n,
        row_bytes / static_cast<int64_t>(sizeof(Access)), reinterpret_cast<Access*>(out));
  });
}

}  // namespace shiva::cuda
