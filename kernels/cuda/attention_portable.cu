/* attention_portable: attention forward on tensor cores by warp, for any device from sm_80 on; bf16, head
 * sizes 64 and 128, blocks of 64 and 128. Backward: attention_portable_bwd.cu.
 *
 *   s = q k^T    m' = max(m, max s scale log2(e))    p = 2^(s scale log2(e) - m')
 *   l = l 2^(m-m') + sum p                           o = o 2^(m-m') + p v
 *
 * shapes    kernels.h; q, out strided [B,T,H,D] bf16; k, v [B,Hk,T,D] or gathered [n_entries,D]
 * tasks     a CTA of four warps has 128 query rows of one head, each warp 32: a fragment of keys read from
 *           shared memory then serves two products. Blocks of 64 come in pairs, whose lists are walked
 *           together: a tile that only one of them sees is computed by that one's warps. Keys come 64 at a
 *           time into two stages by cp.async, so that the next ones arrive while these are met.
 *           Columns: rows of one block; 64 listed keys are gathered row by row into the same stages, their
 *           rows and positions found one step ahead.
 * numbers   q, k, v, p bf16, everything else fp32. m moves only when a maximum grows by more than
 *           2^8: until then p up to 256 is exact enough, and rescaling o is left out (m is a reference,
 *           attention.cuh)
 * work      4 D flops a pair. Per 64 keys a warp reads 40 KB of shared memory for 512 products (D = 128):
 *           1280 cycles for four warps at 128 B a cycle, the products some 1600 (mma.sync: 62 % of wgmma)
 * source    FlashAttention-2 (arXiv 2307.08691) algorithm 1, 3.3 (work partition); rescaling threshold:
 *           FlashAttention-4's idea
 * twin      kernels/cpu/attention_tiles.c, attention_columns.c
 */
#include "attention_portable.cuh"

using namespace halo;
using namespace halo::portable;
using namespace halo::mma;

namespace halo {
namespace portable {

side side_of(const halo_attention_queries *a, const halo__attention_out *once) {
  side s = {};
  s.B = (int32_t)a->n_batch;
  s.H = (int32_t)a->n_heads;
  s.Hk = (int32_t)a->n_kv_heads;
  s.n_blocks = (int32_t)a->n_blocks;
  s.T = a->block * a->n_blocks;
  s.scale = (float)a->scale;
  s.q = (const __nv_bfloat16 *)a->q;
  s.grad = (const __nv_bfloat16 *)a->grad;
  s.position = a->position;
  s.first = a->first;
  s.pattern_of = a->pattern_of;
  s.first_stride = a->first_stride;
  for (int i = 0; i < 3; i++) {
    s.q_stride[i] = a->q_stride[i];
    s.grad_stride[i] = a->grad_stride[i];
  }
  s.lse = (const float *)a->lse;
  s.delta = (const float *)a->delta;
  s.dq = (float *)a->dq;
  if (once == nullptr) {
    s.o = (float *)a->o;
    s.m = (float *)a->m;
    s.l = (float *)a->l;
    return s;
  }
  s.out = (__nv_bfloat16 *)once->out;
  s.result = (float *)once->lse;
  for (int i = 0; i < 3; i++) s.out_stride[i] = once->out_stride[i];
  for (int i = 0; i < 2; i++) s.result_stride[i] = once->lse_stride[i];
  return s;
}

} // namespace portable
} // namespace halo

