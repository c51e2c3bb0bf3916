/* attention_tiles: queries of one rank meet the keys of one rank in the tiles of a plan's slice.
 *
 * maths     attention_block.h
 * shapes    q, o [B,T,H,D]; k, v [B,Hk,T,D]; state [B,H,T]; T = block * n_blocks
 * lists     row pattern * n_blocks + query block -> runs of key blocks (core/plan.h)
 * tasks forward: one (batch, head, query block) each, any thread. Backward: one (batch, key/value
 *           head, head part, key part) each. A head part has a run of the group's query heads and a
 *           dk, dv of its own; key part p of P owns key blocks p, p + P, ... and has a dq of its
 *           own. So no two tasks write the same memory, and sums run in one order, over query
 *           blocks, heads and parts, whatever the number of threads.
 * gradient  dk, dv are written (=), dq is added to (+=)
 * work      4 G G D flops a tile and head forward, 10 G G D backward
 * twin      kernels/cuda/attention_tiles.cu
 */
#define HALO_EACH_REAL_FILE "cpu/attention_tiles.c"
#ifndef HALO_REAL_PASS
#include <omp.h>

#include "cpu/each_real.h"

halo_status halo_cpu_attention_tiles_fwd(const halo_attention_queries *a,
                                         const halo_attention_tiles *keys) {
  HALO_REAL_SWITCH(a->dtype, tiles_fwd, (a, keys));
}

halo_status halo_cpu_attention_tiles_bwd(const halo_attention_queries *a,
                                         const halo_attention_tiles *keys) {
  HALO_REAL_SWITCH(a->dtype, tiles_bwd, (a, keys));
}

#else

#include "cpu/attention_block.h"

/* Rows [n,D] as acc rows: in place where they can be read so, else packed into `buffer` [n,E]. */
static const acc *REAL(rows_view)(const real *rows, acc *buffer, int64_t n, int64_t D, int64_t E) {
#ifndef REAL_IS_BF16
  if (D == E) return rows;
#endif
  REAL(pack_rows)(buffer, rows, D, n, D, E);
  return buffer;
}

/* One block of queries meets the tiles of its row; key blocks of other parts are left out.
 * Backward, gradients of the keys are added to dk_all, dv_all [B,Hk,T,D]; they are NULL forward. */
static void REAL(meet_row)(REAL(block) *b, const halo_attention_tiles *tiles, int64_t row,
                           int64_t kv_row, int64_t part, int64_t n_parts, acc scale, acc *dk_all,
                           acc *dv_all) {
  const halo__rows *rows = tiles->by_query;
  const bool is_padded = b->D != b->E;
  for (int64_t i = rows->offset[row]; i < rows->offset[row + 1]; i++) {
    const halo__span run = rows->run[i];
    for (int64_t kb = run.first; kb < run.first + run.count; kb++) {
      if (kb % n_parts != part) continue;
      const int64_t token = kb * b->G, at = (kv_row + token) * b->D;
      REAL(keys) keys = {.ld = b->E, .n = b->G};
      keys.k = REAL(rows_view)((const real *)tiles->k + at, b->k, b->G, b->D, b->E);
      keys.v = REAL(rows_view)((const real *)tiles->v + at, b->v, b->G, b->D, b->E);
      keys.position = run.partial ? tiles->position + token : NULL;
      if (dk_all == NULL) {
        REAL(meet_forward)(b, &keys);
        continue;
      }
      acc *dk = dk_all + at, *dv = dv_all + at;
      keys.dk = is_padded ? b->dk : dk;
      keys.dv = is_padded ? b->dv : dv;
      keys.ld_grad = b->E;
      if (is_padded) {
        memset(b->dk, 0, (size_t)(b->G * b->E) * sizeof(acc));
        memset(b->dv, 0, (size_t)(b->G * b->E) * sizeof(acc));
      }
      REAL(meet_backward)(b, &keys, scale);
      for (int64_t r = 0; is_padded && r < b->G; r++) {
        for (int64_t d = 0; d < b->D; d++) {
          dk[r * b->D + d] += b->dk[r * b->E + d];
          dv[r * b->D + d] += b->dv[r * b->E + d];
        }
      }
    }
  }
}

