/* index: reading and adding at positions that a tensor of i64 names; dims are [outer, ., inner].
 *
 *   gather       y[o,j,c] = x[o, index[o,j,c], c]
 *   scatter_add  y[o, index[o,j,c], c] += x[o,j,c]
 *   take         y[o,j,:] = x[o, index[j], :]
 *   take_add     y[o, index[j], :] += x[o,j,:]
 *   one_hot      y[i, index[i]] = 1
 *
 * order     whoever adds to an element of y does so alone and with j upward, as the CPU does: the sums
 *           are the CPU's bit for bit. Many columns: a thread owns one and walks j. Else places are
 *           sorted by where they go (stable, sort.cuh), and a thread owns each run of equal ones
 * numbers   the adding forms keep y in the arithmetic type of t (fp32 for bf16, i64 for integers), so
 *           that many small addends are not lost; core narrows once at the end
 * errors    an index outside 0 .. n-1 is reported and becomes HALO_EARG at the next wait; its element
 *           is zero (gather, take), left out (the others)
 * twin      kernels/cpu/index.c
 */
#include "fibres.cuh"
#include "sort.cuh"

namespace {

using namespace halo;

enum { THREADS = 256, COLUMNS_ENOUGH = 16384, FEW = 32, AHEAD = 4 };

__device__ __forceinline__ bool is_inside(int64_t index, int64_t n, int64_t where, halo__cuda_report *slot) {
  if (index >= 0 && index < n) return true;
  report(slot, HALO__CUDA_INDEX, where, index, n);
  return false;
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    gather_kernel(T *y, const T *x, const int64_t *index, int64_t count, int64_t n, divider by_inner,
                  divider by_m, halo__cuda_report *slot) {
  const int64_t first = (int64_t)blockIdx.x * (THREADS * AHEAD) + threadIdx.x;
  int64_t at[AHEAD];
#pragma unroll
  for (int u = 0; u < AHEAD; u++) {
    const int64_t i = first + u * THREADS;
    at[u] = i < count ? index[i] : 0;
  }
#pragma unroll
  for (int u = 0; u < AHEAD; u++) {
    const int64_t i = first + u * THREADS;
    if (i >= count) break;
    const int64_t row = by_inner.of(i), c = i - row * by_inner.d, o = by_m.of(row);
    y[i] = is_inside(at[u], n, i, slot) ? x[(o * n + at[u]) * by_inner.d + c] : (T)0;
  }
}

template <class T>
halo_status gather(void *y, const void *x, const int64_t *index, int64_t outer, int64_t n, int64_t m,
                   int64_t inner) {
  const int64_t count = outer * m * inner;
  if (count <= 0) return HALO_OK;
  const bool is_wide = count >= (int64_t)1 << 31;
  unsigned blocks = 0;
  HALO_TRY(blocks_of(&blocks, count, THREADS * AHEAD));
  gather_kernel<T><<<blocks, THREADS, 0, halo__cuda_stream()>>>((T *)y, (const T *)x, index, count, n,
                                                                divider(inner, is_wide), divider(m, is_wide),
                                                                halo__cuda_report_slot());
  HALO_LAUNCHED("gather");
  return HALO_OK;
}

struct alignas(16) bits_128 {
  uint64_t a, b;
};

/* Rows of `by_row.d` units. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    take_kernel(T *y, const T *x, const int64_t *index, int64_t count, int64_t n, divider by_row,
                divider by_m, halo__cuda_report *slot) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= count) return;
  const int64_t row = by_row.of(i), c = i - row * by_row.d, o = by_m.of(row), j = row - o * by_m.d,
                from = index[j];
  y[i] = is_inside(from, n, j, slot) ? x[(o * n + from) * by_row.d + c] : T{};
}

template <class T>
halo_status take(void *y, const void *x, const int64_t *index, int64_t outer, int64_t n, int64_t m,
                 int64_t bytes) {
  const int64_t units = bytes / (int64_t)sizeof(T), count = outer * m * units;
  const bool is_wide = count >= (int64_t)1 << 31;
  unsigned blocks = 0;
  HALO_TRY(blocks_of(&blocks, count, THREADS));
  take_kernel<T><<<blocks, THREADS, 0, halo__cuda_stream()>>>((T *)y, (const T *)x, index, count, n,
                                                              divider(units, is_wide), divider(m, is_wide),
                                                              halo__cuda_report_slot());
  HALO_LAUNCHED("take");
  return HALO_OK;
}

/* ---- adding --------------------------------------------------------------------------------------- */

/* y is of arithmetic type: f32, f64, or i64 as unsigned, which wraps. */
template <class T, bool IS_REAL> struct sum_of { using type = acc_of<T>; };
template <class T> struct sum_of<T, false> { using type = uint64_t; };
template <class T> using sum_type = typename sum_of<T, number<T>::is_real>::type;
template <class T> __device__ __forceinline__ sum_type<T> addend(T x) {
  if constexpr (number<T>::is_real) return load(x);
  else return (uint64_t)(int64_t)x;
}

/* One thread per column (o, c). index [outer, m, inner], or [m] when IS_TAKE. */
template <class T, bool IS_TAKE>
__global__ void __launch_bounds__(THREADS)
    add_columns_kernel(sum_type<T> *y, const T *x, const int64_t *index, int64_t outer, int64_t n, int64_t m,
                       int64_t inner, halo__cuda_report *slot) {
  const int64_t column = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (column >= outer * inner) return;
  const int64_t o = column / inner, c = column - o * inner;
  for (int64_t j = 0; j < m; j += AHEAD) {
    int64_t at[AHEAD];
    T value[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      if (j + u >= m) break;
      const int64_t i = (o * m + j + u) * inner + c;
      at[u] = index[IS_TAKE ? j + u : i];
      value[u] = x[i];
    }
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      if (j + u >= m) break;
      if (!is_inside(at[u], n, IS_TAKE ? j + u : (o * m + j + u) * inner + c, slot)) continue;
      y[(o * n + at[u]) * inner + c] += addend<T>(value[u]);
    }
  }
}

/* Where each element goes; behind all places if nowhere. */
__global__ void __launch_bounds__(THREADS)
    place_kernel(uint64_t *key, uint32_t *item, const int64_t *index, int64_t count, int64_t n, int64_t m,
                 int64_t inner, int64_t nowhere, halo__cuda_report *slot) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / inner, c = i - row * inner, o = row / m, at = index[i];
  key[i] = (uint64_t)(is_inside(at, n, i, slot) ? (o * n + at) * inner + c : nowhere);
  item[i] = (uint32_t)i;
}

