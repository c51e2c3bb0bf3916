/* internal.h: what core/ and kernels/ share and users never see.
 *
 * Error flow: HALO_CHECK states what a user can get wrong, assert what only a bug can break,
 * HALO_TRY forwards a failure. The _GOTO forms jump to a `done:` label that frees everything.
 */
#ifndef HALO_INTERNAL_H
#define HALO_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "halo.h"

#define HALO__VERSION 100 /* 0.1.0 */

/* Set the thread's message and return `status`. Never allocates. */
halo_status halo__error(halo_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* Put text before the message at hand ("rank 3, layer 12: ...") and return `status`. */
halo_status halo__error_prefix(halo_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#define HALO_CHECK(cond, status, ...)                                                     \
  do {                                                                                    \
    if (!(cond)) return halo__error((status), __VA_ARGS__);                               \
  } while (0)
#define HALO_TRY(call)                                                                    \
  do {                                                                                    \
    halo_status status_ = (call);                                                         \
    if (status_ != HALO_OK) return status_;                                               \
  } while (0)
/* The function has a local `halo_status status = HALO_OK;` and a `done:` label. */
#define HALO_CHECK_GOTO(cond, code, ...)                                                  \
  do {                                                                                    \
    if (!(cond)) {                                                                        \
      status = halo__error((code), __VA_ARGS__);                                          \
      goto done;                                                                          \
    }                                                                                     \
  } while (0)
#define HALO_TRY_GOTO(call)                                                               \
  do {                                                                                    \
    status = (call);                                                                      \
    if (status != HALO_OK) goto done;                                                     \
  } while (0)

/* ---- alloc.c ------------------------------------------------------------------------------- */

/* Memory of a device with a tag; host memory is 64-byte aligned and cached by size class, device
 * memory 256-byte aligned. The tag is the thread's current one (halo_memory_push_tag). NULL is
 * harmless to free; freed device memory stays good for work that is queued already. */
halo_status halo__alloc(void **out, int64_t bytes, halo_device device);
halo_status halo__alloc_zero(void **out, int64_t bytes, halo_device device);
void halo__free(void *p);
/* Host scratch of n elements of the given size, checked product; freed with halo__free. */
halo_status halo__scratch(void **out, int64_t n, int64_t element_bytes);
/* The same on a device. */
halo_status halo__scratch_on(void **out, int64_t n, int64_t element_bytes, halo_device device);
int32_t halo__current_tag(void);

/* a * b and a + b for sizes; false on overflow or negative arguments. */
static inline bool halo__mul(int64_t a, int64_t b, int64_t *out) {
  return a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, out);
}
static inline bool halo__add(int64_t a, int64_t b, int64_t *out) {
  return a >= 0 && b >= 0 && !__builtin_add_overflow(a, b, out);
}

/* offload.c: give spare pinned buffers back. */
void halo__offload_trim(void);

/* ---- device.c ------------------------------------------------------------------------------- */

/* HALO_EUNSUPPORTED with the reason when nothing can run there: no CUDA in this build, no driver, no
 * device. */
halo_status halo__device_ready(halo_device device);
/* "cpu" or "cuda". */
const char *halo__device_name(halo_device device);

/* ---- tensor.c ------------------------------------------------------------------------------ */

typedef struct halo__storage {
  void *data;
  int64_t bytes;
  halo_device device;
  int32_t references;
  void (*release)(void *data, void *owner); /* NULL: halo__free(data) */
  void *owner;                              /* for release: a mapped file, for instance */
} halo__storage;

typedef struct halo__node halo__node;

struct halo_tensor {
  halo__storage *storage;
  int64_t offset; /* elements from storage->data */
  int32_t references;
  halo_dtype dtype;
  int32_t ndim;
  int64_t shape[HALO_MAX_DIMS];
  int64_t stride[HALO_MAX_DIMS]; /* elements */
  bool requires_grad;            /* leaf: gradient wanted; result: some input asked for it */
  halo_tensor *grad;             /* leaf: accumulated gradient */
  halo__node *node;              /* result: the node that made it (owns a reference) */
  int32_t node_output;           /* which output of the node this is */
};

static inline bool halo__is_float(halo_dtype t) {
  return t == HALO_F32 || t == HALO_F64 || t == HALO_BF16;
}
/* dtype in which sums and statistics of `t` are kept: F32 for F32 and BF16, F64 for F64. */
static inline halo_dtype halo__acc_dtype(halo_dtype t) { return t == HALO_F64 ? HALO_F64 : HALO_F32; }
static inline halo_device halo__device(const halo_tensor *t) { return t->storage->device; }
static inline void *halo__data(const halo_tensor *t) { return halo_tensor_data(t); }

/* "f32 [2,96,64]" into a static thread-local ring of buffers, for messages. */
const char *halo__describe(const halo_tensor *t);
bool halo__same_shape(const halo_tensor *a, const halo_tensor *b);
/* New tensor like t (contiguous, same dtype, shape, device). */
halo_status halo__new_like(halo_tensor **out, const halo_tensor *t);
halo_status halo__zeros_like(halo_tensor **out, const halo_tensor *t);
/* A view with its own shape and strides (elements), offset relative to t's. */
halo_status halo__view(halo_tensor **out, halo_tensor *t, int32_t ndim, const int64_t *shape,
                       const int64_t *stride, int64_t offset);
/* t itself (retained) when contiguous, else a contiguous copy. */
halo_status halo__contiguous(halo_tensor **out, halo_tensor *t);
/* A view of n contiguous tensors that lie one after the other in one piece of memory and agree in all
 * dims but the first; *out stays NULL where they do not. */
halo_status halo__joined(halo_tensor **out, halo_tensor *const *parts, int32_t n);
/* A tensor without data (halo_tensor_data gives NULL). */
halo_status halo__meta_new(halo_tensor **out, halo_dtype dtype, halo_device device, int32_t ndim,
                           const int64_t *shape);
/* Shape, dtype and device of t without its data (halo_tensor_data gives NULL). */
halo_status halo__meta_like(halo_tensor **out, const halo_tensor *t);
/* A tensor over memory somebody else owns; release(data, owner) runs when the last view goes. */
halo_status halo__wrap(halo_tensor **out, void *data, int64_t bytes, halo_dtype dtype,
                       halo_device device, int32_t ndim, const int64_t *shape,
                       void (*release)(void *data, void *owner), void *owner);

/* ---- ops.c and tape.c ---------------------------------------------------------------------- */

/* One invocation of an op, and the record the tape keeps of it.
 *
 * Forward:  in[], param[] are given; the op makes out[] and may put what backward needs into saved[]
 *           (owned by the call) and extra (freed with free_extra). `wants_grad` says whether a
 *           gradient will ever be asked for: save nothing when false.
 * Backward: grad_out[] are the gradients of out[] (NULL where none arrived); the op sets grad_in[i]
 *           (a new tensor, owned by the tape) for every i with need_grad[i]. Leaving it NULL means
 *           zero. out[] is NULL in backward: save what is needed. */
typedef struct halo__call {
  int32_t op;
  int32_t n_in, n_out, n_param;
  halo_tensor *in[HALO_MAX_INPUTS];   /* NULL for absent optional inputs */
  halo_tensor *out[HALO_MAX_OUTPUTS];
  double param[HALO_MAX_PARAMS];
  halo_tensor *saved[8];
  void *extra;
  void (*free_extra)(void *extra);
  bool wants_grad;
  bool need_grad[HALO_MAX_INPUTS];
  /* Set by forward: backward needs only the shape and dtype of in[i], so the tape may let its data
   * go. in[i] is then a tensor without data. */
  bool drop_in[HALO_MAX_INPUTS];
  /* Set by the tape before backward when in[i] is a leaf with a gradient buffer: the op may add its
   * gradient there itself (gemm with beta = 1) and report it in accumulated[i]. */
  halo_tensor *accumulate_into[HALO_MAX_INPUTS];
  bool accumulated[HALO_MAX_INPUTS];
  halo_tensor *grad_out[HALO_MAX_OUTPUTS];
  halo_tensor *grad_in[HALO_MAX_INPUTS];
} halo__call;

typedef halo_status (*halo__call_fn)(halo__call *c);

/* Drop a reference to a node; frees it and what it holds at zero. NULL is harmless. */
void halo__node_release(halo__node *node);
/* Run a call that is not in ops.def (attention takes a plan and a ring; its c->op is
 * HALO_CALL_attention, -1 for none): forward, then record with
 * `backward` if an input wants a gradient. Fills c->wants_grad before forward. On success the
 * caller owns c->out[]; saved and extra belong to the tape or are freed. */
halo_status halo__run(halo__call *c, const char *name, halo__call_fn forward,
                      halo__call_fn backward);

/* The op that this thread runs now, for messages: NULL outside of ops. is_backward may be NULL. */
const char *halo__op_now(bool *is_backward);
/* Its number (HALO_OP_x or HALO_CALL_x), -1 outside of ops. */
int32_t halo__op_number_now(void);

/* Ops as C calls, for use inside core. */
halo_status halo__op1(halo_tensor **out, int32_t op, halo_tensor *x, const double *params,
                      int32_t n_params);
halo_status halo__op2(halo_tensor **out, int32_t op, halo_tensor *a, halo_tensor *b,
                      const double *params, int32_t n_params);

enum {
#define HALO_OP(name, inputs, params, outputs, gradient, doc) HALO_OP_##name,
#include "ops.def"
#undef HALO_OP
  HALO_OP__COUNT,
  HALO_CALL_attention = HALO_OP__COUNT, /* calls that take more than tensors: not in the table */
  HALO_CALL__COUNT
};

/* ---- device.c ------------------------------------------------------------------------------ */

/* The HALO_MATH_ flags in force, FIXED with halo_set_deterministic as well; kernels/cuda/gemm.cu asks. */
int32_t halo__math(void);

/* ---- trace.c and signals.c ------------------------------------------------------------------ */

/* A span around an op (HALO_OP_x or HALO_CALL_x); close with halo_trace_end. Never fails; a token is a plain number. */
enum { HALO__TRACE_NAMES = 1024 }; /* span names of a process; the engine itself has under 200 */
/* trace_device.c: marks around spans; NULL and false when device timing is off on this thread. */
bool halo__trace_device_is_on(void);
void *halo__trace_device_begin(void);
void halo__trace_device_end(int32_t id, int32_t parent, void *from);
halo_status halo__trace_device_read(double *seconds_out, double *self_out, int32_t id);
void halo__trace_device_reset(void);
int32_t halo__trace_op_begin(int32_t op, bool is_backward);
/* Flight recorder: around every collective and every hop of a ring. `op` and `comm` must be string
 * literals (or live as long as the process): only the pointers are kept. peer -1: all ranks. */
int64_t halo__trace_comm_begin(const char *op, const char *comm, int64_t bytes, int32_t peer);
void halo__trace_comm_end(int64_t seq);
/* Write the recorder to fd; safe in a signal handler. */
bool halo__trace_flight_write(int fd);

/* ---- json.c --------------------------------------------------------------------------------- */

typedef enum halo__json_kind {
  HALO__JSON_ERROR = -1,
  HALO__JSON_END,
  HALO__JSON_OBJECT,
  HALO__JSON_OBJECT_END,
  HALO__JSON_ARRAY,
  HALO__JSON_ARRAY_END,
  HALO__JSON_KEY,
  HALO__JSON_STRING,
  HALO__JSON_NUMBER,
  HALO__JSON_TRUE,
  HALO__JSON_FALSE,
  HALO__JSON_NULL
} halo__json_kind;

enum { HALO__JSON_DEPTH = 64 };

/* Strict pull parser over a text of our own: strings are decoded in place. */
typedef struct halo__json {
  char *start, *at, *end;
  int32_t state, depth, max_depth;
  uint64_t objects; /* bit d: level d is an object */
  char *text;       /* the last key, string or number; strings end in NUL */
  size_t length;
  const char *error;
  size_t error_offset;
} halo__json;

void halo__json_init(halo__json *j, char *text, size_t length, int32_t max_depth);
/* The next token; HALO__JSON_END only after one whole value and white space. An error stays. */
halo__json_kind halo__json_next(halo__json *j);
/* Pass over the value that `kind` began (of the key, when kind is KEY); false on error. */
bool halo__json_skip(halo__json *j, halo__json_kind kind);
/* Whether the last key or string is `text`. */
bool halo__json_is(const halo__json *j, const char *text);
/* The last number, if it is written as an integer and fits. */
bool halo__json_int(const halo__json *j, int64_t *out);
/* HALO_ECORRUPT with offset and reason; `what` names the file. */
halo_status halo__json_error(const halo__json *j, const char *what);
bool halo__is_utf8(const char *bytes, size_t n);

/* A growing text, always with a NUL behind it; {0} is empty. */
typedef struct halo__text {
  char *text;
  size_t n, capacity;
} halo__text;
halo_status halo__text_add(halo__text *t, const char *bytes, size_t n);
/* At most 511 bytes a call. */
halo_status halo__text_print(halo__text *t, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* As a JSON string. */
halo_status halo__text_quote(halo__text *t, const char *bytes, size_t n);
void halo__text_free(halo__text *t);

/* ---- sha256.c ------------------------------------------------------------------------------- */

typedef struct halo__sha256 {
  uint32_t h[8];
  uint64_t bytes;
  uint8_t block[64];
  void (*blocks)(uint32_t h[8], const uint8_t *p, size_t n_blocks);
} halo__sha256;

/* portable: without the processor's SHA instructions (tests compare both). */
void halo__sha256_init(halo__sha256 *s, bool portable);
void halo__sha256_add(halo__sha256 *s, const void *data, size_t n);
/* Lower-case hex and a NUL. */
void halo__sha256_end(halo__sha256 *s, char hex_out[65]);

/* ---- file.c --------------------------------------------------------------------------------- */

enum { HALO__PATH = 4096, HALO__CHUNK = 4 << 20 };

/* Calls that change the file system. The hook is asked before each one and answers 0 (go on), an
 * errno (fail with it), or -k (a write takes at most k bytes). `to` is the target of a rename. */
typedef enum halo__file_call {
  HALO__FILE_CREATE,
  HALO__FILE_ALLOCATE,
  HALO__FILE_WRITE,
  HALO__FILE_SYNC, /* of a file or a folder */
  HALO__FILE_MKDIR,
  HALO__FILE_RENAME,
  HALO__FILE_EXCHANGE,
  HALO__FILE_REMOVE
} halo__file_call;
extern int (*halo__file_hook)(halo__file_call call, const char *path, const char *to);

typedef struct halo__names {
  char **name;
  int32_t n;
} halo__names;

/* `who` is the name of the public function, for messages. */
halo_status halo__file_join(char out[HALO__PATH], const char *who, const char *folder,
                            const char *name);
void halo__file_parent(char *out, size_t capacity, const char *path);
/* [A-Za-z0-9._-]{1,255} without a leading dot: a name that cannot leave its folder. */
bool halo__file_is_plain_name(const char *name, size_t length);
halo_status halo__file_list(halo__names *out, const char *who, const char *folder); /* sorted */
void halo__names_free(halo__names *names);
halo_status halo__file_mkdir(const char *who, const char *path); /* no complaint if it is there */
halo_status halo__file_rename(const char *who, const char *from, const char *to);
halo_status halo__file_exchange(const char *who, const char *a, const char *b); /* atomic swap */
halo_status halo__file_sync_folder(const char *who, const char *path);
/* Links are removed, not followed; nothing there is fine. */
halo_status halo__file_remove_tree(const char *who, const char *path, int32_t max_depth);

/* An open regular file, and who it was when it was opened. */
typedef struct halo__input {
  int fd;
  int64_t size, mtime_ns;
  uint64_t device, inode;
} halo__input;
halo_status halo__input_open(halo__input *out, const char *who, const char *path, bool follow_links);
void halo__input_close(halo__input *in);
bool halo__input_same(const halo__input *a, const halo__input *b);
/* HALO_EIO when the file is shorter than that. */
halo_status halo__input_read(const halo__input *in, const char *who, const char *path, void *to,
                             int64_t n, int64_t offset);
/* A whole small file, NUL behind it; halo__free it. Larger than max_bytes: HALO_ECORRUPT. */
halo_status halo__file_slurp(char **text_out, int64_t *bytes_out, const char *who, const char *path,
                             int64_t max_bytes, bool follow_links);

/* What a file must contain: XXH3-64 of each HALO__CHUNK bytes, SHA-256 of all. */
typedef struct halo__digest {
  int64_t bytes, n_chunks;
  uint64_t *chunks; /* halo__digest_free */
  char sha256[65];
} halo__digest;
void halo__digest_free(halo__digest *d);
/* HALO_ECORRUPT when the file differs; deep: the SHA-256 too. bad_out: start of the first chunk that
 * differs or cannot be read, -1 when it is not about one. */
halo_status halo__file_verify(int64_t *bad_out, const char *who, const char *path, const halo__digest *d,
                              bool deep);

/* A new file of exactly expected_bytes, written in order; see file.c for what closing proves. close and
 * abandon free it; a failed close has removed the file. `who` must outlive the sink. */
typedef struct halo__sink halo__sink;
halo_status halo__sink_open(halo__sink **out, const char *who, const char *path,
                            int64_t expected_bytes, bool wants_digest);
halo_status halo__sink_write(halo__sink *s, const void *data, int64_t n);
halo_status halo__sink_close(halo__sink *s, halo__digest *digest_out);
void halo__sink_abandon(halo__sink *s);
halo_status halo__file_write(const char *who, const char *path, const void *data, int64_t bytes,
                             halo__digest *digest_out);

#endif
