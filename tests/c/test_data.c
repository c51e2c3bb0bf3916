/* Token files, choices of documents, sample order and assembly: core/data*.c, core/sample.c. */
#include "check.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[] = "/tmp/halo-test-data-XXXXXX";

static const char *in_folder(const char *name) {
  static char path[4][300];
  static int turn;
  char *p = path[turn++ % 4];
  snprintf(p, sizeof path[0], "%s/%s", folder, name);
  return p;
}

static int files_in_folder(void) {
  int n = 0;
  DIR *d = opendir(folder);
  for (struct dirent *e; (e = readdir(d)) != NULL;) n += e->d_name[0] != '.';
  closedir(d);
  return n;
}

static uint64_t draw_state;
static int64_t draw(int64_t below) {
  return (int64_t)(halo_random_u64(99, 7, draw_state++) % (uint64_t)below);
}

enum { DOCUMENTS = 40, MOST = 60 };

typedef struct corpus {
  int32_t ids[DOCUMENTS * MOST];
  int64_t start[DOCUMENTS + 1];
} corpus;

static void corpus_make(corpus *c, int32_t vocab) {
  c->start[0] = 0;
  for (int d = 0; d < DOCUMENTS; d++) {
    const int64_t n = 1 + draw(MOST - 1);
    for (int64_t i = 0; i < n; i++) c->ids[c->start[d] + i] = (int32_t)draw(vocab);
    c->start[d + 1] = c->start[d] + n;
  }
}

static void corpus_write(const corpus *c, const char *path, int64_t vocab) {
  halo_token_writer *w = NULL;
  CHECK_OK(halo_token_writer_new(&w, path, vocab, 0x1234));
  for (int d = 0; d < DOCUMENTS; d++) {
    CHECK_OK(halo_token_writer_add(w, c->ids + c->start[d], c->start[d + 1] - c->start[d]));
    if (d % 5 == 0) CHECK_OK(halo_token_writer_add(w, NULL, 0)); // leaves no trace
  }
  CHECK(halo_token_writer_count(w) == c->start[DOCUMENTS]);
  CHECK(halo_token_writer_documents(w) == DOCUMENTS);
  CHECK_OK(halo_token_writer_commit(w));
  CHECK_STATUS(halo_token_writer_commit(w), HALO_ESTATE);
  CHECK_STATUS(halo_token_writer_add(w, c->ids, 1), HALO_ESTATE);
  halo_token_writer_free(w);
}

/* Whether t is the concatenation of the given documents of c. */
static int is_concatenation(const halo_tokens *t, const corpus *c, const int64_t *documents, int64_t n) {
  int64_t total = 0;
  int equal = halo_tokens_documents(t) == n;
  for (int64_t i = 0; i < n && equal; i++) {
    const int64_t d = documents[i], length = c->start[d + 1] - c->start[d];
    int64_t first, got;
    int32_t ids[MOST];
    equal = halo_tokens_document(t, i, &first, &got) == HALO_OK && first == total && got == length &&
            halo_tokens_read(ids, NULL, t, first, length, -1) == HALO_OK &&
            memcmp(ids, c->ids + c->start[d], (size_t)length * 4) == 0 &&
            halo_tokens_find_document(t, first) == i &&
            halo_tokens_find_document(t, first + length - 1) == i;
    total += length;
  }
  return equal && halo_tokens_count(t) == total && halo_tokens_find_document(t, total) == -1;
}

