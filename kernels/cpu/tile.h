/* tile.h: a run of elements of any dtype, read and written in its arithmetic type.
 *
 * The ordinary ops work through tiles of TILE elements that stay in the first-level cache: load
 * (widen, repeat or gather), compute, store (narrow). So a formula is compiled once per arithmetic
 * type, not once per dtype and layout: fp32 for f32 and bf16, fp64 for f64, int64 for integers.
 * Contiguous f32, f64 and i64 are used where they lie, without a copy. 512 elements is 4 KiB of
 * doubles: three tiles fit any first-level cache, and the switch on dtype is paid once per tile.
 */
#ifndef HALO_CPU_TILE_H
#define HALO_CPU_TILE_H

#include <stdbool.h>
#include <stdint.h>

#include "bf16.h"
#include "halo.h"
#include "internal.h"

enum { TILE = 512 };
/* Fewer elements than this are not worth waking threads for. */
enum { PARALLEL_MIN = 1 << 15 };

typedef union tile {
  float f32[TILE];
  double f64[TILE];
  int64_t i64[TILE];
} __attribute__((aligned(64))) tile;

/* The type a dtype is computed in. */
typedef enum arithmetic { IN_F32, IN_F64, IN_I64 } arithmetic;

static inline arithmetic arithmetic_of(halo_dtype t) {
  if (t == HALO_F64) return IN_F64;
  return t == HALO_F32 || t == HALO_BF16 ? IN_F32 : IN_I64;
}

/* Storage and arithmetic type are the same, so a contiguous run needs no copy. */
static inline bool is_native(halo_dtype t) {
  return t == HALO_F32 || t == HALO_F64 || t == HALO_I64;
}

static inline void *element_at(halo_dtype t, const void *x, int64_t i) {
  return (char *)x + i * halo_dtype_bytes(t);
}

/* y[i] <- x[i * step], widened; the compiler makes a version for step 1. */
static inline void widen_f32(float *restrict y, const float *restrict x, int64_t step, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = x[i * step];
}
static inline void widen_f64(double *restrict y, const double *restrict x, int64_t step,
                             int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = x[i * step];
}
static inline void widen_bf16(float *restrict y, const uint16_t *restrict x, int64_t step,
                              int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = halo__bf16_load(x[i * step]);
}
static inline void widen_i32(int64_t *restrict y, const int32_t *restrict x, int64_t step,
                             int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = x[i * step];
}
static inline void widen_i64(int64_t *restrict y, const int64_t *restrict x, int64_t step,
                             int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = x[i * step];
}
static inline void widen_u8(int64_t *restrict y, const uint8_t *restrict x, int64_t step,
                            int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = x[i * step];
}

/* n elements from x, `step` apart, into y of the arithmetic type. */
static inline void widen(void *y, halo_dtype t, const void *x, int64_t step, int64_t n) {
  switch (t) {
  case HALO_F32: widen_f32(y, x, step, n); break;
  case HALO_F64: widen_f64(y, x, step, n); break;
  case HALO_BF16: widen_bf16(y, x, step, n); break;
  case HALO_I32: widen_i32(y, x, step, n); break;
  case HALO_I64: widen_i64(y, x, step, n); break;
  default: widen_u8(y, x, step, n); break;
  }
}

/* n <= TILE elements of x from element `first`, `step` apart: in place, or copied to `buffer`. */
static inline const void *tile_load(tile *buffer, halo_dtype t, const void *x, int64_t first,
                                    int64_t step, int64_t n) {
  const void *from = element_at(t, x, first);
  if (step == 1 && is_native(t)) return from;
  if (step != 0) {
    widen(buffer, t, from, step, n);
    return buffer;
  }
  widen(buffer, t, from, 1, 1);
  if (arithmetic_of(t) == IN_F32) {
    for (int64_t i = 1; i < n; i++) buffer->f32[i] = buffer->f32[0];
  } else {
    for (int64_t i = 1; i < n; i++) buffer->i64[i] = buffer->i64[0]; // doubles alike
  }
  return buffer;
}

/* n elements of the arithmetic type into y, `step` apart, narrowed. Integers wrap. */
static inline void narrow(void *y, halo_dtype t, int64_t step, const void *x, int64_t n) {
  const float *f = x;
  const double *d = x;
  const int64_t *l = x;
  switch (t) {
  case HALO_F32:
    for (int64_t i = 0; i < n; i++) ((float *)y)[i * step] = f[i];
    break;
  case HALO_F64:
    for (int64_t i = 0; i < n; i++) ((double *)y)[i * step] = d[i];
    break;
  case HALO_BF16:
    for (int64_t i = 0; i < n; i++) ((uint16_t *)y)[i * step] = halo__bf16_store(f[i]);
    break;
  case HALO_I32:
    for (int64_t i = 0; i < n; i++) ((int32_t *)y)[i * step] = (int32_t)l[i];
    break;
  case HALO_I64:
    for (int64_t i = 0; i < n; i++) ((int64_t *)y)[i * step] = l[i];
    break;
  default:
    for (int64_t i = 0; i < n; i++) ((uint8_t *)y)[i * step] = (uint8_t)l[i];
    break;
  }
}

/* Where to compute n elements of contiguous y: y itself, or `buffer` until tile_store. */
static inline void *tile_target(tile *buffer, halo_dtype t, void *y, int64_t first) {
  return is_native(t) ? element_at(t, y, first) : buffer;
}

/* Finish what tile_target began. */
static inline void tile_store(halo_dtype t, void *y, int64_t first, const tile *buffer, int64_t n) {
  if (!is_native(t)) narrow(element_at(t, y, first), t, 1, buffer, n);
}

static inline int64_t tile_count(int64_t n) { return (n + TILE - 1) / TILE; }
static inline int64_t tile_length(int64_t n, int64_t first) {
  return n - first < TILE ? n - first : TILE;
}

#endif
