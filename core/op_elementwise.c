/* op_elementwise.c: shape rules and gradients of elementwise ops; the formulas are the table
 * kernels/elementwise.def.
 *
 * Inputs broadcast as in NumPy: shapes are aligned on the right and a size of 1 repeats. Kernels walk
 * strides, so broadcast and transposed inputs are read where they lie. A gradient has the shape of
 * the result first and is then summed over the dims that were repeated.
 *
 * Dtypes of the inputs must agree: a silent widening to fp32 would double a tensor's memory, so
 * `cast` is written out. The tape keeps only what a formula's gradient reads (drop_in).
 */
#include "op.h"

#include <math.h>
#include <string.h>

#include "elementwise.h"

/* ---- broadcasting -------------------------------------------------------------------------- */

/* The stride of t along dim d of a result with ndim dims; 0 where t is repeated. */
static int64_t repeated_stride(const halo_tensor *t, int32_t d, int32_t ndim) {
  const int32_t own = d - (ndim - t->ndim);
  return own < 0 || t->shape[own] == 1 ? 0 : t->stride[own];
}

/* Merge neighbouring dims where every input steps evenly; drop dims of size 1. */
static void merge_walk(halo__broadcast *b, halo_tensor *const *in, int32_t n_in) {
  int32_t m = 0;
  for (int32_t d = 0; d < b->ndim; d++) {
    if (b->shape[d] == 1) continue;
    bool fits = m > 0;
    for (int32_t i = 0; i < n_in && fits; i++) {
      fits = b->stride[i][m - 1] == repeated_stride(in[i], d, b->ndim) * b->shape[d];
    }
    if (!fits) b->walk[m++] = 1;
    b->walk[m - 1] *= b->shape[d];
    for (int32_t i = 0; i < n_in; i++) b->stride[i][m - 1] = repeated_stride(in[i], d, b->ndim);
  }
  b->walk_ndim = m;
}

halo_status halo__broadcast_of(halo__broadcast *out, const char *name, halo_tensor *const *in,
                               int32_t n_in) {
  halo__broadcast b = {0};
  for (int32_t i = 0; i < n_in; i++) b.ndim = in[i]->ndim > b.ndim ? in[i]->ndim : b.ndim;
  for (int32_t d = 0; d < b.ndim; d++) {
    b.shape[d] = 1;
    for (int32_t i = 0; i < n_in; i++) {
      const int32_t own = d - (b.ndim - in[i]->ndim);
      const int64_t size = own < 0 ? 1 : in[i]->shape[own];
      HALO_CHECK(size == 1 || b.shape[d] == 1 || size == b.shape[d], HALO_EARG,
                 "%s: shapes do not fit: %s and %s", name, halo__describe(in[0]),
                 halo__describe(in[i]));
      if (size != 1) b.shape[d] = size;
    }
  }
  merge_walk(&b, in, n_in);
  *out = b;
  return HALO_OK;
}

halo_status halo__sum_to(halo_tensor **out, halo_tensor *t, const halo_tensor *like) {
  if (halo__same_shape(t, like)) return halo_tensor_retain(out, t);
  halo_tensor *now = NULL, *y = NULL;
  halo_status status = HALO_OK;
  HALO_TRY(halo__contiguous(&now, t));
  int64_t shape[HALO_MAX_DIMS];
  memcpy(shape, t->shape, sizeof shape);
  // From the last dim on, sum each run of repeated dims in one go.
  for (int32_t end = t->ndim; end > 0;) {
    int32_t begin = end;
    while (begin > 0) {
      const int32_t own = begin - 1 - (t->ndim - like->ndim);
      const int64_t wanted = own < 0 ? 1 : like->shape[own];
      if (wanted == shape[begin - 1]) break;
      begin--;
    }
    if (begin == end) {
      end--;
      continue;
    }
    int64_t outer = 1, n = 1, inner = 1;
    for (int32_t d = 0; d < t->ndim; d++) *(d < begin ? &outer : d < end ? &n : &inner) *= shape[d];
    for (int32_t d = begin; d < end; d++) shape[d] = 1;
    HALO_TRY_GOTO(halo_tensor_new(&y, (int32_t)t->dtype, halo_tensor_device(t), t->ndim, shape));
    HALO_TRY_GOTO(halo__kernels_of(t)->sum(t->dtype, halo__data(y), halo__data(now), outer, n, inner,
                                           1.0));
    halo_tensor_free(now);
    now = y;
    y = NULL;
    end = begin;
  }
  int64_t stride[HALO_MAX_DIMS], step = 1;
  for (int32_t d = like->ndim - 1; d >= 0; d--) {
    stride[d] = step;
    step *= like->shape[d];
  }
  status = halo__view(out, now, like->ndim, like->shape, stride, 0);
done:
  halo_tensor_free(now);
  halo_tensor_free(y);
  return status;
}

