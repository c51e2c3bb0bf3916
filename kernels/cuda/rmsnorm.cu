/* rmsnorm: root mean square normalisation of rows (Zhang and Sennrich 2019, arXiv 1910.07467).
 *
 *   r_i  = 1 / sqrt(mean_j x_ij^2 + eps)      y_ij = w_j x_ij r_i
 *   dx_i = r_i (w dy_i - x_i r_i^2 mean_j(w_j dy_ij x_ij))
 *   dw_j = sum_i dy_ij x_ij r_i
 *
 * shapes    x [rows,cols], rows ldx elements apart; y, dy, dx [rows,cols] contiguous; w, dw [cols];
 *           r [rows] in the arithmetic type
 * gradient  dx is written, dw is added to (+=) in its own dtype
 * launch    forward: up to 256 packs a row is a warp's, who holds it in registers; wider rows are a
 *           block's. backward: a block keeps w and its part of dw in registers and walks over
 *           groups of rows, so that one barrier serves R rows; rows of up to 16 or 32 packs
 *           (heads) are a half warp's or a warp's, several in flight. Partial rows of dw, one for each block, are added by sum_rows (linear.cu)
 * order     fixed by the sizes and the number of multiprocessors: on one kind of device equal inputs
 *           give equal bits
 * else      widths or strides without 16-byte packs, and rows of more than 1024 packs, take a path
 *           that reads rows twice
 * work      reads x and writes y; reads x, dy and writes dx: 4 and 6 bytes per element in bf16
 * twin      kernels/cpu/rmsnorm.c
 */
#include "vector.cuh"

