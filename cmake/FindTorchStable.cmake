# Defines torch_stable: torch's headers and its libtorch, both by path.
#
# find_package(Torch) is not used: it overrides the CUDA architectures, and with a CPU torch never enables CUDA. The
# stable ABI needs only the C shim symbols of libtorch_cpu, so one build serves every torch from SHIVA_TORCH_TARGET on.
set(SHIVA_TORCH_TARGET "2.10" CACHE STRING "Oldest torch that the compiled library must run on")

execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('torch').origin).parent)"
  OUTPUT_VARIABLE _torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _failed ERROR_QUIET)
if(_failed)
  message(FATAL_ERROR "torch was not found by ${Python_EXECUTABLE}; install it first: pip install 'torch>=2.10'")
endif()
if(NOT EXISTS ${_torch_dir}/include/torch/csrc/stable/library.h)
  message(FATAL_ERROR "The torch in ${_torch_dir} has no stable ABI headers; torch >= 2.10 is needed to build")
endif()
string(REPLACE "." ";" _target ${SHIVA_TORCH_TARGET})
list(GET _target 0 _major)
list(GET _target 1 _minor)

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${_torch_dir}/include)
target_compile_definitions(torch_stable INTERFACE
  "TORCH_TARGET_VERSION=((${_major}ULL << 56) | (${_minor}ULL << 48))")
target_link_libraries(torch_stable INTERFACE ${_torch_dir}/lib/libtorch_cpu.so)
message(STATUS "shiva_ext: torch headers from ${_torch_dir}, stable ABI target ${SHIVA_TORCH_TARGET}")
set(SHIVA_TORCH_LIB ${_torch_dir}/lib)