halo_status halo__scalar(halo_tensor **out, const halo_tensor *like, double value) {
  halo_tensor *t = NULL;
  HALO_TRY(halo_tensor_new(&t, (int32_t)like->dtype, halo_tensor_device(like), 0, NULL));
  halo_status status = halo_tensor_fill(t, value);
  if (status != HALO_OK) {
    halo_tensor_free(t);
    return status;
  }
  *out = t;
  return HALO_OK;
}

halo_status halo__whole(int64_t *out, const char *name, const char *param, double value, int64_t lo,
                        int64_t hi) {
  // 2^53 bounds the whole numbers that a double holds.
  const bool is_whole = value >= -9007199254740992.0 && value <= 9007199254740992.0 &&
                        (double)(int64_t)value == value;
  HALO_CHECK(is_whole && (int64_t)value >= lo && (int64_t)value <= hi, HALO_EARG,
             "%s: %s is %g, a whole number in %lld..%lld is wanted", name, param, value,
             (long long)lo, (long long)hi);
  *out = (int64_t)value;
  return HALO_OK;
}

/* ---- one input ----------------------------------------------------------------------------- */

enum { FLOAT, ANY };             /* dtypes */
enum { NOTHING, INPUT, OUTPUT }; /* what backward reads */

static halo_status unary_fwd(halo__call *c, const char *name, halo_unary kind, int dtypes,
                             int saves) {
  halo_tensor *x = c->in[0], *dense = NULL;
  HALO_CHECK(dtypes == ANY || halo__is_float(x->dtype), HALO_EARG,
             "%s: needs a floating tensor, got %s", name, halo__describe(x));
  for (int32_t i = 0; i < c->n_param && !halo__is_float(x->dtype); i++) {
    HALO_CHECK(c->param[i] == trunc(c->param[i]), HALO_EARG,
               "%s: %g is not a whole number, but the tensor is %s; cast it first", name,
               c->param[i], halo__describe(x));
  }
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__contiguous(&dense, x));
  HALO_TRY_GOTO(halo__new_like(&c->out[0], x));
  HALO_TRY_GOTO(halo__kernels_of(x)->unary(x->dtype, kind, halo__data(c->out[0]), halo__data(dense),
                                           halo_tensor_count(x), c->param[0], c->param[1]));
  halo__count_passes(x, 2);
  c->drop_in[0] = saves != INPUT;
  if (saves == OUTPUT && c->wants_grad) status = halo_tensor_retain(&c->saved[0], c->out[0]);
done:
  halo_tensor_free(dense);
  return status;
}

static halo_status unary_bwd(halo__call *c, halo_unary kind, int saves) {
  halo_tensor *dy = NULL, *saved = NULL;
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__contiguous(&dy, c->grad_out[0]));
  if (saves == INPUT) HALO_TRY_GOTO(halo__contiguous(&saved, c->in[0]));
  if (saves == OUTPUT) HALO_TRY_GOTO(halo_tensor_retain(&saved, c->saved[0]));
  HALO_TRY_GOTO(halo__new_like(&c->grad_in[0], dy));
  HALO_TRY_GOTO(halo__kernels_of(dy)->unary_bwd(
      dy->dtype, kind, halo__data(c->grad_in[0]), halo__data(dy),
      saved != NULL ? halo__data(saved) : NULL, halo_tensor_count(dy), c->param[0], c->param[1]));
  halo__count_passes(dy, saved != NULL ? 3 : 2);
done:
  halo_tensor_free(dy);
  halo_tensor_free(saved);
  return status;
}

#define HALO_UNARY(name, dtypes, saves, y, dx)                                            \
  halo_status halo__##name##_fwd(halo__call *c) {                                         \
    return unary_fwd(c, #name, HALO_UNARY_##name, dtypes, saves);                         \
  }                                                                                       \
  halo_status halo__##name##_bwd(halo__call *c) {                                         \
    return unary_bwd(c, HALO_UNARY_##name, saves);                                        \
  }
