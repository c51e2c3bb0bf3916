/* shadow: a CUDA device made of host memory, to find host code that touches device memory.
 *
 * A build with -DHALO_CUDA=SHADOW has the whole CUDA side of core/, but each halo_cuda_<name> is a
 * generated function (forward.awk) that calls halo_cpu_<name>. Device memory is an arena of its own:
 *
 *      [ ---- reserved address range, no access ------------------------------------------------ ]
 *        ^ used so far ^                opened (read, write) while a kernel runs, then shut again
 *
 * so host code that reads or writes a device pointer stops with a report instead of working by luck, a
 * host pointer handed to a kernel is an error that names the argument, and word of bad input (a token
 * id) comes at the next synchronisation, as on a real device. New and freed memory is filled with NaN.
 * The arena is small (HALO_SHADOW_BYTES, 4 GiB) and speed does not matter: tests only.
 *
 * twin      kernels/cuda/memory.cu
 */
#include <assert.h>
#include <execinfo.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "shadow/shadow.h"

#define ARENA_BYTES ((int64_t)4 << 30)
enum { BLOCK_ROUND = 512, POISON = 0xff, POISON_BYTES = 4 << 20 };

typedef struct extent {
  int64_t at, bytes;
} extent;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static char *arena;
static int64_t capacity, used; /* bytes from the start that ever were handed out */
static int32_t depth;          /* how many have it open */
static extent *holes;          /* free blocks below `used`, by address, never touching each other */
static int32_t n_holes, max_holes;
static char kept[320]; /* word of bad input */
static struct sigaction before;

/* ---- the arena ----------------------------------------------------------------------------- */

static void say(const char *text) {
  if (write(STDERR_FILENO, text, strlen(text)) < 0) return;
}

static void on_fault(int signal, siginfo_t *info, void *context) {
  const char *p = info->si_addr;
  (void)context;
  if (p >= arena && p < arena + capacity) {
    say("shadow: host code touched device memory; it may only be handed to kernels and copies. Stack:\n");
    void *frames[48];
    backtrace_symbols_fd(frames, backtrace(frames, 48), STDERR_FILENO);
  }
  sigaction(signal, &before, NULL); // the access happens again, and whoever came before us sees it
}

static void reserve(void) {
  const char *text = getenv("HALO_SHADOW_BYTES");
  capacity = text != NULL ? strtoll(text, NULL, 10) : ARENA_BYTES;
  void *p = mmap(NULL, (size_t)capacity, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    capacity = 0;
    return;
  }
  arena = p;
  void *warm[1];
  backtrace(warm, 1); // loads what it needs now, not inside the handler
  struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
  sigaction(SIGSEGV, &action, &before);
}

static void protect(int access) {
  if (used > 0 && mprotect(arena, (size_t)((used + 4095) / 4096 * 4096), access) != 0) {
    say("shadow: mprotect failed\n");
  }
}

void halo__shadow_open(void) {
  pthread_mutex_lock(&lock);
  if (depth++ == 0) protect(PROT_READ | PROT_WRITE);
  pthread_mutex_unlock(&lock);
}

void halo__shadow_close(void) {
  pthread_mutex_lock(&lock);
  if (--depth == 0) protect(PROT_NONE);
  pthread_mutex_unlock(&lock);
}

static bool is_device(const void *p) {
  return (const char *)p >= arena && (const char *)p < arena + capacity;
}

halo_status halo__shadow_device(const char *kernel, const char *argument, const void *p) {
  HALO_CHECK(p == NULL || is_device(p), HALO_ECUDA,
             "cuda: %s: argument %s is host memory, which a device cannot reach", kernel, argument);
  return HALO_OK;
}

halo_status halo__shadow_host(const char *kernel, const char *argument, const void *p) {
  HALO_CHECK(p == NULL || !is_device(p), HALO_ECUDA,
             "cuda: %s: argument %s is device memory, host memory is wanted", kernel, argument);
  return HALO_OK;
}

