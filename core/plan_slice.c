/* plan_slice.c: what one rank executes of a plan.
 *
 * The plan is global; a rank needs, for each ring step, the tiles between its query blocks and the
 * key blocks of one source rank, by query block for the forward pass and by key block for dK, dV.
 * All W slices of a query rank are cut in one walk over its rows, because a row's active key blocks
 * come in ascending order and each belongs to exactly one source:
 *
 *   striped, W = 2, row 5, active keys 0 1 2 3 5       source 0: blocks 0 2       -> local run 0..1
 *                                                      source 1: blocks 1 3 | 5   -> 0..1 full, 2
 * part
 *
 * Local order follows global order, so neighbours in a shard become runs, whatever the layout; the
 * kernel may treat a run as one long tile. A run never mixes full and partial tiles.
 *
 * Transposes, for kernels that own keys, are made when asked for, and from the slice, not from the
 * plan: they cannot disagree.
 */
#include "plan.h"

#include <string.h>

/* ---- Rows of runs -----------------------------------------------------------------------------
 */

/* Rows that grow at the end. */
typedef struct builder {
  halo__rows rows;
  int64_t n_runs, capacity, row_start; /* runs of the open row start here */
  int64_t items;
} builder;

static void rows_free(halo__rows *rows) {
  halo__free(rows->offset);
  halo__free(rows->run);
  *rows = (halo__rows){0};
}

static halo_status builder_open(builder *b, int64_t n_rows) {
  b->rows.n_rows = n_rows;
  return halo__plan_alloc(&b->rows.offset, n_rows + 1, sizeof *b->rows.offset);
}

/* Set the room for runs to exactly `capacity`. */
static halo_status builder_resize(builder *b, int64_t capacity) {
  halo__span *run;
  HALO_TRY(halo__plan_alloc(&run, capacity, sizeof *run));
  if (b->n_runs)
    memcpy(run, b->rows.run, (size_t)b->n_runs * sizeof *run);
  halo__free(b->rows.run);
  b->rows.run = run;
  b->capacity = capacity;
  return HALO_OK;
}

/* Add consecutive items to the open row, in ascending order; they join the last run where they fit. */
static halo_status builder_add(builder *b, int64_t first, int64_t count, bool partial) {
  b->items += count;
  if (b->n_runs > b->row_start) {
    halo__span *tail = &b->rows.run[b->n_runs - 1];
    assert(first >= tail->first + tail->count);
    if (first == tail->first + tail->count && partial == tail->partial) {
      tail->count += (int32_t)count;
      return HALO_OK;
    }
  }
  if (b->n_runs == b->capacity) HALO_TRY(builder_resize(b, b->capacity ? 2 * b->capacity : 64));
  b->rows.run[b->n_runs++] =
      (halo__span){.first = (int32_t)first, .count = (int32_t)count, .partial = partial};
  return HALO_OK;
}

static void builder_end_row(builder *b, int64_t row) {
  b->rows.offset[row + 1] = b->row_start = b->n_runs;
}

/* Give the rows away, without spare room. */
static halo_status builder_close(builder *b, halo__rows *out) {
  if (b->capacity != b->n_runs)
    HALO_TRY(builder_resize(b, b->n_runs));
  *out = b->rows;
  b->rows = (halo__rows){0};
  return HALO_OK;
}

/* Transpose rows in groups of `in_rows`: item i of group g's row a becomes item a of row base[g]+i.
 */