#include "elementwise.def"

/* ---- two inputs ---------------------------------------------------------------------------- */

static halo_status check_same_dtype(const char *name, const halo_tensor *a, const halo_tensor *b) {
  HALO_CHECK(a->dtype == b->dtype, HALO_EARG, "%s: dtypes differ: %s and %s; cast one of them", name,
             halo__describe(a), halo__describe(b));
  return HALO_OK;
}

static halo_status binary_fwd(halo__call *c, const char *name, halo_binary kind, int dtypes) {
  halo_tensor *a = c->in[0], *b = c->in[1];
  HALO_TRY(check_same_dtype(name, a, b));
  HALO_CHECK(dtypes == ANY || halo__is_float(a->dtype), HALO_EARG,
             "%s: needs floating tensors, got %s", name, halo__describe(a));
  halo__broadcast w = {0};
  HALO_TRY(halo__broadcast_of(&w, name, c->in, 2));
  HALO_TRY(halo_tensor_new(&c->out[0], (int32_t)a->dtype, halo_tensor_device(a), w.ndim, w.shape));
  halo__count_passes(c->out[0], 3);
  // Sums need no operand in backward; a product needs the other one.
  const bool is_sum = kind == HALO_BINARY_add || kind == HALO_BINARY_sub;
  c->drop_in[0] = is_sum ||
                  ((kind == HALO_BINARY_mul || kind == HALO_BINARY_div) && !c->need_grad[1]);
  c->drop_in[1] = is_sum || (kind == HALO_BINARY_mul && !c->need_grad[0]);
  return halo__kernels_of(a)->binary(a->dtype, kind, halo__data(c->out[0]), halo__data(a),
                                     halo__data(b), w.walk_ndim, w.walk, w.stride[0], w.stride[1]);
}

/* Gradients of a sum are dy itself, up to sign and shape. */
static halo_status sum_bwd(halo__call *c, halo_binary kind) {
  halo_tensor *dy = c->grad_out[0], *db = NULL;
  if (c->need_grad[0]) HALO_TRY(halo__sum_to(&c->grad_in[0], dy, c->in[0]));
  if (!c->need_grad[1]) return HALO_OK;
  if (kind == HALO_BINARY_add) return halo__sum_to(&c->grad_in[1], dy, c->in[1]);
  halo_status status = HALO_OK;
  halo_tensor *dense = NULL;
  HALO_TRY_GOTO(halo__sum_to(&db, dy, c->in[1]));
  HALO_TRY_GOTO(halo__contiguous(&dense, db));
  HALO_TRY_GOTO(halo__new_like(&c->grad_in[1], dense));
  status = halo__kernels_of(dy)->unary(dy->dtype, HALO_UNARY_neg, halo__data(c->grad_in[1]),
                                       halo__data(dense), halo_tensor_count(dense), 0, 0);
done:
  halo_tensor_free(db);
  halo_tensor_free(dense);
  return status;
}

static halo_status binary_bwd(halo__call *c, halo_binary kind) {
  if (kind == HALO_BINARY_add || kind == HALO_BINARY_sub) return sum_bwd(c, kind);
  halo_tensor *dy = NULL, *full[2] = {NULL, NULL}, *in[3];
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__contiguous(&dy, c->grad_out[0]));
  // An operand that was let go is not read: the other one stands in for it. dy fixes the shape.
  for (int32_t i = 0; i < 2; i++) in[i] = halo__data(c->in[i]) != NULL ? c->in[i] : c->in[1 - i];
  in[2] = dy;
  halo__broadcast w = {0};
  HALO_TRY_GOTO(halo__broadcast_of(&w, "backward", in, 3));
  for (int32_t i = 0; i < 2; i++) {
    if (c->need_grad[i]) HALO_TRY_GOTO(halo__new_like(&full[i], dy));
  }
  HALO_TRY_GOTO(halo__kernels_of(dy)->binary_bwd(
      dy->dtype, kind, full[0] != NULL ? halo__data(full[0]) : NULL,
      full[1] != NULL ? halo__data(full[1]) : NULL, halo__data(dy), halo__data(in[0]),
      halo__data(in[1]), w.walk_ndim, w.walk, w.stride[0], w.stride[1]));
  halo__count_passes(dy, 4);
  for (int32_t i = 0; i < 2; i++) {
    if (full[i] != NULL) HALO_TRY_GOTO(halo__sum_to(&c->grad_in[i], full[i], c->in[i]));
  }
