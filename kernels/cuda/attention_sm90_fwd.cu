/* attention_sm90_fwd: queries of one rank meet the keys of one rank in tiles, on Hopper.
 *
 *   s = scale log2(e) q k^T            -inf where first[t] <= position[u] <= position[t] fails
 *   p = 2^(s - m')                     m' = m, or a maximum so far where m is too low
 *   l = l 2^(m-m') + rowsum(p)         o = o 2^(m-m') + p v
 *
 * shapes    q [B,T,H,D] strided, k, v [B,Hk,T,D]; o, m, l, lse as in kernels.h; T = block * n_blocks
 * lists     row pattern * n_blocks + query block -> runs of key blocks (core/plan.h). Inside a block
 *           positions are consecutive, so a partial tile needs the position of its first key only
 * work      4 G G D flops a tile and head. Tensor cores: 2048 cycles for a tile of 128 x 128 x 128;
 *           exponentials: 1024 cycles on the side
 * roles     one CTA per multiprocessor, three warpgroups. Of the first, one warp is the planner: it takes
 *           the next (head, query block) from a counter and reads its runs; another is the loader: it brings
 *           Q and then K and V of tile after tile by TMA into two buffers each. The other two warpgroups
 *           own 64 of the 128 rows each, all in registers: S (64 a thread), P as bf16 (32), O (64).
 *           Blocks of 64 tokens have one such warpgroup a CTA, and two CTAs a multiprocessor.
 * D = 64    products take half the time, exponentials as long: with two warpgroups latencies show (each warp
 *           stands in line for S, then for the exponentials, with 900 of 2150 cycles a step in between), and
 *           neither turns nor a second S in flight helped. So four: a CTA has two teams, each of planner,
 *           loader and two warpgroups with rows of their own. 112 registers a thread are S of 64 keys (32), P
 *           (16), O (32), the first half of the next P (8) and 24: a key tile is met in two halves.
 * overlap   a warpgroup issues S' = Q K' of the next tile and O += P V of this one together, waits for S',
 *           and makes half of P' before it waits for O. The first tile of a row goes with the last of the row
 *           before, so that nothing waits between rows (the software pipeline is FlashAttention-3's, section
 *           3.2, carried across rows; not so for D = 64, where the other team fills the gap). Turns between
 *           warpgroups (section 3.1) cost 2% to 4%.
 * reference the maximum is not looked for: p is made with m as it stands, and only where a thread's share
 *           of a tile's p sums to more than 2^16 (a later score above m by about as much; or nothing seen
 *           yet, m = -inf, which gives inf or NaN) are the tile's maximum taken as m, l and o rescaled and p
 *           made again. S is kept until then. A row's first tile sets m to its maximum. Any m serves:
 *           o / l is the same and p's rounding to bf16 is relative. Without the 64 maxima, the shuffles and
 *           the rescaling: 675 to 794 TFLOP/s at 32K (with the turns gone), 663 to 691 at 128K.
 * repeats   whether a row is a CTA's first or follows another depends on who took which ticket, and the two are
 *           different code: no product there may be fused into an addition in one and not in the other
 *           (__fmul_rn, and sums before products), or results differ in the last bit from run to run.
 * order     longest rows first; heads in sections whose K and V fit in half of L2, so that all CTAs of
 *           a time sweep the same keys. A planner takes a ticket only when there is a place for its row: one
 *           that is further ahead holds long rows that others could do.
 * numbers   a row that saw nothing: m = -inf, l = 0, o = 0; written out as out = 0, lse = -inf. State: m is
 *           a reference with o and l relative to 2^m, as attention.cuh allows
 * ptxas     "wgmma serialized" (C7510 to C7515) and spills are errors here: accumulators must not be
 *           written in branches while a product is under way. Operands start at R24, whatever else is live: S,
 *           P, O and 24 must fit (C7512)
 * twin      kernels/cpu/attention_tiles.c, attention_ends.c
 */
#include "attention.cuh"
#include "sm90.cuh"

