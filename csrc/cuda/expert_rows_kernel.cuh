// Rows to their experts and back: a stable counting sort of the tokens' choices, and weighted sums of the rows.
#pragma once

#include "cuda/row_copy.cuh"

namespace shiva::cuda {

constexpr int kMostExperts = 1024;
constexpr int kChoices = 128;              // choices that a block ranks at once
constexpr int kMostDispatchBlocks = 512;   // each reads the counts of all of them
constexpr int kScanThreads = kRowThreads;  // expert columns, and slices of blocks where there are fewer experts

// The expert of the block's choice `first` + thread, for threads below kChoices; -1 beyond end, and for a wrong expert.
SHIVA_DEVICE int load_choice(const int64_t* experts, int64_t first, int64_t end, int64_t E, int* expert) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kChoices) {
    const int64_t at = first + thread < end ? experts[first + thread] : -1;
    expert[thread] = at >= 0 && at < E ? static_cast<int>(at) : -1;
  }
  __syncthreads();
  return thread < kChoices ? expert[thread] : -1;
}

// How many of the earlier of the loaded choices have this expert; *last: no later one has it.
SHIVA_DEVICE int rank_of_choice(const int* expert, int mine, bool* last) {
  int rank = 0, later = 0;
#pragma unroll 8
  for (int i = 0; i < kChoices; ++i) {
    const int same = expert[i] == mine ? 1 : 0;
    rank += i < static_cast<int>(threadIdx.x) ? same : 0;
    later += i > static_cast<int>(threadIdx.x) ? same : 0;
  }
  *last = later == 0;
  return rank;
}

// experts [choices] -> counts [blocks, E]: how many of each block's run of choices go to each expert.
__global__ void __launch_bounds__(kRowThreads)
    expert_count_kernel(const int64_t* __restrict__ experts, int64_t choices, int64_t run, int E, int* counts) {
  SHIVA_SHARED(int, expert, [kChoices]);
  SHIVA_SHARED(int, count, [kMostExperts]);
  for (int e = static_cast<int>(threadIdx.x); e < E; e += kRowThreads) count[e] = 0;
  const int64_t begin = blockIdx.x * run, end = begin + run < choices ? begin + run : choices;
  for (int64_t first = begin; first < end; first += kChoices) {
    const int mine = load_choice(experts, first, end, E, expert);
    bool last = false;
    const int rank = mine >= 0 ? rank_of_choice(expert, mine, &last) : 0;
    if (last) count[mine] += rank + 1;
    __syncthreads();
  }
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < E; e += kRowThreads)
    counts[static_cast<int64_t>(blockIdx.x) * E + e] = count[e];
}

// next[e] = the choices of expert e in the blocks before this one, total[e] = in all of them.
SHIVA_DEVICE void add_counts(const int* __restrict__ counts, int E, int* next, int* total) {
  SHIVA_SHARED(int, before_of, [kScanThreads]);
  SHIVA_SHARED(int, total_of, [kScanThreads]);
  int columns = kWarp;
  while (columns < E && columns < kScanThreads) columns *= 2;
  const int thread = static_cast<int>(threadIdx.x), column = thread % columns, slices = kScanThreads / columns;
  const int blocks = static_cast<int>(gridDim.x), mine = static_cast<int>(blockIdx.x);
  for (int first = 0; first < E; first += columns) {
    const int e = first + column;
    int before = 0, all = 0;
    if (e < E) {
#pragma unroll 4
      for (int block = thread / columns; block < blocks; block += slices) {
        const int count = counts[static_cast<int64_t>(block) * E + e];
        all += count;
        before += block < mine ? count : 0;
      }
    }
    before_of[thread] = before, total_of[thread] = all;
    __syncthreads();
    if (thread < columns && e < E) {
      for (int slice = 1; slice < slices; ++slice) {
        before += before_of[slice * columns + thread];
        all += total_of[slice * columns + thread];
      }
      next[e] = before, total[e] = all;
    }
    __syncthreads();
  }
}

// start[e] = the sum of total[0 .. e), by the first warp.
SHIVA_DEVICE void add_up_experts(const int* total, int E, int* start) {
  if (threadIdx.x >= kWarp) return;
  int sum = 0;
  for (int first = 0; first < E; first += kWarp) {
    const int e = first + static_cast<int>(threadIdx.x);
    int chunk = 0;
    const int before = warp_exclusive_sum(e < E ? total[e] : 0, &chunk);
    if (e < E) start[e] = sum + before;
    sum += chunk;
  }
}

