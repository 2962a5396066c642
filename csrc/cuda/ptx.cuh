// The only inline PTX of the project, and dynamic shared memory: what the CUDA simulator of the tests has to know.
// Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", "... mma.m16n8k8", "ldmatrix".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef CUDASIM

#include "cudasim/ptx.h"

#define LLMC_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(cudasim::dynamic_shared())

namespace llmc::cuda {
using cudasim::after_previous_kernel;
using cudasim::cp_async_16;
using cudasim::cp_async_commit;
using cudasim::cp_async_wait;
using cudasim::exp2_approx;
using cudasim::ldmatrix;
using cudasim::mma_m16n8k16_bf16;
using cudasim::mma_m16n8k8_tf32;
using cudasim::to_tf32;
}  // namespace llmc::cuda

#else

// The running block's dynamic shared memory, as an array of type.
#define LLMC_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char llmc_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(llmc_dynamic_shared)

namespace llmc::cuda {

// Begins every kernel: no block may touch device memory before it, nor end without it. From compute capability 9.0 on, blocks
// may be on the SMs while the kernel before theirs still runs (launch.h). They wait here until that has ended and its
// results are visible. As it has waited in turn, all before it have ended, too: what they wrote may be read, and what
// they read may be written. Before 9.0 there is nothing to do.
//
// The next kernel's blocks may come once every block of this one has been here, or has ended. So they take no room that
// this one's blocks could use, and as early as possible is best; but not before the wait, lest two kernels' blocks wait.
__device__ inline void after_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// c += a·b; a is 16x16, b is 16x8, both bf16; c is 16x8, fp32.
__device__ inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a·b; a is 16x8, b is 8x8, both TF32 (fp32 whose low 13 bits are ignored); c is 16x8, fp32.
__device__ inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// x rounded to TF32 (nearest, ties away from zero), as the bits of an fp32.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// N 8x8 matrices of 16-bit elements from shared memory. Lane 8·i + j gives the address of row j of matrix i (16 bytes,
// aligned); each lane gets elements 2·(lane % 4), +1 of row lane / 4 of every matrix, or of its transpose.
template <int N, bool Transposed>
__device__ inline void ldmatrix(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
  const uint32_t address = shared_address(row);
  if constexpr (N == 1 && !Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (N == 2 && !Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// Copies 16 bytes from global to shared memory in the background, or zeros if not valid (global is not read then).
__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Closes the group of the copies issued since the last commit.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's groups are pending. Other threads see the data after a barrier.
template <int N>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 2 to the power x, relative error below 2^-22; results below 2^-126 are 0.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace llmc::cuda

#endif
