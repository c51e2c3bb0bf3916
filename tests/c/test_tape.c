/* The tape with one hand-made op, y = a * b, so that it is tested apart from the op table. */
#include "check.h"
#include "internal.h"

static halo_status mul_forward(halo__call *c) {
  HALO_TRY(halo__new_like(&c->out[0], c->in[0]));
  const double *a = halo_tensor_data(c->in[0]), *b = halo_tensor_data(c->in[1]);
  double *y = halo_tensor_data(c->out[0]);
  for (int64_t i = 0; i < halo_tensor_count(c->in[0]); i++) y[i] = a[i] * b[i];
  return HALO_OK;
}

static halo_status mul_backward(halo__call *c) {
  for (int32_t k = 0; k < 2; k++) {
    if (!c->need_grad[k]) continue;
    HALO_TRY(halo__new_like(&c->grad_in[k], c->in[k]));
    const double *g = halo_tensor_data(c->grad_out[0]), *other = halo_tensor_data(c->in[1 - k]);
    double *d = halo_tensor_data(c->grad_in[k]);
    for (int64_t i = 0; i < halo_tensor_count(c->in[k]); i++) d[i] = g[i] * other[i];
  }
  return HALO_OK;
}

static halo_tensor *mul(halo_tensor *a, halo_tensor *b) {
  halo__call c = {.op = -1, .n_in = 2, .n_out = 1, .in = {a, b}};
  CHECK_OK(halo__run(&c, "test_mul", mul_forward, mul_backward));
  return c.out[0];
}

static halo_tensor *scalar(double v, bool leaf) {
  halo_tensor *t = NULL;
  CHECK_OK(halo_tensor_from(&t, HALO_F64, HALO_CPU, 0, NULL, &v));
  if (leaf) CHECK_OK(halo_tensor_require_grad(t, 1));
  return t;
}

static double value(const halo_tensor *t) {
  double v = NAN;
  if (t != NULL) CHECK_OK(halo_tensor_get(t, 0, &v));
  return v;
}

static void backward(halo_tensor *root) {
  halo_backward *b = NULL;
  int32_t event = -1;
  int64_t token = -1;
  CHECK_OK(halo_backward_begin(&b, root, NULL));
  CHECK_OK(halo_backward_next(b, &event, &token));
  CHECK(event == HALO_BACKWARD_DONE);
  halo_backward_free(b);
}

static void shared_inputs_add_up(void) {
  halo_tensor *x = scalar(3, true), *k = scalar(5, false);
  halo_tensor *x2 = mul(x, x), *x3 = mul(x2, x), *y = mul(x3, k); // 5 x^3
  CHECK(value(y) == 135);
  backward(y);
  CHECK(value(halo_tensor_grad(x)) == 135); // 15 x^2
  CHECK(halo_tensor_grad(k) == NULL);
  halo_tensor *y2 = mul(x, k);
  backward(y2);
  CHECK(value(halo_tensor_grad(x)) == 140); // gradients of leaves add
  halo_tensor *all[] = {x, k, x2, x3, y, y2};
  for (size_t i = 0; i < 6; i++) halo_tensor_free(all[i]);
  CHECK(halo_tape_live_nodes() == 0);
}

static void long_chains_free_without_recursion(void) {
  halo_tensor *x = scalar(1, true), *y = mul(x, x);
  for (int i = 0; i < 300000; i++) {
    halo_tensor *next = mul(y, x);
    halo_tensor_free(y);
    y = next;
  }
  CHECK(halo_tape_live_nodes() == 300001);
  halo_tensor_free(y);
  CHECK(halo_tape_live_nodes() == 0);
  halo_tensor_free(x);
}

static void used_tapes_and_wrong_roots_are_errors(void) {
  halo_tensor *x = scalar(2, true), *k = scalar(1, false), *y = mul(x, x), *z = mul(y, x);
  backward(y);
  halo_backward *b = NULL;
  int32_t event = 0;
  int64_t token = 0;
  CHECK_OK(halo_backward_begin(&b, z, NULL));
  CHECK_STATUS(halo_backward_next(b, &event, &token), HALO_ESTATE);
  CHECK(strstr(halo_error_message(), "already used") != NULL);
  halo_backward_free(b);
  CHECK_STATUS(halo_backward_begin(&b, k, NULL), HALO_ESTATE);
  CHECK_STATUS(halo_tensor_require_grad(z, 1), HALO_ESTATE);
  halo_tensor_free(z);
  halo_tensor_free(y);
  halo_tensor_free(k);
  halo_tensor_free(x);
  CHECK(halo_tape_live_nodes() == 0);
}

