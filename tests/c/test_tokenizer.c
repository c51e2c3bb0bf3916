/* Builder, merging, splitting and normalisation of core/tokenizer.c and its parts. */
#include "check.h"

#include <pthread.h>

static halo_tokenizer *builder(int64_t n_tokens, int32_t split, int32_t flags) {
  halo_tokenizer *t = NULL;
  CHECK_OK(halo_tokenizer_new(&t, n_tokens, split, flags));
  for (int b = 0; b < 256 && b < n_tokens; b++) {
    const char byte = (char)b;
    CHECK_OK(halo_tokenizer_add(t, b, &byte, 1, 0));
  }
  return t;
}

static void add(halo_tokenizer *t, int32_t id, const char *text, int32_t flags) {
  CHECK_OK(halo_tokenizer_add(t, id, text, strlen(text), flags));
}

static void merge(halo_tokenizer *t, const char *left, const char *right) {
  CHECK_OK(halo_tokenizer_add_merge(t, left, strlen(left), right, strlen(right), 0));
}

/* Whether text encodes to the n ids given. */
static int encodes(const halo_tokenizer *t, const char *text, size_t bytes, int32_t special,
                   const int32_t *want, int64_t n) {
  int32_t *ids = NULL;
  int64_t got = -1;
  if (halo_tokenizer_encode(&ids, &got, t, text, bytes, special) != HALO_OK) return 0;
  const int equal = got == n && (n == 0 || memcmp(ids, want, (size_t)n * 4) == 0);
  if (!equal) {
    fprintf(stderr, "got");
    for (int64_t i = 0; i < got; i++) fprintf(stderr, " %d", ids[i]);
    fprintf(stderr, "\n");
  }
  halo_buffer_free(ids);
  return equal;
}

#define ENCODES(t, text, special, ...)                                                             \
  CHECK(encodes(t, text, sizeof(text) - 1, special, (const int32_t[]){__VA_ARGS__},                \
                (int64_t)(sizeof((int32_t[]){__VA_ARGS__}) / 4)))

static int round_trips(const halo_tokenizer *t, const char *text, size_t bytes) {
  int32_t *ids = NULL;
  int64_t n;
  char *back = NULL;
  size_t n_back;
  int equal = 0;
  if (halo_tokenizer_encode(&ids, &n, t, text, bytes, 0) == HALO_OK &&
      halo_tokenizer_decode(&back, &n_back, t, ids, n) == HALO_OK)
    equal = n_back == bytes && (bytes == 0 || memcmp(back, text, bytes) == 0);
  halo_buffer_free(ids);
  halo_buffer_free(back);
  return equal;
}

static void lowest_rank_first(void) {
  halo_tokenizer *t = builder(260, HALO_SPLIT_NONE, 0);
  add(t, 256, "bc", 0);
  add(t, 257, "ab", 0);
  add(t, 258, "abc", 0);
  add(t, 259, "aa", 0);
  merge(t, "b", "c");
  merge(t, "a", "b");
  merge(t, "ab", "c");
  merge(t, "a", "a");
  CHECK_OK(halo_tokenizer_finish(t));
  ENCODES(t, "abc", 0, 'a', 256);       // b c merges before a b does
  ENCODES(t, "abab", 0, 257, 257);
  ENCODES(t, "aaa", 0, 259, 'a');       // the leftmost of equals
  ENCODES(t, "aaab", 0, 259, 257);      // a b outranks a a
  CHECK(encodes(t, "", 0, 0, NULL, 0));
  halo_tokenizer_free(t);
}

/* The definition, quadratic, for comparison: merges[i] joins ids a, b into 256 + i. */
static int64_t slow_bpe(const int32_t (*merges)[2], int32_t n_merges, int32_t *ids, int64_t n) {
  for (;;) {
    int64_t best = -1;
    int32_t best_rank = n_merges;
    for (int64_t i = 0; i + 1 < n; i++) {
      for (int32_t r = 0; r < best_rank; r++) {
        if (merges[r][0] == ids[i] && merges[r][1] == ids[i + 1]) best_rank = r, best = i;
      }
    }
    if (best < 0) return n;
    ids[best] = 256 + best_rank;
    for (int64_t i = best + 1; i + 1 < n; i++) ids[i] = ids[i + 1];
    n--;
  }
}

