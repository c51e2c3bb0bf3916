/* plan.c: which keys each query sees, as one value.
 *
 * A pattern says what it wants in three forms and the engine makes one canonical set of it:
 *
 *   diagonals   block distances d: every tile (query block a, key block a - d). One bit per
 * distance and head is all that vertical-slash needs: 1 KB at 512K tokens, where an index of tiles
 * takes megabytes and a token mask 256 GB tiles       single (query block, key block) pairs, for
 * methods that choose per query block columns     single key tokens that every later query sees
 * (verticals, sinks)
 *
 * Example, N = 8, G = 2 (blocks a b c d), diagonals {0, 2}, column {1}, one document:
 *
 *            key    0 1  2 3  4 5  6 7
 *   query 0 (a)     x
 *         1         x x                     x  diagonal 0 (causal inside the tile)
 *         2 (b)       c  x                  o  diagonal 2
 *         3           c  x x                c  column 1: in blocks b and d only; in a and c its
 *         4 (c)     o o       x                tile is active and the key is counted there
 *         5         o o       x x
 *         6 (d)       c  o o       x
 *         7           c  o o       x x
 *
 * Builders only take notes (records); halo_plan_finish turns the notes into sets. Heads whose notes
 * agree share a set, and (documents, set) pairs share a pattern, so a dense plan of any size is one
 * bitmap. Two sets are kept per pattern: `chosen`, what was asked for, and `shown`, which adds the
 * force rules, clips to documents and drops what can never matter (distances no document spans,
 * columns whose tile is active wherever they are visible). shown is what halo_plan_visible, the
 * slices and the hash describe; chosen is kept for accounts: the forced share is what shown has and
 * chosen has not.
 *
 * The hash covers N, G, B, H, document boundaries and the shown sets. It does not depend on the
 * order of building, on document numbering, on layout or world, nor on whether a tile was selected
 * or forced: equal hashes mean equal visible sets, for one block edge.
 *
 * Documents are runs of equal ids; an id that ends may not come back (a run is one interval, which
 * makes the token test two comparisons). A negative id marks a token of no document: padding inside
 * a batch row.
 *
 * source   form and force rules: MInference (arXiv 2407.02490), MTraining (arXiv 2510.18830, 4.1);
 *          traps that this file answers for: double counting, causal edge tiles, empty rows,
 * packing
 */
#include "plan.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

enum { REC_ALL, REC_DIAGONALS, REC_COLUMNS, REC_TILES };

/* ---- Small things --------------------------------------------------------------------------- */

halo_status halo__plan_alloc(void *out_pointer, int64_t n, int64_t bytes) {
  int64_t total;
  HALO_CHECK(halo__mul(n > 0 ? n : 1, bytes, &total), HALO_ENOMEM,
             "plan: a table of %lld items of %lld bytes is too large", (long long)n,
             (long long)bytes);
  halo_memory_push_tag(HALO_TAG_PLAN);
  halo_status status = halo__alloc_zero((void **)out_pointer, total, HALO_CPU);
  halo_memory_pop_tag();
  return status;
}

halo_status halo__plan_need(const halo_plan *p, const char *what) {
  HALO_CHECK(p, HALO_EARG, "%s: plan is NULL", what);
  HALO_CHECK(p->finished, HALO_ESTATE, "%s: the plan is not finished; call halo_plan_finish", what);
  return HALO_OK;
}

halo_status halo__plan_check_head(const halo_plan *p, int64_t batch, int64_t head, bool all,
                                  const char *what) {
  const int64_t lowest = all ? -1 : 0;
  HALO_CHECK(batch >= lowest && batch < p->n_batch, HALO_EARG,
             "%s: batch is %lld, wanted %lld to %lld", what, (long long)batch, (long long)lowest,
             (long long)(p->n_batch - 1));
  HALO_CHECK(head >= lowest && head < p->n_heads, HALO_EARG,
             "%s: head is %lld, wanted %lld to %lld", what, (long long)head, (long long)lowest,
             (long long)(p->n_heads - 1));
  return HALO_OK;
}

int64_t halo__plan_forced_diagonals(const halo_plan *p) {
  const int64_t g = p->layout.block;
  /* The nearest pair of a tile at distance d >= 1 is d*G - G + 1 tokens apart. */
  int64_t n = p->force_diagonal ? 1 : 0;
  if (p->window > 0)
    n = (p->window + g - 2) / g + 1;
  return n < p->layout.n_blocks ? n : p->layout.n_blocks;
}

