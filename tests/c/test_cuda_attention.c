/* Attention on CUDA as the ring uses it, kernel by kernel, against the CPU twins in fp64 on the same values:
 * tiles of every step of a ring and gathered columns, forward and backward, over plans (dense, documents,
 * diagonals and columns, tiles by head), layouts, head and block sizes, dtypes, and every family of kernels
 * that serves the case (HALO_ATTENTION); outputs are NaN before. Then attention against a cache, and the
 * probes of selection. */
#include "check.h"
#include "kernels.h"
#include "plan.h"

#ifndef HALO_WITH_CUDA

int main(void) {
  printf("1 pending: built without CUDA\n");
  return 0;
}

#else

typedef enum plan_kind { DENSE, DOCUMENTS, SPARSE, MIXED, COLUMNS } plan_kind;

typedef struct test_case {
  int64_t B, H, Hk, D, G, N;
  int32_t W, layout;
  plan_kind plan;
} test_case;

static uint64_t dice_state = 17;
static uint64_t dice(uint64_t n) { return halo_random_u64(9, dice_state++, 3) % n; }

/* ---- values ---- */

static float bf16_round(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  memcpy(&x, &bits, 4);
  return x;
}

static double *sample(int64_t n, double magnitude) {
  double *x = malloc((size_t)n * 8);
  dice_state++;
  for (int64_t i = 0; i < n; i++) { // sums of four uniforms: close to normal; exact in every dtype
    double sum = 0;
    for (uint64_t j = 0; j < 4; j++) sum += halo_random_uniform(21, dice_state, (uint64_t)i * 4 + j) - 0.5;
    x[i] = bf16_round((float)(sum * 1.7 * magnitude));
  }
  return x;
}

static void put(halo_dtype t, void *bytes, int64_t i, double x) {
  const float f = (float)x;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (t == HALO_F64) ((double *)bytes)[i] = x;
  if (t == HALO_F32) ((float *)bytes)[i] = f;
  if (t == HALO_BF16) ((uint16_t *)bytes)[i] = (uint16_t)(bits >> 16);
}

