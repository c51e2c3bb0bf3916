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

template <int D> __device__ __forceinline__ void rows_a(uint32_t (&r)[4], uint32_t base, int m, int k) {
  const int t = threadIdx.x % 32;
  load4(r, tile_at<D>(base, m + t % 16, k / 8 + t / 16));
}
template <int D> __device__ __forceinline__ void columns_a(uint32_t (&r)[4], uint32_t base, int k, int m) {
  const int t = threadIdx.x % 32;
  load4_transposed(r, tile_at<D>(base, k + t / 16 * 8 + t % 8, m / 8 + t / 8 % 2));
}
template <int D> __device__ __forceinline__ void rows_b(uint32_t (&r)[4], uint32_t base, int n, int k) {
  const int t = threadIdx.x % 32;
  load4(r, tile_at<D>(base, n + t / 16 * 8 + t % 8, k / 8 + t / 8 % 2));
}
template <int D> __device__ __forceinline__ void columns_b(uint32_t (&r)[4], uint32_t base, int k, int n) {
  const int t = threadIdx.x % 32;
  load4_transposed(r, tile_at<D>(base, k + t % 16, n / 8 + t / 16));
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
