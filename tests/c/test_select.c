/* test_select.c: the plan of W ranks is the plan of one, and it is the one the definition asks for;
 * recall against a plain softmax. */
#include <stdbool.h>

#include "check.h"
#include "plan.h"
#include "probe.h"

static const int32_t kinds[] = {HALO_LAYOUT_CONTIGUOUS, HALO_LAYOUT_ZIGZAG, HALO_LAYOUT_STRIPED};
static const int32_t worlds[] = {1, 2, 3, 4, 8};

/* One problem in global order. */
typedef struct problem {
  int64_t batch, n, heads, kv_heads, size, block;
  int64_t probe, verticals, slashes;
  double mass_vertical, mass_slash, scale;
  int32_t dtype;
  bool with_documents;
  uint64_t seed;
} problem;

static const problem plain = {.batch = 2,
                              .n = 83,
                              .heads = 4,
                              .kv_heads = 2,
                              .size = 20,
                              .block = 8,
                              .probe = 11,
                              .verticals = 9,
                              .slashes = 7,
                              .scale = 0.4,
                              .dtype = HALO_F32,
                              .seed = 3};

static double element(const problem *p, uint64_t stream, int64_t i) {
  return 4 * halo_random_uniform(p->seed, stream, (uint64_t)i) - 2;
}

static int32_t *documents_of(const problem *p) {
  int32_t *id = malloc((size_t)(p->batch * p->n) * sizeof *id);
  for (int64_t i = 0; i < p->batch * p->n; i++) {
    const int64_t b = i / p->n, t = i % p->n;
    id[i] = t < p->n / 3 ? 1 : t < p->n - 5 - 20 * b ? 2 : 3; /* the probe spans two documents */
    if (b == 1 && t >= p->n - 3)
      id[i] = -1; /* and a padded end */
  }
  return id;
}

/* A tensor of all ranks' tokens stacked in rank order; padding is NaN so that a leak shows. */
static halo_tensor *stacked(const problem *p, const halo_layout *l, uint64_t stream,
                            int64_t heads) {
  const int64_t local = halo_layout_local_tokens(l), tokens = halo_layout_world(l) * local;
  const int64_t shape[4] = {p->batch, tokens, heads, p->size}, row = heads * p->size;
  double *x = malloc((size_t)(p->batch * tokens * row) * sizeof *x);
  for (int64_t b = 0; b < p->batch; b++) {
    for (int64_t t = 0; t < tokens; t++) {
      const int64_t global = halo_layout_global(l, (int32_t)(t / local), t % local);
      for (int64_t e = 0; e < row; e++) {
        x[(b * tokens + t) * row + e] =
            global < p->n ? element(p, stream, (b * p->n + global) * row + e) : NAN;
      }
    }
  }
  halo_tensor *wide = NULL, *t = NULL;
  CHECK_OK(halo_tensor_from(&wide, HALO_F64, HALO_CPU, 4, shape, x));
  CHECK_OK(halo_tensor_new(&t, p->dtype, HALO_CPU, 4, shape));
  CHECK_OK(halo_tensor_copy(t, wide));
  halo_tensor_free(wide);
  free(x);
  return t;
}

/* A world to run in. */
typedef struct world {
  halo_comm *comm;
  halo_ring *ring;
  halo_layout *layout;
  halo_tensor *q, *k;
} world;

static world world_new(const problem *p, int32_t kind, int32_t ranks) {
  world w = {0};
  CHECK_OK(ranks == 1 ? halo_comm_self(&w.comm) : halo_comm_local(&w.comm, ranks));
  CHECK_OK(halo_ring_new(&w.ring, w.comm, HALO_SCHEDULE_FLAT, 1));
  CHECK_OK(halo_layout_new(&w.layout, kind, p->n, ranks, p->block));
  w.q = stacked(p, w.layout, 1, p->heads);
  w.k = stacked(p, w.layout, 2, p->kv_heads);
  return w;
}

static void world_free(world *w) {
  halo_tensor_free(w->q);
  halo_tensor_free(w->k);
  halo_layout_free(w->layout);
  halo_ring_free(w->ring);
  halo_comm_free(w->comm);
}

