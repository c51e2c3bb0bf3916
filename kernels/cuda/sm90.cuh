/* sm90.cuh: what Hopper (sm_90a) offers beyond plain CUDA, one small function per PTX instruction form.
 *
 *   mbarrier   shared-memory barriers that count arrivals and bytes; a phase ends, its parity flips
 *   TMA        tiles between device and shared memory by one thread; 1-D copies and fp32 reductions
 *   wgmma      C[64,N] += A[64,16] B[16,N] by a warpgroup (4 warps), bf16 in, fp32 in registers
 *   the rest   named barriers, register hand-over between warpgroups, stmatrix, packing
 *
 * Tiles in shared memory are slabs of 64 bf16 columns: rows of 128 bytes, 16-byte chunk c of row r at
 * chunk c ^ (r & 7) (the 128-byte swizzle of both TMA and wgmma); slabs start at multiples of 1024
 * bytes and a tile of 128 columns is two slabs. Operands:
 *   K-major    (rows are M or N, columns are the summed dim): descriptor(address), a step of 16 columns
 *              is +32 bytes, the next slab after 4 steps
 *   MN-major   (rows are the summed dim, columns are M or N; transposed operand, TA or TB = 1):
 *              descriptor(address, bytes from slab to slab), a step of 16 rows is +2048 bytes
 * Accumulator d of wgmma<N>: thread t (of 128) holds rows 16 (t / 32) + t % 32 / 4 + {0, 8} and columns
 * 8 i + 2 (t % 4) + {0, 1}: d[4 i + 0, 1] of the first row, d[4 i + 2, 3] of the second. Packed to bf16
 * pairs, d[8 k .. 8 k + 7] are the four A registers of step k of the next product, no shuffle needed.
 *
 * Device functions must be used only inside kernels guarded by HALO_SM90 (true when compiling for
 * sm_90a), so that files build for older devices too. Host side: tensor_map fetches the driver's
 * encoder through the runtime, so nothing links libcuda.
 *
 * source    PTX ISA 8.0 to 9.0: mbarrier, cp.async.bulk, wgmma (matrix descriptor, register fragments)
 */
#ifndef HALO_SM90_CUH
#define HALO_SM90_CUH

#include <cuda.h> /* types only */

#include "cuda.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HALO_SM90 1
#else
#define HALO_SM90 0
#endif

namespace halo {
namespace sm90 {

#define HALO__DEVICE static __device__ __forceinline__

HALO__DEVICE uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* ---- Barriers -------------------------------------------------------------------------------- */

/* One thread, before the block's first __syncthreads, with barrier_init_done after the last of them. */
HALO__DEVICE void barrier_init(uint64_t *bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals));
}
HALO__DEVICE void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
HALO__DEVICE void barrier_arrive(uint64_t *bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
/* A warp arrives: lane 0 for all of them, who are ordered before it (__syncwarp, or anything aligned). racecheck
 * does not see that order and reports a race even where one lane of a warp of readers gives a buffer back
 * (tried on a kernel of ten lines); built for it (tools/sanitize-cuda), every lane arrives, and the barriers
 * count lanes. */
#ifdef HALO_RACECHECK
constexpr uint32_t WARP_ARRIVES = 32;
HALO__DEVICE void barrier_arrive_warp(uint64_t *bar, bool) { barrier_arrive(bar); }
#else
constexpr uint32_t WARP_ARRIVES = 1;
HALO__DEVICE void barrier_arrive_warp(uint64_t *bar, bool is_first_lane) {
  if (is_first_lane) barrier_arrive(bar);
}
#endif
/* Arrives and lets the phase wait for `bytes` more of TMA. */
HALO__DEVICE void barrier_expect(uint64_t *bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
               "r"(bytes)
               : "memory");
}
/* Until the phase of this parity is over. A fresh barrier is in phase 0: a wait for parity 1 passes. */
HALO__DEVICE void barrier_wait(uint64_t *bar, uint32_t parity) {
  asm volatile("{ .reg .pred p;\n"
               "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
               "@!p bra again; }" ::"r"(shared_address(bar)),
               "r"(parity)
               : "memory");
}
/* Where a role stands in a ring of N buffers. Consumers wait for `parity`, producers for parity ^ 1. */
template <int N> struct ring_place {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++index == N) {
      index = 0;
      parity ^= 1;
    }
  }
};

/* Barriers 1..15 of the block by number; `threads` of waiting and arriving threads together. */
HALO__DEVICE void named_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/* Arrives and goes on. racecheck takes what is handed over so for a race (tried, too), so for it one waits: the
 * barriers of a pair of roles come in one order, which waiting does not change. */
