/* test_plan.c: random builds replayed on the plan and on a plain dense mask, bit for bit. */
#include "plan_oracle.h"

#include "plan.h"

enum { CASES = 300 };
static const int32_t kinds[] = {HALO_LAYOUT_CONTIGUOUS, HALO_LAYOUT_ZIGZAG, HALO_LAYOUT_STRIPED};
static const int32_t worlds[] = {1, 2, 3, 4, 8};

static halo_layout *layout_of(int32_t kind, int64_t n, int32_t world, int64_t block) {
  halo_layout *l = NULL;
  CHECK_OK(halo_layout_new(&l, kind, n, world, block));
  return l;
}

/* visible() over all pairs; -1 when equal, else the first pair that differs. */
static int64_t first_difference(const oracle *o, const halo_plan *p) {
  for (int64_t b = 0; b < o->batch; b++) {
    for (int64_t h = 0; h < o->heads; h++) {
      for (int64_t i = 0; i < o->n; i++) {
        for (int64_t j = 0; j < o->n; j++) {
          const size_t at = oracle_at(o, b, h, i, j);
          if (halo_plan_visible(p, b, h, i, j) != o->mask[at]) return (int64_t)at;
        }
      }
    }
  }
  return -1;
}

static void visible_is_the_mask(void) {
  for (uint64_t seed = 1; seed <= CASES; seed++) {
    oracle o;
    oracle_make(&o, seed);
    halo_layout *l = layout_of(kinds[seed % 3], o.n, worlds[seed % 5], o.block);
    halo_plan *p = oracle_plan(&o, l, false);
    const int64_t where = first_difference(&o, p);
    CHECK(where == -1);
    if (where != -1) fprintf(stderr, "  seed %d, pair %d\n", (int)seed, (int)where);
    CHECK(!halo_plan_visible(p, 0, 0, o.n, 0) && !halo_plan_visible(p, 0, 0, 0, -1));
    CHECK(!halo_plan_visible(p, o.batch, 0, 0, 0) && !halo_plan_visible(p, 0, o.heads, 0, 0));
    halo_plan_free(p);
    halo_layout_free(l);
    oracle_free(&o);
  }
}

/* ---- Slices ------------------------------------------------------------------------------------ */

typedef struct replay {
  const oracle *o;
  const halo_layout *l;
  halo_plan *p;
  uint8_t *count;          /* [B, H, N, N] how often a pair was met */
  bool tidy;               /* runs ascend, do not touch without reason, no tile is empty or mislabelled */
} replay;

static bool token_test(const halo__tokens *q, int64_t b, int64_t t, int64_t key_position) {
  return q->first[b * q->first_stride + t] <= key_position && key_position <= q->position[t];
}

/* Rows must be sorted runs of at least one item, joined where they could be. */
static void check_rows(replay *c, const halo__rows *rows) {
  for (int64_t r = 0; r < rows->n_rows; r++) {
    for (int64_t i = rows->offset[r]; i < rows->offset[r + 1]; i++) {
      const halo__span run = rows->run[i];
      if (run.count < 1 || run.first < 0) c->tidy = false;
      if (i == rows->offset[r]) continue;
      const halo__span before = rows->run[i - 1];
      const int64_t end = before.first + before.count;
      if (run.first < end || (run.first == end && run.partial == before.partial)) c->tidy = false;
    }
  }
}

/* Meet one tile of rank r's query block and rank s's key block. */
static void meet_tile(replay *c, int64_t b, int64_t h, int32_t r, int64_t query, int32_t s,
                      int64_t key, bool partial) {
  const halo__tokens *q, *k;
  CHECK_OK(halo__plan_tokens(&q, c->p, r));
  CHECK_OK(halo__plan_tokens(&k, c->p, s));
  const int64_t g = c->o->block;
  int64_t seen = 0;
  for (int64_t t = query * g; t < (query + 1) * g; t++) {
    for (int64_t u = key * g; u < (key + 1) * g; u++) {
      const bool test = token_test(q, b, t, k->position[u]);
      seen += test;
      if (partial && !test) continue;
      if (q->position[t] >= c->o->n || k->position[u] >= c->o->n) {
        c->tidy = false;
      } else {
        c->count[oracle_at(c->o, b, h, q->position[t], k->position[u])]++;
      }
    }
  }
  if (seen == 0 || partial != (seen < g * g)) c->tidy = false;
}

