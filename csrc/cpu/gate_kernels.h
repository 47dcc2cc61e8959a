#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace shiva::cpu {
// One token row of residual_gate's backward. gate_grad is null for a rejected token.
//   grad_x = base_grad (+ gate_grad);  *inclusion = <gate_grad, x> if kept, -<base_grad, x> if not.
SHIVA_DECLARE_KERNEL(
    void residual_gate_row(
        Dtype dtype, const void* x, const void* base_grad, const void* gate_grad, int64_t D, void* grad_x,
        void* inclusion))
// One token row of counterfactual_scatter's backward. src is null for a rejected token.
//   *inclusion = <grad, src - base> - kappa |update|^2 if kept, <grad, update> + kappa |update|^2 if not.
SHIVA_DECLARE_KERNEL(
    void counterfactual_row(
        Dtype dtype, const void* grad, const void* base, const void* src, const void* update, int64_t D, double kappa,
        void* inclusion))
}  // namespace shiva::cpu
