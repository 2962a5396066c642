// Runs a grid on the calling thread: blocks one after another, each CUDA thread of a block as a fiber.
//
// A fiber runs until it waits at a barrier or in a warp operation; which one goes on is the schedule's choice. Staying
// in one warp while it has ready lanes keeps its stacks in the cache.
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "banks.h"
#include "checker.h"
#include "core.h"

// Kernels see these as constants (device.h).
uint3 cudasim_thread_index __asm__("threadIdx");
uint3 cudasim_block_index __asm__("blockIdx");
uint3 cudasim_block_dim __asm__("blockDim");
uint3 cudasim_grid_dim __asm__("gridDim");

// Saves the callee-saved registers of the System V ABI on the stack, the stack pointer in *save, and continues with the
// stack pointer `to`, which an earlier call saved or prepare_stack() made.
extern "C" void cudasim_switch(void** save, void* to);
extern "C" void cudasim_start_fiber();
asm(R"(
.text
.hidden cudasim_switch
.globl cudasim_switch
.type cudasim_switch, @function
cudasim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cudasim_switch, .-cudasim_switch
.hidden cudasim_start_fiber
.globl cudasim_start_fiber
.type cudasim_start_fiber, @function
cudasim_start_fiber:
  xorl %ebp, %ebp
  call cudasim_fiber_main
  ud2
.size cudasim_start_fiber, .-cudasim_start_fiber
)");

