/* gemm: batched matrix product, row-major.
 *
 *   c_i = alpha * op(a_i) op(b_i) + beta * d_i + bias      i = 0 .. batch-1; d is c or the addend
 *   bias_grad = bias_grad_beta * bias_grad + row sums of op(a)
 *
 * shapes    c, d [m,n]; op(a) [m,k]; op(b) [k,n]; a transposed operand is stored [k,m] or [n,k];
 *           bias [n], bias_grad [m]
 * layout    rows `ld` elements apart; matrices of a batch `batch_stride` elements apart (0: shared)
 * dtypes    all fp64, or any mixture of fp32 and bf16: sums are fp32, so a bf16 product can be
 *           accumulated into an fp32 gradient. beta = 0 never reads c
 * numbers   bf16 operands are widened panel by panel, since Debian's OpenBLAS has no bf16 product;
 *           the widening costs about (1/MB + 1/NB) of the product's time
 * bias      BLAS reads its result anyway, so the bias of a plain product goes in first and costs
 *           nothing; an addend is copied in the same way
 * threads   one large product uses BLAS's threads; a batch of small ones is dealt to threads whole
 * twin      kernels/cuda/gemm.cu
 */
#include <limits.h>
#include <string.h>

#include "cpu/bf16.h"
#include "cpu/blas.h"
#include "internal.h"
#include "kernels.h"

/* Panel edges of the widening path: two panels of 8 MiB and a result tile of 16 MiB at most. */
enum { PANEL_M = 2048, PANEL_N = 2048, PANEL_K = 1024 };
/* Below this many multiplications per product, threads take whole products of a batch (2^18: where
 * OpenBLAS itself begins to use a second thread). */
static const int64_t small_product = 1 << 18;

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static const void *at(const halo_operand *x, int64_t element) {
  return (const char *)x->data + element * halo_dtype_bytes(x->dtype);
}

/* First element of the block of op(x) that starts at (row, col), in storage order. */
static int64_t corner(const halo_operand *x, int64_t row, int64_t col) {
  return x->transposed ? col * x->ld + row : row * x->ld + col;
}

/* d into c, which the product is then added to. */
static void copy_addend(const halo_gemm *g, int64_t i) {
  const halo_operand *c = &g->c, *d = &g->addend;
  const int64_t row = g->n * halo_dtype_bytes(c->dtype);
#pragma omp parallel for schedule(static) if (g->m * g->n > 1 << 15)
  for (int64_t r = 0; r < g->m; r++) {
    memcpy((void *)at(c, i * c->batch_stride + r * c->ld), at(d, i * d->batch_stride + r * d->ld),
           (size_t)row);
  }
}

/* Each row of an m x n tile of c += bias, both in fp32 (or both fp64). */
#define ADD_BIAS(real)                                                                    \
  do {                                                                                    \
    real *rows = target;                                                                  \
    const real *add = bias;                                                               \
    for (int64_t r = 0; r < m; r++) {                                                     \
      for (int64_t j = 0; j < n; j++) rows[r * ld + j] += add[j];                         \
    }                                                                                     \
  } while (0)

static void add_bias(halo_dtype t, void *target, int64_t ld, const void *bias, int64_t m, int64_t n) {
  if (t == HALO_F64) {
    ADD_BIAS(double);
  } else {
    ADD_BIAS(float);
  }
}

/* One product of a batch, where all three matrices already have BLAS's type. */
static void product_blas(const halo_gemm *g, int64_t i) {
  const halo_operand *a = &g->a, *b = &g->b, *c = &g->c;
  void *pc = (void *)at(c, i * c->batch_stride);
  const void *pa = at(a, i * a->batch_stride), *pb = at(b, i * b->batch_stride);
  double beta = g->beta;
  if (g->bias != NULL && beta == 0) {
    halo_cpu_bias_rows(c->dtype, pc, c->ld, g->bias, g->m, g->n);
    beta = 1;
  }
  if (c->dtype == HALO_F64) {
    halo__blas_gemm_f64(pc, c->ld, pa, a->ld, a->transposed, pb, b->ld, b->transposed, g->m, g->n,
                        g->k, g->alpha, beta);
  } else {
    halo__blas_gemm_f32(pc, c->ld, pa, a->ld, a->transposed, pb, b->ld, b->transposed, g->m, g->n,
                        g->k, g->alpha, beta);
  }
  if (g->bias != NULL && g->beta != 0) add_bias(c->dtype, pc, c->ld, g->bias, g->m, g->n);
}

/* The rows x cols block of op(x) at (row, col) in fp32: x itself, or its copy in `panel`. */
static const float *widened(const halo_operand *x, int64_t offset, int64_t row, int64_t col,
                            int64_t rows, int64_t cols, float *panel, int64_t *ld_out) {
  const int64_t first = offset + corner(x, row, col);
  if (x->dtype == HALO_F32) {
    *ld_out = x->ld;
    return at(x, first);
  }
  const int64_t r = x->transposed ? cols : rows, c = x->transposed ? rows : cols;
  halo__widen_rows(panel, c, at(x, first), x->ld, r, c);
  *ld_out = c;
  return panel;
}

