/* comm_mpi.c: transfers between processes through MPI, host memory only.
 *
 * MPI is used for what it does well: it starts processes, and moves bytes with non-blocking sends
 * and receives. Errors come back as codes (MPI_ERRORS_RETURN); Open MPI 4 has no way to go on after
 * one, so the caller ends the job with halo_comm_abort. One thread calls MPI (MPI_THREAD_FUNNELED).
 *
 * A launcher and an MPI library that do not know each other start W processes that each believe to
 * be rank 0 of 1, without a word (open-mpi/ompi issue 13523). So the launcher's count, which it
 * leaves in the environment, is compared with MPI's.
 */
#include "comm.h"

#ifdef HALO_WITH_MPI

#include <mpi.h>
#include <sched.h>
#include <stdlib.h>

/* A message of more bytes than an int counts travels in pieces. */
static const int64_t PIECE_BYTES = 1 << 30;

typedef struct request {
  int32_t n;
  MPI_Request items[];
} request;

static bool we_initialised;

static halo_status mpi_error(int code, const char *call) {
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(code, text, &length);
  return halo__error(HALO_ECOMM, "comm: %s failed: %.*s", call, length, text);
}

#define HALO_MPI(call, name)                                                              \
  do {                                                                                    \
    int code_ = (call);                                                                   \
    if (code_ != MPI_SUCCESS) return mpi_error(code_, name);                              \
  } while (0)

/* ---- transfers ------------------------------------------------------------------------------ */

static halo_status mpi_post(void *state, void **request_out, halo__channel channel,
                            const halo__transfer *transfers, int64_t n) {
  MPI_Comm comm = *(MPI_Comm *)state;
  int64_t pieces = 0;
  for (int64_t i = 0; i < n; i++) pieces += (transfers[i].bytes + PIECE_BYTES - 1) / PIECE_BYTES;
  request *r;
  HALO_TRY(halo__alloc((void **)&r, (int64_t)sizeof *r + pieces * (int64_t)sizeof r->items[0],
                       HALO_CPU));
  r->n = 0;
  // Receives first: a message whose receive is posted needs no intermediate buffer.
  for (int32_t sends = 0; sends < 2; sends++) {
    for (int64_t i = 0; i < n; i++) {
      const halo__transfer *t = &transfers[i];
      if (t->is_send != (sends == 1)) continue;
      for (int64_t at = 0; at < t->bytes; at += PIECE_BYTES) {
        int bytes = (int)(t->bytes - at < PIECE_BYTES ? t->bytes - at : PIECE_BYTES);
        char *data = (char *)t->data + at;
        MPI_Request *item = &r->items[r->n];
        int code = t->is_send
                       ? MPI_Isend(data, bytes, MPI_BYTE, t->peer, (int)channel, comm, item)
                       : MPI_Irecv(data, bytes, MPI_BYTE, t->peer, (int)channel, comm, item);
        if (code != MPI_SUCCESS) {
          halo__free(r); // what was started stays MPI's; the job is over (see the top)
          return mpi_error(code, t->is_send ? "MPI_Isend" : "MPI_Irecv");
        }
        r->n++;
      }
    }
  }
  *request_out = r;
  return HALO_OK;
}

/* MPI_Waitall spins; with more ranks than cores that takes the core from the rank waited for. */
static halo_status mpi_wait(void *state, void *request_in) {
  (void)state;
  request *r = request_in;
  int done = 0, code = MPI_SUCCESS;
  while (!done && code == MPI_SUCCESS) {
    code = MPI_Testall(r->n, r->items, &done, MPI_STATUSES_IGNORE);
    if (!done) sched_yield();
  }
  halo__free(r);
  return code == MPI_SUCCESS ? HALO_OK : mpi_error(code, "MPI_Testall");
}

static void mpi_progress(void *state) {
  int flag;
  // No message has this tag: the call only drives the library's engine.
  MPI_Iprobe(MPI_ANY_SOURCE, HALO__CHANNEL_COUNT, *(MPI_Comm *)state, &flag, MPI_STATUS_IGNORE);
}

static halo_status mpi_barrier(void *state) {
  MPI_Request item;
  HALO_MPI(MPI_Ibarrier(*(MPI_Comm *)state, &item), "MPI_Ibarrier");
  for (int done = 0; !done;) {
    HALO_MPI(MPI_Test(&item, &done, MPI_STATUS_IGNORE), "MPI_Test");
    if (!done) sched_yield();
  }
  return HALO_OK;
}

