// Shared memory, cp.async and atomics, each against the wording of the CUDA C++ programming guide.
#include <algorithm>
#include <array>
#include <set>

#include "check.h"

using shiva::cuda::commit_copies;
using shiva::cuda::copy_async16;
using shiva::cuda::wait_copies;

// ---- shared memory

TEST(shared_memory_of_every_block_starts_as_fresh_garbage) {
  std::set<uint32_t> words;
  for (int repeat = 0; repeat < 2; ++repeat)
    shiva::simt::launch("test", 8, 32, 4 * 64, [&] {
      SHIVA_SHARED(uint32_t, fixed, [64]);
      SHIVA_DYNAMIC_SHARED(uint32_t, dynamic);
      if (threadIdx.x != 0) return;
      for (int i = 0; i < 64; ++i) words.insert(fixed[i]), words.insert(dynamic[i]), fixed[i] = dynamic[i] = 1;
    });
  CHECK(words.size() > 2 * 8 * 128 - 10 && words.count(0u) == 0 && words.count(1u) == 0);
}

template <int kSize>
static char* array_of_a_function() {
  SHIVA_SHARED(char, array, [kSize]);
  return array;
}
TEST(a_shared_array_is_one_for_the_block_and_its_place_in_the_source) {
  std::set<void*> first, second, of_function, dynamic, all;
  shiva::simt::launch("test", 1, 64, 16, [&] {
    SHIVA_SHARED(int, a, [4]);
    SHIVA_SHARED(int, b, [4]);
    SHIVA_DYNAMIC_SHARED(int, c);
    first.insert(a), second.insert(b), dynamic.insert(c);
    of_function.insert(array_of_a_function<16>());
    CHECK(array_of_a_function<16>() == *of_function.begin());
    for (void* array : std::array<void*, 5>{a, b, c, array_of_a_function<16>(), array_of_a_function<32>()}) {
      CHECK(reinterpret_cast<uintptr_t>(array) % 16 == 0);
      all.insert(array);
    }
  });
  CHECK(first.size() == 1 && second.size() == 1 && dynamic.size() == 1 && of_function.size() == 1 && all.size() == 5);
}

TEST(each_block_has_shared_memory_of_its_own) {
  for_seeds(20, [] {
    shiva::simt::launch("test", 4, 32, 4, [] {
      SHIVA_SHARED(unsigned, fixed, [1]);
      SHIVA_DYNAMIC_SHARED(unsigned, dynamic);
      if (threadIdx.x == 0) *fixed = *dynamic = blockIdx.x;
      __syncthreads();
      __syncthreads();
      CHECK(*fixed == blockIdx.x && *dynamic == blockIdx.x);
    });
  });
}

// ---- cp.async

struct alignas(16) Words {
  uint32_t at[16];
};
static constexpr Words kSource = {{11, 12, 13, 14, 21, 22, 23, 24, 31, 32, 33, 34, 41, 42, 43, 44}};
// Whether the four words of copy i hold the source's.
static bool copied(const uint32_t* shared, int i) {
  return std::equal(shared + 4 * i, shared + 4 * i + 4, kSource.at + 4 * i);
}

// Runs a kernel of one thread on 16 words of shared memory that hold 7.
static void with_words(const std::function<void(uint32_t*)>& kernel) {
  run(1, [&] {
    SHIVA_SHARED(Words, words, [1]);
    std::fill_n(words[0].at, 16, 7u);
    kernel(words[0].at);
  });
}
static void copy(uint32_t* shared, int i) { copy_async16(shared + 4 * i, kSource.at + 4 * i, true); }

TEST(a_missing_wait_reads_neither_the_copy_nor_what_was_there) {
  with_words([](uint32_t* s) {
    copy(s, 0);
    for (int i = 0; i < 4; ++i) CHECK(s[i] != kSource.at[i] && s[i] != 7u && s[i] != 0u);
    commit_copies();
    for (int i = 0; i < 4; ++i) CHECK(s[i] != kSource.at[i] && s[i] != 7u && s[i] != 0u);
    wait_copies<0>();
    CHECK(copied(s, 0) && s[4] == 7u);
  });
}

TEST(wait_n_leaves_the_last_n_groups_in_flight) {
  with_words([](uint32_t* s) {
    for (int i = 0; i < 4; ++i) copy(s, i), commit_copies();
    wait_copies<4>();
    CHECK(!copied(s, 0) && !copied(s, 1) && !copied(s, 2) && !copied(s, 3));
    wait_copies<3>();
    CHECK(copied(s, 0) && !copied(s, 1) && !copied(s, 2) && !copied(s, 3));
    wait_copies<1>();
    CHECK(copied(s, 0) && copied(s, 1) && copied(s, 2) && !copied(s, 3));
    wait_copies<2>();
    CHECK(!copied(s, 3));
    wait_copies<0>();
    CHECK(copied(s, 3));
  });
}

TEST(a_group_holds_all_copies_since_the_last_commit) {
  with_words([](uint32_t* s) {
    copy(s, 0), copy(s, 1), commit_copies();
    copy(s, 2), copy(s, 3), commit_copies();
    wait_copies<1>();
    CHECK(copied(s, 0) && copied(s, 1) && !copied(s, 2) && !copied(s, 3));
    wait_copies<0>();
    CHECK(copied(s, 2) && copied(s, 3));
  });
}

