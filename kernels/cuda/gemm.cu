/* gemm: batched matrix product through cuBLASLt, row-major.
 *
 *   c_i = alpha * op(a_i) op(b_i) + beta * d_i + bias      i = 0 .. batch-1
 *   bias_grad = bias_grad_beta * bias_grad + row sums of op(a)
 *
 * shapes    c, d [m,n]; op(a) [m,k]; op(b) [k,n]; see halo_gemm in kernels.h
 * layout    cuBLASLt is column-major: a row-major [m,n] is its transpose [n,m], so the product asked
 *           for is c^T = op(b)^T op(a)^T, operands exchanged, flags kept. Its "rows" are our columns,
 *           which is why the bias of our columns is EPILOGUE_BIAS
 * dtypes    bf16 x bf16 -> bf16 or fp32, fp32 x fp32 -> fp32, fp64: as they are, fp32 (fp64) sums.
 *           Mixed inputs and fp32 x fp32 -> bf16 go through an fp32 copy
 * numbers   fp32 products are true fp32 unless halo_set_math allows tf32
 * choice    one plan (descriptors and algorithm) per shape, layout, dtypes, alignment and epilogue.
 *           A large product races the library's best candidates once, on first use, and keeps the
 *           winner: the ranking is right most of the time, and the race is a few milliseconds of a
 *           run of hours. HALO_MATH_FIXED takes the first candidate, so that two processes agree
 * order     one algorithm adds in one order; the reductions of its split forms are ordered, too
 * workspace 64 MiB, taken once (the library's own advice for Hopper is 32 MiB)
 * source    NVIDIA cuBLAS 13 documentation, "Using the cuBLASLt API"
 * twin      kernels/cpu/gemm.c
 */
#include <cublasLt.h>
#include <string.h>

#include <mutex>
#include <unordered_map>

#include "cuda.cuh"

extern "C" int32_t halo__math(void);

