/* attention.c: attention under a plan over a ring, forward and backward, on the tape.
 *
 * Three parts meet here and know nothing of each other: the plan says which keys each query sees,
 * the ring brings the keys of one rank after the other (core/schedule.c has the timeline), the
 * kernels let queries meet the keys at hand. What is kept between two steps is per rank:
 *
 *   forward    o [B,H,T,D], m, l [B,H,T]: unnormalised output, running maximum and sum; fp32 (fp64
 *              for fp64). out = o/l and lse = m + log l come once, after the last step, so W steps
 *              round as often as one.
 *   backward   dq [parts,B,H,T,D]; gradients of the keys at hand go round with the keys. Every step
 *              uses the final lse and delta = rowsum(out * grad), not the step's own.
 *
 * Columns are keys of their own, gathered once per pass: every rank gets every selected key
 * (core/plan.h halo__gather), so that a popular column costs all ranks the same instead of stopping
 * the ring at its owner's step (mtraining.md 2.4). Their gradients go straight back to the owner,
 * which adds the ranks' parts in rank order.
 *
 *   rank r        K,V of own columns  ==all to all==>  K,V of all columns
 *   meet          ... o, m, l         / dq, and dK,dV of all columns
 *   backward      dK,dV of all columns  ==all to all==>  W parts of own columns  ==sum==> own dK,dV
 *
 * Order of every sum is fixed by the plan, the schedule and the number of ranks: runs repeat bit
 * for bit, whatever the number of threads and the timing of messages.
 *
 * The tape keeps q, k, v, out, lse, and the plan and the ring themselves: a plan is never selected
 * anew in backward.
 */
#include <assert.h>
#include <string.h>

#include "internal.h"
#include "kernels.h"
#include "plan.h"
#include "ring.h"

/* What the tape keeps besides tensors. */
typedef struct attention_context {
  halo_plan *plan;
  halo_ring *ring;
  double scale;
  halo_tensor **lse_out; /* forward only */
} attention_context;

enum { IN_Q, IN_K, IN_V };
enum { SAVED_OUT, SAVED_LSE };

/* One pass: shapes, and the state of each rank here. */
typedef struct pass {
  halo_ring *ring;
  halo_plan *plan;
  const halo_kernels *kernels;
  int32_t here, rank, world;
  halo_dtype dtype, acc;
  int64_t B, H, Hk, D, T, element, acc_bytes;
  const halo_tensor *k, *v;
  halo_attention_queries *queries; /* [here] */
  void *state;                     /* the memory behind queries */
  halo_tensor *dk, *dv;            /* backward */
  const halo__gather *gather;      /* NULL when the plan has no columns */
  halo__transfer *transfers;
  double met; /* (query, key, head) triples computed so far, masked ones included */
} pass;

/* ---- shapes --------------------------------------------------------------------------------- */

static halo_status check_shapes(const halo_tensor *q, const halo_tensor *k, const halo_tensor *v,
                                const halo_plan *plan, const halo_ring *ring) {
  HALO_CHECK(q != NULL && k != NULL && v != NULL && plan != NULL && ring != NULL, HALO_EARG,
             "attention: q, k, v, plan and ring are all needed");
  HALO_CHECK(q->ndim == 4 && k->ndim == 4 && v->ndim == 4, HALO_EARG,
             "attention: q, k, v are [B,T,H,D]; got %s, %s, %s", halo__describe(q),
             halo__describe(k), halo__describe(v));
  HALO_CHECK(halo__is_float(q->dtype) && q->dtype == k->dtype && q->dtype == v->dtype, HALO_EARG,
             "attention: q, k, v must have one floating dtype; got %s, %s, %s", halo__describe(q),
             halo__describe(k), halo__describe(v));
  HALO_CHECK(halo__device(q) == HALO_CPU && halo__device(k) == HALO_CPU &&
                 halo__device(v) == HALO_CPU,
             HALO_EUNSUPPORTED, "attention: q, k, v must be on the cpu");
  HALO_CHECK(halo__same_shape(k, v) && q->shape[0] == k->shape[0] && q->shape[1] == k->shape[1],
             HALO_EARG, "attention: q %s, k %s and v %s differ in batch, tokens or keys",
             halo__describe(q), halo__describe(k), halo__describe(v));
  HALO_CHECK(q->shape[3] == k->shape[3], HALO_EARG,
             "attention: k has head size %lld, q has %lld (rank %d)", (long long)k->shape[3],
             (long long)q->shape[3], halo_ring_rank(ring));
  HALO_CHECK(k->shape[2] > 0 && q->shape[2] % k->shape[2] == 0, HALO_EARG,
             "attention: %lld query heads are no multiple of %lld key/value heads",
             (long long)q->shape[2], (long long)k->shape[2]);
  HALO_CHECK(halo_plan_batch(plan) == q->shape[0] && halo_plan_heads(plan) == q->shape[2],
             HALO_EARG, "attention: the plan is for %lld sequences of %lld heads, q is %s",
             (long long)halo_plan_batch(plan), (long long)halo_plan_heads(plan), halo__describe(q));
  const halo_layout *layout = &plan->layout;
  HALO_CHECK(halo_layout_world(layout) == halo_ring_world(ring), HALO_EARG,
             "attention: the plan's layout is for %d ranks, the ring has %d",
             halo_layout_world(layout), halo_ring_world(ring));
  int64_t tokens = halo_layout_local_tokens(layout) * halo_ring_here(ring);
  HALO_CHECK(q->shape[1] == tokens, HALO_EARG,
             "attention: q has %lld tokens, the layout puts %lld here (rank %d)",
             (long long)q->shape[1], (long long)tokens, halo_ring_rank(ring));
  return HALO_OK;
}

