/* cuda.cuh: what every CUDA kernel file shares: the stream, launch checks, dtypes and small
 * reductions.
 *
 * A kernel file defines the halo_cuda_<name> functions of kernels.def (extern "C" comes with
 * kernels.h). It queues work on halo__cuda_stream() and ends each launch with
 * HALO_LAUNCHED("name"), which costs a cudaGetLastError and, with HALO_DEBUG_SYNC=1 in the
 * environment, waits so that a failing kernel is named where it happened.
 *
 *   storage    bf16 is __nv_bfloat16, arithmetic is fp32 (fp64 for fp64): load<T>(x), store<T>(a)
 *   dispatch   HALO_REAL(t, T, statement): `statement` with T = float, double or __nv_bfloat16
 *   vectors    pack<T, N>: N elements in one aligned access
 *   sizes      int64_t everywhere; blocks are counted with halo__grid (grid-stride loops)
 *
 * halo__error, halo__alloc and halo__free are those of core/internal.h, which C++ cannot read.
 */
#ifndef HALO_CUDA_CUH
#define HALO_CUDA_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "kernels.h"

extern "C" {
halo_status halo__error(halo_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* Device scratch through the counted allocator: halo__alloc(&p, bytes, HALO_CUDA). Freeing queues
 * behind the work that uses it. */
halo_status halo__alloc(void **out, int64_t bytes, halo_device device);
void halo__free(void *p);
/* The op that this thread runs now, NULL outside of ops, and its number, -1 outside. */
const char *halo__op_now(bool *is_backward);
int32_t halo__op_number_now(void);
}

/* memory.cu. The compute stream of the current device, made on first use. */
cudaStream_t halo__cuda_stream(void);
struct halo__cuda_properties {
  int device, major, minor; /* compute capability, 9.0 on Hopper */
  int multiprocessors;
  int64_t shared_bytes;     /* most dynamic shared memory of a block */
  int64_t l2_bytes;
};
/* Of the current device; cached. */
const halo__cuda_properties *halo__cuda_device(void);
/* HALO_OK when the device can be used; the first error when one has made it unusable, until the process
 * ends. */
halo_status halo__cuda_ready(void);
/* HALO_ECUDA, or HALO_ENOMEM, with the op that runs, the name of the call and CUDA's own words. */
halo_status halo__cuda_error(cudaError_t error, const char *what);
/* After a launch: its error if any; waits under HALO_DEBUG_SYNC=1. */
halo_status halo__cuda_launched(const char *name);
/* Where a kernel leaves word of bad input (a token id out of range): the first report wins, and
 * `synchronize` or the next copy_out turns it into HALO_EARG. `code` is a halo__cuda_code. Every op has
 * its own slot, so that the message can name it. */
enum halo__cuda_code { HALO__CUDA_FINE = 0, HALO__CUDA_TOKEN_ID, HALO__CUDA_LABEL, HALO__CUDA_INDEX };
struct halo__cuda_report {
  int code;
  long long where, value, limit;
};
/* Device address of the slot of the op that runs now (pinned host memory that kernels can write). */
halo__cuda_report *halo__cuda_report_slot(void);

#define HALO_CUDA_TRY(call)                                                               \
  do {                                                                                    \
    cudaError_t error_ = (call);                                                          \
    if (error_ != cudaSuccess) return halo__cuda_error(error_, #call);                    \
  } while (0)
#define HALO_TRY(call)                                                                    \
  do {                                                                                    \
    halo_status status_ = (call);                                                         \
    if (status_ != HALO_OK) return status_;                                               \
  } while (0)
#define HALO_CHECK(cond, status, ...)                                                     \
  do {                                                                                    \
    if (!(cond)) return halo__error((status), __VA_ARGS__);                               \
  } while (0)
#define HALO_LAUNCHED(name) HALO_TRY(halo__cuda_launched(name))

#define HALO_REAL(t, T, ...)                                                              \
  switch (t) {                                                                            \
  case HALO_F32: { using T = float; __VA_ARGS__; break; }                                 \
  case HALO_F64: { using T = double; __VA_ARGS__; break; }                                \
  case HALO_BF16: { using T = __nv_bfloat16; __VA_ARGS__; break; }                        \
  default: return halo__error(HALO_EARG, "%s: needs a floating dtype", __func__);         \
  }

namespace halo {

template <class T> struct arithmetic { using type = float; };
template <> struct arithmetic<double> { using type = double; };
template <class T> using acc_of = typename arithmetic<T>::type;

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ double load(double x) { return x; }
__device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ __forceinline__ T store(acc_of<T> x) { return (T)x; }
template <> __device__ __forceinline__ __nv_bfloat16 store<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/* N elements moved at once; the address must be a multiple of their size (16 bytes at most). */
template <class T, int N> struct alignas(sizeof(T) * N) pack { T at[N]; };
/* Elements of T in 16 bytes. */
template <class T> constexpr int lanes16 = 16 / (int)sizeof(T);

template <class A> __device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}
template <class A> __device__ __forceinline__ A warp_max(A x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    const A other = __shfl_xor_sync(0xffffffffu, x, o);
    x = other > x ? other : x;
  }
  return x;
}
/* Sum over a block of THREADS (a multiple of 32), the same in every thread; always in one order. */
template <int THREADS, class A> __device__ __forceinline__ A block_sum(A x) {
  __shared__ A part[THREADS / 32];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  A sum = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) sum += part[i];
  return sum;
}
template <int THREADS, class A> __device__ __forceinline__ A block_max(A x) {
  __shared__ A part[THREADS / 32];
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  A most = part[0];
#pragma unroll
  for (int i = 1; i < THREADS / 32; i++) most = part[i] > most ? part[i] : most;
  return most;
}

/* Leave word of bad input in halo__cuda_report_slot(); the first of all threads wins. */
__device__ inline void report(halo__cuda_report *slot, halo__cuda_code code, int64_t where, int64_t value,
                              int64_t limit) {
  if (atomicCAS(&slot->code, (int)HALO__CUDA_FINE, (int)code) != (int)HALO__CUDA_FINE) return;
  slot->where = where;
  slot->value = value;
  slot->limit = limit;
}

/* Blocks for n items of `per_block`, at most `waves` full waves of the device. */
inline unsigned grid(int64_t n, int64_t per_block, int waves = 8) {
  const int64_t wanted = (n + per_block - 1) / per_block;
  const int64_t most = (int64_t)halo__cuda_device()->multiprocessors * 16 * waves;
  return (unsigned)(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

} // namespace halo
#endif
