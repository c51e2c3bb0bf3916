/* strided.cuh: walking strided operands of one shape in the order of a contiguous result.
 *
 * The host drops dims of one element and merges neighbours that lie as one in every operand, so most
 * calls end with one or two dims. A thread owns V consecutive elements of the result. How it reads
 * them from an operand is settled once per launch:
 *
 *   RUN    the innermost stride is 1 and everything is a multiple of V: one access of V elements
 *   SPLAT  the innermost stride is 0: one element for all V
 *   STEP   another stride, rows still a multiple of V: V accesses from one place
 *   WALK   rows are no multiple of V: the place is found again where a row ends
 *
 * Division by a size is a multiplication and a shift while the result has fewer than 2^31 elements
 * (Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI 1994, section
 * 4); larger results take 64-bit divisions, one per dim but the last and per V elements.
 */
#ifndef HALO_CUDA_STRIDED_CUH
#define HALO_CUDA_STRIDED_CUH

#include "cuda.cuh"

namespace halo {

/* n / d for d > 0, any int64_t n >= 0; quick while n < 2^31. */
struct divider {
  int64_t d;
  uint32_t magic, shift;
  int32_t is_wide;

  divider() = default;
  divider(int64_t by, bool wide) : d(by), magic(0), shift(0), is_wide(wide || by >= (int64_t)1 << 31) {
    if (is_wide) return;
    while (((uint64_t)1 << shift) < (uint64_t)d) shift++;
    magic = (uint32_t)((((uint64_t)1 << 32) * (((uint64_t)1 << shift) - (uint64_t)d)) / (uint64_t)d + 1);
  }
  __device__ __forceinline__ int64_t of(int64_t n) const {
    if (is_wide) return n / d;
    return (int64_t)((__umulhi(magic, (uint32_t)n) + (uint32_t)n) >> shift);
  }
};

enum read_mode { READ_RUN, READ_SPLAT, READ_STEP, READ_WALK };

/* Dim 0 is the innermost here. */
template <int N> struct walk {
  int32_t ndim;
  int64_t n, row;
  divider by[HALO_MAX_DIMS];
  int64_t stride[N][HALO_MAX_DIMS];
  read_mode mode[N];
};

/* Bit pattern of the low end of an address or size: shows what it is a multiple of. */
inline bool is_multiple(const void *p, int64_t bytes) { return (uintptr_t)p % (uintptr_t)bytes == 0; }

/* `bytes[k]` is the size of an element of operand k at p[k]; v elements of the result per thread. */
template <int N>
walk<N> make_walk(int32_t ndim, const int64_t *shape, const int64_t *const (&stride)[N],
                  const void *const (&p)[N], const int64_t (&bytes)[N], int v) {
  walk<N> w = {};
  int64_t size[HALO_MAX_DIMS];
  w.n = 1;
  for (int32_t d = ndim - 1; d >= 0; d--) {
    w.n *= shape[d];
    if (shape[d] == 1) continue;
    bool joins = w.ndim > 0;
    for (int k = 0; k < N && joins; k++) {
      joins = stride[k][d] == w.stride[k][w.ndim - 1] * size[w.ndim - 1];
    }
    if (joins) {
      size[w.ndim - 1] *= shape[d];
      continue;
    }
    size[w.ndim] = shape[d];
    for (int k = 0; k < N; k++) w.stride[k][w.ndim] = stride[k][d];
    w.ndim++;
  }
  if (w.ndim == 0) size[w.ndim++] = 1;
  w.row = size[0];
  for (int32_t d = 0; d < w.ndim; d++) w.by[d] = divider(size[d] > 0 ? size[d] : 1, w.n >= (int64_t)1 << 31);
  for (int k = 0; k < N; k++) {
    bool fits = is_multiple(p[k], v * bytes[k]);
    for (int32_t d = 1; d < w.ndim; d++) fits = fits && w.stride[k][d] % v == 0;
    w.mode[k] = w.row % v != 0                ? READ_WALK
                : w.stride[k][0] == 0         ? READ_SPLAT
                : w.stride[k][0] == 1 && fits ? READ_RUN
                                              : READ_STEP;
  }
  return w;
}

/* Offsets of element i in every operand; returns its place along the innermost dim. */
template <int N>
__device__ __forceinline__ int64_t locate(const walk<N> &w, int64_t i, int64_t (&offset)[N]) {
  int64_t rest = i, inner = i;
#pragma unroll
  for (int k = 0; k < N; k++) offset[k] = 0;
#pragma unroll 1 // unrolled, and V times where rows end, it would be most of all code
  for (int32_t d = 0; d < w.ndim; d++) {
    int64_t at = rest;
    if (d + 1 < w.ndim) {
      rest = w.by[d].of(rest);
      at -= rest * w.by[d].d;
    }
    if (d == 0) inner = at;
#pragma unroll
    for (int k = 0; k < N; k++) offset[k] += at * w.stride[k][d];
  }
  return inner;
}

/* in[e] <- operand k at V elements from i on, which lie at `offset` and `inner` along the row. Elements
 * from w.n on repeat the last one. */
template <int N, int V, class T>
__device__ __forceinline__ void read_elements(T (&in)[V], const T *x, const walk<N> &w, int k, int64_t i,
                                              int64_t offset, int64_t inner) {
  const int64_t step = w.stride[k][0];
  if (w.mode[k] == READ_RUN) {
    const pack<T, V> run = *(const pack<T, V> *)(x + offset);
#pragma unroll
    for (int e = 0; e < V; e++) in[e] = run.at[e];
  } else if (w.mode[k] == READ_SPLAT) {
    const T one = x[offset];
#pragma unroll
    for (int e = 0; e < V; e++) in[e] = one;
  } else if (w.mode[k] == READ_STEP) {
#pragma unroll
    for (int e = 0; e < V; e++) in[e] = x[offset + e * step];
  } else {
#pragma unroll
    for (int e = 0; e < V; e++) {
      if (e > 0 && i + e < w.n) {
        offset += step;
        if (++inner == w.row) {
          int64_t again[N];
          inner = locate(w, i + e, again);
          offset = again[k];
        }
      }
      in[e] = x[offset];
    }
  }
}

/* One launch of exactly the blocks that n items need. */
inline halo_status blocks_of(unsigned *out, int64_t n, int64_t per_block) {
  const int64_t blocks = (n + per_block - 1) / per_block;
  HALO_CHECK(blocks < (int64_t)1 << 31, HALO_EUNSUPPORTED,
             "cuda: %lld elements are more than one launch holds", (long long)n);
  *out = (unsigned)blocks;
  return HALO_OK;
}

} // namespace halo
#endif
