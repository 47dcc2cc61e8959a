#include "contracts.h"

#include <cmath>
#include <limits>

namespace shiva {

// Rows x [B, N, D], called name, and their index [B, k].
static Tokens check_tokens(
    const char* op, const char* name, const Tensor& x, const char* index_name, const Tensor& index, Place place) {
  check_dim(op, name, x, 3, place);
  const Dtype dtype = floating_dtype(op, name, x);
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2);
  const Tensor kept = checked_index(op, index_name, index, B, N, place);
  return {dtype, B, N, D, kept.size(1), D * static_cast<int64_t>(x.element_size()), kept};
}

// t has these sizes and the dtype of x, called name.
static void check_like(
    const char* op, const char* t_name, const Tensor& t, const std::vector<int64_t>& sizes, const char* name,
    const Tensor& x, Place place) {
  check_shape(op, t_name, t, sizes, place);
  check_same_dtype(op, t_name, t, name, x);
}

static void check_eps(const char* op, double eps) { SHIVA_CHECK(eps >= 0, op, "eps must not be negative, got ", eps); }

// Inclusion [B, N] in float32 (float64 for float64 x [B, N, D]).
static void check_inclusion(const char* op, const Tensor& inclusion, const Tensor& x, Place place) {
  check_shape(op, "inclusion", inclusion, {x.size(0), x.size(1)}, place);
  SHIVA_CHECK(
      inclusion.scalar_type() == accumulate_type(x), op, "inclusion must be ", dtype_name(accumulate_type(x)), ", got ",
      dtype_name(inclusion.scalar_type()));
}

Scores check_topk_select(const char* op, const Tensor& scores, int64_t k, Place place) {
  check_dim(op, "scores", scores, 2, place);
  const Dtype dtype = floating_dtype(op, "scores", scores);
  const int64_t N = scores.size(1);
  SHIVA_CHECK(k >= 0 && k <= N, op, "k must lie in [0, ", N, "], the number of tokens, got ", k);
  return {dtype, scores.size(0), N};
}

Scores check_soft_rank(const char* op, const Tensor& scores, double tau, Place place) {
  check_dim(op, "scores", scores, 2, place);
  const Dtype dtype = floating_dtype(op, "scores", scores);
  SHIVA_CHECK(tau > 0 && std::isfinite(tau), op, "tau must be a positive finite number, got ", tau);
  SHIVA_CHECK(
      dtype == Dtype::Float64 || tau >= std::numeric_limits<float>::min(), op, "tau is ", tau,
      ", below the range of float32, in which the ranks of these scores are computed; use float64 scores");
  SHIVA_CHECK(
      scores.size(1) < std::numeric_limits<int32_t>::max(), op, "scores has ", scores.size(1),
      " tokens a row; at most 2^31 - 2 are supported");
  return {dtype, scores.size(0), scores.size(1)};
}

Scores check_soft_rank_backward(const char* op, const Tensor& grad, const Tensor& scores, double tau, Place place) {
  const Scores checked = check_soft_rank(op, scores, tau, place);
  check_shape(op, "grad", grad, {checked.B, checked.N}, place);
  floating_dtype(op, "grad", grad);
  return checked;
}

Tokens check_token_gather(const char* op, const Tensor& x, const Tensor& index, Place place) {
  if (x.dim() == 3) return check_tokens(op, "x", x, "index", index, place);
  SHIVA_CHECK(x.dim() == 2, op, "x must have shape [B, N, D] or [N, D], got ", shape_of(x));
  check_dim(op, "x", x, 2, place);
  const Dtype dtype = floating_dtype(op, "x", x);
  check_dim(op, "index", index, 2, place);
  const int64_t B = index.size(0), N = x.size(0), D = x.size(1);
  const Tensor kept = checked_index(op, "index", index, B, N, place);
  return {dtype, B, N, D, kept.size(1), D * static_cast<int64_t>(x.element_size()), kept};
}