static halo_status transpose(halo__rows *out, const halo__rows *in, int64_t in_rows,
                             const int64_t *base, int64_t n_groups) {
  halo_status status = HALO_OK;
  halo__rows t = {.n_rows = base[n_groups]};
  halo__span *tail = NULL; /* the last run of each row so far */
  int64_t *at = NULL;
  HALO_TRY_GOTO(halo__plan_alloc(&t.offset, t.n_rows + 1, sizeof *t.offset));
  HALO_TRY_GOTO(halo__plan_alloc(&tail, t.n_rows, sizeof *tail));
  HALO_TRY_GOTO(halo__plan_alloc(&at, t.n_rows, sizeof *at));
  for (int32_t pass = 0; pass < 2; pass++) {
    for (int64_t row = 0; row < in->n_rows; row++) {
      const int64_t g = row / in_rows;
      const int32_t a = (int32_t)(row % in_rows);
      for (int64_t i = in->offset[row]; i < in->offset[row + 1]; i++) {
        const halo__span run = in->run[i];
        for (int64_t item = run.first; item < run.first + run.count; item++) {
          const int64_t o = base[g] + item;
          halo__span *last = &tail[o];
          if (last->count && last->first + last->count == a && last->partial == run.partial) {
            last->count++;
          } else {
            *last = (halo__span){.first = a, .count = 1, .partial = run.partial};
            if (pass == 0)
              t.offset[o + 1]++;
            at[o]++;
          }
          if (pass == 1)
            t.run[t.offset[o] + at[o] - 1] = *last;
        }
      }
    }
    if (pass == 1)
      break;
    for (int64_t o = 0; o < t.n_rows; o++)
      t.offset[o + 1] += t.offset[o];
    HALO_TRY_GOTO(halo__plan_alloc(&t.run, t.offset[t.n_rows], sizeof *t.run));
    memset(tail, 0, (size_t)t.n_rows * sizeof *tail);
    memset(at, 0, (size_t)t.n_rows * sizeof *at);
  }
  *out = t;
  t = (halo__rows){0};
done:
  halo__free(tail);
  halo__free(at);
  rows_free(&t);
  return status;
}

/* ---- Tiles ------------------------------------------------------------------------------------
 */

/* Row `row` of every source's builder: the active tiles of one query block. */
static halo_status cut_row(builder *to, const halo_plan *p, const halo__pattern *pattern,
                           int64_t query) {
  const halo_layout *l = &p->layout;
  const halo__row *row = &p->rows[pattern->row];
  if (query >= l->n_blocks || row->lo[query] == INT32_MAX)
    return HALO_OK;
  for (halo__walk w = halo__walk_begin(pattern->shown, query, row->lo[query] / l->block);
       w.key >= 0; halo__walk_next(&w)) {
    const halo__kind kind = halo__tile_kind(p, row, query, w.key);
    assert(kind != HALO__NONE);
    int32_t source;
    int64_t local;
    halo__layout_block_locate(l, w.key, &source, &local);
    HALO_TRY(builder_add(&to[source], local, 1, kind == HALO__PARTIAL));
  }
  return HALO_OK;
}

static halo_status cut_slices(halo__slice *out, const halo_plan *p, int32_t query_rank) {
  halo_status status = HALO_OK;
  const halo_layout *l = &p->layout;
  const int64_t n_rows = p->n_patterns * l->per_rank;
  builder *to = NULL;
  HALO_TRY_GOTO(halo__plan_alloc(&to, l->world, sizeof *to));
  for (int32_t s = 0; s < l->world; s++)
    HALO_TRY_GOTO(builder_open(&to[s], n_rows));
  for (int64_t row = 0; row < n_rows; row++) {
    const int64_t query = halo__layout_block_global(l, query_rank, row % l->per_rank);
    HALO_TRY_GOTO(cut_row(to, p, &p->patterns[row / l->per_rank], query));
    for (int32_t s = 0; s < l->world; s++)
      builder_end_row(&to[s], row);
  }
  for (int32_t s = 0; s < l->world; s++) {
    out[s].n_tiles = to[s].items;
    HALO_TRY_GOTO(builder_close(&to[s], &out[s].by_query));
  }
done:
  for (int32_t s = 0; to && s < l->world; s++) {
    rows_free(&to[s].rows);
    if (status == HALO_OK)
      continue;
    rows_free(&out[s].by_query);
  }
  halo__free(to);
  return status;
}

static halo_status check_rank(const halo_plan *p, int32_t rank, const char *what) {
  HALO_TRY(halo__plan_need(p, what));
  HALO_CHECK(rank >= 0 && rank < p->layout.world, HALO_EARG, "%s: rank is %d, wanted 0 to %d", what,
             rank, p->layout.world - 1);
  return HALO_OK;
}

halo_status halo__plan_slice(const halo__slice **out, halo_plan *p, int32_t query_rank,
                             int32_t source_rank) {
  HALO_TRY(check_rank(p, query_rank, "plan_slice"));
  HALO_TRY(check_rank(p, source_rank, "plan_slice"));
  const int64_t world = p->layout.world;
  if (!p->sliced)
    HALO_TRY(halo__plan_alloc(&p->sliced, world, sizeof *p->sliced));
  if (!p->slices)
    HALO_TRY(halo__plan_alloc(&p->slices, world * world, sizeof *p->slices));
  halo__slice *mine = p->slices + query_rank * world;
  if (!p->sliced[query_rank]) {
    HALO_TRY(cut_slices(mine, p, query_rank));
    p->sliced[query_rank] = true;
  }
  *out = &mine[source_rank];
  return HALO_OK;
}

