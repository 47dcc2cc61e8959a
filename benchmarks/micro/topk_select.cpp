// One row of topk_select: scores[n] -> kept[k], rejected[n - k].
#include "cpu/topk_select_kernel.h"

#include <algorithm>
#include <numeric>

#include "micro.h"

namespace shiva::cpu {
using namespace micro;
namespace {

void bench_topk_select_row(benchmark::State& state, Dtype dtype) {
  const int64_t n = state.range(0), k = n * state.range(1) / 10;
  Numbers scores(dtype, n);
  std::vector<char> keys(static_cast<size_t>(16 * n));
  std::vector<int64_t> kept(static_cast<size_t>(k)), rejected(static_cast<size_t>(n - k));
  const auto run = [&] {
    SHIVA_CALL_KERNEL(topk_select_row, dtype, scores.data(), n, k, keys.data(), kept.data(), rejected.data());
  };
  run();
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  std::sort(order.begin(), order.begin() + k);
  check(std::equal(kept.begin(), kept.end(), order.begin()), "topk_select_row");
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, n, n * (bytes_of(dtype) + 8));
}

void sizes(benchmark::internal::Benchmark* bench) {
  with_deciles(bench)->ArgNames({"n", "tenths"})->ArgsProduct({{1024, 4096, 16384, 65536}, {4, 6, 8}});
}
BENCHMARK_CAPTURE(bench_topk_select_row, float32, Dtype::Float32)->Apply(sizes);
BENCHMARK_CAPTURE(bench_topk_select_row, bfloat16, Dtype::BFloat16)->Apply(sizes);

}  // namespace
}  // namespace shiva::cpu

BENCHMARK_MAIN();
