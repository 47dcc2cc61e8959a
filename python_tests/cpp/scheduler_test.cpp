// In which order threads run, and what happens to kernels that break the rules.
#include <algorithm>
#include <set>
#include <thread>

#include "check.h"

using shiva::cuda::commit_copies;
using shiva::cuda::copy_async16;
using shiva::simt::launch;

// ---- schedules

// Who took each step of one stretch between two barriers: 4 warps, 3 steps a thread.
using Steps = std::vector<unsigned>;
static void take_steps(Steps& steps) {
  int word = 0;
  for (int i = 0; i < 3; ++i) atomicAdd(&word, 1), steps.push_back(threadIdx.x);
}
static unsigned warps_of(const unsigned* step, int count) {
  unsigned warps = 0;
  for (int i = 0; i < count; ++i) warps |= 1u << step[i] / 32;
  return __popc(warps);
}
static const char* schedule_of(const Steps& steps) {
  CHECK(steps.size() == 4 * 96);
  const unsigned* s = steps.data();
  bool lockstep = true;
  for (unsigned i = 0; i < steps.size(); ++i) lockstep &= s[i] == i % 128;
  if (lockstep) return "lockstep";
  if (warps_of(s, 96) + warps_of(s + 96, 96) + warps_of(s + 192, 96) + warps_of(s + 288, 96) == 4) return "run ahead";
  if (warps_of(s + 288, 96) == 1 && warps_of(s, 32) == 3) return "laggard";
  return warps_of(s, 32) == 4 && warps_of(s + 288, 96) > 1 ? "random lanes" : "?";
}

TEST(every_schedule_is_reached) {
  std::set<std::string> seen;
  for_seeds(60, [&] {
    Steps steps;
    run(128, [&] { take_steps(steps); });
    seen.insert(schedule_of(steps));
  });
  for (const char* schedule : {"lockstep", "run ahead", "laggard", "random lanes"}) CHECK(seen.count(schedule));
}

TEST(every_stretch_between_barriers_draws_a_schedule) {
  std::set<std::string> seen;
  std::vector<Steps> stretches(30);
  run(128, [&] {
    for (Steps& steps : stretches) take_steps(steps), __syncthreads();
  });
  for (const Steps& steps : stretches) seen.insert(schedule_of(steps));
  for (const char* schedule : {"lockstep", "run ahead", "laggard", "random lanes"}) CHECK(seen.count(schedule));
}

TEST(every_warp_may_run_ahead_and_every_warp_may_lag) {
  std::set<unsigned> ahead, behind;
  for_seeds(100, [&] {
    Steps steps;
    run(128, [&] { take_steps(steps); });
    if (schedule_of(steps) == std::string("run ahead")) ahead.insert(steps.front() / 32);
    if (schedule_of(steps) == std::string("laggard")) behind.insert(steps.back() / 32);
  });
  CHECK(ahead.size() == 4 && behind.size() == 4);
}

TEST(blocks_run_in_any_order_interleaved_or_not) {
  constexpr unsigned kBlocks = 8;  // more than are ever resident
  std::set<unsigned> first, last;
  int one_by_one = 0, interleaved = 0;
  for_seeds(60, [&] {
    std::vector<unsigned> steps;  // the block that took each
    launch("test", kBlocks, 128, 0, [&] {
      for (int i = 0; i < 5; ++i) steps.push_back(blockIdx.x), __syncthreads();
    });
    CHECK(steps.size() == kBlocks * 128 * 5);
    first.insert(steps.front()), last.insert(steps.back());
    steps.erase(std::unique(steps.begin(), steps.end()), steps.end());
    one_by_one += steps.size() == kBlocks, interleaved += steps.size() > 2 * kBlocks;
  });
  CHECK(first.size() == kBlocks && last.size() == kBlocks);
  CHECK(one_by_one > 5 && interleaved > 10);
}

// ---- seeds

