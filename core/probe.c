/* probe.c: dense attention of a few query rows over the ring.
 *
 * Selection asks which keys the last queries look at, recall asks how much of a row's attention a
 * plan keeps. Both need exp(q.k - max) of a few rows against every key, and nothing of the size of
 * the sequence may travel: the rows go to the keys. They are gathered to all ranks (64 rows x heads
 * x D), each rank scores its own keys, the row maximum is reduced over ranks, and sums are kept per
 * key block, so that whoever adds them can do it in global block order and get the bits of one
 * rank.
 *
 *   gather    buffers of zeros with the own rows filled, summed over ranks: x + 0 = x, exact
 *   maximum   exact in any order
 *   device    kernels run where q and k are; rows, peaks and sums are copied to the host between them,
 *             where they travel and are chosen from: a few hundred bytes a key block and unit. (Picking
 *             the best on the device would spare the scores' way; it has not been the bottleneck.)
 *   memory    logits of a chunk of (batch, head) units at a time, at most
 *             halo__probe_work_bytes
 */
#include "probe.h"
#include "ring.h"

#include <math.h>
#include <string.h>

/* Room for logits; small values make many chunks. Tests set it, nothing else does. */
int64_t halo__probe_work_bytes = INT64_C(256) << 20;

/* Work space is not zeroed: touching its pages twice would cost as much as the first kernel. */
static halo_status make_buffers(void ***out, const halo__probe_job *p, int64_t n, int64_t bytes,
                                halo_device device, bool is_zero) {
  int64_t total;
  HALO_CHECK(halo__mul(n, bytes, &total), HALO_ENOMEM, "probe: a buffer of %lld items is too large",
             (long long)n);
  void **buffers;
  HALO_TRY(halo__alloc_zero((void **)&buffers, p->here * (int64_t)sizeof *buffers, HALO_CPU));
  for (int32_t i = 0; i < p->here; i++) {
    halo_status status = (is_zero ? halo__alloc_zero : halo__alloc)(
        &buffers[i], total > 0 ? total : 1, device);
    if (status == HALO_OK)
      continue;
    halo__probe_free_buffers(buffers, p);
    return status;
  }
  *out = buffers;
  return HALO_OK;
}

halo_status halo__probe_buffers(void ***out, const halo__probe_job *p, int64_t n, int64_t bytes) {
  return make_buffers(out, p, n, bytes, HALO_CPU, true);
}

void halo__probe_free_buffers(void **buffers, const halo__probe_job *p) {
  if (!buffers)
    return;
  for (int32_t i = 0; i < p->here; i++)
    halo__free(buffers[i]);
  halo__free(buffers);
}

static halo_status check_inputs(const char *what, const halo_tensor *q, const halo_tensor *k,
                                const halo_plan *plan, const halo_ring *ring) {
  HALO_CHECK(q && k && plan && ring, HALO_EARG, "%s: q, k, plan or ring is NULL", what);
  HALO_CHECK(q->ndim == 4 && k->ndim == 4, HALO_EARG,
             "%s: q is %s and k is %s, wanted [B,T,H,D] and [B,T,Hk,D]", what, halo__describe(q),
             halo__describe(k));
  HALO_CHECK(halo__is_float(q->dtype) && q->dtype == k->dtype, HALO_EARG,
             "%s: q is %s and k is %s, wanted one floating dtype", what, halo__describe(q),
             halo__describe(k));
  HALO_CHECK(halo__device(q) == halo__device(k), HALO_EARG, "%s: q and k must be on one device", what);
  HALO_CHECK(halo_ring_world(ring) == plan->layout.world, HALO_EARG,
             "%s: the ring has %d ranks, the plan's layout %d", what, halo_ring_world(ring),
             plan->layout.world);
  const int64_t tokens = halo_ring_here(ring) * halo_layout_local_tokens(&plan->layout);
  HALO_CHECK(q->shape[0] == plan->n_batch && q->shape[2] == plan->n_heads && q->shape[1] == tokens,
             HALO_EARG, "%s: q is %s, but plan and ring have [%lld,%lld,%lld,D]", what,
             halo__describe(q), (long long)plan->n_batch, (long long)tokens,
             (long long)plan->n_heads);
  HALO_CHECK(k->shape[0] == q->shape[0] && k->shape[1] == tokens && k->shape[3] == q->shape[3] &&
                 k->shape[2] > 0 && q->shape[2] % k->shape[2] == 0,
             HALO_EARG, "%s: k is %s beside q %s, wanted [B,T,Hk,D] with Hk dividing H", what,
             halo__describe(k), halo__describe(q));
  return HALO_OK;
}