static halo_status try_select(halo_plan *plan, const problem *p, const world *w) {
  return halo_select_vertical_slash(plan, w->q, w->k, w->ring, p->scale, p->probe, p->verticals,
                                    p->slashes, p->mass_vertical, p->mass_slash);
}

static halo_plan *selected(const problem *p, const world *w) {
  halo_plan *plan = NULL;
  CHECK_OK(halo_plan_new(&plan, w->layout, p->batch, p->heads));
  if (p->with_documents) {
    int32_t *id = documents_of(p);
    CHECK_OK(halo_plan_set_documents(plan, id));
    free(id);
  }
  CHECK_OK(try_select(plan, p, w));
  CHECK_OK(halo_plan_finish(plan));
  return plan;
}

/* ---- W ranks are one rank
 * ------------------------------------------------------------------------ */

static void check_worlds(const problem *p) {
  world one = world_new(p, HALO_LAYOUT_CONTIGUOUS, 1);
  halo_plan *expected = selected(p, &one);
  for (size_t kind = 0; kind < 3; kind++) {
    for (size_t i = 0; i < 5; i++) {
      world w = world_new(p, kinds[kind], worlds[i]);
      halo_plan *plan = selected(p, &w);
      CHECK(halo_plan_hash(plan) == halo_plan_hash(expected));
      halo_plan_free(plan);
      world_free(&w);
    }
  }
  halo_plan_free(expected);
  world_free(&one);
}

static void plans_do_not_depend_on_ranks(void) {
  static const int32_t dtypes[] = {HALO_F32, HALO_F64, HALO_BF16};
  for (size_t d = 0; d < 3; d++) {
    for (int32_t documents = 0; documents < 2; documents++) {
      problem p = plain;
      p.dtype = dtypes[d];
      p.with_documents = documents;
      check_worlds(&p);
      p.mass_vertical = 0.6;
      p.mass_slash = 0.7;
      p.verticals = p.slashes = p.n;
      check_worlds(&p);
    }
  }
  problem odd = plain; /* one token per block, fewer tokens than probe rows and ranks, one head */
  odd.n = 5;
  odd.block = 1;
  odd.heads = odd.kv_heads = 1;
  check_worlds(&odd);
  odd = plain; /* blocks longer than the sequence */
  odd.block = 128;
  check_worlds(&odd);
  odd = plain; /* many chunks of heads, not a multiple of the ranks */
  odd.heads = 6;
  halo__probe_work_bytes = 1;
  check_worlds(&odd);
  halo__probe_work_bytes = 128 * 16 * 4 * 5; /* about five units */
  check_worlds(&odd);
  halo__probe_work_bytes = INT64_C(256) << 20;
}

/* ---- The definition ----------------------------------------------------------------------------
 */

/* Probabilities of one head's probe rows, plainly: row r of [rows, n]; token[r] is the query. */
static int64_t plain_rows(const problem *p, const int32_t *id, int64_t b, int64_t h, double *prob,
                          int64_t *token) {
  int64_t end = p->n - 1;
  while (id && id[b * p->n + end] < 0)
    end--;
  int64_t rows = 0;
  for (int64_t i = end - p->probe + 1; i <= end; i++) {
    if (i < 0)
      continue;
    double sum = 0, *row = prob + rows * p->n;
    for (int64_t j = 0; j < p->n; j++) {
      double z = 0;
      const int64_t kv = h / (p->heads / p->kv_heads);
      for (int64_t d = 0; d < p->size; d++) {
        z += element(p, 1, ((b * p->n + i) * p->heads + h) * p->size + d) *
             element(p, 2, ((b * p->n + j) * p->kv_heads + kv) * p->size + d);
      }
      const bool seen = j <= i && (!id || id[b * p->n + i] == id[b * p->n + j]);
      row[j] = seen ? exp(p->scale * z) : 0;
      sum += row[j];
    }
    for (int64_t j = 0; j < p->n; j++)
      row[j] /= sum;
    token[rows++] = i;
  }
  return rows;
}

/* How many of the scores are larger than s[x], or equal with a lower index. */
static int64_t rank_of(const double *s, int64_t n, int64_t x) {
  int64_t above = 0;
  for (int64_t i = 0; i < n; i++)
    above += s[i] > s[x] || (s[i] == s[x] && i < x);
  return above;
}

