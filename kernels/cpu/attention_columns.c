/* attention_columns: queries of one rank meet single keys that were gathered from all ranks.
 *
 * The columns of a query block are copied together, 64 at a time, and then met like a tile: exactly
 * the listed keys are computed, in the order of their tokens.
 *
 * maths     attention_block.h
 * shapes    k, v [n_entries,D]: one row per (batch, key/value head, token) that some head selected
 * lists     row pattern * n_blocks + query block -> runs of columns of that pattern
 * tasks     as in attention_tiles.c; part p owns columns with (index / 64) mod P = p. Heads of one
 *           group select different columns, so a head sums its gradients apart and the group's are
 *           added in head order afterwards.
 * gradient  dk, dv are written (=), dq is added to (+=)
 * work      4 G D flops a column, query block and head forward, 10 G D backward
 * twin      kernels/cuda/attention_columns.cu
 */
#define HALO_EACH_REAL_FILE "cpu/attention_columns.c"
#ifndef HALO_REAL_PASS
enum { TOGETHER = 64 };

#include <omp.h>

#include "cpu/each_real.h"

halo_status halo_cpu_attention_columns_fwd(const halo_attention_queries *a,
                                           const halo_attention_columns *keys) {
  HALO_REAL_SWITCH(a->dtype, columns_fwd, (a, keys));
}

halo_status halo_cpu_attention_columns_bwd(const halo_attention_queries *a,
                                           const halo_attention_columns *keys) {
  HALO_REAL_SWITCH(a->dtype, columns_bwd, (a, keys));
}

halo_status halo_cpu_attention_columns_add(halo_dtype t, void *dk, void *dv, const void *parts,
                                           const int64_t *rows, int64_t n, int64_t n_parts,
                                           int64_t head_size) {
  HALO_REAL_SWITCH(t, columns_add, (dk, dv, parts, rows, n, n_parts, head_size));
}

#else

#include "cpu/attention_block.h"

/* Columns being collected for one block of queries. */
typedef struct REAL(batch) {
  int64_t n;
  bool partial;
  int32_t position[TOGETHER];
  int64_t row[TOGETHER]; /* of the head's own gradients */
} REAL(batch);

static void REAL(meet_batch)(REAL(block) *b, REAL(batch) *batch, acc scale, acc *dk, acc *dv) {
  if (batch->n == 0) return;
  REAL(keys) keys = {.k = b->k, .v = b->v, .ld = b->E, .n = batch->n,
                     .position = batch->partial ? batch->position : NULL,
                     .dk = b->dk, .dv = b->dv, .ld_grad = b->E};
  if (dk == NULL) {
    REAL(meet_forward)(b, &keys);
  } else {
    memset(b->dk, 0, (size_t)(batch->n * b->E) * sizeof(acc));
    memset(b->dv, 0, (size_t)(batch->n * b->E) * sizeof(acc));
    REAL(meet_backward)(b, &keys, scale);
    for (int64_t r = 0; r < batch->n; r++) {
      acc *dk_row = dk + batch->row[r] * b->D, *dv_row = dv + batch->row[r] * b->D;
      for (int64_t d = 0; d < b->D; d++) {
        dk_row[d] += b->dk[r * b->E + d];
        dv_row[d] += b->dv[r * b->E + d];
      }
    }
  }
  batch->n = 0;
}

/* One block of queries of (batch, head) u meets the columns of its row that belong to `part`; dk,
 * dv hold the gradients of u's columns, NULL in forward. */
static void REAL(meet_columns)(REAL(block) *b, const halo_attention_queries *a,
                               const halo_attention_columns *c, int64_t u, int64_t row,
                               int64_t part, int64_t n_parts, acc *dk, acc *dv) {
  const int32_t *slot = c->slot + c->slot_offset[u];
  const int32_t *token = c->token + c->token_offset[a->pattern_of[u]];
  REAL(batch) batch = {0};
  for (int64_t i = c->by_query->offset[row]; i < c->by_query->offset[row + 1]; i++) {
    const halo__span run = c->by_query->run[i];
    if (batch.partial != (run.partial != 0)) REAL(meet_batch)(b, &batch, (acc)a->scale, dk, dv);
    batch.partial = run.partial;
    for (int64_t x = run.first; x < run.first + run.count; x++) {
      if (x / TOGETHER % n_parts != part) continue;
      const real *k = (const real *)c->k + slot[x] * b->D, *v = (const real *)c->v + slot[x] * b->D;
      REAL(pack_rows)(b->k + batch.n * b->E, k, 0, 1, b->D, b->E);
      REAL(pack_rows)(b->v + batch.n * b->E, v, 0, 1, b->D, b->E);
      batch.position[batch.n] = token[x];
      batch.row[batch.n] = x;
      if (++batch.n == TOGETHER) REAL(meet_batch)(b, &batch, (acc)a->scale, dk, dv);
    }
  }
  REAL(meet_batch)(b, &batch, (acc)a->scale, dk, dv);
}

