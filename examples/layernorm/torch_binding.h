// Makes a rung a variant of the kernel laboratory, which compiles it with TORCH_EXTENSION_NAME. Elsewhere this is empty.
#pragma once

#ifdef TORCH_EXTENSION_NAME
#include <ATen/core/Tensor.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/utils/pybind.h>

#include "rung.h"

// The tensor's memory; these kernels are for fp32.
inline float* fp32(const at::Tensor& x) {
  TORCH_CHECK(x.is_cuda() && x.scalar_type() == at::kFloat, "the rungs are for fp32 on a GPU: --precision fp32");
  return static_cast<float*>(x.data_ptr());
}

// torch's current stream on the device of x.
inline cudaStream_t stream_of(const at::Tensor& x) {
  const c10::impl::VirtualGuardImpl guard(x.device().type());
  return static_cast<cudaStream_t>(guard.getStream(x.device()).native_handle());
}

inline void check(int status) {
  TORCH_CHECK(status == cudaSuccess, cudaGetErrorString(static_cast<cudaError_t>(status)));
}
#endif
