// Sorts the tokens of each row by score for soft_rank: ascending, NaN last, ties by index.
//
// A bitonic network in shared memory sorts chunks of a row. In a row of several chunks each token then counts, by
// binary search, how many tokens of the other chunks come before it: that is its place.
#pragma once

#include "cuda/device.h"

namespace shiva::cuda {

constexpr int kSortThreads = 512;
constexpr int kMergeThreads = 256;

// Tokens that one block sorts; a power of two. Small, so that the chunks of a row are sorted side by side.
constexpr int kSortChunk = 1024;

SHIVA_DEVICE uint32_t sort_key(float score) { return ordered_key(static_cast<uint32_t>(__float_as_uint(score))); }
SHIVA_DEVICE uint64_t sort_key(double score) { return ordered_key(static_cast<uint64_t>(__double_as_longlong(score))); }

// One block a chunk. sorted and order, [rows, n]: the scores of each chunk ascending, and their tokens.
template <typename T>
__global__ void __launch_bounds__(kSortThreads)
    soft_rank_sort_kernel(const T* scores, int64_t n, int64_t chunks, T* sorted, int32_t* order) {
  using Key = decltype(sort_key(T()));
  SHIVA_SHARED(Key, keys, [kSortChunk]);
  SHIVA_SHARED(int, tokens, [kSortChunk]);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = blockIdx.x % chunks * kSortChunk, begin = blockIdx.x / chunks * n + first;
  const int count = n - first < kSortChunk ? static_cast<int>(n - first) : kSortChunk;
  int size = 2;
  while (size < count) size *= 2;
  for (int t = thread; t < size; t += kSortThreads) {
    keys[t] = t < count ? sort_key(scores[begin + t]) : static_cast<Key>(~Key(0));  // beyond the end: like NaN, last
    tokens[t] = t;
  }
  __syncthreads();

  for (int width = 2; width <= size; width *= 2) {
    for (int stride = width / 2; stride > 0; stride /= 2) {
      for (int pair = thread; pair < size / 2; pair += kSortThreads) {
        const int low = 2 * pair - pair % stride, high = low + stride;
        const Key low_key = keys[low], high_key = keys[high];
        const int low_token = tokens[low], high_token = tokens[high];
        const bool descends = low_key > high_key || (low_key == high_key && low_token > high_token);
        if (descends == ((low & width) == 0)) {
          keys[low] = high_key, keys[high] = low_key;
          tokens[low] = high_token, tokens[high] = low_token;
        }
      }
      // Up to a stride of kWarp a warp's pairs are its own 2 * kWarp elements, and so are they in the next step, unless
      // that starts a wider merge.
      if (stride > kWarp || (stride == 1 && width > kWarp))
        __syncthreads();
      else
        __syncwarp();
    }
  }
  __syncthreads();

  for (int t = thread; t < count; t += kSortThreads) {
    const int token = tokens[t];
    sorted[begin + t] = scores[begin + token];
    order[begin + t] = static_cast<int32_t>(first + token);
  }
}

// How many of `count` ascending scores have a smaller key, or, if ties, an equal one.
template <typename T, typename Key>
SHIVA_DEVICE int count_before(const T* ascending, int count, Key key, bool ties) {
  int low = 0;
  while (count > 0) {
    const int half = count / 2;
    const Key other = sort_key(ascending[low + half]);
    if (other < key || (ties && other == key)) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

// From sorted chunks to sorted rows, one token a thread. All arrays are [rows, n]; total: rows x n.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads) soft_rank_merge_kernel(
    const T* chunk_sorted, const int32_t* chunk_order, int64_t total, int64_t n, T* sorted, int32_t* order) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (i >= total) return;
  const int64_t begin = i / n * n, own = i % n / kSortChunk * kSortChunk;
  const T score = chunk_sorted[i];
  int64_t place = i - begin - own;
  for (int64_t first = 0; first < n; first += kSortChunk) {
    const int count = n - first < kSortChunk ? static_cast<int>(n - first) : kSortChunk;
    if (first != own) place += count_before(chunk_sorted + begin + first, count, sort_key(score), first < own);
  }
  sorted[begin + place] = score;
  order[begin + place] = chunk_order[i];
}

}  // namespace shiva::cuda
