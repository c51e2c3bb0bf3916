/* attention_cached: a few queries meet the keys of a cache (generation, one step or a chunk of
 * one).
 *
 * maths     attention_block.h
 * shapes    q, out [B,Tq,H,D]; k, v [B,capacity,Hk,D], of which the first `length` keys count; lse
 *           [B,H,Tq] in acc; positions int64; key j is visible to query i when its position is not
 *           greater
 * tasks     one (batch, key/value head) each: all queries of all heads of the group are rows of one
 *           block, so that the cache is read once for the group, which is what bounds decoding
 * effect    a query that sees no key gives out = 0, lse = -inf
 * twin      kernels/cuda/attention_cached.cu
 */
#define HALO_EACH_REAL_FILE "cpu/attention_cached.c"
#ifndef HALO_REAL_PASS
enum { MAX_ROWS = 64, KEYS_TOGETHER = 64 };

#include <omp.h>

#include "cpu/each_real.h"

halo_status halo_cpu_attention_cached(halo_dtype t, void *out, void *lse, const void *q,
                                      const void *k, const void *v, const int64_t *key_position,
                                      const int64_t *query_position, int64_t n_batch,
                                      int64_t n_queries, int64_t n_heads, int64_t n_kv_heads,
                                      int64_t head_size, int64_t length, int64_t capacity,
                                      double scale) {
  HALO_REAL_SWITCH(t, cached, (out, lse, q, k, v, key_position, query_position, n_batch, n_queries,
                               n_heads, n_kv_heads, head_size, length, capacity, scale));
}

#else

#include "cpu/attention_block.h"

static halo_status REAL(cached)(real *out, acc *lse, const real *q, const real *k, const real *v,
                                const int64_t *key_position, const int64_t *query_position,
                                int64_t n_batch, int64_t n_queries, int64_t n_heads,
                                int64_t n_kv_heads, int64_t head_size, int64_t length,
                                int64_t capacity, double scale) {
  const int64_t group = n_heads / n_kv_heads, n_rows = n_queries * group, D = head_size;
  const int64_t most = n_rows < MAX_ROWS ? n_rows : MAX_ROWS;
  REAL(block) sizes;
  const int64_t each = REAL(block_deal)(&sizes, NULL, most, D, KEYS_TOGETHER, false);
  const int64_t n_chunks = (n_rows + most - 1) / most;
  acc *scratch;
  HALO_TRY(halo__scratch((void **)&scratch, each * omp_get_max_threads(), sizeof(acc)));
#pragma omp parallel if (n_batch * n_rows * n_kv_heads * length * D > 1 << 20)
  {
    REAL(block) b;
    REAL(block_deal)(&b, scratch + each * omp_get_thread_num(), most, D, KEYS_TOGETHER, false);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < n_batch * n_kv_heads * n_chunks; task++) {
      const int64_t chunk = task % n_chunks, hk = task / n_chunks % n_kv_heads;
      const int64_t batch = task / n_chunks / n_kv_heads;
      const int64_t row0 = chunk * most, rows = n_rows - row0 < most ? n_rows - row0 : most;
      b.G = rows;
      for (int64_t r = 0; r < b.P; r++) { // row = query * group + head of the group
        const int64_t i = (row0 + r) / group, head = hk * group + (row0 + r) % group;
        const real *from = q + ((batch * n_queries + i) * n_heads + head) * D;
        b.pad_position[r] = r < rows ? (int32_t)query_position[i] : -1;
        b.pad_first[r] = r < rows ? 0 : INT32_MAX;
        b.m[r] = -INFINITY;
        b.l[r] = 0;
        for (int64_t d = 0; d < D; d++) {
          b.q_t[d * b.P + r] = r < rows ? (acc)(scale * LOG2_E) * LOAD(from[d]) : 0;
        }
      }
      memset(b.o, 0, (size_t)(rows * b.E) * sizeof(acc));
      for (int64_t j = 0; j < length; j += KEYS_TOGETHER) {
        int32_t position[KEYS_TOGETHER];
        REAL(keys) keys = {.k = b.k, .v = b.v, .ld = b.E, .position = position};
        keys.n = length - j < KEYS_TOGETHER ? length - j : KEYS_TOGETHER;
        const int64_t at = ((batch * capacity + j) * n_kv_heads + hk) * D;
        REAL(pack_rows)(b.k, k + at, n_kv_heads * D, keys.n, D, b.E);
        REAL(pack_rows)(b.v, v + at, n_kv_heads * D, keys.n, D, b.E);
        for (int64_t x = 0; x < keys.n; x++) position[x] = (int32_t)key_position[j + x];
        REAL(meet_forward)(&b, &keys);
      }
      for (int64_t r = 0; r < rows; r++) {
        const int64_t i = (row0 + r) / group, head = hk * group + (row0 + r) % group;
        real *to = out + ((batch * n_queries + i) * n_heads + head) * D;
        const acc factor = b.l[r] == 0 ? 0 : 1 / b.l[r];
        for (int64_t d = 0; d < D; d++) to[d] = STORE(b.o[r * b.E + d] * factor);
        lse[(batch * n_heads + head) * n_queries + i] =
            b.l[r] == 0 ? -INFINITY : (acc)(b.m[r] * LN_2 + log((double)b.l[r]));
      }
    }
  }
  halo__free(scratch);
  return HALO_OK;
}

#endif
