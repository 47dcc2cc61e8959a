#include <memory>

#include "cpu/launch.h"
#include "cpu/topk_select_kernel.h"

namespace shiva::cpu {
namespace {

std::tuple<Tensor, Tensor> topk_select(const Tensor& scores, int64_t k) {
  const Scores checked = check_topk_select("topk_select", scores, k, kPlace);
  const int64_t B = checked.B, N = checked.N;
  const Tensor dense = torch::stable::contiguous(scores);
  Tensor kept = new_empty(scores, {B, k}, ScalarType::Long);
  Tensor rejected = new_empty(scores, {B, N - k}, ScalarType::Long);
  const int64_t row_bytes = N * static_cast<int64_t>(scores.element_size());
  const char* in = data<char>(dense);
  parallel(B, 8 * N, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> keys(new char[static_cast<size_t>(2 * row_bytes)]);
    for (int64_t b = begin; b < end; ++b) {
      int64_t* kept_row = data<int64_t>(kept) + b * k;
      int64_t* rejected_row = data<int64_t>(rejected) + b * (N - k);
      if (k == 0 || k == N) {
        int64_t* all = k == 0 ? rejected_row : kept_row;
        for (int64_t i = 0; i < N; ++i) all[i] = i;
      } else {
        SHIVA_CALL_KERNEL(topk_select_row, checked.dtype, in + b * row_bytes, N, k, keys.get(), kept_row, rejected_row);
      }
    }
  });
  return {kept, rejected};
}

}  // namespace
}  // namespace shiva::cpu

STABLE_TORCH_LIBRARY_IMPL(shiva, CPU, m) { m.impl("topk_select", TORCH_BOX(&shiva::cpu::topk_select)); }