static void what_is_written_is_read(void) {
  static const int64_t vocabs[] = {7, 65536, 65537, 151665};
  int64_t all[DOCUMENTS];
  for (int d = 0; d < DOCUMENTS; d++) all[d] = d;
  for (int v = 0; v < 4; v++) {
    static corpus c;
    corpus_make(&c, (int32_t)vocabs[v]);
    const char *path = in_folder("a.tokens");
    corpus_write(&c, path, vocabs[v]);
    CHECK(files_in_folder() == 1);
    for (int verify = 0; verify < 2; verify++) {
      halo_tokens *t = NULL;
      CHECK_OK(halo_tokens_open(&t, path, -1, verify));
      CHECK(halo_tokens_vocab(t) == vocabs[v] && halo_tokens_tokenizer_hash(t) == 0x1234);
      CHECK(is_concatenation(t, &c, all, DOCUMENTS));
      // any window, past the end too
      const int64_t total = c.start[DOCUMENTS];
      int good = 0;
      for (int trial = 0; trial < 300; trial++) {
        int32_t ids[200], documents[200];
        const int64_t first = draw(total + 20), n = draw(200);
        int same = halo_tokens_read(ids, documents, t, first, n, 5) == HALO_OK;
        for (int64_t i = 0; i < n; i++) {
          const int64_t at = first + i;
          const int64_t d = halo_tokens_find_document(t, at);
          same = same && ids[i] == (at < total ? c.ids[at] : 5) && documents[i] == d &&
                 (d < 0 || (c.start[d] <= at && at < c.start[d + 1]));
        }
        good += same;
      }
      CHECK(good == 300);
      halo_tokens_free(t);
    }
    struct stat info;
    CHECK(stat(path, &info) == 0);
    const int64_t width = vocabs[v] <= 65536 ? 2 : 4;
    CHECK(info.st_size == 128 + (c.start[DOCUMENTS] * width + 7) / 8 * 8 + 8 * (DOCUMENTS + 1));
  }
}

static void choices_share_the_file(void) {
  static corpus c;
  corpus_make(&c, 1000);
  corpus_write(&c, in_folder("a.tokens"), 1000);
  halo_tokens *t = NULL, *some = NULL, *part = NULL, *none = NULL;
  CHECK_OK(halo_tokens_open(&t, in_folder("a.tokens"), -1, 1));
  const int64_t chosen[] = {7, 3, 39, 3, 0};
  CHECK_OK(halo_tokens_select(&some, t, chosen, 5));
  CHECK(is_concatenation(some, &c, chosen, 5));
  const int64_t again[] = {2, 1};
  CHECK_OK(halo_tokens_select(&part, some, again, 2));
  CHECK(is_concatenation(part, &c, (const int64_t[]){39, 3}, 2));
  CHECK(halo_tokens_hash(some) != halo_tokens_hash(t) && halo_tokens_hash(part) != halo_tokens_hash(some));
  halo_tokens_free(part);
  CHECK_OK(halo_tokens_select(&none, t, NULL, 0));
  CHECK(halo_tokens_count(none) == 0 && halo_tokens_find_document(none, 0) == -1);
  halo_tokens_free(none);
  CHECK_STATUS(halo_tokens_select(&part, t, (const int64_t[]){40}, 1), HALO_EARG);

  // a range cuts the documents at its ends, of a choice as well
  const int64_t total = halo_tokens_count(some);
  int good = 0;
  for (int trial = 0; trial < 200; trial++) {
    const int64_t first = draw(total), n = 1 + draw(total - first);
    halo_tokens *range = NULL;
    int32_t want[5 * MOST], got[5 * MOST], whose[5 * MOST], mine[5 * MOST];
    int same = halo_tokens_slice(&range, some, first, n) == HALO_OK &&
               halo_tokens_count(range) == n &&
               halo_tokens_read(want, whose, some, first, n, -1) == HALO_OK &&
               halo_tokens_read(got, mine, range, 0, n, -1) == HALO_OK &&
               memcmp(want, got, (size_t)n * 4) == 0;
    for (int64_t i = 0; i < n; i++) same = same && mine[i] == whose[i] - whose[0];
    good += same;
    halo_tokens_free(range);
  }
  CHECK(good == 200);
  CHECK_STATUS(halo_tokens_slice(&part, some, 0, total + 1), HALO_EARG);
  CHECK_STATUS(halo_tokens_slice(&part, some, total, 1), HALO_EARG);
  CHECK_STATUS(halo_tokens_slice(&part, some, 0, 0), HALO_EARG);
  halo_tokens_free(t); // choices keep the file mapped
  CHECK(is_concatenation(some, &c, chosen, 5));
  halo_tokens_free(some);
}

