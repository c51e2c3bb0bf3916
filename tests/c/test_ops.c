/* test_ops.c: what the Lua specs of the ops cannot see: accuracy over all floats, strided copies of
 * every element size, what the tape keeps, and the C interface's own checks. */
#include "check.h"
#include "cpu/vmath.h"
#include "internal.h"
#include "kernels.h"

/* Distance in units of the last place of the true value. */
static double ulps(float got, double truth) {
  if (isnan(truth)) return isnan(got) ? 0 : INFINITY;
  const float rounded = (float)truth;
  const float ulp = nextafterf(fabsf(rounded), INFINITY) - fabsf(rounded);
  return fabs((double)got - truth) / (double)ulp;
}

static void tanh_is_accurate(void) {
  double worst = 0;
  int64_t n_odd = 0;
  // Every 997th float of either sign, subnormals and infinities included.
  for (uint32_t bits = 0; bits < 0x7f800001u; bits += bits > 0x7f7fff00u ? 1 : 97) {
    float x;
    memcpy(&x, &bits, 4);
    const double e = ulps(halo__tanh_f32(x), tanh((double)x));
    if (e > worst) worst = e;
    if (halo__tanh_f32(-x) != -halo__tanh_f32(x)) n_odd++;
  }
  CHECK(worst < 2.0);
  CHECK(n_odd == 0);
  CHECK(isnan(halo__tanh_f32(NAN)));
  CHECK(halo__tanh_f32(INFINITY) == 1.0f && halo__tanh_f32(-INFINITY) == -1.0f);
}

/* pack and unpack against the definition, for layouts that take each of their paths. */
static void strided_copies_match(void) {
  static const struct {
    int32_t ndim;
    int64_t shape[4], stride[4], offset;
  } cases[] = {
      {2, {40, 50}, {1, 40}, 0},            // transposed, in squares
      {2, {3, 50}, {1, 3}, 0},              // transposed, too narrow for squares
      {3, {20, 3, 33}, {1, 20, 60}, 0},     // transposed around a middle dim
      {3, {3, 17, 19}, {400, 1, 17}, 0},    // a batch of transposes
      {2, {7, 9}, {0, 1}, 0},               // rows repeated
      {2, {7, 9}, {1, 0}, 0},               // columns repeated
      {2, {5, 6}, {-6, 1}, 24},             // mirrored
      {4, {2, 3, 4, 5}, {60, 1, 15, 3}, 0}, // permuted
      {3, {4, 1, 6}, {12, 99, 2}, 1},       // every second element
      {1, {1}, {5}, 2},
  };
  uint64_t source[2000], dense[2000], expected[2000];
  for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
    for (int64_t bytes = 1; bytes <= 8; bytes *= 2) {
      for (size_t i = 0; i < sizeof source; i++) {
        ((uint8_t *)source)[i] = (uint8_t)halo_random_u64(1, k, i);
      }
      int64_t n = 1, at[4] = {0};
      for (int32_t d = 0; d < cases[k].ndim; d++) n *= cases[k].shape[d];
      for (int64_t i = 0; i < n; i++) {
        int64_t from = cases[k].offset;
        for (int32_t d = 0; d < cases[k].ndim; d++) from += at[d] * cases[k].stride[d];
        memcpy((char *)expected + i * bytes, (char *)source + from * bytes, (size_t)bytes);
        for (int32_t d = cases[k].ndim - 1; d >= 0 && ++at[d] == cases[k].shape[d]; d--) at[d] = 0;
      }
      const char *first = (const char *)source + cases[k].offset * bytes;
      CHECK_OK(halo_cpu_pack(dense, first, bytes, cases[k].ndim, cases[k].shape, cases[k].stride));
      CHECK(memcmp(dense, expected, (size_t)(n * bytes)) == 0);
      // And back: what was packed, written over itself, changes nothing.
      uint64_t copy[2000];
      memcpy(copy, source, sizeof source);
      CHECK_OK(halo_cpu_unpack((char *)copy + cases[k].offset * bytes, dense, bytes, cases[k].ndim,
                               cases[k].shape, cases[k].stride));
      CHECK(memcmp(copy, source, sizeof source) == 0);
    }
  }
}

