// Moving rows of tokens: one warp a row, in accesses as wide as every address and the row's length allow.
//
// Rows are moved as integers whatever their dtype, so that no bit of a NaN changes. Only batch and token strides remain
// here; the launchers make channels adjacent first. Everything on the host side takes raw pointers too.
#pragma once

#include <type_traits>

#include "cuda/device.h"
#include "cuda/inverse_index.cuh"

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

}  // namespace shiva::cuda