static void parts_join(void) {
  static corpus a, b;
  corpus_make(&a, 1000);
  corpus_make(&b, 1000);
  corpus_write(&a, in_folder("a.tokens"), 1000);
  corpus_write(&b, in_folder("b.tokens"), 1000);
  corpus_write(&b, in_folder("c.tokens"), 999999); // another width, another vocabulary
  halo_tokens *ta = NULL, *tb = NULL, *tc = NULL, *some = NULL, *all = NULL, *range = NULL;
  CHECK_OK(halo_tokens_open(&ta, in_folder("a.tokens"), -1, 1));
  CHECK_OK(halo_tokens_open(&tb, in_folder("b.tokens"), -1, 1));
  CHECK_OK(halo_tokens_open(&tc, in_folder("c.tokens"), -1, 1));
  CHECK_OK(halo_tokens_select(&some, tb, (const int64_t[]){9, 2}, 2));
  halo_tokens *const parts[] = {ta, some, ta, tb};
  CHECK_OK(halo_tokens_join(&all, parts, 4));
  CHECK(halo_tokens_documents(all) == 3 * DOCUMENTS + 2);
  const int64_t count = halo_tokens_count(all), na = halo_tokens_count(ta), ns = halo_tokens_count(some);
  CHECK(count == 2 * na + ns + halo_tokens_count(tb));
  CHECK_OK(halo_tokens_slice(&range, all, 1, count - 1));
  CHECK(halo_tokens_hash(all) != halo_tokens_hash(range));
  int good = 0;
  for (int64_t i = 0; i < count; i++) {
    const halo_tokens *p = i < na ? ta : i < na + ns ? some : i < 2 * na + ns ? ta : tb;
    const int64_t at = i < na ? i : i < na + ns ? i - na : i < 2 * na + ns ? i - na - ns : i - 2 * na - ns;
    int32_t want, got, cut = -1;
    good += halo_tokens_read(&want, NULL, p, at, 1, -1) == HALO_OK &&
            halo_tokens_read(&got, NULL, all, i, 1, -1) == HALO_OK && want == got &&
            (i == 0 || (halo_tokens_read(&cut, NULL, range, i - 1, 1, -1) == HALO_OK && cut == got));
  }
  CHECK(good == count);
  halo_tokens *other = NULL;
  CHECK_OK(halo_tokens_join(&other, (halo_tokens *const[]){tb, ta}, 2));
  CHECK(halo_tokens_hash(other) != halo_tokens_hash(all));
  halo_tokens_free(other);
  other = NULL;
  CHECK_STATUS(halo_tokens_join(&other, (halo_tokens *const[]){tb, tc}, 2), HALO_EARG);
  CHECK_STATUS(halo_tokens_join(&other, parts, 0), HALO_EARG);
  halo_tokens_free(ta);
  halo_tokens_free(tb);
  halo_tokens_free(tc);
  halo_tokens_free(some);
  halo_tokens_free(range);
  int32_t id;
  CHECK_OK(halo_tokens_read(&id, NULL, all, count - 1, 1, -1)); // keeps all files
  halo_tokens_free(all);
}

static void split_keeps_equal_documents_together(void) {
  const char *path = in_folder("s.tokens");
  halo_token_writer *w = NULL;
  CHECK_OK(halo_token_writer_new(&w, path, 1000, 0));
  for (int32_t d = 0; d < 600; d++) { // 300 texts, each twice
    const int32_t ids[] = {d % 300, 1, 2, d % 300};
    CHECK_OK(halo_token_writer_add(w, ids, 4));
  }
  CHECK_OK(halo_token_writer_commit(w));
  halo_token_writer_free(w);
  halo_tokens *t = NULL, *train = NULL, *valid = NULL;
  CHECK_OK(halo_tokens_open(&t, path, -1, 1));
  CHECK_OK(halo_tokens_split(&train, &valid, t, 0.2, 1));
  CHECK(halo_tokens_count(train) + halo_tokens_count(valid) == halo_tokens_count(t));
  const int64_t held = halo_tokens_documents(valid);
  CHECK(held > 80 && held < 160 && held % 2 == 0); // 120 expected
  int side[300] = {0};
  for (int which = 0; which < 2; which++) {
    const halo_tokens *s = which ? valid : train;
    for (int64_t d = 0; d < halo_tokens_documents(s); d++) {
      int32_t id;
      CHECK_OK(halo_tokens_read(&id, NULL, s, 4 * d, 1, -1));
      side[id] |= 1 << which;
    }
  }
  int apart = 0;
  for (int i = 0; i < 300; i++) apart += side[i] == 1 || side[i] == 2;
  CHECK(apart == 300);
  halo_tokens *train2 = NULL, *valid2 = NULL;
  CHECK_OK(halo_tokens_split(&train2, &valid2, t, 0.2, 1));
  CHECK(halo_tokens_hash(valid2) == halo_tokens_hash(valid));
  halo_tokens_free(train2);
  halo_tokens_free(valid2);
  CHECK_OK(halo_tokens_split(&train2, &valid2, t, 0.2, 2));
  CHECK(halo_tokens_hash(valid2) != halo_tokens_hash(valid));
  halo_tokens_free(train2);
  halo_tokens_free(valid2);
  CHECK_STATUS(halo_tokens_split(&train2, &valid2, t, 1e-9, 2), HALO_EARG);
  CHECK_STATUS(halo_tokens_split(&train2, &valid2, t, 1, 2), HALO_EARG);
  uint64_t a, b;
  CHECK_OK(halo_tokens_document_hash(t, 5, &a));
  CHECK_OK(halo_tokens_document_hash(t, 305, &b));
  CHECK(a == b);
  CHECK_OK(halo_tokens_document_hash(t, 6, &b));
  CHECK(a != b);
  halo_tokens_free(train);
  halo_tokens_free(valid);
  halo_tokens_free(t);
}

