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
 * All of it runs on the device of q, k and v: tables of the plan are copied there on first use
 * (plan_device.c), slots of the ring are memory there, every step is a row of its kernel table. A GPU
 * has its own split of backward: one task per block of keys, so lists by key go with the call, and sums
 * repeat bit for bit only with halo_set_deterministic. With one rank and no columns forward is one
 * kernel without state between (attention_once).
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
  halo_device device;
  halo_dtype dtype, acc;
  int64_t B, H, Hk, D, T, element, acc_bytes;
  const halo_tensor *k, *v;
  halo_attention_queries *queries; /* [here] */
  void *state;                     /* the memory behind queries */
  halo_tensor *dk, *dv;            /* backward */
  const halo__gather *gather;      /* NULL when the plan has no columns */
  halo__transfer *transfers;
  halo_tensor *out, *lse; /* forward in one kernel: where to; else NULL */
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
  HALO_CHECK(halo__device(q) == halo__device(k) && halo__device(q) == halo__device(v), HALO_EARG,
             "attention: q, k, v must be on one device");
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
  *head_parts_out = *key_parts_out = 1;
  if (x->device != HALO_CPU) return; // kernels there own keys and share dq
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

static _Atomic int32_t is_deterministic;
void halo_set_deterministic(int32_t on) { is_deterministic = on != 0; }
int32_t halo_deterministic(void) { return is_deterministic; }

/* The tables of rank `here` where its kernels read them. */
static halo_status open_tables(pass *x, int32_t here) {
  halo_attention_queries *a = &x->queries[here];
  const halo__tokens *tokens;
  HALO_TRY(halo__plan_tokens(&tokens, x->plan, x->rank + here));
  const int64_t row_bytes = x->T * (int64_t)sizeof(int32_t);
  a->first_stride = tokens->first_stride;
  HALO_TRY(halo__plan_mirror(&a->position, x->plan, x->device, tokens->position, row_bytes));
  HALO_TRY(halo__plan_mirror(&a->first, x->plan, x->device, tokens->first,
                             (tokens->first_stride > 0 ? x->B : 1) * row_bytes));
  return halo__plan_mirror(&a->pattern_of, x->plan, x->device, halo__plan_pattern_of(x->plan),
                           x->B * x->H * (int64_t)sizeof(int32_t));
}

/* Fill x for q, k, v; the query side of each rank here is set up, its state is not. */
static halo_status pass_open(pass *x, const attention_context *c, const halo_tensor *q,
                             const halo_tensor *k, const halo_tensor *v) {
  *x = (pass){.ring = c->ring, .plan = c->plan, .device = halo__device(q),
              .kernels = halo__kernels(halo__device(q)),
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
                                  .n_parts = 1,
                                  .n_head_parts = 1,
                                  .deterministic = is_deterministic,
                                  .poll = halo__comm_progress,
                                  .poll_context = halo__ring_comm(x->ring)};
    strides_of(a->q_stride, q);
    HALO_TRY(open_tables(x, i));
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
  if (slice->n_tiles == 0 && x->out == NULL) {
    return dkv == NULL ? HALO_OK : x->kernels->fill(x->acc, dkv, 2 * count, 0);
  }
  halo__rows by_query, by_key;
  HALO_TRY(halo__plan_mirror_rows(&by_query, x->plan, x->device, &slice->by_query));
  halo_attention_tiles tiles = {.k = kv, .v = (const char *)kv + count * x->element,
                                .by_query = &by_query};
  HALO_TRY(halo__plan_mirror(&tiles.position, x->plan, x->device, tokens->position,
                             x->T * (int64_t)sizeof *tiles.position));
  if (x->out != NULL) {
    return x->kernels->attention_once(rank_data(x, x->out, here), x->out->stride,
                                      halo__data(x->lse), x->lse->stride, &x->queries[here], &tiles);
  }
  if (dkv == NULL) return x->kernels->attention_tiles_fwd(&x->queries[here], &tiles);
  if (x->device != HALO_CPU) {
    const halo__rows *rows;
    HALO_TRY(halo__plan_slice_by_key(&rows, x->plan, x->rank + here, source));
    HALO_TRY(halo__plan_mirror_rows(&by_key, x->plan, x->device, rows));
    tiles.by_key = &by_key;
  }
  tiles.dk = dkv;
  tiles.dv = (char *)dkv + count * x->acc_bytes;
  return x->kernels->attention_tiles_bwd(&x->queries[here], &tiles);
}