static double get(halo_dtype t, const void *bytes, int64_t i) {
  if (t == HALO_F64) return ((const double *)bytes)[i];
  if (t == HALO_F32) return ((const float *)bytes)[i];
  const uint32_t bits = (uint32_t)((const uint16_t *)bytes)[i] << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

/* n values as dtype t on a device; NULL: NaN. */
static void *upload(halo_device device, halo_dtype t, const double *x, int64_t n) {
  const int64_t bytes = n * halo_dtype_bytes(t);
  char *host = malloc((size_t)bytes + 1);
  if (x == NULL) memset(host, 0xff, (size_t)bytes);
  for (int64_t i = 0; x != NULL && i < n; i++) put(t, host, i, x[i]);
  void *p;
  CHECK_OK(halo__alloc(&p, bytes > 0 ? bytes : 1, device));
  CHECK_OK(halo__kernels(device)->copy_in(p, host, bytes));
  free(host);
  return p;
}

static double *download(halo_device device, halo_dtype t, const void *p, int64_t n) {
  const int64_t bytes = n * halo_dtype_bytes(t);
  char *host = malloc((size_t)bytes + 1);
  CHECK_OK(halo__kernels(device)->copy_out(host, p, bytes));
  double *x = malloc((size_t)n * 8 + 1);
  for (int64_t i = 0; i < n; i++) x[i] = get(t, host, i);
  free(host);
  return x;
}

/* ---- a case ---- */

typedef struct setting {
  test_case c;
  halo_layout *layout;
  halo_plan *plan;
  int64_t T, n_q, n_k; /* elements of q and of k of one rank */
  double **q, **k, **v, **grad; /* [W]; q, grad [B,T,H,D]; k, v [B,Hk,T,D] */
  const halo__gather *gather;
  double *column_k, *column_v; /* [n_entries,D] */
  double scale;
} setting;

static void add_head(setting *s, int64_t b, int64_t h) {
  const test_case *c = &s->c;
  const int64_t NB = (c->N + c->G - 1) / c->G;
  int64_t list[64];
  if (c->plan == SPARSE || c->plan == MIXED) {
    for (int i = 0; i < 3; i++) list[i] = (int64_t)dice((uint64_t)NB);
    CHECK_OK(halo_plan_add_diagonals(s->plan, b, h, list, 3));
  }
  if (c->plan == SPARSE || c->plan == COLUMNS) {
    const int64_t n = c->plan == SPARSE ? 40 : 64;
    for (int64_t i = 0; i < n; i++) list[i] = (int64_t)dice((uint64_t)c->N);
    CHECK_OK(halo_plan_add_columns(s->plan, b, h, list, n));
  }
  if (c->plan == MIXED) {
    int64_t query[20], key[20];
    for (int i = 0; i < 20; i++) {
      query[i] = (int64_t)dice((uint64_t)NB);
      key[i] = (int64_t)dice((uint64_t)query[i] + 1);
    }
    CHECK_OK(halo_plan_add_tiles(s->plan, b, h, query, key, 20));
  }
}

static void make_plan(setting *s) {
  const test_case *c = &s->c;
  CHECK_OK(halo_layout_new(&s->layout, c->layout, c->N, c->W, c->G));
  CHECK_OK(halo_plan_new(&s->plan, s->layout, c->B, c->H));
  if (c->plan == DENSE || c->plan == DOCUMENTS) {
    CHECK_OK(halo_plan_add_all(s->plan, -1, -1));
  } else {
    for (int64_t i = 0; i < c->B * c->H; i++) {
      if (dice(4) > 0 || i == 0) add_head(s, i / c->H, i % c->H); // some heads see nothing but force
    }
    CHECK_OK(halo_plan_force(s->plan, 0, 0, c->plan != COLUMNS));
  }
  if (c->plan == DOCUMENTS || c->plan == SPARSE) {
    int32_t *id = malloc((size_t)(c->B * c->N) * 4);
    for (int64_t b = 0; b < c->B; b++) {
      int32_t now = 0;
      for (int64_t i = 0; i < c->N; i++) {
        if (dice((uint64_t)c->N / 3 + 2) == 0) now++;
        id[b * c->N + i] = i >= c->N - 5 ? -1 : now;
      }
    }
    CHECK_OK(halo_plan_set_documents(s->plan, id));
    free(id);
  }
  CHECK_OK(halo_plan_finish(s->plan));
}

static setting open_setting(const test_case *c) {
  setting s = {.c = *c, .scale = 1 / sqrt((double)c->D)};
  make_plan(&s);
  s.T = halo_layout_local_tokens(s.layout);
  s.n_q = c->B * s.T * c->H * c->D;
  s.n_k = c->B * s.T * c->Hk * c->D;
  double ***all[] = {&s.q, &s.k, &s.v, &s.grad};
  for (int i = 0; i < 4; i++) {
    *all[i] = malloc((size_t)c->W * sizeof(double *));
    for (int32_t r = 0; r < c->W; r++) {
      (*all[i])[r] = sample(i == 0 || i == 3 ? s.n_q : s.n_k, i == 0 ? 3 : 1);
    }
  }
  CHECK_OK(halo__plan_gather(&s.gather, s.plan, c->Hk));
  const halo__gather *g = s.gather;
  s.column_k = malloc((size_t)(g->n_entries * c->D) * 8 + 1);
  s.column_v = malloc((size_t)(g->n_entries * c->D) * 8 + 1);
  for (int64_t group = 0, e = 0; e < g->n_entries; e++) {
    while (g->offset[group + 1] <= e) group++;
    const int64_t row = (group * s.T + g->local[e]) * c->D;
    memcpy(s.column_k + e * c->D, s.k[g->owner[e]] + row, (size_t)c->D * 8);
    memcpy(s.column_v + e * c->D, s.v[g->owner[e]] + row, (size_t)c->D * 8);
  }
  return s;
}

static void close_setting(setting *s) {
  double **all[] = {s->q, s->k, s->v, s->grad};
  for (int i = 0; i < 4; i++) {
    for (int32_t r = 0; r < s->c.W; r++) free(all[i][r]);
    free(all[i]);
  }
  free(s->column_k);
  free(s->column_v);
  halo_plan_free(s->plan);
  halo_layout_free(s->layout);
}

/* ---- one rank's pass, on any device in any dtype ---- */

enum { OUT, LSE, DQ, ONCE, DCOLUMNS, DKV, RESULTS = DKV + 8 };
static const char *const result_names[] = {"out", "lse", "dq", "once", "dcolumns", "dkv"};
typedef struct results {
  double *x[RESULTS]; /* DKV + s: dk and dv of source s; NULL: not there */
  int64_t n[RESULTS];
} results;

typedef struct job {
  setting *s;
  halo_device device;
  const halo_kernels *k;
  halo_dtype t, acc;
  int32_t rank;
  halo_attention_queries a;
  results *out;
} job;

static void keep(const job *j, int which, halo_dtype t, void *p, int64_t n) {
  j->out->x[which] = download(j->device, t, p, n);
  j->out->n[which] = n;
  halo__free(p);
}

static const void *mirror(const job *j, const void *host, int64_t bytes) {
  const void *p = NULL;
  CHECK_OK(halo__plan_mirror(&p, j->s->plan, j->device, host, bytes));
  return p;
}

/* Tiles of one source; k and v are to be freed. */
static int64_t open_tiles(const job *j, int32_t source, halo_attention_tiles *tiles, halo__rows *rows) {
  setting *s = j->s;
  const halo__slice *slice;
  const halo__rows *by_key;
  const halo__tokens *tokens;
  CHECK_OK(halo__plan_slice(&slice, s->plan, j->rank, source));
  CHECK_OK(halo__plan_slice_by_key(&by_key, s->plan, j->rank, source));
  CHECK_OK(halo__plan_tokens(&tokens, s->plan, source));
  CHECK_OK(halo__plan_mirror_rows(&rows[0], s->plan, j->device, &slice->by_query));
  CHECK_OK(halo__plan_mirror_rows(&rows[1], s->plan, j->device, by_key));
  *tiles = (halo_attention_tiles){.k = upload(j->device, j->t, s->k[source], s->n_k),
                                  .v = upload(j->device, j->t, s->v[source], s->n_k),
                                  .position = mirror(j, tokens->position, s->T * 4),
                                  .by_query = &rows[0], .by_key = &rows[1]};
  return slice->n_tiles;
}

static void open_columns(const job *j, halo_attention_columns *columns, halo__rows *rows) {
  setting *s = j->s;
  const halo__gather *g = s->gather;
  const halo__column_slice *slice;
  const halo__rows *by_column;
  const halo__columns *all;
  CHECK_OK(halo__plan_columns(&all, s->plan));
  CHECK_OK(halo__plan_column_slice(&slice, s->plan, j->rank));
  CHECK_OK(halo__plan_columns_by_column(&by_column, s->plan, j->rank));
  CHECK_OK(halo__plan_mirror_rows(&rows[0], s->plan, j->device, &slice->by_query));
  CHECK_OK(halo__plan_mirror_rows(&rows[1], s->plan, j->device, by_column));
  const int64_t units = s->c.B * s->c.H, n_patterns = halo__plan_patterns(s->plan);
  *columns = (halo_attention_columns){
      .k = upload(j->device, j->t, s->column_k, g->n_entries * s->c.D),
      .v = upload(j->device, j->t, s->column_v, g->n_entries * s->c.D),
      .n_entries = g->n_entries,
      .token_offset = mirror(j, all->offset, (n_patterns + 1) * 8),
      .token = mirror(j, all->token, all->offset[n_patterns] * 4),
      .n_slots = g->slot_offset[units],
      .slot_offset = mirror(j, g->slot_offset, (units + 1) * 8),
      .slot = mirror(j, g->slot, g->slot_offset[units] * 4),
      .by_query = &rows[0], .by_column = &rows[1]};
}

static void pass_forward(job *j) {
  setting *s = j->s;
  const int64_t rows = s->c.B * s->c.H * s->T, width = s->c.H * s->c.D;
  const int64_t out_stride[3] = {s->T * width, width, s->c.D}, lse_stride[2] = {s->c.H * s->T, s->T};
  halo__rows lists[2];
  halo_attention_tiles tiles;
  j->a.o = upload(j->device, j->acc, NULL, s->n_q);
  j->a.m = upload(j->device, j->acc, NULL, rows);
  j->a.l = upload(j->device, j->acc, NULL, rows);
  CHECK_OK(j->k->attention_begin(&j->a));
  for (int32_t i = 0; i < s->c.W; i++) {
    if (open_tiles(j, i, &tiles, lists) > 0) CHECK_OK(j->k->attention_tiles_fwd(&j->a, &tiles));
    halo__free((void *)tiles.k);
    halo__free((void *)tiles.v);
  }
  if (s->gather->n_entries > 0) {
    halo_attention_columns columns;
    open_columns(j, &columns, lists);
    CHECK_OK(j->k->attention_columns_fwd(&j->a, &columns));
    halo__free((void *)columns.k);
    halo__free((void *)columns.v);
  }
  void *out = upload(j->device, j->t, NULL, s->n_q), *lse = upload(j->device, j->acc, NULL, rows);
  CHECK_OK(j->k->attention_finish(out, out_stride, lse, lse_stride, &j->a));
  halo__free(j->a.o);
  halo__free(j->a.m);
  halo__free(j->a.l);
  void *once = upload(j->device, j->t, NULL, s->n_q), *once_lse = upload(j->device, j->acc, NULL, rows);
  if (s->c.W == 1 && s->gather->n_entries == 0) {
    open_tiles(j, 0, &tiles, lists);
    CHECK_OK(j->k->attention_once(once, out_stride, once_lse, lse_stride, &j->a, &tiles));
    halo__free((void *)tiles.k);
    halo__free((void *)tiles.v);
    keep(j, ONCE, j->t, once, s->n_q);
  } else {
    halo__free(once);
  }
  halo__free(once_lse);
  // Backward wants the truth's lse and delta of this dtype's own output.
  void *delta = upload(j->device, j->acc, NULL, rows);
  j->a.grad = upload(j->device, j->t, s->grad[j->rank], s->n_q);
  memcpy(j->a.grad_stride, out_stride, sizeof out_stride);
  CHECK_OK(j->k->attention_delta(delta, out, out_stride, &j->a));
  j->a.delta = delta;
  keep(j, OUT, j->t, out, s->n_q);
  j->out->x[LSE] = download(j->device, j->acc, lse, rows);
  j->out->n[LSE] = rows;
  j->a.lse = lse;
}

static void pass_backward(job *j) {
  setting *s = j->s;
  const int64_t width = s->c.H * s->c.D, dq_stride[3] = {s->T * width, width, s->c.D};
  halo__rows lists[2];
  CHECK_OK(halo__alloc(&j->a.dq, s->n_q * halo_dtype_bytes(j->acc), j->device));
  CHECK_OK(j->k->zero(j->a.dq, s->n_q * halo_dtype_bytes(j->acc)));
  for (int32_t i = 0; i < s->c.W; i++) {
    halo_attention_tiles tiles;
    const int64_t n_tiles = open_tiles(j, i, &tiles, lists);
    if (n_tiles > 0) {
      char *dkv = upload(j->device, j->acc, NULL, 2 * s->n_k);
      tiles.dk = dkv;
      tiles.dv = dkv + s->n_k * halo_dtype_bytes(j->acc);
      CHECK_OK(j->k->attention_tiles_bwd(&j->a, &tiles));
      keep(j, DKV + i, j->acc, dkv, 2 * s->n_k);
    }
    halo__free((void *)tiles.k);
    halo__free((void *)tiles.v);
  }
  if (s->gather->n_entries > 0) {
    halo_attention_columns columns;
    const int64_t n = s->gather->n_entries * s->c.D;
    open_columns(j, &columns, lists);
    char *dkv = upload(j->device, j->acc, NULL, 2 * n);
    columns.dk = dkv;
    columns.dv = dkv + n * halo_dtype_bytes(j->acc);
    CHECK_OK(j->k->attention_columns_bwd(&j->a, &columns));
    keep(j, DCOLUMNS, j->acc, dkv, 2 * n);
    halo__free((void *)columns.k);
    halo__free((void *)columns.v);
  }
  void *dq = upload(j->device, j->t, NULL, s->n_q);
  CHECK_OK(j->k->attention_dq_finish(dq, dq_stride, &j->a));
  keep(j, DQ, j->t, dq, s->n_q);
  void *const mine[] = {j->a.dq, (void *)j->a.q, (void *)j->a.grad, (void *)j->a.lse, (void *)j->a.delta};
  for (size_t i = 0; i < sizeof mine / sizeof *mine; i++) halo__free(mine[i]);
}

static results run(setting *s, halo_device device, halo_dtype t, int32_t rank, int32_t deterministic) {
  const test_case *c = &s->c;
  results out = {0};
  job j = {s, device, halo__kernels(device), t, t == HALO_F64 ? HALO_F64 : HALO_F32, rank, {0}, &out};
  const int64_t width = c->H * c->D;
  const halo__tokens *tokens;
  CHECK_OK(halo__plan_tokens(&tokens, s->plan, rank));
  j.a = (halo_attention_queries){
      .dtype = t, .n_batch = c->B, .n_heads = c->H, .n_kv_heads = c->Hk, .head_size = c->D,
      .block = c->G, .n_blocks = s->T / c->G, .scale = s->scale,
      .q = upload(device, t, s->q[rank], s->n_q), .q_stride = {s->T * width, width, c->D},
      .position = mirror(&j, tokens->position, s->T * 4),
      .first = mirror(&j, tokens->first, (tokens->first_stride > 0 ? c->B : 1) * s->T * 4),
      .first_stride = tokens->first_stride,
      .pattern_of = mirror(&j, halo__plan_pattern_of(s->plan), c->B * c->H * 4),
      .n_parts = 1, .n_head_parts = 1, .deterministic = deterministic};
  pass_forward(&j);
  pass_backward(&j);
  return out;
}

static void free_results(results *r) {
  for (int i = 0; i < RESULTS; i++) free(r->x[i]);
}

/* ||got - want|| / ||want||; NaN when one of them is. -inf equals itself. */
static double distance(const double *got, const double *want, int64_t n) {
  double error = 0, norm = 0;
  for (int64_t i = 0; i < n; i++) {
    const double d = got[i] == want[i] ? 0 : got[i] - want[i];
    error += d * d;
    norm += isinf(want[i]) ? 0 : want[i] * want[i];
  }
  return norm > 0 ? sqrt(error / norm) : sqrt(error);
}

/* What rounding costs of the norm: bf16 rounds inputs of products (2^-9 each, several of them). */
static double bound(halo_dtype t, int which) {
  if (t == HALO_F64) return 1e-13;
  if (t == HALO_F32 || which == LSE) return 1e-5;
  return which == OUT || which == ONCE ? 4e-3 : 1e-2;
}

static void compare(const char *family, const setting *s, halo_dtype t, int32_t rank, const results *got,
                    const results *want) {
  char line[256];
  int at = 0;
  bool fine = true;
  for (int i = 0; i < RESULTS; i++) {
    if (i != ONCE && (got->x[i] == NULL) != (want->x[i] == NULL)) fine = false;
    if (got->x[i] == NULL) continue;
    const int truth = i == ONCE ? OUT : i;
    const double d = distance(got->x[i], want->x[truth], got->n[i]);
    if (!(d <= bound(t, i))) fine = false;
    at += snprintf(line + at, sizeof line - (size_t)at, " %s %.0e", result_names[i < DKV ? i : DKV], d);
  }
  fprintf(stderr, "  %s %-8s %-4s B%d H%d/%d D%d G%d N%d W%d r%d plan %d:%s\n", fine ? " " : "!", family,
          halo_dtype_name(t), (int)s->c.B, (int)s->c.H, (int)s->c.Hk, (int)s->c.D, (int)s->c.G, (int)s->c.N,
          s->c.W, rank, (int)s->c.plan, line);
  CHECK(fine);
}

static const test_case cases[] = {
    {1, 2, 1, 64, 64, 200, 1, HALO_LAYOUT_CONTIGUOUS, DENSE},
    {2, 4, 2, 128, 64, 700, 1, HALO_LAYOUT_CONTIGUOUS, DENSE},
    {1, 4, 2, 128, 128, 900, 1, HALO_LAYOUT_CONTIGUOUS, DOCUMENTS},
    {2, 4, 1, 64, 128, 1100, 2, HALO_LAYOUT_STRIPED, DOCUMENTS},
    {1, 6, 2, 64, 64, 1500, 2, HALO_LAYOUT_ZIGZAG, SPARSE},
    {2, 4, 2, 128, 128, 1500, 3, HALO_LAYOUT_STRIPED, SPARSE},
    {1, 4, 2, 128, 64, 1300, 1, HALO_LAYOUT_CONTIGUOUS, MIXED},
    {1, 4, 4, 64, 128, 1300, 1, HALO_LAYOUT_CONTIGUOUS, MIXED},
    {2, 4, 2, 128, 128, 1000, 1, HALO_LAYOUT_CONTIGUOUS, COLUMNS},
    {1, 8, 1, 64, 64, 1000, 2, HALO_LAYOUT_STRIPED, COLUMNS},
};
/* Sizes of the general family only. */
static const test_case odd_cases[] = {
    {1, 2, 1, 24, 16, 75, 1, HALO_LAYOUT_CONTIGUOUS, DENSE},
    {2, 3, 3, 80, 32, 200, 2, HALO_LAYOUT_ZIGZAG, SPARSE},
    {1, 4, 2, 96, 48, 333, 1, HALO_LAYOUT_CONTIGUOUS, DOCUMENTS},
    {1, 2, 1, 256, 64, 300, 2, HALO_LAYOUT_STRIPED, SPARSE},
    {1, 2, 2, 1, 1, 40, 1, HALO_LAYOUT_CONTIGUOUS, MIXED},
    {1, 4, 2, 130, 100, 450, 1, HALO_LAYOUT_CONTIGUOUS, COLUMNS},
};

static bool serves(const setting *s, const char *family, halo_dtype t) {
  if (strcmp(family, "general") == 0) return true;
  if (t != HALO_BF16 || (s->c.D != 64 && s->c.D != 128)) return false;
  if (s->c.G != 64 && s->c.G != 128) return false;
  halo_device_row row;
  if (strcmp(family, "hopper") != 0) return true;
  return halo_device_read(&row, HALO_CUDA, 0) == HALO_OK && row.major == 9;
}

/* Two runs of deterministic kernels: every result the same, bit for bit. */
static void check_repeats(const char *family, const setting *s, int32_t rank, const results *first,
                          const results *again) {
  for (int i = 0; i < RESULTS; i++) {
    if (first->x[i] == NULL) continue;
    int64_t differ = 0, where = -1;
    for (int64_t j = 0; j < first->n[i]; j++) {
      if (memcmp(&first->x[i][j], &again->x[i][j], 8) != 0 && differ++ == 0) where = j;
    }
    if (differ > 0) {
      fprintf(stderr, "! %s D%d G%d N%d W%d r%d plan %d: %s %d: %lld of %lld differ, the first at %lld: %.9g %.9g\n",
              family, (int)s->c.D, (int)s->c.G, (int)s->c.N, s->c.W, rank, (int)s->c.plan,
              result_names[i < DKV ? i : DKV], i - DKV, (long long)differ, (long long)first->n[i],
              (long long)where, first->x[i][where], again->x[i][where]);
    }
    CHECK(differ == 0);
  }
}

/* "hopper" stands for the device's own choice, "small" for the portable kernels where a block may have as little
 * shared memory as on sm_86. */
static void use_family(const char *family) {
  const bool is_small = strcmp(family, "small") == 0;
  setenv("HALO_ATTENTION_SHARED", is_small ? "99" : "0", 1);
  setenv("HALO_ATTENTION", is_small ? "portable" : strcmp(family, "hopper") == 0 ? "auto" : family, 1);
}

static void check_case(const test_case *whole, const char *family, halo_dtype t, int32_t deterministic) {
  test_case c = *whole;
  static int64_t n_cases;
  if (check_thins_out(n_cases++)) return;
  if (check_is_small() && c.N > 100) {
    const int64_t group = c.H / c.Hk;
    c.B = c.Hk = 1;
    c.H = group < 4 ? group : 4;
    c.N = 2 * c.G + c.G / 3;
  }
  setting s = open_setting(&c);
  if (serves(&s, family, t)) {
    for (int32_t rank = 0; rank < c.W; rank++) {
      results want = run(&s, HALO_CPU, HALO_F64, rank, 0);
      use_family(family);
      results got = run(&s, HALO_CUDA, t, rank, deterministic);
      compare(family, &s, t, rank, &got, &want);
      for (int i = 0; deterministic && i < 3; i++) {
        results again = run(&s, HALO_CUDA, t, rank, 1);
        check_repeats(family, &s, rank, &got, &again);
        free_results(&again);
      }
      free_results(&got);
      free_results(&want);
    }
  }
  use_family("hopper");
  close_setting(&s);
}

static void twins(void) {
  static const char *const families[] = {"general", "portable", "hopper"};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    for (int f = 0; f < 3; f++) check_case(&cases[i], families[f], HALO_BF16, 0);
    if (cases[i].D == 128) check_case(&cases[i], "small", HALO_BF16, 0);
    if (i % 3 == 0) check_case(&cases[i], "general", HALO_F32, 0);
  }
}

