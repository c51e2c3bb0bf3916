/* ring.h: the ring as attention and selection see it. Internal to core/. */
#ifndef HALO_RING_H
#define HALO_RING_H

#include "comm.h"

/* The communicator a ring was made with (borrowed). */
halo_comm *halo__ring_comm(const halo_ring *r);

/* Another owner of the ring; halo_ring_free drops one. */
halo_ring *halo__ring_retain(halo_ring *r);

/* Memory that belongs to the ring and outlives a failed pass, one block of `bytes` on `device` for
 * each rank here; kept for the next pass. */
typedef enum halo__ring_buffer_id {
  HALO__RING_KV,
  HALO__RING_DKV,
  HALO__RING_COLUMNS_SENT,
  HALO__RING_COLUMNS_RECEIVED,
  HALO__RING_COLUMNS,
  HALO__RING_COLUMN_GRADIENTS,
  HALO__RING_BUFFERS
} halo__ring_buffer_id;
halo_status halo__ring_reserve(halo_ring *r, halo__ring_buffer_id id, int64_t bytes,
                                halo_device device);
void *halo__ring_buffer(const halo_ring *r, halo__ring_buffer_id id, int32_t here);

/* Start and end the exchange of columns, one at a time; buffers are the ring's. */
halo_status halo__ring_post_columns(halo_ring *r, const halo__transfer *transfers, int64_t n);
halo_status halo__ring_wait_columns(halo_ring *r);

/* One pass of keys round the ring, or of keys and their gradients. `here` is which rank of this
 * process; slots are buffers of the ring. Hooks may be called in the order of the schedule's rows,
 * for each rank here in turn. */
typedef struct halo__ring_pass {
  bool is_backward;
  halo_device device;  /* of the slots */
  int64_t kv_bytes;    /* one KV slot: K then V of one rank */
  int64_t dkv_count;   /* elements of a dKV slot */
  halo_dtype dkv_dtype;
  void *context;
  /* Put the rank's own keys into slot `kv`. */
  halo_status (*load)(void *context, int32_t here, void *kv);
  /* Queries of the rank meet the keys of `source`; backward: dkv = their gradients. */
  halo_status (*compute)(void *context, int32_t here, int32_t source, const void *kv, void *dkv);
  /* Backward: the whole gradient of the rank's own keys, once columns have returned as well; the
   * slot is the hook's to change. */
  halo_status (*store)(void *context, int32_t here, void *dkv);
  /* Columns, for all ranks here at once; NULL when the plan has none. */
  halo_status (*fetch_columns)(void *context);
  halo_status (*compute_columns)(void *context);
  halo_status (*return_columns)(void *context);
} halo__ring_pass;

halo_status halo__ring_run(halo_ring *r, const halo__ring_pass *pass);

#endif