done:
  halo_tensor_free(dy);
  halo_tensor_free(full[0]);
  halo_tensor_free(full[1]);
  return status;
}

#define HALO_BINARY(name, dtypes, y, da, db)                                              \
  halo_status halo__##name##_fwd(halo__call *c) {                                         \
    return binary_fwd(c, #name, HALO_BINARY_##name, dtypes);                              \
  }                                                                                       \
  halo_status halo__##name##_bwd(halo__call *c) { return binary_bwd(c, HALO_BINARY_##name); }
#include "elementwise.def"

static halo_status compare_fwd(halo__call *c, const char *name, halo_compare kind) {
  halo_tensor *a = c->in[0], *b = c->in[1];
  HALO_TRY(check_same_dtype(name, a, b));
  halo__broadcast w = {0};
  HALO_TRY(halo__broadcast_of(&w, name, c->in, 2));
  HALO_TRY(halo_tensor_new(&c->out[0], HALO_U8, halo_tensor_device(a), w.ndim, w.shape));
  return halo__kernels_of(a)->compare(a->dtype, kind, halo__data(c->out[0]), halo__data(a),
                                      halo__data(b), w.walk_ndim, w.walk, w.stride[0], w.stride[1]);
}

#define HALO_COMPARE(name, y)                                                             \
  halo_status halo__##name##_fwd(halo__call *c) {                                         \
    return compare_fwd(c, #name, HALO_COMPARE_##name);                                    \
  }
#include "elementwise.def"

/* ---- choosing ------------------------------------------------------------------------------ */

/* New y = mask ? a : b. */
static halo_status choose(halo_tensor **out, const char *name, halo_tensor *mask, halo_tensor *a,
                          halo_tensor *b) {
  HALO_CHECK(mask->dtype == HALO_U8, HALO_EARG, "%s: the mask must be u8, got %s", name,
             halo__describe(mask));
  HALO_TRY(check_same_dtype(name, a, b));
  halo_tensor *in[3] = {mask, a, b}, *y = NULL;
  halo__broadcast w = {0};
  HALO_TRY(halo__broadcast_of(&w, name, in, 3));
  HALO_TRY(halo_tensor_new(&y, (int32_t)a->dtype, halo_tensor_device(a), w.ndim, w.shape));
  halo__count_passes(y, 2);
  halo_status status = halo__kernels_of(a)->where(
      halo_dtype_bytes(a->dtype), halo__data(y), halo__data(mask), halo__data(a), halo__data(b),
      w.walk_ndim, w.walk, w.stride[0], w.stride[1], w.stride[2]);
  if (status != HALO_OK) {
    halo_tensor_free(y);
    return status;
  }
  *out = y;
  return HALO_OK;
}

/* grad_in[i] = dy where the mask is `side`, else 0, in the shape of in[i]. */
static halo_status choose_bwd(halo__call *c, int32_t i, halo_tensor *mask, bool side) {
  if (!c->need_grad[i]) return HALO_OK;
  halo_tensor *dy = c->grad_out[0], *zero = NULL, *full = NULL;
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__scalar(&zero, dy, 0));
  HALO_TRY_GOTO(choose(&full, "backward", mask, side ? dy : zero, side ? zero : dy));
  status = halo__sum_to(&c->grad_in[i], full, c->in[i]);
done:
  halo_tensor_free(zero);
  halo_tensor_free(full);
  return status;
}

halo_status halo__where_fwd(halo__call *c) {
  c->drop_in[1] = c->drop_in[2] = true;
  return choose(&c->out[0], "where", c->in[0], c->in[1], c->in[2]);
}

halo_status halo__where_bwd(halo__call *c) {
  HALO_TRY(choose_bwd(c, 1, c->in[0], true));
  return choose_bwd(c, 2, c->in[0], false);
}

halo_status halo__masked_fill_fwd(halo__call *c) {
  halo_tensor *value = NULL;
  c->drop_in[0] = true;
  HALO_TRY(halo__scalar(&value, c->in[0], c->param[0]));
  halo_status status = choose(&c->out[0], "masked_fill", c->in[1], value, c->in[0]);
  halo_tensor_free(value);
  return status;
}

