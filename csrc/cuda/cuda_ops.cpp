#include "cuda/cuda_ops.h"

#include <nvtx3/nvToolsExt.h>

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <utility>

#include "cuda/check.h"
#include "cuda/cublas_lt.h"

namespace llmc::cuda {

CudaOps::CudaOps(int device, std::string name, bool tf32) : device_(device), name_(std::move(name)), tf32_(tf32) {
  const OnDevice on_device(*this);
  staging_ = std::make_unique<Staging>();
  cublas_ = std::make_unique<CublasLt>();
  // A blocking stream: work on the default stream, where torch puts its own unless told otherwise, is ordered with it.
  LLMC_CUDA_CHECK(cudaStreamCreate(&stream_));
  own_stream_ = stream_;
}

// Errors of the clean-up have nobody to go to.
CudaOps::~CudaOps() {
  int previous = device_;
  cudaGetDevice(&previous);
  cudaSetDevice(device_);
  cudaStreamSynchronize(own_stream_);
  graphs_ = Graphs();
  cudnn_.reset();
  staging_.reset();
  host_copies_.reset();
  cudaFree(own_workspace_);
  cudaStreamDestroy(own_stream_);
  restore_current(previous);
}

int CudaOps::make_current() {
  int previous = device_;
  LLMC_CUDA_CHECK(cudaGetDevice(&previous));
  if (previous != device_) LLMC_CUDA_CHECK(cudaSetDevice(device_));
  return previous;
}

// Called from destructors: an error has nobody to go to.
void CudaOps::restore_current(int device) {
  if (device != device_) cudaSetDevice(device);
}

void* CudaOps::allocate(size_t bytes) {
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, std::max(bytes, size_t(1)));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it was handled
    size_t free_bytes = 0, total = 0;
    LLMC_CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total));
    LLMC_CHECK(false,
               "%s has no %zu MiB of memory left (%zu of %zu MiB are free): lower the batch size or recompute more",
               name_.c_str(), bytes >> 20, free_bytes >> 20, total >> 20);
  }
  LLMC_CUDA_CHECK(status);
  allocations_[data] = bytes;
  allocated_bytes_ += bytes;
  LLMC_CUDA_CHECK(cudaMemsetAsync(data, 0, bytes, stream_));
  return data;
}

void CudaOps::free(void* data) {
  if (!data) return;
  const auto found = allocations_.find(data);
  allocated_bytes_ -= found->second;
  allocations_.erase(found);
  cudaFree(data);  // waits for the device; called from destructors, so a failure has nobody to go to
}

void* CudaOps::scratch(int64_t bytes) {
  if (workspace_ && workspace_.bytes() >= bytes) return workspace_.data;
  if (own_workspace_bytes_ < bytes) {
    LLMC_CUDA_CHECK(cudaFree(own_workspace_));
    own_workspace_ = nullptr;
    own_workspace_bytes_ = 0;
    LLMC_CUDA_CHECK(cudaMalloc(&own_workspace_, size_t(bytes)));
    own_workspace_bytes_ = bytes;
  }
  return own_workspace_;
}

void CudaOps::use_workspace(Tensor workspace) {
  workspace_ = workspace;
  // What another version of cuDNN may need beyond the plan is allocated now, not in a step.
  if (cudnn_) scratch(cudnn_->workspace_bytes());
}

void CudaOps::use_cudnn_attention(const AttentionShape& shape) {
  const OnDevice on_device(*this);
  cudnn_ = std::make_unique<CudnnAttention>(shape);
}

CudnnAttention* CudaOps::cudnn_for(Tensor qkv, int64_t num_heads) {
  const AttentionShape shape = {qkv.shape[0], qkv.shape[1], num_heads, qkv.last() / 3 / num_heads};
  return cudnn_ && qkv.dtype == DType::BF16 && cudnn_->covers(shape) ? cudnn_.get() : nullptr;
}

void CudaOps::fill_zero(Tensor x) { LLMC_CUDA_CHECK(cudaMemsetAsync(x.data, 0, size_t(x.bytes()), stream_)); }

void CudaOps::upload(Tensor x, const void* host) { staging_->upload(x.data, host, size_t(x.bytes()), stream_); }

void CudaOps::download(void* host, Tensor x) {
  LLMC_CUDA_CHECK(cudaMemcpyAsync(host, x.data, size_t(x.bytes()), cudaMemcpyDeviceToHost, stream_));
  LLMC_CUDA_CHECK(cudaStreamSynchronize(stream_));
}

void* CudaOps::allocate_host(size_t bytes) {
  if (!host_copies_) host_copies_ = std::make_unique<HostCopies>();
  void* memory = nullptr;
  const cudaError_t status = cudaMallocHost(&memory, std::max(bytes, size_t(1)));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it was handled
    LLMC_CHECK(false,
               "this machine gives a GPU no %zu MiB of its memory: drop --offload-optimizer 1 or --async-checkpoint 1, "
               "or use more GPUs",
               bytes >> 20);
  }
  LLMC_CUDA_CHECK(status);
  std::memset(memory, 0, bytes);
  return memory;
}

// Called from destructors: an error has nobody to go to.
void CudaOps::free_host(void* memory) {
  if (!memory) return;
  try {
    finish_stores();
  } catch (const Error&) {
  }
  cudaFreeHost(memory);  // waits for the device
}

void CudaOps::fetch(int slot, const HostCopy* copies, int64_t count) {
  host_copies_->fetch(slot, copies, count, stream_);
}

void CudaOps::store(int slot, const HostCopy* copies, int64_t count) {
  host_copies_->store(slot, copies, count, stream_);
}

void CudaOps::finish_stores() { host_copies_->finish_stores(); }

void CudaOps::begin_range(const char* name) { nvtxRangePushA(name); }

void CudaOps::end_range() { nvtxRangePop(); }

void check_channels(const char* operation, int64_t C) {
  LLMC_CHECK(C % 8 == 0, "%s: C is %" PRId64 ", on CUDA it must be a multiple of 8", operation, C);
}

}  // namespace llmc::cuda
