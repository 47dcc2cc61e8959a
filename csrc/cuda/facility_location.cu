#include "cuda/facility_location_kernel.cuh"
#include "cuda/launch.h"

namespace shiva::cuda {
namespace {

constexpr char kOp[] = "facility_location";

template <typename T>
void one_block_a_choice(const Tensor& columns, int64_t B, int64_t n, int64_t count, const Tensor& out, Stream stream) {
  SHIVA_LAUNCH(
      facility_block_kernel<T>, grid_size(kOp, B), kFacilityThreads, 0, stream, data<T>(columns), static_cast<int>(n),
      static_cast<int>(count), data<int64_t>(out));
}

template <typename T>
void many_blocks_a_choice(
    const Tensor& columns, int64_t B, int64_t n, int64_t count, const Tensor& out, Stream stream) {
  using A = acc_t<T>;
  const Tensor covered = torch::stable::new_empty(columns, {B, n}, accumulate_type(columns));
  const Tensor gains = torch::stable::new_empty(columns, {B, n}, ScalarType::Double);
  const Tensor taken = torch::stable::new_empty(columns, {B, n}, ScalarType::Int);
  int* flags = data<int>(taken);
  const unsigned rows = grid_size(kOp, B), warps = grid_size(kOp, ceil_div(B * n, kFacilityWarps));
  SHIVA_LAUNCH(
      facility_start_kernel<A>, grid_size(kOp, ceil_div(B * n, kFacilityThreads)), kFacilityThreads, 0, stream, B * n,
      data<A>(covered), flags);
  for (int64_t step = 0; step < count; ++step) {
    SHIVA_LAUNCH(
        facility_gains_kernel<T>, warps, kFacilityThreads, 0, stream, data<T>(columns), data<A>(covered), flags, B * n,
        n, data<double>(gains));
    SHIVA_LAUNCH(
        facility_take_kernel<T>, rows, kFacilityThreads, 0, stream, data<T>(columns), data<double>(gains), n,
        data<A>(covered), flags);
  }
  SHIVA_LAUNCH(facility_list_kernel, rows, kFacilityThreads, 0, stream, flags, n, count, data<int64_t>(out));
}

// similarity [B, n, n] -> the chosen columns [B, count], ascending
Tensor facility_location(const Tensor& similarity, int64_t count) {
  const Scores checked = check_facility_location(kOp, similarity, count, kPlace);
  const int64_t B = checked.B, n = checked.N;
  const Guard guard(kOp, similarity);
  Tensor out = torch::stable::new_empty(similarity, {B, count}, ScalarType::Long);
  if (out.numel() == 0) return out;
  const Tensor columns = torch::stable::contiguous(torch::stable::transpose(similarity, 1, 2));
  const Stream stream = current_stream(similarity);
  dispatch(checked.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (n <= kFacilityThreads)
      one_block_a_choice<T>(columns, B, n, count, out, stream);
    else
      many_blocks_a_choice<T>(columns, B, n, count, out, stream);
  });
  check_launch(kOp);
  return out;
}

}  // namespace
}  // namespace shiva::cuda

SHIVA_REGISTER(m) { m.impl("facility_location", TORCH_BOX(&shiva::cuda::facility_location)); }