/* All ranks must bring the same plan and shapes: messages are sized by them, and a difference would
 * be a hang or, worse, a wrong sum. One number per rank and call settles it. */
static halo_status check_ranks_agree(const pass *x) {
  const int64_t shape[] = {x->B, x->H, x->Hk, x->D, x->dtype};
  uint64_t value = halo_plan_hash(x->plan);
  for (size_t i = 0; i < sizeof shape / sizeof shape[0]; i++) {
    value = halo_random_u64(value, i, (uint64_t)shape[i]); // as a mixing function
  }
  return halo_comm_same(halo__ring_comm(x->ring), value, "attention's plan or shape");
}

/* Tasks in backward: enough for eight threads to share, first by sharing out the query heads of a
 * key/value head (each task has a dk and dv of its own), then by sharing out keys (each has a dq).
 * Not the number of threads, on which a sum must not depend. */
static void backward_parts(const pass *x, int32_t *head_parts_out, int32_t *key_parts_out) {
  enum { TASKS = 8 };
  const int64_t groups = x->B * x->Hk > 0 ? x->B * x->Hk : 1, blocks = x->plan->layout.per_rank;
  int64_t head_parts = (TASKS + groups - 1) / groups;
  if (head_parts > x->H / x->Hk) head_parts = x->H / x->Hk;
  int64_t key_parts = (TASKS + groups * head_parts - 1) / (groups * head_parts);
  if (key_parts > blocks) key_parts = blocks > 0 ? blocks : 1;
  *head_parts_out = (int32_t)head_parts;
  *key_parts_out = (int32_t)key_parts;
}

static void strides_of(int64_t out[3], const halo_tensor *t) {
  for (int32_t i = 0; i < 3; i++) out[i] = t->stride[i];
}

/* First element of rank `here` in a tensor [B, here*T, ...]. */
static char *rank_data(const pass *x, const halo_tensor *t, int32_t here) {
  return (char *)halo__data(t) + here * x->T * t->stride[1] * halo_dtype_bytes(t->dtype);
}

/* Fill x for q, k, v; the query side of each rank here is set up, its state is not. */
static halo_status pass_open(pass *x, const attention_context *c, const halo_tensor *q,
                             const halo_tensor *k, const halo_tensor *v) {
  *x = (pass){.ring = c->ring, .plan = c->plan, .kernels = halo__kernels(HALO_CPU),
              .here = halo_ring_here(c->ring), .rank = halo_ring_rank(c->ring),
              .world = halo_ring_world(c->ring), .dtype = q->dtype,
              .acc = halo__acc_dtype(q->dtype), .B = q->shape[0], .H = q->shape[2],
              .Hk = k->shape[2], .D = q->shape[3], .T = halo_layout_local_tokens(&c->plan->layout),
              .k = k, .v = v};
  x->element = halo_dtype_bytes(x->dtype);
  x->acc_bytes = halo_dtype_bytes(x->acc);
  const halo__gather *gather;
  HALO_TRY(halo__plan_gather(&gather, x->plan, x->Hk));
  x->gather = gather->n_entries > 0 ? gather : NULL;
  HALO_TRY(halo__alloc_zero((void **)&x->queries, x->here * (int64_t)sizeof *x->queries, HALO_CPU));
  HALO_TRY(halo__scratch((void **)&x->transfers, 2 * (int64_t)x->here * x->world,
                         sizeof *x->transfers));
  for (int32_t i = 0; i < x->here; i++) {
    const halo__tokens *tokens;
    HALO_TRY(halo__plan_tokens(&tokens, x->plan, x->rank + i));
    halo_attention_queries *a = &x->queries[i];
    *a = (halo_attention_queries){.dtype = x->dtype,
                                  .n_batch = x->B,
                                  .n_heads = x->H,
                                  .n_kv_heads = x->Hk,
                                  .head_size = x->D,
                                  .block = x->plan->layout.block,
                                  .n_blocks = x->plan->layout.per_rank,
                                  .scale = c->scale,
                                  .q = rank_data(x, q, i),
                                  .position = tokens->position,
                                  .first = tokens->first,
                                  .first_stride = tokens->first_stride,
                                  .pattern_of = halo__plan_pattern_of(x->plan),
                                  .n_parts = 1,
                                  .n_head_parts = 1,
                                  .poll = halo__comm_progress,
                                  .poll_context = halo__ring_comm(x->ring)};
    strides_of(a->q_stride, q);
  }
  return HALO_OK;
}

