/* copy: moving and converting elements.
 *
 * convert   any dtype to any other, with the roundings of the CPU twin: pairs that are not on the fast
 *           list go through fp64; float to bf16 rounds to nearest even, float to integer truncates
 *           toward zero and saturates, NaN becomes 0
 * pack      strided to dense; unpack, dense to strided. Dims that are contiguous with each other are
 *           merged first, then one of three kernels:
 *             dense inner dim     packs of up to 16 bytes, as large as shape, strides and bases allow
 *             transposed          another dim has stride 1: 32 x 32 squares through shared memory
 *             anything            element by element
 * sizes     int64_t; offsets are computed in 32 bits (divider) below 2^31 packs, in 64 bits beyond
 * launch    256 threads, 4 packs each, all loads before the first store
 * twin      kernels/cpu/copy.c
 */
#include <string.h>

#include "vector.cuh"

namespace {

using namespace halo;

constexpr int THREADS = 256, UNROLL = 4;

int64_t element_bytes(halo_dtype t) {
  static const int64_t bytes[HALO_DTYPE_COUNT] = {4, 8, 2, 4, 8, 1};
  return bytes[t];
}

/* ---- conversion ---------------------------------------------------------------------------- */

__host__ __device__ inline int64_t saturate(double v, double lo, double hi, int64_t ilo, int64_t ihi) {
  if (v != v) return 0;
  if (v <= lo) return ilo;
  if (v >= hi) return ihi;
  return (int64_t)v;
}
template <class T> __host__ __device__ inline double to_double(T v) { return (double)v; }
template <> __host__ __device__ inline double to_double<__nv_bfloat16>(__nv_bfloat16 v) {
  return (double)__bfloat162float(v);
}
template <class T> struct from_double {
  __host__ __device__ static T of(double v) { return (T)v; }
};
template <> struct from_double<__nv_bfloat16> {
  __host__ __device__ static __nv_bfloat16 of(double v) { return __float2bfloat16_rn((float)v); }
};
template <> struct from_double<int32_t> {
  __host__ __device__ static int32_t of(double v) {
    return (int32_t)saturate(v, INT32_MIN, INT32_MAX, INT32_MIN, INT32_MAX);
  }
};
template <> struct from_double<int64_t> {
  __host__ __device__ static int64_t of(double v) {
    return saturate(v, -9223372036854775808.0, 9223372036854775808.0, INT64_MIN, INT64_MAX);
  }
};
template <> struct from_double<uint8_t> {
  __host__ __device__ static uint8_t of(double v) { return (uint8_t)saturate(v, 0, 255, 0, 255); }
};

template <class To, class From> __device__ __forceinline__ To cast(From v) {
  constexpr bool is_narrow = sizeof(To) <= 4 && sizeof(From) <= 4; // fp32 holds both sides
  constexpr bool is_float = !std::is_integral<To>::value && !std::is_integral<From>::value;
  if constexpr (is_float && is_narrow) {
    return store<To>(load(v));
  } else if constexpr (std::is_same<To, int64_t>::value && std::is_integral<From>::value) {
    return (int64_t)v;
  } else {
    return from_double<To>::of(to_double(v));
  }
}

template <class To, class From, int N> __device__ __forceinline__ few<To, N> cast_few(const few<From, N> &v) {
  constexpr bool is_real = !std::is_integral<To>::value && !std::is_integral<From>::value;
  constexpr bool is_bf16 = std::is_same<To, __nv_bfloat16>::value, was_bf16 = std::is_same<From, __nv_bfloat16>::value;
  if constexpr (is_real) { // by way of fp32 or fp64, whichever holds both
    acc_of<To> a[N];
#pragma unroll
    for (int k = 0; k < N; k++) a[k] = (acc_of<To>)value(v, k);
    return narrow<To, N>(a);
  } else if constexpr (is_bf16) {
    float a[N];
#pragma unroll
    for (int k = 0; k < N; k++) a[k] = (float)(double)v.at[k];
    return narrow<To, N>(a);
  } else {
    few<To, N> out;
#pragma unroll
    for (int k = 0; k < N; k++) {
      if constexpr (was_bf16) {
        out.at[k] = cast<To, float>(value(v, k));
      } else {
        out.at[k] = cast<To, From>(v.at[k]);
      }
    }
    return out;
  }
}

/* Packs of N: 16 bytes on the wider side. */
template <class To, class From, int N>
__global__ void __launch_bounds__(THREADS) convert_kernel(To *__restrict__ y, const From *__restrict__ x,
                                                          int64_t n) {
  const int64_t packs = n / N, base = (int64_t)blockIdx.x * THREADS * UNROLL + threadIdx.x;
  few<From, N> v[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const int64_t i = base + u * THREADS;
    if (i < packs) v[u] = fetch<From, N>(x + i * N);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const int64_t i = base + u * THREADS;
    if (i >= packs) continue;
    put<To, N>(y + i * N, cast_few<To, From, N>(v[u]));
  }
  const int64_t tail = packs * N + threadIdx.x;
  if (N > 1 && blockIdx.x == 0 && tail < n) y[tail] = cast<To, From>(x[tail]);
}

template <class To, class From> halo_status convert(void *y, const void *x, int64_t n) {
  constexpr int wide = sizeof(To) > sizeof(From) ? sizeof(To) : sizeof(From), N = 16 / wide;
  To *to = (To *)y;
  const From *from = (const From *)x;
  const cudaStream_t stream = halo__cuda_stream();
  if (aligned(N * (int)sizeof(To), {y}) && aligned(N * (int)sizeof(From), {x})) {
    convert_kernel<To, From, N><<<blocks_for(n, N * THREADS * UNROLL), THREADS, 0, stream>>>(to, from, n);
  } else {
    convert_kernel<To, From, 1><<<blocks_for(n, THREADS * UNROLL), THREADS, 0, stream>>>(to, from, n);
  }
  HALO_LAUNCHED("convert");
  return HALO_OK;
}

template <class From> halo_status convert_from(void *y, halo_dtype to, const void *x, int64_t n) {
  switch (to) {
  case HALO_F32: return convert<float, From>(y, x, n);
  case HALO_F64: return convert<double, From>(y, x, n);
  case HALO_BF16: return convert<__nv_bfloat16, From>(y, x, n);
  case HALO_I32: return convert<int32_t, From>(y, x, n);
  case HALO_I64: return convert<int64_t, From>(y, x, n);
  default: return convert<uint8_t, From>(y, x, n);
  }
}

/* ---- fill, axpy, scale --------------------------------------------------------------------- */

/* `head` elements lie before the first multiple of 16 bytes. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    fill_kernel(T *__restrict__ y, int64_t n, int64_t head, T value, uint4 values) {
  constexpr int N = lanes16<T>;
  const int64_t packs = (n - head) / N, base = (int64_t)blockIdx.x * THREADS * UNROLL + threadIdx.x;
  uint4 *body = reinterpret_cast<uint4 *>(y + head);
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    if (base + u * THREADS < packs) body[base + u * THREADS] = values;
  }
  if (blockIdx.x == 0) {
    const int64_t tail = head + packs * N + threadIdx.x;
    if (threadIdx.x < head) y[threadIdx.x] = value;
    if (tail < n) y[tail] = value;
  }
}

template <class T> halo_status fill(void *y, int64_t n, T value) {
  const int64_t off = (int64_t)((uintptr_t)y % 16);
  int64_t head = off == 0 ? 0 : (16 - off) / (int64_t)sizeof(T);
  if (head > n) head = n;
  uint4 values;
  for (size_t i = 0; i < 16; i += sizeof(T)) memcpy((char *)&values + i, &value, sizeof(T));
  const unsigned blocks = blocks_for(n - head + 1, lanes16<T> * THREADS * UNROLL);
  fill_kernel<T><<<blocks, THREADS, 0, halo__cuda_stream()>>>((T *)y, n, head, value, values);
  HALO_LAUNCHED("fill");
  return HALO_OK;
}

/* y = y + a x, or a y when x is NULL. */
template <class T, int N, bool HAS_X>
__global__ void __launch_bounds__(THREADS) axpy_kernel(T *__restrict__ y, const T *__restrict__ x, int64_t n,
                                                       acc_of<T> a) {
  using A = acc_of<T>;
  const int64_t packs = n / N, base = (int64_t)blockIdx.x * THREADS * UNROLL + threadIdx.x;
  few<T, N> old[UNROLL], more[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const int64_t i = base + u * THREADS;
    if (i < packs) old[u] = fetch<T, N>(y + i * N);
    if (HAS_X && i < packs) more[u] = fetch<T, N>(x + i * N);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const int64_t i = base + u * THREADS;
    if (i >= packs) continue;
    A yv[N], xv[N];
    widen(yv, old[u]);
    if (HAS_X) widen(xv, more[u]);
#pragma unroll
    for (int k = 0; k < N; k++) yv[k] = HAS_X ? yv[k] + a * xv[k] : a * yv[k];
    put<T, N>(y + i * N, narrow<T, N>(yv));
  }
  const int64_t tail = packs * N + threadIdx.x;
  if (N > 1 && blockIdx.x == 0 && tail < n) {
    y[tail] = store<T>(HAS_X ? load(y[tail]) + a * load(x[tail]) : a * load(y[tail]));
  }
}

template <class T, bool HAS_X> halo_status axpy(void *y, const void *x, int64_t n, double a) {
  constexpr int N = lanes16<T>;
  T *to = (T *)y;
  const T *from = (const T *)x;
  const cudaStream_t stream = halo__cuda_stream();
  if (aligned(16, {y, x})) {
    axpy_kernel<T, N, HAS_X>
        <<<blocks_for(n, N * THREADS * UNROLL), THREADS, 0, stream>>>(to, from, n, (acc_of<T>)a);
  } else {
    axpy_kernel<T, 1, HAS_X>
        <<<blocks_for(n, THREADS * UNROLL), THREADS, 0, stream>>>(to, from, n, (acc_of<T>)a);
  }
  HALO_LAUNCHED(HAS_X ? "axpy" : "scale");
  return HALO_OK;
}

/* ---- pack and unpack ----------------------------------------------------------------------- */

/* A strided side and its dense image, in packs: dims merged, innermost last. */
struct walk {
  int32_t ndim;
  int64_t total; /* packs */
  int64_t shape[HALO_MAX_DIMS], stride[HALO_MAX_DIMS];
  divider by[HALO_MAX_DIMS]; /* of shape, when total < index_limit */
};

/* Drop dims of size 1 and merge neighbours that are contiguous with each other. */
void merge_dims(walk *w, int32_t ndim, const int64_t *shape, const int64_t *stride) {
  int32_t m = 0;
  w->total = 1;
  for (int32_t i = 0; i < ndim; i++) {
    w->total *= shape[i];
    if (shape[i] == 1) continue;
    if (m > 0 && w->stride[m - 1] == stride[i] * shape[i]) {
      w->shape[m - 1] *= shape[i];
      w->stride[m - 1] = stride[i];
    } else {
      w->shape[m] = shape[i];
      w->stride[m] = stride[i];
      m++;
    }
  }
  if (m == 0) {
    w->shape[0] = w->stride[0] = 1;
    m = 1;
  }
  w->ndim = m;
}

template <bool IS_SMALL> __device__ __forceinline__ int64_t strided_offset(const walk &w, int64_t i) {
  int64_t offset = 0;
  if constexpr (IS_SMALL) {
    uint32_t rest = (uint32_t)i;
    for (int32_t d = w.ndim - 1; d > 0; d--) {
      const uint32_t q = w.by[d].quotient(rest);
      offset += (int64_t)(rest - q * w.by[d].d) * w.stride[d];
      rest = q;
    }
    return offset + (int64_t)rest * w.stride[0];
  } else {
    for (int32_t d = w.ndim - 1; d > 0; d--) {
      const int64_t q = i / w.shape[d];
      offset += (i - q * w.shape[d]) * w.stride[d];
      i = q;
    }
    return offset + i * w.stride[0];
  }
}

template <class V, bool IS_SMALL, bool TO_DENSE>
__global__ void __launch_bounds__(THREADS) pack_kernel(V *__restrict__ dense, V *__restrict__ strided,
                                                       const __grid_constant__ walk w) {
  const int64_t base = (int64_t)blockIdx.x * THREADS * UNROLL + threadIdx.x;
  int64_t at[UNROLL];
  V v[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const int64_t i = base + u * THREADS;
    if (i >= w.total) continue;
    at[u] = strided_offset<IS_SMALL>(w, i);
    v[u] = TO_DENSE ? strided[at[u]] : dense[i];
  }
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const int64_t i = base + u * THREADS;
    if (i >= w.total) continue;
    if (TO_DENSE) {
      dense[i] = v[u];
    } else {
      strided[at[u]] = v[u];
    }
  }
}

