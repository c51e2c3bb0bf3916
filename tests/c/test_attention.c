/* Attention against its definition: two loops over halo_plan_visible in fp64.
 *
 * A case is (plan, heads, sizes, dtype); a run is a case on some ring and layout. The oracle knows
 * nothing of blocks, ranks or running maxima. out, lse, dq, dk, dv are compared each, for every
 * number of ranks, layout and schedule: in one process with local ranks, and with the ranks of the
 * launcher when there is one (tests/spec/dist runs this program under mpirun). */
#include "check.h"

#include "internal.h"
#include "ring.h"

typedef enum plan_kind {
  DENSE,
  SPARSE,     /* diagonals, tiles and columns that differ by batch and head, force rules */
  COLUMNS,    /* nothing but columns */
  DOCUMENTS,  /* dense, packed */
  MIXED,      /* sparse, packed */
  HOLES,      /* a few tiles, no force rule: many rows see nothing */
  PLAN_KINDS
} plan_kind;

typedef struct test_case {
  plan_kind plan;
  int64_t B, N, H, Hk, D, G;
  halo_dtype dtype;
  double magnitude; /* of q and k: how peaked the softmax is */
} test_case;

typedef struct result {
  double *out, *lse, *dq, *dk, *dv; /* global: [B,N,H,D] [B,H,N] [B,N,H,D] [B,N,Hk,D] x 2 */
} result;

static double sample(int what, int64_t b, int64_t t, int64_t h, int64_t d) {
  return 2 * halo_random_uniform(7, (uint64_t)what,
                                 (uint64_t)(((b * 4096 + t) * 64 + h) * 256 + d)) -
         1;
}

/* q, k, v and the output's gradient, for all tokens. */
static double value(const test_case *c, int what, int64_t b, int64_t t, int64_t h, int64_t d) {
  return (what < 2 ? c->magnitude : 1) * sample(what, b, t, h, d);
}

enum { Q, K, V, GRAD };

static double scale_of(const test_case *c) { return 1 / sqrt((double)c->D); }

static uint64_t dice(uint64_t *state) {
  *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
  return *state >> 33;
}

static halo_plan *make_plan(const test_case *c, const halo_layout *layout) {
  halo_plan *p;
  CHECK_OK(halo_plan_new(&p, layout, c->B, c->H));
  uint64_t state = 11 + c->plan;
  const int64_t NB = (c->N + c->G - 1) / c->G;
  if (c->plan == DENSE || c->plan == DOCUMENTS) CHECK_OK(halo_plan_add_all(p, -1, -1));
  for (int64_t b = 0; b < c->B; b++) {
    for (int64_t h = 0; h < c->H; h++) {
      int64_t list[8], other[8];
      if (c->plan == SPARSE || c->plan == MIXED) {
        for (int i = 0; i < 3; i++) list[i] = (int64_t)(dice(&state) % (uint64_t)NB);
        CHECK_OK(halo_plan_add_diagonals(p, b, h, list, 3));
      }
      if (c->plan == SPARSE || c->plan == MIXED || c->plan == HOLES) {
        int n = c->plan == HOLES ? 3 : 5;
        for (int i = 0; i < n; i++) {
          list[i] = (int64_t)(dice(&state) % (uint64_t)NB);
          other[i] = (int64_t)(dice(&state) % (uint64_t)(list[i] + 1));
        }
        CHECK_OK(halo_plan_add_tiles(p, b, h, list, other, n));
      }
      if (c->plan == SPARSE || c->plan == MIXED || c->plan == COLUMNS) {
        for (int i = 0; i < 7; i++) list[i] = (int64_t)(dice(&state) % (uint64_t)c->N);
        CHECK_OK(halo_plan_add_columns(p, b, h, list, 7));
      }
    }
  }
  if (c->plan == SPARSE) CHECK_OK(halo_plan_force(p, 2, c->G + 1, 1));
  if (c->plan == MIXED) CHECK_OK(halo_plan_force(p, 1, 0, 0));
  if (c->plan == DOCUMENTS || c->plan == MIXED) {
    int32_t *document = malloc((size_t)(c->B * c->N) * sizeof *document);
    for (int64_t b = 0; b < c->B; b++) {
      int32_t id = 0;
      for (int64_t t = 0; t < c->N; t++) {
        if (t > 0 && dice(&state) % 9 == 0) id++;
        document[b * c->N + t] = id;
      }
    }
    CHECK_OK(halo_plan_set_documents(p, document));
    free(document);
  }
  CHECK_OK(halo_plan_finish(p));
  return p;
}

static double *zeros(int64_t n) { return calloc((size_t)n + 1, sizeof(double)); }

static result result_new(const test_case *c) {
  const int64_t rows = c->B * c->N;
  return (result){zeros(rows * c->H * c->D), zeros(rows * c->H), zeros(rows * c->H * c->D),
                  zeros(rows * c->Hk * c->D), zeros(rows * c->Hk * c->D)};
}

static void result_free(result *r) {
  free(r->out), free(r->lse), free(r->dq), free(r->dk), free(r->dv);
}

/* All values of one kind as [B,N,heads,D]. */
static double *table(const test_case *c, int what, int64_t heads) {
  double *x = zeros(c->B * c->N * heads * c->D), *at = x;
  for (int64_t b = 0; b < c->B; b++) {
    for (int64_t t = 0; t < c->N; t++) {
      for (int64_t h = 0; h < heads; h++) {
        for (int64_t d = 0; d < c->D; d++) *at++ = value(c, what, b, t, h, d);
      }
    }
  }
  return x;
}

static double dot(const double *a, const double *b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

static void add(double *y, double factor, const double *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] += factor * x[i];
}

