// Attention by cuDNN, which uses the instructions of newer GPUs that our kernels do not (wgmma, TMA): an option of builds with
// LLMC_CUDNN=ON. In bf16, for one shape: its plans take seconds to make.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>

#include "core/tensor.h"

namespace llmc::cuda {

struct AttentionShape {
  int64_t B, T, NH, HS;

  bool operator==(const AttentionShape& o) const { return B == o.B && T == o.T && NH == o.NH && HS == o.HS; }
};

class CudnnAttention {
 public:
  // Makes the plans on the current device, by cuDNN's heuristics: the same on every device of the kind. Throws Error if
  // the build has no cuDNN, or cuDNN no plan.
  explicit CudnnAttention(const AttentionShape& shape);
  ~CudnnAttention();
  CudnnAttention(const CudnnAttention&) = delete;
  CudnnAttention& operator=(const CudnnAttention&) = delete;

  bool covers(const AttentionShape& shape) const { return shape == shape_; }

  // Device memory that a call needs, aligned to 256 bytes.
  int64_t workspace_bytes() const;

  // As in ops/ops.h, on the stream. Nothing is allocated, compiled or waited for; a stream may be captured.
  void forward(Tensor out, Tensor lse, Tensor qkv, void* workspace, cudaStream_t stream);
  void backward(Tensor dqkv, Tensor dout, Tensor out, Tensor lse, Tensor qkv, void* workspace, cudaStream_t stream);

 private:
  struct Plans;  // with cuDNN's types, which nobody else includes

  AttentionShape shape_;
  std::unique_ptr<Plans> plans_;
};

}  // namespace llmc::cuda
