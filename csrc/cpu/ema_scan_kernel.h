#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace shiva::cpu {
constexpr int64_t kScanTile = 256;  // channels of one call, whose state stays in the first cache

// Channels [0, width) of M rows at x, `stride` bytes apart: e_m = p_m x_m + (1 - p_m) e_{m-1}, from 0. Rows of out are
// `out_stride` bytes apart; p [M] is in the accumulation dtype.
SHIVA_DECLARE_KERNEL(
    void ema_tile(
        Dtype dtype, const char* x, int64_t stride, const void* p, int64_t M, int64_t width, char* out,
        int64_t out_stride))
// The same channels backward: grad_x, and to part [M] each row's share of the gradient of p, in the accumulation dtype.
SHIVA_DECLARE_KERNEL(
    void ema_tile_backward(
        Dtype dtype, const char* grad, int64_t grad_stride, const char* x, int64_t x_stride, const char* e,
        int64_t e_stride, const void* p, int64_t M, int64_t width, char* grad_x, int64_t out_stride, void* part))
// out [rows] = the sum, in order, of `parts` rows [parts, rows], all in the accumulation dtype of dtype.
SHIVA_DECLARE_KERNEL(void add_parts(Dtype dtype, const void* part, int64_t parts, int64_t rows, void* out))
}  // namespace shiva::cpu
