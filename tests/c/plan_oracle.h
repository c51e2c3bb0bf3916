/* plan_oracle.h: random plans beside a plain boolean mask of the same request.
 *
 * The oracle knows the definition and nothing else: it sets mask[b][h][i][j] pair by pair, with
 * loops that share no code and no idea with core/plan*.c. Tests replay a request on both and
 * compare.
 */
#ifndef HALO_TEST_PLAN_ORACLE_H
#define HALO_TEST_PLAN_ORACLE_H

#include <stdbool.h>

#include "check.h"

enum { ORACLE_MAX_OPS = 12, ORACLE_MAX_LIST = 24 };
enum { ORACLE_ALL, ORACLE_DIAGONALS, ORACLE_COLUMNS, ORACLE_TILES };

typedef struct oracle_op {
  int kind;
  int64_t batch, head, n;
  int64_t a[ORACLE_MAX_LIST], b[ORACLE_MAX_LIST];
} oracle_op;

typedef struct oracle {
  int64_t n, block, batch, heads;
  int n_ops;
  oracle_op op[ORACLE_MAX_OPS];
  int64_t sink, window;
  bool diagonal, with_documents;
  int32_t *document; /* [B, N] */
  uint8_t *mask;     /* [B, H, N, N] with force rules */
  uint8_t *chosen;   /* the same without */
} oracle;

static uint64_t oracle_state = 1;
/* 0..n-1 */
static inline int64_t oracle_random(int64_t n) {
  static uint64_t index;
  return (int64_t)(halo_random_u64(oracle_state, 77, index++) % (uint64_t)n);
}

static inline size_t oracle_at(const oracle *o, int64_t b, int64_t h, int64_t i, int64_t j) {
  return (size_t)(((b * o->heads + h) * o->n + i) * o->n + j);
}

static inline bool oracle_allowed(const oracle *o, int64_t b, int64_t i, int64_t j) {
  if (j > i)
    return false;
  if (!o->with_documents)
    return true;
  const int32_t *d = o->document + b * o->n;
  return d[i] >= 0 && d[i] == d[j];
}

/* Does the request select (i, j) for this head? */
static inline bool oracle_selected(const oracle *o, int64_t b, int64_t h, int64_t i, int64_t j) {
  for (int k = 0; k < o->n_ops; k++) {
    const oracle_op *op = &o->op[k];
    if ((op->batch >= 0 && op->batch != b) || (op->head >= 0 && op->head != h))
      continue;
    if (op->kind == ORACLE_ALL)
      return true;
    for (int64_t x = 0; x < op->n; x++) {
      if (op->kind == ORACLE_DIAGONALS && i / o->block - j / o->block == op->a[x])
        return true;
      if (op->kind == ORACLE_COLUMNS && j == op->a[x])
        return true;
      if (op->kind == ORACLE_TILES && i / o->block == op->a[x] && j / o->block == op->b[x]) {
        return true;
      }
    }
  }
  return false;
}

static inline bool oracle_forced(const oracle *o, int64_t b, int64_t i, int64_t j) {
  const int64_t g = o->block;
  if (o->diagonal && i / g == j / g)
    return true;
  int64_t start = j; /* j is within the first `sink` tokens of its document */
  while (start > 0 &&
         (!o->with_documents || o->document[b * o->n + start - 1] == o->document[b * o->n + j])) {
    start--;
  }
  if (j - start < o->sink)
    return true;
  for (int64_t x = i / g * g; x < i / g * g + g; x++) { /* some pair of the tile is close */
    for (int64_t y = j / g * g; y < j / g * g + g; y++) {
      if (y <= x && x - y < o->window)
        return true;
    }
  }
  return false;
}

