// Traffic: how many 32-byte sectors of device memory the accesses of a warp ask for.
//
// A device carries out a load or store of a warp as one request, and a request takes as many sectors as its lanes' bytes
// lie in: 4 for 32 lanes with neighbouring floats, 32 for lanes a row apart (CUDA C++ Best Practices Guide, "Coalesced
// Access to Global Memory"). Caches may answer for a sector that was asked for before; the different ones must be moved
// from or to the memory at least once.
//
// Threads are fibers here, each running on to its next synchronisation, so a warp's access is put together again: a
// lane's n-th execution of an instruction belongs to the n-th of the other lanes. Where lanes take different branches
// around it, that is a guess.
#include <array>
#include <cstdio>
#include <map>
#include <set>
#include <string>
#include <unordered_set>
#include <vector>

#include "checker.h"
#include "cudasim/control.h"
#include "internal.h"

namespace cudasim {
namespace {

constexpr size_t kSector = 32;  // bytes

struct Instruction {
  std::array<std::vector<std::set<uintptr_t>>, kMaxThreads / kLanes> requests;  // sectors of each, by warp
  std::array<size_t, kMaxThreads> executions{};                                 // of each thread
};

struct Totals {
  unsigned long long requests = 0, sectors = 0;
  std::unordered_set<uintptr_t> different;
};

bool counting = false;
uint64_t block = 0;                                     // that is running
std::map<std::pair<unsigned, bool>, Instruction> open;  // of that block, by place and direction
std::array<Totals, 2> totals;                           // read, written

void finish_block() {
  for (const auto& [key, instruction] : open) {
    Totals& total = totals[key.second];
    for (const auto& warp : instruction.requests) {
      for (const std::set<uintptr_t>& sectors : warp) {
        total.requests++;
        total.sectors += sectors.size();
        total.different.insert(sectors.begin(), sectors.end());
      }
    }
  }
  open.clear();
}

}  // namespace

void count_traffic(const volatile void* p, size_t bytes, bool write, unsigned site, uint64_t running_block) {
  if (!counting) return;
  if (running_block != block) {
    finish_block();
    block = running_block;
  }
  const unsigned thread = current_thread->flat;
  Instruction& instruction = open[{site, write}];
  std::vector<std::set<uintptr_t>>& requests = instruction.requests[thread / kLanes];
  const size_t number = instruction.executions[thread]++;
  if (number == requests.size()) requests.emplace_back();
  const auto address = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t sector = address / kSector; sector <= (address + bytes - 1) / kSector; sector++) {
    requests[number].insert(sector);
  }
}

}  // namespace cudasim

using namespace cudasim;

void cudasim_count_traffic(int count) {
  const ApiCall call;
  synchronize_all();
  counting = count != 0;
  if (!counting) return;
  open.clear();
  totals = {};
}

const char* cudasim_traffic() {
  static std::string text;
  const ApiCall call;
  synchronize_all();
  finish_block();
  text.clear();
  for (const bool write : {false, true}) {
    const Totals& total = totals[write];
    char line[96];
    std::snprintf(line, sizeof line, "%s\t%llu\t%llu\t%zu\n", write ? "written" : "read", total.requests, total.sectors,
                  total.different.size());
    text += line;
  }
  return text.c_str();
}
