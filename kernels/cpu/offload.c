/* offload: the host as a device beside itself; a copy is done when the call returns.
 *
 * twin      kernels/cuda/offload.cu
 */
#include "kernels.h"

halo_status halo_cpu_pinned_new(void **out, int64_t bytes) { return halo_cpu_memory_new(out, bytes); }

halo_status halo_cpu_pinned_free(void *p) { return halo_cpu_memory_free(p, 0); }

halo_status halo_cpu_offload_out(void *host, const void *x, int64_t bytes, int64_t *ticket) {
  *ticket = 0;
  return halo_cpu_copy_out(host, x, bytes);
}

halo_status halo_cpu_offload_in(void *y, const void *host, int64_t bytes, int64_t *ticket) {
  *ticket = 0;
  return halo_cpu_copy_in(y, host, bytes);
}

halo_status halo_cpu_offload_wait(int64_t ticket) {
  (void)ticket;
  return HALO_OK;
}

halo_status halo_cpu_offload_finish(void) { return HALO_OK; }
