// Built-in device functions that need more than the calling thread: warp operations and votes.
#include <cstring>

#include "checker.h"
#include "core.h"

namespace cudasim {
namespace {

// Addresses name the kinds of operation.
const char shuffle_kinds[4] = {}, reduce_kinds[8] = {}, ballot_kind = 0, match_kind = 0, sync_kind = 0;

struct ShuffleArgument {
  void* value;
  size_t bytes;
  unsigned source;
};

// A lane that reads from one outside the mask gets NaN: the value is undefined.
void run_shuffle(void** arguments, unsigned mask) {
  unsigned char values[kLanes][8];
  for (unsigned lane = 0; lane < kLanes; lane++) {
    if (!(mask >> lane & 1)) {
      std::memset(values[lane], 0xff, sizeof values[lane]);
    } else {
      const auto& argument = *static_cast<const ShuffleArgument*>(arguments[lane]);
      std::memcpy(values[lane], argument.value, argument.bytes);
    }
  }
  for (unsigned lane = 0; lane < kLanes; lane++) {
    if (!(mask >> lane & 1)) continue;
    const auto& argument = *static_cast<const ShuffleArgument*>(arguments[lane]);
    std::memcpy(argument.value, values[argument.source], argument.bytes);
  }
}

// Lane `source` of the segment of `width` lanes that `lane` is in; lane itself where that is outside (PTX ISA,
// shfl.sync).
unsigned shuffle_source(Shuffle kind, unsigned lane, int operand, int width) {
  const int first = int(lane) & ~(width - 1), last = first + width - 1;
  switch (kind) {
    case Shuffle::Index:
      return unsigned(first | (operand & (width - 1)));
    case Shuffle::Up:
      return int(lane) - operand < first ? lane : lane - unsigned(operand);
    case Shuffle::Down:
      return int(lane) + operand > last ? lane : lane + unsigned(operand);
    case Shuffle::Xor:
      return (int(lane) ^ operand) > last ? lane : lane ^ unsigned(operand);
  }
  return lane;
}

struct VoteArgument {
  uint64_t value;
  unsigned result;
};

void run_ballot(void** arguments, unsigned mask) {
  unsigned result = 0;
  for (unsigned lane = 0; lane < kLanes; lane++)
    if (mask >> lane & 1) result |= unsigned(static_cast<VoteArgument*>(arguments[lane])->value) << lane;
  for (unsigned lane = 0; lane < kLanes; lane++)
    if (mask >> lane & 1) static_cast<VoteArgument*>(arguments[lane])->result = result;
}

void run_match(void** arguments, unsigned mask) {
  for (unsigned lane = 0; lane < kLanes; lane++) {
    if (!(mask >> lane & 1)) continue;
    auto& own = *static_cast<VoteArgument*>(arguments[lane]);
    own.result = 0;
    for (unsigned other = 0; other < kLanes; other++)
      if (mask >> other & 1 && static_cast<VoteArgument*>(arguments[other])->value == own.value)
        own.result |= 1u << other;
  }
}

unsigned combine(Reduction kind, unsigned a, unsigned b) {
  switch (kind) {
    case Reduction::Add:
      return a + b;
    case Reduction::Min:
      return min(a, b);
    case Reduction::Max:
      return max(a, b);
    case Reduction::And:
      return a & b;
    case Reduction::Or:
      return a | b;
    case Reduction::Xor:
      return a ^ b;
    case Reduction::SignedMin:
      return unsigned(min(int(a), int(b)));
    case Reduction::SignedMax:
      return unsigned(max(int(a), int(b)));
  }
  return 0;
}

struct ReduceArgument {
  Reduction kind;
  unsigned value;
};

void run_reduce(void** arguments, unsigned mask) {
  const ReduceArgument* total = nullptr;
  ReduceArgument result{};
  for (unsigned lane = 0; lane < kLanes; lane++) {
    if (!(mask >> lane & 1)) continue;
    const auto* argument = static_cast<const ReduceArgument*>(arguments[lane]);
    result = total ? ReduceArgument{result.kind, combine(result.kind, result.value, argument->value)} : *argument;
    total = &result;
  }
  for (unsigned lane = 0; lane < kLanes; lane++)
    if (mask >> lane & 1) *static_cast<ReduceArgument*>(arguments[lane]) = result;
}

void run_sync(void**, unsigned mask) { note_warp_sync(mask); }

}  // namespace

void sync_warp(unsigned mask, const char* file, int line) {
  warp_collective(mask, nullptr, run_sync, &sync_kind, file, line);
}

void shuffle(Shuffle kind, unsigned mask, void* value, size_t bytes, int operand, int width, const char* file,
             int line) {
  ShuffleArgument argument{value, bytes, shuffle_source(kind, current_thread->lane, operand, width)};
  warp_collective(mask, &argument, run_shuffle, &shuffle_kinds[int(kind)], file, line);
}

unsigned ballot(unsigned mask, int predicate, const char* file, int line) {
  VoteArgument argument{predicate != 0, 0};
  warp_collective(mask, &argument, run_ballot, &ballot_kind, file, line);
  return argument.result;
}

unsigned match_any(unsigned mask, uint64_t value, const char* file, int line) {
  VoteArgument argument{value, 0};
  warp_collective(mask, &argument, run_match, &match_kind, file, line);
  return argument.result;
}

unsigned reduce(Reduction kind, unsigned mask, unsigned value, const char* file, int line) {
  ReduceArgument argument{kind, value};
  warp_collective(mask, &argument, run_reduce, &reduce_kinds[int(kind)], file, line);
  return argument.value;
}

void trap(const char* file, int line) {
  report_at("trap", file, line, "__trap()");
  fail_kernel(cudaErrorLaunchFailure);
}

}  // namespace cudasim
