#include <algorithm>

#include "cuda/launch.h"
#include "cuda/topk_select_kernel.cuh"

namespace shiva::cuda {
namespace {

constexpr char kOp[] = "topk_select";

struct Rows {
  const Tensor& scores;  // [B, N], contiguous
  int64_t B, N, k;
  int64_t *kept, *rejected;
  Stream stream;
};

template <typename T, int kRowThreads, int kItems>
void one_block_a_row(const Rows& r) {
  SHIVA_LAUNCH(
      (topk_select_row_kernel<T, kRowThreads, kItems>), grid_size(kOp, r.B), kRowThreads, 0, r.stream,
      data<T>(r.scores), static_cast<int>(r.N), static_cast<int>(r.k), r.kept, r.rejected);
}

template <typename T>
void many_blocks_a_row(const Rows& r) {
  using Key = key_t<T>;
  const int64_t chunks = ceil_div(r.N, kChunk);
  const unsigned blocks = grid_size(kOp, r.B * chunks), rows = grid_size(kOp, r.B);
  const auto bytes = [&](int64_t size) { return torch::stable::new_empty(r.scores, {size}, ScalarType::Byte); };
  const Tensor thresholds_memory = bytes(r.B * static_cast<int64_t>(sizeof(Threshold<Key, int64_t>)));
  const Tensor counts_memory = bytes(r.B * chunks * kBins * static_cast<int64_t>(sizeof(int)));
  const Tensor starts_memory = bytes(r.B * chunks * static_cast<int64_t>(sizeof(Before<int64_t>)));
  auto* thresholds = data<Threshold<Key, int64_t>>(thresholds_memory);
  int* counts = data<int>(counts_memory);
  auto* starts = data<Before<int64_t>>(starts_memory);
  SHIVA_LAUNCH(
      topk_start_kernel<Key>, grid_size(kOp, ceil_div(r.B, kChunkThreads)), kChunkThreads, 0, r.stream, thresholds, r.B,
      r.k);
  for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
    SHIVA_LAUNCH(
        topk_count_digits_kernel<T>, blocks, kChunkThreads, 0, r.stream, data<T>(r.scores), r.N, chunks, thresholds,
        shift, counts);
    SHIVA_LAUNCH(topk_choose_digit_kernel<Key>, rows, kChunkThreads, 0, r.stream, counts, chunks, shift, thresholds);
  }
  SHIVA_LAUNCH(
      topk_count_chunks_kernel<T>, blocks, kChunkThreads, 0, r.stream, data<T>(r.scores), r.N, chunks, thresholds,
      starts);
  SHIVA_LAUNCH(
      topk_place_chunks_kernel<T>, blocks, kChunkThreads, 0, r.stream, data<T>(r.scores), r.N, r.k, chunks, thresholds,
      starts, r.kept, r.rejected);
}

template <typename T>
void select(const Rows& r) {
  if (r.N <= 256) return one_block_a_row<T, 256, 1>(r);
  if (r.N <= 1024) return one_block_a_row<T, 256, 4>(r);
  // Blocks of 512 threads have 128 registers for each of them: room for 64 keys of 32 bits, or 32 of 64 bits.
  if (r.N <= 4096) return one_block_a_row<T, 512, 8>(r);
  if (r.N <= 16384) return one_block_a_row<T, 512, 32>(r);
  if constexpr (sizeof(key_t<T>) == 4)
    if (r.N <= 32768) return one_block_a_row<T, 512, 64>(r);
  many_blocks_a_row<T>(r);
}

std::tuple<Tensor, Tensor> topk_select(const Tensor& scores, int64_t k) {
  const Scores checked = check_topk_select(kOp, scores, k, kPlace);
  const int64_t B = checked.B, N = checked.N;
  const Guard guard(kOp, scores);
  const Tensor dense = torch::stable::contiguous(scores);
  Tensor kept = torch::stable::new_empty(scores, {B, k}, ScalarType::Long);
  Tensor rejected = torch::stable::new_empty(scores, {B, N - k}, ScalarType::Long);
  if (B == 0 || N == 0) return {kept, rejected};
  const Stream stream = current_stream(scores);
  if (k == 0 || k == N) {
    const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(ceil_div(B * N, 256), 65536));
    SHIVA_LAUNCH(topk_all_kernel, blocks, 256, 0, stream, data<int64_t>(k == 0 ? rejected : kept), B * N, N);
  } else {
    const Rows rows = {dense, B, N, k, data<int64_t>(kept), data<int64_t>(rejected), stream};
    dispatch(checked.dtype, [&](auto* type) { select<std::remove_pointer_t<decltype(type)>>(rows); });
  }
  check_launch(kOp);
  return {kept, rejected};
}

}  // namespace
}  // namespace shiva::cuda

SHIVA_REGISTER(m) { m.impl("topk_select", TORCH_BOX(&shiva::cuda::topk_select)); }