HALO__DEVICE void named_arrive(int id, int threads) {
#ifdef HALO_RACECHECK
  named_wait(id, threads);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

/* Before TMA or wgmma reads shared memory that this thread wrote with ordinary stores. */
HALO__DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* Registers per thread of this warpgroup from here on; the kernel needs __launch_bounds__(threads, n). */
template <int N> HALO__DEVICE void registers_drop() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> HALO__DEVICE void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

/* One lane of a converged warp. */
HALO__DEVICE bool elected() {
  uint32_t is_it;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(is_it));
  return is_it != 0;
}

/* ---- TMA --------------------------------------------------------------------------------------- */

/* L2 policies for the last argument of loads. */
HALO__DEVICE uint64_t l2_evict_first() {
  uint64_t p;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(p));
  return p;
}
HALO__DEVICE uint64_t l2_evict_last() {
  uint64_t p;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(p));
  return p;
}
HALO__DEVICE void prefetch_map(const CUtensorMap *map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* A box at coordinates c (innermost first) to shared memory; its bytes count towards `bar`. Parts past
 * the tensor's edge are filled with zeros and count too. */
HALO__DEVICE void tma_load(void *to, const CUtensorMap *map, uint64_t *bar, uint64_t policy, int c0,
                           int c1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
               ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
               "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "l"(policy)
               : "memory");
}
HALO__DEVICE void tma_load(void *to, const CUtensorMap *map, uint64_t *bar, uint64_t policy, int c0,
                           int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
               ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
               "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(c2), "l"(policy)
               : "memory");
}
HALO__DEVICE void tma_load(void *to, const CUtensorMap *map, uint64_t *bar, uint64_t policy, int c0,
                           int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
               ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(to)),
               "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
               : "memory");
}
/* Shared memory to a box; then bulk_commit. Parts past the edge are left out. */
HALO__DEVICE void tma_store(const CUtensorMap *map, const void *from, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];"
               :
               : "l"(map), "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
HALO__DEVICE void tma_store(const CUtensorMap *map, const void *from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               :
               : "l"(map), "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

/* `bytes` in a row (addresses and bytes multiples of 16) to shared memory, counted towards `bar`. */
HALO__DEVICE void bulk_load(void *to, const void *from, uint32_t bytes, uint64_t *bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :
               : "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}
HALO__DEVICE void bulk_store(void *to, const void *from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
/* Device memory into L2, nothing waits; address and bytes multiples of 16. */
HALO__DEVICE void l2_prefetch(const void *from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
HALO__DEVICE void l2_prefetch(const CUtensorMap *map, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];"
               :
               : "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
/* to[i] += from[i], fp32, atomically in L2. */
HALO__DEVICE void bulk_add_f32(float *to, const void *from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
/* The box at coordinates c += shared memory, in the tensor's own type, atomically in L2. */
HALO__DEVICE void tma_add(const CUtensorMap *map, const void *from, int c0, int c1) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];"
               :
               : "l"(map), "r"(shared_address(from)), "r"(c0), "r"(c1)
               : "memory");
}
/* Stores and reductions of this thread so far become one group. */
HALO__DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/* Until at most N groups are open; _read: until their shared memory may be written again. */
template <int N> HALO__DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
template <int N> HALO__DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

/* ---- wgmma --------------------------------------------------------------------------------------- */

/* Matrix descriptor of a tile with 128-byte swizzle. slab_bytes: from one slab of 64 columns to the
 * next, for MN-major operands wider than one; K-major ones do not use it. */
HALO__DEVICE uint64_t descriptor(uint32_t address, uint32_t slab_bytes = 16) {
  return (uint64_t)(address >> 4 & 0x3fff) | (uint64_t)(slab_bytes >> 4 & 0x3fff) << 16 |
         (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
/* The same tile `bytes` further on. */
HALO__DEVICE uint64_t descriptor_at(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & 0xffffffff00000000u) | (uint32_t)((uint32_t)descriptor + (bytes >> 4)); // no carry
}

/* Before the first wgmma that touches registers written since the last one. */
HALO__DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
HALO__DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> HALO__DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
/* The compiler must not move reads or writes of these registers across this point: right after a wait
 * for the products that write them, and just before the fence where they are operands (else ptxas puts
 * in waits of its own, C7517 and C7519, or serializes the products, C7510). */
template <int N> HALO__DEVICE void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N> HALO__DEVICE void pin(uint32_t (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(d[i])::"memory");
}

/* d = (add ? d : 0) + A B, one step of 16. ss: both from shared memory; rs: A from registers, K-major.
 * TA, TB: 1 where that operand is MN-major. */
template <int N> struct wgmma;

#define HALO__F8(d, i)                                                                                \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),         \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define HALO__F32(d, i) HALO__F8(d, i), HALO__F8(d, i + 8), HALO__F8(d, i + 16), HALO__F8(d, i + 24)
#define HALO__R0_31                                                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                            \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HALO__R32_63                                                                                  \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                  \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

template <> struct wgmma<32> {
  template <int TA, int TB>
  HALO__DEVICE void ss(float (&d)[16], uint64_t a, uint64_t b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
                 "}, %16, %17, p, 1, 1, %19, %20; }"
                 : HALO__F8(d, 0), HALO__F8(d, 8)
                 : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
  }
};

template <> struct wgmma<64> {
  template <int TA, int TB>
  HALO__DEVICE void ss(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" HALO__R0_31
                 "}, %32, %33, p, 1, 1, %35, %36; }"
                 : HALO__F32(d, 0)
                 : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
  }
  template <int TB>
  HALO__DEVICE void rs(float (&d)[32], const uint32_t *a, uint64_t b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" HALO__R0_31
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38; }"
                 : HALO__F32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TB));
  }
};

