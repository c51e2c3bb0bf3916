/* cross_entropy: loss of rows of logits against one label each, and its gradient.
 *
 *   l_i = log sum_v exp(z_iv)      loss_i = l_i - z_{i,label_i}
 *   dz_iv = g_i (exp(z_iv - l_i) - [v = label_i])
 *
 * shapes    z, dz [rows,V], rows ld elements apart; labels [rows]; loss, l [rows] in the arithmetic
 *           type
 * labels    a row whose label is `ignore` has loss 0 and gradient 0, whatever it holds; a label outside
 *           [0,V) is reported and treated likewise
 * fused     turns logits into gradients in place. Where rows are aligned, memory is read once and written
 *           once: a row of at most 8192 logits in bf16 stays in the registers of one block; on Hopper a
 *           longer one is held in shared memory by a cluster of as few blocks as will do (V = 151936 in
 *           bf16: two), one on each multiprocessor. A block is a ring of slots of 8 KB, which one thread
 *           fills with row after row by bulk copies, and groups of warps that take rows in turn:
 *
 *             slots      | row i | row i+1, as far as it has come | free |
 *             group 0      sums, meets its cluster, writes gradients: slots are free again
 *             group 1              sums as slots fill, meets its cluster, writes gradients
 *
 *           So memory works while one group waits or computes. A warp reduces what it sees to (m, sum) and
 *           sends that to all blocks of the cluster; every warp adds up what all sent.
 *           Otherwise one block a row, in two passes
 * numbers   maximum and sum together, each thread about its own m (Milakov and Gimelshein,
 *           arXiv 1805.02867), which follows the maximum with slack, so that sums are seldom rescaled;
 *           sums in the arithmetic type, at most some hundred terms a thread on Hopper; e^x: `powers`
 * order     fixed by the sizes: equal inputs, equal bits
 * twin      kernels/cpu/cross_entropy.c
 */
#include <cooperative_groups.h>

#include <algorithm>

#include "sm90.cuh"
#include "vector.cuh"

namespace {

using namespace halo;

constexpr int THREADS = 512, UNROLL = 4;

/* Largest of a pack. */
template <class T, int N> __device__ __forceinline__ acc_of<T> most_of(const few<T, N> &v) {
  if constexpr (std::is_same<T, __nv_bfloat16>::value && N > 1) {
    __nv_bfloat162 most[N / 2];
    memcpy(most, &v, sizeof v);
#pragma unroll
    for (int step = N / 4; step > 0; step /= 2) {
#pragma unroll
      for (int k = 0; k < step; k++) most[k] = __hmax2(most[k], most[k + step]);
    }
    return fmaxf(__low2float(most[0]), __high2float(most[0]));
  } else {
    acc_of<T> most = value(v, 0);
#pragma unroll
    for (int k = 1; k < N; k++) most = fmax(most, value(v, k));
    return most;
  }
}

/* e^(z - m), nearly, for an m of the order of the largest z. For bf16 it is 2^(z log2(e) - m2), where m2 is
 * m log2(e) rounded: one fused multiply-add and one ex2 (not the steps that __expf takes for results below
 * 2^-126: they are 0 here). What the rounding adds to every exponent divides out in of(z) / of(m), which is
 * e^(z - m). */
template <class T> struct powers {
  using A = acc_of<T>;
  static constexpr bool is_base2 = std::is_same<T, __nv_bfloat16>::value;
  static constexpr float log2_e = 1.4426950408889634f;
  A m, m2;
  __device__ __forceinline__ explicit powers(A at) : m(at), m2(is_base2 ? at * (A)log2_e : at) {}
  static __device__ __forceinline__ A power(A x) {
    if constexpr (is_base2) {
      float y;
      asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
      return y;
    } else {
      return exp_of<T>(x);
    }
  }
  __device__ __forceinline__ A of(A z) const {
    if constexpr (is_base2) {
      return power(fmaf(z, log2_e, -m2));
    } else {
      return power(z - m);
    }
  }
  /* What a sum about `from` is multiplied by to be one about this. */
  __device__ __forceinline__ A from(const powers &other) const { return power(other.m2 - m2); }
};

/* sum of e^(z - m) over the logits seen; m moves when one is larger than it by NEAR: seldom. */
constexpr float LOWEST = -1e38f, NEAR = 8;
template <class T> struct tally {
  using A = acc_of<T>;
  powers<T> e{(A)LOWEST};
  A sum = 0;
  template <int N> __device__ __forceinline__ void add(const few<T, N> &v) {
    const A most = most_of<T, N>(v);
    if (most > e.m + (A)NEAR) move(powers<T>(most));
    A a[N];
#pragma unroll
    for (int k = 0; k < N; k++) a[k] = e.of(value(v, k));
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
      for (int k = 0; k < half; k++) a[k] += a[k + half];
    }
    sum += a[0];
  }
  __device__ __forceinline__ void move(const powers<T> &to) {
    sum *= to.from(e);
    e = to;
  }
  /* Of all lanes, in all lanes. */
  __device__ __forceinline__ void join_warp() {
    move(powers<T>(warp_max(e.m)));
    sum = warp_sum(sum);
  }
  /* log of the sum of e^(z - m) */
  __device__ __forceinline__ A log_sum() const { return (A)log(sum / e.of(e.m)); }
};