/* One query row: forward, then its share of all gradients. x: the tables of q, k, v, grad. */
static void oracle_row(const test_case *c, const halo_plan *p, result *r, double *const *x,
                       int64_t b, int64_t h, int64_t i, double *weight) {
  const int64_t kv = h / (c->H / c->Hk), D = c->D, at = ((b * c->N + i) * c->H + h) * D;
  const int64_t step = c->Hk * D, first = (b * c->N * c->Hk + kv) * D; // key j at first + j * step
  const double *q = x[Q] + at, *g = x[GRAD] + at, *k = x[K] + first, *v = x[V] + first;
  double top = -INFINITY, sum = 0;
  for (int64_t j = 0; j < c->N; j++) {
    const bool sees = halo_plan_visible(p, b, h, i, j);
    weight[j] = sees ? scale_of(c) * dot(q, k + j * step, D) : -INFINITY;
    top = fmax(top, weight[j]);
  }
  for (int64_t j = 0; j < c->N; j++) {
    weight[j] = top == -INFINITY ? 0 : exp(weight[j] - top);
    sum += weight[j];
  }
  r->lse[(b * c->H + h) * c->N + i] = top + log(sum);
  if (sum == 0) return;
  for (int64_t j = 0; j < c->N; j++) {
    weight[j] /= sum;
    if (weight[j] != 0) add(r->out + at, weight[j], v + j * step, D);
  }
  const double delta = dot(r->out + at, g, D);
  for (int64_t j = 0; j < c->N; j++) {
    if (weight[j] == 0) continue;
    const double ds = weight[j] * (dot(g, v + j * step, D) - delta) * scale_of(c);
    add(r->dv + first + j * step, weight[j], g, D);
    add(r->dk + first + j * step, ds, q, D);
    add(r->dq + at, ds, k + j * step, D);
  }
}

static result oracle(const test_case *c, const halo_plan *p) {
  result r = result_new(c);
  double *weight = zeros(c->N), *x[4];
  for (int what = 0; what < 4; what++)
    x[what] = table(c, what, what == K || what == V ? c->Hk : c->H);
  for (int64_t b = 0; b < c->B; b++) {
    for (int64_t h = 0; h < c->H; h++) {
      for (int64_t i = 0; i < c->N; i++) oracle_row(c, p, &r, x, b, h, i, weight);
    }
  }
  for (int what = 0; what < 4; what++) free(x[what]);
  free(weight);
  return r;
}

/* ---- running on a ring ---------------------------------------------------------------------- */

/* A tensor [B, here*T, heads, D] of the tokens that live here; padding tokens get `padding`. */
static int32_t where = HALO_CPU; /* device of every q, k, v and gradient */

static halo_tensor *scatter(const test_case *c, const halo_layout *l, const halo_ring *ring,
                            int what, int64_t heads, double padding) {
  const int64_t T = halo_layout_local_tokens(l), here = halo_ring_here(ring);
  const int64_t shape[4] = {c->B, here * T, heads, c->D};
  halo_tensor *t;
  CHECK_OK(halo_tensor_new(&t, HALO_F64, HALO_CPU, 4, shape));
  double *x = halo_tensor_data(t);
  for (int64_t b = 0; b < c->B; b++) {
    for (int64_t i = 0; i < here * T; i++) {
      const int64_t token = halo_layout_global(l, halo_ring_rank(ring) + (int32_t)(i / T), i % T);
      for (int64_t h = 0; h < heads; h++) {
        for (int64_t d = 0; d < c->D; d++) {
          x[((b * here * T + i) * heads + h) * c->D + d] =
              token < c->N ? value(c, what, b, token, h, d) : padding;
        }
      }
    }
  }
  halo_tensor *typed;
  CHECK_OK(halo_tensor_new(&typed, c->dtype, where, 4, shape));
  CHECK_OK(halo_tensor_copy(typed, t));
  halo_tensor_free(t);
  return typed;
}

/* All elements as doubles; free() them. */
static double *elements(const halo_tensor *t) {
  halo_tensor *wide;
  double *x = zeros(halo_tensor_count(t));
  CHECK_OK(halo_tensor_new(&wide, HALO_F64, HALO_CPU, t->ndim, t->shape));
  CHECK_OK(halo_tensor_copy(wide, t));
  CHECK_OK(halo_tensor_read(wide, x));
  halo_tensor_free(wide);
  return x;
}

/* Largest difference between the tokens here and the global truth, relative to the truth's largest;
 * INFINITY if a padding token has anything but zero. */
static double difference(const test_case *c, const halo_layout *l, const halo_ring *ring,
                         const halo_tensor *t, const double *truth, int64_t heads) {
  const int64_t T = halo_layout_local_tokens(l), here = halo_ring_here(ring);
  double worst = 0, largest = 1e-2; // gradients of a single token are zero
  double *got = elements(t);
  for (int64_t i = 0; i < c->B * c->N * heads * c->D; i++) largest = fmax(largest, fabs(truth[i]));
  for (int64_t b = 0; b < c->B; b++) {
    for (int64_t i = 0; i < here * T; i++) {
      const int64_t token = halo_layout_global(l, halo_ring_rank(ring) + (int32_t)(i / T), i % T);
      for (int64_t x = 0; x < heads * c->D; x++) {
        const double have = got[(b * here * T + i) * heads * c->D + x];
        const double want = token < c->N ? truth[(b * c->N + token) * heads * c->D + x] : 0;
        if (token >= c->N && have != 0) worst = INFINITY;
        if (!(fabs(have - want) <= worst)) worst = fabs(have - want);
      }
    }
  }
  free(got);
  return worst / largest;
}

static double lse_difference(const test_case *c, const halo_layout *l, const halo_ring *ring,
                             const halo_tensor *t, const double *truth) {
  const int64_t T = halo_layout_local_tokens(l), here = halo_ring_here(ring);
  double worst = 0, largest = 1;
  double *got = elements(t);
  for (int64_t i = 0; i < c->B * c->H * c->N; i++) {
    if (truth[i] > -INFINITY) largest = fmax(largest, fabs(truth[i]));
  }
  for (int64_t row = 0; row < c->B * c->H; row++) {
    for (int64_t i = 0; i < here * T; i++) {
      const int64_t token = halo_layout_global(l, halo_ring_rank(ring) + (int32_t)(i / T), i % T);
      const double have = got[row * here * T + i];
      const double want = token < c->N ? truth[row * c->N + token] : -INFINITY;
      if (have == want) continue; // -inf too
      if (!(fabs(have - want) <= worst)) worst = fabs(have - want);
    }
  }
  free(got);
  return worst / largest;
}

typedef struct tensors {
  halo_tensor *q, *k, *v, *grad, *out, *lse;
} tensors;

static void tensors_free(tensors *t) {
  halo_tensor_free(t->q), halo_tensor_free(t->k), halo_tensor_free(t->v);
  halo_tensor_free(t->grad), halo_tensor_free(t->out), halo_tensor_free(t->lse);
}