halo_status halo__plan_slice_by_key(const halo__rows **out, halo_plan *p, int32_t query_rank,
                                    int32_t source_rank) {
  const halo__slice *slice;
  HALO_TRY(halo__plan_slice(&slice, p, query_rank, source_rank));
  const int64_t world = p->layout.world, per_rank = p->layout.per_rank;
  if (!p->by_key) HALO_TRY(halo__plan_alloc(&p->by_key, world * world, sizeof *p->by_key));
  halo__rows *rows = &p->by_key[query_rank * world + source_rank];
  if (!rows->offset) {
    int64_t *base;
    HALO_TRY(halo__plan_alloc(&base, p->n_patterns + 1, sizeof *base));
    for (int64_t i = 0; i <= p->n_patterns; i++) base[i] = i * per_rank;
    halo_status status = transpose(rows, &slice->by_query, per_rank, base, p->n_patterns);
    halo__free(base);
    if (status != HALO_OK) return status;
  }
  *out = rows;
  return HALO_OK;
}

/* ---- Columns ----------------------------------------------------------------------------------
 */

static void columns_free(halo__columns *c) {
  if (!c)
    return;
  halo__free(c->offset);
  halo__free(c->token);
  halo__free(c);
}

halo_status halo__plan_columns(const halo__columns **out, halo_plan *p) {
  HALO_TRY(halo__plan_need(p, "plan_columns"));
  halo_status status = HALO_OK;
  halo__columns *c = p->columns;
  if (!c) {
    HALO_TRY(halo__plan_alloc(&c, 1, sizeof *c));
    HALO_TRY_GOTO(halo__plan_alloc(&c->offset, p->n_patterns + 1, sizeof *c->offset));
    for (int64_t i = 0; i < p->n_patterns; i++) {
      c->offset[i + 1] = c->offset[i] + p->patterns[i].shown->n_columns;
    }
    HALO_TRY_GOTO(halo__plan_alloc(&c->token, c->offset[p->n_patterns], sizeof *c->token));
    for (int64_t i = 0; i < p->n_patterns; i++) {
      const halo__set *s = p->patterns[i].shown;
      if (s->n_columns) {
        memcpy(c->token + c->offset[i], s->column, (size_t)s->n_columns * sizeof *s->column);
      }
    }
    p->columns = c;
  }
  *out = c;
done:
  if (status != HALO_OK)
    columns_free(c);
  return status;
}

/* Columns that some query of the block sees and that no active tile of the row covers. */
static halo_status cut_column_row(builder *to, const halo_plan *p, const halo__pattern *pattern,
                                  int64_t query) {
  const int64_t g = p->layout.block;
  const halo__row *row = &p->rows[pattern->row];
  const halo__set *s = pattern->shown;
  if (query >= p->layout.n_blocks || row->lo[query] == INT32_MAX)
    return HALO_OK;
  const int64_t end = halo__lower_bound(s->column, 0, s->n_columns, (query + 1) * g);
  int64_t i = halo__lower_bound(s->column, 0, end, row->lo[query]);
  while (i < end) {
    const int64_t key = s->column[i] / g, next = halo__lower_bound(s->column, i, end, (key + 1) * g);
    if (halo__set_has(s, query, key)) {
      i = next;
    } else if (halo__column_kind(p, row, query, s->column[i]) == HALO__FULL &&
               s->column[next - 1] <= query * g) { /* then all between are full, too */
      HALO_TRY(builder_add(to, i, next - i, false));
      i = next;
    } else {
      const halo__kind kind = halo__column_kind(p, row, query, s->column[i]);
      if (kind != HALO__NONE) HALO_TRY(builder_add(to, i, 1, kind == HALO__PARTIAL));
      i++;
    }
  }
  return HALO_OK;
}

static void column_slice_free(halo__column_slice *c) {
  if (!c)
    return;
  rows_free(&c->by_query);
  halo__free(c);
}