static void random_merges_match_the_definition(void) {
  enum { MERGES = 60, MOST = 400 };
  int equal = 0, runs = 0;
  for (uint64_t trial = 0; trial < 40; trial++) {
    char texts[256 + MERGES][260];
    int32_t pairs[MERGES][2];
    halo_tokenizer *t = builder(256 + MERGES, HALO_SPLIT_NONE, 0);
    for (int b = 0; b < 256; b++) texts[b][0] = (char)b, texts[b][1] = 0;
    uint64_t draw = 0;
    for (int32_t m = 0; m < MERGES;) {
      // parts: letters a to d, or earlier merges; the joint text must be new
      const int32_t k = (int32_t)(halo_random_u64(trial, 1, draw++) % (uint64_t)(4 + m));
      const int32_t l = (int32_t)(halo_random_u64(trial, 1, draw++) % (uint64_t)(4 + m));
      const int32_t left = k < 4 ? 'a' + k : 256 + k - 4;
      const int32_t right = l < 4 ? 'a' + l : 256 + l - 4;
      char joint[520];
      snprintf(joint, sizeof joint, "%s%s", texts[left], texts[right]);
      if (strlen(joint) > 200 || halo_tokenizer_find(t, joint, strlen(joint)) >= 0) continue;
      memcpy(texts[256 + m], joint, strlen(joint) + 1);
      pairs[m][0] = left, pairs[m][1] = right;
      add(t, 256 + m, joint, 0);
      merge(t, texts[left], texts[right]);
      m++;
    }
    CHECK_OK(halo_tokenizer_finish(t));
    for (int64_t n = 1; n < MOST; n += 1 + n / 3) { // across the border between the two ways
      char text[MOST];
      int32_t want[MOST];
      for (int64_t i = 0; i < n; i++) {
        text[i] = (char)('a' + halo_random_u64(trial, 2, draw++) % 4);
        want[i] = text[i];
      }
      const int64_t kept = slow_bpe(pairs, MERGES, want, n);
      equal += encodes(t, text, (size_t)n, 0, want, kept);
      runs++;
    }
    halo_tokenizer_free(t);
  }
  CHECK(runs > 400 && equal == runs);
}

static void ranks_merge_what_is_a_token(void) {
  halo_tokenizer *t = builder(260, HALO_SPLIT_NONE, HALO_TOKENIZER_RANKS);
  add(t, 256, "bc", 0);
  add(t, 257, "ab", 0);
  add(t, 258, "abc", 0);
  add(t, 259, "<x>", HALO_TOKEN_SPECIAL);
  CHECK_STATUS(halo_tokenizer_add_merge(t, "a", 1, "b", 1, 0), HALO_ESTATE);
  CHECK_OK(halo_tokenizer_finish(t));
  ENCODES(t, "abc", 0, 258); // a + bc is a token, though no list says so
  ENCODES(t, "ab<x>", 1, 257, 259);
  ENCODES(t, "ab<x>", 0, 257, '<', 'x', '>');
  halo_tokenizer_free(t);
}

static void whole_pieces_pass_by_the_merges(void) {
  for (int whole = 0; whole < 2; whole++) {
    halo_tokenizer *t = builder(257, HALO_SPLIT_GPT2, whole ? HALO_TOKENIZER_WHOLE_PIECES : 0);
    add(t, 256, "word", 0); // no merge leads to it
    CHECK_OK(halo_tokenizer_finish(t));
    if (whole) {
      ENCODES(t, "word", 0, 256);
      ENCODES(t, "words", 0, 'w', 'o', 'r', 'd', 's');
    } else {
      ENCODES(t, "word", 0, 'w', 'o', 'r', 'd');
    }
    halo_tokenizer_free(t);
  }
}

static void special_tokens_are_found_longest_first(void) {
  halo_tokenizer *t = builder(259, HALO_SPLIT_GPT2, 0);
  add(t, 256, "<|a", HALO_TOKEN_SPECIAL);
  add(t, 257, "<|a|>", HALO_TOKEN_SPECIAL);
  add(t, 258, "!!", 0);
  CHECK_OK(halo_tokenizer_finish(t));
  ENCODES(t, "<|a|><|a<", 1, 257, 256, '<');
  ENCODES(t, "x<|a|>", 1, 'x', 257);
  ENCODES(t, "<|a", 0, '<', '|', 'a');
  halo_tokenizer_free(t);
}

/* Pieces show where merges cannot reach across: with every pair of ASCII letters, spaces and digits
 * of the text mergeable, the ids are the pieces. Here: how many ids each pattern makes of a text. */
