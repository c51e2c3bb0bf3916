/* fibres.cuh: reductions of all fibres (o, :, c) of [outer, n, inner], and maps that know their fibre.
 *
 * A reduction is a type with the state of a fibre that is partly seen:
 *
 *   INPUTS                   tensors read, all of one dtype
 *   none(fibre)              nothing seen yet
 *   add(s, x[INPUTS], j)     one element more; j grows within a thread
 *   flush(s)                 called every FLUSH additions at least and before join: lanes of fp32 go to
 *                            fp64 there
 *   join(a, b)               a <- both; must not depend on which of the two came first but by rounding
 *   finish(fibre, s)         write the result
 *
 * A fibre is cut in segments when there are too few fibres to fill a device; where it is cut depends
 * on the shape alone, so sums are the same on any device, and always in one order. Segments leave their
 * states in scratch memory and a second kernel joins them.
 *
 *   inner = 1  a group of lanes (n <= GROUP_MOST) or a block reads a fibre, 16 bytes per access; where a
 *              lane has one access of a fibre only, it takes SHORT_ROWS fibres, all read before the first
 *              is summed
 *   inner > 1  a block reads rows of COLUMNS accesses side by side, 256 / COLUMNS rows at a time, or
 *              several fibre groups when they are small
 */
#ifndef HALO_CUDA_FIBRES_CUH
#define HALO_CUDA_FIBRES_CUH

#include "numbers.cuh"
#include "strided.cuh"

