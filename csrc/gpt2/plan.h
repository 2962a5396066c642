// All memory of a model, computed before anything is allocated.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "gpt2/config.h"
#include "gpt2/layout.h"

namespace llmc {

constexpr int64_t kNumVotes = 2;  // of each rank: see GPT2::vote

// One allocation is made per lifetime, when it is first needed: sampling and evaluation never allocate gradients. Host is
// the host's memory, not the device's.
enum class Lifetime { Parameters, Gradients, Optimizer, Activations, Host };
constexpr int kNumLifetimes = 5;

const char* name_of(Lifetime lifetime);

struct Buffer {
  std::string name;
  Lifetime lifetime;
  DType dtype;
  std::vector<int64_t> shape;
  int64_t offset;  // bytes from the start of the lifetime's allocation
  int64_t bytes;   // without the padding to the next buffer
};

struct Plan {
  std::vector<Buffer> buffers;
  std::array<int64_t, kNumLifetimes> bytes{};  // size of each allocation

  const Buffer& buffer(const std::string& name) const;

  // What a block computes, by the name that follows "h0." where each block has its own; else the one of all blocks.
  const Buffer& block_buffer(int64_t layer, const std::string& name) const;

 private:
  friend Plan plan(const GPT2Config& config, const Options& options, int world_size);
  std::map<std::string, size_t> index_;
};

// The memory of one rank. Pure: the same arguments give the same plan on every machine.
// Buffers that are never alive together share an offset.
Plan plan(const GPT2Config& config, const Options& options, int world_size);

}  // namespace llmc
