/* data.c: sequences of documents of token ids, read from memory-mapped files.
 *
 * A corpus is packed once into one file of ids (data.h has the format) and mapped by every process;
 * the page cache is shared by the ranks of a node and a sample costs a copy of its window. Everything
 * a file claims is checked before use, at open: sizes against each other and against the real length,
 * the table of documents entry by entry, checksums. A malformed file gives HALO_ECORRUPT and the
 * reason, never a crash and never a silently shorter data set. What stays open is a file that shrinks
 * while it is mapped: replacing one by rename is safe, cutting one in place is not.
 *
 * A halo_tokens is a list of documents in some order, each a run of tokens of a mapped file:
 *
 *   start   0     5        12   14       19        first token of each document in this sequence
 *           | d0  |   d1    | d2 |   d3   |
 *   which   0     0         1    0                 its file
 *   source  40    0        112  210                its first token there
 *
 * For a whole file source is start. Choices (documents of a split, a range, shards joined) share the
 * mappings and have their own arrays; reading walks the documents either way.
 *
 * llm.c's files are read too, because people have them: 1024 bytes of header, then tokens. They carry
 * no documents, vocabulary or checksum; documents begin at a separator if the caller names one.
 */
#include "data.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

typedef struct mapping {
  int32_t references;
  void *base;
  size_t bytes;
  const void *tokens;
  uint32_t width; /* 2 or 4 */
  int64_t n_tokens;
  int64_t vocab; /* 0: unknown */
  uint64_t tokenizer_hash;
} mapping;

struct halo_tokens {
  mapping **maps; /* [n_maps], each referenced */
  int64_t n_maps;
  int64_t n_documents;
  const int64_t *start;  /* [n_documents + 1] */
  const int64_t *source; /* [n_documents] */
  const int32_t *which;  /* [n_documents] index into maps; NULL: all in maps[0] */
  void *owned;           /* the arrays, where they are not the file's */
  uint64_t hash;
};

enum { LLMC_HEADER_BYTES = 1024, LLMC_MAGIC_16 = 20240520, LLMC_MAGIC_32 = 20240801 };

static void map_release(mapping *m) {
  if (m == NULL || __atomic_sub_fetch(&m->references, 1, __ATOMIC_ACQ_REL) > 0) return;
  if (m->base != NULL) munmap(m->base, m->bytes);
  halo__free(m);
}

void halo_tokens_free(halo_tokens *t) {
  if (t == NULL) return;
  for (int64_t i = 0; i < t->n_maps; i++) map_release(t->maps[i]);
  halo__free(t->maps);
  halo__free(t->owned);
  halo__free(t);
}

static halo_status map_file(mapping **out, const char *path) {
  halo_status status = HALO_OK;
  struct stat info;
  void *p = NULL;
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  HALO_CHECK(fd >= 0, HALO_EIO, "tokens_open: cannot open %s: %s", path, strerror(errno));
  HALO_CHECK_GOTO(fstat(fd, &info) == 0, HALO_EIO, "tokens_open: %s: %s", path, strerror(errno));
  HALO_CHECK_GOTO(S_ISREG(info.st_mode), HALO_EIO, "tokens_open: %s is not a regular file", path);
  HALO_CHECK_GOTO(info.st_size >= (off_t)sizeof(halo__token_file), HALO_ECORRUPT,
                  "tokens_open: %s has %lld bytes, too few for a header", path,
                  (long long)info.st_size);
  HALO_TRY_GOTO(halo__data_alloc(&p, sizeof(mapping)));
  mapping *m = p;
  *m = (mapping){.references = 1, .bytes = (size_t)info.st_size};
  m->base = mmap(NULL, m->bytes, PROT_READ, MAP_SHARED, fd, 0);
  if (m->base == MAP_FAILED) {
    m->base = NULL;
    status = halo__error(errno == ENOMEM ? HALO_ENOMEM : HALO_EIO, "tokens_open: cannot map %s: %s",
                         path, strerror(errno));
    map_release(m);
    goto done;
  }
  *out = m;
done:
  close(fd);
  return status;
}

static inline const mapping *map_of(const halo_tokens *t, int64_t document) {
  return t->maps[t->which != NULL ? t->which[document] : 0];
}

