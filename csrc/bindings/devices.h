// Torch's devices and streams, and the operations that belong to them.
//
// Everything goes through torch's device-independent interface, so that the extension compiles with a torch without CUDA.
// (The tests link another implementation of this header, for simulated devices.)
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "core/device.h"
#include "ops/ops.h"

namespace llmc::bindings {

// Where the tensor lives; throws Error naming it unless that is the CPU or a CUDA device.
Device device_of(const char* operation, const char* name, const at::Tensor& tensor);

// A view of memory on the device that keeps owner alive.
at::Tensor view_of_memory(const std::shared_ptr<void>& owner, Device device, const Tensor& tensor,
                          c10::IntArrayRef shape);

// The operations on the device for one call: torch's current stream, with the device current on this thread. Calls on one
// stream share scratch memory, so only one host thread at a time enqueues.
class CurrentOps {
 public:
  explicit CurrentOps(Device device);
  ~CurrentOps();
  CurrentOps(const CurrentOps&) = delete;
  CurrentOps& operator=(const CurrentOps&) = delete;
  Ops* operator->() const { return ops_; }
  Ops& operator*() const { return *ops_; }

 private:
  struct Scope;  // the lock, and the device that was current before
  std::unique_ptr<Scope> scope_;
  Ops* ops_;
};

// Why a model cannot run on CUDA, in one sentence, or "" if it can.
std::string why_no_cuda_device();

// fp32 operations on CUDA tensors may use TF32.
void allow_tf32(bool allowed);

}  // namespace llmc::bindings
