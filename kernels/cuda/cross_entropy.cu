/* cross_entropy: loss of rows of logits against one label each, and its gradient.
 *
 *   l_i = log sum_v exp(z_iv)      loss_i = l_i - z_{i,label_i}
 *   dz_iv = g_i (exp(z_iv - l_i) - [v = label_i])
 *
 * shapes    z, dz [rows,V], rows ld elements apart; labels [rows]; loss, l [rows] in the arithmetic
 *           type
 * labels    a row whose label is `ignore` has loss 0 and gradient 0 and is not read; a label outside
 *           [0,V) is reported and treated likewise
 * fused     turns logits into gradients in place. On Hopper a row is held on chip by a cluster of up to 8
 *           blocks, in shared memory (V = 151936 in bf16: 38 KB a block): each warp reduces its own part
 *           to (maximum, sum), the pairs of all warps go to the shared memory of every block of the
 *           cluster, and one cluster barrier later the gradients are written: one read and one write
 *           of memory. A block spends most of its life waiting (for memory, for its cluster), so it is
 *           their number on a multiprocessor, five, that keeps memory busy
 *           Elsewhere, and for rows without 16-byte packs: one block a row, two passes
 * numbers   maximum and sum together, each thread about its own maximum (Milakov and Gimelshein,
 *           arXiv 1805.02867), rescaled when joined; sums in the arithmetic type, at most 80 terms a
 *           thread in the cluster form; e^x as vector.cuh says
 * order     fixed by the sizes: equal inputs, equal bits
 * twin      kernels/cpu/cross_entropy.c
 */
#include <cooperative_groups.h>

#include "vector.cuh"

namespace {

using namespace halo;

constexpr int THREADS = 512, UNROLL = 4;

/* sum = s * e^m of the numbers seen. */
template <class A> struct running {
  A m, s;
};
template <class T> __device__ __forceinline__ running<acc_of<T>> join(running<acc_of<T>> a, running<acc_of<T>> b) {
  const acc_of<T> m = a.m > b.m ? a.m : b.m;
  if (m == -INFINITY) return {m, 0};
  return {m, a.s * exp_of<T>(a.m - m) + b.s * exp_of<T>(b.m - m)};
}
template <class T> __device__ __forceinline__ running<acc_of<T>> join_warp(running<acc_of<T>> a) {
  const acc_of<T> m = warp_max(a.m);
  return {m, warp_sum(m == -INFINITY ? (acc_of<T>)0 : a.s * exp_of<T>(a.m - m))};
}
template <class T, int B> __device__ __forceinline__ running<acc_of<T>> join_block(running<acc_of<T>> a) {
  __shared__ running<acc_of<T>> part[B / 32];
  a = join_warp<T>(a);
  __syncthreads();
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = a;
  __syncthreads();
  running<acc_of<T>> all = part[0];
#pragma unroll
  for (int i = 1; i < B / 32; i++) all = join<T>(all, part[i]);
  return all;
}

/* A label that counts? Thread `is_reporter` reports one that is out of range. */
__device__ __forceinline__ bool label_counts(int64_t label, int64_t ignore, int64_t vocab, int64_t row,
                                             halo__cuda_report *slot, bool is_reporter) {
  if (label == ignore) return false;
  if (label >= 0 && label < vocab) return true;
  if (is_reporter) report(slot, HALO__CUDA_LABEL, row, label, vocab);
  return false;
}

/* Maximum and sum of a row by a block of B threads; packs of N. */
template <class T, int N, int B>
__device__ __forceinline__ running<acc_of<T>> scan_row(const T *__restrict__ z, int64_t vocab) {
  using A = acc_of<T>;
  running<A> a = {-(A)INFINITY, 0};
  const int64_t packs = vocab / N;
  for (int64_t i = threadIdx.x; i < packs; i += B * UNROLL) {
    few<T, N> v[UNROLL];
    A most = a.m;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      if (i + u * B < packs) v[u] = fetch<T, N>(z + (i + u * B) * N);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      if (i + u * B >= packs) continue;
#pragma unroll
      for (int k = 0; k < N; k++) most = value(v[u], k) > most ? value(v[u], k) : most;
    }
    if (most == -INFINITY) continue;
    a.s *= exp_of<T>(a.m - most);
    a.m = most;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      if (i + u * B >= packs) continue;
#pragma unroll
      for (int k = 0; k < N; k++) a.s += exp_of<T>(value(v[u], k) - most);
    }
  }
  const int64_t tail = packs * N + threadIdx.x;
  if (N > 1 && tail < vocab) a = join<T>(a, {load(z[tail]), 1});
  return join_block<T, B>(a);
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    forward(acc_of<T> *__restrict__ loss, acc_of<T> *__restrict__ lse, const T *__restrict__ z, int64_t ld,
            const int64_t *__restrict__ labels, int64_t vocab, int64_t ignore, halo__cuda_report *slot) {
  using A = acc_of<T>;
  const int64_t row = blockIdx.x, label = labels[row];
  if (!label_counts(label, ignore, vocab, row, slot, threadIdx.x == 0)) {
    if (threadIdx.x == 0) {
      loss[row] = 0;
      if (lse != nullptr) lse[row] = 0;
    }
    return;
  }
  const running<A> all = scan_row<T, N, THREADS>(z + row * ld, vocab);
  if (threadIdx.x != 0) return;
  const A log_sum = (A)log(all.s);
  if (lse != nullptr) lse[row] = all.m + log_sum;
  loss[row] = log_sum + (all.m - load(z[row * ld + label]));
}

