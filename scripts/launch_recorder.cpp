// What a training step asks of CUDA, without doing it: loaded before the simulator (tests/cudasim), these functions take
// the place of its own. So a step of any size takes no time and no memory.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <vector>

enum Kind : uint64_t { kKernel, kMemset, kProduct, kAllReduce, kReduceScatter, kAllGather, kGraph };

struct Record {
  uint64_t kind;
  uint64_t kernel;                   // its offset in the library that has it
  uint64_t threads, dynamic_shared;  // of a kernel's block
  uint64_t bytes;                    // of a memset; moved by a product; of a collective's whole tensor
  uint64_t rows, columns, depth;     // of a product in our order: (rows, depth) by (depth, columns)
};

static std::vector<Record> records;
static uint64_t ranks = 1;
static bool capturing = false;  // what becomes a part of a graph is launched with it

static void record(const Record& record) {
  if (!capturing) records.push_back(record);
}

// Of cuBLASLt's descriptors, which are the simulator's.
static uint64_t attribute(const char* getter, const void* descriptor, int attribute, size_t bytes) {
  using Getter = int (*)(const void*, int, void*, size_t, size_t*);
  uint64_t value = 0;
  size_t written;
  reinterpret_cast<Getter>(dlsym(RTLD_DEFAULT, getter))(descriptor, attribute, &value, bytes, &written);
  return value;
}

struct Matrix {
  explicit Matrix(const void* layout)
      : rows(attribute(kGetter, layout, 2, 8)),
        columns(attribute(kGetter, layout, 3, 8)),
        bytes(rows * columns * size(attribute(kGetter, layout, 0, 4))) {}
  // CUDA_R_32F, CUDA_R_8F_E4M3, CUDA_R_8F_E5M2; else bf16.
  static uint64_t size(uint64_t type) { return type == 0 ? 4 : type == 28 || type == 29 ? 1 : 2; }
  static constexpr const char* kGetter = "cublasLtMatrixLayoutGetAttribute";
  uint64_t rows, columns, bytes;
};

static void record_collective(Kind kind, uint64_t elements, int dtype) {
  record({kind, 0, 0, 0, elements * (dtype == 7 ? 4 : 2), 0, 0, 0});  // 7 is ncclFloat32, else bf16
}

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
  record({kMemset, 0, 0, 0, bytes, 0, 0, 0});
  return 0;
}

int cudaStreamBeginCapture(void*, int) {
  capturing = true;
  return 0;
}
int cudaStreamEndCapture(void*, void** graph) {
  capturing = false;
  *graph = &records;  // any address
  return 0;
}
int cudaGraphInstantiate(void** executable, void* graph, unsigned long long) {
  *executable = graph;
  return 0;
}
int cudaGraphExecUpdate(void*, void*, void*) { return 0; }
int cudaGraphDestroy(void*) { return 0; }
int cudaGraphExecDestroy(void*) { return 0; }
int cudaGraphLaunch(void*, void*) {
  record({kGraph, 0, 0, 0, 0, 0, 0, 0});
  return 0;
}

// Column by column, D is ours transposed. Its A is our second factor.
int cublasLtMatmul(void*, const void* operation, const void*, const void*, const void* a_layout, const void*,
                   const void* b_layout, const float* beta, const void*, const void*, void*, const void* d_layout) {
  const Matrix a(a_layout), b(b_layout), d(d_layout);
  const uint64_t epilogue = attribute("cublasLtMatmulDescGetAttribute", operation, 7, 4);
  const uint64_t auxiliary = epilogue & 128 ? d.bytes : 0;                // CUBLASLT_EPILOGUE_*_AUX
  const uint64_t bias_gradient = epilogue == 512 ? d.bytes / d.rows : 0;  // CUBLASLT_EPILOGUE_BGRADB
  const uint64_t moved = a.bytes + b.bytes + d.bytes * (*beta != 0 ? 2 : 1) + auxiliary + bias_gradient;
  record({kProduct, 0, 0, 0, moved, d.columns, d.rows, a.rows * a.columns / d.rows});
  return 0;
}

// NCCL, for one rank alone of as many as one likes.
int ncclGetUniqueId(void*) { return 0; }
int ncclCommInitRankConfig(void** comm, int size) {
  *comm = &ranks;
  ranks = uint64_t(size);
  return 0;
}
int ncclCommGetAsyncError(void*, int* state) { return *state = 0; }
int ncclCommFinalize(void*) { return 0; }
int ncclCommDestroy(void*) { return 0; }
int ncclCommAbort(void*) { return 0; }
int ncclAllReduce(const void*, void*, size_t n, int dtype) { return record_collective(kAllReduce, n, dtype), 0; }
int ncclReduceScatter(const void*, void*, size_t n, int dtype) {
  return record_collective(kReduceScatter, n * ranks, dtype), 0;
}
int ncclAllGather(const void*, void*, size_t n, int dtype) {
  return record_collective(kAllGather, n * ranks, dtype), 0;
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
  record({kKernel, offset, threads, config->dynamic_shared, 0, 0, 0, 0});
  return 0;
}
}  // namespace cudasim
