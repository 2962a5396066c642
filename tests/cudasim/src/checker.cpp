// The checker: is every access of a kernel inside its object, initialised, and ordered with the accesses of other
// threads?
//
// Time is a counter that every synchronisation advances. A shadow cell per granule of memory remembers who accessed it
// last and when; two accesses by different threads, one of them a write, must have a synchronisation between them: a
// barrier of the block, a __syncwarp of the warp (shuffles and votes order no memory), or the end of a kernel. Between
// blocks of one launch only a fence and an atomic in the one and an atomic on the same address in the other count.
#include "checker.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <unordered_map>
#include <vector>

#include "banks.h"

namespace cudasim {
namespace {

bool checking = false;    // an instrumented module is loaded
bool in_checked = false;  // the running kernel is instrumented
// Allocations with smaller numbers count as initialised: something that is not instrumented may have written them.
size_t first_watched = 0;

// --- shadow memory ---------------------------------------------------------------------------------------------------

constexpr size_t kGranule = 2;  // bytes: a bf16. Neighbouring bytes are not told apart.

// Time, thread, place and atomicity in one word; 0: never.
class Access {
 public:
  Access() = default;
  Access(uint64_t time, unsigned thread, unsigned site, bool atomic)
      : bits_(time << 28 | uint64_t(thread) << 18 | uint64_t(site) << 1 | uint64_t(atomic)) {}
  uint64_t time() const { return bits_ >> 28; }  // 36 bits: half an hour of nothing but synchronisation
  unsigned thread() const { return unsigned(bits_ >> 18) & (kMaxThreads - 1); }
  unsigned site() const { return unsigned(bits_ >> 1) & (kMaxSites - 1); }
  bool atomic() const { return bits_ & 1; }
  bool before(uint64_t time) const { return bits_ < time << 28; }

  static constexpr unsigned kMaxSites = 1 << 17;

 private:
  uint64_t bits_ = 0;
};

struct Cell {
  Access write;
  Access read, other_read;  // since the write, by different threads
};
static_assert(sizeof(Cell) == 24);

Cell* arena_cell(uintptr_t address) { return reinterpret_cast<Cell*>(kCells) + (address - kArena) / kGranule; }

// One bit per granule: whether it was ever written. The bytes that hold those of an object, and its bits in the outer
// ones.
struct InitialisedBits {
  InitialisedBits(const void* p, size_t bytes) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) - kArena) / kGranule;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(p) - kArena + bytes - 1) / kGranule;
    auto* table = reinterpret_cast<uint8_t*>(kInitialised);
    first = table + begin / 8;
    last = table + end / 8;
    in_first = uint8_t(0xff << begin % 8);
    in_last = uint8_t(0xff >> (7 - end % 8));
  }
  uint8_t *first, *last;
  uint8_t in_first, in_last;
};

bool all_initialised(const Allocation& allocation, const void* p, size_t bytes, size_t* first_bad) {
  if (allocation.number < first_watched) return true;
  const InitialisedBits bits(p, bytes);
  for (uint8_t* byte = bits.first; byte <= bits.last; byte++) {
    const int wanted = (byte == bits.first ? bits.in_first : 0xff) & (byte == bits.last ? bits.in_last : 0xff);
    const int missing = wanted & ~*byte;
    if (missing == 0) continue;
    const auto granule =
        size_t(byte - reinterpret_cast<uint8_t*>(kInitialised)) * 8 + size_t(__builtin_ctz(unsigned(missing)));
    const uintptr_t address = kArena + granule * kGranule;
    *first_bad = std::max(address, reinterpret_cast<uintptr_t>(p)) - reinterpret_cast<uintptr_t>(p);
    return false;
  }
  return true;
}

// --- places ----------------------------------------------------------------------------------------------------------

// Small numbers for the places of accesses; 0 when there are too many.
std::vector<Site> sites{Site{}};

unsigned add_site(const Site& site) {
  if (sites.size() == Access::kMaxSites) return 0;
  sites.push_back(site);
  return unsigned(sites.size() - 1);
}