static int64_t pieces(int32_t split, const char *text) {
  halo_tokenizer *t = NULL;
  const size_t n = strlen(text);
  int64_t n_tokens = 256;
  // tokens: all substrings of the text, so that rank merging joins each piece into one token
  char seen[600][40];
  for (size_t length = 2; length <= n; length++) {
    for (size_t at = 0; at + length <= n; at++) {
      snprintf(seen[n_tokens - 256], 40, "%.*s", (int)length, text + at);
      int is_new = 1;
      for (int64_t k = 256; k < n_tokens; k++) is_new &= strcmp(seen[k - 256], seen[n_tokens - 256]) != 0;
      n_tokens += is_new;
    }
  }
  t = builder(n_tokens, split, HALO_TOKENIZER_RANKS);
  for (int64_t k = 256; k < n_tokens; k++) add(t, (int32_t)k, seen[k - 256], 0);
  CHECK_OK(halo_tokenizer_finish(t));
  int32_t *ids = NULL;
  int64_t count = -1;
  CHECK_OK(halo_tokenizer_encode(&ids, &count, t, text, n, 0));
  halo_buffer_free(ids);
  halo_tokenizer_free(t);
  return count;
}

static void patterns_cut_where_the_models_do(void) {
  CHECK(pieces(HALO_SPLIT_NONE, "we'll go  12345 !!\n\n x") == 1);
  CHECK(pieces(HALO_SPLIT_GPT2, "we'll go") == 3);   // we 'll _go
  CHECK(pieces(HALO_SPLIT_GPT2, "WE'LL") == 3);      // contractions in lower case only: WE ' LL
  CHECK(pieces(HALO_SPLIT_QWEN2, "WE'LL") == 2);
  CHECK(pieces(HALO_SPLIT_GPT2, " 12345") == 1);
  CHECK(pieces(HALO_SPLIT_QWEN2, " 12345") == 6);    // the space, five digits
  CHECK(pieces(HALO_SPLIT_LLAMA3, " 12345") == 3);   // the space, 123, 45
  CHECK(pieces(HALO_SPLIT_GPT2, "a   b") == 3);      // a, two spaces, _b
  CHECK(pieces(HALO_SPLIT_QWEN2, "a!\n\nb") == 3);   // a, !\n\n, b
  CHECK(pieces(HALO_SPLIT_GPT2, "a!\n\nb") == 5);    // a, !, \n, \n, b
  CHECK(pieces(HALO_SPLIT_QWEN2, "(a)") == 2);       // (a, )
}

static void any_bytes_come_back(void) {
  for (int32_t split = HALO_SPLIT_NONE; split <= HALO_SPLIT_LLAMA3; split++) {
    halo_tokenizer *t = builder(258, split, HALO_TOKENIZER_NFC);
    add(t, 256, "\xff\xfe", 0);
    add(t, 257, "ab", 0);
    merge(t, "\xff", "\xfe");
    merge(t, "a", "b");
    CHECK_OK(halo_tokenizer_finish(t));
    int good = 0;
    for (uint64_t trial = 0; trial < 2000; trial++) {
      char text[80];
      const size_t n = halo_random_u64(trial, 0, 0) % sizeof text;
      for (size_t i = 0; i < n; i++) {
        const uint64_t r = halo_random_u64(trial, 1, i);
        text[i] = r & 256 ? (char)r : "ab \xe4\xb8\xad\xcc"[(r >> 16) % 7];
      }
      // invalid at the end, so that nothing is normalised
      if (n > 0) text[n - 1] = (char)0xff;
      good += round_trips(t, text, n);
    }
    CHECK(good == 2000);
    halo_tokenizer_free(t);
  }
}

