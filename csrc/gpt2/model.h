// GPT-2: the training step, written once against Ops (what a device can do) and Communicator (what ranks do together).
//
// Mathematics: pre-layernorm GPT-2 (Radford et al. 2019) without dropout, lm-head tied to wte, AdamW, clip at a global norm.
// One step is: forward, backward for each micro-batch; then update. Nothing here knows which device it runs on.
//
// With several ranks, each works on its own micro-batches, and gradients, losses and norms are those of all of them. All
// ranks make the same calls in the same order; which of them wait for the other ranks is said below. Model, optimizer state
// and gradients are the same on all ranks or, by the ZeRO stage (Rajbhandari et al. 2020), cut into shards.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "core/random.h"
#include "core/tensor.h"
#include "gpt2/config.h"
#include "gpt2/fp8.h"
#include "gpt2/layout.h"
#include "gpt2/plan.h"
#include "ops/ops.h"

namespace llmc {

struct UpdateOptions {
  float learning_rate;
  float weight_decay = 0;  // of the matrices; vectors do not decay
  int64_t step;            // 1-based, of Adam's bias correction
  float beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f;
  float grad_clip = 1.0f;  // largest global norm

  // Throws Error that names the value unless an update with these options makes sense.
  void validate() const;
};

class GPT2 {
 public:
  GPT2(const GPT2Config& config, const Options& options, std::unique_ptr<Ops> ops, std::shared_ptr<Communicator> comm);
  ~GPT2();
  GPT2(const GPT2&) = delete;
  GPT2& operator=(const GPT2&) = delete;

  const GPT2Config& config() const { return config_; }
  const Options& options() const { return options_; }
  const Plan& plan() const { return plan_; }
  const ParameterLayout& layout() const { return layout_; }
  int rank() const { return comm_->rank(); }
  int world_size() const { return comm_->size(); }
  Ops& ops() { return *ops_; }

  // Bytes of the device's memory that the model holds now: the plan's, of the lifetimes that were needed so far.
  size_t allocated_bytes() const { return ops_->allocated_bytes(); }

  // Random parameters, the same on every rank: layernorm weights 1, biases 0, weights normal with σ = 0.02 (residual
  // projections 0.02/√(2L)), drawn like torch's from mt19937 in the order wte, wpe, blocks. Padding rows of wte stay 0.
  // Forgets the optimizer state.
  void init_random(uint32_t seed);

  // Forgets m, v and master weights, and the scales of FP8, as needed when parameters are written from outside after an
  // update: the next update starts from zero moments and takes the master weights from the parameters.
  void reset_optimizer() {
    memory_[int(Lifetime::Optimizer)].reset();
    memory_[int(Lifetime::Host)].reset();
    fp8_scaled_ = false;
  }

  // Runs the model up to the last layernorm. tokens (b,t) with b <= B, t <= T, on the host; ids outside [0, V) throw.
  // At stage 3 all ranks take part: here, and so in evaluate.
  void forward(const int32_t* tokens, int64_t b, int64_t t);

  // Runs the model on n tokens behind those of the last forward or extend, which must have had one row: what attention
  // needs of the positions before is still there, so it costs as much as n positions; from recompute 3 on it is not, and
  // all positions are computed again. No backward may follow.
  void extend(const int32_t* tokens, int64_t n);

  // Loss and gradients of the last forward against targets (b,t), which must be that forward's shape. The first of the
  // accumulation_steps micro-steps (micro_step 0) starts losses and gradients anew, the last one averages gradients and
  // loss over the ranks. The loss is the mean over all micro-steps of the step.
  void backward(const int32_t* targets, int64_t b, int64_t t, int64_t micro_step, int64_t accumulation_steps);

  // Per-token losses (b,t) of tokens against targets, to the host. Leaves gradients and the training loss alone.
  void evaluate(const int32_t* tokens, const int32_t* targets, int64_t b, int64_t t, float* losses);

  // Rows [begin, end) of the last forward's logits, columns [0, V), as fp32 (end - begin, V) to the host; rows of extend
  // follow those of the forward. Their product is never in FP8. Not after an update, nor from recompute 2 on after a backward: what they are computed from is gone.
  void logits(int64_t begin, int64_t end, float* out);

  // Throws what logits(begin, end, out) would throw, for callers that have yet to allocate out.
  void check_logits(int64_t begin, int64_t end) const;

