/* nn_loss.c: cross-entropy of given logits, and of logits that never exist as a whole.
 *
 *      loss = sum of w_i ce_i        weight = sum of w_i        over rows with a label
 *
 * Both are returned, because the division comes later: by the sum of weights over all ranks and
 * micro-batches. Without weights every w_i is 1 and the second result is the number of labels, as
 * an integer. A row of weight 0 is treated like a row without a label everywhere below.
 *
 * linear_cross_entropy multiplies hidden states with the output matrix and takes the loss, a chunk
 * of rows at a time:
 *
 *      x [T,E]                 z [chunk,V]               per chunk
 *      +-------+   w^T         +---------+   softmax     loss rows
 *      | chunk | --------->    | logits  | ----------->  dz in place of z
 *      +-------+               +---------+               dx[chunk] = dz w,  dw += dz^T x[chunk]
 *      |  ...  |
 *
 * Whole logits would be T*V*4 bytes (159 GB in bf16 for 512K tokens of Qwen2.5); here memory is one
 * chunk. The gradient is made in the forward, while the chunk is at hand: three products of size
 * T*E*V in all, where computing the logits again in backward would take four (`save=0` does that:
 * it saves the [V,E] buffer that waits for backward). Both are linear in the gradient of the loss,
 * which is one number that backward multiplies in.
 *
 * Rows whose label is ignored (or whose weight is 0) are left out of the products altogether: a
 * stage that trains on the answers of long prompts pays for the answers only. Kept rows are taken
 * in order; a chunk of neighbours is used where it lies, others are gathered. On a GPU a few ignored
 * rows among many (the ends of documents) are computed like the others, with gradient 0: less work
 * than gathering around them.
 *
 * Chunk size: every chunk reads and writes dw once, so small chunks are bound by memory: with E
 * columns and c rows a chunk does 2c flops per element of dw, and an element costs 8 bytes. Logits
 * of half the size of dw (c = E/2) add half of a buffer that is there anyway; without a dw, 16 MiB.
 * Measured at E = 768, V = 50257 (one core of a Cascade Lake Xeon, fp32): 48 rows run at two thirds,
 * 96 rows at nine tenths of the rate of 192 rows, and beyond that nothing is gained. A GPU wants more
 * rows: at E = 2048, V = 151936 (H200, bf16) the three products take 2.6 to 2.8 us a row with chunks
 * of 2048, 4096 or 8192 rows alike.
 *
 * Logits of bf16 inputs are fp32 on the CPU, whose products widen anyway. On a GPU they are bf16: fp32
 * ones could not enter the tensor cores as they are, and would move twice the bytes. Rows of logits
 * are padded to 64 elements: with an odd vocabulary (GPT-2's 50257) nothing would be aligned, which
 * makes the products six times slower there.
 */
#include "nn.h"
#include "op.h"

#include <math.h>
#include <string.h>

/* Logits at hand at once, when nothing larger is needed anyway. */
static const int64_t chunk_bytes_min = 16 << 20;
/* The same for a GPU, and the step in which its chunks grow. */
enum { GPU_ROWS = 2048, GPU_ROW_STEP = 128, LOGITS_ALIGN = 64 };

/* ---- labels and weights -------------------------------------------------------------------- */

/* What the rows are trained on, in host memory, checked. */
typedef struct targets {
  halo_tensor *labels;  /* i64; `ignore` where the row does not count */
  halo_tensor *weights; /* f64, or NULL: all 1 */
  int64_t count;        /* rows that count */
} targets;

static void targets_free(targets *t) {
  halo_tensor_free(t->labels);
  halo_tensor_free(t->weights);
}

static halo_status check_label_range(const char *op, const halo_tensor *labels, int64_t vocab,
                                     int64_t ignore) {
  const int64_t *label = halo__data(labels), n = halo_tensor_count(labels);
  for (int64_t i = 0; i < n; i++) {
    HALO_CHECK(label[i] == ignore || (label[i] >= 0 && label[i] < vocab), HALO_EARG,
               "%s: label %lld at position %lld is outside the vocabulary of %lld and is not "
               "the ignored label %lld",
               op, (long long)label[i], (long long)i, (long long)vocab, (long long)ignore);
  }
  return HALO_OK;
}

