// A variant of layernorm_forward for the kernel laboratory, in C++ on a CPU:
//
//   llmc-bench kernels layernorm_forward --variant examples/my_layernorm.cpp
//
// It reads each row twice instead of three times: Σx and Σx² come from one pass, by var = E[x²] - mean². Look at what
// that does to the largest error when the rows are far from zero (the laboratory's are not): the two terms cancel.
//
// The contract: the arguments are those of llmc._C.ops.layernorm_forward, in its order; csrc/ops/ops.h has the formulas.
// The laboratory has made the tensors: contiguous, of the right shapes, on one device. x, weight and bias are only read.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>  // compiles in a third of the time of torch/extension.h

#include <cmath>

namespace {

template <typename X>
void normalise_row(X* out, float* mean_out, float* rstd_out, const X* x, const X* weight, const X* bias, int64_t C) {
  float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
  for (int64_t c = 0; c < C; c++) {
    const float value = float(x[c]);
    sum += value;
    square += value * value;
  }
  const float mean = sum / float(C);
  const float rstd = 1 / std::sqrt(square / float(C) - mean * mean + 1e-5f);
#pragma omp simd
  for (int64_t c = 0; c < C; c++) {
    out[c] = X((float(x[c]) - mean) * rstd * float(weight[c]) + float(bias[c]));
  }
  *mean_out = mean;
  *rstd_out = rstd;
}

template <typename X>
void normalise_rows(const at::Tensor& out, const at::Tensor& mean, const at::Tensor& rstd, const at::Tensor& x,
                    const at::Tensor& weight, const at::Tensor& bias) {
  const int64_t N = x.size(0), C = x.size(1);
  const auto data = [](const at::Tensor& tensor) { return static_cast<X*>(tensor.data_ptr()); };
  at::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      normalise_row(data(out) + n * C, static_cast<float*>(mean.data_ptr()) + n,
                    static_cast<float*>(rstd.data_ptr()) + n, data(x) + n * C, data(weight), data(bias), C);
    }
  });
}

void layernorm_forward(at::Tensor out, at::Tensor mean, at::Tensor rstd, at::Tensor x, at::Tensor weight,
                       at::Tensor bias) {
  TORCH_CHECK(x.is_cpu(), "this variant runs on a CPU");
  if (x.scalar_type() == at::kBFloat16) {
    normalise_rows<c10::BFloat16>(out, mean, rstd, x, weight, bias);
  } else {
    normalise_rows<float>(out, mean, rstd, x, weight, bias);
  }
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("layernorm_forward", &layernorm_forward); }