static void pass_close(pass *x) {
  halo__free(x->queries);
  halo__free(x->state);
  halo__free(x->transfers);
}

/* Items in rows by pattern, each times the (batch, head) pairs that share the pattern. */
static double items_of_heads(const halo_plan *p, const halo__rows *rows) {
  const int64_t per_pattern = rows->n_rows / p->n_patterns;
  double sum = 0;
  for (int64_t i = 0; i < p->n_patterns; i++) {
    const int64_t first = rows->offset[i * per_pattern], end = rows->offset[(i + 1) * per_pattern];
    int64_t items = 0;
    for (int64_t j = first; j < end; j++) items += rows->run[j].count;
    sum += (double)p->patterns[i].heads * (double)items;
  }
  return sum;
}

/* ---- hooks of the ring ---------------------------------------------------------------------- */

/* Own keys: K then V, each [B,Hk,T,D]. */
static halo_status load(void *context, int32_t here, void *kv) {
  const pass *x = context;
  const int64_t shape[4] = {x->B, x->Hk, x->T, x->D},
                bytes = x->B * x->Hk * x->T * x->D * x->element;
  const halo_tensor *both[2] = {x->k, x->v};
  for (int32_t i = 0; i < 2; i++) {
    const halo_tensor *t = both[i];
    const int64_t stride[4] = {t->stride[0], t->stride[2], t->stride[1], t->stride[3]};
    HALO_TRY(x->kernels->pack((char *)kv + i * bytes, rank_data(x, t, here), x->element, 4, shape,
                              stride));
  }
  return HALO_OK;
}

/* The queries of rank `here` meet the tiles of `source`. */
static halo_status meet_tiles(void *context, int32_t here, int32_t source, const void *kv,
                              void *dkv) {
  pass *x = context;
  const halo__slice *slice;
  const halo__tokens *tokens;
  HALO_TRY(halo__plan_slice(&slice, x->plan, x->rank + here, source));
  HALO_TRY(halo__plan_tokens(&tokens, x->plan, source));
  const int64_t count = x->B * x->Hk * x->T * x->D, G = x->plan->layout.block;
  x->met += (double)(G * G) * items_of_heads(x->plan, &slice->by_query);
  halo_attention_tiles tiles = {.k = kv, .v = (const char *)kv + count * x->element,
                                .position = tokens->position, .by_query = &slice->by_query};
  if (dkv == NULL) {
    return slice->n_tiles == 0 ? HALO_OK
                               : x->kernels->attention_tiles_fwd(&x->queries[here], &tiles);
  }
  tiles.dk = dkv;
  tiles.dv = (char *)dkv + count * x->acc_bytes;
  if (slice->n_tiles == 0) return x->kernels->fill(x->acc, dkv, 2 * count, 0);
  return x->kernels->attention_tiles_bwd(&x->queries[here], &tiles);
}

/* ---- columns -------------------------------------------------------------------------------- */

/* Entries of rank r, in the order in which they travel. */
static const int32_t *owned_by(const pass *x, int32_t r, int64_t *n_out) {
  *n_out = x->gather->owned_offset[r + 1] - x->gather->owned_offset[r];
  return x->gather->owned + x->gather->owned_offset[r];
}

/* The (batch, key/value head) that owns `entry`, not before `group`: entries of groups are
 * neighbours, so a walk over ascending entries finds each in passing. */
static int64_t group_from(const pass *x, int64_t group, int32_t entry) {
  while (x->gather->offset[group + 1] <= entry) group++;
  return group;
}