static halo_status backward(halo_tensor *root, halo_tensor *seed) {
  halo_backward *b;
  int32_t event;
  int64_t token;
  HALO_TRY(halo_backward_begin(&b, root, seed));
  halo_status status = halo_backward_next(b, &event, &token);
  halo_backward_free(b);
  return status;
}

/* Forward and backward of a case; gradients end in q, k, v. */
static tensors run(const test_case *c, const halo_layout *l, halo_ring *ring, halo_plan *plan) {
  tensors t = {0};
  t.q = scatter(c, l, ring, Q, c->H, 3);
  t.k = scatter(c, l, ring, K, c->Hk, 3);
  t.v = scatter(c, l, ring, V, c->Hk, 3);
  t.grad = scatter(c, l, ring, GRAD, c->H, 3);
  CHECK_OK(halo_tensor_require_grad(t.q, 1));
  CHECK_OK(halo_tensor_require_grad(t.k, 1));
  CHECK_OK(halo_tensor_require_grad(t.v, 1));
  CHECK_OK(halo_attention(&t.out, &t.lse, t.q, t.k, t.v, plan, ring, scale_of(c)));
  CHECK_OK(backward(t.out, t.grad));
  return t;
}

static const char *const plan_names[] = {"dense",     "sparse", "columns",
                                         "documents", "mixed",  "holes"};
static int64_t n_runs;
static double worst_error[2]; /* fp32, fp64 */

/* One run against the truth. */
static void compare(const test_case *c, halo_comm *comm, int kind, int schedule, int inner,
                    const result *truth, double tolerance) {
  halo_layout *l;
  halo_ring *ring;
  CHECK_OK(halo_layout_new(&l, kind, c->N, halo_comm_size(comm), c->G));
  CHECK_OK(halo_ring_new(&ring, comm, schedule, inner));
  halo_plan *plan = make_plan(c, l);
  tensors t = run(c, l, ring, plan);
  double error[5] = {difference(c, l, ring, t.out, truth->out, c->H),
                     lse_difference(c, l, ring, t.lse, truth->lse),
                     difference(c, l, ring, halo_tensor_grad(t.q), truth->dq, c->H),
                     difference(c, l, ring, halo_tensor_grad(t.k), truth->dk, c->Hk),
                     difference(c, l, ring, halo_tensor_grad(t.v), truth->dv, c->Hk)};
  bool ok = true;
  for (int i = 0; i < 5; i++) {
    ok &= error[i] <= tolerance; // also false for NaN
    double *worst = &worst_error[c->dtype == HALO_F64];
    if (c->dtype != HALO_BF16 && error[i] > *worst) *worst = error[i];
  }
  CHECK(ok);
  if (!ok) {
    fprintf(
        stderr,
        "  %s N=%lld H=%lld/%lld D=%lld G=%lld %s W=%d layout %d schedule %d inner %d: out %.2e "
        "lse %.2e dq %.2e dk %.2e dv %.2e\n",
        plan_names[c->plan], (long long)c->N, (long long)c->H, (long long)c->Hk, (long long)c->D,
        (long long)c->G, halo_dtype_name(c->dtype), halo_comm_size(comm), kind, schedule, inner,
        error[0], error[1], error[2], error[3], error[4]);
  }
  n_runs++;
  tensors_free(&t);
  halo_plan_free(plan);
  halo_ring_free(ring);
  halo_layout_free(l);
}

static result truth_of(const test_case *c) {
  halo_layout *l;
  CHECK_OK(halo_layout_new(&l, HALO_LAYOUT_CONTIGUOUS, c->N, 1, c->G));
  halo_plan *plan = make_plan(c, l);
  result truth = oracle(c, plan);
  halo_plan_free(plan);
  halo_layout_free(l);
  return truth;
}

/* Every schedule that fits the number of ranks, in one layout. */
static void compare_schedules(const test_case *c, halo_comm *comm, int kind, const result *truth,
                              double tolerance) {
  const int W = halo_comm_size(comm);
  compare(c, comm, kind, HALO_SCHEDULE_FLAT, 0, truth, tolerance);
  compare(c, comm, kind, HALO_SCHEDULE_GATHER, 0, truth, tolerance);
  for (int inner = 1; inner <= W && W > 1; inner++) {
    if (W % inner == 0) compare(c, comm, kind, HALO_SCHEDULE_HIERARCHICAL, inner, truth, tolerance);
  }
}

static const test_case sweep_cases[] = {
    // plan, B, N, H, Hk, D, G: N never divides; GQA ratios 1, 2, 8
    {DENSE, 2, 45, 2, 2, 8, 4, HALO_F64, 2},   {SPARSE, 2, 61, 4, 2, 8, 4, HALO_F64, 2},
    {COLUMNS, 1, 50, 8, 1, 8, 8, HALO_F64, 2}, {DOCUMENTS, 2, 53, 2, 1, 8, 4, HALO_F64, 2},
    {MIXED, 2, 47, 4, 4, 8, 4, HALO_F64, 2},   {HOLES, 1, 59, 4, 2, 8, 4, HALO_F64, 2},
    {DENSE, 1, 33, 8, 1, 8, 4, HALO_F64, 2},   {MIXED, 1, 37, 12, 2, 8, 4, HALO_F64, 2},
    {DENSE, 1, 9, 2, 1, 8, 4, HALO_F64, 2}, // fewer blocks than ranks
    {MIXED, 1, 1, 1, 1, 8, 4, HALO_F64, 2}, // one token
};
enum { SWEEP = sizeof sweep_cases / sizeof sweep_cases[0] };

/* fp64 to 1e-12 and fp32 to 1e-5 (a GPU's exponentials: 2e-5), the whole product of ranks, layouts and schedules. */
static void ring_equals_definition(void) {
  static const int worlds[] = {1, 2, 3, 4, 8};
  for (int i = 0; i < SWEEP; i++) {
    test_case c = sweep_cases[i];
    result truth = truth_of(&c);
    for (int w = 0; w < 5; w++) {
      halo_comm *comm;
      CHECK_OK(halo_comm_local(&comm, worlds[w]));
      for (int kind = 0; kind < 3; kind++) {
        for (int fp64 = 0; fp64 < 2; fp64++) {
          c.dtype = fp64 ? HALO_F64 : HALO_F32;
          compare_schedules(&c, comm, kind, &truth, fp64 ? 1e-12 : where == HALO_CPU ? 1e-5 : 2e-5);
        }
      }
      halo_comm_free(comm);
    }
    result_free(&truth);
  }
  fprintf(stderr, "  %lld runs, worst error fp32 %.2e, fp64 %.2e\n", (long long)n_runs,
          worst_error[0], worst_error[1]);
}

