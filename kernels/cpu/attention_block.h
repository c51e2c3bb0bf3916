/* attention_block.h: one block of queries meets one block of keys. Included once per real type by
 * attention_tiles.c and attention_columns.c, after each_real.h has named real, acc, LOAD, STORE.
 *
 *   s_kq = scale log2(e) k_k . q_q        (transposed: a row per key, a lane per query)
 *   forward   m' = max(m, max_k s_kq)   p = 2^(s - m')   l = l 2^(m-m') + sum_k p
 *             o = o 2^(m-m') + p^T v
 *   backward  p = 2^(s - lse log2(e))   dv += p do   dp = v do^T   ds = p (dp - delta) scale
 *             dk += ds q                dq += ds^T k
 *
 * Why transposed: the sums over keys run down columns, so that maximum, sum, the visibility test
 * and the exponential are plain loops over neighbouring lanes; and keys and values are used as they
 * lie in memory, row by row. Only the block's queries (and their gradients) are packed, once for
 * all the keys they meet.
 *
 * All five products are one micro-kernel: 4 rows of 4 vectors stay in registers, one operand is
 * broadcast element by element (any strides, so a transposed one costs nothing), the other is read
 * in rows. Measured on one Cascade Lake core, fp32, 64 x 64 x 64 tiles: 118 GFLOP/s, OpenBLAS
 * 0.3.21's sgemm on the same tiles 82 to 113 and on long runs of tiles (64 x 64 x 4096) 77, on
 * 1024^3 113 to 115. Rows are cut at 64 elements of depth, so that the panel read in rows (16 KiB)
 * stays in L1.
 *
 * Lanes past the block's edge (block not a multiple of the vector) hold zeros as queries; what they
 * compute is finite and never read. Base 2 saves a multiplication per exponential.
 */
#include <stdbool.h>

#include "plan.h"
#include "vmath.h"

#ifndef HALO_ATTENTION_BLOCK_ONCE
#define HALO_ATTENTION_BLOCK_ONCE

#define LOG2_E 1.4426950408889634
#define LN_2 0.6931471805599453

#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, MAX_VECTORS = 4 };
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, MAX_VECTORS = 2 }; // 16 registers hold 4 x 2 sums and their operands
#else
enum { VECTOR_BYTES = 16, MAX_VECTORS = 2 };
#endif
enum { DEPTH = 64 };

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#endif

typedef acc REAL(vec) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(acc)), may_alias));
#define LANES ((int64_t)(VECTOR_BYTES / sizeof(acc)))

/* c [rows,vectors*LANES] = (add ? c : 0) + a b; a is [rows,depth] with strides am, ak. */
static inline __attribute__((always_inline)) void
REAL(micro)(acc *restrict c, int64_t ldc, const acc *restrict a, int64_t am, int64_t ak,
            const acc *restrict b, int64_t ldb, int64_t depth, bool add, const int rows,
            const int vectors) {
  REAL(vec) sum[4][MAX_VECTORS];
#pragma GCC unroll 4
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) {
      const REAL(vec) zero = {0};
      sum[i][j] = add ? *(const REAL(vec) *)(c + i * ldc + j * LANES) : zero;
    }
  }
  for (int64_t k = 0; k < depth; k++) {
    REAL(vec) row[MAX_VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) row[j] = *(const REAL(vec) *)(b + k * ldb + j * LANES);
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
      const acc x = a[i * am + k * ak];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) sum[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) *(REAL(vec) *)(c + i * ldc + j * LANES) = sum[i][j];
  }
}

/* All rows of one panel of columns. */
static inline __attribute__((always_inline)) void
REAL(panel)(acc *c, int64_t ldc, const acc *a, int64_t am, int64_t ak, const acc *b, int64_t ldb,
            int64_t m, int64_t depth, bool add, const int vectors) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) {
    REAL(micro)(c + i * ldc, ldc, a + i * am, am, ak, b, ldb, depth, add, 4, vectors);
  }
  for (; i < m; i++) {
    REAL(micro)(c + i * ldc, ldc, a + i * am, am, ak, b, ldb, depth, add, 1, vectors);
  }
}