static void odd_sizes(void) {
  for (size_t i = 0; i < sizeof odd_cases / sizeof *odd_cases; i++) {
    check_case(&odd_cases[i], "general", HALO_F32, 0);
    check_case(&odd_cases[i], "general", HALO_BF16, 0);
    check_case(&odd_cases[i], "general", HALO_F64, 0);
  }
}

static void repeats(void) {
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    check_case(&cases[i], "portable", HALO_BF16, 1);
    if (cases[i].D == 128) check_case(&cases[i], "small", HALO_BF16, 1);
    check_case(&cases[i], "hopper", HALO_BF16, 1);
  }
  check_case(&cases[5], "general", HALO_BF16, 1);
  check_case(&cases[5], "general", HALO_F32, 1);
}

/* ---- beside a plain bf16 program ---- */

/* out, dq, dk, dv of dense causal attention as a program of bf16 products writes it: every matrix is rounded
 * to bf16, sums and the softmax are fp32. For one batch and as many key heads as query heads. */
static void plain(const setting *s, float *out, float *dq, float *dk, float *dv) {
  const int64_t T = s->T, D = s->c.D, H = s->c.H;
  float *p = malloc((size_t)T * 4), *dp = malloc((size_t)T * 4);
  for (int64_t h = 0; h < H; h++) {
    const double *k = s->k[0] + h * T * D, *v = s->v[0] + h * T * D;
    for (int64_t i = 0; i < T; i++) {
      const int64_t row = (i * H + h) * D;
      const double *q = s->q[0] + row, *g = s->grad[0] + row;
      float top = -INFINITY, sum = 0, delta = 0;
      for (int64_t j = 0; j <= i; j++) {
        float dot = 0, dot_g = 0;
        for (int64_t d = 0; d < D; d++) {
          dot += (float)(q[d] * k[j * D + d]);
          dot_g += (float)(g[d] * v[j * D + d]);
        }
        p[j] = bf16_round(bf16_round(dot) * (float)s->scale);
        dp[j] = bf16_round(dot_g);
        top = fmaxf(top, p[j]);
      }
      for (int64_t j = 0; j <= i; j++) sum += p[j] = expf(p[j] - top);
      for (int64_t j = 0; j <= i; j++) {
        p[j] = bf16_round(p[j] / sum);
        delta += p[j] * dp[j];
      }
      for (int64_t j = 0; j <= i; j++) {
        const float ds = bf16_round(bf16_round(p[j] * (dp[j] - delta)) * (float)s->scale);
        for (int64_t d = 0; d < D; d++) {
          out[row + d] += p[j] * (float)v[j * D + d];
          dq[row + d] += ds * (float)k[j * D + d];
          dk[(h * T + j) * D + d] += ds * (float)q[d];
          dv[(h * T + j) * D + d] += p[j] * (float)g[d];
        }
      }
    }
  }
  float *const all[] = {out, dq, dk, dv};
  for (int64_t i = 0; i < 4 * s->n_q; i++) all[i % 4][i / 4] = bf16_round(all[i % 4][i / 4]);
  free(p);
  free(dp);
}

