/* schedule.c: ring schedules as tables, and the checker that proves them.
 *
 * A schedule says for one rank, row by row, which keys to compute with and which slots to exchange
 * with whom. ring.c runs the rows; it knows no ring. So a new schedule is a generator here, and
 * what can go wrong in one (a hop skipped, a slot overwritten while it is sent, a gradient that
 * ends at the wrong rank) is found here on the host, for any number of ranks, before anything
 * moves.
 *
 * Ranks are numbered node * L + local: M nodes (the outer ring) of L ranks (the inner ring), W =
 * M*L. The flat ring is M = 1. The source of step o*L + i is
 *     ((node - o) mod M) * L + (local - i) mod L                        (mtraining.md 3.1)
 *
 * Keys, forward and backward alike. An outer hop is posted before the whole inner pass that hides
 * it, an inner hop before the step that hides it; both pass on what they received:
 *
 *     M = 2, L = 3, rank 0 (node 0, local 0)     > posted   | waited for
 *     outer KV   >-----------------------------|
 *     inner KV   >-------|   >-------|             >-------|   >-------|
 *     compute     source 0    source 2   source 1   source 3    source 5   source 4
 *     slot        0           2          3          1           2          3
 *
 * Gradients travel backward only, in fp32, the same way as the keys they belong to, one step
 * behind: step t's own part is computed into a slot of its own while the sum of the ranks before
 * comes in, then added and sent on. After L hops an inner pass's sum is back at the rank where the
 * keys came in, where it joins the outer sum, which after M hops is home. Parts are therefore added
 * in the order in which the keys visit ranks, which does not depend on timing.
 *
 *     dKV slots  0, 1, 2 take turns: computed into, sent, received; 3, 4 the outer sum
 *     inner dKV       >---------|  >--------|  >------ ...        wait, add, post after each step
 *     compute     t=0         t=1         t=2
 *
 * The last inner hop of a pass is awaited after the first step of the next pass, so only the very
 * last inner and outer hops are exposed.
 *
 * Gather posts W - 1 direct exchanges and computes in the order of the flat ring: rank r sends its
 * keys to r + d and gets those of r - d. Parts of gradients go straight to the owner, which adds
 * them in the same order, so gather equals flat to the last bit: each is the other's test.
 *
 * Columns (core/plan.h) are fetched before the first step and computed after it, where the fetch
 * and the first hops are hidden.
 *
 * Invariants, which halo__schedule_check proves by running all tables side by side:
 *   all ranks issue the same kinds of rows on the same channels in the same order, so no pair of
 *   ranks can wait for each other; what a rank sends, its peer receives in the same row
 *   a slot being sent is not written, a slot being received is neither read nor written
 *   every rank computes with every source once, and the slot holds that source's keys
 *   gradients added belong to one source and count no rank twice; at the end each rank holds the
 *   gradient of its own keys with all W parts; nothing is left in flight
 */
#include "schedule.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* ---- generators ----------------------------------------------------------------------------- */

static halo__schedule_row *append(halo__schedule *s, halo__row_kind kind) {
  halo__schedule_row *row = &s->rows[s->n_rows++];
  *row = (halo__schedule_row){.kind = (int16_t)kind, .step = -1, .source = -1, .to = -1, .from = -1,
                     .slot = -1, .slot_in = -1, .event = -1};
  return row;
}

static int32_t append_post(halo__schedule *s, halo__channel channel, int32_t to, int32_t from,
                           int32_t slot, int32_t slot_in) {
  halo__schedule_row *row = append(s, HALO__ROW_POST);
  row->channel = (int16_t)channel;
  row->to = to;
  row->from = from;
  row->slot = slot;
  row->slot_in = slot_in;
  return row->event = s->n_events++;
}

static void append_wait(halo__schedule *s, halo__channel channel, int32_t event) {
  halo__schedule_row *row = append(s, HALO__ROW_WAIT);
  row->channel = (int16_t)channel;
  row->event = event;
}

