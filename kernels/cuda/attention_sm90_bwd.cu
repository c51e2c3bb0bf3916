/* attention_sm90_bwd: attention backward on Hopper, with wgmma, TMA and warps that have roles.
 *
 *   p = 2^(scale log2(e) q.k - lse log2(e))      dv += p^T do       dp = do v^T
 *   ds = p (scale dp - scale delta)              dk += ds^T q       dq += ds k
 *
 * shapes    q, grad strided [B,T,H,D] bf16; k, v [B,Hk,T,D] bf16; lse, delta [B,H,T] fp32, lse natural and
 *           -inf for a row that saw nothing (its p is 0); D = 64 or 128; blocks of 64 or 128 tokens or a
 *           multiple of 128
 * gradient  dk, dv fp32 [B,Hk,T,D] are written (=), exact zeros where nothing met; dq fp32 [B,H,T,D], rows
 *           as they are, is added to (+=)
 * lists     by_key: row pattern * n_blocks + key block -> runs of query blocks. A partial run is tested
 *           token by token: first[t] <= position_k[u] <= position_q[t]. Of blocks of 64 a CTA owns two, one a
 *           warpgroup, and walks their lists together (not in a fixed order: that is left to the portable
 *           kernels)
 * work      10 * 64 * 128 * D flops a step (64 queries of one head meet 128 keys), five products
 *
 * A CTA owns 128 keys of one key/value head and meets, head after head of its group, the query tiles of its
 * row: dk and dv stay in registers, there is nothing to add up between query heads. Roles:
 *
 *   warp 0        the list: queries, gradients (TMA), lse, delta and what the mask needs, three and two
 *                 tiles ahead
 *   warps 1, 2    dq: half a tile (64 x D/2, fp32) each, from shared memory to L2's adders (TMA)
 *   warp 3        the keys and values, once
 *   warps 4..11   two warpgroups of 64 keys each:  S^T = K Q^T  and  dP^T = V dO^T,  64 x 64
 *
 * The products are transposed, so that P^T and dS^T come out of the accumulators in just the form of an A
 * operand: dv += P^T dO and dk += dS^T Q take them from registers. Only dS goes through shared memory, for
 * dq = dS K, where a warpgroup takes D/2 columns of the keys of both. Order in one warpgroup, so that the
 * tensor cores have work while exponentials and dS are computed (| waits for the other warpgroup):
 *
 *   exp(S)  dv += ..  dS  S of the next tile  |  dq = ..  dk += ..  dq to shared memory  dP of the next tile
 *
 * lse and delta belong to columns of S^T and dP^T: instead of loading 32 values a thread and step, the
 * products bring them in, as one more step of 16 columns: ones times (-lse / scale in three bf16 parts).
 *
 * Few CTAs (short sequences) leave multiprocessors idle at the end: then a group's heads are dealt to
 * n_split CTAs, which add to zeroed dk, dv.
 *
 * deterministic: additions to one tile of dq take turns, from the last key block to the first: a CTA counts
 * the key blocks after its own in the query block's row (by_query) and waits for that count. CTAs start in
 * the same order (tickets), so who is waited for runs or is done. Splits are two at most: 0 + a + b does
 * not depend on the order.
 *
 * limits    kernels/NOTES.md: of 3490 clocks a step 2690 are products, 3100 shared memory
 * source    FlashAttention-3 (arXiv:2407.08608) for the roles, the transposed products and dq by bulk
 *           addition; the rest is ours
 * twin      kernels/cpu/attention_tiles.c
 */
#include "attention.cuh"
#include "sm90.cuh"

using namespace halo;
using namespace halo::sm90;

