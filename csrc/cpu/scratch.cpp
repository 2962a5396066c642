#include "cpu/scratch.h"

#include <cstdio>
#include <cstdlib>

namespace llmc::cpu {
namespace {

constexpr size_t kAlignment = 4096;

struct Buffer {
  float* data = nullptr;
  size_t bytes = 0;

  ~Buffer() { std::free(data); }

  void grow(size_t needed) {
    needed = (needed + kAlignment - 1) / kAlignment * kAlignment;
    if (needed <= bytes) return;
    std::free(data);
    data = static_cast<float*>(std::aligned_alloc(kAlignment, needed));
    if (!data) {
      std::fprintf(stderr, "llmc: out of memory: a thread's working memory of %zu bytes\n", needed);
      std::abort();
    }
    bytes = needed;
  }
};

thread_local Buffer buffer;

}  // namespace

float* thread_scratch(int64_t floats) {
  buffer.grow(size_t(floats) * sizeof(float));
  return buffer.data;
}

}  // namespace llmc::cpu
