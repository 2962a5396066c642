// Device memory and pinned host memory: allocation, copies, fills, and the checks of library accesses.
//
// Every allocation ends (rounded up to 256 bytes, the alignment CUDA promises) at an inaccessible page and is filled
// with 0xFF, which is NaN in every float type. The bytes around it in its pages hold a pattern that is checked when it
// is freed.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "capture.h"
#include "checker.h"
#include "core.h"
#include "cudasim/control.h"
#include "streams.h"

namespace cudasim {
namespace {

constexpr size_t kAlignment = 256;
constexpr unsigned char kPoison = 0xff, kMargin = 0xa5;

std::deque<Allocation> allocations;  // all there ever were
uintptr_t next_address = kArena + kPage;
size_t allocated_bytes;
std::map<const char*, size_t> pinned;  // begin, bytes

size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }
struct Pages {
  char* begin;
  char* end;
};
Pages pages_of(const Allocation& allocation) {
  const auto begin = reinterpret_cast<uintptr_t>(allocation.begin);
  return {reinterpret_cast<char*>(begin / kPage * kPage),
          reinterpret_cast<char*>(begin + round_up(allocation.bytes, kAlignment))};
}

__attribute__((constructor)) void reserve_arena() {
  reserve(kArena, kArenaBytes, false);
  reserve(kPageOwners, kArenaBytes / kPage * sizeof(Allocation*), true);
}

void* allocate(size_t bytes) {
  const size_t used = round_up(bytes, kAlignment), whole = round_up(used, kPage);
  if (bytes > settings().memory - allocated_bytes) return nullptr;
  if (whole + kPage > kArena + kArenaBytes - next_address) return nullptr;
  char* begin = reinterpret_cast<char*>(next_address + whole - used);
  if (mprotect(reinterpret_cast<void*>(next_address), whole, PROT_READ | PROT_WRITE) != 0) return nullptr;
  allocations.push_back({begin, bytes, allocations.size(), false});
  for (size_t i = 0; i < whole; i += kPage) page_owner(next_address + i) = &allocations.back();
  const Pages pages = pages_of(allocations.back());
  std::memset(pages.begin, kMargin, size_t(begin - pages.begin));
  std::memset(begin, kPoison, bytes);
  std::memset(begin + bytes, kMargin, used - bytes);
  next_address += whole + kPage;
  allocated_bytes += bytes;
  return begin;
}

// Null if p is not the start of a living allocation.
Allocation* living(const void* p) {
  auto* allocation = const_cast<Allocation*>(find_allocation(p));
  return allocation && allocation->begin == p && !allocation->freed ? allocation : nullptr;
}

void release(Allocation& allocation) {
  const Pages pages = pages_of(allocation);
  for (const char* p = pages.begin; p < pages.end; p++) {
    if (p == allocation.begin) p += allocation.bytes;
    if (p < pages.end && static_cast<unsigned char>(*p) != kMargin) {
      report("out-of-bounds", "something wrote at %s (found when it was freed)", describe_address(p).c_str());
      break;
    }
  }
  forget_memory(allocation.begin, allocation.bytes);
  const size_t bytes = size_t(pages.end - pages.begin);
  madvise(pages.begin, bytes, MADV_DONTNEED);
  mprotect(pages.begin, bytes, PROT_NONE);
  allocation.freed = true;
  allocated_bytes -= allocation.bytes;
}

cudaError_t free_device(void* p) {
  if (!p) return cudaSuccess;
  if (Allocation* allocation = living(p)) {
    release(*allocation);
    return cudaSuccess;
  }
  if (in_arena(p)) {
    report("bad-free", "cudaFree of %s", describe_address(p).c_str());
  } else {
    report("bad-free", "cudaFree of %p, which is not device memory", p);
  }
  return fail(cudaErrorInvalidValue);
}

bool check_bounds(const void* p, size_t bytes, const char* what) {
  if (bytes == 0 || in_one_allocation(p, bytes)) return true;
  const Allocation* allocation = find_allocation(p);
  const char* kind = allocation && allocation->freed ? "use-after-free" : "out-of-bounds";
  if (in_arena(p)) {
    report(kind, "%s: %zu bytes at %s", what, bytes, describe_address(p).c_str());
  } else {
    report(kind, "%s: %p is not device memory", what, p);
  }
  return false;
}

bool is_pinned(const void* p, size_t bytes) {
  auto next = pinned.upper_bound(static_cast<const char*>(p));
  if (next == pinned.begin()) return false;
  const auto& [begin, size] = *--next;
  return static_cast<const char*>(p) + bytes <= begin + size;
}

// --- copies ----------------------------------------------------------------------------------------------------------

void copy_now(void* to, const void* from, size_t bytes) {
  if (in_arena(from) && !check_read(from, bytes, "source of a copy")) return;
  if (in_arena(to) && !check_write(to, bytes, "destination of a copy")) return;
  std::memmove(to, from, bytes);
}

cudaError_t check_direction(const void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return fail(cudaErrorInvalidMemcpyDirection);
  const bool to_device = in_arena(to), from_device = in_arena(from);
  const int actual = to_device ? (from_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice)
                               : (from_device ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost);
  if (kind != cudaMemcpyDefault && kind != actual) {
    report("copy-direction", "a copy from %s to %s memory is declared as one from %s to %s",
           from_device ? "device" : "host", to_device ? "device" : "host", kind & 2 ? "device" : "host",
           kind & 1 ? "device" : "host");
    return fail(cudaErrorInvalidValue);
  }
  if ((from_device && !check_bounds(from, bytes, "source of a copy")) ||
      (to_device && !check_bounds(to, bytes, "destination of a copy"))) {
    return fail(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

// CUDA Runtime API, "API synchronization behavior". Pageable sources have been read when the call returns, pageable
// destinations written; pinned memory is read and written when the copy runs.
cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (cudaError_t error = check_direction(to, from, bytes, kind)) return error;
  if (bytes == 0) return cudaSuccess;
  const bool pageable_source = !in_arena(from) && !is_pinned(from, bytes);
  const bool pageable_target = !in_arena(to) && !is_pinned(to, bytes);
  if (pageable_source || pageable_target) {
    const auto found = find_stream(stream);
    if (found && found->captured.in) return refuse_in_capture("a copy of pageable memory", found.get());
  }
  if (pageable_source) {
    const char* source = static_cast<const char*>(from);
    std::vector<char> staged(source, source + bytes);
    return submit(stream, "memcpy", [=, staged = std::move(staged)] { copy_now(to, staged.data(), bytes); });
  }
  if (cudaError_t error = submit(stream, "memcpy", [=] { copy_now(to, from, bytes); })) return error;
  return pageable_target ? synchronize(stream) : cudaSuccess;
}

cudaError_t fill(void* p, int value, size_t bytes, cudaStream_t stream) {
  if (!check_bounds(p, bytes, "memset")) return fail(cudaErrorInvalidValue);
  return submit(stream, "memset", [=] {
    if (check_write(p, bytes, "memset")) std::memset(p, value, bytes);
  });
}

}  // namespace

void* reserve(uintptr_t address, size_t bytes, bool accessible) {
  void* wanted = reinterpret_cast<void*>(address);
  void* result = mmap(wanted, bytes, accessible ? PROT_READ | PROT_WRITE : PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
  if (result != wanted) {
    std::perror("cudasim: cannot reserve address space (is the library loaded twice?)");
    std::exit(2);
  }
  return result;
}

size_t allocation_count() { return allocations.size(); }

bool in_one_allocation(const void* p, size_t bytes) {
  const Allocation* allocation = find_allocation(p);
  return allocation && inside(*allocation, p, bytes);
}

std::string describe_address(const void* p) {
  char text[160];
  const char* at = static_cast<const char*>(p);
  const Allocation* allocation = find_allocation(p);
  if (!allocation) {  // on the inaccessible page between two allocations: of the nearer one
    const Allocation *before = find_allocation(at - kPage), *behind = find_allocation(at + kPage);
    const bool nearer_behind = before && behind && behind->begin - at < at - (before->begin + before->bytes);
    allocation = nearer_behind || !before ? behind : before;
  }
  if (!allocation) {
    std::snprintf(text, sizeof text, "%p in device memory that was never allocated", p);
    return text;
  }
  std::snprintf(text, sizeof text, "offset %ld of %s allocation of %zu bytes", long(at - allocation->begin),
                allocation->freed ? "a freed" : "an", allocation->bytes);
  return text;
}

bool check_read(const void* p, size_t bytes, const char* what) {
  if (!check_bounds(p, bytes, what)) return false;
  size_t offset;
  if (all_initialised(p, bytes, &offset)) return true;
  const void* first = static_cast<const char*>(p) + offset;
  report("uninitialised", "%s: reads what nothing has written, from %s on", what, describe_address(first).c_str());
  return true;
}

bool check_write(const void* p, size_t bytes, const char* what) {
  if (!check_bounds(p, bytes, what)) return false;
  mark_initialised(p, bytes);
  return true;
}

}  // namespace cudasim

using namespace cudasim;

int cudasim_is_device_pointer(const void* p) { return in_arena(p); }

cudaError_t cudaMalloc(void** p, size_t bytes) {
  const ApiCall call;
  *p = nullptr;
  if (call.error) return call.error;
  if (cudaError_t error = refuse_in_capture("cudaMalloc")) return error;
  if (bytes == 0) return cudaSuccess;
  *p = allocate(bytes);
  return *p ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}

cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) { return cudaMalloc(p, bytes); }

// After a failed kernel the memory is freed all the same, so that a test can go on after cudasim_clear().
cudaError_t cudaFree(void* p) {
  const ApiCall call;
  if (cudaError_t error = refuse_in_capture("cudaFree")) return error;
  synchronize_all();
  const cudaError_t error = free_device(p);
  return call.error ? call.error : error;
}

cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
  const ApiCall call;
  if (call.error) return cudaFree(p);
  return submit(stream, "free", [p] { free_device(p); });
}

