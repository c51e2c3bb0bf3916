/* safetensors_write.c: writing weights that everybody can read.
 *
 * The layout is the reference's own: tensors by dtype, largest alignment first, then by name; header
 * padded with spaces to a multiple of 8, so that every tensor is aligned in the file; metadata
 * {"format":"pt"}, without which Transformers refuses a file. A model above `max_shard_bytes` becomes
 * model-00001-of-0000N.safetensors and an index, cut greedily in name order as Transformers does. The
 * same tensors always give the same bytes, whoever wrote them, on however many ranks.
 *
 * Data is streamed: a tensor in host memory with the wanted dtype goes straight to the file, others
 * are converted 64 Ki elements at a time. A non-contiguous or device tensor costs one host copy of
 * itself, never of the model.
 *
 * Saving into a folder that is in use: everything is written below a hidden folder first, synced, and
 * then renamed; a crash leaves the old model or, between two renames of a sharded one, an index that
 * does not match, which the reader refuses. (Checkpoints are stronger: they rename the whole folder.)
 */
#include "safetensors.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "kernels.h"

enum { CHUNK_ELEMENTS = 1 << 16, MAX_NAME = 1024, MAX_SHARDS = 4096 };

typedef struct item {
  char *name;
  halo_tensor *tensor; /* retained */
  int32_t dtype;       /* index into halo__file_dtypes */
  int32_t shard;
  int64_t bytes, begin;
} item;

typedef struct pair {
  char *key, *value;
} pair;

struct halo_safetensors_writer {
  item *items;
  pair *pairs;
  int64_t n, capacity;
  int32_t n_pairs;
};

static halo_status copy_text(char **out, const char *text) {
  const size_t n = strlen(text) + 1;
  HALO_TRY(halo__scratch((void **)out, (int64_t)n, 1));
  memcpy(*out, text, n);
  return HALO_OK;
}

enum { MAX_PAIRS = 64 };

halo_status halo_safetensors_writer_new(halo_safetensors_writer **out) {
  HALO_CHECK(out != NULL, HALO_EARG, "safetensors_writer_new: out is NULL");
  halo_safetensors_writer *w = NULL;
  HALO_TRY(halo__alloc_zero((void **)&w, sizeof *w, HALO_CPU));
  halo_status status = halo__alloc_zero((void **)&w->pairs, MAX_PAIRS * sizeof *w->pairs, HALO_CPU);
  if (status == HALO_OK) status = halo_safetensors_writer_metadata(w, "format", "pt");
  if (status != HALO_OK) {
    halo_safetensors_writer_free(w);
    return status;
  }
  *out = w;
  return HALO_OK;
}

void halo_safetensors_writer_free(halo_safetensors_writer *w) {
  if (w == NULL) return;
  for (int64_t i = 0; i < w->n; i++) {
    halo__free(w->items[i].name);
    halo_tensor_free(w->items[i].tensor);
  }
  for (int32_t i = 0; i < w->n_pairs; i++) {
    halo__free(w->pairs[i].key);
    halo__free(w->pairs[i].value);
  }
  halo__free(w->items);
  halo__free(w->pairs);
  halo__free(w);
}

halo_status halo_safetensors_writer_metadata(halo_safetensors_writer *w, const char *key,
                                             const char *value) {
  HALO_CHECK(key != NULL && value != NULL && halo__is_utf8(key, strlen(key)) &&
                 halo__is_utf8(value, strlen(value)),
             HALO_EARG, "safetensors_writer_metadata: key and value must be UTF-8 text");
  int32_t i = 0;
  while (i < w->n_pairs && strcmp(w->pairs[i].key, key) != 0) i++;
  HALO_CHECK(i < MAX_PAIRS, HALO_EARG, "safetensors_writer_metadata: more than %d entries", MAX_PAIRS);
  char *new_key = NULL, *new_value = NULL;
  HALO_TRY(copy_text(&new_value, value));
  if (i == w->n_pairs) {
    const halo_status status = copy_text(&new_key, key);
    if (status != HALO_OK) {
      halo__free(new_value);
      return status;
    }
    w->pairs[w->n_pairs++].key = new_key;
  }
  halo__free(w->pairs[i].value);
  w->pairs[i].value = new_value;
  return HALO_OK;
}

static halo_status grow(halo_safetensors_writer *w) {
  if (w->n < w->capacity) return HALO_OK;
  const int64_t capacity = w->capacity == 0 ? 64 : 2 * w->capacity;
  item *more = NULL;
  HALO_TRY(halo__scratch((void **)&more, capacity, sizeof *more));
  if (w->n > 0) memcpy(more, w->items, (size_t)w->n * sizeof *more);
  halo__free(w->items);
  w->items = more;
  w->capacity = capacity;
  return HALO_OK;
}

