#include "simt/runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <sstream>
#include <utility>
#include <vector>

#include "simt/fibre.h"
#include "simt/simt.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace shiva::simt {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStaticShared = 48 << 10;  // what every architecture gives without asking
constexpr size_t kBlockShared = 227 << 10;  // static and dynamic, what the largest one gives
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

struct Random {  // xorshift64*
  uint64_t state = 0x9e3779b97f4a7c15ull;
  uint64_t next() {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545f4914f6cdd1dull;
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
};

enum class State { Ready, AtBarrier, InCollective, Done };
enum class Barrier { Plain, Count, Or, And };
// How threads take turns between two block barriers.
enum class Schedule { Lockstep, RandomLanes, RunAhead, Laggard };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zero_bytes;
};

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

struct Block;

struct Thread {
  Fibre fibre;
  ThreadView view;
  Block* block = nullptr;
  int linear = 0, warp = 0, lane = 0;
  State state = State::Ready;
  std::vector<Copy> open;                // copied since the last commit
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
  uint32_t lane_time = 1;
  std::array<uint32_t, kWarp> seen{};
};

struct Meeting {  // lanes of one warp on their way into one collective
  const char* what;
  unsigned mask, arrived = 0;
  std::array<void*, kWarp> slots{};
};

struct Warp {
  unsigned ready = 0;
  unsigned alive = 0;
  std::vector<Meeting> meetings;
};

struct Block {
  uint32_t number = 0;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  unsigned ready_warps = 0;
  int alive = 0;
  // the block barrier
  int waiting = 0, line = 0, sum = 0, result = 0;
  Barrier kind = Barrier::Plain;
  uint32_t epoch = 0;
  // shared memory
  std::vector<std::pair<const void*, Memory>> shared;
  size_t static_bytes = 0;
  Memory dynamic;
  size_t dynamic_bytes = 0;
  // schedule
  Schedule schedule = Schedule::Lockstep;
  int favourite = 0, next_warp = 0, next_lane = 0;
};

std::mutex launch_mutex;
Random rng;
uint64_t next_seed = 1, running_seed = 0;
uint64_t total_threads = 0;
std::map<std::string, uint64_t> kernel_launches;
std::vector<std::tuple<std::string, uint64_t, uint64_t>> recent_launches;  // a few thousand at most
const char* kernel_name = nullptr;
const std::function<void()>* kernel_body = nullptr;
LaunchView launch_view;
Thread* current = nullptr;
Fibre scheduler;
std::exception_ptr failure;
std::vector<std::unique_ptr<Thread>> pool;
std::vector<Thread*> idle;

std::string describe(const Thread& t) {
  std::ostringstream text;
  const auto& i = t.view.index;
  const auto& b = t.view.block_index;
  text << "thread (" << i.x << ", " << i.y << ", " << i.z << ") of block (" << b.x << ", " << b.y << ", " << b.z << ")";
  return text.str();
}

Thread* new_thread() {
  if (idle.empty()) {
    auto thread = std::make_unique<Thread>();
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack, 4096, PROT_NONE);  // an overflow stops here instead of in the neighbour's stack
    thread->fibre.stack = static_cast<char*>(stack);
    thread->fibre.stack_bytes = kStack;
    pool.push_back(std::move(thread));
    idle.push_back(pool.back().get());
  }
  Thread* t = idle.back();
  idle.pop_back();
  return t;
}

void make_ready(Thread& t) {
  t.state = State::Ready;
  t.block->warps[t.warp].ready |= 1u << t.lane;
  t.block->ready_warps |= 1u << t.warp;
}

void stop(Thread& t, State state) {
  t.state = state;
  Warp& warp = t.block->warps[t.warp];
  warp.ready &= ~(1u << t.lane);
  if (warp.ready == 0) t.block->ready_warps &= ~(1u << t.warp);
}

