/* nn_mlp.c: the gated MLP as one op, a chunk of rows at a time.
 *
 *      g = x Wg^T     u = x Wu^T     h = silu(g) u     y = residual + h Wd^T
 *
 * g, u and h are F/E times as wide as x (5.4 for Qwen2.5-3B); as ops of their own they exist for all
 * tokens at once: 3 T F elements, 8.7 GB at 128K tokens. Here they exist for one chunk, forward and
 * backward. With save=0 backward keeps x alone and makes g and u again, so the products are
 *
 *      forward   Wg, Wu, Wd
 *      backward  Wg, Wu again; dh = dy Wd; dWd += dy^T h; dWg,dWu += (dg,du)^T x; dx = dg Wg + du Wu
 *
 * 11 in all, where a block that is recomputed as a whole needs 12: its last product makes a result
 * that only the first forward needs. dry=1 is for that second forward: the result is a tensor without
 * data that the tape can follow. save=1 keeps g, u and h: 9 products, and all the memory.
 *
 * g and u lie side by side, [n, 2F]. Where the weights (or the places of their gradients) are neighbours
 * in memory, one product serves both. dW is added to (+=) once per chunk, in fp32: a chunk of n rows does
 * 2n flops per element of dW and moves 8 bytes, so chunks of some thousand rows are wanted on a GPU.
 * The residual is added before the one rounding of the last product.
 *
 * source    gated linear units: Shazeer 2020, arXiv 2002.05202
 */
#include "nn.h"
#include "op.h"

enum { X, GATE, UP, DOWN, RESIDUAL };
enum { SAVED_GU, SAVED_H };

/* One pass over the rows. */
typedef struct mlp {
  const halo_kernels *k;
  halo_device device;
  halo_dtype t;
  int64_t rows, cols, inner, chunk; /* x [rows, cols], g [rows, inner] */
  halo__matrix x, gate, up, down;
  halo_tensor *gu, *h; /* [chunk, 2 inner], [chunk, inner]; of all rows when they are saved */
} mlp;

static void *at(const halo_tensor *t, int64_t element) {
  return (char *)halo__data(t) + element * halo_dtype_bytes(t->dtype);
}

static void *row_of(const halo__matrix *m, int64_t row) {
  return (char *)m->data + row * m->ld * halo_dtype_bytes(m->tensor->dtype);
}

static halo_status check_inputs(const halo__call *c) {
  const halo_tensor *x = c->in[X], *g = c->in[GATE], *u = c->in[UP], *d = c->in[DOWN], *r = c->in[RESIDUAL];
  HALO_CHECK(halo__is_float(x->dtype) && x->ndim >= 1, HALO_EARG,
             "gated_mlp: x must be a floating [...,E], got %s", halo__describe(x));
  const int64_t cols = x->shape[x->ndim - 1];
  HALO_CHECK(g->dtype == x->dtype && g->ndim == 2 && g->shape[1] == cols && halo__same_shape(g, u) &&
                 u->dtype == x->dtype,
             HALO_EARG, "gated_mlp: gate and up must be %s [F,%lld] for x %s, got %s and %s",
             halo_dtype_name(x->dtype), (long long)cols, halo__describe(x), halo__describe(g),
             halo__describe(u));
  HALO_CHECK(d->dtype == x->dtype && d->ndim == 2 && d->shape[0] == cols && d->shape[1] == g->shape[0],
             HALO_EARG, "gated_mlp: down must be %s [%lld,%lld], got %s", halo_dtype_name(x->dtype),
             (long long)cols, (long long)g->shape[0], halo__describe(d));
  HALO_CHECK(r == NULL || (r->dtype == x->dtype && halo__same_shape(r, x)), HALO_EARG,
             "gated_mlp: residual must be like x, %s, got %s", halo__describe(x), halo__describe(r));
  HALO_CHECK(c->param[0] >= 0, HALO_EARG, "gated_mlp: chunk is %g rows, wanted 0 (all) or more",
             c->param[0]);
  return HALO_OK;
}

/* Equal chunks, so that the last one is not a crumb. */
static int64_t chunk_rows(int64_t rows, int64_t asked) {
  if (asked <= 0 || asked >= rows) return rows;
  const int64_t chunks = (rows + asked - 1) / asked;
  return (rows + chunks - 1) / chunks;
}

