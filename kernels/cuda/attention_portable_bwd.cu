/* attention_portable_bwd: attention backward on tensor cores by warp; see attention_portable.cu for what it
 * serves and how tiles lie in shared memory.
 *
 *   p = 2^(scale log2(e) q.k - lse log2(e))   dv += p^T do   dp = do v^T   ds = p (dp - delta)
 *   dk += scale ds^T q                        dq += scale ds k
 *
 * by key    a CTA of eight warps owns 128 keys of one key/value head (one block, or a pair of 64 whose lists
 *           it walks together) and meets 64 queries at a time, head after head of its group: dk and dv stay
 *           in registers and nobody else adds to them. p and ds go through shared memory as bf16, since
 *           the products want them in other shapes: scores and dp are 32 x 32 a warp, dk and dv
 *           32 x D/2, dq 32 x D/4. 32 keys are a pair of warps' own up to dk and dv; only dq needs ds of
 *           all, and where shared memory has room for ds of two steps (not on sm_80) half of the warps
 *           make dq one step late, so that a scheduler's two warps do not do the same at the same time.
 *           On sm_86 and 89 (99 KB) head size 128 has four warps, 64 keys and one stage.
 *           Few keys leave multiprocessors idle: then the heads of a group are dealt to several CTAs,
 *           which add to zeroed dk, dv.
 * by query  attention_portable_query.cu: dq where sums must repeat, and columns.
 * by column deterministic columns: a CTA owns 128 columns of one head and meets the query tiles that see any
 *           of them; dk and dv of each head's columns are written apart, then added to the entries head
 *           after head; dq by query.
 * work      10 D flops a pair. By key and 64 x 128 pairs, D = 128: 608 KB of shared memory traffic, 4750
 *           cycles at 128 B; products some 4100 (mma.sync): traffic is the bound
 * source    FlashAttention-2 (arXiv 2307.08691) algorithm 2
 * twin      kernels/cpu/attention_tiles.c, attention_columns.c
 */
#include "attention_portable_bwd.cuh"

using namespace halo;
using namespace halo::portable;

namespace {

/* A CTA of so many warps owns 16 keys for each and meets 64 queries a step, those of STAGES steps at hand. In
 * shared memory: k, v, the stages (queries, gradients, lse, delta), p, and ds of one step or more. */
template <int D_, int WARPS_, int STAGES_> struct room {
  static constexpr int D = D_, WARPS = WARPS_, THREADS = 32 * WARPS, KEYS = 16 * WARPS, STAGES = STAGES_;
  static constexpr int TILE = QUERIES * D * 2, STAGE = 2 * TILE + 2 * QUERIES * 4, SCORES = QUERIES * KEYS * 2;
  static constexpr int K = 0, V = KEYS * D * 2, FIRST = 2 * V, P = FIRST + STAGES * STAGE, DS = P + SCORES;
  static constexpr int bytes(int steps) { return DS + steps * SCORES; }
  typedef float gradients[2][D / 16][4]; /* dk or dv of a warp: 32 keys x D/2 */
};
template <int D> using wide = room<D, 8, 2>;
template <int D> using narrow = room<D, 4, 1>;

/* ---- Scores of 64 queries and the CTA's keys, 32 x 32 a warp --------------------------------------- */

/* Which keys a row of scores sees: open(row), then (n, e) for element e of columns 8 n and on. Here keys that
 * lie side by side, `own` the position of this lane's first. */
struct by_position {
  const side &a;
  int64_t batch, token; /* token: of the lane's first row */
  int32_t own;
  bool is_partial;
  int32_t from, to;

  __device__ __forceinline__ void open(int row) {
    from = a.first[batch * a.first_stride + token + row] - own;
    to = a.position[token + row] - own;
  }
  __device__ __forceinline__ bool operator()(int n, int e) const {
    return from <= 8 * n + e && 8 * n + e <= to;
  }
};

/* Here columns, each at a place of its own: INT32_MAX where the query block does not see it. */
struct by_token {
  const side &a;
  int64_t batch, token;
  int2 at[4];
  int32_t from, to;
  static constexpr bool is_partial = true;