/* Element p of the sorted list begins a run of equal keys, or its thread has nothing to do. Each of the
 * outer * inner threads of a run (1 for scatter_add, whose items are elements) adds a column of it;
 * items are rows j. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    add_runs_kernel(sum_type<T> *y, const T *x, const uint64_t *key, const uint32_t *item, int64_t count,
                    int64_t nowhere, int64_t outer, int64_t n, int64_t m, int64_t inner) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, columns = outer * inner;
  const int64_t p = i / columns, column = i - p * columns, o = column / inner, c = column - o * inner;
  if (p >= count) return;
  const uint64_t to = key[p];
  if (to == (uint64_t)nowhere || (p > 0 && key[p - 1] == to)) return;
  sum_type<T> *const target = y + (o * n + (int64_t)to) * inner + c;
  const T *const from = x + o * m * inner + c;
  sum_type<T> sum = *target;
  for (int64_t q = p; q < count; q += AHEAD) {
    T value[AHEAD];
    bool is_mine[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      is_mine[u] = q + u < count && key[q + u] == to;
      value[u] = from[is_mine[u] ? item[q + u] * inner : item[p] * inner];
    }
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      if (is_mine[u]) sum += addend<T>(value[u]);
    }
    if (!is_mine[AHEAD - 1]) break;
  }
  *target = sum;
}

template <class T, bool IS_TAKE>
halo_status add_at(void *y, const void *x, const int64_t *index, int64_t outer, int64_t n, int64_t m,
                   int64_t inner) {
  if (outer * m * inner <= 0) return HALO_OK;
  cudaStream_t stream = halo__cuda_stream();
  // What is sorted: the m indices of take_add, every element of scatter_add.
  const int64_t count = IS_TAKE ? m : outer * m * inner, nowhere = IS_TAKE ? n : outer * n * inner;
  const bool by_columns =
      m <= FEW || count >= (int64_t)1 << 32 || (!IS_TAKE && outer * inner >= COLUMNS_ENOUGH);
  unsigned blocks = 0;
  if (by_columns) {
    HALO_TRY(blocks_of(&blocks, outer * inner, THREADS));
    add_columns_kernel<T, IS_TAKE><<<blocks, THREADS, 0, stream>>>(
        (sum_type<T> *)y, (const T *)x, index, outer, n, m, inner, halo__cuda_report_slot());
    HALO_LAUNCHED("add by columns");
    return HALO_OK;
  }
  scratch keys, items;
  HALO_TRY(keys.get(2 * count * (int64_t)sizeof(uint64_t)));
  HALO_TRY(items.get(2 * count * (int64_t)sizeof(uint32_t)));
  uint64_t *const key = keys.as<uint64_t>(), *const sorted = key + count;
  uint32_t *const item = items.as<uint32_t>(), *const order = item + count;
  HALO_TRY(blocks_of(&blocks, count, THREADS));
  if (IS_TAKE) {
    place_kernel<<<blocks, THREADS, 0, stream>>>(key, item, index, count, n, m, 1, nowhere,
                                                 halo__cuda_report_slot());
  } else {
    place_kernel<<<blocks, THREADS, 0, stream>>>(key, item, index, count, n, m, inner, nowhere,
                                                 halo__cuda_report_slot());
  }
  HALO_LAUNCHED("add: places");
  HALO_TRY(halo__cuda_sort_pairs(sorted, order, key, item, count, halo__bits_of(nowhere + 1)));
  if (IS_TAKE) {
    HALO_TRY(blocks_of(&blocks, count * outer * inner, THREADS));
    add_runs_kernel<T><<<blocks, THREADS, 0, stream>>>((sum_type<T> *)y, (const T *)x, sorted, order, count,
                                                       nowhere, outer, n, m, inner);
  } else {
    // Places and items are whole addresses: one column, of which everything is a row.
    add_runs_kernel<T><<<blocks, THREADS, 0, stream>>>((sum_type<T> *)y, (const T *)x, sorted, order, count,
                                                       nowhere, 1, nowhere, count, 1);
  }
  HALO_LAUNCHED("add by runs");
  return HALO_OK;
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    one_hot_kernel(T *y, const int64_t *index, int64_t count, int64_t classes, halo__cuda_report *slot) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= count) return;
  const int64_t at = index[i];
  if (is_inside(at, classes, i, slot)) y[i * classes + at] = (T)1;
}

template <class T> halo_status one_hot(void *y, const int64_t *index, int64_t count, int64_t classes) {
  if (count <= 0) return HALO_OK;
  unsigned blocks = 0;
  HALO_TRY(blocks_of(&blocks, count, THREADS));
  HALO_TRY(halo_cuda_zero(y, count * classes * (int64_t)sizeof(T)));
  one_hot_kernel<T>
      <<<blocks, THREADS, 0, halo__cuda_stream()>>>((T *)y, index, count, classes, halo__cuda_report_slot());
  HALO_LAUNCHED("one_hot");
  return HALO_OK;
}

} // namespace

halo_status halo_cuda_gather(int64_t bytes, void *y, const void *x, const int64_t *index, int64_t outer,
                             int64_t n, int64_t m, int64_t inner) {
  HALO_BITS(bytes, T, return gather<T>(y, x, index, outer, n, m, inner));
  return HALO_OK;
}

halo_status halo_cuda_scatter_add(halo_dtype t, void *y, const void *x, const int64_t *index, int64_t outer,
                                  int64_t n, int64_t m, int64_t inner) {
  HALO_ANY(t, T, return (add_at<T, false>(y, x, index, outer, n, m, inner)));
  return HALO_OK;
}

halo_status halo_cuda_take(int64_t bytes, void *y, const void *x, const int64_t *index, int64_t outer,
                           int64_t n, int64_t m, int64_t inner) {
  const int64_t row = inner * bytes;
  if (outer * m * row <= 0) return HALO_OK;
  if (row % 16 == 0 && is_multiple(y, 16) && is_multiple(x, 16)) {
    return take<bits_128>(y, x, index, outer, n, m, row);
  }
  HALO_BITS(bytes, T, return take<T>(y, x, index, outer, n, m, row));
  return HALO_OK;
}

halo_status halo_cuda_take_add(halo_dtype t, void *y, const void *x, const int64_t *index, int64_t outer,
                               int64_t n, int64_t m, int64_t inner) {
  HALO_ANY(t, T, return (add_at<T, true>(y, x, index, outer, n, m, inner)));
  return HALO_OK;
}

halo_status halo_cuda_one_hot(halo_dtype t, void *y, const int64_t *index, int64_t count, int64_t classes) {
  HALO_ANY(t, T, return one_hot<T>(y, index, count, classes));
  return HALO_OK;
}
