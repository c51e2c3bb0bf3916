/* test_nn.c: the training ops against central differences (fp64) and against fp64 (fp32, bf16).
 *
 * One checker for all: given an op, inputs and which of them want a gradient, the loss is sum(r * y)
 * with random r, so every output element counts. h = 6e-6 * max(1,|x|) (near eps^(1/3)); the error of
 * an element is relative to |g| + 1e-2 * max|g|, bound 1e-6. Inputs are checked as given (also
 * strided) and gradients are asked for both without and with a gradient buffer at hand.
 */
#include "check.h"
#include "internal.h"
#include "kernels.h"

static int32_t op_id(const char *name) {
  const int32_t op = halo_op_find(name);
  if (op < 0) {
    fprintf(stderr, "no op %s\n", name);
    exit(1);
  }
  return op;
}

static uint64_t stream;

static halo_tensor *make(int32_t dtype, int32_t ndim, const int64_t *shape) {
  halo_tensor *t = NULL;
  CHECK_OK(halo_tensor_new(&t, dtype, HALO_CPU, ndim, shape));
  CHECK_OK(halo_tensor_normal(t, 7, stream++, 0, 1));
  return t;
}
#define SHAPE(...) (int32_t)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

static halo_tensor *integers(int32_t dtype, int32_t ndim, const int64_t *shape, int64_t limit) {
  halo_tensor *t = NULL;
  CHECK_OK(halo_tensor_new(&t, dtype, HALO_CPU, ndim, shape));
  for (int64_t i = 0; i < halo_tensor_count(t); i++) {
    const double v = (double)(halo_random_u64(3, stream, (uint64_t)i) % (uint64_t)limit);
    CHECK_OK(halo_tensor_set(t, i, v));
  }
  stream++;
  return t;
}

/* A window on a larger random tensor: the last dim has stride `step`, rows lie `gap` apart. */
static halo_tensor *strided(int32_t ndim, const int64_t *shape, int64_t step, int64_t gap) {
  int64_t stride[HALO_MAX_DIMS], extent = shape[ndim - 1] * step + gap;
  stride[ndim - 1] = step;
  for (int32_t d = ndim - 2; d >= 0; d--) {
    stride[d] = extent;
    extent *= shape[d];
  }
  extent += 3;
  halo_tensor *all = make(HALO_F64, 1, &extent), *view = NULL;
  CHECK_OK(halo__view(&view, all, ndim, shape, stride, 3));
  halo_tensor_free(all);
  return view;
}

static halo_tensor *cast(const halo_tensor *t, int32_t dtype) {
  halo_tensor *y = NULL;
  int64_t shape[HALO_MAX_DIMS];
  const int32_t ndim = halo_tensor_ndim(t);
  for (int32_t d = 0; d < ndim; d++) shape[d] = halo_tensor_size(t, d);
  CHECK_OK(halo_tensor_new(&y, dtype, HALO_CPU, ndim, shape));
  CHECK_OK(halo_tensor_copy(y, t));
  return y;
}

typedef struct test_case {
  const char *op;
  int32_t n_in, n_param;
  halo_tensor *in[4];
  bool wants[4];
  double param[4];
} test_case;

static void free_case(test_case *k) {
  for (int32_t i = 0; i < k->n_in; i++) halo_tensor_free(k->in[i]);
}

static halo_tensor *forward(const test_case *k) {
  halo_tensor *out[HALO_MAX_OUTPUTS] = {0};
  CHECK_OK(halo_op(out, op_id(k->op), k->in, k->n_in, k->param, k->n_param));
  for (int32_t i = 1; i < HALO_MAX_OUTPUTS; i++) halo_tensor_free(out[i]);
  return out[0];
}

static double weighted_sum(const halo_tensor *y, const halo_tensor *r) {
  double sum = 0, a, b;
  for (int64_t i = 0; i < halo_tensor_count(y); i++) {
    halo_tensor_get(y, i, &a);
    halo_tensor_get(r, i, &b);
    sum += a * b;
  }
  return sum;
}

static void backward(halo_tensor *root, halo_tensor *seed) {
  halo_backward *b = NULL;
  int32_t event = -1;
  int64_t token;
  CHECK_OK(halo_backward_begin(&b, root, seed));
  CHECK_OK(halo_backward_next(b, &event, &token));
  CHECK(event == HALO_BACKWARD_DONE);
  halo_backward_free(b);
}

static halo_tensor *seed_for(const halo_tensor *y) {
  halo_tensor *r = cast(y, halo_tensor_dtype(y));
  CHECK_OK(halo_tensor_normal(r, 11, stream++, 0, 1));
  return r;
}

/* Largest error of input i's gradient against central differences. */
static double difference_error(const test_case *k, int32_t i, const halo_tensor *r,
                               const halo_tensor *grad) {
  const int64_t n = halo_tensor_count(k->in[i]);
  double largest = 0, worst = 0, g, x;
  for (int64_t e = 0; e < n; e++) {
    halo_tensor_get(grad, e, &g);
    largest = fmax(largest, fabs(g));
  }
  const int32_t was = halo_tape_set_enabled(0);
  for (int64_t e = 0; e < n; e++) {
    halo_tensor_get(k->in[i], e, &x);
    const double h = 6e-6 * fmax(1, fabs(x));
    double value[2];
    for (int s = 0; s < 2; s++) {
      halo_tensor_set(k->in[i], e, s ? x + h : x - h);
      halo_tensor *y = forward(k);
      value[s] = weighted_sum(y, r);
      halo_tensor_free(y);
    }
    halo_tensor_set(k->in[i], e, x);
    halo_tensor_get(grad, e, &g);
    const double numeric = (value[1] - value[0]) / (2 * h);
    worst = fmax(worst, fabs(numeric - g) / (fabs(g) + 1e-2 * largest + 1e-10));
  }
  halo_tape_set_enabled(was);
  return worst;
}