  // Allocates the optimizer state if it is not there: m = v = 0, master = the parameters. The first update does it too.
  void start_optimizer();

  // One optimizer step with the gradients of the last backward, by all ranks. If the loss or the gradient norm is not
  // finite, parameters and optimizer state stay as they are: decided on the device, where the host does not wait.
  void update(const UpdateOptions& options);

  // Parameters = master weights, rounded as the last update rounded them, so that a checkpoint need not keep both. Throws
  // without master weights.
  void restore_parameters();

  // Mean loss and global gradient norm (before clipping) of the last complete backward. They wait for the device. The
  // update clips by this norm: gradients changed from outside after grad_norm() are not seen by it.
  float loss();
  float grad_norm();

  // As Ops has them, for the products of the model. With timing, what the next forward and backward compute is of no use.
  void choose_algorithms(const Algorithms& known, bool timing) { ops_->choose_algorithms(known, timing); }
  // Waits for the collectives: ranks that tell each other what they have chosen must not wait for each other there, too.
  Algorithms algorithms() {
    finish_collectives();
    return ops_->algorithms();
  }

  // What this rank has to say to all of them, until it says otherwise; 0 at first. A complete backward averages it over
  // the ranks together with the loss, so it costs no time; votes() are the averages of the last one, the same bits on all
  // ranks, and wait for the device.
  using Votes = std::array<float, kNumVotes>;
  void vote(const Votes& votes) { votes_ = votes; }
  Votes votes();

  // Whether all parameters that the last update wrote, on any rank, are finite. Waits for the device.
  bool parameters_finite();

  // State of the random stream that seeds stochastic rounding: one draw per micro-step, 16 per update.
  uint64_t rng_state() const { return rng_.state; }
  void set_rng_state(uint64_t state) { rng_.state = state; }

  // rng_state() just before the last update, whose rounding restore_parameters() repeats.
  uint64_t last_update_rng_state() const { return last_update_rng_.state; }
  void set_last_update_rng_state(uint64_t state) { last_update_rng_.state = state; }

  // With options.fp8: the largest absolute values of fp8_tensors() tensors in each of the last updates, oldest first, in
  // batches of this rank; empty before the first update, when every tensor is scaled by its own largest value. All that a
  // run needs to go on with the same scales.
  std::vector<float> fp8_history();
  void set_fp8_history(const std::vector<float>& values);

  // Views for looking inside; they stay valid as long as the model. name: "parameters", "gradients", "m", "v" or
  // "master". The whole tensor in its shape, or, where the stage cuts that buffer, the part this rank owns, flat; absent
  // if it owns none of it. An offloaded state is in host memory, and up to date after ops().finish_stores().
  Tensor state(const std::string& name, const ParameterTensor& tensor);
  // Any buffer of the plan by name, at full size (B,T).
  Tensor buffer(const std::string& name) { return view(plan_.buffer(name)); }

  // The whole parameters of a unit, as ParameterLayout has them: until the next call of the model. At stage 3 all ranks
  // take part.
  Tensor gather_parameters(size_t unit);

 private:
  struct Shard {    // this rank's slice of a unit, at stage 0 all of it
    int64_t begin;  // elements from the start of the whole layout
    int64_t end;
    int64_t offset;  // elements from the start of a buffer that holds this rank's slices only
  };

  // Working memory for a unit of which the rank keeps a shard only: the first and the last unit have their own, the blocks
  // take turns in two.
  struct WorkingUnit {
    static constexpr size_t kNone = ~size_t(0);
    size_t unit = kNone;  // what is there, or under way
    Ticket ticket = 0;    // of the collective that brings it, or that takes it away
  };
  using WorkingUnits = std::array<WorkingUnit, 4>;

  // Of the stochastic rounding: one per kind of tensor, the same on every rank, so that a parameter is rounded alike
  // wherever it is updated.
  using Seeds = std::array<uint32_t, kNumParameterKinds>;
  static Seeds draw_seeds(XorShift64& rng);