namespace cudasim {

__thread Thread* current_thread;
std::string current_kernel;

namespace {

struct Warp {
  uint32_t live;     // lanes that exist and have not exited
  uint32_t ready;    // lanes that can run
  uint32_t waiting;  // lanes in a warp operation
};

Thread threads[kMaxThreads];
Warp warps[kMaxThreads / kLanes];
unsigned thread_count, warp_count, live_threads;
unsigned current_warp;
Order order;  // of the running grid
void* main_stack_pointer;
cudaError_t block_error;
const Launch* current_launch;
bool waited;  // a thread of the running block, for the kernels before

// The barrier that some threads wait at.
struct {
  unsigned arrived;
  const char* file;  // of the first to arrive
  int line;
  int count;  // of true predicates
} barrier_state;
int barrier_count, barrier_threads;  // result of the last barrier: true predicates, participants

// --- choosing the next fiber -----------------------------------------------------------------------------------------

unsigned highest(uint32_t lanes) { return 31 - unsigned(__builtin_clz(lanes)); }
unsigned lowest(uint32_t lanes) { return unsigned(__builtin_ctz(lanes)); }

unsigned random_lane(uint32_t lanes) {
  for (unsigned skip = random_below(unsigned(__builtin_popcount(lanes))); skip > 0; skip--) lanes &= lanes - 1;
  return lowest(lanes);
}

// False if no warp has a ready lane.
bool choose_warp() {
  if (order == Order::Random) {
    if (warps[current_warp].ready && random_below(4)) return true;
    unsigned candidates[kMaxThreads / kLanes], count = 0;
    for (unsigned w = 0; w < warp_count; w++)
      if (warps[w].ready) candidates[count++] = w;
    if (count == 0) return false;
    current_warp = candidates[random_below(count)];
    return true;
  }
  const unsigned step = order == Order::Forward ? 1 : warp_count - 1;
  for (unsigned tried = 0; tried < warp_count; tried++) {
    if (warps[current_warp].ready) return true;
    current_warp = (current_warp + step) % warp_count;
  }
  return false;
}

Thread* take_ready_thread() {
  if (!choose_warp()) return nullptr;
  uint32_t& ready = warps[current_warp].ready;
  const unsigned lane = order == Order::Forward   ? lowest(ready)
                        : order == Order::Reverse ? highest(ready)
                                                  : random_lane(ready);
  ready &= ~(1u << lane);
  return &threads[current_warp * kLanes + lane];
}

void go(void** save, Thread* thread) {
  current_thread = thread;
  cudasim_thread_index = thread->index;
  cudasim_switch(save, thread->stack_pointer);
}

// Lets others run until the current thread is chosen again.
void suspend() {
  Thread* self = current_thread;
  Thread* next = take_ready_thread();
  if (next == self) return;
  if (next) {
    go(&self->stack_pointer, next);
  } else {
    current_thread = nullptr;
    cudasim_switch(&self->stack_pointer, main_stack_pointer);
  }
}

// --- barriers --------------------------------------------------------------------------------------------------------

void release_barrier() {
  barrier_count = barrier_state.count;
  barrier_threads = int(barrier_state.arrived);
  barrier_state = {};
  for (unsigned w = 0; w < warp_count; w++) warps[w].ready = warps[w].live;
  current_warp = order == Order::Reverse ? warp_count - 1 : 0;
  note_barrier();
}

bool same_place(const char* file, int line, const char* other_file, int other_line) {
  return line == other_line && (file == other_file || !std::strcmp(file, other_file));
}

// --- warp operations -------------------------------------------------------------------------------------------------

// Runs thread's operation if all lanes of its mask have arrived.
void complete_collective(unsigned w, Thread& thread) {
  Warp& warp = warps[w];
  if (thread.mask & ~warp.live) {
    report_at("warp-mask", thread.file, thread.line, "mask %08x names lanes that have exited or never existed (%08x)",
              thread.mask, thread.mask & ~warp.live);
    thread.mask &= warp.live;
  }
  const uint32_t mask = thread.mask;
  if ((warp.waiting & mask) != mask) return;
  void* arguments[kLanes] = {};
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    Thread& other = threads[w * kLanes + lowest(rest)];
    if ((other.mask & warp.live) != mask) return;  // in another operation, after which it may come here
    if (other.kind != thread.kind) {
      const Site site{nullptr, thread.file, thread.line}, other_site{nullptr, other.file, other.line};
      report_site("warp-mismatch", site, &other_site, "lanes %u and %u meet in different warp operations", thread.lane,
                  other.lane);
      fail_kernel(cudaErrorLaunchFailure);
    }
    arguments[other.lane] = other.argument;
  }
  thread.run(arguments, mask);
  warp.waiting &= ~mask;
  warp.ready |= mask;
}

void exit_thread() {
  Thread& thread = *current_thread;
  thread.state = State::Done;
  const unsigned w = thread.flat / kLanes;
  Warp& warp = warps[w];
  warp.live &= ~(1u << thread.lane);
  live_threads--;
  if (live_threads > 0 && barrier_state.arrived == live_threads) release_barrier();
  for (uint32_t rest = warp.waiting; rest; rest &= rest - 1) {
    Thread& waiting = threads[w * kLanes + lowest(rest)];
    if (warp.waiting >> waiting.lane & 1 && waiting.mask >> thread.lane & 1) complete_collective(w, waiting);
  }
}

// --- faults ----------------------------------------------------------------------------------------------------------
// An access that the checker did not see (fast kernels) may hit an inaccessible page.

struct {
  const void* address;
  const void* pc;
  bool misaligned;  // or no address at all: the processor does not tell
} fault;

// Continues here on the faulting fiber's emptied stack.
[[noreturn]] void on_fault() {
  const Site site{static_cast<const char*>(fault.pc) + 1, nullptr, 0};
  if (fault.misaligned) {
    report_site("misaligned", site, nullptr, "access to a misaligned (or impossible) address");
    fail_kernel(cudaErrorMisalignedAddress);
  }
  if (in_range(fault.address, kStacks, kMaxThreads * kStackBytes)) {
    report_site("stack-overflow", site, nullptr, "more than %zu bytes of local variables", kStackBytes);
    fail_kernel(cudaErrorHardwareStackError);
  }
  if (in_arena(fault.address)) {
    const Allocation* allocation = find_allocation(fault.address);
    report_site(allocation && allocation->freed ? "use-after-free" : "out-of-bounds", site, nullptr, "access to %s",
                describe_address(fault.address).c_str());
  } else {
    report_site("illegal-address", site, nullptr, "access to %p", fault.address);
  }
  fail_kernel(cudaErrorIllegalAddress);
}

struct sigaction previous_actions[2];
constexpr int fault_signals[2] = {SIGSEGV, SIGBUS};

void handle_fault(int number, siginfo_t* info, void* context) {
  if (!current_thread) {  // not ours: happens again with the action that was there before
    sigaction(number, &previous_actions[number == SIGBUS], nullptr);
    return;
  }
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  fault = {info->si_addr, reinterpret_cast<const void*>(registers[REG_RIP]), info->si_code == SI_KERNEL};
  registers[REG_RIP] = greg_t(reinterpret_cast<uintptr_t>(&on_fault));
  registers[REG_RSP] = greg_t(kStacks + (current_thread->flat + 1) * kStackBytes - 64 - 8);  // as after a call
}

// Faults are handled while a grid runs.
class FaultHandler {
 public:
  FaultHandler() {
    static char stack[64 << 10];
    const stack_t alternative = {stack, 0, sizeof stack};
    sigaltstack(&alternative, &previous_stack_);
    struct sigaction action = {};
    action.sa_sigaction = handle_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 2; i++) sigaction(fault_signals[i], &action, &previous_actions[i]);
  }
  ~FaultHandler() {
    for (int i = 0; i < 2; i++) sigaction(fault_signals[i], &previous_actions[i], nullptr);
    sigaltstack(&previous_stack_, nullptr);
  }

