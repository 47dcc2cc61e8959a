#include "cuda/launch.h"

#if !defined(SHIVA_SIMT)
#include <dlfcn.h>
#endif

namespace shiva::cuda {

#if !defined(SHIVA_SIMT)
Stream current_stream(const Tensor& t) {
  // Looked up at run time, so that this library also loads beside a torch without CUDA.
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* symbol = dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    if (symbol == nullptr)
      if (void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY))
        symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Get>(symbol);
  }();
  STD_TORCH_CHECK(get != nullptr, "shiva: this torch has CUDA tensors but no libtorch_cuda.so; reinstall torch");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(t.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

void check_same_gpu(const char* op, const Tensor& a, const Tensor& b) {
  SHIVA_CHECK(
      a.get_device_index() == b.get_device_index(), op, "the arguments are on GPU ", a.get_device_index(), " and GPU ",
      b.get_device_index(), "; move all arguments to one device");
}

void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  SHIVA_CHECK(
      error == cudaSuccess, op, "CUDA reports: ", cudaGetErrorString(error),
      "; unless this launch itself was refused, an earlier kernel failed: set SHIVA_CHECK_INDICES=1 and "
      "CUDA_LAUNCH_BLOCKING=1 to find it");
}
#endif

unsigned grid_size(const char* op, int64_t blocks) {
  SHIVA_CHECK(
      blocks <= 0x7fffffff, op, "the input needs ", blocks, " blocks of threads, more than CUDA's 2^31 - 1; split it");
  return static_cast<unsigned>(blocks);
}

}  // namespace shiva::cuda
