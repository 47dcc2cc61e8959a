// soft_rank and its gradient: sums over the pairs of a row's tokens, each pair evaluated once.
//
// Of a pair only e = exp(-|s_j - s_i| / tau) is needed: with r = 1 / (1 + e) the worse token's rank grows by r and the
// better one's by e r = 1 - r, and sigmoid' is e r^2. A block evaluates tiles of pairs in registers and adds them up
// along both sides. A row is cut into at most kMaxParts parts, with one block for every two of them; what the tokens
// of a part get from another part has its own place in `partial`, so memory stays O(N) and no sum depends on timing.
//
// There are two forms. Dense: an exponential for each pair, tokens in their own order. Sorted (the scores ascend): for
// two tiles of tokens with a pivot c between them, e = exp((s_i - c) / tau) * exp((c - s_j) / tau), so that a token
// needs one exponential for a whole tile of pairs; both factors are at most 1, and one that underflows makes e = 0,
// which is right. Tiles further apart than SigmoidWindow's reach are counted instead of evaluated.
//
// Infinite scores need no care: e is 0, or NaN for two equal infinities. A NaN makes the row NaN, as every token
// meets it; in the sorted form, which skips pairs, it is the row's last score.
#pragma once

#include "core/sigmoid_window.h"
#include "cuda/device.h"