/* Head sizes and blocks around the vector and panel widths. */
static void any_shape(void) {
  static const struct { int64_t D, G; } shapes[] = {{1, 1},  {3, 2},  {5, 7},   {16, 16}, {17, 20},
                                                    {64, 64}, {80, 24}, {128, 33}, {100, 64}};
  halo_comm *comm;
  CHECK_OK(halo_comm_local(&comm, 2));
  for (int i = 0; i < 9; i++) {
    for (int plan = 0; plan < 3; plan++) {
      test_case c = {plan, 1, 5 * shapes[i].G + 1, 2, 1, shapes[i].D, shapes[i].G, HALO_F64, 1};
      if (c.N > 200) c.N = 2 * shapes[i].G + 1;
      result truth = truth_of(&c);
      compare(&c, comm, HALO_LAYOUT_STRIPED, HALO_SCHEDULE_FLAT, 0, &truth, 1e-12);
      c.dtype = HALO_F32;
      compare(&c, comm, HALO_LAYOUT_STRIPED, HALO_SCHEDULE_FLAT, 0, &truth, 1e-5);
      c.dtype = HALO_BF16; // inputs and results have 8 bits; partial sums are fp32
      compare(&c, comm, HALO_LAYOUT_STRIPED, HALO_SCHEDULE_FLAT, 0, &truth, 3e-2);
      result_free(&truth);
    }
  }
  halo_comm_free(comm);
}

/* A device's own kernels for bf16: their sizes, every plan, one rank and virtual ones. */
static void tensor_core_shapes(void) {
  static const struct { int64_t D, G; } shapes[] = {{64, 64}, {128, 64}, {64, 128}, {128, 128}};
  for (int W = 1; W <= 2; W++) {
    halo_comm *comm;
    CHECK_OK(halo_comm_local(&comm, W));
    for (int i = 0; i < 4; i++) {
      for (int plan = 0; plan < 6; plan++) {
        test_case c = {plan, 1, 4 * shapes[i].G + 1, 4, 2, shapes[i].D, shapes[i].G, HALO_BF16, 1};
        result truth = truth_of(&c);
        compare(&c, comm, HALO_LAYOUT_STRIPED, HALO_SCHEDULE_FLAT, 0, &truth, 3e-2);
        result_free(&truth);
      }
    }
    halo_comm_free(comm);
  }
}

/* Logits of several hundred: only differences to the maximum may be exponentiated. */
static void large_logits(void) {
  test_case c = {DENSE, 1, 45, 2, 1, 8, 4, HALO_F64, 30};
  result truth = truth_of(&c);
  halo_comm *comm;
  CHECK_OK(halo_comm_local(&comm, 3));
  compare(&c, comm, HALO_LAYOUT_ZIGZAG, HALO_SCHEDULE_FLAT, 0, &truth, 1e-12);
  halo_comm_free(comm);
  result_free(&truth);
}

/* The error must not grow with the number of ranks: partial results that were rounded to the
 * storage type at every step would show here (distributed.md 3). */
static void bf16_error_is_flat(void) {
  test_case c = {DENSE, 1, 128, 2, 1, 16, 4, HALO_BF16, 2};
  double first = 0;
  // The truth of the rounded inputs, through the fp64 path on one rank.
  for (int W = 1; W <= 16; W *= 4) {
    halo_comm *comm;
    halo_layout *l;
    halo_ring *ring;
    CHECK_OK(halo_comm_local(&comm, W));
    CHECK_OK(halo_layout_new(&l, HALO_LAYOUT_STRIPED, c.N, W, c.G));
    CHECK_OK(halo_ring_new(&ring, comm, HALO_SCHEDULE_FLAT, 0));
    halo_plan *plan = make_plan(&c, l);
    tensors t = run(&c, l, ring, plan);
    tensors exact = {0};
    halo_tensor *from[4] = {t.q, t.k, t.v, t.grad},
                **to[4] = {&exact.q, &exact.k, &exact.v, &exact.grad};
    for (int i = 0; i < 4; i++) {
      CHECK_OK(halo_tensor_new(to[i], HALO_F64, HALO_CPU, 4, from[i]->shape));
      CHECK_OK(halo_tensor_copy(*to[i], from[i]));
      if (i < 3) CHECK_OK(halo_tensor_require_grad(*to[i], 1));
    }
    CHECK_OK(halo_attention(&exact.out, &exact.lse, exact.q, exact.k, exact.v, plan, ring,
                            scale_of(&c)));
    CHECK_OK(backward(exact.out, exact.grad));
    double error = 0;
    halo_tensor *got[4] = {t.out, halo_tensor_grad(t.q), halo_tensor_grad(t.k),
                           halo_tensor_grad(t.v)};
    halo_tensor *want[4] = {exact.out, halo_tensor_grad(exact.q), halo_tensor_grad(exact.k),
                            halo_tensor_grad(exact.v)};
    for (int i = 0; i < 4; i++) {
      double *x = elements(got[i]), *y = elements(want[i]);
      for (int64_t j = 0; j < halo_tensor_count(got[i]); j++)
        error = fmax(error, fabs(x[j] - y[j]));
      free(x);
      free(y);
    }
    if (W == 1) first = error;
    CHECK(error <= 1.2 * first);
    tensors_free(&t);
    tensors_free(&exact);
    halo_plan_free(plan);
    halo_ring_free(ring);
    halo_layout_free(l);
    halo_comm_free(comm);
  }
}

static bool same_bits(const halo_tensor *a, const halo_tensor *b) {
  return memcmp(halo_tensor_data(a), halo_tensor_data(b),
                (size_t)(halo_tensor_count(a) * halo_dtype_bytes(a->dtype))) == 0;
}

static bool same_results(const tensors *a, const tensors *b) {
  return same_bits(a->out, b->out) && same_bits(a->lse, b->lse) &&
         same_bits(halo_tensor_grad(a->q), halo_tensor_grad(b->q)) &&
         same_bits(halo_tensor_grad(a->k), halo_tensor_grad(b->k)) &&
         same_bits(halo_tensor_grad(a->v), halo_tensor_grad(b->v));
}

