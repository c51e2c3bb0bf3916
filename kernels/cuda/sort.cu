/* sort: the first k of n elements in order, along one dim of [outer, n, inner].
 *
 *   values [outer, k, inner], index [outer, k, inner] i64; descending or ascending
 *
 * order     by value, ties to the lower index, on every device: selection must be a function of the
 *           scores alone. -0 equals +0; NaN counts as larger than +inf
 * method    an element becomes an unsigned key whose order is the wanted one, of as many bits as its
 *           dtype. n <= SMALL_MOST: bitonic sort (Batcher, AFIPS 1968) of (key, index) in shared memory,
 *           several short fibres to a block. Longer fibres: one radix sort (CUB, part of the CUDA
 *           toolkit) of all of them together, with the fibre's number above the key; where both do not
 *           fit 64 bits, a second stable sort by fibre follows the one by key. Values are read at the
 *           sorted places, so NaNs and signs of zero come through
 * twin      kernels/cpu/sort.c
 */
#include <cub/device/device_radix_sort.cuh>

#include "fibres.cuh"
#include "sort.cuh"

halo_status halo__cuda_sort_pairs(uint64_t *key_out, uint32_t *item_out, const uint64_t *key,
                                  const uint32_t *item, int64_t n, int bits) {
  HALO_CHECK(n < (int64_t)1 << 32, HALO_EUNSUPPORTED, "sort: %lld elements at once are beyond 32-bit places",
             (long long)n);
  size_t bytes = 0;
  cudaStream_t stream = halo__cuda_stream();
  HALO_CUDA_TRY(cub::DeviceRadixSort::SortPairs(nullptr, bytes, key, key_out, item, item_out, (uint32_t)n, 0,
                                                bits > 0 ? bits : 1, stream));
  halo::scratch room;
  HALO_TRY(room.get((int64_t)bytes));
  HALO_CUDA_TRY(cub::DeviceRadixSort::SortPairs(room.p, bytes, key, key_out, item, item_out, (uint32_t)n, 0,
                                                bits > 0 ? bits : 1, stream));
  HALO_LAUNCHED("radix sort");
  return HALO_OK;
}

namespace {

using namespace halo;

enum { THREADS = 256, SMALL_MOST = 2048 };
/* Elements sorted together: 24 bytes of scratch each, and CUB's own. */
const int64_t GROUP_ELEMENTS = (int64_t)1 << 27;

template <class T> constexpr int key_bits = 8 * (int)sizeof(T);

/* Unsigned number in ascending order of x, key_bits wide. */
__device__ __forceinline__ uint64_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x == 0 ? 0.0f : x), sign = 0x80000000u;
  return x != x ? 0xffffffffu : bits & sign ? ~bits : bits | sign;
}
__device__ __forceinline__ uint64_t key_of(__nv_bfloat16 x) {
  return load(x) != load(x) ? 0xffffu : key_of(load(x)) >> 16; // the lower half is all ones or zeros
}
__device__ __forceinline__ uint64_t key_of(double x) {
  const uint64_t bits = (uint64_t)__double_as_longlong(x == 0 ? 0.0 : x), sign = (uint64_t)1 << 63;
  return x != x ? ~(uint64_t)0 : bits & sign ? ~bits : bits | sign;
}
__device__ __forceinline__ uint64_t key_of(uint8_t x) { return x; }
__device__ __forceinline__ uint64_t key_of(int32_t x) { return (uint32_t)x ^ 0x80000000u; }
__device__ __forceinline__ uint64_t key_of(int64_t x) { return (uint64_t)x ^ (uint64_t)1 << 63; }

template <class T> __device__ __forceinline__ uint64_t ordered_key(T x, bool is_descending) {
  const uint64_t mask = ~(uint64_t)0 >> (64 - key_bits<T>);
  return is_descending ? key_of(x) ^ mask : key_of(x);
}

