/* op_shape.c: views and what changes shape: reshape, permute, slice, expand, cat, triangles.
 *
 * A view shares storage with its input; only reshape of a layout that has no fitting strides copies.
 * The gradient of a view is the opposite view of dy where there is one (reshape, permute), zeros with
 * dy written into the window (slice, select), or a sum over what was repeated (expand).
 *
 * Shapes come as parameters `ndim, size0 .. size7`, so that the op table holds plain numbers.
 */
#include "op.h"

#include <math.h>
#include <string.h>

/* ---- reshape ------------------------------------------------------------------------------- */

/* Sizes from parameters; one of them may be -1 and follows from `count`. */
static halo_status sizes_of(const char *name, const double *param, int64_t count, int32_t *ndim_out,
                            int64_t *shape) {
  int64_t ndim = 0, known = 1;
  int32_t open = -1;
  HALO_TRY(halo__whole(&ndim, name, "ndim", param[0], 0, HALO_MAX_DIMS));
  for (int32_t d = 0; d < ndim; d++) {
    HALO_TRY(halo__whole(&shape[d], name, "size", param[1 + d], -1, INT64_MAX));
    if (shape[d] < 0) {
      HALO_CHECK(open < 0, HALO_EARG, "%s: only one size may be -1", name);
      open = d;
    } else {
      HALO_CHECK(halo__mul(known, shape[d], &known), HALO_EARG, "%s: the shape is too large", name);
    }
  }
  if (open >= 0 && known > 0) shape[open] = count / known;
  if (open >= 0 && known == 0) shape[open] = 0;
  *ndim_out = (int32_t)ndim;
  return HALO_OK;
}

/* Row-major strides. */
static void dense_strides(int32_t ndim, const int64_t *shape, int64_t *stride) {
  int64_t step = 1;
  for (int32_t d = ndim - 1; d >= 0; d--) {
    stride[d] = step;
    step *= shape[d];
  }
}

/* Strides under which t's elements, in row-major order, have this shape; false if there are none.
 * t is taken in groups of dims that step evenly, from the last on; each group must hold a whole
 * number of new dims. */
static bool view_strides(const halo_tensor *t, int32_t ndim, const int64_t *shape, int64_t *stride) {
  if (halo_tensor_is_contiguous(t)) {
    dense_strides(ndim, shape, stride);
    return true;
  }
  int32_t to = ndim - 1;
  int64_t step = t->stride[t->ndim - 1], group = 1, covered = 1;
  for (int32_t d = t->ndim - 1; d >= 0; d--) {
    group *= t->shape[d];
    const bool goes_on =
        d > 0 && (t->shape[d - 1] == 1 || t->stride[d - 1] == group * step);
    if (goes_on) continue;
    while (to >= 0 && (covered < group || shape[to] == 1)) {
      stride[to] = covered * step;
      covered *= shape[to--];
    }
    if (covered != group) return false;
    if (d > 0) step = t->stride[d - 1];
    group = covered = 1;
  }
  return to < 0;
}

/* t in another shape with the same number of elements: a view where possible, else a copy. */
static halo_status reshaped(halo_tensor **out, halo_tensor *t, int32_t ndim, const int64_t *shape) {
  int64_t stride[HALO_MAX_DIMS];
  if (view_strides(t, ndim, shape, stride)) return halo__view(out, t, ndim, shape, stride, 0);
  halo_tensor *dense = NULL;
  HALO_TRY(halo__contiguous(&dense, t));
  dense_strides(ndim, shape, stride);
  halo_status status = halo__view(out, dense, ndim, shape, stride, 0);
  halo_tensor_free(dense);
  return status;
}

halo_status halo__reshape_fwd(halo__call *c) {
  halo_tensor *x = c->in[0];
  int64_t shape[HALO_MAX_DIMS], count = 1;
  int32_t ndim = 0;
  HALO_TRY(sizes_of("reshape", c->param, halo_tensor_count(x), &ndim, shape));
  for (int32_t d = 0; d < ndim; d++) count *= shape[d];
  HALO_CHECK(count == halo_tensor_count(x), HALO_EARG,
             "reshape: %s has %lld elements, the new shape has %lld", halo__describe(x),
             (long long)halo_tensor_count(x), (long long)count);
  c->drop_in[0] = true;
  return reshaped(&c->out[0], x, ndim, shape);
}

