/* mask: triangles of matrices, and dropout.
 *
 *   triangle  y[o,r,c] = x[o,r,c] where c <= r + diagonal (lower) or c >= r + diagonal (upper), else 0
 *   dropout   y_i = x_i / (1 - p) where u_i >= p, else 0; u_i from 32 bits of counter i of (seed, stream)
 *
 * Both are linear with a mask that can be made again, so they are their own gradients. A thread owns 16
 * bytes of the result; what a triangle hides is not read.
 * numbers   dropout keeps and drops the very elements that the CPU does: philox.h
 * twin      kernels/cpu/mask.c
 */
#include "numbers.cuh"
#include "philox.h"
#include "strided.cuh"

namespace {

using namespace halo;

enum { THREADS = 256 };

template <class T>
__global__ void __launch_bounds__(THREADS)
    triangle_kernel(T *y, const T *x, int64_t count, divider by_cols, divider by_rows, int64_t diagonal,
                    bool is_upper, bool is_aligned) {
  constexpr int V = lanes16<T>;
  const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
  if (i >= count) return;
  int64_t row = by_cols.of(i), c = i - row * by_cols.d, r = row - by_rows.of(row) * by_rows.d;
  bool keeps[V], any = false;
#pragma unroll
  for (int e = 0; e < V; e++) {
    keeps[e] = i + e < count && (is_upper ? c >= r + diagonal : c <= r + diagonal);
    any = any || keeps[e];
    if (++c == by_cols.d) {
      c = 0;
      if (++r == by_rows.d) r = 0;
    }
  }
  pack<T, V> run;
  if (is_aligned && i + V <= count) {
    if (any) run = *(const pack<T, V> *)(x + i);
#pragma unroll
    for (int e = 0; e < V; e++) run.at[e] = keeps[e] ? run.at[e] : (T)0;
    *(pack<T, V> *)(y + i) = run;
  } else {
#pragma unroll
    for (int e = 0; e < V; e++) {
      if (i + e < count) y[i + e] = keeps[e] ? x[i + e] : (T)0;
    }
  }
}

template <class T>
halo_status triangle(void *y, const void *x, int64_t outer, int64_t rows, int64_t cols, int64_t diagonal,
                     bool is_upper) {
  const int64_t count = outer * rows * cols;
  if (count <= 0) return HALO_OK;
  const bool is_wide = count >= (int64_t)1 << 31;
  unsigned blocks = 0;
  HALO_TRY(blocks_of(&blocks, count, THREADS * lanes16<T>));
  triangle_kernel<T><<<blocks, THREADS, 0, halo__cuda_stream()>>>(
      (T *)y, (const T *)x, count, divider(cols, is_wide), divider(rows, is_wide), diagonal, is_upper,
      is_multiple(y, 16) && is_multiple(x, 16));
  HALO_LAUNCHED("triangle");
  return HALO_OK;
}

/* Eight elements per thread: two counters, of which every number is used. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    dropout_kernel(T *y, const T *x, int64_t n, uint32_t threshold, acc_of<T> scale, uint64_t seed,
                   uint64_t stream, bool is_aligned) {
  constexpr int V = lanes16<T>, E = 8;
  const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * E;
  if (i >= n) return;
  const bool is_whole = is_aligned && i + E <= n;
  T in[E];
  if (is_whole) {
#pragma unroll
    for (int k = 0; k < E; k += V) {
      const pack<T, V> run = *(const pack<T, V> *)(x + i + k);
#pragma unroll
      for (int e = 0; e < V; e++) in[k + e] = run.at[e];
    }
  } else {
#pragma unroll
    for (int e = 0; e < E; e++) in[e] = x[i + e < n ? i + e : i];
  }
#pragma unroll
  for (int k = 0; k < E; k += 4) {
    uint32_t u[4];
    halo__philox(seed, stream, (uint64_t)(i + k) / 4, u);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      // A product also where it drops: 0 times inf is NaN on the CPU, too.
      in[k + e] = store<T>(load(in[k + e]) * (u[e] >= threshold ? scale : (acc_of<T>)0));
    }
  }
  if (is_whole) {
#pragma unroll
    for (int k = 0; k < E; k += V) {
      pack<T, V> run;
#pragma unroll
      for (int e = 0; e < V; e++) run.at[e] = in[k + e];
      *(pack<T, V> *)(y + i + k) = run;
    }
  } else {
#pragma unroll
    for (int e = 0; e < E; e++) {
      if (i + e < n) y[i + e] = in[e];
    }
  }
}

template <class T>
halo_status dropout(void *y, const void *x, int64_t n, double p, uint64_t seed, uint64_t stream) {
  if (n <= 0) return HALO_OK;
  // With p = 1 the scale is 0 as well, so that the one number beyond 32 bits does not matter.
  const uint64_t threshold = (uint64_t)(p * 4294967296.0);
  const double scale = p < 1 ? 1 / (1 - p) : 0;
  unsigned blocks = 0;
  HALO_TRY(blocks_of(&blocks, n, THREADS * 8));
  dropout_kernel<T><<<blocks, THREADS, 0, halo__cuda_stream()>>>(
      (T *)y, (const T *)x, n, threshold > UINT32_MAX ? UINT32_MAX : (uint32_t)threshold, (acc_of<T>)scale,
      seed, stream, is_multiple(y, 16) && is_multiple(x, 16));
  HALO_LAUNCHED("dropout");
  return HALO_OK;
}

} // namespace

halo_status halo_cuda_triangle(int64_t bytes, void *y, const void *x, int64_t outer, int64_t rows,
                               int64_t cols, int64_t diagonal, int32_t is_upper) {
  HALO_BITS(bytes, T, return triangle<T>(y, x, outer, rows, cols, diagonal, is_upper != 0));
  return HALO_OK;
}

halo_status halo_cuda_dropout(halo_dtype t, void *y, const void *x, int64_t n, double p, uint64_t seed,
                              uint64_t stream) {
  HALO_REAL(t, T, return dropout<T>(y, x, n, p, seed, stream));
  return HALO_OK;
}
