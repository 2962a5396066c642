// llmc._C.GPT2 and its configuration.
#include <ATen/ops/empty.h>

#include <cinttypes>
#include <memory>
#include <optional>

#include "bindings/bindings.h"
#include "bindings/devices.h"
#include "comm/single.h"
#include "core/check.h"
#include "cpu/make_cpu_ops.h"
#include "cuda/make_cuda_ops.h"
#include "gpt2/model.h"
#include "ops/timed_ops.h"

namespace llmc::bindings {
namespace {

using Model = std::shared_ptr<GPT2>;

// A torch view of the model's memory that keeps the model alive.
at::Tensor torch_view(const Model& model, const Tensor& tensor, c10::IntArrayRef shape) {
  return view_of_memory(model, model->options().device, tensor, shape);
}

// Of a buffer of the plan, or a part of it. What is in host memory is the CPU's, and what the last update made of it.
at::Tensor torch_view(const Model& model, const std::string& buffer, const Tensor& tensor) {
  const bool host = model->plan().buffer(buffer).lifetime == Lifetime::Host;
  if (host) model->ops().finish_stores();
  const Device device = host ? Device{} : model->options().device;
  return view_of_memory(model, device, tensor, c10::IntArrayRef(tensor.shape, tensor.ndim));
}

template <typename View>
py::dict by_name(const Model& model, View view) {
  py::dict result;
  for (const ParameterUnit& unit : model->layout().units) {
    for (const ParameterTensor& tensor : unit.tensors) result[py::str(tensor.name)] = view(tensor);
  }
  return result;
}

// n values of the host's memory, zeroed; where the device is not the host, it copies from and to it at full speed (pinned).
at::Tensor host_memory(const Model& model, int64_t n, const std::string& dtype) {
  LLMC_CHECK(n > 0, "host memory for %" PRId64 " values: it must be at least one", n);
  const Tensor memory = make_tensor(nullptr, parse_dtype(dtype), n);
  const OnDevice on_device(model->ops());
  const bool pinned = model->options().device.cuda;
  const size_t bytes = size_t(memory.bytes());
  const std::shared_ptr<void> owner(
      pinned ? model->ops().allocate_host(bytes) : model->ops().allocate(bytes),
      [model, pinned](void* data) { pinned ? model->ops().free_host(data) : model->ops().free(data); });
  return view_of_memory(owner, Device{}, make_tensor(owner.get(), memory.dtype, n), {n});
}

// A batch of ids as contiguous int32 (b,t); int64, torch's default, is converted.
at::Tensor ids_argument(const char* name, const at::Tensor& ids) {
  LLMC_CHECK(ids.dim() == 2, "%s must have shape (b,t), it has %" PRId64 " dimensions", name, ids.dim());
  LLMC_CHECK(ids.numel() > 0, "%s must not be empty, its shape is (%" PRId64 ",%" PRId64 ")", name, ids.size(0),
             ids.size(1));
  LLMC_CHECK(ids.is_cpu(), "%s must be in CPU memory", name);
  LLMC_CHECK(ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong, "%s must be int32 or int64, it is %s",
             name, c10::toString(ids.scalar_type()));
  if (ids.scalar_type() == at::kLong) {
    const at::Tensor wide = ids.contiguous();
    for (const int64_t id : c10::ArrayRef<int64_t>(wide.const_data_ptr<int64_t>(), size_t(wide.numel()))) {
      LLMC_CHECK(id >= INT32_MIN && id <= INT32_MAX, "%s holds the id %" PRId64 ", ids are 32 bits wide", name, id);
    }
  }
  return ids.to(at::kInt).contiguous();
}

void check_same_shape(const at::Tensor& tokens, const at::Tensor& targets) {
  LLMC_CHECK(tokens.sizes() == targets.sizes(),
             "targets (%" PRId64 ",%" PRId64 ") must have the shape of tokens (%" PRId64 ",%" PRId64 ")",
             targets.size(0), targets.size(1), tokens.size(0), tokens.size(1));
}

void backward(GPT2& model, const at::Tensor& targets, int64_t micro_step, int64_t accumulation_steps) {
  const at::Tensor ids = ids_argument("targets", targets);
  model.backward(ids.const_data_ptr<int32_t>(), ids.size(0), ids.size(1), micro_step, accumulation_steps);
}

at::Tensor evaluate(GPT2& model, const at::Tensor& tokens, const at::Tensor& targets) {
  const at::Tensor x = ids_argument("tokens", tokens), y = ids_argument("targets", targets);
  check_same_shape(x, y);
  const at::Tensor losses = at::empty(x.sizes(), at::TensorOptions(at::kFloat));
  model.evaluate(x.const_data_ptr<int32_t>(), y.const_data_ptr<int32_t>(), x.size(0), x.size(1),
                 losses.mutable_data_ptr<float>());
  return losses;
}

at::Tensor logits(GPT2& model, int64_t begin, int64_t end) {
  model.check_logits(begin, end);
  const at::Tensor out = at::empty({end - begin, model.config().vocab_size}, at::TensorOptions(at::kFloat));
  model.logits(begin, end, out.mutable_data_ptr<float>());
  return out;
}

void update(GPT2& model, float lr, float weight_decay, int64_t step, float beta1, float beta2, float eps,
            float grad_clip) {
  UpdateOptions options;
  options.learning_rate = lr;
  options.weight_decay = weight_decay;
  options.step = step;
  options.beta1 = beta1;
  options.beta2 = beta2;
  options.eps = eps;
  options.grad_clip = grad_clip;
  model.update(options);
}

py::dict state(const Model& model, const std::string& name) {
  return by_name(model, [&](const ParameterTensor& tensor) {
    const Tensor state = model->state(name, tensor);
    return torch_view(model, name, state ? state : make_tensor(nullptr, model->buffer(name).dtype, 0));
  });
}

py::dict optimizer_state(const Model& model, const std::string& name) {
  LLMC_CHECK(name == "m" || name == "v" || name == "master", "optimizer state is m, v or master, not %s", name.c_str());
  return state(model, name);
}

py::dict gather_parameters(const Model& model, size_t unit) {
  const std::vector<ParameterUnit>& units = model->layout().units;
  LLMC_CHECK(unit < units.size(), "unit %zu: the model has %zu units", unit, units.size());
  Tensor whole;
  {
    py::gil_scoped_release no_gil;
    whole = model->gather_parameters(unit);
  }
  py::dict result;
  for (const ParameterTensor& tensor : units[unit].tensors) {
    const int64_t first = tensor.offset - units[unit].offset;
    const Tensor part = slice_elements(whole, first, first + tensor.numel);
    result[py::str(tensor.name)] = torch_view(model, part, tensor.shape);
  }
  return result;
}

py::dict memory(const GPT2& model) {
  py::dict result;
  for (int i = 0; i < kNumLifetimes; i++) {
    if (Lifetime(i) == Lifetime::Host && !model.options().offload_optimizer) continue;
    result[name_of(Lifetime(i))] = model.plan().bytes[i];
  }
  return result;
}

py::dict operation_times(GPT2& model) {
  TimedOps* ops = dynamic_cast<TimedOps*>(&model.ops());
  LLMC_CHECK(ops != nullptr, "the model does not time its operations: make it with timed=True");
  py::dict result;
  for (const auto& [name, time] : ops->times())
    result[py::str(name)] = py::make_tuple(time.calls, time.seconds, time.flops, time.bytes);
  ops->forget();
  return result;
}

py::list parameter_units(const GPT2Config& config, int world_size) {
  config.validate();
  LLMC_CHECK(world_size >= 1, "world_size is %d, it must be at least 1", world_size);
  py::list units;
  for (const ParameterUnit& unit : ParameterLayout(config, world_size).units) {
    py::list tensors;
    for (const ParameterTensor& tensor : unit.tensors)
      tensors.append(py::make_tuple(tensor.name, tensor.offset, tensor.numel));
    units.append(py::make_tuple(unit.offset, unit.size, tensors));
  }
  return units;
}

py::list plan_rows(const GPT2Config& config, const Options& options, int world_size) {
  py::list rows;
  for (const Buffer& buffer : plan(config, options, world_size).buffers) {
    rows.append(py::make_tuple(buffer.name, name_of(buffer.lifetime), name_of(buffer.dtype),
                               py::tuple(py::cast(buffer.shape)), buffer.offset, buffer.bytes));
  }
  return rows;
}

}  // namespace

// The types are local to the module, so that two builds of it can be loaded side by side and compared.
void register_model(py::module_& module) {
  using namespace py::literals;
  const py::call_guard<py::gil_scoped_release> no_gil;

  py::class_<GPT2Config>(module, "GPT2Config", py::module_local(),
                         "Shape of a GPT-2: what the model file's header holds.")
      .def(py::init([](int64_t max_seq_len, int64_t vocab_size, int64_t padded_vocab_size, int64_t num_layers,
                       int64_t num_heads, int64_t channels) {
             const GPT2Config config{max_seq_len, vocab_size, padded_vocab_size, num_layers, num_heads, channels};
             config.validate();
             return config;
           }),
           py::kw_only(), "max_seq_len"_a = 1024, "vocab_size"_a = 50257, "padded_vocab_size"_a = 50304,
           "num_layers"_a = 12, "num_heads"_a = 12, "channels"_a = 768)
      .def_readonly("max_seq_len", &GPT2Config::max_seq_len)
      .def_readonly("vocab_size", &GPT2Config::vocab_size)
      .def_readonly("padded_vocab_size", &GPT2Config::padded_vocab_size)
      .def_readonly("num_layers", &GPT2Config::num_layers)
      .def_readonly("num_heads", &GPT2Config::num_heads)
      .def_readonly("channels", &GPT2Config::channels)
      .def_property_readonly("num_parameters", &GPT2Config::num_parameters);

  py::class_<Options>(module, "Options", py::module_local(), "How a model is run; see csrc/gpt2/config.h.")
      .def(py::init([](int64_t batch_size, int64_t seq_len, const std::string& precision,
                       const std::optional<std::string>& grad_dtype, int recompute, int gelu_fusion,
                       bool master_weights, int zero_stage, int64_t classifier_rows, const std::string& device,
                       bool tf32, bool offload_optimizer, int64_t offload_piece, bool cudnn_attention, bool bias_fusion,
                       bool cuda_graphs, int fp8) {
             Options options;
             options.device = parse_device(device);
             options.tf32 = tf32;
             options.batch_size = batch_size;
             options.seq_len = seq_len;
             options.precision = parse_dtype(precision);
             options.grad_dtype = grad_dtype ? parse_dtype(*grad_dtype) : options.precision;
             options.recompute = recompute;
             options.gelu_fusion = gelu_fusion;
             options.master_weights = master_weights;
             options.zero_stage = zero_stage;
             options.classifier_rows = classifier_rows;
             options.offload_optimizer = offload_optimizer;
             options.offload_piece = offload_piece;
             options.cudnn_attention = cudnn_attention;
             options.bias_fusion = bias_fusion;
             options.cuda_graphs = cuda_graphs;
             options.fp8 = fp8;
             return options;
           }),
           py::kw_only(), "batch_size"_a = 4, "seq_len"_a = 1024, "precision"_a = "fp32", "grad_dtype"_a = py::none(),
           "recompute"_a = 1, "gelu_fusion"_a = 0, "master_weights"_a = true, "zero_stage"_a = 0,
           "classifier_rows"_a = 0, "device"_a = "cpu", "tf32"_a = true, "offload_optimizer"_a = false,
           "offload_piece"_a = 0, "cudnn_attention"_a = false, "bias_fusion"_a = false, "cuda_graphs"_a = false,
           "fp8"_a = 0)
      .def_readonly("batch_size", &Options::batch_size)
      .def_readonly("seq_len", &Options::seq_len)
      .def_property_readonly("precision", [](const Options& self) { return name_of(self.precision); })
      .def_property_readonly("grad_dtype", [](const Options& self) { return name_of(self.grad_dtype); })
      .def_readonly("recompute", &Options::recompute)
      .def_readonly("gelu_fusion", &Options::gelu_fusion)
      .def_readonly("master_weights", &Options::master_weights)
      .def_readonly("zero_stage", &Options::zero_stage)
      .def_readonly("classifier_rows", &Options::classifier_rows)
      .def_property_readonly("device", [](const Options& self) { return name_of(self.device); })
      .def_readonly("tf32", &Options::tf32)
      .def_readonly("offload_optimizer", &Options::offload_optimizer)
      .def_readonly("offload_piece", &Options::offload_piece)
      .def_readonly("cudnn_attention", &Options::cudnn_attention)
      .def_readonly("bias_fusion", &Options::bias_fusion)
      .def_readonly("cuda_graphs", &Options::cuda_graphs)
      .def_readonly("fp8", &Options::fp8);

  module.def(
      "plan", &plan_rows, "config"_a, "options"_a, "world_size"_a = 1,
      "The memory of one rank before anything is allocated: a list of (name, lifetime, dtype, shape, offset, bytes).");

  module.def(
      "parameter_units", &parameter_units, "config"_a, "world_size"_a = 1,
      "Where parameters are: a list of units (offset, size, [(name, offset, numel), ...]) in elements from the start "
      "of all of them. Rank r of P owns slice [r*size/P, (r+1)*size/P) of every unit where a ZeRO stage cuts them; in "
      "buffers that hold slices only, that of a unit starts at offset/P.");

  py::class_<GPT2, Model>(module, "GPT2", py::module_local(),
                          "GPT-2 with its training step; see csrc/gpt2/model.h. Parameters are 0 until init_random() "
                          "or until they are written. On CUDA its work, and so its views, are ordered with torch's "
                          "default stream; on another stream synchronise first.")
      .def(py::init(
               [](const GPT2Config& config, const Options& options, std::shared_ptr<Communicator> comm, bool timed) {
                 py::gil_scoped_release no_gil_here;  // only here: pybind11 registers the new object with the GIL held
                 const Device device = options.device;
                 LLMC_CHECK(!(timed && device.cuda),
                            "timed: operations on a GPU have not finished when they return; use a "
                            "profiler, for which the step names its parts");
                 auto ops = device.cuda ? make_cuda_ops(device.index, options.tf32) : make_cpu_ops();
                 if (options.cudnn_attention) {
                   config.validate();
                   options.validate(config);
                   use_cudnn_attention(*ops, options.batch_size, options.seq_len, config.num_heads, config.head_size());
                 }
                 if (timed) ops = std::make_unique<TimedOps>(std::move(ops));
                 if (!comm) comm = std::make_shared<SingleProcess>();
                 return std::make_shared<GPT2>(config, options, std::move(ops), std::move(comm));
               }),
           "config"_a, "options"_a, "comm"_a = py::none(), "timed"_a = false)
      .def_property_readonly("rank", &GPT2::rank)
      .def_property_readonly("world_size", &GPT2::world_size)
      .def_property_readonly("config", &GPT2::config)
      .def_property_readonly("options", &GPT2::options)
      .def("init_random", &GPT2::init_random, no_gil, "seed"_a = 42,
           "Random parameters: GPT-2's initialisation, drawn like torch's from mt19937. Forgets the optimizer state.")
      .def("reset_optimizer", &GPT2::reset_optimizer, no_gil,
           "Forget m, v and master weights: needed after parameters were written from outside a used model.")
      .def(
          "forward",
          [](GPT2& self, const at::Tensor& tokens) {
            const at::Tensor ids = ids_argument("tokens", tokens);
            self.forward(ids.const_data_ptr<int32_t>(), ids.size(0), ids.size(1));
          },
          no_gil, "tokens"_a, "Run tokens (b,t), b <= B and t <= T, up to the last layernorm.")
      .def(
          "extend",
          [](GPT2& self, const at::Tensor& tokens) {
            const at::Tensor ids = ids_argument("tokens", tokens);
            LLMC_CHECK(ids.size(0) == 1, "tokens must have one row, it has %" PRId64, ids.size(0));
            self.extend(ids.const_data_ptr<int32_t>(), ids.size(1));
          },
          no_gil, "tokens"_a,
          "Run tokens (1,n) behind those of the last forward or extend, which must have had one row, at the cost of n "
          "positions. Logits may follow, no backward.")
      .def("backward", &backward, no_gil, "targets"_a, "micro_step"_a = 0, "accumulation_steps"_a = 1,
           "Loss and gradients of the last forward. micro_step 0 starts both anew; the last one completes the step.")
      .def("evaluate", &evaluate, no_gil, "tokens"_a, "targets"_a, "Per-token losses, fp32 (b,t), without gradients.")
      .def("logits", &logits, no_gil, "begin"_a, "end"_a,
           "Logits, fp32 (end - begin, V), of rows [begin, end) of the last forward's (b*t) rows.")
      .def("start_optimizer", &GPT2::start_optimizer, no_gil,
           "Allocate the optimizer state if it is not there: m = v = 0, master = the parameters.")
      .def("restore_parameters", &GPT2::restore_parameters, no_gil,
           "Parameters = master weights, rounded as the last update rounded them (see last_update_rng_state).")
      .def("update", &update, no_gil, "lr"_a, "weight_decay"_a, "step"_a, "beta1"_a = 0.9f, "beta2"_a = 0.95f,
           "eps"_a = 1e-8f, "grad_clip"_a = 1.0f,
           "Clip the gradient norm and do one AdamW step; step counts from 1. With a loss or norm that is not finite "
           "nothing changes.")
      .def("loss", &GPT2::loss, no_gil, "Mean loss over the micro-steps (and ranks) of the last complete backward.")
      .def("grad_norm", &GPT2::grad_norm, no_gil,
           "Global gradient norm of the last complete backward, before clipping.")
      .def("choose_algorithms", &GPT2::choose_algorithms, no_gil, "known"_a, "timing"_a,
           "Of products on a GPU, from here on: those known by the product's description; otherwise, if timing, the "
           "fastest when a product is first seen, and then what the next passes compute is of no use; otherwise "
           "cuBLASLt's first.")
      .def("algorithms", &GPT2::algorithms, no_gil, "The known and timed algorithms that products have taken since.")
      .def("vote", &GPT2::vote, "votes"_a,
           "What this rank has to say to all, until it says otherwise; averaged with the loss by a complete backward.")
      .def("votes", &GPT2::votes, no_gil,
           "The averages over the ranks of the last complete backward, the same bits on all of them.")
      .def("parameters_finite", &GPT2::parameters_finite, no_gil,
           "Whether all parameters that the last update wrote, on any rank, are finite.")
      .def_property("rng_state", &GPT2::rng_state, &GPT2::set_rng_state)
      .def_property("last_update_rng_state", &GPT2::last_update_rng_state, &GPT2::set_last_update_rng_state)
      .def_property("fp8_history", py::cpp_function(&GPT2::fp8_history, no_gil),
                    py::cpp_function(&GPT2::set_fp8_history, no_gil),
                    "With fp8: the largest values of the tensors that are converted, in the last updates, flat; empty "
                    "before the first.")
      .def(
          "parameters", [](const Model& self) { return state(self, "parameters"); },
          "Views of the parameters by name: wte, wpe, h0.ln1w, ..., lnfb; at ZeRO stage 3 of the parts this rank owns, "
          "flat.")
      .def(
          "gradients", [](const Model& self) { return state(self, "gradients"); },
          "Views of the gradients by name; they exist after the first backward. From ZeRO stage 2 on of the parts this "
          "rank "
          "owns, flat; at stage 1 only those parts are averages over the ranks.")
      .def("gather_parameters", &gather_parameters, "unit"_a,
           "The whole parameters of one of parameter_units() by name, until the next call of the model; at ZeRO stage "
           "3 all "
           "ranks must call it.")
      .def("optimizer_state", &optimizer_state, "name"_a,
           "Views of m, v or master by parameter name, from ZeRO stage 1 on of the parts this rank owns, flat; they "
           "exist "
           "after start_optimizer() or the first update.")
      .def(
          "buffer",
          [](const Model& self, const std::string& name) { return torch_view(self, name, self->buffer(name)); },
          "name"_a, "View of any buffer of the plan, for example the activation h0.atty (B,T,C).")
      .def("memory", &memory, "Bytes of the plan by lifetime; each lifetime is allocated when it is first needed.")
      .def(
          "host_memory", &host_memory, no_gil, "n"_a, "dtype"_a,
          "n values of the host's memory, zeroed and the caller's; a GPU copies from and to it at full speed (pinned).")
      .def("operation_times", &operation_times,
           "Of a model made with timed=True, what its operations took since the last call: by name, and of products "
           "shape m x n x k, a tuple (calls, seconds, flops, bytes); see csrc/ops/timed_ops.h.")
      .def("allocated_bytes", &GPT2::allocated_bytes, "Bytes that the model holds now.");
}

}  // namespace llmc::bindings
