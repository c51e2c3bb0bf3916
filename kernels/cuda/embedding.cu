/* embedding: rows of a table by token id.
 *
 *   y_i = w[id_i]              dw[id_i] += dy_i
 *
 * shapes    w, dw [V,E]; ids [n]; y, dy [n,E]; all contiguous
 * gradient  without atomics on numbers: token positions are sorted by id (stable, CUB's radix sort), the
 *           sorted list is cut into pieces of equal length, and a block walks one piece:
 *
 *             sorted ids   | 3 3 7 7 | 7 7 7 7 | 7 9 9 12 |        pieces of 4
 *                            ---       open      open ---
 *
 *           Runs of one id inside a piece are summed in registers and added to dw by the only block that
 *           knows them. A run that crosses pieces leaves one partial row in each; a second kernel
 *           adds those in order. Pieces depend on n alone, so equal inputs give equal bits, and a token
 *           that fills the whole batch (padding) is still summed by many blocks.
 * numbers   sums in the arithmetic type, added to dw once: with dw in bf16 that rounds once a
 *           call, where the CPU rounds once a token
 * errors    an id outside [0,V): the forward reports it and writes zeros, the gradient leaves it out
 * work      forward E elements read and written per token; gradient E read per token, and dw read
 *           and written once per distinct id
 * twin      kernels/cpu/embedding.c
 */
#include <cub/device/device_radix_sort.cuh>

#include "vector.cuh"

namespace {

using namespace halo;

constexpr int FORWARD_THREADS = 128, FORWARD_ROWS = 4;

__device__ __forceinline__ int64_t id_at(const int32_t *i32, const int64_t *i64, int64_t i) {
  return i32 != nullptr ? i32[i] : i64[i];
}

/* Rows as V-typed units; a block copies FORWARD_ROWS rows. */
template <class V>
__global__ void __launch_bounds__(FORWARD_THREADS)
    gather_rows(V *__restrict__ y, const V *__restrict__ w, const int32_t *i32, const int64_t *i64, int64_t n,
                int64_t vocab, int64_t units, halo__cuda_report *report_slot) {
  const int64_t first = (int64_t)blockIdx.x * FORWARD_ROWS;
  int64_t id[FORWARD_ROWS];
  bool is_good[FORWARD_ROWS];
#pragma unroll
  for (int r = 0; r < FORWARD_ROWS; r++) {
    id[r] = first + r < n ? id_at(i32, i64, first + r) : 0;
    is_good[r] = id[r] >= 0 && id[r] < vocab;
    if (!is_good[r] && threadIdx.x == 0) report(report_slot, HALO__CUDA_TOKEN_ID, first + r, id[r], vocab);
  }
  for (int64_t c = threadIdx.x; c < units; c += FORWARD_THREADS) {
    V v[FORWARD_ROWS];
#pragma unroll
    for (int r = 0; r < FORWARD_ROWS; r++) {
      v[r] = V{};
      if (is_good[r] && first + r < n) v[r] = w[id[r] * units + c];
    }
#pragma unroll
    for (int r = 0; r < FORWARD_ROWS; r++) {
      if (first + r < n) y[(first + r) * units + c] = v[r];
    }
  }
}

template <class V>
halo_status gather(void *y, const void *w, const int32_t *i32, const int64_t *i64, int64_t n, int64_t vocab,
                   int64_t bytes) {
  gather_rows<V><<<blocks_for(n, FORWARD_ROWS), FORWARD_THREADS, 0, halo__cuda_stream()>>>(
      (V *)y, (const V *)w, i32, i64, n, vocab, bytes / (int64_t)sizeof(V), halo__cuda_report_slot());
  HALO_LAUNCHED("embedding_fwd");
  return HALO_OK;
}

/* ---- gradient ------------------------------------------------------------------------------ */

constexpr int THREADS = 128, MAX_PIECE = 1024, AHEAD = 8;

/* Key of a position: its id, or `vocab` for an id that is not one, which sorts behind all others. */
__global__ void sort_keys(uint32_t *__restrict__ key, int32_t *__restrict__ position, const int32_t *i32,
                          const int64_t *i64, int64_t n, int64_t vocab) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const int64_t id = id_at(i32, i64, i);
  key[i] = (uint32_t)(id >= 0 && id < vocab ? id : vocab);
  position[i] = (int32_t)i;
}

