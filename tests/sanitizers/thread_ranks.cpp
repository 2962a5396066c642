#include "thread_ranks.h"

#include <chrono>
#include <cmath>
#include <cstring>
#include <utility>

namespace llmc {
namespace {

float load(Tensor x, int64_t i) { return x.dtype == DType::F32 ? x.as<float>()[i] : to_float(x.as<bf16>()[i]); }

void write(Tensor x, int64_t i, float value) {
  if (x.dtype == DType::F32) {
    store(x.as<float>() + i, value);
  } else {
    store(x.as<bf16>() + i, value);
  }
}

}  // namespace

void Meeting::arrive() {
  std::unique_lock<std::mutex> lock(mutex_);
  const int64_t meeting = meetings_;
  if (++waiting_ == size) {
    waiting_ = 0;
    meetings_++;
    all_here_.notify_all();
  } else {
    all_here_.wait(lock, [&] { return meetings_ != meeting; });
  }
}

void Meeting::show(int rank, Tensor x) {
  tensors_[size_t(rank)] = x;
  arrive();
}

ThreadRank::ThreadRank(Meeting& meeting, int rank, uint32_t seed)
    : meeting_(meeting), rank_(rank), random_(seed * 8191 + uint32_t(rank)), thread_([this] { run(); }) {}

ThreadRank::~ThreadRank() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    leaving_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

Ticket ThreadRank::issue(std::function<void()> collective) {
  const std::lock_guard<std::mutex> lock(mutex_);
  queue_.push_back(std::move(collective));
  changed_.notify_all();
  return ++issued_;
}

void ThreadRank::wait(Ticket ticket) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return done_ >= ticket; });
}

void ThreadRank::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return leaving_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const std::function<void()> collective = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    delay();
    collective();
    delay();
    lock.lock();
    done_++;
    changed_.notify_all();
  }
}

void ThreadRank::delay() {
  random_ = random_ * 1664525 + 1013904223;  // Numerical Recipes' generator
  if (random_ >> 31) std::this_thread::sleep_for(std::chrono::microseconds(random_ >> 20 & 511));
}

// In the order of the ranks. Returns when all have read.
std::vector<float> ThreadRank::sum_of_ranks(Tensor x) {
  std::vector<float> sum(size_t(x.numel()));
  meeting_.show(rank_, x);
  for (int rank = 0; rank < size(); rank++) {
    for (size_t i = 0; i < sum.size(); i++) sum[i] += load(meeting_.of(rank), int64_t(i));
  }
  meeting_.arrive();
  return sum;
}

Ticket ThreadRank::all_reduce_sum(Tensor x, const std::string&) {
  return issue([this, x] {
    const std::vector<float> sum = sum_of_ranks(x);
    for (size_t i = 0; i < sum.size(); i++) write(x, int64_t(i), sum[i]);
  });
}

Ticket ThreadRank::all_reduce_average(Tensor x, const std::string&) {
  return issue([this, x] {
    const std::vector<float> sum = sum_of_ranks(x);
    for (size_t i = 0; i < sum.size(); i++) write(x, int64_t(i), sum[i] / float(size()));
  });
}

Ticket ThreadRank::reduce_scatter_average(Tensor x, const std::string&) {
  return issue([this, x] {
    const std::vector<float> sum = sum_of_ranks(x);
    const int64_t slice = x.numel() / size();
    for (int64_t i = 0; i < x.numel(); i++) {
      const bool undefined = i / slice != rank_ && sum[size_t(i)] != 0;
      write(x, i, undefined ? std::nanf("") : sum[size_t(i)] / float(size()));
    }
  });
}

Ticket ThreadRank::all_gather(Tensor x, Tensor own, const std::string&) {
  return issue([this, x, own] {
    meeting_.show(rank_, own);
    for (int rank = 0; rank < size(); rank++) {
      const Tensor from = meeting_.of(rank);
      char* place = x.as<char>() + rank * own.bytes();
      if (place != from.data) std::memcpy(place, from.data, size_t(own.bytes()));
    }
    meeting_.arrive();
  });
}

}  // namespace llmc