namespace {

typedef __nv_bfloat16 bf16;

constexpr int QUERIES = 64, KEYS = 128, THREADS = 384;
constexpr int Q_STAGES = 3, O_STAGES = 2, STEPS = 12; /* STEPS: both rings come round */
enum { BAR_FULL = 2, BAR_EMPTY = 4 };                 /* and the next: one for each warpgroup */
/* Where keys are two blocks of 64, PARTIAL and UNSEEN are of the keys of warpgroup 0, << 1 of warpgroup 1. */
enum { PARTIAL = 1, LAST = 4, NOTHING = 8, FIRST = 16, UNSEEN = 32 };
constexpr float NOT_SEEN = -1e30f; /* instead of -inf - lse: 2^ of it is 0, and 0 times it as well */
constexpr uint64_t EVICT_LAST = 0x14F0000000000000; /* as l2_evict_last gives it, without registers */

struct call {
  const float *lse, *delta;
  float *dq, *dk, *dv;
  const int32_t *position_q, *position_k, *first;
  int64_t first_stride;
  const int32_t *pattern_of;
  const int64_t *key_offset, *query_offset;
  const halo__span *key_run, *query_run;
  int32_t *turn;   /* [B,H,T/64,2] additions so far; NULL: in any order */
  int32_t *ticket;
  int32_t T, n_heads, n_kv_heads, n_groups, n_blocks, block, n_tiles, n_split, by_head;
  float scale, scale_log2, inverse_scale;
};

/* What one query tile is: row in [B,H,T], flags, key blocks that come before this one. */
struct tile_info {
  int32_t row, flags, rank;
};

template <int D> struct alignas(1024) shared {
  bf16 k[KEYS * D], v[KEYS * D];
  bf16 q[Q_STAGES][QUERIES * D];
  bf16 o[O_STAGES][QUERIES * D];
  bf16 ds[2][KEYS * QUERIES];
  float dq[2][QUERIES * D / 2]; /* boxes of 32 columns */
  uint4 ones[2][8]; /* an operand's rows: 1, 1, 1, 0, ..; all groups of 8 rows are this one */
  uint4 lse[Q_STAGES][QUERIES], delta[Q_STAGES][QUERIES]; /* a row's value in three bf16 parts */
  int32_t position[Q_STAGES][QUERIES], first[Q_STAGES][QUERIES];
  tile_info info[Q_STAGES], dq_info[2];
  int32_t ticket;
  uint64_t full_kv, full_ds, full_q[Q_STAGES], empty_q[Q_STAGES], full_o[O_STAGES], empty_o[O_STAGES];
};

/* ---- Warp 0: the list ---------------------------------------------------------------------------- */

/* Read here and not kept: what is computed from it needs no register for a whole loop. */
__device__ __forceinline__ int lane_now() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

/* The query tiles of one CTA, head after head. */
struct walk {
  static constexpr bool IS_PAIR = false;
  const halo__span *at;
  int32_t runs, head, tile, left, partial;

  __device__ __forceinline__ explicit walk(int32_t head)
      : at(nullptr), runs(0), head(head - 1), tile(0), left(0), partial(0) {}

  __device__ __forceinline__ int32_t flags() const { return partial ? PARTIAL : 0; }
  __device__ __forceinline__ bool next(const call &c, int32_t batch, int32_t head_end, int32_t key_block) {
    if (left > 1) {
      left--;
      tile++;
      return true;
    }
    while (runs == 0) {
      if (++head >= head_end) return false;
      const int64_t row = (int64_t)c.pattern_of[batch * c.n_heads + head] * c.n_blocks + key_block;
      const int64_t from = c.key_offset[row];
      runs = (int32_t)(c.key_offset[row + 1] - from);
      at = c.key_run + from;
    }
    const int32_t per = c.block / QUERIES;
    tile = at->first * per;
    left = at->count * per;
    partial = at->partial != 0;
    at++;
    runs--;
    return true;
  }
};

/* The same where the keys are two blocks of 64: even lanes walk the first one's list, odd lanes the
 * second's, together. A tile that only one of them meets is the other's to mask. */
struct pair_walk {
  static constexpr bool IS_PAIR = true;
  const halo__span *at;
  int32_t runs, head, tile, left, partial;
  int32_t own; // tile of this lane's list, INT32_MAX at its end

  __device__ __forceinline__ explicit pair_walk(int32_t head)
      : at(nullptr), runs(0), head(head - 1), tile(INT32_MAX), left(0), partial(0), own(INT32_MAX) {}