namespace {

using halo::acc_of;

constexpr int64_t workspace_bytes = 64 << 20;
/* Products below this many flops are over in about 10 us: a race would measure launches. */
constexpr double race_flops = 4e9;
constexpr int candidates_most = 8, race_rounds = 3;
/* A race whose result is added to needs a target of its own. */
constexpr int64_t race_bytes_most = (int64_t)2 << 30;

halo_status lt_error(cublasStatus_t e, const char *what) {
  return halo__error(e == CUBLAS_STATUS_ALLOC_FAILED ? HALO_ENOMEM : HALO_ECUDA, "cuda: %s: %s (%s)", what,
                     cublasLtGetStatusString(e), cublasLtGetStatusName(e));
}
#define LT_TRY(call)                                                                      \
  do {                                                                                    \
    cublasStatus_t error_ = (call);                                                       \
    if (error_ != CUBLAS_STATUS_SUCCESS) return lt_error(error_, #call);                  \
  } while (0)

/* ---- rows ---------------------------------------------------------------------------------- */

/* c = x + beta * d + bias over `batch` matrices; x (contiguous, arithmetic type), d and bias may be
 * NULL. What a product cannot do itself: write bf16 from fp32 inputs, or k = 0. */
template <class T>
__global__ void finish_kernel(T *c, int64_t ldc, int64_t step_c, const acc_of<T> *x, const T *d, int64_t ldd,
                              int64_t step_d, const T *bias, int64_t m, int64_t n, int64_t total,
                              acc_of<T> beta) {
  using A = acc_of<T>;
  const int64_t stride = (int64_t)gridDim.x * blockDim.x;
  for (int64_t e = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; e < total; e += stride) {
    const int64_t row = e / n, j = e - row * n, i = row / m, r = row - i * m;
    A sum = x != nullptr ? x[e] : (A)0;
    if (d != nullptr) sum += beta * halo::load(d[i * step_d + r * ldd + j]);
    if (bias != nullptr) sum += halo::load(bias[j]);
    c[i * step_c + r * ldc + j] = halo::store<T>(sum);
  }
}

/* y = x in fp32, rows of `cols`, contiguous. */
__global__ void widen_kernel(float *y, const __nv_bfloat16 *x, int64_t ld, int64_t step, int64_t rows,
                             int64_t cols, int64_t total) {
  const int64_t stride = (int64_t)gridDim.x * blockDim.x;
  for (int64_t e = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; e < total; e += stride) {
    const int64_t row = e / cols, j = e - row * cols, i = row / rows;
    y[e] = halo::load(x[i * step + (row - i * rows) * ld + j]);
  }
}

/* c = x + beta * d + bias for a product's c, d and bias. */
halo_status finish(const halo_gemm *g, const void *x, double beta) {
  const halo_operand &c = g->c, &d = g->addend.data != nullptr ? g->addend : g->c;
  const int64_t total = g->batch * g->m * g->n;
  HALO_REAL(c.dtype, T, {
    finish_kernel<T><<<halo::grid(total, 256), 256, 0, halo__cuda_stream()>>>(
        (T *)c.data, c.ld, c.batch_stride, (const acc_of<T> *)x,
        beta != 0 ? (const T *)d.data : nullptr, d.ld, d.batch_stride, (const T *)g->bias, g->m, g->n, total,
        (acc_of<T>)beta);
  });
  HALO_LAUNCHED("gemm: rows");
  return HALO_OK;
}

/* An fp32 copy of a bf16 operand; the result is freed with halo__free. */
halo_status widen(halo_operand *out, const halo_operand &x, int64_t rows, int64_t cols, int64_t batch) {
  const int64_t matrices = x.batch_stride == 0 ? 1 : batch, total = matrices * rows * cols;
  void *data = nullptr;
  HALO_TRY(halo__alloc(&data, total * 4, HALO_CUDA));
  if (total > 0) {
    widen_kernel<<<halo::grid(total, 256), 256, 0, halo__cuda_stream()>>>(
        (float *)data, (const __nv_bfloat16 *)x.data, x.ld, x.batch_stride, rows, cols, total);
  }
  const halo_status status = halo__cuda_launched("gemm: widen");
  if (status != HALO_OK) {
    halo__free(data);
    return status;
  }
  *out = {data, HALO_F32, x.transposed, cols > 0 ? cols : 1, matrices == 1 ? 0 : rows * cols};
  return HALO_OK;
}

/* ---- plans --------------------------------------------------------------------------------- */

/* What a plan depends on. Plain bytes: hashed and compared as such, so padding is zeroed. */
struct key {
  int64_t m, n, k, batch, lda, ldb, ldc, ldd, step_a, step_b, step_c, step_d;
  int32_t type_a, type_b, type_c, epilogue, math;
  int8_t ta, tb, is_in_place, unused;
  uint16_t align_a, align_b, align_c, align_d;
};

struct key_hash {
  size_t operator()(const key &k) const {
    uint64_t h = 1469598103934665603u; // FNV-1a over 64-bit words
    const char *p = (const char *)&k;
    for (size_t i = 0; i + 8 <= sizeof k; i += 8) {
      uint64_t word;
      memcpy(&word, p + i, 8);
      h = (h ^ word) * 1099511628211u;
      h ^= h >> 29;
    }
    return (size_t)h;
  }
};
struct key_equal {
  bool operator()(const key &a, const key &b) const { return memcmp(&a, &b, sizeof a) == 0; }
};
static_assert(sizeof(key) % 8 == 0, "the hash walks whole words");

struct plan {
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr, d = nullptr;
  cublasLtMatmulAlgo_t algorithm = {};
  size_t workspace = 0;
  bool is_supported = false;
};

/* Everything of one process: cuBLASLt is asked under one lock, on the one stream. */
struct context {
  std::mutex lock;
  cublasLtHandle_t handle = nullptr;
  void *workspace = nullptr;
  std::unordered_map<key, plan, key_hash, key_equal> plans;
};
context &here() {
  static context *c = new context; // never destroyed: the driver may be gone before it
  return *c;
}

/* Device pointers of one product, in cuBLASLt's order of operands. */
struct operands {
  const void *a, *b, *c;
  void *d;
  const void *alpha, *beta;
};

cudaDataType_t type_of(halo_dtype t) {
  return t == HALO_F64 ? CUDA_R_64F : t == HALO_F32 ? CUDA_R_32F : CUDA_R_16BF;
}

uint16_t alignment(const void *p) {
  const uintptr_t bits = (uintptr_t)p | 256;
  return (uint16_t)(bits & (~bits + 1));
}

halo_status layout(cublasLtMatrixLayout_t *out, int32_t type, int64_t rows, int64_t cols, int64_t ld,
                   int64_t batch, int64_t step) {
  LT_TRY(cublasLtMatrixLayoutCreate(out, (cudaDataType_t)type, (uint64_t)rows, (uint64_t)cols, ld));
  if (batch > 1) {
    const int32_t count = (int32_t)batch;
    LT_TRY(cublasLtMatrixLayoutSetAttribute(*out, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count));
    LT_TRY(cublasLtMatrixLayoutSetAttribute(*out, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &step,
                                            sizeof step));
  }
  return HALO_OK;
}

halo_status describe(plan *p, const key &k) {
  const bool is_double = k.type_c == CUDA_R_64F;
  const bool is_tf32 = k.type_a == CUDA_R_32F && (k.math & HALO_MATH_TF32) != 0;
  const cublasComputeType_t compute = is_double ? CUBLAS_COMPUTE_64F
                                      : is_tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32
                                                : CUBLAS_COMPUTE_32F;
  LT_TRY(cublasLtMatmulDescCreate(&p->product, compute, is_double ? CUDA_R_64F : CUDA_R_32F));
  const cublasOperation_t ta = k.ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb = k.tb ? CUBLAS_OP_T : CUBLAS_OP_N;
  LT_TRY(cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSA, &tb, sizeof tb));
  LT_TRY(cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSB, &ta, sizeof ta));
  LT_TRY(cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_EPILOGUE, &k.epilogue,
                                        sizeof k.epilogue));
  if (k.epilogue == CUBLASLT_EPILOGUE_BIAS) {
    LT_TRY(cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &k.type_c,
                                          sizeof k.type_c));
  }
  // Our [rows, cols] row-major is [cols, rows] column-major; our b is cuBLASLt's A.
  HALO_TRY(layout(&p->a, k.type_b, k.tb ? k.k : k.n, k.tb ? k.n : k.k, k.ldb, k.batch, k.step_b));
  HALO_TRY(layout(&p->b, k.type_a, k.ta ? k.m : k.k, k.ta ? k.k : k.m, k.lda, k.batch, k.step_a));
  HALO_TRY(layout(&p->c, k.type_c, k.n, k.m, k.ldd, k.batch, k.step_d));
  return layout(&p->d, k.type_c, k.n, k.m, k.ldc, k.batch, k.step_c);
}

