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
 *           Few keys leave multiprocessors idle: then the heads of a group are dealt to several CTAs,
 *           which add to zeroed dk, dv.
 * by query  a CTA of four warps owns 64 queries of one head and meets 64 keys at a time; p and ds stay in
 *           registers as operands of the next product. Two uses: dq alone, when sums must repeat
 *           (deterministic: 7 products instead of 5), and columns, whose gathered keys are listed by
 *           query: dk and dv of 64 columns are added to their entries in memory.
 * by column deterministic columns: a CTA owns 128 columns of one head and meets the query tiles that see any
 *           of them; dk and dv of each head's columns are written apart, then added to the entries head
 *           after head; dq by query.
 * work      10 D flops a pair. By key and 64 x 128 pairs, D = 128: 608 KB of shared memory traffic, 4750
 *           cycles at 128 B; products some 4100 (mma.sync): traffic is the bound
 * source    FlashAttention-2 (arXiv 2307.08691) algorithm 2
 * twin      kernels/cpu/attention_tiles.c, attention_columns.c
 */
#include "attention_portable.cuh"

using namespace halo;
using namespace halo::portable;
using namespace halo::mma;

namespace {

typedef __nv_bfloat16 bf16;

struct keys {
  const bf16 *k, *v;
  const int32_t *position;
  const int64_t *offset; /* by_key, or by_query */
  const halo__span *run;
  float *dk, *dv;
  int32_t parts; /* of the heads of a group; more than one: dk, dv are added to */
  /* columns */
  const int64_t *token_offset, *slot_offset;
  const int32_t *token, *slot;
};

__device__ __forceinline__ void add2(float *to, float x, float y) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y) : "memory");
#else
  atomicAdd(to, x);
  atomicAdd(to + 1, y);
#endif
}

/* Fragment d of columns c and on: its two rows are added to `low` and `high`. On sm_90 neighbouring lanes
 * swap halves, so that each has four elements of one row. NULL rows are left out. */
__device__ __forceinline__ void add_fragment(float *low, float *high, const float (&d)[4], float scale) {
  const int pair = threadIdx.x % 4;
#if __CUDA_ARCH__ >= 900
  const bool odd = pair & 1;
  const float give0 = odd ? d[0] : d[2], give1 = odd ? d[1] : d[3];
  const float got0 = __shfl_xor_sync(0xffffffffu, give0, 1), got1 = __shfl_xor_sync(0xffffffffu, give1, 1);
  float *to = odd ? high : low;
  if (to == nullptr) return;
  const float x0 = odd ? got0 : d[0], x1 = odd ? got1 : d[1], x2 = odd ? d[2] : got0, x3 = odd ? d[3] : got1;
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + pair / 2 * 4), "f"(x0 * scale),
               "f"(x1 * scale), "f"(x2 * scale), "f"(x3 * scale)
               : "memory");
#else
  if (low != nullptr) add2(low + pair * 2, d[0] * scale, d[1] * scale);
  if (high != nullptr) add2(high + pair * 2, d[2] * scale, d[3] * scale);
#endif
}

template <int M, int N> __device__ __forceinline__ void clear(float (&d)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) d[m][n][e] = 0;
    }
  }
}