halo_status halo_safetensors_writer_add(halo_safetensors_writer *w, const char *name,
                                        halo_tensor *tensor, const char *code) {
  HALO_CHECK(w != NULL && name != NULL && tensor != NULL, HALO_EARG,
             "safetensors_writer_add: an argument is NULL");
  const size_t length = strlen(name);
  HALO_CHECK(length >= 1 && length <= MAX_NAME && halo__is_utf8(name, length), HALO_EARG,
             "safetensors_writer_add: the name \"%s\" must be 1 to %d bytes of UTF-8",
             halo__printable(name, length), MAX_NAME);
  for (const char *c = name; *c; c++) {
    HALO_CHECK((unsigned char)*c >= 0x20 && *c != 0x7f, HALO_EARG,
               "safetensors_writer_add: the name \"%s\" holds control characters",
               halo__printable(name, length));
  }
  HALO_CHECK(strcmp(name, "__metadata__") != 0, HALO_EARG,
             "safetensors_writer_add: a tensor cannot be called __metadata__");
  const int32_t dtype = code == NULL ? halo__file_dtype_of(tensor->dtype)
                                     : halo__file_dtype_find(code, strlen(code));
  const bool is_half = dtype >= 0 && strcmp(halo__file_dtypes[dtype].code, "F16") == 0;
  HALO_CHECK(dtype >= 0 && (halo__file_dtypes[dtype].halo >= 0 || is_half), HALO_EARG,
             "safetensors_writer_add: tensor \"%s\" cannot be written as %s (F64, F32, BF16, F16, I64, "
             "I32 and U8 can)", name, code != NULL ? halo__printable(code, strlen(code)) : "that");
  const bool to_float = halo__file_dtypes[dtype].kind == 'f';
  HALO_CHECK(to_float == halo__is_float(tensor->dtype) || halo__file_dtypes[dtype].halo == (int32_t)tensor->dtype,
             HALO_EARG, "safetensors_writer_add: tensor \"%s\" is %s; it is not written as %s", name,
             halo_dtype_name(tensor->dtype), halo__file_dtypes[dtype].code);
  HALO_TRY(grow(w));
  item *it = &w->items[w->n];
  *it = (item){.dtype = dtype};
  it->bytes = halo_tensor_count(tensor) * halo__file_dtypes[dtype].bits / 8;
  HALO_TRY(copy_text(&it->name, name));
  const halo_status status = halo_tensor_retain(&it->tensor, tensor);
  if (status != HALO_OK) {
    halo__free(it->name);
    return status;
  }
  w->n++;
  return HALO_OK;
}

int64_t halo__safetensors_writer_bytes(const halo_safetensors_writer *w) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < w->n; i++) bytes += w->items[i].bytes + 256 + HALO_MAX_DIMS * 20;
  return bytes + 4096;
}

/* ---- one file ------------------------------------------------------------------------------- */

static int by_name(const void *a, const void *b) {
  return strcmp(((const item *)a)->name, ((const item *)b)->name);
}

/* Within a file: shard, then dtype with the largest alignment first (the table's order, backwards). */
static int by_place(const void *a, const void *b) {
  const item *x = a, *y = b;
  if (x->shard != y->shard) return x->shard < y->shard ? -1 : 1;
  if (x->dtype != y->dtype) return x->dtype > y->dtype ? -1 : 1;
  return strcmp(x->name, y->name);
}

static int by_key(const void *a, const void *b) {
  return strcmp(((const pair *)a)->key, ((const pair *)b)->key);
}

