/* attention: which family of kernels serves a call (attention.cuh has the table).
 *
 * twin      kernels/cpu/attention_tiles.c, attention_columns.c, attention_ends.c (once)
 */
#include <stdlib.h>
#include <string.h>

#include "attention.cuh"

/* Families are linked when they exist. */
#define ABSENT __attribute__((weak))
ABSENT bool halo__sm90_fwd_fits(const halo_attention_queries *) { return false; }
ABSENT bool halo__sm90_bwd_fits(const halo_attention_queries *) { return false; }
ABSENT bool halo__portable_fits(const halo_attention_queries *) { return false; }
ABSENT bool halo__general_fits(const halo_attention_queries *) { return false; }
ABSENT halo_status halo__sm90_fwd(const halo_attention_queries *, const halo_attention_tiles *,
                                  const halo__attention_out *) {
  return HALO_EUNSUPPORTED;
}
ABSENT halo_status halo__sm90_bwd(const halo_attention_queries *, const halo_attention_tiles *) {
  return HALO_EUNSUPPORTED;
}

static const char *const names[] = {"hopper", "portable", "general"};

/* HALO_ATTENTION, read at each call so that tests may change it: -1 for none. */
static halo_status wanted_path(int *out) {
  const char *value = getenv("HALO_ATTENTION");
  *out = -1;
  if (value == nullptr || *value == 0 || strcmp(value, "auto") == 0) return HALO_OK;
  for (int i = 0; i < 3; i++) {
    if (strcmp(value, names[i]) == 0) *out = i;
  }
  HALO_CHECK(*out >= 0, HALO_EARG, "HALO_ATTENTION is %s; it is auto, hopper, portable or general",
             value);
  return HALO_OK;
}

static bool fits(int path, const halo_attention_queries *a, bool is_backward) {
  if (path == HALO__ATTENTION_HOPPER) return is_backward ? halo__sm90_bwd_fits(a) : halo__sm90_fwd_fits(a);
  return path == HALO__ATTENTION_PORTABLE ? halo__portable_fits(a) : halo__general_fits(a);
}

halo_status halo__attention_choose(halo__attention_path *out, const halo_attention_queries *a,
                                   bool is_backward) {
  int wanted;
  HALO_TRY(wanted_path(&wanted));
  for (int path = 0; path < 3; path++) {
    if (wanted >= 0 && wanted != path) continue;
    if (!fits(path, a, is_backward)) continue;
    *out = (halo__attention_path)path;
    return HALO_OK;
  }
  return halo__error(
      HALO_EUNSUPPORTED,
      "attention on cuda: %s for dtype %d, head size %lld, blocks of %lld, %lld query and %lld key/value "
      "heads%s",
      wanted < 0 ? "no kernel" : "HALO_ATTENTION names a family that has no kernel", (int)a->dtype,
      (long long)a->head_size, (long long)a->block, (long long)a->n_heads, (long long)a->n_kv_heads,
      a->head_size > 256 ? " (head sizes go to 256)" : "");
}

halo_status halo__attention_dq_order(halo__attention_order *out, const halo_attention_queries *) {
  *out = HALO__DQ_ROWS;
  return HALO_OK;
}
