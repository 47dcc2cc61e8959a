// Rows of x at an index; backward, the rows of the gradient at their places or, for a shared table, their sum.
#pragma once

#include "cuda/row_copy.cuh"

namespace shiva::cuda {

// out[b, j] = x[b, index[b, j]], rows of `count` accesses; rows = B k.
template <typename Access>
__global__ void __launch_bounds__(kRowThreads)
    token_gather_kernel(Rows x, const int64_t* index, int64_t rows, int64_t k, int64_t count, Access* out) {
  for (int64_t row = first_row(); row < rows; row += row_step())
    copy_row<Access>(x.at<Access>(row / k, index[row]), count, out + row * count);
}

// out[b, t] = grad[b, position[b, t]], or zero where that is -1; rows = B n.
template <typename Access>
__global__ void __launch_bounds__(kRowThreads) token_gather_backward_kernel(
    Rows grad, const int64_t* position, int64_t rows, int64_t n, int64_t count, Access* out) {
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const int64_t place = position[row];
    if (place >= 0)
      copy_row<Access>(grad.at<Access>(row / n, place), count, out + row * count);
    else
      zero_row(count, out + row * count);
  }
}

// out[t] = sum over b, in order, of grad[b, position[b, t]] where that is not -1. One warp for 32 packs of a row, so
// that there are enough warps also for a short table.
template <typename P>
__global__ void __launch_bounds__(kRowThreads) token_gather_table_backward_kernel(
    Rows grad, const int64_t* position, int64_t B, int64_t n, int64_t packs, P* out) {
  using T = typename P::Element;
  const int64_t pieces = ceil_div(packs, kWarp);
  for (int64_t item = first_row(); item < n * pieces; item += row_step()) {
    const int64_t token = item / pieces, i = item % pieces * kWarp + lane_of_warp();
    if (i >= packs) continue;
    acc_t<T> sum[P::size] = {};
    for (int64_t b = 0; b < B; ++b) {
      const int64_t place = position[b * n + token];
      if (place < 0) continue;
      const P part = grad.at<P>(b, place)[i];
#pragma unroll
      for (int c = 0; c < P::size; ++c) sum[c] += load(part.at[c]);
    }
    P total;
#pragma unroll
    for (int c = 0; c < P::size; ++c) total.at[c] = store<T>(sum[c]);
    out[token * packs + i] = total;
  }
}

}  // namespace shiva::cuda
