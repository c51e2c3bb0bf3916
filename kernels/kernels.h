/* kernels.h: prototypes and dispatch table of every kernel, generated from kernels.def. */
#ifndef HALO_KERNELS_H
#define HALO_KERNELS_H

#include <stdint.h>

#include "halo.h"

#define HALO_KERNEL(name, args) halo_status halo_cpu_##name args;
#include "kernels.def"
#undef HALO_KERNEL

#ifdef HALO_WITH_CUDA
#define HALO_KERNEL(name, args) halo_status halo_cuda_##name args;
#include "kernels.def"
#undef HALO_KERNEL
#endif

typedef struct halo_kernels {
#define HALO_KERNEL(name, args) halo_status(*name) args;
#include "kernels.def"
#undef HALO_KERNEL
} halo_kernels;

/* Table of a device; HALO_CPU always exists. */
const halo_kernels *halo__kernels(halo_device device);

#endif
