/* plan.h: the plan as the ring and the kernels read it. Internal to core/.
 *
 * A finished plan is a global value. What one rank executes of it are *slices*: for queries of rank
 * r and keys of rank s, which key blocks each query block meets. Three ideas keep slices small and
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
 * freed: forward, recompute and backward read the same tables. Making is not thread-safe; reading
 * is.
 */
#ifndef HALO_PLAN_H
#define HALO_PLAN_H

#include <assert.h>

#include "internal.h"
#include "kernels.h" /* halo__span, halo__rows */

/* ---- layout.c ------------------------------------------------------------------------------ */

struct halo_layout {
  halo_layout_kind kind;
  int32_t world;
  int64_t n_tokens; /* N */
  int64_t block;    /* G */
  int64_t n_blocks; /* NB = ceil(N/G): blocks that hold a real token */
  int64_t per_rank; /* blocks of a rank, padding included; T = per_rank * G */
};

/* Global block of a rank's local block; >= n_blocks for padding. Increases with `local`. */
int64_t halo__layout_block_global(const halo_layout *l, int32_t rank, int64_t local);
/* Rank and local block of a global block < world * per_rank. */
void halo__layout_block_locate(const halo_layout *l, int64_t block, int32_t *rank_out,
                               int64_t *local_out);

/* ---- plan_slice.c: what one rank executes -------------------------------------------------- */

/* Tiles of (query rank, source rank). Row = pattern * per_rank + local block. */
typedef struct halo__slice {
  halo__rows by_query; /* local query block -> runs of local key blocks of the source */
  int64_t n_tiles;     /* over all patterns; 0: nothing to compute in this step */
} halo__slice;

/* All columns of the plan, the same on every rank: pattern p's are token[offset[p]..offset[p+1]).
 */
typedef struct halo__columns {
  int64_t *offset; /* [n_patterns + 1] */
  int32_t *token;  /* global, ascending within a pattern */
} halo__columns;

/* Who of a rank's queries sees which columns; `index` counts from the start of the pattern's list.
 */
typedef struct halo__column_slice {
  halo__rows by_query; /* row pattern * per_rank + local query block -> runs of indices */
  int64_t n_pairs;     /* (query block, column) pairs over all patterns; 0: no column step */
} halo__column_slice;

/* What to gather so that every rank has the columns: per (batch, key/value head) the union over the
 * query heads that share it. Group g = b*Hk + hk.
 *   token[offset[g]..offset[g+1])      ascending; owner and local say where the token lives
 *   owned[owned_offset[r]..owned_offset[r+1])   the entries that rank r owns, ascending: the order
 *                                      in which r sends them and everyone receives them
 *   slot[slot_offset[u] + index]       entry in `token` (absolute) of column `index` of u = b*H+h
 * The ways of rows, as indices for the kernel `take`; entries in the order of `owned`, T tokens a rank:
 *   own_row[e]        row of the entry in its owner's keys [B,Hk,T]
 *   send_row[2e, +1]  its K and V in the owner's [2,B,Hk,T]: what is sent, K next to V
 *   place_row         [2,n_entries]: where K and V of each entry lie in what was received [.,2]
 *   return_row[2e,+1] dK and dV of the entry in [2,n_entries]: what is sent back
 */
typedef struct halo__gather {
  struct halo__gather *next; /* of another number of key/value heads; the plan's list */
  int64_t kv_heads;
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
  int64_t *own_row, *send_row, *place_row, *return_row;
} halo__gather;

/* The token test of one rank, see above. */
typedef struct halo__tokens {
  int32_t *position;    /* [T] global token of each local one; >= N is padding */
  int32_t *first;       /* row b at first + b * first_stride; INT32_MAX: sees nothing */
  int64_t first_stride; /* T, or 0 when all sequences share one row (no documents) */
} halo__tokens;

int64_t halo__plan_patterns(const halo_plan *p);
/* [B*H]: pattern of (batch, head). */
const int32_t *halo__plan_pattern_of(const halo_plan *p);

/* All of these: HALO_ESTATE when the plan is not finished, HALO_ENOMEM. Borrowed. */
halo_status halo__plan_slice(const halo__slice **out, halo_plan *p, int32_t query_rank,
                             int32_t source_rank);
/* The transpose, for kernels that own keys: row pattern * per_rank + local key block of the source ->
 * runs of local query blocks. */
halo_status halo__plan_slice_by_key(const halo__rows **out, halo_plan *p, int32_t query_rank,
                                    int32_t source_rank);
halo_status halo__plan_columns(const halo__columns **out, halo_plan *p);
halo_status halo__plan_column_slice(const halo__column_slice **out, halo_plan *p,
                                    int32_t query_rank);