/* Gradients of an fp64 case, and that a second backward adds the same again into the buffer. */
static void check_gradients(test_case *k) {
  for (int32_t i = 0; i < k->n_in; i++) {
    if (k->in[i] != NULL && k->wants[i]) CHECK_OK(halo_tensor_require_grad(k->in[i], 1));
  }
  halo_tensor *y = forward(k), *r = seed_for(y);
  backward(y, r);
  halo_tensor_free(y);
  for (int32_t i = 0; i < k->n_in; i++) {
    if (k->in[i] == NULL || !k->wants[i]) continue;
    halo_tensor *grad = halo_tensor_grad(k->in[i]);
    CHECK(grad != NULL);
    if (grad == NULL) continue;
    const double error = difference_error(k, i, r, grad);
    CHECK(error <= 1e-6);
    if (error > 1e-6) fprintf(stderr, "  %s input %d: error %g\n", k->op, i, error);
    halo_tensor *once = cast(grad, HALO_F64);
    // The second time there is a buffer to add to.
    y = forward(k);
    backward(y, r);
    halo_tensor_free(y);
    double a, b, worst = 0, largest = 0;
    for (int64_t e = 0; e < halo_tensor_count(once); e++) {
      halo_tensor_get(once, e, &a);
      halo_tensor_get(halo_tensor_grad(k->in[i]), e, &b);
      worst = fmax(worst, fabs(b - 2 * a));
      largest = fmax(largest, fabs(a));
    }
    CHECK(worst <= 1e-12 * (1 + largest));
    halo_tensor_free(once);
    for (int32_t j = 0; j < k->n_in; j++) {
      if (k->in[j] != NULL && j != i && halo_tensor_grad(k->in[j]) != NULL) {
        CHECK_OK(halo_tensor_scale(halo_tensor_grad(k->in[j]), 0.5));
      }
    }
    CHECK_OK(halo_tensor_scale(halo_tensor_grad(k->in[i]), 0.5));
  }
  halo_tensor_free(r);
}

static double relative(const halo_tensor *a, const halo_tensor *truth) {
  double x, y, d = 0, n = 0;
  for (int64_t i = 0; i < halo_tensor_count(truth); i++) {
    halo_tensor_get(a, i, &x);
    halo_tensor_get(truth, i, &y);
    d += (x - y) * (x - y);
    n += y * y;
  }
  return sqrt(d) / (sqrt(n) + 1e-30);
}

/* The same case in another dtype, on inputs that this dtype holds exactly, against fp64: results and
 * gradients within `bound` (Frobenius). */
static void check_dtype(const test_case *k, int32_t dtype, double bound) {
  test_case low = *k, high = *k;
  for (int32_t i = 0; i < k->n_in; i++) {
    if (k->in[i] == NULL) continue;
    const int32_t own = halo_tensor_dtype(k->in[i]);
    low.in[i] = cast(k->in[i], own == HALO_F64 ? dtype : own);
    high.in[i] = cast(low.in[i], own);
    if (!k->wants[i]) continue;
    CHECK_OK(halo_tensor_require_grad(low.in[i], 1));
    CHECK_OK(halo_tensor_require_grad(high.in[i], 1));
  }
  halo_tensor *y = forward(&low), *truth = forward(&high);
  CHECK(relative(y, truth) <= bound);
  halo_tensor *r = seed_for(y), *r64 = cast(r, HALO_F64);
  backward(y, r);
  backward(truth, r64);
  for (int32_t i = 0; i < k->n_in; i++) {
    if (k->in[i] == NULL || !k->wants[i]) continue;
    const double error = relative(halo_tensor_grad(low.in[i]), halo_tensor_grad(high.in[i]));
    CHECK(error <= bound);
    if (error > bound) fprintf(stderr, "  %s input %d in %s: %g\n", k->op, i, halo_dtype_name(dtype), error);
  }
  halo_tensor_free(y);
  halo_tensor_free(truth);
  halo_tensor_free(r);
  halo_tensor_free(r64);
  free_case(&low);
  free_case(&high);
}

/* Forward and backward with every allocation failing in turn: a status, no crash, and nothing left. */
static void survives_failed_allocations(const test_case *k) {
  for (int32_t i = 0; i < k->n_in; i++) {
    if (k->in[i] == NULL || !k->wants[i]) continue;
    CHECK_OK(halo_tensor_require_grad(k->in[i], 1));
    CHECK_OK(halo_tensor_set_grad(k->in[i], NULL));
  }
  const int64_t before = halo_memory_live_bytes(HALO_CPU, -1);
  for (int64_t n = 0;; n++) {
    halo_tensor *out[HALO_MAX_OUTPUTS] = {0};
    halo_backward *b = NULL;
    int32_t event = -1;
    int64_t token;
    halo_memory_fail_after(n);
    halo_status status = halo_op(out, op_id(k->op), k->in, k->n_in, k->param, k->n_param);
    if (status == HALO_OK) status = halo_backward_begin(&b, out[0], NULL);
    if (status == HALO_OK) status = halo_backward_next(b, &event, &token);
    halo_memory_fail_after(-1);
    halo_backward_free(b);
    for (int32_t i = 0; i < HALO_MAX_OUTPUTS; i++) halo_tensor_free(out[i]);
    for (int32_t i = 0; i < k->n_in; i++) {
      if (k->in[i] != NULL && k->wants[i]) CHECK_OK(halo_tensor_set_grad(k->in[i], NULL));
    }
    CHECK(halo_memory_live_bytes(HALO_CPU, -1) == before);
    CHECK(halo_tape_live_nodes() == 0);
    if (status == HALO_OK) {
      CHECK(n > 0); // something did fail before
      break;
    }
    CHECK(status == HALO_ENOMEM);
    if (n > 200) {
      CHECK(!"the failures never end");
      break;
    }
  }
}