static halo_status cut_columns(halo__column_slice **out, halo_plan *p, int32_t query_rank) {
  halo_status status = HALO_OK;
  const halo_layout *l = &p->layout;
  const int64_t n_rows = p->n_patterns * l->per_rank;
  builder b = {0};
  halo__column_slice *c = NULL;
  HALO_TRY_GOTO(halo__plan_alloc(&c, 1, sizeof *c));
  HALO_TRY_GOTO(builder_open(&b, n_rows));
  for (int64_t row = 0; row < n_rows; row++) {
    const int64_t query = halo__layout_block_global(l, query_rank, row % l->per_rank);
    HALO_TRY_GOTO(cut_column_row(&b, p, &p->patterns[row / l->per_rank], query));
    builder_end_row(&b, row);
  }
  c->n_pairs = b.items;
  HALO_TRY_GOTO(builder_close(&b, &c->by_query));
  *out = c;
done:
  rows_free(&b.rows);
  if (status != HALO_OK)
    column_slice_free(c);
  return status;
}

halo_status halo__plan_column_slice(const halo__column_slice **out, halo_plan *p,
                                    int32_t query_rank) {
  HALO_TRY(check_rank(p, query_rank, "plan_column_slice"));
  if (!p->column_slices) {
    HALO_TRY(halo__plan_alloc(&p->column_slices, p->layout.world, sizeof *p->column_slices));
  }
  if (!p->column_slices[query_rank]) {
    HALO_TRY(cut_columns(&p->column_slices[query_rank], p, query_rank));
  }
  *out = p->column_slices[query_rank];
  return HALO_OK;
}

halo_status halo__plan_columns_by_column(const halo__rows **out, halo_plan *p,
                                         int32_t query_rank) {
  const halo__column_slice *slice;
  const halo__columns *columns;
  HALO_TRY(halo__plan_column_slice(&slice, p, query_rank));
  HALO_TRY(halo__plan_columns(&columns, p));
  if (!p->by_column) {
    HALO_TRY(halo__plan_alloc(&p->by_column, p->layout.world, sizeof *p->by_column));
  }
  halo__rows *rows = &p->by_column[query_rank];
  if (!rows->offset) {
    HALO_TRY(transpose(rows, &slice->by_query, p->layout.per_rank, columns->offset, p->n_patterns));
  }
  *out = rows;
  return HALO_OK;
}

/* ---- What to gather ---------------------------------------------------------------------------
 */

static void gather_free(halo__gather *g) {
  if (!g)
    return;
  halo__free(g->offset);
  halo__free(g->token);
  halo__free(g->owner);
  halo__free(g->local);
  halo__free(g->owned_offset);
  halo__free(g->owned);
  halo__free(g->slot_offset);
  halo__free(g->slot);
  halo__free(g->own_row);
  halo__free(g->send_row);
  halo__free(g->place_row);
  halo__free(g->return_row);
  halo__free(g);
}

/* Union of the columns of the query heads that share a key/value head; fills offset and token, the
 * latter with room for all lists. */
static void gather_unions(halo__gather *g, const halo_plan *p, const halo__columns *columns) {
  const int64_t share = p->n_heads / g->kv_heads;
  for (int64_t group = 0; group < g->n_groups; group++) {
    int32_t *list = g->token + g->offset[group];
    int64_t n = 0;
    for (int64_t k = 0; k < share; k++) {
      const int32_t pattern = p->pattern_of[group * share + k];
      const int64_t length = columns->offset[pattern + 1] - columns->offset[pattern];
      bool seen = false; /* heads of one pattern bring the same list */
      for (int64_t e = 0; e < k && !seen; e++)
        seen = p->pattern_of[group * share + e] == pattern;
      if (seen || !length)
        continue;
      memcpy(list + n, columns->token + columns->offset[pattern], (size_t)length * sizeof *list);
      n += length;
    }
    g->offset[group + 1] = g->offset[group] + halo__sort_unique(list, n);
  }
  g->n_entries = g->offset[g->n_groups];
}

