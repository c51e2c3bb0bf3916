/* Memory, copies, late errors and offload of the CUDA device; on a shadow (kernels/shadow) without one. */
#include "check.h"
#include "internal.h"
#include "kernels.h"

#include <unistd.h>

static bool is_shadow(void) { return strcmp(halo_cuda_targets(), "shadow") == 0; }

static void memory_is_counted(void) {
  const int64_t before = halo_memory_live_bytes(HALO_CUDA, -1), ring = halo_memory_live_bytes(HALO_CUDA, HALO_TAG_RING);
  enum { N = 3000 };
  static void *p[N];
  halo_memory_push_tag(HALO_TAG_RING);
  int64_t sum = 0;
  for (int64_t i = 0; i < N; i++) {
    CHECK_OK(halo__alloc(&p[i], i, HALO_CUDA));
    CHECK(((uintptr_t)p[i] & 255) == 0);
    sum += i == 0 ? 512 : (i + 511) / 512 * 512;
  }
  halo_memory_pop_tag();
  CHECK(halo_memory_live_bytes(HALO_CUDA, HALO_TAG_RING) == ring + sum);
  CHECK(halo_memory_live_bytes(HALO_CUDA, -1) == before + sum);
  for (int64_t i = 0; i < N; i += 2) halo__free(p[i]);
  for (int64_t i = N - 1; i > 0; i -= 2) halo__free(p[i]);
  CHECK(halo_memory_live_bytes(HALO_CUDA, -1) == before);
  CHECK(halo_memory_peak_bytes(HALO_CUDA, -1) >= before + sum);
  halo_memory_reset_peak(HALO_CUDA);
  CHECK(halo_memory_peak_bytes(HALO_CUDA, -1) == before);
  halo_memory_trim(HALO_CUDA);
}

static void no_memory_is_an_ordinary_error(void) {
  const int64_t shape[1] = {1 << 20}, huge[1] = {(int64_t)1 << 40};
  halo_tensor *t = NULL, *weights = NULL;
  halo_memory_push_tag(HALO_TAG_WEIGHTS);
  CHECK_OK(halo_tensor_new(&weights, HALO_F32, HALO_CUDA, 1, shape));
  halo_memory_pop_tag();
  halo_memory_fail_after(0);
  CHECK_STATUS(halo_tensor_new(&t, HALO_F32, HALO_CUDA, 1, shape), HALO_ENOMEM);
  halo_memory_limit(HALO_CUDA, halo_memory_live_bytes(HALO_CUDA, -1) + 1000);
  CHECK_STATUS(halo_tensor_zeros(&t, HALO_F32, HALO_CUDA, 1, shape), HALO_ENOMEM);
  CHECK(strstr(halo_error_message(), "weights 4.0") != NULL && strstr(halo_error_message(), "limit") != NULL);
  halo_memory_limit(HALO_CUDA, 0);
  CHECK_STATUS(halo_tensor_new(&t, HALO_F32, HALO_CUDA, 1, huge), HALO_ENOMEM); // the device says no, twice
  CHECK(t == NULL && strstr(halo_error_message(), "on cuda") != NULL);
  CHECK_OK(halo_tensor_new(&t, HALO_F32, HALO_CUDA, 1, shape));
  halo_tensor_free(t);
  halo_tensor_free(weights);
}

/* Bytes that are small exact numbers in every dtype. */
static void numbers(double *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] = (double)(i * 37 % 101);
}

static double get(const halo_tensor *t, int64_t i) {
  double v = -1;
  CHECK_OK(halo_tensor_get(t, i, &v));
  return v;
}

static void copies_cross_in_every_dtype(void) {
  const int64_t shape[2] = {7, 13}, n = 91;
  double x[91];
  numbers(x, n);
  halo_tensor *host = NULL;
  CHECK_OK(halo_tensor_from(&host, HALO_F64, HALO_CPU, 2, shape, x));
  for (int32_t a = 0; a < HALO_DTYPE_COUNT; a++) {
    for (int32_t b = 0; b < HALO_DTYPE_COUNT; b++) {
      halo_tensor *near = NULL, *far = NULL, *back = NULL;
      CHECK_OK(halo_tensor_new(&near, a, HALO_CPU, 2, shape));
      CHECK_OK(halo_tensor_copy(near, host));
      CHECK_OK(halo_tensor_new(&far, b, HALO_CUDA, 2, shape));
      CHECK_OK(halo_tensor_copy(far, near));
      CHECK_OK(halo_tensor_new(&back, a, HALO_CPU, 2, shape));
      CHECK_OK(halo_tensor_copy(back, far));
      for (int64_t i = 0; i < n; i++) CHECK(get(back, i) == x[i]);
      CHECK(get(far, 17) == x[17]);
      uint64_t h[2] = {0, 1};
      if (a == b) {
        CHECK_OK(halo_tensor_hash(near, &h[0]));
        CHECK_OK(halo_tensor_hash(far, &h[1]));
        CHECK(h[0] == h[1]);
      }
      halo_tensor_free(near);
      halo_tensor_free(far);
      halo_tensor_free(back);
    }
  }
  halo_tensor_free(host);
}