/* Tallies (m, sum) of n warps, added up by every warp that asks. */
template <class T> __device__ __forceinline__ tally<T> join_told(const acc_of<T> (*told)[2], int n) {
  tally<T> all;
  acc_of<T> most = all.e.m;
  for (int i = threadIdx.x % 32; i < n; i += 32) most = told[i][0] > most ? told[i][0] : most;
  all.e = powers<T>(warp_max(most));
  for (int i = threadIdx.x % 32; i < n; i += 32) all.sum += told[i][1] * all.e.from(powers<T>(told[i][0]));
  all.sum = warp_sum(all.sum);
  return all;
}
template <int B, class T> __device__ __forceinline__ tally<T> join_block(tally<T> own) {
  __shared__ acc_of<T> told[B / 32][2];
  own.join_warp();
  if (threadIdx.x % 32 == 0) {
    told[threadIdx.x / 32][0] = own.e.m;
    told[threadIdx.x / 32][1] = own.sum;
  }
  __syncthreads();
  return join_told<T>(told, B / 32);
}

/* A label that counts? Thread `is_reporter` reports one that is out of range. */
__device__ __forceinline__ bool label_counts(int64_t label, int64_t ignore, int64_t vocab, int64_t row,
                                             halo__cuda_report *slot, bool is_reporter) {
  if (label == ignore) return false;
  if (label >= 0 && label < vocab) return true;
  if (is_reporter) report(slot, HALO__CUDA_LABEL, row, label, vocab);
  return false;
}

/* Tally of a row by a block of THREADS; packs of N. */
template <class T, int N>
__device__ __forceinline__ tally<T> scan_row(const T *__restrict__ z, int64_t vocab) {
  tally<T> own;
  const int64_t packs = vocab / N;
  for (int64_t i = threadIdx.x; i < packs; i += THREADS * UNROLL) {
    few<T, N> v[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      if (i + u * THREADS < packs) v[u] = fetch<T, N>(z + (i + u * THREADS) * N);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      if (i + u * THREADS < packs) own.add(v[u]);
    }
  }
  const int64_t tail = packs * N + threadIdx.x;
  if (N > 1 && tail < vocab) own.add(fetch<T, 1>(z + tail));
  return join_block<THREADS>(own);
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    forward(acc_of<T> *__restrict__ loss, acc_of<T> *__restrict__ lse, const T *__restrict__ z, int64_t ld,
            const int64_t *__restrict__ labels, int64_t vocab, int64_t ignore, halo__cuda_report *slot) {
  const int64_t row = blockIdx.x, label = labels[row];
  if (!label_counts(label, ignore, vocab, row, slot, threadIdx.x == 0)) {
    if (threadIdx.x == 0) {
      loss[row] = 0;
      if (lse != nullptr) lse[row] = 0;
    }
    return;
  }
  const tally<T> all = scan_row<T, N>(z + row * ld, vocab);
  if (threadIdx.x != 0) return;
  const acc_of<T> log_sum = all.log_sum();
  if (lse != nullptr) lse[row] = all.e.m + log_sum;
  loss[row] = log_sum + (all.e.m - load(z[row * ld + label]));
}

/* Gradients of the N logits at c: scale * e.of(z), and minus g at the label. */
template <class T, int N> __device__ __forceinline__ few<T, N>
gradient_of(const few<T, N> &v, int64_t c, const powers<T> &e, acc_of<T> scale, acc_of<T> g, int64_t label) {
  acc_of<T> a[N];
  widen(a, v);
#pragma unroll
  for (int k = 0; k < N; k++) a[k] = scale * e.of(a[k]);
  if ((uint64_t)(label - c) < N) { // asked once a pack, not for every logit
#pragma unroll
    for (int k = 0; k < N; k++) a[k] -= c + k == label ? g : 0;
  }
  return narrow<T, N>(a);
}

/* dz of a row by a block of THREADS. z and dz may be the same. */
template <class T, int N> __device__ __forceinline__ void write_gradient(T *dz, const T *z, int64_t vocab,
                                                                         const powers<T> &e, acc_of<T> scale,
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
      if (i + u * THREADS < packs) put<T, N>(dz + c, gradient_of<T, N>(v[u], c, e, scale, g, label));
    }
  }
  const int64_t tail = packs * N + threadIdx.x;
  if (N > 1 && tail < vocab)
    put<T, 1>(dz + tail, gradient_of<T, 1>(fetch<T, 1>(z + tail), tail, e, scale, g, label));
}

