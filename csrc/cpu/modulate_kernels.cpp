#include "cpu/modulate_kernels.h"

#include "cpu/scalar.h"

namespace shiva::cpu::SHIVA_ISA {
namespace {

template <typename T>
struct Statistics {
  acc_t<T> mean, inverse_std;
};

template <typename T>
Statistics<T> statistics(const T* x, int64_t D, double eps) {
  using A = acc_t<T>;
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += load(x[d]);
  const A mean = sum / static_cast<A>(D);
  A square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t d = 0; d < D; ++d) {
    const A centered = load(x[d]) - mean;
    square += centered * centered;
  }
  return {mean, A(1) / static_cast<A>(__builtin_sqrt(square / static_cast<A>(D) + static_cast<A>(eps)))};
}

}  // namespace

void modulate_row(
    Dtype dtype, const void* x_row, const void* shift_row, const void* scale_row, int64_t D, double eps,
    void* out_row) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = static_cast<const T*>(x_row);
    const T* shift = static_cast<const T*>(shift_row);
    const T* scale = static_cast<const T*>(scale_row);
    T* out = static_cast<T*>(out_row);
    const auto [mean, inverse_std] = statistics(x, D, eps);
    const acc_t<T> m = mean, r = inverse_std;  // structured bindings cannot enter the simd loop
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) store(out[d], (load(x[d]) - m) * r * (1 + load(scale[d])) + load(shift[d]));
  });
}

void modulate_backward_row(
    Dtype dtype, const void* grad_row, const void* x_row, const void* scale_row, int64_t D, double eps,
    void* grad_x_row, void* shift_sum_row, void* scale_sum_row) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const T* grad = static_cast<const T*>(grad_row);
    const T* x = static_cast<const T*>(x_row);
    const T* scale = static_cast<const T*>(scale_row);
    T* grad_x = static_cast<T*>(grad_x_row);
    A* shift_sum = static_cast<A*>(shift_sum_row);
    A* scale_sum = static_cast<A*>(scale_sum_row);
    const Statistics<T> stats = statistics(x, D, eps);
    const A m = stats.mean, r = stats.inverse_std;
    A sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t d = 0; d < D; ++d) {
      const A normal = (load(x[d]) - m) * r;
      const A slope = load(grad[d]) * (1 + load(scale[d]));
      sum += slope;
      dot += slope * normal;
      shift_sum[d] += load(grad[d]);
      scale_sum[d] += load(grad[d]) * normal;
    }
    const A mean_slope = sum / static_cast<A>(D), mean_dot = dot / static_cast<A>(D);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      const A normal = (load(x[d]) - m) * r;
      const A slope = load(grad[d]) * (1 + load(scale[d]));
      store(grad_x[d], r * (slope - mean_slope - normal * mean_dot));
    }
  });
}

void gated_add_row(
    Dtype dtype, const void* base_row, const void* update_row, const void* gate_row, int64_t D, void* out_row) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* base = static_cast<const T*>(base_row);
    const T* update = static_cast<const T*>(update_row);
    const T* gate = static_cast<const T*>(gate_row);
    T* out = static_cast<T*>(out_row);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) store(out[d], load(base[d]) + load(gate[d]) * load(update[d]));
  });
}

void gated_add_backward_row(
    Dtype dtype, const void* grad_row, const void* update_row, const void* gate_row, int64_t D, void* grad_update_row,
    void* gate_sum_row) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* grad = static_cast<const T*>(grad_row);
    const T* update = static_cast<const T*>(update_row);
    const T* gate = static_cast<const T*>(gate_row);
    T* grad_update = static_cast<T*>(grad_update_row);
    acc_t<T>* gate_sum = static_cast<acc_t<T>*>(gate_sum_row);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      store(grad_update[d], load(gate[d]) * load(grad[d]));
      gate_sum[d] += load(update[d]) * load(grad[d]);
    }
  });
}

void reduce_partials(Dtype dtype, const void* partial_rows, int64_t count, int64_t stride, int64_t D, void* out_row) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const A* partial = static_cast<const A*>(partial_rows);
    T* out = static_cast<T*>(out_row);
    for (int64_t d = 0; d < D; ++d) {
      double sum = 0;
      for (int64_t c = 0; c < count; ++c) sum += partial[c * stride + d];
      store(out[d], static_cast<A>(sum));
    }
  });
}

}  // namespace shiva::cpu::SHIVA_ISA
