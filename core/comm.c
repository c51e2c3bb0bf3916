/* comm.c: communicators and their collectives.
 *
 * Everything is made of one primitive: post transfers, wait for them (comm.h). A transfer between
 * two ranks of this process is a copy made here; the others go to a remote (comm_mpi.c). So `self`
 * (one rank) and `local` (W virtual ranks in lockstep) need no transport of their own, and W
 * processes run the very code that tests run in one.
 *
 * Sums are made by us and not by MPI_Allreduce, whose order of additions depends on the algorithm
 * the library picks for the size at hand: every rank receives its share of the elements from all
 * ranks, adds them in rank order, and sends the result round (reduce-scatter and all-gather, which
 * is also what moves the fewest bytes). So a run repeats bit for bit, and `local` and `mpi` agree
 * bit for bit.
 *
 * Transfers may be of device memory. Copies between ranks of this process go through the device's own
 * kernel table; what leaves the process passes through host memory (stage), since no remote reads
 * device memory yet. The collectives of halo.h are for host memory.
 *
 * Local copies happen in the wait, not in the post: a caller that changes a buffer in flight then
 * gets a wrong result under `local` too, where tests see it.
 */
#include "comm.h"

#include <assert.h>
#include <string.h>
#include <time.h>

#include "kernels.h"

enum { MAX_LOCAL_RANKS = 1024 }; // the pair table is its square

/* A local copy that waits for its wait. */
typedef struct copy {
  void *to;
  const void *from;
  int64_t bytes;
  halo_device to_device, from_device;
} copy;

struct halo__pending {
  halo__pending *next; /* in the communicator's list of free ones */
  copy *copies;
  int64_t n_copies, copy_capacity;
  halo__transfer *remote; /* transfers that leave the process, host memory */
  void **landing;         /* [n_remote] device memory that a remote receive is for; else NULL */
  int64_t n_remote, remote_capacity, landing_capacity;
  void *request; /* of the remote; NULL when nothing left the process */
  int64_t flight; /* number in the flight recorder */
};

struct halo_comm {
  const halo__remote *remote; /* NULL: all ranks live here */
  void *state;
  int32_t rank, size, here;
  int32_t *pair_head; /* [here * here] first unmatched send of a pair, while matching */
  halo__pending *free_pending;
  double exposed_seconds;
};

static double now_seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- making and freeing --------------------------------------------------------------------- */

static halo_status comm_new(halo_comm **out, const halo__remote *remote, void *state, int32_t rank,
                            int32_t size, int32_t here) {
  halo_comm *c;
  HALO_TRY(halo__alloc_zero((void **)&c, (int64_t)sizeof *c, HALO_CPU));
  int64_t pairs = (int64_t)here * here;
  halo_status status = halo__scratch((void **)&c->pair_head, pairs, sizeof *c->pair_head);
  if (status != HALO_OK) {
    halo__free(c);
    return status;
  }
  for (int64_t i = 0; i < pairs; i++) c->pair_head[i] = -1;
  c->remote = remote;
  c->state = state;
  c->rank = rank;
  c->size = size;
  c->here = here;
  *out = c;
  return HALO_OK;
}

halo_status halo_comm_self(halo_comm **out) { return comm_new(out, NULL, NULL, 0, 1, 1); }

halo_status halo_comm_local(halo_comm **out, int32_t world) {
  HALO_CHECK(world >= 1 && world <= MAX_LOCAL_RANKS, HALO_EARG,
             "comm_local: world is %d; it must be 1 to %d", world, MAX_LOCAL_RANKS);
  return comm_new(out, NULL, NULL, 0, world, world);
}

halo_status halo_comm_world(halo_comm **out) {
  const halo__remote *remote;
  void *state;
  int32_t rank, size;
  HALO_TRY(halo__mpi_world(&remote, &state, &rank, &size));
  halo_status status = comm_new(out, remote, state, rank, size, 1);
  if (status != HALO_OK) remote->free(state);
  return status;
}

halo_status halo_comm_split(halo_comm **out, halo_comm *c, int32_t color, int32_t key) {
  HALO_CHECK(color >= 0, HALO_EARG, "comm_split: color is %d; it must be 0 or more (rank %d)",
             color, c->rank);
  if (c->remote == NULL) return comm_new(out, NULL, NULL, 0, c->size, c->here);
  void *state;
  int32_t rank, size;
  HALO_TRY(c->remote->split(c->state, color, key, &state, &rank, &size));
  halo_status status = comm_new(out, c->remote, state, rank, size, 1);
  if (status != HALO_OK) c->remote->free(state);
  return status;
}

