/* Attention backward on tensor cores against its definition: each family that the device has
 * (HALO_ATTENTION), over all keys at once and over two sets of keys with one dq, against the CPU twin in fp64
 * on the same bf16 values. Causal, documents, sparse lists, padding, rows and keys that meet nothing, strided
 * q, head sizes 64 and 128, blocks 64 and 128; dk and dv are NaN before. Deterministic runs must agree to the
 * last bit with each other. */
#include "check.h"

#ifndef HALO_WITH_CUDA

int main(void) {
  printf("1 pending: built without CUDA\n");
  return 0;
}

#else

#include "attention_case.h"

static const test_case cases[] = {
    {1, 1, 1, 128, 128, 1, CAUSAL, 0, 1},    {2, 4, 2, 128, 128, 3, CAUSAL, 1, 1},
    {2, 4, 2, 128, 128, 6, DOCUMENTS, 0, 1}, {2, 8, 2, 128, 128, 5, SPARSE, 0, 3},
    {2, 8, 2, 128, 128, 7, PADDED, 1, 1},    {1, 2, 1, 128, 128, 3, NOTHING, 0, 1},
    {1, 16, 2, 128, 128, 4, EVERYTHING, 0, 3}, {1, 6, 2, 128, 256, 3, PADDED, 0, 1},
    {2, 4, 2, 64, 128, 3, CAUSAL, 1, 1},     {2, 8, 2, 64, 128, 7, PADDED, 0, 3},
    {2, 4, 2, 128, 64, 7, CAUSAL, 1, 1},     {2, 8, 2, 128, 64, 9, PADDED, 0, 3},
    {2, 4, 2, 64, 64, 7, DOCUMENTS, 1, 1},   {2, 8, 2, 64, 64, 9, PADDED, 0, 3},
};

/* dq [B,H,T,D], dk, dv [B,Hk,T,D]. */
typedef struct gradients {
  int64_t n_q, n_k;
  double *dq, *dk, *dv;
} gradients;

static gradients make_gradients(const setting *s) {
  gradients g = {.n_q = s->n_rows * s->c.D, .n_k = s->n_k};
  g.dq = calloc((size_t)g.n_q, sizeof *g.dq);
  g.dk = calloc((size_t)g.n_k, sizeof *g.dk);
  g.dv = calloc((size_t)g.n_k, sizeof *g.dv);
  return g;
}
static void drop_gradients(gradients *g) {
  free(g->dq);
  free(g->dk);
  free(g->dv);
}

/* The truth; lse and delta in fp64 are left behind s->host. */
static gradients run_cpu_bwd(setting *s) {
  const int64_t D = s->c.D, width = s->c.H * D, stride[3] = {s->T * width, width, D};
  gradients g = make_gradients(s);
  double *out = malloc((size_t)g.n_q * 8), *lse = malloc((size_t)s->n_rows * 8);
  double *delta = malloc((size_t)s->n_rows * 8);
  run_cpu(s, out, lse);
  CHECK_OK(cpu->attention_delta(delta, out, stride, &s->host));
  s->host.lse = lse;
  s->host.delta = delta;
  s->host.dq = g.dq;
  s->host_keys.dk = g.dk;
  s->host_keys.dv = g.dv;
  CHECK_OK(cpu->attention_tiles_bwd(&s->host, &s->host_keys));
  free(out);
  return g;
}

static float *narrowed_on_device(const void *x, int64_t n) {
  float *y = malloc((size_t)n * sizeof *y);
  for (int64_t i = 0; i < n; i++) y[i] = (float)((const double *)x)[i];
  float *p = on_device(y, n * (int64_t)sizeof *y);
  free(y);
  return p;
}