  __device__ __forceinline__ void open(int row) {
    from = a.first[batch * a.first_stride + token + row];
    to = a.position[token + row];
  }
  __device__ __forceinline__ bool operator()(int n, int e) const {
    const int32_t token = e == 0 ? at[n].x : at[n].y;
    return from <= token && token <= to;
  }
};

/* The row, from the lane's first one on, of elements 2 (i % 2) and on of s[i / 2][n]. */
__device__ __forceinline__ constexpr int row_of(int i) { return i / 2 * 16 + i % 2 * 8; }

/* s = p = 2^(c s - lse), 0 where it is not seen; to shared memory (by_sum) as bf16. lse and delta: of the lane's
 * first row. */
template <int KEYS, class Seen>
__device__ __forceinline__ void put_p(uint32_t p, float (&s)[2][4][4], const float *lse, float c, Seen &seen) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float from = base2(lse[row_of(i)]);
#pragma unroll
    for (int n = 0; n < 4; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) s[i / 2][n][i % 2 * 2 + e] = fmaf(s[i / 2][n][i % 2 * 2 + e], c, -from);
    }
  }
  if (seen.is_partial) { // one branch, not one for each element
#pragma unroll
    for (int i = 0; i < 4; i++) {
      seen.open(row_of(i));
#pragma unroll
      for (int n = 0; n < 4; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          if (!seen(n, e)) s[i / 2][n][i % 2 * 2 + e] = -INFINITY;
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
      float &x = s[i / 2][n][i % 2 * 2], &y = s[i / 2][n][i % 2 * 2 + 1];
      x = exp2_fast(x);
      y = exp2_fast(y);
      put2<KEYS>(p, row_of(i), 8 * n, x, y);
    }
  }
}
/* ds = p (dp - delta), to shared memory. */
template <int KEYS>
__device__ __forceinline__ void put_ds(uint32_t ds, const float (&p)[2][4][4], const float (&dp)[2][4][4],
                                       const float *delta) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float d = delta[row_of(i)];
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const int e = i % 2 * 2;
      put2<KEYS>(ds, row_of(i), 8 * n, p[i / 2][n][e] * (dp[i / 2][n][e] - d),
                 p[i / 2][n][e + 1] * (dp[i / 2][n][e + 1] - d));
    }
  }
}

/* A meeting of the two warps of 32 keys. */
__device__ __forceinline__ void pair_sync() {
  asm volatile("bar.sync %0, 64;" ::"r"(1 + (int)threadIdx.x / 64) : "memory");
}

/* The pair has nothing to do in this step. Once a pair has passed a barrier less than others, racecheck reports
 * what those read between their own barrier and that of all against the writes after that of all, and nothing when
 * every pair passes as many; two kernels of twenty lines do not show it, and the barrier of all orders both either
 * way. So built for racecheck this pair passes one, too. */
__device__ __forceinline__ void pair_rests() {
#ifdef HALO_RACECHECK
  pair_sync();
#endif
}

/* What a lane reads and writes in every step. */
template <class R> struct lanes {
  uint32_t q_rows, k_rows, p_put, p_columns, q_columns;
  const float *lse;

  __device__ __forceinline__ lanes(unsigned char *memory) {
    constexpr int D = R::D;
    const uint32_t base = shared_address(memory);
    const int warp = threadIdx.x / 32, row0 = warp % 2 * 32, col0 = warp / 2 * 32;
    q_rows = by_16<D>(base + R::FIRST, row0);
    k_rows = by_8<D>(base + R::K, col0);
    p_put = by_sum<R::KEYS>(base + R::P, row0, col0);
    p_columns = by_8<R::KEYS>(base + R::P, 0, col0);
    q_columns = by_16<D>(base + R::FIRST, 0, warp % 2 * (D / 2));
    lse = (const float *)(memory + R::FIRST + 2 * R::TILE) + row0 + threadIdx.x % 32 / 4;
  }
};

