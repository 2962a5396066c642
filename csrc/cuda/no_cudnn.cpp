// cuDNN's attention in a build with CUDA but without cuDNN.
#include "core/check.h"
#include "cuda/cudnn_attention.h"
#include "cuda/make_cuda_ops.h"

namespace llmc {

bool has_cudnn() { return false; }

namespace cuda {

struct CudnnAttention::Plans {};

CudnnAttention::CudnnAttention(const AttentionShape& shape) : shape_(shape) {
  LLMC_CHECK(false, "this build of llmc has no cuDNN: reinstall with LLMC_CUDNN=ON, which says what is missing");
}

CudnnAttention::~CudnnAttention() = default;

int64_t CudnnAttention::workspace_bytes() const { return 0; }

void CudnnAttention::forward(Tensor, Tensor, Tensor, void*, cudaStream_t) {}

void CudnnAttention::backward(Tensor, Tensor, Tensor, Tensor, Tensor, void*, cudaStream_t) {}

}  // namespace cuda
}  // namespace llmc