  // What the step computes with: a whole tensor, of a unit that is in use.
  Tensor parameter(ParameterKind kind, int64_t layer = 0);
  Tensor gradient(ParameterKind kind, int64_t layer = 0);
  // The rows of an activation that the current forward or backward computes, as (b·t, last): all that the batch uses, or
  // those of the tokens that extend added.
  Tensor rows(const std::string& name) { return rows(plan_.buffer(name)); }
  Tensor rows(const Buffer& buffer);
  Tensor block_rows(int64_t layer, const char* name);
  Tensor block_lse(int64_t layer);
  Tensor normalised(int64_t layer, const char* name);  // ln1 or ln2
  Tensor block_input(int64_t layer) { return layer == 0 ? rows("encoded") : block_rows(layer - 1, "residual3"); }
  Tensor shaped(Tensor rows) const;                        // (b·t, C) as (b, t, C)
  Tensor block_sequence(int64_t layer, const char* name);  // (b, t, last) of all positions, those before extend too

  Tensor view(const Buffer& buffer);
  void allocate(Lifetime lifetime);
  void check_ids(const char* name, const int32_t* ids, int64_t b, int64_t t) const;
  // Ops::repeat for work on a whole batch (B,T); other shapes come now and then.
  void repeat(const std::string& name, Arguments arguments, const std::function<void()>& work);
  void run_forward(const int32_t* tokens);
  void forward_block(int64_t layer);
  void forward_attention(int64_t layer);             // from ln1
  void forward_attention_projection(int64_t layer);  // to ln2
  void forward_fc(int64_t layer);                    // to the GELU
  Tensor activated(int64_t layer);
  void backward_block(int64_t layer);
  void check_gradients_complete() const;
  void compute_grad_norm(float grad_clip);
  struct OptimizerState {  // of a part of a unit, on the device
    Tensor m, v, master;   // f32 (n); master may be absent
  };
  using OnState = std::function<void(const Shard& part, const OptimizerState& state)>;
  // Calls `use` with this rank's slice of the unit; piece by piece if the state is in host memory, from which `fetched`
  // ("m", "v", "master") come and to which `stored` go.
  void on_state(size_t unit, const std::vector<std::string>& fetched, const std::vector<std::string>& stored,
                const OnState& use);
  std::vector<std::string> state_names() const;
  // The tensors in the part of the unit, matrices with the weight decay.
  std::vector<AdamWSlice> slices(size_t unit, const Shard& part, const OptimizerState& state, const Seeds& seeds,
                                 float weight_decay, bool with_gradients);

  template <typename Write>
  void write_parameters(const Seeds& seeds, float weight_decay, bool with_gradients, Write write);

  // --- products.cpp ---
  // out = x·weightᵀ + bias; with pre, that is pre, and out its GELU. In FP8 there is no pre: the last product takes the
  // GELU's input as x.
  void product_forward(ParameterKind weight, int64_t layer, Tensor out, Tensor x, Tensor pre = {});
  // From dout (b·t,OC) and the input x (b·t,IC): dx, with pre through the GELU whose input that is, and the gradients of
  // weight (OC,IC) and bias. x and pre as above.
  void product_backward(ParameterKind weight, int64_t layer, Tensor dx, Tensor dout, Tensor x, Tensor pre = {});
  // ln1 or ln2, by its weight, of residual, which with b is computed first: a + b.
  void layernorm_forward(ParameterKind weight, int64_t layer, Tensor residual, Tensor a = {}, Tensor b = {});

  bool in_fp8() const;  // whether the products of the present batch are
  Tensor fp8_scale(Fp8Role role, ParameterKind weight, int64_t layer);
  Tensor fp8_amax(const char* name, Fp8Role role, ParameterKind weight, int64_t layer);
  // Calls work(out), before there are scales after that of the tensor itself is found.
  void convert(const Fp8Out& out, const std::function<void(const Fp8Out&)>& work);
  // In E4M3, as it lies or transposed, in memory of its size unless it is there already. x is the layernorm's output in
  // E4M3, or in bf16 attention's, or what the GELU is computed of.
  Fp8Matrix fp8_input(ParameterKind weight, int64_t layer, Tensor x, void* memory, bool transposed);
  Fp8Matrix fp8_weight(ParameterKind weight, int64_t layer, void* memory, bool transposed);
  // By work, with `kept` the transpose already forward, while x is read anyway: backward it is there then.
  Fp8Matrix fp8_factor(Fp8Role role, ParameterKind weight, int64_t layer, Tensor x, Tensor kept, void* memory,
                       bool transposed, const std::function<void(const Fp8Out&)>& work);
  // product_backward, but with pre dout goes through that GELU before.
  void fp8_backward(ParameterKind weight, int64_t layer, Tensor dx, Tensor dout, Tensor x, Tensor pre);
  void update_fp8_scales();