  __device__ __forceinline__ int32_t flags() const {
    const uint32_t seen = __ballot_sync(0xffffffffu, own == tile);
    const uint32_t cut = __ballot_sync(0xffffffffu, own == tile && partial);
    return (int32_t)(cut & 3) * PARTIAL | (int32_t)(~seen & 3) * UNSEEN;
  }
  __device__ __forceinline__ void take_run() {
    own = INT32_MAX;
    if (runs == 0) return;
    own = at->first;
    left = at->count;
    partial = at->partial != 0;
    at++;
    runs--;
  }
  __device__ __forceinline__ bool next(const call &c, int32_t batch, int32_t head_end, int32_t key_block) {
    if (own == tile && own != INT32_MAX) {
      if (--left > 0) own++;
      else take_run();
    }
    for (;;) {
      __syncwarp();
      tile = min(own, __shfl_xor_sync(0xffffffffu, own, 1));
      if (tile != INT32_MAX) return true;
      if (++head >= head_end) return false;
      const int32_t block = key_block + (lane_now() & 1);
      runs = 0;
      if (block < c.n_blocks) {
        const int64_t row = (int64_t)c.pattern_of[batch * c.n_heads + head] * c.n_blocks + block;
        const int64_t from = c.key_offset[row];
        runs = (int32_t)(c.key_offset[row + 1] - from);
        at = c.key_run + from;
      }
      take_run();
    }
  }
};

/* How many key tiles after this one the query tile meets. */
__device__ __forceinline__ int32_t tiles_after(const call &c, int32_t unit, int32_t query_tile,
                                               int32_t key_tile) {
  const int64_t row = (int64_t)c.pattern_of[unit] * c.n_blocks + query_tile / (c.block / QUERIES);
  const int32_t per = c.block / KEYS, own = key_tile / per;
  int32_t n = 0;
  for (int64_t i = c.query_offset[row] + lane_now(); i < c.query_offset[row + 1]; i += 32) {
    const halo__span run = c.query_run[i];
    const int32_t after = run.first + run.count - 1 - own;
    n += after < 0 ? 0 : after < run.count ? after : run.count;
  }
  return warp_sum(n) * per + per - 1 - key_tile % per;
}

/* x as the sum of three bf16 numbers, 24 bits in all: a row of an operand of 16 columns, of which only the
 * first three count. */
__device__ __forceinline__ uint4 parts_of(float x) {
  const float high = __bfloat162float(__float2bfloat16_rn(x)), rest = x - high;
  const float middle = __bfloat162float(__float2bfloat16_rn(rest));
  return make_uint4(pack_bf16(high, middle), pack_bf16(rest - middle, 0), 0, 0);
}

template <int D, bool ORDERED, class WALK>
__device__ __forceinline__ void produce(const call &c, shared<D> &sm, const CUtensorMap *map_q,
                                        const CUtensorMap *map_o, int32_t batch, int32_t key_tile,
                                        int32_t head, int32_t head_end) {
  WALK w(head);
  bool more = w.next(c, batch, head_end, key_tile * KEYS / c.block);
  if (!more) {
    if (lane_now() == 0) {
      sm.info[0] = {-1, LAST | NOTHING, 0};
      barrier_arrive(&sm.full_q[0]);
    }
    __syncwarp();
    barrier_arrive_warp(&sm.full_q[0], lane_now() == 0);
    return;
  }
  for (int32_t step = 0; more; step = step == STEPS - 1 ? 0 : step + 1) {
    const int q = step % Q_STAGES, o = step % O_STAGES, lane = lane_now();
    barrier_wait(&sm.empty_q[q], (step / Q_STAGES & 1) ^ 1);
    const int32_t token = w.tile * QUERIES;
    if (lane == 0) {
      barrier_expect(&sm.full_q[q], QUERIES * D * 2);
      for (int s = 0; s < D / 64; s++) {
        tma_load(sm.q[q] + s * QUERIES * 64, map_q, &sm.full_q[q], EVICT_LAST, s * 64, token, w.head, batch);
      }
      barrier_wait(&sm.empty_o[o], (step / O_STAGES & 1) ^ 1);
      barrier_expect(&sm.full_o[o], QUERIES * D * 2);
      for (int s = 0; s < D / 64; s++) {
        tma_load(sm.o[o] + s * QUERIES * 64, map_o, &sm.full_o[o], EVICT_LAST, s * 64, token, w.head, batch);
      }
    }
    __syncwarp();
    const int32_t row = (batch * c.n_heads + w.head) * c.T + token;
    const int32_t flags = w.flags();
    if (flags != 0) {
      *(int2 *)&sm.position[q][2 * lane] = *(const int2 *)(c.position_q + token + 2 * lane);
      *(int2 *)&sm.first[q][2 * lane] = *(const int2 *)(c.first + batch * c.first_stride + token + 2 * lane);
    }
    const float2 lse = *(const float2 *)(c.lse + row + 2 * lane);
    sm.lse[q][2 * lane] = parts_of(lse.x == -INFINITY ? NOT_SEEN : -lse.x * c.inverse_scale);
    sm.lse[q][2 * lane + 1] = parts_of(lse.y == -INFINITY ? NOT_SEEN : -lse.y * c.inverse_scale);
    const float2 delta = *(const float2 *)(c.delta + row + 2 * lane);
    sm.delta[q][2 * lane] = parts_of(-delta.x);
    sm.delta[q][2 * lane + 1] = parts_of(-delta.y);
    fence_async();
    const int32_t rank = ORDERED ? tiles_after(c, batch * c.n_heads + w.head, w.tile, key_tile) : 0;
    if (lane == 0) sm.info[q] = {row, flags, rank};
    more = w.next(c, batch, head_end, key_tile * KEYS / c.block);
    if (lane == 0 && !more) sm.info[q].flags |= LAST;
    __syncwarp();
    barrier_arrive_warp(&sm.full_q[q], lane == 0);
  }
}

/* ---- Warp 3: keys and values ------------------------------------------------------------------------ */

template <int D>
__device__ __forceinline__ void load_keys(shared<D> &sm, const CUtensorMap *map_k, const CUtensorMap *map_v,
                                          int32_t row) {
  if (!elected()) return;
  barrier_expect(&sm.full_kv, 2 * KEYS * D * 2);
  for (int s = 0; s < D / 64; s++) {
    tma_load(sm.k + s * KEYS * 64, map_k, &sm.full_kv, EVICT_LAST, s * 64, row);
    tma_load(sm.v + s * KEYS * 64, map_v, &sm.full_kv, EVICT_LAST, s * 64, row);
  }
}

/* ---- Warps 1 and 2: dq ------------------------------------------------------------------------------- */

__device__ __forceinline__ void wait_for_turn(const int32_t *turn, int32_t rank) {
  int32_t now;
  do {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
  } while (now != rank);
  asm volatile("fence.proxy.async;" ::: "memory");
}

/* Half tiles staged by warpgroup w go out, until the last. */
template <int D, bool ORDERED>
__device__ __forceinline__ void write_dq(const call &c, shared<D> &sm, const CUtensorMap *map_dq, int w) {
  for (;;) {
    named_arrive(BAR_EMPTY + w, 160);
    named_wait(BAR_FULL + w, 160);
    const tile_info info = sm.dq_info[w];
    if (info.flags & NOTHING) return;
    if (lane_now() == 0) {
      int32_t *turn = c.turn + (int64_t)info.row / QUERIES * 2 + w;
      if (ORDERED) wait_for_turn(turn, info.rank);
      for (int b = 0; b < D / 64; b++) {
        tma_add(map_dq, sm.dq[w] + b * QUERIES * 32, w * D / 2 + b * 32, info.row);
      }
      bulk_commit();
      if (ORDERED) {
        bulk_wait<0>(); // not only read: in memory
        asm volatile("fence.proxy.async; red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turn) : "memory");
      } else {
        bulk_wait_read<0>();
      }
    }
    __syncwarp();
    if (info.flags & LAST) break;
  }
  if (lane_now() == 0) bulk_wait<0>();
}

/* x, with no past: what is computed from it is computed here, and not kept in registers, or out of them,
 * for a whole loop. */
__device__ __forceinline__ int here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

/* dq of this warpgroup, D/2 columns, to its stage: row r of a box has 16-byte chunk j at j ^ (r & 7). Two
 * lanes share a chunk and neighbouring rows would meet in the same banks: so odd rows store the values two
 * columns of accumulators further, and a half warp covers all banks once. */
template <int D>
__device__ __forceinline__ void stage_dq(float *stage, const float (&dq)[D / 4], int thread, float scale) {
  const int lane = thread % 32, r = thread / 32 * 16 + lane / 4, i = lane % 4;
  const bool is_odd = r & 1;
  char *row = (char *)stage + r * 128 + (i & 1) * 8;
#pragma unroll
  for (int n = 0; n < D / 16; n++) {
    if (n & 2) continue;
    float x[8];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float a = scale * dq[4 * n + j], b = scale * dq[4 * (n + 2) + j];
      x[j] = is_odd ? b : a;
      x[4 + j] = is_odd ? a : b;
    }
    pin(x); // all of them first: stores then need not wait for each other's registers
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int columns = (n + 2 * k) ^ (is_odd ? 2 : 0);
      char *to = row + n / 4 * (QUERIES * 128) + (((columns % 4 * 2 + i / 2) ^ (r & 7)) << 4);
      *(float2 *)to = make_float2(x[4 * k], x[4 * k + 1]);
      *(float2 *)(to + 8 * 128) = make_float2(x[4 * k + 2], x[4 * k + 3]);
    }
  }
}

