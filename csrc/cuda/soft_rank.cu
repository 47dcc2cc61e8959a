#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/launch.h"
#include "cuda/soft_rank_kernel.cuh"
#include "cuda/soft_rank_sorted_kernel.cuh"

namespace shiva::cuda {
namespace {

// Rows of up to this many tokens are not worth sorting.
constexpr int64_t kDenseTokens = 512;

struct Rows {
  const char* op;
  Tensor scores;     // [B, N], contiguous; so are grad and out
  const void* grad;  // null for the forward
  Tensor out;
  int64_t B, N;
  double tau;
  Stream stream;
};

// Launches the pairs and the sum of their parts. sorted and order are null for the dense form.
template <typename T, int kMicro, bool kSorted, bool kBackward>
void sum_pairs(const Rows& r, const T* sorted, const int32_t* order) {
  constexpr int64_t kTile = kSide * kMicro;
  const int64_t part_tokens = ceil_div(ceil_div(r.N, kTile), kMaxParts) * kTile;
  const int parts = static_cast<int>(ceil_div(r.N, part_tokens));
  const Tensor partial = torch::stable::new_empty(r.scores, {r.B, parts, r.N});
  // Clamped, so that neither 0 nor an infinity times scale is NaN.
  const double scale = std::clamp<double>(kLog2e / r.tau, std::numeric_limits<T>::min(), std::numeric_limits<T>::max());
  SHIVA_LAUNCH(
      (soft_rank_pairs_kernel<T, kMicro, kSorted, kBackward>), grid_size(r.op, r.B * parts * (parts + 1) / 2),
      kPairThreads, 0, r.stream, kSorted ? sorted : data<T>(r.scores), static_cast<const T*>(r.grad), order, r.N, parts,
      part_tokens, static_cast<T>(scale), data<T>(partial));
  SHIVA_LAUNCH(
      (soft_rank_combine_kernel<T, kSorted, kBackward>), grid_size(r.op, ceil_div(r.B * r.N, kPairThreads)),
      kPairThreads, 0, r.stream, data<T>(partial), sorted, order, r.B * r.N, r.N, parts, r.tau, data<T>(r.out));
}

template <typename T, bool kBackward>
void sort_and_sum_pairs(const Rows& r) {
  const int64_t chunks = ceil_div(r.N, static_cast<int64_t>(kSortChunk));
  Tensor sorted = torch::stable::new_empty(r.scores, {r.B, r.N});
  Tensor order = torch::stable::new_empty(r.scores, {r.B, r.N}, ScalarType::Int);
  SHIVA_LAUNCH(
      soft_rank_sort_kernel<T>, grid_size(r.op, r.B * chunks), kSortThreads, 0, r.stream, data<T>(r.scores), r.N,
      chunks, data<T>(sorted), data<int32_t>(order));
  if (chunks > 1) {
    const Tensor chunk_sorted = sorted, chunk_order = order;
    sorted = torch::stable::new_empty(r.scores, {r.B, r.N});
    order = torch::stable::new_empty(r.scores, {r.B, r.N}, ScalarType::Int);
    SHIVA_LAUNCH(
        soft_rank_merge_kernel<T>, grid_size(r.op, ceil_div(r.B * r.N, kMergeThreads)), kMergeThreads, 0, r.stream,
        data<T>(chunk_sorted), data<int32_t>(chunk_order), r.B * r.N, r.N, data<T>(sorted), data<int32_t>(order));
  }
  sum_pairs<T, sizeof(T) == 4 ? 8 : 4, true, kBackward>(r, data<T>(sorted), data<int32_t>(order));
}

// Which form runs depends on the shape alone: to look at the scores would wait for the device.
template <typename T>
void run(const Rows& r) {
  if (r.N <= kDenseTokens)
    r.grad == nullptr ? sum_pairs<T, 4, false, false>(r, nullptr, nullptr)
                      : sum_pairs<T, 4, false, true>(r, nullptr, nullptr);
  else
    r.grad == nullptr ? sort_and_sum_pairs<T, false>(r) : sort_and_sum_pairs<T, true>(r);
  check_launch(r.op);
}

// A contiguous tensor of this dtype with the values of t.
Tensor dense(const Tensor& t, ScalarType type) { return torch::stable::contiguous(torch::stable::to(t, type)); }

Tensor soft_rank(const Tensor& scores, double tau) {
  constexpr char op[] = "soft_rank";
  const Scores checked = check_soft_rank(op, scores, tau, kPlace);
  const int64_t B = checked.B, N = checked.N;
  const Guard guard(op, scores);
  const ScalarType type = accumulate_type(scores);
  const Tensor values = dense(scores, type);
  Tensor out = torch::stable::new_empty(scores, {B, N}, type);
  if (B == 0 || N == 0) return out;
  const Rows rows = {op, values, nullptr, out, B, N, tau, current_stream(scores)};
  type == ScalarType::Double ? run<double>(rows) : run<float>(rows);
  return out;
}

Tensor soft_rank_backward(const Tensor& grad, const Tensor& scores, double tau) {
  constexpr char op[] = "soft_rank_backward";
  const Scores checked = check_soft_rank_backward(op, grad, scores, tau, kPlace);
  const int64_t B = checked.B, N = checked.N;
  const Guard guard(op, scores, grad);
  const ScalarType type = accumulate_type(scores);
  const Tensor values = dense(scores, type), grads = dense(grad, type);
  Tensor out = torch::stable::new_empty(scores, {B, N}, type);
  if (B == 0 || N == 0) return torch::stable::to(out, scores.scalar_type());
  const Rows rows = {op, values, grads.data_ptr(), out, B, N, tau, current_stream(scores)};
  type == ScalarType::Double ? run<double>(rows) : run<float>(rows);
  return torch::stable::to(out, scores.scalar_type());
}

}  // namespace
}  // namespace shiva::cuda

SHIVA_REGISTER(m) {
  m.impl("soft_rank", TORCH_BOX(&shiva::cuda::soft_rank));
  m.impl("soft_rank_backward", TORCH_BOX(&shiva::cuda::soft_rank_backward));
}
