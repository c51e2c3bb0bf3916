/* attention_ends: what happens to the query side before the first key and after the last.
 *
 *   begin      o = 0, m = -inf, l = 0
 *   finish     out = o / l,  lse = m ln 2 + log l;  a row that saw no key: out = 0, lse = -inf
 *   delta      sum_d out_d grad_d       (the softmax's own gradient, FlashAttention-2 eq. 4)
 *   dq_finish  dq = sum of the parts, in part order
 *   merge      with a = lse, b = lse_part, c = max(a, b):
 *              o = (e^(a-c) o + e^(b-c) o_part) / (e^(a-c) + e^(b-c)), lse = c + log(e^(a-c) +
 *              e^(b-c))
 *
 * shapes    o, dq parts [B,H,T,D] acc; m, l, delta, lse [B,H,T] acc; out, dq strided [B,T,H,D]
 * numbers merge takes exponents in fp64: it is bound by memory, and W merges must not add up errors
 * twin      kernels/cuda/attention_ends.cu
 */
#define HALO_EACH_REAL_FILE "cpu/attention_ends.c"
#ifndef HALO_REAL_PASS
#include "cpu/each_real.h"

halo_status halo_cpu_attention_begin(const halo_attention_queries *a) {
  HALO_REAL_SWITCH(a->dtype, begin, (a));
}

halo_status halo_cpu_attention_finish(void *out, const int64_t *out_stride, void *lse,
                                      const int64_t *lse_stride, const halo_attention_queries *a) {
  HALO_REAL_SWITCH(a->dtype, finish, (out, out_stride, lse, lse_stride, a));
}

halo_status halo_cpu_attention_once(void *out, const int64_t *out_stride, void *lse,
                                    const int64_t *lse_stride, const halo_attention_queries *a,
                                    const halo_attention_tiles *keys) {
  halo_attention_queries b = *a;
  const int64_t rows = a->n_batch * a->n_heads * a->block * a->n_blocks;
  const int64_t bytes = halo_dtype_bytes(halo__acc_dtype(a->dtype));
  char *state = NULL;
  HALO_TRY(halo__scratch((void **)&state, rows * (a->head_size + 2), bytes));
  b.o = state;
  b.m = state + rows * a->head_size * bytes;
  b.l = state + rows * (a->head_size + 1) * bytes;
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo_cpu_attention_begin(&b));
  HALO_TRY_GOTO(halo_cpu_attention_tiles_fwd(&b, keys));
  status = halo_cpu_attention_finish(out, out_stride, lse, lse_stride, &b);
done:
  halo__free(state);
  return status;
}

halo_status halo_cpu_attention_delta(void *delta, const void *out, const int64_t *out_stride,
                                     const halo_attention_queries *a) {
  HALO_REAL_SWITCH(a->dtype, delta, (delta, out, out_stride, a));
}

halo_status halo_cpu_attention_dq_finish(void *dq, const int64_t *dq_stride,
                                         const halo_attention_queries *a) {
  HALO_REAL_SWITCH(a->dtype, dq_finish, (dq, dq_stride, a));
}

halo_status halo_cpu_attention_merge(halo_dtype t, void *o, void *lse, const void *o_part,
                                     const void *lse_part, int64_t n_batch, int64_t n_tokens,
                                     int64_t n_heads, int64_t head_size) {
  HALO_REAL_SWITCH(t, merge, (o, lse, o_part, lse_part, n_batch, n_tokens, n_heads, head_size));
}

#else

static bool REAL(is_large)(const halo_attention_queries *a) {
  return a->n_batch * a->n_heads * a->block * a->n_blocks * a->head_size > 1 << 16;
}

static halo_status REAL(begin)(const halo_attention_queries *a) {
  const int64_t rows = a->n_batch * a->n_heads * a->block * a->n_blocks;
  acc *o = a->o, *m = a->m, *l = a->l;
#pragma omp parallel for schedule(static) if (REAL(is_large)(a))
  for (int64_t i = 0; i < rows; i++) {
    m[i] = -INFINITY;
    l[i] = 0;
    memset(o + i * a->head_size, 0, (size_t)a->head_size * sizeof(acc));
  }
  return HALO_OK;
}

