/* plan_stats.c: what a plan costs and what it leaves out.
 *
 * All figures are exact counts over the visible set, made without visiting pairs: a row's full
 * tiles are two popcounts (plan_set.c), only tiles at a causal or document edge are counted token
 * by token, and a column's queries are its document's rest minus the active tiles above it. A dense
 * plan of 512K tokens is counted in NB steps, not NB^2.
 *
 *   density     visible pairs / causal pairs of the same document
 *   forced      share of the visible pairs that only the force rules brought in
 *   work        pairs after rounding to tiles, what a kernel computes: G*G per active tile, G per
 *               (query block, column). Flops are 4*D per pair: q.k and p.v, forward
 *   imbalance   mtraining.md 2.3 over F[rank, step] of the flat ring (step t: keys of rank r - t):
 *                 worker    max_r sum_t F / mean_r sum_t F
 *                 step      mean over steps of max_r F[.,t] / mean_r F[.,t]
 *                 critical  sum_t max_r F[.,t] / mean_r sum_t F   (ranks wait for each other)
 *               Columns are the last step of their own: they are computed from gathered keys, so a
 *               shard full of sinks delays nobody (mtraining.md 2.4).
 *   far         tokens whose distant readers are all cut off get no long-range gradient; counting
 *               them over steps shows what a frozen or greedy selection starves
 */
#include "plan.h"

#include <stdarg.h>
#include <stdio.h>

/* ---- Density ----------------------------------------------------------------------------------
 */

/* Visible pairs of one active tile at an edge. */
static int64_t count_edge_tile(const halo_plan *p, const halo__row *row, int64_t query,
                               int64_t key) {
  const int64_t g = p->layout.block, n = p->layout.n_tokens;
  const int64_t end = (query + 1) * g < n ? (query + 1) * g : n;
  int64_t pairs = 0;
  for (int64_t i = query * g; i < end; i++) {
    const int64_t first = halo__first(row, i), low = first > key * g ? first : key * g;
    const int64_t high = i < key * g + g - 1 ? i : key * g + g - 1;
    if (high >= low)
      pairs += high - low + 1;
  }
  return pairs;
}

static int64_t count_tile_pairs(const halo_plan *p, const halo__row *row, const halo__set *s) {
  const int64_t g = p->layout.block;
  int64_t pairs = 0;
  for (int64_t query = 0; query < p->layout.n_blocks; query++) {
    if (row->lo[query] == INT32_MAX)
      continue;
    int64_t full = (row->hi[query] + g - 1) / g; /* first key block that is seen whole */
    if (row->hi[query] == INT32_MAX || full > query)
      full = query;
    pairs += halo__set_count_keys(s, query, full, query) * g * g;
    for (halo__walk w = halo__walk_begin(s, query, row->lo[query] / g); w.key >= 0 && w.key < full;
         halo__walk_next(&w)) {
      pairs += count_edge_tile(p, row, query, w.key);
    }
    if (halo__set_has(s, query, query))
      pairs += count_edge_tile(p, row, query, query);
  }
  return pairs;
}

/* Pairs that only a column makes visible. */
static int64_t count_column_pairs(const halo_plan *p, const halo__row *row, const halo__set *s) {
  const int64_t g = p->layout.block;
  int64_t pairs = 0;
  for (int64_t c = 0; c < s->n_columns; c++) {
    const int64_t token = s->column[c], key = token / g;
    if (row->first && row->first[token] == INT32_MAX)
      continue;
    const int64_t last = halo__last(p, row, token), last_block = last / g;
    pairs += last - token + 1;
    if (halo__set_has(s, key, key))
      pairs -= (last_block > key ? key * g + g - 1 : last) - token + 1;
    pairs -= halo__set_count_queries(s, key, key + 1, last_block) * g;
    if (last_block > key && halo__set_has(s, last_block, key))
      pairs -= last - last_block * g + 1;
  }
  return pairs;
}

void halo__plan_count(const halo_plan *p, halo__pattern *pattern) {
  const halo__row *row = &p->rows[pattern->row];
  const halo__set *chosen = pattern->chosen, *shown = pattern->shown;
  pattern->chosen_pairs = count_tile_pairs(p, row, chosen) + count_column_pairs(p, row, chosen);
  pattern->visible_pairs =
      shown == chosen ? pattern->chosen_pairs
                      : count_tile_pairs(p, row, shown) + count_column_pairs(p, row, shown);
}