namespace {

enum { WARPS = 4, THREADS = 32 * WARPS, KEYS = 64 };
constexpr float SLACK = 8; /* how far a maximum may be above its reference, in powers of two */

struct tiles {
  const __nv_bfloat16 *k, *v;
  const int32_t *position;
  const int64_t *offset;
  const halo__span *run;
  /* columns; token NULL for tiles */
  const int64_t *token_offset, *slot_offset;
  const int32_t *token, *slot;
};

/* 64 keys that a CTA meets together. */
struct item {
  int64_t key;                /* first row of k, v; columns: unused */
  int n;                      /* how many, 0: no more */
  int32_t position;           /* of the first */
  bool sees[2], is_partial[2]; /* by the two blocks of a pair */
};

/* A warp's rows: MT fragments of 16 rows. Row i (of 2 MT): fragment i / 2, lower half for odd i. */
template <int D, int MT> struct state {
  float o[MT][D / 8][4];
  float m[2 * MT], l[2 * MT]; /* l: this lane's share */
};

/* s = q k^T for the warp's rows and the 64 keys of a stage. */
template <int D, int MT>
__device__ __forceinline__ void scores(float (&s)[MT][8][4], uint32_t q, uint32_t k, int row) {
#pragma unroll
  for (int mt = 0; mt < MT; mt++) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) s[mt][n][e] = 0;
    }
  }
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    uint32_t a[MT][4];
#pragma unroll
    for (int mt = 0; mt < MT; mt++) rows_a<D>(a[mt], by_16<D>(q, row), 16 * mt, d);
#pragma unroll
    for (int n = 0; n < 4; n++) {
      uint32_t b[4];
      rows_b<D>(b, by_8<D>(k), 16 * n, d);
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        multiply(s[mt][2 * n], a[mt], b[0], b[1]);
        multiply(s[mt][2 * n + 1], a[mt], b[2], b[3]);
      }
    }
  }
}

/* Maxima, exponentials and sums; s becomes p. c = scale log2(e). */
template <int D, int MT>
__device__ __forceinline__ void exponentials(float (&s)[MT][8][4], state<D, MT> *x, float c) {
  float top[2 * MT];
  bool grows = false;
#pragma unroll
  for (int i = 0; i < 2 * MT; i++) {
    const int mt = i / 2, h = i % 2 * 2;
    float t = fmaxf(s[mt][0][h], s[mt][0][h + 1]);
#pragma unroll
    for (int n = 1; n < 8; n++) t = fmaxf(t, fmaxf(s[mt][n][h], s[mt][n][h + 1]));
    t = fmaxf(t, __shfl_xor_sync(0xffffffffu, t, 1));
    t = fmaxf(t, __shfl_xor_sync(0xffffffffu, t, 2));
    top[i] = t * c;
    grows = grows || top[i] > x->m[i] + SLACK; // from -inf: always, once something is seen
  }
  if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
      const float m = fmaxf(x->m[i], top[i]);
      const float factor = m > x->m[i] ? exp2_fast(x->m[i] - m) : 1; // not NaN where both are -inf
      x->m[i] = m;
      x->l[i] *= factor;
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        x->o[i / 2][n][i % 2 * 2] *= factor;
        x->o[i / 2][n][i % 2 * 2 + 1] *= factor;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * MT; i++) {
    const int mt = i / 2, h = i % 2 * 2;
    const float from = x->m[i] > -INFINITY ? x->m[i] : 0; // nothing seen: zeros
    float sum = 0;
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        s[mt][n][h + e] = exp2_fast(fmaf(s[mt][n][h + e], c, -from));
        sum += s[mt][n][h + e];
      }
    }
    x->l[i] += sum;
  }
}

/* o += p v */
template <int D, int MT>
__device__ __forceinline__ void gather(state<D, MT> *x, const float (&p)[MT][8][4], uint32_t v) {
#pragma unroll
  for (int key = 0; key < KEYS; key += 16) {
    uint32_t a[MT][4];
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      const float(&left)[4] = p[mt][key / 8], (&right)[4] = p[mt][key / 8 + 1];
      a[mt][0] = pack2(left[0], left[1]);
      a[mt][1] = pack2(left[2], left[3]);
      a[mt][2] = pack2(right[0], right[1]);
      a[mt][3] = pack2(right[2], right[3]);
    }
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
      uint32_t b[4];
      columns_b<D>(b, by_16<D>(v), key, 16 * n);
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        multiply(x->o[mt][2 * n], a[mt], b[0], b[1]);
        multiply(x->o[mt][2 * n + 1], a[mt], b[2], b[3]);
      }
    }
  }
}

/* Where the rows of a CTA are. */
struct place {
  int32_t u, batch, head;
  int64_t token; /* of the CTA's first row */
  int rows;      /* that exist: a pair's second block may not */
};

