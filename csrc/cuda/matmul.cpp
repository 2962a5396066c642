// Matrix products by cuBLASLt. What cuBLASLt cannot fuse on a GPU (it says so when the shape is first seen) runs as the
// separate operations, which round the sum once more.
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

}  // namespace

bool CudaOps::multiply(const Product& product) {
  return cublas_->run(product, tf32_, scratch(workspace::kCublas), workspace::kCublas, stream_);
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
  Product product;
  product.d = dweight;
  product.a = dout;
  product.transpose_a = true;
  product.b = x;
  product.accumulate = accumulate;
  multiply(product);
}

}  // namespace llmc::cuda