/* f(x) = w x^2, recomputed; loss = f(f(x)), so checkpoints nest in sequence. */
static halo_tensor *f(halo_tensor *x, halo_tensor *w) {
  halo_tensor *s = mul(x, x), *y = mul(s, w);
  halo_tensor_free(s);
  return y;
}

static halo_tensor *checkpointed(halo_tensor *x, halo_tensor *w, int64_t token) {
  halo_tape_set_enabled(0);
  halo_tensor *y = f(x, w);
  halo_tape_set_enabled(1);
  CHECK_OK(halo_tape_checkpoint(&y, 1, &x, 1, token));
  return y;
}

static void recompute_gives_the_same_gradients(void) {
  halo_tensor *x = scalar(1.5, true), *w = scalar(0.7, true);
  halo_tensor *a = f(x, w), *b = f(a, w);
  backward(b);
  const double dx = value(halo_tensor_grad(x)), dw = value(halo_tensor_grad(w));
  halo_tensor_free(a);
  halo_tensor_free(b);
  CHECK_OK(halo_tensor_set_grad(x, NULL));
  CHECK_OK(halo_tensor_set_grad(w, NULL));
  a = checkpointed(x, w, 7);
  b = checkpointed(a, w, 8);
  halo_backward *back = NULL;
  int32_t event = 0, n = 0;
  int64_t token = 0, expected[2] = {8, 7};
  CHECK_OK(halo_backward_begin(&back, b, NULL));
  for (int i = 0; i < 2; i++) {
    CHECK_OK(halo_backward_next(back, &event, &token));
    CHECK(event == HALO_BACKWARD_RECOMPUTE && token == expected[i]);
    CHECK_STATUS(halo_backward_next(back, &event, &token), HALO_ESTATE);
    halo_tensor *in[HALO_MAX_INPUTS];
    CHECK_OK(halo_backward_inputs(back, in, HALO_MAX_INPUTS, &n));
    CHECK(n == 1 && halo_tensor_requires_grad(in[0]));
    halo_tensor *y = f(in[0], w);
    CHECK_OK(halo_backward_recomputed(back, &y, 1));
    halo_tensor_free(y);
  }
  CHECK_OK(halo_backward_next(back, &event, &token));
  CHECK(event == HALO_BACKWARD_DONE);
  halo_backward_free(back);
  CHECK(value(halo_tensor_grad(x)) == dx && value(halo_tensor_grad(w)) == dw);
  // An abandoned backward frees everything.
  halo_tensor *c = checkpointed(b, w, 9);
  CHECK_OK(halo_backward_begin(&back, c, NULL));
  CHECK_OK(halo_backward_next(back, &event, &token));
  halo_backward_free(back);
  halo_tensor *all[] = {a, b, c, x, w};
  for (size_t i = 0; i < 5; i++) halo_tensor_free(all[i]);
  CHECK(halo_tape_live_nodes() == 0);
}

static void nothing_is_recorded_when_off(void) {
  halo_tensor *x = scalar(2, true);
  CHECK(halo_tape_set_enabled(0) == 1);
  halo_tensor *y = mul(x, x);
  CHECK(!halo_tensor_requires_grad(y) && halo_tape_live_nodes() == 0);
  CHECK(halo_tape_set_enabled(1) == 0);
  halo_tensor_free(y);
  halo_tensor_free(x);
}

static void allocation_failures_leave_nothing_behind(void) {
  halo_tensor *x = scalar(2, true);
  for (int64_t n = 0; n < 40; n++) {
    halo__call c = {.op = -1, .n_in = 2, .n_out = 1, .in = {x, x}};
    halo_memory_fail_after(n);
    halo_status s = halo__run(&c, "test_mul", mul_forward, mul_backward);
    if (s == HALO_OK) {
      halo_backward *b = NULL;
      int32_t event = 0;
      int64_t token = 0;
      s = halo_backward_begin(&b, c.out[0], NULL);
      if (s == HALO_OK) s = halo_backward_next(b, &event, &token);
      halo_backward_free(b);
    }
    halo_memory_fail_after(-1);
    halo_tensor_free(c.out[0]);
    CHECK(halo_tape_live_nodes() == 0);
    CHECK_OK(halo_tensor_set_grad(x, NULL));
    if (s == HALO_OK) {
      CHECK(n > 2);
      break;
    }
    CHECK(s == HALO_ENOMEM);
  }
  halo_tensor_free(x);
}

int main(void) {
  RUN(shared_inputs_add_up);
  RUN(long_chains_free_without_recursion);
  RUN(used_tapes_and_wrong_roots_are_errors);
  RUN(recompute_gives_the_same_gradients);
  RUN(nothing_is_recorded_when_off);
  RUN(allocation_failures_leave_nothing_behind);
  return check_report();
}