static inline uint32_t token_at(const mapping *m, int64_t i) {
  return m->width == 2 ? ((const uint16_t *)m->tokens)[i] : ((const uint32_t *)m->tokens)[i];
}

/* Ids [first, first + n) of the file as int32; each below the vocabulary. */
static halo_status copy_ids(int32_t *out, const mapping *m, int64_t first, int64_t n) {
  assert(first >= 0 && n >= 0 && first + n <= m->n_tokens);
  uint32_t most = 0;
  if (m->width == 2) {
    const uint16_t *from = (const uint16_t *)m->tokens + first;
    for (int64_t i = 0; i < n; i++) {
      out[i] = from[i];
      most = from[i] > most ? from[i] : most;
    }
  } else {
    const uint32_t *from = (const uint32_t *)m->tokens + first;
    for (int64_t i = 0; i < n; i++) {
      out[i] = (int32_t)from[i];
      most = from[i] > most ? from[i] : most;
    }
  }
  const uint32_t limit = m->vocab > 0 ? (uint32_t)m->vocab : (uint32_t)INT32_MAX;
  if (most < limit) return HALO_OK;
  for (int64_t i = 0; i < n; i++) {
    HALO_CHECK(token_at(m, first + i) < limit, HALO_ECORRUPT,
               "tokens: id %u at token %lld, the vocabulary has %lld", token_at(m, first + i),
               (long long)(first + i), (long long)m->vocab);
  }
  return HALO_OK;
}

/* ---- opening ---- */

static halo_status check_header(const halo__token_file *h, int64_t bytes, int64_t *table_out,
                                const char *path) {
  HALO_CHECK(h->version == HALO__TOKEN_FILE_VERSION, HALO_EVERSION,
             "tokens_open: %s has version %u, this program reads %d", path, h->version,
             HALO__TOKEN_FILE_VERSION);
  HALO_CHECK(XXH3_64bits(h, offsetof(halo__token_file, header_hash)) == h->header_hash, HALO_ECORRUPT,
             "tokens_open: %s: the header does not match its checksum", path);
  HALO_CHECK(h->vocab > 0 && h->vocab <= INT32_MAX && h->width == halo__token_width(h->vocab),
             HALO_ECORRUPT, "tokens_open: %s: %u bytes per token with a vocabulary of %lld", path,
             h->width, (long long)h->vocab);
  int64_t tokens, table, end;
  HALO_CHECK(h->n_tokens >= 0 && h->n_documents >= 0 && h->n_documents <= h->n_tokens &&
                 h->n_documents < INT32_MAX && halo__mul(h->n_tokens, h->width, &tokens) &&
                 halo__add(tokens, (int64_t)sizeof *h + 7, &table) &&
                 halo__mul(h->n_documents + 1, 8, &end) && halo__add(end, table & ~(int64_t)7, &end),
             HALO_ECORRUPT, "tokens_open: %s: impossible counts, %lld tokens in %lld documents", path,
             (long long)h->n_tokens, (long long)h->n_documents);
  HALO_CHECK(end == bytes, HALO_ECORRUPT, "tokens_open: %s has %lld bytes, its header asks for %lld",
             path, (long long)bytes, (long long)end);
  *table_out = table & ~(int64_t)7;
  return HALO_OK;
}

static halo_status check_documents(const halo__token_file *h, const int64_t *start, const char *path) {
  HALO_CHECK(XXH3_64bits(start, (size_t)(h->n_documents + 1) * 8) == h->documents_hash, HALO_ECORRUPT,
             "tokens_open: %s: the table of documents does not match its checksum", path);
  HALO_CHECK(start[0] == 0 && start[h->n_documents] == h->n_tokens, HALO_ECORRUPT,
             "tokens_open: %s: the documents do not cover the tokens", path);
  for (int64_t d = 0; d < h->n_documents; d++) {
    HALO_CHECK(start[d] < start[d + 1], HALO_ECORRUPT, "tokens_open: %s: document %lld is empty", path,
               (long long)d);
  }
  return HALO_OK;
}

static halo_status check_tokens(const mapping *m, uint64_t hash, const char *path) {
  HALO_CHECK(XXH3_64bits(m->tokens, (size_t)(m->n_tokens * m->width)) == hash, HALO_ECORRUPT,
             "tokens_open: %s: the tokens do not match their checksum", path);
  int32_t ids[4096];
  for (int64_t at = 0; at < m->n_tokens; at += 4096) {
    HALO_TRY(copy_ids(ids, m, at, m->n_tokens - at < 4096 ? m->n_tokens - at : 4096));
  }
  return HALO_OK;
}

