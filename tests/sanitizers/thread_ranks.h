// Ranks that are threads of one process. Each has a thread of its own for its collectives, as Gloo has: memory that the
// step touches while a collective is under way is a data race, which ThreadSanitizer reports.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "comm/communicator.h"

namespace llmc {

// Where the collectives of all ranks meet.
class Meeting {
 public:
  explicit Meeting(int size) : size(size), tensors_(size_t(size)) {}

  void arrive();                  // waits for the other ranks
  void show(int rank, Tensor x);  // the same, and from then on all see x
  Tensor of(int rank) const { return tensors_[size_t(rank)]; }

  const int size;

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  int waiting_ = 0;
  int64_t meetings_ = 0;
  std::vector<Tensor> tensors_;
};

class ThreadRank final : public Communicator {
 public:
  // seed: of the delays before and after each collective.
  ThreadRank(Meeting& meeting, int rank, uint32_t seed);
  ~ThreadRank() override;

  int rank() const override { return rank_; }
  int size() const override { return meeting_.size; }
  void attach(void*) override {}
  Ticket all_reduce_average(Tensor x, const std::string& what) override;
  Ticket all_reduce_sum(Tensor x, const std::string& what) override;
  Ticket reduce_scatter_average(Tensor x, const std::string& what) override;  // what is undefined becomes NaN
  Ticket all_gather(Tensor x, Tensor own, const std::string& what) override;
  void wait(Ticket ticket) override;
  void finish(Ticket ticket) override { wait(ticket); }

 private:
  Ticket issue(std::function<void()> collective);
  void run();
  void delay();
  std::vector<float> sum_of_ranks(Tensor x);

  Meeting& meeting_;
  const int rank_;
  uint32_t random_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  Ticket issued_ = 0, done_ = 0;
  bool leaving_ = false;
  std::thread thread_;
};

}  // namespace llmc
