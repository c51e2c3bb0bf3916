/* Headers, indexes and whole files. What is accepted must hold every promise that readers build on:
 * sorted distinct names, ranges that tile the data, counts that match shapes, reads that stay inside. */
#include <sys/mman.h>
#include <unistd.h>

#include "fuzz.h"
#include "safetensors.h"

enum { HEADER = 0, INDEX = 1, WHOLE = 2, MODES = 3 };

static void put_whole(const char *header, size_t data) {
  const uint64_t n = strlen(header);
  char *all = calloc(1, 8 + n + data);
  memcpy(all, &n, 8);
  memcpy(all + 8, header, n);
  for (size_t i = 0; i < data; i++) all[8 + n + i] = (char)(37 * i + 1);
  put_seed(WHOLE, all, 8 + n + data);
  free(all);
}

static void seeds(void) {
  static const struct {
    int data;
    const char *header;
  } headers[] = {
      {0, "{}"},
      {4, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}    "},
      {13, "{\"__metadata__\":{\"format\":\"pt\"},\"w.b\":{\"dtype\":\"BF16\",\"shape\":[2,2],\"data_offsets\":[0,8]},"
           "\"z\":{\"dtype\":\"I8\",\"shape\":[5],\"data_offsets\":[8,13]},"
           "\"e\":{\"dtype\":\"F64\",\"shape\":[0,3],\"data_offsets\":[13,13]}}"},
      {12, "{\"a\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[10,12]},"
           "\"b\":{\"dtype\":\"BOOL\",\"shape\":[1,2],\"data_offsets\":[8,10]},"
           "\"c\":{\"dtype\":\"U64\",\"shape\":[1],\"data_offsets\":[0,8]}}"},
      {9, "{\"f\":{\"dtype\":\"F8_E4M3\",\"shape\":[4],\"data_offsets\":[0,4]},"
          "\"g\":{\"dtype\":\"F8_E5M2\",\"shape\":[2],\"data_offsets\":[4,6]},"
          "\"h\":{\"dtype\":\"F6_E2M3\",\"shape\":[4],\"data_offsets\":[6,9]}}"},
  };
  for (size_t i = 0; i < sizeof headers / sizeof *headers; i++) {
    char text[1024];
    text[0] = (char)headers[i].data;
    text[1] = 0;
    strcpy(text + 2, headers[i].header);
    put_seed(HEADER, text, 2 + strlen(headers[i].header));
    put_whole(headers[i].header, (size_t)headers[i].data);
  }
  put_seed_text(INDEX, "{\"metadata\":{\"total_size\":12.0},\"weight_map\":{\"a\":\"x-1.safetensors\",\"b\":\"x-2.safetensors\"}}");
  put_seed_text(INDEX, "{\"weight_map\":{\"\\u0061\":\"..safetensors\",\"b\":\"../x.safetensors\"}}");
  static const char dictionary[] =
      "\"\\\"dtype\\\":\"\n\"\\\"shape\\\":[\"\n\"\\\"data_offsets\\\":[\"\n\"\\\"__metadata__\\\":{\"\n"
      "\"\\\"weight_map\\\":{\"\n\".safetensors\\\"\"\n\"F32\"\n\"BF16\"\n\"F16\"\n\"F4\"\n\"F6_E3M2\"\n\"I64\"\n\"U16\"\n"
      "\"4294967296\"\n\"9223372036854775807\"\n\"18446744073709551616\"\n\"../\"\n";
  put_named("dictionary", dictionary, sizeof dictionary - 1);
}

