// Indices, warp functions and barriers, each against the wording of the CUDA C++ programming guide.
#include <set>

#include "check.h"

// ---- indices, arguments

TEST(every_thread_of_the_grid_runs_once_with_its_indices) {
  std::vector<int> runs(3 * 2 * 2 * 24);
  shiva::simt::launch("test", {3, 2, 2}, {4, 3, 2}, 0, [&] {
    CHECK(gridDim.x == 3 && gridDim.y == 2 && gridDim.z == 2);
    CHECK(blockDim.x == 4 && blockDim.y == 3 && blockDim.z == 2);
    const unsigned block = (blockIdx.z * 2 + blockIdx.y) * 3 + blockIdx.x;
    ++runs.at(block * 24 + (threadIdx.z * 3 + threadIdx.y) * 4 + threadIdx.x);
  });
  for (int count : runs) CHECK(count == 1);
}

TEST(warps_are_runs_of_32_threads_with_x_fastest) {
  shiva::simt::launch("test", 1, {4, 4, 4}, 0, [] {
    CHECK(__ballot_sync(kAllLanes, threadIdx.z % 2 == 0) == 0xffffu);
    CHECK(__ballot_sync(kAllLanes, threadIdx.y == 1) == 0x00f000f0u);
    CHECK(__ballot_sync(kAllLanes, threadIdx.x == 0) == 0x11111111u);
  });
}

template <typename T>
__global__ void arguments_kernel(T* out, T value, int count) {
  if (static_cast<int>(threadIdx.x) < count) out[threadIdx.x] = value;
}
TEST(a_launch_passes_its_arguments) {
  double out[8] = {};
  SHIVA_LAUNCH(arguments_kernel<double>, 1, 8, 0, nullptr, out, 2.5, 5);
  for (int i = 0; i < 8; ++i) CHECK(out[i] == (i < 5 ? 2.5 : 0.0));
}

// ---- shuffles

TEST(shfl_reads_the_source_lane_modulo_width_of_its_own_segment) {
  for (int width = 1; width <= 32; width *= 2)
    run(32, [=] {
      for (int source : {0, 1, 3, 7, 8, 9, 31, 33}) {
        const int got = __shfl_sync(kAllLanes, static_cast<int>(100 + lane()), source, width);
        CHECK(got == static_cast<int>(100 + lane() / width * width + source % width));
      }
    });
}

TEST(shfl_up_leaves_the_lower_delta_lanes_of_each_segment_unchanged) {
  for (unsigned width = 1; width <= 32; width *= 2)
    run(32, [=] {
      for (unsigned delta : {0u, 1u, 3u, 7u, 8u, 31u}) {
        const unsigned got = __shfl_up_sync(kAllLanes, 100 + lane(), delta, static_cast<int>(width));
        CHECK(got == 100 + (lane() % width < delta ? lane() : lane() - delta));
      }
    });
}

TEST(shfl_down_leaves_the_upper_delta_lanes_of_each_segment_unchanged) {
  for (unsigned width = 1; width <= 32; width *= 2)
    run(32, [=] {
      for (unsigned delta : {0u, 1u, 3u, 7u, 8u, 31u}) {
        const unsigned got = __shfl_down_sync(kAllLanes, 100 + lane(), delta, static_cast<int>(width));
        CHECK(got == 100 + (lane() % width + delta >= width ? lane() : lane() + delta));
      }
    });
}

TEST(shfl_xor_may_read_earlier_segments_but_not_later_ones) {
  for (unsigned width = 1; width <= 32; width *= 2)
    run(32, [=] {
      for (unsigned bits : {0u, 1u, 5u, 8u, 16u, 31u}) {
        const unsigned source = lane() ^ bits;
        const unsigned got = __shfl_xor_sync(kAllLanes, 100 + lane(), static_cast<int>(bits), static_cast<int>(width));
        CHECK(got == 100 + (source / width > lane() / width ? lane() : source));
      }
    });
}

TEST(shuffles_of_width_8_sum_within_eight_lanes) {
  run(64, [] {
    unsigned sum = threadIdx.x;
    for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step, 8);
    CHECK(sum == threadIdx.x / 8 * 64 + 28);
  });
}

