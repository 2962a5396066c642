// Work that is done again and again, as CUDA graphs: one launch for the host, and shorter ways from kernel to kernel on the
// device (the contract is Ops::repeat's, in ops/ops.h).
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "ops/ops.h"

namespace llmc::cuda {

// The first time, work is launched kernel by kernel, which loads the kernels and lets cuBLASLt choose: neither may happen in
// a capture. The second time it is captured. After that its graph is launched; with new arguments the work is captured
// again each time, and the graph that is there takes them over, as long as it has the same shape.
//
// A capture sees no stream but this one, and this thread must not allocate, wait or copy pageable memory meanwhile; other
// threads may. Ranges for profilers only mark the time of the capture.
class Graphs {
 public:
  void repeat(const std::string& name, Arguments arguments, cudaStream_t stream, const std::function<void()>& work);
  void forget(cudaStream_t stream);  // everything, once the stream has done it: work is new again

 private:
  struct Destroy {
    void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
  };
  using Executable = std::unique_ptr<CUgraphExec_st, Destroy>;

  std::map<std::string, Executable> graphs_;  // null: its work was done once
  bool inside_ = false;                       // of some work: what is repeated there is a part of it
};

}  // namespace llmc::cuda
