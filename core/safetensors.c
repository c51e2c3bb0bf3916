/* safetensors.c: reading weights that strangers wrote.
 *
 *   [ u64 n, little endian ][ n bytes of JSON, padded with spaces ][ data, tiled by the tensors ]
 *
 *   {"__metadata__":{"format":"pt"},
 *    "embed.weight":{"dtype":"F32","shape":[256,64],"data_offsets":[0,65536]}, ...}
 *
 * Everything is checked before anything is believed: n against the file before memory is asked for;
 * the JSON by json.c, without recursion; each shape times dtype against its range, with overflow
 * checks; and all ranges together must tile the data exactly, so that no byte is read twice, none is
 * hidden and nothing is appended. Models come from folders as well: model.safetensors, or shards
 * behind model.safetensors.index.json, whose shard names must be plain names in that folder (path
 * traversal through weight_map is the hole most loaders had in 2026).
 *
 * Stricter than the reference reader (huggingface/safetensors) on purpose:
 *   duplicate names and duplicate fields are refused (the reference keeps the last: two readers may
 *   see two models in one file); empty names, names over 1024 bytes or with control characters; ranks
 *   over 8; over 10^6 tensors; unknown fields; white space before the JSON, or anything but spaces
 *   behind it; an empty tensor inside another's range.
 *
 * The table keeps names inside the header text (decoded in place) and is sorted by name, so a lookup
 * is a binary search. Files are not kept open: a read opens its shard again, and refuses when it is
 * not the file that was checked. A handle therefore holds memory only, and a Lua finalizer may drop
 * it any time.
 */
#include "safetensors.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <xxhash.h>

#include "kernels.h"

enum {
  MAX_HEADER = 100000000, /* the reference's limit */
  MAX_TENSORS = 1000000,
  MAX_METADATA = 65536,
  MAX_NAME = 1024,
  MAX_SHARDS = 4096,
  MIN_ENTRY = 49, /* bytes of the shortest tensor in a header: "":{"dtype":"U8","shape":[],... */
  CHUNK_ELEMENTS = 1 << 16
};

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the file format is little endian");

/* ---- dtypes --------------------------------------------------------------------------------- */

/* In the reference's order, which is also the order of tensors in a file it writes: largest
 * alignment first. `halo` is the dtype with the same bytes, or -1. */
const halo__file_dtype halo__file_dtypes[HALO__FILE_DTYPES] = {
    {"BOOL", 8, -1, 'i'},     {"F4", 4, -1, 0},         {"F6_E2M3", 6, -1, 0},
    {"F6_E3M2", 6, -1, 0},    {"U8", 8, HALO_U8, 'i'},  {"I8", 8, -1, 'i'},
    {"F8_E5M2", 8, -1, 'f'},  {"F8_E4M3", 8, -1, 'f'},  {"F8_E8M0", 8, -1, 0},
    {"F8_E4M3FNUZ", 8, -1, 0}, {"F8_E5M2FNUZ", 8, -1, 0}, {"I16", 16, -1, 'i'},
    {"U16", 16, -1, 'i'},     {"F16", 16, -1, 'f'},     {"BF16", 16, HALO_BF16, 'f'},
    {"I32", 32, HALO_I32, 'i'}, {"U32", 32, -1, 'i'},   {"F32", 32, HALO_F32, 'f'},
    {"C64", 64, -1, 0},       {"F64", 64, HALO_F64, 'f'}, {"I64", 64, HALO_I64, 'i'},
    {"U64", 64, -1, 'i'}};

int32_t halo__file_dtype_find(const char *code, size_t length) {
  for (int32_t i = 0; i < HALO__FILE_DTYPES; i++) {
    const char *known = halo__file_dtypes[i].code;
    if (strlen(known) == length && memcmp(known, code, length) == 0) return i;
  }
  return -1;
}

int32_t halo__file_dtype_of(int32_t dtype) {
  for (int32_t i = 0; i < HALO__FILE_DTYPES; i++) {
    if (halo__file_dtypes[i].halo == dtype) return i;
  }
  return -1;
}

/* ---- text from a file, made fit for a message ----------------------------------------------- */

const char *halo__printable(const char *text, size_t length) {
  static _Thread_local char ring[4][96];
  static _Thread_local unsigned turn;
  char *out = ring[turn++ & 3];
  size_t n = 0;
  for (size_t i = 0; i < length && n < 80; i++) {
    const unsigned char c = (unsigned char)text[i];
    // C0, DEL and C1 (as UTF-8: c2 80..9f) would talk to the reader's terminal.
    const bool c1 = c == 0xc2 && i + 1 < length && (unsigned char)text[i + 1] < 0xa0;
    out[n++] = c < 0x20 || c == 0x7f || c1 ? '?' : (char)c;
    if (c1) i++;
  }
  while (n > 0 && length > 80 && (out[n - 1] & 0x80) != 0) n--; // do not end inside a character
  snprintf(out + n, sizeof ring[0] - n, "%s", length > 80 ? "..." : "");
  return out;
}

static bool has_control(const char *text, size_t length) {
  for (size_t i = 0; i < length; i++) {
    const unsigned char c = (unsigned char)text[i];
    if (c < 0x20 || c == 0x7f) return true;
  }
  return false;
}

/* ---- header --------------------------------------------------------------------------------- */

typedef struct parser {
  halo__json json;
  const char *path;
  halo__safetensors_table *table;
  int64_t capacity, data_bytes;
} parser;

static halo_status read_shape(parser *p, halo__tensor_entry *e) {
  halo__json *j = &p->json;
  if (halo__json_next(j) != HALO__JSON_ARRAY) return halo__json_error(j, p->path);
  for (halo__json_kind kind = halo__json_next(j); kind != HALO__JSON_ARRAY_END;
       kind = halo__json_next(j)) {
    if (kind == HALO__JSON_ERROR) return halo__json_error(j, p->path);
    int64_t size = 0;
    HALO_CHECK(kind == HALO__JSON_NUMBER && halo__json_int(j, &size) && size >= 0 && *j->text != '-',
               HALO_ECORRUPT, "%s: tensor \"%s\": a size in its shape is not a whole number",
               p->path, halo__printable(e->name, e->name_length));
    HALO_CHECK(e->ndim < HALO_MAX_DIMS, HALO_ECORRUPT, "%s: tensor \"%s\" has more than %d dims",
               p->path, halo__printable(e->name, e->name_length), HALO_MAX_DIMS);
    e->shape[e->ndim++] = size;
  }
  return HALO_OK;
}

