/* probe.h: dense attention of a few query rows over the ring, shared by selection and recall. */
#ifndef HALO_PROBE_H
#define HALO_PROBE_H

#include "kernels.h"
#include "plan.h"

/* Rows are lanes: lane l of unit u = batch * H + head is the query at token[u, l] (-1: an empty
 * lane). Arrays of pointers have one entry per rank of this process. */
typedef struct halo__probe_job {
  halo_comm *comm;
  halo_device device; /* of q and k */
  const halo_kernels *kernels;
  const halo_layout *layout;
  int32_t here, rank, world;
  int64_t units, lanes, chunk; /* chunk: units that fit the work space, the same on all ranks */
  halo_dtype acc;
  halo_tensor *k;        /* innermost dimension contiguous */
  int32_t *token;        /* [units, lanes] filled by the caller, with first and last */
  int32_t *first, *last; /* [units, lanes] positions a lane sees */
  int32_t **start;       /* [n_blocks] */
  halo_probe *local;     /* what the kernels get */
  void **q;              /* [units, D, lanes] */
  void **peak;           /* [chunk, lanes] */
  void **sum;            /* [chunk rounded up to W, n_blocks, lanes] */
  void **z;              /* [chunk, T, lanes]; elsewhere than on the CPU after halo__probe_fetch only */
  /* The same where kernels read and write them; on the CPU the arrays above themselves. Everything
   * that travels, and what selection and recall read, is host memory. */
  void **there_q, **there_peak, **there_sum, **there_z;
  void **there_start;
  int32_t *there_first, *there_last;
} halo__probe_job;

/* Bytes of logits held at a time. */
extern int64_t halo__probe_work_bytes;

/* Check q, k against plan and ring, allocate for `rows` lanes per unit. On failure nothing is held.
 */
halo_status halo__probe_open(halo__probe_job *p, const char *what, const halo_tensor *q,
                             const halo_tensor *k, const halo_plan *plan, halo_ring *ring,
                             double scale, int64_t rows);
void halo__probe_close(halo__probe_job *p);
/* Bring the query rows named in `token` to every rank. Collective. */
halo_status halo__probe_gather(halo__probe_job *p, const halo_tensor *q);
/* For units [unit, unit + n): z = exp(logit - row maximum over all ranks), sum = their sums per
 * block of this rank. Collective. */
halo_status halo__probe_exponentials(halo__probe_job *p, int64_t unit, int64_t n);
/* Bring the exponentials of the chunk at hand to z of every rank here. */
halo_status halo__probe_fetch(halo__probe_job *p);
/* The kernel of that name for rank `i` here and the chunk at hand; score has `bytes`, weight
 * `weight_bytes`, both host memory. */
halo_status halo__probe_score(halo__probe_job *p, int32_t i, void *score, int64_t bytes,
                              const void *weight, int64_t weight_bytes);

/* One pointer per rank here, each to `bytes` zeroed bytes. */
halo_status halo__probe_buffers(void ***out, const halo__probe_job *p, int64_t n, int64_t bytes);
void halo__probe_free_buffers(void **buffers, const halo__probe_job *p);

/* Element of an arithmetic-type array as a double. */
static inline double halo__probe_at(const halo__probe_job *p, const void *x, int64_t i) {
  return p->acc == HALO_F64 ? ((const double *)x)[i] : (double)((const float *)x)[i];
}

#endif
