/* tokenizer.c: byte-level BPE tokenizers: building, encoding, decoding.
 *
 * Lua reads the files people have (tokenizer.json, vocab.json + merges.txt, tokenizer.model) and feeds
 * tokens and merges one by one; every check of their content is here, so that a file cannot bring
 * anything but a message: ids out of range or missing, duplicate texts, merges of things that are not
 * tokens. No memory is reserved on the word of a file beyond n_tokens, which Lua counted.
 *
 * Encoding, in order:
 *   1. special tokens are cut out, only when asked: text of strangers must not write control tokens
 *   2. text that is valid UTF-8 throughout is normalised if the model wants NFC; text with a single
 *      stray byte is not text in Unicode's sense and is taken as the bytes it is, so random bytes
 *      survive a round trip
 *   3. runs of valid UTF-8 are split into pieces by the model's pattern; a run of other bytes is one
 *      piece (the reference libraries take str only and define nothing here)
 *   4. pieces merge (tokenizer_bpe.c)
 *
 * A word met again costs one look into a direct-mapped cache of pieces (64-byte slots: one cache
 * line). In English prose nearly all pieces are found there. The cache and all scratch memory belong
 * to an encoder; encoders wait in a list under a lock, so any number of threads may encode at once and
 * each finds a warm one.
 *
 * Every count is int64_t or size_t. A text may be longer than 2 GiB.
 */
#include "tokenizer.h"

#include <assert.h>
#include <pthread.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

enum {
  MAX_TOKENS = HALO__MAX_RANK, /* ranks of tiktoken vocabularies are ids */
  MAX_TOKEN_BYTES = 1024,      /* the longest seen in published vocabularies is 256 spaces */
  MAX_SPECIAL_BYTES = 255,
  CACHE_FROM_BYTES = 4096, /* an encoder that has seen less text does without a cache */
  CACHE_SLOTS = 1 << 15,   /* 2 MiB */
  CACHE_BYTES = 22,
  CACHE_IDS = 10
};

#define ABSENT UINT32_MAX

typedef struct token {
  int64_t offset; /* into texts */
  uint32_t length;
  uint32_t is_special;
} token;

typedef struct merge {
  int32_t left, right, id;
  uint32_t rank;
} merge;

typedef struct cache_slot {
  uint8_t n_bytes; /* 0: empty */
  uint8_t n_ids;
  uint8_t bytes[CACHE_BYTES];
  int32_t ids[CACHE_IDS];
} cache_slot;

static_assert(sizeof(cache_slot) == 64, "a slot is a cache line");

typedef struct encoder {
  struct encoder *next;
  halo__splitter *splitter;
  cache_slot *cache;    /* NULL at first */
  size_t seen_bytes;    /* of text, so far */
  halo__buffer ids;     /* int32_t, the result */
  halo__buffer text;    /* normalised text */
  halo__buffer scratch; /* code points */
} encoder;

struct halo_tokenizer {
  int32_t split_kind, flags;
  bool is_finished;
  int64_t n_tokens, n_added;
  token *tokens;      /* [n_tokens] */
  halo__buffer texts; /* bytes of all tokens */
  uint32_t *index;    /* open-addressed: id + 1 by hash of the bytes; 0 is empty */
  uint64_t index_mask;
  halo__buffer merge_list;
  halo__merges merges;
  int32_t byte_id[256];
  bool special_first[256];                      /* may a special token start with this byte */
  uint8_t special_lengths[MAX_SPECIAL_BYTES];   /* their lengths, longest first */
  int32_t n_special_lengths;
  const halo__split *split;
  uint64_t hash;
  pthread_mutex_t lock; /* of idle */
  encoder *idle;
};

void halo_buffer_free(void *p) { halo__free(p); }

/* ---- the printable alphabet ----
 * GPT-2 writes each byte as one printable character so that vocabularies can be JSON: bytes that
 * print in Latin-1 stand for themselves, the other 68 become U+0100, U+0101, ... in order. */

enum { ALPHABET_END = 0x100 + 68 };

static bool prints(int b) { return (b >= 33 && b <= 126) || (b >= 161 && b <= 255 && b != 173); }