/* ---- Warpgroups --------------------------------------------------------------------------------------- */

/* Registers as they come: without it the compiler keeps what a product is about to overwrite. */
template <int N> __device__ __forceinline__ void fresh(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "=f"(d[i]));
}

/* d[64 keys, 64 queries] = a b^T over D columns, both from shared memory, + column sums of `parts`: a
 * product too, with ones in the first three columns of A. */
template <int D>
__device__ __forceinline__ void multiply_rows(float (&d)[QUERIES / 2], const uint4 (*ones)[8],
                                              const uint4 *parts, uint64_t a, uint64_t b) {
  // No swizzle: 8 rows of 16 bytes lie together. Of `parts` groups of 8 rows are 128 bytes apart, and columns
  // 8 to 15 are the same memory as 0 to 7: they meet zeros.
  const uint64_t rows = (uint64_t)(shared_address(parts) >> 4 & 0x3fff) | (uint64_t)(128 >> 4) << 32;
  const uint64_t one = (uint64_t)(shared_address(ones) >> 4 & 0x3fff) | (uint64_t)(128 >> 4) << 16;
  wgmma<QUERIES>::ss<0, 0>(d, one, rows, 0);
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    wgmma<QUERIES>::ss<0, 0>(d, descriptor_at(a, k / 4 * (KEYS * 128) + k % 4 * 32),
                             descriptor_at(b, k / 4 * (QUERIES * 128) + k % 4 * 32), 1);
  }
  wgmma_commit();
}

/* d[64 keys, D] += a[64 keys, 64 queries] b[64 queries, D], a from registers. */
template <int D>
__device__ __forceinline__ void multiply_onto(float (&d)[D / 2], const uint32_t (&a)[QUERIES / 4],
                                              uint64_t b) {
#pragma unroll
  for (int k = 0; k < QUERIES / 16; k++) {
    wgmma<D>::template rs<1>(d, a + 4 * k, descriptor_at(b, k * 2048), 1);
  }
  wgmma_commit();
}

