// One kernel per PTX instruction and per way of using it wrongly. Every launcher returns the status of the launch.
#include <cudasim/ptx.h>

namespace {

// --- mma: registers as they are, lane by lane ------------------------------------------------------------------------

template <bool Bf16>
__global__ void mma_kernel(float (*c)[4], const uint32_t (*a)[4], const uint32_t (*b)[2]) {
  float own_c[4];
  uint32_t own_a[4], own_b[2];
  for (int i = 0; i < 4; i++) own_c[i] = c[threadIdx.x][i];
  for (int i = 0; i < 4; i++) own_a[i] = a[threadIdx.x][i];
  for (int i = 0; i < 2; i++) own_b[i] = b[threadIdx.x][i];
  if (Bf16)
    cudasim::mma_m16n8k16_bf16(own_c, own_a, own_b);
  else
    cudasim::mma_m16n8k8_tf32(own_c, own_a, own_b);
  for (int i = 0; i < 4; i++) c[threadIdx.x][i] = own_c[i];
}

// --- ldmatrix --------------------------------------------------------------------------------------------------------

enum class Loading { Right, WithoutBarrier, Uninitialised, Misaligned, FromGlobal, BeyondShared };

// registers (32,N): what each lane receives of the N matrices (N,8,8), whose rows lie 9 x 16 bytes apart in shared
// memory.
template <int N, bool Transposed>
__global__ void ldmatrix_kernel(uint32_t* registers, const uint4* matrices, Loading how) {
  constexpr int kPitch = 9;
  uint4* rows = reinterpret_cast<uint4*>(cudasim::dynamic_shared());
  const int lane = threadIdx.x;
  const int used = how == Loading::Uninitialised ? 8 * N - 1 : 8 * N;
  // Lane 31 - i writes row i: every lane reads what another has written.
  if (31 - lane < used) rows[kPitch * (31 - lane)] = matrices[31 - lane];
  if (how != Loading::WithoutBarrier) __syncwarp();
  const void* row = rows + kPitch * (lane % (8 * N));
  if (how == Loading::Misaligned) row = reinterpret_cast<const char*>(row) + 2;
  if (how == Loading::FromGlobal) row = matrices + lane % (8 * N);
  if (how == Loading::BeyondShared) row = rows + kPitch * (lane % (8 * N) + 1);
  uint32_t r[N];
  cudasim::ldmatrix<N, Transposed>(r, row);
  for (int i = 0; i < N; i++) registers[lane * N + i] = r[i];
}

// --- cp.async --------------------------------------------------------------------------------------------------------

enum class Copying {
  Right,
  WithoutWait,
  WithoutCommit,
  WithoutBarrier,
  WaitForTheOlder,   // two groups; the newer may be pending when the older is read
  ReadTheNewer,      // as before, but what the newer group brings is read
  FarEnough,         // two buffers, each refilled after a barrier
  RefilledTooEarly,  // ... before the barrier
  NeverWaited,       // nothing reads it, the kernel ends
  BeyondTheSource,
  Misaligned,
  FromShared,
};

constexpr int kThreads = 64;

// out (2,64) = in (2,64); each thread copies one element of both rows to shared memory, its neighbour reads it.
// Element i is replaced by zeros for i >= valid.
__global__ void cp_async_kernel(uint4* out, const uint4* in, int valid, Copying how) {
  __shared__ uint4 buffer[2][kThreads];
  const int own = threadIdx.x, neighbour = (own + 1) % kThreads;
  const uint4* source = in + (how == Copying::BeyondTheSource ? 2 * kThreads - 2 : 0) + own;
  void* destination = &buffer[0][own];
  if (how == Copying::Misaligned) destination = reinterpret_cast<char*>(destination) + 8;
  if (how == Copying::FromShared) source = &buffer[1][own];
  cudasim::cp_async_16(destination, source, own < valid);
  if (how == Copying::NeverWaited) return;
  if (how != Copying::WithoutCommit) cudasim::cp_async_commit();
  cudasim::cp_async_16(&buffer[1][own], in + kThreads + own, kThreads + own < valid);
  if (how != Copying::WithoutCommit) cudasim::cp_async_commit();
  if (how == Copying::WaitForTheOlder || how == Copying::ReadTheNewer)
    cudasim::cp_async_wait<1>();
  else if (how != Copying::WithoutWait)
    cudasim::cp_async_wait<0>();
  if (how != Copying::WithoutBarrier) __syncthreads();
  if (how != Copying::ReadTheNewer) out[own] = buffer[0][neighbour];
  if (how == Copying::FarEnough) __syncthreads();
  if (how == Copying::FarEnough || how == Copying::RefilledTooEarly) {
    cudasim::cp_async_16(&buffer[0][own], in + own, own < valid);
    cudasim::cp_async_commit();
    __syncthreads();
    cudasim::cp_async_wait<0>();
  }
  if (how == Copying::WaitForTheOlder) {
    cudasim::cp_async_wait<0>();
    __syncthreads();
  }
  out[kThreads + own] = buffer[1][neighbour];
  if (how == Copying::ReadTheNewer) {
    __syncthreads();
    cudasim::cp_async_wait<0>();
  }
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

__global__ void arithmetic_kernel(uint32_t* rounded, float* power, const float* x, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    rounded[i] = cudasim::to_tf32(x[i]);
    power[i] = cudasim::exp2_approx(x[i]);
  }
}

cudaLaunchConfig_t one_block(int threads, size_t shared = 0) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  return config;
}

template <int N>
cudaError_t launch_ldmatrix(bool transposed, uint32_t* registers, const uint4* matrices, Loading how) {
  const cudaLaunchConfig_t config = one_block(32, 9 * 16 * (8 * N - 1) + 16);
  return transposed ? cudaLaunchKernelEx(&config, ldmatrix_kernel<N, true>, registers, matrices, how)
                    : cudaLaunchKernelEx(&config, ldmatrix_kernel<N, false>, registers, matrices, how);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT cudaError_t run_mma(bool bf16, int lanes, float (*c)[4], const uint32_t (*a)[4], const uint32_t (*b)[2]) {
  const cudaLaunchConfig_t config = one_block(lanes);
  return cudaLaunchKernelEx(&config, bf16 ? mma_kernel<true> : mma_kernel<false>, c, a, b);
}

EXPORT cudaError_t run_ldmatrix(int count, bool transposed, uint32_t* registers, const uint4* matrices, Loading how) {
  switch (count) {
    case 1:
      return launch_ldmatrix<1>(transposed, registers, matrices, how);
    case 2:
      return launch_ldmatrix<2>(transposed, registers, matrices, how);
    case 4:
      return launch_ldmatrix<4>(transposed, registers, matrices, how);
    default:
      return cudaErrorInvalidValue;
  }
}

EXPORT cudaError_t run_cp_async(uint4* out, const uint4* in, int valid, Copying how) {
  const cudaLaunchConfig_t config = one_block(kThreads);
  return cudaLaunchKernelEx(&config, cp_async_kernel, out, in, valid, how);
}

EXPORT cudaError_t run_arithmetic(uint32_t* rounded, float* power, const float* x, int n) {
  const cudaLaunchConfig_t config = one_block(32);
  return cudaLaunchKernelEx(&config, arithmetic_kernel, rounded, power, x, n);
}
