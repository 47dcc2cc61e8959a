#include "cpu/launch.h"

#include <algorithm>
#include <cstring>

namespace shiva::cpu {

Rows rows_of(const Tensor& t) {
  const int64_t size = static_cast<int64_t>(t.element_size());
  const int64_t tokens = t.dim() - 2;
  return {data<char>(t), t.dim() == 3 ? t.stride(0) * size : 0, t.stride(tokens) * size};
}

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return new_empty(like, sizes, like.scalar_type());
}

Tensor new_empty(const Tensor&, std::initializer_list<int64_t> sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes.begin()[d], 1);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

std::vector<int64_t> inverse_index(const char* op, const Tensor& index, int64_t n) {
  const int64_t rows = index.size(0), k = index.size(1);
  std::vector<int64_t> position(static_cast<size_t>(rows * n), -1);
  const int64_t* values = data<int64_t>(index);
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t j = 0; j < k; ++j) {
      const int64_t token = values[b * k + j];
      int64_t& place = position[static_cast<size_t>(b * n + token)];
      SHIVA_CHECK(
          place < 0, op, "the index names token ", token, " of row ", b, " twice, in columns ", place, " and ", j,
          "; every token at most once");
      place = j;
    }
  return position;
}

Tensor replace_rows(const char* op, const Tensor& base, const Tensor& kept, const Tensor& src) {
  const int64_t B = base.size(0), N = base.size(1), D = base.size(2);
  const int64_t row_bytes = D * static_cast<int64_t>(base.element_size());
  Tensor out = new_empty(base, {B, N, D});
  const Tensor dense_base = with_dense_channels(base), dense_src = with_dense_channels(src);
  const Rows base_rows = rows_of(dense_base), src_rows = rows_of(dense_src);
  const std::vector<int64_t> position = inverse_index(op, kept, N);
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

std::tuple<Tensor, Tensor> split_rows(const char* op, const Tensor& x, const Tensor& kept) {
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2), k = kept.size(1);
  const int64_t row_bytes = D * static_cast<int64_t>(x.element_size());
  Tensor rest = new_empty(x, {B, N, D});
  Tensor rows = new_empty(x, {B, k, D});
  const Tensor dense = with_dense_channels(x);
  const Rows from = rows_of(dense);
  const std::vector<int64_t> position = inverse_index(op, kept, N);
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

}  // namespace shiva::cpu
