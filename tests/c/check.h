/* check.h: the whole C test harness.
 *
 * A test program lists functions with RUN; CHECK counts and reports, and goes on. The last line is
 * `N passed, N failed`, the exit code says the same.
 */
#ifndef HALO_TEST_CHECK_H
#define HALO_TEST_CHECK_H

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "halo.h"

static int check_passed, check_failed;

#define CHECK(cond)                                                                       \
  do {                                                                                    \
    if (cond) {                                                                           \
      check_passed++;                                                                     \
    } else {                                                                              \
      check_failed++;                                                                     \
      fprintf(stderr, "%s:%d: CHECK(%s) failed; last message: %s\n", __FILE__, __LINE__,  \
              #cond, halo_error_message());                                               \
    }                                                                                     \
  } while (0)
#define CHECK_OK(call) CHECK((call) == HALO_OK)
#define CHECK_STATUS(call, status) CHECK((call) == (status))
#define RUN(test) (fprintf(stderr, "- %s\n", #test), test())

/* With HALO_TEST_SMALL set, for tools that follow every access (tools/sanitize-cuda), tests leave out what is
 * large (and with it what only large sizes reach), and of many combinations they take every third. */
static inline bool check_is_small(void) { return getenv("HALO_TEST_SMALL") != NULL; }
static inline bool check_leaves_out(int64_t elements) { return check_is_small() && elements > 200000; }
static inline bool check_thins_out(int64_t combination) { return check_is_small() && combination % 3 != 0; }

static inline int check_report(void) {
  printf("%d passed, %d failed\n", check_passed, check_failed);
  return check_failed != 0;
}

#endif
