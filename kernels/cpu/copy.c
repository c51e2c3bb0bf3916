/* copy.c: moving and converting elements; the only place where dtypes meet.
 *
 * convert goes through fp64 for pairs that are not on the fast list (f32 <-> bf16, f32 <-> f64 and
 * equal types), which is exact for every pair but i64 values beyond 2^53 on their way to a float.
 * Float to bf16 rounds to nearest even, float to integer truncates toward zero and saturates.
 */
#define HALO_EACH_REAL_FILE "cpu/copy.c"
#ifndef HALO_REAL_PASS
#include "cpu/bits.h"
#include "cpu/each_real.h"

static int64_t saturate(double v, double lo, double hi, int64_t ilo, int64_t ihi) {
  if (v != v) return 0;
  if (v <= lo) return ilo;
  if (v >= hi) return ihi;
  return (int64_t)v;
}

static double load_any(const void *x, halo_dtype t, int64_t i) {
  switch (t) {
  case HALO_F32: return ((const float *)x)[i];
  case HALO_F64: return ((const double *)x)[i];
  case HALO_BF16: return halo__bf16_load(((const uint16_t *)x)[i]);
  case HALO_I32: return ((const int32_t *)x)[i];
  case HALO_I64: return (double)((const int64_t *)x)[i];
  default: return ((const uint8_t *)x)[i];
  }
}

static void store_any(void *y, halo_dtype t, int64_t i, double v) {
  switch (t) {
  case HALO_F32: ((float *)y)[i] = (float)v; break;
  case HALO_F64: ((double *)y)[i] = v; break;
  case HALO_BF16: ((uint16_t *)y)[i] = halo__bf16_store((float)v); break;
  case HALO_I32:
    ((int32_t *)y)[i] = (int32_t)saturate(v, INT32_MIN, INT32_MAX, INT32_MIN, INT32_MAX);
    break;
  case HALO_I64:
    ((int64_t *)y)[i] = saturate(v, -9223372036854775808.0, 9223372036854775808.0, INT64_MIN,
                                 INT64_MAX);
    break;
  default: ((uint8_t *)y)[i] = (uint8_t)saturate(v, 0, 255, 0, 255); break;
  }
}

static bool is_integer(halo_dtype t) { return t == HALO_I32 || t == HALO_I64 || t == HALO_U8; }

static int64_t load_integer(const void *x, halo_dtype t, int64_t i) {
  if (t == HALO_I64) return ((const int64_t *)x)[i];
  return t == HALO_I32 ? ((const int32_t *)x)[i] : ((const uint8_t *)x)[i];
}

static int64_t element_bytes(halo_dtype t) {
  static const int64_t bytes[HALO_DTYPE_COUNT] = {4, 8, 2, 4, 8, 1};
  return bytes[t];
}

halo_status halo_cpu_convert(void *y, halo_dtype to, const void *x, halo_dtype from, int64_t n) {
  if (to == from) {
    memcpy(y, x, (size_t)(n * element_bytes(to)));
  } else if (from == HALO_F32 && to == HALO_BF16) {
    const float *a = x;
    uint16_t *b = y;
#pragma omp parallel for simd if (n > 65536)
    for (int64_t i = 0; i < n; i++) b[i] = halo__bf16_store(a[i]);
  } else if (from == HALO_BF16 && to == HALO_F32) {
    const uint16_t *a = x;
    float *b = y;
#pragma omp parallel for simd if (n > 65536)
    for (int64_t i = 0; i < n; i++) b[i] = halo__bf16_load(a[i]);
  } else if (from == HALO_F32 && to == HALO_F64) {
    const float *a = x;
    double *b = y;
    for (int64_t i = 0; i < n; i++) b[i] = a[i];
  } else if (from == HALO_F64 && to == HALO_F32) {
    const double *a = x;
    float *b = y;
    for (int64_t i = 0; i < n; i++) b[i] = (float)a[i];
  } else if (to == HALO_I64 && is_integer(from)) {
    for (int64_t i = 0; i < n; i++) ((int64_t *)y)[i] = load_integer(x, from, i);
  } else {
    for (int64_t i = 0; i < n; i++) store_any(y, to, i, load_any(x, from, i));
  }
  return HALO_OK;
}

halo_status halo_cpu_fill(halo_dtype t, void *y, int64_t n, double value) {
  if (value == 0.0) {
    memset(y, 0, (size_t)(n * element_bytes(t)));
    return HALO_OK;
  }
  if (t == HALO_F32) {
    float *b = y;
    for (int64_t i = 0; i < n; i++) b[i] = (float)value;
    return HALO_OK;
  }
  for (int64_t i = 0; i < n; i++) store_any(y, t, i, value);
  return HALO_OK;
}

/* Drop dims of size 1 and merge neighbours that are contiguous with each other, so that the inner
 * loop is as long as possible. Returns the new number of dims (at least 1). */
