#include "cpu/launch.h"

#include <cstring>
#include <sstream>

namespace shiva::cpu {

std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << ']';
  return text.str();
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

static void check_cpu(const char* op, const char* name, const Tensor& t) {
  SHIVA_CHECK(t.is_cpu(), op, name, " is on another device than the CPU; move all arguments to one device");
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

void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  check_cpu(op, name, t);
  SHIVA_CHECK(t.dim() == dim, op, name, " must have ", dim, " dimensions, got shape ", shape_of(t));
}

void check_shape(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& sizes) {
  check_cpu(op, name, t);
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  std::ostringstream wanted;
  for (size_t d = 0; d < sizes.size(); ++d) {
    same = same && t.size(static_cast<int64_t>(d)) == sizes[d];
    wanted << (d ? ", " : "") << sizes[d];
  }
  SHIVA_CHECK(same, op, name, " must have shape [", wanted.str(), "], got ", shape_of(t));
}

void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  SHIVA_CHECK(
      t.scalar_type() == other.scalar_type(), op, name, " must have the dtype of ", other_name, " (",
      dtype_name(other.scalar_type()), "), got ", dtype_name(t.scalar_type()));
}

Tensor checked_index(const char* op, const char* name, const Tensor& index, int64_t rows, int64_t n) {
  check_dim(op, name, index, 2);
  SHIVA_CHECK(
      index.scalar_type() == ScalarType::Long || index.scalar_type() == ScalarType::Int, op, name,
      " must be int64 or int32, got ", dtype_name(index.scalar_type()));
  SHIVA_CHECK(index.size(0) == rows, op, name, " must have ", rows, " rows, got shape ", shape_of(index));
  Tensor result = index.scalar_type() == ScalarType::Long ? index : torch::stable::to(index, ScalarType::Long);
  result = torch::stable::contiguous(result);
  const int64_t* values = data<int64_t>(result);
  const int64_t count = result.numel();
  // An unsigned comparison catches negative values too; the sum has no branch, so the loop vectorises.
  int64_t outside = 0;
  for (int64_t i = 0; i < count; ++i) outside += static_cast<uint64_t>(values[i]) >= static_cast<uint64_t>(n);
  for (int64_t i = 0; outside != 0 && i < count; ++i)
    SHIVA_CHECK(
        values[i] >= 0 && values[i] < n, op, name, " must lie in [0, ", n, "), got ", values[i], " in row ",
        i / index.size(1), ", column ", i % index.size(1));
  return result;
}

Tensor with_dense_channels(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
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

Rows rows_of(const Tensor& t) {
  const int64_t size = static_cast<int64_t>(t.element_size());
  const int64_t tokens = t.dim() - 2;
  return {data<char>(t), t.dim() == 3 ? t.stride(0) * size : 0, t.stride(tokens) * size};
}

std::vector<int64_t> inverse_index(const Tensor& index, int64_t n) {
  const int64_t rows = index.size(0), k = index.size(1);
  std::vector<int64_t> position(static_cast<size_t>(rows * n), -1);
  const int64_t* values = data<int64_t>(index);
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t j = 0; j < k; ++j) position[static_cast<size_t>(b * n + values[b * k + j])] = j;
  return position;
}

Tensor replace_rows(const Tensor& base, const Tensor& kept, const Tensor& src) {
  const int64_t B = base.size(0), N = base.size(1), D = base.size(2);
  const int64_t row_bytes = D * static_cast<int64_t>(base.element_size());
  Tensor out = torch::stable::new_empty(base, {B, N, D});
  const Tensor dense_base = with_dense_channels(base), dense_src = with_dense_channels(src);
  const Rows base_rows = rows_of(dense_base), src_rows = rows_of(dense_src);
  const std::vector<int64_t> position = inverse_index(kept, N);
  char* to = data<char>(out);
  parallel(B * N, 2 * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / N;
      const char* from = position[i] >= 0 ? src_rows.at(b, position[i]) : base_rows.at(b, i - b * N);
      std::memcpy(to + i * row_bytes, from, static_cast<size_t>(row_bytes));
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> split_rows(const Tensor& x, const Tensor& kept) {
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2), k = kept.size(1);
  const int64_t row_bytes = D * static_cast<int64_t>(x.element_size());
  Tensor rest = torch::stable::new_empty(x, {B, N, D});
  Tensor rows = torch::stable::new_empty(x, {B, k, D});
  const Tensor dense = with_dense_channels(x);
  const Rows from = rows_of(dense);
  const std::vector<int64_t> position = inverse_index(kept, N);
  char* to_rest = data<char>(rest);
  char* to_rows = data<char>(rows);
  parallel(B * N, 2 * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / N;
      char* to = to_rest + i * row_bytes;
      if (position[i] >= 0) {
        std::memset(to, 0, static_cast<size_t>(row_bytes));
        to = to_rows + (b * k + position[i]) * row_bytes;
      }
      std::memcpy(to, from.at(b, i - b * N), static_cast<size_t>(row_bytes));
    }
  });
  return {rest, rows};
}

void check_inclusion(const char* op, const Tensor& inclusion, const Tensor& x) {
  check_shape(op, "inclusion", inclusion, {x.size(0), x.size(1)});
  SHIVA_CHECK(
      inclusion.scalar_type() == accumulate_type(x), op, "inclusion must be ", dtype_name(accumulate_type(x)), ", got ",
      dtype_name(inclusion.scalar_type()));
}

}  // namespace shiva::cpu
