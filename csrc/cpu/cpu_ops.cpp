// Name and memory of the CPU backend. Kernels run on the calling thread and OpenMP's, and have finished when they
// return, so copies need no waiting.
#include "cpu/cpu_ops.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstring>

#include "core/check.h"
#include "cpu/blas.h"

namespace llmc::cpu::LLMC_ISA {
namespace {

#define LLMC_QUOTE(x) #x
#define LLMC_QUOTE_VALUE(x) LLMC_QUOTE(x)

struct Name {
  char text[160];
  Name() { std::snprintf(text, sizeof text, "CPU (%s, %s)", LLMC_QUOTE_VALUE(LLMC_ISA), blas::name()); }
};

// Every allocation starts with a header, which holds its total size and keeps the data aligned.
constexpr size_t kHeader = 4096;

}  // namespace

const char* CpuOps::name() const {
  static const Name name;
  return name.text;
}

// Pages come zeroed from the system when they are first touched. Huge pages spare most of the TLB misses of the passes
// over whole weight matrices.
void* CpuOps::allocate(size_t bytes) {
  const size_t total = kHeader + bytes;
  void* base = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  LLMC_CHECK(base != MAP_FAILED, "not enough memory for %.1f MiB: use a smaller batch, sequence or model",
             double(bytes) / (1 << 20));
#ifdef MADV_HUGEPAGE
  madvise(base, total, MADV_HUGEPAGE);
#endif
  std::memcpy(base, &total, sizeof total);
  allocated_bytes_ += bytes;
  return static_cast<char*>(base) + kHeader;
}

void CpuOps::free(void* data) {
  if (data == nullptr) return;
  void* base = static_cast<char*>(data) - kHeader;
  size_t total;
  std::memcpy(&total, base, sizeof total);
  munmap(base, total);
  allocated_bytes_ -= total - kHeader;
}

void CpuOps::fill_zero(Tensor x) {
  constexpr int64_t kChunk = 1 << 18;
  char* data = x.as<char>();
  const int64_t bytes = x.bytes();
#pragma omp parallel for schedule(static) if (bytes > kChunk)
  for (int64_t begin = 0; begin < bytes; begin += kChunk) {
    std::memset(data + begin, 0, size_t(bytes - begin < kChunk ? bytes - begin : kChunk));
  }
}

void CpuOps::upload(Tensor x, const void* host) { std::memcpy(x.data, host, size_t(x.bytes())); }

void CpuOps::download(void* host, Tensor x) { std::memcpy(host, x.data, size_t(x.bytes())); }

Ops* create() { return new CpuOps; }

}  // namespace llmc::cpu::LLMC_ISA
