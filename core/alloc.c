/* alloc.c: counted, cached memory.
 *
 * Training asks for the same sizes every step. A freed block goes to the free list of its size class
 * and comes back from there, so the steady state neither calls the system nor touches fresh pages
 * (first touch of a page costs more than most kernels that fill it). Size classes are eighths of a
 * power of two, so at most 12.5 % of a block is unused.
 *
 *   [ header 64 bytes: class, tag, device, bytes ][ user data, 64-byte aligned ... ]
 *
 * Bytes are counted per (device, tag); the tag is the thread's current one.
 *
 * Memory of a CUDA device comes from the kernel table (memory_new), whose pool keeps freed blocks
 * itself and remaps fragments: no lists and no size classes here, only 512-byte rounding. The host
 * cannot write a header before such a block, so what is known of it sits in a hash table by address,
 * which is also how halo__free tells the two kinds apart. When the device says no, it is given time to
 * finish what holds memory (synchronize), gives cached blocks back (trim), and is asked once more.
 *
 * halo_memory_limit and halo_memory_fail_after exist so that "out of memory" is an ordinary, tested
 * path instead of a rumour.
 */
#include "internal.h"
#include "kernels.h"

#include <assert.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
  HEADER_BYTES = 64,
  SUBCLASSES = 8, /* classes per power of two */
  MIN_SHIFT = 8,  /* smallest class: 256 bytes */
  MAX_SHIFT = 44,
  CLASS_COUNT = (MAX_SHIFT - MIN_SHIFT + 1) * SUBCLASSES,
  HUGE_BYTES = 4 << 20, /* from here on ask for 2 MiB pages */
  TAG_DEPTH = 32,
  DEVICE_ROUND = 512,   /* device blocks; what the driver's pool rounds to */
  FIRST_TABLE = 1024
};

typedef struct header {
  struct header *next; /* free list */
  int64_t bytes;       /* of the class, header not included */
  int32_t class_index;
  int32_t tag;
  int32_t device;
  uint32_t magic;
} header;

static_assert(sizeof(header) <= HEADER_BYTES, "header fits its slot");

/* Under AddressSanitizer, as gcc and clang say it. */
#if defined(__SANITIZE_ADDRESS__)
#define WATCHED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define WATCHED 1
#endif
#endif

#define MAGIC_LIVE 0x48414c4fu
#define MAGIC_FREE 0x46524545u

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static header *free_list[CLASS_COUNT];
static int64_t live[2][HALO_TAG_COUNT + 1], peak[2][HALO_TAG_COUNT + 1]; /* last: sum */
static int64_t limit_bytes[2];
static int64_t fail_after = -1;

/* Blocks of devices by address: open addressing, linear probing, at most half full. */
typedef struct block {
  void *at; /* NULL: free slot */
  int64_t bytes;
  int32_t device, tag;
} block;
static block *table;
static int64_t table_size, table_used; /* size: 0 or a power of two */

static _Thread_local int32_t tag_stack[TAG_DEPTH];
static _Thread_local int32_t tag_depth;

int32_t halo__current_tag(void) {
  if (tag_depth == 0) return HALO_TAG_OTHER;
  const int32_t top = tag_depth < TAG_DEPTH ? tag_depth : TAG_DEPTH;
  return tag_stack[top - 1];
}

void halo_memory_push_tag(int32_t tag) {
  if (tag < 0 || tag >= HALO_TAG_COUNT) tag = HALO_TAG_OTHER;
  if (tag_depth < TAG_DEPTH) tag_stack[tag_depth] = tag;
  tag_depth++;
}

void halo_memory_pop_tag(void) {
  if (tag_depth > 0) tag_depth--;
}

