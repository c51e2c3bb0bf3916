/* op_index.c: gather, scatter, row selection, one-hot, sorting: ops whose second half is a tensor of
 * positions. Positions are data and count from 0; i64 or i32.
 *
 * Gradients of reading are additions at the same positions. They are summed in the arithmetic type
 * (fp32 for bf16) in ascending order of the index, so that a gradient repeats bit for bit whatever the
 * number of threads is, and narrowed once.
 */
#include "op.h"

#include <string.h>

/* Positions as contiguous i64. */
static halo_status positions(halo_tensor **out, const char *name, halo_tensor *index) {
  HALO_CHECK(index->dtype == HALO_I64 || index->dtype == HALO_I32, HALO_EARG,
             "%s: positions must be i64 or i32, got %s", name, halo__describe(index));
  if (index->dtype == HALO_I64) return halo__contiguous(out, index);
  halo_tensor *wide = NULL;
  HALO_TRY(halo_tensor_new(&wide, HALO_I64, halo_tensor_device(index), index->ndim, index->shape));
  halo_status status = halo_tensor_copy(wide, index);
  if (status != HALO_OK) {
    halo_tensor_free(wide);
    return status;
  }
  *out = wide;
  return HALO_OK;
}

/* The type in which the adding kernels keep their sums. */
static halo_dtype sum_dtype(halo_dtype t) {
  return halo__is_float(t) ? halo__acc_dtype(t) : HALO_I64;
}

/* Give *t the dtype wanted. */
static halo_status narrow(halo_tensor **t, halo_dtype dtype) {
  if ((*t)->dtype == dtype) return HALO_OK;
  halo_tensor *y = NULL;
  HALO_TRY(halo_tensor_new(&y, (int32_t)dtype, halo_tensor_device(*t), (*t)->ndim, (*t)->shape));
  halo_status status = halo_tensor_copy(y, *t);
  if (status != HALO_OK) {
    halo_tensor_free(y);
    return status;
  }
  halo_tensor_free(*t);
  *t = y;
  return HALO_OK;
}

/* New zeros in the shape of x and the summing type. */
static halo_status zeros_for_sums(halo_tensor **out, const halo_tensor *x) {
  return halo_tensor_zeros(out, (int32_t)sum_dtype(x->dtype), halo_tensor_device(x), x->ndim,
                           x->shape);
}

halo_status halo__scatter_grad(halo_tensor **out, const halo_tensor *x, const halo__along *a,
                               halo_tensor *dy, halo_tensor *index, int64_t m) {
  halo_tensor *dx = NULL, *dense = NULL;
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(zeros_for_sums(&dx, x));
  HALO_TRY_GOTO(halo__contiguous(&dense, dy));
  HALO_TRY_GOTO(halo__kernels_of(x)->scatter_add(dy->dtype, halo__data(dx), halo__data(dense),
                                                 halo__data(index), a->outer, a->n, m, a->inner));
  HALO_TRY_GOTO(narrow(&dx, x->dtype));
  *out = dx;
  dx = NULL;
done:
  halo_tensor_free(dx);
  halo_tensor_free(dense);
  return status;
}

/* ---- gather, scatter_add ------------------------------------------------------------------- */

/* index must have the sizes of x, but along the dim. */
static halo_status check_index_shape(const char *name, const halo_tensor *x,
                                     const halo_tensor *index, int32_t dim) {
  bool fits = x->ndim == index->ndim;
  for (int32_t d = 0; d < x->ndim && fits; d++) fits = d == dim || x->shape[d] == index->shape[d];
  HALO_CHECK(fits, HALO_EARG, "%s: index %s must have the sizes of %s, except along dim %d", name,
             halo__describe(index), halo__describe(x), dim);
  return HALO_OK;
}

/* y = x at the positions; contiguous i64 index. */
static halo_status gather(halo_tensor **out, halo_tensor *x, halo_tensor *index,
                          const halo__along *a) {
  halo_tensor *dense = NULL, *y = NULL;
  halo_status status = HALO_OK;
  const int64_t m = index->shape[a->dim];
  HALO_TRY_GOTO(halo__contiguous(&dense, x));
  HALO_TRY_GOTO(
      halo_tensor_new(&y, (int32_t)x->dtype, halo_tensor_device(x), index->ndim, index->shape));
  HALO_TRY_GOTO(halo__kernels_of(x)->gather(halo_dtype_bytes(x->dtype), halo__data(y),
                                            halo__data(dense), halo__data(index), a->outer, a->n, m,
                                            a->inner));
  *out = y;
  y = NULL;
done:
  halo_tensor_free(dense);
  halo_tensor_free(y);
  return status;
}