/* Everything about one case: gradients, fp32, bf16 (one rounding of a result is 2^-9; a few). */
static void check_case(test_case k) {
  check_dtype(&k, HALO_F32, 1e-5);
  check_dtype(&k, HALO_BF16, 1.2e-2);
  check_gradients(&k);
  survives_failed_allocations(&k);
  free_case(&k);
}

static void embedding_is_a_lookup(void) {
  static const int64_t sizes[][3] = {{1, 1, 1}, {5, 3, 1}, {7, 13, 67}, {3, 0, 5}, {9, 33, 130}};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    const int64_t *s = sizes[i];
    check_case((test_case){.op = "embedding", .n_in = 2,
                           .in = {make(HALO_F64, SHAPE(s[0], s[2])),
                                  integers(i % 2 ? HALO_I32 : HALO_I64, SHAPE(s[1]), s[0])},
                           .wants = {true}});
  }
  test_case bad = {.op = "embedding", .n_in = 2,
                   .in = {make(HALO_F32, SHAPE(4, 2)), integers(HALO_I64, SHAPE(2, 3), 4)}};
  halo_tensor *out = NULL;
  CHECK_OK(halo_tensor_set(bad.in[1], 4, 4));
  CHECK_STATUS(halo_op(&out, op_id("embedding"), bad.in, 2, NULL, 0), HALO_EARG);
  CHECK(strstr(halo_error_message(), "id 4 at position 4") != NULL);
  CHECK_OK(halo_tensor_set(bad.in[1], 4, -1));
  CHECK_STATUS(halo_op(&out, op_id("embedding"), bad.in, 2, NULL, 0), HALO_EARG);
  free_case(&bad);
}

static void linear_is_a_product(void) {
  static const int64_t sizes[][3] = {{1, 1, 1}, {3, 5, 7}, {17, 1, 9}, {1, 33, 2}, {0, 4, 3}, {65, 19, 70}};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    const int64_t *s = sizes[i];
    check_case((test_case){.op = "linear", .n_in = 4,
                           .in = {make(HALO_F64, SHAPE(s[0], s[1])), make(HALO_F64, SHAPE(s[2], s[1])),
                                  i % 2 ? make(HALO_F64, SHAPE(s[2])) : NULL},
                           .wants = {true, true, true}});
  }
  check_case((test_case){.op = "linear", .n_in = 4,
                         .in = {make(HALO_F64, SHAPE(2, 3, 5)), make(HALO_F64, SHAPE(4, 5)), NULL},
                         .wants = {true, true}});
  // One row and no leading dims; frozen weight; frozen input.
  check_case((test_case){.op = "linear", .n_in = 4,
                         .in = {make(HALO_F64, SHAPE(6)), make(HALO_F64, SHAPE(4, 6)), NULL},
                         .wants = {true, false}});
  check_case((test_case){.op = "linear", .n_in = 4,
                         .in = {make(HALO_F64, SHAPE(3, 6)), make(HALO_F64, SHAPE(4, 6)), NULL},
                         .wants = {false, true}});
}

static void rmsnorm_has_its_gradient(void) {
  static const int64_t sizes[][2] = {{1, 1}, {3, 5}, {130, 7}, {2, 129}, {0, 8}};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    const int64_t *s = sizes[i];
    check_case((test_case){.op = "rmsnorm", .n_in = 2, .n_param = 1,
                           .in = {make(HALO_F64, SHAPE(s[0], s[1])), make(HALO_F64, SHAPE(s[1]))},
                           .wants = {true, true}, .param = {0.1}});
  }
}

static test_case rope_case(int64_t b, int64_t t, int64_t h, int64_t d, int64_t r, bool per_batch) {
  halo_tensor *in[2] = {integers(HALO_I64, SHAPE(per_batch ? b : 1, t), 50), make(HALO_F64, SHAPE(r))};
  halo_tensor *table[2] = {0};
  const double param[3] = {1.25, 0, HALO_F64};
  CHECK_OK(halo_op(table, op_id("rope_table"), in, 2, param, 3));
  halo_tensor_free(in[0]);
  halo_tensor_free(in[1]);
  return (test_case){.op = "rope", .n_in = 3,
                     .in = {make(HALO_F64, SHAPE(b, t, h, d)), table[0], table[1]}, .wants = {true}};
}

static void rope_rotates(void) {
  check_case(rope_case(1, 1, 1, 2, 1, false));
  check_case(rope_case(2, 5, 3, 8, 4, true));
  check_case(rope_case(3, 4, 2, 7, 2, false)); // partial, odd
  check_case(rope_case(2, 0, 2, 4, 2, true));
  // A rotation by scale 1 keeps lengths: |y| = 1.25 |x|.
  test_case k = rope_case(1, 3, 2, 6, 3, false);
  halo_tensor *y = forward(&k);
  CHECK(fabs(sqrt(weighted_sum(y, y) / weighted_sum(k.in[0], k.in[0])) - 1.25) < 1e-12);
  halo_tensor_free(y);
  free_case(&k);
}

