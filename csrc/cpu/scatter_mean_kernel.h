#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace shiva::cpu {
// out [D] = the sum, in order, of the rows tokens[0 .. count) at x, `stride` bytes apart, times 1 / count; count > 0.
SHIVA_DECLARE_KERNEL(
    void mean_rows(
        Dtype dtype, const char* x, int64_t stride, const int64_t* tokens, int64_t count, int64_t D, void* out))
// out [D] = row [D] times 1 / count.
SHIVA_DECLARE_KERNEL(void divide_row(Dtype dtype, const void* row, int64_t count, int64_t D, void* out))
}  // namespace shiva::cpu