static double worst_of(const double *got, const float *plain_got, const double *want, int64_t n) {
  double worst = 0;
  for (int64_t i = 0; i < n; i++) {
    const double d = fabs((got != NULL ? got[i] : plain_got[i]) - want[i]);
    if (!(d <= worst)) worst = d;
  }
  return worst;
}

/* FlashAttention's own rule: an error at most twice (gradients: three times) that of a plain program. */
static void no_worse_than_plain(void) {
  static const char *const families[] = {"hopper", "portable", "general"};
  for (int64_t D = 64; D <= 128; D *= 2) {
    const test_case c = {1, 2, 2, D, 128, 512, 1, HALO_LAYOUT_CONTIGUOUS, DENSE};
    setting s = open_setting(&c);
    float *x[4];
    for (int i = 0; i < 4; i++) x[i] = calloc((size_t)s.n_q, 4);
    plain(&s, x[0], x[1], x[2], x[3]);
    results want = run(&s, HALO_CPU, HALO_F64, 0, 0);
    const double *truth[4] = {want.x[OUT], want.x[DQ], want.x[DKV], want.x[DKV] + s.n_k};
    for (int f = 0; f < 3; f++) {
      use_family(families[f]);
      results got = run(&s, HALO_CUDA, HALO_BF16, 0, 0);
      const double *have[4] = {got.x[ONCE], got.x[DQ], got.x[DKV], got.x[DKV] + s.n_k};
      for (int i = 0; i < 4; i++) {
        const double error = worst_of(have[i], NULL, truth[i], s.n_q);
        const double allowed = worst_of(NULL, x[i], truth[i], s.n_q);
        fprintf(stderr, "  %-8s D%d %s: %.1e, a plain program %.1e\n", families[f], (int)D,
                (const char *[]){"out", "dq", "dk", "dv"}[i], error, allowed);
        CHECK(error <= (i == 0 ? 2 : 3) * allowed);
      }
      free_results(&got);
    }
    use_family("hopper");
    free_results(&want);
    for (int i = 0; i < 4; i++) free(x[i]);
    close_setting(&s);
  }
}