template <class V, bool TO_DENSE> halo_status move_packs(void *dense, void *strided, walk *w) {
  const unsigned blocks = blocks_for(w->total, THREADS * UNROLL);
  const cudaStream_t stream = halo__cuda_stream();
  if (w->total < index_limit) {
    for (int32_t d = 0; d < w->ndim; d++) w->by[d] = divider((uint32_t)w->shape[d]);
    pack_kernel<V, true, TO_DENSE><<<blocks, THREADS, 0, stream>>>((V *)dense, (V *)strided, *w);
  } else {
    pack_kernel<V, false, TO_DENSE><<<blocks, THREADS, 0, stream>>>((V *)dense, (V *)strided, *w);
  }
  HALO_LAUNCHED(TO_DENSE ? "pack" : "unpack");
  return HALO_OK;
}

/* Squares of dims q (stride 1 on the strided side) and last (stride 1 on the dense side). */
enum { SQUARE = 32, SQUARE_ROWS = 8 };
struct turn {
  int64_t n_q, n_last, tiles_q, tiles_last;
  int64_t dense_q, strided_last; /* strides of the other dim on either side */
  int32_t n_outer;
  int64_t shape[HALO_MAX_DIMS], stride[HALO_MAX_DIMS], dense_stride[HALO_MAX_DIMS];
};