static void alphabet(int32_t to_char[256], int16_t to_byte[ALPHABET_END]) {
  int32_t next = 0x100;
  for (int i = 0; i < ALPHABET_END; i++) to_byte[i] = -1;
  for (int b = 0; b < 256; b++) {
    to_char[b] = prints(b) ? b : next++;
    to_byte[to_char[b]] = (int16_t)b;
  }
  assert(next == ALPHABET_END);
}

/* Bytes of a text in the alphabet; false where a character is not of it. out holds n bytes. */
static bool from_printable(uint8_t *out, size_t *n_out, const char *text, size_t n) {
  int32_t to_char[256];
  int16_t to_byte[ALPHABET_END];
  alphabet(to_char, to_byte);
  size_t kept = 0;
  for (size_t i = 0; i < n; i++) {
    int32_t c = (uint8_t)text[i];
    if (c >= 0x80) {
      if (c < 0xc2 || c > 0xc5 || i + 1 == n || ((uint8_t)text[i + 1] & 0xc0) != 0x80) return false;
      c = (c & 0x1f) << 6 | ((uint8_t)text[++i] & 0x3f);
    }
    if (c >= ALPHABET_END || to_byte[c] < 0) return false;
    out[kept++] = (uint8_t)to_byte[c];
  }
  *n_out = kept;
  return true;
}

halo_status halo_tokenizer_printable(char **out, size_t *n_out, const char *bytes, size_t n,
                                     int32_t reverse) {
  HALO_CHECK(out != NULL && n_out != NULL && (bytes != NULL || n == 0), HALO_EARG,
             "tokenizer_printable: NULL argument");
  halo_status status = HALO_OK;
  halo__buffer b = {0};
  HALO_CHECK(n < (size_t)INT64_MAX / 2, HALO_ENOMEM, "tokenizer_printable: %zu bytes", n);
  HALO_TRY(halo__buffer_grow(&b, 2 * (int64_t)n + 1));
  if (reverse) {
    size_t kept = 0;
    HALO_CHECK_GOTO(from_printable(b.data, &kept, bytes, n), HALO_EARG,
                    "tokenizer_printable: a character is not of GPT-2's byte alphabet");
    b.bytes = (int64_t)kept;
  } else {
    int32_t to_char[256];
    int16_t to_byte[ALPHABET_END];
    alphabet(to_char, to_byte);
    char *end = b.data;
    for (size_t i = 0; i < n; i++) {
      const int32_t c = to_char[(uint8_t)bytes[i]];
      if (c >= 0x80) *end++ = (char)(0xc0 | c >> 6);
      *end++ = (char)(c >= 0x80 ? 0x80 | (c & 0x3f) : c);
    }
    b.bytes = end - (char *)b.data;
  }
  *n_out = (size_t)b.bytes;
  *out = b.data;
  return HALO_OK;
done:
  halo__buffer_free(&b);
  return status;
}

/* ---- building ---- */

static const uint8_t *token_text(const halo_tokenizer *t, int32_t id) {
  return (const uint8_t *)t->texts.data + t->tokens[id].offset;
}

/* The slot of these bytes: of the token that has them, or an empty one. */
static uint64_t index_slot(const halo_tokenizer *t, const uint8_t *bytes, size_t n) {
  uint64_t i = XXH3_64bits(bytes, n) & t->index_mask;
  for (; t->index[i] != 0; i = (i + 1) & t->index_mask) {
    const int32_t id = (int32_t)(t->index[i] - 1);
    if (t->tokens[id].length == n && memcmp(token_text(t, id), bytes, n) == 0) break;
  }
  return i;
}

static int32_t find(const halo_tokenizer *t, const uint8_t *bytes, size_t n) {
  return (int32_t)t->index[index_slot(t, bytes, n)] - 1;
}