static int compare_i64(const void *a, const void *b) {
  const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

static int64_t sort_unique_i64(int64_t *list, int64_t n) {
  bool sorted = true;
  for (int64_t i = 1; i < n && sorted; i++)
    sorted = list[i - 1] <= list[i];
  if (!sorted)
    qsort(list, (size_t)n, sizeof *list, compare_i64);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i++) {
    if (kept == 0 || list[kept - 1] != list[i])
      list[kept++] = list[i];
  }
  return kept;
}

/* ---- Building ---------------------------------------------------------------------------------
 */

halo_status halo_plan_new(halo_plan **out, const halo_layout *layout, int64_t n_batch,
                          int64_t n_heads) {
  HALO_CHECK(out && layout, HALO_EARG, "plan_new: out or layout is NULL");
  int64_t units;
  HALO_CHECK(n_batch >= 1 && n_heads >= 1 && halo__mul(n_batch, n_heads, &units) &&
                 units < INT32_MAX,
             HALO_EARG, "plan_new: got %lld sequences and %lld heads, wanted at least 1 of each",
             (long long)n_batch, (long long)n_heads);
  halo_plan *p;
  HALO_TRY(halo__plan_alloc(&p, 1, sizeof *p));
  atomic_init(&p->references, 1);
  p->layout = *layout;
  p->n_batch = n_batch;
  p->n_heads = n_heads;
  *out = p;
  return HALO_OK;
}

static void drop_records(halo_plan *p) {
  for (int64_t i = 0; i < p->n_records; i++) {
    halo__free(p->record[i].a);
    halo__free(p->record[i].b);
  }
  halo__free(p->record);
  halo__free(p->documents);
  p->record = NULL;
  p->documents = NULL;
  p->n_records = p->record_capacity = 0;
}

/* What finish made: back to the state before it. */
static void drop_finished(halo_plan *p) {
  for (int64_t i = 0; i < p->n_rows; i++) {
    halo__free(p->rows[i].first);
    halo__free(p->rows[i].last);
    halo__free(p->rows[i].lo);
    halo__free(p->rows[i].hi);
  }
  halo__free(p->rows);
  for (int64_t i = 0; i < p->n_sets; i++)
    halo__set_free(p->sets[i]);
  halo__free(p->sets);
  halo__free(p->patterns);
  halo__free(p->pattern_of);
  p->rows = NULL;
  p->sets = NULL;
  p->patterns = NULL;
  p->pattern_of = NULL;
  p->n_rows = p->n_sets = p->n_patterns = 0;
}

void halo_plan_free(halo_plan *p) {
  if (!p || atomic_fetch_sub(&p->references, 1) > 1)
    return;
  halo__plan_drop_slices(p);
  drop_finished(p);
  drop_records(p);
  halo__free(p);
}

halo_status halo_plan_retain(halo_plan **out, halo_plan *p) {
  HALO_CHECK(out && p, HALO_EARG, "plan_retain: out or plan is NULL");
  atomic_fetch_add(&p->references, 1);
  *out = p;
  return HALO_OK;
}

static halo_status check_builder(const halo_plan *p, int64_t batch, int64_t head, int64_t n,
                                 const char *what) {
  HALO_CHECK(p, HALO_EARG, "%s: plan is NULL", what);
  HALO_CHECK(!p->finished, HALO_ESTATE, "%s: the plan is finished and can no longer change", what);
  HALO_CHECK(n >= 0, HALO_EARG, "%s: n is %lld, wanted 0 or more", what, (long long)n);
  return halo__plan_check_head(p, batch, head, true, what);
}

/* Append a record with room for n entries in a (and b if `pairs`); the caller fills it. */
static halo_status add_record(halo_plan *p, int32_t kind, int64_t batch, int64_t head, int64_t n,
                              bool pairs, halo__record **out) {
  halo_status status = HALO_OK;
  halo__record r = {.kind = kind, .batch = batch, .head = head, .n = n};
  if (p->n_records == p->record_capacity) {
    const int64_t capacity = p->record_capacity ? 2 * p->record_capacity : 16;
    halo__record *grown;
    HALO_TRY(halo__plan_alloc(&grown, capacity, sizeof *grown));
    if (p->n_records)
      memcpy(grown, p->record, (size_t)p->n_records * sizeof *grown);
    halo__free(p->record);
    p->record = grown;
    p->record_capacity = capacity;
  }
  if (n > 0)
    HALO_TRY_GOTO(halo__plan_alloc(&r.a, n, sizeof *r.a));
  if (pairs)
    HALO_TRY_GOTO(halo__plan_alloc(&r.b, n, sizeof *r.b));
  p->record[p->n_records] = r;
  *out = &p->record[p->n_records++];
done:
  if (status != HALO_OK) {
    halo__free(r.a);
    halo__free(r.b);
  }
  return status;
}