/* The step's rows; columns come after the first. dkv is -1 forward. */
static void append_compute(halo__schedule *s, int32_t step, int32_t source, int32_t kv,
                           int32_t dkv) {
  halo__schedule_row *row = append(s, HALO__ROW_COMPUTE);
  row->step = step;
  row->source = source;
  row->slot = kv;
  row->slot_in = dkv;
  if (step == 0) append(s, HALO__ROW_COLUMNS);
}

static void append_move(halo__schedule *s, halo__row_kind kind, int32_t to, int32_t from) {
  halo__schedule_row *row = append(s, kind);
  row->slot = from;
  row->slot_in = to;
}

/* Gradient slots of the rings while the table is being written. */
typedef struct gradient_state {
  int32_t compute;        /* where the next step writes */
  int32_t sent, received; /* in flight on the inner ring when inner_event >= 0 */
  int32_t inner_event, outer_event;
} gradient_state;

typedef struct ring_place {
  int32_t M, L, node, local;
  int32_t inner_next, inner_previous, outer_next, outer_previous;
} ring_place;

static ring_place place_of(int32_t world, int32_t inner, int32_t rank) {
  ring_place p = {.M = world / inner, .L = inner, .node = rank / inner, .local = rank % inner};
  p.inner_next = p.node * p.L + (p.local + 1) % p.L;
  p.inner_previous = p.node * p.L + (p.local + p.L - 1) % p.L;
  p.outer_next = (p.node + 1) % p.M * p.L + p.local;
  p.outer_previous = (p.node + p.M - 1) % p.M * p.L + p.local;
  return p;
}

/* The inner pass o is complete in `slot`: join the outer sum and send it on. */
static void close_pass(halo__schedule *s, const ring_place *p, gradient_state *g, int32_t o,
                       int32_t slot) {
  if (p->M == 1) {
    s->home = slot;
    return;
  }
  int32_t sum = 3 + o % 2, other = 3 + (o + 1) % 2;
  if (o > 0) append_wait(s, HALO__CHANNEL_OUTER_DKV, g->outer_event);
  append_move(s, o == 0 ? HALO__ROW_COPY : HALO__ROW_ADD, sum, slot);
  g->outer_event = append_post(s, HALO__CHANNEL_OUTER_DKV, p->outer_next, p->outer_previous, sum,
                               other);
  s->home = other;
}

/* After the compute of step (o, i): send the gradients of that step's keys on. */
static void pass_gradients(halo__schedule *s, const ring_place *p, gradient_state *g, int32_t o,
                           int32_t i) {
  if (p->L == 1) {
    close_pass(s, p, g, o, g->compute);
    return;
  }
  int32_t free_slot;
  if (g->inner_event >= 0) append_wait(s, HALO__CHANNEL_INNER_DKV, g->inner_event);
  if (i > 0) { // the sum of the ranks before came in: add our part
    append_move(s, HALO__ROW_ADD, g->received, g->compute);
    free_slot = g->sent;
    g->sent = g->received;
  } else { // a source that nobody of this inner ring has seen before: our part is the sum
    if (o > 0) close_pass(s, p, g, o - 1, g->received);
    int32_t was_received = g->received;
    free_slot = g->sent;
    g->sent = g->compute;
    g->compute = was_received;
  }
  g->received = free_slot;
  g->inner_event = append_post(s, HALO__CHANNEL_INNER_DKV, p->inner_next, p->inner_previous,
                               g->sent, g->received);
}

