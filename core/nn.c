/* nn.c: shape rules and gradients of the layers of a transformer: embedding, linear, RMSNorm,
 * rotary embedding, SwiGLU. The losses are in nn_loss.c, the arithmetic is in kernels/.
 *
 * Every op sees its tensor as a matrix of rows: leading dims are collapsed when one stride
 * describes them, so a slice of a packed projection goes to the kernels without a copy. The
 * feed-forward layer as one op is in nn_mlp.c.
 *
 * Weight gradients are added where the leaf already keeps its gradient (accumulate_into), in the
 * fp32 of the optimizer's flat buffer even for bf16 weights: the product runs with beta = 1, and no
 * intermediate tensor of a weight's size is made.
 */
#include "nn.h"
#include "op.h"

#include <math.h>
#include <string.h>

/* ---- shared helpers ------------------------------------------------------------------------ */

/* The stride that takes one from row to row, or -1 when no single stride does. */
static int64_t row_stride(const halo_tensor *t, int64_t rows, int64_t cols) {
  const int32_t last = t->ndim - 1;
  if (cols > 1 && t->stride[last] != 1) return -1;
  if (rows <= 1) return cols;
  int64_t ld = -1, expected = 0;
  for (int32_t d = last - 1; d >= 0; d--) {
    if (t->shape[d] == 1) continue;
    if (ld < 0) {
      ld = t->stride[d];
    } else if (t->stride[d] != expected) {
      return -1;
    }
    expected = t->stride[d] * t->shape[d];
  }
  return ld >= cols ? ld : -1;
}

halo_status halo__matrix_of(halo__matrix *out, halo_tensor *t) {
  const int64_t cols = t->ndim > 0 ? t->shape[t->ndim - 1] : 1;
  int64_t rows = 1;
  for (int32_t d = 0; d + 1 < t->ndim; d++) rows *= t->shape[d];
  *out = (halo__matrix){.rows = rows, .cols = cols};
  int64_t ld = t->ndim > 0 ? row_stride(t, rows, cols) : 1;
  if (ld >= 0) {
    HALO_TRY(halo_tensor_retain(&out->tensor, t));
  } else {
    HALO_TRY(halo__contiguous(&out->tensor, t));
    ld = cols;
  }
  out->data = halo__data(out->tensor);
  out->ld = ld > 0 ? ld : 1;
  return HALO_OK;
}

void halo__matrix_free(halo__matrix *m) {
  halo_tensor_free(m->tensor);
  m->tensor = NULL;
}

halo_status halo__grad_target(halo__call *c, int32_t i, halo_dtype dtype, halo_tensor **out,
                              double *beta_out) {
  halo_tensor *into = c->accumulate_into[i];
  const halo_dtype own = c->in[i]->dtype;
  if (into != NULL && (into->dtype == own || into->dtype == halo__acc_dtype(own))) {
    c->accumulated[i] = true;
    *out = into;
    if (beta_out != NULL) *beta_out = 1;
    return HALO_OK;
  }
  const halo_tensor *in = c->in[i];
  halo_tensor *grad = NULL;
  if (beta_out != NULL) {
    HALO_TRY(halo_tensor_new(&grad, dtype, halo__device(in), in->ndim, in->shape));
    *beta_out = 0;
  } else {
    HALO_TRY(halo_tensor_zeros(&grad, dtype, halo__device(in), in->ndim, in->shape));
  }
  c->grad_in[i] = grad;
  *out = grad;
  return HALO_OK;
}

halo_status halo__narrow_grad(halo__call *c, int32_t i) {
  halo_tensor *wide = c->grad_in[i], *narrow = NULL;
  if (wide == NULL || wide->dtype == c->in[i]->dtype) return HALO_OK;
  HALO_TRY(halo__new_like(&narrow, c->in[i]));
  halo_status status = halo_tensor_copy(narrow, wide);
  halo_tensor_free(wide);
  c->grad_in[i] = narrow;
  return status;
}

