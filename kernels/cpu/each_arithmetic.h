/* each_arithmetic.h: compile one kernel source once per arithmetic type.
 *
 * The companion of each_real.h for kernels that work on runs in their arithmetic type (tile.h), so
 * that integers come along and bf16 needs no code of its own:
 *
 *   #define HALO_EACH_ARITHMETIC_FILE "cpu/reduce.c"
 *   #ifndef HALO_ARITHMETIC_PASS
 *   #include "cpu/each_arithmetic.h"         // includes the file three times
 *   halo_status halo_cpu_sum(halo_dtype t, ...) { switch (arithmetic_of(t)) ... sum_f32(...) }
 *   #else
 *   static void ACC(sum)(acc *y, const acc *x, ...) { ... }
 *   #endif
 *
 * `acc` is float, double or int64_t; IS_REAL is 1 for the first two, which also have the functions in
 * capitals of elementwise.def; IS_NAN is 0 for integers. fp32 EXP, SIGMOID and TANH are the vectorised ones of vmath.h.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/tile.h"
#include "cpu/vmath.h"
#include "internal.h"
#include "kernels.h"

#define HALO_ARITHMETIC_PASS
#define EXP(x) HALO__EXP(x)
#define SIGMOID(x) HALO__SIGMOID(x)
#define TANH(x) HALO__TANH(x)
#define IS_REAL 1
#define IS_NAN(x) ((x) != (x))

#define acc float
#define ACC(name) name##_f32
#define LOG(x) logf(x)
#define LOG1P(x) log1pf(x)
#define SQRT(x) sqrtf(x)
#define ERF(x) erff(x)
#define SIN(x) sinf(x)
#define COS(x) cosf(x)
#define POW(x, y) powf(x, y)
#define FLOOR(x) floorf(x)
#define CEIL(x) ceilf(x)
#define ROUND(x) rintf(x)
#include HALO_EACH_ARITHMETIC_FILE
#undef acc
#undef ACC
#undef LOG
#undef LOG1P
#undef SQRT
#undef ERF
#undef SIN
#undef COS
#undef POW
#undef FLOOR
#undef CEIL
#undef ROUND

#define acc double
#define ACC(name) name##_f64
#define LOG(x) log(x)
#define LOG1P(x) log1p(x)
#define SQRT(x) sqrt(x)
#define ERF(x) erf(x)
#define SIN(x) sin(x)
#define COS(x) cos(x)
#define POW(x, y) pow(x, y)
#define FLOOR(x) floor(x)
#define CEIL(x) ceil(x)
#define ROUND(x) rint(x)
#include HALO_EACH_ARITHMETIC_FILE
#undef acc
#undef ACC
#undef LOG
#undef LOG1P
#undef SQRT
#undef ERF
#undef SIN
#undef COS
#undef POW
#undef FLOOR
#undef CEIL
#undef ROUND
#undef IS_REAL
#undef IS_NAN

#define IS_REAL 0
#define IS_NAN(x) 0
#define acc int64_t
#define ACC(name) name##_i64
#include HALO_EACH_ARITHMETIC_FILE
#undef acc
#undef ACC
#undef IS_REAL
#undef IS_NAN

#undef HALO_ARITHMETIC_PASS
#undef EXP
#undef SIGMOID
#undef TANH
