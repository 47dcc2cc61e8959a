// What the micro-benchmarks share: values of every dtype, a check against plain arithmetic, rates in the output.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace shiva::micro {

inline const char* dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::Float32: return "float32";
    case Dtype::BFloat16: return "bfloat16";
    case Dtype::Float16: return "float16";
    default: return "float64";
  }
}

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::Float64 ? 8 : dtype == Dtype::Float32 ? 4 : 2; }

// Numbers in memory as the kernels take them; values() are what they stand for after rounding.
class Numbers {
 public:
  Numbers(Dtype dtype, int64_t count, double spread = 1) : dtype_(dtype), bytes_(static_cast<size_t>(count) * 8) {
    std::mt19937_64 random(static_cast<uint64_t>(count));
    std::normal_distribution<double> normal(0, spread);
    for (int64_t i = 0; i < count; ++i) set(i, normal(random));
  }
  void* data() { return bytes_.data(); }
  char* row(int64_t i, int64_t length) { return bytes_.data() + i * length * bytes_of(dtype_); }

  double operator[](int64_t i) const {
    const char* at = bytes_.data() + i * bytes_of(dtype_);
    if (dtype_ == Dtype::Float64) return read<double>(at);
    if (dtype_ == Dtype::Float32) return read<float>(at);
    if (dtype_ == Dtype::Float16) return static_cast<double>(read<_Float16>(at));
    return __builtin_bit_cast(float, static_cast<uint32_t>(read<uint16_t>(at)) << 16);
  }

 private:
  template <typename T>
  static T read(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  void set(int64_t i, double value) {
    char* at = bytes_.data() + i * bytes_of(dtype_);
    const float single = static_cast<float>(value);
    if (dtype_ == Dtype::Float64) {
      std::memcpy(at, &value, 8);
    } else if (dtype_ == Dtype::Float32) {
      std::memcpy(at, &single, 4);
    } else if (dtype_ == Dtype::Float16) {
      const _Float16 half = static_cast<_Float16>(single);
      std::memcpy(at, &half, 2);
    } else {
      const uint16_t half = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, single) >> 16);
      std::memcpy(at, &half, 2);
    }
  }
  Dtype dtype_;
  std::vector<char> bytes_;
};

inline double rounding(Dtype dtype) {
  switch (dtype) {
    case Dtype::Float32: return 0x1p-23;
    case Dtype::BFloat16: return 0x1p-7;
    case Dtype::Float16: return 0x1p-10;
    default: return 0x1p-52;
  }
}

// No time is printed for a wrong result.
inline void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "micro-benchmark: %s is wrong, so its time means nothing\n", what);
  std::exit(1);
}
inline void check_close(double got, double wanted, double scale, Dtype dtype, const char* what) {
  check(std::abs(got - wanted) <= 32 * std::max(rounding(dtype), 0x1p-20) * scale, what);
}

// Deciles beside Google Benchmark's own median, over the repetitions.
template <int kTenths>
double decile(const std::vector<double>& times) {
  std::vector<double> sorted = times;
  std::sort(sorted.begin(), sorted.end());
  return sorted[(sorted.size() - 1) * kTenths / 10];
}
inline benchmark::internal::Benchmark* with_deciles(benchmark::internal::Benchmark* bench) {
  return bench->ComputeStatistics("p10", decile<1>)->ComputeStatistics("p90", decile<9>);
}

inline void set_rates(benchmark::State& state, int64_t items, int64_t bytes) {
  state.SetItemsProcessed(state.iterations() * items);
  if (bytes > 0) state.SetBytesProcessed(state.iterations() * bytes);
  state.SetLabel(cpu::isa_name(cpu::active_isa()));
}

}  // namespace shiva::micro