namespace {

using namespace halo::sm90;

constexpr int ROWS = 2;          // places between planner and loader
constexpr float MOST = 65536.0f; // sum of p in a tile, for one thread, that makes the reference move
constexpr float LOWEST = -1e38f; // below all scores
constexpr float LN_2 = 0.6931471805599453f;

struct item {   // one query block of one head, from producer to consumers
  int n_tiles;  // -1: no more items
  int batch, head, block;
};
struct item_runs { // the same with its lists, from planner to loader
  item it;
  int64_t begin, end;
  halo__span run[32];
  int position[32]; // of the first key of a run, where it is partial
};
struct tile_note { // of a key tile
  int partial, position; // position of its first key, where partial
};

struct arguments {
  CUtensorMap q, k, v, out;
  float scale_log2;
  int n_heads, n_kv_heads, n_blocks, n_units, section; // heads; section: heads that go together
  int64_t T;
  const int32_t *position_q, *position_k, *first, *pattern_of;
  int64_t first_stride;
  const int64_t *offset;
  const halo__span *run;
  float *o, *m, *l; // running state, or
  float *lse;       // the result (may be NULL) beside `out`
  int64_t lse_stride[2];
};

/* Next (head, query block) to do; back to 0 when the last planner has seen the end. Launches share it: all
 * are on one stream. */
__device__ int next_ticket;

template <int D, int G> struct shape {
  static constexpr bool HALVES = D == 64 && G == 128;     // a key tile is met in two halves, by two teams a CTA
  static constexpr int TEAMS = HALVES ? 2 : 1;
  static constexpr int GROUPS = G / 64;                   // consumer warpgroups of a team
  static constexpr int THREADS = 128 * (1 + TEAMS * GROUPS);
  static constexpr int PER_SM = G == 128 ? 1 : 2;         // CTAs
  static constexpr int FEW = 24;                          // registers of the loading warpgroup
  static constexpr int MANY = HALVES ? 112 : G == 128 ? 240 : 232; // and of a computing one
  static constexpr int TILE = G * D * 2;                  // bytes of a Q, K, V or O tile
  static constexpr int SLAB = G * 128;                    // bytes of 64 columns of it
  static constexpr int STAGES = 2;
  static constexpr int KEYS = HALVES ? 64 : G;            // keys of a step
};

/* What a team shares: tiles, */
template <int D, int G> struct team_tiles {
  using S = shape<D, G>;
  char q[S::STAGES][S::TILE], k[S::STAGES][S::TILE], v[S::STAGES][S::TILE], out[S::TILE];
};
/* and what is known of them. */
template <int D, int G> struct team_state {
  using S = shape<D, G>;
  uint64_t q_full[S::STAGES], q_free[S::STAGES], k_full[S::STAGES], k_free[S::STAGES],
      v_full[S::STAGES], v_free[S::STAGES], row_full[ROWS], row_free[ROWS];
  item items[S::STAGES];
  tile_note notes[S::STAGES];
  item_runs rows[ROWS];
};
template <int D, int G> struct shared_memory {
  team_tiles<D, G> tiles[shape<D, G>::TEAMS];
  team_state<D, G> state[shape<D, G>::TEAMS];
};

#if HALO_SM90

/* ---- Planner: a warp that finds out what comes next ---------------------------------------------- */

template <int TEAMS> __device__ __forceinline__ int take_ticket(const arguments &a, int lane) {
  int t = 0;
  if (lane == 0) {
    t = atomicAdd(&next_ticket, 1);
    if (t == a.n_units * a.n_blocks + (int)gridDim.x * TEAMS - 1) next_ticket = 0;
  }
  return __shfl_sync(0xffffffffu, t, 0);
}

static __device__ __forceinline__ halo__span lane_run(const arguments &a, int64_t begin, int64_t end,
                                                      int lane) {
  const halo__span none = {0, 0, 0};
  return begin + lane < end ? a.run[begin + lane] : none;
}

/* Rows of tickets go to the loader, with the first 32 runs of each, one a lane. */
template <int D, int G>
__device__ __forceinline__ void plan(const arguments &a, team_state<D, G> &s, int lane) {
  ring_place<ROWS> to;
  const int n_items = a.n_units * a.n_blocks;
#pragma unroll 1
  for (bool more = true; more;) {
    barrier_wait(&s.row_free[to.index], to.parity ^ 1); // no ticket before it is wanted
    const int ticket = take_ticket<shape<D, G>::TEAMS>(a, lane);
    more = ticket < n_items;
    item it = {-1, 0, 0, 0};
    int64_t begin = 0, end = 0;
    halo__span run = {0, 0, 0};
    if (more) {
      const int section = ticket / (a.section * a.n_blocks), first = section * a.section;
      const int heads = min(a.section, a.n_units - first), rest = ticket - first * a.n_blocks;
      const int unit = first + rest % heads;
      it.block = a.n_blocks - 1 - rest / heads;
      it.batch = unit / a.n_heads;
      it.head = unit - it.batch * a.n_heads;
      const int64_t row = (int64_t)a.pattern_of[unit] * a.n_blocks + it.block;
      begin = a.offset[row];
      end = a.offset[row + 1];
      run = lane_run(a, begin, end, lane);
      int n = run.count;
#pragma unroll 1
      for (int64_t i = begin + 32; i < end; i += 32) n += lane_run(a, i, end, lane).count;
#pragma unroll
      for (int o = 16; o > 0; o >>= 1) n += __shfl_xor_sync(0xffffffffu, n, o);
      it.n_tiles = n;
      if (n == 0 && a.o != nullptr) continue; // the running state stays as it is
    }
    const int position = run.partial ? a.position_k[(int64_t)run.first * G] : 0;
    s.rows[to.index].run[lane] = run;
    s.rows[to.index].position[lane] = position;
    if (lane == 0) {
      s.rows[to.index].it = it;
      s.rows[to.index].begin = begin;
      s.rows[to.index].end = end;
      if (it.n_tiles > 0) {
#pragma unroll
        for (int d = 0; d < D / 64; d++) l2_prefetch(&a.q, d * 64, it.block * G, it.head, it.batch);
      }
    }
    __syncwarp();
    barrier_arrive_warp(&s.row_full[to.index], lane == 0);
    to.next();
  }
}

/* ---- Loader: a warp that brings rows, keys and values -------------------------------------------- */

template <int D, int G> struct loader {
  using S = shape<D, G>;
  const arguments &a;
  team_tiles<D, G> &tiles;
  team_state<D, G> &s;
  const int lane;
  ring_place<ROWS> row;
  ring_place<S::STAGES> q, k, v;

  __device__ __forceinline__ void load_k(int unit, int block, int partial, int position) {
    barrier_wait(&s.k_free[k.index], k.parity ^ 1);
    if (lane == 0) {
      const uint64_t keep = l2_evict_last();
#pragma unroll
      for (int d = 0; d < D / 64; d++) {
        tma_load(tiles.k[k.index] + d * S::SLAB, &a.k, &s.k_full[k.index], keep, d * 64, block * G, unit);
      }
      s.notes[k.index] = {partial, position};
      barrier_expect(&s.k_full[k.index], S::TILE);
    }
    k.next();
  }
  __device__ __forceinline__ void load_v(int unit, int block) {
    barrier_wait(&s.v_free[v.index], v.parity ^ 1);
    if (lane == 0) {
      const uint64_t keep = l2_evict_last();
      barrier_expect(&s.v_full[v.index], S::TILE);
#pragma unroll
      for (int d = 0; d < D / 64; d++) {
        tma_load(tiles.v[v.index] + d * S::SLAB, &a.v, &s.v_full[v.index], keep, d * 64, block * G, unit);
      }
    }
    v.next();
  }
  __device__ __forceinline__ void load_q(const item &it) {
    barrier_wait(&s.q_free[q.index], q.parity ^ 1);
    if (lane == 0) {
      s.items[q.index] = it;
      if (it.n_tiles > 0) {
        const uint64_t once = l2_evict_first();
        barrier_expect(&s.q_full[q.index], S::TILE);
#pragma unroll
        for (int d = 0; d < D / 64; d++) {
          tma_load(tiles.q[q.index] + d * S::SLAB, &a.q, &s.q_full[q.index], once, d * 64, it.block * G,
                   it.head, it.batch);
        }
        if (a.o != nullptr) { // o of the running state is wanted soon, too
          const int64_t at = ((int64_t)it.batch * a.n_heads + it.head) * a.T + (int64_t)it.block * G;
          l2_prefetch(a.o + at * D, G * D * 4);
        }
      } else {
        barrier_arrive(&s.q_full[q.index]);
      }
    }
    q.next();
  }
  /* K of a tile goes out before V of the tile before it: the order in which they are used. */
  __device__ __forceinline__ void load_row(int unit, int64_t begin, int64_t end, halo__span run,
                                           int position) {
    int last = -1;
    for (int64_t i = begin; i < end; i++) {
      const int at = (int)(i - begin) & 31;
      if (at == 0 && i != begin) {
        run = lane_run(a, i, end, lane);
        position = run.partial ? a.position_k[(int64_t)run.first * G] : 0;
      }
      int at_key = __shfl_sync(0xffffffffu, position, at);
      const int first = __shfl_sync(0xffffffffu, run.first, at);
      const int count = __shfl_sync(0xffffffffu, run.count, at);
      const int partial = __shfl_sync(0xffffffffu, run.partial, at);
#pragma unroll 1
      for (int block = first; block < first + count; block++) {
        if (partial && block > first) at_key = a.position_k[(int64_t)block * G];
        load_k(unit, block, partial, at_key);
        if (last >= 0) load_v(unit, last);
        last = block;
      }
    }
    load_v(unit, last);
  }

  __device__ __forceinline__ void work() {
    for (;;) {
      barrier_wait(&s.row_full[row.index], row.parity);
      const item it = s.rows[row.index].it;
      const int64_t begin = s.rows[row.index].begin, end = s.rows[row.index].end;
      const halo__span run = s.rows[row.index].run[lane];
      const int position = s.rows[row.index].position[lane];
      __syncwarp();
      barrier_arrive_warp(&s.row_free[row.index], lane == 0);
      row.next();
      load_q(it);
      if (it.n_tiles < 0) break;
      if (it.n_tiles == 0) continue;
      load_row(it.batch * a.n_kv_heads + it.head / (a.n_heads / a.n_kv_heads), begin, end, run,
               position);
    }
    // Buffers must not go while TMA or consumers are at work: wait until the last of each was freed.
    for (int i = 0; i < S::STAGES; i++, k.next()) barrier_wait(&s.k_free[k.index], k.parity ^ 1);
    for (int i = 0; i < S::STAGES; i++, v.next()) barrier_wait(&s.v_free[v.index], v.parity ^ 1);
  }
};

/* ---- Consumers --------------------------------------------------------------------------------- */

template <int D, int G> struct consumer {
  using S = shape<D, G>;
  static constexpr int NS = S::KEYS / 2, NO = D / 2; // accumulators of a thread
  const arguments &a;
  team_tiles<D, G> &tiles;
  team_state<D, G> &s;
  const int group, barrier; // warpgroup of the team; number of its own named barrier
  ring_place<S::STAGES> q, k, v;
  int first_key[2], last_key[2]; // positions that the rows see
  float m[2], l[2];

  /* Where registers are few they are asked for anew. */
  __device__ __forceinline__ int thread() const {
    int x = threadIdx.x;
    if constexpr (S::HALVES) asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
  }
  __device__ __forceinline__ int lane() const { return thread() % 32; }
  /* The first of this thread's two rows of the query block; the other is + 8. */
  __device__ __forceinline__ int row() const {
    const int x = thread();
    return (x / 32 - 4) % (4 * S::GROUPS) * 16 + x % 32 / 4;
  }

  /* S = Q K^T of the next key tile, or of a half of it, issued. */
  __device__ __forceinline__ void issue_scores(float (&sc)[NS], uint64_t q_tile, int half = 0) {
    // The shuffle tells the compiler that the index is the same in the warp.
    const uint64_t k_tile = descriptor(shared_address(tiles.k[__shfl_sync(0xffffffffu, k.index, 0)]));
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      const uint32_t at = i / 4 * S::SLAB + i % 4 * 32;
      wgmma<S::KEYS>::template ss<0, 0>(sc, descriptor_at(q_tile, at), descriptor_at(k_tile, at + half * 8192),
                                        i > 0);
    }
    wgmma_commit();
  }
  /* O (+)= P V of the next value tile, or of a half of it, issued. */
  __device__ __forceinline__ void issue_output(float (&o)[NO], const uint32_t (&p)[NS / 2], int add,
                                               int half = 0) {
    const uint64_t v_tile =
        descriptor(shared_address(tiles.v[__shfl_sync(0xffffffffu, v.index, 0)]), S::SLAB);
#pragma unroll
    for (int i = 0; i < S::KEYS / 16; i++) {
      wgmma<D>::template rs<1>(o, p + 4 * i, descriptor_at(v_tile, half * 8192 + i * 2048), i > 0 ? 1 : add);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void free_buffer(uint64_t *bar) {
    barrier_arrive_warp(bar, S::HALVES ? elected() : lane() == 0);
  }

  /* Of row r (0 or 1) only keys `from` to `to` of the tile stay. */
  __device__ __forceinline__ void mask_row(float (&sc)[NS], int r, int from, int to) {
#pragma unroll
    for (int i = 0; i < NS / 4; i++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const bool seen = 8 * i + e >= from && 8 * i + e <= to;
        sc[4 * i + 2 * r + e] = seen ? sc[4 * i + 2 * r + e] : -INFINITY;
      }
    }
  }
  __device__ __forceinline__ void mask(float (&sc)[NS], int position) {
    const int shift = position + 2 * (lane() & 3);
#pragma unroll
    for (int r = 0; r < 2; r++) mask_row(sc, r, first_key[r] - shift, last_key[r] - shift);
  }
  /* The same with what the item's rows see from memory, one row at a time. */
  __device__ __forceinline__ void mask_anew(float (&sc)[NS], int position) {
    const item it = s.items[q.index];
    const int shift = position + 2 * (lane() & 3);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int token = it.block * G + row() + 8 * r;
      int from = a.first[it.batch * a.first_stride + token] - shift, to = a.position_q[token] - shift;
      asm volatile("" : "+r"(from), "+r"(to)::"memory");
      mask_row(sc, r, from, to);
    }
  }

