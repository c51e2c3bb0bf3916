/* plan_set.c: one canonical set of tiles and columns.
 *
 * Diagonals are a bitmap over block distances with a running count per word, so that "how many
 * selected tiles of this row lie between two blocks" is two popcounts: densities and work are
 * counted without visiting tiles. Single tiles are a CSR in both directions (by query block for
 * walking a row, by key block for columns and coverage) and never repeat a diagonal. Columns are a
 * sorted list; whether a column's tile is active is asked where it matters, per query block.
 *
 *   diagonals {0, 2, 3}, NB = 5          tiles {(4,3)}      row 4: keys 4 2 1, and 3 from the tile
 *   distance 0 1 2 3 4                   by_query 0 0 0 0 0 1
 *   bit      1 0 1 1 0                   by_key   0 0 0 0 1 1
 *
 * Sets are immutable once interned: equal ones of different heads are one object.
 */
#include "plan.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

static int compare_i32(const void *a, const void *b) {
  const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
  return (x > y) - (x < y);
}

int64_t halo__sort_unique(int32_t *list, int64_t n) {
  bool sorted = true;
  for (int64_t i = 1; i < n && sorted; i++)
    sorted = list[i - 1] <= list[i];
  if (!sorted)
    qsort(list, (size_t)n, sizeof *list, compare_i32);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i++) {
    if (kept == 0 || list[kept - 1] != list[i])
      list[kept++] = list[i];
  }
  return kept;
}

void halo__set_free(halo__set *s) {
  if (!s)
    return;
  halo__free(s->diagonal);
  halo__free(s->before);
  halo__free(s->column);
  halo__free(s->by_query);
  halo__free(s->tile_key);
  halo__free(s->by_key);
  halo__free(s->tile_query);
  halo__free(s);
}

/* CSR in both directions from sorted (query * NB + key), leaving out what a diagonal covers. */
static halo_status set_add_tiles(halo__set *s, const int64_t *tile, int64_t n) {
  const int64_t nb = s->n_blocks;
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i++)
    kept += !halo__set_diagonal(s, tile[i] / nb - tile[i] % nb);
  if (kept == 0)
    return HALO_OK;
  s->n_tiles = kept;
  HALO_TRY(halo__plan_alloc(&s->by_query, nb + 1, sizeof *s->by_query));
  HALO_TRY(halo__plan_alloc(&s->by_key, nb + 2, sizeof *s->by_key));
  HALO_TRY(halo__plan_alloc(&s->tile_key, kept, sizeof *s->tile_key));
  HALO_TRY(halo__plan_alloc(&s->tile_query, kept, sizeof *s->tile_query));
  int64_t at = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t query = tile[i] / nb, key = tile[i] % nb;
    if (halo__set_diagonal(s, query - key))
      continue;
    s->by_query[query + 1]++;
    s->by_key[key + 2]++; /* shifted by one more: filling below moves each start to its end */
    s->tile_key[at++] = (int32_t)key;
  }
  for (int64_t b = 0; b < nb; b++) {
    s->by_query[b + 1] += s->by_query[b];
    s->by_key[b + 2] += s->by_key[b + 1];
  }
  for (int64_t query = 0; query < nb; query++) {
    for (int64_t i = s->by_query[query]; i < s->by_query[query + 1]; i++) {
      s->tile_query[s->by_key[s->tile_key[i] + 1]++] = (int32_t)query;
    }
  }
  return HALO_OK;
}

/* A set of diagonals (copied) and tiles; columns are added afterwards. */
halo_status halo__set_new(halo__set **out, int64_t n_blocks, const uint64_t *diagonal,
                          const int64_t *tile, int64_t n_tiles) {
  halo_status status = HALO_OK;
  halo__set *s = NULL;
  const int64_t words = halo__set_words(n_blocks);
  HALO_TRY(halo__plan_alloc(&s, 1, sizeof *s));
  s->n_blocks = n_blocks;
  HALO_TRY_GOTO(halo__plan_alloc(&s->diagonal, words, sizeof *s->diagonal));
  HALO_TRY_GOTO(halo__plan_alloc(&s->before, words, sizeof *s->before));
  memcpy(s->diagonal, diagonal, (size_t)words * sizeof *diagonal);
  for (int64_t w = 0; w < words; w++) {
    s->before[w] = (int32_t)s->n_diagonals;
    s->n_diagonals += __builtin_popcountll(diagonal[w]);
  }
  HALO_TRY_GOTO(set_add_tiles(s, tile, n_tiles));
done:
  if (status != HALO_OK) {
    halo__set_free(s);
    return status;
  }
  *out = s;
  return HALO_OK;
}

halo_status halo__set_add_columns(halo__set *s, const int32_t *column, int64_t n) {
  if (n == 0)
    return HALO_OK;
  HALO_TRY(halo__plan_alloc(&s->column, n, sizeof *s->column));
  memcpy(s->column, column, (size_t)n * sizeof *column);
  s->n_columns = n;
  return HALO_OK;
}