static void put_file(const char *path, const void *bytes, size_t n) {
  unlink(path); // a file cut short and written again is synced by some file systems: slow
  FILE *f = fopen(path, "wb");
  CHECK(f != NULL && fwrite(bytes, 1, n, f) == n);
  fclose(f);
}

static size_t get_file(const char *path, uint8_t *bytes, size_t most) {
  FILE *f = fopen(path, "rb");
  const size_t n = fread(bytes, 1, most, f);
  fclose(f);
  return n;
}

static halo_status opens(const void *bytes, size_t n, int32_t separator) {
  const char *path = in_folder("m.tokens");
  put_file(path, bytes, n);
  halo_tokens *t = NULL;
  const halo_status s = halo_tokens_open(&t, path, separator, 1);
  CHECK((t != NULL) == (s == HALO_OK));
  halo_tokens_free(t);
  return s;
}

/* Give the header a checksum that fits, so that the check behind it is reached. */
static void seal(uint8_t *bytes) {
  const uint64_t h = halo_hash_bytes(bytes, 120, 0);
  memcpy(bytes + 120, &h, 8);
}

static void malformed_files_are_refused(void) {
  static corpus c;
  static uint8_t good[1 << 15], bad[1 << 15];
  corpus_make(&c, 500);
  corpus_write(&c, in_folder("g.tokens"), 500);
  const size_t n = get_file(in_folder("g.tokens"), good, sizeof good);
  CHECK(opens(good, n, -1) == HALO_OK);
  // every byte: each change is noticed
  int noticed = 0;
  for (size_t i = 0; i < n; i++) {
    memcpy(bad, good, n);
    bad[i] ^= (uint8_t)(1 << draw(8));
    const halo_status s = opens(bad, n, -1);
    const int is_gap = i >= 128 + 2 * (size_t)c.start[DOCUMENTS] && i < n - 8 * (DOCUMENTS + 1);
    noticed += s == HALO_ECORRUPT || s == HALO_EVERSION || is_gap;
  }
  CHECK(noticed == (int)n);
  // every length but the right one
  int refused = 0;
  for (size_t k = 0; k < n; k += 7) refused += opens(good, k, -1) == HALO_ECORRUPT;
  CHECK(refused == (int)((n + 6) / 7));
  memcpy(bad, good, n);
  bad[n] = 0;
  CHECK(opens(bad, n + 1, -1) == HALO_ECORRUPT);

  // fields with a checksum that fits
  static const struct {
    int offset, bytes;
    int64_t value;
    halo_status want;
  } cases[] = {
      {0, 1, 'h', HALO_ECORRUPT},          {8, 4, 2, HALO_EVERSION},
      {12, 4, 4, HALO_ECORRUPT},           {12, 4, 0, HALO_ECORRUPT},
      {16, 8, -1, HALO_ECORRUPT},          {16, 8, INT64_MAX, HALO_ECORRUPT},
      {16, 8, INT64_MAX / 2, HALO_ECORRUPT}, {16, 8, 0, HALO_ECORRUPT},
      {24, 8, -1, HALO_ECORRUPT},          {24, 8, INT64_MAX, HALO_ECORRUPT},
      {24, 8, DOCUMENTS + 1, HALO_ECORRUPT}, {24, 8, INT64_MAX / 8, HALO_ECORRUPT},
      {32, 8, 0, HALO_ECORRUPT},           {32, 8, -5, HALO_ECORRUPT},
      {32, 8, (int64_t)1 << 40, HALO_ECORRUPT}, {32, 8, 100, HALO_ECORRUPT}, // ids reach 499
      {32, 8, 70000, HALO_ECORRUPT},       {48, 8, 1, HALO_ECORRUPT},
      {56, 8, 1, HALO_ECORRUPT},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    memcpy(bad, good, n);
    memcpy(bad + cases[i].offset, &cases[i].value, (size_t)cases[i].bytes);
    seal(bad);
    const halo_status s = opens(bad, n, -1);
    if (s != cases[i].want) fprintf(stderr, "case %zu: %s\n", i, halo_status_name(s));
    CHECK(s == cases[i].want);
  }
  // a table of documents that lies, with checksums that fit
  for (int k = 0; k < 4; k++) {
    memcpy(bad, good, n);
    int64_t *start = (int64_t *)(bad + n - 8 * (DOCUMENTS + 1));
    if (k == 0) start[0] = 1;
    if (k == 1) start[3] = start[2];
    if (k == 2) start[3] = -1;
    if (k == 3) start[DOCUMENTS]++;
    const uint64_t h = halo_hash_bytes(start, 8 * (DOCUMENTS + 1), 0);
    memcpy(bad + 56, &h, 8);
    seal(bad);
    CHECK(opens(bad, n, -1) == HALO_ECORRUPT);
  }
  halo_tokens *t = NULL;
  CHECK_STATUS(halo_tokens_open(&t, in_folder("absent"), -1, 1), HALO_EIO);
  CHECK_STATUS(halo_tokens_open(&t, folder, -1, 1), HALO_EIO);
  CHECK_STATUS(halo_tokens_open(&t, "/dev/zero", -1, 1), HALO_EIO);
  // without verify a bad id is caught when it is read
  memcpy(bad, good, n);
  bad[128] = 0xff, bad[129] = 0xff;
  put_file(in_folder("m.tokens"), bad, n);
  CHECK_OK(halo_tokens_open(&t, in_folder("m.tokens"), -1, 0));
  int32_t ids[4];
  CHECK_STATUS(halo_tokens_read(ids, NULL, t, 0, 4, 0), HALO_ECORRUPT);
  CHECK_OK(halo_tokens_read(ids, NULL, t, 1, 3, 0));
  halo_tokens_free(t);
}

