/* optim.c: AdamW over a list of parameters, with everything it keeps in flat buffers.
 *
 *      parameters   [ w0 ][ w1 ]...[ wn ]        wherever their owner put them
 *      gradients    |  0  |  1  |...|  n  |      one buffer; a parameter's gradient is a view of it
 *      moments      |  0  |  1  |...|  n  |      the same offsets, twice
 *      masters      |  0  |  1  |...|  n  |      only when some parameter is bf16
 *
 * One buffer means one all-reduce, one norm, one file entry and one shard boundary per rank. The
 * backward adds straight into it (tape.c, accumulate_into), so gradients exist once. Buffers are in
 * the arithmetic dtype: fp32 for fp32 and bf16 parameters, fp64 for fp64 ones. A bf16 parameter is
 * the rounded image of its fp32 master; steps of 1e-3 of its value would be lost in 8 bits.
 *
 * Moments may be bf16 instead (4 of the 16 bytes a parameter of a bf16 model costs with its gradient
 * and master), rounded stochastically by the kernel; parameter i draws from a stream of its own, so the
 * same step gives the same bits on every rank and device.
 *
 * The bias correction is that of the step number given, not of a counter kept here, so that
 * resuming needs the moments and nothing else.
 */
#include "internal.h"
#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct halo_adamw {
  int32_t n;
  halo_dtype wide, moments; /* of gradients and masters; of moments */
  halo_device device;
  halo_tensor **params; /* retained */
  double *decay;
  int64_t *offset; /* n + 1 entries */
  halo_tensor *grad, *moment1, *moment2, *master;
};

static halo_status check_params(halo_tensor *const *params, int32_t n) {
  for (int32_t i = 0; i < n; i++) {
    const halo_tensor *p = params[i];
    HALO_CHECK(p != NULL && halo__is_float(p->dtype) && halo_tensor_is_contiguous(p), HALO_EARG,
               "adamw: parameter %d must be floating and contiguous, got %s", i, halo__describe(p));
    HALO_CHECK(p->requires_grad && p->node == NULL, HALO_EARG,
               "adamw: parameter %d (%s) is not a leaf that requires a gradient", i,
               halo__describe(p));
    HALO_CHECK(halo__acc_dtype(p->dtype) == halo__acc_dtype(params[0]->dtype) &&
                   halo__device(p) == halo__device(params[0]),
               HALO_EARG, "adamw: parameter %d is %s, parameter 0 is %s; fp64 does not mix", i,
               halo__describe(p), halo__describe(params[0]));
  }
  return HALO_OK;
}

typedef struct extent {
  const char *data;
  int64_t bytes;
  int32_t index;
} extent;

static int by_address(const void *a, const void *b) {
  const extent *x = a, *y = b;
  return (x->data > y->data) - (x->data < y->data);
}

/* Memory listed twice (a tied weight under two names) would be stepped twice. */
static halo_status check_distinct(halo_tensor *const *params, int32_t n) {
  extent *e = NULL;
  HALO_TRY(halo__scratch((void **)&e, n, sizeof *e));
  for (int32_t i = 0; i < n; i++) {
    const int64_t bytes = halo_tensor_count(params[i]) * halo_dtype_bytes(params[i]->dtype);
    e[i] = (extent){.data = halo__data(params[i]), .bytes = bytes, .index = i};
  }
  qsort(e, (size_t)n, sizeof *e, by_address);
  halo_status status = HALO_OK;
  for (int32_t i = 1; i < n && status == HALO_OK; i++) {
    if (e[i].bytes == 0 || e[i - 1].data + e[i - 1].bytes <= e[i].data) continue;
    const int32_t x = e[i - 1].index, y = e[i].index;
    status = halo__error(HALO_EARG,
                         "adamw: parameters %d and %d share memory; a tied weight is listed once",
                         x < y ? x : y, x < y ? y : x);
  }
  halo__free(e);
  return status;
}

/* Parameter i rounds moments with stream moment_stream + i: "moments", apart from streams of models. */
static const uint64_t moment_stream = 0x6d6f6d656e747300u;

