// Greedy facility location: in each step the column that gains most is taken. Columns lie one after the other, so that
// a warp reads one in order and its sum is that of the CPU kernel, bit for bit.
#pragma once

#include "cuda/device.h"

namespace shiva::cuda {

constexpr int kFacilityThreads = 256;
constexpr int kFacilityWarps = kFacilityThreads / kWarp;

SHIVA_DEVICE double positive(double x) { return !(x <= 0) ? x : 0; }  // NaN stays

// The sum over i of max(column_i - covered_i, 0) of one warp's column: row i goes into lane i % 32.
template <typename T>
SHIVA_DEVICE double warp_gain(const T* column, const acc_t<T>* covered, int64_t n) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp; i < n; i += kWarp)
    sum += positive(static_cast<double>(load(column[i])) - static_cast<double>(covered[i]));
  return warp_sum(sum);
}

// A column and its gain as an ordered key, in which NaN is largest; key 0 is less than any gain's.
struct Choice {
  uint64_t key;
  int64_t column;
};

SHIVA_DEVICE Choice better(Choice a, Choice b) {
  return b.key > a.key || (b.key == a.key && b.column < a.column) ? b : a;
}

// The best of the columns that are not taken, the first of equals; all threads of a block get it. `warps` is shared,
// and must rest until the next __syncthreads.
SHIVA_DEVICE Choice best_column(const double* gains, const int* taken, int64_t n, Choice (&warps)[kFacilityWarps]) {
  Choice best = {0, n};
  for (int64_t j = threadIdx.x; j < n; j += kFacilityThreads)
    if (!taken[j]) best = better(best, {ordered_key(static_cast<uint64_t>(__double_as_longlong(gains[j]))), j});
  for (int step = kWarp / 2; step > 0; step /= 2)
    best = better(best, {__shfl_xor_sync(kAllLanes, best.key, step), __shfl_xor_sync(kAllLanes, best.column, step)});
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = best;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kFacilityWarps; ++w) best = better(best, warps[w]);
  return best;
}

// Takes a column: each row is covered as well as before, or as the column does it. By all threads of a block.
template <typename T>
SHIVA_DEVICE void take(const T* columns, int64_t best, int64_t n, acc_t<T>* covered, int* taken) {
  for (int64_t i = threadIdx.x; i < n; i += kFacilityThreads) {
    const acc_t<T> s = load(columns[best * n + i]);
    if (s > covered[i] || s != s) covered[i] = s;
  }
  if (threadIdx.x == 0) taken[best] = 1;
}

// Writes the taken columns in ascending order. By all threads of a block; `counts` is shared.
SHIVA_DEVICE void list_taken(const int* taken, int64_t n, int (&counts)[kFacilityWarps], int64_t* chosen) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  int64_t before = 0;
  for (int64_t first = 0; first < n; first += kFacilityThreads) {
    const int64_t j = first + threadIdx.x;
    const bool mine = j < n && taken[j];
    const unsigned lanes = __ballot_sync(kAllLanes, mine);
    if (lane == 0) counts[warp] = __popc(lanes);
    __syncthreads();
    int64_t place = before + __popc(lanes & ((1u << lane) - 1));
    for (int w = 0; w < kFacilityWarps; ++w) {
      if (w < warp) place += counts[w];
      before += counts[w];
    }
    if (mine) chosen[place] = j;
    __syncthreads();
  }
}

// ---- small: n <= kFacilityThreads, a block for a whole choice

// columns [B, n, n] -> chosen [B, count]
template <typename T>
__global__ void __launch_bounds__(kFacilityThreads)
    facility_block_kernel(const T* __restrict__ columns, int n, int count, int64_t* __restrict__ chosen) {
  using A = acc_t<T>;
  SHIVA_SHARED(A, covered, [kFacilityThreads]);
  SHIVA_SHARED(double, gains, [kFacilityThreads]);
  SHIVA_SHARED(int, taken, [kFacilityThreads]);
  SHIVA_SHARED(Choice, warps, [kFacilityWarps]);
  SHIVA_SHARED(int, counts, [kFacilityWarps]);
  const int thread = static_cast<int>(threadIdx.x);
  columns += static_cast<int64_t>(blockIdx.x) * n * n;
  chosen += static_cast<int64_t>(blockIdx.x) * count;
  covered[thread] = -1;  // no cosine is less
  taken[thread] = 0;
  __syncthreads();
  for (int step = 0; step < count; ++step) {
    for (int j = thread / kWarp; j < n; j += kFacilityWarps) {
      const double gain = warp_gain(columns + j * n, covered, n);
      if (thread % kWarp == 0) gains[j] = gain;
    }
    __syncthreads();
    take(columns, best_column(gains, taken, n, warps).column, n, covered, taken);
    __syncthreads();
  }
  list_taken(taken, n, counts, chosen);
}

// ---- large: two launches a step

// covered [B, n] = -1, taken [B, n] = 0; items = B n.
template <typename A>
__global__ void __launch_bounds__(kFacilityThreads)
    facility_start_kernel(int64_t items, A* __restrict__ covered, int* __restrict__ taken) {
  const int64_t block = blockIdx.x, i = block * kFacilityThreads + threadIdx.x;
  if (i >= items) return;
  covered[i] = -1;
  taken[i] = 0;
}

// columns [B, n, n], covered and taken [B, n] -> gains [B, n] of those that are not taken; items = B n. A warp a
// column.
template <typename T>
__global__ void __launch_bounds__(kFacilityThreads) facility_gains_kernel(
    const T* __restrict__ columns, const acc_t<T>* __restrict__ covered, const int* __restrict__ taken, int64_t items,
    int64_t n, double* __restrict__ gains) {
  const int64_t block = blockIdx.x, item = block * kFacilityWarps + threadIdx.x / kWarp;
  if (item >= items || taken[item]) return;
  const double gain = warp_gain(columns + item * n, covered + item / n * n, n);
  if (threadIdx.x % kWarp == 0) gains[item] = gain;
}

// Takes the best column of each row of gains [B, n]. A block a row.
template <typename T>
__global__ void __launch_bounds__(kFacilityThreads) facility_take_kernel(
    const T* __restrict__ columns, const double* __restrict__ gains, int64_t n, acc_t<T>* __restrict__ covered,
    int* __restrict__ taken) {
  SHIVA_SHARED(Choice, warps, [kFacilityWarps]);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * n;
  const int64_t best = best_column(gains + first, taken + first, n, warps).column;
  take(columns + first * n, best, n, covered + first, taken + first);
}

// taken [B, n] -> chosen [B, count]. A block a row.
__global__ void __launch_bounds__(kFacilityThreads)
    facility_list_kernel(const int* __restrict__ taken, int64_t n, int64_t count, int64_t* __restrict__ chosen) {
  SHIVA_SHARED(int, counts, [kFacilityWarps]);
  const int64_t b = blockIdx.x;
  list_taken(taken + b * n, n, counts, chosen + b * count);
}

}  // namespace shiva::cuda