static halo_status put_header(halo__text *t, const halo_safetensors_writer *w, const item *items,
                              int64_t n) {
  HALO_TRY(halo__text_add(t, "{\"__metadata__\":{", 17));
  for (int32_t i = 0; i < w->n_pairs; i++) {
    if (i > 0) HALO_TRY(halo__text_add(t, ",", 1));
    HALO_TRY(halo__text_quote(t, w->pairs[i].key, strlen(w->pairs[i].key)));
    HALO_TRY(halo__text_add(t, ":", 1));
    HALO_TRY(halo__text_quote(t, w->pairs[i].value, strlen(w->pairs[i].value)));
  }
  HALO_TRY(halo__text_add(t, "}", 1));
  for (int64_t i = 0; i < n; i++) {
    const item *it = &items[i];
    HALO_TRY(halo__text_add(t, ",", 1));
    HALO_TRY(halo__text_quote(t, it->name, strlen(it->name)));
    HALO_TRY(halo__text_print(t, ":{\"dtype\":\"%s\",\"shape\":[", halo__file_dtypes[it->dtype].code));
    for (int32_t d = 0; d < it->tensor->ndim; d++) {
      HALO_TRY(halo__text_print(t, d == 0 ? "%lld" : ",%lld", (long long)it->tensor->shape[d]));
    }
    HALO_TRY(halo__text_print(t, "],\"data_offsets\":[%lld,%lld]}", (long long)it->begin,
                              (long long)(it->begin + it->bytes)));
  }
  HALO_TRY(halo__text_add(t, "}", 1));
  while (t->n % 8 != 0) HALO_TRY(halo__text_add(t, " ", 1));
  return HALO_OK;
}

/* Round to nearest even; what is too large becomes infinite, as in IEEE 754. */
static uint16_t float_to_half(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00; // 65520 and up round to infinity
  if (magnitude < 0x38800000) {                      // below 2^-14: a subnormal half
    const float scaled = __builtin_fabsf(f) * 0x1p24f;
    return sign | (uint16_t)__builtin_rintf(scaled);
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23);
  return sign | (uint16_t)(rounded >> 13);
}

static halo_status put_data(halo__sink *sink, const item *it, const halo_tensor *t) {
  const int32_t to = halo__file_dtypes[it->dtype].halo;
  const char *from = halo__data(t);
  if (to == (int32_t)t->dtype) return halo__sink_write(sink, from, it->bytes);
  const halo_kernels *k = halo__kernels(HALO_CPU);
  const int64_t count = halo_tensor_count(t), size = halo_dtype_bytes(t->dtype);
  const int64_t out_size = halo__file_dtypes[it->dtype].bits / 8;
  char *buffer = NULL;
  HALO_TRY(halo__scratch((void **)&buffer, CHUNK_ELEMENTS, 8));
  halo_status status = HALO_OK;
  for (int64_t at = 0; at < count && status == HALO_OK; at += CHUNK_ELEMENTS) {
    const int64_t n = count - at < CHUNK_ELEMENTS ? count - at : CHUNK_ELEMENTS;
    status = k->convert(buffer, to >= 0 ? (halo_dtype)to : HALO_F32, from + at * size, t->dtype, n);
    if (status != HALO_OK) break;
    if (to < 0) { // F16, in place: each half lands before the floats still to be read
      for (int64_t i = 0; i < n; i++) {
        float f;
        memcpy(&f, buffer + 4 * i, sizeof f);
        const uint16_t h = float_to_half(f);
        memcpy(buffer + 2 * i, &h, sizeof h);
      }
    }
    status = halo__sink_write(sink, buffer, n * out_size);
  }
  halo__free(buffer);
  return status;
}

static halo_status put_tensor(halo__sink *sink, const item *it) {
  halo_tensor *t = it->tensor, *host = NULL;
  if (halo__device(t) == HALO_CPU && halo_tensor_is_contiguous(t)) return put_data(sink, it, t);
  HALO_TRY(halo_tensor_new(&host, t->dtype, HALO_CPU, t->ndim, t->shape));
  halo_status status = halo_tensor_copy(host, t);
  if (status == HALO_OK) status = put_data(sink, it, host);
  halo_tensor_free(host);
  return status;
}

static halo_status write_file(const halo_safetensors_writer *w, const char *who, const char *path,
                              item *items, int64_t n, halo__digest *digest_out) {
  halo_status status = HALO_OK;
  halo__text header = {0};
  halo__sink *sink = NULL;
  int64_t at = 0;
  for (int64_t i = 0; i < n; i++) {
    items[i].begin = at;
    at += items[i].bytes;
  }
  HALO_TRY_GOTO(put_header(&header, w, items, n));
  HALO_TRY_GOTO(halo__sink_open(&sink, who, path, 8 + (int64_t)header.n + at, digest_out != NULL));
  const uint64_t length = header.n;
  HALO_TRY_GOTO(halo__sink_write(sink, &length, 8));
  HALO_TRY_GOTO(halo__sink_write(sink, header.text, (int64_t)header.n));
  for (int64_t i = 0; i < n; i++) HALO_TRY_GOTO(put_tensor(sink, &items[i]));
  halo__sink *closing = sink;
  sink = NULL;
  HALO_TRY_GOTO(halo__sink_close(closing, digest_out));
done:
  halo__sink_abandon(sink);
  halo__text_free(&header);
  return status;
}

