#include "cpu/scatter_mean_kernel.h"

#include <cstring>

#include "cpu/launch.h"

namespace shiva::cpu {
namespace {

// The tokens of each batch row sorted by group, in token order within one.
struct Groups {
  std::vector<int64_t> start;  // [B, M + 1]: where each group begins in its row of order; the last one is N
  std::vector<int64_t> order;  // [B, N]

  int64_t count(int64_t b, int64_t M, int64_t m) const { return start[b * (M + 1) + m + 1] - start[b * (M + 1) + m]; }
};

// position: int64 [B, N], contiguous, in [0, M).
Groups group_tokens(const Tensor& position, int64_t M) {
  const int64_t B = position.size(0), N = position.size(1);
  Groups groups = {
      std::vector<int64_t>(static_cast<size_t>(B * (M + 1))), std::vector<int64_t>(static_cast<size_t>(B * N))};
  std::vector<int64_t> next(static_cast<size_t>(M));
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* group = data<int64_t>(position) + b * N;
    int64_t* start = groups.start.data() + b * (M + 1);
    for (int64_t i = 0; i < N; ++i) ++start[group[i] + 1];
    for (int64_t m = 0; m < M; ++m) {
      next[m] = start[m];
      start[m + 1] += start[m];
    }
    for (int64_t i = 0; i < N; ++i) groups.order[b * N + next[group[i]]++] = i;
  }
  return groups;
}

// x [B, N, D], position [B, N] -> each group's mean [B, num_groups, D]
Tensor scatter_mean(const Tensor& x, const Tensor& position, int64_t num_groups) {
  const Tokens t = check_scatter_mean("scatter_mean", x, position, num_groups, kPlace);
  const int64_t B = t.B, N = t.N, D = t.D, M = t.k, row_bytes = t.row_bytes;
  Tensor out = new_empty(x, {B, M, D});
  const Tensor dense = with_dense_channels(x);
  const Rows rows = rows_of(dense);
  const Groups groups = group_tokens(t.index, M);
  parallel(B * M, (1 + ceil_div(N, M > 0 ? M : 1)) * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / M, m = i - b * M, count = groups.count(b, M, m);
      const int64_t* tokens = groups.order.data() + b * N + groups.start[b * (M + 1) + m];
      char* to = data<char>(out) + i * row_bytes;
      if (count > 1)
        SHIVA_CALL_KERNEL(mean_rows, t.dtype, rows.at(b, 0), rows.row_stride, tokens, count, D, to);
      else if (count == 1)
        std::memcpy(to, rows.at(b, *tokens), static_cast<size_t>(row_bytes));
      else
        std::memset(to, 0, static_cast<size_t>(row_bytes));
    }
  });
  return out;
}

// grad [B, M, D] -> each token's share of its group's gradient [B, N, D]
Tensor scatter_mean_backward(const Tensor& grad, const Tensor& position) {
  const Tokens t = check_scatter_mean_backward("scatter_mean_backward", grad, position, kPlace);
  const int64_t B = t.B, N = t.N, D = t.D, M = t.k, row_bytes = t.row_bytes;
  Tensor out = new_empty(grad, {B, N, D});
  const Tensor dense = with_dense_channels(grad);
  const Rows grads = rows_of(dense);
  const Groups groups = group_tokens(t.index, M);
  const int64_t* group = data<int64_t>(t.index);
  parallel(B * N, 2 * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / N, count = groups.count(b, M, group[i]);
      const char* row = grads.at(b, group[i]);
      char* to = data<char>(out) + i * row_bytes;
      if (count > 1)
        SHIVA_CALL_KERNEL(divide_row, t.dtype, row, count, D, to);
      else
        std::memcpy(to, row, static_cast<size_t>(row_bytes));
    }
  });
  return out;
}

}  // namespace
}  // namespace shiva::cpu

STABLE_TORCH_LIBRARY_IMPL(shiva, CPU, m) {
  m.impl("scatter_mean", TORCH_BOX(&shiva::cpu::scatter_mean));
  m.impl("scatter_mean_backward", TORCH_BOX(&shiva::cpu::scatter_mean_backward));
}
