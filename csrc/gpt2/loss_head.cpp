// The loss head: logits, losses and their gradients, in the precision of the activations or with its products in FP8.
#include <algorithm>

#include "gpt2/model.h"

namespace llmc {

void GPT2::loss_head(Tensor losses, float dloss, bool gradients) {
  const Range range(*ops_, "loss head");
  const Tensor lnf = rows("lnf"), dlnf = rows("scratch_btc"), targets = rows("targets"), memory = buffer("logits");
  const int64_t N = batch_ * seq_, chunk_rows = memory.shape[0];
  const bool sum_apart = gradients && options_.grad_dtype != DType::F32 && chunk_rows < N;
  LossChunk chunk{};
  chunk.dloss = dloss;
  // The plan has dwte_sum whenever the largest batch needs several chunks.
  if (gradients) chunk.dwte = sum_apart ? buffer("dwte_sum") : gradient(kWte);
  const bool fp8 = options_.fp8 >= 2 && in_fp8();
  Fp8Both wte{};
  if (fp8) wte = fp8_head_operand(kFp8Weight, parameter(kWte), buffer("fp8_head").as<char>(), gradients);
  for (int64_t begin = 0; begin < N; begin += chunk_rows) {
    const int64_t end = std::min(begin + chunk_rows, N);
    chunk.x = slice_rows(lnf, begin, end);
    chunk.logits = slice_rows(memory, 0, end - begin);
    chunk.losses = slice_elements(losses, begin, end);
    chunk.targets = slice_elements(targets, begin, end);
    if (gradients) chunk.dx = slice_rows(dlnf, begin, end);
    chunk.accumulate = begin > 0 || (accumulate_ && !sum_apart);
    if (fp8) {
      fp8_loss_chunk(chunk, wte);
    } else {
      loss_chunk(chunk);
    }
  }
  if (!sum_apart) return;
  if (accumulate_) {
    ops_->accumulate(gradient(kWte), chunk.dwte);
  } else {
    ops_->cast(gradient(kWte), chunk.dwte);
  }
}

void GPT2::loss_chunk(const LossChunk& chunk) {
  const Tensor wte = parameter(kWte);
  ops_->matmul_forward(chunk.logits, chunk.x, wte, Tensor{});
  ops_->fused_classifier(chunk.logits, chunk.losses, chunk.targets, config_.vocab_size, chunk.dloss, bool(chunk.dwte));
  if (!chunk.dwte) return;
  ops_->matmul_backward_input(chunk.dx, chunk.logits, wte);
  ops_->matmul_backward_weight(chunk.dwte, chunk.logits, chunk.x, chunk.accumulate);
}

// --- FP8 ---------------------------------------------------------------------------------------------------------------

GPT2::Fp8Both GPT2::fp8_head_operand(Fp8Role role, Tensor x, char* memory, bool gradients) {
  const Tensor scale = fp8_scale(role, kWte, 0), unscale = slice_elements(scale, 1, 2);
  const Tensor values = make_tensor(memory, DType::E4M3, x.rows(), x.last());
  const Tensor transposed = make_tensor(memory + x.numel(), DType::E4M3, x.last(), x.rows());
  const Fp8Out out = gradients ? Fp8Out{values, transposed, fp8_amax("fp8_amax", role, kWte, 0), scale}
                               : Fp8Out{values, Tensor{}, Tensor{}, scale};
  convert(out, [&](const Fp8Out& to) { ops_->quantize(to, x); });
  return {{values, unscale}, {transposed, unscale}};
}

// The operands lie behind wte; the transpose of the logits' gradient takes the place of the logits.
void GPT2::fp8_loss_chunk(const LossChunk& chunk, const Fp8Both& wte) {
  char* memory = wte.as_is.values.as<char>() + 2 * wte.as_is.values.numel();
  const Fp8Both x = fp8_head_operand(kFp8Input, chunk.x, memory, bool(chunk.dwte));
  ops_->fp8_matmul_forward(chunk.logits, x.as_is, wte.as_is, Tensor{});
  if (!chunk.dwte) {
    ops_->fused_classifier(chunk.logits, chunk.losses, chunk.targets, config_.vocab_size, chunk.dloss, false);
    return;
  }
  const int64_t n = chunk.logits.rows(), Vp = config_.padded_vocab_size;
  const Tensor unscale = buffer("dlogits_unscale");
  const Fp8Matrix dlogits{make_tensor(memory + 2 * chunk.x.numel(), DType::E5M2, n, Vp), unscale};
  const Fp8Matrix transposed{make_tensor(chunk.logits.data, DType::E5M2, Vp, n), unscale};
  ops_->fp8_classifier(dlogits, chunk.losses, chunk.logits, chunk.targets, config_.vocab_size, chunk.dloss);
  ops_->fp8_transpose(transposed.values, dlogits.values);
  ops_->fp8_matmul_backward(chunk.dx, dlogits, wte.transposed, false);
  ops_->fp8_matmul_backward(chunk.dwte, transposed, x.transposed, chunk.accumulate);
}

}  // namespace llmc
