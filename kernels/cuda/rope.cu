/* rope: rotary position embedding, and its table of angles (Su et al., arXiv 2104.09864).
 *
 *   a_pj = pos_p * f_j                       cos, sin [p,j] = scale * cos a_pj, scale * sin a_pj
 *   y_j     = x_j cos_j - x_{j+R} sin_j      j < R, half-split pairs (j, j+R)
 *   y_{j+R} = x_{j+R} cos_j + x_j sin_j      elements past 2R are copied
 *
 * shapes    x, y [B,T,H,D]; cos, sin [B or 1,T,R] in the arithmetic type; 2R <= D
 * layout    x: D contiguous, strides in elements for B, T, H; y contiguous, and may be x itself
 * launch    a thread turns one pack of pairs in HEADS neighbouring heads, with the angles in
 *           registers: 2 * HEADS loads in flight, and the table is read once for HEADS heads
 * numbers   angles as on the CPU: rounded to fp32 unless exact, then cos and sin in fp64
 * twin      kernels/cpu/rope.c
 */
#include "vector.cuh"

namespace {

using namespace halo;

constexpr int THREADS = 256, HEADS = 4;

/* An item is (batch and token, group of heads, pack of pairs), packs fastest. */
struct layout {
  int64_t items, tokens, heads, size, half, table_stride;
  int64_t stride[3];
  divider by_pack, by_group, by_token;
};

/* No restrict: y may be x. Every element is read and written by one thread, the read first. */
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    rotate(T *y, const T *x, const acc_of<T> *__restrict__ cosines, const acc_of<T> *__restrict__ sines,
           const __grid_constant__ layout l, int64_t first_row, acc_of<T> sign) {
  using A = acc_of<T>;
  const uint32_t item = blockIdx.x * THREADS + threadIdx.x;
  if (item >= l.items) return;
  const uint32_t line = l.by_pack.quotient(item), j = (item - line * l.by_pack.d) * N;
  const uint32_t row_here = l.by_group.quotient(line), h0 = (line - row_here * l.by_group.d) * HEADS;
  const uint32_t line_of_x = (uint32_t)first_row + row_here; // batch * tokens + token
  const int64_t row = line_of_x, b = l.by_token.quotient(line_of_x), p = row - b * l.tokens;
  const T *from = x + b * l.stride[0] + p * l.stride[1] + h0 * l.stride[2] + j;
  T *to = y + (row * l.heads + h0) * l.size + j;
  few<T, N> lo[HEADS], hi[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    if (h0 + h >= l.heads) continue;
    lo[h] = fetch<T, N>(from + h * l.stride[2]);
    hi[h] = fetch<T, N>(from + h * l.stride[2] + l.half);
  }
  A c[N], s[N];
  const int64_t at = b * l.table_stride + p * l.half + j;
#pragma unroll
  for (int k = 0; k < N; k++) {
    c[k] = cosines[at + k];
    s[k] = sign * sines[at + k];
  }
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    if (h0 + h >= l.heads) continue;
    A a[N], z[N];
    widen(a, lo[h]);
    widen(z, hi[h]);
#pragma unroll
    for (int k = 0; k < N; k++) {
      const A low = a[k] * c[k] - z[k] * s[k];
      z[k] = z[k] * c[k] + a[k] * s[k];
      a[k] = low;
    }
    put<T, N>(to + h * l.size, narrow<T, N>(a));
    put<T, N>(to + h * l.size + l.half, narrow<T, N>(z));
  }
}

/* Elements past the pairs. */
template <class T>
__global__ void __launch_bounds__(THREADS) copy_rest(T *y, const T *x, const __grid_constant__ layout l, int64_t n) {
  const int64_t rest = l.size - 2 * l.half, step = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += step) {
    const int64_t line = i / rest, j = 2 * l.half + i % rest, row = line / l.heads, h = line % l.heads;
    y[line * l.size + j] =
        x[row / l.tokens * l.stride[0] + row % l.tokens * l.stride[1] + h * l.stride[2] + j];
  }
}

