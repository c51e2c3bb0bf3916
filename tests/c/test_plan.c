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
          if (halo_plan_visible(p, b, h, i, j) != o->mask[at])
            return (int64_t)at;
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
    if (where != -1)
      fprintf(stderr, "  seed %d, pair %d\n", (int)seed, (int)where);
    CHECK(!halo_plan_visible(p, 0, 0, o.n, 0) && !halo_plan_visible(p, 0, 0, 0, -1));
    CHECK(!halo_plan_visible(p, o.batch, 0, 0, 0) && !halo_plan_visible(p, 0, o.heads, 0, 0));
    halo_plan_free(p);
    halo_layout_free(l);
    oracle_free(&o);
  }
}

/* ---- Slices ------------------------------------------------------------------------------------
 */

typedef struct replay {
  const oracle *o;
  const halo_layout *l;
  halo_plan *p;
  uint8_t *count; /* [B, H, N, N] how often a pair was met */
  bool tidy;      /* runs ascend, do not touch without reason, no tile is empty or mislabelled */
} replay;

static bool token_test(const halo__tokens *q, int64_t b, int64_t t, int64_t key_position) {
  return q->first[b * q->first_stride + t] <= key_position && key_position <= q->position[t];
}

/* Rows must be sorted runs of at least one item, joined where they could be. */
static void check_rows(replay *c, const halo__rows *rows) {
  for (int64_t r = 0; r < rows->n_rows; r++) {
    for (int64_t i = rows->offset[r]; i < rows->offset[r + 1]; i++) {
      const halo__span run = rows->run[i];
      if (run.count < 1 || run.first < 0)
        c->tidy = false;
      if (i == rows->offset[r])
        continue;
      const halo__span before = rows->run[i - 1];
      const int64_t end = before.first + before.count;
      if (run.first < end || (run.first == end && run.partial == before.partial))
        c->tidy = false;
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
      if (partial && !test)
        continue;
      if (q->position[t] >= c->o->n || k->position[u] >= c->o->n) {
        c->tidy = false;
      } else {
        c->count[oracle_at(c->o, b, h, q->position[t], k->position[u])]++;
      }
    }
  }
  if (seen == 0 || partial != (seen < g * g))
    c->tidy = false;
}

