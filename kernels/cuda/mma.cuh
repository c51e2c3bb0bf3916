/* mma.cuh: tensor cores by warp (sm_80 and later): mma.sync m16n8k16 of bf16 with fp32 sums, its operands by
 * ldmatrix from swizzled shared memory, which cp.async fills.
 *
 * A tile is rows of D bf16 (D = 64 or 128), 16 bytes a chunk; chunk c of row r lies at chunk c ^ (r & 7), so
 * that the eight rows one matrix load reads at one chunk lie in different banks. `base` is the tile's
 * shared-memory address.
 *
 *   rows_a      A [16,16] from rows of the tile (rows are m, columns are k)
 *   columns_a   A [16,16] transposed: rows of the tile are k, columns are m
 *   rows_b      B for 16 columns n: rows of the tile are n, columns are k; two fragments {b0,b1}, {b2,b3}
 *   columns_b   the same from a tile whose rows are k, columns are n
 *
 * They take the place where this lane reads, found once: by_16 for rows_a and columns_b, by_8 for the others;
 * from there an element's row is added and its column comes in by XOR, so that of a loop over constants one
 * XOR is left, and tiles lie at multiples of 256 bytes.
 *
 * Fragment of the sum d [16,8]: lane t holds row t / 4 (d0, d1) and t / 4 + 8 (d2, d3), columns
 * 2 (t % 4) + {0, 1}. Two of them packed to bf16 are an A fragment of the next product.
 *
 * source    PTX ISA: mma.sync, ldmatrix, cp.async
 */
#ifndef HALO_MMA_CUH
#define HALO_MMA_CUH

#include "cuda.cuh"

namespace halo {
namespace mma {

__device__ __forceinline__ uint32_t shared_address(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

template <int D> __device__ __forceinline__ uint32_t tile_at(uint32_t base, int row, int chunk) {
  return base + (uint32_t)((row * (D / 8) + (chunk ^ (row & 7))) * 16);
}

__device__ __forceinline__ void copy16(uint32_t to, const void *from, bool exists = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void load4(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void load4_transposed(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

/* The lane's place in a tile from (row, column) on, both multiples of 8: lanes 0 to 15 at rows, 16 to 31 at
 * the next chunk of the same rows. */
template <int D> __device__ __forceinline__ uint32_t by_16(uint32_t base, int row = 0, int column = 0) {
  const int t = threadIdx.x % 32;
  return (base + row * D * 2 + t % 16 * D * 2 + (t / 16 ^ t % 8) * 16) ^ column * 2;
}
/* Lanes 0 to 7 at rows, 8 to 15 at the next chunk of the same, 16 to 31 at the next eight rows. */
template <int D> __device__ __forceinline__ uint32_t by_8(uint32_t base, int row = 0, int column = 0) {
  const int t = threadIdx.x % 32;
  return (base + row * D * 2 + (t / 16 * 8 + t % 8) * D * 2 + (t / 8 % 2 ^ t % 8) * 16) ^ column * 2;
}
/* Row lane / 4, columns 2 (lane % 4) and on, where a fragment of a sum goes as bf16. */
template <int D> __device__ __forceinline__ uint32_t by_sum(uint32_t base, int row = 0, int column = 0) {
  const int t = threadIdx.x % 32;
  return (base + row * D * 2 + t / 4 * (D * 2 + 16) + t % 4 * 4) ^ column * 2;
}
/* An element (row, column) further than a lane's place. */
template <int D> __device__ __forceinline__ uint32_t from_there(uint32_t at, int row, int column) {
  return (at ^ column * 2) + row * D * 2;
}

template <int D> __device__ __forceinline__ void rows_a(uint32_t (&r)[4], uint32_t at, int m, int k) {
  load4(r, from_there<D>(at, m, k));
}
template <int D> __device__ __forceinline__ void columns_a(uint32_t (&r)[4], uint32_t at, int k, int m) {
  load4_transposed(r, from_there<D>(at, k, m));
}
template <int D> __device__ __forceinline__ void rows_b(uint32_t (&r)[4], uint32_t at, int n, int k) {
  load4(r, from_there<D>(at, n, k));
}
template <int D> __device__ __forceinline__ void columns_b(uint32_t (&r)[4], uint32_t at, int k, int n) {
  load4_transposed(r, from_there<D>(at, k, n));
}

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
               "{%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t pack2(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

} // namespace mma
} // namespace halo
#endif