TEST(shuffles_move_values_of_1_to_8_bytes) {
  run(32, [] {
    const int next = (static_cast<int>(lane()) + 1) % 32;
    CHECK(__shfl_sync(kAllLanes, static_cast<int8_t>(-static_cast<int>(lane())), next) == -next);
    CHECK(__shfl_sync(kAllLanes, static_cast<uint16_t>(60000 + lane()), next) == 60000 + next);
    CHECK(__shfl_sync(kAllLanes, lane() + 0.5f, next) == static_cast<float>(next) + 0.5f);
    CHECK(__shfl_sync(kAllLanes, lane() + 0.1, next) == next + 0.1);
    CHECK(__shfl_sync(kAllLanes, int64_t(lane()) << 40, next) == int64_t(next) << 40);
  });
}

// Lanes 0..15 read lane 20, which is not in their mask; whether it sits in a shuffle of its own must not matter.
static void read_outside_the_mask(bool other_half_shuffles) {
  std::set<unsigned> seen;
  for_seeds(8, [&] {
    run(32, [&] {
      if (lane() < 16)
        seen.insert(__shfl_sync(0x0000ffffu, 7u, 20));
      else if (other_half_shuffles)
        CHECK(__shfl_sync(0xffff0000u, 7u, 20) == 7u);
    });
  });
  CHECK(seen.size() > 100 && seen.count(7u) == 0 && seen.count(0u) == 0);
}
TEST(a_shuffle_from_an_idle_lane_gives_garbage) { read_outside_the_mask(false); }
TEST(a_shuffle_from_a_lane_of_another_mask_gives_garbage) { read_outside_the_mask(true); }

TEST(two_halves_of_a_warp_shuffle_apart) {
  for_seeds(20, [] {
    run(32, [] {
      const bool low = lane() < 16;
      for (unsigned i = 0; i < (low ? 3 : 5); ++i) {
        const unsigned got = __shfl_sync(low ? 0xffffu : 0xffff0000u, lane() * 10 + i, low ? 2 : 18);
        CHECK(got == (low ? 20 + i : 180 + i));
      }
    });
  });
}

TEST(a_partial_warp_works_under_the_mask_of_its_lanes) {
  run(40, [] {
    if (warp() == 0) return;
    CHECK(__shfl_sync(0xffu, threadIdx.x, 7) == 39);
    CHECK(__ballot_sync(0xffu, threadIdx.x % 2) == 0xaau);
    CHECK(__reduce_add_sync(0xffu, 1u) == 8);
    CHECK(__match_any_sync(0xffu, threadIdx.x / 4) == (lane() < 4 ? 0x0fu : 0xf0u));
    __syncwarp(0xffu);
  });
}

// ---- votes, matches, reductions

TEST(ballot_sets_the_bits_of_lanes_in_the_mask_whose_predicate_is_not_zero) {
  run(32, [] {
    CHECK(__ballot_sync(kAllLanes, lane() % 3 == 0 ? -1 : 0) == 0x49249249u);
    CHECK(__ballot_sync(kAllLanes, lane() == 31 ? 1 << 31 : 0) == 1u << 31);
    CHECK(__ballot_sync(kAllLanes, 0) == 0u);
    CHECK(__ballot_sync(kAllLanes, 2) == kAllLanes);
    if (lane() % 2) CHECK(__ballot_sync(0xaaaaaaaau, 1) == 0xaaaaaaaau);
    if (lane() == 5) CHECK(__ballot_sync(1u << 5, 1) == 1u << 5);
  });
}

TEST(any_and_all_look_at_the_lanes_of_the_mask_only) {
  run(32, [] {
    CHECK(__any_sync(kAllLanes, lane() == 9) && !__any_sync(kAllLanes, 0));
    CHECK(__all_sync(kAllLanes, lane() + 1) && !__all_sync(kAllLanes, lane() != 9));
    const bool low = lane() < 16;
    const unsigned mask = low ? 0xffffu : 0xffff0000u;
    CHECK(!!__any_sync(mask, low) == low);
    CHECK(!!__all_sync(mask, low) == low);
  });
}

TEST(match_any_gives_the_lanes_of_the_mask_with_an_equal_value) {
  run(32, [] {
    CHECK(__match_any_sync(kAllLanes, lane() % 4) == 0x11111111u << (lane() % 4));
    CHECK(__match_any_sync(kAllLanes, 7u) == kAllLanes);
    CHECK(__match_any_sync(kAllLanes, lane()) == 1u << lane());
    // Differ in the upper half only.
    CHECK(__match_any_sync(kAllLanes, (lane() % 2ull) << 40) == 0x55555555u << (lane() % 2));
    if (lane() < 8) CHECK(__match_any_sync(0xffu, lane() / 4) == (lane() < 4 ? 0x0fu : 0xf0u));
  });
}