static void replay_tiles(replay *c, bool by_key) {
  const int64_t per_rank = halo_layout_local_tokens(c->l) / c->o->block;
  for (int32_t r = 0; r < halo_layout_world(c->l); r++) {
    for (int32_t s = 0; s < halo_layout_world(c->l); s++) {
      const halo__slice *slice;
      CHECK_OK(halo__plan_slice(&slice, c->p, r, s));
      const halo__rows *rows = by_key ? &slice->by_key : &slice->by_query;
      int64_t tiles = 0;
      check_rows(c, rows);
      for (int64_t i = 0; i < rows->offset[rows->n_rows]; i++) tiles += rows->run[i].count;
      CHECK(tiles == slice->n_tiles && rows->n_rows == per_rank * halo__plan_patterns(c->p));
      for (int64_t u = 0; u < c->o->batch * c->o->heads; u++) {
        const int64_t base = halo__plan_pattern_of(c->p)[u] * per_rank;
        for (int64_t a = 0; a < per_rank; a++) {
          for (int64_t i = rows->offset[base + a]; i < rows->offset[base + a + 1]; i++) {
            const halo__span run = rows->run[i];
            for (int64_t x = run.first; x < run.first + run.count; x++) {
              meet_tile(c, u / c->o->heads, u % c->o->heads, r, by_key ? x : a, s, by_key ? a : x,
                        run.partial);
            }
          }
        }
      }
    }
  }
}

static void meet_column(replay *c, int64_t b, int64_t h, int32_t r, int64_t query, int64_t token,
                        bool partial) {
  const halo__tokens *q;
  CHECK_OK(halo__plan_tokens(&q, c->p, r));
  const int64_t g = c->o->block;
  int64_t seen = 0;
  for (int64_t t = query * g; t < (query + 1) * g; t++) {
    const bool test = token_test(q, b, t, token);
    seen += test;
    if (partial && !test) continue;
    if (q->position[t] >= c->o->n) {
      c->tidy = false;
    } else {
      c->count[oracle_at(c->o, b, h, q->position[t], token)]++;
    }
  }
  if (seen == 0 || partial != (seen < g)) c->tidy = false;
}

static void replay_columns(replay *c, bool by_column) {
  const int64_t per_rank = halo_layout_local_tokens(c->l) / c->o->block;
  const halo__columns *columns;
  CHECK_OK(halo__plan_columns(&columns, c->p));
  for (int32_t r = 0; r < halo_layout_world(c->l); r++) {
    const halo__column_slice *slice;
    CHECK_OK(halo__plan_column_slice(&slice, c->p, r));
    const halo__rows *rows = by_column ? &slice->by_column : &slice->by_query;
    check_rows(c, rows);
    for (int64_t u = 0; u < c->o->batch * c->o->heads; u++) {
      const int64_t pattern = halo__plan_pattern_of(c->p)[u];
      const int32_t *token = columns->token + columns->offset[pattern];
      const int64_t n = columns->offset[pattern + 1] - columns->offset[pattern];
      const int64_t base = by_column ? columns->offset[pattern] : pattern * per_rank;
      for (int64_t a = 0; a < (by_column ? n : per_rank); a++) {
        for (int64_t i = rows->offset[base + a]; i < rows->offset[base + a + 1]; i++) {
          const halo__span run = rows->run[i];
          for (int64_t x = run.first; x < run.first + run.count; x++) {
            meet_column(c, u / c->o->heads, u % c->o->heads, r, by_column ? x : a,
                        token[by_column ? a : x], run.partial);
          }
        }
      }
    }
  }
}