template <class T, int N>
__device__ __forceinline__ void write_zeros(T *dz, int64_t vocab, int64_t first, int64_t step) {
  const int64_t packs = vocab / N, tail = packs * N + first;
  const few<T, N> zero = repeat<T, N>(0);
  for (int64_t i = first; i < packs; i += step) put<T, N>(dz + i * N, zero);
  if (N > 1 && tail < vocab) dz[tail] = store<T>(0);
}

template <class T, int N> __global__ void __launch_bounds__(THREADS)
    backward(T *__restrict__ dz, const T *__restrict__ z, int64_t ld, const acc_of<T> *__restrict__ lse,
             const int64_t *__restrict__ labels, const acc_of<T> *__restrict__ g, int64_t g_stride,
             int64_t vocab, int64_t ignore, halo__cuda_report *slot) {
  const int64_t row = blockIdx.x, label = labels[row];
  if (!label_counts(label, ignore, vocab, row, slot, threadIdx.x == 0)) {
    write_zeros<T, N>(dz + row * vocab, vocab, threadIdx.x, THREADS);
    return;
  }
  const acc_of<T> gi = g[row * g_stride];
  const powers<T> e(lse[row]);
  write_gradient<T, N>(dz + row * vocab, z + row * ld, vocab, e, gi / e.of(e.m), gi, label);
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
  const tally<T> all = scan_row<T, N>(zi, vocab);
  if (threadIdx.x == 0) loss[row] = all.log_sum() + (all.e.m - at_label);
  const A gi = g != nullptr ? g[row] : 1;
  write_gradient<T, N>(zi, zi, vocab, all.e, gi / all.sum, gi, label);
}

/* ---- rows read once --------------------------------------------------------------------------
 * The last pack of a row is read whole: ld is a multiple of N, so what follows the row is its padding. */

/* Without the logits from `count` on. */
template <class T, int N> __device__ __forceinline__ few<T, N> first_of(const few<T, N> &v, int count) {
  acc_of<T> a[N];
  widen(a, v);
#pragma unroll
  for (int k = 0; k < N; k++) a[k] = k < count ? a[k] : -(acc_of<T>)INFINITY;
  return narrow<T, N>(a);
}
template <class T, int N> __device__ __forceinline__ void put_first(T *p, const few<T, N> &v, int count) {
  if (count >= N) {
    put<T, N>(p, v);
    return;
  }
#pragma unroll
  for (int k = 0; k < N; k++) {
    if (k < count) p[k] = store<T>(value(v, k));
  }
}

