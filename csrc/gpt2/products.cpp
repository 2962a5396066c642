// The four matrix products of a block, forward and backward, in the precision of the activations or in FP8.
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
bool GPT2::in_fp8(const Tensor& x) const { return options_.fp8 && x.rows() % 16 == 0; }

Fp8Matrix GPT2::fp8_matrix(const Fp8Tensor& tensor, Tensor values) {
  const Tensor scale = slice_rows(buffer("fp8_scales"), tensor.index, tensor.index + 1);
  return {values, slice_elements(scale, 1, 2)};
}

void GPT2::quantize(const Fp8Tensor& tensor, Tensor out, Tensor transposed, bool record) {
  const Tensor scale = slice_rows(buffer("fp8_scales"), tensor.index, tensor.index + 1);
  if (!fp8_scaled_) ops_->fp8_scale(scale, tensor.x, tensor.dtype);
  const Tensor amax = record ? slice_elements(buffer("fp8_amax"), tensor.index, tensor.index + 1) : Tensor{};
  ops_->quantize(out, transposed, amax, tensor.x, scale);
}

GPT2::Fp8Tensor GPT2::fp8_tensor(Fp8Role role, ParameterKind weight, int64_t layer, Tensor x) {
  const int64_t index = llmc::fp8_tensor(config_, role, weight, layer);
  return {x, role == kFp8Gradient ? DType::E5M2 : DType::E4M3, index};
}

// Passes without a backward pass, as validation's, leave the scales of the training alone: what is recorded for them is
// recorded backward.
void GPT2::product_forward(ParameterKind weight, int64_t l, Tensor out, Tensor x, Tensor pre) {
  const Tensor w = parameter(weight, l), bias = parameter(bias_of(weight), l);
  if (in_fp8(x)) {
    char* memory = buffer("fp8_operands").as<char>();
    const Fp8Tensor input = fp8_tensor(kFp8Input, weight, l, x), parameters = fp8_tensor(kFp8Weight, weight, l, w);
    const Tensor x8 = matrix(memory, input.dtype, x, false);
    const Tensor w8 = matrix(memory + x8.bytes(), parameters.dtype, w, false);
    quantize(input, x8, Tensor{}, false);
    quantize(parameters, w8, Tensor{}, false);
    ops_->fp8_matmul_forward(out, pre, fp8_matrix(input, x8), fp8_matrix(parameters, w8), bias);
  } else if (pre) {
    ops_->matmul_gelu_forward(out, pre, x, w, bias);
  } else {
    ops_->matmul_forward(out, x, w, bias);
  }
}

void GPT2::product_backward(ParameterKind weight, int64_t l, Tensor dx, Tensor dout, Tensor x, Tensor pre) {
  const Tensor w = parameter(weight, l), dw = gradient(weight, l), dbias = gradient(bias_of(weight), l);
  if (in_fp8(x)) {
    fp8_backward(weight, l, dx, dout, x, pre);
    ops_->bias_backward(dbias, dout, accumulate_);  // cuBLASLt has none of FP8
    return;
  }
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

// cuBLASLt multiplies rows with rows, so that what the sums run over must lie along them: hence the transposes.
void GPT2::fp8_backward(ParameterKind weight, int64_t l, Tensor dx, Tensor dout, Tensor x, Tensor pre) {
  const Tensor w = parameter(weight, l);
  const Fp8Tensor gradients = fp8_tensor(kFp8Gradient, weight, l, dout);
  const Fp8Tensor input = fp8_tensor(kFp8Input, weight, l, x), parameters = fp8_tensor(kFp8Weight, weight, l, w);
  char* memory = buffer("fp8_operands").as<char>();
  const Tensor dout8 = matrix(memory, gradients.dtype, dout, false);
  const Tensor dout8_transposed = matrix(memory + dout8.bytes(), gradients.dtype, dout, true);
  char* last = memory + 2 * dout8.bytes();
  const Tensor w8_transposed = matrix(last, parameters.dtype, w, true);
  const Tensor x8_transposed = matrix(last, input.dtype, x, true);  // when that of the weight is no longer needed

  quantize(gradients, dout8, dout8_transposed, true);
  quantize(parameters, Tensor{}, w8_transposed, true);
  ops_->fp8_matmul_backward(dx, pre, fp8_matrix(gradients, dout8), fp8_matrix(parameters, w8_transposed), false);
  quantize(input, Tensor{}, x8_transposed, true);
  ops_->fp8_matmul_backward(gradient(weight, l), Tensor{}, fp8_matrix(gradients, dout8_transposed),
                            fp8_matrix(input, x8_transposed), accumulate_);
}

// --- scales ------------------------------------------------------------------------------------------------------------

// A step that is not finite leaves the history as it was, as it leaves all that is trained.
void GPT2::update_fp8_scales() {
  ops_->update_fp8_scales(buffer("fp8_scales"), buffer("fp8_history"), buffer("fp8_amax"), buffer("grad_scale"),
                          first_fp8_gradient(config_));
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
  fp8_scaled_ = false;
  if (values.empty()) return;
  const OnDevice on_device(*ops_);
  start_optimizer();
  const Tensor history = buffer("fp8_history");
  LLMC_CHECK(int64_t(values.size()) == history.numel(),
             "the history of this model's scales has %" PRId64 " values, not %zu", history.numel(), values.size());
  ops_->upload(history, values.data());
  ops_->update_fp8_scales(buffer("fp8_scales"), history, Tensor{}, Tensor{}, first_fp8_gradient(config_));
  fp8_scaled_ = true;
}

}  // namespace llmc
