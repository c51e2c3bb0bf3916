/* offload: copies between the device and pinned host memory, beside the computation.
 *
 *   compute   ...| work that makes x |  next block ...            | wait(ticket) free x
 *   copies                           '-> x to host ---------------'
 *
 * One stream for copies, so host memory is reused in order without asking. A copy begins behind an event
 * that marks the compute stream, and ends in one of a ring of events; its number is the ticket. A ticket
 * so old that its event was used again names a copy that is long done in the same stream, and waiting for
 * the newer event is right, too.
 *
 * twin      kernels/cpu/offload.c
 */
#include <mutex>

#include "cuda.cuh"

namespace {

enum { RING = 64 };

struct copies {
  cudaStream_t stream = nullptr;
  cudaEvent_t ready = nullptr; // mark in the compute stream
  cudaEvent_t done[RING] = {};
  int64_t next = 0;
  cudaError_t error = cudaSuccess;
};

std::mutex lock;
copies side;
bool is_open = false;

cudaError_t open_side() {
  cudaError_t e;
  if ((e = cudaStreamCreateWithFlags(&side.stream, cudaStreamNonBlocking)) != cudaSuccess) return e;
  if ((e = cudaEventCreateWithFlags(&side.ready, cudaEventDisableTiming)) != cudaSuccess) return e;
  for (cudaEvent_t &event : side.done) {
    if ((e = cudaEventCreateWithFlags(&event, cudaEventDisableTiming)) != cudaSuccess) return e;
  }
  return e;
}

halo_status copy(void *to, const void *from, int64_t bytes, cudaMemcpyKind kind, int64_t *ticket) {
  HALO_TRY(halo__cuda_ready());
  cudaStream_t compute = halo__cuda_stream();
  const std::lock_guard<std::mutex> guard(lock);
  if (!is_open) side.error = open_side();
  is_open = true;
  HALO_CUDA_TRY(side.error);
  HALO_CUDA_TRY(cudaEventRecord(side.ready, compute));
  HALO_CUDA_TRY(cudaStreamWaitEvent(side.stream, side.ready, 0));
  if (bytes > 0) HALO_CUDA_TRY(cudaMemcpyAsync(to, from, (size_t)bytes, kind, side.stream));
  HALO_CUDA_TRY(cudaEventRecord(side.done[side.next % RING], side.stream));
  *ticket = side.next++;
  return HALO_OK;
}

} // namespace

halo_status halo_cuda_pinned_new(void **out, int64_t bytes) {
  HALO_TRY(halo__cuda_ready());
  const cudaError_t error = cudaHostAlloc(out, (size_t)(bytes > 0 ? bytes : 1), cudaHostAllocDefault);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return halo__error(HALO_ENOMEM, "no %.1f MiB of pinned host memory", (double)bytes / 1048576.0);
  }
  HALO_CUDA_TRY(error);
  return HALO_OK;
}

halo_status halo_cuda_pinned_free(void *p) {
  if (cudaFreeHost(p) != cudaSuccess) cudaGetLastError();
  return HALO_OK;
}

halo_status halo_cuda_offload_out(void *host, const void *x, int64_t bytes, int64_t *ticket) {
  return copy(host, x, bytes, cudaMemcpyDeviceToHost, ticket);
}

halo_status halo_cuda_offload_in(void *y, const void *host, int64_t bytes, int64_t *ticket) {
  return copy(y, host, bytes, cudaMemcpyHostToDevice, ticket);
}

halo_status halo_cuda_offload_wait(int64_t ticket) {
  HALO_TRY(halo__cuda_ready());
  const std::lock_guard<std::mutex> guard(lock);
  HALO_CHECK(ticket >= 0 && ticket < side.next, HALO_EARG, "offload_wait: ticket %lld of %lld", (long long)ticket,
             (long long)side.next);
  HALO_CUDA_TRY(cudaStreamWaitEvent(halo__cuda_stream(), side.done[ticket % RING], 0));
  return HALO_OK;
}

halo_status halo_cuda_offload_finish(void) {
  const std::lock_guard<std::mutex> guard(lock);
  if (is_open && side.error == cudaSuccess) HALO_CUDA_TRY(cudaStreamSynchronize(side.stream));
  return HALO_OK;
}