/* dk and dv of one call are added to g, as the ring adds what comes back. */
static void take_keys(gradients *g, setting *s) {
  float *x = malloc((size_t)g->n_k * 4);
  CHECK_OK(cuda->copy_out(x, s->device_keys.dk, g->n_k * 4));
  for (int64_t i = 0; i < g->n_k; i++) g->dk[i] += x[i];
  CHECK_OK(cuda->copy_out(x, s->device_keys.dv, g->n_k * 4));
  for (int64_t i = 0; i < g->n_k; i++) g->dv[i] += x[i];
  free(x);
}

/* All keys at once (n 1) or in two calls. */
static gradients run_cuda_bwd(setting *s, int n, int32_t deterministic) {
  gradients g = make_gradients(s);
  float *x = calloc((size_t)g.n_q, 4);
  s->device.deterministic = deterministic;
  s->device.dq = on_device(x, g.n_q * 4);
  s->device_keys.dk = poisoned(g.n_k * 4);
  s->device_keys.dv = poisoned(g.n_k * 4);
  for (int i = 0; i < n; i++) {
    s->device_keys.by_query = n == 1 ? &s->all.device : &s->part[i].device;
    s->device_keys.by_key = n == 1 ? &s->all_by_key.device : &s->part_by_key[i].device;
    CHECK_OK(cuda->attention_tiles_bwd(&s->device, &s->device_keys));
    take_keys(&g, s);
  }
  CHECK_OK(cuda->copy_out(x, s->device.dq, g.n_q * 4));
  for (int64_t i = 0; i < g.n_q; i++) g.dq[i] = x[i];
  free(x);
  halo__free(s->device.dq);
  halo__free(s->device_keys.dk);
  halo__free(s->device_keys.dv);
  return g;
}

/* ||got - want|| / ||want||; NaN fails. p and ds rounded to bf16 cost about 1.7e-3 of the norm (measured). */
static double distance(const double *got, const double *want, int64_t n) {
  double error = 0, norm = 0;
  for (int64_t i = 0; i < n; i++) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return norm > 0 ? sqrt(error / norm) : sqrt(error);
}

static void compare(const char *what, const setting *s, const gradients *got, const gradients *want) {
  const double q = distance(got->dq, want->dq, want->n_q), k = distance(got->dk, want->dk, want->n_k);
  const double v = distance(got->dv, want->dv, want->n_k);
  fprintf(stderr, "  %-13s B %d H %d/%d D %3d blocks %d x %3d mask %d: dq %.1e dk %.1e dv %.1e\n", what,
          (int)s->c.B, (int)s->c.H, (int)s->c.Hk, (int)s->c.D, (int)s->c.NB, (int)s->c.G, (int)s->c.mask, q, k,
          v);
  const double most = s->c.mask == NOTHING ? 0 : 5e-3; // where nothing meets, exact zeros
  CHECK(q <= most && k <= most && v <= most);
}

/* A family asked for by name need not serve every block and head size, or in a fixed order. */
static int is_served(setting *s, const char *family, int32_t deterministic) {
  if (strcmp(family, "auto") == 0) return 1;
  s->device.deterministic = deterministic;
  s->device.dq = on_device(NULL, s->n_rows * s->c.D * 4); // added to
  CHECK_OK(cuda->zero(s->device.dq, s->n_rows * s->c.D * 4));
  s->device_keys.dk = poisoned(s->n_k * 4);
  s->device_keys.dv = poisoned(s->n_k * 4);
  s->device_keys.by_query = &s->all.device;
  s->device_keys.by_key = &s->all_by_key.device;
  const halo_status status = cuda->attention_tiles_bwd(&s->device, &s->device_keys);
  if (status != HALO_EUNSUPPORTED) CHECK_OK(status);
  halo__free(s->device.dq);
  halo__free(s->device_keys.dk);
  halo__free(s->device_keys.dv);
  return status != HALO_EUNSUPPORTED;
}