namespace halo {

enum { FIBRE_THREADS = 256, GROUP_MOST = 2048, COLUMNS = 32, BATCH = 4, SHORT_ROWS = 4 };
/* Blocks that fill any device of these years well; part of the arithmetic, so no property of one. */
enum { BLOCKS_WANTED = 1024 };

struct fibres {
  int64_t outer, n, inner;
  int64_t segments, length; /* of a segment, in elements of the fibre */
  int64_t count() const { return outer * inner; }
};

template <int N> struct fibre_inputs { const void *at[N]; };

/* Elements per access of the column kernel; each has a state in registers and in shared memory. */
template <class T> constexpr int column_lanes = lanes16<T> < 8 ? lanes16<T> : 8;

inline fibres cut(int64_t outer, int64_t n, int64_t inner, int64_t blocks, int64_t shortest) {
  fibres f = {outer, n, inner, 1, n};
  const int64_t wanted = blocks > 0 ? BLOCKS_WANTED / blocks : 1, most = n / shortest;
  const int64_t segments = wanted < most ? wanted : most;
  if (segments < 2) return f;
  f.length = (n + segments - 1) / segments;
  f.length = (f.length + 63) / 64 * 64; // of whole accesses
  f.segments = (n + f.length - 1) / f.length;
  return f;
}

/* Shape of a row reduction. */
inline fibres cut_rows(int64_t outer, int64_t n) {
  if (n <= GROUP_MOST) return fibres{outer, n, 1, 1, n};
  return cut(outer, n, 1, outer, 4096);
}
inline fibres cut_columns(int64_t outer, int64_t n, int64_t inner, int v) {
  const int64_t accesses = (inner + v - 1) / v;
  return cut(outer, n, inner, outer * ((accesses + COLUMNS - 1) / COLUMNS), 128);
}

template <class S> __device__ __forceinline__ S shuffle_xor(const S &s, int o) {
  static_assert(sizeof(S) % 4 == 0, "states are shuffled in words");
  S other;
  uint32_t words[sizeof(S) / 4];
  memcpy(words, &s, sizeof s);
#pragma unroll
  for (int i = 0; i < (int)(sizeof(S) / 4); i++) words[i] = __shfl_xor_sync(0xffffffffu, words[i], o);
  memcpy(&other, words, sizeof other);
  return other;
}

/* Add x[begin .. end) of one contiguous run, `lanes` lanes sharing it; vectors of V. */
template <class T, int V, class R>
__device__ __forceinline__ void add_run(const R &r, typename R::state &s, const fibre_inputs<R::INPUTS> &x,
                                        int64_t row, int64_t begin, int64_t end, int lane, int lanes) {
  const int64_t step = (int64_t)lanes * V;
  for (int64_t j = begin + (int64_t)lane * V; j < end; j += BATCH * step) {
    pack<T, V> run[BATCH][R::INPUTS];
#pragma unroll
    for (int u = 0; u < BATCH; u++) {
      if (j + u * step >= end) break;
#pragma unroll
      for (int k = 0; k < R::INPUTS; k++) {
        run[u][k] = *(const pack<T, V> *)((const T *)x.at[k] + row + j + u * step);
      }
    }
#pragma unroll
    for (int u = 0; u < BATCH; u++) {
      if (j + u * step >= end) break;
#pragma unroll
      for (int e = 0; e < V; e++) {
        number_of<T> in[R::INPUTS];
#pragma unroll
        for (int k = 0; k < R::INPUTS; k++) in[k] = number<T>::get(run[u][k].at[e]);
        r.add(s, in, j + u * step + e);
      }
    }
    r.flush(s);
  }
}

/* `group` lanes (a power of two, 32 at most) share a row; is_block: the block shares a segment. */
template <class T, bool IS_BLOCK, class R>
__global__ void __launch_bounds__(FIBRE_THREADS)
    rows_kernel(const R r, fibre_inputs<R::INPUTS> x, fibres f, int group, bool is_aligned,
                typename R::state *partial) {
  using state = typename R::state;
  const int lanes = IS_BLOCK ? FIBRE_THREADS : group, lane = threadIdx.x % lanes;
  const int64_t unit = IS_BLOCK ? blockIdx.x : ((int64_t)blockIdx.x * FIBRE_THREADS + threadIdx.x) / group;
  const int64_t o = IS_BLOCK && f.segments > 1 ? unit / f.segments : unit;
  const int64_t begin = IS_BLOCK ? (unit - o * f.segments) * f.length : 0;
  const bool is_there = IS_BLOCK || o < f.outer;
  const int64_t end = !is_there ? begin : begin + f.length < f.n ? begin + f.length : f.n;
  state s = r.none(is_there ? o : 0);
  if (is_aligned) {
    add_run<T, lanes16<T>>(r, s, x, o * f.n, begin, end, lane, lanes);
  } else {
    add_run<T, 1>(r, s, x, o * f.n, begin, end, lane, lanes);
  }
  for (int h = (lanes < 32 ? lanes : 32) / 2; h > 0; h /= 2) r.join(s, shuffle_xor(s, h));
  if (IS_BLOCK) {
    __shared__ state part[FIBRE_THREADS / 32];
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < FIBRE_THREADS / 32; i++) r.join(s, part[i]);
    }
  }
  if (lane != 0 || !is_there) return;
  if (partial != nullptr) {
    partial[unit] = s;
  } else {
    r.finish(o, s);
  }
}

/* Rows of one access per lane: n = group * lanes16<T> at most, aligned. */
template <class T, class R>
__global__ void __launch_bounds__(FIBRE_THREADS)
    short_rows_kernel(const R r, fibre_inputs<R::INPUTS> x, fibres f, int group) {
  constexpr int V = lanes16<T>;
  const int lane = threadIdx.x % group, rows = FIBRE_THREADS / group;
  const int64_t first = (int64_t)blockIdx.x * (rows * SHORT_ROWS) + threadIdx.x / group;
  const bool has = lane * V < f.n;
  pack<T, V> run[SHORT_ROWS][R::INPUTS];
#pragma unroll
  for (int u = 0; u < SHORT_ROWS; u++) {
    const int64_t o = first + u * rows;
    if (!has || o >= f.outer) continue;
#pragma unroll
    for (int k = 0; k < R::INPUTS; k++)
      run[u][k] = *(const pack<T, V> *)((const T *)x.at[k] + o * f.n + lane * V);
  }
#pragma unroll
  for (int u = 0; u < SHORT_ROWS; u++) {
    const int64_t o = first + u * rows;
    typename R::state s = r.none(o < f.outer ? o : 0);
    if (has && o < f.outer) {
#pragma unroll
      for (int e = 0; e < V; e++) {
        number_of<T> in[R::INPUTS];
#pragma unroll
        for (int k = 0; k < R::INPUTS; k++) in[k] = number<T>::get(run[u][k].at[e]);
        r.add(s, in, lane * V + e);
      }
      r.flush(s);
    }
    for (int h = group / 2; h > 0; h /= 2) r.join(s, shuffle_xor(s, h));
    if (lane == 0 && o < f.outer) r.finish(o, s);
  }
}