// With the counts of expert_count_kernel in the same grid: place [choices] of each choice, ends [E], and the rows of x
// at their places. capacity > 0: that many rows an expert, the unused ones zeroed, by all blocks together.
template <typename Access>
__global__ void __launch_bounds__(kRowThreads) expert_dispatch_kernel(
    Rows x, const int64_t* __restrict__ experts, const int* __restrict__ counts, int64_t choices, int64_t run, int E,
    int64_t K, int64_t capacity, int64_t count, int64_t* __restrict__ place, int* __restrict__ ends,
    Access* __restrict__ rows) {
  SHIVA_SHARED(int, expert, [kChoices]);
  SHIVA_SHARED(int, row_of, [kChoices]);
  SHIVA_SHARED(int, next, [kMostExperts]);
  SHIVA_SHARED(int, total, [kMostExperts]);
  SHIVA_SHARED(int, start, [kMostExperts]);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  add_counts(counts, E, next, total);
  add_up_experts(total, E, start);
  __syncthreads();
  if (blockIdx.x == 0)
    for (int e = thread; e < E; e += kRowThreads) ends[e] = start[e] + total[e];

  const int64_t begin = blockIdx.x * run, end = begin + run < choices ? begin + run : choices;
  for (int64_t first = begin; first < end; first += kChoices) {
    const int mine = load_choice(experts, first, end, E, expert);
    bool last = false;
    int slot = 0;
    if (thread < kChoices && first + thread < end) {
      int64_t row = -1;
      if (mine >= 0) {
        const int rank = rank_of_choice(expert, mine, &last);
        slot = next[mine] + rank;
        if (capacity == 0)
          row = start[mine] + slot;
        else if (slot < capacity)
          row = mine * capacity + slot;
      }
      row_of[thread] = static_cast<int>(row);
      place[first + thread] = row;
    }
    __syncthreads();
    if (last) next[mine] = slot + 1;
    const int here = static_cast<int>(end - first < kChoices ? end - first : kChoices);
    for (int c = warp; c < here; c += kRowWarps)
      if (row_of[c] >= 0) copy_row<Access>(x.at<Access>(0, (first + c) / K), count, rows + row_of[c] * count);
    __syncthreads();
  }

  for (int64_t row = first_row(); row < E * capacity; row += row_step())
    if (row % capacity >= total[row / capacity]) zero_row(count, rows + row * count);
}

// out[t] = sum over j, in order, of weight[t, j] (or 1, where weight is null) times rows[place[t, j]].
template <typename P>
__global__ void __launch_bounds__(kRowThreads) expert_combine_kernel(
    Rows rows, const int64_t* __restrict__ place, const acc_t<typename P::Element>* __restrict__ weight, int64_t T,
    int64_t K, int64_t packs, P* __restrict__ out) {
  using T_ = typename P::Element;
  using A = acc_t<T_>;
  for (int64_t token = first_row(); token < T; token += row_step()) {
    for (int64_t i = lane_of_warp(); i < packs; i += kWarp) {
      A sum[P::size] = {};
#pragma unroll 4
      for (int64_t j = 0; j < K; ++j) {
        const int64_t at = place[token * K + j];
        if (at < 0) continue;
        const A w = weight != nullptr ? weight[token * K + j] : A(1);
        const P part = rows.at<P>(0, at)[i];
#pragma unroll
        for (int c = 0; c < P::size; ++c) sum[c] += w * load(part.at[c]);
      }
      P total;
#pragma unroll
      for (int c = 0; c < P::size; ++c) total.at[c] = store<T_>(sum[c]);
      out[token * packs + i] = total;
    }
  }
}

// source[place[c]] = c + 1, where it was 0; the weight of a choice without a row gets no gradient.
template <typename A>
__global__ void __launch_bounds__(kRowThreads) expert_source_kernel(
    const int64_t* __restrict__ place, int64_t choices, int* __restrict__ source, A* __restrict__ grad_weight) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (c >= choices) return;
  if (place[c] >= 0)
    source[place[c]] = static_cast<int>(c + 1);
  else
    grad_weight[c] = A(0);
}

// For the choice c of each of R rows: grad_rows[row] = weight[c] grad[c / K], and grad_weight[c] is the dot
// product of grad[c / K] and rows[row]; a row of no choice gets zeros.
template <typename P>
__global__ void __launch_bounds__(kRowThreads) expert_combine_backward_kernel(
    Rows grad, Rows rows, const int* __restrict__ source, const acc_t<typename P::Element>* __restrict__ weight,
    int64_t R, int64_t K, int64_t packs, P* __restrict__ grad_rows,
    acc_t<typename P::Element>* __restrict__ grad_weight) {
  using T = typename P::Element;
  using A = acc_t<T>;
  for (int64_t row = first_row(); row < R; row += row_step()) {
    const int64_t c = static_cast<int64_t>(source[row]) - 1;
    P* out = grad_rows + row * packs;
    if (c < 0) {
      zero_row(packs, out);
      continue;
    }
    const A w = weight[c];
    const P* slope = grad.at<P>(0, c / K);
    const P* values = rows.at<P>(0, row);
    A sum = 0;
#pragma unroll 1
    for (int64_t i = lane_of_warp(); i < packs; i += kWarp) {
      const P value = values[i], g = slope[i];
      P scaled;
#pragma unroll
      for (int k = 0; k < P::size; ++k) {
        scaled.at[k] = store<T>(w * load(g.at[k]));
        sum += load(g.at[k]) * load(value.at[k]);
      }
      out[i] = scaled;
    }
    sum = warp_sum(sum);
    if (lane_of_warp() == 0) grad_weight[c] = sum;
  }
}

}  // namespace shiva::cuda