unsigned site_of(const void* pc) {
  static std::unordered_map<const void*, unsigned> numbers;
  static struct {
    const void* pc;
    unsigned number;
  } recent[4096];
  auto& entry = recent[reinterpret_cast<uintptr_t>(pc) % 4096];
  if (entry.pc == pc) return entry.number;
  auto [it, added] = numbers.try_emplace(pc);
  if (added) it->second = add_site({pc, nullptr, 0});
  entry = {pc, it->second};
  return it->second;
}

unsigned site_of(const char* file, int line) {
  static std::map<std::pair<const char*, int>, unsigned> numbers;
  auto [it, added] = numbers.try_emplace({file, line});
  if (added) it->second = add_site({nullptr, file, line});
  return it->second;
}

// --- time and order --------------------------------------------------------------------------------------------------

uint64_t now = 1;
uint64_t launch_begin, block_begin, last_barrier;
uint64_t last_warp_sync[kMaxThreads / kLanes];
uint64_t last_fence;                 // by any thread of the running block
std::vector<uint64_t> block_begins;  // of this launch, ascending

// An atomic on one address after a fence publishes what its block did before the fence. A later atomic on the same
// address makes that visible to its own block.
struct Release {
  uint64_t block_begin;  // names the block
  uint64_t fence;
};
std::unordered_map<const volatile void*, std::vector<Release>> releases;  // of this launch, in order
std::unordered_map<const volatile void*, size_t> acquired;                // by the running block: how many of each

void release_and_acquire(const volatile void* address) {
  std::vector<Release>& list = releases[address];
  if (!list.empty() && list.back().block_begin == block_begin) {
    list.back().fence = std::max(list.back().fence, last_fence);
    return;
  }
  acquired[address] = list.size();
  list.push_back({block_begin, last_fence});
}

// Whether the running block has acquired what another block of the launch did at that time.
bool acquired_from_block(uint64_t time) {
  if (acquired.empty()) return false;
  const uint64_t block = *--std::upper_bound(block_begins.begin(), block_begins.end(), time);
  for (const auto& [address, count] : acquired) {
    const std::vector<Release>& list = releases[address];
    const auto end = list.begin() + long(count);
    const auto it = std::lower_bound(
        list.begin(), end, block, [](const Release& release, uint64_t begin) { return release.block_begin < begin; });
    if (it != end && it->block_begin == block && time < it->fence) return true;
  }
  return false;
}

enum class Space { Shared, Global };

// Accesses before this time are over for everybody, or were to the shared memory of another block.
uint64_t horizon(Space space) { return space == Space::Shared ? block_begin : launch_begin; }

// Whether an access that the cell remembers happened before what the running thread does now.
bool ordered(const Access& access, Space space) {
  const uint64_t time = access.time();
  if (time < horizon(space)) return true;
  if (time < block_begin) return acquired_from_block(time);
  const Thread& self = *current_thread;
  const unsigned thread = access.thread();
  if (thread == self.flat || time < last_barrier) return true;
  if (thread / kLanes != self.flat / kLanes) return false;
  return time < last_warp_sync[self.flat / kLanes] || (time < self.sync_time && self.sync_mask >> thread % kLanes & 1);
}

// --- checks of one access --------------------------------------------------------------------------------------------

struct Current {
  const volatile void* p;
  size_t bytes;
  AccessKind kind;
  unsigned site;
  Space space;
};

const char* verb(AccessKind kind) {
  return kind == AccessKind::Read ? "read" : kind == AccessKind::Write ? "write" : "atomic";
}

std::string describe(const Current& access) {
  const void* p = const_cast<const void*>(access.p);
  if (access.space == Space::Global) return "global memory, " + describe_address(p);
  return "shared memory";
}

__attribute__((noinline)) void report_race(const Current& access, const Access& other, const char* other_verb) {
  const bool same_block = other.time() >= block_begin;
  const bool same_warp = same_block && other.thread() / kLanes == current_thread->flat / kLanes;
  const char* kind = same_warp ? "race-in-warp" : same_block ? "race-in-block" : "race-between-blocks";
  report_site(kind, sites[access.site], &sites[other.site()], "%s of %zu bytes and unordered %s by thread %u%s: %s",
              verb(access.kind), access.bytes, other.atomic() ? "atomic" : other_verb, other.thread(),
              same_block ? "" : " of another block", describe(access).c_str());
}

