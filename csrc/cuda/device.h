// What a kernel may use: CUDA itself under nvcc, its simulation (simt/) under g++. One source serves both compilers.
//
// Rules for `<op>_kernel.cuh`: raw pointers and sizes, no torch header; no __CUDA_ARCH__, CUB or cooperative groups,
// which the simulator could not see; shared memory, launches and inline assembly through the macros and wrappers here.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(SHIVA_SIMT)
#include "simt/simt.h"
#else
#include <cuda_runtime.h>

// SHIVA_SHARED(float, tile, [8][32]); uninitialised, 16-byte aligned.
#define SHIVA_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__
#define SHIVA_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char shiva_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(shiva_dynamic_shared)
// SHIVA_LAUNCH(kernel<float>, grid, block, shared bytes, stream, arguments...)
#define SHIVA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

#include "core/index.h"
#include "core/ordered_key.h"

#if defined(SHIVA_SIMT)
#define SHIVA_DEVICE inline
#else
#define SHIVA_DEVICE __device__ __forceinline__
#endif

namespace shiva::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Elements as they lie in memory; arithmetic is in float (double for double).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

SHIVA_DEVICE float load(float x) { return x; }
SHIVA_DEVICE double load(double x) { return x; }
SHIVA_DEVICE float load(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
#if defined(SHIVA_SIMT)
SHIVA_DEVICE float load(f16 x) { return static_cast<float>(__builtin_bit_cast(_Float16, x.bits)); }
#else
SHIVA_DEVICE float load(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
#endif

// a * b, rounded, where the compiler would fuse it with the sum it goes into.
#if defined(SHIVA_SIMT)
template <typename A>
inline A rounded_product(A a, A b) {
  return a * b;
}
#else
SHIVA_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
SHIVA_DEVICE double rounded_product(double a, double b) { return __dmul_rn(a, b); }
#endif

template <typename T>
SHIVA_DEVICE T store(acc_t<T> x);
template <>
SHIVA_DEVICE float store<float>(float x) {
  return x;
}
template <>
SHIVA_DEVICE double store<double>(double x) {
  return x;
}
template <>
SHIVA_DEVICE bf16 store<bf16>(float x) {  // nearest, ties to even, as sm_75 has no instruction for it
  const unsigned bits = __float_as_uint(x);
  const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
template <>
SHIVA_DEVICE f16 store<f16>(float x) {
#if defined(SHIVA_SIMT)
  return {__builtin_bit_cast(uint16_t, static_cast<_Float16>(x))};
#else
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

// ---- 16 bytes at a time

template <typename T>
struct alignas(16) Vec {
  static constexpr int size = 16 / sizeof(T);
  T at[size];
};

template <typename T>
SHIVA_DEVICE Vec<T> load_vec(const T* from) {
  return *reinterpret_cast<const Vec<T>*>(from);
}
template <typename T>
SHIVA_DEVICE void store_vec(T* to, const Vec<T>& value) {
  *reinterpret_cast<Vec<T>*>(to) = value;
}

// ---- sums over a warp and a block: a fixed order, so equal from run to run

template <typename T>
SHIVA_DEVICE T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Exclusive prefix sum over the lanes; *total gets the sum.
template <typename T>
SHIVA_DEVICE T warp_exclusive_sum(T value, T* total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  T inclusive = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const T below = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += below;
  }
  *total = __shfl_sync(kAllLanes, inclusive, kWarp - 1);
  return inclusive - value;
}

}  // namespace shiva::cuda