void draw_schedule(Block& block) {
  block.schedule = static_cast<Schedule>(rng.below(4));
  block.favourite = static_cast<int>(rng.below(static_cast<uint32_t>(block.warps.size())));
}

void open_barrier(Block& block) {
  block.result = block.kind == Barrier::Count ? block.sum
                 : block.kind == Barrier::Or  ? block.sum > 0
                                              : block.sum == block.waiting;
  block.waiting = block.sum = 0;
  ++block.epoch;
  for (Thread* t : block.threads)
    if (t->state == State::AtBarrier) make_ready(*t);
  draw_schedule(block);
}

void finish_thread(Thread& t) {
  Block& block = *t.block;
  stop(t, State::Done);
  block.warps[t.warp].alive &= ~(1u << t.lane);
  --block.alive;
  if (block.alive > 0 && block.waiting == block.alive) open_barrier(block);
}

void entry() {
  for (;;) {
    Thread& t = *current;
    arrived(t.fibre);
    try {
      (*kernel_body)();
      const auto some = [](const std::vector<Copy>& group) { return !group.empty(); };
      if (some(t.open) || std::any_of(t.groups.begin(), t.groups.end(), some))
        fail("the thread ended with cp.async copies that nobody waited for");
    } catch (...) {
      failure = std::current_exception();
    }
    finish_thread(t);
    switch_fibre(t.fibre, scheduler, true);
  }
}

void yield_to_scheduler() {
  Thread& t = *current;
  switch_fibre(t.fibre, scheduler);
}

int nth_bit(unsigned bits, uint32_t n) {
  while (n--) bits &= bits - 1;
  return __builtin_ctz(bits);
}
int random_bit(unsigned bits) { return nth_bit(bits, rng.below(static_cast<uint32_t>(__builtin_popcount(bits)))); }
// The first set bit at or after `from`, in a circle.
int next_bit(unsigned bits, int from) {
  const unsigned after = from < 32 ? bits & (~0u << from) : 0;
  return __builtin_ctz(after ? after : bits);
}

Thread* choose(Block& block) {
  const unsigned ready = block.ready_warps;
  int warp = 0;
  bool random_lane = true;
  switch (block.schedule) {
    case Schedule::Lockstep:
      // One step of every lane in turn, warp after warp.
      warp = next_bit(ready, block.next_warp);
      random_lane = false;
      break;
    case Schedule::RandomLanes: warp = random_bit(ready); break;
    case Schedule::RunAhead:
      if (!(ready >> block.favourite & 1)) block.favourite = random_bit(ready);
      warp = block.favourite;
      break;
    case Schedule::Laggard: {
      const unsigned others = ready & ~(1u << block.favourite);
      warp = random_bit(others ? others : ready);
      break;
    }
  }
  const unsigned lanes = block.warps[warp].ready;
  int lane = 0;
  if (random_lane) {
    lane = random_bit(lanes);
  } else {
    lane = next_bit(lanes, warp == block.next_warp ? block.next_lane : 0);
    const bool last = lanes >> lane == 1;
    block.next_warp = last ? warp + 1 : warp;
    block.next_lane = last ? 0 : lane + 1;
  }
  return block.threads[warp * kWarp + lane];
}

// Of exactly this size, so that AddressSanitizer sees the first access beyond it.
Memory garbage_memory(size_t bytes, size_t alignment) {
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes) != 0) throw std::bad_alloc();
  char* begin = static_cast<char*>(memory);
  for (size_t i = 0; i < bytes; ++i) begin[i] = static_cast<char>(rng.next() >> 32);
  race_forget(begin, bytes);
  return Memory(begin);
}