/* ---- cache ---- */

typedef struct cache_case {
  int64_t B, Tq, H, Hk, D, length, capacity;
} cache_case;

static double *run_cached(const cache_case *c, halo_device device, halo_dtype t, double *const x[3],
                          const int64_t *positions, double **lse_out) {
  const int64_t n_q = c->B * c->Tq * c->H * c->D, n_k = c->B * c->capacity * c->Hk * c->D;
  const int64_t rows = c->B * c->Tq * c->H;
  const halo_kernels *k = halo__kernels(device);
  const halo_dtype acc = t == HALO_F64 ? HALO_F64 : HALO_F32;
  void *q = upload(device, t, x[0], n_q), *keys = upload(device, t, x[1], n_k),
       *values = upload(device, t, x[2], n_k), *out = upload(device, t, NULL, n_q),
       *lse = upload(device, acc, NULL, rows);
  int64_t *at;
  const int64_t bytes = (c->capacity + c->Tq) * 8;
  CHECK_OK(halo__alloc((void **)&at, bytes, device));
  CHECK_OK(k->copy_in(at, positions, bytes));
  CHECK_OK(k->attention_cached(t, out, lse, q, keys, values, at, at + c->capacity, c->B, c->Tq, c->H, c->Hk,
                               c->D, c->length, c->capacity, 1 / sqrt((double)c->D)));
  double *got = download(device, t, out, n_q);
  *lse_out = download(device, acc, lse, rows);
  void *const mine[] = {q, keys, values, out, lse, at};
  for (int i = 0; i < 6; i++) halo__free(mine[i]);
  return got;
}