static inline void oracle_fill(oracle *o) {
  const size_t size = (size_t)(o->batch * o->heads * o->n * o->n);
  o->mask = calloc(size, 1);
  o->chosen = calloc(size, 1);
  for (int64_t b = 0; b < o->batch; b++) {
    for (int64_t h = 0; h < o->heads; h++) {
      for (int64_t i = 0; i < o->n; i++) {
        for (int64_t j = 0; j <= i; j++) {
          if (!oracle_allowed(o, b, i, j))
            continue;
          const size_t at = oracle_at(o, b, h, i, j);
          o->chosen[at] = oracle_selected(o, b, h, i, j);
          o->mask[at] = o->chosen[at] || oracle_forced(o, b, i, j);
        }
      }
    }
  }
}

static inline void oracle_free(oracle *o) {
  free(o->document);
  free(o->mask);
  free(o->chosen);
}

/* A random request; small sizes so that every edge (short tail, one block, many documents) occurs.
 */
static inline void oracle_make(oracle *o, uint64_t seed) {
  static const int64_t blocks[] = {1, 2, 4, 8, 16};
  oracle_state = seed;
  *o = (oracle){.n = 1 + oracle_random(60),
                .block = blocks[oracle_random(5)],
                .batch = 1 + oracle_random(2),
                .heads = 1 + oracle_random(3)};
  const int64_t nb = (o->n - 1) / o->block + 1;
  o->n_ops = (int)oracle_random(6);
  for (int k = 0; k < o->n_ops; k++) {
    oracle_op *op = &o->op[k];
    op->kind = oracle_random(12) == 0 ? ORACLE_ALL : 1 + (int)oracle_random(3);
    op->batch = oracle_random(o->batch + 1) - 1;
    op->head = oracle_random(o->heads + 1) - 1;
    op->n = oracle_random(ORACLE_MAX_LIST);
    for (int64_t x = 0; x < op->n; x++) {
      op->a[x] = oracle_random(op->kind == ORACLE_COLUMNS ? o->n : nb);
      op->b[x] = oracle_random(nb);
    }
  }
  if (oracle_random(2)) {
    o->sink = oracle_random(2) ? oracle_random(8) : 0;
    o->window = oracle_random(2) ? oracle_random(o->n + 9) / (1 + oracle_random(4)) : 0;
    o->diagonal = oracle_random(2);
  }
  o->with_documents = oracle_random(2);
  o->document = calloc((size_t)(o->batch * o->n), sizeof *o->document);
  for (int64_t b = 0; o->with_documents && b < o->batch; b++) {
    const int64_t change = 1 + oracle_random(20); /* mean document length */
    int32_t id = (int32_t)oracle_random(5), next = 100;
    for (int64_t i = 0; i < o->n; i++) {
      if (oracle_random(change) == 0)
        id = oracle_random(6) == 0 ? -1 : next++;
      o->document[b * o->n + i] = id;
    }
  }
  oracle_fill(o);
}

/* Builders in the given order (the plan must not depend on it). */
static inline halo_plan *oracle_plan(const oracle *o, const halo_layout *layout, bool backwards) {
  halo_plan *p = NULL;
  CHECK_OK(halo_plan_new(&p, layout, o->batch, o->heads));
  if (!backwards && o->with_documents)
    CHECK_OK(halo_plan_set_documents(p, o->document));
  for (int k = 0; k < o->n_ops; k++) {
    const oracle_op *op = &o->op[backwards ? o->n_ops - 1 - k : k];
    switch (op->kind) {
    case ORACLE_ALL:
      CHECK_OK(halo_plan_add_all(p, op->batch, op->head));
      break;
    case ORACLE_DIAGONALS:
      CHECK_OK(halo_plan_add_diagonals(p, op->batch, op->head, op->a, op->n));
      break;
    case ORACLE_COLUMNS:
      CHECK_OK(halo_plan_add_columns(p, op->batch, op->head, op->a, op->n));
      break;
    default:
      CHECK_OK(halo_plan_add_tiles(p, op->batch, op->head, op->a, op->b, op->n));
    }
  }
  CHECK_OK(halo_plan_force(p, o->sink, o->window, o->diagonal));
  if (backwards && o->with_documents)
    CHECK_OK(halo_plan_set_documents(p, o->document));
  CHECK_OK(halo_plan_finish(p));
  return p;
}

#endif
