/* op.h: what the files of ordinary ops (op_*.c) share: how shapes look to kernels.
 *
 * An op function (halo__<name>_fwd, _bwd) gets a halo__call (internal.h), checks what a user can get
 * wrong, makes contiguous results and calls the kernels of its device. Dims in messages count from 0,
 * as in C; Lua checks its own dims before it calls.
 */
#ifndef HALO_OP_H
#define HALO_OP_H

#include "internal.h"
#include "kernels.h"

/* A tensor seen along one dim: [outer, n, inner]. */
typedef struct halo__along {
  int32_t dim; /* -1: all dims as one, [1, count, 1] */
  int64_t outer, n, inner;
} halo__along;

/* dim may be negative. `dim_or_all` also takes NaN, which means all dims. */
halo_status halo__along_dim(halo__along *out, const char *name, const halo_tensor *t, double dim);
halo_status halo__along_dim_or_all(halo__along *out, const char *name, const halo_tensor *t,
                                   double dim);
/* New tensor of t's shape with dim set to n, or removed (n < 0); all dims for along->dim < 0. */
halo_status halo__new_along(halo_tensor **out, halo_dtype dtype, const halo_tensor *t,
                            const halo__along *along, int64_t n);

enum { HALO__BROADCAST_INPUTS = 3 };

/* Several tensors brought to one shape (right-aligned, sizes equal or 1, as NumPy does), and the same
 * walk with as few dims as possible for kernels. */
typedef struct halo__broadcast {
  int32_t ndim;
  int64_t shape[HALO_MAX_DIMS]; /* of the result */
  int32_t walk_ndim;
  int64_t walk[HALO_MAX_DIMS]; /* merged shape */
  int64_t stride[HALO__BROADCAST_INPUTS][HALO_MAX_DIMS];
} halo__broadcast;

halo_status halo__broadcast_of(halo__broadcast *out, const char *name, halo_tensor *const *in,
                               int32_t n_in);

/* Sum t over the dims that broadcasting `like` to t's shape repeated; t itself when there are none. */
halo_status halo__sum_to(halo_tensor **out, halo_tensor *t, const halo_tensor *like);

/* New gradient of x: zero but for dy added at the positions `index` (contiguous i64, m along the
 * dim). */
halo_status halo__scatter_grad(halo_tensor **out, const halo_tensor *x, const halo__along *along,
                               halo_tensor *dy, halo_tensor *index, int64_t m);

/* A scalar tensor of the dtype and device of `like`. */
halo_status halo__scalar(halo_tensor **out, const halo_tensor *like, double value);

/* A parameter that must be a whole number in lo..hi. */
halo_status halo__whole(int64_t *out, const char *name, const char *param, double value, int64_t lo,
                        int64_t hi);

/* `passes` reads or writes of all of t, for the trace. */
static inline void halo__count_passes(const halo_tensor *t, double passes) {
  halo_trace_work(passes * (double)halo_tensor_count(t) * (double)halo_dtype_bytes(t->dtype), 0);
}

static inline const halo_kernels *halo__kernels_of(const halo_tensor *t) {
  return halo__kernels(halo__device(t));
}

#endif
