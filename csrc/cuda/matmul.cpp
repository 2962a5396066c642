// Matrix products by cuBLASLt. What cuBLASLt cannot fuse on a GPU (it says so when the shape is first seen) runs as the
// separate operations, which round the sum once more; and so do gradients of weights and biases where timing has found
// that faster (reports of BGRADB on an A100 say that the product can take half as long again).
#include "cuda/cublas_lt.h"
#include "cuda/cuda_ops.h"
#include "ops/workspace.h"

namespace llmc::cuda {
namespace {

// out = x·weightᵀ + bias
Product forward_product(Tensor out, Tensor x, Tensor weight, Tensor bias) {
  Product product;
  product.d = out;
  product.a = x;
  product.b = weight;
  product.transpose_b = true;
  product.bias = bias;
  return product;
}

// dx = dout·weight
Product input_product(Tensor dx, Tensor dout, Tensor weight) {
  Product product;
  product.d = dx;
  product.a = dout;
  product.b = weight;
  return product;
}

// dweight (=, +=) doutᵀ·x
Product weight_product(Tensor dweight, Tensor dout, Tensor x, bool accumulate) {
  Product product;
  product.d = dweight;
  product.a = dout;
  product.transpose_a = true;
  product.b = x;
  product.accumulate = accumulate;
  return product;
}

// d = a·bᵀ of FP8 matrices: the only form that all GPUs have.
Product fp8_product(Tensor d, Fp8Matrix a, Fp8Matrix b) {
  Product product;
  product.d = d;
  product.a = a.values;
  product.b = b.values;
  product.transpose_b = true;
  product.unscale_a = a.unscale;
  product.unscale_b = b.unscale;
  return product;
}

}  // namespace

void CudaOps::choose_algorithms(const Algorithms& known, bool timing) {
  graphs_.forget(stream_);  // they launch what was chosen before
  cublas_->choose_algorithms(known, timing);
}
Algorithms CudaOps::algorithms() const { return cublas_->algorithms(); }

bool CudaOps::multiply(const Product& product, const std::function<void()>& apart) {
  return cublas_->run(product, tf32_, scratch(workspace::kCublas), workspace::kCublas, stream_, apart);
}

void CudaOps::matmul_forward(Tensor out, Tensor x, Tensor weight, Tensor bias) {
  multiply(forward_product(out, x, weight, bias));
}

void CudaOps::matmul_gelu_forward(Tensor out, Tensor pre, Tensor x, Tensor weight, Tensor bias) {
  Product product = forward_product(out, x, weight, bias);
  product.gelu = Product::Gelu::Forward;
  product.pre = pre;
  if (multiply(product)) return;
  matmul_forward(pre, x, weight, bias);
  gelu_forward(out, pre);
}

void CudaOps::matmul_backward_input(Tensor dx, Tensor dout, Tensor weight) {
  multiply(input_product(dx, dout, weight));
}

void CudaOps::matmul_gelu_backward_input(Tensor dpre, Tensor dout, Tensor weight, Tensor pre) {
  Product product = input_product(dpre, dout, weight);
  product.gelu = Product::Gelu::Backward;
  product.pre = pre;
  if (multiply(product)) return;
  matmul_backward_input(dpre, dout, weight);
  gelu_backward(dpre, pre);
}

void CudaOps::matmul_backward_weight(Tensor dweight, Tensor dout, Tensor x, bool accumulate) {
  multiply(weight_product(dweight, dout, x, accumulate));
}

// cuBLASLt adds to the weights' gradient alone: where that of the bias is added to, it comes into scratch memory first.
void CudaOps::matmul_bias_backward_weight(Tensor dweight, Tensor dbias, Tensor dout, Tensor x, bool accumulate) {
  char* memory = static_cast<char*>(scratch(workspace::matmul_bias_backward_weight(dbias.numel())));
  Product product = weight_product(dweight, dout, x, accumulate);
  product.bias_gradient = dbias;
  if (accumulate) product.bias_gradient.data = memory + workspace::kCublas;
  const auto apart = [&] {
    matmul_backward_weight(dweight, dout, x, accumulate);
    bias_backward(dbias, dout, accumulate);
  };
  if (!multiply(product, apart)) return apart();
  if (accumulate) CudaOps::accumulate(dbias, product.bias_gradient);
}

// Gradients need exact sums more than activations do, which are rounded again at once.
void CudaOps::fp8_matmul_forward(Tensor out, Fp8Matrix x, Fp8Matrix weight, Tensor bias) {
  Product product = fp8_product(out, x, weight);
  product.bias = bias;
  product.fast_accumulation = true;
  multiply(product);
}

void CudaOps::fp8_matmul_backward(Tensor out, Fp8Matrix a, Fp8Matrix b, bool accumulate) {
  Product product = fp8_product(out, a, b);
  product.accumulate = accumulate;
  multiply(product);
}

}  // namespace llmc::cuda