__attribute__((noinline)) void report_uninitialised(const Current& access) {
  report_site("uninitialised", sites[access.site], nullptr, "%s of %zu bytes that nothing has written: %s",
              verb(access.kind), access.bytes, describe(access).c_str());
}

// Two readers are enough: whoever writes next conflicts with one of them. A reader that another warp or block is
// unordered with tells more than a second one of the own warp.
void remember_read(Cell& cell, const Access& access, Space space) {
  const bool read_in_block = !cell.read.before(block_begin);
  if (cell.read.before(horizon(space)) || (read_in_block && cell.read.thread() == access.thread())) {
    cell.read = access;
  } else if (!cell.other_read.before(block_begin) && cell.other_read.thread() == access.thread()) {
    cell.other_read = access;
  } else if (read_in_block && cell.read.thread() / kLanes == access.thread() / kLanes &&
             !ordered(cell.other_read, space)) {
    cell.read = access;
  } else {
    cell.other_read = cell.read;
    cell.read = access;
  }
}

void check_cell(Cell& cell, const Current& access, const Access& mark) {
  const bool atomic = access.kind == AccessKind::Atomic;
  if (!(atomic && cell.write.atomic()) && !ordered(cell.write, access.space)) report_race(access, cell.write, "write");
  if (access.kind == AccessKind::Read) {
    remember_read(cell, mark, access.space);
    return;
  }
  for (const Access* read : {&cell.read, &cell.other_read})
    if (!ordered(*read, access.space)) report_race(access, *read, "read");
  if (atomic) {
    // A plain write that others have not been ordered with stays: their atomics conflict with it.
    const uint64_t settled = access.space == Space::Global ? launch_begin : last_barrier;
    if (!cell.write.atomic() && cell.write.time() >= settled) return;
    cell.write = mark;
  } else {
    cell = {mark, {}, {}};
  }
}

void check_cells(Cell* cells, const Current& access) {
  const Access mark(now, current_thread->flat, access.site, access.kind == AccessKind::Atomic);
  const size_t first = reinterpret_cast<uintptr_t>(access.p) % kGranule;
  const size_t count = (first + access.bytes + kGranule - 1) / kGranule;
  if (access.space == Space::Shared && access.kind != AccessKind::Write) {
    for (size_t i = 0; i < count; i++) {
      if (cells[i].write.time() < block_begin) {
        report_uninitialised(access);
        break;
      }
    }
  }
  const uint64_t begin = horizon(access.space);
  for (size_t i = 0; i < count; i++) {
    Cell& cell = cells[i];
    // The usual case: whatever the cell remembers is over.
    if (access.kind == AccessKind::Read && cell.write.before(begin) && cell.read.before(begin)) {
      cell.read = mark;
    } else if (access.kind == AccessKind::Write && cell.write.before(begin) && cell.read.before(begin) &&
               cell.other_read.before(begin)) {
      cell.write = mark;
    } else {
      check_cell(cell, access, mark);
    }
  }
}

// --- static shared memory --------------------------------------------------------------------------------------------

struct {
  const Launch* launch;
  const Module* module;
  StaticShared memory;
  size_t dynamic_bytes;
  bool early;
  size_t static_bytes;  // of the variables that the launch has used so far
} running;
std::vector<Cell> static_cells, dynamic_cells;
std::vector<uint16_t> variable_of;    // number + 1 of the variable that a granule belongs to; 0: none
std::vector<uint64_t> variable_used;  // launch_begin of the last launch that used it

void map_variables(const StaticShared& shared) {
  variable_of.assign(shared.bytes / kGranule + 1, 0);
  variable_used.assign(shared.variables ? shared.variables->size() : 0, 0);
  static_cells.assign(shared.bytes / kGranule + 1, Cell{});
  for (size_t i = 0; i < variable_used.size(); i++) {
    const SharedVariable& variable = (*shared.variables)[i];
    for (size_t at = 0; at < variable.bytes; at += kGranule)
      variable_of[(variable.offset + at) / kGranule] = uint16_t(i + 1);
  }
}