static void strided_tensors_cross(void) {
  const int64_t shape[2] = {9, 14}, turned[2] = {14, 9}, stride[2] = {1, 14};
  double x[126], y[126];
  numbers(x, 126);
  halo_tensor *far = NULL, *view = NULL, *near = NULL, *near_view = NULL;
  CHECK_OK(halo_tensor_from(&far, HALO_F64, HALO_CUDA, 2, shape, x));
  CHECK_OK(halo__view(&view, far, 2, turned, stride, 0));
  CHECK_OK(halo_tensor_read(view, y));
  for (int64_t i = 0; i < 14; i++) {
    for (int64_t j = 0; j < 9; j++) CHECK(y[i * 9 + j] == x[j * 14 + i]);
  }
  CHECK_OK(halo_tensor_new(&near, HALO_F32, HALO_CPU, 2, shape));
  CHECK_OK(halo__view(&near_view, near, 2, turned, stride, 0));
  CHECK_OK(halo_tensor_copy(near_view, view)); // strided and converted on both sides
  for (int64_t i = 0; i < 126; i++) CHECK(get(near, i) == x[i]);
  CHECK_OK(halo_tensor_fill(near, 5));
  CHECK_OK(halo_tensor_copy(view, near_view));
  CHECK(get(far, 77) == 5);
  CHECK_OK(halo_tensor_set(view, 1, -3)); // view[0][1] is far[1][0]
  CHECK(get(far, 14) == -3);
  CHECK_OK(halo_tensor_write(view, y));
  for (int64_t i = 0; i < 126; i++) CHECK(get(far, i) == x[i]);
  halo_tensor_free(near_view);
  halo_tensor_free(near);
  halo_tensor_free(view);
  halo_tensor_free(far);
}

static void large_copies_survive_reuse_of_host_memory(void) {
  const int64_t n[1] = {3 << 20};
  float *x = malloc((size_t)n[0] * sizeof *x);
  halo_tensor *t[4];
  for (int32_t k = 0; k < 4; k++) {
    for (int64_t i = 0; i < n[0]; i++) x[i] = (float)(i % 1000 + k);
    CHECK_OK(halo_tensor_from(&t[k], HALO_F32, HALO_CUDA, 1, n, x));
  }
  for (int32_t k = 0; k < 4; k++) {
    CHECK_OK(halo_tensor_read(t[k], x));
    int64_t wrong = 0;
    for (int64_t i = 0; i < n[0]; i++) wrong += x[i] != (float)(i % 1000 + k);
    CHECK(wrong == 0);
    halo_tensor_free(t[k]);
  }
  free(x);
}

static void devices_do_not_mix(void) {
  const int64_t shape[1] = {3};
  halo_tensor *a = NULL, *b = NULL, *y = NULL;
  CHECK_OK(halo_tensor_zeros(&a, HALO_F32, HALO_CUDA, 1, shape));
  CHECK_OK(halo_tensor_zeros(&b, HALO_F32, HALO_CPU, 1, shape));
  CHECK_STATUS(halo__op2(&y, HALO_OP_add, a, b, NULL, 0), HALO_EARG);
  CHECK(strstr(halo_error_message(), "input 1 is on cuda, input 2 on cpu") != NULL);
  CHECK_STATUS(halo_tensor_set_grad(a, b), HALO_EARG);
  halo_tensor_free(a);
  halo_tensor_free(b);
}

static void bad_token_ids_are_told_at_the_next_wait(void) {
  const int64_t w_shape[2] = {5, 4}, n[1] = {3};
  const int32_t ids[3] = {1, 9, 2};
  halo_tensor *w = NULL, *i = NULL, *y = NULL;
  CHECK_OK(halo_tensor_zeros(&w, HALO_F32, HALO_CUDA, 2, w_shape));
  CHECK_OK(halo_tensor_from(&i, HALO_I32, HALO_CUDA, 1, n, ids));
  CHECK_OK(halo__op2(&y, HALO_OP_embedding, w, i, NULL, 0));
  CHECK_STATUS(halo_synchronize(HALO_CUDA), HALO_EARG);
  CHECK(strstr(halo_error_message(), "embedding") != NULL && strstr(halo_error_message(), "9") != NULL);
  CHECK_OK(halo_synchronize(HALO_CUDA)); // told once
  halo_tensor_free(y);
  halo_tensor_free(w);
  halo_tensor_free(i);
}

