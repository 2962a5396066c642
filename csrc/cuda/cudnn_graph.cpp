#include "cuda/cudnn_graph.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "core/check.h"

namespace llmc::cuda::cudnn {
namespace {

using fe::graph::Graph;
using fe::graph::Tensor_attributes;
using TensorPointer = std::shared_ptr<Tensor_attributes>;

Graph bf16_graph() {
  Graph graph;
  graph.set_io_data_type(fe::DataType_t::BFLOAT16)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  return graph;
}

// The heads of a matrix (B,T,row) as (B,NH,T,HS).
void view_heads(Tensor_attributes& tensor, Id id, const AttentionShape& s, int64_t row) {
  tensor.set_uid(id).set_dim({s.B, s.NH, s.T, s.HS}).set_stride({s.T * row, s.HS, row, 1});
}

TensorPointer heads(Graph& graph, const char* name, Id id, const AttentionShape& s, int64_t row) {
  Tensor_attributes tensor;
  view_heads(tensor.set_name(name), id, s, row);
  return graph.tensor(tensor);
}

void view_lse(Tensor_attributes& tensor, const AttentionShape& s) {
  tensor.set_uid(kLse)
      .set_dim({s.B, s.NH, s.T, 1})
      .set_stride({s.NH * s.T, s.T, 1, 1})
      .set_data_type(fe::DataType_t::FLOAT);
}

float scale(const AttentionShape& s) { return 1 / std::sqrt(float(s.HS)); }

}  // namespace

Graph forward_graph(const AttentionShape& s) {
  Graph graph = bf16_graph();
  const int64_t C = s.NH * s.HS;
  const auto q = heads(graph, "q", kQ, s, 3 * C), k = heads(graph, "k", kK, s, 3 * C);
  const auto v = heads(graph, "v", kV, s, 3 * C);
  fe::graph::SDPA_attributes attributes;
  attributes.set_name("forward").set_generate_stats(true).set_causal_mask(true).set_attn_scale(scale(s));
  const auto [out, lse] = graph.sdpa(q, k, v, attributes);
  view_heads(out->set_output(true), kOut, s, C);
  view_lse(lse->set_output(true), s);
  return graph;
}

Graph backward_graph(const AttentionShape& s) {
  Graph graph = bf16_graph();
  const int64_t C = s.NH * s.HS;
  const auto q = heads(graph, "q", kQ, s, 3 * C), k = heads(graph, "k", kK, s, 3 * C);
  const auto v = heads(graph, "v", kV, s, 3 * C);
  const auto out = heads(graph, "out", kOut, s, C), dout = heads(graph, "dout", kDout, s, C);
  Tensor_attributes statistics;
  view_lse(statistics.set_name("lse"), s);
  const auto lse = graph.tensor(statistics);
  fe::graph::SDPA_backward_attributes attributes;
  attributes.set_name("backward").set_causal_mask(true).set_attn_scale(scale(s)).set_deterministic_algorithm(true);
  const auto [dq, dk, dv] = graph.sdpa_backward(q, k, v, out, dout, lse, attributes);
  view_heads(dq->set_output(true), kDq, s, 3 * C);
  view_heads(dk->set_output(true), kDk, s, 3 * C);
  view_heads(dv->set_output(true), kDv, s, 3 * C);
  return graph;
}

// The graphs say what is written; the pointers are of one type.
Pointers forward_pointers(const AttentionShape& s, const bf16* qkv, bf16* out, float* lse) {
  bf16* const q = const_cast<bf16*>(qkv);
  const int64_t C = s.NH * s.HS;
  return {{kQ, q}, {kK, q + C}, {kV, q + 2 * C}, {kOut, out}, {kLse, lse}};
}

Pointers backward_pointers(const AttentionShape& s, bf16* dqkv, const bf16* dout, const bf16* out, const float* lse,
                           const bf16* qkv) {
  const int64_t C = s.NH * s.HS;
  Pointers pointers = forward_pointers(s, qkv, const_cast<bf16*>(out), const_cast<float*>(lse));
  pointers.insert({{kDout, const_cast<bf16*>(dout)}, {kDq, dqkv}, {kDk, dqkv + C}, {kDv, dqkv + 2 * C}});
  return pointers;
}

int64_t build(Graph& graph, cudnnHandle_t handle, const char* what) {
  LLMC_CUDNN_FRONTEND_CHECK(what, graph.validate());
  LLMC_CUDNN_FRONTEND_CHECK(what, graph.build_operation_graph(handle));
  LLMC_CUDNN_FRONTEND_CHECK(what, graph.create_execution_plans({fe::HeurMode_t::A}));
  LLMC_CUDNN_FRONTEND_CHECK(what, graph.check_support());
  // The first of cuDNN's proposals that works. Timing them would make the choice, and so the bits, a matter of chance.
  LLMC_CUDNN_FRONTEND_CHECK(what, graph.build_plans(fe::BuildPlanPolicy_t::HEURISTICS_CHOICE));
  int64_t bytes = 0;
  LLMC_CUDNN_FRONTEND_CHECK(what, graph.get_workspace_size(bytes));
  return bytes;
}

std::string words_of(fe::error_t status) {
  std::string words = status.get_message().substr(0, 400);
  std::replace(words.begin(), words.end(), '\n', ' ');
  return words;
}

}  // namespace llmc::cuda::cudnn
