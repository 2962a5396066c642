// Streams and events as streams.cpp and graphs.cpp share them.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "core.h"

#pragma GCC visibility push(hidden)
namespace cudasim {

struct Capture;
struct Stream;
// The first `position` operations of a stream.
struct Point {
  std::shared_ptr<Stream> stream;
  uint64_t position;
};
struct Operation {
  std::function<void()> work;
  std::vector<Point> after;
};
// Nodes of a capture that what follows in the graph comes after.
struct Captured {
  std::shared_ptr<Capture> in;  // null: nothing is captured
  std::vector<size_t> after;
};
struct Stream {
  bool blocking = true;  // ordered with the default stream
  uint64_t submitted = 0, done = 0;
  std::deque<Operation> pending;
  Captured captured;  // while it is capturing
};
struct Event {
  bool timing = true;
  Point recorded{nullptr, 0};
  std::shared_ptr<double> time;  // on the simulated clock; null: never recorded
  Captured captured;             // if it was recorded last in a capturing stream
};

std::vector<std::shared_ptr<Stream>>& streams();  // the first is the legacy default stream

// Null, and a report, if the handle is not a stream.
std::shared_ptr<Stream> find_stream(cudaStream_t handle);

}  // namespace cudasim
#pragma GCC visibility pop
