/* softmax: normalised exponentials along one dim of [outer, n, inner], and their logarithm.
 *
 *   m = max_j x_j    l = m + log sum_j exp(x_j - m)
 *   softmax y_j = exp(x_j - m) / sum     dx_j = y_j (dy_j - sum_k dy_k y_k)
 *   log     y_j = x_j - l                dx_j = dy_j - exp(y_j) sum_k dy_k
 *   logsumexp y = l                      dx_j = dy exp(x_j - l)
 *
 * numbers   sums are fp32 lanes, added up in fp64; exponentials of bf16 are the hardware's 2^x, whose error
 *           is a thousandth of bf16's. Maximum and sum come in one pass (Milakov and
 *           Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867, algorithm 3)
 * edges     a fibre of -inf alone (a row that sees nothing) has l = -inf: softmax gives 0 and log
 *           softmax -inf, with gradient 0, as attention does; +inf gives NaN
 * launch    rows that fit the registers of a group of lanes or of a block are read once; longer rows and
 *           other layouts take a reduction and a map of fibres.cuh, so x is read twice
 * gradients written (=)
 * twin      kernels/cpu/softmax.c
 */
#include "fibres.cuh"

namespace {

using namespace halo;

/* exp(x) for x <= 0 or NaN. */
template <class T> __device__ __forceinline__ acc_of<T> power(acc_of<T> x) {
  if constexpr (sizeof(T) == 2) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
    return y;
  } else {
    return EXP(x);
  }
}

/* What a map must know of a fibre: exponents are taken from `shift`; where it is -inf the fibre is
 * empty and `scale` is its value. */
template <class A> struct about { A shift, scale; };

template <class A> __device__ __forceinline__ about<A> about_of(A m, double sum, bool is_log) {
  const A infinity = limits<A>::infinity();
  const A total = (A)sum; // every thread of a row does this: in the arithmetic type it costs a tenth
  about<A> a;
  if (m == -infinity) { // a NaN among the -inf shows in the sum
    a.shift = -infinity;
    a.scale = is_nan(total) ? limits<A>::nan() : is_log ? -infinity : (A)0;
  } else {
    a.shift = is_log ? m + LOG(total) : m;
    a.scale = 1 / total;
  }
  return a;
}

template <class T, class A> __device__ __forceinline__ A softmax_value(const about<A> &a, A x, bool is_log) {
  if (a.shift == -limits<A>::infinity()) return a.scale;
  return is_log ? x - a.shift : power<T>(x - a.shift) * a.scale;
}

/* Running maximum m and sums of exp(x - m): `lane` of the last few, `sum` relative to sum_m. */
template <class T> struct exponentials {
  using acc = acc_of<T>;
  enum { INPUTS = 1 };
  struct state {
    double sum;
    acc m, lane, sum_m;
  };
  about<acc> *out; /* [fibres] */
  T *lse;          /* [fibres], or NULL */
  bool is_log;

  __device__ __forceinline__ state none(int64_t) const {
    return state{0, -limits<acc>::infinity(), 0, -limits<acc>::infinity()};
  }
  __device__ __forceinline__ void add(state &s, const acc (&in)[1], int64_t) const {
    const acc x = in[0], d = x - s.m;
    const acc e = x == -limits<acc>::infinity() ? (acc)0 : power<T>(d > 0 ? -d : d);
    if (x > s.m) {
      s.lane = s.lane * e + (x - x + 1); // NaN for +inf
      s.m = x;
    } else {
      s.lane += e;
    }
  }
  static __device__ __forceinline__ acc fade(acc from, acc to) {
    return from == to ? (acc)1 : from == -limits<acc>::infinity() ? (acc)0 : EXP(from - to);
  }
  __device__ __forceinline__ void flush(state &s) const {
    s.sum = s.sum * fade(s.sum_m, s.m) + s.lane;
    s.sum_m = s.m;
    s.lane = 0;
  }
  __device__ __forceinline__ void join(state &a, const state &b) const {
    const acc m = b.m > a.m ? b.m : a.m;
    a.sum = a.sum * fade(a.m, m) + b.sum * fade(b.m, m);
    a.m = a.sum_m = m;
  }
  __device__ __forceinline__ void finish(int64_t fibre, const state &s) const {
    const about<acc> a = about_of<acc>(s.m, s.sum, is_log);
    if (lse == nullptr) {
      out[fibre] = a;
    } else {
      lse[fibre] = store<T>(a.shift == -limits<acc>::infinity() ? a.scale : a.shift);
    }
  }
};

