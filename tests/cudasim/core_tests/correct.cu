// Kernels whose results tests/test_cudasim.py knows.
#include <cuda_bf16.h>

#include "launch.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

// Static shared memory of a template: every instantiation has its own.
template <typename T, int kWarps>
__device__ T block_sum(T x) {
  __shared__ T sums[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(kAll, x, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  T total = 0;
  for (int w = 0; w < kWarps; w++) total += sums[w];
  __syncthreads();
  return total;
}

// sum = the sum of all n values of x, partial sums of the blocks in partial (gridDim.x), arrived = 0 before and after.
template <typename T>
__global__ void __launch_bounds__(128) sum_kernel(T* sum, T* partial, unsigned* arrived, const T* x, int n) {
  __shared__ bool last;
  T own = 0;
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x)) own += x[i];
  own = block_sum<T, 4>(own);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = own;
    __threadfence();
    last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  own = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) own += partial[i];
  own = block_sum<T, 4>(own);
  if (threadIdx.x == 0) *sum = own;
}

// order[k] = the k-th thread of the grid that ran.
__global__ void order_kernel(int* order, int* count) {
  order[atomicAdd(count, 1)] = int(blockIdx.x * blockDim.x + threadIdx.x);
}

__global__ void add_kernel(float* x, int n, float value) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) x[i] += value;
}

// out (10,32): what the warp functions give each lane.
__global__ void warp_kernel(int* out, int width) {
  const int lane = int(threadIdx.x);
  int* own = out + lane;
  own[0 * 32] = __shfl_sync(kAll, lane, 3, width);
  own[1 * 32] = __shfl_up_sync(kAll, lane, 3, width);
  own[2 * 32] = __shfl_down_sync(kAll, lane, 3, width);
  own[3 * 32] = __shfl_xor_sync(kAll, lane, 5, width);
  own[4 * 32] = int(__ballot_sync(kAll, lane % 3 == 0));
  own[5 * 32] = __any_sync(kAll, lane == 7) + 2 * __all_sync(kAll, lane >= 0) + 4 * __any_sync(kAll, lane < 0);
  own[6 * 32] = int(__match_any_sync(kAll, lane / 5));
  own[7 * 32] = __reduce_add_sync(kAll, lane - 16);
  own[8 * 32] = __reduce_min_sync(kAll, lane - 16);
  own[9 * 32] = lane % 2 ? int(__reduce_max_sync(0xaaaaaaaau, unsigned(lane)))
                         : int(__reduce_or_sync(0x55555555u, unsigned(lane)));
}

// out (3): of a block of 96 threads.
__global__ void vote_kernel(int* out) {
  const int third = int(threadIdx.x) % 3 == 0;
  const int count = __syncthreads_count(third);
  const int all = __syncthreads_and(third);
  const int any = __syncthreads_or(third);
  if (threadIdx.x == 95) {
    out[0] = count;
    out[1] = all;
    out[2] = any;
  }
}

__global__ void integer_kernel(unsigned* out, unsigned x, unsigned y) {
  out[0] = __umulhi(x, y);
  out[1] = __funnelshift_l(x, y, 36);
  out[2] = __funnelshift_r(x, y, 4);
  out[3] = unsigned(__popc(x));
  out[4] = unsigned(__clz(int(x)));
  out[5] = unsigned(__ffs(int(x)));
  out[6] = __float_as_uint(__uint_as_float(x));
}

__global__ void atomic_kernel(unsigned* out) {
  const unsigned i = threadIdx.x + blockIdx.x * blockDim.x;
  atomicAdd(&out[0], i);
  atomicMax(&out[1], i);
  atomicMin(&out[2], i);
  atomicOr(&out[3], 1u << i % 32);
  atomicXor(&out[4], i);
  atomicCAS(&out[5], 0u, 7u);
  atomicSub(&out[6], 1u);
  atomicExch(&out[7], 9u);
  atomicDec(&out[8], 100u);
}

// Almost the most parameters that a kernel may have.
struct Large {
  int values[8188];
};
__global__ void parameter_kernel(int* out, const __grid_constant__ Large large) {
  out[threadIdx.x] = large.values[threadIdx.x * 8];
}

// bf16 in shared memory: a type with constructors.
__global__ void bf16_kernel(__nv_bfloat16* x) {
  __shared__ __nv_bfloat16 values[64];
  values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = __float2bfloat16_rn(__bfloat162float(values[63 - threadIdx.x]) * 2.0f);
}

}  // namespace

EXPORT int sum_floats(float* sum, float* partial, unsigned* arrived, const float* x, int n, int blocks) {
  return launch(sum_kernel<float>, unsigned(blocks), 128, 0, nullptr, sum, partial, arrived, x, n);
}
EXPORT int sum_ints(int* sum, int* partial, unsigned* arrived, const int* x, int n, int blocks) {
  return launch(sum_kernel<int>, unsigned(blocks), 128, 0, nullptr, sum, partial, arrived, x, n);
}
EXPORT int record_order(int* order, int* count, int blocks, int threads) {
  return launch(order_kernel, unsigned(blocks), unsigned(threads), 0, nullptr, order, count);
}
EXPORT int add(float* x, int n, float value, cudaStream_t stream) {
  return launch(add_kernel, unsigned(n + 63) / 64, 64, 0, stream, x, n, value);
}
EXPORT int warp_functions(int* out, int width) { return launch(warp_kernel, 1, 32, 0, nullptr, out, width); }
EXPORT int votes(int* out) { return launch(vote_kernel, 1, 96, 0, nullptr, out); }
EXPORT int integers(unsigned* out, unsigned x, unsigned y) {
  return launch(integer_kernel, 1, 1, 0, nullptr, out, x, y);
}
EXPORT int atomics(unsigned* out) { return launch(atomic_kernel, 3, 32, 0, nullptr, out); }
EXPORT int parameters(int* out) {
  Large large;
  for (int i = 0; i < 8188; i++) large.values[i] = i;
  return launch(parameter_kernel, 1, 1000, 0, nullptr, out, large);
}
EXPORT int reverse_bf16(__nv_bfloat16* x) { return launch(bf16_kernel, 1, 64, 0, nullptr, x); }
