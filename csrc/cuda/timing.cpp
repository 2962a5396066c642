#include "cuda/timing.h"

#include <algorithm>

#include "cuda/check.h"

namespace llmc::cuda {
namespace {

// Of a second of samples, so many rounds.
constexpr float kMilliseconds = 1000;
constexpr size_t kFewest = 3, kMost = 9;

using Ways = std::vector<std::function<void()>>;

class Event {
 public:
  Event() { LLMC_CUDA_CHECK(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { LLMC_CUDA_CHECK(cudaEventRecord(event_, stream)); }
  float since(const Event& start) const {
    float milliseconds = 0;
    LLMC_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, start.event_, event_));
    return milliseconds;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// The samples of each way. Everything is put on the stream before the host waits: the device is never idle in between.
std::vector<std::vector<float>> sample(const Ways& ways, size_t rounds, cudaStream_t stream) {
  std::vector<Event> events(rounds * ways.size() + 1);  // each is the end of a sample and the start of the next
  size_t next = 0;
  events[next++].record(stream);
  for (size_t round = 0; round < rounds; round++) {
    for (const auto& way : ways) {
      way();
      events[next++].record(stream);
    }
  }
  LLMC_CUDA_CHECK(cudaStreamSynchronize(stream));
  std::vector<std::vector<float>> samples(ways.size());
  for (size_t i = 1; i < events.size(); i++) samples[(i - 1) % ways.size()].push_back(events[i].since(events[i - 1]));
  return samples;
}

}  // namespace

std::vector<float> median_milliseconds(const Ways& ways, cudaStream_t stream) {
  float milliseconds = 0.001f;  // of one round
  for (const auto& samples : sample(ways, 1, stream)) milliseconds += samples[0];
  const size_t rounds = std::clamp(size_t(kMilliseconds / milliseconds), kFewest, kMost);
  std::vector<float> medians;
  for (auto& samples : sample(ways, rounds, stream)) {
    std::nth_element(samples.begin(), samples.begin() + rounds / 2, samples.end());
    medians.push_back(samples[rounds / 2]);
  }
  return medians;
}

}  // namespace llmc::cuda