template <> struct wgmma<128> {
  template <int TA, int TB>
  HALO__DEVICE void ss(float (&d)[64], uint64_t a, uint64_t b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" HALO__R0_31 ", " HALO__R32_63
                 "}, %64, %65, p, 1, 1, %67, %68; }"
                 : HALO__F32(d, 0), HALO__F32(d, 32)
                 : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
  }
  template <int TB>
  HALO__DEVICE void rs(float (&d)[64], const uint32_t *a, uint64_t b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" HALO__R0_31 ", " HALO__R32_63
                 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70; }"
                 : HALO__F32(d, 0), HALO__F32(d, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TB));
  }
};

/* ---- Registers and shared memory ------------------------------------------------------------------ */

/* bf16(low) | bf16(high) << 16. */
HALO__DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
HALO__DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/* Byte offset of 16-byte chunk `chunk` (0..7) of row `row` in a slab. */
HALO__DEVICE uint32_t swizzled(int row, int chunk) {
  return (uint32_t)(row * 128 + ((chunk ^ (row & 7)) << 4));
}

/* Four 8 x 8 bf16 matrices from registers; lane 8 i + r gives the address of row r of matrix i. Lane t
 * holds elements (t / 4, 2 (t % 4) + {0, 1}) of each; _t: of each matrix transposed. */
HALO__DEVICE void stmatrix(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
HALO__DEVICE void stmatrix_t(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

/* ---- Host ------------------------------------------------------------------------------------------ */

/* A tensor map of `rank` dims, innermost first; stride[i] is the bytes from one item of dim i + 1 to the
 * next (rank - 1 of them, multiples of 16). bf16 boxes, box[0] <= 64, and
 * fp32 ones with box[0] = 32 have the 128-byte swizzle. */
static inline halo_status tensor_map(CUtensorMap *out, halo_dtype dtype, const void *base, int rank,
                                     const int64_t *size, const int64_t *stride, const int32_t *box) {
  typedef CUresult (*encoder)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                              const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                              CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                              CUtensorMapFloatOOBfill);
  static encoder encode = nullptr;
  if (encode == nullptr) {
    void *found = nullptr;
    cudaDriverEntryPointQueryResult result;
    HALO_CUDA_TRY(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                   cudaEnableDefault, &result));
    HALO_CHECK(result == cudaDriverEntryPointSuccess, HALO_ECUDA,
               "cuda: the driver has no cuTensorMapEncodeTiled; CUDA 12 or newer is needed");
    encode = (encoder)found;
  }
  HALO_CHECK(dtype == HALO_BF16 || dtype == HALO_F32, HALO_EUNSUPPORTED,
             "cuda: tensor maps are bf16 or fp32");
  cuuint64_t sizes[5], strides[4];
  cuuint32_t boxes[5], steps[5];
  for (int i = 0; i < rank; i++) {
    sizes[i] = (cuuint64_t)size[i];
    boxes[i] = (cuuint32_t)box[i];
    steps[i] = 1;
    if (i + 1 < rank) strides[i] = (cuuint64_t)stride[i];
  }
  const bool is_bf16 = dtype == HALO_BF16;
  const CUresult r = encode(
      out, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32, (cuuint32_t)rank,
      (void *)base, sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      is_bf16 || box[0] == 32 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  HALO_CHECK(r == CUDA_SUCCESS, HALO_ECUDA,
             "cuda: tensor map of %lld x %lld (rank %d) was refused: driver error %d", (long long)size[0],
             (long long)(rank > 1 ? size[1] : 1), rank, (int)r);
  return HALO_OK;
}

} // namespace sm90
} // namespace halo
#endif
