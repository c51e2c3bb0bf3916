/* sample.c: which tokens make a training sample, and which part of it a rank gets.
 *
 * Order. Sample i of a run is a pure function of (seed, i): never of the number of ranks, of workers,
 * or of what was read before. Then a run resumed at any world size reads on where it stopped, and the
 * state to save is one number. An epoch is a permutation without replacement, evaluated at a single
 * index by a Feistel network over the next even power of two, walked until it falls below n (Black and
 * Rogaway, "Ciphers with arbitrary finite domains", 2002): nothing is shuffled in memory, so an epoch
 * of 10^9 windows costs nothing to enter in the middle.
 *
 *   n = 6, domain 0..15:  index 2 -> 11 -> 7 -> 4     (11 and 7 are outside, walk on)
 *
 * Labels. They are shifted here, in global order, while the next token is at hand. Shifting after a
 * layout has cut the row into stripes drops or crosses a token at every stripe's edge
 * (reference/distributed.md 3). With documents kept apart, the last token of each predicts nothing.
 *
 * Positions. With documents kept apart they restart at each document by default (Lua: data.loader).
 * Rotary attention within a document sees only differences, so both ways train alike; restarting is
 * what packed training in Hugging Face (DataCollatorWithFlattening, FlashAttention's cu_seqlens) and
 * ProLong do, matches how a document is read at inference, and keeps angles small.
 */
#include "internal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

uint64_t halo_hash_bytes(const void *data, size_t n, uint64_t seed) {
  return XXH3_64bits_withSeed(data, n, seed);
}

halo_status halo_hash_file(const char *path, uint64_t *out) {
  HALO_CHECK(path != NULL && out != NULL, HALO_EARG, "hash_file: NULL argument");
  enum { CHUNK = 1 << 16 };
  halo_status status = HALO_OK;
  uint8_t chunk[CHUNK];
  XXH3_state_t *state = NULL;
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  HALO_CHECK(fd >= 0, HALO_EIO, "hash_file: cannot open %s: %s", path, strerror(errno));
  state = XXH3_createState();
  HALO_CHECK_GOTO(state != NULL, HALO_ENOMEM, "hash_file: no memory for a hash");
  XXH3_64bits_reset(state);
  for (;;) {
    const ssize_t got = read(fd, chunk, CHUNK);
    if (got < 0 && errno == EINTR) continue;
    HALO_CHECK_GOTO(got >= 0, HALO_EIO, "hash_file: cannot read %s: %s", path, strerror(errno));
    if (got == 0) break;
    XXH3_64bits_update(state, chunk, (size_t)got);
  }
  *out = XXH3_64bits_digest(state);
done:
  XXH3_freeState(state);
  close(fd);
  return status;
}

int64_t halo_random_permute(int64_t n, uint64_t seed, uint64_t stream, int64_t index) {
  enum { ROUNDS = 6 }; // 4 make a pseudorandom permutation (Luby and Rackoff 1988); small halves mix less
  if (n <= 0 || index < 0 || index >= n) return -1;
  int half = 1;
  while (half < 31 && (int64_t)1 << (2 * half) < n) half++;
  if ((uint64_t)n > (uint64_t)1 << (2 * half)) half = 32; // n above 2^62
  const uint64_t mask = ((uint64_t)1 << half) - 1;
  uint64_t x = (uint64_t)index;
  do {
    uint64_t left = x >> half, right = x & mask;
    for (uint64_t round = 0; round < ROUNDS; round++) {
      const uint64_t f = halo_random_u64(seed, stream, round << 32 | right) & mask;
      const uint64_t next = left ^ f;
      left = right;
      right = next;
    }
    x = left << half | right;
  } while (x >= (uint64_t)n);
  return (int64_t)x;
}

halo_status halo_sample_finish(int32_t *ids, int32_t *labels, int32_t *positions, int32_t *segments,
                               int64_t *targets_out, const int32_t *tokens, const int32_t *documents,
                               const uint8_t *loss, int64_t n, int32_t flags) {
  HALO_CHECK(ids != NULL && labels != NULL && positions != NULL && segments != NULL &&
                 targets_out != NULL && tokens != NULL && documents != NULL,
             HALO_EARG, "sample_finish: NULL argument");
  HALO_CHECK(n > 0 && n < INT32_MAX, HALO_EARG, "sample_finish: %lld tokens", (long long)n);
  const bool apart = (flags & HALO_SAMPLE_DOCUMENTS) != 0;
  const bool restart = (flags & HALO_SAMPLE_RESTART) != 0;
  HALO_CHECK((flags & ~3) == 0 && (apart || !restart), HALO_EARG,
             "sample_finish: flags %d; positions restart only where documents are kept apart", flags);
  int64_t targets = 0, begin = 0;
  int32_t segment = 0;
  for (int64_t i = 0; i < n; i++) {
    if (i > 0 && documents[i] != documents[i - 1]) {
      segment++;
      begin = i;
    }
    const bool is_target = documents[i] >= 0 && documents[i + 1] >= 0 &&
                           (!apart || documents[i + 1] == documents[i]) &&
                           (loss == NULL || loss[i + 1] != 0);
    ids[i] = tokens[i];
    labels[i] = is_target ? tokens[i + 1] : HALO_NO_TARGET;
    positions[i] = (int32_t)(restart ? i - begin : i);
    segments[i] = apart ? segment : 0;
    targets += is_target;
  }
  *targets_out = targets;
  return HALO_OK;
}

halo_status halo_rows_gather(int32_t *out, const int32_t *rows, int64_t n_rows, int64_t n,
                             const int64_t *map, int64_t n_map, int32_t fill) {
  HALO_CHECK(out != NULL && rows != NULL && map != NULL, HALO_EARG, "rows_gather: NULL argument");
  HALO_CHECK(n_rows >= 0 && n >= 0 && n_map >= 0, HALO_EARG, "rows_gather: %lld rows of %lld to %lld",
             (long long)n_rows, (long long)n, (long long)n_map);
  for (int64_t i = 0; i < n_map; i++) {
    HALO_CHECK(map[i] >= 0, HALO_EARG, "rows_gather: map[%lld] is %lld", (long long)i,
               (long long)map[i]);
  }
  for (int64_t b = 0; b < n_rows; b++) {
    for (int64_t i = 0; i < n_map; i++) {
      out[b * n_map + i] = map[i] < n ? rows[b * n + map[i]] : fill;
    }
  }
  return HALO_OK;
}
