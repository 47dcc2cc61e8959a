// What router_score does with each token after its matrix product, and the backward of that.
#include "cpu/router_score_kernel.h"

#include "micro.h"

namespace shiva::cpu {
using namespace micro;
namespace {

constexpr int64_t kRows = 64;

void bench_router_epilogue(benchmark::State& state, Dtype dtype) {
  const int64_t H = state.range(0);
  Numbers hidden(dtype, kRows * H), context(Dtype::Float32, H), weight(Dtype::Float32, H, 0.5);
  std::vector<float> scratch(static_cast<size_t>(H)), scores(kRows);
  const auto run = [&] {
    SHIVA_CALL_KERNEL(
        router_epilogue, dtype, hidden.data(), context.data(), weight.data(), 0.25, kRows, H, 1e-5, scratch.data(),
        scores.data());
  };
  run();
  for (int64_t r = 0; r < kRows; ++r) {
    std::vector<double> a(static_cast<size_t>(H));
    double mean = 0, square = 0, dot = 0;
    for (int64_t h = 0; h < H; ++h) {
      const double v = hidden[r * H + h] + context[h];
      a[h] = v / (1 + std::exp(-v));
      mean += a[h] / static_cast<double>(H);
    }
    for (int64_t h = 0; h < H; ++h) square += (a[h] - mean) * (a[h] - mean) / static_cast<double>(H);
    for (int64_t h = 0; h < H; ++h) dot += (a[h] - mean) * weight[h];
    check_close(scores[r], dot / std::sqrt(square + 1e-5) + 0.25, 16, Dtype::Float32, "router_epilogue");
  }
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, kRows * H, kRows * H * bytes_of(dtype));
}

void bench_router_epilogue_backward(benchmark::State& state, Dtype dtype) {
  const int64_t H = state.range(0);
  Numbers hidden(dtype, kRows * H), context(Dtype::Float32, H), weight(Dtype::Float32, H, 0.5);
  Numbers grad(Dtype::Float32, kRows);
  const Numbers before = hidden;
  std::vector<float> scratch(static_cast<size_t>(H)), context_sum(scratch), normal_sum(scratch);
  const auto run = [&] {
    SHIVA_CALL_KERNEL(
        router_epilogue_backward, dtype, hidden.data(), context.data(), weight.data(), grad.data(), kRows, H, 1e-5,
        scratch.data(), context_sum.data(), normal_sum.data());
  };
  run();
  for (int64_t r = 0; r < kRows; ++r) {
    std::vector<double> a(static_cast<size_t>(H));
    double mean = 0, square = 0, dot = 0, total = 0;
    for (int64_t h = 0; h < H; ++h) {
      const double v = before[r * H + h] + context[h];
      a[h] = v / (1 + std::exp(-v));
      mean += a[h] / static_cast<double>(H);
      total += weight[h] / static_cast<double>(H);
    }
    for (int64_t h = 0; h < H; ++h) square += (a[h] - mean) * (a[h] - mean) / static_cast<double>(H);
    const double scale = 1 / std::sqrt(square + 1e-5);
    for (int64_t h = 0; h < H; ++h) dot += (a[h] - mean) * scale * weight[h] / static_cast<double>(H);
    for (int64_t h = 0; h < H; ++h) {
      const double v = before[r * H + h] + context[h], s = 1 / (1 + std::exp(-v));
      const double grad_a = grad[r] * scale * (weight[h] - total - (a[h] - mean) * scale * dot);
      check_close(hidden[r * H + h], grad_a * s * (1 + v * (1 - s)), 8, dtype, "router_epilogue_backward");
    }
  }
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, kRows * H, 2 * kRows * H * bytes_of(dtype));
}

void sizes(benchmark::internal::Benchmark* bench) { with_deciles(bench)->ArgName("H")->Arg(64)->Arg(128); }
BENCHMARK_CAPTURE(bench_router_epilogue, float32, Dtype::Float32)->Apply(sizes);
BENCHMARK_CAPTURE(bench_router_epilogue, bfloat16, Dtype::BFloat16)->Apply(sizes);
BENCHMARK_CAPTURE(bench_router_epilogue_backward, float32, Dtype::Float32)->Apply(sizes);
BENCHMARK_CAPTURE(bench_router_epilogue_backward, bfloat16, Dtype::BFloat16)->Apply(sizes);

}  // namespace
}  // namespace shiva::cpu

BENCHMARK_MAIN();
