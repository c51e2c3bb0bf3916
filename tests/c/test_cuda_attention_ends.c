/* The ends of attention on CUDA against their CPU twins: begin, finish, delta, dq_finish, merge and
 * columns_add, over dtypes, head sizes that can and cannot be read four at a time, strides, rows that saw
 * nothing, and one tensor of more than 2^31 elements. */
#include "check.h"
#include "internal.h"
#include "kernels.h"

#ifndef HALO_WITH_CUDA

int main(void) {
  printf("1 pending: built without CUDA\n");
  return 0;
}

#else

static const halo_kernels *cpu, *cuda;
static uint64_t stream;

/* The same bytes on both sides. */
typedef struct mirror {
  char *host, *device;
  int64_t n, bytes;
  halo_dtype t;
} mirror;

static double get(halo_dtype t, const void *bytes, int64_t i) {
  if (t == HALO_F64) return ((const double *)bytes)[i];
  if (t == HALO_F32) return ((const float *)bytes)[i];
  const uint32_t bits = (uint32_t)((const uint16_t *)bytes)[i] << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static void put(halo_dtype t, void *bytes, int64_t i, double x) {
  const float f = (float)x;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (t == HALO_F64) {
    ((double *)bytes)[i] = x;
  } else if (t == HALO_F32) {
    ((float *)bytes)[i] = f;
  } else {
    ((uint16_t *)bytes)[i] = (uint16_t)(bits >> 16);
  }
}

/* n elements in [-1, 1], or NaN: what must be written, not read. */
static mirror make(halo_dtype t, int64_t n, bool is_nan) {
  mirror m = {.n = n, .bytes = n * halo_dtype_bytes(t), .t = t};
  m.host = malloc((size_t)m.bytes);
  CHECK_OK(halo__alloc((void **)&m.device, m.bytes, HALO_CUDA));
  stream++;
  for (int64_t i = 0; i < n; i++) {
    put(t, m.host, i, is_nan ? NAN : 2 * halo_random_uniform(11, stream, (uint64_t)i) - 1);
  }
  CHECK_OK(cuda->copy_in(m.device, m.host, m.bytes));
  return m;
}

static void set(mirror *m, int64_t i, double x) {
  put(m->t, m->host, i, x);
  CHECK_OK(cuda->copy_in(m->device, m->host, m->bytes));
}

/* Device and host agree to `tolerance` of 1 + |x|; NaN and -inf must be the same. */
static void same(const mirror *m, double tolerance, const char *what) {
  char *got = malloc((size_t)m->bytes);
  CHECK_OK(cuda->copy_out(got, m->device, m->bytes));
  int64_t bad = 0;
  for (int64_t i = 0; i < m->n; i++) {
    const double want = get(m->t, m->host, i), x = get(m->t, got, i);
    const bool is_same = isfinite(want) ? fabs(x - want) <= tolerance * (1 + fabs(want))
                                        : isnan(want) ? isnan(x) : x == want;
    if (!is_same && bad++ == 0) fprintf(stderr, "%s: [%lld] is %g, not %g\n", what, (long long)i, x, want);
  }
  CHECK(bad == 0);
  free(got);
}

static void drop(mirror *m) {
  free(m->host);
  halo__free(m->device);
}

static halo_dtype acc_of(halo_dtype t) { return t == HALO_BF16 ? HALO_F32 : t; }
static double tolerance_of(halo_dtype t) {
  return t == HALO_F64 ? 1e-13 : t == HALO_F32 ? 2e-6 : 8e-3; // bf16: one rounding either way
}

static void one_size(halo_dtype t, int64_t B, int64_t H, int64_t block, int64_t n_blocks, int64_t D,
                     int64_t pad) {
  const halo_dtype acc = acc_of(t);
  const int64_t T = block * n_blocks, rows = B * H * T, parts = 3;
  const double tolerance = tolerance_of(t), fine = tolerance_of(acc) * (double)(D + 8);
  const int64_t stride[3] = {T * H * (D + pad), H * (D + pad), D + pad}, lse_stride[2] = {H * T + 2, T};
  const int64_t n_strided = B * T * H * (D + pad);
  halo_attention_queries a = {.dtype = t, .n_batch = B, .n_heads = H, .n_kv_heads = 1, .head_size = D,
                              .block = block, .n_blocks = n_blocks, .n_parts = (int32_t)parts}, b;

  mirror o = make(acc, rows * D, true), m = make(acc, rows, true), l = make(acc, rows, true);
  a.o = o.host, a.m = m.host, a.l = l.host;
  b = a;
  b.o = o.device, b.m = m.device, b.l = l.device;
  CHECK_OK(cpu->attention_begin(&a));
  CHECK_OK(cuda->attention_begin(&b));
  same(&o, 0, "begin o"), same(&m, 0, "begin m"), same(&l, 0, "begin l");

  // Rows as after some keys; the second one saw nothing.
  mirror o2 = make(acc, rows * D, false), m2 = make(acc, rows, false), l2 = make(acc, rows, false);
  for (int64_t i = 0; i < rows; i++) put(acc, l2.host, i, 1.5 + get(acc, l2.host, i));
  if (rows > 1) put(acc, l2.host, 1, 0), set(&m2, 1, -INFINITY);
  CHECK_OK(cuda->copy_in(l2.device, l2.host, l2.bytes));
  mirror out = make(t, n_strided, true), lse = make(acc, B * (H * T + 2), true);
  a.o = o2.host, a.m = m2.host, a.l = l2.host, b.o = o2.device, b.m = m2.device, b.l = l2.device;
  CHECK_OK(cpu->attention_finish(out.host, stride, lse.host, lse_stride, &a));
  CHECK_OK(cuda->attention_finish(out.device, stride, lse.device, lse_stride, &b));
  same(&out, tolerance, "finish out"), same(&lse, fine, "finish lse");

  mirror x = make(t, n_strided, false), grad = make(t, n_strided, false), delta = make(acc, rows, true);
  for (int i = 0; i < 3; i++) a.grad_stride[i] = b.grad_stride[i] = stride[i];
  a.grad = grad.host, b.grad = grad.device;
  CHECK_OK(cpu->attention_delta(delta.host, x.host, stride, &a));
  CHECK_OK(cuda->attention_delta(delta.device, x.device, stride, &b));
  same(&delta, fine, "delta");

  mirror part = make(acc, parts * rows * D, false), dq = make(t, n_strided, true);
  a.dq = part.host, b.dq = part.device;
  CHECK_OK(cpu->attention_dq_finish(dq.host, stride, &a));
  CHECK_OK(cuda->attention_dq_finish(dq.device, stride, &b));
  same(&dq, tolerance, "dq_finish");

  mirror mo = make(t, rows * D, false), mo2 = make(t, rows * D, false);
  mirror ml = make(acc, rows, false), ml2 = make(acc, rows, false);
  if (rows > 2) set(&ml, 0, -INFINITY), set(&ml2, 1, -INFINITY), set(&ml, 2, -INFINITY), set(&ml2, 2, -INFINITY);
  CHECK_OK(cpu->attention_merge(t, mo.host, ml.host, mo2.host, ml2.host, B, T, H, D));
  CHECK_OK(cuda->attention_merge(t, mo.device, ml.device, mo2.device, ml2.device, B, T, H, D));
  same(&mo, tolerance, "merge o"), same(&ml, fine, "merge lse");

  mirror *all[] = {&o, &m, &l, &o2, &m2, &l2, &out, &lse, &x, &grad, &delta, &part, &dq, &mo, &mo2, &ml, &ml2};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) drop(all[i]);
}