TEST(reductions_are_of_the_lanes_in_the_mask) {
  run(32, [] {
    CHECK(__reduce_add_sync(kAllLanes, lane()) == 496u);
    CHECK(__reduce_add_sync(kAllLanes, 1u << 28) == 0u);  // modulo 2^32
    CHECK(__reduce_min_sync(kAllLanes, lane() + 5) == 5u && __reduce_max_sync(kAllLanes, lane() + 5) == 36u);
    CHECK(__reduce_max_sync(kAllLanes, lane() ? 1u : 0x80000000u) == 0x80000000u);
    if (lane() % 2)
      CHECK(__reduce_add_sync(0xaaaaaaaau, lane()) == 256u && __reduce_min_sync(0xaaaaaaaau, lane()) == 1u);
  });
}

TEST(reductions_of_int_are_signed) {
  run(32, [] {
    const int value = static_cast<int>(lane()) - 16;
    CHECK(__reduce_min_sync(kAllLanes, value) == -16 && __reduce_max_sync(kAllLanes, value) == 15);
    CHECK(__reduce_add_sync(kAllLanes, value) == -16);
  });
}

TEST(bit_functions_know_zero) {
  CHECK(__popc(0u) == 0 && __popc(~0u) == 32 && __popcll(~0ull) == 64);
  CHECK(__clz(0u) == 32 && __clz(1u) == 31 && __clzll(0ull) == 64 && __clzll(1ull) == 63);
  CHECK(__ffs(0u) == 0 && __ffs(1u) == 1 && __ffs(0x80000000u) == 32);
  CHECK(__float_as_uint(-0.0f) == 0x80000000u && __uint_as_float(0x3f800000u) == 1.0f);
}

// ---- barriers

TEST(no_thread_passes_the_barrier_before_all_came) {
  for (unsigned threads : {2u, 33u, 96u, 1024u})
    for_seeds(threads > 100 ? 4 : 20, [=] {
      std::vector<unsigned> came(5);
      run(threads, [&] {
        for (unsigned& round : came) {
          ++round;
          __syncthreads();
          CHECK(round == threads);
        }
      });
    });
}

TEST(syncthreads_count_or_and_reduce_over_the_whole_block) {
  for_seeds(10, [] {
    run(70, [] {
      CHECK(__syncthreads_count(threadIdx.x >= 20 ? -2 : 0) == 50);
      CHECK(__syncthreads_or(threadIdx.x == 69 ? 2 : 0) && !__syncthreads_or(0));
      CHECK(__syncthreads_and(static_cast<int>(threadIdx.x) - 100) && !__syncthreads_and(threadIdx.x != 69));
      CHECK(__syncthreads_count(1) == 70);
    });
  });
}

TEST(the_barrier_does_not_wait_for_threads_that_exited) {
  for_seeds(20, [] {
    run(96, [] {
      if (threadIdx.x % 3 == 1) return;
      CHECK(__syncthreads_count(1) == 64);
      if (warp() == 1) return;
      CHECK(__syncthreads_count(1) <= 43);
    });
  });
}

TEST(the_barrier_is_of_one_block) {
  for_seeds(20, [] {
    unsigned came[3] = {};
    shiva::simt::launch("test", 3, 40, 0, [&] {
      for (unsigned i = 0; i < blockIdx.x; ++i) __syncthreads();
      ++came[blockIdx.x];
      CHECK(__syncthreads_count(1) == 40);
      CHECK(came[blockIdx.x] == 40);
    });
  });
}

TEST(syncwarp_waits_for_the_lanes_of_its_mask_and_no_others) {
  for_seeds(20, [] {
    unsigned low = 0, high = 0;
    run(32, [&] {
      if (lane() >= 24) return;
      unsigned& came = lane() < 8 ? low : high;
      for (unsigned i = 1; i <= (lane() < 8 ? 2 : 4); ++i) {
        ++came;
        __syncwarp(lane() < 8 ? 0xffu : 0xffff00u);
        CHECK(came == i * (lane() < 8 ? 8 : 16));
        __syncwarp(lane() < 8 ? 0xffu : 0xffff00u);
      }
    });
  });
}

TEST(a_lane_may_come_from_one_collective_to_the_next_while_others_wait_there) {
  for_seeds(20, [] {
    run(32, [] {
      if (lane() < 2) CHECK(__shfl_sync(3u, 10 + lane(), 1) == 11);
      if (lane() == 1 || lane() == 2) CHECK(__shfl_sync(6u, 10 + lane(), 2) == 12);
      if (lane() == 2 || lane() == 3) CHECK(__ballot_sync(12u, lane() == 3) == 8u);
    });
  });
}

int main(int count, char** names) { return run_checks(count, names); }
