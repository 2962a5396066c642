// How tests steer the simulator and read what it found. Loaded through ctypes or linked.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// Number of reports since the last clear; each place is reported once. Work that is still queued has not been checked:
// synchronise first.
int cudasim_error_count(void);

// All reports since the last clear, one line each:
//   KIND: kernel NAME block (x,y,z) thread (x,y,z): MESSAGE at FILE:LINE [other access at FILE:LINE]
// Valid until the next call.
const char* cudasim_report(void);

// Forgets all reports and the sticky error of a failed kernel.
void cudasim_clear(void);

// Order of lanes, warps and blocks: "forward", "reverse" or "random:SEED". 1 if accepted, 0 if malformed.
int cudasim_set_schedule(const char* schedule);

// Lazy: queued work runs only when something waits for it. Otherwise it runs at once.
void cudasim_set_lazy(int lazy);

// Bytes of shared memory a block may opt in to: 99 KiB (compute capability 8.9) or 227 KiB (9.0, the default).
void cudasim_set_shared_memory(int bytes);

// 1: counts the accesses to device memory of the checked kernels that run from now on, from zero. 0: stops.
void cudasim_count_traffic(int count);

// What was counted (src/traffic.cpp), valid until the next call: a line for reads and one for writes, tabs between
//   read|written REQUESTS SECTORS DIFFERENT_SECTORS
const char* cudasim_traffic(void);

// Whether p points into the simulator's device memory.
int cudasim_is_device_pointer(const void* p);

// Number of kernels and graphs launched since the library was loaded; kernels that are captured, or that graphs launch,
// do not count.
unsigned long long cudasim_launch_count(void);

// 1: counts the accesses to shared memory of the checked kernels that run from now on, from zero. 0: stops.
void cudasim_count_bank_conflicts(int count);

// What was counted, a line for each kernel and place, valid until the next call; tabs between
//   KERNEL PLACE read|write BYTES REQUESTS WAVEFRONTS LEAST
// BYTES are those of a lane, REQUESTS of warps. WAVEFRONTS beyond LEAST are bank conflicts (src/banks.cpp).
const char* cudasim_bank_conflicts(void);

#ifdef __cplusplus
}
#endif
