// base with gate * update added to the rows of an index, and its gradient. Each output row is written once.
#pragma once

#include "cuda/modulate_common.cuh"

namespace shiva::cuda {

constexpr int kResidualThreads = 256;

// base [B, N, D], update [B, k, D], gate [B, D], position [B, N] -> out [B, N, D]; rows = B * N. A warp a row.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kResidualThreads) scatter_residual_kernel(
    const T* __restrict__ base, Strides base_strides, const T* __restrict__ update, Strides update_strides,
    const T* __restrict__ gate, const int64_t* __restrict__ position, int64_t rows, int64_t N, int64_t D,
    T* __restrict__ out) {
  using A = acc_t<T>;
  const int64_t block = blockIdx.x, i = block * (kResidualThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= rows) return;
  const int64_t b = i / N, first = static_cast<int64_t>(threadIdx.x % kWarp) * kWidth, step = kWarp * kWidth;
  const T* base_row = base + offset2(b, base_strides.batch, i - b * N, base_strides.row);
  T* out_row = out + i * D;
  const int64_t j = position[i];
  if (j < 0) {  // copied as bits: a conversion may change a NaN's
#pragma unroll 4
    for (int64_t d = first; d < D; d += step) {
      if constexpr (kWidth == 1)
        out_row[d] = base_row[d];
      else
        store_vec(out_row + d, load_vec(base_row + d));
    }
    return;
  }
  const T* update_row = update + offset2(b, update_strides.batch, j, update_strides.row);
  const T* gate_row = gate + b * D;
#pragma unroll 4
  for (int64_t d = first; d < D; d += step) {
    A sum[kWidth], updates[kWidth], gates[kWidth];
    load_pack(base_row + d, sum), load_pack(update_row + d, updates), load_pack(gate_row + d, gates);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sum[c] += gates[c] * updates[c];
    store_pack(out_row + d, sum);
  }
}

// grad [B, N, D], update [B, k, D], gate [B, D], index [B, k] -> grad_update [B, k, D] = gate * grad, and
// partial [B, chunks, D], the sums over chunk_rows rows of grad * update. A block takes one chunk's rows and, of its
// `tiles` tiles of channels, one; a thread one pack of channels.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kResidualThreads) scatter_residual_backward_kernel(
    const T* __restrict__ grad, Strides grad_strides, const T* __restrict__ update, Strides update_strides,
    const T* __restrict__ gate, const int64_t* __restrict__ index, int64_t k, int64_t D, int64_t chunk_rows,
    int64_t chunks, int64_t tiles, T* __restrict__ grad_update, acc_t<T>* __restrict__ partial) {
  using A = acc_t<T>;
  const int64_t chunk = blockIdx.x / tiles, tile = blockIdx.x % tiles;  // chunk: of all batch rows
  const int64_t d = (tile * blockDim.x + threadIdx.x) * kWidth;
  if (d >= D) return;
  const int64_t b = chunk / chunks, first = (chunk % chunks) * chunk_rows;
  const int64_t end = first + chunk_rows < k ? first + chunk_rows : k;
  const T* grad_rows = grad + b * grad_strides.batch + d;
  const T* update_rows = update + b * update_strides.batch + d;
  T* out = grad_update + b * k * D + d;
  A gates[kWidth], sum[kWidth] = {};
  load_pack(gate + b * D + d, gates);
#pragma unroll 4
  for (int64_t j = first; j < end; ++j) {
    A grads[kWidth], updates[kWidth];
    load_pack(grad_rows + index[b * k + j] * grad_strides.row, grads);
    load_pack(update_rows + j * update_strides.row, updates);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum[i] += grads[i] * updates[i];
      grads[i] *= gates[i];
    }
    store_pack(out + j * D, grads);
  }
  store_sums(partial + chunk * D + d, sum);
}

}  // namespace shiva::cuda
