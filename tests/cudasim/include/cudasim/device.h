// What nvcc knows by itself, for g++: qualifiers, built-in variables and functions, launches. CUDA C++ Programming
// Guide, "C++ Language Extensions".
#pragma once

#ifdef __CUDACC__
#error "the simulator's headers are for g++, not for nvcc"
#endif
#define CUDASIM 1

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

// Where the kernel called: trailing arguments that nobody passes.
#define CUDASIM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
// Accesses to memory are inlined, so that a report can name the line of the kernel.
#define CUDASIM_INLINE inline __attribute__((always_inline))

#ifdef __SANITIZE_THREAD__
#define CUDASIM_CHECKED true
#else
#define CUDASIM_CHECKED false
#endif

// --- qualifiers ------------------------------------------------------------------------------------------------------
// Blocks run one after another, so one copy of every __shared__ variable is enough. __thread gathers them in the
// thread-local block of their module; unlike thread_local and plain static it needs no guard for a type with
// constructors. The ABI tag becomes part of the symbol's name, by which the simulator finds the variables
// (src/modules.cpp). Two bytes are the checker's granule.
#undef __shared__
#define __shared__ static __thread __attribute__((abi_tag("cudasim"), aligned(2)))
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

// --- built-in variables ----------------------------------------------------------------------------------------------
// Constants, so that a kernel cannot write them and the sanitizer pass does not instrument reads. (It would for dim3,
// which has a constructor; a uint3 converts to it.)
extern const uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace cudasim {

// --- implemented by the library --------------------------------------------------------------------------------------

// 1024-byte aligned start of the running block's dynamic shared memory.
unsigned char* dynamic_shared();

enum class Vote { None, Count, All, Any };
int barrier(Vote vote, int predicate, const char* file, int line);
void sync_warp(unsigned mask, const char* file, int line);
enum class Shuffle { Index, Up, Down, Xor };
// value: `bytes` bytes, replaced by those of the source lane.
void shuffle(Shuffle kind, unsigned mask, void* value, size_t bytes, int operand, int width, const char* file,
             int line);
unsigned ballot(unsigned mask, int predicate, const char* file, int line);
unsigned match_any(unsigned mask, uint64_t value, const char* file, int line);
enum class Reduction { Add, Min, Max, And, Or, Xor, SignedMin, SignedMax };
unsigned reduce(Reduction kind, unsigned mask, unsigned value, const char* file, int line);
void fence();
// Checks an atomic access of the running thread.
void enter_atomic(const volatile void* p, size_t bytes, const char* file, int line);
[[noreturn]] void trap(const char* file, int line);

// A launch as the runtime sees it.
struct Launch {
  const void* kernel;
  void (*invoke)(const void* call);
  std::shared_ptr<const void> call;  // the kernel with its parameters, started by invoke(call)
  size_t bytes;                      // of call
  const void* (*thread_locals)();    // see below
  bool checked;                      // its accesses call the checker
};
cudaError_t launch(const cudaLaunchConfig_t* config, const Launch& launch);

// --- launches --------------------------------------------------------------------------------------------------------

// An address in the calling thread's copy of this module's thread-local variables, which exists from then on. Internal
// linkage: every module must have its own.
[[maybe_unused]] static const void* thread_locals() {
  static __thread char anchor;
  return &anchor;
}

template <typename... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> parameters;

  static void invoke(const void* call) {
    const auto* self = static_cast<const Call*>(call);
    std::apply(self->kernel, self->parameters);
  }
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const void* (*thread_locals)(), const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                   Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "number of kernel arguments");
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "kernel arguments are copied bytewise");
  static_assert((sizeof(Parameters) + ... + 0) <= 32764, "a kernel has at most 32764 bytes of parameters");
  auto call = std::make_shared<Call<Parameters...>>(
      Call<Parameters...>{kernel, {static_cast<Parameters>(std::forward<Arguments>(arguments))...}});
  return launch(config, {reinterpret_cast<const void*>(kernel), &Call<Parameters...>::invoke, call, sizeof *call,
                         thread_locals, CUDASIM_CHECKED});
}

}  // namespace cudasim

// The launching module's thread-local variables hold its static shared memory.
#define cudaLaunchKernelEx(...) ::cudasim::launch(&::cudasim::thread_locals, __VA_ARGS__)

// --- synchronisation -------------------------------------------------------------------------------------------------

inline void __syncthreads(CUDASIM_HERE) { cudasim::barrier(cudasim::Vote::None, 0, file, line); }
inline int __syncthreads_count(int predicate, CUDASIM_HERE) {
  return cudasim::barrier(cudasim::Vote::Count, predicate, file, line);
}
inline int __syncthreads_and(int predicate, CUDASIM_HERE) {
  return cudasim::barrier(cudasim::Vote::All, predicate, file, line);
}
inline int __syncthreads_or(int predicate, CUDASIM_HERE) {
  return cudasim::barrier(cudasim::Vote::Any, predicate, file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDASIM_HERE) { cudasim::sync_warp(mask, file, line); }
inline void __threadfence() { cudasim::fence(); }
inline void __threadfence_system() { cudasim::fence(); }
inline void __threadfence_block() {}

// --- warp functions --------------------------------------------------------------------------------------------------

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, CUDASIM_HERE) {
  cudasim::shuffle(cudasim::Shuffle::Index, mask, &value, sizeof value, source, width, file, line);
  return value;
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDASIM_HERE) {
  cudasim::shuffle(cudasim::Shuffle::Up, mask, &value, sizeof value, int(delta), width, file, line);
  return value;
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDASIM_HERE) {
  cudasim::shuffle(cudasim::Shuffle::Down, mask, &value, sizeof value, int(delta), width, file, line);
  return value;
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, CUDASIM_HERE) {
  cudasim::shuffle(cudasim::Shuffle::Xor, mask, &value, sizeof value, lane_mask, width, file, line);
  return value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDASIM_HERE) {
  return cudasim::ballot(mask, predicate, file, line);
}
inline int __any_sync(unsigned mask, int predicate, CUDASIM_HERE) {
  return cudasim::ballot(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDASIM_HERE) {
  return cudasim::ballot(mask, !predicate, file, line) == 0;
}
template <typename T>
inline unsigned __match_any_sync(unsigned mask, T value, CUDASIM_HERE) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return cudasim::match_any(mask, bits, file, line);
}

