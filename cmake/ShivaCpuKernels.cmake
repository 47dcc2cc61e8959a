# shiva_add_cpu_kernels(<target> <source>...): compile each kernel source once per instruction set, each time in its
# own namespace (SHIVA_ISA); csrc/cpu/isa.h chooses between them at run time.
#
# -fno-math-errno and -fno-trapping-math change no result; they let loops with a branch or a square root vectorise.
# -fopenmp-simd honours `#pragma omp simd`, which names the only sums that may be reordered.
function(shiva_add_cpu_kernels target)
  set(isas isa_default)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    list(APPEND isas isa_avx2 isa_avx512)
    target_compile_definitions(${target} PRIVATE SHIVA_X86)
  endif()
  set(flags_isa_avx2 -mavx2 -mfma -mf16c)
  set(flags_isa_avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
  foreach(isa IN LISTS isas)
    add_library(shiva_${isa} OBJECT ${ARGN})
    target_include_directories(shiva_${isa} PRIVATE csrc)
    target_compile_definitions(shiva_${isa} PRIVATE SHIVA_ISA=${isa})
    if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
      target_compile_definitions(shiva_${isa} PRIVATE SHIVA_X86)
    endif()
    target_compile_options(shiva_${isa} PRIVATE
      -O3 -Wall -Wextra -fopenmp-simd -fno-math-errno -fno-trapping-math ${flags_${isa}})
    set_target_properties(shiva_${isa} PROPERTIES POSITION_INDEPENDENT_CODE ON)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:shiva_${isa}>)
  endforeach()
endfunction()
