// Radix select, then one ordered split of the row into kept and rejected.
//
// A row's keys are the unsigned integers of core/ordered_key.h. Each warp owns a run of consecutive tokens and each of
// its loads takes 32 consecutive ones, so that a ballot ranks them in index order: both lists come out ascending by
// prefix sums alone, and ties go to the smaller index.
#pragma once

#include "cuda/device.h"

namespace shiva::cuda {

constexpr int kBins = 256;  // of one digit of 8 bits

SHIVA_DEVICE uint32_t key_of(float score) { return ordered_key(static_cast<uint32_t>(__float_as_uint(score))); }
SHIVA_DEVICE uint64_t key_of(double score) { return ordered_key(static_cast<uint64_t>(__double_as_longlong(score))); }
template <typename T>
using key_t = decltype(key_of(acc_t<T>()));

// Stands for no token: smaller than the key of every score, as that of -infinity is not 0.
template <typename Key>
constexpr Key kNoToken = 0;

// What the digits seen so far say of the k-th largest key. Count: int within a block's row, int64_t in longer ones.
template <typename Key, typename Count>
struct Threshold {
  Key prefix;  // its leading digits
  Count rank;  // it is the rank-th largest (from 1) of the keys with this prefix
};

// Whether a key shares the digits above `shift + 8` bits with prefix.
template <typename Key>
SHIVA_DEVICE bool same_prefix(Key key, Key prefix, int shift) {
  return shift + 8 >= static_cast<int>(8 * sizeof(Key)) || ((key ^ prefix) >> (shift + 8)) == 0;
}

// The digit of the rank-th largest of the keys counted in bins, and its rank among those of that digit.
// All threads of a block of at least kBins call it; `totals` and `found` are shared.
template <typename Count>
SHIVA_DEVICE void choose_digit(Count count, Count rank, Count (&totals)[kBins / kWarp], Count (&found)[2]) {
  // Thread t < kBins holds the count of bin kBins - 1 - t: the prefix sum runs from the largest digit down.
  const int t = static_cast<int>(threadIdx.x), warp = t / kWarp;
  Count total = 0, above = 0;
  if (warp < kBins / kWarp) {
    above = warp_exclusive_sum(count, &total);
    if (t % kWarp == 0) totals[warp] = total;
  }
  __syncthreads();
  if (warp < kBins / kWarp) {
    for (int w = 0; w < warp; ++w) above += totals[w];
    if (above < rank && rank <= above + count) {
      found[0] = kBins - 1 - t;
      found[1] = rank - above;
    }
  }
  __syncthreads();
}

// Positions in the two lists: how many tokens before this one are greater than, and equal to, the threshold.
template <typename Count>
struct Before {
  Count greater, equal;
};

// Writes one token. ties: how many tokens equal to the threshold are kept.
template <typename Key, typename Count>
SHIVA_DEVICE void place_token(
    Key key, Key threshold, Count ties, Count token, Before<Count> before, int64_t* kept, int64_t* rejected) {
  const Count kept_ties = before.equal < ties ? before.equal : ties;
  const Count position = before.greater + kept_ties;  // kept tokens before this one
  if (key > threshold || (key == threshold && before.equal < ties))
    kept[position] = token;
  else
    rejected[token - position] = token;
}

// Ranks 32 consecutive tokens by ballot, places them, and advances `before` past them. Called by whole warps.
template <typename Key, typename Count>
SHIVA_DEVICE void place_warp(
    Key key, bool valid, Key threshold, Count ties, Count token, Before<Count>& before, int64_t* kept,
    int64_t* rejected) {
  const unsigned below = (1u << (threadIdx.x % kWarp)) - 1;
  const unsigned greater = __ballot_sync(kAllLanes, key > threshold);
  const unsigned equal = __ballot_sync(kAllLanes, key == threshold);
  const Before<Count> mine = {before.greater + __popc(greater & below), before.equal + __popc(equal & below)};
  if (valid) place_token(key, threshold, ties, token, mine, kept, rejected);
  before.greater += __popc(greater);
  before.equal += __popc(equal);
}

// One block a row, the keys in registers: kItems for each of kThreads. n <= kThreads * kItems, 0 < k < n.
template <typename T, int kThreads, int kItems>
__global__ void __launch_bounds__(kThreads, 1)
    topk_select_row_kernel(const T* scores, int n, int k, int64_t* kept, int64_t* rejected) {
  using Key = key_t<T>;
  constexpr int kWarps = kThreads / kWarp;
  SHIVA_SHARED(int, histogram, [kBins]);
  SHIVA_SHARED(int, totals, [kBins / kWarp]);
  SHIVA_SHARED(int, found, [2]);
  SHIVA_SHARED(int, warp_greater, [kWarps]);
  SHIVA_SHARED(int, warp_equal, [kWarps]);
  using Last = Threshold<Key, int>;
  SHIVA_SHARED(Last, last, [1]);
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int first = warp * kWarp * kItems + lane;
  scores += row * n;
  kept += row * k;
  rejected += row * (n - k);

  const T* mine = scores + first;  // one address for all loads: one for each would stay in registers to the end
  Key keys[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) keys[i] = i * kWarp < n - first ? key_of(load(mine[i * kWarp])) : kNoToken<Key>;

  Threshold<Key, int> threshold = {Key(0), k};
  for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
    for (int bin = thread; bin < kBins; bin += kThreads) histogram[bin] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (same_prefix(keys[i], threshold.prefix, shift))  // no token is never ahead of the one that is looked for
        atomicAdd(&histogram[static_cast<int>(keys[i] >> shift & (kBins - 1))], 1);
    __syncthreads();
    choose_digit(thread < kBins ? histogram[kBins - 1 - thread] : 0, threshold.rank, totals, found);
    threshold.prefix |= static_cast<Key>(found[0]) << shift;
    threshold.rank = found[1];
  }