  /* The exact reference of a tile: m = max(m, its scores), and what l and o are to be multiplied by. */
  __device__ __forceinline__ void move_reference(const float (&sc)[NS], float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top[4] = {sc[2 * r], sc[2 * r + 1], sc[4 + 2 * r], sc[4 + 2 * r + 1]};
#pragma unroll
      for (int i = 2; i < NS / 4; i++) {
        top[i % 2 * 2] = fmaxf(top[i % 2 * 2], sc[4 * i + 2 * r]);
        top[i % 2 * 2 + 1] = fmaxf(top[i % 2 * 2 + 1], sc[4 * i + 2 * r + 1]);
      }
      float most = fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = __fmul_rn(fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2)), a.scale_log2);
      factor[r] = most > m[r] ? exp2_fast(m[r] - most) : 1.0f;
      m[r] = fmaxf(m[r], most);
    }
  }
  /* P = 2^(S - base), packed, and its sums, two or four; of the step's columns in groups of 8 those
   * FROM .. TO - 1. */
  template <int FROM, int TO, int SUMS>
  __device__ __forceinline__ void exponentials(uint32_t *p, float (&sum)[SUMS], const float (&sc)[NS],
                                               const float (&base)[2]) {
#pragma unroll
    for (int i = FROM; i < TO; i++) {
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        x[e] = exp2_fast(fmaf(sc[4 * i + e], a.scale_log2, -base[e / 2]));
        sum[SUMS == 4 ? e : e / 2] += x[e];
      }
      p[2 * i] = pack_bf16(x[0], x[1]);
      p[2 * i + 1] = pack_bf16(x[2], x[3]);
    }
  }
  /* Where a row has seen nothing, 2^(-inf - 0) is the 0 that is meant. */
  __device__ __forceinline__ void get_base(float (&base)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; r++) base[r] = m[r] > -INFINITY ? m[r] : 0.0f;
  }
  __device__ __forceinline__ void add_sums(const float (&sum)[4]) {
#pragma unroll
    for (int r = 0; r < 2; r++) l[r] += sum[2 * r] + sum[2 * r + 1];
  }
  __device__ __forceinline__ void rescale(float (&o)[NO], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < NO; i++) o[i] *= factor[i / 2 % 2];
  }

  /* Rows of the running state in [B,H,T], and this thread's columns of o. */
  __device__ __forceinline__ int64_t state_row(const item &it) const {
    return ((int64_t)it.batch * a.n_heads + it.head) * a.T + (int64_t)it.block * G + row();
  }
  __device__ __forceinline__ void read_state(const item &it, float (&o)[NO]) {
    const int64_t at = state_row(it);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float *from = a.o + (at + 8 * r) * D + 2 * (lane() & 3);
#pragma unroll
      for (int i = 0; i < NO / 4; i++) {
        const float2 x = *(const float2 *)(from + 8 * i);
        o[4 * i + 2 * r] = x.x;
        o[4 * i + 2 * r + 1] = x.y;
      }
    }
  }
  __device__ __forceinline__ void write_state(const item &it, const float (&o)[NO], const float (&m_end)[2],
                                              const float (&l_end)[2]) {
    const int64_t at = state_row(it);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if ((lane() & 3) == 0) {
        a.m[at + 8 * r] = m_end[r];
        a.l[at + 8 * r] = l_end[r];
      }
      float *to = a.o + (at + 8 * r) * D + 2 * (lane() & 3);
#pragma unroll
      for (int i = 0; i < NO / 4; i++) {
        *(float2 *)(to + 8 * i) = make_float2(o[4 * i + 2 * r], o[4 * i + 2 * r + 1]);
      }
    }
  }
  /* out = o / l through shared memory and TMA; lse. */
  __device__ __forceinline__ void write_result(const item &it, const float (&o)[NO], const float (&m_end)[2],
                                               const float (&l_end)[2]) {
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; r++) inverse[r] = l_end[r] > 0.0f ? __fdividef(1.0f, l_end[r]) : 0.0f;
    const bool is_issuer = threadIdx.x % 128 == 0;
    if (is_issuer) bulk_wait_read<0>(); // of the item before
    named_wait(barrier, 128);
    const uint32_t base = shared_address(tiles.out);
    const int to_row = row() - lane() / 4 + (lane() & 15), half = lane() >> 4;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      const float *x = o + 8 * i;
      stmatrix(base + i / 4 * S::SLAB + swizzled(to_row, 2 * (i % 4) + half),
               pack_bf16(x[0] * inverse[0], x[1] * inverse[0]),
               pack_bf16(x[2] * inverse[1], x[3] * inverse[1]),
               pack_bf16(x[4] * inverse[0], x[5] * inverse[0]),
               pack_bf16(x[6] * inverse[1], x[7] * inverse[1]));
    }
    fence_async();
    named_wait(barrier, 128);
    if (is_issuer) {
#pragma unroll
      for (int d = 0; d < D / 64; d++) {
        tma_store(&a.out, tiles.out + d * S::SLAB + group * 8192, d * 64, it.block * G + group * 64, it.head,
                  it.batch);
      }
      bulk_commit();
    }
    if (a.lse != nullptr && (lane() & 3) == 0) {
      float *to = a.lse + it.batch * a.lse_stride[0] + it.head * a.lse_stride[1] +
                  (int64_t)it.block * G + row();
#pragma unroll
      for (int r = 0; r < 2; r++) {
        to[8 * r] = l_end[r] > 0.0f ? (m_end[r] + __log2f(l_end[r])) * LN_2 : -INFINITY;
      }
    }
  }

  /* What the rows of an item may see, and where they start from. */
  __device__ __forceinline__ void open(const item &it) {
    const int64_t at = state_row(it);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int64_t t = (int64_t)it.block * G + row() + 8 * r;
      last_key[r] = a.position_q[t];
      first_key[r] = a.first[it.batch * a.first_stride + t];
      m[r] = a.o == nullptr ? -INFINITY : a.m[at + 8 * r];
      l[r] = a.o == nullptr || (lane() & 3) != 0 ? 0.0f : a.l[at + 8 * r]; // each of four threads has a share
    }
  }
  __device__ __forceinline__ void close(const item &it, const float (&o)[NO], const float (&m_end)[2],
                                        const float (&l_share)[2]) {
    float l_end[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      l_end[r] = l_share[r] + __shfl_xor_sync(0xffffffffu, l_share[r], 1);
      l_end[r] += __shfl_xor_sync(0xffffffffu, l_end[r], 2);
    }
    if (a.o != nullptr) write_state(it, o, m_end, l_end);
    else write_result(it, o, m_end, l_end);
  }
  /* The next item's slot; the one before it must not be read any more. */
  __device__ __forceinline__ item next_item() {
    barrier_wait(&s.q_full[q.index], q.parity);
    item it = s.items[q.index]; // the shuffles also see to it that all have read it before one frees it
    it.n_tiles = __shfl_sync(0xffffffffu, it.n_tiles, 0);
    it.batch = __shfl_sync(0xffffffffu, it.batch, 0);
    it.head = __shfl_sync(0xffffffffu, it.head, 0);
    it.block = __shfl_sync(0xffffffffu, it.block, 0);
    return it;
  }
  __device__ __forceinline__ uint64_t q_tile() const {
    return descriptor(shared_address(tiles.q[q.index]) + group * 8192);
  }

  /* Items one after the other, from `it` on, until one has no tiles: that one is returned. All but the
   * first begin while the one before ends: S of a row's first tile is issued with P V of the last tile
   * of the row before, so that the tensor cores do not wait between rows. */
  __device__ __forceinline__ item meet(item it, float (&sc)[NS], uint32_t (&p)[NS / 2], float (&o)[NO]) {
    const bool is_running = a.o != nullptr;
    float factor[2];
    open(it);
    barrier_wait(&s.k_full[k.index], k.parity);
    tile_note note = s.notes[k.index];
    pin(sc);
    wgmma_fence();
    issue_scores(sc, q_tile());
    wgmma_wait<0>();
    pin(sc);
    free_buffer(&s.k_free[k.index]);
    k.next();
    if (note.partial) mask(sc, note.position);
    move_reference(sc, factor);
    {
      float base[2], sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      get_base(base);
      exponentials<0, NS / 8>(p, sum, sc, base);
      exponentials<NS / 8, NS / 4>(p, sum, sc, base);
#pragma unroll
      for (int r = 0; r < 2; r++) l[r] = __fmul_rn(l[r], factor[r]);
      add_sums(sum);
    }
    if (is_running) {
      read_state(it, o);
      rescale(o, factor);
    }
    int add = is_running, left = it.n_tiles - 1; // tiles of this row whose S was not issued
    item next = it;
    for (;;) {
      const bool is_new = left == 0;
      if (is_new) {
        free_buffer(&s.q_free[q.index]);
        q.next();
        next = next_item();
        if (next.n_tiles <= 0) break;
        left = next.n_tiles;
      }
      left--;
      barrier_wait(&s.k_full[k.index], k.parity);
      note = s.notes[k.index];
      pin(sc);
      pin(p);
      pin(o);
      wgmma_fence();
      issue_scores(sc, q_tile());
      barrier_wait(&s.v_full[v.index], v.parity);
      wgmma_fence();
      issue_output(o, p, add);
      wgmma_wait<1>();
      pin(sc);
      free_buffer(&s.k_free[k.index]);
      k.next();
      const float m_end[2] = {m[0], m[1]}, l_end[2] = {l[0], l[1]};
      if (is_new) open(next);
      if (note.partial) mask(sc, note.position);
      float base[2] = {m[0], m[1]}, sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (is_new) {
        move_reference(sc, factor);
        get_base(base);
      }
      uint32_t half[NS / 2]; // the first half only
      exponentials<0, NS / 8>(half, sum, sc, base);
#pragma unroll
      for (int i = 0; i < NS / 4; i++) asm volatile("" : "+r"(half[i])::"memory");
      // Within a basic block ptxas moves the wait for O before the exponentials that are to run beside it;
      // this branch, never taken, ends the block.
      if (sum[0] < 0.0f) asm volatile("trap;");
      wgmma_wait<0>();
      pin(o);
      pin(p);
      free_buffer(&s.v_free[v.index]);
      v.next();
#pragma unroll
      for (int i = 0; i < NS / 4; i++) p[i] = half[i];
      exponentials<NS / 8, NS / 4>(p, sum, sc, base);
      add = 1;
      if (is_new) {
        close(it, o, m_end, l_end);
        it = next;
        add = is_running;
        if (is_running) {
          read_state(it, o);
          rescale(o, factor);
#pragma unroll
          for (int r = 0; r < 2; r++) l[r] = __fmul_rn(l[r], factor[r]);
        }
      }
      // NaN, where nothing was seen before, is not below the limit either.
      const bool is_fine = (sum[0] + sum[1]) + (sum[2] + sum[3]) <= MOST;
      if (!is_new && __any_sync(0xffffffffu, !is_fine)) {
        move_reference(sc, factor);
        get_base(base);
        sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
        exponentials<0, NS / 8>(p, sum, sc, base);
        exponentials<NS / 8, NS / 4>(p, sum, sc, base);
#pragma unroll
        for (int r = 0; r < 2; r++) l[r] = __fmul_rn(l[r], factor[r]);
        rescale(o, factor);
      }
      add_sums(sum);
    }
    barrier_wait(&s.v_full[v.index], v.parity);
    pin(p);
    pin(o);
    wgmma_fence();
    issue_output(o, p, add);
    wgmma_wait<0>();
    pin(o);
    free_buffer(&s.v_free[v.index]);
    v.next();
    close(it, o, m, l);
    return next;
  }

  /* Step of half HALF: its S goes with P V of the half before it, which P holds; then P is its own. */
  template <int HALF>
  __device__ __forceinline__ void step(float (&sc)[NS], uint32_t (&p)[NS / 2], float (&o)[NO], int &add) {
    constexpr int EARLY = NS / 8; // columns in groups of 8 before P V is waited for
    if (HALF == 0) barrier_wait(&s.k_full[k.index], k.parity);
    barrier_wait(&s.v_full[v.index], v.parity);
    pin(sc);
    pin(p);
    pin(o);
    wgmma_fence();
    issue_scores(sc, q_tile(), HALF);
    issue_output(o, p, add, 1 - HALF);
    // Branches never taken end basic blocks, within which ptxas would move products behind exponentials and
    // waits before them.
    if (l[0] < 0.0f) asm volatile("trap;");
    wgmma_wait<1>();
    pin(sc);
    const tile_note note = s.notes[k.index];
    if (note.partial) mask_anew(sc, note.position + HALF * S::KEYS);
    if (HALF == 1) {
      __syncwarp();
      free_buffer(&s.k_free[k.index]);
      k.next();
    }
    float sum[2] = {0.0f, 0.0f};
    uint32_t early[2 * EARLY];
    exponentials<0, EARLY>(early, sum, sc, m);
#pragma unroll
    for (int i = 0; i < 2 * EARLY; i++) asm volatile("" : "+r"(early[i])::"memory");
    if (sum[0] < 0.0f) asm volatile("trap;");
    wgmma_wait<0>();
    pin(o);
    pin(p);
    add = 1;
    if (HALF == 0) {
      free_buffer(&s.v_free[v.index]);
      v.next();
    }
#pragma unroll
    for (int i = 0; i < 2 * EARLY; i++) p[i] = early[i];
    exponentials<EARLY, NS / 4>(p, sum, sc, m);
    const bool is_fine = sum[0] + sum[1] <= MOST; // NaN is not
    if (__any_sync(0xffffffffu, !is_fine)) {
      float factor[2];
      move_reference(sc, factor);
      sum[0] = sum[1] = 0.0f;
      exponentials<0, NS / 4>(p, sum, sc, m);
#pragma unroll
      for (int r = 0; r < 2; r++) l[r] = __fmul_rn(l[r], factor[r]);
      rescale(o, factor);
    }
    l[0] += sum[0];
    l[1] += sum[1];
  }

  /* One item, its key tiles in halves. m is never -inf here, but LOWEST. */
  __device__ __forceinline__ void meet_halves(float (&sc)[NS], uint32_t (&p)[NS / 2], float (&o)[NO]) {
    const bool is_running = a.o != nullptr;
    int add = is_running, left;
    {
      const item it = s.items[q.index];
      const int64_t at = state_row(it);
      left = it.n_tiles;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        m[r] = is_running ? fmaxf(a.m[at + 8 * r], LOWEST) : LOWEST;
        l[r] = !is_running || (lane() & 3) != 0 ? 0.0f : a.l[at + 8 * r]; // each of four threads has a share
      }
    }