halo_status halo__reshape_bwd(halo__call *c) {
  return reshaped(&c->grad_in[0], c->grad_out[0], c->in[0]->ndim, c->in[0]->shape);
}

/* t without a dim of size 1. */
static halo_status without_dim(halo_tensor **out, halo_tensor *t, int32_t dim) {
  int64_t shape[HALO_MAX_DIMS], stride[HALO_MAX_DIMS];
  for (int32_t d = 0, to = 0; d < t->ndim; d++) {
    if (d == dim) continue;
    shape[to] = t->shape[d];
    stride[to++] = t->stride[d];
  }
  return halo__view(out, t, t->ndim - 1, shape, stride, 0);
}

halo_status halo__squeeze_fwd(halo__call *c) {
  halo_tensor *x = c->in[0];
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, "squeeze", x, c->param[0]));
  HALO_CHECK(a.n == 1, HALO_EARG, "squeeze: dim %d of %s has size %lld, not 1", a.dim,
             halo__describe(x), (long long)a.n);
  c->drop_in[0] = true;
  return without_dim(&c->out[0], x, a.dim);
}

halo_status halo__squeeze_bwd(halo__call *c) { return halo__reshape_bwd(c); }

halo_status halo__unsqueeze_fwd(halo__call *c) {
  halo_tensor *x = c->in[0];
  int64_t at = 0, shape[HALO_MAX_DIMS], stride[HALO_MAX_DIMS];
  HALO_CHECK(x->ndim < HALO_MAX_DIMS, HALO_EARG, "unsqueeze: %s has no room for one more dim",
             halo__describe(x));
  HALO_TRY(halo__whole(&at, "unsqueeze", "dim", c->param[0], -x->ndim - 1, x->ndim));
  if (at < 0) at += x->ndim + 1;
  for (int32_t d = 0, from = 0; d <= x->ndim; d++) {
    const bool is_new = d == at;
    shape[d] = is_new ? 1 : x->shape[from];
    stride[d] = is_new ? 1 : x->stride[from];
    from += !is_new;
  }
  c->drop_in[0] = true;
  return halo__view(&c->out[0], x, x->ndim + 1, shape, stride, 0);
}

halo_status halo__unsqueeze_bwd(halo__call *c) { return halo__reshape_bwd(c); }

/* ---- permute ------------------------------------------------------------------------------- */

/* Dim d of the result is dim order[d] of t. */
static halo_status permuted(halo_tensor **out, halo_tensor *t, const int32_t *order) {
  int64_t shape[HALO_MAX_DIMS], stride[HALO_MAX_DIMS];
  for (int32_t d = 0; d < t->ndim; d++) {
    shape[d] = t->shape[order[d]];
    stride[d] = t->stride[order[d]];
  }
  return halo__view(out, t, t->ndim, shape, stride, 0);
}

/* The order that permute's parameters ask for, checked. */
static halo_status order_of(int32_t *order, const halo_tensor *x, const double *param) {
  int64_t ndim = 0;
  uint32_t seen = 0;
  HALO_TRY(halo__whole(&ndim, "permute", "ndim", param[0], 0, HALO_MAX_DIMS));
  HALO_CHECK(ndim == x->ndim, HALO_EARG, "permute: %d dims given for %s", (int)ndim,
             halo__describe(x));
  for (int32_t d = 0; d < x->ndim; d++) {
    int64_t from = 0;
    HALO_TRY(halo__whole(&from, "permute", "dim", param[1 + d], -x->ndim, x->ndim - 1));
    order[d] = (int32_t)(from < 0 ? from + x->ndim : from);
    HALO_CHECK((seen & 1u << order[d]) == 0, HALO_EARG, "permute: dim %d is given twice", order[d]);
    seen |= 1u << order[d];
  }
  return HALO_OK;
}