/* Send own keys of the columns to all, receive everybody's. A message is K row, V row per entry. */
static halo_status fetch_columns(void *context) {
  pass *x = context;
  const halo__gather *g = x->gather;
  const int64_t row = x->D * x->element, pair = 2 * row;
  int64_t most = 0;
  for (int32_t i = 0; i < x->here; i++) {
    const int64_t n = g->owned_offset[x->rank + i + 1] - g->owned_offset[x->rank + i];
    most = n > most ? n : most;
  }
  HALO_TRY(halo__ring_reserve(x->ring, HALO__RING_COLUMNS_SENT, most * pair));
  HALO_TRY(halo__ring_reserve(x->ring, HALO__RING_COLUMNS_RECEIVED, g->n_entries * pair));
  HALO_TRY(halo__ring_reserve(x->ring, HALO__RING_COLUMNS, g->n_entries * pair));
  int64_t n_transfers = 0;
  for (int32_t i = 0; i < x->here; i++) {
    int64_t n;
    const int32_t *owned = owned_by(x, x->rank + i, &n);
    char *sent = halo__ring_buffer(x->ring, HALO__RING_COLUMNS_SENT, i);
    char *received = halo__ring_buffer(x->ring, HALO__RING_COLUMNS_RECEIVED, i);
    for (int64_t e = 0, group = 0; e < n; e++) {
      group = group_from(x, group, owned[e]);
      const int64_t batch = group / x->Hk, head = group % x->Hk, t = g->local[owned[e]];
      const halo_tensor *both[2] = {x->k, x->v};
      for (int32_t j = 0; j < 2; j++) {
        const int64_t *s = both[j]->stride;
        memcpy(sent + e * pair + j * row,
               rank_data(x, both[j], i) + (batch * s[0] + t * s[1] + head * s[2]) * x->element,
               (size_t)row);
      }
    }
    for (int32_t r = 0; r < x->world; r++) {
      const int64_t from = g->owned_offset[r];
      x->transfers[n_transfers++] = (halo__transfer){sent, n * pair, i, r, true};
      x->transfers[n_transfers++] = (halo__transfer){
          received + from * pair, (g->owned_offset[r + 1] - from) * pair, i, r, false};
    }
  }
  return halo__ring_post_columns(x->ring, x->transfers, n_transfers);
}

/* The columns of rank `here`: what was received, put in the order of entries. */
static halo_status open_columns(pass *x, int32_t here, halo_attention_columns *out) {
  const halo__gather *g = x->gather;
  const int64_t row = x->D * x->element;
  char *k = halo__ring_buffer(x->ring, HALO__RING_COLUMNS, here), *v = k + g->n_entries * row;
  const char *received = halo__ring_buffer(x->ring, HALO__RING_COLUMNS_RECEIVED, here);
  for (int64_t e = 0; e < g->n_entries; e++) {
    memcpy(k + g->owned[e] * row, received + 2 * e * row, (size_t)row);
    memcpy(v + g->owned[e] * row, received + (2 * e + 1) * row, (size_t)row);
  }
  const halo__columns *columns;
  const halo__column_slice *slice;
  HALO_TRY(halo__plan_columns(&columns, x->plan));
  HALO_TRY(halo__plan_column_slice(&slice, x->plan, x->rank + here));
  x->met += (double)x->plan->layout.block * items_of_heads(x->plan, &slice->by_query);
  *out = (halo_attention_columns){
      .k = k, .v = v, .n_entries = g->n_entries, .token_offset = columns->offset,
      .token = columns->token, .slot_offset = g->slot_offset, .slot = g->slot,
      .by_query = &slice->by_query};
  return HALO_OK;
}

static halo_status columns_forward(void *context) {
  pass *x = context;
  HALO_TRY(halo__ring_wait_columns(x->ring));
  for (int32_t i = 0; i < x->here; i++) {
    halo_attention_columns columns;
    HALO_TRY(open_columns(x, i, &columns));
    HALO_TRY(x->kernels->attention_columns_fwd(&x->queries[i], &columns));
  }
  return HALO_OK;
}

