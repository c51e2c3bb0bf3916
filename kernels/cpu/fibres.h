/* fibres.h: apply a function to every run along one dim of [outer, n, inner] tensors.
 *
 * A fibre is the n elements (o, :, c), `inner` apart. Softmax, cumulative sums, products and the like
 * are functions of one fibre; this header brings it to them contiguous and in the arithmetic type, so
 * that each is a few lines. Last-dim fibres of f32 and f64 are used where they lie; others are copied in
 * groups, whole cache lines at a time.
 */
#ifndef HALO_CPU_FIBRES_H
#define HALO_CPU_FIBRES_H

#include <omp.h>
#include <string.h>

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

/* Fibres side by side share cache lines, so they are carried in groups: at most this many, and at most
 * GROUP_BYTES of buffer per tensor. */
enum { GROUP = 16, GROUP_BYTES = 1 << 19 };

/* Bytes from fibre to fibre in a buffer: not a power of two, so that they do not share cache sets. */
static inline int64_t fibre_space(const fibre_job *job) { return 8 * job->n + 72; }

static inline int64_t fibre_group(const fibre_job *job) {
  const int64_t fits = GROUP_BYTES / fibre_space(job);
  int64_t group = fits < GROUP ? fits : GROUP;
  if (group > job->inner) group = job->inner;
  return group > 0 ? group : 1;
}

/* Elements side by side, `width` of them in each of `length` rows, to or from fibres that are `space`
 * bytes apart. A tensor with one element per fibre has one row. */
static inline void fibres_load(char *fibres, int64_t space, halo_dtype t, const void *x,
                               int64_t inner, int64_t length, int64_t width) {
  tile row;
  const int64_t bytes = arithmetic_of(t) == IN_F32 ? 4 : 8;
  for (int64_t j = 0; j < length; j++) {
    const char *from = tile_load(&row, t, x, j * inner, 1, width);
    for (int64_t f = 0; f < width; f++) {
      if (bytes == 4) {
        memcpy(fibres + f * space + j * 4, from + f * 4, 4);
      } else {
        memcpy(fibres + f * space + j * 8, from + f * 8, 8);
      }
    }
  }
}

static inline void fibres_store(void *y, halo_dtype t, int64_t inner, const char *fibres,
                                int64_t space, int64_t length, int64_t width) {
  tile row;
  const int64_t bytes = arithmetic_of(t) == IN_F32 ? 4 : 8;
  for (int64_t j = 0; j < length; j++) {
    for (int64_t f = 0; f < width; f++) {
      if (bytes == 4) {
        memcpy((char *)&row + f * 4, fibres + f * space + j * 4, 4);
      } else {
        memcpy((char *)&row + f * 8, fibres + f * space + j * 8, 8);
      }
    }
    narrow(element_at(t, y, j * inner), t, 1, &row, width);
  }
}

/* `width` fibres side by side from fibre f on. */
static inline void fibre_run(const fibre_job *job, int64_t f, int64_t width, char *buffer) {
  const int64_t space = fibre_space(job), area = space * fibre_group(job);
  const bool in_place = is_native(job->t) && job->inner == 1;
  const char *in[FIBRE_INPUTS] = {0};
  for (int32_t i = 0; i < job->n_in; i++) {
    const int64_t length = job->in_is_one[i] ? 1 : job->n;
    const void *x = element_at(job->t, job->in[i], fibre_first(job, f, length));
    in[i] = in_place ? x : buffer + i * area;
    if (in_place) continue;
    if (job->inner == 1) {
      widen(buffer + i * area, job->t, x, 1, length);
    } else {
      fibres_load(buffer + i * area, space, job->t, x, job->inner, length, width);
    }
  }
  const int64_t length = job->y_is_one ? 1 : job->n;
  void *y = element_at(job->t, job->y, fibre_first(job, f, length));
  char *target = in_place ? y : buffer + job->n_in * area;
  for (int64_t i = 0; i < width; i++) {
    const void *args[FIBRE_INPUTS];
    for (int32_t k = 0; k < job->n_in; k++) args[k] = in[k] + i * space;
    job->fn[arithmetic_of(job->t)](target + i * space, args, job->n, job->param);
  }
  if (in_place) return;
  if (job->inner == 1) {
    narrow(y, job->t, 1, target, length);
  } else {
    fibres_store(y, job->t, job->inner, target, space, length, width);
  }
}

static inline halo_status fibres_run(const fibre_job *job) {
  const int64_t group = fibre_group(job);
  const int64_t groups = (job->inner + group - 1) / group, count = job->outer * groups;
  const int64_t space = fibre_space(job) * (job->n_in + 1) * group;
  const bool is_parallel = count > 1 && job->outer * job->inner * job->n >= PARALLEL_MIN / 4;
  char *buffers = NULL;
  HALO_TRY(halo__scratch((void **)&buffers, is_parallel ? halo_threads() : 1, space));
#pragma omp parallel for schedule(static) if (is_parallel)
  for (int64_t k = 0; k < count; k++) {
    const int64_t first = k % groups * group, rest = job->inner - first;
    fibre_run(job, k / groups * job->inner + first, rest < group ? rest : group,
              buffers + (is_parallel ? omp_get_thread_num() : 0) * space);
  }
  halo__free(buffers);
  return HALO_OK;
}

#endif
