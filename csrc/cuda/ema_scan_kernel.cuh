// The moving average of rows, and its gradient: a thread a channel, tokens in chunks that are scanned side by side.
#pragma once

#include "cuda/row_copy.cuh"

namespace shiva::cuda {

constexpr int kScanChannels = 128;  // threads of a block
constexpr int kScanWarps = kScanChannels / kWarp;
constexpr int kScanChunk = 64;  // tokens

// Where a block works: its batch row, its chunk of tokens [begin, end), and its thread's channel.
struct ScanPlace {
  int64_t b, chunk, chunks, begin, end, channel;
};

SHIVA_DEVICE ScanPlace scan_place(int64_t M, int64_t D) {
  const int64_t tiles = ceil_div(D, kScanChannels), chunks = ceil_div(M, kScanChunk), block = blockIdx.x;
  const int64_t tile = block % tiles, chunk = block / tiles % chunks, begin = chunk * kScanChunk;
  const int64_t end = begin + kScanChunk < M ? begin + kScanChunk : M;
  return {block / tiles / chunks, chunk, chunks, begin, end, tile * kScanChannels + threadIdx.x};
}

// What is left of a state that is let through by a factor: nothing at 0, not even a NaN.
template <typename A>
SHIVA_DEVICE A let_through(A factor, A state) {
  return factor == A(0) ? A(0) : factor * state;
}

// For every chunk: carry [B, chunks, D], what it leaves behind if nothing came before, and decay [B, chunks], what it
// lets through. Backward the chunks run from the last token to the first.
template <typename T, bool kBackward>
__global__ void __launch_bounds__(kScanChannels) ema_carry_kernel(
    Rows rows, const acc_t<T>* __restrict__ p, int64_t M, int64_t D, acc_t<T>* __restrict__ carry,
    acc_t<T>* __restrict__ decay) {
  using A = acc_t<T>;
  const ScanPlace at = scan_place(M, D);
  p += at.b * M;
  A state = 0, through = 1;
  const bool mine = at.channel < D;
  for (int64_t i = 0; i < at.end - at.begin; ++i) {
    const int64_t m = kBackward ? at.end - 1 - i : at.begin + i;
    const A share = p[m], rest = A(1) - share;
    const A value = mine ? load(rows.at<T>(at.b, m)[at.channel]) : A(0);
    state = kBackward ? let_through(rest, value + state) : share * value + let_through(rest, state);
    through *= rest;
  }
  const int64_t place = at.b * at.chunks + at.chunk;
  if (mine) carry[place * D + at.channel] = state;
  if (at.channel == 0) decay[place] = through;
}

// What reaches a chunk from the ones before it (backward: after it), for the thread's channel.
template <typename A, bool kBackward>
SHIVA_DEVICE A state_before(const ScanPlace& at, int64_t D, const A* __restrict__ carry, const A* __restrict__ decay) {
  A state = 0;
  const int64_t first = at.b * at.chunks, steps = kBackward ? at.chunks - 1 - at.chunk : at.chunk;
#pragma unroll 4
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t chunk = first + (kBackward ? at.chunks - 1 - i : i);
    state = carry[chunk * D + at.channel] + let_through(decay[chunk], state);
  }
  return state;
}

// out [B, M, D]: e_m = p_m x_m + (1 - p_m) e_{m-1}.
template <typename T>
__global__ void __launch_bounds__(kScanChannels) ema_scan_kernel(
    Rows x, const acc_t<T>* __restrict__ p, const acc_t<T>* __restrict__ carry, const acc_t<T>* __restrict__ decay,
    int64_t M, int64_t D, T* __restrict__ out) {
  using A = acc_t<T>;
  const ScanPlace at = scan_place(M, D);
  if (at.channel >= D) return;
  p += at.b * M;
  A state = state_before<A, false>(at, D, carry, decay);
  for (int64_t m = at.begin; m < at.end; ++m) {
    const A share = p[m];
    state = share * load(x.at<T>(at.b, m)[at.channel]) + let_through(A(1) - share, state);
    out[(at.b * M + m) * D + at.channel] = store<T>(state);
  }
}

// grad_x [B, M, D], and each warp's share of grad_p: part [warps, B M], warps = those of a row's blocks.
template <typename T>
__global__ void __launch_bounds__(kScanChannels) ema_scan_backward_kernel(
    Rows grad, Rows x, Rows e, const acc_t<T>* __restrict__ p, const acc_t<T>* __restrict__ carry,
    const acc_t<T>* __restrict__ decay, int64_t B, int64_t M, int64_t D, T* __restrict__ grad_x,
    acc_t<T>* __restrict__ part) {
  using A = acc_t<T>;
  const ScanPlace at = scan_place(M, D);
  const bool mine = at.channel < D;
  p += at.b * M;
  part += at.channel / kWarp * B * M + at.b * M;
  A state = mine ? state_before<A, true>(at, D, carry, decay) : A(0);
  for (int64_t m = at.end - 1; m >= at.begin; --m) {
    const A share = p[m];
    A slope = 0;
    if (mine) {
      const A total = load(grad.at<T>(at.b, m)[at.channel]) + state;
      A before = m > 0 ? load(e.at<T>(at.b, m - 1)[at.channel]) : A(0);
      if (share == A(1) && !(before - before == A(0))) before = A(0);  // no NaN or infinity from there
      grad_x[(at.b * M + m) * D + at.channel] = store<T>(share * total);
      slope = total * (load(x.at<T>(at.b, m)[at.channel]) - before);
      state = let_through(A(1) - share, total);
    }
    slope = warp_sum(slope);
    if (lane_of_warp() == 0) part[m] = slope;
  }
}

// out [rows] = the sum, in order, of part [parts, rows].
template <typename A>
__global__ void __launch_bounds__(kRowThreads)
    ema_parts_kernel(const A* __restrict__ part, int64_t parts, int64_t rows, A* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= rows) return;
  A sum = 0;
#pragma unroll 4
  for (int64_t j = 0; j < parts; ++j) sum += part[j * rows + i];
  out[i] = sum;
}

}  // namespace shiva::cuda