std::unique_ptr<Block> make_block(uint32_t number, size_t dynamic_bytes) {
  auto block = std::make_unique<Block>();
  const Dim3 &grid = launch_view.grid, &dim = launch_view.block;
  const uint32_t count = dim.x * dim.y * dim.z;
  block->number = number;
  block->warps.resize((count + kWarp - 1) / kWarp);
  block->alive = static_cast<int>(count);
  block->dynamic_bytes = dynamic_bytes;
  if (dynamic_bytes) block->dynamic = garbage_memory(dynamic_bytes, 128);
  for (uint32_t i = 0; i < count; ++i) {
    Thread* t = new_thread();
    t->view.index = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
    t->view.block_index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    t->block = block.get();
    t->linear = static_cast<int>(i), t->warp = t->linear / kWarp, t->lane = t->linear % kWarp;
    t->open.clear(), t->groups.clear();
    t->lane_time = 1;
    t->seen.fill(0);
    prepare(t->fibre, entry);
    block->threads.push_back(t);
    block->warps[t->warp].alive |= 1u << t->lane;
    make_ready(*t);
  }
  draw_schedule(*block);
  return block;
}

void retire(Block& block) {
  for (Thread* t : block.threads) {
    if (t->state != State::Done) abandon(t->fibre);
    idle.push_back(t);
  }
}

void check_shared(size_t bytes) {
  if (bytes > kBlockShared) fail(std::to_string(bytes) + " bytes of shared memory a block; CUDA gives 227 KiB at most");
}

std::string deadlock(const std::vector<std::unique_ptr<Block>>& blocks) {
  std::ostringstream text;
  text << "deadlock:";
  int named = 0;
  for (const auto& block : blocks)
    for (const Thread* t : block->threads) {
      if (t->state == State::Done || named++ >= 4) continue;
      text << ' ' << describe(*t);
      if (t->state == State::AtBarrier) text << " waits at the barrier in line " << block->line << ';';
      for (const Meeting& m : block->warps[t->warp].meetings)
        if (t->state == State::InCollective && (m.arrived >> t->lane & 1))
          text << " waits in " << m.what << " for lanes 0x" << std::hex << (m.mask & ~m.arrived) << std::dec << ';';
    }
  return text.str();
}

}  // namespace

static Error error(const std::string& message) {
  std::ostringstream text;
  text << "simt: " << (kernel_name ? kernel_name : "?") << ": " << message << " (seed " << running_seed << ")";
  if (current != nullptr) text << ", in " << describe(*current);
  return Error(text.str());
}

void fail(const std::string& message) { throw error(message); }

void fail_without_unwinding(const std::string& message) {
  failure = std::make_exception_ptr(error(message));
  switch_fibre(current->fibre, scheduler, true);
  std::abort();  // the launch has ended: nobody comes back
}

const ThreadView& this_thread() { return current->view; }
const LaunchView& this_launch() { return launch_view; }
bool in_kernel() { return current != nullptr; }
void set_seed(uint64_t seed) { next_seed = seed; }
uint64_t seed() { return next_seed; }
uint64_t threads_run() { return total_threads; }
uint64_t launches_run() {
  uint64_t total = 0;
  for (const auto& [kernel, count] : kernel_launches) total += count;
  return total;
}
const std::map<std::string, uint64_t>& launches_by_kernel() { return kernel_launches; }
std::vector<std::tuple<std::string, uint64_t, uint64_t>> take_launches() { return std::exchange(recent_launches, {}); }
uint64_t garbage() { return rng.next(); }

