#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace shiva::cpu {
constexpr int64_t kFewFacilities = 32;
// Bytes of scratch that choose_facilities needs.
constexpr int64_t facility_scratch_bytes(int64_t n) { return 8 * (n <= kFewFacilities ? n * (n + 2) : 2 * n); }
// similarity [n, n], from kFewFacilities + 1 on transposed (a column after the other) -> the `count` chosen columns,
// ascending; 0 < count <= n.
SHIVA_DECLARE_KERNEL(
    void choose_facilities(
        Dtype dtype, const void* similarity, int64_t n, int64_t count, void* scratch, int64_t* chosen))
}  // namespace shiva::cpu