// g++ does not know how much static shared memory a kernel has. It is what the kernel uses.
void count_variable(unsigned number, const Current& access) {
  if (variable_used[number] == launch_begin) return;
  variable_used[number] = launch_begin;
  running.static_bytes += (*running.memory.variables)[number].bytes;
  const size_t limit = running.dynamic_bytes > 0 ? size_t(settings().shared_memory) : size_t(48) << 10;
  if (running.static_bytes + running.dynamic_bytes > limit) {
    report_site("launch-limit", sites[access.site], nullptr,
                "%zu bytes of static and %zu of dynamic shared memory; the device has %zu", running.static_bytes,
                running.dynamic_bytes, limit);
  }
}

// --- where the access goes -------------------------------------------------------------------------------------------

[[noreturn]] __attribute__((noinline)) void fail_access(const char* kind, const Current& access,
                                                        const std::string& text) {
  report_site(kind, sites[access.site], nullptr, "%s of %zu bytes at %s", verb(access.kind), access.bytes,
              text.c_str());
  fail_kernel(cudaErrorIllegalAddress);
}

void check_global(const Current& access) {
  const void* p = const_cast<const void*>(access.p);
  const Allocation* allocation = find_allocation(p);
  if (!allocation || !inside(*allocation, p, access.bytes)) {
    fail_access(allocation && allocation->freed ? "use-after-free" : "out-of-bounds", access, describe_address(p));
  }
  // Stricter than PTX: each thread must have waited itself, not only one that it met at a barrier since.
  if (running.early && !current_thread->waited) {
    report_site("early-access", sites[access.site], nullptr, "%s of %zu bytes before the wait for earlier kernels: %s",
                verb(access.kind), access.bytes, describe(access).c_str());
  }
  size_t offset;
  if (access.kind != AccessKind::Write && !all_initialised(*allocation, p, access.bytes, &offset)) {
    report_uninitialised(access);
  }
  if (access.kind != AccessKind::Read) mark_initialised(p, access.bytes);
  count_traffic(p, access.bytes, access.kind != AccessKind::Read, access.site, block_begin);
  check_cells(arena_cell(reinterpret_cast<uintptr_t>(p)), access);
}

void check_dynamic_shared(const Current& access) {
  const size_t offset = reinterpret_cast<uintptr_t>(access.p) - kDynamicShared;
  if (offset + access.bytes > running.dynamic_bytes) {
    fail_access("out-of-bounds", access,
                "offset " + std::to_string(offset) + " of " + std::to_string(running.dynamic_bytes) +
                    " bytes of dynamic shared memory");
  }
  if (dynamic_cells.empty()) dynamic_cells.resize(kDynamicSharedBytes / kGranule);
  count_shared_access(access.p, access.bytes, access.kind != AccessKind::Read, access.site);
  check_cells(&dynamic_cells[offset / kGranule], access);
}

void check_static_shared(const Current& access) {
  const size_t offset = reinterpret_cast<uintptr_t>(access.p) - reinterpret_cast<uintptr_t>(running.memory.begin);
  const unsigned first = variable_of[offset / kGranule];
  const unsigned last = variable_of[std::min((offset + access.bytes - 1) / kGranule, variable_of.size() - 1)];
  if (first == 0) return;  // the guard of a variable with a constructor, which does nothing
  if (first != last) fail_access("out-of-bounds", access, "the end of a variable in static shared memory");
  count_variable(first - 1, access);
  count_shared_access(access.p, access.bytes, access.kind != AccessKind::Read, access.site);
  check_cells(&static_cells[offset / kGranule], access);
}

void check_other(const Current& access) {
  if (in_module(running.module, access.p)) return;  // constants
  const Launch& launch = *running.launch;
  if (in_range(access.p, reinterpret_cast<uintptr_t>(launch.call.get()), launch.bytes)) return;  // parameters
  char address[32];
  std::snprintf(address, sizeof address, "%p", const_cast<const void*>(access.p));
  fail_access("host-memory", access, std::string(address) + ", which is host memory");
}

void check(const volatile void* p, size_t bytes, AccessKind kind, unsigned site, Space space) {
  const Current access{p, bytes, kind, site, space};
  if (space == Space::Global) {
    check_global(access);
  } else if (in_range(p, kDynamicShared, kDynamicSharedBytes)) {
    check_dynamic_shared(access);
  } else if (in_range(p, reinterpret_cast<uintptr_t>(running.memory.begin), running.memory.bytes)) {
    check_static_shared(access);
  } else {
    check_other(access);
  }
}

}  // namespace

