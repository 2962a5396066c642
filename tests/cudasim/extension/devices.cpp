// csrc/bindings/devices.h for simulated devices: their tensors are CPU tensors over the simulator's memory.
#include "bindings/devices.h"

#include <ATen/ops/from_blob.h>
#include <cuda_runtime.h>

#include <mutex>

#include "bindings/bindings.h"
#include "cpu/make_cpu_ops.h"
#include "cuda/make_cuda_ops.h"
#include "cudasim/control.h"

namespace llmc::bindings {
namespace {

std::mutex mutex;
bool tf32 = false;

}  // namespace

struct CurrentOps::Scope {
  std::lock_guard<std::mutex> lock{mutex};
};

CurrentOps::CurrentOps(Device device) {
  static const std::unique_ptr<Ops> cpu_ops = make_cpu_ops();
  ops_ = cpu_ops.get();
  if (!device.cuda) return;
  scope_ = std::make_unique<Scope>();
  static auto& cuda_ops = *make_cuda_ops(0, tf32).release();
  ops_ = &cuda_ops;
  llmc::allow_tf32(cuda_ops, tf32);
}

CurrentOps::~CurrentOps() = default;

std::string why_no_cuda_device() { return llmc::why_no_cuda_device(); }

void allow_tf32(bool allowed) {
  const std::lock_guard<std::mutex> lock(mutex);
  tf32 = allowed;
}

Device device_of(const char*, const char*, const at::Tensor& tensor) {
  return {cudasim_is_device_pointer(tensor.data_ptr()) != 0, 0};
}

at::Tensor view_of_memory(const std::shared_ptr<void>& owner, Device device, const Tensor& tensor,
                          c10::IntArrayRef shape) {
  if (device.cuda) cudaDeviceSynchronize();  // torch reads and writes at once, not in the order of a stream
  return at::from_blob(tensor.data, shape, [owner](void*) {}, at::TensorOptions(torch_dtype(tensor.dtype)));
}

}  // namespace llmc::bindings
