// The mean of one group's token rows, which lie apart.
#include "cpu/scatter_mean_kernel.h"

#include "micro.h"

namespace shiva::cpu {
using namespace micro;
namespace {

void bench_mean_rows(benchmark::State& state, Dtype dtype) {
  const int64_t D = state.range(0), count = state.range(1), row_bytes = D * bytes_of(dtype);
  Numbers x(dtype, 2 * count * D), out(dtype, D);
  std::vector<int64_t> tokens;
  for (int64_t j = 0; j < count; ++j) tokens.push_back(2 * j + 1);
  const auto run = [&] {
    SHIVA_CALL_KERNEL(
        mean_rows, dtype, static_cast<const char*>(x.data()), row_bytes, tokens.data(), count, D, out.data());
  };
  run();
  for (int64_t d = 0; d < D; ++d) {
    double sum = 0;
    for (int64_t token : tokens) sum += x[token * D + d];
    check_close(out[d], sum / static_cast<double>(count), 4, dtype, "mean_rows");
  }
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, D * count, (count + 1) * row_bytes);
}

void sizes(benchmark::internal::Benchmark* bench) {
  with_deciles(bench)->ArgNames({"D", "tokens"})->ArgsProduct({{1536, 3072}, {2, 8}});
}
BENCHMARK_CAPTURE(bench_mean_rows, float32, Dtype::Float32)->Apply(sizes);
BENCHMARK_CAPTURE(bench_mean_rows, bfloat16, Dtype::BFloat16)->Apply(sizes);

}  // namespace
}  // namespace shiva::cpu

BENCHMARK_MAIN();
