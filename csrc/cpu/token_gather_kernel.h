#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace shiva::cpu {
// out[d] = sum over b, in order, of the row position[b * n] of batch b, where that is not negative. sum: scratch [D].
SHIVA_DECLARE_KERNEL(
    void sum_rows(
        Dtype dtype, const char* rows, int64_t batch_stride, int64_t row_stride, const int64_t* position, int64_t n,
        int64_t B, int64_t D, void* sum, void* out))
}  // namespace shiva::cpu
