// The total order behind topk_select, as unsigned integer keys: a larger key is a better score.
//
// Contract: -0 and +0 share a key; every NaN, whatever its sign and payload, has the largest key (torch.topk's
// order); all other values compare as floats do. Ties between equal keys go to the smaller token index.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace shiva {

SHIVA_HOST_DEVICE uint32_t ordered_key(uint32_t float_bits) {
  const uint32_t magnitude = float_bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0xffffffffu;  // NaN
  if (magnitude == 0) return 0x80000000u;           // -0 == +0
  return (float_bits & 0x80000000u) ? ~float_bits : (float_bits | 0x80000000u);
}

SHIVA_HOST_DEVICE uint64_t ordered_key(uint64_t double_bits) {
  const uint64_t magnitude = double_bits & 0x7fffffffffffffffull;
  if (magnitude > 0x7ff0000000000000ull) return ~0ull;  // NaN
  if (magnitude == 0) return 0x8000000000000000ull;     // -0 == +0
  return (double_bits >> 63) ? ~double_bits : (double_bits | 0x8000000000000000ull);
}

}  // namespace shiva