cudaError_t cudaMallocHost(void** p, size_t bytes) {
  const ApiCall call;
  *p = nullptr;
  if (call.error) return call.error;
  if (cudaError_t error = refuse_in_capture("cudaMallocHost")) return error;
  if (bytes == 0) return cudaSuccess;
  *p = std::aligned_alloc(kPage, round_up(bytes, kPage));
  if (!*p) return fail(cudaErrorMemoryAllocation);
  std::memset(*p, kPoison, bytes);
  pinned[static_cast<const char*>(*p)] = bytes;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return cudaMallocHost(p, bytes); }

cudaError_t cudaFreeHost(void* p) {
  const ApiCall call;
  if (!p) return cudaSuccess;
  if (cudaError_t error = refuse_in_capture("cudaFreeHost")) return error;
  synchronize_all();
  if (pinned.erase(static_cast<const char*>(p)) == 0) {
    report("bad-free", "cudaFreeHost of %p, which is not pinned memory", p);
    return fail(cudaErrorInvalidValue);
  }
  std::free(p);
  return call.error;
}

// The host waits, but not for a copy within the device, nor for the transfer of pageable memory once that has been
// read: a non-blocking stream may still see the old data.
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const ApiCall call;
  if (call.error) return call.error;
  if (cudaError_t error = copy(to, from, bytes, kind, nullptr)) return error;
  return in_arena(to) && !is_pinned(from, bytes) ? cudaSuccess : synchronize(nullptr);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const ApiCall call;
  return call.error ? call.error : copy(to, from, bytes, kind, stream);
}

cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  const ApiCall call;
  return call.error ? call.error : fill(p, value, bytes, nullptr);
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  const ApiCall call;
  return call.error ? call.error : fill(p, value, bytes, stream);
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const ApiCall call;
  if (call.error) return call.error;
  *total = settings().memory;
  *free = settings().memory - allocated_bytes;
  return cudaSuccess;
}