/* Pairs of positions that a row does not see become -inf. Tiles: positions are consecutive. */
template <int MT>
__device__ __forceinline__ void mask_tile(float (&s)[MT][8][4], const side &a, const place &at, int row,
                                          int32_t position) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2 * MT; i++) {
    const int64_t token = at.token + row + i / 2 * 16 + i % 2 * 8 + lane / 4;
    const int32_t first = a.first[at.batch * a.first_stride + token] - position - lane % 4 * 2;
    const int32_t last = a.position[token] - position - lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float &x = s[i / 2][n][i % 2 * 2 + e];
        x = first <= 8 * n + e && 8 * n + e <= last ? x : -INFINITY;
      }
    }
  }
}

template <int MT>
__device__ __forceinline__ void mask_columns(float (&s)[MT][8][4], const side &a, const place &at, int row,
                                             const int32_t *position, int n_keys, bool is_partial) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2 * MT; i++) {
    const int64_t token = at.token + row + i / 2 * 16 + i % 2 * 8 + lane / 4;
    const int32_t first = is_partial ? a.first[at.batch * a.first_stride + token] : 0;
    const int32_t last = is_partial ? a.position[token] : INT32_MAX;
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int key = 8 * n + lane % 4 * 2 + e;
        float &x = s[i / 2][n][i % 2 * 2 + e];
        x = key < n_keys && first <= position[key] && position[key] <= last ? x : -INFINITY;
      }
    }
  }
}

/* The rows' state as it was, or nothing seen. */
template <int D, int MT>
__device__ __forceinline__ void open_state(state<D, MT> *x, const side &a, const place &at, int row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2 * MT; i++) {
    const int r = row + i / 2 * 16 + i % 2 * 8 + lane / 4;
    const bool is_read = a.o != nullptr && r < at.rows;
    const int64_t from = at.u * a.T + at.token + r;
    x->m[i] = is_read ? a.m[from] : -INFINITY;
    x->l[i] = is_read && lane % 4 == 0 ? a.l[from] : 0;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      float2 o = make_float2(0, 0);
      if (is_read) o = *(const float2 *)(a.o + from * D + 8 * n + lane % 4 * 2);
      x->o[i / 2][n][i % 2 * 2] = o.x;
      x->o[i / 2][n][i % 2 * 2 + 1] = o.y;
    }
  }
}

template <int D, int MT>
__device__ __forceinline__ void close_state(const state<D, MT> *x, const side &a, const place &at, int row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2 * MT; i++) {
    float l = x->l[i];
    l += __shfl_xor_sync(0xffffffffu, l, 1);
    l += __shfl_xor_sync(0xffffffffu, l, 2);
    const int r = row + i / 2 * 16 + i % 2 * 8 + lane / 4;
    if (r >= at.rows) continue;
    const int64_t token = at.token + r, to = at.u * a.T + token;
    if (a.o != nullptr) {
      if (lane % 4 == 0) {
        a.m[to] = x->m[i];
        a.l[to] = l;
      }
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        *(float2 *)(a.o + to * D + 8 * n + lane % 4 * 2) =
            make_float2(x->o[i / 2][n][i % 2 * 2], x->o[i / 2][n][i % 2 * 2 + 1]);
      }
      continue;
    }
    const float factor = l == 0 ? 0 : 1 / l;
    __nv_bfloat16 *out = a.out + at.batch * a.out_stride[0] + token * a.out_stride[1] +
                         at.head * a.out_stride[2];
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      *(uint32_t *)(out + 8 * n + lane % 4 * 2) =
          pack2(x->o[i / 2][n][i % 2 * 2] * factor, x->o[i / 2][n][i % 2 * 2 + 1] * factor);
    }
    if (lane % 4 == 0 && a.result != nullptr) {
      a.result[at.batch * a.result_stride[0] + at.head * a.result_stride[1] + token] =
          l == 0 ? -INFINITY : x->m[i] * LN_2 + logf(l);
    }
  }
}

/* Queries of the CTA into shared memory; rows that do not exist are zeros. */
template <int D, int ROWS>
__device__ __forceinline__ void fetch_queries(uint32_t to, const side &a, const place &at) {
  const __nv_bfloat16 *q = a.q + at.batch * a.q_stride[0] + at.head * a.q_stride[2];
#pragma unroll 4
  for (int i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
    const int r = i / (D / 8), c = i % (D / 8);
    const bool exists = r < at.rows;
    copy16(tile_at<D>(to, r, c), q + (at.token + (exists ? r : 0)) * a.q_stride[1] + 8 * c, exists);
  }
}

