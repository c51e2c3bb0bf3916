/* elementwise: y_i = f(x_i), f(a_i, b_i), and their gradients, by the formulas of elementwise.def.
 *
 * shapes    unary: n contiguous elements. binary, compare, where: y contiguous of `shape`, inputs
 *           strided (0 repeats), innermost dim last
 * numbers   fp32 for f32 and bf16, fp64 for f64, int64 for integers (which wrap on the way back)
 * gradients written (=), of the full shape: core sums over repeated dims
 * launch    contiguous operands: a thread has UNROLL accesses of 16 bytes of each input in flight before
 *           it computes, a block covers THREADS of them; whatever is not aligned, and the last block,
 *           goes element by element. Strided operands: strided.cuh. Every f32 and bf16 formula is a
 *           kernel of its own; f64 formulas are one function that is called and integer formulas a
 *           switch per element, since they are seldom run and 200 kernels more would be built
 * twin      kernels/cpu/elementwise.c
 */
#include "cuda.cuh"
#include "elementwise.h"
#include "numbers.cuh"
#include "strided.cuh"

namespace {

using namespace halo;

enum { THREADS = 256 };

/* ---- formulas as types: in[] to out[] in arithmetic --------------------------------------------- */

#define HALO_UNARY(name, dtypes, saves, formula, gradient)                                                   \
  template <class acc> struct unary_##name {                                                                 \
    acc a, b;                                                                                                \
    __device__ __forceinline__ void operator()(const acc (&in)[1], acc (&out)[1]) const {                    \
      const acc x = in[0];                                                                                   \
      out[0] = (acc)(formula);                                                                               \
    }                                                                                                        \
  };
#define HALO_BINARY(name, dtypes, formula, da, db)                                                           \
  template <class acc> struct binary_##name {                                                                \
    __device__ __forceinline__ void operator()(const acc (&in)[2], acc (&out)[1]) const {                    \
      const acc a = in[0], b = in[1];                                                                        \
      out[0] = (acc)(formula);                                                                               \
    }                                                                                                        \
  };                                                                                                         \
  template <class acc> struct gradient_of_##name {                                                           \
    __device__ __forceinline__ void operator()(const acc (&in)[3], acc (&out)[2]) const {                    \
      const acc dy = in[0], a = in[1], b = in[2];                                                            \
      (void)a, (void)b;                                                                                      \
      out[0] = (acc)(da);                                                                                    \
      out[1] = (acc)(db);                                                                                    \
    }                                                                                                        \
  };
#include "elementwise.def"