/* The tensor itself (retained) if its innermost dimension is contiguous, else a copy. */
static halo_status rows_contiguous(halo_tensor **out, const halo_tensor *t) {
  halo_tensor *borrowed = (halo_tensor *)t; /* retaining changes only the count */
  if (t->stride[3] == 1 || t->shape[3] == 1)
    return halo_tensor_retain(out, borrowed);
  return halo__contiguous(out, borrowed);
}

static halo_status allocate(halo__probe_job *p, int64_t size) {
  const int64_t bytes = halo_dtype_bytes(p->acc), lanes = p->units * p->lanes;
  const int64_t n_blocks = p->layout->per_rank, tokens = halo_layout_local_tokens(p->layout);
  const int64_t padded = (p->chunk + p->world - 1) / p->world * p->world;
  HALO_TRY(halo__scratch((void **)&p->token, lanes, sizeof *p->token));
  HALO_TRY(halo__scratch((void **)&p->first, lanes, sizeof *p->first));
  HALO_TRY(halo__scratch((void **)&p->last, lanes, sizeof *p->last));
  HALO_TRY(halo__alloc_zero((void **)&p->local, p->here * (int64_t)sizeof *p->local, HALO_CPU));
  HALO_TRY(halo__probe_buffers((void ***)&p->start, p, n_blocks, sizeof **p->start));
  HALO_TRY(halo__probe_buffers(&p->q, p, lanes * size, bytes));
  HALO_TRY(halo__probe_buffers(&p->peak, p, p->chunk * p->lanes, bytes));
  HALO_TRY(halo__probe_buffers(&p->sum, p, padded * n_blocks * p->lanes, bytes));
  if (p->device == HALO_CPU) {
    HALO_TRY(make_buffers(&p->z, p, p->chunk * tokens * p->lanes, bytes, HALO_CPU, false));
    p->there_q = p->q;
    p->there_peak = p->peak;
    p->there_sum = p->sum;
    p->there_z = p->z;
    p->there_start = (void **)p->start;
    p->there_first = p->first;
    p->there_last = p->last;
    return HALO_OK;
  }
  HALO_TRY(make_buffers(&p->there_start, p, n_blocks, sizeof **p->start, p->device, false));
  HALO_TRY(make_buffers(&p->there_q, p, lanes * size, bytes, p->device, false));
  HALO_TRY(make_buffers(&p->there_peak, p, p->chunk * p->lanes, bytes, p->device, false));
  HALO_TRY(make_buffers(&p->there_sum, p, padded * n_blocks * p->lanes, bytes, p->device, false));
  HALO_TRY(make_buffers(&p->there_z, p, p->chunk * tokens * p->lanes, bytes, p->device, false));
  const int64_t lane_bytes = (lanes > 0 ? lanes : 1) * (int64_t)sizeof *p->first;
  HALO_TRY(halo__alloc((void **)&p->there_first, lane_bytes, p->device));
  return halo__alloc((void **)&p->there_last, lane_bytes, p->device);
}

