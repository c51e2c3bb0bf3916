/* attention_general: attention for any real type, head sizes up to 256 and blocks of any length, on any
 * device: what the mma.sync and wgmma kernels do not serve, and attention against a cache.
 *
 *   s_qk = scale log2(e) q . k    where first_q <= position_k <= position_q, else -inf
 *   forward   m' = max(m, max_k s)   p = 2^(s - m')   l = l 2^(m-m') + sum_k p   o = o 2^(m-m') + p v
 *   backward  p = 2^(s - lse log2(e))   ds = p (do . v - delta) scale
 *             dq += ds k                dk = sum_q ds q       dv = sum_q p do
 *
 * shapes    kernels.h; tiles [B,Hk,T,D], columns [n_entries,D], cache [B,capacity,Hk,D]
 * tasks     one CTA has ROWS rows (queries; keys for dk and dv) in shared memory and meets all that its
 *           lists name, KEYS at a time. LANES threads share a row: each has every LANES-th score and
 *           every LANES-th vector of the row's sums, in registers. A run of tiles and a run of columns
 *           are both a run of keys; keys of several short runs are met together. The test above holds
 *           in full runs, too, so runs are not told apart.
 * backward  two passes, dq by query and dk, dv by key: 7 products instead of 5, but nobody shares a sum,
 *           so it repeats bit for bit. A key's list comes from by_key or by_column; every key of a CTA has
 *           a cursor in it, the next query block is their minimum.
 * numbers   fp32 for F32 and BF16, fp64 for F64; products on the ordinary units
 * launch    bound by shared memory reads: 8 to 12 of 67 TFLOP/s expected of fp32. Right before fast.
 * source    online softmax: FlashAttention-2 (arXiv 2307.08691) algorithms 1, 2; split over keys for few
 *           queries: Flash-Decoding
 * twin      kernels/cpu/attention_tiles.c, attention_columns.c, attention_cached.c
 */
#include "attention.cuh"

using namespace halo;

