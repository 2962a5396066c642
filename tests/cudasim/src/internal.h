// What the parts of the simulator offer each other, and what the simulated libraries (cuBLASLt, NCCL, PTX) build on.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <functional>

namespace cudasim {

// --- reports.cpp -----------------------------------------------------------------------------------------------------

// Adds a report. Kernel, block and thread are added where a kernel is running. The same text is reported once.
void report(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The same at a place in the source: each kind is reported once per place and kernel, whatever the text.
void report_at(const char* kind, const char* file, int line, const char* format, ...)
    __attribute__((format(printf, 4, 5)));

// --- streams.cpp -----------------------------------------------------------------------------------------------------

// Runs the work in the order of the stream: at once, or in lazy mode when something waits for it.
void enqueue(cudaStream_t stream, std::function<void()> work);

// The running work takes so long on the clock that events read. What does not say so takes no time.
void pass_time(double milliseconds);

// --- memory.cpp ------------------------------------------------------------------------------------------------------

// A library's access to device memory when its work runs. what names the operand. False (and a report) if bytes from p
// on do not lie in one allocation: it must not be done then. A read of what nothing has written is only reported.
bool check_read(const void* p, size_t bytes, const char* what);
bool check_write(const void* p, size_t bytes, const char* what);

// Whether bytes from p on lie in one living allocation of device memory. No report.
bool in_one_allocation(const void* p, size_t bytes);

// --- scheduler.cpp ---------------------------------------------------------------------------------------------------

// Whether a kernel is running; the functions below are for that case only.
bool in_kernel();

// Index of the running thread in its block: 0 to 1023.
unsigned thread_index();

// Waits until all lanes of mask have called it with the same kind (an address that names the operation). The last to
// arrive runs `run` with the arguments of all lanes (null for lanes outside mask), then all go on. Orders no memory
// accesses.
void warp_collective(unsigned mask, void* argument, void (*run)(void** arguments, unsigned mask), const void* kind,
                     const char* file, int line);

// Ends the running block and fails the launch with error, as a fault does on a device.
[[noreturn]] void fail_kernel(cudaError_t error);

// --- banks.cpp -------------------------------------------------------------------------------------------------------

// The running thread's next access to shared memory takes no time of its own: it was counted before.
void skip_next_shared_access();

// --- ptx.cpp ---------------------------------------------------------------------------------------------------------

// Called when a block has ended: reports copies without a wait and forgets them.
void finish_async_copies();

}  // namespace cudasim