/* Again, with other threads, and with gather in place of the flat ring: the same bits. */
static void repeats_bitwise(void) {
  test_case c = {SPARSE, 2, 203, 4, 2, 64, 16, HALO_F32, 1}; // enough for threads to share
  halo_comm *comm;
  halo_layout *l;
  halo_ring *flat, *gather;
  CHECK_OK(halo_comm_local(&comm, 4));
  CHECK_OK(halo_layout_new(&l, HALO_LAYOUT_STRIPED, c.N, 4, c.G));
  CHECK_OK(halo_ring_new(&flat, comm, HALO_SCHEDULE_FLAT, 0));
  CHECK_OK(halo_ring_new(&gather, comm, HALO_SCHEDULE_GATHER, 0));
  halo_plan *plan = make_plan(&c, l);
  tensors first = run(&c, l, flat, plan);
  const int32_t threads = halo_threads();
  for (int i = 0; i < 3; i++) {
    halo_set_threads(i == 1 ? 3 : 1);
    tensors again = run(&c, l, i == 2 ? gather : flat, plan);
    CHECK(same_results(&first, &again));
    tensors_free(&again);
  }
  halo_set_threads(threads);
  tensors_free(&first);
  halo_plan_free(plan);
  halo_ring_free(flat);
  halo_ring_free(gather);
  halo_layout_free(l);
  halo_comm_free(comm);
}

/* loss = sum(grad * out) against central differences, on two ranks. */
static void gradients_match_differences(void) {
  test_case c = {SPARSE, 1, 21, 4, 2, 8, 4, HALO_F64, 1};
  halo_comm *comm;
  halo_layout *l;
  halo_ring *ring;
  CHECK_OK(halo_comm_local(&comm, 2));
  CHECK_OK(halo_layout_new(&l, HALO_LAYOUT_STRIPED, c.N, 2, c.G));
  CHECK_OK(halo_ring_new(&ring, comm, HALO_SCHEDULE_FLAT, 0));
  halo_plan *plan = make_plan(&c, l);
  tensors t = run(&c, l, ring, plan);
  halo_tensor *inputs[3] = {t.q, t.k, t.v};
  uint64_t state = 5;
  const int32_t was = halo_tape_set_enabled(0);
  for (int i = 0; i < 3; i++) {
    double largest = 0, worst = 0;
    for (int64_t j = 0; j < halo_tensor_count(inputs[i]); j++) {
      double g;
      CHECK_OK(halo_tensor_get(halo_tensor_grad(inputs[i]), j, &g));
      largest = fmax(largest, fabs(g));
    }
    for (int trial = 0; trial < 60; trial++) {
      const int64_t at = (int64_t)(dice(&state) % (uint64_t)halo_tensor_count(inputs[i]));
      double x, gradient, loss[2];
      CHECK_OK(halo_tensor_get(inputs[i], at, &x));
      CHECK_OK(halo_tensor_get(halo_tensor_grad(inputs[i]), at, &gradient));
      for (int side = 0; side < 2; side++) {
        halo_tensor *out;
        CHECK_OK(halo_tensor_set(inputs[i], at, x + (side ? 6e-6 : -6e-6)));
        CHECK_OK(halo_attention(&out, NULL, t.q, t.k, t.v, plan, ring, scale_of(&c)));
        const double *o = halo_tensor_data(out), *g = halo_tensor_data(t.grad);
        loss[side] = 0;
        for (int64_t j = 0; j < halo_tensor_count(out); j++) loss[side] += o[j] * g[j];
        halo_tensor_free(out);
      }
      CHECK_OK(halo_tensor_set(inputs[i], at, x));
      worst = fmax(worst, fabs((loss[1] - loss[0]) / 12e-6 - gradient));
    }
    CHECK(largest > 0.1 && worst <= 1e-8 * largest);
  }
  halo_tape_set_enabled(was);
  tensors_free(&t);
  halo_plan_free(plan);
  halo_ring_free(ring);
  halo_layout_free(l);
  halo_comm_free(comm);
}

/* ---- one process only
 * ---------------------------------------------------------------------------- */

/* q, k, v as slices of one fused [B,T,(H+2Hk)*D] tensor, as a fused projection gives them, and an
 * output gradient with odd strides. */
static void strided_inputs(void) {
  test_case c = {SPARSE, 2, 45, 4, 2, 8, 4, HALO_F64, 2};
  halo_comm *comm;
  halo_layout *l;
  halo_ring *ring;
  CHECK_OK(halo_comm_local(&comm, 3));
  CHECK_OK(halo_layout_new(&l, HALO_LAYOUT_STRIPED, c.N, 3, c.G));
  CHECK_OK(halo_ring_new(&ring, comm, HALO_SCHEDULE_FLAT, 0));
  halo_plan *plan = make_plan(&c, l);
  tensors plain = run(&c, l, ring, plan), t = {0};
  const int64_t T = plain.q->shape[1], heads = c.H + 2 * c.Hk, row = heads * c.D;
  const int64_t fused_shape[4] = {c.B, T, heads, c.D}, wide_shape[4] = {c.D, c.H, T, c.B};
  const int64_t stride[4] = {T * row, row, c.D, 1},
                wide_stride[4] = {1, c.B, T * c.B, c.H * T * c.B};
  halo_tensor *fused, *wide;
  CHECK_OK(halo_tensor_new(&fused, HALO_F64, HALO_CPU, 4, fused_shape));
  CHECK_OK(halo_tensor_new(&wide, HALO_F64, HALO_CPU, 4, wide_shape));
  halo_tensor **to[4] = {&t.q, &t.k, &t.v, &t.grad};
  halo_tensor *from[4] = {plain.q, plain.k, plain.v, plain.grad};
  const int64_t offset[3] = {0, c.H * c.D, (c.H + c.Hk) * c.D};
  for (int i = 0; i < 4; i++) {
    CHECK_OK(halo__view(to[i], i < 3 ? fused : wide, 4, from[i]->shape,
                        i < 3 ? stride : wide_stride, i < 3 ? offset[i] : 0));
    CHECK_OK(halo_tensor_copy(*to[i], from[i]));
    if (i < 3) CHECK_OK(halo_tensor_require_grad(*to[i], 1));
  }
  CHECK_OK(halo_attention(&t.out, &t.lse, t.q, t.k, t.v, plan, ring, scale_of(&c)));
  CHECK_OK(backward(t.out, t.grad));
  CHECK(same_results(&plain, &t));
  tensors_free(&plain);
  tensors_free(&t);
  halo_tensor_free(fused);
  halo_tensor_free(wide);
  halo_plan_free(plan);
  halo_ring_free(ring);
  halo_layout_free(l);
  halo_comm_free(comm);
}

