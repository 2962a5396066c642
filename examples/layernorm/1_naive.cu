// Rung 1, naive: a thread takes a row.
//
// The code reads like the formula, and every thread walks through its row from one end to the other. But a warp's 32
// threads do that side by side: what they load together lies C floats apart, in 32 different sectors of memory, of each
// of which only 4 of 32 bytes are asked for.
#include "rung.h"
#include "torch_binding.h"

namespace {

constexpr int kThreads = 256;

// out, x (N,C); mean, rstd (N); weight, bias (C)
__global__ void __launch_bounds__(kThreads) layernorm_kernel(float* out, float* means, float* rstds, const float* x,
                                                             const float* weight, const float* bias, int64_t N, int C) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= N) return;
  const float* row = x + n * C;

  float sum = 0;
  for (int c = 0; c < C; c++) sum += row[c];
  const float mean = sum / float(C);

  float square = 0;  // about the mean: E[x²] - mean² would cancel for rows far from zero
  for (int c = 0; c < C; c++) square += (row[c] - mean) * (row[c] - mean);
  const float rstd = 1.0f / sqrtf(square / float(C) + kEps);

  for (int c = 0; c < C; c++) out[n * C + c] = (row[c] - mean) * rstd * weight[c] + bias[c];
  means[n] = mean;
  rstds[n] = rstd;
}

}  // namespace

EXPORT int layernorm_forward(float* out, float* mean, float* rstd, const float* x, const float* weight,
                             const float* bias, int64_t N, int C, cudaStream_t stream) {
  return launch(layernorm_kernel, blocks_for(N, kThreads), kThreads, stream, out, mean, rstd, x, weight, bias, N, C);
}

#ifdef TORCH_EXTENSION_NAME
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("layernorm_forward",
        [](at::Tensor out, at::Tensor mean, at::Tensor rstd, at::Tensor x, at::Tensor weight, at::Tensor bias) {
          check(layernorm_forward(fp32(out), fp32(mean), fp32(rstd), fp32(x), fp32(weight), fp32(bias), x.size(0),
                                  int(x.size(1)), stream_of(x)));
        });
}
#endif
