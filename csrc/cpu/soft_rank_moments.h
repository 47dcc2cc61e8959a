// soft_rank of rows with many tokens within each tau, in O(n): see soft_rank_moments_kernel.h.
#pragma once

#include <cstdint>

namespace shiva::cpu {

// One float32 row without NaN -> out [n]; false, with out as it was, if its tokens lie too far apart for this to pay.
// Infinite tokens are left alone, but +inf counts for the finite ones.
bool soft_rank_by_moments(const float* scores, int64_t n, double tau, float* out);
bool soft_rank_backward_by_moments(const float* grad, const float* scores, int64_t n, double tau, float* out);

}  // namespace shiva::cpu
