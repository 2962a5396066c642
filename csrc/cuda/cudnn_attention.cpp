#include "cuda/cudnn_attention.h"

#include <algorithm>

#include "core/check.h"
#include "cuda/cudnn_graph.h"
#include "cuda/make_cuda_ops.h"

#define LLMC_CUDNN_CHECK(call)                                                                                        \
  do {                                                                                                                \
    const cudnnStatus_t llmc_status = (call);                                                                         \
    LLMC_CHECK(llmc_status == CUDNN_STATUS_SUCCESS, "cuDNN: %s failed: %s", #call, cudnnGetErrorString(llmc_status)); \
  } while (0)

namespace llmc {

bool has_cudnn() { return true; }

namespace cuda {

namespace {

constexpr const char* kForward = "attention forward";
constexpr const char* kBackward = "attention backward";

struct Handle {
  Handle() { LLMC_CUDNN_CHECK(cudnnCreate(&handle)); }
  ~Handle() { cudnnDestroy(handle); }  // an error has nobody to go to
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  cudnnHandle_t handle = nullptr;
};

}  // namespace

struct CudnnAttention::Plans {
  explicit Plans(const AttentionShape& shape)
      : forward(cudnn::forward_graph(shape)),
        backward(cudnn::backward_graph(shape)),
        workspace_bytes(
            std::max(cudnn::build(forward, owner.handle, kForward), cudnn::build(backward, owner.handle, kBackward))) {}

  // The handle, which runs the plans on the stream from now on.
  cudnnHandle_t on(cudaStream_t stream) {
    LLMC_CUDNN_CHECK(cudnnSetStream(owner.handle, stream));
    return owner.handle;
  }

  Handle owner;
  cudnn::fe::graph::Graph forward, backward;
  int64_t workspace_bytes;
};

CudnnAttention::CudnnAttention(const AttentionShape& shape) : shape_(shape), plans_(std::make_unique<Plans>(shape)) {}

CudnnAttention::~CudnnAttention() = default;

int64_t CudnnAttention::workspace_bytes() const { return plans_->workspace_bytes; }

void CudnnAttention::forward(Tensor out, Tensor lse, Tensor qkv, void* workspace, cudaStream_t stream) {
  auto pointers = cudnn::forward_pointers(shape_, qkv.as<bf16>(), out.as<bf16>(), lse.as<float>());
  LLMC_CUDNN_FRONTEND_CHECK(kForward, plans_->forward.execute(plans_->on(stream), pointers, workspace));
}

void CudnnAttention::backward(Tensor dqkv, Tensor dout, Tensor out, Tensor lse, Tensor qkv, void* workspace,
                              cudaStream_t stream) {
  auto pointers = cudnn::backward_pointers(shape_, dqkv.as<bf16>(), dout.as<bf16>(), out.as<bf16>(), lse.as<float>(),
                                           qkv.as<bf16>());
  LLMC_CUDNN_FRONTEND_CHECK(kBackward, plans_->backward.execute(plans_->on(stream), pointers, workspace));
}

}  // namespace cuda
}  // namespace llmc