#pragma unroll
    for (int i = 0; i < NS; i++) asm volatile("" : "=f"(sc[i])); // nothing is kept for what comes
    barrier_wait(&s.k_full[k.index], k.parity);
    wgmma_fence();
    issue_scores(sc, q_tile());
    wgmma_wait<0>();
    pin(sc);
    const tile_note note = s.notes[k.index];
    if (note.partial) mask_anew(sc, note.position);
    float factor[2], sum[2] = {0.0f, 0.0f};
    move_reference(sc, factor);
    exponentials<0, NS / 4>(p, sum, sc, m);
#pragma unroll
    for (int r = 0; r < 2; r++) l[r] = __fmul_rn(l[r], factor[r]);
    l[0] += sum[0];
    l[1] += sum[1];
    if (is_running) {
      read_state(s.items[q.index], o);
      rescale(o, factor);
    }
    step<1>(sc, p, o, add);
#pragma unroll 1
    while (--left > 0) {
      step<0>(sc, p, o, add);
      step<1>(sc, p, o, add);
    }
    pin(p);
    pin(o);
    wgmma_fence();
    issue_output(o, p, add, 1);
    wgmma_wait<0>();
    pin(o);
    free_buffer(&s.v_free[v.index]);
    v.next();
    const item it = s.items[q.index];
    __syncwarp();
    free_buffer(&s.q_free[q.index]);
    q.next();