namespace {

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

/* What the kernels read of the query side. */
struct side {
  int64_t B, H, Hk, D, G, T, n_blocks;
  double scale;
  const void *q, *grad;
  int64_t q_stride[3], grad_stride[3];
  const int32_t *position, *first, *pattern_of;
  int64_t first_stride;
  void *o, *m, *l;
  const void *lse, *delta;
  void *dq;
  bool is_narrow; /* bf16 in memory: one kernel serves it and fp32 */
};

side side_of(const halo_attention_queries *a) {
  side s = {a->n_batch, a->n_heads, a->n_kv_heads, a->head_size, a->block, a->block * a->n_blocks,
            a->n_blocks, a->scale, a->q, a->grad, {}, {}, a->position, a->first, a->pattern_of,
            a->first_stride, a->o, a->m, a->l, a->lse, a->delta, a->dq,
            a->dtype == HALO_BF16};
  for (int i = 0; i < 3; i++) {
    s.q_stride[i] = a->q_stride[i];
    s.grad_stride[i] = a->grad_stride[i];
  }
  return s;
}

/* Keys and the lists that name them: tiles when slot is NULL, else columns. */
struct keys {
  const void *k, *v;
  const int32_t *position;                     /* tiles */
  const int64_t *token_offset, *slot_offset;   /* columns */
  const int32_t *token, *slot;
  int64_t n_entries;
  const int64_t *offset; /* by_query, or by_key / by_column */
  const halo__span *run;
  void *dk, *dv;
};

keys keys_of(const halo_attention_tiles *t, const halo__rows *rows) {
  return {t->k, t->v, t->position, nullptr, nullptr, nullptr, nullptr, 0, rows->offset, rows->run,
          t->dk, t->dv};
}

keys keys_of(const halo_attention_columns *c, const halo__rows *rows) {
  return {c->k, c->v, nullptr, c->token_offset, c->slot_offset, c->token, c->slot, c->n_entries,
          rows->offset, rows->run, c->dk, c->dv};
}

/* ---- Rows in shared memory --------------------------------------------------------------------- */

/* Sizes of one kind of CTA: ROWS rows with LANES threads each meet KEYS others at a time, head sizes up
 * to DP. A vector is 16 bytes of arithmetic type; rows are a vector longer than DP, so that the rows
 * that neighbouring threads read lie in different banks. */
template <class A_, int DP_, int ROWS_, int LANES_, int KEYS_> struct shape {
  using A = A_;
  static constexpr int DP = DP_, ROWS = ROWS_, LANES = LANES_, KEYS = KEYS_;
  static constexpr int THREADS = ROWS * LANES;
  static constexpr int N = 16 / (int)sizeof(A), LD = DP + N;
  static constexpr int SCORES = KEYS / LANES, VECTORS = DP / (LANES * N);
  using vec = pack<A, N>;
  static_assert(KEYS % LANES == 0 && VECTORS >= 1, "every thread has work");
};

/* to [n of ROWS][LD] = rows at from + at(i), zeros past n and past D. */
template <class S, int ROWS, class At>
__device__ __forceinline__ void fetch(typename S::A *to, const void *from, bool is_narrow, int n, int64_t D,
                                      At at) {
  using A = typename S::A;
  for (int i = threadIdx.x; i < ROWS * S::DP; i += S::THREADS) {
    const int r = i / S::DP, d = i % S::DP;
    A x = 0;
    if (r < n && d < D) {
      const int64_t i_from = at(r) + d;
      x = is_narrow ? (A)load(((const __nv_bfloat16 *)from)[i_from]) : ((const A *)from)[i_from];
    }
    to[r * S::LD + d] = x;
  }
}

template <class S>
__device__ __forceinline__ typename S::A dot(const typename S::vec &a, const typename S::vec &b,
                                             typename S::A sum) {
#pragma unroll
  for (int i = 0; i < S::N; i++) sum += a.at[i] * b.at[i];
  return sum;
}

/* s[i] = row . other[lane + LANES i] */
template <class S>
__device__ __forceinline__ void scores(typename S::A *s, const typename S::A *row,
                                       const typename S::A *other, int lane) {
  using vec = typename S::vec;
#pragma unroll
  for (int i = 0; i < S::SCORES; i++) s[i] = 0;
#pragma unroll 4
  for (int d = 0; d < S::DP; d += S::N) {
    const vec a = *(const vec *)(row + d);
#pragma unroll
    for (int i = 0; i < S::SCORES; i++) {
      s[i] = dot<S>(a, *(const vec *)(other + (lane + S::LANES * i) * S::LD + d), s[i]);
    }
  }
}

/* sum [VECTORS] += the row's p times other [KEYS][LD]; p lies spread over the row's lanes. */
template <class S>
__device__ __forceinline__ void gather(typename S::vec *sum, const typename S::A *p,
                                       const typename S::A *other, int lane) {
  using vec = typename S::vec;
#pragma unroll
  for (int i = 0; i < S::SCORES; i++) {
#pragma unroll 1
    for (int c = 0; c < S::LANES; c++) { // not unrolled: four times less code to compile
      const typename S::A x = __shfl_sync(0xffffffffu, p[i], c, S::LANES);
      const typename S::A *from = other + (c + S::LANES * i) * S::LD + lane * S::N;
#pragma unroll
      for (int v = 0; v < S::VECTORS; v++) {
        const vec y = *(const vec *)(from + v * S::LANES * S::N);
#pragma unroll
        for (int e = 0; e < S::N; e++) sum[v].at[e] += x * y.at[e];
      }
    }
  }
}

template <class S> __device__ __forceinline__ void clear(typename S::vec *sum) {
#pragma unroll
  for (int v = 0; v < S::VECTORS; v++) {
#pragma unroll
    for (int e = 0; e < S::N; e++) sum[v].at[e] = 0;
  }
}

/* Dim of element e of a thread's vector v. */
template <class S> __device__ __forceinline__ int dim_of(int lane, int v, int e) {
  return (lane + v * S::LANES) * S::N + e;
}

/* A row's running maximum, sum and output meet KEYS keys, whose scores (masked) are in s. */
template <class S>
__device__ __forceinline__ void absorb(typename S::A *s, typename S::A *m, typename S::A *l,
                                       typename S::vec *o, const typename S::A *v, int lane) {
  using A = typename S::A;
  A top = *m;
#pragma unroll
  for (int i = 0; i < S::SCORES; i++) top = s[i] > top ? s[i] : top;
#pragma unroll
  for (int x = S::LANES / 2; x > 0; x >>= 1) {
    const A other = __shfl_xor_sync(0xffffffffu, top, x);
    top = other > top ? other : top;
  }
  const A from = top > -(A)INFINITY ? top : 0; // nothing seen: 2^-inf gives the zeros that are meant
  const A factor = exp2_of(*m - from);
  A sum = 0;
#pragma unroll
  for (int i = 0; i < S::SCORES; i++) {
    s[i] = exp2_of(s[i] - from);
    sum += s[i];
  }
#pragma unroll
  for (int x = S::LANES / 2; x > 0; x >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, x);
  *m = top;
  *l = *l * factor + sum;
#pragma unroll
  for (int i = 0; i < S::VECTORS; i++) {
#pragma unroll
    for (int e = 0; e < S::N; e++) o[i].at[e] *= factor;
  }
  gather<S>(o, s, v, lane);
}

/* ---- The keys of one row of a list -------------------------------------------------------------- */

/* A walk over runs; the same in every thread. */
struct walk {
  const halo__span *run, *end;
  int64_t at, left; /* in the current run */
};

__device__ __forceinline__ void next_run(walk *w, int64_t unit) {
  if (w->run == w->end) return;
  w->at = w->run->first * unit;
  w->left = w->run->count * unit;
  w->run++;
}

__device__ __forceinline__ walk walk_of(const keys &x, int64_t row, int64_t unit) {
  walk w = {x.run + x.offset[row], x.run + x.offset[row + 1], 0, 0};
  next_run(&w, unit);
  return w;
}

/* The next keys, KEYS at most: where their rows are and their positions. Returns how many. */
template <int KEYS>
__device__ __forceinline__ int collect(walk *w, int64_t *at, int32_t *position, const keys &x,
                                       const side &s, int64_t u, int64_t unit) {
  const int64_t kv = u / s.H * s.Hk + u % s.H / (s.H / s.Hk);
  const int64_t tokens = x.slot != nullptr ? x.token_offset[s.pattern_of[u]] : 0;
  const int64_t slots = x.slot != nullptr ? x.slot_offset[u] : 0;
  int n = 0;
  while (n < KEYS && w->left > 0) {
    const int take = (int)(w->left < KEYS - n ? w->left : KEYS - n);
    for (int i = threadIdx.x; i < take; i += blockDim.x) {
      const int64_t key = w->at + i;
      at[n + i] = (x.slot != nullptr ? (int64_t)x.slot[slots + key] : kv * s.T + key) * s.D;
      position[n + i] = x.slot != nullptr ? x.token[tokens + key] : x.position[key];
    }
    n += take;
    w->at += take;
    w->left -= take;
    if (w->left == 0) next_run(w, unit);
  }
  return n;
}

/* ---- Forward ------------------------------------------------------------------------------------ */

/* CTA: (ROWS tokens of one query block, head); long rows of a causal plan start first. */
struct task {
  int64_t u, batch, head, token, row; /* row of [B,H,T] at `token` */
  int n;                              /* rows that exist */
  int64_t list;
};

template <int ROWS> __device__ __forceinline__ task task_of(const side &s) {
  const int64_t chunks = (s.G + ROWS - 1) / ROWS, units = s.B * s.H;
  const int64_t at = s.n_blocks * chunks - 1 - blockIdx.x / units;
  task t;
  t.u = blockIdx.x % units;
  t.batch = t.u / s.H;
  t.head = t.u % s.H;
  const int64_t from = at % chunks * ROWS;
  t.n = (int)(s.G - from < ROWS ? s.G - from : ROWS);
  t.token = at / chunks * s.G + from;
  t.row = t.u * s.T + t.token;
  t.list = s.pattern_of[t.u] * s.n_blocks + at / chunks;
  return t;
}

template <class S> __global__ void __launch_bounds__(S::THREADS) forward(side a, keys x, int64_t unit) {
  using A = typename S::A;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int64_t at[S::KEYS];
  __shared__ int32_t position[S::KEYS];
  A *q = (A *)memory, *k = q + S::ROWS * S::LD, *v = k + S::KEYS * S::LD;
  const task t = task_of<S::ROWS>(a);
  if (x.offset[t.list] == x.offset[t.list + 1]) return;
  const int r = threadIdx.x / S::LANES, lane = threadIdx.x % S::LANES;
  const bool exists = r < t.n;
  const int64_t row = t.row + r;
  const int32_t last = exists ? a.position[t.token + r] : -1;
  const int32_t first = exists ? a.first[t.batch * a.first_stride + t.token + r] : INT32_MAX;
  fetch<S, S::ROWS>(q, a.q, a.is_narrow, t.n, a.D, [&](int i) {
    return t.batch * a.q_stride[0] + (t.token + i) * a.q_stride[1] + t.head * a.q_stride[2];
  });
  A m = exists ? ((A *)a.m)[row] : -(A)INFINITY, l = exists ? ((A *)a.l)[row] : 0;
  typename S::vec o[S::VECTORS];
#pragma unroll
  for (int i = 0; i < S::VECTORS; i++) {
#pragma unroll
    for (int e = 0; e < S::N; e++) {
      const int d = dim_of<S>(lane, i, e);
      o[i].at[e] = exists && d < a.D ? ((A *)a.o)[row * a.D + d] : 0;
    }
  }
  const A scale = (A)(a.scale * LOG2_E);
  walk w = walk_of(x, t.list, unit);
  for (;;) {
    __syncthreads();
    const int n = collect<S::KEYS>(&w, at, position, x, a, t.u, unit);
    if (n == 0) break;
    __syncthreads();
    fetch<S, S::KEYS>(k, x.k, a.is_narrow, n, a.D, [&](int i) { return at[i]; });
    fetch<S, S::KEYS>(v, x.v, a.is_narrow, n, a.D, [&](int i) { return at[i]; });
    __syncthreads();
    A s[S::SCORES];
    scores<S>(s, q + r * S::LD, k, lane);
#pragma unroll
    for (int i = 0; i < S::SCORES; i++) {
      const int j = lane + S::LANES * i;
      const bool sees = j < n && first <= position[j] && position[j] <= last;
      s[i] = sees ? s[i] * scale : -(A)INFINITY;
    }
    absorb<S>(s, &m, &l, o, v, lane);
  }
  if (!exists) return;
  if (lane == 0) {
    ((A *)a.m)[row] = m;
    ((A *)a.l)[row] = l;
  }
#pragma unroll
  for (int i = 0; i < S::VECTORS; i++) {
#pragma unroll
    for (int e = 0; e < S::N; e++) {
      const int d = dim_of<S>(lane, i, e);
      if (d < a.D) ((A *)a.o)[row * a.D + d] = o[i].at[e];
    }
  }
}

/* ---- Backward ----------------------------------------------------------------------------------- */

/* lse in base 2; a row that saw nothing gets +inf, so that its p is 0 and not NaN. */
template <class A> __device__ __forceinline__ A base2(A lse) {
  return lse > -(A)INFINITY ? lse * (A)LOG2_E : (A)INFINITY;
}

/* dq += , by query. */
template <class S> __global__ void __launch_bounds__(S::THREADS) backward_q(side a, keys x, int64_t unit) {
  using A = typename S::A;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int64_t at[S::KEYS];
  __shared__ int32_t position[S::KEYS];
  A *q = (A *)memory, *grad = q + S::ROWS * S::LD;
  A *k = grad + S::ROWS * S::LD, *v = k + S::KEYS * S::LD;
  const task t = task_of<S::ROWS>(a);
  if (x.offset[t.list] == x.offset[t.list + 1]) return;
  const int r = threadIdx.x / S::LANES, lane = threadIdx.x % S::LANES;
  const bool exists = r < t.n;
  const int64_t row = t.row + r;
  const int32_t last = exists ? a.position[t.token + r] : -1;
  const int32_t first = exists ? a.first[t.batch * a.first_stride + t.token + r] : INT32_MAX;
  const A lse = exists ? base2(((const A *)a.lse)[row]) : (A)INFINITY;
  const A delta = exists ? ((const A *)a.delta)[row] : 0;
  fetch<S, S::ROWS>(q, a.q, a.is_narrow, t.n, a.D, [&](int i) {
    return t.batch * a.q_stride[0] + (t.token + i) * a.q_stride[1] + t.head * a.q_stride[2];
  });
  fetch<S, S::ROWS>(grad, a.grad, a.is_narrow, t.n, a.D, [&](int i) {
    return t.batch * a.grad_stride[0] + (t.token + i) * a.grad_stride[1] + t.head * a.grad_stride[2];
  });
  typename S::vec dq[S::VECTORS];
  clear<S>(dq);
  const A scale = (A)(a.scale * LOG2_E);
  walk w = walk_of(x, t.list, unit);
  for (;;) {
    __syncthreads();
    const int n = collect<S::KEYS>(&w, at, position, x, a, t.u, unit);
    if (n == 0) break;
    __syncthreads();
    fetch<S, S::KEYS>(k, x.k, a.is_narrow, n, a.D, [&](int i) { return at[i]; });
    fetch<S, S::KEYS>(v, x.v, a.is_narrow, n, a.D, [&](int i) { return at[i]; });
    __syncthreads();
    A s[S::SCORES], dp[S::SCORES];
    scores<S>(s, q + r * S::LD, k, lane);
    scores<S>(dp, grad + r * S::LD, v, lane);
#pragma unroll
    for (int i = 0; i < S::SCORES; i++) {
      const int j = lane + S::LANES * i;
      const bool sees = j < n && first <= position[j] && position[j] <= last;
      const A p = sees ? exp2_of(s[i] * scale - lse) : 0;
      s[i] = p * (dp[i] - delta) * (A)a.scale;
    }
    gather<S>(dq, s, k, lane);
  }
  if (!exists) return;
#pragma unroll
  for (int i = 0; i < S::VECTORS; i++) {
#pragma unroll
    for (int e = 0; e < S::N; e++) {
      const int d = dim_of<S>(lane, i, e);
      if (d < a.D) ((A *)a.dq)[row * a.D + d] += dq[i].at[e];
    }
  }
}

/* Where one key stands in its list of query blocks. */
struct cursor {
  const halo__span *run, *end;
  int32_t at, left; /* at INT32_MAX: done */
};

__device__ __forceinline__ void step(cursor *c) {
  if (c->left > 0) {
    c->left--;
    c->at++;
    return;
  }
  if (c->run == c->end) {
    c->at = INT32_MAX;
    return;
  }
  c->at = c->run->first;
  c->left = c->run->count - 1;
  c->run++;
}

/* The place of `entry` in the columns of u, ascending; -1: u did not choose it. */
__device__ __forceinline__ int64_t find_column(const keys &x, int64_t u, int64_t entry) {
  int64_t low = x.slot_offset[u], high = x.slot_offset[u + 1];
  const int64_t begin = low, end = high;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (x.slot[middle] < entry) low = middle + 1;
    else high = middle;
  }
  return low < end && x.slot[low] == entry ? low - begin : -1;
}

