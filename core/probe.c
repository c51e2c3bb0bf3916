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
 *   memory    logits of a chunk of (batch, head) units at a time, at most
 *             halo__probe_work_bytes
 *   device    the host computes; of q and k on a device the keys and the few rows come over
 */
#include "probe.h"
#include "ring.h"

#include <math.h>
#include <string.h>

/* Room for logits; small values make many chunks. Tests set it, nothing else does. */
int64_t halo__probe_work_bytes = INT64_C(256) << 20;

/* Work space is not zeroed: touching its pages twice would cost as much as the first kernel. */
static halo_status make_buffers(void ***out, const halo__probe_job *p, int64_t n, int64_t bytes,
                                bool is_zero) {
  int64_t total;
  HALO_CHECK(halo__mul(n, bytes, &total), HALO_ENOMEM, "probe: a buffer of %lld items is too large",
             (long long)n);
  void **buffers;
  HALO_TRY(halo__alloc_zero((void **)&buffers, p->here * (int64_t)sizeof *buffers, HALO_CPU));
  for (int32_t i = 0; i < p->here; i++) {
    halo_status status = (is_zero ? halo__alloc_zero : halo__alloc)(
        &buffers[i], total > 0 ? total : 1, HALO_CPU);
    if (status == HALO_OK)
      continue;
    halo__probe_free_buffers(buffers, p);
    return status;
  }
  *out = buffers;
  return HALO_OK;
}

halo_status halo__probe_buffers(void ***out, const halo__probe_job *p, int64_t n, int64_t bytes) {
  return make_buffers(out, p, n, bytes, true);
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
  HALO_CHECK(halo__device(q) == halo__device(k), HALO_EARG, "%s: q and k are on different devices",
             what);
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

/* The keys for the probe, which computes on the host: from a device they come over, once per call. */
static halo_status host_keys(halo_tensor **out, const halo_tensor *k) {
  if (halo__device(k) == HALO_CPU) return rows_contiguous(out, k);
  halo_tensor *host = NULL;
  HALO_TRY(halo_tensor_new(&host, (int32_t)k->dtype, HALO_CPU, k->ndim, k->shape));
  const halo_status status = halo_tensor_copy(host, k);
  if (status != HALO_OK) {
    halo_tensor_free(host);
    return status;
  }
  *out = host;
  return HALO_OK;
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
  return make_buffers(&p->z, p, p->chunk * tokens * p->lanes, bytes, false);
}

/* What the kernels need to know of each rank here. */
static void describe_ranks(halo__probe_job *p, const halo_tensor *q, double scale) {
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
        .start = p->start[i],
        .lanes = p->lanes,
        .q = p->q[i],
        .first = p->first,
        .last = p->last,
        .scale = scale,
        .z = p->z[i],
    };
  }
}

halo_status halo__probe_open(halo__probe_job *p, const char *what, const halo_tensor *q,
                             const halo_tensor *k, const halo_plan *plan, halo_ring *ring,
                             double scale, int64_t rows) {
  halo_status status = HALO_OK;
  *p = (halo__probe_job){0};
  HALO_TRY(check_inputs(what, q, k, plan, ring));
  p->comm = halo__ring_comm(ring);
  p->kernels = halo__kernels(HALO_CPU);
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
  HALO_TRY_GOTO(host_keys(&p->k, k));
  HALO_TRY_GOTO(allocate(p, q->shape[3]));
  describe_ranks(p, q, scale);
done:
  if (status != HALO_OK)
    halo__probe_close(p);
  return status;
}

void halo__probe_close(halo__probe_job *p) {
  halo_tensor_free(p->k);
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

/* Put one row of q (contiguous), widened into `row`, into lane l of a unit: element d at d*lanes+l.
 */
static halo_status place_row(halo__probe_job *p, int32_t i, int64_t u, int64_t l, halo_tensor *q,
                             int64_t local, halo_tensor *row) {
  const int64_t size = q->shape[3], bytes = halo_dtype_bytes(p->acc);
  const int64_t token = i * halo_layout_local_tokens(p->layout) + local;
  const int64_t at =
      u / q->shape[2] * q->stride[0] + token * q->stride[1] + u % q->shape[2] * q->stride[2];
  char *to = (char *)p->q[i] + (u * size * p->lanes + l) * bytes;
  halo_tensor *from = NULL;
  HALO_TRY(halo__view(&from, q, 1, &size, &q->stride[3], at));
  const halo_status status = halo_tensor_copy(row, from);
  halo_tensor_free(from);
  HALO_TRY(status);
  const char *values = halo__data(row);
  for (int64_t d = 0; d < size; d++) {
    memcpy(to + d * p->lanes * bytes, values + d * bytes, (size_t)bytes);
  }
  return HALO_OK;
}

halo_status halo__probe_gather(halo__probe_job *p, const halo_tensor *q_any) {
  halo_status status = HALO_OK;
  halo_tensor *q = NULL, *row = NULL;
  HALO_TRY_GOTO(rows_contiguous(&q, q_any));
  HALO_TRY_GOTO(halo_tensor_new(&row, (int32_t)p->acc, HALO_CPU, 1, &q->shape[3]));
  for (int64_t u = 0; u < p->units; u++) {
    for (int64_t l = 0; l < p->lanes; l++) {
      const int64_t token = p->token[u * p->lanes + l];
      if (token < 0)
        continue;
      int32_t owner;
      int64_t local;
      HALO_TRY_GOTO(halo_layout_locate(p->layout, token, &owner, &local));
      if (owner < p->rank || owner >= p->rank + p->here)
        continue;
      HALO_TRY_GOTO(place_row(p, owner - p->rank, u, l, q, local, row));
    }
  }
  status = halo_comm_all_reduce(p->comm, p->q, p->units * q->shape[3] * p->lanes, p->acc);
done:
  halo_tensor_free(row);
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
    HALO_TRY(p->kernels->probe_peak(p->peak[i], &p->local[i]));
  }
  HALO_TRY(halo_comm_all_reduce_max(p->comm, p->peak, n * p->lanes, p->acc));
  for (int32_t i = 0; i < p->here; i++) {
    HALO_TRY(p->kernels->probe_exp(p->sum[i], p->peak[i], &p->local[i]));
  }
  return HALO_OK;
}
