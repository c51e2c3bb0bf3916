/* attention_portable_query: attention backward by query; see attention_portable_bwd.cu.
 *
 * A CTA of four warps owns 64 queries of one head and meets 64 keys at a time; p and ds stay in registers as
 * operands of the next product. Two uses: dq alone, when sums must repeat (deterministic: 7 products instead of
 * 5), and columns, whose gathered keys are listed by query: dk and dv of 64 columns are added to their entries
 * in memory. The next keys are on their way while these are met, where shared memory has room for both (104 KB
 * for head size 128; not on sm_86 and 89).
 *
 * source    FlashAttention-2 (arXiv 2307.08691) algorithm 2
 * twin      kernels/cpu/attention_tiles.c, attention_columns.c
 */
#include "attention_portable_bwd.cuh"

using namespace halo;
using namespace halo::portable;

namespace {

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

template <int D, int STAGES> constexpr int shared_bytes() {
  return (2 * QUERIES + STAGES * 2 * TOGETHER) * D * 2 + QUERIES * TOGETHER * 2;
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

/* Queries and gradients of the CTA. */
template <int D>
__device__ __forceinline__ void fetch_queries(uint32_t q, uint32_t grad, const side &a, int batch, int head,
                                              int64_t token) {
  const bf16 *from = a.q + batch * a.q_stride[0] + token * a.q_stride[1] + head * a.q_stride[2];
  const bf16 *from_grad =
      a.grad + batch * a.grad_stride[0] + token * a.grad_stride[1] + head * a.grad_stride[2];
#pragma unroll
  for (int i = 0; i < QUERIES * (D / 8) / Q_THREADS; i++) {
    const int at = i * Q_THREADS + threadIdx.x, r = at / (D / 8), c = at % (D / 8);
    copy16(tile_at<D>(q, r, c), from + r * a.q_stride[1] + 8 * c);
    copy16(tile_at<D>(grad, r, c), from_grad + r * a.grad_stride[1] + 8 * c);
  }
}

/* A lane's two rows, eight apart. */
struct query_rows {
  float lse[2], delta[2];     /* lse in base 2 */
  int32_t first[2], last[2];  /* positions they see */

  __device__ __forceinline__ query_rows(const side &a, int batch, int u, int64_t row0) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int64_t row = row0 + 8 * h;
      lse[h] = base2(a.lse[u * a.T + row]);
      delta[h] = a.delta[u * a.T + row];
      first[h] = a.first[batch * a.first_stride + row];
      last[h] = a.position[row];
    }
  }
};

/* Scores s become p, products dp become ds = p (dp - delta), for n keys at `positions`. */
__device__ __forceinline__ void scores_to_ds(float (&s)[8][4], float (&dp)[8][4], const query_rows &rows, float c,
                                             const int32_t *positions, int n, bool is_masked) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int key = 8 * i + threadIdx.x % 4 * 2 + e % 2, h = e / 2;
      float p = exp2_fast(fmaf(s[i][e], c, -rows.lse[h]));
      if (is_masked) {
        const bool sees = key < n && rows.first[h] <= positions[key] && positions[key] <= rows.last[h];
        p = sees ? p : 0;
      }
      s[i][e] = p;
      dp[i][e] = p * (dp[i][e] - rows.delta[h]);
    }
  }
}

/* dq += ds k; ds as it lies in registers is an operand. */
template <int D>
__device__ __forceinline__ void add_ds_k(float (&dq)[D / 8][4], const float (&ds)[8][4], uint32_t k) {
#pragma unroll
  for (int key = 0; key < TOGETHER; key += 16) {
    const float(&left)[4] = ds[key / 8], (&right)[4] = ds[key / 8 + 1];
    const uint32_t x[4] = {pack2(left[0], left[1]), pack2(left[2], left[3]), pack2(right[0], right[1]),
                           pack2(right[2], right[3])};
#pragma unroll
    for (int m = 0; m < D / 8; m += 2) {
      uint32_t y[4];
      columns_b<D>(y, by_16<D>(k), key, 8 * m);
      multiply(dq[m], x, y[0], y[1]);
      multiply(dq[m + 1], x, y[2], y[3]);
    }
  }
}

/* A warp's 16 rows of p or ds to shared memory as bf16. */
__device__ __forceinline__ void put_scores(uint32_t tile, const float (&s)[8][4], int row0) {
#pragma unroll
  for (int i = 0; i < 16; i++) {
    put2<TOGETHER>(by_sum<TOGETHER>(tile, row0), i % 2 * 8, i / 2 * 8, s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]);
  }
}

