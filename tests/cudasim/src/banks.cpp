// Bank conflicts: how often a warp's access to shared memory takes longer than it must.
//
// Shared memory has 32 banks, and successive 4-byte words lie in successive ones. A device carries out an access of a warp
// in phases of as many lanes as ask for 32 words: all 32 lanes with 4 bytes each or less, 16 lanes with 8, 8 lanes with 16
// (ldmatrix and cp.async too). A phase takes one wavefront for each different word that it wants of its busiest bank, so at
// least one; lanes that want the same word share it. (CUDA C++ Programming Guide, "Shared Memory".)
//
// Threads are fibers here, each running on to its next synchronisation, so a warp's access is put together again: a lane's
// n-th execution of an instruction belongs to the n-th of the other lanes. Where lanes take different branches around it,
// that is a guess. Instructions are g++'s: nvcc may join several into a wider one or leave some out.
#include "banks.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <deque>
#include <map>
#include <tuple>
#include <vector>

#include "checker.h"
#include "cudasim/control.h"

namespace cudasim {
namespace {

constexpr unsigned kBanks = 32;
constexpr size_t kWord = 4, kWidest = 16;  // bytes

bool counting = false;
bool skip_next = false;

// A warp's access, of the lanes that have come to it.
struct Request {
  uint32_t lanes = 0;
  std::array<uintptr_t, kLanes> addresses;
};

struct Warp {
  std::array<size_t, kLanes> executions{};  // of each lane
  std::deque<Request> open;                 // the latest ones; those before are counted
  size_t first_open = 0;
};

// An instruction of a kernel.
struct Place {
  unsigned long long requests = 0, wavefronts = 0, least = 0;
  std::array<Warp, kMaxThreads / kLanes> warps;  // of the running block
};

using Key = std::tuple<unsigned, bool, size_t>;  // site, write, bytes
std::map<std::string, std::map<Key, Place>> kernels;
std::map<Key, Place>* running = nullptr;

void count(Place& place, size_t bytes, const Request& request) {
  const unsigned phase = bytes <= kWord ? kLanes : unsigned(kLanes * kWord / bytes);  // lanes
  place.requests++;
  for (unsigned begin = 0; begin < kLanes; begin += phase) {
    std::vector<uintptr_t> words;
    for (unsigned lane = begin; lane < begin + phase; lane++) {
      if (!(request.lanes >> lane & 1)) continue;
      const uintptr_t address = request.addresses[lane];
      for (uintptr_t word = address / kWord; word <= (address + bytes - 1) / kWord; word++) words.push_back(word);
    }
    if (words.empty()) continue;
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    std::array<unsigned, kBanks> wanted{};
    for (const uintptr_t word : words) wanted[word % kBanks]++;
    place.wavefronts += *std::max_element(wanted.begin(), wanted.end());
    place.least++;
  }
}

void count_piece(uintptr_t address, size_t bytes, bool write, unsigned site) {
  Place& place = (*running)[{site, write, bytes}];
  Warp& warp = place.warps[current_thread->flat / kLanes];
  const unsigned lane = current_thread->lane;
  const size_t number = warp.executions[lane]++;
  while (warp.first_open + warp.open.size() <= number) warp.open.emplace_back();
  Request& request = warp.open[number - warp.first_open];
  request.lanes |= 1u << lane;
  request.addresses[lane] = address;
  while (!warp.open.empty() && warp.open.front().lanes == ~0u) {
    count(place, bytes, warp.open.front());
    warp.open.pop_front();
    warp.first_open++;
  }
}

}  // namespace

void begin_counted_launch(const std::string& kernel) {
  running = counting ? &kernels[kernel] : nullptr;
  skip_next = false;
}

void count_shared_access(const volatile void* p, size_t bytes, bool write, unsigned site) {
  if (!running) return;
  if (skip_next) {
    skip_next = false;
    return;
  }
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  for (uintptr_t piece = begin; piece < end; piece += kWidest) {  // a structure may be larger
    count_piece(piece, std::min<size_t>(kWidest, end - piece), write, site);
  }
}

void skip_next_shared_access() { skip_next = running != nullptr; }

void finish_counted_block() {
  if (!running) return;
  for (auto& [key, place] : *running) {
    for (Warp& warp : place.warps) {
      for (const Request& request : warp.open) count(place, std::get<size_t>(key), request);
      warp = {};
    }
  }
}

}  // namespace cudasim

using namespace cudasim;

void cudasim_count_bank_conflicts(int count) {
  const ApiCall call;
  synchronize_all();
  counting = count != 0;
  if (counting) kernels.clear();
}

const char* cudasim_bank_conflicts() {
  static std::string text;
  const ApiCall call;
  synchronize_all();
  text.clear();
  for (const auto& [kernel, places] : kernels) {
    for (const auto& [key, place] : places) {
      const auto& [site, write, bytes] = key;
      char numbers[128];
      std::snprintf(numbers, sizeof numbers, "\t%s\t%zu\t%llu\t%llu\t%llu\n", write ? "write" : "read", bytes,
                    place.requests, place.wavefronts, place.least);
      text += kernel + "\t" + place_of(site) + numbers;
    }
  }
  return text.c_str();
}
