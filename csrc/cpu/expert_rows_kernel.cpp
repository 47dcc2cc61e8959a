#include "cpu/expert_rows_kernel.h"

#include "cpu/scalar.h"

namespace shiva::cpu::SHIVA_ISA {
namespace {

constexpr int64_t kTile = 256;  // channels whose sums stay in the first cache

template <typename T>
void add_tile(
    const char* rows, int64_t stride, const int64_t* place, const acc_t<T>* weight, int64_t K, int64_t first,
    int64_t width, T* out) {
  using A = acc_t<T>;
  A sum[kTile] = {};
  for (int64_t j = 0; j < K; ++j) {
    if (place[j] < 0) continue;
    const T* row = reinterpret_cast<const T*>(rows + place[j] * stride) + first;
    const A w = weight != nullptr ? weight[j] : A(1);
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) sum[d] += w * load(row[d]);
  }
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) store(out[first + d], sum[d]);
}

}  // namespace

void add_placed_rows(
    Dtype dtype, const char* rows, int64_t stride, const int64_t* place, const void* weight, int64_t K, int64_t D,
    void* out_row) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* weights = static_cast<const acc_t<T>*>(weight);
    T* out = static_cast<T*>(out_row);
    for (int64_t first = 0; first < D; first += kTile)
      add_tile(rows, stride, place, weights, K, first, D - first < kTile ? D - first : kTile, out);
  });
}

void weighted_row_backward(
    Dtype dtype, const void* grad_values, const void* row_values, const void* weight, int64_t D, void* grad_row,
    void* grad_weight) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const T* grad = static_cast<const T*>(grad_values);
    const T* row = static_cast<const T*>(row_values);
    const A w = *static_cast<const A*>(weight);
    T* out = static_cast<T*>(grad_row);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) {
      store(out[d], w * load(grad[d]));
      sum += load(grad[d]) * load(row[d]);
    }
    *static_cast<A*>(grad_weight) = sum;
  });
}

}  // namespace shiva::cpu::SHIVA_ISA
