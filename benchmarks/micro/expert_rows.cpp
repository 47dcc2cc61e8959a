// One token's weighted sum of its experts' rows, and the gradient of one of these rows.
#include "cpu/expert_rows_kernel.h"

#include "micro.h"

namespace shiva::cpu {
using namespace micro;
namespace {

void bench_add_placed_rows(benchmark::State& state, Dtype dtype) {
  const int64_t D = state.range(0), count = state.range(1), row_bytes = D * bytes_of(dtype);
  Numbers rows(dtype, 3 * count * D), out(dtype, D), weight(Dtype::Float32, count);
  std::vector<int64_t> place;
  for (int64_t j = 0; j < count; ++j) place.push_back(3 * j + 1);
  const auto run = [&] {
    SHIVA_CALL_KERNEL(
        add_placed_rows, dtype, static_cast<const char*>(rows.data()), row_bytes, place.data(), weight.data(), count, D,
        out.data());
  };
  run();
  for (int64_t d = 0; d < D; ++d) {
    double sum = 0;
    for (int64_t j = 0; j < count; ++j) sum += weight[j] * rows[place[static_cast<size_t>(j)] * D + d];
    check_close(out[d], sum, 16, dtype, "add_placed_rows");
  }
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, D * count, (count + 1) * row_bytes);
}

void bench_weighted_row_backward(benchmark::State& state, Dtype dtype) {
  const int64_t D = state.range(0);
  Numbers both(dtype, 2 * D), weight(Dtype::Float32, 1), grad_row(dtype, D), grad_weight(Dtype::Float32, 1);
  const auto run = [&] {
    SHIVA_CALL_KERNEL(
        weighted_row_backward, dtype, both.row(0, D), both.row(1, D), weight.data(), D, grad_row.data(),
        grad_weight.data());
  };
  run();
  double sum = 0;
  for (int64_t d = 0; d < D; ++d) {
    check_close(grad_row[d], weight[0] * both[d], 4, dtype, "weighted_row_backward");
    sum += both[d] * both[D + d];
  }
  check_close(grad_weight[0], sum, std::sqrt(static_cast<double>(D)), Dtype::Float32, "weighted_row_backward's sum");
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, D, 3 * D * bytes_of(dtype));
}

void sums(benchmark::internal::Benchmark* bench) {
  with_deciles(bench)->ArgNames({"D", "rows"})->ArgsProduct({{384, 1152}, {2, 6}});
}
void rows(benchmark::internal::Benchmark* bench) { with_deciles(bench)->ArgNames({"D"})->Arg(384)->Arg(1152); }
BENCHMARK_CAPTURE(bench_add_placed_rows, float32, Dtype::Float32)->Apply(sums);
BENCHMARK_CAPTURE(bench_add_placed_rows, bfloat16, Dtype::BFloat16)->Apply(sums);
BENCHMARK_CAPTURE(bench_weighted_row_backward, float32, Dtype::Float32)->Apply(rows);
BENCHMARK_CAPTURE(bench_weighted_row_backward, bfloat16, Dtype::BFloat16)->Apply(rows);

}  // namespace
}  // namespace shiva::cpu

BENCHMARK_MAIN();
