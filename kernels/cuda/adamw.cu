/* adamw: one fused pass of AdamW over one parameter (Loshchilov and Hutter, arXiv 1711.05101), and
 * the sum of squares that clipping needs.
 *
 *   g' = s g          m = b1 m + (1 - b1) g'        v = b2 v + (1 - b2) g'^2
 *   p  = p - lr wd p - (lr / (1 - b1^k)) m / (sqrt(v / (1 - b2^k)) + eps)
 *
 * shapes    p [n] storage dtype; master [n] in the arithmetic type, or NULL when p is its own master;
 *           g [n] in the arithmetic type; m, v [n] likewise, or in bf16 rounded stochastically with the
 *           CPU's random words (its file says why)
 * work      bf16 with master: reads g, m, v, master, writes m, v, master, p: 30 bytes a parameter, 22 with
 *           moments in bf16
 * launch    16 bytes of each operand a thread: four loads in flight, three stores of 16 bytes
 * sum       sum_squares: one fp64 partial sum a block, whose share depends on n alone; the last
 *           kernel adds them in order. The CPU cuts the same way, but its blocks add in another order
 * twin      kernels/cpu/adamw.c
 */
#include <math.h>

#include "philox.h"
#include "vector.cuh"

namespace {

using namespace halo;

constexpr int THREADS = 256;

template <class A> struct constants {
  A b1, rest1, b2, rest2, eps, grad_scale, keep, rate, inverse;
};

template <class A>
__device__ __forceinline__ void step_one(A &p, A &m, A &v, A g, const constants<A> &s) {
  g *= s.grad_scale;
  m = s.b1 * m + s.rest1 * g;
  v = s.b2 * v + s.rest2 * g * g;
  p = p * s.keep - s.rate * m / (sqrt(v) * s.inverse + s.eps);
}

/* A moment becomes TM; `words` are the random words of the N elements, `shift` chooses their half. */
template <class TM, class A, int N>
__device__ __forceinline__ few<TM, N> round_moments(const A (&x)[N], const uint32_t (&words)[4], int first,
                                                    int shift) {
  if constexpr (std::is_same<TM, A>::value) {
    return narrow<TM, N>(x);
  } else {
    uint16_t y[N];
#pragma unroll
    for (int k = 0; k < N; k++) y[k] = halo__bf16_stochastic(x[k], words[(first + k) % 4] >> shift);
    few<TM, N> out;
    memcpy(&out, y, sizeof y);
    return out;
  }
}

/* Elements i * N .. i * N + N; N is 1 or a multiple of the 4 elements that share a Philox block's words. */
template <class T, class TM, int N, bool HAS_MASTER>
__device__ __forceinline__ void step_pack(T *p, acc_of<T> *master, const acc_of<T> *g, TM *m, TM *v, int64_t i,
                                          const constants<acc_of<T>> &s, uint64_t seed, uint64_t stream) {
  using A = acc_of<T>;
  const few<TM, N> mp = fetch<TM, N>(m + i * N), vp = fetch<TM, N>(v + i * N);
  A gv[N], mv[N], vv[N], weight[N];
  widen(gv, fetch<A, N>(g + i * N));
  if constexpr (HAS_MASTER) {
    widen(weight, fetch<A, N>(master + i * N));
  } else {
    widen(weight, fetch<T, N>(p + i * N));
  }
  uint32_t words[4] = {};
  if constexpr (!std::is_same<TM, A>::value) halo__philox(seed, stream, (uint64_t)(i * N) / 4, words);
#pragma unroll
  for (int k = 0; k < N; k++) {
    mv[k] = (A)value(mp, k);
    vv[k] = (A)value(vp, k);
    step_one(weight[k], mv[k], vv[k], gv[k], s);
  }
  const int first = N == 1 ? (int)(i % 4) : 0;
  put<TM, N>(m + i * N, round_moments<TM, A, N>(mv, words, first, 0));
  put<TM, N>(v + i * N, round_moments<TM, A, N>(vv, words, first, 16));
  if constexpr (HAS_MASTER) put<A, N>(master + i * N, narrow<A, N>(weight));
  put<T, N>(p + i * N, narrow<T, N>(weight));
}

template <class T, class TM, int N, bool HAS_MASTER>
__global__ void __launch_bounds__(THREADS)
    step_kernel(T *__restrict__ p, acc_of<T> *__restrict__ master, const acc_of<T> *__restrict__ g,
                TM *__restrict__ m, TM *__restrict__ v, int64_t n,
                const __grid_constant__ constants<acc_of<T>> s, uint64_t seed, uint64_t stream) {
  const int64_t packs = n / N, i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i < packs) step_pack<T, TM, N, HAS_MASTER>(p, master, g, m, v, i, s, seed, stream);
  const int64_t tail = packs * N + threadIdx.x;
  if (N > 1 && blockIdx.x == 0 && tail < n) {
    step_pack<T, TM, 1, HAS_MASTER>(p, master, g, m, v, tail, s, seed, stream);
  }
}