template <class T> struct softmax_map {
  using acc = acc_of<T>;
  enum { INPUTS = 1 };
  const about<acc> *fibre;
  bool is_log;
  __device__ __forceinline__ about<acc> of(int64_t f) const { return fibre[f]; }
  __device__ __forceinline__ acc value(const about<acc> &a, const acc (&x)[1]) const {
    return softmax_value<T>(a, x[0], is_log);
  }
};

/* Sum of dy y, or of dy, and whether a log softmax was -inf throughout. */
template <class A> struct slope {
  A sum;
  int32_t is_empty;
};

template <class T, class A>
__device__ __forceinline__ A slope_value(const slope<A> &s, A dy, A y, bool is_log) {
  if (!is_log) return y * (dy - s.sum);
  return s.is_empty ? (A)0 : dy - power<T>(y) * s.sum;
}

template <class T> struct slopes {
  using acc = acc_of<T>;
  enum { INPUTS = 2 };
  struct state {
    double sum;
    acc lane, most;
  };
  slope<acc> *out;
  bool is_log;
  __device__ __forceinline__ state none(int64_t) const { return state{0, 0, -limits<acc>::infinity()}; }
  __device__ __forceinline__ void add(state &s, const acc (&in)[2], int64_t) const {
    s.lane += is_log ? in[0] : in[0] * in[1];
    s.most = in[1] > s.most ? in[1] : s.most;
  }
  __device__ __forceinline__ void flush(state &s) const {
    s.sum += s.lane;
    s.lane = 0;
  }
  __device__ __forceinline__ void join(state &a, const state &b) const {
    a.sum += b.sum;
    a.most = b.most > a.most ? b.most : a.most;
  }
  __device__ __forceinline__ void finish(int64_t fibre, const state &s) const {
    out[fibre] = slope<acc>{(acc)s.sum, is_log && s.most == -limits<acc>::infinity()};
  }
};

template <class T> struct slope_map {
  using acc = acc_of<T>;
  enum { INPUTS = 2 };
  const slope<acc> *fibre;
  bool is_log;
  __device__ __forceinline__ slope<acc> of(int64_t f) const { return fibre[f]; }
  __device__ __forceinline__ acc value(const slope<acc> &s, const acc (&in)[2]) const {
    return slope_value<T>(s, in[0], in[1], is_log);
  }
};

template <class T> struct logsumexp_map {
  using acc = acc_of<T>;
  enum { INPUTS = 1 };
  const T *dy, *y;
  struct pair {
    acc dy, l;
  };
  __device__ __forceinline__ pair of(int64_t f) const { return pair{load(dy[f]), load(y[f])}; }
  __device__ __forceinline__ acc value(const pair &p, const acc (&x)[1]) const {
    return p.l == -limits<acc>::infinity() ? (acc)0 : p.dy * power<T>(x[0] - p.l);
  }
};

/* ---- rows that fit registers ---------------------------------------------------------------------- */