void halo_comm_free(halo_comm *c) {
  if (c == NULL) return;
  while (c->free_pending != NULL) {
    halo__pending *p = c->free_pending;
    c->free_pending = p->next;
    halo__free(p->copies);
    halo__free(p->remote);
    halo__free(p->landing);
    halo__free(p);
  }
  if (c->remote != NULL) c->remote->free(c->state);
  halo__free(c->pair_head);
  halo__free(c);
}

void halo_comm_shutdown(void) { halo__mpi_shutdown(); }

void halo_comm_abort(halo_comm *c, int32_t exit_code) {
  if (c != NULL && c->remote != NULL) c->remote->abort(c->state, exit_code);
}

int32_t halo_comm_rank(const halo_comm *c) { return c->rank; }
int32_t halo_comm_size(const halo_comm *c) { return c->size; }
int32_t halo_comm_here(const halo_comm *c) { return c->here; }

const char *halo_comm_name(const halo_comm *c) {
  return c->remote != NULL ? c->remote->name : c->size == 1 ? "self" : "local";
}

double halo_comm_exposed_seconds(halo_comm *c) { return c->exposed_seconds; }
void halo_comm_reset_timer(halo_comm *c) { c->exposed_seconds = 0; }

/* ---- transfers ------------------------------------------------------------------------------ */

static bool lives_here(const halo_comm *c, int32_t rank) {
  return rank >= c->rank && rank < c->rank + c->here;
}

/* Room for n elements; old contents are not kept, a pending object is filled afresh. */
static halo_status reserve(void **array, int64_t *capacity, int64_t n, int64_t element_bytes) {
  if (n <= *capacity) return HALO_OK;
  halo__free(*array);
  *array = NULL;
  *capacity = 0;
  HALO_TRY(halo__scratch(array, n, element_bytes));
  *capacity = n;
  return HALO_OK;
}

static halo_status take_pending(halo__pending **out, halo_comm *c, int64_t n) {
  halo__pending *p = c->free_pending;
  if (p != NULL) {
    c->free_pending = p->next;
  } else {
    HALO_TRY(halo__alloc_zero((void **)&p, (int64_t)sizeof *p, HALO_CPU));
  }
  p->n_copies = p->n_remote = 0;
  p->request = NULL;
  halo_status status = reserve((void **)&p->copies, &p->copy_capacity, n, sizeof *p->copies);
  if (status == HALO_OK) {
    status = reserve((void **)&p->remote, &p->remote_capacity, n, sizeof *p->remote);
  }
  if (status == HALO_OK) {
    status = reserve((void **)&p->landing, &p->landing_capacity, n, sizeof *p->landing);
  }
  if (status != HALO_OK) {
    p->next = c->free_pending;
    c->free_pending = p;
    return status;
  }
  *out = p;
  return HALO_OK;
}

static void give_pending(halo_comm *c, halo__pending *p) {
  p->next = c->free_pending;
  c->free_pending = p;
}

/* Pair sends and receives between ranks of this process, each pair in posting order. The unmatched
 * sends of a pair form a list threaded through `next`; pair_head is all -1 before and after. */
static halo_status match_local(halo_comm *c, halo__pending *p, const halo__transfer *t, int64_t n) {
  int32_t *next;
  HALO_TRY(halo__scratch((void **)&next, n, sizeof *next));
  halo_status status = HALO_OK;
  int64_t open = 0;
  for (int64_t i = n - 1; i >= 0; i--) { // backwards, so that lists come out in posting order
    if (!t[i].is_send || t[i].bytes == 0 || !lives_here(c, t[i].peer)) continue;
    int32_t *head = &c->pair_head[t[i].here * c->here + (t[i].peer - c->rank)];
    next[i] = *head;
    *head = (int32_t)i;
    open++;
  }
  for (int64_t i = 0; i < n; i++) {
    if (t[i].is_send || t[i].bytes == 0 || !lives_here(c, t[i].peer)) continue;
    int32_t *head = &c->pair_head[(t[i].peer - c->rank) * c->here + t[i].here];
    if (*head < 0 || t[*head].bytes != t[i].bytes) {
      status =
          halo__error(HALO_ECOMM, "comm: rank %d wants %lld bytes from rank %d, which sends %lld",
                      c->rank + t[i].here, (long long)t[i].bytes, t[i].peer,
                      *head < 0 ? 0LL : (long long)t[*head].bytes);
      break;
    }
    p->copies[p->n_copies++] =
        (copy){t[i].data, t[*head].data, t[i].bytes, t[i].device, t[*head].device};
    *head = next[*head];
    open--;
  }
  if (status == HALO_OK && open > 0) {
    status =
        halo__error(HALO_ECOMM, "comm: %lld sends between ranks of this process have no receive",
                    (long long)open);
  }
  if (status != HALO_OK) {
    for (int64_t i = 0; i < (int64_t)c->here * c->here; i++) c->pair_head[i] = -1;
  }
  halo__free(next);
  return status;
}

