/* swiglu: gated feed-forward activation (Shazeer 2020, arXiv 2002.05202).
 *
 *   y = silu(g) u,  silu(g) = g s,  s = 1 / (1 + e^-g)
 *   du = dy silu(g)        dg = dy u s (1 + g (1 - s))
 *
 * shapes    y, dy [rows,cols] contiguous; g, u, dg, du [rows,cols] with rows ld elements apart, so
 *           that a packed [rows,2*cols] tensor is two such halves
 * gradient  dg and du are written (either may be NULL); s is computed again, not stored
 * twin      kernels/cuda/swiglu.cu
 */
#define HALO_EACH_REAL_FILE "cpu/swiglu.c"
#ifndef HALO_REAL_PASS
#include "cpu/vmath.h"
#include "cpu/each_real.h"

halo_status halo_cpu_swiglu_fwd(halo_dtype t, void *y, const void *g, int64_t ldg, const void *u,
                                int64_t ldu, int64_t rows, int64_t cols) {
  HALO_REAL_SWITCH(t, swiglu_fwd, (y, g, ldg, u, ldu, rows, cols));
}

halo_status halo_cpu_swiglu_bwd(halo_dtype t, void *dg, int64_t lddg, void *du, int64_t lddu,
                                const void *dy, const void *g, int64_t ldg, const void *u,
                                int64_t ldu, int64_t rows, int64_t cols) {
  HALO_REAL_SWITCH(t, swiglu_bwd, (dg, lddg, du, lddu, dy, g, ldg, u, ldu, rows, cols));
}

#else

static halo_status REAL(swiglu_fwd)(real *restrict y, const real *restrict g, int64_t ldg,
                                    const real *restrict u, int64_t ldu, int64_t rows,
                                    int64_t cols) {
#pragma omp parallel for schedule(static) if (rows * cols > 1 << 13)
  for (int64_t i = 0; i < rows; i++) {
    const real *restrict gi = g + i * ldg, *restrict ui = u + i * ldu;
    real *restrict yi = y + i * cols;
    for (int64_t j = 0; j < cols; j++) {
      const acc gv = LOAD(gi[j]);
      yi[j] = STORE(gv * HALO__SIGMOID(gv) * LOAD(ui[j]));
    }
  }
  return HALO_OK;
}

static halo_status REAL(swiglu_bwd)(real *restrict dg, int64_t lddg, real *restrict du,
                                    int64_t lddu, const real *restrict dy, const real *restrict g,
                                    int64_t ldg, const real *restrict u, int64_t ldu, int64_t rows,
                                    int64_t cols) {
#pragma omp parallel for schedule(static) if (rows * cols > 1 << 13)
  for (int64_t i = 0; i < rows; i++) {
    const real *restrict gi = g + i * ldg, *restrict ui = u + i * ldu;
    const real *restrict dyi = dy + i * cols;
    real *restrict dgi = dg + i * lddg, *restrict dui = du + i * lddu;
    for (int64_t j = 0; j < cols; j++) {
      const acc gv = LOAD(gi[j]), s = HALO__SIGMOID(gv), d = LOAD(dyi[j]);
      dgi[j] = STORE(d * LOAD(ui[j]) * s * (1 + gv * (1 - s)));
      dui[j] = STORE(d * gv * s);
    }
  }
  return HALO_OK;
}

#endif
