/* test_layout.c: every token on exactly one rank, both directions agree, local order is global. */
#include <stdbool.h>

#include "check.h"

static const int32_t kinds[] = {HALO_LAYOUT_CONTIGUOUS, HALO_LAYOUT_ZIGZAG, HALO_LAYOUT_STRIPED};

/* One layout: the maps of all ranks are a permutation of the padded tokens. */
static void check_one(int32_t kind, int64_t n, int32_t world, int64_t block) {
  halo_layout *l = NULL;
  CHECK_OK(halo_layout_new(&l, kind, n, world, block));
  const int64_t padded = halo_layout_padded_tokens(l), local = halo_layout_local_tokens(l);
  CHECK(halo_layout_kind_of(l) == kind && halo_layout_tokens(l) == n);
  CHECK(halo_layout_world(l) == world && halo_layout_block(l) == block);
  CHECK(padded == world * local && padded >= n && local % block == 0);
  /* No more padding than one part (a run of a rank) needs. */
  CHECK(padded - n < (kind == HALO_LAYOUT_ZIGZAG ? 2 : 1) * (int64_t)world * block);
  int64_t *map = malloc((size_t)local * sizeof *map);
  uint8_t *seen = calloc((size_t)padded, 1);
  bool distinct = true, increasing = true, inverse = true, whole_blocks = true;
  for (int32_t r = 0; r < world; r++) {
    CHECK_OK(halo_layout_map(l, r, map));
    for (int64_t t = 0; t < local; t++) {
      int32_t rank = -1;
      int64_t index = -1;
      distinct = distinct && map[t] >= 0 && map[t] < padded && !seen[map[t]]++;
      increasing = increasing && (t == 0 || map[t] > map[t - 1]);
      whole_blocks = whole_blocks && map[t] % block == t % block;
      inverse = inverse && halo_layout_global(l, r, t) == map[t] &&
                halo_layout_locate(l, map[t], &rank, &index) == HALO_OK && rank == r && index == t;
    }
  }
  CHECK(distinct);
  CHECK(increasing);
  CHECK(inverse);
  CHECK(whole_blocks);
  free(map);
  free(seen);
  halo_layout_free(l);
}

static void every_token_is_dealt_once(void) {
  const int64_t lengths[] = {1, 3, 8, 31, 32, 33, 96, 97, 200};
  const int32_t worlds[] = {1, 2, 3, 4, 8};
  const int64_t blocks[] = {1, 4, 8, 64};
  for (size_t k = 0; k < 3; k++) {
    for (size_t n = 0; n < 9; n++) {
      for (size_t w = 0; w < 5; w++) {
        for (size_t g = 0; g < 4; g++)
          check_one(kinds[k], lengths[n], worlds[w], blocks[g]);
      }
    }
  }
}

/* The drawing in layout.c: 12 blocks over 3 ranks. */
static void blocks_lie_as_drawn(void) {
  static const int64_t drawn[3][3][4] = {
      {{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}},
      {{0, 1, 10, 11}, {2, 3, 8, 9}, {4, 5, 6, 7}},
      {{0, 3, 6, 9}, {1, 4, 7, 10}, {2, 5, 8, 11}},
  };
  for (int32_t k = 0; k < 3; k++) {
    halo_layout *l = NULL;
    CHECK_OK(halo_layout_new(&l, kinds[k], 24, 3, 2));
    for (int32_t r = 0; r < 3; r++) {
      for (int64_t b = 0; b < 4; b++)
        CHECK(halo_layout_global(l, r, 2 * b) == 2 * drawn[k][r][b]);
    }
    halo_layout_free(l);
  }
}

static void wrong_arguments_are_named(void) {
  halo_layout *l = NULL;
  CHECK_STATUS(halo_layout_new(&l, 7, 10, 1, 4), HALO_EARG);
  CHECK(strstr(halo_error_message(), "kind is 7"));
  CHECK_STATUS(halo_layout_new(&l, 0, 0, 1, 4), HALO_EARG);
  CHECK_STATUS(halo_layout_new(&l, 0, 10, 0, 4), HALO_EARG);
  CHECK_STATUS(halo_layout_new(&l, 0, 10, 1, 0), HALO_EARG);
  CHECK_STATUS(halo_layout_new(&l, 0, INT64_MAX, 8, 64), HALO_EARG);
  CHECK_STATUS(halo_layout_new(&l, 2, 100, 2000000000, 64), HALO_EARG);
  CHECK(l == NULL);
  CHECK_OK(halo_layout_new(&l, HALO_LAYOUT_STRIPED, 10, 2, 4));
  int32_t rank = 9;
  int64_t local = 9;
  CHECK_STATUS(halo_layout_locate(l, 16, &rank, &local), HALO_EARG);
  CHECK_STATUS(halo_layout_locate(l, -1, &rank, &local), HALO_EARG);
  CHECK(rank == 9 && local == 9);
  CHECK(halo_layout_global(l, 2, 0) == -1 && halo_layout_global(l, 0, 8) == -1);
  CHECK_STATUS(halo_layout_map(l, 2, &local), HALO_EARG);
  halo_memory_fail_after(0);
  halo_layout *none = NULL;
  CHECK_STATUS(halo_layout_new(&none, 0, 10, 1, 4), HALO_ENOMEM);
  halo_memory_fail_after(-1);
  halo_layout_free(l);
  halo_layout_free(NULL);
}

int main(void) {
  RUN(every_token_is_dealt_once);
  RUN(blocks_lie_as_drawn);
  RUN(wrong_arguments_are_named);
  return check_report();
}