/* One local copy; on a device it is queued behind what computed `from`. */
static halo_status copy_bytes(const copy *x) {
  if (x->to_device == HALO_CPU && x->from_device == HALO_CPU) {
    memcpy(x->to, x->from, (size_t)x->bytes);
    return HALO_OK;
  }
  if (x->to_device == HALO_CPU) return halo__kernels(x->from_device)->copy_out(x->to, x->from, x->bytes);
  const halo_kernels *k = halo__kernels(x->to_device);
  return x->from_device == HALO_CPU ? k->copy_in(x->to, x->from, x->bytes)
                                    : k->copy(x->to, x->from, x->bytes);
}

/* The remote moves host memory: a transfer of device memory gets a block of it for the trip. */
static halo_status stage(halo__pending *p, const halo__transfer *t) {
  halo__transfer *staged = &p->remote[p->n_remote];
  *staged = *t;
  p->landing[p->n_remote] = NULL;
  if (t->device != HALO_CPU) {
    HALO_TRY(halo__alloc(&staged->data, t->bytes, HALO_CPU));
    p->landing[p->n_remote] = t->data;
    if (t->is_send) {
      halo_status status = halo__kernels(t->device)->copy_out(staged->data, t->data, t->bytes);
      if (status != HALO_OK) {
        halo__free(staged->data);
        return status;
      }
    }
  }
  p->n_remote++;
  return HALO_OK;
}

/* Staged receives reach their device, staging goes. */
static halo_status unstage(halo__pending *p, bool has_arrived) {
  halo_status status = HALO_OK;
  for (int64_t i = 0; i < p->n_remote; i++) {
    if (p->landing[i] == NULL) continue;
    const halo__transfer *t = &p->remote[i];
    if (!t->is_send && has_arrived && status == HALO_OK) {
      status = halo__kernels(t->device)->copy_in(p->landing[i], t->data, t->bytes);
    }
    halo__free(t->data);
  }
  return status;
}

static const char *const channel_names[] = {"collective", "inner KV hop", "outer KV hop",
                                            "inner dKV hop", "outer dKV hop", "columns"};

halo_status halo__comm_post(halo__pending **out, halo_comm *c, halo__channel channel,
                            const halo__transfer *transfers, int64_t n) {
  assert(n <= INT32_MAX);
  halo__pending *p;
  HALO_TRY(take_pending(&p, c, n));
  halo_status status = HALO_OK;
  int64_t bytes_out = 0;
  for (int64_t i = 0; i < n; i++) {
    assert(transfers[i].here >= 0 && transfers[i].here < c->here);
    assert(transfers[i].peer >= 0 && transfers[i].peer < c->size);
    if (transfers[i].is_send) bytes_out += transfers[i].bytes;
    if (transfers[i].bytes > 0 && !lives_here(c, transfers[i].peer)) {
      status = stage(p, &transfers[i]);
      if (status != HALO_OK) break;
    }
  }
  if (status == HALO_OK && p->n_remote < n) status = match_local(c, p, transfers, n);
  if (status == HALO_OK && p->n_remote > 0) {
    status = c->remote->post(c->state, &p->request, channel, p->remote, p->n_remote);
  }
  if (status != HALO_OK) {
    // Staging that the remote may still write to is not given back: the job is over (ring.c).
    if (p->request == NULL) (void)unstage(p, false);
    give_pending(c, p);
    return status;
  }
  p->flight = halo__trace_comm_begin(channel_names[channel], halo_comm_name(c), bytes_out, -1);
  *out = p;
  return HALO_OK;
}

