/* Attention forward on tensor cores against its definition: the bf16 kernels of each family that the device
 * has (HALO_ATTENTION), through attention_once and through the running state over two sets of keys, against
 * the CPU twin in fp64 on the same bf16 values. Causal, documents, sparse lists, padding, rows that see
 * nothing, strided q and out, head sizes 64 and 128, blocks 64 and 128; outputs are NaN before. Last, one
 * tensor of more than 2^31 elements. */
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
    {2, 4, 2, 128, 128, 6, DOCUMENTS, 0, 1}, {2, 8, 2, 128, 128, 5, SPARSE, 0, 4},
    {2, 8, 2, 128, 128, 7, PADDED, 1, 1},    {1, 2, 1, 128, 128, 3, NOTHING, 0, 1},
    {1, 16, 2, 128, 128, 4, EVERYTHING, 0, 12}, {2, 4, 2, 64, 128, 3, CAUSAL, 1, 1},
    {2, 8, 2, 64, 128, 7, PADDED, 0, 4},     {2, 4, 2, 64, 128, 6, DOCUMENTS, 0, 1},
    {1, 16, 2, 64, 128, 4, EVERYTHING, 0, 12}, {1, 2, 1, 64, 128, 3, NOTHING, 0, 1},
    {1, 2, 1, 128, 64, 1, CAUSAL, 0, 1},
    {2, 4, 2, 128, 64, 7, CAUSAL, 1, 1},     {2, 8, 2, 128, 64, 9, PADDED, 0, 4},
    {2, 4, 2, 64, 64, 7, DOCUMENTS, 1, 1},   {2, 8, 2, 64, 64, 9, PADDED, 0, 4},
};

/* ||got - want|| / ||want||, and lse as close as fp32 lets it be. Rounding p and out to bf16 costs about
 * 2e-3 of the norm (measured); a plain bf16 program, which rounds scores as well, 3e-3 to 2e-2 on these
 * cases. NaN fails. */
static void compare(const char *what, const setting *s, const double *got, const double *want,
                    const double *got_lse, const double *want_lse) {
  double error = 0, norm = 0, worst = 0;
  for (int64_t i = 0; i < s->n_rows * s->c.D; i++) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  int n_wrong = 0;
  for (int64_t i = 0; i < s->n_rows; i++) {
    const double d = want_lse[i] == -INFINITY ? (got_lse[i] == -INFINITY ? 0 : NAN)
                                              : fabs(got_lse[i] - want_lse[i]);
    if (!(d <= 1e-4)) n_wrong++;
    if (d > worst) worst = d;
  }
  const double relative = norm > 0 ? sqrt(error / norm) : sqrt(error);
  fprintf(stderr, "  %-9s B %d H %d/%d D %3d blocks %d x %3d mask %d: out %.1e lse %.0e\n", what, (int)s->c.B,
          (int)s->c.H, (int)s->c.Hk, (int)s->c.D, (int)s->c.NB, (int)s->c.G, (int)s->c.mask, relative, worst);
  CHECK(relative <= (norm > 0 ? 3e-3 : 0.0));
  CHECK(n_wrong == 0);
}

static void check_once(setting *s, const double *want, const double *want_lse) {
  const int64_t D = s->c.D, gap = s->c.is_strided ? 2 : 1, width = gap * s->c.H * D;
  const int64_t n = s->n_rows * D, out_stride[3] = {s->T * width, width, gap * D};
  const int64_t lse_stride[2] = {s->c.H * s->T, s->T};
  uint16_t *out = poisoned(n * gap * 2), *host = malloc((size_t)(n * gap) * 2);
  float *lse = poisoned(s->n_rows * 4), *host_lse = malloc((size_t)s->n_rows * 4);
  s->device_keys.by_query = &s->all.device;
  CHECK_OK(cuda->attention_once(out, out_stride, lse, lse_stride, &s->device, &s->device_keys));
  CHECK_OK(cuda->copy_out(host, out, n * gap * 2));
  CHECK_OK(cuda->copy_out(host_lse, lse, s->n_rows * 4));
  double *got = malloc((size_t)n * 8), *got_lse = malloc((size_t)s->n_rows * 8);
  int n_strays = 0;
  for (int64_t i = 0; i < n; i++) {
    got[i] = from_bf16(host[i / D * gap * D + i % D]);
    if (gap == 2 && host[(i / D * 2 + 1) * D + i % D] != 0xffff) n_strays++;
  }
  for (int64_t i = 0; i < s->n_rows; i++) got_lse[i] = host_lse[i];
  CHECK(n_strays == 0);
  compare("once", s, got, want, got_lse, want_lse);
  free(host);
  free(host_lse);
  free(got);
  free(got_lse);
  halo__free(out);
  halo__free(lse);
}

