/* pretokenize.c: text to pieces, the step before byte-pair merging.
 *
 * A model's vocabulary was learned on pieces cut by one regular expression, so the same expression
 * must cut here. Which ones exist is a short list: GPT-2's, Qwen2's, Llama 3's. A tokenizer file is
 * somebody else's data and a regular expression in it is a program with exponential running time if
 * its author likes; none is ever compiled. The text of the expression is compared with the spellings
 * known here (lua/halo/tokenizer.lua), and our own form of the same language runs.
 *
 * Our forms differ from the published ones in spelling only:
 *   - possessive repeats where giving back can never help, so no backtracking state is kept;
 *   - \s is written out as Unicode White_Space, because PCRE2's \s also takes U+180E, and the engines
 *     that trained these models do not.
 * tests/spec/tokenizer_spec.lua holds the vectors; tests/peers/tokenizer_peer.py compares with the
 * reference implementation on random text.
 *
 * PCRE2 runs with its JIT and without its own UTF check: with the check each match validates the
 * whole subject again, which is quadratic (0.14 MB/s against 33 MB/s on 100 kB, reference/ecosystem.md
 * 0). The price is that invalid UTF-8 must never reach it. It does not: tokenizer.c validates once and
 * cuts text into valid runs and runs of other bytes, the latter being pieces of their own.
 *
 * Normalisation (NFC) uses utf8proc for the tables and the composition, but orders combining marks
 * itself: utf8proc sorts them by neighbour swaps, which is quadratic on a long run of marks.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "tokenizer.h"

#include <assert.h>
#include <pcre2.h>
#include <pthread.h>
#include <utf8proc.h>

#define SPACE "\\x{09}-\\x{0d}\\x{85}\\p{Z}"
#define PUNCTUATION "[^" SPACE "\\p{L}\\p{N}]"
#define TRAILING_SPACE "[" SPACE "]+(?![^" SPACE "])|[" SPACE "]++"

static const char *const patterns[] = {
    [HALO_SPLIT_NONE] = NULL,
    [HALO_SPLIT_GPT2] = "'(?:[sdmt]|ll|ve|re)| ?+\\p{L}++| ?+\\p{N}++| ?+" PUNCTUATION
                        "++|" TRAILING_SPACE,
    [HALO_SPLIT_QWEN2] = "(?i:'(?:[sdmt]|ll|ve|re))|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}++|\\p{N}| ?+" PUNCTUATION
                         "++[\\r\\n]*+|[" SPACE "]*[\\r\\n]++|" TRAILING_SPACE,
    [HALO_SPLIT_LLAMA3] = "(?i:'(?:[sdmt]|ll|ve|re))|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}++|\\p{N}{1,3}+| ?+" PUNCTUATION
                          "++[\\r\\n]*+|[" SPACE "]*[\\r\\n]++|" TRAILING_SPACE,
};

enum { PATTERN_COUNT = sizeof patterns / sizeof patterns[0] };
enum { JIT_STACK_FIRST = 32 << 10, JIT_STACK_MOST = 4 << 20 };

struct halo__split {
  pcre2_code *code; /* NULL: HALO_SPLIT_NONE */
  bool jit, is_ready;
};

struct halo__splitter {
  const halo__split *split;
  pcre2_match_data *match;
  pcre2_match_context *context;
  pcre2_jit_stack *stack;
};

/* The patterns are constants, so each is compiled once per process and kept. */
static halo__split splits[PATTERN_COUNT];
static pthread_mutex_t splits_lock = PTHREAD_MUTEX_INITIALIZER;

static halo_status pattern_error(const char *what, int code) {
  PCRE2_UCHAR text[120];
  pcre2_get_error_message(code, text, sizeof text);
  return halo__error(code == PCRE2_ERROR_NOMEMORY ? HALO_ENOMEM : HALO_ESTATE,
                     "tokenizer: PCRE2 could not %s the split pattern: %s", what, (char *)text);
}

static halo_status compile(halo__split *s, const char *pattern) {
  int code;
  PCRE2_SIZE at;
  s->code = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED,
                          PCRE2_UTF | PCRE2_UCP | PCRE2_NO_UTF_CHECK | PCRE2_ANCHORED, &code, &at,
                          NULL);
  if (s->code == NULL) return pattern_error("compile", code);
  // Without a JIT (unsupported machine, no executable memory) the interpreter gives the same pieces.
  s->jit = pcre2_jit_compile(s->code, PCRE2_JIT_COMPLETE) == 0;
  return HALO_OK;
}

