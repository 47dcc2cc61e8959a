// The library torch.ops.shiva_simt: the CUDA launchers and kernels, simulated on CPU tensors; and its module _simt.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "schemas.h"
#include "simt/runtime.h"

STABLE_TORCH_LIBRARY(shiva_simt, m) { shiva::define_ops(m); }

PYBIND11_MODULE(SHIVA_SIMT_MODULE, m) {
  m.doc() = "The CUDA kernels of shiva_ext, run on the CPU by a simulator; for tests";
  m.attr("variant") = SHIVA_SIMT_VARIANT;
  m.def("set_seed", &shiva::simt::set_seed, "Seed of the next launch's schedule; each launch adds one.");
  m.def("seed", &shiva::simt::seed);
  m.def("threads_run", &shiva::simt::threads_run, "CUDA threads simulated so far.");
  m.def("launches_run", &shiva::simt::launches_run);
  m.def("launches_by_kernel", &shiva::simt::launches_by_kernel);
  m.def(
      "take_launches", &shiva::simt::take_launches, "(instance, blocks, threads) of the launches since the last call.");
}
