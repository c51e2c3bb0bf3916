/* attention_cached: a few queries meet the keys of a cache (generation), bf16, head sizes 64 and 128; other
 * types and sizes go to attention_general.cu.
 *
 * shapes    q, out [B,Tq,H,D]; k, v [B,capacity,Hk,D], of which the first `length` keys count; lse [B,H,Tq];
 *           key j is visible to query i when its position is not greater; a query that sees none gives
 *           out = 0, lse = -inf
 * tasks     the queries of all heads of a group are rows (query * group + head), 16 a CTA, so that the cache
 *           is read once for a group: that is what bounds decoding. The keys are dealt to `splits` CTAs;
 *           each of its four warps has 16 of the 64 keys of a stage, with o, m and l of its own, merged at
 *           the end. A second kernel merges the splits, in their order.
 * limits    memory: 4 D bytes a key and key/value head
 * source    Flash-Decoding's split over keys; the products as in attention_portable.cu
 * twin      kernels/cpu/attention_cached.c
 */
#include "attention_portable.cuh"

using namespace halo;
using namespace halo::portable;
using namespace halo::mma;

namespace {

typedef __nv_bfloat16 bf16;
enum { THREADS = 128, ROWS = 16, KEYS = 64, WARPS = THREADS / 32 };

struct cache {
  const bf16 *q, *k, *v;
  const int64_t *key_position, *query_position;
  int64_t n_queries, H, Hk, length, capacity, rows, row_chunks, splits, per_split, all; /* all: B Hk rows */
  float scale;
  float *parts; /* [splits][all][D + 2]: o, m, l */
};

template <int D>
__device__ __forceinline__ void fetch_keys(uint32_t k, uint32_t v, const cache &a, int64_t batch, int64_t hk,
                                           int64_t from, int64_t end) {
#pragma unroll
  for (int i = 0; i < KEYS * (D / 8) / THREADS; i++) {
    const int at = i * THREADS + threadIdx.x, r = at / (D / 8), c = at % (D / 8);
    const bool exists = from + r < end;
    const int64_t row = ((batch * a.capacity + (exists ? from + r : 0)) * a.Hk + hk) * D + 8 * c;
    copy16(tile_at<D>(k, r, c), a.k + row, exists);
    copy16(tile_at<D>(v, r, c), a.v + row, exists);
  }
}

template <int D> constexpr int shared_bytes() { return ROWS * D * 2 + 4 * KEYS * D * 2; }

template <int D> __global__ void __launch_bounds__(THREADS) cached(cache a) {
  constexpr int TILE = KEYS * D * 2;
  extern __shared__ __align__(256) unsigned char memory[];
  __shared__ float tops[WARPS][ROWS], sums[WARPS][ROWS];
  const uint32_t q = shared_address(memory), stage0 = q + ROWS * D * 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t split = blockIdx.x % a.splits, row_chunk = blockIdx.x / a.splits % a.row_chunks;
  const int64_t kv = blockIdx.x / a.splits / a.row_chunks, batch = kv / a.Hk, hk = kv % a.Hk;
  const int64_t group = a.H / a.Hk, row0 = row_chunk * ROWS;
  const int n_rows = (int)(a.rows - row0 < ROWS ? a.rows - row0 : ROWS);
  for (int i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
    const int r = i / (D / 8), c = i % (D / 8);
    const int64_t row = r < n_rows ? row0 + r : 0, query = row / group, head = hk * group + row % group;
    copy16(tile_at<D>(q, r, c), a.q + ((batch * a.n_queries + query) * a.H + head) * D + 8 * c, r < n_rows);
  }
  int64_t last[2];
  for (int h = 0; h < 2; h++) {
    const int r = lane / 4 + 8 * h;
    last[h] = r < n_rows ? a.query_position[(row0 + r) / group] : -1;
  }
  const int64_t end = min(a.length, (split + 1) * a.per_split);
  int64_t from = split * a.per_split;
  if (from < end) fetch_keys<D>(stage0, stage0 + TILE, a, batch, hk, from, end);
  copies_commit();
  float o[D / 8][4], m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
#pragma unroll
  for (int n = 0; n < D / 8; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0;
  const float c = a.scale * LOG2_E;
  for (int stage = 0; from < end; stage ^= 1, from += KEYS) {
    int64_t position[4]; // of this lane's four keys
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int64_t key = from + warp * 16 + i / 2 * 8 + lane % 4 * 2 + i % 2;
      position[i] = key < end ? a.key_position[key] : INT64_MAX;
    }
    copies_wait<0>();
    __syncthreads();
    const uint32_t k = stage0 + stage * 2 * TILE, next = stage0 + (stage ^ 1) * 2 * TILE;
    if (from + KEYS < end) fetch_keys<D>(next, next + TILE, a, batch, hk, from + KEYS, end);
    copies_commit();
    float s[2][4] = {};
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      uint32_t x[4], y[4];
      rows_a<D>(x, by_16<D>(q), 0, d);
      rows_b<D>(y, by_8<D>(k, warp * 16), 0, d);
      multiply(s[0], x, y[0], y[1]);
      multiply(s[1], x, y[2], y[3]);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float top = -INFINITY;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float &x = s[i / 2][2 * h + i % 2];
        x = position[i] <= last[h] ? x * c : -INFINITY;
        top = fmaxf(top, x);
      }
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      top = fmaxf(top, m[h]);
      const float base = top > -INFINITY ? top : 0, factor = exp2_fast(m[h] - base);
      m[h] = top;
      l[h] *= factor;
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        o[n][2 * h] *= factor;
        o[n][2 * h + 1] *= factor;
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float &x = s[i / 2][2 * h + i % 2];
        x = exp2_fast(x - base);
        l[h] += x;
      }
    }
    const uint32_t p[4] = {pack2(s[0][0], s[0][1]), pack2(s[0][2], s[0][3]), pack2(s[1][0], s[1][1]),
                           pack2(s[1][2], s[1][3])};
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
      uint32_t y[4];
      columns_b<D>(y, by_16<D>(k + TILE, warp * 16), 0, 16 * n);
      multiply(o[2 * n], p, y[0], y[1]);
      multiply(o[2 * n + 1], p, y[2], y[3]);
    }
  }

  // The four warps' shares, through the stages.
  __syncthreads();
  float *shares = (float *)(memory + ROWS * D * 2);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    l[h] += __shfl_xor_sync(0xffffffffu, l[h], 1);
    l[h] += __shfl_xor_sync(0xffffffffu, l[h], 2);
    const int r = lane / 4 + 8 * h;
    if (lane % 4 == 0) {
      tops[warp][r] = m[h];
      sums[warp][r] = l[h];
    }
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      *(float2 *)(shares + (warp * ROWS + r) * D + 8 * n + lane % 4 * 2) =
          make_float2(o[n][2 * h], o[n][2 * h + 1]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n_rows * D; i += THREADS) {
    const int r = i / D, d = i % D;
    float top = tops[0][r], sum = 0, total = 0;
#pragma unroll
    for (int w = 1; w < WARPS; w++) top = fmaxf(top, tops[w][r]);
    const float base = top > -INFINITY ? top : 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float factor = exp2_fast(tops[w][r] - base);
      sum += factor * shares[(w * ROWS + r) * D + d];
      total += factor * sums[w][r];
    }
    float *part = a.parts + (split * a.all + kv * a.rows + row0 + r) * (D + 2);
    part[d] = sum;
    if (d == 0) {
      part[D] = top;
      part[D + 1] = total;
    }
  }
}

