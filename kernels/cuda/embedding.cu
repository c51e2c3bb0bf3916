/* embedding: rows of a table by token id.
 *
 *   y_i = w[id_i]              dw[id_i] += dy_i
 *
 * shapes    w, dw [V,E]; ids [n]; y, dy [n,E]; all contiguous
 * gradient  without atomics on numbers: token positions are sorted by id (stable), the sorted list is cut
 *           into pieces of equal length, and a block walks one piece:
 *
 *             sorted ids   | 3 3 7 7 | 7 7 7 7 | 7 9 9 12 |        pieces of 4
 *                            ---       open      open ---
 *
 *           Runs of one id inside a piece are summed in registers and added to dw by the only block that
 *           knows them. A run that crosses pieces leaves one partial row in each; a second kernel
 *           adds those in a fixed order. Pieces depend on n alone, so equal inputs give equal bits, and a
 *           token that fills the whole batch (padding) is still summed by many blocks.
 * sort      up to 49152 tokens: tiles of 2048 by a block each (CUB's block sort), then every token counts
 *           the tokens before it in all other tiles by halving, all keys at hand in shared memory: two
 *           launches, 16 us for 32K tokens where CUB's radix sort takes 50 us. More tokens: CUB's
 * numbers   sums in the arithmetic type, added to dw once: with dw in bf16 that rounds once a
 *           call, where the CPU rounds once a token
 * errors    an id outside [0,V): the forward reports it and writes zeros, the gradient leaves it out
 * work      forward E elements read and written per token; gradient E read per token, and dw read
 *           and written once per distinct id
 * twin      kernels/cpu/embedding.c
 */
#include <cub/block/block_radix_sort.cuh>
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

/* Four short kernels in a row: on Hopper each is launched while the one before it still runs, and waits for
 * its end here, before it reads anything ("programmatic dependent launch" in CUDA's programming guide). */
__device__ __forceinline__ void after_the_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
template <class... P, class... Q> halo_status
launch_early(const char *name, void (*kernel)(P...), dim3 blocks, int threads, int64_t shared, Q... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = (size_t)shared;
  config.stream = halo__cuda_stream();
  config.attrs = &attribute;
  config.numAttrs = halo__cuda_device()->major >= 9 ? 1 : 0;
  HALO_CUDA_TRY(cudaLaunchKernelEx(&config, kernel, (P)args...));
  return halo__cuda_launched(name);
}

constexpr int THREADS = 128, MAX_PIECE = 1024, MIN_PIECE = 32, AHEAD = 8, RUN_PIECES = 8;

/* Key of a position: its id, or `vocab` for an id that is not one, which sorts behind all others. */
__global__ void sort_keys(uint32_t *__restrict__ key, int32_t *__restrict__ position, const int32_t *i32,
                          const int64_t *i64, int64_t n, int64_t vocab) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const int64_t id = id_at(i32, i64, i);
  key[i] = (uint32_t)(id >= 0 && id < vocab ? id : vocab);
  position[i] = (int32_t)i;
}

/* Sums of a column chunk to a partial row, in accesses of at most 16 bytes. */
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
  after_the_kernel_before();
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
    few<TW, N> old[AHEAD]; // rows of dw that a run of this piece alone ends at
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const int i = i0 + u;
      if (i >= count || keys[i + 1] >= vocab) continue;
      v[u] = fetch<T, N>(dy + (int64_t)from[i] * cols + c);
      if (keys[i + 2] != keys[i + 1] && keys[i + 1] != keys[0]) {
        old[u] = fetch<TW, N>(dw + (int64_t)keys[i + 1] * cols + c);
      }
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
        acc_of<TW> w[N];
        widen(w, old[u]);
#pragma unroll
        for (int k = 0; k < N; k++) w[k] += sum[k];
        put<TW, N>(dw + (int64_t)keys[i + 1] * cols + c, narrow<TW, N>(w));
      }
      is_open = false;
#pragma unroll
      for (int k = 0; k < N; k++) sum[k] = 0;
    }
  }
}