#pragma unroll
    for (int r = 0; r < 2; r++) m[r] = m[r] > LOWEST ? m[r] : -INFINITY;
    close(it, o, m, l);
  }

  __device__ __forceinline__ void work() {
    float sc[NS], o[NO];
    uint32_t p[NS / 2];
#pragma unroll
    for (int i = 0; i < NS; i++) sc[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < NO; i++) o[i] = 0.0f;
    item it = next_item();
    while (it.n_tiles >= 0) {
      if (it.n_tiles > 0) {
        if constexpr (S::HALVES) {
          meet_halves(sc, p, o);
          it = next_item();
        } else {
          it = meet(it, sc, p, o);
        }
      } else {
        const float nothing[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < NO; i++) o[i] = 0.0f; // of the item before: its signs and NaN are not ours
        free_buffer(&s.q_free[q.index]);
        q.next();
        close(it, o, nothing, nothing);
        it = next_item();
      }
    }
    if (threadIdx.x % 128 == 0) bulk_wait<0>();
  }
};

#endif

template <int D, int G>
__global__ void __launch_bounds__(shape<D, G>::THREADS, shape<D, G>::PER_SM)
    attention_forward(const __grid_constant__ arguments a) {
#if HALO_SM90
  using S = shape<D, G>;
  extern __shared__ __align__(1024) char memory[];
  shared_memory<D, G> &all = *(shared_memory<D, G> *)memory;
  if (threadIdx.x < S::TEAMS) {
    team_state<D, G> &s = all.state[threadIdx.x];
    for (int i = 0; i < ROWS; i++) {
      barrier_init(&s.row_full[i], WARP_ARRIVES);
      barrier_init(&s.row_free[i], WARP_ARRIVES);
    }
    for (int i = 0; i < S::STAGES; i++) {
      barrier_init(&s.q_full[i], 1);
      barrier_init(&s.k_full[i], 1);
      barrier_init(&s.v_full[i], 1);
      barrier_init(&s.q_free[i], 4 * S::GROUPS * WARP_ARRIVES);
      barrier_init(&s.k_free[i], 4 * S::GROUPS * WARP_ARRIVES);
      barrier_init(&s.v_free[i], 4 * S::GROUPS * WARP_ARRIVES);
    }
    barrier_init_done();
  }
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (warp < 4) {
    registers_drop<S::FEW>();
    const int team = S::TEAMS == 1 ? 0 : warp / 2;
    if (warp < 2 * S::TEAMS && warp % 2 == 0) {
      loader<D, G> l = {a, all.tiles[team], all.state[team], lane};
      l.work();
    } else if (warp < 2 * S::TEAMS) {
      plan<D, G>(a, all.state[team], lane);
    }
  } else {
    registers_raise<S::MANY>();
    const int group = warp / 4 - 1, team = S::TEAMS == 1 ? 0 : group / S::GROUPS;
    consumer<D, G> c = {a, all.tiles[team], all.state[team], group - team * S::GROUPS, 1 + group};
    c.work();
  }
#endif
}