static void llmc_files_are_read(void) {
  static uint8_t file[1024 + 4 * 10];
  int32_t *header = (int32_t *)file;
  header[0] = 20240520, header[1] = 1, header[2] = 10;
  uint16_t *narrow = (uint16_t *)(file + 1024);
  static const int32_t ids[10] = {50256, 5, 6, 50256, 7, 50256, 50256, 8, 9, 65535};
  for (int i = 0; i < 10; i++) narrow[i] = (uint16_t)ids[i];
  put_file(in_folder("l.bin"), file, 1024 + 20);
  halo_tokens *t = NULL;
  int32_t got[12], documents[12];
  CHECK_OK(halo_tokens_open(&t, in_folder("l.bin"), 50256, 1));
  CHECK(halo_tokens_count(t) == 10 && halo_tokens_documents(t) == 4 && halo_tokens_vocab(t) == 0);
  CHECK_OK(halo_tokens_read(got, documents, t, 0, 12, 3));
  CHECK(memcmp(got, ids, sizeof ids) == 0 && got[10] == 3 && got[11] == 3);
  static const int32_t whose[12] = {0, 0, 0, 1, 1, 2, 3, 3, 3, 3, -1, -1};
  CHECK(memcmp(documents, whose, sizeof whose) == 0);
  const uint64_t with_separator = halo_tokens_hash(t);
  halo_tokens_free(t);
  CHECK_OK(halo_tokens_open(&t, in_folder("l.bin"), -1, 1));
  CHECK(halo_tokens_documents(t) == 1 && halo_tokens_hash(t) != with_separator);
  halo_tokens_free(t);
  CHECK(opens(file, 1024 + 19, -1) == HALO_ECORRUPT);
  CHECK(opens(file, 1024 + 22, -1) == HALO_ECORRUPT);
  CHECK(opens(file, 1000, -1) == HALO_ECORRUPT);
  header[2] = -1;
  CHECK(opens(file, 1024 + 20, -1) == HALO_ECORRUPT);
  header[1] = 2;
  CHECK(opens(file, 1024 + 20, -1) == HALO_EVERSION);
  header[0] = 20240801, header[1] = 7, header[2] = 10; // Llama 3: 32 bits
  memcpy(file + 1024, ids, sizeof ids);
  put_file(in_folder("l.bin"), file, 1024 + 40);
  CHECK_OK(halo_tokens_open(&t, in_folder("l.bin"), 50256, 1));
  CHECK_OK(halo_tokens_read(got, documents, t, 0, 12, 3));
  CHECK(memcmp(got, ids, sizeof ids) == 0 && memcmp(documents, whose, sizeof whose) == 0);
  halo_tokens_free(t);
}

