// Loss head: softmax, cross-entropy and its gradient, one block per row.
//
// First pass: every thread keeps the maximum and the sum of exponentials of its columns up to date (online softmax,
// Milakov and Gimelshein 2018), so that the row is read once; the block combines them. Second pass: the gradient, in
// place or apart in FP8, over the columns in reverse order: what the first pass has read last is still in the L1 cache,
// the rest in the L2 cache. Blocks take the rows from the last to the first, as the matrix product before has left the
// last ones in the L2 cache.
//
// Columns up to the last whole vector below V go by 128-bit accesses, if Vp lets all rows start at multiples of 16
// bytes; the others, padding included, one by one; in FP8, of which an instruction converts two, they are stored by two. The threads
// of a row and so the order of additions depend on V and Vp alone.
#include <cfloat>
#include <cmath>

#include "core/dispatch.h"
#include "core/integers.h"
#include "cuda/cuda_ops.h"
#include "cuda/elements.cuh"
#include "cuda/fp8.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace llmc::cuda {
namespace {

constexpr int kMaxThreads = 512;

// Over the block. To be called once in a kernel: no barrier protects the shared memory from a second call.
__device__ float block_max(float x) {
  __shared__ float warp_maxima[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  x = warp_max(x);
  if (lane == 0) warp_maxima[warp] = x;
  __syncthreads();
  return warp_max(lane < warps ? warp_maxima[lane] : -FLT_MAX);
}

// e^x for differences x <= 0 of logits. The fast form is off by at most 2 + 1.2·|x| units in the last place (CUDA C++
// Programming Guide). That is an error of 2.4e-7 at most, where the largest term of the sum is 1: as good as two
// additions.
__device__ float fast_exp(float x) { return __expf(x); }

// The largest logit so far and Σ exp(logit - max).
struct Softmax {
  float max = -FLT_MAX;  // not -inf: -inf - -inf would be NaN
  float sum = 0;

  template <int N>
  __device__ void add(const float (&x)[N]) {
    float largest = max;
    for (int i = 0; i < N; i++) largest = fmaxf(largest, x[i]);
    sum *= fast_exp(max - largest);
    max = largest;
    for (int i = 0; i < N; i++) sum += fast_exp(x[i] - max);
  }
};

// Calls use(p, vector) for the count vectors at p, p + step, ... The load of the next one is in flight meanwhile.
template <typename X, typename F>
__device__ void for_each_vector(X* p, int step, int count, F use) {
  Packed<X> next = count > 0 ? load128(p) : Packed<X>::zeros();
  for (; count > 0; count--, p += step) {
    const Packed<X> vector = next;
    if (count > 1) next = load128(p + step);
    use(p, vector);
  }
}

// p[0..N-1] = x, rounded to nearest.
template <int N, typename X>
__device__ void store(X* p, const float (&x)[N]) {
  store_elements<N>(p, x);
}

struct e5m2 {
  uint8_t bits;
};
template <int N>
__device__ void store(e5m2* p, const float (&x)[N]) {
  if constexpr (N == 8) {
    *reinterpret_cast<uint2*>(p) = quantized<E5M2>(x, 1);
  } else if constexpr (N == 2) {
    *reinterpret_cast<uint16_t*>(p) = uint16_t(quantized<E5M2>(x[0], x[1], 1));
  } else {
    static_assert(N == 1);
    p->bits = uint8_t(quantized<E5M2>(x[0], 0, 1));
  }
}

// dlogits: (N,Vp), may be logits, or null. *unscale, if that is not null, becomes inverse. vectors: how many of the V
// columns are accessed by vectors, a multiple of their size.
template <typename X, typename G>
__global__ void __launch_bounds__(kMaxThreads)
    fused_classifier_kernel(X* logits, G* dlogits, float* losses, const int32_t* targets, int V, int Vp, int vectors,
                            float dloss, float* unscale, float inverse) {
  after_previous_kernel();
  constexpr int W = Packed<X>::size;
  constexpr int kSingle = sizeof(G) == 1 ? 2 : 1;  // columns of a store where there are no vectors
  const int64_t n = gridDim.x - 1 - blockIdx.x;
  X* row = logits + n * Vp;
  const int target = targets[n];
  const int thread = threadIdx.x, threads = blockDim.x;
  const int own_vectors = (vectors / W + threads - 1 - thread) / threads;  // this thread's share

  Softmax softmax;
  for_each_vector(row + thread * W, threads * W, own_vectors, [&](X*, const Packed<X>& vector) {
    float x[W];
    for (int i = 0; i < W; i++) x[i] = to_float(vector[i]);
    softmax.add(x);
  });
  for (int c = vectors + thread; c < V; c += threads) {
    const float x[1] = {to_float(row[c])};
    softmax.add(x);
  }
  const float target_logit = to_float(row[target]);  // before a thread overwrites it
  const float max = block_max(softmax.max);
  const float sum = block_sum(softmax.sum * fast_exp(softmax.max - max));
  if (thread == 0) losses[n] += (max - target_logit) + logf(sum);
  if (unscale && n == 0 && thread == 0) *unscale = inverse;
  if (!dlogits) return;

  G* gradients = dlogits + n * Vp;
  const float scale = dloss / sum;
  const float target_gradient[1] = {(fast_exp(target_logit - max) / sum - 1.0f) * dloss};
  for (int first = vectors + thread * kSingle; first < Vp; first += threads * kSingle) {
    float gradient[kSingle];
    for (int i = 0; i < kSingle; i++) {
      const int c = first + i;
      gradient[i] = c == target ? target_gradient[0] : c < V ? fast_exp(to_float(row[c]) - max) * scale : 0.0f;
    }
    store(gradients + first, gradient);
  }
  X* last = row + vectors - (thread + 1) * W;
  for_each_vector(last, -threads * W, own_vectors, [&](X* p, const Packed<X>& vector) {
    float gradient[W];
    for (int i = 0; i < W; i++) gradient[i] = fast_exp(to_float(vector[i]) - max) * scale;
    const int64_t column = p - row;
    store(gradients + column, gradient);
    if (target >= column && target < column + W) store(gradients + target, target_gradient);
  });
}

template <typename X, typename G>
void launch_classifier(Tensor logits, G* dlogits, Tensor losses, Tensor targets, int64_t vocab_size, float dloss,
                       Tensor unscale, float inverse, cudaStream_t stream) {
  constexpr int W = Packed<X>::size;
  const int64_t Vp = logits.last();
  const int64_t vectors = Vp % W == 0 ? vocab_size / W * W : 0;
  const int64_t threads = min(round_up(divide_up(Vp, W), kWarp), kMaxThreads);
  launch(fused_classifier_kernel<X, G>, unsigned(logits.rows()), unsigned(threads), 0, stream, logits.as<X>(), dlogits,
         losses.as<float>(), targets.as<int32_t>(), int(vocab_size), int(Vp), int(vectors), dloss, unscale.as<float>(),
         inverse);
}

}  // namespace

void CudaOps::fused_classifier(Tensor logits, Tensor losses, Tensor targets, int64_t vocab_size, float dloss,
                               bool write_dlogits) {
  dispatch(logits.dtype, [&](auto zero) {
    using X = decltype(zero);
    X* dlogits = write_dlogits ? logits.as<X>() : nullptr;
    launch_classifier<X>(logits, dlogits, losses, targets, vocab_size, dloss, Tensor{}, 1, stream_);
  });
}

// A power of two scales exactly, so dloss takes it along.
void CudaOps::fp8_classifier(Fp8Matrix dlogits, Tensor losses, Tensor logits, Tensor targets, int64_t vocab_size,
                             float dloss) {
  constexpr double kLargest = 57344;  // in E5M2
  const int exponent = std::ilogb(kLargest / dloss);
  launch_classifier<bf16>(logits, dlogits.values.as<e5m2>(), losses, targets, vocab_size, std::ldexp(dloss, exponent),
                          dlogits.unscale, std::ldexp(1.0f, -exponent), stream_);
}

}  // namespace llmc::cuda
