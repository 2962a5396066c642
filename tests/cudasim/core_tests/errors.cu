// One bug for every kind of report, each beside its correct twin. tests/test_cudasim.py runs both and looks for the
// comments "here: NAME" (the place that must be reported) and "other: NAME" (the place of the conflicting access).
#include <cstring>
#include <map>
#include <string>
#include <thread>

#include "cudasim/control.h"
#include "cudasim/ptx.h"
#include "launch.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

// --- order within a block --------------------------------------------------------------------------------------------

template <bool kWrong>
__global__ void missing_syncthreads(float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = float(threadIdx.x);  // other: missing_syncthreads
  if (!kWrong) __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];  // here: missing_syncthreads
}

// The second barrier of a reduction that is called twice.
template <bool kWrong>
__device__ float sum_of_warps(float x) {
  __shared__ float sums[2];
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAll, x, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;  // here: missing_second_barrier
  __syncthreads();
  x = sums[0] + sums[1];  // other: missing_second_barrier
  if (!kWrong) __syncthreads();
  return x;
}
template <bool kWrong>
__global__ void missing_second_barrier(float* out) {
  const float a = sum_of_warps<kWrong>(1.0f);
  const float b = sum_of_warps<kWrong>(2.0f);
  out[threadIdx.x] = a + b;
}

template <bool kWrong>
__global__ void missing_syncwarp(float* out) {
  __shared__ float values[32];
  values[threadIdx.x] = float(threadIdx.x);  // other: missing_syncwarp
  if (!kWrong) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];  // here: missing_syncwarp
}

// A shuffle makes lanes meet but orders no memory.
template <bool kWrong>
__global__ void shuffle_is_no_fence(float* out) {
  __shared__ float values[32];
  values[threadIdx.x] = float(threadIdx.x);  // other: shuffle_is_no_fence
  if (kWrong) {
    out[threadIdx.x] = __shfl_sync(kAll, 1.0f, 0);
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = values[threadIdx.x ^ 1];  // here: shuffle_is_no_fence
}

// Half warps may exchange data only among themselves, although all lanes have written when the first one reads.
template <bool kWrong>
__global__ void half_warp_sync(float* out) {
  __shared__ float values[32];
  const unsigned lane = threadIdx.x, half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  values[lane] = float(lane);  // other: half_warp_sync
  out[lane] = __shfl_sync(kAll, 1.0f, 0);
  __syncwarp(half);
  out[lane] = values[kWrong ? 31 - lane : lane ^ 15];  // here: half_warp_sync
}

template <bool kWrong>
__global__ void atomics_before_zero(int* out) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;  // other: atomics_before_zero
  if (!kWrong) __syncthreads();
  atomicAdd(&count, 1);  // here: atomics_before_zero
  __syncthreads();
  out[threadIdx.x] = count;
}

template <bool kWrong>
__global__ void race_in_dynamic_shared(float* out) {
  float* values = reinterpret_cast<float*>(cudasim::dynamic_shared());
  values[threadIdx.x] = 1.0f;  // other: race_in_dynamic_shared
  if (!kWrong) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 32) % 64];  // here: race_in_dynamic_shared
}

// Threads of a block that hand data on through global memory.
template <bool kWrong>
__global__ void race_in_global(float* out) {
  out[threadIdx.x] = 1.0f;  // other: race_in_global
  if (!kWrong) __syncthreads();
  out[64 + threadIdx.x] = out[63 - threadIdx.x];  // here: race_in_global
}

// --- order between blocks --------------------------------------------------------------------------------------------

template <bool kWrong>
__global__ void sum_without_atomic(int* out) {
  if (kWrong) {
    out[0] += 1;  // here: sum_without_atomic
  } else {
    atomicAdd(&out[0], 1);
  }
}

template <bool kWrong>
__global__ void neighbour_block(float* out) {
  const unsigned i = blockIdx.x * (blockDim.x - kWrong) + threadIdx.x;
  out[i] = 1.0f;  // here: neighbour_block
}