/* Gradients of the N logits at c: scale * e^(z - m), and minus g at the label. */
template <class T, int N>
__device__ __forceinline__ few<T, N> gradient_of(const few<T, N> &v, int64_t c, acc_of<T> m, acc_of<T> scale,
                                                 acc_of<T> g, int64_t label) {
  acc_of<T> a[N];
  widen(a, v);
#pragma unroll
  for (int k = 0; k < N; k++) a[k] = scale * exp_of<T>(a[k] - m);
  if ((uint64_t)(label - c) < N) { // asked once a pack, not for every logit
#pragma unroll
    for (int k = 0; k < N; k++) a[k] -= c + k == label ? g : 0;
  }
  return narrow<T, N>(a);
}

/* dz of a row by a block of THREADS. z and dz may be the same. */
template <class T, int N>
__device__ __forceinline__ void write_gradient(T *dz, const T *z, int64_t vocab, acc_of<T> m, acc_of<T> scale,
                                               acc_of<T> g, int64_t label) {
  const int64_t packs = vocab / N;
  for (int64_t i = threadIdx.x; i < packs; i += THREADS * UNROLL) {
    few<T, N> v[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      if (i + u * THREADS < packs) v[u] = fetch<T, N>(z + (i + u * THREADS) * N);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int64_t c = (i + u * THREADS) * N;
      if (i + u * THREADS < packs) put<T, N>(dz + c, gradient_of<T, N>(v[u], c, m, scale, g, label));
    }
  }
  const int64_t tail = packs * N + threadIdx.x;
  if (N > 1 && tail < vocab) put<T, 1>(dz + tail, gradient_of<T, 1>(fetch<T, 1>(z + tail), tail, m, scale, g, label));
}

