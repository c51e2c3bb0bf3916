/* attention: which family of kernels serves a call (attention.cuh has the table).
 *
 * twin      kernels/cpu/attention_tiles.c, attention_columns.c, attention_ends.c (once)
 */
#include <stdlib.h>
#include <string.h>

#include "attention.cuh"

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

/* HALO_ATTENTION_SHARED in bytes, 0 for none; false: not a number. */
static bool wanted_shared(int64_t *out) {
  const char *value = getenv("HALO_ATTENTION_SHARED");
  char *end = nullptr;
  *out = 0;
  if (value == nullptr || *value == 0) return true;
  const long long kib = strtoll(value, &end, 10);
  if (*end != 0 || kib < 0 || kib > 1 << 20) return false;
  *out = kib * 1024;
  return true;
}

int64_t halo__attention_shared_bytes(void) {
  int64_t asked;
  const int64_t all = halo__cuda_device()->shared_bytes;
  return wanted_shared(&asked) && asked > 0 && asked < all ? asked : all;
}

static bool fits(int path, const halo_attention_queries *a, bool is_backward) {
  if (path == HALO__ATTENTION_HOPPER) return is_backward ? halo__sm90_bwd_fits(a) : halo__sm90_fwd_fits(a);
  return path == HALO__ATTENTION_PORTABLE ? halo__portable_fits(a) : halo__general_fits(a);
}

halo_status halo__attention_choose(halo__attention_path *out, const halo_attention_queries *a,
                                   bool is_backward) {
  int wanted;
  int64_t shared;
  HALO_TRY(wanted_path(&wanted));
  HALO_CHECK(wanted_shared(&shared), HALO_EARG,
             "HALO_ATTENTION_SHARED is %s; it is a whole number of KiB a block, 0 for what the device has",
             getenv("HALO_ATTENTION_SHARED"));
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

/* ---- The rows of kernels.def -------------------------------------------------------------------- */

halo_status halo_cuda_attention_tiles_fwd(const halo_attention_queries *a,
                                          const halo_attention_tiles *keys) {
  halo__attention_path path = HALO__ATTENTION_GENERAL;
  HALO_TRY(halo__attention_choose(&path, a, false));
  if (path == HALO__ATTENTION_HOPPER) return halo__sm90_fwd(a, keys, nullptr);
  if (path == HALO__ATTENTION_PORTABLE) return halo__portable_fwd(a, keys, nullptr);
  return halo__general_fwd(a, keys);
}

/* The general family has no kernel for this: state in between, as on the CPU. */
static halo_status general_once(const halo__attention_out *to, const halo_attention_queries *a,
                                const halo_attention_tiles *keys) {
  halo_attention_queries b = *a;
  const int64_t rows = a->n_batch * a->n_heads * a->block * a->n_blocks;
  const int64_t bytes = a->dtype == HALO_F64 ? 8 : 4, row_bytes = (rows * bytes + 255) / 256 * 256;
  char *state = nullptr;
  HALO_TRY(halo__alloc((void **)&state, row_bytes * (a->head_size + 2), HALO_CUDA));
  b.o = state;
  b.m = state + row_bytes * a->head_size;
  b.l = state + row_bytes * (a->head_size + 1);
  halo_status status = halo_cuda_attention_begin(&b);
  if (status == HALO_OK) status = halo__general_fwd(&b, keys);
  if (status == HALO_OK) {
    status = halo_cuda_attention_finish(to->out, to->out_stride, to->lse, to->lse_stride, &b);
  }
  halo__free(state);
  return status;
}

halo_status halo_cuda_attention_once(void *out, const int64_t *out_stride, void *lse,
                                     const int64_t *lse_stride, const halo_attention_queries *a,
                                     const halo_attention_tiles *keys) {
  const halo__attention_out to = {out, {out_stride[0], out_stride[1], out_stride[2]}, lse,
                                  {lse_stride[0], lse_stride[1]}};
  halo__attention_path path = HALO__ATTENTION_GENERAL;
  HALO_TRY(halo__attention_choose(&path, a, false));
  if (path == HALO__ATTENTION_HOPPER) return halo__sm90_fwd(a, keys, &to);
  if (path == HALO__ATTENTION_PORTABLE) return halo__portable_fwd(a, keys, &to);
  return general_once(&to, a, keys);
}

halo_status halo_cuda_attention_tiles_bwd(const halo_attention_queries *a,
                                          const halo_attention_tiles *keys) {
  HALO_CHECK(a->n_parts == 1, HALO_EUNSUPPORTED, "attention on cuda: dq in %d parts", (int)a->n_parts);
  HALO_CHECK(keys->by_key != nullptr, HALO_EUNSUPPORTED, "attention on cuda: backward needs by_key");
  halo__attention_path path = HALO__ATTENTION_GENERAL;
  HALO_TRY(halo__attention_choose(&path, a, true));
  if (path == HALO__ATTENTION_HOPPER) return halo__sm90_bwd(a, keys);
  if (path == HALO__ATTENTION_PORTABLE) return halo__portable_bwd(a, keys);
  return halo__general_bwd(a, keys);
}

/* Columns: mma.sync where it fits, also beside the hopper kernel's tiles. */
static halo_status is_general(bool *out, const halo_attention_queries *a, bool is_backward) {
  halo__attention_path path = HALO__ATTENTION_GENERAL;
  HALO_TRY(halo__attention_choose(&path, a, is_backward));
  *out = path == HALO__ATTENTION_GENERAL || !halo__portable_fits(a);
  return HALO_OK;
}

halo_status halo_cuda_attention_columns_fwd(const halo_attention_queries *a,
                                            const halo_attention_columns *keys) {
  bool general = true;
  HALO_TRY(is_general(&general, a, false));
  return general ? halo__general_columns_fwd(a, keys) : halo__portable_columns_fwd(a, keys);
}

halo_status halo_cuda_attention_columns_bwd(const halo_attention_queries *a,
                                            const halo_attention_columns *keys) {
  HALO_CHECK(keys->by_column != nullptr, HALO_EUNSUPPORTED, "attention on cuda: backward needs by_column");
  bool general = true;
  HALO_TRY(is_general(&general, a, true));
  return general ? halo__general_columns_bwd(a, keys) : halo__portable_columns_bwd(a, keys);
}
