// The second half of the step: clip, and update the rank's shard unit by unit.
#include <algorithm>
#include <cinttypes>
#include <cmath>

#include "core/check.h"
#include "core/integers.h"
#include "gpt2/model.h"

namespace llmc {

void GPT2::check_gradients_complete() const {
  LLMC_CHECK(gradients_complete_, "the gradient norm needs the last micro-step's backward first");
}

void GPT2::compute_grad_norm(float grad_clip) {
  const Tensor sum = buffer("grad_sum_of_squares");
  if (!sum_of_squares_ready_) {
    std::vector<Tensor> shards;
    for (size_t unit = 0; unit < layout_.units.size(); unit++) shards.push_back(own("gradients", unit));
    ops_->fill_zero(sum);
    ops_->sum_of_squares(sum, shards.data(), int64_t(shards.size()));
    if (options_.zero_stage >= 1) {
      last_ticket_ = comm_->all_reduce_sum(sum, "sum of squares of the gradients");
      wait_for_ranks();
    }
    sum_of_squares_ready_ = true;
  }
  ops_->clip_scale(buffer("grad_norm"), buffer("grad_scale"), sum, slice_elements(buffer("loss_sum"), 0, 1), grad_clip);
}

void UpdateOptions::validate() const {
  LLMC_CHECK(step >= 1, "step is %" PRId64 ", Adam's steps count from 1", step);
  LLMC_CHECK(learning_rate >= 0 && std::isfinite(learning_rate), "learning_rate is %g, it must be 0 or more",
             learning_rate);
  LLMC_CHECK(weight_decay >= 0 && std::isfinite(weight_decay), "weight_decay is %g, it must be 0 or more",
             weight_decay);
  LLMC_CHECK(beta1 >= 0 && beta1 < 1, "beta1 is %g, it must be in [0, 1)", beta1);
  LLMC_CHECK(beta2 >= 0 && beta2 < 1, "beta2 is %g, it must be in [0, 1)", beta2);
  LLMC_CHECK(eps > 0, "eps is %g, it must be positive", eps);
  LLMC_CHECK(grad_clip > 0, "grad_clip is %g, it must be positive", grad_clip);
}

std::vector<std::string> GPT2::state_names() const {
  if (options_.has_master()) return {"m", "v", "master"};
  return {"m", "v"};
}

void GPT2::on_state(size_t unit, const std::vector<std::string>& fetched, const std::vector<std::string>& stored,
                    const OnState& use) {
  const Shard all = shard(unit);
  if (!options_.offload_optimizer) {
    use(all, {own("m", unit), own("v", unit), options_.has_master() ? own("master", unit) : Tensor{}});
    return;
  }
  const int64_t size = buffer("m_ring").shape[1], pieces = divide_up(all.end - all.begin, size);
  // Alike, or the copies of one way would wait for those of the other. A pass over all units stores three pieces at least,
  // so what the next one fetches first was not stored last.
  const int64_t step = std::min(size, round_up(divide_up(all.end - all.begin, pieces), int64_t(128)));
  for (int64_t begin = all.begin; begin < all.end; begin += step) {
    const int slot = offload_slot_ = 1 - offload_slot_;
    const Shard part{begin, std::min(begin + step, all.end), all.offset + begin - all.begin};
    const int64_t n = part.end - part.begin;
    const auto there = [&](const std::string& name) {
      return slice_elements(buffer(name + "_ring"), slot * size, slot * size + n);
    };
    const auto copies = [&](const std::vector<std::string>& names) {
      std::vector<HostCopy> result;
      for (const std::string& name : names) {
        result.push_back({there(name), slice_elements(own(name, unit), begin - all.begin, part.end - all.begin).data});
      }
      return result;
    };
    const std::vector<HostCopy> in = copies(fetched), out = copies(stored);
    ops_->fetch(slot, in.data(), int64_t(in.size()));
    use(part, {there("m"), there("v"), options_.has_master() ? there("master") : Tensor{}});
    ops_->store(slot, out.data(), int64_t(out.size()));
  }
}

void GPT2::start_optimizer() {
  if (memory_[int(Lifetime::Optimizer)]) return;
  const OnDevice on_device(*ops_);
  allocate(Lifetime::Optimizer);  // zeroed, as m and v start
  if (options_.offload_optimizer) {
    allocate(Lifetime::Host);
    for (const int slot : {0, 1}) ops_->store(slot, nullptr, 0);  // fetch waits for the zeros
  }
  for (size_t unit = 0; options_.has_master() && unit < layout_.units.size(); unit++) {
    on_state(unit, {}, {"master"}, [&](const Shard& part, const OptimizerState& state) {
      const int64_t first = part.begin - shard(unit).begin;
      ops_->cast(state.master, slice_elements(own("parameters", unit), first, first + part.end - part.begin));
    });
  }
}

GPT2::Seeds GPT2::draw_seeds(XorShift64& rng) {
  Seeds seeds;
  for (uint32_t& seed : seeds) seed = rng.next();
  return seeds;
}

std::vector<AdamWSlice> GPT2::slices(size_t unit, const Shard& part, const OptimizerState& state, const Seeds& seeds,
                                     float weight_decay, bool with_gradients) {
  std::vector<AdamWSlice> slices;
  for (const ParameterTensor& tensor : layout_.units[unit].tensors) {
    const int64_t begin = std::max(part.begin, tensor.offset), end = std::min(part.end, tensor.offset + tensor.numel);
    if (begin >= end) continue;
    const int64_t own_begin = shard(unit).begin;
    const auto of_own = [&](const char* name) {
      return slice_elements(own(name, unit), begin - own_begin, end - own_begin);
    };
    const auto of_state = [&](const Tensor& x) { return slice_elements(x, begin - part.begin, end - part.begin); };
    AdamWSlice slice;
    slice.param = of_own("parameters");
    if (with_gradients) slice.grad = of_own("gradients");
    slice.m = of_state(state.m);
    slice.v = of_state(state.v);
    if (state.master) slice.master = of_state(state.master);
    slice.weight_decay = tensor.weight_decay ? weight_decay : 0;
    slice.seed = seeds[tensor.kind];
    slice.layer = tensor.layer;
    slice.first = begin - tensor.offset;
    slices.push_back(slice);
  }
  return slices;
}

// Calls write for the slices of all units: together, or, where the other ranks need them, unit by unit, so that the first
// are under way while the last are written; or piece by piece, as they come from host memory.
template <typename Write>
void GPT2::write_parameters(const Seeds& seeds, float weight_decay, bool with_gradients, Write write) {
  const std::vector<std::string> names = state_names();
  const std::vector<std::string> fetched = with_gradients ? names : std::vector<std::string>{"master"};
  const std::vector<std::string> stored = with_gradients ? names : std::vector<std::string>{};
  std::vector<AdamWSlice> together;
  for (size_t unit = 0; unit < layout_.units.size(); unit++) {
    const bool now = options_.offload_optimizer || shares_updates() || unit + 1 == layout_.units.size();
    on_state(unit, fetched, stored, [&](const Shard& part, const OptimizerState& state) {
      const std::vector<AdamWSlice> own = slices(unit, part, state, seeds, weight_decay, with_gradients);
      together.insert(together.end(), own.begin(), own.end());
      if (!now) return;
      write(together.data(), int64_t(together.size()));
      together.clear();
    });
    if (shares_updates()) share_update(unit);
  }
  forget_gathered();
}

void GPT2::update(const UpdateOptions& options) {
  options.validate();
  const OnDevice on_device(*ops_);
  const Range range(*ops_, "update");
  check_gradients_complete();
  backward_allowed_ = logits_allowed_ = false;  // of the old parameters, and in FP8 of the old scales
  start_optimizer();
  last_update_rng_ = rng_;
  const auto seeds = draw_seeds(rng_);
  const Tensor non_finite = buffer("broken_parameters");
  const AdamWStep step{options.learning_rate, options.beta1,        options.beta2, options.eps,
                       options.step,          buffer("grad_scale"), non_finite};
  const auto work = [&] {
    compute_grad_norm(options.grad_clip);
    if (options_.fp8) update_fp8_scales();
    ops_->fill_zero(non_finite);
    write_parameters(seeds, options.weight_decay, true,
                     [&](const AdamWSlice* slices, int64_t count) { ops_->adamw(slices, count, step); });
  };
  if (options_.offload_optimizer || options_.zero_stage >= 1) {  // between the launches something else happens
    work();
  } else {
    repeat("update", Arguments::New, work);
  }
  fp8_scaled_ = options_.fp8 > 0;
  if (options_.zero_stage >= 1) {  // otherwise every rank has written all of them
    last_ticket_ = comm_->all_reduce_sum(non_finite, "count of ranks whose update wrote a number that is not finite");
  }
  wait_for_ranks();
}

bool GPT2::parameters_finite() {
  const OnDevice on_device(*ops_);
  float non_finite;
  finish_collectives();
  ops_->download(&non_finite, buffer("broken_parameters"));
  return non_finite == 0;
}

void GPT2::restore_parameters() {
  LLMC_CHECK(options_.has_master(), "parameters are restored from master weights, and this model has none");
  const OnDevice on_device(*ops_);
  start_optimizer();
  logits_allowed_ = false;
  XorShift64 rng = last_update_rng_;
  const auto seeds = draw_seeds(rng);
  write_parameters(seeds, 0, false,
                   [&](const AdamWSlice* slices, int64_t count) { ops_->round_parameters(slices, count); });
  wait_for_ranks();
}

float GPT2::loss() {
  LLMC_CHECK(gradients_complete_, "the loss of a step needs the last micro-step's backward first");
  float sum;
  const OnDevice on_device(*ops_);
  finish_collectives();
  ops_->download(&sum, slice_elements(buffer("loss_sum"), 0, 1));
  return sum / (float(loss_rows_) * float(accumulation_steps_));
}

GPT2::Votes GPT2::votes() {
  LLMC_CHECK(gradients_complete_, "the votes of a step need the last micro-step's backward first");
  if (comm_->size() == 1) return votes_;
  Votes averages;
  const OnDevice on_device(*ops_);
  finish_collectives();
  ops_->download(averages.data(), slice_elements(buffer("loss_sum"), 1, 1 + kNumVotes));
  return averages;
}

float GPT2::grad_norm() {
  const OnDevice on_device(*ops_);
  check_gradients_complete();
  if (!sum_of_squares_ready_) compute_grad_norm(1);
  float norm;
  finish_collectives();
  ops_->download(&norm, buffer("grad_norm"));
  return norm;
}

}  // namespace llmc
