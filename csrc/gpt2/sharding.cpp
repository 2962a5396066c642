// What a rank keeps of each unit, and what moves between the ranks (ZeRO: Rajbhandari et al. 2020).
//
//   stage 0  gradients are averaged once a step
//   stage 1  each rank gets the average of its slice of the gradients, updates that slice, and the slices are shared
//   stage 2  the same in every micro-step; the averages add up in fp32 in the shard
//   stage 3  the same, and the parameters of a unit come before they are needed and go after it, instead of being shared
#include <algorithm>

#include "core/check.h"
#include "gpt2/model.h"

namespace llmc {
namespace {

Tensor in_shape(void* data, DType dtype, const std::vector<int64_t>& shape) {
  return shape.size() == 2 ? make_tensor(data, dtype, shape[0], shape[1]) : make_tensor(data, dtype, shape[0]);
}

}  // namespace

bool GPT2::sharded(const std::string& name) const {
  return options_.zero_stage >= (name == "parameters" ? 3 : name == "gradients" ? 2 : 1);
}

GPT2::Shard GPT2::shard(size_t unit) const {
  const ParameterUnit& u = layout_.units[unit];
  if (options_.zero_stage == 0) return {u.offset, u.offset + u.size, u.offset};
  const int64_t size = u.size / comm_->size(), begin = u.offset + comm_->rank() * size;
  return {begin, begin + size, u.offset / comm_->size()};
}

Tensor GPT2::own(const std::string& name, size_t unit) {
  const Shard own = shard(unit);
  const int64_t first = sharded(name) ? own.offset : own.begin;
  return slice_elements(buffer(name), first, first + own.end - own.begin);
}

Tensor GPT2::state(const std::string& name, const ParameterTensor& tensor) {
  LLMC_CHECK(name == "parameters" || name == "gradients" || name == "m" || name == "v" || name == "master",
             "the state of a parameter is parameters, gradients, m, v or master, not %s", name.c_str());
  LLMC_CHECK(name != "master" || options_.has_master(),
             "this model has no master weights: its parameters are fp32 or master_weights is off");
  const Tensor whole = buffer(name);
  const Shard part = shard(tensor.unit);
  int64_t begin = tensor.offset, end = begin + tensor.numel, shift = 0;
  if (sharded(name)) {
    begin = std::max(begin, part.begin);
    end = std::min(end, part.end);
    shift = part.offset - part.begin;
  }
  if (begin >= end) return Tensor{};
  const Tensor found = slice_elements(whole, begin + shift, end + shift);
  return end - begin == tensor.numel ? in_shape(found.data, found.dtype, tensor.shape) : found;
}

size_t GPT2::place(size_t unit) const { return unit == 0 ? 0 : unit + 1 == layout_.units.size() ? 3 : 1 + unit % 2; }

Tensor GPT2::whole(Lifetime lifetime, size_t unit) {
  const std::string name = name_of(lifetime);
  const ParameterUnit& u = layout_.units[unit];
  if (!sharded(name)) return slice_elements(buffer(name), u.offset, u.offset + u.size);
  const size_t at = place(unit);
  if (at == 0) return buffer(name + "_first");
  if (at == 3) return buffer(name + "_last");
  return slice_elements(buffer(name + "_ring"), (at - 1) * u.size, at * u.size);
}

namespace {

Tensor tensor_of_unit(Tensor unit, const ParameterLayout& layout, const ParameterTensor& tensor) {
  const int64_t first = tensor.offset - layout.units[tensor.unit].offset;
  return in_shape(slice_elements(unit, first, first + tensor.numel).data, unit.dtype, tensor.shape);
}

}  // namespace

Tensor GPT2::parameter(ParameterKind kind, int64_t layer) {
  const ParameterTensor& tensor = layout_.tensor(kind, layer);
  return tensor_of_unit(whole(Lifetime::Parameters, tensor.unit), layout_, tensor);
}

Tensor GPT2::gradient(ParameterKind kind, int64_t layer) {
  const ParameterTensor& tensor = layout_.tensor(kind, layer);
  return tensor_of_unit(whole(Lifetime::Gradients, tensor.unit), layout_, tensor);
}

// --- parameters --------------------------------------------------------------------------------------------------------

void GPT2::gather(size_t unit) {
  WorkingUnit& there = gathered_[place(unit)];
  if (!sharded("parameters") || there.unit == unit) return;
  there.unit = unit;
  there.ticket = last_ticket_ = comm_->all_gather(whole(Lifetime::Parameters, unit), own("parameters", unit),
                                                  "parameters of " + layout_.units[unit].name);
}

void GPT2::use(size_t unit) {
  gather(unit);
  comm_->wait(gathered_[place(unit)].ticket);
}

void GPT2::forget_gathered() {
  for (WorkingUnit& there : gathered_) there.unit = WorkingUnit::kNone;
}

Tensor GPT2::gather_parameters(size_t unit) {
  const OnDevice on_device(*ops_);
  gathered_[place(unit)].unit = WorkingUnit::kNone;  // they may have been written from outside
  use(unit);
  finish_collectives();
  return whole(Lifetime::Parameters, unit);
}

bool GPT2::shares_updates() const { return options_.zero_stage > 0 && !sharded("parameters"); }

void GPT2::share_update(size_t unit) {
  last_ticket_ = comm_->all_gather(whole(Lifetime::Parameters, unit), own("parameters", unit),
                                   "updated parameters of " + layout_.units[unit].name);
}

// --- gradients ---------------------------------------------------------------------------------------------------------

void GPT2::open_gradients(size_t unit) {
  if (!sharded("gradients")) return;
  WorkingUnit& there = reduced_[place(unit)];
  collect_gradients(there);
  there.unit = unit;
}

void GPT2::reduce_gradients(size_t unit, bool last_micro_step) {
  if (!sharded("gradients") && !last_micro_step) return;
  const Tensor gradients = whole(Lifetime::Gradients, unit);
  const std::string what = "gradients of " + layout_.units[unit].name;
  last_ticket_ = options_.zero_stage == 0 ? comm_->all_reduce_average(gradients, what)
                                          : comm_->reduce_scatter_average(gradients, what);
  reduced_[place(unit)].ticket = last_ticket_;
}

void GPT2::collect_gradients(WorkingUnit& there) {
  if (there.unit == WorkingUnit::kNone) return;
  comm_->wait(there.ticket);
  const Tensor unit = whole(Lifetime::Gradients, there.unit);
  const int64_t size = unit.numel() / comm_->size();
  ops_->accumulate(own("gradients", there.unit),
                   slice_elements(unit, comm_->rank() * size, (comm_->rank() + 1) * size));
  there.unit = WorkingUnit::kNone;
}

}  // namespace llmc