static halo_status read_offsets(parser *p, halo__tensor_entry *e) {
  halo__json *j = &p->json;
  if (halo__json_next(j) != HALO__JSON_ARRAY) return halo__json_error(j, p->path);
  int64_t bounds[2] = {0, 0};
  for (int i = 0; i < 2; i++) {
    const halo__json_kind kind = halo__json_next(j);
    if (kind == HALO__JSON_ERROR) return halo__json_error(j, p->path);
    HALO_CHECK(kind == HALO__JSON_NUMBER && halo__json_int(j, &bounds[i]) && bounds[i] >= 0 &&
                   *j->text != '-',
               HALO_ECORRUPT, "%s: tensor \"%s\": data_offsets must be two whole numbers", p->path,
               halo__printable(e->name, e->name_length));
  }
  const halo__json_kind end = halo__json_next(j);
  if (end == HALO__JSON_ERROR) return halo__json_error(j, p->path);
  HALO_CHECK(end == HALO__JSON_ARRAY_END, HALO_ECORRUPT,
             "%s: tensor \"%s\": data_offsets must be two whole numbers", p->path,
             halo__printable(e->name, e->name_length));
  HALO_CHECK(bounds[0] <= bounds[1] && bounds[1] <= p->data_bytes, HALO_ECORRUPT,
             "%s: tensor \"%s\": its range [%lld,%lld) is not inside the %lld bytes of data", p->path,
             halo__printable(e->name, e->name_length), (long long)bounds[0], (long long)bounds[1],
             (long long)p->data_bytes);
  e->begin = bounds[0];
  e->end = bounds[1];
  return HALO_OK;
}

/* Shape, dtype and range must say the same number of bytes. */
static halo_status check_size(const parser *p, halo__tensor_entry *e) {
  int64_t count = 1, bits = 0;
  // A zero anywhere makes the tensor empty, however large the rest: overflow is judged without it.
  bool is_empty = false, fits = true;
  for (int32_t i = 0; i < e->ndim; i++) {
    if (e->shape[i] == 0) is_empty = true;
    fits = fits && halo__mul(count, e->shape[i] == 0 ? 1 : e->shape[i], &count);
  }
  const int64_t width = halo__file_dtypes[e->dtype].bits;
  fits = fits && halo__mul(count, width, &bits);
  HALO_CHECK(fits, HALO_ECORRUPT, "%s: tensor \"%s\": the product of its sizes overflows", p->path,
             halo__printable(e->name, e->name_length));
  if (is_empty) count = bits = 0;
  HALO_CHECK(bits % 8 == 0, HALO_ECORRUPT, "%s: tensor \"%s\" does not end at a whole byte", p->path,
             halo__printable(e->name, e->name_length));
  HALO_CHECK(bits / 8 == e->end - e->begin, HALO_ECORRUPT,
             "%s: tensor \"%s\": shape and dtype need %lld bytes, its range has %lld", p->path,
             halo__printable(e->name, e->name_length), (long long)(bits / 8),
             (long long)(e->end - e->begin));
  e->count = count;
  return HALO_OK;
}

/* The value of one tensor's key: exactly dtype, shape and data_offsets, in any order. */
static halo_status read_entry(parser *p, halo__tensor_entry *e) {
  enum { DTYPE = 1, SHAPE = 2, OFFSETS = 4, ALL = 7 };
  halo__json *j = &p->json;
  halo__json_kind kind = halo__json_next(j);
  if (kind == HALO__JSON_ERROR) return halo__json_error(j, p->path);
  HALO_CHECK(kind == HALO__JSON_OBJECT, HALO_ECORRUPT, "%s: tensor \"%s\" is not an object", p->path,
             halo__printable(e->name, e->name_length));
  int32_t seen = 0;
  while ((kind = halo__json_next(j)) == HALO__JSON_KEY) {
    const int32_t field = halo__json_is(j, "dtype")          ? DTYPE
                          : halo__json_is(j, "shape")        ? SHAPE
                          : halo__json_is(j, "data_offsets") ? OFFSETS
                                                             : 0;
    HALO_CHECK(field != 0 && (seen & field) == 0, HALO_ECORRUPT,
               "%s: tensor \"%s\" has %s field \"%s\"", p->path,
               halo__printable(e->name, e->name_length), field == 0 ? "an unknown" : "twice the",
               halo__printable(j->text, j->length));
    seen |= field;
    if (field == SHAPE) {
      HALO_TRY(read_shape(p, e));
    } else if (field == OFFSETS) {
      HALO_TRY(read_offsets(p, e));
    } else {
      kind = halo__json_next(j);
      if (kind == HALO__JSON_ERROR) return halo__json_error(j, p->path);
      e->dtype = kind == HALO__JSON_STRING ? halo__file_dtype_find(j->text, j->length) : -1;
      HALO_CHECK(e->dtype >= 0, HALO_ECORRUPT, "%s: tensor \"%s\": unknown dtype %s", p->path,
                 halo__printable(e->name, e->name_length),
                 kind == HALO__JSON_STRING ? halo__printable(j->text, j->length) : "(not a string)");
    }
  }
  if (kind == HALO__JSON_ERROR) return halo__json_error(j, p->path);
  HALO_CHECK(seen == ALL, HALO_ECORRUPT, "%s: tensor \"%s\" has no %s", p->path,
             halo__printable(e->name, e->name_length),
             (seen & DTYPE) == 0   ? "dtype"
             : (seen & SHAPE) == 0 ? "shape"
                                   : "data_offsets");
  return check_size(p, e);
}

