/* bf16.h: bf16 <-> fp32, one value and whole rows.
 *
 * bf16 is the upper half of an fp32: widening is a shift, narrowing rounds to nearest even.
 */
#ifndef HALO_CPU_BF16_H
#define HALO_CPU_BF16_H

#include <stdint.h>
#include <string.h>

static inline float halo__bf16_load(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

/* Round to nearest even; NaN stays NaN (quiet). */
static inline uint16_t halo__bf16_store(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* y[rows,cols] fp32 <- x bf16; rows ldy and ldx elements apart. */
static inline void halo__widen_rows(float *restrict y, int64_t ldy, const uint16_t *restrict x,
                                    int64_t ldx, int64_t rows, int64_t cols) {
#pragma omp parallel for schedule(static) if (rows * cols > 1 << 15)
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t j = 0; j < cols; j++) y[i * ldy + j] = halo__bf16_load(x[i * ldx + j]);
  }
}

/* y[rows,cols] bf16 <- x fp32. */
static inline void halo__narrow_rows(uint16_t *restrict y, int64_t ldy, const float *restrict x,
                                     int64_t ldx, int64_t rows, int64_t cols) {
#pragma omp parallel for schedule(static) if (rows * cols > 1 << 15)
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t j = 0; j < cols; j++) y[i * ldy + j] = halo__bf16_store(x[i * ldx + j]);
  }
}

#endif
