#include "gpt2/plan.h"

#include <algorithm>

#include "core/check.h"
#include "core/integers.h"
#include "gpt2/fp8.h"
#include "ops/workspace.h"

namespace llmc {
namespace {

constexpr int64_t kAlignment = 256;                   // bytes, of every buffer
constexpr int64_t kOffloadPiece = int64_t(1) << 22;   // elements: 16 MiB of m, of v and of master weights
constexpr int64_t kLogitsBudget = int64_t(64) << 20;  // bytes of a logits chunk that are always granted
constexpr int64_t kTileRows = 128;                    // of products on a GPU

// Rows of a logits chunk: the head shares its memory with what the blocks' backward pass works in. A chunk may always be as
// large as their 4C-wide gradient, and in FP8, with operands of its own at level 2, as all of that. Chunks are balanced; on
// a GPU they are of whole tiles, if that leaves room enough, and for products in FP8 always of a multiple of 16 rows.
// Chunks that stay in a GPU's L2 cache do not pay: each reads and writes all of dwte_sum, and their products are bound by
// arithmetic anyway. By llmc/roofline.py, with logits that cost no memory traffic, the loss head of d12 would take 1.4 times
// as long on A100 (256 rows in 40 MB), 1.6 times on H100 (320 rows in 50 MB) and 1.1 times on B200 (768 rows in 126 MB).
int64_t classifier_rows(const GPT2Config& config, const Options& options) {
  const int64_t N = options.batch_size * options.seq_len;
  const auto whole_products = [&](int64_t rows) { return options.fp8 >= 2 ? std::min(round_up(rows, 16), N) : rows; };
  if (options.classifier_rows > 0) return whole_products(std::min(options.classifier_rows, N));
  const int64_t residual = N * config.channels * size_of(options.precision);
  const int64_t row = config.padded_vocab_size * size_of(options.precision);
  int64_t rows = std::max(kLogitsBudget, 4 * residual) / row;
  if (options.fp8) {
    const int64_t fixed = options.fp8 >= 2 ? fp8_head_bytes(config, 0) : 0;
    const int64_t head_row = options.fp8 >= 2 ? fp8_head_bytes(config, 1) - fixed : 0;
    rows = std::max(rows, (5 * residual + fp8_operand_bytes(config, N) - fixed) / (row + head_row));
  }
  rows = std::clamp(rows, int64_t(1), N);
  const int64_t balanced = divide_up(N, divide_up(N, rows));
  const int64_t whole = round_up(balanced, kTileRows);
  return whole_products(options.device.cuda && whole <= rows ? whole : balanced);
}

class Builder {
 public:
  explicit Builder(Plan& plan) : plan_(plan) {}

  void add(Lifetime lifetime, const std::string& name, DType dtype, std::vector<int64_t> shape) {
    overlay(lifetime, {{{name, dtype, std::move(shape)}}});
  }

  struct Member {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;
  };

  // Groups start at the same offset: the members of at most one of them are alive at any time.
  void overlay(Lifetime lifetime, std::vector<std::vector<Member>> groups) {
    const int64_t begin = plan_.bytes[int(lifetime)];
    for (std::vector<Member>& group : groups) {
      int64_t end = begin;
      for (Member& member : group) {
        int64_t bytes = size_of(member.dtype);
        for (const int64_t extent : member.shape) bytes *= extent;
        plan_.buffers.push_back({std::move(member.name), lifetime, member.dtype, std::move(member.shape), end, bytes});
        end += round_up(bytes, kAlignment);
      }
      plan_.bytes[int(lifetime)] = std::max(plan_.bytes[int(lifetime)], end);
    }
  }

