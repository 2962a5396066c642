// Where each parameter lives. Gradients, optimizer state and master weights share this layout.
//
// Parameters are kept layer-major in units: unit 0 = wte, wpe; unit 1 + l = the 12 tensors of block l; the last unit =
// lnfw, lnfb. A unit is what a collective moves and a shard cuts: it is padded so that it splits evenly over the ranks.
// (Model files are tensor-major: only llmc/model_file.py knows both orders.)
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "gpt2/config.h"

namespace llmc {

// The 16 kinds of parameter tensors, numbered as in the model file.
enum ParameterKind {
  kWte,
  kWpe,
  kLn1w,
  kLn1b,
  kQkvw,
  kQkvb,
  kAttprojw,
  kAttprojb,
  kLn2w,
  kLn2b,
  kFcw,
  kFcb,
  kFcprojw,
  kFcprojb,
  kLnfw,
  kLnfb,
  kNumParameterKinds
};

struct ParameterTensor {
  std::string name;  // "wte", "h0.qkvw", "lnfb"
  ParameterKind kind;
  int64_t layer;               // block index, 0 outside the blocks
  size_t unit;                 // where it belongs
  std::vector<int64_t> shape;  // (rows, columns) or (length)
  int64_t offset;              // elements from the start of the whole layout
  int64_t numel;
  bool weight_decay;  // matrices decay, vectors do not
};

struct ParameterUnit {
  std::string name;  // "embeddings", "block 3", "last layernorm"
  int64_t offset;    // elements from the start of the whole layout
  int64_t size;      // elements, padding included; a multiple of the number of ranks
  std::vector<ParameterTensor> tensors;
};

struct ParameterLayout {
  std::vector<ParameterUnit> units;
  int64_t size;  // elements of all units

  ParameterLayout(const GPT2Config& config, int world_size);

  const ParameterTensor& tensor(ParameterKind kind, int64_t layer) const;
};

}  // namespace llmc