template <class T, class TM>
halo_status step(T *p, acc_of<T> *master, const acc_of<T> *g, TM *m, TM *v, int64_t n,
                 const halo_adamw_step_args *s) {
  using A = acc_of<T>;
  constexpr int N = lanes16<A>;
  constants<A> c;
  c.b1 = (A)s->beta1;
  c.rest1 = (A)(1 - s->beta1);
  c.b2 = (A)s->beta2;
  c.rest2 = (A)(1 - s->beta2);
  c.eps = (A)s->eps;
  c.grad_scale = (A)s->grad_scale;
  c.keep = (A)(1 - s->lr * s->weight_decay);
  c.rate = (A)(s->lr / (1 - pow(s->beta1, (double)s->step)));
  c.inverse = (A)(1 / sqrt(1 - pow(s->beta2, (double)s->step)));
  const cudaStream_t stream = halo__cuda_stream();
  const uint64_t seed = (uint64_t)s->step, words = s->stream;
  const bool is_wide = aligned(16, {master, g}) && aligned(N * (int)sizeof(TM), {m, v}) &&
                       aligned(N * (int)sizeof(T), {p});
  const unsigned blocks = blocks_for(n, is_wide ? N * THREADS : THREADS);
  if (is_wide && master != nullptr) {
    step_kernel<T, TM, N, true><<<blocks, THREADS, 0, stream>>>(p, master, g, m, v, n, c, seed, words);
  } else if (is_wide) {
    step_kernel<T, TM, N, false><<<blocks, THREADS, 0, stream>>>(p, master, g, m, v, n, c, seed, words);
  } else if (master != nullptr) {
    step_kernel<T, TM, 1, true><<<blocks, THREADS, 0, stream>>>(p, master, g, m, v, n, c, seed, words);
  } else {
    step_kernel<T, TM, 1, false><<<blocks, THREADS, 0, stream>>>(p, master, g, m, v, n, c, seed, words);
  }
  HALO_LAUNCHED("adamw");
  return HALO_OK;
}

/* ---- sum of squares ------------------------------------------------------------------------ */

constexpr int MAX_BLOCKS = 4096, MIN_BLOCK = 4096, AHEAD = 8;

/* Block b sums the squares of x[b * share .. (b + 1) * share), in packs of N. */
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    squares_kernel(double *__restrict__ partial, const T *__restrict__ x, int64_t n, int64_t share) {
  const int64_t first = blockIdx.x * share, end = first + share < n ? first + share : n;
  const int64_t packs = (end - first) / N;
  const T *from = x + first;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < packs; i += THREADS * AHEAD) {
    few<T, N> v[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      if (i + u * THREADS < packs) v[u] = fetch<T, N>(from + (i + u * THREADS) * N);
    }
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      if (i + u * THREADS >= packs) continue;
#pragma unroll
      for (int k = 0; k < N; k++) {
        const double a = (double)value(v[u], k);
        sum += a * a;
      }
    }
  }
  const int64_t tail = first + packs * N + threadIdx.x;
  if (N > 1 && tail < end) {
    const double a = (double)load(x[tail]);
    sum += a * a;
  }
  sum = block_sum<THREADS>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

