/* random.c: normal and uniform numbers from counters.
 *
 *   uniform  lo + (hi - lo) * u,  u from 53 bits of counter i
 *   normal   Box and Muller (1958): pair i/2 gives sqrt(-2 ln u1) * cos, sin(2 pi u2); even elements
 *            take the cosine, odd ones the sine
 *
 * Values are made in fp64 and rounded to the storage type, so fp32 and fp64 models start alike.
 */
#define HALO_EACH_REAL_FILE "cpu/random.c"
#ifndef HALO_REAL_PASS
#include <math.h>

#include "philox.h"

static double normal_at(uint64_t seed, uint64_t stream, uint64_t i) {
  uint32_t r[4];
  halo__philox(seed, stream, i >> 1, r);
  const double u1 = 1.0 - halo__philox_unit(r[0], r[1]); // in (0,1]
  const double angle = 6.283185307179586 * halo__philox_unit(r[2], r[3]);
  const double radius = sqrt(-2.0 * log(u1));
  return (i & 1) ? radius * sin(angle) : radius * cos(angle);
}

static double uniform_at(uint64_t seed, uint64_t stream, uint64_t i) {
  uint32_t r[4];
  halo__philox(seed, stream, i, r);
  return halo__philox_unit(r[0], r[1]);
}

#include "cpu/each_real.h"

halo_status halo_cpu_random_normal(halo_dtype t, void *y, int64_t n, uint64_t seed,
                                   uint64_t stream, int64_t first, double mean, double std) {
  HALO_REAL_SWITCH(t, random_normal, (y, n, seed, stream, first, mean, std));
}

halo_status halo_cpu_random_uniform(halo_dtype t, void *y, int64_t n, uint64_t seed,
                                    uint64_t stream, int64_t first, double lo, double hi) {
  HALO_REAL_SWITCH(t, random_uniform, (y, n, seed, stream, first, lo, hi));
}
#else

static halo_status REAL(random_normal)(real *y, int64_t n, uint64_t seed, uint64_t stream,
                                       int64_t first, double mean, double std) {
#pragma omp parallel for if (n > 4096)
  for (int64_t i = 0; i < n; i++) {
    y[i] = STORE((acc)(mean + std * normal_at(seed, stream, (uint64_t)(first + i))));
  }
  return HALO_OK;
}

static halo_status REAL(random_uniform)(real *y, int64_t n, uint64_t seed, uint64_t stream,
                                        int64_t first, double lo, double hi) {
#pragma omp parallel for if (n > 4096)
  for (int64_t i = 0; i < n; i++) {
    y[i] = STORE((acc)(lo + (hi - lo) * uniform_at(seed, stream, (uint64_t)(first + i))));
  }
  return HALO_OK;
}
#endif
