/* softmax: normalised exponentials along one dim of [outer, n, inner], and their logarithm.
 *
 *   m = max_j x_j    l = m + log sum_j exp(x_j - m)
 *   softmax y_j = exp(x_j - m) / sum     dx_j = y_j (dy_j - sum_k dy_k y_k)
 *   log     y_j = x_j - l                dx_j = dy_j - exp(y_j) sum_k dy_k
 *   logsumexp y = l                      dx_j = dy exp(x_j - l)
 *
 * numbers   sums are fp32 lanes, added up in fp64. Maximum and sum come in one pass (Milakov and
 *           Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867, algorithm 3)
 * edges     a fibre of -inf alone (a row that sees nothing) has l = -inf: softmax gives 0 and log
 *           softmax -inf, with gradient 0, as attention does; +inf gives NaN
 * launch    rows that fit shared memory are read once, by a warp (n <= 1024) or a block; other
 *           layouts take a reduction and a map of fibres.cuh, so x is read twice
 * gradients written (=)
 * twin      kernels/cpu/softmax.c
 */
#include "fibres.cuh"

namespace {

using namespace halo;

/* What a map must know of a fibre: exponents are taken from `shift`; where it is -inf the fibre is
 * empty and `scale` is its value. */
template <class A> struct about { A shift, scale; };

template <class A> __device__ __forceinline__ about<A> about_of(A m, double sum, bool is_log) {
  const A infinity = limits<A>::infinity();
  about<A> a;
  if (m == -infinity) { // a NaN among the -inf shows in the sum
    a.shift = -infinity;
    a.scale = is_nan(sum) ? limits<A>::nan() : is_log ? -infinity : (A)0;
  } else {
    a.shift = is_log ? m + (A)log(sum) : m;
    a.scale = (A)(1 / sum);
  }
  return a;
}

template <class A> __device__ __forceinline__ A softmax_value(const about<A> &a, A x, bool is_log) {
  if (a.shift == -limits<A>::infinity()) return a.scale;
  return is_log ? x - a.shift : EXP(x - a.shift) * a.scale;
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
    const acc e = x == -limits<acc>::infinity() ? (acc)0 : EXP(d > 0 ? -d : d);
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
    return softmax_value(a, x[0], is_log);
  }
};

/* Sum of dy y, or of dy, and whether a log softmax was -inf throughout. */
template <class A> struct slope { A sum; int32_t is_empty; };

template <class A> __device__ __forceinline__ A slope_value(const slope<A> &s, A dy, A y, bool is_log) {
  if (!is_log) return y * (dy - s.sum);
  return s.is_empty ? (A)0 : dy - EXP(y) * s.sum;
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
    return slope_value(s, in[0], in[1], is_log);
  }
};

template <class T> struct logsumexp_map {
  using acc = acc_of<T>;
  enum { INPUTS = 1 };
  const T *dy, *y;
  struct pair { acc dy, l; };
  __device__ __forceinline__ pair of(int64_t f) const { return pair{load(dy[f]), load(y[f])}; }
  __device__ __forceinline__ acc value(const pair &p, const acc (&x)[1]) const {
    return p.l == -limits<acc>::infinity() ? (acc)0 : p.dy * EXP(x[0] - p.l);
  }
};

/* ---- rows that fit shared memory ------------------------------------------------------------------ */

enum { WARP_MOST = 1024, SHARED_MOST = 96 << 10 };

template <int GROUP, class A> __device__ __forceinline__ A group_max(A x) {
  if constexpr (GROUP == 32) return warp_max(x);
  else return block_max<GROUP>(x);
}
template <int GROUP, class A> __device__ __forceinline__ A group_sum(A x) {
  if constexpr (GROUP == 32) return warp_sum(x);
  else return block_sum<GROUP>(x);
}

/* One row of n by GROUP lanes; `row` has room for n. A lane only meets its own elements again, so
 * nobody waits. */