/* What the kernels need to know of each rank here. */
static halo_status describe_ranks(halo__probe_job *p, const halo_tensor *q, double scale) {
  const halo_layout *l = p->layout;
  const int64_t tokens = halo_layout_local_tokens(l);
  const halo_tensor *k = p->k;
  for (int32_t i = 0; i < p->here; i++) {
    for (int64_t b = 0; b < l->per_rank; b++) {
      p->start[i][b] = (int32_t)(halo__layout_block_global(l, p->rank + i, b) * l->block);
    }
    p->local[i] = (halo_probe){
        .t = k->dtype,
        .k = (const char *)halo__data(k) + i * tokens * k->stride[1] * halo_dtype_bytes(k->dtype),
        .stride = {k->stride[0], k->stride[1], k->stride[2]},
        .heads = q->shape[2],
        .kv_heads = k->shape[2],
        .size = k->shape[3],
        .n_blocks = l->per_rank,
        .block = l->block,
        .start = p->there_start[i],
        .lanes = p->lanes,
        .q = p->there_q[i],
        .first = p->there_first,
        .last = p->there_last,
        .scale = scale,
        .z = p->there_z[i],
    };
    if (p->device == HALO_CPU) continue;
    HALO_TRY(p->kernels->copy_in(p->there_start[i], p->start[i],
                                 l->per_rank * (int64_t)sizeof **p->start));
  }
  return HALO_OK;
}

halo_status halo__probe_open(halo__probe_job *p, const char *what, const halo_tensor *q,
                             const halo_tensor *k, const halo_plan *plan, halo_ring *ring,
                             double scale, int64_t rows) {
  halo_status status = HALO_OK;
  *p = (halo__probe_job){0};
  HALO_TRY(check_inputs(what, q, k, plan, ring));
  p->comm = halo__ring_comm(ring);
  p->device = halo__device(q);
  p->kernels = halo__kernels(p->device);
  p->layout = &plan->layout;
  p->here = halo_ring_here(ring);
  p->rank = halo_ring_rank(ring);
  p->world = halo_ring_world(ring);
  p->units = plan->n_batch * plan->n_heads;
  p->lanes = (rows + HALO_PROBE_LANES - 1) / HALO_PROBE_LANES * HALO_PROBE_LANES;
  p->acc = halo__acc_dtype(q->dtype);
  const int64_t unit_bytes =
      halo_layout_local_tokens(p->layout) * p->lanes * halo_dtype_bytes(p->acc) * p->here;
  p->chunk = halo__probe_work_bytes / unit_bytes;
  if (p->chunk < 1)
    p->chunk = 1;
  if (p->chunk > p->units)
    p->chunk = p->units;
  HALO_TRY_GOTO(rows_contiguous(&p->k, k));
  HALO_TRY_GOTO(allocate(p, q->shape[3]));
  HALO_TRY_GOTO(describe_ranks(p, q, scale));
done:
  if (status != HALO_OK)
    halo__probe_close(p);
  return status;
}

void halo__probe_close(halo__probe_job *p) {
  halo_tensor_free(p->k);
  if (p->device != HALO_CPU) {
    halo__probe_free_buffers(p->there_start, p);
    halo__probe_free_buffers(p->there_q, p);
    halo__probe_free_buffers(p->there_peak, p);
    halo__probe_free_buffers(p->there_sum, p);
    halo__probe_free_buffers(p->there_z, p);
    halo__free(p->there_first);
    halo__free(p->there_last);
  }
  halo__free(p->token);
  halo__free(p->first);
  halo__free(p->last);
  halo__free(p->local);
  halo__probe_free_buffers((void **)p->start, p);
  halo__probe_free_buffers(p->q, p);
  halo__probe_free_buffers(p->peak, p);
  halo__probe_free_buffers(p->sum, p);
  halo__probe_free_buffers(p->z, p);
  *p = (halo__probe_job){0};
}

/* q itself (retained) if it is made of whole rows of D elements, else a contiguous copy. */
static halo_status whole_rows(halo_tensor **out, const halo_tensor *q) {
  halo_tensor *borrowed = (halo_tensor *)q; /* retaining changes only the count */
  const int64_t *s = q->stride, size = q->shape[3];
  if ((s[3] == 1 || size == 1) && s[0] % size == 0 && s[1] % size == 0 && s[2] % size == 0) {
    return halo_tensor_retain(out, borrowed);
  }
  return halo__contiguous(out, borrowed);
}

