// The PTX instructions that csrc/cuda/ptx.cuh wraps, with the meaning and the fragment layouts of the PTX ISA.
//
// Everything that touches memory (rows of ldmatrix, both ends of cp.async) is inline here: it is compiled into the
// kernel's own, instrumented module and runs in the kernel's thread, so the checker sees bounds, races and
// uninitialised reads at the kernel's source line. What only moves registers lives in the library, which is not
// instrumented.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace cudasim {

// griddepcontrol.wait and .launch_dependents, for the running thread. Blocks never begin early here: the checker reports
// what would go wrong if they did.
void after_previous_kernel();

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 with d = c:  c (16,8) += a (16,16) · b (16,8).
// The products are exact, the sums fp32 in an order that hardware does not specify. All 32 lanes take part.
void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDASIM_HERE);

// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 with d = c:  c (16,8) += a (16,8) · b (8,8).
// Operands are fp32 bit patterns whose low 13 bits are ignored.
void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDASIM_HERE);

// A copy of 16 bytes that cp_async_16 has issued and no wait has completed.
struct AsyncCopy {
  void* shared;
  const void* global;  // null: the 16 bytes become zero
};

namespace detail {

// Reports a row that is not a 16-byte aligned address of shared memory; false if it must not be read.
bool check_matrix_row(const void* row, const char* file, int line);
// Gives every lane its elements of `count` 8x8 matrices of b16. row: the 16 bytes that this lane has read.
void distribute_matrices(uint32_t* r, int count, bool transposed, const uint4* row, const char* file, int line);

// Notes the copy as pending in the running thread; false if the addresses are unusable (reported).
bool issue_copy(AsyncCopy copy, const char* file, int line);
void commit_copies();
// Takes the oldest copy that must be complete when at most `groups` committed groups of the running thread may be
// pending; false if there is none.
bool next_copy(int groups, AsyncCopy& copy);

inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

}  // namespace detail

// ldmatrix.sync.aligned.m8n8.xN{.trans}.shared.b16: N = 1, 2 or 4 matrices. Lane 8i+j points at row j (16 bytes) of
// matrix i; the pointers of lanes from 8N on are not used.
template <int N, bool Transposed>
CUDASIM_INLINE void ldmatrix(uint32_t (&r)[N], const void* row, CUDASIM_HERE) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
  uint4 loaded = {};
  if (detail::lane() < 8 * N && detail::check_matrix_row(row, file, line)) loaded = *static_cast<const uint4*>(row);
  detail::distribute_matrices(r, N, Transposed, &loaded, file, line);
}

// cp.async.cg.shared.global 16 bytes; !valid: src-size 0, the destination becomes zero and global is not read.
// Hardware copies at some time between here and the wait. The simulator reads the source both here and at the wait, and
// makes the destination NaN until the wait: a missing wait, and a buffer that others still read, show.
CUDASIM_INLINE void cp_async_16(void* shared, const void* global, bool valid, CUDASIM_HERE) {
  if (!detail::issue_copy({shared, valid ? global : nullptr}, file, line)) return;
  if (valid) {
    uint4 source = *static_cast<const uint4*>(global);
    asm volatile("" : : "m"(source));  // the compiler must not drop the read
  }
  *static_cast<uint4*>(shared) = uint4{~0u, ~0u, ~0u, ~0u};
}

// cp.async.commit_group: the copies issued since the last commit become the thread's newest group (it may be empty).
inline void cp_async_commit() { detail::commit_copies(); }

// cp.async.wait_group N: at most the thread's N newest groups stay pending, all older ones are complete and visible to
// this thread (others need a barrier after it). Copies that were never committed are not waited for.
template <int N>
CUDASIM_INLINE void cp_async_wait() {
  AsyncCopy copy;
  while (detail::next_copy(N, copy))
    *static_cast<uint4*>(copy.shared) = copy.global ? *static_cast<const uint4*>(copy.global) : uint4{};
}

// cvt.rna.tf32.f32: the nearest value with 10 fraction bits, ties away from zero; the low 13 bits of the result are
// zero.
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffe000u;  // NaN
  return (bits + 0x1000u) & ~0x1fffu;
}

// ex2.approx.ftz.f32: 2^x, subnormal results are zero.
inline float exp2_approx(float x) {
  float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

}  // namespace cudasim