/* Compute the gradients of all columns and start sending each to its owner. */
static halo_status columns_backward(void *context) {
  pass *x = context;
  const halo__gather *g = x->gather;
  const int64_t row = x->D * x->acc_bytes, pair = 2 * row;
  HALO_TRY(halo__ring_wait_columns(x->ring));
  HALO_TRY(halo__ring_reserve(x->ring, HALO__RING_COLUMN_GRADIENTS, g->n_entries * pair));
  int64_t most = 0;
  for (int32_t i = 0; i < x->here; i++) {
    halo_attention_columns columns;
    HALO_TRY(open_columns(x, i, &columns));
    columns.dk = halo__ring_buffer(x->ring, HALO__RING_COLUMN_GRADIENTS, i);
    columns.dv = (char *)columns.dk + g->n_entries * row;
    HALO_TRY(x->kernels->attention_columns_bwd(&x->queries[i], &columns));
    const int64_t n = g->owned_offset[x->rank + i + 1] - g->owned_offset[x->rank + i];
    most = n > most ? n : most;
  }
  HALO_TRY(halo__ring_reserve(x->ring, HALO__RING_COLUMNS_SENT, g->n_entries * pair));
  HALO_TRY(halo__ring_reserve(x->ring, HALO__RING_COLUMNS_RECEIVED, most * pair * x->world));
  int64_t n_transfers = 0;
  for (int32_t i = 0; i < x->here; i++) {
    const char *dk = halo__ring_buffer(x->ring, HALO__RING_COLUMN_GRADIENTS, i);
    const char *dv = dk + g->n_entries * row;
    char *sent = halo__ring_buffer(x->ring, HALO__RING_COLUMNS_SENT, i);
    char *received = halo__ring_buffer(x->ring, HALO__RING_COLUMNS_RECEIVED, i);
    int64_t own;
    (void)owned_by(x, x->rank + i, &own);
    for (int64_t e = 0; e < g->n_entries; e++) {
      memcpy(sent + e * pair, dk + g->owned[e] * row, (size_t)row);
      memcpy(sent + e * pair + row, dv + g->owned[e] * row, (size_t)row);
    }
    for (int32_t r = 0; r < x->world; r++) {
      const int64_t from = g->owned_offset[r];
      x->transfers[n_transfers++] = (halo__transfer){
          sent + from * pair, (g->owned_offset[r + 1] - from) * pair, i, r, true};
      x->transfers[n_transfers++] =
          (halo__transfer){received + r * own * pair, own * pair, i, r, false};
    }
  }
  return halo__ring_post_columns(x->ring, x->transfers, n_transfers);
}

static halo_status columns_return(void *context) {
  return halo__ring_wait_columns(((pass *)context)->ring);
}

/* dkv [2,B,Hk,T,D] += the W parts of the rank's own columns, in rank order. */
static halo_status add_column_gradients(const pass *x, int32_t here, char *dkv) {
  int64_t n, *rows;
  const int32_t *owned = owned_by(x, x->rank + here, &n);
  HALO_TRY(halo__scratch((void **)&rows, n, sizeof *rows));
  for (int64_t e = 0, group = 0; e < n; e++) {
    group = group_from(x, group, owned[e]);
    rows[e] = group * x->T + x->gather->local[owned[e]];
  }
  halo_status status = x->kernels->attention_columns_add(
      x->acc, dkv, dkv + x->B * x->Hk * x->T * x->D * x->acc_bytes,
      halo__ring_buffer(x->ring, HALO__RING_COLUMNS_RECEIVED, here), rows, n, x->world, x->D);
  halo__free(rows);
  return status;
}

/* The whole gradient of the rank's keys goes to dk and dv. */
static halo_status store(void *context, int32_t here, void *dkv) {
  pass *x = context;
  const int64_t shape[4] = {x->B, x->Hk, x->T, x->D}, count = x->B * x->Hk * x->T * x->D;
  if (x->gather != NULL) HALO_TRY(add_column_gradients(x, here, dkv));
  void *narrow = NULL;
  if (x->dtype != x->acc) {
    HALO_TRY(halo__scratch(&narrow, 2 * count, x->element));
    HALO_TRY(x->kernels->convert(narrow, x->dtype, dkv, x->acc, 2 * count));
  }
  const char *from = narrow != NULL ? narrow : dkv;
  halo_tensor *both[2] = {x->dk, x->dv};
  halo_status status = HALO_OK;
  for (int32_t i = 0; i < 2 && status == HALO_OK; i++) {
    const int64_t *s = both[i]->stride, stride[4] = {s[0], s[2], s[1], s[3]};
    status = x->kernels->unpack(rank_data(x, both[i], here), from + i * count * x->element,
                                x->element, 4, shape, stride);
  }
  halo__free(narrow);
  return status;
}

/* ---- forward and backward ------------------------------------------------------------------- */