/* Every entry in 0..limit-1, or a message that names the first that is not. */
static halo_status check_entries(const int64_t *list, int64_t n, int64_t limit, const char *what,
                                 const char *noun) {
  HALO_CHECK(n == 0 || list, HALO_EARG, "%s: the list is NULL", what);
  for (int64_t i = 0; i < n; i++) {
    HALO_CHECK(list[i] >= 0 && list[i] < limit, HALO_EARG,
               "%s: %s %lld (entry %lld), wanted 0 to %lld", what, noun, (long long)list[i],
               (long long)i, (long long)(limit - 1));
  }
  return HALO_OK;
}

halo_status halo_plan_add_all(halo_plan *p, int64_t batch, int64_t head) {
  HALO_TRY(check_builder(p, batch, head, 0, "plan_add_all"));
  halo__record *r;
  return add_record(p, REC_ALL, batch, head, 0, false, &r);
}

/* Diagonals and columns: one checked list. */
static halo_status add_list(halo_plan *p, int32_t kind, int64_t batch, int64_t head,
                            const int64_t *list, int64_t n, int64_t limit, const char *what,
                            const char *noun) {
  HALO_TRY(check_builder(p, batch, head, n, what));
  HALO_TRY(check_entries(list, n, limit, what, noun));
  if (n == 0)
    return HALO_OK;
  halo__record *r;
  HALO_TRY(add_record(p, kind, batch, head, n, false, &r));
  for (int64_t i = 0; i < n; i++)
    r->a[i] = (int32_t)list[i];
  return HALO_OK;
}

halo_status halo_plan_add_diagonals(halo_plan *p, int64_t batch, int64_t head,
                                    const int64_t *distances, int64_t n) {
  return add_list(p, REC_DIAGONALS, batch, head, distances, n, p ? p->layout.n_blocks : 0,
                  "plan_add_diagonals", "block distance");
}

halo_status halo_plan_add_columns(halo_plan *p, int64_t batch, int64_t head, const int64_t *tokens,
                                  int64_t n) {
  return add_list(p, REC_COLUMNS, batch, head, tokens, n, p ? p->layout.n_tokens : 0,
                  "plan_add_columns", "token");
}

halo_status halo_plan_add_tiles(halo_plan *p, int64_t batch, int64_t head,
                                const int64_t *query_blocks, const int64_t *key_blocks, int64_t n) {
  static const char what[] = "plan_add_tiles";
  HALO_TRY(check_builder(p, batch, head, n, what));
  HALO_TRY(check_entries(query_blocks, n, p->layout.n_blocks, what, "query block"));
  HALO_TRY(check_entries(key_blocks, n, p->layout.n_blocks, what, "key block"));
  if (n == 0)
    return HALO_OK;
  halo__record *r;
  HALO_TRY(add_record(p, REC_TILES, batch, head, n, true, &r));
  for (int64_t i = 0; i < n; i++) {
    r->a[i] = (int32_t)query_blocks[i];
    r->b[i] = (int32_t)key_blocks[i];
  }
  return HALO_OK;
}

halo_status halo_plan_force(halo_plan *p, int64_t sink, int64_t window, int32_t diagonal) {
  HALO_TRY(check_builder(p, -1, -1, 0, "plan_force"));
  HALO_CHECK(sink >= 0 && window >= 0, HALO_EARG,
             "plan_force: sink is %lld and window is %lld tokens, wanted 0 or more",
             (long long)sink, (long long)window);
  p->sink = sink < p->layout.n_tokens ? sink : p->layout.n_tokens;
  p->window = window < p->layout.n_tokens ? window : p->layout.n_tokens;
  p->force_diagonal = diagonal != 0;
  return HALO_OK;
}

