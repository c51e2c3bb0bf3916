/* op_reduce.c: sums, extremes, softmax and their kin along one dim, or over all dims.
 *
 * Every kernel sees [outer, n, inner]; here that view is made and undone. Without a dim (NaN) all
 * elements are one fibre and the result is a scalar, or keeps ndim dims of size 1 with keepdim.
 */
#include "op.h"

#include <math.h>
#include <string.h>

/* ---- shapes -------------------------------------------------------------------------------- */

halo_status halo__along_dim(halo__along *out, const char *name, const halo_tensor *t, double dim) {
  HALO_CHECK(t->ndim > 0, HALO_EARG, "%s: a scalar has no dims", name);
  int64_t d = 0;
  HALO_TRY(halo__whole(&d, name, "dim", dim, -t->ndim, t->ndim - 1));
  if (d < 0) d += t->ndim;
  halo__along a = {.dim = (int32_t)d, .outer = 1, .n = t->shape[d], .inner = 1};
  for (int32_t i = 0; i < d; i++) a.outer *= t->shape[i];
  for (int32_t i = (int32_t)d + 1; i < t->ndim; i++) a.inner *= t->shape[i];
  *out = a;
  return HALO_OK;
}

halo_status halo__along_dim_or_all(halo__along *out, const char *name, const halo_tensor *t,
                                   double dim) {
  if (!isnan(dim)) return halo__along_dim(out, name, t, dim);
  *out = (halo__along){.dim = -1, .outer = 1, .n = halo_tensor_count(t), .inner = 1};
  return HALO_OK;
}

halo_status halo__new_along(halo_tensor **out, halo_dtype dtype, const halo_tensor *t,
                            const halo__along *along, int64_t n) {
  int64_t shape[HALO_MAX_DIMS];
  int32_t ndim = 0;
  for (int32_t d = 0; d < t->ndim; d++) {
    const bool is_replaced = along->dim < 0 || d == along->dim;
    if (!is_replaced || n >= 0) shape[ndim++] = is_replaced ? n : t->shape[d];
  }
  return halo_tensor_new(out, (int32_t)dtype, halo_tensor_device(t), ndim, shape);
}

/* The input of most functions here: floating and contiguous. */
static halo_status floating(halo_tensor **out, const char *name, halo_tensor *x) {
  HALO_CHECK(halo__is_float(x->dtype), HALO_EARG, "%s: needs a floating tensor, got %s", name,
             halo__describe(x));
  return halo__contiguous(out, x);
}

/* A result for a reduction of x: [outer, inner] in x's shape without dim, or with size 1. */
static halo_status new_reduced(halo_tensor **out, halo_dtype dtype, const halo_tensor *x,
                               const halo__along *along, double keepdim) {
  halo__count_passes(x, 1);
  return halo__new_along(out, dtype, x, along, keepdim != 0 ? 1 : -1);
}

/* ---- sum, mean ----------------------------------------------------------------------------- */

static halo_status sum_fwd(halo__call *c, const char *name, bool is_mean) {
  halo_tensor *x = c->in[0], *dense = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim_or_all(&a, name, x, c->param[0]));
  HALO_CHECK(!is_mean || halo__is_float(x->dtype), HALO_EARG,
             "%s: needs a floating tensor, got %s; cast it first", name, halo__describe(x));
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__contiguous(&dense, x));
  HALO_TRY_GOTO(new_reduced(&c->out[0], halo__is_float(x->dtype) ? x->dtype : HALO_I64, x, &a,
                            c->param[1]));
  HALO_TRY_GOTO(halo__kernels_of(x)->sum(x->dtype, halo__data(c->out[0]), halo__data(dense), a.outer,
                                         a.n, a.inner, is_mean ? 1 / (double)a.n : 1.0));
  c->drop_in[0] = true;
done:
  halo_tensor_free(dense);
  return status;
}

/* Every element of a fibre gets the fibre's gradient, times scale. */
static halo_status sum_bwd(halo__call *c, const char *name, bool is_mean) {
  const halo_tensor *x = c->in[0];
  halo_tensor *dy = NULL, *scaled = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim_or_all(&a, name, x, c->param[0]));
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__contiguous(&dy, c->grad_out[0]));
  if (is_mean) {
    HALO_TRY_GOTO(halo__new_like(&scaled, dy));
    HALO_TRY_GOTO(halo_tensor_copy(scaled, dy));
    HALO_TRY_GOTO(halo_tensor_scale(scaled, 1 / (double)a.n));
  } else {
    HALO_TRY_GOTO(halo_tensor_retain(&scaled, dy));
  }
  HALO_TRY_GOTO(halo__new_like(&c->grad_in[0], x));
  const int64_t shape[3] = {a.outer, a.n, a.inner}, stride[3] = {a.inner, 0, 1};
  HALO_TRY_GOTO(halo__kernels_of(x)->pack(halo__data(c->grad_in[0]), halo__data(scaled),
                                          halo_dtype_bytes(x->dtype), 3, shape, stride));
  halo__count_passes(x, 1);
