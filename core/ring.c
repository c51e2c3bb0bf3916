/* ring.c: run a schedule over a communicator.
 *
 * The tables of schedule.c say everything; this file owns the buffers they talk about and executes
 * row after row, for all ranks of this process in lockstep: row k of every rank here, then row k +
 * 1. With one rank a process (self, MPI) that is the usual ring, with W in one process (local) it
 * is the same code on the same tables, deterministic and open to a debugger.
 *
 * Buffers belong to the ring and are kept: a slot is K then V of one rank in one piece (one message
 * a hop; at long contexts on many ranks a hop is bound by latency, distributed.md 2.4), in the
 * dtype of the keys; dKV slots are fp32 (fp64 for fp64). They grow to the largest shape seen.
 *
 * When a pass fails half-way, messages of other ranks may still arrive in these buffers. The ring
 * is then spent: it refuses further passes and never frees the buffers if processes are involved;
 * the error is for the caller to end the job with.
 */
#include "ring.h"

#include <assert.h>

#include "kernels.h"
#include "schedule.h"

/* A growing block; `each` bytes of it for each rank here. */
typedef struct arena {
  char *data;
  int64_t bytes, each;
  halo_device device;
} arena;

struct halo_ring {
  int32_t references;
  halo_comm *comm;
  halo_schedule kind;
  int32_t inner;
  int32_t here;
  halo__schedule **forward, **backward; /* [here] */
  int32_t n_events;
  halo__pending **pending;              /* [n_events] of the longer table; the last: columns */
  halo__transfer *transfers;            /* [2 * here] */
  arena buffers[HALO__RING_BUFFERS];
  bool is_spent;
};

halo_comm *halo__ring_comm(const halo_ring *r) { return r->comm; }
int32_t halo_ring_world(const halo_ring *r) { return halo_comm_size(r->comm); }
int32_t halo_ring_here(const halo_ring *r) { return r->here; }
int32_t halo_ring_rank(const halo_ring *r) { return halo_comm_rank(r->comm); }
int32_t halo_ring_steps(const halo_ring *r) { return r->forward[0]->n_steps; }

halo_status halo_ring_new(halo_ring **out, halo_comm *c, int32_t schedule, int32_t inner) {
  HALO_CHECK(c != NULL, HALO_EARG, "ring_new: the communicator is NULL");
  int32_t world = halo_comm_size(c), rank = halo_comm_rank(c), here = halo_comm_here(c);
  HALO_TRY(halo_ring_check(schedule, world, inner));
  halo_ring *r;
  HALO_TRY(halo__alloc_zero((void **)&r, (int64_t)sizeof *r, HALO_CPU));
  halo_status status = HALO_OK;
  *r = (halo_ring){
      .references = 1, .comm = c, .kind = (halo_schedule)schedule, .inner = inner, .here = here};
  int64_t table_bytes = here * (int64_t)sizeof *r->forward;
  HALO_TRY_GOTO(halo__alloc_zero((void **)&r->forward, table_bytes, HALO_CPU));
  HALO_TRY_GOTO(halo__alloc_zero((void **)&r->backward, table_bytes, HALO_CPU));
  for (int32_t i = 0; i < here; i++) {
    HALO_TRY_GOTO(halo__schedule_new(&r->forward[i], schedule, world, inner, rank + i, false));
    HALO_TRY_GOTO(halo__schedule_new(&r->backward[i], schedule, world, inner, rank + i, true));
  }
  r->n_events = r->backward[0]->n_events + 1;
  HALO_TRY_GOTO(halo__alloc_zero((void **)&r->pending, r->n_events * (int64_t)sizeof *r->pending,
                                 HALO_CPU));
  HALO_TRY_GOTO(halo__scratch((void **)&r->transfers, 2 * (int64_t)here, sizeof *r->transfers));
  *out = r;
  return HALO_OK;
done:
  halo_ring_free(r);
  return status;
}

halo_ring *halo__ring_retain(halo_ring *r) {
  r->references++;
  return r;
}