// Everything that the seed decides: order of threads and blocks, garbage.
static std::vector<uint64_t> trace(uint64_t seed) {
  shiva::simt::set_seed(seed);
  std::vector<uint64_t> log;
  unsigned word = 0;
  launch("test", 4, 96, 32, [&] {
    SHIVA_SHARED(uint32_t, fixed, [8]);
    SHIVA_DYNAMIC_SHARED(uint32_t, dynamic);
    atomicAdd(&word, 1u);
    log.push_back(blockIdx.x * 96 + threadIdx.x);
    log.push_back(uint64_t(fixed[threadIdx.x % 8]) << 32 | dynamic[threadIdx.x % 8]);
    __syncthreads();
    if (lane() < 16) log.push_back(__shfl_sync(0xffffu, 1u, 20));
  });
  return log;
}

TEST(a_seed_reproduces_a_run_exactly) {
  for (uint64_t seed : {0ull, 1ull, 77ull, ~0ull}) {
    const auto first = trace(seed);
    trace(5), error_of([] { run(8, [] { __shfl_sync(1u, 0, 0); }); });  // whatever ran in between
    CHECK(trace(seed) == first);
  }
}

TEST(different_seeds_give_different_runs) {
  std::set<std::vector<uint64_t>> traces;
  for (uint64_t seed = 0; seed < 50; ++seed) traces.insert(trace(seed));
  CHECK(traces.size() == 50);
}

TEST(each_launch_advances_the_seed_by_one) {
  shiva::simt::set_seed(41);
  run(1, [] {});
  CHECK(shiva::simt::seed() == 42);
  error_of([] { run(2000, [] {}); });
  CHECK(shiva::simt::seed() == 43);
}

TEST(launches_and_threads_are_counted) {
  const uint64_t threads = shiva::simt::threads_run(), launches = shiva::simt::launches_run();
  launch("test", {2, 3}, {5, 7}, 0, [] {});
  CHECK(shiva::simt::threads_run() == threads + 210 && shiva::simt::launches_run() == launches + 1);
}

// ---- errors

struct Large {
  unsigned at[1000];
};
__attribute__((noinline)) static unsigned last_of(Large argument, unsigned count) {
  const volatile unsigned* at = argument.at;
  unsigned last = 0;
  for (unsigned i = 0; i < count; ++i) last = at[i];
  return last;
}
// A kernel that needs all of the simulator, and of its stack what a failed launch may have left in use.
static void check_usable() {
  std::vector<unsigned> sums(2);
  launch("usable", 2, 64, 0, [&] {
    SHIVA_SHARED(unsigned, values, [64]);
    Large local;
    for (unsigned i = 0; i < 1000; ++i) local.at[i] = threadIdx.x + i;
    values[threadIdx.x] = last_of(local, 1000) - 999;
    __syncthreads();
    unsigned sum = values[63 - threadIdx.x];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (lane() == 0) atomicAdd(&sums[blockIdx.x], sum);
  });
  CHECK(sums[0] == 2016 && sums[1] == 2016);
}

// Whatever the schedule the call must raise an Error with one of the texts, and the next launch must work.
static void raises(const std::vector<std::string>& texts, const std::function<void()>& call) {
  for_seeds(12, [&] {
    const std::string message = error_of(call);
    const bool found =
        std::any_of(texts.begin(), texts.end(), [&](const std::string& text) { return contains(message, text); });
    if (!found) throw Failed("wanted an error with '" + texts[0] + "', got '" + message + "'");
    check_usable();
  });
}

TEST(threads_at_different_barriers_are_an_error) {
  raises({"different barriers"}, [] {
    run(64, [] {
      if (threadIdx.x < 40)
        __syncthreads();
      else
        __syncthreads();
    });
  });
}

TEST(barriers_of_different_kinds_are_an_error_even_in_one_line) {
  raises({"different barriers"}, [] {
    run(64, [] { threadIdx.x < 40 ? (void)__syncthreads_or(1) : (void)__syncthreads_count(1); });
  });
}

TEST(a_lane_outside_its_own_mask_is_an_error) {
  raises(
      {"__ballot_sync: the calling lane is not in its mask"}, [] { run(32, [] { __ballot_sync(0x7fffffffu, 1); }); });
}

TEST(a_mask_with_lanes_that_do_not_exist_is_an_error) {
  raises({"__shfl_sync: the mask names lanes that have exited or do not exist"}, [] {
    run(40, [] {
      if (warp() == 1) __shfl_sync(kAllLanes, 1, 0);
    });
  });
}

TEST(a_mask_with_lanes_that_have_exited_is_an_error) {
  raises({"exited", "deadlock"}, [] {
    run(32, [] {
      if (lane() != 3) __syncwarp();
    });
  });
}

