#include <cstring>

#include "cpu/launch.h"
#include "cpu/token_gather_kernel.h"

namespace shiva::cpu {
namespace {

// x [B, N, D], or [N, D] shared by all rows of index [B, k] -> [B, k, D]
Tensor token_gather(const Tensor& x, const Tensor& index) {
  constexpr char op[] = "token_gather";
  SHIVA_CHECK(x.dim() == 3 || x.dim() == 2, op, "x must have shape [B, N, D] or [N, D], got ", shape_of(x));
  check_dim(op, "x", x, x.dim());
  floating_dtype(op, "x", x);
  const int64_t N = x.size(x.dim() - 2), D = x.size(x.dim() - 1);
  const Tensor kept = checked_index(op, "index", index, x.dim() == 3 ? x.size(0) : index.size(0), N);
  const int64_t B = kept.size(0), k = kept.size(1);
  Tensor out = torch::stable::new_empty(x, {B, k, D});
  const Tensor dense = with_dense_channels(x);
  const Rows from = rows_of(dense);
  const int64_t row_bytes = D * static_cast<int64_t>(x.element_size());
  const int64_t* tokens = data<int64_t>(kept);
  char* to = data<char>(out);
  parallel(B * k, 2 * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(to + i * row_bytes, from.at(i / k, tokens[i]), static_cast<size_t>(row_bytes));
  });
  return out;
}

// grad [B, k, D] -> rows of grad at index, zero elsewhere: [B, n, D], or their sum over B [n, D] when broadcast.
Tensor token_gather_backward(const Tensor& grad, const Tensor& index, int64_t n, bool broadcast) {
  constexpr char op[] = "token_gather_backward";
  check_dim(op, "grad", grad, 3);
  const Dtype dtype = floating_dtype(op, "grad", grad);
  SHIVA_CHECK(n >= 0, op, "n must not be negative, got ", n);
  const int64_t B = grad.size(0), k = grad.size(1), D = grad.size(2);
  const Tensor kept = checked_index(op, "index", index, B, n);
  check_shape(op, "index", kept, {B, k});
  const Tensor dense = with_dense_channels(grad);
  const Rows from = rows_of(dense);
  const std::vector<int64_t> position = inverse_index(kept, n);
  const int64_t row_bytes = D * static_cast<int64_t>(grad.element_size());
  if (broadcast) {
    Tensor out = torch::stable::new_empty(grad, {n, D});
    char* to = data<char>(out);
    parallel(n, (B + 1) * row_bytes, [&](int64_t begin, int64_t end) {
      std::vector<double> sum(static_cast<size_t>(D));
      for (int64_t i = begin; i < end; ++i)
        SHIVA_CALL_KERNEL(
            sum_rows, dtype, from.data, from.batch_stride, from.row_stride, position.data() + i, n, B, D, sum.data(),
            to + i * row_bytes);
    });
    return out;
  }
  Tensor out = torch::stable::new_empty(grad, {B, n, D});
  char* to = data<char>(out);
  parallel(B * n, 2 * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (position[i] >= 0)
        std::memcpy(to + i * row_bytes, from.at(i / n, position[i]), static_cast<size_t>(row_bytes));
      else
        std::memset(to + i * row_bytes, 0, static_cast<size_t>(row_bytes));
    }
  });
  return out;
}

}  // namespace
}  // namespace shiva::cpu

STABLE_TORCH_LIBRARY_IMPL(shiva, CPU, m) {
  m.impl("token_gather", TORCH_BOX(&shiva::cpu::token_gather));
  m.impl("token_gather_backward", TORCH_BOX(&shiva::cpu::token_gather_backward));
}