static halo_status REAL(columns_fwd)(const halo_attention_queries *a,
                                     const halo_attention_columns *c) {
  REAL(block) sizes;
  const int64_t each = REAL(block_deal)(&sizes, NULL, a->block, a->head_size, TOGETHER, false);
  acc *scratch;
  HALO_TRY(halo__scratch((void **)&scratch, each * omp_get_max_threads(), sizeof(acc)));
  const int64_t n_tasks = a->n_batch * a->n_heads * a->n_blocks;
#pragma omp parallel if (REAL(is_worth_sharing)(a))
  {
    REAL(block) b;
    REAL(block_deal)(&b, scratch + each * omp_get_thread_num(), a->block, a->head_size, TOGETHER,
                     false);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < n_tasks; task++) {
      const int64_t qb = a->n_blocks - 1 - task / (a->n_batch * a->n_heads);
      const int64_t u = task % (a->n_batch * a->n_heads);
      const int64_t row = a->pattern_of[u] * a->n_blocks + qb;
      if (c->by_query->offset[row] == c->by_query->offset[row + 1]) continue;
      const int64_t state = REAL(open_block)(&b, a, u / a->n_heads, u % a->n_heads, qb, false);
      REAL(meet_columns)(&b, a, c, u, row, 0, 1, NULL, NULL);
      REAL(close_forward)(&b, a, state);
      if (a->poll != NULL && omp_get_thread_num() == 0) a->poll(a->poll_context);
    }
  }
  halo__free(scratch);
  return HALO_OK;
}

/* Entries get the sums over the heads of their group, in head order. own_k, own_v [columns,D]. */
static void REAL(sum_groups)(const halo_attention_queries *a, const halo_attention_columns *c,
                             const acc *own_k, const acc *own_v) {
  const int64_t group = a->n_heads / a->n_kv_heads, D = a->head_size;
  memset(c->dk, 0, (size_t)(c->n_entries * D) * sizeof(acc));
  memset(c->dv, 0, (size_t)(c->n_entries * D) * sizeof(acc));
#pragma omp parallel for schedule(dynamic) if (c->n_entries * D > 1 << 16)
  for (int64_t g = 0; g < a->n_batch * a->n_kv_heads; g++) { // groups own disjoint entries
    for (int64_t u = g * group; u < (g + 1) * group; u++) {
      for (int64_t x = c->slot_offset[u]; x < c->slot_offset[u + 1]; x++) {
        acc *dk = (acc *)c->dk + c->slot[x] * D, *dv = (acc *)c->dv + c->slot[x] * D;
        for (int64_t d = 0; d < D; d++) {
          dk[d] += own_k[x * D + d];
          dv[d] += own_v[x * D + d];
        }
      }
    }
  }
}

static halo_status REAL(columns_bwd)(const halo_attention_queries *a,
                                     const halo_attention_columns *c) {
  REAL(block) sizes;
  const int64_t each = REAL(block_deal)(&sizes, NULL, a->block, a->head_size, TOGETHER, true);
  const int64_t n_heads = a->n_batch * a->n_heads, D = a->head_size;
  const int64_t own = c->slot_offset[n_heads] * D;
  acc *scratch, *own_k = NULL;
  HALO_TRY(halo__scratch((void **)&scratch, each * omp_get_max_threads(), sizeof(acc)));
  const halo_status status =
      halo__alloc_zero((void **)&own_k, 2 * own * (int64_t)sizeof(acc), HALO_CPU);
  if (status != HALO_OK) {
    halo__free(scratch);
    return status;
  }
  acc *own_v = own_k + own;
#pragma omp parallel if (REAL(is_worth_sharing)(a))
  {
    REAL(block) b;
    REAL(block_deal)(&b, scratch + each * omp_get_thread_num(), a->block, a->head_size, TOGETHER,
                     true);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < n_heads * a->n_parts; task++) {
      const int64_t part = task % a->n_parts, u = task / a->n_parts;
      for (int64_t qb = 0; qb < a->n_blocks; qb++) {
        const int64_t row = a->pattern_of[u] * a->n_blocks + qb;
        if (c->by_query->offset[row] == c->by_query->offset[row + 1]) continue;
        const int64_t state = REAL(open_block)(&b, a, u / a->n_heads, u % a->n_heads, qb, true);
        REAL(meet_columns)(&b, a, c, u, row, part, a->n_parts, own_k + c->slot_offset[u] * D,
                           own_v + c->slot_offset[u] * D);
        REAL(close_backward)(&b, a, state, part);
        if (a->poll != NULL && omp_get_thread_num() == 0) a->poll(a->poll_context);
      }
    }
  }
  REAL(sum_groups)(a, c, own_k, own_v);
  halo__free(own_k);
  halo__free(scratch);
  return HALO_OK;
}

static halo_status REAL(columns_add)(real *dk, real *dv, const real *parts, const int64_t *rows,
                                     int64_t n, int64_t n_parts, int64_t head_size) {
#pragma omp parallel for schedule(static) if (n * n_parts * head_size > 1 << 15)
  for (int64_t e = 0; e < n; e++) { // every row occurs once
    for (int64_t p = 0; p < n_parts; p++) {
      const real *part = parts + (p * n + e) * 2 * head_size;
      for (int64_t d = 0; d < head_size; d++) {
        real *k = &dk[rows[e] * head_size + d], *v = &dv[rows[e] * head_size + d];
        *k = STORE(LOAD(*k) + LOAD(part[d]));
        *v = STORE(LOAD(*v) + LOAD(part[head_size + d]));
      }
    }
  }
  return HALO_OK;
}

#endif