static halo_status REAL(tiles_fwd)(const halo_attention_queries *a,
                                   const halo_attention_tiles *tiles) {
  REAL(block) sizes;
  const int64_t each = REAL(block_deal)(&sizes, NULL, a->block, a->head_size, a->block, false);
  acc *scratch;
  HALO_TRY(halo__scratch((void **)&scratch, each * omp_get_max_threads(), sizeof(acc)));
  const int64_t T = a->block * a->n_blocks, group = a->n_heads / a->n_kv_heads;
  const int64_t n_tasks = a->n_batch * a->n_heads * a->n_blocks;
#pragma omp parallel if (REAL(is_worth_sharing)(a))
  {
    REAL(block) b;
    REAL(block_deal)(&b, scratch + each * omp_get_thread_num(), a->block, a->head_size, a->block,
                     false);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < n_tasks; task++) {
      // The longest rows of a causal plan come first: the last tasks are then the short ones.
      const int64_t qb = a->n_blocks - 1 - task / (a->n_batch * a->n_heads);
      const int64_t u = task % (a->n_batch * a->n_heads);
      const int64_t batch = u / a->n_heads, head = u % a->n_heads;
      const int64_t row = a->pattern_of[u] * a->n_blocks + qb;
      if (tiles->by_query->offset[row] == tiles->by_query->offset[row + 1]) continue;
      const int64_t state = REAL(open_block)(&b, a, batch, head, qb, false);
      const int64_t kv_row = (batch * a->n_kv_heads + head / group) * T;
      REAL(meet_row)(&b, tiles, row, kv_row, 0, 1, 0, NULL, NULL);
      REAL(close_forward)(&b, a, state);
      if (a->poll != NULL && omp_get_thread_num() == 0) a->poll(a->poll_context);
    }
  }
  halo__free(scratch);
  return HALO_OK;
}

/* One task of backward. dk, dv: where this head part sums; only blocks of `part` are touched. */
static void REAL(task_bwd)(REAL(block) *b, const halo_attention_queries *a,
                           const halo_attention_tiles *tiles, int64_t kv, int64_t first_head,
                           int64_t end_head, int64_t part, acc *dk, acc *dv) {
  const int64_t T = a->block * a->n_blocks, tile = a->block * a->head_size;
  const int64_t batch = kv / a->n_kv_heads;
  for (int64_t kb = part; kb < a->n_blocks; kb += a->n_parts) {
    memset(dk + kv * T * a->head_size + kb * tile, 0, (size_t)tile * sizeof(acc));
    memset(dv + kv * T * a->head_size + kb * tile, 0, (size_t)tile * sizeof(acc));
  }
  for (int64_t head = first_head; head < end_head; head++) {
    const int64_t pattern = a->pattern_of[batch * a->n_heads + head];
    for (int64_t qb = 0; qb < a->n_blocks; qb++) {
      const int64_t row = pattern * a->n_blocks + qb;
      if (tiles->by_query->offset[row] == tiles->by_query->offset[row + 1]) continue;
      const int64_t state = REAL(open_block)(b, a, batch, head, qb, true);
      REAL(meet_row)(b, tiles, row, kv * T, part, a->n_parts, (acc)a->scale, dk, dv);
      REAL(close_backward)(b, a, state, part);
      if (a->poll != NULL && omp_get_thread_num() == 0) a->poll(a->poll_context);
    }
  }
}

static halo_status REAL(tiles_bwd)(const halo_attention_queries *a,
                                   const halo_attention_tiles *tiles) {
  REAL(block) sizes;
  const int64_t each = REAL(block_deal)(&sizes, NULL, a->block, a->head_size, a->block, true);
  const int64_t T = a->block * a->n_blocks, group = a->n_heads / a->n_kv_heads;
  const int64_t n_kv = a->n_batch * a->n_kv_heads, count = n_kv * T * a->head_size;
  const int64_t head_parts = a->n_head_parts, n_threads = omp_get_max_threads();
  acc *
      scratch; // threads' blocks, then dk, dv of head parts 1, 2, ...; part 0 has the result itself
  HALO_TRY(halo__scratch((void **)&scratch, each * n_threads + 2 * count * (head_parts - 1),
                         sizeof(acc)));
  acc *more = scratch + each * n_threads;
  const bool share = REAL(is_worth_sharing)(a);
#pragma omp parallel if (share)
  {
    REAL(block) b;
    REAL(block_deal)(&b, scratch + each * omp_get_thread_num(), a->block, a->head_size, a->block,
                     true);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < n_kv * head_parts * a->n_parts; task++) {
      const int64_t part = task % a->n_parts, hp = task / a->n_parts % head_parts;
      const int64_t kv = task / a->n_parts / head_parts, first = kv % a->n_kv_heads * group;
      acc *dk = hp == 0 ? tiles->dk : more + 2 * count * (hp - 1);
      acc *dv = hp == 0 ? tiles->dv : more + 2 * count * (hp - 1) + count;
      REAL(task_bwd)(&b, a, tiles, kv, first + group * hp / head_parts,
                     first + group * (hp + 1) / head_parts, part, dk, dv);
    }
    if (head_parts > 1) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; i++) {
        acc dk = ((acc *)tiles->dk)[i], dv = ((acc *)tiles->dv)[i];
        for (int64_t hp = 0; hp < head_parts - 1; hp++) {
          dk += more[2 * count * hp + i];
          dv += more[2 * count * hp + count + i];
        }
        ((acc *)tiles->dk)[i] = dk;
        ((acc *)tiles->dv)[i] = dv;
      }
    }
  }
  halo__free(scratch);
  return HALO_OK;
}

#endif
