// What ranks can do together. The training step only sees this interface.
//
// Collectives are asynchronous and run in the order of their calls, which is the same on all ranks. Each one starts after
// the operations issued to the device so far, and returns a ticket: only wait(ticket) makes later operations see the
// result. `what` names the data in errors: "gradients of block 3".
//
// Errors: a rank that fails or is missing lets every collective fail within the communicator's time-out, with an Error
// that names the operation and `what`; after that, all calls fail.
#pragma once

#include <cstdint>
#include <string>

#include "core/tensor.h"

namespace llmc {

using Ticket = int64_t;  // counts the collectives of a communicator from 1; a ticket stands for all before it, too

class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  // The queue of the device's operations, a cudaStream_t, that collectives are ordered with; null on a CPU, whose
  // operations are done when they return. Called once, by the model that the communicator serves.
  virtual void attach(void* stream) = 0;

  // x = average of x over the ranks, the same bits on all of them
  virtual Ticket all_reduce_average(Tensor x, const std::string& what) = 0;

  // x = sum of x over the ranks, the same bits on all of them
  virtual Ticket all_reduce_sum(Tensor x, const std::string& what) = 0;

  // With x cut into size() equal slices: slice rank() of x = average of that slice over the ranks; the rest is undefined,
  // except that 0 on all ranks stays 0 (what pads a unit, and is summed with it).
  virtual Ticket reduce_scatter_average(Tensor x, const std::string& what) = 0;

  // x = the ranks' own slices, in the order of the ranks. own has x.numel() / size() elements and may lie in x, where
  // this rank's slice is, or apart from it.
  virtual Ticket all_gather(Tensor x, Tensor own, const std::string& what) = 0;

  // Operations issued to the device from here on start after the collective.
  virtual void wait(Ticket ticket) = 0;

  // The host waits until the collective is done, and no longer than the time-out. Host code that waits for the device in
  // another way must call this first, or a rank that is missing would hang it.
  virtual void finish(Ticket ticket) = 0;
};

}  // namespace llmc