/* Entries chosen by the definition, as marks over 0..n-1. */
static void plain_choice(uint8_t *mark, const double *s, int64_t n, int64_t most, double mass) {
  double total = 0;
  for (int64_t i = 0; i < n; i++)
    total += s[i];
  for (int64_t i = 0; i < n; i++) {
    double before = 0; /* the sum of everything ahead of i */
    for (int64_t j = 0; j < n; j++)
      before += rank_of(s, n, j) < rank_of(s, n, i) ? s[j] : 0;
    mark[i] = rank_of(s, n, i) < most && (mass == 0 || before < mass * total);
  }
}

static void check_head(const problem *p, const halo_plan *plan, const int32_t *id, int64_t b,
                       int64_t h) {
  const int64_t n = p->n, nb = (n - 1) / p->block + 1;
  double *prob = malloc((size_t)(p->probe * n) * sizeof *prob);
  double *column = calloc((size_t)n, sizeof *column), *slash = calloc((size_t)n, sizeof *slash);
  uint8_t *columns = malloc((size_t)n), *slashes = malloc((size_t)n);
  int64_t token[64], list[128], count = 0;
  const int64_t rows = plain_rows(p, id, b, h, prob, token);
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t j = 0; j <= token[r]; j++) {
      column[j] += prob[r * n + j];
      slash[token[r] - j] += prob[r * n + j];
    }
  }
  plain_choice(columns, column, n, p->verticals, p->mass_vertical);
  plain_choice(slashes, slash, n, p->slashes, p->mass_slash);
  CHECK_OK(halo_plan_columns(plan, b, h, list, 128, &count));
  int64_t wanted = 0;
  bool same = true;
  for (int64_t j = 0; j < n; j++)
    wanted += columns[j];
  for (int64_t i = 0; i < count; i++)
    same = same && columns[list[i]];
  CHECK(same && count == wanted && wanted > 0);
  /* a block distance is chosen when some pair at a chosen offset lies in such a tile */
  CHECK_OK(halo_plan_diagonals(plan, b, h, list, 128, &count));
  uint8_t distance[128] = {0};
  for (int64_t i = 0; i < nb * p->block; i++) {
    for (int64_t j = 0; j <= i; j++) {
      if (i - j < n && slashes[i - j])
        distance[i / p->block - j / p->block] = 1;
    }
  }
  wanted = 0;
  same = true;
  for (int64_t d = 0; d < nb; d++)
    wanted += distance[d];
  for (int64_t i = 0; i < count; i++)
    same = same && distance[list[i]];
  CHECK(same && count == wanted && wanted > 0);
  free(prob);
  free(column);
  free(slash);
  free(columns);
  free(slashes);
}

static void plans_are_what_the_definition_asks(void) {
  for (int32_t c = 0; c < 8; c++) {
    problem p = plain;
    p.dtype = HALO_F64;
    p.seed = (uint64_t)(20 + c);
    p.with_documents = c & 1;
    if (c & 2)
      p.mass_vertical = 0.5, p.mass_slash = 0.2, p.verticals = p.slashes = p.n;
    if (c & 4)
      p.verticals = 3, p.block = 5;
    world w = world_new(&p, HALO_LAYOUT_STRIPED, 3);
    halo_plan *plan = selected(&p, &w);
    int32_t *id = p.with_documents ? documents_of(&p) : NULL;
    for (int64_t b = 0; b < p.batch; b++) {
      for (int64_t h = 0; h < p.heads; h++)
        check_head(&p, plan, id, b, h);
    }
    free(id);
    halo_plan_free(plan);
    world_free(&w);
  }
}

