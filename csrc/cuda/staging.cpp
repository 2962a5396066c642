#include "cuda/staging.h"

#include <algorithm>
#include <cstring>

#include "cuda/check.h"

namespace llmc::cuda {

// Errors of the clean-up have nobody to go to.
Staging::~Staging() {
  for (Buffer& buffer : buffers_) {
    if (buffer.copied) {
      cudaEventSynchronize(buffer.copied);
      cudaEventDestroy(buffer.copied);
    }
    cudaFreeHost(buffer.memory);
  }
}

void Staging::upload(void* device, const void* host, size_t bytes, cudaStream_t stream) {
  for (size_t begin = 0; begin < bytes; begin += kLargest) {
    upload_piece(static_cast<char*>(device) + begin, static_cast<const char*>(host) + begin,
                 std::min(kLargest, bytes - begin), stream);
  }
}

void Staging::upload_piece(void* device, const void* host, size_t bytes, cudaStream_t stream) {
  Buffer& buffer = buffers_[next_];
  next_ = (next_ + 1) % buffers_.size();
  if (!buffer.copied) LLMC_CUDA_CHECK(cudaEventCreateWithFlags(&buffer.copied, cudaEventDisableTiming));
  LLMC_CUDA_CHECK(cudaEventSynchronize(buffer.copied));
  if (buffer.bytes < bytes) {
    LLMC_CUDA_CHECK(cudaFreeHost(buffer.memory));
    buffer = {nullptr, 0, buffer.copied};
    LLMC_CUDA_CHECK(cudaMallocHost(&buffer.memory, bytes));
    buffer.bytes = bytes;
  }
  std::memcpy(buffer.memory, host, bytes);
  LLMC_CUDA_CHECK(cudaMemcpyAsync(device, buffer.memory, bytes, cudaMemcpyHostToDevice, stream));
  LLMC_CUDA_CHECK(cudaEventRecord(buffer.copied, stream));
}

}  // namespace llmc::cuda
