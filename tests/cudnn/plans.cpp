// Describes the graphs of csrc/cuda/cudnn_graph.cpp and makes cuDNN's plans for them on a GPU that is not there: a line of
// JSON for each graph on stdout, in the order of the arguments.
//   plans DEVICE.json BxTxNHxHS...      without a device file nothing is planned
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>

#include "core/check.h"
#include "cuda/cudnn_graph.h"
#include "ops/workspace.h"

using namespace llmc;
using namespace llmc::cuda;
using nlohmann::json;

namespace {

std::shared_ptr<cudnn::fe::DeviceProperties> device_of(const char* path) {
  std::ifstream file(path);
  const std::vector<uint8_t> text(std::istreambuf_iterator<char>(file), {});
  auto device = std::make_shared<cudnn::fe::DeviceProperties>();
  LLMC_CUDNN_FRONTEND_CHECK("device", device->deserialize(text));
  return device;
}

// Each operand is at an address of its own.
template <typename T>
T* operand(int number) {
  return reinterpret_cast<T*>(uint64_t(number) << 40);
}

using Graph = cudnn::fe::graph::Graph;

void describe(Graph (*make)(const AttentionShape&), const AttentionShape& shape, const cudnn::Pointers& pointers,
              std::shared_ptr<cudnn::fe::DeviceProperties> device) {
  const char* const what = make == cudnn::forward_graph ? "forward" : "backward";
  json line = {{"planned_bytes", workspace::step(shape.B, shape.T, shape.NH * shape.HS, shape.NH, true)}};
  for (const auto& [id, pointer] : pointers) line["pointers"][std::to_string(id)] = uint64_t(pointer);
  Graph described = make(shape);  // of its own: planning rewrites a graph
  LLMC_CUDNN_FRONTEND_CHECK(what, described.validate());
  line["graph"] = json::parse(described.print());
  if (device) {
    Graph graph = make(shape);
    graph.set_device_properties(device);
    line["workspace_bytes"] = cudnn::build(graph, nullptr, what);
    std::string name;
    LLMC_CUDNN_FRONTEND_CHECK(what, graph.get_plan_name(name));
    line["plan"] = name;
  }
  std::cout << line.dump() << std::endl;
}

}  // namespace

int main(int argc, char** argv) try {
  const auto device = argv[1][0] ? device_of(argv[1]) : nullptr;
  for (int i = 2; i < argc; i++) {
    AttentionShape s;
    LLMC_CHECK(std::sscanf(argv[i], "%ldx%ldx%ldx%ld", &s.B, &s.T, &s.NH, &s.HS) == 4, "%s is no shape", argv[i]);
    const auto qkv = operand<bf16>(1), out = operand<bf16>(2), dqkv = operand<bf16>(4), dout = operand<bf16>(5);
    const auto lse = operand<float>(3);
    describe(cudnn::forward_graph, s, cudnn::forward_pointers(s, qkv, out, lse), device);
    describe(cudnn::backward_graph, s, cudnn::backward_pointers(s, dqkv, dout, out, lse, qkv), device);
  }
} catch (const Error& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