static void caches(void) {
  static const cache_case all[] = {{1, 1, 16, 2, 128, 5000, 6000}, {2, 1, 4, 4, 64, 1, 10},
                                   {1, 3, 6, 3, 80, 700, 700},     {2, 40, 4, 2, 128, 300, 512},
                                   {1, 1, 8, 1, 256, 100, 128},    {1, 2, 2, 2, 64, 0, 16}};
  static const halo_dtype dtypes[] = {HALO_BF16, HALO_F32, HALO_F64};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    const cache_case *c = &all[i];
    const int64_t n_q = c->B * c->Tq * c->H * c->D, n_k = c->B * c->capacity * c->Hk * c->D;
    double *x[3] = {sample(n_q, 2), sample(n_k, 1), sample(n_k, 1)};
    int64_t *positions = malloc((size_t)(c->capacity + c->Tq) * 8);
    for (int64_t j = 0; j < c->capacity; j++) {
      positions[j] = j % 7 == 3 ? INT32_MAX : (j * 5) % (c->capacity + 1);
    }
    for (int64_t j = 0; j < c->Tq; j++) positions[c->capacity + j] = c->capacity / 2 + j;
    double *want_lse, *got_lse, *want = run_cached(c, HALO_CPU, HALO_F64, x, positions, &want_lse);
    for (int j = 0; j < 3; j++) {
      double *got = run_cached(c, HALO_CUDA, dtypes[j], x, positions, &got_lse);
      const double d = distance(got, want, n_q), e = distance(got_lse, want_lse, c->B * c->Tq * c->H);
      fprintf(stderr, "  cached %-4s D%d length %d: out %.0e lse %.0e\n", halo_dtype_name(dtypes[j]),
              (int)c->D, (int)c->length, d, e);
      CHECK(d <= bound(dtypes[j], OUT) && e <= bound(dtypes[j], LSE));
      free(got);
      free(got_lse);
    }
    free(want);
    free(want_lse);
    free(positions);
    for (int j = 0; j < 3; j++) free(x[j]);
  }
}