/* Rows of dk, dv that a CTA owns: `n` of them from `begin` on, of key/value head kv. Columns: the
 * entries of a group are neighbours, from the smallest to the largest slot of its heads. */
struct chunk {
  int64_t kv, begin, end;
};

__device__ __forceinline__ chunk chunk_of(const side &a, const keys &x, int64_t per_group) {
  const int64_t group = a.H / a.Hk, kv = blockIdx.x / per_group;
  if (x.slot == nullptr) return {kv, kv * a.T, (kv + 1) * a.T};
  chunk c = {kv, INT64_MAX, 0};
  for (int64_t u = kv * group; u < (kv + 1) * group; u++) {
    if (x.slot_offset[u] == x.slot_offset[u + 1]) continue;
    const int64_t low = x.slot[x.slot_offset[u]], high = x.slot[x.slot_offset[u + 1] - 1] + 1;
    c.begin = low < c.begin ? low : c.begin;
    c.end = high > c.end ? high : c.end;
  }
  if (c.end == 0) c.begin = 0; // no column in the whole group
  return c;
}

/* dk, dv =, by key: ROWS keys of one key/value head meet the queries of its group's heads. */
template <class S>
__global__ void __launch_bounds__(S::THREADS) backward_k(side a, keys x, int64_t per_group) {
  using A = typename S::A;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int32_t key_position[S::ROWS], block;
  __shared__ uint32_t members;
  __shared__ int32_t last[S::KEYS], first[S::KEYS];
  __shared__ A lse[S::KEYS], delta[S::KEYS];
  A *k = (A *)memory, *v = k + S::ROWS * S::LD;
  A *q = v + S::ROWS * S::LD, *grad = q + S::KEYS * S::LD;
  const int r = threadIdx.x / S::LANES, lane = threadIdx.x % S::LANES;
  const int64_t group = a.H / a.Hk;
  const chunk c = chunk_of(a, x, per_group);
  const A scale = (A)(a.scale * LOG2_E);
  for (int64_t begin = c.begin + blockIdx.x % per_group * S::ROWS; begin < c.end;
       begin += per_group * S::ROWS) {
    const int n = (int)(c.end - begin < S::ROWS ? c.end - begin : S::ROWS);
    __syncthreads();
    fetch<S, S::ROWS>(k, x.k, a.is_narrow, n, a.D, [&](int i) { return (begin + i) * a.D; });
    fetch<S, S::ROWS>(v, x.v, a.is_narrow, n, a.D, [&](int i) { return (begin + i) * a.D; });
    typename S::vec dk[S::VECTORS], dv[S::VECTORS];
    clear<S>(dk);
    clear<S>(dv);
    for (int64_t u = c.kv * group; u < (c.kv + 1) * group; u++) {
      const int64_t batch = u / a.H, head = u % a.H;
      cursor own = {nullptr, nullptr, INT32_MAX, 0};
      if ((int)threadIdx.x < n) { // the first threads have a key each
        int64_t list = -1;
        if (x.slot == nullptr) {
          const int64_t key = begin + threadIdx.x - c.kv * a.T;
          list = a.pattern_of[u] * a.n_blocks + key / a.G;
          key_position[threadIdx.x] = x.position[key];
        } else {
          const int64_t column = find_column(x, u, begin + threadIdx.x);
          list = column < 0 ? -1 : x.token_offset[a.pattern_of[u]] + column;
          if (column >= 0) key_position[threadIdx.x] = x.token[list];
        }
        if (list >= 0) {
          own.run = x.run + x.offset[list];
          own.end = x.run + x.offset[list + 1];
          step(&own);
        }
      }
      for (;;) {
        if (threadIdx.x < 32) {
          int32_t next = own.at;
#pragma unroll
          for (int i = 16; i > 0; i >>= 1) next = min(next, __shfl_xor_sync(0xffffffffu, next, i));
          const uint32_t now = __ballot_sync(0xffffffffu, own.at == next);
          if (next != INT32_MAX && own.at == next) step(&own);
          if (threadIdx.x == 0) {
            block = next;
            members = now;
          }
        }
        __syncthreads();
        if (block == INT32_MAX) break;
        const bool joins = members >> r & 1;
        for (int64_t from = 0; from < a.G; from += S::KEYS) {
          const int64_t token = block * a.G + from;
          const int rows = (int)(a.G - from < S::KEYS ? a.G - from : S::KEYS);
          fetch<S, S::KEYS>(q, a.q, a.is_narrow, rows, a.D, [&](int i) {
            return batch * a.q_stride[0] + (token + i) * a.q_stride[1] + head * a.q_stride[2];
          });
          fetch<S, S::KEYS>(grad, a.grad, a.is_narrow, rows, a.D, [&](int i) {
            return batch * a.grad_stride[0] + (token + i) * a.grad_stride[1] + head * a.grad_stride[2];
          });
          for (int i = threadIdx.x; i < S::KEYS; i += S::THREADS) {
            const bool exists = i < rows;
            last[i] = exists ? a.position[token + i] : -1;
            first[i] = exists ? a.first[batch * a.first_stride + token + i] : INT32_MAX;
            lse[i] = exists ? base2(((const A *)a.lse)[u * a.T + token + i]) : (A)INFINITY;
            delta[i] = exists ? ((const A *)a.delta)[u * a.T + token + i] : 0;
          }
          __syncthreads();
          A p[S::SCORES], ds[S::SCORES];
          scores<S>(p, k + r * S::LD, q, lane);
          scores<S>(ds, v + r * S::LD, grad, lane);
#pragma unroll
          for (int i = 0; i < S::SCORES; i++) {
            const int j = lane + S::LANES * i;
            const bool sees = joins && first[j] <= key_position[r] && key_position[r] <= last[j];
            p[i] = sees ? exp2_of(p[i] * scale - lse[j]) : 0;
            ds[i] = p[i] * (ds[i] - delta[j]) * (A)a.scale;
          }
          gather<S>(dv, p, grad, lane);
          gather<S>(dk, ds, q, lane);
          __syncthreads();
        }
      }
      __syncthreads();
    }
    if (r >= n) continue;
#pragma unroll
    for (int i = 0; i < S::VECTORS; i++) {
#pragma unroll
      for (int e = 0; e < S::N; e++) {
        const int d = dim_of<S>(lane, i, e);
        if (d >= a.D) continue;
        ((A *)x.dk)[(begin + r) * a.D + d] = dk[i].at[e];
        ((A *)x.dv)[(begin + r) * a.D + d] = dv[i].at[e];
      }
    }
  }
}