static void rope_table_rounds_like_transformers(void) {
  halo_tensor *in[2] = {NULL, NULL}, *out[2] = {0}, *exact[2] = {0};
  const int64_t position = 524287;
  const double f = 0.7498942093324559; // not an fp32 number
  const int64_t one = 1;
  CHECK_OK(halo_tensor_from(&in[0], HALO_I64, HALO_CPU, 1, &one, &position));
  CHECK_OK(halo_tensor_from(&in[1], HALO_F64, HALO_CPU, 1, &one, &f));
  CHECK_OK(halo_op(out, op_id("rope_table"), in, 2, (double[]){1, 0, HALO_F64}, 3));
  CHECK_OK(halo_op(exact, op_id("rope_table"), in, 2, (double[]){2, 1, HALO_F64}, 3));
  double c, s;
  CHECK_OK(halo_tensor_get(out[0], 0, &c));
  CHECK_OK(halo_tensor_get(out[1], 0, &s));
  const float angle = (float)position * (float)f;
  CHECK(c == cos((double)angle) && s == sin((double)angle));
  CHECK_OK(halo_tensor_get(exact[0], 0, &c));
  CHECK_OK(halo_tensor_get(exact[1], 0, &s));
  CHECK(c == 2 * cos((double)position * f) && s == 2 * sin((double)position * f));
  for (int i = 0; i < 2; i++) {
    halo_tensor_free(in[i]);
    halo_tensor_free(out[i]);
    halo_tensor_free(exact[i]);
  }
}

static void swiglu_has_its_gradient(void) {
  static const int64_t sizes[][2] = {{1, 1}, {3, 5}, {7, 65}, {0, 3}};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    const int64_t *s = sizes[i];
    check_case((test_case){.op = "swiglu", .n_in = 2,
                           .in = {make(HALO_F64, SHAPE(s[0], s[1])), make(HALO_F64, SHAPE(s[0], s[1]))},
                           .wants = {true, true}});
    check_case((test_case){.op = "swiglu_packed", .n_in = 1,
                           .in = {make(HALO_F64, SHAPE(s[0], 2 * s[1]))}, .wants = {true}});
  }
}

/* Slices of packed projections and transposes: inputs that are not contiguous. */
static void strided_inputs_are_seen_right(void) {
  for (int64_t step = 1; step <= 2; step++) {
    check_case((test_case){.op = "linear", .n_in = 4,
                           .in = {strided(SHAPE(2, 3, 5), step, 4), strided(SHAPE(4, 5), step, 2),
                                  strided(SHAPE(4), step, 0)},
                           .wants = {true, true, true}});
    check_case((test_case){.op = "rmsnorm", .n_in = 2, .n_param = 1,
                           .in = {strided(SHAPE(3, 2, 6), step, 1), strided(SHAPE(6), step, 1)},
                           .wants = {true, true}, .param = {0.1}});
    check_case((test_case){.op = "swiglu", .n_in = 2,
                           .in = {strided(SHAPE(3, 5), step, 1), strided(SHAPE(3, 5), 1, 0)},
                           .wants = {true, true}});
    check_case((test_case){.op = "swiglu_packed", .n_in = 1, .in = {strided(SHAPE(3, 6), step, 5)},
                           .wants = {true}});
    test_case k = rope_case(2, 3, 2, 6, 2, true);
    halo_tensor_free(k.in[0]);
    k.in[0] = strided(SHAPE(2, 3, 2, 6), step, 7);
    check_case(k);
    check_case((test_case){.op = "linear_cross_entropy", .n_in = 4, .n_param = 3,
                           .in = {strided(SHAPE(5, 3), step, 2), strided(SHAPE(7, 3), step, 1),
                                  integers(HALO_I32, SHAPE(5), 7)},
                           .wants = {true, true}, .param = {2, -100, 1}});
    check_case((test_case){.op = "embedding", .n_in = 2,
                           .in = {strided(SHAPE(5, 3), step, 2), integers(HALO_I32, SHAPE(4, 2), 5)},
                           .wants = {true}});
  }
  // Rows out of order: dims swapped, so that no single stride leads from row to row.
  const int64_t shape[3] = {3, 2, 5}, stride[3] = {5, 15, 1};
  halo_tensor *all = make(HALO_F64, SHAPE(30)), *view = NULL;
  CHECK_OK(halo__view(&view, all, 3, shape, stride, 0));
  halo_tensor_free(all);
  check_case((test_case){.op = "linear", .n_in = 4, .in = {view, make(HALO_F64, SHAPE(4, 5)), NULL},
                         .wants = {true, true}});
}

static halo_tensor *labels_for(int64_t rows, int64_t vocab, int ignored_every) {
  halo_tensor *t = integers(HALO_I64, SHAPE(rows), vocab);
  for (int64_t i = 0; ignored_every > 0 && i < rows; i += ignored_every) halo_tensor_set(t, i, -100);
  return t;
}

/* NULL, or a weight per row; every third is 0. */
static halo_tensor *weights_for(int64_t rows, bool is_weighted) {
  halo_tensor *t = NULL;
  if (!is_weighted) return NULL;
  CHECK_OK(halo_tensor_new(&t, HALO_F64, HALO_CPU, 1, &rows));
  CHECK_OK(halo_tensor_uniform(t, 5, stream++, 0.1, 20));
  for (int64_t i = 1; i < rows; i += 3) halo_tensor_set(t, i, 0);
  return t;
}