halo_status halo_plan_set_documents(halo_plan *p, const int32_t *documents) {
  HALO_TRY(check_builder(p, -1, -1, 0, "plan_set_documents"));
  int32_t *copy = NULL;
  if (documents) {
    const int64_t n = p->n_batch * p->layout.n_tokens;
    HALO_TRY(halo__plan_alloc(&copy, n, sizeof *copy));
    memcpy(copy, documents, (size_t)n * sizeof *copy);
  }
  halo__free(p->documents);
  p->documents = copy;
  return HALO_OK;
}

/* ---- Finishing: documents -----------------------------------------------------------------------
 */

/* An id that comes back would make "same document" a set of intervals: refuse it. */
static halo_status check_runs(const int32_t *id, int64_t n, int64_t batch) {
  halo_status status = HALO_OK;
  int64_t *seen = NULL;
  int64_t runs = 0;
  HALO_TRY(halo__plan_alloc(&seen, n, sizeof *seen));
  for (int64_t i = 0; i < n; i++) {
    if (id[i] >= 0 && (i == 0 || id[i] != id[i - 1]))
      seen[runs++] = id[i];
  }
  qsort(seen, (size_t)runs, sizeof *seen, compare_i64);
  for (int64_t i = 1; i < runs; i++) {
    HALO_CHECK_GOTO(seen[i - 1] != seen[i], HALO_EARG,
                    "plan_set_documents: document %lld of sequence %lld comes back after it ended; "
                    "give each run of tokens its own id",
                    (long long)seen[i], (long long)batch);
  }
done:
  halo__free(seen);
  return status;
}

/* first and last from ids (NULL: one document). */
static halo_status row_documents(halo__row *row, const int32_t *id, int64_t n, int64_t batch) {
  bool one = true;
  for (int64_t i = 0; id && i < n && one; i++)
    one = id[i] >= 0 && id[i] == id[0];
  if (one) {
    row->pairs = n * (n + 1) / 2;
    return HALO_OK;
  }
  HALO_TRY(check_runs(id, n, batch));
  HALO_TRY(halo__plan_alloc(&row->first, n, sizeof *row->first));
  HALO_TRY(halo__plan_alloc(&row->last, n, sizeof *row->last));
  for (int64_t i = 0; i < n; i++) {
    const bool starts = i == 0 || id[i] != id[i - 1];
    row->first[i] = id[i] < 0 ? INT32_MAX : starts ? (int32_t)i : row->first[i - 1];
    if (id[i] >= 0)
      row->pairs += i - row->first[i] + 1;
  }
  for (int64_t i = n - 1; i >= 0; i--) {
    const bool ends = i == n - 1 || id[i] != id[i + 1];
    row->last[i] = id[i] < 0 ? -1 : ends ? (int32_t)i : row->last[i + 1];
  }
  return HALO_OK;
}

/* lo, hi and reach of the blocks. */
static halo_status row_blocks(halo__row *row, const halo_layout *l) {
  const int64_t g = l->block, nb = l->n_blocks;
  HALO_TRY(halo__plan_alloc(&row->lo, nb, sizeof *row->lo));
  HALO_TRY(halo__plan_alloc(&row->hi, nb, sizeof *row->hi));
  for (int64_t b = 0; b < nb; b++) {
    const int64_t end = (b + 1) * g < l->n_tokens ? (b + 1) * g : l->n_tokens;
    row->lo[b] = INT32_MAX;
    row->hi[b] = end < (b + 1) * g ? INT32_MAX : 0;
    if (!row->first) {
      row->lo[b] = 0;
    } else {
      for (int64_t i = b * g; i < end; i++) {
        if (row->first[i] < row->lo[b])
          row->lo[b] = row->first[i];
        if (row->first[i] > row->hi[b])
          row->hi[b] = row->first[i];
      }
    }
    if (row->lo[b] == INT32_MAX)
      continue;
    const int64_t reach = b - row->lo[b] / g + 1;
    if (reach > row->reach)
      row->reach = reach;
  }
  return HALO_OK;
}

static bool row_equal(const halo__row *a, const halo__row *b, int64_t n) {
  if (!a->first || !b->first)
    return !a->first && !b->first;
  return memcmp(a->first, b->first, (size_t)n * sizeof *a->first) == 0;
}

static void row_free(halo__row *row) {
  halo__free(row->first);
  halo__free(row->last);
  halo__free(row->lo);
  halo__free(row->hi);
  *row = (halo__row){0};
}