static void check_state(setting *s, const double *want, const double *want_lse) {
  const int64_t D = s->c.D, H = s->c.H, T = s->T, n = s->n_rows * D;
  float *o = malloc((size_t)n * 4), *m = malloc((size_t)s->n_rows * 4), *l = malloc((size_t)s->n_rows * 4);
  for (int64_t i = 0; i < n; i++) o[i] = 0;
  for (int64_t i = 0; i < s->n_rows; i++) m[i] = -INFINITY, l[i] = 0;
  s->device.o = on_device(o, n * 4);
  s->device.m = on_device(m, s->n_rows * 4);
  s->device.l = on_device(l, s->n_rows * 4);
  for (int i = 0; i < 2; i++) {
    s->device_keys.by_query = &s->part[i].device;
    CHECK_OK(cuda->attention_tiles_fwd(&s->device, &s->device_keys));
  }
  CHECK_OK(cuda->copy_out(o, s->device.o, n * 4));
  CHECK_OK(cuda->copy_out(m, s->device.m, s->n_rows * 4));
  CHECK_OK(cuda->copy_out(l, s->device.l, s->n_rows * 4));
  double *got = malloc((size_t)n * 8), *got_lse = malloc((size_t)s->n_rows * 8);
  for (int64_t r = 0; r < s->n_rows; r++) { // [B,H,T] to [B,T,H]
    const int64_t row = (r / (H * T) * T + r % T) * H + r / T % H;
    for (int64_t d = 0; d < D; d++) got[row * D + d] = l[r] > 0 ? o[r * D + d] / l[r] : o[r * D + d];
    got_lse[r] = l[r] > 0 ? m[r] * 0.6931471805599453 + log(l[r]) : -INFINITY;
  }
  compare("state", s, got, want, got_lse, want_lse);
  free(o);
  free(m);
  free(l);
  free(got);
  free(got_lse);
  halo__free(s->device.o);
  halo__free(s->device.m);
  halo__free(s->device.l);
}

static void test_twins(void) {
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    if (check_thins_out((int64_t)i)) continue;
    setting s = open_setting(&cases[i]);
    double *want = malloc((size_t)(s.n_rows * s.c.D) * 8), *lse = malloc((size_t)s.n_rows * 8);
    run_cpu(&s, want, lse);
    check_once(&s, want, lse);
    check_state(&s, want, lse);
    free(want);
    free(lse);
    close_setting(&s);
  }
}

/* 2^31 + 2^22 elements of q and out: only the last two query blocks have tiles (the second to last its own,
 * the last one both), so that their answer is that of a two-block problem. */