/* in[0] is dy, in[1] x or y, whichever was saved. */
enum { SAVED_NOTHING = 1, SAVED_INPUT = 2, SAVED_OUTPUT = 2 };
#define HALO_UNARY(name, dtypes, saves, formula, gradient)                                                   \
  template <class acc> struct slope_of_##name {                                                              \
    acc a, b;                                                                                                \
    __device__ __forceinline__ void operator()(const acc (&in)[SAVED_##saves], acc (&out)[1]) const {        \
      const acc dy = in[0], x = in[SAVED_##saves - 1], y = x;                                                \
      (void)dy, (void)x, (void)y;                                                                            \
      out[0] = (acc)(gradient);                                                                              \
    }                                                                                                        \
  };
#include "elementwise.def"

template <class acc> struct compare_any {
  int32_t kind;
  __device__ __forceinline__ void operator()(const acc (&in)[2], wrapping (&out)[1]) const {
    const acc a = in[0], b = in[1];
    bool y = false;
    switch (kind) {
#define HALO_COMPARE(name, formula)                                                                          \
  case HALO_COMPARE_##name:                                                                                  \
    y = formula;                                                                                             \
    break;
#include "elementwise.def"
    default: break;
    }
    out[0] = wrapping((int64_t)y);
  }
};

/* The same by number, for f64 and integers. */
#define ALLOWED_ANY true
#define ALLOWED_FLOAT IS_REAL
template <class acc, bool IS_REAL>
__device__ __forceinline__ acc unary_value(int32_t kind, acc x, acc a, acc b) {
  const acc in[1] = {x};
  acc out[1] = {x};
  switch (kind) {
#define HALO_UNARY(name, dtypes, saves, formula, gradient)                                                   \
  case HALO_UNARY_##name:                                                                                    \
    if constexpr (ALLOWED_##dtypes) unary_##name<acc>{a, b}(in, out);                                        \
    break;
#include "elementwise.def"
  default: break;
  }
  return out[0];
}
template <class acc, bool IS_REAL> __device__ __forceinline__ acc binary_value(int32_t kind, acc a, acc b) {
  const acc in[2] = {a, b};
  acc out[1] = {a};
  switch (kind) {
#define HALO_BINARY(name, dtypes, formula, da, db)                                                           \
  case HALO_BINARY_##name:                                                                                   \
    if constexpr (ALLOWED_##dtypes) binary_##name<acc>{}(in, out);                                           \
    break;
#include "elementwise.def"
  default: break;
  }
  return out[0];
}
__device__ __noinline__ double unary_f64(int32_t kind, double x, double a, double b) {
  return unary_value<double, true>(kind, x, a, b);
}
__device__ __noinline__ double binary_f64(int32_t kind, double a, double b) {
  return binary_value<double, true>(kind, a, b);
}
__device__ __noinline__ double slope_f64(int32_t kind, double dy, double saved, double a, double b) {
  double out[1] = {0};
  switch (kind) {
#define HALO_UNARY(name, dtypes, saves, formula, gradient)                                                   \
  case HALO_UNARY_##name: {                                                                                  \
    const double in[2] = {dy, saved};                                                                        \
    slope_of_##name<double>{a, b}((const double(&)[SAVED_##saves])in, out);                                  \
    break;                                                                                                   \
  }
#include "elementwise.def"
  default: break;
  }
  return out[0];
}
__device__ __noinline__ double2 gradient_f64(int32_t kind, double dy, double a, double b) {
  const double in[3] = {dy, a, b};
  double out[2] = {0, 0};
  switch (kind) {
#define HALO_BINARY(name, dtypes, formula, da, db)                                                           \
  case HALO_BINARY_##name:                                                                                   \
    gradient_of_##name<double>{}(in, out);                                                                   \
    break;
#include "elementwise.def"
  default: break;
  }
  return make_double2(out[0], out[1]);
}

template <class acc> struct unary_any {
  int32_t kind;
  acc a, b;
  __device__ __forceinline__ void operator()(const acc (&in)[1], acc (&out)[1]) const {
    if constexpr (sizeof(acc) == 8 && number<acc>::is_real) {
      out[0] = unary_f64(kind, in[0], a, b);
    } else {
      out[0] = unary_value<acc, false>(kind, in[0], a, b);
    }
  }
};
template <> struct unary_any<wrapping> {
  int32_t kind;
  wrapping a, b;
  __device__ __forceinline__ void operator()(const wrapping (&in)[1], wrapping (&out)[1]) const {
    out[0] = unary_value<wrapping, false>(kind, in[0], a, b);
  }
};
template <class acc> struct binary_any {
  int32_t kind;
  __device__ __forceinline__ void operator()(const acc (&in)[2], acc (&out)[1]) const {
    out[0] = binary_f64(kind, in[0], in[1]);
  }
};
template <> struct binary_any<wrapping> {
  int32_t kind;
  __device__ __forceinline__ void operator()(const wrapping (&in)[2], wrapping (&out)[1]) const {
    out[0] = binary_value<wrapping, false>(kind, in[0], in[1]);
  }
};
struct slope_any {
  int32_t kind;
  double a, b;
  __device__ __forceinline__ void operator()(const double (&in)[2], double (&out)[1]) const {
    out[0] = slope_f64(kind, in[0], in[1], a, b);
  }
};
struct gradient_any {
  int32_t kind;
  __device__ __forceinline__ void operator()(const double (&in)[3], double (&out)[2]) const {
    const double2 d = gradient_f64(kind, in[0], in[1], in[2]);
    out[0] = d.x;
    out[1] = d.y;
  }
};

/* ---- kernels -------------------------------------------------------------------------------------- */

template <int N> struct sources { const void *at[N]; };
template <int N> struct targets { void *at[N]; /* NULL: not wanted */ };

/* n contiguous elements of NIN inputs of T and NOUT outputs of Y. */
template <class Y, class T, int NIN, int NOUT, int U, class F>
__global__ void __launch_bounds__(THREADS)
    flat_kernel(targets<NOUT> y, sources<NIN> x, int64_t n, bool is_aligned, F f) {
  constexpr int V = lanes16<T>;
  const int64_t first = (int64_t)blockIdx.x * (THREADS * V * U);
  number_of<T> in[NIN];
  number_of<Y> out[NOUT];
  if (is_aligned && first + THREADS * V * U <= n) {
    const int64_t i = first + threadIdx.x * V;
    pack<T, V> run[U][NIN];
#pragma unroll
    for (int u = 0; u < U; u++) {
#pragma unroll
      for (int k = 0; k < NIN; k++) {
        run[u][k] = *(const pack<T, V> *)((const T *)x.at[k] + i + u * (THREADS * V));
      }
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      pack<Y, V> result[NOUT];
#pragma unroll
      for (int e = 0; e < V; e++) {
#pragma unroll
        for (int k = 0; k < NIN; k++) in[k] = number<T>::get(run[u][k].at[e]);
        f(in, out);
#pragma unroll
        for (int k = 0; k < NOUT; k++) result[k].at[e] = number<Y>::put(out[k]);
      }
#pragma unroll
      for (int k = 0; k < NOUT; k++) {
        if (NOUT > 1 && y.at[k] == nullptr) continue;
        *(pack<Y, V> *)((Y *)y.at[k] + i + u * (THREADS * V)) = result[k];
      }
    }
  } else {
    const int64_t end = first + THREADS * V * U < n ? first + THREADS * V * U : n;
    for (int64_t i = first + threadIdx.x; i < end; i += THREADS) {
#pragma unroll
      for (int k = 0; k < NIN; k++) in[k] = number<T>::get(((const T *)x.at[k])[i]);
      f(in, out);
#pragma unroll
      for (int k = 0; k < NOUT; k++) {
        if (NOUT == 1 || y.at[k] != nullptr) ((Y *)y.at[k])[i] = number<Y>::put(out[k]);
      }
    }
  }
}

/* Strided inputs; outputs contiguous. */
template <class Y, class T, int NIN, int NOUT, class F>
__global__ void __launch_bounds__(THREADS)
    strided_kernel(targets<NOUT> y, sources<NIN> x, const __grid_constant__ walk<NIN> w, bool is_aligned,
                   F f) {
  constexpr int V = lanes16<T>;
  const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
  if (i >= w.n) return;
  int64_t offset[NIN];
  const int64_t inner = locate(w, i, offset);
  T run[NIN][V];
#pragma unroll
  for (int k = 0; k < NIN; k++) read_elements<NIN, V>(run[k], (const T *)x.at[k], w, k, i, offset[k], inner);
  pack<Y, V> result[NOUT];
#pragma unroll
  for (int e = 0; e < V; e++) {
    number_of<T> in[NIN];
    number_of<Y> out[NOUT];
#pragma unroll
    for (int k = 0; k < NIN; k++) in[k] = number<T>::get(run[k][e]);
    f(in, out);
#pragma unroll
    for (int k = 0; k < NOUT; k++) result[k].at[e] = number<Y>::put(out[k]);
  }
#pragma unroll
  for (int k = 0; k < NOUT; k++) {
    Y *to = (Y *)y.at[k];
    if (NOUT > 1 && to == nullptr) continue;
    if (is_aligned && i + V <= w.n) {
      *(pack<Y, V> *)(to + i) = result[k];
    } else {
#pragma unroll
      for (int e = 0; e < V; e++) {
        if (i + e < w.n) to[i + e] = result[k].at[e];
      }
    }
  }
}

/* ---- launches ------------------------------------------------------------------------------------- */

template <class Y, class T, int NIN, int NOUT, class F>
halo_status run_flat(const char *name, targets<NOUT> y, sources<NIN> x, int64_t n, F f) {
  constexpr int V = lanes16<T>, U = NIN > 1 ? 1 : 2;
  if (n <= 0) return HALO_OK;
  bool is_aligned = true;
  for (int k = 0; k < NIN; k++) is_aligned = is_aligned && is_multiple(x.at[k], 16);
  for (int k = 0; k < NOUT; k++) is_aligned = is_aligned && is_multiple(y.at[k], sizeof(Y) * V);
  unsigned blocks = 0;
  HALO_TRY(blocks_of(&blocks, n, THREADS * V * U));
  flat_kernel<Y, T, NIN, NOUT, U><<<blocks, THREADS, 0, halo__cuda_stream()>>>(y, x, n, is_aligned, f);
  HALO_LAUNCHED(name);
  return HALO_OK;
}

template <class Y, class T, int NIN, int NOUT, class F>
halo_status run_strided(const char *name, targets<NOUT> y, sources<NIN> x, int32_t ndim, const int64_t *shape,
                        const int64_t *const (&stride)[NIN], F f) {
  constexpr int V = lanes16<T>;
  int64_t bytes[NIN];
  for (int k = 0; k < NIN; k++) bytes[k] = sizeof(T);
  const walk<NIN> w = make_walk<NIN>(ndim, shape, stride, x.at, bytes, V);
  if (w.n <= 0) return HALO_OK;
  bool is_flat = w.ndim == 1, is_aligned = true;
  for (int k = 0; k < NIN; k++) is_flat = is_flat && (w.stride[k][0] == 1 || w.row == 1);
  if (is_flat) return run_flat<Y, T>(name, y, x, w.n, f);
  for (int k = 0; k < NOUT; k++) is_aligned = is_aligned && is_multiple(y.at[k], sizeof(Y) * V);
  unsigned blocks = 0;
  HALO_TRY(blocks_of(&blocks, w.n, THREADS * V));
  strided_kernel<Y, T, NIN, NOUT><<<blocks, THREADS, 0, halo__cuda_stream()>>>(y, x, w, is_aligned, f);
  HALO_LAUNCHED(name);
  return HALO_OK;
}

/* A constant as an integer: infinite bounds of clamp become the ends of int64. */
int64_t integer_constant(double v) {
  if (v >= 9223372036854775807.0) return INT64_MAX;
  if (v <= -9223372036854775808.0) return INT64_MIN;
  return v == v ? (int64_t)v : 0;
}

/* Formulas that only reals have. */
bool is_for_reals(int32_t kind, bool is_unary) {
  enum { ANY, FLOAT };
  static const int32_t unary[] = {
#define HALO_UNARY(name, dtypes, saves, formula, gradient) dtypes,
#include "elementwise.def"
  };
  static const int32_t binary[] = {
#define HALO_BINARY(name, dtypes, formula, da, db) dtypes,
#include "elementwise.def"
  };
  return (is_unary ? unary : binary)[kind] == FLOAT;
}

template <class T> halo_status unary(int32_t kind, void *y, const void *x, int64_t n, double a, double b) {
  using acc = number_of<T>;
  const targets<1> to = {{y}};
  const sources<1> from = {{x}};
  if constexpr (!number<T>::is_real) {
    HALO_CHECK(!is_for_reals(kind, true), HALO_EARG, "unary: formula %d needs a floating dtype", (int)kind);
    return run_flat<T, T>("unary", to, from, n,
                          unary_any<acc>{kind, integer_constant(a), integer_constant(b)});
  } else if constexpr (sizeof(T) == 8) {
    return run_flat<T, T>("unary", to, from, n, unary_any<acc>{kind, a, b});
  } else {
    switch (kind) {
#define HALO_UNARY(name, dtypes, saves, formula, gradient)                                                   \
  case HALO_UNARY_##name:                                                                                    \
    return run_flat<T, T>("unary " #name, to, from, n, unary_##name<acc>{(acc)a, (acc)b});
#include "elementwise.def"
    default: return halo__error(HALO_EARG, "unary: no formula %d", (int)kind);
    }
  }
}

template <class T>
halo_status unary_bwd(int32_t kind, void *dx, const void *dy, const void *saved, int64_t n, double a,
                      double b) {
  using acc = number_of<T>;
  const targets<1> to = {{dx}};
  if constexpr (sizeof(T) == 8) {
    const sources<2> from = {{dy, saved != nullptr ? saved : dy}};
    return run_flat<T, T>("unary_bwd", to, from, n, slope_any{kind, a, b});
  } else {
    switch (kind) {
#define HALO_UNARY(name, dtypes, saves, formula, gradient)                                                   \
  case HALO_UNARY_##name: {                                                                                  \
    sources<SAVED_##saves> from = {{dy}};                                                                    \
    if (SAVED_##saves == 2) from.at[SAVED_##saves - 1] = saved;                                              \
    return run_flat<T, T>("unary_bwd " #name, to, from, n, slope_of_##name<acc>{(acc)a, (acc)b});            \
  }
#include "elementwise.def"
    default: return halo__error(HALO_EARG, "unary_bwd: no formula %d", (int)kind);
    }
  }
}

template <class T>
halo_status binary(int32_t kind, void *y, const void *a, const void *b, int32_t ndim, const int64_t *shape,
                   const int64_t *const (&stride)[2]) {
  using acc = number_of<T>;
  const targets<1> to = {{y}};
  const sources<2> from = {{a, b}};
  if constexpr (!number<T>::is_real) {
    HALO_CHECK(!is_for_reals(kind, false), HALO_EARG, "binary: formula %d needs a floating dtype", (int)kind);
    return run_strided<T, T>("binary", to, from, ndim, shape, stride, binary_any<acc>{kind});
  } else if constexpr (sizeof(T) == 8) {
    return run_strided<T, T>("binary", to, from, ndim, shape, stride, binary_any<acc>{kind});
  } else {
    switch (kind) {
#define HALO_BINARY(name, dtypes, formula, da, db)                                                           \
  case HALO_BINARY_##name:                                                                                   \
    return run_strided<T, T>("binary " #name, to, from, ndim, shape, stride, binary_##name<acc>{});
#include "elementwise.def"
    default: return halo__error(HALO_EARG, "binary: no formula %d", (int)kind);
    }
  }
}

template <class T>
halo_status binary_bwd(int32_t kind, void *da, void *db, const void *dy, const void *a, const void *b,
                       int32_t ndim, const int64_t *shape, const int64_t *const (&stride)[3]) {
  using acc = number_of<T>;
  const targets<2> to = {{da, db}};
  const sources<3> from = {{dy, a, b}};
  if constexpr (sizeof(T) == 8) {
    return run_strided<T, T>("binary_bwd", to, from, ndim, shape, stride, gradient_any{kind});
  } else {
    switch (kind) {
#define HALO_BINARY(name, dtypes, formula, ga, gb)                                                           \
  case HALO_BINARY_##name:                                                                                   \
    return run_strided<T, T>("binary_bwd " #name, to, from, ndim, shape, stride, gradient_of_##name<acc>{});
#include "elementwise.def"
    default: return halo__error(HALO_EARG, "binary_bwd: no formula %d", (int)kind);
    }
  }
}

/* y = c ? a : b. */
template <class T, int V>
__global__ void __launch_bounds__(THREADS) where_kernel(T *y, const uint8_t *c, const T *a, const T *b,
                                                        const __grid_constant__ walk<3> w, bool is_aligned) {
  const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
  if (i >= w.n) return;
  int64_t offset[3];
  const int64_t inner = locate(w, i, offset);
  uint8_t pick[V];
  T from_a[V], from_b[V];
  read_elements<3, V>(pick, c, w, 0, i, offset[0], inner);
  read_elements<3, V>(from_a, a, w, 1, i, offset[1], inner);
  read_elements<3, V>(from_b, b, w, 2, i, offset[2], inner);
  pack<T, V> result;
#pragma unroll
  for (int e = 0; e < V; e++) result.at[e] = pick[e] ? from_a[e] : from_b[e];
  if (is_aligned && i + V <= w.n) {
    *(pack<T, V> *)(y + i) = result;
  } else {
#pragma unroll
    for (int e = 0; e < V; e++) {
      if (i + e < w.n) y[i + e] = result.at[e];
    }
  }
}

template <class T>
halo_status where(void *y, const uint8_t *c, const void *a, const void *b, int32_t ndim, const int64_t *shape,
                  const int64_t *const (&stride)[3]) {
  constexpr int V = lanes16<T>;
  const void *const from[3] = {c, a, b};
  const int64_t bytes[3] = {1, sizeof(T), sizeof(T)};
  const walk<3> w = make_walk<3>(ndim, shape, stride, from, bytes, V);
  if (w.n <= 0) return HALO_OK;
  unsigned blocks = 0;
  HALO_TRY(blocks_of(&blocks, w.n, THREADS * V));
  where_kernel<T, V><<<blocks, THREADS, 0, halo__cuda_stream()>>>((T *)y, c, (const T *)a, (const T *)b, w,
                                                                  is_multiple(y, 16));
  HALO_LAUNCHED("where");
  return HALO_OK;
}

/* Strides of a contiguous operand. */
void dense_strides(int32_t ndim, const int64_t *shape, int64_t *stride) {
  int64_t step = 1;
  for (int32_t d = ndim - 1; d >= 0; d--) {
    stride[d] = step;
    step *= shape[d];
  }
}

} // namespace

halo_status halo_cuda_unary(halo_dtype t, int32_t kind, void *y, const void *x, int64_t n, double a,
                            double b) {
  HALO_ANY(t, T, return unary<T>(kind, y, x, n, a, b));
  return HALO_OK;
}

halo_status halo_cuda_unary_bwd(halo_dtype t, int32_t kind, void *dx, const void *dy, const void *saved,
                                int64_t n, double a, double b) {
  HALO_REAL(t, T, return unary_bwd<T>(kind, dx, dy, saved, n, a, b));
  return HALO_OK;
}

halo_status halo_cuda_binary(halo_dtype t, int32_t kind, void *y, const void *a, const void *b, int32_t ndim,
                             const int64_t *shape, const int64_t *stride_a, const int64_t *stride_b) {
  const int64_t *const stride[2] = {stride_a, stride_b};
  HALO_ANY(t, T, return binary<T>(kind, y, a, b, ndim, shape, stride));
  return HALO_OK;
}

halo_status halo_cuda_binary_bwd(halo_dtype t, int32_t kind, void *da, void *db, const void *dy,
                                 const void *a, const void *b, int32_t ndim, const int64_t *shape,
                                 const int64_t *stride_a, const int64_t *stride_b) {
  int64_t dense[HALO_MAX_DIMS];
  dense_strides(ndim, shape, dense);
  const int64_t *const stride[3] = {dense, stride_a, stride_b};
  HALO_REAL(t, T, return binary_bwd<T>(kind, da, db, dy, a, b, ndim, shape, stride));
  return HALO_OK;
}

halo_status halo_cuda_compare(halo_dtype t, int32_t kind, uint8_t *y, const void *a, const void *b,
                              int32_t ndim, const int64_t *shape, const int64_t *stride_a,
                              const int64_t *stride_b) {
  const int64_t *const stride[2] = {stride_a, stride_b};
  const targets<1> to = {{y}};
  const sources<2> from = {{a, b}};
  HALO_ANY(t, T,
           return (run_strided<uint8_t, T>("compare", to, from, ndim, shape, stride,
                                           compare_any<number_of<T>>{kind})));
  return HALO_OK;
}

halo_status halo_cuda_where(int64_t bytes, void *y, const uint8_t *c, const void *a, const void *b,
                            int32_t ndim, const int64_t *shape, const int64_t *stride_c,
                            const int64_t *stride_a, const int64_t *stride_b) {
  const int64_t *const stride[3] = {stride_c, stride_a, stride_b};
  HALO_BITS(bytes, T, return where<T>(y, c, a, b, ndim, shape, stride));
  return HALO_OK;
}