/* ---- a folder ------------------------------------------------------------------------------- */

/* Greedy, in name order; returns the number of shards. */
static int32_t assign_shards(halo_safetensors_writer *w, int64_t max_shard_bytes) {
  int32_t shard = 0;
  int64_t fill = 0;
  for (int64_t i = 0; i < w->n; i++) {
    item *it = &w->items[i];
    if (max_shard_bytes > 0 && fill > 0 && fill + it->bytes > max_shard_bytes) {
      shard++;
      fill = 0;
    }
    it->shard = shard;
    fill += it->bytes;
  }
  return shard + 1;
}

static void shard_name(char out[64], const char *stem, int32_t shard, int32_t n_shards) {
  if (n_shards == 1) {
    snprintf(out, 64, "%s.safetensors", stem);
  } else {
    snprintf(out, 64, "%s-%05d-of-%05d.safetensors", stem, shard + 1, n_shards);
  }
}

static halo_status put_index(halo__text *t, halo_safetensors_writer *w, const char *stem,
                             int32_t n_shards) {
  int64_t total = 0;
  for (int64_t i = 0; i < w->n; i++) total += w->items[i].bytes;
  HALO_TRY(halo__text_print(t, "{\n  \"metadata\": {\n    \"total_size\": %lld\n  },\n  \"weight_map\": {",
                            (long long)total));
  for (int64_t i = 0; i < w->n; i++) {
    char name[64];
    shard_name(name, stem, w->items[i].shard, n_shards);
    HALO_TRY(halo__text_print(t, i == 0 ? "\n    " : ",\n    "));
    HALO_TRY(halo__text_quote(t, w->items[i].name, strlen(w->items[i].name)));
    HALO_TRY(halo__text_print(t, ": \"%s\"", name));
  }
  return halo__text_print(t, "\n  }\n}\n");
}

void halo__written_free(halo__written *out) {
  for (int32_t i = 0; i < out->n; i++) halo__digest_free(&out->file[i].digest);
  halo__free(out->file);
  *out = (halo__written){0};
}

static halo_status sort_and_check(halo_safetensors_writer *w) {
  if (w->n > 1) qsort(w->items, (size_t)w->n, sizeof *w->items, by_name);
  for (int64_t i = 1; i < w->n; i++) {
    HALO_CHECK(strcmp(w->items[i - 1].name, w->items[i].name) != 0, HALO_EARG,
               "safetensors_writer: tensor \"%s\" was added twice", w->items[i].name);
  }
  qsort(w->pairs, (size_t)w->n_pairs, sizeof *w->pairs, by_key);
  return HALO_OK;
}

halo_status halo__safetensors_write(halo__written *out, halo_safetensors_writer *w, const char *who,
                                    const char *folder, const char *stem, int64_t max_shard_bytes,
                                    bool wants_digest) {
  halo_status status = HALO_OK;
  halo__text index = {0};
  char path[HALO__PATH];
  *out = (halo__written){0};
  HALO_TRY(sort_and_check(w));
  const int32_t n_shards = assign_shards(w, max_shard_bytes);
  HALO_CHECK(n_shards <= MAX_SHARDS, HALO_EARG,
             "%s: %d shards; make max_shard_bytes (%lld) larger, %d shards are the limit", who, n_shards,
             (long long)max_shard_bytes, MAX_SHARDS);
  HALO_TRY(halo__alloc_zero((void **)&out->file, (n_shards + 1) * (int64_t)sizeof *out->file, HALO_CPU));
  if (n_shards > 1) HALO_TRY_GOTO(put_index(&index, w, stem, n_shards));
  if (w->n > 1) qsort(w->items, (size_t)w->n, sizeof *w->items, by_place);
  int64_t from = 0;
  for (int32_t i = 0; i < n_shards; i++) {
    int64_t to = from;
    while (to < w->n && w->items[to].shard == i) to++;
    halo__written_file *f = &out->file[out->n++];
    shard_name(f->name, stem, i, n_shards);
    HALO_TRY_GOTO(halo__file_join(path, who, folder, f->name));
    HALO_TRY_GOTO(write_file(w, who, path, w->items + from, to - from, wants_digest ? &f->digest : NULL));
    from = to;
  }
  if (n_shards > 1) {
    halo__written_file *f = &out->file[out->n++];
    snprintf(f->name, sizeof f->name, "%s.safetensors.index.json", stem);
    HALO_TRY_GOTO(halo__file_join(path, who, folder, f->name));
    HALO_TRY_GOTO(halo__file_write(who, path, index.text, (int64_t)index.n,
                                   wants_digest ? &f->digest : NULL));
  }
done:
  halo__text_free(&index);
  if (status != HALO_OK) halo__written_free(out);
  return status;
}

