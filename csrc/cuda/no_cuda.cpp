// The CUDA backend of a build without CUDA.
#include "core/check.h"
#include "cuda/make_cuda_ops.h"

namespace llmc {

bool has_cuda() { return false; }

bool has_cudnn() { return false; }

std::string why_no_cuda_device() {
  return "this build of llmc has no CUDA backend: install nvcc and reinstall with LLMC_CUDA=ON, which says what is "
         "missing";
}

int cuda_device_count() { return 0; }

CudaDevice cuda_device(int) { throw_error(__FILE__, __LINE__, "%s", why_no_cuda_device().c_str()); }

size_t cuda_free_memory(int) { throw_error(__FILE__, __LINE__, "%s", why_no_cuda_device().c_str()); }

size_t cublas_lt_version() { return 0; }

std::unique_ptr<Ops> make_cuda_ops(int, bool) { throw_error(__FILE__, __LINE__, "%s", why_no_cuda_device().c_str()); }

void use_cuda_stream(Ops&, void*) {}

void allow_tf32(Ops&, bool) {}

void use_cudnn_attention(Ops&, int64_t, int64_t, int64_t, int64_t) {}

}  // namespace llmc