template <class V, bool TO_DENSE>
__global__ void __launch_bounds__(SQUARE * SQUARE_ROWS)
    turn_kernel(V *__restrict__ dense, V *__restrict__ strided, const __grid_constant__ turn w) {
  __shared__ V square[SQUARE][SQUARE + 1]; // [q][last]
  int64_t rest = blockIdx.x;
  const int64_t q0 = rest % w.tiles_q * SQUARE;
  rest /= w.tiles_q;
  const int64_t last0 = rest % w.tiles_last * SQUARE;
  rest /= w.tiles_last;
  for (int32_t d = w.n_outer - 1; d >= 0; d--) {
    const int64_t i = rest % w.shape[d];
    dense += i * w.dense_stride[d];
    strided += i * w.stride[d];
    rest /= w.shape[d];
  }
  const int lane = threadIdx.x % SQUARE, row = threadIdx.x / SQUARE;
#pragma unroll
  for (int k = row; k < SQUARE; k += SQUARE_ROWS) {
    const int64_t q = q0 + (TO_DENSE ? lane : k), last = last0 + (TO_DENSE ? k : lane);
    if (q >= w.n_q || last >= w.n_last) continue;
    if (TO_DENSE) {
      square[lane][k] = strided[q + last * w.strided_last];
    } else {
      square[k][lane] = dense[q * w.dense_q + last];
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = row; k < SQUARE; k += SQUARE_ROWS) {
    const int64_t q = q0 + (TO_DENSE ? k : lane), last = last0 + (TO_DENSE ? lane : k);
    if (q >= w.n_q || last >= w.n_last) continue;
    if (TO_DENSE) {
      dense[q * w.dense_q + last] = square[k][lane];
    } else {
      strided[q + last * w.strided_last] = square[lane][k];
    }
  }
}

template <class V, bool TO_DENSE>
halo_status move_turned(void *dense, void *strided, const walk *w, int32_t q) {
  const int32_t last = w->ndim - 1;
  turn t = {};
  int64_t step = 1, blocks = 1, dense_stride[HALO_MAX_DIMS];
  for (int32_t d = last; d >= 0; d--) {
    dense_stride[d] = step;
    step *= w->shape[d];
  }
  for (int32_t d = 0; d < last; d++) {
    if (d == q) continue;
    t.shape[t.n_outer] = w->shape[d];
    t.stride[t.n_outer] = w->stride[d];
    t.dense_stride[t.n_outer++] = dense_stride[d];
    blocks *= w->shape[d];
  }
  t.n_q = w->shape[q];
  t.n_last = w->shape[last];
  t.dense_q = dense_stride[q];
  t.strided_last = w->stride[last];
  t.tiles_q = (t.n_q + SQUARE - 1) / SQUARE;
  t.tiles_last = (t.n_last + SQUARE - 1) / SQUARE;
  blocks *= t.tiles_q * t.tiles_last;
  turn_kernel<V, TO_DENSE><<<(unsigned)blocks, SQUARE * SQUARE_ROWS, 0, halo__cuda_stream()>>>(
      (V *)dense, (V *)strided, t);
  HALO_LAUNCHED(TO_DENSE ? "pack, transposed" : "unpack, transposed");
  return HALO_OK;
}

/* The dim to transpose with the last one, or -1. */
int32_t turned_dim(const walk *w) {
  const int32_t last = w->ndim - 1;
  if (w->stride[last] == 1 || w->shape[last] < SQUARE / 2) return -1;
  for (int32_t q = 0; q < last; q++) {
    if (w->stride[q] == 1 && w->shape[q] >= SQUARE / 2 && w->total / (SQUARE * SQUARE / 4) < index_limit) {
      return q;
    }
  }
  return -1;
}

/* Elements become packs of up to 16 bytes where the inner dim is dense; returns the pack's bytes. */
int64_t widen_packs(walk *w, int64_t bytes, const void *dense, const void *strided) {
  const int32_t last = w->ndim - 1;
  if (w->stride[last] != 1) return bytes;
  int64_t wide = 16;
  for (; wide > bytes; wide /= 2) {
    bool fits = aligned(wide, {dense, strided}) && w->shape[last] * bytes % wide == 0;
    for (int32_t d = 0; d < last; d++) fits = fits && w->stride[d] * bytes % wide == 0;
    if (fits) break;
  }
  const int64_t group = wide / bytes;
  w->shape[last] /= group;
  w->total /= group;
  for (int32_t d = 0; d < last; d++) w->stride[d] /= group;
  return wide;
}

template <bool TO_DENSE>
halo_status move(void *dense, void *strided, int64_t bytes, int32_t ndim, const int64_t *shape,
                 const int64_t *stride) {
  walk w = {};
  merge_dims(&w, ndim, shape, stride);
  if (w.total == 0) return HALO_OK;
  if (w.ndim == 1 && w.stride[0] == 1) {
    return TO_DENSE ? halo_cuda_copy(dense, strided, w.total * bytes)
                    : halo_cuda_copy(strided, dense, w.total * bytes);
  }
  const int32_t q = turned_dim(&w);
  if (q >= 0) {
    switch (bytes) {
    case 1: return move_turned<uint8_t, TO_DENSE>(dense, strided, &w, q);
    case 2: return move_turned<uint16_t, TO_DENSE>(dense, strided, &w, q);
    case 4: return move_turned<uint32_t, TO_DENSE>(dense, strided, &w, q);
    default: return move_turned<uint2, TO_DENSE>(dense, strided, &w, q);
    }
  }
  switch (widen_packs(&w, bytes, dense, strided)) {
  case 1: return move_packs<uint8_t, TO_DENSE>(dense, strided, &w);
  case 2: return move_packs<uint16_t, TO_DENSE>(dense, strided, &w);
  case 4: return move_packs<uint32_t, TO_DENSE>(dense, strided, &w);
  case 8: return move_packs<uint2, TO_DENSE>(dense, strided, &w);
  default: return move_packs<uint4, TO_DENSE>(dense, strided, &w);
  }
}

} // namespace