/* Class of a request and the size that class hands out; -1 if too large. */
static int32_t class_of(int64_t bytes, int64_t *class_bytes) {
  int32_t shift = MIN_SHIFT;
  while (shift <= MAX_SHIFT && ((int64_t)1 << (shift + 1)) < bytes) shift++;
  if (shift > MAX_SHIFT) return -1;
  const int64_t base = (int64_t)1 << shift, step = base / SUBCLASSES;
  int64_t sub = bytes <= base ? 0 : (bytes - base + step - 1) / step;
  if (bytes <= base) {
    *class_bytes = base;
  } else {
    *class_bytes = base + sub * step;
  }
  const int32_t index = (shift - MIN_SHIFT) * SUBCLASSES + (int32_t)sub;
#if WATCHED
  *class_bytes = bytes; // no slack: a byte too far is a report
#endif
  return index < CLASS_COUNT ? index : -1;
}

static header *system_alloc(int64_t bytes) {
  const int64_t total = bytes + HEADER_BYTES;
  void *p = NULL;
  const size_t align = total >= HUGE_BYTES ? (size_t)2 << 20 : HEADER_BYTES;
  if (posix_memalign(&p, align, (size_t)total) != 0) return NULL;
  if (total >= HUGE_BYTES) madvise(p, (size_t)total, MADV_HUGEPAGE);
  return p;
}

static void trim_locked(void) {
  for (int32_t i = 0; i < CLASS_COUNT; i++) {
    while (free_list[i] != NULL) {
      header *h = free_list[i];
      free_list[i] = h->next;
      free(h);
    }
  }
}

static void count(int32_t device, int32_t tag, int64_t bytes) {
  const int32_t slots[2] = {tag, HALO_TAG_COUNT};
  for (int32_t i = 0; i < 2; i++) {
    live[device][slots[i]] += bytes;
    if (live[device][slots[i]] > peak[device][slots[i]]) {
      peak[device][slots[i]] = live[device][slots[i]];
    }
  }
}

/* HALO_ENOMEM with what was asked, what is live, and the tags that hold most of it. */
static halo_status no_memory(halo_device device, int64_t bytes, bool over) {
  static const char *const names[HALO_TAG_COUNT] = {"other", "weights", "gradients", "optimizer",
                                                    "activations", "ring", "plan", "data"};
  int64_t now[HALO_TAG_COUNT + 1];
  pthread_mutex_lock(&lock);
  memcpy(now, live[device], sizeof now);
  pthread_mutex_unlock(&lock);
  const double total = (double)now[HALO_TAG_COUNT] / 1048576.0;
  char text[160] = "";
  size_t n = 0;
  for (int32_t k = 0; k < 3; k++) {
    int32_t most = 0;
    for (int32_t i = 1; i < HALO_TAG_COUNT; i++) most = now[i] > now[most] ? i : most;
    if (now[most] <= 0) break;
    n += (size_t)snprintf(text + n, sizeof text - n, "%s%s %.1f", k == 0 ? ": " : ", ", names[most],
                          (double)now[most] / 1048576.0);
    now[most] = 0;
  }
  return halo__error(HALO_ENOMEM, "out of memory on %s: asked %.1f MiB with %.1f MiB live%s%s",
                     device == HALO_CPU ? "cpu" : "cuda", (double)bytes / 1048576.0, total, text,
                     over ? " (the limit set with halo_memory_limit)" : "");
}

/* ---- blocks of devices ---- */

static int64_t slot_of(const void *p) {
  const uint64_t mixed = ((uint64_t)(uintptr_t)p >> 8) * 0x9e3779b97f4a7c15ull;
  int64_t i = (int64_t)(mixed >> 20) & (table_size - 1);
  while (table[i].at != NULL && table[i].at != p) i = (i + 1) & (table_size - 1);
  return i;
}