halo_status set_vector(plan *p, const void *vector) {
  LT_TRY(cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &vector,
                                        sizeof vector));
  return HALO_OK;
}

/* The library's ranking, best first. */
halo_status candidates(cublasLtMatmulHeuristicResult_t *out, int *n_out, plan *p, const key &k) {
  cublasLtMatmulPreference_t wish = nullptr;
  LT_TRY(cublasLtMatmulPreferenceCreate(&wish));
  const size_t bytes = workspace_bytes;
  const uint32_t a = k.align_b, b = k.align_a, c = k.align_d, d = k.align_c;
  cublasStatus_t e = CUBLAS_STATUS_SUCCESS;
  const struct { cublasLtMatmulPreferenceAttributes_t name; const void *value; size_t size; } wishes[] = {
      {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes},
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &a, sizeof a},
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &b, sizeof b},
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &c, sizeof c},
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &d, sizeof d}};
  for (const auto &w : wishes) {
    if (e == CUBLAS_STATUS_SUCCESS) e = cublasLtMatmulPreferenceSetAttribute(wish, w.name, w.value, w.size);
  }
  *n_out = 0;
  if (e == CUBLAS_STATUS_SUCCESS) {
    e = cublasLtMatmulAlgoGetHeuristic(here().handle, p->product, p->a, p->b, p->c, p->d, wish,
                                       candidates_most, out, n_out);
  }
  cublasLtMatmulPreferenceDestroy(wish);
  // "Not supported" (and no candidates) is an answer; anything else is an error.
  if (e == CUBLAS_STATUS_NOT_SUPPORTED || e == CUBLAS_STATUS_INVALID_VALUE) {
    *n_out = 0;
    e = CUBLAS_STATUS_SUCCESS;
  }
  LT_TRY(e);
  return HALO_OK;
}

