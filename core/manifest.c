/* manifest.c: the text that says what a checkpoint consists of.
 *
 *   {
 *     "format": "halo-checkpoint",
 *     "version": 1,
 *     "step": 400,
 *     "world": 4,
 *     "files": [
 *       {"name": "config.json", "bytes": 612, "sha256": "9f..", "chunks": "a41c.."},
 *       ...
 *     ],
 *     "state": { what the training loop wants back },
 *     "manifest_sha256": "..."
 *   }
 *
 * `chunks` is the XXH3-64 of each 4 MiB of the file, 16 hex digits each, big end first. The last line
 * seals the text: it is the SHA-256 of all bytes before it, and its own bytes are fixed but for the
 * digits, so that any change anywhere is seen. A seal is not a signature: whoever can write the file
 * can seal it again. So the text is parsed as if a stranger had written it: by json.c, with names that
 * cannot leave the folder, no duplicates, and lengths that agree.
 *
 * A part (`rank-00003.part.json`) is the same without state: what one rank hands to rank 0.
 */
#include "checkpoint.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_FILES = 65536, MAX_WORLD = 1 << 20, STATE_DEPTH = 48 };

static const char seal_head[] = "  \"manifest_sha256\": \"", seal_tail[] = "\"\n}\n";
enum { SEAL_BYTES = sizeof seal_head - 1 + 64 + sizeof seal_tail - 1 };

void halo__manifest_free(halo__manifest *m) {
  for (int32_t i = 0; i < m->n; i++) {
    halo__free(m->file[i].name);
    halo__digest_free(&m->file[i].digest);
  }
  halo__free(m->file);
  halo__free(m->state);
  *m = (halo__manifest){0};
}

halo_status halo__manifest_add(halo__manifest *m, const char *name, halo__digest *digest) {
  if (m->n == m->capacity) {
    const int32_t capacity = m->capacity == 0 ? 16 : 2 * m->capacity;
    halo__manifest_file *more = NULL;
    HALO_TRY(halo__scratch((void **)&more, capacity, sizeof *more));
    if (m->n > 0) memcpy(more, m->file, (size_t)m->n * sizeof *more);
    halo__free(m->file);
    m->file = more;
    m->capacity = capacity;
  }
  halo__manifest_file *f = &m->file[m->n];
  const size_t length = strlen(name) + 1;
  HALO_TRY(halo__scratch((void **)&f->name, (int64_t)length, 1));
  memcpy(f->name, name, length);
  f->digest = *digest;
  digest->chunks = NULL;
  m->n++;
  return HALO_OK;
}

/* ---- writing -------------------------------------------------------------------------------- */

static halo_status put_file(halo__text *t, const halo__manifest_file *f) {
  HALO_TRY(halo__text_add(t, "    {\"name\": ", 13));
  HALO_TRY(halo__text_quote(t, f->name, strlen(f->name)));
  HALO_TRY(halo__text_print(t, ", \"bytes\": %lld, \"sha256\": \"%s\", \"chunks\": \"",
                            (long long)f->digest.bytes, f->digest.sha256));
  for (int64_t i = 0; i < f->digest.n_chunks; i++) {
    HALO_TRY(halo__text_print(t, "%016llx", (unsigned long long)f->digest.chunks[i]));
  }
  return halo__text_add(t, "\"}", 2);
}

halo_status halo__manifest_write(halo__text *t, const halo__manifest *m) {
  HALO_TRY(halo__text_print(t, "{\n  \"format\": \"halo-checkpoint\",\n  \"version\": %d,\n",
                            HALO__MANIFEST_VERSION));
  HALO_TRY(halo__text_print(t, "  \"step\": %lld,\n  \"world\": %d,\n  \"files\": [\n",
                            (long long)m->step, m->world));
  for (int32_t i = 0; i < m->n; i++) {
    HALO_TRY(put_file(t, &m->file[i]));
    HALO_TRY(halo__text_print(t, i + 1 < m->n ? ",\n" : "\n"));
  }
  HALO_TRY(halo__text_print(t, "  ],\n"));
  if (m->state != NULL) {
    HALO_TRY(halo__text_print(t, "  \"state\": "));
    HALO_TRY(halo__text_add(t, m->state, strlen(m->state)));
    HALO_TRY(halo__text_print(t, ",\n"));
  }
  char hex[65];
  halo__sha256 sha;
  halo__sha256_init(&sha, false);
  halo__sha256_add(&sha, t->text, t->n);
  halo__sha256_end(&sha, hex);
  return halo__text_print(t, "%s%s%s", seal_head, hex, seal_tail);
}

