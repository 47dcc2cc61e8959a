// The race detector: kernels compiled with -fsanitize=thread call __tsan_* for every load and store; these are ours.
//
// Two accesses to one place conflict if one of them writes, they come from different threads, and nothing orders them.
// What orders memory: the block's barrier, and __syncwarp among its lanes. Shuffles and votes do not. Blocks of one
// launch are never ordered. Atomics conflict with plain accesses only. One run finds a race whatever the schedule was.
#include <array>
#include <cstring>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#include "simt/runtime.h"

namespace shiva::simt {

#if defined(SHIVA_SIMT_RACE)
namespace {

constexpr uintptr_t kGranule = 2;  // the smallest element that a kernel stores

enum class Kind { Read, Write, Atomic };
const char* const kNames[] = {"read", "write", "atomic"};

struct Accesses {  // the last ones of one kind by the lanes of one warp
  uint32_t block, warp, epoch;
  std::array<uint32_t, 32> time;  // 0: not by this lane
};

// What came after the last plain write. Everything before that write is ordered before it, or was reported.
struct Shadow {
  bool written = false;
  uint32_t block = 0, thread = 0, epoch = 0, time = 0;
  std::vector<Accesses> reads, atomics;
};

std::unordered_map<uintptr_t, Shadow> shadows;

bool ordered(const Clock& now, uint32_t block, uint32_t thread, uint32_t epoch, uint32_t time) {
  if (block != now.block) return false;
  if (thread == now.thread || epoch < now.epoch) return true;
  return thread / 32 == now.thread / 32 && time <= now.seen[thread % 32];
}

void report(const Clock& now, Kind kind, Kind other, uint32_t block, uint32_t thread) {
  std::ostringstream text;
  text << "race: a " << kNames[int(kind)] << " by thread " << now.thread << " of block " << now.block << " and a "
       << kNames[int(other)] << " by thread " << thread << " of block " << block
       << " of the same memory, with no barrier in between";
  fail_without_unwinding(text.str());  // g++ takes the hooks of -fsanitize=thread for functions that throw nothing
}

void compare(const std::vector<Accesses>& list, Kind other, const Clock& now, Kind kind) {
  for (const Accesses& a : list)
    for (uint32_t lane = 0; lane < 32; ++lane)
      if (a.time[lane] && !ordered(now, a.block, a.warp * 32 + lane, a.epoch, a.time[lane]))
        report(now, kind, other, a.block, a.warp * 32 + lane);
}

void add(std::vector<Accesses>& list, const Clock& now) {
  const uint32_t warp = now.thread / 32, lane = now.thread % 32;
  for (Accesses& a : list)
    if (a.block == now.block && a.warp == warp) {
      if (a.epoch != now.epoch) a.time.fill(0);
      a.epoch = now.epoch, a.time[lane] = now.lane_time;
      return;
    }
  // With accesses of two blocks in the list whatever conflicts with a third one's conflicts with one of theirs.
  if (!list.empty() && list.front().block != list.back().block && list.back().block != now.block) return;
  list.push_back({now.block, warp, now.epoch, {}});
  list.back().time[lane] = now.lane_time;
}

void check(Shadow& s, const Clock& now, Kind kind) {
  if (s.written && !ordered(now, s.block, s.thread, s.epoch, s.time)) report(now, kind, Kind::Write, s.block, s.thread);
  if (kind != Kind::Read) compare(s.reads, Kind::Read, now, kind);
  if (kind != Kind::Atomic) compare(s.atomics, Kind::Atomic, now, kind);
  if (kind != Kind::Write) return add(kind == Kind::Read ? s.reads : s.atomics, now);
  s.written = true;
  s.block = now.block, s.thread = now.thread, s.epoch = now.epoch, s.time = now.lane_time;
  s.reads.clear(), s.atomics.clear();
}

}  // namespace

void race_new_launch() { shadows.clear(); }

void race_forget(const void* begin, size_t bytes) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(begin) / kGranule;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(begin) + bytes + kGranule - 1) / kGranule;
  for (uintptr_t g = from; g < to; ++g) shadows.erase(g);
}

void race_access(const void* address, size_t bytes, bool write, bool atomic) {
  if (!in_kernel() || on_own_stack(address)) return;
  const Clock now = clock_of_this_thread();
  const uintptr_t from = reinterpret_cast<uintptr_t>(address) / kGranule;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(address) + bytes + kGranule - 1) / kGranule;
  for (uintptr_t g = from; g < to; ++g)
    check(shadows[g], now, atomic ? Kind::Atomic : write ? Kind::Write : Kind::Read);
}
#else
void race_new_launch() {}
void race_forget(const void*, size_t) {}
void race_access(const void*, size_t, bool, bool) {}
#endif

}  // namespace shiva::simt

#if defined(SHIVA_SIMT_RACE)
#define SHIVA_TSAN(bytes)                                                                                     \
  extern "C" void __tsan_read##bytes(void* a) { shiva::simt::race_access(a, bytes, false, false); }           \
  extern "C" void __tsan_write##bytes(void* a) { shiva::simt::race_access(a, bytes, true, false); }           \
  extern "C" void __tsan_unaligned_read##bytes(void* a) { shiva::simt::race_access(a, bytes, false, false); } \
  extern "C" void __tsan_unaligned_write##bytes(void* a) { shiva::simt::race_access(a, bytes, true, false); } \
  extern "C" void __tsan_volatile_read##bytes(void* a) { shiva::simt::race_access(a, bytes, false, false); }  \
  extern "C" void __tsan_volatile_write##bytes(void* a) { shiva::simt::race_access(a, bytes, true, false); }
SHIVA_TSAN(1)
SHIVA_TSAN(2)
SHIVA_TSAN(4)
SHIVA_TSAN(8)
SHIVA_TSAN(16)
extern "C" void __tsan_read_range(void* a, long bytes) {
  shiva::simt::race_access(a, static_cast<size_t>(bytes), false, false);
}
extern "C" void __tsan_write_range(void* a, long bytes) {
  shiva::simt::race_access(a, static_cast<size_t>(bytes), true, false);
}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void __tsan_vptr_read(void*) {}
// Host code beside the kernels may hold C++ atomics (reference counts); they are not the kernels'.
extern "C" int __tsan_atomic32_fetch_add(volatile int* a, int v, int) { return __atomic_fetch_add(a, v, 5); }
extern "C" int __tsan_atomic32_fetch_sub(volatile int* a, int v, int) { return __atomic_fetch_sub(a, v, 5); }
extern "C" int __tsan_atomic32_load(const volatile int* a, int) { return __atomic_load_n(a, 5); }
extern "C" char __tsan_atomic8_load(const volatile char* a, int) { return __atomic_load_n(a, 5); }
#endif