/* 64 rows of k and v from row `key` on. */
template <int D>
__device__ __forceinline__ void fetch_tile(uint32_t k, uint32_t v, const tiles &x, int64_t key) {
  constexpr int ROWS = THREADS / (D / 8); // a turn of all threads; a multiple of 8, so that chunks stay in place
  const uint32_t to = tile_at<D>(0, threadIdx.x / (D / 8), threadIdx.x % (D / 8));
  const int64_t from = key * D + 8 * threadIdx.x;
  const __nv_bfloat16 *from_k = x.k + from, *from_v = x.v + from;
#pragma unroll
  for (int i = 0; i < KEYS / ROWS; i++) {
    copy16(k + to + i * ROWS * D * 2, from_k + i * ROWS * D);
    copy16(v + to + i * ROWS * D * 2, from_v + i * ROWS * D);
  }
}

constexpr int shared_bytes(int D, int rows) { return (rows + 4 * KEYS) * D * 2; }

/* Next 64 keys of the lists of one block of 128, or of a pair of 64: G / 64 items a tile. */
template <int G> struct tile_walk {
  walk w[128 / G];
  int part; /* of the tile at hand */

  __device__ __forceinline__ item next(const tiles &x, int64_t kv_row) {
    item it = {};
    if (G == 128) {
      if (w[0].at == INT32_MAX) return it;
      const int64_t key = (int64_t)w[0].at * G + part * KEYS;
      it.key = kv_row + key;
      it.sees[0] = it.sees[1] = true;
      it.is_partial[0] = it.is_partial[1] = w[0].partial;
      if (w[0].partial) it.position = x.position[key];
      it.n = KEYS;
      if (++part == G / KEYS) {
        part = 0;
        walk_on(&w[0]);
      }
      return it;
    }
    const int32_t at = min(w[0].at, w[128 / G - 1].at);
    if (at == INT32_MAX) return it;
    it.key = kv_row + (int64_t)at * G;
    it.n = KEYS;
#pragma unroll
    for (int i = 0; i < 128 / G; i++) {
      it.sees[i] = w[i].at == at;
      if (!it.sees[i]) continue;
      it.is_partial[i] = w[i].partial;
      walk_on(&w[i]);
    }
    if (it.is_partial[0] || it.is_partial[1]) it.position = x.position[(int64_t)at * G];
    return it;
  }
};

template <int D, int G> __global__ void __launch_bounds__(THREADS, 2) tiles_forward(side a, tiles x) {
  constexpr int MT = 2, ROWS = 16 * MT * WARPS, BLOCKS = ROWS / G, TILE = KEYS * D * 2;
  extern __shared__ __align__(256) unsigned char memory[];
  const uint32_t q = shared_address(memory), stage0 = q + ROWS * D * 2;
  const int units = a.B * a.H, n_tasks = (a.n_blocks + BLOCKS - 1) / BLOCKS;
  const int warp = threadIdx.x / 32, row = 16 * MT * warp;
  const int task = n_tasks - 1 - (int)blockIdx.x / units; // long rows first
  place at;
  at.u = (int)blockIdx.x % units;
  at.batch = at.u / a.H;
  at.head = at.u % a.H;
  at.token = (int64_t)task * ROWS;
  at.rows = (int)(a.T - at.token < ROWS ? a.T - at.token : ROWS);
  const int64_t list = (int64_t)a.pattern_of[at.u] * a.n_blocks + (int64_t)task * BLOCKS;
  const int64_t kv_row = (int64_t)(at.batch * a.Hk + at.head / (a.H / a.Hk)) * a.T;
  tile_walk<G> walks;
  walks.part = 0;
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    walks.w[i] = walk_of(x.offset, x.run, task * BLOCKS + i < a.n_blocks ? list + i : -1);
  }
  item now = walks.next(x, kv_row);
  if (now.n == 0 && a.o != nullptr) return; // the state stays as it is
  fetch_queries<D, ROWS>(q, a, at);
  if (now.n > 0) fetch_tile<D>(stage0, stage0 + TILE, x, now.key);
  copies_commit();
  state<D, MT> mine;
  open_state<D, MT>(&mine, a, at, row);
  const float c = a.scale * LOG2_E;
  const int own = G == 128 ? 0 : row / G;
  const int32_t last = row < at.rows ? a.position[at.token + row + 16 * MT - 1] : -1; // of the warp's rows
  for (int stage = 0; now.n > 0; stage ^= 1) {
    const item next = walks.next(x, kv_row);
    copies_wait<0>();
    __syncthreads();
    if (next.n > 0) {
      const uint32_t to = stage0 + (stage ^ 1) * 2 * TILE;
      fetch_tile<D>(to, to + TILE, x, next.key);
    }
    copies_commit();
    const uint32_t k = stage0 + stage * 2 * TILE;
    const bool is_partial = own == 0 ? now.is_partial[0] : now.is_partial[1];
    if ((own == 0 ? now.sees[0] : now.sees[1]) && !(is_partial && now.position > last)) {
      float s[MT][8][4];
      scores<D, MT>(s, q, k, row);
      if (is_partial) mask_tile<MT>(s, a, at, row, now.position);
      exponentials<D, MT>(s, &mine, c);
      gather<D, MT>(&mine, s, k + TILE);
    }
    now = next;
  }
  close_state<D, MT>(&mine, a, at, row);
}