halo_status halo__split_get(const halo__split **out, int32_t kind) {
  HALO_CHECK(kind >= 0 && kind < PATTERN_COUNT, HALO_EARG,
             "tokenizer: split is %d, want 0 to %d", kind, PATTERN_COUNT - 1);
  halo_status status = HALO_OK;
  pthread_mutex_lock(&splits_lock);
  halo__split *s = &splits[kind];
  if (!s->is_ready && patterns[kind] != NULL) status = compile(s, patterns[kind]);
  s->is_ready = status == HALO_OK;
  pthread_mutex_unlock(&splits_lock);
  if (status == HALO_OK) *out = s;
  return status;
}

halo_status halo__splitter_new(halo__splitter **out, const halo__split *split) {
  void *memory;
  HALO_TRY(halo__data_alloc(&memory, sizeof(halo__splitter)));
  halo__splitter *s = memory;
  *s = (halo__splitter){.split = split};
  if (split->code != NULL) {
    s->match = pcre2_match_data_create(1, NULL);
    s->context = pcre2_match_context_create(NULL);
    s->stack = split->jit ? pcre2_jit_stack_create(JIT_STACK_FIRST, JIT_STACK_MOST, NULL) : NULL;
    if (s->match == NULL || s->context == NULL || (split->jit && s->stack == NULL)) {
      halo__splitter_free(s);
      return halo__error(HALO_ENOMEM, "tokenizer: no memory for the split pattern");
    }
    if (s->stack != NULL) pcre2_jit_stack_assign(s->context, NULL, s->stack);
    // The built-in patterns are linear; a limit meant for foreign ones would only cut long pieces.
    pcre2_set_match_limit(s->context, UINT32_MAX);
    pcre2_set_heap_limit(s->context, UINT32_MAX);
    pcre2_set_depth_limit(s->context, UINT32_MAX);
  }
  *out = s;
  return HALO_OK;
}

void halo__splitter_free(halo__splitter *s) {
  if (s == NULL) return;
  pcre2_match_data_free(s->match);
  pcre2_match_context_free(s->context);
  pcre2_jit_stack_free(s->stack);
  halo__free(s);
}

halo_status halo__split_next(halo__splitter *s, const uint8_t *text, size_t n, size_t at,
                             size_t *end_out) {
  assert(at < n);
  const halo__split *split = s->split;
  if (split->code == NULL) {
    *end_out = n;
    return HALO_OK;
  }
  int rc = PCRE2_ERROR_JIT_STACKLIMIT;
  if (split->jit) rc = pcre2_jit_match(split->code, text, n, at, 0, s->match, s->context);
  if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
    rc = pcre2_match(split->code, text, n, at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, s->match,
                     s->context);
  if (rc < 0) return pattern_error("match", rc);
  const size_t end = pcre2_get_ovector_pointer(s->match)[1];
  // Every character falls into some branch, so a match is never empty.
  HALO_CHECK(end > at && end <= n, HALO_ESTATE, "tokenizer: empty piece at byte %zu", at);
  *end_out = end;
  return HALO_OK;
}

/* ---- UTF-8 ---- */

/* Length of the valid character at text[0], 0 if there is none. The second byte's range excludes
 * overlong forms, surrogates and code points above U+10FFFF (RFC 3629, section 4). */
static inline size_t character(const uint8_t *text, size_t n) {
  const uint8_t a = text[0];
  if (a < 0x80) return 1;
  if (a < 0xc2 || a > 0xf4) return 0;
  const size_t length = a < 0xe0 ? 2 : a < 0xf0 ? 3 : 4;
  if (n < length) return 0;
  const uint8_t low = a == 0xe0 ? 0xa0 : a == 0xf0 ? 0x90 : 0x80;
  const uint8_t high = a == 0xed ? 0x9f : a == 0xf4 ? 0x8f : 0xbf;
  if (text[1] < low || text[1] > high) return 0;
  for (size_t i = 2; i < length; i++) {
    if ((text[i] & 0xc0) != 0x80) return 0;
  }
  return length;
}

size_t halo__utf8_valid(const uint8_t *text, size_t n) {
  size_t at = 0;
  while (at < n) {
    uint64_t eight;
    while (n - at >= 8 && (memcpy(&eight, text + at, 8), (eight & 0x8080808080808080u) == 0)) at += 8;
    if (at == n) break;
    const size_t length = character(text + at, n - at);
    if (length == 0) break;
    at += length;
  }
  return at;
}

size_t halo__utf8_invalid(const uint8_t *text, size_t n) {
  size_t at = 0;
  while (at < n && character(text + at, n - at) == 0) at++;
  return at;
}

/* ---- NFC ---- */

/* Everything below U+0300 (whose first byte is 0xCC) is in NFC and composes with nothing before it. */
enum { FIRST_SUSPECT = 0xcc };