static void mlp_close(mlp *m) {
  halo__matrix_free(&m->x);
  halo__matrix_free(&m->gate);
  halo__matrix_free(&m->up);
  halo__matrix_free(&m->down);
  halo_tensor_free(m->gu);
  halo_tensor_free(m->h);
}

static halo_status mlp_open(mlp *m, const halo__call *c) {
  const halo_tensor *x = c->in[X];
  *m = (mlp){.k = halo__kernels(halo__device(x)), .device = halo__device(x), .t = x->dtype,
             .inner = c->in[GATE]->shape[0]};
  HALO_TRY(halo__matrix_of(&m->x, c->in[X]));
  HALO_TRY(halo__matrix_of(&m->gate, c->in[GATE]));
  HALO_TRY(halo__matrix_of(&m->up, c->in[UP]));
  HALO_TRY(halo__matrix_of(&m->down, c->in[DOWN]));
  m->rows = m->x.rows;
  m->cols = m->x.cols;
  m->chunk = chunk_rows(m->rows, (int64_t)c->param[0]);
  return HALO_OK;
}

static halo_status new_matrix(halo_tensor **out, const mlp *m, int64_t rows, int64_t cols) {
  const int64_t shape[2] = {rows, cols};
  return halo_tensor_new(out, (int32_t)m->t, (int32_t)m->device, 2, shape);
}

/* Do b's rows follow a's without a gap? */
static bool are_neighbours(const void *a, const void *b, int64_t rows, int64_t ld, int64_t bytes) {
  return (const char *)b == (const char *)a + rows * ld * bytes;
}

static bool weights_are_one(const mlp *m) {
  return m->gate.ld == m->up.ld && are_neighbours(m->gate.data, m->up.data, m->inner, m->gate.ld,
                                                  halo_dtype_bytes(m->t));
}

/* gu [n, 2 inner] = x[first..] (Wg, Wu)^T, h [n, inner] = swiglu. */
static halo_status inner_forward(const mlp *m, int64_t first, int64_t n, void *gu, void *h) {
  const int64_t wide = 2 * m->inner, bytes = halo_dtype_bytes(m->t);
  char *u = (char *)gu + m->inner * bytes;
  const bool is_one = weights_are_one(m);
  halo_gemm product = {.c = halo__operand(gu, m->t, wide, false),
                       .a = halo__operand(row_of(&m->x, first), m->t, m->x.ld, false),
                       .b = halo__operand(m->gate.data, m->t, m->gate.ld, true),
                       .m = n, .n = is_one ? wide : m->inner, .k = m->cols, .batch = 1, .alpha = 1};
  HALO_TRY(halo__gemm(m->device, &product));
  if (!is_one) {
    product.c.data = u;
    product.b = halo__operand(m->up.data, m->t, m->up.ld, true);
    HALO_TRY(halo__gemm(m->device, &product));
  }
  halo_trace_work((double)(3 * n * m->inner * bytes), 0);
  return m->k->swiglu_fwd(m->t, h, gu, wide, u, wide, n, m->inner);
}