// The last block to arrive sums what all blocks have written.
enum class Fence { Missing, TooEarly, Right };
template <Fence kFence>
__device__ void last_block_sums(float* partial, unsigned* arrived, float* out) {
  __shared__ bool last;
  if (kFence == Fence::TooEarly) __threadfence();
  partial[blockIdx.x * blockDim.x + threadIdx.x] = float(blockIdx.x);  // other: missing_fence, early_fence
  if (kFence == Fence::Right) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; i++)
    sum += partial[i * blockDim.x + threadIdx.x];  // here: missing_fence, early_fence
  out[threadIdx.x] = sum;
}
template <bool kWrong>
__global__ void missing_fence(float* out) {
  auto* arrived = reinterpret_cast<unsigned*>(out);
  last_block_sums<kWrong ? Fence::Missing : Fence::Right>(out + 64, arrived, out + 512);
}
template <bool kWrong>
__global__ void early_fence(float* out) {
  auto* arrived = reinterpret_cast<unsigned*>(out);
  last_block_sums<kWrong ? Fence::TooEarly : Fence::Right>(out + 64, arrived, out + 512);
}

// --- initialisation --------------------------------------------------------------------------------------------------

template <bool kWrong>
__global__ void uninitialised_shared(float* out) {
  __shared__ float values[64];
  if (!kWrong || threadIdx.x > 0) values[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];  // here: uninitialised_shared
}

// Shared memory of the block before is gone, even if it is still there.
template <bool kWrong>
__global__ void shared_of_block_before(float* out) {
  __shared__ float value;
  if (threadIdx.x == 0 && (!kWrong || blockIdx.x == 0)) value = 1.0f;
  __syncthreads();
  out[blockIdx.x] = value;  // here: shared_of_block_before
}

__global__ void copy_one(float* out, const float* x) {
  out[threadIdx.x] = x[threadIdx.x];  // here: uninitialised_global, use_after_free, host_memory, pinned_memory
}

// --- bounds and alignment --------------------------------------------------------------------------------------------

template <bool kWrong>
__global__ void one_too_many(float* out, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n + kWrong) out[i] = 1.0f;  // here: one_too_many
}

template <bool kWrong>
__global__ void far_outside(float* out, int n) {
  out[threadIdx.x] = out[kWrong ? n + 5000 : 0];  // here: far_outside
}

template <bool kWrong>
__global__ void negative_index(float* out) {
  const int i = int(threadIdx.x) - kWrong;
  out[i] = 1.0f;  // here: negative_index
}

template <bool kWrong>
__global__ void array_index(float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + kWrong];  // here: array_index
}

template <bool kWrong>
__global__ void dynamic_shared_bounds(float* out) {
  float* values = reinterpret_cast<float*>(cudasim::dynamic_shared());
  values[threadIdx.x + kWrong] = 1.0f;  // here: dynamic_shared_bounds
  out[threadIdx.x] = values[threadIdx.x + kWrong];
}

template <bool kWrong>
__global__ void misaligned(float* out) {
  *reinterpret_cast<float4*>(out + 4 * threadIdx.x + kWrong) = float4{1, 2, 3, 4};  // here: misaligned
}

// --- barriers and warp operations ------------------------------------------------------------------------------------

template <bool kWrong>
__global__ void divergent_barrier(float* out) {
  if (kWrong && threadIdx.x < 32) {
    __syncthreads();  // other: divergent_barrier
  } else {
    __syncthreads();  // here: divergent_barrier
  }
  out[threadIdx.x] = 1.0f;
}

template <bool kWrong>
__global__ void not_in_own_mask(unsigned* out) {
  out[threadIdx.x] = __ballot_sync(kWrong ? 0x7fffffffu : kAll, 1);  // here: not_in_own_mask
}