template <class T, int N>
__device__ __forceinline__ void write_zeros(T *dz, int64_t vocab, int64_t first, int64_t step) {
  const int64_t packs = vocab / N, tail = packs * N + first;
  const few<T, N> zero = repeat<T, N>(0);
  for (int64_t i = first; i < packs; i += step) put<T, N>(dz + i * N, zero);
  if (N > 1 && tail < vocab) dz[tail] = store<T>(0);
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    backward(T *__restrict__ dz, const T *__restrict__ z, int64_t ld, const acc_of<T> *__restrict__ lse,
             const int64_t *__restrict__ labels, const acc_of<T> *__restrict__ g, int64_t g_stride, int64_t vocab,
             int64_t ignore, halo__cuda_report *slot) {
  const int64_t row = blockIdx.x, label = labels[row];
  if (!label_counts(label, ignore, vocab, row, slot, threadIdx.x == 0)) {
    write_zeros<T, N>(dz + row * vocab, vocab, threadIdx.x, THREADS);
    return;
  }
  const acc_of<T> gi = g[row * g_stride];
  write_gradient<T, N>(dz + row * vocab, z + row * ld, vocab, lse[row], gi, gi, label);
}

/* One block a row, two passes. */
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    fused_twice(acc_of<T> *__restrict__ loss, T *z, int64_t ld, const int64_t *__restrict__ labels,
                const acc_of<T> *__restrict__ g, int64_t vocab, int64_t ignore, halo__cuda_report *slot) {
  using A = acc_of<T>;
  const int64_t row = blockIdx.x, label = labels[row];
  T *zi = z + row * ld;
  if (!label_counts(label, ignore, vocab, row, slot, threadIdx.x == 0)) {
    if (threadIdx.x == 0) loss[row] = 0;
    write_zeros<T, N>(zi, vocab, threadIdx.x, THREADS);
    return;
  }
  const A at_label = load(zi[label]); // read by all before the barriers of scan_row, written after them
  const running<A> all = scan_row<T, N, THREADS>(zi, vocab);
  if (threadIdx.x == 0) loss[row] = (A)log(all.s) + (all.m - at_label);
  const A gi = g != nullptr ? g[row] : 1;
  write_gradient<T, N>(zi, zi, vocab, all.m, gi / all.s, gi, label);
}

/* ---- a row held by a cluster --------------------------------------------------------------- */

constexpr int HELD_THREADS = 256, MAX_CLUSTER = 8;
constexpr int64_t GOOD_SHARE = 40 << 10; // of a row in a block: five blocks on a multiprocessor

/* Memory to shared memory, past the registers; 16 bytes. */
[[maybe_unused]] __device__ __forceinline__ void copy_async(void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
               "l"(from));
}

/* Each thread copies `share` packs to shared memory and is the only one that reads them. */
template <class T>
__global__ void __launch_bounds__(HELD_THREADS, 5)
    fused_held(acc_of<T> *__restrict__ loss, T *__restrict__ z, int64_t ld, const int64_t *__restrict__ labels,
               const acc_of<T> *__restrict__ g, int vocab, int share, int64_t ignore, halo__cuda_report *slot) {
#if __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  using A = acc_of<T>;
  constexpr int N = lanes16<T>, HELD_WARPS = HELD_THREADS / 32;
  extern __shared__ uint4 row_share[];
  __shared__ running<A> part[MAX_CLUSTER * HELD_WARPS];
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = (int)cluster.block_rank(), n_blocks = (int)cluster.num_blocks();
  const int64_t row = blockIdx.x / n_blocks;
  const int packs = vocab / N, step = n_blocks * HELD_THREADS, first = rank * HELD_THREADS + threadIdx.x;
  T *zi = z + row * ld;
  uint4 *mine = row_share + threadIdx.x;
  for (int m = 0; m < share; m++) {
    if (first + m * step < packs) copy_async(mine + m * HELD_THREADS, zi + (int64_t)(first + m * step) * N);
  }
  const int64_t label = labels[row];
  const int tail = packs * N + first; // logits that fill no pack, one for each of the first threads
  const A last = tail < vocab ? load(zi[tail]) : -(A)INFINITY;
  const bool is_first = rank == 0 && threadIdx.x == 0;
  const bool counts = label_counts(label, ignore, vocab, row, slot, is_first);
  const A at_label = is_first && counts ? load(zi[label]) : 0;
  cluster.barrier_arrive(); // that all blocks of the cluster run, before their memory is written
  asm volatile("cp.async.wait_all;" ::: "memory");
  cluster.barrier_wait();
  if (!counts) { // the whole cluster
    if (is_first) loss[row] = 0;
    write_zeros<T, N>(zi, vocab, first, step);
    return;
  }
  A most = last, sum = 0;
#pragma unroll 4
  for (int m = 0; m < share; m++) {
    if (first + m * step >= packs) continue;
    const few<T, N> v = fetch<T, N>((const T *)(mine + m * HELD_THREADS));
#pragma unroll
    for (int k = 0; k < N; k++) most = fmaxf(most, value(v, k));
  }
  const A shift = most == -INFINITY ? 0 : most;
  sum += exp_of<T>(last - shift);
#pragma unroll 2
  for (int m = 0; m < share; m++) {
    if (first + m * step >= packs) continue;
    const few<T, N> v = fetch<T, N>((const T *)(mine + m * HELD_THREADS));
#pragma unroll
    for (int k = 0; k < N; k++) sum += exp_of<T>(value(v, k) - shift);
  }
  const running<A> of_warp = join_warp<T>({most, sum});
  if ((int)threadIdx.x % 32 < n_blocks) {
    cluster.map_shared_rank(part, threadIdx.x % 32)[rank * HELD_WARPS + threadIdx.x / 32] = of_warp;
  }
  cluster.sync();
  running<A> all = {-(A)INFINITY, 0};
  for (int i = threadIdx.x % 32; i < n_blocks * HELD_WARPS; i += 32) all = join<T>(all, part[i]);
  all = join_warp<T>(all);
  if (is_first) loss[row] = (A)log(all.s) + (all.m - at_label);
  const A gi = g != nullptr ? g[row] : 1, scale = gi / all.s;
#pragma unroll 2
  for (int m = 0; m < share; m++) {
    const int c = (first + m * step) * N;
    if (first + m * step >= packs) continue;
    const few<T, N> v = fetch<T, N>((const T *)(mine + m * HELD_THREADS));
    put<T, N>(zi + c, gradient_of<T, N>(v, c, all.m, scale, gi, label));
  }
  if (tail < vocab) {
    zi[tail] = store<T>(scale * exp_of<T>(last - all.m) - (tail == label ? gi : 0));
  }
#endif
}

