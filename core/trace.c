/* trace.c: where the time goes, and what the ranks were doing last.
 *
 * Three things share this file because they share the clock and the rule "cheap enough to leave on":
 *
 *   totals    per name: calls, time with and without what was called inside, bytes, flops. A span is
 *             two clock reads and a few relaxed atomic adds: 76 ns, and 5 ns when off (one core of a
 *             2.5 GHz Xeon, minimum over 3000 runs of 1000 spans)
 *   events    the same spans one by one, kept only between halo_trace_record and _stop, written as
 *             Chrome trace JSON (chrome://tracing, Perfetto).
 *   flight    a ring of the last 4096 collectives with sequence number, size, peer and times. Written
 *             when something hangs or crashes; ranks whose last number differs name the culprit
 *             (NCCL's flight recorder and PyTorch's have the same shape).
 *
 * Spans nest per thread. A span is closed by the token that opened it, and closing an outer span
 * closes what was left open inside: the engine returns early on errors, and a missing end must not
 * turn all later figures into nonsense. Token 0 is "not traced" and closing it does nothing, so the
 * level may change between begin and end.
 *
 * Names are interned into small ids once; hot callers keep the id. The tables are fixed in size:
 * tracing never allocates on the way, and a full table costs figures, never the run.
 *
 * The flight recorder's dump uses only open, write and close, because the crash handlers of
 * signals.c call it.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
  NAMES = HALO__TRACE_NAMES,
  NAME_BYTES = 64,
  DEPTH = 64,          /* nested spans of a thread */
  EVENTS = 1 << 18,    /* of one recorded window: about 10 MB, some thousand steps of a small model */
  FLIGHT = 4096        /* collectives kept; a power of two */
};

typedef struct total {
  char name[NAME_BYTES];
  atomic_llong calls, ns, self_ns;
  _Atomic double bytes, flops;
} total;

typedef struct frame {
  int32_t id;
  int64_t t0, inside_ns;
  double bytes, flops;
  void *mark; /* on the device's clock; NULL: not asked for */
} frame;

typedef struct event {
  int32_t id, thread;
  int64_t t0, ns;
  double bytes, flops;
} event;

typedef struct flight {
  atomic_llong seq; /* 0: never used */
  const char *op, *comm;
  int64_t bytes, t0, step;
  atomic_llong t1; /* 0: still in it */
  int32_t peer, layer;
} flight;

static atomic_int trace_level = HALO_TRACE_TOTALS;

static total totals[NAMES];
static atomic_int n_names;
static pthread_mutex_t name_lock = PTHREAD_MUTEX_INITIALIZER;

static event *events; // allocated at the first record, kept: a thread may still be adding to it
static atomic_int n_events;
static int64_t events_t0;

static flight flights[FLIGHT];
static atomic_llong flight_begun, flight_done;
static atomic_llong where_step = -1;
static atomic_int where_layer = -1;

static _Thread_local frame stack[DEPTH];
static _Thread_local int32_t depth;

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* A small number per thread, in order of first use: lanes of the trace viewer. */
static int32_t thread_number(void) {
  static atomic_int next;
  static _Thread_local int32_t mine = -1;
  if (mine < 0) mine = atomic_fetch_add(&next, 1);
  return mine;
}

static void add_double(_Atomic double *to, double x) {
  if (x == 0) return;
  double old = atomic_load_explicit(to, memory_order_relaxed);
  while (!atomic_compare_exchange_weak_explicit(to, &old, old + x, memory_order_relaxed,
                                                memory_order_relaxed)) {
  }
}

/* ---- names and spans ------------------------------------------------------------------------ */

int32_t halo_trace_id(const char *name) {
  if (name == NULL || name[0] == 0) return -1;
  pthread_mutex_lock(&name_lock);
  const int32_t n = atomic_load(&n_names);
  int32_t id = 0;
  while (id < n && strncmp(totals[id].name, name, NAME_BYTES - 1) != 0) id++;
  if (id == n) {
    if (n == NAMES) {
      id = -1;
    } else {
      snprintf(totals[n].name, NAME_BYTES, "%s", name);
      atomic_store(&n_names, n + 1);
    }
  }
  pthread_mutex_unlock(&name_lock);
  return id;
}