template <bool kWrong>
__global__ void lanes_have_exited(float* out) {
  if (threadIdx.x >= 16) return;
  out[threadIdx.x] = __shfl_xor_sync(kWrong ? kAll : 0xffffu, 1.0f, 1);  // here: lanes_have_exited
}

template <bool kWrong>
__global__ void masks_differ(unsigned* out) {
  const unsigned mask = kWrong && threadIdx.x == 3 ? 0x0000ffffu : kAll;
  out[threadIdx.x] = __ballot_sync(mask, 1);  // here: masks_differ
}

template <bool kWrong>
__global__ void operations_differ(float* out) {
  if (kWrong && threadIdx.x < 16) {
    out[threadIdx.x] = float(__any_sync(kAll, 1));  // other: operations_differ
  } else {
    out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);  // here: operations_differ
  }
}

// One half of the warp waits for the other at a barrier, the other in a shuffle.
template <bool kWrong>
__global__ void deadlock(float* out) {
  if (!kWrong || threadIdx.x < 16) __syncthreads();  // other: deadlock
  out[threadIdx.x] = __shfl_sync(kAll, 1.0f, 0);     // here: deadlock
}

// --- the rest --------------------------------------------------------------------------------------------------------

template <bool kWrong>
__global__ void local_of_other_thread(float* out) {
  __shared__ float* address;
  float own = float(threadIdx.x);
  if (threadIdx.x == 0) address = &own;
  __syncthreads();
  out[threadIdx.x] = kWrong ? *address : own;  // here: local_of_other_thread
  __syncthreads();
}

template <bool kWrong>
__global__ void trap(float* out) {
  if (kWrong && threadIdx.x == 5) __trap();  // here: trap
  out[threadIdx.x] = 1.0f;
}

// 4 KiB of local variables in each call.
__device__ __attribute__((noinline)) float recurse(int depth, float x) {
  volatile float values[1024];
  values[depth % 1024] = x;
  return depth == 0 ? x : recurse(depth - 1, x + values[depth % 1024]) + 1;  // here: stack_overflow
}
template <bool kWrong>
__global__ void stack_overflow(float* out) {
  out[threadIdx.x] = recurse(kWrong ? 1000 : 4, 1.0f);
}

