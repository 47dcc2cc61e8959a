#include "cuda/counterfactual_scatter_kernel.cuh"
#include "cuda/launch.h"
#include "cuda/token_scatter_kernel.cuh"

namespace shiva::cuda {
namespace {

// base [B, N, D] with rows kept [B, k] replaced by src [B, k, D]; inclusion [B, N] and update [B, N, D] only matter
// in the backward.
Tensor counterfactual_scatter(
    const Tensor& base, const Tensor& kept, const Tensor& src, const Tensor& inclusion, const Tensor& update,
    double kappa) {
  constexpr char op[] = "counterfactual_scatter";
  const Tokens t = check_counterfactual_scatter(op, base, kept, src, inclusion, update, kappa, kPlace);
  const int64_t B = t.B, N = t.N;
  const Guard guard(op, base, kept, src, inclusion, update);
  const Tensor dense = with_dense_channels(base), dense_src = with_dense_channels(src);
  const Tensor position = torch::stable::new_empty(base, {B, N}, ScalarType::Long);
  Tensor out = torch::stable::new_empty(base, {B, N, t.D});
  if (out.numel() == 0) return out;
  const Stream stream = current_stream(base);
  invert_index(data<int64_t>(t.index), B, t.k, N, data<int64_t>(position), stream);
  replace_rows(rows_of(dense), rows_of(dense_src), data<int64_t>(position), B, N, t.row_bytes, data<char>(out), stream);
  check_launch(op);
  return out;
}

// -> grad_base [B, N, D] (zero at kept), grad_src [B, k, D], grad_inclusion [B, N]
std::tuple<Tensor, Tensor, Tensor> counterfactual_scatter_backward(
    const Tensor& grad, const Tensor& base, const Tensor& kept, const Tensor& src, const Tensor& update, double kappa) {
  constexpr char op[] = "counterfactual_scatter_backward";
  const Tokens t = check_counterfactual_scatter_backward(op, grad, base, kept, src, update, kappa, kPlace);
  const int64_t B = t.B, N = t.N, k = t.k;
  const Guard guard(op, grad, base, kept, src, update);
  const Tensor dense_grad = with_dense_channels(grad), dense_base = with_dense_channels(base);
  const Tensor dense_src = with_dense_channels(src), dense_update = with_dense_channels(update);
  const Tensor position = torch::stable::new_empty(base, {B, N}, ScalarType::Long);
  Tensor grad_base = torch::stable::new_empty(base, {B, N, t.D}),
         grad_src = torch::stable::new_empty(base, {B, k, t.D});
  Tensor grad_inclusion = torch::stable::new_empty(base, {B, N}, accumulate_type(base));
  if (B * N == 0) return {grad_base, grad_src, grad_inclusion};
  const Stream stream = current_stream(base);
  invert_index(data<int64_t>(t.index), B, k, N, data<int64_t>(position), stream);
  const Rows grads = rows_of(dense_grad), bases = rows_of(dense_base);
  const Rows sources = rows_of(dense_src), updates = rows_of(dense_update);
  const uint64_t alignment =
      common_alignment(t.row_bytes, grads, bases, sources, updates, rows_of(grad_base), rows_of(grad_src));
  dispatch(t.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    dispatch_pack<T>(alignment, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      SHIVA_LAUNCH(
          counterfactual_scatter_backward_kernel<P>, row_blocks(B * N), kRowThreads, 0, stream, grads, bases, sources,
          updates, data<int64_t>(position), B * N, N, k, t.D / P::size, static_cast<acc_t<T>>(kappa),
          data<P>(grad_base), data<P>(grad_src), data<acc_t<T>>(grad_inclusion));
    });
  });
  check_launch(op);
  return {grad_base, grad_src, grad_inclusion};
}

}  // namespace
}  // namespace shiva::cuda

SHIVA_REGISTER(m) {
  m.impl("counterfactual_scatter", TORCH_BOX(&shiva::cuda::counterfactual_scatter));
  m.impl("counterfactual_scatter_backward", TORCH_BOX(&shiva::cuda::counterfactual_scatter_backward));
}
