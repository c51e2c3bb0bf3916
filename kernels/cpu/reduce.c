/* reduce: sums, extremes, products, variances and running sums along one dim of [outer, n, inner].
 *
 *   sum       y = scale * sum_j x_j
 *   extreme   y = x_j*, j* the first index of the largest (smallest) element; NaN wins
 *   prod      y = prod_j x_j                 dx_j = dy prod_{k != j} x_k
 *   variance  y = sum_j (x_j - mean)^2 / d   dx_j = dy * 2 (x_j - mean) / d,  d = n - correction
 *   cumsum    y_j = sum_{k <= j} x_k, or k >= j when reversed, which is its gradient too
 *
 * numbers   sums run in 32 fp32 lanes over at most 512 elements, partial sums in fp64 over blocks whose
 *           size depends on the shape alone, so that a result never depends on the thread count;
 *           integers are summed in int64 and give i64. The lanes are written out: left to the compiler, a
 *           build that does not vectorise (sanitizers) drifts by 1e-6 where this one does not
 * edges     an empty sum is 0, an empty product 1, an empty variance NaN; core refuses empty extremes
 * gradients written (=)
 * twin      kernels/cuda/reduce.cu
 */
#pragma GCC optimize("wrapv") // integer sums wrap

#define HALO_EACH_ARITHMETIC_FILE "cpu/reduce.c"
#ifndef HALO_ARITHMETIC_PASS
#include "cpu/fibres.h"

/* Rows of a partial sum: one row of elements when inner = 1, else `inner` columns at once. */
enum { ROW_BLOCK = 8 * TILE, COLUMN_BLOCK = 256, LANE_ROWS = 16 };

/* A partial sum is a double or an int64_t. */
typedef union partial {
  double real;
  int64_t integer;
} partial;

#include "cpu/each_arithmetic.h"

/* Add up the partial sums of flat output elements first .. first+m. */
static void finish_sums(halo_dtype t, void *y, const partial *p, int64_t first, int64_t m,
                        int64_t blocks, int64_t inner, double scale) {
  tile out;
  const bool is_integer = arithmetic_of(t) == IN_I64;
  for (int64_t i = 0; i < m; i++) {
    const int64_t o = (first + i) / inner, c = (first + i) % inner;
    partial total = {.integer = 0}; // 0.0 alike
    for (int64_t b = 0; b < blocks; b++) {
      const partial *q = &p[(o * blocks + b) * inner + c];
      if (is_integer) {
        total.integer += q->integer;
      } else {
        total.real += q->real;
      }
    }
    switch (arithmetic_of(t)) {
    case IN_F32: out.f32[i] = (float)(total.real * scale); break;
    case IN_F64: out.f64[i] = total.real * scale; break;
    case IN_I64: out.i64[i] = total.integer; break;
    }
  }
  const halo_dtype to = is_integer ? HALO_I64 : t;
  narrow(element_at(to, y, first), to, 1, &out, m);
}

halo_status halo_cpu_sum(halo_dtype t, void *y, const void *x, int64_t outer, int64_t n,
                         int64_t inner, double scale) {
  const int64_t block = inner == 1 ? ROW_BLOCK : COLUMN_BLOCK;
  const int64_t blocks = (n + block - 1) / block, columns = tile_count(inner);
  const arithmetic how = arithmetic_of(t);
  partial *p = NULL;
  HALO_TRY(halo__scratch((void **)&p, outer * blocks * inner, sizeof *p));
  const bool is_parallel = outer * n * inner >= PARALLEL_MIN;
#pragma omp parallel for schedule(static) if (is_parallel)
  for (int64_t k = 0; k < outer * blocks * columns; k++) {
    const int64_t o = k / columns / blocks, b = k / columns % blocks, c = k % columns * TILE;
    const int64_t rows = n - b * block < block ? n - b * block : block;
    const int64_t first = (o * n + b * block) * inner + c;
    partial *q = &p[(o * blocks + b) * inner + c];
    const int64_t m = tile_length(inner, c);
    if (inner == 1) {
      switch (how) {
      case IN_F32: sum_row_f32(q, t, x, first, rows); break;
      case IN_F64: sum_row_f64(q, t, x, first, rows); break;
      case IN_I64: sum_row_i64(q, t, x, first, rows); break;
      }
    } else {
      switch (how) {
      case IN_F32: sum_columns_f32(q, t, x, first, rows, inner, m); break;
      case IN_F64: sum_columns_f64(q, t, x, first, rows, inner, m); break;
      case IN_I64: sum_columns_i64(q, t, x, first, rows, inner, m); break;
      }
    }
  }
  const int64_t count = outer * inner;
#pragma omp parallel for schedule(static) if (is_parallel)
  for (int64_t k = 0; k < tile_count(count); k++) {
    finish_sums(t, y, p, k * TILE, tile_length(count, k * TILE), blocks, inner, scale);
  }
  halo__free(p);
  return HALO_OK;
}

