/* swiglu: gated feed-forward activation (Shazeer 2020, arXiv 2002.05202).
 *
 *   y = silu(g) u,  silu(g) = g s,  s = 1 / (1 + e^-g)
 *   du = dy silu(g)        dg = dy u s (1 + g (1 - s))
 *
 * shapes    y, dy [rows,cols] contiguous; g, u, dg, du [rows,cols] with rows ld elements apart
 * gradient  dg and du are written (either may be NULL, and may be g and u themselves); s is computed
 *           again, not stored
 * numbers   bf16: e^x and 1/x of the hardware, 2 ulp of fp32 each; fp32 and fp64: libm
 * launch    one pack per operand and item, 2 items a thread: 4 (forward) and 6 loads in flight
 * twin      kernels/cpu/swiglu.c
 */
#include "vector.cuh"

namespace {

using namespace halo;

constexpr int THREADS = 256, ITEMS = 2;

/* Rows and their strides; a pack index is row * by.d + column. */
struct layout {
  uint32_t packs;
  divider by;
  int64_t ldg, ldu, lddg, lddu;
};

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    forward(T *__restrict__ y, const T *__restrict__ g, const T *__restrict__ u, const layout l) {
  using A = acc_of<T>;
  const uint32_t base = blockIdx.x * THREADS * ITEMS + threadIdx.x;
  few<T, N> gp[ITEMS], up[ITEMS];
#pragma unroll
  for (int j = 0; j < ITEMS; j++) {
    const uint32_t i = base + j * THREADS;
    if (i >= l.packs) continue;
    const uint32_t row = l.by.quotient(i), c = (i - row * l.by.d) * N;
    gp[j] = fetch<T, N>(g + row * l.ldg + c);
    up[j] = fetch<T, N>(u + row * l.ldu + c);
  }
#pragma unroll
  for (int j = 0; j < ITEMS; j++) {
    const uint32_t i = base + j * THREADS;
    if (i >= l.packs) continue;
    A gv[N], uv[N];
    widen(gv, gp[j]);
    widen(uv, up[j]);
#pragma unroll
    for (int k = 0; k < N; k++) gv[k] = gv[k] * sigmoid_of<T>(gv[k]) * uv[k];
    put<T, N>(y + (int64_t)i * N, narrow<T, N>(gv));
  }
}

/* No restrict: dg and du may be g and u. */
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    backward(T *dg, T *du, const T *__restrict__ dy, const T *g, const T *u, const layout l) {
  using A = acc_of<T>;
  const uint32_t base = blockIdx.x * THREADS * ITEMS + threadIdx.x;
  few<T, N> gp[ITEMS], up[ITEMS], dp[ITEMS];
#pragma unroll
  for (int j = 0; j < ITEMS; j++) {
    const uint32_t i = base + j * THREADS;
    if (i >= l.packs) continue;
    const uint32_t row = l.by.quotient(i), c = (i - row * l.by.d) * N;
    gp[j] = fetch<T, N>(g + row * l.ldg + c);
    up[j] = fetch<T, N>(u + row * l.ldu + c);
    dp[j] = fetch<T, N>(dy + (int64_t)i * N);
  }
#pragma unroll
  for (int j = 0; j < ITEMS; j++) {
    const uint32_t i = base + j * THREADS;
    if (i >= l.packs) continue;
    const uint32_t row = l.by.quotient(i), c = (i - row * l.by.d) * N;
    A gv[N], uv[N], dv[N];
    widen(gv, gp[j]);
    widen(uv, up[j]);
    widen(dv, dp[j]);
#pragma unroll
    for (int k = 0; k < N; k++) {
      const A s = sigmoid_of<T>(gv[k]);
      const A to_g = dv[k] * uv[k] * s * (1 + gv[k] * (1 - s));
      uv[k] = dv[k] * gv[k] * s;
      gv[k] = to_g;
    }
    if (dg != nullptr) put<T, N>(dg + row * l.lddg + c, narrow<T, N>(gv));
    if (du != nullptr) put<T, N>(du + row * l.lddu + c, narrow<T, N>(uv));
  }
}

/* In runs of rows whose packs a divider can count. */
template <class T, int N>
halo_status run_forward(T *y, const T *g, int64_t ldg, const T *u, int64_t ldu, int64_t rows, int64_t cols) {
  const int64_t packs = cols / N;
  int64_t most = 0;
  HALO_TRY(rows_at_once(&most, packs));
  for (int64_t r = 0; r < rows; r += most) {
    const int64_t n = (rows - r < most ? rows - r : most) * packs;
    const layout l = {(uint32_t)n, divider((uint32_t)packs), ldg, ldu, 0, 0};
    forward<T, N><<<blocks_for(n, THREADS * ITEMS), THREADS, 0, halo__cuda_stream()>>>(y + r * cols, g + r * ldg,
                                                                                       u + r * ldu, l);
    HALO_LAUNCHED("swiglu_fwd");
  }
  return HALO_OK;
}

template <class T, int N>
halo_status run_backward(T *dg, int64_t lddg, T *du, int64_t lddu, const T *dy, const T *g, int64_t ldg,
                         const T *u, int64_t ldu, int64_t rows, int64_t cols) {
  const int64_t packs = cols / N;
  int64_t most = 0;
  HALO_TRY(rows_at_once(&most, packs));
  for (int64_t r = 0; r < rows; r += most) {
    const int64_t n = (rows - r < most ? rows - r : most) * packs;
    const layout l = {(uint32_t)n, divider((uint32_t)packs), ldg, ldu, lddg, lddu};
    backward<T, N><<<blocks_for(n, THREADS * ITEMS), THREADS, 0, halo__cuda_stream()>>>(
        dg != nullptr ? dg + r * lddg : nullptr, du != nullptr ? du + r * lddu : nullptr, dy + r * cols,
        g + r * ldg, u + r * ldu, l);
    HALO_LAUNCHED("swiglu_bwd");
  }
  return HALO_OK;
}

} // namespace

