/* test_cuda_nn.c: the CUDA kernels of the training ops against their CPU twins.
 *
 * Every case runs the same call on both sides over the same random inputs, with odd widths, odd strides
 * and shifted bases (so that the paths without 16-byte accesses run too). Outputs are poisoned before and
 * guards around every buffer are looked at after. The bound for an element is rel |want| + abs max|want|:
 * rel is one unit in the last place of storage or a few of the arithmetic, abs covers sums in another
 * order. Kernels that reduce run twice and must give the same bits.
 */
#include "check.h"
#include "internal.h"
#include "kernels.h"

#ifdef HALO_WITH_CUDA

enum { GUARD = 256, POISON = 0xAB };

/* One array on both sides. */
typedef struct side_by_side {
  char *host, *base, *dev;
  int64_t bytes, shift;
} pair;

static uint64_t stream;

static pair pair_new(int64_t bytes, int64_t shift) {
  pair p = {.bytes = bytes, .shift = shift};
  p.host = malloc((size_t)bytes + 1);
  const int64_t total = bytes + 2 * GUARD + shift;
  CHECK_OK(halo_cuda_memory_new((void **)&p.base, total));
  char *poison = malloc((size_t)total);
  memset(poison, POISON, (size_t)total);
  CHECK_OK(halo_cuda_copy_in(p.base, poison, total));
  free(poison);
  memset(p.host, POISON, (size_t)bytes);
  p.dev = p.base + GUARD + shift;
  return p;
}

static void pair_up(pair *p) { CHECK_OK(halo_cuda_copy_in(p->dev, p->host, p->bytes)); }

static void pair_free(pair *p) {
  const int64_t total = p->bytes + 2 * GUARD + p->shift;
  unsigned char *all = malloc((size_t)total);
  CHECK_OK(halo_cuda_copy_out(all, p->base, total));
  bool is_whole = true;
  for (int64_t i = 0; i < GUARD; i++) is_whole = is_whole && all[i] == POISON && all[total - 1 - i] == POISON;
  CHECK(is_whole);
  free(all);
  free(p->host);
  CHECK_OK(halo_cuda_memory_free(p->base, total));
}

static int64_t size_of(halo_dtype t) { return halo_dtype_bytes(t); }
static halo_dtype acc(halo_dtype t) { return t == HALO_F64 ? HALO_F64 : HALO_F32; }

/* n normal numbers of dtype t on both sides. */
static pair normal(halo_dtype t, int64_t n, int64_t shift, double mean, double std) {
  pair p = pair_new(n * size_of(t), shift * size_of(t));
  CHECK_OK(halo_cpu_random_normal(t, p.host, n, 11, stream++, 0, mean, std));
  pair_up(&p);
  return p;
}
static pair output(halo_dtype t, int64_t n, int64_t shift) { return pair_new(n * size_of(t), shift * size_of(t)); }

static pair integers(halo_dtype t, int64_t n, int64_t limit) {
  pair p = pair_new(n * size_of(t), 0);
  for (int64_t i = 0; i < n; i++) {
    const int64_t v = (int64_t)(halo_random_u64(5, stream, (uint64_t)i) % (uint64_t)limit);
    if (t == HALO_I64) ((int64_t *)p.host)[i] = v;
    if (t == HALO_I32) ((int32_t *)p.host)[i] = (int32_t)v;
  }
  stream++;
  pair_up(&p);
  return p;
}