static int32_t merge_dims(int32_t ndim, const int64_t *shape, const int64_t *stride, int64_t *s,
                          int64_t *d) {
  int32_t m = 0;
  for (int32_t i = 0; i < ndim; i++) {
    if (shape[i] == 1) continue;
    if (m > 0 && d[m - 1] == stride[i] * shape[i]) {
      s[m - 1] *= shape[i];
      d[m - 1] = stride[i];
    } else {
      s[m] = shape[i];
      d[m] = stride[i];
      m++;
    }
  }
  if (m == 0) {
    s[0] = 1;
    d[0] = 1;
    m = 1;
  }
  return m;
}

/* y_i = x_i for n elements that are steps (in elements) apart, by element size (only that
 * matters, see bits.h). */
static void copy_1(bits_8 *restrict y, int64_t dy, const bits_8 *restrict x, int64_t dx, int64_t n) {
  if (dx == 0) {
    const bits_8 v = x[0];
    for (int64_t i = 0; i < n; i++) y[i * dy] = v;
  } else {
    for (int64_t i = 0; i < n; i++) y[i * dy] = x[i * dx];
  }
}
static void copy_2(bits_16 *restrict y, int64_t dy, const bits_16 *restrict x, int64_t dx,
                   int64_t n) {
  if (dx == 0) {
    const bits_16 v = x[0];
    for (int64_t i = 0; i < n; i++) y[i * dy] = v;
  } else {
    for (int64_t i = 0; i < n; i++) y[i * dy] = x[i * dx];
  }
}
static void copy_4(bits_32 *restrict y, int64_t dy, const bits_32 *restrict x, int64_t dx,
                   int64_t n) {
  if (dx == 0) {
    const bits_32 v = x[0];
    for (int64_t i = 0; i < n; i++) y[i * dy] = v;
  } else {
    for (int64_t i = 0; i < n; i++) y[i * dy] = x[i * dx];
  }
}
static void copy_8(bits_64 *restrict y, int64_t dy, const bits_64 *restrict x, int64_t dx,
                   int64_t n) {
  if (dx == 0) {
    const bits_64 v = x[0];
    for (int64_t i = 0; i < n; i++) y[i * dy] = v;
  } else {
    for (int64_t i = 0; i < n; i++) y[i * dy] = x[i * dx];
  }
}

/* Copy one row of n elements; steps in elements. */
static void copy_row(void *y, int64_t y_step, const void *x, int64_t x_step, int64_t n,
                     int64_t bytes) {
  if (y_step == 1 && x_step == 1) {
    memcpy(y, x, (size_t)(n * bytes));
    return;
  }
  switch (bytes) {
  case 1: copy_1(y, y_step, x, x_step, n); break;
  case 2: copy_2(y, y_step, x, x_step, n); break;
  case 4: copy_4(y, y_step, x, x_step, n); break;
  default: copy_8(y, y_step, x, x_step, n); break;
  }
}

/* A strided side and its dense image, dims merged. */
typedef struct walk {
  char *dense, *strided;
  bool to_dense;
  int64_t bytes;
  int32_t ndim;
  int64_t shape[HALO_MAX_DIMS], stride[HALO_MAX_DIMS], dense_stride[HALO_MAX_DIMS];
} walk;

/* n elements along dim d from element offsets on both sides. */
static void copy_along(const walk *w, int32_t d, int64_t dense, int64_t strided, int64_t n) {
  void *a = w->dense + dense * w->bytes, *b = w->strided + strided * w->bytes;
  if (w->to_dense) {
    copy_row(a, w->dense_stride[d], b, w->stride[d], n, w->bytes);
  } else {
    copy_row(b, w->stride[d], a, w->dense_stride[d], n, w->bytes);
  }
}

/* Offsets of flat index `rest` over all dims but the last and `skip`. */
static void outer_offsets(const walk *w, int32_t skip, int64_t rest, int64_t *dense,
                          int64_t *strided) {
  *dense = *strided = 0;
  for (int32_t d = w->ndim - 2; d >= 0; d--) {
    if (d == skip) continue;
    *dense += rest % w->shape[d] * w->dense_stride[d];
    *strided += rest % w->shape[d] * w->stride[d];
    rest /= w->shape[d];
  }
}

/* Edge of the squares in which a transpose is done: 16 floats are a cache line. A square goes through a
 * buffer, so that each line of either side is touched once, whatever power of two the strides are. */
enum { SQUARE = 16 };

/* One square of rows x cols: row r of `from` is `from_step` elements further on and becomes column r of
 * `to`, whose rows are `to_step` apart. */