halo_status halo__gather_fwd(halo__call *c) {
  halo_tensor *x = c->in[0], *index = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, "gather", x, c->param[0]));
  HALO_TRY(check_index_shape("gather", x, c->in[1], a.dim));
  HALO_TRY(positions(&index, "gather", c->in[1]));
  c->drop_in[0] = true;
  halo_status status = gather(&c->out[0], x, index, &a);
  halo_tensor_free(index);
  return status;
}

halo_status halo__gather_bwd(halo__call *c) {
  halo_tensor *index = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, "gather", c->in[0], c->param[0]));
  HALO_TRY(positions(&index, "gather", c->in[1]));
  halo_status status = halo__scatter_grad(&c->grad_in[0], c->in[0], &a, c->grad_out[0], index,
                                          index->shape[a.dim]);
  halo_tensor_free(index);
  return status;
}

halo_status halo__scatter_add_fwd(halo__call *c) {
  halo_tensor *x = c->in[0], *source = c->in[2], *index = NULL, *dense = NULL, *y = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, "scatter_add", x, c->param[0]));
  HALO_TRY(check_index_shape("scatter_add", x, c->in[1], a.dim));
  HALO_CHECK(source->dtype == x->dtype && halo__same_shape(source, c->in[1]), HALO_EARG,
             "scatter_add: source %s must have the dtype of %s and the shape of index %s",
             halo__describe(source), halo__describe(x), halo__describe(c->in[1]));
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(positions(&index, "scatter_add", c->in[1]));
  HALO_TRY_GOTO(halo__contiguous(&dense, source));
  HALO_TRY_GOTO(halo_tensor_new(&y, (int32_t)sum_dtype(x->dtype), halo_tensor_device(x), x->ndim,
                                x->shape));
  HALO_TRY_GOTO(halo_tensor_copy(y, x));
  HALO_TRY_GOTO(halo__kernels_of(x)->scatter_add(x->dtype, halo__data(y), halo__data(dense),
                                                 halo__data(index), a.outer, a.n,
                                                 index->shape[a.dim], a.inner));
  HALO_TRY_GOTO(narrow(&y, x->dtype));
  c->out[0] = y;
  y = NULL;
  c->drop_in[0] = c->drop_in[2] = true;
done:
  halo_tensor_free(index);
  halo_tensor_free(dense);
  halo_tensor_free(y);
  return status;
}

halo_status halo__scatter_add_bwd(halo__call *c) {
  halo_tensor *dy = c->grad_out[0], *index = NULL;
  if (c->need_grad[0]) HALO_TRY(halo_tensor_retain(&c->grad_in[0], dy));
  if (!c->need_grad[2]) return HALO_OK;
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, "scatter_add", dy, c->param[0]));
  HALO_TRY(positions(&index, "scatter_add", c->in[1]));
  halo_status status = gather(&c->grad_in[2], dy, index, &a);
  halo_tensor_free(index);
  return status;
}

/* ---- rows ---------------------------------------------------------------------------------- */

halo_status halo__index_select_fwd(halo__call *c) {
  halo_tensor *x = c->in[0], *index = NULL, *dense = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, "index_select", x, c->param[0]));
  HALO_CHECK(c->in[1]->ndim == 1, HALO_EARG, "index_select: the index must have one dim, got %s",
             halo__describe(c->in[1]));
  halo_status status = HALO_OK;
  const int64_t m = c->in[1]->shape[0];
  HALO_TRY_GOTO(positions(&index, "index_select", c->in[1]));
  HALO_TRY_GOTO(halo__contiguous(&dense, x));
  HALO_TRY_GOTO(halo__new_along(&c->out[0], x->dtype, x, &a, m));
  halo__count_passes(c->out[0], 2);
  HALO_TRY_GOTO(halo__kernels_of(x)->take(halo_dtype_bytes(x->dtype), halo__data(c->out[0]),
                                          halo__data(dense), halo__data(index), a.outer, a.n, m,
                                          a.inner));
  c->drop_in[0] = true;
done:
  halo_tensor_free(index);
  halo_tensor_free(dense);
  return status;
}