Tokens check_token_gather_backward(const char* op, const Tensor& grad, const Tensor& index, int64_t n, Place place) {
  check_dim(op, "grad", grad, 3, place);
  const Dtype dtype = floating_dtype(op, "grad", grad);
  SHIVA_CHECK(n >= 0, op, "n must not be negative, got ", n);
  const int64_t B = grad.size(0), k = grad.size(1), D = grad.size(2);
  const Tensor kept = checked_index(op, "index", index, B, n, place);
  check_shape(op, "index", kept, {B, k}, place);
  return {dtype, B, n, D, k, D * static_cast<int64_t>(grad.element_size()), kept};
}

Tokens check_token_scatter(const char* op, const Tensor& base, const Tensor& index, const Tensor& src, Place place) {
  Tokens t = check_tokens(op, "base", base, "index", index, place);
  check_like(op, "src", src, {t.B, t.k, t.D}, "base", base, place);
  return t;
}

Tokens check_token_scatter_backward(const char* op, const Tensor& grad, const Tensor& index, Place place) {
  return check_tokens(op, "grad", grad, "index", index, place);
}

Tokens check_residual_gate(const char* op, const Tensor& x, const Tensor& inclusion, const Tensor& kept, Place place) {
  Tokens t = check_tokens(op, "x", x, "kept", kept, place);
  check_inclusion(op, inclusion, x, place);
  return t;
}

Tokens check_residual_gate_backward(
    const char* op, const Tensor& grad_selected, const Tensor& grad_base, const Tensor& x, const Tensor& kept,
    Place place) {
  Tokens t = check_tokens(op, "x", x, "kept", kept, place);
  check_like(op, "grad_selected", grad_selected, {t.B, t.k, t.D}, "x", x, place);
  check_like(op, "grad_base", grad_base, {t.B, t.N, t.D}, "x", x, place);
  return t;
}

static void check_kappa(const char* op, double kappa) {
  SHIVA_CHECK(kappa >= 0 && std::isfinite(kappa), op, "kappa must be a finite number of at least 0, got ", kappa);
}

Tokens check_counterfactual_scatter(
    const char* op, const Tensor& base, const Tensor& kept, const Tensor& src, const Tensor& inclusion,
    const Tensor& update, double kappa, Place place) {
  Tokens t = check_tokens(op, "base", base, "kept", kept, place);
  check_like(op, "src", src, {t.B, t.k, t.D}, "base", base, place);
  check_inclusion(op, inclusion, base, place);
  check_like(op, "update", update, {t.B, t.N, t.D}, "base", base, place);
  check_kappa(op, kappa);
  return t;
}

Tokens check_counterfactual_scatter_backward(
    const char* op, const Tensor& grad, const Tensor& base, const Tensor& kept, const Tensor& src, const Tensor& update,
    double kappa, Place place) {
  Tokens t = check_tokens(op, "base", base, "kept", kept, place);
  check_like(op, "grad", grad, {t.B, t.N, t.D}, "base", base, place);
  check_like(op, "src", src, {t.B, t.k, t.D}, "base", base, place);
  check_like(op, "update", update, {t.B, t.N, t.D}, "base", base, place);
  check_kappa(op, kappa);
  return t;
}

Tokens check_gather_modulate(
    const char* op, const Tensor& x, const Tensor& index, const Tensor& shift, const Tensor& scale, double eps,
    Place place) {
  Tokens t = check_tokens(op, "x", x, "index", index, place);
  check_like(op, "shift", shift, {t.B, t.D}, "x", x, place);
  check_like(op, "scale", scale, {t.B, t.D}, "x", x, place);
  check_eps(op, eps);
  return t;
}

Tokens check_gather_modulate_backward(
    const char* op, const Tensor& grad, const Tensor& x, const Tensor& index, const Tensor& scale, double eps,
    Place place) {
  Tokens t = check_tokens(op, "x", x, "index", index, place);
  check_like(op, "grad", grad, {t.B, t.k, t.D}, "x", x, place);
  check_like(op, "scale", scale, {t.B, t.D}, "x", x, place);
  check_eps(op, eps);
  return t;
}