/* ---- Cache -------------------------------------------------------------------------------------- */

struct cache {
  const void *q, *k, *v;
  const int64_t *key_position, *query_position;
  int64_t B, n_queries, H, Hk, D, length, capacity;
  double scale;
  int64_t rows;       /* queries times the heads of a group: what shares keys */
  int64_t row_chunks; /* of ROWS */
  int64_t splits, per_split; /* keys are shared by `splits` CTAs, per_split each */
  void *parts;        /* [splits][B * Hk * rows][D + 2]: o, m, l */
  bool is_narrow;
};

/* CTA: (ROWS rows of one batch and key/value head, one part of the keys). row = query * group + head. */
template <class S> __global__ void __launch_bounds__(S::THREADS) cached(cache a) {
  using A = typename S::A;
  extern __shared__ __align__(16) unsigned char memory[];
  A *q = (A *)memory, *k = q + S::ROWS * S::LD, *v = k + S::KEYS * S::LD;
  const int64_t split = blockIdx.x % a.splits, row_chunk = blockIdx.x / a.splits % a.row_chunks;
  const int64_t kv = blockIdx.x / a.splits / a.row_chunks, batch = kv / a.Hk, hk = kv % a.Hk;
  const int64_t group = a.H / a.Hk, row0 = row_chunk * S::ROWS;
  const int n_rows = (int)(a.rows - row0 < S::ROWS ? a.rows - row0 : S::ROWS);
  const int r = threadIdx.x / S::LANES, lane = threadIdx.x % S::LANES;
  const int64_t last = r < n_rows ? a.query_position[(row0 + r) / group] : -1;
  fetch<S, S::ROWS>(q, a.q, a.is_narrow, n_rows, a.D, [&](int i) {
    const int64_t query = (row0 + i) / group, head = hk * group + (row0 + i) % group;
    return ((batch * a.n_queries + query) * a.H + head) * a.D;
  });
  A m = -(A)INFINITY, l = 0;
  typename S::vec o[S::VECTORS];
  clear<S>(o);
  const A scale = (A)(a.scale * LOG2_E);
  const int64_t end = min(a.length, (split + 1) * a.per_split);
  for (int64_t from = split * a.per_split; from < end; from += S::KEYS) {
    const int n = (int)(end - from < S::KEYS ? end - from : S::KEYS);
    const auto at = [&](int i) { return ((batch * a.capacity + from + i) * a.Hk + hk) * a.D; };
    __syncthreads();
    fetch<S, S::KEYS>(k, a.k, a.is_narrow, n, a.D, at);
    fetch<S, S::KEYS>(v, a.v, a.is_narrow, n, a.D, at);
    __syncthreads();
    A s[S::SCORES];
    scores<S>(s, q + r * S::LD, k, lane);
#pragma unroll
    for (int i = 0; i < S::SCORES; i++) {
      const int j = lane + S::LANES * i;
      const bool sees = j < n && a.key_position[from + j] <= last;
      s[i] = sees ? s[i] * scale : -(A)INFINITY;
    }
    absorb<S>(s, &m, &l, o, v, lane);
  }
  if (r >= n_rows) return;
  A *part = (A *)a.parts + ((split * a.B * a.Hk + kv) * a.rows + row0 + r) * (a.D + 2);
  if (lane == 0) {
    part[a.D] = m;
    part[a.D + 1] = l;
  }
#pragma unroll
  for (int i = 0; i < S::VECTORS; i++) {
#pragma unroll
    for (int e = 0; e < S::N; e++) {
      const int d = dim_of<S>(lane, i, e);
      if (d < a.D) part[d] = o[i].at[e];
    }
  }
}