/* The part of a flat buffer that belongs to parameter i, in its shape. */
static halo_status part(halo_tensor **out, const halo_adamw *o, halo_tensor *flat, int32_t i) {
  const halo_tensor *p = o->params[i];
  int64_t stride[HALO_MAX_DIMS], step = 1;
  for (int32_t d = p->ndim - 1; d >= 0; d--) {
    stride[d] = step;
    step *= p->shape[d];
  }
  return halo__view(out, flat, p->ndim, p->shape, stride, o->offset[i]);
}

static void *element(halo_tensor *flat, int64_t offset) {
  return flat == NULL ? NULL : (char *)halo__data(flat) + offset * halo_dtype_bytes(flat->dtype);
}

static halo_status flat_zeros(halo_tensor **out, const halo_adamw *o, halo_dtype t, int32_t tag) {
  const int64_t total = o->offset[o->n];
  halo_memory_push_tag(tag);
  halo_status status = halo_tensor_zeros(out, t, o->device, 1, &total);
  halo_memory_pop_tag();
  return status;
}

/* Masters start as exact copies of the parameters. */
static halo_status make_master(halo_adamw *o) {
  bool is_needed = false;
  for (int32_t i = 0; i < o->n; i++) is_needed |= o->params[i]->dtype == HALO_BF16;
  if (!is_needed) return HALO_OK;
  HALO_TRY(flat_zeros(&o->master, o, o->wide, HALO_TAG_OPTIMIZER));
  for (int32_t i = 0; i < o->n; i++) {
    halo_tensor *view = NULL;
    HALO_TRY(part(&view, o, o->master, i));
    halo_status status = halo_tensor_copy(view, o->params[i]);
    halo_tensor_free(view);
    HALO_TRY(status);
  }
  return HALO_OK;
}

/* Gradients the parameters already have are kept; from now on they live in the flat buffer. */
static halo_status adopt_grads(halo_adamw *o) {
  for (int32_t i = 0; i < o->n; i++) {
    halo_tensor *view = NULL;
    HALO_TRY(part(&view, o, o->grad, i));
    halo_status status = HALO_OK;
    if (o->params[i]->grad != NULL) status = halo_tensor_copy(view, o->params[i]->grad);
    if (status == HALO_OK) status = halo_tensor_set_grad(o->params[i], view);
    halo_tensor_free(view);
    HALO_TRY(status);
  }
  return HALO_OK;
}

halo_status halo_adamw_new(halo_adamw **out, halo_tensor *const *params, const double *decay,
                           int32_t n, int32_t moments) {
  HALO_CHECK(out != NULL && params != NULL && decay != NULL && n > 0, HALO_EARG,
             "adamw: needs at least one parameter, got %d", n);
  HALO_CHECK(moments == HALO_F32 || moments == HALO_BF16, HALO_EARG,
             "adamw: moments in dtype %d; f32 (the arithmetic type) or bf16", moments);
  HALO_TRY(check_params(params, n));
  HALO_CHECK(moments == HALO_F32 || params[0]->dtype != HALO_F64, HALO_EARG,
             "adamw: moments in bf16 beside parameters in f64");
  HALO_TRY(check_distinct(params, n));
  halo_status status = HALO_OK;
  halo_adamw *o = calloc(1, sizeof *o);
  HALO_CHECK(o != NULL, HALO_ENOMEM, "adamw: no memory");
  o->wide = halo__acc_dtype(params[0]->dtype);
  o->moments = moments == HALO_BF16 ? HALO_BF16 : o->wide;
  o->device = halo__device(params[0]);
  o->params = calloc((size_t)n, sizeof *o->params);
  o->decay = calloc((size_t)n, sizeof *o->decay);
  o->offset = calloc((size_t)n + 1, sizeof *o->offset);
  HALO_CHECK_GOTO(o->params != NULL && o->decay != NULL && o->offset != NULL, HALO_ENOMEM,
                  "adamw: no memory for %d parameters", n);
  o->n = n;
  for (int32_t i = 0; i < n; i++) {
    HALO_TRY_GOTO(halo_tensor_retain(&o->params[i], params[i]));
    o->decay[i] = decay[i];
    o->offset[i + 1] = o->offset[i] + halo_tensor_count(params[i]);
  }
  HALO_TRY_GOTO(flat_zeros(&o->grad, o, o->wide, HALO_TAG_GRADIENTS));
  HALO_TRY_GOTO(flat_zeros(&o->moment1, o, o->moments, HALO_TAG_OPTIMIZER));
  HALO_TRY_GOTO(flat_zeros(&o->moment2, o, o->moments, HALO_TAG_OPTIMIZER));
  HALO_TRY_GOTO(make_master(o));
  HALO_TRY_GOTO(adopt_grads(o));
  *out = o;
  return HALO_OK;
done:
  halo_adamw_free(o);
  return status;
}