static void losses_have_their_gradients(void) {
  static const int64_t sizes[][3] = {{1, 1, 1}, {5, 3, 7}, {11, 6, 33}, {2, 1, 1030}, {0, 3, 4}};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    const int64_t *s = sizes[i];
    for (int every = 0; every <= 3; every++) { // none, all, every second, every third ignored
      if (s[2] > 100 && every > 0) continue; // long rows only: several blocks of the sum
      for (int weighted = 0; weighted < 2; weighted++) {
        check_case((test_case){.op = "cross_entropy", .n_in = 3, .n_param = 1,
                               .in = {make(HALO_F64, SHAPE(s[0], s[2])),
                                      labels_for(s[0], s[2], every), weights_for(s[0], weighted)},
                               .wants = {true}, .param = {-100}});
        for (int save = 0; save < 2; save++) {
          for (int64_t chunk = 0; chunk <= (s[2] > 100 ? 0 : 4); chunk += 2) {
            check_case((test_case){.op = "linear_cross_entropy", .n_in = 4, .n_param = 3,
                                   .in = {make(HALO_F64, SHAPE(s[0], s[1])),
                                          make(HALO_F64, SHAPE(s[2], s[1])),
                                          labels_for(s[0], s[2], every), weights_for(s[0], weighted)},
                                   .wants = {true, true}, .param = {(double)chunk, -100, save}});
          }
        }
      }
    }
  }
}

/* Weighted losses against the losses row by row: the sums, their dtypes, and that a row of weight 0 is
 * a row without a label; weights of 1 are no weights. */
static void weights_multiply_losses(void) {
  enum { ROWS = 23, COLS = 5, VOCAB = 37 };
  halo_tensor *x = make(HALO_F64, SHAPE(ROWS, COLS)), *w = make(HALO_F64, SHAPE(VOCAB, COLS));
  halo_tensor *labels = labels_for(ROWS, VOCAB, 4), *weights = weights_for(ROWS, true), *z = NULL, *nll = NULL;
  CHECK_OK(halo_op(&z, op_id("linear"), (halo_tensor *[]){x, w, NULL, NULL}, 4, NULL, 0));
  CHECK_OK(halo_op(&nll, op_id("linear_token_loss"), (halo_tensor *[]){x, w, labels}, 3, (double[]){0, -100}, 2));
  double sum = 0, total = 0, label, weight, loss;
  for (int64_t i = 0; i < ROWS; i++) {
    CHECK_OK(halo_tensor_get(labels, i, &label));
    CHECK_OK(halo_tensor_get(weights, i, &weight));
    CHECK_OK(halo_tensor_get(nll, i, &loss));
    sum += weight * loss;
    total += label == -100 ? 0 : weight;
  }
  CHECK(total > 0 && sum > 0);
  halo_tensor *one = cast(weights, HALO_F64), *single = cast(x, HALO_F32), *matrix = cast(w, HALO_F32);
  CHECK_OK(halo_tensor_fill(one, 1));
  for (int form = 0; form < 4; form++) { // cross_entropy; linear_cross_entropy; weights of 1; fp32
    halo_tensor *out[2] = {0};
    const double p[] = {3, -100, 1};
    halo_tensor *xs = form == 3 ? single : x, *ws = form == 3 ? matrix : w;
    CHECK_OK(form == 0
                 ? halo_op(out, op_id("cross_entropy"), (halo_tensor *[]){z, labels, weights}, 3, (double[]){-100}, 1)
                 : halo_op(out, op_id("linear_cross_entropy"),
                           (halo_tensor *[]){xs, ws, labels, form == 2 ? one : weights}, 4, p, 3));
    double a, b;
    CHECK_OK(halo_tensor_get(out[0], 0, &a));
    CHECK_OK(halo_tensor_get(out[1], 0, &b));
    CHECK(halo_tensor_dtype(out[1]) == halo_tensor_dtype(out[0]));
    if (form == 2) {
      halo_tensor *plain[2] = {0};
      double c, n;
      CHECK_OK(halo_op(plain, op_id("linear_cross_entropy"), (halo_tensor *[]){x, w, labels, NULL}, 4, p, 3));
      CHECK_OK(halo_tensor_get(plain[0], 0, &c));
      CHECK_OK(halo_tensor_get(plain[1], 0, &n));
      CHECK(a == c && b == n && n == 17 && halo_tensor_dtype(plain[1]) == HALO_I64);
      halo_tensor_free(plain[0]);
      halo_tensor_free(plain[1]);
    } else {
      const double bound = form == 3 ? 1e-5 : 1e-12;
      CHECK(fabs(a - sum) < bound * sum && fabs(b - total) < bound * total);
    }
    halo_tensor_free(out[0]);
    halo_tensor_free(out[1]);
  }
  halo_tensor *none[2] = {0};
  CHECK_OK(halo_tensor_set(weights, 5, -1));
  CHECK_STATUS(halo_op(none, op_id("cross_entropy"), (halo_tensor *[]){z, labels, weights}, 3, (double[]){-100}, 1),
               HALO_EARG);
  CHECK(strstr(halo_error_message(), "weight -1 at position 5") != NULL);
  CHECK_OK(halo_tensor_set(weights, 5, NAN));
  CHECK_STATUS(halo_op(none, op_id("cross_entropy"), (halo_tensor *[]){z, labels, weights}, 3, (double[]){-100}, 1),
               HALO_EARG);
  CHECK_STATUS(halo_op(none, op_id("cross_entropy"), (halo_tensor *[]){z, labels, labels}, 3, (double[]){-100}, 1),
               HALO_EARG);
  CHECK_OK(halo_tensor_require_grad(one, 1));
  CHECK_STATUS(halo_op(none, op_id("cross_entropy"), (halo_tensor *[]){z, labels, one}, 3, (double[]){-100}, 1),
               HALO_EARG);
  halo_tensor *all[] = {x, w, labels, weights, z, nll, one, single, matrix};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) halo_tensor_free(all[i]);
}

