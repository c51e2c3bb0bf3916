/* memory: the current CUDA device, its compute stream, its memory, and what it has to say.
 *
 * Memory comes from the driver's stream-ordered pool (cudaMallocAsync), which keeps freed blocks and
 * remaps fragments; nothing goes back to the system until memory_trim. All work is queued on one
 * stream, so a block may be freed while kernels still read it.
 *
 * twin      kernels/cpu/memory.c
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <mutex>

#include "cuda.cuh"

namespace {

enum { SLOTS = 512 }; // of reports: 2 * (op + 1) + is_backward

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
int chosen = 0; // device_select
const char *op_of_slot[SLOTS];

std::mutex lock; // of what follows
bool is_lost;    // an error has made the device unusable
char lost[400];  // its text

cudaError_t open_context(context *c) {
  cudaError_t e;
  cudaDeviceProp p;
  c->properties.device = chosen;
  if ((e = cudaSetDevice(chosen)) != cudaSuccess) return e;
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
  e = cudaHostAlloc((void **)&c->report, SLOTS * sizeof *c->report, cudaHostAllocMapped);
  if (e != cudaSuccess) return e;
  memset(c->report, 0, SLOTS * sizeof *c->report);
  e = cudaHostGetDevicePointer((void **)&c->report_device, c->report, 0);
  const char *sync = getenv("HALO_DEBUG_SYNC");
  c->is_sync = sync != nullptr && sync[0] != 0 && sync[0] != '0';
  return e;
}

/* Every thread works on the device that this process chose. */
const context &open() {
  std::call_once(once, [] { here.error = open_context(&here); });
  thread_local bool is_set = false;
  if (!is_set && here.error == cudaSuccess) is_set = cudaSetDevice(here.properties.device) == cudaSuccess;
  return here;
}

/* Errors after which nothing works on the device until the process ends. */
bool is_final(cudaError_t e) {
  switch (e) {
  case cudaErrorIllegalAddress: case cudaErrorAssert: case cudaErrorHardwareStackError:
  case cudaErrorIllegalInstruction: case cudaErrorMisalignedAddress: case cudaErrorInvalidAddressSpace:
  case cudaErrorInvalidPc: case cudaErrorLaunchFailure: case cudaErrorLaunchTimeout:
  case cudaErrorECCUncorrectable: case cudaErrorNvlinkUncorrectable: case cudaErrorExternalDevice:
  case cudaErrorUnknown: return true;
  default: return false;
  }
}

/* "softmax (backward): " of what runs now, or "". */
const char *running(char *text, size_t n) {
  bool is_backward = false;
  const char *op = halo__op_now(&is_backward);
  snprintf(text, n, "%s%s%s", op != nullptr ? op : "", op != nullptr && is_backward ? " (backward)" : "",
           op != nullptr ? ": " : "");
  return text;
}

/* Word that kernels left of bad input, after the work before it is done: the first slot that has one. */
halo_status heard() {
  halo__cuda_report *all = open().report;
  static const char *const what[] = {"", "token id", "label", "index"};
  for (int i = 0; all != nullptr && i < SLOTS; i++) {
    if (all[i].code == HALO__CUDA_FINE) continue;
    const halo__cuda_report seen = all[i];
    for (int j = i; j < SLOTS; j++) all[j].code = HALO__CUDA_FINE; // what came after follows from the first
    const char *op = op_of_slot[i] != nullptr ? op_of_slot[i] : "an op";
    return halo__error(HALO_EARG, "cuda: %s%s: %s %lld at element %lld is outside 0..%lld", op,
                       i % 2 != 0 ? " (backward)" : "", what[seen.code > 3 || seen.code < 0 ? 0 : seen.code],
                       seen.value, seen.where, seen.limit - 1);
  }
  return HALO_OK;
}

bool is_pinned(const void *host) {
  cudaPointerAttributes a;
  const bool known = cudaPointerGetAttributes(&a, host) == cudaSuccess;
  return known && (a.type == cudaMemoryTypeHost || a.type == cudaMemoryTypeManaged);
}

} // namespace

cudaStream_t halo__cuda_stream(void) { return open().stream; }
const halo__cuda_properties *halo__cuda_device(void) { return &open().properties; }

