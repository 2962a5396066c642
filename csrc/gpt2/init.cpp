// Descriptor initialisation.
#include <cmath>

#include "gpt2/model.h"

namespace llmc {

void GPT2::init_random(uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<float> fp32;
  std::vector<bf16> half;
  const auto upload = [&](Tensor tensor) {
    if (tensor.dtype == DType::F32) return ops_->upload(tensor, fp32.data());
    half.resize(fp32.size());
    for (size_t i = 0; i < fp32.size(); i++) store(&half[i], fp32[i]);
    ops_->upload(tensor, half.data());
  };
  const auto fill_constant = [&](Tensor tensor, float value) {
    fp32.assign(tensor.numel(), value);
    upload(tensor);
  };
  // The first `drawn` values are random, the rest (padding rows of wte) zero.
  const auto fill_normal = [&](Tensor tensor, int64_t drawn, float std) {
    fp32.assign(tensor.numel(), 0);
    normal_fill(generator, fp32.data(), drawn, 0, std);
    upload(tensor);
  };
  constexpr float kStd = 0.02f;
  const float residual_std = kStd / std::sqrt(2.0f * float(config_.num_layers));

  const OnDevice on_device(*ops_);
  reset_optimizer();
  logits_allowed_ = false;
  ops_->fill_zero(buffer("parameters"));
  const Tensor wte = parameter(kWte), wpe = parameter(kWpe);
  fill_normal(wte, config_.vocab_size * config_.channels, kStd);
  fill_normal(wpe, wpe.numel(), kStd);
  for (int64_t l = 0; l < config_.num_layers; l++) {
    fill_constant(parameter(kLn1w, l), 1);
    fill_constant(parameter(kLn2w, l), 1);
    for (const ParameterKind kind : {kQkvw, kAttprojw, kFcw, kFcprojw}) {
      const Tensor weight = parameter(kind, l);
      fill_normal(weight, weight.numel(), kind == kAttprojw || kind == kFcprojw ? residual_std : kStd);
    }
  }
  fill_constant(parameter(kLnfw), 1);
}

}  // namespace llmc
