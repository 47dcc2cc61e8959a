// expert_dispatch and expert_combine: rows to their experts and back.
#include "cuda/expert_rows_kernel.cuh"
#include "cuda/launch.h"

namespace shiva::cuda {
namespace {

// x [T, D], experts [T, K] -> rows [R, D] sorted by expert, place [T, K], ends [E]
std::tuple<Tensor, Tensor, Tensor> expert_dispatch(
    const Tensor& x, const Tensor& experts, int64_t num_experts, int64_t capacity) {
  constexpr char op[] = "expert_dispatch";
  const Routed t = check_expert_dispatch(op, x, experts, num_experts, capacity, kPlace);
  const Guard guard(op, x, experts);
  const Tensor dense = with_dense_channels(x);
  Tensor rows = torch::stable::new_empty(x, {t.R, t.D});
  Tensor place = torch::stable::new_empty(x, {t.T, t.K}, ScalarType::Long);
  Tensor ends = torch::stable::new_empty(x, {num_experts}, ScalarType::Int);
  const Stream stream = current_stream(x);
  const int64_t choices = t.T * t.K, turns = ceil_div(choices, kChoices), E = num_experts;
  const int64_t run = ceil_div(turns > 0 ? turns : 1, kMostDispatchBlocks) * kChoices;
  const unsigned blocks = static_cast<unsigned>(choices > 0 ? ceil_div(choices, run) : 1);
  const Tensor counts = torch::stable::new_empty(x, {blocks, E}, ScalarType::Int);
  SHIVA_LAUNCH(
      expert_count_kernel, blocks, kRowThreads, 0, stream, data<int64_t>(t.index), choices, run, static_cast<int>(E),
      data<int>(counts));
  const Rows from = rows_of(dense);
  dispatch_access(common_alignment(t.row_bytes, from, rows_of(rows)), [&](auto* type) {
    using Access = std::remove_pointer_t<decltype(type)>;
    SHIVA_LAUNCH(
        expert_dispatch_kernel<Access>, blocks, kRowThreads, 0, stream, from, data<int64_t>(t.index), data<int>(counts),
        choices, run, static_cast<int>(E), t.K, capacity, t.row_bytes / static_cast<int64_t>(sizeof(Access)),
        data<int64_t>(place), data<int>(ends), data<Access>(rows));
  });
  check_launch(op);
  return {rows, place, ends};
}

// The weighted sum of each token's rows [T, D]; weight [T, K] in the accumulation dtype, or null.
Tensor add_rows(const char* op, const Tensor& rows, const Routed& t, const Tensor* weight) {
  const Tensor dense = with_dense_channels(rows);
  Tensor out = torch::stable::new_empty(rows, {t.T, t.D});
  if (out.numel() == 0) return out;
  const Stream stream = current_stream(rows);
  const Rows from = rows_of(dense);
  dispatch(t.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    dispatch_pack<T>(common_alignment(t.row_bytes, from, rows_of(out)), [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      SHIVA_LAUNCH(
          expert_combine_kernel<P>, row_blocks(t.T), kRowThreads, 0, stream, from, data<int64_t>(t.index),
          weight != nullptr ? data<acc_t<T>>(*weight) : nullptr, t.T, t.K, t.D / P::size, data<P>(out));
    });
  });
  check_launch(op);
  return out;
}

// grad [R, D] -> the sum of each token's rows [T, D]
Tensor expert_dispatch_backward(const Tensor& grad, const Tensor& place) {
  constexpr char op[] = "expert_dispatch_backward";
  const Routed t = check_expert_dispatch_backward(op, grad, place, kPlace);
  const Guard guard(op, grad, place);
  return add_rows(op, grad, t, nullptr);
}

Tensor expert_combine(const Tensor& rows, const Tensor& place, const Tensor& weight) {
  constexpr char op[] = "expert_combine";
  const Routed t = check_expert_combine(op, rows, place, weight, kPlace);
  const Guard guard(op, rows, place, weight);
  return add_rows(op, rows, t, &t.weight);
}

// grad [T, D] -> grad_rows [R, D], grad_weight [T, K]
std::tuple<Tensor, Tensor> expert_combine_backward(
    const Tensor& grad, const Tensor& rows, const Tensor& place, const Tensor& weight) {
  constexpr char op[] = "expert_combine_backward";
  const Routed t = check_expert_combine_backward(op, grad, rows, place, weight, kPlace);
  const Guard guard(op, rows, grad, place, weight);
  const Tensor dense = with_dense_channels(rows), dense_grad = with_dense_channels(grad);
  Tensor grad_rows = torch::stable::new_empty(rows, {t.R, t.D});
  Tensor grad_weight = torch::stable::new_empty(rows, {t.T, t.K}, accumulate_type(rows));
  const int64_t choices = t.T * t.K;
  const Stream stream = current_stream(rows);
  const Tensor source = torch::stable::new_zeros(rows, {t.R}, ScalarType::Int);
  const Rows from = rows_of(dense), grads = rows_of(dense_grad);
  dispatch(t.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    if (choices > 0)
      SHIVA_LAUNCH(
          expert_source_kernel<acc_t<T>>, grid_size(op, ceil_div(choices, kRowThreads)), kRowThreads, 0, stream,
          data<int64_t>(t.index), choices, data<int>(source), data<acc_t<T>>(grad_weight));
    if (t.R == 0) return;
    dispatch_pack<T>(common_alignment(t.row_bytes, from, grads, rows_of(grad_rows)), [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      SHIVA_LAUNCH(
          expert_combine_backward_kernel<P>, row_blocks(t.R), kRowThreads, 0, stream, grads, from, data<int>(source),
          data<acc_t<T>>(t.weight), t.R, t.K, t.D / P::size, data<P>(grad_rows), data<acc_t<T>>(grad_weight));
    });
  });
  check_launch(op);
  return {grad_rows, grad_weight};
}

}  // namespace
}  // namespace shiva::cuda

SHIVA_REGISTER(m) {
  m.impl("expert_dispatch", TORCH_BOX(&shiva::cuda::expert_dispatch));
  m.impl("expert_dispatch_backward", TORCH_BOX(&shiva::cuda::expert_dispatch_backward));
  m.impl("expert_combine", TORCH_BOX(&shiva::cuda::expert_combine));
  m.impl("expert_combine_backward", TORCH_BOX(&shiva::cuda::expert_combine_backward));
}
