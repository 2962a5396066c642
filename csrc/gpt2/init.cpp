// Descriptor initialisation.
#include <algorithm>
#include <cmath>

#include "gpt2/model.h"

namespace llmc {

void GPT2::init_random(uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<float> fp32;  // a whole tensor
  std::vector<bf16> half;
  // Every rank draws everything, and keeps what it owns.
  const auto upload = [&](const ParameterTensor& tensor) {
    const Tensor own = state("parameters", tensor);
    if (!own) return;
    const int64_t first =
        own.numel() == tensor.numel ? 0 : std::max(shard(tensor.unit).begin - tensor.offset, int64_t(0));
    const float* values = fp32.data() + first;
    if (own.dtype == DType::F32) return ops_->upload(own, values);
    half.resize(own.numel());
    for (size_t i = 0; i < half.size(); i++) store(&half[i], values[i]);
    ops_->upload(own, half.data());
  };
  const auto fill_constant = [&](ParameterKind kind, int64_t layer, float value) {
    const ParameterTensor& tensor = layout_.tensor(kind, layer);
    fp32.assign(tensor.numel, value);
    upload(tensor);
  };
  // The first `drawn` values are random, the rest (padding rows of wte) zero.
  const auto fill_normal = [&](ParameterKind kind, int64_t layer, int64_t drawn, float std) {
    const ParameterTensor& tensor = layout_.tensor(kind, layer);
    fp32.assign(tensor.numel, 0);
    normal_fill(generator, fp32.data(), drawn, 0, std);
    upload(tensor);
  };
  constexpr float kStd = 0.02f;
  const float residual_std = kStd / std::sqrt(2.0f * float(config_.num_layers));

  const OnDevice on_device(*ops_);
  reset_optimizer();
  forget_gathered();
  logits_allowed_ = false;
  ops_->fill_zero(buffer("parameters"));
  fill_normal(kWte, 0, config_.vocab_size * config_.channels, kStd);
  fill_normal(kWpe, 0, config_.max_seq_len * config_.channels, kStd);
  for (int64_t l = 0; l < config_.num_layers; l++) {
    fill_constant(kLn1w, l, 1);
    fill_constant(kLn2w, l, 1);
    for (const ParameterKind kind : {kQkvw, kAttprojw, kFcw, kFcprojw}) {
      const bool residual = kind == kAttprojw || kind == kFcprojw;
      fill_normal(kind, l, layout_.tensor(kind, l).numel, residual ? residual_std : kStd);
    }
  }
  fill_constant(kLnfw, 0, 1);
}

}  // namespace llmc
