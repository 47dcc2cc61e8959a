// expert_dispatch and expert_combine: rows to their experts and back.
#include <cstring>

#include "cpu/expert_rows_kernel.h"
#include "cpu/launch.h"

namespace shiva::cpu {
namespace {

constexpr int64_t kNone = -1;

// x [T, D], experts [T, K] -> rows [R, D] sorted by expert, place [T, K], ends [E]
std::tuple<Tensor, Tensor, Tensor> expert_dispatch(
    const Tensor& x, const Tensor& experts, int64_t num_experts, int64_t capacity) {
  const Routed t = check_expert_dispatch("expert_dispatch", x, experts, num_experts, capacity, kPlace);
  const int64_t E = num_experts, choices = t.T * t.K, row_bytes = t.row_bytes;
  Tensor rows = new_empty(x, {t.R, t.D}), place = new_empty(x, {t.T, t.K}, ScalarType::Long);
  Tensor ends = new_empty(x, {E}, ScalarType::Int);
  const int64_t* expert = data<int64_t>(t.index);

  std::vector<int64_t> next(static_cast<size_t>(E)), last(static_cast<size_t>(E));  // rows of each expert
  for (int64_t c = 0; c < choices; ++c) ++last[expert[c]];
  int64_t end = 0;
  for (int64_t e = 0; e < E; ++e) {
    next[e] = capacity > 0 ? e * capacity : end;
    end += last[e];
    data<int32_t>(ends)[e] = static_cast<int32_t>(end);
    last[e] = capacity > 0 ? (e + 1) * capacity : end;
  }
  std::vector<int64_t> source(static_cast<size_t>(t.R), kNone);  // of each row, the choice
  for (int64_t c = 0; c < choices; ++c) {
    int64_t& row = next[expert[c]];
    const bool fits = row < last[expert[c]];
    data<int64_t>(place)[c] = fits ? row : kNone;
    if (fits) source[row++] = c;
  }

  const Tensor dense = with_dense_channels(x);
  const Rows from = rows_of(dense);
  parallel(t.R, 2 * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      char* to = data<char>(rows) + row * row_bytes;
      if (source[row] == kNone)
        std::memset(to, 0, static_cast<size_t>(row_bytes));
      else
        std::memcpy(to, from.at(0, source[row] / t.K), static_cast<size_t>(row_bytes));
    }
  });
  return {rows, place, ends};
}

// The weighted sum of each token's rows [T, D]; weight [T, K] in the accumulation dtype, or null.
Tensor add_rows(const Tensor& rows, const Routed& t, const char* weight, int64_t weight_bytes) {
  Tensor out = new_empty(rows, {t.T, t.D});
  const Tensor dense = with_dense_channels(rows);
  const Rows from = rows_of(dense);
  parallel(t.T, (t.K + 1) * t.row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      SHIVA_CALL_KERNEL(
          add_placed_rows, t.dtype, from.data, from.row_stride, data<int64_t>(t.index) + i * t.K,
          weight != nullptr ? weight + i * t.K * weight_bytes : nullptr, t.K, t.D, data<char>(out) + i * t.row_bytes);
  });
  return out;
}

// grad [R, D] -> the sum of each token's rows [T, D]
Tensor expert_dispatch_backward(const Tensor& grad, const Tensor& place) {
  return add_rows(grad, check_expert_dispatch_backward("expert_dispatch_backward", grad, place, kPlace), nullptr, 0);
}

Tensor expert_combine(const Tensor& rows, const Tensor& place, const Tensor& weight) {
  const Routed t = check_expert_combine("expert_combine", rows, place, weight, kPlace);
  return add_rows(rows, t, data<char>(t.weight), static_cast<int64_t>(t.weight.element_size()));
}

// grad [T, D] -> grad_rows [R, D], grad_weight [T, K]
std::tuple<Tensor, Tensor> expert_combine_backward(
    const Tensor& grad, const Tensor& rows, const Tensor& place, const Tensor& weight) {
  constexpr char op[] = "expert_combine_backward";
  const Routed t = check_expert_combine_backward(op, grad, rows, place, weight, kPlace);
  const int64_t choices = t.T * t.K, row_bytes = t.row_bytes;
  const int64_t weight_bytes = static_cast<int64_t>(t.weight.element_size());
  Tensor grad_rows = new_empty(rows, {t.R, t.D}), grad_weight = new_empty(t.weight, {t.T, t.K});
  const char* weights = data<char>(t.weight);
  char* grad_weights = data<char>(grad_weight);

  std::vector<int64_t> source(static_cast<size_t>(t.R), kNone);  // of each row, the choice
  for (int64_t c = 0; c < choices; ++c) {
    const int64_t row = data<int64_t>(t.index)[c];
    if (row == kNone) {
      std::memset(grad_weights + c * weight_bytes, 0, static_cast<size_t>(weight_bytes));
      continue;
    }
    SHIVA_CHECK(
        source[row] == kNone, op, "place names row ", row, " twice, in rows ", source[row] / t.K, " and ", c / t.K,
        "; every row belongs to one choice");
    source[row] = c;
  }

  const Tensor dense = with_dense_channels(rows), dense_grad = with_dense_channels(grad);
  const Rows from = rows_of(dense), grads = rows_of(dense_grad);
  parallel(t.R, 3 * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      char* to = data<char>(grad_rows) + row * row_bytes;
      const int64_t c = source[row];
      if (c == kNone)
        std::memset(to, 0, static_cast<size_t>(row_bytes));
      else
        SHIVA_CALL_KERNEL(
            weighted_row_backward, t.dtype, grads.at(0, c / t.K), from.at(0, row), weights + c * weight_bytes, t.D, to,
            grad_weights + c * weight_bytes);
    }
  });
  return {grad_rows, grad_weight};
}

}  // namespace
}  // namespace shiva::cpu

STABLE_TORCH_LIBRARY_IMPL(shiva, CPU, m) {
  m.impl("expert_dispatch", TORCH_BOX(&shiva::cpu::expert_dispatch));
  m.impl("expert_dispatch_backward", TORCH_BOX(&shiva::cpu::expert_dispatch_backward));
  m.impl("expert_combine", TORCH_BOX(&shiva::cpu::expert_combine));
  m.impl("expert_combine_backward", TORCH_BOX(&shiva::cpu::expert_combine_backward));
}