namespace {

using namespace halo;

constexpr int THREADS = 256;

__device__ __forceinline__ float reciprocal_root(float sum, int64_t cols, double eps) {
  return 1.0f / sqrtf(sum / (float)cols + (float)eps);
}
__device__ __forceinline__ double reciprocal_root(double sum, int64_t cols, double eps) {
  return 1.0 / sqrt(sum / (double)cols + eps);
}

/* Sum over the LANES threads (32, or the whole block) that share a row. */
template <int LANES, class A> __device__ __forceinline__ A row_sum(A x) {
  if constexpr (LANES == 32) {
    return warp_sum(x);
  } else {
    return block_sum<LANES>(x);
  }
}

/* Sum over LANES neighbours of a warp, all of whose threads call it. */
template <int LANES, class A> __device__ __forceinline__ A lanes_sum(A x) {
#pragma unroll
  for (int o = LANES / 2; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

/* ---- forward ------------------------------------------------------------------------------- */

/* LANES threads a row, up to M packs each. */
template <class T, int LANES, int M>
__global__ void __launch_bounds__(THREADS)
    forward(T *__restrict__ y, acc_of<T> *__restrict__ rstd, const T *__restrict__ x, int64_t ldx,
            const T *__restrict__ w, int64_t rows, int cols, double eps) {
  using A = acc_of<T>;
  constexpr int N = lanes16<T>;
  const int64_t row = (int64_t)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
  if (row >= rows) return; // a whole warp, or never
  const int lane = threadIdx.x % LANES, packs = cols / N;
  few<T, N> v[M];
#pragma unroll
  for (int m = 0; m < M; m++) {
    const int c = lane + m * LANES;
    if (c < packs) v[m] = fetch<T, N>(x + row * ldx + c * N);
  }
  A sum = 0;
#pragma unroll
  for (int m = 0; m < M; m++) {
    if (lane + m * LANES >= packs) continue;
    A a[N];
    widen(a, v[m]);
#pragma unroll
    for (int k = 0; k < N; k++) sum += a[k] * a[k];
  }
  const A r = reciprocal_root(row_sum<LANES>(sum), cols, eps);
  if (rstd != nullptr && lane == 0) rstd[row] = r;
#pragma unroll
  for (int m = 0; m < M; m++) {
    const int c = lane + m * LANES;
    if (c >= packs) continue;
    A a[N], wv[N];
    widen(a, v[m]);
    widen(wv, fetch<T, N>(w + c * N));
#pragma unroll
    for (int k = 0; k < N; k++) a[k] = wv[k] * (a[k] * r);
    put<T, N>(y + row * cols + c * N, narrow<T, N>(a));
  }
}

/* Rows of at most LANES packs (16 or 32), R of them in flight in LANES threads. */
template <class T, int LANES, int R>
__global__ void __launch_bounds__(THREADS)
    forward_short(T *__restrict__ y, acc_of<T> *__restrict__ rstd, const T *__restrict__ x, int64_t ldx,
                  const T *__restrict__ w, int64_t rows, int cols, double eps) {
  using A = acc_of<T>;
  constexpr int N = lanes16<T>, GROUPS = THREADS / LANES;
  const int lane = threadIdx.x % LANES;
  const int64_t first = (int64_t)blockIdx.x * GROUPS * R + threadIdx.x / LANES;
  const bool is_in = lane < cols / N;
  few<T, N> v[R] = {}, scale = {};
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int64_t row = first + i * GROUPS;
    if (is_in && row < rows) v[i] = fetch<T, N>(x + row * ldx + lane * N);
  }
  if (is_in) scale = fetch<T, N>(w + lane * N);
  A wv[N];
  widen(wv, scale);
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int64_t row = first + i * GROUPS;
    A a[N], sum = 0;
    widen(a, v[i]);
#pragma unroll
    for (int k = 0; k < N; k++) sum += a[k] * a[k];
    const A root = reciprocal_root(lanes_sum<LANES>(sum), cols, eps);
    if (row >= rows) continue;
    if (rstd != nullptr && lane == 0) rstd[row] = root;
#pragma unroll
    for (int k = 0; k < N; k++) a[k] = wv[k] * (a[k] * root);
    if (is_in) put<T, N>(y + row * cols + lane * N, narrow<T, N>(a));
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    forward_any(T *__restrict__ y, acc_of<T> *__restrict__ rstd, const T *__restrict__ x, int64_t ldx,
                const T *__restrict__ w, int64_t cols, double eps) {
  using A = acc_of<T>;
  const int64_t row = blockIdx.x;
  A sum = 0;
  for (int64_t c = threadIdx.x; c < cols; c += THREADS) {
    const A a = load(x[row * ldx + c]);
    sum += a * a;
  }
  const A r = reciprocal_root(block_sum<THREADS>(sum), cols, eps);
  if (rstd != nullptr && threadIdx.x == 0) rstd[row] = r;
  for (int64_t c = threadIdx.x; c < cols; c += THREADS) {
    y[row * cols + c] = store<T>(load(w[c]) * (load(x[row * ldx + c]) * r));
  }
}

template <class T>
halo_status run_forward(T *y, acc_of<T> *rstd, const T *x, int64_t ldx, const T *w, int64_t rows, int64_t cols,
                        double eps) {
  constexpr int N = lanes16<T>;
  const cudaStream_t stream = halo__cuda_stream();
  const int64_t packs = cols / N;
  const unsigned by_warp = blocks_for(rows, THREADS / 32);
  const int n = (int)cols;
  if (!multiples(N, {cols, ldx}) || !aligned(16, {y, x, w}) || packs > 8 * THREADS) {
    forward_any<T><<<(unsigned)rows, THREADS, 0, stream>>>(y, rstd, x, ldx, w, cols, eps);
  } else if (packs <= 16) {
    forward_short<T, 16, 4><<<blocks_for(rows, 4 * THREADS / 16), THREADS, 0, stream>>>(y, rstd, x, ldx, w, rows, n,
                                                                                        eps);
  } else if (packs <= 32) {
    forward_short<T, 32, 4><<<blocks_for(rows, 4 * THREADS / 32), THREADS, 0, stream>>>(y, rstd, x, ldx, w, rows, n,
                                                                                        eps);
  } else if (packs <= 128) {
    forward<T, 32, 4><<<by_warp, THREADS, 0, stream>>>(y, rstd, x, ldx, w, rows, n, eps);
  } else if (packs <= 256) {
    forward<T, 32, 8><<<by_warp, THREADS, 0, stream>>>(y, rstd, x, ldx, w, rows, n, eps);
  } else if (packs <= 2 * THREADS) {
    forward<T, THREADS, 2><<<(unsigned)rows, THREADS, 0, stream>>>(y, rstd, x, ldx, w, rows, n, eps);
  } else if (packs <= 4 * THREADS) {
    forward<T, THREADS, 4><<<(unsigned)rows, THREADS, 0, stream>>>(y, rstd, x, ldx, w, rows, n, eps);
  } else {
    forward<T, THREADS, 8><<<(unsigned)rows, THREADS, 0, stream>>>(y, rstd, x, ldx, w, rows, n, eps);
  }
  HALO_LAUNCHED("rmsnorm_fwd");
  return HALO_OK;
}

/* ---- backward ------------------------------------------------------------------------------ */

/* What a block of the backward needs. partial [gridDim.x][cols], or NULL; dx may be NULL. */
template <class T> struct backward_args {
  T *dx;
  acc_of<T> *partial;
  const T *dy, *x, *w;
  const acc_of<T> *rstd;
  int64_t ldx, rows;
  int cols;
};

/* One row's share of a thread: its part of sum_j w dy x. */
template <class T, int N>
__device__ __forceinline__ acc_of<T> dot_part(const few<T, N> &w, const few<T, N> &dy, const few<T, N> &x) {
  acc_of<T> wv[N], dv[N], xv[N], dot = 0;
  widen(wv, w);
  widen(dv, dy);
  widen(xv, x);
#pragma unroll
  for (int k = 0; k < N; k++) dot += wv[k] * (dv[k] * xv[k]);
  return dot;
}

template <class T, int N>
__device__ __forceinline__ few<T, N> gradient_part(acc_of<T> (&dw)[N], const few<T, N> &w, const few<T, N> &dy,
                                                    const few<T, N> &x, acc_of<T> r, acc_of<T> shrink) {
  acc_of<T> wv[N], dv[N], xv[N];
  widen(wv, w);
  widen(dv, dy);
  widen(xv, x);
#pragma unroll
  for (int k = 0; k < N; k++) {
    dw[k] += dv[k] * xv[k] * r;
    wv[k] = r * (wv[k] * dv[k] - xv[k] * shrink);
  }
  return narrow<T, N>(wv);
}

/* Threads of the backward on one multiprocessor: as many as its registers allow without spilling. */
template <class T, int M> constexpr int resident = sizeof(T) == 8 || M > 2 ? 512 : 768;

/* A block of B threads, M packs of a row in each; R rows at a time. */
template <class T, int B, int M, int R>
__global__ void __launch_bounds__(B, resident<T, M> / B) backward(const backward_args<T> a) {
  using A = acc_of<T>;
  constexpr int N = lanes16<T>, WARPS = B / 32;
  __shared__ A parts[2][R][WARPS];
  const int packs = a.cols / N, warp = threadIdx.x / 32;
  few<T, N> w[M];
  A dw[M][N] = {};
#pragma unroll
  for (int m = 0; m < M; m++) {
    const int c = threadIdx.x + m * B;
    if (c < packs) w[m] = fetch<T, N>(a.w + c * N);
  }
  int turn = 0;
  for (int64_t first = (int64_t)blockIdx.x * R; first < a.rows; first += (int64_t)gridDim.x * R, turn ^= 1) {
    few<T, N> dy[R][M], x[R][M];
    A r[R], dot[R];
#pragma unroll
    for (int i = 0; i < R; i++) {
      r[i] = first + i < a.rows ? a.rstd[first + i] : 0;
#pragma unroll
      for (int m = 0; m < M; m++) {
        const int c = threadIdx.x + m * B;
        if (c >= packs || first + i >= a.rows) continue;
        dy[i][m] = fetch<T, N>(a.dy + (first + i) * a.cols + c * N);
        x[i][m] = fetch<T, N>(a.x + (first + i) * a.ldx + c * N);
      }
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
      dot[i] = 0;
#pragma unroll
      for (int m = 0; m < M; m++) {
        if (threadIdx.x + m * B < packs && first + i < a.rows) dot[i] += dot_part<T, N>(w[m], dy[i][m], x[i][m]);
      }
      dot[i] = warp_sum(dot[i]);
      if (threadIdx.x % 32 == 0) parts[turn][i][warp] = dot[i];
    }
    __syncthreads(); // the other half of `parts` is written next, so one barrier is enough
#pragma unroll
    for (int i = 0; i < R; i++) {
      A sum = 0;
#pragma unroll
      for (int k = 0; k < WARPS; k++) sum += parts[turn][i][k];
      const A shrink = sum * r[i] * r[i] / (A)a.cols;
#pragma unroll
      for (int m = 0; m < M; m++) {
        const int c = threadIdx.x + m * B;
        if (c >= packs || first + i >= a.rows) continue;
        const few<T, N> dx = gradient_part<T, N>(dw[m], w[m], dy[i][m], x[i][m], r[i], shrink);
        if (a.dx != nullptr) put<T, N>(a.dx + (first + i) * a.cols + c * N, dx);
      }
    }
  }
  if (a.partial == nullptr) return;
#pragma unroll
  for (int m = 0; m < M; m++) {
    const int c = threadIdx.x + m * B;
#pragma unroll
    for (int k = 0; k < N; k++) {
      if (c < packs) a.partial[(int64_t)blockIdx.x * a.cols + c * N + k] = dw[m][k];
    }
  }
}

/* Rows of at most LANES packs (16 or 32), R at a time in LANES threads. */
template <class T, int LANES, int R>
__global__ void __launch_bounds__(THREADS) backward_short(const backward_args<T> a) {
  using A = acc_of<T>;
  constexpr int N = lanes16<T>, GROUPS = THREADS / LANES;
  __shared__ A parts[GROUPS][LANES * N];
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const bool is_in = lane < a.cols / N;
  few<T, N> w = {};
  A dw[N] = {};
  if (is_in) w = fetch<T, N>(a.w + lane * N);
  const int64_t step = (int64_t)gridDim.x * GROUPS * R;
  const int64_t begin = (int64_t)blockIdx.x * GROUPS * R;
  for (int64_t base = begin; base < a.rows; base += step) { // the same turns for all threads of a warp
    const int64_t first = base + group * R;
    few<T, N> dy[R], x[R];
    A r[R];
#pragma unroll
    for (int i = 0; i < R; i++) {
      r[i] = first + i < a.rows ? a.rstd[first + i] : 0;
      if (!is_in || first + i >= a.rows) continue;
      dy[i] = fetch<T, N>(a.dy + (first + i) * a.cols + lane * N);
      x[i] = fetch<T, N>(a.x + (first + i) * a.ldx + lane * N);
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
      const bool is_here = is_in && first + i < a.rows;
      const A dot = lanes_sum<LANES>(is_here ? dot_part<T, N>(w, dy[i], x[i]) : (A)0);
      if (!is_here) continue;
      const few<T, N> dx = gradient_part<T, N>(dw, w, dy[i], x[i], r[i], dot * r[i] * r[i] / (A)a.cols);
      if (a.dx != nullptr) put<T, N>(a.dx + (first + i) * a.cols + lane * N, dx);
    }
  }
  if (a.partial == nullptr) return;
#pragma unroll
  for (int k = 0; k < N; k++) parts[group][lane * N + k] = dw[k];
  __syncthreads();
  for (int c = threadIdx.x; c < a.cols; c += THREADS) {
    A sum = 0;
#pragma unroll
    for (int k = 0; k < GROUPS; k++) sum += parts[k][c];
    a.partial[(int64_t)blockIdx.x * a.cols + c] = sum;
  }
}

/* Any width: dx a row a block, then partial rows of dw, 256 columns a block. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    backward_any_dx(T *__restrict__ dx, const T *__restrict__ dy, const T *__restrict__ x, int64_t ldx,
                    const T *__restrict__ w, const acc_of<T> *__restrict__ rstd, int64_t cols) {
  using A = acc_of<T>;
  const int64_t row = blockIdx.x;
  A dot = 0;
  for (int64_t c = threadIdx.x; c < cols; c += THREADS) {
    dot += load(w[c]) * (load(dy[row * cols + c]) * load(x[row * ldx + c]));
  }
  const A r = rstd[row], shrink = block_sum<THREADS>(dot) * r * r / (A)cols;
  for (int64_t c = threadIdx.x; c < cols; c += THREADS) {
    dx[row * cols + c] = store<T>(r * (load(w[c]) * load(dy[row * cols + c]) - load(x[row * ldx + c]) * shrink));
  }
}
template <class T>
__global__ void __launch_bounds__(THREADS)
    backward_any_dw(acc_of<T> *__restrict__ partial, const T *__restrict__ dy, const T *__restrict__ x, int64_t ldx,
                    const acc_of<T> *__restrict__ rstd, int64_t rows, int64_t run, int64_t cols) {
  const int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x, first = blockIdx.y * run;
  if (c >= cols) return;
  acc_of<T> sum = 0;
  for (int64_t i = first; i < first + run && i < rows; i++) {
    sum += load(dy[i * cols + c]) * load(x[i * ldx + c]) * rstd[i];
  }
  partial[blockIdx.y * cols + c] = sum;
}

/* How the blocks of a backward are cut. */
enum shape_kind { SHORT_16, SHORT_32, ONE_64, ONE_128, ONE_256, TWO, FOUR, ANY };

template <class T> shape_kind kind_of(const backward_args<T> &a, int64_t cols) {
  constexpr int N = lanes16<T>;
  const int64_t packs = cols / N;
  if (!multiples(N, {cols, a.ldx}) || !aligned(16, {a.dx, a.dy, a.x, a.w}) || packs > 4 * THREADS) return ANY;
  if (packs <= 32) return packs <= 16 ? SHORT_16 : SHORT_32;
  if (packs <= 64) return ONE_64;
  if (packs <= 128) return ONE_128;
  return packs <= 256 ? ONE_256 : packs <= 512 ? TWO : FOUR;
}

/* Rows that a block takes at a time, and its threads. */
struct block_shape {
  int rows, threads;
};
block_shape shape_of(shape_kind kind) {
  switch (kind) {
  case SHORT_16: return {4 * THREADS / 16, THREADS};
  case SHORT_32: return {4 * THREADS / 32, THREADS};
  case ONE_64: return {4, 64};
  case ONE_128: return {4, 128};
  case ONE_256: return {4, 256};
  case TWO: return {2, 256};
  case FOUR: return {1, 256};
  default: return {64, THREADS};
  }
}

template <class T> halo_status launch_backward(const backward_args<T> &a, shape_kind kind, unsigned blocks) {
  const cudaStream_t stream = halo__cuda_stream();
  switch (kind) {
  case SHORT_16: backward_short<T, 16, 4><<<blocks, THREADS, 0, stream>>>(a); break;
  case SHORT_32: backward_short<T, 32, 4><<<blocks, THREADS, 0, stream>>>(a); break;
  case ONE_64: backward<T, 64, 1, 4><<<blocks, 64, 0, stream>>>(a); break;
  case ONE_128: backward<T, 128, 1, 4><<<blocks, 128, 0, stream>>>(a); break;
  case ONE_256: backward<T, 256, 1, 4><<<blocks, 256, 0, stream>>>(a); break;
  case TWO: backward<T, 256, 2, 2><<<blocks, 256, 0, stream>>>(a); break;
  default: backward<T, 256, 4, 1><<<blocks, 256, 0, stream>>>(a); break;
  }
  HALO_LAUNCHED("rmsnorm_bwd");
  return HALO_OK;
}

template <class T> halo_status launch_any(const backward_args<T> &a, int64_t cols, int64_t blocks) {
  const cudaStream_t stream = halo__cuda_stream();
  if (a.dx != nullptr) {
    backward_any_dx<T><<<(unsigned)a.rows, THREADS, 0, stream>>>(a.dx, a.dy, a.x, a.ldx, a.w, a.rstd, cols);
    HALO_LAUNCHED("rmsnorm_bwd, dx");
  }
  if (a.partial != nullptr) {
    const int64_t run = (a.rows + blocks - 1) / blocks;
    backward_any_dw<T><<<dim3(blocks_for(cols, THREADS), (unsigned)blocks), THREADS, 0, stream>>>(
        a.partial, a.dy, a.x, a.ldx, a.rstd, a.rows, run, cols);
    HALO_LAUNCHED("rmsnorm_bwd, dw");
  }
  return HALO_OK;
}

template <class T>
halo_status run_backward(backward_args<T> a, halo_dtype tw, void *dw, int64_t cols) {
  const shape_kind kind = kind_of(a, cols);
  const block_shape shape = shape_of(kind);
  const int64_t groups = (a.rows + shape.rows - 1) / shape.rows;
  const int64_t most = (int64_t)halo__cuda_device()->multiprocessors * (768 / shape.threads);
  const int64_t blocks = groups < most ? groups : most;
  a.cols = (int)cols;
  if (dw != nullptr) HALO_TRY(halo__alloc((void **)&a.partial, blocks * cols * (int64_t)sizeof(acc_of<T>), HALO_CUDA));
  halo_status status = kind == ANY ? launch_any(a, cols, blocks) : launch_backward(a, kind, (unsigned)blocks);
  if (status == HALO_OK && dw != nullptr) {
    const halo_dtype wide = sizeof(acc_of<T>) == 8 ? HALO_F64 : HALO_F32;
    status = halo_cuda_sum_rows(tw, dw, wide, a.partial, cols, blocks, cols, 1.0);
  }
  if (a.partial != nullptr) halo__free(a.partial);
  return status;
}

} // namespace

halo_status halo_cuda_rmsnorm_fwd(halo_dtype t, void *y, void *rstd, const void *x, int64_t ldx, const void *w,
                                  int64_t rows, int64_t cols, double eps) {
  if (rows <= 0 || cols <= 0) return HALO_OK;
  HALO_CHECK(rows < index_limit && cols < index_limit, HALO_EUNSUPPORTED,
             "rmsnorm: %lld rows of %lld; fewer than 2^31 of each on cuda", (long long)rows, (long long)cols);
  HALO_REAL(t, T,
            return (run_forward<T>((T *)y, (acc_of<T> *)rstd, (const T *)x, ldx, (const T *)w, rows, cols, eps)));
  return HALO_OK;
}

halo_status halo_cuda_rmsnorm_bwd(halo_dtype t, void *dx, halo_dtype tw, void *dw, const void *dy, const void *x,
                                  int64_t ldx, const void *w, const void *rstd, int64_t rows, int64_t cols) {
  if (rows <= 0 || cols <= 0 || (dx == nullptr && dw == nullptr)) return HALO_OK;
  HALO_CHECK(rows < index_limit && cols < index_limit, HALO_EUNSUPPORTED,
             "rmsnorm: %lld rows of %lld; fewer than 2^31 of each on cuda", (long long)rows, (long long)cols);
  HALO_REAL(t, T, {
    const backward_args<T> a = {(T *)dx, nullptr, (const T *)dy, (const T *)x, (const T *)w,
                                (const acc_of<T> *)rstd, ldx, rows, 0};
    return (run_backward<T>(a, tw, dw, cols));
  });
  return HALO_OK;
}
