#include "cpu/gate_kernels.h"

#include <cstddef>

#include "cpu/scalar.h"

namespace shiva::cpu::SHIVA_ISA {

void residual_gate_row(
    Dtype dtype, const void* x_row, const void* base_grad_row, const void* gate_grad_row, int64_t D, void* grad_x_row,
    void* inclusion) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const T* x = static_cast<const T*>(x_row);
    const T* base_grad = static_cast<const T*>(base_grad_row);
    const T* gate_grad = static_cast<const T*>(gate_grad_row);
    T* grad_x = static_cast<T*>(grad_x_row);
    A sum = 0;
    if (gate_grad != nullptr) {
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < D; ++d) {
        store(grad_x[d], load(base_grad[d]) + load(gate_grad[d]));
        sum += load(gate_grad[d]) * load(x[d]);
      }
    } else {
      // Together with the sum, a loop would copy half precisions one by one.
      constexpr bool kTogether = std::is_same_v<T, A>;
      if constexpr (!kTogether) __builtin_memcpy(grad_x, base_grad, static_cast<size_t>(D) * sizeof(T));
#pragma omp simd reduction(- : sum)
      for (int64_t d = 0; d < D; ++d) {
        if constexpr (kTogether) grad_x[d] = base_grad[d];
        sum -= load(base_grad[d]) * load(x[d]);
      }
    }
    *static_cast<A*>(inclusion) = sum;
  });
}

void counterfactual_row(
    Dtype dtype, const void* grad_row, const void* base_row, const void* src_row, const void* update_row, int64_t D,
    double kappa, void* inclusion) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const T* grad = static_cast<const T*>(grad_row);
    const T* base = static_cast<const T*>(base_row);
    const T* src = static_cast<const T*>(src_row);
    const T* update = static_cast<const T*>(update_row);
    A slope = 0, square = 0;
    if (src != nullptr) {
#pragma omp simd reduction(+ : slope, square)
      for (int64_t d = 0; d < D; ++d) {
        slope += load(grad[d]) * (load(src[d]) - load(base[d]));
        square += load(update[d]) * load(update[d]);
      }
    } else {
#pragma omp simd reduction(+ : slope, square)
      for (int64_t d = 0; d < D; ++d) {
        slope += load(grad[d]) * load(update[d]);
        square += load(update[d]) * load(update[d]);
      }
    }
    const A curvature = static_cast<A>(kappa) * square;
    *static_cast<A*>(inclusion) = src != nullptr ? slope - curvature : slope + curvature;
  });
}

}  // namespace shiva::cpu::SHIVA_ISA