halo_status halo__set_clone(halo__set **out, const halo__set *s) {
  halo_status status = HALO_OK;
  halo__set *clone = NULL;
  int64_t *tile = NULL;
  HALO_TRY_GOTO(halo__plan_alloc(&tile, s->n_tiles, sizeof *tile));
  for (int64_t query = 0; s->n_tiles && query < s->n_blocks; query++) {
    for (int64_t i = s->by_query[query]; i < s->by_query[query + 1]; i++) {
      tile[i] = query * s->n_blocks + s->tile_key[i];
    }
  }
  HALO_TRY_GOTO(halo__set_new(&clone, s->n_blocks, s->diagonal, tile, s->n_tiles));
  HALO_TRY_GOTO(halo__set_add_columns(clone, s->column, s->n_columns));
  *out = clone;
done:
  halo__free(tile);
  if (status != HALO_OK) halo__set_free(clone);
  return status;
}

/* Everything that differs is listed: bitmap, columns, tiles. */
void halo__set_hash(halo__set *s) {
  const int64_t counts[4] = {s->n_blocks, s->n_diagonals, s->n_columns, s->n_tiles};
  uint64_t h = XXH3_64bits(counts, sizeof counts);
  h = XXH3_64bits_withSeed(s->diagonal, (size_t)halo__set_words(s->n_blocks) * sizeof *s->diagonal,
                           h);
  if (s->n_columns) {
    h = XXH3_64bits_withSeed(s->column, (size_t)s->n_columns * sizeof *s->column, h);
  }
  if (s->n_tiles) {
    h = XXH3_64bits_withSeed(s->by_query, (size_t)(s->n_blocks + 1) * sizeof *s->by_query, h);
    h = XXH3_64bits_withSeed(s->tile_key, (size_t)s->n_tiles * sizeof *s->tile_key, h);
  }
  s->hash = h;
}

bool halo__set_equal(const halo__set *a, const halo__set *b) {
  if (a->hash != b->hash || a->n_diagonals != b->n_diagonals || a->n_columns != b->n_columns ||
      a->n_tiles != b->n_tiles) {
    return false;
  }
  const size_t words = (size_t)halo__set_words(a->n_blocks);
  if (memcmp(a->diagonal, b->diagonal, words * sizeof *a->diagonal))
    return false;
  if (a->n_columns && memcmp(a->column, b->column, (size_t)a->n_columns * sizeof *a->column)) {
    return false;
  }
  if (!a->n_tiles)
    return true;
  return !memcmp(a->by_query, b->by_query, (size_t)(a->n_blocks + 1) * sizeof *a->by_query) &&
         !memcmp(a->tile_key, b->tile_key, (size_t)a->n_tiles * sizeof *a->tile_key);
}

bool halo__set_has(const halo__set *s, int64_t query, int64_t key) {
  assert(key >= 0 && key <= query && query < s->n_blocks);
  if (halo__set_diagonal(s, query - key))
    return true;
  if (!s->n_tiles)
    return false;
  const int64_t end = s->by_query[query + 1];
  const int64_t i = halo__lower_bound(s->tile_key, s->by_query[query], end, key);
  return i < end && s->tile_key[i] == key;
}

int64_t halo__set_count_keys(const halo__set *s, int64_t query, int64_t begin, int64_t end) {
  if (begin >= end)
    return 0;
  assert(begin >= 0 && end <= query + 1);
  int64_t n = halo__set_diagonals_below(s, query - begin + 1) -
              halo__set_diagonals_below(s, query - end + 1);
  if (s->n_tiles) {
    const int64_t a = s->by_query[query], b = s->by_query[query + 1];
    n += halo__lower_bound(s->tile_key, a, b, end) - halo__lower_bound(s->tile_key, a, b, begin);
  }
  return n;
}

int64_t halo__set_count_queries(const halo__set *s, int64_t key, int64_t begin, int64_t end) {
  if (begin >= end)
    return 0;
  assert(begin >= key && end <= s->n_blocks);
  int64_t n = halo__set_diagonals_below(s, end - key) - halo__set_diagonals_below(s, begin - key);
  if (s->n_tiles) {
    const int64_t a = s->by_key[key], b = s->by_key[key + 1];
    n +=
        halo__lower_bound(s->tile_query, a, b, end) - halo__lower_bound(s->tile_query, a, b, begin);
  }
  return n;
}

/* Largest selected distance <= d, or -1. */
static int64_t diagonal_at_most(const halo__set *s, int64_t d) {
  if (d < 0)
    return -1;
  int64_t word = d >> 6;
  uint64_t bits = s->diagonal[word] & (~UINT64_C(0) >> (63 - (d & 63)));
  while (!bits) {
    if (--word < 0)
      return -1;
    bits = s->diagonal[word];
  }
  return word * 64 + 63 - __builtin_clzll(bits);
}

halo__walk halo__walk_begin(const halo__set *s, int64_t query, int64_t from) {
  halo__walk w = {.set = s, .query = query, .distance = diagonal_at_most(s, query - from)};
  if (s->n_tiles) {
    w.tile_end = s->by_query[query + 1];
    w.tile = halo__lower_bound(s->tile_key, s->by_query[query], w.tile_end, from);
  }
  halo__walk_next(&w);
  return w;
}

void halo__walk_next(halo__walk *w) {
  const int64_t diagonal = w->distance >= 0 ? w->query - w->distance : INT64_MAX;
  const int64_t tile = w->tile < w->tile_end ? w->set->tile_key[w->tile] : INT64_MAX;
  if (diagonal < tile) {
    w->key = diagonal;
    w->distance = diagonal_at_most(w->set, w->distance - 1);
  } else if (tile < INT64_MAX) {
    w->key = tile;
    w->tile++;
  } else {
    w->key = -1;
  }
}
