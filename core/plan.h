/* plan.h: the plan as the ring and the kernels read it. Internal to core/.
 *
 * A finished plan is a global value. What one rank executes of it are *slices*: for queries of rank r
 * and keys of rank s, which key blocks each query block meets. Three ideas keep slices small and
 * kernels simple:
 *
 *   patterns   (batch, head) pairs that see the same keys share one pattern; a dense plan without
 *              documents has exactly one, whatever B and H. pattern_of[b*H + h] names it, and every
 *              table below has its rows by pattern, not by head.
 *   runs       neighbours in *local* block order are one run, so dense causal attention is at most
 *              two runs per query block: the full ones and the diagonal. A run is `full` (every
 *              pair of every tile is visible) or partial (test token by token).
 *   one test   token by token means, for query t and key u of local index in their ranks,
 *                  first[t] <= position[u] && position[u] <= position[t]
 *              with first[t] the first token of t's document. It holds causality, documents and
 *              padding at once: a padding query has first = INT32_MAX, a padding key has a position
 *              that no query reaches. Inside a block positions are consecutive, so that the keys a
 *              query sees of a tile are one interval: no per-token test is needed in a loop.
 *
 * Columns are a second list per pattern: single key tokens, sorted. For a query block only those
 * are listed whose tile is not active there (else the key would count twice) and that some of its
 * queries may see. So a key is met either in a tile or as a column, never both: the sum over
 * (slices, columns) of a query's keys is its visible set, each key once. tests/c/test_plan.c holds
 * every layout to that.
 *
 * Everything reached from here is owned by the plan, made on first use and kept until the plan is
 * freed: forward, recompute and backward read the same tables. Making is not thread-safe; reading is.
 */
#ifndef HALO_PLAN_H
#define HALO_PLAN_H

#include "internal.h"

/* ---- layout.c ------------------------------------------------------------------------------ */

struct halo_layout {
  halo_layout_kind kind;
  int32_t world;
  int64_t n_tokens;  /* N */
  int64_t block;     /* G */
  int64_t n_blocks;  /* NB = ceil(N/G): blocks that hold a real token */
  int64_t per_rank;  /* blocks of a rank, padding included; T = per_rank * G */
};

/* Global block of a rank's local block; >= n_blocks for padding. Increases with `local`. */
int64_t halo__layout_block_global(const halo_layout *l, int32_t rank, int64_t local);
/* Rank and local block of a global block < world * per_rank. */
void halo__layout_block_locate(const halo_layout *l, int64_t block, int32_t *rank_out,
                               int64_t *local_out);

/* ---- plan_slice.c: what one rank executes -------------------------------------------------- */

/* `count` consecutive items from `first`. partial: some pair is not visible. */
typedef struct halo__run {
  int32_t first;
  int32_t count;
  int32_t partial;
} halo__run;

/* Row i is run[offset[i]] .. run[offset[i+1] - 1], ascending and disjoint. */
typedef struct halo__rows {
  int64_t n_rows;
  int64_t *offset; /* [n_rows + 1] */
  halo__run *run;
} halo__rows;

/* Tiles of (query rank, source rank). Row = pattern * per_rank + local block. */
typedef struct halo__slice {
  halo__rows by_query; /* local query block -> runs of local key blocks of the source */
  halo__rows by_key;   /* the transpose: local key block -> runs of local query blocks */
  int64_t n_tiles;     /* over all patterns; 0: nothing to compute in this step */
} halo__slice;

/* All columns of the plan, the same on every rank: pattern p's are token[offset[p]..offset[p+1]). */
typedef struct halo__columns {
  int64_t *offset; /* [n_patterns + 1] */
  int32_t *token;  /* global, ascending within a pattern */
} halo__columns;

/* Who of a rank's queries sees which columns; `index` counts from the start of the pattern's list. */
typedef struct halo__column_slice {
  halo__rows by_query;  /* row pattern * per_rank + local query block -> runs of indices */
  halo__rows by_column; /* row columns.offset[pattern] + index -> runs of local query blocks */
  int64_t n_pairs;      /* (query block, column) pairs over all patterns; 0: no column step */
} halo__column_slice;

/* What to gather so that every rank has the columns: per (batch, key/value head) the union over the
 * query heads that share it. Group g = b*Hk + hk.
 *   token[offset[g]..offset[g+1])      ascending; owner and local say where the token lives
 *   owned[owned_offset[r]..owned_offset[r+1])   the entries that rank r owns, ascending: the order
 *                                      in which r sends them and everyone receives them
 *   slot[slot_offset[u] + index]       entry in `token` (absolute) of column `index` of u = b*H+h */
typedef struct halo__gather {
  int64_t n_groups;
  int64_t n_entries;
  int64_t *offset;       /* [n_groups + 1] */
  int32_t *token;        /* [n_entries] */
  int32_t *owner;        /* [n_entries] */
  int32_t *local;        /* [n_entries] */
  int64_t *owned_offset; /* [W + 1] */
  int32_t *owned;        /* [n_entries] */
  int64_t *slot_offset;  /* [B*H + 1] */
  int32_t *slot;
} halo__gather;

/* The token test of one rank, see above. */
typedef struct halo__tokens {
  const int32_t *position; /* [T] global token of each local one; >= N is padding */
  const int32_t *first;    /* row b at first + b * first_stride; INT32_MAX: sees nothing */
  int64_t first_stride;    /* T, or 0 when all sequences share one row (no documents) */
} halo__tokens;

const halo_layout *halo__plan_layout(const halo_plan *p);
int64_t halo__plan_patterns(const halo_plan *p);
/* [B*H]: pattern of (batch, head). */
const int32_t *halo__plan_pattern_of(const halo_plan *p);

/* All of these: HALO_ESTATE when the plan is not finished, HALO_ENOMEM. Borrowed. */
halo_status halo__plan_slice(const halo__slice **out, halo_plan *p, int32_t query_rank,
                             int32_t source_rank);
halo_status halo__plan_columns(const halo__columns **out, halo_plan *p);
halo_status halo__plan_column_slice(const halo__column_slice **out, halo_plan *p,
                                    int32_t query_rank);
halo_status halo__plan_gather(const halo__gather **out, halo_plan *p, int64_t kv_heads);
halo_status halo__plan_tokens(const halo__tokens **out, halo_plan *p, int32_t rank);

#endif
