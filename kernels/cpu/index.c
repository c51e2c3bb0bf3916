/* index: reading and adding at positions that a tensor of i64 names; dims are [outer, ., inner].
 *
 *   gather       y[o,j,c] = x[o, index[o,j,c], c]
 *   scatter_add  y[o, index[o,j,c], c] += x[o,j,c]
 *   take         y[o,j,:] = x[o, index[j], :]
 *   take_add     y[o, index[j], :] += x[o,j,:]
 *   one_hot      y[i, index[i]] = 1
 *
 * order     j runs upward within a thread and threads share out columns, so sums repeat bit for bit
 * numbers   the adding forms keep y in the arithmetic type of t (fp32 for bf16, i64 for integers), so
 *           that many small addends are not lost; core narrows once at the end
 * errors    HALO_EARG naming the first index outside 0 .. n-1; nothing is written then
 * twin      kernels/cuda/index.cu
 */
#define HALO_EACH_ARITHMETIC_FILE "cpu/index.c"
#ifndef HALO_ARITHMETIC_PASS
#include "cpu/tile.h"

#include "cpu/each_arithmetic.h"

static halo_status check_range(const char *name, const int64_t *index, int64_t count, int64_t n) {
  int64_t bad = count;
#pragma omp parallel for reduction(min : bad) if (count >= PARALLEL_MIN)
  for (int64_t i = 0; i < count; i++) {
    if ((index[i] < 0 || index[i] >= n) && i < bad) bad = i;
  }
  HALO_CHECK(bad == count, HALO_EARG, "%s: index %lld (element %lld) is outside 0..%lld", name,
             (long long)index[bad], (long long)bad, (long long)n - 1);
  return HALO_OK;
}

static void gather_row(char *restrict y, const char *restrict x, const int64_t *index,
                       int64_t inner, int64_t bytes) {
  for (int64_t c = 0; c < inner; c++) {
    const char *from = x + (index[c] * inner + c) * bytes;
    switch (bytes) {
    case 1: y[c] = *from; break;
    case 2: memcpy(y + 2 * c, from, 2); break;
    case 4: memcpy(y + 4 * c, from, 4); break;
    default: memcpy(y + 8 * c, from, 8); break;
    }
  }
}

halo_status halo_cpu_gather(int64_t bytes, void *y, const void *x, const int64_t *index,
                            int64_t outer, int64_t n, int64_t m, int64_t inner) {
  HALO_TRY(check_range("gather", index, outer * m * inner, n));
#pragma omp parallel for schedule(static) if (outer * m * inner >= PARALLEL_MIN)
  for (int64_t row = 0; row < outer * m; row++) {
    gather_row((char *)y + row * inner * bytes, (const char *)x + row / m * n * inner * bytes,
               index + row * inner, inner, bytes);
  }
  return HALO_OK;
}

halo_status halo_cpu_scatter_add(halo_dtype t, void *y, const void *x, const int64_t *index,
                                 int64_t outer, int64_t n, int64_t m, int64_t inner) {
  HALO_TRY(check_range("scatter_add", index, outer * m * inner, n));
  const int64_t columns = tile_count(inner);
#pragma omp parallel for schedule(static) if (outer * m * inner >= PARALLEL_MIN)
  for (int64_t k = 0; k < outer * columns; k++) {
    const int64_t o = k / columns, c = k % columns * TILE, width = tile_length(inner, c);
    tile buffer;
    for (int64_t j = 0; j < m; j++) {
      const int64_t first = (o * m + j) * inner + c;
      const void *px = tile_load(&buffer, t, x, first, 1, width);
      const int64_t to = o * n * inner + c;
      switch (arithmetic_of(t)) {
      case IN_F32: scatter_f32((float *)y + to, px, index + first, inner, width); break;
      case IN_F64: scatter_f64((double *)y + to, px, index + first, inner, width); break;
      case IN_I64: scatter_i64((int64_t *)y + to, px, index + first, inner, width); break;
      }
    }
  }
  return HALO_OK;
}

halo_status halo_cpu_take(int64_t bytes, void *y, const void *x, const int64_t *index,
                          int64_t outer, int64_t n, int64_t m, int64_t inner) {
  HALO_TRY(check_range("index_select", index, m, n));
  const size_t row_bytes = (size_t)(inner * bytes);
#pragma omp parallel for schedule(static) if (outer * m * inner >= PARALLEL_MIN)
  for (int64_t row = 0; row < outer * m; row++) {
    const int64_t from = row / m * n + index[row % m];
    memcpy((char *)y + row * (int64_t)row_bytes, (const char *)x + from * (int64_t)row_bytes,
           row_bytes);
  }
  return HALO_OK;
}

halo_status halo_cpu_take_add(halo_dtype t, void *y, const void *x, const int64_t *index,
                              int64_t outer, int64_t n, int64_t m, int64_t inner) {
  HALO_TRY(check_range("index_select", index, m, n));
  const int64_t columns = tile_count(inner);
#pragma omp parallel for schedule(static) if (outer * m * inner >= PARALLEL_MIN)
  for (int64_t k = 0; k < outer * columns; k++) {
    const int64_t o = k / columns, c = k % columns * TILE, width = tile_length(inner, c);
    tile buffer;
    for (int64_t j = 0; j < m; j++) {
      const void *px = tile_load(&buffer, t, x, (o * m + j) * inner + c, 1, width);
      const int64_t to = (o * n + index[j]) * inner + c;
      switch (arithmetic_of(t)) {
      case IN_F32: add_run_f32((float *)y + to, px, width); break;
      case IN_F64: add_run_f64((double *)y + to, px, width); break;
      case IN_I64: add_run_i64((int64_t *)y + to, px, width); break;
      }
    }
  }
  return HALO_OK;
}

halo_status halo_cpu_one_hot(halo_dtype t, void *y, const int64_t *index, int64_t count,
                             int64_t classes) {
  HALO_TRY(check_range("one_hot", index, count, classes));
  memset(y, 0, (size_t)(count * classes * halo_dtype_bytes(t)));
  tile one;
  if (arithmetic_of(t) == IN_F32) {
    one.f32[0] = 1;
  } else if (arithmetic_of(t) == IN_F64) {
    one.f64[0] = 1;
  } else {
    one.i64[0] = 1;
  }
  for (int64_t i = 0; i < count; i++) {
    narrow(element_at(t, y, i * classes + index[i]), t, 1, &one, 1);
  }
  return HALO_OK;
}
#else

static void ACC(scatter)(acc *restrict y, const acc *restrict x, const int64_t *index,
                         int64_t inner, int64_t width) {
  for (int64_t c = 0; c < width; c++) y[index[c] * inner + c] += x[c];
}

static void ACC(add_run)(acc *restrict y, const acc *restrict x, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] += x[i];
}
#endif