template <bool kWrong>
__global__ void static_and_dynamic_shared(float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = 1.0f;  // here: static_and_dynamic_shared
  __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void nothing(float*) {}

// --- kernels that begin early ----------------------------------------------------------------------------------------

template <bool kWrong>
__global__ void early_read(float* out) {
  const float wrong = kWrong ? out[threadIdx.x] : 0;  // here: early_read
  cudasim::after_previous_kernel();
  out[threadIdx.x] += wrong;
}

template <bool kWrong>
__global__ void early_write(float* out) {
  if (!kWrong) cudasim::after_previous_kernel();
  out[threadIdx.x] = 1.0f;  // here: early_write, early_write_in_graph
  if (kWrong) cudasim::after_previous_kernel();
}

template <bool kWrong>
__global__ void early_atomic(int* out) {
  if (!kWrong) cudasim::after_previous_kernel();
  atomicAdd(out, 1);  // here: early_atomic
  if (kWrong) cudasim::after_previous_kernel();
}

template <bool kWrong>
__global__ void early_copy(float* out) {
  auto* values = reinterpret_cast<float4*>(cudasim::dynamic_shared());
  if (!kWrong) cudasim::after_previous_kernel();
  cudasim::cp_async_16(&values[threadIdx.x], &reinterpret_cast<float4*>(out)[threadIdx.x], true);  // here: early_copy
  cudasim::cp_async_commit();
  cudasim::cp_async_wait<0>();
  if (kWrong) cudasim::after_previous_kernel();
  out[512 + threadIdx.x] = values[threadIdx.x].x;
}

// Some threads have waited, others write.
template <bool kWrong>
__global__ void waited_elsewhere(float* out) {
  if (!kWrong || threadIdx.x < 32) cudasim::after_previous_kernel();
  __syncthreads();
  out[threadIdx.x] = 1.0f;  // here: waited_elsewhere
}

// A block that has nothing to do.
template <bool kWrong>
__global__ void early_end(float* out) {  // here: early_end
  __shared__ float values[32];
  values[threadIdx.x] = 1.0f;
  if (kWrong && blockIdx.x == 1) return;
  cudasim::after_previous_kernel();
  if (blockIdx.x == 0) out[threadIdx.x] = values[threadIdx.x];
}

// --- running them ----------------------------------------------------------------------------------------------------

constexpr int kFloats = 1024;

// Device memory of kFloats floats, all zero.
float* make_zeros() {
  float* p = nullptr;
  cudaMalloc(reinterpret_cast<void**>(&p), kFloats * sizeof(float));
  cudaMemset(p, 0, kFloats * sizeof(float));
  return p;
}

template <typename T>
cudaError_t run_simple(void (*kernel)(T*), dim3 grid, dim3 block, size_t shared_bytes = 0) {
  float* out = make_zeros();
  cudaError_t status = launch(kernel, grid, block, shared_bytes, nullptr, reinterpret_cast<T*>(out));
  if (status == cudaSuccess) status = cudaDeviceSynchronize();
  cudaFree(out);
  return status;
}

cudaError_t run_copy(float* source) {
  float* out = make_zeros();
  launch(copy_one, 1, 32, 0, nullptr, out, source);
  const cudaError_t status = cudaDeviceSynchronize();
  cudaFree(out);
  return status;
}

template <bool kWrong>
cudaError_t run_uninitialised_global() {
  float* source = nullptr;
  cudaMalloc(reinterpret_cast<void**>(&source), 128);
  cudaMemset(source, 0, kWrong ? 124 : 128);
  const cudaError_t status = run_copy(source);
  cudaFree(source);
  return status;
}

template <bool kWrong>
cudaError_t run_use_after_free() {
  float* source = make_zeros();
  if (kWrong) cudaFree(source);
  const cudaError_t status = run_copy(source);
  if (!kWrong) cudaFree(source);
  return status;
}

template <bool kWrong>
cudaError_t run_host_memory() {
  float host[32] = {};
  float* device = make_zeros();
  const cudaError_t status = run_copy(kWrong ? host : device);
  cudaFree(device);
  return status;
}

template <bool kWrong>
cudaError_t run_pinned_memory() {
  float *pinned = nullptr, *device = make_zeros();
  cudaMallocHost(reinterpret_cast<void**>(&pinned), 128);
  std::memset(pinned, 0, 128);
  const cudaError_t status = run_copy(kWrong ? pinned : device);
  cudaFree(device);
  cudaFreeHost(pinned);
  return status;
}

template <bool kWrong>
cudaError_t run_host_access() {
  float *device = make_zeros(), host = 0;
  if (!kWrong) cudaMemcpy(&host, device, sizeof host, cudaMemcpyDeviceToHost);
  volatile float value = kWrong ? *device : host;  // here: host_access
  (void)value;
  return cudaFree(device);
}

template <bool kWrong>
cudaError_t run_double_free() {
  float* device = make_zeros();
  const cudaError_t status = cudaFree(device);
  return kWrong ? cudaFree(device) : status;
}

template <bool kWrong>
cudaError_t run_copy_direction() {
  float *device = make_zeros(), host = 0;
  const cudaError_t status =
      cudaMemcpy(device, &host, sizeof host, kWrong ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice);
  cudaFree(device);
  return status;
}

template <bool kWrong>
cudaError_t run_copy_too_long() {
  float *device = make_zeros(), host[kFloats + 1] = {};
  const cudaError_t status = cudaMemcpy(device, host, (kFloats + kWrong) * sizeof(float), cudaMemcpyHostToDevice);
  cudaFree(device);
  return status;
}

template <bool kWrong>
cudaError_t run_copy_of_uninitialised() {
  float *device = nullptr, host[2];
  cudaMalloc(reinterpret_cast<void**>(&device), sizeof host);
  cudaMemset(device, 0, kWrong ? 4 : 8);
  const cudaError_t status = cudaMemcpy(host, device, sizeof host, cudaMemcpyDeviceToHost);
  cudaFree(device);
  return status;
}

template <bool kWrong>
cudaError_t run_one_too_many() {
  float* out = nullptr;
  cudaMalloc(reinterpret_cast<void**>(&out), 100 * sizeof(float));
  launch(one_too_many<kWrong>, 4, 32, 0, nullptr, out, 100);
  const cudaError_t status = cudaDeviceSynchronize();
  cudaFree(out);
  return status;
}

template <bool kWrong>
cudaError_t run_far_outside() {
  float* out = make_zeros();
  launch(far_outside<kWrong>, 1, 1, 0, nullptr, out, kFloats);
  const cudaError_t status = cudaDeviceSynchronize();
  cudaFree(out);
  return status;
}

template <bool kWrong>
cudaError_t run_static_and_dynamic_shared() {
  const auto kernel = static_and_dynamic_shared<kWrong>;
  int limit = 0;
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  const int bytes = limit - 256 + kWrong;
  cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  return run_simple(kernel, 1, 64, size_t(bytes));
}

template <bool kWrong>
cudaError_t run_opt_in() {
  const auto kernel = divergent_barrier<kWrong>;  // any kernel whose limit nobody else sets
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (!kWrong) cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
  return run_simple(kernel, 1, 32, 64 << 10);
}

template <typename T>
cudaError_t launch_early(void (*kernel)(T*), dim3 grid, dim3 block, cudaStream_t stream, float* out,
                         cudaLaunchAttributeID id = cudaLaunchAttributeProgrammaticStreamSerialization) {
  cudaLaunchAttribute attribute = {};
  attribute.id = id;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = 1024;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, reinterpret_cast<T*>(out));
}