template <class TW, int N>
__device__ __forceinline__ void add_to_row(TW *row, const acc_of<TW> (&sum)[N]) {
  acc_of<TW> a[N];
  const few<TW, N> old = fetch<TW, N>(row);
  widen(a, old);
#pragma unroll
  for (int k = 0; k < N; k++) a[k] += sum[k];
  put<TW, N>(row, narrow<TW, N>(a));
}

/* Elements of a column chunk handled by one thread: packs of N of dy, in dw and in partial rows as
 * several accesses of at most 16 bytes. */
template <class T, int N> __device__ __forceinline__ void add_sums(T *row, const acc_of<T> (&sum)[N]) {
  constexpr int M = N < lanes16<T> ? N : lanes16<T>;
#pragma unroll
  for (int j = 0; j < N; j += M) {
    acc_of<T> part[M];
#pragma unroll
    for (int k = 0; k < M; k++) part[k] = sum[j + k];
    add_to_row<T, M>(row + j, part);
  }
}
template <class A, int N> __device__ __forceinline__ void write_sums(A *row, const A (&sum)[N]) {
  constexpr int M = N < lanes16<A> ? N : lanes16<A>;
#pragma unroll
  for (int j = 0; j < N; j += M) {
    few<A, M> v;
#pragma unroll
    for (int k = 0; k < M; k++) v.at[k] = sum[j + k];
    put<A, M>(row + j, v);
  }
}

/* Piece blockIdx.x of `length` sorted positions, columns of blockIdx.y. partial [pieces][2][cols]: the
 * run that came from the piece before, and the run that goes on into the next. */
template <class T, class TW, int N>
__global__ void __launch_bounds__(THREADS)
    sum_pieces(TW *__restrict__ dw, acc_of<T> *__restrict__ partial, const T *__restrict__ dy,
               const uint32_t *__restrict__ key, const int32_t *__restrict__ position, int64_t n, int length,
               uint32_t vocab, int64_t cols) {
  using A = acc_of<T>;
  __shared__ uint32_t keys[MAX_PIECE + 2]; // one before and one after the piece
  __shared__ int32_t from[MAX_PIECE];
  const int64_t start = (int64_t)blockIdx.x * length;
  const int count = (int)(n - start < length ? n - start : length);
  for (int i = threadIdx.x; i < count + 2; i += THREADS) {
    const int64_t at = start + i - 1;
    keys[i] = at >= 0 && at < n ? key[at] : UINT32_MAX;
    if (i < count) from[i] = position[start + i];
  }
  __syncthreads();
  const int64_t c = ((int64_t)blockIdx.y * THREADS + threadIdx.x) * N;
  if (c >= cols) return;
  A sum[N] = {};
  bool is_open = keys[0] == keys[1]; // the run came from the piece before
  for (int i0 = 0; i0 < count; i0 += AHEAD) {
    few<T, N> v[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      if (i0 + u < count && keys[i0 + u + 1] < vocab) v[u] = fetch<T, N>(dy + (int64_t)from[i0 + u] * cols + c);
    }
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const int i = i0 + u;
      if (i >= count || keys[i + 1] >= vocab) continue;
      A a[N];
      widen(a, v[u]);
#pragma unroll
      for (int k = 0; k < N; k++) sum[k] += a[k];
      const bool goes_on = keys[i + 2] == keys[i + 1];
      if (goes_on && i + 1 < count) continue;
      if (is_open) {
        write_sums<A, N>(partial + (int64_t)blockIdx.x * 2 * cols + c, sum);
      } else if (goes_on) {
        write_sums<A, N>(partial + ((int64_t)blockIdx.x * 2 + 1) * cols + c, sum);
      } else {
        add_sums<TW, N>(dw + (int64_t)keys[i + 1] * cols + c, sum);
      }
      is_open = false;
#pragma unroll
      for (int k = 0; k < N; k++) sum[k] = 0;
    }
  }
}

