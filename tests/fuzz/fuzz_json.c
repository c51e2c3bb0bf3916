/* The JSON reader: ends on every input, stays inside it, and what it calls a string survives being
 * written and read again. */
#include "fuzz.h"

static void seeds(void) {
  static const char *const texts[] = {
      "{}", "[]", "[1,-2.5e+3,true,false,null,\"a\"]", "{\"a\":{\"b\":[[],{}]},\"c\":\"\\u00e9\\ud83d\\ude00\\n\"}",
      " [ 0 , -0 , 1E9 , \"\\\\ \\\" \\/ \\b\\f\\r\\t\" ] ", "\"\xc3\xa9\xf0\x9f\x98\x80\"", "12345678901234567890",
      "[[[[[[[[1]]]]]]]]", "{\"\":0,\"\\u0000\":1}"};
  for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) put_seed_text(8 << (i % 3), texts[i]);
  static const char dictionary[] = "\"true\"\n\"false\"\n\"null\"\n\"\\\\u00e9\"\n\"\\\\ud83d\\\\ude00\"\n\"\\\"\\\"\"\n";
  put_named("dictionary", dictionary, sizeof dictionary - 1);
}

static void write_and_read(const char *text, size_t n) {
  halo__text t = {0};
  halo__json j;
  MUST(halo__is_utf8(text, n));
  MUST(halo__text_quote(&t, text, n) == HALO_OK);
  char *kept = malloc(n + 1);
  memcpy(kept, text, n);
  halo__json_init(&j, t.text, t.n, 1);
  MUST(halo__json_next(&j) == HALO__JSON_STRING);
  MUST(j.length == n && memcmp(j.text, kept, n) == 0 && j.text[n] == 0);
  MUST(halo__json_next(&j) == HALO__JSON_END);
  free(kept);
  halo__text_free(&t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < 1) return 0;
  const size_t n = size - 1;
  char *text = malloc(n > 0 ? n : 1); // exactly as long as it is: one byte further is a report
  memcpy(text, data + 1, n);
  halo__json j;
  halo__json_init(&j, text, n, data[0] % 80);
  size_t tokens = 0;
  for (;;) {
    const halo__json_kind kind = halo__json_next(&j);
    MUST(j.at >= text && j.at <= text + n);
    if (kind == HALO__JSON_ERROR) {
      MUST(j.error != NULL && j.error_offset <= n && halo__json_next(&j) == HALO__JSON_ERROR);
      break;
    }
    if (kind == HALO__JSON_END) break;
    MUST(++tokens <= n && j.depth >= 0 && j.depth <= data[0] % 80);
    if (kind == HALO__JSON_STRING || kind == HALO__JSON_KEY) {
      MUST(j.text >= text && j.text + j.length < text + n);
      if (j.length < 64) write_and_read(j.text, j.length);
    }
    int64_t value;
    if (kind == HALO__JSON_NUMBER && halo__json_int(&j, &value)) {
      char again[32];
      const int digits = snprintf(again, sizeof again, "%lld", (long long)value);
      const bool is_minus_zero = j.length == 2 && memcmp(j.text, "-0", 2) == 0;
      MUST(is_minus_zero || ((size_t)digits == j.length && memcmp(again, j.text, j.length) == 0));
    }
  }
  // The same through skip: accepted and refused alike.
  memcpy(text, data + 1, n);
  const bool was_good = j.error == NULL;
  halo__json_init(&j, text, n, data[0] % 80);
  const bool is_good = halo__json_skip(&j, halo__json_next(&j)) && halo__json_next(&j) == HALO__JSON_END;
  MUST(is_good == was_good);
  free(text);
  return 0;
}