/* ---- errors that come late ----------------------------------------------------------------- */

halo_status halo__shadow_done(const char *kernel, halo_status status) {
  if (status != HALO_EARG) return status;
  bool is_backward = false;
  const char *op = halo__op_now(&is_backward);
  pthread_mutex_lock(&lock);
  if (kept[0] == 0) {
    snprintf(kept, sizeof kept, "cuda: %s%s: %s", op != NULL ? op : kernel,
             op != NULL && is_backward ? " (backward)" : "", halo_error_message());
  }
  pthread_mutex_unlock(&lock);
  return HALO_OK;
}

halo_status halo_cuda_synchronize(void) {
  pthread_mutex_lock(&lock);
  char text[sizeof kept];
  memcpy(text, kept, sizeof text);
  kept[0] = 0;
  pthread_mutex_unlock(&lock);
  HALO_CHECK(text[0] == 0, HALO_EARG, "%s", text);
  return HALO_OK;
}

/* ---- memory -------------------------------------------------------------------------------- */

static int64_t rounded(int64_t bytes) {
  return bytes <= 0 ? BLOCK_ROUND : (bytes + BLOCK_ROUND - 1) / BLOCK_ROUND * BLOCK_ROUND;
}

static void poison(void *p, int64_t bytes) {
  halo__shadow_open();
  memset(p, POISON, (size_t)(bytes < POISON_BYTES ? bytes : POISON_BYTES));
  halo__shadow_close();
}

/* First hole that is large enough (its content is poison already), else the end of what is used; -1:
 * full. */
static int64_t place(int64_t bytes, bool *is_new) {
  *is_new = false;
  for (int32_t i = 0; i < n_holes; i++) {
    if (holes[i].bytes < bytes) continue;
    const int64_t at = holes[i].at;
    holes[i].at += bytes;
    holes[i].bytes -= bytes;
    if (holes[i].bytes == 0) memmove(&holes[i], &holes[i + 1], (size_t)(--n_holes - i) * sizeof *holes);
    return at;
  }
  *is_new = true;
  if (bytes > capacity - used) return -1;
  if (depth > 0) { // new pages are open like the others
    mprotect(arena + used / 4096 * 4096, (size_t)(bytes + 8192) / 4096 * 4096, PROT_READ | PROT_WRITE);
  }
  used += bytes;
  return used - bytes;
}

halo_status halo_cuda_memory_new(void **out, int64_t asked) {
  pthread_once(&once, reserve);
  const int64_t bytes = rounded(asked);
  pthread_mutex_lock(&lock);
  bool is_new = false;
  const int64_t at = place(bytes, &is_new);
  pthread_mutex_unlock(&lock);
  HALO_CHECK(at >= 0, HALO_ENOMEM, "shadow: no %lld bytes in the arena", (long long)asked);
  *out = arena + at;
  if (is_new) poison(*out, bytes);
  return HALO_OK;
}

halo_status halo_cuda_memory_free(void *p, int64_t asked) {
  if (p == NULL) return HALO_OK;
  const int64_t bytes = rounded(asked), at = (char *)p - arena;
  assert(is_device(p));
  poison(p, bytes);
  pthread_mutex_lock(&lock);
  int32_t i = 0;
  while (i < n_holes && holes[i].at < at) i++;
  const bool joins_left = i > 0 && holes[i - 1].at + holes[i - 1].bytes == at;
  const bool joins_right = i < n_holes && at + bytes == holes[i].at;
  if (joins_left && joins_right) {
    holes[i - 1].bytes += bytes + holes[i].bytes;
    memmove(&holes[i], &holes[i + 1], (size_t)(--n_holes - i) * sizeof *holes);
  } else if (joins_left) {
    holes[i - 1].bytes += bytes;
  } else if (joins_right) {
    holes[i] = (extent){.at = at, .bytes = bytes + holes[i].bytes};
  } else {
    if (n_holes == max_holes) {
      const int32_t more = max_holes > 0 ? 2 * max_holes : 256;
      extent *larger = realloc(holes, (size_t)more * sizeof *larger);
      if (larger == NULL) { // the block is lost to the arena, nothing else
        pthread_mutex_unlock(&lock);
        return HALO_OK;
      }
      holes = larger;
      max_holes = more;
    }
    memmove(&holes[i + 1], &holes[i], (size_t)(n_holes++ - i) * sizeof *holes);
    holes[i] = (extent){.at = at, .bytes = bytes};
  }
  pthread_mutex_unlock(&lock);
  return HALO_OK;
}

