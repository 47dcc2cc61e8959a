// What every CUDA launcher needs: argument checks in one error style, the stream, the launch check, registration.
//
// A launcher goes: checks, device guard, contiguous, empty return, stream, launch, launch check. The same source builds
// into the simulator's library, where tensors are on the CPU and the ops are called torch.ops.shiva_simt.*.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "core/dtype.h"
#include "cuda/device.h"

// SHIVA_REGISTER(m) { m.impl("op", TORCH_BOX(&op)); }
#if defined(SHIVA_SIMT)
#define SHIVA_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(shiva_simt, CPU, m)
#else
#define SHIVA_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(shiva, CUDA, m)
#endif

namespace shiva::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(SHIVA_SIMT)
constexpr Place kPlace = Place::Cpu;
using Stream = int;
struct Guard {
  explicit Guard(const Tensor&) {}
};
inline Stream current_stream(const Tensor&) { return 0; }
inline void check_launch(const char*) {}
#else
constexpr Place kPlace = Place::Cuda;
using Stream = cudaStream_t;
struct Guard {
  torch::stable::accelerator::DeviceGuard guard;
  explicit Guard(const Tensor& t) : guard(t.get_device_index()) {}
};
Stream current_stream(const Tensor& t);
// Raises what CUDA says if the launch before was refused.
void check_launch(const char* op);
#endif

// Blocks of a grid's x dimension; raises beyond CUDA's 2^31 - 1.
unsigned grid_size(const char* op, int64_t blocks);

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  shiva::check_dim(op, name, t, dim, kPlace);
}
inline void check_shape(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& sizes) {
  shiva::check_shape(op, name, t, sizes, kPlace);
}

// Index as contiguous int64 [rows, k]. That its values lie in [0, n) is checked under SHIVA_CHECK_INDICES=1 only:
// looking at them waits for the device.
Tensor checked_index(const char* op, const char* name, const Tensor& index, int64_t rows, int64_t n);

// Calls body with a null pointer of the element type that dtype names.
template <typename Body>
void dispatch(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::Float32: body(static_cast<float*>(nullptr)); break;
    case Dtype::BFloat16: body(static_cast<bf16*>(nullptr)); break;
    case Dtype::Float16: body(static_cast<f16*>(nullptr)); break;
    case Dtype::Float64: body(static_cast<double*>(nullptr)); break;
  }
}

}  // namespace shiva::cuda