/* Short rows: one block each, in registers. */
constexpr int KEPT_THREADS = 256, KEPT = 4;
template <class T, int N> __global__ void __launch_bounds__(KEPT_THREADS)
    fused_kept(acc_of<T> *__restrict__ loss, T *__restrict__ z, int64_t ld,
               const int64_t *__restrict__ labels, const acc_of<T> *__restrict__ g, int vocab, int64_t ignore,
               halo__cuda_report *slot) {
  using A = acc_of<T>;
  const int64_t row = blockIdx.x;
  T *zi = z + row * ld;
  few<T, N> v[KEPT];
#pragma unroll
  for (int u = 0; u < KEPT; u++) {
    const int c = (u * KEPT_THREADS + (int)threadIdx.x) * N;
    if (c < vocab) v[u] = fetch<T, N>(zi + c);
  }
  const int64_t label = labels[row];
  if (!label_counts(label, ignore, vocab, row, slot, threadIdx.x == 0)) {
    if (threadIdx.x == 0) loss[row] = 0;
    write_zeros<T, N>(zi, vocab, threadIdx.x, KEPT_THREADS);
    return;
  }
  const A at_label = load(zi[label]), gi = g != nullptr ? g[row] : 1;
  tally<T> own;
#pragma unroll
  for (int u = 0; u < KEPT; u++) {
    const int c = (u * KEPT_THREADS + (int)threadIdx.x) * N;
    if (c < vocab) own.add(c + N <= vocab ? v[u] : first_of<T, N>(v[u], vocab - c));
  }
  const tally<T> all = join_block<KEPT_THREADS>(own);
  if (threadIdx.x == 0) loss[row] = all.log_sum() + (all.e.m - at_label);
  const A scale = gi / all.sum;
#pragma unroll
  for (int u = 0; u < KEPT; u++) {
    const int c = (u * KEPT_THREADS + (int)threadIdx.x) * N;
    if (c < vocab) put_first<T, N>(zi + c, gradient_of<T, N>(v[u], c, all.e, scale, gi, label), vocab - c);
  }
}

/* ---- a row held by a cluster (Hopper) ------------------------------------------------------- */

constexpr int GROUPS = 2, GROUP_THREADS = 256, GROUP_WARPS = GROUP_THREADS / 32;
constexpr int RING_THREADS = GROUPS * GROUP_THREADS;   // and one warp that loads
constexpr int SLOT_PACKS = 512, SLOT_BYTES = SLOT_PACKS * 16;
[[maybe_unused]] constexpr int EACH = SLOT_PACKS / GROUP_THREADS; // packs of a slot that a thread works on
constexpr int MAX_SLOTS = 28, SLOTS_AHEAD = 8; // at least so many for the next row while one is held
constexpr int MAX_CLUSTER = 8;
constexpr int BUFFERS = 2 * GROUPS; // rows for which sums of other blocks may be under way

/* Rows of one launch. */
template <class T> struct ring_job {
  acc_of<T> *loss;
  T *z;
  const int64_t *labels;
  const acc_of<T> *g;
  int64_t ld, rows, ignore;
  int vocab, share, slots; // share: packs of a row that one block holds
  halo__cuda_report *report;
};

#if HALO_SM90
/* Where a role stands in a ring of `slots`. */
struct ring_at {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next(int slots) {
    if (++index == slots) {
      index = 0;
      parity ^= 1;
    }
  }
};

/* 8 bytes to the same place of block `rank` of the cluster, counted by its barrier. */
__device__ __forceinline__ void send(void *to, float a, float b, uint64_t *bar, int rank) {
  uint32_t there, bar_there;
  const uint32_t here = (uint32_t)__cvta_generic_to_shared(to),
                 bar_here = (uint32_t)__cvta_generic_to_shared(bar);
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(bar_there) : "r"(bar_here), "r"(rank));
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(there),
      "f"(a), "f"(b), "r"(bar_there)
      : "memory");
}
/* barrier_wait for what other blocks of the cluster sent. */
__device__ __forceinline__ void wait_for_cluster(uint64_t *bar, uint32_t parity) {
  asm volatile("{ .reg .pred p;\n"
               "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
               "@!p bra again; }" ::"r"((uint32_t)__cvta_generic_to_shared(bar)),
               "r"(parity)
               : "memory");
}