static void writer_leaves_nothing_behind(void) {
  const int before = files_in_folder();
  halo_token_writer *w = NULL;
  CHECK_OK(halo_token_writer_new(&w, in_folder("w.tokens"), 100, 0));
  CHECK(files_in_folder() == before + 1);
  const int32_t ids[] = {1, 2, 100};
  CHECK_OK(halo_token_writer_add(w, ids, 2));
  CHECK_STATUS(halo_token_writer_add(w, ids, 3), HALO_EARG);
  CHECK(strstr(halo_error_message(), "id 100 at index 2") != NULL);
  CHECK(halo_token_writer_count(w) == 2); // refused as a whole
  halo_token_writer_free(w);
  CHECK(files_in_folder() == before);
  CHECK_STATUS(halo_token_writer_new(&w, in_folder("no/such/folder"), 100, 0), HALO_EIO);
  CHECK_STATUS(halo_token_writer_new(&w, in_folder("w.tokens"), 0, 0), HALO_EARG);
  halo_token_writer_free(NULL);
  halo_tokens_free(NULL);
  // an empty corpus is a file like any other
  CHECK_OK(halo_token_writer_new(&w, in_folder("w.tokens"), 100, 0));
  CHECK_OK(halo_token_writer_commit(w));
  halo_token_writer_free(w);
  halo_tokens *t = NULL;
  CHECK_OK(halo_tokens_open(&t, in_folder("w.tokens"), -1, 1));
  CHECK(halo_tokens_count(t) == 0 && halo_tokens_documents(t) == 0);
  halo_tokens_free(t);
}

static void text_goes_in_as_documents(void) {
  halo_tokenizer *k = NULL;
  CHECK_OK(halo_tokenizer_new(&k, 258, HALO_SPLIT_NONE, 0));
  for (int b = 0; b < 256; b++) CHECK_OK(halo_tokenizer_add(k, b, &(char){(char)b}, 1, 0));
  CHECK_OK(halo_tokenizer_add(k, 256, "<s>", 3, HALO_TOKEN_SPECIAL));
  CHECK_OK(halo_tokenizer_add(k, 257, "</s>", 4, HALO_TOKEN_SPECIAL));
  CHECK_OK(halo_tokenizer_finish(k));
  halo_token_writer *w = NULL;
  CHECK_OK(halo_token_writer_new(&w, in_folder("t.tokens"), 258, halo_tokenizer_hash(k)));
  CHECK_OK(halo_token_writer_add_text(w, k, "a<s>", 4, 256, 257)); // control text stays text
  CHECK_OK(halo_token_writer_add_text(w, k, "", 0, 256, 257));
  int32_t is_text = -1;
  put_file(in_folder("x.txt"), "bc", 2);
  CHECK_OK(halo_token_writer_add_file(w, k, in_folder("x.txt"), -1, 257, &is_text));
  CHECK(is_text == 1);
  put_file(in_folder("x.txt"), "b\0c", 3);
  CHECK_OK(halo_token_writer_add_file(w, k, in_folder("x.txt"), -1, 257, &is_text));
  CHECK(is_text == 0);
  put_file(in_folder("x.txt"), "", 0);
  CHECK_OK(halo_token_writer_add_file(w, k, in_folder("x.txt"), -1, 257, &is_text));
  CHECK_STATUS(halo_token_writer_add_file(w, k, in_folder("absent"), -1, 257, &is_text), HALO_EIO);
  CHECK_OK(halo_token_writer_commit(w));
  halo_token_writer_free(w);
  halo_tokens *t = NULL;
  CHECK_OK(halo_tokens_open(&t, in_folder("t.tokens"), -1, 1));
  int32_t ids[9];
  CHECK(halo_tokens_count(t) == 9 && halo_tokens_documents(t) == 2);
  CHECK_OK(halo_tokens_read(ids, NULL, t, 0, 9, -1));
  CHECK(memcmp(ids, (const int32_t[]){256, 'a', '<', 's', '>', 257, 'b', 'c', 257}, sizeof ids) == 0);
  halo_tokens_free(t);
  CHECK_OK(halo_token_writer_new(&w, in_folder("t.tokens"), 258, 1));
  CHECK_STATUS(halo_token_writer_add_text(w, k, "a", 1, -1, -1), HALO_EARG); // other tokenizer
  halo_token_writer_free(w);
  halo_tokenizer_free(k);
}

