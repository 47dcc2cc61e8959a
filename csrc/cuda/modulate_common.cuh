// What gather_modulate and scatter_residual share: packs of channels, sums over a block, sums over chunks of rows.
#pragma once

#include "cuda/device.h"

namespace shiva::cuda {

// Of token rows [B, N, D], in elements; channels are adjacent. 0 where there is only one batch row or token.
struct Strides {
  int64_t batch, row;
};

// Whether every row starts where a Vec<T> of `width` elements may lie.
inline bool rows_are_aligned(const void* data, Strides strides, int64_t width) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.batch % width == 0 && strides.row % width == 0;
}

// Sums over `rows` tokens are first taken over chunks of this many. It depends on the shape alone, so that the same
// call gives the same bits on every GPU: about 2048 blocks, but not so many that the chunks' sums outweigh the rows.
inline int64_t rows_per_chunk(int64_t rows) {
  const int64_t wanted = ceil_div(rows, 2048);
  return wanted < 8 ? 8 : wanted > 32 ? 32 : wanted;
}

// ---- a pack: kWidth adjacent channels, either one or a Vec<T> of them, in the dtype of arithmetic

// Zero unless valid. The zero is put in before the conversion, which can then wait until the value is needed.
template <typename T, int kWidth>
SHIVA_DEVICE void load_pack(const T* from, acc_t<T> (&pack)[kWidth], bool valid = true) {
  if constexpr (kWidth == 1) {
    pack[0] = load(valid ? *from : T{});
  } else {
    Vec<T> raw = {};
    if (valid) raw = load_vec(from);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) pack[i] = load(raw.at[i]);
  }
}

template <typename T, int kWidth>
SHIVA_DEVICE void store_pack(T* to, const acc_t<T> (&pack)[kWidth]) {
  if constexpr (kWidth == 1) {
    *to = store<T>(pack[0]);
  } else {
    Vec<T> raw;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) raw.at[i] = store<T>(pack[i]);
    store_vec(to, raw);
  }
}

// The same without rounding, into a workspace: two vectors of float for one of a half precision.
template <typename A, int kWidth>
SHIVA_DEVICE void store_sums(A* to, const A (&pack)[kWidth]) {
  if constexpr (kWidth == 1) {
    *to = pack[0];
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += Vec<A>::size) {
      Vec<A> part;
#pragma unroll
      for (int j = 0; j < Vec<A>::size; ++j) part.at[j] = pack[i + j];
      store_vec(to + i, part);
    }
  }
}

// ---- sums

// kCount sums over a block of whole warps; every thread gets them. `warps`, kCount rows of a shared [][kWarp], must
// rest until the next __syncthreads: in a loop, sums that follow one another use different rows.
template <int kCount, typename A>
SHIVA_DEVICE void block_sums(A (&values)[kCount], A (*warps)[kWarp]) {
  const int thread = static_cast<int>(threadIdx.x), count = static_cast<int>(blockDim.x) / kWarp;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = warp_sum(values[i]);
    if (thread % kWarp == 0) warps[i][thread / kWarp] = values[i];
    values[i] = 0;
  }
  __syncthreads();
#pragma unroll 4
  for (int w = 0; w < count; ++w)
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += warps[i][w];
}

constexpr int kSumWarps = 16;

// Adds up partial [B, chunks, columns]: the first D columns into first [B, D], the next D, if any, into second [B, D].
// A block takes 32 columns of one batch row, and each of its warps every kSumWarps-th chunk.
template <typename T>
__global__ void __launch_bounds__(kSumWarps* kWarp) sum_chunks_kernel(
    const acc_t<T>* __restrict__ partial, int64_t chunks, int64_t columns, int64_t D, T* first, T* second) {
  using A = acc_t<T>;
  SHIVA_SHARED(A, sums, [kSumWarps][kWarp]);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t tiles = ceil_div(columns, kWarp), b = blockIdx.x / tiles;
  const int64_t column = (blockIdx.x % tiles) * kWarp + lane;
  A sum = 0;
  if (column < columns) {
    partial += b * chunks * columns + column;
#pragma unroll 8
    for (int64_t c = warp; c < chunks; c += kSumWarps) sum += partial[c * columns];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int w = 1; w < kSumWarps; ++w) sum += sums[w][lane];
  if (column < D)
    first[b * D + column] = store<T>(sum);
  else
    second[b * D + column - D] = store<T>(sum);
}

}  // namespace shiva::cuda
