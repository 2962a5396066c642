// The CUDA backend as the rest of the program sees it; builds without CUDA have it too (no_cuda.cpp), without a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "ops/ops.h"

namespace llmc {

struct CudaDevice {
  std::string name;
  std::string pci_bus_id;  // domain:bus:device.function, hexadecimal
  int compute_capability;  // 10·major + minor
  int multiprocessors;
  size_t memory;                   // bytes
  size_t shared_memory_per_block;  // bytes, the most that a kernel may ask for
};

// Whether this build holds the CUDA backend.
bool has_cuda();

// Whether this build holds cuDNN's attention too.
bool has_cudnn();

// Why the first device cannot be used, in one sentence, or "" if it can.
std::string why_no_cuda_device();

// 0 if there is none.
int cuda_device_count();

// Throws Error if there is no such device.
CudaDevice cuda_device(int device);

// Bytes of the device's memory that nobody has now; makes the device's context, which takes some itself.
size_t cuda_free_memory(int device);

// The version of cuBLASLt: 10000·major + 100·minor + patch; 0 without CUDA.
size_t cublas_lt_version();

// The operations on a device, on a stream of their own that orders itself with the default stream. tf32: products and
// attention in fp32 may round their operands to TF32. Throws Error if there is no such device or it is too old.
std::unique_ptr<Ops> make_cuda_ops(int device, bool tf32);

// For ops made by make_cuda_ops: the stream (a cudaStream_t) of the calls that follow.
void use_cuda_stream(Ops& ops, void* stream);
void allow_tf32(Ops& ops, bool allowed);

// For ops made by make_cuda_ops: attention (cuda/cudnn_attention.h) of this shape in bf16 by cuDNN. Takes seconds. Throws
// Error if this build has no cuDNN, or cuDNN no deterministic kernel for the shape on the device.
void use_cudnn_attention(Ops& ops, int64_t B, int64_t T, int64_t num_heads, int64_t head_size);

}  // namespace llmc