static halo_status read_metadata(parser *p) {
  halo__json *j = &p->json;
  halo__safetensors_table *t = p->table;
  HALO_CHECK(t->metadata == NULL, HALO_ECORRUPT, "%s: __metadata__ comes twice", p->path);
  HALO_TRY(halo__scratch((void **)&t->metadata, 64, sizeof *t->metadata));
  int64_t capacity = 64;
  if (halo__json_next(j) != HALO__JSON_OBJECT) {
    HALO_CHECK(j->error != NULL, HALO_ECORRUPT, "%s: __metadata__ is not an object", p->path);
    return halo__json_error(j, p->path);
  }
  halo__json_kind kind;
  while ((kind = halo__json_next(j)) == HALO__JSON_KEY) {
    halo__metadata_pair pair = {.key = j->text, .key_length = j->length};
    if (t->n_metadata == capacity) {
      HALO_CHECK(capacity < MAX_METADATA, HALO_ECORRUPT, "%s: more than %d metadata entries",
                 p->path, MAX_METADATA);
      halo__metadata_pair *more = NULL;
      HALO_TRY(halo__scratch((void **)&more, 2 * capacity, sizeof *more));
      memcpy(more, t->metadata, (size_t)capacity * sizeof *more);
      halo__free(t->metadata);
      t->metadata = more;
      capacity *= 2;
    }
    kind = halo__json_next(j);
    if (kind == HALO__JSON_ERROR) return halo__json_error(j, p->path);
    HALO_CHECK(kind == HALO__JSON_STRING, HALO_ECORRUPT, "%s: metadata \"%s\" is not a string",
               p->path, halo__printable(pair.key, pair.key_length));
    pair.value = j->text;
    pair.value_length = j->length;
    t->metadata[t->n_metadata++] = pair;
  }
  return kind == HALO__JSON_ERROR ? halo__json_error(j, p->path) : HALO_OK;
}

static int compare_text(const char *a, size_t a_length, const char *b, size_t b_length) {
  const int order = memcmp(a, b, a_length < b_length ? a_length : b_length);
  return order != 0 ? order : (a_length > b_length) - (a_length < b_length);
}

static int by_name(const void *a, const void *b) {
  const halo__tensor_entry *x = a, *y = b;
  return compare_text(x->name, x->name_length, y->name, y->name_length);
}

static int by_range(const void *a, const void *b) {
  const halo__tensor_entry *x = a, *y = b;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  return (x->end > y->end) - (x->end < y->end);
}

static int by_key(const void *a, const void *b) {
  const halo__metadata_pair *x = a, *y = b;
  return compare_text(x->key, x->key_length, y->key, y->key_length);
}

/* Sort unless it is sorted already, which files that a program wrote nearly always are. */
static void sort_entries(halo__tensor_entry *e, int64_t n, int (*order)(const void *, const void *)) {
  for (int64_t i = 1; i < n; i++) {
    if (order(&e[i - 1], &e[i]) > 0) {
      qsort(e, (size_t)n, sizeof *e, order);
      return;
    }
  }
}

static halo_status check_names(const parser *p) {
  halo__safetensors_table *t = p->table;
  sort_entries(t->entries, t->n, by_name);
  for (int64_t i = 1; i < t->n; i++) {
    HALO_CHECK(by_name(&t->entries[i - 1], &t->entries[i]) != 0, HALO_ECORRUPT,
               "%s: tensor \"%s\" comes twice", p->path,
               halo__printable(t->entries[i].name, t->entries[i].name_length));
  }
  if (t->n_metadata > 1) qsort(t->metadata, (size_t)t->n_metadata, sizeof *t->metadata, by_key);
  for (int64_t i = 1; i < t->n_metadata; i++) {
    HALO_CHECK(by_key(&t->metadata[i - 1], &t->metadata[i]) != 0, HALO_ECORRUPT,
               "%s: metadata \"%s\" comes twice", p->path,
               halo__printable(t->metadata[i].key, t->metadata[i].key_length));
  }
  return HALO_OK;
}

/* Ranges in order must follow each other without a gap or an overlap from 0 to the end. */
static halo_status check_tiling(const parser *p) {
  halo__safetensors_table *t = p->table;
  sort_entries(t->entries, t->n, by_range);
  int64_t at = 0;
  for (int64_t i = 0; i < t->n; i++) {
    const halo__tensor_entry *e = &t->entries[i];
    HALO_CHECK(e->begin == at, HALO_ECORRUPT, "%s: %s before tensor \"%s\" at byte %lld of the data",
               p->path, e->begin > at ? "there is a hole" : "ranges overlap",
               halo__printable(e->name, e->name_length), (long long)at);
    at = e->end;
  }
  HALO_CHECK(at == p->data_bytes, HALO_ECORRUPT,
             "%s: the tensors end at byte %lld of the data, the file at %lld", p->path, (long long)at,
             (long long)p->data_bytes);
  return HALO_OK;
}

static halo_status read_tensors(parser *p) {
  halo__json *j = &p->json;
  halo__safetensors_table *t = p->table;
  halo__json_kind kind = halo__json_next(j);
  HALO_CHECK(kind == HALO__JSON_OBJECT, HALO_ECORRUPT, "%s: the header is not a JSON object", p->path);
  while ((kind = halo__json_next(j)) == HALO__JSON_KEY) {
    if (halo__json_is(j, "__metadata__")) {
      HALO_TRY(read_metadata(p));
      continue;
    }
    HALO_CHECK(t->n < p->capacity, HALO_ECORRUPT, "%s: more than %d tensors", p->path, MAX_TENSORS);
    HALO_CHECK(j->length >= 1 && j->length <= MAX_NAME, HALO_ECORRUPT,
               "%s: a tensor's name has %zu bytes; 1 to %d are allowed", p->path, j->length, MAX_NAME);
    HALO_CHECK(!has_control(j->text, j->length), HALO_ECORRUPT,
               "%s: the name \"%s\" holds control characters", p->path,
               halo__printable(j->text, j->length));
    halo__tensor_entry *e = &t->entries[t->n];
    *e = (halo__tensor_entry){.name = j->text, .name_length = (uint32_t)j->length};
    HALO_TRY(read_entry(p, e));
    t->n++;
  }
  if (kind == HALO__JSON_ERROR) return halo__json_error(j, p->path);
  for (const char *c = j->at; c < j->end; c++) {
    HALO_CHECK(*c == ' ', HALO_ECORRUPT, "%s: the header is followed by something that is no space",
               p->path);
  }
  return HALO_OK;
}