/* The transpose: row columns.offset[pattern] + index -> runs of local query blocks. */
halo_status halo__plan_columns_by_column(const halo__rows **out, halo_plan *p, int32_t query_rank);
halo_status halo__plan_gather(const halo__gather **out, halo_plan *p, int64_t kv_heads);
halo_status halo__plan_tokens(const halo__tokens **out, halo_plan *p, int32_t rank);

/* ---- plan_device.c: the tables above where kernels run ---------------------------------------- */

/* *(const void **)out_pointer = the copy of a table of the plan, `bytes` long, on a device; the table
 * itself on the CPU. Made on first use, owned by the plan. `host` must be the start of the table. */
halo_status halo__plan_mirror(void *out_pointer, halo_plan *p, halo_device device, const void *host,
                              int64_t bytes);
/* The struct stays on the host, what it points to is copied. */
halo_status halo__plan_mirror_rows(halo__rows *out, halo_plan *p, halo_device device,
                                   const halo__rows *rows);
void halo__plan_drop_mirrors(halo_plan *p);

/* ---- Inside: plan.c, plan_set.c, plan_slice.c and plan_stats.c only -------------------------- */

/* A canonical set of tiles and columns over NB blocks: tiles are disjoint from diagonals, lists are
 * sorted and without repeats. */
typedef struct halo__set {
  int64_t n_blocks;
  int64_t n_diagonals;
  uint64_t *diagonal; /* bit d: every tile at block distance d */
  int32_t *before;    /* [words + 1] bits set in earlier words */
  int64_t n_columns;
  int32_t *column;
  int64_t n_tiles;
  int64_t *by_query; /* [NB + 1] CSR of tile_key; NULL when there are no tiles */
  int32_t *tile_key;
  int64_t *by_key; /* [NB + 1] CSR of tile_query, the transpose */
  int32_t *tile_query;
  uint64_t hash;
} halo__set;

/* What (batch, head) pairs share. chosen: as selected. shown: with force rules, clipped to the
 * documents of `row`, redundant columns dropped; this is what is visible and executed. */
typedef struct halo__pattern {
  int32_t row;   /* documents: index into halo_plan.rows */
  int64_t heads; /* how many (batch, head) pairs use it */
  halo__set *chosen;
  halo__set *shown; /* may be `chosen` */
  int64_t visible_pairs, chosen_pairs;
} halo__pattern;

/* Documents of one sequence. NULL first: one document, no masked token. */
typedef struct halo__row {
  int32_t *first; /* [N] first token of the token's document; INT32_MAX: in no document */
  int32_t *last;  /* [N] last token of it; -1 in no document */
  int32_t *lo;    /* [NB] smallest `first` of the block; INT32_MAX: no real token */
  int32_t *hi;    /* [NB] largest; INT32_MAX if some token of the block sees nothing */
  int64_t reach;  /* block distances 0..reach-1 can hold a visible pair */
  int64_t pairs;  /* causal pairs inside documents */
} halo__row;

/* One call of a builder, kept until finish. */
typedef struct halo__record {
  int32_t kind;
  int64_t batch, head; /* -1: all */
  int64_t n;
  int32_t *a, *b; /* distances; tokens; query and key blocks */
} halo__record;

struct halo_plan {
  _Atomic int32_t references;
  halo_layout layout;
  int64_t n_batch, n_heads;
  bool finished;
  /* until finish */
  halo__record *record;
  int64_t n_records, record_capacity;
  int32_t *documents; /* [B, N] or NULL */
  /* force rules */
  int64_t sink, window;
  bool force_diagonal;
  /* from finish */
  int64_t n_rows;
  halo__row *rows;
  int64_t n_sets;
  halo__set **sets; /* all sets, each once */
  int64_t n_patterns;
  halo__pattern *patterns;
  int32_t *pattern_of; /* [B*H] */
  uint64_t hash;
  /* made on first use */
  halo__slice *slices; /* [W, W] query rank, source rank */
  bool *sliced;        /* [W] slices of this query rank are made */
  halo__rows *by_key;  /* [W, W] their transposes; offset NULL: not made */
  halo__columns *columns;
  halo__column_slice **column_slices; /* [W] */
  halo__rows *by_column; /* [W] transposes of column_slices */
  halo__tokens **tokens;              /* [W] */
  halo__gather *gathers;              /* one per number of key/value heads asked for */
  struct halo__mirrors *mirrors;      /* copies on a device */
  int64_t *tile_counts;               /* [W, W] query rank, flat ring step; then [W] column pairs */
};

