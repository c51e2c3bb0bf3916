/* Products with everything that halo_gemm offers: all dtypes, transposes, strides, batches, scales and
 * epilogues, on the CPU against a plain fp64 product and on CUDA against both. Gaps between rows must
 * stay as they were, and what beta = 0 must not read is NaN. */
#include "check.h"
#include "internal.h"
#include "kernels.h"

typedef struct example {
  halo_dtype a, b, c;
  int32_t ta, tb;
  int64_t m, n, k, batch;
  int64_t pad, shift;           /* elements between rows; elements before the first */
  bool is_shared;               /* one b for the whole batch */
  double alpha, beta;
  bool has_bias, has_addend;
  int32_t bias_grad;            /* dtype + 1, or 0 */
  double bias_grad_beta;
  int64_t align;                /* rows start at multiples of this; 0: 1 */
} example;

/* A matrix in host memory, as stored values in fp64 and as bytes. */
typedef struct matrix {
  halo_dtype t;
  int64_t rows, cols, ld, step, count, shift;
  double *value;
  void *bytes;
} matrix;

static uint64_t stream;

static double rounded(halo_dtype t, double x) {
  if (t == HALO_F64) return x;
  float f = (float)x;
  if (t == HALO_F32 || isnan(f)) return f;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  memcpy(&f, &bits, 4);
  return f;
}

static void put(halo_dtype t, void *bytes, int64_t i, double x) {
  if (t == HALO_F64) {
    ((double *)bytes)[i] = x;
  } else if (t == HALO_F32) {
    ((float *)bytes)[i] = (float)x;
  } else {
    const float f = (float)x;
    uint32_t bits;
    memcpy(&bits, &f, 4);
    ((uint16_t *)bytes)[i] = (uint16_t)(bits >> 16);
  }
}