static void test_huge(void) {
  enum { D = 128, G = 128, H = 16, TAIL = 2 * G };
  const int64_t NB = 8192 + 16, T = NB * G, width = (int64_t)H * D, n = T * width;
  const test_case tail = {1, H, 1, D, G, 2, CAUSAL, 0, 1};
  setting s = open_setting(&tail);
  double *want = malloc((size_t)(s.n_rows * D) * 8), *want_lse = malloc((size_t)s.n_rows * 8);
  run_cpu(&s, want, want_lse);
  char *q = on_device(NULL, n * 2), *out = on_device(NULL, n * 2), *k = on_device(NULL, T * D * 2),
       *v = on_device(NULL, T * D * 2);
  float *lse = on_device(NULL, H * T * 4);
  CHECK_OK(cuda->copy(q + (n - TAIL * width) * 2, s.device.q, TAIL * width * 2));
  CHECK_OK(cuda->copy(k + (T - TAIL) * D * 2, s.device_keys.k, TAIL * D * 2));
  CHECK_OK(cuda->copy(v + (T - TAIL) * D * 2, s.device_keys.v, TAIL * D * 2));
  int32_t *position = malloc((size_t)T * 4), *first = calloc((size_t)T, 4);
  for (int64_t t = 0; t < T; t++) position[t] = (int32_t)t;
  halo__rows rows = {.n_rows = NB, .offset = calloc((size_t)NB + 1, 8)};
  const halo__span runs[3] = {{(int32_t)NB - 2, 1, 1}, {(int32_t)NB - 2, 1, 0}, {(int32_t)NB - 1, 1, 1}};
  rows.offset[NB - 1] = 1;
  rows.offset[NB] = 3;
  int64_t *offset = rows.offset;
  rows.offset = on_device(offset, (NB + 1) * 8);
  rows.run = on_device(runs, sizeof runs);
  halo_attention_queries a = s.device;
  a.n_blocks = NB;
  a.q = q;
  a.q_stride[0] = n;
  a.position = on_device(position, T * 4);
  a.first = on_device(first, T * 4);
  halo_attention_tiles keys = {.k = k, .v = v, .position = a.position, .by_query = &rows};
  const int64_t out_stride[3] = {n, width, D}, lse_stride[2] = {H * T, T};
  CHECK_OK(cuda->attention_once(out, out_stride, lse, lse_stride, &a, &keys));
  uint16_t *host = malloc(TAIL * (size_t)width * 2);
  float *host_lse = malloc((size_t)(H * T) * 4);
  CHECK_OK(cuda->copy_out(host, out + (n - TAIL * width) * 2, TAIL * width * 2));
  CHECK_OK(cuda->copy_out(host_lse, lse, H * T * 4));
  double *got = malloc((size_t)(s.n_rows * D) * 8), *got_lse = malloc((size_t)s.n_rows * 8);
  for (int64_t i = 0; i < s.n_rows * D; i++) got[i] = from_bf16(host[i]);
  for (int64_t h = 0; h < H; h++) {
    for (int64_t t = 0; t < TAIL; t++) got_lse[h * TAIL + t] = host_lse[h * T + T - TAIL + t];
    CHECK(host_lse[h * T] == -INFINITY);
  }
  compare("huge", &s, got, want, got_lse, want_lse);
  CHECK_OK(cuda->copy_out(host, out, TAIL * width * 2)); // rows that see nothing are written too
  int n_wrong = 0;
  for (int64_t i = 0; i < TAIL * width; i++) n_wrong += host[i] != 0;
  CHECK(n_wrong == 0);
  void *device[] = {q, out, k, v, lse, rows.offset, rows.run, (void *)a.position, (void *)a.first};
  for (size_t i = 0; i < sizeof device / sizeof *device; i++) halo__free(device[i]);
  void *memory[] = {want, want_lse, position, first, offset, host, host_lse, got, got_lse};
  for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
  close_setting(&s);
}

int main(void) {
  if (halo_device_count(HALO_CUDA) == 0) {
    printf("1 pending: no CUDA device\n");
    return 0;
  }
  cpu = halo__kernels(HALO_CPU);
  cuda = halo__kernels(HALO_CUDA);
  const char *const families[] = {"hopper", "portable"};
  for (int i = 0; i < 2; i++) {
    setenv("HALO_ATTENTION", families[i], 1);
    setting s = open_setting(&cases[0]);
    s.device_keys.by_query = &s.all.device;
    uint16_t *out = poisoned(s.n_rows * s.c.D * 2);
    const int64_t out_stride[3] = {s.n_rows * s.c.D, s.c.D, s.c.D}, lse_stride[2] = {s.T, s.T};
    const halo_status status = cuda->attention_once(out, out_stride, NULL, lse_stride, &s.device,
                                                    &s.device_keys);
    halo__free(out);
    close_setting(&s);
    if (status == HALO_EUNSUPPORTED) {
      printf("1 pending: no %s attention on this device\n", families[i]);
      continue;
    }
    fprintf(stderr, "%s\n", families[i]);
    RUN(test_twins);
    if (!check_is_small()) RUN(test_huge);
  }
  return check_report();
}

#endif
