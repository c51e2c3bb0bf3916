/* linear: what a linear layer needs beside the product (gemm.cu): the bias and its gradient.
 *
 *   y_ij = b_j                 y_j = beta * y_j + sum_i x_ij
 *
 * shapes    x, y [rows,cols], rows ld elements apart; b, y [cols]
 * numbers   sums are fp64 as on the CPU, since the gradient of a key bias nearly cancels. bf16 is added
 *           in fp32 eight rows at a time first: eight numbers of 8 bits whose exponents differ by
 *           less than 13 add without any rounding
 * order     warps of a block take turns down the rows, blocks take runs of rows that depend on the
 *           sizes alone; both are added in order: equal inputs, equal bits
 * launch    a warp covers 32 packs of columns; 8 rows of each warp are in flight. Tall sums go through
 *           partial rows in fp64 and the same kernel once more
 * twin      kernels/cpu/linear.c
 */
#include "vector.cuh"

namespace {

using namespace halo;

constexpr int THREADS = 256, WARPS = THREADS / 32, AHEAD = 8;

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    bias_kernel(T *__restrict__ y, int64_t ld, const T *__restrict__ b, uint32_t packs, divider by) {
  constexpr int U = 4;
  const uint32_t base = blockIdx.x * THREADS * U + threadIdx.x;
#pragma unroll
  for (int u = 0; u < U; u++) {
    const uint32_t i = base + u * THREADS;
    if (i >= packs) continue;
    const uint32_t row = by.quotient(i), c = i - row * by.d;
    put<T, N>(y + row * ld + c * N, fetch<T, N>(b + c * N));
  }
}

template <class T, int N>
halo_status bias(T *y, int64_t ld, const T *b, int64_t rows, int64_t cols) {
  const int64_t packs = cols / N;
  int64_t most = 0;
  HALO_TRY(rows_at_once(&most, packs));
  for (int64_t r = 0; r < rows; r += most) {
    const int64_t n = rows - r < most ? rows - r : most;
    bias_kernel<T, N><<<blocks_for(n * packs, THREADS * 4), THREADS, 0, halo__cuda_stream()>>>(
        y + r * ld, ld, b, (uint32_t)(n * packs), divider((uint32_t)packs));
    HALO_LAUNCHED("bias_rows");
  }
  return HALO_OK;
}

/* Writes y (partial NULL) or partial[blockIdx.y][cols]. Rows of a block: `run` from blockIdx.y * run. */
template <class T, class TY, int N>
__global__ void __launch_bounds__(THREADS)
    sum_kernel(TY *__restrict__ y, double *__restrict__ partial, const T *__restrict__ x, int64_t ld, int64_t rows,
               int64_t cols, int64_t run, double beta) {
  __shared__ double part[WARPS][32 * N];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t strip = (int64_t)blockIdx.x * 32 * N, c = strip + lane * N;
  const int64_t first = (int64_t)blockIdx.y * run, end = first + run < rows ? first + run : rows;
  double sum[N] = {};
  if (c < cols) {
    for (int64_t r = first + warp; r < end; r += WARPS * AHEAD) {
      few<T, N> v[AHEAD];
#pragma unroll
      for (int u = 0; u < AHEAD; u++) {
        const int64_t row = r + u * WARPS;
        v[u] = few<T, N>{};
        if (row < end) v[u] = fetch<T, N>(x + row * ld + c);
      }
      if constexpr (sizeof(T) == 2) {
        float eight[N] = {};
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
#pragma unroll
          for (int k = 0; k < N; k++) eight[k] += value(v[u], k);
        }
#pragma unroll
        for (int k = 0; k < N; k++) sum[k] += (double)eight[k];
      } else {
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
#pragma unroll
          for (int k = 0; k < N; k++) sum[k] += (double)value(v[u], k);
        }
      }
    }
  }
#pragma unroll
  for (int k = 0; k < N; k++) part[warp][lane * N + k] = sum[k];
  __syncthreads();
  for (int j = threadIdx.x; j < 32 * N && strip + j < cols; j += THREADS) {
    double total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += part[w][j];
    if (partial != nullptr) {
      partial[blockIdx.y * cols + strip + j] = total;
    } else {
      using A = acc_of<TY>;
      TY *target = y + strip + j;
      const A old = beta == 0 ? (A)0 : (A)beta * load(*target);
      *target = store<TY>(old + (A)total);
    }
  }
}

template <class T, class TY, int N>
halo_status sum_strips(TY *y, double *partial, const T *x, int64_t ld, int64_t rows, int64_t cols, int64_t runs,
                       double beta) {
  const int64_t run = rows > 0 ? (rows + runs - 1) / runs : 1;
  const dim3 blocks(blocks_for(cols, 32 * N), rows > 0 ? blocks_for(rows, run) : 1);
  sum_kernel<T, TY, N><<<blocks, THREADS, 0, halo__cuda_stream()>>>(y, partial, x, ld, rows, cols, run, beta);
  HALO_LAUNCHED("sum_rows");
  return HALO_OK;
}

template <class T, class TY>
halo_status sum(TY *y, const T *x, int64_t ld, int64_t rows, int64_t cols, double beta) {
  constexpr int N = lanes16<T>, SHORT = 512; // rows that need no second stage
  if (rows <= SHORT) return sum_strips<T, TY, 1>(y, nullptr, x, ld, rows, cols, 1, beta);
  const bool is_wide = multiples(N, {cols, ld}) && aligned(16, {x});
  const int64_t strips = (cols + (is_wide ? 32 * N : 32) - 1) / (is_wide ? 32 * N : 32);
  int64_t runs = 1056 / strips; // two blocks for each place on 132 multiprocessors, four on each
  runs = runs < 1 ? 1 : runs > rows / 64 ? rows / 64 : runs;
  const int64_t run = (rows + runs - 1) / runs;
  runs = (rows + run - 1) / run;
  double *partial = nullptr;
  HALO_TRY(halo__alloc((void **)&partial, runs * cols * 8, HALO_CUDA));
  halo_status status = is_wide ? sum_strips<T, TY, N>(y, partial, x, ld, rows, cols, runs, beta)
                               : sum_strips<T, TY, 1>(y, partial, x, ld, rows, cols, runs, beta);
  if (status == HALO_OK) status = sum_strips<double, TY, 1>(y, nullptr, partial, cols, runs, cols, 1, beta);
  halo__free(partial);
  return status;
}

} // namespace

halo_status halo_cuda_bias_rows(halo_dtype t, void *y, int64_t ld, const void *b, int64_t rows, int64_t cols) {
  if (rows <= 0 || cols <= 0) return HALO_OK;
  HALO_REAL(t, T, {
    constexpr int N = lanes16<T>;
    if (multiples(N, {ld, cols}) && aligned(16, {y, b})) return (bias<T, N>((T *)y, ld, (const T *)b, rows, cols));
    return (bias<T, 1>((T *)y, ld, (const T *)b, rows, cols));
  });
  return HALO_OK;
}

halo_status halo_cuda_sum_rows(halo_dtype ty, void *y, halo_dtype t, const void *x, int64_t ld, int64_t rows,
                               int64_t cols, double beta) {
  if (cols <= 0) return HALO_OK;
  HALO_REAL(t, T, {
    if (ty == HALO_BF16) return (sum<T, __nv_bfloat16>((__nv_bfloat16 *)y, (const T *)x, ld, rows, cols, beta));
    return (sum<T, acc_of<T>>((acc_of<T> *)y, (const T *)x, ld, rows, cols, beta));
  });
  return HALO_OK;
}
