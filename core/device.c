/* device.c: which devices exist, their kernel tables, and the thread count of this process. */
#include "internal.h"
#include "kernels.h"

#include <omp.h>
#include <stddef.h>
#include <unistd.h>

/* OpenBLAS has its own count; Debian's OpenMP flavour follows OpenMP's, other builds do not. */
extern void openblas_set_num_threads(int n);

#define HALO_KERNEL(name, args) .name = halo_cpu_##name,
static const halo_kernels cpu_kernels = {
#include "kernels.def"
};
#undef HALO_KERNEL

#ifdef HALO_WITH_CUDA
#define HALO_KERNEL(name, args) .name = halo_cuda_##name,
static const halo_kernels cuda_kernels = {
#include "kernels.def"
};
#undef HALO_KERNEL
#endif

const halo_kernels *halo__kernels(halo_device device) {
#ifdef HALO_WITH_CUDA
  if (device == HALO_CUDA) return &cuda_kernels;
#endif
  (void)device;
  return &cpu_kernels;
}

int32_t halo_device_count(int32_t device) { return device == HALO_CPU ? 1 : 0; }

int32_t halo_set_threads(int32_t n) {
  if (n <= 0) {
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    n = cores > 0 ? (int32_t)cores : 1;
  }
  omp_set_num_threads(n);
  openblas_set_num_threads(n);
  return n;
}

int32_t halo_threads(void) { return omp_get_max_threads(); }
