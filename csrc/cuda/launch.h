// The one way to launch a kernel.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "cuda/check.h"

namespace llmc::cuda {

// Blocks that cover n items, per_block each.
inline unsigned blocks_for(int64_t n, int64_t per_block) { return unsigned((n + per_block - 1) / per_block); }

// Whether a kernel may begin while the one before it in the stream ends: programmatic dependent launch, from compute
// capability 9.0 on. Asked at every launch: two values that the runtime has at hand, beside the microseconds of a launch.
inline bool may_begin_early() {
  int device = 0, capability = 0;
  LLMC_CUDA_CHECK(cudaGetDevice(&device));
  LLMC_CUDA_CHECK(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device));
  return capability >= 9;
}

// The kernel must begin with after_previous_kernel() (ptx.cuh). Only kernels that are launched here begin early: products,
// copies, memsets, events and what is launched elsewhere come after all that was in the stream before, as ever.
//
// Shared memory beyond 48 KiB, static and dynamic together, must be asked for by an attribute of the kernel: that is done
// from 32 KiB of dynamic memory on. The arguments must convert to the parameters.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  if (shared_bytes > 32 * 1024) {
    LLMC_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = may_begin_early() ? 1 : 0;
  LLMC_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace llmc::cuda
