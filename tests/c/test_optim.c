/* test_optim.c: AdamW against its definition in fp64, its flat buffers, and its refusals. */
#include "check.h"

enum { N = 3 };
static const int64_t counts[N] = {12, 5, 7};

/* The definition, one element at a time (PyTorch's order). */
static void reference_step(double *p, double *m, double *v, double g, int64_t step, double lr,
                           double b1, double b2, double eps, double decay) {
  *p -= lr * decay * *p;
  *m = b1 * *m + (1 - b1) * g;
  *v = b2 * *v + (1 - b2) * g * g;
  const double mhat = *m / (1 - pow(b1, (double)step)), vhat = *v / (1 - pow(b2, (double)step));
  *p -= lr * mhat / (sqrt(vhat) + eps);
}

static void make_params(halo_tensor **params, int32_t dtype) {
  for (int i = 0; i < N; i++) {
    CHECK_OK(halo_tensor_new(&params[i], dtype, HALO_CPU, 1, &counts[i]));
    CHECK_OK(halo_tensor_normal(params[i], 1, (uint64_t)i, 0, 1));
    CHECK_OK(halo_tensor_require_grad(params[i], 1));
  }
}

static void free_params(halo_tensor **params) {
  for (int i = 0; i < N; i++) halo_tensor_free(params[i]);
}

/* Ten steps in a dtype follow the definition within `bound` (absolute; values are of order 1). */
static void follows_definition(int32_t dtype, double bound) {
  halo_tensor *params[N];
  const double decay[N] = {1, 0, 0.5};
  make_params(params, dtype);
  double p[24], m[24] = {0}, v[24] = {0}, value, worst = 0;
  for (int i = 0, k = 0; i < N; i++) {
    for (int64_t e = 0; e < counts[i]; e++, k++) CHECK_OK(halo_tensor_get(params[i], e, &p[k]));
  }
  halo_adamw *o = NULL;
  CHECK_OK(halo_adamw_new(&o, params, decay, N, HALO_F32));
  CHECK((halo_adamw_master(o) != NULL) == (dtype == HALO_BF16));
  halo_tensor *flat = halo_adamw_flat_grad(o);
  CHECK(halo_tensor_count(flat) == 24 && halo_tensor_dtype(flat) == (dtype == HALO_F64 ? HALO_F64 : HALO_F32));
  CHECK(halo_adamw_offset(o, 0) == 0 && halo_adamw_offset(o, 1) == 12 && halo_adamw_offset(o, 3) == 24);
  for (int64_t step = 1; step <= 10; step++) {
    CHECK_OK(halo_tensor_normal(flat, 2, (uint64_t)step, 0, 3));
    for (int i = 0, k = 0; i < N; i++) {
      for (int64_t e = 0; e < counts[i]; e++, k++) {
        // The parameter's own gradient is the view of the flat one.
        CHECK_OK(halo_tensor_get(halo_tensor_grad(params[i]), e, &value));
        reference_step(&p[k], &m[k], &v[k], 0.25 * value, step, 0.01, 0.9, 0.95, 1e-8, 0.1 * decay[i]);
      }
    }
    CHECK_OK(halo_adamw_step(o, step, 0.01, 0.9, 0.95, 1e-8, 0.1, 0.25));
  }
  for (int i = 0, k = 0; i < N; i++) {
    for (int64_t e = 0; e < counts[i]; e++, k++) {
      CHECK_OK(halo_tensor_get(params[i], e, &value));
      worst = fmax(worst, fabs(value - p[k]) / fmax(1, fabs(p[k])));
      double master = value;
      if (dtype == HALO_BF16) {
        CHECK_OK(halo_tensor_get(halo_adamw_master(o), k, &master));
        CHECK(fabs(master - p[k]) < 1e-5);
        CHECK(fabs(master - value) <= fabs(master) / 256);
      }
    }
  }
  CHECK(worst <= bound);
  halo_adamw_free(o);
  free_params(params);
}

static void steps_follow_the_definition(void) {
  follows_definition(HALO_F64, 1e-13);
  follows_definition(HALO_F32, 1e-5);
  follows_definition(HALO_BF16, 4e-3);
}

