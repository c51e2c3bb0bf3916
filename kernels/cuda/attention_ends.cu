/* attention_ends: what happens to the query side before the first key and after the last.
 *
 *   begin        o = 0, m = -inf, l = 0
 *   finish       out = o / l,  lse = m ln 2 + log l;  a row that saw no key: out = 0, lse = -inf
 *   delta        sum_d out_d grad_d       (the softmax's own gradient, FlashAttention-2 eq. 4)
 *   dq_finish    dq = sum of the parts, in part order
 *   merge        with a = lse, b = lse_part, c = max(a, b):
 *                o = (e^(a-c) o + e^(b-c) o_part) / (e^(a-c) + e^(b-c)), lse = c + log(e^(a-c) + e^(b-c))
 *   columns_add  row rows[e] of dk, dv += sum over parts, in part order
 *
 * shapes    o, dq parts [B,H,T,D] acc; m, l, delta, lse [B,H,T] acc; out, dq strided [B,T,H,D]
 * work      bound by memory: every element is read once and written once
 * launch    a block of 256 threads has consecutive tokens of one head, a row (token, head) is read by up
 *           to 32 lanes with four elements each (two in fp64). Neighbouring blocks have neighbouring
 *           heads, which is how [B,T,H,D] lies in memory; a block's rows are neighbours in [B,H,T,D], and
 *           its lse and delta fill whole 32-byte sectors.
 * numbers   merge takes exponents in fp64: W merges must not add up errors
 * twin      kernels/cpu/attention_ends.c; columns_add: kernels/cpu/attention_columns.c
 */
#include "attention.cuh"

using namespace halo;