halo_status halo_tokenizer_new(halo_tokenizer **out, int64_t n_tokens, int32_t split,
                               int32_t flags) {
  HALO_CHECK(out != NULL, HALO_EARG, "tokenizer_new: out is NULL");
  HALO_CHECK(n_tokens > 0 && n_tokens <= MAX_TOKENS, HALO_EARG,
             "tokenizer_new: %lld tokens, want 1 to %d", (long long)n_tokens, MAX_TOKENS);
  HALO_CHECK((flags & ~7) == 0, HALO_EARG, "tokenizer_new: unknown flags %d", flags);
  halo_status status = HALO_OK;
  void *p;
  HALO_TRY(halo__data_alloc(&p, sizeof(halo_tokenizer)));
  halo_tokenizer *t = p;
  *t = (halo_tokenizer){.split_kind = split, .flags = flags, .n_tokens = n_tokens};
  pthread_mutex_init(&t->lock, NULL);
  HALO_TRY_GOTO(halo__split_get(&t->split, split));
  HALO_TRY_GOTO(halo__data_alloc(&p, n_tokens * (int64_t)sizeof(token)));
  t->tokens = p;
  for (int64_t i = 0; i < n_tokens; i++) t->tokens[i] = (token){.length = ABSENT};
  int64_t slots = 16;
  while (slots < 2 * n_tokens) slots *= 2;
  HALO_TRY_GOTO(halo__data_alloc(&p, slots * (int64_t)sizeof(uint32_t)));
  t->index = p;
  memset(t->index, 0, (size_t)slots * sizeof(uint32_t));
  t->index_mask = (uint64_t)slots - 1;
  *out = t;
  return HALO_OK;
done:
  halo_tokenizer_free(t);
  return status;
}

static void encoder_free(encoder *e) {
  if (e == NULL) return;
  halo__splitter_free(e->splitter);
  halo__free(e->cache);
  halo__buffer_free(&e->ids);
  halo__buffer_free(&e->text);
  halo__buffer_free(&e->scratch);
  halo__free(e);
}

void halo_tokenizer_free(halo_tokenizer *t) {
  if (t == NULL) return;
  for (encoder *e = t->idle; e != NULL;) {
    encoder *next = e->next;
    encoder_free(e);
    e = next;
  }
  halo__free(t->tokens);
  halo__free(t->index);
  halo__buffer_free(&t->texts);
  halo__buffer_free(&t->merge_list);
  halo__merges_free(&t->merges);
  pthread_mutex_destroy(&t->lock);
  halo__free(t);
}

/* Raw bytes of a text given to the builder. */
static halo_status raw_bytes(uint8_t *out, size_t *n_out, const char *text, size_t n, int32_t flags) {
  HALO_CHECK(n > 0, HALO_ECORRUPT, "empty token text");
  if (flags & HALO_TOKEN_PRINTABLE) {
    HALO_CHECK(n <= 2 * MAX_TOKEN_BYTES, HALO_EUNSUPPORTED, "token text of %zu bytes, at most %d", n,
               MAX_TOKEN_BYTES);
    HALO_CHECK(from_printable(out, n_out, text, n), HALO_ECORRUPT,
               "token text '%.*s' is not in GPT-2's byte alphabet", (int)(n < 60 ? n : 60), text);
  } else {
    HALO_CHECK(n <= MAX_TOKEN_BYTES, HALO_EUNSUPPORTED, "token text of %zu bytes, at most %d", n,
               MAX_TOKEN_BYTES);
    memcpy(out, text, n);
    *n_out = n;
  }
  HALO_CHECK(*n_out <= MAX_TOKEN_BYTES, HALO_EUNSUPPORTED, "token text of %zu bytes, at most %d",
             *n_out, MAX_TOKEN_BYTES);
  return HALO_OK;
}

