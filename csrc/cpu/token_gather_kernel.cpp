#include "cpu/token_gather_kernel.h"

#include "cpu/scalar.h"

namespace shiva::cpu::SHIVA_ISA {

void sum_rows(
    Dtype dtype, const char* rows, int64_t batch_stride, int64_t row_stride, const int64_t* position, int64_t n,
    int64_t B, int64_t D, void* sum_scratch, void* out) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    acc_t<T>* sum = static_cast<acc_t<T>*>(sum_scratch);
    for (int64_t d = 0; d < D; ++d) sum[d] = 0;
    for (int64_t b = 0; b < B; ++b) {
      if (position[b * n] < 0) continue;
      const T* row = reinterpret_cast<const T*>(rows + b * batch_stride + position[b * n] * row_stride);
      for (int64_t d = 0; d < D; ++d) sum[d] += load(row[d]);
    }
    for (int64_t d = 0; d < D; ++d) store(static_cast<T*>(out)[d], sum[d]);
  });
}

}  // namespace shiva::cpu::SHIVA_ISA