static bool table_add(block b) {
  if (2 * (table_used + 1) > table_size) {
    block *old = table;
    const int64_t old_size = table_size, size = old_size > 0 ? 2 * old_size : FIRST_TABLE;
    block *larger = calloc((size_t)size, sizeof *larger);
    if (larger == NULL) return false;
    table = larger;
    table_size = size;
    for (int64_t i = 0; i < old_size; i++) {
      if (old[i].at != NULL) table[slot_of(old[i].at)] = old[i];
    }
    free(old);
  }
  table[slot_of(b.at)] = b;
  table_used++;
  return true;
}

/* Take p out of the table; false when it is not there. Later blocks of the same run move up. */
static bool table_take(void *p, block *out) {
  if (table_used == 0) return false;
  int64_t hole = slot_of(p);
  if (table[hole].at == NULL) return false;
  *out = table[hole];
  table[hole].at = NULL;
  table_used--;
  for (int64_t i = (hole + 1) & (table_size - 1); table[i].at != NULL; i = (i + 1) & (table_size - 1)) {
    const block b = table[i];
    table[i].at = NULL;
    table[slot_of(b.at)] = b;
  }
  return true;
}

static halo_status device_alloc(void **out, int64_t asked, halo_device device) {
  HALO_TRY(halo__device_ready(device));
  HALO_CHECK(asked < INT64_MAX - DEVICE_ROUND, HALO_ENOMEM, "alloc: %lld bytes", (long long)asked);
  const int64_t bytes = asked > 0 ? (asked + DEVICE_ROUND - 1) / DEVICE_ROUND * DEVICE_ROUND
                                  : DEVICE_ROUND;
  const halo_kernels *k = halo__kernels(device);
  pthread_mutex_lock(&lock);
  const bool planned = fail_after == 0;
  if (fail_after >= 0) fail_after--;
  const int64_t limit = limit_bytes[device];
  const bool over = limit > 0 && live[device][HALO_TAG_COUNT] + bytes > limit;
  pthread_mutex_unlock(&lock);
  if (planned || over) return no_memory(device, asked, over);
  block b = {.bytes = bytes, .device = device, .tag = halo__current_tag()};
  halo_status status = k->memory_new(&b.at, bytes);
  if (status == HALO_ENOMEM) {
    HALO_TRY(k->synchronize());
    HALO_TRY(k->memory_trim());
    status = k->memory_new(&b.at, bytes);
    if (status == HALO_ENOMEM) return no_memory(device, asked, false);
  }
  HALO_TRY(status);
  pthread_mutex_lock(&lock);
  const bool known = table_add(b);
  if (known) count(device, b.tag, bytes);
  pthread_mutex_unlock(&lock);
  if (!known) {
    k->memory_free(b.at, bytes);
    return halo__error(HALO_ENOMEM, "alloc: no host memory for the table of device blocks");
  }
  *out = b.at;
  return HALO_OK;
}

/* ---- memory of either kind ---- */

halo_status halo__alloc(void **out, int64_t bytes, halo_device device) {
  HALO_CHECK(bytes >= 0, HALO_EARG, "alloc: %lld bytes", (long long)bytes);
  if (device != HALO_CPU) return device_alloc(out, bytes, device);
  int64_t class_bytes = 0;
  const int32_t index = class_of(bytes, &class_bytes);
  pthread_mutex_lock(&lock);
  const bool planned = fail_after == 0;
  if (fail_after >= 0) fail_after--;
  const int64_t now = live[device][HALO_TAG_COUNT], limit = limit_bytes[device];
  const bool over = limit > 0 && now + class_bytes > limit;
  header *h = NULL;
  if (index >= 0 && !planned && !over) {
    h = free_list[index];
    if (h != NULL) {
      assert(h->magic == MAGIC_FREE);
      free_list[index] = h->next;
    } else {
      h = system_alloc(class_bytes);
      if (h == NULL) {
        trim_locked();
        h = system_alloc(class_bytes);
      }
    }
  }
  if (h != NULL) {
    *h = (header){.bytes = class_bytes,
                  .class_index = index,
                  .tag = halo__current_tag(),
                  .device = device,
                  .magic = MAGIC_LIVE};
    count(device, h->tag, class_bytes);
  }
  pthread_mutex_unlock(&lock);
  if (h == NULL) return no_memory(device, bytes, over);
  *out = (char *)h + HEADER_BYTES;
  return HALO_OK;
}