static halo_status run_ring(pass *x, bool is_backward) {
  const int64_t count = 2 * x->B * x->Hk * x->T * x->D;
  halo__ring_pass ring_pass = {.is_backward = is_backward, .kv_bytes = count * x->element,
                               .dkv_count = count, .dkv_dtype = x->acc, .context = x, .load = load,
                               .compute = meet_tiles, .store = store};
  if (x->gather != NULL) {
    ring_pass.fetch_columns = fetch_columns;
    ring_pass.compute_columns = is_backward ? columns_backward : columns_forward;
    ring_pass.return_columns = columns_return;
  }
  return halo__ring_run(x->ring, &ring_pass);
}

/* out and lse of q, k, v, whose last dims are contiguous. */
static halo_status run_forward(pass *x, halo_tensor *out, halo_tensor *lse) {
  const int64_t rows = x->B * x->H * x->T, each = rows * (x->D + 2);
  HALO_TRY(halo__scratch(&x->state, x->here * each, x->acc_bytes));
  for (int32_t i = 0; i < x->here; i++) {
    halo_attention_queries *a = &x->queries[i];
    a->o = (char *)x->state + i * each * x->acc_bytes;
    a->m = (char *)a->o + rows * x->D * x->acc_bytes;
    a->l = (char *)a->m + rows * x->acc_bytes;
    HALO_TRY(x->kernels->attention_begin(a));
  }
  HALO_TRY(run_ring(x, false));
  for (int32_t i = 0; i < x->here; i++) {
    HALO_TRY(x->kernels->attention_finish(rank_data(x, out, i), out->stride,
                                          (char *)halo__data(lse) + i * x->T * x->acc_bytes,
                                          lse->stride, &x->queries[i]));
  }
  return HALO_OK;
}

/* t with a contiguous last dim: t itself or a copy. */
static halo_status readable(halo_tensor **out, halo_tensor *t) {
  if (t->shape[3] <= 1 || t->stride[3] == 1) return halo_tensor_retain(out, t);
  return halo__contiguous(out, t);
}

static halo_status attention_forward(halo__call *c) {
  const attention_context *x = c->extra;
  pass p = {0};
  halo_tensor *in[3] = {0}, *lse = NULL;
  halo_status status = HALO_OK;
  for (int32_t i = 0; i < 3; i++) HALO_TRY_GOTO(readable(&in[i], c->in[i]));
  const int64_t *shape = in[IN_Q]->shape, lse_shape[3] = {shape[0], shape[2], shape[1]};
  HALO_TRY_GOTO(halo_tensor_new(&c->out[0], in[IN_Q]->dtype, HALO_CPU, 4, shape));
  HALO_TRY_GOTO(halo_tensor_new(&lse, halo__acc_dtype(in[IN_Q]->dtype), HALO_CPU, 3, lse_shape));
  HALO_TRY_GOTO(pass_open(&p, x, in[IN_Q], in[IN_K], in[IN_V]));
  HALO_TRY_GOTO(check_ranks_agree(&p));
  HALO_TRY_GOTO(run_forward(&p, c->out[0], lse));
  halo_trace_work(0, 4 * p.met * (double)p.D);
  if (c->wants_grad) {
    HALO_TRY_GOTO(halo_tensor_retain(&c->saved[SAVED_OUT], c->out[0]));
    HALO_TRY_GOTO(halo_tensor_retain(&c->saved[SAVED_LSE], lse));
  }
  if (x->lse_out != NULL) {
    *x->lse_out = lse;
    lse = NULL;
  }
done:
  pass_close(&p);
  for (int32_t i = 0; i < 3; i++) halo_tensor_free(in[i]);
  halo_tensor_free(lse);
  return status;
}

/* lse and delta of one rank are [B,H,T] for the kernels; the tensor's rows are longer when several
 * ranks live here. */
static halo_status rank_lse(const pass *x, int32_t here, const halo_tensor *lse, void *to) {
  const int64_t shape[3] = {x->B, x->H, x->T};
  return x->kernels->pack(to, (char *)halo__data(lse) + here * x->T * x->acc_bytes, x->acc_bytes, 3,
                          shape, lse->stride);
}

