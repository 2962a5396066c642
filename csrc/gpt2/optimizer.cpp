// The second half of the step: reduce gradients over the ranks, clip, update the rank's shard unit by unit.
#include <algorithm>
#include <cinttypes>
#include <cmath>

#include "core/check.h"
#include "gpt2/model.h"

namespace llmc {

GPT2::Shard GPT2::shard(size_t unit) const {
  const ParameterUnit& u = layout_.units[unit];
  if (options_.zero_stage == 0) return {u.offset, u.offset + u.size, u.offset};
  const int64_t size = u.size / comm_->size(), begin = u.offset + comm_->rank() * size;
  return {begin, begin + size, u.offset / comm_->size()};
}

void GPT2::reduce_unit(const ParameterUnit& unit) {
  const Tensor gradients = slice_elements(buffer("gradients"), unit.offset, unit.offset + unit.size);
  if (options_.zero_stage == 0) {
    comm_->all_reduce_average(gradients);
  } else {
    comm_->reduce_scatter_average(gradients);
  }
}

void GPT2::compute_grad_norm(float grad_clip) {
  LLMC_CHECK(gradients_complete_, "the gradient norm needs the last micro-step's backward first");
  const Tensor sum = buffer("grad_sum_of_squares");
  if (!sum_of_squares_ready_) {
    std::vector<Tensor> shards;
    for (size_t unit = 0; unit < layout_.units.size(); unit++) {
      const Shard own = shard(unit);
      shards.push_back(slice_elements(buffer("gradients"), own.begin, own.end));
    }
    ops_->fill_zero(sum);
    ops_->sum_of_squares(sum, shards.data(), int64_t(shards.size()));
    if (options_.zero_stage >= 1) {
      comm_->all_reduce_sum(sum);
      comm_->wait();
    }
    sum_of_squares_ready_ = true;
  }
  ops_->clip_scale(buffer("grad_norm"), buffer("grad_scale"), sum, grad_clip);
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

void GPT2::start_optimizer() {
  if (memory_[int(Lifetime::Optimizer)]) return;
  const OnDevice on_device(*ops_);
  allocate(Lifetime::Optimizer);  // zeroed, as m and v start
  for (size_t unit = 0; options_.has_master() && unit < layout_.units.size(); unit++) {
    const Shard own = shard(unit);
    ops_->cast(slice_elements(buffer("master"), own.offset, own.offset + own.end - own.begin),
               slice_elements(buffer("parameters"), own.begin, own.end));
  }
}

GPT2::Seeds GPT2::draw_seeds(XorShift64& rng) {
  Seeds seeds;
  for (uint32_t& seed : seeds) seed = rng.next();
  return seeds;
}

std::vector<AdamWSlice> GPT2::slices(size_t unit, const Seeds& seeds, float weight_decay, Tensor gradients) {
  std::vector<AdamWSlice> slices;
  const Shard own = shard(unit);
  for (const ParameterTensor& tensor : layout_.units[unit].tensors) {
    const int64_t begin = std::max(own.begin, tensor.offset), end = std::min(own.end, tensor.offset + tensor.numel);
    if (begin >= end) continue;
    const int64_t first = own.offset + begin - own.begin, last = first + end - begin;
    AdamWSlice slice;
    slice.param = slice_elements(buffer("parameters"), begin, end);
    if (gradients) slice.grad = slice_elements(gradients, begin, end);
    slice.m = slice_elements(buffer("m"), first, last);
    slice.v = slice_elements(buffer("v"), first, last);
    if (options_.has_master()) slice.master = slice_elements(buffer("master"), first, last);
    slice.weight_decay = tensor.weight_decay ? weight_decay : 0;
    slice.seed = seeds[tensor.kind];
    slice.layer = tensor.layer;
    slice.first = begin - tensor.offset;
    slices.push_back(slice);
  }
  return slices;
}

void GPT2::gather_unit(const ParameterUnit& unit) {
  if (options_.zero_stage == 0) return;  // every rank updated all of it
  comm_->all_gather(slice_elements(buffer("parameters"), unit.offset, unit.offset + unit.size));
}

void GPT2::update(const UpdateOptions& options) {
  options.validate();
  const OnDevice on_device(*ops_);
  const Range range(*ops_, "update");
  compute_grad_norm(options.grad_clip);
  logits_allowed_ = false;  // of the old parameters
  start_optimizer();
  last_update_rng_ = rng_;
  const auto seeds = draw_seeds(rng_);
  const AdamWStep step{options.learning_rate, options.beta1, options.beta2,
                       options.eps,           options.step,  buffer("grad_scale")};
  const Tensor gradients = buffer("gradients");
  for (size_t unit = 0; unit < layout_.units.size(); unit++) {
    const std::vector<AdamWSlice> own = slices(unit, seeds, options.weight_decay, gradients);
    ops_->adamw(own.data(), int64_t(own.size()), step);
    gather_unit(layout_.units[unit]);
  }
  comm_->wait();
}

void GPT2::restore_parameters() {
  LLMC_CHECK(options_.has_master(), "parameters are restored from master weights, and this model has none");
  const OnDevice on_device(*ops_);
  start_optimizer();
  logits_allowed_ = false;
  XorShift64 rng = last_update_rng_;
  const auto seeds = draw_seeds(rng);
  for (size_t unit = 0; unit < layout_.units.size(); unit++) {
    const std::vector<AdamWSlice> own = slices(unit, seeds, 0, Tensor{});
    ops_->round_parameters(own.data(), int64_t(own.size()));
    gather_unit(layout_.units[unit]);
  }
  comm_->wait();
}

Tensor GPT2::optimizer_state(const std::string& name, const ParameterTensor& tensor) {
  LLMC_CHECK(name == "m" || name == "v" || name == "master", "optimizer state is m, v or master, not %s", name.c_str());
  LLMC_CHECK(name != "master" || options_.has_master(),
             "this model has no master weights: its parameters are fp32 or "
             "master_weights is off");
  for (size_t unit = 0; unit < layout_.units.size(); unit++) {
    const Shard own = shard(unit);
    const int64_t begin = std::max(own.begin, tensor.offset), end = std::min(own.end, tensor.offset + tensor.numel);
    if (begin < end) return slice_elements(buffer(name), own.offset + begin - own.begin, own.offset + end - own.begin);
  }
  return Tensor{};
}

float GPT2::loss() {
  LLMC_CHECK(gradients_complete_, "the loss of a step needs the last micro-step's backward first");
  float sum;
  const OnDevice on_device(*ops_);
  ops_->download(&sum, buffer("loss_sum"));
  return sum / (float(loss_rows_) * float(accumulation_steps_));
}

float GPT2::grad_norm() {
  const OnDevice on_device(*ops_);
  if (!sum_of_squares_ready_) compute_grad_norm(1);
  float norm;
  ops_->download(&norm, buffer("grad_norm"));
  return norm;
}

}  // namespace llmc