/* CTA: a row. GROUPS threads share an element's splits. */
template <int D> __global__ void __launch_bounds__(512) merge_splits(cache a, bf16 *out, float *lse) {
  constexpr int GROUPS = 512 / D;
  __shared__ float sums[GROUPS][D], totals[GROUPS];
  const int64_t row = blockIdx.x, stride = a.all * (D + 2), group = a.H / a.Hk;
  const float *parts = a.parts + row * (D + 2);
  const int g = threadIdx.x / D, d = threadIdx.x % D;
  float top = -INFINITY;
  for (int64_t i = threadIdx.x; i < a.splits; i += 512) top = fmaxf(top, parts[i * stride + D]);
  top = block_max<512>(top);
  const float base = top > -INFINITY ? top : 0;
  float sum = 0, total = 0;
#pragma unroll 4
  for (int64_t i = g; i < a.splits; i += GROUPS) {
    const float factor = exp2_fast(parts[i * stride + D] - base);
    sum += factor * parts[i * stride + d];
    total += factor * parts[i * stride + D + 1];
  }
  sums[g][d] = sum;
  if (d == 0) totals[g] = total;
  __syncthreads();
  if (g > 0) return;
#pragma unroll
  for (int i = 1; i < GROUPS; i++) sum += sums[i][d];
  total = 0;
#pragma unroll
  for (int i = 0; i < GROUPS; i++) total += totals[i];
  const int64_t kv = row / a.rows, query = row % a.rows / group;
  const int64_t batch = kv / a.Hk, head = kv % a.Hk * group + row % a.rows % group;
  out[((batch * a.n_queries + query) * a.H + head) * D + d] = store<bf16>(total == 0 ? 0 : sum / total);
  if (d > 0) return;
  lse[(batch * a.H + head) * a.n_queries + query] = total == 0 ? -INFINITY : top * LN_2 + logf(total);
}