/* n zeroed items of `bytes`, tagged as plan memory; n 0 gives one. */
halo_status halo__plan_alloc(void *out_pointer, int64_t n, int64_t bytes);
/* HALO_ESTATE when the plan is not finished; `what` names the caller. */
halo_status halo__plan_need(const halo_plan *p, const char *what);
/* Index of (batch, head) checked, -1 allowed where `all`. */
halo_status halo__plan_check_head(const halo_plan *p, int64_t batch, int64_t head, bool all,
                                  const char *what);
void halo__plan_drop_slices(halo_plan *p);
/* plan_stats.c: fill the pair counts of a pattern. */
void halo__plan_count(const halo_plan *p, halo__pattern *pattern);
/* Number of forced block distances, counted from 0. */
int64_t halo__plan_forced_diagonals(const halo_plan *p);

static inline int32_t halo__first(const halo__row *row, int64_t token) {
  return row->first ? row->first[token] : 0;
}
static inline int64_t halo__last(const halo_plan *p, const halo__row *row, int64_t token) {
  return row->last ? row->last[token] : p->layout.n_tokens - 1;
}

typedef enum halo__kind { HALO__NONE = 0, HALO__PARTIAL = 1, HALO__FULL = 2 } halo__kind;

/* What causality, documents and padding leave of a tile, whether it is selected or not. */
static inline halo__kind halo__tile_kind(const halo_plan *p, const halo__row *row, int64_t query,
                                         int64_t key) {
  const int64_t g = p->layout.block;
  if (key > query || row->lo[query] > key * g + g - 1)
    return HALO__NONE;
  const bool below = key < query || g == 1;
  return below && row->hi[query] <= key * g ? HALO__FULL : HALO__PARTIAL;
}
/* The same for one column that some token's own query may see. */
static inline halo__kind halo__column_kind(const halo_plan *p, const halo__row *row, int64_t query,
                                           int64_t token) {
  const int64_t g = p->layout.block;
  if (token / g > query || row->lo[query] > token)
    return HALO__NONE;
  return token <= query * g && row->hi[query] <= token ? HALO__FULL : HALO__PARTIAL;
}

static inline bool halo__set_diagonal(const halo__set *s, int64_t distance) {
  return s->diagonal[distance >> 6] >> (distance & 63) & 1;
}
/* Selected distances below `end`. */
static inline int64_t halo__set_diagonals_below(const halo__set *s, int64_t end) {
  const uint64_t below = (UINT64_C(1) << (end & 63)) - 1;
  return s->before[end >> 6] + __builtin_popcountll(s->diagonal[end >> 6] & below);
}
/* First index in the sorted list whose value is not below `value`. */
static inline int64_t halo__lower_bound(const int32_t *list, int64_t begin, int64_t end,
                                        int64_t value) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (list[middle] < value) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}
/* Sort in place, drop repeats, return how many remain; free of charge when already sorted. */
int64_t halo__sort_unique(int32_t *list, int64_t n);
/* Words of a bitmap over n_blocks distances: always one bit more, so that "below NB" is a look-up.
 */
static inline int64_t halo__set_words(int64_t n_blocks) {
  return n_blocks / 64 + 1;
}
/* A set of diagonals (bitmap copied) and tiles given as sorted, distinct query * NB + key; those a
 * diagonal covers are left out. Columns (sorted, distinct) are added afterwards, once. */
halo_status halo__set_new(halo__set **out, int64_t n_blocks, const uint64_t *diagonal,
                          const int64_t *tile, int64_t n_tiles);
halo_status halo__set_add_columns(halo__set *s, const int32_t *column, int64_t n);
halo_status halo__set_clone(halo__set **out, const halo__set *s);
void halo__set_free(halo__set *s);
/* Fill s->hash; compare two sets that have theirs. */
void halo__set_hash(halo__set *s);
bool halo__set_equal(const halo__set *a, const halo__set *b);
/* Is the tile selected? */
bool halo__set_has(const halo__set *s, int64_t query, int64_t key);
/* Selected tiles of a query block with key block in [begin, end). */
int64_t halo__set_count_keys(const halo__set *s, int64_t query, int64_t begin, int64_t end);
/* Selected tiles of a key block with query block in [begin, end), begin >= key. */
int64_t halo__set_count_queries(const halo__set *s, int64_t key, int64_t begin, int64_t end);

/* Selected key blocks of one query block, ascending from a first one:
 *   for (halo__walk w = halo__walk_begin(s, query, from); w.key >= 0; halo__walk_next(&w)) */
typedef struct halo__walk {
  const halo__set *set;
  int64_t query, key;     /* key -1: end */
  int64_t distance;       /* next diagonal to give, -1: none */
  int64_t tile, tile_end; /* next single tile to give */
} halo__walk;
halo__walk halo__walk_begin(const halo__set *s, int64_t query, int64_t from);
void halo__walk_next(halo__walk *w);

#endif