/* All keys equal: every score ties, so the lowest indices win. */
static void ties_go_to_the_lower_index(void) {
  const int64_t shape[4] = {1, 64, 1, 16};
  halo_tensor *x = NULL;
  halo_plan *plan = NULL;
  problem p = plain;
  p.n = 64;
  world w = world_new(&p, HALO_LAYOUT_STRIPED, 1);
  CHECK_OK(halo_tensor_zeros(&x, HALO_F32, HALO_CPU, 4, shape));
  CHECK_OK(halo_plan_new(&plan, w.layout, 1, 1));
  /* one probe row: all columns and all offsets weigh 1/64 */
  CHECK_OK(halo_select_vertical_slash(plan, x, x, w.ring, 1, 1, 5, 9, 0, 0));
  CHECK_OK(halo_plan_finish(plan));
  int64_t list[16], n = 0;
  CHECK_OK(halo_plan_columns(plan, 0, 0, list, 16, &n));
  CHECK(n == 5 && list[0] == 0 && list[4] == 4);
  CHECK_OK(halo_plan_diagonals(plan, 0, 0, list, 16, &n)); /* offsets 0..8: distances 0, 1 */
  CHECK(n == 2 && list[0] == 0 && list[1] == 1);
  halo_plan_free(plan);
  halo_tensor_free(x);
  world_free(&w);
}

static void everything_selected_is_dense(void) {
  problem p = plain;
  p.verticals = 0;
  p.slashes = p.n;
  world w = world_new(&p, HALO_LAYOUT_ZIGZAG, 2);
  halo_plan *plan = selected(&p, &w);
  CHECK(halo_plan_is_dense(plan));
  halo_plan_free(plan);
  p.mass_slash = 1e-9; /* the crossing entry stays: one offset, not none */
  plan = selected(&p, &w);
  int64_t list[128], n = 0;
  CHECK_OK(halo_plan_diagonals(plan, 0, 0, list, 128, &n));
  CHECK(n == 1 || n == 2);
  halo_plan_free(plan);
  world_free(&w);
}

/* ---- Refusals
 * ------------------------------------------------------------------------------------ */

static void wrong_inputs_are_refused(void) {
  world w = world_new(&plain, HALO_LAYOUT_STRIPED, 2);
  halo_plan *plan = NULL, *narrow = NULL;
  CHECK_OK(halo_plan_new(&plan, w.layout, plain.batch, plain.heads));
  CHECK_OK(halo_plan_new(&narrow, w.layout, plain.batch, plain.heads - 1));
  CHECK_STATUS(try_select(narrow, &plain, &w), HALO_EARG);
  CHECK(strstr(halo_error_message(), "plan and ring have [2,96,3,D]"));
  CHECK_STATUS(halo_select_vertical_slash(plan, w.k, w.k, w.ring, 1, 4, 1, 1, 0, 0), HALO_EARG);
  CHECK_STATUS(halo_select_vertical_slash(plan, NULL, w.k, w.ring, 1, 4, 1, 1, 0, 0), HALO_EARG);
  problem p = plain;
  p.probe = 0;
  CHECK_STATUS(try_select(plan, &p, &w), HALO_EARG);
  p = plain;
  p.verticals = -1;
  CHECK_STATUS(try_select(plan, &p, &w), HALO_EARG);
  p = plain;
  p.mass_slash = 1.5;
  CHECK_STATUS(try_select(plan, &p, &w), HALO_EARG);
  double recall[8];
  CHECK_STATUS(halo_attention_recall(recall, w.q, w.k, plan, w.ring, 1, 4, 1, 1), HALO_ESTATE);
  CHECK_OK(halo_plan_finish(plan));
  CHECK_STATUS(try_select(plan, &plain, &w), HALO_ESTATE);
  CHECK_STATUS(halo_attention_recall(recall, w.q, w.k, plan, w.ring, 1, 0, 1, 1), HALO_EARG);
  halo_plan_free(plan);
  /* not finite: said, not selected from */
  CHECK_OK(halo_plan_new(&plan, w.layout, plain.batch, plain.heads));
  CHECK_OK(halo_tensor_set(w.k, 0, NAN)); /* token 0, batch 0, kv head 0 */
  CHECK_STATUS(try_select(plan, &plain, &w), HALO_ENUMERIC);
  CHECK(strstr(halo_error_message(), "batch 0, head 0"));
  halo_plan_free(plan);
  halo_plan_free(narrow);
  world_free(&w);
}

