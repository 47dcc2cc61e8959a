#include <cstring>

#include "cpu/launch.h"

namespace shiva::cpu {
namespace {

void write_rows(const Rows& to, const Tensor& kept, const Tensor& src, int64_t row_bytes) {
  const int64_t k = kept.size(1);
  const Tensor dense = with_dense_channels(src);
  const Rows from = rows_of(dense);
  const int64_t* tokens = data<int64_t>(kept);
  parallel(kept.numel(), 2 * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(to.at(i / k, tokens[i]), from.at(i / k, i % k), static_cast<size_t>(row_bytes));
  });
}

// base [B, N, D] with the rows index [B, k] replaced by src [B, k, D]
Tensor token_scatter(const Tensor& base, const Tensor& index, const Tensor& src) {
  constexpr char op[] = "token_scatter";
  return replace_rows(op, base, check_token_scatter(op, base, index, src, kPlace).index, src);
}

void token_scatter_(Tensor base, const Tensor& index, const Tensor& src) {
  constexpr char op[] = "token_scatter_";
  const Tokens t = check_token_scatter(op, base, index, src, kPlace);
  for (int64_t d = 0; d < 3; ++d)
    SHIVA_CHECK(
        base.size(d) <= 1 || base.stride(d) != 0, op,
        "base is expanded, its rows share memory; call it on base.clone()");
  inverse_index(op, t.index, t.N);  // two threads would write one row
  const Tensor dense = with_dense_channels(base);
  write_rows(rows_of(dense), t.index, apart_from(src, base), t.row_bytes);
  if (dense.data_ptr() != base.data_ptr()) torch::stable::copy_(base, dense);
}

// -> grad with the rows index set to zero [B, N, D], grad gathered at index [B, k, D]
std::tuple<Tensor, Tensor> token_scatter_backward(const Tensor& grad, const Tensor& index) {
  constexpr char op[] = "token_scatter_backward";
  return split_rows(op, grad, check_token_scatter_backward(op, grad, index, kPlace).index);
}

}  // namespace
}  // namespace shiva::cpu

STABLE_TORCH_LIBRARY_IMPL(shiva, CPU, m) {
  m.impl("token_scatter", TORCH_BOX(&shiva::cpu::token_scatter));
  m.impl("token_scatter_", TORCH_BOX(&shiva::cpu::token_scatter_));
  m.impl("token_scatter_backward", TORCH_BOX(&shiva::cpu::token_scatter_backward));
}
