/* The reader against the families of malformed files of reliability.md 5.1, and the writer against
 * the reader. Files are made here; nothing is downloaded or stored. */
#include "check.h"

#include <fcntl.h>
#include <errno.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"
#include "safetensors.h"

/* In memory where there is such a file system: hundreds of saves, each with its fsync calls. */
static char folder[64] = "/dev/shm/halo-safetensors-XXXXXX";

/* A path in the test folder; the string stays. */
static const char *at(const char *name) {
  static char paths[64][512];
  static int n;
  char path[512];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  for (int i = 0; i < n; i++) {
    if (strcmp(paths[i], path) == 0) return paths[i];
  }
  if (n == 64) abort();
  return strcpy(paths[n++], path);
}

static void put_file(const char *path, const void *a, size_t na, const void *b, size_t nb) {
  FILE *file = fopen(path, "wb");
  CHECK(file != NULL);
  if (file == NULL) return;
  if (na > 0) CHECK(fwrite(a, 1, na, file) == na);
  if (nb > 0) CHECK(fwrite(b, 1, nb, file) == nb);
  fclose(file);
}

/* A file of a length word, a header and `data` zero bytes; n < 0: the header's true length. */
static const char *make(int64_t n, const char *header, size_t header_bytes, size_t data) {
  const char *path = at("case.safetensors");
  char *all = calloc(1, 8 + header_bytes + data);
  const uint64_t word = n < 0 ? header_bytes : (uint64_t)n;
  memcpy(all, &word, 8);
  memcpy(all + 8, header, header_bytes);
  put_file(path, all, 8 + header_bytes + data, NULL, 0);
  free(all);
  return path;
}

static halo_status verdict(const char *path) {
  halo_safetensors *s = NULL;
  const halo_status status = halo_safetensors_open(&s, path, 0);
  CHECK((status == HALO_OK) == (s != NULL));
  if (status != HALO_OK) CHECK(strlen(halo_error_message()) > 20);
  halo_safetensors_free(s);
  return status;
}

static void expect(const char *what, const char *path, halo_status wanted) {
  const halo_status got = verdict(path);
  if (got != wanted) {
    fprintf(stderr, "  %s: got %s, wanted %s\n", what, halo_status_name(got), halo_status_name(wanted));
  }
  CHECK(got == wanted);
}

/* ---- headers as text ------------------------------------------------------------------------ */

typedef struct header_case {
  const char *family, *header;
  int data;
  halo_status wanted;
} header_case;

#define T(name, dtype, shape, offsets)                                                    \
  "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"
#define BAD HALO_ECORRUPT

