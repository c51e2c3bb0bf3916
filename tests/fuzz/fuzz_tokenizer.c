/* Build a tokenizer from hostile tokens and merges, then encode hostile text with it.
 *
 * The input is a script: split, flags and vocabulary size; then tokens and merges, each with a length
 * byte; then, behind a marker, the text. What the builder accepts must encode any text, decode it back
 * byte for byte (unless it normalises), and give the same ids again, also from the cache.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "halo.h"

typedef struct script {
  const uint8_t *at, *end;
} script;

static uint8_t take(script *s) { return s->at < s->end ? *s->at++ : 0; }

static const char *take_text(script *s, size_t *n) {
  *n = take(s) & 31;
  if (*n > (size_t)(s->end - s->at)) *n = (size_t)(s->end - s->at);
  const char *text = (const char *)s->at;
  s->at += *n;
  return text;
}

static void check_round_trip(const halo_tokenizer *t, const char *text, size_t n, int special,
                             int normalises, int with_cache) {
  int32_t *ids = NULL, *again = NULL;
  int64_t count = 0, count_again = 0;
  char *back = NULL;
  size_t n_back = 0;
  if (halo_tokenizer_encode(&ids, &count, t, text, n, special) != HALO_OK) abort();
  for (int i = 0; with_cache && i < 2; i++) { // enough text for the cache to be made, then into it
    static const char zeros[8192];
    if (halo_tokenizer_encode(&again, &count_again, t, i ? text : zeros, i ? n : sizeof zeros, special) !=
        HALO_OK)
      abort();
    halo_buffer_free(again);
  }
  if (halo_tokenizer_encode(&again, &count_again, t, text, n, special) != HALO_OK) abort();
  if (count != count_again || memcmp(ids, again, (size_t)count * 4) != 0) abort();
  if (halo_tokenizer_decode(&back, &n_back, t, ids, count) != HALO_OK) abort();
  if (!normalises && (n_back != n || (n > 0 && memcmp(back, text, n) != 0))) abort();
  halo_buffer_free(ids);
  halo_buffer_free(again);
  halo_buffer_free(back);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  script s = {data, data + size};
  const uint8_t head = take(&s);
  const int32_t split = head & 7, flags = head >> 3 & 7;
  const int with_bytes = !(head & 64); // without: ids and bytes come from the script alone
  halo_tokenizer *t = NULL;
  const int64_t n_tokens = (with_bytes ? 256 : 0) + take(&s) % 64;
  if (halo_tokenizer_new(&t, n_tokens, split, flags) != HALO_OK) return 0;
  for (int b = 0; with_bytes && b < 256; b++) {
    const char byte = (char)b;
    if (halo_tokenizer_add(t, b, &byte, 1, 0) != HALO_OK) abort();
  }
  int32_t next = with_bytes ? 256 : 0;
  for (uint8_t op = take(&s); op % 4 != 0; op = take(&s)) {
    size_t n, m;
    if (op % 4 == 3) {
      const char *left = take_text(&s, &n), *right = take_text(&s, &m);
      (void)halo_tokenizer_add_merge(t, left, n, right, m, op >> 7);
    } else {
      const int32_t id = op & 64 ? (int8_t)take(&s) + 250 : next++;
      const char *text = take_text(&s, &n);
      (void)halo_tokenizer_add(t, id, text, n, (op >> 2 & 1) | (op % 4 == 2 ? HALO_TOKEN_SPECIAL : 0));
    }
  }
  while (with_bytes && next < n_tokens) { // what the script left out, so that the builder can finish
    const char text[] = {(char)0xfe, (char)next, (char)(next >> 8)};
    (void)halo_tokenizer_add(t, next++, text, sizeof text, 0);
  }
  if (halo_tokenizer_finish(t) == HALO_OK) {
    const char *text = (const char *)s.at;
    const size_t n = (size_t)(s.end - s.at);
    const int normalises = (flags & HALO_TOKENIZER_NFC) != 0;
    check_round_trip(t, text, n, 0, normalises, 0);
    check_round_trip(t, text, n, 1, normalises, size % 16 == 0);
    (void)halo_tokenizer_hash(t);
  }
  char *printable = NULL;
  size_t n = 0;
  if (halo_tokenizer_printable(&printable, &n, (const char *)data, size, head >> 7) == HALO_OK)
    halo_buffer_free(printable);
  halo_tokenizer_free(t);
  return 0;
}