template <int D, bool IS_PAIR> struct consumer {
  const call &c;
  shared<D> &sm;
  const int32_t key_tile;
  const int w, thread; /* warpgroup 0 or 1, thread in it */
  int n, flags;        /* tiles so far, modulo STEPS, and what this one is */
  float dk[D / 2], dv[D / 2], s[QUERIES / 2], dp[QUERIES / 2];

  __device__ __forceinline__ consumer(const call &c, shared<D> &sm, int32_t key_tile)
      : c(c), sm(sm), key_tile(key_tile), w(__shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1),
        // The shuffle: else the special register is read again and again, which takes its time.
        thread(__shfl_sync(0xffffffffu, threadIdx.x % 128, threadIdx.x % 32)), n(0), flags(0) {
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk[i] = dv[i] = 0;
    pin(dk); // zeros from here on, and not put there when products already run
    pin(dv);
  }

  __device__ __forceinline__ static int q_of(int n) { return n % Q_STAGES; }
  __device__ __forceinline__ static int o_of(int n) { return n % O_STAGES; }
  __device__ __forceinline__ static int after(int n) { return n == STEPS - 1 ? 0 : n + 1; }
  __device__ __forceinline__ void wait_q(int n) const {
    barrier_wait(&sm.full_q[q_of(n)], n / Q_STAGES & 1);
  }
  __device__ __forceinline__ void wait_o(int n) const {
    barrier_wait(&sm.full_o[o_of(n)], n / O_STAGES & 1);
  }
  __device__ __forceinline__ uint64_t own_keys(const bf16 *x) const {
    return descriptor(shared_address(x) + w * 8192);
  }
  __device__ __forceinline__ static uint64_t tile_at(const bf16 *ring, int index) {
    return descriptor_at(descriptor(shared_address(ring), QUERIES * 128), index * (QUERIES * D * 2));
  }
  /* The first of this thread's two keys, 8 apart, in the tile. */
  __device__ __forceinline__ int key_row() const { return w * 64 + thread / 32 * 16 + thread % 32 / 4; }

  __device__ __forceinline__ void mask() {
    const int q = q_of(n), column = thread % 4 * 2;
    const int32_t *position = c.position_k + key_tile * KEYS + key_row();
    int position0, position1;
    if (IS_PAIR && (flags >> w & UNSEEN)) { // keys that no query sees
      position0 = position1 = -1;
    } else {
      position0 = position[0], position1 = position[8];
    }
#pragma unroll
    for (int i = 0; i < QUERIES / 8; i++) {
      const int2 at = *(const int2 *)&sm.position[q][8 * i + column];
      const int2 first = *(const int2 *)&sm.first[q][8 * i + column];
      s[4 * i] = first.x <= position0 && position0 <= at.x ? s[4 * i] : -INFINITY;
      s[4 * i + 1] = first.y <= position0 && position0 <= at.y ? s[4 * i + 1] : -INFINITY;
      s[4 * i + 2] = first.x <= position1 && position1 <= at.x ? s[4 * i + 2] : -INFINITY;
      s[4 * i + 3] = first.y <= position1 && position1 <= at.y ? s[4 * i + 3] : -INFINITY;
    }
  }
  __device__ __forceinline__ void exponentials() {
#pragma unroll
    for (int i = 0; i < QUERIES / 2; i++) s[i] = exp2_fast(s[i] * c.scale_log2);
  }
  /* x, or x y, as an A operand. */
  __device__ __forceinline__ static void pack_rows(uint32_t (&to)[QUERIES / 4],
                                                   const float (&x)[QUERIES / 2]) {
#pragma unroll
    for (int i = 0; i < QUERIES / 4; i++) to[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
  }
  __device__ __forceinline__ static void pack_rows(uint32_t (&to)[QUERIES / 4], const float (&x)[QUERIES / 2],
                                                   const float (&y)[QUERIES / 2]) {
#pragma unroll
    for (int i = 0; i < QUERIES / 4; i++) to[i] = pack_bf16(x[2 * i] * y[2 * i], x[2 * i + 1] * y[2 * i + 1]);
  }
  __device__ __forceinline__ void start_scores(int n) {
    fresh(s);
    wgmma_fence();
    multiply_rows<D>(s, sm.ones, sm.lse[q_of(n)], own_keys(sm.k), tile_at(sm.q[0], q_of(n)));
  }
  __device__ __forceinline__ void start_dp(int n) {
    fresh(dp);
    wgmma_fence();
    multiply_rows<D>(dp, sm.ones, sm.delta[q_of(n)], own_keys(sm.v), tile_at(sm.o[0], o_of(n)));
  }

  /* ds to shared memory as [64 queries, 128 keys]: this warpgroup's slab of 64 keys. */
  __device__ __forceinline__ void store_ds(const uint32_t (&ds)[QUERIES / 4]) const {
    const int thread = here(this->thread), lane = thread % 32;
    const uint32_t row = (lane / 16 * 8 + lane % 8) * 128, chunk = thread / 32 * 2 + (lane / 8 & 1);
    const uint32_t to = shared_address(sm.ds[o_of(n)]) + w * 8192 + row + ((chunk ^ (lane % 8)) << 4);
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n += 2) {
      stmatrix_t(to + n * 1024, ds[2 * n], ds[2 * n + 1], ds[2 * n + 2], ds[2 * n + 3]);
    }
  }
  /* dq[64 queries, D/2] = ds k, columns w D/2 and on. */
  __device__ __forceinline__ void multiply_ds(float (&dq)[D / 4]) const {
    const uint64_t a = descriptor(shared_address(sm.ds[o_of(n)]));
    const uint64_t b = descriptor(shared_address(sm.k) + (D == 128 ? w * KEYS * 128 : w * 64));
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
      wgmma<D / 2>::template ss<0, 1>(dq, descriptor_at(a, k / 4 * 8192 + k % 4 * 32),
                                      descriptor_at(b, k * 2048), k > 0);
    }
    wgmma_commit();
  }

  /* One query tile. On entry s holds its scores; dk of the tile before and dp of this one are under way.
   * What may have to be waited for is looked at while products run. */
  template <bool IS_LAST> __device__ __forceinline__ void step() {
    float dq[D / 4];
    uint32_t p[QUERIES / 4], ds[QUERIES / 4];
    const int next = after(n);
    const bool is_first_lane = thread % 32 == 0;
    pin(s);
    if (IS_PAIR ? flags >> w & (PARTIAL | UNSEEN) : flags & PARTIAL) mask();
    exponentials();
    pack_rows(p, s);
    wgmma_wait<0>(); // dp, and dk of the tile before: its queries may go
    pin(dk);
    pin(dp);
    if (!(flags & FIRST)) barrier_arrive_warp(&sm.empty_q[q_of(n + Q_STAGES - 1)], is_first_lane);
    pin(p);
    wgmma_fence();
    multiply_onto<D>(dv, p, tile_at(sm.o[0], o_of(n)));
    pack_rows(ds, s, dp);
    store_ds(ds);
    fence_async();
    __syncwarp();
    barrier_arrive_warp(&sm.full_ds, is_first_lane);
    pin(ds);
    if (!IS_LAST) wait_q(next);
    wgmma_wait<0>(); // dv: its registers and gradients may go
    pin(dv);
    pin(p);
    barrier_arrive_warp(&sm.empty_o[o_of(n)], is_first_lane);
    if (!IS_LAST) start_scores(next);
    barrier_wait(&sm.full_ds, n & 1);
    wgmma_fence();
    multiply_ds(dq);
    multiply_onto<D>(dk, ds, tile_at(sm.q[0], q_of(n)));
    named_wait(BAR_EMPTY + w, 160);
    if (thread == 0) sm.dq_info[w] = sm.info[q_of(n)];
    if (!IS_LAST) {
      flags = sm.info[q_of(next)].flags;
      wait_o(next);
    }
    wgmma_wait<1>(); // the next scores and dq
    pin(dq);
    stage_dq<D>(sm.dq[w], dq, here(thread), c.scale);
    if (!IS_LAST) start_dp(next);
    fence_async();
    named_arrive(BAR_FULL + w, 160);
    n = next;
  }
};