void halo_ring_free(halo_ring *r) {
  if (r == NULL || --r->references > 0) return;
  for (int32_t i = 0; i < r->here; i++) {
    if (r->forward != NULL) halo__schedule_free(r->forward[i]);
    if (r->backward != NULL) halo__schedule_free(r->backward[i]);
  }
  halo__free(r->forward);
  halo__free(r->backward);
  halo__free(r->pending);
  halo__free(r->transfers);
  for (int32_t i = 0; i < HALO__RING_BUFFERS && !r->is_spent; i++) halo__free(r->buffers[i].data);
  halo__free(r);
}

int32_t halo_ring_source(const halo_ring *r, int32_t rank, int32_t step) {
  int32_t world = halo_ring_world(r);
  if (rank < 0 || rank >= world || step < 0 || step >= world) return -1;
  if (r->kind != HALO_SCHEDULE_HIERARCHICAL) return (rank - step + world) % world;
  int32_t L = r->inner, M = world / L;
  return (rank / L - step / L + M) % M * L + (rank % L - step % L + L) % L;
}

int64_t halo_ring_explain(const halo_ring *r, char *text, int64_t capacity) {
  int64_t length = halo__schedule_explain(r->forward[0], text, capacity);
  bool fits = length < capacity;
  return length + halo__schedule_explain(r->backward[0], fits ? text + length : text + capacity,
                                         fits ? capacity - length : 0);
}

/* ---- running -------------------------------------------------------------------------------- */

enum { ALIGNMENT = 256 }; /* of slots: cache lines, and what bulk copies of devices ask for */

