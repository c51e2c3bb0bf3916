/* select.c: the vertical-slash pattern from the last queries, exactly and together.
 *
 * The last `probe` tokens of a sequence vote (MInference, arXiv 2407.02490; MTraining trains with
 * it, mtraining.md 1.2 to 1.4): their attention over all keys, softmax over all ranks, is summed
 * down columns (verticals) and along diagonals i - j (slashes); the best of each are kept. Where
 * the reference differs we say why:
 *
 *   probabilities in both budget modes: summing raw logits ranks noise (its defect 5)
 *   top-p keeps the entry that crosses the mass, so the mass is reached (defect 4)
 *   every rank picks for its share of the heads instead of rank 0 for all while others wait
 *   with documents a row votes on its own document only
 *
 * The same plan on every rank, and the plan of one rank for any number of them: each per-key number
 * is one chain of operations (kernels/cpu/probe.c), sums over keys are kept per key block and added
 * here in global block order, in fp64; ties go to the lower index.
 *
 *   rank r, its keys                           owner of the head (units / W each)
 *   exp(q.k - max)       row sums per block --> 1 / row sums
 *   columns, diagonals <-- weights             .
 *        per block -----------------------> column[N], slash[N] -> best -> lists
 *   plan <------------------------------------ lists of all heads
 *
 * Slashes are offsets of tokens; the plan has distances of blocks. Offset s crosses the tiles at
 * block distance d with |s - d G| < G: floor(s / G), and the next one unless G divides s.
 *
 * traffic   per (batch, head): probe * N/G row sums, about (2 + probe/G) N scores, the lists
 */
#include "probe.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct budget {
  int64_t verticals, slashes; /* most entries */
  double mass_vertical, mass_slash;
} budget;

typedef struct selection {
  halo__probe_job job;
  halo_plan *plan;
  budget budget;
  int64_t rows;        /* probe rows that exist */
  int64_t span;        /* diagonal sums of one key block */
  int64_t unit_scores; /* column and diagonal sums of a unit on one rank */
  int64_t share;       /* units of a chunk that one rank picks for */
  int64_t list_length; /* int32 of one unit's answer: two counts, columns, offsets */
  void **sums, **weights, **all_weights; /* per rank here, see the drawing */
  void **scores, **all_scores;
  void **lists, **all_lists;
} selection;

/* ---- The best of a list -----------------------------------------------------------------------
 */

static bool better(const double *score, int32_t a, int32_t b) {
  return score[a] > score[b] || (score[a] == score[b] && a < b);
}

static int compare_scores(const void *a, const void *b, void *score) {
  return better(score, *(const int32_t *)a, *(const int32_t *)b) ? -1 : 1;
}

/* Move the best k of order[0..n) to its front, best first. The order is total: no two entries tie.
 */
static void best_first(int32_t *order, int64_t n, int64_t k, const double *score) {
  int64_t low = 0, high = n - 1;
  while (k < n && low < high) { /* Hoare's selection around the k-th */
    const int32_t pivot = order[low + (high - low) / 2];
    int64_t i = low, j = high;
    while (i <= j) {
      while (better(score, order[i], pivot))
        i++;
      while (better(score, pivot, order[j]))
        j--;
      if (i > j)
        break;
      const int32_t t = order[i];
      order[i++] = order[j];
      order[j--] = t;
    }
    if (k <= j) {
      high = j;
    } else if (k >= i) {
      low = i;
    } else {
      break;
    }
  }
  qsort_r(order, (size_t)(k < n ? k : n), sizeof *order, compare_scores, (void *)score);
}

/* Choose from score[0..n): at most `most`; with a mass, the shortest prefix that reaches it.
 * Returns the count, with the choice at the front of order; -1 if a score is not finite. */
static int64_t choose(int32_t *order, const double *score, int64_t n, int64_t most, double mass) {
  double total = 0;
  for (int64_t i = 0; i < n; i++) {
    order[i] = (int32_t)i;
    total += score[i];
  }
  if (!isfinite(total))
    return -1;
  if (most > n)
    most = n;
  if (most == 0)
    return 0;
  best_first(order, n, most, score);
  if (mass == 0)
    return most;
  double sum = 0;
  for (int64_t i = 0; i < most; i++) {
    sum += score[order[i]];
    if (sum >= mass * total)
      return i + 1;
  }
  return most;
}