/* dk or dv: written, or added where several CTAs have these keys. */
template <int D>
__device__ __forceinline__ void put_gradient(float *to, const float (&x)[D / 2], bool is_shared) {
#pragma unroll
  for (int n = 0; n < D / 8; n++) {
    float *at = to + 8 * n;
    if (is_shared) {
      asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(x[4 * n]), "f"(x[4 * n + 1])
                   : "memory");
      asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(at + 8 * D), "f"(x[4 * n + 2]),
                   "f"(x[4 * n + 3])
                   : "memory");
    } else {
      *(float2 *)at = make_float2(x[4 * n], x[4 * n + 1]);
      *(float2 *)(at + 8 * D) = make_float2(x[4 * n + 2], x[4 * n + 3]);
    }
  }
}

template <int D, bool IS_PAIR>
__device__ __forceinline__ void consume(const call &c, shared<D> &sm, int32_t key_tile, int32_t group) {
  consumer<D, IS_PAIR> it(c, sm, key_tile);
  barrier_wait(&sm.full_kv, 0);
  barrier_wait(&sm.full_q[0], 0);
  it.flags = sm.info[0].flags;
  if (!(it.flags & NOTHING)) {
    it.start_scores(0);
    it.wait_o(0);
    it.start_dp(0);
    wgmma_wait<1>();
    it.flags |= FIRST;
    while (!(it.flags & LAST)) it.template step<false>();
    it.template step<true>();
    wgmma_wait<0>();
    pin(it.dk);
#pragma unroll
    for (int i = 0; i < D / 2; i++) it.dk[i] *= c.scale;
  } else {
    named_wait(BAR_EMPTY + it.w, 160);
    if (it.thread == 0) sm.dq_info[it.w] = {-1, NOTHING, 0};
    named_arrive(BAR_FULL + it.w, 160);
  }
  if (IS_PAIR && key_tile * KEYS + it.w * 64 >= c.T) return; // an odd number of blocks of 64
  const int64_t at = ((int64_t)group * c.T + key_tile * KEYS + it.key_row()) * D + it.thread % 4 * 2;
  put_gradient<D>(c.dk + at, it.dk, c.n_split > 1);
  put_gradient<D>(c.dv + at, it.dv, c.n_split > 1);
}