/* The trace counts 4 D flops a computed pair forward and 10 D backward, as halo_plan_work does. */
static void work_is_traced(void) {
  test_case c = {SPARSE, 2, 61, 4, 2, 8, 4, HALO_F32, 1};
  halo_comm *comm;
  halo_layout *l;
  halo_ring *ring;
  CHECK_OK(halo_comm_local(&comm, 3));
  CHECK_OK(halo_layout_new(&l, HALO_LAYOUT_STRIPED, c.N, 3, c.G));
  CHECK_OK(halo_ring_new(&ring, comm, HALO_SCHEDULE_FLAT, 0));
  halo_plan *plan = make_plan(&c, l);
  double work[64], total = 0, traced = 0;
  int32_t steps;
  CHECK_OK(halo_plan_work(plan, c.D, work, 64, &steps));
  for (int i = 0; i < 3 * steps; i++) total += work[i];
  halo_trace_reset();
  tensors t = run(&c, l, ring, plan);
  for (int32_t id = 0; id < halo_trace_names(); id++) {
    halo_trace_row row;
    CHECK_OK(halo_trace_read(&row, id));
    if (strstr(row.name, "attention") != NULL) traced += row.flops;
  }
  CHECK(total > 0 && fabs(traced - 3.5 * total) <= 1e-9 * total);
  if (fabs(traced - 3.5 * total) > 1e-9 * total) {
    fprintf(stderr, "  %g traced, %g planned\n", traced, total);
  }
  tensors_free(&t);
  halo_plan_free(plan);
  halo_ring_free(ring);
  halo_layout_free(l);
  halo_comm_free(comm);
}

static void merges(void) {
  const int64_t shape[4] = {1, 2, 1, 1}, lse_shape[3] = {1, 1, 2};
  const double inf = INFINITY;
  // {o, lse} of two rows; merged with {o_part, lse_part}
  const struct { double o, lse, o_part, lse_part, want_o, want_lse; } rows[] = {
      {0, -inf, 0, -inf, 0, -inf},                    // both empty
      {0, -inf, 3, 0.5, 3, 0.5},                      // (0, -inf) is the identity, either side
      {3, 0.5, 0, -inf, 3, 0.5},
      {1, log(3), 5, log(1), 2, log(4)},              // weights 3 and 1
      {1, log(1), 5, log(3), 4, log(4)},
      {2, 1000, 7, -1000, 2, 1000},                   // far apart
      {2, -1000, 7, 1000, 7, 1000},
  };
  for (int i = 0; i < 7; i++) {
    for (int dtype = HALO_F32; dtype <= HALO_BF16; dtype++) {
      halo_tensor *o, *lse, *op, *lp;
      const int32_t acc = dtype == HALO_F64 ? HALO_F64 : HALO_F32;
      CHECK_OK(halo_tensor_zeros(&o, dtype, HALO_CPU, 4, shape));
      CHECK_OK(halo_tensor_zeros(&op, dtype, HALO_CPU, 4, shape));
      CHECK_OK(halo_tensor_zeros(&lse, acc, HALO_CPU, 3, lse_shape));
      CHECK_OK(halo_tensor_zeros(&lp, acc, HALO_CPU, 3, lse_shape));
      CHECK_OK(halo_tensor_set(o, 1, rows[i].o));
      CHECK_OK(halo_tensor_set(lse, 1, rows[i].lse));
      CHECK_OK(halo_tensor_set(op, 1, rows[i].o_part));
      CHECK_OK(halo_tensor_set(lp, 1, rows[i].lse_part));
      CHECK_OK(halo_attention_merge(o, lse, op, lp));
      double got_o, got_lse;
      CHECK_OK(halo_tensor_get(o, 1, &got_o));
      CHECK_OK(halo_tensor_get(lse, 1, &got_lse));
      const double eps = dtype == HALO_F64 ? 1e-14 : 1e-6;
      CHECK(fabs(got_o - rows[i].want_o) <= eps * 10);
      CHECK(got_lse == rows[i].want_lse || fabs(got_lse - rows[i].want_lse) <= eps * 10);
      halo_tensor *short_lse;
      CHECK_OK(halo_tensor_zeros(&short_lse, acc, HALO_CPU, 3, (const int64_t[]){1, 1, 1}));
      CHECK_STATUS(halo_attention_merge(o, short_lse, op, short_lse), HALO_EARG);
      halo_tensor_free(o), halo_tensor_free(op), halo_tensor_free(lse), halo_tensor_free(lp);
      halo_tensor_free(short_lse);
    }
  }
}