static halo_status run_backward(pass *x, halo_tensor *dq, const halo_tensor *grad,
                                const halo_tensor *out, const halo_tensor *lse) {
  const int64_t rows = x->B * x->H * x->T;
  int32_t head_parts, parts;
  backward_parts(x, &head_parts, &parts);
  const int64_t each = rows * (x->D * parts + 2);
  HALO_TRY(halo__scratch(&x->state, x->here * each, x->acc_bytes));
  for (int32_t i = 0; i < x->here; i++) {
    halo_attention_queries *a = &x->queries[i];
    char *state = (char *)x->state + i * each * x->acc_bytes;
    char *row_lse = state + rows * x->D * parts * x->acc_bytes;
    char *row_delta = row_lse + rows * x->acc_bytes;
    a->dq = state;
    a->n_parts = parts;
    a->n_head_parts = head_parts;
    a->grad = rank_data(x, grad, i);
    strides_of(a->grad_stride, grad);
    a->lse = row_lse;
    a->delta = row_delta;
    HALO_TRY(x->kernels->fill(x->acc, state, rows * x->D * parts, 0));
    HALO_TRY(rank_lse(x, i, lse, row_lse));
    HALO_TRY(x->kernels->attention_delta(row_delta, rank_data(x, out, i), out->stride, a));
  }
  HALO_TRY(run_ring(x, true));
  for (int32_t i = 0; i < x->here; i++) {
    HALO_TRY(x->kernels->attention_dq_finish(rank_data(x, dq, i), dq->stride, &x->queries[i]));
  }
  return HALO_OK;
}

static halo_status attention_backward(halo__call *c) {
  const attention_context *x = c->extra;
  if (c->grad_out[0] == NULL) return HALO_OK;
  pass p = {0};
  halo_tensor *in[3] = {0}, *made[3] = {0}, *grad = NULL;
  halo_status status = HALO_OK;
  for (int32_t i = 0; i < 3; i++) {
    HALO_TRY_GOTO(readable(&in[i], c->in[i]));
    HALO_TRY_GOTO(halo__new_like(&made[i], c->in[i]));
  }
  assert(c->grad_out[0]->dtype == in[IN_Q]->dtype);
  HALO_TRY_GOTO(readable(&grad, c->grad_out[0]));
  HALO_TRY_GOTO(pass_open(&p, x, in[IN_Q], in[IN_K], in[IN_V]));
  p.dk = made[IN_K];
  p.dv = made[IN_V];
  HALO_TRY_GOTO(run_backward(&p, made[IN_Q], grad, c->saved[SAVED_OUT], c->saved[SAVED_LSE]));
  halo_trace_work(0, 10 * p.met * (double)p.D);
  for (int32_t i = 0; i < 3; i++) {
    if (!c->need_grad[i]) continue;
    c->grad_in[i] = made[i];
    made[i] = NULL;
  }
done:
  pass_close(&p);
  for (int32_t i = 0; i < 3; i++) {
    halo_tensor_free(in[i]);
    halo_tensor_free(made[i]);
  }
  halo_tensor_free(grad);
  return status;
}

static void free_context(void *extra) {
  attention_context *x = extra;
  halo_plan_free(x->plan);
  halo_ring_free(x->ring);
  halo__free(x);
}

halo_status halo_attention(halo_tensor **out, halo_tensor **lse_out, halo_tensor *q, halo_tensor *k,
                           halo_tensor *v, halo_plan *plan, halo_ring *ring, double scale) {
  HALO_TRY(check_shapes(q, k, v, plan, ring));
  halo_tensor *lse = NULL;
  attention_context *x;
  HALO_TRY(halo__alloc_zero((void **)&x, (int64_t)sizeof *x, HALO_CPU));
  halo_status status = halo_plan_retain(&x->plan, plan);
  if (status != HALO_OK) {
    halo__free(x);
    return status;
  }
  x->ring = halo__ring_retain(ring);
  x->scale = scale;
  x->lse_out = lse_out != NULL ? &lse : NULL;
  halo__call c = {.op = HALO_CALL_attention, .n_in = 3, .n_out = 1, .in = {q, k, v}, .extra = x,
                  .free_extra = free_context};
  status = halo__run(&c, "attention", attention_forward, attention_backward);
  if (status != HALO_OK) {
    halo_tensor_free(lse);
    return status;
  }
  *out = c.out[0];
  if (lse_out != NULL) *lse_out = lse;
  return HALO_OK;
}

/* ---- merge and cache ------------------------------------------------------------------------ */

