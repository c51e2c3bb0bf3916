/* each_real.h: compile one kernel source once per real type, the way FFTW does.
 *
 * A kernel file is written for a storage type `real` and an arithmetic type `acc`:
 *
 *   #define HALO_EACH_REAL_FILE "cpu/rmsnorm.c"
 *   #ifndef HALO_REAL_PASS
 *   #include "cpu/each_real.h"               // includes the file three times
 *   halo_status halo_cpu_rmsnorm_fwd(halo_dtype t, ...) {
 *     HALO_REAL_SWITCH(t, rmsnorm_fwd, (y, x, w, rows, cols, eps));
 *   }
 *   #else
 *   static halo_status REAL(rmsnorm_fwd)(real *y, const real *x, ...) { acc a = LOAD(x[i]); ... }
 *   #endif
 *
 * LOAD widens storage to arithmetic, STORE narrows; for f32 and f64 both are the identity.
 * HALO_BF16 pairs storage bf16 with fp32 arithmetic.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/bf16.h"
#include "internal.h"
#include "kernels.h"

#define HALO_REAL_SWITCH(t, name, args)                                                   \
  switch (t) {                                                                            \
  case HALO_F32: return name##_f32 args;                                                  \
  case HALO_F64: return name##_f64 args;                                                  \
  case HALO_BF16: return name##_bf16 args;                                                \
  default: return halo__error(HALO_EARG, #name ": needs a floating dtype");               \
  }

#define HALO_REAL_PASS

#define real float
#define acc float
#define REAL(name) name##_f32
#define LOAD(x) (x)
#define STORE(x) (x)
#define REAL_IS_F32 1
#include HALO_EACH_REAL_FILE
#undef real
#undef acc
#undef REAL
#undef LOAD
#undef STORE
#undef REAL_IS_F32

#define real double
#define acc double
#define REAL(name) name##_f64
#define LOAD(x) (x)
#define STORE(x) (x)
#define REAL_IS_F64 1
#include HALO_EACH_REAL_FILE
#undef real
#undef acc
#undef REAL
#undef LOAD
#undef STORE
#undef REAL_IS_F64

#define real uint16_t
#define acc float
#define REAL(name) name##_bf16
#define LOAD(x) halo__bf16_load(x)
#define STORE(x) halo__bf16_store(x)
#define REAL_IS_BF16 1
#include HALO_EACH_REAL_FILE
#undef real
#undef acc
#undef REAL
#undef LOAD
#undef STORE
#undef REAL_IS_BF16

#undef HALO_REAL_PASS