static int64_t aligned(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

halo_status halo__ring_reserve(halo_ring *r, halo__ring_buffer_id id, int64_t bytes,
                               halo_device device) {
  arena *a = &r->buffers[id];
  int64_t total;
  a->each = aligned(bytes);
  HALO_CHECK(halo__mul(a->each, r->here, &total), HALO_EARG, "ring: a buffer of %lld bytes a rank",
             (long long)bytes);
  if (total <= a->bytes && a->device == device) return HALO_OK;
  halo__free(a->data);
  a->data = NULL;
  a->bytes = 0;
  a->device = device;
  halo_memory_push_tag(HALO_TAG_RING);
  halo_status status = halo__alloc((void **)&a->data, total, device);
  halo_memory_pop_tag();
  if (status == HALO_OK) a->bytes = total;
  return status;
}

void *halo__ring_buffer(const halo_ring *r, halo__ring_buffer_id id, int32_t here) {
  return r->buffers[id].data + here * r->buffers[id].each;
}

halo_status halo__ring_post_columns(halo_ring *r, const halo__transfer *transfers, int64_t n) {
  halo__pending **pending = &r->pending[r->n_events - 1];
  assert(*pending == NULL);
  return halo__comm_post(pending, r->comm, HALO__CHANNEL_COLUMNS, transfers, n);
}

halo_status halo__ring_wait_columns(halo_ring *r) {
  return halo__comm_wait(r->comm, &r->pending[r->n_events - 1]);
}

/* What the rows of one pass work on. */
typedef struct run {
  halo_ring *ring;
  const halo__ring_pass *pass;
  halo__schedule *const *tables; /* [here] */
  int64_t kv_stride, dkv_stride; /* bytes from slot to slot */
} run;

static char *kv_slot(const run *x, int32_t here, int32_t slot) {
  return (char *)halo__ring_buffer(x->ring, HALO__RING_KV, here) + slot * x->kv_stride;
}

static char *dkv_slot(const run *x, int32_t here, int32_t slot) {
  if (!x->pass->is_backward) return NULL;
  return (char *)halo__ring_buffer(x->ring, HALO__RING_DKV, here) + slot * x->dkv_stride;
}

static halo_status run_post(const run *x, int32_t k) {
  halo_ring *r = x->ring;
  const halo__schedule_row *first = &x->tables[0]->rows[k];
  bool is_gradient = halo__channel_is_gradient(first->channel);
  int64_t bytes = is_gradient ? x->pass->dkv_count * halo_dtype_bytes(x->pass->dkv_dtype)
                              : x->pass->kv_bytes;
  for (int32_t i = 0; i < r->here; i++) {
    const halo__schedule_row *row = &x->tables[i]->rows[k];
    char *out = is_gradient ? dkv_slot(x, i, row->slot) : kv_slot(x, i, row->slot);
    char *in = is_gradient ? dkv_slot(x, i, row->slot_in) : kv_slot(x, i, row->slot_in);
    r->transfers[2 * i] = (halo__transfer){out, bytes, i, row->to, true, x->pass->device};
    r->transfers[2 * i + 1] = (halo__transfer){in, bytes, i, row->from, false, x->pass->device};
  }
  return halo__comm_post(&r->pending[first->event], r->comm, (halo__channel)first->channel,
                         r->transfers, 2 * r->here);
}

static halo_status run_move(const run *x, int32_t k) {
  const halo__ring_pass *pass = x->pass;
  const halo_kernels *kernels = halo__kernels(pass->device);
  for (int32_t i = 0; i < x->ring->here; i++) {
    const halo__schedule_row *row = &x->tables[i]->rows[k];
    void *to = dkv_slot(x, i, row->slot_in);
    const void *from = dkv_slot(x, i, row->slot);
    if (row->kind == HALO__ROW_COPY) {
      HALO_TRY(kernels->copy(to, from, pass->dkv_count * halo_dtype_bytes(pass->dkv_dtype)));
    } else {
      HALO_TRY(kernels->axpy(pass->dkv_dtype, to, from, pass->dkv_count, 1));
    }
  }
  return HALO_OK;
}

static halo_status run_row(const run *x, int32_t k) {
  const halo__ring_pass *pass = x->pass;
  const halo__schedule_row *first = &x->tables[0]->rows[k];
  switch (first->kind) {
  case HALO__ROW_FETCH_COLUMNS:
    return pass->fetch_columns == NULL ? HALO_OK : pass->fetch_columns(pass->context);
  case HALO__ROW_COLUMNS:
    return pass->compute_columns == NULL ? HALO_OK : pass->compute_columns(pass->context);
  case HALO__ROW_RETURN_COLUMNS:
    return pass->return_columns == NULL ? HALO_OK : pass->return_columns(pass->context);
  case HALO__ROW_POST: return run_post(x, k);
  case HALO__ROW_WAIT: return halo__comm_wait(x->ring->comm, &x->ring->pending[first->event]);
  case HALO__ROW_COMPUTE:
    for (int32_t i = 0; i < x->ring->here; i++) {
      const halo__schedule_row *row = &x->tables[i]->rows[k];
      HALO_TRY(pass->compute(pass->context, i, row->source, kv_slot(x, i, row->slot),
                             dkv_slot(x, i, row->slot_in)));
    }
    return HALO_OK;
  default: return run_move(x, k);
  }
}

/* After a failure: copies inside the process can be dropped, messages of others cannot. */
static void give_up(halo_ring *r) {
  r->is_spent = halo_comm_size(r->comm) > r->here;
  for (int32_t e = 0; e < r->n_events && !r->is_spent; e++) {
    (void)halo__comm_wait(r->comm, &r->pending[e]); // only copies
  }
}

halo_status halo__ring_run(halo_ring *r, const halo__ring_pass *pass) {
  HALO_CHECK(
      !r->is_spent, HALO_ESTATE,
      "ring: a pass failed before, and messages of it may be under way: end the job (rank %d)",
      halo_ring_rank(r));
  run x = {.ring = r, .pass = pass, .tables = pass->is_backward ? r->backward : r->forward};
  x.kv_stride = aligned(pass->kv_bytes);
  x.dkv_stride = aligned(pass->dkv_count * halo_dtype_bytes(pass->dkv_dtype));
  HALO_TRY(halo__ring_reserve(r, HALO__RING_KV, x.kv_stride * x.tables[0]->n_kv_slots, pass->device));
  if (pass->is_backward) {
    HALO_TRY(halo__ring_reserve(r, HALO__RING_DKV, x.dkv_stride * x.tables[0]->n_dkv_slots,
                                pass->device));
  }
  halo_status status = HALO_OK;
  for (int32_t i = 0; i < r->here && status == HALO_OK; i++) {
    status = pass->load(pass->context, i, kv_slot(&x, i, 0));
  }
  for (int32_t k = 0; k < x.tables[0]->n_rows && status == HALO_OK; k++) status = run_row(&x, k);
  for (int32_t i = 0; i < r->here && status == HALO_OK && pass->is_backward; i++) {
    status = pass->store(pass->context, i, dkv_slot(&x, i, x.tables[i]->home));
  }
  if (status != HALO_OK) give_up(r);
  return status;
}
