// What every CUDA launcher needs: argument checks, the stream, the launch check, registration.
//
// A launcher goes: checks (an index of int32 becomes one of int64 there), device guard, contiguous, empty return,
// stream, launch, launch check. The same source builds into the simulator's library, where tensors are on the CPU and
// the ops are called torch.ops.shiva_simt.*.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "contracts.h"
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
  template <typename... T>
  explicit Guard(const char*, const Tensor&, const T&...) {}
};
inline Stream current_stream(const Tensor&) { return 0; }
inline void check_launch(const char*) {}
#else
constexpr Place kPlace = Place::Cuda;
using Stream = cudaStream_t;
void check_same_gpu(const char* op, const Tensor& a, const Tensor& b);
// Makes the first tensor's GPU the current one; raises if another tensor is on another GPU.
struct Guard {
  torch::stable::accelerator::DeviceGuard guard;
  template <typename... T>
  Guard(const char* op, const Tensor& first, const T&... others) : guard(first.get_device_index()) {
    (check_same_gpu(op, first, others), ...);
  }
};
Stream current_stream(const Tensor& t);
// Raises what CUDA says if the launch before was refused, or a kernel failed that was launched before it.
void check_launch(const char* op);
#endif

// Blocks of a grid's x dimension; raises beyond CUDA's 2^31 - 1.
unsigned grid_size(const char* op, int64_t blocks);

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