halo_status halo_cuda_memory_trim(void) { return HALO_OK; }

halo_status halo_cuda_copy_in(void *y, const void *host, int64_t bytes) {
  if (bytes <= 0) return HALO_OK;
  HALO_TRY(halo__shadow_device("copy_in", "y", y));
  HALO_TRY(halo__shadow_host("copy_in", "host", host));
  halo__shadow_open();
  memcpy(y, host, (size_t)bytes);
  halo__shadow_close();
  return HALO_OK;
}

halo_status halo_cuda_copy_out(void *host, const void *x, int64_t bytes) {
  if (bytes > 0) {
    HALO_TRY(halo__shadow_device("copy_out", "x", x));
    HALO_TRY(halo__shadow_host("copy_out", "host", host));
    halo__shadow_open();
    memcpy(host, x, (size_t)bytes);
    halo__shadow_close();
  }
  return halo_cuda_synchronize();
}

halo_status halo_cuda_copy(void *y, const void *x, int64_t bytes) {
  if (bytes <= 0) return HALO_OK;
  HALO_TRY(halo__shadow_device("copy", "y", y));
  HALO_TRY(halo__shadow_device("copy", "x", x));
  halo__shadow_open();
  memmove(y, x, (size_t)bytes);
  halo__shadow_close();
  return HALO_OK;
}

halo_status halo_cuda_zero(void *y, int64_t bytes) {
  if (bytes <= 0) return HALO_OK;
  HALO_TRY(halo__shadow_device("zero", "y", y));
  halo__shadow_open();
  memset(y, 0, (size_t)bytes);
  halo__shadow_close();
  return HALO_OK;
}

/* ---- offload: copies are done only when somebody waits for them ------------------------------- */

enum { MAX_LATE = 64 };
static struct late {
  void *to;
  const void *from;
  int64_t bytes;
} late[MAX_LATE];
static int64_t late_begun, late_done; /* tickets given out, copies made */

static halo_status catch_up(int64_t to) {
  for (; late_done < to; late_done++) {
    const struct late *l = &late[late_done % MAX_LATE];
    halo__shadow_open();
    memcpy(l->to, l->from, (size_t)l->bytes);
    halo__shadow_close();
  }
  return HALO_OK;
}

static halo_status postpone(void *to, const void *from, int64_t bytes, int64_t *ticket) {
  if (late_begun - late_done == MAX_LATE) catch_up(late_done + 1);
  late[late_begun % MAX_LATE] = (struct late){to, from, bytes};
  *ticket = late_begun++;
  return HALO_OK;
}

halo_status halo_cuda_pinned_new(void **out, int64_t bytes) { return halo_cpu_memory_new(out, bytes); }
halo_status halo_cuda_pinned_free(void *p) { return halo_cpu_memory_free(p, 0); }

halo_status halo_cuda_offload_out(void *host, const void *x, int64_t bytes, int64_t *ticket) {
  HALO_TRY(halo__shadow_host("offload_out", "host", host));
  HALO_TRY(halo__shadow_device("offload_out", "x", x));
  return postpone(host, x, bytes, ticket);
}

halo_status halo_cuda_offload_in(void *y, const void *host, int64_t bytes, int64_t *ticket) {
  HALO_TRY(halo__shadow_device("offload_in", "y", y));
  HALO_TRY(halo__shadow_host("offload_in", "host", host));
  return postpone(y, host, bytes, ticket);
}