/* Rows `row` and eight further of a.dq; nobody else has them. */
template <int D>
__device__ __forceinline__ void add_dq(const side &a, const float (&dq)[D / 8][4], int64_t row) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float *to = a.dq + (row + 8 * h) * D + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      float2 y = *(float2 *)(to + 8 * i);
      y.x += dq[i][2 * h] * a.scale;
      y.y += dq[i][2 * h + 1] * a.scale;
      *(float2 *)(to + 8 * i) = y;
    }
  }
}

template <int D, bool HAS_COLUMNS, int STAGES>
__global__ void __launch_bounds__(Q_THREADS, 2) query_backward(side a, keys x, int32_t G) {
  constexpr int TILE = TOGETHER * D * 2;
  extern __shared__ __align__(256) unsigned char memory[];
  __shared__ int64_t rows[3][TOGETHER];
  __shared__ int32_t positions[3][TOGETHER];
  const uint32_t q = shared_address(memory), grad = q + QUERIES * D * 2, stage0 = grad + QUERIES * D * 2;
  const uint32_t ds = stage0 + STAGES * 2 * TILE;
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
  fetch_queries<D>(q, grad, a, batch, head, token);
  fetch_listed<D, Q_THREADS>(stage0, stage0 + TILE, x.k, x.v, rows[0], n);
  copies_commit();
  const query_rows mine(a, batch, u, token + row0 + lane / 4);
  float dq[1][D / 8][4];
  clear(dq);
  const float c = a.scale * LOG2_E;
  for (int stage = 0, slot = 0; n > 0; stage ^= STAGES - 1, slot = slot == 2 ? 0 : slot + 1) {
    copies_wait<0>();
    __syncthreads();
    const int next_slot = slot == 2 ? 0 : slot + 1, then_slot = next_slot == 2 ? 0 : next_slot + 1;
    const auto fetch_next = [&](int to_stage) {
      const uint32_t to = stage0 + to_stage * 2 * TILE;
      if (next > 0) fetch_listed<D, Q_THREADS>(to, to + TILE, x.k, x.v, rows[next_slot], next);
      copies_commit();
    };
    if (STAGES == 2) fetch_next(stage ^ 1);
    const int then = w.next(x, slots, tokens, kv_row, unit, rows[then_slot], positions[then_slot],
                            &then_partial);
    const uint32_t k = stage0 + stage * 2 * TILE, v = k + TILE;
    float s[1][8][4], t[1][8][4];
    clear(s);
    clear(t);
    multiply_rows<D>(s, by_16<D>(q, row0), by_8<D>(k));
    multiply_rows<D>(t, by_16<D>(grad, row0), by_8<D>(v));
    scores_to_ds(s[0], t[0], mine, c, positions[slot], n, is_partial || n < TOGETHER);
    add_ds_k<D>(dq[0], t[0], k);
    if (HAS_COLUMNS && x.dk != nullptr) { // one tile serves p and then ds
      put_scores(ds, s[0], row0);
      __syncthreads();
      scatter<D>(x.dv, rows[slot], n, ds, grad, 1);
      __syncthreads();
      put_scores(ds, t[0], row0);
      __syncthreads();
      scatter<D>(x.dk, rows[slot], n, ds, q, a.scale);
    }
    if (STAGES == 1) {
      __syncthreads(); // the keys are read
      fetch_next(0);
    }
    n = next;
    next = then;
    is_partial = next_partial;
    next_partial = then_partial;
  }
  add_dq<D>(a, dq[0], u * a.T + token + row0 + lane / 4);
}

template <int D, int STAGES> halo_status run(const side &s, const keys &x, int32_t G) {
  return launch("attention_portable backward by query",
                x.slot != nullptr ? query_backward<D, true, STAGES> : query_backward<D, false, STAGES>,
                s.B * s.H * (s.T / QUERIES), Q_THREADS, shared_bytes<D, STAGES>(), s, x, G);
}

} // namespace

int64_t halo::portable::query_shared(int32_t head_size) {
  return head_size == 128 ? shared_bytes<128, 1>() : shared_bytes<64, 2>();
}

halo_status halo::portable::run_queries(const side &s, const keys &x, int32_t head_size, int32_t G) {
  if (head_size == 64) return run<64, 2>(s, x, G);
  return shared_bytes<128, 2>() <= halo__attention_shared_bytes() ? run<128, 2>(s, x, G) : run<128, 1>(s, x, G);
}
