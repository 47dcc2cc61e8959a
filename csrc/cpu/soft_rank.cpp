#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "cpu/launch.h"
#include "cpu/soft_rank_kernel.h"
#include "cpu/soft_rank_moments.h"

namespace shiva::cpu {
namespace {

// Rows [0, chunk), [chunk, 2 chunk), ... of a sorted row are independent tasks, whatever the number of threads.
constexpr int64_t kChunk = 256;

// One row of scores, sorted: finite values ascending in [low, high), -inf before, +inf after.
template <typename T>
struct SortedRow {
  std::vector<T> values;
  std::vector<int32_t> order;  // values[i] = scores[order[i]]
  int64_t low = 0, high = 0;
  bool has_nan = false;
};

template <typename T>
SortedRow<T> sort_row(const T* scores, int64_t n) {
  SortedRow<T> row;
  row.has_nan = std::any_of(scores, scores + n, [](T s) { return std::isnan(s); });
  if (row.has_nan) return row;
  row.order.resize(static_cast<size_t>(n));
  std::iota(row.order.begin(), row.order.end(), 0);
  std::sort(row.order.begin(), row.order.end(), [&](int32_t a, int32_t b) {
    return scores[a] != scores[b] ? scores[a] < scores[b] : a < b;
  });
  row.values.reserve(row.order.size());
  for (int32_t i : row.order) row.values.push_back(scores[i]);
  const T inf = std::numeric_limits<T>::infinity();
  row.low = std::upper_bound(row.values.begin(), row.values.end(), -inf) - row.values.begin();
  row.high = std::lower_bound(row.values.begin(), row.values.end(), inf) - row.values.begin();
  return row;
}

// The results of infinite scores: NaN where there are two of them, inf - inf, else the limits lone_low and lone_high.
template <typename T>
void fill_infinite(const T* scores, int64_t n, T lone_low, T lone_high, T* out) {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const auto low = std::count(scores, scores + n, -inf), high = std::count(scores, scores + n, inf);
  if (low + high == 0) return;
  for (int64_t i = 0; i < n; ++i) {
    if (scores[i] == -inf) out[i] = low > 1 ? nan : lone_low;
    if (scores[i] == inf) out[i] = high > 1 ? nan : lone_high;
  }
}

template <typename T>
bool by_moments(const T*, const T*, int64_t, double, T*) {
  return false;  // float64 wants more digits than the moments give
}
bool by_moments(const float* grad, const float* scores, int64_t n, double tau, float* out) {
  if (std::any_of(scores, scores + n, [](float s) { return std::isnan(s); })) return false;
  return grad == nullptr ? soft_rank_by_moments(scores, n, tau, out)
                         : soft_rank_backward_by_moments(grad, scores, n, tau, out);
}

// grad: null forward. lone_low and lone_high: see fill_infinite.
template <typename T, typename Compute>
void run(const T* grad, const Tensor& dense, double tau, T lone_low, T lone_high, T* out, const Compute& compute) {
  const int64_t B = dense.size(0), N = dense.size(1);
  if (B == 0 || N == 0) return;
  for (int64_t b = 0; b < B; ++b) {
    const T* scores = data<T>(dense) + b * N;
    T* result = out + b * N;
    if (!by_moments(grad == nullptr ? nullptr : grad + b * N, scores, N, tau, result)) {
      const SortedRow<T> row = N > 1 ? sort_row(scores, N) : SortedRow<T>{{T(0)}, {0}, 0, 1, false};
      if (row.has_nan) {
        std::fill(result, result + N, std::numeric_limits<T>::quiet_NaN());
        continue;
      }
      compute(row, b, N, result);
    }
    if (N > 1) fill_infinite(scores, N, lone_low, lone_high, result);
  }
}

template <typename T>
void forward(const Tensor& dense, const Tensor& out, Dtype dtype, double tau) {
  const T* none = nullptr;
  const T last = static_cast<T>(dense.size(1));
  run<T>(none, dense, tau, last, T(1), data<T>(out), [&](const SortedRow<T>& row, int64_t, int64_t N, T* result) {
    const int64_t finite = row.high - row.low;
    const T above = static_cast<T>(N - row.high);
    parallel(ceil_div(finite, kChunk), kChunk * finite, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<T[]> scratch(new T[static_cast<size_t>(finite)]);
      const std::unique_ptr<T[]> ranks(new T[static_cast<size_t>(finite)]);
      const int64_t first = begin * kChunk, last = std::min(end * kChunk, finite);
      for (int64_t i = first; i < last; i += kChunk)
        SHIVA_CALL_KERNEL(
            soft_rank_range, dtype, row.values.data() + row.low, finite, i, std::min(i + kChunk, last), tau,
            scratch.get(), ranks.get());
      for (int64_t i = first; i < last; ++i) result[row.order[row.low + i]] = ranks[i] + above;
    });
  });
}

template <typename T>
void backward(const Tensor& grad, const Tensor& dense, const Tensor& out, Dtype dtype, double tau) {
  const auto by_windows = [&](const SortedRow<T>& row, int64_t b, int64_t N, T* result) {
    const int64_t finite = row.high - row.low;
    const T* row_grad = data<T>(grad) + b * N;
    std::vector<T> sorted_grad(static_cast<size_t>(finite));
    for (int64_t i = 0; i < finite; ++i) sorted_grad[i] = row_grad[row.order[row.low + i]];
    parallel(ceil_div(finite, kChunk), kChunk * finite, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<T[]> scratch(new T[static_cast<size_t>(finite)]);
      const std::unique_ptr<T[]> grads(new T[static_cast<size_t>(finite)]);
      const int64_t first = begin * kChunk, last = std::min(end * kChunk, finite);
      for (int64_t i = first; i < last; i += kChunk)
        SHIVA_CALL_KERNEL(
            soft_rank_backward_range, dtype, row.values.data() + row.low, sorted_grad.data(), finite, i,
            std::min(i + kChunk, last), tau, scratch.get(), grads.get());
      for (int64_t i = first; i < last; ++i) result[row.order[row.low + i]] = grads[i];
    });
  };
  run<T>(data<T>(grad), dense, tau, T(0), T(0), data<T>(out), by_windows);
}