halo_status halo__comm_wait(halo_comm *c, halo__pending **pending) {
  halo__pending *p = *pending;
  if (p == NULL) return HALO_OK;
  *pending = NULL;
  double start = now_seconds();
  halo_status status = HALO_OK, waited = HALO_OK;
  for (int64_t i = 0; i < p->n_copies && status == HALO_OK; i++) status = copy_bytes(&p->copies[i]);
  if (p->request != NULL) {
    waited = c->remote->wait(c->state, p->request);
    if (waited == HALO_OK) waited = unstage(p, true);
  }
  if (status == HALO_OK) status = waited;
  c->exposed_seconds += now_seconds() - start;
  halo__trace_comm_end(p->flight);
  give_pending(c, p);
  return status;
}

void halo__comm_progress(void *comm) {
  halo_comm *c = comm;
  if (c->remote != NULL) c->remote->progress(c->state);
}

halo_status halo_comm_barrier(halo_comm *c) {
  if (c->remote == NULL) return HALO_OK;
  double start = now_seconds();
  int64_t flight = halo__trace_comm_begin("barrier", halo_comm_name(c), 0, -1);
  halo_status status = c->remote->barrier(c->state);
  halo__trace_comm_end(flight);
  c->exposed_seconds += now_seconds() - start;
  return status;
}

/* ---- collectives ---------------------------------------------------------------------------- */

/* Post and wait. */
static halo_status move(halo_comm *c, const halo__transfer *transfers, int64_t n) {
  halo__pending *p;
  HALO_TRY(halo__comm_post(&p, c, HALO__CHANNEL_COLLECTIVE, transfers, n));
  return halo__comm_wait(c, &p);
}

/* Where piece r of `total` bytes (or elements) begins when W ranks share it evenly. */
static int64_t piece_start(int64_t total, int64_t r, int64_t world) {
  return total / world * r + (total % world * r) / world;
}

static halo_status alloc_transfers(halo__transfer **out, const halo_comm *c) {
  return halo__scratch((void **)out, 2 * (int64_t)c->here * c->size, sizeof **out);
}

halo_status halo_comm_all_gatherv(halo_comm *c, void *const *out, const void *const *in,
                                  const int64_t *bytes) {
  halo__transfer *t;
  HALO_TRY(alloc_transfers(&t, c));
  int64_t n = 0;
  for (int32_t i = 0; i < c->here; i++) {
    char *to = out[i];
    for (int32_t r = 0; r < c->size; r++) {
      t[n++] = (halo__transfer){(void *)in[i], bytes[c->rank + i], i, r, true, HALO_CPU};
      t[n++] = (halo__transfer){to, bytes[r], i, r, false, HALO_CPU};
      to += bytes[r];
    }
  }
  halo_status status = move(c, t, n);
  halo__free(t);
  return status;
}

halo_status halo_comm_all_gather(halo_comm *c, void *const *out, const void *const *in,
                                 int64_t bytes) {
  int64_t *each;
  HALO_TRY(halo__scratch((void **)&each, c->size, sizeof *each));
  for (int32_t r = 0; r < c->size; r++) each[r] = bytes;
  halo_status status = halo_comm_all_gatherv(c, out, in, each);
  halo__free(each);
  return status;
}

halo_status halo_comm_all_to_all(halo_comm *c, void *const *out, const void *const *in,
                                 int64_t bytes) {
  halo__transfer *t;
  HALO_TRY(alloc_transfers(&t, c));
  int64_t n = 0;
  for (int32_t i = 0; i < c->here; i++) {
    for (int32_t r = 0; r < c->size; r++) {
      t[n++] = (halo__transfer){(char *)in[i] + r * bytes, bytes, i, r, true, HALO_CPU};
      t[n++] = (halo__transfer){(char *)out[i] + r * bytes, bytes, i, r, false, HALO_CPU};
    }
  }
  halo_status status = move(c, t, n);
  halo__free(t);
  return status;
}

/* The root deals pieces out and every rank passes its piece on: twice the bytes of the message
 * leave each rank at most, whatever W (van de Geijn's broadcast). */