struct ring_barriers {
  uint64_t full[MAX_SLOTS], empty[MAX_SLOTS];  // of slots
  uint64_t read[BUFFERS], met[BUFFERS]; // of rows: all of it has come; all sums of the cluster are here
  __device__ void open(int n_blocks) {
    for (int i = 0; i < MAX_SLOTS; i++) {
      sm90::barrier_init(&full[i], 1);
      sm90::barrier_init(&empty[i], GROUP_WARPS * sm90::WARP_ARRIVES);
    }
    for (int i = 0; i < BUFFERS; i++) {
      sm90::barrier_init(&read[i], GROUP_WARPS * sm90::WARP_ARRIVES);
      sm90::barrier_init(&met[i], n_blocks == 1 ? GROUP_WARPS * sm90::WARP_ARRIVES : 1);
    }
    sm90::barrier_init_done();
  }
};

/* The loading thread: packs [from, to) of this cluster's rows, slot after slot. */
template <class T> __device__ void fill_ring(unsigned char *ring, ring_barriers *bar, const ring_job<T> &j,
                                             int64_t row, int64_t step, int from, int to) {
  ring_at at;
  int64_t label = row < j.rows ? j.labels[row] : 0;
  for (; row < j.rows; row += step) {
    const bool counts = label != j.ignore && label >= 0 && label < j.vocab;
    if (row + step < j.rows) label = j.labels[row + step];
    if (!counts) continue;
    const T *zi = j.z + row * j.ld;
    for (int p = from; p < to; p += SLOT_PACKS) {
      const uint32_t bytes = (uint32_t)min(to - p, SLOT_PACKS) * 16;
      sm90::barrier_wait(&bar->empty[at.index], at.parity ^ 1);
      sm90::barrier_expect(&bar->full[at.index], bytes);
      sm90::bulk_load(ring + at.index * SLOT_BYTES, zi + (int64_t)p * lanes16<T>, bytes,
                      &bar->full[at.index]);
      at.next(j.slots);
    }
  }
}

/* A group's part of a row, as it comes. */
template <class T> __device__ __forceinline__ tally<T> read_row(const unsigned char *mine, ring_barriers *bar,
                                                                const ring_job<T> &j, ring_at at, int from,
                                                                int to, int place) {
  constexpr int N = lanes16<T>;
  tally<T> own;
  for (int first = from; first < to; first += SLOT_PACKS) {
    sm90::barrier_wait(&bar->full[at.index], at.parity);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int p = first + place + e * GROUP_THREADS;
      if (p >= to) continue;
      few<T, N> v = fetch<T, N>((const T *)(mine + at.index * SLOT_BYTES + e * GROUP_THREADS * 16));
      if ((p + 1) * N > j.vocab) v = first_of<T, N>(v, j.vocab - p * N);
      own.add(v);
    }
    at.next(j.slots);
  }
  return own;
}

/* The same part turned into gradients; its slots are free again. The thread that has the label writes the
 * loss. */
template <class T> __device__ __forceinline__ void write_row(const unsigned char *mine, ring_barriers *bar,
                                                             const ring_job<T> &j, ring_at *at, int from,
                                                             int to, int place, int64_t row, int64_t label,
                                                             acc_of<T> g, const tally<T> &all) {
  using A = acc_of<T>;
  constexpr int N = lanes16<T>;
  T *zi = j.z + row * j.ld;
  const A scale = g / all.sum;
  for (int first = from; first < to; first += SLOT_PACKS) {
    few<T, N> v[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      v[e] = fetch<T, N>((const T *)(mine + at->index * SLOT_BYTES + e * GROUP_THREADS * 16));
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int p = first + place + e * GROUP_THREADS, c = p * N;
      if (p < to && (uint64_t)(label - c) < N) {
        A at_label = 0;
#pragma unroll
        for (int k = 0; k < N; k++) at_label = c + k == label ? value(v[e], k) : at_label;
        j.loss[row] = all.log_sum() + (all.e.m - at_label);
      }
      v[e] = gradient_of<T, N>(v[e], c, all.e, scale, g, label);
    }
    __syncwarp();
    sm90::barrier_arrive_warp(&bar->empty[at->index], place % 32 == 0);
    at->next(j.slots);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int p = first + place + e * GROUP_THREADS;
      if (p < to) put_first<T, N>(zi + p * N, v[e], j.vocab - p * N);
    }
  }
}
#endif