static halo_status check_weight_range(const char *op, const halo_tensor *weights) {
  const double *w = halo__data(weights);
  const int64_t n = halo_tensor_count(weights);
  for (int64_t i = 0; i < n; i++) {
    HALO_CHECK(w[i] >= 0 && w[i] < INFINITY, HALO_EARG,
               "%s: weight %g at position %lld; wanted 0 or more, and finite", op, w[i],
               (long long)i);
  }
  return HALO_OK;
}

/* weights may be NULL. */
static halo_status read_targets(targets *out, const char *op, const halo_tensor *labels,
                                const halo_tensor *weights, int64_t vocab, int64_t ignore) {
  targets t = {0};
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo_tensor_new(&t.labels, HALO_I64, HALO_CPU, labels->ndim, labels->shape));
  HALO_TRY_GOTO(halo_tensor_copy(t.labels, labels));
  HALO_TRY_GOTO(check_label_range(op, t.labels, vocab, ignore));
  if (weights != NULL) {
    HALO_TRY_GOTO(halo_tensor_new(&t.weights, HALO_F64, HALO_CPU, labels->ndim, labels->shape));
    HALO_TRY_GOTO(halo_tensor_copy(t.weights, weights));
    HALO_TRY_GOTO(check_weight_range(op, t.weights));
  }
  int64_t *label = halo__data(t.labels);
  const double *w = t.weights != NULL ? halo__data(t.weights) : NULL;
  const int64_t n = halo_tensor_count(t.labels);
  for (int64_t i = 0; i < n; i++) {
    if (w != NULL && w[i] == 0) label[i] = ignore;
    t.count += label[i] != ignore;
  }
  *out = t;
  return HALO_OK;
done:
  targets_free(&t);
  return status;
}

/* One entry for each row of x [...,cols]? */
static bool is_per_row(const halo_tensor *x, const halo_tensor *t) {
  bool fits = x->ndim >= 1 && t->ndim == x->ndim - 1;
  for (int32_t d = 0; fits && d < t->ndim; d++) fits = t->shape[d] == x->shape[d];
  return fits;
}

/* weights may be NULL. */
static halo_status check_targets(const char *op, const halo_tensor *x, const halo_tensor *labels,
                                 const halo_tensor *weights) {
  HALO_CHECK((labels->dtype == HALO_I32 || labels->dtype == HALO_I64) && is_per_row(x, labels),
             HALO_EARG, "%s: labels must be i32 or i64, one for each row of %s, got %s", op,
             halo__describe(x), halo__describe(labels));
  if (weights == NULL) return HALO_OK;
  HALO_CHECK(halo__is_float(weights->dtype) && is_per_row(x, weights), HALO_EARG,
             "%s: weights must be floating, one for each row of %s, got %s", op, halo__describe(x),
             halo__describe(weights));
  HALO_CHECK(!weights->requires_grad, HALO_EARG,
             "%s: weights have no gradient here, but these ask for one; detach them", op);
  return HALO_OK;
}

/* ---- sums ---------------------------------------------------------------------------------- */

/* Sum of nll[i] * weight[i] in order, fp64; weight NULL is 1 everywhere. */
static halo_status sum_in_order(double *out, const halo_tensor *nll, const double *weight) {
  halo_tensor *host = NULL;
  HALO_TRY(halo_tensor_new(&host, HALO_F64, HALO_CPU, nll->ndim, nll->shape));
  halo_status status = halo_tensor_copy(host, nll);
  const double *x = halo__data(host);
  double sum = 0;
  for (int64_t i = 0; status == HALO_OK && i < halo_tensor_count(host); i++) {
    sum += weight != NULL ? weight[i] * x[i] : x[i];
  }
  halo_tensor_free(host);
  *out = sum;
  return status;
}