  // How many tokens of earlier warps are greater or equal.
  int greater = 0, equal = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    greater += keys[i] > threshold.prefix;
    equal += keys[i] == threshold.prefix;
  }
  greater = warp_sum(greater), equal = warp_sum(equal);
  if (lane == 0) warp_greater[warp] = greater, warp_equal[warp] = equal;
  if (thread == 0) last[0] = threshold;
  __syncthreads();
  // Read back, so that the comparisons above need not be kept in registers for the ones below.
  threshold = last[0];
  Before<int> before = {0, 0};
  for (int w = 0; w < warp; ++w) before.greater += warp_greater[w], before.equal += warp_equal[w];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int token = first + i * kWarp;
    place_warp(keys[i], token < n, threshold.prefix, threshold.rank, token, before, kept, rejected);
  }
}

// ---- rows too long for one block: `chunks` blocks a row, kernel after kernel, each block with counts of its own

constexpr int kChunkThreads = 256;
constexpr int64_t kChunk = 8192;  // tokens a block, a multiple of kChunkThreads

// counts[row, chunk, bin]: keys of the chunk with the threshold's prefix, by their next digit.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads) topk_count_digits_kernel(
    const T* scores, int64_t n, int64_t chunks, const Threshold<key_t<T>, int64_t>* thresholds, int shift,
    int* counts) {
  using Key = key_t<T>;
  SHIVA_SHARED(int, histogram, [kBins]);
  const int64_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const Key prefix = thresholds[row].prefix;
  histogram[threadIdx.x] = 0;
  __syncthreads();
  const int64_t end = (chunk + 1) * kChunk < n ? (chunk + 1) * kChunk : n;
  for (int64_t token = chunk * kChunk + threadIdx.x; token < end; token += kChunkThreads) {
    const Key key = key_of(load(scores[row * n + token]));
    if (same_prefix(key, prefix, shift)) atomicAdd(&histogram[static_cast<int>(key >> shift & (kBins - 1))], 1);
  }
  __syncthreads();
  counts[static_cast<int64_t>(blockIdx.x) * kBins + threadIdx.x] = histogram[threadIdx.x];
}

// One block a row: adds the chunks' counts and appends the next digit to the row's threshold.
template <typename Key>
__global__ void __launch_bounds__(kChunkThreads)
    topk_choose_digit_kernel(const int* counts, int64_t chunks, int shift, Threshold<Key, int64_t>* thresholds) {
  SHIVA_SHARED(int64_t, totals, [kBins / kWarp]);
  SHIVA_SHARED(int64_t, found, [2]);
  const int64_t row = blockIdx.x;
  int64_t count = 0;
  for (int64_t c = 0; c < chunks; ++c) count += counts[(row * chunks + c) * kBins + (kBins - 1 - threadIdx.x)];
  const Threshold<Key, int64_t> before = thresholds[row];
  choose_digit(count, before.rank, totals, found);
  if (threadIdx.x == 0) thresholds[row] = {before.prefix | static_cast<Key>(found[0]) << shift, found[1]};
}

