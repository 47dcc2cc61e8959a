// The gradient of the router's score: grad_hidden at the pre-activation, from which two more products make grad_x and
// grad_w_in, and the gradients of the small parameters as sums over tokens.
//
// Every sum over tokens is a sum over chunks of partial sums that one block each has written, added in a fixed order.
#pragma once

#include "cuda/router_score_kernel.cuh"

namespace shiva::cuda {

template <typename T>
struct RouterGradients {
  const acc_t<T>* grad;    // [B, N], of the scores
  T* grad_hidden;          // [B N, padded_H], zero beyond H
  int padded_H;            // H rounded up to a multiple of 8
  acc_t<T>* context_sums;  // [chunks, H], sum of grad_hidden over the chunk's tokens
  acc_t<T>* normal_sums;   // [chunks, H], sum of grad * (a - mean) / std
  acc_t<T>* grad_sums;     // [tiles], sum of grad
};

// The gradient of one tile's hidden. kColumns threads side by side take one column each, and every kGroups-th row: a
// tile makes kGroups chunks.
template <int kRows, int kColumns, int kThreads, typename T, typename A = acc_t<T>>
SHIVA_DEVICE void score_rows_backward(
    const RouterInput<T>& in, const RouterGradients<T>& out, A* hidden, int64_t stride,
    const RouterTokens<kRows>& tile) {
  constexpr int kGroups = kThreads / kColumns;
  SHIVA_SHARED(A, mean_of, [kRows]);
  SHIVA_SHARED(A, inverse_std_of, [kRows]);
  SHIVA_SHARED(A, mean_dot_of, [kRows]);
  SHIVA_SHARED(A, grad_of, [kRows]);
  const int thread = static_cast<int>(threadIdx.x);
  const A* const context = in.context + tile.b * in.H;
  const A count = static_cast<A>(in.H);
  for (int i = 0; i < kRows; i += kThreads / kRowLanes) {
    const int r = i + thread / kRowLanes;
    const RouterStatistics<A> row = router_statistics<false>(in, hidden + r * stride, context, r < tile.rows);
    if (thread % kRowLanes == 0) {
      mean_of[r] = row.mean, inverse_std_of[r] = row.inverse_std, mean_dot_of[r] = row.dot / count;
      grad_of[r] = r < tile.rows ? out.grad[tile.first + r] : A(0);
    }
  }
  const A mean_weight = router_dot(in, in.ln_weight) / count;
  __syncthreads();
  if (thread < kWarp) {
    A sum = 0;
    for (int r = thread; r < kRows; r += kWarp) sum += grad_of[r];
    sum = warp_sum(sum);
    if (thread == 0) out.grad_sums[blockIdx.x] = sum;
  }

  const int group = thread / kColumns;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kGroups + group;
  for (int h = thread % kColumns; h < out.padded_H; h += kColumns) {
    const bool valid = h < in.H;
    const A shift = valid ? context[h] : A(0), weight = valid ? in.ln_weight[h] * in.w_out[h] : A(0);
    A context_sum = 0, normal_sum = 0;
    for (int r = group; r < tile.rows; r += kGroups) {
      A grad_v = 0;
      if (valid) {
        const A v = hidden[r * stride + h] + shift, s = router_sigmoid(v);
        const A normal = (router_silu(v, s) - mean_of[r]) * inverse_std_of[r];
        const A grad_a = grad_of[r] * inverse_std_of[r] * (weight - mean_weight - normal * mean_dot_of[r]);
        grad_v = grad_a * (s * (1 + v * (1 - s)));
        context_sum += grad_v;
        normal_sum += grad_of[r] * normal;
      }
      out.grad_hidden[(tile.first + r) * out.padded_H + h] = store<T>(grad_v);
    }
    if (valid) out.context_sums[chunk * in.H + h] = context_sum, out.normal_sums[chunk * in.H + h] = normal_sum;
  }
}

// H <= Product::kColumns. Grid: B * ceil(N / Product::kRows).
template <typename Product, typename T = typename Product::T>
__global__ void __launch_bounds__(Product::kThreads, 1)
    router_hidden_backward_kernel(RouterInput<T> in, RouterGradients<T> out) {
  SHIVA_SHARED(uint4, memory, [Product::kBytes / 16]);
  const RouterTokens<Product::kRows> tile(in.N);
  auto* hidden =
      Product::run(memory, {in.x + tile.first * in.D, in.D, tile.rows, in.D}, {in.w_in, in.D, in.H, in.D}, in.D);
  score_rows_backward<Product::kRows, Product::kColumns, Product::kThreads>(in, out, hidden, Product::kStride, tile);
}

// Any H, from hidden [B N, H]. Grid: B * ceil(N / kWideRows).
template <typename T>
__global__ void __launch_bounds__(kWideThreads, 2)
    router_wide_backward_kernel(RouterInput<T> in, RouterGradients<T> out, acc_t<T>* hidden) {
  const RouterTokens<kWideRows> tile(in.N);
  score_rows_backward<kWideRows, kWideThreads, kWideThreads>(in, out, hidden + tile.first * in.H, in.H, tile);
}

// out[i] = sum over splits of partial[split][i].
template <typename T, typename A = acc_t<T>>
__global__ void router_add_splits_kernel(const A* partial, int64_t splits, int64_t size, T* out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += stride) {
    A sum = 0;
    for (int64_t split = 0; split < splits; ++split) sum += partial[split * size + i];
    out[i] = store<T>(sum);
  }
}