/* ---- Owners: sums to weights, scores to lists ---------------------------------------------------
 */

/* 1 / row sums of the units that rank `i` here picks for, from the row sums per block of all ranks.
 */
static void weigh(selection *s, int32_t i) {
  const halo__probe_job *p = &s->job;
  const halo_layout *l = p->layout;
  const int64_t blocks = l->per_rank;
  for (int64_t u = 0; u < s->share; u++) {
    for (int64_t lane = 0; lane < p->lanes; lane++) {
      double sum = 0;
      for (int64_t b = 0; b < l->n_blocks; b++) {
        int32_t source;
        int64_t local;
        halo__layout_block_locate(l, b, &source, &local);
        sum += halo__probe_at(p, s->sums[i],
                              ((source * s->share + u) * blocks + local) * p->lanes + lane);
      }
      const double weight = sum > 0 ? 1 / sum : 0;
      const int64_t at = u * p->lanes + lane;
      if (p->acc == HALO_F64) {
        ((double *)s->weights[i])[at] = weight;
      } else {
        ((float *)s->weights[i])[at] = (float)weight;
      }
    }
  }
}

/* column[N] and slash[N] of one unit, from the scores of all ranks, in global order. last_row is
 * the position of the last probe row. */
static void collect(const selection *s, int32_t i, int64_t u, int64_t last_row, double *column,
                    double *slash) {
  const halo__probe_job *p = &s->job;
  const halo_layout *l = p->layout;
  const int64_t g = l->block, n = l->n_tokens, tokens = l->per_rank * g;
  memset(slash, 0, (size_t)n * sizeof *slash);
  for (int64_t b = 0; b < l->n_blocks; b++) {
    int32_t source;
    int64_t local;
    halo__layout_block_locate(l, b, &source, &local);
    const int64_t unit = (source * s->share + u) * s->unit_scores;
    for (int64_t j = 0; j < g && b * g + j < n; j++) {
      column[b * g + j] = halo__probe_at(p, s->all_scores[i], unit + local * g + j);
    }
    /* entry t is lane - key + g - 1, and lane s->rows - 1 is last_row */
    const int64_t base = last_row - (s->rows - 1) - b * g - (g - 1);
    for (int64_t t = base < 0 ? -base : 0; t < s->span && base + t < n; t++) {
      slash[base + t] += halo__probe_at(p, s->all_scores[i], unit + tokens + local * s->span + t);
    }
  }
}

/* Fill the lists of the units that rank `i` here picks for. */
static halo_status pick(selection *s, int32_t i, int64_t first_unit, int64_t n_units) {
  const halo__probe_job *p = &s->job;
  const int64_t n = p->layout->n_tokens, mine = (p->rank + i) * s->share;
  halo_status result = HALO_OK;
#pragma omp parallel for schedule(dynamic) if (n * s->share > 1 << 13)
  for (int64_t u = 0; u < s->share; u++) {
    if (mine + u >= n_units)
      continue;
    const int32_t last_row = p->token[(first_unit + mine + u) * p->lanes + s->rows - 1];
    int32_t *list = (int32_t *)s->lists[i] + u * s->list_length;
    halo_status status = HALO_OK;
    double *column = NULL, *slash = NULL;
    int32_t *order = NULL;
    HALO_TRY_GOTO(halo__scratch((void **)&column, n, sizeof *column));
    HALO_TRY_GOTO(halo__scratch((void **)&slash, n, sizeof *slash));
    HALO_TRY_GOTO(halo__scratch((void **)&order, n, sizeof *order));
    collect(s, i, u, last_row, column, slash);
    const int64_t columns = choose(order, column, n, s->budget.verticals, s->budget.mass_vertical);
    if (columns > 0)
      memcpy(list + 2, order, (size_t)columns * sizeof *order);
    const int64_t offsets = choose(order, slash, n, s->budget.slashes, s->budget.mass_slash);
    if (offsets > 0)
      memcpy(list + 2 + s->budget.verticals, order, (size_t)offsets * sizeof *order);
    list[0] = (int32_t)columns;
    list[1] = (int32_t)offsets;
  done:
    halo__free(column);
    halo__free(slash);
    halo__free(order);
    if (status != HALO_OK) {
#pragma omp critical(halo_select_pick)
      result = status;
    }
  }
  /* The message may be another thread's: say it again on this one. */
  if (result != HALO_OK)
    return halo__error(result, "select: no memory for the scores of a head");
  return HALO_OK;
}