static double at(const void *x, halo_dtype t, int64_t i) {
  if (t == HALO_F32) return ((const float *)x)[i];
  if (t == HALO_F64) return ((const double *)x)[i];
  const uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static double rel_of(halo_dtype t) { return t == HALO_BF16 ? 1.0 / 128 : t == HALO_F32 ? 4e-6 : 1e-14; }

/* n numbers at `from` of got and want. slack: a multiple of the arithmetic's rounding, of max|want|. */
static bool close_to(const void *got, const void *want, halo_dtype t, int64_t n, double slack, const char *what) {
  double most = 0, worst = 0;
  int64_t where = -1;
  for (int64_t i = 0; i < n; i++) {
    const double w = at(want, t, i);
    if (isfinite(w) && fabs(w) > most) most = fabs(w);
  }
  const double unit = t == HALO_F64 ? 1e-15 : 6e-8;
  for (int64_t i = 0; i < n; i++) {
    const double g = at(got, t, i), w = at(want, t, i);
    if (g == w || (isnan(g) && isnan(w))) continue;
    const double error = fabs(g - w) / (rel_of(t) * fabs(w) + slack * unit * most + 1e-300);
    if (!(error <= worst)) {
      worst = isnan(error) ? 1e300 : error;
      where = i;
    }
  }
  if (worst > 1) {
    fprintf(stderr, "  %s: element %lld of %lld is %.9g, wanted %.9g: %.3g times the bound\n", what,
            (long long)where, (long long)n, at(got, t, where), at(want, t, where), worst);
  }
  return worst <= 1;
}

static bool same(const pair *p, halo_dtype t, int64_t n, double slack, const char *what) {
  char *got = malloc((size_t)p->bytes + 1);
  CHECK_OK(halo_cuda_copy_out(got, p->dev, p->bytes));
  const bool is_close = close_to(got, p->host, t, n, slack, what);
  free(got);
  return is_close;
}
static bool equal(const pair *p, const char *what) {
  char *got = malloc((size_t)p->bytes + 1);
  CHECK_OK(halo_cuda_copy_out(got, p->dev, p->bytes));
  const bool is_equal = memcmp(got, p->host, (size_t)p->bytes) == 0;
  if (!is_equal) {
    int64_t i = 0;
    while (got[i] == p->host[i]) i++;
    fprintf(stderr, "  %s: byte %lld of %lld differs\n", what, (long long)i, (long long)p->bytes);
  }
  free(got);
  return is_equal;
}

/* What a second run must repeat: the bytes of p now. */
static char *snapshot(const pair *p) {
  char *got = malloc((size_t)p->bytes + 1);
  CHECK_OK(halo_cuda_copy_out(got, p->dev, p->bytes));
  return got;
}
static bool repeats(const pair *p, char *before) {
  char *now = snapshot(p);
  const bool is_equal = memcmp(now, before, (size_t)p->bytes) == 0;
  free(now);
  free(before);
  return is_equal;
}

static const halo_dtype reals[] = {HALO_F32, HALO_BF16, HALO_F64};

/* ---- copy ---------------------------------------------------------------------------------- */

static void test_convert(void) {
  static const int64_t counts[] = {0, 1, 7, 1000, 12345};
  const double special[] = {NAN, INFINITY, -INFINITY, 300.5, -300.5, 3e9, -3e9, 1e19, 254.99, -0.0, 0.5};
  for (int32_t from = 0; from < HALO_DTYPE_COUNT; from++) {
    for (int32_t to = 0; to < HALO_DTYPE_COUNT; to++) {
      for (int32_t k = 0; k < 5; k++) {
        const int64_t n = counts[k], shift = k == 3 ? 1 : 0;
        pair wide = normal(HALO_F64, n, 0, 0, 1000), x = output(from, n, shift), y = output(to, n, shift);
        for (int64_t i = 0; i < n && i < 11 && n > 100; i++) ((double *)wide.host)[i] = special[i];
        CHECK_OK(halo_cpu_convert(x.host, from, wide.host, HALO_F64, n));
        pair_up(&x);
        CHECK_OK(halo_cpu_convert(y.host, to, x.host, from, n));
        CHECK_OK(halo_cuda_convert(y.dev, to, x.dev, from, n));
        if (to == HALO_F32 || to == HALO_F64 || to == HALO_BF16) { // NaN may differ in its payload
          CHECK(same(&y, to, n, 0, "convert"));
        } else {
          CHECK(equal(&y, "convert"));
        }
        pair_free(&wide);
        pair_free(&x);
        pair_free(&y);
      }
    }
  }
}

static void test_fill(void) {
  const double values[] = {0, 1.25, -3, 300};
  for (int32_t t = 0; t < HALO_DTYPE_COUNT; t++) {
    for (int64_t n = 0; n < 70; n += 1 + n / 5) {
      for (int32_t k = 0; k < 4; k++) {
        pair y = output(t, n, n % 5);
        CHECK_OK(halo_cpu_fill(t, y.host, n, values[k]));
        CHECK_OK(halo_cuda_fill(t, y.dev, n, values[k]));
        CHECK(equal(&y, "fill"));
        pair_free(&y);
      }
    }
  }
  if (check_is_small()) return;
  pair y = output(HALO_BF16, 1000003, 3);
  CHECK_OK(halo_cpu_fill(HALO_BF16, y.host, 1000003, 7));
  CHECK_OK(halo_cuda_fill(HALO_BF16, y.dev, 1000003, 7));
  CHECK(equal(&y, "fill"));
  pair_free(&y);
}

static void test_axpy_scale(void) {
  static const int64_t counts[] = {1, 5, 1024, 99991};
  for (int32_t r = 0; r < 3; r++) {
    for (int32_t k = 0; k < 8; k++) {
      const int64_t n = counts[k % 4], shift = k / 4;
      const halo_dtype t = reals[r];
      pair x = normal(t, n, shift, 0, 1), y = normal(t, n, shift, 0, 1);
      CHECK_OK(halo_cpu_axpy(t, y.host, x.host, n, -0.75));
      CHECK_OK(halo_cuda_axpy(t, y.dev, x.dev, n, -0.75));
      CHECK(same(&y, t, n, 2, "axpy"));
      CHECK_OK(halo_cpu_scale(t, y.host, n, 1.7));
      CHECK_OK(halo_cuda_scale(t, y.dev, n, 1.7));
      CHECK(same(&y, t, n, 4, "scale"));
      pair_free(&x);
      pair_free(&y);
    }
  }
}

typedef struct strided_case {
  int32_t ndim;
  int64_t shape[4], stride[4], first; /* of the strided side, in elements */
} strided_case;

static void test_pack(void) {
  static const strided_case cases[] = {
      {1, {100}, {1}, 0},
      {1, {100}, {3}, 1},
      {1, {100}, {0}, 1},
      {2, {33, 64}, {80, 1}, 0},
      {2, {33, 64}, {80, 1}, 3},
      {2, {33, 61}, {77, 1}, 0},
      {2, {130, 70}, {1, 130}, 0},
      {2, {16, 200}, {1, 17}, 2},
      {3, {5, 40, 72}, {3000, 1, 40}, 0},
      {3, {40, 5, 72}, {1, 3000, 40}, 0},
      {4, {2, 9, 4, 16}, {9 * 4 * 48, 48, 9 * 48, 1}, 0},
      {4, {2, 4, 9, 16}, {9 * 4 * 16, 16, 64, 1}, 0},
      {4, {3, 1, 5, 7}, {0, 1, 14, 2}, 0},
      {2, {0, 5}, {5, 1}, 0},
      {2, {700, 1000}, {1024, 1}, 0},
      {2, {700, 1000}, {1, 704}, 0},
  };
  for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
    const strided_case *c = &cases[k];
    int64_t n = 1, extent = 1 + c->first;
    for (int32_t d = 0; d < c->ndim; d++) {
      n *= c->shape[d];
      extent += (c->shape[d] > 0 ? c->shape[d] - 1 : 0) * c->stride[d];
    }
    if (check_leaves_out(n)) continue;
    for (int64_t bytes = 1; bytes <= 8; bytes *= 2) {
      pair x = pair_new(extent * bytes, 0), y = pair_new(n * bytes, 0);
      for (int64_t i = 0; i < x.bytes; i++) x.host[i] = (char)halo_random_u64(9, stream, (uint64_t)i);
      stream++;
      pair_up(&x);
      CHECK_OK(halo_cpu_pack(y.host, x.host + c->first * bytes, bytes, c->ndim, c->shape, c->stride));
      CHECK_OK(halo_cuda_pack(y.dev, x.dev + c->first * bytes, bytes, c->ndim, c->shape, c->stride));
      CHECK(equal(&y, "pack"));
      bool is_repeated = false; // writing through stride 0 has no defined winner
      for (int32_t d = 0; d < c->ndim; d++) is_repeated |= c->stride[d] == 0 && c->shape[d] > 1;
      if (!is_repeated) {
        for (int64_t i = 0; i < y.bytes; i++) y.host[i] = (char)(y.host[i] + 1);
        pair_up(&y);
        CHECK_OK(halo_cpu_unpack(x.host + c->first * bytes, y.host, bytes, c->ndim, c->shape, c->stride));
        CHECK_OK(halo_cuda_unpack(x.dev + c->first * bytes, y.dev, bytes, c->ndim, c->shape, c->stride));
        CHECK(equal(&x, "unpack"));
      }
      pair_free(&x);
      pair_free(&y);
    }
  }
}

