// Offsets are 64-bit and widened before the multiply, so that rows x tokens x channels may pass 2^31.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace shiva {

SHIVA_HOST_DEVICE int64_t offset2(int64_t i, int64_t stride_i, int64_t j, int64_t stride_j) {
  return i * stride_i + j * stride_j;
}

SHIVA_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace shiva