static halo_status open_halo(halo_tokens *t, const char *path, bool verify) {
  mapping *m = t->maps[0];
  const halo__token_file *h = m->base;
  int64_t table = 0;
  HALO_TRY(check_header(h, (int64_t)m->bytes, &table, path));
  m->tokens = (const char *)m->base + sizeof *h;
  m->width = h->width;
  m->n_tokens = h->n_tokens;
  m->vocab = h->vocab;
  m->tokenizer_hash = h->tokenizer_hash;
  const int64_t *start = (const int64_t *)((const char *)m->base + table);
  HALO_TRY(check_documents(h, start, path));
  if (verify) HALO_TRY(check_tokens(m, h->tokens_hash, path));
  t->n_documents = h->n_documents;
  t->start = t->source = start;
  t->hash = h->header_hash; // covers the hashes of tokens and documents, the counts, the tokenizer
  return HALO_OK;
}

static halo_status open_llmc(halo_tokens *t, const char *path, int32_t separator) {
  mapping *m = t->maps[0];
  const int32_t *header = m->base;
  HALO_CHECK(m->bytes >= LLMC_HEADER_BYTES, HALO_ECORRUPT,
             "tokens_open: %s has %zu bytes, too few for llm.c's header", path, m->bytes);
  m->width = header[0] == LLMC_MAGIC_16 ? 2 : 4;
  const int32_t version = m->width == 2 ? 1 : 7; // karpathy/llm.c dev/data/data_common.py
  HALO_CHECK(header[1] == version, HALO_EVERSION, "tokens_open: %s is llm.c data of version %d, want %d",
             path, header[1], version);
  m->n_tokens = header[2];
  m->tokens = (const char *)m->base + LLMC_HEADER_BYTES;
  HALO_CHECK(m->n_tokens >= 0 &&
                 (size_t)m->n_tokens * m->width + LLMC_HEADER_BYTES == m->bytes,
             HALO_ECORRUPT, "tokens_open: %s has %zu bytes, its header says %lld tokens of %u bytes",
             path, m->bytes, (long long)m->n_tokens, m->width);
  int64_t n = 0;
  for (int64_t i = 0; i < m->n_tokens; i++) {
    n += i == 0 || (separator >= 0 && token_at(m, i) == (uint32_t)separator);
  }
  HALO_CHECK(n < INT32_MAX, HALO_EUNSUPPORTED, "tokens_open: %s has %lld documents", path,
             (long long)n);
  HALO_TRY(halo__data_alloc(&t->owned, (n + 1) * 8));
  int64_t *start = t->owned, d = 0;
  for (int64_t i = 0; i < m->n_tokens; i++) {
    if (i == 0 || (separator >= 0 && token_at(m, i) == (uint32_t)separator)) start[d++] = i;
  }
  start[n] = m->n_tokens;
  t->n_documents = n;
  t->start = t->source = start;
  const int64_t shape[] = {m->width, m->n_tokens, separator};
  t->hash = XXH3_64bits_withSeed(m->tokens, (size_t)m->n_tokens * m->width,
                                 XXH3_64bits(shape, sizeof shape));
  return HALO_OK;
}

/* Without documents yet, and with room for n_maps. */
static halo_status tokens_new(halo_tokens **out, int64_t n_maps) {
  void *p;
  HALO_TRY(halo__data_alloc(&p, sizeof(halo_tokens)));
  halo_tokens *t = p;
  *t = (halo_tokens){0};
  const halo_status status = halo__data_alloc(&p, n_maps * (int64_t)sizeof(mapping *));
  if (status != HALO_OK) {
    halo_tokens_free(t);
    return status;
  }
  t->maps = p;
  *out = t;
  return HALO_OK;
}

