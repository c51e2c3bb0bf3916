/* reduce: sums, extremes, products, variances and running sums along one dim of [outer, n, inner].
 *
 *   sum       y = scale * sum_j x_j
 *   extreme   y = x_j*, j* the first index of the largest (smallest) element; NaN wins
 *   prod      y = prod_j x_j                 dx_j = dy prod_{k != j} x_k
 *   variance  y = sum_j (x_j - mean)^2 / d   dx_j = dy * 2 (x_j - mean) / d,  d = n - correction
 *   cumsum    y_j = sum_{k <= j} x_k, or k >= j when reversed, which is its gradient too
 *
 * numbers   sums run in fp32 lanes over at most 32 elements, partial sums in fp64 over segments whose
 *           size depends on the shape alone (fibres.cuh); integers are summed in int64 and give i64
 * edges     an empty sum is 0, an empty product 1, an empty variance NaN; core refuses empty extremes
 * gradients written (=)
 * launch    cumsum scans a segment of a long last-dim fibre with a block and any other with a thread;
 *           prod_bwd gives a thread a segment, since nobody is in a hurry for it
 * twin      kernels/cpu/reduce.c
 */
#include "fibres.cuh"

namespace {

using namespace halo;

/* Y is the dtype of the result: i64 for integers, else T. */
template <class T, class Y> struct sums {
  using acc = number_of<T>;
  enum { INPUTS = 1 };
  struct state {
    double total;
    acc lane;
  };
  Y *y;
  double scale;
  __device__ __forceinline__ state none(int64_t) const { return state{0, 0}; }
  __device__ __forceinline__ void add(state &s, const acc (&x)[1], int64_t) const { s.lane += x[0]; }
  __device__ __forceinline__ void flush(state &s) const {
    s.total += s.lane;
    s.lane = 0;
  }
  __device__ __forceinline__ void join(state &a, const state &b) const { a.total += b.total; }
  __device__ __forceinline__ void finish(int64_t f, const state &s) const {
    y[f] = store<Y>((acc_of<Y>)(s.total * scale));
  }
};

template <class T> struct integer_sums {
  enum { INPUTS = 1 };
  struct state {
    uint64_t total;
  };
  int64_t *y;
  __device__ __forceinline__ state none(int64_t) const { return state{0}; }
  __device__ __forceinline__ void add(state &s, const wrapping (&x)[1], int64_t) const {
    s.total += (uint64_t)x[0].v;
  }
  __device__ __forceinline__ void flush(state &) const {}
  __device__ __forceinline__ void join(state &a, const state &b) const { a.total += b.total; }
  __device__ __forceinline__ void finish(int64_t f, const state &s) const { y[f] = (int64_t)s.total; }
};

template <class T> struct products {
  using acc = acc_of<T>;
  enum { INPUTS = 1 };
  struct state {
    double product;
  };
  T *y;
  __device__ __forceinline__ state none(int64_t) const { return state{1}; }
  __device__ __forceinline__ void add(state &s, const acc (&x)[1], int64_t) const { s.product *= x[0]; }
  __device__ __forceinline__ void flush(state &) const {}
  __device__ __forceinline__ void join(state &a, const state &b) const { a.product *= b.product; }
  __device__ __forceinline__ void finish(int64_t f, const state &s) const { y[f] = store<T>((acc)s.product); }
};

/* Sum of (x - mean)^2. */
template <class T> struct deviations {
  using acc = acc_of<T>;
  enum { INPUTS = 1 };
  struct state {
    double mean, total;
  };
  T *y;
  const double *mean;
  double n, correction;
  __device__ __forceinline__ state none(int64_t f) const { return state{mean[f], 0}; }
  __device__ __forceinline__ void add(state &s, const acc (&x)[1], int64_t) const {
    const double d = x[0] - s.mean;
    s.total += d * d;
  }
  __device__ __forceinline__ void flush(state &) const {}
  __device__ __forceinline__ void join(state &a, const state &b) const { a.total += b.total; }
  __device__ __forceinline__ void finish(int64_t f, const state &s) const {
    y[f] = store<T>(n > 0 ? (acc)(s.total / (n - correction)) : limits<acc>::nan());
  }
};

template <class T> struct deviation_map {
  using acc = acc_of<T>;
  enum { INPUTS = 1 };
  const T *dy;
  const double *mean;
  double divisor;
  struct pair {
    double scale, mean;
  };
  __device__ __forceinline__ pair of(int64_t f) const { return pair{2 * load(dy[f]) / divisor, mean[f]}; }
  __device__ __forceinline__ acc value(const pair &p, const acc (&x)[1]) const {
    return (acc)(p.scale * (x[0] - p.mean));
  }
};

/* Order turned around, exactly. */
__device__ __forceinline__ float turned(float x) { return -x; }
__device__ __forceinline__ double turned(double x) { return -x; }
__device__ __forceinline__ wrapping turned(wrapping x) { return wrapping(~x.v); }
__device__ __forceinline__ void lowest(float *x) { *x = -limits<float>::infinity(); }
__device__ __forceinline__ void lowest(double *x) { *x = -limits<double>::infinity(); }
__device__ __forceinline__ void lowest(wrapping *x) { *x = wrapping(INT64_MIN); }

/* The first of the largest; the first NaN before all. Nothing is above what a fibre of -inf alone holds,
 * so that keeps at = NOWHERE, which stands for its first place. */
template <class T> struct extremes {
  using acc = number_of<T>;
  enum { INPUTS = 1 };
  static constexpr int64_t NOWHERE = INT64_MAX;
  struct state {
    int64_t at;
    acc best; /* turned around for the smallest */
    uint32_t pad;
  };
  T *y;
  int64_t *index;
  bool is_max;
  __device__ __forceinline__ state none(int64_t) const {
    state s = {NOWHERE, (acc)0, 0};
    lowest(&s.best);
    return s;
  }
  __device__ __forceinline__ void add(state &s, const acc (&x)[1], int64_t j) const {
    const acc v = is_max ? x[0] : turned(x[0]);
    if (!(v <= s.best) && s.best == s.best) {
      s.best = v;
      s.at = j;
    }
  }
  __device__ __forceinline__ void flush(state &) const {}
  __device__ __forceinline__ void join(state &a, const state &b) const {
    const bool is_tie = is_nan(a.best) ? is_nan(b.best) : a.best == b.best;
    if (is_tie ? b.at < a.at : !is_nan(a.best) && !(b.best <= a.best)) a = b;
  }
  __device__ __forceinline__ void finish(int64_t f, const state &s) const {
    if (y != nullptr) y[f] = number<T>::put(is_max ? s.best : turned(s.best));
    if (index != nullptr) index[f] = s.at == NOWHERE ? 0 : s.at;
  }
};

template <class T> halo_status means(double *mean, const void *x, int64_t outer, int64_t n, int64_t inner) {
  return reduce_fibres<T>("mean", sums<T, double>{mean, 1 / (double)n}, {{x}}, outer, n, inner);
}

template <class T>
halo_status variance(void *y, const void *x, int64_t outer, int64_t n, int64_t inner, double correction) {
  if (outer * inner <= 0) return HALO_OK;
  scratch mean;
  HALO_TRY(mean.get(outer * inner * (int64_t)sizeof(double)));
  HALO_TRY(means<T>(mean.as<double>(), x, outer, n, inner));
  return reduce_fibres<T>("variance", deviations<T>{(T *)y, mean.as<double>(), (double)n, correction}, {{x}},
                          outer, n, inner);
}

template <class T>
halo_status variance_bwd(void *dx, const void *dy, const void *x, int64_t outer, int64_t n, int64_t inner,
                         double correction) {
  if (outer * n * inner <= 0) return HALO_OK;
  scratch mean;
  HALO_TRY(mean.get(outer * inner * (int64_t)sizeof(double)));
  HALO_TRY(means<T>(mean.as<double>(), x, outer, n, inner));
  return map_fibres<T>("variance_bwd",
                       deviation_map<T>{(const T *)dy, mean.as<double>(), (double)n - correction}, dx, {{x}},
                       outer, n, inner);
}

/* ---- running sums and products -------------------------------------------------------------------- */

/* The arithmetic of a scan: fp64 sums, or int64 ones that wrap. */
template <class T, bool IS_REAL> struct scan_of { using type = double; };
template <class T> struct scan_of<T, false> { using type = uint64_t; };
template <class T> using scan = typename scan_of<T, number<T>::is_real>::type;

template <class T> __device__ __forceinline__ scan<T> scan_get(T x) {
  if constexpr (number<T>::is_real) return (double)load(x);
  else return (uint64_t)(int64_t)x;
}
template <class T> __device__ __forceinline__ T scan_put(scan<T> s) {
  if constexpr (number<T>::is_real) return store<T>((acc_of<T>)s);
  else return (T)(int64_t)s;
}

template <class S> __device__ __forceinline__ S warp_scan(S x) {
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const S before = __shfl_up_sync(0xffffffffu, x, o);
    if ((int)(threadIdx.x % 32) >= o) x += before;
  }
  return x;
}

