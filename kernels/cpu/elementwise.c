/* elementwise: y_i = f(x_i), f(a_i, b_i), and their gradients, by the formulas of elementwise.def.
 *
 * shapes    unary: n contiguous elements. binary, compare, where: y contiguous of `shape`, inputs
 *           strided (0 repeats), innermost dim last
 * numbers   fp32 for f32 and bf16, fp64 for f64, int64 for integers (which wrap on the way back)
 * gradients written (=), of the full shape: core sums over repeated dims
 * threads   whole tiles; the result does not depend on their number
 * twin      kernels/cuda/elementwise.cu
 */
#pragma GCC optimize("wrapv") // integers wrap, as users of i64 ids expect, instead of being undefined

#define HALO_EACH_ARITHMETIC_FILE "cpu/elementwise.c"
#ifndef HALO_ARITHMETIC_PASS
#include "cpu/bits.h"
#include "cpu/strides.h"
#include "elementwise.h"

#include "cpu/each_arithmetic.h"

/* A constant as an integer: infinite bounds of clamp become the ends of int64. */
static int64_t integer_constant(double v) {
  if (v >= 9223372036854775807.0) return INT64_MAX;
  if (v <= -9223372036854775808.0) return INT64_MIN;
  return v == v ? (int64_t)v : 0;
}

halo_status halo_cpu_unary(halo_dtype t, int32_t kind, void *y, const void *x, int64_t n, double a,
                           double b) {
  const arithmetic how = arithmetic_of(t);
#pragma omp parallel for schedule(static) if (n >= PARALLEL_MIN)
  for (int64_t k = 0; k < tile_count(n); k++) {
    tile in, out;
    const int64_t first = k * TILE, m = tile_length(n, first);
    const void *px = tile_load(&in, t, x, first, 1, m);
    void *py = tile_target(&out, t, y, first);
    switch (how) {
    case IN_F32: unary_f32(kind, py, px, m, (float)a, (float)b); break;
    case IN_F64: unary_f64(kind, py, px, m, a, b); break;
    case IN_I64:
      unary_i64(kind, py, px, m, integer_constant(a), integer_constant(b));
      break;
    }
    tile_store(t, y, first, &out, m);
  }
  return HALO_OK;
}

halo_status halo_cpu_unary_bwd(halo_dtype t, int32_t kind, void *dx, const void *dy,
                               const void *saved, int64_t n, double a, double b) {
#pragma omp parallel for schedule(static) if (n >= PARALLEL_MIN)
  for (int64_t k = 0; k < tile_count(n); k++) {
    tile in_dy, in_saved, out;
    const int64_t first = k * TILE, m = tile_length(n, first);
    const void *pdy = tile_load(&in_dy, t, dy, first, 1, m);
    const void *ps = saved != NULL ? tile_load(&in_saved, t, saved, first, 1, m) : NULL;
    void *pdx = tile_target(&out, t, dx, first);
    if (t == HALO_F64) {
      unary_bwd_f64(kind, pdx, pdy, ps, m, a, b);
    } else {
      unary_bwd_f32(kind, pdx, pdy, ps, m, (float)a, (float)b);
    }
    tile_store(t, dx, first, &out, m);
  }
  return HALO_OK;
}

/* Where one tile of a strided binary op lies. */
typedef struct place {
  int64_t out;          /* first element of the contiguous result */
  int64_t in[3];        /* first element of each input */
  int64_t step[3], n;   /* strides along the row; length */
} place;

static place place_of(int64_t k, int32_t ndim, const int64_t *shape, const int64_t *const *strides,
                      int32_t n_in) {
  const int64_t length = row_length(ndim, shape), tiles = tile_count(length);
  const int64_t row = k / tiles, first = k % tiles * TILE;
  place p = {.out = row * length + first, .n = tile_length(length, first)};
  for (int32_t i = 0; i < n_in; i++) {
    p.step[i] = row_step(ndim, strides[i]);
    p.in[i] = row_offset(ndim, shape, strides[i], row) + first * p.step[i];
  }
  return p;
}

/* Tiles of a whole strided op. */
static int64_t places(int32_t ndim, const int64_t *shape) {
  return row_count(ndim, shape) * tile_count(row_length(ndim, shape));
}

static bool is_worth_threads(int32_t ndim, const int64_t *shape) {
  return row_count(ndim, shape) * row_length(ndim, shape) >= PARALLEL_MIN;
}