halo_status halo_tokens_open(halo_tokens **out, const char *path, int32_t separator,
                             int32_t verify) {
  HALO_CHECK(out != NULL && path != NULL, HALO_EARG, "tokens_open: NULL argument");
  halo_tokens *t = NULL;
  HALO_TRY(tokens_new(&t, 1));
  halo_status status = map_file(&t->maps[0], path);
  if (status != HALO_OK) {
    halo_tokens_free(t);
    return status;
  }
  t->n_maps = 1;
  const mapping *map = t->maps[0];
  int32_t magic;
  memcpy(&magic, map->base, sizeof magic);
  if (magic == LLMC_MAGIC_16 || magic == LLMC_MAGIC_32) {
    status = open_llmc(t, path, separator);
  } else if (memcmp(map->base, HALO__TOKEN_FILE_MAGIC, 8) == 0) {
    status = open_halo(t, path, verify != 0);
  } else {
    status = halo__error(HALO_ECORRUPT, "tokens_open: %s is neither a token file nor llm.c data", path);
  }
  if (status != HALO_OK) {
    halo_tokens_free(t);
    return status;
  }
  *out = t;
  return HALO_OK;
}

/* ---- reading ---- */

int64_t halo_tokens_count(const halo_tokens *t) { return t->start[t->n_documents]; }
int64_t halo_tokens_documents(const halo_tokens *t) { return t->n_documents; }
int64_t halo_tokens_vocab(const halo_tokens *t) { return t->maps[0]->vocab; }
uint64_t halo_tokens_tokenizer_hash(const halo_tokens *t) { return t->maps[0]->tokenizer_hash; }
uint64_t halo_tokens_hash(const halo_tokens *t) { return t->hash; }

halo_status halo_tokens_document(const halo_tokens *t, int64_t document, int64_t *first_out,
                                 int64_t *n_out) {
  HALO_CHECK(t != NULL && first_out != NULL && n_out != NULL, HALO_EARG,
             "tokens_document: NULL argument");
  HALO_CHECK(document >= 0 && document < t->n_documents, HALO_EARG,
             "tokens_document: document %lld of %lld", (long long)document,
             (long long)t->n_documents);
  *first_out = t->start[document];
  *n_out = t->start[document + 1] - t->start[document];
  return HALO_OK;
}

int64_t halo_tokens_find_document(const halo_tokens *t, int64_t token) {
  if (token < 0 || token >= halo_tokens_count(t)) return -1;
  int64_t low = 0, high = t->n_documents; // start[low] <= token < start[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (t->start[middle] <= token) low = middle;
    else high = middle;
  }
  return low;
}

halo_status halo_tokens_document_hash(const halo_tokens *t, int64_t document, uint64_t *out) {
  HALO_CHECK(out != NULL, HALO_EARG, "tokens_document_hash: out is NULL");
  enum { CHUNK = 4096 };
  int64_t first, n;
  HALO_TRY(halo_tokens_document(t, document, &first, &n));
  int32_t ids[CHUNK];
  uint64_t h = (uint64_t)n;
  for (int64_t at = 0; at < n; at += CHUNK) {
    const int64_t m = n - at < CHUNK ? n - at : CHUNK;
    HALO_TRY(copy_ids(ids, map_of(t, document), t->source[document] + at, m));
    h = XXH3_64bits_withSeed(ids, (size_t)m * 4, h);
  }
  *out = h;
  return HALO_OK;
}

halo_status halo_tokens_read(int32_t *tokens, int32_t *documents, const halo_tokens *t, int64_t first,
                             int64_t n, int32_t pad) {
  HALO_CHECK(tokens != NULL && t != NULL, HALO_EARG, "tokens_read: NULL argument");
  HALO_CHECK(first >= 0 && n >= 0, HALO_EARG, "tokens_read: %lld tokens from %lld on", (long long)n,
             (long long)first);
  const int64_t count = halo_tokens_count(t);
  int64_t done = 0;
  for (int64_t d = halo_tokens_find_document(t, first); d >= 0 && d < t->n_documents && done < n;
       d++) {
    const int64_t skip = first + done - t->start[d];
    int64_t m = t->start[d + 1] - t->start[d] - skip;
    if (m > n - done) m = n - done;
    HALO_TRY(copy_ids(tokens + done, map_of(t, d), t->source[d] + skip, m));
    for (int64_t i = 0; documents != NULL && i < m; i++) documents[done + i] = (int32_t)d;
    done += m;
  }
  assert(done == n || first + done >= count);
  (void)count;
  for (; done < n; done++) {
    tokens[done] = pad;
    if (documents != NULL) documents[done] = -1;
  }
  return HALO_OK;
}