/* Sums of whole segments, [outer, segments, inner], one thread each. */
template <class T>
__global__ void __launch_bounds__(FIBRE_THREADS) segment_sums_kernel(scan<T> *sum, const T *x, fibres f) {
  const int64_t i = (int64_t)blockIdx.x * FIBRE_THREADS + threadIdx.x;
  if (i >= f.outer * f.segments * f.inner) return;
  const int64_t row = i / f.inner, c = i - row * f.inner, o = row / f.segments, s = row - o * f.segments;
  const int64_t end = (s + 1) * f.length < f.n ? (s + 1) * f.length : f.n;
  scan<T> total = 0;
#pragma unroll 4
  for (int64_t j = s * f.length; j < end; j++) total += scan_get<T>(x[(o * f.n + j) * f.inner + c]);
  sum[i] = total;
}
/* The same with a block per segment, inner = 1. */
template <class T>
__global__ void __launch_bounds__(FIBRE_THREADS) block_sums_kernel(scan<T> *sum, const T *x, fibres f) {
  const int64_t o = blockIdx.x / f.segments, s = blockIdx.x - o * f.segments;
  const int64_t end = (s + 1) * f.length < f.n ? (s + 1) * f.length : f.n;
  scan<T> total = 0;
#pragma unroll 4
  for (int64_t j = s * f.length + threadIdx.x; j < end; j += FIBRE_THREADS)
    total += scan_get<T>(x[o * f.n + j]);
  total = block_sum<FIBRE_THREADS>(total);
  if (threadIdx.x == 0) sum[blockIdx.x] = total;
}

