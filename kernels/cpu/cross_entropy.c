/* cross_entropy: loss of rows of logits against one label each, and its gradient.
 *
 *   l_i = log sum_v exp(z_iv)      loss_i = l_i - z_{i,label_i}
 *   dz_iv = g_i (exp(z_iv - l_i) - [v = label_i])
 *
 * shapes    z, dz [rows,V], rows ld elements apart; labels [rows]; loss, l [rows] in the arithmetic
 *           type
 * labels    i64; a row whose label is `ignore` has loss 0 and gradient 0; the others were checked
 *           to lie in [0,V)
 * fused     cross_entropy_fused turns logits into gradients in place and gives the loss: the row
 *           (200 KB at V = 50257) stays in the second-level cache between its three passes, so
 *           memory sees one read and one write. g is one number per row (its weight), or NULL for
 *           1; the loss is without it
 * numbers   maximum first; sums of 1024 terms in the arithmetic type, their sum in fp64
 * twin      kernels/cuda/cross_entropy.cu
 */
#define HALO_EACH_REAL_FILE "cpu/cross_entropy.c"
#ifndef HALO_REAL_PASS
#include "cpu/vmath.h"
#include "internal.h"

enum { SUM_BLOCK = 1024 };

#include "cpu/each_real.h"

halo_status halo_cpu_cross_entropy_fwd(halo_dtype t, void *loss, void *lse, const void *z,
                                       int64_t ld, const int64_t *labels, int64_t rows,
                                       int64_t vocab, int64_t ignore) {
  HALO_REAL_SWITCH(t, cross_entropy_fwd, (loss, lse, z, ld, labels, rows, vocab, ignore));
}

halo_status halo_cpu_cross_entropy_bwd(halo_dtype t, void *dz, const void *z, int64_t ld,
                                       const void *lse, const int64_t *labels,
                                       const void *g, int64_t g_stride, int64_t rows, int64_t vocab,
                                       int64_t ignore) {
  HALO_REAL_SWITCH(t, cross_entropy_bwd,
                   (dz, z, ld, lse, labels, g, g_stride, rows, vocab, ignore));
}

halo_status halo_cpu_cross_entropy_fused(halo_dtype t, void *loss, void *z, int64_t ld,
                                         const int64_t *labels, const void *g, int64_t rows,
                                         int64_t vocab, int64_t ignore) {
  HALO_REAL_SWITCH(t, cross_entropy_fused, (loss, z, ld, labels, g, rows, vocab, ignore));
}

#else

static acc REAL(row_max)(const real *restrict z, int64_t n) {
  acc m = (acc)-INFINITY;
#pragma omp simd reduction(max : m)
  for (int64_t j = 0; j < n; j++) m = LOAD(z[j]) > m ? LOAD(z[j]) : m;
  return m;
}

static double REAL(sum_exp)(const real *restrict z, acc shift, int64_t n) {
  double total = 0;
  for (int64_t j0 = 0; j0 < n; j0 += SUM_BLOCK) {
    const int64_t j1 = j0 + SUM_BLOCK < n ? j0 + SUM_BLOCK : n;
    acc sum = 0;
    for (int64_t j = j0; j < j1; j++) sum += HALO__EXP(LOAD(z[j]) - shift);
    total += (double)sum;
  }
  return total;
}

static halo_status REAL(cross_entropy_fwd)(acc *restrict loss, acc *restrict lse,
                                           const real *restrict z, int64_t ld,
                                           const int64_t *labels, int64_t rows, int64_t vocab,
                                           int64_t ignore) {
#pragma omp parallel for schedule(static) if (rows * vocab > 1 << 13)
  for (int64_t i = 0; i < rows; i++) {
    const int64_t label = labels[i];
    const real *zi = z + i * ld;
    loss[i] = 0;
    if (label == ignore) {
      if (lse != NULL) lse[i] = 0;
      continue;
    }
    const acc m = REAL(row_max)(zi, vocab);
    const acc log_sum = (acc)log(REAL(sum_exp)(zi, m, vocab));
    if (lse != NULL) lse[i] = m + log_sum;
    loss[i] = log_sum + (m - LOAD(zi[label]));
  }
  return HALO_OK;
}

static halo_status REAL(cross_entropy_bwd)(real *restrict dz, const real *restrict z, int64_t ld,
                                           const acc *restrict lse,
                                           const int64_t *labels, const acc *restrict g,
                                           int64_t g_stride, int64_t rows, int64_t vocab,
                                           int64_t ignore) {
#pragma omp parallel for schedule(static) if (rows * vocab > 1 << 13)
  for (int64_t i = 0; i < rows; i++) {
    const int64_t label = labels[i];
    const real *restrict zi = z + i * ld;
    real *restrict dzi = dz + i * vocab;
    if (label == ignore) {
      memset(dzi, 0, (size_t)vocab * sizeof(real));
      continue;
    }
    const acc l = lse[i], gi = g[i * g_stride];
    for (int64_t j = 0; j < vocab; j++) dzi[j] = STORE(gi * HALO__EXP(LOAD(zi[j]) - l));
    dzi[label] = STORE(gi * (HALO__EXP(LOAD(zi[label]) - l) - 1));
  }
  return HALO_OK;
}

static halo_status REAL(cross_entropy_fused)(acc *restrict loss, real *restrict z, int64_t ld,
                                             const int64_t *labels, const acc *restrict g,
                                             int64_t rows, int64_t vocab, int64_t ignore) {
#pragma omp parallel for schedule(static) if (rows * vocab > 1 << 13)
  for (int64_t i = 0; i < rows; i++) {
    const int64_t label = labels[i];
    real *restrict zi = z + i * ld;
    loss[i] = 0;
    if (label == ignore) {
      memset(zi, 0, (size_t)vocab * sizeof(real));
      continue;
    }
    const acc m = REAL(row_max)(zi, vocab), at_label = LOAD(zi[label]);
    double total = 0;
    for (int64_t j0 = 0; j0 < vocab; j0 += SUM_BLOCK) {
      const int64_t j1 = j0 + SUM_BLOCK < vocab ? j0 + SUM_BLOCK : vocab;
      acc sum = 0;
      for (int64_t j = j0; j < j1; j++) {
        const acc e = HALO__EXP(LOAD(zi[j]) - m);
        zi[j] = STORE(e);
        sum += e;
      }
      total += (double)sum;
    }
    loss[i] = (acc)log(total) + (m - at_label);
    const acc gi = g != NULL ? g[i] : 1, scale = gi * (acc)(1 / total);
    for (int64_t j = 0; j < vocab; j++) zi[j] = STORE(LOAD(zi[j]) * scale);
    zi[label] = STORE(HALO__EXP(at_label - m) * scale - gi);
  }
  return HALO_OK;
}

#endif
