// Every op's schema. Shapes: B batch rows, N tokens, D channels, k kept tokens, H router width; for experts T tokens of
// all batch rows, K experts a token, E experts, R rows.
// Semantics: shiva_ext/reference.py. Autograd, fake kernels and autocast: shiva_ext/_registrations.py.
#pragma once

#include <torch/csrc/stable/library.h>

namespace shiva {

inline void define_ops(torch::stable::detail::StableLibrary& m) {
  // The k best of scores [B, N] and the rest, int64 [B, k] and [B, N - k], both ascending; ties keep the smaller index.
  m.def("topk_select(Tensor scores, SymInt k) -> (Tensor kept, Tensor rejected)");

  // 1 + sum over j != i of sigmoid((s_j - s_i) / tau) for scores [B, N], in O(N) memory.
  m.def("soft_rank(Tensor scores, float tau) -> Tensor");
  m.def("soft_rank_backward(Tensor grad, Tensor scores, float tau) -> Tensor");

  // Rows index [B, k] of x [B, N, D], or of x [N, D] shared by the batch.
  m.def("token_gather(Tensor x, Tensor index) -> Tensor");
  m.def("token_gather_backward(Tensor grad, Tensor index, SymInt n, bool broadcast) -> Tensor");

  // base [B, N, D] with the rows index [B, k] replaced by src [B, k, D].
  m.def("token_scatter(Tensor base, Tensor index, Tensor src) -> Tensor");
  m.def("token_scatter_(Tensor(a!) base, Tensor index, Tensor src) -> ()");
  m.def("token_scatter_backward(Tensor grad, Tensor index) -> (Tensor grad_base, Tensor grad_src)");

  // The residual straight-through estimator: gathers kept rows; its backward gives inclusion its gradient.
  m.def("residual_gate(Tensor x, Tensor inclusion, Tensor kept) -> (Tensor selected, Tensor base)");
  m.def(
      "residual_gate_backward(Tensor grad_selected, Tensor grad_base, Tensor x, Tensor kept) "
      "-> (Tensor grad_x, Tensor grad_inclusion)");

  // The counterfactual estimator: scatters kept rows; its backward values what processing each token changes.
  m.def(
      "counterfactual_scatter(Tensor base, Tensor kept, Tensor src, Tensor inclusion, Tensor update, float kappa) "
      "-> Tensor");
  m.def(
      "counterfactual_scatter_backward(Tensor grad, Tensor base, Tensor kept, Tensor src, Tensor update, float kappa) "
      "-> (Tensor grad_base, Tensor grad_src, Tensor grad_inclusion)");

  // <LayerNorm(SiLU(x w_in^T + context)), w_out> for x [B, N, D], context [B, H].
  m.def(
      "router_score(Tensor x, Tensor context, Tensor w_in, Tensor ln_weight, Tensor ln_bias, Tensor w_out, float eps) "
      "-> Tensor");
  // The same, and x w_in^T [B, N, H] for its backward, which then need not compute it again. The CUDA kernels keep
  // none: [0] there.
  m.def(
      "router_score_and_projection(Tensor x, Tensor context, Tensor w_in, Tensor ln_weight, Tensor ln_bias, "
      "Tensor w_out, float eps) -> (Tensor score, Tensor projection)");
  m.def(
      "router_score_backward(Tensor grad, Tensor x, Tensor context, Tensor w_in, Tensor ln_weight, Tensor ln_bias, "
      "Tensor w_out, float eps, Tensor? projection=None) -> (Tensor grad_x, Tensor grad_context, Tensor grad_w_in, "
      "Tensor grad_ln_weight, "
      "Tensor grad_ln_bias, Tensor grad_w_out)");

  // LayerNorm of gathered rows, * (1 + scale [B, D]) + shift [B, D].
  m.def("gather_modulate(Tensor x, Tensor index, Tensor shift, Tensor scale, float eps) -> Tensor");
  m.def(
      "gather_modulate_backward(Tensor grad, Tensor x, Tensor index, Tensor scale, float eps) "
      "-> (Tensor grad_x, Tensor grad_shift, Tensor grad_scale)");

  // base [B, N, D] with the rows index [B, k] += gate [B, D] * update [B, k, D].
  m.def("scatter_residual(Tensor base, Tensor index, Tensor update, Tensor gate) -> Tensor");
  m.def(
      "scatter_residual_backward(Tensor grad, Tensor index, Tensor update, Tensor gate) "
      "-> (Tensor grad_update, Tensor grad_gate)");

  // The mean of the rows of x [B, N, D] whose position [B, N] is m, for each of num_groups groups m; 0 for an empty
  // one.
  m.def("scatter_mean(Tensor x, Tensor position, SymInt num_groups) -> Tensor");
  m.def("scatter_mean_backward(Tensor grad, Tensor position) -> Tensor");

  // Greedy facility location: the `count` columns of similarity [B, n, n] that cover its rows best, int64, ascending.
  m.def("facility_location(Tensor similarity, SymInt count) -> Tensor");

  // A copy of token t of x [T, D] for each of its choices experts [T, K], sorted by expert: rows, int64 place [T, K] of
  // each choice's row, int32 ends [E] as grouped GEMMs want them. capacity > 0: that many rows an expert, -1 for a
  // choice beyond; 0: as many as there are.
  m.def(
      "expert_dispatch(Tensor x, Tensor experts, SymInt num_experts, SymInt capacity=0) "
      "-> (Tensor rows, Tensor place, Tensor ends)");
  m.def("expert_dispatch_backward(Tensor grad, Tensor place) -> Tensor");

  // sum over j of weight[t, j] * rows[place[t, j]], of nothing where place is -1.
  m.def("expert_combine(Tensor rows, Tensor place, Tensor weight) -> Tensor");
  m.def(
      "expert_combine_backward(Tensor grad, Tensor rows, Tensor place, Tensor weight) "
      "-> (Tensor grad_rows, Tensor grad_weight)");

  // The moving average e_m = p_m x_m + (1 - p_m) e_{m-1} of rows x [B, M, D] with p [B, M], from e = 0. Where p is 1 it
  // starts afresh.
  m.def("ema_scan(Tensor x, Tensor p) -> Tensor");
  m.def("ema_scan_backward(Tensor grad, Tensor x, Tensor p, Tensor e) -> (Tensor grad_x, Tensor grad_p)");
}

}  // namespace shiva
