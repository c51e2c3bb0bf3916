/* softmax: normalised exponentials along one dim of [outer, n, inner], and their logarithm.
 *
 *   m = max_j x_j    l = m + log sum_j exp(x_j - m)
 *   softmax y_j = exp(x_j - m) / sum     dx_j = y_j (dy_j - sum_k dy_k y_k)
 *   log     y_j = x_j - l                dx_j = dy_j - exp(y_j) sum_k dy_k
 *   logsumexp y = l                      dx_j = dy exp(x_j - l)
 *
 * numbers   sums over fp32 exponentials are fp32 lanes, added up in fp64
 * edges     a fibre of -inf alone (a row that sees nothing) has l = -inf: softmax gives 0 and log
 *           softmax -inf, with gradient 0, as attention does; +inf gives NaN
 * gradients written (=)
 * twin      kernels/cuda/softmax.cu
 */
#define HALO_EACH_ARITHMETIC_FILE "cpu/softmax.c"
#ifndef HALO_ARITHMETIC_PASS
#include "cpu/fibres.h"

#include "cpu/each_arithmetic.h"

halo_status halo_cpu_softmax(halo_dtype t, void *y, const void *x, int64_t outer, int64_t n,
                             int64_t inner, int32_t is_log) {
  const fibre_job job = {.t = t, .outer = outer, .n = n, .inner = inner, .y = y, .n_in = 1,
                         .in = {x}, .param = {is_log}, .fn = {softmax_f32, softmax_f64}};
  return fibres_run(&job);
}

halo_status halo_cpu_softmax_bwd(halo_dtype t, void *dx, const void *dy, const void *y,
                                 int64_t outer, int64_t n, int64_t inner, int32_t is_log) {
  const fibre_job job = {.t = t, .outer = outer, .n = n, .inner = inner, .y = dx, .n_in = 2,
                         .in = {dy, y}, .param = {is_log},
                         .fn = {softmax_bwd_f32, softmax_bwd_f64}};
  return fibres_run(&job);
}

halo_status halo_cpu_logsumexp(halo_dtype t, void *y, const void *x, int64_t outer, int64_t n,
                               int64_t inner) {
  const fibre_job job = {.t = t, .outer = outer, .n = n, .inner = inner, .y = y, .y_is_one = true,
                         .n_in = 1, .in = {x}, .fn = {logsumexp_f32, logsumexp_f64}};
  return fibres_run(&job);
}

halo_status halo_cpu_logsumexp_bwd(halo_dtype t, void *dx, const void *dy, const void *x,
                                   const void *y, int64_t outer, int64_t n, int64_t inner) {
  const fibre_job job = {.t = t, .outer = outer, .n = n, .inner = inner, .y = dx, .n_in = 3,
                         .in = {dy, x, y}, .in_is_one = {true, false, true},
                         .fn = {logsumexp_bwd_f32, logsumexp_bwd_f64}};
  return fibres_run(&job);
}
#elif IS_REAL

static acc ACC(maximum_of)(const acc *x, int64_t n) {
  acc m = -INFINITY;
#pragma omp simd reduction(max : m)
  for (int64_t j = 0; j < n; j++) m = x[j] > m ? x[j] : m;
  return m;
}

/* Sum of exp(x - m), which is also written to y unless y is NULL. */
static double ACC(exponentials)(acc *restrict y, const acc *restrict x, int64_t n, acc m) {
  double sum = 0;
  for (int64_t first = 0; first < n; first += TILE) {
    const int64_t end = first + tile_length(n, first);
    acc lanes = 0;
    if (y != NULL) {
      for (int64_t j = first; j < end; j++) {
        y[j] = EXP(x[j] - m);
        lanes += y[j];
      }
    } else {
      for (int64_t j = first; j < end; j++) lanes += EXP(x[j] - m);
    }
    sum += lanes;
  }
  return sum;
}

static void ACC(softmax)(void *py, const void *const *in, int64_t n, const double *param) {
  acc *y = py;
  const acc *x = in[0];
  const acc m = ACC(maximum_of)(x, n);
  if (m == -INFINITY) {
    const acc none = param[0] != 0 ? -INFINITY : 0; // or NaN, when there is one among the -inf
    const acc fill = ACC(exponentials)(NULL, x, n, 0) == 0 ? none : NAN;
    for (int64_t j = 0; j < n; j++) y[j] = fill;
  } else if (param[0] != 0) {
    const acc l = m + (acc)log(ACC(exponentials)(NULL, x, n, m));
    for (int64_t j = 0; j < n; j++) y[j] = x[j] - l;
  } else {
    const acc scale = (acc)(1 / ACC(exponentials)(y, x, n, m));
    for (int64_t j = 0; j < n; j++) y[j] *= scale;
  }
}

static void ACC(softmax_bwd)(void *pdx, const void *const *in, int64_t n, const double *param) {
  acc *dx = pdx;
  const acc *dy = in[0], *y = in[1];
  double sum = 0;
  for (int64_t first = 0; first < n; first += TILE) {
    const int64_t end = first + tile_length(n, first);
    acc lanes = 0;
    if (param[0] != 0) {
      for (int64_t j = first; j < end; j++) lanes += dy[j];
    } else {
      for (int64_t j = first; j < end; j++) lanes += dy[j] * y[j];
    }
    sum += lanes;
  }
  const acc s = (acc)sum;
  if (param[0] != 0) {
    // -inf everywhere is a constant; elsewhere exp(-inf) = 0 leaves dy, which is right too.
    const bool is_empty = n > 0 && ACC(maximum_of)(y, n) == -INFINITY;
    for (int64_t j = 0; j < n; j++) dx[j] = is_empty ? 0 : dy[j] - EXP(y[j]) * s;
  } else {
    for (int64_t j = 0; j < n; j++) dx[j] = y[j] * (dy[j] - s);
  }
}

static void ACC(logsumexp)(void *py, const void *const *in, int64_t n, const double *param) {
  (void)param;
  const acc *x = in[0];
  const acc m = ACC(maximum_of)(x, n);
  const acc sum = (acc)log(ACC(exponentials)(NULL, x, n, m == -INFINITY ? 0 : m));
  *(acc *)py = m == -INFINITY ? sum : m + sum;
}

static void ACC(logsumexp_bwd)(void *pdx, const void *const *in, int64_t n, const double *param) {
  (void)param;
  acc *dx = pdx;
  const acc dy = *(const acc *)in[0], l = *(const acc *)in[2];
  const acc *x = in[1];
  for (int64_t j = 0; j < n; j++) dx[j] = l == -INFINITY ? 0 : dy * EXP(x[j] - l);
}
#endif