halo_status halo_tokenizer_add(halo_tokenizer *t, int32_t id, const char *text, size_t n,
                               int32_t flags) {
  HALO_CHECK(t != NULL && (text != NULL || n == 0), HALO_EARG, "tokenizer_add: NULL argument");
  HALO_CHECK(!t->is_finished, HALO_ESTATE, "tokenizer_add: the tokenizer is finished");
  HALO_CHECK(id >= 0 && id < t->n_tokens, HALO_ECORRUPT,
             "tokenizer: id %d with %lld tokens in all: ids must be 0, 1, 2, ... without holes", id,
             (long long)t->n_tokens);
  uint8_t bytes[2 * MAX_TOKEN_BYTES];
  halo_status status = raw_bytes(bytes, &n, text, n, flags);
  if (status != HALO_OK) return halo__error_prefix(status, "tokenizer: id %d: ", id);
  const bool special = (flags & HALO_TOKEN_SPECIAL) != 0;
  HALO_CHECK(!special || n <= MAX_SPECIAL_BYTES, HALO_EUNSUPPORTED,
             "tokenizer: special token %d has %zu bytes, at most %d", id, n, MAX_SPECIAL_BYTES);
  // Cutting whole characters out of valid UTF-8 leaves valid UTF-8; normalisation relies on that.
  HALO_CHECK(!special || halo__utf8_valid(bytes, n) == n, HALO_ECORRUPT,
             "tokenizer: special token %d is not valid UTF-8", id);
  const uint64_t slot = index_slot(t, bytes, n);
  if (t->index[slot] != 0) {
    const int32_t other = (int32_t)t->index[slot] - 1;
    HALO_CHECK(other == id && special && !t->tokens[id].is_special, HALO_ECORRUPT,
               "tokenizer: ids %d and %d have the same text", other, id);
    t->tokens[id].is_special = 1;
    return HALO_OK;
  }
  HALO_CHECK(t->tokens[id].length == ABSENT, HALO_ECORRUPT, "tokenizer: two texts for id %d", id);
  const int64_t offset = t->texts.bytes;
  HALO_TRY(halo__buffer_append(&t->texts, bytes, (int64_t)n));
  t->tokens[id] = (token){.offset = offset, .length = (uint32_t)n, .is_special = special};
  t->index[slot] = (uint32_t)id + 1;
  t->n_added++;
  return HALO_OK;
}

static halo_status find_part(int32_t *out, const halo_tokenizer *t, const uint8_t *bytes, size_t n,
                             int64_t rank, const char *what) {
  *out = find(t, bytes, n);
  HALO_CHECK(*out >= 0 && !t->tokens[*out].is_special, HALO_ECORRUPT,
             "tokenizer: merge %lld: its %s '%.*s' is no ordinary token", (long long)rank, what,
             (int)(n < 60 ? n : 60), (const char *)bytes);
  return HALO_OK;
}

halo_status halo_tokenizer_add_merge(halo_tokenizer *t, const char *left, size_t n_left,
                                     const char *right, size_t n_right, int32_t flags) {
  HALO_CHECK(t != NULL && left != NULL && right != NULL, HALO_EARG,
             "tokenizer_add_merge: NULL argument");
  HALO_CHECK(!t->is_finished, HALO_ESTATE, "tokenizer_add_merge: the tokenizer is finished");
  HALO_CHECK(!(t->flags & HALO_TOKENIZER_RANKS), HALO_ESTATE,
             "tokenizer_add_merge: the ranks of this tokenizer are its ids");
  const int64_t rank = t->merge_list.bytes / (int64_t)sizeof(merge);
  HALO_CHECK(rank <= HALO__MAX_RANK, HALO_EUNSUPPORTED, "tokenizer: more than %d merges",
             HALO__MAX_RANK + 1);
  uint8_t bytes[4 * MAX_TOKEN_BYTES];
  halo_status status = raw_bytes(bytes, &n_left, left, n_left, flags);
  if (status == HALO_OK) status = raw_bytes(bytes + n_left, &n_right, right, n_right, flags);
  if (status != HALO_OK)
    return halo__error_prefix(status, "tokenizer: merge %lld: ", (long long)rank);
  merge m = {.rank = (uint32_t)rank};
  HALO_TRY(find_part(&m.left, t, bytes, n_left, rank, "left part"));
  HALO_TRY(find_part(&m.right, t, bytes + n_left, n_right, rank, "right part"));
  HALO_TRY(find_part(&m.id, t, bytes, n_left + n_right, rank, "result"));
  return halo__buffer_append(&t->merge_list, &m, sizeof m);
}

/* tiktoken's rule: any two tokens whose joint bytes are a token merge into it; the id is the rank. */
static halo_status merges_from_ranks(halo_tokenizer *t) {
  for (int32_t id = 0; id < t->n_tokens; id++) {
    if (t->tokens[id].is_special) continue;
    const uint8_t *bytes = token_text(t, id);
    const size_t n = t->tokens[id].length;
    for (size_t cut = 1; cut < n; cut++) {
      merge m = {.id = id, .rank = (uint32_t)id};
      m.left = find(t, bytes, cut);
      if (m.left < 0 || t->tokens[m.left].is_special) continue;
      m.right = find(t, bytes + cut, n - cut);
      if (m.right < 0 || t->tokens[m.right].is_special) continue;
      HALO_TRY(halo__buffer_append(&t->merge_list, &m, sizeof m));
    }
  }
  return HALO_OK;
}

