/* attention_case.h: what the tests of attention on CUDA share: cases with their masks, lists and tokens, on
 * the host in fp64 and on the device in bf16 with the same values, and the CPU twin's answer. */
#ifndef HALO_TEST_ATTENTION_CASE_H
#define HALO_TEST_ATTENTION_CASE_H

#include "check.h"
#include "internal.h"
#include "kernels.h"

static const halo_kernels *cpu, *cuda;

typedef enum mask_kind { CAUSAL, DOCUMENTS, SPARSE, PADDED, EVERYTHING, NOTHING } mask_kind;

typedef struct test_case {
  int64_t B, H, Hk, D, G, NB;
  mask_kind mask;    /* PADDED: sparse, documents, and padding at the end */
  int is_strided;    /* q a part of rows that hold k and v too, out with gaps */
  double magnitude;  /* of q: how peaked the softmax is */
} test_case;

static uint64_t dice_state = 5;
static uint64_t dice(void) {
  dice_state = dice_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
  return dice_state >> 33;
}

static float from_bf16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static uint16_t to_bf16(double x) {
  const float f = (float)x;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return (uint16_t)((bits + 0x8000) >> 16);
}

static void *on_device(const void *host, int64_t bytes) {
  void *p = NULL;
  CHECK_OK(halo__alloc(&p, bytes, HALO_CUDA));
  if (host != NULL) CHECK_OK(cuda->copy_in(p, host, bytes));
  return p;
}

/* n bf16 values of normal distribution (the sum of 12 uniform ones, less 6). */
static uint16_t *sample(int64_t n, double magnitude) {
  uint16_t *x = malloc((size_t)n * 2);
  for (int64_t i = 0; i < n; i++) {
    double sum = -6;
    for (int k = 0; k < 12; k++) sum += (double)(dice() & 0xffff) / 65536;
    x[i] = to_bf16(magnitude * sum);
  }
  return x;
}

/* Lists of a tile map [rows, NB] (0 none, 1 full, 2 partial), on the host and on the device. */
typedef struct lists {
  halo__rows host, device;
} lists;

static lists make_lists(const char *map, int64_t n_rows, int64_t NB) {
  lists l = {.host = {.n_rows = n_rows}};
  l.host.offset = malloc((size_t)(n_rows + 1) * sizeof *l.host.offset);
  l.host.run = malloc((size_t)(n_rows * NB + 1) * sizeof *l.host.run);
  int64_t n = 0;
  for (int64_t r = 0; r < n_rows; r++) {
    l.host.offset[r] = n;
    for (int64_t j = 0; j < NB; j++) {
      const char kind = map[r * NB + j];
      if (kind == 0) continue;
      if (j > 0 && map[r * NB + j - 1] == kind) {
        l.host.run[n - 1].count++;
      } else {
        l.host.run[n++] = (halo__span){(int32_t)j, 1, kind == 2};
      }
    }
  }
  l.host.offset[n_rows] = n;
  l.device.n_rows = n_rows;
  l.device.offset = on_device(l.host.offset, (n_rows + 1) * (int64_t)sizeof *l.host.offset);
  l.device.run = on_device(l.host.run, (n_rows * NB + 1) * (int64_t)sizeof *l.host.run);
  return l;
}
static void free_lists(lists *l) {
  free(l->host.offset);
  free(l->host.run);
  halo__free(l->device.offset);
  halo__free(l->device.run);
}

/* Everything of a case: the call on either side, and fp64 copies of q, k, v for the CPU's. */
typedef struct setting {
  test_case c;
  int64_t T, n_q, n_k, n_rows;
  halo_attention_queries host, device;
  halo_attention_tiles host_keys, device_keys;
  int32_t *position, *first, *pattern;
  lists all, part[2];               /* part: all, in two */
  lists all_by_key, part_by_key[2]; /* their transposes */
} setting;

static double *widened(const uint16_t *x, int64_t n) {
  double *y = malloc((size_t)n * sizeof *y);
  for (int64_t i = 0; i < n; i++) y[i] = from_bf16(x[i]);
  return y;
}

static char tile_kind(const test_case *c, int64_t i, int64_t j) {
  if (c->mask == EVERYTHING) return 1;
  if (c->mask == NOTHING || j > i) return 0;
  const int is_sparse = c->mask == SPARSE || c->mask == PADDED;
  if (is_sparse && (dice() % 3 != 0 || i == 2)) return 0;
  return j == i || c->mask == DOCUMENTS || c->mask == PADDED ? 2 : 1;
}