halo_status halo__safetensors_parse(halo__safetensors_table *out, const char *path, char *header,
                                    int64_t header_bytes, int64_t data_bytes) {
  *out = (halo__safetensors_table){.header = header};
  HALO_CHECK(header_bytes >= 2 && header[0] == '{', HALO_ECORRUPT,
             "%s: the header does not begin with {", path);
  parser p = {.path = path, .table = out, .data_bytes = data_bytes};
  p.capacity = header_bytes / MIN_ENTRY + 1;
  if (p.capacity > MAX_TENSORS) p.capacity = MAX_TENSORS;
  HALO_TRY(halo__scratch((void **)&out->entries, p.capacity, sizeof *out->entries));
  halo__json_init(&p.json, header, (size_t)header_bytes, 4);
  HALO_TRY(read_tensors(&p));
  HALO_TRY(check_names(&p));
  HALO_TRY(check_tiling(&p));
  sort_entries(out->entries, out->n, by_name);
  return HALO_OK;
}

void halo__safetensors_table_free(halo__safetensors_table *t) {
  halo__free(t->entries);
  halo__free(t->metadata);
  halo__free(t->header);
  *t = (halo__safetensors_table){0};
}

/* ---- one file ------------------------------------------------------------------------------- */

static const char who[] = "safetensors_open";

/* Pickles run code when they are loaded; zip is what torch.save writes today. */
static halo_status refuse_pickle_name(const char *path) {
  static const char *const endings[] = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"};
  const size_t length = strlen(path);
  for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
    const size_t e = strlen(endings[i]);
    HALO_CHECK(length < e || strcasecmp(path + length - e, endings[i]) != 0, HALO_EARG,
               "%s: %s is a pickle by its name; loading one runs the code inside it. Convert it to "
               "safetensors where it was made", who, path);
  }
  return HALO_OK;
}

static bool is_pickle(const uint8_t first[9]) {
  const bool is_zip = memcmp(first, "PK\3\4", 4) == 0;
  const bool is_protocol = first[0] == 0x80 && first[1] >= 2 && first[1] <= 5;
  return (is_zip || is_protocol) && first[8] != '{';
}

halo_status halo__safetensors_read_file(halo__safetensors_table *out, halo__input *identity_out,
                                        const char *path, bool follow_links) {
  halo__input in = {.fd = -1};
  halo_status status = HALO_OK;
  *out = (halo__safetensors_table){0};
  HALO_TRY(refuse_pickle_name(path));
  HALO_TRY(halo__input_open(&in, who, path, follow_links));
  HALO_CHECK_GOTO(in.size >= 8, HALO_ECORRUPT, "%s: %s has %lld bytes; a safetensors file has at least 8",
                  who, path, (long long)in.size);
  uint8_t first[9] = {0};
  uint64_t n;
  HALO_TRY_GOTO(halo__input_read(&in, who, path, first, in.size < 9 ? 8 : 9, 0));
  HALO_CHECK_GOTO(!is_pickle(first), HALO_EARG,
                  "%s: %s begins like a pickle or a zip of pickles, not like safetensors", who, path);
  memcpy(&n, first, sizeof n);
  HALO_CHECK_GOTO(n <= MAX_HEADER && n <= (uint64_t)in.size - 8, HALO_ECORRUPT,
                  "%s: %s says its header has %llu bytes; the file has %lld and %d are the limit", who,
                  path, (unsigned long long)n, (long long)in.size, MAX_HEADER);
  char *header = NULL;
  HALO_TRY_GOTO(halo__scratch((void **)&header, (int64_t)n + 1, 1));
  out->header = header;
  HALO_TRY_GOTO(halo__input_read(&in, who, path, header, (int64_t)n, 8));
  HALO_TRY_GOTO(halo__safetensors_parse(out, path, header, (int64_t)n, in.size - 8 - (int64_t)n));
  out->data_offset = 8 + (int64_t)n;
  *identity_out = in;
done:
  if (status != HALO_OK) halo__safetensors_table_free(out);
  halo__input_close(&in);
  if (status == HALO_OK) identity_out->fd = -1;
  return status;
}

/* ---- the index of a sharded model ----------------------------------------------------------- */

void halo__safetensors_index_free(halo__safetensors_index *x) {
  halo__free(x->text);
  halo__free(x->names);
  halo__free(x->shards);
  *x = (halo__safetensors_index){0};
}

static int by_index_name(const void *a, const void *b) {
  const halo__index_name *x = a, *y = b;
  return compare_text(x->name, x->length, y->name, y->length);
}

/* Number of a shard by name; new ones are appended. Names come in runs, but a hostile file may mix
 * 4096 shards over a million names, so there is a hash table behind the guess. */
static halo_status shard_number(halo__safetensors_index *x, const char *path, const halo__json *j,
                                int32_t *slots, uint32_t n_slots, int32_t *out) {
  HALO_CHECK(halo__file_is_plain_name(j->text, j->length) && j->length > 12 &&
                 memcmp(j->text + j->length - 12, ".safetensors", 12) == 0,
             HALO_ECORRUPT,
             "%s: the shard name \"%s\" is not a plain file name that ends in .safetensors", path,
             halo__printable(j->text, j->length));
  uint32_t slot = (uint32_t)XXH3_64bits(j->text, j->length) & (n_slots - 1);
  while (slots[slot] >= 0) {
    if (strcmp(x->shards[slots[slot]], j->text) == 0) {
      *out = slots[slot];
      return HALO_OK;
    }
    slot = (slot + 1) & (n_slots - 1);
  }
  HALO_CHECK(x->n_shards < MAX_SHARDS, HALO_ECORRUPT, "%s: more than %d shards", path, MAX_SHARDS);
  slots[slot] = x->n_shards;
  x->shards[x->n_shards] = j->text;
  *out = x->n_shards++;
  return HALO_OK;
}