template <typename T>
cudaError_t run_early(void (*kernel)(T*), dim3 grid, dim3 block,
                      cudaLaunchAttributeID id = cudaLaunchAttributeProgrammaticStreamSerialization) {
  float* out = make_zeros();
  cudaError_t status = launch_early(kernel, grid, block, nullptr, out, id);
  if (status == cudaSuccess) status = cudaDeviceSynchronize();
  cudaFree(out);
  return status;
}

template <bool kWrong>
cudaError_t run_early_on_old_device() {
  if (kWrong) cudasim_set_shared_memory(99 << 10);
  const cudaError_t status = run_early(early_write<false>, 1, 32);
  cudasim_set_shared_memory(227 << 10);
  return status;
}

// --- stream capture --------------------------------------------------------------------------------------------------

struct Streams {
  cudaStream_t main = nullptr, side = nullptr;
  cudaEvent_t event = nullptr, join = nullptr;
  float* x = make_zeros();

  Streams() {
    for (cudaStream_t* stream : {&main, &side}) cudaStreamCreate(stream);
    for (cudaEvent_t* each : {&event, &join}) cudaEventCreateWithFlags(each, cudaEventDisableTiming);
  }
  ~Streams() {
    for (const cudaStream_t stream : {main, side}) cudaStreamDestroy(stream);
    for (const cudaEvent_t each : {event, join}) cudaEventDestroy(each);
    cudaFree(x);
  }
  cudaError_t add(cudaStream_t stream) {
    return launch(sum_without_atomic<true>, 1, 1, 0, stream, reinterpret_cast<int*>(x));
  }
  // `to` goes on after what is in `from`.
  cudaError_t order(cudaStream_t from, cudaStream_t to, cudaEvent_t by) {
    const cudaError_t status = cudaEventRecord(by, from);
    return status ? status : cudaStreamWaitEvent(to, by, 0);
  }
};

