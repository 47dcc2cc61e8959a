// The library torch.ops.shiva, and the module _C that describes the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(shiva, m) { shiva::define_ops(m); }

// Metadata only; tensors never pass through here.
PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of shiva_ext; the ops are in torch.ops.shiva";
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch_build_version"] = TORCH_VERSION;
    info["torch_target_version"] = SHIVA_TORCH_TARGET;
    info["compiler"] = SHIVA_COMPILER;
    info["git_commit"] = SHIVA_GIT_COMMIT;  // empty if not built in a checkout
#if defined(SHIVA_CUDA_VERSION)
    info["cuda"] = SHIVA_CUDA_VERSION;
    info["cuda_architectures"] = SHIVA_CUDA_ARCHITECTURES;
#else
    info["cuda"] = pybind11::none();
    info["cuda_architectures"] = pybind11::none();
#endif
    std::vector<std::string> built = {"default"};
#if defined(SHIVA_X86)
    built.insert(built.end(), {"avx2", "avx512"});
#endif
    info["cpu_capabilities_built"] = built;
    info["cpu_capability"] = shiva::cpu::isa_name(shiva::cpu::active_isa());
    return info;
  });
}
