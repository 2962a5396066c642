// The checker of memory accesses of instrumented kernels: see checker.cpp.
#pragma once

#include <string>

#include "core.h"

#pragma GCC visibility push(hidden)
namespace cudasim {

// Called when an instrumented module is loaded. Before that nothing is checked but bounds, by copies and libraries.
void start_checking();

enum class AccessKind { Read, Write, Atomic };
// An access by instrumented code, in a kernel or on the host. Does not return if the kernel cannot go on.
void check_access(const volatile void* p, size_t bytes, AccessKind kind, const void* pc);
// Each of them to device memory (traffic.cpp). block: different in each of them and in each launch.
void count_traffic(const volatile void* p, size_t bytes, bool write, unsigned site, uint64_t block);

// Device memory as copies and libraries use it.
void mark_initialised(const void* p, size_t bytes);
bool all_initialised(const void* p, size_t bytes, size_t* first_bad);
void forget_memory(const void* p, size_t bytes);  // freed

// The place of an access: "file:line", with the callers' places if the function there was inlined.
std::string place_of(unsigned site);

// What orders accesses, told by the scheduler.
void begin_launch(const Launch& launch, const StaticShared& shared, size_t dynamic_bytes, bool early);
void begin_block();
void note_barrier();
void note_warp_sync(unsigned mask);  // of the running thread's warp

}  // namespace cudasim
#pragma GCC visibility pop
