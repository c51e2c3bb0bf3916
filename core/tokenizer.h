/* tokenizer.h: the parts of the tokenizer, shared by tokenizer.c, pretokenize.c and tokenizer_bpe.c.
 *
 *   text -> [special tokens cut out] -> valid UTF-8 runs | runs of other bytes
 *        -> NFC (when the model asks) -> pieces (pretokenize.c) -> ids (tokenizer_bpe.c)
 */
#ifndef HALO_TOKENIZER_H
#define HALO_TOKENIZER_H

#include "buffer.h"

/* ---- pretokenize.c -------------------------------------------------------------------------- */

/* A compiled split pattern of halo_split; immutable, shared by all threads. */
typedef struct halo__split halo__split;
/* What one thread needs to run it. */
typedef struct halo__splitter halo__splitter;

/* Borrowed, valid for ever. */
halo_status halo__split_get(const halo__split **out, int32_t kind);
halo_status halo__splitter_new(halo__splitter **out, const halo__split *s);
void halo__splitter_free(halo__splitter *s);
/* End of the piece that starts at `at` < n; text[0, n) is valid UTF-8. */
halo_status halo__split_next(halo__splitter *s, const uint8_t *text, size_t n, size_t at,
                             size_t *end_out);

/* Bytes of the longest valid UTF-8 prefix (RFC 3629: no surrogates, nothing overlong). */
size_t halo__utf8_valid(const uint8_t *text, size_t n);
/* Bytes before the next valid character; text[0] does not start one. */
size_t halo__utf8_invalid(const uint8_t *text, size_t n);
/* Whether NFC could change valid UTF-8 text: it holds a code point from U+0300 on. */
bool halo__nfc_needed(const uint8_t *text, size_t n);
/* Append the NFC form of valid UTF-8 text. */
halo_status halo__nfc(halo__buffer *out, halo__buffer *scratch, const uint8_t *text, size_t n);

/* ---- tokenizer_bpe.c ------------------------------------------------------------------------ */

enum { HALO__MAX_RANK = (1 << 24) - 1 }; /* a rank must fit 24 bits of a queue entry */

/* Which two tokens merge, how early, and into what: an open-addressed table of pairs. */
typedef struct halo__pair {
  uint64_t key; /* left << 32 | right; HALO__NO_PAIR marks an empty slot */
  uint32_t rank;
  int32_t id;
} halo__pair;

#define HALO__NO_PAIR UINT64_MAX

typedef struct halo__merges {
  halo__pair *slots;
  uint64_t mask; /* slots - 1 */
  int64_t count;
} halo__merges;

halo_status halo__merges_reserve(halo__merges *m, int64_t count);
/* HALO_ESTATE if the pair is there already (nothing changes). */
halo_status halo__merges_add(halo__merges *m, int32_t left, int32_t right, uint32_t rank, int32_t id);
void halo__merges_free(halo__merges *m);

static inline uint64_t halo__pair_hash(uint64_t key) {
  key *= 0x9e3779b97f4a7c15u; // Fibonacci hashing; the high bits are the mixed ones
  return key ^ (key >> 32);
}
static inline const halo__pair *halo__merges_find(const halo__merges *m, int32_t left,
                                                  int32_t right) {
  const uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
  for (uint64_t i = halo__pair_hash(key) & m->mask;; i = (i + 1) & m->mask) {
    const halo__pair *p = &m->slots[i];
    if (p->key == key) return p;
    if (p->key == HALO__NO_PAIR) return NULL;
  }
}

/* Merge ids[0, n) in place, the lowest rank first and the leftmost of equals; returns the new count
 * through n_out. O(n log n) time, about 28 bytes of scratch per id beyond a small n. */
halo_status halo__bpe(const halo__merges *m, int32_t *ids, int64_t n, int64_t *n_out);

#endif