static const header_case headers[] = {
    /* valid, some of them odd */
    {"empty", "{}", 0, HALO_OK},
    {"one", "{" T("a", "F32", "[2,3]", "[0,24]") "}", 24, HALO_OK},
    {"padded", "{" T("a", "F32", "[1]", "[0,4]") "}    ", 4, HALO_OK},
    {"scalar", "{" T("a", "F64", "[]", "[0,8]") "}", 8, HALO_OK},
    {"rank 8", "{" T("a", "U8", "[1,1,1,1,1,1,1,2]", "[0,2]") "}", 2, HALO_OK},
    {"unsorted", "{" T("b", "U8", "[2]", "[3,5]") "," T("a", "U8", "[3]", "[0,3]") "}", 5, HALO_OK},
    {"zero size", "{" T("z", "F32", "[0,7]", "[0,0]") "," T("a", "U8", "[1]", "[0,1]") "}", 1, HALO_OK},
    {"zero size at the end", "{" T("a", "U8", "[1]", "[0,1]") "," T("z", "F32", "[0]", "[1,1]") "}", 1,
     HALO_OK},
    {"two zero sizes", "{" T("y", "F32", "[0]", "[0,0]") "," T("z", "F32", "[0]", "[0,0]") "}", 0, HALO_OK},
    {"white space", "{ \"a\" :\n{\t\"dtype\": \"U8\", \"shape\": [ 1 ],\r\n\"data_offsets\": [0, 1] } }", 1,
     HALO_OK},
    {"fields in another order", "{\"a\":{\"data_offsets\":[0,1],\"shape\":[1],\"dtype\":\"U8\"}}", 1, HALO_OK},
    {"metadata", "{\"__metadata__\":{\"format\":\"pt\",\"x\":\"\\n\"}," T("a", "U8", "[1]", "[0,1]") "}", 1,
     HALO_OK},
    {"metadata last", "{" T("a", "U8", "[1]", "[0,1]") ",\"__metadata__\":{}}", 1, HALO_OK},
    {"escapes in a name", "{" T("\\u0061\\ud83d\\ude00\\/", "U8", "[1]", "[0,1]") "}", 1, HALO_OK},
    {"UTF-8 in a name", "{" T("\xc3\xa9\xf0\x9f\x98\x80", "U8", "[1]", "[0,1]") "}", 1, HALO_OK},
    {"a path as a name", "{" T("../x", "U8", "[1]", "[0,1]") "}", 1, HALO_OK},
    {"F4 pairs", "{" T("a", "F4", "[3,2]", "[0,3]") "}", 3, HALO_OK},
    {"F6 fours", "{" T("a", "F6_E2M3", "[4]", "[0,3]") "}", 3, HALO_OK},
    {"C64", "{" T("a", "C64", "[1]", "[0,8]") "}", 8, HALO_OK},
    /* the text */
    {"not an object", "[]", 0, BAD},
    {"a string", "\"a\"", 0, BAD},
    {"leading space", " {}", 0, BAD},
    {"byte order mark", "\xef\xbb\xbf{}", 0, BAD},
    {"newline behind", "{}\n", 0, BAD},
    {"tab behind", "{}\t", 0, BAD},
    {"text behind", "{} x", 0, BAD},
    {"second object", "{}{}", 0, BAD},
    {"unclosed", "{", 0, BAD},
    {"unclosed tensor", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]", 1, BAD},
    {"unclosed array", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1,\"data_offsets\":[0,1]}}", 1, BAD},
    {"wrong bracket", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1},\"data_offsets\":[0,1]}}", 1, BAD},
    {"trailing comma", "{" T("a", "U8", "[1]", "[0,1]") ",}", 1, BAD},
    {"trailing comma in a shape", "{" T("a", "U8", "[1,]", "[0,1]") "}", 1, BAD},
    {"missing comma", "{" T("a", "U8", "[1]", "[0,1]") T("b", "U8", "[1]", "[1,2]") "}", 2, BAD},
    {"missing colon", "{\"a\"{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, BAD},
    {"single quotes", "{'a':1}", 0, BAD},
    {"comment", "{/**/}", 0, BAD},
    {"bad UTF-8", "{" T("\xff", "U8", "[1]", "[0,1]") "}", 1, BAD},
    {"overlong UTF-8", "{" T("\xc0\xaf", "U8", "[1]", "[0,1]") "}", 1, BAD},
    {"surrogate in UTF-8", "{" T("\xed\xa0\x80", "U8", "[1]", "[0,1]") "}", 1, BAD},
    {"UTF-8 beyond U+10FFFF", "{" T("\xf4\x90\x80\x80", "U8", "[1]", "[0,1]") "}", 1, BAD},
    {"cut UTF-8", "{" T("\xe2\x82", "U8", "[1]", "[0,1]") "}", 1, BAD},
    {"lone surrogate", "{" T("\\ud800", "U8", "[1]", "[0,1]") "}", 1, BAD},
    {"unknown escape", "{" T("\\x41", "U8", "[1]", "[0,1]") "}", 1, BAD},
    {"control character", "{" T("a\x01", "U8", "[1]", "[0,1]") "}", 1, BAD},
    {"escaped NUL in a name", "{" T("a\\u0000b", "U8", "[1]", "[0,1]") "}", 1, BAD},
    {"escaped control in a name", "{" T("a\\u001b[2J", "U8", "[1]", "[0,1]") "}", 1, BAD},
    {"empty name", "{" T("", "U8", "[1]", "[0,1]") "}", 1, BAD},
    {"nested too deep", "{\"a\":{\"dtype\":\"U8\",\"shape\":[[[[1]]]],\"data_offsets\":[0,1]}}", 1, BAD},
    /* duplicates and fields */
    {"duplicate tensor", "{" T("a", "U8", "[1]", "[0,1]") "," T("a", "U8", "[1]", "[1,2]") "}", 2, BAD},
    {"duplicate through an escape", "{" T("a", "U8", "[1]", "[0,1]") "," T("\\u0061", "U8", "[1]", "[1,2]") "}",
     2, BAD},
    {"duplicate field", "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, BAD},
    {"duplicate shape", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"shape\":[2],\"data_offsets\":[0,1]}}", 1, BAD},
    {"duplicate metadata key", "{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}", 0, BAD},
    {"metadata twice", "{\"__metadata__\":{},\"__metadata__\":{}}", 0, BAD},
    {"metadata not an object", "{\"__metadata__\":\"pt\"}", 0, BAD},
    {"metadata number", "{\"__metadata__\":{\"a\":1}}", 0, BAD},
    {"metadata null", "{\"__metadata__\":{\"a\":null}}", 0, BAD},
    {"metadata as a tensor", "{" T("__metadata__", "U8", "[1]", "[0,1]") "}", 1, BAD},
    {"missing dtype", "{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, BAD},
    {"missing shape", "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, BAD},
    {"missing offsets", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, BAD},
    {"extra field", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"x\":1}}", 1, BAD},
    {"tensor is a string", "{\"a\":\"U8\"}", 0, BAD},
    {"tensor is null", "{\"a\":null}", 0, BAD},
    {"unknown dtype", "{" T("a", "I128", "[1]", "[0,16]") "}", 16, BAD},
    {"lower case dtype", "{" T("a", "f32", "[1]", "[0,4]") "}", 4, BAD},
    {"dtype number", "{\"a\":{\"dtype\":1,\"shape\":[1],\"data_offsets\":[0,1]}}", 1, BAD},
    /* shapes */
    {"negative size", "{" T("a", "U8", "[-1]", "[0,1]") "}", 1, BAD},
    {"negative zero", "{" T("a", "U8", "[-0]", "[0,0]") "}", 0, BAD},
    {"float size", "{" T("a", "U8", "[1.0]", "[0,1]") "}", 1, BAD},
    {"exponent size", "{" T("a", "U8", "[1e0]", "[0,1]") "}", 1, BAD},
    {"size in quotes", "{" T("a", "U8", "[\"1\"]", "[0,1]") "}", 1, BAD},
    {"leading zero", "{" T("a", "U8", "[01]", "[0,1]") "}", 1, BAD},
    {"plus sign", "{" T("a", "U8", "[+1]", "[0,1]") "}", 1, BAD},
    {"shape is a number", "{" T("a", "U8", "1", "[0,1]") "}", 1, BAD},
    {"shape is null", "{" T("a", "U8", "null", "[0,1]") "}", 1, BAD},
    {"rank 9", "{" T("a", "U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]") "}", 1, BAD},
    {"size beyond 2^63", "{" T("a", "U8", "[9223372036854775808]", "[0,1]") "}", 1, BAD},
    {"size beyond 2^64", "{" T("a", "U8", "[18446744073709551617]", "[0,1]") "}", 1, BAD},
    {"product overflows", "{" T("a", "U8", "[4294967296,4294967296]", "[0,0]") "}", 0, BAD},
    {"product overflows to fit", "{" T("a", "U8", "[4294967297,4294967296]", "[0,1]") "}", 1, BAD},
    {"bytes overflow", "{" T("a", "F64", "[2305843009213693952]", "[0,0]") "}", 0, BAD},
    {"overflow behind a zero", "{" T("a", "U8", "[0,4294967296,4294967296]", "[0,0]") "}", 0, BAD},
    {"one byte too few", "{" T("a", "F32", "[2]", "[0,7]") "}", 7, BAD},
    {"one byte too many", "{" T("a", "F32", "[2]", "[0,9]") "}", 9, BAD},
    {"F4 misaligned", "{" T("a", "F4", "[3]", "[0,2]") "}", 2, BAD},
    {"F6 misaligned", "{" T("a", "F6_E3M2", "[3]", "[0,3]") "}", 3, BAD},
    /* ranges */
    {"reversed", "{" T("a", "U8", "[1]", "[1,0]") "}", 1, BAD},
    {"negative offset", "{" T("a", "U8", "[1]", "[-1,0]") "}", 1, BAD},
    {"float offset", "{" T("a", "U8", "[1]", "[0,1.0]") "}", 1, BAD},
    {"one offset", "{" T("a", "U8", "[1]", "[0]") "}", 1, BAD},
    {"three offsets", "{" T("a", "U8", "[1]", "[0,1,1]") "}", 1, BAD},
    {"offsets are an object", "{" T("a", "U8", "[1]", "{}") "}", 1, BAD},
    {"beyond the end", "{" T("a", "U8", "[2]", "[0,2]") "}", 1, BAD},
    {"far beyond the end", "{" T("a", "U8", "[1]", "[9223372036854775806,9223372036854775807]") "}", 1, BAD},
    {"hole at the start", "{" T("a", "U8", "[1]", "[1,2]") "}", 2, BAD},
    {"hole in the middle", "{" T("a", "U8", "[1]", "[0,1]") "," T("b", "U8", "[1]", "[2,3]") "}", 3, BAD},
    {"hole at the end", "{" T("a", "U8", "[1]", "[0,1]") "}", 2, BAD},
    {"data without tensors", "{}", 1, BAD},
    {"overlap", "{" T("a", "U8", "[2]", "[0,2]") "," T("b", "U8", "[2]", "[1,3]") "}", 3, BAD},
    {"identical ranges", "{" T("a", "U8", "[2]", "[0,2]") "," T("b", "U8", "[2]", "[0,2]") "}", 2, BAD},
    {"zero size inside another", "{" T("a", "U8", "[2]", "[0,2]") "," T("z", "U8", "[0]", "[1,1]") "}", 2, BAD},
};

static void headers_are_judged_rightly(void) {
  for (size_t i = 0; i < sizeof headers / sizeof *headers; i++) {
    const header_case *c = &headers[i];
    expect(c->family, make(-1, c->header, strlen(c->header), (size_t)c->data), c->wanted);
  }
}

static void length_words_are_bounded(void) {
  const char header[] = "{}";
  const uint64_t wrong[] = {0, 1, 3, (uint64_t)1 << 63, UINT64_MAX, UINT64_MAX - 7, 100000001};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    char all[10];
    memcpy(all, &wrong[i], 8);
    memcpy(all + 8, header, 2);
    put_file(at("case.safetensors"), all, 10, NULL, 0);
    expect("length word", at("case.safetensors"), HALO_ECORRUPT);
  }
  for (size_t n = 0; n < 8; n++) {
    put_file(at("case.safetensors"), "\2\0\0\0\0\0\0", n, NULL, 0);
    expect("short file", at("case.safetensors"), HALO_ECORRUPT);
  }
  // A sparse file that is large enough for the word, above the limit: refused before memory is asked.
  const uint64_t over = 100000001;
  put_file(at("case.safetensors"), &over, 8, NULL, 0);
  CHECK(truncate(at("case.safetensors"), 200000000) == 0);
  const int64_t before = halo_memory_peak_bytes(HALO_CPU, -1);
  expect("header over the limit", at("case.safetensors"), HALO_ECORRUPT);
  CHECK(halo_memory_peak_bytes(HALO_CPU, -1) <= before + 1000000);
}

/* Text with printf-like growth, for headers of many tensors. */
typedef struct text {
  char *p;
  size_t n, capacity;
} text;

static void add(text *t, const char *format, ...) {
  if (t->capacity - t->n < 4096) {
    t->capacity = t->capacity == 0 ? 1 << 16 : 2 * t->capacity;
    t->p = realloc(t->p, t->capacity);
  }
  va_list args;
  va_start(args, format);
  t->n += (size_t)vsnprintf(t->p + t->n, 4096, format, args);
  va_end(args);
}

static void depth_needs_no_stack(void) {
  text t = {0};
  add(&t, "{\"a\":");
  for (int i = 0; i < 100000; i++) add(&t, "[");
  expect("depth 10^5, arrays", make(-1, t.p, t.n, 0), HALO_ECORRUPT);
  t.n = 0;
  for (int i = 0; i < 100000; i++) add(&t, "{\"a\":");
  expect("depth 10^5, objects", make(-1, t.p, t.n, 0), HALO_ECORRUPT);
  free(t.p);
}

static void many_tensors(void) {
  text t = {0};
  add(&t, "{");
  for (int i = 0; i < 1000000; i++) {
    add(&t, "%s\"%d\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}", i > 0 ? "," : "", i);
  }
  add(&t, "}");
  halo_memory_trim(HALO_CPU);
  halo_memory_reset_peak(HALO_CPU);
  expect("10^6 empty tensors", make(-1, t.p, t.n, 0), HALO_OK);
  CHECK(halo_memory_peak_bytes(HALO_CPU, -1) < 6 * (int64_t)t.n);
  t.n--;
  add(&t, ",\"x\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}");
  expect("one tensor more", make(-1, t.p, t.n, 0), HALO_ECORRUPT);
  free(t.p);
}

static void long_names(void) {
  char name[1026];
  memset(name, 'n', sizeof name);
  text t = {0};
  for (int n = 1023; n <= 1025; n++) {
    t.n = 0;
    add(&t, "{\"%.*s\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", n, name);
    expect("a name's length", make(-1, t.p, t.n, 1), n <= 1024 ? HALO_OK : HALO_ECORRUPT);
  }
  t.n = 0;
  add(&t, "{");
  for (int i = 0; i < 10000; i++) {
    add(&t, "%s\"%.1000s%06d\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%d,%d]}", i > 0 ? "," : "",
        name, i, i, i + 1);
  }
  add(&t, "}");
  expect("10^4 long names", make(-1, t.p, t.n, 10000), HALO_OK);
  t.n = 0;
  add(&t, "{\"");
  for (int i = 0; i < 1024; i++) add(&t, "%.1000s", name);
  add(&t, "\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}");
  expect("a name of 1 MB", make(-1, t.p, t.n, 1), HALO_ECORRUPT);
  free(t.p);
}

static void odd_files(void) {
  expect("absent", at("absent.safetensors"), HALO_EIO);
  CHECK(mkfifo(at("fifo.safetensors"), 0600) == 0);
  expect("FIFO", at("fifo.safetensors"), HALO_EARG);
  expect("device", "/dev/zero", HALO_EARG);
  CHECK(mkdir(at("empty"), 0700) == 0);
  expect("empty folder", at("empty"), HALO_EIO);
  CHECK(mkdir(at("folder"), 0700) == 0 && mkdir(at("folder/model.safetensors"), 0700) == 0);
  expect("folder called like a file", at("folder"), HALO_EARG);
  CHECK(symlink("loop.safetensors", at("loop.safetensors")) == 0);
  expect("link to itself", at("loop.safetensors"), HALO_EARG);
  const char good[] = "{" T("a", "U8", "[1]", "[0,1]") "}";
  const char *path = make(-1, good, sizeof good - 1, 1);
  CHECK(symlink("case.safetensors", at("link.safetensors")) == 0);
  expect("link", at("link.safetensors"), HALO_EARG);
  halo_safetensors *s = NULL;
  CHECK_OK(halo_safetensors_open(&s, at("link.safetensors"), 1));
  halo_safetensors_free(s);
  CHECK_STATUS(halo_safetensors_open(&s, at("loop.safetensors"), 1), HALO_EARG);
  CHECK_STATUS(halo_safetensors_open(&s, "", 0), HALO_EARG);
  CHECK_STATUS(halo_safetensors_open(&s, NULL, 0), HALO_EARG);
  // Appended and cut data, and what a polyglot would append.
  static const char *const tails[] = {"x", "PK\3\4zip", "\x80\2pickle", "\x7f""ELF"};
  for (int i = 0; i < 4; i++) {
    path = make(-1, good, sizeof good - 1, 1);
    FILE *file = fopen(path, "ab");
    fputs(tails[i], file);
    fclose(file);
    expect("appended", path, HALO_ECORRUPT);
  }
  path = make(-1, good, sizeof good - 1, 1);
  CHECK(truncate(path, 8 + sizeof good - 1) == 0);
  expect("data cut by one", path, HALO_ECORRUPT);
}

static void pickles_are_refused(void) {
  static const char *const names[] = {"pytorch_model.bin", "a.pt", "A.PTH", "b.ckpt", "c.pkl", "d.pickle"};
  const char good[] = "{}";
  const char *path = make(-1, good, 2, 0);
  for (int i = 0; i < 6; i++) {
    CHECK(link(path, at(names[i])) == 0);
    expect(names[i], at(names[i]), HALO_EARG);
  }
  put_file(at("case.safetensors"), "PK\3\4\0\0\0\0\0\0archive/data.pkl", 26, NULL, 0);
  expect("zip", at("case.safetensors"), HALO_EARG);
  put_file(at("case.safetensors"), "\x80\2\x8a\nl\xfc\x9c""F\xf9 j\xa8P\x19.", 14, NULL, 0);
  expect("pickle", at("case.safetensors"), HALO_EARG);
  CHECK(mkdir(at("pickled"), 0700) == 0);
  put_file(at("pickled/pytorch_model.bin"), "x", 1, NULL, 0);
  expect("folder of pickles", at("pickled"), HALO_EARG);
  // A header of 0x280 bytes begins with the bytes 80 02: no pickle.
  text t = {0};
  add(&t, "{}");
  while (t.n < 0x280) add(&t, " ");
  expect("a length word like a pickle", make(-1, t.p, t.n, 0), HALO_OK);
  free(t.p);
}

/* ---- shards --------------------------------------------------------------------------------- */

static void put_shard(const char *name, const char *tensor) {
  char header[256];
  const int n = snprintf(header, sizeof header, "{" T("%s", "U8", "[1]", "[0,1]") "}", tensor);
  const char *made = make(-1, header, (size_t)n, 1);
  CHECK(rename(made, at(name)) == 0);
}

static void put_index(const char *json) {
  put_file(at("m/model.safetensors.index.json"), json, strlen(json), NULL, 0);
}

static void indexes_are_judged_rightly(void) {
  CHECK(mkdir(at("m"), 0700) == 0);
  put_shard("m/s1.safetensors", "a");
  put_shard("m/s2.safetensors", "b");
  put_shard("outside.safetensors", "a");
  static const struct {
    const char *family, *json;
    halo_status wanted;
  } cases[] = {
      {"plain", "{\"metadata\":{\"total_size\":2},\"weight_map\":{\"a\":\"s1.safetensors\",\"b\":\"s2.safetensors\"}}",
       HALO_OK},
      {"a float as total_size", "{\"metadata\":{\"total_size\":2.0,\"x\":[1,{}]},\"weight_map\":"
       "{\"b\":\"s2.safetensors\",\"a\":\"s1.safetensors\"}}", HALO_OK},
      {"traversal", "{\"weight_map\":{\"a\":\"../outside.safetensors\"}}", BAD},
      {"absolute", "{\"weight_map\":{\"a\":\"/etc/x.safetensors\"}}", BAD},
      {"subfolder", "{\"weight_map\":{\"a\":\"x/s1.safetensors\"}}", BAD},
      {"backslash", "{\"weight_map\":{\"a\":\"..\\\\s1.safetensors\"}}", BAD},
      {"hidden", "{\"weight_map\":{\"a\":\".s1.safetensors\"}}", BAD},
      {"NUL", "{\"weight_map\":{\"a\":\"s1.safetensors\\u0000.safetensors\"}}", BAD},
      {"empty shard", "{\"weight_map\":{\"a\":\"\"}}", BAD},
      {"pickle shard", "{\"weight_map\":{\"a\":\"pytorch_model.bin\"}}", BAD},
      {"missing shard", "{\"weight_map\":{\"a\":\"s3.safetensors\"}}", HALO_EIO},
      {"tensor not there", "{\"weight_map\":{\"a\":\"s1.safetensors\",\"b\":\"s2.safetensors\",\"c\":\"s1.safetensors\"}}",
       BAD},
      {"tensor not named", "{\"weight_map\":{\"a\":\"s1.safetensors\",\"c\":\"s2.safetensors\"}}", BAD},
      {"tensor in the other", "{\"weight_map\":{\"b\":\"s1.safetensors\",\"a\":\"s2.safetensors\"}}", BAD},
      {"duplicate", "{\"weight_map\":{\"a\":\"s1.safetensors\",\"a\":\"s1.safetensors\"}}", BAD},
      {"two maps", "{\"weight_map\":{},\"weight_map\":{}}", BAD},
      {"no map", "{\"metadata\":{}}", BAD},
      {"empty map", "{\"weight_map\":{}}", BAD},
      {"map of numbers", "{\"weight_map\":{\"a\":1}}", BAD},
      {"map is a list", "{\"weight_map\":[]}", BAD},
      {"not an object", "[]", BAD},
      {"text behind", "{\"weight_map\":{\"a\":\"s1.safetensors\",\"b\":\"s2.safetensors\"}} x", BAD},
      {"nothing", "", BAD},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    put_index(cases[i].json);
    expect(cases[i].family, at("m"), cases[i].wanted);
  }
  put_index(cases[0].json);
  CHECK(unlink(at("m/s2.safetensors")) == 0 && symlink("s1.safetensors", at("m/s2.safetensors")) == 0);
  expect("link as a shard", at("m"), HALO_EARG);
  CHECK(unlink(at("m/s2.safetensors")) == 0);
  put_shard("m/s2.safetensors", "a");
  expect("tensor in two shards", at("m"), HALO_ECORRUPT);
  put_shard("m/s2.safetensors", "b");
  halo_safetensors *s = NULL;
  CHECK_OK(halo_safetensors_open(&s, at("m/model.safetensors.index.json"), 0));
  halo_safetensors_info info;
  CHECK(halo_safetensors_count(s) == 2 && halo_safetensors_find(s, "b") == 1);
  CHECK_OK(halo_safetensors_describe(&info, s, 1));
  CHECK(strstr(info.file, "s2.safetensors") != NULL);
  halo_safetensors_free(s);
  put_shard("m/model.safetensors", "single"); // Transformers looks for it first
  CHECK_OK(halo_safetensors_open(&s, at("m"), 0));
  CHECK(halo_safetensors_count(s) == 1 && halo_safetensors_find(s, "single") == 0);
  halo_safetensors_free(s);
}

/* ---- values --------------------------------------------------------------------------------- */

static void values_convert(void) {
  const char header[] =
      "{" T("bool", "BOOL", "[2]", "[0,2]") "," T("i8", "I8", "[2]", "[2,4]") "," T("u16", "U16", "[2]", "[4,8]") ","
          T("f16", "F16", "[8]", "[8,24]") "," T("e4m3", "F8_E4M3", "[8]", "[24,32]") ","
          T("e5m2", "F8_E5M2", "[4]", "[32,36]") "," T("u32", "U32", "[1]", "[36,40]") ","
          T("u64", "U64", "[2]", "[40,56]") "," T("i64", "I64", "[2]", "[56,72]") ","
          T("f64", "F64", "[1]", "[72,80]") "," T("bf16", "BF16", "[2]", "[80,84]") ","
          T("c64", "C64", "[1]", "[84,92]") "," T("i16", "I16", "[1]", "[92,94]") ","
          T("i32", "I32", "[1]", "[94,98]") "," T("f32", "F32", "[2]", "[98,106]") "}";
  uint8_t data[106] = {0, 1, 0x80, 0x7f, 0xff, 0xff, 2, 0};
  // 1, -2, smallest subnormal, largest subnormal, largest, infinity, NaN, -0
  const uint16_t halves[8] = {0x3c00, 0xc000, 0x0001, 0x03ff, 0x7bff, 0x7c00, 0x7e01, 0x8000};
  // 1, -2, smallest subnormal, largest subnormal, largest (448), NaN, -0, 1.125
  const uint8_t e4m3[8] = {0x38, 0xc0, 0x01, 0x07, 0x7e, 0x7f, 0x80, 0x39};
  const uint8_t e5m2[4] = {0x3c, 0xc0, 0x01, 0x7b};
  const uint32_t u32 = 4294967295u;
  const uint64_t u64[2] = {UINT64_MAX, 5};
  const int64_t i64[2] = {INT64_MIN, 1 << 20};
  const double f64 = 1.0000000001;
  const uint16_t bf16[2] = {0x3f80, 0xc040};
  const int16_t i16 = -300;
  const int32_t i32 = -70000;
  const float f32[2] = {1.5f, -3e38f};
  memcpy(data + 8, halves, 16);
  memcpy(data + 24, e4m3, 8);
  memcpy(data + 32, e5m2, 4);
  memcpy(data + 36, &u32, 4);
  memcpy(data + 40, u64, 16);
  memcpy(data + 56, i64, 16);
  memcpy(data + 72, &f64, 8);
  memcpy(data + 80, bf16, 4);
  memcpy(data + 92, &i16, 2);
  memcpy(data + 94, &i32, 4);
  memcpy(data + 98, f32, 8);
  const uint64_t n = sizeof header - 1;
  char first[8 + sizeof header];
  memcpy(first, &n, 8);
  memcpy(first + 8, header, n);
  put_file(at("values.safetensors"), first, 8 + n, data, sizeof data);

  halo_safetensors *s = NULL;
  CHECK_OK(halo_safetensors_open(&s, at("values.safetensors"), 0));
  float f[8];
  double d[2];
  int64_t l[8];
  int32_t i[8];
  uint8_t b[8];
  uint16_t h[8];
#define READ(name, first, count, to, dtype)                                               \
  halo_safetensors_read(s, halo_safetensors_find(s, name), first, count, to, dtype)
  CHECK_OK(READ("f16", 0, 8, f, HALO_F32));
  CHECK(f[0] == 1 && f[1] == -2 && f[2] == 0x1p-24f && f[3] == 0x1.ff8p-15f && f[4] == 65504);
  CHECK(isinf(f[5]) && isnan(f[6]) && f[7] == 0 && signbit(f[7]));
  CHECK_OK(READ("f16", 3, 2, d, HALO_F64));
  CHECK(d[0] == 0x1.ff8p-15 && d[1] == 65504);
  CHECK_OK(READ("e4m3", 0, 8, f, HALO_F32));
  CHECK(f[0] == 1 && f[1] == -2 && f[2] == 0x1p-9f && f[3] == 7 * 0x1p-9f && f[4] == 448);
  CHECK(isnan(f[5]) && f[6] == 0 && signbit(f[6]) && f[7] == 1.125f);
  CHECK_OK(READ("e5m2", 0, 4, f, HALO_F32));
  CHECK(f[0] == 1 && f[1] == -2 && f[2] == 0x1p-16f && f[3] == 57344);
  CHECK_OK(READ("bf16", 0, 2, f, HALO_F32));
  CHECK(f[0] == 1 && f[1] == -3);
  CHECK_OK(READ("bf16", 0, 2, h, HALO_BF16));
  CHECK(h[0] == 0x3f80 && h[1] == 0xc040);
  CHECK_OK(READ("f32", 0, 2, h, HALO_BF16));
  CHECK(h[0] == 0x3fc0);
  CHECK_OK(READ("f64", 0, 1, d, HALO_F64));
  CHECK(d[0] == f64);
  CHECK_OK(READ("f64", 0, 1, f, HALO_F32));
  CHECK(f[0] == 1);
  CHECK_OK(READ("bool", 0, 2, b, HALO_U8));
  CHECK(b[0] == 0 && b[1] == 1);
  CHECK_OK(READ("i8", 0, 2, i, HALO_I32));
  CHECK(i[0] == -128 && i[1] == 127);
  CHECK_OK(READ("i8", 0, 2, f, HALO_F32));
  CHECK(f[0] == -128 && f[1] == 127);
  CHECK_OK(READ("u16", 0, 2, l, HALO_I64));
  CHECK(l[0] == 65535 && l[1] == 2);
  CHECK_OK(READ("i16", 0, 1, l, HALO_I64));
  CHECK(l[0] == -300);
  CHECK_OK(READ("i32", 0, 1, l, HALO_I64));
  CHECK(l[0] == -70000);
  CHECK_OK(READ("u32", 0, 1, l, HALO_I64));
  CHECK(l[0] == 4294967295);
  CHECK_OK(READ("i64", 1, 1, i, HALO_I32));
  CHECK(i[0] == 1 << 20);
  CHECK_OK(READ("u64", 0, 1, d, HALO_F64));
  CHECK(d[0] == 0x1p64);
  CHECK_OK(READ("u64", 1, 1, l, HALO_I64));
  CHECK(l[0] == 5);
  // What does not fit is refused, not wrapped.
  CHECK_STATUS(READ("u64", 0, 1, l, HALO_I64), HALO_EARG);
  CHECK_STATUS(READ("u32", 0, 1, i, HALO_I32), HALO_EARG);
  CHECK_STATUS(READ("i8", 0, 2, b, HALO_U8), HALO_EARG);
  CHECK_STATUS(READ("f32", 0, 2, i, HALO_I32), HALO_EARG);
  CHECK_STATUS(READ("c64", 0, 1, f, HALO_F32), HALO_EUNSUPPORTED);
  CHECK_STATUS(READ("f32", 1, 2, f, HALO_F32), HALO_EARG);
  CHECK_STATUS(READ("f32", -1, 1, f, HALO_F32), HALO_EARG);
  CHECK_STATUS(READ("f32", 1, INT64_MAX, f, HALO_F32), HALO_EARG);
  CHECK_STATUS(READ("f32", 0, 1, f, 99), HALO_EARG);
  CHECK_STATUS(READ("absent", 0, 1, f, HALO_F32), HALO_EARG);
  CHECK_OK(halo_safetensors_read_raw(s, halo_safetensors_find(s, "c64"), 0, 8, d));
  CHECK_STATUS(halo_safetensors_read_raw(s, halo_safetensors_find(s, "c64"), 1, 8, d), HALO_EARG);
#undef READ
  halo_safetensors_free(s);
}

static void a_changed_file_is_noticed(void) {
  const char header[] = "{" T("a", "U8", "[4]", "[0,4]") "}";
  const char *path = at("changing.safetensors");
  uint8_t b[4];
  halo_safetensors *s = NULL;
  CHECK(rename(make(-1, header, sizeof header - 1, 4), path) == 0);
  CHECK_OK(halo_safetensors_open(&s, path, 0));
  CHECK_OK(halo_safetensors_read(s, 0, 0, 4, b, HALO_U8));
  CHECK(truncate(path, (off_t)(8 + sizeof header - 1 + 2)) == 0);
  CHECK_STATUS(halo_safetensors_read(s, 0, 0, 4, b, HALO_U8), HALO_EIO);
  CHECK(rename(make(-1, header, sizeof header - 1, 4), path) == 0); // another file of the same size
  CHECK_STATUS(halo_safetensors_read(s, 0, 0, 4, b, HALO_U8), HALO_EIO);
  CHECK(unlink(path) == 0);
  CHECK_STATUS(halo_safetensors_read(s, 0, 0, 4, b, HALO_U8), HALO_EIO);
  halo_safetensors_free(s);
  // The same without the identity check: a read that comes up short.
  halo__input in;
  CHECK(rename(make(-1, header, sizeof header - 1, 4), path) == 0);
  CHECK_OK(halo__input_open(&in, "test", path, false));
  CHECK(truncate(path, 10) == 0);
  CHECK_STATUS(halo__input_read(&in, "test", path, b, 4, 8), HALO_EIO);
  halo__input_close(&in);
}

/* ---- the writer ----------------------------------------------------------------------------- */

static halo_tensor *numbers(int32_t dtype, int64_t rows, int64_t columns, double from) {
  halo_tensor *t = NULL;
  const int64_t shape[2] = {rows, columns};
  CHECK_OK(halo_tensor_new(&t, dtype, HALO_CPU, 2, shape));
  for (int64_t i = 0; i < rows * columns; i++) CHECK_OK(halo_tensor_set(t, i, from + (double)i));
  return t;
}

static void what_is_written_is_read(void) {
  halo_safetensors_writer *w = NULL;
  CHECK_OK(halo_safetensors_writer_new(&w));
  halo_tensor *f32 = numbers(HALO_F32, 3, 5, 0.5), *f64 = numbers(HALO_F64, 1, 2, -1);
  halo_tensor *bf16 = numbers(HALO_BF16, 2, 2, 1), *i64 = numbers(HALO_I64, 2, 1, -7);
  halo_tensor *u8 = numbers(HALO_U8, 1, 3, 250), *i32 = numbers(HALO_I32, 1, 1, -9);
  CHECK_OK(halo_safetensors_writer_add(w, "f32", f32, NULL));
  CHECK_OK(halo_safetensors_writer_add(w, "f64", f64, NULL));
  CHECK_OK(halo_safetensors_writer_add(w, "bf16", bf16, NULL));
  CHECK_OK(halo_safetensors_writer_add(w, "i64", i64, NULL));
  CHECK_OK(halo_safetensors_writer_add(w, "u8 \"q\"\xc3\xa9", u8, NULL));
  CHECK_OK(halo_safetensors_writer_add(w, "i32", i32, NULL));
  CHECK_OK(halo_safetensors_writer_add(w, "half", f32, "F16"));
  CHECK_OK(halo_safetensors_writer_add(w, "narrow", f32, "BF16"));
  CHECK_OK(halo_safetensors_writer_add(w, "wide", bf16, "F64"));
  CHECK_OK(halo_safetensors_writer_metadata(w, "note", "two\nlines \"quoted\" \x01"));
  CHECK_OK(halo_safetensors_writer_save(w, at("out.safetensors"), 0));
  CHECK_OK(halo_safetensors_writer_save(w, at("out.safetensors"), 0)); // over itself

  halo_safetensors *s = NULL;
  CHECK_OK(halo_safetensors_open(&s, at("out.safetensors"), 0));
  CHECK(halo_safetensors_count(s) == 9);
  CHECK(strcmp(halo_safetensors_metadata(s, "format"), "pt") == 0);
  CHECK(strcmp(halo_safetensors_metadata(s, "note"), "two\nlines \"quoted\" \x01") == 0);
  CHECK(halo_safetensors_metadata(s, "absent") == NULL);
  CHECK(halo_safetensors_metadata_count(s) == 2);
  CHECK(strcmp(halo_safetensors_metadata_key(s, 1), "note") == 0 && halo_safetensors_metadata_key(s, 2) == NULL);
  for (int64_t i = 0; i < 9; i++) {
    halo_safetensors_info info;
    CHECK_OK(halo_safetensors_describe(&info, s, i));
    CHECK(info.offset % (info.bytes / info.count) == 0); // aligned in the file
  }
  float f[15];
  CHECK_OK(halo_safetensors_read(s, halo_safetensors_find(s, "half"), 0, 15, f, HALO_F32));
  for (int i = 0; i < 15; i++) CHECK(f[i] == 0.5f + (float)i);
  CHECK_OK(halo_safetensors_read(s, halo_safetensors_find(s, "narrow"), 0, 15, f, HALO_F32));
  CHECK(f[14] == 14.5f);
  // A transposed target of another dtype.
  halo_tensor *to = numbers(HALO_F64, 5, 3, 0), *view = NULL;
  const int64_t shape[2] = {3, 5}, stride[2] = {1, 3};
  CHECK_OK(halo__view(&view, to, 2, shape, stride, 0));
  CHECK_OK(halo_safetensors_load(view, s, halo_safetensors_find(s, "f32")));
  double x = 0;
  CHECK_OK(halo_tensor_get(to, 3 * 4 + 2, &x));
  CHECK(x == 0.5 + 14);
  CHECK_STATUS(halo_safetensors_load(to, s, halo_safetensors_find(s, "f32")), HALO_EARG); // shape
  CHECK_STATUS(halo_safetensors_load(view, s, -1), HALO_EARG);
  halo_safetensors_free(s);

  CHECK_STATUS(halo_safetensors_writer_add(w, "", f32, NULL), HALO_EARG);
  CHECK_STATUS(halo_safetensors_writer_add(w, "__metadata__", f32, NULL), HALO_EARG);
  CHECK_STATUS(halo_safetensors_writer_add(w, "a\nb", f32, NULL), HALO_EARG);
  CHECK_STATUS(halo_safetensors_writer_add(w, "\xff", f32, NULL), HALO_EARG);
  CHECK_STATUS(halo_safetensors_writer_add(w, "x", f32, "I64"), HALO_EARG);
  CHECK_STATUS(halo_safetensors_writer_add(w, "x", i64, "F32"), HALO_EARG);
  CHECK_STATUS(halo_safetensors_writer_add(w, "x", f32, "U16"), HALO_EARG);
  CHECK_STATUS(halo_safetensors_writer_save(w, "/nowhere/x.safetensors", 0), HALO_EIO);
  CHECK_STATUS(halo_safetensors_writer_save(w, at("out.safetensors"), -1), HALO_EARG);
  CHECK_OK(halo_safetensors_writer_add(w, "f32", f32, NULL));
  CHECK_STATUS(halo_safetensors_writer_save(w, at("out.safetensors"), 0), HALO_EARG); // twice
  halo_safetensors_writer_free(w);
  halo_tensor *all[] = {f32, f64, bf16, i64, u8, i32, to, view};
  for (int i = 0; i < 8; i++) halo_tensor_free(all[i]);
}

static void halves_round_to_even(void) {
  static const struct {
    float from;
    uint16_t to;
  } cases[] = {{0, 0}, {-0.0f, 0x8000}, {1, 0x3c00}, {65504, 0x7bff}, {65519, 0x7bff}, {65520, 0x7c00},
               {INFINITY, 0x7c00}, {-INFINITY, 0xfc00}, {1 + 0x1p-11f, 0x3c00}, {1 + 3 * 0x1p-11f, 0x3c02},
               {0x1p-24f, 1}, {0x1p-25f, 0}, {3 * 0x1p-25f, 2}, {0x1p-14f, 0x0400},
               {0x1.ffcp-15f, 0x0400}, {0x1.ff8p-15f, 0x03ff}, {-0x1p-24f, 0x8001}};
  enum { N = sizeof cases / sizeof *cases };
  halo_tensor *t = NULL;
  const int64_t shape[1] = {N};
  float from[N];
  uint16_t got[N];
  for (int i = 0; i < N; i++) from[i] = cases[i].from;
  CHECK_OK(halo_tensor_from(&t, HALO_F32, HALO_CPU, 1, shape, from));
  halo_safetensors_writer *w = NULL;
  halo_safetensors *s = NULL;
  CHECK_OK(halo_safetensors_writer_new(&w));
  CHECK_OK(halo_safetensors_writer_add(w, "h", t, "F16"));
  CHECK_OK(halo_safetensors_writer_save(w, at("half.safetensors"), 0));
  CHECK_OK(halo_safetensors_open(&s, at("half.safetensors"), 0));
  CHECK_OK(halo_safetensors_read_raw(s, 0, 0, sizeof got, got));
  for (int i = 0; i < N; i++) {
    CHECK(got[i] == cases[i].to);
    if (got[i] != cases[i].to) fprintf(stderr, "  %a gave %04x\n", (double)cases[i].from, got[i]);
  }
  halo_safetensors_free(s);
  halo_safetensors_writer_free(w);
  halo_tensor_free(t);
}

static void models_are_sharded(void) {
  halo_safetensors_writer *w = NULL;
  halo_safetensors *s = NULL;
  halo_tensor *t[7];
  CHECK_OK(halo_safetensors_writer_new(&w));
  for (int i = 0; i < 7; i++) {
    char name[32];
    snprintf(name, sizeof name, "layer.%d", i);
    t[i] = numbers(HALO_F32, 10, 10, 100.0 * i);
    CHECK_OK(halo_safetensors_writer_add(w, name, t[i], NULL));
  }
  const char *model = at("model");
  CHECK_OK(halo_safetensors_writer_save(w, model, 1000)); // two tensors of 400 bytes a shard
  CHECK(access(at("model/model-00004-of-00004.safetensors"), F_OK) == 0);
  CHECK_OK(halo_safetensors_open(&s, model, 0));
  CHECK(halo_safetensors_count(s) == 7);
  float f[100];
  CHECK_OK(halo_safetensors_read(s, halo_safetensors_find(s, "layer.5"), 0, 100, f, HALO_F32));
  CHECK(f[99] == 599);
  halo_safetensors_free(s);
  CHECK_OK(halo_safetensors_writer_save(w, model, 100)); // smaller than a tensor: one each
  CHECK(access(at("model/model-00007-of-00007.safetensors"), F_OK) == 0);
  CHECK(access(at("model/model-00004-of-00004.safetensors"), F_OK) != 0); // no shards of two saves
  CHECK_OK(halo_safetensors_open(&s, model, 0));
  halo_safetensors_free(s);
  CHECK_OK(halo_safetensors_writer_save(w, model, 0));
  CHECK(access(at("model/model.safetensors.index.json"), F_OK) != 0);
  CHECK(access(at("model/.halo-save"), F_OK) != 0);
  CHECK_OK(halo_safetensors_open(&s, model, 0));
  CHECK(halo_safetensors_count(s) == 7);
  halo_safetensors_free(s);
  halo_safetensors_writer_free(w);
  for (int i = 0; i < 7; i++) halo_tensor_free(t[i]);
}

static int fail_at, calls, fail_with;
static int fail_nth(halo__file_call call, const char *path, const char *to) {
  (void)call;
  (void)path;
  (void)to;
  return ++calls == fail_at ? fail_with : 0;
}

static int disturb(halo__file_call call, const char *path, const char *to) {
  (void)path;
  (void)to;
  calls++;
  if (call != HALO__FILE_WRITE) return 0;
  return calls % 3 == 0 ? EINTR : -(calls % 7 + 1); // interrupted, or cut after some bytes
}

static void failing_calls_leave_the_old_file(void) {
  halo_safetensors_writer *w = NULL;
  halo_safetensors *s = NULL;
  halo_tensor *a = numbers(HALO_F32, 2, 2, 1), *b = numbers(HALO_F32, 2, 2, 50);
  float f[4];
  int64_t live = 0;
  for (int pass = 0; pass < 2; pass++) {
    const char *path = pass == 0 ? at("fail.safetensors") : at("fail");
    CHECK_OK(halo_safetensors_writer_new(&w));
    CHECK_OK(halo_safetensors_writer_add(w, "x", a, NULL));
    CHECK_OK(halo_safetensors_writer_save(w, path, 0));
    halo_safetensors_writer_free(w);
    CHECK_OK(halo_safetensors_writer_new(&w));
    CHECK_OK(halo_safetensors_writer_add(w, "x", b, NULL));
    halo__file_hook = fail_nth;
    live = halo_memory_live_bytes(HALO_CPU, -1);
    halo_status status = HALO_EIO;
    for (fail_at = 1; status != HALO_OK; fail_at++) {
      calls = 0;
      fail_with = fail_at % 2 == 0 ? EIO : ENOSPC;
      status = halo_safetensors_writer_save(w, path, 0);
      CHECK(halo_memory_live_bytes(HALO_CPU, -1) == live);
      CHECK_OK(halo_safetensors_open(&s, path, 0)); // old or new, always whole
      CHECK_OK(halo_safetensors_read(s, 0, 0, 4, f, HALO_F32));
      CHECK((f[0] == 1 && f[3] == 4) || (f[0] == 50 && f[3] == 53));
      halo_safetensors_free(s);
      if (status != HALO_OK) CHECK(status == HALO_EIO && calls >= fail_at);
    }
    CHECK(fail_at > 5 && f[0] == 50);
    halo__file_hook = NULL;
    halo_safetensors_writer_free(w);
  }
  // Short and interrupted writes are not failures.
  CHECK_OK(halo_safetensors_writer_new(&w));
  CHECK_OK(halo_safetensors_writer_add(w, "x", a, NULL));
  halo__file_hook = disturb;
  CHECK_OK(halo_safetensors_writer_save(w, at("fail.safetensors"), 0));
  halo__file_hook = NULL;
  CHECK_OK(halo_safetensors_open(&s, at("fail.safetensors"), 0));
  CHECK_OK(halo_safetensors_read(s, 0, 0, 4, f, HALO_F32));
  CHECK(f[0] == 1 && f[3] == 4);
  halo_safetensors_free(s);
  halo_safetensors_writer_free(w);
  halo_tensor_free(a);
  halo_tensor_free(b);
}

static void failing_allocations_leak_nothing(void) {
  halo_tensor *a = numbers(HALO_F32, 40, 40, 1);
  const int64_t live = halo_memory_live_bytes(HALO_CPU, -1);
  halo_status status = HALO_ENOMEM;
  int64_t n = 0;
  for (; status != HALO_OK && n < 1000; n++) {
    halo_safetensors_writer *w = NULL;
    halo_safetensors *s = NULL;
    halo_tensor *to = NULL;
    halo_memory_fail_after(n);
    status = halo_safetensors_writer_new(&w);
    if (status == HALO_OK) status = halo_safetensors_writer_add(w, "x", a, "F16");
    if (status == HALO_OK) status = halo_safetensors_writer_add(w, "y", a, NULL);
    if (status == HALO_OK) status = halo_safetensors_writer_save(w, at("memory"), 1000);
    if (status == HALO_OK) status = halo_safetensors_open(&s, at("memory"), 0);
    if (status == HALO_OK) status = halo_tensor_new(&to, HALO_F64, HALO_CPU, 2, (int64_t[]){40, 40});
    if (status == HALO_OK) status = halo_safetensors_load(to, s, 0);
    halo_memory_fail_after(-1);
    CHECK(status == HALO_OK || status == HALO_ENOMEM);
    halo_safetensors_writer_free(w);
    halo_safetensors_free(s);
    halo_tensor_free(to);
    CHECK(halo_memory_live_bytes(HALO_CPU, -1) == live);
  }
  CHECK(status == HALO_OK && n > 20);
  halo_tensor_free(a);
}

int main(void) {
  if (mkdtemp(folder) == NULL) {
    snprintf(folder, sizeof folder, "/tmp/halo-safetensors-XXXXXX");
    if (mkdtemp(folder) == NULL) return 1;
  }
  RUN(headers_are_judged_rightly);
  RUN(length_words_are_bounded);
  RUN(depth_needs_no_stack);
  RUN(many_tensors);
  RUN(long_names);
  RUN(odd_files);
  RUN(pickles_are_refused);
  RUN(indexes_are_judged_rightly);
  RUN(values_convert);
  RUN(a_changed_file_is_noticed);
  RUN(what_is_written_is_read);
  RUN(halves_round_to_even);
  RUN(models_are_sharded);
  RUN(failing_calls_leave_the_old_file);
  RUN(failing_allocations_leak_nothing);
  CHECK_OK(halo__file_remove_tree("test", folder, 4));
  return check_report();
}
