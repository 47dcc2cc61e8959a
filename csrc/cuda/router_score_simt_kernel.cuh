// The product without tensor cores: float32, float64, and half precisions whose rows are not 16-byte aligned.
#pragma once

#include "cuda/router_score_kernel.cuh"

namespace shiva::cuda {

// 64 x 64, 8 x 4 of it to a thread. Contract: MmaProduct's, without any alignment.
template <typename Element, bool kTransposeA = false, bool kTransposeB = false>
struct SimtProduct {
  using T = Element;
  using A = acc_t<T>;
  static constexpr int kRows = 64, kColumns = 64;
  static constexpr int kThreadRows = 8, kThreadColumns = 4;
  static constexpr int kThreadsAcross = kColumns / kThreadColumns;
  static constexpr int kThreads = kRows / kThreadRows * kThreadsAcross;
  static constexpr int kStride = kColumns + 8;
  static constexpr int kDepth = 16;  // of a stage, which is [kDepth][kPitch] of a and as much of b
  static constexpr int kPitch = 64 + 4;
  static constexpr int kBytes = kRows * kStride * static_cast<int>(sizeof(A));
  static_assert(2 * kDepth * kPitch * static_cast<int>(sizeof(A)) <= kBytes);

  // stage[k][outer] = from[outer, k]; from[k, outer] if transposed. Consecutive threads read consecutive elements.
  template <bool kTranspose>
  static SHIVA_DEVICE void fill(A* stage, const MatrixView<T>& from, int64_t first_k) {
    for (int i = static_cast<int>(threadIdx.x); i < 64 * kDepth; i += kThreads) {
      const int outer = kTranspose ? i % 64 : i / kDepth, k = kTranspose ? i / 64 : i % kDepth;
      const int64_t row = kTranspose ? first_k + k : outer, column = kTranspose ? outer : first_k + k;
      const bool valid = row < from.rows && column < from.columns;
      stage[k * kPitch + outer] = valid ? load(from.data[row * from.stride + column]) : A(0);
    }
  }

  static SHIVA_DEVICE A* run(void* memory, const MatrixView<T>& a, const MatrixView<T>& b, int64_t depth) {
    A *const stage_a = static_cast<A*>(memory), *const stage_b = stage_a + kDepth * kPitch;
    const int row = static_cast<int>(threadIdx.x) / kThreadsAcross * kThreadRows;
    const int column = static_cast<int>(threadIdx.x) % kThreadsAcross * kThreadColumns;
    constexpr int kGroup = Vec<A>::size;
    A sum[kThreadRows][kThreadColumns] = {};
    for (int64_t first_k = 0; first_k < depth; first_k += kDepth) {
      fill<kTransposeA>(stage_a, a, first_k);
      fill<kTransposeB>(stage_b, b, first_k);
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < kDepth; ++k) {
        Vec<A> from_a[kThreadRows / kGroup], from_b[kThreadColumns / kGroup];
#pragma unroll
        for (int i = 0; i < kThreadRows / kGroup; ++i) from_a[i] = load_vec(stage_a + k * kPitch + row + i * kGroup);
#pragma unroll
        for (int j = 0; j < kThreadColumns / kGroup; ++j)
          from_b[j] = load_vec(stage_b + k * kPitch + column + j * kGroup);
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
          for (int j = 0; j < kThreadColumns; ++j)
            sum[i][j] += from_a[i / kGroup].at[i % kGroup] * from_b[j / kGroup].at[j % kGroup];
      }
      __syncthreads();
    }
    A* const result = static_cast<A*>(memory);
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kThreadColumns; ++j) result[(row + i) * kStride + column + j] = sum[i][j];
    __syncthreads();
    return result;
  }
};

}  // namespace shiva::cuda
