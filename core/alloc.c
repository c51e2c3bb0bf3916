/* alloc.c: counted, cached memory.
 *
 * Training asks for the same sizes every step. A freed block goes to the free list of its size class
 * and comes back from there, so the steady state neither calls the system nor touches fresh pages
 * (first touch of a page costs more than most kernels that fill it). Size classes are eighths of a
 * power of two, so at most 12.5 % of a block is unused.
 *
 *   [ header 64 bytes: class, tag, device, bytes ][ user data, 64-byte aligned ... ]
 *
 * Bytes are counted per (device, tag); the tag is the thread's current one. CUDA memory uses the same
 * lists with a header kept on the host; it comes with the CUDA device.
 *
 * halo_memory_limit and halo_memory_fail_after exist so that "out of memory" is an ordinary, tested
 * path instead of a rumour.
 */
#include "internal.h"

#include <assert.h>
#include <pthread.h>
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
  TAG_DEPTH = 32
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

halo_status halo__alloc(void **out, int64_t bytes, halo_device device) {
  HALO_CHECK(bytes >= 0, HALO_EARG, "alloc: %lld bytes", (long long)bytes);
  HALO_CHECK(device == HALO_CPU, HALO_EUNSUPPORTED, "alloc: no CUDA device in this build");
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
  HALO_CHECK(h != NULL, HALO_ENOMEM, "out of memory: asked %.1f MiB with %.1f MiB live%s",
             (double)bytes / 1048576.0, (double)now / 1048576.0,
             over ? " (the limit set with halo_memory_limit)" : "");
  *out = (char *)h + HEADER_BYTES;
  return HALO_OK;
}

halo_status halo__alloc_zero(void **out, int64_t bytes, halo_device device) {
  HALO_TRY(halo__alloc(out, bytes, device));
  memset(*out, 0, (size_t)bytes);
  return HALO_OK;
}

halo_status halo__scratch(void **out, int64_t n, int64_t element_bytes) {
  int64_t bytes = 0;
  HALO_CHECK(halo__mul(n, element_bytes, &bytes), HALO_EARG, "scratch: %lld x %lld bytes",
             (long long)n, (long long)element_bytes);
  return halo__alloc(out, bytes, HALO_CPU);
}

void halo__free(void *p) {
  if (p == NULL) return;
  header *h = (header *)((char *)p - HEADER_BYTES);
  assert(h->magic == MAGIC_LIVE);
  pthread_mutex_lock(&lock);
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