halo_status halo_comm_broadcast(halo_comm *c, void *const *buffers, int64_t bytes, int32_t root) {
  HALO_CHECK(root >= 0 && root < c->size, HALO_EARG, "comm_broadcast: root is %d of %d ranks", root,
             c->size);
  halo__transfer *t;
  HALO_TRY(alloc_transfers(&t, c));
  int64_t n = 0;
  for (int32_t i = 0; i < c->here; i++) {
    int32_t self = c->rank + i;
    for (int32_t r = 0; r < c->size && self == root; r++) {
      int64_t start = piece_start(bytes, r, c->size);
      int64_t size = piece_start(bytes, r + 1, c->size) - start;
      if (r != root) t[n++] = (halo__transfer){(char *)buffers[i] + start, size, i, r, true, HALO_CPU};
    }
    if (self != root) {
      int64_t start = piece_start(bytes, self, c->size);
      int64_t size = piece_start(bytes, self + 1, c->size) - start;
      t[n++] = (halo__transfer){(char *)buffers[i] + start, size, i, root, false, HALO_CPU};
    }
  }
  halo_status status = move(c, t, n);
  n = 0;
  for (int32_t i = 0; i < c->here; i++) {
    int32_t self = c->rank + i;
    int64_t own = piece_start(bytes, self, c->size);
    int64_t own_size = piece_start(bytes, self + 1, c->size) - own;
    for (int32_t r = 0; r < c->size; r++) {
      int64_t start = piece_start(bytes, r, c->size);
      int64_t size = piece_start(bytes, r + 1, c->size) - start;
      if (r == self) continue;
      if (r != root) t[n++] = (halo__transfer){(char *)buffers[i] + own, own_size, i, r, true, HALO_CPU};
      if (self != root) t[n++] = (halo__transfer){(char *)buffers[i] + start, size, i, r, false, HALO_CPU};
    }
  }
  if (status == HALO_OK) status = move(c, t, n);
  halo__free(t);
  return status;
}

typedef enum reduce_op { REDUCE_SUM, REDUCE_MAX } reduce_op;

#define REDUCE_LOOP(type)                                                                 \
  for (int64_t i = 0; i < n; i++) {                                                       \
    type x = ((const type *)from)[i], *y = &((type *)to)[i];                              \
    *y = op == REDUCE_SUM ? *y + x : x > *y || x != x ? x : *y;                           \
  }

/* to <- to op from; a NaN wins a maximum, so that it is seen. */
static void combine(void *to, const void *from, int64_t n, halo_dtype dtype, reduce_op op) {
  switch (dtype) {
  case HALO_F32: REDUCE_LOOP(float) break;
  case HALO_F64: REDUCE_LOOP(double) break;
  default: REDUCE_LOOP(int64_t) break;
  }
}

/* One slice of an all-reduce. `scratch` has room for count + W elements per rank here: W shares,
 * each at most one longer than count / W. */
static halo_status reduce_slice(halo_comm *c, void *const *buffers, int64_t first, int64_t count,
                                halo_dtype dtype, reduce_op op, char *scratch, halo__transfer *t) {
  int64_t size = halo_dtype_bytes(dtype), n = 0;
  for (int32_t i = 0; i < c->here; i++) {
    int64_t own = piece_start(count, c->rank + i, c->size);
    int64_t own_count = piece_start(count, c->rank + i + 1, c->size) - own;
    for (int32_t r = 0; r < c->size; r++) {
      int64_t start = piece_start(count, r, c->size);
      int64_t share = piece_start(count, r + 1, c->size) - start;
      t[n++] =
          (halo__transfer){(char *)buffers[i] + (first + start) * size, share * size, i, r, true, HALO_CPU};
      t[n++] = (halo__transfer){scratch, own_count * size, i, r, false, HALO_CPU};
      scratch += own_count * size;
    }
  }
  HALO_TRY(move(c, t, n));
  // The receives of transfer 2*(i*W+r)+1 lie in rank order; the sum grows in the buffer itself.
  for (int32_t i = 0; i < c->here; i++) {
    int64_t own = piece_start(count, c->rank + i, c->size);
    int64_t own_count = piece_start(count, c->rank + i + 1, c->size) - own;
    char *sum = (char *)buffers[i] + (first + own) * size;
    for (int32_t r = 0; r < c->size; r++) {
      const void *piece = t[2 * ((int64_t)i * c->size + r) + 1].data;
      if (r == 0) {
        memcpy(sum, piece, (size_t)(own_count * size));
      } else {
        combine(sum, piece, own_count, dtype, op);
      }
    }
  }
  n = 0;
  for (int32_t i = 0; i < c->here; i++) {
    int32_t self = c->rank + i;
    int64_t own = piece_start(count, self, c->size);
    int64_t own_count = piece_start(count, self + 1, c->size) - own;
    for (int32_t r = 0; r < c->size; r++) {
      int64_t start = piece_start(count, r, c->size);
      int64_t share = piece_start(count, r + 1, c->size) - start;
      if (r == self) continue;
      t[n++] =
          (halo__transfer){(char *)buffers[i] + (first + own) * size, own_count * size, i, r, true, HALO_CPU};
      t[n++] =
          (halo__transfer){(char *)buffers[i] + (first + start) * size, share * size, i, r, false, HALO_CPU};
    }
  }
  return move(c, t, n);
}

