/* attention_portable_bwd.cuh: what the backward kernels by key and by query share: the keys' side, products of
 * tiles, places of scores. See attention_portable_bwd.cu. */
#ifndef HALO_ATTENTION_PORTABLE_BWD_CUH
#define HALO_ATTENTION_PORTABLE_BWD_CUH

#include "attention_portable.cuh"

namespace halo {
namespace portable {

using namespace halo::mma;
enum { QUERIES = 64 }; /* that are met together */

typedef __nv_bfloat16 bf16;

struct keys {
  const bf16 *k, *v;
  const int32_t *position;
  const int64_t *offset; /* by_key, or by_query */
  const halo__span *run;
  float *dk, *dv;
  int32_t parts; /* of the heads of a group; more than one: dk, dv are added to */
  /* columns */
  const int64_t *token_offset, *slot_offset;
  const int32_t *token, *slot;
};

__device__ __forceinline__ void add2(float *to, float x, float y) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y) : "memory");
#else
  atomicAdd(to, x);
  atomicAdd(to + 1, y);
#endif
}

template <int M, int N> __device__ __forceinline__ void clear(float (&d)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) d[m][n][e] = 0;
    }
  }
}

/* d [16 M, 8 N] += rows of x (by_16) times rows of y (by_8), over D columns. */
template <int D, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&d)[M][N][4], uint32_t x, uint32_t y) {
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) rows_a<D>(a[m], x, 16 * m, k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      rows_b<D>(b, y, 8 * n, k);
#pragma unroll
      for (int m = 0; m < M; m++) {
        multiply(d[m][n], a[m], b[0], b[1]);
        multiply(d[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

/* d += columns of x (by_8, in a tile of C columns) times columns of y (by_16), over `ROWS` rows. */
template <int C, int D, int ROWS, int M, int N>
__device__ __forceinline__ void multiply_columns(float (&d)[M][N][4], uint32_t x, uint32_t y) {
#pragma unroll
  for (int k = 0; k < ROWS; k += 16) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) columns_a<C>(a[m], x, k, 16 * m);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      columns_b<D>(b, y, k, 8 * n);
#pragma unroll
      for (int m = 0; m < M; m++) {
        multiply(d[m][n], a[m], b[0], b[1]);
        multiply(d[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

/* lse in base 2; a row that saw nothing gets +inf: its p is 0 and not NaN. */
__device__ __forceinline__ float base2(float lse) { return lse > -INFINITY ? lse * LOG2_E : INFINITY; }

/* Rows and columns (0, 1) of a fragment of a sum, as bf16; `at`: by_sum. */
template <int C>
__device__ __forceinline__ void put2(uint32_t at, int row, int column, float x, float y) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(from_there<C>(at, row, column)), "r"(pack2(x, y)) : "memory");
}

/* attention_portable_query.cu: dq alone, keys in tiles or in columns, added to s.dq in a fixed order; with x.dk
 * also dk and dv of columns, added in any order. Blocks of G. */
halo_status run_queries(const side &s, const keys &x, int32_t head_size, int32_t G);
/* The least shared memory that takes. */
int64_t query_shared(int32_t head_size);

} // namespace portable
} // namespace halo
#endif