void halo_adamw_free(halo_adamw *o) {
  if (o == NULL) return;
  for (int32_t i = 0; i < o->n; i++) halo_tensor_free(o->params[i]);
  halo_tensor_free(o->grad);
  halo_tensor_free(o->moment1);
  halo_tensor_free(o->moment2);
  halo_tensor_free(o->master);
  free(o->params);
  free(o->decay);
  free(o->offset);
  free(o);
}

halo_tensor *halo_adamw_flat_grad(const halo_adamw *o) { return o->grad; }
halo_tensor *halo_adamw_moment1(const halo_adamw *o) { return o->moment1; }
halo_tensor *halo_adamw_moment2(const halo_adamw *o) { return o->moment2; }
halo_tensor *halo_adamw_master(const halo_adamw *o) { return o->master; }

int64_t halo_adamw_offset(const halo_adamw *o, int32_t i) {
  return i >= 0 && i <= o->n ? o->offset[i] : -1;
}

halo_status halo_adamw_zero_grad(halo_adamw *o) { return halo_tensor_fill(o->grad, 0); }

halo_status halo_adamw_grad_norm2(halo_adamw *o, double *out) {
  return halo__kernels(o->device)->sum_squares(o->wide, out, halo__data(o->grad), o->offset[o->n]);
}

halo_status halo_adamw_step(halo_adamw *o, int64_t step, double lr, double beta1, double beta2,
                            double eps, double weight_decay, double grad_scale) {
  HALO_CHECK(step >= 1, HALO_EARG, "adamw_step: step is %lld, counts from 1", (long long)step);
  HALO_CHECK(lr >= 0 && beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1 && eps > 0 &&
                 weight_decay >= 0 && isfinite(lr) && isfinite(eps) && isfinite(weight_decay) &&
                 isfinite(grad_scale),
             HALO_EARG,
             "adamw_step: lr %g, betas %g %g, eps %g, decay %g, grad_scale %g: out of range", lr,
             beta1, beta2, eps, weight_decay, grad_scale);
  static _Thread_local int32_t span = -1;
  if (span < 0) span = halo_trace_id("optim.adamw");
  const int32_t token = halo_trace_begin(span);
  halo_status status = HALO_OK;
  for (int32_t i = 0; i < o->n && status == HALO_OK; i++) {
    halo_tensor *p = o->params[i];
    const halo_adamw_step_args args = {.lr = lr, .beta1 = beta1, .beta2 = beta2, .eps = eps,
                                       .weight_decay = weight_decay * o->decay[i],
                                       .grad_scale = grad_scale, .step = step,
                                       .stream = moment_stream + (uint64_t)i};
    const int64_t n = o->offset[i + 1] - o->offset[i], at = o->offset[i];
    const int64_t width = halo_dtype_bytes(o->wide), own = halo_dtype_bytes(p->dtype);
    const int64_t weights = o->master != NULL ? 2 * width + own : 2 * own;
    const int64_t moments = 4 * halo_dtype_bytes(o->moments);
    halo_trace_work((double)n * (double)(width + moments + weights), 0);
    status = halo__kernels(o->device)->adamw(p->dtype, halo__data(p), element(o->master, at),
                                             element(o->grad, at), o->moments,
                                             element(o->moment1, at), element(o->moment2, at), n,
                                             &args);
  }
  halo_trace_end(token);
  return status;
}
