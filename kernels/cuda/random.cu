/* random: normal and uniform numbers from counters.
 *
 *   uniform  lo + (hi - lo) * u,  u from 53 bits of counter i
 *   normal   Box and Muller (1958): pair i/2 gives sqrt(-2 ln u1) * cos, sin(2 pi u2)
 *
 * numbers   made in fp64 like the CPU's, from the same bits (philox.h): uniform numbers are equal to
 *           theirs, normal ones up to the last bits of log, sin and cos in fp64
 * launch    one thread for each pair of normals: the costly part serves both
 * twin      kernels/cpu/random.c
 */
#include "philox.h"
#include "vector.cuh"

namespace {

using namespace halo;

constexpr int THREADS = 256;

/* Pair k of the call lies at elements 2k - skip and 2k - skip + 1; skip is 1 when `first` is odd. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    normal_kernel(T *__restrict__ y, int64_t n, uint64_t seed, uint64_t stream, uint64_t first_pair, int skip,
                  int64_t pairs, double mean, double std) {
  const int64_t step = (int64_t)gridDim.x * THREADS;
  for (int64_t k = (int64_t)blockIdx.x * THREADS + threadIdx.x; k < pairs; k += step) {
    uint32_t r[4];
    halo__philox(seed, stream, first_pair + (uint64_t)k, r);
    const double u1 = 1.0 - halo__philox_unit(r[0], r[1]); // in (0,1]
    const double angle = 6.283185307179586 * halo__philox_unit(r[2], r[3]);
    const double radius = sqrt(-2.0 * log(u1));
    double s, c;
    sincos(angle, &s, &c);
    const int64_t i = 2 * k - skip;
    if (i >= 0) y[i] = store<T>((acc_of<T>)fma(std, radius * c, mean));
    if (i + 1 < n) y[i + 1] = store<T>((acc_of<T>)fma(std, radius * s, mean));
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS) uniform_kernel(T *__restrict__ y, int64_t n, uint64_t seed,
                                                          uint64_t stream, uint64_t first, double lo,
                                                          double range) {
  const int64_t step = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += step) {
    uint32_t r[4];
    halo__philox(seed, stream, first + (uint64_t)i, r);
    y[i] = store<T>((acc_of<T>)fma(range, halo__philox_unit(r[0], r[1]), lo));
  }
}

} // namespace

halo_status halo_cuda_random_normal(halo_dtype t, void *y, int64_t n, uint64_t seed, uint64_t stream,
                                    int64_t first, double mean, double std) {
  if (n <= 0) return HALO_OK;
  const int skip = (int)(first & 1);
  const int64_t pairs = (n + skip + 1) / 2;
  HALO_REAL(t, T,
            normal_kernel<T><<<grid(pairs, THREADS), THREADS, 0, halo__cuda_stream()>>>(
                (T *)y, n, seed, stream, (uint64_t)first >> 1, skip, pairs, mean, std));
  HALO_LAUNCHED("random_normal");
  return HALO_OK;
}

halo_status halo_cuda_random_uniform(halo_dtype t, void *y, int64_t n, uint64_t seed, uint64_t stream,
                                     int64_t first, double lo, double hi) {
  if (n <= 0) return HALO_OK;
  HALO_REAL(t, T,
            uniform_kernel<T><<<grid(n, THREADS), THREADS, 0, halo__cuda_stream()>>>(
                (T *)y, n, seed, stream, (uint64_t)first, lo, hi - lo));
  HALO_LAUNCHED("random_uniform");
  return HALO_OK;
}
