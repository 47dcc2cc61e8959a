#include "simt/fibre.h"

#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace shiva::simt {

#if defined(__x86_64__)
// The six callee-saved registers and the return address are all that a call must preserve; the floating-point control
// words are the same in every fibre.
extern "C" void shiva_simt_switch(void** save, void* load);
asm(R"(
.text
.type shiva_simt_switch,@function
.globl shiva_simt_switch
.hidden shiva_simt_switch
shiva_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shiva_simt_switch, .-shiva_simt_switch
)");

void prepare(Fibre& fibre, void (*entry)()) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(fibre.stack) + fibre.stack_bytes) & ~uintptr_t(15);
  void** stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;  // where entry's caller would be: keeps its frame aligned, and ends every unwinding
  *--stack = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--stack = nullptr;
  fibre.stack_pointer = stack;
  fibre.fake_stack = nullptr;
}

static void change(Fibre& from, Fibre& to) { shiva_simt_switch(&from.stack_pointer, to.stack_pointer); }
#else
void prepare(Fibre& fibre, void (*entry)()) {
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack;
  fibre.context.uc_stack.ss_size = fibre.stack_bytes;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, entry, 0);
  fibre.fake_stack = nullptr;
}

static void change(Fibre& from, Fibre& to) { swapcontext(&from.context, &to.context); }
#endif

#if defined(__SANITIZE_ADDRESS__)
static Fibre* came_from = nullptr;

void arrived(Fibre& fibre) {
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fibre.fake_stack, &bottom, &bytes);
  if (came_from != nullptr && came_from->stack == nullptr) {  // the thread's own stack, seen for the first time
    came_from->stack = static_cast<char*>(const_cast<void*>(bottom));
    came_from->stack_bytes = bytes;
  }
}

void switch_fibre(Fibre& from, Fibre& to, bool last) {
  came_from = &from;
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
  change(from, to);
  arrived(from);
}

void abandon(Fibre& fibre) { __asan_unpoison_memory_region(fibre.stack, fibre.stack_bytes); }
#else
void arrived(Fibre&) {}
void abandon(Fibre&) {}
void switch_fibre(Fibre& from, Fibre& to, bool) { change(from, to); }
#endif

}  // namespace shiva::simt