static void test_twins(const char *family) {
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    if (check_thins_out((int64_t)i)) continue;
    setting s = open_setting(&cases[i]);
    const int64_t n = s.n_rows * s.c.D, width = s.c.H * s.c.D;
    uint16_t *grad = sample(n, 1);
    s.host.grad = widened(grad, n);
    s.device.grad = on_device(grad, n * 2);
    const int64_t stride[3] = {s.T * width, width, s.c.D};
    for (int d = 0; d < 3; d++) s.host.grad_stride[d] = s.device.grad_stride[d] = stride[d];
    gradients want = run_cpu_bwd(&s);
    s.device.lse = narrowed_on_device(s.host.lse, s.n_rows);
    s.device.delta = narrowed_on_device(s.host.delta, s.n_rows);
    if (!is_served(&s, family, 0)) {
      printf("1 pending: %s has no kernel for D %d, blocks of %d here\n", family, (int)s.c.D, (int)s.c.G);
      drop_gradients(&want);
      close_setting(&s);
      continue;
    }
    gradients once = run_cuda_bwd(&s, 1, 0), twice = run_cuda_bwd(&s, 2, 0);
    compare("once", &s, &once, &want);
    compare("in two", &s, &twice, &want);
    if (is_served(&s, family, 1)) {
      gradients fixed = run_cuda_bwd(&s, 2, 1), again = run_cuda_bwd(&s, 2, 1);
      compare("deterministic", &s, &fixed, &want);
      CHECK(memcmp(fixed.dq, again.dq, (size_t)want.n_q * 8) == 0);
      CHECK(memcmp(fixed.dk, again.dk, (size_t)want.n_k * 8) == 0);
      CHECK(memcmp(fixed.dv, again.dv, (size_t)want.n_k * 8) == 0);
      drop_gradients(&fixed);
      drop_gradients(&again);
    } else {
      printf("1 pending: %s has no deterministic kernel for D %d, blocks of %d here\n", family, (int)s.c.D,
             (int)s.c.G);
    }
    gradients *all[] = {&want, &once, &twice};
    for (size_t k = 0; k < sizeof all / sizeof *all; k++) drop_gradients(all[k]);
    halo__free((void *)s.device.lse);
    halo__free((void *)s.device.delta);
    halo__free((void *)s.device.grad);
    free((void *)s.host.lse);
    free((void *)s.host.delta);
    free((void *)s.host.grad);
    free(grad);
    close_setting(&s);
  }
}

/* Words of the environment that mean nothing are told, not passed over. */
static void test_words(void) {
  setting s = open_setting(&cases[0]);
  const char *const words[][2] = {{"HALO_ATTENTION", "fast"}, {"HALO_ATTENTION_SHARED", "much"}};
  for (int i = 0; i < 2; i++) {
    setenv(words[i][0], words[i][1], 1);
    CHECK(cuda->attention_tiles_fwd(&s.device, &s.device_keys) == HALO_EARG);
    CHECK(strstr(halo_error_message(), words[i][1]) != NULL);
    unsetenv(words[i][0]);
  }
  close_setting(&s);
}

int main(void) {
  if (halo_device_count(HALO_CUDA) == 0) {
    printf("1 pending: no CUDA device\n");
    return 0;
  }
  cpu = halo__kernels(HALO_CPU);
  cuda = halo__kernels(HALO_CUDA);
  // A block of sm_86 may have 99 KB of shared memory, one of sm_80 163.
  const struct { const char *family, *shared; } runs[] = {
      {"hopper", "0"}, {"portable", "0"}, {"portable", "99"}, {"portable", "163"}, {"auto", "0"}};
  for (int i = 0; i < (check_is_small() ? 3 : 5); i++) {
    setenv("HALO_ATTENTION", runs[i].family, 1);
    setenv("HALO_ATTENTION_SHARED", runs[i].shared, 1);
    fprintf(stderr, "%s, shared memory %s\n", runs[i].family, runs[i].shared);
    test_twins(runs[i].family);
  }
  test_words();
  return check_report();
}

#endif
