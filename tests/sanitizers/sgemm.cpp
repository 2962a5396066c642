// BLAS's sgemm in plain code: libraries are not compiled with sanitizers, which would not see what a product reads and
// writes. Sums are in double, so that the tolerances of the tests hold for it, too.
namespace {

struct Matrix {  // op(x), column-major
  const float* x;
  long rows, columns;  // strides

  Matrix(const float* x, char transpose, int leading)
      : x(x), rows(transpose == 'T' ? leading : 1), columns(transpose == 'T' ? 1 : leading) {}
  double at(int row, int column) const { return x[row * rows + column * columns]; }
};

}  // namespace

extern "C" {

void scipy_sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha,
                  const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
                  const int* ldc) {
  const Matrix left(a, *transa, *lda), right(b, *transb, *ldb);
  for (int column = 0; column < *n; column++) {
    for (int row = 0; row < *m; row++) {
      double sum = 0;
      for (int i = 0; i < *k; i++) sum += left.at(row, i) * right.at(i, column);
      float& out = c[row + long(column) * *ldc];
      out = float(*alpha * sum + (*beta == 0 ? 0 : *beta * double(out)));
    }
  }
}

void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha,
            const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
            const int* ldc) {
  scipy_sgemm_(transa, transb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
}