/* out[0] = weighted sum of the losses nll, out[1] = sum of their weights; weight NULL: the count of
 * rows that count, as an integer. Rows that do not count have loss 0. */
static halo_status loss_outputs(halo__call *c, const halo_tensor *nll, const double *weight,
                                int64_t count) {
  double sum = 0, weights = (double)count;
  HALO_TRY(sum_in_order(&sum, nll, weight));
  if (weight != NULL) {
    weights = 0;
    for (int64_t i = 0; i < halo_tensor_count(nll); i++) weights += weight[i];
  }
  const halo_dtype count_dtype = weight != NULL ? nll->dtype : HALO_I64;
  HALO_TRY(halo_tensor_new(&c->out[0], nll->dtype, halo__device(nll), 0, NULL));
  HALO_TRY(halo_tensor_new(&c->out[1], count_dtype, halo__device(nll), 0, NULL));
  HALO_TRY(halo_tensor_fill(c->out[0], sum));
  return halo_tensor_fill(c->out[1], weights);
}

/* ---- cross_entropy: logits are given ------------------------------------------------------- */

halo_status halo__cross_entropy_fwd(halo__call *c) {
  halo_tensor *z = c->in[0], *labels = c->in[1], *weights = c->in[2], *nll = NULL;
  const int64_t ignore = (int64_t)c->param[0];
  HALO_CHECK(halo__is_float(z->dtype) && z->ndim >= 1, HALO_EARG,
             "cross_entropy: logits must be a floating [...,V], got %s", halo__describe(z));
  HALO_TRY(check_targets("cross_entropy", z, labels, weights));
  const halo_dtype wide = halo__acc_dtype(z->dtype);
  const halo_device device = halo__device(z);
  halo__matrix m = {0};
  targets t = {0};
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__matrix_of(&m, z));
  HALO_TRY_GOTO(read_targets(&t, "cross_entropy", labels, weights, m.cols, ignore));
  HALO_TRY_GOTO(halo_tensor_from(&c->saved[0], HALO_I64, device, 1, &m.rows, halo__data(t.labels)));
  HALO_TRY_GOTO(halo_tensor_new(&nll, wide, device, 1, &m.rows));
  HALO_TRY_GOTO(halo_tensor_new(&c->saved[1], wide, device, 1, &m.rows));
  halo__count_passes(z, 1);
  HALO_TRY_GOTO(halo__kernels(device)->cross_entropy_fwd(
      z->dtype, halo__data(nll), halo__data(c->saved[1]), m.data, m.ld, halo__data(c->saved[0]),
      m.rows, m.cols, ignore));
  double *weight = NULL;
  if (weights != NULL) {
    // Rows without a label must not count in the sum of weights.
    const int64_t *label = halo__data(t.labels);
    weight = halo__data(t.weights);
    for (int64_t i = 0; i < m.rows; i++) weight[i] = label[i] == ignore ? 0 : weight[i];
    HALO_TRY_GOTO(halo_tensor_new(&c->saved[2], wide, device, labels->ndim, labels->shape));
    HALO_TRY_GOTO(halo_tensor_copy(c->saved[2], t.weights));
  }
  c->drop_in[1] = c->drop_in[2] = true;
  status = loss_outputs(c, nll, weight, t.count);
done:
  halo__matrix_free(&m);
  targets_free(&t);
  halo_tensor_free(nll);
  return status;
}

halo_status halo__cross_entropy_bwd(halo__call *c) {
  halo_tensor *z = c->in[0], *weights = c->saved[2];
  if (c->grad_out[0] == NULL) return HALO_OK; // only the sum of weights was used, a constant
  halo__matrix m = {0};
  halo_status status = HALO_OK;
  const void *g = halo__data(c->grad_out[0]);
  if (weights != NULL) {
    double value = 0;
    HALO_TRY(halo_tensor_get(c->grad_out[0], 0, &value));
    HALO_TRY(halo_tensor_scale(weights, value));
    g = halo__data(weights);
  }
  HALO_TRY_GOTO(halo__matrix_of(&m, z));
  HALO_TRY_GOTO(halo__new_like(&c->grad_in[0], z));
  halo__count_passes(z, 2);
  HALO_TRY_GOTO(halo__kernels(halo__device(z))
                    ->cross_entropy_bwd(z->dtype, halo__data(c->grad_in[0]), m.data, m.ld,
                                        halo__data(c->saved[1]), halo__data(c->saved[0]), g,
                                        weights != NULL, m.rows, m.cols, (int64_t)c->param[0]));
done:
  halo__matrix_free(&m);
  return status;
}