/* c [m,n] = (add ? c : 0) + a b; n is a multiple of LANES, rows of b and c are contiguous. */
static inline void REAL(multiply)(acc *c, int64_t ldc, const acc *a, int64_t am, int64_t ak,
                                  const acc *b, int64_t ldb, int64_t m, int64_t n, int64_t depth,
                                  bool add) {
  for (int64_t k = 0; k < depth; k += DEPTH) {
    const int64_t part = depth - k < DEPTH ? depth - k : DEPTH;
    const acc *ak0 = a + k * ak, *bk0 = b + k * ldb;
    int64_t j = 0;
#if defined(__AVX512F__)
    for (; j + 4 * LANES <= n; j += 4 * LANES) {
      REAL(panel)(c + j, ldc, ak0, am, ak, bk0 + j, ldb, m, part, add, 4);
    }
#endif
    for (; j + 2 * LANES <= n; j += 2 * LANES) {
      REAL(panel)(c + j, ldc, ak0, am, ak, bk0 + j, ldb, m, part, add, 2);
    }
    for (; j < n; j += LANES) {
      REAL(panel)(c + j, ldc, ak0, am, ak, bk0 + j, ldb, m, part, add, 1);
    }
    add = true;
  }
}

/* Keys that a block of queries meets together, n of them. */
typedef struct REAL(keys) {
  const acc *k, *v; /* rows ld elements apart; readable up to a whole vector past D */
  int64_t ld, n;
  const int32_t *position; /* NULL: every pair is visible */
  acc *dk, *dv;            /* backward, rows ld_grad apart, added to */
  int64_t ld_grad;
} REAL(keys);

/* One thread's working memory, all in one scratch block. G block, P = G rounded up to lanes, E = D
 * rounded up to lanes, K the most keys met together. */
typedef struct REAL(block) {
  int64_t G, P, D, E;
  acc *q_t;           /* [D,P] scaled by scale log2(e) */
  acc *s;             /* [K,P] */
  acc *m, *l, *tmp;   /* [P] */
  acc *o;             /* [G,E]; backward: dq */
  acc *k, *v;         /* [K,E] where keys must be converted or padded */
  const int32_t *position, *first; /* of the block's G queries */
  int32_t *pad_position, *pad_first; /* [P] the same, readable for all lanes */
  /* backward */
  acc *q, *grad, *grad_t; /* [G,E] [G,E] [D,P] */
  acc *dp;                /* [K,P] */
  acc *lse, *delta;       /* [P] */
  acc *dk, *dv;           /* [K,E] where gradients must be padded or scattered */
} REAL(block);

/* Small work is done by one thread: starting the others costs more (10 us on an idle machine, a
 * time slice on a busy one). The bound is about one tile of 64 x 64 x 64 for four heads. */
static inline bool REAL(is_worth_sharing)(const halo_attention_queries *a) {
  return a->n_batch * a->n_heads * a->n_blocks * a->block * a->block * a->head_size > 1 << 20;
}

/* Elements of acc one thread needs, and the same layout dealt out from `base`. */
static inline int64_t REAL(block_deal)(REAL(block) *b, acc *base, int64_t block, int64_t head_size,
                                int64_t max_keys, bool is_backward) {
  *b = (REAL(block)){.G = block, .P = round_up(block, LANES), .D = head_size,
                     .E = round_up(head_size, LANES)};
  const int64_t P = b->P, D = b->D, E = b->E, G = b->G, K = max_keys;
  acc *at = base;
#define TAKE(pointer, count) (pointer = (void *)at, at += round_up((count), LANES))
  TAKE(b->q_t, D * P);
  TAKE(b->s, K * P);
  TAKE(b->m, P);
  TAKE(b->l, P);
  TAKE(b->tmp, P);
  TAKE(b->o, G * E);
  TAKE(b->k, K * E);
  TAKE(b->v, K * E);
  TAKE(b->pad_position, P);
  TAKE(b->pad_first, P);
  if (is_backward) {
    TAKE(b->q, G * E);
    TAKE(b->grad, G * E);
    TAKE(b->grad_t, D * P);
    TAKE(b->dp, K * P);
    TAKE(b->lse, P);
    TAKE(b->delta, P);
    TAKE(b->dk, K * E);
    TAKE(b->dv, K * E);
  }
#undef TAKE
  return at - base;
}