static halo_status REAL(finish)(void *out_in, const int64_t *out_stride, void *lse_in,
                                const int64_t *lse_stride, const halo_attention_queries *a) {
  const int64_t T = a->block * a->n_blocks, D = a->head_size;
#pragma omp parallel for schedule(static) if (REAL(is_large)(a))
  for (int64_t row = 0; row < a->n_batch * a->n_heads * T; row++) {
    const int64_t t = row % T, head = row / T % a->n_heads, batch = row / T / a->n_heads;
    const acc m = ((const acc *)a->m)[row], l = ((const acc *)a->l)[row];
    const acc *o = (const acc *)a->o + row * D;
    real *out = (real *)out_in + batch * out_stride[0] + t * out_stride[1] + head * out_stride[2];
    const acc factor = l == 0 ? 0 : 1 / l; // a NaN stays one
    for (int64_t d = 0; d < D; d++) out[d] = STORE(o[d] * factor);
    acc *lse = (acc *)lse_in + batch * lse_stride[0] + head * lse_stride[1] + t;
    *lse = l == 0 ? -INFINITY : (acc)(m * 0.6931471805599453 + log((double)l));
  }
  return HALO_OK;
}

static halo_status REAL(delta)(void *delta_in, const void *out_in, const int64_t *out_stride,
                               const halo_attention_queries *a) {
  const int64_t T = a->block * a->n_blocks;
#pragma omp parallel for schedule(static) if (REAL(is_large)(a))
  for (int64_t row = 0; row < a->n_batch * a->n_heads * T; row++) {
    const int64_t t = row % T, head = row / T % a->n_heads, batch = row / T / a->n_heads;
    const real *out = (const real *)out_in + batch * out_stride[0] + t * out_stride[1] +
                      head * out_stride[2];
    const real *grad = (const real *)a->grad + batch * a->grad_stride[0] + t * a->grad_stride[1] +
                       head * a->grad_stride[2];
    acc sum = 0;
    for (int64_t d = 0; d < a->head_size; d++) sum += LOAD(out[d]) * LOAD(grad[d]);
    ((acc *)delta_in)[row] = sum;
  }
  return HALO_OK;
}

static halo_status REAL(dq_finish)(void *dq_in, const int64_t *dq_stride,
                                   const halo_attention_queries *a) {
  const int64_t T = a->block * a->n_blocks, D = a->head_size;
  const int64_t rows = a->n_batch * a->n_heads * T;
#pragma omp parallel for schedule(static) if (REAL(is_large)(a))
  for (int64_t row = 0; row < rows; row++) {
    const int64_t t = row % T, head = row / T % a->n_heads, batch = row / T / a->n_heads;
    real *dq = (real *)dq_in + batch * dq_stride[0] + t * dq_stride[1] + head * dq_stride[2];
    const acc *part = (const acc *)a->dq + row * D;
    for (int64_t d = 0; d < D; d++) {
      acc sum = part[d];
      for (int64_t p = 1; p < a->n_parts; p++) sum += part[p * rows * D + d];
      dq[d] = STORE(sum);
    }
  }
  return HALO_OK;
}

static halo_status REAL(merge)(real *o, acc *lse, const real *o_part, const acc *lse_part,
                               int64_t n_batch, int64_t n_tokens, int64_t n_heads,
                               int64_t head_size) {
#pragma omp parallel for schedule(static) if (n_batch * n_tokens * n_heads * head_size > 1 << 16)
  for (int64_t row = 0; row < n_batch * n_tokens * n_heads; row++) { // [B,T,H]
    const int64_t head = row % n_heads, bt = row / n_heads;
    const int64_t at = (bt / n_tokens * n_heads + head) * n_tokens + bt % n_tokens; // [B,H,T]
    const double a = lse[at], b = lse_part[at];
    if (b == -INFINITY) continue; // nothing to add; also when both are empty
    const double top = a > b ? a : b, wa = exp(a - top), wb = exp(b - top), sum = wa + wb;
    for (int64_t i = row * head_size; i < (row + 1) * head_size; i++) {
      o[i] = STORE((acc)((wa * LOAD(o[i]) + wb * LOAD(o_part[i])) / sum));
    }
    lse[at] = (acc)(top + log(sum));
  }
  return HALO_OK;
}

#endif
