// Where each token stands in an index: so that a scatter can write every output row once, without atomics.
#pragma once

#include "cuda/device.h"

namespace shiva::cuda {

constexpr int kIndexThreads = 512;
constexpr int64_t kIndexChunk = 4096;
constexpr int64_t kMostIndexBlocks = 4096;  // more than any GPU holds at once; the blocks loop over the chunks

// position[b, t] = place of token t of n in index row b [k], or -1 where it is absent. A block writes the positions of
// one chunk of tokens and looks for them in the whole index row, so that fill and placement share one launch. An index
// outside [0, n) is in no chunk and does no harm.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) inverse_index_kernel(
    const int64_t* __restrict__ index, int64_t B, int64_t k, int64_t n, int64_t* __restrict__ position) {
  const int64_t chunks = ceil_div(n, kIndexChunk);
  for (int64_t item = blockIdx.x; item < B * chunks; item += gridDim.x) {
    const int64_t b = item / chunks, begin = item % chunks * kIndexChunk;
    const int64_t end = begin + kIndexChunk < n ? begin + kIndexChunk : n;
    for (int64_t token = begin + threadIdx.x; token < end; token += kThreads) position[b * n + token] = -1;
    __syncthreads();
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < k; j += kThreads) {
      const int64_t token = index[b * k + j];
      if (begin <= token && token < end) position[b * n + token] = j;
    }
  }
}

// Launches inverse_index_kernel: index [B, k] -> position [B, n].
template <typename Stream>
void invert_index(const int64_t* index, int64_t B, int64_t k, int64_t n, int64_t* position, Stream stream) {
  const int64_t blocks = B * ceil_div(n, kIndexChunk);
  if (blocks == 0) return;
  SHIVA_LAUNCH(
      inverse_index_kernel<kIndexThreads>, static_cast<unsigned>(blocks < kMostIndexBlocks ? blocks : kMostIndexBlocks),
      kIndexThreads, 0, stream, index, B, k, n, position);
}

}  // namespace shiva::cuda