/* ---- columns -------------------------------------------------------------------------------- */

/* The columns of a rank here on their way in one call. */
typedef struct opened {
  halo_attention_columns columns;
  halo__rows by_query, by_column;
} opened;

/* How many entries rank r owns. */
static int64_t owned_by(const pass *x, int32_t r) {
  return x->gather->owned_offset[r + 1] - x->gather->owned_offset[r];
}

/* The most entries that one rank here owns. */
static int64_t most_owned(const pass *x) {
  int64_t most = 0;
  for (int32_t i = 0; i < x->here; i++) {
    const int64_t n = owned_by(x, x->rank + i);
    most = n > most ? n : most;
  }
  return most;
}

/* Rows [n,D] of `bytes` a value: y[i] = x[index[i]], with `index` of a table of the gather that has
 * `length` entries, from entry `from` on; x has `rows` rows. */
static halo_status take_rows(pass *x, void *y, const void *from_rows, int64_t rows, int64_t bytes,
                             const int64_t *table, int64_t length, int64_t from, int64_t n) {
  const int64_t *index;
  HALO_TRY(halo__plan_mirror(&index, x->plan, x->device, table, length * (int64_t)sizeof *table));
  if (n == 0) return HALO_OK;
  return x->kernels->take(bytes, y, from_rows, index + from, 1, rows, n, x->D);
}

/* Send own keys of the columns to all, receive everybody's. A message is K row, V row per entry; own
 * keys lie in the rank's KV slot 0, where `load` put them. */
static halo_status fetch_columns(void *context) {
  pass *x = context;
  const halo__gather *g = x->gather;
  const int64_t pair = 2 * x->D * x->element, rows = 2 * x->B * x->Hk * x->T;
  HALO_TRY(halo__ring_reserve(x->ring, HALO__RING_COLUMNS_SENT, most_owned(x) * pair, x->device));
  HALO_TRY(
      halo__ring_reserve(x->ring, HALO__RING_COLUMNS_RECEIVED, g->n_entries * pair, x->device));
  HALO_TRY(halo__ring_reserve(x->ring, HALO__RING_COLUMNS, g->n_entries * pair, x->device));
  int64_t n_transfers = 0;
  for (int32_t i = 0; i < x->here; i++) {
    const int64_t n = owned_by(x, x->rank + i), first = g->owned_offset[x->rank + i];
    char *sent = halo__ring_buffer(x->ring, HALO__RING_COLUMNS_SENT, i);
    char *received = halo__ring_buffer(x->ring, HALO__RING_COLUMNS_RECEIVED, i);
    HALO_TRY(take_rows(x, sent, halo__ring_buffer(x->ring, HALO__RING_KV, i), rows, x->element,
                       g->send_row, 2 * g->n_entries, 2 * first, 2 * n));
    for (int32_t r = 0; r < x->world; r++) {
      x->transfers[n_transfers++] = (halo__transfer){sent, n * pair, i, r, true, x->device};
      x->transfers[n_transfers++] =
          (halo__transfer){received + g->owned_offset[r] * pair, owned_by(x, r) * pair, i, r, false,
                           x->device};
    }
  }
  return halo__ring_post_columns(x->ring, x->transfers, n_transfers);
}

