// A GPU that is not there, for tests/test_cudnn.py: what cuDNN asks of the driver and its frontend of the CUDA runtime
// while they plan for device properties. Built twice: as libcuda.so.1, which loads everything and runs nothing, and with
// LLMC_RUNTIME into the test's program. LLMC_COMPUTE_CAPABILITY says which GPU: 90 for 9.0.
#ifdef LLMC_RUNTIME

#include <cuda_runtime.h>

#include <cstdlib>

extern "C" cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

extern "C" cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  const int compute_capability = std::atoi(std::getenv("LLMC_COMPUTE_CAPABILITY"));
  *properties = {};
  properties->major = compute_capability / 10;
  properties->minor = compute_capability % 10;
  return cudaSuccess;
}

#else

namespace {

constexpr int kSuccess = 0, kStubLibrary = 34;  // CUDA_SUCCESS, CUDA_ERROR_STUB_LIBRARY of cuda.h
char handle;

int give_handle(void** out) {
  *out = &handle;
  return kSuccess;
}

}  // namespace

extern "C" {

#define LOADS(name) \
  int name(void** out) { return give_handle(out); }
#define SUCCEEDS(name) \
  int name() { return kSuccess; }
#define REFUSES(name) \
  int name() { return kStubLibrary; }

LOADS(cuLibraryLoadData)
LOADS(cuLibraryGetKernel)
LOADS(cuModuleLoadData)
LOADS(cuModuleLoadDataEx)
LOADS(cuModuleLoadFatBinary)
LOADS(cuModuleGetFunction)
SUCCEEDS(cuLibraryUnload)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuKernelSetAttribute)
SUCCEEDS(cuFuncSetAttribute)
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}
int cuKernelGetAttribute(int* value) {
  *value = 0;
  return kSuccess;
}
REFUSES(cuCtxGetCurrent)
REFUSES(cuCtxGetDevice)
REFUSES(cuCtxGetLimit)
REFUSES(cuCtxPopCurrent)
REFUSES(cuCtxPushCurrent)
REFUSES(cuDeviceGet)
REFUSES(cuDeviceGetAttribute)
REFUSES(cuDeviceGetCount)
REFUSES(cuDevicePrimaryCtxRelease)
REFUSES(cuDevicePrimaryCtxReset)
REFUSES(cuDevicePrimaryCtxRetain)
REFUSES(cuFuncGetAttribute)
REFUSES(cuGetErrorName)
REFUSES(cuGetErrorString)
REFUSES(cuInit)
REFUSES(cuLaunchCooperativeKernel)
REFUSES(cuLaunchKernel)
REFUSES(cuLaunchKernelEx)
REFUSES(cuLibraryLoadFromFile)
REFUSES(cuLinkAddData)
REFUSES(cuLinkAddData_v2)
REFUSES(cuLinkAddFile_v2)
REFUSES(cuLinkComplete)
REFUSES(cuLinkCreate)
REFUSES(cuLinkCreate_v2)
REFUSES(cuLinkDestroy)
REFUSES(cuMemcpyDtoH_v2)
REFUSES(cuModuleGetGlobal_v2)
REFUSES(cuOccupancyMaxActiveBlocksPerMultiprocessor)
REFUSES(cuOccupancyMaxPotentialClusterSize)
REFUSES(cuStreamGetCtx)
REFUSES(cuStreamSynchronize)
REFUSES(cuTensorMapEncodeTiled)

}  // extern "C"

#endif
