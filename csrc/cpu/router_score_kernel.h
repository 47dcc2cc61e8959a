#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace shiva::cpu {
// hidden [rows, H] of dtype; context, weight (LayerNorm weight * output weight) [H] and offset in float (double for
// Float64). scores[i] = <(a - mean(a)) / std(a), weight> + offset with a = SiLU(hidden_i + context). scratch: [H].
SHIVA_DECLARE_KERNEL(
    void router_epilogue(
        Dtype dtype, const void* hidden, const void* context, const void* weight, double offset, int64_t rows,
        int64_t H, double eps, void* scratch, void* scores))
// Its backward for grad [rows] (float or double): overwrites hidden with the gradient at hidden + context and adds,
// per channel, that gradient to context_sum and grad * normalised a to normal_sum; both [H], float or double.
// scratch: [H].
SHIVA_DECLARE_KERNEL(
    void router_epilogue_backward(
        Dtype dtype, void* hidden, const void* context, const void* weight, const void* grad, int64_t rows, int64_t H,
        double eps, void* scratch, void* context_sum, void* normal_sum))
}  // namespace shiva::cpu