/* The chunked loss is the plain loss of the plain logits, row by row too. */
static void chunked_loss_is_the_loss(void) {
  halo_tensor *x = make(HALO_F64, SHAPE(2, 11, 5)), *w = make(HALO_F64, SHAPE(37, 5));
  halo_tensor *flat = labels_for(22, 37, 5), *labels = NULL, *z = NULL, *nll = NULL;
  halo_tensor *plain[2] = {0}, *chunked[2] = {0};
  int64_t ids[22];
  CHECK_OK(halo_tensor_read(flat, ids));
  CHECK_OK(halo_tensor_from(&labels, HALO_I64, HALO_CPU, SHAPE(2, 11), ids));
  CHECK_OK(halo_op(&z, op_id("linear"), (halo_tensor *[]){x, w, NULL, NULL}, 4, NULL, 0));
  CHECK_OK(halo_op(plain, op_id("cross_entropy"), (halo_tensor *[]){z, labels, NULL}, 3, (double[]){-100}, 1));
  CHECK_OK(halo_op(chunked, op_id("linear_cross_entropy"), (halo_tensor *[]){x, w, labels, NULL}, 4,
                   (double[]){3, -100, 1}, 3));
  CHECK_OK(halo_op(&nll, op_id("linear_token_loss"), (halo_tensor *[]){x, w, labels}, 3,
                   (double[]){4, -100}, 2));
  double a, b, sum = 0, by_hand = 0;
  CHECK_OK(halo_tensor_get(plain[0], 0, &a));
  CHECK_OK(halo_tensor_get(chunked[0], 0, &b));
  for (int64_t i = 0; i < 22; i++) {
    double loss, v, total = 0;
    CHECK_OK(halo_tensor_get(nll, i, &loss));
    sum += loss;
    CHECK((ids[i] != -100) == (loss != 0));
    if (ids[i] == -100) continue;
    for (int64_t j = 0; j < 37; j++) {
      CHECK_OK(halo_tensor_get(z, i * 37 + j, &v));
      total += exp(v);
    }
    CHECK_OK(halo_tensor_get(z, i * 37 + ids[i], &v));
    by_hand += log(total) - v;
  }
  CHECK(fabs(a - b) < 1e-11 && fabs(a - sum) < 1e-11 && fabs(a - by_hand) < 1e-11);
  CHECK_OK(halo_tensor_get(plain[1], 0, &a));
  CHECK_OK(halo_tensor_get(chunked[1], 0, &b));
  CHECK(a == 17 && b == 17 && halo_tensor_dtype(plain[1]) == HALO_I64);
  CHECK_OK(halo_tensor_set(labels, 3, 37));
  halo_tensor *none[2] = {0};
  CHECK_STATUS(halo_op(none, op_id("linear_cross_entropy"), (halo_tensor *[]){x, w, labels, NULL}, 4,
                       (double[]){0, -100, 1}, 3), HALO_EARG);
  CHECK(strstr(halo_error_message(), "label 37 at position 3") != NULL);
  halo_tensor *all[] = {x, w, flat, labels, z, nll, plain[0], plain[1], chunked[0], chunked[1]};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) halo_tensor_free(all[i]);
}

/* Large logits neither overflow nor lose the loss. */
static void losses_survive_large_logits(void) {
  const float z[6] = {1e4f, -1e4f, 9.99e3f, -3e38f, 3e38f, 0};
  const int64_t label[2] = {2, 1}, rows = 2;
  halo_tensor *in[3] = {0}, *out[2] = {0};
  CHECK_OK(halo_tensor_from(&in[0], HALO_F32, HALO_CPU, SHAPE(2, 3), z));
  CHECK_OK(halo_tensor_from(&in[1], HALO_I64, HALO_CPU, 1, &rows, label));
  CHECK_OK(halo_op(out, op_id("cross_entropy"), in, 3, (double[]){-100}, 1));
  double loss;
  CHECK_OK(halo_tensor_get(out[0], 0, &loss));
  CHECK(fabs(loss - 10.0000454) < 1e-4);
  for (int i = 0; i < 2; i++) {
    halo_tensor_free(in[i]);
    halo_tensor_free(out[i]);
  }
}

/* fp32 exp through swiglu's own path: silu(x) * 1 against libm over the whole range. */
static void exp_is_accurate(void) {
  enum { N = 20001 };
  static float x[N], one[N];
  const int64_t n = N;
  for (int i = 0; i < N; i++) {
    x[i] = ((float)i - 10000.0f) * 0.011f;
    one[i] = 1;
  }
  halo_tensor *in[2] = {0}, *y = NULL;
  CHECK_OK(halo_tensor_from(&in[0], HALO_F32, HALO_CPU, 1, &n, x));
  CHECK_OK(halo_tensor_from(&in[1], HALO_F32, HALO_CPU, 1, &n, one));
  CHECK_OK(halo_op(&y, op_id("swiglu"), in, 2, NULL, 0));
  double worst = 0;
  for (int i = 0; i < N; i++) {
    double v;
    CHECK_OK(halo_tensor_get(y, i, &v));
    const double truth = (double)x[i] / (1 + exp(-(double)x[i]));
    if (fabs(truth) > 1e-30) worst = fmax(worst, fabs(v / truth - 1));
  }
  CHECK(worst < 4e-7);
  halo_tensor_free(in[0]);
  halo_tensor_free(in[1]);
  halo_tensor_free(y);
}

