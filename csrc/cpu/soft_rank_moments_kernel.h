#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace shiva::cpu {
// soft_rank in O(n): tokens are gathered in bins half a tau wide. Within a pair of bins sigmoid((s_j - s_i) / tau) is a
// polynomial of degree 7 in both tokens' places x in [-1, 1], to 1e-11, so that a bin's sums of 1, x, ..., x^7 say all
// that the others need of it; and the polynomials depend on the bins' distance alone.
constexpr int kTerms = 8;
// Farther bins, 20 tau and more, count 0 or 1 in float32.
constexpr int kReachBins = 40;

struct RankBins {
  double origin, inverse_width;  // token s lies in bin floor((s - origin) * inverse_width)
  int64_t count;
};

// Adds each finite token's 1, x, ..., x^7 to its bin's row of moments [count, 8]; with weights [n], weight - center
// times these to weighted, else that is null.
SHIVA_DECLARE_KERNEL(
    void soft_rank_moments(
        const float* scores, const float* weights, float center, int64_t n, const RankBins& bins, double* moments,
        double* weighted))
// out[b] = sum over |d| <= kReachBins of table[d + kReachBins] (8 x 8) times moments[b + d], for b in [begin, end).
SHIVA_DECLARE_KERNEL(
    void soft_rank_convolve(
        const double* table, const double* moments, int64_t count, int64_t begin, int64_t end, double* out))
// rank[i] = constant + the polynomial sums[bin of i] at i, for finite tokens; the others are left alone.
SHIVA_DECLARE_KERNEL(
    void soft_rank_evaluate(
        const float* scores, int64_t n, const RankBins& bins, const double* sums, double constant, float* rank))
// out[i] = factor * (weighted polynomial - (grad_i - center) * plain polynomial).
SHIVA_DECLARE_KERNEL(
    void soft_rank_evaluate_backward(
        const float* scores, const float* grad, float center, int64_t n, const RankBins& bins, const double* sums,
        const double* weighted, double factor, float* out))
}  // namespace shiva::cpu
