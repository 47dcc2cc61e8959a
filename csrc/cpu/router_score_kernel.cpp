#include "cpu/router_score_kernel.h"

#include "cpu/scalar.h"

namespace shiva::cpu::SHIVA_ISA {
namespace {

// a = SiLU(hidden + context); returns its mean, 1 / sqrt(variance + eps) and <a - mean, weight>.
template <typename T>
void activate(
    const T* hidden, const acc_t<T>* context, const acc_t<T>* weight, int64_t H, double eps, acc_t<T>* a,
    acc_t<T>* mean, acc_t<T>* inverse_std, acc_t<T>* dot) {
  using A = acc_t<T>;
  A sum = 0, square = 0, product = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t h = 0; h < H; ++h) {
    const A v = load(hidden[h]) + context[h];
    a[h] = v * sigmoid(v);
    sum += a[h];
  }
  const A m = sum / static_cast<A>(H);
#pragma omp simd reduction(+ : square, product)
  for (int64_t h = 0; h < H; ++h) {
    square += (a[h] - m) * (a[h] - m);
    product += (a[h] - m) * weight[h];
  }
  *mean = m;
  *dot = product;
  *inverse_std = A(1) / static_cast<A>(__builtin_sqrt(square / static_cast<A>(H) + static_cast<A>(eps)));
}

}  // namespace

void router_epilogue(
    Dtype dtype, const void* hidden_rows, const void* context_row, const void* weight_row, double offset, int64_t rows,
    int64_t H, double eps, void* scratch, void* scores) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const T* hidden = static_cast<const T*>(hidden_rows);
    const A* context = static_cast<const A*>(context_row);
    const A* weight = static_cast<const A*>(weight_row);
    A* a = static_cast<A*>(scratch);
    for (int64_t i = 0; i < rows; ++i) {
      A mean, inverse_std, dot;
      activate(hidden + i * H, context, weight, H, eps, a, &mean, &inverse_std, &dot);
      static_cast<A*>(scores)[i] = dot * inverse_std + static_cast<A>(offset);
    }
  });
}

void router_epilogue_backward(
    Dtype dtype, void* hidden_rows, const void* context_row, const void* weight_row, const void* grad_row, int64_t rows,
    int64_t H, double eps, void* scratch, void* context_sum_row, void* normal_sum_row) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    T* hidden = static_cast<T*>(hidden_rows);
    const A* context = static_cast<const A*>(context_row);
    const A* weight = static_cast<const A*>(weight_row);
    const A* grad = static_cast<const A*>(grad_row);
    A* a = static_cast<A*>(scratch);
    A* context_sum = static_cast<A*>(context_sum_row);
    A* normal_sum = static_cast<A*>(normal_sum_row);
    A weight_total = 0;
#pragma omp simd reduction(+ : weight_total)
    for (int64_t h = 0; h < H; ++h) weight_total += weight[h];
    const A mean_weight = weight_total / static_cast<A>(H);
    for (int64_t i = 0; i < rows; ++i) {
      T* row = hidden + i * H;
      A mean, inverse_std, dot;
      activate(row, context, weight, H, eps, a, &mean, &inverse_std, &dot);
      const A mean_dot = dot * inverse_std / static_cast<A>(H), g = grad[i];
#pragma omp simd
      for (int64_t h = 0; h < H; ++h) {
        const A normal = (a[h] - mean) * inverse_std;
        const A grad_a = g * inverse_std * (weight[h] - mean_weight - normal * mean_dot);
        const A v = load(row[h]) + context[h];
        const A s = sigmoid(v);
        const A grad_v = grad_a * (s * (1 + v * (1 - s)));
        normal_sum[h] += g * normal;
        context_sum[h] += grad_v;
        store(row[h], grad_v);
      }
    }
  });
}

}  // namespace shiva::cpu::SHIVA_ISA