template <class T, int V, int GROUP>
__device__ __forceinline__ void softmax_row(T *y, const T *x, acc_of<T> *row, int64_t n, bool is_log) {
  using acc = acc_of<T>;
  const int lane = threadIdx.x % GROUP;
  acc most = -limits<acc>::infinity();
#pragma unroll 4
  for (int64_t j = lane * V; j < n; j += GROUP * V) {
    const pack<T, V> run = *(const pack<T, V> *)(x + j);
#pragma unroll
    for (int e = 0; e < V; e++) {
      const acc v = load(run.at[e]);
      row[j + e] = v;
      most = v > most ? v : most;
    }
  }
  const acc m = group_max<GROUP>(most), shift = m == -limits<acc>::infinity() ? (acc)0 : m;
  double sum = 0;
  for (int64_t j = lane * V; j < n; j += GROUP * V) {
    acc few = 0;
#pragma unroll
    for (int e = 0; e < V; e++) {
      const acc p = EXP(row[j + e] - shift);
      few += p;
      if (!is_log) row[j + e] = p;
    }
    sum += few;
  }
  const about<acc> a = about_of<acc>(m, group_sum<GROUP>(sum), is_log);
  const bool is_empty = a.shift == -limits<acc>::infinity();
  for (int64_t j = lane * V; j < n; j += GROUP * V) {
    pack<T, V> run;
#pragma unroll
    for (int e = 0; e < V; e++) {
      const acc v = row[j + e];
      run.at[e] = store<T>(is_empty ? a.scale : is_log ? v - a.shift : v * a.scale);
    }
    *(pack<T, V> *)(y + j) = run;
  }
}

template <class T, int V, int GROUP>
__device__ __forceinline__ void slope_row(T *dx, const T *dy, const T *y, acc_of<T> *row, int64_t n, bool is_log) {
  using acc = acc_of<T>;
  const int lane = threadIdx.x % GROUP;
  double sum = 0;
  acc most = -limits<acc>::infinity();
#pragma unroll 2
  for (int64_t j = lane * V; j < n; j += GROUP * V) {
    const pack<T, V> run_dy = *(const pack<T, V> *)(dy + j), run_y = *(const pack<T, V> *)(y + j);
    acc few = 0;
#pragma unroll
    for (int e = 0; e < V; e++) {
      const acc g = load(run_dy.at[e]), p = load(run_y.at[e]);
      row[j + e] = g;
      row[n + j + e] = p;
      few += is_log ? g : g * p;
      most = p > most ? p : most;
    }
    sum += few;
  }
  slope<acc> s = {(acc)group_sum<GROUP>(sum), 0};
  if (is_log) s.is_empty = group_max<GROUP>(most) == -limits<acc>::infinity();
  for (int64_t j = lane * V; j < n; j += GROUP * V) {
    pack<T, V> run;
#pragma unroll
    for (int e = 0; e < V; e++) run.at[e] = store<T>(slope_value(s, row[j + e], row[n + j + e], is_log));
    *(pack<T, V> *)(dx + j) = run;
  }
}

extern __shared__ __align__(16) unsigned char softmax_shared[];

/* IS_SLOPE: (y, a, b) is (dx, dy, y), else (y, x, NULL). */
template <class T, int GROUP, bool IS_SLOPE>
__global__ void __launch_bounds__(GROUP == 32 ? 256 : GROUP)
row_kernel(T *y, const T *a, const T *b, int64_t outer, int64_t n, bool is_aligned, bool is_log) {
  constexpr int V = lanes16<T>;
  const int64_t o = GROUP == 32 ? (int64_t)blockIdx.x * 8 + threadIdx.x / 32 : blockIdx.x;
  if (o >= outer) return; // whole warps at a time
  acc_of<T> *row = (acc_of<T> *)softmax_shared + (GROUP == 32 ? threadIdx.x / 32 * n * (IS_SLOPE ? 2 : 1) : 0);
  if constexpr (IS_SLOPE) {
    if (is_aligned) slope_row<T, V, GROUP>(y + o * n, a + o * n, b + o * n, row, n, is_log);
    else slope_row<T, 1, GROUP>(y + o * n, a + o * n, b + o * n, row, n, is_log);
  } else {
    if (is_aligned) softmax_row<T, V, GROUP>(y + o * n, a + o * n, row, n, is_log);
    else softmax_row<T, 1, GROUP>(y + o * n, a + o * n, row, n, is_log);
  }
}

/* Are there rows enough, and do they fit? */
template <class T> bool fits_rows(int64_t outer, int64_t n, int64_t inner, int64_t copies) {
  return inner == 1 && n > 0 && (n <= WARP_MOST || outer >= 64) &&
         n * copies * (int64_t)sizeof(acc_of<T>) <= SHARED_MOST;
}

