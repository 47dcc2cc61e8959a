// On sorted scores only a window of pairs needs evaluating: beyond SigmoidWindow::kReach taus a pair counts 0 or 1.
// With a = exp((s - c) / tau) one exponential per token serves a block of rows: sigmoid((s_j - s_i) / tau) is
// a_j / (a_j + a_i), and its derivative a_i a_j / (a_i + a_j)^2.
#include "cpu/soft_rank_kernel.h"

#include "core/sigmoid_window.h"
#include "cpu/scalar.h"

namespace shiva::cpu::SHIVA_ISA {
namespace {

// Partial sums of this many pairs are kept in the working precision, then added up in double.
constexpr int64_t kChunk = 1024;

template <typename T>
int64_t lower_bound(const T* sorted, int64_t n, T value) {  // first i with sorted[i] >= value
  int64_t low = 0;
  while (n > 0) {
    const int64_t half = n / 2;
    if (sorted[low + half] < value) {
      low += half + 1;
      n -= half + 1;
    } else {
      n = half;
    }
  }
  return low;
}

// Calls row_sum(i, a, first, last) for each i in [begin, end), where a[j - first] holds the exponentials of the
// tokens [first, last) that are within reach of i; tokens below first count 0, tokens from last on count 1.
template <typename T, typename RowSum>
void for_each_window(const T* sorted, int64_t n, int64_t begin, int64_t end, T tau, T* scratch, const RowSum& row_sum) {
  const T reach = SigmoidWindow<T>::kReach * tau;
  while (begin < end) {
    int64_t stop = begin + 1;
    while (stop < end && sorted[stop] - sorted[begin] <= SigmoidWindow<T>::kBlockSpan * tau) ++stop;
    const int64_t first = lower_bound(sorted, n, sorted[begin] - reach);
    int64_t last = lower_bound(sorted, n, sorted[stop - 1] + reach);
    while (last < n && sorted[last] == sorted[stop - 1]) ++last;  // reach underflowed to zero
    const T center = sorted[begin + (stop - begin) / 2];
#pragma omp simd
    for (int64_t j = first; j < last; ++j) scratch[j - first] = exp_clamped((sorted[j] - center) / tau);
    for (int64_t i = begin; i < stop; ++i) row_sum(i, scratch, first, last);
    begin = stop;
  }
}

template <typename T>
void forward(const T* sorted, int64_t n, int64_t begin, int64_t end, T tau, T* scratch, T* rank) {
  for_each_window(sorted, n, begin, end, tau, scratch, [&](int64_t i, const T* a, int64_t first, int64_t last) {
    const T ai = a[i - first];
    double total = static_cast<double>(n - last);
    for (int64_t j = 0; j < last - first; j += kChunk) {
      const int64_t stop = j + kChunk < last - first ? j + kChunk : last - first;
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t l = j; l < stop; ++l) sum += a[l] / (a[l] + ai);
      total += sum;
    }
    rank[i] = static_cast<T>(0.5 + total);  // the pair (i, i) added exactly one half
  });
}

template <typename T>
void backward(const T* sorted, const T* grad, int64_t n, int64_t begin, int64_t end, T tau, T* scratch, T* out) {
  for_each_window(sorted, n, begin, end, tau, scratch, [&](int64_t i, const T* a, int64_t first, int64_t last) {
    const T ai = a[i - first], gi = grad[i];
    double total = 0;
    for (int64_t j = 0; j < last - first; j += kChunk) {
      const int64_t stop = j + kChunk < last - first ? j + kChunk : last - first;
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t l = j; l < stop; ++l) {
        const T inverse = T(1) / (a[l] + ai);
        sum += (a[l] * inverse) * (ai * inverse) * (grad[first + l] - gi);
      }
      total += sum;
    }
    out[i] = static_cast<T>(total / tau);
  });
}

template <typename T>
T* as(void* pointer) {
  return static_cast<T*>(pointer);
}
template <typename T>
const T* as(const void* pointer) {
  return static_cast<const T*>(pointer);
}

}  // namespace

void soft_rank_range(
    Dtype dtype, const void* sorted, int64_t n, int64_t begin, int64_t end, double tau, void* scratch, void* rank) {
  if (dtype == Dtype::Float64)
    forward<double>(as<double>(sorted), n, begin, end, tau, as<double>(scratch), as<double>(rank));
  else
    forward<float>(as<float>(sorted), n, begin, end, static_cast<float>(tau), as<float>(scratch), as<float>(rank));
}

void soft_rank_backward_range(
    Dtype dtype, const void* sorted, const void* grad, int64_t n, int64_t begin, int64_t end, double tau, void* scratch,
    void* out) {
  if (dtype == Dtype::Float64)
    backward<double>(as<double>(sorted), as<double>(grad), n, begin, end, tau, as<double>(scratch), as<double>(out));
  else
    backward<float>(
        as<float>(sorted), as<float>(grad), n, begin, end, static_cast<float>(tau), as<float>(scratch), as<float>(out));
}

}  // namespace shiva::cpu::SHIVA_ISA
