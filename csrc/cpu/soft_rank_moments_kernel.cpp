#include "cpu/soft_rank_moments_kernel.h"

namespace shiva::cpu::SHIVA_ISA {
namespace {

constexpr int64_t kBlock = 64;  // tokens whose bins are found together, which vectorises

// Bins and places of up to kBlock tokens; the bin is -1 where the token is infinite.
struct Places {
  int64_t bin[kBlock];
  double x[kBlock];
  Places(const float* scores, int64_t n, const RankBins& bins) {
    for (int64_t i = 0; i < n; ++i) {
      const bool finite = scores[i] - scores[i] == 0;
      const double place = finite ? (static_cast<double>(scores[i]) - bins.origin) * bins.inverse_width : 0;
      const int64_t last = bins.count - 1, at = static_cast<int64_t>(place), clamped = at < last ? at : last;
      bin[i] = finite ? clamped : -1;
      x[i] = 2 * (place - static_cast<double>(clamped)) - 1;
    }
  }
};

// 1, x, ..., x^7
struct Powers {
  double of[kTerms];
  explicit Powers(double x) {
    const double x2 = x * x, x4 = x2 * x2, x3 = x2 * x;
    of[0] = 1, of[1] = x, of[2] = x2, of[3] = x3;
    of[4] = x4, of[5] = x4 * x, of[6] = x4 * x2, of[7] = x4 * x3;
  }
};

inline double polynomial(const double* sums, const Powers& powers) {
  double even = 0, odd = 0;
  for (int m = 0; m < kTerms; m += 2) {
    even += sums[m] * powers.of[m];
    odd += sums[m + 1] * powers.of[m + 1];
  }
  return even + odd;
}

// Eight numbers at once, in as many registers as the instruction set needs.
typedef double Row __attribute__((vector_size(kTerms * sizeof(double))));
inline Row row_at(const double* rows, int64_t i) {
  Row row;
  __builtin_memcpy(&row, rows + i * kTerms, sizeof row);
  return row;
}

}  // namespace

void soft_rank_moments(
    const float* scores, const float* weights, float center, int64_t n, const RankBins& bins, double* moments,
    double* weighted) {
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t count = n - first < kBlock ? n - first : kBlock;
    const Places places(scores + first, count, bins);
    for (int64_t i = 0; i < count; ++i) {
      if (places.bin[i] < 0) continue;
      const Powers powers(places.x[i]);
      double* moment = moments + places.bin[i] * kTerms;
      for (int m = 0; m < kTerms; ++m) moment[m] += powers.of[m];
      if (weights == nullptr) continue;
      const double weight = static_cast<double>(weights[first + i]) - center;
      double* other = weighted + places.bin[i] * kTerms;
      for (int m = 0; m < kTerms; ++m) other[m] += weight * powers.of[m];
    }
  }
}

void soft_rank_convolve(
    const double* table, const double* moments, int64_t count, int64_t begin, int64_t end, double* out) {
  for (int64_t i = begin * kTerms; i < end * kTerms; ++i) out[i] = 0;
  for (int64_t d = -kReachBins; d <= kReachBins; ++d) {
    const double* matrix = table + (d + kReachBins) * kTerms * kTerms;  // [term of j][term of i]
    const Row rows[kTerms] = {row_at(matrix, 0), row_at(matrix, 1), row_at(matrix, 2), row_at(matrix, 3),
                              row_at(matrix, 4), row_at(matrix, 5), row_at(matrix, 6), row_at(matrix, 7)};
    const int64_t first = begin > -d ? begin : -d, last = end < count - d ? end : count - d;
    for (int64_t b = first; b < last; ++b) {
      const double* moment = moments + (b + d) * kTerms;
      Row even = rows[0] * moment[0], odd = rows[1] * moment[1];
      for (int l = 2; l < kTerms; l += 2) even += rows[l] * moment[l], odd += rows[l + 1] * moment[l + 1];
      const Row sum = row_at(out, b) + (even + odd);
      __builtin_memcpy(out + b * kTerms, &sum, sizeof sum);
    }
  }
}

void soft_rank_evaluate(
    const float* scores, int64_t n, const RankBins& bins, const double* sums, double constant, float* rank) {
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t count = n - first < kBlock ? n - first : kBlock;
    const Places places(scores + first, count, bins);
    for (int64_t i = 0; i < count; ++i)
      if (places.bin[i] >= 0)
        rank[first + i] = static_cast<float>(constant + polynomial(sums + places.bin[i] * kTerms, Powers(places.x[i])));
  }
}

void soft_rank_evaluate_backward(
    const float* scores, const float* grad, float center, int64_t n, const RankBins& bins, const double* sums,
    const double* weighted, double factor, float* out) {
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t count = n - first < kBlock ? n - first : kBlock;
    const Places places(scores + first, count, bins);
    for (int64_t i = 0; i < count; ++i) {
      if (places.bin[i] < 0) continue;
      const Powers powers(places.x[i]);
      const double plain = polynomial(sums + places.bin[i] * kTerms, powers);
      const double own = static_cast<double>(grad[first + i]) - center;
      const double others = polynomial(weighted + places.bin[i] * kTerms, powers);
      out[first + i] = static_cast<float>(factor * (others - own * plain));
    }
  }
}

}  // namespace shiva::cpu::SHIVA_ISA
