#include "cuda/make_cuda_ops.h"

#include <cstdio>

#include "cuda/check.h"
#include "cuda/cuda_ops.h"

namespace llmc {

bool has_cuda() { return true; }

int cuda_device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();  // the failure stays with this call
  return status == cudaSuccess ? count : 0;
}

std::string why_no_cuda_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  // Without a driver the runtime says that the driver is too old.
  int driver = 0;
  if (status == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) {
    return "no CUDA device was found: NVIDIA's driver is not installed";
  }
  if (status != cudaSuccess) return std::string("no CUDA device can be used: ") + cudaGetErrorString(status);
  if (count == 0) return "no CUDA device was found";
  cudaDeviceProp properties;
  LLMC_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  if (properties.major >= 8) return "";
  return std::string(properties.name) + " has compute capability " + std::to_string(properties.major) + "." +
         std::to_string(properties.minor) + ", llmc needs 8.0 (Ampere) or newer";
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
  const std::string why = why_no_cuda_device();
  LLMC_CHECK(why.empty(), "%s", why.c_str());
  LLMC_CHECK(device >= 0 && device < cuda_device_count(), "there is no CUDA device %d: the last is %d", device,
             cuda_device_count() - 1);
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

std::unique_ptr<Ops> make_cuda_ops(int device, bool tf32) { return std::make_unique<cuda::CudaOps>(device, tf32); }

void use_cuda_stream(Ops& ops, void* stream) {
  static_cast<cuda::CudaOps&>(ops).use_stream(static_cast<cudaStream_t>(stream));
}

void allow_tf32(Ops& ops, bool allowed) { static_cast<cuda::CudaOps&>(ops).allow_tf32(allowed); }

}  // namespace llmc
