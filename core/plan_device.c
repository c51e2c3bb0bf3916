/* plan_device.c: the plan's tables in the memory of a device.
 *
 * Kernels read lists, positions and slots where they run. A table is made once, on the host
 * (plan_slice.c), and never changes; its copy on a device is made at first use, found again by the
 * address of the original, and freed with it. So one place knows of copies, the makers of tables
 * know of none, and on the CPU everything here is the identity.
 *
 * The copies are a hash table with open addressing; a plan has about ten tables a rank and step.
 */
#include <string.h>

#include "plan.h"

typedef struct mirror {
  const void *host; /* NULL: free */
  void *copy;
} mirror;

struct halo__mirrors {
  halo_device device;
  int64_t n, capacity; /* capacity: a power of two, at most half used */
  mirror *slot;
};

/* The slot of `host`, or the free one where it belongs. */
static mirror *find(const struct halo__mirrors *m, const void *host) {
  uint64_t at = ((uint64_t)(uintptr_t)host >> 4) * UINT64_C(0x9E3779B97F4A7C15) >> 32;
  for (;; at++) {
    mirror *slot = &m->slot[at & (uint64_t)(m->capacity - 1)];
    if (slot->host == NULL || slot->host == host) return slot;
  }
}

static halo_status grow(struct halo__mirrors *m) {
  struct halo__mirrors wider = {m->device, m->n, m->capacity > 0 ? 2 * m->capacity : 64, NULL};
  HALO_TRY(halo__plan_alloc(&wider.slot, wider.capacity, sizeof *wider.slot));
  for (int64_t i = 0; i < m->capacity; i++) {
    if (m->slot[i].host != NULL) *find(&wider, m->slot[i].host) = m->slot[i];
  }
  halo__free(m->slot);
  *m = wider;
  return HALO_OK;
}

halo_status halo__plan_mirror(void *out_pointer, halo_plan *p, halo_device device, const void *host,
                              int64_t bytes) {
  const void **out = out_pointer;
  *out = host;
  if (device == HALO_CPU || host == NULL) return HALO_OK;
  if (p->mirrors == NULL) {
    HALO_TRY(halo__plan_alloc(&p->mirrors, 1, sizeof *p->mirrors));
    p->mirrors->device = device;
  }
  struct halo__mirrors *m = p->mirrors;
  HALO_CHECK(m->device == device, HALO_EUNSUPPORTED, "plan: one plan serves one kind of device");
  if (2 * (m->n + 1) > m->capacity) HALO_TRY(grow(m));
  mirror *slot = find(m, host);
  if (slot->host == NULL) {
    void *copy;
    halo_memory_push_tag(HALO_TAG_PLAN);
    halo_status status = halo__alloc(&copy, bytes > 0 ? bytes : 1, device);
    halo_memory_pop_tag();
    if (status != HALO_OK) return status;
    status = halo__kernels(device)->copy_in(copy, host, bytes);
    if (status != HALO_OK) {
      halo__free(copy);
      return status;
    }
    *slot = (mirror){host, copy};
    m->n++;
  }
  *out = slot->copy;
  return HALO_OK;
}

halo_status halo__plan_mirror_rows(halo__rows *out, halo_plan *p, halo_device device,
                                   const halo__rows *rows) {
  *out = *rows;
  if (device == HALO_CPU) return HALO_OK;
  HALO_TRY(halo__plan_mirror(&out->offset, p, device, rows->offset,
                             (rows->n_rows + 1) * (int64_t)sizeof *rows->offset));
  return halo__plan_mirror(&out->run, p, device, rows->run,
                           rows->offset[rows->n_rows] * (int64_t)sizeof *rows->run);
}

void halo__plan_drop_mirrors(halo_plan *p) {
  struct halo__mirrors *m = p->mirrors;
  if (m == NULL) return;
  for (int64_t i = 0; i < m->capacity; i++) {
    if (m->slot[i].host != NULL) halo__free(m->slot[i].copy);
  }
  halo__free(m->slot);
  halo__free(m);
  p->mirrors = NULL;
}