halo_status halo__gated_mlp_fwd(halo__call *c) {
  HALO_TRY(check_inputs(c));
  halo_tensor *residual = NULL;
  const bool is_saved = c->wants_grad && c->param[1] != 0;
  if (c->wants_grad && c->param[2] != 0 && !is_saved) {
    c->drop_in[RESIDUAL] = true;
    return halo__meta_like(&c->out[0], c->in[X]);
  }
  mlp m = {0};
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(mlp_open(&m, c));
  HALO_TRY_GOTO(halo__new_like(&c->out[0], c->in[X]));
  if (c->in[RESIDUAL] != NULL) HALO_TRY_GOTO(halo__contiguous(&residual, c->in[RESIDUAL]));
  const int64_t held = is_saved ? m.rows : m.chunk;
  HALO_TRY_GOTO(new_matrix(&m.gu, &m, held, 2 * m.inner));
  HALO_TRY_GOTO(new_matrix(&m.h, &m, held, m.inner));
  for (int64_t first = 0; first < m.rows; first += m.chunk) {
    const int64_t n = m.rows - first < m.chunk ? m.rows - first : m.chunk, kept = is_saved ? first : 0;
    void *h = at(m.h, kept * m.inner), *y = at(c->out[0], first * m.cols);
    HALO_TRY_GOTO(inner_forward(&m, first, n, at(m.gu, kept * 2 * m.inner), h));
    halo_gemm product = {.c = halo__operand(y, m.t, m.cols, false),
                         .a = halo__operand(h, m.t, m.inner, false),
                         .b = halo__operand(m.down.data, m.t, m.down.ld, true),
                         .m = n, .n = m.cols, .k = m.inner, .batch = 1, .alpha = 1};
    if (residual != NULL) {
      product.addend = halo__operand(at(residual, first * m.cols), m.t, m.cols, false);
      product.beta = 1;
    }
    HALO_TRY_GOTO(halo__gemm(m.device, &product));
  }
  c->drop_in[RESIDUAL] = true;
  if (is_saved) {
    c->saved[SAVED_GU] = m.gu;
    c->saved[SAVED_H] = m.h;
    m.gu = m.h = NULL;
  }
done:
  mlp_close(&m);
  halo_tensor_free(residual);
  return status;
}

/* Where gradients go, and buffers of a chunk. */
typedef struct gradients {
  halo_tensor *dy, *dx, *dgate, *dup, *ddown; /* dy is ours, the others borrowed; NULL: not wanted */
  double beta_gate, beta_up, beta_down;       /* of the first chunk; 1 afterwards */
  halo_tensor *dgu, *dh;
} gradients;

/* dw = beta dw + d^T a, d [n, rows_of_dw] with stride ld. */
static halo_status add_dw(const mlp *m, void *dw, halo_dtype tw, int64_t rows, int64_t cols, void *d,
                          int64_t ld, void *a, int64_t lda, int64_t n, double beta) {
  const halo_gemm product = {.c = halo__operand(dw, tw, cols, false),
                             .a = halo__operand(d, m->t, ld, true),
                             .b = halo__operand(a, m->t, lda, false),
                             .m = rows, .n = cols, .k = n, .batch = 1, .alpha = 1, .beta = beta};
  return halo__gemm(m->device, &product);
}

/* dx [n, cols] = dg Wg + du Wu. */
static halo_status chunk_dx(const mlp *m, void *dx, void *dgu, int64_t n) {
  const int64_t wide = 2 * m->inner;
  const bool is_one = weights_are_one(m);
  halo_gemm product = {.c = halo__operand(dx, m->t, m->cols, false),
                       .a = halo__operand(dgu, m->t, wide, false),
                       .b = halo__operand(m->gate.data, m->t, m->gate.ld, false),
                       .m = n, .n = m->cols, .k = is_one ? wide : m->inner, .batch = 1, .alpha = 1};
  HALO_TRY(halo__gemm(m->device, &product));
  if (is_one) return HALO_OK;
  product.a.data = (char *)dgu + m->inner * halo_dtype_bytes(m->t);
  product.b = halo__operand(m->up.data, m->t, m->up.ld, false);
  product.beta = 1;
  return halo__gemm(m->device, &product);
}