static halo_status build_merges(halo_tokenizer *t) {
  if (t->flags & HALO_TOKENIZER_RANKS) HALO_TRY(merges_from_ranks(t));
  const int64_t n = t->merge_list.bytes / (int64_t)sizeof(merge);
  const merge *list = t->merge_list.data;
  HALO_TRY(halo__merges_reserve(&t->merges, n));
  for (int64_t i = 0; i < n; i++) {
    const halo_status status =
        halo__merges_add(&t->merges, list[i].left, list[i].right, list[i].rank, list[i].id);
    HALO_CHECK(status == HALO_OK, HALO_ECORRUPT, "tokenizer: merge %lld is there twice", (long long)i);
  }
  return HALO_OK;
}

static void index_special(halo_tokenizer *t) {
  bool has_length[MAX_SPECIAL_BYTES + 1] = {false};
  for (int32_t id = 0; id < t->n_tokens; id++) {
    if (!t->tokens[id].is_special) continue;
    t->special_first[token_text(t, id)[0]] = true;
    has_length[t->tokens[id].length] = true;
  }
  for (int n = MAX_SPECIAL_BYTES; n > 0; n--) {
    if (has_length[n]) t->special_lengths[t->n_special_lengths++] = (uint8_t)n;
  }
}

static uint64_t content_hash(const halo_tokenizer *t) {
  const int64_t head[] = {t->split_kind, t->flags, t->n_tokens};
  uint64_t h = XXH3_64bits(head, sizeof head);
  for (int32_t id = 0; id < t->n_tokens; id++) {
    const uint32_t shape[] = {t->tokens[id].length, t->tokens[id].is_special};
    h = XXH3_64bits_withSeed(shape, sizeof shape, h);
    h = XXH3_64bits_withSeed(token_text(t, id), t->tokens[id].length, h);
  }
  return XXH3_64bits_withSeed(t->merge_list.data, (size_t)t->merge_list.bytes, h);
}

halo_status halo_tokenizer_finish(halo_tokenizer *t) {
  HALO_CHECK(t != NULL, HALO_EARG, "tokenizer_finish: NULL argument");
  HALO_CHECK(!t->is_finished, HALO_ESTATE, "tokenizer_finish: called twice");
  for (int64_t id = 0; t->n_added < t->n_tokens && id < t->n_tokens; id++) {
    HALO_CHECK(t->tokens[id].length != ABSENT, HALO_ECORRUPT,
               "tokenizer: id %lld of %lld has no text", (long long)id, (long long)t->n_tokens);
  }
  for (int b = 0; b < 256; b++) {
    const uint8_t byte = (uint8_t)b;
    t->byte_id[b] = find(t, &byte, 1);
    HALO_CHECK(t->byte_id[b] >= 0 && !t->tokens[t->byte_id[b]].is_special, HALO_ECORRUPT,
               "tokenizer: byte 0x%02x has no token, so some texts could not be encoded", b);
  }
  halo__merges_free(&t->merges);
  HALO_TRY(build_merges(t));
  index_special(t);
  t->hash = content_hash(t);
  t->is_finished = true;
  return HALO_OK;
}

int64_t halo_tokenizer_vocab(const halo_tokenizer *t) { return t->n_tokens; }
uint64_t halo_tokenizer_hash(const halo_tokenizer *t) { return t->hash; }

const char *halo_tokenizer_token(const halo_tokenizer *t, int32_t id, size_t *n_out,
                                 int32_t *is_special_out) {
  if (t == NULL || id < 0 || id >= t->n_tokens || t->tokens[id].length == ABSENT) return NULL;
  if (n_out != NULL) *n_out = t->tokens[id].length;
  if (is_special_out != NULL) *is_special_out = (int32_t)t->tokens[id].is_special;
  return (const char *)token_text(t, id);
}

int32_t halo_tokenizer_find(const halo_tokenizer *t, const char *bytes, size_t n) {
  return t == NULL || bytes == NULL ? -1 : find(t, (const uint8_t *)bytes, n);
}

/* ---- encoding ---- */