/* Distinct document rows; row_of[b] says which one sequence b has. */
static halo_status make_rows(halo_plan *p, int32_t *row_of) {
  const int64_t n = p->layout.n_tokens, wanted = p->documents ? p->n_batch : 1;
  HALO_TRY(halo__plan_alloc(&p->rows, wanted, sizeof *p->rows));
  for (int64_t b = 0; b < wanted; b++) {
    halo__row *row = &p->rows[p->n_rows];
    halo_status status = row_documents(row, p->documents ? p->documents + b * n : NULL, n, b);
    int64_t same = 0;
    while (same < p->n_rows && !row_equal(&p->rows[same], row, n))
      same++;
    if (status == HALO_OK && same == p->n_rows)
      status = row_blocks(row, &p->layout);
    if (status != HALO_OK) {
      row_free(row);
      return status;
    }
    if (same == p->n_rows) {
      p->n_rows++;
    } else {
      row_free(row);
    }
    row_of[b] = (int32_t)same;
  }
  for (int64_t b = wanted; b < p->n_batch; b++)
    row_of[b] = 0;
  return HALO_OK;
}

/* ---- Finishing: sets and patterns ---------------------------------------------------------------
 */

static bool record_matches(const halo__record *r, int64_t batch, int64_t head) {
  return (r->batch < 0 || r->batch == batch) && (r->head < 0 || r->head == head);
}

/* Give `s` to the plan, or free it and return the equal one that is there. p->sets has room. */
static halo__set *set_intern(halo_plan *p, halo__set *s) {
  halo__set_hash(s);
  for (int64_t i = 0; i < p->n_sets; i++) {
    if (halo__set_equal(p->sets[i], s)) {
      halo__set_free(s);
      return p->sets[i];
    }
  }
  return p->sets[p->n_sets++] = s;
}

/* The set that the records of (batch, head) ask for. */
static halo_status make_chosen(halo__set **out, const halo_plan *p, int64_t batch, int64_t head) {
  halo_status status = HALO_OK;
  const int64_t nb = p->layout.n_blocks;
  uint64_t *diagonal = NULL;
  int32_t *column = NULL;
  int64_t *tile = NULL, n_columns = 0, n_tiles = 0, n_diagonals = 0;
  halo__set *s = NULL;
  for (int64_t i = 0; i < p->n_records; i++) {
    const halo__record *r = &p->record[i];
    if (!record_matches(r, batch, head))
      continue;
    if (r->kind == REC_COLUMNS)
      n_columns += r->n;
    if (r->kind == REC_TILES)
      n_tiles += r->n;
  }
  HALO_TRY_GOTO(halo__plan_alloc(&diagonal, halo__set_words(nb), sizeof *diagonal));
  HALO_TRY_GOTO(halo__plan_alloc(&column, n_columns, sizeof *column));
  HALO_TRY_GOTO(halo__plan_alloc(&tile, n_tiles, sizeof *tile));
  n_columns = n_tiles = 0;
  for (int64_t i = 0; i < p->n_records; i++) {
    const halo__record *r = &p->record[i];
    if (!record_matches(r, batch, head))
      continue;
    switch (r->kind) {
    case REC_ALL:
      for (int64_t d = 0; d < nb; d++)
        diagonal[d >> 6] |= UINT64_C(1) << (d & 63);
      break;
    case REC_DIAGONALS:
      for (int64_t k = 0; k < r->n; k++)
        diagonal[r->a[k] >> 6] |= UINT64_C(1) << (r->a[k] & 63);
      break;
    case REC_COLUMNS:
      memcpy(column + n_columns, r->a, (size_t)r->n * sizeof *column);
      n_columns += r->n;
      break;
    default:
      for (int64_t k = 0; k < r->n; k++) {
        if (r->b[k] <= r->a[k])
          tile[n_tiles++] = r->a[k] * nb + r->b[k];
      }
    }
  }
  for (int64_t w = 0; w < halo__set_words(nb); w++)
    n_diagonals += __builtin_popcountll(diagonal[w]);
  if (n_diagonals == nb)
    n_columns = n_tiles = 0; /* everything is in a tile already */
  HALO_TRY_GOTO(halo__set_new(&s, nb, diagonal, tile, sort_unique_i64(tile, n_tiles)));
  HALO_TRY_GOTO(halo__set_add_columns(s, column, halo__sort_unique(column, n_columns)));
done:
  halo__free(diagonal);
  halo__free(column);
  halo__free(tile);
  if (status != HALO_OK) {
    halo__set_free(s);
    return status;
  }
  *out = s;
  return HALO_OK;
}

