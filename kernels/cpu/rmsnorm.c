/* rmsnorm: root mean square normalisation of rows (Zhang and Sennrich 2019, arXiv 1910.07467).
 *
 *   r_i  = 1 / sqrt(mean_j x_ij^2 + eps)      y_ij = w_j x_ij r_i
 *   dx_i = r_i (w dy_i - x_i r_i^2 mean_j(w_j dy_ij x_ij))
 *   dw_j = sum_i dy_ij x_ij r_i
 *
 * shapes    x [rows,cols], rows ldx elements apart; y, dy, dx [rows,cols] contiguous; w, dw [cols];
 *           r [rows] in the arithmetic type
 * gradient  dx is written, dw is added to (+=) in its own dtype
 * order     dw: rows are cut into at most DW_BLOCKS blocks that depend on the number of rows alone;
 *           partial sums per block, added in block order: equal bits for any number of threads
 * numbers   arithmetic type throughout; unlike Transformers, bf16 x r is not rounded before w
 * twin      kernels/cuda/rmsnorm.cu
 */
#define HALO_EACH_REAL_FILE "cpu/rmsnorm.c"
#ifndef HALO_REAL_PASS
#include "internal.h"

enum { DW_BLOCKS = 64 };

#include "cpu/each_real.h"

halo_status halo_cpu_rmsnorm_fwd(halo_dtype t, void *y, void *rstd, const void *x, int64_t ldx,
                                 const void *w, int64_t rows, int64_t cols, double eps) {
  HALO_REAL_SWITCH(t, rmsnorm_fwd, (y, rstd, x, ldx, w, rows, cols, eps));
}

halo_status halo_cpu_rmsnorm_bwd(halo_dtype t, void *dx, halo_dtype tw, void *dw, const void *dy,
                                 const void *x, int64_t ldx, const void *w, const void *rstd,
                                 int64_t rows, int64_t cols) {
  HALO_REAL_SWITCH(t, rmsnorm_bwd, (dx, tw, dw, dy, x, ldx, w, rstd, rows, cols));
}

#else

static halo_status REAL(rmsnorm_fwd)(real *restrict y, acc *restrict rstd, const real *restrict x,
                                     int64_t ldx, const real *restrict w, int64_t rows,
                                     int64_t cols, double eps) {
#pragma omp parallel for schedule(static) if (rows * cols > 1 << 14)
  for (int64_t i = 0; i < rows; i++) {
    const real *restrict xi = x + i * ldx;
    real *restrict yi = y + i * cols;
    acc sum = 0;
    for (int64_t j = 0; j < cols; j++) sum += LOAD(xi[j]) * LOAD(xi[j]);
    const acc r = (acc)(1 / sqrt((double)sum / (double)cols + eps));
    if (rstd != NULL) rstd[i] = r;
    for (int64_t j = 0; j < cols; j++) yi[j] = STORE(LOAD(w[j]) * (LOAD(xi[j]) * r));
  }
  return HALO_OK;
}

static void REAL(rmsnorm_bwd_row)(real *restrict dx, acc *restrict dw, const real *restrict dy,
                                  const real *restrict x, const real *restrict w, acc r,
                                  int64_t cols) {
  acc dot = 0;
  if (dw != NULL) {
    for (int64_t j = 0; j < cols; j++) {
      const acc g = LOAD(dy[j]) * LOAD(x[j]);
      dot += LOAD(w[j]) * g;
      dw[j] += g * r;
    }
  } else {
    for (int64_t j = 0; j < cols; j++) dot += LOAD(w[j]) * LOAD(dy[j]) * LOAD(x[j]);
  }
  if (dx == NULL) return;
  const acc shrink = dot * r * r / (acc)cols;
  for (int64_t j = 0; j < cols; j++) {
    dx[j] = STORE(r * (LOAD(w[j]) * LOAD(dy[j]) - LOAD(x[j]) * shrink));
  }
}

/* dx or dw may be NULL. */
static halo_status REAL(rmsnorm_bwd)(real *restrict dx, halo_dtype tw, void *dw,
                                     const real *restrict dy, const real *restrict x, int64_t ldx,
                                     const real *restrict w, const acc *restrict rstd, int64_t rows,
                                     int64_t cols) {
  const int64_t per_block = rows > 0 ? (rows + DW_BLOCKS - 1) / DW_BLOCKS : 1;
  const int64_t blocks = (rows + per_block - 1) / per_block;
  acc *partial = NULL;
  if (dw != NULL) {
    HALO_TRY(halo__scratch((void **)&partial, blocks * cols, sizeof(acc)));
  }
#pragma omp parallel for schedule(static) if (rows * cols > 1 << 14)
  for (int64_t b = 0; b < blocks; b++) {
    acc *dwb = dw != NULL ? partial + b * cols : NULL;
    if (dwb != NULL) memset(dwb, 0, (size_t)cols * sizeof(acc));
    const int64_t end = (b + 1) * per_block < rows ? (b + 1) * per_block : rows;
    for (int64_t i = b * per_block; i < end; i++) {
      REAL(rmsnorm_bwd_row)(dx != NULL ? dx + i * cols : NULL, dwb, dy + i * cols, x + i * ldx, w,
                            rstd[i], cols);
    }
  }
  halo_status status = HALO_OK;
  if (dw != NULL) {
    const halo_dtype wide = sizeof(acc) == 8 ? HALO_F64 : HALO_F32;
    status = halo_cpu_sum_rows(tw, dw, wide, partial, cols, blocks, cols, 1.0);
  }
  halo__free(partial);
  return status;
}

#endif
