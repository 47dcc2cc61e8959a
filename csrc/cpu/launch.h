// What every CPU launcher needs: argument checks, row views, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "contracts.h"
#include "core/dtype.h"
#include "core/index.h"

namespace shiva::cpu {

constexpr Place kPlace = Place::Cpu;

// Sums over tokens are taken over chunks of this many rows, then over the chunks: the same for any thread count.
constexpr int64_t kSumRows = 64;

// Token rows in memory, strides in bytes.
struct Rows {
  char* data;  // [B, N, D]
  int64_t batch_stride;
  int64_t row_stride;
  char* at(int64_t b, int64_t n) const { return data + offset2(b, batch_stride, n, row_stride); }
};
Rows rows_of(const Tensor& t);  // [B, N, D] or [N, D] (then the batch stride is 0)

// An uninitialised contiguous CPU tensor of like's dtype, or another. Half a microsecond less than torch::stable's,
// which looks its op up by name.
Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes);
Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type);

// position[b, n] = place of token n in index row b, or -1 where it is absent. index is int64 [B, k], contiguous; a
// token that a row names twice is an error.
std::vector<int64_t> inverse_index(const char* op, const Tensor& index, int64_t n);

// base [B, N, D] with the rows kept [B, k] (int64, contiguous) replaced by src [B, k, D]; every row is written once.
Tensor replace_rows(const char* op, const Tensor& base, const Tensor& kept, const Tensor& src);

// x [B, N, D] -> x with the rows kept set to zero [B, N, D], the rows kept of x [B, k, D].
std::tuple<Tensor, Tensor> split_rows(const char* op, const Tensor& x, const Tensor& kept);

// Runs body(begin, end) over [0, count) on torch's threads; `cost` is the rough number of bytes one item touches.
template <typename Body>
void parallel(int64_t count, int64_t cost, const Body& body) {
  if (count <= 0) return;
  const int64_t grain = ceil_div(int64_t(1) << 15, cost > 0 ? cost : 1);
  torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace shiva::cpu
