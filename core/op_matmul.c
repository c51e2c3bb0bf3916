/* op_matmul.c: matrix products with batch dims.
 *
 *   c[..., m, n] = a[..., m, k] b[..., k, n]       leading dims broadcast
 *   da = dc b^T, db = a^T dc                       summed over the dims that were repeated
 *
 * One function, multiply, adds a product of strided tensors to a target. What it spares:
 *   - a transposed view goes to BLAS as such; only layouts that BLAS cannot walk are copied
 *   - a batch of rows times one matrix is one tall product; the sum over a batch in a gradient is one
 *     product with a long inner dim
 *   - an operand repeated over the batch is not copied, and a gradient summed over it is accumulated
 *     in place (in fp32 for bf16), in batch order
 */
#include "nn.h"
#include "op.h"

#include <string.h>

/* One side of a product: a matrix per batch element. */
typedef struct matrices {
  halo_tensor *tensor; /* keeps the memory */
  halo_operand first;
  int64_t stride[HALO_MAX_DIMS]; /* over the batch dims of the result; 0 repeats */
} matrices;

/* The last two dims as BLAS sees them: row by row, or transposed; false if neither. */
static bool as_operand(halo_operand *out, const halo_tensor *t) {
  const int64_t rows = t->shape[t->ndim - 2], cols = t->shape[t->ndim - 1];
  const int64_t down = t->stride[t->ndim - 2], right = t->stride[t->ndim - 1];
  *out = (halo_operand){.data = halo__data(t), .dtype = t->dtype};
  if (halo_tensor_count(t) == 0) { // strides mean nothing, but BLAS checks ld
    out->ld = cols > 0 ? cols : 1;
    return true;
  }
  if ((right == 1 || cols <= 1) && (down >= cols || rows <= 1)) {
    out->ld = rows <= 1 ? cols : down;
    return true;
  }
  if ((down == 1 || rows <= 1) && (right >= rows || cols <= 1)) {
    out->transposed = 1;
    out->ld = cols <= 1 ? rows : right;
    return true;
  }
  return false;
}

static halo_status matrices_of(matrices *out, halo_tensor *t, int32_t batch_ndim) {
  matrices m = {0};
  if (as_operand(&m.first, t)) {
    HALO_TRY(halo_tensor_retain(&m.tensor, t));
  } else {
    HALO_TRY(halo__contiguous(&m.tensor, t));
    as_operand(&m.first, m.tensor);
  }
  for (int32_t d = 0; d < batch_ndim; d++) {
    const int32_t own = d - (batch_ndim - (t->ndim - 2));
    m.stride[d] = own < 0 || t->shape[own] == 1 ? 0 : m.tensor->stride[own];
  }
  *out = m;
  return HALO_OK;
}

/* Merge batch dims that all three step through evenly; returns how many are left. */
static int32_t merge_batch(int32_t ndim, int64_t *shape, matrices *c, matrices *a, matrices *b) {
  matrices *all[3] = {c, a, b};
  int32_t m = 0;
  for (int32_t d = 0; d < ndim; d++) {
    const int64_t size = shape[d];
    if (size == 1) continue;
    bool fits = m > 0;
    for (int32_t i = 0; i < 3; i++) {
      fits = fits && all[i]->stride[m - 1] == all[i]->stride[d] * size;
    }
    if (!fits) shape[m++] = 1;
    shape[m - 1] *= size;
    for (int32_t i = 0; i < 3; i++) all[i]->stride[m - 1] = all[i]->stride[d];
  }
  return m;
}

/* Turn a batch into rows (one b for all a) or into inner dim (one c for all). */
static bool fold_batch(halo_gemm *g, int64_t n, int64_t step_c, int64_t step_a, int64_t step_b) {
  const bool rows_follow = !g->a.transposed && step_a == g->m * g->a.ld && step_c == g->m * g->c.ld;
  if (step_b == 0 && rows_follow) {
    g->m *= n;
    return true;
  }
  const bool inner_follows = g->a.transposed && step_a == g->k * g->a.ld && !g->b.transposed &&
                             step_b == g->k * g->b.ld;
  if (step_c == 0 && inner_follows) {
    g->k *= n;
    return true;
  }
  return false;
}

/* c += a b, or c = a b when beta is 0. Batch dims of c, a and b are right-aligned to `batch`. */
static halo_status multiply(halo_tensor *c, halo_tensor *a, halo_tensor *b, int32_t batch_ndim,
                            const int64_t *batch, double beta) {
  matrices mc = {0}, ma = {0}, mb = {0};
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(matrices_of(&mc, c, batch_ndim));
  HALO_TRY_GOTO(matrices_of(&ma, a, batch_ndim));
  HALO_TRY_GOTO(matrices_of(&mb, b, batch_ndim));
  int64_t shape[HALO_MAX_DIMS];
  memcpy(shape, batch, sizeof shape);
  const int32_t dims = merge_batch(batch_ndim, shape, &mc, &ma, &mb);
  halo_gemm g = {.c = mc.first, .a = ma.first, .b = mb.first, .batch = 1, .alpha = 1, .beta = beta};
  g.m = a->shape[a->ndim - 2];
  g.k = a->shape[a->ndim - 1];
  g.n = b->shape[b->ndim - 1];
  const int32_t last = dims - 1;
  int64_t outer = 1;
  for (int32_t d = 0; d < last; d++) outer *= shape[d];
  bool is_sequential = false; // a shared c is added to one by one
  if (dims > 0) {
    const int64_t sc = mc.stride[last], sa = ma.stride[last], sb = mb.stride[last];
    if (!fold_batch(&g, shape[last], sc, sa, sb)) {
      is_sequential = sc == 0;
      g.batch = is_sequential ? 1 : shape[last];
      g.c.batch_stride = sc;
      g.a.batch_stride = sa;
      g.b.batch_stride = sb;
    }
  }
  const int64_t repeats = is_sequential ? shape[last] : 1;
  const int64_t bytes_c = halo_dtype_bytes(c->dtype), bytes = halo_dtype_bytes(a->dtype);
  for (int64_t i = 0; i < outer * repeats; i++) {
    int64_t rest = i / repeats, at[3] = {0, i % repeats * g.a.batch_stride,
                                         i % repeats * g.b.batch_stride};
    for (int32_t d = last - 1; d >= 0; d--) {
      at[0] += rest % shape[d] * mc.stride[d];
      at[1] += rest % shape[d] * ma.stride[d];
      at[2] += rest % shape[d] * mb.stride[d];
      rest /= shape[d];
    }
    halo_gemm one = g;
    one.c.data = (char *)g.c.data + at[0] * bytes_c;
    one.a.data = (char *)g.a.data + at[1] * bytes;
    one.b.data = (char *)g.b.data + at[2] * bytes;
    HALO_TRY_GOTO(halo__gemm(halo__device(c), &one));
  }
done:
  halo_tensor_free(mc.tensor);
  halo_tensor_free(ma.tensor);
  halo_tensor_free(mb.tensor);
  return status;
}

