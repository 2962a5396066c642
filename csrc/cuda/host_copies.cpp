#include "cuda/host_copies.h"

#include "cuda/check.h"

namespace llmc::cuda {

HostCopies::HostCopies() {
  try {
    for (cudaStream_t* stream : {&in_, &out_}) {
      LLMC_CUDA_CHECK(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking));
    }
    for (Slot& slot : slots_) {
      for (cudaEvent_t* event : {&slot.there, &slot.used, &slot.free}) {
        LLMC_CUDA_CHECK(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
      }
    }
  } catch (...) {
    release();
    throw;
  }
}

HostCopies::~HostCopies() { release(); }

// Errors of the clean-up have nobody to go to.
void HostCopies::release() {
  for (const cudaStream_t stream : {in_, out_}) {
    if (stream) {
      cudaStreamSynchronize(stream);
      cudaStreamDestroy(stream);
    }
  }
  for (const Slot& slot : slots_) {
    for (const cudaEvent_t event : {slot.there, slot.used, slot.free}) {
      if (event) cudaEventDestroy(event);
    }
  }
}

void HostCopies::fetch(int slot, const HostCopy* copies, int64_t count, cudaStream_t operations) {
  LLMC_CUDA_CHECK(cudaStreamWaitEvent(in_, slots_[slot].free, 0));  // and so for all stores before that one
  for (int64_t i = 0; i < count; i++) {
    LLMC_CUDA_CHECK(cudaMemcpyAsync(copies[i].device.data, copies[i].host, size_t(copies[i].device.bytes()),
                                    cudaMemcpyHostToDevice, in_));
  }
  LLMC_CUDA_CHECK(cudaEventRecord(slots_[slot].there, in_));
  LLMC_CUDA_CHECK(cudaStreamWaitEvent(operations, slots_[slot].there, 0));
}

void HostCopies::store(int slot, const HostCopy* copies, int64_t count, cudaStream_t operations) {
  LLMC_CUDA_CHECK(cudaEventRecord(slots_[slot].used, operations));
  LLMC_CUDA_CHECK(cudaStreamWaitEvent(out_, slots_[slot].used, 0));
  for (int64_t i = 0; i < count; i++) {
    LLMC_CUDA_CHECK(cudaMemcpyAsync(copies[i].host, copies[i].device.data, size_t(copies[i].device.bytes()),
                                    cudaMemcpyDeviceToHost, out_));
  }
  LLMC_CUDA_CHECK(cudaEventRecord(slots_[slot].free, out_));
}

void HostCopies::finish_stores() { LLMC_CUDA_CHECK(cudaStreamSynchronize(out_)); }

}  // namespace llmc::cuda