halo_status halo_cuda_offload_wait(int64_t ticket) {
  HALO_CHECK(ticket >= 0 && ticket < late_begun, HALO_EARG, "offload_wait: ticket %lld", (long long)ticket);
  return catch_up(ticket + 1);
}

halo_status halo_cuda_offload_finish(void) { return catch_up(late_begun); }

/* ---- the device ---------------------------------------------------------------------------- */

halo_status halo_cuda_device_count(int32_t *out) {
  *out = 1;
  return HALO_OK;
}

halo_status halo_cuda_device_read(halo_device_row *out, int32_t index) {
  pthread_once(&once, reserve);
  *out = (halo_device_row){.total_bytes = capacity, .free_bytes = capacity - used, .processors = 1};
  snprintf(out->name, sizeof out->name, "shadow %d (host memory, tests only)", index);
  return HALO_OK;
}

halo_status halo_cuda_device_select(int32_t index) {
  (void)index;
  return HALO_OK;
}

void halo_cuda_versions(int32_t *driver_out, int32_t *runtime_out) { *driver_out = *runtime_out = 0; }

/* ---- arguments that are structs ------------------------------------------------------------ */

#define DEVICE(p) HALO_TRY(halo__shadow_device(kernel, #p, p))

halo_status halo__shadow_halo_gemm(const char *kernel, const halo_gemm *g) {
  HALO_TRY(halo__shadow_host(kernel, "g", g));
  DEVICE(g->c.data);
  DEVICE(g->a.data);
  DEVICE(g->b.data);
  return HALO_OK;
}

halo_status halo__shadow_halo_adamw_step_args(const char *kernel, const halo_adamw_step_args *s) {
  return halo__shadow_host(kernel, "s", s);
}

halo_status halo__shadow_halo_attention_queries(const char *kernel, const halo_attention_queries *a) {
  HALO_TRY(halo__shadow_host(kernel, "a", a));
  DEVICE(a->q);
  DEVICE(a->position);
  DEVICE(a->first);
  DEVICE(a->pattern_of);
  DEVICE(a->o);
  DEVICE(a->m);
  DEVICE(a->l);
  DEVICE(a->grad);
  DEVICE(a->lse);
  DEVICE(a->delta);
  DEVICE(a->dq);
  return HALO_OK;
}

static halo_status rows_on_device(const char *kernel, const halo__rows *rows) {
  HALO_TRY(halo__shadow_host(kernel, "rows", rows));
  if (rows == NULL) return HALO_OK;
  DEVICE(rows->offset);
  DEVICE(rows->run);
  return HALO_OK;
}

halo_status halo__shadow_halo_attention_tiles(const char *kernel, const halo_attention_tiles *keys) {
  HALO_TRY(halo__shadow_host(kernel, "keys", keys));
  DEVICE(keys->k);
  DEVICE(keys->v);
  DEVICE(keys->position);
  DEVICE(keys->dk);
  DEVICE(keys->dv);
  return rows_on_device(kernel, keys->by_query);
}

halo_status halo__shadow_halo_attention_columns(const char *kernel, const halo_attention_columns *keys) {
  HALO_TRY(halo__shadow_host(kernel, "keys", keys));
  DEVICE(keys->k);
  DEVICE(keys->v);
  DEVICE(keys->token_offset);
  DEVICE(keys->token);
  DEVICE(keys->slot_offset);
  DEVICE(keys->slot);
  DEVICE(keys->dk);
  DEVICE(keys->dv);
  return rows_on_device(kernel, keys->by_query);
}

halo_status halo__shadow_halo_probe(const char *kernel, const halo_probe *p) {
  HALO_TRY(halo__shadow_host(kernel, "p", p));
  DEVICE(p->k);
  DEVICE(p->start);
  DEVICE(p->q);
  DEVICE(p->first);
  DEVICE(p->last);
  DEVICE(p->z);
  return HALO_OK;
}