static void what_is_offloaded_comes_back(void) {
  enum { N = 70 }; // more than the ring of events holds
  const int64_t n[1] = {100003};
  halo_offload *o[N];
  halo_tensor *t = NULL;
  const int64_t before = halo_memory_live_bytes(HALO_CUDA, -1);
  for (int32_t k = 0; k < N; k++) {
    CHECK_OK(halo_tensor_new(&t, HALO_F32, HALO_CUDA, 1, n));
    CHECK_OK(halo_tensor_fill(t, k + 1));
    CHECK_OK(halo_offload_new(&o[k], t));
    halo_tensor_free(t);
    CHECK(halo_memory_live_bytes(HALO_CUDA, -1) <= before + 2 * 400 * 1024); // the last two at most
  }
  CHECK(halo_offload_host_bytes() >= N * 4 * n[0]);
  for (int32_t k = N - 1; k >= 0; k--) {
    if (k > 0) CHECK_OK(halo_offload_prefetch(o[k - 1]));
    CHECK_OK(halo_offload_fetch(&t, o[k]));
    CHECK(get(t, 0) == k + 1 && get(t, n[0] - 1) == k + 1);
    halo_tensor_free(t);
    halo_offload_free(o[k]);
  }
  CHECK(halo_memory_live_bytes(HALO_CUDA, -1) == before);
  CHECK_OK(halo_tensor_zeros(&t, HALO_F32, HALO_CUDA, 1, n)); // never fetched
  CHECK_OK(halo_offload_new(&o[0], t));
  CHECK_OK(halo_offload_prefetch(o[0]));
  halo_offload_free(o[0]);
  halo_tensor_free(t);
  const int64_t other[1] = {5000}; // another size: what was kept for the first one goes
  CHECK_OK(halo_tensor_zeros(&t, HALO_F32, HALO_CUDA, 1, other));
  CHECK_OK(halo_offload_new(&o[0], t));
  CHECK(halo_offload_host_bytes() == 4 * other[0]);
  halo_offload_free(o[0]);
  halo_tensor_free(t);
  halo_memory_trim(HALO_CUDA);
  CHECK(halo_offload_host_bytes() == 0);
  CHECK(halo_memory_live_bytes(HALO_CUDA, -1) == before);
}

/* y = tanh(... tanh(x * w)): blocks recomputed; returns the gradient of w at element 3. */
static double recomputed_gradient(uint32_t offload, int32_t device) {
  enum { BLOCKS = 6 };
  const int64_t n[1] = {1000};
  halo_tensor *w = NULL, *x = NULL, *h[BLOCKS + 1] = {0};
  CHECK_OK(halo_tensor_new(&w, HALO_F32, device, 1, n));
  CHECK_OK(halo_tensor_normal(w, 5, 1, 0, 1));
  CHECK_OK(halo_tensor_require_grad(w, 1));
  CHECK_OK(halo_tensor_new(&x, HALO_F32, device, 1, n));
  CHECK_OK(halo_tensor_normal(x, 5, 2, 0, 1));
  CHECK_OK(halo__op2(&h[0], HALO_OP_mul, w, x, NULL, 0));
  for (int32_t b = 0; b < BLOCKS; b++) {
    const int32_t was = halo_tape_set_enabled(0);
    CHECK_OK(halo__op1(&h[b + 1], HALO_OP_tanh, h[b], NULL, 0));
    halo_tape_set_enabled(was);
    CHECK_OK(halo_tape_checkpoint_offload(&h[b + 1], 1, &h[b], 1, b + 1, offload));
    halo_tensor_free(h[b]);
  }
  halo_backward *back = NULL;
  CHECK_OK(halo_backward_begin(&back, h[BLOCKS], NULL));
  halo_tensor_free(h[BLOCKS]);
  int32_t event = 0, n_in = 0;
  int64_t token = 0, seen = BLOCKS;
  for (;;) {
    CHECK_OK(halo_backward_next(back, &event, &token));
    if (event == HALO_BACKWARD_DONE) break;
    CHECK(token == seen--);
    halo_tensor *in[HALO_MAX_INPUTS], *y = NULL;
    CHECK_OK(halo_backward_inputs(back, in, HALO_MAX_INPUTS, &n_in));
    CHECK_OK(halo__op1(&y, HALO_OP_tanh, in[0], NULL, 0));
    CHECK_OK(halo_backward_recomputed(back, &y, 1));
    halo_tensor_free(y);
  }
  CHECK(seen == 0);
  halo_backward_free(back);
  const double g = get(halo_tensor_grad(w), 3);
  halo_tensor_free(w);
  halo_tensor_free(x);
  return g;
}