Tensor soft_rank(const Tensor& scores, double tau) {
  check_soft_rank("soft_rank", scores, tau, kPlace);
  const ScalarType type = accumulate_type(scores);
  const Tensor dense = torch::stable::contiguous(torch::stable::to(scores, type));
  Tensor out = new_empty(scores, {scores.size(0), scores.size(1)}, type);
  if (type == ScalarType::Double)
    forward<double>(dense, out, Dtype::Float64, tau);
  else
    forward<float>(dense, out, Dtype::Float32, tau);
  return out;
}

Tensor soft_rank_backward(const Tensor& grad, const Tensor& scores, double tau) {
  check_soft_rank_backward("soft_rank_backward", grad, scores, tau, kPlace);
  const ScalarType type = accumulate_type(scores);
  const Tensor dense = torch::stable::contiguous(torch::stable::to(scores, type));
  const Tensor dense_grad = torch::stable::contiguous(torch::stable::to(grad, type));
  Tensor out = new_empty(scores, {scores.size(0), scores.size(1)}, type);
  if (type == ScalarType::Double)
    backward<double>(dense_grad, dense, out, Dtype::Float64, tau);
  else
    backward<float>(dense_grad, dense, out, Dtype::Float32, tau);
  return torch::stable::to(out, scores.scalar_type());
}

}  // namespace
}  // namespace shiva::cpu

STABLE_TORCH_LIBRARY_IMPL(shiva, CPU, m) {
  m.impl("soft_rank", TORCH_BOX(&shiva::cpu::soft_rank));
  m.impl("soft_rank_backward", TORCH_BOX(&shiva::cpu::soft_rank_backward));
}