void start_checking() {
  if (checking) return;
  checking = true;
  first_watched = allocation_count();
  reserve(kCells, kArenaBytes / kGranule * sizeof(Cell), true);
  reserve(kInitialised, kArenaBytes / kGranule / 8, true);
}

void check_access(const volatile void* p, size_t bytes, AccessKind kind, const void* pc) {
  const bool global = in_arena(p);
  if (!current_thread) {
    if (global) {
      report_site("host-access", Site{pc, nullptr, 0}, nullptr, "host code makes a %s at %s", verb(kind),
                  describe_address(const_cast<const void*>(p)).c_str());
    }
    return;
  }
  if (in_range(p, kStacks, kMaxThreads * kStackBytes)) {
    const unsigned owner = unsigned((reinterpret_cast<uintptr_t>(p) - kStacks) / kStackBytes);
    if (owner != current_thread->flat) {
      report_site("local-memory", Site{pc, nullptr, 0}, nullptr, "%s of a local variable of thread %u", verb(kind),
                  owner);
    }
    return;
  }
  check(p, bytes, kind, site_of(pc), global ? Space::Global : Space::Shared);
}

void enter_atomic(const volatile void* p, size_t bytes, const char* file, int line) {
  if (!in_checked || !current_thread) return;
  const bool global = in_arena(p);
  check(p, bytes, AccessKind::Atomic, site_of(file, line), global ? Space::Global : Space::Shared);
  if (global) release_and_acquire(p);
}

std::string place_of(unsigned site) { return describe(sites[site]); }

// --- initialised memory ----------------------------------------------------------------------------------------------

void mark_initialised(const void* p, size_t bytes) {
  if (!checking || bytes == 0) return;
  const InitialisedBits bits(p, bytes);
  if (bits.first == bits.last) {
    *bits.first |= bits.in_first & bits.in_last;
    return;
  }
  *bits.first |= bits.in_first;
  std::memset(bits.first + 1, 0xff, size_t(bits.last - bits.first) - 1);
  *bits.last |= bits.in_last;
}

bool all_initialised(const void* p, size_t bytes, size_t* first_bad) {
  return !checking || bytes == 0 || all_initialised(*find_allocation(p), p, bytes, first_bad);
}

// Its addresses are never used again.
void forget_memory(const void* p, size_t bytes) {
  if (!checking) return;
  const auto begin = reinterpret_cast<uintptr_t>(arena_cell(reinterpret_cast<uintptr_t>(p)));
  const uintptr_t end = begin + bytes / kGranule * sizeof(Cell);
  const uintptr_t first_page = (begin + kPage - 1) / kPage * kPage, end_page = end / kPage * kPage;
  if (first_page < end_page) madvise(reinterpret_cast<void*>(first_page), end_page - first_page, MADV_DONTNEED);
}

// --- synchronisation -------------------------------------------------------------------------------------------------

void begin_launch(const Launch& launch, const StaticShared& shared, size_t dynamic_bytes, bool early) {
  in_checked = launch.checked;
  if (!launch.checked) {
    first_watched = allocation_count();
    return;
  }
  if (shared.begin != running.memory.begin || shared.variables != running.memory.variables) map_variables(shared);
  running = {&launch, kernel_info(launch).module, shared, dynamic_bytes, early, 0};
  launch_begin = ++now;
  block_begins.clear();
  releases.clear();
}

void begin_block() {
  if (!in_checked) return;
  block_begin = last_barrier = ++now;
  block_begins.push_back(block_begin);
  acquired.clear();
}

void note_barrier() { last_barrier = ++now; }

void note_warp_sync(unsigned mask) {
  ++now;
  if (mask == live_lanes()) {
    last_warp_sync[current_thread->flat / kLanes] = now;
    return;
  }
  Thread* warp = current_thread - current_thread->lane;
  for (unsigned lane = 0; lane < kLanes; lane++) {
    if (!(mask >> lane & 1)) continue;
    warp[lane].sync_mask = mask;
    warp[lane].sync_time = now;
  }
}

void fence() { last_fence = ++now; }

}  // namespace cudasim