/* The columns of rank `here`: what was received, put in the order of entries. */
static halo_status open_columns(pass *x, int32_t here, bool is_backward, opened *out) {
  const halo__gather *g = x->gather;
  halo_plan *p = x->plan;
  char *k = halo__ring_buffer(x->ring, HALO__RING_COLUMNS, here);
  const char *v = k + g->n_entries * x->D * x->element;
  HALO_TRY(take_rows(x, k, halo__ring_buffer(x->ring, HALO__RING_COLUMNS_RECEIVED, here),
                     2 * g->n_entries, x->element, g->place_row, 2 * g->n_entries, 0,
                     2 * g->n_entries));
  const halo__columns *columns;
  const halo__column_slice *slice;
  HALO_TRY(halo__plan_columns(&columns, p));
  HALO_TRY(halo__plan_column_slice(&slice, p, x->rank + here));
  x->met += (double)p->layout.block * items_of_heads(p, &slice->by_query);
  HALO_TRY(halo__plan_mirror_rows(&out->by_query, p, x->device, &slice->by_query));
  halo_attention_columns *c = &out->columns;
  *c = (halo_attention_columns){
      .k = k, .v = v, .n_entries = g->n_entries, .by_query = &out->by_query};
  if (is_backward && x->device != HALO_CPU) {
    const halo__rows *rows;
    HALO_TRY(halo__plan_columns_by_column(&rows, p, x->rank + here));
    HALO_TRY(halo__plan_mirror_rows(&out->by_column, p, x->device, rows));
    c->by_column = &out->by_column;
  }
  const int64_t units = x->B * x->H, n_columns = columns->offset[p->n_patterns];
  HALO_TRY(halo__plan_mirror(&c->token_offset, p, x->device, columns->offset,
                             (p->n_patterns + 1) * (int64_t)sizeof *columns->offset));
  HALO_TRY(halo__plan_mirror(&c->token, p, x->device, columns->token,
                             n_columns * (int64_t)sizeof *columns->token));
  c->n_slots = g->slot_offset[units];
  HALO_TRY(halo__plan_mirror(&c->slot_offset, p, x->device, g->slot_offset,
                             (units + 1) * (int64_t)sizeof *g->slot_offset));
  return halo__plan_mirror(&c->slot, p, x->device, g->slot,
                           g->slot_offset[units] * (int64_t)sizeof *g->slot);
}

static halo_status columns_forward(void *context) {
  pass *x = context;
  HALO_TRY(halo__ring_wait_columns(x->ring));
  for (int32_t i = 0; i < x->here; i++) {
    opened open;
    HALO_TRY(open_columns(x, i, false, &open));
    HALO_TRY(x->kernels->attention_columns_fwd(&x->queries[i], &open.columns));
  }
  return HALO_OK;
}

/* Compute the gradients of all columns and start sending each to its owner. */
static halo_status columns_backward(void *context) {
  pass *x = context;
  const halo__gather *g = x->gather;
  const int64_t row = x->D * x->acc_bytes, pair = 2 * row;
  HALO_TRY(halo__ring_wait_columns(x->ring));
  HALO_TRY(
      halo__ring_reserve(x->ring, HALO__RING_COLUMN_GRADIENTS, g->n_entries * pair, x->device));
  for (int32_t i = 0; i < x->here; i++) {
    opened open;
    HALO_TRY(open_columns(x, i, true, &open));
    open.columns.dk = halo__ring_buffer(x->ring, HALO__RING_COLUMN_GRADIENTS, i);
    open.columns.dv = (char *)open.columns.dk + g->n_entries * row;
    HALO_TRY(x->kernels->attention_columns_bwd(&x->queries[i], &open.columns));
  }
  HALO_TRY(halo__ring_reserve(x->ring, HALO__RING_COLUMNS_SENT, g->n_entries * pair, x->device));
  HALO_TRY(halo__ring_reserve(x->ring, HALO__RING_COLUMNS_RECEIVED,
                              most_owned(x) * pair * x->world, x->device));
  int64_t n_transfers = 0;
  for (int32_t i = 0; i < x->here; i++) {
    char *sent = halo__ring_buffer(x->ring, HALO__RING_COLUMNS_SENT, i);
    char *received = halo__ring_buffer(x->ring, HALO__RING_COLUMNS_RECEIVED, i);
    const int64_t own = owned_by(x, x->rank + i);
    HALO_TRY(take_rows(x, sent, halo__ring_buffer(x->ring, HALO__RING_COLUMN_GRADIENTS, i),
                       2 * g->n_entries, x->acc_bytes, g->return_row, 2 * g->n_entries, 0,
                       2 * g->n_entries));
    for (int32_t r = 0; r < x->world; r++) {
      x->transfers[n_transfers++] = (halo__transfer){
          sent + g->owned_offset[r] * pair, owned_by(x, r) * pair, i, r, true, x->device};
      x->transfers[n_transfers++] =
          (halo__transfer){received + r * own * pair, own * pair, i, r, false, x->device};
    }
  }
  return halo__ring_post_columns(x->ring, x->transfers, n_transfers);
}

