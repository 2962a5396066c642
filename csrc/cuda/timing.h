// How long work takes on the device.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <vector>

namespace llmc::cuda {

// Milliseconds that each of several ways to do the same takes, as the median of rounds in which all take turns, so that
// a clock that changes is the same for all. Each puts its work on the stream; the host waits for the end.
std::vector<float> median_milliseconds(const std::vector<std::function<void()>>& ways, cudaStream_t stream);

}  // namespace llmc::cuda