/* One product with bf16 somewhere: tiles of c, panels of a and b. */
static halo_status product_mixed(const halo_gemm *g, int64_t i) {
  const int64_t mb = min64(g->m, PANEL_M), nb = min64(g->n, PANEL_N), kb = min64(g->k, PANEL_K);
  const int64_t offset_a = i * g->a.batch_stride, offset_b = i * g->b.batch_stride,
                offset_c = i * g->c.batch_stride;
  const bool c_is_wide = g->c.dtype == HALO_F32;
  float *work = NULL;
  HALO_TRY(halo__scratch((void **)&work, mb * kb + kb * nb + (c_is_wide ? 0 : mb * nb) + nb,
                         sizeof(float)));
  float *panel_a = work, *panel_b = work + mb * kb, *bias = panel_b + kb * nb, *tile = bias + nb;
  for (int64_t m0 = 0; m0 < g->m; m0 += mb) {
    const int64_t m = min64(mb, g->m - m0);
    for (int64_t n0 = 0; n0 < g->n; n0 += nb) {
      const int64_t n = min64(nb, g->n - n0);
      void *pc = (void *)at(&g->c, offset_c + m0 * g->c.ld + n0);
      float *target = c_is_wide ? pc : tile;
      const int64_t ld_target = c_is_wide ? g->c.ld : n;
      if (!c_is_wide && g->beta != 0) halo__widen_rows(tile, n, pc, g->c.ld, m, n);
      // k = 0 still has to scale c by beta, so the loop runs at least once.
      int64_t k0 = 0;
      do {
        const int64_t k = min64(kb, g->k - k0);
        int64_t lda = 1, ldb = 1;
        const float *pa = widened(&g->a, offset_a, m0, k0, m, k, panel_a, &lda);
        const float *pb = widened(&g->b, offset_b, k0, n0, k, n, panel_b, &ldb);
        halo__blas_gemm_f32(target, ld_target, pa, lda > 0 ? lda : 1, g->a.transposed, pb,
                            ldb > 0 ? ldb : 1, g->b.transposed, m, n, k, g->alpha,
                            k0 == 0 ? g->beta : 1.0);
        k0 += kb;
      } while (k0 < g->k);
      if (g->bias != NULL && c_is_wide) {
        add_bias(HALO_F32, target, ld_target, (const float *)g->bias + n0, m, n);
      } else if (g->bias != NULL) {
        halo__widen_rows(bias, n, (const uint16_t *)g->bias + n0, n, 1, n);
        add_bias(HALO_F32, target, ld_target, bias, m, n);
      }
      if (!c_is_wide) halo__narrow_rows(pc, g->c.ld, tile, n, m, n);
    }
  }
  halo__free(work);
  return HALO_OK;
}

static bool fits_blas(const halo_operand *x) { return x->ld > 0 && x->ld <= INT_MAX; }

static halo_status bias_grad(const halo_gemm *g) {
  HALO_CHECK(g->a.transposed && g->batch == 1, HALO_EARG,
             "gemm: bias_grad needs a transposed a and no batch");
  return halo_cpu_sum_rows(g->bias_grad_dtype, g->bias_grad, g->a.dtype, g->a.data, g->a.ld, g->k, g->m,
                           g->bias_grad_beta);
}

halo_status halo_cpu_gemm(const halo_gemm *g) {
  if (g->bias_grad != NULL && g->m > 0) HALO_TRY(bias_grad(g));
  if (g->m == 0 || g->n == 0 || g->batch == 0) return HALO_OK;
  HALO_CHECK(g->m <= INT_MAX && g->n <= INT_MAX && g->k <= INT_MAX && fits_blas(&g->a) &&
                 fits_blas(&g->b) && fits_blas(&g->c),
             HALO_EUNSUPPORTED,
             "gemm: a product [%lld,%lld] x [%lld,%lld] does not fit BLAS's 32-bit sizes",
             (long long)g->m, (long long)g->k, (long long)g->k, (long long)g->n);
  const halo_dtype a = g->a.dtype, b = g->b.dtype, c = g->c.dtype;
  const bool is_pure = a == b && b == c && a != HALO_BF16;
  HALO_CHECK(halo__is_float(a) && halo__is_float(b) && halo__is_float(c) &&
                 (is_pure || (a != HALO_F64 && b != HALO_F64 && c != HALO_F64)),
             HALO_EARG, "gemm: cannot mix %s, %s and %s", halo_dtype_name(a), halo_dtype_name(b),
             halo_dtype_name(c));
  HALO_CHECK(g->addend.data == NULL || (g->addend.dtype == c && !g->addend.transposed), HALO_EARG,
             "gemm: the addend must be like c");
  if (g->addend.data != NULL && g->beta != 0) {
    for (int64_t i = 0; i < g->batch; i++) copy_addend(g, i);
  }
  if (is_pure) {
    const bool is_small = (double)g->m * (double)g->n * (double)g->k < (double)small_product;
#pragma omp parallel for schedule(static) if (g->batch > 1 && is_small)
    for (int64_t i = 0; i < g->batch; i++) product_blas(g, i);
    return HALO_OK;
  }
  for (int64_t i = 0; i < g->batch; i++) HALO_TRY(product_mixed(g, i));
  return HALO_OK;
}
