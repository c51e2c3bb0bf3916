/* vector.cuh: what kernels bound by memory share: 16-byte accesses and cheap division.
 *
 * A kernel for rows is written once for packs of N elements: N = lanes16<T> where base and strides
 * allow 16-byte accesses, N = 1 where they do not (an odd width, a view that starts in the middle).
 *
 *   fetch     one access                         widen, narrow   storage <-> arithmetic
 *   aligned   may packs of N be used?            divider         n / d by one multiplication
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

template <class T, int N> __device__ __forceinline__ pack<T, N> fetch(const T *p) {
  return *reinterpret_cast<const pack<T, N> *>(p);
}
template <class T, int N> __device__ __forceinline__ void put(T *p, const pack<T, N> &v) {
  *reinterpret_cast<pack<T, N> *>(p) = v;
}

template <class T, int N>
__device__ __forceinline__ void widen(acc_of<T> (&a)[N], const pack<T, N> &v) {
#pragma unroll
  for (int i = 0; i < N; i++) a[i] = load(v.at[i]);
}

template <class T, int N> __device__ __forceinline__ pack<T, N> narrow(const acc_of<T> (&a)[N]) {
  pack<T, N> v;
  if constexpr (std::is_same<T, __nv_bfloat16>::value && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      reinterpret_cast<__nv_bfloat162 *>(v.at)[i / 2] = __floats2bfloat162_rn(a[i], a[i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) v.at[i] = store<T>(a[i]);
  }
  return v;
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

inline unsigned blocks_for(int64_t n, int64_t per_block) {
  return (unsigned)((n + per_block - 1) / per_block);
}

} // namespace halo
#endif