halo_status halo__gemm(halo_device device, const halo_gemm *g) {
  const double count = (double)g->batch;
  halo_trace_work(
      count * ((double)g->m * (double)g->k * (double)halo_dtype_bytes(g->a.dtype) +
               (double)g->k * (double)g->n * (double)halo_dtype_bytes(g->b.dtype) +
               (double)g->m * (double)g->n * (double)halo_dtype_bytes(g->c.dtype)),
      2.0 * count * (double)g->m * (double)g->n * (double)g->k);
  static _Thread_local int32_t name = -1;
  if (name < 0) name = halo_trace_id("product");
  const int32_t span = halo__trace_device_is_on() ? halo_trace_begin(name) : 0;
  halo_status status = halo__kernels(device)->gemm(g);
  halo_trace_end(span);
  return status;
}

static bool is_index(const halo_tensor *t) { return t->dtype == HALO_I32 || t->dtype == HALO_I64; }

/* ---- embedding ----------------------------------------------------------------------------- */

halo_status halo__embedding_fwd(halo__call *c) {
  halo_tensor *w = c->in[0], *ids = c->in[1];
  HALO_CHECK(halo__is_float(w->dtype) && w->ndim == 2, HALO_EARG,
             "embedding: weight must be a floating [V,E], got %s", halo__describe(w));
  HALO_CHECK(is_index(ids) && ids->ndim < HALO_MAX_DIMS, HALO_EARG,
             "embedding: ids must be i32 or i64, got %s", halo__describe(ids));
  int64_t shape[HALO_MAX_DIMS];
  memcpy(shape, ids->shape, sizeof shape);
  shape[ids->ndim] = w->shape[1];
  halo_tensor *weight = NULL, *index = NULL;
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo_tensor_new(&c->out[0], w->dtype, halo__device(w), ids->ndim + 1, shape));
  HALO_TRY_GOTO(halo__contiguous(&weight, w));
  HALO_TRY_GOTO(halo__contiguous(&index, ids));
  halo__count_passes(c->out[0], 2);
  HALO_TRY_GOTO(halo__kernels(halo__device(w))
                    ->embedding_fwd(w->dtype, halo__data(c->out[0]), halo__data(weight), ids->dtype,
                                    halo__data(index), halo_tensor_count(ids), w->shape[0],
                                    w->shape[1]));
  c->drop_in[0] = true;
done:
  halo_tensor_free(weight);
  halo_tensor_free(index);
  return status;
}

halo_status halo__embedding_bwd(halo__call *c) {
  halo_tensor *w = c->in[0], *ids = c->in[1], *into = NULL, *dy = NULL, *index = NULL;
  halo_status status = HALO_OK;
  if (!c->need_grad[0]) return HALO_OK;
  HALO_TRY_GOTO(halo__contiguous(&dy, c->grad_out[0]));
  HALO_TRY_GOTO(halo__contiguous(&index, ids));
  HALO_TRY_GOTO(halo__grad_target(c, 0, halo__acc_dtype(w->dtype), &into, NULL));
  // Gradients are read once, and at most as many rows of the sum as there are ids read and written.
  const int64_t tokens = halo_tensor_count(ids), rows = tokens < w->shape[0] ? tokens : w->shape[0];
  halo_trace_work((double)halo_tensor_count(dy) * (double)halo_dtype_bytes(dy->dtype) +
                      2.0 * (double)(rows * w->shape[1]) * (double)halo_dtype_bytes(into->dtype), 0);
  HALO_TRY_GOTO(halo__kernels(halo__device(w))
                    ->embedding_bwd(into->dtype, halo__data(into), dy->dtype, halo__data(dy),
                                    ids->dtype, halo__data(index), halo_tensor_count(ids),
                                    w->shape[0], w->shape[1]));
  status = halo__narrow_grad(c, 0);
done:
  halo_tensor_free(dy);
  halo_tensor_free(index);
  return status;
}

/* ---- linear -------------------------------------------------------------------------------- */