halo_status halo__alloc_zero(void **out, int64_t bytes, halo_device device) {
  void *p = NULL;
  HALO_TRY(halo__alloc(&p, bytes, device));
  if (device == HALO_CPU) {
    memset(p, 0, (size_t)bytes);
  } else {
    const halo_status status = halo__kernels(device)->zero(p, bytes);
    if (status != HALO_OK) {
      halo__free(p);
      return status;
    }
  }
  *out = p;
  return HALO_OK;
}

halo_status halo__scratch_on(void **out, int64_t n, int64_t element_bytes, halo_device device) {
  int64_t bytes = 0;
  HALO_CHECK(halo__mul(n, element_bytes, &bytes), HALO_EARG, "scratch: %lld x %lld bytes",
             (long long)n, (long long)element_bytes);
  return halo__alloc(out, bytes, device);
}

halo_status halo__scratch(void **out, int64_t n, int64_t element_bytes) {
  return halo__scratch_on(out, n, element_bytes, HALO_CPU);
}

void halo__free(void *p) {
  if (p == NULL) return;
  block b;
  pthread_mutex_lock(&lock);
  if (table_take(p, &b)) {
    count(b.device, b.tag, -b.bytes);
    pthread_mutex_unlock(&lock);
    halo__kernels((halo_device)b.device)->memory_free(p, b.bytes);
    return;
  }
  header *h = (header *)((char *)p - HEADER_BYTES);
  assert(h->magic == MAGIC_LIVE);
  count(h->device, h->tag, -h->bytes);
  h->magic = MAGIC_FREE;
#if WATCHED
  free(h); // a cached block would hide a use after free
#else
  h->next = free_list[h->class_index];
  free_list[h->class_index] = h;
#endif
  pthread_mutex_unlock(&lock);
}

static int64_t read_counter(int64_t counters[2][HALO_TAG_COUNT + 1], int32_t device, int32_t tag) {
  if (device < 0 || device > 1 || tag >= HALO_TAG_COUNT) return 0;
  pthread_mutex_lock(&lock);
  const int64_t value = counters[device][tag < 0 ? HALO_TAG_COUNT : tag];
  pthread_mutex_unlock(&lock);
  return value;
}

int64_t halo_memory_live_bytes(int32_t device, int32_t tag) {
  return read_counter(live, device, tag);
}

int64_t halo_memory_peak_bytes(int32_t device, int32_t tag) {
  return read_counter(peak, device, tag);
}

void halo_memory_reset_peak(int32_t device) {
  if (device < 0 || device > 1) return;
  pthread_mutex_lock(&lock);
  memcpy(peak[device], live[device], sizeof peak[device]);
  pthread_mutex_unlock(&lock);
}

void halo_memory_trim(int32_t device) {
  if (device == HALO_CUDA && halo__device_ready(HALO_CUDA) == HALO_OK) {
    halo__offload_trim();
    halo__kernels(HALO_CUDA)->memory_trim();
  }
  if (device != HALO_CPU) return;
  pthread_mutex_lock(&lock);
  trim_locked();
  pthread_mutex_unlock(&lock);
}

void halo_memory_limit(int32_t device, int64_t bytes) {
  if (device < 0 || device > 1) return;
  pthread_mutex_lock(&lock);
  limit_bytes[device] = bytes > 0 ? bytes : 0;
  pthread_mutex_unlock(&lock);
}

void halo_memory_fail_after(int64_t n) {
  pthread_mutex_lock(&lock);
  fail_after = n < 0 ? -1 : n;
  pthread_mutex_unlock(&lock);
}