/* In place: what comes before each segment (behind it when reversed). One warp per fibre. */
template <class S>
__global__ void __launch_bounds__(FIBRE_THREADS) segment_scan_kernel(S *sum, fibres f, bool is_reversed) {
  const int64_t fibre = ((int64_t)blockIdx.x * FIBRE_THREADS + threadIdx.x) / 32;
  if (fibre >= f.outer * f.inner) return;
  const int64_t o = fibre / f.inner, c = fibre - o * f.inner, lane = threadIdx.x % 32;
  S *const p = sum + o * f.segments * f.inner + c;
  S carry = 0;
  for (int64_t k = 0; k < f.segments; k += 32) {
    const int64_t q = k + lane, s = is_reversed ? f.segments - 1 - q : q;
    const S own = q < f.segments ? p[s * f.inner] : (S)0, upto = warp_scan(own);
    S before = __shfl_up_sync(0xffffffffu, upto, 1);
    if (lane == 0) before = 0;
    if (q < f.segments) p[s * f.inner] = carry + before;
    carry += __shfl_sync(0xffffffffu, upto, 31);
  }
}

/* One thread walks a segment. */
template <class T>
__global__ void __launch_bounds__(FIBRE_THREADS)
    thread_cumsum_kernel(T *y, const T *x, const scan<T> *before, fibres f, bool is_reversed) {
  const int64_t i = (int64_t)blockIdx.x * FIBRE_THREADS + threadIdx.x;
  if (i >= f.outer * f.segments * f.inner) return;
  const int64_t row = i / f.inner, c = i - row * f.inner, o = row / f.segments, s = row - o * f.segments;
  const int64_t begin = s * f.length, end = begin + f.length < f.n ? begin + f.length : f.n;
  scan<T> sum = before != nullptr ? before[i] : (scan<T>)0;
#pragma unroll 4
  for (int64_t q = begin; q < end; q++) {
    const int64_t j = is_reversed ? end - 1 - (q - begin) : q, at = (o * f.n + j) * f.inner + c;
    sum += scan_get<T>(x[at]);
    y[at] = scan_put<T>(sum);
  }
}