static halo_status read_weight_map(halo__safetensors_index *x, const char *path, halo__json *j,
                                   int64_t capacity) {
  enum { SLOTS = 2 * MAX_SHARDS };
  int32_t slots[SLOTS];
  memset(slots, -1, sizeof slots);
  halo__json_kind kind = halo__json_next(j);
  HALO_CHECK(kind == HALO__JSON_OBJECT, HALO_ECORRUPT, "%s: weight_map is not an object", path);
  while ((kind = halo__json_next(j)) == HALO__JSON_KEY) {
    HALO_CHECK(x->n < capacity, HALO_ECORRUPT, "%s: more than %d tensors", path, MAX_TENSORS);
    halo__index_name *name = &x->names[x->n];
    *name = (halo__index_name){.name = j->text, .length = j->length};
    kind = halo__json_next(j);
    if (kind == HALO__JSON_ERROR) return halo__json_error(j, path);
    HALO_CHECK(kind == HALO__JSON_STRING, HALO_ECORRUPT, "%s: the shard of \"%s\" is not a string",
               path, halo__printable(name->name, name->length));
    HALO_TRY(shard_number(x, path, j, slots, SLOTS, &name->shard));
    x->n++;
  }
  return kind == HALO__JSON_ERROR ? halo__json_error(j, path) : HALO_OK;
}

halo_status halo__safetensors_index_parse(halo__safetensors_index *out, const char *path, char *text,
                                          int64_t bytes) {
  *out = (halo__safetensors_index){.text = text};
  int64_t capacity = bytes / 6 + 1; // "a":"b" and a comma
  if (capacity > MAX_TENSORS) capacity = MAX_TENSORS;
  HALO_TRY(halo__scratch((void **)&out->names, capacity, sizeof *out->names));
  HALO_TRY(halo__scratch((void **)&out->shards, MAX_SHARDS, sizeof *out->shards));
  halo__json j;
  halo__json_init(&j, text, (size_t)bytes, 16);
  halo__json_kind kind = halo__json_next(&j);
  if (kind == HALO__JSON_ERROR) return halo__json_error(&j, path);
  HALO_CHECK(kind == HALO__JSON_OBJECT, HALO_ECORRUPT, "%s: not a JSON object", path);
  bool has_map = false;
  while ((kind = halo__json_next(&j)) == HALO__JSON_KEY) {
    if (!halo__json_is(&j, "weight_map")) {
      // "metadata" holds total_size, written as an integer or a float; sizes come from the shards.
      if (!halo__json_skip(&j, kind)) return halo__json_error(&j, path);
      continue;
    }
    HALO_CHECK(!has_map, HALO_ECORRUPT, "%s: weight_map comes twice", path);
    has_map = true;
    HALO_TRY(read_weight_map(out, path, &j, capacity));
  }
  if (kind == HALO__JSON_ERROR || halo__json_next(&j) != HALO__JSON_END) {
    return halo__json_error(&j, path);
  }
  HALO_CHECK(has_map, HALO_ECORRUPT, "%s: there is no weight_map", path);
  qsort(out->names, (size_t)out->n, sizeof *out->names, by_index_name);
  for (int64_t i = 1; i < out->n; i++) {
    HALO_CHECK(by_index_name(&out->names[i - 1], &out->names[i]) != 0, HALO_ECORRUPT,
               "%s: tensor \"%s\" comes twice", path,
               halo__printable(out->names[i].name, out->names[i].length));
  }
  return HALO_OK;
}

/* ---- handles -------------------------------------------------------------------------------- */

typedef struct shard {
  char *path;
  halo__input identity; /* closed; what the file was when its header was checked */
  halo__safetensors_table table;
} shard;

struct halo_safetensors {
  shard *shards;
  int32_t n_shards;
  bool follow_links;
  halo__tensor_entry *entries; /* of all shards, by name */
  int64_t n;
};

void halo_safetensors_free(halo_safetensors *s) {
  if (s == NULL) return;
  for (int32_t i = 0; i < s->n_shards; i++) {
    halo__free(s->shards[i].path);
    halo__safetensors_table_free(&s->shards[i].table);
  }
  halo__free(s->shards);
  halo__free(s->entries);
  halo__free(s);
}

static halo_status add_shard(halo_safetensors *s, const char *path) {
  shard *sh = &s->shards[s->n_shards];
  *sh = (shard){0};
  const size_t length = strlen(path) + 1;
  HALO_TRY(halo__scratch((void **)&sh->path, (int64_t)length, 1));
  memcpy(sh->path, path, length);
  s->n_shards++;
  return halo__safetensors_read_file(&sh->table, &sh->identity, path, s->follow_links);
}

/* One sorted list of the tensors of all shards. */
static halo_status merge(halo_safetensors *s) {
  for (int32_t i = 0; i < s->n_shards; i++) s->n += s->shards[i].table.n;
  HALO_CHECK(s->n <= MAX_TENSORS, HALO_ECORRUPT, "%s: the shards of %s hold more than %d tensors", who,
             s->shards[0].path, MAX_TENSORS);
  HALO_TRY(halo__scratch((void **)&s->entries, s->n + 1, sizeof *s->entries));
  int64_t at = 0;
  for (int32_t i = 0; i < s->n_shards; i++) {
    halo__safetensors_table *t = &s->shards[i].table;
    for (int64_t k = 0; k < t->n; k++) {
      s->entries[at] = t->entries[k];
      s->entries[at++].file = i;
    }
    halo__free(t->entries); // the names stay: they live in the header
    t->entries = NULL;
  }
  sort_entries(s->entries, s->n, by_name);
  for (int64_t i = 1; i < s->n; i++) {
    HALO_CHECK(by_name(&s->entries[i - 1], &s->entries[i]) != 0, HALO_ECORRUPT,
               "%s: tensor \"%s\" is in %s and in %s", who, s->entries[i].name,
               s->shards[s->entries[i - 1].file].path, s->shards[s->entries[i].file].path);
  }
  return HALO_OK;
}