/* Columns side by side: thread (row, column) of a unit, which is a segment of fibres, takes every
 * `rows`-th row of one access; a block has `together` units. */
template <class T, int V, class R>
__global__ void __launch_bounds__(FIBRE_THREADS)
    columns_kernel(const R r, fibre_inputs<R::INPUTS> x, fibres f, int columns, int rows, int together,
                   int64_t column_blocks, typename R::state *partial) {
  using state = typename R::state;
  __shared__ __align__(16) unsigned char shared[sizeof(state) * FIBRE_THREADS * V];
  state *const part = (state *)shared;
  const int column = threadIdx.x % columns, row = threadIdx.x / columns % rows;
  const int own = threadIdx.x / (columns * rows);
  const int64_t units = blockIdx.x / column_blocks, unit = units * together + own;
  const int64_t c = ((blockIdx.x - units * column_blocks) * columns + column) * V;
  const bool is_there = own < together && unit < f.outer * f.segments && c < f.inner;
  const int64_t o = is_there ? unit / f.segments : 0, segment = unit - o * f.segments,
                begin = segment * f.length;
  const int64_t end = begin + f.length < f.n ? begin + f.length : f.n;
  state s[V];
#pragma unroll
  for (int e = 0; e < V; e++) s[e] = r.none(is_there ? o * f.inner + c + e : 0);
  if (is_there) {
    const int64_t first = o * f.n * f.inner + c;
    for (int64_t j = begin + row; j < end; j += BATCH * rows) {
      pack<T, V> run[BATCH][R::INPUTS];
#pragma unroll
      for (int u = 0; u < BATCH; u++) {
        if (j + u * rows >= end) break;
#pragma unroll
        for (int k = 0; k < R::INPUTS; k++) {
          run[u][k] = *(const pack<T, V> *)((const T *)x.at[k] + first + (j + u * rows) * f.inner);
        }
      }
#pragma unroll
      for (int u = 0; u < BATCH; u++) {
        if (j + u * rows >= end) break;
#pragma unroll
        for (int e = 0; e < V; e++) {
          number_of<T> in[R::INPUTS];
#pragma unroll
          for (int k = 0; k < R::INPUTS; k++) in[k] = number<T>::get(run[u][k].at[e]);
          r.add(s[e], in, j + u * rows);
        }
      }
#pragma unroll
      for (int e = 0; e < V; e++) r.flush(s[e]);
    }
  }
#pragma unroll
  for (int e = 0; e < V; e++) part[threadIdx.x * V + e] = s[e];
  int half = 1;
  while (half < rows) half *= 2;
  for (half /= 2; half > 0; half /= 2) {
    __syncthreads();
    if (own < together && row < half && row + half < rows) {
#pragma unroll
      for (int e = 0; e < V; e++)
        r.join(part[threadIdx.x * V + e], part[(threadIdx.x + half * columns) * V + e]);
    }
  }
  if (row > 0 || !is_there) return;
#pragma unroll
  for (int e = 0; e < V; e++) {
    if (partial != nullptr) {
      partial[unit * f.inner + c + e] = part[threadIdx.x * V + e];
    } else {
      r.finish(o * f.inner + c + e, part[threadIdx.x * V + e]);
    }
  }
}

/* One warp per fibre joins the states of its segments. */
template <class R>
__global__ void __launch_bounds__(FIBRE_THREADS)
    join_kernel(const R r, fibres f, const typename R::state *partial) {
  const int64_t fibre = ((int64_t)blockIdx.x * FIBRE_THREADS + threadIdx.x) / 32;
  if (fibre >= f.outer * f.inner) return;
  const int64_t o = fibre / f.inner, c = fibre - o * f.inner;
  const typename R::state *const p = partial + o * f.segments * f.inner + c;
  typename R::state s = r.none(fibre);
  for (int64_t i = threadIdx.x % 32; i < f.segments; i += 32) r.join(s, p[i * f.inner]);
  for (int h = 16; h > 0; h /= 2) r.join(s, shuffle_xor(s, h));
  if (threadIdx.x % 32 == 0) r.finish(fibre, s);
}

