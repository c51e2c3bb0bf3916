/* json.c: a strict JSON reader for files that strangers wrote.
 *
 * It is a pull parser: the caller asks for the next token and decides, so a header with ten million
 * entries costs what the caller keeps of it. There is no recursion (nesting is a bit per level up to
 * a limit), no allocation (strings are decoded in place: an escape is never shorter than what it
 * stands for), and no number conversion but integers (a file header that needs a float is wrong).
 *
 * RFC 8259 to the letter, plus: bytes must be valid UTF-8 also outside strings, and a lone surrogate
 * in \u escapes is refused. Duplicate keys are the caller's business: it alone knows which objects
 * are small and which hold a million names.
 *
 * Bounds are explicit everywhere; the text needs no terminator. A decoded string gets one, over its
 * own closing quote, but may contain NUL bytes: compare `length` where it matters.
 *
 * The other direction is a growing text with quoting; callers put the braces.
 */
#include "internal.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum state { WANT_VALUE, WANT_VALUE_OR_END, WANT_KEY, WANT_KEY_OR_END, WANT_COMMA_OR_END, WANT_NOTHING };

void halo__json_init(halo__json *j, char *text, size_t length, int32_t max_depth) {
  *j = (halo__json){.start = text, .at = text, .end = text + length, .state = WANT_VALUE};
  j->max_depth = max_depth < HALO__JSON_DEPTH ? max_depth : HALO__JSON_DEPTH;
}

static halo__json_kind fail(halo__json *j, const char *why) {
  if (j->error == NULL) {
    j->error = why;
    j->error_offset = (size_t)(j->at - j->start);
  }
  return HALO__JSON_ERROR;
}

static void skip_space(halo__json *j) {
  while (j->at < j->end &&
         (*j->at == ' ' || *j->at == '\t' || *j->at == '\n' || *j->at == '\r')) {
    j->at++;
  }
}

/* Length of the UTF-8 sequence at p, 0 if it is not one (overlong, surrogate, beyond U+10FFFF, cut).
 * source  table 3-7 of the Unicode Standard */
static size_t utf8_length(const char *p, const char *end) {
  const unsigned char *s = (const unsigned char *)p;
  const size_t left = (size_t)(end - p);
  if (s[0] < 0x80) return 1;
  if (s[0] < 0xc2 || s[0] > 0xf4) return 0;
  const size_t n = s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : 4;
  if (left < n) return 0;
  const unsigned char low = s[0] == 0xe0 ? 0xa0 : s[0] == 0xf0 ? 0x90 : 0x80;
  const unsigned char high = s[0] == 0xed ? 0x9f : s[0] == 0xf4 ? 0x8f : 0xbf;
  if (s[1] < low || s[1] > high) return 0;
  for (size_t i = 2; i < n; i++) {
    if ((s[i] & 0xc0) != 0x80) return 0;
  }
  return n;
}

static bool hex4(const char *p, const char *end, uint32_t *out) {
  if (end - p < 4) return false;
  uint32_t v = 0;
  for (int i = 0; i < 4; i++) {
    const char c = p[i];
    const uint32_t digit = c >= '0' && c <= '9'   ? (uint32_t)(c - '0')
                           : c >= 'a' && c <= 'f' ? (uint32_t)(c - 'a' + 10)
                           : c >= 'A' && c <= 'F' ? (uint32_t)(c - 'A' + 10)
                                                  : 16u;
    if (digit == 16) return false;
    v = v << 4 | digit;
  }
  *out = v;
  return true;
}