static halo_status check_linear(const halo_tensor *x, const halo_tensor *w, const halo_tensor *b,
                                const halo_tensor *add) {
  HALO_CHECK(halo__is_float(x->dtype) && x->ndim >= 1, HALO_EARG,
             "linear: x must be a floating [...,I], got %s", halo__describe(x));
  HALO_CHECK(w->dtype == x->dtype && w->ndim == 2 && w->shape[1] == x->shape[x->ndim - 1],
             HALO_EARG, "linear: weight must be %s [O,%lld] for x %s, got %s",
             halo_dtype_name(x->dtype), (long long)x->shape[x->ndim - 1], halo__describe(x),
             halo__describe(w));
  HALO_CHECK(b == NULL || (b->dtype == x->dtype && b->ndim == 1 && b->shape[0] == w->shape[0]),
             HALO_EARG, "linear: bias must be %s [%lld], got %s", halo_dtype_name(x->dtype),
             (long long)w->shape[0], halo__describe(b));
  bool fits = add == NULL || (add->dtype == x->dtype && add->ndim == x->ndim);
  for (int32_t d = 0; fits && add != NULL && d < x->ndim; d++) {
    fits = add->shape[d] == (d + 1 < x->ndim ? x->shape[d] : w->shape[0]);
  }
  HALO_CHECK(fits, HALO_EARG, "linear: add must be like the result of %s and %s, got %s",
             halo__describe(x), halo__describe(w), halo__describe(add));
  return HALO_OK;
}

halo_status halo__linear_fwd(halo__call *c) {
  halo_tensor *x = c->in[0], *w = c->in[1], *bias = c->in[2], *b = NULL;
  HALO_TRY(check_linear(x, w, bias, c->in[3]));
  const halo_device device = halo__device(x);
  const int64_t outputs = w->shape[0];
  int64_t shape[HALO_MAX_DIMS];
  memcpy(shape, x->shape, sizeof shape);
  shape[x->ndim - 1] = outputs;
  halo__matrix mx = {0}, mw = {0}, add = {0};
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo_tensor_new(&c->out[0], x->dtype, device, x->ndim, shape));
  HALO_TRY_GOTO(halo__matrix_of(&mx, x));
  HALO_TRY_GOTO(halo__matrix_of(&mw, w));
  halo_gemm product = {.c = halo__operand(halo__data(c->out[0]), x->dtype, outputs, false),
                       .a = halo__operand(mx.data, x->dtype, mx.ld, false),
                       .b = halo__operand(mw.data, x->dtype, mw.ld, true),
                       .m = mx.rows, .n = outputs, .k = mx.cols, .batch = 1, .alpha = 1};
  if (bias != NULL) {
    HALO_TRY_GOTO(halo__contiguous(&b, bias));
    product.bias = halo__data(b);
  }
  if (c->in[3] != NULL) {
    HALO_TRY_GOTO(halo__matrix_of(&add, c->in[3]));
    product.addend = halo__operand(add.data, x->dtype, add.ld, false);
    product.beta = 1;
  }
  HALO_TRY_GOTO(halo__gemm(device, &product));
  c->drop_in[0] = !c->need_grad[1];
  c->drop_in[1] = !c->need_grad[0];
  c->drop_in[2] = c->drop_in[3] = true;
done:
  halo__matrix_free(&mx);
  halo__matrix_free(&mw);
  halo__matrix_free(&add);
  halo_tensor_free(b);
  return status;
}

/* dx = dy w */
static halo_status linear_dx(halo__call *c, const halo__matrix *dy) {
  halo_tensor *w = c->in[1], *dx = NULL;
  const halo_dtype t = w->dtype;
  HALO_TRY(halo_tensor_new(&dx, t, halo__device(w), c->in[0]->ndim, c->in[0]->shape));
  c->grad_in[0] = dx;
  halo__matrix mw = {0};
  HALO_TRY(halo__matrix_of(&mw, w));
  const halo_gemm product = {.c = halo__operand(halo__data(dx), t, mw.cols, false),
                             .a = halo__operand(dy->data, t, dy->ld, false),
                             .b = halo__operand(mw.data, t, mw.ld, false),
                             .m = dy->rows, .n = mw.cols, .k = dy->cols, .batch = 1, .alpha = 1};
  halo_status status = halo__gemm(halo__device(w), &product);
  halo__matrix_free(&mw);
  return status;
}

