#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace shiva::cpu {
// Float32 and float64 products whose sums run in one fixed order, whatever the number of threads. Row-major.

// For rows [begin, end): out[i, n] = sum over l of a[i, l] * b[l, n], with a [M, L], b [L, n_cols], out [M, n_cols].
SHIVA_DECLARE_KERNEL(
    void matmul_rows(
        Dtype dtype, const void* a, const void* b, int64_t begin, int64_t end, int64_t L, int64_t n_cols, void* out))
// For columns [begin, end): out[m, n] = sum over l of a[l, m] * b[l, n], with a [L, M], b [L, n_cols], out [M, n_cols].
SHIVA_DECLARE_KERNEL(
    void matmul_transposed_columns(
        Dtype dtype, const void* a, const void* b, int64_t begin, int64_t end, int64_t L, int64_t M, int64_t n_cols,
        void* out))
}  // namespace shiva::cpu
