// Causal self-attention as cuDNN's graphs: operands are views of the model's memory, so that nothing is transposed.
#pragma once

#include <cudnn_frontend.h>

#include <cstdint>
#include <string>
#include <unordered_map>

#include "cuda/cudnn_attention.h"

namespace llmc::cuda::cudnn {

namespace fe = cudnn_frontend;

// How a graph's tensors are called when it is run.
enum Id : int64_t { kQ = 1, kK, kV, kOut, kLse, kDout, kDq, kDk, kDv };
using Pointers = std::unordered_map<int64_t, void*>;

// attention_forward and attention_backward of ops/ops.h, without `first`. cuDNN's statistics are our lse: the natural
// logarithm of the sum of exp(score / √HS), (B,NH,T,1) in fp32. Scores and sums are fp32. The backward pass is the
// deterministic one: no atomic additions.
fe::graph::Graph forward_graph(const AttentionShape& shape);
fe::graph::Graph backward_graph(const AttentionShape& shape);

// What the tensors of the graphs are, for qkv (B,T,3C) and out (B,T,C).
Pointers forward_pointers(const AttentionShape& shape, const bf16* qkv, bf16* out, float* lse);
Pointers backward_pointers(const AttentionShape& shape, bf16* dqkv, const bf16* dout, const bf16* out, const float* lse,
                           const bf16* qkv);

// Makes the graph's plan, on the graph's device properties or, without them, on the handle's device. Throws Error with
// cuDNN's reason if it has none; `what` names the graph. Returns the bytes of the plan's workspace.
int64_t build(fe::graph::Graph& graph, cudnnHandle_t handle, const char* what);

// What a failure says, in one line of no more than some hundred characters: cuDNN may list all that it has tried.
std::string words_of(fe::error_t status);

}  // namespace llmc::cuda::cudnn

// Every status of the frontend is checked: a failure is an Error with the call, cuDNN's words, file and line.
#define LLMC_CUDNN_FRONTEND_CHECK(what, call)                                  \
  do {                                                                         \
    const cudnn_frontend::error_t llmc_status = (call);                        \
    LLMC_CHECK(llmc_status.is_good(), "cuDNN, %s: %s failed: %s", what, #call, \
               ::llmc::cuda::cudnn::words_of(llmc_status).c_str());            \
  } while (0)