/* A column adds something if some block that may see it has not its tile. */
static bool column_matters(const halo_plan *p, const halo__row *row, const halo__set *s,
                           int64_t token) {
  if (row->first && row->first[token] == INT32_MAX)
    return false;
  const int64_t key = token / p->layout.block;
  const int64_t end = halo__last(p, row, token) / p->layout.block + 1;
  return halo__set_count_queries(s, key, key, end) < end - key;
}

/* Sinks: the first p->sink tokens of every document of the row. Returns how many. */
static int64_t list_sinks(const halo_plan *p, const halo__row *row, int32_t *out) {
  int64_t n = 0;
  if (!row->first) {
    for (; n < p->sink; n++)
      out[n] = (int32_t)n;
    return n;
  }
  for (int64_t i = 0; i < p->layout.n_tokens && p->sink > 0; i++) {
    if (row->first[i] != INT32_MAX && i - row->first[i] < p->sink)
      out[n++] = (int32_t)i;
  }
  return n;
}

/* chosen + force rules, clipped to the documents of `row`. */
static halo_status make_shown(halo__set **out, const halo_plan *p, const halo__row *row,
                              const halo__set *chosen) {
  halo_status status = HALO_OK;
  const int64_t nb = p->layout.n_blocks, forced = halo__plan_forced_diagonals(p);
  uint64_t *diagonal = NULL;
  int32_t *column = NULL;
  int64_t *tile = NULL, n_tiles = 0, n_columns = 0;
  halo__set *s = NULL;
  HALO_TRY_GOTO(halo__plan_alloc(&diagonal, halo__set_words(nb), sizeof *diagonal));
  for (int64_t d = 0; d < row->reach; d++) {
    const bool on = d < forced || halo__set_diagonal(chosen, d);
    diagonal[d >> 6] |= (uint64_t)on << (d & 63);
  }
  HALO_TRY_GOTO(halo__plan_alloc(&tile, chosen->n_tiles, sizeof *tile));
  for (int64_t query = 0; chosen->n_tiles && query < nb; query++) {
    for (int64_t i = chosen->by_query[query]; i < chosen->by_query[query + 1]; i++) {
      const int64_t key = chosen->tile_key[i];
      if (halo__tile_kind(p, row, query, key) != HALO__NONE)
        tile[n_tiles++] = query * nb + key;
    }
  }
  HALO_TRY_GOTO(halo__set_new(&s, nb, diagonal, tile, n_tiles));
  int64_t room;
  HALO_CHECK_GOTO(halo__add(chosen->n_columns, p->sink ? p->layout.n_tokens : 0, &room),
                  HALO_ENOMEM, "plan_finish: too many columns");
  HALO_TRY_GOTO(halo__plan_alloc(&column, room, sizeof *column));
  n_columns = list_sinks(p, row, column);
  if (chosen->n_columns) {
    memcpy(column + n_columns, chosen->column, (size_t)chosen->n_columns * sizeof *column);
  }
  n_columns = halo__sort_unique(column, n_columns + chosen->n_columns);
  int64_t kept = 0;
  for (int64_t i = 0; i < n_columns; i++) {
    if (column_matters(p, row, s, column[i]))
      column[kept++] = column[i];
  }
  HALO_TRY_GOTO(halo__set_add_columns(s, column, kept));
done:
  halo__free(diagonal);
  halo__free(column);
  halo__free(tile);
  if (status != HALO_OK) {
    halo__set_free(s);
    return status;
  }
  *out = s;
  return HALO_OK;
}

/* Do the same records speak of both units? `mark` are hashes of the matching record numbers. */
static bool same_records(const halo_plan *p, const uint64_t *mark, int64_t a, int64_t b) {
  if (mark[a] != mark[b])
    return false;
  for (int64_t i = 0; i < p->n_records; i++) {
    const halo__record *r = &p->record[i];
    if (record_matches(r, a / p->n_heads, a % p->n_heads) !=
        record_matches(r, b / p->n_heads, b % p->n_heads)) {
      return false;
    }
  }
  return true;
}