done:
  halo_tensor_free(dy);
  halo_tensor_free(scaled);
  return status;
}

halo_status halo__sum_fwd(halo__call *c) { return sum_fwd(c, "sum", false); }
halo_status halo__sum_bwd(halo__call *c) { return sum_bwd(c, "sum", false); }
halo_status halo__mean_fwd(halo__call *c) { return sum_fwd(c, "mean", true); }
halo_status halo__mean_bwd(halo__call *c) { return sum_bwd(c, "mean", true); }

/* ---- extremes ------------------------------------------------------------------------------ */

/* values_out or index_out may be NULL. */
static halo_status extreme(halo_tensor **values_out, halo_tensor **index_out, const char *name,
                           halo_tensor *x, const double *param, bool is_max) {
  halo_tensor *dense = NULL, *values = NULL, *index = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim_or_all(&a, name, x, param[0]));
  HALO_CHECK(a.n > 0, HALO_EARG, "%s: %s has no element along the dim", name, halo__describe(x));
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__contiguous(&dense, x));
  if (values_out != NULL) HALO_TRY_GOTO(new_reduced(&values, x->dtype, x, &a, param[1]));
  HALO_TRY_GOTO(new_reduced(&index, HALO_I64, x, &a, param[1]));
  HALO_TRY_GOTO(halo__kernels_of(x)->extreme(
      x->dtype, is_max, values != NULL ? halo__data(values) : NULL, halo__data(index),
      halo__data(dense), a.outer, a.n, a.inner));
  if (values_out != NULL) *values_out = values;
  *index_out = index;
  values = index = NULL;
done:
  halo_tensor_free(dense);
  halo_tensor_free(values);
  halo_tensor_free(index);
  return status;
}

static halo_status extreme_fwd(halo__call *c, const char *name, bool is_max) {
  HALO_TRY(extreme(&c->out[0], &c->out[1], name, c->in[0], c->param, is_max));
  c->drop_in[0] = true;
  return c->wants_grad ? halo_tensor_retain(&c->saved[0], c->out[1]) : HALO_OK;
}

/* The gradient goes to the element that was chosen, the first one of equals. */
static halo_status extreme_bwd(halo__call *c, const char *name) {
  const halo_tensor *x = c->in[0];
  if (c->grad_out[0] == NULL) return HALO_OK;
  halo__along a = {0};
  HALO_TRY(halo__along_dim_or_all(&a, name, x, c->param[0]));
  return halo__scatter_grad(&c->grad_in[0], x, &a, c->grad_out[0], c->saved[0], 1);
}

halo_status halo__max_fwd(halo__call *c) { return extreme_fwd(c, "max", true); }
halo_status halo__max_bwd(halo__call *c) { return extreme_bwd(c, "max"); }
halo_status halo__min_fwd(halo__call *c) { return extreme_fwd(c, "min", false); }
halo_status halo__min_bwd(halo__call *c) { return extreme_bwd(c, "min"); }

halo_status halo__argmax_fwd(halo__call *c) {
  return extreme(NULL, &c->out[0], "argmax", c->in[0], c->param, true);
}
halo_status halo__argmin_fwd(halo__call *c) {
  return extreme(NULL, &c->out[0], "argmin", c->in[0], c->param, false);
}

/* ---- product, variance, logsumexp ---------------------------------------------------------- */

halo_status halo__prod_fwd(halo__call *c) {
  halo_tensor *x = c->in[0], *dense = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim_or_all(&a, "prod", x, c->param[0]));
  HALO_TRY(floating(&dense, "prod", x));
  halo_status status = new_reduced(&c->out[0], x->dtype, x, &a, c->param[1]);
  if (status == HALO_OK) {
    status = halo__kernels_of(x)->prod(x->dtype, halo__data(c->out[0]), halo__data(dense), a.outer,
                                       a.n, a.inner);
  }
  halo_tensor_free(dense);
  return status;
}

halo_status halo__var_fwd(halo__call *c) {
  halo_tensor *x = c->in[0], *dense = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim_or_all(&a, "var", x, c->param[0]));
  HALO_TRY(floating(&dense, "var", x));
  halo_status status = new_reduced(&c->out[0], x->dtype, x, &a, c->param[1]);
  if (status == HALO_OK) {
    status = halo__kernels_of(x)->variance(x->dtype, halo__data(c->out[0]), halo__data(dense),
                                           a.outer, a.n, a.inner, c->param[2]);
  }
  halo_tensor_free(dense);
  return status;
}