halo_status halo_plan_density(const halo_plan *p, int64_t batch, int64_t head, double *density_out,
                              double *forced_share_out) {
  HALO_TRY(halo__plan_need(p, "plan_density"));
  HALO_TRY(halo__plan_check_head(p, batch, head, true, "plan_density"));
  double visible = 0, chosen = 0, all = 0;
  for (int64_t u = 0; u < p->n_batch * p->n_heads; u++) {
    if ((batch >= 0 && u / p->n_heads != batch) || (head >= 0 && u % p->n_heads != head))
      continue;
    const halo__pattern *pattern = &p->patterns[p->pattern_of[u]];
    visible += (double)pattern->visible_pairs;
    chosen += (double)pattern->chosen_pairs;
    all += (double)p->rows[pattern->row].pairs;
  }
  if (density_out)
    *density_out = all > 0 ? visible / all : 0;
  if (forced_share_out)
    *forced_share_out = visible > 0 ? (visible - chosen) / visible : 0;
  return HALO_OK;
}

/* ---- Work and balance -------------------------------------------------------------------------
 */

/* Add one query block's active tiles to counts[step] of its rank, its columns to *columns. */
static void count_row_work(const halo_plan *p, const halo__pattern *pattern, int64_t query,
                           int32_t rank, int64_t *counts, int64_t *columns) {
  const halo_layout *l = &p->layout;
  const halo__row *row = &p->rows[pattern->row];
  const halo__set *s = pattern->shown;
  if (query >= l->n_blocks || row->lo[query] == INT32_MAX)
    return;
  const int64_t end = halo__lower_bound(s->column, 0, s->n_columns, (query + 1) * l->block);
  const int64_t begin = halo__lower_bound(s->column, 0, end, row->lo[query]);
  int64_t covered = 0, at = begin; /* columns inside active tiles */
  for (halo__walk w = halo__walk_begin(s, query, row->lo[query] / l->block); w.key >= 0;
       halo__walk_next(&w)) {
    int32_t source;
    int64_t local;
    halo__layout_block_locate(l, w.key, &source, &local);
    counts[(rank - source + l->world) % l->world] += pattern->heads;
    if (at == end)
      continue;
    at = halo__lower_bound(s->column, at, end, w.key * l->block);
    const int64_t first = at;
    at = halo__lower_bound(s->column, at, end, (w.key + 1) * l->block);
    covered += at - first;
  }
  *columns += (end - begin - covered) * pattern->heads;
}

/* p->tile_counts: [W, W] tiles by (query rank, flat step), then [W] (query block, column) pairs;
 * times the heads that share a pattern. */
static halo_status count_work(halo_plan *p) {
  if (p->tile_counts)
    return HALO_OK;
  const halo_layout *l = &p->layout;
  const int64_t world = l->world;
  int64_t *counts;
  HALO_TRY(halo__plan_alloc(&counts, world * world + world, sizeof *counts));
#pragma omp parallel for schedule(dynamic) if (world > 1 && p->n_patterns * l->n_blocks > 4096)
  for (int32_t r = 0; r < l->world; r++) {
    for (int64_t i = 0; i < p->n_patterns; i++) {
      for (int64_t a = 0; a < l->per_rank; a++) {
        count_row_work(p, &p->patterns[i], halo__layout_block_global(l, r, a), r,
                       counts + r * world, counts + world * world + r);
      }
    }
  }
  p->tile_counts = counts;
  return HALO_OK;
}

/* Pairs that rank r computes in step t; t = W is the columns' step. */
static double pairs_of(const halo_plan *p, int64_t r, int64_t t) {
  const int64_t world = p->layout.world, g = p->layout.block;
  return t < world ? (double)p->tile_counts[r * world + t] * (double)(g * g)
                   : (double)p->tile_counts[world * world + r] * (double)g;
}

halo_status halo_plan_work(halo_plan *p, int64_t head_size, double *work_out, int64_t capacity,
                           int32_t *steps_out) {
  HALO_TRY(halo__plan_need(p, "plan_work"));
  const int64_t world = p->layout.world, steps = world + 1;
  HALO_CHECK(head_size >= 1, HALO_EARG, "plan_work: head_size is %lld, wanted at least 1",
             (long long)head_size);
  HALO_CHECK(!work_out || capacity >= world * steps, HALO_EARG,
             "plan_work: room for %lld numbers, wanted %lld ranks x %lld steps",
             (long long)capacity, (long long)world, (long long)steps);
  HALO_TRY(count_work(p));
  for (int64_t i = 0; work_out && i < world * steps; i++) {
    work_out[i] = 4.0 * (double)head_size * pairs_of(p, i / steps, i % steps);
  }
  if (steps_out)
    *steps_out = (int32_t)steps;
  return HALO_OK;
}