/* chosen[u] for every unit u = batch * H + head, equal ones shared. */
static halo_status make_all_chosen(halo_plan *p, halo__set **chosen) {
  halo_status status = HALO_OK;
  const int64_t units = p->n_batch * p->n_heads;
  uint64_t *mark = NULL;
  HALO_TRY_GOTO(halo__plan_alloc(&mark, units, sizeof *mark));
  for (int64_t u = 0; u < units; u++) {
    for (int64_t i = 0; i < p->n_records; i++) {
      if (record_matches(&p->record[i], u / p->n_heads, u % p->n_heads)) {
        mark[u] = XXH3_64bits_withSeed(&i, sizeof i, mark[u]);
      }
    }
    int64_t same = 0;
    while (same < u && !same_records(p, mark, same, u))
      same++;
    if (same < u) {
      chosen[u] = chosen[same];
      continue;
    }
    halo__set *s;
    HALO_TRY_GOTO(make_chosen(&s, p, u / p->n_heads, u % p->n_heads));
    chosen[u] = set_intern(p, s);
  }
done:
  halo__free(mark);
  return status;
}

/* chosen[u] as sequence b mod B of `like` has it; equal sets stay shared. */
static halo_status clone_all_chosen(halo_plan *p, halo__set **chosen, const halo_plan *like) {
  for (int64_t u = 0; u < p->n_batch * p->n_heads; u++) {
    const int64_t from = u / p->n_heads % like->n_batch * p->n_heads + u % p->n_heads;
    halo__set *s;
    HALO_TRY(halo__set_clone(&s, like->patterns[like->pattern_of[from]].chosen));
    chosen[u] = set_intern(p, s);
  }
  return HALO_OK;
}

static halo_status make_patterns(halo_plan *p, const int32_t *row_of, halo__set *const *chosen) {
  const int64_t units = p->n_batch * p->n_heads;
  for (int64_t u = 0; u < units; u++) {
    const int32_t row = row_of[u / p->n_heads];
    int64_t i = 0;
    while (i < p->n_patterns && (p->patterns[i].row != row || p->patterns[i].chosen != chosen[u])) {
      i++;
    }
    if (i == p->n_patterns) {
      halo__set *s;
      HALO_TRY(make_shown(&s, p, &p->rows[row], chosen[u]));
      p->patterns[i] = (halo__pattern){.row = row, .chosen = chosen[u], .shown = set_intern(p, s)};
      halo__plan_count(p, &p->patterns[i]);
      p->n_patterns++;
    }
    p->patterns[i].heads++;
    p->pattern_of[u] = (int32_t)i;
  }
  return HALO_OK;
}

static uint64_t plan_hash(const halo_plan *p, const int32_t *row_of) {
  const int64_t head[4] = {p->layout.n_tokens, p->layout.block, p->n_batch, p->n_heads};
  uint64_t h = XXH3_64bits(head, sizeof head);
  for (int64_t b = 0; b < p->n_batch; b++) {
    const halo__row *row = &p->rows[row_of[b]];
    const uint64_t documents =
        row->first ? XXH3_64bits(row->first, (size_t)p->layout.n_tokens * sizeof *row->first) : 0;
    h = XXH3_64bits_withSeed(&documents, sizeof documents, h);
  }
  for (int64_t u = 0; u < p->n_batch * p->n_heads; u++) {
    const uint64_t set = p->patterns[p->pattern_of[u]].shown->hash;
    h = XXH3_64bits_withSeed(&set, sizeof set, h);
  }
  return h;
}

/* Finish p with chosen[u] of every unit, either made from its records or cloned from another plan. */
static halo_status finish(halo_plan *p, const halo_plan *like) {
  halo_status status = HALO_OK;
  const int64_t units = p->n_batch * p->n_heads;
  int32_t *row_of = NULL;
  halo__set **chosen = NULL;
  HALO_TRY_GOTO(halo__plan_alloc(&row_of, p->n_batch, sizeof *row_of));
  HALO_TRY_GOTO(halo__plan_alloc(&chosen, units, sizeof *chosen));
  HALO_TRY_GOTO(halo__plan_alloc(&p->sets, 2 * units, sizeof *p->sets));
  HALO_TRY_GOTO(halo__plan_alloc(&p->patterns, units, sizeof *p->patterns));
  HALO_TRY_GOTO(halo__plan_alloc(&p->pattern_of, units, sizeof *p->pattern_of));
  HALO_TRY_GOTO(make_rows(p, row_of));
  HALO_TRY_GOTO(like ? clone_all_chosen(p, chosen, like) : make_all_chosen(p, chosen));
  HALO_TRY_GOTO(make_patterns(p, row_of, chosen));
  p->hash = plan_hash(p, row_of);
  p->finished = true;
  drop_records(p);
done:
  halo__free(row_of);
  halo__free(chosen);
  if (status != HALO_OK) drop_finished(p);
  return status;
}

