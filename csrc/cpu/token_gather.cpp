#include <cstring>

#include "cpu/launch.h"
#include "cpu/token_gather_kernel.h"

namespace shiva::cpu {
namespace {

// x [B, N, D], or [N, D] shared by all rows of index [B, k] -> [B, k, D]
Tensor token_gather(const Tensor& x, const Tensor& index) {
  const Tokens t = check_token_gather("token_gather", x, index, kPlace);
  const int64_t k = t.k, row_bytes = t.row_bytes;
  Tensor out = new_empty(x, {t.B, k, t.D});
  const Tensor dense = with_dense_channels(x);
  const Rows from = rows_of(dense);
  const int64_t* tokens = data<int64_t>(t.index);
  char* to = data<char>(out);
  parallel(t.B * k, 2 * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(to + i * row_bytes, from.at(i / k, tokens[i]), static_cast<size_t>(row_bytes));
  });
  return out;
}

// grad [B, k, D] -> rows of grad at index, zero elsewhere: [B, n, D], or their sum over B [n, D] when broadcast.
Tensor token_gather_backward(const Tensor& grad, const Tensor& index, int64_t n, bool broadcast) {
  const Tokens t = check_token_gather_backward("token_gather_backward", grad, index, n, kPlace);
  const int64_t B = t.B, D = t.D, row_bytes = t.row_bytes;
  const Tensor dense = with_dense_channels(grad);
  const Rows from = rows_of(dense);
  const std::vector<int64_t> position = inverse_index("token_gather_backward", t.index, n);
  if (broadcast) {
    Tensor out = new_empty(grad, {n, D});
    char* to = data<char>(out);
    parallel(n, (B + 1) * row_bytes, [&](int64_t begin, int64_t end) {
      std::vector<double> sum(static_cast<size_t>(D));
      for (int64_t i = begin; i < end; ++i)
        SHIVA_CALL_KERNEL(
            sum_rows, t.dtype, from.data, from.batch_stride, from.row_stride, position.data() + i, n, B, D, sum.data(),
            to + i * row_bytes);
    });
    return out;
  }
  Tensor out = new_empty(grad, {B, n, D});
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
