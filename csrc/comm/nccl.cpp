#include "comm/nccl.h"

#include <nccl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <functional>
#include <limits>
#include <thread>

#include "comm/failure.h"
#include "cuda/check.h"

namespace llmc {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kHighestPriority = std::numeric_limits<int>::min();  // CUDA takes the highest that there is
constexpr auto kPollInterval = std::chrono::microseconds(50);
constexpr double kFarewellSeconds = 10;  // the most that the destructor waits for the other ranks

Clock::time_point after(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

// NCCL's words for a failed call.
std::string words(ncclResult_t result, ncclComm_t comm) {
  const std::string more = ncclGetLastError(comm);
  return std::string("NCCL: ") + ncclGetErrorString(result) + (more.empty() ? "" : ": " + more);
}

ncclDataType_t nccl_type(const Tensor& x) { return x.dtype == DType::F32 ? ncclFloat32 : ncclBfloat16; }

// NCCL and our events work on the thread's current device.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    LLMC_CUDA_CHECK(cudaGetDevice(&previous_));
    LLMC_CUDA_CHECK(cudaSetDevice(device));
  }
  ~CurrentDevice() { cudaSetDevice(previous_); }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
};

// Collectives run on a stream of their own, beside the operations on the compute stream, in the order of their calls.
//
// The NCCL communicator is a non-blocking one: where its calls would wait for other ranks they return ncclInProgress, and
// the waiting is done here, with a time-out. Nothing here waits for the device without one.
class Nccl final : public Communicator {
 public:
  Nccl(const ncclUniqueId& id, int rank, int size, int device, double timeout)
      : rank_(rank), size_(size), device_(device), timeout_(timeout) {
    const CurrentDevice current(device_);
    try {
      LLMC_CUDA_CHECK(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, kHighestPriority));
      for (Collective& collective : collectives_) {
        for (cudaEvent_t* event : {&collective.ready, &collective.done}) {
          LLMC_CUDA_CHECK(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
        }
      }
      ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
      config.blocking = 0;
      const std::string why = wait_for_nccl(ncclCommInitRankConfig(&comm_, size, id, rank, &config), after(timeout_));
      LLMC_CHECK(why.empty(), "rank %d of %d cannot join the others: %s", rank_, size_, why.c_str());
    } catch (...) {
      release();
      throw;
    }
  }