/* ---- forward values against the formula, written out --------------------------------------- */

static double get(const halo_tensor *t, int64_t i) {
  double v = NAN;
  CHECK_OK(halo_tensor_get(t, i, &v));
  return v;
}

static void forward_follows_the_formula(void) {
  enum { B = 2, T = 3, H = 2, D = 7, R = 2, E = 5, O = 4 };
  halo_tensor *x = make(HALO_F64, SHAPE(T, E)), *w = make(HALO_F64, SHAPE(O, E)),
              *b = make(HALO_F64, SHAPE(O)), *e = make(HALO_F64, SHAPE(E)), *y = NULL;
  CHECK_OK(halo_op(&y, op_id("linear"), (halo_tensor *[]){x, w, b, NULL}, 4, NULL, 0));
  for (int64_t i = 0; i < T; i++) {
    for (int64_t o = 0; o < O; o++) {
      double sum = get(b, o);
      for (int64_t j = 0; j < E; j++) sum += get(x, i * E + j) * get(w, o * E + j);
      CHECK(fabs(get(y, i * O + o) - sum) < 1e-13);
    }
  }
  halo_tensor_free(y);
  CHECK_OK(halo_op(&y, op_id("rmsnorm"), (halo_tensor *[]){x, e}, 2, (double[]){0.5}, 1));
  for (int64_t i = 0; i < T; i++) {
    double sum = 0;
    for (int64_t j = 0; j < E; j++) sum += get(x, i * E + j) * get(x, i * E + j);
    for (int64_t j = 0; j < E; j++) {
      const double truth = get(e, j) * get(x, i * E + j) / sqrt(sum / E + 0.5);
      CHECK(fabs(get(y, i * E + j) - truth) < 1e-13);
    }
  }
  halo_tensor_free(y);
  halo_tensor_free(b);
  b = make(HALO_F64, SHAPE(T, E));
  CHECK_OK(halo_op(&y, op_id("swiglu"), (halo_tensor *[]){x, b}, 2, NULL, 0));
  for (int64_t i = 0; i < T * E; i++) {
    CHECK(fabs(get(y, i) - get(x, i) / (1 + exp(-get(x, i))) * get(b, i)) < 1e-13);
  }
  halo_tensor_free(y);
  halo_tensor *ids = integers(HALO_I64, SHAPE(2, 6), T);
  CHECK_OK(halo_op(&y, op_id("embedding"), (halo_tensor *[]){x, ids}, 2, NULL, 0));
  for (int64_t i = 0; i < 12; i++) {
    for (int64_t j = 0; j < E; j++) CHECK(get(y, i * E + j) == get(x, (int64_t)get(ids, i) * E + j));
  }
  halo_tensor *all[] = {x, w, b, e, y, ids};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) halo_tensor_free(all[i]);

  for (int per_batch = 0; per_batch < 2; per_batch++) {
    test_case k = rope_case(B, T, H, D, R, per_batch);
    y = forward(&k);
    for (int64_t i = 0; i < B * T * H * D; i++) {
      const int64_t d = i % D, token = i / (H * D);
      const int64_t row = (per_batch ? token : token % T) * R, pair = d % R;
      const double c = get(k.in[1], row + pair), s = get(k.in[2], row + pair), own = get(k.in[0], i);
      const double truth = d < R       ? own * c - get(k.in[0], i + R) * s
                           : d < 2 * R ? own * c + get(k.in[0], i - R) * s
                                       : own;
      CHECK(fabs(get(y, i) - truth) < 1e-13);
    }
    halo_tensor_free(y);
    free_case(&k);
  }
}

/* The product kernel by itself: batches, leading dimensions, transposes, mixed dtypes, beta, panels. */
static void check_gemm(halo_dtype ta, halo_dtype tb, halo_dtype tc, bool a_transposed,
                       bool b_transposed, int64_t m, int64_t n, int64_t k, int64_t batch) {
  const int64_t lda = (a_transposed ? m : k) + 2, ldb = (b_transposed ? k : n) + 1, ldc = n + 3;
  const int64_t rows_a = a_transposed ? k : m, rows_b = b_transposed ? n : k;
  halo_tensor *a = make(HALO_F64, SHAPE(batch * rows_a * lda)), *b = make(HALO_F64, SHAPE(rows_b * ldb));
  halo_tensor *c = make(HALO_F64, SHAPE(batch * m * ldc)), *la = cast(a, ta), *lb = cast(b, tb), *lc = cast(c, tc);
  halo_tensor *before = cast(lc, HALO_F64), *a64 = cast(la, HALO_F64), *b64 = cast(lb, HALO_F64);
  const halo_gemm g = {.a = {halo__data(la), ta, a_transposed, lda, rows_a * lda},
                       .b = {halo__data(lb), tb, b_transposed, ldb, 0},
                       .c = {halo__data(lc), tc, 0, ldc, m * ldc},
                       .m = m, .n = n, .k = k, .batch = batch, .alpha = 0.5, .beta = 2};
  CHECK_OK(halo_cpu_gemm(&g));
  const double *pa = halo__data(a64), *pb = halo__data(b64), *pc = halo__data(before);
  double worst = 0;
  for (int64_t i = 0; i < batch * m * ldc; i++) {
    const int64_t z = i / (m * ldc), row = i / ldc % m, col = i % ldc;
    double truth = pc[i];
    if (col < n) {
      double sum = 0;
      for (int64_t p = 0; p < k; p++) {
        sum += pa[z * rows_a * lda + (a_transposed ? p * lda + row : row * lda + p)] *
               pb[b_transposed ? col * ldb + p : p * ldb + col];
      }
      truth = 0.5 * sum + 2 * pc[i];
    }
    worst = fmax(worst, fabs(get(lc, i) - truth) / (sqrt((double)k) + fabs(truth)));
  }
  CHECK(worst < (tc == HALO_BF16 ? 5e-3 : tc == HALO_F32 ? 2e-6 : 1e-14));
  halo_tensor *all[] = {a, b, c, la, lb, lc, before, a64, b64};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) halo_tensor_free(all[i]);
}