/* One warp a row: the parts of the splits become out and lse, in the order of the splits. */
template <class T> __global__ void cached_finish(cache a, void *out, void *lse) {
  using A = acc_of<T>;
  const int64_t rows = a.B * a.Hk * a.rows, row = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const A *parts = (const A *)a.parts + row * (a.D + 2);
  const int64_t stride = rows * (a.D + 2), group = a.H / a.Hk;
  A top = -(A)INFINITY, sum = 0;
  for (int64_t i = 0; i < a.splits; i++) top = max(top, parts[i * stride + a.D]);
  const A from = top > -(A)INFINITY ? top : 0;
  for (int64_t i = 0; i < a.splits; i++) {
    sum += parts[i * stride + a.D + 1] * exp2_of(parts[i * stride + a.D] - from);
  }
  const int64_t kv = row / a.rows, query = row % a.rows / group;
  const int64_t batch = kv / a.Hk, head = kv % a.Hk * group + row % a.rows % group;
  T *to = (T *)out + ((batch * a.n_queries + query) * a.H + head) * a.D;
  const A factor = sum == 0 ? 0 : 1 / sum;
  for (int64_t d = threadIdx.x % 32; d < a.D; d += 32) {
    A o = 0;
    for (int64_t i = 0; i < a.splits; i++) {
      o += parts[i * stride + d] * exp2_of(parts[i * stride + a.D] - from);
    }
    to[d] = store<T>(o * factor);
  }
  if (threadIdx.x % 32 == 0) {
    ((A *)lse)[(batch * a.H + head) * a.n_queries + query] =
        sum == 0 ? -(A)INFINITY : (A)(top * (A)LN_2 + log_of(sum));
  }
}

