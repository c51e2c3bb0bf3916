/* ring.c */
#include "ring.h"

struct halo_ring {
  halo_comm *comm;
};

halo_comm *halo__ring_comm(const halo_ring *r) { return r->comm; }
int32_t halo_ring_world(const halo_ring *r) { return halo_comm_size(r->comm); }
int32_t halo_ring_here(const halo_ring *r) { return halo_comm_here(r->comm); }
int32_t halo_ring_rank(const halo_ring *r) { return halo_comm_rank(r->comm); }

halo_status halo_ring_new(halo_ring **out, halo_comm *c, int32_t schedule, int32_t inner) {
  (void)schedule, (void)inner;
  HALO_TRY(halo__alloc_zero((void **)out, (int64_t)sizeof **out, HALO_CPU));
  (*out)->comm = c;
  return HALO_OK;
}

void halo_ring_free(halo_ring *r) { halo__free(r); }
