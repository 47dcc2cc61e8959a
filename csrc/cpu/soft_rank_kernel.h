#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace shiva::cpu {
// sorted[n] ascending and finite. For i in [begin, end): rank[i] = 1 + sum over j != i of sigmoid((s_j - s_i) / tau).
// scratch: n elements. dtype: Float32 or Float64, of every pointer.
SHIVA_DECLARE_KERNEL(
    void soft_rank_range(
        Dtype dtype, const void* sorted, int64_t n, int64_t begin, int64_t end, double tau, void* scratch, void* rank))
// grad[n] goes with sorted; out[i] = 1/tau * sum over j of sigmoid'((s_j - s_i) / tau) * (grad_j - grad_i).
SHIVA_DECLARE_KERNEL(
    void soft_rank_backward_range(
        Dtype dtype, const void* sorted, const void* grad, int64_t n, int64_t begin, int64_t end, double tau,
        void* scratch, void* out))
}  // namespace shiva::cpu
