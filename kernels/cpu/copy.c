/* copy.c: moving and converting elements; the only place where dtypes meet.
 *
 * convert goes through fp64 for pairs that are not on the fast list (f32 <-> bf16, f32 <-> f64 and
 * equal types), which is exact for every pair but i64 values beyond 2^53 on their way to a float.
 * Float to bf16 rounds to nearest even, float to integer truncates toward zero and saturates.
 */
#define HALO_EACH_REAL_FILE "cpu/copy.c"
#ifndef HALO_REAL_PASS
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

/* Copy one row of n elements; the four element sizes get their own loop. */
static void copy_row(char *y, int64_t y_step, const char *x, int64_t x_step, int64_t n,
                     int64_t bytes) {
  if (y_step == bytes && x_step == bytes) {
    memcpy(y, x, (size_t)(n * bytes));
    return;
  }
  for (int64_t i = 0; i < n; i++) {
    switch (bytes) {
    case 1: *y = *x; break;
    case 2: memcpy(y, x, 2); break;
    case 4: memcpy(y, x, 4); break;
    default: memcpy(y, x, 8); break;
    }
    y += y_step;
    x += x_step;
  }
}

/* Both directions walk the strided side; `strided` says which one it is. */
static void strided_copy(char *dense, char *strided, bool to_dense, int64_t bytes, int32_t ndim,
                         const int64_t *shape, const int64_t *stride) {
  int64_t s[HALO_MAX_DIMS], d[HALO_MAX_DIMS];
  const int32_t m = merge_dims(ndim, shape, stride, s, d);
  const int64_t inner = s[m - 1], inner_step = d[m - 1] * bytes;
  int64_t rows = 1;
  for (int32_t i = 0; i < m - 1; i++) rows *= s[i];
#pragma omp parallel for if (rows * inner > 65536)
  for (int64_t row = 0; row < rows; row++) {
    int64_t rest = row, offset = 0;
    for (int32_t i = m - 2; i >= 0; i--) {
      offset += rest % s[i] * d[i];
      rest /= s[i];
    }
    char *a = dense + row * inner * bytes, *b = strided + offset * bytes;
    if (to_dense) {
      copy_row(a, bytes, b, inner_step, inner, bytes);
    } else {
      copy_row(b, inner_step, a, bytes, inner, bytes);
    }
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