void launch(
    const char* kernel, Dim3 grid, Dim3 block, size_t dynamic_bytes, const std::function<void()>& body,
    const char* instance) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  kernel_name = kernel;
  running_seed = next_seed++;
  rng.state = running_seed * 0x9e3779b97f4a7c15ull + 0x632be59bd9b4e019ull;
  for (int i = 0; i < 4; ++i) rng.next();
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, count = uint64_t(grid.x) * grid.y * grid.z;
  // The limits of CUDA itself: a launch beyond them fails on every GPU.
  if (threads == 0 || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64)
    fail("a block of " + std::to_string(threads) + " threads; CUDA takes 1 to 1024");
  if (count == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail("an empty grid, or one beyond 2^31 - 1 x 65535 x 65535 blocks");
  check_shared(dynamic_bytes);
  launch_view = {grid, block};
  kernel_body = &body;
  failure = nullptr;
  scheduler = {};
  total_threads += threads * count, ++kernel_launches[kernel];
  if (recent_launches.size() > 4096) recent_launches.clear();
  recent_launches.emplace_back(instance, count, threads);
  race_new_launch();

  std::vector<uint32_t> order(count);
  for (uint32_t i = 0; i < count; ++i) order[i] = i;
  for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[rng.below(static_cast<uint32_t>(i))]);
  const size_t resident_limit = 1 + rng.below(3);
  std::vector<std::unique_ptr<Block>> resident;
  size_t started = 0;
  std::string dead;
  while ((started < order.size() || !resident.empty()) && failure == nullptr) {
    while (resident.size() < resident_limit && started < order.size())
      resident.push_back(make_block(order[started++], dynamic_bytes));
    // A block keeps the processor for a while: switching at every step would only cost time.
    const size_t first = rng.below(static_cast<uint32_t>(resident.size()));
    size_t chosen = first;
    while (resident[chosen]->ready_warps == 0) {
      chosen = (chosen + 1) % resident.size();
      if (chosen == first) break;
    }
    Block& running = *resident[chosen];
    if (running.ready_warps == 0) {
      dead = deadlock(resident);
      break;
    }
    // A thread may spin until another one has come, whom the schedule would never choose.
    if (rng.below(64) == 0) draw_schedule(running);
    for (uint32_t turn = 16 + rng.below(512); turn && running.ready_warps && failure == nullptr; --turn) {
      current = choose(running);
      switch_fibre(scheduler, current->fibre);
      current = nullptr;
    }
    if (running.alive == 0) {
      retire(running);
      resident.erase(resident.begin() + static_cast<ptrdiff_t>(chosen));
    }
  }
  for (const auto& left : resident) retire(*left);
  current = nullptr;
  kernel_body = nullptr;
  if (failure != nullptr) std::rethrow_exception(std::exchange(failure, nullptr));
  if (!dead.empty()) fail(dead);
}

// ---- shared memory

void* shared_memory(const void* site, size_t bytes, size_t alignment) {
  Block& block = *current->block;
  for (const auto& [known, memory] : block.shared)
    if (known == site) return memory.get();
  block.static_bytes += bytes;
  if (block.static_bytes > kStaticShared)
    fail("more than 48 KiB of static shared memory: " + std::to_string(block.static_bytes) + " bytes");
  check_shared(block.static_bytes + block.dynamic_bytes);
  block.shared.emplace_back(site, garbage_memory(bytes, std::max<size_t>(alignment, 16)));
  return block.shared.back().second.get();
}

void* dynamic_shared_memory() { return current->block->dynamic.get(); }

// ---- the block's barrier

static int barrier(Barrier kind, int predicate, int line) {
  Thread& t = *current;
  Block& block = *t.block;
  if (block.waiting && (block.line != line || block.kind != kind))
    fail(
        "threads of a block wait at different barriers, in lines " + std::to_string(block.line) + " and " +
        std::to_string(line));
  block.kind = kind, block.line = line;
  block.sum += predicate != 0;
  ++block.waiting;
  stop(t, State::AtBarrier);
  if (block.waiting == block.alive) open_barrier(block);
  yield_to_scheduler();
  return block.result;
}

// ---- warps

int lane_of_this_thread() { return current->lane; }