namespace {

enum { THREADS = 256 };

/* How rows are dealt to threads. */
struct deal {
  int64_t T, H, D, tiles; /* tiles of `rows` tokens */
  int32_t rows, lanes;    /* rows of a block, lanes of a row */
};

deal deal_of(int64_t T, int64_t H, int64_t D, int64_t each) {
  deal d = {T, H, D, 0, 0, 1};
  while (d.lanes < 32 && d.lanes * each < D) d.lanes *= 2;
  d.rows = THREADS / d.lanes;
  d.tiles = (T + d.rows - 1) / d.rows;
  return d;
}

/* This thread's row: [B,H,T] index `row`; false past the last token. */
struct place {
  int64_t batch, head, token, row;
  int32_t lane;
};

__device__ __forceinline__ bool find_place(place *at, const deal &d, int64_t block) {
  at->head = block % d.H;
  at->token = block / d.H % d.tiles * d.rows + threadIdx.x / d.lanes;
  at->batch = block / d.H / d.tiles;
  at->row = (at->batch * d.H + at->head) * d.T + at->token;
  at->lane = (int32_t)threadIdx.x % d.lanes;
  return at->token < d.T;
}

template <class A> __device__ __forceinline__ A row_sum(A x, int lanes) {
  for (int o = lanes / 2; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

struct strides {
  int64_t at[3];
  explicit strides(const int64_t *s) : at{s[0], s[1], s[2]} {}
  __device__ __forceinline__ int64_t of(const place &p) const {
    return p.batch * at[0] + p.token * at[1] + p.head * at[2];
  }
};

template <class A> __global__ void begin_kernel(A *m, A *l, int64_t n) {
  for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
    m[i] = -INFINITY;
    l[i] = 0;
  }
}

template <class T, int V>
__global__ void finish_kernel(T *out, strides out_stride, acc_of<T> *lse, int64_t lse_batch,
                              int64_t lse_head, const acc_of<T> *o, const acc_of<T> *m,
                              const acc_of<T> *l, deal d) {
  using A = acc_of<T>;
  place p;
  if (!find_place(&p, d, blockIdx.x)) return;
  const A sum = l[p.row], factor = sum == 0 ? 0 : 1 / sum; // a NaN stays one
  T *to = out + out_stride.of(p);
  const A *from = o + p.row * d.D;
  for (int64_t i = p.lane * V; i < d.D; i += d.lanes * V) {
    const pack<A, V> x = *(const pack<A, V> *)(from + i);
    pack<T, V> y;
#pragma unroll
    for (int j = 0; j < V; j++) y.at[j] = store<T>(x.at[j] * factor);
    *(pack<T, V> *)(to + i) = y;
  }
  if (p.lane == 0) {
    lse[p.batch * lse_batch + p.head * lse_head + p.token] =
        sum == 0 ? (A)-INFINITY : (A)(m[p.row] * 0.6931471805599453 + log((double)sum));
  }
}

template <class T, int V>
__global__ void delta_kernel(acc_of<T> *delta, const T *out, strides out_stride, const T *grad,
                             strides grad_stride, deal d) {
  using A = acc_of<T>;
  place p;
  const bool is_row = find_place(&p, d, blockIdx.x);
  A sum = 0;
  if (is_row) {
    const T *x = out + out_stride.of(p), *y = grad + grad_stride.of(p);
    for (int64_t i = p.lane * V; i < d.D; i += d.lanes * V) {
      const pack<T, V> a = *(const pack<T, V> *)(x + i), b = *(const pack<T, V> *)(y + i);
#pragma unroll
      for (int j = 0; j < V; j++) sum += load(a.at[j]) * load(b.at[j]);
    }
  }
  sum = row_sum(sum, d.lanes);
  if (is_row && p.lane == 0) delta[p.row] = sum;
}

template <class T, int V>
__global__ void dq_finish_kernel(T *dq, strides dq_stride, const acc_of<T> *parts, int64_t n_parts,
                                 int64_t part, deal d) {
  using A = acc_of<T>;
  place p;
  if (!find_place(&p, d, blockIdx.x)) return;
  T *to = dq + dq_stride.of(p);
  const A *from = parts + p.row * d.D;
  for (int64_t i = p.lane * V; i < d.D; i += d.lanes * V) {
    pack<A, V> sum = *(const pack<A, V> *)(from + i);
    for (int64_t n = 1; n < n_parts; n++) {
      const pack<A, V> x = *(const pack<A, V> *)(from + n * part + i);
#pragma unroll
      for (int j = 0; j < V; j++) sum.at[j] += x.at[j];
    }
    pack<T, V> y;
#pragma unroll
    for (int j = 0; j < V; j++) y.at[j] = store<T>(sum.at[j]);
    *(pack<T, V> *)(to + i) = y;
  }
}

template <class T, int V>
__global__ void merge_kernel(T *o, acc_of<T> *lse, const T *o_part, const acc_of<T> *lse_part, deal d) {
  using A = acc_of<T>;
  place p;
  const bool is_row = find_place(&p, d, blockIdx.x);
  const double a = is_row ? (double)lse[p.row] : 0, b = is_row ? (double)lse_part[p.row] : -INFINITY;
  __syncwarp(); // all lanes of a row have read lse before one writes it
  if (b == -INFINITY) return; // nothing to add; also when both are empty
  const double top = a > b ? a : b, wa = exp(a - top), wb = exp(b - top), sum = wa + wb;
  const A xa = (A)(wa / sum), xb = (A)(wb / sum);
  const int64_t at = ((p.batch * d.T + p.token) * d.H + p.head) * d.D;
  for (int64_t i = p.lane * V; i < d.D; i += d.lanes * V) {
    pack<T, V> x = *(const pack<T, V> *)(o + at + i);
    const pack<T, V> y = *(const pack<T, V> *)(o_part + at + i);
#pragma unroll
    for (int j = 0; j < V; j++) x.at[j] = store<T>(xa * load(x.at[j]) + xb * load(y.at[j]));
    *(pack<T, V> *)(o + at + i) = x;
  }
  if (p.lane == 0) lse[p.row] = (A)(top + log(sum));
}

/* One warp has one entry; every row occurs once. */
template <class T>
__global__ void columns_add_kernel(T *dk, T *dv, const T *parts, const int64_t *rows, int64_t n,
                                   int64_t n_parts, int64_t D) {
  const int64_t warps = (int64_t)gridDim.x * (THREADS / 32);
  for (int64_t e = blockIdx.x * (int64_t)(THREADS / 32) + threadIdx.x / 32; e < n; e += warps) {
    const int64_t to = rows[e] * D;
    for (int64_t d = threadIdx.x % 32; d < D; d += 32) {
      T k = dk[to + d], v = dv[to + d]; // rounded after each part, as on the CPU
      for (int64_t p = 0; p < n_parts; p++) {
        const T *part = parts + (p * n + e) * 2 * D + d;
        k = store<T>(load(k) + load(part[0]));
        v = store<T>(load(v) + load(part[D]));
      }
      dk[to + d] = k;
      dv[to + d] = v;
    }
  }
}

/* May rows that start at `data` with these strides be read V elements of `bytes` at a time? */
bool is_aligned(const void *data, const int64_t *stride, int n_strides, int64_t V, int64_t bytes) {
  bool good = (uintptr_t)data % (uintptr_t)(V * bytes) == 0;
  for (int i = 0; i < n_strides; i++) good = good && stride[i] % V == 0;
  return good;
}

int64_t blocks_of(const deal &d, int64_t batch) { return batch * d.tiles * d.H; }

template <class T> constexpr int four = sizeof(T) == 8 ? 2 : 4;

halo_status check_grid(const char *what, int64_t blocks) {
  HALO_CHECK(blocks < INT32_MAX, HALO_EUNSUPPORTED, "%s: %lld rows are more than one launch takes", what,
             (long long)blocks);
  return HALO_OK;
}

} // namespace

/* `statement` with V the elements per access, 1 where rows are not aligned; nothing for no rows. */
#define LAUNCH_ROWS(name, T, is_vector, n_batch, n_tokens, n_heads, size, statement)                      \
  {                                                                                                       \
    const bool is_vector_ = (is_vector);                                                                  \
    const deal d = deal_of(n_tokens, n_heads, size, is_vector_ ? four<T> : 1);                            \
    const int64_t blocks = blocks_of(d, n_batch);                                                         \
    if (blocks == 0 || (size) == 0) return HALO_OK;                                                       \
    HALO_TRY(check_grid(name, blocks));                                                                   \
    if (is_vector_) {                                                                                     \
      constexpr int V = four<T>;                                                                          \
      statement;                                                                                          \
    } else {                                                                                              \
      constexpr int V = 1;                                                                                \
      statement;                                                                                          \
    }                                                                                                     \
    HALO_LAUNCHED(name);                                                                                  \
  }

extern "C" halo_status halo_cuda_attention_begin(const halo_attention_queries *a) {
  const int64_t rows = a->n_batch * a->n_heads * a->block * a->n_blocks;
  if (rows == 0) return HALO_OK;
  const cudaStream_t stream = halo__cuda_stream();
  HALO_REAL(a->dtype, T, {
    using A = acc_of<T>;
    HALO_CUDA_TRY(cudaMemsetAsync(a->o, 0, (size_t)(rows * a->head_size) * sizeof(A), stream));
    begin_kernel<A><<<grid(rows, THREADS), THREADS, 0, stream>>>((A *)a->m, (A *)a->l, rows);
  });
  HALO_LAUNCHED("attention_begin");
  return HALO_OK;
}

extern "C" halo_status halo_cuda_attention_finish(void *out, const int64_t *out_stride, void *lse,
                                                  const int64_t *lse_stride,
                                                  const halo_attention_queries *a) {
  const cudaStream_t stream = halo__cuda_stream();
  const int64_t D = a->head_size;
  HALO_REAL(a->dtype, T, {
    using A = acc_of<T>;
    LAUNCH_ROWS("attention_finish", T,
                D % four<T> == 0 && is_aligned(out, out_stride, 3, four<T>, sizeof(T)) &&
                    is_aligned(a->o, nullptr, 0, four<T>, sizeof(A)),
                a->n_batch, a->block * a->n_blocks, a->n_heads, D,
                (finish_kernel<T, V><<<(unsigned)blocks, THREADS, 0, stream>>>(
                    (T *)out, strides(out_stride), (A *)lse, lse_stride[0], lse_stride[1], (const A *)a->o,
                    (const A *)a->m, (const A *)a->l, d)));
  });
  return HALO_OK;
}

extern "C" halo_status halo_cuda_attention_delta(void *delta, const void *out, const int64_t *out_stride,
                                                 const halo_attention_queries *a) {
  const cudaStream_t stream = halo__cuda_stream();
  const int64_t D = a->head_size;
  HALO_REAL(a->dtype, T, {
    LAUNCH_ROWS("attention_delta", T,
                D % four<T> == 0 && is_aligned(out, out_stride, 3, four<T>, sizeof(T)) &&
                    is_aligned(a->grad, a->grad_stride, 3, four<T>, sizeof(T)),
                a->n_batch, a->block * a->n_blocks, a->n_heads, D,
                (delta_kernel<T, V><<<(unsigned)blocks, THREADS, 0, stream>>>(
                    (acc_of<T> *)delta, (const T *)out, strides(out_stride), (const T *)a->grad,
                    strides(a->grad_stride), d)));
  });
  return HALO_OK;
}

extern "C" halo_status halo_cuda_attention_dq_finish(void *dq, const int64_t *dq_stride,
                                                     const halo_attention_queries *a) {
  const cudaStream_t stream = halo__cuda_stream();
  const int64_t D = a->head_size, T_all = a->block * a->n_blocks;
  const int64_t part = a->n_batch * a->n_heads * T_all * D;
  HALO_REAL(a->dtype, T, {
    using A = acc_of<T>;
    LAUNCH_ROWS("attention_dq_finish", T,
                D % four<T> == 0 && is_aligned(dq, dq_stride, 3, four<T>, sizeof(T)) &&
                    is_aligned(a->dq, &part, 1, four<T>, sizeof(A)),
                a->n_batch, T_all, a->n_heads, D,
                (dq_finish_kernel<T, V><<<(unsigned)blocks, THREADS, 0, stream>>>(
                    (T *)dq, strides(dq_stride), (const A *)a->dq, a->n_parts, part, d)));
  });
  return HALO_OK;
}

extern "C" halo_status halo_cuda_attention_merge(halo_dtype t, void *o, void *lse, const void *o_part,
                                                 const void *lse_part, int64_t n_batch, int64_t n_tokens,
                                                 int64_t n_heads, int64_t head_size) {
  const cudaStream_t stream = halo__cuda_stream();
  HALO_REAL(t, T, {
    using A = acc_of<T>;
    LAUNCH_ROWS("attention_merge", T,
                head_size % four<T> == 0 && is_aligned(o, nullptr, 0, four<T>, sizeof(T)) &&
                    is_aligned(o_part, nullptr, 0, four<T>, sizeof(T)),
                n_batch, n_tokens, n_heads, head_size,
                (merge_kernel<T, V><<<(unsigned)blocks, THREADS, 0, stream>>>(
                    (T *)o, (A *)lse, (const T *)o_part, (const A *)lse_part, d)));
  });
  return HALO_OK;
}

/* rows is device memory. */
extern "C" halo_status halo_cuda_attention_columns_add(halo_dtype t, void *dk, void *dv, const void *parts,
                                                       const int64_t *rows, int64_t n, int64_t n_parts,
                                                       int64_t head_size) {
  if (n == 0) return HALO_OK;
  const cudaStream_t stream = halo__cuda_stream();
  HALO_REAL(t, T, {
    columns_add_kernel<T><<<grid(n, THREADS / 32), THREADS, 0, stream>>>((T *)dk, (T *)dv, (const T *)parts,
                                                                          rows, n, n_parts, head_size);
  });
  HALO_LAUNCHED("attention_columns_add");
  return HALO_OK;
}