/* Decoding against a cache that is dealt to two owners and merged equals the dense rows. */
static void cached_equals_dense(void) {
  static const struct {
    int64_t H, Hk, D, Tq;
  } shapes[] = {{4, 2, 8, 3}, {6, 6, 20, 1}, {8, 1, 64, 19}};
  for (int i = 0; i < 3; i++) {
    test_case c = {DENSE, 2, 151, shapes[i].H, shapes[i].Hk, shapes[i].D, 4, HALO_F64, 2};
    const int64_t Tq = shapes[i].Tq, first_query = c.N - Tq, capacity = 100;
    result truth = truth_of(&c);
    for (int fp64 = 0; fp64 < 2; fp64++) {
      const int32_t dtype = fp64 ? HALO_F64 : HALO_F32;
      halo_tensor *q, *out = NULL, *lse = NULL, *query_at;
      CHECK_OK(halo_tensor_new(&q, dtype, HALO_CPU, 4, (const int64_t[]){c.B, Tq, c.H, c.D}));
      CHECK_OK(halo_tensor_new(&query_at, HALO_I64, HALO_CPU, 1, &Tq));
      for (int64_t t = 0; t < Tq; t++) {
        CHECK_OK(halo_tensor_set(query_at, t, (double)(first_query + t)));
      }
      for (int64_t j = 0; j < halo_tensor_count(q); j++) {
        const int64_t d = j % c.D, h = j / c.D % c.H;
        const int64_t t = j / c.D / c.H % Tq, b = j / c.D / c.H / Tq;
        CHECK_OK(halo_tensor_set(q, j, value(&c, Q, b, first_query + t, h, d)));
      }
      for (int64_t owner = 0; owner < 2; owner++) { // tokens owner, owner + 2, ...
        const int64_t length = (c.N - owner + 1) / 2;
        halo_tensor *k, *v, *at, *o, *l;
        const int64_t cache[4] = {c.B, capacity, c.Hk, c.D};
        CHECK_OK(halo_tensor_zeros(&k, dtype, HALO_CPU, 4, cache));
        CHECK_OK(halo_tensor_zeros(&v, dtype, HALO_CPU, 4, cache));
        CHECK_OK(halo_tensor_zeros(&at, HALO_I64, HALO_CPU, 1, &capacity));
        for (int64_t j = 0; j < c.B * length * c.Hk * c.D; j++) {
          const int64_t d = j % c.D, h = j / c.D % c.Hk, x = j / c.D / c.Hk % length;
          const int64_t b = j / c.D / c.Hk / length, to = ((b * capacity + x) * c.Hk + h) * c.D + d;
          CHECK_OK(halo_tensor_set(k, to, value(&c, K, b, owner + 2 * x, h, d)));
          CHECK_OK(halo_tensor_set(v, to, value(&c, V, b, owner + 2 * x, h, d)));
          CHECK_OK(halo_tensor_set(at, x, (double)(owner + 2 * x)));
        }
        CHECK_OK(halo_attention_cached(&o, &l, q, k, v, length, at, query_at, scale_of(&c)));
        if (owner == 0) {
          out = o;
          lse = l;
        } else {
          CHECK_OK(halo_attention_merge(out, lse, o, l));
          halo_tensor_free(o);
          CHECK_OK(halo_attention_cached(&o, NULL, q, k, v, 0, at, query_at, scale_of(&c)));
          for (int64_t j = 0; j < halo_tensor_count(o); j++) { // no keys: zeros
            double x;
            CHECK_OK(halo_tensor_get(o, j, &x));
            CHECK(x == 0);
          }
          CHECK_STATUS(halo_attention_cached(&o, NULL, q, k, v, capacity + 1, at, query_at, 1),
                       HALO_EARG);
          halo_tensor_free(o);
          halo_tensor_free(l);
        }
        halo_tensor_free(k), halo_tensor_free(v), halo_tensor_free(at);
      }
      double worst = 0;
      for (int64_t j = 0; j < halo_tensor_count(out); j++) {
        const int64_t x = j % (c.D * c.H), t = j / (c.D * c.H) % Tq, b = j / (c.D * c.H) / Tq;
        double got;
        CHECK_OK(halo_tensor_get(out, j, &got));
        worst = fmax(worst, fabs(got - truth.out[(b * c.N + first_query + t) * c.H * c.D + x]));
      }
      for (int64_t j = 0; j < halo_tensor_count(lse); j++) {
        double got;
        CHECK_OK(halo_tensor_get(lse, j, &got));
        worst = fmax(worst, fabs(got - truth.lse[j / Tq * c.N + first_query + j % Tq]));
      }
      CHECK(worst <= (fp64 ? 1e-12 : 1e-5));
      halo_tensor_free(q), halo_tensor_free(out), halo_tensor_free(lse), halo_tensor_free(query_at);
    }
    result_free(&truth);
  }
}

/* A NaN reaches every row that sees it, and no block before its own. Inside its block it may reach
 * rows before it: 0 * NaN is NaN. */
static void nan_is_not_swallowed(void) {
  test_case c = {SPARSE, 1, 45, 2, 1, 8, 4, HALO_F32, 2};
  halo_comm *comm;
  halo_layout *l;
  halo_ring *ring;
  CHECK_OK(halo_comm_self(&comm));
  CHECK_OK(halo_layout_new(&l, HALO_LAYOUT_CONTIGUOUS, c.N, 1, c.G));
  CHECK_OK(halo_ring_new(&ring, comm, HALO_SCHEDULE_FLAT, 0));
  halo_plan *plan = make_plan(&c, l);
  const int64_t token = 17;
  for (int which = 0; which < 2; which++) {
    tensors t = {0};
    t.q = scatter(&c, l, ring, Q, c.H, 0);
    t.k = scatter(&c, l, ring, K, c.Hk, 0);
    t.v = scatter(&c, l, ring, V, c.Hk, 0);
    CHECK_OK(halo_tensor_set(which ? t.k : t.v, token * c.Hk * c.D, NAN));
    CHECK_OK(halo_attention(&t.out, &t.lse, t.q, t.k, t.v, plan, ring, 1));
    for (int64_t i = 0; i < c.N; i++) {
      for (int64_t h = 0; h < c.H; h++) {
        double x;
        CHECK_OK(halo_tensor_get(t.out, (i * c.H + h) * c.D, &x));
        if (halo_plan_visible(plan, 0, h, i, token)) CHECK(isnan(x));
        if (i < token / c.G * c.G) CHECK(!isnan(x));
      }
    }
    tensors_free(&t);
  }
  halo_plan_free(plan);
  halo_ring_free(ring);
  halo_layout_free(l);
  halo_comm_free(comm);
}