/* dw += dy^T x and, beside it, db += the sum of the rows of dy; either may be unwanted. */
static halo_status linear_dw(halo__call *c, const halo__matrix *dy) {
  halo_tensor *x = c->in[0], *dw = NULL, *db = NULL;
  const halo_dtype t = dy->tensor->dtype;
  const bool wants_dw = c->need_grad[1], wants_db = c->in[2] != NULL && c->need_grad[2];
  double beta = 0, beta_db = 0;
  halo__matrix mx = {0};
  if (wants_db) HALO_TRY(halo__grad_target(c, 2, c->in[2]->dtype, &db, &beta_db));
  if (!wants_dw) {
    if (!wants_db) return HALO_OK;
    halo_trace_work((double)(dy->rows * dy->cols * halo_dtype_bytes(t)), 0);
    return halo__kernels(halo__device(db))
        ->sum_rows(db->dtype, halo__data(db), t, dy->data, dy->ld, dy->rows, dy->cols, beta_db);
  }
  HALO_TRY(halo__grad_target(c, 1, t, &dw, &beta));
  HALO_TRY(halo__matrix_of(&mx, x));
  halo_gemm product = {.c = halo__operand(halo__data(dw), dw->dtype, mx.cols, false),
                       .a = halo__operand(dy->data, t, dy->ld, true),
                       .b = halo__operand(mx.data, t, mx.ld, false),
                       .m = dy->cols, .n = mx.cols, .k = dy->rows, .batch = 1, .alpha = 1,
                       .beta = beta};
  if (wants_db) {
    product.bias_grad = halo__data(db);
    product.bias_grad_dtype = db->dtype;
    product.bias_grad_beta = beta_db;
  }
  halo_status status = halo__gemm(halo__device(x), &product);
  halo__matrix_free(&mx);
  return status;
}

halo_status halo__linear_bwd(halo__call *c) {
  halo__matrix dy = {0};
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__matrix_of(&dy, c->grad_out[0]));
  HALO_TRY_GOTO(linear_dw(c, &dy));
  if (c->need_grad[0]) HALO_TRY_GOTO(linear_dx(c, &dy));
  if (c->in[3] != NULL && c->need_grad[3]) {
    HALO_TRY_GOTO(halo_tensor_retain(&c->grad_in[3], c->grad_out[0]));
  }
done:
  halo__matrix_free(&dy);
  return status;
}

/* ---- packed projections -------------------------------------------------------------------- */

/* Heads [first, first + n) of packed [..., all, D], given as [..., all * D]. */
static halo_status heads_view(halo_tensor **out, halo_tensor *x, int64_t first, int64_t n, int64_t size) {
  int64_t shape[HALO_MAX_DIMS], stride[HALO_MAX_DIMS];
  const int32_t last = x->ndim - 1;
  memcpy(shape, x->shape, sizeof shape);
  memcpy(stride, x->stride, sizeof stride);
  shape[last] = n;
  stride[last + 1] = x->stride[last];
  stride[last] = size * x->stride[last];
  shape[last + 1] = size;
  return halo__view(out, x, x->ndim + 1, shape, stride, first * stride[last]);
}

