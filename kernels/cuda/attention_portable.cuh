/* attention_portable.cuh: what the two mma.sync kernels share: the query side, lists that two neighbouring
 * blocks walk together, and masks. See attention_portable.cu. */
#ifndef HALO_ATTENTION_PORTABLE_CUH
#define HALO_ATTENTION_PORTABLE_CUH

#include "attention.cuh"
#include "mma.cuh"

namespace halo {
namespace portable {

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

/* The query side, and what both kinds of keys need. */
struct side {
  int32_t B, H, Hk, n_blocks;
  int64_t T;
  float scale; /* of q . k */
  const __nv_bfloat16 *q, *grad;
  int64_t q_stride[3], grad_stride[3];
  const int32_t *position, *first, *pattern_of;
  int64_t first_stride;
  float *o, *m, *l; /* running state, or NULL: nothing before, result to out and lse */
  __nv_bfloat16 *out;
  int64_t out_stride[3];
  float *result; /* lse */
  int64_t result_stride[2];
  const float *lse, *delta;
  float *dq;
};

side side_of(const halo_attention_queries *a, const halo__attention_out *once);

/* Runs of one row, item by item; `at` is INT32_MAX at the end. */
struct walk {
  const halo__span *run, *end;
  int32_t at, left, partial;
};

__device__ __forceinline__ void walk_on(walk *w) {
  if (w->left > 1) {
    w->left--;
    w->at++;
    return;
  }
  if (w->run == w->end) {
    w->at = INT32_MAX;
    return;
  }
  w->at = w->run->first;
  w->left = w->run->count;
  w->partial = w->run->partial;
  w->run++;
}

/* list < 0: an empty row. */
__device__ __forceinline__ walk walk_of(const int64_t *offset, const halo__span *run, int64_t list) {
  walk w = {nullptr, nullptr, INT32_MAX, 0, 0};
  if (list < 0) return w;
  w.run = run + offset[list];
  w.end = run + offset[list + 1];
  walk_on(&w);
  return w;
}

/* The listed rows of k and v to a tile of 64 each; zeros from n on. */
template <int D, int THREADS, class Index>
__device__ __forceinline__ void fetch_listed(uint32_t to_k, uint32_t to_v, const __nv_bfloat16 *k,
                                             const __nv_bfloat16 *v, const Index *rows, int n) {
#pragma unroll
  for (int i = 0; i < 64 * (D / 8) / THREADS; i++) {
    const int at = i * THREADS + threadIdx.x, r = at / (D / 8), c = at % (D / 8);
    const int64_t row = r < n ? rows[r] : 0;
    mma::copy16(mma::tile_at<D>(to_k, r, c), k + row * D + 8 * c, r < n);
    mma::copy16(mma::tile_at<D>(to_v, r, c), v + row * D + 8 * c, r < n);
  }
}

/* A row of tasks that starts with the largest, neighbours sharing keys: heads fastest. */
template <class Kernel, class... Args>
halo_status launch(const char *name, Kernel kernel, int64_t blocks, int threads, int shared, Args... args) {
  if (blocks == 0) return HALO_OK;
  HALO_CHECK(blocks < INT32_MAX, HALO_EUNSUPPORTED, "%s: %lld blocks are too many", name,
             (long long)blocks);
  HALO_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<(unsigned)blocks, threads, shared, halo__cuda_stream()>>>(args...);
  HALO_LAUNCHED(name);
  return HALO_OK;
}

} // namespace portable
} // namespace halo
#endif