/* partial[blocks] += the sum of partial[0 .. blocks). */
__global__ void __launch_bounds__(THREADS) total_kernel(double *partial, int blocks) {
  double sum = 0;
  for (int i = threadIdx.x; i < blocks; i += THREADS) sum += partial[i];
  sum = block_sum<THREADS>(sum);
  if (threadIdx.x == 0) partial[blocks] = sum;
}

template <class T> halo_status sum_squares(double *partial, const T *x, int64_t n, int *blocks_out) {
  constexpr int N = lanes16<T>;
  const int64_t wanted = (n + MAX_BLOCKS - 1) / MAX_BLOCKS;
  const int64_t share = wanted > MIN_BLOCK ? (wanted + 7) / 8 * 8 : MIN_BLOCK; // shares stay aligned
  const unsigned blocks = blocks_for(n, share);
  const cudaStream_t stream = halo__cuda_stream();
  if (aligned(16, {x})) {
    squares_kernel<T, N><<<blocks, THREADS, 0, stream>>>(partial, x, n, share);
  } else {
    squares_kernel<T, 1><<<blocks, THREADS, 0, stream>>>(partial, x, n, share);
  }
  HALO_LAUNCHED("sum_squares");
  total_kernel<<<1, THREADS, 0, stream>>>(partial, (int)blocks);
  HALO_LAUNCHED("sum_squares, total");
  *blocks_out = (int)blocks;
  return HALO_OK;
}

halo_status sum_squares_any(halo_dtype t, double *partial, const void *x, int64_t n, int *blocks_out) {
  HALO_REAL(t, T, return (sum_squares<T>(partial, (const T *)x, n, blocks_out)));
  return HALO_OK;
}

} // namespace

halo_status halo_cuda_adamw(halo_dtype t, void *p, void *master, const void *g, halo_dtype tm, void *m, void *v,
                            int64_t n, const halo_adamw_step_args *s) {
  HALO_CHECK(tm == (t == HALO_F64 ? HALO_F64 : HALO_F32) || (tm == HALO_BF16 && t != HALO_F64), HALO_EARG,
             "adamw: moments in %s beside a parameter in %s", halo_dtype_name(tm), halo_dtype_name(t));
  if (n <= 0) return HALO_OK;
  using bf16 = __nv_bfloat16;
  if (tm == HALO_BF16 && t == HALO_BF16) {
    return step<bf16, bf16>((bf16 *)p, (float *)master, (const float *)g, (bf16 *)m, (bf16 *)v, n, s);
  }
  if (tm == HALO_BF16) {
    return step<float, bf16>((float *)p, (float *)master, (const float *)g, (bf16 *)m, (bf16 *)v, n, s);
  }
  HALO_REAL(t, T, {
    using A = acc_of<T>;
    return (step<T, A>((T *)p, (A *)master, (const A *)g, (A *)m, (A *)v, n, s));
  });
  return HALO_OK;
}

halo_status halo_cuda_sum_squares(halo_dtype t, double *out, const void *x, int64_t n) {
  *out = 0;
  if (n <= 0) return HALO_OK;
  double *partial = nullptr;
  int blocks = 0;
  HALO_TRY(halo__alloc((void **)&partial, (MAX_BLOCKS + 1) * 8, HALO_CUDA));
  halo_status status = sum_squares_any(t, partial, x, n, &blocks);
  if (status == HALO_OK) status = halo_cuda_copy_out(out, partial + blocks, 8);
  halo__free(partial);
  return status;
}