/* ---- linear_cross_entropy: logits never whole ---------------------------------------------- */

/* One pass over the kept rows. */
typedef struct job {
  const halo_kernels *k;
  halo_device device;
  halo_dtype t, wide;
  halo_tensor *x, *w;    /* contiguous [...,E] and [V,E] */
  halo_dtype z;          /* of logits */
  int64_t rows, cols, vocab, ignore;
  int64_t count;         /* rows that count */
  int64_t kept, chunk;   /* rows that are computed, and at a time */
  int64_t ld;            /* of logits */
  halo_tensor *host;     /* kept rows on the host, i64, increasing: rows[kept], labels[kept] */
  halo_tensor *index;    /* the same on the device */
  halo_tensor *weights;  /* of the kept rows on the host, f64 [kept]; NULL: all 1 */
  halo_tensor *weight;   /* the same on the device, in the arithmetic type */
  halo_tensor *logits;   /* [chunk,ld] */
  halo_tensor *gathered; /* [chunk,E]; NULL while kept rows are neighbours */
} job;

static void job_close(job *j) {
  halo_tensor_free(j->x);
  halo_tensor_free(j->w);
  halo_tensor_free(j->host);
  halo_tensor_free(j->index);
  halo_tensor_free(j->weights);
  halo_tensor_free(j->weight);
  halo_tensor_free(j->logits);
  halo_tensor_free(j->gathered);
}

/* List the rows that count, then their labels; and their weights, if there are any. */
static halo_status job_select(job *j, const char *op, const halo_tensor *labels,
                              const halo_tensor *weights) {
  targets t = {0};
  HALO_TRY(read_targets(&t, op, labels, weights, j->vocab, j->ignore));
  halo_status status = HALO_OK;
  j->count = j->kept = t.count;
  const bool takes_all = j->device == HALO_CUDA && t.count >= j->rows - j->rows / 16;
  if (takes_all) j->kept = j->rows;
  const int64_t shape[2] = {2, j->kept};
  HALO_TRY_GOTO(halo_tensor_new(&j->host, HALO_I64, HALO_CPU, 2, shape));
  if (weights != NULL) HALO_TRY_GOTO(halo_tensor_new(&j->weights, HALO_F64, HALO_CPU, 1, &j->kept));
  const int64_t *label = halo__data(t.labels);
  const double *w = weights != NULL ? halo__data(t.weights) : NULL;
  double *weight_list = weights != NULL ? halo__data(j->weights) : NULL;
  int64_t *row_list = halo__data(j->host), *label_list = row_list + j->kept, n = 0;
  for (int64_t i = 0; i < j->rows; i++) {
    if (label[i] == j->ignore && !takes_all) continue;
    row_list[n] = i;
    if (w != NULL) weight_list[n] = label[i] == j->ignore ? 0 : w[i];
    label_list[n++] = label[i];
  }
  HALO_TRY_GOTO(halo_tensor_from(&j->index, HALO_I64, j->device, 2, shape, row_list));
  if (weights != NULL) {
    HALO_TRY_GOTO(halo_tensor_new(&j->weight, j->wide, j->device, 1, &j->kept));
    HALO_TRY_GOTO(halo_tensor_copy(j->weight, j->weights));
  }
done:
  targets_free(&t);
  return status;
}