static halo_status check_split(const halo__call *c, int64_t *first, int64_t *n, int64_t *size_out) {
  const halo_tensor *x = c->in[0];
  const double heads = c->param[0], kv_heads = c->param[1], all = heads + 2 * kv_heads;
  HALO_CHECK(heads >= 1 && kv_heads >= 1 && all < 1e6 && heads == (double)(int64_t)heads &&
                 kv_heads == (double)(int64_t)kv_heads,
             HALO_EARG, "split_qkv: heads %g and kv_heads %g must be whole numbers from 1 on", heads,
             kv_heads);
  HALO_CHECK(halo__is_float(x->dtype) && x->ndim >= 1 && x->ndim < HALO_MAX_DIMS &&
                 x->shape[x->ndim - 1] % (int64_t)all == 0,
             HALO_EARG, "split_qkv: x must be a floating [...,%lld D], got %s", (long long)all,
             halo__describe(x));
  n[0] = (int64_t)heads;
  n[1] = n[2] = (int64_t)kv_heads;
  first[0] = 0;
  first[1] = n[0];
  first[2] = n[0] + n[1];
  *size_out = x->shape[x->ndim - 1] / (int64_t)all;
  return HALO_OK;
}

halo_status halo__split_qkv_fwd(halo__call *c) {
  int64_t first[3], n[3], size = 0;
  HALO_TRY(check_split(c, first, n, &size));
  c->drop_in[0] = true;
  for (int32_t i = 0; i < 3; i++) HALO_TRY(heads_view(&c->out[i], c->in[0], first[i], n[i], size));
  return HALO_OK;
}

halo_status halo__split_qkv_bwd(halo__call *c) {
  int64_t first[3], n[3], size = 0;
  HALO_TRY(check_split(c, first, n, &size));
  HALO_TRY(halo__new_like(&c->grad_in[0], c->in[0]));
  for (int32_t i = 0; i < 3; i++) {
    halo_tensor *part = NULL;
    HALO_TRY(heads_view(&part, c->grad_in[0], first[i], n[i], size));
    halo_status status = c->grad_out[i] != NULL ? halo_tensor_copy(part, c->grad_out[i])
                                                : halo_tensor_fill(part, 0);
    halo_tensor_free(part);
    HALO_TRY(status);
  }
  halo_trace_work(2.0 * (double)halo_tensor_count(c->grad_in[0]) * (double)halo_dtype_bytes(c->in[0]->dtype), 0);
  return HALO_OK;
}

/* ---- RMSNorm ------------------------------------------------------------------------------- */

halo_status halo__rmsnorm_fwd(halo__call *c) {
  halo_tensor *x = c->in[0], *w = c->in[1], *weight = NULL;
  const double eps = c->param[0];
  HALO_CHECK(halo__is_float(x->dtype) && x->ndim >= 1, HALO_EARG,
             "rmsnorm: x must be a floating [...,E], got %s", halo__describe(x));
  HALO_CHECK(w->dtype == x->dtype && w->ndim == 1 && w->shape[0] == x->shape[x->ndim - 1],
             HALO_EARG, "rmsnorm: weight must be %s [%lld], got %s", halo_dtype_name(x->dtype),
             (long long)x->shape[x->ndim - 1], halo__describe(w));
  HALO_CHECK(eps >= 0 && isfinite(eps), HALO_EARG, "rmsnorm: eps is %g, wanted a number >= 0", eps);
  halo__matrix m = {0};
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__new_like(&c->out[0], x));
  HALO_TRY_GOTO(halo__matrix_of(&m, x));
  HALO_TRY_GOTO(halo__contiguous(&weight, w));
  if (c->wants_grad) {
    HALO_TRY_GOTO(halo_tensor_new(&c->saved[0], halo__acc_dtype(x->dtype), halo__device(x), 1,
                                  &m.rows));
  }
  halo__count_passes(x, 2);
  HALO_TRY_GOTO(halo__kernels(halo__device(x))
                    ->rmsnorm_fwd(x->dtype, halo__data(c->out[0]),
                                  c->saved[0] != NULL ? halo__data(c->saved[0]) : NULL, m.data,
                                  m.ld, halo__data(weight), m.rows, m.cols, eps));
done:
  halo__matrix_free(&m);
  halo_tensor_free(weight);
  return status;
}