/* A block scans a segment of a contiguous fibre, FIBRE_THREADS * ITEMS elements at a time; they pass
 * through shared memory, so that threads of a warp touch neighbours and yet own runs. */
template <class T>
__global__ void __launch_bounds__(FIBRE_THREADS)
    block_cumsum_kernel(T *y, const T *x, const scan<T> *before, fibres f, bool is_reversed) {
  enum { ITEMS = 8, WARPS = FIBRE_THREADS / 32 };
  using S = scan<T>;
  __shared__ S tile[FIBRE_THREADS * (ITEMS + 1)]; // a run of 8 is 9 apart: no two in a bank
  __shared__ S part[WARPS];
  const int64_t o = blockIdx.x / f.segments, s = blockIdx.x - o * f.segments;
  const int64_t begin = s * f.length, end = begin + f.length < f.n ? begin + f.length : f.n;
  const int64_t first = o * f.n + begin, n = end - begin;
  const int warp = threadIdx.x / 32;
  S carry = before != nullptr ? before[blockIdx.x] : (S)0;
  for (int64_t q = 0; q < n; q += FIBRE_THREADS * ITEMS) {
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      const int at = k * FIBRE_THREADS + threadIdx.x;
      const int64_t j = is_reversed ? n - 1 - (q + at) : q + at;
      tile[at + at / ITEMS] = q + at < n ? scan_get<T>(x[first + j]) : (S)0;
    }
    __syncthreads();
    S own[ITEMS], total = 0;
#pragma unroll
    for (int k = 0; k < ITEMS; k++) own[k] = total += tile[threadIdx.x * (ITEMS + 1) + k];
    const S upto = warp_scan(total);
    if (threadIdx.x % 32 == 31) part[warp] = upto;
    __syncthreads();
    // The neighbour's sum, not upto - total, which would round and make NaN of an inf.
    const S left = __shfl_up_sync(0xffffffffu, upto, 1);
    S base = carry + (threadIdx.x % 32 == 0 ? (S)0 : left), all = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      if (w < warp) base += part[w];
      all += part[w];
    }
#pragma unroll
    for (int k = 0; k < ITEMS; k++) tile[threadIdx.x * (ITEMS + 1) + k] = base + own[k];
    carry += all;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      const int at = k * FIBRE_THREADS + threadIdx.x;
      const int64_t j = is_reversed ? n - 1 - (q + at) : q + at;
      if (q + at < n) y[first + j] = scan_put<T>(tile[at + at / ITEMS]);
    }
    __syncthreads();
  }
}

