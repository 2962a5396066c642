// What ranks can do together. The training step only sees this interface.
//
// Collectives are asynchronous: each one starts after the operations issued to the device so far, and only wait() makes
// later operations see the results. All ranks issue the same collectives in the same order.
#pragma once

#include "core/tensor.h"

namespace llmc {

class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  // x = average of x over the ranks
  virtual void all_reduce_average(Tensor x) = 0;

  // x = sum of x over the ranks
  virtual void all_reduce_sum(Tensor x) = 0;

  // With x cut into size() equal slices: slice rank() of x = average of that slice over the ranks; the rest is undefined.
  virtual void reduce_scatter_average(Tensor x) = 0;

  // With x cut into size() equal slices: every rank's own slice is copied to all ranks.
  virtual void all_gather(Tensor x) = 0;

  virtual void wait() = 0;
};

}  // namespace llmc
