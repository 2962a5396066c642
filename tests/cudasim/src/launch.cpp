// Launches and the device as programs see it: limits, attributes, properties.
#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "core.h"
#include "cudasim/control.h"
#include "streams.h"

namespace cudasim {
namespace {

constexpr int kMultiprocessors = 4;
constexpr int kThreadsPerMultiprocessor = 2048, kBlocksPerMultiprocessor = 32;
constexpr size_t kDefaultShared = 48 << 10;  // dynamic shared memory without opting in
constexpr size_t kReservedShared = 1 << 10;  // per block, by the system
constexpr int kRuntimeVersion = CUDART_VERSION;

std::unordered_map<const void*, int> dynamic_limits;  // cudaFuncAttributeMaxDynamicSharedMemorySize, by kernel
unsigned long long launches;

// 227 KiB: a data-centre device of compute capability 9.0. Less: a consumer device of 8.9.
int capability_major() { return settings().shared_memory > 99 << 10 ? 9 : 8; }
int capability_minor() { return settings().shared_memory > 99 << 10 ? 0 : 9; }
size_t shared_per_multiprocessor() { return size_t(settings().shared_memory) + kReservedShared; }

size_t dynamic_limit(const void* kernel) {
  const auto limit = dynamic_limits.find(kernel);
  return limit == dynamic_limits.end() ? kDefaultShared : std::max(kDefaultShared, size_t(limit->second));
}

cudaError_t check_launch(const cudaLaunchConfig_t& config, const Launch& launch) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const std::string& name = kernel_info(launch).name;
  if (size_t(block.x) * block.y * block.z > kMaxThreads || block.z > 64 || block.x == 0 || block.y == 0 ||
      block.z == 0) {
    report("launch-limit", "kernel %s: a block of (%u,%u,%u) threads; 1 to 1024 are possible, z up to 64", name.c_str(),
           block.x, block.y, block.z);
    return cudaErrorInvalidConfiguration;
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    report("launch-limit", "kernel %s: a grid of (%u,%u,%u) blocks; 1 to 2^31-1, 65535, 65535 are possible",
           name.c_str(), grid.x, grid.y, grid.z);
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > dynamic_limit(launch.kernel)) {
    report("launch-limit", "kernel %s: %zu bytes of dynamic shared memory; its limit is %zu (cudaFuncSetAttribute)",
           name.c_str(), config.dynamicSmemBytes, dynamic_limit(launch.kernel));
    return cudaErrorInvalidValue;
  }
  for (unsigned i = 0; i < config.numAttrs; i++) {
    if (config.attrs[i].id != cudaLaunchAttributeProgrammaticStreamSerialization) {
      report("not-simulated", "kernel %s: launch attribute %d", name.c_str(), int(config.attrs[i].id));
      return cudaErrorNotSupported;
    }
    if (capability_major() < 9) {
      report("launch-limit", "kernel %s: programmatic stream serialization; the device has compute capability %d.%d",
             name.c_str(), capability_major(), capability_minor());
      return cudaErrorNotSupported;
    }
  }
  return cudaSuccess;
}

// Whether the kernel may begin while the one before it ends.
bool begins_early(const cudaLaunchConfig_t& config) {
  const auto allows = [](const cudaLaunchAttribute& each) { return each.val.programmaticStreamSerializationAllowed; };
  return std::any_of(config.attrs, config.attrs + config.numAttrs, allows);
}

}  // namespace

unsigned char* dynamic_shared() {
  static void* const memory = reserve(kDynamicShared, kDynamicSharedBytes, true);
  return static_cast<unsigned char*>(memory);
}

void count_launch() { launches++; }

cudaError_t launch(const cudaLaunchConfig_t* config, const Launch& launch) {
  const ApiCall call;
  if (call.error) return call.error;
  if (cudaError_t error = check_launch(*config, launch)) return fail(error);
  const auto stream = find_stream(config->stream);
  if (stream && !stream->captured.in) count_launch();
  const bool early = begins_early(*config);
  return submit(
      config->stream, early ? "early kernel" : "kernel",
      [launch, early, grid = config->gridDim, block = config->blockDim, dynamic_bytes = config->dynamicSmemBytes] {
        if (cudaError_t error = run_grid(launch, grid, block, dynamic_bytes, early)) set_sticky_error(error);
      });
}

}  // namespace cudasim

