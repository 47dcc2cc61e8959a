#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace shiva::cpu {
namespace {

Isa best_isa() {
#if defined(SHIVA_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Isa::Avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::Avx2;
#endif
  return Isa::Default;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("SHIVA_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : {Isa::Default, Isa::Avx2, Isa::Avx512}) {
    if (std::string(wanted) != isa_name(isa)) continue;
    if (isa > best)
      throw std::runtime_error(
          std::string("SHIVA_CPU_CAPABILITY=") + wanted + ", but this processor supports only " + isa_name(best));
    return isa;
  }
  throw std::runtime_error(std::string("SHIVA_CPU_CAPABILITY must be default, avx2 or avx512, got '") + wanted + "'");
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::Avx512: return "avx512";
    case Isa::Avx2: return "avx2";
    default: return "default";
  }
}

}  // namespace shiva::cpu
