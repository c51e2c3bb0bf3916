/* vmath.h: exp and the logistic function in a form that the compiler can vectorise.
 *
 *   exp(x) = 2^n * e^r,   n = round(x / ln 2),   r = x - n ln 2 in two fused steps (Cody and Waite)
 *   e^r    = 1 + r + r^2 q(r),  |r| <= ln(2)/2
 *
 * q has degree 4; its coefficients are a Chebyshev fit of (e^r - 1 - r)/r^2 on [-0.347, 0.347] made
 * for this file and rounded to fp32: the polynomial's relative error is 1.04e-8 (0.17 ulp), the
 * whole function's is below 1.5 * 2^-24 over the inputs (tests/c/test_nn.c sweeps it against libm).
 * Results below 2^-126 are flushed to 0, above FLT_MAX they are inf; NaN stays NaN, exp(-inf) = 0
 * and exp(0) = 1 exactly. The fused steps are written with fmaf, because -fassociative-math would
 * be free to undo x - n*hi - n*lo.
 *
 * Branch-free and always inlined: a call, or a select that gcc 12 turns into a branch by sinking
 * the arithmetic behind it, keeps the vectoriser out and costs a factor of ten. So underflow is a
 * mask of bits.
 *
 * fp64 is the definition that tests compare with, so it calls libm.
 */
#ifndef HALO_CPU_VMATH_H
#define HALO_CPU_VMATH_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define HALO__INLINE __attribute__((always_inline)) static inline

/* 0 where the condition holds, else v. */
HALO__INLINE float halo__zero_where(bool condition, float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  bits &= (uint32_t)condition - 1u;
  memcpy(&v, &bits, 4);
  return v;
}

HALO__INLINE float halo__exp_f32(float x) {
  const float lowest = -87.33654f; /* ln 2^-126 */
  float y = x < lowest ? lowest : x;
  y = y > 89.0f ? 89.0f : y; /* e^89 overflows by itself */
  const float n = rintf(y * 1.44269504f);
  float r = fmaf(n, -0.693359375f, y); /* ln 2 rounded up to 9 bits: n * it is exact */
  r = fmaf(n, 2.12194440e-4f, r);      /* the rest of it */
  float q = fmaf(1.392625039e-03f, r, 8.363232948e-03f);
  q = fmaf(q, r, 4.166655242e-02f);
  q = fmaf(q, r, 1.666657627e-01f);
  q = fmaf(q, r, 0.5f);
  const float e = fmaf(q, r * r, r) + 1.0f;
  // 2^n may be 2^128, which has no fp32: apply half of it, twice.
  const int32_t half = (int32_t)n >> 1;
  const uint32_t low = (uint32_t)(half + 127) << 23;
  const uint32_t high = (uint32_t)((int32_t)n - half + 127) << 23;
  float a, b;
  memcpy(&a, &low, 4);
  memcpy(&b, &high, 4);
  return halo__zero_where(x < lowest, e * a * b);
}

/* 2^x for x <= 127, for softmax in base 2: no reduction step is needed, x - round(x) is exact. The
 * polynomial 1 + r g(r) has a Chebyshev fit of g = (2^r - 1)/r on [-0.5, 0.5], relative error
 * 9.2e-9 (0.16 ulp); results below 2^-126 are 0, and exp2(0) = 1 exactly. */
HALO__INLINE float halo__exp2_f32(float x) {
  const float y = x < -126.0f ? -126.0f : x;
  const float n = rintf(y);
  const float r = y - n;
  float q = fmaf(1.545316336e-04f, r, 1.339086331e-03f);
  q = fmaf(q, r, 9.618083015e-03f);
  q = fmaf(q, r, 5.550356954e-02f);
  q = fmaf(q, r, 2.402265072e-01f);
  q = fmaf(q, r, 6.931471825e-01f);
  q = fmaf(q, r, 1.0f);
  const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return halo__zero_where(x < -126.0f, q * power);
}

#define HALO__EXP2(x) _Generic((x), float: halo__exp2_f32, double: exp2)(x)

#define HALO__EXP(x) _Generic((x), float: halo__exp_f32, double: exp)(x)

/* tanh: an odd polynomial below 0.625 (Cephes tanhf, Moshier 1989), 1 - 2/(e^2|x| + 1) above; NaN stays
 * NaN, +-inf gives +-1. Within 2 ulp of libm over all floats (measured, tests/c/test_ops.c). */
HALO__INLINE float halo__tanh_f32(float x) {
  const float z = x * x;
  float p = fmaf(-5.70498872745e-3f, z, 2.06390887954e-2f);
  p = fmaf(p, z, -5.37397155531e-2f);
  p = fmaf(p, z, 1.33314422036e-1f);
  p = fmaf(p, z, -3.33332819422e-1f);
  const float small = fmaf(p * z, x, x);
  const float a = x < 0 ? -x : x;
  const float big = 1.0f - 2.0f / (halo__exp_f32(2.0f * a) + 1.0f);
  const float signed_big = x < 0 ? -big : big;
  return a < 0.625f ? small : signed_big;
}

#define HALO__TANH(x) _Generic((x), float: halo__tanh_f32, double: tanh)(x)

#define HALO__SQRT(x) _Generic((x), float: sqrtf, double: sqrt)(x)

/* 1 / (1 + e^-x): saturates to 0 and 1 without overflow trouble, since 1/inf = 0. */
#define HALO__SIGMOID(x) (1 / (1 + HALO__EXP(-(x))))

#endif