halo_status halo__index_select_bwd(halo__call *c) {
  const halo_tensor *x = c->in[0];
  halo_tensor *index = NULL, *dy = NULL, *dx = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, "index_select", x, c->param[0]));
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(positions(&index, "index_select", c->in[1]));
  HALO_TRY_GOTO(halo__contiguous(&dy, c->grad_out[0]));
  HALO_TRY_GOTO(zeros_for_sums(&dx, x));
  HALO_TRY_GOTO(halo__kernels_of(x)->take_add(dy->dtype, halo__data(dx), halo__data(dy),
                                              halo__data(index), a.outer, a.n,
                                              halo_tensor_count(index), a.inner));
  HALO_TRY_GOTO(narrow(&dx, x->dtype));
  c->grad_in[0] = dx;
  dx = NULL;
done:
  halo_tensor_free(index);
  halo_tensor_free(dy);
  halo_tensor_free(dx);
  return status;
}

halo_status halo__one_hot_fwd(halo__call *c) {
  halo_tensor *x = c->in[0], *index = NULL;
  int64_t classes = 0, dtype = 0, shape[HALO_MAX_DIMS];
  HALO_TRY(halo__whole(&classes, "one_hot", "classes", c->param[0], 1, INT64_MAX));
  HALO_TRY(halo__whole(&dtype, "one_hot", "dtype", c->param[1], 0, HALO_DTYPE_COUNT - 1));
  HALO_CHECK(x->ndim < HALO_MAX_DIMS, HALO_EARG, "one_hot: %s has no room for one more dim",
             halo__describe(x));
  memcpy(shape, x->shape, sizeof shape);
  shape[x->ndim] = classes;
  HALO_TRY(positions(&index, "one_hot", x));
  halo_status status =
      halo_tensor_new(&c->out[0], (int32_t)dtype, halo_tensor_device(x), x->ndim + 1, shape);
  if (status == HALO_OK) {
    status = halo__kernels_of(x)->one_hot((halo_dtype)dtype, halo__data(c->out[0]),
                                          halo__data(index), halo_tensor_count(x), classes);
  }
  halo_tensor_free(index);
  return status;
}

/* ---- sorting ------------------------------------------------------------------------------- */

/* The first k along the dim; k < 0 means all. */
static halo_status sort_fwd(halo__call *c, const char *name, double dim, int64_t k,
                            bool is_descending) {
  halo_tensor *x = c->in[0], *dense = NULL;
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, name, x, dim));
  if (k < 0) k = a.n;
  HALO_CHECK(k <= a.n, HALO_EARG, "%s: k is %lld, %s has %lld along the dim", name, (long long)k,
             halo__describe(x), (long long)a.n);
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__contiguous(&dense, x));
  HALO_TRY_GOTO(halo__new_along(&c->out[0], x->dtype, x, &a, k));
  HALO_TRY_GOTO(halo__new_along(&c->out[1], HALO_I64, x, &a, k));
  halo__count_passes(x, 1);
  HALO_TRY_GOTO(halo__kernels_of(x)->sort(x->dtype, halo__data(c->out[0]), halo__data(c->out[1]),
                                          halo__data(dense), a.outer, a.n, a.inner, k,
                                          is_descending));
  c->drop_in[0] = true;
  if (c->wants_grad) status = halo_tensor_retain(&c->saved[0], c->out[1]);
done:
  halo_tensor_free(dense);
  return status;
}

static halo_status sort_bwd(halo__call *c, const char *name, double dim) {
  if (c->grad_out[0] == NULL) return HALO_OK;
  halo__along a = {0};
  HALO_TRY(halo__along_dim(&a, name, c->in[0], dim));
  return halo__scatter_grad(&c->grad_in[0], c->in[0], &a, c->grad_out[0], c->saved[0],
                            c->saved[0]->shape[a.dim]);
}

halo_status halo__topk_fwd(halo__call *c) {
  int64_t k = 0;
  HALO_TRY(halo__whole(&k, "topk", "k", c->param[0], 0, INT64_MAX));
  return sort_fwd(c, "topk", c->param[1], k, c->param[2] != 0);
}
halo_status halo__topk_bwd(halo__call *c) { return sort_bwd(c, "topk", c->param[1]); }

halo_status halo__sort_fwd(halo__call *c) {
  return sort_fwd(c, "sort", c->param[0], -1, c->param[1] != 0);
}
halo_status halo__sort_bwd(halo__call *c) { return sort_bwd(c, "sort", c->param[0]); }
