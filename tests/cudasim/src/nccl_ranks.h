// The ranks of a simulated NCCL communicator: processes of one machine that share memory and wait for each other.
//
// The memory has no name in /dev/shm, so that a crash leaves nothing behind: it is an anonymous file of the process
// that made the unique id, which the others open through /proc. It lives until the last process has gone.
#pragma once

#include <nccl.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace cudasim::nccl {

constexpr int kMaxRanks = 16;
constexpr size_t kChunkBytes = 1 << 20;  // of a collective, for each rank
constexpr size_t kPartBytes = 1 << 18;   // of a message

enum class Operation : int32_t { AllReduce, ReduceScatter, AllGather, Broadcast, Reduce, Send, Recv, CommFinalize };

// What ranks must agree on.
struct Call {
  Operation operation;
  int32_t type, reduction;  // ncclDataType_t, ncclRedOp_t; reduction 0 where there is none
  int32_t root;             // Broadcast, Reduce; the peer of Send and Recv; else 0
  uint64_t count;
};
std::string describe(const Call& call);
bool operator==(const Call& x, const Call& y);

// The way from one rank to another: holds one part of a message at a time.
struct Mailbox {
  std::atomic<uint32_t> full;
  Call call;  // of the sender
  uint64_t bytes;
  char data[kPartBytes];
};

// Zero when it is made.
struct SharedMemory {
  uint64_t key;                    // of the unique id
  std::atomic<uint32_t> activity;  // counts what a waiting rank may wait for
  std::atomic<int32_t> failed;     // 1 + the first rank that gave up
  std::atomic<int32_t> size;       // number of ranks that the first to join was told
  std::atomic<int32_t> joined[kMaxRanks];
  std::atomic<uint64_t> steps[kMaxRanks];  // how many meetings each rank has reached
  Call calls[kMaxRanks];
  Mailbox mail[kMaxRanks][kMaxRanks];  // [from][to]
  char chunks[kMaxRanks][kChunkBytes];
};

// Why a communicator cannot go on.
struct Failure {
  ncclResult_t result;
  std::string reason;
};

class Ranks {
 public:
  // Throws Failure if the id is unknown or used. The ranks must meet before anything else, and call joined().
  Ranks(const ncclUniqueId& id, int size, int rank);
  void joined();  // the id cannot be used again
  static ncclUniqueId make_id();

  const int size, rank;
  SharedMemory& shared() { return *shared_; }

  // Waits until ready() is true. `what` says for whom and for what in the message of the Failure that ends a wait in
  // which nothing has happened for CUDASIM_NCCL_TIMEOUT seconds, or another rank has failed.
  void wait_until(const std::function<bool()>& ready, const std::function<std::string()>& what);
  void signal();                      // wakes the others, for whom something has changed
  void meet(const std::string& why);  // waits until all ranks are here
  // The same without waiting: a meeting, and whether all ranks have come to it. Throws Failure if one has given up.
  uint64_t arrive();
  bool all_arrived(uint64_t meeting);
  void give_up();  // ends the waiting of all ranks

 private:
  struct Unmap {
    void operator()(SharedMemory* memory) const;
  };
  std::unique_ptr<SharedMemory, Unmap> shared_;
  double timeout_;    // seconds
  int id_file_ = -1;  // where this process made the id, until all have joined
};

}  // namespace cudasim::nccl