/* ---- communicators -------------------------------------------------------------------------- */

static bool mpi_is_running(void) {
  int started = 0, ended = 0;
  MPI_Initialized(&started);
  MPI_Finalized(&ended);
  return started && !ended;
}

static void mpi_free(void *state) {
  if (mpi_is_running()) MPI_Comm_free((MPI_Comm *)state);
  halo__free(state);
}

/* Take `comm` over, which is ours from here on. */
static halo_status adopt(MPI_Comm comm, void **state_out, int32_t *rank_out, int32_t *size_out) {
  int rank, size;
  HALO_MPI(MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  HALO_MPI(MPI_Comm_rank(comm, &rank), "MPI_Comm_rank");
  HALO_MPI(MPI_Comm_size(comm, &size), "MPI_Comm_size");
  MPI_Comm *state;
  HALO_TRY(halo__alloc((void **)&state, (int64_t)sizeof *state, HALO_CPU));
  *state = comm;
  *state_out = state;
  *rank_out = rank;
  *size_out = size;
  return HALO_OK;
}

static halo_status mpi_split(void *state, int32_t color, int32_t key, void **state_out,
                             int32_t *rank_out, int32_t *size_out) {
  MPI_Comm part;
  HALO_MPI(MPI_Comm_split(*(MPI_Comm *)state, color, key, &part), "MPI_Comm_split");
  return adopt(part, state_out, rank_out, size_out);
}

static void mpi_abort(void *state, int32_t exit_code) {
  if (mpi_is_running()) MPI_Abort(*(MPI_Comm *)state, exit_code);
}

static const halo__remote mpi_remote = {
    .name = "mpi",
    .post = mpi_post,
    .wait = mpi_wait,
    .progress = mpi_progress,
    .barrier = mpi_barrier,
    .split = mpi_split,
    .free = mpi_free,
    .abort = mpi_abort,
};

/* The launcher's count of ranks, 0 when there is none. The first variable that is set decides:
 * mpirun inside a Slurm job also inherits Slurm's variables, which then count mpirun's own daemons.
 * */
static long launcher_size(const char **variable_out) {
  static const char *const variables[] = {"HALO_WORLD", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE",
                                          "SLURM_STEP_NUM_TASKS"};
  for (size_t i = 0; i < sizeof variables / sizeof variables[0]; i++) {
    const char *value = getenv(variables[i]);
    if (value == NULL || *value == 0) continue;
    *variable_out = variables[i];
    return strtol(value, NULL, 10);
  }
  return 0;
}

halo_status halo__mpi_world(const halo__remote **remote_out, void **state_out, int32_t *rank_out,
                            int32_t *size_out) {
  int started = 0, ended = 0, level = 0, size = 0;
  MPI_Initialized(&started);
  MPI_Finalized(&ended);
  HALO_CHECK(!ended, HALO_ESTATE, "comm_world: MPI was shut down before");
  if (!started) {
    HALO_MPI(MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level), "MPI_Init_thread");
    we_initialised = true;
    HALO_CHECK(level >= MPI_THREAD_FUNNELED, HALO_EUNSUPPORTED,
               "comm_world: this MPI library offers no MPI_THREAD_FUNNELED");
  }
  HALO_MPI(MPI_Comm_size(MPI_COMM_WORLD, &size), "MPI_Comm_size");
  const char *variable = "";
  long wanted = launcher_size(&variable);
  HALO_CHECK(
      wanted == 0 || wanted == size, HALO_ESTATE,
      "comm_world: the launcher started %ld ranks (%s), MPI sees %d: launcher and MPI library "
      "do not match (with Slurm use srun --mpi=pmix, or mpirun)",
      wanted, variable, size);
  MPI_Comm world;
  HALO_MPI(MPI_Comm_dup(MPI_COMM_WORLD, &world), "MPI_Comm_dup");
  *remote_out = &mpi_remote;
  return adopt(world, state_out, rank_out, size_out);
}

void halo__mpi_shutdown(void) {
  if (we_initialised && mpi_is_running()) MPI_Finalize();
}

#else

halo_status halo__mpi_world(const halo__remote **remote_out, void **state_out, int32_t *rank_out,
                            int32_t *size_out) {
  (void)remote_out, (void)state_out, (void)rank_out, (void)size_out;
  return halo__error(HALO_EUNSUPPORTED, "comm_world: this build has no MPI (HALO_MPI=OFF)");
}

void halo__mpi_shutdown(void) {}

#endif
