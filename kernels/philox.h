/* philox.h: Philox 4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw,
 * "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Plain C, also for device code.
 *
 * counter = (index low, index high, stream low, stream high), key = seed: any element of any stream
 * is a pure function of three numbers, so ranks and devices agree without talking.
 */
#ifndef HALO_PHILOX_H
#define HALO_PHILOX_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define HALO_PHILOX_FN static inline __host__ __device__
#else
#define HALO_PHILOX_FN static inline
#endif

HALO_PHILOX_FN void halo__philox(uint64_t seed, uint64_t stream, uint64_t index, uint32_t out[4]) {
  uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32);
  uint32_t c2 = (uint32_t)stream, c3 = (uint32_t)(stream >> 32);
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    const uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

/* bf16 of x, one of its two neighbours, up with the probability of the distance to the lower one: equal to
 * x in the mean, where rounding to nearest would lose a change below half a unit however often it comes.
 * Of `random` the low 16 bits count. */
HALO_PHILOX_FN uint16_t halo__bf16_stochastic(float x, uint32_t random) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) == 0x7f800000u) return (uint16_t)(bits >> 16 | ((bits & 0x7fffffu) != 0 ? 0x40u : 0u));
  return (uint16_t)((bits + (random & 0xffffu)) >> 16);
}

/* 53 random bits as a double in [0,1). */
HALO_PHILOX_FN double halo__philox_unit(uint32_t hi, uint32_t lo) {
  const uint64_t bits = ((uint64_t)hi << 32 | lo) >> 11;
  return (double)bits * (1.0 / 9007199254740992.0);
}

#endif