/* ---- probe ---- */

typedef struct probe_case {
  int64_t B, H, Hk, D, n_blocks, block, lanes;
} probe_case;

/* peak, sum, z and score of a part of the units, on any device. */
static void run_probe(const probe_case *c, halo_device device, halo_dtype t, const double *k, const double *q,
                      const int32_t *tables, const double *weights, double *out[4], int64_t n[4]) {
  const halo_kernels *kernels = halo__kernels(device);
  const halo_dtype acc = t == HALO_F64 ? HALO_F64 : HALO_F32;
  const int64_t units = c->B * c->H, T = c->n_blocks * c->block, lanes = units * c->lanes;
  const int64_t used = units - 1; // from unit 1 on
  int32_t *there;
  CHECK_OK(halo__alloc((void **)&there, (c->n_blocks + 2 * lanes) * 4, device));
  CHECK_OK(kernels->copy_in(there, tables, (c->n_blocks + 2 * lanes) * 4));
  double *lowest = malloc((size_t)(used * c->lanes) * 8);
  for (int64_t i = 0; i < used * c->lanes; i++) lowest[i] = -INFINITY;
  n[0] = used * c->lanes;
  n[1] = n[0] * c->n_blocks;
  n[2] = n[0] * T;
  n[3] = used * (T + c->n_blocks * (c->block + c->lanes - 1));
  void *peak = upload(device, acc, lowest, n[0]), *sum = upload(device, acc, NULL, n[1]),
       *z = upload(device, acc, NULL, n[2]), *score = upload(device, acc, NULL, n[3]),
       *weight = upload(device, acc, weights, n[0]);
  halo_probe p = {.t = t, .k = upload(device, t, k, c->B * T * c->Hk * c->D),
                  .stride = {T * c->Hk * c->D, c->Hk * c->D, c->D}, .heads = c->H, .kv_heads = c->Hk,
                  .size = c->D, .n_blocks = c->n_blocks, .block = c->block, .start = there,
                  .lanes = c->lanes, .q = upload(device, acc, q, lanes * c->D),
                  .first = there + c->n_blocks, .last = there + c->n_blocks + lanes, .unit = 1,
                  .n_units = used, .scale = 1 / sqrt((double)c->D), .z = z};
  CHECK_OK(kernels->probe_peak(peak, &p));
  CHECK_OK(kernels->probe_exp(sum, peak, &p));
  CHECK_OK(kernels->probe_score(score, weight, &p));
  void *const made[4] = {peak, sum, z, score};
  for (int i = 0; i < 4; i++) {
    out[i] = download(device, acc, made[i], n[i]);
    halo__free(made[i]);
  }
  void *const rest[] = {weight, (void *)p.k, (void *)p.q, there};
  for (int i = 0; i < 4; i++) halo__free(rest[i]);
  free(lowest);
}