static void bad_arguments_are_refused(void) {
  test_case c = {DENSE, 1, 16, 4, 2, 8, 4, HALO_F32, 1};
  halo_comm *comm;
  halo_layout *l;
  halo_ring *ring;
  CHECK_OK(halo_comm_local(&comm, 2));
  CHECK_OK(halo_layout_new(&l, HALO_LAYOUT_STRIPED, c.N, 2, c.G));
  CHECK_OK(halo_ring_new(&ring, comm, HALO_SCHEDULE_FLAT, 0));
  halo_plan *plan = make_plan(&c, l), *open;
  halo_tensor *q = scatter(&c, l, ring, Q, 4, 0), *k = scatter(&c, l, ring, K, 2, 0);
  halo_tensor *three = scatter(&c, l, ring, K, 3, 0), *out = NULL, *half, *narrow;
  CHECK_OK(halo_tensor_zeros(&half, HALO_BF16, HALO_CPU, 4, k->shape));
  CHECK_OK(halo_tensor_zeros(&narrow, HALO_F32, HALO_CPU, 4, (const int64_t[]){1, 16, 2, 4}));
  CHECK_STATUS(halo_attention(&out, NULL, q, three, three, plan, ring, 1), HALO_EARG);
  CHECK_STATUS(halo_attention(&out, NULL, q, k, half, plan, ring, 1), HALO_EARG);
  CHECK_STATUS(halo_attention(&out, NULL, q, narrow, narrow, plan, ring, 1), HALO_EARG);
  CHECK(strstr(halo_error_message(), "k has head size 4, q has 8") != NULL);
  CHECK_STATUS(halo_attention(&out, NULL, k, k, k, plan, ring, 1), HALO_EARG); // heads of the plan
  CHECK_STATUS(halo_attention(&out, NULL, q, k, k, NULL, ring, 1), HALO_EARG);
  CHECK_STATUS(halo_attention(&out, NULL, q, k, k, plan, NULL, 1), HALO_EARG);
  CHECK_OK(halo_plan_new(&open, l, 1, 4));
  CHECK_STATUS(halo_attention(&out, NULL, q, k, k, open, ring, 1), HALO_ESTATE); // not finished
  halo_plan_free(open);
  halo_layout *other;
  CHECK_OK(halo_layout_new(&other, HALO_LAYOUT_STRIPED, c.N, 4, c.G));
  halo_plan *foreign = make_plan(&c, other);
  CHECK_STATUS(halo_attention(&out, NULL, q, k, k, foreign, ring, 1), HALO_EARG); // ranks
  CHECK(out == NULL);
  halo_plan_free(foreign);
  halo_layout_free(other);
  halo_tensor_free(q), halo_tensor_free(k), halo_tensor_free(three), halo_tensor_free(half);
  halo_tensor_free(narrow);
  halo_plan_free(plan);
  halo_ring_free(ring);
  halo_layout_free(l);
  halo_comm_free(comm);
}

/* Allocation n fails, n = 0, 1, 2 ...: an error each time, no leak, and the same ring works on. */
static void survives_failed_allocations(void) {
  test_case c = {SPARSE, 1, 45, 4, 2, 8, 4, HALO_F32, 1};
  halo_comm *comm;
  halo_layout *l;
  CHECK_OK(halo_comm_local(&comm, 2));
  CHECK_OK(halo_layout_new(&l, HALO_LAYOUT_STRIPED, c.N, 2, c.G));
  bool is_done = false;
  for (int64_t n = 0; !is_done && n < 1000; n++) {
    halo_ring *ring;
    CHECK_OK(halo_ring_new(&ring, comm, HALO_SCHEDULE_FLAT, 0));
    halo_plan *plan = make_plan(&c, l);
    halo_tensor *q = scatter(&c, l, ring, Q, c.H, 0), *k = scatter(&c, l, ring, K, c.Hk, 0);
    halo_tensor *out = NULL;
    CHECK_OK(halo_tensor_require_grad(q, 1));
    CHECK_OK(halo_tensor_require_grad(k, 1));
    halo_memory_fail_after(n);
    halo_status status = halo_attention(&out, NULL, q, k, k, plan, ring, 1);
    if (status == HALO_OK) status = backward(out, NULL);
    halo_memory_fail_after(-1);
    is_done = status == HALO_OK;
    CHECK(is_done || status == HALO_ENOMEM);
    halo_tensor_free(out);
    out = NULL;
    CHECK_OK(halo_attention(&out, NULL, q, k, k, plan, ring, 1));
    CHECK_OK(backward(out, NULL));
    halo_tensor_free(out), halo_tensor_free(q), halo_tensor_free(k);
    halo_plan_free(plan);
    halo_ring_free(ring);
  }
  CHECK(is_done);
  halo_layout_free(l);
  halo_comm_free(comm);
}

/* The ranks of the launcher: each holds its part and checks it against the whole truth. */
static void ranks_equal_definition(halo_comm *comm) {
  for (int i = 0; i < SWEEP; i++) {
    test_case c = sweep_cases[i];
    result truth = truth_of(&c);
    for (int kind = 0; kind < 3; kind++) {
      compare_schedules(&c, comm, kind, &truth, 1e-12);
      c.dtype = HALO_F32;
      compare(&c, comm, kind, HALO_SCHEDULE_FLAT, 0, &truth, 1e-5);
      c.dtype = HALO_F64;
    }
    result_free(&truth);
  }
  test_case large = {SPARSE, 1, 700, 4, 2, 64, 16, HALO_F32, 1}; // beyond eager messages
  result truth = truth_of(&large);
  compare_schedules(&large, comm, HALO_LAYOUT_STRIPED, &truth, 1e-5);
  result_free(&truth);
}

int main(void) {
  halo_set_threads(1); // tiny shapes; threads have their own test
  if (getenv("OMPI_COMM_WORLD_SIZE") != NULL || getenv("PMI_SIZE") != NULL) {
    halo_comm *comm = NULL;
    CHECK_OK(halo_comm_world(&comm));
    if (comm != NULL) ranks_equal_definition(comm);
    halo_comm_free(comm);
    int failed = check_report();
    halo_comm_shutdown();
    return failed;
  }
  const char *device = getenv("HALO_TEST_DEVICE");
  if (device != NULL && strcmp(device, "cuda") == 0) { // the ring's checks with tensors there
    if (halo_device_count(HALO_CUDA) == 0) {
      printf("1 pending: %s\n", halo_device_reason(HALO_CUDA));
      return 0;
    }
    where = HALO_CUDA;
    RUN(tensor_core_shapes);
    RUN(any_shape);
    RUN(ring_equals_definition);
    CHECK(halo_memory_live_bytes(HALO_CUDA, HALO_TAG_RING) == 0);
    CHECK(halo_memory_live_bytes(HALO_CUDA, HALO_TAG_PLAN) == 0);
    return check_report();
  }
  RUN(ring_equals_definition);
  RUN(any_shape);
  RUN(large_logits);
  RUN(bf16_error_is_flat);
  RUN(repeats_bitwise);
  RUN(gradients_match_differences);
  RUN(strided_inputs);
  RUN(work_is_traced);
  RUN(merges);
  RUN(cached_equals_dense);
  RUN(nan_is_not_swallowed);
  RUN(bad_arguments_are_refused);
  const int64_t live = halo_memory_live_bytes(HALO_CPU, -1);
  RUN(survives_failed_allocations);
  CHECK(halo_memory_live_bytes(HALO_CPU, -1) == live);
  CHECK(halo_memory_live_bytes(HALO_CPU, HALO_TAG_RING) == 0);
  CHECK(halo_tape_live_nodes() == 0);
  return check_report();
}
