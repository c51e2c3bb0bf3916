/* sha256.c: SHA-256 (FIPS 180-4), for the manifests of checkpoints.
 *
 * A checkpoint's chunks carry XXH3 for speed; the digest of a whole file is SHA-256, because people
 * compare it with `sha256sum` and publish it. The portable rounds do about 0.2 GB/s (one core of a 2.5
 * GHz Xeon without SHA extensions, gcc 12 -O3; OpenSSL does 0.2 there as well) and would be the slowest
 * part of saving, so x86-64 processors that have the extensions use them. The choice is made by CPUID;
 * test_checkpoint.c compares both ways where the machine has both.
 */
#include "internal.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

static const uint32_t K[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

/* One round; the caller renames the eight words instead of moving them. */
static inline void turn(uint32_t a, uint32_t b, uint32_t c, uint32_t *d, uint32_t e, uint32_t f,
                        uint32_t g, uint32_t *h, uint32_t kw) {
  const uint32_t t1 = *h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + (g ^ (e & (f ^ g))) + kw;
  const uint32_t t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) | (c & (a | b)));
  *d += t1;
  *h = t1 + t2;
}

static void blocks_portable(uint32_t state[8], const uint8_t *p, size_t n_blocks) {
  for (; n_blocks > 0; n_blocks--, p += 64) {
    uint32_t w[64];
    for (int i = 0; i < 16; i++) {
      uint32_t word;
      memcpy(&word, p + 4 * i, 4);
      w[i] = __builtin_bswap32(word);
    }
    for (int i = 16; i < 64; i++) {
      const uint32_t x = w[i - 15], y = w[i - 2];
      w[i] = w[i - 16] + (rotate(x, 7) ^ rotate(x, 18) ^ x >> 3) + w[i - 7] +
             (rotate(y, 17) ^ rotate(y, 19) ^ y >> 10);
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 64; i += 8) {
      turn(a, b, c, &d, e, f, g, &h, K[i] + w[i]);
      turn(h, a, b, &c, d, e, f, &g, K[i + 1] + w[i + 1]);
      turn(g, h, a, &b, c, d, e, &f, K[i + 2] + w[i + 2]);
      turn(f, g, h, &a, b, c, d, &e, K[i + 3] + w[i + 3]);
      turn(e, f, g, &h, a, b, c, &d, K[i + 4] + w[i + 4]);
      turn(d, e, f, &g, h, a, b, &c, K[i + 5] + w[i + 5]);
      turn(c, d, e, &f, g, h, a, &b, K[i + 6] + w[i + 6]);
      turn(b, c, d, &e, f, g, h, &a, K[i + 7] + w[i + 7]);
    }
    const uint32_t added[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; i++) state[i] += added[i];
  }
}

#if defined(__x86_64__)
/* Intel's instructions keep the state as (A,B,E,F) and (C,D,G,H) and do two rounds at a time;
 * w[g % 4] is a group of four message words, replaced by group g + 4 when used up.
 * source  Intel SDM vol. 2, SHA256RNDS2, SHA256MSG1, SHA256MSG2 */
__attribute__((target("sha,sse4.1"))) static void blocks_sha_ni(uint32_t h[8], const uint8_t *p,
                                                                size_t n_blocks) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
  const __m128i dcba = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)h), 0xb1);
  const __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(h + 4)), 0x1b);
  __m128i abef = _mm_alignr_epi8(dcba, hgfe, 8), cdgh = _mm_blend_epi16(hgfe, dcba, 0xf0);
  for (; n_blocks > 0; n_blocks--, p += 64) {
    const __m128i abef0 = abef, cdgh0 = cdgh;
    __m128i w[4];
    for (int i = 0; i < 4; i++) {
      w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(p + 16 * i)), swap);
    }
    for (int g = 0; g < 16; g++) {
      const __m128i x = w[g & 3];
      const __m128i k = _mm_add_epi32(x, _mm_load_si128((const __m128i *)(K + 4 * g)));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, k);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(k, 0x0e));
      if (g < 12) {
        const __m128i x1 = w[(g + 1) & 3], x2 = w[(g + 2) & 3], x3 = w[(g + 3) & 3];
        const __m128i sum =
            _mm_add_epi32(_mm_sha256msg1_epu32(x, x1), _mm_alignr_epi8(x3, x2, 4));
        w[g & 3] = _mm_sha256msg2_epu32(sum, x3);
      }
    }
    abef = _mm_add_epi32(abef, abef0);
    cdgh = _mm_add_epi32(cdgh, cdgh0);
  }
  const __m128i feba = _mm_shuffle_epi32(abef, 0x1b), dchg = _mm_shuffle_epi32(cdgh, 0xb1);
  _mm_storeu_si128((__m128i *)h, _mm_blend_epi16(feba, dchg, 0xf0));
  _mm_storeu_si128((__m128i *)(h + 4), _mm_alignr_epi8(dchg, feba, 8));
}
#endif

typedef void (*blocks_fn)(uint32_t h[8], const uint8_t *p, size_t n_blocks);

static blocks_fn best_blocks(void) {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  const bool has_sse41 = __get_cpuid(1, &a, &b, &c, &d) && (c >> 19 & 1) && (c >> 9 & 1);
  if (has_sse41 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1)) return blocks_sha_ni;
#endif
  return blocks_portable;
}

void halo__sha256_init(halo__sha256 *s, bool portable) {
  static const uint32_t h0[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  memcpy(s->h, h0, sizeof s->h);
  s->bytes = 0;
  s->blocks = portable ? blocks_portable : best_blocks();
}

void halo__sha256_add(halo__sha256 *s, const void *data, size_t n) {
  const uint8_t *p = data;
  const size_t fill = s->bytes % 64;
  s->bytes += n;
  if (fill > 0) {
    const size_t take = n < 64 - fill ? n : 64 - fill;
    memcpy(s->block + fill, p, take);
    if (fill + take < 64) return;
    s->blocks(s->h, s->block, 1);
    p += take;
    n -= take;
  }
  if (n >= 64) s->blocks(s->h, p, n / 64);
  if (n % 64 > 0) memcpy(s->block, p + n - n % 64, n % 64);
}

void halo__sha256_end(halo__sha256 *s, char hex_out[65]) {
  const uint64_t bits = s->bytes * 8;
  uint8_t tail[72] = {0x80};
  const size_t pad = (s->bytes % 64 < 56 ? 56 : 120) - s->bytes % 64;
  for (int i = 0; i < 8; i++) tail[pad + (size_t)i] = (uint8_t)(bits >> (56 - 8 * i));
  halo__sha256_add(s, tail, pad + 8);
  for (int i = 0; i < 32; i++) {
    const uint32_t byte = s->h[i / 4] >> (24 - 8 * (i % 4)) & 0xff;
    hex_out[2 * i] = "0123456789abcdef"[byte >> 4];
    hex_out[2 * i + 1] = "0123456789abcdef"[byte & 15];
  }
  hex_out[64] = 0;
}
