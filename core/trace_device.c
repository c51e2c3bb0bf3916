/* trace_device.c: spans on a device's own clock.
 *
 * Work on a device is queued: the host's clock says how long queueing took. Where somebody asks for it
 * (halo_trace_device), a span leaves a mark in the queue at its begin and at its end, and the time between
 * the two marks is what the device spent on what was queued inside.
 *
 *      host     [ op A ][ op B ]                          begin and end queue marks, nothing waits
 *      queue    |a  kernels of A  a'|b  kernels of B  b'|
 *      totals   A += a' - a, B += b' - b                  when somebody reads, or PAIRS are unsettled
 *
 * A span's time counts for itself and against the span around it, so that `self` adds up to the time of
 * the outermost spans. Where the queue runs dry the device waits for the host inside some span, and that
 * wait is counted there too: a table whose sum is far below the step's time is of a device that waits
 * between spans.
 *
 * One thread at a time: the one that switched it on.
 */
#include "internal.h"
#include "kernels.h"

#include <string.h>

enum { PAIRS = 4096, SPARE = 2 * PAIRS + 256 };

typedef struct pair {
  int32_t id, parent;
  void *from, *to;
} pair;

static _Thread_local bool is_on;
static halo_device device;
static pair pairs[PAIRS];
static int32_t n_pairs, n_spare;
static void *spare[SPARE]; /* marks to use again */
static double seconds[HALO__TRACE_NAMES], self_seconds[HALO__TRACE_NAMES];
static halo_status trouble; /* the first failure since the last reset; a missing figure must show */

bool halo__trace_device_is_on(void) { return is_on; }

static void give_back(void *mark) {
  if (n_spare < SPARE) {
    spare[n_spare++] = mark;
  } else {
    halo__kernels(device)->mark_free(mark);
  }
}

static void *put_mark(void) {
  void *mark = n_spare > 0 ? spare[--n_spare] : NULL;
  const halo_status status = halo__kernels(device)->mark(&mark);
  if (status == HALO_OK) return mark;
  if (trouble == HALO_OK) trouble = status;
  if (mark != NULL) give_back(mark);
  return NULL;
}

/* Wait for the pairs at hand and add them up. */
static void settle(void) {
  for (int32_t i = 0; i < n_pairs; i++) {
    const pair *p = &pairs[i];
    double s = 0;
    const halo_status status = halo__kernels(device)->mark_seconds(&s, p->from, p->to);
    if (status != HALO_OK && trouble == HALO_OK) trouble = status;
    seconds[p->id] += s;
    self_seconds[p->id] += s;
    if (p->parent >= 0) self_seconds[p->parent] -= s;
    give_back(p->from);
    give_back(p->to);
  }
  n_pairs = 0;
}

void *halo__trace_device_begin(void) { return is_on ? put_mark() : NULL; }

void halo__trace_device_end(int32_t id, int32_t parent, void *from) {
  void *to = is_on ? put_mark() : NULL;
  if (to == NULL) { // switched off inside the span, or no mark to be had
    give_back(from);
    return;
  }
  if (n_pairs == PAIRS) settle();
  pairs[n_pairs++] = (pair){.id = id, .parent = parent, .from = from, .to = to};
}

halo_status halo__trace_device_read(double *seconds_out, double *self_out, int32_t id) {
  settle();
  *seconds_out = seconds[id];
  *self_out = self_seconds[id];
  return trouble;
}

void halo__trace_device_reset(void) {
  settle();
  memset(seconds, 0, sizeof seconds);
  memset(self_seconds, 0, sizeof self_seconds);
  trouble = HALO_OK;
}

halo_status halo_trace_device(int32_t which) {
  settle();
  if (which == HALO_CPU) {
    while (n_spare > 0) halo__kernels(device)->mark_free(spare[--n_spare]);
    is_on = false;
    return HALO_OK;
  }
  HALO_CHECK(halo_device_count(which) > 0, HALO_EUNSUPPORTED, "trace_device: there is no device %d", which);
  device = (halo_device)which;
  is_on = true;
  return HALO_OK;
}
