// Moving rows of tokens: one warp a row, in accesses as wide as every address and the row's length allow.
//
// Rows are moved as integers whatever their dtype, so that no bit of a NaN changes. Only batch and token strides remain
// here; the launchers make channels adjacent first. Everything on the host side takes raw pointers too.
#pragma once

#include <type_traits>

#include "cuda/device.h"

namespace shiva::cuda {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int64_t kMostRowBlocks = 4096;  // more than any GPU holds at once; the warps loop over the rows

// Token rows [B, N, D] in memory, strides in bytes.
struct Rows {
  char* data;
  int64_t batch_stride;
  int64_t row_stride;

  template <typename Access>
  SHIVA_DEVICE Access* at(int64_t b, int64_t n) const {
    return reinterpret_cast<Access*>(data + offset2(b, batch_stride, n, row_stride));
  }
};

// ---- device

SHIVA_DEVICE int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }

// for (row = first_row(); row < rows; row += row_step()) gives each warp of the grid its rows.
SHIVA_DEVICE int64_t first_row() { return static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp; }
SHIVA_DEVICE int64_t row_step() { return static_cast<int64_t>(gridDim.x) * kRowWarps; }

// One warp copies a row of `count` accesses to `to`, and to `also` unless that is null.
template <typename Access>
SHIVA_DEVICE void copy_row(const Access* from, int64_t count, Access* to, Access* also = nullptr) {
  constexpr int kInFlight = 4;  // loads before the first store, to cover the memory's latency
  for (int64_t first = lane_of_warp(); first < count; first += kInFlight * kWarp) {
    Access part[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (first + i * kWarp < count) part[i] = from[first + i * kWarp];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kWarp >= count) continue;
      to[first + i * kWarp] = part[i];
      if (also != nullptr) also[first + i * kWarp] = part[i];
    }
  }
}

// One warp sets a row of `count` accesses to zero.
template <typename Access>
SHIVA_DEVICE void zero_row(int64_t count, Access* to) {
  for (int64_t i = lane_of_warp(); i < count; i += kWarp) to[i] = Access{};
}

// Some channels of a row that are read and written in one access.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  using Element = T;
  static constexpr int size = kCount;
  T at[kCount];
};

constexpr int kIndexThreads = 512;
constexpr int64_t kIndexChunk = 4096;

// position[b, t] = place of token t of n in index row b [k], or -1 where it is absent. A block writes the positions of
// one chunk of tokens and looks for them in the whole index row, so that fill and placement share one launch. An index
// outside [0, n) is in no chunk and does no harm.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    inverse_index_kernel(const int64_t* index, int64_t B, int64_t k, int64_t n, int64_t* position) {
  const int64_t chunks = ceil_div(n, kIndexChunk);
  for (int64_t item = blockIdx.x; item < B * chunks; item += gridDim.x) {
    const int64_t b = item / chunks, begin = item % chunks * kIndexChunk;
    const int64_t end = begin + kIndexChunk < n ? begin + kIndexChunk : n;
    for (int64_t token = begin + threadIdx.x; token < end; token += kThreads) position[b * n + token] = -1;
    __syncthreads();
    for (int64_t j = threadIdx.x; j < k; j += kThreads) {
      const int64_t token = index[b * k + j];
      if (begin <= token && token < end) position[b * n + token] = j;
    }
  }
}

// ---- host

// Any tensor class will do: this header knows none. A tensor [N, D] is shared by the batch.
template <typename Tensor>
Rows rows_of(const Tensor& t) {
  const int64_t size = static_cast<int64_t>(t.element_size());
  const int64_t tokens = t.dim() - 2;
  return {static_cast<char*>(t.data_ptr()), tokens == 1 ? t.stride(0) * size : 0, t.stride(tokens) * size};
}

// The row length, addresses and strides in one number: what divides it and is a power of two divides each of them.
template <typename... R>
uint64_t common_alignment(int64_t row_bytes, const R&... rows) {
  return (
      static_cast<uint64_t>(row_bytes) | ... |
      (reinterpret_cast<uintptr_t>(rows.data) | static_cast<uint64_t>(rows.batch_stride) |
       static_cast<uint64_t>(rows.row_stride)));
}

// Calls body with a null pointer of the widest type in which rows of that alignment can be moved.
template <typename Body>
void dispatch_access(uint64_t alignment, Body body) {
  if (alignment % 16 == 0) return body(static_cast<uint4*>(nullptr));
  if (alignment % 8 == 0) return body(static_cast<uint2*>(nullptr));
  if (alignment % 4 == 0) return body(static_cast<uint32_t*>(nullptr));
  body(static_cast<uint16_t*>(nullptr));
}

// Calls body with a null pointer of Pack<T, n>: 16 bytes if the alignment allows it, else one element.
template <typename T, typename Body>
void dispatch_pack(uint64_t alignment, Body body) {
  if (alignment % 16 == 0) return body(static_cast<Pack<T, 16 / sizeof(T)>*>(nullptr));
  body(static_cast<Pack<T, 1>*>(nullptr));
}

inline unsigned row_blocks(int64_t rows) {
  const int64_t blocks = ceil_div(rows, kRowWarps);
  return static_cast<unsigned>(blocks < kMostRowBlocks ? blocks : kMostRowBlocks);
}

// Launches inverse_index_kernel: index [B, k] -> position [B, n].
template <typename Stream>
void invert_index(const int64_t* index, int64_t B, int64_t k, int64_t n, int64_t* position, Stream stream) {
  const int64_t blocks = B * ceil_div(n, kIndexChunk);
  if (blocks == 0) return;
  SHIVA_LAUNCH(
      inverse_index_kernel<kIndexThreads>, static_cast<unsigned>(blocks < kMostRowBlocks ? blocks : kMostRowBlocks),
      kIndexThreads, 0, stream, index, B, k, n, position);
}

}  // namespace shiva::cuda
