// What a training step asks of CUDA, without doing it: loaded before the simulator (tests/cudasim), these functions take
// the place of its own. So a step of any size takes no time and no memory.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <vector>

struct Record {
  uint64_t kernel;  // its offset in the library that has it; 0: not a kernel
  uint64_t threads, dynamic_shared;
  uint64_t bytes;  // of a memset; 0: a product of cuBLASLt
};

static std::vector<Record> records;

extern "C" {
const Record* recorder_begin() { return records.data(); }
size_t recorder_count() { return records.size(); }
void recorder_clear() { records.clear(); }

int cudaMalloc(void** result, size_t bytes) {
  *result = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return *result == MAP_FAILED ? 2 : 0;  // cudaErrorMemoryAllocation
}
int cudaFree(void*) { return 0; }
int cudaMemcpyAsync(void*, const void*, size_t, int, void*) { return 0; }
int cudaMemsetAsync(void*, int, size_t bytes, void*) {
  records.push_back({0, 0, 0, bytes});
  return 0;
}
int cublasLtMatmul() {
  records.push_back({});
  return 0;
}
}

// The beginning of cudaLaunchConfig_t (driver_types.h), and of what the simulator makes of a launch.
struct cudaLaunchConfig_st {
  unsigned grid[3], block[3];
  size_t dynamic_shared;
};
namespace cudasim {
struct Launch {
  const void* kernel;
};
int launch(const cudaLaunchConfig_st* config, const Launch& launch) {
  Dl_info library;
  dladdr(launch.kernel, &library);
  const uint64_t threads = uint64_t(config->block[0]) * config->block[1] * config->block[2];
  const uint64_t offset = static_cast<const char*>(launch.kernel) - static_cast<char*>(library.dli_fbase);
  records.push_back({offset, threads, config->dynamic_shared, 0});
  return 0;
}
}  // namespace cudasim
