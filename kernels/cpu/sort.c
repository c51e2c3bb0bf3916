/* sort: the first k of n elements in order, along one dim of [outer, n, inner].
 *
 *   values [outer, k, inner], index [outer, k, inner] i64; descending or ascending
 *
 * order     by value, ties to the lower index, on every device: D7 of the design asks that selection
 *           is a function of the scores alone. -0 equals +0; NaN counts as larger than +inf
 * method    an element becomes (key, index) with an unsigned key whose order is the wanted one. k < n
 *           keeps the best k in a heap, n log k at worst and one comparison for most elements; then a
 *           merge sort of what was kept
 * twin      kernels/cuda/sort.cu
 */
#include <omp.h>
#include <string.h>

#include "kernels.h"
#include "tile.h"

typedef struct entry {
  uint64_t key;
  int64_t index;
} entry;

static inline bool is_before(const entry *a, const entry *b) {
  return a->key != b->key ? a->key < b->key : a->index < b->index;
}

/* Unsigned number in the order of the double. */
static uint64_t real_key(double v) {
  uint64_t bits;
  memcpy(&bits, &v, sizeof bits);
  const uint64_t sign = (uint64_t)1 << 63;
  if ((bits & ~sign) > 0x7ff0000000000000u) return UINT64_MAX; // NaN
  if (bits == sign) return sign;                               // -0
  return bits & sign ? ~bits : bits | sign;
}

static uint64_t key_at(halo_dtype t, const void *x, int64_t i) {
  switch (t) {
  case HALO_F32: return real_key(((const float *)x)[i]);
  case HALO_F64: return real_key(((const double *)x)[i]);
  case HALO_BF16: return real_key(halo__bf16_load(((const uint16_t *)x)[i]));
  case HALO_I32: return (uint64_t)(int64_t)((const int32_t *)x)[i] ^ (uint64_t)1 << 63;
  case HALO_I64: return (uint64_t)((const int64_t *)x)[i] ^ (uint64_t)1 << 63;
  default: return ((const uint8_t *)x)[i];
  }
}

/* Put e into the heap of k entries whose root is the last in order. */
static void sift(entry *heap, int64_t k, int64_t i, entry e) {
  for (;;) {
    int64_t child = 2 * i + 1;
    if (child >= k) break;
    if (child + 1 < k && is_before(&heap[child], &heap[child + 1])) child++;
    if (!is_before(&e, &heap[child])) break;
    heap[i] = heap[child];
    i = child;
  }
  heap[i] = e;
}

/* Merge sort of n entries, bottom up; returns where the result is: a or b. */
static entry *merge_sort(entry *a, entry *b, int64_t n) {
  for (int64_t width = 1; width < n; width *= 2) {
    for (int64_t first = 0; first < n; first += 2 * width) {
      const int64_t middle = first + width < n ? first + width : n;
      const int64_t end = first + 2 * width < n ? first + 2 * width : n;
      int64_t i = first, j = middle;
      for (int64_t to = first; to < end; to++) {
        const bool from_left = i < middle && (j >= end || !is_before(&a[j], &a[i]));
        b[to] = from_left ? a[i++] : a[j++];
      }
    }
    entry *const swap = a;
    a = b;
    b = swap;
  }
  return a;
}

/* One fibre; work has room for n + k entries. */
static void sort_fibre(halo_dtype t, void *values, int64_t *index, const void *x, int64_t n,
                       int64_t inner, int64_t k, uint64_t flip, entry *work) {
  entry *kept = work;
  for (int64_t j = 0; j < n; j++) {
    const entry e = {key_at(t, x, j * inner) ^ flip, j};
    if (j < k) {
      kept[j] = e;
      if (j == k - 1 && k < n) {
        for (int64_t i = k / 2 - 1; i >= 0; i--) sift(kept, k, i, kept[i]);
      }
    } else if (is_before(&e, &kept[0])) {
      sift(kept, k, 0, e);
    }
  }
  kept = merge_sort(kept, work + k, k);
  const int64_t bytes = halo_dtype_bytes(t);
  for (int64_t j = 0; j < k; j++) {
    memcpy((char *)values + j * inner * bytes, (const char *)x + kept[j].index * inner * bytes,
           (size_t)bytes);
    index[j * inner] = kept[j].index;
  }
}

halo_status halo_cpu_sort(halo_dtype t, void *values, int64_t *index, const void *x, int64_t outer,
                          int64_t n, int64_t inner, int64_t k, int32_t is_descending) {
  if (k == 0) return HALO_OK;
  const int64_t fibres = outer * inner;
  const bool is_parallel = fibres > 1 && fibres * n >= PARALLEL_MIN / 16;
  const int64_t room = 2 * k;
  entry *work = NULL;
  HALO_TRY(halo__scratch((void **)&work, (is_parallel ? halo_threads() : 1) * room, sizeof *work));
#pragma omp parallel for schedule(static) if (is_parallel)
  for (int64_t f = 0; f < fibres; f++) {
    const int64_t o = f / inner, c = f % inner;
    sort_fibre(t, element_at(t, values, o * k * inner + c), index + o * k * inner + c,
               element_at(t, x, o * n * inner + c), n, inner, k, is_descending ? UINT64_MAX : 0,
               work + (is_parallel ? omp_get_thread_num() : 0) * room);
  }
  halo__free(work);
  return HALO_OK;
}