halo_status halo__permute_fwd(halo__call *c) {
  int32_t order[HALO_MAX_DIMS];
  HALO_TRY(order_of(order, c->in[0], c->param));
  c->drop_in[0] = true;
  return permuted(&c->out[0], c->in[0], order);
}

halo_status halo__permute_bwd(halo__call *c) {
  int32_t order[HALO_MAX_DIMS], inverse[HALO_MAX_DIMS];
  HALO_TRY(order_of(order, c->in[0], c->param));
  for (int32_t d = 0; d < c->in[0]->ndim; d++) inverse[order[d]] = d;
  return permuted(&c->grad_in[0], c->grad_out[0], inverse);
}

/* Exchanging two dims is its own inverse. */
static halo_status exchanged(halo_tensor **out, halo_tensor *t, const double *param) {
  halo__along a = {0}, b = {0};
  HALO_TRY(halo__along_dim(&a, "transpose", t, param[0]));
  HALO_TRY(halo__along_dim(&b, "transpose", t, param[1]));
  int32_t order[HALO_MAX_DIMS];
  for (int32_t d = 0; d < t->ndim; d++) order[d] = d == a.dim ? b.dim : d == b.dim ? a.dim : d;
  return permuted(out, t, order);
}

halo_status halo__transpose_fwd(halo__call *c) {
  c->drop_in[0] = true;
  return exchanged(&c->out[0], c->in[0], c->param);
}

halo_status halo__transpose_bwd(halo__call *c) {
  return exchanged(&c->grad_in[0], c->grad_out[0], c->param);
}

/* ---- windows ------------------------------------------------------------------------------- */

/* Elements from, from + step, ... below `to` of a dim: a window on t. */
typedef struct window {
  int32_t dim;
  int64_t from, step, n;
} window;

static halo_status windowed(halo_tensor **out, halo_tensor *t, const window *w) {
  int64_t shape[HALO_MAX_DIMS], stride[HALO_MAX_DIMS];
  memcpy(shape, t->shape, sizeof shape);
  memcpy(stride, t->stride, sizeof stride);
  const int64_t offset = w->n > 0 ? w->from * stride[w->dim] : 0;
  shape[w->dim] = w->n;
  stride[w->dim] *= w->step;
  return halo__view(out, t, t->ndim, shape, stride, offset);
}

/* New zeros like x with dy in the window. */
static halo_status window_grad(halo_tensor **out, const halo_tensor *x, const window *w,
                               halo_tensor *dy) {
  halo_tensor *dx = NULL, *view = NULL;
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__zeros_like(&dx, x));
  HALO_TRY_GOTO(windowed(&view, dx, w));
  HALO_TRY_GOTO(halo_tensor_copy(view, dy));
  *out = dx;
  dx = NULL;
done:
  halo_tensor_free(dx);
  halo_tensor_free(view);
  return status;
}

static halo_status slice_window(window *out, const halo_tensor *x, const double *param) {
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, "slice", x, param[0]));
  window w = {.dim = a.dim};
  int64_t to = a.n;
  HALO_TRY(halo__whole(&w.from, "slice", "from", param[1], -a.n, a.n));
  if (!isnan(param[2])) HALO_TRY(halo__whole(&to, "slice", "to", param[2], -a.n, a.n));
  HALO_TRY(halo__whole(&w.step, "slice", "step", param[3], 1, INT64_MAX));
  if (w.from < 0) w.from += a.n;
  if (to < 0) to += a.n;
  w.n = to > w.from ? (to - w.from + w.step - 1) / w.step : 0;
  *out = w;
  return HALO_OK;
}

halo_status halo__slice_fwd(halo__call *c) {
  window w = {0};
  HALO_TRY(slice_window(&w, c->in[0], c->param));
  c->drop_in[0] = true;
  return windowed(&c->out[0], c->in[0], &w);
}

halo_status halo__slice_bwd(halo__call *c) {
  window w = {0};
  HALO_TRY(slice_window(&w, c->in[0], c->param));
  return window_grad(&c->grad_in[0], c->in[0], &w, c->grad_out[0]);
}