halo_status halo__rmsnorm_bwd(halo__call *c) {
  halo_tensor *x = c->in[0], *w = c->in[1], *weight = NULL, *dy = NULL, *dw = NULL;
  halo__matrix m = {0};
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__matrix_of(&m, x));
  HALO_TRY_GOTO(halo__contiguous(&weight, w));
  HALO_TRY_GOTO(halo__contiguous(&dy, c->grad_out[0]));
  if (c->need_grad[0]) HALO_TRY_GOTO(halo__new_like(&c->grad_in[0], x));
  if (c->need_grad[1]) HALO_TRY_GOTO(halo__grad_target(c, 1, w->dtype, &dw, NULL));
  halo__count_passes(x, 3);
  HALO_TRY_GOTO(halo__kernels(halo__device(x))
                    ->rmsnorm_bwd(x->dtype, c->need_grad[0] ? halo__data(c->grad_in[0]) : NULL,
                                  dw != NULL ? dw->dtype : w->dtype,
                                  dw != NULL ? halo__data(dw) : NULL, halo__data(dy), m.data, m.ld,
                                  halo__data(weight), halo__data(c->saved[0]), m.rows, m.cols));
done:
  halo__matrix_free(&m);
  halo_tensor_free(weight);
  halo_tensor_free(dy);
  return status;
}

/* ---- rotary embedding ---------------------------------------------------------------------- */

halo_status halo__rope_table_fwd(halo__call *c) {
  halo_tensor *positions = c->in[0], *inv_freq = c->in[1], *p = NULL, *f = NULL;
  const double scale = c->param[0];
  const bool is_exact = c->param[1] != 0;
  const int32_t t = (int32_t)c->param[2];
  HALO_CHECK(is_index(positions) && positions->ndim < HALO_MAX_DIMS, HALO_EARG,
             "rope_table: positions must be i32 or i64, got %s", halo__describe(positions));
  HALO_CHECK((inv_freq->dtype == HALO_F32 || inv_freq->dtype == HALO_F64) && inv_freq->ndim == 1,
             HALO_EARG, "rope_table: inv_freq must be f32 or f64 [D/2], got %s",
             halo__describe(inv_freq));
  HALO_CHECK(t == HALO_F32 || t == HALO_F64 || t == HALO_BF16, HALO_EARG,
             "rope_table: dtype %d is not a floating dtype", t);
  const halo_device device = halo__device(positions);
  const int64_t half = inv_freq->shape[0];
  int64_t shape[HALO_MAX_DIMS];
  memcpy(shape, positions->shape, sizeof shape);
  shape[positions->ndim] = half;
  halo_status status = HALO_OK;
  for (int32_t i = 0; i < 2; i++) {
    HALO_TRY_GOTO(halo_tensor_new(&c->out[i], t, device, positions->ndim + 1, shape));
  }
  HALO_TRY_GOTO(halo__contiguous(&p, positions));
  HALO_TRY_GOTO(halo__contiguous(&f, inv_freq));
  HALO_TRY_GOTO(halo__kernels(device)->rope_table(
      (halo_dtype)t, halo__data(c->out[0]), halo__data(c->out[1]), p->dtype, halo__data(p),
      f->dtype, halo__data(f), halo_tensor_count(positions), half, scale, is_exact));
done:
  halo_tensor_free(p);
  halo_tensor_free(f);
  return status;
}

/* cos or sin as the kernel wants it: contiguous, in the arithmetic dtype of x. */
static halo_status rope_operand(halo_tensor **out, halo_tensor *table, halo_dtype dtype) {
  if (table->dtype == dtype) return halo__contiguous(out, table);
  halo_tensor *t = NULL;
  HALO_TRY(halo_tensor_new(&t, dtype, halo__device(table), table->ndim, table->shape));
  halo_status status = halo_tensor_copy(t, table);
  if (status != HALO_OK) {
    halo_tensor_free(t);
    return status;
  }
  *out = t;
  return HALO_OK;
}