static void generate_rings(halo__schedule *s, int32_t inner) {
  const ring_place p = place_of(s->world, inner, s->rank);
  gradient_state g = {.compute = 0, .sent = 1, .received = 2, .inner_event = -1, .outer_event = -1};
  append(s, HALO__ROW_FETCH_COLUMNS);
  for (int32_t o = 0; o < p.M; o++) {
    int32_t slot = o % 2,
            outer_event = -1; // KV slots 0, 1: the outer ring's; 2, 3: the inner ring's
    if (o < p.M - 1) {
      outer_event = append_post(s, HALO__CHANNEL_OUTER_KV, p.outer_next, p.outer_previous, slot,
                                1 - slot);
    }
    for (int32_t i = 0; i < p.L; i++) {
      int32_t source = (p.node - o + p.M) % p.M * p.L + (p.local - i + p.L) % p.L;
      int32_t next_slot = p.M == 1 ? 1 - slot : 2 + i % 2, inner_event = -1;
      if (i < p.L - 1) {
        inner_event = append_post(s, HALO__CHANNEL_INNER_KV, p.inner_next, p.inner_previous, slot,
                                  next_slot);
      }
      append_compute(s, o * p.L + i, source, slot, s->is_backward ? g.compute : -1);
      if (s->is_backward) pass_gradients(s, &p, &g, o, i);
      if (i < p.L - 1) {
        append_wait(s, HALO__CHANNEL_INNER_KV, inner_event);
        slot = next_slot;
      }
    }
    if (o < p.M - 1) append_wait(s, HALO__CHANNEL_OUTER_KV, outer_event);
  }
  if (s->is_backward) {
    if (g.inner_event >= 0) {
      append_wait(s, HALO__CHANNEL_INNER_DKV, g.inner_event);
      close_pass(s, &p, &g, p.M - 1, g.received);
    }
    if (p.M > 1) append_wait(s, HALO__CHANNEL_OUTER_DKV, g.outer_event);
    append(s, HALO__ROW_RETURN_COLUMNS);
  }
  s->n_kv_slots = s->world == 1 ? 1 : p.M == 1 ? 2 : p.L > 2 ? 4 : p.L == 2 ? 3 : 2;
  s->n_dkv_slots = !s->is_backward ? 0 : p.M > 1 ? 5 : p.L > 1 ? 3 : 1;
}

static void generate_gather(halo__schedule *s) {
  int32_t W = s->world, r = s->rank;
  append(s, HALO__ROW_FETCH_COLUMNS);
  for (int32_t d = 1; d < W; d++) { // event d - 1
    append_post(s, HALO__CHANNEL_INNER_KV, (r + d) % W, (r - d + W) % W, 0, d);
  }
  int32_t last_event = -1;
  for (int32_t d = 0; d < W; d++) {
    if (d > 0) append_wait(s, HALO__CHANNEL_INNER_KV, d - 1);
    int32_t part = d == 0 ? 0 : 1 + d % 2, incoming = 3 + d % 2;
    append_compute(s, d, (r - d + W) % W, d, s->is_backward ? part : -1);
    if (!s->is_backward || d == 0) continue;
    int32_t event = append_post(s, HALO__CHANNEL_INNER_DKV, (r - d + W) % W, (r + d) % W, part,
                                incoming);
    if (d > 1) {
      append_wait(s, HALO__CHANNEL_INNER_DKV, last_event);
      append_move(s, HALO__ROW_ADD, 0, 3 + (d - 1) % 2);
    }
    last_event = event;
  }
  if (s->is_backward && W > 1) {
    append_wait(s, HALO__CHANNEL_INNER_DKV, last_event);
    append_move(s, HALO__ROW_ADD, 0, 3 + (W - 1) % 2);
  }
  if (s->is_backward) append(s, HALO__ROW_RETURN_COLUMNS);
  s->home = 0;
  s->n_kv_slots = W;
  s->n_dkv_slots = !s->is_backward ? 0 : W == 1 ? 1 : 5;
}

