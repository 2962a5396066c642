#include "cuda/make_cuda_ops.h"

#include <cstdio>

#include "cuda/check.h"
#include "cuda/cuda_ops.h"

namespace llmc {

namespace {

struct Count {
  int devices = 0;
  std::string why_none;  // in one sentence; empty if there are devices
};

Count count_devices() {
  Count count;
  const cudaError_t status = cudaGetDeviceCount(&count.devices);
  if (status == cudaSuccess) {
    if (count.devices == 0) count.why_none = "no CUDA device was found";
    return count;
  }
  cudaGetLastError();  // the failure stays with this call
  count.devices = 0;
  // Without a driver the runtime says that the driver is too old.
  int driver = 0;
  if (status == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) {
    count.why_none = "no CUDA device was found: NVIDIA's driver is not installed";
  } else {
    count.why_none = std::string("no CUDA device can be used: ") + cudaGetErrorString(status);
  }
  return count;
}

// Why the device cannot be used, in one sentence, or "" if it can.
std::string why_too_old(const CudaDevice& device) {
  if (device.compute_capability >= 80) return "";
  return device.name + " has compute capability " + std::to_string(device.compute_capability / 10) + "." +
         std::to_string(device.compute_capability % 10) + ", llmc needs 8.0 (Ampere) or newer";
}

}  // namespace

bool has_cuda() { return true; }

int cuda_device_count() { return count_devices().devices; }

std::string why_no_cuda_device() {
  const Count count = count_devices();
  return count.devices > 0 ? why_too_old(cuda_device(0)) : count.why_none;
}

size_t cuda_free_memory(int device) {
  int previous = 0;
  size_t free_bytes = 0, total = 0;
  LLMC_CUDA_CHECK(cudaGetDevice(&previous));
  LLMC_CUDA_CHECK(cudaSetDevice(device));
  LLMC_CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total));
  LLMC_CUDA_CHECK(cudaSetDevice(previous));
  return free_bytes;
}

CudaDevice cuda_device(int device) {
  const Count count = count_devices();
  LLMC_CHECK(count.devices > 0, "%s", count.why_none.c_str());
  LLMC_CHECK(device >= 0 && device < count.devices, "there is no CUDA device %d: the last is %d", device,
             count.devices - 1);
  cudaDeviceProp properties;
  LLMC_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  char pci_bus_id[32];
  std::snprintf(pci_bus_id, sizeof pci_bus_id, "%08x:%02x:%02x.0", properties.pciDomainID, properties.pciBusID,
                properties.pciDeviceID);
  return {properties.name,
          pci_bus_id,
          10 * properties.major + properties.minor,
          properties.multiProcessorCount,
          properties.totalGlobalMem,
          properties.sharedMemPerBlockOptin};
}

size_t cublas_lt_version() { return cublasLtGetVersion(); }

std::unique_ptr<Ops> make_cuda_ops(int device, bool tf32) {
  const CudaDevice properties = cuda_device(device);
  const std::string why = why_too_old(properties);
  LLMC_CHECK(why.empty(), "%s", why.c_str());
  return std::make_unique<cuda::CudaOps>(device, properties.name, tf32);
}

void use_cuda_stream(Ops& ops, void* stream) {
  static_cast<cuda::CudaOps&>(ops).use_stream(static_cast<cudaStream_t>(stream));
}

void allow_tf32(Ops& ops, bool allowed) { static_cast<cuda::CudaOps&>(ops).allow_tf32(allowed); }

void use_cudnn_attention(Ops& ops, int64_t B, int64_t T, int64_t num_heads, int64_t head_size) {
  static_cast<cuda::CudaOps&>(ops).use_cudnn_attention({B, T, num_heads, head_size});
}

}  // namespace llmc