/* 1 - 2^-12 at a time is below bf16's resolution at 1: only the master moves, until it shows. */
static void small_steps_are_not_lost_in_bf16(void) {
  const uint16_t one = 0x3f80;
  const int64_t n = 1;
  halo_tensor *p = NULL;
  halo_adamw *o = NULL;
  double value;
  CHECK_OK(halo_tensor_from(&p, HALO_BF16, HALO_CPU, 1, &n, &one));
  CHECK_OK(halo_tensor_require_grad(p, 1));
  CHECK_OK(halo_adamw_new(&o, &p, (double[]){0}, 1, HALO_F32));
  for (int64_t step = 1; step <= 32; step++) {
    CHECK_OK(halo_tensor_fill(halo_adamw_flat_grad(o), 1));
    CHECK_OK(halo_adamw_step(o, step, 1.0 / 4096, 0.9, 0.99, 1e-12, 0, 1));
  }
  CHECK_OK(halo_tensor_get(p, 0, &value));
  CHECK(fabs(value - (1 - 32.0 / 4096)) <= 1.0 / 512);
  CHECK(value < 1);
  halo_adamw_free(o);
  halo_tensor_free(p);
}

/* One large gradient, then none: v falls by a thousandth a step, far below bf16's resolution, and must
 * still fall to exp(-1) in the mean over elements. Two optimizers round alike. */
static void moments_in_bf16_decay(void) {
  const int64_t n = 4099;
  double mean[2] = {0, 0}, last[2];
  for (int32_t run = 0; run < 2; run++) {
    halo_tensor *p = NULL;
    halo_adamw *o = NULL;
    CHECK_OK(halo_tensor_zeros(&p, HALO_BF16, HALO_CPU, 1, &n));
    CHECK_OK(halo_tensor_require_grad(p, 1));
    CHECK_OK(halo_adamw_new(&o, &p, (double[]){0}, 1, HALO_BF16));
    CHECK(halo_tensor_dtype(halo_adamw_moment1(o)) == HALO_BF16);
    CHECK(halo_tensor_dtype(halo_adamw_flat_grad(o)) == HALO_F32);
    CHECK_OK(halo_tensor_fill(halo_adamw_flat_grad(o), 10));
    for (int64_t step = 1; step <= 1001; step++) {
      CHECK_OK(halo_adamw_step(o, step, 1e-4, 0.9, 0.999, 1e-8, 0, 1));
      if (step == 1) CHECK_OK(halo_adamw_zero_grad(o));
    }
    for (int64_t i = 0; i < n; i++) {
      CHECK_OK(halo_tensor_get(halo_adamw_moment2(o), i, &last[run]));
      mean[run] += last[run] / (double)n;
    }
    halo_adamw_free(o);
    halo_tensor_free(p);
  }
  CHECK(fabs(mean[0] / (0.1 * exp(-1.0)) - 1) < 0.01);
  CHECK(mean[0] == mean[1] && last[0] == last[1]);
}

static void norm_is_the_sum_of_squares(void) {
  const int64_t n = 100003;
  halo_tensor *p = NULL;
  halo_adamw *o = NULL;
  CHECK_OK(halo_tensor_zeros(&p, HALO_F32, HALO_CPU, 1, &n));
  CHECK_OK(halo_tensor_require_grad(p, 1));
  CHECK_OK(halo_adamw_new(&o, &p, (double[]){1}, 1, HALO_F32));
  halo_tensor *g = halo_adamw_flat_grad(o);
  CHECK_OK(halo_tensor_normal(g, 5, 0, 0, 1));
  const float *x = halo_tensor_data(g);
  double sum = 0, one = 0, many = 0;
  for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
  const int32_t threads = halo_threads();
  halo_set_threads(1);
  CHECK_OK(halo_adamw_grad_norm2(o, &one));
  halo_set_threads(3);
  CHECK_OK(halo_adamw_grad_norm2(o, &many));
  halo_set_threads(threads);
  CHECK(fabs(one - sum) <= 1e-10 * sum);
  CHECK(one == many); // bit for bit
  CHECK_OK(halo_adamw_zero_grad(o));
  CHECK_OK(halo_adamw_grad_norm2(o, &one));
  CHECK(one == 0);
  halo_adamw_free(o);
  halo_tensor_free(p);
}

