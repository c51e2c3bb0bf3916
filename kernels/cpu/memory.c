/* memory: the host as a device. Large blocks ask for 2 MiB pages: first touch of a page costs more
 * than most kernels that fill it.
 *
 * twin      kernels/cuda/memory.cu
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"
#include "kernels.h"

enum { ALIGNMENT = 256, HUGE_BYTES = 4 << 20 };

halo_status halo_cpu_memory_new(void **out, int64_t bytes) {
  const size_t align = bytes >= HUGE_BYTES ? (size_t)2 << 20 : ALIGNMENT;
  HALO_CHECK(posix_memalign(out, align, (size_t)bytes) == 0, HALO_ENOMEM,
             "no %lld bytes of host memory", (long long)bytes);
  if (bytes >= HUGE_BYTES) madvise(*out, (size_t)bytes, MADV_HUGEPAGE);
  return HALO_OK;
}

halo_status halo_cpu_memory_free(void *p, int64_t bytes) {
  (void)bytes;
  free(p);
  return HALO_OK;
}

halo_status halo_cpu_memory_trim(void) { return HALO_OK; }

halo_status halo_cpu_copy_in(void *y, const void *host, int64_t bytes) {
  if (bytes > 0) memmove(y, host, (size_t)bytes);
  return HALO_OK;
}

halo_status halo_cpu_copy_out(void *host, const void *x, int64_t bytes) {
  return halo_cpu_copy_in(host, x, bytes);
}

halo_status halo_cpu_copy(void *y, const void *x, int64_t bytes) {
  return halo_cpu_copy_in(y, x, bytes);
}

halo_status halo_cpu_zero(void *y, int64_t bytes) {
  if (bytes > 0) memset(y, 0, (size_t)bytes);
  return HALO_OK;
}

halo_status halo_cpu_synchronize(void) { return HALO_OK; }

halo_status halo_cpu_mark(void **mark) {
  if (*mark == NULL) *mark = malloc(sizeof(struct timespec));
  HALO_CHECK(*mark != NULL, HALO_ENOMEM, "mark: no memory");
  clock_gettime(CLOCK_MONOTONIC, *mark);
  return HALO_OK;
}

halo_status halo_cpu_mark_seconds(double *out, void *from, void *to) {
  const struct timespec *a = from, *b = to;
  *out = (double)(b->tv_sec - a->tv_sec) + 1e-9 * (double)(b->tv_nsec - a->tv_nsec);
  return HALO_OK;
}

halo_status halo_cpu_mark_free(void *mark) {
  free(mark);
  return HALO_OK;
}

halo_status halo_cpu_device_count(int32_t *out) {
  *out = 1;
  return HALO_OK;
}

halo_status halo_cpu_device_read(halo_device_row *out, int32_t index) {
  HALO_CHECK(index == 0, HALO_EARG, "device: cpu %d, there is one", index);
  const int64_t page = sysconf(_SC_PAGESIZE);
  *out = (halo_device_row){.total_bytes = sysconf(_SC_PHYS_PAGES) * page,
                           .free_bytes = sysconf(_SC_AVPHYS_PAGES) * page,
                           .processors = (int32_t)sysconf(_SC_NPROCESSORS_ONLN)};
  snprintf(out->name, sizeof out->name, "host");
  return HALO_OK;
}

halo_status halo_cpu_device_select(int32_t index) {
  HALO_CHECK(index == 0, HALO_EARG, "device: cpu %d, there is one", index);
  return HALO_OK;
}