halo_status halo_cpu_binary(halo_dtype t, int32_t kind, void *y, const void *a, const void *b,
                            int32_t ndim, const int64_t *shape, const int64_t *stride_a,
                            const int64_t *stride_b) {
  const int64_t *const strides[] = {stride_a, stride_b};
  const arithmetic how = arithmetic_of(t);
#pragma omp parallel for schedule(static) if (is_worth_threads(ndim, shape))
  for (int64_t k = 0; k < places(ndim, shape); k++) {
    tile in_a, in_b, out;
    const place p = place_of(k, ndim, shape, strides, 2);
    const void *pa = tile_load(&in_a, t, a, p.in[0], p.step[0], p.n);
    const void *pb = tile_load(&in_b, t, b, p.in[1], p.step[1], p.n);
    void *py = tile_target(&out, t, y, p.out);
    switch (how) {
    case IN_F32: binary_f32(kind, py, pa, pb, p.n); break;
    case IN_F64: binary_f64(kind, py, pa, pb, p.n); break;
    case IN_I64: binary_i64(kind, py, pa, pb, p.n); break;
    }
    tile_store(t, y, p.out, &out, p.n);
  }
  return HALO_OK;
}

halo_status halo_cpu_binary_bwd(halo_dtype t, int32_t kind, void *da, void *db, const void *dy,
                                const void *a, const void *b, int32_t ndim, const int64_t *shape,
                                const int64_t *stride_a, const int64_t *stride_b) {
  const int64_t *const strides[] = {stride_a, stride_b};
#pragma omp parallel for schedule(static) if (is_worth_threads(ndim, shape))
  for (int64_t k = 0; k < places(ndim, shape); k++) {
    tile in_a, in_b, in_dy, out_a, out_b;
    const place p = place_of(k, ndim, shape, strides, 2);
    const void *pa = tile_load(&in_a, t, a, p.in[0], p.step[0], p.n);
    const void *pb = tile_load(&in_b, t, b, p.in[1], p.step[1], p.n);
    const void *pdy = tile_load(&in_dy, t, dy, p.out, 1, p.n);
    void *pda = da != NULL ? tile_target(&out_a, t, da, p.out) : NULL;
    void *pdb = db != NULL ? tile_target(&out_b, t, db, p.out) : NULL;
    if (t == HALO_F64) {
      binary_bwd_f64(kind, pda, pdb, pdy, pa, pb, p.n);
    } else {
      binary_bwd_f32(kind, pda, pdb, pdy, pa, pb, p.n);
    }
    if (da != NULL) tile_store(t, da, p.out, &out_a, p.n);
    if (db != NULL) tile_store(t, db, p.out, &out_b, p.n);
  }
  return HALO_OK;
}

halo_status halo_cpu_compare(halo_dtype t, int32_t kind, uint8_t *y, const void *a, const void *b,
                             int32_t ndim, const int64_t *shape, const int64_t *stride_a,
                             const int64_t *stride_b) {
  const int64_t *const strides[] = {stride_a, stride_b};
  const arithmetic how = arithmetic_of(t);
#pragma omp parallel for schedule(static) if (is_worth_threads(ndim, shape))
  for (int64_t k = 0; k < places(ndim, shape); k++) {
    tile in_a, in_b;
    const place p = place_of(k, ndim, shape, strides, 2);
    const void *pa = tile_load(&in_a, t, a, p.in[0], p.step[0], p.n);
    const void *pb = tile_load(&in_b, t, b, p.in[1], p.step[1], p.n);
    switch (how) {
    case IN_F32: compare_f32(kind, y + p.out, pa, pb, p.n); break;
    case IN_F64: compare_f64(kind, y + p.out, pa, pb, p.n); break;
    case IN_I64: compare_i64(kind, y + p.out, pa, pb, p.n); break;
    }
  }
  return HALO_OK;
}

/* One row of y = c ? a : b; only the size of an element matters. */
static void where_1(bits_8 *restrict y, const uint8_t *c, const bits_8 *a, const bits_8 *b,
                    const int64_t *step, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = c[i * step[0]] ? a[i * step[1]] : b[i * step[2]];
}
static void where_2(bits_16 *restrict y, const uint8_t *c, const bits_16 *a, const bits_16 *b,
                    const int64_t *step, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = c[i * step[0]] ? a[i * step[1]] : b[i * step[2]];
}
static void where_4(bits_32 *restrict y, const uint8_t *c, const bits_32 *a, const bits_32 *b,
                    const int64_t *step, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = c[i * step[0]] ? a[i * step[1]] : b[i * step[2]];
}
static void where_8(bits_64 *restrict y, const uint8_t *c, const bits_64 *a, const bits_64 *b,
                    const int64_t *step, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = c[i * step[0]] ? a[i * step[1]] : b[i * step[2]];
}

