// Named checks of the simulator. Each prints `ok <name>` or `FAIL <name>: why` on a line; test_simt.py reads them.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/mma.h"

struct Failed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Check {
  const char* name;
  void (*run)();
  bool crashes;
};
inline std::vector<Check>& all_checks() {
  static std::vector<Check> checks;
  return checks;
}

// CRASH: a check that must end the process; it runs only when it is named on the command line.
#define TEST(name) SHIVA_NEW_CHECK(name, false)
#define CRASH(name) SHIVA_NEW_CHECK(name, true)
#define SHIVA_NEW_CHECK(name, crashes)                                                     \
  static void name();                                                                      \
  static const bool name##_known = (all_checks().push_back({#name, name, crashes}), true); \
  static void name()

// Works inside kernels too: the simulator carries the exception out of the launch.
#define CHECK(...)                                                                              \
  do {                                                                                          \
    if (!(__VA_ARGS__)) throw Failed("line " + std::to_string(__LINE__) + ": " + #__VA_ARGS__); \
  } while (false)

using shiva::cuda::kAllLanes;
using shiva::simt::Dim3;
using shiva::simt::Error;
using Kernel = std::function<void()>;

inline unsigned lane() { return threadIdx.x % 32; }
inline unsigned warp() { return threadIdx.x / 32; }

// Runs the kernel on one block.
inline void run(unsigned threads, const Kernel& kernel) { shiva::simt::launch("test", 1, threads, 0, kernel); }

// A check that must hold whatever the schedule.
inline void for_seeds(uint64_t seeds, const std::function<void()>& check) {
  for (uint64_t seed = 1; seed <= seeds; ++seed) {
    shiva::simt::set_seed(seed);
    try {
      check();
    } catch (const std::exception& e) {
      throw Failed("seed " + std::to_string(seed) + ": " + e.what());
    }
  }
}

// The message of the Error that call raises, or "" if it raises none.
inline std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

inline int run_checks(int count, char** names) {
  alarm(120);  // ends a check that hangs
  for (const Check& check : all_checks()) {
    bool wanted = count < 2 && !check.crashes;
    for (int i = 1; i < count; ++i) wanted |= std::string(names[i]) == check.name;
    if (!wanted) continue;
    try {
      check.run();
      std::printf("ok %s\n", check.name);
    } catch (const std::exception& e) {
      std::printf("FAIL %s: %s\n", check.name, e.what());
    }
    std::fflush(stdout);
  }
  return 0;
}