/* Rows per chunk; equal chunks, so that the last one is not a crumb. */
static int64_t chunk_rows(const job *j, int64_t asked, bool has_dw) {
  if (j->kept == 0) return 0;
  const int64_t row_bytes = j->ld * halo_dtype_bytes(j->z);
  int64_t bytes = chunk_bytes_min;
  if (has_dw && row_bytes * j->cols / 2 > bytes) bytes = row_bytes * j->cols / 2;
  if (j->device == HALO_CUDA) {
    bytes = row_bytes * GPU_ROWS > chunk_bytes_min ? row_bytes * GPU_ROWS : chunk_bytes_min;
  }
  int64_t rows = asked > 0 ? asked : bytes / (row_bytes > 0 ? row_bytes : 1);
  if (rows < 1) rows = 1;
  if (rows > j->kept) rows = j->kept;
  if (asked > 0) return rows;
  const int64_t chunks = (j->kept + rows - 1) / rows;
  rows = (j->kept + chunks - 1) / chunks;
  if (j->device == HALO_CUDA) rows = (rows + GPU_ROW_STEP - 1) / GPU_ROW_STEP * GPU_ROW_STEP;
  return rows < j->kept ? rows : j->kept;
}

static halo_status job_open(job *j, const char *op, halo_tensor *x, halo_tensor *w,
                            const halo_tensor *labels, const halo_tensor *weights, int64_t chunk,
                            int64_t ignore, bool has_dw) {
  HALO_CHECK(halo__is_float(x->dtype) && x->ndim >= 1, HALO_EARG,
             "%s: x must be a floating [...,E], got %s", op, halo__describe(x));
  const int64_t cols = x->shape[x->ndim - 1];
  HALO_CHECK(w->dtype == x->dtype && w->ndim == 2 && w->shape[1] == cols && w->shape[0] > 0,
             HALO_EARG, "%s: weight must be %s [V,%lld] for x %s, got %s", op,
             halo_dtype_name(x->dtype), (long long)cols, halo__describe(x), halo__describe(w));
  HALO_CHECK(chunk >= 0, HALO_EARG, "%s: chunk is %lld rows, wanted 0 (automatic) or more", op,
             (long long)chunk);
  HALO_TRY(check_targets(op, x, labels, weights));
  *j = (job){.k = halo__kernels(halo__device(x)), .device = halo__device(x), .t = x->dtype,
             .wide = halo__acc_dtype(x->dtype),
             .z = halo__device(x) == HALO_CUDA ? x->dtype : halo__acc_dtype(x->dtype),
             .ld = (w->shape[0] + LOGITS_ALIGN - 1) / LOGITS_ALIGN * LOGITS_ALIGN, .cols = cols, .vocab = w->shape[0],
             .rows = halo_tensor_count(labels), .ignore = ignore};
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(job_select(j, op, labels, weights));
  HALO_TRY_GOTO(halo__contiguous(&j->x, x));
  HALO_TRY_GOTO(halo__contiguous(&j->w, w));
  j->chunk = chunk_rows(j, chunk, has_dw);
  const int64_t shape[2] = {j->chunk, j->ld};
  HALO_TRY_GOTO(halo_tensor_new(&j->logits, j->z, j->device, 2, shape));
  return HALO_OK;
done:
  job_close(j);
  return status;
}

static void *at(const halo_tensor *t, int64_t element) {
  return (char *)halo__data(t) + element * halo_dtype_bytes(t->dtype);
}

/* Rows [first, first+n) of the kept ones in one piece: where they lie, or gathered. */
static halo_status chunk_input(job *j, int64_t first, int64_t n, void **out, bool *is_gathered) {
  const int64_t *rows = halo__data(j->host);
  *is_gathered = rows[first + n - 1] - rows[first] != n - 1;
  if (!*is_gathered) {
    *out = at(j->x, rows[first] * j->cols);
    return HALO_OK;
  }
  if (j->gathered == NULL) {
    const int64_t shape[2] = {j->chunk, j->cols};
    HALO_TRY(halo_tensor_new(&j->gathered, j->t, j->device, 2, shape));
  }
  *out = halo__data(j->gathered);
  return j->k->embedding_fwd(j->t, *out, halo__data(j->x), HALO_I64, at(j->index, first), n,
                             j->rows, j->cols);
}