halo_status halo_plan_balance(halo_plan *p, double *worker_out, double *step_out,
                              double *critical_out) {
  HALO_TRY(halo__plan_need(p, "plan_balance"));
  HALO_TRY(count_work(p));
  const int64_t world = p->layout.world;
  double total = 0, busiest = 0, path = 0, step_sum = 0;
  int64_t busy_steps = 0;
  for (int64_t r = 0; r < world; r++) {
    double sum = 0;
    for (int64_t t = 0; t <= world; t++)
      sum += pairs_of(p, r, t);
    total += sum;
    if (sum > busiest)
      busiest = sum;
  }
  for (int64_t t = 0; t <= world; t++) {
    double sum = 0, most = 0;
    for (int64_t r = 0; r < world; r++) {
      const double work = pairs_of(p, r, t);
      sum += work;
      if (work > most)
        most = work;
    }
    path += most;
    if (sum == 0)
      continue; /* nobody works: nobody waits */
    step_sum += most / (sum / (double)world);
    busy_steps++;
  }
  const double mean = total / (double)world;
  if (worker_out)
    *worker_out = total > 0 ? busiest / mean : 1;
  if (step_out)
    *step_out = busy_steps > 0 ? step_sum / (double)busy_steps : 1;
  if (critical_out)
    *critical_out = total > 0 ? path / mean : 1;
  return HALO_OK;
}

/* ---- Far coverage ------------------------------------------------------------------------------
 */

/* Is token j seen by a query at distance >= far under this pattern? `last` ends j's document. */
static bool sees_far(const halo_plan *p, const halo__set *s, int64_t token, int64_t far,
                     int64_t last) {
  const int64_t g = p->layout.block;
  const int64_t at = halo__lower_bound(s->column, 0, s->n_columns, token);
  if (at < s->n_columns && s->column[at] == token)
    return true;
  return halo__set_count_queries(s, token / g, (token + far) / g, last / g + 1) > 0;
}

halo_status halo_plan_far_coverage(const halo_plan *p, int64_t batch, int64_t head, int64_t far,
                                   uint8_t *reached, int64_t *far_out, int64_t *missed_out) {
  static const char what[] = "plan_far_coverage";
  HALO_TRY(halo__plan_need(p, what));
  HALO_TRY(halo__plan_check_head(p, batch, head < 0 ? 0 : head, false, what));
  HALO_CHECK(far >= 0, HALO_EARG, "%s: far is %lld tokens, wanted 0 or more", what, (long long)far);
  const int64_t first_head = head < 0 ? 0 : head, end_head = head < 0 ? p->n_heads : head + 1;
  const int32_t *pattern_of = p->pattern_of + batch * p->n_heads;
  const halo__row *row = &p->rows[p->patterns[pattern_of[0]].row];
  int64_t far_tokens = 0, missed = 0;
#pragma omp parallel for reduction(+ : far_tokens, missed) if (p->layout.n_tokens > 16384)
  for (int64_t token = 0; token < p->layout.n_tokens; token++) {
    const int64_t last = halo__last(p, row, token);
    if (last < 0 || far > last - token)
      continue;
    bool seen = false;
    for (int64_t h = first_head; h < end_head && !seen; h++) {
      if (h > first_head && pattern_of[h] == pattern_of[h - 1])
        continue;
      seen = sees_far(p, p->patterns[pattern_of[h]].shown, token, far, last);
    }
    far_tokens++;
    missed += !seen;
    if (reached)
      reached[token] |= seen;
  }
  if (far_out)
    *far_out = far_tokens;
  if (missed_out)
    *missed_out = missed;
  return HALO_OK;
}

/* ---- Text for people ---------------------------------------------------------------------------
 */

typedef struct text {
  char *at;
  int64_t capacity, length; /* length counts what was wanted */
} text;

