/* signals.c: what the outside asks of a running job.
 *
 * A handler only sets a bit; the training loop looks at a step boundary, agrees with the other ranks
 * (the maximum of the masks, since all must stop at the same step), saves and exits with 75. Nothing
 * else is safe: neither MPI nor the allocator may be called from a handler.
 *
 *   SIGUSR1           save and stop ("the time is nearly up"); what a batch system is told to send,
 *                     because Open MPI's mpirun forwards it untouched while it answers SIGTERM with
 *                     SIGKILL after one second (reliability.md 4.5)
 *   SIGTERM, SIGINT   the same; a second one means "now" and gets the default action
 *   SIGPIPE           ignored: a closed terminal or pipe is a failed write, not a death
 *   SIGSEGV, SIGBUS,  on an alternate stack: write the flight recorder to the file that
 *   SIGFPE, SIGABRT   halo_signals_install was given, put the previous handler back, go on with it
 *                     (a core dump, or a sanitizer's report)
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { CRASH_PATH_BYTES = 1024, CRASH_STACK_BYTES = 65536 };

static const struct request {
  int signal, bit;
} requests[] = {{SIGUSR1, HALO_SIGNAL_USR1}, {SIGTERM, HALO_SIGNAL_TERM}, {SIGINT, HALO_SIGNAL_INT}};
static const int crashes[] = {SIGSEGV, SIGBUS, SIGFPE, SIGABRT};

enum {
  REQUESTS = sizeof requests / sizeof *requests,
  CRASHES = sizeof crashes / sizeof *crashes
};

static atomic_int pending;
static bool is_installed;
static struct sigaction old_request[REQUESTS], old_crash[CRASHES], old_pipe;
static char crash_path[CRASH_PATH_BYTES];
static char crash_stack[CRASH_STACK_BYTES];

static void on_request(int signal) {
  const int saved = errno;
  for (int i = 0; i < REQUESTS; i++) {
    if (requests[i].signal != signal) continue;
    const int before = atomic_fetch_or(&pending, requests[i].bit);
    if ((before & requests[i].bit) != 0 && signal != SIGUSR1) {
      // Asked twice: no saving, no waiting. Delivered when this handler returns.
      struct sigaction plain = {.sa_handler = SIG_DFL};
      sigaction(signal, &plain, NULL);
      raise(signal);
    }
  }
  errno = saved;
}

static void on_crash(int signal) {
  const int fd = open(crash_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd >= 0) {
    halo__trace_flight_write(fd);
    close(fd);
  }
  for (int i = 0; i < CRASHES; i++) {
    if (crashes[i] == signal) sigaction(signal, &old_crash[i], NULL);
  }
  raise(signal); // delivered on return: the mask holds it back until then
}

halo_status halo_signals_install(const char *crash_file) {
  HALO_CHECK(!is_installed, HALO_ESTATE, "signals_install: already installed");
  HALO_CHECK(crash_file == NULL || strlen(crash_file) < CRASH_PATH_BYTES, HALO_EARG,
             "signals_install: the crash file's path is longer than %d bytes", CRASH_PATH_BYTES - 1);
  atomic_store(&pending, 0);
  for (int i = 0; i < REQUESTS; i++) {
    // SA_RESTART: a read of some library that knows nothing of us must not fail half way.
    struct sigaction a = {.sa_handler = on_request, .sa_flags = SA_RESTART};
    sigaction(requests[i].signal, &a, &old_request[i]);
  }
  struct sigaction ignore = {.sa_handler = SIG_IGN};
  sigaction(SIGPIPE, &ignore, &old_pipe);
  crash_path[0] = 0;
  if (crash_file != NULL && crash_file[0] != 0) {
    snprintf(crash_path, sizeof crash_path, "%s", crash_file);
    stack_t alternate = {.ss_sp = crash_stack, .ss_size = sizeof crash_stack};
    sigaltstack(&alternate, NULL);
    for (int i = 0; i < CRASHES; i++) {
      struct sigaction a = {.sa_handler = on_crash, .sa_flags = SA_ONSTACK};
      sigaction(crashes[i], &a, &old_crash[i]);
    }
  }
  is_installed = true;
  return HALO_OK;
}

void halo_signals_restore(void) {
  if (!is_installed) return;
  for (int i = 0; i < REQUESTS; i++) sigaction(requests[i].signal, &old_request[i], NULL);
  for (int i = 0; i < CRASHES && crash_path[0] != 0; i++) {
    sigaction(crashes[i], &old_crash[i], NULL);
  }
  sigaction(SIGPIPE, &old_pipe, NULL);
  is_installed = false;
}

int32_t halo_signal_pending(void) { return atomic_load(&pending); }

void halo_signal_clear(int32_t mask) { atomic_fetch_and(&pending, ~mask); }
