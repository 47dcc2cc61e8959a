# shiva_add_simt(<variant>): the module _simt_<variant>, the CUDA kernels run on the CPU by csrc/simt. For tests.
#
# plain: as it is. asan: AddressSanitizer and UBSan. race: loads and stores of the kernels report to csrc/simt/race.cpp.
option(SHIVA_BUILD_SIMT "Build the simulated CUDA kernels that the tests run" OFF)

function(shiva_add_simt variant)
  set(name _simt_${variant})
  file(GLOB kernels CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu)
  set_source_files_properties(${kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++;-Wno-unknown-pragmas")
  # Kernels apart from the rest: under `race` only they may be instrumented.
  add_library(${name}_kernels OBJECT ${kernels})
  pybind11_add_module(${name} MODULE NO_EXTRAS csrc/simt/library.cpp csrc/simt/runtime.cpp csrc/simt/fibre.cpp
    csrc/simt/race.cpp csrc/checks.cpp $<TARGET_OBJECTS:${name}_kernels>)
  foreach(target ${name} ${name}_kernels)
    target_include_directories(${target} PRIVATE csrc)
    target_link_libraries(${target} PRIVATE torch_stable)
    set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE ON)
    target_compile_definitions(${target} PRIVATE SHIVA_SIMT)
    target_compile_options(${target} PRIVATE -Wall -Wextra -Wno-unused-parameter -Wno-unused-function -O2 -g1)
  endforeach()
  target_compile_definitions(${name} PRIVATE SHIVA_SIMT_MODULE=${name} SHIVA_SIMT_VARIANT="${variant}")
  if(variant STREQUAL "asan")
    foreach(target ${name} ${name}_kernels)
      target_compile_options(${target} PRIVATE -fsanitize=address,undefined -fno-sanitize-recover=undefined)
    endforeach()
    target_link_options(${name} PRIVATE -fsanitize=address,undefined)
  elseif(variant STREQUAL "race")
    target_compile_options(${name}_kernels PRIVATE -fsanitize=thread -Wno-tsan)
    target_compile_definitions(${name} PRIVATE SHIVA_SIMT_RACE)
  endif()
  set_target_properties(${name} PROPERTIES BUILD_RPATH "${SHIVA_TORCH_LIB}")
endfunction()

if(SHIVA_BUILD_SIMT)
  foreach(variant plain asan race)
    shiva_add_simt(${variant})
  endforeach()
endif()