cublasStatus_t launch(const plan &p, const operands &o) {
  return cublasLtMatmul(here().handle, p.product, o.alpha, o.a, p.a, o.b, p.b, o.beta, o.c, p.c, o.d, p.d,
                        &p.algorithm, here().workspace, workspace_bytes, halo__cuda_stream());
}

/* Milliseconds of one run, or a negative number. */
float timed(const plan &p, const operands &o, cudaEvent_t start, cudaEvent_t stop) {
  float ms = -1;
  cudaEventRecord(start, halo__cuda_stream());
  const cublasStatus_t e = launch(p, o);
  cudaEventRecord(stop, halo__cuda_stream());
  if (cudaEventSynchronize(stop) != cudaSuccess || e != CUBLAS_STATUS_SUCCESS) return -1;
  return cudaEventElapsedTime(&ms, start, stop) == cudaSuccess ? ms : -1;
}

/* Put the fastest of the candidates into the plan. Turns are taken in rounds, so that a clock that
 * falls under load falls for all. A target that is added to stays as it is: another one is written. */
halo_status race(plan *p, const key &k, operands o, double beta, const cublasLtMatmulHeuristicResult_t *list,
                 int n) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  HALO_CUDA_TRY(cudaStreamIsCapturing(halo__cuda_stream(), &capture));
  const int64_t size = k.type_c == CUDA_R_64F ? 8 : k.type_c == CUDA_R_32F ? 4 : 2;
  const int64_t target_bytes = (k.batch > 1 ? (k.batch - 1) * k.step_c : 0) * size + k.m * k.ldc * size;
  const bool needs_target = beta != 0 && k.is_in_place;
  if (capture != cudaStreamCaptureStatusNone || (needs_target && target_bytes > race_bytes_most)) return HALO_OK;
  void *target = nullptr;
  if (needs_target) {
    if (halo_cuda_memory_new(&target, target_bytes) != HALO_OK) return HALO_OK; // the first will do
    o.d = target;
  }
  cudaEvent_t start = nullptr, stop = nullptr;
  float best = 0;
  int winner = 0;
  float least[candidates_most];
  if (cudaEventCreate(&start) == cudaSuccess && cudaEventCreate(&stop) == cudaSuccess) {
    for (int round = 0; round <= race_rounds; round++) { // the first one loads code
      for (int i = 0; i < n; i++) {
        p->algorithm = list[i].algo;
        const float ms = timed(*p, o, start, stop);
        if (round == 1 || (round > 1 && ms < least[i])) least[i] = ms;
      }
    }
    for (int i = 0; i < n; i++) {
      if (least[i] > 0 && (best == 0 || least[i] < best)) {
        best = least[i];
        winner = i;
      }
    }
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  if (target != nullptr) HALO_TRY(halo_cuda_memory_free(target, target_bytes));
  p->algorithm = list[winner].algo;
  p->workspace = list[winner].workspaceSize;
  return HALO_OK;
}

void forget(plan *p) {
  cublasLtMatmulDescDestroy(p->product);
  cublasLtMatrixLayoutDestroy(p->a);
  cublasLtMatrixLayoutDestroy(p->b);
  cublasLtMatrixLayoutDestroy(p->c);
  cublasLtMatrixLayoutDestroy(p->d);
}

halo_status make_plan(plan *p, const key &k, const operands &o, const void *vector, double beta) {
  HALO_TRY(describe(p, k));
  if (vector != nullptr) HALO_TRY(set_vector(p, vector));
  cublasLtMatmulHeuristicResult_t list[candidates_most];
  int n = 0;
  HALO_TRY(candidates(list, &n, p, k));
  p->is_supported = n > 0;
  if (n == 0) return HALO_OK;
  p->algorithm = list[0].algo;
  p->workspace = list[0].workspaceSize;
  const double flops = 2.0 * (double)k.m * (double)k.n * (double)k.k * (double)k.batch;
  if (n == 1 || flops < race_flops || (k.math & HALO_MATH_FIXED) != 0) return HALO_OK;
  return race(p, k, o, beta, list, n);
}