 private:
  stack_t previous_stack_;
};

// --- blocks ----------------------------------------------------------------------------------------------------------

void make_stacks() {
  static bool made = false;
  if (made) return;
  made = true;
  reserve(kStacks, kMaxThreads * kStackBytes, true);
  for (size_t i = 0; i < kMaxThreads; i++)
    mprotect(reinterpret_cast<void*>(kStacks + i * kStackBytes), kPage, PROT_NONE);
}

// A stack that cudasim_switch can continue with: six registers and the address of cudasim_start_fiber, which then finds
// the stack pointer aligned to 16 bytes.
void* prepare_stack(unsigned flat) {
  // Stacks at equal distances would compete for the same cache sets.
  const uintptr_t top = kStacks + (flat + 1) * kStackBytes - 192 * (flat % 128) - 64;
  auto* words = reinterpret_cast<uintptr_t*>(top) - 7;
  std::memset(words, 0, 6 * sizeof *words);
  words[6] = reinterpret_cast<uintptr_t>(&cudasim_start_fiber);
  return words;
}

void prepare_threads(dim3 block) {
  thread_count = live_threads = block.x * block.y * block.z;
  warp_count = (thread_count + kLanes - 1) / kLanes;
  uint3 index{0, 0, 0};
  for (unsigned i = 0; i < thread_count; i++) {
    Thread& thread = threads[i];
    thread.stack_pointer = prepare_stack(i);
    thread.index = index;
    thread.flat = uint16_t(i);
    thread.lane = uint8_t(i % kLanes);
    thread.state = State::Started;
    thread.waited = false;
    thread.sync_time = 0;
    if (++index.x == block.x) {
      index.x = 0;
      if (++index.y == block.y) {
        index.y = 0;
        index.z++;
      }
    }
  }
  for (unsigned w = 0; w < warp_count; w++) {
    const unsigned lanes = std::min(kLanes, thread_count - w * kLanes);
    warps[w].live = warps[w].ready = ~0u >> (kLanes - lanes);
    warps[w].waiting = 0;
  }
  current_warp = order == Order::Reverse ? warp_count - 1 : 0;
  barrier_state = {};
  waited = false;
}

// Two lanes that wait for each other, but with different masks.
bool report_different_masks() {
  for (unsigned i = 0; i < thread_count; i++) {
    for (unsigned j = i + 1; j < thread_count && j / kLanes == i / kLanes; j++) {
      const Thread &a = threads[i], &b = threads[j];
      if (a.state != State::InWarp || b.state != State::InWarp || a.mask == b.mask) continue;
      if (!(a.mask >> b.lane & 1) || !(b.mask >> a.lane & 1)) continue;
      const Site site{nullptr, a.file, a.line}, other{nullptr, b.file, b.line};
      current_thread = &threads[i];
      report_site("warp-mask", site, &other, "lanes %u and %u wait for each other with different masks, %08x and %08x",
                  a.lane, b.lane, a.mask, b.mask);
      current_thread = nullptr;
      return true;
    }
  }
  return false;
}

void report_deadlock() {
  if (report_different_masks()) return;
  std::string places;
  const char* file = nullptr;
  int line = 0, listed = 0;
  for (unsigned i = 0; i < thread_count && listed < 4; i++) {
    const Thread& thread = threads[i];
    if (thread.state == State::Done || (file && same_place(thread.file, thread.line, file, line))) continue;
    file = thread.file;
    line = thread.line;
    listed++;
    const char* slash = std::strrchr(file, '/');
    places += (listed > 1 ? ", thread " : "thread ") + std::to_string(i) +
              (thread.state == State::AtBarrier ? " at the barrier " : " in the warp operation ") +
              (slash ? slash + 1 : file) + ":" + std::to_string(line);
    if (listed == 1) current_thread = &threads[i];
  }
  report_at("deadlock", file, line, "no thread can go on: %s", places.c_str());
  current_thread = nullptr;
}