/* ---- Launches ----------------------------------------------------------------------------------- */

/* Rows of queries and of keys in shared memory: `own` and `met` of each. */
template <class S> int shared_bytes(int own, int met) {
  return (own * S::ROWS + met * S::KEYS) * S::LD * (int)sizeof(typename S::A);
}

template <class Kernel, class... Args>
halo_status launch(const char *name, Kernel kernel, int64_t blocks, int threads, int shared, Args... args) {
  if (blocks == 0) return HALO_OK;
  HALO_CHECK(blocks < INT32_MAX, HALO_EUNSUPPORTED, "%s: %lld blocks are too many", name,
             (long long)blocks);
  HALO_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<(unsigned)blocks, threads, shared, halo__cuda_stream()>>>(args...);
  HALO_LAUNCHED(name);
  return HALO_OK;
}

/* `statement` with S a shape whose rows hold head size D: 32 rows of 4 threads, for fp64 16. */
#define FOR_DIM(A, D, ...)                                                                \
  do {                                                                                    \
    constexpr int R = sizeof(A) == 8 ? 16 : 32;                                           \
    if ((D) <= 64) { using S = shape<A, 64, R, 4, R>; __VA_ARGS__; }                      \
    else if ((D) <= 128) { using S = shape<A, 128, R, 4, R>; __VA_ARGS__; }               \
    else { using S = shape<A, 256, R, 4, R>; __VA_ARGS__; }                               \
  } while (0)