#define CUDASIM_REDUCE(name, type, kind)                                                       \
  inline type name(unsigned mask, type value, CUDASIM_HERE) {                                  \
    return type(cudasim::reduce(cudasim::Reduction::kind, mask, unsigned(value), file, line)); \
  }
CUDASIM_REDUCE(__reduce_add_sync, unsigned, Add)
CUDASIM_REDUCE(__reduce_add_sync, int, Add)
CUDASIM_REDUCE(__reduce_min_sync, unsigned, Min)
CUDASIM_REDUCE(__reduce_min_sync, int, SignedMin)
CUDASIM_REDUCE(__reduce_max_sync, unsigned, Max)
CUDASIM_REDUCE(__reduce_max_sync, int, SignedMax)
CUDASIM_REDUCE(__reduce_and_sync, unsigned, And)
CUDASIM_REDUCE(__reduce_or_sync, unsigned, Or)
CUDASIM_REDUCE(__reduce_xor_sync, unsigned, Xor)
#undef CUDASIM_REDUCE

// --- atomics ---------------------------------------------------------------------------------------------------------
// Threads are never interrupted here: read, compute, write. The checker is told by enter_atomic and sees nothing else.

namespace cudasim {
template <typename T, typename Update>
__attribute__((no_sanitize("thread"), noinline)) T update_atomically(T* p, Update update, const char* file, int line) {
  enter_atomic(p, sizeof(T), file, line);
  const T old = *p;
  *p = update(old);
  return old;
}
}  // namespace cudasim

#define CUDASIM_ATOMIC(name, expression)                                                          \
  template <typename T>                                                                           \
  inline T name(T* p, std::common_type_t<T> value, CUDASIM_HERE) {                                \
    return cudasim::update_atomically(p, [value](T old) -> T { return expression; }, file, line); \
  }
CUDASIM_ATOMIC(atomicAdd, T(old + value))
CUDASIM_ATOMIC(atomicSub, T(old - value))
CUDASIM_ATOMIC(atomicExch, (static_cast<void>(old), value))
CUDASIM_ATOMIC(atomicMin, old < value ? old : value)
CUDASIM_ATOMIC(atomicMax, old > value ? old : value)
CUDASIM_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
CUDASIM_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
CUDASIM_ATOMIC(atomicAnd, old& value)
CUDASIM_ATOMIC(atomicOr, old | value)
CUDASIM_ATOMIC(atomicXor, old ^ value)
#undef CUDASIM_ATOMIC
template <typename T>
inline T atomicCAS(T* p, std::common_type_t<T> compare, std::common_type_t<T> value, CUDASIM_HERE) {
  return cudasim::update_atomically(p, [=](T old) -> T { return old == compare ? value : old; }, file, line);
}

// --- loads and stores with cache hints -------------------------------------------------------------------------------

#define CUDASIM_LOAD(name)            \
  template <typename T>               \
  CUDASIM_INLINE T name(const T* p) { \
    return *p;                        \
  }
CUDASIM_LOAD(__ldg)
CUDASIM_LOAD(__ldca)
CUDASIM_LOAD(__ldcg)
CUDASIM_LOAD(__ldcs)
CUDASIM_LOAD(__ldlu)
CUDASIM_LOAD(__ldcv)
#undef CUDASIM_LOAD
#define CUDASIM_STORE(name)                                     \
  template <typename T>                                         \
  CUDASIM_INLINE void name(T* p, std::common_type_t<T> value) { \
    *p = value;                                                 \
  }
CUDASIM_STORE(__stwb)
CUDASIM_STORE(__stcg)
CUDASIM_STORE(__stcs)
CUDASIM_STORE(__stwt)
#undef CUDASIM_STORE

// --- arithmetic ------------------------------------------------------------------------------------------------------
// The approximate functions are exact here: tests of kernels that use them need a tolerance.

#define CUDASIM_CAST(name, to, from)                            \
  inline to name(from x) {                                      \
    to result;                                                  \
    static_assert(sizeof result == sizeof x, "a cast of bits"); \
    std::memcpy(&result, &x, sizeof x);                         \
    return result;                                              \
  }
CUDASIM_CAST(__float_as_uint, unsigned, float)
CUDASIM_CAST(__float_as_int, int, float)
CUDASIM_CAST(__uint_as_float, float, unsigned)
CUDASIM_CAST(__int_as_float, float, int)
#undef CUDASIM_CAST

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((uint64_t(x) * y) >> 32); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __tanhf(float x) { return std::tanh(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __saturatef(float x) { return x > 1.0f ? 1.0f : x > 0.0f ? x : 0.0f; }  // NaN becomes 0

template <typename A, typename B>
inline std::common_type_t<A, B> max(A a, B b) {
  return a > b ? a : b;
}
template <typename A, typename B>
inline std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}

#define __trap() ::cudasim::trap(__builtin_FILE(), __builtin_LINE())