template <class T>
__global__ void __launch_bounds__(RING_THREADS + 32, 1) fused_ring(const __grid_constant__ ring_job<T> j) {
#if HALO_SM90
  namespace cg = cooperative_groups;
  using A = acc_of<T>;
  constexpr int N = lanes16<T>;
  extern __shared__ __align__(128) unsigned char ring[];
  __shared__ ring_barriers bar;
  __shared__ alignas(8) A part[BUFFERS][MAX_CLUSTER * GROUP_WARPS][2];
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = (int)cluster.block_rank(), n_blocks = (int)cluster.num_blocks();
  const int thread = (int)threadIdx.x, lane = thread % 32;
  if (thread == 0) bar.open(n_blocks);
  cluster.sync();
  const int packs = (j.vocab + N - 1) / N, from = min(rank * j.share, packs), to = min(from + j.share, packs);
  const int64_t step = gridDim.x / n_blocks;
  int64_t row = blockIdx.x / n_blocks;
  if (thread >= RING_THREADS) {
    if (lane == 0) fill_ring<T>(ring, &bar, j, row, step, from, to);
    return;
  }
  const int group = thread / GROUP_THREADS, place = thread % GROUP_THREADS;
  const int chunks = (to - from + SLOT_PACKS - 1) / SLOT_PACKS;
  const unsigned char *mine = ring + place * 16;
  ring_at at;
  uint32_t turn = 0; // of the rows that count: buffer turn % BUFFERS, parity turn / BUFFERS % 2
  int64_t next_label = j.labels[row];
  A next_g = j.g != nullptr ? j.g[row] : 1;
  for (; row < j.rows; row += step) {
    const int64_t label = next_label;
    const A g = next_g;
    if (row + step < j.rows) {
      next_label = j.labels[row + step];
      if (j.g != nullptr) next_g = j.g[row + step];
    }
    if (!label_counts(label, j.ignore, j.vocab, row, j.report,
                      rank == 0 && thread == 0)) { // the whole cluster
      if (rank == 0 && thread == 0) j.loss[row] = 0;
      write_zeros<T, N>(j.z + row * j.ld, j.vocab, rank * RING_THREADS + thread, n_blocks * RING_THREADS);
      continue;
    }
    const uint32_t now = turn++, buffer = now % BUFFERS, before = (now + BUFFERS - 1) % BUFFERS;
    if (now % GROUPS != group) {
      for (int i = 0; i < chunks; i++) at.next(j.slots);
      continue;
    }
    // A parity tells a turn of a slot only from the one before, so nobody waits for a slot of this row before
    // all of the row before has come.
    if (now > 0) sm90::barrier_wait(&bar.read[before], (now - 1) / BUFFERS % 2);
    tally<T> own = read_row<T>(mine, &bar, j, at, from, to, place);
    own.join_warp();
    sm90::barrier_arrive_warp(&bar.read[buffer], lane == 0);
    // A buffer is free: every warp that sends has met all of two rows of this group since it was last used.
    A(*parts)[2] = part[buffer];
    A *const part_here = parts[rank * GROUP_WARPS + place / 32];
    if (n_blocks == 1) {
      if (lane == 0) {
        part_here[0] = own.e.m;
        part_here[1] = own.sum;
      }
      sm90::barrier_arrive_warp(&bar.met[buffer], lane == 0);
    } else {
      if (place == 0) {
        sm90::barrier_expect(&bar.met[buffer], (uint32_t)(n_blocks * GROUP_WARPS * sizeof *parts));
      }
      if (lane < n_blocks) send(part_here, own.e.m, own.sum, &bar.met[buffer], lane);
    }
    wait_for_cluster(&bar.met[buffer], now / BUFFERS % 2);
    const tally<T> all = join_told<T>(parts, n_blocks * GROUP_WARPS);
    write_row<T>(mine, &bar, j, &at, from, to, place, row, label, g, all);
  }
#endif
}

