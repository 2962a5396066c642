// What a communicator says when a collective fails.
#pragma once

#include <string>

#include "core/tensor.h"

namespace llmc {

// "all_reduce of gradients of block 3 (7087872 x fp32) failed on rank 0 of 2: why"
inline std::string describe_failure(const std::string& operation, const std::string& what, const Tensor& x, int rank,
                                    int size, const std::string& why) {
  return operation + (what.empty() ? "" : " of " + what) + " (" + std::to_string(x.numel()) + " x " + name_of(x.dtype) +
         ") failed on rank " + std::to_string(rank) + " of " + std::to_string(size) + ": " + why;
}

}  // namespace llmc