static void permutations_are_permutations(void) {
  int good = 0;
  for (int64_t n = 1; n <= 300; n++) {
    uint8_t seen[300] = {0};
    int64_t distinct = 0;
    for (int64_t i = 0; i < n; i++) {
      const int64_t p = halo_random_permute(n, 5, (uint64_t)n, i);
      if (p >= 0 && p < n && !seen[p]) seen[p] = 1, distinct++;
    }
    good += distinct == n;
  }
  CHECK(good == 300);
  CHECK(halo_random_permute(10, 1, 1, 10) == -1 && halo_random_permute(10, 1, 1, -1) == -1);
  CHECK(halo_random_permute(0, 1, 1, 0) == -1);
  int moved = 0, differs = 0;
  for (int64_t i = 0; i < 1000; i++) {
    moved += halo_random_permute(1000, 1, 0, i) != i;
    differs += halo_random_permute(1000, 1, 0, i) != halo_random_permute(1000, 2, 0, i);
  }
  CHECK(moved > 980 && differs > 980);
  // every value about equally often at a place: chi-square over 10 values, 9 degrees of freedom
  int count[10] = {0};
  for (uint64_t s = 0; s < 10000; s++) count[halo_random_permute(10, s, 3, 4)]++;
  double chi = 0;
  for (int k = 0; k < 10; k++) chi += (count[k] - 1000.0) * (count[k] - 1000.0) / 1000.0;
  CHECK(chi < 33.7); // exceeded by chance once in 10000; the draw is fixed
  const int64_t huge = INT64_MAX - 10;
  const int64_t p = halo_random_permute(huge, 1, 1, huge - 1);
  CHECK(p >= 0 && p < huge);
}

static void samples_are_shifted_and_cut(void) {
  const int32_t tokens[] = {10, 11, 12, 20, 21, 30, 0, 0, 0};
  const int32_t documents[] = {4, 4, 4, 5, 5, 9, -1, -1, -1};
  int32_t ids[8], labels[8], positions[8], segments[8];
  int64_t targets = -1;
#define SAME(got, ...) CHECK(memcmp(got, (const int32_t[]){__VA_ARGS__}, sizeof(int32_t[8])) == 0)
  CHECK_OK(halo_sample_finish(ids, labels, positions, segments, &targets, tokens, documents, NULL, 8,
                              HALO_SAMPLE_DOCUMENTS | HALO_SAMPLE_RESTART));
  SAME(ids, 10, 11, 12, 20, 21, 30, 0, 0);
  SAME(labels, 11, 12, -100, 21, -100, -100, -100, -100);
  SAME(positions, 0, 1, 2, 0, 1, 0, 0, 1);
  SAME(segments, 0, 0, 0, 1, 1, 2, 3, 3);
  CHECK(targets == 3);
  CHECK_OK(halo_sample_finish(ids, labels, positions, segments, &targets, tokens, documents, NULL, 8,
                              HALO_SAMPLE_DOCUMENTS));
  SAME(positions, 0, 1, 2, 3, 4, 5, 6, 7);
  SAME(segments, 0, 0, 0, 1, 1, 2, 3, 3);
  CHECK_OK(halo_sample_finish(ids, labels, positions, segments, &targets, tokens, documents, NULL, 8, 0));
  SAME(labels, 11, 12, 20, 21, 30, -100, -100, -100);
  SAME(segments, 0, 0, 0, 0, 0, 0, 0, 0);
  CHECK(targets == 5);
  const uint8_t loss[] = {1, 0, 1, 1, 1, 0, 1, 1, 1};
  CHECK_OK(halo_sample_finish(ids, labels, positions, segments, &targets, tokens, documents, loss, 8,
                              HALO_SAMPLE_DOCUMENTS));
  SAME(labels, -100, 12, -100, 21, -100, -100, -100, -100);
  CHECK(targets == 2);
  CHECK_STATUS(halo_sample_finish(ids, labels, positions, segments, &targets, tokens, documents, NULL,
                                  8, HALO_SAMPLE_RESTART),
               HALO_EARG);
  CHECK_STATUS(halo_sample_finish(ids, labels, positions, segments, &targets, tokens, documents, NULL,
                                  0, 0),
               HALO_EARG);
#undef SAME
}