// Ends the capture and runs its graph. status: of what was captured. Returns the first error.
cudaError_t run_graph(cudaStream_t stream, cudaError_t status) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream, &graph);  // here: capture_unjoined
  if (!status) status = ended;
  if (!graph) return status;
  if (!status) status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  if (!status) status = cudaGraphLaunch(executable, stream);
  if (!status) status = cudaStreamSynchronize(stream);
  if (executable) cudaGraphExecDestroy(executable);
  return status;
}

template <typename Body>
cudaError_t run_captured(Body body) {
  Streams s;
  cudaStreamBeginCapture(s.main, cudaStreamCaptureModeThreadLocal);
  const cudaError_t first = s.add(s.main), status = body(s);
  return run_graph(s.main, first ? first : status);
}

template <bool kWrong>
cudaError_t run_early_write_in_graph() {
  return run_captured([](Streams& s) { return launch_early(early_write<kWrong>, 1, 32, s.main, s.x); });
}

template <bool kWrong>
cudaError_t run_capture_synchronize() {
  return run_captured([](Streams& s) {
    if (!kWrong) return cudaSuccess;
    return cudaStreamSynchronize(s.main);  // here: capture_synchronize
  });
}

template <bool kWrong>
cudaError_t run_capture_query() {
  return run_captured([](Streams& s) {
    cudaEventRecord(s.event, s.main);
    if (!kWrong) return cudaSuccess;
    return cudaEventQuery(s.event);  // here: capture_query
  });
}

template <bool kWrong>
cudaError_t run_capture_device() {
  return run_captured([](Streams&) {
    if (!kWrong) return cudaSuccess;
    return cudaDeviceSynchronize();  // here: capture_device
  });
}

template <bool kWrong>
cudaError_t run_capture_legacy() {
  return run_captured([](Streams& s) {
    return cudaMemsetAsync(s.x, 0, 4, kWrong ? nullptr : s.main);  // here: capture_legacy
  });
}

template <bool kWrong>
cudaError_t run_capture_allocation() {
  float* more = nullptr;
  const cudaError_t status = run_captured([&](Streams&) {
    if (!kWrong) return cudaSuccess;
    return cudaMalloc(reinterpret_cast<void**>(&more), 4);  // here: capture_allocation
  });
  cudaFree(more);
  return status;
}

template <bool kWrong>
cudaError_t run_capture_pageable() {
  float pageable = 0, *pinned = nullptr;
  cudaMallocHost(reinterpret_cast<void**>(&pinned), 4);
  *pinned = 0;
  const cudaError_t status = run_captured([&](Streams& s) {
    const float* from = kWrong ? &pageable : pinned;
    return cudaMemcpyAsync(s.x, from, 4, cudaMemcpyHostToDevice, s.main);  // here: capture_pageable
  });
  cudaFreeHost(pinned);
  return status;
}

template <bool kWrong>
cudaError_t run_capture_unjoined() {
  return run_captured([](Streams& s) {
    s.order(s.main, s.side, s.event);
    const cudaError_t status = s.add(s.side);
    return kWrong ? status : s.order(s.side, s.main, s.join);
  });
}

template <bool kWrong>
cudaError_t run_capture_isolation() {
  return run_captured([](Streams& s) {
    cudaEventRecord(s.event, kWrong ? s.side : s.main);
    return cudaStreamWaitEvent(s.main, s.event, 0);  // here: capture_isolation
  });
}

template <bool kWrong>
cudaError_t run_capture_merge() {
  return run_captured([](Streams& s) {
    if (kWrong) cudaStreamBeginCapture(s.side, cudaStreamCaptureModeThreadLocal);
    cudaEventRecord(s.event, s.main);
    cudaError_t status = cudaStreamWaitEvent(s.side, s.event, 0);  // here: capture_merge
    if (!status) status = s.order(s.side, s.main, s.join);
    cudaGraph_t none = nullptr;
    if (kWrong) cudaStreamEndCapture(s.side, &none);
    return status;
  });
}