static void out_of_memory_leaves_nothing(void) {
  problem p = plain;
  world w = world_new(&p, HALO_LAYOUT_STRIPED, 2);
  halo_plan_free(selected(&p, &w)); /* the communicator keeps what its first messages needed */
  const int64_t before = halo_memory_live_bytes(HALO_CPU, -1);
  halo_status status = HALO_ENOMEM;
  int64_t failures = 0;
  for (; status != HALO_OK && failures < 1000; failures++) {
    halo_plan *plan = NULL;
    CHECK_OK(halo_plan_new(&plan, w.layout, p.batch, p.heads));
    halo_memory_fail_after(failures);
    status = try_select(plan, &p, &w);
    double recall[4];
    if (status == HALO_OK)
      status = halo_plan_finish(plan);
    if (status == HALO_OK) {
      status = halo_attention_recall(recall, w.q, w.k, plan, w.ring, 1, 3, 1, 1);
    }
    halo_memory_fail_after(-1);
    CHECK(status == HALO_OK || status == HALO_ENOMEM);
    halo_plan_free(plan);
    CHECK(halo_memory_live_bytes(HALO_CPU, -1) == before);
  }
  CHECK(status == HALO_OK && failures > 30);
  world_free(&w);
}

/* ---- Recall -------------------------------------------------------------------------------------
 */

static void recall_is_the_kept_share(void) {
  problem p = plain;
  p.dtype = HALO_F64;
  const int64_t samples = 6;
  for (int32_t documents = 0; documents < 2; documents++) {
    p.with_documents = documents;
    int32_t *id = documents ? documents_of(&p) : NULL;
    double one[4] = {0};
    for (size_t i = 0; i < 5; i++) {
      world w = world_new(&p, kinds[i % 3], worlds[i]);
      halo_plan *plan = selected(&p, &w);
      double recall[4];
      CHECK_OK(halo_attention_recall(recall, w.q, w.k, plan, w.ring, p.scale, samples, 5, 9));
      if (i == 0)
        memcpy(one, recall, sizeof one);
      for (int64_t h = 0; h < 4; h++) {
        CHECK(fabs(recall[h] - one[h]) < 1e-14);
        double expected = 0;
        for (int64_t b = 0; b < p.batch; b++) {
          int64_t valid = 0;
          while (valid < p.n && !(id && id[b * p.n + valid] < 0))
            valid++;
          for (int64_t s = 0; s < samples; s++) {
            const double u = halo_random_uniform(5, 9, (uint64_t)((b * p.heads + h) * samples + s));
            problem row = p;
            row.probe = 1;
            row.n = (int64_t)(u * (double)valid) + 1; /* the row as the end of a shorter sequence */
            double all = 0, kept = 0;
            const int64_t i_row = row.n - 1, kv = h / 2;
            for (int64_t j = 0; j <= i_row; j++) {
              if (id && id[b * p.n + j] != id[b * p.n + i_row])
                continue;
              double z = 0;
              for (int64_t d = 0; d < p.size; d++) {
                z += element(&p, 1, ((b * p.n + i_row) * p.heads + h) * p.size + d) *
                     element(&p, 2, ((b * p.n + j) * p.kv_heads + kv) * p.size + d);
              }
              all += exp(p.scale * z);
              if (halo_plan_visible(plan, b, h, i_row, j))
                kept += exp(p.scale * z);
            }
            expected += kept / all / (double)(samples * p.batch);
          }
        }
        CHECK(fabs(recall[h] - expected) < 1e-12 && expected > 0 && expected <= 1);
      }
      halo_plan_free(plan);
      CHECK_OK(halo_plan_new(&plan, w.layout, p.batch, p.heads));
      CHECK_OK(halo_plan_add_all(plan, -1, -1));
      CHECK_OK(halo_plan_finish(plan));
      CHECK_OK(halo_attention_recall(recall, w.q, w.k, plan, w.ring, p.scale, samples, 5, 9));
      for (int64_t h = 0; h < 4; h++)
        CHECK(recall[h] == 1);
      halo_plan_free(plan);
      world_free(&w);
    }
    free(id);
  }
}

int main(void) {
  RUN(plans_do_not_depend_on_ranks);
  RUN(plans_are_what_the_definition_asks);
  RUN(ties_go_to_the_lower_index);
  RUN(everything_selected_is_dense);
  RUN(wrong_inputs_are_refused);
  RUN(out_of_memory_leaves_nothing);
  RUN(recall_is_the_kept_share);
  return check_report();
}