template <int N> inline bool all_aligned(const fibre_inputs<N> &x, int64_t bytes) {
  bool is_aligned = true;
  for (int k = 0; k < N; k++) is_aligned = is_aligned && is_multiple(x.at[k], bytes);
  return is_aligned;
}

/* Is read by columns, or in vectors of how many elements. */
template <class T, int N> inline int vector_of(const fibre_inputs<N> &x, int64_t inner) {
  constexpr int V = column_lanes<T>;
  return inner % V == 0 && all_aligned(x, V * sizeof(T)) ? V : 1;
}

/* The first pass: states of all segments to `partial`, or results when it is NULL. */
template <class T, class R>
halo_status reduce_segments(const char *name, const R &r, fibre_inputs<R::INPUTS> x, const fibres &f,
                            typename R::state *partial) {
  unsigned blocks = 0;
  cudaStream_t stream = halo__cuda_stream();
  if (f.inner == 1) {
    const bool is_aligned = f.n % lanes16<T> == 0 && all_aligned(x, 16);
    if (f.n <= GROUP_MOST) {
      int group = 1;
      while (group < 32 && group * (is_aligned ? lanes16<T> : 1) < f.n) group *= 2;
      if (is_aligned && f.n > 0 && f.n <= group * lanes16<T> && partial == nullptr) {
        HALO_TRY(blocks_of(&blocks, f.outer, FIBRE_THREADS / group * SHORT_ROWS));
        short_rows_kernel<T><<<blocks, FIBRE_THREADS, 0, stream>>>(r, x, f, group);
        HALO_LAUNCHED(name);
        return HALO_OK;
      }
      HALO_TRY(blocks_of(&blocks, f.outer, FIBRE_THREADS / group));
      rows_kernel<T, false><<<blocks, FIBRE_THREADS, 0, stream>>>(r, x, f, group, is_aligned, partial);
    } else {
      HALO_TRY(blocks_of(&blocks, f.outer * f.segments, 1));
      rows_kernel<T, true><<<blocks, FIBRE_THREADS, 0, stream>>>(r, x, f, 0, is_aligned, partial);
    }
  } else {
    const int v = vector_of<T>(x, f.inner);
    const int64_t accesses = f.inner / v;
    const int columns = accesses < COLUMNS ? (int)accesses : COLUMNS;
    const int64_t column_blocks = (accesses + columns - 1) / columns;
    // Eight elements to a thread at least.
    const int64_t wanted = f.length > 8 ? (f.length + 7) / 8 : 1;
    const int rows = wanted < FIBRE_THREADS / columns ? (int)wanted : FIBRE_THREADS / columns;
    const int together = FIBRE_THREADS / (columns * rows);
    const int64_t unit_blocks = (f.outer * f.segments + together - 1) / together;
    HALO_TRY(blocks_of(&blocks, unit_blocks * column_blocks, 1));
    if (v > 1) {
      columns_kernel<T, column_lanes<T>>
          <<<blocks, FIBRE_THREADS, 0, stream>>>(r, x, f, columns, rows, together, column_blocks, partial);
    } else {
      columns_kernel<T, 1>
          <<<blocks, FIBRE_THREADS, 0, stream>>>(r, x, f, columns, rows, together, column_blocks, partial);
    }
  }
  HALO_LAUNCHED(name);
  return HALO_OK;
}

/* Device scratch that goes with the scope. */
struct scratch {
  void *p = nullptr;
  scratch() = default;
  scratch(const scratch &) = delete;
  scratch &operator=(const scratch &) = delete;
  ~scratch() { halo__free(p); }
  halo_status get(int64_t bytes) { return halo__alloc(&p, bytes, HALO_CUDA); }
  template <class T> T *as() const { return (T *)p; }
};

