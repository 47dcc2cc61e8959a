// One token row of residual_gate's and of counterfactual_scatter's backward.
#include "cpu/gate_kernels.h"

#include "micro.h"

namespace shiva::cpu {
using namespace micro;
namespace {

void bench_residual_gate_row(benchmark::State& state, Dtype dtype, bool kept) {
  const int64_t D = state.range(0);
  Numbers x(dtype, D), base(dtype, D), gate(dtype, D), out(dtype, D);
  float inclusion = 0;
  const auto run = [&] {
    SHIVA_CALL_KERNEL(
        residual_gate_row, dtype, x.data(), base.data(), kept ? gate.data() : nullptr, D, out.data(), &inclusion);
  };
  run();
  double sum = 0;
  for (int64_t d = 0; d < D; ++d) {
    sum += kept ? gate[d] * x[d] : -base[d] * x[d];
    check_close(out[d], base[d] + (kept ? gate[d] : 0), 8, dtype, "residual_gate_row");
  }
  check_close(inclusion, sum, static_cast<double>(D), Dtype::Float32, "residual_gate_row's inclusion");
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, D, (kept ? 4 : 3) * D * bytes_of(dtype));
}

void bench_counterfactual_row(benchmark::State& state, Dtype dtype, bool kept) {
  const int64_t D = state.range(0);
  const double kappa = 0.25;
  Numbers grad(dtype, D), base(dtype, D, 2), src(dtype, D, 3), update(dtype, D, 0.5);
  float inclusion = 0;
  const auto run = [&] {
    SHIVA_CALL_KERNEL(
        counterfactual_row, dtype, grad.data(), base.data(), kept ? src.data() : nullptr, update.data(), D, kappa,
        &inclusion);
  };
  run();
  double sum = 0;
  for (int64_t d = 0; d < D; ++d)
    sum += kept ? grad[d] * (src[d] - base[d]) - kappa * update[d] * update[d]
                : grad[d] * update[d] + kappa * update[d] * update[d];
  check_close(inclusion, sum, 8 * static_cast<double>(D), Dtype::Float32, "counterfactual_row");
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, D, (kept ? 4 : 2) * D * bytes_of(dtype));
}

void sizes(benchmark::internal::Benchmark* bench) { with_deciles(bench)->ArgName("D")->Arg(1536)->Arg(3072); }
BENCHMARK_CAPTURE(bench_residual_gate_row, float32_kept, Dtype::Float32, true)->Apply(sizes);
BENCHMARK_CAPTURE(bench_residual_gate_row, float32_rejected, Dtype::Float32, false)->Apply(sizes);
BENCHMARK_CAPTURE(bench_residual_gate_row, bfloat16_kept, Dtype::BFloat16, true)->Apply(sizes);
BENCHMARK_CAPTURE(bench_residual_gate_row, bfloat16_rejected, Dtype::BFloat16, false)->Apply(sizes);
BENCHMARK_CAPTURE(bench_counterfactual_row, float32_kept, Dtype::Float32, true)->Apply(sizes);
BENCHMARK_CAPTURE(bench_counterfactual_row, bfloat16_kept, Dtype::BFloat16, true)->Apply(sizes);
BENCHMARK_CAPTURE(bench_counterfactual_row, bfloat16_rejected, Dtype::BFloat16, false)->Apply(sizes);

}  // namespace
}  // namespace shiva::cpu

BENCHMARK_MAIN();
