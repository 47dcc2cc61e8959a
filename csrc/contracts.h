// The contract of every op's arguments, checked once for the CPU's and the GPU's launchers alike.
//
// Each function raises for arguments that the op refuses, and returns sizes and what it had to convert.
#pragma once

#include "checks.h"

namespace shiva {

// Of token rows x [B, N, D] and an index [B, k] into them.
struct Tokens {
  Dtype dtype;
  int64_t B, N, D, k;
  int64_t row_bytes;  // of D channels
  Tensor index;       // int64, contiguous
};

struct Scores {
  Dtype dtype;
  int64_t B, N;
};

// The small parameters are contiguous and in the accumulation dtype.
struct RouterArguments {
  Dtype dtype;
  int64_t B, N, D, H;
  Tensor context;                    // [B, H]
  Tensor ln_weight, ln_bias, w_out;  // [H]
};

// Of rows sorted by expert, and where each token's choices stand among them.
struct Routed {
  Dtype dtype;
  int64_t T, K, D;
  int64_t R;  // rows
  int64_t row_bytes;
  Tensor index;   // int64 [T, K], contiguous: expert_dispatch's experts, the others' place
  Tensor weight;  // expert_combine: [T, K], contiguous, in the accumulation dtype
};

Scores check_topk_select(const char* op, const Tensor& scores, int64_t k, Place place);

Scores check_soft_rank(const char* op, const Tensor& scores, double tau, Place place);
Scores check_soft_rank_backward(const char* op, const Tensor& grad, const Tensor& scores, double tau, Place place);

// x may be a table [N, D] that all rows of the index share; B is the index's then.
Tokens check_token_gather(const char* op, const Tensor& x, const Tensor& index, Place place);
// grad [B, k, D]; N is n.
Tokens check_token_gather_backward(const char* op, const Tensor& grad, const Tensor& index, int64_t n, Place place);

Tokens check_token_scatter(const char* op, const Tensor& base, const Tensor& index, const Tensor& src, Place place);
Tokens check_token_scatter_backward(const char* op, const Tensor& grad, const Tensor& index, Place place);

Tokens check_residual_gate(const char* op, const Tensor& x, const Tensor& inclusion, const Tensor& kept, Place place);
Tokens check_residual_gate_backward(
    const char* op, const Tensor& grad_selected, const Tensor& grad_base, const Tensor& x, const Tensor& kept,
    Place place);

Tokens check_counterfactual_scatter(
    const char* op, const Tensor& base, const Tensor& kept, const Tensor& src, const Tensor& inclusion,
    const Tensor& update, double kappa, Place place);
Tokens check_counterfactual_scatter_backward(
    const char* op, const Tensor& grad, const Tensor& base, const Tensor& kept, const Tensor& src, const Tensor& update,
    double kappa, Place place);

Tokens check_gather_modulate(
    const char* op, const Tensor& x, const Tensor& index, const Tensor& shift, const Tensor& scale, double eps,
    Place place);
Tokens check_gather_modulate_backward(
    const char* op, const Tensor& grad, const Tensor& x, const Tensor& index, const Tensor& scale, double eps,
    Place place);

// Of scatter_residual (name "base") and its backward (name "grad").
Tokens check_scatter_residual(
    const char* op, const char* name, const Tensor& base, const Tensor& index, const Tensor& update, const Tensor& gate,
    Place place);

// k is num_groups, index the position [B, N].
Tokens check_scatter_mean(const char* op, const Tensor& x, const Tensor& position, int64_t num_groups, Place place);
// grad [B, k, D].
Tokens check_scatter_mean_backward(const char* op, const Tensor& grad, const Tensor& position, Place place);

// N is n.
Scores check_facility_location(const char* op, const Tensor& similarity, int64_t count, Place place);

// capacity 0 for none. Raises where a place or a row's number would not fit in 31 bits.
Routed check_expert_dispatch(
    const char* op, const Tensor& x, const Tensor& experts, int64_t num_experts, int64_t capacity, Place place);
// grad [R, D].
Routed check_expert_dispatch_backward(const char* op, const Tensor& grad, const Tensor& place, Place where);
Routed check_expert_combine(const char* op, const Tensor& rows, const Tensor& place, const Tensor& weight, Place where);
Routed check_expert_combine_backward(
    const char* op, const Tensor& grad, const Tensor& rows, const Tensor& place, const Tensor& weight, Place where);

// Of rows [B, M, D] and a weight for each.
struct Scan {
  Dtype dtype;
  int64_t B, M, D;
  int64_t row_bytes;
  Tensor p;  // [B, M], contiguous, in the accumulation dtype
};
Scan check_ema_scan(const char* op, const Tensor& x, const Tensor& p, Place place);
Scan check_ema_scan_backward(
    const char* op, const Tensor& grad, const Tensor& x, const Tensor& p, const Tensor& e, Place place);

RouterArguments check_router_score(
    const char* op, const Tensor& x, const Tensor& context, const Tensor& w_in, const Tensor& ln_weight,
    const Tensor& ln_bias, const Tensor& w_out, double eps, Place place);

}  // namespace shiva