halo_status open_context(context *c) {
  if (c->workspace != nullptr) return HALO_OK;
  if (c->handle == nullptr) LT_TRY(cublasLtCreate(&c->handle));
  return halo__alloc(&c->workspace, workspace_bytes, HALO_CUDA);
}

/* Queue one product of operands that cuBLASLt takes; *is_done is false where it has no algorithm for
 * this epilogue. `vector` is the bias or NULL. */
halo_status product(bool *is_done, const halo_gemm *g, double beta, int32_t epilogue, const void *vector) {
  const bool has_addend = g->addend.data != nullptr && beta != 0;
  const halo_operand &d = has_addend ? g->addend : g->c;
  key k;
  memset(&k, 0, sizeof k);
  k.m = g->m, k.n = g->n, k.k = g->k, k.batch = g->batch;
  k.lda = g->a.ld, k.ldb = g->b.ld, k.ldc = g->c.ld, k.ldd = d.ld;
  if (g->batch > 1) {
    k.step_a = g->a.batch_stride, k.step_b = g->b.batch_stride;
    k.step_c = g->c.batch_stride, k.step_d = d.batch_stride;
  }
  k.type_a = type_of(g->a.dtype), k.type_b = type_of(g->b.dtype), k.type_c = type_of(g->c.dtype);
  k.epilogue = epilogue, k.math = halo__math();
  k.ta = g->a.transposed != 0, k.tb = g->b.transposed != 0, k.is_in_place = !has_addend;
  k.align_a = alignment(g->a.data), k.align_b = alignment(g->b.data);
  k.align_c = alignment(g->c.data), k.align_d = alignment(d.data);

  const float alpha32 = (float)g->alpha, beta32 = (float)beta;
  const bool is_double = g->c.dtype == HALO_F64;
  const operands o = {g->b.data, g->a.data, d.data, g->c.data,
                      is_double ? (const void *)&g->alpha : &alpha32,
                      is_double ? (const void *)&beta : &beta32};
  context &c = here();
  std::lock_guard<std::mutex> guard(c.lock);
  HALO_TRY(open_context(&c));
  auto found = c.plans.find(k);
  if (found == c.plans.end()) {
    plan p;
    const halo_status status = make_plan(&p, k, o, vector, beta);
    if (status != HALO_OK) {
      forget(&p);
      return status;
    }
    found = c.plans.emplace(k, p).first;
  }
  plan &p = found->second;
  *is_done = p.is_supported;
  if (!p.is_supported) return HALO_OK;
  if (vector != nullptr) HALO_TRY(set_vector(&p, vector));
  LT_TRY(launch(p, o));
  HALO_LAUNCHED("gemm");
  return HALO_OK;
}

/* ---- one product, whatever it takes ---------------------------------------------------------- */

/* A kernel of its own: the library's epilogue (BGRADB) makes a product of 514 us 78 us longer, where
 * this takes 49 (dw of q, k and v, 32K tokens, H200), and knows fp32 and "=" only. */
halo_status bias_grad(const halo_gemm *g) {
  return halo_cuda_sum_rows(g->bias_grad_dtype, g->bias_grad, g->a.dtype, g->a.data, g->a.ld, g->k, g->m,
                            g->bias_grad_beta);
}

halo_status through_fp32(const halo_gemm *g);

/* The product with the bias in its epilogue; where cuBLASLt cannot (odd layouts), with a bias written
 * before or, so that bf16 is rounded once, after. */
halo_status with_bias(const halo_gemm *g) {
  bool is_done = false;
  const int32_t epilogue = g->bias != nullptr ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
  HALO_TRY(product(&is_done, g, g->beta, epilogue, g->bias));
  if (!is_done && g->bias != nullptr && g->c.dtype == HALO_BF16) return through_fp32(g);
  if (!is_done && g->bias != nullptr) {
    HALO_TRY(finish(g, nullptr, g->beta));
    halo_gemm rest = *g;
    rest.addend.data = nullptr;
    rest.bias = nullptr;
    HALO_TRY(product(&is_done, &rest, 1, CUBLASLT_EPILOGUE_DEFAULT, nullptr));
  }
  HALO_CHECK(is_done, HALO_EUNSUPPORTED,
             "gemm: cuBLASLt has no algorithm for [%lld,%lld] x [%lld,%lld] of %s, %s and %s",
             (long long)g->m, (long long)g->k, (long long)g->k, (long long)g->n, halo_dtype_name(g->a.dtype),
             halo_dtype_name(g->b.dtype), halo_dtype_name(g->c.dtype));
  return HALO_OK;
}