static void probes(void) {
  static const probe_case all[] = {
      {1, 4, 2, 128, 9, 64, 64}, {2, 3, 3, 80, 5, 100, 16}, {1, 2, 1, 24, 3, 7, 32}};
  static const halo_dtype dtypes[] = {HALO_BF16, HALO_F32, HALO_F64};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    const probe_case *c = &all[i];
    const int64_t units = c->B * c->H, T = c->n_blocks * c->block, lanes = units * c->lanes;
    double *k = sample(c->B * T * c->Hk * c->D, 1), *q = sample(lanes * c->D, 2), *weight = sample(lanes, 1);
    int32_t *tables = malloc((size_t)(c->n_blocks + 2 * lanes) * 4);
    for (int64_t b = 0; b < c->n_blocks; b++) tables[b] = (int32_t)(2 * b * c->block); // every other block
    for (int64_t l = 0; l < lanes; l++) { // some lanes see nothing, some all
      tables[c->n_blocks + l] = (int32_t)dice((uint64_t)T);
      tables[c->n_blocks + lanes + l] = (int32_t)dice((uint64_t)(2 * T));
    }
    double *want[4], *got[4];
    int64_t n[4];
    run_probe(c, HALO_CPU, HALO_F64, k, q, tables, weight, want, n);
    for (int j = 0; j < 3; j++) {
      run_probe(c, HALO_CUDA, dtypes[j], k, q, tables, weight, got, n);
      for (int r = 0; r < 4; r++) { // inputs are exact in every dtype, sums are fp32 at least
        const double d = distance(got[r], want[r], n[r]);
        if (!(d <= bound(dtypes[j], LSE))) fprintf(stderr, "  probe case %d %d: %.1e\n", (int)i, r, d);
        CHECK(d <= bound(dtypes[j], LSE));
        free(got[r]);
      }
    }
    for (int r = 0; r < 4; r++) free(want[r]);
    free(k), free(q), free(weight), free(tables);
  }
}

int main(void) {
  if (halo_device_count(HALO_CUDA) == 0) {
    printf("1 pending: no CUDA device\n");
    return 0;
  }
  RUN(caches);
  RUN(probes);
  RUN(odd_sizes);
  RUN(twins);
  RUN(repeats);
  RUN(no_worse_than_plain);
  return check_report();
}

#endif