static void nfc_is_what_unicode_says(void) {
  // source, its NFC (UAX 15: composition, reordering of marks, Hangul, singletons, exclusions)
  static const char *const cases[][2] = {
      {"e\xcc\x81", "\xc3\xa9"},
      {"xe\xcc\x81y", "x\xc3\xa9y"},
      {"a\xcc\x87\xcc\xa3", "\xe1\xba\xa1\xcc\x87"},   // a, dot above, dot below
      {"\xe1\x84\x80\xe1\x85\xa1\xe1\x86\xa8", "\xea\xb0\x81"},
      {"\xe2\x84\xab", "\xc3\x85"},                     // ANGSTROM SIGN
      {"\xe0\xa5\x98", "\xe0\xa4\x95\xe0\xa4\xbc"},     // DEVANAGARI QA stays apart
      {"\xe1\xbd\xb3", "\xce\xad"},                     // oxia to tonos
      {"plain \xc3\xa9", "plain \xc3\xa9"},
      {"\xcc\x81", "\xcc\x81"},
      {"\xe4\xb8\xad\xcc\x81z", "\xe4\xb8\xad\xcc\x81z"},
  };
  halo_tokenizer *t = builder(257, HALO_SPLIT_QWEN2, HALO_TOKENIZER_NFC);
  add(t, 256, "<|e\xcc\x81|>", HALO_TOKEN_SPECIAL);
  CHECK_OK(halo_tokenizer_finish(t));
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    const char *want = cases[i][1];
    int32_t ids[64];
    for (size_t k = 0; k < strlen(want); k++) ids[k] = (uint8_t)want[k];
    CHECK(encodes(t, cases[i][0], strlen(cases[i][0]), 0, ids, (int64_t)strlen(want)));
  }
  ENCODES(t, "e\xcc\x81\xff", 0, 'e', 0xcc, 0x81, 0xff); // not text: left alone
  ENCODES(t, "<|e\xcc\x81|>", 1, 256);                   // special tokens are cut out first
  // a run of marks longer than the insertion sort takes: sorted by class, order kept within one
  char marks[1 + 2 * 80 + 1] = "q";
  int32_t want[1 + 2 * 80];
  want[0] = 'q';
  for (int i = 0; i < 80; i++) {
    memcpy(marks + 1 + 2 * i, i % 2 ? "\xcc\xa3" : "\xcc\x8d", 2); // classes 220 and 230
    want[1 + 2 * i] = 0xcc;
    want[2 + 2 * i] = i < 40 ? 0xa3 : 0x8d;
  }
  CHECK(encodes(t, marks, 161, 0, want, 161));
  halo_tokenizer_free(t);
}

static void printable_alphabet_is_gpt2s(void) {
  char *text = NULL, *back = NULL;
  size_t n, n_back;
  char all[256];
  for (int b = 0; b < 256; b++) all[b] = (char)b;
  CHECK_OK(halo_tokenizer_printable(&text, &n, all, 256, 0));
  CHECK(n == 94 + 2 * 162); // 94 ASCII characters, the rest take two bytes
  CHECK_OK(halo_tokenizer_printable(&back, &n_back, text, n, 1));
  CHECK(n_back == 256 && memcmp(back, all, 256) == 0);
  halo_buffer_free(text);
  halo_buffer_free(back);
  CHECK_OK(halo_tokenizer_printable(&text, &n, " \n", 2, 0));
  CHECK(n == 4 && memcmp(text, "\xc4\xa0\xc4\x8a", 4) == 0); // G with dot, C with dot
  halo_buffer_free(text);
  CHECK_STATUS(halo_tokenizer_printable(&text, &n, "a b", 3, 1), HALO_EARG);
}

