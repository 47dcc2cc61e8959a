// Means of groups of rows, and their gradient. Tokens are first sorted by group, so that every sum is taken in token
// order and no atomic is needed.
#pragma once

#include "cuda/modulate_common.cuh"

namespace shiva::cuda {

constexpr int kGroupThreads = 512;
constexpr int kGroupWarps = kGroupThreads / kWarp;
constexpr int kGroupRange = kGroupThreads;  // groups that a block sorts: one a thread where they are added up
constexpr int kMeanThreads = 256;

// Calls visit(token, group, mates, before) for the tokens [begin, end) of a row, 32 at a time, by all lanes of a warp.
// group: position less `first`, or kGroupRange for none of the `count` groups from there on; mates: the lanes with the
// same group; before: how many of the 32 belong to a group before `first`.
template <typename Visit>
SHIVA_DEVICE void visit_groups(
    const int64_t* position, int64_t begin, int64_t end, int64_t first, int count, Visit visit) {
  for (int64_t start = begin; start < end; start += kWarp) {
    const int64_t token = start + threadIdx.x % kWarp;
    const int64_t at = token < end ? position[token] : -1;
    const bool mine = at >= first && at < first + count;
    const int group = mine ? static_cast<int>(at - first) : kGroupRange;
    const unsigned mates = __match_any_sync(kAllLanes, static_cast<unsigned>(group));
    visit(token, group, mates, __popc(__ballot_sync(kAllLanes, at >= 0 && at < first)));
    __syncwarp();
  }
}

// position [B, N] -> start [B, M + 1] and, unless null, order [B, N]: the tokens of group m, in token order, are
// order[b, start[b, m] .. start[b, m + 1]). A counting sort: a block takes kGroupRange groups of a row, and each of its
// warps a run of consecutive tokens, which it counts and later places with counters of its own. A position outside
// [0, M) is in no group and does no harm.
__global__ void __launch_bounds__(kGroupThreads) group_tokens_kernel(
    const int64_t* __restrict__ position, int64_t N, int64_t M, int64_t ranges, int* __restrict__ start,
    int* __restrict__ order) {
  SHIVA_SHARED(int, counts, [kGroupWarps][kGroupRange]);
  SHIVA_SHARED(int, tokens_before, [kGroupWarps]);
  SHIVA_SHARED(int, warp_totals, [kGroupWarps]);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int64_t b = blockIdx.x / ranges, first = blockIdx.x % ranges * kGroupRange;
  const int groups = static_cast<int>(first + kGroupRange < M ? kGroupRange : M - first);
  const int64_t run = ceil_div(N, kGroupWarps), begin = warp * run, end = begin + run < N ? begin + run : N;
  position += b * N, start += b * (M + 1);

#pragma unroll
  for (int w = 0; w < kGroupWarps; ++w) counts[w][thread] = 0;
  __syncthreads();
  int before = 0;
  visit_groups(position, begin, end, first, groups, [&](int64_t, int group, unsigned mates, int earlier) {
    before += earlier;
    // The lowest of the lanes with a group counts for all of them.
    if (group < kGroupRange && __ffs(mates) == lane + 1) counts[warp][group] += __popc(mates);
  });
  if (lane == 0) tokens_before[warp] = before;
  __syncthreads();

  // From here on a thread has one group, and counts[w][group] becomes the place of warp w's next token of it.
  int total = 0, warp_total = 0, place = 0;
#pragma unroll
  for (int w = 0; w < kGroupWarps; ++w) total += counts[w][thread];
  const int within_warp = warp_exclusive_sum(total, &warp_total);
  if (lane == 0) warp_totals[warp] = warp_total;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kGroupWarps; ++w) place += tokens_before[w] + (w < warp ? warp_totals[w] : 0);
  place += within_warp;
  if (thread < groups) start[first + thread] = place;
  if (first + thread == M - 1) start[M] = place + total;
  if (order == nullptr) return;
  order += b * N;
#pragma unroll
  for (int w = 0; w < kGroupWarps; ++w) {
    const int count = counts[w][thread];
    counts[w][thread] = place;
    place += count;
  }
  __syncthreads();
  visit_groups(position, begin, end, first, groups, [&](int64_t token, int group, unsigned mates, int) {
    const bool mine = group < kGroupRange;
    if (mine) order[counts[warp][group] + __popc(mates & ((1u << lane) - 1))] = static_cast<int>(token);
    __syncwarp();
    if (mine && __ffs(mates) == lane + 1) counts[warp][group] += __popc(mates);
  });
}

// x [B, N, D] -> out [B, M, D]; groups = B M. A warp a group.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kMeanThreads) scatter_mean_kernel(
    const T* __restrict__ x, Strides strides, const int* __restrict__ start, const int* __restrict__ order,
    int64_t groups, int64_t N, int64_t M, int64_t D, T* __restrict__ out) {
  using A = acc_t<T>;
  const int64_t block = blockIdx.x, group = block * (kMeanThreads / kWarp) + threadIdx.x / kWarp;
  if (group >= groups) return;
  const int64_t b = group / M, at = group + b;  // start has M + 1 numbers a row
  const int begin = start[at], end = start[at + 1];
  const A share = A(1) / static_cast<A>(end - begin > 1 ? end - begin : 1);
  const T* rows = x + b * strides.batch;
  order += b * N;
  for (int64_t d = static_cast<int64_t>(threadIdx.x % kWarp) * kWidth; d < D; d += kWarp * kWidth) {
    A sum[kWidth] = {};
#pragma unroll 4
    for (int j = begin; j < end; ++j) {
      A part[kWidth];
      load_pack(rows + order[j] * strides.row + d, part);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) sum[c] += part[c];
    }
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sum[c] *= share;
    store_pack(out + group * D + d, sum);
  }
}

// grad [B, M, D] -> out [B, N, D]: each token's share of its group's gradient; rows = B N. A warp a row.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kMeanThreads) scatter_mean_backward_kernel(
    const T* __restrict__ grad, Strides strides, const int64_t* __restrict__ position, const int* __restrict__ start,
    int64_t rows, int64_t N, int64_t M, int64_t D, T* __restrict__ out) {
  using A = acc_t<T>;
  const int64_t block = blockIdx.x, row = block * (kMeanThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int64_t b = row / N, m = position[row], at = b * (M + 1) + m;
  const A share = A(1) / static_cast<A>(start[at + 1] - start[at]);
  const T* from = grad + offset2(b, strides.batch, m, strides.row);
#pragma unroll 4
  for (int64_t d = static_cast<int64_t>(threadIdx.x % kWarp) * kWidth; d < D; d += kWarp * kWidth) {
    A part[kWidth];
    load_pack(from + d, part);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) part[c] *= share;
    store_pack(out + row * D + d, part);
  }
}

}  // namespace shiva::cuda
