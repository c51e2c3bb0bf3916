/* kernels.h: prototypes and dispatch table of every kernel, generated from kernels.def. */
#ifndef HALO_KERNELS_H
#define HALO_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "halo.h"

/* One matrix, or a batch of them, in a product: rows `ld` elements apart, matrices `batch_stride`
 * elements apart (0: the same one for the whole batch). A transposed operand is used as its
 * transpose; the result never is. */
typedef struct halo_operand {
  void *data; /* only read, for operands a and b */
  halo_dtype dtype;
  int32_t transposed;
  int64_t ld;
  int64_t batch_stride;
} halo_operand;

/* c = alpha * op(a) op(b) + beta * d + bias, `batch` times; c, d [m,n], op(a) [m,k], op(b) [k,n],
 * row-major. d is c itself or, when `addend` has data, another matrix of c's dtype that does not
 * overlap c. dtypes are all F64 or any mixture of F32 and BF16 (fp32 sums). beta = 0 never reads d.
 *
 * bias [n] in c's dtype is added to every row (NULL: none). bias_grad [m] (NULL: none; F64 with F64,
 * else F32 or BF16) is what a weight-gradient product gives beside dw = dy^T x, the sum of dy over
 * its rows:
 *     bias_grad_i = bias_grad_beta * bias_grad_i + sum over k of op(a)_ik
 * a must be transposed then, and batch 1. */
typedef struct halo_gemm {
  halo_operand c, a, b;
  int64_t m, n, k, batch;
  double alpha, beta;
  halo_operand addend;
  const void *bias;
  void *bias_grad;
  halo_dtype bias_grad_dtype;
  double bias_grad_beta;
} halo_gemm;

/* Constants of one AdamW step; step counts from 1. Moments in bf16 are rounded stochastically: element i
 * takes word i % 4 of Philox block i / 4 of (seed = step, stream), low half for m, high half for v. */
typedef struct halo_adamw_step_args {
  double lr, beta1, beta2, eps, weight_decay, grad_scale;
  int64_t step;
  uint64_t stream;
} halo_adamw_step_args;

/* `count` consecutive items from `first`. partial: some pair is not visible. */
typedef struct halo__span {
  int32_t first;
  int32_t count;
  int32_t partial;
} halo__span;

/* Row i is run[offset[i]] .. run[offset[i+1] - 1], ascending and disjoint. */
typedef struct halo__rows {
  int64_t n_rows;
  int64_t *offset; /* [n_rows + 1] */
  halo__span *run;
} halo__rows;

/* On CUDA the arrays of the structs below are device memory; the structs themselves, halo__rows
 * included, are host memory and are read before the call returns.
 *
 * The query side of attention: what one rank's queries hold while they meet key after key. Blocks are
 * of `block` tokens, T = block * n_blocks; `acc` is the arithmetic type of `dtype` (fp32 or fp64).
 * Query t and a key at position u meet when first[t] <= u <= position[t]; runs that are not partial
 * need no such test. */
typedef struct halo_attention_queries {
  halo_dtype dtype; /* of q, grad and all keys */
  int64_t n_batch, n_heads, n_kv_heads, head_size, block, n_blocks;
  double scale;
  const void *q; /* elements between batches, tokens, heads; the last dim is contiguous */
  int64_t q_stride[3];
  const int32_t *position; /* [T] */
  const int32_t *first;    /* row b at first + b * first_stride */
  int64_t first_stride;
  const int32_t *pattern_of; /* [B*H]: row pattern * n_blocks + block of the lists */
  /* forward: running maximum (of scale * log2(e) * q.k), sum and unnormalised output, in acc */
  void *o, *m, *l; /* [B,H,T,D], [B,H,T], [B,H,T] */
  /* backward */
  const void *grad; /* of the output */
  int64_t grad_stride[3];
  const void *lse, *delta; /* [B,H,T] acc; lse natural, delta = rowsum(grad * output) */
  void *dq;                /* [n_parts,B,H,T,D] acc, added to (+=), zero at first; the order of elements
                              within a block of one head is known to tiles_bwd, columns_bwd and
                              dq_finish only */
  int32_t n_parts;         /* tasks that share one query head's keys in backward, each with its dq */
  int32_t n_head_parts;    /* tasks that share the query heads of one key/value head, with its dk, dv */
  int32_t deterministic;   /* sums in a fixed order (always so on the CPU) */
  /* called now and then from thread 0, so that messages move on; may be NULL */
  void (*poll)(void *context);
  void *poll_context;
} halo_attention_queries;

/* Keys of one rank, met in tiles. */
typedef struct halo_attention_tiles {
  const void *k, *v;                   /* [B,Hk,T,D] */
  const int32_t *position;             /* [T] */
  const halo__rows *by_query;          /* query block -> runs of key blocks */
  const halo__rows *by_key;            /* its transpose, for kernels that own keys in backward: row
                                          pattern * n_blocks + key block -> runs of query blocks. The
                                          CPU needs none (NULL) */
  void *dk, *dv;                       /* backward: [B,Hk,T,D] acc, written (=) */
} halo_attention_tiles;

/* Gathered keys, met one by one: column i of (b,h) = u lies in row slot[slot_offset[u] + i] of k, v and
 * at token[token_offset[pattern] + i]. */
typedef struct halo_attention_columns {
  const void *k, *v; /* [n_entries,D] */
  int64_t n_entries;
  const int64_t *token_offset;
  const int32_t *token;
  const int64_t *slot_offset; /* [B*H + 1] */
  const int32_t *slot;
  int64_t n_slots; /* slot_offset[B*H] */
  const halo__rows *by_query;        /* query block -> runs of columns */
  const halo__rows *by_column;       /* its transpose in backward: row token_offset[pattern] + column
                                        -> runs of query blocks; NULL on the CPU */
  void *dk, *dv;                     /* backward: [n_entries,D] acc, written (=) */
} halo_attention_columns;

/* A few query rows against all local keys, for selecting and measuring. A unit is u = batch * heads +
 * head; a call does n_units of them from `unit` on. Arrays are in arithmetic type. */
enum { HALO_PROBE_LANES = 16 }; /* lanes (query rows) come in multiples of it */
typedef struct halo_probe {
  halo_dtype t; /* of k */
  const void *k;
  int64_t stride[3]; /* of k over batch, token, head, in elements */
  int64_t heads, kv_heads, size;
  int64_t n_blocks, block;     /* keys: n_blocks blocks of consecutive positions */
  const int32_t *start;        /* [n_blocks] position of each block's first key */
  int64_t lanes;
  const void *q;               /* [all units, size, lanes] */
  const int32_t *first, *last; /* [all units, lanes] positions a lane sees; first > last: none */
  int64_t unit, n_units;
  double scale;
  void *z; /* [n_units, n_blocks * block, lanes]: logits, then exponentials */
} halo_probe;

#define HALO_KERNEL(name, args) halo_status halo_cpu_##name args;
#include "kernels.def"
#undef HALO_KERNEL

#ifdef HALO_WITH_CUDA
#define HALO_KERNEL(name, args) halo_status halo_cuda_##name args;
#include "kernels.def"
#undef HALO_KERNEL
#endif

typedef struct halo_kernels {
#define HALO_KERNEL(name, args) halo_status(*name) args;
#include "kernels.def"
#undef HALO_KERNEL
} halo_kernels;

/* Table of a device; HALO_CPU always exists. */
const halo_kernels *halo__kernels(halo_device device);

#ifdef __cplusplus
}
#endif

#endif