static void malformed_vocabularies_are_refused(void) {
  halo_tokenizer *t = NULL;
  CHECK_STATUS(halo_tokenizer_new(&t, 0, HALO_SPLIT_GPT2, 0), HALO_EARG);
  CHECK_STATUS(halo_tokenizer_new(&t, INT64_MAX, HALO_SPLIT_GPT2, 0), HALO_EARG);
  CHECK_STATUS(halo_tokenizer_new(&t, 300, 4, 0), HALO_EARG);
  CHECK_STATUS(halo_tokenizer_new(&t, 300, HALO_SPLIT_GPT2, 8), HALO_EARG);
  CHECK(t == NULL);

  t = builder(258, HALO_SPLIT_GPT2, 0);
  CHECK_STATUS(halo_tokenizer_add(t, 258, "xy", 2, 0), HALO_ECORRUPT);
  CHECK_STATUS(halo_tokenizer_add(t, -1, "xy", 2, 0), HALO_ECORRUPT);
  CHECK_STATUS(halo_tokenizer_add(t, 256, "", 0, 0), HALO_ECORRUPT);
  CHECK_STATUS(halo_tokenizer_add(t, 256, "a", 1, 0), HALO_ECORRUPT);          // text twice
  CHECK_STATUS(halo_tokenizer_add(t, 'a', "xy", 2, 0), HALO_ECORRUPT);         // id twice
  CHECK_STATUS(halo_tokenizer_add(t, 256, "a b", 3, HALO_TOKEN_PRINTABLE), HALO_ECORRUPT);
  CHECK_STATUS(halo_tokenizer_add(t, 256, "\xc4", 1, HALO_TOKEN_PRINTABLE), HALO_ECORRUPT);
  char huge[3000];
  memset(huge, 'x', sizeof huge);
  CHECK_STATUS(halo_tokenizer_add(t, 256, huge, sizeof huge, 0), HALO_EUNSUPPORTED);
  CHECK_STATUS(halo_tokenizer_add(t, 256, huge, sizeof huge, HALO_TOKEN_PRINTABLE), HALO_EUNSUPPORTED);
  CHECK_STATUS(halo_tokenizer_add(t, 256, huge, 256, HALO_TOKEN_SPECIAL), HALO_EUNSUPPORTED);
  // half a character would cut valid text into invalid halves (found by fuzz_tokenizer)
  CHECK_STATUS(halo_tokenizer_add(t, 256, "\x81l", 2, HALO_TOKEN_SPECIAL), HALO_ECORRUPT);
  CHECK_STATUS(halo_tokenizer_add(t, 256, "l\xcc", 2, HALO_TOKEN_SPECIAL), HALO_ECORRUPT);
  CHECK_STATUS(halo_tokenizer_finish(t), HALO_ECORRUPT); // 256 and 257 are missing
  CHECK(strstr(halo_error_message(), "id 256") != NULL);
  add(t, 256, "ab", 0);
  add(t, 257, "<s>", HALO_TOKEN_SPECIAL);
  CHECK_STATUS(halo_tokenizer_add_merge(t, "x", 1, "y", 1, 0), HALO_ECORRUPT);   // no such result
  CHECK_STATUS(halo_tokenizer_add_merge(t, "ab", 2, "<s>", 3, 0), HALO_ECORRUPT); // special part
  CHECK_STATUS(halo_tokenizer_add_merge(t, "", 0, "ab", 2, 0), HALO_ECORRUPT);
  int32_t *ids;
  int64_t n;
  CHECK_STATUS(halo_tokenizer_encode(&ids, &n, t, "a", 1, 0), HALO_ESTATE);
  merge(t, "a", "b");
  merge(t, "a", "b");
  CHECK_STATUS(halo_tokenizer_finish(t), HALO_ECORRUPT); // a merge twice
  halo_tokenizer_free(t);

  t = NULL;
  CHECK_OK(halo_tokenizer_new(&t, 1, HALO_SPLIT_GPT2, 0));
  add(t, 0, "a", 0);
  CHECK_STATUS(halo_tokenizer_finish(t), HALO_ECORRUPT); // bytes without a token
  CHECK(strstr(halo_error_message(), "byte 0x00") != NULL);
  halo_tokenizer_free(t);
  halo_tokenizer_free(NULL);
}

static void decode_names_the_bad_id(void) {
  halo_tokenizer *t = builder(256, HALO_SPLIT_NONE, 0);
  CHECK_OK(halo_tokenizer_finish(t));
  CHECK_STATUS(halo_tokenizer_add(t, 0, "x", 1, 0), HALO_ESTATE);
  char *text = NULL;
  size_t n;
  CHECK_STATUS(halo_tokenizer_decode(&text, &n, t, (const int32_t[]){97, 256}, 2), HALO_EARG);
  CHECK(strstr(halo_error_message(), "id 256 at index 1") != NULL);
  CHECK_STATUS(halo_tokenizer_decode(&text, &n, t, (const int32_t[]){-1}, 1), HALO_EARG);
  CHECK(text == NULL);
  CHECK_OK(halo_tokenizer_decode(&text, &n, t, NULL, 0));
  CHECK(n == 0);
  halo_buffer_free(text);
  int32_t special = 7;
  CHECK(*halo_tokenizer_token(t, 98, &n, &special) == 'b' && n == 1 && special == 0);
  CHECK(halo_tokenizer_token(t, 256, NULL, NULL) == NULL);
  CHECK(halo_tokenizer_find(t, "ab", 2) == -1);
  halo_tokenizer_free(t);
}

static uint64_t hash_of(int32_t split, int32_t flags, const char *token, int with_merge) {
  halo_tokenizer *t = builder(257, split, flags);
  add(t, 256, token, 0);
  if (with_merge) merge(t, "a", token + 1);
  CHECK_OK(halo_tokenizer_finish(t));
  const uint64_t h = halo_tokenizer_hash(t);
  halo_tokenizer_free(t);
  return h;
}