halo__cuda_report *halo__cuda_report_slot(void) {
  halo__cuda_report *all = open().report_device;
  bool is_backward = false;
  const char *op = halo__op_now(&is_backward);
  int slot = 2 * (halo__op_number_now() + 1) + (is_backward ? 1 : 0);
  if (op == nullptr || slot < 0 || slot >= SLOTS) slot = 0;
  op_of_slot[slot] = op;
  return all + slot;
}

halo_status halo__cuda_ready(void) {
  if (open().error != cudaSuccess) return halo__cuda_error(open().error, "opening the device");
  if (!__atomic_load_n(&is_lost, __ATOMIC_ACQUIRE)) return HALO_OK;
  return halo__error(HALO_ECUDA, "%s", lost);
}

halo_status halo__cuda_error(cudaError_t error, const char *what) {
  cudaGetLastError(); // an error that is not final is told once
  if (error == cudaErrorMemoryAllocation) {
    return halo__error(HALO_ENOMEM, "cuda: %s: %s", what, cudaGetErrorString(error));
  }
  char op[96], text[sizeof lost];
  snprintf(text, sizeof text, "cuda: %s%s: %s (%s)%s%s", running(op, sizeof op), what,
           cudaGetErrorString(error), cudaGetErrorName(error),
           is_final(error) ? "; the device is lost to this process" : "",
           is_final(error) && !here.is_sync
               ? "; it was noticed here, HALO_DEBUG_SYNC=1 names the op that did it" : "");
  if (is_final(error)) {
    const std::lock_guard<std::mutex> guard(lock);
    if (!is_lost) {
      memcpy(lost, text, sizeof lost);
      __atomic_store_n(&is_lost, true, __ATOMIC_RELEASE);
    }
    return halo__error(HALO_ECUDA, "%s", lost); // the first one is the one that counts
  }
  return halo__error(HALO_ECUDA, "%s", text);
}

halo_status halo__cuda_launched(const char *name) {
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess && open().is_sync) error = cudaStreamSynchronize(open().stream);
  return error == cudaSuccess ? HALO_OK : halo__cuda_error(error, name);
}

halo_status halo_cuda_memory_new(void **out, int64_t bytes) {
  HALO_TRY(halo__cuda_ready());
  HALO_CUDA_TRY(cudaMallocAsync(out, (size_t)(bytes > 0 ? bytes : 1), open().stream));
  return HALO_OK;
}

halo_status halo_cuda_memory_free(void *p, int64_t bytes) {
  (void)bytes;
  // Finalizers come here: at the end of the process, and after errors. There is nobody to tell.
  if (__atomic_load_n(&is_lost, __ATOMIC_ACQUIRE)) return HALO_OK;
  if (cudaFreeAsync(p, open().stream) != cudaSuccess) cudaGetLastError();
  return HALO_OK;
}

halo_status halo_cuda_memory_trim(void) {
  HALO_TRY(halo__cuda_ready());
  HALO_CUDA_TRY(cudaStreamSynchronize(open().stream));
  HALO_CUDA_TRY(cudaMemPoolTrimTo(open().pool, 0));
  return HALO_OK;
}

halo_status halo_cuda_copy_in(void *y, const void *host, int64_t bytes) {
  if (bytes <= 0) return HALO_OK;
  HALO_TRY(halo__cuda_ready());
  HALO_CUDA_TRY(cudaMemcpyAsync(y, host, (size_t)bytes, cudaMemcpyHostToDevice, open().stream));
  // Pageable memory was read when the call returned ("API synchronization behavior" in CUDA's manual of
  // the runtime); pinned memory was not.
  if (is_pinned(host)) HALO_CUDA_TRY(cudaStreamSynchronize(open().stream));
  return HALO_OK;
}

halo_status halo_cuda_copy_out(void *host, const void *x, int64_t bytes) {
  HALO_TRY(halo__cuda_ready());
  if (bytes > 0) {
    HALO_CUDA_TRY(cudaMemcpyAsync(host, x, (size_t)bytes, cudaMemcpyDeviceToHost, open().stream));
  }
  return halo_cuda_synchronize();
}

