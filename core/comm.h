/* comm.h: communication inside core: transfers in flight, below the collectives of halo.h.
 *
 * A transfer is one direction of one message as seen by one rank that lives here. A post starts any
 * number of transfers and returns at once; a wait ends them. Between the two a send buffer may be
 * read but not written, a receive buffer neither. Sends and receives of one (channel, from, to)
 * pair up in the order they were posted; channels are independent of each other.
 */
#ifndef HALO_COMM_H
#define HALO_COMM_H

#include "internal.h"

/* One stream of ordered messages per purpose, so that an inner hop posted after an outer one never
 * queues behind it (reference: MTraining runs all of them over one group, which does just that). */
typedef enum halo__channel {
  HALO__CHANNEL_COLLECTIVE = 0,
  HALO__CHANNEL_INNER_KV,
  HALO__CHANNEL_OUTER_KV,
  HALO__CHANNEL_INNER_DKV,
  HALO__CHANNEL_OUTER_DKV,
  HALO__CHANNEL_COLUMNS,
  HALO__CHANNEL_COUNT
} halo__channel;

typedef struct halo__transfer {
  void *data; /* sends only read it */
  int64_t bytes;
  int32_t here; /* which of the ranks of this process: 0 .. here-1 */
  int32_t peer; /* the other end, a rank of the communicator */
  bool is_send;
  halo_device device; /* whose memory `data` is */
} halo__transfer;

typedef struct halo__pending halo__pending;

/* Start transfers. All ranks here post together (lockstep), so a transfer between two of them must
 * find its other end in the same call. Transfers of no bytes are dropped on both sides. */
halo_status halo__comm_post(halo__pending **out, halo_comm *c, halo__channel channel,
                            const halo__transfer *transfers, int64_t n);
/* Finish them; *pending becomes NULL. NULL is harmless. Time spent here counts as exposed. */
halo_status halo__comm_wait(halo_comm *c, halo__pending **pending);
/* Let messages move on; called now and then by whoever computes, from the thread that initialised
 * the library (MPI_THREAD_FUNNELED). `comm` is a halo_comm, void so that it fits a poll hook. */
void halo__comm_progress(void *comm);

/* What a transport over processes must offer; self and local have none (comm.c copies). */
typedef struct halo__remote {
  const char *name;
  halo_status (*post)(void *state, void **request_out, halo__channel channel,
                      const halo__transfer *transfers, int64_t n);
  halo_status (*wait)(void *state, void *request); /* frees the request, also on failure */
  void (*progress)(void *state);
  halo_status (*barrier)(void *state);
  halo_status (*split)(void *state, int32_t color, int32_t key, void **state_out, int32_t *rank_out,
                       int32_t *size_out);
  void (*free)(void *state);
  void (*abort)(void *state, int32_t exit_code);
} halo__remote;

/* comm_mpi.c: the world as state, rank and size; initialises MPI on first use. */
halo_status halo__mpi_world(const halo__remote **remote_out, void **state_out, int32_t *rank_out,
                            int32_t *size_out);
void halo__mpi_shutdown(void);

#endif