halo_status halo__masked_fill_bwd(halo__call *c) { return choose_bwd(c, 0, c->in[1], false); }

/* ---- dtype, layout, noise ------------------------------------------------------------------ */

halo_status halo__cast_fwd(halo__call *c) {
  halo_tensor *x = c->in[0];
  int64_t dtype = 0;
  HALO_TRY(halo__whole(&dtype, "cast", "dtype", c->param[0], 0, HALO_DTYPE_COUNT - 1));
  c->drop_in[0] = true;
  if ((halo_dtype)dtype == x->dtype) return halo_tensor_retain(&c->out[0], x);
  HALO_TRY(halo_tensor_new(&c->out[0], (int32_t)dtype, halo_tensor_device(x), x->ndim, x->shape));
  halo__count_passes(x, 2);
  return halo_tensor_copy(c->out[0], x);
}

halo_status halo__cast_bwd(halo__call *c) {
  halo_tensor *dy = c->grad_out[0];
  if (dy->dtype == c->in[0]->dtype) return halo_tensor_retain(&c->grad_in[0], dy);
  HALO_TRY(halo__new_like(&c->grad_in[0], c->in[0]));
  return halo_tensor_copy(c->grad_in[0], dy);
}

static halo_status moved(halo_tensor **out, halo_tensor *t, int32_t device) {
  if ((int32_t)halo__device(t) == device) return halo_tensor_retain(out, t);
  halo_tensor *y = NULL;
  HALO_TRY(halo_tensor_new(&y, (int32_t)t->dtype, device, t->ndim, t->shape));
  halo__count_passes(t, 2);
  halo_status status = halo_tensor_copy(y, t);
  if (status != HALO_OK) {
    halo_tensor_free(y);
    return status;
  }
  *out = y;
  return HALO_OK;
}

halo_status halo__to_device_fwd(halo__call *c) {
  int64_t device = 0;
  HALO_TRY(halo__whole(&device, "to_device", "device", c->param[0], HALO_CPU, HALO_CUDA));
  c->drop_in[0] = true;
  return moved(&c->out[0], c->in[0], (int32_t)device);
}

halo_status halo__to_device_bwd(halo__call *c) {
  return moved(&c->grad_in[0], c->grad_out[0], halo_tensor_device(c->in[0]));
}

halo_status halo__contiguous_fwd(halo__call *c) {
  c->drop_in[0] = true;
  return halo__contiguous(&c->out[0], c->in[0]);
}

halo_status halo__contiguous_bwd(halo__call *c) {
  return halo_tensor_retain(&c->grad_in[0], c->grad_out[0]);
}

/* y <- dropout of x; the same mask whenever it is made again. */
static halo_status drop_out(halo_tensor **out, halo_tensor *x, const double *param) {
  HALO_CHECK(halo__is_float(x->dtype), HALO_EARG, "dropout: needs a floating tensor, got %s",
             halo__describe(x));
  HALO_CHECK(param[0] >= 0 && param[0] <= 1, HALO_EARG, "dropout: p is %g, 0..1 is wanted",
             param[0]);
  int64_t seed = 0, stream = 0;
  HALO_TRY(halo__whole(&seed, "dropout", "seed", param[1], 0, INT64_MAX));
  HALO_TRY(halo__whole(&stream, "dropout", "stream", param[2], 0, INT64_MAX));
  halo_tensor *dense = NULL, *y = NULL;
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__contiguous(&dense, x));
  HALO_TRY_GOTO(halo__new_like(&y, x));
  halo__count_passes(x, 2);
  HALO_TRY_GOTO(halo__kernels_of(x)->dropout(x->dtype, halo__data(y), halo__data(dense),
                                             halo_tensor_count(x), param[0], (uint64_t)seed,
                                             (uint64_t)stream));
  *out = y;
  y = NULL;
done:
  halo_tensor_free(dense);
  halo_tensor_free(y);
  return status;
}

halo_status halo__dropout_fwd(halo__call *c) {
  c->drop_in[0] = true;
  return drop_out(&c->out[0], c->in[0], c->param);
}

halo_status halo__dropout_bwd(halo__call *c) {
  return drop_out(&c->grad_in[0], c->grad_out[0], c->param);
}
