// Torch-free: usable from host code, CUDA kernels and the simulator alike.
#pragma once

#if defined(__CUDACC__)
#define SHIVA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SHIVA_HOST_DEVICE inline
#endif
