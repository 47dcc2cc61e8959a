// The parts of soft_rank: moments, their convolution and evaluation for long rows, windows of pairs for the others.
#include <algorithm>

#include "cpu/soft_rank_kernel.h"
#include "cpu/soft_rank_moments_kernel.h"
#include "micro.h"

namespace shiva::cpu {
using namespace micro;
namespace {

struct MomentRow {
  int64_t n;
  Numbers scores;
  RankBins bins;
  std::vector<double> moments;

  explicit MomentRow(int64_t n) : n(n), scores(Dtype::Float32, n) {
    double low = scores[0], high = scores[0];
    for (int64_t i = 0; i < n; ++i) low = std::min(low, scores[i]), high = std::max(high, scores[i]);
    bins = {low, 10, static_cast<int64_t>((high - low) * 10) + 1};  // tau = 0.2
    moments.resize(static_cast<size_t>(bins.count * kTerms));
  }
  const float* values() { return static_cast<const float*>(scores.data()); }
  void add() {
    const float* none = nullptr;
    SHIVA_CALL_KERNEL(soft_rank_moments, values(), none, 0.0f, n, bins, moments.data(), nullptr);
  }
};

void bench_soft_rank_moments(benchmark::State& state) {
  MomentRow row(state.range(0));
  row.add();
  double tokens = 0;
  for (int64_t b = 0; b < row.bins.count; ++b) tokens += row.moments[b * kTerms];
  check(tokens == static_cast<double>(row.n), "soft_rank_moments");
  for (auto _ : state) {
    row.add();
    benchmark::ClobberMemory();
  }
  set_rates(state, row.n, 4 * row.n);
}

void bench_soft_rank_convolve(benchmark::State& state) {
  const int64_t count = state.range(0);
  Numbers table(Dtype::Float64, (2 * kReachBins + 1) * kTerms * kTerms), moments(Dtype::Float64, count * kTerms);
  std::vector<double> out(static_cast<size_t>(count * kTerms));
  const auto run = [&] {
    SHIVA_CALL_KERNEL(
        soft_rank_convolve, static_cast<const double*>(table.data()), static_cast<const double*>(moments.data()), count,
        0, count, out.data());
  };
  run();
  for (int64_t m = 0; m < kTerms; ++m) {
    double wanted = 0;
    for (int64_t d = 0; d <= std::min<int64_t>(kReachBins, count - 1); ++d)
      for (int64_t l = 0; l < kTerms; ++l)
        wanted += table[((d + kReachBins) * kTerms + l) * kTerms + m] * moments[d * kTerms + l];
    check_close(out[m], wanted, 1000, Dtype::Float64, "soft_rank_convolve");
  }
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, count * std::min<int64_t>(count, 2 * kReachBins + 1) * kTerms * kTerms, 0);
}

void bench_soft_rank_evaluate(benchmark::State& state) {
  MomentRow row(state.range(0));
  for (int64_t b = 0; b < row.bins.count; ++b) row.moments[b * kTerms] = static_cast<double>(b);
  std::vector<float> rank(static_cast<size_t>(row.n));
  const auto run = [&] {
    SHIVA_CALL_KERNEL(soft_rank_evaluate, row.values(), row.n, row.bins, row.moments.data(), 0.5, rank.data());
  };
  run();
  for (int64_t i = 0; i < row.n; ++i)
    check(std::abs(rank[i] - (row.scores[i] - row.bins.origin) * 10 - 0.0) <= 0.51, "soft_rank_evaluate");
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, row.n, 8 * row.n);
}

void bench_soft_rank_range(benchmark::State& state) {
  const int64_t n = state.range(0);
  Numbers scores(Dtype::Float32, n);
  float* sorted = static_cast<float*>(scores.data());
  std::sort(sorted, sorted + n);
  std::vector<float> scratch(static_cast<size_t>(n)), rank(scratch);
  const double tau = 0.02;
  const auto run = [&] {
    SHIVA_CALL_KERNEL(soft_rank_range, Dtype::Float32, sorted, n, 0, n, tau, scratch.data(), rank.data());
  };
  run();
  for (int64_t i = 0; i < n; i += std::max<int64_t>(n / 7, 1)) {
    double wanted = 0.5;
    for (int64_t j = 0; j < n; ++j) wanted += 1 / (1 + std::exp((scores[i] - scores[j]) / tau));
    check_close(rank[i], wanted, static_cast<double>(n), Dtype::Float32, "soft_rank_range");
  }
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, n, 0);
}

void bins(benchmark::internal::Benchmark* bench) { with_deciles(bench)->ArgName("bins")->Arg(80)->Arg(800); }
void short_rows(benchmark::internal::Benchmark* bench) { with_deciles(bench)->ArgName("n")->Arg(256)->Arg(4096); }
void tokens(benchmark::internal::Benchmark* bench) { with_deciles(bench)->ArgName("n")->Arg(4096)->Arg(65536); }
BENCHMARK(bench_soft_rank_moments)->Apply(tokens);
BENCHMARK(bench_soft_rank_convolve)->Apply(bins);
BENCHMARK(bench_soft_rank_evaluate)->Apply(tokens);
BENCHMARK(bench_soft_rank_range)->Apply(short_rows);

}  // namespace
}  // namespace shiva::cpu

BENCHMARK_MAIN();
