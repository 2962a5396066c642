// The four matrix products of a block, forward and backward, in the precision of the activations or in FP8, and the
// layernorms before them, which write that.
#include <cinttypes>

#include "core/check.h"
#include "gpt2/fp8.h"
#include "gpt2/model.h"

namespace llmc {
namespace {

ParameterKind bias_of(ParameterKind weight) { return ParameterKind(weight + 1); }

Tensor matrix(void* data, DType dtype, const Tensor& x, bool transposed) {
  const int64_t rows = x.rows(), columns = x.last();
  return transposed ? make_tensor(data, dtype, columns, rows) : make_tensor(data, dtype, rows, columns);
}

}  // namespace

// cuBLASLt needs multiples of 16. A sample's few rows may have any number: then all is done as without FP8.
bool GPT2::in_fp8() const { return options_.fp8 && batch_ * (seq_ - first_) % 16 == 0; }

// The largest values of inputs and weights are recorded forward, where a pass without a backward pass, as validation's, must
// leave the scales of the training alone: they count when backward follows.
void GPT2::product_forward(ParameterKind weight, int64_t l, Tensor out, Tensor x, Tensor pre) {
  const Tensor w = parameter(weight, l), bias = parameter(bias_of(weight), l);
  if (in_fp8()) {
    char* memory = buffer("fp8_operands").as<char>();
    const Fp8Matrix input = fp8_input(weight, l, x, memory, false);
    const Fp8Matrix parameters = fp8_weight(weight, l, memory + x.numel(), false);
    ops_->fp8_matmul_forward(out, input, parameters, bias);
  } else if (pre) {
    ops_->matmul_gelu_forward(out, pre, x, w, bias);
  } else {
    ops_->matmul_forward(out, x, w, bias);
  }
}

void GPT2::product_backward(ParameterKind weight, int64_t l, Tensor dx, Tensor dout, Tensor x, Tensor pre) {
  if (in_fp8()) {
    fp8_backward(weight, l, dx, dout, x, Tensor{});
    return;
  }
  const Tensor w = parameter(weight, l), dw = gradient(weight, l), dbias = gradient(bias_of(weight), l);
  if (pre) {
    ops_->matmul_gelu_backward_input(dx, dout, w, pre);
  } else {
    ops_->matmul_backward_input(dx, dout, w);
  }
  if (options_.bias_fusion) {
    ops_->matmul_bias_backward_weight(dw, dbias, dout, x, accumulate_);
  } else {
    ops_->matmul_backward_weight(dw, dout, x, accumulate_);
    ops_->bias_backward(dbias, dout, accumulate_);
  }
}

// --- FP8 ---------------------------------------------------------------------------------------------------------------

Tensor GPT2::fp8_scale(Fp8Role role, ParameterKind weight, int64_t l) {
  const int64_t index = fp8_tensor(config_, options_.fp8, role, weight, l);
  return slice_rows(buffer("fp8_scales"), index, index + 1);
}

Tensor GPT2::fp8_amax(const char* name, Fp8Role role, ParameterKind weight, int64_t l) {
  const int64_t index = fp8_tensor(config_, options_.fp8, role, weight, l);
  return slice_elements(buffer(name), index, index + 1);
}

void GPT2::convert(const Fp8Out& out, const std::function<void(const Fp8Out&)>& work) {
  if (!fp8_scaled_) {
    const Tensor own = buffer("fp8_first_amax");
    ops_->fill_zero(own);
    work({Tensor{}, Tensor{}, own, Tensor{}});
    ops_->fp8_scale(out.scale, own, (out.values ? out.values : out.transposed).dtype);
  }
  work(out);
}

void GPT2::layernorm_forward(ParameterKind weight, int64_t l, Tensor residual, Tensor a, Tensor b) {
  const bool first = weight == kLn1w;
  const Tensor out = normalised(l, first ? "ln1" : "ln2");
  const Tensor mean = block_rows(l, first ? "ln1_mean" : "ln2_mean"),
               rstd = block_rows(l, first ? "ln1_rstd" : "ln2_rstd");
  const Tensor w = parameter(weight, l), bias = parameter(bias_of(weight), l);
  if (in_fp8()) {
    const ParameterKind product = first ? kQkvw : kFcw;
    const Tensor amax = fp8_amax("fp8_forward_amax", kFp8Input, product, l), scale = fp8_scale(kFp8Input, product, l);
    convert({out, Tensor{}, amax, scale}, [&](const Fp8Out& to) {
      ops_->fp8_layernorm_forward(to, b ? residual : Tensor{}, mean, rstd, b ? a : residual, b, w, bias);
    });
  } else if (b) {
    ops_->residual_layernorm_forward(residual, out, mean, rstd, a, b, w, bias);
  } else {
    ops_->layernorm_forward(out, mean, rstd, residual, w, bias);
  }
}

Fp8Matrix GPT2::fp8_input(ParameterKind weight, int64_t l, Tensor x, void* memory, bool transposed) {
  if (x.dtype == DType::E4M3) {
    const Tensor unscale = slice_elements(fp8_scale(kFp8Input, weight, l), 1, 2);
    if (!transposed) return {x, unscale};
    const Tensor out = matrix(memory, x.dtype, x, true);
    ops_->fp8_transpose(out, x);
    return {out, unscale};
  }
  const bool gelu = weight == kFcprojw;
  Tensor kept;
  if (options_.recompute == 0) {
    kept = matrix(view(plan_.block_buffer(l, gelu ? "fch_gelu_fp8" : "atty_fp8")).data, DType::E4M3, x, true);
  }
  return fp8_factor(kFp8Input, weight, l, x, kept, memory, transposed,
                    [&](const Fp8Out& to) { gelu ? ops_->quantize_gelu(to, x) : ops_->quantize(to, x); });
}

Fp8Matrix GPT2::fp8_weight(ParameterKind weight, int64_t l, void* memory, bool transposed) {
  const Tensor w = parameter(weight, l);
  Tensor kept;
  if (options_.recompute == 0) {
    char* all = view(plan_.block_buffer(l, "weights_fp8")).as<char>();
    kept = matrix(all + fp8_weight_offset(config_, weight), DType::E4M3, w, true);
  }
  return fp8_factor(kFp8Weight, weight, l, w, kept, memory, transposed,
                    [&](const Fp8Out& to) { ops_->quantize(to, w); });
}

Fp8Matrix GPT2::fp8_factor(Fp8Role role, ParameterKind weight, int64_t l, Tensor x, Tensor kept, void* memory,
                           bool transposed, const std::function<void(const Fp8Out&)>& work) {
  const Tensor scale = fp8_scale(role, weight, l), unscale = slice_elements(scale, 1, 2);
  if (kept && transposed) return {kept, unscale};
  const Tensor values = matrix(memory, DType::E4M3, x, transposed);
  convert(transposed ? Fp8Out{Tensor{}, values, Tensor{}, scale}
                     : Fp8Out{values, kept, fp8_amax("fp8_forward_amax", role, weight, l), scale},
          work);
  return {values, unscale};
}

// cuBLASLt multiplies rows with rows, so that what the sums run over must lie along them: hence the transposes.
void GPT2::fp8_backward(ParameterKind weight, int64_t l, Tensor dx, Tensor dout, Tensor x, Tensor pre) {
  char* memory = buffer("fp8_operands").as<char>();
  const Tensor values = matrix(memory, DType::E5M2, dout, false);
  const Tensor transposed = matrix(memory + values.bytes(), DType::E5M2, dout, true);
  char* last = memory + 2 * values.bytes();  // the weight transposed, and then the input
  const Tensor scale = fp8_scale(kFp8Gradient, weight, l), unscale = slice_elements(scale, 1, 2);
  convert({values, transposed, fp8_amax("fp8_amax", kFp8Gradient, weight, l), scale}, [&](const Fp8Out& to) {
    const Tensor dbias = to.values ? gradient(bias_of(weight), l) : Tensor{};
    ops_->quantize_gradient(to, dbias, dout, pre, accumulate_);
  });
  ops_->fp8_matmul_backward(dx, {values, unscale}, fp8_weight(weight, l, last, true), false);
  ops_->fp8_matmul_backward(gradient(weight, l), {transposed, unscale}, fp8_input(weight, l, x, last, true),
                            accumulate_);
}

// --- scales ------------------------------------------------------------------------------------------------------------

// A step that is not finite leaves the history as it was, as it leaves all that is trained.
void GPT2::update_fp8_scales() {
  ops_->update_fp8_scales(buffer("fp8_scales"), buffer("fp8_history"), buffer("fp8_amax"), buffer("grad_scale"),
                          first_fp8_gradient(config_, options_.fp8));
}

std::vector<float> GPT2::fp8_history() {
  if (!options_.fp8 || !fp8_scaled_) return {};
  const OnDevice on_device(*ops_);
  const Tensor history = buffer("fp8_history");
  std::vector<float> values(history.numel());
  finish_collectives();
  ops_->download(values.data(), history);
  return values;
}

void GPT2::set_fp8_history(const std::vector<float>& values) {
  LLMC_CHECK(options_.fp8, "a model without fp8 has no history of scales");
  fp8_scaled_ = backward_allowed_ = false;  // what the last forward has converted has other scales
  if (values.empty()) return;
  const OnDevice on_device(*ops_);
  start_optimizer();
  const Tensor history = buffer("fp8_history");
  LLMC_CHECK(int64_t(values.size()) == history.numel(),
             "the history of this model's scales has %" PRId64 " values, not %zu", history.numel(), values.size());
  ops_->upload(history, values.data());
  ops_->update_fp8_scales(buffer("fp8_scales"), history, Tensor{}, Tensor{}, first_fp8_gradient(config_, options_.fp8));
  fp8_scaled_ = true;
}

}  // namespace llmc