/* ---- The plan ----------------------------------------------------------------------------------
 */

/* Offsets of tokens to distances of blocks, twice as many at most. */
static int64_t block_distances(int64_t *out, const int32_t *offset, int64_t n, int64_t block,
                               int64_t n_blocks) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t d = offset[i] / block;
    out[count++] = d;
    if (offset[i] % block != 0 && d + 1 < n_blocks)
      out[count++] = d + 1;
  }
  return count;
}

/* Every rank adds all heads' lists, in the same order. */
static halo_status add_lists(selection *s, int64_t first_unit, int64_t n_units) {
  halo_status status = HALO_OK;
  const halo_layout *l = s->job.layout;
  const int64_t room = s->budget.verticals + 2 * s->budget.slashes;
  int64_t *entries;
  HALO_TRY(halo__scratch((void **)&entries, room > 0 ? room : 1, sizeof *entries));
  for (int64_t u = 0; u < n_units; u++) {
    const int32_t *list = (const int32_t *)s->all_lists[0] + u * s->list_length;
    const int64_t batch = (first_unit + u) / s->plan->n_heads;
    const int64_t head = (first_unit + u) % s->plan->n_heads;
    HALO_CHECK_GOTO(list[0] >= 0 && list[1] >= 0, HALO_ENUMERIC,
                    "select_vertical_slash: attention of batch %lld, head %lld is not finite",
                    (long long)batch, (long long)head);
    for (int64_t i = 0; i < list[0]; i++)
      entries[i] = list[2 + i];
    HALO_TRY_GOTO(halo_plan_add_columns(s->plan, batch, head, entries, list[0]));
    const int64_t n =
        block_distances(entries, list + 2 + s->budget.verticals, list[1], l->block, l->n_blocks);
    HALO_TRY_GOTO(halo_plan_add_diagonals(s->plan, batch, head, entries, n));
  }
done:
  halo__free(entries);
  return status;
}

/* ---- One chunk of heads over the ring
 * ------------------------------------------------------------ */

static halo_status select_chunk(selection *s, int64_t unit, int64_t n) {
  halo__probe_job *p = &s->job;
  const int64_t bytes = halo_dtype_bytes(p->acc);
  HALO_TRY(halo__probe_exponentials(p, unit, n));
  HALO_TRY(halo_comm_all_to_all(p->comm, s->sums, (const void *const *)p->sum,
                                s->share * p->layout->per_rank * p->lanes * bytes));
  for (int32_t i = 0; i < p->here; i++)
    weigh(s, i);
  HALO_TRY(halo_comm_all_gather(p->comm, s->all_weights, (const void *const *)s->weights,
                                s->share * p->lanes * bytes));
  for (int32_t i = 0; i < p->here; i++) {
    HALO_TRY(halo__probe_score(p, i, s->scores[i], n * s->unit_scores * bytes, s->all_weights[i],
                               n * p->lanes * bytes));
  }
  HALO_TRY(halo_comm_all_to_all(p->comm, s->all_scores, (const void *const *)s->scores,
                                s->share * s->unit_scores * bytes));
  for (int32_t i = 0; i < p->here; i++)
    HALO_TRY(pick(s, i, unit, n));
  HALO_TRY(halo_comm_all_gather(p->comm, s->all_lists, (const void *const *)s->lists,
                                s->share * s->list_length * (int64_t)sizeof(int32_t)));
  return add_lists(s, unit, n);
}

/* The last rows of every sequence: they end at its last token that is in a document. */
static void place_rows(selection *s) {
  halo__probe_job *p = &s->job;
  const int64_t n = p->layout->n_tokens, heads = s->plan->n_heads;
  for (int64_t u = 0; u < p->units; u++) {
    const int32_t *id = s->plan->documents ? s->plan->documents + u / heads * n : NULL;
    int64_t end = n - 1;
    while (id && end >= 0 && id[end] < 0)
      end--;
    for (int64_t lane = 0; lane < p->lanes; lane++) {
      const int64_t at = u * p->lanes + lane, token = end - (s->rows - 1) + lane;
      const bool is_row = lane < s->rows && token >= 0 && (!id || id[token] >= 0);
      int64_t first = is_row ? token : 0;
      while (is_row && first > 0 && (!id || id[first - 1] == id[token])) {
        if (!id)
          first = 1;
        first--;
      }
      p->token[at] = is_row ? (int32_t)token : -1;
      p->first[at] = is_row ? (int32_t)first : 0;
      p->last[at] = is_row ? (int32_t)token : -1;
    }
  }
}