halo_status halo_cpu_where(int64_t bytes, void *y, const uint8_t *c, const void *a, const void *b,
                           int32_t ndim, const int64_t *shape, const int64_t *stride_c,
                           const int64_t *stride_a, const int64_t *stride_b) {
  const int64_t *const strides[] = {stride_c, stride_a, stride_b};
#pragma omp parallel for schedule(static) if (is_worth_threads(ndim, shape))
  for (int64_t k = 0; k < places(ndim, shape); k++) {
    const place p = place_of(k, ndim, shape, strides, 3);
    const uint8_t *pc = c + p.in[0];
    const char *pa = (const char *)a + p.in[1] * bytes, *pb = (const char *)b + p.in[2] * bytes;
    void *py = (char *)y + p.out * bytes;
    switch (bytes) {
    case 1: where_1(py, pc, (const void *)pa, (const void *)pb, p.step, p.n); break;
    case 2: where_2(py, pc, (const void *)pa, (const void *)pb, p.step, p.n); break;
    case 4: where_4(py, pc, (const void *)pa, (const void *)pb, p.step, p.n); break;
    default: where_8(py, pc, (const void *)pa, (const void *)pb, p.step, p.n); break;
    }
  }
  return HALO_OK;
}
#else

#define IN_TILE_ANY(...) __VA_ARGS__
#if IS_REAL
#define IN_TILE_FLOAT(...) __VA_ARGS__
#else
#define IN_TILE_FLOAT(...)
#endif

static void ACC(unary)(halo_unary kind, acc *restrict py, const acc *restrict px, int64_t n, acc a,
                         acc b) {
  (void)b;
  switch (kind) {
#define HALO_UNARY(name, dtypes, saves, formula, dx)                                      \
  IN_TILE_##dtypes(case HALO_UNARY_##name : for (int64_t i = 0; i < n; i++) {             \
    const acc x = px[i];                                                                  \
    py[i] = (acc)(formula);                                                               \
  } break;)
#include "elementwise.def"
  default: break;
  }
}

static void ACC(binary)(halo_binary kind, acc *restrict py, const acc *restrict pa,
                          const acc *restrict pb, int64_t n) {
  switch (kind) {
#define HALO_BINARY(name, dtypes, formula, da, db)                                        \
  IN_TILE_##dtypes(case HALO_BINARY_##name : for (int64_t i = 0; i < n; i++) {            \
    const acc a = pa[i], b = pb[i];                                                       \
    py[i] = (acc)(formula);                                                               \
  } break;)
#include "elementwise.def"
  default: break;
  }
}

static void ACC(compare)(halo_compare kind, uint8_t *restrict py, const acc *restrict pa,
                           const acc *restrict pb, int64_t n) {
  switch (kind) {
#define HALO_COMPARE(name, formula)                                                       \
  case HALO_COMPARE_##name:                                                               \
    for (int64_t i = 0; i < n; i++) {                                                     \
      const acc a = pa[i], b = pb[i];                                                     \
      py[i] = (formula);                                                                  \
    }                                                                                     \
    break;
#include "elementwise.def"
  default: break;
  }
}

#if IS_REAL
/* `saved` is the input or the output, whichever the formula wants; NULL for neither. */
static void ACC(unary_bwd)(halo_unary kind, acc *restrict pdx, const acc *restrict pdy,
                             const acc *restrict saved, int64_t n, acc a, acc b) {
  switch (kind) {
#define SAVED_NOTHING
#define SAVED_INPUT const acc x = saved[i];
#define SAVED_OUTPUT const acc y = saved[i];
#define HALO_UNARY(name, dtypes, saves, formula, gradient)                                \
  case HALO_UNARY_##name:                                                                 \
    for (int64_t i = 0; i < n; i++) {                                                     \
      const acc dy = pdy[i];                                                              \
      SAVED_##saves;                                                                      \
      (void)dy;                                                                           \
      pdx[i] = (acc)(gradient);                                                           \
    }                                                                                     \
    break;
#include "elementwise.def"
  default: break;
  }
  (void)b;
}

/* pda or pdb may be NULL. */
static void ACC(binary_bwd)(halo_binary kind, acc *restrict pda, acc *restrict pdb,
                              const acc *restrict pdy, const acc *restrict pa,
                              const acc *restrict pb, int64_t n) {
  switch (kind) {
#define GRADIENT_LOOP(target, formula)                                                    \
  if (target != NULL) {                                                                   \
    for (int64_t i = 0; i < n; i++) {                                                     \
      const acc dy = pdy[i], a = pa[i], b = pb[i];                                        \
      (void)a;                                                                            \
      (void)b;                                                                            \
      target[i] = (acc)(formula);                                                         \
    }                                                                                     \
  }
#define HALO_BINARY(name, dtypes, formula, da, db)                                        \
  case HALO_BINARY_##name:                                                                \
    GRADIENT_LOOP(pda, da)                                                                \
    GRADIENT_LOOP(pdb, db)                                                                \
    break;
#include "elementwise.def"
  default: break;
  }
}
#undef SAVED_NOTHING
#undef SAVED_INPUT
#undef SAVED_OUTPUT
#undef GRADIENT_LOOP
#endif

#undef IN_TILE_ANY
#undef IN_TILE_FLOAT
#endif
