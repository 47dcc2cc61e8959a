#include "cpu/soft_rank_moments.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/launch.h"
#include "cpu/soft_rank_moments_kernel.h"

namespace shiva::cpu {
namespace {

constexpr int64_t kLeastTokens = 256, kTokensPerBin = 4;
constexpr int64_t kPartTokens = 16384, kMostParts = 8;  // a row's parts are summed apart; they depend on n alone
constexpr int64_t kBinsPerTask = 32;
constexpr int kTables = 2 * kReachBins + 1;

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }
double sigmoid_slope(double z) { return sigmoid(z) * sigmoid(-z); }

// [bins' distance][power of x_j][power of x_i]: coefficients of kernel((s_j - s_i) / tau), interpolated at the
// Chebyshev nodes of both bins. A bin is half a tau wide: the distance of two tokens is (d + (x_j - x_i) / 2) / 2 tau.
std::vector<double> make_table(double (*kernel)(double)) {
  std::array<std::array<double, kTerms>, kTerms> chebyshev{}, basis{};  // [degree][power], [node][power]
  std::array<double, kTerms> nodes;
  chebyshev[0][0] = chebyshev[1][1] = 1;
  for (int k = 2; k < kTerms; ++k)
    for (int m = 0; m < kTerms; ++m) chebyshev[k][m] = (m > 0 ? 2 * chebyshev[k - 1][m - 1] : 0) - chebyshev[k - 2][m];
  for (int a = 0; a < kTerms; ++a) {
    const double angle = std::acos(-1.0) * (a + 0.5) / kTerms;
    nodes[a] = std::cos(angle);
    for (int k = 0; k < kTerms; ++k)
      for (int m = 0; m < kTerms; ++m)
        basis[a][m] += (k == 0 ? 1.0 : 2.0) / kTerms * std::cos(k * angle) * chebyshev[k][m];
  }
  std::vector<double> table(static_cast<size_t>(kTables) * kTerms * kTerms);
  for (int d = 0; d < kTables; ++d)
    for (int i = 0; i < kTerms; ++i)
      for (int j = 0; j < kTerms; ++j) {
        const double value = kernel((d - kReachBins + (nodes[j] - nodes[i]) / 2) / 2);
        for (int l = 0; l < kTerms; ++l)
          for (int m = 0; m < kTerms; ++m) table[(d * kTerms + l) * kTerms + m] += basis[j][l] * basis[i][m] * value;
      }
  return table;
}

// The bins of a row, or none (count 0) where the sorted form is quicker.
RankBins choose_bins(const float* scores, int64_t n, double tau) {
  float low = std::numeric_limits<float>::max(), high = std::numeric_limits<float>::lowest();
  for (int64_t i = 0; i < n; ++i) {
    const bool finite = scores[i] - scores[i] == 0;
    low = finite && scores[i] < low ? scores[i] : low;
    high = finite && scores[i] > high ? scores[i] : high;
  }
  const double inverse_width = 2 / tau, last = (static_cast<double>(high) - low) * inverse_width;
  const bool pays = n >= kLeastTokens && last >= 0 && last < static_cast<double>(n / kTokensPerBin);
  return {low, inverse_width, pays ? static_cast<int64_t>(last) + 1 : 0};
}

// Moments of one row, [bins, 8], and with weights the weighted ones after them.
std::vector<double> sum_moments(
    const float* scores, const float* weights, float center, int64_t n, const RankBins& bins) {
  const int64_t size = bins.count * kTerms, sets = weights == nullptr ? 1 : 2;
  const int64_t parts = std::clamp<int64_t>(n / kPartTokens, 1, kMostParts), part_tokens = ceil_div(n, parts);
  std::vector<double> sums(static_cast<size_t>(parts * sets * size));
  parallel(parts, 16 * part_tokens, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * part_tokens, count = std::min(part_tokens, n - first);
      double* own = sums.data() + part * sets * size;
      SHIVA_CALL_KERNEL(
          soft_rank_moments, scores + first, weights == nullptr ? nullptr : weights + first, center, count, bins, own,
          weights == nullptr ? nullptr : own + size);
    }
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < sets * size; ++i) sums[i] += sums[part * sets * size + i];
  sums.resize(static_cast<size_t>(sets * size));
  return sums;
}

std::vector<double> convolve(const std::vector<double>& table, const double* moments, int64_t bins) {
  std::vector<double> out(static_cast<size_t>(bins * kTerms));
  const int64_t pairs = std::min<int64_t>(bins, kTables);
  parallel(ceil_div(bins, kBinsPerTask), 16 * kBinsPerTask * pairs, [&](int64_t begin, int64_t end) {
    SHIVA_CALL_KERNEL(
        soft_rank_convolve, table.data(), moments, bins, begin * kBinsPerTask, std::min(end * kBinsPerTask, bins),
        out.data());
  });
  return out;
}

template <typename Body>
void over_tokens(int64_t n, const Body& body) {
  parallel(ceil_div(n, 1024), 8 * 1024, [&](int64_t begin, int64_t end) {
    body(begin * 1024, std::min(end * 1024, n) - begin * 1024);
  });
}

}  // namespace

bool soft_rank_by_moments(const float* scores, int64_t n, double tau, float* out) {
  const RankBins bins = choose_bins(scores, n, tau);
  if (bins.count == 0) return false;
  static const std::vector<double> table = make_table(sigmoid);
  const std::vector<double> moments = sum_moments(scores, nullptr, 0, n, bins);
  std::vector<double> sums = convolve(table, moments.data(), bins.count);
  double above = 0, finite = 0;  // tokens in bins beyond the reach
  for (int64_t b = bins.count - 1; b >= 0; --b) {
    if (b + kReachBins + 1 < bins.count) above += moments[(b + kReachBins + 1) * kTerms];
    sums[b * kTerms] += above;
    finite += moments[b * kTerms];
  }
  double infinite = 0;
  if (finite < static_cast<double>(n))
    infinite = static_cast<double>(std::count(scores, scores + n, std::numeric_limits<float>::infinity()));
  over_tokens(n, [&](int64_t first, int64_t count) {  // each token's pair with itself added one half
    SHIVA_CALL_KERNEL(soft_rank_evaluate, scores + first, count, bins, sums.data(), 0.5 + infinite, out + first);
  });
  return true;
}

bool soft_rank_backward_by_moments(const float* grad, const float* scores, int64_t n, double tau, float* out) {
  const RankBins bins = choose_bins(scores, n, tau);
  if (bins.count == 0) return false;
  static const std::vector<double> table = make_table(sigmoid_slope);
  // The result depends on differences of grad alone. Around their middle the sums lose less.
  double total = 0;
  int64_t finite = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!(grad[i] - grad[i] == 0)) return false;  // it would spoil the sums of its whole surroundings
    if (scores[i] - scores[i] == 0) total += grad[i], ++finite;
  }
  const float center = static_cast<float>(total / static_cast<double>(finite));
  const std::vector<double> moments = sum_moments(scores, grad, center, n, bins);
  const std::vector<double> sums = convolve(table, moments.data(), bins.count);
  const std::vector<double> weighted = convolve(table, moments.data() + bins.count * kTerms, bins.count);
  over_tokens(n, [&](int64_t first, int64_t count) {
    SHIVA_CALL_KERNEL(
        soft_rank_evaluate_backward, scores + first, grad + first, center, count, bins, sums.data(), weighted.data(),
        1 / tau, out + first);
  });
  return true;
}

}  // namespace shiva::cpu