TEST(different_collectives_of_one_warp_are_an_error) {
  raises({"__ballot_sync meets __any_sync", "__any_sync meets __ballot_sync"}, [] {
    run(32, [] { lane() < 16 ? (void)__ballot_sync(kAllLanes, 1) : (void)__any_sync(kAllLanes, 1); });
  });
}

TEST(overlapping_masks_that_differ_are_an_error) {
  raises({"or the masks differ"}, [] { run(32, [] { __syncwarp(lane() < 16 ? 0xffffffffu : 0xffff8000u); }); });
}

TEST(a_shuffle_width_that_is_no_power_of_two_up_to_32_is_an_error) {
  for (int width : {-8, 0, 3, 24, 64})
    raises({"width " + std::to_string(width)}, [=] { run(32, [=] { __shfl_xor_sync(kAllLanes, 1, 1, width); }); });
}

// Waits in a deep stack with local arrays, which nobody unwinds if the launch fails.
__attribute__((noinline)) static int wait_deep(int depth, unsigned mask) {
  volatile char local[48] = {};
  local[depth] = 1;
  if (depth == 0)
    __syncwarp(mask);
  else
    wait_deep(depth - 1, mask);
  return local[depth];
}
TEST(a_deadlock_is_an_error_that_says_who_waits_where) {
  raises({"deadlock: thread (0, 0, 0) of block (0, 0, 0) waits in __syncwarp for lanes 0x6000;"}, [] {
    run(32, [] {
      if (lane() < 13 || lane() > 14)
        wait_deep(40, kAllLanes);
      else
        __syncthreads();
    });
  });
}

TEST(a_deadlock_at_the_barrier_names_its_line) {
  const int line = __LINE__ + 5;
  raises({"deadlock:", "waits at the barrier in line " + std::to_string(line)}, [] {
    launch("test", 3, 64, 0, [] {
      if (blockIdx.x != 1) return;
      if (threadIdx.x == 63) __ballot_sync(3u << 30, 1);
      __syncthreads();
    });
  });
}

TEST(a_block_or_grid_beyond_the_limits_is_an_error) {
  for (const Dim3& block : {Dim3(1025), Dim3(0), Dim3(32, 33), Dim3(1, 1, 65), Dim3(65536, 65536)})
    raises({"CUDA takes 1 to 1024"}, [&] { launch("test", 1, block, 0, [] {}); });
  for (const Dim3& grid : {Dim3(0), Dim3(1, 0), Dim3(1, 65536), Dim3(1, 1, 65536), Dim3(0x80000000u)})
    raises({"an empty grid, or one beyond"}, [&] { launch("test", grid, 1, 0, [] {}); });
  launch("test", {1, 1, 2}, {8, 2, 64}, 0, [] {});
  launch("test", {1, 65535}, 1, 0, [] {});
}

template <int kBytes>
static void use_shared(size_t dynamic) {
  launch("test", 1, 32, dynamic, [] {
    SHIVA_SHARED(char, big, [kBytes - 16]);
    SHIVA_SHARED(int, small, [4]);
    big[threadIdx.x] = 1, small[threadIdx.x % 4] = 1;
  });
}
TEST(shared_memory_beyond_the_limits_is_an_error) {
  use_shared<48 << 10>(0);
  use_shared<48 << 10>(179 << 10);
  launch("test", 1, 32, 227 << 10, [] {});
  raises({"48 KiB of static shared memory: 49153 bytes"}, [] { use_shared<(48 << 10) + 1>(0); });
  raises({"bytes of shared memory"}, [] { launch("test", 1, 32, (227 << 10) + 1, [] {}); });
  raises({"bytes of shared memory"}, [] { use_shared<48 << 10>((179 << 10) + 1); });
}

static void copy_16_bytes(size_t shared_offset, size_t global_offset) {
  alignas(16) static char source[64];
  run(1, [&] {
    SHIVA_SHARED(char, buffer, [64]);
    copy_async16(buffer + shared_offset, source + global_offset, true);
    commit_copies();
    shiva::cuda::wait_copies<0>();
  });
}
TEST(an_unaligned_cp_async_is_an_error) {
  copy_16_bytes(16, 48);
  raises({"cp.async of 16 bytes"}, [] { copy_16_bytes(8, 0); });
  raises({"cp.async of 16 bytes"}, [] { copy_16_bytes(0, 4); });
}

