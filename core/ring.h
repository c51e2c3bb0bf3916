/* ring.h: the ring as attention and selection see it. Internal to core/. */
#ifndef HALO_RING_H
#define HALO_RING_H

#include "comm.h"

/* The communicator a ring was made with (borrowed). */
halo_comm *halo__ring_comm(const halo_ring *r);

#endif