/* One step of 32 keys by a pair of warps: scores of its keys and the stage's queries, p and the ds_at-th ds, and
 * what they add to dk and dv; `between` comes before all of p and ds are there. */
template <class R, class Seen, class Between>
__device__ __forceinline__ void key_step(typename R::gradients &dk, typename R::gradients &dv, const lanes<R> &at,
                                         int stage, int ds_at, float c, Seen &seen, Between between) {
  const uint32_t from = stage * R::STAGE, ds = R::DS - R::P + ds_at * R::SCORES;
  const float *lse = at.lse + from / 4;
  float s[2][4][4], t[2][4][4];
  clear(s);
  clear(t);
  multiply_rows<R::D>(s, at.q_rows + from, at.k_rows);
  multiply_rows<R::D>(t, at.q_rows + from + R::TILE, at.k_rows + R::V); // before the exponentials: hides them
  put_p<R::KEYS>(at.p_put, s, lse, c, seen);
  put_ds<R::KEYS>(at.p_put + ds, s, t, lse + QUERIES);
  between();
  pair_sync();
  multiply_columns<R::KEYS, R::D, QUERIES>(dv, at.p_columns, at.q_columns + from + R::TILE);
  multiply_columns<R::KEYS, R::D, QUERIES>(dk, at.p_columns + ds, at.q_columns + from);
}

/* The CTA's k and v: row r of them is row_of_key(r), and 0 from n_keys on. */
template <class R, class Row>
__device__ __forceinline__ void fetch_own(uint32_t base, const keys &x, int n_keys, const Row &row_of_key) {
#pragma unroll 4
  for (int i = threadIdx.x; i < R::KEYS * (R::D / 8); i += R::THREADS) {
    const int r = i / (R::D / 8), c = i % (R::D / 8);
    const int64_t at = r < n_keys ? row_of_key(r) * R::D + 8 * c : 0;
    copy16(tile_at<R::D>(base + R::K, r, c), x.k + at, r < n_keys);
    copy16(tile_at<R::D>(base + R::V, r, c), x.v + at, r < n_keys);
  }
}

/* Queries, gradients, lse and delta of 64 queries of a head to a stage. */
template <class R>
__device__ __forceinline__ void fetch_queries(uint32_t base, int stage, const side &a, int64_t batch, int32_t u,
                                              int64_t token) {
  constexpr int D = R::D;
  constexpr int ROWS = R::THREADS / (D / 8); // a turn of all; a multiple of 8, so that chunks stay in place
  const int head = u - (int)batch * a.H, r = threadIdx.x / (D / 8), c = threadIdx.x % (D / 8);
  const uint32_t first = base + R::FIRST + stage * R::STAGE, to = tile_at<D>(first, r, c);
  const bf16 *q = a.q + batch * a.q_stride[0] + (token + r) * a.q_stride[1] + head * a.q_stride[2] + 8 * c;
  const bf16 *grad =
      a.grad + batch * a.grad_stride[0] + (token + r) * a.grad_stride[1] + head * a.grad_stride[2] + 8 * c;
#pragma unroll
  for (int i = 0; i < QUERIES / ROWS; i++) {
    copy16(to + i * ROWS * D * 2, q + i * ROWS * a.q_stride[1]);
    copy16(to + i * ROWS * D * 2 + R::TILE, grad + i * ROWS * a.grad_stride[1]);
  }
  if (threadIdx.x < 32) {
    const float *from = threadIdx.x < 16 ? a.lse : a.delta;
    copy16(first + 2 * R::TILE + threadIdx.x * 16, from + u * a.T + token + threadIdx.x % 16 * 4);
  }
}

