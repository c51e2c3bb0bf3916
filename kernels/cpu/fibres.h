/* fibres.h: apply a function to every run along one dim of [outer, n, inner] tensors.
 *
 * A fibre is the n elements (o, :, c), `inner` apart. Softmax, cumulative sums, products and the like
 * are functions of one fibre; this header brings it to them contiguous and in the arithmetic type, so
 * that each is a few lines. Last-dim fibres of f32 and f64 are used where they lie. Neighbouring
 * fibres share cache lines and go to the same thread, so inner > 1 costs a strided copy and no more.
 */
#ifndef HALO_CPU_FIBRES_H
#define HALO_CPU_FIBRES_H

#include <omp.h>

#include "cpu/tile.h"

enum { FIBRE_INPUTS = 3 };

/* y and in[i] are runs of n elements, or one element each where the job says so. */
typedef void (*fibre_fn)(void *y, const void *const *in, int64_t n, const double *param);

typedef struct fibre_job {
  halo_dtype t;
  int64_t outer, n, inner;
  void *y;
  bool y_is_one; /* y is [outer, inner]: one element per fibre */
  int32_t n_in;
  const void *in[FIBRE_INPUTS];
  bool in_is_one[FIBRE_INPUTS];
  double param[2];
  fibre_fn fn[3]; /* by arithmetic */
} fibre_job;

/* First element of fibre f in a tensor that has `length` elements per fibre. */
static inline int64_t fibre_first(const fibre_job *job, int64_t f, int64_t length) {
  return f / job->inner * length * job->inner + f % job->inner;
}

/* One fibre with 8 bytes of buffer per element of y and of each input. */
static inline void fibre_run(const fibre_job *job, int64_t f, char *buffer) {
  const void *in[FIBRE_INPUTS] = {0};
  const int64_t space = 8 * (job->n > 0 ? job->n : 1);
  for (int32_t i = 0; i < job->n_in; i++) {
    const int64_t length = job->in_is_one[i] ? 1 : job->n;
    const void *x = element_at(job->t, job->in[i], fibre_first(job, f, length));
    if (is_native(job->t) && (job->inner == 1 || length == 1)) {
      in[i] = x;
    } else {
      widen(buffer + i * space, job->t, x, job->inner, length);
      in[i] = buffer + i * space;
    }
  }
  const int64_t length = job->y_is_one ? 1 : job->n;
  void *y = element_at(job->t, job->y, fibre_first(job, f, length));
  const bool in_place = is_native(job->t) && (job->inner == 1 || length == 1);
  void *target = in_place ? y : buffer + job->n_in * space;
  job->fn[arithmetic_of(job->t)](target, in, job->n, job->param);
  if (!in_place) narrow(y, job->t, job->inner, target, length);
}

static inline halo_status fibres_run(const fibre_job *job) {
  const int64_t count = job->outer * job->inner;
  const int64_t space = 8 * (job->n > 0 ? job->n : 1) * (job->n_in + 1);
  const bool is_parallel = count > 1 && count * job->n >= PARALLEL_MIN / 4;
  char *buffers = NULL;
  HALO_TRY(halo__scratch((void **)&buffers, is_parallel ? halo_threads() : 1, space));
#pragma omp parallel for schedule(static) if (is_parallel)
  for (int64_t f = 0; f < count; f++) {
    fibre_run(job, f, buffers + (is_parallel ? omp_get_thread_num() : 0) * space);
  }
  halo__free(buffers);
  return HALO_OK;
}

#endif