/* The index and the shards must tell of the same tensors in the same places. */
static halo_status compare_with_index(const halo_safetensors *s, const halo__safetensors_index *x,
                                      const char *path) {
  for (int64_t i = 0, k = 0; i < x->n || k < s->n;) {
    const halo__index_name *name = &x->names[i];
    const halo__tensor_entry *e = &s->entries[k];
    const int order = i == x->n   ? 1
                      : k == s->n ? -1
                                  : compare_text(name->name, name->length, e->name, e->name_length);
    HALO_CHECK(order >= 0, HALO_ECORRUPT, "%s: %s names tensor \"%s\", which %s does not hold", who,
               path, halo__printable(name->name, name->length), x->shards[name->shard]);
    HALO_CHECK(order <= 0, HALO_ECORRUPT, "%s: %s holds tensor \"%s\", which %s does not name", who,
               s->shards[e->file].path, e->name, path);
    HALO_CHECK(name->shard == e->file, HALO_ECORRUPT, "%s: tensor \"%s\" is in %s, %s says %s", who,
               e->name, s->shards[e->file].path, path, x->shards[name->shard]);
    i++;
    k++;
  }
  return HALO_OK;
}

static halo_status open_index(halo_safetensors *s, const char *path) {
  halo__safetensors_index x = {0};
  halo_status status = HALO_OK;
  char *text = NULL;
  int64_t bytes = 0;
  char folder[HALO__PATH], shard_path[HALO__PATH];
  halo__file_parent(folder, sizeof folder, path);
  HALO_TRY_GOTO(halo__file_slurp(&text, &bytes, who, path, MAX_HEADER, s->follow_links));
  HALO_TRY_GOTO(halo__safetensors_index_parse(&x, path, text, bytes));
  HALO_CHECK_GOTO(x.n_shards > 0, HALO_ECORRUPT, "%s: %s names no shards", who, path);
  HALO_TRY_GOTO(halo__scratch((void **)&s->shards, x.n_shards, sizeof *s->shards));
  for (int32_t i = 0; i < x.n_shards; i++) {
    HALO_TRY_GOTO(halo__file_join(shard_path, who, folder, x.shards[i]));
    HALO_TRY_GOTO(add_shard(s, shard_path));
  }
  HALO_TRY_GOTO(merge(s));
  HALO_TRY_GOTO(compare_with_index(s, &x, path));
done:
  halo__safetensors_index_free(&x);
  return status;
}

static halo_status open_file(halo_safetensors *s, const char *path) {
  HALO_TRY(halo__scratch((void **)&s->shards, 1, sizeof *s->shards));
  HALO_TRY(add_shard(s, path));
  return merge(s);
}

/* Which file of a model folder to begin with; Transformers looks in the same order. */
static halo_status open_folder(halo_safetensors *s, const char *path) {
  static const char *const single = "model.safetensors", *const index = "model.safetensors.index.json";
  struct stat st;
  char file[HALO__PATH];
  HALO_TRY(halo__file_join(file, who, path, single));
  if (lstat(file, &st) == 0) return open_file(s, file);
  HALO_TRY(halo__file_join(file, who, path, index));
  if (lstat(file, &st) == 0) return open_index(s, file);
  HALO_TRY(halo__file_join(file, who, path, "pytorch_model.bin"));
  bool has_pickle = lstat(file, &st) == 0;
  HALO_TRY(halo__file_join(file, who, path, "pytorch_model.bin.index.json"));
  has_pickle = has_pickle || lstat(file, &st) == 0;
  HALO_CHECK(!has_pickle, HALO_EARG,
             "%s: %s holds its weights as a pickle only; loading one runs the code inside it", who, path);
  return halo__error(HALO_EIO, "%s: %s holds neither %s nor %s", who, path, single, index);
}

halo_status halo_safetensors_open(halo_safetensors **out, const char *path, int32_t follow_links) {
  HALO_CHECK(out != NULL && path != NULL && path[0] != 0, HALO_EARG, "%s: out or path is missing", who);
  HALO_CHECK(strlen(path) < HALO__PATH, HALO_EARG, "%s: the path is too long", who);
  halo_safetensors *s = NULL;
  HALO_TRY(halo__alloc_zero((void **)&s, sizeof *s, HALO_CPU));
  s->follow_links = follow_links != 0;
  struct stat st;
  const size_t length = strlen(path);
  static const char index_ending[] = ".index.json";
  const bool is_index = length > sizeof index_ending &&
                        strcmp(path + length - (sizeof index_ending - 1), index_ending) == 0;
  const halo_status status = stat(path, &st) == 0 && S_ISDIR(st.st_mode) ? open_folder(s, path)
                             : is_index                                  ? open_index(s, path)
                                                                         : open_file(s, path);
  if (status != HALO_OK) {
    halo_safetensors_free(s);
    return status;
  }
  *out = s;
  return HALO_OK;
}

int64_t halo_safetensors_count(const halo_safetensors *s) { return s->n; }

int64_t halo_safetensors_find(const halo_safetensors *s, const char *name) {
  if (name == NULL) return -1;
  const size_t length = strlen(name);
  int64_t low = 0, high = s->n - 1;
  while (low <= high) {
    const int64_t middle = low + (high - low) / 2;
    const halo__tensor_entry *e = &s->entries[middle];
    const int order = compare_text(name, length, e->name, e->name_length);
    if (order == 0) return middle;
    if (order < 0) {
      high = middle - 1;
    } else {
      low = middle + 1;
    }
  }
  return -1;
}

