/* vector.cuh: what kernels bound by memory share: 16-byte accesses and cheap division.
 *
 * A kernel for rows is written once for packs of N elements: N = lanes16<T> where base and strides
 * allow 16-byte accesses, N = 1 where they do not (an odd width, a view that starts in the middle).
 *
 *   fetch, put   one access of N elements (few)      widen, narrow   storage <-> arithmetic
 *   aligned      may packs of N be used?             divider         n / d by one multiplication
 *
 * Rules that all of them follow (measured on an H200, kernels/NOTES.md): loads of a thread are issued
 * before the first of them is used, at least 32 KiB of them in flight on a multiprocessor; blocks are
 * many and short rather than persistent, unless something is carried from row to row.
 */
#ifndef HALO_CUDA_VECTOR_CUH
#define HALO_CUDA_VECTOR_CUH

#include <initializer_list>
#include <type_traits>

#include "cuda.cuh"

namespace halo {

/* N elements as they come from memory. bf16 stays in pairs: a register each, where an array of 16-bit
 * numbers takes a register for every one (and spills, seen in ptxas' report). */
template <class T, int N> struct alignas(sizeof(T) * N) few { T at[N]; };
template <int N> struct alignas(2 * N) few_bf16 { uint32_t pair[N / 2]; };
template <> struct few<__nv_bfloat16, 2> : few_bf16<2> {};
template <> struct few<__nv_bfloat16, 4> : few_bf16<4> {};
template <> struct few<__nv_bfloat16, 8> : few_bf16<8> {};

template <class T, int N> __device__ __forceinline__ few<T, N> fetch(const T *p) {
  return *reinterpret_cast<const few<T, N> *>(p);
}
template <class T, int N> __device__ __forceinline__ void put(T *p, const few<T, N> &v) {
  *reinterpret_cast<few<T, N> *>(p) = v;
}

/* Element k; bf16 is the upper half of an fp32. */
template <class T, int N> __device__ __forceinline__ acc_of<T> value(const few<T, N> &v, int k) {
  if constexpr (std::is_same<T, __nv_bfloat16>::value && N > 1) {
    return __uint_as_float(k % 2 == 0 ? v.pair[k / 2] << 16 : v.pair[k / 2] & 0xffff0000u);
  } else {
    return load(v.at[k]);
  }
}
template <class T, int N> __device__ __forceinline__ void widen(acc_of<T> (&a)[N], const few<T, N> &v) {
#pragma unroll
  for (int k = 0; k < N; k++) a[k] = value(v, k);
}
template <class T, int N> __device__ __forceinline__ few<T, N> narrow(const acc_of<T> (&a)[N]) {
  few<T, N> v;
  if constexpr (std::is_same<T, __nv_bfloat16>::value && N > 1) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(a[k], a[k + 1]);
      v.pair[k / 2] = *reinterpret_cast<const uint32_t *>(&pair);
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; k++) v.at[k] = store<T>(a[k]);
  }
  return v;
}
/* N times the same. */
template <class T, int N> __device__ __forceinline__ few<T, N> repeat(acc_of<T> x) {
  acc_of<T> a[N];
#pragma unroll
  for (int k = 0; k < N; k++) a[k] = x;
  return narrow<T, N>(a);
}

/* e^x: the hardware's for bf16 storage (2 ulp of fp32), libm's otherwise. */
template <class T> __device__ __forceinline__ acc_of<T> exp_of(acc_of<T> x) {
  if constexpr (std::is_same<T, double>::value) {
    return exp(x);
  } else if constexpr (std::is_same<T, float>::value) {
    return expf(x);
  } else {
    return __expf(x);
  }
}
template <class T> __device__ __forceinline__ acc_of<T> sigmoid_of(acc_of<T> x) {
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    return __fdividef(1.0f, 1.0f + __expf(-x)); // 1 / inf is 0, e^88 and above included
  } else {
    return 1 / (1 + exp_of<T>(-x));
  }
}

/* Are all of these multiples of `bytes`? */
inline bool aligned(int64_t bytes, std::initializer_list<const void *> pointers) {
  for (const void *p : pointers) {
    if ((uintptr_t)p % (uintptr_t)bytes != 0) return false;
  }
  return true;
}
inline bool multiples(int64_t of, std::initializer_list<int64_t> sizes) {
  for (int64_t n : sizes) {
    if (n % of != 0) return false;
  }
  return true;
}

/* Quotient and remainder of n < 2^31 by d (Granlund and Montgomery 1994, figure 4.1). */
struct divider {
  uint32_t d, multiplier, shift;
  divider() = default;
  explicit divider(uint32_t divisor) : d(divisor), shift(0) {
    while (shift < 32 && (1ull << shift) < d) shift++;
    multiplier = (uint32_t)(((1ull << 32) * ((1ull << shift) - d)) / d + 1);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return (__umulhi(n, multiplier) + n) >> shift;
  }
};

constexpr int64_t index_limit = 1ll << 31; // of what a divider divides

/* Rows of `packs` packs that one launch may have. */
inline halo_status rows_at_once(int64_t *out, int64_t packs) {
  HALO_CHECK(packs < index_limit, HALO_EUNSUPPORTED, "cuda: rows of 2^31 elements and more");
  *out = (index_limit - 1) / packs;
  return HALO_OK;
}

inline unsigned blocks_for(int64_t n, int64_t per_block) {
  return (unsigned)((n + per_block - 1) / per_block);
}

} // namespace halo
#endif
