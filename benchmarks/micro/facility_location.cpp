// One greedy choice of half of n tokens, whose similarities are cosines.
#include "cpu/facility_location_kernel.h"

#include "micro.h"

namespace shiva::cpu {
using namespace micro;
namespace {

void bench_choose_facilities(benchmark::State& state) {
  constexpr int64_t kChannels = 16;
  const int64_t n = state.range(0), count = n / 2;
  Numbers x(Dtype::Float64, n * kChannels);
  std::vector<float> similarity(static_cast<size_t>(n * n));  // equal to its transpose
  const auto dot = [&](int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t c = 0; c < kChannels; ++c) sum += x[i * kChannels + c] * x[j * kChannels + c];
    return sum;
  };
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      similarity[static_cast<size_t>(i * n + j)] = static_cast<float>(dot(i, j) / std::sqrt(dot(i, i) * dot(j, j)));
  std::vector<char> scratch(static_cast<size_t>(facility_scratch_bytes(n)));
  std::vector<int64_t> chosen(static_cast<size_t>(count));
  const auto run = [&] {
    SHIVA_CALL_KERNEL(choose_facilities, Dtype::Float32, similarity.data(), n, count, scratch.data(), chosen.data());
  };
  run();
  std::vector<double> covered(static_cast<size_t>(n), -1);
  std::vector<bool> taken(static_cast<size_t>(n));
  for (int64_t step = 0; step < count; ++step) {
    int64_t best = -1;
    double most = -1;
    for (int64_t j = 0; j < n; ++j) {
      double gain = 0;
      for (int64_t i = 0; i < n; ++i) gain += std::max(similarity[i * n + j] - covered[i], 0.0);
      if (!taken[j] && gain > most) most = gain, best = j;
    }
    taken[best] = true;
    for (int64_t i = 0; i < n; ++i) covered[i] = std::max<double>(covered[i], similarity[i * n + best]);
  }
  check(std::all_of(chosen.begin(), chosen.end(), [&](int64_t j) { return taken[j]; }), "choose_facilities");
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, n, n * n * 4);
}

BENCHMARK(bench_choose_facilities)->Apply([](benchmark::internal::Benchmark* bench) {
  with_deciles(bench)->ArgName("n")->Arg(16)->Arg(64)->Arg(256);
});

}  // namespace
}  // namespace shiva::cpu

BENCHMARK_MAIN();
