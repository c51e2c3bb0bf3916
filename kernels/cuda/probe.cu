/* probe: a few query rows against all keys at hand.
 *
 *   z_jp = scale * q_p . k_j  where first_p <= pos_j <= last_p, else -inf     peak_p = max_j z_jp
 *   e_jp = exp(z_jp - peak_p)                                                 sum_p  = sum_j e_jp
 *   column_j = sum_p w_p e_jp          diagonal_s = sum over i_p - j = s of w_p e_jp
 *
 * shapes    see halo_probe in kernels.h; lanes are the query rows
 * order     a logit is one chain of products over the head dimension, a sum one chain over the keys of a
 *           block (or lanes of a row), each in one thread: the same wherever the key lives and however
 *           many ranks there are. Maxima are exact in any order (atomics)
 * tasks     logits: a CTA has 64 keys of one block and 16 lanes of one unit in shared memory, a thread one
 *           lane and 4 keys. exp: a thread has one lane of one block. score: a thread has one key, then one
 *           diagonal, of a block
 * work      2 * size flops per (lane, key); z is written once, read and written once by exp, read twice by
 *           score (from the caches: the lanes of one block are 32 KB at 128 keys and 64 lanes)
 * numbers   fp32 for F32 and BF16 keys, fp64 for F64; a lane that sees nothing has peak -inf, sums 0
 * twin      kernels/cpu/probe.c
 */
#include "cuda.cuh"

using namespace halo;

namespace {

enum { LANES = HALO_PROBE_LANES, SLOTS = 16, EACH = 4, DEPTH = 32 };
enum { KEYS = SLOTS * EACH, THREADS = SLOTS * LANES };

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

/* *to = max(*to, x); no NaN. Floats compare as their bits do, negative ones the other way round. */
__device__ __forceinline__ void raise(float *to, float x) {
  if (x >= 0) atomicMax((int *)to, __float_as_int(x + 0.0f));
  else atomicMin((unsigned *)to, __float_as_uint(x));
}
__device__ __forceinline__ void raise(double *to, double x) {
  if (x >= 0) atomicMax((long long *)to, __double_as_longlong(x + 0.0));
  else atomicMin((unsigned long long *)to, (unsigned long long)__double_as_longlong(x));
}

/* CTA: (64 keys of a block, 16 lanes, unit); z and peaks. */
template <class T> __global__ void __launch_bounds__(THREADS) logits(acc_of<T> *peak, halo_probe p) {
  using A = acc_of<T>;
  __shared__ A q[DEPTH][LANES], k[KEYS][DEPTH + 1];
  __shared__ A most[SLOTS][LANES];
  const int64_t chunks = (p.block + KEYS - 1) / KEYS, groups = p.lanes / LANES;
  const int64_t group = blockIdx.x % groups, chunk = blockIdx.x / groups % chunks;
  const int64_t b = blockIdx.x / groups / chunks % p.n_blocks, u = blockIdx.x / groups / chunks / p.n_blocks;
  const int lane = threadIdx.x % LANES, slot = threadIdx.x / LANES;
  const int64_t unit = p.unit + u, at = unit * p.lanes + group * LANES + lane;
  const int64_t first_key = chunk * KEYS, n = min((int64_t)KEYS, p.block - first_key);
  const int64_t batch = unit / p.heads, kv = unit % p.heads / (p.heads / p.kv_heads);
  const T *from = (const T *)p.k + batch * p.stride[0] + (b * p.block + first_key) * p.stride[1] +
                  kv * p.stride[2];
  const A *from_q = (const A *)p.q + unit * p.size * p.lanes + group * LANES;
  const int32_t start = p.start[b] + (int32_t)first_key, first = p.first[at], last = p.last[at];
  A z[EACH] = {};
  for (int64_t d0 = 0; d0 < p.size; d0 += DEPTH) {
    const int depth = (int)min((int64_t)DEPTH, p.size - d0);
    __syncthreads();
    for (int i = threadIdx.x; i < DEPTH * LANES; i += THREADS) {
      q[i / LANES][i % LANES] = i / LANES < depth ? from_q[(d0 + i / LANES) * p.lanes + i % LANES] : 0;
    }
    for (int i = threadIdx.x; i < KEYS * DEPTH; i += THREADS) {
      const int j = i / DEPTH, d = i % DEPTH;
      k[j][d] = j < n && d < depth ? load(from[j * p.stride[1] + d0 + d]) : 0;
    }
    __syncthreads();
    for (int d = 0; d < depth; d++) {
      const A x = q[d][lane];
#pragma unroll
      for (int e = 0; e < EACH; e++) z[e] += x * k[slot + e * SLOTS][d];
    }
  }
  A top = -(A)INFINITY;
  A *to = (A *)p.z + ((u * p.n_blocks + b) * p.block + first_key) * p.lanes + group * LANES + lane;
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int j = slot + e * SLOTS;
    if (j >= n) continue;
    const A x = first <= start + j && start + j <= last ? z[e] * (A)p.scale : -(A)INFINITY;
    to[j * p.lanes] = x;
    top = x > top ? x : top;
  }
  most[slot][lane] = top;
  __syncthreads();
  if (slot > 0) return;
#pragma unroll
  for (int i = 1; i < SLOTS; i++) top = most[i][lane] > top ? most[i][lane] : top;
  if (top > -(A)INFINITY) raise(&peak[u * p.lanes + group * LANES + lane], top);
}

