#include "cuda/graphs.h"

#include "cuda/check.h"

namespace llmc::cuda {
namespace {

struct DestroyGraph {
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
};
using Graph = std::unique_ptr<CUgraph_st, DestroyGraph>;

class Inside {
 public:
  explicit Inside(bool& inside) : inside_(inside) { inside_ = true; }
  ~Inside() { inside_ = false; }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

 private:
  bool& inside_;
};

Graph capture(cudaStream_t stream, const std::function<void()>& work) {
  cudaGraph_t graph = nullptr;
  LLMC_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  try {
    work();
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);  // which has failed, too, if a call of CUDA did
    const Graph unfinished(graph);
    throw;
  }
  LLMC_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  return Graph(graph);
}

// False if the graph has another shape.
bool update(cudaGraphExec_t executable, const Graph& graph) {
  cudaGraphExecUpdateResultInfo result = {};
  const cudaError_t status = cudaGraphExecUpdate(executable, graph.get(), &result);
  if (status == cudaErrorGraphExecUpdateFailure) {
    cudaGetLastError();  // it is handled
    return false;
  }
  LLMC_CUDA_CHECK(status);
  return true;
}

}  // namespace

void Graphs::repeat(const std::string& name, Arguments arguments, cudaStream_t stream,
                    const std::function<void()>& work) {
  if (inside_) return work();
  const Inside inside(inside_);
  const auto found = graphs_.find(name);
  if (found == graphs_.end()) {
    work();
    graphs_[name] = nullptr;
    return;
  }
  Executable& executable = found->second;
  if (!executable || arguments == Arguments::New) {
    const Graph graph = capture(stream, work);
    if (!executable || !update(executable.get(), graph)) {
      cudaGraphExec_t made = nullptr;
      LLMC_CUDA_CHECK(cudaGraphInstantiate(&made, graph.get(), 0));
      if (executable) LLMC_CUDA_CHECK(cudaStreamSynchronize(stream));  // it may still run
      executable.reset(made);
    }
  }
  LLMC_CUDA_CHECK(cudaGraphLaunch(executable.get(), stream));
}

void Graphs::forget(cudaStream_t stream) {
  LLMC_CUDA_CHECK(cudaStreamSynchronize(stream));
  graphs_.clear();
}

}  // namespace llmc::cuda