/* dk (times scale) and dv of the CTA's keys, rows `row0` and on. */
template <class R>
__device__ __forceinline__ void put_gradients(const keys &x, const typename R::gradients &dk,
                                              const typename R::gradients &dv, int64_t row0, int n_keys,
                                              float scale) {
  constexpr int D = R::D;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int key = warp / 2 * 32 + 16 * m + 8 * h + lane / 4;
      if (key >= n_keys) continue;
      const int64_t to = (row0 + key) * D + warp % 2 * (D / 2) + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < D / 16; n++) {
        const float2 y = make_float2(dk[m][n][2 * h] * scale, dk[m][n][2 * h + 1] * scale);
        const float2 z = make_float2(dv[m][n][2 * h], dv[m][n][2 * h + 1]);
        if (x.parts == 1) {
          *(float2 *)(x.dk + to + 8 * n) = y;
          *(float2 *)(x.dv + to + 8 * n) = z;
        } else {
          add2(x.dk + to + 8 * n, y.x, y.y);
          add2(x.dv + to + 8 * n, z.x, z.y);
        }
      }
    }
  }
}

/* ---- By key ------------------------------------------------------------------------------------- */

/* 64 queries that meet the CTA's keys. */
struct item {
  int32_t u;     /* batch * H + head; -1: no more */
  int32_t tile;  /* of 64 queries; the top bits say which of the CTA's key blocks are met whole or in part */

  __device__ __forceinline__ int64_t token() const { return (int64_t)(tile & 0xfffffff) * QUERIES; }
  __device__ __forceinline__ bool sees(int i) const { return tile >> (28 + i) & 1; }
  __device__ __forceinline__ bool is_partial(int i) const { return tile >> (30 + i) & 1; }
};

/* The query tiles of the heads of one group, one after the other; lists of `LISTS` key blocks. */
template <int G, int LISTS> struct query_walk {
  walk w[LISTS];
  int32_t u, end, part, key_block;

  __device__ __forceinline__ void open(const side &a, const keys &x) {
    const int64_t list = (int64_t)a.pattern_of[u] * a.n_blocks + key_block;
#pragma unroll
    for (int i = 0; i < LISTS; i++) {
      w[i] = walk_of(x.offset, x.run, key_block + i < a.n_blocks ? list + i : -1);
    }
    part = 0;
  }

  __device__ __forceinline__ item next(const side &a, const keys &x) {
    int32_t at;
    for (;;) {
      at = min(w[0].at, w[LISTS - 1].at);
      if (at != INT32_MAX) break;
      if (u + 1 >= end) return {-1, 0};
      u++;
      open(a, x);
    }
    uint32_t tile = (uint32_t)at * (G / QUERIES) + part;
#pragma unroll
    for (int i = 0; i < LISTS; i++) {
      if (w[i].at == at) tile |= 1u << (28 + i) | (w[i].partial ? 1u << (30 + i) : 0);
    }
    if (G == QUERIES || ++part == G / QUERIES) {
      part = 0;
#pragma unroll
      for (int i = 0; i < LISTS; i++) {
        if (w[i].at == at) walk_on(&w[i]);
      }
    }
    return {u, (int32_t)tile};
  }
};

/* dq of 64 queries, 32 rows a warp, added to memory. */
template <class R, int G>
__device__ __forceinline__ void add_dq(const side &a, const item &it, uint32_t ds_rows, uint32_t k_columns) {
  constexpr int KEYS = R::KEYS, D = R::D, WIDTH = 2 * D / R::WARPS; // columns of a warp
  float dq[2][WIDTH / 8][4];
  clear(dq);
#pragma unroll
  for (int i = 0; i < (KEYS + G - 1) / G; i++) {
    if (G < KEYS && !it.sees(i)) continue; // its ds was not written
#pragma unroll
    for (int key = i * G; key < min((i + 1) * G, KEYS); key += 16) {
      uint32_t x[2][4];
      rows_a<KEYS>(x[0], ds_rows, 0, key);
      rows_a<KEYS>(x[1], ds_rows, 16, key);
#pragma unroll
      for (int n = 0; n < WIDTH / 8; n += 2) {
        uint32_t y[4];
        columns_b<D>(y, k_columns, key, 8 * n);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          multiply(dq[m][n], x[m], y[0], y[1]);
          multiply(dq[m][n + 1], x[m], y[2], y[3]);
        }
      }
    }
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float *to = a.dq + (it.u * a.T + it.token() + warp % 2 * 32 + lane / 4) * D + warp / 2 * WIDTH + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
      add2(to + 16 * m * D + 8 * n, dq[m][n][0] * a.scale, dq[m][n][1] * a.scale);
      add2(to + (16 * m + 8) * D + 8 * n, dq[m][n][2] * a.scale, dq[m][n][3] * a.scale);
    }
  }
}

