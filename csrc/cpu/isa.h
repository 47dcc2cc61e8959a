// Run-time choice between the instruction sets that the kernels were compiled for.
//
// A `<op>_kernel.cpp` is compiled once per instruction set, each time in another namespace, so that a wheel runs on
// any x86-64 machine and still uses AVX-512 where it exists. Such a file must not include a header with inline
// functions of its own that other files share (no <vector>, no <algorithm>, no torch): the linker keeps one copy
// of those, and it may be the AVX-512 one.
#pragma once

namespace shiva::cpu {

enum class Isa { Default, Avx2, Avx512 };

// The best instruction set that was built and that this processor has; SHIVA_CPU_CAPABILITY=default|avx2|avx512
// lowers it. Read once. Throws std::runtime_error on an unknown name or one that cannot be used here.
Isa active_isa();

const char* isa_name(Isa isa);

}  // namespace shiva::cpu

#if defined(SHIVA_X86)
#define SHIVA_DECLARE_KERNEL(...) \
  namespace isa_default {         \
  __VA_ARGS__;                    \
  }                               \
  namespace isa_avx2 {            \
  __VA_ARGS__;                    \
  }                               \
  namespace isa_avx512 {          \
  __VA_ARGS__;                    \
  }
#define SHIVA_CALL_KERNEL(name, ...)                                        \
  do {                                                                      \
    switch (::shiva::cpu::active_isa()) {                                   \
      case ::shiva::cpu::Isa::Avx512: isa_avx512::name(__VA_ARGS__); break; \
      case ::shiva::cpu::Isa::Avx2: isa_avx2::name(__VA_ARGS__); break;     \
      default: isa_default::name(__VA_ARGS__);                              \
    }                                                                       \
  } while (0)
#else
#define SHIVA_DECLARE_KERNEL(...) \
  namespace isa_default {         \
  __VA_ARGS__;                    \
  }
#define SHIVA_CALL_KERNEL(name, ...) isa_default::name(__VA_ARGS__)
#endif