  // --- loss_head.cpp ---
  // Over chunks of rows: losses, and if gradients are asked for also dlnf (into scratch_btc) and dwte.
  void loss_head(Tensor losses, float dloss, bool gradients);
  struct LossChunk {
    Tensor x, logits, losses, targets;
    Tensor dx, dwte;  // absent without gradients
    float dloss;
    bool accumulate;  // into dwte
  };
  void loss_chunk(const LossChunk& chunk);
  struct Fp8Both {
    Fp8Matrix as_is, transposed;
  };
  void fp8_loss_chunk(const LossChunk& chunk, const Fp8Both& wte);
  // The head's input or weight in E4M3 in memory of twice its size: as it lies, and with gradients transposed. Then its
  // largest value is recorded, too.
  Fp8Both fp8_head_operand(Fp8Role role, Tensor x, char* memory, bool gradients);

  // --- sharding.cpp ---
  bool sharded(const std::string& name) const;  // whether the buffer holds this rank's slices only
  Shard shard(size_t unit) const;
  Tensor own(const std::string& name, size_t unit);  // this rank's slice
  // All of a unit's parameters or gradients: in the buffer itself, or in its working memory.
  Tensor whole(Lifetime lifetime, size_t unit);
  size_t place(size_t unit) const;   // in WorkingUnits
  void gather(size_t unit);          // begins to bring the parameters, unless they are there or under way
  void use(size_t unit);             // and what follows may compute with them
  void forget_gathered();            // the parameters have changed
  void open_gradients(size_t unit);  // makes the place for a unit's gradients
  void reduce_gradients(size_t unit, bool last_micro_step);  // begins to bring the sums over the ranks
  void collect_gradients(WorkingUnit& place);                // what was reduced is added to this rank's shard
  bool shares_updates() const;                               // whether ranks need each other's updated slices
  void share_update(size_t unit);                            // begins to bring them
  void wait_for_ranks() { comm_->wait(last_ticket_); }
  void finish_collectives() { comm_->finish(last_ticket_); }  // on the host, before it waits for the device

  const GPT2Config config_;
  const Options options_;
  std::unique_ptr<Ops> ops_;
  std::shared_ptr<Communicator> comm_;
  const Plan plan_;  // checks config and options
  const ParameterLayout layout_;

  struct FreeMemory {
    Ops* ops;
    bool host;
    void operator()(void* memory) const { host ? ops->free_host(memory) : ops->free(memory); }
  };
  std::array<std::unique_ptr<void, FreeMemory>, kNumLifetimes> memory_;

  WorkingUnits gathered_, reduced_;  // parameters at stage 3, gradients from stage 2 on
  Ticket last_ticket_ = 0;
  Ticket before_last_forward_ = 0;  // the last ticket then

  int offload_slot_ = 0;  // that was used last

  bool fp8_scaled_ = false;  // fp8_scales on the device are those of the history

  XorShift64 rng_{13371337};
  XorShift64 last_update_rng_ = rng_;
  int64_t batch_ = 0, seq_ = 0;        // b, t of the last forward, with what extend added; 0 before the first
  int64_t first_ = 0;                  // the first position that it computed
  int64_t loss_rows_ = 0;              // b·t of the current step's micro-batches
  int64_t micro_steps_done_ = 0;       // of the current step
  int64_t accumulation_steps_ = 0;     // of the current step
  Votes votes_{};                      // of this rank
  bool accumulate_ = false;            // the current backward adds to what is in the gradients
  bool backward_allowed_ = false;      // the activations are those of a forward that had no backward yet
  bool logits_allowed_ = false;        // lnf is that of the last forward, and of the current parameters
  bool gradients_complete_ = false;    // the last micro-step is done: loss, grad_norm and update are allowed
  bool sum_of_squares_ready_ = false;  // grad_sum_of_squares on the device belongs to the current gradients
  std::vector<int32_t> token_order_;   // host staging of the embedding backward
  std::vector<int32_t> host_tokens_;
};

}  // namespace llmc