static void hash_sees_all_that_decides_ids(void) {
  const uint64_t h = hash_of(HALO_SPLIT_GPT2, 0, "ab", 1);
  CHECK(h == hash_of(HALO_SPLIT_GPT2, 0, "ab", 1));
  CHECK(h != hash_of(HALO_SPLIT_QWEN2, 0, "ab", 1));
  CHECK(h != hash_of(HALO_SPLIT_GPT2, HALO_TOKENIZER_NFC, "ab", 1));
  CHECK(h != hash_of(HALO_SPLIT_GPT2, 0, "ac", 1));
  CHECK(h != hash_of(HALO_SPLIT_GPT2, 0, "ab", 0));
}

typedef struct job {
  const halo_tokenizer *t;
  const char *text;
  size_t n;
  int good;
} job;

static void *encode_often(void *argument) {
  job *j = argument;
  for (int i = 0; i < 30; i++) {
    const size_t from = (size_t)i * 101 % j->n;
    j->good += round_trips(j->t, j->text + from, j->n - from);
  }
  return NULL;
}

static void threads_share_a_tokenizer(void) {
  enum { THREADS = 6, BYTES = 20000 };
  halo_tokenizer *t = builder(258, HALO_SPLIT_GPT2, 0);
  add(t, 256, "th", 0);
  add(t, 257, "the", 0);
  merge(t, "t", "h");
  merge(t, "th", "e");
  CHECK_OK(halo_tokenizer_finish(t));
  static char text[BYTES];
  for (int i = 0; i < BYTES; i++) text[i] = "the th, et "[halo_random_u64(3, 3, (uint64_t)i) % 11];
  pthread_t threads[THREADS];
  job jobs[THREADS];
  for (int i = 0; i < THREADS; i++) {
    jobs[i] = (job){t, text + i, BYTES - THREADS, 0};
    CHECK(pthread_create(&threads[i], NULL, encode_often, &jobs[i]) == 0);
  }
  for (int i = 0; i < THREADS; i++) {
    CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(jobs[i].good == 30);
  }
  halo_tokenizer_free(t);
}

/* Every allocation on the way fails once: a status each time, no leak, and the same result after. */
static void survives_failing_allocations(void) {
  const int64_t live = halo_memory_live_bytes(HALO_CPU, -1);
  char text[400] = "e\xcc\x81 ";
  memset(text + 4, 'a', sizeof text - 4);
  int64_t failures = 0;
  for (int done = 0; !done && failures < 200; failures++) {
    halo_tokenizer *t = NULL;
    int32_t *ids = NULL;
    int64_t n = 0;
    halo_memory_fail_after(failures);
    halo_status s = halo_tokenizer_new(&t, 257, HALO_SPLIT_QWEN2, HALO_TOKENIZER_NFC);
    for (int b = 0; b < 256 && s == HALO_OK; b++) s = halo_tokenizer_add(t, b, &(char){(char)b}, 1, 0);
    if (s == HALO_OK) s = halo_tokenizer_add(t, 256, "aa", 2, 0);
    if (s == HALO_OK) s = halo_tokenizer_add_merge(t, "a", 1, "a", 1, 0);
    if (s == HALO_OK) s = halo_tokenizer_finish(t);
    if (s == HALO_OK) s = halo_tokenizer_encode(&ids, &n, t, text, sizeof text, 0);
    halo_memory_fail_after(-1);
    CHECK(s == HALO_OK || s == HALO_ENOMEM);
    if (s == HALO_OK) {
      done = 1;
      CHECK(n == 2 + 1 + 198); // two bytes of e acute, the space, 396 letters in pairs
    }
    halo_buffer_free(ids);
    halo_tokenizer_free(t);
  }
  CHECK(failures > 10 && failures < 200);
  CHECK(halo_memory_live_bytes(HALO_CPU, -1) == live);
}

int main(void) {
  RUN(lowest_rank_first);
  RUN(random_merges_match_the_definition);
  RUN(ranks_merge_what_is_a_token);
  RUN(whole_pieces_pass_by_the_merges);
  RUN(special_tokens_are_found_longest_first);
  RUN(patterns_cut_where_the_models_do);
  RUN(any_bytes_come_back);
  RUN(nfc_is_what_unicode_says);
  RUN(printable_alphabet_is_gpt2s);
  RUN(malformed_vocabularies_are_refused);
  RUN(decode_names_the_bad_id);
  RUN(hash_sees_all_that_decides_ids);
  RUN(threads_share_a_tokenizer);
  RUN(survives_failing_allocations);
  return check_report();
}
