// Layer normalisation.
//
// Forward: a warp takes a row, a block takes a long one. The first pass over the row keeps it in shared memory (a
// thread reads back only what it wrote itself, so there is no barrier); the second takes the variance about the mean,
// which does not cancel for rows far from zero; the third writes the output. So every tensor is read once, unless a row
// is too long to be kept.
//
// Backward: the rows are cut into groups (ops/workspace.h). A block takes a group; each of its threads takes 128 bits
// of every row, always the same columns, and has their shares of dweight and dbias in registers. The block forms the
// means of two rows with one barrier, then writes their dx: every tensor is read once. Rows too long for that take two
// kernels: one for dweight and dbias, one for dx, a block per row. In the end the groups are added in a fixed order
// (column_sums.cuh).
#include "core/dispatch.h"
#include "core/integers.h"
#include "cuda/column_sums.cuh"
#include "cuda/cuda_ops.h"
#include "cuda/elements.cuh"
#include "cuda/fp8.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "ops/workspace.h"

namespace llmc::cuda {
namespace {

constexpr float kEps = 1e-5f;
constexpr int kThreads = 256;                 // of a block, unless something else is said
constexpr size_t kWarpRowBytes = 4 << 10;     // longest row of a warp: eight 128-bit loads for each lane
constexpr size_t kSharedRowBytes = 48 << 10;  // longest row that is kept, so that two blocks fit on a GPU

// Σ over the threads that share a row: a warp, or the block.
template <int kRowThreads>
__device__ float row_sum(float x) {
  if constexpr (kRowThreads == kWarp) {
    return warp_sum(x);
  } else {
    return block_sum(x);
  }
}

// Where the output goes, element by element: as X, or in FP8 with its largest value, unless that is all that is asked for.
template <typename X>
struct Plain {
  X* out;

  __device__ void store(int64_t at, const float (&y)[Packed<X>::size]) { store_elements(out + at, y); }
  __device__ void finish() {}
};
struct InE4M3 {
  uint8_t* out;
  uint32_t* amax;
  const float* scale;
  uint32_t largest = 0;

