// The counterfactual estimator's backward, in one pass over the data. The forward is token_scatter's kernel.
#pragma once

#include "cuda/row_copy.cuh"

namespace shiva::cuda {

// Kept tokens: grad_base = 0, grad_src = grad, grad_inclusion = <grad, src - base> - kappa |update|^2.
// Rejected ones: grad_base = grad, grad_inclusion = <grad, update> + kappa |update|^2.
// rows = B n, of `packs` packs each; src and grad_src have k rows for each b, position says which.
// Nothing is unrolled: a turn's store keeps the next turn's loads behind it, so that only registers would be spent.
template <typename P>
__global__ void __launch_bounds__(kRowThreads) counterfactual_scatter_backward_kernel(
    Rows grad, Rows base, Rows src, Rows update, const int64_t* position, int64_t rows, int64_t n, int64_t k,
    int64_t packs, acc_t<typename P::Element> kappa, P* grad_base, P* grad_src,
    acc_t<typename P::Element>* grad_inclusion) {
  using T = typename P::Element;
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const int64_t b = row / n, token = row - b * n, place = position[row];
    const P* grads = grad.at<P>(b, token);
    const P* updates = update.at<P>(b, token);
    P* rest = grad_base + row * packs;
    acc_t<T> slope = 0, square = 0;
    if (place >= 0) {
      const P* sources = src.at<P>(b, place);
      const P* bases = base.at<P>(b, token);
      P* gathered = grad_src + (b * k + place) * packs;
#pragma unroll 1
      for (int64_t i = lane_of_warp(); i < packs; i += kWarp) {
        const P g = grads[i], u = updates[i], to = sources[i], from = bases[i];
#pragma unroll
        for (int c = 0; c < P::size; ++c) {
          slope += load(g.at[c]) * (load(to.at[c]) - load(from.at[c]));
          square += load(u.at[c]) * load(u.at[c]);
        }
        gathered[i] = g;
        rest[i] = P{};
      }
    } else {
#pragma unroll 1
      for (int64_t i = lane_of_warp(); i < packs; i += kWarp) {
        const P g = grads[i], u = updates[i];
#pragma unroll
        for (int c = 0; c < P::size; ++c) {
          slope += load(g.at[c]) * load(u.at[c]);
          square += load(u.at[c]) * load(u.at[c]);
        }
        rest[i] = g;
      }
    }
    slope = warp_sum(slope);
    const acc_t<T> curvature = kappa * warp_sum(square);
    if (lane_of_warp() == 0) grad_inclusion[row] = place >= 0 ? slope - curvature : slope + curvature;
  }
}

}  // namespace shiva::cuda