static halo_status select_window(window *out, const halo_tensor *x, const double *param) {
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, "select", x, param[0]));
  window w = {.dim = a.dim, .step = 1, .n = 1};
  HALO_TRY(halo__whole(&w.from, "select", "index", param[1], -a.n, a.n - 1));
  if (w.from < 0) w.from += a.n;
  *out = w;
  return HALO_OK;
}

halo_status halo__select_fwd(halo__call *c) {
  window w = {0};
  halo_tensor *row = NULL;
  HALO_TRY(select_window(&w, c->in[0], c->param));
  HALO_TRY(windowed(&row, c->in[0], &w));
  c->drop_in[0] = true;
  halo_status status = without_dim(&c->out[0], row, w.dim);
  halo_tensor_free(row);
  return status;
}

halo_status halo__select_bwd(halo__call *c) {
  window w = {0};
  halo_tensor *row = NULL;
  const halo_tensor *x = c->in[0];
  int64_t shape[HALO_MAX_DIMS];
  HALO_TRY(select_window(&w, x, c->param));
  memcpy(shape, x->shape, sizeof shape);
  shape[w.dim] = 1;
  HALO_TRY(reshaped(&row, c->grad_out[0], x->ndim, shape));
  halo_status status = window_grad(&c->grad_in[0], x, &w, row);
  halo_tensor_free(row);
  return status;
}

/* ---- repeat, join, mirror ------------------------------------------------------------------- */

halo_status halo__expand_fwd(halo__call *c) {
  halo_tensor *x = c->in[0];
  int64_t shape[HALO_MAX_DIMS], stride[HALO_MAX_DIMS];
  int32_t ndim = 0;
  HALO_TRY(sizes_of("expand", c->param, halo_tensor_count(x), &ndim, shape));
  HALO_CHECK(ndim >= x->ndim, HALO_EARG, "expand: %d dims for %s", ndim, halo__describe(x));
  for (int32_t d = 0; d < ndim; d++) {
    const int32_t own = d - (ndim - x->ndim);
    const int64_t size = own < 0 ? 1 : x->shape[own];
    if (c->param[1 + d] == -1) shape[d] = size; // here -1 keeps the size
    HALO_CHECK(size == shape[d] || size == 1, HALO_EARG,
               "expand: dim %d of the new shape is %lld, %s cannot repeat into it", d,
               (long long)shape[d], halo__describe(x));
    stride[d] = size == 1 ? 0 : x->stride[own];
    if (shape[d] == 1) stride[d] = 1;
  }
  c->drop_in[0] = true;
  return halo__view(&c->out[0], x, ndim, shape, stride, 0);
}

halo_status halo__expand_bwd(halo__call *c) {
  return halo__sum_to(&c->grad_in[0], c->grad_out[0], c->in[0]);
}

halo_status halo__cat_fwd(halo__call *c) {
  halo_tensor *first = c->in[0], *view = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, "cat", first, c->param[0]));
  int64_t shape[HALO_MAX_DIMS];
  memcpy(shape, first->shape, sizeof shape);
  shape[a.dim] = 0;
  for (int32_t i = 0; i < c->n_in; i++) {
    const halo_tensor *x = c->in[i];
    bool fits = x->dtype == first->dtype && x->ndim == first->ndim;
    for (int32_t d = 0; d < x->ndim && fits; d++) fits = d == a.dim || x->shape[d] == first->shape[d];
    HALO_CHECK(fits, HALO_EARG, "cat: input %d is %s, which does not fit %s along dim %d", i + 1,
               halo__describe(x), halo__describe(first), a.dim);
    shape[a.dim] += x->shape[a.dim];
    c->drop_in[i] = true;
  }
  if (a.dim == 0) HALO_TRY(halo__joined(&c->out[0], c->in, c->n_in));
  if (c->out[0] != NULL) return HALO_OK;
  HALO_TRY(halo_tensor_new(&c->out[0], (int32_t)first->dtype, halo_tensor_device(first),
                           first->ndim, shape));
  halo__count_passes(c->out[0], 2);
  window w = {.dim = a.dim, .step = 1};
  for (int32_t i = 0; i < c->n_in; i++) {
    w.n = c->in[i]->shape[a.dim];
    HALO_TRY(windowed(&view, c->out[0], &w));
    halo_status status = halo_tensor_copy(view, c->in[i]);
    halo_tensor_free(view);
    HALO_TRY(status);
    w.from += w.n;
  }
  return HALO_OK;
}