/* A block sorts `together` fibres of `room` places (a power of two, n at least). */
template <class T>
__global__ void __launch_bounds__(THREADS)
    small_kernel(T *values, int64_t *index, const T *x, fibres f, int64_t k, int room, int together,
                 bool is_descending) {
  __shared__ uint64_t key[SMALL_MOST];
  __shared__ uint32_t item[SMALL_MOST];
  const int64_t first = (int64_t)blockIdx.x * together, count = f.outer * f.inner;
  for (int i = threadIdx.x; i < room * together; i += THREADS) {
    // Neighbours in memory go to neighbours among the threads.
    const int fibre = f.inner == 1 ? i / room : i % together, j = f.inner == 1 ? i % room : i / together;
    const bool is_there = j < f.n && first + fibre < count;
    const int64_t o = (first + fibre) / f.inner, c = (first + fibre) - o * f.inner;
    key[fibre * room + j] =
        is_there ? ordered_key(x[(o * f.n + j) * f.inner + c], is_descending) : ~(uint64_t)0;
    item[fibre * room + j] = is_there ? (uint32_t)j : ~0u;
  }
  for (int size = 2; size <= room; size *= 2) {
    for (int apart = size / 2; apart > 0; apart /= 2) {
      __syncthreads();
      for (int p = threadIdx.x; p < room * together / 2; p += THREADS) {
        const int a = p / apart * 2 * apart + p % apart, b = a + apart;
        const bool is_up = (a & (room - 1) & size) == 0;
        const uint64_t ka = key[a], kb = key[b];
        const uint32_t ia = item[a], ib = item[b];
        const bool in_order = ka != kb ? ka < kb : ia < ib;
        if (in_order != is_up) {
          key[a] = kb;
          key[b] = ka;
          item[a] = ib;
          item[b] = ia;
        }
      }
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < k * together; i += THREADS) {
    const int64_t fibre = f.inner == 1 ? i / k : i % together, j = f.inner == 1 ? i % k : i / together;
    if (first + fibre >= count) continue;
    const int64_t o = (first + fibre) / f.inner, c = (first + fibre) - o * f.inner;
    const int64_t to = (o * k + j) * f.inner + c, from = item[fibre * room + j];
    values[to] = x[(o * f.n + from) * f.inner + c];
    index[to] = from;
  }
}

/* Keys of fibres first .. first + count, fibre after fibre; the fibre above the key where it fits. */
template <class T>
__global__ void __launch_bounds__(THREADS) key_kernel(uint64_t *key, uint32_t *item, const T *x, fibres f,
                                                      int64_t first, int64_t count, bool is_descending) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= count * f.n) return;
  const int64_t fibre = i / f.n, j = i - fibre * f.n, o = (first + fibre) / f.inner,
                c = first + fibre - o * f.inner;
  uint64_t own = ordered_key(x[(o * f.n + j) * f.inner + c], is_descending);
  if constexpr (key_bits<T> < 64) own |= (uint64_t)fibre << key_bits<T>;
  key[i] = own;
  item[i] = (uint32_t)i;
}
__global__ void __launch_bounds__(THREADS)
    fibre_key_kernel(uint64_t *key, const uint32_t *item, int64_t n, int64_t all) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i < all) key[i] = item[i] / n;
}
template <class T>
__global__ void __launch_bounds__(THREADS)
    pick_kernel(T *values, int64_t *index, const T *x, const uint32_t *item, fibres f, int64_t first,
                int64_t count, int64_t k) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= count * k) return;
  const int64_t fibre = i / k, p = i - fibre * k, o = (first + fibre) / f.inner,
                c = first + fibre - o * f.inner;
  const int64_t j = item[fibre * f.n + p] - fibre * f.n, to = (o * k + p) * f.inner + c;
  values[to] = x[(o * f.n + j) * f.inner + c];
  index[to] = j;
}

template <class T>
halo_status sort_long(T *values, int64_t *index, const T *x, const fibres &f, int64_t k, bool is_descending) {
  const int64_t fits = GROUP_ELEMENTS / f.n, group = fits < 1 ? 1 : fits < f.count() ? fits : f.count();
  const int64_t room = group * f.n;
  cudaStream_t stream = halo__cuda_stream();
  HALO_CHECK(f.n < (int64_t)1 << 32, HALO_EUNSUPPORTED,
             "sort: a dim of %lld elements is beyond 32-bit places", (long long)f.n);
  scratch keys, items;
  HALO_TRY(keys.get(2 * room * (int64_t)sizeof(uint64_t)));
  HALO_TRY(items.get(2 * room * (int64_t)sizeof(uint32_t)));
  uint64_t *const key = keys.as<uint64_t>(), *const key_out = key + room;
  uint32_t *const item = items.as<uint32_t>(), *const item_out = item + room;
  for (int64_t first = 0; first < f.count(); first += group) {
    const int64_t count = f.count() - first < group ? f.count() - first : group, all = count * f.n;
    const uint32_t *sorted = item_out;
    unsigned blocks = 0, picks = 0;
    HALO_TRY(blocks_of(&blocks, all, THREADS));
    HALO_TRY(blocks_of(&picks, count * k, THREADS));
    key_kernel<<<blocks, THREADS, 0, stream>>>(key, item, x, f, first, count, is_descending);
    HALO_LAUNCHED("sort: keys");
    const int fibre_bits = halo__bits_of(count);
    const bool fits_one = key_bits<T> + fibre_bits <= 64;
    HALO_TRY(
        halo__cuda_sort_pairs(key_out, item_out, key, item, all, fits_one ? key_bits<T> + fibre_bits : 64));
    if (!fits_one) {
      fibre_key_kernel<<<blocks, THREADS, 0, stream>>>(key, item_out, f.n, all);
      HALO_LAUNCHED("sort: fibres");
      HALO_TRY(halo__cuda_sort_pairs(key_out, item, key, item_out, all, fibre_bits));
      sorted = item;
    }
    pick_kernel<<<picks, THREADS, 0, stream>>>(values, index, x, sorted, f, first, count, k);
    HALO_LAUNCHED("sort: pick");
  }
  return HALO_OK;
}

template <class T>
halo_status sort(void *values, int64_t *index, const void *x, int64_t outer, int64_t n, int64_t inner,
                 int64_t k, bool is_descending) {
  if (outer * inner * k <= 0) return HALO_OK;
  const fibres f = {outer, n, inner, 1, n};
  if (n > SMALL_MOST) return sort_long<T>((T *)values, index, (const T *)x, f, k, is_descending);
  int room = 2;
  while (room < n) room *= 2;
  const int together = room < SMALL_MOST / 2 ? SMALL_MOST / 2 / room : 1;
  unsigned blocks = 0;
  HALO_TRY(blocks_of(&blocks, f.count(), together));
  small_kernel<T><<<blocks, THREADS, 0, halo__cuda_stream()>>>((T *)values, index, (const T *)x, f, k, room,
                                                               together, is_descending);
  HALO_LAUNCHED("sort");
  return HALO_OK;
}

} // namespace

halo_status halo_cuda_sort(halo_dtype t, void *values, int64_t *index, const void *x, int64_t outer,
                           int64_t n, int64_t inner, int64_t k, int32_t is_descending) {
  HALO_ANY(t, T, return sort<T>(values, index, x, outer, n, inner, k, is_descending != 0));
  return HALO_OK;
}
