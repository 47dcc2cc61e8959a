// The residual straight-through estimator: a copy of x and of its kept rows; backward, one pass with a dot product.
#pragma once

#include "cuda/row_copy.cuh"

namespace shiva::cuda {

// base[b, t] = x[b, t] and, where a position is given, selected[b, position[b, t]] = x[b, t]; rows = B n.
template <typename Access>
__global__ void __launch_bounds__(kRowThreads) residual_gate_kernel(
    Rows x, const int64_t* position, int64_t rows, int64_t n, int64_t k, int64_t count, Access* selected,
    Access* base) {
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const int64_t b = row / n, place = position[row];
    Access* also = place >= 0 ? selected + (b * k + place) * count : nullptr;
    copy_row<Access>(x.at<Access>(b, row - b * n), count, base + row * count, also);
  }
}

// Kept tokens: grad_x = grad_base + grad_selected, grad_inclusion = <grad_selected, x>.
// Rejected ones: grad_x = grad_base, grad_inclusion = -<grad_base, x>. rows = B n, of `packs` packs each.
// Nothing is unrolled: a turn's store keeps the next turn's loads behind it, so that only registers would be spent.
template <typename P>
__global__ void __launch_bounds__(kRowThreads) residual_gate_backward_kernel(
    Rows grad_selected, Rows grad_base, Rows x, const int64_t* position, int64_t rows, int64_t n, int64_t packs,
    P* grad_x, acc_t<typename P::Element>* grad_inclusion) {
  using T = typename P::Element;
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const int64_t b = row / n, token = row - b * n, place = position[row];
    const P* values = x.at<P>(b, token);
    const P* straight = grad_base.at<P>(b, token);
    P* out = grad_x + row * packs;
    acc_t<T> sum = 0;
    if (place >= 0) {
      const P* gated = grad_selected.at<P>(b, place);
#pragma unroll 1
      for (int64_t i = lane_of_warp(); i < packs; i += kWarp) {
        const P value = values[i], gate = gated[i];
        P grad = straight[i];
#pragma unroll
        for (int c = 0; c < P::size; ++c) {
          grad.at[c] = store<T>(load(grad.at[c]) + load(gate.at[c]));
          sum += load(gate.at[c]) * load(value.at[c]);
        }
        out[i] = grad;
      }
    } else {
#pragma unroll 1
      for (int64_t i = lane_of_warp(); i < packs; i += kWarp) {
        const P value = values[i], grad = straight[i];
#pragma unroll
        for (int c = 0; c < P::size; ++c) sum -= load(grad.at[c]) * load(value.at[c]);
        out[i] = grad;
      }
    }
    sum = warp_sum(sum);
    if (lane_of_warp() == 0) grad_inclusion[row] = sum;
  }
}

}  // namespace shiva::cuda