int32_t halo_trace_begin(int32_t id) {
  if (atomic_load_explicit(&trace_level, memory_order_relaxed) == HALO_TRACE_OFF) return 0;
  if (id < 0 || id >= atomic_load_explicit(&n_names, memory_order_relaxed)) return 0;
  if (depth == DEPTH) return 0;
  stack[depth] = (frame){.id = id, .t0 = now_ns(), .mark = halo__trace_device_begin()};
  return ++depth;
}

static void record_event(const frame *f, int64_t ns) {
  const int32_t i = atomic_fetch_add_explicit(&n_events, 1, memory_order_relaxed);
  if (i < 0 || i >= EVENTS) {
    atomic_store(&n_events, EVENTS + 1); // "some were dropped", and no way to wrap around
    return;
  }
  events[i] = (event){f->id, thread_number(), f->t0, ns, f->bytes, f->flops};
}

void halo_trace_end(int32_t token) {
  if (token <= 0 || token > depth) return;
  const int64_t t1 = now_ns();
  while (depth >= token) {
    const frame *f = &stack[--depth];
    const int64_t ns = t1 - f->t0;
    total *t = &totals[f->id];
    atomic_fetch_add_explicit(&t->calls, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&t->ns, ns, memory_order_relaxed);
    atomic_fetch_add_explicit(&t->self_ns, ns - f->inside_ns, memory_order_relaxed);
    add_double(&t->bytes, f->bytes);
    add_double(&t->flops, f->flops);
    if (depth > 0) stack[depth - 1].inside_ns += ns;
    if (f->mark != NULL) halo__trace_device_end(f->id, depth > 0 ? stack[depth - 1].id : -1, f->mark);
    if (atomic_load_explicit(&trace_level, memory_order_relaxed) == HALO_TRACE_EVENTS) {
      record_event(f, ns);
    }
  }
}

void halo_trace_work(double bytes, double flops) {
  if (depth == 0) return;
  stack[depth - 1].bytes += bytes;
  stack[depth - 1].flops += flops;
}

void halo_trace_count(int32_t id, double bytes, double flops) {
  if (atomic_load_explicit(&trace_level, memory_order_relaxed) == HALO_TRACE_OFF) return;
  if (id < 0 || id >= atomic_load_explicit(&n_names, memory_order_relaxed)) return;
  atomic_fetch_add_explicit(&totals[id].calls, 1, memory_order_relaxed);
  add_double(&totals[id].bytes, bytes);
  add_double(&totals[id].flops, flops);
}

int32_t halo__trace_op_begin(int32_t op, bool is_backward) {
  static const char *const op_names[] = {
#define HALO_OP(name, inputs, params, outputs, gradient, doc) #name,
#include "ops.def"
#undef HALO_OP
      "attention"};
  static atomic_int ids[2][HALO_CALL__COUNT]; // id + 1; 0: not asked for yet
  if (op < 0 || op >= HALO_CALL__COUNT) return 0;
  int32_t id = atomic_load_explicit(&ids[is_backward][op], memory_order_relaxed) - 1;
  if (id < 0) {
    char name[NAME_BYTES];
    snprintf(name, sizeof name, "op.%s%s", op_names[op], is_backward ? ".backward" : "");
    id = halo_trace_id(name);
    atomic_store_explicit(&ids[is_backward][op], id + 1, memory_order_relaxed);
  }
  return halo_trace_begin(id);
}

/* ---- reading the totals --------------------------------------------------------------------- */

int32_t halo_trace_set_level(int32_t level) {
  const int32_t old = atomic_load(&trace_level);
  if (level == HALO_TRACE_OFF || level == HALO_TRACE_TOTALS ||
      (level == HALO_TRACE_EVENTS && events != NULL)) {
    atomic_store(&trace_level, level);
  }
  return old;
}

int32_t halo_trace_names(void) { return atomic_load(&n_names); }

halo_status halo_trace_read(halo_trace_row *out, int32_t id) {
  HALO_CHECK(out != NULL, HALO_EARG, "trace_read: out is NULL");
  HALO_CHECK(id >= 0 && id < atomic_load(&n_names), HALO_EARG,
             "trace_read: id %d is outside [0,%d)", id, atomic_load(&n_names));
  total *t = &totals[id];
  *out = (halo_trace_row){.name = t->name,
                          .calls = atomic_load(&t->calls),
                          .seconds = (double)atomic_load(&t->ns) * 1e-9,
                          .self_seconds = (double)atomic_load(&t->self_ns) * 1e-9,
                          .bytes = atomic_load(&t->bytes),
                          .flops = atomic_load(&t->flops)};
  return halo__trace_device_read(&out->device_seconds, &out->device_self_seconds, id);
}