template <int D> halo_status run(cache a, int64_t n_batch, void *out, void *lse) {
  a.rows = a.n_queries * (a.H / a.Hk);
  a.row_chunks = (a.rows + ROWS - 1) / ROWS;
  a.all = n_batch * a.Hk * a.rows;
  const int64_t groups = n_batch * a.Hk * a.row_chunks, steps = (a.length + KEYS - 1) / KEYS;
  // Three CTAs a multiprocessor fit; at least four steps each, or the merge costs more than it brings.
  const int64_t wanted = (3 * (int64_t)halo__cuda_device()->multiprocessors + groups - 1) / groups;
  const int64_t most = (steps + 3) / 4;
  a.splits = most < 1 ? 1 : wanted < most ? wanted : most;
  a.per_split = (steps + a.splits - 1) / a.splits * KEYS;
  if (a.per_split > 0) a.splits = (a.length + a.per_split - 1) / a.per_split;
  HALO_TRY(halo__alloc((void **)&a.parts, a.splits * a.all * (D + 2) * 4, HALO_CUDA));
  halo_status status =
      launch("attention_cached", cached<D>, groups * a.splits, THREADS, shared_bytes<D>(), a);
  if (status == HALO_OK) {
    status = launch("attention_cached merge", merge_splits<D>, a.all, 512, 0, a, (bf16 *)out, (float *)lse);
  }
  halo__free(a.parts);
  return status;
}

} // namespace

halo_status halo_cuda_attention_cached(halo_dtype t, void *out, void *lse, const void *q, const void *k,
                                       const void *v, const int64_t *key_position,
                                       const int64_t *query_position, int64_t n_batch, int64_t n_queries,
                                       int64_t n_heads, int64_t n_kv_heads, int64_t head_size,
                                       int64_t length, int64_t capacity, double scale) {
  if (n_batch * n_queries * n_heads == 0) return HALO_OK;
  const bool is_aligned = ((uintptr_t)q | (uintptr_t)k | (uintptr_t)v) % 16 == 0;
  if (t != HALO_BF16 || (head_size != 64 && head_size != 128) || !is_aligned || length == 0) {
    return halo__general_cached(t, out, lse, q, k, v, key_position, query_position, n_batch, n_queries,
                                n_heads, n_kv_heads, head_size, length, capacity, scale);
  }
  cache a = {};
  a.q = (const bf16 *)q;
  a.k = (const bf16 *)k;
  a.v = (const bf16 *)v;
  a.key_position = key_position;
  a.query_position = query_position;
  a.n_queries = n_queries;
  a.H = n_heads;
  a.Hk = n_kv_heads;
  a.length = length;
  a.capacity = capacity;
  a.scale = (float)scale;
  return head_size == 128 ? run<128>(a, n_batch, out, lse) : run<64>(a, n_batch, out, lse);
}