void warp_collective(
    const char* what, unsigned mask, void* slot, void (*finish)(void* const*, unsigned), bool orders_memory) {
  Thread& t = *current;
  Warp& warp = t.block->warps[t.warp];
  if (!(mask >> t.lane & 1)) fail(std::string(what) + ": the calling lane is not in its mask");
  if (mask & ~warp.alive) fail(std::string(what) + ": the mask names lanes that have exited or do not exist");
  auto meeting = warp.meetings.end();
  for (auto m = warp.meetings.begin(); m != warp.meetings.end(); ++m) {
    if (m->mask == mask && std::strcmp(m->what, what) == 0)
      meeting = m;
    else if ((m->mask >> t.lane & 1) && (m->arrived & mask))  // they wait for this lane, and it for them
      fail(std::string(what) + " meets " + m->what + " of the same warp, or the masks differ");
  }
  if (meeting == warp.meetings.end()) {
    warp.meetings.push_back({what, mask});
    meeting = warp.meetings.end() - 1;
  }
  meeting->slots[t.lane] = slot;
  meeting->arrived |= 1u << t.lane;
  stop(t, State::InCollective);
  if (meeting->arrived == mask) {
    const Meeting done = *meeting;
    warp.meetings.erase(meeting);
    finish(done.slots.data(), mask);
    std::array<uint32_t, kWarp> joined{};
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Thread& other = *t.block->threads[t.warp * kWarp + lane];
      make_ready(other);
      if (!orders_memory) continue;
      other.seen[lane] = other.lane_time;
      for (int l = 0; l < kWarp; ++l) joined[l] = std::max(joined[l], other.seen[l]);
    }
    for (int lane = 0; orders_memory && lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Thread& other = *t.block->threads[t.warp * kWarp + lane];
      other.seen = joined;
      ++other.lane_time;
    }
  }
  yield_to_scheduler();
}

uint64_t shuffle(const char* what, unsigned mask, uint64_t value, int source) {
  Exchange mine{value, source, 0};
  warp_collective(what, mask, &mine, [](void* const* slots, unsigned) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (slots[lane] == nullptr) continue;
      Exchange& e = *static_cast<Exchange*>(slots[lane]);
      const auto* from = static_cast<const Exchange*>(slots[e.source & 31]);
      e.result = from ? from->value : garbage();  // undefined, says the guide
    }
  });
  return mine.result;
}

void check_width(int width) {
  if (width < 1 || width > kWarp || (width & (width - 1)))
    fail("a shuffle of width " + std::to_string(width) + "; wanted a power of two up to 32");
}

// All lanes get fold(values of the lanes in the mask).
template <typename Fold>
static uint64_t reduce(const char* what, unsigned mask, uint64_t value, Fold) {
  Exchange mine{value, 0, 0};
  warp_collective(what, mask, &mine, [](void* const* slots, unsigned) {
    for (int lane = 0; lane < kWarp; ++lane)
      if (slots[lane]) static_cast<Exchange*>(slots[lane])->result = Fold::of(slots, lane);
  });
  return mine.result;
}

namespace {
uint64_t value_at(void* slot) { return static_cast<Exchange*>(slot)->value; }
struct Ballot {
  static uint64_t of(void* const* slots, int) {
    unsigned bits = 0;
    for (int l = 0; l < kWarp; ++l) bits |= (slots[l] && value_at(slots[l])) ? 1u << l : 0u;
    return bits;
  }
};
struct Match {
  static uint64_t of(void* const* slots, int lane) {
    unsigned bits = 0;
    for (int l = 0; l < kWarp; ++l) bits |= (slots[l] && value_at(slots[l]) == value_at(slots[lane])) ? 1u << l : 0u;
    return bits;
  }
};
struct Sum {
  static uint64_t of(void* const* slots, int) {
    unsigned sum = 0;
    for (int l = 0; l < kWarp; ++l) sum += slots[l] ? static_cast<unsigned>(value_at(slots[l])) : 0u;
    return sum;
  }
};
struct Least {
  static uint64_t of(void* const* slots, int) {
    uint64_t least = ~0ull;
    for (int l = 0; l < kWarp; ++l) least = slots[l] ? std::min(least, value_at(slots[l])) : least;
    return least;
  }
};
struct Most {
  static uint64_t of(void* const* slots, int) {
    uint64_t most = 0;
    for (int l = 0; l < kWarp; ++l) most = slots[l] ? std::max(most, value_at(slots[l])) : most;
    return most;
  }
};
}  // namespace