/* to [D,P] = factor * rows [G,D] transposed, with zeros in the lanes past G. */
static inline void REAL(pack_transposed)(acc *restrict to, const real *restrict rows,
                                         int64_t stride, int64_t G, int64_t P, int64_t D,
                                         acc factor) {
  for (int64_t d = 0; d < D; d++) {
    for (int64_t r = G; r < P; r++) to[d * P + r] = 0;
  }
  for (int64_t r0 = 0; r0 < G; r0 += 16) { // 16 rows at a time: their cache lines stay at hand
    const int64_t r1 = r0 + 16 < G ? r0 + 16 : G;
    for (int64_t d = 0; d < D; d++) {
      for (int64_t r = r0; r < r1; r++) to[d * P + r] = factor * LOAD(rows[r * stride + d]);
    }
  }
}

/* to [n,E] = rows [n,D], padded with zeros. */
static inline void REAL(pack_rows)(acc *restrict to, const real *restrict rows, int64_t stride,
                                   int64_t n, int64_t D, int64_t E) {
  for (int64_t r = 0; r < n; r++) {
    for (int64_t d = 0; d < D; d++) to[r * E + d] = LOAD(rows[r * stride + d]);
    for (int64_t d = D; d < E; d++) to[r * E + d] = 0;
  }
}

/* Take the queries of block `qb` of (batch, head) in; returns the row of (batch, head, first token)
 * in [B,H,T]. */
static inline int64_t REAL(open_block)(REAL(block) *b, const halo_attention_queries *a,
                                       int64_t batch, int64_t head, int64_t qb, bool is_backward) {
  const int64_t T = a->block * a->n_blocks, token = qb * a->block;
  const real *q = (const real *)a->q + batch * a->q_stride[0] + token * a->q_stride[1] +
                  head * a->q_stride[2];
  REAL(pack_transposed)(b->q_t, q, a->q_stride[1], b->G, b->P, b->D, (acc)(a->scale * LOG2_E));
  const int32_t *first = a->first + batch * a->first_stride + token;
  for (int64_t r = 0; r < b->P; r++) {
    b->pad_position[r] = r < b->G ? a->position[token + r] : -1;
    b->pad_first[r] = r < b->G ? first[r] : INT32_MAX;
  }
  const int64_t row = (batch * a->n_heads + head) * T + token;
  if (!is_backward) {
    const acc *m = (const acc *)a->m + row, *l = (const acc *)a->l + row;
    for (int64_t r = 0; r < b->P; r++) {
      b->m[r] = r < b->G ? m[r] : 0;
      b->l[r] = r < b->G ? l[r] : 0;
    }
    const acc *o = (const acc *)a->o + row * b->D;
    for (int64_t r = 0; r < b->G; r++) {
      for (int64_t d = 0; d < b->D; d++) b->o[r * b->E + d] = o[r * b->D + d];
      for (int64_t d = b->D; d < b->E; d++) b->o[r * b->E + d] = 0;
    }
    return row;
  }
  const real *grad = (const real *)a->grad + batch * a->grad_stride[0] +
                     token * a->grad_stride[1] + head * a->grad_stride[2];
  REAL(pack_rows)(b->q, q, a->q_stride[1], b->G, b->D, b->E);
  REAL(pack_rows)(b->grad, grad, a->grad_stride[1], b->G, b->D, b->E);
  REAL(pack_transposed)(b->grad_t, grad, a->grad_stride[1], b->G, b->P, b->D, 1);
  const acc *lse = (const acc *)a->lse + row, *delta = (const acc *)a->delta + row;
  for (int64_t r = 0; r < b->P; r++) {
    // A row that saw nothing has lse = -inf: with +inf instead its p is 0, not NaN.
    b->lse[r] = r < b->G && lse[r] > -INFINITY ? lse[r] * (acc)LOG2_E : (acc)INFINITY;
    b->delta[r] = r < b->G ? delta[r] : 0;
  }
  for (int64_t i = 0; i < b->G * b->E; i++) b->o[i] = 0;
  return row;
}

static inline void REAL(close_forward)(const REAL(block) *b, const halo_attention_queries *a,
                                       int64_t row) {
  acc *m = (acc *)a->m + row, *l = (acc *)a->l + row, *o = (acc *)a->o + row * b->D;
  for (int64_t r = 0; r < b->G; r++) {
    m[r] = b->m[r];
    l[r] = b->l[r];
    for (int64_t d = 0; d < b->D; d++) o[r * b->D + d] = b->o[r * b->E + d];
  }
}

