// LayerNorm of gathered rows, modulated: out = (x - mean) / std * (1 + scale) + shift.
//
// A thread holds its channels of a row in registers, so that mean and centred variance take two passes over registers
// and one over memory. Rows that no block can hold ("wide") are read again instead.
#pragma once

#include "cuda/modulate_common.cuh"

namespace shiva::cuda {

constexpr int kModulateThreads = 1024;  // at most, of a block that takes one row
constexpr int kWarpRowThreads = 256;    // of a block whose warps take one row each
constexpr int kBackwardThreads = 512;   // at most, of a block of the backward
constexpr int kWideRowThreads = 512;    // of a block that reads its rows several times

SHIVA_DEVICE float square_root(float x) { return sqrtf(x); }
SHIVA_DEVICE double square_root(double x) { return sqrt(x); }

// Over the threads that share a row. warps: a row of a shared [][kWarp], see block_sums.
template <bool kWarpRow, typename A>
SHIVA_DEVICE A row_sum(A value, A (*warps)[kWarp]) {
  if constexpr (kWarpRow) return warp_sum(value);
  A values[1] = {value};
  block_sums(values, warps);
  return values[0];
}

// A row in registers: each warp has kPacks * 32 adjacent packs of kWidth channels, and each lane every 32nd of them.
// One address and fixed distances then serve all of a thread's packs.
template <int kWidth, int kPacks>
SHIVA_DEVICE int first_channel(int warp) {
  return (warp * kPacks * kWarp + static_cast<int>(threadIdx.x) % kWarp) * kWidth;
}

// This thread's packs of a row, from its first channel on; zero where there are none left. left: D - first channel.
// All loads are issued before the first is waited for.
template <typename T, int kWidth, int kPacks>
SHIVA_DEVICE void load_row(const T* row, int left, acc_t<T> (&packs)[kPacks][kWidth]) {
#pragma unroll
  for (int p = 0; p < kPacks; ++p) load_pack(row + p * kWarp * kWidth, packs[p], p * kWarp * kWidth < left);
}

// Subtracts the mean from a row in registers and returns 1 / sqrt(variance + eps). warps: two rows.
template <bool kWarpRow, int kWidth, int kPacks, typename A>
SHIVA_DEVICE A center_row(A (&packs)[kPacks][kWidth], int left, int D, A eps, A (*warps)[kWarp]) {
  A sum = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += packs[p][i];
  const A mean = row_sum<kWarpRow>(sum, warps) / static_cast<A>(D);
  A square = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      packs[p][i] = p * kWarp * kWidth < left ? packs[p][i] - mean : A(0);
      square += packs[p][i] * packs[p][i];
    }
  return A(1) / square_root(row_sum<kWarpRow>(square, warps + 1) / static_cast<A>(D) + eps);
}

template <typename A>
struct Statistics {
  A mean, inverse_std;
};

// The same of a row that is read twice from memory.
template <int kWidth, typename T, typename A>
SHIVA_DEVICE Statistics<A> statistics(const T* row, int64_t D, A eps, A (*warps)[kWarp]) {
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kWidth, step = static_cast<int64_t>(blockDim.x) * kWidth;
  A sum = 0, square = 0, pack[kWidth];
  for (int64_t d = first; d < D; d += step) {
    load_pack(row + d, pack);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += pack[i];
  }
  const A mean = row_sum<false>(sum, warps) / static_cast<A>(D);
  for (int64_t d = first; d < D; d += step) {
    load_pack(row + d, pack);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) square += (pack[i] - mean) * (pack[i] - mean);
  }
  return {mean, A(1) / square_root(row_sum<false>(square, warps + 1) / static_cast<A>(D) + eps)};
}

// Writes one pack of the output; centered is x - mean.
template <int kWidth, typename T, typename A>
SHIVA_DEVICE void modulate_pack(A (&centered)[kWidth], A inverse_std, const T* shift, const T* scale, T* out) {
  A shifts[kWidth], scales[kWidth];
  load_pack(shift, shifts);
  load_pack(scale, scales);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) centered[i] = centered[i] * inverse_std * (1 + scales[i]) + shifts[i];
  store_pack(out, centered);
}