halo_status halo_cuda_swiglu_fwd(halo_dtype t, void *y, const void *g, int64_t ldg, const void *u, int64_t ldu,
                                 int64_t rows, int64_t cols) {
  if (rows <= 0 || cols <= 0) return HALO_OK;
  HALO_REAL(t, T, {
    constexpr int N = lanes16<T>;
    const bool is_wide = multiples(N, {cols, ldg, ldu}) && aligned(16, {y, g, u});
    return is_wide ? (run_forward<T, N>((T *)y, (const T *)g, ldg, (const T *)u, ldu, rows, cols))
                   : (run_forward<T, 1>((T *)y, (const T *)g, ldg, (const T *)u, ldu, rows, cols));
  });
  return HALO_OK;
}

halo_status halo_cuda_swiglu_bwd(halo_dtype t, void *dg, int64_t lddg, void *du, int64_t lddu, const void *dy,
                                 const void *g, int64_t ldg, const void *u, int64_t ldu, int64_t rows,
                                 int64_t cols) {
  if (rows <= 0 || cols <= 0) return HALO_OK;
  HALO_REAL(t, T, {
    constexpr int N = lanes16<T>;
    const bool is_wide = multiples(N, {cols, ldg, ldu, lddg, lddu}) && aligned(16, {dg, du, dy, g, u});
    return is_wide ? (run_backward<T, N>((T *)dg, lddg, (T *)du, lddu, (const T *)dy, (const T *)g, ldg,
                                         (const T *)u, ldu, rows, cols))
                   : (run_backward<T, 1>((T *)dg, lddg, (T *)du, lddu, (const T *)dy, (const T *)g, ldg,
                                         (const T *)u, ldu, rows, cols));
  });
  return HALO_OK;
}