  __device__ void store(int64_t at, const float (&y)[8]) {
    for (const float value : y) largest = max(largest, magnitude(value));
    if (out) *reinterpret_cast<uint2*>(out + at) = quantized<E4M3>(y, *scale);
  }
  __device__ void finish() {
    if (amax) raise_amax<kThreads>(amax, largest);
  }
};

// One row; thread is this thread's number among the kRowThreads that share it. All forms of the forward pass use it,
// so that they give the same bits: first_pass(c) gives the row's elements from c on, once; kept(c) gives them again. The
// output begins at `first`.
template <typename X, int kRowThreads, typename Out, typename FirstPass, typename Kept>
__device__ void normalise(Out& out, int64_t first, float* mean_out, float* rstd_out, const X* weight, const X* bias,
                          int C, int thread, FirstPass first_pass, Kept kept) {
  constexpr int W = Packed<X>::size;
  float sum = 0;
  for (int c = thread * W; c < C; c += kRowThreads * W) {
    const Packed<X> x = first_pass(c);
    for (int i = 0; i < W; i++) sum += to_float(x[i]);
  }
  const float mean = row_sum<kRowThreads>(sum) / float(C);

  float square = 0;
  for (int c = thread * W; c < C; c += kRowThreads * W) {
    const Packed<X> x = kept(c);
    for (int i = 0; i < W; i++) square += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
  }
  const float rstd = 1.0f / sqrtf(row_sum<kRowThreads>(square) / float(C) + kEps);

  for (int c = thread * W; c < C; c += kRowThreads * W) {
    const Packed<X> x = kept(c), w = load128(weight + c), b = load128(bias + c);
    float y[W];
    for (int i = 0; i < W; i++) y[i] = (to_float(x[i]) - mean) * rstd * to_float(w[i]) + to_float(b[i]);
    out.store(first + c, y);
  }
  if (thread == 0) {
    *mean_out = mean;
    *rstd_out = rstd;
  }
}

// The product that follows could compute this while it loads its rows: its arithmetic takes three to eight times as long as
// its memory. It does not pay. By llmc/roofline.py all forward layernorms are 1.9 % of a step of 124M on 8 A100 and 2.7 % on
// H100, of 1558M 1.4 and 2.2 %. cuBLASLt has no such prologue; a product of our own at 90 % of its rate would gain 0.8 % with
// 124M on A100 and lose with 1558M. On H100, where mma.sync has 62 % of the peak, at the share of it that products reach on
// A100, it would lose with both. And the backward pass takes the output: it must be written all the same, or, as with -r 2,
// computed once more.
//
// kResidual: residual = a + b is normalised. Otherwise a is, and residual and b are not used.
// kKeep: the block has shared memory for its rows.
template <typename X, typename Out, int kRowThreads, bool kKeep, bool kResidual>
__global__ void __launch_bounds__(kThreads)
    layernorm_forward_kernel(Out out, float* mean, float* rstd, X* residual, const X* a, const X* b, const X* weight,
                             const X* bias, int64_t N, int C) {
  after_previous_kernel();
  constexpr int kRows = kThreads / kRowThreads;
  LLMC_DYNAMIC_SHARED(X, shared);
  const int row = threadIdx.x / kRowThreads, thread = threadIdx.x % kRowThreads;
  const int64_t n = int64_t(blockIdx.x) * kRows + row;
  if (n < N) {
    X* kept_row = shared + row * C;
    const X* stored_row = (kResidual ? residual : a) + n * C;

    const auto first_pass = [=](int c) {
      Packed<X> x;
      if constexpr (kResidual) {
        x = load128_once(a + n * C + c);
        const Packed<X> y = load128_once(b + n * C + c);
        for (int i = 0; i < Packed<X>::size; i++) x[i] = from_float<X>(to_float(x[i]) + to_float(y[i]));
        store128(residual + n * C + c, x);
      } else {
        x = load128(a + n * C + c);
      }
      if constexpr (kKeep) store128(kept_row + c, x);
      return x;
    };
    const auto kept = [=](int c) { return load128(kKeep ? kept_row + c : stored_row + c); };
    normalise<X, kRowThreads>(out, n * C, &mean[n], &rstd[n], weight, bias, C, thread, first_pass, kept);
  }
  out.finish();
}

template <typename X, bool kResidual, typename Out>
void forward(Out out, float* mean, float* rstd, X* residual, const X* a, const X* b, const X* weight, const X* bias,
             int64_t N, int64_t C, cudaStream_t stream) {
  const size_t row_bytes = size_t(C) * sizeof(X);
  if (row_bytes <= kWarpRowBytes) {
    constexpr int kRows = kThreads / kWarp;
    launch(layernorm_forward_kernel<X, Out, kWarp, true, kResidual>, blocks_for(N, kRows), kThreads, kRows * row_bytes,
           stream, out, mean, rstd, residual, a, b, weight, bias, N, int(C));
  } else if (row_bytes <= kSharedRowBytes) {
    launch(layernorm_forward_kernel<X, Out, kThreads, true, kResidual>, unsigned(N), kThreads, row_bytes, stream, out,
           mean, rstd, residual, a, b, weight, bias, N, int(C));
  } else {
    launch(layernorm_forward_kernel<X, Out, kThreads, false, kResidual>, unsigned(N), kThreads, 0, stream, out, mean,
           rstd, residual, a, b, weight, bias, N, int(C));
  }
}

// 128 bits of a row in the backward pass: xhat, and dx from the row's means of g = dout·weight and of g·xhat.
template <typename X>
struct RowVector {
  static constexpr int W = Packed<X>::size;
  Packed<X> dout, x;

  __device__ float xhat(int i, float mean, float rstd) const { return (to_float(x[i]) - mean) * rstd; }