/* Which rank here has the row of lane `at` (unit * lanes + lane), -1: none, and which of the rows of D
 * elements from q's first on it is. */
static halo_status find_row(const halo__probe_job *p, int64_t at, const halo_tensor *q, int32_t *here,
                            int64_t *row) {
  *here = -1;
  if (p->token[at] < 0) return HALO_OK;
  int32_t owner;
  int64_t local;
  HALO_TRY(halo_layout_locate(p->layout, p->token[at], &owner, &local));
  if (owner < p->rank || owner >= p->rank + p->here) return HALO_OK;
  *here = owner - p->rank;
  const int64_t u = at / p->lanes, token = *here * halo_layout_local_tokens(p->layout) + local;
  *row = (u / q->shape[2] * q->stride[0] + token * q->stride[1] + u % q->shape[2] * q->stride[2]) /
         q->shape[3];
  return HALO_OK;
}

/* A row of arithmetic type into lane l of unit u: element d at d * lanes + l. */
static void place_row(const halo__probe_job *p, int32_t i, int64_t at, const char *row, int64_t size) {
  const int64_t bytes = halo_dtype_bytes(p->acc), u = at / p->lanes, l = at % p->lanes;
  char *to = (char *)p->q[i] + (u * size * p->lanes + l) * bytes;
  for (int64_t d = 0; d < size; d++) {
    memcpy(to + d * p->lanes * bytes, row + d * bytes, (size_t)bytes);
  }
}

/* Rows `index` [n] of q to host memory in arithmetic type, by way of the device. */
static halo_status read_rows(const halo__probe_job *p, char *rows, const halo_tensor *q,
                             const int64_t *index, int64_t n) {
  const int64_t size = q->shape[3], count = n * size;
  int64_t *there = NULL, last = 0;
  void *taken = NULL, *wide = NULL;
  halo_status status = HALO_OK;
  if (count == 0) return HALO_OK;
  for (int64_t i = 0; i < n; i++) last = index[i] > last ? index[i] : last;
  HALO_TRY_GOTO(halo__alloc((void **)&there, n * (int64_t)sizeof *there, p->device));
  HALO_TRY_GOTO(halo__alloc(&taken, count * halo_dtype_bytes(q->dtype), p->device));
  HALO_TRY_GOTO(halo__alloc(&wide, count * halo_dtype_bytes(p->acc), p->device));
  HALO_TRY_GOTO(p->kernels->copy_in(there, index, n * (int64_t)sizeof *there));
  HALO_TRY_GOTO(p->kernels->take(halo_dtype_bytes(q->dtype), taken, halo__data(q), there, 1,
                                 last + 1, n, size));
  HALO_TRY_GOTO(p->kernels->convert(wide, p->acc, taken, q->dtype, count));
  status = p->kernels->copy_out(rows, wide, count * halo_dtype_bytes(p->acc));
done:
  halo__free(there);
  halo__free(taken);
  halo__free(wide);
  return status;
}

halo_status halo__probe_gather(halo__probe_job *p, const halo_tensor *q_any) {
  halo_status status = HALO_OK;
  const int64_t lanes = p->units * p->lanes, size = q_any->shape[3], bytes = halo_dtype_bytes(p->acc);
  halo_tensor *q = NULL;
  char *rows = NULL;
  int64_t *index = NULL, n = 0;
  HALO_TRY_GOTO(whole_rows(&q, q_any));
  HALO_TRY_GOTO(halo__scratch((void **)&index, lanes, sizeof *index));
  for (int64_t at = 0; at < lanes; at++) {
    int32_t here;
    HALO_TRY_GOTO(find_row(p, at, q, &here, &index[n]));
    if (here >= 0) n++;
  }
  HALO_TRY_GOTO(halo__scratch((void **)&rows, n * size, bytes));
  HALO_TRY_GOTO(read_rows(p, rows, q, index, n));
  n = 0;
  for (int64_t at = 0; at < lanes; at++) {
    int32_t here;
    int64_t row;
    HALO_TRY_GOTO(find_row(p, at, q, &here, &row));
    if (here >= 0) place_row(p, here, at, rows + n++ * size * bytes, size);
  }
  HALO_TRY_GOTO(halo_comm_all_reduce(p->comm, p->q, lanes * size, p->acc));
  for (int32_t i = 0; i < p->here && p->device != HALO_CPU; i++) {
    HALO_TRY_GOTO(p->kernels->copy_in(p->there_q[i], p->q[i], lanes * size * bytes));
  }
  if (p->device != HALO_CPU) {
    const int64_t lane_bytes = lanes * (int64_t)sizeof *p->first;
    HALO_TRY_GOTO(p->kernels->copy_in(p->there_first, p->first, lane_bytes));
    HALO_TRY_GOTO(p->kernels->copy_in(p->there_last, p->last, lane_bytes));
  }
done:
  halo__free(rows);
  halo__free(index);
  halo_tensor_free(q);
  return status;
}