/* The next 64 columns of a list: rows of k, v and positions to shared memory, by the first threads. */
struct column_walk {
  const halo__span *run, *end;
  int32_t at, left;

  __device__ __forceinline__ int next(const tiles &x, int64_t slots, int64_t tokens, int32_t *rows,
                                      int32_t *positions, bool *is_partial) {
    int n = 0;
    bool any = false;
    while (n < KEYS && (left > 0 || run != end)) {
      if (left == 0) {
        at = run->first;
        left = run->count;
        run++;
      }
      any = any || run[-1].partial;
      const int take = min(left, KEYS - n);
      if ((int)threadIdx.x >= n && (int)threadIdx.x < n + take) {
        rows[threadIdx.x] = x.slot[slots + at + threadIdx.x - n];
        positions[threadIdx.x] = x.token[tokens + at + threadIdx.x - n];
      }
      n += take;
      at += take;
      left -= take;
    }
    *is_partial = any;
    return n;
  }
};

template <int D, int G> __global__ void __launch_bounds__(THREADS, 2) columns_forward(side a, tiles x) {
  constexpr int MT = G / 64, TILE = KEYS * D * 2;
  extern __shared__ __align__(256) unsigned char memory[];
  __shared__ int32_t rows[3][KEYS], positions[3][KEYS];
  const uint32_t q = shared_address(memory), stage0 = q + G * D * 2;
  const int units = a.B * a.H, warp = threadIdx.x / 32, row = 16 * MT * warp;
  const int block = a.n_blocks - 1 - (int)blockIdx.x / units;
  place at;
  at.u = (int)blockIdx.x % units;
  at.batch = at.u / a.H;
  at.head = at.u % a.H;
  at.token = (int64_t)block * G;
  at.rows = G;
  const int64_t pattern = a.pattern_of[at.u], list = pattern * a.n_blocks + block;
  column_walk w = {x.run + x.offset[list], x.run + x.offset[list + 1], 0, 0};
  if (w.run == w.end) return;
  const int64_t slots = x.slot_offset[at.u], tokens = x.token_offset[pattern];
  bool is_partial, next_partial, then_partial;
  int n = w.next(x, slots, tokens, rows[0], positions[0], &is_partial);
  int next = w.next(x, slots, tokens, rows[1], positions[1], &next_partial);
  __syncthreads();
  fetch_queries<D, G>(q, a, at);
  fetch_listed<D, THREADS>(stage0, stage0 + TILE, x.k, x.v, rows[0], n);
  copies_commit();
  state<D, MT> mine;
  open_state<D, MT>(&mine, a, at, row);
  const float c = a.scale * LOG2_E;
  for (int stage = 0, slot = 0; n > 0; stage ^= 1, slot = slot == 2 ? 0 : slot + 1) {
    copies_wait<0>();
    __syncthreads();
    const int next_slot = slot == 2 ? 0 : slot + 1, then_slot = next_slot == 2 ? 0 : next_slot + 1;
    if (next > 0) {
      const uint32_t to = stage0 + (stage ^ 1) * 2 * TILE;
      fetch_listed<D, THREADS>(to, to + TILE, x.k, x.v, rows[next_slot], next);
    }
    copies_commit();
    const int then = w.next(x, slots, tokens, rows[then_slot], positions[then_slot], &then_partial);
    const uint32_t k = stage0 + stage * 2 * TILE;
    float s[MT][8][4];
    scores<D, MT>(s, q, k, row);
    if (is_partial || n < KEYS) mask_columns<MT>(s, a, at, row, positions[slot], n, is_partial);
    exponentials<D, MT>(s, &mine, c);
    gather<D, MT>(&mine, s, k + TILE);
    n = next;
    next = then;
    is_partial = next_partial;
    next_partial = then_partial;
  }
  close_state<D, MT>(&mine, a, at, row);
}

