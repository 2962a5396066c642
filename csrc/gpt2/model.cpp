#include "gpt2/model.h"

#include <algorithm>
#include <cinttypes>

#include "core/check.h"
#include "core/token_order.h"

namespace llmc {

GPT2::GPT2(const GPT2Config& config, const Options& options, std::unique_ptr<Ops> ops,
           std::shared_ptr<Communicator> comm)
    : config_(config),
      options_(options.on_ranks(comm->size())),
      ops_(std::move(ops)),
      comm_(std::move(comm)),
      plan_(llmc::plan(config, options, comm_->size())),
      layout_(config, comm_->size()) {
  const OnDevice on_device(*ops_);
  comm_->attach(ops_->stream());
  allocate(Lifetime::Parameters);
  allocate(Lifetime::Activations);
  if (options.device.cuda) ops_->use_workspace(buffer("workspace"));
}

GPT2::~GPT2() {
  try {
    finish_collectives();  // they use our memory
  } catch (const Error&) {
    // They have failed, and the call that waited for them has said so.
  }
}

void GPT2::allocate(Lifetime lifetime) {
  auto& memory = memory_[int(lifetime)];
  if (memory) return;
  const size_t bytes = plan_.bytes[int(lifetime)];
  const bool host = lifetime == Lifetime::Host;
  memory = {host ? ops_->allocate_host(bytes) : ops_->allocate(bytes), FreeMemory{ops_.get(), host}};
}

// --- views -------------------------------------------------------------------------------------------------------------

Tensor GPT2::view(const Buffer& buffer) {
  char* memory = static_cast<char*>(memory_[int(buffer.lifetime)].get());
  LLMC_CHECK(memory != nullptr, "%s is not allocated yet, it exists after %s", buffer.name.c_str(),
             buffer.lifetime == Lifetime::Gradients ? "the first backward" : "start_optimizer or the first update");
  Tensor tensor{memory + buffer.offset, buffer.dtype, int(buffer.shape.size()), {1, 1, 1, 1}};
  for (int i = 0; i < tensor.ndim; i++) tensor.shape[i] = buffer.shape[i];
  return tensor;
}

Tensor GPT2::rows(const Buffer& buffer) {
  const Tensor whole = view(buffer);
  return whole.ndim == 3 ? slice_rows(whole, first_, batch_ * seq_) : slice_elements(whole, first_, batch_ * seq_);
}

Tensor GPT2::block_rows(int64_t layer, const char* name) { return rows(plan_.block_buffer(layer, name)); }

Tensor GPT2::block_lse(int64_t layer) {
  const Tensor whole = view(plan_.block_buffer(layer, "lse"));
  return make_tensor(whole.data, whole.dtype, batch_, config_.num_heads, seq_);
}

// In E4M3 for batches in FP8. A model with FP8 that has another batch keeps nothing of it.
Tensor GPT2::normalised(int64_t l, const char* name) {
  if (options_.fp8 && !in_fp8()) return rows("lnf");
  Tensor result = block_rows(l, name);
  if (options_.fp8) result.dtype = DType::E4M3;  // also where it shares lnf's memory
  return result;
}

Tensor GPT2::shaped(Tensor rows) const {
  return make_tensor(rows.data, rows.dtype, batch_, seq_ - first_, rows.last());
}

Tensor GPT2::block_sequence(int64_t layer, const char* name) {
  const Tensor whole = view(plan_.block_buffer(layer, name));
  return make_tensor(whole.data, whole.dtype, batch_, seq_, whole.last());
}

// --- forward -----------------------------------------------------------------------------------------------------------

void GPT2::check_ids(const char* name, const int32_t* ids, int64_t b, int64_t t) const {
  for (int64_t i = 0; i < b * t; i++) {
    LLMC_CHECK(ids[i] >= 0 && ids[i] < config_.vocab_size,
               "id %d at row %" PRId64 ", position %" PRId64 " of %s is outside the vocabulary [0, %" PRId64 ")",
               ids[i], i / t, i % t, name, config_.vocab_size);
  }
}

void GPT2::forward(const int32_t* tokens, int64_t b, int64_t t) {
  LLMC_CHECK(b >= 1 && b <= options_.batch_size && t >= 1 && t <= options_.seq_len,
             "a batch of %" PRId64 " x %" PRId64 " tokens does not fit the model's %" PRId64 " x %" PRId64, b, t,
             options_.batch_size, options_.seq_len);
  backward_allowed_ = logits_allowed_ = false;
  check_ids("tokens", tokens, b, t);
  batch_ = b;
  first_ = 0;
  seq_ = t;
  run_forward(tokens);
  backward_allowed_ = true;
}

void GPT2::extend(const int32_t* tokens, int64_t n) {
  LLMC_CHECK(logits_allowed_, "extend needs a forward of its own first");
  LLMC_CHECK(batch_ == 1, "extend needs a forward of one row, the last one had %" PRId64, batch_);
  LLMC_CHECK(n >= 1 && seq_ + n <= options_.seq_len,
             "%" PRId64 " tokens after %" PRId64 " do not fit the model's %" PRId64, n, seq_, options_.seq_len);
  check_ids("tokens", tokens, 1, n);
  backward_allowed_ = logits_allowed_ = false;
  if (options_.recompute < 3) {
    first_ = seq_;
    seq_ += n;
    run_forward(tokens);
  } else {  // the blocks share one qkv, so no keys and values are there
    std::vector<int32_t> all = host_tokens_;
    all.insert(all.end(), tokens, tokens + n);
    seq_ += n;
    run_forward(all.data());
  }
}

// Collectives stay between the pieces that are repeated: their time-outs and errors need the host.
void GPT2::repeat(const std::string& name, Arguments arguments, const std::function<void()>& work) {
  const bool whole = batch_ == options_.batch_size && first_ == 0 && seq_ == options_.seq_len;
  if (options_.cuda_graphs && whole) {
    // Before FP8 has its scales, more is done.
    ops_->repeat(options_.fp8 && !fp8_scaled_ ? name + ", first scales" : name, arguments, work);
  } else {
    work();
  }
}

// The positions [first_, seq_).
void GPT2::run_forward(const int32_t* tokens) {
  const OnDevice on_device(*ops_);
  const Range range(*ops_, "forward");
  // The host is never more than two micro-steps ahead, so that it waits for a missing rank here and nowhere without a
  // time-out.
  comm_->finish(before_last_forward_);
  before_last_forward_ = last_ticket_;
  forget_gathered();
  const Tensor ids = rows("tokens");
  host_tokens_.assign(tokens, tokens + ids.numel());
  ops_->upload(ids, tokens);

  const auto pass = [&] {
    gather(0);
    gather(1);
    const Tensor encoded = rows("encoded");
    use(0);
    ops_->embedding_forward(shaped(encoded), make_tensor(ids.data, ids.dtype, batch_, seq_ - first_), parameter(kWte),
                            slice_rows(parameter(kWpe), first_, config_.max_seq_len));
    use(1);
    if (options_.fp8) ops_->fill_zero(buffer("fp8_forward_amax"));
    layernorm_forward(kLn1w, 0, encoded);
    for (int64_t l = 0; l < config_.num_layers; l++) forward_block(l);
  };
  if (sharded("parameters")) {
    pass();
  } else {
    repeat("forward", Arguments::Same, pass);
  }
  logits_allowed_ = true;
}

// From ln1 of this block to the layernorm behind it: ln1 of the next block, or lnf.
void GPT2::forward_block(int64_t l) {
  const Range range(*ops_, "block");
  const size_t next = l + 2;  // the unit of the next block, or the last one
  gather(next);
  const Tensor projected = rows("scratch_btc");
  repeat("forward of block " + std::to_string(l), Arguments::Same, [&] {
    forward_attention(l);
    forward_attention_projection(l);
    forward_fc(l);
    product_forward(kFcprojw, l, projected, activated(l));
  });

  const Tensor residual2 = block_rows(l, "residual2"), residual3 = block_rows(l, "residual3");
  use(next);
  if (l + 1 < config_.num_layers) {
    layernorm_forward(kLn1w, l + 1, residual3, residual2, projected);
  } else {
    ops_->residual_layernorm_forward(residual3, rows("lnf"), rows("lnf_mean"), rows("lnf_rstd"), residual2, projected,
                                     parameter(kLnfw), parameter(kLnfb));
  }
}

// The backward pass computes again with these what the level of recomputation says, so that it gets the same bits.

void GPT2::forward_attention(int64_t l) {
  product_forward(kQkvw, l, block_rows(l, "qkv"), normalised(l, "ln1"));
  ops_->attention_forward(block_sequence(l, "atty"), block_lse(l), block_sequence(l, "qkv"), config_.num_heads, first_);
}

void GPT2::forward_attention_projection(int64_t l) {
  const Tensor projected = rows("scratch_btc");
  product_forward(kAttprojw, l, projected, block_rows(l, "atty"));
  layernorm_forward(kLn2w, l, block_rows(l, "residual2"), block_input(l), projected);
}

void GPT2::forward_fc(int64_t l) {
  const Tensor fch = block_rows(l, "fch"), ln2 = normalised(l, "ln2");
  if (options_.gelu_fusion >= 1) {
    product_forward(kFcw, l, activated(l), ln2, fch);
  } else {
    product_forward(kFcw, l, fch, ln2);
    if (!in_fp8()) ops_->gelu_forward(activated(l), fch);
  }
}

// What the last product of a block takes: the output of the GELU, or in FP8, where it is computed on the way, its input.
Tensor GPT2::activated(int64_t l) {
  if (!options_.fp8) return block_rows(l, "fch_gelu");
  return in_fp8() ? block_rows(l, "fch") : rows("scratch_bt4c");
}

// --- loss head ---------------------------------------------------------------------------------------------------------

void GPT2::evaluate(const int32_t* tokens, const int32_t* targets, int64_t b, int64_t t, float* losses) {
  check_ids("targets", targets, b, t);
  const OnDevice on_device(*ops_);
  const Range range(*ops_, "evaluate");
  forward(tokens, b, t);
  backward_allowed_ = false;
  ops_->upload(rows("targets"), targets);
  const Tensor device_losses = rows("eval_losses");
  ops_->fill_zero(device_losses);
  loss_head(device_losses, 0, false);
  finish_collectives();
  ops_->download(losses, device_losses);
}

void GPT2::check_logits(int64_t begin, int64_t end) const {
  LLMC_CHECK(begin >= 0 && begin < end && end <= batch_ * seq_,
             "logits of rows [%" PRId64 ", %" PRId64 "): the last forward had %" PRId64 " rows", begin, end,
             batch_ * seq_);
  LLMC_CHECK(logits_allowed_, "logits need a forward of their own first");
}

void GPT2::logits(int64_t begin, int64_t end, float* out) {
  check_logits(begin, end);
  const OnDevice on_device(*ops_);
  // The chunk shares its memory with scratch only, so a backward may still follow.
  const Tensor lnf = buffer("lnf"), chunk = buffer("logits");
  const int64_t V = config_.vocab_size, Vp = config_.padded_vocab_size, chunk_rows = chunk.shape[0];
  std::vector<char> host;
  for (int64_t first = begin; first < end; first += chunk_rows) {
    const int64_t n = std::min(chunk_rows, end - first);
    const Tensor logits = slice_rows(chunk, 0, n);
    ops_->matmul_forward(logits, slice_rows(lnf, first, first + n), parameter(kWte), Tensor{});
    host.resize(logits.bytes());
    finish_collectives();
    ops_->download(host.data(), logits);
    for (int64_t row = 0; row < n; row++) {
      for (int64_t v = 0; v < V; v++) {
        const int64_t i = row * Vp + v;
        *out++ = logits.dtype == DType::F32 ? reinterpret_cast<const float*>(host.data())[i]
                                            : to_float(reinterpret_cast<const bf16*>(host.data())[i]);
      }
    }
  }
}

// --- backward ----------------------------------------------------------------------------------------------------------

void GPT2::backward(const int32_t* targets, int64_t b, int64_t t, int64_t micro_step, int64_t accumulation_steps) {
  LLMC_CHECK(backward_allowed_, "backward needs a forward of its own first");
  LLMC_CHECK(b == batch_ && t == seq_,
             "targets (%" PRId64 ",%" PRId64 ") must have the shape of the last forward's tokens (%" PRId64 ",%" PRId64
             ")",
             b, t, batch_, seq_);
  LLMC_CHECK(accumulation_steps >= 1 && micro_step >= 0 && micro_step < accumulation_steps,
             "micro_step is %" PRId64 " of %" PRId64 " accumulation steps", micro_step, accumulation_steps);
  const int64_t N = b * t;
  LLMC_CHECK(!options_.fp8 || in_fp8(), "fp8 needs a batch of a multiple of 16 tokens, not of %" PRId64, N);
  if (micro_step > 0) {
    LLMC_CHECK(micro_step == micro_steps_done_, "micro_step is %" PRId64 ", the next of this step is %" PRId64,
               micro_step, micro_steps_done_);
    LLMC_CHECK(accumulation_steps == accumulation_steps_,
               "accumulation_steps is %" PRId64 ", this step began with %" PRId64, accumulation_steps,
               accumulation_steps_);
    LLMC_CHECK(N == loss_rows_, "a batch of %" PRId64 " tokens in a step of batches of %" PRId64, N, loss_rows_);
  }
  check_ids("targets", targets, b, t);
  const OnDevice on_device(*ops_);
  const Range range(*ops_, "backward");
  ops_->upload(rows("targets"), targets);
  allocate(Lifetime::Gradients);
  backward_allowed_ = gradients_complete_ = sum_of_squares_ready_ = false;
  if (options_.recompute >= 2) logits_allowed_ = false;  // lnf will hold recomputed layernorms
  token_order_.resize(N);
  sort_by_token(token_order_.data(), host_tokens_.data(), N);
  const Tensor order = rows("token_order"), ids = rows("tokens");
  ops_->upload(order, token_order_.data());
  const Tensor losses = rows("losses"), loss_sum = buffer("loss_sum");
  if (micro_step == 0) {
    for (WorkingUnit& there : reduced_) collect_gradients(there);  // of a step that was given up
    if (sharded("gradients")) ops_->fill_zero(buffer("gradients"));
    accumulation_steps_ = accumulation_steps;
    loss_rows_ = N;
  }

  // From stage 2 on the gradients of each micro-step have working memory of their own.
  accumulate_ = micro_step > 0 && !sharded("gradients");
  const Tensor dresidual = rows("dresidual"), scratch = rows("scratch_btc");
  const int64_t L = config_.num_layers;
  const bool last = micro_step == accumulation_steps - 1;
  const size_t last_unit = layout_.units.size() - 1;
  const std::string which = std::string(micro_step == 0 ? ", first" : "") + (last ? ", last" : "") + " of " +
                            std::to_string(accumulation_steps);
  const auto pass = [&] {
    open_gradients(0);  // (the parameters of the first and the last unit are still there)
    open_gradients(last_unit);
    repeat("loss head" + which, Arguments::Same, [&] {
      if (micro_step == 0) ops_->fill_zero(losses);
      if (options_.fp8) {
        const Tensor amax = buffer("fp8_amax"), forward = buffer("fp8_forward_amax");
        if (micro_step == 0) ops_->fill_zero(amax);
        ops_->raise_amax(slice_elements(amax, 0, forward.numel()), forward);
      }
      loss_head(losses, 1.0f / (float(N) * float(accumulation_steps)), true);
      if (last) ops_->sum(slice_elements(loss_sum, 0, 1), losses);
      ops_->fill_zero(dresidual);
      ops_->layernorm_backward(dresidual, gradient(kLnfw), gradient(kLnfb), scratch, block_rows(L - 1, "residual3"),
                               parameter(kLnfw), rows("lnf_mean"), rows("lnf_rstd"), accumulate_);
    });
    reduce_gradients(last_unit, last);
    for (int64_t l = L - 1; l >= 0; l--) {
      const size_t unit = 1 + l;
      use(unit);
      if (l > 0) gather(unit - 1);
      open_gradients(unit);
      repeat("backward of block " + std::to_string(l) + which, Arguments::Same, [&] { backward_block(l); });
      reduce_gradients(unit, last);
    }
  };
  if (comm_->size() > 1 && (last || sharded("gradients"))) {
    pass();
  } else {
    repeat("backward" + which, Arguments::Same, pass);
  }
  // Each rank rounds its own gradients: noise that differs averages out.
  const uint32_t seed = rng_.next() + uint32_t(comm_->rank()) * 0x9E3779B9u;
  repeat("embedding" + which, Arguments::New, [&] {  // another seed
    if (!accumulate_) ops_->fill_zero(gradient(kWpe));
    ops_->embedding_backward(gradient(kWte), gradient(kWpe), shaped(dresidual),
                             make_tensor(ids.data, ids.dtype, batch_, seq_), order, seed);
  });
  reduce_gradients(0, last);
  if (last) {
    if (comm_->size() > 1) ops_->upload(slice_elements(loss_sum, 1, 1 + kNumVotes), votes_.data());
    last_ticket_ = comm_->all_reduce_average(loss_sum, "loss");
    for (WorkingUnit& there : reduced_) collect_gradients(there);
    wait_for_ranks();
  }
  micro_steps_done_ = micro_step + 1;
  gradients_complete_ = last;
}

// dresidual holds the gradient of residual3 on entry and that of the block's input on return.
void GPT2::backward_block(int64_t l) {
  const Range range(*ops_, "backward of a block");
  const int r = options_.recompute;
  const Tensor ln1 = normalised(l, "ln1"), ln2 = normalised(l, "ln2");
  const Tensor residual = block_input(l), residual2 = block_rows(l, "residual2");
  const Tensor qkv = block_rows(l, "qkv"), atty = block_rows(l, "atty"), fch = block_rows(l, "fch");
  const Tensor dresidual = rows("dresidual"), dbtc = rows("scratch_btc"), dfch = rows("scratch_bt4c");
  // What was not kept: ln1 and ln2 share their memory.
  if (r >= 4) {
    layernorm_forward(kLn1w, l, residual);
    forward_attention(l);
  }
  if (r >= 3) forward_attention_projection(l);
  if (r >= 4) {
    forward_fc(l);
  } else if (r >= 1 && !in_fp8()) {
    ops_->gelu_forward(activated(l), fch);
  }

  // MLP
  const bool fused = options_.gelu_fusion >= 2;
  product_backward(kFcprojw, l, dfch, dresidual, activated(l), fused ? fch : Tensor{});
  if (!fused && !in_fp8()) ops_->gelu_backward(dfch, fch);
  if (r == 2) layernorm_forward(kLn2w, l, residual2);
  if (in_fp8()) {
    fp8_backward(kFcw, l, dbtc, dfch, ln2, fch);
  } else {
    product_backward(kFcw, l, dbtc, dfch, ln2);
  }
  ops_->layernorm_backward(dresidual, gradient(kLn2w, l), gradient(kLn2b, l), dbtc, residual2, parameter(kLn2w, l),
                           block_rows(l, "ln2_mean"), block_rows(l, "ln2_rstd"), accumulate_);

  // Attention
  product_backward(kAttprojw, l, dbtc, dresidual, atty);
  if (r >= 2) layernorm_forward(kLn1w, l, residual);
  if (r == 3) product_forward(kQkvw, l, qkv, ln1);
  const Tensor dqkv = make_tensor(dfch.data, dfch.dtype, batch_ * seq_, 3 * config_.channels);
  ops_->attention_backward(shaped(dqkv), shaped(dbtc), shaped(atty), block_lse(l), shaped(qkv), config_.num_heads);
  product_backward(kQkvw, l, dbtc, dqkv, ln1);
  ops_->layernorm_backward(dresidual, gradient(kLn1w, l), gradient(kLn1b, l), dbtc, residual, parameter(kLn1w, l),
                           block_rows(l, "ln1_mean"), block_rows(l, "ln1_rstd"), accumulate_);
}

}  // namespace llmc
