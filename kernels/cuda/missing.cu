/* missing.cu: weak stand-ins for CUDA twins that do not exist yet, so that the engine links while they
 * are written. Each says its name and fails. To be deleted with the last of them. */
#include "cuda.cuh"
#pragma nv_diag_suppress 177
#define HALO_KERNEL(name, args)                                                           \
  extern "C" __attribute__((weak)) halo_status halo_cuda_##name args {                    \
    return halo__error(HALO_EUNSUPPORTED, "cuda: kernel " #name " is not there yet");     \
  }
#include "kernels.def"
