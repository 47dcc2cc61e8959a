# SHIVA_WITH_CUDA=AUTO|ON|OFF: AUTO builds the CUDA kernels when nvcc is found. Sets SHIVA_CUDA and prints the decision.
#
# Architectures: CMAKE_CUDA_ARCHITECTURES if given, else the environment's TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), else
# the usual ones from Turing on that this nvcc knows, the newest also as PTX for GPUs to come.
set(SHIVA_WITH_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set_property(CACHE SHIVA_WITH_CUDA PROPERTY STRINGS AUTO ON OFF)
if(NOT SHIVA_WITH_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "SHIVA_WITH_CUDA must be AUTO, ON or OFF, got '${SHIVA_WITH_CUDA}'")
endif()

function(_shiva_torch_architectures result)
  string(REGEX REPLACE "[ ,]+" ";" wanted "$ENV{TORCH_CUDA_ARCH_LIST}")
  set(list "")
  foreach(entry IN LISTS wanted)
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9]+)([af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST must hold entries such as 8.0 or 9.0+PTX, got '${entry}'")
    endif()
    set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
    if(CMAKE_MATCH_4)
      list(APPEND list ${number})
    else()
      list(APPEND list ${number}-real)
    endif()
  endforeach()
  set(${result} "${list}" PARENT_SCOPE)
endfunction()

# Those of 7.5, 8.0, 8.6, 8.9, 9.0, 10.0, 12.0 that this nvcc knows; the newest also as PTX.
function(_shiva_default_architectures result)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
  set(list "")
  foreach(number 75 80 86 89 90 100 120)
    if(known MATCHES "compute_${number}(\n|$)")
      list(APPEND list ${number}-real)
      set(newest ${number})
    endif()
  endforeach()
  list(TRANSFORM list REPLACE "^${newest}-real$" "${newest}")
  set(${result} "${list}" PARENT_SCOPE)
endfunction()

# The kernels and their launchers; also what the simulator builds.
set(SHIVA_CUDA_SOURCES
  csrc/cuda/counterfactual_scatter.cu
  csrc/cuda/ema_scan.cu
  csrc/cuda/expert_rows.cu
  csrc/cuda/facility_location.cu
  csrc/cuda/gather_modulate.cu
  csrc/cuda/launch.cu
  csrc/cuda/residual_gate.cu
  csrc/cuda/router_score.cu
  csrc/cuda/scatter_mean.cu
  csrc/cuda/scatter_residual.cu
  csrc/cuda/soft_rank.cu
  csrc/cuda/token_gather.cu
  csrc/cuda/token_scatter.cu
  csrc/cuda/topk_select.cu)

set(SHIVA_CUDA OFF)
if(SHIVA_WITH_CUDA STREQUAL "OFF")
  message(STATUS "shiva_ext: CUDA kernels off (SHIVA_WITH_CUDA=OFF)")
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(SHIVA_CUDA ON)
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      if(DEFINED ENV{TORCH_CUDA_ARCH_LIST} AND NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
        _shiva_torch_architectures(CMAKE_CUDA_ARCHITECTURES)
      else()
        _shiva_default_architectures(CMAKE_CUDA_ARCHITECTURES)
      endif()
    endif()
    enable_language(CUDA)
    message(STATUS "shiva_ext: CUDA kernels on (nvcc ${CMAKE_CUDA_COMPILER_VERSION}, architectures "
      "${CMAKE_CUDA_ARCHITECTURES})")
  elseif(SHIVA_WITH_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SHIVA_WITH_CUDA=ON, but nvcc was not found; install the CUDA toolkit or put nvcc on the PATH")
  else()
    message(STATUS "shiva_ext: CUDA kernels off (nvcc not found)")
  endif()
endif()

# Adds the CUDA kernels to a target.
function(shiva_add_cuda_kernels target)
  list(TRANSFORM SHIVA_CUDA_SOURCES PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/ OUTPUT_VARIABLE sources)
  target_sources(${target} PRIVATE ${sources})
  # The static runtime needs no libcudart beside it, so the library also loads where torch is a CPU build.
  set_target_properties(${target} PROPERTIES CUDA_STANDARD 20 CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>")
  target_link_libraries(${target} PRIVATE ${CMAKE_DL_LIBS})
  string(REPLACE ";" " " architectures "${CMAKE_CUDA_ARCHITECTURES}")
  target_compile_definitions(${target} PRIVATE
    "SHIVA_CUDA_VERSION=\"${CMAKE_CUDA_COMPILER_VERSION}\"" "SHIVA_CUDA_ARCHITECTURES=\"${architectures}\"")
endfunction()