bool halo__nfc_needed(const uint8_t *text, size_t n) {
  for (size_t i = 0; i < n; i++) {
    if (text[i] >= FIRST_SUSPECT) return true;
  }
  return false;
}

static inline int32_t combining_class(int32_t c) { return utf8proc_get_property(c)->combining_class; }

/* Stable sort of one run of marks by class (Unicode 3.11, D108-D109). */
static halo_status order_run(halo__buffer *scratch, int64_t first, int64_t n) {
  int32_t *c = (int32_t *)scratch->data + first;
  if (n <= 32) {
    for (int64_t i = 1; i < n; i++) {
      const int32_t x = c[i], k = combining_class(x);
      int64_t j = i;
      for (; j > 0 && combining_class(c[j - 1]) > k; j--) c[j] = c[j - 1];
      c[j] = x;
    }
    return HALO_OK;
  }
  void *copy;
  HALO_TRY(halo__data_alloc(&copy, n * 4));
  memcpy(copy, c, (size_t)n * 4);
  int64_t place[257] = {0};
  for (int64_t i = 0; i < n; i++) place[combining_class(c[i]) + 1]++;
  for (int k = 0; k < 256; k++) place[k + 1] += place[k];
  const int32_t *from = copy;
  for (int64_t i = 0; i < n; i++) c[place[combining_class(from[i])]++] = from[i];
  halo__free(copy);
  return HALO_OK;
}

/* text starts at a character that nothing before it can change, and ends before another such one. */
static halo_status normalise(halo__buffer *out, halo__buffer *scratch, const uint8_t *text,
                             size_t n) {
  enum { MOST = 18 }; // code points of the longest full decomposition; canonical ones have 4
  const utf8proc_option_t options = UTF8PROC_COMPOSE | UTF8PROC_STABLE;
  int boundary = 0;
  scratch->bytes = 0;
  for (size_t at = 0; at < n;) {
    utf8proc_int32_t c;
    const utf8proc_ssize_t length = utf8proc_iterate(text + at, (utf8proc_ssize_t)(n - at), &c);
    HALO_CHECK(length > 0, HALO_ESTATE, "tokenizer: text to normalise is not UTF-8 at byte %zu", at);
    at += (size_t)length;
    HALO_TRY(halo__buffer_reserve(scratch, MOST * 4));
    int32_t *end = (int32_t *)((char *)scratch->data + scratch->bytes);
    const utf8proc_ssize_t got = utf8proc_decompose_char(c, end, MOST, options, &boundary);
    HALO_CHECK(got >= 0 && got <= MOST, HALO_ESTATE, "tokenizer: cannot decompose U+%04X", c);
    scratch->bytes += got * 4;
  }
  const int64_t count = scratch->bytes / 4;
  for (int64_t i = 0; i < count;) {
    const int32_t *c = scratch->data;
    int64_t end = i;
    bool sorted = true;
    for (int32_t last = 0; end < count; end++) {
      const int32_t k = combining_class(c[end]);
      if (k == 0) break;
      sorted = sorted && k >= last;
      last = k;
    }
    if (!sorted) HALO_TRY(order_run(scratch, i, end - i));
    i = end + 1;
  }
  const utf8proc_ssize_t kept = utf8proc_normalize_utf32(scratch->data, count, options);
  HALO_CHECK(kept >= 0, HALO_ESTATE, "tokenizer: cannot compose: %s", utf8proc_errmsg(kept));
  HALO_TRY(halo__buffer_reserve(out, 4 * kept));
  for (utf8proc_ssize_t i = 0; i < kept; i++) {
    uint8_t *end = (uint8_t *)out->data + out->bytes;
    out->bytes += utf8proc_encode_char(((int32_t *)scratch->data)[i], end);
  }
  return HALO_OK;
}

halo_status halo__nfc(halo__buffer *out, halo__buffer *scratch, const uint8_t *text, size_t n) {
  size_t done = 0;
  for (size_t at = 0; at < n;) {
    if (text[at] < FIRST_SUSPECT) {
      at++;
      continue;
    }
    // The suspect and its neighbours up to an ASCII character on each side; an ASCII character can
    // take a mark, so the left one belongs to the stretch, but it never joins what stands before it.
    size_t from = at, to = at;
    while (from > done && text[from] >= 0x80) from--;
    while (to < n && text[to] >= 0x80) to++;
    HALO_TRY(halo__buffer_append(out, text + done, (int64_t)(from - done)));
    HALO_TRY(normalise(out, scratch, text + from, to - from));
    done = at = to;
  }
  return halo__buffer_append(out, text + done, (int64_t)(n - done));
}