TEST(copies_that_were_not_committed_are_not_waited_for) {
  with_words([](uint32_t* s) {
    copy(s, 0);
    wait_copies<0>();
    CHECK(!copied(s, 0));
    commit_copies();
    wait_copies<0>();
    CHECK(copied(s, 0));
  });
}

TEST(an_empty_group_counts_and_may_stay_in_flight) {
  with_words([](uint32_t* s) {
    copy(s, 0), commit_copies(), commit_copies();
    wait_copies<2>();
    CHECK(!copied(s, 0));
    wait_copies<1>();
    CHECK(copied(s, 0));
  });
}

TEST(the_end_of_a_copy_is_zeroed_and_its_source_not_read) {
  with_words([](uint32_t* s) {
    copy_async16(s, nullptr, false);
    shiva::simt::async_copy(s + 4, kSource.at + 4, 16, 12);
    commit_copies(), wait_copies<0>();
    CHECK(s[0] == 0 && s[1] == 0 && s[2] == 0 && s[3] == 0);
    CHECK(s[4] == 21 && s[5] == 0 && s[6] == 0 && s[7] == 0 && s[8] == 7u);
  });
}

TEST(a_wait_or_barrier_of_other_threads_completes_no_copy) {
  for_seeds(10, [] {
    run(32, [] {
      SHIVA_SHARED(Words, words, [1]);
      if (threadIdx.x == 0) copy(words[0].at, 0), commit_copies();
      if (threadIdx.x == 1) wait_copies<0>();
      __syncthreads();
      CHECK(!copied(words[0].at, 0));
      __syncthreads();
      if (threadIdx.x == 0) wait_copies<0>();
      __syncthreads();
      CHECK(copied(words[0].at, 0));
    });
  });
}

// ---- atomics

TEST(no_atomic_update_is_lost) {
  for_seeds(20, [] {
    unsigned sum = 0, greatest = 0, least = ~0u;
    double real = 0;
    std::vector<int> old_seen(3 * 64 * 4);
    shiva::simt::launch("test", 3, 64, 0, [&] {
      for (int i = 0; i < 4; ++i) ++old_seen.at(atomicAdd(&sum, 1u));
      atomicAdd(&real, 0.5);
      atomicMax(&greatest, blockIdx.x * 64 + threadIdx.x), atomicMin(&least, blockIdx.x * 64 + threadIdx.x + 3);
      CHECK(sum > 0 && least < ~0u);
    });
    CHECK(sum == 768 && real == 96.0 && greatest == 191 && least == 3);
    for (int count : old_seen) CHECK(count == 1);
  });
}

TEST(exchange_and_compare_and_swap_return_the_old_value) {
  run(1, [] {
    int x = 5;
    CHECK(atomicExch(&x, 6) == 5 && x == 6);
    CHECK(atomicCAS(&x, 5, 9) == 6 && x == 6);
    CHECK(atomicCAS(&x, 6, 9) == 6 && x == 9);
    CHECK(atomicMax(&x, -1) == 9 && x == 9 && atomicMin(&x, -1) == 9 && x == -1 && atomicAdd(&x, 3) == -1 && x == 2);
  });
}

TEST(exactly_one_thread_wins_a_compare_and_swap) {
  for_seeds(20, [] {
    int owner = -1, winners = 0;
    run(96, [&] { winners += atomicCAS(&owner, -1, static_cast<int>(threadIdx.x)) == -1; });
    CHECK(winners == 1 && owner >= 0);
  });
}

TEST(other_threads_run_before_an_atomic) {
  std::set<std::vector<unsigned>> logs;
  for_seeds(20, [&] {
    std::vector<unsigned> log;
    int word = 0;
    run(64, [&] {
      for (int i = 0; i < 2; ++i) atomicAdd(&word, 1), log.push_back(threadIdx.x);
    });
    logs.insert(log);
  });
  CHECK(logs.size() > 10);
}

TEST(a_thread_that_spins_on_an_atomic_lets_the_others_run) {
  for (unsigned setter : {0u, 40u, 95u})
    for_seeds(20, [=] {
      int flag = 0, passed = 0;
      run(96, [&] {
        if (threadIdx.x == setter) atomicExch(&flag, 1);
        while (atomicAdd(&flag, 0) == 0) {
        }
        atomicAdd(&passed, 1);
      });
      CHECK(passed == 96);
    });
}

TEST(a_lock_made_of_atomics_excludes_the_others) {
  for_seeds(20, [] {
    int lock = 0, count = 0;
    shiva::simt::launch("test", 2, 64, 0, [&] {
      while (atomicCAS(&lock, 0, 1) != 0) {
      }
      const int before = count;
      atomicAdd(&count, 0);  // lets others run, which must not get in here
      count = before + 1;
      atomicExch(&lock, 0);
    });
    CHECK(count == 128);
  });
}

int main(int count, char** names) { return run_checks(count, names); }