static void test_random(void) {
  for (int32_t r = 0; r < 3; r++) {
    for (int64_t first = 0; first < 3; first++) {
      const halo_dtype t = reals[r];
      const int64_t n = first == 2 ? 1 : 100001, from = first + ((int64_t)1 << 33);
      pair u = output(t, n, 0), z = output(t, n, 0);
      CHECK_OK(halo_cpu_random_uniform(t, u.host, n, 42, 7, from, 0, 1));
      CHECK_OK(halo_cuda_random_uniform(t, u.dev, n, 42, 7, from, 0, 1));
      CHECK(equal(&u, "random_uniform"));
      CHECK_OK(halo_cpu_random_uniform(t, u.host, n, 42, 7, from, -3, 0.1));
      CHECK_OK(halo_cuda_random_uniform(t, u.dev, n, 42, 7, from, -3, 0.1));
      CHECK(same(&u, t, n, 1, "random_uniform"));
      CHECK_OK(halo_cpu_random_normal(t, z.host, n, 42, 7, from, 0.5, 0.02));
      CHECK_OK(halo_cuda_random_normal(t, z.dev, n, 42, 7, from, 0.5, 0.02));
      CHECK(same(&z, t, n, 1, "random_normal"));
      pair_free(&u);
      pair_free(&z);
    }
  }
}

/* ---- embedding ----------------------------------------------------------------------------- */

static void embedding_case(halo_dtype t, halo_dtype tw, halo_dtype ti, int64_t n, int64_t vocab, int64_t cols,
                           int64_t limit) {
  if (check_leaves_out((n + vocab) * cols)) return;
  pair w = normal(t, vocab * cols, 0, 0, 1), ids = integers(ti, n, limit), y = output(t, n * cols, 0);
  CHECK_OK(halo_cpu_embedding_fwd(t, y.host, w.host, ti, ids.host, n, vocab, cols));
  CHECK_OK(halo_cuda_embedding_fwd(t, y.dev, w.dev, ti, ids.dev, n, vocab, cols));
  CHECK(equal(&y, "embedding_fwd"));
  pair dy = normal(t, n * cols, 0, 0, 1), dw = normal(tw, vocab * cols, 0, 0, 1);
  pair again = output(tw, vocab * cols, 0);
  CHECK_OK(halo_cuda_copy(again.dev, dw.dev, dw.bytes));
  CHECK_OK(halo_cpu_embedding_bwd(tw, dw.host, t, dy.host, ti, ids.host, n, vocab, cols));
  CHECK_OK(halo_cuda_embedding_bwd(tw, dw.dev, t, dy.dev, ti, ids.dev, n, vocab, cols));
  // The CPU rounds a bf16 dw after every token, the GPU once.
  const double slack = tw == HALO_BF16 ? 1e5 * sqrt((double)(n / limit + 1)) : 20 + (double)(n / limit);
  CHECK(same(&dw, tw, vocab * cols, slack, "embedding_bwd"));
  CHECK_OK(halo_cuda_embedding_bwd(tw, again.dev, t, dy.dev, ti, ids.dev, n, vocab, cols));
  CHECK(repeats(&again, snapshot(&dw)));
  pair_free(&again);
  pair_free(&w);
  pair_free(&ids);
  pair_free(&y);
  pair_free(&dy);
  pair_free(&dw);
}

static void test_embedding(void) {
  static const int64_t shapes[][4] = {{1, 1, 1, 1},       {33, 10, 8, 10},     {1000, 50, 24, 50}, {1000, 50, 13, 3},
                                      {5000, 300, 64, 1}, {4097, 7, 2048, 7}, {100, 5000, 40, 5000}};
  for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
    const int64_t *s = shapes[k];
    embedding_case(HALO_F32, HALO_F32, HALO_I32, s[0], s[1], s[2], s[3]);
    embedding_case(HALO_BF16, HALO_F32, HALO_I64, s[0], s[1], s[2], s[3]);
    embedding_case(HALO_F64, HALO_F64, HALO_I64, s[0], s[1], s[2], s[3]);
    if (s[0] / s[3] < 100) embedding_case(HALO_BF16, HALO_BF16, HALO_I32, s[0], s[1], s[2], s[3]);
  }
  embedding_case(HALO_BF16, HALO_F32, HALO_I64, 40000, 999, 264, 999); // pieces longer than the shortest
  // One tile of the sort, one token more, as many as are merged, one token more, all of one id, beyond 16 bits.
  static const int64_t tokens[][3] = {{2048, 300, 300}, {2049, 300, 300}, {49152, 70, 70}, {49153, 70, 70}, {6000, 9, 1},
                                      {30000, 151936, 151936}};
  for (size_t k = 0; k < sizeof tokens / sizeof *tokens; k++) {
    embedding_case(HALO_BF16, HALO_F32, k % 2 == 0 ? HALO_I64 : HALO_I32, tokens[k][0], tokens[k][1], 8, tokens[k][2]);
  }
}

static void test_bad_token(void) {
  pair w = normal(HALO_F32, 10 * 8, 0, 0, 1), ids = integers(HALO_I64, 20, 10), y = output(HALO_F32, 20 * 8, 0);
  ((int64_t *)ids.host)[7] = -5;
  ((int64_t *)ids.host)[11] = 10;
  pair_up(&ids);
  CHECK_OK(halo_cuda_embedding_fwd(HALO_F32, y.dev, w.dev, HALO_I64, ids.dev, 20, 10, 8));
  CHECK_STATUS(halo_cuda_synchronize(), HALO_EARG);
  CHECK(strstr(halo_error_message(), "token id") != NULL);
  CHECK_OK(halo_cuda_synchronize());
  pair dw = output(HALO_F32, 10 * 8, 0);
  CHECK_OK(halo_cuda_zero(dw.dev, dw.bytes));
  memset(dw.host, 0, (size_t)dw.bytes);
  CHECK_OK(halo_cpu_embedding_bwd(HALO_F32, dw.host, HALO_F32, w.host, HALO_I64, ids.host, 10, 10, 8));
  CHECK_OK(halo_cuda_embedding_bwd(HALO_F32, dw.dev, HALO_F32, w.dev, HALO_I64, ids.dev, 10, 10, 8));
  CHECK(same(&dw, HALO_F32, 80, 4, "embedding_bwd, bad id"));
  pair_free(&w);
  pair_free(&ids);
  pair_free(&y);
  pair_free(&dw);
}

