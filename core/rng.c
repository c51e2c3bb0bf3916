/* rng.c: counter-based random numbers for hosts and tensors (kernels/philox.h has the generator). */
#include "internal.h"

#include "kernels.h"
#include "philox.h"

uint64_t halo_random_u64(uint64_t seed, uint64_t stream, uint64_t index) {
  uint32_t r[4];
  halo__philox(seed, stream, index, r);
  return (uint64_t)r[0] << 32 | r[1];
}

double halo_random_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
  uint32_t r[4];
  halo__philox(seed, stream, index, r);
  return halo__philox_unit(r[0], r[1]);
}

typedef halo_status (*fill_fn)(halo_dtype, void *, int64_t, uint64_t, uint64_t, int64_t, double,
                               double);

/* Element i in row-major order gets number i, whatever the strides are. */
static halo_status fill_random(halo_tensor *t, const char *name, fill_fn fill, uint64_t seed,
                               uint64_t stream, double a, double b) {
  HALO_CHECK(t != NULL && halo__is_float(t->dtype), HALO_EARG, "%s: needs a floating tensor, got %s",
             name, halo__describe(t));
  if (halo_tensor_is_contiguous(t)) {
    return fill(t->dtype, halo__data(t), halo_tensor_count(t), seed, stream, 0, a, b);
  }
  halo_tensor *flat = NULL;
  HALO_TRY(halo__new_like(&flat, t));
  halo_status status = fill(t->dtype, halo__data(flat), halo_tensor_count(t), seed, stream, 0, a, b);
  if (status == HALO_OK) status = halo_tensor_copy(t, flat);
  halo_tensor_free(flat);
  return status;
}

halo_status halo_tensor_normal(halo_tensor *t, uint64_t seed, uint64_t stream, double mean,
                               double std) {
  const halo_device device = t != NULL ? halo__device(t) : HALO_CPU;
  return fill_random(t, "normal", halo__kernels(device)->random_normal, seed, stream, mean, std);
}

halo_status halo_tensor_uniform(halo_tensor *t, uint64_t seed, uint64_t stream, double lo,
                                double hi) {
  const halo_device device = t != NULL ? halo__device(t) : HALO_CPU;
  return fill_random(t, "uniform", halo__kernels(device)->random_uniform, seed, stream, lo, hi);
}
