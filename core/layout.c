/* layout.c: which rank holds which token, in one place.
 *
 * Tokens are dealt in blocks of G. A rank holds `per_rank` blocks, the same number everywhere, in
 * increasing global order; what is missing at the global end is padding: blocks and tokens with a
 * global index >= N that attend nothing and are never attended. Nothing is refused for not
 * dividing.
 *
 *   12 blocks, W = 3        contiguous        zigzag            striped
 *   rank 0                  0  1  2  3        0  1 10 11        0  3  6  9
 *   rank 1                  4  5  6  7        2  3  8  9        1  4  7 10
 *   rank 2                  8  9 10 11        4  5  6  7        2  5  8 11
 *
 * contiguous  cheapest to read; the last rank does most of the causal work
 * zigzag      two runs from both ends: balances dense causal work (Llama 3, ring-flash-attention)
 * striped     block b on rank b mod W: balances block diagonals too, since the diagonal at block
 *             distance d costs every rank the same and falls into ring step d mod W
 *             (MTraining, arXiv 2510.18830, section 4.2; Striped Attention, arXiv 2311.09431)
 *
 * With blocks as the unit, a block's tokens are consecutive in every layout: kernels rely on it.
 * Token indices are kept as int32 in tables (512K tokens x heads x lists), so the padded length
 * must stay below 2^31.
 */
#include "plan.h"

static const char *kind_name(int32_t kind) {
  switch (kind) {
  case HALO_LAYOUT_CONTIGUOUS:
    return "contiguous";
  case HALO_LAYOUT_ZIGZAG:
    return "zigzag";
  case HALO_LAYOUT_STRIPED:
    return "striped";
  default:
    return NULL;
  }
}

int64_t halo__layout_block_global(const halo_layout *l, int32_t rank, int64_t local) {
  assert(rank >= 0 && rank < l->world && local >= 0 && local < l->per_rank);
  switch (l->kind) {
  case HALO_LAYOUT_CONTIGUOUS:
    return rank * l->per_rank + local;
  case HALO_LAYOUT_ZIGZAG: {
    const int64_t half = l->per_rank / 2;
    return local < half ? rank * half + local : (2 * l->world - 1 - rank) * half + (local - half);
  }
  default:
    return local * l->world + rank;
  }
}

void halo__layout_block_locate(const halo_layout *l, int64_t block, int32_t *rank_out,
                               int64_t *local_out) {
  assert(block >= 0 && block < l->world * l->per_rank);
  switch (l->kind) {
  case HALO_LAYOUT_CONTIGUOUS:
    *rank_out = (int32_t)(block / l->per_rank);
    *local_out = block % l->per_rank;
    break;
  case HALO_LAYOUT_ZIGZAG: {
    const int64_t half = l->per_rank / 2, run = block / half;
    const bool front = run < l->world;
    *rank_out = (int32_t)(front ? run : 2 * l->world - 1 - run);
    *local_out = (front ? 0 : half) + block % half;
    break;
  }
  default:
    *rank_out = (int32_t)(block % l->world);
    *local_out = block / l->world;
  }
}

halo_status halo_layout_new(halo_layout **out, int32_t kind, int64_t n_tokens, int32_t world,
                            int64_t block) {
  HALO_CHECK(out, HALO_EARG, "layout_new: out is NULL");
  HALO_CHECK(kind_name(kind), HALO_EARG,
             "layout_new: kind is %d, wanted contiguous (0), zigzag (1) or striped (2)", kind);
  HALO_CHECK(n_tokens >= 1, HALO_EARG, "layout_new: n_tokens is %lld, wanted at least 1",
             (long long)n_tokens);
  HALO_CHECK(world >= 1, HALO_EARG, "layout_new: world is %d, wanted at least 1", world);
  HALO_CHECK(block >= 1, HALO_EARG, "layout_new: block is %lld tokens, wanted at least 1",
             (long long)block);
  const int64_t n_blocks = (n_tokens - 1) / block + 1;
  const int64_t parts = kind == HALO_LAYOUT_ZIGZAG ? 2 * (int64_t)world : world;
  const int64_t per_part = (n_blocks - 1) / parts + 1;
  int64_t padded_blocks, padded;
  HALO_CHECK(halo__mul(per_part, parts, &padded_blocks) &&
                 halo__mul(padded_blocks, block, &padded) && padded < INT32_MAX,
             HALO_EARG,
             "layout_new: %lld tokens in blocks of %lld over %d ranks pass the limit of %d tokens",
             (long long)n_tokens, (long long)block, world, INT32_MAX);
  halo_layout *l;
  HALO_TRY(halo__alloc_zero((void **)&l, sizeof *l, HALO_CPU));
  *l = (halo_layout){.kind = (halo_layout_kind)kind,
                     .world = world,
                     .n_tokens = n_tokens,
                     .block = block,
                     .n_blocks = n_blocks,
                     .per_rank = padded_blocks / world};
  *out = l;
  return HALO_OK;
}

void halo_layout_free(halo_layout *l) {
  halo__free(l);
}
int32_t halo_layout_kind_of(const halo_layout *l) {
  return l->kind;
}
int64_t halo_layout_tokens(const halo_layout *l) {
  return l->n_tokens;
}
int64_t halo_layout_padded_tokens(const halo_layout *l) {
  return l->world * l->per_rank * l->block;
}
int64_t halo_layout_local_tokens(const halo_layout *l) {
  return l->per_rank * l->block;
}
int64_t halo_layout_block(const halo_layout *l) {
  return l->block;
}
int32_t halo_layout_world(const halo_layout *l) {
  return l->world;
}

int64_t halo_layout_global(const halo_layout *l, int32_t rank, int64_t local) {
  if (rank < 0 || rank >= l->world || local < 0 || local >= halo_layout_local_tokens(l))
    return -1;
  return halo__layout_block_global(l, rank, local / l->block) * l->block + local % l->block;
}

halo_status halo_layout_locate(const halo_layout *l, int64_t token, int32_t *rank_out,
                               int64_t *local_out) {
  const int64_t padded = halo_layout_padded_tokens(l);
  HALO_CHECK(token >= 0 && token < padded, HALO_EARG,
             "layout_locate: token is %lld, wanted 0 to %lld", (long long)token,
             (long long)(padded - 1));
  int64_t block;
  halo__layout_block_locate(l, token / l->block, rank_out, &block);
  *local_out = block * l->block + token % l->block;
  return HALO_OK;
}

halo_status halo_layout_map(const halo_layout *l, int32_t rank, int64_t *map) {
  HALO_CHECK(rank >= 0 && rank < l->world, HALO_EARG, "layout_map: rank is %d, wanted 0 to %d",
             rank, l->world - 1);
  for (int64_t local = 0; local < l->per_rank; local++) {
    const int64_t start = halo__layout_block_global(l, rank, local) * l->block;
    for (int64_t t = 0; t < l->block; t++)
      *map++ = start + t;
  }
  return HALO_OK;
}