/* ---- linear -------------------------------------------------------------------------------- */

static void test_linear(void) {
  static const int64_t shapes[][3] = {{1, 1, 1},      {7, 5, 9},        {300, 40, 40},   {513, 24, 32},
                                      {1000, 129, 131}, {5000, 256, 256}, {3001, 2560, 2560}, {0, 6, 6}};
  for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
    const int64_t rows = shapes[k][0], cols = shapes[k][1], ld = shapes[k][2];
    if (check_leaves_out(rows * ld)) continue;
    for (int32_t r = 0; r < 4; r++) {
      const halo_dtype t = reals[r % 3], ty = r == 3 ? HALO_BF16 : acc(t);
      pair x = normal(t, rows * ld + 1, k % 2, 0.1, 1), y = normal(ty, cols, 0, 0, 1);
      const double beta = k % 2 == 0 ? 0 : 0.5;
      pair again = output(ty, cols, 0);
      CHECK_OK(halo_cuda_copy(again.dev, y.dev, y.bytes));
      CHECK_OK(halo_cpu_sum_rows(ty, y.host, t, x.host, ld, rows, cols, beta));
      CHECK_OK(halo_cuda_sum_rows(ty, y.dev, t, x.dev, ld, rows, cols, beta));
      CHECK(same(&y, ty, cols, t == HALO_F64 ? 100 : 4, "sum_rows"));
      CHECK_OK(halo_cuda_sum_rows(ty, again.dev, t, x.dev, ld, rows, cols, beta));
      CHECK(repeats(&again, snapshot(&y)));
      pair b = normal(t, cols, 0, 0, 1), z = normal(t, rows * ld + 1, 0, 0, 1);
      CHECK_OK(halo_cpu_bias_rows(t, z.host, ld, b.host, rows, cols));
      CHECK_OK(halo_cuda_bias_rows(t, z.dev, ld, b.dev, rows, cols));
      CHECK(equal(&z, "bias_rows"));
      pair_free(&x);
      pair_free(&y);
      pair_free(&again);
      pair_free(&b);
      pair_free(&z);
    }
  }
}

/* ---- rmsnorm ------------------------------------------------------------------------------- */

static void rmsnorm_case(halo_dtype t, halo_dtype tw, int64_t rows, int64_t cols, int64_t ld, int64_t shift) {
  if (check_leaves_out(rows * ld)) return;
  pair x = normal(t, rows * ld, shift, 0.1, 2), w = normal(t, cols, 0, 1, 0.1), y = output(t, rows * cols, 0);
  pair r = output(acc(t), rows, 0);
  CHECK_OK(halo_cpu_rmsnorm_fwd(t, y.host, r.host, x.host, ld, w.host, rows, cols, 1e-6));
  CHECK_OK(halo_cuda_rmsnorm_fwd(t, y.dev, r.dev, x.dev, ld, w.dev, rows, cols, 1e-6));
  CHECK(same(&y, t, rows * cols, 4, "rmsnorm_fwd"));
  CHECK(same(&r, acc(t), rows, 4, "rstd"));
  CHECK_OK(halo_cuda_rmsnorm_fwd(t, y.dev, NULL, x.dev, ld, w.dev, rows, cols, 1e-6));
  pair dy = normal(t, rows * cols, 0, 0, 1), dx = output(t, rows * cols, 0), dw = normal(tw, cols, 0, 0, 1);
  pair again = output(tw, cols, 0);
  pair_up(&r);
  CHECK_OK(halo_cuda_copy(again.dev, dw.dev, dw.bytes));
  CHECK_OK(halo_cpu_rmsnorm_bwd(t, dx.host, tw, dw.host, dy.host, x.host, ld, w.host, r.host, rows, cols));
  CHECK_OK(halo_cuda_rmsnorm_bwd(t, dx.dev, tw, dw.dev, dy.dev, x.dev, ld, w.dev, r.dev, rows, cols));
  // dx is a difference, and of a row of one nothing is left.
  const double slack = cols < 8 ? 1e4 : 16;
  CHECK(same(&dx, t, rows * cols, slack, "rmsnorm_bwd dx"));
  CHECK(same(&dw, tw, cols, 10 * sqrt((double)rows) + 20, "rmsnorm_bwd dw"));
  CHECK_OK(halo_cuda_rmsnorm_bwd(t, NULL, tw, again.dev, dy.dev, x.dev, ld, w.dev, r.dev, rows, cols));
  CHECK(repeats(&again, snapshot(&dw)));
  CHECK_OK(halo_cuda_zero(dx.dev, dx.bytes));
  CHECK_OK(halo_cuda_rmsnorm_bwd(t, dx.dev, tw, NULL, dy.dev, x.dev, ld, w.dev, r.dev, rows, cols));
  CHECK(same(&dx, t, rows * cols, slack, "rmsnorm_bwd dx alone"));
  pair_free(&x);
  pair_free(&w);
  pair_free(&y);
  pair_free(&r);
  pair_free(&dy);
  pair_free(&dx);
  pair_free(&dw);
  pair_free(&again);
}

static void test_rmsnorm(void) {
  static const int64_t widths[] = {1, 3, 8, 40, 128, 250, 256, 264, 768, 1000, 1024, 2048, 4096, 5120, 8192, 16384, 20000};
  for (size_t k = 0; k < sizeof widths / sizeof *widths; k++) {
    const int64_t cols = widths[k], rows = cols > 3000 ? 37 : 331;
    for (int32_t r = 0; r < 3; r++) {
      const halo_dtype t = reals[r];
      rmsnorm_case(t, acc(t), rows, cols, cols, 0);
      rmsnorm_case(t, acc(t), rows, cols, cols + 16, 0);
      if (k % 3 == 0) rmsnorm_case(t, t, rows, cols, cols + 1, 1);
    }
  }
  rmsnorm_case(HALO_BF16, HALO_F32, 20011, 2048, 2048, 0);
  rmsnorm_case(HALO_BF16, HALO_F32, 100003, 128, 128, 0);
}

/* ---- rope, swiglu -------------------------------------------------------------------------- */