halo_status halo_cuda_copy(void *y, const void *x, int64_t bytes) {
  if (bytes <= 0) return HALO_OK;
  HALO_TRY(halo__cuda_ready());
  HALO_CUDA_TRY(cudaMemcpyAsync(y, x, (size_t)bytes, cudaMemcpyDeviceToDevice, open().stream));
  return HALO_OK;
}

halo_status halo_cuda_zero(void *y, int64_t bytes) {
  if (bytes <= 0) return HALO_OK;
  HALO_TRY(halo__cuda_ready());
  HALO_CUDA_TRY(cudaMemsetAsync(y, 0, (size_t)bytes, open().stream));
  return HALO_OK;
}

halo_status halo_cuda_mark(void **mark) {
  HALO_TRY(halo__cuda_ready());
  if (*mark == nullptr) HALO_CUDA_TRY(cudaEventCreate((cudaEvent_t *)mark));
  HALO_CUDA_TRY(cudaEventRecord((cudaEvent_t)*mark, open().stream));
  return HALO_OK;
}

halo_status halo_cuda_mark_seconds(double *out, void *from, void *to) {
  float ms = 0;
  HALO_CUDA_TRY(cudaEventSynchronize((cudaEvent_t)to));
  HALO_CUDA_TRY(cudaEventElapsedTime(&ms, (cudaEvent_t)from, (cudaEvent_t)to));
  *out = 1e-3 * (double)ms;
  return HALO_OK;
}

halo_status halo_cuda_mark_free(void *mark) {
  if (mark != nullptr) HALO_CUDA_TRY(cudaEventDestroy((cudaEvent_t)mark));
  return HALO_OK;
}

halo_status halo_cuda_synchronize(void) {
  HALO_TRY(halo__cuda_ready());
  const cudaError_t error = cudaStreamSynchronize(open().stream);
  return error == cudaSuccess ? heard() : halo__cuda_error(error, "waiting for the device");
}

halo_status halo_cuda_device_count(int32_t *out) {
  int n = 0, driver = 0;
  cudaDriverGetVersion(&driver);
  const cudaError_t error = cudaGetDeviceCount(&n);
  cudaGetLastError();
  *out = 0;
  HALO_CHECK(driver != 0, HALO_EUNSUPPORTED, "no CUDA device: no NVIDIA driver is installed");
  HALO_CHECK(error == cudaSuccess || error == cudaErrorNoDevice, HALO_EUNSUPPORTED,
             "no CUDA device: %s (driver for CUDA %d.%d, built with %d.%d)", cudaGetErrorString(error),
             driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  *out = error == cudaSuccess ? n : 0;
  return HALO_OK;
}

halo_status halo_cuda_device_read(halo_device_row *out, int32_t index) {
  cudaDeviceProp p;
  HALO_CUDA_TRY(cudaGetDeviceProperties(&p, index));
  *out = halo_device_row{};
  memcpy(out->name, p.name, sizeof out->name - 1); // p.name is longer, and ends in zeros
  out->total_bytes = (int64_t)p.totalGlobalMem;
  out->major = p.major;
  out->minor = p.minor;
  out->processors = p.multiProcessorCount;
  int before = 0;
  size_t free_bytes = 0, total_bytes = 0;
  HALO_CUDA_TRY(cudaGetDevice(&before));
  HALO_CUDA_TRY(cudaSetDevice(index));
  const cudaError_t error = cudaMemGetInfo(&free_bytes, &total_bytes);
  cudaSetDevice(before);
  HALO_CUDA_TRY(error);
  out->free_bytes = (int64_t)free_bytes;
  return HALO_OK;
}

halo_status halo_cuda_device_select(int32_t index) {
  if (here.stream != nullptr) {
    HALO_CHECK(here.properties.device == index, HALO_ESTATE,
               "device_select: device %d is in use already; select before the first work", here.properties.device);
  }
  chosen = index;
  return HALO_OK;
}

void halo_cuda_versions(int32_t *driver_out, int32_t *runtime_out) {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  cudaGetLastError();
  *driver_out = driver;
  *runtime_out = CUDART_VERSION;
}
