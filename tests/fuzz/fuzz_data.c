/* Open hostile token files and read all that opened.
 *
 * Byte 0 chooses: bit 0 verify, bit 1 repair the checksums first, so that what lies behind them is
 * reached, bits 2.. the separator for llm.c files. The rest is the file.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "halo.h"

enum { HEADER = 128, MOST = 1 << 16 };

static void put64(uint8_t *at, uint64_t v) { memcpy(at, &v, 8); }

/* Make the hashes fit whatever counts the header claims, as far as they lie inside the file. */
static void repair(uint8_t *file, size_t n) {
  if (n < HEADER) return;
  uint32_t width;
  int64_t tokens, documents;
  memcpy(file, "HALOTOKS", 8);
  memcpy(&width, file + 12, 4);
  memcpy(&tokens, file + 16, 8);
  memcpy(&documents, file + 24, 8);
  if (tokens >= 0 && tokens < MOST && documents >= 0 && documents < MOST && width <= 4) {
    const size_t end = HEADER + (size_t)tokens * width, table = (end + 7) & ~(size_t)7;
    if (end <= n) put64(file + 48, halo_hash_bytes(file + HEADER, end - HEADER, 0));
    if (table + 8 * ((size_t)documents + 1) <= n)
      put64(file + 56, halo_hash_bytes(file + table, 8 * ((size_t)documents + 1), 0));
  }
  put64(file + 120, halo_hash_bytes(file, 120, 0));
}

static void read_all(halo_tokens *t) {
  static int32_t ids[300], documents[300];
  const int64_t count = halo_tokens_count(t), n = halo_tokens_documents(t);
  for (int64_t first = 0; first < count + 10; first += 97)
    (void)halo_tokens_read(ids, documents, t, first, 300, 0);
  uint64_t h;
  for (int64_t d = 0; d < n; d++) {
    int64_t first, length;
    if (halo_tokens_document(t, d, &first, &length) != HALO_OK) abort();
    if (length <= 0 || halo_tokens_find_document(t, first) != d) abort();
    (void)halo_tokens_document_hash(t, d, &h);
  }
  halo_tokens *train = NULL, *valid = NULL, *part = NULL;
  if (halo_tokens_split(&train, &valid, t, 0.3, 1) == HALO_OK) {
    if (halo_tokens_count(train) + halo_tokens_count(valid) != count) abort();
    halo_tokens_free(train);
    halo_tokens_free(valid);
  }
  halo_tokens *twice = NULL;
  if (n < 1000 && halo_tokens_join(&twice, (halo_tokens *const[]){t, t}, 2) != HALO_OK) abort();
  if (twice != NULL) (void)halo_tokens_read(ids, documents, twice, count > 20 ? count - 20 : 0, 300, 0);
  halo_tokens_free(twice);
  if (count > 3 && halo_tokens_slice(&part, t, 1, count - 2) != HALO_OK) abort();
  halo_tokens_free(part);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static int fd = -1;
  static char path[40];
  if (fd < 0) {
    fd = memfd_create("fuzz", 0);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  }
  if (size < 1 || size > MOST) return 0;
  uint8_t *file = malloc(size);
  memcpy(file, data + 1, size - 1);
  if (data[0] & 2) repair(file, size - 1);
  if (ftruncate(fd, 0) != 0 || pwrite(fd, file, size - 1, 0) != (ssize_t)(size - 1)) abort();
  halo_tokens *t = NULL;
  if (halo_tokens_open(&t, path, (data[0] >> 2) - 1, data[0] & 1) == HALO_OK) read_all(t);
  halo_tokens_free(t);
  free(file);
  return 0;
}
