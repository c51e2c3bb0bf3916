/* probe: a few query rows against all keys at hand.
 *
 *   z_jp = scale * q_p . k_j  where first_p <= pos_j <= last_p, else -inf     peak_p = max_j z_jp
 *   e_jp = exp(z_jp - peak_p)                                                 sum_p  = sum_j e_jp
 *   column_j = sum_p w_p e_jp          diagonal_s = sum over i_p - j = s of w_p e_jp
 *
 * shapes    see halo_probe in kernels.h; lanes are the query rows
 * order     lanes are the vector dimension: every z_jp is one chain of products in the order of the
 *           head dimension, the same for a key wherever it lives; sums run over the keys of one block
 *           in order. Core combines blocks in global order, so W ranks get the bits of one rank
 * work      2 * size flops per (lane, key), in tiles of KEYS x LANES held in registers
 * numbers   fp32 for F32 and BF16 keys, fp64 for F64; a lane that sees nothing has peak -inf, sums 0
 * source    last-query estimation: MInference (arXiv 2407.02490), MTraining (mtraining.md 1.4)
 * twin      kernels/cuda/probe.cu
 */
#define HALO_EACH_REAL_FILE "cpu/probe.c"
#ifndef HALO_REAL_PASS
#include "cpu/vmath.h"
#include "kernels.h"

enum { KEYS = 8, LANES = HALO_PROBE_LANES };

/* Worth waking threads for. */
static inline int32_t probe_is_large(const halo_probe *p) {
  return p->n_units * p->n_blocks * p->block * p->lanes > 1 << 15;
}

/* Does any lane of the unit see a key of positions [start, start + block)? */
static inline int32_t probe_sees(const halo_probe *p, int64_t unit, int64_t start) {
  const int32_t *first = p->first + unit * p->lanes, *last = p->last + unit * p->lanes;
  for (int64_t l = 0; l < p->lanes; l++) {
    if (first[l] <= last[l] && first[l] < start + p->block && last[l] >= start) return 1;
  }
  return 0;
}

#include "cpu/each_real.h"

halo_status halo_cpu_probe_peak(void *peak, const halo_probe *p) {
  HALO_REAL_SWITCH(p->t, probe_peak, (peak, p));
}
halo_status halo_cpu_probe_exp(void *sum, const void *peak, const halo_probe *p) {
  HALO_REAL_SWITCH(p->t, probe_exp, (sum, peak, p));
}
halo_status halo_cpu_probe_score(void *score, const void *weight, const halo_probe *p) {
  HALO_REAL_SWITCH(p->t, probe_score, (score, weight, p));
}
#else

typedef acc REAL(vec) __attribute__((vector_size(64), aligned(sizeof(acc)), may_alias));
enum { REAL(VECTORS) = LANES * sizeof(acc) / 64 };

/* z[keys][lanes] of `keys` <= KEYS keys and LANES lanes; rows of z are `lanes` apart. Inlined with
 * constant keys, so that all sums stay in registers. */