static void rope_case(halo_dtype t, const int64_t *s, bool is_packed, int64_t shift) {
  const int64_t batch = s[0], tokens = s[1], heads = s[2], size = s[3], half = s[4];
  const int64_t row = is_packed ? (heads + 2) * size : heads * size;
  const int64_t stride[3] = {tokens * row, row, size}, n = batch * tokens * heads * size;
  if (check_leaves_out(n)) return;
  pair x = normal(t, batch * tokens * row, shift, 0, 1), y = output(t, n, shift);
  pair c = output(acc(t), tokens * half, 0), sn = output(acc(t), tokens * half, 0);
  pair p = integers(HALO_I32, tokens, 1 << 20), f = normal(HALO_F32, half, 0, 0, 1);
  for (int32_t exact = 0; exact < 2; exact++) {
    CHECK_OK(halo_cpu_rope_table(acc(t), c.host, sn.host, HALO_I32, p.host, HALO_F32, f.host, tokens, half, 1.1,
                                 exact));
    CHECK_OK(halo_cuda_rope_table(acc(t), c.dev, sn.dev, HALO_I32, p.dev, HALO_F32, f.dev, tokens, half, 1.1, exact));
    CHECK(same(&c, acc(t), tokens * half, 10, "rope_table cos") && same(&sn, acc(t), tokens * half, 10, "sin"));
  }
  pair_up(&c);
  pair_up(&sn);
  for (int32_t sign = -1; sign <= 1; sign += 2) {
    CHECK_OK(halo_cpu_rope(t, y.host, x.host, stride, c.host, sn.host, 0, batch, tokens, heads, size, half, sign));
    CHECK_OK(halo_cuda_rope(t, y.dev, x.dev, stride, c.dev, sn.dev, 0, batch, tokens, heads, size, half, sign));
    CHECK(same(&y, t, n, 4, "rope"));
  }
  if (!is_packed) { // in place
    CHECK_OK(halo_cuda_rope(t, x.dev, x.dev, stride, c.dev, sn.dev, 0, batch, tokens, heads, size, half, 1));
    memcpy(x.host, y.host, (size_t)y.bytes);
    CHECK(same(&x, t, n, 4, "rope in place"));
  }
  pair_free(&x);
  pair_free(&y);
  pair_free(&c);
  pair_free(&sn);
  pair_free(&p);
  pair_free(&f);
}

static void test_rope(void) {
  static const int64_t shapes[][5] = {{1, 1, 1, 2, 1},     {2, 7, 3, 10, 5},     {1, 33, 16, 128, 64}, {2, 19, 5, 64, 32},
                                      {1, 20, 2, 128, 64}, {1, 11, 4, 96, 16}, {3, 5, 7, 24, 8},     {1, 300, 28, 128, 64},
                                      {1, 3, 2, 6, 0}};
  for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
    for (int32_t r = 0; r < 3; r++) {
      rope_case(reals[r], shapes[k], false, 0);
      rope_case(reals[r], shapes[k], true, 0);
      rope_case(reals[r], shapes[k], true, 1);
    }
  }
}

static void swiglu_case(halo_dtype t, int64_t rows, int64_t cols, int64_t ld, int64_t shift) {
  const int64_t n = rows * ld;
  if (check_leaves_out(n)) return;
  pair g = normal(t, n, shift, 0, 4), u = normal(t, n, shift, 0, 1), y = output(t, rows * cols, 0);
  CHECK_OK(halo_cpu_swiglu_fwd(t, y.host, g.host, ld, u.host, ld, rows, cols));
  CHECK_OK(halo_cuda_swiglu_fwd(t, y.dev, g.dev, ld, u.dev, ld, rows, cols));
  CHECK(same(&y, t, rows * cols, 2, "swiglu_fwd"));
  pair dy = normal(t, rows * cols, 0, 0, 1), dg = output(t, n, 0), du = output(t, n, 0);
  CHECK_OK(halo_cpu_swiglu_bwd(t, dg.host, ld, du.host, ld, dy.host, g.host, ld, u.host, ld, rows, cols));
  CHECK_OK(halo_cuda_swiglu_bwd(t, dg.dev, ld, du.dev, ld, dy.dev, g.dev, ld, u.dev, ld, rows, cols));
  CHECK(same(&dg, t, n, 8, "swiglu_bwd dg") && same(&du, t, n, 4, "swiglu_bwd du"));
  // In place: g and u become their gradients.
  CHECK_OK(halo_cuda_swiglu_bwd(t, g.dev, ld, u.dev, ld, dy.dev, g.dev, ld, u.dev, ld, rows, cols));
  for (int64_t i = 0; i < rows; i++) {
    memcpy(g.host + i * ld * size_of(t), dg.host + i * ld * size_of(t), (size_t)(cols * size_of(t)));
    memcpy(u.host + i * ld * size_of(t), du.host + i * ld * size_of(t), (size_t)(cols * size_of(t)));
  }
  CHECK(same(&g, t, n, 8, "swiglu_bwd in place") && same(&u, t, n, 4, "swiglu_bwd in place"));
  pair_free(&g);
  pair_free(&u);
  pair_free(&y);
  pair_free(&dy);
  pair_free(&dg);
  pair_free(&du);
}

static void test_swiglu(void) {
  static const int64_t shapes[][3] = {{1, 1, 1}, {3, 7, 9}, {50, 64, 64}, {50, 64, 128}, {17, 1376, 2752}, {1000, 96, 96}, {9, 11008, 22016}};
  for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
    for (int32_t r = 0; r < 3; r++) {
      swiglu_case(reals[r], shapes[k][0], shapes[k][1], shapes[k][2], 0);
      swiglu_case(reals[r], shapes[k][0], shapes[k][1], shapes[k][2], 1);
    }
  }
}

/* ---- cross_entropy ------------------------------------------------------------------------- */