template <bool kWrong>
cudaError_t run_capture_unmatched() {
  return run_captured([](Streams& s) {
    s.order(s.main, s.side, s.event);
    s.order(s.side, s.main, s.join);
    cudaGraph_t none = nullptr;
    if (!kWrong) return cudaSuccess;
    return cudaStreamEndCapture(s.side, &none);  // here: capture_unmatched
  });
}

template <bool kWrong>
cudaError_t run_capture_thread() {
  return run_captured([](Streams& s) {
    if (!kWrong) return cudaSuccess;
    cudaError_t status = cudaSuccess;
    std::thread([&] {
      cudaGraph_t none = nullptr;
      status = cudaStreamEndCapture(s.main, &none);  // here: capture_thread
    }).join();
    return status;
  });
}

template <bool kWrong>
cudaError_t run_capture_invalidated() {
  return run_captured([](Streams& s) {
    if (kWrong) cudaStreamSynchronize(s.main);
    return s.add(s.main);
  });
}

// The event stands for nodes of a graph, not for work that a stream could wait for.
template <bool kWrong>
cudaError_t run_captured_event() {
  Streams s;
  cudaStreamBeginCapture(s.main, cudaStreamCaptureModeThreadLocal);
  cudaEventRecord(s.event, s.main);
  const cudaError_t first = run_graph(s.main, s.add(s.main));
  if (!kWrong) cudaEventRecord(s.event, s.main);
  const cudaError_t status = cudaStreamWaitEvent(s.side, s.event, 0);  // here: captured_event
  return first ? first : status;
}

