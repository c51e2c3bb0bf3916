/* rope: rotary position embedding, and its table of angles (Su et al., arXiv 2104.09864).
 *
 *   a_pj = pos_p * f_j                       cos, sin [p,j] = scale * cos a_pj, scale * sin a_pj
 *   y_j     = x_j cos_j - x_{j+R} sin_j      j < R, half-split pairs (j, j+R) as Transformers and
 *   y_{j+R} = x_{j+R} cos_j + x_j sin_j      GPT-NeoX have them; elements past 2R are copied
 *
 * shapes    x, y [B,T,H,D]; cos, sin [B or 1,T,R] in the arithmetic type; 2R <= D
 * layout    x: D contiguous, strides in elements for B, T, H; y contiguous
 * gradient  the same kernel with sign = -1: the transpose of scale * rotation is scale * the
 *           rotation back, so a scaled table (YaRN) needs nothing more
 * numbers   the angle is rounded to fp32 like Transformers' (fp32 frequencies times fp32
 *           positions), then cos and sin are taken in fp64: equal to theirs within one rounding.
 *           exact != 0 keeps the angle in fp64: beyond 2^17 tokens an fp32 angle of the fastest
 *           frequency is off by up to 2^-7 rad
 * twin      kernels/cuda/rope.cu
 */
#define HALO_EACH_REAL_FILE "cpu/rope.c"
#ifndef HALO_REAL_PASS
#include "cpu/each_real.h"

halo_status halo_cpu_rope_table(halo_dtype t, void *cos_out, void *sin_out, halo_dtype tp,
                                const void *positions, halo_dtype tf, const void *inv_freq,
                                int64_t n, int64_t half, double scale, int32_t exact) {
  HALO_REAL_SWITCH(t, rope_table,
                   (cos_out, sin_out, tp, positions, tf, inv_freq, n, half, scale, exact));
}

halo_status halo_cpu_rope(halo_dtype t, void *y, const void *x, const int64_t *stride,
                          const void *cos_table, const void *sin_table, int64_t table_stride,
                          int64_t batch, int64_t tokens, int64_t heads, int64_t size, int64_t half,
                          double sign) {
  HALO_REAL_SWITCH(t, rope, (y, x, stride, cos_table, sin_table, table_stride, batch, tokens, heads,
                             size, half, sign));
}

#else

static halo_status REAL(rope_table)(real *restrict cos_out, real *restrict sin_out, halo_dtype tp,
                                    const void *positions, halo_dtype tf, const void *inv_freq,
                                    int64_t n, int64_t half, double scale, int32_t exact) {
#pragma omp parallel for schedule(static) if (n * half > 1 << 12)
  for (int64_t i = 0; i < n; i++) {
    const double position = tp == HALO_I64 ? (double)((const int64_t *)positions)[i]
                                           : (double)((const int32_t *)positions)[i];
    for (int64_t j = 0; j < half; j++) {
      const double f =
          tf == HALO_F64 ? ((const double *)inv_freq)[j] : ((const float *)inv_freq)[j];
      const double angle = exact ? position * f : (double)((float)position * (float)f);
      cos_out[i * half + j] = STORE((acc)(scale * cos(angle)));
      sin_out[i * half + j] = STORE((acc)(scale * sin(angle)));
    }
  }
  return HALO_OK;
}

static void REAL(rotate)(real *restrict y, const real *restrict x, const acc *restrict c,
                         const acc *restrict s, int64_t size, int64_t half, acc sign) {
  for (int64_t j = 0; j < half; j++) {
    const acc a = LOAD(x[j]), b = LOAD(x[j + half]);
    y[j] = STORE(a * c[j] - sign * (b * s[j]));
    y[j + half] = STORE(b * c[j] + sign * (a * s[j]));
  }
  for (int64_t j = 2 * half; j < size; j++) y[j] = x[j];
}

/* stride[3]: elements between batches, tokens and heads of x; table_stride: between batches of the
 * table, 0 when all share one. */
static halo_status REAL(rope)(real *restrict y, const real *restrict x, const int64_t *stride,
                              const acc *restrict cos_table, const acc *restrict sin_table,
                              int64_t table_stride, int64_t batch, int64_t tokens, int64_t heads,
                              int64_t size, int64_t half, double sign) {
#pragma omp parallel for collapse(2) schedule(static) if (batch * tokens * heads * size > 1 << 14)
  for (int64_t b = 0; b < batch; b++) {
    for (int64_t p = 0; p < tokens; p++) {
      const int64_t row = b * table_stride + p * half;
      for (int64_t h = 0; h < heads; h++) {
        REAL(rotate)(y + ((b * tokens + p) * heads + h) * size,
                     x + b * stride[0] + p * stride[1] + h * stride[2], cos_table + row,
                     sin_table + row, size, half, (acc)sign);
      }
    }
  }
  return HALO_OK;
}

#endif
