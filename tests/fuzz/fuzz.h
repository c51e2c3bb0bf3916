/* fuzz.h: what the libFuzzer targets share.
 *
 * A target defines LLVMFuzzerTestOneInput and `seeds`. Seeds are made by code, never stored: run with
 * HALO_FUZZ_SEEDS=DIR, a target writes them there (and a dictionary) and goes on; tools/fuzz does so.
 */
#ifndef HALO_TEST_FUZZ_H
#define HALO_TEST_FUZZ_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* Must hold for every input; libFuzzer reports the abort with the input. */
#define MUST(cond)                                                                        \
  do {                                                                                    \
    if (!(cond)) {                                                                        \
      fprintf(stderr, "%s:%d: MUST(%s); last message: %s\n", __FILE__, __LINE__, #cond,   \
              halo_error_message());                                                      \
      abort();                                                                            \
    }                                                                                     \
  } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

/* Write the seeds with put_seed. */
static void seeds(void);

static inline void put_named(const char *name, const void *bytes, size_t n) {
  const char *folder = getenv("HALO_FUZZ_SEEDS");
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE *file = fopen(path, "wb");
  if (file == NULL || fwrite(bytes, 1, n, file) != n) abort();
  fclose(file);
}

/* A selector byte and then the bytes. */
static inline void put_seed(int selector, const void *bytes, size_t n) {
  static int count;
  char name[32];
  char *all = malloc(n + 1);
  all[0] = (char)selector;
  memcpy(all + 1, bytes, n);
  snprintf(name, sizeof name, "seed-%03d", count++);
  put_named(name, all, n + 1);
  free(all);
}

static inline void put_seed_text(int selector, const char *text) { put_seed(selector, text, strlen(text)); }

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  (void)argc;
  (void)argv;
  if (getenv("HALO_FUZZ_SEEDS") != NULL) seeds();
  return 0;
}

#endif
