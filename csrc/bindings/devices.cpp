#include "bindings/devices.h"

#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "bindings/bindings.h"
#include "core/check.h"
#include "cpu/make_cpu_ops.h"
#include "cuda/make_cuda_ops.h"

namespace llmc::bindings {
namespace {

std::mutex mutex;
bool tf32 = false;  // as torch.backends.cuda.matmul.allow_tf32 starts

Ops& cpu_ops() {
  static const std::unique_ptr<Ops> ops = make_cpu_ops();
  return *ops;
}

// Operations on different streams may run at the same time: each stream has scratch memory of its own. Never destroyed:
// at the end of the process the driver may be gone before static objects are.
Ops& cuda_ops(int device, void* stream) {
  static auto& all = *new std::map<std::pair<int, void*>, std::unique_ptr<Ops>>;
  std::unique_ptr<Ops>& ops = all[{device, stream}];
  if (!ops) ops = make_cuda_ops(device, tf32);
  use_cuda_stream(*ops, stream);
  llmc::allow_tf32(*ops, tf32);
  return *ops;
}

}  // namespace

struct CurrentOps::Scope {
  explicit Scope(c10::Device device) : lock(mutex), guard(device) {}

  std::lock_guard<std::mutex> lock;
  c10::DeviceGuard guard;           // torch's CUDA runtime
  std::optional<OnDevice> current;  // and our own, which is linked statically
};

CurrentOps::CurrentOps(Device device) {
  if (!device.cuda) {
    ops_ = &cpu_ops();
    return;
  }
  const c10::Device torch_device(c10::DeviceType::CUDA, c10::DeviceIndex(device.index));
  scope_ = std::make_unique<Scope>(torch_device);
  const c10::Stream stream = c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(torch_device);
  ops_ = &cuda_ops(device.index, stream.native_handle());
  scope_->current.emplace(*ops_);
}

CurrentOps::~CurrentOps() = default;

std::string why_no_cuda_device() {
  const std::string why = llmc::why_no_cuda_device();
  if (!why.empty() || c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA)) return why;
  return "the installed torch was built without CUDA, and a model's memory is shown as torch tensors: install one with "
         "CUDA";
}

void allow_tf32(bool allowed) {
  const std::lock_guard<std::mutex> lock(mutex);
  tf32 = allowed;
}

Device device_of(const char* operation, const char* name, const at::Tensor& tensor) {
  LLMC_CHECK(tensor.is_cpu() || tensor.is_cuda(), "%s: %s is on %s, it must be on the CPU or on a CUDA device",
             operation, name, tensor.device().str().c_str());
  return tensor.is_cpu() ? Device{} : Device{true, tensor.device().index()};
}

at::Tensor view_of_memory(const std::shared_ptr<void>& owner, Device device, const Tensor& tensor,
                          c10::IntArrayRef shape) {
  const c10::Device torch_device = device.cuda ? c10::Device(c10::DeviceType::CUDA, c10::DeviceIndex(device.index))
                                               : c10::Device(c10::DeviceType::CPU);
  return at::from_blob(
      tensor.data, shape, [owner](void*) {}, at::TensorOptions(torch_dtype(tensor.dtype)).device(torch_device),
      torch_device);
}

}  // namespace llmc::bindings