halo_status halo__schedule_new(halo__schedule **out, int32_t schedule, int32_t world, int32_t inner,
                               int32_t rank, bool is_backward) {
  HALO_CHECK(schedule >= HALO_SCHEDULE_FLAT && schedule <= HALO_SCHEDULE_GATHER, HALO_EARG,
             "ring: schedule %d is unknown; 0 flat, 1 hierarchical, 2 gather", schedule);
  HALO_CHECK(world >= 1, HALO_EARG, "ring: world is %d; it must be 1 or more", world);
  bool is_hierarchical = schedule == HALO_SCHEDULE_HIERARCHICAL;
  HALO_CHECK(!is_hierarchical || (inner >= 1 && world % inner == 0), HALO_EARG,
             "ring: an inner ring of %d ranks does not divide %d ranks", inner, world);
  assert(rank >= 0 && rank < world);
  halo__schedule *s;
  HALO_TRY(halo__alloc_zero((void **)&s, (int64_t)sizeof *s, HALO_CPU));
  // At most 8 rows a step (two posts, two waits, compute and three for gradients), 4 more where a
  // pass closes, and a few at the ends.
  halo_status status = halo__scratch((void **)&s->rows, 12 * (int64_t)world + 8, sizeof *s->rows);
  if (status != HALO_OK) {
    halo__free(s);
    return status;
  }
  s->is_backward = is_backward;
  s->world = world;
  s->rank = rank;
  s->n_steps = world;
  if (schedule == HALO_SCHEDULE_GATHER) {
    generate_gather(s);
  } else {
    generate_rings(s, is_hierarchical ? inner : world);
  }
  assert(s->n_rows <= 12 * world + 8);
  *out = s;
  return HALO_OK;
}

void halo__schedule_free(halo__schedule *s) {
  if (s == NULL) return;
  halo__free(s->rows);
  halo__free(s);
}

/* ---- checker -------------------------------------------------------------------------------- */

enum { EMPTY = -1 };

/* One slot of one rank. */
typedef struct slot_state {
  int32_t source;  /* whose keys or gradients; EMPTY at first */
  int32_t sending; /* exchanges in flight that read it */
  bool receiving;
} slot_state;

/* All ranks side by side. A dKV slot's parts are a set of ranks, `words` 64-bit words. */
typedef struct simulation {
  halo__schedule *const *tables;
  int32_t world, n_kv, n_dkv;
  int64_t words;
  slot_state *kv, *dkv; /* [world][n_kv], [world][n_dkv] */
  uint64_t *parts;      /* [world][n_dkv][words] */
  uint8_t *computed;    /* [world][world] */
  int32_t *post_row;    /* [n_events] row of an exchange in flight, or -1 */
} simulation;

static slot_state *slot_at(simulation *m, bool is_gradient, int32_t rank, int32_t slot) {
  int32_t n = is_gradient ? m->n_dkv : m->n_kv;
  if (slot < 0 || slot >= n) return NULL;
  return (is_gradient ? m->dkv : m->kv) + (int64_t)rank * n + slot;
}

static uint64_t *parts_at(simulation *m, int32_t rank, int32_t slot) {
  return m->parts + ((int64_t)rank * m->n_dkv + slot) * m->words;
}

