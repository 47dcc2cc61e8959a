#include "cpu/gate_kernels.h"
#include "cpu/launch.h"

namespace shiva::cpu {
namespace {

// base [B, N, D] with rows kept [B, k] replaced by src [B, k, D]; inclusion [B, N] and update [B, N, D] only matter
// in the backward.
Tensor counterfactual_scatter(
    const Tensor& base, const Tensor& kept, const Tensor& src, const Tensor& inclusion, const Tensor& update,
    double kappa) {
  const Tokens t =
      check_counterfactual_scatter("counterfactual_scatter", base, kept, src, inclusion, update, kappa, kPlace);
  return replace_rows("counterfactual_scatter", base, t.index, src);
}

// -> grad_base [B, N, D] (zero at kept), grad_src [B, k, D], grad_inclusion [B, N]
std::tuple<Tensor, Tensor, Tensor> counterfactual_scatter_backward(
    const Tensor& grad, const Tensor& base, const Tensor& kept, const Tensor& src, const Tensor& update, double kappa) {
  const Tokens t = check_counterfactual_scatter_backward(
      "counterfactual_scatter_backward", grad, base, kept, src, update, kappa, kPlace);
  const int64_t N = t.N;
  Tensor grad_inclusion = new_empty(base, {t.B, N}, accumulate_type(base));
  const Tensor dense_grad = with_dense_channels(grad), dense_base = with_dense_channels(base);
  const Tensor dense_src = with_dense_channels(src), dense_update = with_dense_channels(update);
  const Rows grads = rows_of(dense_grad), bases = rows_of(dense_base);
  const Rows sources = rows_of(dense_src), updates = rows_of(dense_update);
  const std::vector<int64_t> position = inverse_index("counterfactual_scatter_backward", t.index, N);
  const int64_t sum_bytes = static_cast<int64_t>(grad_inclusion.element_size());
  parallel(t.B * N, 3 * t.row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / N, token = i - b * N;
      SHIVA_CALL_KERNEL(
          counterfactual_row, t.dtype, grads.at(b, token), bases.at(b, token),
          position[i] >= 0 ? sources.at(b, position[i]) : nullptr, updates.at(b, token), t.D, kappa,
          data<char>(grad_inclusion) + i * sum_bytes);
    }
  });
  auto [grad_base, grad_src] = split_rows("counterfactual_scatter_backward", dense_grad, t.index);
  return {grad_base, grad_src, grad_inclusion};
}

}  // namespace
}  // namespace shiva::cpu

STABLE_TORCH_LIBRARY_IMPL(shiva, CPU, m) {
  m.impl("counterfactual_scatter", TORCH_BOX(&shiva::cpu::counterfactual_scatter));
  m.impl("counterfactual_scatter_backward", TORCH_BOX(&shiva::cpu::counterfactual_scatter_backward));
}