static void every_size(void) {
  static const halo_dtype dtypes[] = {HALO_F32, HALO_F64, HALO_BF16};
  for (int i = 0; i < 3; i++) {
    one_size(dtypes[i], 1, 1, 1, 1, 1, 0);
    one_size(dtypes[i], 2, 3, 5, 7, 7, 0);
    one_size(dtypes[i], 1, 4, 64, 3, 64, 0);
    one_size(dtypes[i], 2, 2, 33, 3, 96, 4);
    one_size(dtypes[i], 1, 5, 128, 2, 128, 1); // strides that cannot be read four at a time
    one_size(dtypes[i], 1, 3, 16, 9, 256, 8);
  }
}

static void columns(void) {
  static const halo_dtype dtypes[] = {HALO_F32, HALO_F64, HALO_BF16};
  for (int i = 0; i < 3; i++) {
    const int64_t D = 72, n = 301, parts = 4, rows = 997;
    mirror dk = make(dtypes[i], rows * D, false), dv = make(dtypes[i], rows * D, false);
    mirror part = make(dtypes[i], parts * n * 2 * D, false);
    int64_t row[301], *row_device;
    for (int64_t e = 0; e < n; e++) row[e] = e * 613 % rows;
    CHECK_OK(halo__alloc((void **)&row_device, sizeof row, HALO_CUDA));
    CHECK_OK(cuda->copy_in(row_device, row, sizeof row));
    CHECK_OK(cpu->attention_columns_add(dtypes[i], dk.host, dv.host, part.host, row, n, parts, D));
    CHECK_OK(cuda->attention_columns_add(dtypes[i], dk.device, dv.device, part.device, row_device, n, parts, D));
    same(&dk, tolerance_of(dtypes[i]), "columns_add dk"), same(&dv, tolerance_of(dtypes[i]), "columns_add dv");
    halo__free(row_device);
    drop(&dk), drop(&dv), drop(&part);
  }
}