static void selection_free(selection *s) {
  const halo__probe_job *p = &s->job;
  halo__probe_free_buffers(s->sums, p);
  halo__probe_free_buffers(s->weights, p);
  halo__probe_free_buffers(s->all_weights, p);
  halo__probe_free_buffers(s->scores, p);
  halo__probe_free_buffers(s->all_scores, p);
  halo__probe_free_buffers(s->lists, p);
  halo__probe_free_buffers(s->all_lists, p);
  halo__probe_close(&s->job);
}

static halo_status allocate(selection *s) {
  const halo__probe_job *p = &s->job;
  const int64_t bytes = halo_dtype_bytes(p->acc), padded = s->share * p->world;
  HALO_TRY(halo__probe_buffers(&s->sums, p, padded * p->layout->per_rank * p->lanes, bytes));
  HALO_TRY(halo__probe_buffers(&s->weights, p, s->share * p->lanes, bytes));
  HALO_TRY(halo__probe_buffers(&s->all_weights, p, padded * p->lanes, bytes));
  HALO_TRY(halo__probe_buffers(&s->scores, p, padded * s->unit_scores, bytes));
  HALO_TRY(halo__probe_buffers(&s->all_scores, p, padded * s->unit_scores, bytes));
  HALO_TRY(halo__probe_buffers(&s->lists, p, s->share * s->list_length, sizeof(int32_t)));
  return halo__probe_buffers(&s->all_lists, p, padded * s->list_length, sizeof(int32_t));
}

static halo_status check_budget(const halo_plan *plan, int64_t probe, const budget *b) {
  static const char what[] = "select_vertical_slash";
  HALO_CHECK(plan, HALO_EARG, "%s: plan is NULL", what);
  HALO_CHECK(!plan->finished, HALO_ESTATE, "%s: the plan is finished and can no longer change",
             what);
  HALO_CHECK(probe >= 1, HALO_EARG, "%s: probe is %lld rows, wanted at least 1", what,
             (long long)probe);
  HALO_CHECK(b->verticals >= 0 && b->slashes >= 0, HALO_EARG,
             "%s: budgets are %lld verticals and %lld slashes, wanted 0 or more", what,
             (long long)b->verticals, (long long)b->slashes);
  HALO_CHECK(
      b->mass_vertical >= 0 && b->mass_vertical <= 1 && b->mass_slash >= 0 && b->mass_slash <= 1,
      HALO_EARG, "%s: masses are %g and %g, wanted 0 to 1", what, b->mass_vertical, b->mass_slash);
  return HALO_OK;
}

halo_status halo_select_vertical_slash(halo_plan *plan, const halo_tensor *q, const halo_tensor *k,
                                       halo_ring *ring, double scale, int64_t probe,
                                       int64_t verticals, int64_t slashes, double mass_vertical,
                                       double mass_slash) {
  halo_status status = HALO_OK;
  selection s = {.plan = plan, .budget = {verticals, slashes, mass_vertical, mass_slash}};
  halo__probe_job *p = &s.job;
  HALO_TRY(check_budget(plan, probe, &s.budget));
  const int64_t n = plan->layout.n_tokens;
  s.rows = probe < n ? probe : n;
  if (s.budget.verticals > n)
    s.budget.verticals = n;
  if (s.budget.slashes > n)
    s.budget.slashes = n;
  HALO_TRY(halo__probe_open(p, "select_vertical_slash", q, k, plan, ring, scale, s.rows));
  s.span = p->layout->block + p->lanes - 1;
  s.unit_scores = p->layout->per_rank * (p->layout->block + s.span);
  s.list_length = 2 + s.budget.verticals + s.budget.slashes;
  s.share = (p->chunk + p->world - 1) / p->world;
  HALO_TRY_GOTO(allocate(&s));
  place_rows(&s);
  HALO_TRY_GOTO(halo__probe_gather(p, q));
  for (int64_t unit = 0; unit < p->units; unit += p->chunk) {
    const int64_t left = p->units - unit;
    HALO_TRY_GOTO(select_chunk(&s, unit, left < p->chunk ? left : p->chunk));
  }
done:
  selection_free(&s);
  return status;
}