halo_status halo_cuda_convert(void *y, halo_dtype to, const void *x, halo_dtype from, int64_t n) {
  if (n <= 0) return HALO_OK;
  if (to == from) return halo_cuda_copy(y, x, n * element_bytes(to));
  switch (from) {
  case HALO_F32: return convert_from<float>(y, to, x, n);
  case HALO_F64: return convert_from<double>(y, to, x, n);
  case HALO_BF16: return convert_from<__nv_bfloat16>(y, to, x, n);
  case HALO_I32: return convert_from<int32_t>(y, to, x, n);
  case HALO_I64: return convert_from<int64_t>(y, to, x, n);
  default: return convert_from<uint8_t>(y, to, x, n);
  }
}

halo_status halo_cuda_fill(halo_dtype t, void *y, int64_t n, double value) {
  if (n <= 0) return HALO_OK;
  if (value == 0.0) return halo_cuda_zero(y, n * element_bytes(t));
  switch (t) {
  case HALO_F32: return fill(y, n, from_double<float>::of(value));
  case HALO_F64: return fill(y, n, value);
  case HALO_BF16: return fill(y, n, from_double<__nv_bfloat16>::of(value));
  case HALO_I32: return fill(y, n, from_double<int32_t>::of(value));
  case HALO_I64: return fill(y, n, from_double<int64_t>::of(value));
  default: return fill(y, n, from_double<uint8_t>::of(value));
  }
}

halo_status halo_cuda_pack(void *y, const void *x, int64_t bytes, int32_t ndim, const int64_t *shape,
                           const int64_t *stride) {
  return move<true>(y, (void *)x, bytes, ndim, shape, stride);
}

halo_status halo_cuda_unpack(void *y, const void *x, int64_t bytes, int32_t ndim, const int64_t *shape,
                             const int64_t *stride) {
  return move<false>((void *)x, y, bytes, ndim, shape, stride);
}

halo_status halo_cuda_axpy(halo_dtype t, void *y, const void *x, int64_t n, double scale) {
  if (n <= 0) return HALO_OK;
  HALO_REAL(t, T, return (axpy<T, true>(y, x, n, scale)));
  return HALO_OK;
}

halo_status halo_cuda_scale(halo_dtype t, void *y, int64_t n, double scale) {
  if (n <= 0) return HALO_OK;
  HALO_REAL(t, T, return (axpy<T, false>(y, nullptr, n, scale)));
  return HALO_OK;
}