static halo_tensor *make(int64_t rows, int64_t cols) {
  halo_tensor *t = NULL;
  const int64_t shape[2] = {rows, cols};
  CHECK_OK(halo_tensor_new(&t, HALO_F32, HALO_CPU, 2, shape));
  CHECK_OK(halo_tensor_normal(t, 1, (uint64_t)(rows * cols), 0, 1));
  return t;
}

static halo_tensor *op(const char *name, halo_tensor *a, halo_tensor *b) {
  halo_tensor *in[2] = {a, b}, *out[HALO_MAX_OUTPUTS] = {0};
  CHECK_OK(halo_op(out, halo_op_find(name), in, b != NULL ? 2 : 1, NULL, 0));
  return out[0];
}

/* Live bytes after y = f(x) with the result and the intermediate handle x dropped or not. */
static void the_tape_keeps_no_more_than_it_reads(void) {
  const int64_t bytes = 256 * 256 * 4;
  halo_tensor *leaf = make(256, 256);
  CHECK_OK(halo_tensor_require_grad(leaf, 1));
  static const struct {
    const char *name;
    int64_t tensors; // input, output or neither, besides the result itself
  } cases[] = {{"neg", 0}, {"exp", 0}, {"tanh", 0}, {"sigmoid", 0}, {"silu", 1}, {"square", 1}};
  for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
    halo_tensor *x = op("neg", leaf, NULL);
    const int64_t before = halo_memory_live_bytes(HALO_CPU, -1) - bytes;
    halo_tensor *y = op(cases[k].name, x, NULL);
    halo_tensor_free(x);
    const int64_t held = halo_memory_live_bytes(HALO_CPU, -1) - before;
    CHECK(held >= (1 + cases[k].tensors) * bytes && held < (1 + cases[k].tensors) * bytes + bytes / 2);
    halo_tensor_free(y);
  }
  halo_tensor *x = op("neg", leaf, NULL);
  const int64_t before = halo_memory_live_bytes(HALO_CPU, -1) - bytes;
  halo_tensor *y = op("add", x, x);
  halo_tensor_free(x);
  CHECK(halo_memory_live_bytes(HALO_CPU, -1) - before < bytes + bytes / 2);
  halo_tensor_free(y);
  halo_tensor_free(leaf);
  CHECK(halo_tape_live_nodes() == 0);
}

static void the_table_checks_its_calls(void) {
  halo_tensor *a = make(2, 3), *out[HALO_MAX_OUTPUTS] = {0}, *in[2] = {a, NULL};
  const double params[2] = {0, 0};
  CHECK_STATUS(halo_op(out, -1, in, 1, NULL, 0), HALO_EARG);
  CHECK_STATUS(halo_op(out, halo_op_count(), in, 1, NULL, 0), HALO_EARG);
  CHECK_STATUS(halo_op(out, halo_op_find("add"), in, 1, NULL, 0), HALO_EARG);
  CHECK_STATUS(halo_op(out, halo_op_find("add"), in, 2, NULL, 0), HALO_EARG);
  CHECK(strstr(halo_error_message(), "input b is nil") != NULL);
  CHECK_STATUS(halo_op(out, halo_op_find("sum"), in, 1, params, 1), HALO_EARG);
  const double far[2] = {7, 0}, fraction[2] = {0.5, 0};
  CHECK_STATUS(halo_op(out, halo_op_find("sum"), in, 1, far, 2), HALO_EARG);
  CHECK_STATUS(halo_op(out, halo_op_find("sum"), in, 1, fraction, 2), HALO_EARG);
  CHECK(out[0] == NULL);
  CHECK(halo_op_find("no_such_op") == -1 && halo_op_find(NULL) == -1);
  for (int32_t i = 0; i < halo_op_count(); i++) CHECK(halo_op_find(halo_op_name(i)) == i);
  halo_tensor_free(a);
}

int main(void) {
  RUN(tanh_is_accurate);
  RUN(strided_copies_match);
  RUN(the_tape_keeps_no_more_than_it_reads);
  RUN(the_table_checks_its_calls);
  return check_report();
}