namespace shiva::cuda {

constexpr int kPairThreads = 256;
constexpr int kSide = 16;      // a block is kSide x kSide threads, each with kMicro x kMicro pairs of a tile
constexpr int kMaxParts = 16;  // of a row
constexpr double kLog2e = 1.4426950408889634;

SHIVA_DEVICE float power_of_two(float x) { return exp2f(x); }
SHIVA_DEVICE double power_of_two(double x) { return exp2(x); }

// 1 / x for x in [1, 2], exactly 1 for 1. A division would branch around ranges that cannot occur here, once a pair.
// The best parabola is off by 1/99, and each Newton step squares that.
template <typename T>
SHIVA_DEVICE T inverse_of(T x) {
  T y = (x * (T(32) / 99) - T(16) / 11) * x + T(70) / 33;
#pragma unroll
  for (int step = 0; step < (sizeof(T) == 4 ? 2 : 4); ++step) y += y * (1 - x * y);
  return y;
}

// One tile: rows of tokens i, columns of tokens j. Thread (x, y) has the rows y + kSide * r and the columns
// x + kSide * c. row_sums[r] grows by what row r gets, sums[y][column] becomes what the column gets from these rows.
// weights and grads: [2][kTile], of the rows and of the columns. weights are the two factors of e if kPivoted, else the
// scores. On the diagonal rows and columns are the same tokens, and only the pairs with i < j are taken; a tile may be
// there if kMayBeDiagonal.
template <typename T, int kMicro, bool kSorted, bool kBackward, bool kPivoted, bool kMayBeDiagonal>
SHIVA_DEVICE void add_tile(
    const T (&weights)[2][kSide * kMicro], const T (&grads)[2][kSide * kMicro], T scale, bool diagonal, int columns,
    T (&row_sums)[kMicro], T (&sums)[kSide][kSide * kMicro + 1]) {
  const int x = static_cast<int>(threadIdx.x) % kSide, y = static_cast<int>(threadIdx.x) / kSide;
  T row_weights[kMicro], row_grads[kMicro];
#pragma unroll
  for (int r = 0; r < kMicro; ++r) {
    row_weights[r] = weights[0][y + kSide * r];
    row_grads[r] = kBackward ? grads[0][y + kSide * r] : T(0);
  }
  for (int column = x; column < columns; column += kSide) {
    const int rows = diagonal ? column : kSide * kMicro;
    const T weight = weights[1][column], grad = kBackward ? grads[1][column] : T(0);
    T sum = 0;
#pragma unroll
    for (int r = 0; r < kMicro; ++r) {
      const bool taken = !kMayBeDiagonal || y + kSide * r < rows;
      const T z = (row_weights[r] - weight) * scale;  // unused if pivoted; sorted scores ascend, so z <= 0
      const bool ascends = kSorted || z < 0;
      const T e = kPivoted ? row_weights[r] * weight : power_of_two(ascends ? z : -z);
      const T inverse = inverse_of(1 + e), rest = e * inverse;
      if constexpr (kBackward) {
        const T change = taken ? rest * inverse * (grad - row_grads[r]) : T(0);
        row_sums[r] += change;
        sum -= change;
      } else {
        row_sums[r] += !taken ? T(0) : ascends ? inverse : rest;
        sum += !taken ? T(0) : ascends ? rest : inverse;
      }
    }
    sums[y][column] = sum;
  }
}

// The sum of column `token` over a block's threads.
template <typename T, int kWidth>
SHIVA_DEVICE T column_sum(const T (&sums)[kSide][kWidth], int token) {
  T total = 0;
  for (int k = 0; k < kSide; ++k) total += sums[k][token];
  return total;
}

// partial[row, part, token]: what the token gets from the tokens of that part.
// scores and partial are in ascending order of the scores if kSorted; grad is not, order [rows, n] says where it is.
// scale: log2(e) / tau. Parts have part_tokens tokens, a multiple of the tile; the last has the rest.
template <typename T, int kMicro, bool kSorted, bool kBackward>
__global__ void __launch_bounds__(kPairThreads, sizeof(T) == 4 ? 3 : 2) soft_rank_pairs_kernel(
    const T* scores, const T* grad, const int32_t* order, int64_t n, int parts, int64_t part_tokens, T scale,
    T* partial) {
  constexpr int kTile = kSide * kMicro;
  constexpr T kReach = SigmoidWindow<T>::kReach * T(kLog2e);
  constexpr T kSpan = SigmoidWindow<T>::kBlockSpan * T(kLog2e);
  SHIVA_SHARED(T, weights, [2][kTile]);
  SHIVA_SHARED(T, grads, [2][kTile]);
  SHIVA_SHARED(T, sums, [kSide][kTile + 1]);
  const int thread = static_cast<int>(threadIdx.x), x = thread % kSide, y = thread / kSide;
  const int pairs = parts * (parts + 1) / 2;
  const int64_t row = blockIdx.x / pairs;
  int part = 0, ahead = static_cast<int>(blockIdx.x % pairs);
  for (; ahead >= parts - part; ++part) ahead -= parts - part;
  const int64_t i_begin = part * part_tokens, j_begin = (part + ahead) * part_tokens;
  const int64_t i_end = i_begin + part_tokens < n ? i_begin + part_tokens : n;
  const int64_t j_end = j_begin + part_tokens < n ? j_begin + part_tokens : n;
  const T* s = scores + row * n;

  // Thread t of the first kTile alone touches the t-th tokens of the tiles here: no barrier is needed for these sums.
  T* i_sums = partial + (row * parts + part + ahead) * n;
  T* j_sums = partial + (row * parts + part) * n;
  if (thread < kTile) {
    for (int64_t i = i_begin + thread; i < i_end; i += kTile) i_sums[i] = 0;
    for (int64_t j = j_begin + thread; j < j_end; j += kTile) j_sums[j] = 0;
  }

  for (int64_t i0 = i_begin; i0 < i_end; i0 += kTile) {
    T row_sums[kMicro] = {};
    T beyond = 0;  // tokens j of this part that are better by more than the reach
    for (int64_t j0 = ahead == 0 ? i0 : j_begin; j0 < j_end; j0 += kTile) {
      const bool diagonal = i0 == j0;
      const int columns = n - j0 < kTile ? static_cast<int>(n - j0) : kTile;
      T pivot = 0;
      bool pivoted = false;
      if constexpr (kSorted) {
        pivot = s[diagonal ? j0 + columns / 2 : j0];
        if (diagonal) {
          pivoted = (s[j0 + columns - 1] - s[j0]) * scale <= kSpan;  // else a factor may overflow
        } else {
          if ((pivot - s[i0 + kTile - 1]) * scale > kReach) {
            beyond = static_cast<T>(j_end - j0);
            break;
          }
          pivoted = pivot - pivot == 0;  // it is finite
        }
      }
      if (thread < 2 * kTile) {
        const int side = thread / kTile, t = thread % kTile;
        const int64_t token = (side == 0 ? i0 : j0) + t;
        const T score = token < n ? s[token] : T(0);
        weights[side][t] = pivoted ? power_of_two((side == 0 ? score - pivot : pivot - score) * scale) : score;
        if constexpr (kBackward)
          grads[side][t] = token < n ? grad[row * n + (kSorted ? order[row * n + token] : token)] : T(0);
      }
      __syncthreads();
      if (!pivoted)
        add_tile<T, kMicro, kSorted, kBackward, false, true>(weights, grads, scale, diagonal, columns, row_sums, sums);
      else if (diagonal)
        add_tile<T, kMicro, kSorted, kBackward, true, true>(weights, grads, scale, diagonal, columns, row_sums, sums);
      else
        add_tile<T, kMicro, kSorted, kBackward, true, false>(weights, grads, scale, diagonal, columns, row_sums, sums);
      __syncthreads();
      if (thread < columns) j_sums[j0 + thread] += column_sum(sums, thread);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kMicro; ++r) sums[x][y + kSide * r] = row_sums[r];
    __syncthreads();
    if (thread < kTile && i0 + thread < n)
      i_sums[i0 + thread] += column_sum(sums, thread) + (kBackward ? T(0) : beyond);
  }
}

// out[row, token]: the sum of partial over the parts, as the rank or its gradient. total: rows x n.
// sorted and order, [rows, n]: the sorted scores and where they were; of the sorted form alone.
template <typename T, bool kSorted, bool kBackward>
__global__ void __launch_bounds__(kPairThreads) soft_rank_combine_kernel(
    const T* partial, const T* sorted, const int32_t* order, int64_t total, int64_t n, int parts, double tau, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPairThreads + threadIdx.x;
  if (i >= total) return;
  const int64_t row = i / n, token = i % n;
  double sum = kBackward ? 0 : 1;
  for (int part = 0; part < parts; ++part) sum += static_cast<double>(partial[(row * parts + part) * n + token]);
  T result = static_cast<T>(kBackward ? sum / tau : sum);
  if constexpr (kSorted) {
    const T last = sorted[row * n + n - 1];
    if (n > 1 && last != last) result = last;
  }
  out[row * n + (kSorted ? order[i] : token)] = result;
}

}  // namespace shiva::cuda