/* The run that begins in piece blockIdx.x and goes on: its rows in the pieces, added in order. */
template <class A, class TW>
__global__ void __launch_bounds__(THREADS)
    sum_runs(TW *__restrict__ dw, const A *__restrict__ partial, const uint32_t *__restrict__ key, int64_t n,
             int length, uint32_t vocab, int64_t pieces, int64_t cols) {
  const int64_t piece = blockIdx.x, start = piece * length, end = start + length;
  if (end >= n) return;
  const uint32_t id = key[end - 1];
  if (id >= vocab || key[end] != id) return;
  if (start > 0 && key[start] == id && key[start - 1] == id) return; // began before
  // The run ends in the last piece that begins with its id: keys are sorted, so it is found by halving.
  int64_t last = piece + 1;
  for (int64_t beyond = pieces; beyond - last > 1;) {
    const int64_t middle = last + (beyond - last) / 2;
    if (key[middle * length] == id) {
      last = middle;
    } else {
      beyond = middle;
    }
  }
  const int64_t c = (int64_t)blockIdx.y * THREADS + threadIdx.x;
  if (c >= cols) return;
  A sum = partial[(piece * 2 + 1) * cols + c];
#pragma unroll 8
  for (int64_t p = piece + 1; p <= last; p++) sum += partial[p * 2 * cols + c];
  TW *target = dw + (int64_t)id * cols + c;
  *target = store<TW>((acc_of<TW>)(load(*target) + sum));
}

/* Device memory of one gradient. */
struct workspace {
  uint32_t *key = nullptr, *key_in = nullptr;
  int32_t *position = nullptr, *position_in = nullptr;
  void *sort = nullptr, *partial = nullptr;
  ~workspace() {
    for (void *p : {(void *)key, (void *)key_in, (void *)position, (void *)position_in, sort, partial}) {
      if (p != nullptr) halo__free(p);
    }
  }
};

halo_status sort_positions(workspace *ws, const int32_t *i32, const int64_t *i64, int64_t n, int64_t vocab) {
  const cudaStream_t stream = halo__cuda_stream();
  HALO_TRY(halo__alloc((void **)&ws->key, n * 4, HALO_CUDA));
  HALO_TRY(halo__alloc((void **)&ws->key_in, n * 4, HALO_CUDA));
  HALO_TRY(halo__alloc((void **)&ws->position, n * 4, HALO_CUDA));
  HALO_TRY(halo__alloc((void **)&ws->position_in, n * 4, HALO_CUDA));
  sort_keys<<<blocks_for(n, 256), 256, 0, stream>>>(ws->key_in, ws->position_in, i32, i64, n, vocab);
  HALO_LAUNCHED("embedding_bwd, keys");
  int bits = 1;
  while (bits < 32 && (vocab >> bits) != 0) bits++; // keys reach `vocab` itself
  size_t bytes = 0;
  HALO_CUDA_TRY(cub::DeviceRadixSort::SortPairs(nullptr, bytes, ws->key_in, ws->key, ws->position_in,
                                                ws->position, (int)n, 0, bits, stream));
  HALO_TRY(halo__alloc(&ws->sort, (int64_t)bytes, HALO_CUDA));
  HALO_CUDA_TRY(cub::DeviceRadixSort::SortPairs(ws->sort, bytes, ws->key_in, ws->key, ws->position_in,
                                                ws->position, (int)n, 0, bits, stream));
  return HALO_OK;
}