TEST(a_thread_that_ends_with_copies_in_flight_is_an_error) {
  for (const bool commit : {false, true})
    raises({"cp.async copies that nobody waited for"}, [=] {
      run(32, [=] {
        SHIVA_SHARED(float, buffer, [4]);
        alignas(16) static const float source[4] = {};
        if (threadIdx.x != 5) return;
        copy_async16(buffer, source, true);
        if (commit) commit_copies();
      });
    });
}

TEST(an_error_names_kernel_thread_and_a_seed_that_reproduces_it) {
  const auto fails = [] {
    int word = 0;
    launch("some_kernel", {2, 2}, {8, 4}, 0, [&] {
      if (atomicAdd(&word, 1) == 50) __syncwarp(0);
    });
  };
  for (uint64_t seed = 100; seed < 110; ++seed) {
    shiva::simt::set_seed(seed);
    const std::string first = error_of(fails);
    CHECK(contains(first, "some_kernel") && contains(first, "(seed " + std::to_string(seed) + ")"));
    CHECK(contains(first, "in thread (") && contains(first, "of block ("));
    check_usable();
    shiva::simt::set_seed(seed);
    CHECK(error_of(fails) == first);
  }
}

TEST(any_exception_of_a_kernel_leaves_the_launch) {
  for_seeds(20, [] {
    int caught = 0;
    try {
      launch("test", 4, 64, 0, [] {
        if (blockIdx.x == 2 && threadIdx.x == 33) throw 7;
        __syncthreads();
      });
    } catch (int thrown) {
      caught = thrown;
    }
    CHECK(caught == 7);
    check_usable();
  });
}

TEST(locals_of_the_thread_that_throws_are_destroyed) {
  int alive = 0;
  struct Local {
    int& alive;
    explicit Local(int& alive) : alive(++alive) {}
    ~Local() { --alive; }
  };
  CHECK(error_of([&] {
          run(1, [&] {
            const Local local(alive);
            __syncwarp(2u);
          });
        }) != "");
  CHECK(alive == 0);
}

TEST(launches_from_several_threads_of_the_host_take_turns) {
  int usable = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    std::vector<std::thread> threads;
    std::vector<int> worked(2);
    for (int& w : worked)
      threads.emplace_back([&w] {
        raises({"mask"}, [] { run(64, [] { __syncwarp(2u); }); });
        w = 1;
      });
    for (std::thread& t : threads) t.join();
    usable += worked[0] + worked[1];
    check_usable();
  }
  CHECK(usable == 6);
}

// ---- what the sanitizers must see

CRASH(reading_beyond_a_shared_array) {
  run(1, [] {
    SHIVA_SHARED(uint4, array, [8]);
    const volatile unsigned* words = &array[0].x;
    (void)words[32 + threadIdx.x];
  });
}
CRASH(writing_beyond_dynamic_shared_memory) {
  launch("test", 1, 1, 32, [] {
    SHIVA_DYNAMIC_SHARED(volatile int, array);
    array[8 + threadIdx.x] = 1;
  });
}
CRASH(reading_beyond_global_memory) {
  std::vector<int> numbers(8);
  const volatile int* data = numbers.data();
  run(1, [=] { (void)data[8 + threadIdx.x]; });
}
CRASH(a_cp_async_beyond_its_array) {
  alignas(16) static const float source[4] = {};
  run(1, [] {
    SHIVA_SHARED(float, buffer, [4]);
    copy_async16(buffer + 4, source, true);
  });
}
CRASH(a_misaligned_vector_load) {
  alignas(16) static float numbers[8];
  run(1, [] { shiva::cuda::store_vec(numbers, shiva::cuda::load_vec(numbers + 1 + threadIdx.x)); });
}
__attribute__((noinline)) static int recurse(const volatile int* depth) {
  const volatile int next = *depth - 1;
  return next ? recurse(&next) + next : 0;
}
CRASH(a_stack_that_overflows) {
  run(1, [] {
    const int depth = 1 << 20;
    recurse(&depth);
  });
}

int main(int count, char** names) { return run_checks(count, names); }
