/* kernels.h: prototypes and dispatch table of every kernel, generated from kernels.def. */
#ifndef HALO_KERNELS_H
#define HALO_KERNELS_H

#include <stdint.h>

#include "halo.h"

/* One matrix, or a batch of them, in a product: rows `ld` elements apart, matrices `batch_stride`
 * elements apart (0: the same one for the whole batch). A transposed operand is used as its
 * transpose; the result never is. */
typedef struct halo_operand {
  void *data; /* only read, for operands a and b */
  halo_dtype dtype;
  int32_t transposed;
  int64_t ld;
  int64_t batch_stride;
} halo_operand;

/* c = alpha * op(a) op(b) + beta * c, `batch` times; c [m,n], op(a) [m,k], op(b) [k,n], row-major.
 * dtypes are all F64 or any mixture of F32 and BF16 (fp32 sums). beta = 0 never reads c. */
typedef struct halo_gemm {
  halo_operand c, a, b;
  int64_t m, n, k, batch;
  double alpha, beta;
} halo_gemm;

/* Constants of one AdamW step; step counts from 1. */
typedef struct halo_adamw_step_args {
  double lr, beta1, beta2, eps, weight_decay, grad_scale;
  int64_t step;
} halo_adamw_step_args;

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