Tokens check_scatter_residual(
    const char* op, const char* name, const Tensor& base, const Tensor& index, const Tensor& update, const Tensor& gate,
    Place place) {
  Tokens t = check_tokens(op, name, base, "index", index, place);
  check_like(op, "update", update, {t.B, t.k, t.D}, name, base, place);
  check_like(op, "gate", gate, {t.B, t.D}, name, base, place);
  return t;
}

// position [B, N] into num_groups groups, as contiguous int64.
static Tensor check_position(
    const char* op, const Tensor& position, int64_t B, int64_t N, int64_t num_groups, Place place) {
  check_shape(op, "position", position, {B, N}, place);
  SHIVA_CHECK(
      N < std::numeric_limits<int32_t>::max(), op, "position has ", N, " tokens a row; at most 2^31 - 2 are supported");
  SHIVA_CHECK(
      num_groups > 0 || B * N == 0, op, "there are no groups, but position has shape ", shape_of(position),
      "; every token needs one");
  return checked_index(op, "position", position, B, num_groups, place);
}

Tokens check_scatter_mean(const char* op, const Tensor& x, const Tensor& position, int64_t num_groups, Place place) {
  check_dim(op, "x", x, 3, place);
  const Dtype dtype = floating_dtype(op, "x", x);
  SHIVA_CHECK(num_groups >= 0, op, "num_groups must not be negative, got ", num_groups);
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2);
  const Tensor index = check_position(op, position, B, N, num_groups, place);
  return {dtype, B, N, D, num_groups, D * static_cast<int64_t>(x.element_size()), index};
}

Tokens check_scatter_mean_backward(const char* op, const Tensor& grad, const Tensor& position, Place place) {
  check_dim(op, "grad", grad, 3, place);
  const Dtype dtype = floating_dtype(op, "grad", grad);
  check_dim(op, "position", position, 2, place);
  const int64_t B = grad.size(0), M = grad.size(1), D = grad.size(2), N = position.size(1);
  const Tensor index = check_position(op, position, B, N, M, place);
  return {dtype, B, N, D, M, D * static_cast<int64_t>(grad.element_size()), index};
}

Scores check_facility_location(const char* op, const Tensor& similarity, int64_t count, Place place) {
  check_dim(op, "similarity", similarity, 3, place);
  const Dtype dtype = floating_dtype(op, "similarity", similarity);
  const int64_t B = similarity.size(0), n = similarity.size(1);
  check_shape(op, "similarity", similarity, {B, n, n}, place);
  SHIVA_CHECK(count >= 0 && count <= n, op, "count must lie in [0, ", n, "], the number of tokens, got ", count);
  return {dtype, B, n};
}

static void check_few_enough(const char* op, const char* name, int64_t count) {
  SHIVA_CHECK(
      count < std::numeric_limits<int32_t>::max(), op, name, " make ", count, " rows; at most 2^31 - 2 are supported");
}

Routed check_expert_dispatch(
    const char* op, const Tensor& x, const Tensor& experts, int64_t num_experts, int64_t capacity, Place place) {
  constexpr int64_t kMostExperts = 1024;
  check_dim(op, "x", x, 2, place);
  const Dtype dtype = floating_dtype(op, "x", x);
  SHIVA_CHECK(
      num_experts >= 1 && num_experts <= kMostExperts, op, "num_experts must lie in [1, ", kMostExperts, "], got ",
      num_experts);
  SHIVA_CHECK(capacity >= 0, op, "capacity must not be negative, got ", capacity);
  const int64_t T = x.size(0), D = x.size(1);
  const Tensor index = checked_index(op, "experts", experts, T, num_experts, place);
  const int64_t K = experts.size(1);
  check_few_enough(op, "experts", T * K);
  check_few_enough(op, "num_experts and capacity", capacity > 0 ? num_experts * capacity : 0);
  const int64_t R = capacity > 0 ? num_experts * capacity : T * K;
  return {dtype, T, K, D, R, D * static_cast<int64_t>(x.element_size()), index, index};
}