halo_status halo_safetensors_describe(halo_safetensors_info *out, const halo_safetensors *s,
                                      int64_t index) {
  HALO_CHECK(out != NULL && index >= 0 && index < s->n, HALO_EARG,
             "safetensors_describe: index %lld is outside [0,%lld)", (long long)index, (long long)s->n);
  const halo__tensor_entry *e = &s->entries[index];
  const halo__file_dtype *d = &halo__file_dtypes[e->dtype];
  *out = (halo_safetensors_info){.name = e->name,
                                 .code = d->code,
                                 .file = s->shards[e->file].path,
                                 .dtype = d->halo,
                                 .ndim = e->ndim,
                                 .count = e->count,
                                 .bytes = e->end - e->begin,
                                 .offset = s->shards[e->file].table.data_offset + e->begin};
  memcpy(out->shape, e->shape, sizeof out->shape);
  return HALO_OK;
}

int64_t halo_safetensors_metadata_count(const halo_safetensors *s) {
  return s->shards[0].table.n_metadata;
}

const char *halo_safetensors_metadata_key(const halo_safetensors *s, int64_t i) {
  return i >= 0 && i < s->shards[0].table.n_metadata ? s->shards[0].table.metadata[i].key : NULL;
}

const char *halo_safetensors_metadata(const halo_safetensors *s, const char *key) {
  const halo__safetensors_table *t = &s->shards[0].table;
  for (int64_t i = 0; key != NULL && i < t->n_metadata; i++) {
    if (strcmp(t->metadata[i].key, key) == 0) return t->metadata[i].value;
  }
  return NULL;
}

/* ---- reading tensors ------------------------------------------------------------------------ */

static float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
  uint32_t bits;
  float f;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | fraction << 13;
  } else if (exponent != 0) {
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  } else {
    f = (float)fraction * 0x1p-24f; // subnormal halves are normal floats
    memcpy(&bits, &f, sizeof bits);
    bits |= sign;
  }
  memcpy(&f, &bits, sizeof f);
  return f;
}

/* E4M3 "fn": bias 7, no infinity, only S.1111.111 is not a number.
 * source  FP8 formats for deep learning, arXiv 2209.05433, table 1 */
static float e4m3_to_float(uint8_t x) {
  const int32_t exponent = x >> 3 & 15, fraction = x & 7;
  float f;
  if ((x & 0x7f) == 0x7f) {
    f = __builtin_nanf("");
  } else if (exponent == 0) {
    f = (float)fraction * 0x1p-9f;
  } else {
    const uint32_t bits = (uint32_t)(exponent + 120) << 23 | (uint32_t)fraction << 20;
    memcpy(&f, &bits, sizeof f);
  }
  return (x & 0x80) != 0 ? -f : f;
}

/* Widths of the stepping stones: fp32, fp64 or int64, which hold every value of the type exactly
 * (U64 on its way to a float excepted, where fp64 is the closest there is). */
static halo_dtype stepping_stone(int32_t file_dtype, halo_dtype to) {
  const halo__file_dtype *d = &halo__file_dtypes[file_dtype];
  if (d->kind == 'f') return d->bits == 64 ? HALO_F64 : HALO_F32;
  return halo__is_float(to) && strcmp(d->code, "U64") == 0 ? HALO_F64 : HALO_I64;
}

static void widen_f32(float *to, const void *from, const char *code, int64_t n) {
  const uint16_t *half = from;
  const uint8_t *byte = from;
  if (strcmp(code, "F16") == 0) {
    for (int64_t i = 0; i < n; i++) to[i] = half_to_float(half[i]);
  } else if (strcmp(code, "F8_E4M3") == 0) {
    for (int64_t i = 0; i < n; i++) to[i] = e4m3_to_float(byte[i]);
  } else if (strcmp(code, "F8_E5M2") == 0) { // the upper half of an F16
    for (int64_t i = 0; i < n; i++) to[i] = half_to_float((uint16_t)(byte[i] << 8));
  } else {
    const bool is_f32 = strcmp(code, "F32") == 0;
    assert(is_f32 || strcmp(code, "BF16") == 0);
    halo__kernels(HALO_CPU)->convert(to, HALO_F32, from, is_f32 ? HALO_F32 : HALO_BF16, n);
  }
}

static void widen_f64(double *to, const void *from, const char *code, int64_t n) {
  const uint64_t *whole = from;
  if (strcmp(code, "U64") == 0) {
    for (int64_t i = 0; i < n; i++) to[i] = (double)whole[i];
  } else {
    memcpy(to, from, (size_t)n * sizeof *to);
  }
}

/* A U64 over the top comes out negative, which check_range tells from a true value by the type. */
static void widen_i64(int64_t *to, const void *from, const char *code, int64_t bytes, int64_t n) {
  const bool is_signed = code[0] == 'I', is_bool = code[0] == 'B';
  const int32_t unused = 64 - 8 * (int32_t)bytes;
  for (int64_t i = 0; i < n; i++) {
    uint64_t v = 0;
    memcpy(&v, (const char *)from + i * bytes, (size_t)bytes);
    to[i] = is_bool     ? v != 0
            : is_signed ? (int64_t)(v << unused) >> unused
                        : (int64_t)v;
  }
}

/* Integers that the wanted dtype cannot hold are refused, not wrapped. */
static halo_status check_range(const halo__tensor_entry *e, const int64_t *v, int64_t n, halo_dtype to) {
  const bool is_u64 = strcmp(halo__file_dtypes[e->dtype].code, "U64") == 0;
  const int64_t low = to == HALO_U8 || is_u64 ? 0 : to == HALO_I32 ? INT32_MIN : INT64_MIN;
  const int64_t high = to == HALO_U8 ? UINT8_MAX : to == HALO_I32 ? INT32_MAX : INT64_MAX;
  for (int64_t i = 0; i < n; i++) {
    HALO_CHECK(v[i] >= low && v[i] <= high, HALO_EARG,
               "safetensors_read: tensor \"%s\" holds %s%lld, which does not fit %s", e->name,
               is_u64 && v[i] < 0 ? "a U64 over " : "", is_u64 && v[i] < 0 ? INT64_MAX : (long long)v[i],
               halo_dtype_name(to));
  }
  return HALO_OK;
}