bool is_aligned16(const void *p) { return ((uintptr_t)p & 15) == 0; }

/* Map of [B,T,H,D] bf16 with strides in elements; boxes of 64 columns and `rows` tokens. */
halo_status map_queries(CUtensorMap *out, const void *base, const int64_t *stride,
                        const halo_attention_queries *a, int32_t rows) {
  const int64_t T = a->block * a->n_blocks;
  const int64_t size[4] = {a->head_size, T, a->n_heads, a->n_batch};
  // Dims of one item may come with any stride.
  const int64_t bytes[3] = {2 * stride[1], a->n_heads > 1 ? 2 * stride[2] : 2 * stride[1],
                            a->n_batch > 1 ? 2 * stride[0] : 2 * stride[1]};
  const int32_t box[4] = {64, rows, 1, 1};
  return tensor_map(out, HALO_BF16, base, 4, size, bytes, box);
}

halo_status map_keys(CUtensorMap *out, const void *base, const halo_attention_queries *a) {
  const int64_t T = a->block * a->n_blocks, D = a->head_size;
  const int64_t size[3] = {D, T, a->n_batch * a->n_kv_heads}, bytes[2] = {2 * D, 2 * D * T};
  const int32_t box[3] = {64, (int32_t)a->block, 1};
  return tensor_map(out, HALO_BF16, base, 3, size, bytes, box);
}