  __device__ Packed<X> new_dx(const Packed<X>& dx, const float (&weight)[W], float mean, float rstd, float g_mean,
                              float gx_mean) const {
    Packed<X> result;
    for (int i = 0; i < W; i++) {
      const float g = to_float(dout[i]) * weight[i];
      result[i] = from_float<X>(to_float(dx[i]) + rstd * (g - g_mean - xhat(i, mean, rstd) * gx_mean));
    }
    return result;
  }
};

// A group of rows, kRows at a time, by a block with a thread for each vector of columns.
// partials f32 (groups,2,C): the groups' shares of dweight and dbias.
template <typename X, int kMaxThreads, int kRows>
__global__ void __launch_bounds__(kMaxThreads)
    layernorm_backward_kernel(X* dx, float* partials, const X* dout, const X* x, const X* weight, const float* means,
                              const float* rstds, int64_t N, int C) {
  after_previous_kernel();
  constexpr int W = Packed<X>::size;
  constexpr int kWarps = kMaxThreads / kWarp;
  // Of each warp and row: Σ g and Σ g·xhat. Two sets take turns, so that one barrier for each is enough.
  __shared__ float warp_sums[2][2 * kRows][kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int c = threadIdx.x * W;
  const bool active = c < C;
  const float scale = 1.0f / float(C);
  float w[W] = {}, dweight[W] = {}, dbias[W] = {};
  if (active) load_elements(w, weight + c);

  const int64_t group = blockIdx.x, groups = gridDim.x;
  const int64_t end = (group + 1) * N / groups;
  int set = 0;
  for (int64_t first = group * N / groups; first < end; first += kRows) {
    RowVector<X> rows[kRows];
    Packed<X> old_dx[kRows];
    float mean[kRows], rstd[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int64_t n = first + r;
      const bool valid = active && n < end;
      rows[r].dout = valid ? load128_once(dout + n * C + c) : Packed<X>::zeros();
      rows[r].x = valid ? load128_once(x + n * C + c) : Packed<X>::zeros();
      old_dx[r] = valid ? load128(dx + n * C + c) : Packed<X>::zeros();
      mean[r] = n < end ? means[n] : 0.0f;
      rstd[r] = n < end ? rstds[n] : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      float g_sum = 0, gx_sum = 0;
      for (int i = 0; i < W; i++) {
        const float d = to_float(rows[r].dout[i]), xhat = rows[r].xhat(i, mean[r], rstd[r]), g = d * w[i];
        g_sum += g;
        gx_sum += g * xhat;
        dweight[i] += d * xhat;
        dbias[i] += d;
      }
      g_sum = warp_sum(g_sum);
      gx_sum = warp_sum(gx_sum);
      if (lane == 0) {
        warp_sums[set][2 * r][warp] = g_sum;
        warp_sums[set][2 * r + 1][warp] = gx_sum;
      }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const float g_mean = warp_sum(lane < warps ? warp_sums[set][2 * r][lane] : 0.0f) * scale;
      const float gx_mean = warp_sum(lane < warps ? warp_sums[set][2 * r + 1][lane] : 0.0f) * scale;
      const int64_t n = first + r;
      if (active && n < end) {
        store128(dx + n * C + c, rows[r].new_dx(old_dx[r], w, mean[r], rstd[r], g_mean, gx_mean));
      }
    }
    set ^= 1;
  }
  if (!active) return;
  store_elements(partials + (group * 2) * C + c, dweight);
  store_elements(partials + (group * 2 + 1) * C + c, dbias);
}

// For long rows: dx, a block per row. The second pass finds dout and x in the L2 cache, if not in L1.
template <typename X>
__global__ void __launch_bounds__(kThreads) layernorm_dx_kernel(X* dx, const X* dout, const X* x, const X* weight,
                                                                const float* means, const float* rstds, int C) {
  after_previous_kernel();
  constexpr int W = Packed<X>::size;
  const int64_t n = blockIdx.x;
  const float mean = means[n], rstd = rstds[n];
  float g_sum = 0, gx_sum = 0;
  for (int c = threadIdx.x * W; c < C; c += kThreads * W) {
    const RowVector<X> row = {load128(dout + n * C + c), load128(x + n * C + c)};
    float w[W];
    load_elements(w, weight + c);
    for (int i = 0; i < W; i++) {
      const float g = to_float(row.dout[i]) * w[i];
      g_sum += g;
      gx_sum += g * row.xhat(i, mean, rstd);
    }
  }
  const float g_mean = block_sum(g_sum) / float(C);
  const float gx_mean = block_sum(gx_sum) / float(C);
  for (int c = threadIdx.x * W; c < C; c += kThreads * W) {
    const RowVector<X> row = {load128(dout + n * C + c), load128(x + n * C + c)};
    float w[W];
    load_elements(w, weight + c);
    store128(dx + n * C + c, row.new_dx(load128(dx + n * C + c), w, mean, rstd, g_mean, gx_mean));
  }
}

// For long rows: the groups' shares of dweight and dbias, a thread per vector of columns and group blockIdx.y.
template <typename X>
__global__ void __launch_bounds__(kThreads)
    layernorm_partials_kernel(float* partials, const X* dout, const X* x, const float* means, const float* rstds,
                              int64_t N, int C) {
  after_previous_kernel();
  constexpr int W = Packed<X>::size;
  const int64_t c = thread_index() * W;
  if (c >= C) return;
  const int64_t group = blockIdx.y, groups = gridDim.y;
  const int64_t end = (group + 1) * N / groups;
  float dweight[W] = {}, dbias[W] = {};
#pragma unroll 4
  for (int64_t n = group * N / groups; n < end; n++) {
    const RowVector<X> row = {load128_once(dout + n * C + c), load128_once(x + n * C + c)};
    for (int i = 0; i < W; i++) {
      dweight[i] += to_float(row.dout[i]) * row.xhat(i, means[n], rstds[n]);
      dbias[i] += to_float(row.dout[i]);
    }
  }
  store_elements(partials + (group * 2) * C + c, dweight);
  store_elements(partials + (group * 2 + 1) * C + c, dbias);
}

template <typename X>
void backward(X* dx, float* partials, const X* dout, const X* x, const X* weight, const float* mean, const float* rstd,
              int64_t groups, int64_t N, int64_t C, cudaStream_t stream) {
  const int64_t threads = round_up(C / Packed<X>::size, kWarp);
  if (threads <= 256) {
    launch(layernorm_backward_kernel<X, 256, 2>, unsigned(groups), unsigned(threads), 0, stream, dx, partials, dout, x,
           weight, mean, rstd, N, int(C));
  } else if (threads <= 1024) {
    launch(layernorm_backward_kernel<X, 1024, 1>, unsigned(groups), unsigned(threads), 0, stream, dx, partials, dout, x,
           weight, mean, rstd, N, int(C));
  } else {
    launch(layernorm_partials_kernel<X>, dim3(blocks_for(threads, kThreads), unsigned(groups)), kThreads, 0, stream,
           partials, dout, x, mean, rstd, N, int(C));
    launch(layernorm_dx_kernel<X>, unsigned(N), kThreads, 0, stream, dx, dout, x, weight, mean, rstd, int(C));
  }
}

}  // namespace

void CudaOps::layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor x, Tensor weight, Tensor bias) {
  check_channels("layernorm_forward", x.last());
  dispatch(x.dtype, [&](auto zero) {
    using X = decltype(zero);
    forward<X, false>(Plain<X>{out.as<X>()}, mean.as<float>(), rstd.as<float>(), nullptr, x.as<X>(), nullptr,
                      weight.as<X>(), bias.as<X>(), x.rows(), x.last(), stream_);
  });
}

void CudaOps::residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd, Tensor a, Tensor b,
                                         Tensor weight, Tensor bias) {
  check_channels("residual_layernorm_forward", out.last());
  dispatch(out.dtype, [&](auto zero) {
    using X = decltype(zero);
    forward<X, true>(Plain<X>{out.as<X>()}, mean.as<float>(), rstd.as<float>(), residual.as<X>(), a.as<X>(), b.as<X>(),
                     weight.as<X>(), bias.as<X>(), out.rows(), out.last(), stream_);
  });
}