// ---- the last sums, in double as there are few: a block takes 32 columns, its warps take turns at the rows

constexpr int kSumThreads = 512, kSumWarps = kSumThreads / kWarp;

// The sum of rows[count][H] over its rows in column h, the same for all threads of that h = ... + threadIdx.x % 32.
// All threads of the block call it; partial is shared.
template <typename In>
SHIVA_DEVICE double router_column_sum(
    const In* rows, int64_t count, int H, int h, double (&partial)[kSumWarps][kWarp]) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  double sum = 0;
  if (h < H)
    for (int64_t r = warp; r < count; r += kSumWarps) sum += rows[r * H + h];
  partial[warp][lane] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kSumWarps; ++w) sum += partial[w][lane];
  __syncthreads();
  return sum;
}

// grad_context [B, H] and the batch rows' normal_sums [B, H]; `chunks` of each batch row. Grid: B * ceil(H / 32).
template <typename A>
__global__ void __launch_bounds__(kSumThreads, 1) router_add_chunks_kernel(
    const A* context_sums, const A* normal_sums, int64_t chunks, int H, A* grad_context, double* batch_normals) {
  SHIVA_SHARED(double, partial, [kSumWarps][kWarp]);
  const unsigned column_blocks = static_cast<unsigned>(ceil_div(H, kWarp));
  const int h = static_cast<int>(blockIdx.x % column_blocks * kWarp + threadIdx.x % kWarp);
  const int64_t b = blockIdx.x / column_blocks;
  const double context = router_column_sum(context_sums + b * chunks * H, chunks, H, h, partial);
  const double normal = router_column_sum(normal_sums + b * chunks * H, chunks, H, h, partial);
  if (threadIdx.x >= kWarp || h >= H) return;
  grad_context[b * H + h] = static_cast<A>(context);
  batch_normals[b * H + h] = normal;
}

// The gradients of ln_weight, ln_bias and w_out, [H] each. Grid: ceil(H / 32).
template <typename T, typename A = acc_t<T>>
__global__ void __launch_bounds__(kSumThreads) router_small_gradients_kernel(
    RouterInput<T> in, const double* batch_normals, int64_t B, const A* grad_sums, int64_t tiles, A* grad_ln_weight,
    A* grad_ln_bias, A* grad_w_out) {
  SHIVA_SHARED(double, partial, [kSumWarps][kWarp]);
  const int h = static_cast<int>(blockIdx.x * kWarp + threadIdx.x % kWarp);
  const double normal = router_column_sum(batch_normals, B, in.H, h, partial);
  // Of grad_sums each lane takes another column of [tiles / 32, 32], and the tail is added last.
  const int64_t rows = tiles / kWarp;
  double total = warp_sum(router_column_sum(grad_sums, rows, kWarp, static_cast<int>(threadIdx.x % kWarp), partial));
  for (int64_t i = rows * kWarp; i < tiles; ++i) total += grad_sums[i];
  if (threadIdx.x >= kWarp || h >= in.H) return;
  const double w_out = in.w_out[h];
  grad_ln_weight[h] = static_cast<A>(w_out * normal);
  grad_ln_bias[h] = static_cast<A>(w_out * total);
  grad_w_out[h] = static_cast<A>(in.ln_weight[h] * normal + in.ln_bias[h] * total);
}

}  // namespace shiva::cuda
