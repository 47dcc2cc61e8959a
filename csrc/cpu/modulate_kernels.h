#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace shiva::cpu {
// One row: out = LayerNorm(x) * (1 + scale) + shift, all [D] of dtype.
SHIVA_DECLARE_KERNEL(
    void modulate_row(
        Dtype dtype, const void* x, const void* shift, const void* scale, int64_t D, double eps, void* out))
// One row of its backward: grad_x [D]; adds grad to shift_sum and grad * LayerNorm(x) to scale_sum (float or double).
SHIVA_DECLARE_KERNEL(
    void modulate_backward_row(
        Dtype dtype, const void* grad, const void* x, const void* scale, int64_t D, double eps, void* grad_x,
        void* shift_sum, void* scale_sum))
// One row: out = base + gate * update, all [D] of dtype.
SHIVA_DECLARE_KERNEL(
    void gated_add_row(Dtype dtype, const void* base, const void* update, const void* gate, int64_t D, void* out))
// One row of its backward: grad_update = gate * grad; adds update * grad to gate_sum (float or double).
SHIVA_DECLARE_KERNEL(
    void gated_add_backward_row(
        Dtype dtype, const void* grad, const void* update, const void* gate, int64_t D, void* grad_update,
        void* gate_sum))
// out[d] = sum over c, in order, of partial[c * stride + d] (float or double), rounded to dtype.
SHIVA_DECLARE_KERNEL(
    void reduce_partials(Dtype dtype, const void* partial, int64_t count, int64_t stride, int64_t D, void* out))
}  // namespace shiva::cpu