  ~Nccl() override {
    int previous = 0;
    cudaGetDevice(&previous);
    cudaSetDevice(device_);
    try {
      farewell();
    } catch (const Error&) {
    }
    release();
    cudaSetDevice(previous);
  }
  Nccl(const Nccl&) = delete;
  Nccl& operator=(const Nccl&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  void attach(void* stream) override {
    LLMC_CHECK(!attached_, "a communicator of GPUs serves one model: make another one for this model");
    attached_ = true;
    compute_ = static_cast<cudaStream_t>(stream);
  }

  Ticket all_reduce_average(Tensor x, const std::string& what) override { return all_reduce(x, ncclAvg, what); }

  Ticket all_reduce_sum(Tensor x, const std::string& what) override { return all_reduce(x, ncclSum, what); }

  Ticket reduce_scatter_average(Tensor x, const std::string& what) override {
    return issue("reduce_scatter", x, what, [&] {
      const int64_t n = x.numel() / size_;
      void* own = slice_elements(x, rank_ * n, (rank_ + 1) * n).data;
      return ncclReduceScatter(x.data, own, size_t(n), nccl_type(x), ncclAvg, comm_, stream_);
    });
  }

  Ticket all_gather(Tensor x, Tensor own, const std::string& what) override {
    return issue("all_gather", x, what,
                 [&] { return ncclAllGather(own.data, x.data, size_t(own.numel()), nccl_type(x), comm_, stream_); });
  }

  void wait(Ticket ticket) override {
    check_usable();
    if (ticket <= finished_) return;
    const CurrentDevice current(device_);
    LLMC_CUDA_CHECK(cudaStreamWaitEvent(compute_, collective(known(ticket)).done, 0));
  }

  void finish(Ticket ticket) override {
    check_usable();
    if (ticket <= finished_) return;
    const CurrentDevice current(device_);
    finish_until(known(ticket), after(timeout_));
  }

 private:
  struct Collective {
    const char* operation = "";
    std::string what;
    Tensor x;
    cudaEvent_t ready = nullptr;  // the compute stream has come to the call
    cudaEvent_t done = nullptr;
  };
  // How many collectives are remembered. They are done in their order, so the oldest of these stands for all before it.
  static constexpr Ticket kRemembered = 64;

  Collective& collective(Ticket ticket) { return collectives_[size_t(ticket % kRemembered)]; }

  Ticket known(Ticket ticket) const {
    LLMC_CHECK(ticket <= last_ticket_, "ticket %lld was not given out: the last one is %lld",
               static_cast<long long>(ticket), static_cast<long long>(last_ticket_));
    return std::max(ticket, last_ticket_ - kRemembered + 1);
  }

  void check_usable() const { LLMC_CHECK(failure_.empty(), "%s", failure_.c_str()); }

  Ticket all_reduce(const Tensor& x, ncclRedOp_t op, const std::string& what) {
    return issue("all_reduce", x, what,
                 [&] { return ncclAllReduce(x.data, x.data, size_t(x.numel()), nccl_type(x), op, comm_, stream_); });
  }

  Ticket issue(const char* operation, const Tensor& x, const std::string& what,
               const std::function<ncclResult_t()>& enqueue) {
    check_usable();
    const CurrentDevice current(device_);
    Collective& next = collective(last_ticket_ + 1);
    next.operation = operation;
    next.what = what;
    next.x = x;
    LLMC_CUDA_CHECK(cudaEventRecord(next.ready, compute_));
    LLMC_CUDA_CHECK(cudaStreamWaitEvent(stream_, next.ready, 0));
    const std::string why = wait_for_nccl(enqueue(), after(timeout_));
    if (!why.empty()) fail(next, why);
    LLMC_CUDA_CHECK(cudaEventRecord(next.done, stream_));
    return ++last_ticket_;
  }

  // Until NCCL has done what `result` says it is at. Returns why it could not, or "".
  std::string wait_for_nccl(ncclResult_t result, Clock::time_point deadline) {
    while (result == ncclInProgress) {
      if (Clock::now() > deadline) return timed_out();
      std::this_thread::sleep_for(kPollInterval);
      result = state();
    }
    return result == ncclSuccess ? "" : words(result, comm_);
  }

  ncclResult_t state() {
    ncclResult_t state = ncclSuccess;
    const ncclResult_t result = ncclCommGetAsyncError(comm_, &state);
    return result == ncclSuccess ? state : result;
  }

  // The first collective that does not end is the one that is named.
  void finish_until(Ticket ticket, Clock::time_point deadline) {
    for (finished_ = std::max(finished_, last_ticket_ - kRemembered); finished_ < ticket; finished_++) {
      const Collective& next = collective(finished_ + 1);
      for (bool done = false; !done;) {
        const cudaError_t status = cudaEventQuery(next.done);
        if (status != cudaSuccess && status != cudaErrorNotReady) {
          fail(next, std::string("CUDA: ") + cudaGetErrorString(status));
        }
        done = status == cudaSuccess;
        const ncclResult_t result = state();  // also when it is done: a collective that was given up ends, too
        if (result != ncclSuccess && result != ncclInProgress) fail(next, words(result, comm_));
        if (!done && Clock::now() > deadline) fail(next, timed_out());
        if (!done) std::this_thread::sleep_for(kPollInterval);
      }
    }
  }

  std::string timed_out() const {
    char text[128];
    std::snprintf(text, sizeof text, "after %g s another rank is still missing, or it does something else", timeout_);
    return text;
  }

  [[noreturn]] void fail(const Collective& collective, const std::string& why) {
    failure_ = describe_failure(collective.operation, collective.what, collective.x, rank_, size_, why);
    abort();  // or kernels would wait for the other ranks forever
    throw_error(__FILE__, __LINE__, "%s", failure_.c_str());
  }

  void abort() {
    if (comm_) ncclCommAbort(comm_);
    comm_ = nullptr;
  }

  // The other ranks may still need what this one has sent: after a common end, the connections are closed in agreement.
  void farewell() {
    if (!comm_ || !failure_.empty()) return;
    const Clock::time_point deadline = after(std::min(timeout_, kFarewellSeconds));
    finish_until(last_ticket_, deadline);
    if (wait_for_nccl(ncclCommFinalize(comm_), deadline).empty()) {
      ncclCommDestroy(comm_);
      comm_ = nullptr;
    }
  }

  // Errors of the clean-up have nobody to go to.
  void release() {
    abort();
    for (Collective& collective : collectives_) {
      for (const cudaEvent_t event : {collective.ready, collective.done}) {
        if (event) cudaEventDestroy(event);
      }
    }
    if (stream_) cudaStreamDestroy(stream_);
  }

  const int rank_, size_, device_;
  const double timeout_;  // seconds
  ncclComm_t comm_ = nullptr;
  bool attached_ = false;
  cudaStream_t compute_ = nullptr, stream_ = nullptr;
  std::array<Collective, size_t(kRemembered)> collectives_;
  Ticket last_ticket_ = 0, finished_ = 0;
  std::string failure_;  // the first one, of which all later calls speak
};

}  // namespace

std::string nccl_unique_id() {
  ncclUniqueId id;
  const ncclResult_t result = ncclGetUniqueId(&id);
  LLMC_CHECK(result == ncclSuccess, "no unique id for the ranks: %s", words(result, nullptr).c_str());
  return std::string(id.internal, sizeof id.internal);
}

std::shared_ptr<Communicator> make_nccl_communicator(const std::string& unique_id, int rank, int size, int device,
                                                     double timeout_seconds) {
  ncclUniqueId id;
  LLMC_CHECK(unique_id.size() == sizeof id.internal,
             "the unique id has %zu bytes, it must be what nccl_unique_id() gave rank 0: %zu bytes", unique_id.size(),
             sizeof id.internal);
  LLMC_CHECK(size >= 1 && rank >= 0 && rank < size, "there is no rank %d of %d", rank, size);
  LLMC_CHECK(timeout_seconds > 0, "the time-out is %g s, it must be more than 0", timeout_seconds);
  std::memcpy(id.internal, unique_id.data(), sizeof id.internal);
  return std::make_shared<Nccl>(id, rank, size, device, timeout_seconds);
}

}  // namespace llmc
