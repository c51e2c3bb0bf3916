/* offload.c: tensors that wait in pinned host memory, for activations of the longest contexts.
 *
 * A block's input is needed again in backward only. Forward sends it to the host while the next block
 * computes; backward brings it back while the block above is recomputed:
 *
 *   compute   | block 1      | block 2      | block 3 ...        | again 3      | again 2      |
 *   copies          | x1 out       | x2 out                      | x2 in        | x1 in
 *   device memory   x1             x2 (x1 gone)                  x3 x2          x2 x1
 *
 * The device copy may go when the copy to the host is done. The host does not wait for that, because it
 * runs far ahead of the device and all inputs would pile up; instead the next offload makes the
 * computation wait for the copy before it (settle), which by then had a whole block's time, and frees
 * the tensor behind that. So two inputs are on the device at most, whatever the host does.
 *
 * Pinned memory takes long to get (about a third of a second per GiB), so buffers are kept and used
 * again, until all of them are spare and none fits. Copies run in one queue of their own, in order: a buffer can be reused as soon as its reader
 * is queued.
 */
#include "internal.h"
#include "kernels.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct halo_offload {
  halo_tensor *kept; /* of a tensor in host memory: a view of it, and nothing else is set */
  halo_tensor *meta; /* shape, dtype, device */
  halo_tensor *back; /* on its way to the device, or there */
  int64_t ticket;    /* of that */
  void *host;
  int64_t bytes;
};

typedef struct buffer {
  struct buffer *next;
  void *host;
  int64_t bytes;
} buffer;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static buffer *spare;
static int64_t host_bytes;      /* of all buffers, spare or not */
static int64_t spare_bytes;
static halo_tensor *leaving;    /* the tensor whose copy to the host was begun last */
static int64_t leaving_ticket;

/* Let the tensor that left last go, behind its copy. */
static halo_status settle(void) {
  pthread_mutex_lock(&lock);
  halo_tensor *t = leaving;
  const int64_t ticket = leaving_ticket;
  leaving = NULL;
  pthread_mutex_unlock(&lock);
  if (t == NULL) return HALO_OK;
  const halo_status status = halo__kernels(halo__device(t))->offload_wait(ticket);
  halo_tensor_free(t);
  return status;
}

static halo_status buffer_take(void **out, const halo_kernels *k, int64_t bytes) {
  pthread_mutex_lock(&lock);
  for (buffer **at = &spare; *at != NULL; at = &(*at)->next) {
    buffer *b = *at;
    if (b->bytes != bytes) continue;
    *at = b->next;
    spare_bytes -= bytes;
    pthread_mutex_unlock(&lock);
    *out = b->host;
    free(b);
    return HALO_OK;
  }
  // Nothing is out and nothing fits: sizes have changed for good (a stage with longer contexts).
  const bool is_stale = spare_bytes > 0 && spare_bytes == __atomic_load_n(&host_bytes, __ATOMIC_RELAXED);
  pthread_mutex_unlock(&lock);
  if (is_stale) halo__offload_trim();
  HALO_TRY(k->pinned_new(out, bytes));
  __atomic_add_fetch(&host_bytes, bytes, __ATOMIC_RELAXED);
  return HALO_OK;
}

static void buffer_give(const halo_kernels *k, void *host, int64_t bytes) {
  buffer *b = malloc(sizeof *b);
  if (b == NULL) { // no room to remember it
    k->offload_finish();
    k->pinned_free(host);
    __atomic_sub_fetch(&host_bytes, bytes, __ATOMIC_RELAXED);
    return;
  }
  pthread_mutex_lock(&lock);
  *b = (buffer){.next = spare, .host = host, .bytes = bytes};
  spare = b;
  spare_bytes += bytes;
  pthread_mutex_unlock(&lock);
}

