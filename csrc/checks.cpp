#include "checks.h"

#include <cstdlib>
#include <string>

namespace shiva {

static std::string in_brackets(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + ']';
}

std::string shape_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return in_brackets(sizes);
}

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

static void check_place(const char* op, const char* name, const Tensor& t, Place place) {
  const bool right = place == Place::Cpu ? t.is_cpu() : t.is_cuda();
  SHIVA_CHECK(
      right, op, name, " is on another device than the ", place == Place::Cpu ? "CPU" : "GPU",
      "; move all arguments to one device");
}

Dtype floating_dtype(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::Float32;
    case ScalarType::BFloat16: return Dtype::BFloat16;
    case ScalarType::Half: return Dtype::Float16;
    case ScalarType::Double: return Dtype::Float64;
    default:
      SHIVA_CHECK(false, op, name, " must be float32, bfloat16, float16 or float64, got ", dtype_name(t.scalar_type()));
  }
  return Dtype::Float32;
}

void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, Place place) {
  check_place(op, name, t, place);
  SHIVA_CHECK(t.dim() == dim, op, name, " must have ", dim, " dimensions, got shape ", shape_of(t));
}

void check_shape(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& sizes, Place place) {
  check_place(op, name, t, place);
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = t.size(static_cast<int64_t>(d)) == sizes[d];
  SHIVA_CHECK(same, op, name, " must have shape ", in_brackets(sizes), ", got ", shape_of(t));
}

void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  SHIVA_CHECK(
      t.scalar_type() == other.scalar_type(), op, name, " must have the dtype of ", other_name, " (",
      dtype_name(other.scalar_type()), "), got ", dtype_name(t.scalar_type()));
}

static Tensor as_index(const char* op, const char* name, const Tensor& index, int64_t rows) {
  SHIVA_CHECK(
      index.scalar_type() == ScalarType::Long || index.scalar_type() == ScalarType::Int, op, name,
      " must be int64 or int32, got ", dtype_name(index.scalar_type()));
  SHIVA_CHECK(index.size(0) == rows, op, name, " must have ", rows, " rows, got shape ", shape_of(index));
  return torch::stable::contiguous(
      index.scalar_type() == ScalarType::Long ? index : torch::stable::to(index, ScalarType::Long));
}

// The values of a contiguous int64 tensor [rows, k] on the CPU lie in [lowest, n).
static void check_index_range(const char* op, const char* name, const Tensor& index, int64_t lowest, int64_t n) {
  const int64_t* values = data<int64_t>(index);
  const int64_t count = index.numel();
  // An unsigned comparison catches values below too; the sum has no branch, so the loop vectorises.
  int64_t outside = 0;
  const uint64_t first = static_cast<uint64_t>(lowest), width = static_cast<uint64_t>(n - lowest);
  for (int64_t i = 0; i < count; ++i) outside += static_cast<uint64_t>(values[i]) - first >= width;
  for (int64_t i = 0; outside != 0 && i < count; ++i)
    SHIVA_CHECK(
        values[i] >= lowest && values[i] < n, op, name, " must lie in [", lowest, ", ", n, "), got ", values[i],
        " in row ", i / index.size(1), ", column ", i % index.size(1));
}

Tensor checked_index(
    const char* op, const char* name, const Tensor& index, int64_t rows, int64_t n, Place place, int64_t lowest) {
  check_dim(op, name, index, 2, place);
  const Tensor result = as_index(op, name, index, rows);
  SHIVA_CHECK(
      n > lowest || result.numel() == 0, op, name, " must be empty where there are no tokens, got ", shape_of(index));
  const char* wanted = std::getenv("SHIVA_CHECK_INDICES");
  if (place == Place::Cpu)
    check_index_range(op, name, result, lowest, n);
  else if (wanted != nullptr && wanted[0] == '1')
    check_index_range(
        op, name, torch::stable::to(result, torch::stable::Device(torch::headeronly::DeviceType::CPU)), lowest, n);
  return result;
}

Tensor with_dense_channels(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

Tensor apart_from(const Tensor& src, const Tensor& base) {
  if (src.numel() == 0 || base.numel() == 0) return src;
  const auto end = [](const Tensor& t) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    return static_cast<const char*>(t.data_ptr()) + (last + 1) * static_cast<int64_t>(t.element_size());
  };
  const bool apart = end(src) <= data<char>(base) || end(base) <= data<char>(src);
  return apart ? src : torch::stable::clone(src);
}

ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor as_accumulate(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  const ScalarType wanted = accumulate_type(x);
  SHIVA_CHECK(
      t.scalar_type() == x.scalar_type() || t.scalar_type() == wanted, op, name, " must be ",
      dtype_name(x.scalar_type()), " or ", dtype_name(wanted), ", got ", dtype_name(t.scalar_type()));
  return torch::stable::contiguous(t.scalar_type() == wanted ? t : torch::stable::to(t, wanted));
}

}  // namespace shiva
