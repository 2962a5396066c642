// The simulated NCCL: one process per rank, on one machine.
//
// The ranks compare their calls before they exchange data: different operations, counts, types, reductions or roots,
// which would hang or corrupt memory on GPUs, are reported with every rank's call. Reductions go through the ranks in
// order and round to the type of the data after every addition, as rings do.
//
// Where a non-blocking communicator waits for the other ranks (to join, for the first collective, which connects them,
// and to be finalized) its calls return ncclInProgress, and ncclCommGetAsyncError is to be asked until it says otherwise.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "bf16.h"
#include "cudasim/control.h"
#include "internal.h"
#include "nccl_ranks.h"

using namespace cudasim::nccl;
using cudasim::report;

struct ncclComm {
  ncclComm(const ncclUniqueId& id, int size, int rank, bool blocking)
      : ranks(id, size, rank), blocking(blocking), connected(blocking) {}
  Ranks ranks;
  const bool blocking;
  bool connected;
  ncclResult_t error = ncclSuccess;  // once it has failed, every call returns it
  // Of a non-blocking communicator whose last call is in progress: the meeting that it waits for, and what then follows.
  uint64_t meeting = 0;
  std::function<void()> next;

  // What calls return, and ncclCommGetAsyncError says.
  ncclResult_t state() const { return error == ncclSuccess && next ? ncclInProgress : error; }
};

