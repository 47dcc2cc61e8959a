#include "cpu/scatter_mean_kernel.h"

#include "cpu/scalar.h"

namespace shiva::cpu::SHIVA_ISA {
namespace {

constexpr int64_t kTile = 64;  // channels whose sums stay in registers

// Channels [first, first + width) of the mean; width is a constant but for the last tile.
template <typename T>
inline __attribute__((always_inline)) void mean_tile(
    const char* x, int64_t stride, const int64_t* tokens, int64_t count, int64_t first, int64_t width, T* out) {
  using A = acc_t<T>;
  A sum[kTile];
  const auto row = [&](int64_t j) { return reinterpret_cast<const T*>(x + tokens[j] * stride) + first; };
  const T* from = row(0);
  for (int64_t d = 0; d < width; ++d) sum[d] = load(from[d]);
  for (int64_t j = 1; j < count; ++j) {
    from = row(j);
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) sum[d] += load(from[d]);
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
    int64_t first = 0;
    for (; first + kTile <= D; first += kTile) mean_tile<T>(x, stride, tokens, count, first, kTile, out);
    if (first < D) mean_tile<T>(x, stride, tokens, count, first, D - first, out);
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