template <int D, int G> halo_status launch(const arguments &arguments) {
  using S = shape<D, G>;
  const size_t bytes = sizeof(shared_memory<D, G>);
  static bool is_ready = false;
  if (!is_ready) {
    HALO_CUDA_TRY(cudaFuncSetAttribute(attention_forward<D, G>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       (int)bytes));
    is_ready = true;
  }
  const int64_t items = (int64_t)arguments.n_units * arguments.n_blocks;
  const int64_t places = (int64_t)halo__cuda_device()->multiprocessors * S::PER_SM;
  const unsigned grid = (unsigned)(items < places ? items : places);
  attention_forward<D, G><<<grid, S::THREADS, bytes, halo__cuda_stream()>>>(arguments);
  HALO_LAUNCHED("attention_forward (sm_90a)");
  return HALO_OK;
}

} // namespace

bool halo__sm90_fwd_fits(const halo_attention_queries *a) {
  if (a->dtype != HALO_BF16 || halo__cuda_device()->major != 9) return false;
  if (a->head_size != 64 && a->head_size != 128) return false;
  if (a->block != 64 && a->block != 128) return false;
  if (!(a->scale > 0)) return false;
  for (int i = 0; i < 3; i++) {
    if (a->q_stride[i] % 8 != 0) return false;
  }
  return is_aligned16(a->q) && a->n_batch * a->n_heads * a->n_blocks < (int64_t)1 << 30 &&
         a->block * a->n_blocks < (int64_t)1 << 31;
}

