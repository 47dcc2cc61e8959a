// CUDA's programming model on the CPU: lets g++ compile a kernel's own source and run every CUDA thread as a fibre.
//
// Included through cuda/device.h when SHIVA_SIMT is defined. It is deliberately less forgiving than a GPU: shared
// memory starts as garbage, cp.async copies nothing before its wait, a shuffle from an idle lane reads garbage, warps
// and lanes run in an order drawn from a seed, and misuse (threads at different barriers, a lane outside its own mask,
// a deadlock) raises simt::Error.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simt/runtime.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define threadIdx (::shiva::simt::this_thread().index)
#define blockIdx (::shiva::simt::this_thread().block_index)
#define blockDim (::shiva::simt::this_launch().block)
#define gridDim (::shiva::simt::this_launch().grid)

// One allocation a block for each place in the source (and template instance).
#define SHIVA_SHARED(type, name, ...)                                    \
  using name##_array = type __VA_ARGS__;                                 \
  auto& name = *static_cast<name##_array*>(::shiva::simt::shared_memory( \
      [] {                                                               \
        static char site;                                                \
        return static_cast<const void*>(&site);                          \
      }(),                                                               \
      sizeof(name##_array), alignof(type)))
#define SHIVA_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::shiva::simt::dynamic_shared_memory())

#define SHIVA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::shiva::simt::launch_kernel<kernel>(#kernel, grid, block, shared_bytes, __VA_ARGS__)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

namespace shiva::simt {

template <auto kKernel, typename... Arguments>
void launch_kernel(const char* name, Dim3 grid, Dim3 block, size_t shared_bytes, Arguments... arguments) {
  launch(name, grid, block, shared_bytes, [=] { kKernel(arguments...); }, __PRETTY_FUNCTION__);
}

// A value of up to 8 bytes that a lane offers to its warp, and what it gets back.
struct Exchange {
  uint64_t value;
  int source;  // lane to read, for shuffles
  uint64_t result;
};

template <typename T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

void check_width(int width);
uint64_t shuffle(const char* what, unsigned mask, uint64_t value, int source);
int lane_of_this_thread();

template <typename T>
T shuffle_to(const char* what, unsigned mask, T value, int source) {
  return unpack<T>(shuffle(what, mask, pack(value), source));
}

}  // namespace shiva::simt

// Warp shuffles; a segment is `width` lanes. Out-of-range sources give the lane's own value, as the guide says.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  shiva::simt::check_width(width);
  const int lane = shiva::simt::lane_of_this_thread();
  return shiva::simt::shuffle_to("__shfl_sync", mask, value, (lane & ~(width - 1)) + (source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  shiva::simt::check_width(width);
  const int lane = shiva::simt::lane_of_this_thread(), source = lane - static_cast<int>(delta);
  return shiva::simt::shuffle_to("__shfl_up_sync", mask, value, source < (lane & ~(width - 1)) ? lane : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  shiva::simt::check_width(width);
  const int lane = shiva::simt::lane_of_this_thread(), source = lane + static_cast<int>(delta);
  return shiva::simt::shuffle_to("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  shiva::simt::check_width(width);
  const int lane = shiva::simt::lane_of_this_thread(), source = lane ^ lanes;
  return shiva::simt::shuffle_to("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? lane : source);
}

unsigned __ballot_sync(unsigned mask, int predicate);
int __any_sync(unsigned mask, int predicate);
int __all_sync(unsigned mask, int predicate);
unsigned __match_any_sync(unsigned mask, unsigned value);
unsigned __match_any_sync(unsigned mask, unsigned long long value);
unsigned __reduce_add_sync(unsigned mask, unsigned value);
unsigned __reduce_min_sync(unsigned mask, unsigned value);
unsigned __reduce_max_sync(unsigned mask, unsigned value);
int __reduce_add_sync(unsigned mask, int value);
int __reduce_min_sync(unsigned mask, int value);
int __reduce_max_sync(unsigned mask, int value);

void __syncwarp(unsigned mask = 0xffffffffu);
void __syncthreads(int line = __builtin_LINE());
int __syncthreads_count(int predicate, int line = __builtin_LINE());
int __syncthreads_or(int predicate, int line = __builtin_LINE());
int __syncthreads_and(int predicate, int line = __builtin_LINE());

// Other threads may run before it, none during it; its accesses are reported as atomic ones.
template <typename T, typename Change>
__attribute__((no_sanitize("thread"))) T shiva_simt_atomic(T* address, Change change) {
  shiva::simt::atomic_begin(address, sizeof(T));
  const T before = *address;
  *address = change(before);
  shiva::simt::atomic_end(address, sizeof(T));
  return before;
}
template <typename T>
T atomicAdd(T* address, T value) {
  return shiva_simt_atomic(address, [&](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* address, T value) {
  return shiva_simt_atomic(address, [&](T old) { return old > value ? old : value; });
}
template <typename T>
T atomicMin(T* address, T value) {
  return shiva_simt_atomic(address, [&](T old) { return old < value ? old : value; });
}
template <typename T>
T atomicExch(T* address, T value) {
  return shiva_simt_atomic(address, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, T compare, T value) {
  return shiva_simt_atomic(address, [&](T old) { return old == compare ? value : old; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __clz(unsigned bits) { return bits ? __builtin_clz(bits) : 32; }
inline int __clzll(unsigned long long bits) { return bits ? __builtin_clzll(bits) : 64; }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }
