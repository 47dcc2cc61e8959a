#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace shiva::cpu {
// out [D] = the sum, in order, of weight[j] times the row place[j] at rows, `stride` bytes apart, over j < K; nothing
// for a place of -1. weight is in the accumulation dtype; null: all 1.
SHIVA_DECLARE_KERNEL(
    void add_placed_rows(
        Dtype dtype, const char* rows, int64_t stride, const int64_t* place, const void* weight, int64_t K, int64_t D,
        void* out))
// grad_row [D] = *weight times grad [D]; *grad_weight = <grad, row>. Both weights are in the accumulation dtype.
SHIVA_DECLARE_KERNEL(
    void weighted_row_backward(
        Dtype dtype, const void* grad, const void* row, const void* weight, int64_t D, void* grad_row,
        void* grad_weight))
}  // namespace shiva::cpu