halo_status halo__sm90_fwd(const halo_attention_queries *a, const halo_attention_tiles *keys,
                           const halo__attention_out *once) {
  HALO_CHECK(is_aligned16(keys->k) && is_aligned16(keys->v), HALO_EARG,
             "cuda: attention keys must be aligned to 16 bytes");
  arguments to = {};
  const int32_t rows = (int32_t)a->block;
  HALO_TRY(map_queries(&to.q, a->q, a->q_stride, a, rows));
  HALO_TRY(map_keys(&to.k, keys->k, a));
  HALO_TRY(map_keys(&to.v, keys->v, a));
  if (once != nullptr) {
    HALO_CHECK(is_aligned16(once->out) && once->out_stride[0] % 8 == 0 && once->out_stride[1] % 8 == 0 &&
                   once->out_stride[2] % 8 == 0,
               HALO_EUNSUPPORTED, "cuda: attention output must have strides and address of 16 bytes");
    HALO_TRY(map_queries(&to.out, once->out, once->out_stride, a, 64));
    to.lse = (float *)once->lse;
    to.lse_stride[0] = once->lse_stride[0];
    to.lse_stride[1] = once->lse_stride[1];
  } else {
    to.o = (float *)a->o;
    to.m = (float *)a->m;
    to.l = (float *)a->l;
  }
  to.scale_log2 = (float)(a->scale * 1.4426950408889634);
  to.n_heads = (int)a->n_heads;
  to.n_kv_heads = (int)a->n_kv_heads;
  to.n_blocks = (int)a->n_blocks;
  to.n_units = (int)(a->n_batch * a->n_heads);
  to.T = a->block * a->n_blocks;
  const int64_t fit = halo__cuda_device()->l2_bytes / 2 / (to.T * a->head_size * 4);
  const int64_t section = (fit > 1 ? fit : 1) * (a->n_heads / a->n_kv_heads);
  to.section = (int)(section < to.n_units ? section : to.n_units);
  to.position_q = a->position;
  to.position_k = keys->position;
  to.first = a->first;
  to.first_stride = a->first_stride;
  to.pattern_of = a->pattern_of;
  to.offset = keys->by_query->offset;
  to.run = keys->by_query->run;
  if (a->head_size == 128) {
    return a->block == 128 ? launch<128, 128>(to) : launch<128, 64>(to);
  }
  return a->block == 128 ? launch<64, 128>(to) : launch<64, 64>(to);
}