/* Where each entry lives, and every rank's own entries in order. */
static void gather_owners(halo__gather *g, const halo_layout *l) {
  for (int64_t i = 0; i < g->n_entries; i++) {
    int64_t block;
    halo__layout_block_locate(l, g->token[i] / l->block, &g->owner[i], &block);
    g->local[i] = (int32_t)(block * l->block + g->token[i] % l->block);
    g->owned_offset[g->owner[i] + 1]++;
  }
  for (int32_t r = 0; r < l->world; r++)
    g->owned_offset[r + 1] += g->owned_offset[r];
  for (int64_t i = 0; i < g->n_entries; i++)
    g->owned[g->owned_offset[g->owner[i]]++] = (int32_t)i;
  for (int32_t r = l->world; r > 0; r--)
    g->owned_offset[r] = g->owned_offset[r - 1];
  g->owned_offset[0] = 0;
}

/* The ways of rows, see halo__gather. */
static halo_status gather_ways(halo__gather *g, const halo_layout *l) {
  const int64_t n = g->n_entries, tokens = halo_layout_local_tokens(l), rows = g->n_groups * tokens;
  HALO_TRY(halo__plan_alloc(&g->own_row, n, sizeof *g->own_row));
  HALO_TRY(halo__plan_alloc(&g->send_row, 2 * n, sizeof *g->send_row));
  HALO_TRY(halo__plan_alloc(&g->place_row, 2 * n, sizeof *g->place_row));
  HALO_TRY(halo__plan_alloc(&g->return_row, 2 * n, sizeof *g->return_row));
  for (int32_t r = 0; r < l->world; r++) {
    int64_t group = 0; // entries of groups are neighbours, and a rank's own ascend
    for (int64_t e = g->owned_offset[r]; e < g->owned_offset[r + 1]; e++) {
      const int32_t entry = g->owned[e];
      while (g->offset[group + 1] <= entry) group++;
      g->own_row[e] = group * tokens + g->local[entry];
      g->send_row[2 * e] = g->own_row[e];
      g->send_row[2 * e + 1] = rows + g->own_row[e];
      g->place_row[entry] = 2 * e;
      g->place_row[n + entry] = 2 * e + 1;
      g->return_row[2 * e] = entry;
      g->return_row[2 * e + 1] = n + entry;
    }
  }
  return HALO_OK;
}

static halo_status make_gather(halo__gather **out, halo_plan *p, int64_t kv_heads) {
  halo_status status = HALO_OK;
  const int64_t units = p->n_batch * p->n_heads, share = p->n_heads / kv_heads;
  const halo__columns *columns;
  halo__gather *g = NULL;
  HALO_TRY(halo__plan_columns(&columns, p));
  HALO_TRY_GOTO(halo__plan_alloc(&g, 1, sizeof *g));
  g->kv_heads = kv_heads;
  g->n_groups = p->n_batch * kv_heads;
  HALO_TRY_GOTO(halo__plan_alloc(&g->offset, g->n_groups + 1, sizeof *g->offset));
  HALO_TRY_GOTO(halo__plan_alloc(&g->slot_offset, units + 1, sizeof *g->slot_offset));
  for (int64_t u = 0; u < units; u++) {
    const int32_t pattern = p->pattern_of[u];
    g->slot_offset[u + 1] =
        g->slot_offset[u] + columns->offset[pattern + 1] - columns->offset[pattern];
  }
  const int64_t room = g->slot_offset[units];
  HALO_CHECK_GOTO(room < INT32_MAX, HALO_ENOMEM, "plan_gather: %lld columns are too many",
                  (long long)room);
  HALO_TRY_GOTO(halo__plan_alloc(&g->token, room, sizeof *g->token));
  HALO_TRY_GOTO(halo__plan_alloc(&g->slot, room, sizeof *g->slot));
  gather_unions(g, p, columns);
  HALO_TRY_GOTO(halo__plan_alloc(&g->owner, g->n_entries, sizeof *g->owner));
  HALO_TRY_GOTO(halo__plan_alloc(&g->local, g->n_entries, sizeof *g->local));
  HALO_TRY_GOTO(halo__plan_alloc(&g->owned, g->n_entries, sizeof *g->owned));
  HALO_TRY_GOTO(halo__plan_alloc(&g->owned_offset, p->layout.world + 1, sizeof *g->owned_offset));
  gather_owners(g, &p->layout);
  HALO_TRY_GOTO(gather_ways(g, &p->layout));
  for (int64_t u = 0; u < units; u++) {
    const int32_t *list = columns->token + columns->offset[p->pattern_of[u]];
    int64_t at = g->offset[u / share];
    for (int64_t i = g->slot_offset[u]; i < g->slot_offset[u + 1]; i++) {
      while (g->token[at] < list[i - g->slot_offset[u]])
        at++;
      g->slot[i] = (int32_t)at;
    }
  }
  *out = g;
done:
  if (status != HALO_OK)
    gather_free(g);
  return status;
}