/* Inputs of two dtypes, or a bf16 result of fp32 inputs or with a bias that the product cannot add: the
 * same product with fp32 inputs, or into fp32. */
halo_status through_fp32(const halo_gemm *g) {
  halo_gemm wide = *g;
  void *scratch[3] = {nullptr, nullptr, nullptr};
  halo_status status = HALO_OK;
  const bool is_mixed = g->a.dtype != g->b.dtype;
  if (status == HALO_OK && is_mixed && g->a.dtype == HALO_BF16) {
    status = widen(&wide.a, g->a, g->a.transposed ? g->k : g->m, g->a.transposed ? g->m : g->k, g->batch);
    if (status == HALO_OK) scratch[0] = wide.a.data;
  }
  if (status == HALO_OK && is_mixed && g->b.dtype == HALO_BF16) {
    status = widen(&wide.b, g->b, g->b.transposed ? g->n : g->k, g->b.transposed ? g->k : g->n, g->batch);
    if (status == HALO_OK) scratch[1] = wide.b.data;
  }
  if (status == HALO_OK && g->c.dtype == HALO_BF16) {
    status = halo__alloc(&scratch[2], g->batch * g->m * g->n * 4, HALO_CUDA);
    wide.c = {scratch[2], HALO_F32, 0, g->n, g->m * g->n};
    wide.addend.data = nullptr;
    wide.bias = nullptr;
    wide.beta = 0;
    if (status == HALO_OK) status = with_bias(&wide);
    if (status == HALO_OK) status = finish(g, scratch[2], g->beta);
  } else if (status == HALO_OK) {
    status = with_bias(&wide);
  }
  for (void *p : scratch) halo__free(p);
  return status;
}

/* ---- odd sizes ------------------------------------------------------------------------------ */

/* cuBLASLt gives up its fast bf16 kernels when a dim along which some operand is contiguous is no
 * multiple of 8, aligned rows or not: with GPT-2's vocabulary of 50257 in rows of 50304 the products of
 * the loss ran at 150 instead of 690 TFLOP/s (H200). So a large product is taken as one of a multiple of
 * 8 and a rest of up to 7. A rest along k adds a rounding to a bf16 result. */
constexpr int64_t whole = 8;

bool is_aligned(const halo_operand &x) {
  return x.dtype == HALO_BF16 && x.ld % whole == 0 && (uintptr_t)x.data % 16 == 0;
}
halo_operand moved(halo_operand x, int64_t row, int64_t col) {
  const int64_t at = x.transposed ? col * x.ld + row : row * x.ld + col;
  if (x.data != nullptr) x.data = (char *)x.data + at * (x.dtype == HALO_F32 ? 4 : 2);
  return x;
}

/* The dim to split, 'm', 'n' or 'k', or 0. */
char odd_dim(const halo_gemm *g) {
  const bool is_worth = 2.0 * (double)g->m * (double)g->n * (double)g->k >= race_flops;
  const int64_t width = g->c.dtype == HALO_F32 ? whole / 2 : whole;
  if (!is_worth || g->batch != 1 || !is_aligned(g->a) || !is_aligned(g->b) || g->c.ld % width != 0) return 0;
  if (g->n % whole != 0 && g->n > whole) return 'n'; // c is always contiguous along n
  if (g->k % whole != 0 && g->k > whole && (!g->a.transposed || g->b.transposed)) return 'k';
  if (g->m % whole != 0 && g->m > whole && g->a.transposed) return 'm';
  return 0;
}