void halo_trace_reset(void) {
  const int32_t n = atomic_load(&n_names);
  for (int32_t i = 0; i < n; i++) {
    atomic_store(&totals[i].calls, 0);
    atomic_store(&totals[i].ns, 0);
    atomic_store(&totals[i].self_ns, 0);
    atomic_store(&totals[i].bytes, 0);
    atomic_store(&totals[i].flops, 0);
  }
  halo__trace_device_reset();
}

/* ---- a window of events --------------------------------------------------------------------- */

halo_status halo_trace_record(void) {
  if (events == NULL) {
    // Not from the counted allocator: ten megabytes of tracing are no part of anybody's model.
    events = malloc((size_t)EVENTS * sizeof *events);
    HALO_CHECK(events != NULL, HALO_ENOMEM, "trace_record: no memory for %d events", EVENTS);
  }
  atomic_store(&n_events, 0);
  events_t0 = now_ns();
  atomic_store(&trace_level, HALO_TRACE_EVENTS);
  return HALO_OK;
}

void halo_trace_stop(void) {
  int expected = HALO_TRACE_EVENTS;
  atomic_compare_exchange_strong(&trace_level, &expected, HALO_TRACE_TOTALS);
}

static void write_quoted(FILE *file, const char *s) {
  fputc('"', file);
  for (; *s; s++) {
    const unsigned char c = (unsigned char)*s;
    if (c == '"' || c == '\\') {
      fprintf(file, "\\%c", c);
    } else if (c < 0x20 || c == 0x7f) {
      fprintf(file, "\\u%04x", c);
    } else {
      fputc(c, file);
    }
  }
  fputc('"', file);
}

halo_status halo_trace_export(const char *path, int32_t rank) {
  HALO_CHECK(path != NULL, HALO_EARG, "trace_export: path is NULL");
  halo_trace_stop();
  FILE *file = fopen(path, "we");
  HALO_CHECK(file != NULL, HALO_EIO, "trace_export: cannot write %s: %s", path, strerror(errno));
  const int32_t seen = atomic_load(&n_events), n = seen > EVENTS ? EVENTS : seen;
  // Monotonic clocks of two nodes have nothing in common; wall-clock times let ranks be laid side
  // by side as well as the nodes' clocks agree.
  struct timespec wall;
  clock_gettime(CLOCK_REALTIME, &wall);
  const double offset_us =
      ((double)wall.tv_sec * 1e9 + (double)wall.tv_nsec - (double)now_ns()) * 1e-3;
  fprintf(file, "{\"displayTimeUnit\":\"ms\",\"otherData\":{\"rank\":%d,\"dropped\":%s},\n", rank,
          seen > EVENTS ? "true" : "false");
  fprintf(file, "\"traceEvents\":[\n{\"ph\":\"M\",\"name\":\"process_name\",\"pid\":%d,\"tid\":0,"
                "\"args\":{\"name\":\"rank %d\"}}", rank, rank);
  for (int32_t i = 0; i < n; i++) {
    const event *e = &events[i];
    fprintf(file, ",\n{\"ph\":\"X\",\"name\":");
    write_quoted(file, totals[e->id].name);
    fprintf(file, ",\"pid\":%d,\"tid\":%d,\"ts\":%.3f,\"dur\":%.3f,\"args\":{\"bytes\":%.17g,"
                  "\"flops\":%.17g}}",
            rank, e->thread, (double)e->t0 * 1e-3 + offset_us, (double)e->ns * 1e-3, e->bytes,
            e->flops);
  }
  fprintf(file, "\n]}\n");
  const bool is_bad = ferror(file) != 0;
  const int closed = fclose(file);
  HALO_CHECK(!is_bad && closed == 0, HALO_EIO, "trace_export: cannot write %s: %s", path,
             strerror(errno));
  return HALO_OK;
}

/* ---- flight recorder ------------------------------------------------------------------------ */

void halo_trace_where(int64_t step, int32_t layer) {
  atomic_store_explicit(&where_step, step, memory_order_relaxed);
  atomic_store_explicit(&where_layer, layer, memory_order_relaxed);
}