/* Fibres (o, :, first .. first+m) that lie side by side. */
static void extreme_columns(halo_dtype t, bool is_max, void *y, int64_t *index, const void *x,
                            int64_t n, int64_t inner, int64_t m) {
  tile buffer, best;
  int64_t at[TILE];
  for (int64_t j = 0; j < n; j++) {
    const void *row = tile_load(&buffer, t, x, j * inner, 1, m);
    switch (arithmetic_of(t)) {
    case IN_F32: extreme_columns_f32(best.f32, at, row, j, m, is_max); break;
    case IN_F64: extreme_columns_f64(best.f64, at, row, j, m, is_max); break;
    case IN_I64: extreme_columns_i64(best.i64, at, row, j, m, is_max); break;
    }
  }
  if (y != NULL) narrow(y, t, 1, &best, m);
  if (index != NULL) memcpy(index, at, (size_t)m * sizeof *at);
}

/* One contiguous fibre. */
static void extreme_row(halo_dtype t, bool is_max, void *y, int64_t *index, const void *x,
                        int64_t n) {
  tile buffer, best;
  int64_t at = -1;
  for (int64_t j = 0; j < n; j += TILE) {
    const int64_t m = tile_length(n, j);
    const void *run = tile_load(&buffer, t, x, j, 1, m);
    switch (arithmetic_of(t)) {
    case IN_F32: extreme_run_f32(best.f32, &at, run, j, m, is_max); break;
    case IN_F64: extreme_run_f64(best.f64, &at, run, j, m, is_max); break;
    case IN_I64: extreme_run_i64(best.i64, &at, run, j, m, is_max); break;
    }
  }
  if (y != NULL) narrow(y, t, 1, &best, 1);
  if (index != NULL) *index = at;
}

halo_status halo_cpu_extreme(halo_dtype t, int32_t is_max, void *y, int64_t *index, const void *x,
                             int64_t outer, int64_t n, int64_t inner) {
  const int64_t columns = tile_count(inner);
#pragma omp parallel for schedule(static) if (outer * n * inner >= PARALLEL_MIN)
  for (int64_t k = 0; k < outer * columns; k++) {
    const int64_t o = k / columns, c = k % columns * TILE, to = o * inner + c;
    const void *from = element_at(t, x, o * n * inner + c);
    void *value = y != NULL ? element_at(t, y, to) : NULL;
    int64_t *place = index != NULL ? index + to : NULL;
    if (inner == 1) {
      extreme_row(t, is_max, value, place, from, n);
    } else {
      extreme_columns(t, is_max, value, place, from, n, inner, tile_length(inner, c));
    }
  }
  return HALO_OK;
}

halo_status halo_cpu_prod(halo_dtype t, void *y, const void *x, int64_t outer, int64_t n,
                          int64_t inner) {
  const fibre_job job = {.t = t, .outer = outer, .n = n, .inner = inner, .y = y, .y_is_one = true,
                         .n_in = 1, .in = {x}, .fn = {prod_f32, prod_f64}};
  return fibres_run(&job);
}

halo_status halo_cpu_prod_bwd(halo_dtype t, void *dx, const void *dy, const void *x, int64_t outer,
                              int64_t n, int64_t inner) {
  const fibre_job job = {.t = t, .outer = outer, .n = n, .inner = inner, .y = dx, .n_in = 2,
                         .in = {dy, x}, .in_is_one = {true}, .fn = {prod_bwd_f32, prod_bwd_f64}};
  return fibres_run(&job);
}