/* How a row is held: by n_blocks, each with a ring of `slots`; n_blocks 0: too long for all of them. */
struct ring_plan {
  int n_blocks, share, slots;
};
template <class T> ring_plan plan_ring(int64_t vocab) {
  const int64_t packs = (vocab + lanes16<T> - 1) / lanes16<T>;
  const int64_t others = (2 * MAX_SLOTS + 2 * BUFFERS + BUFFERS * MAX_CLUSTER * GROUP_WARPS) * 8 + 128;
  ring_plan plan = {};
  plan.slots = (int)std::min<int64_t>(MAX_SLOTS, (halo__cuda_device()->shared_bytes - others) / SLOT_BYTES);
  for (int n = 1; n <= MAX_CLUSTER && plan.n_blocks == 0; n *= 2) {
    const int64_t share = ((packs + n - 1) / n + 7) / 8 * 8; // whole lines of 128 bytes
    if ((share + SLOT_PACKS - 1) / SLOT_PACKS + SLOTS_AHEAD > plan.slots) continue;
    plan.share = (int)share;
    plan.n_blocks = n;
  }
  return plan;
}

template <class T> halo_status run_ring(acc_of<T> *loss, T *z, int64_t ld, const int64_t *labels,
                                        const acc_of<T> *g, int64_t rows, int64_t vocab, int64_t ignore,
                                        const ring_plan &plan) {
  const ring_job<T> job = {loss, z, labels, g, ld, rows, ignore, (int)vocab, plan.share, plan.slots,
                           halo__cuda_report_slot()};
  const int bytes = plan.slots * SLOT_BYTES;
  HALO_CUDA_TRY(cudaFuncSetAttribute(fused_ring<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = (unsigned)plan.n_blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)plan.n_blocks);
  config.blockDim = dim3(RING_THREADS + 32);
  config.dynamicSmemBytes = (size_t)bytes;
  config.stream = halo__cuda_stream();
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0; // that run at once
  HALO_CUDA_TRY(cudaOccupancyMaxActiveClusters(&clusters, fused_ring<T>, &config));
  HALO_CHECK(clusters > 0, HALO_ECUDA, "cross_entropy: no cluster of %d blocks fits on the device",
             plan.n_blocks);
  const int64_t rounds = (rows + clusters - 1) / clusters; // the same for all, even if that leaves some idle
  config.gridDim = dim3((unsigned)(plan.n_blocks * ((rows + rounds - 1) / rounds)));
  HALO_CUDA_TRY(cudaLaunchKernelEx(&config, fused_ring<T>, job));
  HALO_LAUNCHED("cross_entropy_fused");
  return HALO_OK;
}

template <class T> halo_status run_fused(acc_of<T> *loss, T *z, int64_t ld, const int64_t *labels,
                                         const acc_of<T> *g, int64_t rows, int64_t vocab, int64_t ignore) {
  constexpr int N = lanes16<T>;
  const bool is_wide = multiples(N, {ld}) && aligned(16, {z});
  halo__cuda_report *slot = halo__cuda_report_slot();
  const cudaStream_t stream = halo__cuda_stream();
  if (is_wide && vocab <= KEPT * KEPT_THREADS * N) {
    fused_kept<T, N>
        <<<(unsigned)rows, KEPT_THREADS, 0, stream>>>(loss, z, ld, labels, g, (int)vocab, ignore, slot);
    HALO_LAUNCHED("cross_entropy_fused");
    return HALO_OK;
  }
  if constexpr (!std::is_same<T, double>::value) {
    const ring_plan plan = plan_ring<T>(vocab);
    if (is_wide && halo__cuda_device()->major == 9 && plan.n_blocks > 0) {
      return run_ring<T>(loss, z, ld, labels, g, rows, vocab, ignore, plan);
    }
  }
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
             "cross_entropy: %lld rows of %lld; fewer than 2^31 of 2^30 on cuda", (long long)rows,
             (long long)vocab);
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
      forward<T, N><<<(unsigned)rows, THREADS, 0, stream>>>((A *)loss, (A *)lse, (const T *)z, ld, labels,
                                                            vocab, ignore, slot);
    } else {
      forward<T, 1><<<(unsigned)rows, THREADS, 0, stream>>>((A *)loss, (A *)lse, (const T *)z, ld, labels,
                                                            vocab, ignore, slot);
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
      backward<T, N><<<(unsigned)rows, THREADS, 0, stream>>>(
          (T *)dz, (const T *)z, ld, (const A *)lse, labels, (const A *)g, g_stride, vocab, ignore, slot);
    } else {
      backward<T, 1><<<(unsigned)rows, THREADS, 0, stream>>>(
          (T *)dz, (const T *)z, ld, (const A *)lse, labels, (const A *)g, g_stride, vocab, ignore, slot);
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