/* ---- choices ---- */

/* The arrays of a new sequence of n documents. */
typedef struct arrays {
  int64_t *start, *source;
  int32_t *which;
} arrays;

static int64_t arrays_bytes(int64_t n) { return (2 * n + 1) * 8 + n * 4; }

/* A sequence of n documents over n_maps mappings, both to be filled. */
static halo_status choice_new(halo_tokens **out, arrays *a, int64_t n, int64_t n_maps) {
  halo_tokens *t;
  HALO_TRY(tokens_new(&t, n_maps));
  const halo_status status = halo__data_alloc(&t->owned, arrays_bytes(n));
  if (status != HALO_OK) {
    halo_tokens_free(t);
    return status;
  }
  t->n_documents = n;
  t->start = a->start = t->owned;
  t->source = a->source = a->start + n + 1;
  t->which = a->which = (int32_t *)(a->source + n);
  a->start[0] = 0;
  *out = t;
  return HALO_OK;
}

static void share_maps(halo_tokens *t, const halo_tokens *of) {
  for (int64_t i = 0; i < of->n_maps; i++) {
    __atomic_add_fetch(&of->maps[i]->references, 1, __ATOMIC_ACQ_REL);
    t->maps[t->n_maps++] = of->maps[i];
  }
}

static inline int32_t which_of(const halo_tokens *t, int64_t document) {
  return t->which != NULL ? t->which[document] : 0;
}

static void choice_hash(halo_tokens *t, uint64_t parent) {
  t->hash = XXH3_64bits_withSeed(t->owned, (size_t)arrays_bytes(t->n_documents), parent);
}

halo_status halo_tokens_select(halo_tokens **out, halo_tokens *t, const int64_t *documents,
                               int64_t n) {
  HALO_CHECK(out != NULL && t != NULL && (documents != NULL || n == 0), HALO_EARG,
             "tokens_select: NULL argument");
  HALO_CHECK(n >= 0 && n < INT32_MAX, HALO_EARG, "tokens_select: %lld documents", (long long)n);
  int64_t total = 0;
  for (int64_t i = 0; i < n; i++) {
    int64_t first, length;
    HALO_TRY(halo_tokens_document(t, documents[i], &first, &length));
    HALO_CHECK(halo__add(total, length, &total), HALO_EARG, "tokens_select: too many tokens");
  }
  halo_tokens *c;
  arrays a;
  HALO_TRY(choice_new(&c, &a, n, t->n_maps));
  share_maps(c, t);
  for (int64_t i = 0; i < n; i++) {
    const int64_t d = documents[i];
    a.start[i + 1] = a.start[i] + t->start[d + 1] - t->start[d];
    a.source[i] = t->source[d];
    a.which[i] = which_of(t, d);
  }
  choice_hash(c, t->hash);
  *out = c;
  return HALO_OK;
}

halo_status halo_tokens_slice(halo_tokens **out, halo_tokens *t, int64_t first, int64_t n) {
  HALO_CHECK(out != NULL && t != NULL, HALO_EARG, "tokens_slice: NULL argument");
  const int64_t count = halo_tokens_count(t);
  HALO_CHECK(first >= 0 && n > 0 && first < count && n <= count - first, HALO_EARG,
             "tokens_slice: %lld tokens from %lld on, of %lld", (long long)n, (long long)first,
             (long long)count);
  const int64_t d0 = halo_tokens_find_document(t, first);
  const int64_t d1 = halo_tokens_find_document(t, first + n - 1);
  halo_tokens *c;
  arrays a;
  HALO_TRY(choice_new(&c, &a, d1 - d0 + 1, t->n_maps));
  share_maps(c, t);
  for (int64_t d = d0; d <= d1; d++) {
    const int64_t cut = d == d0 ? first - t->start[d] : 0;
    a.start[d - d0] = d == d0 ? 0 : t->start[d] - first;
    a.source[d - d0] = t->source[d] + cut;
    a.which[d - d0] = which_of(t, d);
  }
  a.start[d1 - d0 + 1] = n;
  choice_hash(c, t->hash);
  *out = c;
  return HALO_OK;
}