void CudaOps::fp8_layernorm_forward(const Fp8Out& out, Tensor residual, Tensor mean, Tensor rstd, Tensor a, Tensor b,
                                    Tensor weight, Tensor bias) {
  check_channels("fp8_layernorm_forward", a.last());
  const InE4M3 to = {out.values.as<uint8_t>(), out.amax.as<uint32_t>(), out.scale.as<float>()};
  const auto run = residual ? forward<bf16, true, InE4M3> : forward<bf16, false, InE4M3>;
  run(to, mean.as<float>(), rstd.as<float>(), residual.as<bf16>(), a.as<bf16>(), b.as<bf16>(), weight.as<bf16>(),
      bias.as<bf16>(), a.rows(), a.last(), stream_);
}

void CudaOps::layernorm_backward(Tensor dx, Tensor dweight, Tensor dbias, Tensor dout, Tensor x, Tensor weight,
                                 Tensor mean, Tensor rstd, bool accumulate) {
  const int64_t N = x.rows(), C = x.last(), groups = workspace::groups(N, C);
  check_channels("layernorm_backward", C);
  float* partials = static_cast<float*>(scratch(workspace::layernorm_backward(N, C)));
  dispatch(x.dtype, dweight.dtype, [&](auto zero, auto g) {
    using X = decltype(zero);
    using G = decltype(g);
    backward(dx.as<X>(), partials, dout.as<X>(), x.as<X>(), weight.as<X>(), mean.as<float>(), rstd.as<float>(), groups,
             N, C, stream_);
    add_groups<G>({dweight.as<G>(), dbias.as<G>()}, partials, groups, C, accumulate, stream_);
  });
}

}  // namespace llmc::cuda
