// A stack of one's own and a way to switch to it: about 5 ns on x86-64, ucontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace shiva::simt {

struct Fibre {
  char* stack = nullptr;  // lowest address
  size_t stack_bytes = 0;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Prepares a fibre to run entry() on its stack; entry must never return.
void prepare(Fibre& fibre, void (*entry)());
// Suspends `from`, which is running, and goes on in `to`. last: `from` will never run again.
void switch_fibre(Fibre& from, Fibre& to, bool last = false);
// To be called first thing in entry.
void arrived(Fibre& fibre);
// To be called before the stack of a fibre that was left in the middle is used anew.
void abandon(Fibre& fibre);

}  // namespace shiva::simt