#define FOR_SIZES(a, ...)                                                                 \
  do {                                                                                    \
    if ((a)->head_size == 128 && (a)->block == 128) { constexpr int D = 128, G = 128; __VA_ARGS__; }    \
    else if ((a)->head_size == 128) { constexpr int D = 128, G = 64; __VA_ARGS__; }       \
    else if ((a)->block == 128) { constexpr int D = 64, G = 128; __VA_ARGS__; }           \
    else { constexpr int D = 64, G = 64; __VA_ARGS__; }                                   \
  } while (0)

} // namespace

/* Rows are read 16 bytes at a time. */
static bool is_aligned(const void *p, const int64_t *stride) {
  return (uintptr_t)p % 16 == 0 && stride[0] % 8 == 0 && stride[1] % 8 == 0 && stride[2] % 8 == 0;
}

/* Bytes of shared memory: backward (dq is there) keeps more. Devices of sm_86 and 89 have 99 KB. */
static int64_t shared_wanted(const halo_attention_queries *a) {
  return a->dq == nullptr ? shared_bytes((int)a->head_size, 128) : halo__portable_bwd_shared(a);
}

bool halo__portable_fits(const halo_attention_queries *a) {
  return a->dtype == HALO_BF16 && (a->head_size == 64 || a->head_size == 128) &&
         (a->block == 64 || a->block == 128) && a->scale > 0 && halo__cuda_device()->major >= 8 &&
         shared_wanted(a) <= halo__attention_shared_bytes() &&
         a->n_batch * a->n_heads * a->n_blocks < INT32_MAX && is_aligned(a->q, a->q_stride) &&
         (a->grad == nullptr || is_aligned(a->grad, a->grad_stride));
}

halo_status halo__portable_fwd(const halo_attention_queries *a, const halo_attention_tiles *keys,
                               const halo__attention_out *once) {
  const side s = side_of(a, once);
  const tiles x = {(const __nv_bfloat16 *)keys->k, (const __nv_bfloat16 *)keys->v, keys->position,
                   keys->by_query->offset, keys->by_query->run, nullptr, nullptr, nullptr, nullptr};
  FOR_SIZES(a, return launch("attention_portable forward", tiles_forward<D, G>,
                             a->n_batch * a->n_heads * ((a->n_blocks * G + 127) / 128), THREADS,
                             shared_bytes(D, 128), s, x));
}

halo_status halo__portable_columns_fwd(const halo_attention_queries *a,
                                       const halo_attention_columns *keys) {
  const side s = side_of(a, nullptr);
  const tiles x = {(const __nv_bfloat16 *)keys->k, (const __nv_bfloat16 *)keys->v, nullptr,
                   keys->by_query->offset, keys->by_query->run, keys->token_offset, keys->slot_offset,
                   keys->token, keys->slot};
  FOR_SIZES(a, return launch("attention_portable columns forward", columns_forward<D, G>,
                             a->n_batch * a->n_heads * a->n_blocks, THREADS, shared_bytes(D, G), s, x));
}