static void cross_entropy_case(halo_dtype t, int64_t rows, int64_t vocab, int64_t ld) {
  if (check_is_small() && rows * ld > 200000) rows = 1 + 200000 / ld;
  const halo_dtype a = acc(t);
  pair z = normal(t, rows * ld, 0, 1, 3), labels = integers(HALO_I64, rows, vocab);
  if (rows > 2) ((int64_t *)labels.host)[1] = -100;
  pair_up(&labels);
  pair loss = output(a, rows, 0), lse = output(a, rows, 0), dz = output(t, rows * vocab, 0), g = normal(a, rows, 0, 0, 1);
  const int64_t *on_host = (int64_t *)labels.host, *on_dev = (int64_t *)labels.dev;
  CHECK_OK(halo_cpu_cross_entropy_fwd(t, loss.host, lse.host, z.host, ld, on_host, rows, vocab, -100));
  CHECK_OK(halo_cuda_cross_entropy_fwd(t, loss.dev, lse.dev, z.dev, ld, on_dev, rows, vocab, -100));
  CHECK(same(&loss, a, rows, 4, "cross_entropy_fwd loss") && same(&lse, a, rows, 4, "lse"));
  for (int64_t stride = 0; stride < 2; stride++) {
    CHECK_OK(halo_cpu_cross_entropy_bwd(t, dz.host, z.host, ld, lse.host, on_host, g.host, stride, rows, vocab, -100));
    CHECK_OK(halo_cuda_cross_entropy_bwd(t, dz.dev, z.dev, ld, lse.dev, on_dev, g.dev, stride, rows, vocab, -100));
    CHECK(same(&dz, t, rows * vocab, 2, "cross_entropy_bwd"));
  }
  pair first = output(t, rows * ld, 0);
  CHECK_OK(halo_cuda_copy(first.dev, z.dev, z.bytes));
  CHECK_OK(halo_cpu_cross_entropy_fused(t, loss.host, z.host, ld, on_host, g.host, rows, vocab, -100));
  CHECK_OK(halo_cuda_cross_entropy_fused(t, loss.dev, z.dev, ld, on_dev, g.dev, rows, vocab, -100));
  CHECK(same(&loss, a, rows, 4, "cross_entropy_fused loss"));
  CHECK(same(&z, t, rows * ld, 4, "cross_entropy_fused"));
  CHECK_OK(halo_cuda_cross_entropy_fused(t, loss.dev, first.dev, ld, on_dev, g.dev, rows, vocab, -100));
  CHECK(repeats(&first, snapshot(&z)));
  pair_free(&z);
  pair_free(&labels);
  pair_free(&loss);
  pair_free(&lse);
  pair_free(&dz);
  pair_free(&g);
  pair_free(&first);
}

static void test_cross_entropy(void) {
  static const int64_t shapes[][3] = {{1, 1, 1},         {5, 3, 3},          {20, 250, 257},      {9, 1000, 1000},
                                      {33, 50257, 50257}, {40, 50264, 50272}, {40, 50257, 50304}, {300, 8192, 8192}, {7, 32000, 32000},
                                      {20, 128256, 128256}, {13, 151936, 151936}, {3, 200000, 200000}};
  for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
    const int64_t *s = shapes[k];
    for (int32_t r = 0; r < 3; r++) cross_entropy_case(reals[r], s[0], s[1], s[2]);
  }
  // A label out of range is told, and its row treated as ignored.
  for (int64_t vocab = 63; vocab <= 64; vocab++) {
    pair z = normal(HALO_BF16, 3 * vocab, 0, 0, 1), labels = integers(HALO_I64, 3, vocab), loss = output(HALO_F32, 3, 0);
    ((int64_t *)labels.host)[2] = vocab;
    pair_up(&labels);
    CHECK_OK(halo_cuda_cross_entropy_fused(HALO_BF16, loss.dev, z.dev, vocab, (int64_t *)labels.dev, NULL, 3, vocab, -1));
    CHECK_STATUS(halo_cuda_synchronize(), HALO_EARG);
    CHECK(strstr(halo_error_message(), "label") != NULL);
    ((int64_t *)labels.host)[2] = -1;
    CHECK_OK(halo_cpu_cross_entropy_fused(HALO_BF16, loss.host, z.host, vocab, (int64_t *)labels.host, NULL, 3, vocab, -1));
    CHECK(same(&loss, HALO_F32, 3, 4, "loss") && same(&z, HALO_BF16, 3 * vocab, 4, "cross_entropy_fused"));
    pair_free(&z);
    pair_free(&labels);
    pair_free(&loss);
  }
}

/* ---- adamw --------------------------------------------------------------------------------- */

static void adamw_case(halo_dtype t, halo_dtype tm, bool has_master, int64_t n, int64_t shift) {
  if (check_leaves_out(n)) return;
  const halo_dtype a = acc(t);
  pair p = normal(t, n, shift, 0, 1), master = normal(a, n, shift, 0, 1), g = normal(a, n, shift, 0, 0.1);
  pair m = normal(tm, n, shift, 0, 0.1), squares = normal(a, n, 0, 0, 1), v = output(tm, n, shift);
  for (int64_t i = 0; i < n; i++) { // second moments are squares
    if (a == HALO_F64) ((double *)squares.host)[i] = fabs(((double *)squares.host)[i]) * 1e-3;
    if (a == HALO_F32) ((float *)squares.host)[i] = fabsf(((float *)squares.host)[i]) * 1e-3f;
  }
  CHECK_OK(halo_cpu_convert(v.host, tm, squares.host, a, n));
  pair_up(&v);
  for (int64_t step = 1; step < 4; step++) {
    const halo_adamw_step_args s = {.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1,
                                    .grad_scale = 0.7, .step = step, .stream = 17};
    CHECK_OK(halo_cpu_adamw(t, p.host, has_master ? master.host : NULL, g.host, tm, m.host, v.host, n, &s));
    CHECK_OK(halo_cuda_adamw(t, p.dev, has_master ? master.dev : NULL, g.dev, tm, m.dev, v.dev, n, &s));
  }
  // A moment on the edge between two bf16 may fall to either side, by the last bit of its fp32.
  const double slack = tm == a ? 8 : 1e4;
  CHECK(same(&p, t, n, slack, "adamw p") && same(&m, tm, n, 8, "adamw m") && same(&v, tm, n, 8, "adamw v"));
  CHECK(same(&master, a, n, slack, "adamw master"));
  pair_free(&p);
  pair_free(&master);
  pair_free(&g);
  pair_free(&m);
  pair_free(&v);
  pair_free(&squares);
}

