// The part of the PTX instructions that moves registers between lanes, and the list of pending asynchronous copies.
// Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", "... for mma.m16n8k8"
// (.tf32) and "Warp-level matrix load instruction: ldmatrix". There groupID = laneid / 4 and threadID_in_group = laneid
// % 4.
#include "cudasim/ptx.h"

#include <algorithm>
#include <vector>

#include "cudasim/control.h"
#include "internal.h"

namespace cudasim {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Runs an operation that needs the whole warp; a missing lane has been reported, and the results stay as they are.
template <void (*run)(void** operands)>
void run_if_complete(void** operands, unsigned mask) {
  if (mask == kAllLanes) run(operands);
}

// --- mma ------------------------------------------------------------------------------------------------------------

struct MmaOperands {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

// c += a·b, where element i of lane l's accumulator is row l/4 (+8 for i >= 2), column 2·(l%4) + i%2.
template <int K>
void multiply(void** operands, const float (&a)[16][K], const float (&b)[K][8]) {
  for (int row = 0; row < 16; row++) {
    float sum[8] = {};
    for (int k = 0; k < K; k++)
      for (int col = 0; col < 8; col++) sum[col] += a[row][k] * b[k][col];
    for (int col = 0; col < 8; col++) {
      const int lane = row % 8 * 4 + col / 2;
      static_cast<MmaOperands*>(operands[lane])->c[row / 8 * 2 + col % 2] += sum[col];
    }
  }
}

void run_mma_m16n8k16_bf16(void** operands) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto& own = *static_cast<const MmaOperands*>(operands[lane]);
    const int group = lane / 4, thread = lane % 4;
    for (int i = 0; i < 8; i++) {
      const uint32_t bits = i % 2 ? own.a[i / 2] & 0xffff0000u : own.a[i / 2] << 16;
      a[group + (i / 2 % 2 ? 8 : 0)][thread * 2 + i % 2 + (i < 4 ? 0 : 8)] = float_of(bits);
    }
    for (int i = 0; i < 4; i++) {
      const uint32_t bits = i % 2 ? own.b[i / 2] & 0xffff0000u : own.b[i / 2] << 16;
      b[thread * 2 + i % 2 + (i < 2 ? 0 : 8)][group] = float_of(bits);
    }
  }
  multiply(operands, a, b);
}

void run_mma_m16n8k8_tf32(void** operands) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto& own = *static_cast<const MmaOperands*>(operands[lane]);
    const int group = lane / 4, thread = lane % 4;
    for (int i = 0; i < 4; i++) a[group + (i % 2 ? 8 : 0)][thread + (i < 2 ? 0 : 4)] = float_of(own.a[i] & ~0x1fffu);
    for (int i = 0; i < 2; i++) b[thread + 4 * i][group] = float_of(own.b[i] & ~0x1fffu);
  }
  multiply(operands, a, b);
}

// --- ldmatrix -------------------------------------------------------------------------------------------------------

struct MatrixLoad {
  uint32_t* r;
  int count;
  const uint4* row;
};

// Register m of lane l: elements 2·(l%4) and 2·(l%4)+1 of row l/4 of matrix m; transposed: of column l/4.
template <bool Transposed>
void run_ldmatrix(void** loads) {
  const int count = static_cast<const MatrixLoad*>(loads[0])->count;
  for (int m = 0; m < count; m++) {
    uint16_t matrix[8][8];
    for (int j = 0; j < 8; j++)
      std::memcpy(matrix[j], static_cast<const MatrixLoad*>(loads[8 * m + j])->row, sizeof matrix[j]);
    for (int lane = 0; lane < 32; lane++) {
      const int major = lane / 4, minor = lane % 4 * 2;
      const uint32_t low = Transposed ? matrix[minor][major] : matrix[major][minor];
      const uint32_t high = Transposed ? matrix[minor + 1][major] : matrix[major][minor + 1];
      static_cast<MatrixLoad*>(loads[lane])->r[m] = low | high << 16;
    }
  }
}

// --- cp.async -------------------------------------------------------------------------------------------------------

// The copies of one thread in the order of their issue, and the groups that commits made of them.
struct CopyQueue {
  struct Entry {
    AsyncCopy copy;
    int group;  // index of the commit that closes the copy's group
    const char* file;
    int line;
  };
  std::vector<Entry> entries;
  size_t first = 0;  // the oldest copy that is pending
  int commits = 0;
};

// Of the running block, by thread; and whether any thread has used its queue.
CopyQueue queues[1024];
bool queues_used = false;

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file, int line) {
  static const char kind = 0;
  MmaOperands operands{c, a, b};
  warp_collective(kAllLanes, &operands, run_if_complete<run_mma_m16n8k16_bf16>, &kind, file, line);
}

void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file, int line) {
  static const char kind = 0;
  MmaOperands operands{c, a, b};
  warp_collective(kAllLanes, &operands, run_if_complete<run_mma_m16n8k8_tf32>, &kind, file, line);
}

namespace detail {

bool check_matrix_row(const void* row, const char* file, int line) {
  if (!aligned(row)) {
    report_at("ldmatrix", file, line, "row address %p is not a multiple of 16", row);
    return false;
  }
  if (cudasim_is_device_pointer(row)) {
    report_at("ldmatrix", file, line, "row address %p is global memory, ldmatrix reads shared memory", row);
    return false;
  }
  return true;
}

void distribute_matrices(uint32_t* r, int count, bool transposed, const uint4* row, const char* file, int line) {
  static const char kinds[2][5] = {};  // one identity for every form of the instruction
  MatrixLoad load{r, count, row};
  std::fill(r, r + count, ~0u);
  const auto run = transposed ? run_if_complete<run_ldmatrix<true>> : run_if_complete<run_ldmatrix<false>>;
  warp_collective(kAllLanes, &load, run, &kinds[transposed][count], file, line);
}

bool issue_copy(AsyncCopy copy, const char* file, int line) {
  if (!aligned(copy.shared) || !aligned(copy.global)) {
    report_at("cp-async", file, line, "addresses %p (shared) and %p (global) must be multiples of 16", copy.shared,
              copy.global);
    return false;
  }
  if (cudasim_is_device_pointer(copy.shared) || (copy.global && !cudasim_is_device_pointer(copy.global))) {
    report_at("cp-async", file, line, "copies go from global to shared memory, not from %p to %p", copy.global,
              copy.shared);
    return false;
  }
  CopyQueue& queue = queues[thread_index()];
  queue.entries.push_back({copy, queue.commits, file, line});
  queues_used = true;
  return true;
}

void commit_copies() {
  queues[thread_index()].commits++;
  queues_used = true;
}

bool next_copy(int groups, AsyncCopy& copy) {
  CopyQueue& queue = queues[thread_index()];
  if (queue.first == queue.entries.size() || queue.entries[queue.first].group >= queue.commits - groups) return false;
  copy = queue.entries[queue.first++].copy;
  skip_next_shared_access();  // its destination, which was written when it was issued
  if (queue.first == queue.entries.size()) {
    queue.entries.clear();
    queue.first = 0;
  }
  return true;
}

}  // namespace detail

void finish_async_copies() {
  if (!queues_used) return;
  for (CopyQueue& queue : queues) {
    if (queue.first < queue.entries.size()) {
      const CopyQueue::Entry& entry = queue.entries[queue.first];
      report_at("cp-async", entry.file, entry.line,
                "the block ended before a wait completed the copy that was issued here");
    }
    queue.entries.clear();
    queue.first = 0;
    queue.commits = 0;
  }
  queues_used = false;
}

}  // namespace cudasim