namespace cudasim::nccl {
namespace {

// Queued work keeps its communicator alive.
std::map<const ncclComm*, std::shared_ptr<ncclComm>> communicators;
std::string last_error;

// --- refusals --------------------------------------------------------------------------------------------------------

[[noreturn]] __attribute__((format(printf, 2, 3))) void refuse(ncclResult_t result, const char* format, ...) {
  char reason[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(reason, sizeof reason, format, arguments);
  va_end(arguments);
  throw Failure{result, reason};
}

// The result of an entry point: what `body` throws, or success. A refused call is a bug of the caller, so it is
// reported.
template <typename Body>
ncclResult_t answer(const char* function, Body body) {
  try {
    body();
    return ncclSuccess;
  } catch (const Failure& failure) {
    last_error = std::string(function) + ": " + failure.reason;
    report("nccl", "%s", last_error.c_str());
    return failure.result;
  }
}

std::shared_ptr<ncclComm> find(ncclComm_t comm) {
  const auto found = communicators.find(comm);
  if (found == communicators.end()) refuse(ncclInvalidArgument, "%p is not a communicator", static_cast<void*>(comm));
  return found->second;
}

// --- non-blocking communicators ---------------------------------------------------------------------------------------

void begin(ncclComm& comm, std::function<void()> next) {
  comm.meeting = comm.ranks.arrive();
  comm.next = std::move(next);
}

void check_idle(const ncclComm& comm) {
  if (comm.next) refuse(ncclInvalidUsage, "the call before is in progress: ask ncclCommGetAsyncError until it is not");
}

void fail(ncclComm& comm, const Failure& failure) {
  comm.error = failure.result;
  comm.next = nullptr;
  last_error = "rank " + std::to_string(comm.ranks.rank) + ": " + failure.reason;
  report("nccl", "%s", last_error.c_str());
  comm.ranks.give_up();
}

void advance(ncclComm& comm) {
  if (!comm.next) return;
  try {
    if (!comm.ranks.all_arrived(comm.meeting)) return;
  } catch (const Failure& failure) {
    return fail(comm, failure);
  }
  std::exchange(comm.next, nullptr)();
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

size_t element_size(int type) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return sizes[type];
}

template <typename Number>
Number combine(Number x, Number y, int reduction) {
  switch (reduction) {
    case ncclMax:
      return std::max(x, y);
    case ncclMin:
      return std::min(x, y);
    default:
      return x + y;
  }
}

struct Bf16 {
  uint16_t bits;
};
float load(float x) { return x; }
int32_t load(int32_t x) { return x; }
float load(Bf16 x) { return float_from_bf16(x.bits); }
void store(float& x, float value) { x = value; }
void store(int32_t& x, int32_t value) { x = value; }
void store(Bf16& x, float value) { x.bits = bf16_from_float(value); }

// out[i] = reduction over the ranks' elements i.
template <typename Element>
void reduce(void* out, const std::vector<const void*>& ranks, size_t count, int reduction) {
  for (size_t i = 0; i < count; i++) {
    Element sum = static_cast<const Element*>(ranks[0])[i];
    for (size_t rank = 1; rank < ranks.size(); rank++)
      store(sum, combine(load(sum), load(static_cast<const Element*>(ranks[rank])[i]), reduction));
    if (reduction == ncclAvg) store(sum, load(sum) / static_cast<int>(ranks.size()));
    static_cast<Element*>(out)[i] = sum;
  }
}

void reduce_bytes(void* out, const std::vector<const void*>& ranks, size_t bytes, const Call& call) {
  switch (call.type) {
    case ncclFloat32:
      return reduce<float>(out, ranks, bytes / sizeof(float), call.reduction);
    case ncclInt32:
      return reduce<int32_t>(out, ranks, bytes / sizeof(int32_t), call.reduction);
    default:
      return reduce<Bf16>(out, ranks, bytes / sizeof(Bf16), call.reduction);
  }
}

// --- one call of one rank --------------------------------------------------------------------------------------------

struct Request {
  std::shared_ptr<ncclComm> comm;
  Call call;
  const void* send;
  void* recv;
  cudaStream_t stream;

  int rank() const { return comm->ranks.rank; }
  size_t bytes() const { return call.count * element_size(call.type); }
  bool to_peer() const { return call.operation == Operation::Send || call.operation == Operation::Recv; }
  // Bytes at send and recv that this rank reads and writes.
  size_t send_bytes() const {
    if (call.operation == Operation::Recv || (call.operation == Operation::Broadcast && call.root != rank())) return 0;
    return call.operation == Operation::ReduceScatter ? bytes() * comm->ranks.size : bytes();
  }
  size_t recv_bytes() const {
    if (call.operation == Operation::Send || (call.operation == Operation::Reduce && call.root != rank())) return 0;
    return call.operation == Operation::AllGather ? bytes() * comm->ranks.size : bytes();
  }
};

// Throws Failure if the memory must not be used; check_read and check_write have reported why.
void check_memory(const Request& request) {
  const std::string what = "nccl" + describe(request.call);
  const bool allowed =
      (!request.send_bytes() || check_read(request.send, request.send_bytes(), (what + " reads sendbuff").c_str())) &&
      (!request.recv_bytes() || check_write(request.recv, request.recv_bytes(), (what + " writes recvbuff").c_str()));
  if (!allowed) throw Failure{ncclUnhandledCudaError, describe(request.call) + " cannot use its memory"};
}

void agree(Ranks& ranks, const Call& call) {
  SharedMemory& shared = ranks.shared();
  shared.calls[ranks.rank] = call;
  ranks.meet(describe(call));
  bool same = true;
  std::string all;
  for (int i = 0; i < ranks.size; i++) {
    same = same && shared.calls[i] == call;
    all += (i ? ", rank " : "rank ") + std::to_string(i) + " " + describe(shared.calls[i]);
  }
  if (!same) throw Failure{ncclInvalidUsage, "the ranks call different operations: " + all};
  ranks.meet(describe(call));
}

// Every rank shows its input to all, a chunk at a time.
void run_collective(const Request& request) {
  const Call& call = request.call;
  Ranks& ranks = request.comm->ranks;
  const std::string why = describe(call);
  agree(ranks, call);
  check_memory(request);
  const size_t bytes = request.bytes();
  const size_t total = call.operation == Operation::ReduceScatter ? bytes * ranks.size : bytes;
  for (size_t first = 0; first < total; first += kChunkBytes) {
    const size_t length = std::min(kChunkBytes, total - first);
    auto& chunks = ranks.shared().chunks;
    if (request.send_bytes()) std::memcpy(chunks[ranks.rank], static_cast<const char*>(request.send) + first, length);
    ranks.meet(why);
    char* out = static_cast<char*>(request.recv);
    // The part of the chunk that this rank reduces.
    size_t begin = first, end = first + length, out_begin = first;
    switch (call.operation) {
      case Operation::AllGather:
        for (int i = 0; i < ranks.size; i++) std::memcpy(out + i * bytes + first, chunks[i], length);
        begin = end;
        break;
      case Operation::Broadcast:
        std::memcpy(out + first, chunks[call.root], length);
        begin = end;
        break;
      case Operation::ReduceScatter:
        begin = std::max(first, ranks.rank * bytes);
        end = std::min(first + length, (ranks.rank + 1) * bytes);
        out_begin = begin - ranks.rank * bytes;
        break;
      case Operation::Reduce:
        if (ranks.rank != call.root) begin = end;
        break;
      default:
        break;
    }
    if (begin < end) {
      std::vector<const void*> inputs;
      for (int i = 0; i < ranks.size; i++) inputs.push_back(chunks[i] + (begin - first));
      reduce_bytes(out + out_begin, inputs, end - begin, call);
    }
    ranks.meet(why);
  }
}

// --- messages --------------------------------------------------------------------------------------------------------

struct Transfer {
  const Request* request;
  size_t done = 0;
  bool finished = false;
};

void send_part(Transfer& transfer, Mailbox& mailbox) {
  const Request& request = *transfer.request;
  mailbox.call = request.call;
  mailbox.bytes = std::min(kPartBytes, request.bytes() - transfer.done);
  std::memcpy(mailbox.data, static_cast<const char*>(request.send) + transfer.done, mailbox.bytes);
  mailbox.full = 1;
}

void receive_part(Transfer& transfer, Mailbox& mailbox) {
  const Request& request = *transfer.request;
  if (mailbox.call.count != request.call.count || mailbox.call.type != request.call.type)
    throw Failure{ncclInvalidUsage, "rank " + std::to_string(request.rank()) + " calls " + describe(request.call) +
                                        ", rank " + std::to_string(request.call.root) + " " + describe(mailbox.call)};
  std::memcpy(static_cast<char*>(request.recv) + transfer.done, mailbox.data, mailbox.bytes);
  mailbox.full = 0;
}

// Moves a part of the transfer if its mailbox allows; messages of one rank to another keep their order.
bool advance(Transfer& transfer, Ranks& ranks) {
  const Request& request = *transfer.request;
  const bool sends = request.call.operation == Operation::Send;
  const int peer = request.call.root;
  Mailbox& mailbox = sends ? ranks.shared().mail[ranks.rank][peer] : ranks.shared().mail[peer][ranks.rank];
  if (mailbox.full == sends) return false;
  if (sends)
    send_part(transfer, mailbox);
  else
    receive_part(transfer, mailbox);
  transfer.done += mailbox.bytes;
  transfer.finished = transfer.done == request.bytes();
  ranks.signal();
  return true;
}

// All sends and receives of a group go on at the same time.
void run_transfers(const std::vector<Request>& requests) {
  Ranks& ranks = requests[0].comm->ranks;
  std::vector<Transfer> transfers;
  for (const Request& request : requests) {
    check_memory(request);
    transfers.push_back({&request});
  }
  const auto first_unfinished = [&](const Transfer& transfer) {
    for (const Transfer& earlier : transfers) {
      if (&earlier == &transfer) return true;
      if (!earlier.finished && earlier.request->call.operation == transfer.request->call.operation &&
          earlier.request->call.root == transfer.request->call.root)
        return false;
    }
    return true;
  };
  const auto move_all = [&] {
    bool finished = true;
    for (Transfer& transfer : transfers) {
      while (!transfer.finished && first_unfinished(transfer) && advance(transfer, ranks)) {
      }
      finished = finished && transfer.finished;
    }
    return finished;
  };
  const auto what = [&] {
    std::string text = "rank " + std::to_string(ranks.rank) + " waits in";
    for (const Transfer& transfer : transfers)
      if (!transfer.finished) text += " " + describe(transfer.request->call);
    return text;
  };
  ranks.wait_until(move_all, what);
}

// --- streams and groups ----------------------------------------------------------------------------------------------

thread_local int group_depth = 0;
thread_local std::vector<Request> group;

void enqueue_work(const Request& request, std::function<void()> work) {
  enqueue(request.stream, [comm = request.comm, work = std::move(work)] {
    if (comm->error != ncclSuccess) return;
    try {
      work();
    } catch (const Failure& failure) {
      fail(*comm, failure);
    }
  });
}

// Collectives in their order, then the messages of each communicator.
void enqueue_requests(const std::vector<Request>& requests) {
  std::map<ncclComm*, std::vector<Request>> messages;
  for (const Request& request : requests) {
    if (request.to_peer())
      messages[request.comm.get()].push_back(request);
    else
      enqueue_work(request, [request] { run_collective(request); });
  }
  for (const auto& [comm, batch] : messages) {
    for (const Request& request : batch)
      if (request.stream != batch[0].stream) refuse(ncclInvalidUsage, "the messages of a group use different streams");
    enqueue_work(batch[0], [batch = batch] { run_transfers(batch); });
  }
}

void check_buffer(const char* name, const void* buffer, size_t bytes, size_t alignment) {
  if (!bytes) return;
  if (!buffer) refuse(ncclInvalidArgument, "%s is null", name);
  if (reinterpret_cast<uintptr_t>(buffer) % alignment)
    refuse(ncclInvalidArgument, "%s %p is not aligned to its elements of %zu bytes", name, buffer, alignment);
  if (!in_one_allocation(buffer, bytes))
    refuse(ncclInvalidArgument, "%s (%zu bytes at %p) does not lie in one allocation of device memory", name, bytes,
           buffer);
}

// sendbuff and recvbuff may overlap in one way only: NCCL User Guide, "In-place Operations".
void check_in_place(const Request& request) {
  const char *send = static_cast<const char*>(request.send), *recv = static_cast<const char*>(request.recv);
  if (!request.send_bytes() || !request.recv_bytes()) return;
  if (send + request.send_bytes() <= recv || recv + request.recv_bytes() <= send) return;
  const size_t offset = request.rank() * request.bytes();
  const bool in_place = request.call.operation == Operation::AllGather       ? send == recv + offset
                        : request.call.operation == Operation::ReduceScatter ? recv == send + offset
                                                                             : send == recv;
  if (!in_place) refuse(ncclInvalidArgument, "sendbuff and recvbuff overlap, but not as an in-place operation");
}

void check_request(const Request& request) {
  const Call& call = request.call;
  const bool reduces = call.operation == Operation::AllReduce || call.operation == Operation::ReduceScatter ||
                       call.operation == Operation::Reduce;
  if (call.type < 0 || call.type >= ncclNumTypes) refuse(ncclInvalidArgument, "data type %d", call.type);
  if (reduces && call.type != ncclFloat32 && call.type != ncclBfloat16 && call.type != ncclInt32)
    refuse(ncclInvalidArgument, "data type %d: reductions of float32, bfloat16 and int32 are simulated", call.type);
  if (reduces && call.reduction != ncclSum && call.reduction != ncclMax && call.reduction != ncclMin &&
      call.reduction != ncclAvg)
    refuse(ncclInvalidArgument, "reduction %d: sum, max, min and avg are simulated", call.reduction);
  if (call.root < 0 || call.root >= request.comm->ranks.size)
    refuse(ncclInvalidArgument, "rank %d: the communicator has ranks 0 to %d", call.root, request.comm->ranks.size - 1);
  check_buffer("sendbuff", request.send, request.send_bytes(), element_size(call.type));
  check_buffer("recvbuff", request.recv, request.recv_bytes(), element_size(call.type));
  check_in_place(request);
}

ncclResult_t submit(const char* function, ncclComm_t comm, const Call& call, const void* send, void* recv,
                    cudaStream_t stream) {
  std::shared_ptr<ncclComm> living;
  const ncclResult_t result = answer(function, [&] {
    living = find(comm);
    if (living->error != ncclSuccess) return;
    check_idle(*living);
    const Request request = {living, call, send, recv, stream};
    check_request(request);
    if (group_depth)
      group.push_back(request);
    else if (std::exchange(living->connected, true))
      enqueue_requests({request});
    else
      begin(*living, [request] { enqueue_requests({request}); });
  });
  return result != ncclSuccess ? result : living->state();
}

void check_config(const ncclConfig_t& config) {
  const ncclConfig_t initial = NCCL_CONFIG_INITIALIZER;
  if (config.magic != initial.magic || config.size != initial.size)
    refuse(ncclInvalidArgument, "the configuration was not set to NCCL_CONFIG_INITIALIZER");
  if (config.blocking != NCCL_CONFIG_UNDEF_INT && config.blocking != 0 && config.blocking != 1)
    refuse(ncclInvalidArgument, "blocking = %d", config.blocking);
}

}  // namespace
}  // namespace cudasim::nccl

extern "C" {

// --- communicators ---------------------------------------------------------------------------------------------------

ncclResult_t ncclGetVersion(int* version) {
  return answer("ncclGetVersion", [&] {
    if (!version) refuse(ncclInvalidArgument, "version is null");
    *version = NCCL_VERSION_CODE;
  });
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  return answer("ncclGetUniqueId", [&] {
    if (!id) refuse(ncclInvalidArgument, "uniqueId is null");
    *id = Ranks::make_id();
  });
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank, ncclConfig_t* config) {
  std::shared_ptr<ncclComm> made;
  const ncclResult_t result = answer("ncclCommInitRank", [&] {
    if (!comm) refuse(ncclInvalidArgument, "comm is null");
    if (config) check_config(*config);
    if (group_depth) refuse(ncclInvalidUsage, "in a group: one rank per process is simulated");
    made = std::make_shared<ncclComm>(id, size, rank, !config || config->blocking != 0);
    if (made->blocking) {
      made->ranks.meet("ncclCommInitRank");
      made->ranks.joined();
    } else {
      begin(*made, [ranks = &made->ranks] { ranks->joined(); });
    }
    *comm = made.get();
    communicators[made.get()] = made;
  });
  return result != ncclSuccess ? result : made->state();
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank) {
  return ncclCommInitRankConfig(comm, size, id, rank, nullptr);
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  std::shared_ptr<ncclComm> living;
  const ncclResult_t result = answer("ncclCommFinalize", [&] {
    living = find(comm);
    if (living->error != ncclSuccess) return;
    check_idle(*living);
    if (living->blocking) return;
    living->ranks.shared().calls[living->ranks.rank] = {Operation::CommFinalize, 0, 0, 0, 0};
    begin(*living, [] {});
  });
  return result != ncclSuccess ? result : living->state();
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  return answer("ncclCommDestroy", [&] {
    check_idle(*find(comm));
    communicators.erase(comm);
  });
}

// What is still queued will not run.
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  return answer("ncclCommAbort", [&] {
    const std::shared_ptr<ncclComm> living = find(comm);
    living->error = ncclRemoteError;
    living->next = nullptr;
    living->ranks.give_up();
    communicators.erase(comm);
  });
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  return answer("ncclCommGetAsyncError", [&] {
    const std::shared_ptr<ncclComm> living = find(comm);
    advance(*living);
    *error = living->state();
  });
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  return answer("ncclCommCount", [&] { *count = find(comm)->ranks.size; });
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  return answer("ncclCommUserRank", [&] { *rank = find(comm)->ranks.rank; });
}

const char* ncclGetErrorString(ncclResult_t result) {
  switch (result) {
    case ncclSuccess:
      return "no error";
    case ncclUnhandledCudaError:
      return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
    case ncclSystemError:
      return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
    case ncclInternalError:
      return "internal error - please report this issue to the NCCL developers";
    case ncclInvalidArgument:
      return "invalid argument (run with NCCL_DEBUG=WARN for details)";
    case ncclInvalidUsage:
      return "invalid usage (run with NCCL_DEBUG=WARN for details)";
    case ncclRemoteError:
      return "remote process exited or there was a network error";
    case ncclInProgress:
      return "NCCL operation in progress";
    default:
      return "unknown result code";
  }
}

const char* ncclGetLastError(ncclComm_t) { return last_error.c_str(); }

// --- groups ----------------------------------------------------------------------------------------------------------

ncclResult_t ncclGroupStart() {
  group_depth++;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
  ncclResult_t error = ncclSuccess;
  const ncclResult_t result = answer("ncclGroupEnd", [&] {
    if (group_depth == 0) refuse(ncclInvalidUsage, "no group was started");
    if (--group_depth) return;
    const std::vector<Request> requests = std::move(group);
    group.clear();
    enqueue_requests(requests);
    for (const Request& request : requests)
      if (request.comm->error != ncclSuccess) error = request.comm->error;
  });
  return result != ncclSuccess ? result : error;
}

// --- operations ------------------------------------------------------------------------------------------------------

ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t reduction,
                           ncclComm_t comm, cudaStream_t stream) {
  return submit("ncclAllReduce", comm, {Operation::AllReduce, type, reduction, 0, count}, send, recv, stream);
}

ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t reduction,
                               ncclComm_t comm, cudaStream_t stream) {
  return submit("ncclReduceScatter", comm, {Operation::ReduceScatter, type, reduction, 0, count}, send, recv, stream);
}

ncclResult_t ncclAllGather(const void* send, void* recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  return submit("ncclAllGather", comm, {Operation::AllGather, type, 0, 0, count}, send, recv, stream);
}

ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  return submit("ncclBroadcast", comm, {Operation::Broadcast, type, 0, root, count}, send, recv, stream);
}

ncclResult_t ncclReduce(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t reduction,
                        int root, ncclComm_t comm, cudaStream_t stream) {
  return submit("ncclReduce", comm, {Operation::Reduce, type, reduction, root, count}, send, recv, stream);
}

ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return submit("ncclSend", comm, {Operation::Send, type, 0, peer, count}, send, nullptr, stream);
}

ncclResult_t ncclRecv(void* recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return submit("ncclRecv", comm, {Operation::Recv, type, 0, peer, count}, nullptr, recv, stream);
}

}  // extern "C"