template <class T, class TW>
halo_status gradient(void *dw, const void *dy, const workspace &ws, int64_t n, int64_t vocab, int64_t cols,
                     int length) {
  using A = acc_of<T>;
  constexpr int N = lanes16<T>;
  const int64_t pieces = (n + length - 1) / length;
  const bool is_wide = multiples(N, {cols}) && aligned(16, {dy, dw});
  const int64_t per_block = (is_wide ? N : 1) * (int64_t)THREADS;
  const dim3 blocks((unsigned)pieces, blocks_for(cols, per_block));
  const dim3 run_blocks((unsigned)pieces, blocks_for(cols, THREADS));
  const cudaStream_t stream = halo__cuda_stream();
  HALO_CHECK(run_blocks.y < 65536, HALO_EUNSUPPORTED, "embedding: gradient of %lld columns; at most %d on cuda",
             (long long)cols, 65535 * THREADS);
  if (is_wide) {
    sum_pieces<T, TW, N><<<blocks, THREADS, 0, stream>>>((TW *)dw, (A *)ws.partial, (const T *)dy, ws.key,
                                                         ws.position, n, length, (uint32_t)vocab, cols);
  } else {
    sum_pieces<T, TW, 1><<<blocks, THREADS, 0, stream>>>((TW *)dw, (A *)ws.partial, (const T *)dy, ws.key,
                                                         ws.position, n, length, (uint32_t)vocab, cols);
  }
  HALO_LAUNCHED("embedding_bwd");
  sum_runs<A, TW><<<run_blocks, THREADS, 0, stream>>>((TW *)dw, (const A *)ws.partial, ws.key, n, length,
                                                      (uint32_t)vocab, pieces, cols);
  HALO_LAUNCHED("embedding_bwd, runs");
  return HALO_OK;
}

} // namespace

halo_status halo_cuda_embedding_fwd(halo_dtype t, void *y, const void *w, halo_dtype ti, const void *ids,
                                    int64_t n, int64_t vocab, int64_t cols) {
  if (n <= 0 || cols <= 0) return HALO_OK;
  const int32_t *i32 = ti == HALO_I32 ? (const int32_t *)ids : nullptr;
  const int64_t *i64 = (const int64_t *)ids;
  const int64_t bytes = cols * halo_dtype_bytes(t);
  if (bytes % 16 == 0 && aligned(16, {y, w})) return gather<uint4>(y, w, i32, i64, n, vocab, bytes);
  if (bytes % 4 == 0 && aligned(4, {y, w})) return gather<uint32_t>(y, w, i32, i64, n, vocab, bytes);
  return gather<uint16_t>(y, w, i32, i64, n, vocab, bytes);
}

halo_status halo_cuda_embedding_bwd(halo_dtype tw, void *dw, halo_dtype t, const void *dy, halo_dtype ti,
                                    const void *ids, int64_t n, int64_t vocab, int64_t cols) {
  if (n <= 0 || cols <= 0) return HALO_OK;
  HALO_CHECK(n < index_limit && vocab < index_limit, HALO_EUNSUPPORTED,
             "embedding: gradient of %lld tokens over a table of %lld rows; fewer than 2^31 of both on cuda",
             (long long)n, (long long)vocab);
  // About a thousand pieces, so that all multiprocessors have some and partial rows stay few.
  int64_t length = (n + 1023) / 1024;
  length = length < 32 ? 32 : length > MAX_PIECE ? MAX_PIECE : length;
  const int64_t pieces = (n + length - 1) / length;
  workspace ws;
  HALO_TRY(sort_positions(&ws, ti == HALO_I32 ? (const int32_t *)ids : nullptr, (const int64_t *)ids, n, vocab));
  HALO_TRY(halo__alloc(&ws.partial, pieces * 2 * cols * (t == HALO_F64 ? 8 : 4), HALO_CUDA));
  HALO_REAL(t, T, {
    if (tw == t) return (gradient<T, T>(dw, dy, ws, n, vocab, cols, (int)length));
    return (gradient<T, acc_of<T>>(dw, dy, ws, n, vocab, cols, (int)length));
  });
  return HALO_OK;
}