static void transpose_square(char *to, int64_t to_step, const char *from, int64_t from_step,
                             int64_t rows, int64_t cols, int64_t bytes) {
  uint64_t buffer[SQUARE * SQUARE];
  for (int64_t r = 0; r < rows; r++) {
    memcpy((char *)buffer + r * SQUARE * bytes, from + r * from_step * bytes,
           (size_t)(cols * bytes));
  }
  for (int64_t c = 0; c < cols; c++) {
    copy_row(to + c * to_step * bytes, 1, (char *)buffer + c * bytes, SQUARE, rows, bytes);
  }
}

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* The strided side is contiguous along dim q instead of the last one. */
static void transposed_copy(const walk *w, int32_t q) {
  const int32_t last = w->ndim - 1;
  const int64_t n_q = w->shape[q], n = w->shape[last], blocks = (n_q + SQUARE - 1) / SQUARE;
  int64_t outer = 1;
  for (int32_t d = 0; d < last; d++) outer *= d == q ? 1 : w->shape[d];
#pragma omp parallel for if (outer * n_q * n > 65536)
  for (int64_t k = 0; k < outer * blocks; k++) {
    int64_t dense, strided;
    outer_offsets(w, q, k / blocks, &dense, &strided);
    const int64_t first = k % blocks * SQUARE, length = min64(n_q - first, SQUARE);
    char *a = w->dense + (dense + first * w->dense_stride[q]) * w->bytes;
    char *b = w->strided + (strided + first) * w->bytes;
    for (int64_t i = 0; i < n; i += SQUARE) {
      char *to = a + i * w->bytes, *from = b + i * w->stride[last] * w->bytes;
      const int64_t width = min64(n - i, SQUARE);
      if (w->to_dense) {
        transpose_square(to, w->dense_stride[q], from, w->stride[last], width, length, w->bytes);
      } else {
        transpose_square(from, w->stride[last], to, w->dense_stride[q], length, width, w->bytes);
      }
    }
  }
}

/* Both directions walk the strided side; `to_dense` says where to. */
static void strided_copy(char *dense, char *strided, bool to_dense, int64_t bytes, int32_t ndim,
                         const int64_t *shape, const int64_t *stride) {
  walk w = {.dense = dense, .strided = strided, .to_dense = to_dense, .bytes = bytes};
  w.ndim = merge_dims(ndim, shape, stride, w.shape, w.stride);
  const int32_t last = w.ndim - 1;
  int64_t step = 1, rows = 1;
  for (int32_t d = last; d >= 0; d--) {
    w.dense_stride[d] = step;
    step *= w.shape[d];
    if (d < last) rows *= w.shape[d];
  }
  const int64_t inner = w.shape[last];
  for (int32_t q = 0; q < last; q++) {
    if (w.stride[q] == 1 && w.stride[last] != 1 && inner >= SQUARE && w.shape[q] >= SQUARE) {
      transposed_copy(&w, q);
      return;
    }
  }
#pragma omp parallel for if (rows * inner > 65536)
  for (int64_t row = 0; row < rows; row++) {
    int64_t from, to;
    outer_offsets(&w, -1, row, &from, &to);
    copy_along(&w, last, from, to, inner);
  }
}

static int64_t count_of(int32_t ndim, const int64_t *shape) {
  int64_t n = 1;
  for (int32_t i = 0; i < ndim; i++) n *= shape[i];
  return n;
}

halo_status halo_cpu_pack(void *y, const void *x, int64_t bytes, int32_t ndim, const int64_t *shape,
                          const int64_t *stride) {
  if (count_of(ndim, shape) > 0) strided_copy(y, (char *)x, true, bytes, ndim, shape, stride);
  return HALO_OK;
}

halo_status halo_cpu_unpack(void *y, const void *x, int64_t bytes, int32_t ndim,
                            const int64_t *shape, const int64_t *stride) {
  if (count_of(ndim, shape) > 0) strided_copy((char *)x, y, false, bytes, ndim, shape, stride);
  return HALO_OK;
}

halo_status halo_cpu_axpy(halo_dtype t, void *y, const void *x, int64_t n, double scale) {
  HALO_REAL_SWITCH(t, axpy, (y, x, n, (scale)));
}

halo_status halo_cpu_scale(halo_dtype t, void *y, int64_t n, double scale) {
  HALO_REAL_SWITCH(t, scale, (y, n, scale));
}
#else

static halo_status REAL(axpy)(real *restrict y, const real *restrict x, int64_t n, double scale) {
  const acc a = (acc)scale;
#pragma omp parallel for simd if (n > 65536)
  for (int64_t i = 0; i < n; i++) y[i] = STORE(LOAD(y[i]) + a * LOAD(x[i]));
  return HALO_OK;
}

static halo_status REAL(scale)(real *y, int64_t n, double scale) {
  const acc a = (acc)scale;
#pragma omp parallel for simd if (n > 65536)
  for (int64_t i = 0; i < n; i++) y[i] = STORE(a * LOAD(y[i]));
  return HALO_OK;
}
#endif