/* 2^31 + 2^21 elements of bf16: out 1, grad 1/2, so delta is D / 2 everywhere. */
static void huge(void) {
  const int64_t H = 16, D = 128, block = 1024, n_blocks = 1025, T = block * n_blocks, n = T * H * D;
  const int64_t stride[3] = {n, H * D, D};
  void *out = NULL, *grad = NULL, *delta = NULL;
  if (halo__alloc(&out, 2 * n, HALO_CUDA) == HALO_OK && halo__alloc(&grad, 2 * n, HALO_CUDA) == HALO_OK &&
      halo__alloc(&delta, 4 * H * T, HALO_CUDA) == HALO_OK) {
    CHECK_OK(cuda->fill(HALO_BF16, out, n, 1));
    CHECK_OK(cuda->fill(HALO_BF16, grad, n, 0.5));
    CHECK_OK(cuda->fill(HALO_F32, delta, H * T, -1));
    const halo_attention_queries a = {.dtype = HALO_BF16, .n_batch = 1, .n_heads = H, .n_kv_heads = 2,
                                      .head_size = D, .block = block, .n_blocks = n_blocks, .grad = grad,
                                      .grad_stride = {stride[0], stride[1], stride[2]}};
    CHECK_OK(cuda->attention_delta(delta, out, stride, &a));
    float *got = malloc((size_t)(4 * H * T));
    CHECK_OK(cuda->copy_out(got, delta, 4 * H * T));
    int64_t bad = 0;
    for (int64_t i = 0; i < H * T; i++) bad += got[i] != 64;
    CHECK(bad == 0);
    free(got);
  } else {
    printf("1 pending: too little device memory for 2^31 elements\n");
  }
  halo__free(out), halo__free(grad), halo__free(delta);
}

int main(void) {
  if (halo_device_count(HALO_CUDA) == 0) {
    printf("1 pending: no CUDA device\n");
    return 0;
  }
  cpu = halo__kernels(HALO_CPU);
  cuda = halo__kernels(HALO_CUDA);
  RUN(every_size);
  RUN(columns);
  if (!check_is_small()) RUN(huge);
  return check_report();
}

#endif
