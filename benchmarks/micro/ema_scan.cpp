// A tile of channels of ema_scan over a row's tokens, forward and backward.
#include "cpu/ema_scan_kernel.h"

#include "micro.h"

namespace shiva::cpu {
using namespace micro;
namespace {

// Weights in (0, 1), in float32.
std::vector<float> weights(int64_t M) {
  std::vector<float> p;
  for (int64_t m = 0; m < M; ++m) p.push_back(static_cast<float>(m % 7 + 1) / 8);
  return p;
}

void bench_ema_tile(benchmark::State& state, Dtype dtype) {
  const int64_t M = state.range(0), width = kScanTile, row_bytes = width * bytes_of(dtype);
  Numbers x(dtype, M * width), out(dtype, M * width);
  const std::vector<float> p = weights(M);
  const auto run = [&] {
    SHIVA_CALL_KERNEL(ema_tile, dtype, x.row(0, width), row_bytes, p.data(), M, width, out.row(0, width), row_bytes);
  };
  run();
  for (int64_t d = 0; d < width; ++d) {
    double average = 0;
    for (int64_t m = 0; m < M; ++m) {
      const double share = static_cast<double>(p[static_cast<size_t>(m)]);
      average = share * x[m * width + d] + (1 - share) * average;
      check_close(out[m * width + d], average, 4, dtype, "ema_tile");
    }
  }
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, M * width, 2 * M * row_bytes);
}

void bench_ema_tile_backward(benchmark::State& state, Dtype dtype) {
  const int64_t M = state.range(0), width = kScanTile, row_bytes = width * bytes_of(dtype);
  Numbers both(dtype, 3 * M * width), grad_x(dtype, M * width);
  char *grad = both.row(0, width), *x = both.row(M, width), *e = both.row(2 * M, width);
  const std::vector<float> p = weights(M);
  std::vector<float> part(p.size());
  const auto run = [&] {
    SHIVA_CALL_KERNEL(
        ema_tile_backward, dtype, grad, row_bytes, x, row_bytes, e, row_bytes, p.data(), M, width, grad_x.row(0, width),
        row_bytes, part.data());
  };
  run();
  std::vector<double> total(static_cast<size_t>(width));
  for (int64_t m = M; m-- > 0;) {
    const double share = static_cast<double>(p[static_cast<size_t>(m)]);
    double sum = 0;
    for (int64_t d = 0; d < width; ++d) {
      double& slope = total[static_cast<size_t>(d)];
      slope += both[m * width + d];
      check_close(grad_x[m * width + d], share * slope, 4, dtype, "ema_tile_backward");
      sum += slope * (both[(M + m) * width + d] - (m > 0 ? both[(2 * M + m - 1) * width + d] : 0));
      slope *= 1 - share;
    }
    check_close(static_cast<double>(part[static_cast<size_t>(m)]), sum, 64, Dtype::Float32, "ema_tile_backward's sum");
  }
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  set_rates(state, M * width, 4 * M * row_bytes);
}

void tokens(benchmark::internal::Benchmark* bench) { with_deciles(bench)->ArgName("M")->Arg(64)->Arg(1024); }
BENCHMARK_CAPTURE(bench_ema_tile, float32, Dtype::Float32)->Apply(tokens);
BENCHMARK_CAPTURE(bench_ema_tile, bfloat16, Dtype::BFloat16)->Apply(tokens);
BENCHMARK_CAPTURE(bench_ema_tile_backward, float32, Dtype::Float32)->Apply(tokens);
BENCHMARK_CAPTURE(bench_ema_tile_backward, bfloat16, Dtype::BFloat16)->Apply(tokens);

}  // namespace
}  // namespace shiva::cpu

BENCHMARK_MAIN();