/* Weight files of an earlier save that the new ones do not replace. */
static bool is_stale(const char *name, const halo__written *now) {
  for (int32_t i = 0; i < now->n; i++) {
    if (strcmp(now->file[i].name, name) == 0) return false;
  }
  int first, count, end = -1;
  if (sscanf(name, "model-%5d-of-%5d.safetensors%n", &first, &count, &end) == 2 && end > 0 &&
      name[end] == 0) {
    return true;
  }
  return strcmp(name, "model.safetensors") == 0 || strcmp(name, "model.safetensors.index.json") == 0;
}

static halo_status remove_stale(const char *who, const char *folder, const halo__written *now) {
  halo__names names;
  HALO_TRY(halo__file_list(&names, who, folder));
  halo_status status = HALO_OK;
  for (int32_t i = 0; i < names.n && status == HALO_OK; i++) {
    char path[HALO__PATH];
    if (!is_stale(names.name[i], now)) continue;
    status = halo__file_join(path, who, folder, names.name[i]);
    if (status == HALO_OK) status = halo__file_remove_tree(who, path, 0);
  }
  halo__names_free(&names);
  return status;
}

static halo_status save_folder(halo_safetensors_writer *w, const char *who, const char *folder,
                               int64_t max_shard_bytes) {
  halo_status status = HALO_OK;
  halo__written now = {0};
  char hidden[HALO__PATH], from[HALO__PATH], to[HALO__PATH];
  HALO_TRY(halo__file_mkdir(who, folder));
  HALO_TRY(halo__file_join(hidden, who, folder, ".halo-save"));
  HALO_TRY(halo__file_remove_tree(who, hidden, 1)); // of a save that was cut off
  HALO_TRY(halo__file_mkdir(who, hidden));
  HALO_TRY_GOTO(halo__safetensors_write(&now, w, who, hidden, "model", max_shard_bytes, false));
  for (int32_t i = 0; i < now.n; i++) {
    HALO_TRY_GOTO(halo__file_join(from, who, hidden, now.file[i].name));
    HALO_TRY_GOTO(halo__file_join(to, who, folder, now.file[i].name));
    HALO_TRY_GOTO(halo__file_rename(who, from, to));
  }
  HALO_TRY_GOTO(remove_stale(who, folder, &now));
  HALO_TRY_GOTO(halo__file_sync_folder(who, folder));
done:
  halo__written_free(&now);
  if (status == HALO_OK) return halo__file_remove_tree(who, hidden, 1);
  // Keep the message of what went wrong, not of the cleaning up.
  char message[512];
  snprintf(message, sizeof message, "%s", halo_error_message());
  halo__file_remove_tree(who, hidden, 1);
  return halo__error(status, "%s", message);
}

static halo_status save_file(halo_safetensors_writer *w, const char *who, const char *path) {
  char temporary[HALO__PATH], folder[HALO__PATH];
  HALO_CHECK(snprintf(temporary, sizeof temporary, "%s.halo-tmp", path) < (int)sizeof temporary, HALO_EARG,
             "%s: the path is too long", who);
  HALO_TRY(sort_and_check(w));
  assign_shards(w, 0);
  if (w->n > 1) qsort(w->items, (size_t)w->n, sizeof *w->items, by_place);
  HALO_TRY(halo__file_remove_tree(who, temporary, 0)); // of a save that was cut off
  HALO_TRY(write_file(w, who, temporary, w->items, w->n, NULL));
  HALO_TRY(halo__file_rename(who, temporary, path));
  halo__file_parent(folder, sizeof folder, path);
  return halo__file_sync_folder(who, folder);
}

halo_status halo_safetensors_writer_save(halo_safetensors_writer *w, const char *path,
                                         int64_t max_shard_bytes) {
  static const char who[] = "safetensors_writer_save", ending[] = ".safetensors";
  HALO_CHECK(w != NULL && path != NULL && path[0] != 0, HALO_EARG, "%s: an argument is missing", who);
  HALO_CHECK(max_shard_bytes >= 0, HALO_EARG, "%s: max_shard_bytes is %lld", who,
             (long long)max_shard_bytes);
  const size_t length = strlen(path), e = sizeof ending - 1;
  if (length > e && strcmp(path + length - e, ending) == 0) return save_file(w, who, path);
  return save_folder(w, who, path, max_shard_bytes);
}