/* ---- The kernel --------------------------------------------------------------------------------------- */

template <int D, bool ORDERED, class WALK>
__global__ void __launch_bounds__(THREADS, 1)
    backward(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_o,
             const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
             const __grid_constant__ CUtensorMap map_dq, const __grid_constant__ call c) {
#if HALO_SM90
  extern __shared__ __align__(1024) char memory[];
  shared<D> &sm = *(shared<D> *)memory;
  if (threadIdx.x == 0) {
    barrier_init(&sm.full_kv, 1);
    barrier_init(&sm.full_ds, 8 * WARP_ARRIVES);
    for (int i = 0; i < Q_STAGES; i++) {
      barrier_init(&sm.full_q[i], 1 + WARP_ARRIVES); // the loads, and what the producer wrote itself
      barrier_init(&sm.empty_q[i], 8 * WARP_ARRIVES); // the warps that multiply
    }
    for (int i = 0; i < O_STAGES; i++) {
      barrier_init(&sm.full_o[i], 1);
      barrier_init(&sm.empty_o[i], 8 * WARP_ARRIVES);
    }
    barrier_init_done();
    if (ORDERED) sm.ticket = atomicAdd(c.ticket, 1);
  }
  if (threadIdx.x < 16) {
    const bool has_ones = threadIdx.x < 8;
    sm.ones[threadIdx.x / 8][threadIdx.x % 8] =
        make_uint4(has_ones ? 0x3f803f80 : 0, has_ones ? 0x3f80 : 0, 0, 0);
    fence_async();
  }
  __syncthreads();
  // The longest rows of a causal plan, the first keys, start first; in order, the last keys do.
  const int32_t index = ORDERED ? sm.ticket : blockIdx.x;
  int32_t split, group, nth;
  if (c.by_head) {
    nth = index % c.n_tiles;
    group = index / c.n_tiles % c.n_groups;
    split = index / c.n_tiles / c.n_groups;
  } else {
    split = index % c.n_split;
    group = index / c.n_split % c.n_groups;
    nth = index / c.n_split / c.n_groups;
  }
  const int32_t key_tile = ORDERED ? c.n_tiles - 1 - nth : nth;
  const int32_t heads = c.n_heads / c.n_kv_heads, kv_head = group % c.n_kv_heads;
  const int32_t head = kv_head * heads + heads * split / c.n_split;
  const int32_t head_end = kv_head * heads + heads * (split + 1) / c.n_split;
  if (threadIdx.x < 128) {
    registers_drop<D == 128 ? 24 : 56>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      produce<D, ORDERED, WALK>(c, sm, &map_q, &map_o, group / c.n_kv_heads, key_tile, head, head_end);
    } else if (warp == 3) {
      load_keys<D>(sm, &map_k, &map_v, group * c.T + key_tile * KEYS);
    } else {
      write_dq<D, ORDERED>(c, sm, &map_dq, warp - 1);
    }
  } else {
    registers_raise<D == 128 ? 240 : 224>();
    consume<D, WALK::IS_PAIR>(c, sm, key_tile, group);
  }
#endif
}

/* Into how many parts the heads of a group are dealt, and whether CTAs go head after head (by_head) or key
 * after key. Measured on an H200, 16 query and 2 key/value heads, TFLOP/s: 8K tokens want 4 parts (637; 8
 * parts 546), 32K 2 (598; 1 part 541). Long sequences want heads apart, so that CTAs that run together share
 * queries and dq in L2 (128K, 8 parts: 620). Turns are waited for less where additions are fast: by_head
 * (32K 408, else 307). */
void deal(call *c, const halo_attention_queries *a) {
  const int64_t heads = a->n_heads / a->n_kv_heads, ctas = (int64_t)c->n_tiles * c->n_groups;
  const int64_t enough = 7 * halo__cuda_device()->multiprocessors / 2;
  const bool is_long = c->n_tiles >= 512;
  c->by_head = is_long || a->deterministic;
  c->n_split = 1;
  while (c->n_split * 2 <= heads && (is_long || c->n_split == 1 || c->n_split * ctas < enough) &&
         (!a->deterministic || c->n_split < 2)) {
    c->n_split *= 2;
  }
}

call call_of(const halo_attention_queries *a, const halo_attention_tiles *keys) {
  call c = {};
  c.lse = (const float *)a->lse;
  c.delta = (const float *)a->delta;
  c.dq = (float *)a->dq;
  c.dk = (float *)keys->dk;
  c.dv = (float *)keys->dv;
  c.position_q = a->position;
  c.position_k = keys->position;
  c.first = a->first;
  c.first_stride = a->first_stride;
  c.pattern_of = a->pattern_of;
  c.key_offset = keys->by_key->offset;
  c.key_run = keys->by_key->run;
  c.query_offset = keys->by_query->offset;
  c.query_run = keys->by_query->run;
  c.T = (int32_t)(a->block * a->n_blocks);
  c.n_heads = (int32_t)a->n_heads;
  c.n_kv_heads = (int32_t)a->n_kv_heads;
  c.n_groups = (int32_t)(a->n_batch * a->n_kv_heads);
  c.n_blocks = (int32_t)a->n_blocks;
  c.block = (int32_t)a->block;
  c.n_tiles = (c.T + KEYS - 1) / KEYS;
  deal(&c, a);
  c.scale = (float)a->scale;
  c.inverse_scale = (float)(1 / a->scale);
  c.scale_log2 = (float)(a->scale * 1.4426950408889634);
  return c;
}

