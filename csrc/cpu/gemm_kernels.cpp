#include "cpu/gemm_kernels.h"

#include "cpu/scalar.h"

namespace shiva::cpu::SHIVA_ISA {
namespace {

constexpr int64_t kRows = 4;      // rows that share one read of b
constexpr int64_t kColumns = 64;  // columns whose sums stay in registers
constexpr int64_t kDepth = 128;   // of a sum, before its columns of b leave the cache

// out[r, c] = (add: out[r, c] +) sum over l of a(r, l) * b[l, c] for r < rows <= kRows and c < columns <= kColumns.
template <typename T, typename A>
void tile(
    const A& a, const T* b, int64_t b_stride, int64_t rows, int64_t columns, int64_t L, bool add, T* out,
    int64_t stride) {
  T sum[kRows][kColumns] = {};
  for (int64_t r = 0; r < rows && add; ++r)
    for (int64_t c = 0; c < columns; ++c) sum[r][c] = out[r * stride + c];
  if (rows == kRows && columns == kColumns) {
    for (int64_t l = 0; l < L; ++l)
      for (int64_t r = 0; r < kRows; ++r) {
        const T value = a(r, l);
#pragma omp simd
        for (int64_t c = 0; c < kColumns; ++c) sum[r][c] += value * b[l * b_stride + c];
      }
  } else {
    for (int64_t l = 0; l < L; ++l)
      for (int64_t r = 0; r < rows; ++r) {
        const T value = a(r, l);
        for (int64_t c = 0; c < columns; ++c) sum[r][c] += value * b[l * b_stride + c];
      }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[r * stride + c] = sum[r][c];
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
void rows_product(const T* a, const T* b, int64_t begin, int64_t end, int64_t L, int64_t N, T* out) {
  const auto at = [&](int64_t i, int64_t n) {
    tile(
        [&](int64_t r, int64_t l) { return a[(i + r) * L + l]; }, b + n, N, smaller(kRows, end - i),
        smaller(kColumns, N - n), L, false, out + i * N + n, N);
  };
  if (L <= kDepth) {  // then the columns of b stay in the cache for all rows
    for (int64_t n = 0; n < N; n += kColumns)
      for (int64_t i = begin; i < end; i += kRows) at(i, n);
  } else {
    for (int64_t i = begin; i < end; i += kRows)
      for (int64_t n = 0; n < N; n += kColumns) at(i, n);
  }
}

template <typename T>
void columns_product(const T* a, const T* b, int64_t begin, int64_t end, int64_t L, int64_t M, int64_t N, T* out) {
  for (int64_t n = begin; n < end; n += kColumns)
    for (int64_t first = 0; first < L || first == 0; first += kDepth)
      for (int64_t m = 0; m < M; m += kRows)
        tile(
            [&](int64_t r, int64_t l) { return a[(first + l) * M + m + r]; }, b + first * N + n, N,
            smaller(kRows, M - m), smaller(kColumns, end - n), smaller(kDepth, L - first), first > 0, out + m * N + n,
            N);
}

}  // namespace

void matmul_rows(
    Dtype dtype, const void* a, const void* b, int64_t begin, int64_t end, int64_t L, int64_t N, void* out) {
  if (dtype == Dtype::Float64)
    rows_product(
        static_cast<const double*>(a), static_cast<const double*>(b), begin, end, L, N, static_cast<double*>(out));
  else
    rows_product(
        static_cast<const float*>(a), static_cast<const float*>(b), begin, end, L, N, static_cast<float*>(out));
}

void matmul_transposed_columns(
    Dtype dtype, const void* a, const void* b, int64_t begin, int64_t end, int64_t L, int64_t M, int64_t N, void* out) {
  if (dtype == Dtype::Float64)
    columns_product(
        static_cast<const double*>(a), static_cast<const double*>(b), begin, end, L, M, N, static_cast<double*>(out));
  else
    columns_product(
        static_cast<const float*>(a), static_cast<const float*>(b), begin, end, L, M, N, static_cast<float*>(out));
}

}  // namespace shiva::cpu::SHIVA_ISA