// x [B, N, D], index [B, k], shift and scale [B, D] -> out [B, k, D]; rows = B * k, D <= packs that the threads hold.
// kWarpRow: a warp a row; else a block a row, of as many warps as the row needs.
template <typename T, int kWidth, int kPacks, bool kWarpRow>
__global__ void __launch_bounds__(kWarpRow ? kWarpRowThreads : kModulateThreads) gather_modulate_kernel(
    const T* __restrict__ x, Strides strides, const int64_t* __restrict__ index, const T* __restrict__ shift,
    const T* __restrict__ scale, int64_t rows, int64_t k, int D, acc_t<T> eps, T* __restrict__ out) {
  using A = acc_t<T>;
  SHIVA_SHARED(A, warps, [2][kWarp]);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int first = first_channel<kWidth, kPacks>(kWarpRow ? 0 : warp), left = D - first;
  const int64_t block = blockIdx.x, i = kWarpRow ? block * (kWarpRowThreads / kWarp) + warp : block;
  if (i >= rows) return;  // a whole warp, and where warps share a row never
  const int64_t b = i / k;
  A packs[kPacks][kWidth];
  load_row(x + offset2(b, strides.batch, index[i], strides.row) + first, left, packs);
  const A inverse_std = center_row<kWarpRow>(packs, left, D, eps, warps);
  shift += b * D + first, scale += b * D + first, out += i * D + first;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int d = p * kWarp * kWidth;
    if (d < left) modulate_pack(packs[p], inverse_std, shift + d, scale + d, out + d);
  }
}

// The same for any D, a block a row.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kWideRowThreads, 2) gather_modulate_wide_kernel(
    const T* __restrict__ x, Strides strides, const int64_t* __restrict__ index, const T* __restrict__ shift,
    const T* __restrict__ scale, int64_t k, int64_t D, acc_t<T> eps, T* __restrict__ out) {
  using A = acc_t<T>;
  SHIVA_SHARED(A, warps, [2][kWarp]);
  const int64_t i = blockIdx.x, b = i / k;
  const T* row = x + offset2(b, strides.batch, index[i], strides.row);
  const Statistics<A> stats = statistics<kWidth>(row, D, eps, warps);
  const int64_t step = static_cast<int64_t>(blockDim.x) * kWidth;
  for (int64_t d = static_cast<int64_t>(threadIdx.x) * kWidth; d < D; d += step) {
    A pack[kWidth];
    load_pack(row + d, pack);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) pack[c] -= stats.mean;
    modulate_pack(pack, stats.inverse_std, shift + b * D + d, scale + b * D + d, out + i * D + d);
  }
}

// ---- backward, with normal = (x - mean) / std and slope = grad * (1 + scale):
// grad_x = (slope - mean(slope) - normal * mean(slope * normal)) / std, grad_shift = sum over the rows of grad,
// grad_scale = sum over the rows of grad * normal

// What one call of the backward reads and writes.
template <typename T>
struct ModulateBackward {
  const T* grad;  // [B, k, D]
  Strides grad_strides;
  const T* x;  // [B, N, D]
  Strides x_strides;
  const int64_t* index;  // [B, k]
  const T* scale;        // [B, D]
  int64_t N, k, chunk_rows, chunks;
  acc_t<T> eps;
  T* grad_x;          // [B, N, D]: the rows index are written
  acc_t<T>* partial;  // [B, chunks, 2, D]: sums of grad, and of grad * normal
};

// The part of it that belongs to this block, chunk blockIdx.x of all batch rows' chunks, from a thread's channel on.
template <typename T>
struct ChunkOfRows {
  const int64_t* index;  // [rows]
  const T* grad;         // [rows, D]
  const T* x;            // [N, D]
  const T* scale;        // [D]
  T* grad_x;             // [N, D]
  acc_t<T>* sums;        // [2, D]
  int rows;
  SHIVA_DEVICE ChunkOfRows(const ModulateBackward<T>& m, int64_t D, int64_t channel) {
    const int64_t b = blockIdx.x / m.chunks, first = (blockIdx.x % m.chunks) * m.chunk_rows;
    index = m.index + b * m.k + first;
    grad = m.grad + offset2(b, m.grad_strides.batch, first, m.grad_strides.row) + channel;
    x = m.x + b * m.x_strides.batch + channel;
    scale = m.scale + b * D + channel;
    grad_x = m.grad_x + b * m.N * D + channel;
    sums = m.partial + static_cast<int64_t>(blockIdx.x) * 2 * D + channel;
    rows = static_cast<int>(first + m.chunk_rows < m.k ? m.chunk_rows : m.k - first);
  }
};