// Of rows [R, D] (called `name`) and place [T, K] into them.
static Routed check_placed(const char* op, const char* name, const Tensor& rows, const Tensor& place, Place where) {
  check_dim(op, name, rows, 2, where);
  const Dtype dtype = floating_dtype(op, name, rows);
  check_dim(op, "place", place, 2, where);
  const int64_t R = rows.size(0), D = rows.size(1), T = place.size(0), K = place.size(1);
  check_few_enough(op, "rows", R);
  check_few_enough(op, "place", T * K);
  const Tensor index = checked_index(op, "place", place, T, R, where, -1);
  return {dtype, T, K, D, R, D * static_cast<int64_t>(rows.element_size()), index, index};
}

Routed check_expert_dispatch_backward(const char* op, const Tensor& grad, const Tensor& place, Place where) {
  return check_placed(op, "grad", grad, place, where);
}

Routed check_expert_combine(
    const char* op, const Tensor& rows, const Tensor& place, const Tensor& weight, Place where) {
  Routed routed = check_placed(op, "rows", rows, place, where);
  check_shape(op, "weight", weight, {routed.T, routed.K}, where);
  routed.weight = as_accumulate(op, "weight", weight, rows);
  return routed;
}

Routed check_expert_combine_backward(
    const char* op, const Tensor& grad, const Tensor& rows, const Tensor& place, const Tensor& weight, Place where) {
  const Routed routed = check_expert_combine(op, rows, place, weight, where);
  check_shape(op, "grad", grad, {routed.T, routed.D}, where);
  check_same_dtype(op, "grad", grad, "rows", rows);
  return routed;
}

Scan check_ema_scan(const char* op, const Tensor& x, const Tensor& p, Place place) {
  check_dim(op, "x", x, 3, place);
  const Dtype dtype = floating_dtype(op, "x", x);
  const int64_t B = x.size(0), M = x.size(1), D = x.size(2);
  check_shape(op, "p", p, {B, M}, place);
  return {dtype, B, M, D, D * static_cast<int64_t>(x.element_size()), as_accumulate(op, "p", p, x)};
}

Scan check_ema_scan_backward(
    const char* op, const Tensor& grad, const Tensor& x, const Tensor& p, const Tensor& e, Place place) {
  const Scan scan = check_ema_scan(op, x, p, place);
  const std::vector<int64_t> shape = {scan.B, scan.M, scan.D};
  check_like(op, "grad", grad, shape, "x", x, place);
  check_like(op, "e", e, shape, "x", x, place);
  return scan;
}

RouterArguments check_router_score(
    const char* op, const Tensor& x, const Tensor& context, const Tensor& w_in, const Tensor& ln_weight,
    const Tensor& ln_bias, const Tensor& w_out, double eps, Place place) {
  check_dim(op, "x", x, 3, place);
  const Dtype dtype = floating_dtype(op, "x", x);
  check_dim(op, "w_in", w_in, 2, place);
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2), H = w_in.size(0);
  SHIVA_CHECK(H > 0, op, "w_in must have at least one row, got shape ", shape_of(w_in));
  check_like(op, "w_in", w_in, {H, D}, "x", x, place);
  check_shape(op, "context", context, {B, H}, place);
  check_shape(op, "ln_weight", ln_weight, {H}, place);
  check_shape(op, "ln_bias", ln_bias, {H}, place);
  check_shape(op, "w_out", w_out, {H}, place);
  check_eps(op, eps);
  return {
      dtype,
      B,
      N,
      D,
      H,
      as_accumulate(op, "context", context, x),
      as_accumulate(op, "ln_weight", ln_weight, x),
      as_accumulate(op, "ln_bias", ln_bias, x),
      as_accumulate(op, "w_out", w_out, x)};
}

}  // namespace shiva
