#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace shiva::cpu {
// One row: scores[n] of dtype -> kept[k], rejected[n - k], both ascending. 0 < k < n. keys: scratch as long
// as two rows.
SHIVA_DECLARE_KERNEL(
    void topk_select_row(
        Dtype dtype, const void* scores, int64_t n, int64_t k, void* keys, int64_t* kept, int64_t* rejected))
}  // namespace shiva::cpu