/* dx of a chunk, from the gradients in j->logits. */
static halo_status chunk_dx(job *j, int64_t first, int64_t n, bool is_gathered, halo_tensor *dx,
                            double scale) {
  const int64_t *rows = halo__data(j->host);
  void *to = is_gathered ? halo__data(j->gathered) : at(dx, rows[first] * j->cols);
  const halo_gemm product = {.c = halo__operand(to, j->t, j->cols, false),
                             .a = halo__operand(halo__data(j->logits), j->z, j->ld, false),
                             .b = halo__operand(halo__data(j->w), j->t, j->cols, false),
                             .m = n, .n = j->cols, .k = j->vocab, .batch = 1, .alpha = scale};
  HALO_TRY(halo__gemm(j->device, &product));
  if (!is_gathered) return HALO_OK;
  // Each row of dx is 0 before and gets one row: the embedding's gradient is a scatter.
  return j->k->embedding_bwd(j->t, halo__data(dx), j->t, to, HALO_I64, at(j->index, first), n,
                             j->rows, j->cols);
}

/* Losses of the kept rows, without their weights, into nll [kept]. Of the weighted sum:
 * dx = scale * gradient, dw = beta * dw + scale * gradient; either may be NULL. */
static halo_status job_run(job *j, halo_tensor *nll, halo_tensor *dx, halo_tensor *dw, double beta,
                           double scale) {
  if (dx != NULL && j->kept < j->rows) HALO_TRY(halo_tensor_fill(dx, 0));
  if (dw != NULL && j->kept == 0 && beta == 0) HALO_TRY(halo_tensor_fill(dw, 0));
  void *z = halo__data(j->logits);
  for (int64_t first = 0; first < j->kept; first += j->chunk) {
    const int64_t n = j->kept - first < j->chunk ? j->kept - first : j->chunk;
    const int64_t *labels = at(j->index, j->kept + first);
    const void *weight = j->weight != NULL ? at(j->weight, first) : NULL;
    void *x = NULL;
    bool is_gathered = false;
    HALO_TRY(chunk_input(j, first, n, &x, &is_gathered));
    const halo_gemm logits = {.c = halo__operand(z, j->z, j->ld, false),
                              .a = halo__operand(x, j->t, j->cols, false),
                              .b = halo__operand(halo__data(j->w), j->t, j->cols, true),
                              .m = n, .n = j->vocab, .k = j->cols, .batch = 1, .alpha = 1};
    HALO_TRY(halo__gemm(j->device, &logits));
    if (dx == NULL && dw == NULL) {
      HALO_TRY(j->k->cross_entropy_fwd(j->z, at(nll, first), NULL, z, j->ld, labels, n,
                                       j->vocab, j->ignore));
      continue;
    }
    HALO_TRY(j->k->cross_entropy_fused(j->z, at(nll, first), z, j->ld, labels, weight, n,
                                       j->vocab, j->ignore));
    if (dw != NULL) {
      const halo_gemm product = {.c = halo__operand(halo__data(dw), dw->dtype, j->cols, false),
                                 .a = halo__operand(z, j->z, j->ld, true),
                                 .b = halo__operand(x, j->t, j->cols, false),
                                 .m = j->vocab, .n = j->cols, .k = n, .batch = 1, .alpha = scale,
                                 .beta = first == 0 ? beta : 1};
      HALO_TRY(halo__gemm(j->device, &product));
    }
    // Last, because a gathered input makes room for its own gradient.
    if (dx != NULL) HALO_TRY(chunk_dx(j, first, n, is_gathered, dx, scale));
  }
  return HALO_OK;
}