// The kernel may then end while earlier ones run, for which nothing waits that comes after it.
void report_early_end() {
  current_thread = &threads[0];
  const Site kernel{static_cast<const char*>(current_launch->kernel) + 1, nullptr, 0};
  report_site("early-end", kernel, nullptr, "the block has ended without a wait for earlier kernels");
  current_thread = nullptr;
}

cudaError_t run_block(dim3 block, bool early) {
  prepare_threads(block);
  block_error = cudaSuccess;
  go(&main_stack_pointer, take_ready_thread());
  if (block_error) return block_error;
  if (live_threads > 0) {
    report_deadlock();
    return cudaErrorLaunchTimeout;
  }
  if (early && !waited) report_early_end();
  return cudaSuccess;
}

std::vector<uint32_t> block_order(size_t count) {
  std::vector<uint32_t> blocks(count);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (order == Order::Reverse) std::reverse(blocks.begin(), blocks.end());
  if (order == Order::Random) {
    for (size_t i = count; i > 1; i--) std::swap(blocks[i - 1], blocks[random_below(unsigned(i))]);
  }
  return blocks;
}

}  // namespace

extern "C" [[noreturn]] __attribute__((visibility("hidden"))) void cudasim_fiber_main() {
  current_launch->invoke(current_launch->call.get());
  exit_thread();
  suspend();
  __builtin_unreachable();
}

bool in_kernel() { return current_thread != nullptr; }

uint32_t live_lanes() { return warps[current_thread->flat / kLanes].live; }

unsigned thread_index() { return current_thread->flat; }

void after_previous_kernel() { current_thread->waited = waited = true; }

void fail_kernel(cudaError_t error) {
  block_error = error;
  current_thread = nullptr;
  void* abandoned;
  cudasim_switch(&abandoned, main_stack_pointer);
  __builtin_unreachable();
}

int barrier(Vote vote, int predicate, const char* file, int line) {
  Thread& thread = *current_thread;
  thread.state = State::AtBarrier;
  thread.file = file;
  thread.line = line;
  if (barrier_state.arrived == 0) {
    barrier_state.file = file;
    barrier_state.line = line;
  } else if (!same_place(file, line, barrier_state.file, barrier_state.line)) {
    const Site site{nullptr, file, line}, other{nullptr, barrier_state.file, barrier_state.line};
    report_site("divergent-barrier", site, &other, "threads of one block wait at different barriers");
  }
  barrier_state.count += predicate != 0;
  if (++barrier_state.arrived == live_threads) release_barrier();
  suspend();
  switch (vote) {
    case Vote::Count:
      return barrier_count;
    case Vote::All:
      return barrier_count == barrier_threads;
    default:
      return barrier_count > 0;
  }
}

void warp_collective(unsigned mask, void* argument, void (*run)(void**, unsigned), const void* kind, const char* file,
                     int line) {
  Thread& thread = *current_thread;
  if (!(mask >> thread.lane & 1)) {
    report_at("warp-mask", file, line, "lane %u calls with the mask %08x, which lacks it", thread.lane, mask);
    mask |= 1u << thread.lane;
  }
  thread.state = State::InWarp;
  thread.file = file;
  thread.line = line;
  thread.argument = argument;
  thread.run = run;
  thread.kind = kind;
  thread.mask = mask;
  const unsigned w = thread.flat / kLanes;
  warps[w].waiting |= 1u << thread.lane;
  complete_collective(w, thread);
  suspend();
}

cudaError_t run_grid(const Launch& launch, dim3 grid, dim3 block, size_t dynamic_bytes, bool early) {
  make_stacks();
  const FaultHandler handler;
  order = settings().order;
  const StaticShared shared = static_shared(launch);
  current_launch = &launch;
  current_kernel = kernel_info(launch).name;
  cudasim_grid_dim = grid;
  cudasim_block_dim = block;
  begin_launch(launch, shared, dynamic_bytes, early);
  begin_counted_launch(current_kernel);
  cudaError_t error = cudaSuccess;
  for (const uint32_t i : block_order(size_t(grid.x) * grid.y * grid.z)) {
    cudasim_block_index = uint3{i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    // Shared memory starts undefined: NaN.
    if (shared.variables)
      for (const SharedVariable& variable : *shared.variables)
        std::memset(shared.begin + variable.offset, 0xff, variable.bytes);
    std::memset(dynamic_shared(), 0xff, dynamic_bytes);
    begin_block();
    error = run_block(block, early);
    finish_async_copies();
    finish_counted_block();
    if (error) break;
  }
  finish_reports();
  return error;
}

}  // namespace cudasim