/* Who shares a row: `lanes` threads, a power of two within a warp (THREADS = 0) or a block of THREADS. */
template <int THREADS, class A> __device__ __forceinline__ A shared_max(A x, int lanes) {
  if constexpr (THREADS > 0) return block_max<THREADS>(x);
  for (int o = lanes / 2; o > 0; o /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, x, o);
    x = other > x ? other : x;
  }
  return x;
}
template <int THREADS, class A> __device__ __forceinline__ A shared_sum(A x, int lanes) {
  if constexpr (THREADS > 0) return block_sum<THREADS>(x);
  for (int o = lanes / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

/* Sixteen bytes of a row as words: bf16 as an array would get a register for each. */
template <class T> struct alignas(16) row_pack {
  uint32_t word[4];
};
template <class T>
__device__ __forceinline__ void unpack(acc_of<T> (&v)[lanes16<T>], const row_pack<T> &p) {
#pragma unroll
  for (int e = 0; e < lanes16<T>; e++) {
    if constexpr (sizeof(T) == 2) {
      v[e] = __uint_as_float(e % 2 ? p.word[e / 2] & 0xffff0000u : p.word[e / 2] << 16);
    } else if constexpr (sizeof(T) == 4) {
      v[e] = __uint_as_float(p.word[e]);
    } else {
      v[e] = __hiloint2double((int)p.word[2 * e + 1], (int)p.word[2 * e]);
    }
  }
}
template <class T>
__device__ __forceinline__ void repack(row_pack<T> &p, const acc_of<T> (&v)[lanes16<T>]) {
#pragma unroll
  for (int e = 0; e < lanes16<T>; e++) {
    if constexpr (sizeof(T) == 2) {
      if (e % 2) continue;
      const __nv_bfloat162 two = __floats2bfloat162_rn(v[e], v[e + 1]);
      memcpy(&p.word[e / 2], &two, 4);
    } else if constexpr (sizeof(T) == 4) {
      p.word[e] = __float_as_uint(v[e]);
    } else {
      p.word[2 * e] = (uint32_t)__double2loint(v[e]);
      p.word[2 * e + 1] = (uint32_t)__double2hiint(v[e]);
    }
  }
}

/* V elements from j on; what lies behind n is `fill`. */
template <class T>
__device__ __forceinline__ row_pack<T> read_pack(const T *x, int64_t j, int64_t n, bool is_aligned,
                                                 acc_of<T> fill) {
  row_pack<T> p;
  if (is_aligned && j < n) return *(const row_pack<T> *)(x + j);
  acc_of<T> v[lanes16<T>];
#pragma unroll
  for (int e = 0; e < lanes16<T>; e++) v[e] = j + e < n ? load(x[j + e]) : fill;
  repack<T>(p, v);
  return p;
}
template <class T>
__device__ __forceinline__ void write_pack(T *y, int64_t j, int64_t n, bool is_aligned,
                                           const row_pack<T> &p) {
  if (is_aligned) {
    if (j < n) *(row_pack<T> *)(y + j) = p;
    return;
  }
  acc_of<T> v[lanes16<T>];
  unpack<T>(v, p);
#pragma unroll
  for (int e = 0; e < lanes16<T>; e++) {
    if (j + e < n) y[j + e] = store<T>(v[e]);
  }
}

/* One row, in K packs per lane. */
template <class T, int K, int THREADS>
__device__ __forceinline__ void softmax_row(row_pack<T> (&x)[K], int lanes, bool is_log) {
  using acc = acc_of<T>;
  constexpr int V = lanes16<T>;
  acc v[V], most = -limits<acc>::infinity();
#pragma unroll
  for (int k = 0; k < K; k++) {
    unpack<T>(v, x[k]);
#pragma unroll
    for (int e = 0; e < V; e++) most = v[e] > most ? v[e] : most;
  }
  const acc m = shared_max<THREADS>(most, lanes), shift = m == -limits<acc>::infinity() ? (acc)0 : m;
  // Storage as wide as arithmetic keeps the exponentials, bf16 makes them twice.
  const bool keeps = sizeof(T) == sizeof(acc) && !is_log;
  acc few = 0;
#pragma unroll
  for (int k = 0; k < K; k++) {
    unpack<T>(v, x[k]);
#pragma unroll
    for (int e = 0; e < V; e++) {
      v[e] = power<T>(v[e] - shift);
      few += v[e];
    }
    if (keeps) repack<T>(x[k], v);
  }
  const about<acc> a = about_of<acc>(m, shared_sum<THREADS>((double)few, lanes), is_log);
  const bool is_empty = a.shift == -limits<acc>::infinity();
#pragma unroll
  for (int k = 0; k < K; k++) {
    unpack<T>(v, x[k]);
#pragma unroll
    for (int e = 0; e < V; e++) {
      v[e] = keeps && !is_empty ? v[e] * a.scale : softmax_value<T>(a, v[e], is_log);
    }
    repack<T>(x[k], v);
  }
}

template <class T, int K, int THREADS>
__device__ __forceinline__ void slope_row(row_pack<T> (&dy)[K], const row_pack<T> (&y)[K], int lanes,
                                          bool is_log) {
  using acc = acc_of<T>;
  constexpr int V = lanes16<T>;
  acc g[V], v[V], few = 0, most = -limits<acc>::infinity();
#pragma unroll
  for (int k = 0; k < K; k++) {
    unpack<T>(g, dy[k]);
    unpack<T>(v, y[k]);
#pragma unroll
    for (int e = 0; e < V; e++) {
      few += is_log ? g[e] : g[e] * v[e];
      most = v[e] > most ? v[e] : most;
    }
  }
  slope<acc> s = {(acc)shared_sum<THREADS>((double)few, lanes), 0};
  if (is_log) s.is_empty = shared_max<THREADS>(most, lanes) == -limits<acc>::infinity();
#pragma unroll
  for (int k = 0; k < K; k++) {
    unpack<T>(g, dy[k]);
    unpack<T>(v, y[k]);
#pragma unroll
    for (int e = 0; e < V; e++) g[e] = slope_value<T>(s, g[e], v[e], is_log);
    repack<T>(dy[k], g);
  }
}

/* ROWS rows to each group of lanes, all read before the first is worked on. IS_SLOPE: (y, a, b) is
 * (dx, dy, y), else (y, x, NULL). */
template <class T, int K, int ROWS, int THREADS, bool IS_SLOPE>
__global__ void __launch_bounds__(THREADS > 0 ? THREADS : 256)
    row_kernel(T *y, const T *a, const T *b, int64_t outer, int64_t n, int group, bool is_aligned,
               bool is_log) {
  constexpr int V = lanes16<T>;
  using acc = acc_of<T>;
  const int lanes = THREADS > 0 ? THREADS : group, side = THREADS > 0 ? 1 : 256 / group;
  const int lane = threadIdx.x % lanes;
  const int64_t first = (int64_t)blockIdx.x * (side * ROWS) + threadIdx.x / lanes;
  const acc none = -limits<acc>::infinity(), zero = 0;
  row_pack<T> x[ROWS][K], saved[IS_SLOPE ? ROWS : 1][IS_SLOPE ? K : 1];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int64_t o = first + r * side, there = o < outer ? n : 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int64_t j = ((int64_t)k * lanes + lane) * V;
      x[r][k] = read_pack<T>(a + o * n, j, there, is_aligned, IS_SLOPE ? zero : none);
      if constexpr (IS_SLOPE) saved[r][k] = read_pack<T>(b + o * n, j, there, is_aligned, is_log ? none : zero);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if constexpr (IS_SLOPE) slope_row<T, K, THREADS>(x[r], saved[r], lanes, is_log);
    else softmax_row<T, K, THREADS>(x[r], lanes, is_log);
    const int64_t o = first + r * side, there = o < outer ? n : 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
      write_pack<T>(y + o * n, ((int64_t)k * lanes + lane) * V, there, is_aligned, x[r][k]);
    }
  }
}