static void test_adamw(void) {
  static const int64_t counts[] = {0, 1, 3, 1000, 4099, 300001};
  for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
    for (int32_t r = 0; r < 3; r++) {
      for (int32_t variant = 0; variant < 4; variant++) {
        adamw_case(reals[r], acc(reals[r]), variant % 2 == 1, counts[k], variant / 2);
        if (reals[r] != HALO_F64) adamw_case(reals[r], HALO_BF16, variant % 2 == 1, counts[k], variant / 2);
      }
      const halo_dtype t = reals[r];
      pair x = normal(t, counts[k], k % 2, 0.3, 1);
      double cpu = -1, cuda = -1, again = -1;
      CHECK_OK(halo_cpu_sum_squares(t, &cpu, x.host, counts[k]));
      CHECK_OK(halo_cuda_sum_squares(t, &cuda, x.dev, counts[k]));
      CHECK_OK(halo_cuda_sum_squares(t, &again, x.dev, counts[k]));
      CHECK(fabs(cpu - cuda) <= 1e-12 * cpu && cuda == again);
      pair_free(&x);
    }
  }
}

/* ---- more than 2^31 elements --------------------------------------------------------------- */

/* Elements first .. first + n of a device array against the host's. */
static bool slice_same(const void *dev, const void *want, halo_dtype t, int64_t first, int64_t n, double slack,
                       const char *what) {
  char *got = malloc((size_t)(n * size_of(t)));
  CHECK_OK(halo_cuda_copy_out(got, (const char *)dev + first * size_of(t), n * size_of(t)));
  const bool is_close = close_to(got, want, t, n, slack, what);
  free(got);
  return is_close;
}

enum { LONG_ROWS = 1100000, LONG_COLS = 2048, LONG_N = 5 * LONG_COLS };

static void long_elementwise(uint16_t *a, uint16_t *b, float *c) {
  const int64_t n = (int64_t)LONG_ROWS * LONG_COLS, last = n - LONG_N;
  uint16_t *x = malloc(LONG_N * 2), *y = malloc(LONG_N * 2);
  float *f = malloc(LONG_N * 4);
  CHECK_OK(halo_cuda_random_normal(HALO_BF16, a, n, 1, 2, 0, 0, 1));
  CHECK_OK(halo_cpu_random_normal(HALO_BF16, x, LONG_N, 1, 2, last, 0, 1));
  CHECK(slice_same(a, x, HALO_BF16, last, LONG_N, 1, "random_normal, long"));
  CHECK_OK(halo_cuda_convert(c, HALO_F32, a, HALO_BF16, n));
  CHECK_OK(halo_cpu_convert(f, HALO_F32, x, HALO_BF16, LONG_N));
  CHECK(slice_same(c, f, HALO_F32, last, LONG_N, 0, "convert, long"));
  CHECK_OK(halo_cuda_fill(HALO_BF16, b, n, 3));
  CHECK_OK(halo_cuda_axpy(HALO_BF16, b, a, n, 0.5));
  CHECK_OK(halo_cpu_fill(HALO_BF16, y, LONG_N, 3));
  CHECK_OK(halo_cpu_axpy(HALO_BF16, y, x, LONG_N, 0.5));
  CHECK(slice_same(b, y, HALO_BF16, last, LONG_N, 0, "fill, axpy, long"));
  CHECK_OK(halo_cuda_swiglu_fwd(HALO_BF16, b, a, LONG_COLS, a, LONG_COLS, LONG_ROWS, LONG_COLS));
  CHECK_OK(halo_cpu_swiglu_fwd(HALO_BF16, y, x, LONG_COLS, x, LONG_COLS, 5, LONG_COLS));
  CHECK(slice_same(b, y, HALO_BF16, last, LONG_N, 2, "swiglu_fwd, long"));
  double squares = 0;
  CHECK_OK(halo_cuda_sum_squares(HALO_BF16, &squares, a, n));
  CHECK(fabs(squares / (double)n - 1) < 1e-3);
  const int64_t shape[2] = {LONG_ROWS, LONG_COLS - 8}, stride[2] = {LONG_COLS, 1};
  CHECK_OK(halo_cuda_pack(b, a, 2, 2, shape, stride));
  CHECK(slice_same(b, x + 4 * LONG_COLS, HALO_BF16, (int64_t)(LONG_ROWS - 1) * shape[1], shape[1], 0, "pack, long"));
  free(x);
  free(y);
  free(f);
}

static void long_rows(uint16_t *a, uint16_t *b, float *c) {
  const int64_t n = (int64_t)LONG_ROWS * LONG_COLS, last = n - LONG_N;
  uint16_t *x = malloc(LONG_N * 2), *y = malloc(LONG_N * 2), w[LONG_COLS];
  float r[5], *sums = malloc(LONG_COLS * 4);
  CHECK_OK(halo_cpu_random_normal(HALO_BF16, x, LONG_N, 1, 2, last, 0, 1));
  CHECK_OK(halo_cpu_random_normal(HALO_BF16, w, LONG_COLS, 1, 3, 0, 1, 1));
  uint16_t *w_dev = (uint16_t *)c;
  float *r_dev = c + LONG_COLS, *sums_dev = r_dev + LONG_ROWS;
  CHECK_OK(halo_cuda_copy_in(w_dev, w, sizeof w));
  CHECK_OK(halo_cuda_rmsnorm_fwd(HALO_BF16, b, r_dev, a, LONG_COLS, w_dev, LONG_ROWS, LONG_COLS, 1e-6));
  CHECK_OK(halo_cpu_rmsnorm_fwd(HALO_BF16, y, r, x, LONG_COLS, w, 5, LONG_COLS, 1e-6));
  CHECK(slice_same(b, y, HALO_BF16, last, LONG_N, 4, "rmsnorm_fwd, long"));
  CHECK_OK(halo_cuda_rmsnorm_bwd(HALO_BF16, b, HALO_F32, NULL, a, a, LONG_COLS, w_dev, r_dev, LONG_ROWS, LONG_COLS));
  CHECK_OK(halo_cpu_rmsnorm_bwd(HALO_BF16, y, HALO_F32, NULL, x, x, LONG_COLS, w, r, 5, LONG_COLS));
  CHECK(slice_same(b, y, HALO_BF16, last, LONG_N, 16, "rmsnorm_bwd, long"));
  CHECK_OK(halo_cpu_fill(HALO_BF16, w, LONG_COLS, 1.5));
  CHECK_OK(halo_cuda_copy_in(w_dev, w, sizeof w));
  CHECK_OK(halo_cuda_bias_rows(HALO_BF16, b, LONG_COLS, w_dev, LONG_ROWS, LONG_COLS));
  CHECK_OK(halo_cuda_sum_rows(HALO_F32, sums_dev, HALO_BF16, b, LONG_COLS, LONG_ROWS, LONG_COLS, 0));
  for (int32_t i = 0; i < LONG_COLS; i++) sums[i] = 1.5f * LONG_ROWS;
  CHECK(slice_same(sums_dev, sums, HALO_F32, 0, LONG_COLS, 0, "bias_rows, sum_rows, long"));
  const int64_t rows = 16400, vocab = 131072; // 2.15e9 logits
  int64_t *labels = malloc((size_t)rows * 8), *labels_dev = (int64_t *)c;
  float *loss_dev = c + 2 * rows, loss;
  uint16_t *z = malloc((size_t)vocab * 2);
  for (int64_t i = 0; i < rows; i++) labels[i] = i;
  CHECK_OK(halo_cuda_copy_in(labels_dev, labels, rows * 8));
  CHECK_OK(halo_cuda_copy_out(z, a + (rows - 1) * vocab, vocab * 2));
  CHECK_OK(halo_cuda_cross_entropy_fused(HALO_BF16, loss_dev, a, vocab, labels_dev, NULL, rows, vocab, -1));
  CHECK_OK(halo_cpu_cross_entropy_fused(HALO_BF16, &loss, z, vocab, labels + rows - 1, NULL, 1, vocab, -1));
  CHECK(slice_same(a, z, HALO_BF16, (rows - 1) * vocab, vocab, 4, "cross_entropy_fused, long"));
  CHECK(slice_same(loss_dev, &loss, HALO_F32, rows - 1, 1, 4, "cross_entropy_fused loss, long"));
  free(labels);
  free(z);
  free(x);
  free(y);
  free(sums);
}