halo_status halo__cat_bwd(halo__call *c) {
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, "cat", c->in[0], c->param[0]));
  window w = {.dim = a.dim, .step = 1};
  for (int32_t i = 0; i < c->n_in; i++) {
    w.n = c->in[i]->shape[a.dim];
    if (c->need_grad[i]) HALO_TRY(windowed(&c->grad_in[i], c->grad_out[0], &w));
    w.from += w.n;
  }
  return HALO_OK;
}

/* A copy of t with one dim in reverse order. */
static halo_status mirrored(halo_tensor **out, halo_tensor *t, double dim) {
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, "flip", t, dim));
  halo_tensor *y = NULL;
  HALO_TRY(halo__new_like(&y, t));
  int64_t stride[HALO_MAX_DIMS];
  memcpy(stride, t->stride, sizeof stride);
  const int64_t bytes = halo_dtype_bytes(t->dtype);
  const int64_t last = a.n > 0 ? (a.n - 1) * stride[a.dim] : 0;
  stride[a.dim] = -stride[a.dim];
  halo_status status = halo__kernels_of(t)->pack(
      halo__data(y), (const char *)halo__data(t) + last * bytes, bytes, t->ndim, t->shape, stride);
  if (status != HALO_OK) {
    halo_tensor_free(y);
    return status;
  }
  *out = y;
  return HALO_OK;
}

halo_status halo__flip_fwd(halo__call *c) {
  c->drop_in[0] = true;
  return mirrored(&c->out[0], c->in[0], c->param[0]);
}

halo_status halo__flip_bwd(halo__call *c) {
  return mirrored(&c->grad_in[0], c->grad_out[0], c->param[0]);
}

/* ---- triangles ----------------------------------------------------------------------------- */

/* x with one triangle of its last two dims set to 0. */
static halo_status triangle(halo_tensor **out, const char *name, halo_tensor *x, double diagonal,
                            bool is_upper) {
  int64_t d = 0;
  HALO_CHECK(x->ndim >= 2, HALO_EARG, "%s: needs at least two dims, got %s", name,
             halo__describe(x));
  HALO_TRY(halo__whole(&d, name, "diagonal", diagonal, INT32_MIN, INT32_MAX));
  halo_tensor *dense = NULL, *y = NULL;
  halo_status status = HALO_OK;
  const int64_t rows = x->shape[x->ndim - 2], cols = x->shape[x->ndim - 1];
  HALO_TRY_GOTO(halo__contiguous(&dense, x));
  HALO_TRY_GOTO(halo__new_like(&y, x));
  int64_t outer = 1;
  for (int32_t i = 0; i < x->ndim - 2; i++) outer *= x->shape[i];
  HALO_TRY_GOTO(halo__kernels_of(x)->triangle(halo_dtype_bytes(x->dtype), halo__data(y),
                                              halo__data(dense), outer, rows, cols, d, is_upper));
  *out = y;
  y = NULL;
done:
  halo_tensor_free(dense);
  halo_tensor_free(y);
  return status;
}

halo_status halo__tril_fwd(halo__call *c) {
  c->drop_in[0] = true;
  return triangle(&c->out[0], "tril", c->in[0], c->param[0], false);
}
halo_status halo__tril_bwd(halo__call *c) {
  return triangle(&c->grad_in[0], "tril", c->grad_out[0], c->param[0], false);
}
halo_status halo__triu_fwd(halo__call *c) {
  c->drop_in[0] = true;
  return triangle(&c->out[0], "triu", c->in[0], c->param[0], true);
}
halo_status halo__triu_bwd(halo__call *c) {
  return triangle(&c->grad_in[0], "triu", c->grad_out[0], c->param[0], true);
}
