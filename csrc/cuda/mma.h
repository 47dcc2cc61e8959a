// Tensor cores and copies that run beside the arithmetic: inline assembly under nvcc, warp collectives when simulated.
//
// Architectures differ in here and nowhere else. Turing has no cp.async (the copy is done at once) and multiplies
// float16 only, 8 deep; a launcher must not choose a bfloat16 kernel there, which would trap.
#pragma once

#include "cuda/device.h"

namespace shiva::cuda {

// ---- 16 bytes from global to shared memory, zeros if not valid; both addresses are multiples of 16

#if defined(SHIVA_SIMT)
SHIVA_DEVICE void copy_async16(void* shared, const void* global, bool valid) {
  ::shiva::simt::async_copy(shared, global, 16, valid ? 0 : 16);
}
SHIVA_DEVICE void commit_copies() { ::shiva::simt::async_commit(); }
template <int kInFlight>
SHIVA_DEVICE void wait_copies() {
  ::shiva::simt::async_wait(kInFlight);
}
#else
SHIVA_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
SHIVA_DEVICE void copy_async16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ < 800
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
#else
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#endif
}
// Closes a group of the thread's own copies.
SHIVA_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all of the thread's groups but the last kInFlight.
template <int kInFlight>
SHIVA_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
#endif
}
#endif

// ---- fragments: how a warp holds small matrices, two elements of 16 bits to a register (PTX ISA, "mma.m16n8k16")
//
// With g = lane / 4 and t = lane % 4, lane holds the elements (g, 2t) and (g, 2t + 1) of an 8 x 8 matrix.
//
// ldmatrix_x4 loads four of them from shared memory; lane gives the address, a multiple of 16, of row lane % 8 of
// matrix lane / 8. kTranspose: each matrix becomes its transpose.
//
// mma_m16n8k16 adds a b to d, for T bf16 or f16, in float. The 8 x 8 matrices of
//   a [16, 16] are rows 0-7, columns 0-7; rows 8-15, columns 0-7; rows 0-7, columns 8-15; rows 8-15, columns 8-15;
//   b [16, 8], transposed, are rows 0-7; rows 8-15;
//   d [16, 8], a float to a register, are rows 0-7; rows 8-15.
//
// All lanes of a warp must call them together.

#if defined(SHIVA_SIMT)
namespace simulated {

struct LoadSlot {
  uint16_t row[8];
  uint32_t result[4];
};
// Runs for the whole warp on the stack of one lane, which is no access of that lane's.
template <bool kTranspose>
__attribute__((no_sanitize("thread"))) void load_matrices(void* const* slots, unsigned) {
  for (int lane = 0; lane < kWarp; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint32_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int g = lane / 4, t = 2 * (lane % 4) + i;
        const auto* from = static_cast<const LoadSlot*>(slots[8 * matrix + (kTranspose ? t : g)]);
        pair[i] = from->row[kTranspose ? g : t];
      }
      static_cast<LoadSlot*>(slots[lane])->result[matrix] = pair[0] | pair[1] << 16;
    }
}

struct MmaSlot {
  float* d;
  const uint32_t *a, *b;
};
template <typename T>
__attribute__((no_sanitize("thread"))) float half_of(uint32_t pair, int i) {
  return load(T{static_cast<uint16_t>(pair >> 16 * i)});
}
template <typename T>
__attribute__((no_sanitize("thread"))) void multiply(void* const* slots, unsigned) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* slot = static_cast<const MmaSlot*>(slots[lane]);
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int i = 0; i < 2; ++i) {
      for (int part = 0; part < 4; ++part) a[g + part % 2 * 8][t + i + part / 2 * 8] = half_of<T>(slot->a[part], i);
      for (int part = 0; part < 2; ++part) b[t + i + part * 8][g] = half_of<T>(slot->b[part], i);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* d = static_cast<const MmaSlot*>(slots[lane])->d;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) d[i] += a[lane / 4 + i / 2 * 8][k] * b[k][2 * (lane % 4) + i % 2];
  }
}

}  // namespace simulated

template <bool kTranspose>
SHIVA_DEVICE void ldmatrix_x4(uint32_t (&result)[4], const void* row) {
  simulated::LoadSlot slot;
  if (reinterpret_cast<uintptr_t>(row) % 16) ::shiva::simt::fail("ldmatrix from an address that is no multiple of 16");
  std::memcpy(slot.row, row, 16);
  ::shiva::simt::warp_collective("ldmatrix", kAllLanes, &slot, simulated::load_matrices<kTranspose>);
  std::memcpy(result, slot.result, 16);
}
template <typename T>
SHIVA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simulated::MmaSlot slot = {d, a, b};
  ::shiva::simt::warp_collective("mma", kAllLanes, &slot, simulated::multiply<T>);
}
#else
template <bool kTranspose>
SHIVA_DEVICE void ldmatrix_x4(uint32_t (&result)[4], const void* row) {
  if constexpr (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row))
                 : "memory");
}
template <typename T>
SHIVA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
SHIVA_DEVICE void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ < 800
  __trap();
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
template <>
SHIVA_DEVICE void mma_m16n8k16<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ < 800
  for (int half = 0; half < 2; ++half)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
#endif

}  // namespace shiva::cuda