static void long_tokens(uint16_t *a, uint16_t *b, float *c) {
  const int64_t n = (int64_t)LONG_ROWS * LONG_COLS, last = n - LONG_N, vocab = 1000;
  uint16_t *x = malloc(LONG_N * 2), *y = malloc(LONG_N * 2);
  int32_t *ids = malloc(LONG_ROWS * 4), *ids_dev = (int32_t *)c;
  float *dw_dev = c + LONG_ROWS, *dw = malloc((size_t)vocab * LONG_COLS * 4);
  CHECK_OK(halo_cuda_random_normal(HALO_BF16, a, n, 1, 2, 0, 0, 1));
  for (int32_t i = 0; i < LONG_ROWS; i++) ids[i] = i % (int32_t)vocab;
  CHECK_OK(halo_cuda_copy_in(ids_dev, ids, LONG_ROWS * 4));
  CHECK_OK(halo_cuda_embedding_fwd(HALO_BF16, b, a, HALO_I32, ids_dev, LONG_ROWS, vocab, LONG_COLS));
  for (int32_t i = 0; i < 5; i++) {
    CHECK_OK(halo_cuda_copy_out(x, a + (int64_t)ids[LONG_ROWS - 5 + i] * LONG_COLS, LONG_COLS * 2));
    CHECK(slice_same(b, x, HALO_BF16, last + i * LONG_COLS, LONG_COLS, 0, "embedding_fwd, long"));
  }
  CHECK_OK(halo_cuda_fill(HALO_BF16, b, n, 1));
  CHECK_OK(halo_cuda_zero(dw_dev, vocab * LONG_COLS * 4));
  CHECK_OK(halo_cuda_embedding_bwd(HALO_F32, dw_dev, HALO_BF16, b, HALO_I32, ids_dev, LONG_ROWS, vocab, LONG_COLS));
  for (int64_t i = 0; i < vocab * LONG_COLS; i++) dw[i] = LONG_ROWS / (float)vocab;
  CHECK(slice_same(dw_dev, dw, HALO_F32, 0, vocab * LONG_COLS, 0, "embedding_bwd, long"));
  // Rope over 1.1 million tokens of 16 heads, with one table row for all: table_stride 0, batch = tokens.
  float angles[128];
  for (int32_t j = 0; j < 64; j++) {
    angles[j] = cosf((float)j);
    angles[64 + j] = sinf((float)j);
  }
  CHECK_OK(halo_cuda_copy_in(c, angles, sizeof angles));
  const int64_t stride[3] = {LONG_COLS, LONG_COLS, 128};
  CHECK_OK(halo_cuda_rope(HALO_BF16, b, a, stride, c, c + 64, 0, LONG_ROWS, 1, 16, 128, 64, 1));
  CHECK_OK(halo_cpu_random_normal(HALO_BF16, x, LONG_N, 1, 2, last, 0, 1));
  CHECK_OK(halo_cpu_rope(HALO_BF16, y, x, stride, angles, angles + 64, 0, 5, 1, 16, 128, 64, 1));
  CHECK(slice_same(b, y, HALO_BF16, last, LONG_N, 4, "rope, long"));
  free(x);
  free(y);
  free(ids);
  free(dw);
}

static void test_long(void) {
  const int64_t n = (int64_t)LONG_ROWS * LONG_COLS;
  void *a = NULL, *b = NULL, *c = NULL;
  if (halo_cuda_memory_new(&a, n * 2) == HALO_OK && halo_cuda_memory_new(&b, n * 2) == HALO_OK &&
      halo_cuda_memory_new(&c, n * 4) == HALO_OK) {
    long_elementwise(a, b, c);
    long_rows(a, b, c);
    long_tokens(a, b, c);
  } else {
    fprintf(stderr, "  left out: needs 18 GB of device memory\n");
  }
  if (a != NULL) CHECK_OK(halo_cuda_memory_free(a, n * 2));
  if (b != NULL) CHECK_OK(halo_cuda_memory_free(b, n * 2));
  if (c != NULL) CHECK_OK(halo_cuda_memory_free(c, n * 4));
  CHECK_OK(halo_cuda_memory_trim());
}

int main(void) {
  if (halo_device_count(HALO_CUDA) == 0) {
    printf("1 pending: no CUDA device\n");
    return 0;
  }
  RUN(test_convert);
  RUN(test_fill);
  RUN(test_axpy_scale);
  RUN(test_pack);
  RUN(test_random);
  RUN(test_embedding);
  RUN(test_bad_token);
  RUN(test_linear);
  RUN(test_rmsnorm);
  RUN(test_rope);
  RUN(test_swiglu);
  RUN(test_cross_entropy);
  RUN(test_adamw);
  if (!check_is_small()) RUN(test_long);
  return check_report();
}

#else
int main(void) {
  printf("1 pending: built without CUDA\n");
  return 0;
}
#endif