static void rows_follow_the_layout(void) {
  const int32_t rows[] = {1, 2, 3, 4, 5, 6};
  const int64_t map[] = {2, 0, 3, 9};
  int32_t out[8];
  CHECK_OK(halo_rows_gather(out, rows, 2, 3, map, 4, -7));
  CHECK(memcmp(out, (const int32_t[]){3, 1, -7, -7, 6, 4, -7, -7}, sizeof out) == 0);
  CHECK_STATUS(halo_rows_gather(out, rows, 2, 3, (const int64_t[]){-1}, 1, 0), HALO_EARG);
}

static void hashes_agree(void) {
  put_file(in_folder("h"), "some bytes", 10);
  uint64_t h;
  CHECK_OK(halo_hash_file(in_folder("h"), &h));
  CHECK(h == halo_hash_bytes("some bytes", 10, 0) && h != halo_hash_bytes("some bytes", 10, 1));
  CHECK_STATUS(halo_hash_file(in_folder("absent"), &h), HALO_EIO);
}

static void survives_failing_allocations(void) {
  static corpus c;
  corpus_make(&c, 300);
  corpus_write(&c, in_folder("f.tokens"), 300);
  const int64_t live = halo_memory_live_bytes(HALO_CPU, -1);
  const int files = files_in_folder();
  int64_t failures = 0;
  for (int done = 0; !done && failures < 100; failures++) {
    halo_token_writer *w = NULL;
    halo_tokens *t = NULL, *train = NULL, *valid = NULL, *range = NULL, *all = NULL;
    halo_memory_fail_after(failures);
    halo_status s = halo_token_writer_new(&w, in_folder("f2.tokens"), 300, 0);
    if (s == HALO_OK) s = halo_token_writer_add(w, c.ids, 20);
    halo_token_writer_free(w);
    if (s == HALO_OK) s = halo_tokens_open(&t, in_folder("f.tokens"), -1, 1);
    if (s == HALO_OK) s = halo_tokens_split(&train, &valid, t, 0.3, 3);
    if (s == HALO_OK) s = halo_tokens_slice(&range, train, 3, 10);
    if (s == HALO_OK) s = halo_tokens_join(&all, (halo_tokens *const[]){train, range, valid}, 3);
    halo_memory_fail_after(-1);
    CHECK(s == HALO_OK || s == HALO_ENOMEM);
    done = s == HALO_OK;
    halo_tokens_free(all);
    halo_tokens_free(range);
    halo_tokens_free(train);
    halo_tokens_free(valid);
    halo_tokens_free(t);
  }
  CHECK(failures > 8 && failures < 100);
  CHECK(halo_memory_live_bytes(HALO_CPU, -1) == live && files_in_folder() == files);
}

int main(void) {
  if (mkdtemp(folder) == NULL) return 1;
  RUN(what_is_written_is_read);
  RUN(choices_share_the_file);
  RUN(parts_join);
  RUN(split_keeps_equal_documents_together);
  RUN(malformed_files_are_refused);
  RUN(llmc_files_are_read);
  RUN(writer_leaves_nothing_behind);
  RUN(text_goes_in_as_documents);
  RUN(permutations_are_permutations);
  RUN(samples_are_shifted_and_cut);
  RUN(rows_follow_the_layout);
  RUN(hashes_agree);
  RUN(survives_failing_allocations);
  DIR *d = opendir(folder);
  for (struct dirent *e; (e = readdir(d)) != NULL;) {
    if (e->d_name[0] != '.') unlink(in_folder(e->d_name));
  }
  closedir(d);
  rmdir(folder);
  return check_report();
}
