/* memory: the current CUDA device, its compute stream, its memory, and what it has to say.
 *
 * Memory comes from the driver's stream-ordered pool (cudaMallocAsync), which keeps freed blocks and
 * remaps fragments; nothing goes back to the system until memory_trim. All work is queued on one
 * stream, so a block may be freed while kernels still read it.
 *
 * twin      kernels/cpu/memory.c
 */
#include <stdlib.h>
#include <string.h>

#include <mutex>

#include "cuda.cuh"

namespace {

struct context {
  cudaStream_t stream = nullptr;
  cudaMemPool_t pool = nullptr;
  halo__cuda_properties properties = {};
  halo__cuda_report *report = nullptr, *report_device = nullptr;
  bool is_sync = false;
  cudaError_t error = cudaSuccess;
};

context here;
std::once_flag once;

cudaError_t open_context(context *c) {
  cudaError_t e;
  cudaDeviceProp p;
  if ((e = cudaGetDevice(&c->properties.device)) != cudaSuccess) return e;
  if ((e = cudaGetDeviceProperties(&p, c->properties.device)) != cudaSuccess) return e;
  c->properties.major = p.major;
  c->properties.minor = p.minor;
  c->properties.multiprocessors = p.multiProcessorCount;
  c->properties.shared_bytes = (int64_t)p.sharedMemPerBlockOptin;
  c->properties.l2_bytes = p.l2CacheSize;
  if ((e = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking)) != cudaSuccess) return e;
  if ((e = cudaDeviceGetDefaultMemPool(&c->pool, c->properties.device)) != cudaSuccess) return e;
  uint64_t keep = UINT64_MAX;
  e = cudaMemPoolSetAttribute(c->pool, cudaMemPoolAttrReleaseThreshold, &keep);
  if (e != cudaSuccess) return e;
  e = cudaHostAlloc((void **)&c->report, sizeof *c->report, cudaHostAllocMapped);
  if (e != cudaSuccess) return e;
  memset(c->report, 0, sizeof *c->report);
  e = cudaHostGetDevicePointer((void **)&c->report_device, c->report, 0);
  const char *sync = getenv("HALO_DEBUG_SYNC");
  c->is_sync = sync != nullptr && sync[0] != 0 && sync[0] != '0';
  return e;
}

const context &open() {
  std::call_once(once, [] { here.error = open_context(&here); });
  return here;
}

/* Word that kernels left of bad input, after the work before it is done. */
halo_status heard() {
  halo__cuda_report *r = open().report;
  if (r == nullptr || r->code == HALO__CUDA_FINE) return HALO_OK;
  const halo__cuda_report seen = *r;
  r->code = HALO__CUDA_FINE;
  static const char *const what[] = {"", "token id", "label", "index"};
  return halo__error(HALO_EARG, "cuda: %s %lld at element %lld is outside 0..%lld", what[seen.code],
                     seen.value, seen.where, seen.limit - 1);
}

} // namespace

cudaStream_t halo__cuda_stream(void) { return open().stream; }
const halo__cuda_properties *halo__cuda_device(void) { return &open().properties; }
halo__cuda_report *halo__cuda_report_slot(void) { return open().report_device; }

halo_status halo__cuda_error(cudaError_t error, const char *what) {
  cudaGetLastError(); // an error that is not sticky is told once
  return halo__error(error == cudaErrorMemoryAllocation ? HALO_ENOMEM : HALO_ECUDA, "cuda: %s: %s (%s)",
                     what, cudaGetErrorString(error), cudaGetErrorName(error));
}

halo_status halo__cuda_launched(const char *name) {
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess && open().is_sync) error = cudaStreamSynchronize(open().stream);
  return error == cudaSuccess ? HALO_OK : halo__cuda_error(error, name);
}

halo_status halo_cuda_memory_new(void **out, int64_t bytes) {
  HALO_CUDA_TRY(open().error);
  HALO_CUDA_TRY(cudaMallocAsync(out, (size_t)(bytes > 0 ? bytes : 1), open().stream));
  return HALO_OK;
}

halo_status halo_cuda_memory_free(void *p, int64_t bytes) {
  (void)bytes;
  HALO_CUDA_TRY(cudaFreeAsync(p, open().stream));
  return HALO_OK;
}

halo_status halo_cuda_memory_trim(void) {
  HALO_CUDA_TRY(open().error);
  HALO_CUDA_TRY(cudaStreamSynchronize(open().stream));
  HALO_CUDA_TRY(cudaMemPoolTrimTo(open().pool, 0));
  return HALO_OK;
}

halo_status halo_cuda_copy_in(void *y, const void *host, int64_t bytes) {
  if (bytes <= 0) return HALO_OK;
  HALO_CUDA_TRY(cudaMemcpyAsync(y, host, (size_t)bytes, cudaMemcpyHostToDevice, open().stream));
  // Pageable memory was read when the call returned; pinned memory was not.
  HALO_CUDA_TRY(cudaStreamSynchronize(open().stream));
  return HALO_OK;
}

halo_status halo_cuda_copy_out(void *host, const void *x, int64_t bytes) {
  if (bytes > 0) {
    HALO_CUDA_TRY(cudaMemcpyAsync(host, x, (size_t)bytes, cudaMemcpyDeviceToHost, open().stream));
  }
  return halo_cuda_synchronize();
}

halo_status halo_cuda_copy(void *y, const void *x, int64_t bytes) {
  if (bytes <= 0) return HALO_OK;
  HALO_CUDA_TRY(cudaMemcpyAsync(y, x, (size_t)bytes, cudaMemcpyDeviceToDevice, open().stream));
  return HALO_OK;
}

halo_status halo_cuda_zero(void *y, int64_t bytes) {
  if (bytes <= 0) return HALO_OK;
  HALO_CUDA_TRY(cudaMemsetAsync(y, 0, (size_t)bytes, open().stream));
  return HALO_OK;
}

halo_status halo_cuda_synchronize(void) {
  HALO_CUDA_TRY(open().error);
  HALO_CUDA_TRY(cudaStreamSynchronize(open().stream));
  return heard();
}
