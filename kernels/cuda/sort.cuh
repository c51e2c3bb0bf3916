/* sort.cuh: the one radix sort of the engine, for files that group things by number. */
#ifndef HALO_CUDA_SORT_CUH
#define HALO_CUDA_SORT_CUH

#include "cuda.cuh"

/* Pairs in order of the low `bits` bits of their key, equal keys in the order they came; n < 2^32. The
 * input arrays are scratch afterwards, the result is in the output arrays. */
halo_status halo__cuda_sort_pairs(uint64_t *key_out, uint32_t *item_out, const uint64_t *key,
                                  const uint32_t *item, int64_t n, int bits);

/* Bits that hold 0 .. n-1. */
inline int halo__bits_of(int64_t n) {
  int bits = 0;
  while (bits < 63 && (int64_t)1 << bits < n) bits++;
  return bits;
}
#endif