static halo_status encoder_take(encoder **out, halo_tokenizer *t) {
  pthread_mutex_lock(&t->lock);
  encoder *e = t->idle;
  if (e != NULL) t->idle = e->next;
  pthread_mutex_unlock(&t->lock);
  if (e == NULL) {
    void *p;
    HALO_TRY(halo__data_alloc(&p, sizeof(encoder)));
    e = p;
    *e = (encoder){0};
    const halo_status status = halo__splitter_new(&e->splitter, t->split);
    if (status != HALO_OK) {
      encoder_free(e);
      return status;
    }
  }
  *out = e;
  return HALO_OK;
}

static void encoder_give_back(encoder *e, halo_tokenizer *t) {
  enum { KEEP_BYTES = 1 << 20 };
  e->ids.bytes = 0;
  if (e->ids.capacity > KEEP_BYTES) halo__buffer_free(&e->ids);
  if (e->text.capacity > KEEP_BYTES) halo__buffer_free(&e->text);
  if (e->scratch.capacity > KEEP_BYTES) halo__buffer_free(&e->scratch);
  pthread_mutex_lock(&t->lock);
  e->next = t->idle;
  t->idle = e;
  pthread_mutex_unlock(&t->lock);
}

static halo_status cache_for(encoder *e, size_t bytes) {
  e->seen_bytes += bytes;
  if (e->cache != NULL || e->seen_bytes < CACHE_FROM_BYTES) return HALO_OK;
  void *p;
  HALO_TRY(halo__data_alloc(&p, CACHE_SLOTS * (int64_t)sizeof(cache_slot)));
  e->cache = memset(p, 0, CACHE_SLOTS * sizeof(cache_slot));
  return HALO_OK;
}

static halo_status encode_piece(encoder *e, const halo_tokenizer *t, const uint8_t *piece, size_t n) {
  const int64_t room = n > CACHE_IDS ? (int64_t)n : CACHE_IDS;
  HALO_TRY(halo__buffer_reserve(&e->ids, room * 4));
  int32_t *ids = (int32_t *)((char *)e->ids.data + e->ids.bytes);
  cache_slot *slot = NULL;
  if (n <= CACHE_BYTES && e->cache != NULL) {
    slot = &e->cache[XXH3_64bits(piece, n) & (CACHE_SLOTS - 1)];
    if (slot->n_bytes == n && memcmp(slot->bytes, piece, n) == 0) {
      memcpy(ids, slot->ids, sizeof slot->ids);
      e->ids.bytes += slot->n_ids * 4;
      return HALO_OK;
    }
  }
  int64_t count = 1;
  const int32_t whole = t->flags & HALO_TOKENIZER_WHOLE_PIECES ? find(t, piece, n) : -1;
  if (whole >= 0 && !t->tokens[whole].is_special) {
    ids[0] = whole;
  } else {
    for (size_t i = 0; i < n; i++) ids[i] = t->byte_id[piece[i]];
    HALO_TRY(halo__bpe(&t->merges, ids, (int64_t)n, &count));
  }
  if (slot != NULL && count <= CACHE_IDS) {
    slot->n_bytes = (uint8_t)n;
    slot->n_ids = (uint8_t)count;
    memcpy(slot->bytes, piece, n);
    memcpy(slot->ids, ids, (size_t)count * 4);
  }
  e->ids.bytes += count * 4;
  return HALO_OK;
}

/* Text without special tokens in it. */
static halo_status encode_span(encoder *e, const halo_tokenizer *t, const uint8_t *text, size_t n,
                               bool normalise) {
  if (n == 0) return HALO_OK;
  if (normalise && halo__nfc_needed(text, n)) {
    e->text.bytes = 0;
    HALO_TRY(halo__nfc(&e->text, &e->scratch, text, n));
    text = e->text.data;
    n = (size_t)e->text.bytes;
  }
  if (t->split_kind == HALO_SPLIT_NONE) return encode_piece(e, t, text, n);
  for (size_t at = 0; at < n;) {
    const size_t valid = halo__utf8_valid(text + at, n - at);
    for (size_t piece = 0; piece < valid;) {
      size_t end;
      HALO_TRY(halo__split_next(e->splitter, text + at, valid, piece, &end));
      HALO_TRY(encode_piece(e, t, text + at + piece, end - piece));
      piece = end;
    }
    at += valid;
    if (at == n) break;
    const size_t other = halo__utf8_invalid(text + at, n - at);
    HALO_TRY(encode_piece(e, t, text + at, other));
    at += other;
  }
  return HALO_OK;
}