halo_status halo__logsumexp_fwd(halo__call *c) {
  halo_tensor *x = c->in[0], *dense = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim_or_all(&a, "logsumexp", x, c->param[0]));
  HALO_TRY(floating(&dense, "logsumexp", x));
  halo_status status = new_reduced(&c->out[0], x->dtype, x, &a, c->param[1]);
  if (status == HALO_OK) {
    status = halo__kernels_of(x)->logsumexp(x->dtype, halo__data(c->out[0]), halo__data(dense),
                                            a.outer, a.n, a.inner);
  }
  if (status == HALO_OK && c->wants_grad) status = halo_tensor_retain(&c->saved[0], c->out[0]);
  halo_tensor_free(dense);
  return status;
}

/* The three gradients that read x: which one is told by the op. */
static halo_status fibre_bwd(halo__call *c, const char *name) {
  halo_tensor *x = NULL, *dy = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim_or_all(&a, name, c->in[0], c->param[0]));
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__contiguous(&x, c->in[0]));
  HALO_TRY_GOTO(halo__contiguous(&dy, c->grad_out[0]));
  HALO_TRY_GOTO(halo__new_like(&c->grad_in[0], x));
  halo__count_passes(x, 2);
  const halo_kernels *k = halo__kernels_of(x);
  void *dx = halo__data(c->grad_in[0]), *pdy = halo__data(dy), *px = halo__data(x);
  switch (c->op) {
  case HALO_OP_prod: status = k->prod_bwd(x->dtype, dx, pdy, px, a.outer, a.n, a.inner); break;
  case HALO_OP_var:
    status = k->variance_bwd(x->dtype, dx, pdy, px, a.outer, a.n, a.inner, c->param[2]);
    break;
  default:
    status = k->logsumexp_bwd(x->dtype, dx, pdy, px, halo__data(c->saved[0]), a.outer, a.n, a.inner);
    break;
  }
done:
  halo_tensor_free(x);
  halo_tensor_free(dy);
  return status;
}

halo_status halo__prod_bwd(halo__call *c) { return fibre_bwd(c, "prod"); }
halo_status halo__var_bwd(halo__call *c) { return fibre_bwd(c, "var"); }
halo_status halo__logsumexp_bwd(halo__call *c) { return fibre_bwd(c, "logsumexp"); }

/* ---- same shape: cumsum, softmax ----------------------------------------------------------- */

/* y <- running sums of x. */
static halo_status running_sum(halo_tensor **out, halo_tensor *x, double dim, bool is_reversed) {
  halo_tensor *dense = NULL, *y = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, "cumsum", x, dim));
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__contiguous(&dense, x));
  HALO_TRY_GOTO(halo__new_like(&y, x));
  halo__count_passes(x, 2);
  HALO_TRY_GOTO(halo__kernels_of(x)->cumsum(x->dtype, halo__data(y), halo__data(dense), a.outer, a.n,
                                            a.inner, is_reversed));
  *out = y;
  y = NULL;
done:
  halo_tensor_free(dense);
  halo_tensor_free(y);
  return status;
}

halo_status halo__cumsum_fwd(halo__call *c) {
  c->drop_in[0] = true;
  return running_sum(&c->out[0], c->in[0], c->param[0], c->param[1] != 0);
}

halo_status halo__cumsum_bwd(halo__call *c) {
  return running_sum(&c->grad_in[0], c->grad_out[0], c->param[0], c->param[1] == 0);
}

static halo_status softmax_fwd(halo__call *c, const char *name, bool is_log) {
  halo_tensor *x = c->in[0], *dense = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, name, x, c->param[0]));
  HALO_TRY(floating(&dense, name, x));
  halo_status status = halo__new_like(&c->out[0], x);
  halo__count_passes(x, 2);
  if (status == HALO_OK) {
    status = halo__kernels_of(x)->softmax(x->dtype, halo__data(c->out[0]), halo__data(dense), a.outer,
                                          a.n, a.inner, is_log);
  }
  c->drop_in[0] = true;
  if (status == HALO_OK && c->wants_grad) status = halo_tensor_retain(&c->saved[0], c->out[0]);
  halo_tensor_free(dense);
  return status;
}

static halo_status softmax_bwd(halo__call *c, const char *name, bool is_log) {
  halo_tensor *y = c->saved[0], *dy = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, name, y, c->param[0]));
  HALO_TRY(halo__contiguous(&dy, c->grad_out[0]));
  halo_status status = halo__new_like(&c->grad_in[0], y);
  halo__count_passes(y, 3);
  if (status == HALO_OK) {
    status = halo__kernels_of(y)->softmax_bwd(y->dtype, halo__data(c->grad_in[0]), halo__data(dy),
                                              halo__data(y), a.outer, a.n, a.inner, is_log);
  }
  halo_tensor_free(dy);
  return status;
}

halo_status halo__softmax_fwd(halo__call *c) { return softmax_fwd(c, "softmax", false); }
halo_status halo__softmax_bwd(halo__call *c) { return softmax_bwd(c, "softmax", false); }
halo_status halo__log_softmax_fwd(halo__call *c) { return softmax_fwd(c, "log_softmax", true); }
halo_status halo__log_softmax_bwd(halo__call *c) { return softmax_bwd(c, "log_softmax", true); }