/* d [16 M, 8 N] += rows of x (by_16) times rows of y (by_8), over D columns. */
template <int D, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&d)[M][N][4], uint32_t x, uint32_t y) {
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) rows_a<D>(a[m], x, 16 * m, k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      rows_b<D>(b, y, 8 * n, k);
#pragma unroll
      for (int m = 0; m < M; m++) {
        multiply(d[m][n], a[m], b[0], b[1]);
        multiply(d[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

/* d += columns of x (by_8, in a tile of C columns) times columns of y (by_16), over `ROWS` rows. */
template <int C, int D, int ROWS, int M, int N>
__device__ __forceinline__ void multiply_columns(float (&d)[M][N][4], uint32_t x, uint32_t y) {
#pragma unroll
  for (int k = 0; k < ROWS; k += 16) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) columns_a<C>(a[m], x, k, 16 * m);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      columns_b<D>(b, y, k, 8 * n);
#pragma unroll
      for (int m = 0; m < M; m++) {
        multiply(d[m][n], a[m], b[0], b[1]);
        multiply(d[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

/* lse in base 2; a row that saw nothing gets +inf: its p is 0 and not NaN. */
__device__ __forceinline__ float base2(float lse) { return lse > -INFINITY ? lse * LOG2_E : INFINITY; }

/* Rows and columns (0, 1) of a fragment of a sum, as bf16; `at`: by_sum. */
template <int C>
__device__ __forceinline__ void put2(uint32_t at, int row, int column, float x, float y) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(from_there<C>(at, row, column)), "r"(pack2(x, y)) : "memory");
}

/* ---- Scores of 64 queries and 128 keys, 32 x 32 a warp -------------------------------------------- */

enum { WARPS = 8, THREADS = 32 * WARPS, KEYS = 128, QUERIES = 64 };

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
template <class Seen>
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

/* The pair has nothing to do in this step. Where one pair passes a barrier less than the others, racecheck reports
 * reads before the barrier of all against writes after it, and nothing once every pair passes as many (seen); so
 * built for it this pair passes one, too. */
__device__ __forceinline__ void pair_rests() {
#ifdef HALO_RACECHECK
  pair_sync();
#endif
}

/* Shared memory of a CTA that owns 128 keys and meets 64 queries a step, two steps' queries at hand, and ds of
 * one step or of two: then dq of one is made while the next one's scores are. */
template <int D, int STEPS> struct room {
  static constexpr int TILE = QUERIES * D * 2, SCORES = QUERIES * KEYS * 2;
  static constexpr int STAGE = 2 * TILE + 2 * QUERIES * 4; /* queries, gradients, lse, delta */
  static constexpr int K = 0, V = KEYS * D * 2, STAGES = 2 * KEYS * D * 2, P = STAGES + 2 * STAGE, DS = P + SCORES;
  static constexpr int BYTES = DS + STEPS * SCORES;
};

/* What a lane reads and writes in every step. */
template <int D> struct lanes { /* the same for any STEPS: ds comes last */
  uint32_t q_rows, k_rows, p_put, p_columns, q_columns;
  const float *lse;

  __device__ __forceinline__ lanes(unsigned char *memory) {
    typedef room<D, 1> R;
    const uint32_t base = shared_address(memory);
    const int warp = threadIdx.x / 32, row0 = warp % 2 * 32, col0 = warp / 2 * 32;
    q_rows = by_16<D>(base + R::STAGES, row0);
    k_rows = by_8<D>(base + R::K, col0);
    p_put = by_sum<KEYS>(base + R::P, row0, col0);
    p_columns = by_8<KEYS>(base + R::P, 0, col0);
    q_columns = by_16<D>(base + R::STAGES, 0, warp % 2 * (D / 2));
    lse = (const float *)(memory + R::STAGES + 2 * R::TILE) + row0 + threadIdx.x % 32 / 4;
  }
};

/* One step of 32 keys by a pair of warps: scores of its keys and the stage's queries, p and the ds_at-th ds, and
 * what they add to dk and dv; `between` comes before all of p and ds are there. */
template <int D, class Seen, class Between>
__device__ __forceinline__ void key_step(float (&dk)[2][D / 16][4], float (&dv)[2][D / 16][4],
                                         const lanes<D> &at, int stage, int ds_at, float c, Seen &seen, Between between) {
  typedef room<D, 1> R;
  const uint32_t from = stage * R::STAGE, ds = R::DS - R::P + ds_at * R::SCORES;
  const float *lse = at.lse + from / 4;
  float s[2][4][4], t[2][4][4];
  clear(s);
  clear(t);
  multiply_rows<D>(s, at.q_rows + from, at.k_rows);
  multiply_rows<D>(t, at.q_rows + from + R::TILE, at.k_rows + R::V); // before the exponentials: hides them
  put_p(at.p_put, s, lse, c, seen);
  put_ds(at.p_put + ds, s, t, lse + QUERIES);
  between();
  pair_sync();
  multiply_columns<KEYS, D, QUERIES>(dv, at.p_columns, at.q_columns + from + R::TILE);
  multiply_columns<KEYS, D, QUERIES>(dk, at.p_columns + ds, at.q_columns + from);
}

/* dk (times scale) and dv of the CTA's keys, rows `row0` and on: 32 x D/2 a warp. */
template <int D>
__device__ __forceinline__ void put_gradients(const keys &x, const float (&dk)[2][D / 16][4],
                                              const float (&dv)[2][D / 16][4], int64_t row0, int n_keys,
                                              float scale) {
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

/* The query tiles of the heads of one group, one after the other. */
template <int G> struct query_walk {
  walk w[KEYS / G];
  int32_t u, end, part, key_block;

  __device__ __forceinline__ void open(const side &a, const keys &x) {
    const int64_t list = (int64_t)a.pattern_of[u] * a.n_blocks + key_block;
#pragma unroll
    for (int i = 0; i < KEYS / G; i++) {
      w[i] = walk_of(x.offset, x.run, key_block + i < a.n_blocks ? list + i : -1);
    }
    part = 0;
  }

  __device__ __forceinline__ item next(const side &a, const keys &x) {
    int32_t at;
    for (;;) {
      at = min(w[0].at, w[KEYS / G - 1].at);
      if (at != INT32_MAX) break;
      if (u + 1 >= end) return {-1, 0};
      u++;
      open(a, x);
    }
    uint32_t tile = (uint32_t)at * (G / QUERIES) + part;
#pragma unroll
    for (int i = 0; i < KEYS / G; i++) {
      if (w[i].at == at) tile |= 1u << (28 + i) | (w[i].partial ? 1u << (30 + i) : 0);
    }
    if (G == QUERIES || ++part == G / QUERIES) {
      part = 0;
#pragma unroll
      for (int i = 0; i < KEYS / G; i++) {
        if (w[i].at == at) walk_on(&w[i]);
      }
    }
    return {u, (int32_t)tile};
  }
};

/* Queries, gradients, lse and delta of 64 queries of a head to a stage. */
template <int D>
__device__ __forceinline__ void fetch_queries(uint32_t stage, const side &a, int64_t batch, int32_t u,
                                              int64_t token) {
  constexpr int ROWS = THREADS / (D / 8); // a turn of all threads; a multiple of 8, so that chunks stay in place
  const int head = u - (int)batch * a.H, r = threadIdx.x / (D / 8), c = threadIdx.x % (D / 8);
  const uint32_t to = tile_at<D>(stage, r, c);
  const bf16 *q = a.q + batch * a.q_stride[0] + (token + r) * a.q_stride[1] + head * a.q_stride[2] + 8 * c;
  const bf16 *grad =
      a.grad + batch * a.grad_stride[0] + (token + r) * a.grad_stride[1] + head * a.grad_stride[2] + 8 * c;
#pragma unroll
  for (int i = 0; i < QUERIES / ROWS; i++) {
    copy16(to + i * ROWS * D * 2, q + i * ROWS * a.q_stride[1]);
    copy16(to + i * ROWS * D * 2 + room<D, 1>::TILE, grad + i * ROWS * a.grad_stride[1]);
  }
  if (threadIdx.x < 32) {
    const float *from = threadIdx.x < 16 ? a.lse : a.delta;
    copy16(stage + 2 * room<D, 1>::TILE + threadIdx.x * 16, from + u * a.T + token + threadIdx.x % 16 * 4);
  }
}

/* dq of 64 queries, 32 x D/4 a warp, added to memory. */
template <int D, int G>
__device__ __forceinline__ void add_dq(const side &a, const item &it, uint32_t ds_rows, uint32_t k_columns) {
  float dq[2][D / 32][4];
  clear(dq);
#pragma unroll
  for (int i = 0; i < KEYS / G; i++) {
    if (G < KEYS && !it.sees(i)) continue; // its ds was not written
#pragma unroll
    for (int key = i * G; key < (i + 1) * G; key += 16) {
      uint32_t x[2][4];
      rows_a<KEYS>(x[0], ds_rows, 0, key);
      rows_a<KEYS>(x[1], ds_rows, 16, key);
#pragma unroll
      for (int n = 0; n < D / 32; n += 2) {
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
  float *to = a.dq + (it.u * a.T + it.token() + warp % 2 * 32 + lane / 4) * D + warp / 2 * (D / 4) + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int n = 0; n < D / 32; n++) {
      add2(to + 16 * m * D + 8 * n, dq[m][n][0] * a.scale, dq[m][n][1] * a.scale);
      add2(to + (16 * m + 8) * D + 8 * n, dq[m][n][2] * a.scale, dq[m][n][3] * a.scale);
    }
  }
}

/* STEPS: of how many steps ds is kept; 0: no dq is wanted. */
template <int D, int G, int STEPS>
__global__ void __launch_bounds__(THREADS, 1) key_backward(side a, keys x) {
  typedef room<D, 1> R;
  extern __shared__ __align__(256) unsigned char memory[];
  const uint32_t base = shared_address(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups = a.B * a.Hk, group = a.H / a.Hk;
  const int part = (int)blockIdx.x % x.parts, kv = (int)blockIdx.x / x.parts % groups, batch = kv / a.Hk;
  const int64_t key0 = (int64_t)((int)blockIdx.x / x.parts / groups) * KEYS; // early keys have most queries
  const int n_keys = (int)(a.T - key0 < KEYS ? a.T - key0 : KEYS);

  query_walk<G> walks;
  walks.key_block = (int32_t)(key0 / G);
  walks.u = batch * a.H + kv % a.Hk * group;
  walks.end = walks.u + group * (part + 1) / x.parts;
  walks.u += group * part / x.parts;
  walks.open(a, x);
  item now = walks.next(a, x), next = {-1, 0};
  if (now.u >= 0) {
    const int64_t from = ((int64_t)kv * a.T + key0) * D;
#pragma unroll 4
    for (int i = threadIdx.x; i < KEYS * (D / 8); i += THREADS) {
      const int r = i / (D / 8), c = i % (D / 8);
      const int64_t at = r < n_keys ? from + (int64_t)r * D + 8 * c : 0;
      copy16(tile_at<D>(base + R::K, r, c), x.k + at, r < n_keys);
      copy16(tile_at<D>(base + R::V, r, c), x.v + at, r < n_keys);
    }
    fetch_queries<D>(base + R::STAGES, a, batch, now.u, now.token());
    copies_commit();
    next = walks.next(a, x);
    if (next.u >= 0) fetch_queries<D>(base + R::STAGES + R::STAGE, a, batch, next.u, next.token());
    copies_commit();
    copies_wait<1>();
    __syncthreads();
  }

  float dk[2][D / 16][4], dv[2][D / 16][4];
  clear(dk);
  clear(dv);
  const int col0 = warp / 2 * 32, own = col0 / G; // of this warp's keys
  const bool is_late = STEPS == 2 && warp >= WARPS / 2;
  const lanes<D> at(memory);
  const uint32_t ds_rows = by_16<KEYS>(base + R::DS, warp % 2 * 32);
  const uint32_t k_columns = by_16<D>(base + R::K, 0, warp / 2 * (D / 4));
  int stage = 0;
  item before = {-1, 0};
  // A multiprocessor's four schedulers have two warps each, one of them late: it makes dq of the step before
  // after its scores, so that products of one go on beside the exponentials of the other.
  const auto late_dq = [&] {
    if (is_late && before.u >= 0) {
      add_dq<D, G>(a, before, ds_rows + (stage ^ 1) * R::SCORES, k_columns);
    }
  };
  for (; now.u >= 0; stage ^= 1) {
    const int ds_at = STEPS == 2 ? stage : 0;
    if (G == KEYS || now.sees(own)) {
      const bool is_partial = now.is_partial(own);
      by_position seen = {a, batch, now.token() + warp % 2 * 32 + lane / 4,
                          is_partial ? x.position[key0 + col0] + lane % 4 * 2 : 0, is_partial};
      key_step<D>(dk, dv, at, stage, ds_at, a.scale * LOG2_E, seen, late_dq);
    } else {
      late_dq();
      pair_rests();
    }
    copies_wait<0>(); // the next step's queries
    __syncthreads();  // which all may read now, as ds; and nobody this step's queries
    const item then = next.u >= 0 ? walks.next(a, x) : next;
    if (then.u >= 0) fetch_queries<D>(base + R::STAGES + stage * R::STAGE, a, batch, then.u, then.token());
    copies_commit();
    if (STEPS > 0 && !is_late) add_dq<D, G>(a, now, ds_rows + ds_at * R::SCORES, k_columns);
    if (STEPS == 1) __syncthreads(); // ds is read
    before = now;
    now = next;
    next = then;
  }
  late_dq();
  put_gradients<D>(x, dk, dv, (int64_t)kv * a.T + key0, n_keys, a.scale);
}

/* ---- By query ----------------------------------------------------------------------------------- */

enum { Q_WARPS = 4, Q_THREADS = 32 * Q_WARPS, TOGETHER = 64 };

/* The keys of one block's list, 64 at a time: rows of k, v (and their gradients) and positions. A run of
 * tiles is a run of keys, too; `unit` keys an item. */
struct key_walk {
  const halo__span *run, *end;
  int64_t at, left;

  __device__ __forceinline__ int next(const keys &x, int64_t slots, int64_t tokens, int64_t kv_row, int unit,
                                      int64_t *rows, int32_t *positions, bool *is_partial) {
    int n = 0;
    bool any = false;
    while (n < TOGETHER && (left > 0 || run != end)) {
      if (left == 0) {
        at = (int64_t)run->first * unit;
        left = (int64_t)run->count * unit;
        run++;
      }
      any = any || run[-1].partial;
      const int take = (int)(left < TOGETHER - n ? left : TOGETHER - n);
      if ((int)threadIdx.x >= n && (int)threadIdx.x < n + take) {
        const int64_t key = at + threadIdx.x - n;
        rows[threadIdx.x] = x.slot != nullptr ? x.slot[slots + key] : kv_row + key;
        positions[threadIdx.x] = x.slot != nullptr ? x.token[tokens + key] : x.position[key];
      }
      n += take;
      at += take;
      left -= take;
    }
    *is_partial = any;
    return n;
  }
};

template <int D>
__device__ __forceinline__ void fetch_keys(uint32_t k, uint32_t v, const keys &x, const int64_t *rows,
                                           int n) {
#pragma unroll
  for (int i = 0; i < TOGETHER * (D / 8) / Q_THREADS; i++) {
    const int at = i * Q_THREADS + threadIdx.x, r = at / (D / 8), c = at % (D / 8);
    const int64_t key = r < n ? rows[r] : 0;
    copy16(tile_at<D>(k, r, c), x.k + key * D + 8 * c, r < n);
    copy16(tile_at<D>(v, r, c), x.v + key * D + 8 * c, r < n);
  }
}

template <int D> constexpr int query_shared() {
  return (2 * QUERIES + 4 * TOGETHER) * D * 2 + QUERIES * TOGETHER * 2;
}

/* dx rows [entry,D] += factor (x^T y) for the columns at hand: 16 keys a warp. */
template <int D>
__device__ __forceinline__ void scatter(float *dx, const int64_t *rows, int n, uint32_t x, uint32_t y,
                                        float factor) {
  const int key0 = threadIdx.x / 32 * 16, key = key0 + threadIdx.x % 32 / 4;
  float *low = key < n ? dx + rows[key] * D : nullptr, *high = key + 8 < n ? dx + rows[key + 8] * D : nullptr;
#pragma unroll
  for (int part = 0; part < D; part += 64) {
    float d[1][8][4];
    clear(d);
    multiply_columns<TOGETHER, D, QUERIES>(d, by_8<TOGETHER>(x, 0, key0), by_16<D>(y, 0, part));
#pragma unroll
    for (int i = 0; i < 8; i++) {
      add_fragment(low != nullptr ? low + part + 8 * i : nullptr,
                   high != nullptr ? high + part + 8 * i : nullptr, d[0][i], factor);
    }
  }
}

template <int D, bool HAS_COLUMNS>
__global__ void __launch_bounds__(Q_THREADS, 2) query_backward(side a, keys x, int32_t G) {
  constexpr int TILE = TOGETHER * D * 2;
  extern __shared__ __align__(256) unsigned char memory[];
  __shared__ int64_t rows[3][TOGETHER];
  __shared__ int32_t positions[3][TOGETHER];
  const uint32_t q = shared_address(memory), grad = q + QUERIES * D * 2, stage0 = grad + QUERIES * D * 2;
  const uint32_t ds = stage0 + 4 * TILE;
  const int units = a.B * a.H, lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 16;
  const int64_t token = (a.T / QUERIES - 1 - (int)blockIdx.x / units) * QUERIES;
  const int u = (int)blockIdx.x % units, batch = u / a.H, head = u % a.H;
  const int64_t pattern = a.pattern_of[u], list = pattern * a.n_blocks + token / G;
  key_walk w = {x.run + x.offset[list], x.run + x.offset[list + 1], 0, 0};
  if (w.run == w.end) return;
  const int64_t slots = HAS_COLUMNS ? x.slot_offset[u] : 0;
  const int64_t tokens = HAS_COLUMNS ? x.token_offset[pattern] : 0;
  const int64_t kv_row = (int64_t)(batch * a.Hk + head / (a.H / a.Hk)) * a.T;
  const int unit = HAS_COLUMNS ? 1 : G;
  bool is_partial, next_partial, then_partial;
  int n = w.next(x, slots, tokens, kv_row, unit, rows[0], positions[0], &is_partial);
  int next = w.next(x, slots, tokens, kv_row, unit, rows[1], positions[1], &next_partial);
  __syncthreads();
  const bf16 *from = a.q + batch * a.q_stride[0] + token * a.q_stride[1] + head * a.q_stride[2];
  const bf16 *from_grad =
      a.grad + batch * a.grad_stride[0] + token * a.grad_stride[1] + head * a.grad_stride[2];
#pragma unroll
  for (int i = 0; i < QUERIES * (D / 8) / Q_THREADS; i++) {
    const int at = i * Q_THREADS + threadIdx.x, r = at / (D / 8), c = at % (D / 8);
    copy16(tile_at<D>(q, r, c), from + r * a.q_stride[1] + 8 * c);
    copy16(tile_at<D>(grad, r, c), from_grad + r * a.grad_stride[1] + 8 * c);
  }
  fetch_keys<D>(stage0, stage0 + TILE, x, rows[0], n);
  copies_commit();
  float lse[2], delta[2];
  int32_t first[2], last[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int64_t row = token + row0 + 8 * h + lane / 4;
    lse[h] = base2(a.lse[u * a.T + row]);
    delta[h] = a.delta[u * a.T + row];
    first[h] = a.first[batch * a.first_stride + row];
    last[h] = a.position[row];
  }
  float dq[1][D / 8][4];
  clear(dq);
  const float c = a.scale * LOG2_E;
  for (int stage = 0, slot = 0; n > 0; stage ^= 1, slot = slot == 2 ? 0 : slot + 1) {
    copies_wait<0>();
    __syncthreads();
    const int next_slot = slot == 2 ? 0 : slot + 1, then_slot = next_slot == 2 ? 0 : next_slot + 1;
    if (next > 0) {
      const uint32_t to = stage0 + (stage ^ 1) * 2 * TILE;
      fetch_keys<D>(to, to + TILE, x, rows[next_slot], next);
    }
    copies_commit();
    const int then = w.next(x, slots, tokens, kv_row, unit, rows[then_slot], positions[then_slot],
                            &then_partial);
    const uint32_t k = stage0 + stage * 2 * TILE, v = k + TILE;
    float s[1][8][4], t[1][8][4];
    clear(s);
    clear(t);
    multiply_rows<D>(s, by_16<D>(q, row0), by_8<D>(k));
    multiply_rows<D>(t, by_16<D>(grad, row0), by_8<D>(v));
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int key = 8 * i + lane % 4 * 2 + e % 2, h = e / 2;
        float y = exp2_fast(fmaf(s[0][i][e], c, -lse[h]));
        if (is_partial || n < TOGETHER) {
          const bool sees = key < n && first[h] <= positions[slot][key] && positions[slot][key] <= last[h];
          y = sees ? y : 0;
        }
        s[0][i][e] = y;
        t[0][i][e] = y * (t[0][i][e] - delta[h]);
      }
    }
#pragma unroll
    for (int key = 0; key < TOGETHER; key += 16) {
      const float(&left)[4] = t[0][key / 8], (&right)[4] = t[0][key / 8 + 1];
      const uint32_t b[4] = {pack2(left[0], left[1]), pack2(left[2], left[3]), pack2(right[0], right[1]),
                             pack2(right[2], right[3])};
#pragma unroll
      for (int m = 0; m < D / 8; m += 2) {
        uint32_t y[4];
        columns_b<D>(y, by_16<D>(k), key, 8 * m);
        multiply(dq[0][m], b, y[0], y[1]);
        multiply(dq[0][m + 1], b, y[2], y[3]);
      }
    }
    if (HAS_COLUMNS && x.dk != nullptr) { // one tile serves p and then ds
#pragma unroll
      for (int i = 0; i < 16; i++) {
        put2<TOGETHER>(by_sum<TOGETHER>(ds, row0), i % 2 * 8, i / 2 * 8, s[0][i / 2][i % 2 * 2],
                       s[0][i / 2][i % 2 * 2 + 1]);
      }
      __syncthreads();
      scatter<D>(x.dv, rows[slot], n, ds, grad, 1);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 16; i++) {
        put2<TOGETHER>(by_sum<TOGETHER>(ds, row0), i % 2 * 8, i / 2 * 8, t[0][i / 2][i % 2 * 2],
                       t[0][i / 2][i % 2 * 2 + 1]);
      }
      __syncthreads();
      scatter<D>(x.dk, rows[slot], n, ds, q, a.scale);
    }
    n = next;
    next = then;
    is_partial = next_partial;
    next_partial = then_partial;
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float *to = a.dq + (u * a.T + token + row0 + 8 * h + lane / 4) * D + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      float2 y = *(float2 *)(to + 8 * i);
      y.x += dq[0][i][2 * h] * a.scale;
      y.y += dq[0][i][2 * h + 1] * a.scale;
      *(float2 *)(to + 8 * i) = y;
    }
  }
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
__device__ __forceinline__ int32_t want(column_walk *w, int32_t from, int32_t *wanted) {
  const int32_t mine = w->next(from), least = __reduce_min_sync(0xffffffffu, mine);
  if (threadIdx.x < KEYS && threadIdx.x % 32 == 0) wanted[threadIdx.x / 32] = least;
  return mine;
}
__device__ __forceinline__ int32_t least_of(const int32_t *wanted) {
  return min(min(wanted[0], wanted[1]), min(wanted[2], wanted[3]));
}

/* dk and dv of 128 columns of one head, rows slot_offset[u] + column of x.dk and x.dv. A thread of the first
 * 128 keeps one column's list; the CTA goes from tile to tile that any of them sees. */
template <int D> __global__ void __launch_bounds__(THREADS, 1) column_backward(side a, keys x, int32_t G) {
  typedef room<D, 1> R;
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
  int32_t mine = want(&w, 0, wanted[1]);
  __syncthreads();
  int32_t now = least_of(wanted[1]);
  if (now != INT32_MAX) {
    if (threadIdx.x < KEYS) token[0][threadIdx.x] = mine == now ? own : INT32_MAX;
#pragma unroll 4
    for (int i = threadIdx.x; i < KEYS * (D / 8); i += THREADS) {
      const int r = i / (D / 8), c = i % (D / 8);
      const int64_t at = r < n_keys ? (int64_t)x.slot[slots + r] * D + 8 * c : 0;
      copy16(tile_at<D>(base + R::K, r, c), x.k + at, r < n_keys);
      copy16(tile_at<D>(base + R::V, r, c), x.v + at, r < n_keys);
    }
    fetch_queries<D>(base + R::STAGES, a, batch, u, (int64_t)now * QUERIES);
  }
  copies_commit();

  float dk[2][D / 16][4], dv[2][D / 16][4];
  clear(dk);
  clear(dv);
  const int col0 = warp / 2 * 32;
  const lanes<D> at(memory);
  for (int stage = 0; now != INT32_MAX; stage ^= 1) {
    mine = want(&w, now + 1, wanted[stage]);
    copies_wait<0>();
    __syncthreads();
    const int32_t next = least_of(wanted[stage]);
    if (threadIdx.x < KEYS) token[stage ^ 1][threadIdx.x] = mine == next ? own : INT32_MAX;
    if (next != INT32_MAX) {
      fetch_queries<D>(base + R::STAGES + (stage ^ 1) * R::STAGE, a, batch, u, (int64_t)next * QUERIES);
    }
    copies_commit();
    if (__any_sync(0xffffffffu, token[stage][col0 + lane] != INT32_MAX)) { // the same for both warps of a pair
      by_token seen = {a, batch, (int64_t)now * QUERIES + warp % 2 * 32 + lane / 4};
#pragma unroll
      for (int n = 0; n < 4; n++) seen.at[n] = *(const int2 *)&token[stage][col0 + 8 * n + lane % 4 * 2];
      key_step<D>(dk, dv, at, stage, 0, a.scale * LOG2_E, seen, [] {});
    } else {
      pair_rests();
    }
    now = next;
  }
  put_gradients<D>(x, dk, dv, slots, n_keys, a.scale);
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

template <int D> halo_status run_queries(const side &s, const keys &x, int32_t G) {
  const bool has_columns = x.slot != nullptr;
  return launch("attention_portable backward by query",
                has_columns ? query_backward<D, true> : query_backward<D, false>,
                s.B * s.H * (s.T / QUERIES), Q_THREADS, query_shared<D>(), s, x, G);
}

template <int D, int G>
halo_status run_tiles(const halo_attention_queries *a, const halo_attention_tiles *t) {
  const side s = side_of(a, nullptr);
  const int64_t tiles = (s.T + KEYS - 1) / KEYS * s.B * s.Hk;
  int32_t parts = 1; // four CTAs a multiprocessor even out the causal triangle
  if (!a->deterministic) {
    const int64_t wanted = 4 * (int64_t)halo__cuda_device()->multiprocessors / (tiles > 0 ? tiles : 1);
    const int64_t group = s.H / s.Hk;
    parts = (int32_t)(wanted < 1 ? 1 : wanted < group ? wanted : group);
  }
  if (parts > 1) {
    const int64_t bytes = s.B * s.Hk * s.T * D * 4;
    HALO_TRY(halo_cuda_zero(t->dk, bytes));
    HALO_TRY(halo_cuda_zero(t->dv, bytes));
  }
  const keys x = keys_of(t, t->by_key, parts);
  if (a->deterministic) {
    HALO_TRY(launch("attention_portable backward dk dv", key_backward<D, G, 0>, tiles * parts, THREADS,
                    room<D, 1>::BYTES, s, x));
    return run_queries<D>(s, keys_of(t, t->by_query, 1), G);
  }
  if (room<D, 2>::BYTES <= halo__attention_shared_bytes()) {
    return launch("attention_portable backward", key_backward<D, G, 2>, tiles * parts, THREADS,
                  room<D, 2>::BYTES, s, x);
  }
  return launch("attention_portable backward", key_backward<D, G, 1>, tiles * parts, THREADS,
                room<D, 1>::BYTES, s, x);
}

keys columns_of(const halo_attention_columns *c, const halo__rows *rows, float *dk, float *dv) {
  return {(const bf16 *)c->k, (const bf16 *)c->v, nullptr, rows->offset, rows->run, dk, dv, 1,
          c->token_offset, c->slot_offset, c->token, c->slot};
}

template <int D>
halo_status run_fixed_columns(const halo_attention_queries *a, const halo_attention_columns *c) {
  const side s = side_of(a, nullptr);
  const int64_t rows = c->by_column->n_rows, most = rows < c->n_entries ? rows : c->n_entries;
  float *part = nullptr;
  HALO_TRY(halo__alloc((void **)&part, 2 * c->n_slots * D * (int64_t)sizeof *part, HALO_CUDA));
  const keys x = columns_of(c, c->by_column, part, part + c->n_slots * D);
  halo_status status = launch("attention_portable backward by column", column_backward<D>,
                              (most + KEYS - 1) / KEYS * s.B * s.H, THREADS, room<D, 1>::BYTES, s, x,
                              (int32_t)a->block);
  for (int32_t j = 0; status == HALO_OK && j < s.H / s.Hk; j++) {
    status = launch("attention_portable columns added", add_columns<D>, (int64_t)s.B * s.Hk * 64, 256, 0, s, x,
                    (float *)c->dk, (float *)c->dv, j);
  }
  halo__free(part);
  HALO_TRY(status);
  return run_queries<D>(s, columns_of(c, c->by_query, nullptr, nullptr), (int32_t)a->block);
}

} // namespace

int64_t halo__portable_bwd_shared(const halo_attention_queries *a) {
  return a->head_size == 128 ? room<128, 1>::BYTES : room<64, 1>::BYTES;
}

halo_status halo__portable_bwd(const halo_attention_queries *a, const halo_attention_tiles *keys) {
  if (a->block == 128) {
    return a->head_size == 128 ? run_tiles<128, 128>(a, keys) : run_tiles<64, 128>(a, keys);
  }
  return a->head_size == 128 ? run_tiles<128, 64>(a, keys) : run_tiles<64, 64>(a, keys);
}

halo_status halo__portable_columns_bwd(const halo_attention_queries *a,
                                       const halo_attention_columns *c) {
  const int64_t bytes = c->n_entries * a->head_size * 4;
  HALO_TRY(halo_cuda_zero(c->dk, bytes));
  HALO_TRY(halo_cuda_zero(c->dv, bytes));
  const bool is_128 = a->head_size == 128;
  if (a->deterministic) return is_128 ? run_fixed_columns<128>(a, c) : run_fixed_columns<64>(a, c);
  const side s = side_of(a, nullptr);
  const keys x = columns_of(c, c->by_query, (float *)c->dk, (float *)c->dv);
  return is_128 ? run_queries<128>(s, x, (int32_t)a->block) : run_queries<64>(s, x, (int32_t)a->block);
}
