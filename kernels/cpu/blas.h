/* blas.h: the one place where Halo calls BLAS.
 *
 * Row-major c = alpha * op(a) op(b) + beta * c for one real type. OpenBLAS (OpenMP flavour) shares
 * its threads with our own loops, and runs on the calling thread alone inside a parallel region.
 * Sizes were checked to fit BLAS's 32-bit integers by gemm.c.
 */
#ifndef HALO_CPU_BLAS_H
#define HALO_CPU_BLAS_H

#include <cblas.h>
#include <stdbool.h>
#include <stdint.h>

static inline void halo__blas_gemm_f32(float *c, int64_t ldc, const float *a, int64_t lda,
                                       bool a_transposed, const float *b, int64_t ldb,
                                       bool b_transposed, int64_t m, int64_t n, int64_t k,
                                       double alpha, double beta) {
  cblas_sgemm(CblasRowMajor, a_transposed ? CblasTrans : CblasNoTrans,
              b_transposed ? CblasTrans : CblasNoTrans, (blasint)m, (blasint)n, (blasint)k,
              (float)alpha, a, (blasint)lda, b, (blasint)ldb, (float)beta, c, (blasint)ldc);
}

static inline void halo__blas_gemm_f64(double *c, int64_t ldc, const double *a, int64_t lda,
                                       bool a_transposed, const double *b, int64_t ldb,
                                       bool b_transposed, int64_t m, int64_t n, int64_t k,
                                       double alpha, double beta) {
  cblas_dgemm(CblasRowMajor, a_transposed ? CblasTrans : CblasNoTrans,
              b_transposed ? CblasTrans : CblasNoTrans, (blasint)m, (blasint)n, (blasint)k, alpha,
              a, (blasint)lda, b, (blasint)ldb, beta, c, (blasint)ldc);
}

#endif