void halo__offload_trim(void) {
  settle();
  pthread_mutex_lock(&lock);
  buffer *b = spare;
  spare = NULL;
  spare_bytes = 0;
  pthread_mutex_unlock(&lock);
  if (b == NULL) return;
  const halo_kernels *k = halo__kernels(HALO_CUDA);
  k->offload_finish();
  while (b != NULL) {
    buffer *next = b->next;
    k->pinned_free(b->host);
    __atomic_sub_fetch(&host_bytes, b->bytes, __ATOMIC_RELAXED);
    free(b);
    b = next;
  }
}

int64_t halo_offload_host_bytes(void) { return __atomic_load_n(&host_bytes, __ATOMIC_RELAXED); }

halo_status halo_offload_new(halo_offload **out, halo_tensor *t) {
  HALO_CHECK(out != NULL && t != NULL, HALO_EARG, "offload: NULL argument");
  halo_offload *o = calloc(1, sizeof *o);
  HALO_CHECK(o != NULL, HALO_ENOMEM, "offload: no memory for a handle");
  halo_tensor *dense = NULL, *view = NULL;
  halo_status status = HALO_OK;
  if (halo__device(t) == HALO_CPU) {
    HALO_TRY_GOTO(halo_tensor_detach(&o->kept, t));
    *out = o;
    return HALO_OK;
  }
  const halo_kernels *k = halo__kernels(halo__device(t));
  o->bytes = halo_tensor_count(t) * halo_dtype_bytes(t->dtype);
  HALO_TRY_GOTO(halo__contiguous(&dense, t));
  HALO_TRY_GOTO(halo_tensor_detach(&view, dense)); // the tape behind t must not wait for the copy
  HALO_TRY_GOTO(halo__meta_like(&o->meta, dense));
  HALO_TRY_GOTO(settle());
  HALO_TRY_GOTO(buffer_take(&o->host, k, o->bytes));
  int64_t ticket = 0;
  HALO_TRY_GOTO(k->offload_out(o->host, halo__data(view), o->bytes, &ticket));
  pthread_mutex_lock(&lock);
  leaving = view;
  leaving_ticket = ticket;
  pthread_mutex_unlock(&lock);
  halo_tensor_free(dense);
  *out = o;
  return HALO_OK;
done:
  halo_tensor_free(dense);
  halo_tensor_free(view);
  halo_offload_free(o);
  return status;
}

halo_status halo_offload_prefetch(halo_offload *o) {
  HALO_CHECK(o != NULL, HALO_EARG, "offload_prefetch: NULL argument");
  if (o->kept != NULL || o->back != NULL) return HALO_OK;
  HALO_TRY(settle());
  halo_tensor *t = NULL;
  HALO_TRY(halo__new_like(&t, o->meta));
  const halo_status status =
      halo__kernels(halo__device(t))->offload_in(halo__data(t), o->host, o->bytes, &o->ticket);
  if (status != HALO_OK) {
    halo_tensor_free(t);
    return status;
  }
  o->back = t;
  return HALO_OK;
}

halo_status halo_offload_fetch(halo_tensor **out, halo_offload *o) {
  HALO_CHECK(out != NULL && o != NULL, HALO_EARG, "offload_fetch: NULL argument");
  if (o->kept != NULL) return halo_tensor_detach(out, o->kept);
  HALO_TRY(halo_offload_prefetch(o));
  HALO_TRY(halo__kernels(halo__device(o->back))->offload_wait(o->ticket));
  *out = o->back;
  o->back = NULL;
  return HALO_OK;
}

void halo_offload_free(halo_offload *o) {
  if (o == NULL) return;
  halo_tensor_free(o->kept);
  if (o->meta != NULL) {
    const halo_kernels *k = halo__kernels(halo__device(o->meta));
    if (o->back != NULL) k->offload_wait(o->ticket); // its memory is being written
    if (o->host != NULL) buffer_give(k, o->host, o->bytes);
  }
  halo_tensor_free(o->back);
  halo_tensor_free(o->meta);
  free(o);
}