template <class T>
halo_status cumsum(void *y, const void *x, int64_t outer, int64_t n, int64_t inner, bool is_reversed) {
  if (outer * n * inner <= 0) return HALO_OK;
  const bool by_blocks = inner == 1 && n > 128;
  const fibres f =
      by_blocks ? cut(outer, n, 1, outer, 8192) : cut(outer, n, inner, (outer * inner + 255) / 256, 64);
  cudaStream_t stream = halo__cuda_stream();
  scratch before;
  unsigned blocks = 0;
  if (by_blocks) HALO_TRY(blocks_of(&blocks, outer * f.segments, 1));
  else HALO_TRY(blocks_of(&blocks, f.count() * f.segments, FIBRE_THREADS));
  if (f.segments > 1) {
    unsigned warps = 0;
    HALO_TRY(before.get(f.count() * f.segments * (int64_t)sizeof(scan<T>)));
    if (by_blocks)
      block_sums_kernel<T><<<blocks, FIBRE_THREADS, 0, stream>>>(before.as<scan<T>>(), (const T *)x, f);
    else segment_sums_kernel<T><<<blocks, FIBRE_THREADS, 0, stream>>>(before.as<scan<T>>(), (const T *)x, f);
    HALO_LAUNCHED("cumsum: sums of segments");
    HALO_TRY(blocks_of(&warps, f.count(), FIBRE_THREADS / 32));
    segment_scan_kernel<<<warps, FIBRE_THREADS, 0, stream>>>(before.as<scan<T>>(), f, is_reversed);
    HALO_LAUNCHED("cumsum: sums before segments");
  }
  const scan<T> *const base = before.as<scan<T>>();
  if (by_blocks)
    block_cumsum_kernel<T><<<blocks, FIBRE_THREADS, 0, stream>>>((T *)y, (const T *)x, base, f, is_reversed);
  else
    thread_cumsum_kernel<T><<<blocks, FIBRE_THREADS, 0, stream>>>((T *)y, (const T *)x, base, f, is_reversed);
  HALO_LAUNCHED("cumsum");
  return HALO_OK;
}

/* prod_bwd, without dividing: the product before each element, then the product after it. `product`
 * holds those of whole segments, then what comes before (first half) and after them. */
template <class T>
__global__ void __launch_bounds__(FIBRE_THREADS)
    segment_products_kernel(double *product, const T *x, fibres f) {
  const int64_t i = (int64_t)blockIdx.x * FIBRE_THREADS + threadIdx.x;
  if (i >= f.outer * f.segments * f.inner) return;
  const int64_t row = i / f.inner, c = i - row * f.inner, o = row / f.segments, s = row - o * f.segments;
  const int64_t end = (s + 1) * f.length < f.n ? (s + 1) * f.length : f.n;
  double p = 1;
  for (int64_t j = s * f.length; j < end; j++) p *= load(x[(o * f.n + j) * f.inner + c]);
  product[i] = p;
}
template <class T>
__global__ void __launch_bounds__(FIBRE_THREADS)
    products_around_kernel(double *before, double *after, const T *dy, fibres f) {
  const int64_t fibre = (int64_t)blockIdx.x * FIBRE_THREADS + threadIdx.x;
  if (fibre >= f.outer * f.inner) return;
  const int64_t o = fibre / f.inner, c = fibre - o * f.inner, first = o * f.segments * f.inner + c;
  double p = 1;
  for (int64_t s = f.segments - 1; s >= 0; s--) {
    after[first + s * f.inner] = p;
    p *= before[first + s * f.inner];
  }
  p = load(dy[fibre]);
  for (int64_t s = 0; s < f.segments; s++) {
    const double own = before[first + s * f.inner];
    before[first + s * f.inner] = p;
    p *= own;
  }
}
template <class T>
__global__ void __launch_bounds__(FIBRE_THREADS)
    prod_bwd_kernel(T *dx, acc_of<T> *upto, const T *x, const double *before, const double *after, fibres f) {
  const int64_t i = (int64_t)blockIdx.x * FIBRE_THREADS + threadIdx.x;
  if (i >= f.outer * f.segments * f.inner) return;
  const int64_t row = i / f.inner, c = i - row * f.inner, o = row / f.segments, s = row - o * f.segments;
  const int64_t begin = s * f.length, end = begin + f.length < f.n ? begin + f.length : f.n;
  double p = before[i];
  for (int64_t j = begin; j < end; j++) {
    const int64_t at = (o * f.n + j) * f.inner + c;
    upto[at] = (acc_of<T>)p;
    p *= load(x[at]);
  }
  p = after[i];
  for (int64_t j = end - 1; j >= begin; j--) {
    const int64_t at = (o * f.n + j) * f.inner + c;
    dx[at] = store<T>((acc_of<T>)(upto[at] * p));
    p *= load(x[at]);
  }
}