static void recompute_from_the_host_is_the_same(void) {
  const int64_t nodes = halo_tape_live_nodes(), before = halo_memory_live_bytes(HALO_CUDA, -1);
  const double kept = recomputed_gradient(0, HALO_CUDA);
  CHECK(kept != 0 && recomputed_gradient(1, HALO_CUDA) == kept);
  CHECK(fabs(recomputed_gradient(1, HALO_CPU) - kept) < 1e-6);
  CHECK(halo_tape_live_nodes() == nodes);
  CHECK(halo_memory_live_bytes(HALO_CUDA, -1) <= before);
}

static void nothing_to_release(void *data, void *owner) { (void)data, (void)owner; }

/* The child of errors_are_final: reads through an address that is nobody's. */
static int break_the_device(void) {
  const int64_t n[1] = {1024};
  halo_tensor *bad = NULL, *good = NULL, *y = NULL, *z = NULL;
  static const halo_status fine = HALO_OK;
  if (halo_tensor_zeros(&good, HALO_F32, HALO_CUDA, 1, n) != fine) return 10;
  if (halo__wrap(&bad, (void *)(uintptr_t)0x1000, 4096, HALO_F32, HALO_CUDA, 1, n,
                 nothing_to_release, NULL) != fine) {
    return 11;
  }
  halo_status first = halo__op1(&y, HALO_OP_exp, bad, NULL, 0);
  if (first == fine) first = halo_synchronize(HALO_CUDA);
  printf("first %s: %s\n", halo_status_name(first), halo_error_message());
  const halo_status second = halo_tensor_zeros(&z, HALO_F32, HALO_CUDA, 1, n);
  printf("second %s: %s\n", halo_status_name(second), halo_error_message());
  double v = 0;
  const halo_status third = halo_tensor_get(good, 0, &v);
  printf("third %s\n", halo_status_name(third));
  halo_tensor_free(y);
  halo_tensor_free(good);
  return 0;
}

static void errors_are_final_and_named(void) {
  char self[512], command[600], text[4096];
  const ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
  CHECK(length > 0);
  self[length > 0 ? length : 0] = 0;
  for (int32_t is_sync = 0; is_sync < 2; is_sync++) {
    snprintf(command, sizeof command, "HALO_DEBUG_SYNC=%d '%s' break", is_sync, self);
    FILE *child = popen(command, "r");
    CHECK(child != NULL);
    if (child == NULL) return;
    const size_t n = fread(text, 1, sizeof text - 1, child);
    text[n] = 0;
    CHECK(pclose(child) == 0);
    CHECK(strstr(text, "first HALO_ECUDA") != NULL && strstr(text, "second HALO_ECUDA") != NULL &&
          strstr(text, "third HALO_ECUDA") != NULL);
    const char *first = strchr(text, ':'), *second = strstr(text, "second HALO_ECUDA:");
    CHECK(first != NULL && second != NULL && strncmp(first, second + strlen("second HALO_ECUDA"), 60) == 0);
    if (is_sync) CHECK(strstr(text, "exp") != NULL);
    fprintf(stderr, "  %s", text);
  }
}

int main(int argc, char **argv) {
  if (halo_device_count(HALO_CUDA) == 0) {
    printf("%s\n1 pending\n", halo_device_reason(HALO_CUDA));
    return check_report();
  }
  if (argc > 1 && strcmp(argv[1], "break") == 0) return break_the_device();
  if (!is_shadow() && !check_is_small()) RUN(errors_are_final_and_named);
  RUN(memory_is_counted);
  RUN(no_memory_is_an_ordinary_error);
  RUN(copies_cross_in_every_dtype);
  RUN(strided_tensors_cross);
  RUN(large_copies_survive_reuse_of_host_memory);
  RUN(devices_do_not_mix);
  RUN(bad_token_ids_are_told_at_the_next_wait);
  RUN(what_is_offloaded_comes_back);
  RUN(recompute_from_the_host_is_the_same);
  return check_report();
}