static char *put_utf8(char *to, uint32_t c) {
  if (c < 0x80) {
    *to++ = (char)c;
  } else if (c < 0x800) {
    *to++ = (char)(0xc0 | c >> 6);
    *to++ = (char)(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    *to++ = (char)(0xe0 | c >> 12);
    *to++ = (char)(0x80 | (c >> 6 & 0x3f));
    *to++ = (char)(0x80 | (c & 0x3f));
  } else {
    *to++ = (char)(0xf0 | c >> 18);
    *to++ = (char)(0x80 | (c >> 12 & 0x3f));
    *to++ = (char)(0x80 | (c >> 6 & 0x3f));
    *to++ = (char)(0x80 | (c & 0x3f));
  }
  return to;
}

/* j->at is after the backslash; writes what the escape stands for. */
static bool escape(halo__json *j, char **to) {
  if (j->at == j->end) return fail(j, "the text ends inside a string"), false;
  const char c = *j->at++;
  switch (c) {
  case '"':
  case '\\':
  case '/': *(*to)++ = c; return true;
  case 'b': *(*to)++ = '\b'; return true;
  case 'f': *(*to)++ = '\f'; return true;
  case 'n': *(*to)++ = '\n'; return true;
  case 'r': *(*to)++ = '\r'; return true;
  case 't': *(*to)++ = '\t'; return true;
  case 'u': break;
  default: return fail(j, "an unknown escape"), false;
  }
  uint32_t unit, low;
  if (!hex4(j->at, j->end, &unit)) return fail(j, "\\u without four hex digits"), false;
  j->at += 4;
  if (unit >= 0xd800 && unit <= 0xdfff) {
    const bool is_pair = unit < 0xdc00 && j->end - j->at >= 6 && j->at[0] == '\\' &&
                         j->at[1] == 'u' && hex4(j->at + 2, j->end, &low) && low >= 0xdc00 &&
                         low <= 0xdfff;
    if (!is_pair) return fail(j, "half of a surrogate pair"), false;
    j->at += 6;
    unit = 0x10000 + ((unit - 0xd800) << 10 | (low - 0xdc00));
  }
  *to = put_utf8(*to, unit);
  return true;
}

/* j->at is after the opening quote. */
static bool string(halo__json *j) {
  char *to = j->at;
  j->text = j->at;
  while (j->at < j->end) {
    const unsigned char c = (unsigned char)*j->at;
    if (c == '"') {
      j->at++;
      j->length = (size_t)(to - j->text);
      *to = 0;
      return true;
    }
    if (c < 0x20) return fail(j, "a control character inside a string"), false;
    if (c == '\\') {
      j->at++;
      if (!escape(j, &to)) return false;
      continue;
    }
    const size_t n = utf8_length(j->at, j->end);
    if (n == 0) return fail(j, "bytes that are not UTF-8"), false;
    for (size_t i = 0; i < n; i++) *to++ = *j->at++;
  }
  return fail(j, "the text ends inside a string"), false;
}

static bool digits(halo__json *j) {
  const char *from = j->at;
  while (j->at < j->end && *j->at >= '0' && *j->at <= '9') j->at++;
  return j->at > from;
}

static bool number(halo__json *j) {
  j->text = j->at;
  if (*j->at == '-') j->at++;
  const bool is_zero = j->at < j->end && *j->at == '0';
  const char *from = j->at;
  if (!digits(j)) return fail(j, "a number without digits"), false;
  if (is_zero && j->at - from > 1) return fail(j, "a number with a leading zero"), false;
  if (j->at < j->end && *j->at == '.') {
    j->at++;
    if (!digits(j)) return fail(j, "a number that ends in a point"), false;
  }
  if (j->at < j->end && (*j->at == 'e' || *j->at == 'E')) {
    j->at++;
    if (j->at < j->end && (*j->at == '+' || *j->at == '-')) j->at++;
    if (!digits(j)) return fail(j, "a number without an exponent"), false;
  }
  j->length = (size_t)(j->at - j->text);
  return true;
}

static bool word(halo__json *j, const char *w) {
  const size_t n = strlen(w);
  if ((size_t)(j->end - j->at) < n || memcmp(j->at, w, n) != 0) {
    return fail(j, "neither a value nor a word of JSON"), false;
  }
  j->at += n;
  return true;
}

static bool is_object(const halo__json *j) {
  return (j->objects >> (j->depth - 1) & 1) != 0;
}

static void after_value(halo__json *j) {
  j->state = j->depth == 0 ? WANT_NOTHING : WANT_COMMA_OR_END;
}

static halo__json_kind open_container(halo__json *j, bool object) {
  if (j->depth >= j->max_depth) return fail(j, "nested too deep");
  j->at++;
  const uint64_t bit = (uint64_t)1 << j->depth++;
  j->objects = object ? j->objects | bit : j->objects & ~bit;
  j->state = object ? WANT_KEY_OR_END : WANT_VALUE_OR_END;
  return object ? HALO__JSON_OBJECT : HALO__JSON_ARRAY;
}

static halo__json_kind close_container(halo__json *j) {
  const bool object = is_object(j);
  if (*j->at != (object ? '}' : ']')) return fail(j, object ? "expected }" : "expected ]");
  j->at++;
  j->depth--;
  after_value(j);
  return object ? HALO__JSON_OBJECT_END : HALO__JSON_ARRAY_END;
}

static halo__json_kind value(halo__json *j) {
  halo__json_kind kind;
  switch (*j->at) {
  case '{': return open_container(j, true);
  case '[': return open_container(j, false);
  case '"':
    j->at++;
    if (!string(j)) return HALO__JSON_ERROR;
    kind = HALO__JSON_STRING;
    break;
  case 't': kind = word(j, "true") ? HALO__JSON_TRUE : HALO__JSON_ERROR; break;
  case 'f': kind = word(j, "false") ? HALO__JSON_FALSE : HALO__JSON_ERROR; break;
  case 'n': kind = word(j, "null") ? HALO__JSON_NULL : HALO__JSON_ERROR; break;
  default:
    if (*j->at != '-' && (*j->at < '0' || *j->at > '9')) return fail(j, "expected a value");
    if (!number(j)) return HALO__JSON_ERROR;
    kind = HALO__JSON_NUMBER;
  }
  if (kind != HALO__JSON_ERROR) after_value(j);
  return kind;
}

static halo__json_kind key(halo__json *j) {
  if (*j->at != '"') return fail(j, "expected a key in quotes");
  j->at++;
  if (!string(j)) return HALO__JSON_ERROR;
  skip_space(j);
  if (j->at == j->end || *j->at != ':') return fail(j, "expected : after a key");
  j->at++;
  j->state = WANT_VALUE;
  return HALO__JSON_KEY;
}

halo__json_kind halo__json_next(halo__json *j) {
  if (j->error != NULL) return HALO__JSON_ERROR;
  skip_space(j);
  if (j->at == j->end) {
    return j->state == WANT_NOTHING ? HALO__JSON_END : fail(j, "the text ends too early");
  }
  if (j->state == WANT_COMMA_OR_END) {
    if (*j->at != ',') return close_container(j);
    j->at++;
    skip_space(j);
    if (j->at == j->end) return fail(j, "the text ends too early");
    j->state = is_object(j) ? WANT_KEY : WANT_VALUE;
  }
  switch (j->state) {
  case WANT_NOTHING: return fail(j, "something follows the value");
  case WANT_KEY_OR_END: return *j->at == '}' ? close_container(j) : key(j);
  case WANT_KEY: return key(j);
  case WANT_VALUE_OR_END: return *j->at == ']' ? close_container(j) : value(j);
  default: return value(j);
  }
}

bool halo__json_skip(halo__json *j, halo__json_kind kind) {
  if (kind == HALO__JSON_KEY) kind = halo__json_next(j);
  if (kind != HALO__JSON_OBJECT && kind != HALO__JSON_ARRAY) return kind > HALO__JSON_END;
  const int32_t outside = j->depth - 1;
  while (j->depth > outside) {
    if (halo__json_next(j) == HALO__JSON_ERROR) return false;
  }
  return true;
}

bool halo__json_is(const halo__json *j, const char *text) {
  return strlen(text) == j->length && memcmp(text, j->text, j->length) == 0;
}

bool halo__json_int(const halo__json *j, int64_t *out) {
  const char *p = j->text, *end = j->text + j->length;
  const bool is_negative = p < end && *p == '-';
  if (is_negative) p++;
  int64_t v = 0;
  for (; p < end; p++) {
    if (*p < '0' || *p > '9') return false; // a fraction or an exponent
    const int64_t digit = is_negative ? -(*p - '0') : *p - '0';
    if (__builtin_mul_overflow(v, 10, &v) || __builtin_add_overflow(v, digit, &v)) return false;
  }
  *out = v;
  return true;
}

halo_status halo__json_error(const halo__json *j, const char *what) {
  const bool is_json = j->error == NULL;
  return halo__error(HALO_ECORRUPT, "%s: %s at byte %zu: %s", what, is_json ? "wrong" : "not valid JSON",
                     is_json ? (size_t)(j->at - j->start) : j->error_offset,
                     is_json ? "another kind of value was expected" : j->error);
}

/* ---- writing -------------------------------------------------------------------------------- */

halo_status halo__text_add(halo__text *t, const char *bytes, size_t n) {
  if (t->n + n + 1 > t->capacity) {
    size_t capacity = t->capacity == 0 ? 4096 : t->capacity;
    while (capacity < t->n + n + 1) capacity *= 2;
    char *more = NULL;
    HALO_TRY(halo__scratch((void **)&more, (int64_t)capacity, 1));
    if (t->n > 0) memcpy(more, t->text, t->n);
    halo__free(t->text);
    t->text = more;
    t->capacity = capacity;
  }
  memcpy(t->text + t->n, bytes, n);
  t->n += n;
  t->text[t->n] = 0;
  return HALO_OK;
}

halo_status halo__text_print(halo__text *t, const char *format, ...) {
  char line[512];
  va_list args;
  va_start(args, format);
  const int n = vsnprintf(line, sizeof line, format, args);
  va_end(args);
  assert(n >= 0 && (size_t)n < sizeof line);
  return halo__text_add(t, line, (size_t)n);
}

halo_status halo__text_quote(halo__text *t, const char *bytes, size_t n) {
  HALO_TRY(halo__text_add(t, "\"", 1));
  size_t from = 0;
  for (size_t i = 0; i < n; i++) {
    const unsigned char c = (unsigned char)bytes[i];
    if (c >= 0x20 && c != '"' && c != '\\') continue;
    HALO_TRY(halo__text_add(t, bytes + from, i - from));
    from = i + 1;
    static const char plain[] = "\"\\\b\f\n\r\t", letter[] = "\"\\bfnrt";
    const char *known = c != 0 ? strchr(plain, c) : NULL;
    if (known != NULL) {
      const char pair[2] = {'\\', letter[known - plain]};
      HALO_TRY(halo__text_add(t, pair, 2));
    } else {
      HALO_TRY(halo__text_print(t, "\\u%04x", c));
    }
  }
  HALO_TRY(halo__text_add(t, bytes + from, n - from));
  return halo__text_add(t, "\"", 1);
}

void halo__text_free(halo__text *t) {
  halo__free(t->text);
  *t = (halo__text){0};
}

bool halo__is_utf8(const char *bytes, size_t n) {
  for (const char *p = bytes, *end = bytes + n; p < end;) {
    const size_t length = utf8_length(p, end);
    if (length == 0) return false;
    p += length;
  }
  return true;
}