halo_status halo__plan_gather(const halo__gather **out, halo_plan *p, int64_t kv_heads) {
  HALO_TRY(halo__plan_need(p, "plan_gather"));
  HALO_CHECK(kv_heads >= 1 && p->n_heads % kv_heads == 0, HALO_EARG,
             "plan_gather: %lld key/value heads do not divide the plan's %lld heads",
             (long long)kv_heads, (long long)p->n_heads);
  halo__gather *g = p->gathers;
  while (g && g->kv_heads != kv_heads)
    g = g->next;
  if (!g) {
    HALO_TRY(make_gather(&g, p, kv_heads));
    g->next = p->gathers;
    p->gathers = g;
  }
  *out = g;
  return HALO_OK;
}

/* ---- The token test ---------------------------------------------------------------------------
 */

static void tokens_free(halo__tokens *t) {
  if (!t)
    return;
  halo__free(t->position);
  halo__free(t->first);
  halo__free(t);
}

static halo_status make_tokens(halo__tokens **out, const halo_plan *p, int32_t rank) {
  halo_status status = HALO_OK;
  const halo_layout *l = &p->layout;
  const int64_t t_local = halo_layout_local_tokens(l);
  bool documents = false;
  for (int64_t i = 0; i < p->n_rows; i++)
    documents = documents || p->rows[i].first;
  const int64_t rows = documents ? p->n_batch : 1;
  halo__tokens *t = NULL;
  HALO_TRY_GOTO(halo__plan_alloc(&t, 1, sizeof *t));
  HALO_TRY_GOTO(halo__plan_alloc(&t->position, t_local, sizeof *t->position));
  HALO_TRY_GOTO(halo__plan_alloc(&t->first, rows * t_local, sizeof *t->first));
  for (int64_t i = 0; i < t_local; i++) {
    const int64_t token = halo_layout_global(l, rank, i);
    t->position[i] = (int32_t)token;
    for (int64_t b = 0; b < rows; b++) {
      const halo__row *row = &p->rows[p->patterns[p->pattern_of[b * p->n_heads]].row];
      t->first[b * t_local + i] = token < l->n_tokens ? halo__first(row, token) : INT32_MAX;
    }
  }
  t->first_stride = documents ? t_local : 0;
  *out = t;
done:
  if (status != HALO_OK)
    tokens_free(t);
  return status;
}

halo_status halo__plan_tokens(const halo__tokens **out, halo_plan *p, int32_t rank) {
  HALO_TRY(check_rank(p, rank, "plan_tokens"));
  if (!p->tokens)
    HALO_TRY(halo__plan_alloc(&p->tokens, p->layout.world, sizeof *p->tokens));
  if (!p->tokens[rank])
    HALO_TRY(make_tokens(&p->tokens[rank], p, rank));
  *out = p->tokens[rank];
  return HALO_OK;
}

/* ---- The end ----------------------------------------------------------------------------------
 */

void halo__plan_drop_slices(halo_plan *p) {
  halo__plan_drop_mirrors(p);
  const int64_t world = p->layout.world;
  for (int64_t i = 0; i < world * world; i++) {
    if (p->slices) rows_free(&p->slices[i].by_query);
    if (p->by_key) rows_free(&p->by_key[i]);
  }
  for (int64_t r = 0; r < world; r++) {
    if (p->column_slices) column_slice_free(p->column_slices[r]);
    if (p->by_column) rows_free(&p->by_column[r]);
  }
  for (int64_t r = 0; p->tokens && r < world; r++)
    tokens_free(p->tokens[r]);
  while (p->gathers) {
    halo__gather *next = p->gathers->next;
    gather_free(p->gathers);
    p->gathers = next;
  }
  columns_free(p->columns);
  halo__free(p->slices);
  halo__free(p->sliced);
  halo__free(p->by_key);
  halo__free(p->by_column);
  halo__free(p->column_slices);
  halo__free(p->tokens);
  halo__free(p->tile_counts);
}