static halo_status chunk_backward(const mlp *m, const gradients *g, int64_t first, int64_t n, void *gu,
                                  void *h) {
  const int64_t wide = 2 * m->inner, bytes = halo_dtype_bytes(m->t);
  void *x = row_of(&m->x, first), *dy = at(g->dy, first * m->cols), *dgu = halo__data(g->dgu);
  char *du = (char *)dgu + m->inner * bytes, *u = (char *)gu + m->inner * bytes;
  if (g->ddown != NULL) {
    HALO_TRY(add_dw(m, halo__data(g->ddown), g->ddown->dtype, m->cols, m->inner, dy, m->cols, h, m->inner, n,
                    first == 0 ? g->beta_down : 1));
  }
  const halo_gemm product = {.c = halo__operand(halo__data(g->dh), m->t, m->inner, false),
                             .a = halo__operand(dy, m->t, m->cols, false),
                             .b = halo__operand(m->down.data, m->t, m->down.ld, false),
                             .m = n, .n = m->inner, .k = m->cols, .batch = 1, .alpha = 1};
  HALO_TRY(halo__gemm(m->device, &product));
  halo_trace_work((double)(5 * n * m->inner * bytes), 0);
  HALO_TRY(m->k->swiglu_bwd(m->t, dgu, wide, du, wide, halo__data(g->dh), gu, wide, u, wide, n, m->inner));
  const double beta_gate = first == 0 ? g->beta_gate : 1, beta_up = first == 0 ? g->beta_up : 1;
  const bool is_one = g->dgate != NULL && g->dup != NULL && g->dgate->dtype == g->dup->dtype &&
                      beta_gate == beta_up &&
                      are_neighbours(halo__data(g->dgate), halo__data(g->dup), m->inner, m->cols,
                                     halo_dtype_bytes(g->dgate->dtype));
  if (g->dgate != NULL) {
    HALO_TRY(add_dw(m, halo__data(g->dgate), g->dgate->dtype, is_one ? wide : m->inner, m->cols, dgu, wide, x,
                    m->x.ld, n, beta_gate));
  }
  if (g->dup != NULL && !is_one) {
    HALO_TRY(add_dw(m, halo__data(g->dup), g->dup->dtype, m->inner, m->cols, du, wide, x, m->x.ld, n, beta_up));
  }
  return g->dx == NULL ? HALO_OK : chunk_dx(m, at(g->dx, first * m->cols), dgu, n);
}

halo_status halo__gated_mlp_bwd(halo__call *c) {
  mlp m = {0};
  gradients g = {0};
  halo_status status = HALO_OK;
  const halo_dtype wide = halo__acc_dtype(c->in[X]->dtype);
  HALO_TRY_GOTO(mlp_open(&m, c));
  HALO_TRY_GOTO(halo__contiguous(&g.dy, c->grad_out[0]));
  if (c->in[RESIDUAL] != NULL && c->need_grad[RESIDUAL]) {
    HALO_TRY_GOTO(halo_tensor_retain(&c->grad_in[RESIDUAL], c->grad_out[0]));
  }
  if (c->need_grad[X]) {
    HALO_TRY_GOTO(halo__new_like(&c->grad_in[X], c->in[X]));
    g.dx = c->grad_in[X];
  }
  if (c->need_grad[GATE]) HALO_TRY_GOTO(halo__grad_target(c, GATE, wide, &g.dgate, &g.beta_gate));
  if (c->need_grad[UP]) HALO_TRY_GOTO(halo__grad_target(c, UP, wide, &g.dup, &g.beta_up));
  if (c->need_grad[DOWN]) HALO_TRY_GOTO(halo__grad_target(c, DOWN, wide, &g.ddown, &g.beta_down));
  const bool is_saved = c->saved[SAVED_GU] != NULL;
  if (!is_saved) {
    HALO_TRY_GOTO(new_matrix(&m.gu, &m, m.chunk, 2 * m.inner));
    HALO_TRY_GOTO(new_matrix(&m.h, &m, m.chunk, m.inner));
  }
  HALO_TRY_GOTO(new_matrix(&g.dgu, &m, m.chunk, 2 * m.inner));
  HALO_TRY_GOTO(new_matrix(&g.dh, &m, m.chunk, m.inner));
  for (int64_t first = 0; first == 0 || first < m.rows; first += m.chunk) {
    const int64_t n = m.rows - first < m.chunk ? m.rows - first : m.chunk;
    void *gu = is_saved ? at(c->saved[SAVED_GU], first * 2 * m.inner) : halo__data(m.gu);
    void *h = is_saved ? at(c->saved[SAVED_H], first * m.inner) : halo__data(m.h);
    if (!is_saved) HALO_TRY_GOTO(inner_forward(&m, first, n, gu, h));
    HALO_TRY_GOTO(chunk_backward(&m, &g, first, n, gu, h));
    if (m.chunk == 0) break; // no rows: one pass of empty products gives the zero gradients
  }
  for (int32_t i = GATE; i <= DOWN; i++) HALO_TRY_GOTO(halo__narrow_grad(c, i));
done:
  mlp_close(&m);
  halo_tensor_free(g.dy);
  halo_tensor_free(g.dgu);
  halo_tensor_free(g.dh);
  return status;
}
