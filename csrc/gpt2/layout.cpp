#include "gpt2/layout.h"

#include "core/integers.h"

namespace llmc {
namespace {

constexpr int64_t kAlignment = 128;  // elements: 256 bytes in bf16, 512 in fp32

struct Kind {
  const char* name;
  std::vector<int64_t> shape;
};

std::array<Kind, kNumParameterKinds> parameter_kinds(const GPT2Config& config) {
  const int64_t C = config.channels;
  return {{{"wte", {config.padded_vocab_size, C}},
           {"wpe", {config.max_seq_len, C}},
           {"ln1w", {C}},
           {"ln1b", {C}},
           {"qkvw", {3 * C, C}},
           {"qkvb", {3 * C}},
           {"attprojw", {C, C}},
           {"attprojb", {C}},
           {"ln2w", {C}},
           {"ln2b", {C}},
           {"fcw", {4 * C, C}},
           {"fcb", {4 * C}},
           {"fcprojw", {C, 4 * C}},
           {"fcprojb", {C}},
           {"lnfw", {C}},
           {"lnfb", {C}}}};
}

}  // namespace

ParameterLayout::ParameterLayout(const GPT2Config& config, int world_size) : size(0) {
  const auto kinds = parameter_kinds(config);
  const auto add_unit = [&](const std::string& name, int first, int last, int64_t layer, const std::string& prefix) {
    ParameterUnit unit{name, size, 0, {}};
    for (int k = first; k <= last; k++) {
      int64_t numel = 1;
      for (const int64_t extent : kinds[k].shape) numel *= extent;
      unit.tensors.push_back({prefix + kinds[k].name, ParameterKind(k), layer, units.size(), kinds[k].shape,
                              unit.offset + unit.size, numel, kinds[k].shape.size() == 2});
      unit.size += round_up(numel, kAlignment);
    }
    unit.size = round_up(unit.size, kAlignment * world_size);
    size += unit.size;
    units.push_back(std::move(unit));
  };
  add_unit("embeddings", kWte, kWpe, 0, "");
  for (int64_t l = 0; l < config.num_layers; l++) {
    const std::string number = std::to_string(l);
    add_unit("block " + number, kLn1w, kFcprojb, l, "h" + number + ".");
  }
  add_unit("last layernorm", kLnfw, kLnfb, 0, "");
}

const ParameterTensor& ParameterLayout::tensor(ParameterKind kind, int64_t layer) const {
  if (kind <= kWpe) return units.front().tensors[kind];
  if (kind >= kLnfw) return units.back().tensors[kind - kLnfw];
  return units[1 + layer].tensors[kind - kLn1w];
}

}  // namespace llmc