// starts[row, chunk]: the chunk's own counts of tokens greater than and equal to the threshold.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads) topk_count_chunks_kernel(
    const T* scores, int64_t n, int64_t chunks, const Threshold<key_t<T>, int64_t>* thresholds,
    Before<int64_t>* starts) {
  using Key = key_t<T>;
  SHIVA_SHARED(int, greater_of, [kChunkThreads / kWarp]);
  SHIVA_SHARED(int, equal_of, [kChunkThreads / kWarp]);
  const int64_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const Key threshold = thresholds[row].prefix;
  const int64_t end = (chunk + 1) * kChunk < n ? (chunk + 1) * kChunk : n;
  int greater = 0, equal = 0;
  for (int64_t token = chunk * kChunk + threadIdx.x; token < end; token += kChunkThreads) {
    const Key key = key_of(load(scores[row * n + token]));
    greater += key > threshold;
    equal += key == threshold;
  }
  greater = warp_sum(greater), equal = warp_sum(equal);
  if (threadIdx.x % kWarp == 0) greater_of[threadIdx.x / kWarp] = greater, equal_of[threadIdx.x / kWarp] = equal;
  __syncthreads();
  if (threadIdx.x != 0) return;
  Before<int64_t> total = {0, 0};
  for (int w = 0; w < kChunkThreads / kWarp; ++w) total.greater += greater_of[w], total.equal += equal_of[w];
  starts[blockIdx.x] = total;
}

// Splits one chunk; its start is the sum of the row's earlier chunks.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads) topk_place_chunks_kernel(
    const T* scores, int64_t n, int64_t k, int64_t chunks, const Threshold<key_t<T>, int64_t>* thresholds,
    const Before<int64_t>* starts, int64_t* kept, int64_t* rejected) {
  using Key = key_t<T>;
  constexpr int kWarps = kChunkThreads / kWarp;
  constexpr int64_t kRun = kChunk / kWarps;  // consecutive tokens of one warp
  SHIVA_SHARED(int64_t, warp_greater, [kWarps]);
  SHIVA_SHARED(int64_t, warp_equal, [kWarps]);
  const int64_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const Threshold<Key, int64_t> threshold = thresholds[row];
  const T* in = scores + row * n;
  const int64_t first = chunk * kChunk + warp * kRun;

  int greater = 0, equal = 0;
  for (int64_t step = 0; step < kRun; step += kWarp) {
    const int64_t token = first + step + lane;
    if (token >= n) continue;
    const Key key = key_of(load(in[token]));
    greater += key > threshold.prefix;
    equal += key == threshold.prefix;
  }
  greater = warp_sum(greater), equal = warp_sum(equal);
  if (lane == 0) warp_greater[warp] = greater, warp_equal[warp] = equal;
  __syncthreads();
  Before<int64_t> before = {0, 0};
  for (int64_t c = 0; c < chunk; ++c) {
    before.greater += starts[row * chunks + c].greater;
    before.equal += starts[row * chunks + c].equal;
  }
  for (int w = 0; w < warp; ++w) before.greater += warp_greater[w], before.equal += warp_equal[w];
  for (int64_t step = 0; step < kRun; step += kWarp) {
    const int64_t token = first + step + lane;
    const Key key = token < n ? key_of(load(in[token])) : kNoToken<Key>;
    place_warp(
        key, token < n, threshold.prefix, threshold.rank, token, before, kept + row * k, rejected + row * (n - k));
  }
}

// out[i] = i % n: the lists of k = 0 and k = n.
__global__ void topk_all_kernel(int64_t* out, int64_t total, int64_t n) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) out[i] = i % n;
}

// thresholds[row] = nothing known yet of the k-th largest key.
template <typename Key>
__global__ void topk_start_kernel(Threshold<Key, int64_t>* thresholds, int64_t rows, int64_t k) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < rows) thresholds[row] = {Key(0), k};
}

}  // namespace shiva::cuda