int64_t halo__trace_comm_begin(const char *op, const char *comm, int64_t bytes, int32_t peer) {
  const int64_t seq = atomic_fetch_add(&flight_begun, 1) + 1;
  flight *f = &flights[seq & (FLIGHT - 1)];
  atomic_store(&f->seq, 0); // a dump in between must not see half an entry
  f->op = op;
  f->comm = comm;
  f->bytes = bytes;
  f->peer = peer;
  f->step = atomic_load_explicit(&where_step, memory_order_relaxed);
  f->layer = atomic_load_explicit(&where_layer, memory_order_relaxed);
  f->t0 = now_ns();
  atomic_store(&f->t1, 0);
  atomic_store(&f->seq, seq);
  return seq;
}

void halo__trace_comm_end(int64_t seq) {
  flight *f = &flights[seq & (FLIGHT - 1)];
  if (atomic_load(&f->seq) == seq) atomic_store(&f->t1, now_ns());
  long long done = atomic_load(&flight_done);
  while (done < seq && !atomic_compare_exchange_weak(&flight_done, &done, seq)) {
  }
}

void halo_trace_flight(int64_t *begun_out, int64_t *done_out, double *waiting_seconds_out) {
  const int64_t begun = atomic_load(&flight_begun), done = atomic_load(&flight_done);
  double waiting = 0;
  if (begun > done) {
    const flight *f = &flights[begun & (FLIGHT - 1)];
    if (atomic_load(&f->seq) == begun) waiting = (double)(now_ns() - f->t0) * 1e-9;
  }
  if (begun_out != NULL) *begun_out = begun;
  if (done_out != NULL) *done_out = done;
  if (waiting_seconds_out != NULL) *waiting_seconds_out = waiting;
}

/* A line buffer for code that may run in a signal handler: no stdio, no allocation. */
typedef struct line {
  char text[512];
  size_t n;
} line;

static void put(line *l, const char *s) {
  // Names are the engine's own literals: nothing to escape.
  for (; s != NULL && *s && l->n < sizeof l->text; s++) l->text[l->n++] = *s;
}

static void put_number(line *l, int64_t value) {
  char digits[24];
  size_t n = sizeof digits;
  uint64_t u = value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
  digits[--n] = 0;
  do {
    digits[--n] = (char)('0' + u % 10);
    u /= 10;
  } while (u != 0);
  if (value < 0) digits[--n] = '-';
  put(l, digits + n);
}

static void put_field(line *l, const char *name, int64_t value) {
  put(l, ",\"");
  put(l, name);
  put(l, "\":");
  put_number(l, value);
}

static bool write_line(int fd, const line *l) {
  size_t at = 0;
  while (at < l->n) {
    const ssize_t n = write(fd, l->text + at, l->n - at);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    at += (size_t)n;
  }
  return true;
}

bool halo__trace_flight_write(int fd) {
  const int64_t begun = atomic_load(&flight_begun), now = now_ns();
  int64_t from = begun - FLIGHT + 1;
  if (from < 1) from = 1;
  for (int64_t seq = from; seq <= begun; seq++) {
    flight *f = &flights[seq & (FLIGHT - 1)];
    if (atomic_load(&f->seq) != seq) continue; // overwritten or half written meanwhile
    const int64_t t1 = atomic_load(&f->t1);
    line l = {.n = 0};
    put(&l, "{\"seq\":");
    put_number(&l, seq);
    put(&l, ",\"op\":\"");
    put(&l, f->op);
    put(&l, "\",\"comm\":\"");
    put(&l, f->comm);
    put(&l, "\"");
    put_field(&l, "bytes", f->bytes);
    put_field(&l, "peer", f->peer);
    put_field(&l, "step", f->step);
    put_field(&l, "layer", f->layer);
    put_field(&l, "ago_us", (now - f->t0) / 1000);
    put(&l, t1 != 0 ? ",\"done\":true" : ",\"done\":false");
    put_field(&l, "us", ((t1 != 0 ? t1 : now) - f->t0) / 1000);
    put(&l, "}\n");
    if (!write_line(fd, &l)) return false;
  }
  return true;
}

halo_status halo_trace_flight_dump(const char *path) {
  HALO_CHECK(path != NULL, HALO_EARG, "trace_flight_dump: path is NULL");
  // 0600: a crash file may tell more than its owner wants others to read.
  const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
  HALO_CHECK(fd >= 0, HALO_EIO, "trace_flight_dump: cannot write %s: %s", path, strerror(errno));
  const bool ok = halo__trace_flight_write(fd);
  const int code = errno;
  close(fd);
  HALO_CHECK(ok, HALO_EIO, "trace_flight_dump: cannot write %s: %s", path, strerror(code));
  return HALO_OK;
}
