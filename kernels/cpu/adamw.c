/* adamw: one fused pass of AdamW over one parameter (Loshchilov and Hutter, arXiv 1711.05101), and
 * the sum of squares that clipping needs.
 *
 *   g' = s g          m = b1 m + (1 - b1) g'        v = b2 v + (1 - b2) g'^2
 *   p  = p - lr wd p - (lr / (1 - b1^k)) m / (sqrt(v / (1 - b2^k)) + eps)
 *
 * order     PyTorch's torch.optim.AdamW: decay first, then the step
 * shapes    p [n] storage dtype; master [n] fp32, or NULL when p is its own master; g, m, v [n] in
 *           the arithmetic type
 * sum       sum_squares adds blocks whose size depends on n alone, in block order, in fp64: equal
 *           bits for any number of threads
 * work      reads p, g, m, v and writes p, m, v: 28 bytes a parameter in fp32; bound by memory
 * twin      kernels/cuda/adamw.cu
 */
#define HALO_EACH_REAL_FILE "cpu/adamw.c"
#ifndef HALO_REAL_PASS
#include "cpu/vmath.h"

#include "internal.h"

enum {
  MAX_BLOCKS = 4096, MIN_BLOCK = 4096, /* of sum_squares */
  PIECE = 1024                         /* elements updated at a time, in first-level cache */
};

#include "cpu/each_real.h"

halo_status halo_cpu_adamw(halo_dtype t, void *p, void *master, const void *g, void *m, void *v,
                           int64_t n, const halo_adamw_step_args *s) {
  HALO_REAL_SWITCH(t, adamw, (p, master, g, m, v, n, s));
}

halo_status halo_cpu_sum_squares(halo_dtype t, double *out, const void *x, int64_t n) {
  HALO_REAL_SWITCH(t, sum_squares, (out, x, n));
}

#else

static halo_status REAL(adamw)(real *restrict p, acc *restrict master, const acc *restrict g,
                               acc *restrict m, acc *restrict v, int64_t n,
                               const halo_adamw_step_args *s) {
  const acc b1 = (acc)s->beta1, b2 = (acc)s->beta2, eps = (acc)s->eps, gs = (acc)s->grad_scale;
  const acc keep = (acc)(1 - s->lr * s->weight_decay);
  const acc rest1 = (acc)(1 - s->beta1), rest2 = (acc)(1 - s->beta2);
  const acc rate = (acc)(s->lr / (1 - pow(s->beta1, (double)s->step)));
  const acc inverse = (acc)(1 / sqrt(1 - pow(s->beta2, (double)s->step)));
  // In pieces, so that master or parameter is chosen outside the loops that are vectorised.
#pragma omp parallel for schedule(static) if (n > 1 << 14)
  for (int64_t from = 0; from < n; from += PIECE) {
    const int64_t count = n - from < PIECE ? n - from : PIECE;
    acc value[PIECE];
    if (master != NULL) {
      memcpy(value, master + from, (size_t)count * sizeof(acc));
    } else {
      for (int64_t i = 0; i < count; i++) value[i] = LOAD(p[from + i]);
    }
    for (int64_t i = 0; i < count; i++) {
      const acc gi = g[from + i] * gs;
      const acc mi = b1 * m[from + i] + rest1 * gi;
      const acc vi = b2 * v[from + i] + rest2 * gi * gi;
      m[from + i] = mi;
      v[from + i] = vi;
      value[i] = value[i] * keep - rate * mi / (HALO__SQRT(vi) * inverse + eps);
    }
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
