// Argument checks of every launcher, in one error style: "shiva::<op>: <what was got and what was wanted>".
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"

#define SHIVA_CHECK(cond, op, ...) STD_TORCH_CHECK(cond, "shiva::", op, ": ", __VA_ARGS__)

namespace shiva {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where a launcher's tensors must be.
enum class Place { Cpu, Cuda };

std::string shape_of(const Tensor& t);    // "[2, 16, 8]"
const char* dtype_name(ScalarType type);  // "float32"

// The op's dtype; raises for anything but float32, bfloat16, float16, float64.
Dtype floating_dtype(const char* op, const char* name, const Tensor& t);

// Raises unless t is in this place and has this many dimensions.
void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, Place place);
// Raises unless t is in this place and has exactly these sizes.
void check_shape(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& sizes, Place place);
void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other);
// Index as contiguous int64 [rows, k]; raises unless it is int64 or int32 and has that many rows. That its values lie
// in [lowest, n) is always checked on the CPU; on a GPU under SHIVA_CHECK_INDICES=1 only, as it waits for the device.
Tensor checked_index(
    const char* op, const char* name, const Tensor& index, int64_t rows, int64_t n, Place place, int64_t lowest = 0);

// float32, or float64 for float64 tensors.
ScalarType accumulate_type(const Tensor& x);
// A contiguous tensor of x's accumulate_type with the values of t; raises unless t has x's dtype or that one.
Tensor as_accumulate(const char* op, const char* name, const Tensor& t, const Tensor& x);

// t itself if its channels are adjacent in memory (any batch and token stride), else a contiguous copy.
Tensor with_dense_channels(const Tensor& t);

// src itself, or a copy if its bytes may be some of base's: then what is written could be read again.
Tensor apart_from(const Tensor& src, const Tensor& base);

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace shiva
