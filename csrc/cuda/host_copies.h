// Pinned host memory and its copies, on streams of their own beside the operations' (the contract is in ops/ops.h).
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>

#include "ops/ops.h"

namespace llmc::cuda {

// One stream for each direction, so that they share the bus both ways.
class HostCopies {
 public:
  HostCopies();
  ~HostCopies();
  HostCopies(const HostCopies&) = delete;
  HostCopies& operator=(const HostCopies&) = delete;

  void fetch(int slot, const HostCopy* copies, int64_t count, cudaStream_t operations);
  void store(int slot, const HostCopy* copies, int64_t count, cudaStream_t operations);
  void finish_stores();

 private:
  struct Slot {
    cudaEvent_t there = nullptr;  // fetched
    cudaEvent_t used = nullptr;   // the operations have done with it
    cudaEvent_t free = nullptr;   // stored
  };
  void release();

  cudaStream_t in_ = nullptr, out_ = nullptr;
  std::array<Slot, 2> slots_;
};

}  // namespace llmc::cuda