/* dq of task `part` += what the block gathered. */
static inline void REAL(close_backward)(const REAL(block) *b, const halo_attention_queries *a,
                                        int64_t row, int64_t part) {
  const int64_t rows = a->n_batch * a->n_heads * a->block * a->n_blocks;
  acc *dq = (acc *)a->dq + (part * rows + row) * b->D;
  for (int64_t r = 0; r < b->G; r++) {
    for (int64_t d = 0; d < b->D; d++) dq[r * b->D + d] += b->o[r * b->E + d];
  }
}

/* s = k q, with -inf where a query does not see a key. */
static inline void REAL(scores)(REAL(block) *b, const REAL(keys) *keys) {
  const int64_t P = b->P;
  REAL(multiply)(b->s, P, keys->k, keys->ld, 1, b->q_t, P, keys->n, P, b->D, false);
  if (keys->position == NULL) return;
  const int32_t *restrict position = b->pad_position, *restrict first = b->pad_first;
  for (int64_t k = 0; k < keys->n; k++) {
    const int32_t at = keys->position[k];
    acc *restrict s = b->s + k * P;
    for (int64_t r = 0; r < P; r++) s[r] = at <= position[r] && at >= first[r] ? s[r] : -INFINITY;
  }
}

static inline void REAL(meet_forward)(REAL(block) *b, const REAL(keys) *keys) {
  const int64_t P = b->P, E = b->E;
  REAL(scores)(b, keys);
  acc *restrict m = b->m, *restrict l = b->l, *restrict top = b->tmp;
  memcpy(top, m, (size_t)P * sizeof(acc));
  for (int64_t k = 0; k < keys->n; k++) {
    const acc *restrict s = b->s + k * P;
    for (int64_t r = 0; r < P; r++) top[r] = s[r] > top[r] ? s[r] : top[r];
  }
  for (int64_t r = 0; r < b->G; r++) {
    if (top[r] == m[r]) continue; // most tiles bring no new maximum
    const acc factor = HALO__EXP2(m[r] - top[r]); // 0 when nothing was seen before
    acc *restrict o = b->o + r * E;
    for (int64_t d = 0; d < E; d++) o[d] *= factor;
    l[r] *= factor;
    m[r] = top[r];
  }
  // Nothing seen at all: subtract 0 instead of -inf, and 2^-inf gives the zeros that are meant.
  for (int64_t r = 0; r < P; r++) top[r] = m[r] > -INFINITY ? m[r] : 0;
  for (int64_t k = 0; k < keys->n; k++) {
    acc *restrict s = b->s + k * P;
    for (int64_t r = 0; r < P; r++) {
      const acc p = HALO__EXP2(s[r] - top[r]);
      s[r] = p;
      l[r] += p;
    }
  }
  REAL(multiply)(b->o, E, b->s, 1, P, keys->v, keys->ld, b->G, E, keys->n, true);
}

static inline void REAL(meet_backward)(REAL(block) *b, const REAL(keys) *keys, acc scale) {
  const int64_t P = b->P, E = b->E;
  REAL(scores)(b, keys);
  const acc *restrict lse = b->lse, *restrict delta = b->delta;
  for (int64_t k = 0; k < keys->n; k++) {
    acc *restrict s = b->s + k * P;
    for (int64_t r = 0; r < P; r++) s[r] = HALO__EXP2(s[r] - lse[r]);
  }
  REAL(multiply)(keys->dv, keys->ld_grad, b->s, P, 1, b->grad, E, keys->n, E, b->G, true);
  REAL(multiply)(b->dp, P, keys->v, keys->ld, 1, b->grad_t, P, keys->n, P, b->D, false);
  for (int64_t k = 0; k < keys->n; k++) {
    const acc *restrict dp = b->dp + k * P;
    acc *restrict s = b->s + k * P;
    for (int64_t r = 0; r < P; r++) s[r] = s[r] * (dp[r] - delta[r]) * scale;
  }
  REAL(multiply)(keys->dk, keys->ld_grad, b->s, P, 1, b->q, E, keys->n, E, b->G, true);
  REAL(multiply)(b->o, E, b->s, 1, P, keys->k, keys->ld, b->G, E, keys->n, true);
}
