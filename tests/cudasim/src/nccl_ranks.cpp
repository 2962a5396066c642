#include "nccl_ranks.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cinttypes>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>

namespace cudasim::nccl {
namespace {

struct Id {
  int pid, file;
  uint64_t key;
};
constexpr const char* kIdFormat = "cudasim %d %d %" SCNx64;

double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

// Sleeps until the word is no longer `value`, or for `seconds`.
void sleep_while(std::atomic<uint32_t>& word, uint32_t value, double seconds) {
  const auto whole = static_cast<time_t>(seconds);
  const timespec limit = {whole, static_cast<long>((seconds - double(whole)) * 1e9)};
  syscall(SYS_futex, &word, FUTEX_WAIT, value, &limit, nullptr, 0);
}

double read_timeout() {
  const char* text = std::getenv("CUDASIM_NCCL_TIMEOUT");
  return text ? std::atof(text) : 20;
}

// Null if there is no such id (any more).
SharedMemory* open_shared_memory(const Id& id) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/fd/%d", id.pid, id.file);
  const int file = open(path, O_RDWR | O_CLOEXEC);
  if (file < 0) return nullptr;
  void* memory = MAP_FAILED;
  if (lseek(file, 0, SEEK_END) == off_t{sizeof(SharedMemory)})
    memory = mmap(nullptr, sizeof(SharedMemory), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) return nullptr;
  auto* shared = static_cast<SharedMemory*>(memory);
  if (shared->key == id.key) return shared;
  munmap(memory, sizeof(SharedMemory));
  return nullptr;
}

}  // namespace

std::string describe(const Call& call) {
  static const char* const operations[] = {"AllReduce", "ReduceScatter", "AllGather", "Broadcast",
                                           "Reduce",    "Send",          "Recv",      "CommFinalize"};
  static const char* const types[] = {"int8",    "uint8",   "int32",   "uint32",   "int64",   "uint64",
                                      "float16", "float32", "float64", "bfloat16", "fp8e4m3", "fp8e5m2"};
  static const char* const reductions[] = {"sum", "prod", "max", "min", "avg"};
  const Operation operation = call.operation;
  std::string text = operations[static_cast<int>(operation)];
  if (operation == Operation::CommFinalize) return text;
  text += "(count " + std::to_string(call.count) + ", " + types[call.type];
  if (operation == Operation::AllReduce || operation == Operation::ReduceScatter || operation == Operation::Reduce)
    text += std::string(", ") + reductions[call.reduction];
  if (operation == Operation::Broadcast || operation == Operation::Reduce)
    text += ", root " + std::to_string(call.root);
  if (operation == Operation::Send) text += ", to " + std::to_string(call.root);
  if (operation == Operation::Recv) text += ", from " + std::to_string(call.root);
  return text + ")";
}

bool operator==(const Call& x, const Call& y) {
  return x.operation == y.operation && x.type == y.type && x.reduction == y.reduction && x.root == y.root &&
         x.count == y.count;
}

ncclUniqueId Ranks::make_id() {
  const int file = memfd_create("cudasim-nccl", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, sizeof(SharedMemory))) throw Failure{ncclSystemError, "no shared memory"};
  std::random_device random;
  const Id id = {getpid(), file, uint64_t{random()} << 32 | random()};
  if (pwrite(file, &id.key, sizeof id.key, 0) != ssize_t{sizeof id.key})
    throw Failure{ncclSystemError, "no shared memory"};
  ncclUniqueId result = {};
  std::snprintf(result.internal, sizeof result.internal, "cudasim %d %d %" PRIx64, id.pid, id.file, id.key);
  return result;
}

Ranks::Ranks(const ncclUniqueId& unique_id, int size, int rank) : size(size), rank(rank), timeout_(read_timeout()) {
  if (size < 1 || size > kMaxRanks || rank < 0 || rank >= size)
    throw Failure{ncclInvalidArgument, "rank " + std::to_string(rank) + " of " + std::to_string(size) +
                                           ": ranks are 0 to size - 1, of at most " + std::to_string(kMaxRanks)};
  Id id;
  if (std::sscanf(unique_id.internal, kIdFormat, &id.pid, &id.file, &id.key) == 3)
    shared_.reset(open_shared_memory(id));
  if (!shared_)
    throw Failure{ncclInvalidArgument,
                  "the unique id was not made by ncclGetUniqueId of a living process, or was used"};
  int32_t told = 0;
  if (!shared_->size.compare_exchange_strong(told, size) && told != size)
    throw Failure{ncclInvalidArgument, "rank " + std::to_string(rank) + " joins " + std::to_string(size) +
                                           " ranks, another rank " + std::to_string(told)};
  if (shared_->joined[rank].exchange(1))
    throw Failure{ncclInvalidUsage, "two processes join as rank " + std::to_string(rank)};
  if (id.pid == getpid()) id_file_ = id.file;
}

void Ranks::joined() {
  if (id_file_ >= 0) close(id_file_);
  id_file_ = -1;
}

void Ranks::Unmap::operator()(SharedMemory* memory) const { munmap(memory, sizeof(SharedMemory)); }

void Ranks::signal() {
  shared_->activity++;
  syscall(SYS_futex, &shared_->activity, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Ranks::give_up() {
  int32_t none = 0;
  shared_->failed.compare_exchange_strong(none, rank + 1);
  signal();
}

void Ranks::wait_until(const std::function<bool()>& ready, const std::function<std::string()>& what) {
  uint32_t seen = shared_->activity;
  for (double deadline = seconds() + timeout_;;) {
    if (ready()) return;
    if (const int32_t failed = shared_->failed)
      throw Failure{ncclRemoteError, what() + ": rank " + std::to_string(failed - 1) + " gave up"};
    const double left = deadline - seconds();
    if (left <= 0) {
      char limit[32];
      std::snprintf(limit, sizeof limit, "%g", timeout_);
      throw Failure{ncclRemoteError, what() + ": not within " + limit + " s"};
    }
    sleep_while(shared_->activity, seen, left);
    const uint32_t now = shared_->activity;
    if (now != seen) deadline = seconds() + timeout_;
    seen = now;
  }
}

uint64_t Ranks::arrive() {
  const uint64_t meeting = ++shared_->steps[rank];
  signal();
  return meeting;
}

bool Ranks::all_arrived(uint64_t meeting) {
  for (int i = 0; i < size; i++) {
    if (shared_->steps[i] >= meeting) continue;
    if (const int32_t failed = shared_->failed)
      throw Failure{ncclRemoteError, "rank " + std::to_string(failed - 1) + " gave up"};
    return false;
  }
  return true;
}

void Ranks::meet(const std::string& why) {
  const uint64_t step = arrive();
  const auto late = [&] {
    std::string ranks;
    for (int i = 0; i < size; i++)
      if (shared_->steps[i] < step) ranks += " " + std::to_string(i);
    return ranks;
  };
  wait_until([&] { return late().empty(); }, [&] { return why + " waits for rank" + late(); });
}

}  // namespace cudasim::nccl