template <class T, int GROUP, bool IS_SLOPE>
halo_status launch_rows(const char *name, void *y, const void *a, const void *b, int64_t outer, int64_t n, bool is_log) {
  const int64_t bytes = n * (IS_SLOPE ? 2 : 1) * (int64_t)sizeof(acc_of<T>) * (GROUP == 32 ? 8 : 1);
  const bool is_aligned = n % lanes16<T> == 0 && is_multiple(y, 16) && is_multiple(a, 16) && is_multiple(b, 16);
  unsigned blocks = 0;
  HALO_TRY(blocks_of(&blocks, outer, GROUP == 32 ? 8 : 1));
  if (bytes > 48 << 10) {
    HALO_CUDA_TRY(cudaFuncSetAttribute(row_kernel<T, GROUP, IS_SLOPE>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       (int)bytes));
  }
  row_kernel<T, GROUP, IS_SLOPE><<<blocks, GROUP == 32 ? 256 : GROUP, (size_t)bytes, halo__cuda_stream()>>>(
      (T *)y, (const T *)a, (const T *)b, outer, n, is_aligned, is_log);
  HALO_LAUNCHED(name);
  return HALO_OK;
}

template <class T, bool IS_SLOPE>
halo_status run_rows(const char *name, void *y, const void *a, const void *b, int64_t outer, int64_t n, bool is_log) {
  // A warp's rows are short enough for the plain 48 KB of shared memory, eight of them.
  if (n * (IS_SLOPE ? 2 : 1) * (int64_t)sizeof(acc_of<T>) <= 6 << 10 && n <= WARP_MOST) {
    return launch_rows<T, 32, IS_SLOPE>(name, y, a, b, outer, n, is_log);
  }
  return launch_rows<T, 256, IS_SLOPE>(name, y, a, b, outer, n, is_log);
}

template <class T>
halo_status softmax(void *y, const void *x, int64_t outer, int64_t n, int64_t inner, bool is_log) {
  if (outer * n * inner <= 0) return HALO_OK;
  if (fits_rows<T>(outer, n, inner, 1)) return run_rows<T, false>("softmax", y, x, nullptr, outer, n, is_log);
  scratch fibre;
  HALO_TRY(fibre.get(outer * inner * (int64_t)sizeof(about<acc_of<T>>)));
  const exponentials<T> r = {fibre.as<about<acc_of<T>>>(), nullptr, is_log};
  HALO_TRY(reduce_fibres<T>("softmax", r, {{x}}, outer, n, inner));
  return map_fibres<T>("softmax", softmax_map<T>{fibre.as<about<acc_of<T>>>(), is_log}, y, {{x}}, outer, n, inner);
}

template <class T>
halo_status softmax_bwd(void *dx, const void *dy, const void *y, int64_t outer, int64_t n, int64_t inner, bool is_log) {
  if (outer * n * inner <= 0) return HALO_OK;
  if (fits_rows<T>(outer, n, inner, 2)) return run_rows<T, true>("softmax_bwd", dx, dy, y, outer, n, is_log);
  scratch fibre;
  HALO_TRY(fibre.get(outer * inner * (int64_t)sizeof(slope<acc_of<T>>)));
  const slopes<T> r = {fibre.as<slope<acc_of<T>>>(), is_log};
  HALO_TRY(reduce_fibres<T>("softmax_bwd", r, {{dy, y}}, outer, n, inner));
  return map_fibres<T>("softmax_bwd", slope_map<T>{fibre.as<slope<acc_of<T>>>(), is_log}, dx, {{dy, y}}, outer, n,
                       inner);
}

} // namespace

halo_status halo_cuda_softmax(halo_dtype t, void *y, const void *x, int64_t outer, int64_t n, int64_t inner,
                              int32_t is_log) {
  HALO_REAL(t, T, return softmax<T>(y, x, outer, n, inner, is_log != 0));
  return HALO_OK;
}

halo_status halo_cuda_softmax_bwd(halo_dtype t, void *dx, const void *dy, const void *y, int64_t outer, int64_t n,
                                  int64_t inner, int32_t is_log) {
  HALO_REAL(t, T, return softmax_bwd<T>(dx, dy, y, outer, n, inner, is_log != 0));
  return HALO_OK;
}

halo_status halo_cuda_logsumexp(halo_dtype t, void *y, const void *x, int64_t outer, int64_t n, int64_t inner) {
  HALO_REAL(t, T, return reduce_fibres<T>("logsumexp", exponentials<T>{nullptr, (T *)y, true}, {{x}}, outer, n, inner));
  return HALO_OK;
}

halo_status halo_cuda_logsumexp_bwd(halo_dtype t, void *dx, const void *dy, const void *x, const void *y,
                                    int64_t outer, int64_t n, int64_t inner) {
  HALO_REAL(t, T, return map_fibres<T>("logsumexp_bwd", logsumexp_map<T>{(const T *)dy, (const T *)y}, dx, {{x}}, outer,
                                       n, inner));
  return HALO_OK;
}