halo_status halo_cpu_variance(halo_dtype t, void *y, const void *x, int64_t outer, int64_t n,
                              int64_t inner, double correction) {
  const fibre_job job = {.t = t, .outer = outer, .n = n, .inner = inner, .y = y, .y_is_one = true,
                         .n_in = 1, .in = {x}, .param = {correction},
                         .fn = {variance_f32, variance_f64}};
  return fibres_run(&job);
}

halo_status halo_cpu_variance_bwd(halo_dtype t, void *dx, const void *dy, const void *x,
                                  int64_t outer, int64_t n, int64_t inner, double correction) {
  const fibre_job job = {.t = t, .outer = outer, .n = n, .inner = inner, .y = dx, .n_in = 2,
                         .in = {dy, x}, .in_is_one = {true}, .param = {correction},
                         .fn = {variance_bwd_f32, variance_bwd_f64}};
  return fibres_run(&job);
}

halo_status halo_cpu_cumsum(halo_dtype t, void *y, const void *x, int64_t outer, int64_t n,
                            int64_t inner, int32_t is_reversed) {
  const fibre_job job = {.t = t, .outer = outer, .n = n, .inner = inner, .y = y, .n_in = 1,
                         .in = {x}, .param = {is_reversed},
                         .fn = {cumsum_f32, cumsum_f64, cumsum_i64}};
  return fibres_run(&job);
}
#else

#if IS_REAL
#define SUM double
#define FIELD real
#else
#define SUM int64_t
#define FIELD integer
#endif

typedef acc ACC(lanes) __attribute__((vector_size(64), aligned(sizeof(acc)), may_alias));

static SUM ACC(sum_of)(const acc *x, int64_t n) {
  enum { LANES = 64 / sizeof(acc) };
  SUM sum = 0;
  for (int64_t first = 0; first < n; first += TILE) {
    const int64_t end = first + tile_length(n, first);
    ACC(lanes) a = {0}, b = {0};
    acc rest = 0;
    int64_t j = first;
    for (; j + 2 * LANES <= end; j += 2 * LANES) {
      a += *(const ACC(lanes) *)(x + j);
      b += *(const ACC(lanes) *)(x + j + LANES);
    }
    for (; j < end; j++) rest += x[j];
    a += b;
    SUM part[4] = {rest};
    for (int64_t i = 0; i < LANES; i++) part[i % 4] += a[i];
    sum += (part[0] + part[1]) + (part[2] + part[3]);
  }
  return sum;
}

static void ACC(sum_row)(partial *p, halo_dtype t, const void *x, int64_t first, int64_t n) {
  tile buffer;
  SUM sum = 0;
  for (int64_t j = 0; j < n; j += TILE) {
    const int64_t m = tile_length(n, j);
    sum += ACC(sum_of)(tile_load(&buffer, t, x, first + j, 1, m), m);
  }
  p->FIELD = sum;
}

/* p[0..m) <- sums down `rows` rows that are `inner` elements apart, LANE_ROWS of them at a time in the
 * arithmetic type. */
static void ACC(sum_columns)(partial *restrict p, halo_dtype t, const void *x, int64_t first,
                             int64_t rows, int64_t inner, int64_t m) {
  tile buffer;
  acc lanes[TILE];
  for (int64_t c = 0; c < m; c++) p[c].FIELD = 0;
  for (int64_t j = 0; j < rows;) {
    const int64_t end = j + LANE_ROWS < rows ? j + LANE_ROWS : rows;
    for (int64_t c = 0; c < m; c++) lanes[c] = 0;
    for (; j < end; j++) {
      const acc *row = tile_load(&buffer, t, x, first + j * inner, 1, m);
      for (int64_t c = 0; c < m; c++) lanes[c] += row[c];
    }
    for (int64_t c = 0; c < m; c++) p[c].FIELD += lanes[c];
  }
}