// ---- atomics

void atomic_begin(const void* address, size_t bytes) {
  yield_to_scheduler();
  race_access(address, bytes, true, true);
}
void atomic_end(const void*, size_t) {
  // No other thread runs between begin and end: the change in between is the atomic one.
}

// ---- cp.async

void async_copy(void* shared, const void* global, size_t bytes, size_t zero_bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    fail("cp.async of " + std::to_string(bytes) + " bytes between addresses that are not multiples of that");
  for (size_t i = 0; i < bytes; ++i) static_cast<char*>(shared)[i] = static_cast<char>(rng.next() >> 32);
  race_access(shared, bytes, true, false);
  current->open.push_back({shared, global, bytes, zero_bytes});
}

void async_commit() { current->groups.push_back(std::exchange(current->open, {})); }

void async_wait(int groups_in_flight) {
  Thread& t = *current;
  while (static_cast<int>(t.groups.size()) > groups_in_flight) {
    for (const Copy& c : t.groups.front()) {
      const size_t copied = c.bytes - c.zero_bytes;
      race_access(c.to, c.bytes, true, false);
      if (copied) {
        race_access(c.from, copied, false, false);
        std::memcpy(c.to, c.from, copied);
      }
      std::memset(static_cast<char*>(c.to) + copied, 0, c.zero_bytes);
    }
    t.groups.pop_front();
  }
}

// ---- for the race detector

Clock clock_of_this_thread() {
  const Thread& t = *current;
  return {static_cast<uint32_t>(t.linear), t.block->number, t.block->epoch, t.lane_time, t.seen.data()};
}

bool on_own_stack(const void* address) {
  const char* a = static_cast<const char*>(address);
  return a >= current->fibre.stack && a < current->fibre.stack + current->fibre.stack_bytes;
}

}  // namespace shiva::simt

using namespace shiva::simt;

unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(reduce("__ballot_sync", mask, predicate != 0, Ballot{}));
}
int __any_sync(unsigned mask, int predicate) { return reduce("__any_sync", mask, predicate != 0, Ballot{}) != 0; }
int __all_sync(unsigned mask, int predicate) { return reduce("__all_sync", mask, predicate == 0, Ballot{}) == 0; }
unsigned __match_any_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(reduce("__match_any_sync", mask, value, Match{}));
}
unsigned __match_any_sync(unsigned mask, unsigned long long value) {
  return static_cast<unsigned>(reduce("__match_any_sync", mask, value, Match{}));
}
unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(reduce("__reduce_add_sync", mask, value, Sum{}));
}
unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(reduce("__reduce_min_sync", mask, value, Least{}));
}
unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(reduce("__reduce_max_sync", mask, value, Most{}));
}
// Signed numbers are ordered as unsigned ones with the sign bit flipped.
int __reduce_add_sync(unsigned mask, int value) {
  return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value)));
}
int __reduce_min_sync(unsigned mask, int value) {
  return static_cast<int>(__reduce_min_sync(mask, static_cast<unsigned>(value) ^ 1u << 31) ^ 1u << 31);
}
int __reduce_max_sync(unsigned mask, int value) {
  return static_cast<int>(__reduce_max_sync(mask, static_cast<unsigned>(value) ^ 1u << 31) ^ 1u << 31);
}

void __syncwarp(unsigned mask) {
  warp_collective("__syncwarp", mask, &mask, [](void* const*, unsigned) {}, true);
}

void __syncthreads(int line) { barrier(Barrier::Plain, 0, line); }
int __syncthreads_count(int predicate, int line) { return barrier(Barrier::Count, predicate, line); }
int __syncthreads_or(int predicate, int line) { return barrier(Barrier::Or, predicate, line); }
int __syncthreads_and(int predicate, int line) { return barrier(Barrier::And, predicate, line); }
