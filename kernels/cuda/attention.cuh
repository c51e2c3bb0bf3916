/* attention.cuh: which kernels do attention on this device, and what they share.
 *
 * Three families compute the same thing, one file each side of a bar being forward and backward:
 *
 *   hopper    attention_sm90_fwd.cu | attention_sm90_bwd.cu   wgmma and TMA; bf16, D = 64, 128, sm_90
 *   portable  attention_portable.cu  | attention_portable_bwd.cu  mma.sync; bf16, D = 64, 128, from sm_80 on
 *   general   attention_general.cu (both)                     any real type, D <= 256, any block
 *
 * attention.cu picks the first that fits; HALO_ATTENTION=hopper|portable|general in the environment
 * wants one of them and gets HALO_EUNSUPPORTED where it cannot be. Columns, caches and probes have
 * kernels of their own; forward state (o, m, l) means the same to all families, so that one pass may
 * mix them: m is any reference with o, l relative to 2^-m, not necessarily the maximum itself.
 *
 * dq in backward is rows [B,H,T,D] for all of them: the hopper kernel's additions by TMA are as fast that way
 * as in an order of its own (H200, 574 and 571 TFLOP/s).
 */
#ifndef HALO_ATTENTION_CUH
#define HALO_ATTENTION_CUH

#include "cuda.cuh"

/* Where attention_once puts its result: strides [3] of out over batch, tokens, heads, [2] of lse over
 * batch, heads; lse may be NULL. */
typedef struct halo__attention_out {
  void *out;
  int64_t out_stride[3];
  void *lse;
  int64_t lse_stride[2];
} halo__attention_out;

/* Each family: does it serve this call (device, dtype, head size, block, strides, alignment)? Then
 * forward, with `once` NULL going on from the state in `a`, else from nothing to the result; and
 * backward, which adds to dq and writes dk, dv. `a` and `keys` are host structs (kernels.h). */
bool halo__sm90_fwd_fits(const halo_attention_queries *a);
halo_status halo__sm90_fwd(const halo_attention_queries *a, const halo_attention_tiles *keys,
                           const halo__attention_out *once);
bool halo__sm90_bwd_fits(const halo_attention_queries *a);
halo_status halo__sm90_bwd(const halo_attention_queries *a, const halo_attention_tiles *keys);

bool halo__portable_fits(const halo_attention_queries *a);
halo_status halo__portable_fwd(const halo_attention_queries *a, const halo_attention_tiles *keys,
                               const halo__attention_out *once);
halo_status halo__portable_bwd(const halo_attention_queries *a, const halo_attention_tiles *keys);
/* The least shared memory that backward needs. */
int64_t halo__portable_bwd_shared(const halo_attention_queries *a);
halo_status halo__portable_columns_fwd(const halo_attention_queries *a,
                                       const halo_attention_columns *keys);
halo_status halo__portable_columns_bwd(const halo_attention_queries *a,
                                       const halo_attention_columns *keys);

bool halo__general_fits(const halo_attention_queries *a);
halo_status halo__general_fwd(const halo_attention_queries *a, const halo_attention_tiles *keys);
halo_status halo__general_bwd(const halo_attention_queries *a, const halo_attention_tiles *keys);
halo_status halo__general_columns_fwd(const halo_attention_queries *a,
                                      const halo_attention_columns *keys);
halo_status halo__general_columns_bwd(const halo_attention_queries *a,
                                      const halo_attention_columns *keys);

halo_status halo__general_cached(halo_dtype t, void *out, void *lse, const void *q, const void *k,
                                       const void *v, const int64_t *key_position,
                                       const int64_t *query_position, int64_t n_batch, int64_t n_queries,
                                       int64_t n_heads, int64_t n_kv_heads, int64_t head_size,
                                       int64_t length, int64_t capacity, double scale);

typedef enum halo__attention_path {
  HALO__ATTENTION_HOPPER,
  HALO__ATTENTION_PORTABLE,
  HALO__ATTENTION_GENERAL
} halo__attention_path;

/* attention.cu. Shared memory that a block may have: the device's, or less if HALO_ATTENTION_SHARED says so (in
 * KiB; for tests of what smaller devices get: 163 is sm_80, 99 sm_86 and 89). */
int64_t halo__attention_shared_bytes(void);

/* attention.cu: the family that serves forward or backward of `a`; HALO_EUNSUPPORTED when none does
 * or the one asked for does not. The same answer in every call of one pass: it depends on shapes,
 * strides, the device and the environment only. */
halo_status halo__attention_choose(halo__attention_path *out, const halo_attention_queries *a,
                                   bool is_backward);

#endif