/* Go on with row j of fibres side by side. */
static void ACC(extreme_columns)(acc *restrict best, int64_t *restrict at, const acc *restrict x,
                                 int64_t j, int64_t m, bool is_max) {
  for (int64_t c = 0; c < m; c++) {
    const bool is_better = is_max ? x[c] > best[c] : x[c] < best[c];
    const bool takes = j == 0 || (!IS_NAN(best[c]) && (is_better || IS_NAN(x[c])));
    best[c] = takes ? x[c] : best[c];
    at[c] = takes ? j : at[c];
  }
}

/* Go on with a run that starts at index j; *at < 0 before the first. A first pass only asks, in a way
 * that vectorises, whether the run has anything better or a NaN; most have not. */
static void ACC(extreme_run)(acc *best, int64_t *at, const acc *x, int64_t j, int64_t n,
                             bool is_max) {
  if (*at < 0) {
    *best = x[0];
    *at = j;
  }
  if (IS_NAN(*best)) return;
  acc winner = *best;
  int32_t n_nan = 0;
  if (is_max) {
#pragma omp simd reduction(max : winner)
    for (int64_t i = 0; i < n; i++) winner = x[i] > winner ? x[i] : winner;
  } else {
#pragma omp simd reduction(min : winner)
    for (int64_t i = 0; i < n; i++) winner = x[i] < winner ? x[i] : winner;
  }
  for (int64_t i = 0; i < n; i++) n_nan += IS_NAN(x[i]);
  if (n_nan == 0 && winner == *best) return;
  for (int64_t i = 0; i < n; i++) {
    if (n_nan > 0 ? IS_NAN(x[i]) : x[i] == winner) {
      *best = x[i];
      *at = j + i;
      return;
    }
  }
}

static void ACC(cumsum)(void *py, const void *const *in, int64_t n, const double *param) {
  acc *y = py;
  const acc *x = in[0];
  SUM sum = 0;
  if (param[0] != 0) {
    for (int64_t j = n - 1; j >= 0; j--) y[j] = (acc)(sum += x[j]);
  } else {
    for (int64_t j = 0; j < n; j++) y[j] = (acc)(sum += x[j]);
  }
}

#if IS_REAL
static void ACC(prod)(void *y, const void *const *in, int64_t n, const double *param) {
  (void)param;
  const acc *x = in[0];
  double product = 1;
  for (int64_t j = 0; j < n; j++) product *= x[j];
  *(acc *)y = (acc)product;
}

/* Products of the others without dividing, so that zeros need no special case: first the product
 * before each element, then the product after it. */
static void ACC(prod_bwd)(void *pdx, const void *const *in, int64_t n, const double *param) {
  (void)param;
  acc *dx = pdx;
  const acc dy = *(const acc *)in[0], *x = in[1];
  double product = dy;
  for (int64_t j = 0; j < n; j++) {
    dx[j] = (acc)product;
    product *= x[j];
  }
  product = 1;
  for (int64_t j = n - 1; j >= 0; j--) {
    dx[j] = (acc)(dx[j] * product);
    product *= x[j];
  }
}

static void ACC(variance)(void *y, const void *const *in, int64_t n, const double *param) {
  const acc *x = in[0];
  const double mean = ACC(sum_of)(x, n) / (double)n;
  double sum = 0;
  for (int64_t first = 0; first < n; first += TILE) { // in parts, so that rounding stays small in any build
    const int64_t end = first + tile_length(n, first);
    double part = 0;
    for (int64_t j = first; j < end; j++) part += (x[j] - mean) * (x[j] - mean);
    sum += part;
  }
  *(acc *)y = n > 0 ? (acc)(sum / ((double)n - param[0])) : NAN;
}

static void ACC(variance_bwd)(void *pdx, const void *const *in, int64_t n, const double *param) {
  acc *dx = pdx;
  const acc dy = *(const acc *)in[0], *x = in[1];
  const double mean = ACC(sum_of)(x, n) / (double)n;
  const double scale = 2 * dy / ((double)n - param[0]);
  for (int64_t j = 0; j < n; j++) dx[j] = (acc)(scale * (x[j] - mean));
}
#endif

#undef SUM
#undef FIELD
#endif