template <class T, class R>
halo_status reduce_fibres(const char *name, const R &r, fibre_inputs<R::INPUTS> x, int64_t outer, int64_t n,
                          int64_t inner) {
  if (outer * inner <= 0) return HALO_OK;
  const fibres f = inner == 1 ? cut_rows(outer, n) : cut_columns(outer, n, inner, vector_of<T>(x, inner));
  if (f.segments == 1) return reduce_segments<T>(name, r, x, f, (typename R::state *)nullptr);
  scratch partial;
  HALO_TRY(partial.get(f.count() * f.segments * (int64_t)sizeof(typename R::state)));
  HALO_TRY(reduce_segments<T>(name, r, x, f, partial.as<typename R::state>()));
  unsigned blocks = 0;
  HALO_TRY(blocks_of(&blocks, f.count(), FIBRE_THREADS / 32));
  join_kernel<<<blocks, FIBRE_THREADS, 0, halo__cuda_stream()>>>(r, f, partial.as<const typename R::state>());
  HALO_LAUNCHED(name);
  return HALO_OK;
}

/* ---- y[o,j,c] = m.value(m.of(fibre), x[INPUTS]) --------------------------------------------------- */

template <class T, class M>
__global__ void __launch_bounds__(FIBRE_THREADS)
    map_kernel(const M m, T *y, fibre_inputs<M::INPUTS> x, int64_t count, int64_t inner, divider by_n,
               divider by_inner, bool is_aligned) {
  constexpr int V = lanes16<T>;
  const int64_t i = ((int64_t)blockIdx.x * FIBRE_THREADS + threadIdx.x) * V;
  if (i >= count) return;
  pack<T, V> run[M::INPUTS], result;
#pragma unroll
  for (int k = 0; k < M::INPUTS; k++) {
    const T *from = (const T *)x.at[k] + i;
    if (is_aligned) {
      run[k] = *(const pack<T, V> *)from;
    } else {
#pragma unroll
      for (int e = 0; e < V; e++) run[k].at[e] = from[i + e < count ? e : 0];
    }
  }
  const bool is_one = inner == 1 && is_aligned && by_n.d % V == 0;
  int64_t row = inner == 1 ? i : by_inner.of(i), c = i - row * inner, o = by_n.of(row), j = row - o * by_n.d;
  auto about = m.of(o * inner + c);
#pragma unroll
  for (int e = 0; e < V; e++) {
    if (e > 0 && !is_one && i + e < count) {
      if (++c == inner) {
        c = 0;
        if (++j == by_n.d) {
          j = 0;
          o++;
        }
      }
      if (inner > 1 || j == 0) about = m.of(o * inner + c);
    }
    number_of<T> in[M::INPUTS];
#pragma unroll
    for (int k = 0; k < M::INPUTS; k++) in[k] = number<T>::get(run[k].at[e]);
    result.at[e] = number<T>::put(m.value(about, in));
  }
  if (is_aligned) {
    *(pack<T, V> *)(y + i) = result;
  } else {
#pragma unroll
    for (int e = 0; e < V; e++) {
      if (i + e < count) y[i + e] = result.at[e];
    }
  }
}

template <class T, class M>
halo_status map_fibres(const char *name, const M &m, void *y, fibre_inputs<M::INPUTS> x, int64_t outer,
                       int64_t n, int64_t inner) {
  const int64_t count = outer * n * inner;
  if (count <= 0) return HALO_OK;
  const bool is_wide = count >= (int64_t)1 << 31;
  const bool is_aligned = count % lanes16<T> == 0 && all_aligned(x, 16) && is_multiple(y, 16);
  unsigned blocks = 0;
  HALO_TRY(blocks_of(&blocks, count, FIBRE_THREADS * lanes16<T>));
  map_kernel<T><<<blocks, FIBRE_THREADS, 0, halo__cuda_stream()>>>(
      m, (T *)y, x, count, inner, divider(n, is_wide), divider(inner, is_wide), is_aligned);
  HALO_LAUNCHED(name);
  return HALO_OK;
}

} // namespace halo
#endif
