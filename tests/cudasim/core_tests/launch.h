// Shared by the sample kernels: a launch like the one of csrc/cuda/launch.h, and functions for ctypes.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#define EXPORT extern "C" __attribute__((visibility("default")))

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}