/* Thread: a lane of a block. */
template <class A> __global__ void exponentials(A *sum, const A *peak, halo_probe p) {
  const int64_t n = p.n_units * p.n_blocks * p.lanes, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
    const int64_t lane = i % p.lanes, ub = i / p.lanes;
    const A top = peak[ub / p.n_blocks * p.lanes + lane];
    A *z = (A *)p.z + ub * p.block * p.lanes + lane, total = 0;
    for (int64_t j = 0; j < p.block; j++) {
      // A lane that sees nothing has peak -inf and z -inf: no NaN from their difference.
      const A x = z[j * p.lanes], e = x == -(A)INFINITY ? 0 : exp_of(x - top);
      z[j * p.lanes] = e;
      total += e;
    }
    sum[i] = total;
  }
}

/* CTA: a block of a unit. */
template <class A> __global__ void score(A *out, const A *weight_of, halo_probe p) {
  const int64_t u = blockIdx.x / p.n_blocks, b = blockIdx.x % p.n_blocks;
  const int64_t tokens = p.n_blocks * p.block, span = p.block + p.lanes - 1;
  const A *z = (const A *)p.z + (u * p.n_blocks + b) * p.block * p.lanes, *weight = weight_of + u * p.lanes;
  A *unit = out + u * (tokens + p.n_blocks * span);
  for (int64_t j = threadIdx.x; j < p.block; j += blockDim.x) {
    A sum = 0;
    for (int64_t l = 0; l < p.lanes; l++) sum += weight[l] * z[j * p.lanes + l];
    unit[b * p.block + j] = sum;
  }
  for (int64_t t = threadIdx.x; t < span; t += blockDim.x) { // lane - key = t - (block - 1)
    const int64_t from = max((int64_t)0, p.block - 1 - t), end = min(p.block, p.block - 1 - t + p.lanes);
    A sum = 0;
    for (int64_t j = from; j < end; j++) {
      const int64_t l = t - (p.block - 1) + j;
      sum += weight[l] * z[j * p.lanes + l];
    }
    unit[tokens + b * span + t] = sum;
  }
}

} // namespace

halo_status halo_cuda_probe_peak(void *peak, const halo_probe *p) {
  const int64_t blocks = p->n_units * p->n_blocks * ((p->block + KEYS - 1) / KEYS) * (p->lanes / LANES);
  if (blocks == 0) return HALO_OK;
  HALO_CHECK(blocks < INT32_MAX, HALO_EUNSUPPORTED, "probe: %lld blocks are too many", (long long)blocks);
  cudaStream_t stream = halo__cuda_stream();
  HALO_REAL(p->t, T, (logits<T><<<(unsigned)blocks, THREADS, 0, stream>>>((acc_of<T> *)peak, *p)));
  HALO_LAUNCHED("probe_peak");
  return HALO_OK;
}

halo_status halo_cuda_probe_exp(void *sum, const void *peak, const halo_probe *p) {
  const int64_t n = p->n_units * p->n_blocks * p->lanes;
  if (n == 0) return HALO_OK;
  HALO_REAL(p->t, T, {
    using A = acc_of<T>;
    exponentials<A><<<grid(n, 128), 128, 0, halo__cuda_stream()>>>((A *)sum, (const A *)peak, *p);
  });
  HALO_LAUNCHED("probe_exp");
  return HALO_OK;
}

halo_status halo_cuda_probe_score(void *out, const void *weight, const halo_probe *p) {
  const int64_t blocks = p->n_units * p->n_blocks;
  if (blocks == 0) return HALO_OK;
  HALO_CHECK(blocks < INT32_MAX, HALO_EUNSUPPORTED, "probe: %lld blocks are too many", (long long)blocks);
  HALO_REAL(p->t, T, {
    using A = acc_of<T>;
    score<A><<<(unsigned)blocks, 128, 0, halo__cuda_stream()>>>((A *)out, (const A *)weight, *p);
  });
  HALO_LAUNCHED("probe_score");
  return HALO_OK;
}