/* Batch shape of a and b: their leading dims, broadcast. */
static halo_status batch_of(int32_t *ndim_out, int64_t *shape, const halo_tensor *a,
                            const halo_tensor *b) {
  const int32_t na = a->ndim - 2, nb = b->ndim - 2, ndim = na > nb ? na : nb;
  for (int32_t d = 0; d < ndim; d++) {
    const int64_t sa = d < ndim - na ? 1 : a->shape[d - (ndim - na)];
    const int64_t sb = d < ndim - nb ? 1 : b->shape[d - (ndim - nb)];
    HALO_CHECK(sa == sb || sa == 1 || sb == 1, HALO_EARG, "matmul: batch dims do not fit: %s and %s",
               halo__describe(a), halo__describe(b));
    shape[d] = sa == 1 ? sb : sa;
  }
  *ndim_out = ndim;
  return HALO_OK;
}

halo_status halo__matmul_fwd(halo__call *c) {
  halo_tensor *a = c->in[0], *b = c->in[1];
  HALO_CHECK(a->dtype == b->dtype && halo__is_float(a->dtype), HALO_EARG,
             "matmul: needs two tensors of one floating dtype, got %s and %s", halo__describe(a),
             halo__describe(b));
  HALO_CHECK(a->ndim >= 2 && b->ndim >= 2 && a->shape[a->ndim - 1] == b->shape[b->ndim - 2],
             HALO_EARG, "matmul: %s and %s do not fit; [..,m,k] and [..,k,n] are wanted",
             halo__describe(a), halo__describe(b));
  int64_t shape[HALO_MAX_DIMS];
  int32_t ndim = 0;
  HALO_TRY(batch_of(&ndim, shape, a, b));
  shape[ndim] = a->shape[a->ndim - 2];
  shape[ndim + 1] = b->shape[b->ndim - 1];
  HALO_TRY(halo_tensor_new(&c->out[0], (int32_t)a->dtype, halo_tensor_device(a), ndim + 2, shape));
  c->drop_in[0] = !c->need_grad[1];
  c->drop_in[1] = !c->need_grad[0];
  return multiply(c->out[0], a, b, ndim, shape, 0);
}

/* A view with the last two dims exchanged. */
static halo_status transposed(halo_tensor **out, halo_tensor *t) {
  int64_t shape[HALO_MAX_DIMS], stride[HALO_MAX_DIMS];
  memcpy(shape, t->shape, sizeof shape);
  memcpy(stride, t->stride, sizeof stride);
  const int32_t i = t->ndim - 2, j = t->ndim - 1;
  shape[i] = t->shape[j];
  shape[j] = t->shape[i];
  stride[i] = t->stride[j];
  stride[j] = t->stride[i];
  return halo__view(out, t, t->ndim, shape, stride, 0);
}

/* grad_in[i] = a b, summed over the batch dims that in[i] does not have. */
static halo_status product_grad(halo__call *c, int32_t i, halo_tensor *a, halo_tensor *b) {
  const halo_tensor *dy = c->grad_out[0], *x = c->in[i];
  // Where batches are summed, bf16 would lose addends.
  bool is_summed = false;
  for (int32_t d = 0; d < dy->ndim - 2; d++) {
    const int32_t own = d - (dy->ndim - x->ndim);
    is_summed |= dy->shape[d] != 1 && (own < 0 || x->shape[own] == 1);
  }
  const halo_dtype dtype = is_summed ? halo__acc_dtype(x->dtype) : x->dtype;
  HALO_TRY((is_summed ? halo_tensor_zeros : halo_tensor_new)(
      &c->grad_in[i], (int32_t)dtype, halo_tensor_device(x), x->ndim, x->shape));
  HALO_TRY(multiply(c->grad_in[i], a, b, dy->ndim - 2, dy->shape, is_summed ? 1 : 0));
  return halo__narrow_grad(c, i);
}

halo_status halo__matmul_bwd(halo__call *c) {
  halo_tensor *dy = c->grad_out[0], *t = NULL;
  if (c->need_grad[0]) {
    HALO_TRY(transposed(&t, c->in[1]));
    halo_status status = product_grad(c, 0, dy, t);
    halo_tensor_free(t);
    HALO_TRY(status);
  }
  if (c->need_grad[1]) {
    HALO_TRY(transposed(&t, c->in[0]));
    halo_status status = product_grad(c, 1, t, dy);
    halo_tensor_free(t);
    HALO_TRY(status);
  }
  return HALO_OK;
}