static void products_are_products(void) {
  static const halo_dtype types[][3] = {{HALO_F64, HALO_F64, HALO_F64}, {HALO_F32, HALO_F32, HALO_F32},
                                        {HALO_BF16, HALO_BF16, HALO_BF16}, {HALO_F32, HALO_BF16, HALO_BF16},
                                        {HALO_BF16, HALO_BF16, HALO_F32}, {HALO_BF16, HALO_F32, HALO_F32}};
  for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
    for (int form = 0; form < 4; form++) {
      check_gemm(types[t][0], types[t][1], types[t][2], form & 1, form & 2, 5, 7, 9, 3);
      check_gemm(types[t][0], types[t][1], types[t][2], form & 1, form & 2, 1, 3, 0, 2);
    }
  }
  // More than one panel in each direction.
  check_gemm(HALO_BF16, HALO_BF16, HALO_BF16, false, true, 3, 2050, 1030, 1);
  check_gemm(HALO_BF16, HALO_BF16, HALO_F32, true, false, 2051, 3, 1029, 1);
  float x = 1;
  halo_gemm bad = {.a = {&x, HALO_F32, 0, 1, 0}, .b = {&x, HALO_F32, 0, 1, 0}, .c = {&x, HALO_F64, 0, 1, 0},
                   .m = 1, .n = 1, .k = 1, .batch = 1, .alpha = 1};
  CHECK_STATUS(halo_cpu_gemm(&bad), HALO_EARG);
  bad.c.dtype = HALO_F32;
  bad.m = INT64_C(1) << 31;
  CHECK_STATUS(halo_cpu_gemm(&bad), HALO_EUNSUPPORTED);
}

static void columns_are_summed(void) {
  enum { ROWS = 37, COLS = 1030, LD = 1033 };
  halo_tensor *x = make(HALO_F64, SHAPE(ROWS, LD)), *y = make(HALO_F64, SHAPE(COLS));
  halo_tensor *old = cast(y, HALO_F64);
  CHECK_OK(halo_cpu_sum_rows(HALO_F64, halo__data(y), HALO_F64, halo__data(x), LD, ROWS, COLS, 2));
  double worst = 0;
  for (int64_t j = 0; j < COLS; j++) {
    double sum = 2 * get(old, j);
    for (int64_t i = 0; i < ROWS; i++) sum += get(x, i * LD + j);
    worst = fmax(worst, fabs(sum - get(y, j)));
  }
  CHECK(worst < 1e-12);
  halo_tensor_free(x);
  halo_tensor_free(y);
  halo_tensor_free(old);
}

static void shapes_are_checked(void) {
  halo_tensor *x = make(HALO_F32, SHAPE(3, 4)), *w = make(HALO_F32, SHAPE(5, 4));
  halo_tensor *wrong = make(HALO_F32, SHAPE(5, 3)), *wide = make(HALO_F64, SHAPE(5, 4));
  halo_tensor *out[2] = {0};
  CHECK_STATUS(halo_op(out, op_id("linear"), (halo_tensor *[]){x, wrong, NULL, NULL}, 4, NULL, 0), HALO_EARG);
  CHECK(strstr(halo_error_message(), "f32 [5,3]") != NULL);
  CHECK_STATUS(halo_op(out, op_id("linear"), (halo_tensor *[]){x, wide, NULL, NULL}, 4, NULL, 0), HALO_EARG);
  CHECK_STATUS(halo_op(out, op_id("linear"), (halo_tensor *[]){x, w, w, NULL}, 4, NULL, 0), HALO_EARG);
  CHECK_STATUS(halo_op(out, op_id("swiglu"), (halo_tensor *[]){x, w}, 2, NULL, 0), HALO_EARG);
  CHECK_STATUS(halo_op(out, op_id("rmsnorm"), (halo_tensor *[]){x, w}, 2, (double[]){1e-6}, 1), HALO_EARG);
  CHECK_STATUS(halo_op(out, op_id("rope"), (halo_tensor *[]){x, w, w}, 3, NULL, 0), HALO_EARG);
  CHECK(out[0] == NULL);
  halo_tensor_free(x);
  halo_tensor_free(w);
  halo_tensor_free(wrong);
  halo_tensor_free(wide);
}

int main(void) {
  RUN(embedding_is_a_lookup);
  RUN(linear_is_a_product);
  RUN(rmsnorm_has_its_gradient);
  RUN(rope_rotates);
  RUN(rope_table_rounds_like_transformers);
  RUN(swiglu_has_its_gradient);
  RUN(strided_inputs_are_seen_right);
  RUN(losses_have_their_gradients);
  RUN(chunked_loss_is_the_loss);
  RUN(weights_multiply_losses);
  RUN(losses_survive_large_logits);
  RUN(exp_is_accurate);
  RUN(forward_follows_the_formula);
  RUN(products_are_products);
  RUN(columns_are_summed);
  RUN(shapes_are_checked);
  CHECK(halo_tape_live_nodes() == 0);
  CHECK(halo_memory_live_bytes(HALO_CPU, -1) == 0);
  return check_report();
}
