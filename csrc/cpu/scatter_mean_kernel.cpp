#include "cpu/scatter_mean_kernel.h"

#include "cpu/scalar.h"

namespace shiva::cpu::SHIVA_ISA {
namespace {

constexpr int64_t kTile = 256;  // channels whose sums stay in the first cache

// Channels [first, first + width) of the mean. Four rows a turn, so that the sums are seldom written.
template <typename T>
void mean_tile(
    const char* x, int64_t stride, const int64_t* tokens, int64_t count, int64_t first, int64_t width, T* out) {
  using A = acc_t<T>;
  A sum[kTile];
  const auto row = [&](int64_t j) { return reinterpret_cast<const T*>(x + tokens[j] * stride) + first; };
  const T* a = row(0);
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) sum[d] = load(a[d]);
  int64_t j = 1;
  for (; j + 4 <= count; j += 4) {
    a = row(j);
    const T *b = row(j + 1), *c = row(j + 2), *e = row(j + 3);
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) sum[d] = (((sum[d] + load(a[d])) + load(b[d])) + load(c[d])) + load(e[d]);
  }
  for (; j < count; ++j) {
    a = row(j);
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) sum[d] += load(a[d]);
  }
  const A share = A(1) / static_cast<A>(count);
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) store(out[first + d], sum[d] * share);
}

}  // namespace

void mean_rows(
    Dtype dtype, const char* x, int64_t stride, const int64_t* tokens, int64_t count, int64_t D, void* out_row) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* out = static_cast<T*>(out_row);
    for (int64_t first = 0; first < D; first += kTile)
      mean_tile(x, stride, tokens, count, first, D - first < kTile ? D - first : kTile, out);
  });
}

void divide_row(Dtype dtype, const void* row, int64_t count, int64_t D, void* out_row) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(row);
    T* out = static_cast<T*>(out_row);
    const acc_t<T> share = acc_t<T>(1) / static_cast<acc_t<T>>(count);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) store(out[d], load(from[d]) * share);
  });
}

}  // namespace shiva::cpu::SHIVA_ISA