template <class T, int N>
halo_status rotate_all(T *y, const T *x, const acc_of<T> *c, const acc_of<T> *s, layout *l, int64_t rows,
                       double sign) {
  const int64_t packs = l->half / N, groups = (l->heads + HEADS - 1) / HEADS;
  int64_t most = 0;
  HALO_TRY(rows_at_once(&most, packs * groups));
  l->by_pack = divider((uint32_t)packs);
  l->by_group = divider((uint32_t)groups);
  l->by_token = divider((uint32_t)l->tokens);
  for (int64_t r = 0; r < rows; r += most) {
    l->items = (rows - r < most ? rows - r : most) * packs * groups;
    rotate<T, N><<<blocks_for(l->items, THREADS), THREADS, 0, halo__cuda_stream()>>>(y, x, c, s, *l, r,
                                                                                     (acc_of<T>)sign);
    HALO_LAUNCHED("rope");
  }
  return HALO_OK;
}

template <class T>
halo_status run(T *y, const T *x, const acc_of<T> *c, const acc_of<T> *s, layout *l, int64_t rows, double sign) {
  constexpr int N = lanes16<T>;
  if (l->half > 0) {
    const bool is_wide = multiples(N, {l->half, l->size, l->stride[0], l->stride[1], l->stride[2]}) &&
                         aligned(16, {y, x});
    HALO_TRY(is_wide ? (rotate_all<T, N>(y, x, c, s, l, rows, sign))
                     : (rotate_all<T, 1>(y, x, c, s, l, rows, sign)));
  }
  const int64_t rest = rows * l->heads * (l->size - 2 * l->half);
  if (rest == 0 || y == x) return HALO_OK;
  copy_rest<T><<<grid(rest, THREADS), THREADS, 0, halo__cuda_stream()>>>(y, x, *l, rest);
  HALO_LAUNCHED("rope, rest");
  return HALO_OK;
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    table(T *__restrict__ cosines, T *__restrict__ sines, const int32_t *p32, const int64_t *p64, const float *f32,
          const double *f64, int64_t n, int64_t half, double scale, bool is_exact) {
  const int64_t step = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n * half; i += step) {
    const int64_t p = i / half, j = i - p * half;
    const double position = p64 != nullptr ? (double)p64[p] : (double)p32[p];
    const double f = f64 != nullptr ? f64[j] : (double)f32[j];
    const double angle = is_exact ? position * f : (double)((float)position * (float)f);
    double s, c;
    sincos(angle, &s, &c);
    cosines[i] = store<T>((acc_of<T>)(scale * c));
    sines[i] = store<T>((acc_of<T>)(scale * s));
  }
}

} // namespace

halo_status halo_cuda_rope_table(halo_dtype t, void *cos_out, void *sin_out, halo_dtype tp, const void *positions,
                                 halo_dtype tf, const void *inv_freq, int64_t n, int64_t half, double scale,
                                 int32_t exact) {
  if (n <= 0 || half <= 0) return HALO_OK;
  const bool is_wide = tp == HALO_I64, is_double = tf == HALO_F64;
  HALO_REAL(t, T,
            table<T><<<grid(n * half, THREADS), THREADS, 0, halo__cuda_stream()>>>(
                (T *)cos_out, (T *)sin_out, is_wide ? nullptr : (const int32_t *)positions,
                is_wide ? (const int64_t *)positions : nullptr, is_double ? nullptr : (const float *)inv_freq,
                is_double ? (const double *)inv_freq : nullptr, n, half, scale, exact != 0));
  HALO_LAUNCHED("rope_table");
  return HALO_OK;
}

halo_status halo_cuda_rope(halo_dtype t, void *y, const void *x, const int64_t *stride, const void *cos_table,
                           const void *sin_table, int64_t table_stride, int64_t batch, int64_t tokens, int64_t heads,
                           int64_t size, int64_t half, double sign) {
  if (batch <= 0 || tokens <= 0 || heads <= 0 || size <= 0) return HALO_OK;
  HALO_CHECK(batch * tokens < index_limit, HALO_EUNSUPPORTED, "rope: %lld tokens; fewer than 2^31 on cuda",
             (long long)(batch * tokens));
  layout l = {};
  l.tokens = tokens;
  l.heads = heads;
  l.size = size;
  l.half = half;
  l.table_stride = table_stride;
  for (int i = 0; i < 3; i++) l.stride[i] = stride[i];
  HALO_REAL(t, T,
            return (run<T>((T *)y, (const T *)x, (const acc_of<T> *)cos_table, (const acc_of<T> *)sin_table, &l,
                           batch * tokens, sign)));
  return HALO_OK;
}
