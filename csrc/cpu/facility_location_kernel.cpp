// The greedy choice. Among more than a few tokens lazily (Minoux 1978): what a column gains only shrinks while others
// are chosen, also when rounded, as the order of its sum is fixed. So the gain of an earlier step is an upper bound,
// and only columns that might beat the best so far are looked at again.
#include "cpu/facility_location_kernel.h"

#include "core/ordered_key.h"
#include "cpu/scalar.h"

namespace shiva::cpu::SHIVA_ISA {
namespace {

constexpr int kSums = 32;  // row i goes into sum i % kSums: the order that the reference and the CUDA kernels keep
static_assert(kFewFacilities <= kSums, "a partial sum would have two rows");
// Keys: less than that of any gain; of a column not yet looked at; of an infinite gain.
constexpr uint64_t kTaken = 0, kUnknown = 1, kInfinite = 0xfff0000000000000ull;

inline double positive(double x) { return !(x <= 0) ? x : 0; }  // NaN stays

// sum over i of max(column_i - covered_i, 0), as an ordered key: a NaN is largest.
template <typename T>
uint64_t gain_of(const T* column, const acc_t<T>* covered, int64_t n) {
  double sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
#pragma omp simd
    for (int l = 0; l < kSums; ++l)
      sum[l] += positive(static_cast<double>(load(column[i + l])) - static_cast<double>(covered[i + l]));
  const int rest = static_cast<int>(n - i);
#pragma omp simd
  for (int l = 0; l < rest; ++l)
    sum[l] += positive(static_cast<double>(load(column[i + l])) - static_cast<double>(covered[i + l]));
  for (int half = kSums / 2; half > 0; half /= 2)
#pragma omp simd
    for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
  return ordered_key(__builtin_bit_cast(uint64_t, sum[0]));
}

bool beats(const uint64_t* keys, int64_t a, int64_t b) { return keys[a] > keys[b] || (keys[a] == keys[b] && a < b); }

// The first of the largest keys.
int64_t best_of(const uint64_t* keys, int64_t n) {
  uint64_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < n; ++j) largest = keys[j] > largest ? keys[j] : largest;
  int64_t j = 0;
  while (keys[j] != largest) ++j;
  return j;
}

template <typename T>
void cover(const T* column, int64_t stride, int64_t n, acc_t<T>* covered) {
  for (int64_t i = 0; i < n; ++i) {
    const acc_t<T> s = load(column[i * stride]);
    covered[i] = s > covered[i] || s != s ? s : covered[i];
  }
}

// Few tokens: the gains of all columns together, a vector of columns at a time. terms: [n, n].
template <typename T>
void gains_of_all(const T* rows, const acc_t<T>* covered, int64_t n, double* terms, uint64_t* keys) {
  for (int64_t i = 0; i < n; ++i) {
    const double least = static_cast<double>(covered[i]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) terms[i * n + j] = positive(static_cast<double>(load(rows[i * n + j])) - least);
  }
  for (int64_t half = kSums / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half && l + half < n; ++l)
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) terms[l * n + j] += terms[(l + half) * n + j];
  for (int64_t j = 0; j < n; ++j)
    if (keys[j] != kTaken) keys[j] = ordered_key(__builtin_bit_cast(uint64_t, terms[j]));
}

template <typename T>
void choose_among_few(const T* rows, int64_t n, int64_t count, acc_t<T>* covered, double* terms, uint64_t* keys) {
  for (int64_t step = 0; step < count; ++step) {
    gains_of_all(rows, covered, n, terms, keys);
    const int64_t best = best_of(keys, n);
    cover(rows + best, n, n, covered);
    keys[best] = kTaken;
  }
}

template <typename T>
void choose_lazily(const T* columns, int64_t n, int64_t count, acc_t<T>* covered, uint64_t* keys) {
  const auto refresh = [&](int64_t j) { keys[j] = gain_of(columns + j * n, covered, n); };
  for (int64_t j = 0; j < n; ++j) refresh(j);
  bool lazy = true;
  for (int64_t step = 0; step < count; ++step) {
    for (int64_t j = 0; !lazy && j < n; ++j)
      if (keys[j] != kTaken) refresh(j);
    int64_t best = best_of(keys, n);
    refresh(best);
    for (int64_t j = 0; j < n; ++j) {
      if (!beats(keys, j, best)) continue;
      refresh(j);
      if (beats(keys, j, best)) best = j;
    }
    cover(columns + best * n, 1, n, covered);
    if (keys[best] >= kInfinite) lazy = false;  // from here on a gain may become NaN, which is more than it was
    keys[best] = kTaken;
  }
}

}  // namespace

void choose_facilities(Dtype dtype, const void* similarity, int64_t n, int64_t count, void* scratch, int64_t* chosen) {
  double* terms = static_cast<double*>(scratch);
  uint64_t* keys = reinterpret_cast<uint64_t*>(terms + (n <= kFewFacilities ? n * n : 0));
  for (int64_t j = 0; j < n; ++j) keys[j] = kUnknown;
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    A* covered = reinterpret_cast<A*>(keys + n);      // the largest similarity to a chosen token
    for (int64_t i = 0; i < n; ++i) covered[i] = -1;  // no cosine is less
    if (n <= kFewFacilities)
      choose_among_few(static_cast<const T*>(similarity), n, count, covered, terms, keys);
    else
      choose_lazily(static_cast<const T*>(similarity), n, count, covered, keys);
  });
  for (int64_t j = 0; j < n; ++j)
    if (keys[j] == kTaken) *chosen++ = j;
}

}  // namespace shiva::cpu::SHIVA_ISA
