/* numbers.cuh: storage and arithmetic of every dtype for the ordinary ops, and the functions in
 * capitals of elementwise.def.
 *
 *   f32, bf16   arithmetic in float        i32, i64, u8   in `wrapping`, an int64 that wraps
 *   f64         in double
 *
 * fp32 functions are CUDA's own, within 2 ulp (CUDA C++ Programming Guide, "Mathematical functions"),
 * but for SIGMOID, whose division is the hardware's reciprocal, within 1 ulp; sums of it and of expf
 * stay below 4 ulp.
 */
#ifndef HALO_CUDA_NUMBERS_CUH
#define HALO_CUDA_NUMBERS_CUH

#include <math_constants.h>

#include "cuda.cuh"

namespace halo {

/* Integers wrap, as users of i64 ids expect; signed overflow would be undefined. */
struct wrapping {
  int64_t v;
  wrapping() = default;
  __host__ __device__ constexpr wrapping(int64_t x) : v(x) {}
};
#define HALO_WRAPPING(op)                                                                                    \
  __device__ __forceinline__ wrapping operator op(wrapping a, wrapping b) {                                  \
    return wrapping((int64_t)((uint64_t)a.v op(uint64_t) b.v));                                              \
  }
HALO_WRAPPING(+)
HALO_WRAPPING(-)
HALO_WRAPPING(*)
#undef HALO_WRAPPING
#define HALO_WRAPPING(op)                                                                                    \
  __device__ __forceinline__ bool operator op(wrapping a, wrapping b) { return a.v op b.v; }
HALO_WRAPPING(<)
HALO_WRAPPING(<=)
HALO_WRAPPING(>)
HALO_WRAPPING(>=)
HALO_WRAPPING(==)
HALO_WRAPPING(!=)
#undef HALO_WRAPPING
__device__ __forceinline__ wrapping operator-(wrapping a) { return wrapping((int64_t)(0 - (uint64_t)a.v)); }

/* How an element of storage T becomes arithmetic and back. */
template <class T> struct number {
  using acc = acc_of<T>;
  static constexpr bool is_real = true;
  static __device__ __forceinline__ acc get(T x) { return load(x); }
  static __device__ __forceinline__ T put(acc x) { return store<T>(x); }
};
template <class T> struct integer_number {
  using acc = wrapping;
  static constexpr bool is_real = false;
  static __device__ __forceinline__ acc get(T x) { return wrapping((int64_t)x); }
  static __device__ __forceinline__ T put(acc x) { return (T)x.v; }
};
template <> struct number<int32_t> : integer_number<int32_t> {};
template <> struct number<int64_t> : integer_number<int64_t> {};
template <> struct number<uint8_t> : integer_number<uint8_t> {};
template <class T> using number_of = typename number<T>::acc;

template <class A> __device__ __forceinline__ bool is_nan(A x) { return x != x; }
template <class A> struct limits;
template <> struct limits<float> {
  static __device__ __forceinline__ float infinity() { return CUDART_INF_F; }
  static __device__ __forceinline__ float nan() { return CUDART_NAN_F; }
};
template <> struct limits<double> {
  static __device__ __forceinline__ double infinity() { return CUDART_INF; }
  static __device__ __forceinline__ double nan() { return CUDART_NAN; }
};

#define HALO_MATH(NAME, single, twice)                                                                       \
  __device__ __forceinline__ float NAME(float x) { return single(x); }                                       \
  __device__ __forceinline__ double NAME(double x) { return twice(x); }
HALO_MATH(EXP, expf, exp)
HALO_MATH(LOG, logf, log)
HALO_MATH(SQRT, sqrtf, sqrt)
HALO_MATH(TANH, tanhf, tanh)
HALO_MATH(ERF, erff, erf)
HALO_MATH(FLOOR, floorf, floor)
HALO_MATH(CEIL, ceilf, ceil)
HALO_MATH(ROUND, rintf, rint)
HALO_MATH(LOG1P, log1pf, log1p)
HALO_MATH(SIN, sinf, sin)
HALO_MATH(COS, cosf, cos)
#undef HALO_MATH
/* A hundred instructions: in line, 8 or 16 times per kernel, it would take minutes to compile. */
static __device__ __noinline__ float POW(float x, float y) { return powf(x, y); }
__device__ __forceinline__ double POW(double x, double y) { return pow(x, y); }
__device__ __forceinline__ float SIGMOID(float x) {
  float y; // 1/inf = 0, so both ends saturate
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1 + expf(-x)));
  return y;
}
__device__ __forceinline__ double SIGMOID(double x) { return 1 / (1 + exp(-x)); }

} // namespace halo

/* `statement` with T the storage type of any dtype. */
#define HALO_ANY(t, T, ...)                                                                                  \
  switch (t) {                                                                                               \
  case HALO_F32: {                                                                                           \
    using T = float;                                                                                         \
    __VA_ARGS__;                                                                                             \
    break;                                                                                                   \
  }                                                                                                          \
  case HALO_F64: {                                                                                           \
    using T = double;                                                                                        \
    __VA_ARGS__;                                                                                             \
    break;                                                                                                   \
  }                                                                                                          \
  case HALO_BF16: {                                                                                          \
    using T = __nv_bfloat16;                                                                                 \
    __VA_ARGS__;                                                                                             \
    break;                                                                                                   \
  }                                                                                                          \
  case HALO_I32: {                                                                                           \
    using T = int32_t;                                                                                       \
    __VA_ARGS__;                                                                                             \
    break;                                                                                                   \
  }                                                                                                          \
  case HALO_I64: {                                                                                           \
    using T = int64_t;                                                                                       \
    __VA_ARGS__;                                                                                             \
    break;                                                                                                   \
  }                                                                                                          \
  case HALO_U8: {                                                                                            \
    using T = uint8_t;                                                                                       \
    __VA_ARGS__;                                                                                             \
    break;                                                                                                   \
  }                                                                                                          \
  default: return halo__error(HALO_EARG, "%s: no such dtype", __func__);                                     \
  }
/* `statement` with T the storage type of an element of 1, 2, 4 or 8 bytes. */
#define HALO_BITS(bytes, T, ...)                                                                             \
  switch (bytes) {                                                                                           \
  case 1: {                                                                                                  \
    using T = uint8_t;                                                                                       \
    __VA_ARGS__;                                                                                             \
    break;                                                                                                   \
  }                                                                                                          \
  case 2: {                                                                                                  \
    using T = uint16_t;                                                                                      \
    __VA_ARGS__;                                                                                             \
    break;                                                                                                   \
  }                                                                                                          \
  case 4: {                                                                                                  \
    using T = uint32_t;                                                                                      \
    __VA_ARGS__;                                                                                             \
    break;                                                                                                   \
  }                                                                                                          \
  case 8: {                                                                                                  \
    using T = uint64_t;                                                                                      \
    __VA_ARGS__;                                                                                             \
    break;                                                                                                   \
  }                                                                                                          \
  default: return halo__error(HALO_EARG, "%s: no elements have %lld bytes", __func__, (long long)(bytes));   \
  }
#endif