/* Packs a thread keeps when n blocks hold a row. */
template <class T> int64_t share_of(int64_t vocab, int n) {
  const int64_t packs = vocab / lanes16<T>, threads = (int64_t)n * HELD_THREADS;
  return (packs + threads - 1) / threads;
}

/* Blocks that hold a row: as few as give each a good share, or as many as there may be; 0 when the row is
 * too long for all of them. */
template <class T> int cluster_for(int64_t vocab) {
  int n = 1;
  while (n < MAX_CLUSTER && share_of<T>(vocab, n) * HELD_THREADS * 16 > GOOD_SHARE) n *= 2;
  return share_of<T>(vocab, n) * HELD_THREADS * 16 + 2048 <= halo__cuda_device()->shared_bytes ? n : 0;
}

template <class T>
halo_status run_held(acc_of<T> *loss, T *z, int64_t ld, const int64_t *labels, const acc_of<T> *g, int64_t rows,
                     int64_t vocab, int64_t ignore, int n_blocks) {
  const int share = (int)share_of<T>(vocab, n_blocks), bytes = share * HELD_THREADS * 16;
  HALO_CUDA_TRY(cudaFuncSetAttribute(fused_held<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = (unsigned)n_blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)(rows * n_blocks));
  config.blockDim = dim3(HELD_THREADS);
  config.dynamicSmemBytes = (size_t)bytes;
  config.stream = halo__cuda_stream();
  config.attrs = &attribute;
  config.numAttrs = 1;
  HALO_CUDA_TRY(cudaLaunchKernelEx(&config, fused_held<T>, loss, z, ld, labels, g, (int)vocab, share, ignore,
                                   halo__cuda_report_slot()));
  HALO_LAUNCHED("cross_entropy_fused");
  return HALO_OK;
}