/* A gradient that was there before the optimizer is kept; later ones are added to the same place. */
static void existing_gradients_move_in(void) {
  const int64_t n = 2;
  halo_tensor *p = NULL, *g = NULL;
  halo_adamw *o = NULL;
  CHECK_OK(halo_tensor_from(&p, HALO_F32, HALO_CPU, 1, &n, (float[]){1, 2}));
  CHECK_OK(halo_tensor_from(&g, HALO_F32, HALO_CPU, 1, &n, (float[]){3, 4}));
  CHECK_OK(halo_tensor_require_grad(p, 1));
  CHECK_OK(halo_tensor_set_grad(p, g));
  CHECK_OK(halo_adamw_new(&o, &p, (double[]){0}, 1, HALO_F32));
  double value;
  CHECK_OK(halo_tensor_get(halo_adamw_flat_grad(o), 1, &value));
  CHECK(value == 4 && halo_tensor_grad(p) != g);
  halo_adamw_free(o);
  CHECK(halo_tensor_grad(p) != NULL); // the view keeps the buffer alive
  halo_tensor_free(p);
  halo_tensor_free(g);
}

static void wrong_lists_are_refused(void) {
  halo_tensor *params[N], *twice[2], *wide = NULL;
  const double decay[N] = {0};
  halo_adamw *o = NULL;
  make_params(params, HALO_F32);
  twice[0] = twice[1] = params[0];
  CHECK_STATUS(halo_adamw_new(&o, twice, decay, 2, HALO_F32), HALO_EARG);
  CHECK(strstr(halo_error_message(), "0 and 1 share memory") != NULL);
  CHECK_OK(halo_tensor_zeros(&wide, HALO_F64, HALO_CPU, 1, counts));
  twice[1] = wide;
  CHECK_STATUS(halo_adamw_new(&o, twice, decay, 2, HALO_F32), HALO_EARG); // not a leaf that wants a gradient
  CHECK_OK(halo_tensor_require_grad(wide, 1));
  CHECK_STATUS(halo_adamw_new(&o, twice, decay, 2, HALO_F32), HALO_EARG);
  CHECK(strstr(halo_error_message(), "fp64 does not mix") != NULL);
  CHECK_STATUS(halo_adamw_new(&o, params, decay, 0, HALO_F32), HALO_EARG);
  CHECK_STATUS(halo_adamw_new(&o, params, decay, N, HALO_I32), HALO_EARG);
  CHECK(o == NULL);
  CHECK_OK(halo_adamw_new(&o, params, decay, N, HALO_F32));
  CHECK_STATUS(halo_adamw_step(o, 0, 0.1, 0.9, 0.95, 1e-8, 0, 1), HALO_EARG);
  CHECK_STATUS(halo_adamw_step(o, 1, 0.1, 1.0, 0.95, 1e-8, 0, 1), HALO_EARG);
  CHECK_STATUS(halo_adamw_step(o, 1, NAN, 0.9, 0.95, 1e-8, 0, 1), HALO_EARG);
  halo_adamw_free(o);
  // Every allocation may fail: a status, no leak, parameters untouched.
  int64_t failures = 0;
  for (;; failures++) {
    halo_memory_fail_after(failures);
    o = NULL;
    const halo_status status = halo_adamw_new(&o, params, decay, N, HALO_F32);
    halo_memory_fail_after(-1);
    if (status == HALO_OK) break;
    CHECK(status == HALO_ENOMEM && o == NULL);
    if (failures > 100) break;
  }
  CHECK(failures >= 3);
  halo_adamw_free(o);
  halo_tensor_free(wide);
  free_params(params);
}

int main(void) {
  RUN(steps_follow_the_definition);
  RUN(small_steps_are_not_lost_in_bf16);
  RUN(moments_in_bf16_decay);
  RUN(norm_is_the_sum_of_squares);
  RUN(existing_gradients_move_in);
  RUN(wrong_lists_are_refused);
  CHECK(halo_memory_live_bytes(HALO_CPU, -1) == 0);
  return check_report();
}