static inline __attribute__((always_inline)) void
REAL(probe_tile)(acc *restrict z, const acc *restrict q, const real *restrict k, int64_t stride,
                 const int64_t keys, int64_t lanes, int64_t size, acc scale) {
  REAL(vec) sum[KEYS][REAL(VECTORS)] = {{{0}}};
  for (int64_t d = 0; d < size; d++) {
    REAL(vec) row[REAL(VECTORS)];
#pragma GCC unroll 2
    for (int v = 0; v < REAL(VECTORS); v++) {
      row[v] = *(const REAL(vec) *)(q + d * lanes + v * (LANES / REAL(VECTORS)));
    }
#pragma GCC unroll 8
    for (int64_t j = 0; j < keys; j++) {
      const acc x = LOAD(k[j * stride + d]);
#pragma GCC unroll 2
      for (int v = 0; v < REAL(VECTORS); v++) sum[j][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int64_t j = 0; j < keys; j++) {
#pragma GCC unroll 2
    for (int v = 0; v < REAL(VECTORS); v++) {
      *(REAL(vec) *)(z + j * lanes + v * (LANES / REAL(VECTORS))) = sum[j][v] * scale;
    }
  }
}

static void REAL(probe_logits)(acc *restrict z, const halo_probe *p, int64_t unit, int64_t block) {
  const int64_t batch = unit / p->heads, kv = unit % p->heads / (p->heads / p->kv_heads);
  const real *k = (const real *)p->k + batch * p->stride[0] + block * p->block * p->stride[1] +
                  kv * p->stride[2];
  const acc *q = (const acc *)p->q + unit * p->size * p->lanes;
  const int32_t *first = p->first + unit * p->lanes, *last = p->last + unit * p->lanes;
  for (int64_t j = 0; j < p->block;) {
    const real *from = k + j * p->stride[1];
    const int64_t keys = p->block - j < KEYS ? 1 : KEYS;
    for (int64_t l = 0; l < p->lanes; l += LANES) {
      acc *to = z + j * p->lanes + l;
      if (keys == KEYS) {
        REAL(probe_tile)(to, q + l, from, p->stride[1], KEYS, p->lanes, p->size, (acc)p->scale);
      } else {
        REAL(probe_tile)(to, q + l, from, p->stride[1], 1, p->lanes, p->size, (acc)p->scale);
      }
    }
    j += keys;
  }
  for (int64_t j = 0; j < p->block; j++) {
    const int32_t position = p->start[block] + (int32_t)j;
    for (int64_t l = 0; l < p->lanes; l++) {
      acc *x = &z[j * p->lanes + l];
      *x = first[l] <= position && position <= last[l] ? *x : -(acc)INFINITY;
    }
  }
}

static halo_status REAL(probe_peak)(void *peak_out, const halo_probe *p) {
  acc *peak = peak_out;
  const int64_t size = p->block * p->lanes;
#pragma omp parallel for collapse(2) schedule(dynamic, 4) if (probe_is_large(p))
  for (int64_t u = 0; u < p->n_units; u++) {
    for (int64_t b = 0; b < p->n_blocks; b++) {
      acc *z = (acc *)p->z + (u * p->n_blocks + b) * size;
      if (!probe_sees(p, p->unit + u, p->start[b])) {
        for (int64_t i = 0; i < size; i++) z[i] = -(acc)INFINITY;
        continue;
      }
      REAL(probe_logits)(z, p, p->unit + u, b);
      // A maximum is the same in any order: raise the shared one lane group by lane group.
      for (int64_t l = 0; l < p->lanes; l += LANES) {
        acc most[LANES];
        for (int64_t i = 0; i < LANES; i++) most[i] = -(acc)INFINITY;
        for (int64_t j = 0; j < p->block; j++) {
          const acc *x = z + j * p->lanes + l;
          for (int64_t i = 0; i < LANES; i++) most[i] = x[i] > most[i] ? x[i] : most[i];
        }
#pragma omp critical(halo_probe_peak)
        for (int64_t i = 0; i < LANES; i++) {
          acc *to = &peak[u * p->lanes + l + i];
          *to = most[i] > *to ? most[i] : *to;
        }
      }
    }
  }
  return HALO_OK;
}

static halo_status REAL(probe_exp)(void *sum_out, const void *peak_in, const halo_probe *p) {
  const int64_t lanes = p->lanes;
#pragma omp parallel for collapse(2) schedule(dynamic, 4) if (probe_is_large(p))
  for (int64_t u = 0; u < p->n_units; u++) {
    for (int64_t b = 0; b < p->n_blocks; b++) {
      acc *restrict z = (acc *)p->z + (u * p->n_blocks + b) * p->block * lanes;
      acc *restrict sum = (acc *)sum_out + (u * p->n_blocks + b) * lanes;
      const acc *peak = (const acc *)peak_in + u * lanes;
      for (int64_t l = 0; l < lanes; l++) sum[l] = 0;
      const int32_t seen = probe_sees(p, p->unit + u, p->start[b]);
      for (int64_t j = 0; j < p->block; j++) {
        for (int64_t l = 0; l < lanes; l++) {
          // A lane that sees nothing has peak -inf and z -inf: no NaN from their difference.
          acc x = z[j * lanes + l] == -(acc)INFINITY ? -(acc)INFINITY : z[j * lanes + l] - peak[l];
          x = seen ? HALO__EXP(x) : 0;
          z[j * lanes + l] = x;
          sum[l] += x;
        }
      }
    }
  }
  return HALO_OK;
}

static halo_status REAL(probe_score)(void *score_out, const void *weight_in, const halo_probe *p) {
  const int64_t lanes = p->lanes, tokens = p->n_blocks * p->block, span = p->block + lanes - 1;
#pragma omp parallel for collapse(2) schedule(dynamic, 4) if (probe_is_large(p))
  for (int64_t u = 0; u < p->n_units; u++) {
    for (int64_t b = 0; b < p->n_blocks; b++) {
      const acc *restrict z = (const acc *)p->z + (u * p->n_blocks + b) * p->block * lanes;
      const acc *restrict weight = (const acc *)weight_in + u * lanes;
      acc *unit = (acc *)score_out + u * (tokens + p->n_blocks * span);
      acc *restrict column = unit + b * p->block;
      acc *restrict diagonal = unit + tokens + b * span;
      for (int64_t t = 0; t < span; t++) diagonal[t] = 0;
      for (int64_t j = 0; j < p->block; j++) {
        acc sum = 0;
        acc *restrict along = diagonal + (p->block - 1 - j);
        for (int64_t l = 0; l < lanes; l++) {
          const acc x = weight[l] * z[j * lanes + l];
          along[l] += x;
          sum += x;
        }
        column[j] = sum;
      }
    }
  }
  return HALO_OK;
}
#endif
