// Element types and arithmetic of the kernels. Included only by `<op>_kernel.cpp` files, inside which everything
// lives in the namespace of one instruction set (SHIVA_ISA), so that no compiled copy is shared between them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"

namespace shiva::cpu::SHIVA_ISA {

// Plain loops over these vectorise: every conversion is branch-free bit arithmetic.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  _Float16 value;
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

inline float load(const float& x) { return x; }
inline double load(const double& x) { return x; }
inline float load(const bf16& x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
inline float load(const f16& x) { return static_cast<float>(x.value); }

inline void store(float& out, float x) { out = x; }
inline void store(double& out, double x) { out = x; }
inline void store(f16& out, float x) { out.value = static_cast<_Float16>(x); }
inline void store(bf16& out, float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // nearest, ties to even
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

// e^x to 2 ulp for x in [-87, 88], clamped outside; NaN stays NaN. Cody-Waite reduction, degree-6 polynomial.
inline float exp_clamped(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = (__builtin_bit_cast(uint32_t, shifted) + 127u) << 23;
  return p * __builtin_bit_cast(float, exponent);
}
inline double exp_clamped(double x) {
  x = x > 700.0 ? 700.0 : x;
  x = x < -700.0 ? -700.0 : x;
  return __builtin_exp(x);
}

template <typename T>
inline T sigmoid(T x) {
  return T(1) / (T(1) + exp_clamped(-x));
}

// Calls body with a null pointer of the element type that dtype names.
template <typename Body>
inline void dispatch(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::Float32: body(static_cast<float*>(nullptr)); break;
    case Dtype::BFloat16: body(static_cast<bf16*>(nullptr)); break;
    case Dtype::Float16: body(static_cast<f16*>(nullptr)); break;
    case Dtype::Float64: body(static_cast<double*>(nullptr)); break;
  }
}

}  // namespace shiva::cpu::SHIVA_ISA