/* "ring: rank r, row k: ..." with HALO_ESTATE: a broken table is a bug of a generator. */
static halo_status fault(int32_t rank, int32_t row, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static halo_status fault(int32_t rank, int32_t row, const char *format, ...) {
  char text[256];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  return halo__error(HALO_ESTATE, "ring schedule: rank %d, row %d: %s", rank, row, text);
}

static halo_status check_post(simulation *m, int32_t k, int32_t rank) {
  const halo__schedule_row *row = &m->tables[rank]->rows[k];
  bool is_gradient = halo__channel_is_gradient(row->channel);
  slot_state *out = slot_at(m, is_gradient, rank, row->slot);
  slot_state *in = slot_at(m, is_gradient, rank, row->slot_in);
  if (row->to < 0 || row->to >= m->world || m->tables[row->to]->rows[k].from != rank) {
    return fault(rank, k, "sends to rank %d, which does not receive from it", row->to);
  }
  if (out == NULL || out->source == EMPTY || out->receiving) {
    return fault(rank, k, "sends slot %d, which holds nothing", row->slot);
  }
  if (in == NULL || in->receiving || in->sending > 0 || in == out) {
    return fault(rank, k, "receives into slot %d, which is in use", row->slot_in);
  }
  out->sending++;
  in->receiving = true;
  return HALO_OK;
}

/* The exchange posted at row `post` ends: what the peer sent is now here. */
static void finish_post(simulation *m, int32_t post, int32_t rank) {
  const halo__schedule_row *row = &m->tables[rank]->rows[post];
  const halo__schedule_row *peer = &m->tables[row->from]->rows[post];
  bool is_gradient = halo__channel_is_gradient(row->channel);
  slot_state *in = slot_at(m, is_gradient, rank, row->slot_in);
  in->receiving = false;
  in->source = slot_at(m, is_gradient, row->from, peer->slot)->source;
  if (is_gradient) {
    memcpy(parts_at(m, rank, row->slot_in), parts_at(m, row->from, peer->slot),
           (size_t)m->words * sizeof(uint64_t));
  }
}

static halo_status check_compute(simulation *m, int32_t k, int32_t rank) {
  const halo__schedule_row *row = &m->tables[rank]->rows[k];
  const slot_state *kv = slot_at(m, false, rank, row->slot);
  if (kv == NULL || kv->receiving || row->source < 0 || kv->source != row->source) {
    return fault(rank, k, "computes with source %d, but slot %d holds %d", row->source, row->slot,
                 kv == NULL || kv->receiving ? EMPTY : kv->source);
  }
  if (m->computed[(int64_t)rank * m->world + row->source]++) {
    return fault(rank, k, "computes with source %d twice", row->source);
  }
  if (!m->tables[rank]->is_backward) return HALO_OK;
  slot_state *dkv = slot_at(m, true, rank, row->slot_in);
  if (dkv == NULL || dkv->receiving || dkv->sending > 0) {
    return fault(rank, k, "writes gradient slot %d, which is in use", row->slot_in);
  }
  dkv->source = row->source;
  uint64_t *parts = parts_at(m, rank, row->slot_in);
  memset(parts, 0, (size_t)m->words * sizeof *parts);
  parts[rank / 64] |= UINT64_C(1) << rank % 64;
  return HALO_OK;
}

static halo_status check_move(simulation *m, int32_t k, int32_t rank) {
  const halo__schedule_row *row = &m->tables[rank]->rows[k];
  const slot_state *from = slot_at(m, true, rank, row->slot);
  slot_state *to = slot_at(m, true, rank, row->slot_in);
  if (from == NULL || from->receiving || from->source == EMPTY) {
    return fault(rank, k, "reads gradient slot %d, which holds nothing", row->slot);
  }
  if (to == NULL || to->receiving || to->sending > 0 || to == from) {
    return fault(rank, k, "writes gradient slot %d, which is in use", row->slot_in);
  }
  const uint64_t *add = parts_at(m, rank, row->slot);
  uint64_t *parts = parts_at(m, rank, row->slot_in);
  if (row->kind == HALO__ROW_COPY) {
    to->source = from->source;
    memcpy(parts, add, (size_t)m->words * sizeof *parts);
    return HALO_OK;
  }
  if (to->source != from->source) {
    return fault(rank, k, "adds gradients of source %d to those of %d", from->source, to->source);
  }
  for (int64_t w = 0; w < m->words; w++) {
    if (parts[w] & add[w]) return fault(rank, k, "counts a part twice");
    parts[w] |= add[w];
  }
  return HALO_OK;
}

static halo_status check_row(simulation *m, int32_t k) {
  const halo__schedule_row *first = &m->tables[0]->rows[k];
  for (int32_t r = 1; r < m->world; r++) {
    const halo__schedule_row *row = &m->tables[r]->rows[k];
    if (row->kind != first->kind || row->channel != first->channel || row->event != first->event ||
        row->step != first->step) {
      return fault(r, k, "is of another kind than on rank 0");
    }
  }
  for (int32_t r = 0; r < m->world; r++) {
    switch (first->kind) {
    case HALO__ROW_POST: HALO_TRY(check_post(m, k, r)); break;
    case HALO__ROW_COMPUTE: HALO_TRY(check_compute(m, k, r)); break;
    case HALO__ROW_COPY:
    case HALO__ROW_ADD: HALO_TRY(check_move(m, k, r)); break;
    default: break;
    }
  }
  if (first->kind == HALO__ROW_POST) {
    m->post_row[first->event] = k;
  } else if (first->kind == HALO__ROW_WAIT) {
    int32_t post = m->post_row[first->event];
    if (post < 0) return fault(0, k, "waits for exchange %d, which is not in flight", first->event);
    for (int32_t r = 0; r < m->world; r++) finish_post(m, post, r);
    for (int32_t r = 0; r < m->world; r++) {
      slot_at(m, halo__channel_is_gradient(first->channel), r, m->tables[r]->rows[post].slot)
          ->sending--;
    }
    m->post_row[first->event] = -1;
  }
  return HALO_OK;
}

/* After the last row. */
static halo_status check_end(simulation *m) {
  const halo__schedule *first = m->tables[0];
  for (int32_t e = 0; e < first->n_events; e++) {
    if (m->post_row[e] >= 0) return fault(0, m->post_row[e], "is never waited for");
  }
  for (int32_t r = 0; r < m->world; r++) {
    for (int32_t source = 0; source < m->world; source++) {
      if (!m->computed[(int64_t)r * m->world + source]) {
        return fault(r, first->n_rows, "never computes with source %d", source);
      }
    }
    if (!first->is_backward) continue;
    const slot_state *home = slot_at(m, true, r, m->tables[r]->home);
    if (home == NULL || home->source != r) {
      return fault(r, first->n_rows, "ends with the gradient of source %d",
                   home == NULL ? EMPTY : home->source);
    }
    for (int32_t q = 0; q < m->world; q++) {
      if (!(parts_at(m, r, m->tables[r]->home)[q / 64] >> q % 64 & 1)) {
        return fault(r, first->n_rows, "ends without the part of rank %d", q);
      }
    }
  }
  return HALO_OK;
}

halo_status halo__schedule_check(halo__schedule *const *tables, int32_t world) {
  const halo__schedule *first = tables[0];
  simulation m = {.tables = tables, .world = world, .n_kv = first->n_kv_slots,
                  .n_dkv = first->n_dkv_slots, .words = (world + 63) / 64};
  halo_status status = HALO_OK;
  for (int32_t r = 0; r < world; r++) {
    const halo__schedule *s = tables[r];
    HALO_CHECK(s->n_rows == first->n_rows && s->n_kv_slots == m.n_kv && s->n_dkv_slots == m.n_dkv &&
                   s->n_events == first->n_events && s->is_backward == first->is_backward,
               HALO_ESTATE, "ring schedule: rank %d has another table than rank 0", r);
  }
  int64_t W = world;
  HALO_TRY_GOTO(halo__scratch((void **)&m.kv, W * m.n_kv, sizeof *m.kv));
  HALO_TRY_GOTO(halo__scratch((void **)&m.dkv, W * m.n_dkv + 1, sizeof *m.dkv));
  HALO_TRY_GOTO(halo__scratch((void **)&m.parts, W * m.n_dkv * m.words + 1, sizeof *m.parts));
  HALO_TRY_GOTO(halo__scratch((void **)&m.computed, W * W, 1));
  HALO_TRY_GOTO(halo__scratch((void **)&m.post_row, first->n_events + 1, sizeof *m.post_row));
  for (int64_t i = 0; i < W * m.n_kv; i++) m.kv[i] = (slot_state){.source = EMPTY};
  for (int64_t i = 0; i < W * m.n_dkv; i++) m.dkv[i] = (slot_state){.source = EMPTY};
  memset(m.computed, 0, (size_t)(W * W));
  for (int32_t e = 0; e < first->n_events; e++) m.post_row[e] = -1;
  for (int32_t r = 0; r < world; r++) slot_at(&m, false, r, 0)->source = r;
  for (int32_t k = 0; k < first->n_rows; k++) HALO_TRY_GOTO(check_row(&m, k));
  status = check_end(&m);
done:
  halo__free(m.kv);
  halo__free(m.dkv);
  halo__free(m.parts);
  halo__free(m.computed);
  halo__free(m.post_row);
  return status;
}

halo_status halo_ring_check(int32_t schedule, int32_t world, int32_t inner) {
  HALO_CHECK(world >= 1, HALO_EARG, "ring_check: world is %d; it must be 1 or more", world);
  halo__schedule **tables;
  HALO_TRY(halo__alloc_zero((void **)&tables, world * (int64_t)sizeof *tables, HALO_CPU));
  halo_status status = HALO_OK;
  for (int32_t backward = 0; backward < 2 && status == HALO_OK; backward++) {
    for (int32_t r = 0; r < world && status == HALO_OK; r++) {
      status = halo__schedule_new(&tables[r], schedule, world, inner, r, backward == 1);
    }
    if (status == HALO_OK) status = halo__schedule_check(tables, world);
    for (int32_t r = 0; r < world; r++) {
      halo__schedule_free(tables[r]);
      tables[r] = NULL;
    }
  }
  halo__free(tables);
  return status;
}

/* ---- text ----------------------------------------------------------------------------------- */

int64_t halo__schedule_explain(const halo__schedule *s, char *text, int64_t capacity) {
  static const char *const channels[] = {"", "inner KV", "outer KV", "inner dKV", "outer dKV", ""};
  int64_t length = 0;
#define PRINT(...)                                                                        \
  length += snprintf(length < capacity ? text + length : NULL,                            \
                     length < capacity ? (size_t)(capacity - length) : 0, __VA_ARGS__)
  PRINT("%s, rank %d of %d: %d steps, %d KV slots, %d dKV slots\n",
        s->is_backward ? "backward" : "forward", s->rank, s->world, s->n_steps, s->n_kv_slots,
        s->n_dkv_slots);
  for (int32_t k = 0; k < s->n_rows; k++) {
    const halo__schedule_row *row = &s->rows[k];
    switch (row->kind) {
    case HALO__ROW_FETCH_COLUMNS: PRINT("  fetch columns\n"); break;
    case HALO__ROW_COLUMNS: PRINT("  compute columns\n"); break;
    case HALO__ROW_RETURN_COLUMNS: PRINT("  gradients of columns arrive\n"); break;
    case HALO__ROW_POST:
      PRINT("  post %-9s #%-3d slot %d to rank %d, slot %d from rank %d\n", channels[row->channel],
            row->event, row->slot, row->to, row->slot_in, row->from);
      break;
    case HALO__ROW_WAIT: PRINT("  wait %-9s #%d\n", channels[row->channel], row->event); break;
    case HALO__ROW_COMPUTE:
      PRINT("  step %-3d source %-3d KV slot %d", row->step, row->source, row->slot);
      if (s->is_backward) PRINT(", gradients to dKV slot %d", row->slot_in);
      PRINT("\n");
      break;
    case HALO__ROW_COPY: PRINT("  dKV slot %d = slot %d\n", row->slot_in, row->slot); break;
    case HALO__ROW_ADD: PRINT("  dKV slot %d += slot %d\n", row->slot_in, row->slot); break;
    default: assert(!"row kind");
    }
  }
#undef PRINT
  return length;
}