/* Every pair exactly as often as the mask says (0 or 1), forward and transposed. */
static void slices_rebuild_the_mask(void) {
  for (uint64_t seed = 1; seed <= CASES; seed++) {
    oracle o;
    oracle_make(&o, seed + 1000);
    const int32_t world = worlds[seed % 5];
    halo_layout *l = layout_of(kinds[seed % 3], o.n, world, o.block);
    halo_plan *p = oracle_plan(&o, l, false);
    const size_t size = (size_t)(o.batch * o.heads * o.n * o.n);
    replay c = {.o = &o, .l = l, .p = p, .count = malloc(size), .tidy = true};
    for (int32_t transposed = 0; transposed < 2; transposed++) {
      memset(c.count, 0, size);
      replay_tiles(&c, transposed);
      replay_columns(&c, transposed);
      const bool same = memcmp(c.count, o.mask, size) == 0;
      CHECK(same);
      CHECK(c.tidy);
      if (!same || !c.tidy) fprintf(stderr, "  seed %d, transposed %d\n", (int)seed, transposed);
    }
    free(c.count);
    halo_plan_free(p);
    halo_layout_free(l);
    oracle_free(&o);
  }
}

/* The gather lists name every column of every head once, with its owner and place. */
static void gather_finds_every_column(void) {
  for (uint64_t seed = 1; seed <= CASES / 3; seed++) {
    oracle o;
    oracle_make(&o, seed + 2000);
    o.heads = 4; /* heads beyond the oracle's requests still get the -1 ones */
    halo_layout *l = layout_of(kinds[seed % 3], o.n, worlds[seed % 5], o.block);
    halo_plan *p = oracle_plan(&o, l, false);
    const halo__columns *columns;
    CHECK_OK(halo__plan_columns(&columns, p));
    const halo__gather *first = NULL;
    for (int64_t kv = 1; kv <= 4; kv *= 2) {
      const halo__gather *g;
      CHECK_OK(halo__plan_gather(&g, p, kv));
      CHECK(g->n_groups == o.batch * kv && g->n_entries == g->offset[g->n_groups]);
      if (!first) first = g;
      bool right = true;
      int64_t used = 0;
      uint8_t *wanted = calloc((size_t)g->n_entries + 1, 1);
      for (int64_t u = 0; u < o.batch * 4; u++) {
        const int64_t pattern = halo__plan_pattern_of(p)[u], group = u / (4 / kv);
        const int64_t n = columns->offset[pattern + 1] - columns->offset[pattern];
        right = right && g->slot_offset[u + 1] - g->slot_offset[u] == n;
        for (int64_t i = 0; i < n; i++) {
          const int32_t at = g->slot[g->slot_offset[u] + i];
          right = right && at >= g->offset[group] && at < g->offset[group + 1] &&
                  g->token[at] == columns->token[columns->offset[pattern] + i];
          wanted[at] = 1;
        }
      }
      for (int64_t i = 0; i < g->n_entries; i++) {
        right = right && wanted[i] && halo_layout_global(l, g->owner[i], g->local[i]) == g->token[i];
      }
      for (int32_t r = 0; r < halo_layout_world(l); r++) {
        for (int64_t i = g->owned_offset[r]; i < g->owned_offset[r + 1]; i++, used++) {
          right = right && g->owner[g->owned[i]] == r;
          right = right && (i == g->owned_offset[r] || g->owned[i] > g->owned[i - 1]);
        }
      }
      CHECK(right && used == g->n_entries);
      free(wanted);
    }
    const halo__gather *again;
    CHECK_OK(halo__plan_gather(&again, p, 1));
    CHECK(again == first);
    CHECK_STATUS(halo__plan_gather(&again, p, 3), HALO_EARG);
    halo_plan_free(p);
    halo_layout_free(l);
    oracle_free(&o);
  }
}

int main(void) {
  RUN(visible_is_the_mask);
  RUN(slices_rebuild_the_mask);
  RUN(gather_finds_every_column);
  return check_report();
}