template <class T, int K, int ROWS, int THREADS, bool IS_SLOPE>
halo_status launch_rows(const char *name, void *y, const void *a, const void *b, int64_t outer, int64_t n,
                        int group, bool is_log) {
  const bool is_aligned =
      n % lanes16<T> == 0 && is_multiple(y, 16) && is_multiple(a, 16) && is_multiple(b, 16);
  constexpr int threads = THREADS > 0 ? THREADS : 256;
  unsigned blocks = 0;
  HALO_TRY(blocks_of(&blocks, outer, threads / (THREADS > 0 ? THREADS : group) * ROWS));
  row_kernel<T, K, ROWS, THREADS, IS_SLOPE><<<blocks, threads, 0, halo__cuda_stream()>>>(
      (T *)y, (const T *)a, (const T *)b, outer, n, group, is_aligned, is_log);
  HALO_LAUNCHED(name);
  return HALO_OK;
}

/* The rows that run_rows can do: short ones, or enough of them to fill a device block by block. */
template <class T> bool fits_rows(int64_t outer, int64_t n, int64_t inner, bool is_slope) {
  const int64_t packs = (n + lanes16<T> - 1) / lanes16<T>;
  return inner == 1 && (packs <= 256 || (outer >= 64 && packs <= (is_slope ? 4096 : 8192)));
}

