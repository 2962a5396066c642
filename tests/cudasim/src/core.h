// What the files of the simulator's core share. internal.h is the part for the simulated libraries.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <string>
#include <vector>

#include "cudasim/device.h"
#include "internal.h"

#pragma GCC visibility push(hidden)
namespace cudasim {

// --- address space: everything has a fixed place, so that tests for membership are two comparisons -------------------
// The arena is larger than the device's memory: addresses are never used again, so a stale pointer never becomes valid.
constexpr size_t kPage = 4096;
constexpr uintptr_t kArena = 0x100000000000, kArenaBytes = size_t(512) << 30;
constexpr uintptr_t kCells = 0x200000000000;        // shadow cells of the arena (checker.cpp)
constexpr uintptr_t kInitialised = 0x300000000000;  // one bit per granule of the arena (checker.cpp)
constexpr uintptr_t kPageOwners = 0x310000000000;   // allocation of each page of the arena (memory.cpp)
constexpr uintptr_t kStacks = 0x320000000000, kStackBytes = 128 << 10;
constexpr uintptr_t kDynamicShared = 0x330000000000, kDynamicSharedBytes = 256 << 10;

constexpr unsigned kMaxThreads = 1024;  // of a block
constexpr unsigned kLanes = 32;

inline bool in_range(const volatile void* p, uintptr_t begin, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) - begin < bytes;
}
inline bool in_arena(const volatile void* p) { return in_range(p, kArena, kArenaBytes); }

// Address space without memory behind it until it is touched. Exits with a message if there is none.
void* reserve(uintptr_t address, size_t bytes, bool accessible);

// --- settings.cpp ----------------------------------------------------------------------------------------------------

enum class Order { Forward, Reverse, Random };
struct Settings {
  Order order = Order::Forward;
  bool lazy = false;
  int shared_memory = 227 << 10;  // bytes a block may opt in to
  size_t memory = size_t(8) << 30;
  int devices = 1;
};
Settings& settings();
unsigned random_below(unsigned n);  // from the schedule's seed

// --- errors.cpp ------------------------------------------------------------------------------------------------------

// Every function of the runtime begins with one of these: one caller at a time, and no work after a failed kernel.
class ApiCall {
 public:
  // caller: where the function returns to.
  explicit ApiCall(const void* caller = __builtin_return_address(0));
  ~ApiCall();
  cudaError_t error;  // no device, or the sticky error of a failed kernel

 private:
  std::lock_guard<std::recursive_mutex> lock_;
};
const void* api_caller();                  // of the function of the runtime that the program has called
cudaError_t fail(cudaError_t error);       // notes it for cudaGetLastError
void set_sticky_error(cudaError_t error);  // until cudasim_clear()
cudaError_t sticky_error();

// --- memory.cpp ------------------------------------------------------------------------------------------------------

struct Allocation {
  char* begin;
  size_t bytes;
  size_t number;  // in order of allocation, from 0
  bool freed;
};
size_t allocation_count();  // living or freed
// The table of page owners: the allocation of each page of the arena, null if there never was one.
inline const Allocation*& page_owner(uintptr_t address) {
  return reinterpret_cast<const Allocation**>(kPageOwners)[(address - kArena) / kPage];
}
// Of the page that p lies in: p may be outside [begin, begin + bytes), in the rest of its pages.
inline const Allocation* find_allocation(const void* p) {
  return in_arena(p) ? page_owner(reinterpret_cast<uintptr_t>(p)) : nullptr;
}
inline bool inside(const Allocation& allocation, const void* p, size_t bytes) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(allocation.begin);
  return !allocation.freed && offset < allocation.bytes && bytes <= allocation.bytes - offset;
}
// "offset 400 of an allocation of 400 bytes", for reports about addresses in the arena.
std::string describe_address(const void* p);

// --- streams.cpp -----------------------------------------------------------------------------------------------------

// Like enqueue, cudaStreamSynchronize and cudaDeviceSynchronize, for callers that hold an ApiCall. kind: of the node that
// the work is in a graph: kernel, early kernel, memcpy, memset, library.
cudaError_t submit(cudaStream_t stream, const char* kind, std::function<void()> work);
cudaError_t synchronize(cudaStream_t stream);
void synchronize_all();

// --- launch.cpp ------------------------------------------------------------------------------------------------------

void count_launch();  // of a kernel or a graph, by the host

// --- modules.cpp -----------------------------------------------------------------------------------------------------

struct SharedVariable {
  std::string name;
  size_t offset, bytes;  // in the thread-local block of its module
};
struct Module;  // a loaded program or library
struct KernelInfo {
  const Module* module;
  std::string name;  // demangled, without parameters
};
const KernelInfo& kernel_info(const Launch& launch);

// The running kernel's static shared memory: the thread-local block of its module, some of which is __shared__.
struct StaticShared {
  char* begin = nullptr;
  size_t bytes = 0;
  const std::vector<SharedVariable>* variables = nullptr;
};
StaticShared static_shared(const Launch& launch);
bool in_module(const Module* module, const volatile void* p);
// "file:line", with the callers' places if the function there was inlined.
std::string source_line(const void* pc);

// --- reports.cpp -----------------------------------------------------------------------------------------------------

// A place in a kernel: the address of an instruction, or file and line.
struct Site {
  const void* pc = nullptr;
  const char* file = nullptr;
  int line = 0;
};
std::string describe(const Site& site);  // as source_line
// Each kind is reported once per pair of places. other: where the conflicting access was made, if any.
void report_site(const char* kind, const Site& site, const Site* other, const char* format, ...)
    __attribute__((format(printf, 4, 5)));
// Reports made in a kernel are only noted, on its small stack; this finds their lines and prints them.
void finish_reports();

// --- scheduler.cpp ---------------------------------------------------------------------------------------------------

// Where a thread waits, or waited last.
enum class State : uint8_t { Started, AtBarrier, InWarp, Done };
struct Thread {
  void* stack_pointer;
  uint3 index;
  uint16_t flat;  // index in the block
  uint8_t lane;
  State state;
  // What it waits for
  const char* file;
  int line;
  unsigned mask;
  void* argument;
  void (*run)(void**, unsigned);
  const void* kind;
  bool waited;  // for the kernels before
  // Its last __syncwarp that was for some lanes of the warp only (checker.cpp)
  unsigned sync_mask;
  uint64_t sync_time;
};
// Null outside kernels. Of the calling thread: other threads run host code meanwhile.
extern __thread Thread* current_thread __attribute__((tls_model("initial-exec")));
extern std::string current_kernel;
uint32_t live_lanes();  // of the running thread's warp

// Runs all blocks, one after another. The launch has been checked. early: on a device it may begin before the kernels
// before it have ended.
cudaError_t run_grid(const Launch& launch, dim3 grid, dim3 block, size_t dynamic_bytes, bool early);

}  // namespace cudasim
#pragma GCC visibility pop