/* The longest special token that starts here; -1 if none does. */
static int32_t special_at(const halo_tokenizer *t, const uint8_t *text, size_t n) {
  for (int32_t i = 0; i < t->n_special_lengths; i++) {
    const size_t length = t->special_lengths[i];
    if (length > n) continue;
    const int32_t id = find(t, text, length);
    if (id >= 0 && t->tokens[id].is_special) return id;
  }
  return -1;
}

static halo_status encode_text(encoder *e, const halo_tokenizer *t, const uint8_t *text, size_t n,
                               bool parse_special) {
  const bool normalise = (t->flags & HALO_TOKENIZER_NFC) && halo__nfc_needed(text, n) &&
                         halo__utf8_valid(text, n) == n;
  if (!parse_special || t->n_special_lengths == 0) return encode_span(e, t, text, n, normalise);
  size_t done = 0;
  for (size_t at = 0; at < n;) {
    const int32_t id = t->special_first[text[at]] ? special_at(t, text + at, n - at) : -1;
    if (id < 0) {
      at++;
      continue;
    }
    HALO_TRY(encode_span(e, t, text + done, at - done, normalise));
    HALO_TRY(halo__buffer_append(&e->ids, &id, sizeof id));
    done = at += t->tokens[id].length;
  }
  return encode_span(e, t, text + done, n - done, normalise);
}

halo_status halo_tokenizer_encode(int32_t **ids_out, int64_t *n_out, const halo_tokenizer *t,
                                  const char *text, size_t n, int32_t parse_special) {
  HALO_CHECK(ids_out != NULL && n_out != NULL && t != NULL && (text != NULL || n == 0), HALO_EARG,
             "tokenizer_encode: NULL argument");
  HALO_CHECK(t->is_finished, HALO_ESTATE, "tokenizer_encode: the tokenizer is not finished");
  HALO_CHECK(n < (size_t)INT64_MAX / 16, HALO_EARG, "tokenizer_encode: %zu bytes of text", n);
  halo_tokenizer *shared = (halo_tokenizer *)t; // only its list of encoders changes, under its lock
  encoder *e;
  HALO_TRY(encoder_take(&e, shared));
  void *ids = NULL;
  int64_t count = 0;
  halo_status status = cache_for(e, n);
  if (status == HALO_OK) status = encode_text(e, t, (const uint8_t *)text, n, parse_special != 0);
  if (status == HALO_OK) {
    count = e->ids.bytes / 4;
    status = halo__buffer_release(&e->ids, &ids);
  }
  encoder_give_back(e, shared);
  if (status != HALO_OK) return status;
  *ids_out = ids;
  *n_out = count;
  return HALO_OK;
}

halo_status halo_tokenizer_decode(char **text_out, size_t *n_out, const halo_tokenizer *t,
                                  const int32_t *ids, int64_t n) {
  HALO_CHECK(text_out != NULL && n_out != NULL && t != NULL && (ids != NULL || n == 0), HALO_EARG,
             "tokenizer_decode: NULL argument");
  HALO_CHECK(n >= 0, HALO_EARG, "tokenizer_decode: %lld ids", (long long)n);
  HALO_CHECK(t->is_finished, HALO_ESTATE, "tokenizer_decode: the tokenizer is not finished");
  int64_t bytes = 0;
  for (int64_t i = 0; i < n; i++) {
    HALO_CHECK(ids[i] >= 0 && ids[i] < t->n_tokens, HALO_EARG,
               "tokenizer_decode: id %d at index %lld, the vocabulary has %lld", ids[i], (long long)i,
               (long long)t->n_tokens);
    bytes += t->tokens[ids[i]].length; // at most 1024 * n
  }
  void *text;
  HALO_TRY(halo__data_alloc(&text, bytes > 0 ? bytes : 1));
  char *end = text;
  for (int64_t i = 0; i < n; i++) {
    const size_t length = t->tokens[ids[i]].length;
    memcpy(end, token_text(t, ids[i]), length);
    end += length;
  }
  *text_out = text;
  *n_out = (size_t)bytes;
  return HALO_OK;
}
