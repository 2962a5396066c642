#include "gpt2/config.h"

#include <cinttypes>

#include "core/check.h"

namespace llmc {

int64_t GPT2Config::num_parameters() const {
  const int64_t C = channels;
  return (padded_vocab_size + max_seq_len) * C + num_layers * (12 * C * C + 13 * C) + 2 * C;
}

void GPT2Config::validate() const {
  // The limits keep every size, in bytes too, far from 63 bits.
  constexpr int64_t kMaxIds = 1 << 24, kMaxLayers = 1 << 12, kMaxChannels = 1 << 17;
  const auto check_range = [](const char* what, int64_t value, int64_t limit) {
    LLMC_CHECK(value >= 1 && value <= limit, "%s is %" PRId64 ", it must be between 1 and %" PRId64, what, value,
               limit);
  };
  check_range("max_seq_len", max_seq_len, kMaxIds);
  check_range("vocab_size", vocab_size, kMaxIds);
  check_range("num_layers", num_layers, kMaxLayers);
  check_range("num_heads", num_heads, kMaxChannels);
  check_range("channels", channels, kMaxChannels);
  LLMC_CHECK(padded_vocab_size >= vocab_size && padded_vocab_size <= kMaxIds,
             "padded_vocab_size is %" PRId64 ", it must be between vocab_size (%" PRId64 ") and %" PRId64,
             padded_vocab_size, vocab_size, kMaxIds);
  LLMC_CHECK(channels % num_heads == 0, "channels (%" PRId64 ") must be a multiple of num_heads (%" PRId64 ")",
             channels, num_heads);
  LLMC_CHECK(head_size() % 8 == 0 && head_size() <= 128,
             "channels/num_heads is %" PRId64 ": head sizes must be multiples of 8 up to 128", head_size());
}

Options Options::on_ranks(int world_size) const {
  Options options = *this;
  if (world_size == 1) options.zero_stage = 0;
  return options;
}

void Options::validate(const GPT2Config& config) const {
  LLMC_CHECK(batch_size >= 1, "batch_size is %" PRId64 ", it must be at least 1", batch_size);
  LLMC_CHECK(seq_len >= 1 && seq_len <= config.max_seq_len,
             "seq_len is %" PRId64 ", it must be between 1 and the model's context of %" PRId64, seq_len,
             config.max_seq_len);
  LLMC_CHECK(batch_size <= INT32_MAX / seq_len,
             "batch_size is %" PRId64 ": batch_size times seq_len (%" PRId64 ") must fit in 31 bits", batch_size,
             seq_len);
  LLMC_CHECK(precision == DType::F32 || precision == DType::BF16, "precision must be fp32 or bf16");
  LLMC_CHECK(grad_dtype == DType::F32 || grad_dtype == precision,
             "gradients of an fp32 model must be fp32: grad_dtype is %s", name_of(grad_dtype));
  LLMC_CHECK(recompute >= 0 && recompute <= 4, "recompute is %d, it must be 0 to 4", recompute);
  LLMC_CHECK(gelu_fusion >= 0 && gelu_fusion <= 2, "gelu_fusion is %d, it must be 0, 1 or 2", gelu_fusion);
  LLMC_CHECK(zero_stage >= 0 && zero_stage <= 3, "zero_stage is %d, it must be 0, 1, 2 or 3", zero_stage);
  LLMC_CHECK(!cudnn_attention || (device.cuda && precision == DType::BF16),
             "cudnn_attention needs a GPU and bf16: the precision is %s on %s", name_of(precision),
             name_of(device).c_str());
  LLMC_CHECK(!cudnn_attention || seq_len >= 2, "cudnn_attention: seq_len is 1, cuDNN needs 2 or more");
  LLMC_CHECK(!offload_optimizer || device.cuda, "offload_optimizer needs a GPU: a CPU's memory is the host's");
  LLMC_CHECK(!cuda_graphs || device.cuda, "cuda_graphs needs a GPU: a CPU has no graphs");
  LLMC_CHECK(fp8 >= 0 && fp8 <= 2, "fp8 is %d, it must be 0, 1 or 2", fp8);
  LLMC_CHECK(!fp8 || (device.cuda && precision == DType::BF16), "fp8 needs a GPU and bf16: the precision is %s on %s",
             name_of(precision), name_of(device).c_str());
  LLMC_CHECK(!fp8 || gelu_fusion == 0, "fp8 computes the GELU with the conversion: gelu_fusion is %d, it must be 0",
             gelu_fusion);
  LLMC_CHECK(!fp8 || config.channels % 16 == 0, "fp8 needs channels that are a multiple of 16, not %" PRId64,
             config.channels);
  LLMC_CHECK(fp8 < 2 || config.padded_vocab_size % 16 == 0,
             "fp8 = 2 needs a padded_vocab_size that is a multiple of 16, not %" PRId64, config.padded_vocab_size);
  LLMC_CHECK(offload_piece >= 0, "offload_piece is %" PRId64 ", it must not be negative", offload_piece);
  LLMC_CHECK(classifier_rows >= 0, "classifier_rows is %" PRId64 ", it must not be negative", classifier_rows);
}

}  // namespace llmc