/* STEPS: of how many steps ds is kept; 0: no dq is wanted. */
template <class R, int G, int STEPS>
__global__ void __launch_bounds__(R::THREADS, 1) key_backward(side a, keys x) {
  constexpr int KEYS = R::KEYS, STAGES = R::STAGES;
  extern __shared__ __align__(256) unsigned char memory[];
  const uint32_t base = shared_address(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups = a.B * a.Hk, group = a.H / a.Hk;
  const int part = (int)blockIdx.x % x.parts, kv = (int)blockIdx.x / x.parts % groups, batch = kv / a.Hk;
  const int64_t key0 = (int64_t)((int)blockIdx.x / x.parts / groups) * KEYS; // early keys have most queries
  const int n_keys = (int)(a.T - key0 < KEYS ? a.T - key0 : KEYS);

  query_walk<G, (KEYS + G - 1) / G> walks;
  walks.key_block = (int32_t)(key0 / G);
  walks.u = batch * a.H + kv % a.Hk * group;
  walks.end = walks.u + group * (part + 1) / x.parts;
  walks.u += group * part / x.parts;
  walks.open(a, x);
  item now = walks.next(a, x), next = {-1, 0};
  const auto fetch = [&](const item &it, int stage) {
    if (it.u >= 0) fetch_queries<R>(base, stage, a, batch, it.u, it.token());
    copies_commit();
  };
  if (now.u >= 0) {
    const int64_t first = (int64_t)kv * a.T + key0;
    fetch_own<R>(base, x, n_keys, [&](int r) { return first + r; });
    fetch(now, 0);
    next = walks.next(a, x);
    if (STAGES == 2) fetch(next, 1);
    copies_wait<STAGES - 1>();
    __syncthreads();
  }

  typename R::gradients dk, dv;
  clear(dk);
  clear(dv);
  const int col0 = warp / 2 * 32, own = col0 / G; // of this warp's keys
  const bool is_late = STEPS == 2 && warp >= R::WARPS / 2;
  const lanes<R> at(memory);
  const uint32_t ds_rows = by_16<KEYS>(base + R::DS, warp % 2 * 32);
  const uint32_t k_columns = by_16<R::D>(base + R::K, 0, warp / 2 * (2 * R::D / R::WARPS));
  int stage = 0;
  item before = {-1, 0};
  // A multiprocessor's four schedulers have two warps each, one of them late: it makes dq of the step before
  // after its scores, so that products of one go on beside the exponentials of the other.
  const auto late_dq = [&] {
    if (is_late && before.u >= 0) {
      add_dq<R, G>(a, before, ds_rows + (stage ^ 1) * R::SCORES, k_columns);
    }
  };
  for (; now.u >= 0; stage ^= STAGES - 1) {
    const int ds_at = STEPS == 2 ? stage : 0;
    if (G >= KEYS || now.sees(own)) {
      const bool is_partial = now.is_partial(own);
      by_position seen = {a, batch, now.token() + warp % 2 * 32 + lane / 4,
                          is_partial ? x.position[key0 + col0] + lane % 4 * 2 : 0, is_partial};
      key_step<R>(dk, dv, at, stage, ds_at, a.scale * LOG2_E, seen, late_dq);
    } else {
      late_dq();
      pair_rests();
    }
    if (STAGES == 2) copies_wait<0>(); // the next step's queries
    __syncthreads(); // which all may read now, as ds; and nobody this step's queries
    const item then = next.u >= 0 ? walks.next(a, x) : next;
    fetch(STAGES == 2 ? then : next, stage);
    if (STEPS > 0 && !is_late) add_dq<R, G>(a, now, ds_rows + ds_at * R::SCORES, k_columns);
    if (STAGES == 1) copies_wait<0>();
    if (STAGES == 1 || STEPS == 1) __syncthreads(); // the next queries are there; ds is read
    before = now;
    now = next;
    next = then;
  }
  late_dq();
  put_gradients<R>(x, dk, dv, (int64_t)kv * a.T + key0, n_keys, a.scale);
}

/* ---- By column, sums in a fixed order ------------------------------------------------------------- */

/* The query tiles that see one column: its runs of blocks, `per` tiles each. */
struct column_walk {
  const halo__span *run, *end;
  int32_t per;

  /* The first from `from` on; INT32_MAX: none. */
  __device__ __forceinline__ int32_t next(int32_t from) {
    while (run != end && (run->first + run->count) * per <= from) run++;
    return run == end ? INT32_MAX : max(run->first * per, from);
  }
};

/* The tile that this thread's column wants next; the least of each warp's wishes goes to `wanted`. */
template <int KEYS> __device__ __forceinline__ int32_t want(column_walk *w, int32_t from, int32_t *wanted) {
  const int32_t mine = w->next(from), least = __reduce_min_sync(0xffffffffu, mine);
  if (threadIdx.x < KEYS && threadIdx.x % 32 == 0) wanted[threadIdx.x / 32] = least;
  return mine;
}
template <int N> __device__ __forceinline__ int32_t least_of(const int32_t (&wanted)[N]) {
  int32_t least = wanted[0];
#pragma unroll
  for (int i = 1; i < N; i++) least = min(least, wanted[i]);
  return least;
}

/* dk and dv of the CTA's columns of one head, rows slot_offset[u] + column of x.dk and x.dv. A thread for each
 * keeps that column's list; the CTA goes from tile to tile that any of them sees. */
template <class R> __global__ void __launch_bounds__(R::THREADS, 1) column_backward(side a, keys x, int32_t G) {
  constexpr int KEYS = R::KEYS, STAGES = R::STAGES;
  extern __shared__ __align__(256) unsigned char memory[];
  __shared__ int32_t token[2][KEYS], wanted[2][KEYS / 32];
  const uint32_t base = shared_address(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int units = a.B * a.H, u = (int)blockIdx.x % units, batch = u / a.H;
  const int64_t pattern = a.pattern_of[u], first = (int64_t)((int)blockIdx.x / units) * KEYS;
  const int64_t list = x.token_offset[pattern] + first, left = x.token_offset[pattern + 1] - list;
  if (left <= 0) return;
  const int n_keys = (int)(left < KEYS ? left : KEYS);
  const int64_t slots = x.slot_offset[u] + first;

  column_walk w = {nullptr, nullptr, G / QUERIES};
  int32_t own = INT32_MAX;
  if ((int)threadIdx.x < n_keys) {
    w.run = x.run + x.offset[list + threadIdx.x];
    w.end = x.run + x.offset[list + threadIdx.x + 1];
    own = x.token[list + threadIdx.x];
  }
  const auto fetch = [&](int32_t tile, int stage) {
    if (tile != INT32_MAX) fetch_queries<R>(base, stage, a, batch, u, (int64_t)tile * QUERIES);
    copies_commit();
  };
  int32_t mine = want<KEYS>(&w, 0, wanted[1]);
  __syncthreads();
  int32_t now = least_of(wanted[1]);
  if (now != INT32_MAX) {
    if (threadIdx.x < KEYS) token[0][threadIdx.x] = mine == now ? own : INT32_MAX;
    fetch_own<R>(base, x, n_keys, [&](int r) { return (int64_t)x.slot[slots + r]; });
  }
  fetch(now, 0);

  typename R::gradients dk, dv;
  clear(dk);
  clear(dv);
  const int col0 = warp / 2 * 32;
  const lanes<R> at(memory);
  for (int turn = 0; now != INT32_MAX; turn ^= 1) {
    const int stage = STAGES == 2 ? turn : 0;
    mine = want<KEYS>(&w, now + 1, wanted[turn]);
    copies_wait<0>();
    __syncthreads();
    const int32_t next = least_of(wanted[turn]);
    if (threadIdx.x < KEYS) token[turn ^ 1][threadIdx.x] = mine == next ? own : INT32_MAX;
    if (STAGES == 2) fetch(next, stage ^ 1);
    if (__any_sync(0xffffffffu, token[turn][col0 + lane] != INT32_MAX)) { // the same for both warps of a pair
      by_token seen = {a, batch, (int64_t)now * QUERIES + warp % 2 * 32 + lane / 4};
#pragma unroll
      for (int n = 0; n < 4; n++) seen.at[n] = *(const int2 *)&token[turn][col0 + 8 * n + lane % 4 * 2];
      key_step<R>(dk, dv, at, stage, 0, a.scale * LOG2_E, seen, [] {});
    } else {
      pair_rests();
    }
    if (STAGES == 1) {
      __syncthreads(); // the queries are read
      fetch(next, 0);
    }
    now = next;
  }
  put_gradients<R>(x, dk, dv, slots, n_keys, a.scale);
}

/* Rows of the j-th head of every group, as column_backward left them in x.dk and x.dv, are added to their
 * entries: a head has an entry once, and the heads of a group come in turn. */
template <int D> __global__ void add_columns(side a, keys x, float *dk, float *dv, int32_t j) {
  const int groups = a.B * a.Hk, kv = (int)blockIdx.x % groups;
  const int u = kv / a.Hk * a.H + kv % a.Hk * (a.H / a.Hk) + j;
  const int64_t first = x.slot_offset[u], n = (x.slot_offset[u + 1] - first) * (D / 4);
  const int64_t stride = (int64_t)gridDim.x / groups * blockDim.x;
  for (int64_t i = (int64_t)((int)blockIdx.x / groups) * blockDim.x + threadIdx.x; i < n; i += stride) {
    const int64_t row = first + i / (D / 4), from = row * D + i % (D / 4) * 4;
    const int64_t to = (int64_t)x.slot[row] * D + i % (D / 4) * 4;
    const float4 y = *(const float4 *)(x.dk + from), z = *(const float4 *)(x.dv + from);
    float4 k = *(const float4 *)(dk + to), v = *(const float4 *)(dv + to);
    *(float4 *)(dk + to) = make_float4(k.x + y.x, k.y + y.y, k.z + y.z, k.w + y.w);
    *(float4 *)(dv + to) = make_float4(v.x + z.x, v.y + z.y, v.z + z.z, v.w + z.w);
  }
}

/* ---- Launches ----------------------------------------------------------------------------------- */

keys keys_of(const halo_attention_tiles *t, const halo__rows *rows, int32_t parts) {
  return {(const bf16 *)t->k, (const bf16 *)t->v, t->position, rows->offset, rows->run, (float *)t->dk,
          (float *)t->dv, parts, nullptr, nullptr, nullptr, nullptr};
}

/* f(room) with the room that shared memory has. */
template <int D, class F> halo_status with_room(F f) {
  if (D == 64 || wide<D>::bytes(1) <= halo__attention_shared_bytes()) return f(wide<D>());
  return f(narrow<128>()); // head size 64 fits wherever bf16 products are
}

template <class R, int G> halo_status run_tiles(const halo_attention_queries *a, const halo_attention_tiles *t) {
  const side s = side_of(a, nullptr);
  const int64_t tiles = (s.T + R::KEYS - 1) / R::KEYS * s.B * s.Hk;
  int32_t parts = 1; // four CTAs a multiprocessor even out the causal triangle
  if (!a->deterministic) {
    const int64_t wanted = 4 * (int64_t)halo__cuda_device()->multiprocessors / (tiles > 0 ? tiles : 1);
    const int64_t group = s.H / s.Hk;
    parts = (int32_t)(wanted < 1 ? 1 : wanted < group ? wanted : group);
  }
  if (parts > 1) {
    const int64_t bytes = s.B * s.Hk * s.T * R::D * 4;
    HALO_TRY(halo_cuda_zero(t->dk, bytes));
    HALO_TRY(halo_cuda_zero(t->dv, bytes));
  }
  const keys x = keys_of(t, t->by_key, parts);
  if (a->deterministic) {
    HALO_TRY(launch("attention_portable backward dk dv", key_backward<R, G, 0>, tiles * parts, R::THREADS,
                    R::bytes(1), s, x));
    return run_queries(s, keys_of(t, t->by_query, 1), R::D, G);
  }
  if constexpr (R::STAGES == 2) {
    if (R::bytes(2) <= halo__attention_shared_bytes()) {
      return launch("attention_portable backward", key_backward<R, G, 2>, tiles * parts, R::THREADS, R::bytes(2),
                    s, x);
    }
  }
  return launch("attention_portable backward", key_backward<R, G, 1>, tiles * parts, R::THREADS, R::bytes(1), s,
                x);
}

keys columns_of(const halo_attention_columns *c, const halo__rows *rows, float *dk, float *dv) {
  return {(const bf16 *)c->k, (const bf16 *)c->v, nullptr, rows->offset, rows->run, dk, dv, 1,
          c->token_offset, c->slot_offset, c->token, c->slot};
}

template <class R>
halo_status run_fixed_columns(const halo_attention_queries *a, const halo_attention_columns *c) {
  const side s = side_of(a, nullptr);
  const int64_t rows = c->by_column->n_rows, most = rows < c->n_entries ? rows : c->n_entries;
  float *part = nullptr;
  HALO_TRY(halo__alloc((void **)&part, 2 * c->n_slots * R::D * (int64_t)sizeof *part, HALO_CUDA));
  const keys x = columns_of(c, c->by_column, part, part + c->n_slots * R::D);
  halo_status status = launch("attention_portable backward by column", column_backward<R>,
                              (most + R::KEYS - 1) / R::KEYS * s.B * s.H, R::THREADS, R::bytes(1), s, x,
                              (int32_t)a->block);
  for (int32_t j = 0; status == HALO_OK && j < s.H / s.Hk; j++) {
    status = launch("attention_portable columns added", add_columns<R::D>, (int64_t)s.B * s.Hk * 64, 256, 0, s, x,
                    (float *)c->dk, (float *)c->dv, j);
  }
  halo__free(part);
  HALO_TRY(status);
  return run_queries(s, columns_of(c, c->by_query, nullptr, nullptr), R::D, (int32_t)a->block);
}

} // namespace

int64_t halo__portable_bwd_shared(const halo_attention_queries *a) {
  const int64_t by_key = a->head_size == 128 ? narrow<128>::bytes(1) : wide<64>::bytes(1);
  const int64_t by_query = query_shared((int32_t)a->head_size);
  return by_key > by_query ? by_key : by_query;
}

template <int D> static halo_status run(const halo_attention_queries *a, const halo_attention_tiles *keys) {
  return with_room<D>([&](auto r) {
    return a->block == 128 ? run_tiles<decltype(r), 128>(a, keys) : run_tiles<decltype(r), 64>(a, keys);
  });
}

halo_status halo__portable_bwd(const halo_attention_queries *a, const halo_attention_tiles *keys) {
  return a->head_size == 128 ? run<128>(a, keys) : run<64>(a, keys);
}

halo_status halo__portable_columns_bwd(const halo_attention_queries *a, const halo_attention_columns *c) {
  const int64_t bytes = c->n_entries * a->head_size * 4;
  HALO_TRY(halo_cuda_zero(c->dk, bytes));
  HALO_TRY(halo_cuda_zero(c->dv, bytes));
  if (a->deterministic) {
    const auto f = [&](auto r) { return run_fixed_columns<decltype(r)>(a, c); };
    return a->head_size == 128 ? with_room<128>(f) : with_room<64>(f);
  }
  return run_queries(side_of(a, nullptr), columns_of(c, c->by_query, (float *)c->dk, (float *)c->dv),
                     (int32_t)a->head_size, (int32_t)a->block);
}
