/* adamw: one fused pass of AdamW over one parameter (Loshchilov and Hutter, arXiv 1711.05101), and
 * the sum of squares that clipping needs.
 *
 *   g' = s g          m = b1 m + (1 - b1) g'        v = b2 v + (1 - b2) g'^2
 *   p  = p - lr wd p - (lr / (1 - b1^k)) m / (sqrt(v / (1 - b2^k)) + eps)
 *
 * order     PyTorch's torch.optim.AdamW: decay first, then the step
 * shapes    p [n] storage dtype; master [n] fp32, or NULL when p is its own master; g [n] in the
 *           arithmetic type; m, v [n] likewise, or in bf16
 * rounding  moments in bf16 are rounded stochastically (kernels.h, philox.h). With b2 = 0.999 a step moves v
 *           by at most a thousandth of itself downwards, a quarter of the spacing of bf16: rounded to
 *           nearest it would never shrink, and steps would stay small after one large gradient
 * sum       sum_squares adds blocks whose size depends on n alone, in block order, in fp64: equal
 *           bits for any number of threads
 * work      reads p, g, m, v and writes p, m, v: 28 bytes a parameter in fp32; bound by memory
 * twin      kernels/cuda/adamw.cu
 */
#define HALO_EACH_REAL_FILE "cpu/adamw.c"
#ifndef HALO_REAL_PASS
#include "cpu/vmath.h"

#include "internal.h"
#include "kernels.h"
#include "philox.h"

enum {
  MAX_BLOCKS = 4096, MIN_BLOCK = 4096, /* of sum_squares */
  PIECE = 1024                         /* elements updated at a time, in first-level cache */
};

/* Random words of elements from .. from + n (from a multiple of 4), n at most PIECE. */
static void rounding_words(uint32_t *word, const halo_adamw_step_args *s, int64_t from, int64_t n) {
  for (int64_t i = 0; i < n; i += 4) {
    uint32_t four[4];
    halo__philox((uint64_t)s->step, s->stream, (uint64_t)(from + i) / 4, four);
    for (int64_t k = 0; k < 4 && i + k < n; k++) word[i + k] = four[k];
  }
}

#include "cpu/each_real.h"

halo_status halo_cpu_adamw(halo_dtype t, void *p, void *master, const void *g,
                           halo_dtype tm, void *m, void *v, int64_t n,
                           const halo_adamw_step_args *s) {
  HALO_CHECK(tm == (t == HALO_F64 ? HALO_F64 : HALO_F32) || (tm == HALO_BF16 && t != HALO_F64),
             HALO_EARG, "adamw: moments in %s beside a parameter in %s", halo_dtype_name(tm),
             halo_dtype_name(t));
  HALO_REAL_SWITCH(t, adamw, (p, master, g, tm == HALO_BF16, m, v, n, s));
}

halo_status halo_cpu_sum_squares(halo_dtype t, double *out, const void *x, int64_t n) {
  HALO_REAL_SWITCH(t, sum_squares, (out, x, n));
}

#else

/* count moments to (from) the arithmetic type, in pieces of at most PIECE. */
static void REAL(load_moments)(acc *restrict y, const void *m, bool is_narrow, int64_t from,
                               int64_t count) {
  if (!is_narrow) {
    memcpy(y, (const acc *)m + from, (size_t)count * sizeof(acc));
    return;
  }
  const uint16_t *x = (const uint16_t *)m + from;
  for (int64_t i = 0; i < count; i++) y[i] = (acc)halo__bf16_load(x[i]);
}
static void REAL(store_moments)(void *m, const acc *restrict x, bool is_narrow,
                                const uint32_t *word, int32_t shift, int64_t from, int64_t count) {
  if (!is_narrow) {
    memcpy((acc *)m + from, x, (size_t)count * sizeof(acc));
    return;
  }
  uint16_t *y = (uint16_t *)m + from;
  for (int64_t i = 0; i < count; i++) y[i] = halo__bf16_stochastic((float)x[i], word[i] >> shift);
}

static halo_status REAL(adamw)(real *restrict p, acc *restrict master, const acc *restrict g,
                               bool is_narrow, void *m, void *v, int64_t n,
                               const halo_adamw_step_args *s) {
  const acc b1 = (acc)s->beta1, b2 = (acc)s->beta2, eps = (acc)s->eps, gs = (acc)s->grad_scale;
  const acc keep = (acc)(1 - s->lr * s->weight_decay);
  const acc rest1 = (acc)(1 - s->beta1), rest2 = (acc)(1 - s->beta2);
  const acc rate = (acc)(s->lr / (1 - pow(s->beta1, (double)s->step)));
  const acc inverse = (acc)(1 / sqrt(1 - pow(s->beta2, (double)s->step)));
  // In pieces, so that dtypes are chosen outside the loops that are vectorised.
#pragma omp parallel for schedule(static) if (n > 1 << 14)
  for (int64_t from = 0; from < n; from += PIECE) {
    const int64_t count = n - from < PIECE ? n - from : PIECE;
    acc value[PIECE], mi[PIECE], vi[PIECE];
    if (master != NULL) {
      memcpy(value, master + from, (size_t)count * sizeof(acc));
    } else {
      for (int64_t i = 0; i < count; i++) value[i] = LOAD(p[from + i]);
    }
    REAL(load_moments)(mi, m, is_narrow, from, count);
    REAL(load_moments)(vi, v, is_narrow, from, count);
    for (int64_t i = 0; i < count; i++) {
      const acc gi = g[from + i] * gs;
      mi[i] = b1 * mi[i] + rest1 * gi;
      vi[i] = b2 * vi[i] + rest2 * gi * gi;
      value[i] = value[i] * keep - rate * mi[i] / (HALO__SQRT(vi[i]) * inverse + eps);
    }
    uint32_t word[PIECE];
    if (is_narrow) rounding_words(word, s, from, count);
    REAL(store_moments)(m, mi, is_narrow, word, 0, from, count);
    REAL(store_moments)(v, vi, is_narrow, word, 16, from, count);
    for (int64_t i = 0; i < count; i++) p[from + i] = STORE(value[i]);
    if (master != NULL) memcpy(master + from, value, (size_t)count * sizeof(acc));
  }
  return HALO_OK;
}

static halo_status REAL(sum_squares)(double *out, const real *restrict x, int64_t n) {
  const int64_t wanted = (n + MAX_BLOCKS - 1) / MAX_BLOCKS;
  const int64_t block = wanted > MIN_BLOCK ? wanted : MIN_BLOCK;
  const int64_t blocks = (n + block - 1) / block;
  double partial[MAX_BLOCKS];
#pragma omp parallel for schedule(static) if (n > 1 << 15)
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t end = (b + 1) * block < n ? (b + 1) * block : n;
    double sum = 0;
    for (int64_t i = b * block; i < end; i++) sum += (double)LOAD(x[i]) * (double)LOAD(x[i]);
    partial[b] = sum;
  }
  double total = 0;
  for (int64_t b = 0; b < blocks; b++) total += partial[b];
  *out = total;
  return HALO_OK;
}

#endif