template <class T, bool IS_SLOPE>
halo_status run_rows(const char *name, void *y, const void *a, const void *b, int64_t outer, int64_t n,
                     bool is_log) {
  const int64_t packs = (n + lanes16<T> - 1) / lanes16<T>;
  int group = 1;
  while (group < 32 && group < packs) group *= 2;
  if (packs <= 32) return launch_rows<T, 1, 4, 0, IS_SLOPE>(name, y, a, b, outer, n, group, is_log);
  if (packs <= 128) return launch_rows<T, 4, 1, 0, IS_SLOPE>(name, y, a, b, outer, n, 32, is_log);
  if (packs <= 256) return launch_rows<T, 8, 1, 0, IS_SLOPE>(name, y, a, b, outer, n, 32, is_log);
  if (packs <= 512) return launch_rows<T, 2, 1, 256, IS_SLOPE>(name, y, a, b, outer, n, 0, is_log);
  if (packs <= 2048) return launch_rows<T, 8, 1, 256, IS_SLOPE>(name, y, a, b, outer, n, 0, is_log);
  return launch_rows < T, IS_SLOPE ? 4 : 8, 1, 1024, IS_SLOPE > (name, y, a, b, outer, n, 0, is_log);
}

template <class T>
halo_status softmax(void *y, const void *x, int64_t outer, int64_t n, int64_t inner, bool is_log) {
  if (outer * n * inner <= 0) return HALO_OK;
  if (fits_rows<T>(outer, n, inner, false))
    return run_rows<T, false>("softmax", y, x, nullptr, outer, n, is_log);
  scratch fibre;
  HALO_TRY(fibre.get(outer * inner * (int64_t)sizeof(about<acc_of<T>>)));
  const exponentials<T> r = {fibre.as<about<acc_of<T>>>(), nullptr, is_log};
  HALO_TRY(reduce_fibres<T>("softmax", r, {{x}}, outer, n, inner));
  return map_fibres<T>("softmax", softmax_map<T>{fibre.as<about<acc_of<T>>>(), is_log}, y, {{x}}, outer, n,
                       inner);
}

template <class T>
halo_status softmax_bwd(void *dx, const void *dy, const void *y, int64_t outer, int64_t n, int64_t inner,
                        bool is_log) {
  if (outer * n * inner <= 0) return HALO_OK;
  if (fits_rows<T>(outer, n, inner, true))
    return run_rows<T, true>("softmax_bwd", dx, dy, y, outer, n, is_log);
  scratch fibre;
  HALO_TRY(fibre.get(outer * inner * (int64_t)sizeof(slope<acc_of<T>>)));
  const slopes<T> r = {fibre.as<slope<acc_of<T>>>(), is_log};
  HALO_TRY(reduce_fibres<T>("softmax_bwd", r, {{dy, y}}, outer, n, inner));
  return map_fibres<T>("softmax_bwd", slope_map<T>{fibre.as<slope<acc_of<T>>>(), is_log}, dx, {{dy, y}},
                       outer, n, inner);
}

} // namespace

halo_status halo_cuda_softmax(halo_dtype t, void *y, const void *x, int64_t outer, int64_t n, int64_t inner,
                              int32_t is_log) {
  HALO_REAL(t, T, return softmax<T>(y, x, outer, n, inner, is_log != 0));
  return HALO_OK;
}

halo_status halo_cuda_softmax_bwd(halo_dtype t, void *dx, const void *dy, const void *y, int64_t outer,
                                  int64_t n, int64_t inner, int32_t is_log) {
  HALO_REAL(t, T, return softmax_bwd<T>(dx, dy, y, outer, n, inner, is_log != 0));
  return HALO_OK;
}

halo_status halo_cuda_logsumexp(halo_dtype t, void *y, const void *x, int64_t outer, int64_t n,
                                int64_t inner) {
  HALO_REAL(
      t, T,
      return reduce_fibres<T>("logsumexp", exponentials<T>{nullptr, (T *)y, true}, {{x}}, outer, n, inner));
  return HALO_OK;
}

halo_status halo_cuda_logsumexp_bwd(halo_dtype t, void *dx, const void *dy, const void *x, const void *y,
                                    int64_t outer, int64_t n, int64_t inner) {
  HALO_REAL(t, T,
            return map_fibres<T>("logsumexp_bwd", logsumexp_map<T>{(const T *)dy, (const T *)y}, dx, {{x}},
                                 outer, n, inner));
  return HALO_OK;
}
