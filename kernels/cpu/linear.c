/* linear: what a linear layer needs beside the product (gemm.c): the bias and its gradient.
 *
 *   y_ij = b_j                 db_j = beta * db_j + sum_i dy_ij
 *
 * The bias goes in first and the product is added (beta = 1): BLAS reads its result anyway, so the
 * bias costs nothing beyond what writing zeros would.
 *
 * shapes    y, dy [rows,cols], rows ld elements apart; b, db [cols]
 * dtypes    y is bf16, or the arithmetic type of x
 * numbers   the sum over rows is fp64 for every dtype: it has as many terms as there are tokens, and
 *           the gradient of a key bias nearly cancels
 * order     each column is summed down the rows in order by one thread: equal bits for any number
 *           of threads
 * twin      kernels/cuda/linear.cu
 */
#define HALO_EACH_REAL_FILE "cpu/linear.c"
#ifndef HALO_REAL_PASS
#include "internal.h"

/* Columns summed at a time: 512 accumulators stay in the first-level cache and every row gives a
 * run of 1 to 4 KiB, long enough for the prefetcher. */
enum { COLUMNS = 512 };

#include "cpu/each_real.h"

halo_status halo_cpu_bias_rows(halo_dtype t, void *y, int64_t ld, const void *b, int64_t rows,
                               int64_t cols) {
  const int64_t size = halo_dtype_bytes(t);
#pragma omp parallel for schedule(static) if (rows * cols > 1 << 15)
  for (int64_t i = 0; i < rows; i++) {
    memcpy((char *)y + i * ld * size, b, (size_t)(cols * size));
  }
  return HALO_OK;
}

halo_status halo_cpu_sum_rows(halo_dtype ty, void *y, halo_dtype t, const void *x, int64_t ld,
                              int64_t rows, int64_t cols, double beta) {
  HALO_REAL_SWITCH(t, sum_rows, (ty, y, x, ld, rows, cols, beta));
}

#else

static halo_status REAL(sum_rows)(halo_dtype ty, void *y, const real *restrict x, int64_t ld,
                                  int64_t rows, int64_t cols, double beta) {
#pragma omp parallel for schedule(static) if (rows * cols > 1 << 15)
  for (int64_t c0 = 0; c0 < cols; c0 += COLUMNS) {
    const int64_t n = c0 + COLUMNS < cols ? COLUMNS : cols - c0;
    double sum[COLUMNS];
    for (int64_t c = 0; c < n; c++) sum[c] = 0;
    for (int64_t i = 0; i < rows; i++) {
      const real *restrict row = x + i * ld + c0;
      for (int64_t c = 0; c < n; c++) sum[c] += LOAD(row[c]);
    }
    for (int64_t c = 0; c < n; c++) {
      if (ty == HALO_BF16) {
        uint16_t *target = (uint16_t *)y + c0 + c;
        const float old = beta == 0 ? 0 : (float)beta * halo__bf16_load(*target);
        *target = halo__bf16_store(old + (float)sum[c]);
      } else {
        acc *target = (acc *)y + c0 + c;
        *target = (beta == 0 ? 0 : (acc)beta * *target) + (acc)sum[c];
      }
    }
  }
  return HALO_OK;
}

#endif