static halo_status all_reduce(halo_comm *c, void *const *buffers, int64_t count, int32_t dtype,
                              reduce_op op, const char *name) {
  HALO_CHECK(dtype == HALO_F32 || dtype == HALO_F64 || dtype == HALO_I64, HALO_EARG,
             "%s: dtype is %s; it must be f32, f64 or i64", name, halo_dtype_name(dtype));
  HALO_CHECK(count >= 0, HALO_EARG, "%s: count is %lld", name, (long long)count);
  if (c->size == 1 || count == 0) return HALO_OK;
  enum { SLICE = 1 << 22 }; // bounds the scratch at 16 to 32 MiB per rank here
  int64_t slice = count < SLICE ? count : SLICE;
  char *scratch;
  HALO_TRY(halo__scratch((void **)&scratch, (slice + c->size) * c->here, halo_dtype_bytes(dtype)));
  halo__transfer *t;
  halo_status status = alloc_transfers(&t, c);
  if (status == HALO_OK) {
    for (int64_t first = 0; first < count && status == HALO_OK; first += slice) {
      int64_t n = count - first < slice ? count - first : slice;
      status = reduce_slice(c, buffers, first, n, (halo_dtype)dtype, op, scratch, t);
    }
    halo__free(t);
  }
  halo__free(scratch);
  return status;
}

halo_status halo_comm_all_reduce(halo_comm *c, void *const *buffers, int64_t count, int32_t dtype) {
  return all_reduce(c, buffers, count, dtype, REDUCE_SUM, "comm_all_reduce");
}

halo_status halo_comm_all_reduce_max(halo_comm *c, void *const *buffers, int64_t count,
                                     int32_t dtype) {
  return all_reduce(c, buffers, count, dtype, REDUCE_MAX, "comm_all_reduce_max");
}

/* A tensor of a device goes through host memory, a piece at a time. */
static halo_status all_reduce_staged(halo_comm *c, halo_tensor *t) {
  const int64_t count = halo_tensor_count(t), most = (int64_t)16 << 20;
  for (int64_t at = 0; at < count; at += most) {
    const int64_t n = count - at < most ? count - at : most, stride = 1;
    halo_tensor *piece = NULL, *host = NULL;
    halo_status status = HALO_OK;
    HALO_TRY_GOTO(halo__view(&piece, t, 1, &n, &stride, at));
    HALO_TRY_GOTO(halo_tensor_new(&host, (int32_t)t->dtype, HALO_CPU, 1, &n));
    HALO_TRY_GOTO(halo_tensor_copy(host, piece));
    void *data = halo_tensor_data(host);
    HALO_TRY_GOTO(all_reduce(c, &data, n, t->dtype, REDUCE_SUM, "comm_all_reduce_tensor"));
    status = halo_tensor_copy(piece, host);
  done:
    halo_tensor_free(piece);
    halo_tensor_free(host);
    HALO_TRY(status);
  }
  return HALO_OK;
}

halo_status halo_comm_all_reduce_tensor(halo_comm *c, halo_tensor *t) {
  HALO_CHECK(halo_tensor_is_contiguous(t), HALO_EARG,
             "comm_all_reduce_tensor: the tensor must be contiguous");
  // Ranks of one process share one tensor, which therefore holds their sum already.
  if (c->here == c->size) return HALO_OK;
  if (halo__device(t) != HALO_CPU) return all_reduce_staged(c, t);
  void *data = halo_tensor_data(t);
  return all_reduce(c, &data, halo_tensor_count(t), halo_tensor_dtype(t), REDUCE_SUM,
                    "comm_all_reduce_tensor");
}

halo_status halo_comm_same(halo_comm *c, uint64_t value, const char *what) {
  if (c->here == c->size) return HALO_OK; // one process has one value
  uint64_t *values;
  HALO_TRY(halo__scratch((void **)&values, c->size, sizeof *values));
  const void *in = &value;
  void *out = values;
  halo_status status = halo_comm_all_gather(c, &out, &in, sizeof value);
  for (int32_t r = 1; r < c->size && status == HALO_OK; r++) {
    if (values[r] == values[0]) continue;
    status = halo__error(HALO_ESTATE,
                         "comm_same: %s differs: rank 0 has %016llx, rank %d has %016llx (rank %d)",
                         what, (unsigned long long)values[0], r, (unsigned long long)values[r],
                         c->rank);
  }
  halo__free(values);
  return status;
}