/* The main part of a product, and what is left of it. */
void split(halo_gemm *main, halo_gemm *rest, char dim) {
  const int64_t element = main->c.dtype == HALO_F32 ? 4 : 2;
  *rest = *main;
  int64_t m = 0, n = 0, k = 0;
  if (dim == 'n') {
    n = main->n = main->n / whole * whole;
    rest->n -= n;
    if (rest->bias != nullptr) rest->bias = (const char *)rest->bias + n * element;
  } else if (dim == 'k') {
    k = main->k = main->k / whole * whole;
    rest->k -= k;
    rest->beta = 1;
    rest->addend.data = nullptr;
    rest->bias = nullptr;
  } else {
    m = main->m = main->m / whole * whole;
    rest->m -= m;
  }
  rest->a = moved(rest->a, m, k);
  rest->b = moved(rest->b, k, n);
  rest->c = moved(rest->c, m, n);
  rest->addend = moved(rest->addend, m, n);
}

halo_status in_parts(const halo_gemm *g) {
  const char dim = odd_dim(g);
  if (dim != 0) {
    halo_gemm main = *g, rest;
    split(&main, &rest, dim);
    HALO_TRY(in_parts(&main));
    return in_parts(&rest);
  }
  return with_bias(g);
}

/* Rows of a stored matrix must not overlap. */
bool fits(const halo_operand &x, int64_t rows, int64_t cols) {
  return x.transposed ? (cols <= 1 || x.ld >= rows) : (rows <= 1 || x.ld >= cols);
}

/* cuBLASLt wants ld >= the row length also where there is only one row. */
halo_operand tidy(halo_operand x, int64_t rows, int64_t cols) {
  const int64_t length = x.transposed ? rows : cols;
  if (x.ld < length) x.ld = length;
  if (x.ld < 1) x.ld = 1;
  return x;
}

} // namespace

halo_status halo_cuda_gemm(const halo_gemm *given) {
  halo_gemm g = *given;
  const halo_dtype a = g.a.dtype, b = g.b.dtype, c = g.c.dtype;
  const bool is_narrow = a != HALO_F64 && b != HALO_F64 && c != HALO_F64;
  HALO_CHECK((a == HALO_F64 && b == HALO_F64 && c == HALO_F64) ||
                 (is_narrow && (a == HALO_F32 || a == HALO_BF16) && (b == HALO_F32 || b == HALO_BF16) &&
                  (c == HALO_F32 || c == HALO_BF16)),
             HALO_EARG, "gemm: cannot mix %s, %s and %s", halo_dtype_name(a), halo_dtype_name(b),
             halo_dtype_name(c));
  HALO_CHECK(g.bias_grad == nullptr || (g.a.transposed && g.batch == 1), HALO_EARG,
             "gemm: bias_grad needs a transposed a and no batch");
  HALO_CHECK(g.addend.data == nullptr || (g.addend.dtype == c && !g.addend.transposed), HALO_EARG,
             "gemm: the addend must be like c");
  HALO_CHECK(fits(g.a, g.m, g.k) && fits(g.b, g.k, g.n) && fits(g.c, g.m, g.n) &&
                 (g.addend.data == nullptr || fits(g.addend, g.m, g.n)),
             HALO_EARG, "gemm: rows overlap: ld %lld, %lld, %lld for m, n, k = %lld, %lld, %lld",
             (long long)g.c.ld, (long long)g.a.ld, (long long)g.b.ld, (long long)g.m, (long long)g.n,
             (long long)g.k);
  HALO_CHECK(g.batch <= INT32_MAX, HALO_EUNSUPPORTED, "gemm: a batch of %lld", (long long)g.batch);
  if (g.bias_grad != nullptr && g.m > 0) HALO_TRY(bias_grad(&g));
  if (g.m == 0 || g.n == 0 || g.batch == 0 || g.k == 0) {
    return g.m == 0 || g.n == 0 || g.batch == 0 ? HALO_OK : finish(&g, nullptr, g.beta);
  }
  g.a = tidy(g.a, g.m, g.k);
  g.b = tidy(g.b, g.k, g.n);
  g.c = tidy(g.c, g.m, g.n);
  g.addend = tidy(g.addend, g.m, g.n);
  if (is_narrow && (a != b || (a == HALO_F32 && c == HALO_BF16))) return through_fp32(&g);
  return in_parts(&g);
}