#define FOR_SHAPE(dtype, D, ...)                                                          \
  do {                                                                                    \
    if ((dtype) == HALO_F64) { FOR_DIM(double, D, __VA_ARGS__); }                         \
    else { FOR_DIM(float, D, __VA_ARGS__); }                                              \
  } while (0)

template <class S> int64_t query_tasks(const side &a) {
  return a.B * a.H * a.n_blocks * ((a.G + S::ROWS - 1) / S::ROWS);
}

halo_status run_forward(const halo_attention_queries *a, const keys &x, int64_t unit) {
  const side s = side_of(a);
  FOR_SHAPE(a->dtype, s.D,
    HALO_TRY(launch("attention_general forward", forward<S>, query_tasks<S>(s), S::THREADS,
                    shared_bytes<S>(1, 2), s, x, unit)));
  return HALO_OK;
}

halo_status run_backward(const halo_attention_queries *a, const keys &by_query, const keys &by_key,
                         int64_t unit) {
  const side s = side_of(a);
  const int64_t rows = by_key.slot != nullptr ? by_key.n_entries : s.T;
  FOR_SHAPE(a->dtype, s.D,
    HALO_TRY(launch("attention_general backward dq", backward_q<S>, query_tasks<S>(s), S::THREADS,
                    shared_bytes<S>(2, 2), s, by_query, unit));
    const int64_t per_group = (rows + S::ROWS - 1) / S::ROWS;
    HALO_TRY(launch("attention_general backward dk dv", backward_k<S>, s.B * s.Hk * per_group,
                    S::THREADS, shared_bytes<S>(2, 2), s, by_key, per_group)));
  return HALO_OK;
}