static void replay_tiles(replay *c, bool by_key) {
  const int64_t per_rank = halo_layout_local_tokens(c->l) / c->o->block;
  for (int32_t r = 0; r < halo_layout_world(c->l); r++) {
    for (int32_t s = 0; s < halo_layout_world(c->l); s++) {
      const halo__slice *slice;
      CHECK_OK(halo__plan_slice(&slice, c->p, r, s));
      const halo__rows *rows = &slice->by_query;
      if (by_key) CHECK_OK(halo__plan_slice_by_key(&rows, c->p, r, s));
      int64_t tiles = 0;
      check_rows(c, rows);
      for (int64_t i = 0; i < rows->offset[rows->n_rows]; i++)
        tiles += rows->run[i].count;
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
    if (partial && !test)
      continue;
    if (q->position[t] >= c->o->n) {
      c->tidy = false;
    } else {
      c->count[oracle_at(c->o, b, h, q->position[t], token)]++;
    }
  }
  if (seen == 0 || partial != (seen < g))
    c->tidy = false;
}

static void replay_columns(replay *c, bool by_column) {
  const int64_t per_rank = halo_layout_local_tokens(c->l) / c->o->block;
  const halo__columns *columns;
  CHECK_OK(halo__plan_columns(&columns, c->p));
  for (int32_t r = 0; r < halo_layout_world(c->l); r++) {
    const halo__column_slice *slice;
    CHECK_OK(halo__plan_column_slice(&slice, c->p, r));
    const halo__rows *rows = &slice->by_query;
    if (by_column) CHECK_OK(halo__plan_columns_by_column(&rows, c->p, r));
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
      if (!same || !c.tidy)
        fprintf(stderr, "  seed %d, transposed %d\n", (int)seed, transposed);
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
      if (!first)
        first = g;
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
        right =
            right && wanted[i] && halo_layout_global(l, g->owner[i], g->local[i]) == g->token[i];
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

/* ---- Counts ------------------------------------------------------------------------------------
 */

static int64_t mask_pairs(const oracle *o, const uint8_t *mask, int64_t b, int64_t h) {
  int64_t n = 0;
  for (int64_t i = 0; i < o->n * o->n; i++)
    n += mask[oracle_at(o, b, h, 0, 0) + (size_t)i];
  return n;
}

static void density_is_the_count(void) {
  for (uint64_t seed = 1; seed <= CASES; seed++) {
    oracle o;
    oracle_make(&o, seed + 3000);
    halo_layout *l = layout_of(kinds[seed % 3], o.n, worlds[seed % 5], o.block);
    halo_plan *p = oracle_plan(&o, l, false);
    double sum_visible = 0, sum_all = 0, density, forced;
    bool dense = true;
    for (int64_t b = 0; b < o.batch; b++) {
      double all = 0;
      for (int64_t i = 0; i < o.n; i++) {
        for (int64_t j = 0; j <= i; j++)
          all += oracle_allowed(&o, b, i, j);
      }
      for (int64_t h = 0; h < o.heads; h++) {
        const double visible = (double)mask_pairs(&o, o.mask, b, h);
        const double chosen = (double)mask_pairs(&o, o.chosen, b, h);
        CHECK_OK(halo_plan_density(p, b, h, &density, &forced));
        CHECK(density == (all > 0 ? visible / all : 0));
        CHECK(forced == (visible > 0 ? (visible - chosen) / visible : 0));
        sum_visible += visible;
        sum_all += all;
        dense = dense && visible == all;
      }
    }
    CHECK_OK(halo_plan_density(p, -1, -1, &density, NULL));
    CHECK(density == (sum_all > 0 ? sum_visible / sum_all : 0));
    if (halo_plan_is_dense(p))
      CHECK(dense); /* columns may fill a plan that has not every tile */
    halo_plan_free(p);
    halo_layout_free(l);
    oracle_free(&o);
  }
}

/* Work counted on its own equals what the slices hold. */
static void work_is_what_slices_hold(void) {
  for (uint64_t seed = 1; seed <= CASES; seed++) {
    oracle o;
    oracle_make(&o, seed + 4000);
    const int32_t world = worlds[seed % 5];
    halo_layout *l = layout_of(kinds[seed % 3], o.n, world, o.block);
    halo_plan *p = oracle_plan(&o, l, false);
    const int64_t per_rank = halo_layout_local_tokens(l) / o.block, g = o.block;
    double work[8 * 9], expected;
    int32_t steps = 0;
    CHECK_OK(halo_plan_work(p, 16, work, 72, &steps));
    CHECK(steps == world + 1);
    bool right = true;
    for (int32_t r = 0; r < world; r++) {
      for (int32_t t = 0; t <= world; t++) {
        const halo__slice *slice;
        const halo__column_slice *columns;
        CHECK_OK(halo__plan_slice(&slice, p, r, (r - t + 2 * world) % world));
        CHECK_OK(halo__plan_column_slice(&columns, p, r));
        const halo__rows *rows = t < world ? &slice->by_query : &columns->by_query;
        int64_t items = 0;
        for (int64_t u = 0; u < o.batch * o.heads; u++) {
          const int64_t base = halo__plan_pattern_of(p)[u] * per_rank;
          for (int64_t i = rows->offset[base]; i < rows->offset[base + per_rank]; i++) {
            items += rows->run[i].count;
          }
        }
        expected = 4.0 * 16 * (double)(items * (t < world ? g * g : g));
        right = right && work[r * steps + t] == expected;
      }
    }
    CHECK(right);
    CHECK_STATUS(halo_plan_work(p, 16, work, world * steps - 1, NULL), HALO_EARG);
    halo_plan_free(p);
    halo_layout_free(l);
    oracle_free(&o);
  }
}

static void far_coverage_is_the_count(void) {
  for (uint64_t seed = 1; seed <= CASES; seed++) {
    oracle o;
    oracle_make(&o, seed + 5000);
    halo_layout *l = layout_of(kinds[seed % 3], o.n, 2, o.block);
    halo_plan *p = oracle_plan(&o, l, false);
    const int64_t far = oracle_random(o.n + 3), b = o.batch - 1;
    for (int64_t head = -1; head < o.heads; head++) {
      uint8_t reached[64] = {0}, expected[64] = {0};
      int64_t far_tokens = 0, missed = 0, far_out = -1, missed_out = -1;
      for (int64_t j = 0; j < o.n; j++) {
        bool has_far = false;
        for (int64_t i = j + far; i < o.n; i++) {
          has_far = has_far || oracle_allowed(&o, b, i, j);
          for (int64_t h = 0; h < o.heads; h++) {
            if (head < 0 || h == head)
              expected[j] |= o.mask[oracle_at(&o, b, h, i, j)];
          }
        }
        far_tokens += has_far;
        missed += has_far && !expected[j];
      }
      CHECK_OK(halo_plan_far_coverage(p, b, head, far, reached, &far_out, &missed_out));
      CHECK(far_out == far_tokens && missed_out == missed);
      CHECK(memcmp(reached, expected, sizeof reached) == 0);
    }
    halo_plan_free(p);
    halo_layout_free(l);
    oracle_free(&o);
  }
}

/* ---- Balance ------------------------------------------------------------------------------------
 */

typedef struct balance {
  double worker, step, critical;
} balance;

/* mtraining.md 2.4 at 1/8 of its length: N = 64K, G = 128, W = 32, 512 blocks, one head. */
static balance balance_of(int32_t kind, bool dense, int64_t near, int64_t slashes, bool columns) {
  halo_layout *l = layout_of(kind, 65536, 32, 128);
  halo_plan *p = NULL;
  balance r;
  CHECK_OK(halo_plan_new(&p, l, 1, 1));
  oracle_state = 5;
  if (dense)
    CHECK_OK(halo_plan_add_all(p, 0, 0));
  for (int64_t d = 0; d < near; d++)
    CHECK_OK(halo_plan_add_diagonals(p, 0, 0, &d, 1));
  for (int64_t k = 0; k < slashes; k++) {
    const int64_t d = near + oracle_random(512 - near);
    CHECK_OK(halo_plan_add_diagonals(p, 0, 0, &d, 1));
  }
  for (int64_t k = 0; columns && k < 512; k++) {
    const int64_t c = oracle_random(65536);
    CHECK_OK(halo_plan_add_columns(p, 0, 0, &c, 1));
  }
  CHECK_OK(halo_plan_force(p, columns ? 128 : 0, 0, 1));
  CHECK_OK(halo_plan_finish(p));
  CHECK_OK(halo_plan_balance(p, &r.worker, &r.step, &r.critical));
  halo_plan_free(p);
  halo_layout_free(l);
  fprintf(stderr, "  layout %d dense %d columns %d: worker %.3f step %.3f critical %.3f\n", kind,
          dense, columns, r.worker, r.step, r.critical);
  return r;
}

static void stripes_balance_slashes(void) {
  /* dense: zigzag exact, stripe within a block row (table: 1.00 / 1.01) */
  balance zigzag = balance_of(HALO_LAYOUT_ZIGZAG, true, 0, 0, false);
  balance stripe = balance_of(HALO_LAYOUT_STRIPED, true, 0, 0, false);
  balance plain = balance_of(HALO_LAYOUT_CONTIGUOUS, true, 0, 0, false);
  CHECK(zigzag.worker < 1.001 && stripe.worker < 1.08 && stripe.critical < 1.08);
  CHECK(plain.worker > 1.9);
  /* near diagonals, uniform far slashes, verticals with sinks: table 1.08/1.59/1.53, 1.01/1.05/1.03
   */
  zigzag = balance_of(HALO_LAYOUT_ZIGZAG, false, 8, 32, true);
  stripe = balance_of(HALO_LAYOUT_STRIPED, false, 8, 32, true);
  plain = balance_of(HALO_LAYOUT_CONTIGUOUS, false, 8, 32, true);
  CHECK(stripe.worker < 1.1 && stripe.step < 1.1 && stripe.critical < 1.1);
  CHECK(zigzag.step > 1.3 * stripe.step && zigzag.critical > 1.3 * stripe.critical);
  CHECK(plain.worker > 1.3);
}

/* Worked by hand: N = 4 blocks of 1 token, 2 ranks, contiguous, dense. Rank 0 has rows 0 1, rank 1
 * rows 2 3: own step 3 + 3 tiles, other step 0 + 4. */
static void imbalance_by_hand(void) {
  halo_layout *l = layout_of(HALO_LAYOUT_CONTIGUOUS, 4, 2, 1);
  halo_plan *p = NULL;
  double work[6], worker, step, critical;
  CHECK_OK(halo_plan_new(&p, l, 1, 2));
  CHECK_OK(halo_plan_add_all(p, -1, -1));
  CHECK_STATUS(halo_plan_balance(p, &worker, &step, &critical), HALO_ESTATE);
  CHECK_OK(halo_plan_finish(p));
  CHECK_OK(halo_plan_work(p, 1, work, 6, NULL));
  const double expected[6] = {24, 0, 0, 24, 32, 0}; /* 4 flops, 2 heads */
  CHECK(memcmp(work, expected, sizeof work) == 0);
  CHECK_OK(halo_plan_balance(p, &worker, &step, &critical));
  CHECK(worker == 7.0 / 5 && step == (1.0 + 2.0) / 2 && critical == 7.0 / 5);
  halo_plan_free(p);
  halo_layout_free(l);
}

/* ---- A plan as a value --------------------------------------------------------------------------
 */

static void hash_names_the_visible_set(void) {
  for (uint64_t seed = 1; seed <= CASES; seed++) {
    oracle o;
    oracle_make(&o, seed + 6000);
    halo_layout *one = layout_of(HALO_LAYOUT_CONTIGUOUS, o.n, 1, o.block);
    halo_layout *many = layout_of(HALO_LAYOUT_STRIPED, o.n, 4, o.block);
    halo_plan *p = oracle_plan(&o, one, false), *same = oracle_plan(&o, many, true);
    CHECK(halo_plan_hash(p) == halo_plan_hash(same));
    halo_plan_free(same);
    /* other numbers for the same documents */
    for (int64_t i = 0; i < o.batch * o.n; i++) {
      if (o.document[i] >= 0)
        o.document[i] = 7 * o.document[i] + 3;
    }
    same = oracle_plan(&o, many, false);
    CHECK(halo_plan_hash(p) == halo_plan_hash(same));
    halo_plan_free(same);
    /* one more column: another hash exactly when the mask changes */
    oracle more = o;
    more.op[more.n_ops++] =
        (oracle_op){.kind = ORACLE_COLUMNS, .batch = -1, .head = 0, .n = 1, .a = {o.n / 2}};
    oracle_fill(&more);
    const size_t size = (size_t)(o.batch * o.heads * o.n * o.n);
    const bool changed = memcmp(more.mask, o.mask, size) != 0;
    same = oracle_plan(&more, one, false);
    if (changed)
      CHECK(halo_plan_hash(p) != halo_plan_hash(same));
    free(more.mask);
    free(more.chosen);
    halo_plan_free(same);
    halo_plan_free(p);
    halo_layout_free(one);
    halo_layout_free(many);
    oracle_free(&o);
  }
}

/* A frozen plan on other documents is the plan built for them. */
static void selection_moves_to_other_documents(void) {
  for (uint64_t seed = 1; seed <= CASES; seed++) {
    oracle o;
    oracle_make(&o, seed + 7000);
    for (int k = 0; k < o.n_ops; k++) o.op[k].batch = -1; /* what all sequences chose alike */
    halo_layout *l = layout_of(kinds[seed % 3], o.n, worlds[seed % 5], o.block);
    halo_plan *p = oracle_plan(&o, l, false), *moved = NULL;
    oracle other = o;
    other.batch = 1 + oracle_random(3);
    other.with_documents = oracle_random(4) > 0;
    other.document = calloc((size_t)(other.batch * other.n), sizeof *other.document);
    for (int64_t i = 0; i < other.batch * other.n; i++) {
      other.document[i] = (int32_t)(i % other.n / (1 + other.n / 3));
    }
    oracle_fill(&other);
    const int32_t *documents = other.with_documents ? other.document : NULL;
    CHECK_OK(halo_plan_with_documents(&moved, p, other.batch, documents));
    halo_plan *built = oracle_plan(&other, l, false);
    CHECK(first_difference(&other, moved) == -1);
    CHECK(halo_plan_hash(moved) == halo_plan_hash(built));
    double a, b, c, d;
    CHECK_OK(halo_plan_density(moved, -1, -1, &a, &b));
    CHECK_OK(halo_plan_density(built, -1, -1, &c, &d));
    CHECK(a == c && b == d);
    halo_plan_free(built);
    halo_plan_free(moved);
    halo_plan_free(p);
    halo_layout_free(l);
    oracle_free(&other);
    oracle_free(&o);
  }
}

static void dense_is_one_pattern(void) {
  const int64_t n = 1 << 19, g = 64;
  halo_layout *l = layout_of(HALO_LAYOUT_STRIPED, n, 32, g);
  halo_plan *p = NULL;
  const int64_t before = halo_memory_live_bytes(HALO_CPU, HALO_TAG_PLAN);
  CHECK_OK(halo_plan_new(&p, l, 4, 64));
  CHECK_OK(halo_plan_add_all(p, -1, -1));
  const int64_t columns[] = {0, 1, 2};
  CHECK_OK(halo_plan_add_columns(p, 2, 5, columns, 3)); /* changes nothing */
  CHECK_OK(halo_plan_force(p, 4, 1000, 1));
  CHECK_OK(halo_plan_finish(p));
  CHECK(halo_plan_is_dense(p) && halo__plan_patterns(p) == 1);
  const halo__slice *slice;
  CHECK_OK(halo__plan_slice(&slice, p, 31, 0));
  const int64_t bytes = halo_memory_live_bytes(HALO_CPU, HALO_TAG_PLAN) - before;
  CHECK(bytes > 0 && bytes < 8 << 20); /* a tile list would be 64 heads x 128 MB */
  double density = 0, forced = 1;
  CHECK_OK(halo_plan_density(p, -1, -1, &density, &forced));
  CHECK(density == 1 && forced == 0);
  halo_plan_free(p);
  CHECK(halo_memory_live_bytes(HALO_CPU, HALO_TAG_PLAN) == before);
  halo_layout_free(l);
}

static void empty_plan_sees_nothing(void) {
  halo_layout *l = layout_of(HALO_LAYOUT_ZIGZAG, 50, 3, 8);
  halo_plan *p = NULL;
  CHECK_OK(halo_plan_new(&p, l, 1, 2));
  CHECK_OK(halo_plan_finish(p));
  double density = 1, forced = 1, worker = 0, step = 0, critical = 0;
  CHECK_OK(halo_plan_density(p, 0, 0, &density, &forced));
  CHECK(density == 0 && forced == 0);
  CHECK_OK(halo_plan_balance(p, &worker, &step, &critical));
  CHECK(worker == 1 && step == 1 && critical == 1);
  const halo__slice *slice;
  const halo__column_slice *columns;
  for (int32_t s = 0; s < 3; s++) {
    CHECK_OK(halo__plan_slice(&slice, p, 1, s));
    CHECK(slice->n_tiles == 0 && slice->by_query.offset[slice->by_query.n_rows] == 0);
  }
  CHECK_OK(halo__plan_column_slice(&columns, p, 1));
  CHECK(columns->n_pairs == 0);
  halo_plan_free(p);
  halo_layout_free(l);
}

static void lists_and_text_read_back(void) {
  halo_layout *l = layout_of(HALO_LAYOUT_STRIPED, 128, 2, 8);
  halo_plan *p = NULL, *held = NULL;
  const int64_t distances[] = {9, 2, 2, 3}, tokens[] = {70, 5, 70, 0};
  CHECK_OK(halo_plan_new(&p, l, 1, 2));
  CHECK_OK(halo_plan_add_diagonals(p, -1, 1, distances, 4));
  CHECK_OK(halo_plan_add_columns(p, -1, 1, tokens, 4));
  char text[4096];
  CHECK(halo_plan_explain(p, 0, 1, text, sizeof text) > 0 && strstr(text, "not finished"));
  CHECK_OK(halo_plan_force(p, 2, 0, 1));
  CHECK_OK(halo_plan_finish(p));
  CHECK_OK(halo_plan_retain(&held, p));
  halo_plan_free(p);
  int64_t out[8], n = 0;
  CHECK_OK(halo_plan_diagonals(held, 0, 1, out, 8, &n)); /* chosen: without the forced 0 */
  CHECK(n == 3 && out[0] == 2 && out[1] == 3 && out[2] == 9);
  CHECK_OK(halo_plan_columns(held, 0, 1, out, 2, &n));
  CHECK(n == 3 && out[0] == 0 && out[1] == 5);
  CHECK_OK(halo_plan_columns(held, 0, 0, out, 2, &n));
  CHECK(n == 0);
  const int64_t wanted = halo_plan_explain(held, 0, 1, text, sizeof text);
  CHECK(wanted == (int64_t)strlen(text) && wanted < (int64_t)sizeof text);
  CHECK(strstr(text, "3 of 16 diagonals: 2-3 9; 3 columns: 0 5 70; 0 tiles"));
  CHECK(strstr(text, "sink 2, window 0 tokens, diagonal yes"));
  CHECK(strstr(text, "striped over 2 ranks"));
  char small[20];
  memset(small, 'x', sizeof small);
  CHECK(halo_plan_explain(held, 0, 1, small, 10) == wanted);
  CHECK(strncmp(small, text, 9) == 0 && small[9] == 0 && small[10] == 'x');
  CHECK(halo_plan_explain(held, 0, 1, NULL, 0) == wanted);
  CHECK(halo_plan_explain(held, -1, -1, text, sizeof text) > 0 && strstr(text, "all heads"));
  halo_plan_free(held);
  halo_layout_free(l);
}

static void wrong_requests_are_refused(void) {
  halo_layout *l = layout_of(HALO_LAYOUT_STRIPED, 30, 2, 8);
  halo_plan *p = NULL;
  double d;
  const int64_t bad[] = {0, 4}, token[] = {30}, good[] = {1};
  CHECK_STATUS(halo_plan_new(&p, l, 0, 2), HALO_EARG);
  CHECK_STATUS(halo_plan_new(&p, NULL, 1, 2), HALO_EARG);
  CHECK_OK(halo_plan_new(&p, l, 1, 2));
  CHECK_STATUS(halo_plan_add_diagonals(p, 0, 0, bad, 2), HALO_EARG);
  CHECK(strstr(halo_error_message(), "block distance 4 (entry 1), wanted 0 to 3"));
  CHECK_STATUS(halo_plan_add_columns(p, 0, 0, token, 1), HALO_EARG);
  CHECK_STATUS(halo_plan_add_tiles(p, 0, 0, good, bad + 1, 1), HALO_EARG);
  CHECK_STATUS(halo_plan_add_all(p, 1, 0), HALO_EARG);
  CHECK_STATUS(halo_plan_add_all(p, 0, 2), HALO_EARG);
  CHECK_STATUS(halo_plan_add_columns(p, 0, 0, NULL, 1), HALO_EARG);
  CHECK_STATUS(halo_plan_force(p, -1, 0, 0), HALO_EARG);
  CHECK_STATUS(halo_plan_density(p, 0, 0, &d, NULL), HALO_ESTATE);
  CHECK_STATUS(halo_plan_density(NULL, 0, 0, &d, NULL), HALO_EARG);
  CHECK(halo_plan_hash(p) == 0 && !halo_plan_visible(p, 0, 0, 0, 0));
  const halo__slice *slice;
  CHECK_STATUS(halo__plan_slice(&slice, p, 0, 0), HALO_ESTATE);
  int32_t document[30] = {0};
  for (int32_t i = 10; i < 20; i++)
    document[i] = 4;
  CHECK_OK(halo_plan_set_documents(p, document)); /* 0 comes back after 4 */
  CHECK_STATUS(halo_plan_finish(p), HALO_EARG);
  CHECK(strstr(halo_error_message(), "document 0 of sequence 0 comes back"));
  CHECK_OK(halo_plan_set_documents(p, NULL)); /* still usable */
  CHECK_OK(halo_plan_finish(p));
  CHECK_STATUS(halo_plan_finish(p), HALO_ESTATE);
  CHECK_STATUS(halo_plan_add_all(p, 0, 0), HALO_ESTATE);
  CHECK_STATUS(halo_plan_density(p, 1, 0, &d, NULL), HALO_EARG);
  CHECK_STATUS(halo__plan_slice(&slice, p, 2, 0), HALO_EARG);
  halo_plan_free(p);
  halo_plan_free(NULL);
  halo_layout_free(l);
}

/* Everything one rank asks of a plan; stops at the first failure. */
static halo_status use_plan(const oracle *o, const halo_layout *l) {
  halo_plan *p = NULL;
  halo_status status = halo_plan_new(&p, l, o->batch, o->heads);
  if (status == HALO_OK && o->with_documents)
    status = halo_plan_set_documents(p, o->document);
  for (int k = 0; k < o->n_ops && status == HALO_OK; k++) {
    const oracle_op *op = &o->op[k];
    status = op->kind == ORACLE_COLUMNS
                 ? halo_plan_add_columns(p, op->batch, op->head, op->a, op->n)
                 : halo_plan_add_tiles(p, op->batch, op->head, op->a, op->b, op->n);
  }
  if (status == HALO_OK)
    status = halo_plan_force(p, 2, 3, 1);
  if (status == HALO_OK)
    status = halo_plan_finish(p);
  const halo__slice *slice;
  const halo__column_slice *columns;
  const halo__gather *gather;
  const halo__tokens *tokens;
  const halo__rows *rows;
  double worker;
  if (status == HALO_OK)
    status = halo__plan_slice(&slice, p, 1, 0);
  if (status == HALO_OK)
    status = halo__plan_column_slice(&columns, p, 0);
  if (status == HALO_OK)
    status = halo__plan_slice_by_key(&rows, p, 1, 0);
  if (status == HALO_OK)
    status = halo__plan_columns_by_column(&rows, p, 0);
  if (status == HALO_OK)
    status = halo__plan_gather(&gather, p, 1);
  if (status == HALO_OK)
    status = halo__plan_tokens(&tokens, p, 1);
  if (status == HALO_OK)
    status = halo_plan_balance(p, &worker, NULL, NULL);
  halo_plan_free(p);
  return status;
}

/* Allocations fail one by one until the work succeeds; nothing leaks on the way. */
static void out_of_memory_leaves_nothing(void) {
  oracle o;
  oracle_make(&o, 9);
  for (int k = 0; k < o.n_ops; k++)
    o.op[k].kind = k % 2 ? ORACLE_COLUMNS : ORACLE_TILES;
  const int64_t nb = (o.n - 1) / o.block + 1;
  for (int k = 0; k < o.n_ops; k++) {
    for (int64_t x = 0; x < o.op[k].n; x++)
      o.op[k].a[x] %= nb;
  }
  halo_layout *l = layout_of(HALO_LAYOUT_STRIPED, o.n, 2, o.block);
  const int64_t before = halo_memory_live_bytes(HALO_CPU, -1);
  halo_status status = HALO_ENOMEM;
  int64_t failures = 0;
  for (; status != HALO_OK && failures < 1000; failures++) {
    halo_memory_fail_after(failures);
    status = use_plan(&o, l);
    if (status != HALO_OK)
      CHECK(status == HALO_ENOMEM);
    CHECK(halo_memory_live_bytes(HALO_CPU, -1) == before);
  }
  halo_memory_fail_after(-1);
  CHECK(status == HALO_OK && failures > 20);
  halo_layout_free(l);
  oracle_free(&o);
}

int main(void) {
  RUN(visible_is_the_mask);
  RUN(slices_rebuild_the_mask);
  RUN(gather_finds_every_column);
  RUN(density_is_the_count);
  RUN(work_is_what_slices_hold);
  RUN(far_coverage_is_the_count);
  RUN(stripes_balance_slashes);
  RUN(imbalance_by_hand);
  RUN(hash_names_the_visible_set);
  RUN(selection_moves_to_other_documents);
  RUN(dense_is_one_pattern);
  RUN(empty_plan_sees_nothing);
  RUN(lists_and_text_read_back);
  RUN(wrong_requests_are_refused);
  RUN(out_of_memory_leaves_nothing);
  return check_report();
}