static void set_lists(setting *s, int64_t n_patterns) {
  const int64_t NB = s->c.NB, n = n_patterns * NB * NB;
  char *map = malloc((size_t)(3 * n));
  for (int64_t i = 0; i < n; i++) {
    map[i] = tile_kind(&s->c, i / NB % NB, i % NB);
    const int first = dice() % 2 == 0;
    map[n + i] = first ? map[i] : 0;
    map[2 * n + i] = first ? 0 : map[i];
  }
  s->all = make_lists(map, n_patterns * NB, NB);
  for (int i = 0; i < 2; i++) s->part[i] = make_lists(map + (i + 1) * n, n_patterns * NB, NB);
  char *turned = malloc((size_t)(3 * n));
  for (int64_t i = 0; i < 3 * n; i++) {
    turned[(i / NB / NB * NB + i % NB) * NB + i / NB % NB] = map[i];
  }
  s->all_by_key = make_lists(turned, n_patterns * NB, NB);
  for (int i = 0; i < 2; i++) s->part_by_key[i] = make_lists(turned + (i + 1) * n, n_patterns * NB, NB);
  free(turned);
  free(map);
}

static void set_tokens(setting *s, int64_t n_patterns) {
  const test_case *c = &s->c;
  const int64_t T = s->T, padding = c->mask == PADDED ? c->G / 2 + 3 : 0;
  s->position = malloc((size_t)T * 4);
  s->first = malloc((size_t)(c->B * T) * 4);
  s->pattern = malloc((size_t)(c->B * c->H) * 4);
  for (int64_t t = 0; t < T; t++) s->position[t] = (int32_t)t;
  for (int64_t b = 0; b < c->B; b++) {
    int64_t start = 0;
    for (int64_t t = 0; t < T; t++) {
      if ((c->mask == DOCUMENTS || c->mask == PADDED) && dice() % 150 == 0) start = t;
      s->first[b * T + t] = t >= T - padding ? INT32_MAX : (int32_t)start;
    }
  }
  for (int64_t i = 0; i < c->B * c->H; i++) s->pattern[i] = (int32_t)(dice() % (uint64_t)n_patterns);
}

static setting open_setting(const test_case *c) {
  setting s = {.c = *c, .T = c->G * c->NB, .n_rows = c->B * c->H * c->G * c->NB};
  const int64_t n_patterns = c->mask == SPARSE || c->mask == PADDED ? 3 : 1;
  const int64_t width = c->is_strided ? c->H + 2 * c->Hk : c->H;
  s.n_q = c->B * s.T * width * c->D;
  s.n_k = c->B * c->Hk * s.T * c->D;
  set_tokens(&s, n_patterns);
  set_lists(&s, n_patterns);
  uint16_t *q = sample(s.n_q, c->magnitude), *k = sample(s.n_k, 1), *v = sample(s.n_k, 1);
  halo_attention_queries a = {.n_batch = c->B, .n_heads = c->H, .n_kv_heads = c->Hk, .head_size = c->D,
                              .block = c->G, .n_blocks = c->NB, .scale = 1 / sqrt((double)c->D),
                              .q_stride = {s.T * width * c->D, width * c->D, c->D}, .first_stride = s.T,
                              .n_parts = 1, .n_head_parts = 1};
  s.host = s.device = a;
  s.host.dtype = HALO_F64;
  s.host.q = widened(q, s.n_q);
  s.host.position = s.position;
  s.host.first = s.first;
  s.host.pattern_of = s.pattern;
  s.host_keys = (halo_attention_tiles){.k = widened(k, s.n_k), .v = widened(v, s.n_k),
                                       .position = s.position};
  s.device.dtype = HALO_BF16;
  s.device.q = on_device(q, s.n_q * 2);
  s.device.position = on_device(s.position, s.T * 4);
  s.device.first = on_device(s.first, c->B * s.T * 4);
  s.device.pattern_of = on_device(s.pattern, c->B * c->H * 4);
  s.device_keys = (halo_attention_tiles){.k = on_device(k, s.n_k * 2), .v = on_device(v, s.n_k * 2),
                                         .position = s.device.position};
  free(q);
  free(k);
  free(v);
  return s;
}

static void close_setting(setting *s) {
  free((void *)s->host.q);
  free((void *)s->host_keys.k);
  free((void *)s->host_keys.v);
  free(s->position);
  free(s->first);
  free(s->pattern);
  halo__free((void *)s->device.q);
  halo__free((void *)s->device.position);
  halo__free((void *)s->device.first);
  halo__free((void *)s->device.pattern_of);
  halo__free((void *)s->device_keys.k);
  halo__free((void *)s->device_keys.v);
  free_lists(&s->all);
  free_lists(&s->part[0]);
  free_lists(&s->part[1]);
  free_lists(&s->all_by_key);
  free_lists(&s->part_by_key[0]);
  free_lists(&s->part_by_key[1]);
}

/* The truth, out [B,T,H,D] and lse [B,H,T]. */
static void run_cpu(setting *s, double *out, double *lse) {
  const int64_t width = s->c.H * s->c.D, out_stride[3] = {s->T * width, width, s->c.D};
  const int64_t lse_stride[2] = {s->c.H * s->T, s->T};
  s->host_keys.by_query = &s->all.host;
  CHECK_OK(cpu->attention_once(out, out_stride, lse, lse_stride, &s->host, &s->host_keys));
}

static void *poisoned(int64_t bytes) {
  void *host = malloc((size_t)bytes);
  memset(host, 0xff, (size_t)bytes); // NaN as bf16 and as fp32
  void *p = on_device(host, bytes);
  free(host);
  return p;
}

#endif