static double get(halo_dtype t, const void *bytes, int64_t i) {
  if (t == HALO_F64) return ((const double *)bytes)[i];
  if (t == HALO_F32) return ((const float *)bytes)[i];
  const uint32_t bits = (uint32_t)((const uint16_t *)bytes)[i] << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static matrix make(halo_dtype t, int64_t rows, int64_t cols, int64_t batch, int64_t pad, int64_t shift,
                   int64_t align, bool is_nan) {
  matrix x = {.t = t, .rows = rows, .cols = cols, .ld = cols + pad, .shift = shift};
  if (x.ld < 1) x.ld = 1;
  if (align > 1) x.ld = (x.ld + align - 1) / align * align;
  x.step = rows * x.ld + pad;
  x.count = shift + batch * x.step + 1;
  x.value = malloc((size_t)x.count * sizeof(double));
  x.bytes = malloc((size_t)x.count * 8);
  stream++;
  for (int64_t i = 0; i < x.count; i++) {
    const double v = is_nan ? NAN : 2 * halo_random_uniform(7, stream, (uint64_t)i) - 1;
    x.value[i] = rounded(t, v);
    put(t, x.bytes, i, x.value[i]);
  }
  return x;
}

static void drop(matrix *x) {
  free(x->value);
  free(x->bytes);
}

static int64_t place(const matrix *x, int64_t i, int64_t r, int64_t c) {
  return x->shift + i * x->step + r * x->ld + c;
}

static halo_operand operand(const matrix *x, void *bytes, int32_t transposed, int64_t step) {
  return (halo_operand){.data = (char *)bytes + x->shift * halo_dtype_bytes(x->t), .dtype = x->t,
                        .transposed = transposed, .ld = x->ld, .batch_stride = step};
}

typedef struct setting {
  example e;
  matrix a, b, c, d, bias, grad;
} setting;

static void open_setting(setting *s, const example *e) {
  s->e = *e;
  s->a = make(e->a, e->ta ? e->k : e->m, e->ta ? e->m : e->k, e->batch, e->pad, e->shift, e->align, false);
  s->b = make(e->b, e->tb ? e->n : e->k, e->tb ? e->k : e->n, e->batch, e->pad, e->shift, e->align, false);
  s->c = make(e->c, e->m, e->n, e->batch, e->pad, e->shift, e->align, e->beta == 0 || e->has_addend);
  s->d = make(e->c, e->m, e->n, e->batch, e->pad > 0 ? e->pad + 8 : 0, 0, e->align, e->beta == 0);
  s->bias = make(e->c, 1, e->n, 1, 0, e->shift, 0, false);
  s->grad = make(e->bias_grad > 0 ? (halo_dtype)(e->bias_grad - 1) : HALO_F32, 1, e->m, 1, 0, e->shift, 0,
                 e->bias_grad_beta == 0);
}

static void close_setting(setting *s) {
  drop(&s->a);
  drop(&s->b);
  drop(&s->c);
  drop(&s->d);
  drop(&s->bias);
  drop(&s->grad);
}

/* The product over the given copies of the six matrices' bytes. */
static halo_gemm gemm_of(const setting *s, void *const *bytes) {
  const example *e = &s->e;
  halo_gemm g = {.c = operand(&s->c, bytes[2], 0, s->c.step), .a = operand(&s->a, bytes[0], e->ta, s->a.step),
                 .b = operand(&s->b, bytes[1], e->tb, e->is_shared ? 0 : s->b.step), .m = e->m, .n = e->n,
                 .k = e->k, .batch = e->batch, .alpha = e->alpha, .beta = e->beta};
  if (e->has_addend) g.addend = operand(&s->d, bytes[3], 0, s->d.step);
  if (e->has_bias) g.bias = (char *)bytes[4] + s->bias.shift * halo_dtype_bytes(e->c);
  if (e->bias_grad > 0) {
    g.bias_grad_dtype = s->grad.t;
    g.bias_grad = (char *)bytes[5] + s->grad.shift * halo_dtype_bytes(s->grad.t);
    g.bias_grad_beta = e->bias_grad_beta;
  }
  return g;
}

static double a_at(const setting *s, int64_t i, int64_t r, int64_t k) {
  return s->a.value[s->e.ta ? place(&s->a, i, k, r) : place(&s->a, i, r, k)];
}

static double unit_of(halo_dtype t) { return t == HALO_F64 ? 0x1p-52 : t == HALO_F32 ? 0x1p-23 : 0x1p-8; }

/* Element (r,j) of product i in fp64, and the sum of what goes into it. */
static double truth(const setting *s, int64_t i, int64_t r, int64_t j, double *size_out) {
  const example *e = &s->e;
  double sum = 0, size = 0;
  for (int64_t k = 0; k < e->k; k++) {
    const int64_t ib = e->is_shared ? 0 : i;
    const double p = a_at(s, i, r, k) * s->b.value[e->tb ? place(&s->b, ib, j, k) : place(&s->b, ib, k, j)];
    sum += p;
    size += fabs(p);
  }
  sum *= e->alpha;
  size *= fabs(e->alpha);
  if (e->beta != 0) {
    const double d = e->has_addend ? s->d.value[place(&s->d, i, r, j)] : s->c.value[place(&s->c, i, r, j)];
    sum += e->beta * d;
    size += fabs(e->beta * d);
  }
  if (e->has_bias) {
    sum += s->bias.value[s->bias.shift + j];
    size += fabs(s->bias.value[s->bias.shift + j]);
  }
  *size_out = size;
  return sum;
}

/* Errors of results against fp64 at up to `most` random elements, in units of the allowed error. */
static double worst(const setting *s, const void *c, const void *grad, int64_t most) {
  const example *e = &s->e;
  const int64_t total = e->batch * e->m * e->n;
  const double inner = unit_of(e->c == HALO_F64 ? HALO_F64 : HALO_F32) * (4 + sqrt((double)e->k));
  double out = 0;
  for (int64_t q = 0; q < total && q < most; q++) {
    const int64_t at = total <= most ? q : (int64_t)(halo_random_u64(9, stream, (uint64_t)q) % (uint64_t)total);
    const int64_t i = at / (e->m * e->n), r = at / e->n % e->m, j = at % e->n;
    double size = 0;
    const double want = truth(s, i, r, j, &size), x = get(e->c, c, place(&s->c, i, r, j));
    // A bf16 result may be rounded twice where an epilogue is not the library's own.
    const double allowed = inner * size + 1.5 * unit_of(e->c) * (fabs(want) + (e->c == HALO_BF16 ? size / 2 : 0)) + 1e-300;
    const double error = fabs(x - want) / allowed;
    if (!(error <= out)) out = error;
  }
  for (int64_t r = 0; e->bias_grad > 0 && r < e->m; r++) {
    double sum = 0, size = 0;
    for (int64_t k = 0; k < e->k; k++) {
      sum += a_at(s, 0, r, k);
      size += fabs(a_at(s, 0, r, k));
    }
    if (e->bias_grad_beta != 0) sum += e->bias_grad_beta * s->grad.value[s->grad.shift + r];
    const double error = fabs(get(s->grad.t, grad, s->grad.shift + r) - sum) /
                         (inner * (size + 1) + 2 * unit_of(s->grad.t) * (fabs(sum) + 1));
    if (!(error <= out)) out = error;
  }
  return out;
}

/* Bytes of c that are not elements of it are as before. */
static bool gaps_are_whole(const setting *s, const char *c) {
  const int64_t size = halo_dtype_bytes(s->c.t);
  char *seen = calloc((size_t)s->c.count, 1);
  for (int64_t i = 0; i < s->e.batch; i++) {
    for (int64_t r = 0; r < s->e.m; r++) memset(seen + place(&s->c, i, r, 0), 1, (size_t)s->e.n);
  }
  bool is_whole = true;
  for (int64_t i = 0; i < s->c.count; i++) {
    is_whole &= seen[i] || memcmp(c + i * size, (const char *)s->c.bytes + i * size, (size_t)size) == 0;
  }
  free(seen);
  return is_whole;
}

static void report(const char *device, const example *e, double error) {
  if (error <= 1) return;
  fprintf(stderr, "  %s: %s x %s -> %s, %s%s, m %lld n %lld k %lld batch %lld pad %lld shift %lld alpha %g "
          "beta %g bias %d addend %d bias_grad %d beta %g: error %g\n", device, halo_dtype_name(e->a),
          halo_dtype_name(e->b), halo_dtype_name(e->c), e->ta ? "t" : "n", e->tb ? "t" : "n",
          (long long)e->m, (long long)e->n, (long long)e->k, (long long)e->batch, (long long)e->pad,
          (long long)e->shift, e->alpha, e->beta, e->has_bias, e->has_addend, e->bias_grad,
          e->bias_grad_beta, error);
}

static bool has_cuda;
static double worst_cpu, worst_cuda;

static void try_cpu(const setting *s, int64_t most) {
  const matrix *all[6] = {&s->a, &s->b, &s->c, &s->d, &s->bias, &s->grad};
  void *bytes[6];
  for (int32_t i = 0; i < 6; i++) {
    const size_t n = (size_t)(all[i]->count * halo_dtype_bytes(all[i]->t));
    bytes[i] = malloc(n);
    memcpy(bytes[i], all[i]->bytes, n);
  }
  const halo_gemm g = gemm_of(s, bytes);
  CHECK_OK(halo_cpu_gemm(&g));
  const double error = worst(s, bytes[2], bytes[5], most);
  report("cpu", &s->e, error);
  CHECK(error <= 1);
  CHECK(gaps_are_whole(s, bytes[2]));
  worst_cpu = error > worst_cpu ? error : worst_cpu;
  for (int32_t i = 0; i < 6; i++) free(bytes[i]);
}

#ifdef HALO_WITH_CUDA
static void try_cuda(const setting *s, int64_t most) {
  const matrix *all[6] = {&s->a, &s->b, &s->c, &s->d, &s->bias, &s->grad};
  void *bytes[6];
  int64_t size[6];
  for (int32_t i = 0; i < 6; i++) {
    size[i] = all[i]->count * halo_dtype_bytes(all[i]->t);
    CHECK_OK(halo_cuda_memory_new(&bytes[i], size[i]));
    CHECK_OK(halo_cuda_copy_in(bytes[i], all[i]->bytes, size[i]));
  }
  const halo_gemm g = gemm_of(s, bytes);
  CHECK_OK(halo_cuda_gemm(&g));
  char *c = malloc((size_t)size[2]), *grad = malloc((size_t)size[5]), *again = malloc((size_t)size[2]);
  CHECK_OK(halo_cuda_copy_out(c, bytes[2], size[2]));
  CHECK_OK(halo_cuda_copy_out(grad, bytes[5], size[5]));
  const double error = worst(s, c, grad, most);
  report("cuda", &s->e, error);
  CHECK(error <= 1);
  CHECK(gaps_are_whole(s, c));
  worst_cuda = error > worst_cuda ? error : worst_cuda;
  // The second time comes from the plan that was kept, and gives the same bits.
  CHECK_OK(halo_cuda_copy_in(bytes[2], s->c.bytes, size[2]));
  CHECK_OK(halo_cuda_copy_in(bytes[5], s->grad.bytes, size[5]));
  CHECK_OK(halo_cuda_gemm(&g));
  CHECK_OK(halo_cuda_copy_out(again, bytes[2], size[2]));
  CHECK(memcmp(c, again, (size_t)size[2]) == 0);
  for (int32_t i = 0; i < 6; i++) CHECK_OK(halo_cuda_memory_free(bytes[i], size[i]));
  free(c);
  free(grad);
  free(again);
}
#endif

static void try_one(const example *e, int64_t most) {
  setting s;
  open_setting(&s, e);
  try_cpu(&s, most);
#ifdef HALO_WITH_CUDA
  if (has_cuda) try_cuda(&s, most);
#endif
  close_setting(&s);
}

/* a, b, c */
static const halo_dtype dtypes[][3] = {
    {HALO_F32, HALO_F32, HALO_F32},  {HALO_BF16, HALO_BF16, HALO_BF16}, {HALO_BF16, HALO_BF16, HALO_F32},
    {HALO_F64, HALO_F64, HALO_F64},  {HALO_F32, HALO_BF16, HALO_F32},   {HALO_BF16, HALO_F32, HALO_F32},
    {HALO_F32, HALO_F32, HALO_BF16}, {HALO_F32, HALO_BF16, HALO_BF16}, {HALO_BF16, HALO_F32, HALO_BF16}};
enum { N_DTYPES = sizeof dtypes / sizeof *dtypes };

static const int64_t sizes[][3] = {{1, 1, 1},    {3, 5, 7},    {17, 1, 33},  {1, 19, 64},
                                   {64, 48, 32}, {33, 65, 17}, {40, 24, 128}, {5, 3, 0}};
enum { N_SIZES = sizeof sizes / sizeof *sizes };

static void test_forms(void) {
  for (int32_t t = 0; t < N_DTYPES; t++) {
    for (int32_t z = 0; z < N_SIZES; z++) {
      for (int32_t f = 0; f < 4; f++) {
        for (int32_t v = 0; v < 6; v++) {
          if (check_thins_out(t + z + f + v) || check_thins_out(f + 2 * v)) continue;
          const example e = {.a = dtypes[t][0], .b = dtypes[t][1], .c = dtypes[t][2], .ta = f & 1, .tb = f >> 1,
                             .m = sizes[z][0], .n = sizes[z][1], .k = sizes[z][2],
                             .batch = v == 2 || v == 5 ? 3 : 1, .pad = v == 1 || v == 2 ? 5 : v == 4 ? 8 : 0,
                             .shift = v == 1 ? 1 : 0, .is_shared = v == 5, .alpha = v == 3 ? -1.5 : 1,
                             .beta = v == 0 || v == 5 ? 0 : v == 1 ? 1 : 0.5, .has_bias = v == 3 || v == 4,
                             .has_addend = v == 4 || v == 2};
          try_one(&e, 1 << 20);
        }
      }
    }
  }
}

static void test_epilogues(void) {
  static const int64_t shapes[][3] = {{64, 96, 200}, {24, 8, 4096}, {33, 17, 5}, {7, 1, 64}, {128, 256, 1}, {9, 3, 0}};
  for (int32_t t = 0; t < 4; t++) {
    for (int32_t z = 0; z < 6; z++) {
      for (int32_t v = 0; v < 8; v++) {
        if (check_thins_out(t + z + v)) continue;
        const halo_dtype c = dtypes[t][2], wide = c == HALO_F64 ? HALO_F64 : HALO_F32;
        example e = {.a = dtypes[t][0], .b = dtypes[t][1], .c = c, .ta = 1, .m = shapes[z][0],
                     .n = shapes[z][1], .k = shapes[z][2], .batch = 1, .alpha = 1, .beta = v & 1,
                     .bias_grad = 1 + (int32_t)(v & 4 && c == HALO_BF16 ? HALO_BF16 : wide),
                     .bias_grad_beta = v & 2 ? 1 : 0};
        try_one(&e, 1 << 20);
        e = (example){.a = dtypes[t][0], .b = dtypes[t][1], .c = c, .tb = 1, .m = shapes[z][0],
                      .n = shapes[z][1], .k = shapes[z][2], .batch = 1, .alpha = 1, .beta = v & 1,
                      .has_bias = true, .has_addend = v == 3 || v == 7, .pad = v & 4 ? 3 : 0};
        try_one(&e, 1 << 20);
      }
    }
  }
}

/* Large enough for the race of algorithms, and for every panel of the CPU's widening path. */
static void test_large(void) {
  const int64_t k = has_cuda ? 4096 : 1100;
  for (int32_t t = 0; t < 3; t++) {
    for (int32_t v = 0; v < 4; v++) {
      const example e = {.a = dtypes[t][0], .b = dtypes[t][1], .c = dtypes[t][2], .ta = v >= 2, .tb = v == 0,
                         .m = has_cuda ? 1500 : 130, .n = has_cuda ? 1032 : 70, .k = k, .batch = 1, .alpha = 1,
                         .beta = v == 1 ? 0 : v >= 2, .has_bias = v == 0,
                         .bias_grad = v >= 2 ? 1 + HALO_F32 : 0, .bias_grad_beta = v == 3};
      try_one(&e, 500);
    }
  }
}

/* Sizes that are no multiples of 8 in rows that are: taken in parts. */
static void test_odd(void) {
  if (!has_cuda) return;
  for (int32_t t = 1; t < 3; t++) {
    for (int32_t v = 0; v < 4; v++) {
      // v: forward along n, dx along k, dw along m, all three
      const example e = {.a = HALO_BF16, .b = HALO_BF16, .c = dtypes[t][2], .ta = v >= 2, .tb = v == 0 || v == 3,
                         .m = v == 2 ? 3003 : v == 3 ? 1029 : 1024, .n = v == 0 ? 3005 : v == 3 ? 1501 : 768,
                         .k = v == 1 ? 3009 : v == 3 ? 1507 : 1024, .batch = 1,
                         .alpha = 1, .beta = v == 2, .has_bias = v == 0,
                         .bias_grad = v >= 2 ? 1 + HALO_F32 : 0, .bias_grad_beta = 1, .align = 8};
      try_one(&e, 2000);
    }
  }
}

static void test_refused(void) {
  float x[4] = {0};
  double y[4] = {0};
  halo_gemm g = {.c = {.data = x, .dtype = HALO_F32, .ld = 2}, .a = {.data = y, .dtype = HALO_F64, .ld = 2},
                 .b = {.data = x, .dtype = HALO_F32, .ld = 2}, .m = 2, .n = 2, .k = 2, .batch = 1, .alpha = 1};
  CHECK_STATUS(halo_cpu_gemm(&g), HALO_EARG);
#ifdef HALO_WITH_CUDA
  if (has_cuda) CHECK_STATUS(halo_cuda_gemm(&g), HALO_EARG);
#endif
  g.a = g.b;
  g.bias_grad = x;
  CHECK_STATUS(halo_cpu_gemm(&g), HALO_EARG);
#ifdef HALO_WITH_CUDA
  if (has_cuda) CHECK_STATUS(halo_cuda_gemm(&g), HALO_EARG);
#endif
}

static void test_math_flags(void) {
  const int32_t before = halo_set_math(HALO_MATH_FIXED);
  CHECK(halo_set_math(-1) == HALO_MATH_FIXED);
  CHECK(halo_set_math(before) == HALO_MATH_FIXED);
  CHECK(halo_set_math(-1) == before);
}

int main(void) {
  has_cuda = halo_device_count(HALO_CUDA) > 0;
  RUN(test_refused);
  RUN(test_math_flags);
  RUN(test_forms);
  RUN(test_epilogues);
  if (!check_is_small()) {
    RUN(test_large);
    RUN(test_odd);
  }
  fprintf(stderr, "worst error, of what is allowed: cpu %.2f, cuda %.2f\n", worst_cpu, worst_cuda);
  const int status = check_report();
  if (!has_cuda) printf("1 pending\n");
  return status;
}