using namespace cudasim;

unsigned long long cudasim_launch_count() { return launches; }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const ApiCall call;
  if (call.error) return call.error;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > settings().shared_memory) {
      report("launch-limit", "%d bytes of dynamic shared memory asked for; the device has %d", value,
             settings().shared_memory);
      return fail(cudaErrorInvalidValue);
    }
    dynamic_limits[kernel] = value;
  }
  return cudaSuccess;
}

// What g++ knows nothing about (registers, static shared memory) is 0.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const ApiCall call;
  if (call.error) return call.error;
  *attributes = {};
  attributes->maxThreadsPerBlock = kMaxThreads;
  attributes->maxDynamicSharedSizeBytes = int(dynamic_limit(kernel));
  attributes->binaryVersion = attributes->ptxVersion = capability_major() * 10 + capability_minor();
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel, int block_size,
                                                                   size_t dynamic_bytes, unsigned) {
  const ApiCall call;
  if (call.error) return call.error;
  if (block_size <= 0) return fail(cudaErrorInvalidValue);
  const size_t by_shared = shared_per_multiprocessor() / (dynamic_bytes + kReservedShared);
  const int by_threads = kThreadsPerMultiprocessor / block_size;
  const bool possible = block_size <= int(kMaxThreads) && dynamic_bytes <= dynamic_limit(kernel);
  *blocks = possible ? std::min({int(by_shared), by_threads, kBlocksPerMultiprocessor}) : 0;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int block_size,
                                                          size_t dynamic_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, block_size, dynamic_bytes, 0);
}

// --- the device ------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  const ApiCall call;
  *count = settings().devices;
  return *count > 0 ? cudaSuccess : fail(cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int* device) {
  const ApiCall call;
  *device = 0;
  return call.error;
}

cudaError_t cudaSetDevice(int device) {
  const ApiCall call;
  if (call.error) return call.error;
  return device >= 0 && device < settings().devices ? cudaSuccess : fail(cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  const ApiCall call;
  if (call.error) return call.error;
  if (device < 0 || device >= settings().devices) return fail(cudaErrorInvalidDevice);
  *properties = {};
  std::strcpy(properties->name, "CUDA simulator");
  properties->major = capability_major();
  properties->minor = capability_minor();
  properties->totalGlobalMem = settings().memory;
  properties->multiProcessorCount = kMultiprocessors;
  properties->warpSize = int(kLanes);
  properties->maxThreadsPerBlock = kMaxThreads;
  properties->maxThreadsPerMultiProcessor = kThreadsPerMultiprocessor;
  properties->maxBlocksPerMultiProcessor = kBlocksPerMultiprocessor;
  properties->sharedMemPerBlock = kDefaultShared;
  properties->sharedMemPerBlockOptin = size_t(settings().shared_memory);
  properties->sharedMemPerMultiprocessor = shared_per_multiprocessor();
  properties->reservedSharedMemPerBlock = kReservedShared;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  for (int i = 0; i < 3; i++) {
    properties->maxThreadsDim[i] = i == 2 ? 64 : 1024;
    properties->maxGridSize[i] = i == 0 ? 0x7fffffff : 65535;
  }
  properties->unifiedAddressing = 1;
  properties->asyncEngineCount = 1;
  properties->concurrentKernels = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp properties;
  if (cudaError_t error = cudaGetDeviceProperties(&properties, device)) return error;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiProcessorCount;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.minor;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = properties.warpSize;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = properties.maxThreadsPerBlock;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = properties.maxThreadsPerMultiProcessor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = int(properties.sharedMemPerBlock);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(properties.sharedMemPerBlockOptin);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = int(properties.sharedMemPerMultiprocessor);
      return cudaSuccess;
    default:
      report("not-simulated", "cudaDeviceGetAttribute: attribute %d", int(attribute));
      return fail(cudaErrorNotSupported);
  }
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kRuntimeVersion;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = settings().devices ? kRuntimeVersion : 0;
  return cudaSuccess;
}