template <int D, bool ORDERED, class WALK>
halo_status launch(const halo_attention_queries *a, const halo_attention_tiles *keys, const call &c) {
  const int64_t T = c.T, B = a->n_batch, H = a->n_heads, Hk = a->n_kv_heads;
  CUtensorMap q, o, k, v, dq;
  const int64_t size[] = {D, T, H, B}, size_k[] = {D, B * Hk * T}, size_dq[] = {D, B * H * T};
  const int64_t q_stride[] = {a->q_stride[1] * 2, a->q_stride[2] * 2, a->q_stride[0] * 2};
  const int64_t o_stride[] = {a->grad_stride[1] * 2, a->grad_stride[2] * 2, a->grad_stride[0] * 2};
  const int64_t k_stride[] = {D * 2}, dq_stride[] = {D * 4};
  const int32_t box[] = {64, QUERIES, 1, 1}, box_k[] = {64, KEYS}, box_dq[] = {32, QUERIES};
  HALO_TRY(tensor_map(&q, HALO_BF16, a->q, 4, size, q_stride, box));
  HALO_TRY(tensor_map(&o, HALO_BF16, a->grad, 4, size, o_stride, box));
  HALO_TRY(tensor_map(&k, HALO_BF16, keys->k, 2, size_k, k_stride, box_k));
  HALO_TRY(tensor_map(&v, HALO_BF16, keys->v, 2, size_k, k_stride, box_k));
  HALO_TRY(tensor_map(&dq, HALO_F32, a->dq, 2, size_dq, dq_stride, box_dq));
  const int bytes = (int)sizeof(shared<D>);
  HALO_CUDA_TRY(cudaFuncSetAttribute(backward<D, ORDERED, WALK>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const int64_t ctas = (int64_t)c.n_tiles * c.n_groups * c.n_split;
  backward<D, ORDERED, WALK><<<(unsigned)ctas, THREADS, bytes, halo__cuda_stream()>>>(q, o, k, v, dq, c);
  HALO_LAUNCHED("attention_sm90_bwd");
  return HALO_OK;
}

} // namespace

bool halo__sm90_bwd_fits(const halo_attention_queries *a) {
  const halo__cuda_properties *device = halo__cuda_device();
  bool good = device->major == 9 && a->dtype == HALO_BF16 && (a->head_size == 64 || a->head_size == 128) &&
              (a->block % KEYS == 0 || (a->block == 64 && !a->deterministic)) && a->n_parts == 1 &&
              (int64_t)a->n_batch * a->n_heads * a->block * a->n_blocks < INT32_MAX &&
              (uintptr_t)a->q % 16 == 0 && (uintptr_t)a->grad % 16 == 0;
  for (int i = 0; i < 3; i++) good = good && a->q_stride[i] % 8 == 0 && a->grad_stride[i] % 8 == 0;
  return good;
}

halo_status halo__sm90_bwd(const halo_attention_queries *a, const halo_attention_tiles *keys) {
  call c = call_of(a, keys);
  if (c.n_tiles == 0 || c.n_groups == 0) return HALO_OK;
  const cudaStream_t stream = halo__cuda_stream();
  if (c.n_split > 1) {
    const size_t bytes = (size_t)c.n_groups * c.T * a->head_size * sizeof(float);
    HALO_CUDA_TRY(cudaMemsetAsync(c.dk, 0, bytes, stream));
    HALO_CUDA_TRY(cudaMemsetAsync(c.dv, 0, bytes, stream));
  }
  const bool is_128 = a->head_size == 128;
  if (a->block == 64) {
    return is_128 ? launch<128, false, pair_walk>(a, keys, c) : launch<64, false, pair_walk>(a, keys, c);
  }
  if (!a->deterministic) {
    return is_128 ? launch<128, false, walk>(a, keys, c) : launch<64, false, walk>(a, keys, c);
  }
  const int64_t turns = a->n_batch * a->n_heads * c.T / QUERIES * 2;
  HALO_TRY(halo__alloc((void **)&c.turn, (turns + 1) * (int64_t)sizeof *c.turn, HALO_CUDA));
  c.ticket = c.turn + turns;
  const cudaError_t error = cudaMemsetAsync(c.turn, 0, (size_t)(turns + 1) * sizeof *c.turn, stream);
  halo_status status = error == cudaSuccess ? HALO_OK : halo__cuda_error(error, "cudaMemsetAsync");
  if (status == HALO_OK) {
    status = is_128 ? launch<128, true, walk>(a, keys, c) : launch<64, true, walk>(a, keys, c);
  }
  halo__free(c.turn);
  return status;
}
