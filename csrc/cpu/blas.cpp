// Which BLAS: a fixed rule per machine, never a timing, so that the same machine always computes the same bits.
//   MKL       on Intel CPUs, when torch brings it (its x86-64 wheels export MKL from libtorch_cpu)
//   OpenBLAS  everywhere else: MKL takes a slow path on AMD, and ARM64 has no MKL
// Measured in a region of two threads, GFLOP/s per thread of fp32, weights transposed as in a forward pass:
//   Xeon (AVX-512)        1024x3072x768   768x128x128   64x64x32
//   MKL                   221             221           166
//   OpenBLAS 0.3.34       210             175           103
// Which of its kernels OpenBLAS uses is settled when it is loaded: llmc/openblas.py.
#include "cpu/blas.h"

#include <cstring>

extern "C" {

// The Fortran interface: column-major matrices, 32-bit integers, everything by address.
using SgemmFunction = void(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                           const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                           const float* beta, float* c, const int* ldc);

SgemmFunction scipy_sgemm_;
void scipy_openblas_set_num_threads(int num_threads);
const char* scipy_openblas_get_config();
const char* scipy_openblas_get_corename();

// Weak: null when torch was built without MKL, or when there is no torch in the program.
__attribute__((weak)) SgemmFunction sgemm_;
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int num_threads);
__attribute__((weak)) void MKL_Get_Version_String(char* buffer, int length);

}  // extern "C"

namespace llmc::blas {
namespace {

bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Copies what follows `prefix` in text up to one of the characters in `ends`.
void append_version(char* name, const char* text, const char* prefix, const char* ends) {
  const char* begin = std::strstr(text, prefix);
  if (begin == nullptr) return;
  begin += std::strlen(prefix);
  std::strncat(name, begin, std::strcspn(begin, ends));
}

struct Library {
  bool mkl = is_intel() && sgemm_ && MKL_Set_Num_Threads_Local && MKL_Get_Version_String;
  char name[256] = {};

  Library() {
    if (mkl) {
      char version[200] = {};
      MKL_Get_Version_String(version, int(sizeof version) - 1);
      std::strcpy(name, "MKL ");
      append_version(name, version, "Version ", " -");
    } else {
      // Process-wide for this copy of OpenBLAS, which is ours alone.
      scipy_openblas_set_num_threads(1);
      char version[200] = {};
      std::strncpy(version, scipy_openblas_get_config(), sizeof version - 1);
      std::strcpy(name, "OpenBLAS ");
      append_version(name, version, "OpenBLAS ", " ");
      std::strcat(name, ", ");
      std::strncat(name, scipy_openblas_get_corename(), 20);
    }
  }
};

const Library& library() {
  static const Library instance;
  return instance;
}

}  // namespace

void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
          const float* b, int64_t ldb, bool accumulate, float* c, int64_t ldc) {
  // A row-major product is the column-major product of the swapped operands.
  const char trans_a = transpose_a ? 'T' : 'N', trans_b = transpose_b ? 'T' : 'N';
  const float alpha = 1, beta = accumulate ? 1 : 0;
  const int im = int(m), in = int(n), ik = int(k), ia = int(lda), ib = int(ldb), ic = int(ldc);
  if (library().mkl) {
    // Outside a parallel region MKL would start its own threads. The setting belongs to the calling thread, which may be
    // torch's: give it back.
    const int previous = MKL_Set_Num_Threads_Local(1);
    sgemm_(&trans_b, &trans_a, &in, &im, &ik, &alpha, b, &ib, a, &ia, &beta, c, &ic);
    MKL_Set_Num_Threads_Local(previous);
  } else {
    scipy_sgemm_(&trans_b, &trans_a, &in, &im, &ik, &alpha, b, &ib, a, &ia, &beta, c, &ic);
  }
}

bool has_direct_kernels() { return library().mkl; }

const char* name() { return library().name; }

}  // namespace llmc::blas