/* The last piece of the run that begins in this piece and goes on, 0 if none does: the run ends in the last
 * piece that begins with its id; keys are sorted, so that is found by halving. */
__device__ __forceinline__ int64_t run_end(const uint32_t *__restrict__ key, int64_t piece, int64_t n,
                                           int length, uint32_t vocab, int64_t pieces) {
  const int64_t start = piece * length, end = start + length;
  if (end >= n) return 0;
  const uint32_t id = key[end - 1];
  if (id >= vocab || key[end] != id) return 0;
  if (start > 0 && key[start] == id && key[start - 1] == id) return 0; // began before
  int64_t last = piece + 1, step = 1; // most runs are short: steps that double, then halve
  while (last + step < pieces && key[(last + step) * length] == id) {
    last += step;
    step *= 2;
  }
  for (; step > 0; step /= 2) {
    if (last + step < pieces && key[(last + step) * length] == id) last += step;
  }
  return last;
}

/* Runs that begin in RUN_PIECES pieces and go on: every warp adds some of their rows in the pieces, in an
 * order that depends on their number alone. */
template <class A, class TW, int N>
__global__ void __launch_bounds__(THREADS)
    sum_runs(TW *__restrict__ dw, const A *__restrict__ partial, const uint32_t *__restrict__ key, int64_t n,
             int length, uint32_t vocab, int64_t pieces, int64_t cols) {
  constexpr int WARPS = THREADS / 32;
  __shared__ int64_t ends[RUN_PIECES];
  __shared__ A part[WARPS][32][N];
  after_the_kernel_before();
  const int64_t first = (int64_t)blockIdx.x * RUN_PIECES;
  bool is_one = false;
  if (threadIdx.x < RUN_PIECES) {
    ends[threadIdx.x] = run_end(key, first + threadIdx.x, n, length, vocab, pieces);
    is_one = ends[threadIdx.x] != 0;
  }
  if (!__syncthreads_or(is_one)) return;
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  const int64_t c = ((int64_t)blockIdx.y * 32 + lane) * N;
  for (int64_t piece = first; piece < first + RUN_PIECES; piece++) {
    const int64_t last = ends[piece - first];
    if (last == 0) continue;
    A sum[N] = {};
    for (int64_t p0 = piece + warp; c < cols && p0 <= last; p0 += WARPS * AHEAD) {
      few<A, N> v[AHEAD];
#pragma unroll
      for (int u = 0; u < AHEAD; u++) {
        const int64_t p = p0 + u * WARPS;
        if (p <= last) v[u] = fetch<A, N>(partial + (p * 2 + (p == piece ? 1 : 0)) * cols + c);
      }
#pragma unroll
      for (int u = 0; u < AHEAD; u++) {
        if (p0 + u * WARPS > last) continue;
#pragma unroll
        for (int k = 0; k < N; k++) sum[k] += value(v[u], k);
      }
    }
#pragma unroll
    for (int k = 0; k < N; k++) part[warp][lane][k] = sum[k];
    __syncthreads();
    if (warp == 0 && c < cols) {
      TW *target = dw + (int64_t)key[(piece + 1) * length] * cols + c;
      acc_of<TW> w[N];
      widen(w, fetch<TW, N>(target));
#pragma unroll
      for (int i = 1; i < WARPS; i++) {
#pragma unroll
        for (int k = 0; k < N; k++) sum[k] += part[i][lane][k];
      }
#pragma unroll
      for (int k = 0; k < N; k++) w[k] += sum[k];
      put<TW, N>(target, narrow<TW, N>(w));
    }
    __syncthreads();
  }
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

/* ---- order of the tokens ------------------------------------------------------------------- */

constexpr int TILE_THREADS = 256, TILE_ITEMS = 8, TILE = TILE_THREADS * TILE_ITEMS, DIGIT_BITS = 6;
constexpr int MERGE_THREADS = 1024, MERGE_MOST = 24 * TILE; // 192 KB of keys
constexpr int MERGE_TOGETHER = 4;                           // threads that look for the place of one token

/* Tile blockIdx.x of positions in order of their keys. */
__global__ void __launch_bounds__(TILE_THREADS)
    sort_tiles(uint32_t *__restrict__ key, int32_t *__restrict__ position, const int32_t *i32,
               const int64_t *i64, int n, int64_t vocab, int bits) {
  after_the_kernel_before(); // lets the next one in
  using sort = cub::BlockRadixSort<uint32_t, TILE_THREADS, TILE_ITEMS, int32_t, DIGIT_BITS>;
  __shared__ typename sort::TempStorage room;
  const int start = blockIdx.x * TILE;
  uint32_t k[TILE_ITEMS];
  int32_t at[TILE_ITEMS];
#pragma unroll
  for (int u = 0; u < TILE_ITEMS; u++) {
    at[u] = start + (int)threadIdx.x * TILE_ITEMS + u;
    const int64_t id = at[u] < n ? id_at(i32, i64, at[u]) : -1;
    k[u] = at[u] >= n ? UINT32_MAX : (uint32_t)(id >= 0 && id < vocab ? id : vocab);
  }
  sort(room).SortBlockedToStriped(k, at, 0, bits);
#pragma unroll
  for (int u = 0; u < TILE_ITEMS; u++) {
    const int i = start + u * TILE_THREADS + (int)threadIdx.x;
    if (i < n) {
      key[i] = k[u];
      position[i] = at[u];
    }
  }
}

/* A token's place is the number of tokens before it in every tile: those of smaller key, and in tiles that
 * come before its own those of equal key. All keys are in shared memory. */
__global__ void __launch_bounds__(MERGE_THREADS)
    merge_tiles(uint32_t *__restrict__ key_out, int32_t *__restrict__ position_out,
                const uint32_t *__restrict__ key, const int32_t *__restrict__ position, int n) {
  extern __shared__ uint32_t all_keys[];
  after_the_kernel_before();
  const int tiles = (n + TILE - 1) / TILE;
  const int i = (int)(blockIdx.x * (MERGE_THREADS / MERGE_TOGETHER) + threadIdx.x / MERGE_TOGETHER);
  const int32_t at = i < n ? position[i] : 0;
  for (int p = (int)threadIdx.x; p < tiles * TILE / 4; p += MERGE_THREADS) {
    uint4 k = {UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX};
    if (p * 4 + 3 < n) {
      k = ((const uint4 *)key)[p];
    } else {
      if (p * 4 < n) k.x = key[p * 4];
      if (p * 4 + 1 < n) k.y = key[p * 4 + 1];
      if (p * 4 + 2 < n) k.z = key[p * 4 + 2];
    }
    ((uint4 *)all_keys)[p] = k;
  }
  __syncthreads();
  const int own = i / TILE;
  const uint32_t mine = i < n ? all_keys[i] : 0;
  int place = 0;
#pragma unroll 2
  for (int t = (int)threadIdx.x % MERGE_TOGETHER; t < tiles; t += MERGE_TOGETHER) {
    const uint32_t *tile = all_keys + t * TILE, below = mine + (t < own ? 1 : 0); // keys < below come before
    int lo = 0;
#pragma unroll
    for (int step = TILE / 2; step > 0; step /= 2) lo += tile[lo + step - 1] < below ? step : 0;
    place += t == own ? i % TILE : lo + (tile[lo] < below ? 1 : 0);
  }
#pragma unroll
  for (int o = 1; o < MERGE_TOGETHER; o *= 2) place += __shfl_xor_sync(0xffffffffu, place, o);
  if (i < n && threadIdx.x % MERGE_TOGETHER == 0) {
    key_out[place] = mine;
    position_out[place] = at;
  }
}

halo_status sort_positions(workspace *ws, const int32_t *i32, const int64_t *i64, int64_t n, int64_t vocab) {
  const cudaStream_t stream = halo__cuda_stream();
  HALO_TRY(halo__alloc((void **)&ws->key, n * 4, HALO_CUDA));
  HALO_TRY(halo__alloc((void **)&ws->key_in, n * 4, HALO_CUDA));
  HALO_TRY(halo__alloc((void **)&ws->position, n * 4, HALO_CUDA));
  HALO_TRY(halo__alloc((void **)&ws->position_in, n * 4, HALO_CUDA));
  int bits = 1;
  while (bits < 32 && (vocab >> bits) != 0) bits++; // keys reach `vocab` itself
  const int64_t tiles = (n + TILE - 1) / TILE, bytes_of_keys = tiles * TILE * 4;
  if (n <= MERGE_MOST && bytes_of_keys <= halo__cuda_device()->shared_bytes) {
    sort_tiles<<<(unsigned)tiles, TILE_THREADS, 0, stream>>>(ws->key_in, ws->position_in, i32, i64, (int)n,
                                                             vocab, bits);
    HALO_LAUNCHED("embedding_bwd, tiles");
    HALO_CUDA_TRY(
        cudaFuncSetAttribute(merge_tiles, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes_of_keys));
    return launch_early("embedding_bwd, merge", merge_tiles, blocks_for(n, MERGE_THREADS / MERGE_TOGETHER),
                        MERGE_THREADS, bytes_of_keys, ws->key, ws->position, ws->key_in, ws->position_in,
                        (int)n);
  }
  sort_keys<<<blocks_for(n, 256), 256, 0, stream>>>(ws->key_in, ws->position_in, i32, i64, n, vocab);
  HALO_LAUNCHED("embedding_bwd, keys");
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
  constexpr int N = lanes16<TW>;
  const int64_t pieces = (n + length - 1) / length;
  const bool is_wide = multiples(N, {cols}) && aligned(16, {dw}) && aligned(N * sizeof(T), {dy});
  constexpr int M = lanes16<A>; // of partial rows
  const int64_t per_block = (is_wide ? N : 1) * (int64_t)THREADS,
                per_run_block = (is_wide ? M : 1) * (int64_t)32;
  const dim3 blocks((unsigned)pieces, blocks_for(cols, per_block));
  const dim3 run_blocks(blocks_for(pieces, RUN_PIECES), blocks_for(cols, per_run_block));
  HALO_CHECK(blocks.y < 65536 && run_blocks.y < 65536, HALO_EUNSUPPORTED,
             "embedding: gradient of %lld columns; at most %d on cuda", (long long)cols, 65535 * 32);
  HALO_TRY(launch_early("embedding_bwd", is_wide ? sum_pieces<T, TW, N> : sum_pieces<T, TW, 1>, blocks,
                        THREADS, 0, (TW *)dw, (A *)ws.partial, (const T *)dy, ws.key, ws.position, n, length,
                        (uint32_t)vocab, cols));
  if (pieces == 1) return HALO_OK;
  return launch_early("embedding_bwd, runs", is_wide ? sum_runs<A, TW, M> : sum_runs<A, TW, 1>, run_blocks,
                      THREADS, 0, (TW *)dw, (const A *)ws.partial, ws.key, n, length, (uint32_t)vocab, pieces,
                      cols);
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
  length = length < MIN_PIECE ? MIN_PIECE : length > MAX_PIECE ? MAX_PIECE : length;
  const int64_t pieces = (n + length - 1) / length;
  workspace ws;
  HALO_TRY(
      sort_positions(&ws, ti == HALO_I32 ? (const int32_t *)ids : nullptr, (const int64_t *)ids, n, vocab));
  HALO_TRY(halo__alloc(&ws.partial, pieces * 2 * cols * (t == HALO_F64 ? 8 : 4), HALO_CUDA));
  HALO_REAL(t, T, {
    if (tw == t) return (gradient<T, T>(dw, dy, ws, n, vocab, cols, (int)length));
    return (gradient<T, acc_of<T>>(dw, dy, ws, n, vocab, cols, (int)length));
  });
  return HALO_OK;
}