static halo_status check_rope(const halo_tensor *x, const halo_tensor *cos_table,
                              const halo_tensor *sin_table) {
  HALO_CHECK(halo__is_float(x->dtype) && x->ndim == 4, HALO_EARG,
             "rope: x must be a floating [B,T,H,D], got %s", halo__describe(x));
  const int32_t n = cos_table->ndim;
  const bool batch_fits = n == 2 || (n == 3 && (cos_table->shape[0] == 1 ||
                                                cos_table->shape[0] == x->shape[0]));
  HALO_CHECK(halo__is_float(cos_table->dtype) && batch_fits &&
                 cos_table->shape[n - 2] == x->shape[1] &&
                 2 * cos_table->shape[n - 1] <= x->shape[3],
             HALO_EARG, "rope: cos must be [T,R], [1,T,R] or [B,T,R] with 2R <= D for x %s, got %s",
             halo__describe(x), halo__describe(cos_table));
  HALO_CHECK(sin_table->dtype == cos_table->dtype && halo__same_shape(cos_table, sin_table),
             HALO_EARG, "rope: cos is %s, sin is %s", halo__describe(cos_table),
             halo__describe(sin_table));
  return HALO_OK;
}

/* y = rotation of x (sign 1) or rotation back (sign -1) by the tables in c->in[1..2]. */
static halo_status rotate(halo__call *c, halo_tensor *y, halo_tensor *x, double sign) {
  const halo_dtype wide = halo__acc_dtype(x->dtype);
  halo_tensor *cos_table = NULL, *sin_table = NULL, *packed = NULL;
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(rope_operand(&cos_table, c->in[1], wide));
  HALO_TRY_GOTO(rope_operand(&sin_table, c->in[2], wide));
  if (x->shape[3] > 1 && x->stride[3] != 1) {
    HALO_TRY_GOTO(halo__contiguous(&packed, x));
    x = packed;
  }
  const int32_t n = cos_table->ndim;
  const int64_t half = cos_table->shape[n - 1];
  const bool is_shared = n == 2 || cos_table->shape[0] == 1;
  halo__count_passes(x, 2);
  HALO_TRY_GOTO(halo__kernels(halo__device(x))
                    ->rope(x->dtype, halo__data(y), halo__data(x), x->stride, halo__data(cos_table),
                           halo__data(sin_table), is_shared ? 0 : x->shape[1] * half, x->shape[0],
                           x->shape[1], x->shape[2], x->shape[3], half, sign));
done:
  halo_tensor_free(cos_table);
  halo_tensor_free(sin_table);
  halo_tensor_free(packed);
  return status;
}

halo_status halo__rope_fwd(halo__call *c) {
  halo_tensor *x = c->in[0];
  HALO_TRY(check_rope(x, c->in[1], c->in[2]));
  HALO_CHECK(!c->need_grad[1] && !c->need_grad[2], HALO_EUNSUPPORTED,
             "rope: cos and sin have no gradient; detach them");
  HALO_TRY(halo__new_like(&c->out[0], x));
  c->drop_in[0] = true;
  return rotate(c, c->out[0], x, 1);
}

halo_status halo__rope_bwd(halo__call *c) {
  if (!c->need_grad[0]) return HALO_OK;
  HALO_TRY(halo__new_like(&c->grad_in[0], c->grad_out[0]));
  return rotate(c, c->grad_in[0], c->grad_out[0], -1);
}

/* ---- SwiGLU -------------------------------------------------------------------------------- */