/* ---- parsing -------------------------------------------------------------------------------- */

/* "a" or "folder/a", plain names both; nothing else is ever written. */
static bool is_inside(const char *name, size_t length) {
  if (memchr(name, 0, length) != NULL) return false;
  const char *slash = memchr(name, '/', length);
  if (slash == NULL) return halo__file_is_plain_name(name, length);
  const size_t first = (size_t)(slash - name);
  return halo__file_is_plain_name(name, first) &&
         halo__file_is_plain_name(slash + 1, length - first - 1);
}

static int32_t hex_digit(char c) {
  return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static halo_status read_chunks(halo__digest *d, const char *what, const char *hex, size_t length) {
  HALO_CHECK(length % 16 == 0 && (int64_t)(length / 16) == d->bytes / HALO__CHUNK + (d->bytes % HALO__CHUNK != 0),
             HALO_ECORRUPT, "%s: %zu digits of chunk hashes for a file of %lld bytes", what, length,
             (long long)d->bytes);
  HALO_TRY(halo__scratch((void **)&d->chunks, (int64_t)(length / 16) + 1, sizeof *d->chunks));
  for (size_t i = 0; i < length; i++) {
    const int32_t digit = hex_digit(hex[i]);
    HALO_CHECK(digit >= 0, HALO_ECORRUPT, "%s: a chunk hash is not hexadecimal", what);
    if (i % 16 == 0) d->chunks[d->n_chunks++] = 0;
    d->chunks[i / 16] = d->chunks[i / 16] << 4 | (uint64_t)digit;
  }
  return HALO_OK;
}

typedef struct fields {
  const char *what;
  halo__json *json;
} fields;

static halo_status want_int(const fields *f, const char *key, int64_t low, int64_t high, int64_t *out) {
  const halo__json_kind kind = halo__json_next(f->json);
  if (kind == HALO__JSON_ERROR) return halo__json_error(f->json, f->what);
  HALO_CHECK(kind == HALO__JSON_NUMBER && halo__json_int(f->json, out) && *out >= low && *out <= high,
             HALO_ECORRUPT, "%s: %s must be an integer in [%lld,%lld]", f->what, key, (long long)low,
             (long long)high);
  return HALO_OK;
}

static halo_status want_text(const fields *f, const char *key) {
  const halo__json_kind kind = halo__json_next(f->json);
  if (kind == HALO__JSON_ERROR) return halo__json_error(f->json, f->what);
  HALO_CHECK(kind == HALO__JSON_STRING, HALO_ECORRUPT, "%s: %s must be a string", f->what, key);
  return HALO_OK;
}

/* A key that is known and new: its number, or an error. */
static halo_status which(const fields *f, const char *const *keys, int32_t n, uint32_t *seen, int32_t *out) {
  for (int32_t i = 0; i < n; i++) {
    if (!halo__json_is(f->json, keys[i])) continue;
    HALO_CHECK((*seen >> i & 1) == 0, HALO_ECORRUPT, "%s: %s comes twice", f->what, keys[i]);
    *seen |= 1u << i;
    *out = i;
    return HALO_OK;
  }
  return halo__error(HALO_ECORRUPT, "%s: unknown field \"%s\"", f->what,
                     halo__printable(f->json->text, f->json->length));
}

static halo_status read_file(halo__manifest *m, const fields *f) {
  enum { NAME, BYTES, SHA256, CHUNKS, N };
  static const char *const keys[N] = {"name", "bytes", "sha256", "chunks"};
  halo__json *j = f->json;
  halo_status status = HALO_OK;
  halo__digest d = {0};
  const char *name = NULL, *chunks = NULL;
  size_t chunks_length = 0;
  uint32_t seen = 0;
  halo__json_kind kind;
  while ((kind = halo__json_next(j)) == HALO__JSON_KEY) {
    int32_t key = 0;
    HALO_TRY(which(f, keys, N, &seen, &key));
    if (key == BYTES) {
      HALO_TRY(want_int(f, keys[key], 0, INT64_MAX, &d.bytes));
      continue;
    }
    HALO_TRY(want_text(f, keys[key]));
    if (key == NAME) {
      HALO_CHECK(is_inside(j->text, j->length), HALO_ECORRUPT, "%s: the file name \"%s\" is not allowed",
                 f->what, halo__printable(j->text, j->length));
      name = j->text;
    } else if (key == SHA256) {
      HALO_CHECK(j->length == 64, HALO_ECORRUPT, "%s: a SHA-256 has %zu digits", f->what, j->length);
      for (int i = 0; i < 64; i++) {
        HALO_CHECK(hex_digit(j->text[i]) >= 0, HALO_ECORRUPT, "%s: a SHA-256 is not hexadecimal", f->what);
      }
      memcpy(d.sha256, j->text, 65);
    } else {
      chunks = j->text;
      chunks_length = j->length;
    }
  }
  if (kind == HALO__JSON_ERROR) return halo__json_error(j, f->what);
  HALO_CHECK(seen == (1u << N) - 1, HALO_ECORRUPT, "%s: a file lacks name, bytes, sha256 or chunks", f->what);
  HALO_CHECK(m->n < MAX_FILES, HALO_ECORRUPT, "%s: more than %d files", f->what, MAX_FILES);
  HALO_TRY_GOTO(read_chunks(&d, f->what, chunks, chunks_length));
  HALO_TRY_GOTO(halo__manifest_add(m, name, &d));
done:
  halo__digest_free(&d);
  return status;
}

static halo_status read_files(halo__manifest *m, const fields *f) {
  halo__json_kind kind = halo__json_next(f->json);
  HALO_CHECK(kind == HALO__JSON_ARRAY, HALO_ECORRUPT, "%s: files must be an array", f->what);
  while ((kind = halo__json_next(f->json)) == HALO__JSON_OBJECT) HALO_TRY(read_file(m, f));
  if (kind == HALO__JSON_ERROR) return halo__json_error(f->json, f->what);
  HALO_CHECK(kind == HALO__JSON_ARRAY_END, HALO_ECORRUPT, "%s: a file is not an object", f->what);
  return HALO_OK;
}

/* The state's text, copied before decoding strings in place can change it. */
static halo_status read_state(halo__manifest *m, const fields *f, const char *pristine) {
  halo__json *j = f->json;
  while (j->at < j->end && (*j->at == ' ' || *j->at == '\n' || *j->at == '\t' || *j->at == '\r')) j->at++;
  const size_t from = (size_t)(j->at - j->start);
  if (!halo__json_skip(j, halo__json_next(j))) return halo__json_error(j, f->what);
  const size_t n = (size_t)(j->at - j->start) - from;
  HALO_TRY(halo__scratch((void **)&m->state, (int64_t)n + 1, 1));
  memcpy(m->state, pristine + from, n);
  m->state[n] = 0;
  return HALO_OK;
}

static int by_file_name(const void *a, const void *b) {
  return strcmp(((const halo__manifest_file *)a)->name, ((const halo__manifest_file *)b)->name);
}

static halo_status parse(halo__manifest *m, const fields *f, const char *pristine) {
  enum { FORMAT, VERSION, STEP, WORLD, FILES, STATE, SEAL, N };
  static const char *const keys[N] = {"format", "version", "step",           "world",
                                      "files",  "state",   "manifest_sha256"};
  halo__json *j = f->json;
  halo__json_kind kind = halo__json_next(j);
  HALO_CHECK(kind == HALO__JSON_OBJECT, HALO_ECORRUPT, "%s: not a JSON object", f->what);
  uint32_t seen = 0;
  while ((kind = halo__json_next(j)) == HALO__JSON_KEY) {
    int32_t key = 0;
    int64_t value = 0;
    HALO_TRY(which(f, keys, N, &seen, &key));
    // A newer version may mean anything by its fields: judged before any of them.
    HALO_CHECK(key <= VERSION || (seen & 3) == 3, HALO_ECORRUPT, "%s: format and version must come first",
               f->what);
    switch (key) {
    case FORMAT:
      HALO_TRY(want_text(f, keys[key]));
      HALO_CHECK(halo__json_is(j, "halo-checkpoint"), HALO_ECORRUPT, "%s: the format is \"%s\"", f->what,
                 halo__printable(j->text, j->length));
      break;
    case VERSION:
      HALO_TRY(want_int(f, keys[key], 1, INT32_MAX, &value));
      HALO_CHECK(value == HALO__MANIFEST_VERSION, HALO_EVERSION,
                 "%s: written in version %lld of the format; this Halo reads version %d: use the one that "
                 "wrote it, or a newer one", f->what, (long long)value, HALO__MANIFEST_VERSION);
      break;
    case STEP: HALO_TRY(want_int(f, keys[key], 0, INT64_MAX, &m->step)); break;
    case WORLD:
      HALO_TRY(want_int(f, keys[key], 1, MAX_WORLD, &value));
      m->world = (int32_t)value;
      break;
    case FILES: HALO_TRY(read_files(m, f)); break;
    case STATE: HALO_TRY(read_state(m, f, pristine)); break;
    default: HALO_TRY(want_text(f, keys[key]));
    }
  }
  if (kind == HALO__JSON_ERROR || halo__json_next(j) != HALO__JSON_END) return halo__json_error(j, f->what);
  const uint32_t needed = ((1u << N) - 1) & ~(1u << STATE);
  HALO_CHECK((seen & needed) == needed, HALO_ECORRUPT, "%s: a field is missing", f->what);
  if (m->n > 1) qsort(m->file, (size_t)m->n, sizeof *m->file, by_file_name);
  for (int32_t i = 1; i < m->n; i++) {
    HALO_CHECK(by_file_name(&m->file[i - 1], &m->file[i]) != 0, HALO_ECORRUPT, "%s: file %s comes twice",
               f->what, m->file[i].name);
  }
  return HALO_OK;
}

halo_status halo__manifest_parse_unsealed(halo__manifest *out, const char *what, char *text, int64_t bytes) {
  *out = (halo__manifest){0};
  char *pristine = NULL;
  HALO_TRY(halo__scratch((void **)&pristine, bytes + 1, 1));
  memcpy(pristine, text, (size_t)bytes);
  halo__json json;
  halo__json_init(&json, text, (size_t)bytes, STATE_DEPTH);
  const fields f = {.what = what, .json = &json};
  const halo_status status = parse(out, &f, pristine);
  halo__free(pristine);
  if (status != HALO_OK) halo__manifest_free(out);
  return status;
}

halo_status halo__manifest_parse(halo__manifest *out, const char *what, char *text, int64_t bytes) {
  *out = (halo__manifest){0};
  const int64_t body = bytes - SEAL_BYTES;
  const size_t head = sizeof seal_head - 1, tail = sizeof seal_tail - 1;
  HALO_CHECK(body > 0 && memcmp(text + body, seal_head, head) == 0 &&
                 memcmp(text + bytes - (int64_t)tail, seal_tail, tail) == 0,
             HALO_ECORRUPT, "%s: the manifest does not end in its seal: it is cut, or no manifest", what);
  char hex[65];
  halo__sha256 sha;
  halo__sha256_init(&sha, false);
  halo__sha256_add(&sha, text, (size_t)body);
  halo__sha256_end(&sha, hex);
  HALO_CHECK(memcmp(text + body + (int64_t)head, hex, 64) == 0, HALO_ECORRUPT,
             "%s: the manifest does not match its seal: it was changed", what);
  return halo__manifest_parse_unsealed(out, what, text, bytes);
}

halo_status halo__manifest_read(halo__manifest *out, const char *who, const char *path) {
  char *text = NULL;
  int64_t bytes = 0;
  *out = (halo__manifest){0};
  HALO_TRY(halo__file_slurp(&text, &bytes, who, path, HALO__MANIFEST_BYTES, false));
  const halo_status status = halo__manifest_parse(out, path, text, bytes);
  halo__free(text);
  return status;
}