template <class T>
halo_status run_fused(acc_of<T> *loss, T *z, int64_t ld, const int64_t *labels, const acc_of<T> *g, int64_t rows,
                      int64_t vocab, int64_t ignore) {
  constexpr int N = lanes16<T>;
  const bool is_wide = multiples(N, {ld}) && aligned(16, {z});
  if constexpr (!std::is_same<T, double>::value) {
    const int n_blocks = cluster_for<T>(vocab);
    if (is_wide && n_blocks > 0 && halo__cuda_device()->major >= 9 && rows * n_blocks < index_limit) {
      return run_held<T>(loss, z, ld, labels, g, rows, vocab, ignore, n_blocks);
    }
  }
  halo__cuda_report *slot = halo__cuda_report_slot();
  const cudaStream_t stream = halo__cuda_stream();
  if (is_wide) {
    fused_twice<T, N><<<(unsigned)rows, THREADS, 0, stream>>>(loss, z, ld, labels, g, vocab, ignore, slot);
  } else {
    fused_twice<T, 1><<<(unsigned)rows, THREADS, 0, stream>>>(loss, z, ld, labels, g, vocab, ignore, slot);
  }
  HALO_LAUNCHED("cross_entropy_fused");
  return HALO_OK;
}

halo_status check_rows(int64_t rows, int64_t vocab) {
  HALO_CHECK(rows < index_limit && vocab < index_limit / 2, HALO_EUNSUPPORTED,
             "cross_entropy: %lld rows of %lld; fewer than 2^31 of 2^30 on cuda", (long long)rows, (long long)vocab);
  return HALO_OK;
}

} // namespace

halo_status halo_cuda_cross_entropy_fwd(halo_dtype t, void *loss, void *lse, const void *z, int64_t ld,
                                        const int64_t *labels, int64_t rows, int64_t vocab, int64_t ignore) {
  if (rows <= 0) return HALO_OK;
  HALO_TRY(check_rows(rows, vocab));
  halo__cuda_report *slot = halo__cuda_report_slot();
  const cudaStream_t stream = halo__cuda_stream();
  HALO_REAL(t, T, {
    using A = acc_of<T>;
    constexpr int N = lanes16<T>;
    if (multiples(N, {ld}) && aligned(16, {z})) {
      forward<T, N><<<(unsigned)rows, THREADS, 0, stream>>>((A *)loss, (A *)lse, (const T *)z, ld, labels, vocab,
                                                            ignore, slot);
    } else {
      forward<T, 1><<<(unsigned)rows, THREADS, 0, stream>>>((A *)loss, (A *)lse, (const T *)z, ld, labels, vocab,
                                                            ignore, slot);
    }
  });
  HALO_LAUNCHED("cross_entropy_fwd");
  return HALO_OK;
}

halo_status halo_cuda_cross_entropy_bwd(halo_dtype t, void *dz, const void *z, int64_t ld, const void *lse,
                                        const int64_t *labels, const void *g, int64_t g_stride, int64_t rows,
                                        int64_t vocab, int64_t ignore) {
  if (rows <= 0) return HALO_OK;
  HALO_TRY(check_rows(rows, vocab));
  halo__cuda_report *slot = halo__cuda_report_slot();
  const cudaStream_t stream = halo__cuda_stream();
  HALO_REAL(t, T, {
    using A = acc_of<T>;
    constexpr int N = lanes16<T>;
    if (multiples(N, {vocab, ld}) && aligned(16, {z, dz})) {
      backward<T, N><<<(unsigned)rows, THREADS, 0, stream>>>((T *)dz, (const T *)z, ld, (const A *)lse, labels,
                                                             (const A *)g, g_stride, vocab, ignore, slot);
    } else {
      backward<T, 1><<<(unsigned)rows, THREADS, 0, stream>>>((T *)dz, (const T *)z, ld, (const A *)lse, labels,
                                                             (const A *)g, g_stride, vocab, ignore, slot);
    }
  });
  HALO_LAUNCHED("cross_entropy_bwd");
  return HALO_OK;
}

halo_status halo_cuda_cross_entropy_fused(halo_dtype t, void *loss, void *z, int64_t ld,
                                          const int64_t *labels, const void *g, int64_t rows, int64_t vocab,
                                          int64_t ignore) {
  if (rows <= 0) return HALO_OK;
  HALO_TRY(check_rows(rows, vocab));
  HALO_REAL(t, T, {
    using A = acc_of<T>;
    return (run_fused<T>((A *)loss, (T *)z, ld, labels, (const A *)g, rows, vocab, ignore));
  });
  return HALO_OK;
}