template <bool kWrong>
std::map<std::string, cudaError_t (*)()> cases() {
  return {
      {"missing_syncthreads", [] { return run_simple(missing_syncthreads<kWrong>, 1, 64); }},
      {"missing_second_barrier", [] { return run_simple(missing_second_barrier<kWrong>, 1, 64); }},
      {"missing_syncwarp", [] { return run_simple(missing_syncwarp<kWrong>, 1, 32); }},
      {"shuffle_is_no_fence", [] { return run_simple(shuffle_is_no_fence<kWrong>, 1, 32); }},
      {"half_warp_sync", [] { return run_simple(half_warp_sync<kWrong>, 1, 32); }},
      {"atomics_before_zero", [] { return run_simple(atomics_before_zero<kWrong>, 1, 64); }},
      {"race_in_dynamic_shared", [] { return run_simple(race_in_dynamic_shared<kWrong>, 1, 64, 256); }},
      {"race_in_global", [] { return run_simple(race_in_global<kWrong>, 1, 64); }},
      {"sum_without_atomic", [] { return run_simple(sum_without_atomic<kWrong>, 3, 1); }},
      {"neighbour_block", [] { return run_simple(neighbour_block<kWrong>, 3, 32); }},
      {"missing_fence", [] { return run_simple(missing_fence<kWrong>, 3, 32); }},
      {"early_fence", [] { return run_simple(early_fence<kWrong>, 3, 32); }},
      {"uninitialised_shared", [] { return run_simple(uninitialised_shared<kWrong>, 1, 64); }},
      {"shared_of_block_before", [] { return run_simple(shared_of_block_before<kWrong>, 2, 1); }},
      {"uninitialised_global", run_uninitialised_global<kWrong>},
      {"one_too_many", run_one_too_many<kWrong>},
      {"far_outside", run_far_outside<kWrong>},
      {"negative_index", [] { return run_simple(negative_index<kWrong>, 1, 32); }},
      {"array_index", [] { return run_simple(array_index<kWrong>, 1, 64); }},
      {"dynamic_shared_bounds", [] { return run_simple(dynamic_shared_bounds<kWrong>, 1, 32, 128); }},
      {"misaligned", [] { return run_simple(misaligned<kWrong>, 1, 32); }},
      {"divergent_barrier", [] { return run_simple(divergent_barrier<kWrong>, 1, 64); }},
      {"not_in_own_mask", [] { return run_simple(not_in_own_mask<kWrong>, 1, 32); }},
      {"lanes_have_exited", [] { return run_simple(lanes_have_exited<kWrong>, 1, 32); }},
      {"masks_differ", [] { return run_simple(masks_differ<kWrong>, 1, 32); }},
      {"operations_differ", [] { return run_simple(operations_differ<kWrong>, 1, 32); }},
      {"deadlock", [] { return run_simple(deadlock<kWrong>, 1, 32); }},
      {"local_of_other_thread", [] { return run_simple(local_of_other_thread<kWrong>, 1, 32); }},
      {"trap", [] { return run_simple(trap<kWrong>, 1, 32); }},
      {"stack_overflow", [] { return run_simple(stack_overflow<kWrong>, 1, 32); }},
      {"use_after_free", run_use_after_free<kWrong>},
      {"host_memory", run_host_memory<kWrong>},
      {"pinned_memory", run_pinned_memory<kWrong>},
      {"host_access", run_host_access<kWrong>},
      {"double_free", run_double_free<kWrong>},
      {"copy_direction", run_copy_direction<kWrong>},
      {"copy_too_long", run_copy_too_long<kWrong>},
      {"copy_of_uninitialised", run_copy_of_uninitialised<kWrong>},
      {"static_and_dynamic_shared", run_static_and_dynamic_shared<kWrong>},
      {"opt_in", run_opt_in<kWrong>},
      {"block_too_large", [] { return run_simple(nothing, 1, kWrong ? 1025 : 1024); }},
      {"block_too_deep", [] { return run_simple(nothing, 1, dim3(1, 1, kWrong ? 65 : 64)); }},
      {"grid_too_high", [] { return run_simple(nothing, dim3(1, kWrong ? 65536 : 2), 1); }},
      {"early_read", [] { return run_early(early_read<kWrong>, 1, 32); }},
      {"early_write", [] { return run_early(early_write<kWrong>, 1, 32); }},
      {"early_write_in_graph", run_early_write_in_graph<kWrong>},
      {"early_atomic", [] { return run_early(early_atomic<kWrong>, 1, 32); }},
      {"early_copy", [] { return run_early(early_copy<kWrong>, 1, 32); }},
      {"waited_elsewhere", [] { return run_early(waited_elsewhere<kWrong>, 1, 64); }},
      {"early_end", [] { return run_early(early_end<kWrong>, 2, 32); }},
      {"early_on_old_device", run_early_on_old_device<kWrong>},
      {"other_attribute",
       [] {
         return run_early(early_write<false>, 1, 32,
                          kWrong ? cudaLaunchAttributePriority : cudaLaunchAttributeProgrammaticStreamSerialization);
       }},
      {"capture_synchronize", run_capture_synchronize<kWrong>},
      {"capture_query", run_capture_query<kWrong>},
      {"capture_device", run_capture_device<kWrong>},
      {"capture_legacy", run_capture_legacy<kWrong>},
      {"capture_allocation", run_capture_allocation<kWrong>},
      {"capture_pageable", run_capture_pageable<kWrong>},
      {"capture_unjoined", run_capture_unjoined<kWrong>},
      {"capture_isolation", run_capture_isolation<kWrong>},
      {"capture_merge", run_capture_merge<kWrong>},
      {"capture_unmatched", run_capture_unmatched<kWrong>},
      {"capture_thread", run_capture_thread<kWrong>},
      {"capture_invalidated", run_capture_invalidated<kWrong>},
      {"captured_event", run_captured_event<kWrong>},
      {"empty_grid", [] { return run_simple(nothing, kWrong ? 0 : 1, 1); }},
  };
}

}  // namespace

// The CUDA status, or -1 if there is no case of that name.
EXPORT int run_case(const char* name, int wrong) {
  const auto table = wrong ? cases<true>() : cases<false>();
  const auto found = table.find(name);
  return found == table.end() ? -1 : int(found->second());
}