halo_status halo_attention_merge(halo_tensor *o, halo_tensor *lse, const halo_tensor *o_part,
                                 const halo_tensor *lse_part) {
  HALO_CHECK(o->ndim == 4 && halo__same_shape(o, o_part) && o->dtype == o_part->dtype &&
                 halo__is_float(o->dtype),
             HALO_EARG, "attention_merge: o is %s, o_part %s; both are [B,T,H,D] of one dtype",
             halo__describe(o), halo__describe(o_part));
  HALO_CHECK(lse->ndim == 3 && halo__same_shape(lse, lse_part) && lse->dtype == lse_part->dtype &&
                 lse->dtype == halo__acc_dtype(o->dtype) && lse->shape[0] == o->shape[0] &&
                 lse->shape[1] == o->shape[2] && lse->shape[2] == o->shape[1],
             HALO_EARG, "attention_merge: lse is %s, lse_part %s; for o %s both are %s [B,H,T]",
             halo__describe(lse), halo__describe(lse_part), halo__describe(o),
             halo_dtype_name(halo__acc_dtype(o->dtype)));
  HALO_CHECK(halo_tensor_is_contiguous(o) && halo_tensor_is_contiguous(o_part) &&
                 halo_tensor_is_contiguous(lse) && halo_tensor_is_contiguous(lse_part),
             HALO_EARG, "attention_merge: all tensors must be contiguous");
  return halo__kernels(HALO_CPU)->attention_merge(
      o->dtype, halo__data(o), halo__data(lse), halo__data(o_part), halo__data(lse_part),
      o->shape[0], o->shape[1], o->shape[2], o->shape[3]);
}

static halo_status check_positions(const halo_tensor *t, int64_t n, const char *name) {
  HALO_CHECK(t != NULL && t->ndim == 1 && t->dtype == HALO_I64 && t->shape[0] >= n &&
                 halo_tensor_is_contiguous(t),
             HALO_EARG, "attention_cached: %s is %s; it must be a contiguous i64 [%lld]", name,
             t == NULL ? "NULL" : halo__describe(t), (long long)n);
  const int64_t *x = halo__data(t);
  for (int64_t i = 0; i < n; i++) {
    HALO_CHECK(x[i] >= 0 && x[i] <= INT32_MAX, HALO_EARG, "attention_cached: %s[%lld] is %lld",
               name, (long long)i, (long long)x[i]);
  }
  return HALO_OK;
}

halo_status halo_attention_cached(halo_tensor **out, halo_tensor **lse_out, const halo_tensor *q,
                                  const halo_tensor *k, const halo_tensor *v, int64_t length,
                                  const halo_tensor *key_positions,
                                  const halo_tensor *query_positions, double scale) {
  HALO_CHECK(q->ndim == 4 && k->ndim == 4 && halo__same_shape(k, v) && q->shape[0] == k->shape[0] &&
                 q->shape[3] == k->shape[3] && k->shape[2] > 0 && q->shape[2] % k->shape[2] == 0,
             HALO_EARG, "attention_cached: q %s [B,Tq,H,D] does not fit k %s, v %s [B,Tcap,Hk,D]",
             halo__describe(q), halo__describe(k), halo__describe(v));
  HALO_CHECK(halo__is_float(q->dtype) && q->dtype == k->dtype && q->dtype == v->dtype, HALO_EARG,
             "attention_cached: q, k, v must have one floating dtype; got %s, %s, %s",
             halo__describe(q), halo__describe(k), halo__describe(v));
  HALO_CHECK(halo_tensor_is_contiguous(q) && halo_tensor_is_contiguous(k) &&
                 halo_tensor_is_contiguous(v),
             HALO_EARG, "attention_cached: q, k and v must be contiguous");
  HALO_CHECK(length >= 0 && length <= k->shape[1], HALO_EARG,
             "attention_cached: length is %lld of a cache of %lld", (long long)length,
             (long long)k->shape[1]);
  HALO_TRY(check_positions(key_positions, length, "key_positions"));
  HALO_TRY(check_positions(query_positions, q->shape[1], "query_positions"));
  const int64_t lse_shape[3] = {q->shape[0], q->shape[2], q->shape[1]};
  halo_tensor *o, *lse;
  HALO_TRY(halo__new_like(&o, q));
  halo_status status = halo_tensor_new(&lse, halo__acc_dtype(q->dtype), HALO_CPU, 3, lse_shape);
  if (status == HALO_OK && halo_tensor_count(q) > 0) {
    status = halo__kernels(HALO_CPU)->attention_cached(
        q->dtype, halo__data(o), halo__data(lse), halo__data(q), halo__data(k), halo__data(v),
        halo__data(key_positions), halo__data(query_positions), q->shape[0], q->shape[1],
        q->shape[2], k->shape[2], q->shape[3], length, k->shape[1], scale);
    if (status != HALO_OK) halo_tensor_free(lse);
  }
  if (status != HALO_OK) {
    halo_tensor_free(o);
    return status;
  }
  *out = o;
  if (lse_out != NULL) {
    *lse_out = lse;
  } else {
    halo_tensor_free(lse);
  }
  return HALO_OK;
}