static void say(text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void say(text *t, const char *format, ...) {
  const int64_t room = t->capacity > t->length ? t->capacity - t->length : 0;
  va_list args;
  va_start(args, format);
  const int n = vsnprintf(room ? t->at + t->length : NULL, (size_t)room, format, args);
  va_end(args);
  if (n > 0)
    t->length += n;
}

/* "0-3 7 12-13", at most `limit` runs. */
static void say_diagonals(text *t, const halo__set *s, int64_t limit) {
  int64_t runs = 0;
  for (int64_t d = 0; d < s->n_blocks; d++) {
    if (!halo__set_diagonal(s, d))
      continue;
    const int64_t first = d;
    while (d + 1 < s->n_blocks && halo__set_diagonal(s, d + 1))
      d++;
    if (runs++ == limit) {
      say(t, " ...");
      return;
    }
    say(t, d > first ? " %lld-%lld" : " %lld", (long long)first, (long long)d);
  }
}

/* One character per square of blocks: how many of its possible tiles are active. */
static void say_map(text *t, const halo_plan *p, const halo__pattern *pattern) {
  const halo__row *row = &p->rows[pattern->row];
  const halo__set *s = pattern->shown;
  const int64_t nb = p->layout.n_blocks, cells = nb < 32 ? nb : 32;
  say(t, "  map of %lld x %lld blocks, rows are queries: # all tiles, + half, . some, | columns\n",
      (long long)nb, (long long)nb);
  for (int64_t y = 0; y < cells; y++) {
    say(t, "    ");
    for (int64_t x = 0; x <= y; x++) {
      const int64_t k0 = x * nb / cells, k1 = (x + 1) * nb / cells;
      const int64_t q0 = y * nb / cells, q1 = (y + 1) * nb / cells;
      int64_t possible = 0, active = 0;
      bool column = false;
      for (int64_t query = q0; query < q1; query++) {
        if (row->lo[query] == INT32_MAX)
          continue;
        const int64_t low = row->lo[query] / p->layout.block;
        const int64_t a = low > k0 ? low : k0, b = query + 1 < k1 ? query + 1 : k1;
        if (a >= b)
          continue;
        possible += b - a;
        active += halo__set_count_keys(s, query, a, b);
        const int64_t from = a * p->layout.block;
        const int64_t c = halo__lower_bound(s->column, 0, s->n_columns,
                                            from > row->lo[query] ? from : row->lo[query]);
        column = column || (c < s->n_columns && s->column[c] < b * p->layout.block);
      }
      const char *mark = active == 0              ? (column     ? "|"
                                                     : possible ? "-"
                                                                : " ")
                         : active == possible     ? "#"
                         : 2 * active >= possible ? "+"
                                                  : ".";
      say(t, "%s", mark);
    }
    say(t, "\n");
  }
}

static void say_density(text *t, const halo_plan *p, int64_t batch, int64_t head) {
  double density = 0, forced = 0;
  halo_plan_density(p, batch, head, &density, &forced);
  say(t, "density %.3f %% of causal pairs", 100 * density);
  if (forced > 0)
    say(t, ", %.1f %% of them only by force rules", 100 * forced);
  say(t, "\n");
}

static void say_head(text *t, const halo_plan *p, int64_t batch, int64_t head) {
  const halo__pattern *pattern = &p->patterns[p->pattern_of[batch * p->n_heads + head]];
  const halo__set *s = pattern->chosen;
  say(t, "this head: "); /* which one, the caller counts from where it likes */
  say_density(t, p, batch, head);
  say(t, "  chosen: %lld of %lld diagonals", (long long)s->n_diagonals, (long long)s->n_blocks);
  if (s->n_diagonals)
    say(t, ":");
  say_diagonals(t, s, 12);
  say(t, "; %lld columns", (long long)s->n_columns);
  for (int64_t i = 0; i < s->n_columns && i < 12; i++)
    say(t, i ? " %d" : ": %d", s->column[i]);
  if (s->n_columns > 12)
    say(t, " ...");
  say(t, "; %lld tiles\n", (long long)s->n_tiles);
  say_map(t, p, pattern);
}

int64_t halo_plan_explain(halo_plan *p, int64_t batch, int64_t head, char *out, int64_t capacity) {
  static const char *const layouts[] = {"contiguous", "zigzag", "striped"};
  text t = {.at = out, .capacity = capacity};
  const halo_layout *l = &p->layout;
  say(&t, "plan of %lld x %lld heads, %lld tokens in %lld blocks of %lld, %s over %d rank%s\n",
      (long long)p->n_batch, (long long)p->n_heads, (long long)l->n_tokens, (long long)l->n_blocks,
      (long long)l->block, layouts[l->kind], l->world, l->world > 1 ? "s" : "");
  if (!p->finished) {
    say(&t, "not finished: %lld notes so far\n", (long long)p->n_records);
    return t.length;
  }
  if (batch >= p->n_batch || head >= p->n_heads) {
    say(&t, "no such batch or head\n");
    return t.length;
  }
  double worker = 1, step = 1, critical = 1;
  if (halo_plan_balance(p, &worker, &step, &critical) == HALO_OK) {
    say(&t, "imbalance: worker %.3f, step %.3f, critical path %.3f\n", worker, step, critical);
  }
  say(&t, "force rules: sink %lld, window %lld tokens, diagonal %s\n", (long long)p->sink,
      (long long)p->window, p->force_diagonal ? "yes" : "no");
  say(&t, "%s, %lld different patterns, hash %016llx\n", halo_plan_is_dense(p) ? "dense" : "sparse",
      (long long)p->n_patterns, (unsigned long long)p->hash);
  if (batch < 0 || head < 0) {
    say(&t, "all heads: ");
    say_density(&t, p, batch, head);
  } else {
    say_head(&t, p, batch, head);
  }
  return t.length;
}