halo_status halo__swiglu_fwd(halo__call *c) {
  halo_tensor *gate = c->in[0], *up = c->in[1];
  HALO_CHECK(halo__is_float(gate->dtype) && gate->dtype == up->dtype && halo__same_shape(gate, up),
             HALO_EARG, "swiglu: gate is %s, up is %s; one floating dtype and shape wanted",
             halo__describe(gate), halo__describe(up));
  halo__matrix g = {0}, u = {0};
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__new_like(&c->out[0], gate));
  HALO_TRY_GOTO(halo__matrix_of(&g, gate));
  HALO_TRY_GOTO(halo__matrix_of(&u, up));
  halo__count_passes(gate, 3);
  HALO_TRY_GOTO(halo__kernels(halo__device(gate))
                    ->swiglu_fwd(gate->dtype, halo__data(c->out[0]), g.data, g.ld, u.data, u.ld,
                                 g.rows, g.cols));
done:
  halo__matrix_free(&g);
  halo__matrix_free(&u);
  return status;
}

halo_status halo__swiglu_bwd(halo__call *c) {
  halo_tensor *gate = c->in[0], *dy = NULL;
  halo__matrix g = {0}, u = {0};
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__contiguous(&dy, c->grad_out[0]));
  HALO_TRY_GOTO(halo__matrix_of(&g, gate));
  HALO_TRY_GOTO(halo__matrix_of(&u, c->in[1]));
  HALO_TRY_GOTO(halo__new_like(&c->grad_in[0], gate));
  HALO_TRY_GOTO(halo__new_like(&c->grad_in[1], gate));
  halo__count_passes(gate, 5);
  HALO_TRY_GOTO(halo__kernels(halo__device(gate))
                    ->swiglu_bwd(gate->dtype, halo__data(c->grad_in[0]), g.cols,
                                 halo__data(c->grad_in[1]), g.cols, halo__data(dy), g.data, g.ld,
                                 u.data, u.ld, g.rows, g.cols));
done:
  halo_tensor_free(dy);
  halo__matrix_free(&g);
  halo__matrix_free(&u);
  return status;
}

/* Start of the second half of each row of a packed matrix. */
static void *second_half(void *data, halo_dtype t, int64_t half) {
  return (char *)data + half * halo_dtype_bytes(t);
}

halo_status halo__swiglu_packed_fwd(halo__call *c) {
  halo_tensor *x = c->in[0];
  HALO_CHECK(halo__is_float(x->dtype) && x->ndim >= 1 && x->shape[x->ndim - 1] % 2 == 0, HALO_EARG,
             "swiglu_packed: x must be a floating [...,2F] (gate, then up), got %s",
             halo__describe(x));
  int64_t shape[HALO_MAX_DIMS];
  memcpy(shape, x->shape, sizeof shape);
  const int64_t half = shape[x->ndim - 1] /= 2;
  halo__matrix m = {0};
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo_tensor_new(&c->out[0], x->dtype, halo__device(x), x->ndim, shape));
  HALO_TRY_GOTO(halo__matrix_of(&m, x));
  halo__count_passes(x, 1.5);
  HALO_TRY_GOTO(halo__kernels(halo__device(x))
                    ->swiglu_fwd(x->dtype, halo__data(c->out[0]), m.data, m.ld,
                                 second_half(m.data, x->dtype, half), m.ld, m.rows, half));
done:
  halo__matrix_free(&m);
  return status;
}

halo_status halo__swiglu_packed_bwd(halo__call *c) {
  halo_tensor *x = c->in[0], *dy = NULL;
  const halo_dtype t = x->dtype;
  halo__matrix m = {0};
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__contiguous(&dy, c->grad_out[0]));
  HALO_TRY_GOTO(halo__matrix_of(&m, x));
  HALO_TRY_GOTO(halo__new_like(&c->grad_in[0], x));
  void *dx = halo__data(c->grad_in[0]);
  const int64_t half = m.cols / 2;
  halo__count_passes(x, 2.5);
  HALO_TRY_GOTO(halo__kernels(halo__device(x))
                    ->swiglu_bwd(t, dx, m.cols, second_half(dx, t, half), m.cols, halo__data(dy),
                                 m.data, m.ld, second_half(m.data, t, half), m.ld, m.rows, half));
done:
  halo_tensor_free(dy);
  halo__matrix_free(&m);
  return status;
}