// One block a chunk of a batch row's tokens, one after the other; each thread adds up its own channels in registers.
template <typename T, int kWidth, int kPacks>
__global__ void __launch_bounds__(kBackwardThreads, kWidth == 1 ? 1 : 0)
    gather_modulate_backward_kernel(ModulateBackward<T> m, int D) {
  using A = acc_t<T>;
  SHIVA_SHARED(A, warps, [4][kWarp]);
  const int first = first_channel<kWidth, kPacks>(static_cast<int>(threadIdx.x) / kWarp), left = D - first;
  const ChunkOfRows<T> chunk(m, D, first);
  A shift_sum[kPacks][kWidth] = {}, scale_sum[kPacks][kWidth] = {};

  for (int j = 0; j < chunk.rows; ++j) {
    const int64_t token = chunk.index[j];
    A normal[kPacks][kWidth], grad[kPacks][kWidth];
    load_row(chunk.x + token * m.x_strides.row, left, normal);
    load_row(chunk.grad + j * m.grad_strides.row, left, grad);
    const A inverse_std = center_row<false>(normal, left, D, m.eps, warps);
    A means[2] = {0, 0};  // of slope and of slope * normal
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int d = p * kWarp * kWidth;
      A scale[kWidth];
      load_pack(chunk.scale + d, scale, d < left);  // every time, from the cache: it has no room beside the sums
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        normal[p][i] *= inverse_std;
        shift_sum[p][i] += grad[p][i];
        scale_sum[p][i] += grad[p][i] * normal[p][i];
        grad[p][i] *= 1 + scale[i];  // from here on the slope
        means[0] += grad[p][i];
        means[1] += grad[p][i] * normal[p][i];
      }
    }
    block_sums(means, warps + 2);
    means[0] /= static_cast<A>(D), means[1] /= static_cast<A>(D);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int d = p * kWarp * kWidth;
      if (d >= left) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) grad[p][i] = inverse_std * (grad[p][i] - means[0] - normal[p][i] * means[1]);
      store_pack(chunk.grad_x + token * D + d, grad[p]);
    }
  }

#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int d = p * kWarp * kWidth;
    if (d >= left) continue;
    store_sums(chunk.sums + d, shift_sum[p]);
    store_sums(chunk.sums + D + d, scale_sum[p]);
  }
}

// The same for any D: rows are read again, and each thread adds up its own channels in the workspace.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kWideRowThreads, sizeof(acc_t<T>) == 8 ? 1 : 2)
    gather_modulate_backward_wide_kernel(ModulateBackward<T> m, int64_t D) {
  using A = acc_t<T>;
  SHIVA_SHARED(A, warps, [4][kWarp]);
  const ChunkOfRows<T> chunk(m, D, 0);
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kWidth, step = static_cast<int64_t>(blockDim.x) * kWidth;
  for (int j = 0; j < chunk.rows; ++j) {
    const int64_t token = chunk.index[j];
    const T* x_row = chunk.x + token * m.x_strides.row;
    const T* grad_row = chunk.grad + j * m.grad_strides.row;
    const Statistics<A> stats = statistics<kWidth>(x_row, D, m.eps, warps);
    A x[kWidth], grad[kWidth], scale[kWidth], means[2] = {0, 0};
    for (int64_t d = first; d < D; d += step) {
      load_pack(x_row + d, x), load_pack(grad_row + d, grad), load_pack(chunk.scale + d, scale);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const A normal = (x[i] - stats.mean) * stats.inverse_std, slope = grad[i] * (1 + scale[i]);
        means[0] += slope;
        means[1] += slope * normal;
        chunk.sums[d + i] = (j == 0 ? A(0) : chunk.sums[d + i]) + grad[i];
        chunk.sums[D + d + i] = (j == 0 ? A(0) : chunk.sums[D + d + i]) + grad[i] * normal;
      }
    }
    block_sums(means, warps + 2);
    means[0] /= static_cast<A>(D), means[1] /= static_cast<A>(D);
    for (int64_t d = first; d < D; d += step) {
      load_pack(x_row + d, x), load_pack(grad_row + d, grad), load_pack(chunk.scale + d, scale);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const A normal = (x[i] - stats.mean) * stats.inverse_std, slope = grad[i] * (1 + scale[i]);
        grad[i] = stats.inverse_std * (slope - means[0] - normal * means[1]);
      }
      store_pack(chunk.grad_x + token * D + d, grad);
    }
  }
}

// Zeroes the rows [units] of out [rows, units] whose position is -1: a warp a row.
template <typename Unit>
__global__ void __launch_bounds__(kWarpRowThreads)
    zero_absent_rows_kernel(const int64_t* __restrict__ position, int64_t rows, int64_t units, Unit* __restrict__ out) {
  const int64_t block = blockIdx.x, i = block * (kWarpRowThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= rows || position[i] >= 0) return;
  for (int64_t u = threadIdx.x % kWarp; u < units; u += kWarp) out[i * units + u] = Unit{};
}

}  // namespace shiva::cuda