template <class T>
halo_status prod_bwd(void *dx, const void *dy, const void *x, int64_t outer, int64_t n, int64_t inner) {
  if (outer * n * inner <= 0) return HALO_OK;
  const fibres f = cut(outer, n, inner, (outer * inner + 255) / 256, 64);
  const int64_t states = f.count() * f.segments;
  cudaStream_t stream = halo__cuda_stream();
  scratch product, upto;
  unsigned blocks = 0, fibre_blocks = 0;
  HALO_TRY(product.get(2 * states * (int64_t)sizeof(double)));
  if (sizeof(T) < sizeof(acc_of<T>)) HALO_TRY(upto.get(outer * n * inner * (int64_t)sizeof(acc_of<T>)));
  double *const before = product.as<double>(), *const after = before + states;
  HALO_TRY(blocks_of(&blocks, states, FIBRE_THREADS));
  HALO_TRY(blocks_of(&fibre_blocks, f.count(), FIBRE_THREADS));
  segment_products_kernel<T><<<blocks, FIBRE_THREADS, 0, stream>>>(before, (const T *)x, f);
  HALO_LAUNCHED("prod_bwd: products of segments");
  products_around_kernel<T><<<fibre_blocks, FIBRE_THREADS, 0, stream>>>(before, after, (const T *)dy, f);
  HALO_LAUNCHED("prod_bwd: products around segments");
  acc_of<T> *const room = sizeof(T) < sizeof(acc_of<T>) ? upto.as<acc_of<T>>() : (acc_of<T> *)dx;
  prod_bwd_kernel<T><<<blocks, FIBRE_THREADS, 0, stream>>>((T *)dx, room, (const T *)x, before, after, f);
  HALO_LAUNCHED("prod_bwd");
  return HALO_OK;
}

template <class T>
halo_status sum(void *y, const void *x, int64_t outer, int64_t n, int64_t inner, double scale) {
  if constexpr (number<T>::is_real) {
    return reduce_fibres<T>("sum", sums<T, T>{(T *)y, scale}, {{x}}, outer, n, inner);
  } else {
    return reduce_fibres<T>("sum", integer_sums<T>{(int64_t *)y}, {{x}}, outer, n, inner);
  }
}

} // namespace

halo_status halo_cuda_sum(halo_dtype t, void *y, const void *x, int64_t outer, int64_t n, int64_t inner,
                          double scale) {
  HALO_ANY(t, T, return sum<T>(y, x, outer, n, inner, scale));
  return HALO_OK;
}

halo_status halo_cuda_extreme(halo_dtype t, int32_t is_max, void *y, int64_t *index, const void *x,
                              int64_t outer, int64_t n, int64_t inner) {
  HALO_ANY(
      t, T,
      return reduce_fibres<T>("extreme", extremes<T>{(T *)y, index, is_max != 0}, {{x}}, outer, n, inner));
  return HALO_OK;
}

halo_status halo_cuda_prod(halo_dtype t, void *y, const void *x, int64_t outer, int64_t n, int64_t inner) {
  HALO_REAL(t, T, return reduce_fibres<T>("prod", products<T>{(T *)y}, {{x}}, outer, n, inner));
  return HALO_OK;
}

halo_status halo_cuda_prod_bwd(halo_dtype t, void *dx, const void *dy, const void *x, int64_t outer,
                               int64_t n, int64_t inner) {
  HALO_REAL(t, T, return prod_bwd<T>(dx, dy, x, outer, n, inner));
  return HALO_OK;
}

halo_status halo_cuda_variance(halo_dtype t, void *y, const void *x, int64_t outer, int64_t n, int64_t inner,
                               double correction) {
  HALO_REAL(t, T, return variance<T>(y, x, outer, n, inner, correction));
  return HALO_OK;
}

halo_status halo_cuda_variance_bwd(halo_dtype t, void *dx, const void *dy, const void *x, int64_t outer,
                                   int64_t n, int64_t inner, double correction) {
  HALO_REAL(t, T, return variance_bwd<T>(dx, dy, x, outer, n, inner, correction));
  return HALO_OK;
}

halo_status halo_cuda_cumsum(halo_dtype t, void *y, const void *x, int64_t outer, int64_t n, int64_t inner,
                             int32_t is_reversed) {
  HALO_ANY(t, T, return cumsum<T>(y, x, outer, n, inner, is_reversed != 0));
  return HALO_OK;
}
