/* device.c: which devices exist, their kernel tables, and the thread count of this process. */
#include "internal.h"
#include "kernels.h"

#include <omp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

/* ---- which devices there are ---- */

static pthread_once_t looked = PTHREAD_ONCE_INIT;
static int32_t cuda_count;
static char cuda_reason[256] = "no CUDA device: this build has no CUDA";

static void look(void) {
#ifdef HALO_WITH_CUDA
  const halo_status status = cuda_kernels.device_count(&cuda_count);
  if (status != HALO_OK) {
    cuda_count = 0;
    snprintf(cuda_reason, sizeof cuda_reason, "%s", halo_error_message());
  } else {
    snprintf(cuda_reason, sizeof cuda_reason, "%s",
             cuda_count > 0 ? "" : "no CUDA device: the driver lists none");
  }
#endif
}

int32_t halo_device_count(int32_t device) {
  if (device != HALO_CUDA) return device == HALO_CPU;
  pthread_once(&looked, look);
  return cuda_count;
}

const char *halo_device_reason(int32_t device) {
  if (device == HALO_CPU) return "";
  if (device != HALO_CUDA) return "unknown device";
  pthread_once(&looked, look);
  return cuda_reason;
}

const char *halo__device_name(halo_device device) { return device == HALO_CPU ? "cpu" : "cuda"; }

halo_status halo__device_ready(halo_device device) {
  HALO_CHECK(device == HALO_CPU || device == HALO_CUDA, HALO_EARG, "unknown device %d", (int)device);
  HALO_CHECK(halo_device_count((int32_t)device) > 0, HALO_EUNSUPPORTED, "%s", cuda_reason);
  return HALO_OK;
}

halo_status halo_device_read(halo_device_row *out, int32_t device, int32_t index) {
  HALO_CHECK(out != NULL, HALO_EARG, "device_read: out is NULL");
  HALO_TRY(halo__device_ready((halo_device)device));
  HALO_CHECK(index >= 0 && index < halo_device_count(device), HALO_EARG,
             "device_read: %s device %d, there are %d", halo__device_name((halo_device)device), index,
             halo_device_count(device));
  return halo__kernels((halo_device)device)->device_read(out, index);
}

halo_status halo_device_select(int32_t device, int32_t index) {
  HALO_TRY(halo__device_ready((halo_device)device));
  HALO_CHECK(index >= 0 && index < halo_device_count(device), HALO_EARG,
             "device_select: %s device %d, there are %d", halo__device_name((halo_device)device), index,
             halo_device_count(device));
  return halo__kernels((halo_device)device)->device_select(index);
}

halo_status halo_synchronize(int32_t device) {
  HALO_TRY(halo__device_ready((halo_device)device));
  return halo__kernels((halo_device)device)->synchronize();
}

const char *halo_cuda_targets(void) {
#if defined(HALO_WITH_SHADOW)
  return "shadow";
#elif defined(HALO_CUDA_TARGETS)
  return HALO_CUDA_TARGETS;
#else
  return "";
#endif
}

#ifndef HALO_WITH_CUDA
void halo_cuda_versions(int32_t *driver_out, int32_t *runtime_out) {
  *driver_out = *runtime_out = 0;
}
#endif

/* ---- threads ---- */

int32_t halo_set_threads(int32_t n) {
  if (n <= 0) {
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    n = cores > 0 ? (int32_t)cores : 1;
  }
  omp_set_num_threads(n);
  openblas_set_num_threads(n);
  return n;
}

static bool is_set(const char *name) {
  const char *value = getenv(name);
  return value != NULL && value[0] != 0 && strcmp(value, "0") != 0;
}

static _Atomic int32_t math = -1; // not asked yet

int32_t halo__math(void) {
  int32_t flags = math;
  if (flags < 0) {
    flags = (is_set("HALO_TF32") ? HALO_MATH_TF32 : 0) | (is_set("HALO_MATH_FIXED") ? HALO_MATH_FIXED : 0);
    math = flags;
  }
  return halo_deterministic() ? flags | HALO_MATH_FIXED : flags;
}

int32_t halo_set_math(int32_t flags) {
  halo__math(); // reads the environment the first time
  const int32_t before = math;
  if (flags >= 0) math = flags & (HALO_MATH_TF32 | HALO_MATH_FIXED);
  return before;
}

int32_t halo_threads(void) { return omp_get_max_threads(); }