/* What the parts have in all; they must agree on vocabulary and tokenizer. */
static halo_status join_sizes(int64_t *documents_out, int64_t *maps_out, halo_tokens *const *parts,
                              int64_t n) {
  int64_t documents = 0, tokens = 0, maps = 0;
  for (int64_t i = 0; i < n; i++) {
    HALO_CHECK(parts[i] != NULL, HALO_EARG, "tokens_join: part %lld is NULL", (long long)i);
    HALO_CHECK(halo_tokens_vocab(parts[i]) == halo_tokens_vocab(parts[0]) &&
                   halo_tokens_tokenizer_hash(parts[i]) == halo_tokens_tokenizer_hash(parts[0]),
               HALO_EARG, "tokens_join: parts 0 and %lld were made with different tokenizers",
               (long long)i);
    documents += parts[i]->n_documents;
    maps += parts[i]->n_maps;
    HALO_CHECK(documents < INT32_MAX && maps < INT32_MAX &&
                   halo__add(tokens, halo_tokens_count(parts[i]), &tokens),
               HALO_EUNSUPPORTED, "tokens_join: too many documents");
  }
  *documents_out = documents;
  *maps_out = maps;
  return HALO_OK;
}

halo_status halo_tokens_join(halo_tokens **out, halo_tokens *const *parts, int64_t n) {
  HALO_CHECK(out != NULL && parts != NULL && n > 0, HALO_EARG, "tokens_join: no parts");
  int64_t documents = 0, maps = 0;
  HALO_TRY(join_sizes(&documents, &maps, parts, n));
  halo_tokens *t;
  arrays a;
  HALO_TRY(choice_new(&t, &a, documents, maps));
  uint64_t hash = 0;
  int64_t at = 0;
  for (int64_t i = 0; i < n; i++) {
    const halo_tokens *p = parts[i];
    const int32_t first_map = (int32_t)t->n_maps;
    share_maps(t, p);
    for (int64_t d = 0; d < p->n_documents; d++, at++) {
      a.start[at + 1] = a.start[at] + p->start[d + 1] - p->start[d];
      a.source[at] = p->source[d];
      a.which[at] = first_map + which_of(p, d);
    }
    hash = XXH3_64bits_withSeed(&p->hash, sizeof p->hash, hash);
  }
  choice_hash(t, hash);
  *out = t;
  return HALO_OK;
}

halo_status halo_tokens_split(halo_tokens **train_out, halo_tokens **valid_out, halo_tokens *t,
                              double share, uint64_t seed) {
  HALO_CHECK(train_out != NULL && valid_out != NULL && t != NULL, HALO_EARG,
             "tokens_split: NULL argument");
  HALO_CHECK(share > 0 && share < 1, HALO_EARG, "tokens_split: share %g, want between 0 and 1", share);
  halo_status status = HALO_OK;
  halo_tokens *train = NULL;
  void *memory;
  const int64_t n = t->n_documents;
  HALO_TRY(halo__data_alloc(&memory, (n + 1) * 8));
  int64_t *chosen = memory; // train from the front, valid from the back, both in order after the turn
  int64_t n_train = 0, n_valid = 0;
  for (int64_t d = 0; d < n; d++) {
    uint64_t h;
    HALO_TRY_GOTO(halo_tokens_document_hash(t, d, &h));
    h = XXH3_64bits_withSeed(&h, sizeof h, seed);
    if ((double)(h >> 11) * 0x1p-53 < share) chosen[n - ++n_valid] = d;
    else chosen[n_train++] = d;
  }
  HALO_CHECK_GOTO(n_train > 0 && n_valid > 0, HALO_EARG,
                  "tokens_split: of %lld documents %lld would be held out for a share of %g; take a range"
                  " of tokens instead, or another seed",
                  (long long)n, (long long)n_valid, share);
  for (int64_t i = n_train, j = n - 1; i < j; i++, j--) {
    const int64_t swap = chosen[i];
    chosen[i] = chosen[j];
    chosen[j] = swap;
  }
  HALO_TRY_GOTO(halo_tokens_select(&train, t, chosen, n_train));
  HALO_TRY_GOTO(halo_tokens_select(valid_out, t, chosen + n_train, n_valid));
  *train_out = train;
  train = NULL;
done:
  halo_tokens_free(train);
  halo__free(memory);
  return status;
}