halo_status halo__linear_cross_entropy_fwd(halo__call *c) {
  halo_tensor *x = c->in[0], *w = c->in[1], *nll = NULL;
  const bool is_saved = c->wants_grad && c->param[2] != 0;
  job j = {0};
  HALO_TRY(job_open(&j, "linear_cross_entropy", x, w, c->in[2], c->in[3], (int64_t)c->param[0],
                    (int64_t)c->param[1], is_saved && c->need_grad[1]));
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo_tensor_new(&nll, j.wide, j.device, 1, &j.kept));
  if (is_saved && c->need_grad[0]) HALO_TRY_GOTO(halo__new_like(&c->saved[0], x));
  if (is_saved && c->need_grad[1]) {
    HALO_TRY_GOTO(halo_tensor_new(&c->saved[1], j.wide, j.device, 2, w->shape));
  }
  HALO_TRY_GOTO(job_run(&j, nll, c->saved[0], c->saved[1], 0, 1));
  for (int32_t i = 0; i < c->n_in; i++) c->drop_in[i] = is_saved;
  status = loss_outputs(c, nll, j.weights != NULL ? halo__data(j.weights) : NULL, j.count);
done:
  halo_tensor_free(nll);
  job_close(&j);
  return status;
}

/* Gradients were made in the forward: multiply and hand over. */
static halo_status hand_over(halo__call *c, double g) {
  if (c->saved[0] != NULL) {
    if (g != 1) HALO_TRY(halo_tensor_scale(c->saved[0], g));
    c->grad_in[0] = c->saved[0];
    c->saved[0] = NULL;
  }
  if (c->saved[1] == NULL) return HALO_OK;
  if (c->accumulate_into[1] != NULL) {
    c->accumulated[1] = true;
    return halo_tensor_add_scaled(c->accumulate_into[1], c->saved[1], g);
  }
  if (g != 1) HALO_TRY(halo_tensor_scale(c->saved[1], g));
  c->grad_in[1] = c->saved[1];
  c->saved[1] = NULL;
  return HALO_OK;
}

halo_status halo__linear_cross_entropy_bwd(halo__call *c) {
  double g = 0;
  if (c->grad_out[0] == NULL) return HALO_OK; // only the sum of weights was used, a constant
  HALO_TRY(halo_tensor_get(c->grad_out[0], 0, &g));
  if (c->param[2] != 0) {
    HALO_TRY(hand_over(c, g));
    return halo__narrow_grad(c, 1);
  }
  halo_tensor *nll = NULL, *dw = NULL;
  double beta = 0;
  job j = {0};
  HALO_TRY(job_open(&j, "linear_cross_entropy", c->in[0], c->in[1], c->in[2], c->in[3],
                    (int64_t)c->param[0], (int64_t)c->param[1], c->need_grad[1]));
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo_tensor_new(&nll, j.wide, j.device, 1, &j.kept));
  if (c->need_grad[0]) HALO_TRY_GOTO(halo__new_like(&c->grad_in[0], c->in[0]));
  if (c->need_grad[1]) HALO_TRY_GOTO(halo__grad_target(c, 1, j.wide, &dw, &beta));
  HALO_TRY_GOTO(job_run(&j, nll, c->grad_in[0], dw, beta, g));
  status = halo__narrow_grad(c, 1);
done:
  halo_tensor_free(nll);
  job_close(&j);
  return status;
}

halo_status halo__linear_token_loss_fwd(halo__call *c) {
  halo_tensor *labels = c->in[2], *nll = NULL;
  job j = {0};
  HALO_TRY(job_open(&j, "linear_token_loss", c->in[0], c->in[1], labels, NULL,
                    (int64_t)c->param[0], (int64_t)c->param[1], false));
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo_tensor_new(&nll, j.wide, j.device, 1, &j.kept));
  HALO_TRY_GOTO(job_run(&j, nll, NULL, NULL, 0, 1));
  HALO_TRY_GOTO(halo_tensor_zeros(&c->out[0], j.wide, j.device, labels->ndim, labels->shape));
  status = j.k->embedding_bwd(j.wide, halo__data(c->out[0]), j.wide, halo__data(nll), HALO_I64,
                              halo__data(j.index), j.kept, j.rows, 1);
done:
  halo_tensor_free(nll);
  job_close(&j);
  return status;
}
