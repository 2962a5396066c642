// BLAS's sgemm in plain code: libraries are not compiled with sanitizers, which would not see what a product reads and
// writes. Sums are in double, so that the tolerances of the tests hold for it, too.
#include <vector>

namespace {

// op(x), row-major. Every element is read once, under the sanitizer's eyes.
std::vector<double> pack(const float* x, char transpose, long leading, long rows, long columns) {
  std::vector<double> packed;
  packed.reserve(rows * columns);
  for (long row = 0; row < rows; row++) {
    for (long column = 0; column < columns; column++) {
      packed.push_back(transpose == 'T' ? x[row * leading + column] : x[column * leading + row]);
    }
  }
  return packed;
}

// c (m,n) += a (m,k)·b (k,n), on this file's own memory, so quickly.
__attribute__((no_sanitize("address", "undefined", "thread"), optimize("O3"))) void multiply(long m, long n, long k,
                                                                                             const double* __restrict a,
                                                                                             const double* __restrict b,
                                                                                             double* __restrict c) {
  for (long row = 0; row < m; row++) {
    for (long i = 0; i < k; i++) {
      for (long column = 0; column < n; column++) c[row * n + column] += a[row * k + i] * b[i * n + column];
    }
  }
}

}  // namespace

extern "C" {

void scipy_sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha,
                  const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
                  const int* ldc) {
  const long rows = *m, columns = *n;
  std::vector<double> sums(rows * columns);
  multiply(rows, columns, *k, pack(a, *transa, *lda, rows, *k).data(), pack(b, *transb, *ldb, *k, columns).data(),
           sums.data());
  for (long column = 0; column < columns; column++) {
    for (long row = 0; row < rows; row++) {
      float& out = c[row + column * *ldc];
      out = float(*alpha * sums[row * columns + column] + (*beta == 0 ? 0 : *beta * double(out)));
    }
  }
}

void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha,
            const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
            const int* ldc) {
  scipy_sgemm_(transa, transb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
}