static halo_status columns_return(void *context) {
  return halo__ring_wait_columns(((pass *)context)->ring);
}

/* dkv [2,B,Hk,T,D] += the W parts of the rank's own columns, in rank order. */
static halo_status add_column_gradients(pass *x, int32_t here, char *dkv) {
  const halo__gather *g = x->gather;
  const int64_t *rows;
  HALO_TRY(halo__plan_mirror(&rows, x->plan, x->device, g->own_row,
                             g->n_entries * (int64_t)sizeof *g->own_row));
  const int64_t n = owned_by(x, x->rank + here);
  if (n == 0) return HALO_OK;
  return x->kernels->attention_columns_add(
      x->acc, dkv, dkv + x->B * x->Hk * x->T * x->D * x->acc_bytes,
      halo__ring_buffer(x->ring, HALO__RING_COLUMNS_RECEIVED, here),
      rows + g->owned_offset[x->rank + here], n, x->world, x->D);
}

/* The whole gradient of the rank's keys goes to dk and dv. */
static halo_status store(void *context, int32_t here, void *dkv) {
  pass *x = context;
  const int64_t shape[4] = {x->B, x->Hk, x->T, x->D}, count = x->B * x->Hk * x->T * x->D;
  if (x->gather != NULL) HALO_TRY(add_column_gradients(x, here, dkv));
  void *narrow = NULL;
  if (x->dtype != x->acc) {
    HALO_TRY(halo__alloc(&narrow, 2 * count * x->element, x->device));
  }
  const char *from = narrow != NULL ? narrow : dkv;
  halo_tensor *both[2] = {x->dk, x->dv};
  halo_status status = HALO_OK;
  if (narrow != NULL) status = x->kernels->convert(narrow, x->dtype, dkv, x->acc, 2 * count);
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
  halo__ring_pass ring_pass = {.is_backward = is_backward, .device = x->device,
                               .kv_bytes = count * x->element,
                               .dkv_count = count, .dkv_dtype = x->acc, .context = x, .load = load,
                               .compute = meet_tiles, .store = store};
  if (x->gather != NULL) {
    ring_pass.fetch_columns = fetch_columns;
    ring_pass.compute_columns = is_backward ? columns_backward : columns_forward;
    ring_pass.return_columns = columns_return;
  }
  return halo__ring_run(x->ring, &ring_pass);
}

enum { ALIGNMENT = 256 }; /* of each array of the state */