template <class S>
halo_status run_cached(cache *a, void *out, void *lse) {
  a->rows = a->n_queries * (a->H / a->Hk);
  a->row_chunks = (a->rows + S::ROWS - 1) / S::ROWS;
  const int64_t groups = a->B * a->Hk * a->row_chunks;
  const int64_t wanted = (4 * (int64_t)halo__cuda_device()->multiprocessors + groups - 1) / groups;
  const int64_t most = (a->length + 4 * S::KEYS - 1) / (4 * S::KEYS); // four steps at least
  a->splits = most < 1 ? 1 : wanted < most ? wanted : most;
  a->per_split = (a->length + a->splits - 1) / a->splits;
  const int64_t all = a->B * a->Hk * a->rows;
  HALO_TRY(halo__alloc(&a->parts, a->splits * all * (a->D + 2) * (int64_t)sizeof(typename S::A), HALO_CUDA));
  halo_status status = launch("attention_cached", cached<S>, groups * a->splits, S::THREADS,
                              shared_bytes<S>(1, 2), *a);
  if (status == HALO_OK) {
    status = launch("attention_cached finish",
                    a->is_narrow ? cached_finish<__nv_bfloat16> : cached_finish<typename S::A>,
                    (all + 3) / 4, 128, 0, *a, out, lse);
  }
  halo__free(a->parts);
  return status;
}

/* Few rows (one new token): 16 threads each, 64 keys at a time; many rows: as in forward. */
template <class A> halo_status dispatch_cached(cache *a, void *out, void *lse) {
  constexpr int KEYS = sizeof(A) == 8 ? 32 : 64;
  if (a->n_queries * (a->H / a->Hk) > 8) FOR_DIM(A, a->D, return run_cached<S>(a, out, lse));
  if (a->D <= 64) return run_cached<shape<A, 64, 8, 16, KEYS>>(a, out, lse);
  if (a->D <= 128) return run_cached<shape<A, 128, 8, 16, KEYS>>(a, out, lse);
  return run_cached<shape<A, 256, 8, 16, 32>>(a, out, lse);
}

} // namespace

bool halo__general_fits(const halo_attention_queries *a) {
  return a->head_size >= 1 && a->head_size <= 256 &&
         (a->dtype == HALO_F32 || a->dtype == HALO_F64 || a->dtype == HALO_BF16);
}

halo_status halo__general_fwd(const halo_attention_queries *a, const halo_attention_tiles *x) {
  return run_forward(a, keys_of(x, x->by_query), a->block);
}

halo_status halo__general_bwd(const halo_attention_queries *a, const halo_attention_tiles *x) {
  return run_backward(a, keys_of(x, x->by_query), keys_of(x, x->by_key), a->block);
}

halo_status halo__general_columns_fwd(const halo_attention_queries *a, const halo_attention_columns *x) {
  return run_forward(a, keys_of(x, x->by_query), 1);
}

halo_status halo__general_columns_bwd(const halo_attention_queries *a, const halo_attention_columns *x) {
  return run_backward(a, keys_of(x, x->by_query), keys_of(x, x->by_column), 1);
}

halo_status halo__general_cached(halo_dtype t, void *out, void *lse, const void *q, const void *k,
                                       const void *v, const int64_t *key_position,
                                       const int64_t *query_position, int64_t n_batch, int64_t n_queries,
                                       int64_t n_heads, int64_t n_kv_heads, int64_t head_size,
                                       int64_t length, int64_t capacity, double scale) {
  HALO_CHECK(head_size <= 256, HALO_EUNSUPPORTED, "attention_cached on cuda: head size %lld, 256 at most",
             (long long)head_size);
  if (n_batch * n_queries * n_heads == 0) return HALO_OK;
  cache a = {q, k, v, key_position, query_position, n_batch, n_queries, n_heads, n_kv_heads, head_size,
             length, capacity, scale, 0, 0, 0, 0, nullptr, t == HALO_BF16};
  return t == HALO_F64 ? dispatch_cached<double>(&a, out, lse) : dispatch_cached<float>(&a, out, lse);
}
