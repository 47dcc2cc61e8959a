#include "cpu/ema_scan_kernel.h"

#include "cpu/scalar.h"

namespace shiva::cpu::SHIVA_ISA {

void ema_tile(
    Dtype dtype, const char* x, int64_t stride, const void* weight, int64_t M, int64_t width, char* out,
    int64_t out_stride) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const A* p = static_cast<const A*>(weight);
    A state[kScanTile] = {};
    for (int64_t m = 0; m < M; ++m) {
      const T* row = reinterpret_cast<const T*>(x + m * stride);
      T* to = reinterpret_cast<T*>(out + m * out_stride);
      const A share = p[m], rest = A(1) - share;
      if (rest == A(0)) {  // starts afresh: not even a NaN comes through
        for (int64_t d = 0; d < width; ++d) state[d] = A(0);
      }
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) {
        state[d] = share * load(row[d]) + rest * state[d];
        store(to[d], state[d]);
      }
    }
  });
}

void ema_tile_backward(
    Dtype dtype, const char* grad, int64_t grad_stride, const char* x, int64_t x_stride, const char* e,
    int64_t e_stride, const void* weight, int64_t M, int64_t width, char* grad_x, int64_t out_stride,
    void* part_values) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const A* p = static_cast<const A*>(weight);
    A* part = static_cast<A*>(part_values);
    A state[kScanTile] = {};
    static const T zeros[kScanTile] = {};
    for (int64_t m = M; m-- > 0;) {
      const T* slope = reinterpret_cast<const T*>(grad + m * grad_stride);
      const T* row = reinterpret_cast<const T*>(x + m * x_stride);
      const T* before = m > 0 ? reinterpret_cast<const T*>(e + (m - 1) * e_stride) : zeros;
      T* to = reinterpret_cast<T*>(grad_x + m * out_stride);
      const A share = p[m], rest = A(1) - share;
      const bool afresh = rest == A(0);
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < width; ++d) {
        const A total = load(slope[d]) + state[d], average = load(before[d]);
        const A prior = afresh && !(average - average == A(0)) ? A(0) : average;  // no NaN or infinity from there
        store(to[d], share * total);
        sum += total * (load(row[d]) - prior);
        state[d] = rest * total;
      }
      if (afresh) {
        for (int64_t d = 0; d < width; ++d) state[d] = A(0);
      }
      part[m] = sum;
    }
  });
}

void add_parts(Dtype dtype, const void* part_values, int64_t parts, int64_t rows, void* out_values) {
  dispatch(dtype, [&](auto* type) {
    using A = acc_t<std::remove_pointer_t<decltype(type)>>;
    const A* part = static_cast<const A*>(part_values);
    A* out = static_cast<A*>(out_values);
    for (int64_t i = 0; i < rows; ++i) out[i] = A(0);
    for (int64_t j = 0; j < parts; ++j) {
#pragma omp simd
      for (int64_t i = 0; i < rows; ++i) out[i] += part[j * rows + i];
    }
  });
}

}  // namespace shiva::cpu::SHIVA_ISA