static int64_t aligned(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

/* out and lse of q, k, v, whose last dims are contiguous. */
static halo_status run_forward(pass *x, halo_tensor *out, halo_tensor *lse) {
  if (x->world == 1 && x->gather == NULL) {
    x->out = out;
    x->lse = lse;
    return run_ring(x, false);
  }
  const int64_t rows = x->B * x->H * x->T, row_bytes = aligned(rows * x->acc_bytes);
  const int64_t o_bytes = aligned(rows * x->D * x->acc_bytes), each = o_bytes + 2 * row_bytes;
  HALO_TRY(halo__alloc(&x->state, x->here * each, x->device));
  for (int32_t i = 0; i < x->here; i++) {
    halo_attention_queries *a = &x->queries[i];
    a->o = (char *)x->state + i * each;
    a->m = (char *)a->o + o_bytes;
    a->l = (char *)a->m + row_bytes;
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
  const int32_t device = (int32_t)halo__device(in[IN_Q]);
  const int64_t *shape = in[IN_Q]->shape, lse_shape[3] = {shape[0], shape[2], shape[1]};
  HALO_TRY_GOTO(halo_tensor_new(&c->out[0], in[IN_Q]->dtype, device, 4, shape));
  HALO_TRY_GOTO(halo_tensor_new(&lse, halo__acc_dtype(in[IN_Q]->dtype), device, 3, lse_shape));
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
  const int64_t row_bytes = aligned(rows * x->acc_bytes);
  const int64_t dq_bytes = aligned(rows * x->D * parts * x->acc_bytes);
  const int64_t each = dq_bytes + 2 * row_bytes;
  HALO_TRY(halo__alloc(&x->state, x->here * each, x->device));
  for (int32_t i = 0; i < x->here; i++) {
    halo_attention_queries *a = &x->queries[i];
    char *state = (char *)x->state + i * each;
    char *row_lse = state + dq_bytes;
    char *row_delta = row_lse + row_bytes;
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
  const halo_device device = halo__device(o);
  HALO_CHECK(halo__device(lse) == device && halo__device(o_part) == device &&
                 halo__device(lse_part) == device,
             HALO_EARG, "attention_merge: all tensors must be on one device");
  return halo__kernels(device)->attention_merge(
      o->dtype, halo__data(o), halo__data(lse), halo__data(o_part), halo__data(lse_part),
      o->shape[0], o->shape[1], o->shape[2], o->shape[3]);
}

static halo_status check_positions(const halo_tensor *t, int64_t n, const char *name) {
  HALO_CHECK(t != NULL && t->ndim == 1 && t->dtype == HALO_I64 && t->shape[0] >= n &&
                 halo_tensor_is_contiguous(t),
             HALO_EARG, "attention_cached: %s is %s; it must be a contiguous i64 [%lld]", name,
             t == NULL ? "NULL" : halo__describe(t), (long long)n);
  // Values on a device are not looked at: that would wait for it at every token of every layer.
  if (halo__device(t) != HALO_CPU) return HALO_OK;
  const int64_t *x = halo__data(t);
  for (int64_t i = 0; i < n; i++) {
    HALO_CHECK(x[i] >= 0 && x[i] <= INT32_MAX, HALO_EARG, "attention_cached: %s[%lld] is %lld",
               name, (long long)i, (long long)x[i]);
  }
  return HALO_OK;
}

/* Positions where the kernel reads them: their own memory, or a copy to free in *copy. */
static halo_status positions_on(const int64_t **out, int64_t **copy, halo_device device,
                                const halo_tensor *t, int64_t n) {
  *copy = NULL;
  *out = halo__data(t);
  if (halo__device(t) == device || n == 0) return HALO_OK;
  HALO_CHECK(device != HALO_CPU, HALO_EARG, "attention_cached: positions are on another device");
  HALO_TRY(halo__alloc((void **)copy, n * (int64_t)sizeof **copy, device));
  *out = *copy;
  return halo__kernels(device)->copy_in(*copy, halo__data(t), n * (int64_t)sizeof **copy);
}

static halo_status run_cached(halo_tensor *o, halo_tensor *lse, const halo_tensor *q,
                              const halo_tensor *k, const halo_tensor *v, int64_t length,
                              const halo_tensor *key_positions,
                              const halo_tensor *query_positions, double scale) {
  const halo_device device = halo__device(q);
  const int64_t *key_position, *query_position;
  int64_t *copies[2] = {NULL, NULL};
  halo_status status = positions_on(&key_position, &copies[0], device, key_positions, length);
  if (status == HALO_OK) {
    status = positions_on(&query_position, &copies[1], device, query_positions, q->shape[1]);
  }
  if (status == HALO_OK) {
    status = halo__kernels(device)->attention_cached(
        q->dtype, halo__data(o), halo__data(lse), halo__data(q), halo__data(k), halo__data(v),
        key_position, query_position, q->shape[0], q->shape[1], q->shape[2], k->shape[2],
        q->shape[3], length, k->shape[1], scale);
  }
  halo__free(copies[0]);
  halo__free(copies[1]);
  return status;
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
  HALO_CHECK(halo__device(q) == halo__device(k) && halo__device(q) == halo__device(v), HALO_EARG,
             "attention_cached: q, k and v must be on one device");
  HALO_TRY(check_positions(key_positions, length, "key_positions"));
  HALO_TRY(check_positions(query_positions, q->shape[1], "query_positions"));
  const int64_t lse_shape[3] = {q->shape[0], q->shape[2], q->shape[1]};
  halo_tensor *o, *lse;
  HALO_TRY(halo__new_like(&o, q));
  halo_status status = halo_tensor_new(&lse, halo__acc_dtype(q->dtype), (int32_t)halo__device(q), 3,
                                       lse_shape);
  if (status == HALO_OK && halo_tensor_count(q) > 0) {
    status = run_cached(o, lse, q, k, v, length, key_positions, query_positions, scale);
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