static halo_status convert(void *to, halo_dtype to_dtype, const void *from, void *stone,
                           const halo__tensor_entry *e, int64_t n) {
  const char *code = halo__file_dtypes[e->dtype].code;
  const halo_dtype via = stepping_stone(e->dtype, to_dtype);
  if (via == HALO_F32) {
    widen_f32(stone, from, code, n);
  } else if (via == HALO_F64) {
    widen_f64(stone, from, code, n);
  } else {
    widen_i64(stone, from, code, halo__file_dtypes[e->dtype].bits / 8, n);
    if (!halo__is_float(to_dtype)) HALO_TRY(check_range(e, stone, n, to_dtype));
  }
  return halo__kernels(HALO_CPU)->convert(to, to_dtype, stone, via, n);
}

/* Open the tensor's shard again and see that it is the file whose header was checked. */
static halo_status reopen(halo__input *in, const halo_safetensors *s, const shard *sh) {
  HALO_TRY(halo__input_open(in, "safetensors_read", sh->path, s->follow_links));
  if (!halo__input_same(in, &sh->identity)) {
    halo__input_close(in);
    return halo__error(HALO_EIO, "safetensors_read: %s was changed after it was opened", sh->path);
  }
  return HALO_OK;
}

halo_status halo_safetensors_read_raw(const halo_safetensors *s, int64_t index, int64_t first_byte,
                                      int64_t bytes, void *to) {
  HALO_CHECK(index >= 0 && index < s->n, HALO_EARG, "safetensors_read: index %lld is outside [0,%lld)",
             (long long)index, (long long)s->n);
  const halo__tensor_entry *e = &s->entries[index];
  int64_t end;
  HALO_CHECK(halo__add(first_byte, bytes, &end) && end <= e->end - e->begin, HALO_EARG,
             "safetensors_read: %lld bytes from %lld are not inside tensor \"%s\" of %lld bytes",
             (long long)bytes, (long long)first_byte, e->name, (long long)(e->end - e->begin));
  const shard *sh = &s->shards[e->file];
  halo__input in = {.fd = -1};
  HALO_TRY(reopen(&in, s, sh));
  const halo_status status = halo__input_read(&in, "safetensors_read", sh->path, to, bytes,
                                              sh->table.data_offset + e->begin + first_byte);
  halo__input_close(&in);
  return status;
}

halo_status halo_safetensors_read(const halo_safetensors *s, int64_t index, int64_t first,
                                  int64_t count, void *to, int32_t to_dtype) {
  HALO_CHECK(index >= 0 && index < s->n, HALO_EARG, "safetensors_read: index %lld is outside [0,%lld)",
             (long long)index, (long long)s->n);
  const halo__tensor_entry *e = &s->entries[index];
  const halo__file_dtype *d = &halo__file_dtypes[e->dtype];
  int64_t end;
  HALO_CHECK(halo__add(first, count, &end) && end <= e->count, HALO_EARG,
             "safetensors_read: %lld elements from %lld are not inside tensor \"%s\" of %lld",
             (long long)count, (long long)first, e->name, (long long)e->count);
  HALO_CHECK(to_dtype >= 0 && to_dtype < HALO_DTYPE_COUNT, HALO_EARG,
             "safetensors_read: unknown dtype %d", to_dtype);
  HALO_CHECK(d->kind != 0, HALO_EUNSUPPORTED, "safetensors_read: tensor \"%s\" is %s, which is not converted",
             e->name, d->code);
  HALO_CHECK(d->kind == 'i' || halo__is_float(to_dtype), HALO_EARG,
             "safetensors_read: tensor \"%s\" is %s; reading it as %s would cut fractions off", e->name,
             d->code, halo_dtype_name(to_dtype));
  const int64_t size = d->bits / 8;
  if (d->halo == to_dtype) return halo_safetensors_read_raw(s, index, first * size, count * size, to);

  halo_status status = HALO_OK;
  char *raw = NULL, *stone = NULL;
  const shard *sh = &s->shards[e->file];
  halo__input in = {.fd = -1};
  HALO_TRY(reopen(&in, s, sh));
  HALO_TRY_GOTO(halo__scratch((void **)&raw, CHUNK_ELEMENTS, size));
  HALO_TRY_GOTO(halo__scratch((void **)&stone, CHUNK_ELEMENTS, 8));
  for (int64_t at = 0; at < count; at += CHUNK_ELEMENTS) {
    const int64_t n = count - at < CHUNK_ELEMENTS ? count - at : CHUNK_ELEMENTS;
    const int64_t offset = sh->table.data_offset + e->begin + (first + at) * size;
    HALO_TRY_GOTO(halo__input_read(&in, "safetensors_read", sh->path, raw, n * size, offset));
    HALO_TRY_GOTO(convert((char *)to + at * halo_dtype_bytes(to_dtype), (halo_dtype)to_dtype, raw, stone,
                          e, n));
  }
done:
  halo__free(raw);
  halo__free(stone);
  halo__input_close(&in);
  return status;
}

halo_status halo_safetensors_load(halo_tensor *to, const halo_safetensors *s, int64_t index) {
  HALO_CHECK(index >= 0 && index < s->n, HALO_EARG, "safetensors_load: index %lld is outside [0,%lld)",
             (long long)index, (long long)s->n);
  const halo__tensor_entry *e = &s->entries[index];
  bool same = to->ndim == e->ndim;
  for (int32_t i = 0; same && i < e->ndim; i++) same = to->shape[i] == e->shape[i];
  HALO_CHECK(same, HALO_EARG, "safetensors_load: tensor \"%s\" has another shape in the file than %s",
             e->name, halo__describe(to));
  if (halo__device(to) == HALO_CPU && halo_tensor_is_contiguous(to)) {
    return halo_safetensors_read(s, index, 0, e->count, halo__data(to), to->dtype);
  }
  halo_tensor *host = NULL;
  HALO_TRY(halo_tensor_new(&host, to->dtype, HALO_CPU, to->ndim, to->shape));
  halo_status status = halo_safetensors_read(s, index, 0, e->count, halo__data(host), to->dtype);
  if (status == HALO_OK) status = halo_tensor_copy(to, host);
  halo_tensor_free(host);
  return status;
}