halo_status halo__probe_exponentials(halo__probe_job *p, int64_t unit, int64_t n) {
  assert(n <= p->chunk && unit + n <= p->units);
  for (int32_t i = 0; i < p->here; i++) {
    p->local[i].unit = unit;
    p->local[i].n_units = n;
    for (int64_t l = 0; l < n * p->lanes; l++) {
      if (p->acc == HALO_F64) {
        ((double *)p->peak[i])[l] = -INFINITY;
      } else {
        ((float *)p->peak[i])[l] = -INFINITY;
      }
    }
    const int64_t bytes = n * p->lanes * halo_dtype_bytes(p->acc);
    const bool is_there = p->device != HALO_CPU;
    if (is_there) HALO_TRY(p->kernels->copy_in(p->there_peak[i], p->peak[i], bytes));
    HALO_TRY(p->kernels->probe_peak(p->there_peak[i], &p->local[i]));
    if (is_there) HALO_TRY(p->kernels->copy_out(p->peak[i], p->there_peak[i], bytes));
  }
  HALO_TRY(halo_comm_all_reduce_max(p->comm, p->peak, n * p->lanes, p->acc));
  for (int32_t i = 0; i < p->here; i++) {
    const int64_t bytes = n * p->lanes * halo_dtype_bytes(p->acc);
    const bool is_there = p->device != HALO_CPU;
    if (is_there) HALO_TRY(p->kernels->copy_in(p->there_peak[i], p->peak[i], bytes));
    HALO_TRY(p->kernels->probe_exp(p->there_sum[i], p->there_peak[i], &p->local[i]));
    if (is_there) {
      HALO_TRY(p->kernels->copy_out(p->sum[i], p->there_sum[i], bytes * p->layout->per_rank));
    }
  }
  return HALO_OK;
}

halo_status halo__probe_fetch(halo__probe_job *p) {
  if (p->device == HALO_CPU) return HALO_OK;
  const int64_t each = halo_layout_local_tokens(p->layout) * p->lanes, bytes = halo_dtype_bytes(p->acc);
  if (p->z == NULL) HALO_TRY(make_buffers(&p->z, p, p->chunk * each, bytes, HALO_CPU, false));
  for (int32_t i = 0; i < p->here; i++) {
    HALO_TRY(p->kernels->copy_out(p->z[i], p->there_z[i], p->local[i].n_units * each * bytes));
  }
  return HALO_OK;
}

halo_status halo__probe_score(halo__probe_job *p, int32_t i, void *score, int64_t bytes,
                              const void *weight, int64_t weight_bytes) {
  if (p->device == HALO_CPU) return p->kernels->probe_score(score, weight, &p->local[i]);
  char *there;
  const int64_t at = (bytes + 255) / 256 * 256; // of the weights
  HALO_TRY(halo__alloc((void **)&there, at + weight_bytes, p->device));
  halo_status status = p->kernels->copy_in(there + at, weight, weight_bytes);
  if (status == HALO_OK) status = p->kernels->probe_score(there, there + at, &p->local[i]);
  if (status == HALO_OK) status = p->kernels->copy_out(score, there, bytes);
  halo__free(there);
  return status;
}
