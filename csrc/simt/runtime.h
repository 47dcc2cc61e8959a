// The simulator's scheduler: fibres, barriers, warp collectives, shared memory, deferred copies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace shiva::simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3() = default;
  Dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct ThreadView {
  Dim3 index, block_index;
};
struct LaunchView {
  Dim3 grid, block;
};
const ThreadView& this_thread();
const LaunchView& this_launch();
bool in_kernel();

// Runs body once for every CUDA thread of the grid. Raises Error on misuse; the message names kernel and seed.
// instance: a text that has the kernel's template arguments, for take_launches.
void launch(
    const char* kernel, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& body,
    const char* instance = "");

// The seed of the next launches' schedules; each launch advances it. Printed in every Error.
void set_seed(uint64_t seed);
uint64_t seed();
// CUDA threads and launches simulated since the process began.
uint64_t threads_run();
uint64_t launches_run();
// The same by kernel, under the name that its launcher wrote: "(name_kernel<...>)".
const std::map<std::string, uint64_t>& launches_by_kernel();
// (instance, blocks, threads a block) of the launches since the last call.
std::vector<std::tuple<std::string, uint64_t, uint64_t>> take_launches();

void* shared_memory(const void* site, size_t bytes, size_t alignment);
void* dynamic_shared_memory();

// Waits until every lane of mask has come here with its slot; the last one calls finish(slots, mask) for all of them.
// slots[lane] is null outside the mask. orders_memory: whether it is a barrier for memory (only __syncwarp is).
void warp_collective(
    const char* what, unsigned mask, void* slot, void (*finish)(void* const* slots, unsigned mask),
    bool orders_memory = false);

void atomic_begin(const void* address, size_t bytes);
void atomic_end(const void* address, size_t bytes);

// cp.async: nothing is copied before the group that it was committed to is waited for. zero_bytes of the end are
// zeroed.
void async_copy(void* shared, const void* global, size_t bytes, size_t zero_bytes);
void async_commit();
void async_wait(int groups_in_flight);

// Random bits that no kernel may rely on.
uint64_t garbage();

// Hooks of the race detector (race.cpp); nothing happens in the other builds.
struct Clock {
  uint32_t thread;       // in the block
  uint32_t block;        // in the grid
  uint32_t epoch;        // block barriers passed
  uint32_t lane_time;    // of this thread in its warp
  const uint32_t* seen;  // [32]: the time of each lane of the warp that is ordered before now
};
Clock clock_of_this_thread();
bool on_own_stack(const void* address);
void race_new_launch();
void race_forget(const void* begin, size_t bytes);
void race_access(const void* address, size_t bytes, bool write, bool atomic);
[[noreturn]] void fail(const std::string& message);
// The same from inside a kernel where an exception must not be thrown; leaves the thread's stack as it is.
[[noreturn]] void fail_without_unwinding(const std::string& message);

}  // namespace shiva::simt
