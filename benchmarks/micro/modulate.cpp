// One token row of gather_modulate and of scatter_residual.
#include "cpu/modulate_kernels.h"

#include "micro.h"

namespace shiva::cpu {
using namespace micro;
namespace {

void bench_modulate_row(benchmark::State& state, Dtype dtype) {
  const int64_t D = state.range(0);
  Numbers x(dtype, D), shift(dtype, D), scale(dtype, D, 0.5), out(dtype, D);
  const auto run = [&] {
    SHIVA_CALL_KERNEL(modulate_row, dtype, x.data(), shift.data(), scale.data(), D, 1e-6, out.data());
  };
  run();
  double mean = 0, square = 0;
  for (int64_t d = 0; d < D; ++d) mean += x[d] / static_cast<double>(D);
  for (int64_t d = 0; d < D; ++d) square += (x[d] - mean) * (x[d] - mean) / static_cast<double>(D);
  for (int64_t d = 0; d < D; ++d)
    check_close(out[d], (x[d] - mean) / std::sqrt(square + 1e-6) * (1 + scale[d]) + shift[d], 8, dtype, "modulate_row");
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, D, 4 * D * bytes_of(dtype));
}

void bench_gated_add_row(benchmark::State& state, Dtype dtype) {
  const int64_t D = state.range(0);
  Numbers base(dtype, D), update(dtype, D), gate(dtype, D), out(dtype, D);
  const auto run = [&] {
    SHIVA_CALL_KERNEL(gated_add_row, dtype, base.data(), update.data(), gate.data(), D, out.data());
  };
  run();
  for (int64_t d = 0; d < D; ++d) check_close(out[d], base[d] + gate[d] * update[d], 8, dtype, "gated_add_row");
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, D, 4 * D * bytes_of(dtype));
}

void sizes(benchmark::internal::Benchmark* bench) { with_deciles(bench)->ArgName("D")->Arg(1536)->Arg(3072); }
BENCHMARK_CAPTURE(bench_modulate_row, float32, Dtype::Float32)->Apply(sizes);
BENCHMARK_CAPTURE(bench_modulate_row, bfloat16, Dtype::BFloat16)->Apply(sizes);
BENCHMARK_CAPTURE(bench_gated_add_row, float32, Dtype::Float32)->Apply(sizes);
BENCHMARK_CAPTURE(bench_gated_add_row, bfloat16, Dtype::BFloat16)->Apply(sizes);

}  // namespace
}  // namespace shiva::cpu

BENCHMARK_MAIN();
