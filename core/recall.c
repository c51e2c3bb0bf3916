/* recall.c: how much of dense attention a plan keeps, on a few sampled rows.
 *
 *   recall of row i = sum over visible j of p_ij / sum over allowed j of p_ij,   p = softmax row
 *
 * allowed: causal and of the same document. A dense pass over all rows would cost what sparsity
 * saves; `samples` rows per head are enough to watch a run (the mean's standard error is the spread
 * of rows / sqrt(batch * samples)). Rows are drawn from (seed, stream, index) over the tokens that
 * belong to a document, so that every rank and every world size measures the same rows.
 *
 * A block's exponentials are summed once by the probe kernel: an active tile keeps the block's
 * whole sum (masked pairs are zeros there), other blocks keep their columns.
 */
#include "probe.h"

#include <string.h>

/* Draw the rows; sequences without a token of a document get empty lanes. */
static halo_status draw_rows(halo__probe_job *p, const halo_plan *plan, int64_t samples,
                             uint64_t seed, uint64_t stream) {
  const int64_t n = plan->layout.n_tokens, heads = plan->n_heads;
  int32_t *token;
  HALO_TRY(halo__scratch((void **)&token, n, sizeof *token));
  for (int64_t b = 0; b < plan->n_batch; b++) {
    const halo__row *row = &plan->rows[plan->patterns[plan->pattern_of[b * heads]].row];
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
      if (halo__first(row, i) <= i)
        token[count++] = (int32_t)i;
    }
    for (int64_t at = b * heads * p->lanes; at < (b + 1) * heads * p->lanes; at++) {
      const bool is_row = at % p->lanes < samples && count > 0;
      const int64_t draw = at / p->lanes * samples + at % p->lanes;
      const int64_t k =
          (int64_t)(halo_random_uniform(seed, stream, (uint64_t)draw) * (double)count);
      p->token[at] = is_row ? token[k] : -1;
      p->first[at] = is_row ? halo__first(row, token[k]) : 0;
      p->last[at] = is_row ? token[k] : -1;
    }
  }
  halo__free(token);
  return HALO_OK;
}

/* What the plan keeps of one key block for one row: the whole sum, or its columns' exponentials. */
static double kept_of_block(const halo__probe_job *p, const halo_plan *plan, const halo__set *s,
                            int64_t query, int64_t key, int32_t i, int64_t slot, int64_t lane) {
  const int64_t g = plan->layout.block;
  if (halo__set_has(s, query, key))
    return halo__probe_at(p, p->sum[i], slot * p->lanes + lane);
  double kept = 0;
  int64_t c = halo__lower_bound(s->column, 0, s->n_columns, key * g);
  for (; c < s->n_columns && s->column[c] < (key + 1) * g; c++) {
    const int64_t token = slot * g + s->column[c] % g;
    kept += halo__probe_at(p, p->z[i], token * p->lanes + lane);
  }
  return kept;
}

/* Add rank i's share of (kept, all) for the units of a chunk; mass is [units, lanes, 2]. */
static void add_mass(double *mass, const halo__probe_job *p, const halo_plan *plan, int32_t i,
                     int64_t unit, int64_t n) {
  const halo_layout *l = p->layout;
#pragma omp parallel for collapse(2) schedule(dynamic) if (n * l->per_rank > 1 << 10)
  for (int64_t u = 0; u < n; u++) {
    for (int64_t lane = 0; lane < p->lanes; lane++) {
      const int64_t at = (unit + u) * p->lanes + lane;
      if (p->token[at] < 0)
        continue;
      const halo__set *s = plan->patterns[plan->pattern_of[unit + u]].shown;
      const int64_t query = p->token[at] / l->block;
      for (int64_t b = 0; b < l->per_rank; b++) {
        const int64_t key = p->start[i][b] / l->block, slot = u * l->per_rank + b;
        if (key > query)
          break;
        const double all = halo__probe_at(p, p->sum[i], slot * p->lanes + lane);
        if (all == 0)
          continue;
        mass[2 * at] += kept_of_block(p, plan, s, query, key, i, slot, lane);
        mass[2 * at + 1] += all;
      }
    }
  }
}

static void mean_over_rows(double *recall_out, const halo__probe_job *p, const halo_plan *plan,
                           const double *mass) {
  for (int64_t h = 0; h < plan->n_heads; h++) {
    double sum = 0;
    int64_t count = 0;
    for (int64_t b = 0; b < plan->n_batch; b++) {
      for (int64_t lane = 0; lane < p->lanes; lane++) {
        const int64_t at = (b * plan->n_heads + h) * p->lanes + lane;
        if (p->token[at] < 0)
          continue;
        sum += mass[2 * at] / mass[2 * at + 1];
        count++;
      }
    }
    recall_out[h] = count > 0 ? sum / (double)count : 1;
  }
}

halo_status halo_attention_recall(double *recall_out, const halo_tensor *q, const halo_tensor *k,
                                  halo_plan *plan, halo_ring *ring, double scale, int64_t samples,
                                  uint64_t seed, uint64_t stream) {
  halo_status status = HALO_OK;
  halo__probe_job job, *p = &job;
  void **mass = NULL;
  HALO_CHECK(recall_out && plan, HALO_EARG, "attention_recall: recall_out or plan is NULL");
  HALO_TRY(halo__plan_need(plan, "attention_recall"));
  HALO_CHECK(samples >= 1, HALO_EARG, "attention_recall: samples is %lld, wanted at least 1",
             (long long)samples);
  HALO_TRY(halo__probe_open(p, "attention_recall", q, k, plan, ring, scale, samples));
  const int64_t count = 2 * p->units * p->lanes;
  HALO_TRY_GOTO(halo__probe_buffers(&mass, p, count, sizeof(double)));
  HALO_TRY_GOTO(draw_rows(p, plan, samples, seed, stream));
  HALO_TRY_GOTO(halo__probe_gather(p, q));
  for (int64_t unit = 0; unit < p->units; unit += p->chunk) {
    const int64_t n = p->units - unit < p->chunk ? p->units - unit : p->chunk;
    HALO_TRY_GOTO(halo__probe_exponentials(p, unit, n));
    HALO_TRY_GOTO(halo__probe_fetch(p));
    for (int32_t i = 0; i < p->here; i++)
      add_mass(mass[i], p, plan, i, unit, n);
  }
  HALO_TRY_GOTO(halo_comm_all_reduce(p->comm, mass, count, HALO_F64));
  mean_over_rows(recall_out, p, plan, mass[0]);
  for (int64_t h = 0; h < plan->n_heads; h++) {
    HALO_CHECK_GOTO(recall_out[h] == recall_out[h], HALO_ENUMERIC,
                    "attention_recall: attention of head %lld is not finite", (long long)h);
  }
done:
  halo__probe_free_buffers(mass, p);
  halo__probe_close(p);
  return status;
}