halo_status halo_plan_finish(halo_plan *p) {
  HALO_TRY(check_builder(p, -1, -1, 0, "plan_finish"));
  return finish(p, NULL);
}

halo_status halo_plan_with_documents(halo_plan **out, const halo_plan *p, int64_t n_batch,
                                     const int32_t *documents) {
  HALO_CHECK(out && p, HALO_EARG, "plan_with_documents: out or plan is NULL");
  HALO_TRY(halo__plan_need(p, "plan_with_documents"));
  halo_status status = HALO_OK;
  halo_plan *made = NULL;
  HALO_TRY_GOTO(halo_plan_new(&made, &p->layout, n_batch, p->n_heads));
  made->sink = p->sink;
  made->window = p->window;
  made->force_diagonal = p->force_diagonal;
  HALO_TRY_GOTO(halo_plan_set_documents(made, documents));
  HALO_TRY_GOTO(finish(made, p));
  *out = made;
done:
  if (status != HALO_OK) halo_plan_free(made);
  return status;
}

/* ---- Reading ------------------------------------------------------------------------------------
 */

int64_t halo_plan_batch(const halo_plan *p) {
  return p->n_batch;
}
int64_t halo_plan_heads(const halo_plan *p) {
  return p->n_heads;
}
uint64_t halo_plan_hash(const halo_plan *p) {
  return p->finished ? p->hash : 0;
}
const halo_layout *halo_plan_layout(const halo_plan *p) {
  return &p->layout;
}
int64_t halo__plan_patterns(const halo_plan *p) {
  return p->n_patterns;
}
const int32_t *halo__plan_pattern_of(const halo_plan *p) {
  return p->pattern_of;
}

int32_t halo_plan_is_dense(const halo_plan *p) {
  if (!p->finished)
    return 0;
  for (int64_t i = 0; i < p->n_patterns; i++) {
    if (p->patterns[i].shown->n_diagonals < p->rows[p->patterns[i].row].reach)
      return 0;
  }
  return 1;
}

int32_t halo_plan_visible(const halo_plan *p, int64_t batch, int64_t head, int64_t i, int64_t j) {
  if (!p->finished || batch < 0 || batch >= p->n_batch || head < 0 || head >= p->n_heads)
    return 0;
  if (j < 0 || j > i || i >= p->layout.n_tokens)
    return 0;
  const halo__pattern *pattern = &p->patterns[p->pattern_of[batch * p->n_heads + head]];
  if (j < halo__first(&p->rows[pattern->row], i))
    return 0;
  const halo__set *s = pattern->shown;
  if (halo__set_has(s, i / p->layout.block, j / p->layout.block))
    return 1;
  const int64_t at = halo__lower_bound(s->column, 0, s->n_columns, j);
  return at < s->n_columns && s->column[at] == j;
}

halo_status halo_plan_diagonals(const halo_plan *p, int64_t batch, int64_t head, int64_t *out,
                                int64_t capacity, int64_t *n_out) {
  HALO_TRY(halo__plan_need(p, "plan_diagonals"));
  HALO_TRY(halo__plan_check_head(p, batch, head, false, "plan_diagonals"));
  const halo__set *s = p->patterns[p->pattern_of[batch * p->n_heads + head]].chosen;
  int64_t n = 0;
  for (int64_t d = 0; d < s->n_blocks; d++) {
    if (!halo__set_diagonal(s, d))
      continue;
    if (n < capacity)
      out[n] = d;
    n++;
  }
  *n_out = n;
  return HALO_OK;
}

halo_status halo_plan_columns(const halo_plan *p, int64_t batch, int64_t head, int64_t *out,
                              int64_t capacity, int64_t *n_out) {
  HALO_TRY(halo__plan_need(p, "plan_columns"));
  HALO_TRY(halo__plan_check_head(p, batch, head, false, "plan_columns"));
  const halo__set *s = p->patterns[p->pattern_of[batch * p->n_heads + head]].chosen;
  for (int64_t i = 0; i < s->n_columns && i < capacity; i++)
    out[i] = s->column[i];
  *n_out = s->n_columns;
  return HALO_OK;
}