static void check_table(const halo__safetensors_table *t, int64_t data_bytes) {
  int64_t sum = 0;
  for (int64_t i = 0; i < t->n; i++) {
    const halo__tensor_entry *e = &t->entries[i];
    int64_t count = 1;
    MUST(e->name_length >= 1 && e->name_length <= 1024 && strlen(e->name) == e->name_length);
    MUST(i == 0 || strcmp(t->entries[i - 1].name, e->name) < 0);
    MUST(e->ndim >= 0 && e->ndim <= HALO_MAX_DIMS && e->dtype >= 0 && e->dtype < HALO__FILE_DTYPES);
    MUST(e->begin >= 0 && e->begin <= e->end && e->end <= data_bytes);
    for (int32_t d = 0; d < e->ndim; d++) {
      MUST(e->shape[d] >= 0);
      count = e->shape[d] == 0 || count == 0 ? 0 : count * e->shape[d];
    }
    MUST(count == e->count && count * halo__file_dtypes[e->dtype].bits == 8 * (e->end - e->begin));
    for (int64_t k = 0; k < i && t->n < 64; k++) { // no two share a byte
      const halo__tensor_entry *f = &t->entries[k];
      MUST(e->end <= f->begin || f->end <= e->begin);
    }
    sum += e->end - e->begin;
  }
  MUST(sum == data_bytes);
  for (int64_t i = 1; i < t->n_metadata; i++) {
    const halo__metadata_pair *a = &t->metadata[i - 1], *b = &t->metadata[i];
    MUST(a->key_length != b->key_length || memcmp(a->key, b->key, a->key_length) != 0);
  }
}

static char *copy_of(const uint8_t *data, size_t n) {
  char *text = NULL;
  MUST(halo__scratch((void **)&text, (int64_t)n + 1, 1) == HALO_OK);
  memcpy(text, data, n);
  return text;
}

static void header(const uint8_t *data, size_t n) {
  halo__safetensors_table t;
  if (n < 2) return;
  const int64_t data_bytes = data[0] | data[1] << 8;
  const halo_status status = halo__safetensors_parse(&t, "input", copy_of(data + 2, n - 2), (int64_t)n - 2, data_bytes);
  MUST(status == HALO_OK || status == HALO_ECORRUPT);
  if (status == HALO_OK) check_table(&t, data_bytes);
  halo__safetensors_table_free(&t);
}

static void index_of_shards(const uint8_t *data, size_t n) {
  halo__safetensors_index x;
  const halo_status status = halo__safetensors_index_parse(&x, "input", copy_of(data, n), (int64_t)n);
  MUST(status == HALO_OK || status == HALO_ECORRUPT);
  for (int32_t i = 0; status == HALO_OK && i < x.n_shards; i++) {
    MUST(strchr(x.shards[i], '/') == NULL && x.shards[i][0] != '.' && strlen(x.shards[i]) <= 255);
    for (int32_t k = 0; k < i && x.n_shards < 64; k++) MUST(strcmp(x.shards[i], x.shards[k]) != 0);
  }
  for (int64_t i = 0; status == HALO_OK && i < x.n; i++) MUST(x.names[i].shard >= 0 && x.names[i].shard < x.n_shards);
  halo__safetensors_index_free(&x);
}

static void whole_file(const uint8_t *data, size_t n) {
  static int fd = -1;
  static char path[64];
  if (fd < 0) {
    fd = memfd_create("fuzz", 0);
    MUST(fd >= 0);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  }
  MUST(ftruncate(fd, 0) == 0 && pwrite(fd, data, n, 0) == (ssize_t)n);
  halo_safetensors *s = NULL;
  const halo_status status = halo_safetensors_open(&s, path, 1);
  MUST(status == HALO_OK || status == HALO_ECORRUPT || status == HALO_EARG);
  for (int64_t i = 0; status == HALO_OK && i < halo_safetensors_count(s); i++) {
    halo_safetensors_info info;
    MUST(halo_safetensors_describe(&info, s, i) == HALO_OK);
    MUST(halo_safetensors_find(s, info.name) == i);
    MUST(info.offset + info.bytes <= (int64_t)n && info.bytes <= (int64_t)n);
    char *to = malloc((size_t)info.count * 8 + 1);
    halo_safetensors_read(s, i, 0, info.count, to, HALO_F32);
    halo_safetensors_read(s, i, 0, info.count, to, HALO_I64);
    halo_safetensors_read(s, i, 0, info.count, to, HALO_BF16);
    MUST(halo_safetensors_read_raw(s, i, 0, info.bytes, to) == HALO_OK);
    MUST(memcmp(to, data + info.offset, (size_t)info.bytes) == 0);
    free(to);
  }
  halo_safetensors_free(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < 1) return 0;
  const int mode = data[0] % MODES;
  if (mode == HEADER) header(data + 1, size - 1);
  if (mode == INDEX) index_of_shards(data + 1, size - 1);
  if (mode == WHOLE) whole_file(data + 1, size - 1);
  return 0;
}
