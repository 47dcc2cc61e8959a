#include "cpu/facility_location_kernel.h"

#include <memory>

#include "cpu/launch.h"

namespace shiva::cpu {
namespace {

// similarity [B, n, n] -> the chosen columns [B, count], ascending
Tensor facility_location(const Tensor& similarity, int64_t count) {
  const Scores checked = check_facility_location("facility_location", similarity, count, kPlace);
  const int64_t B = checked.B, n = checked.N;
  Tensor out = new_empty(similarity, {B, count}, ScalarType::Long);
  if (out.numel() == 0) return out;
  const Tensor dense =
      torch::stable::contiguous(n <= kFewFacilities ? similarity : torch::stable::transpose(similarity, 1, 2));
  const int64_t bytes = n * n * static_cast<int64_t>(similarity.element_size());
  const char* in = data<char>(dense);
  parallel(B, 8 * bytes, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[static_cast<size_t>(facility_scratch_bytes(n))]);
    for (int64_t b = begin; b < end; ++b)
      SHIVA_CALL_KERNEL(
          choose_facilities, checked.dtype, in + b * bytes, n, count, scratch.get(), data<int64_t>(out) + b * count);
  });
  return out;
}

}  // namespace
}  // namespace shiva::cpu

STABLE_TORCH_LIBRARY_IMPL(shiva, CPU, m) { m.impl("facility_location", TORCH_BOX(&shiva::cpu::facility_location)); }