 private:
  Plan& plan_;
};

// The units as working memory while the buffer itself is a shard: blocks take turns in two slots, so that one is moved
// while the other is used; unit 0 and the last one stay for the whole pass.
void add_working_units(Builder& builder, Lifetime lifetime, DType dtype, const ParameterLayout& layout) {
  const std::string name = name_of(lifetime);
  builder.add(lifetime, name + "_first", dtype, {layout.units.front().size});
  builder.add(lifetime, name + "_ring", dtype, {2, layout.units[1].size});  // all blocks have the same size
  builder.add(lifetime, name + "_last", dtype, {layout.units.back().size});
}

}  // namespace

const char* name_of(Lifetime lifetime) {
  static constexpr const char* kNames[kNumLifetimes] = {"parameters", "gradients", "optimizer", "activations", "host"};
  return kNames[int(lifetime)];
}

const Buffer& Plan::block_buffer(int64_t layer, const std::string& name) const {
  const auto own = index_.find("h" + std::to_string(layer) + "." + name);
  if (own != index_.end()) return buffers[own->second];
  return buffer(name == "ln1" || name == "ln2" ? "lnf" : name);
}

const Buffer& Plan::buffer(const std::string& name) const {
  const auto found = index_.find(name);
  LLMC_CHECK(found != index_.end(), "the memory plan has no buffer named %s", name.c_str());
  return buffers[found->second];
}

Plan plan(const GPT2Config& config, const Options& options, int world_size) {
  config.validate();
  options.validate(config);
  LLMC_CHECK(world_size >= 1, "world_size is %d, it must be at least 1", world_size);

  const int64_t B = options.batch_size, T = options.seq_len, C = config.channels, NH = config.num_heads;
  const DType X = options.precision, F32 = DType::F32, I32 = DType::I32;
  const DType Q = options.fp8 ? DType::E4M3 : X;  // of products' inputs that nothing else takes
  const int r = options.recompute;
  const int64_t rows = classifier_rows(config, options);

  Plan result;
  Builder builder(result);

  const ParameterLayout layout(config, world_size);
  const int64_t size = layout.size, shard = size / world_size;
  const int stage = options.on_ranks(world_size).zero_stage;

  builder.add(Lifetime::Parameters, "parameters", X, {stage >= 3 ? shard : size});
  if (stage >= 3) add_working_units(builder, Lifetime::Parameters, X, layout);

  if (stage >= 2) {
    builder.add(Lifetime::Gradients, "gradients", F32, {shard});  // every micro-step adds its sum over the ranks
    add_working_units(builder, Lifetime::Gradients, options.grad_dtype, layout);
  } else {
    builder.add(Lifetime::Gradients, "gradients", options.grad_dtype, {size});
  }
  if (options.grad_dtype != F32 && rows < B * T) {
    // Many chunks would round dwte many times: they add up here, and once per micro-step into the gradients.
    builder.add(Lifetime::Gradients, "dwte_sum", F32, {config.padded_vocab_size, C});
  }

  const int64_t state = stage >= 1 ? shard : size;
  const Lifetime at = options.offload_optimizer ? Lifetime::Host : Lifetime::Optimizer;
  std::vector<std::string> names = {"m", "v"};
  if (options.has_master()) names.push_back("master");
  for (const std::string& name : names) builder.add(at, name, F32, {state});
  if (options.offload_optimizer) {
    // Two pieces take turns on the device: one is moved while the other is updated.
    int64_t largest = 0;
    for (const ParameterUnit& unit : layout.units) largest = std::max(largest, unit.size);
    if (stage >= 1) largest /= world_size;
    const int64_t piece = std::min(options.offload_piece > 0 ? options.offload_piece : kOffloadPiece, largest);
    for (const std::string& name : names) builder.add(Lifetime::Optimizer, name + "_ring", F32, {2, piece});
  }

  if (options.fp8) builder.add(Lifetime::Optimizer, "fp8_history", F32, {fp8_tensors(config, options.fp8), kFp8Window});

  const auto activation = [&](const std::string& name, DType dtype, std::vector<int64_t> shape) {
    builder.add(Lifetime::Activations, name, dtype, std::move(shape));
  };
  activation("tokens", I32, {B, T});
  activation("targets", I32, {B, T});
  activation("token_order", I32, {B * T});
  activation("encoded", X, {B, T, C});
  // What blocks compute, and the level of recomputation from which on one buffer serves all of them.
  constexpr int kNever = 5;
  struct BlockTensor {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;
    int shared_from;
  };
  std::vector<BlockTensor> block = {
      {"ln1", Q, {B, T, C}, 2},       {"ln1_mean", F32, {B, T}, 4}, {"ln1_rstd", F32, {B, T}, 4},
      {"qkv", X, {B, T, 3 * C}, 3},   {"atty", X, {B, T, C}, 4},    {"lse", F32, {B, NH, T}, 4},
      {"residual2", X, {B, T, C}, 3}, {"ln2", Q, {B, T, C}, 2},     {"ln2_mean", F32, {B, T}, 4},
      {"ln2_rstd", F32, {B, T}, 4},   {"fch", X, {B, T, 4 * C}, 4}, {"residual3", X, {B, T, C}, kNever},
  };
  if (options.fp8) {  // transposed, for the backward pass alone
    block.push_back({"atty_fp8", Q, {C, B * T}, 1});
    block.push_back({"fch_gelu_fp8", Q, {4 * C, B * T}, 1});
    block.push_back({"weights_fp8", Q, {12, C, C}, 1});
  } else {
    block.push_back({"fch_gelu", X, {B, T, 4 * C}, 1});
  }
  for (int64_t l = 0; l < config.num_layers; l++) {
    for (const auto& tensor : block) {
      if (r < tensor.shared_from) activation("h" + std::to_string(l) + "." + tensor.name, tensor.dtype, tensor.shape);
    }
  }
  for (const auto& tensor : block) {
    const bool in_lnf = tensor.name == "ln1" || tensor.name == "ln2";  // which is theirs, too (block_buffer)
    const bool converted_anew = tensor.dtype == DType::E4M3;           // in the backward pass
    if (r >= tensor.shared_from && !in_lnf && !converted_anew) {
      activation(tensor.name, tensor.dtype, tensor.shape);
    }
  }
  activation("lnf", X, {B, T, C});
  activation("lnf_mean", F32, {B, T});
  activation("lnf_rstd", F32, {B, T});
  activation("losses", F32, {B, T});
  activation("eval_losses", F32, {B, T});
  activation("scratch_btc", X, {B, T, C});
  std::vector<Builder::Member> blocks = {{"dresidual", X, {B, T, C}}, {"scratch_bt4c", X, {B, T, 4 * C}}};
  std::vector<Builder::Member> head = {{"logits", X, {rows, config.padded_vocab_size}}};
  if (options.fp8) blocks.push_back({"fp8_operands", DType::E4M3, {fp8_operand_bytes(config, B * T)}});
  if (options.fp8 >= 2) head.push_back({"fp8_head", DType::E4M3, {fp8_head_bytes(config, rows)}});
  builder.overlay(Lifetime::Activations, {blocks, head});
  if (options.device.cuda) {
    activation("workspace", F32,
               {divide_up(workspace::step(B, T, C, NH, options.cudnn_attention, options.fp8), int64_t(4))});
  }
  if (options.fp8) {
    activation("fp8_scales", F32, {fp8_tensors(config, options.fp8), 2});
    activation("fp8_amax", F32, {fp8_tensors(config, options.fp8)});
    activation("fp8_forward_amax", F32, {first_fp8_head(config)});  // of the blocks' inputs and weights
    activation("fp8_first_amax", F32, {1});
    if (options.fp8 >= 2) activation("dlogits_unscale", F32, {1});
  }
  activation("loss_sum", F32, {1 + kNumVotes});  // and the votes, which are averaged with it
  for (const char* scalar : {"grad_sum_of_squares", "grad_norm", "grad_scale", "broken_parameters"})
    activation(scalar, F32, {1});

  for (size_t i = 0; i < result.buffers.size(); i++) result.index_[result.buffers[i].name] = i;
  return result;
}

}  // namespace llmc
