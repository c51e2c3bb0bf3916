/* halo.h: the whole public C API of Halo.
 *
 * This text is also what LuaJIT reads (the build removes preprocessor lines), so it holds only what
 * ffi.cdef accepts: opaque structs, enums, plain functions; no varargs, no struct by value, no
 * callbacks from C into Lua.
 *
 * Conventions
 *   status     every function that can fail returns halo_status; HALO_OK is 0, failures are negative;
 *              the text is in halo_error_message() of the same thread
 *   ownership  what comes through an `out` pointer is yours to free; what a getter returns is borrowed
 *              and lives as long as its parent; halo_x_free(NULL) is harmless
 *   errors     on failure, outputs are untouched and inputs unchanged
 *   shapes     B batch, N tokens of the whole sequence, T tokens held here, W ranks of the ring,
 *              H query heads, Hk key/value heads, D head size, E model size, F feed-forward size,
 *              V vocabulary, G block edge in tokens; dims and indices are 0-based
 *
 * Banners, from simple to advanced: Status, Device and memory, Random, Tensor, Ops, Autograd,
 * Optimizer, Communication, Layout, Plan, Ring, Attention, Safetensors, Checkpoint, Tokenizer, Data,
 * Trace.
 */
#ifndef HALO_H
#define HALO_H

#include <stddef.h>
#include <stdint.h>

#if defined(HALO_BUILDING)
#define HALO_API __attribute__((visibility("default")))
#else
#define HALO_API
#endif

/* ---- Status ------------------------------------------------------------------------------- */

/* Classes of failure; tests and callers look at the class, people at the text. */
typedef enum halo_status {
  HALO_OK = 0,
  HALO_EARG = -1,         /* an argument is wrong: value, shape, dtype, device */
  HALO_ENOMEM = -2,       /* host or device memory is exhausted */
  HALO_EIO = -3,          /* a file or stream operation failed */
  HALO_ECORRUPT = -4,     /* a file's content contradicts itself or its checksum */
  HALO_EVERSION = -5,     /* a file or library of another format version */
  HALO_ECUDA = -6,        /* the CUDA runtime or driver failed */
  HALO_ECOMM = -7,        /* communication failed, or a peer is lost */
  HALO_ESTATE = -8,       /* called at the wrong time or in the wrong order */
  HALO_EUNSUPPORTED = -9, /* valid, but not offered on this device or build */
  HALO_ENUMERIC = -10,    /* a result is not finite where it must be */
  HALO_EINTERRUPTED = -11 /* a signal asked to stop */
} halo_status;

/* Text of the last failure on this thread; "" when there was none. Borrowed, valid until the next
 * failing call on this thread. */
HALO_API const char *halo_error_message(void);
/* "HALO_EARG" and so on; "HALO_E?" for an unknown code. */
HALO_API const char *halo_status_name(int32_t status);
/* Version as major*10000 + minor*100 + patch; compared with the Lua side when it loads. */
HALO_API int32_t halo_version(void);

/* ---- Device and memory -------------------------------------------------------------------- */

typedef enum halo_device { HALO_CPU = 0, HALO_CUDA = 1 } halo_device;

/* Who a byte belongs to; every allocation carries the tag on top of the thread's tag stack. */
typedef enum halo_tag {
  HALO_TAG_OTHER = 0,
  HALO_TAG_WEIGHTS = 1,
  HALO_TAG_GRADIENTS = 2,
  HALO_TAG_OPTIMIZER = 3,
  HALO_TAG_ACTIVATIONS = 4,
  HALO_TAG_RING = 5,
  HALO_TAG_PLAN = 6,
  HALO_TAG_DATA = 7,
  HALO_TAG_COUNT = 8
} halo_tag;

/* Number of devices of a kind: 1 for HALO_CPU, 0 or more for HALO_CUDA. Never fails: 0 without CUDA in
 * the build, without a driver, or without a device. */
HALO_API int32_t halo_device_count(int32_t device);
/* Why the count is 0; "" when it is not. Borrowed. */
HALO_API const char *halo_device_reason(int32_t device);

typedef struct halo_device_row {
  char name[96];
  int64_t total_bytes, free_bytes;
  int32_t major, minor; /* compute capability; 0 for HALO_CPU */
  int32_t processors;   /* multiprocessors, or cores */
} halo_device_row;
/* Facts about device `index` of a kind. */
HALO_API halo_status halo_device_read(halo_device_row *out, int32_t device, int32_t index);
/* Which device of a kind this process uses; before its first work there (HALO_ESTATE after). */
HALO_API halo_status halo_device_select(int32_t device, int32_t index);
/* What CUDA code this build has, "sm_80 sm_90a"; "" for a build without CUDA. */
HALO_API const char *halo_cuda_targets(void);
/* Versions of driver and runtime as CUDA writes them (13000 is 13.0); 0: there is none. */
HALO_API void halo_cuda_versions(int32_t *driver_out, int32_t *runtime_out);
/* Wait until all work queued on a device is done, and report what failed in it. */
HALO_API halo_status halo_synchronize(int32_t device);
/* Bytes handed out now and at most so far, by tag; tag -1 sums all. */
HALO_API int64_t halo_memory_live_bytes(int32_t device, int32_t tag);
HALO_API int64_t halo_memory_peak_bytes(int32_t device, int32_t tag);
HALO_API void halo_memory_reset_peak(int32_t device);
/* Give cached free blocks back to the system. */
HALO_API void halo_memory_trim(int32_t device);
/* Refuse allocations that would pass `bytes` live bytes (0: no limit). A budget for tests and for
 * shared machines. */
HALO_API void halo_memory_limit(int32_t device, int64_t bytes);
/* Make the n-th allocation from now fail once (0 = the next; -1 = never). For failure tests. */
HALO_API void halo_memory_fail_after(int64_t n);
HALO_API void halo_memory_push_tag(int32_t tag);
HALO_API void halo_memory_pop_tag(void);
/* OpenMP and BLAS threads of this process; 0 asks for the machine's share. Returns the number set. */
HALO_API int32_t halo_set_threads(int32_t n);
HALO_API int32_t halo_threads(void);
/* How the CUDA device may multiply. HALO_MATH_TF32: fp32 products on the tensor cores, which round
 * their inputs to 11 bits (default: true fp32; HALO_TF32=1 in the environment sets it at start).
 * HALO_MATH_FIXED: algorithms come from the library's own ranking and not from a race on first use,
 * so that another process adds in the same order (HALO_MATH_FIXED=1 sets it at start). Returns the
 * flags before; -1 changes nothing. */
enum { HALO_MATH_TF32 = 1, HALO_MATH_FIXED = 2 };
HALO_API int32_t halo_set_math(int32_t flags);
/* Whether sums on a GPU come in a fixed order, so that runs repeat bit for bit; off at first, since it
 * costs speed in attention's backward. The CPU always repeats. */
HALO_API void halo_set_deterministic(int32_t on);
HALO_API int32_t halo_deterministic(void);

/* ---- Random --------------------------------------------------------------------------------- */

/* Counter-based (Philox 4x32-10, Salmon et al. 2011): value i of stream (seed, stream) is a pure
 * function, so any rank can compute any part of any tensor. */
HALO_API uint64_t halo_random_u64(uint64_t seed, uint64_t stream, uint64_t index);
/* In [0,1), 53 bits. */
HALO_API double halo_random_uniform(uint64_t seed, uint64_t stream, uint64_t index);

/* ---- Tensor --------------------------------------------------------------------------------- */

/* Storage plus a strided view of it; storage is reference counted and shared by views. */
typedef struct halo_tensor halo_tensor;

typedef enum halo_dtype {
  HALO_F32 = 0,
  HALO_F64 = 1,
  HALO_BF16 = 2,
  HALO_I32 = 3,
  HALO_I64 = 4,
  HALO_U8 = 5,
  HALO_DTYPE_COUNT = 6
} halo_dtype;

enum { HALO_MAX_DIMS = 8 };

HALO_API int64_t halo_dtype_bytes(int32_t dtype);    /* -1 if unknown */
HALO_API const char *halo_dtype_name(int32_t dtype); /* "f32", "bf16", ... */

/* A new contiguous tensor; contents undefined (halo_tensor_new) or zero. ndim 0 is a scalar. */
HALO_API halo_status halo_tensor_new(halo_tensor **out, int32_t dtype, int32_t device, int32_t ndim,
                                     const int64_t *shape);
HALO_API halo_status halo_tensor_zeros(halo_tensor **out, int32_t dtype, int32_t device,
                                       int32_t ndim, const int64_t *shape);
/* A contiguous copy of host data of the given dtype. */
HALO_API halo_status halo_tensor_from(halo_tensor **out, int32_t dtype, int32_t device,
                                      int32_t ndim, const int64_t *shape, const void *host);
/* Another handle on the same view (reference count + 1). */
HALO_API halo_status halo_tensor_retain(halo_tensor **out, halo_tensor *t);
HALO_API void halo_tensor_free(halo_tensor *t);

HALO_API int32_t halo_tensor_dtype(const halo_tensor *t);
HALO_API int32_t halo_tensor_device(const halo_tensor *t);
HALO_API int32_t halo_tensor_ndim(const halo_tensor *t);
HALO_API int64_t halo_tensor_size(const halo_tensor *t, int32_t dim);   /* dim may be negative */
HALO_API int64_t halo_tensor_stride(const halo_tensor *t, int32_t dim); /* in elements */
HALO_API int64_t halo_tensor_count(const halo_tensor *t);               /* number of elements */
HALO_API int32_t halo_tensor_is_contiguous(const halo_tensor *t);
/* First element; a device pointer on CUDA. Writing through it is not seen by the tape. */
HALO_API void *halo_tensor_data(const halo_tensor *t);
/* Copy all elements to or from contiguous host memory of the tensor's dtype. */
HALO_API halo_status halo_tensor_read(const halo_tensor *t, void *host);
HALO_API halo_status halo_tensor_write(halo_tensor *t, const void *host);
/* Element as a double, by flat row-major index (slow: for the prompt and tests). */
HALO_API halo_status halo_tensor_get(const halo_tensor *t, int64_t flat, double *out);
HALO_API halo_status halo_tensor_set(halo_tensor *t, int64_t flat, double value);
HALO_API halo_status halo_tensor_fill(halo_tensor *t, double value);
/* dst <- src, converting dtype and device; shapes must agree. Outside the tape. */
HALO_API halo_status halo_tensor_copy(halo_tensor *dst, const halo_tensor *src);
/* dst += scale * src, same shape; outside the tape (gradient accumulation, moving averages). */
HALO_API halo_status halo_tensor_add_scaled(halo_tensor *dst, const halo_tensor *src, double scale);
/* t *= scale, in place, outside the tape. */
HALO_API halo_status halo_tensor_scale(halo_tensor *t, double scale);
/* Fill with normal(mean, std) or uniform[lo,hi) numbers; element i depends on (seed, stream, i). */
HALO_API halo_status halo_tensor_normal(halo_tensor *t, uint64_t seed, uint64_t stream, double mean,
                                        double std);
HALO_API halo_status halo_tensor_uniform(halo_tensor *t, uint64_t seed, uint64_t stream, double lo,
                                         double hi);
/* XXH3 64-bit hash of dtype, shape and bytes; equal tensors hash equal on every rank. */
HALO_API halo_status halo_tensor_hash(const halo_tensor *t, uint64_t *out);

/* ---- Ops ------------------------------------------------------------------------------------ */

/* The op table (core/ops.def) is the only list of ops. Each op has a name, 1..HALO_MAX_INPUTS inputs,
 * named numeric parameters with defaults ("dim=-1,keepdim=0") and one or more outputs. Lua builds
 * one function per row when it loads. Ops with a gradient are recorded on the tape when an input
 * asks for it. Optional inputs may be NULL. */
enum { HALO_MAX_INPUTS = 8, HALO_MAX_OUTPUTS = 4, HALO_MAX_PARAMS = 12 };

HALO_API int32_t halo_op_count(void);
HALO_API const char *halo_op_name(int32_t op);
HALO_API const char *halo_op_inputs(int32_t op); /* "a,b" or "x,w,bias?"; "..." for a list */
HALO_API const char *halo_op_params(int32_t op); /* "dim=-1,keepdim=0" */
HALO_API const char *halo_op_doc(int32_t op);    /* one paragraph: formula, shapes, source */
HALO_API int32_t halo_op_outputs(int32_t op);
HALO_API int32_t halo_op_has_gradient(int32_t op);
HALO_API int32_t halo_op_find(const char *name); /* -1 if unknown */
/* Run op on inputs; params are in the order of halo_op_params, all given.
 * ownership  each out[i] is yours. */
HALO_API halo_status halo_op(halo_tensor **out, int32_t op, halo_tensor *const *in, int32_t n_in,
                             const double *params, int32_t n_params);

/* ---- Autograd ------------------------------------------------------------------------------- */

/* Mark a leaf whose gradient is wanted (floating dtypes only). */
HALO_API halo_status halo_tensor_require_grad(halo_tensor *t, int32_t on);
HALO_API int32_t halo_tensor_requires_grad(const halo_tensor *t);
/* Accumulated gradient: borrowed, NULL before the first backward. */
HALO_API halo_tensor *halo_tensor_grad(const halo_tensor *t);
/* Use `grad` (same shape) as the place gradients are added to; NULL drops the gradient. Lets an
 * optimizer keep all gradients in one flat buffer. */
HALO_API halo_status halo_tensor_set_grad(halo_tensor *t, halo_tensor *grad);
/* A view of the same data that the tape does not follow. */
HALO_API halo_status halo_tensor_detach(halo_tensor **out, halo_tensor *t);
/* Recording is on by default; returns the old setting. */
HALO_API int32_t halo_tape_set_enabled(int32_t on);
HALO_API int32_t halo_tape_enabled(void);
/* Nodes alive now, for leak tests. */
HALO_API int64_t halo_tape_live_nodes(void);

/* Recompute ("checkpoint"): a node whose forward is run again in backward by the caller.
 *   1. run the function on inputs with the tape off, giving outputs
 *   2. halo_tape_checkpoint(outputs, inputs, token): outputs become results of one node
 *   3. in backward, halo_backward_next returns HALO_BACKWARD_RECOMPUTE with the token; the caller
 *      runs the function again with the tape on, on the tensors of halo_backward_inputs, and hands
 *      the results to halo_backward_recomputed; then polls on.
 * C never calls Lua. Random state and plans are captured by the closure, so that the second forward
 * is bitwise the first. Rows may be NULL where an output was not a tensor. */
HALO_API halo_status halo_tape_checkpoint(halo_tensor *const *outputs, int32_t n_out,
                                          halo_tensor *const *inputs, int32_t n_in, int64_t token);

/* The same; inputs whose bit is set in `offload` wait in pinned host memory meanwhile, and come back one
 * checkpoint ahead of need (halo_offload_new). For inputs of blocks at the longest contexts. */
HALO_API halo_status halo_tape_checkpoint_offload(halo_tensor *const *outputs, int32_t n_out,
                                                  halo_tensor *const *inputs, int32_t n_in,
                                                  int64_t token, uint32_t offload);

/* Tokens of checkpoints whose forward was dropped without a backward, since the last call: their
 * functions can be forgotten. Fills up to capacity and returns how many; more may be left then. */
HALO_API int32_t halo_tape_dropped(int64_t *tokens, int32_t capacity);

typedef struct halo_backward halo_backward;
enum { HALO_BACKWARD_DONE = 0, HALO_BACKWARD_RECOMPUTE = 1 };

/* Start from `root` (any shape) with gradient `seed` of the same shape (NULL: ones). Gradients of
 * leaves are added to what is there. The tape below root is freed as it is used. */
HALO_API halo_status halo_backward_begin(halo_backward **out, halo_tensor *root, halo_tensor *seed);
/* Work until the next event. */
HALO_API halo_status halo_backward_next(halo_backward *b, int32_t *event_out, int64_t *token_out);
/* Inputs of the node to recompute, as fresh leaves; borrowed until halo_backward_recomputed. */
HALO_API halo_status halo_backward_inputs(halo_backward *b, halo_tensor **out, int32_t capacity,
                                          int32_t *n_out);
HALO_API halo_status halo_backward_recomputed(halo_backward *b, halo_tensor *const *outputs,
                                              int32_t n_out);
HALO_API void halo_backward_free(halo_backward *b);

/* A tensor that waits in pinned host memory. halo_offload_new begins the copy, beside the computation; the
 * device memory goes when the copy is done and the caller has freed the tensor. prefetch begins the way
 * back, fetch makes the computation (not the host) wait for it and gives a new tensor, as often as wanted.
 * A tensor in host memory is simply kept. */
typedef struct halo_offload halo_offload;
HALO_API halo_status halo_offload_new(halo_offload **out, halo_tensor *t);
HALO_API halo_status halo_offload_prefetch(halo_offload *o);
HALO_API halo_status halo_offload_fetch(halo_tensor **out, halo_offload *o);
HALO_API void halo_offload_free(halo_offload *o);
/* Pinned host memory held, spare buffers included; halo_memory_trim(HALO_CUDA) gives those back. */
HALO_API int64_t halo_offload_host_bytes(void);

/* ---- Optimizer ------------------------------------------------------------------------------ */

/* AdamW (Loshchilov and Hutter 2019) over a list of parameters whose gradients live in one flat
 * fp32 (fp64 for fp64 parameters) buffer. */
typedef struct halo_adamw halo_adamw;

/* decay[i] multiplies weight_decay for parameter i (0 for norms and biases). moments: HALO_F32 for the
 * arithmetic dtype, HALO_BF16 for half the memory, rounded stochastically. */
HALO_API halo_status halo_adamw_new(halo_adamw **out, halo_tensor *const *params,
                                    const double *decay, int32_t n, int32_t moments);
HALO_API void halo_adamw_free(halo_adamw *o);
/* All gradients as one flat tensor (borrowed), in parameter order: what an all-reduce wants. */
HALO_API halo_tensor *halo_adamw_flat_grad(const halo_adamw *o);
/* First and second moments as flat tensors, for checkpoints (borrowed). fp32 master copies for bf16
 * parameters; NULL when parameters are their own masters. */
HALO_API halo_tensor *halo_adamw_moment1(const halo_adamw *o);
HALO_API halo_tensor *halo_adamw_moment2(const halo_adamw *o);
HALO_API halo_tensor *halo_adamw_master(const halo_adamw *o);
/* Offset in elements of parameter i in the flat tensors. */
HALO_API int64_t halo_adamw_offset(const halo_adamw *o, int32_t i);
/* Zero all gradients. */
HALO_API halo_status halo_adamw_zero_grad(halo_adamw *o);
/* Sum of squares of all gradients, fixed order, fp64. */
HALO_API halo_status halo_adamw_grad_norm2(halo_adamw *o, double *out);
/* One update with gradients multiplied by grad_scale; step counts from 1 (bias correction).
 * source  PyTorch's torch.optim.AdamW order: p -= lr*wd*p, then p -= lr*mhat/(sqrt(vhat)+eps). */
HALO_API halo_status halo_adamw_step(halo_adamw *o, int64_t step, double lr, double beta1,
                                     double beta2, double eps, double weight_decay,
                                     double grad_scale);

/* ---- Communication -------------------------------------------------------------------------- */

/* A communicator over W ranks, of which `here` live in this process:
 *   self   W = 1, here = 1: every call is a no-op or a copy
 *   local  W virtual ranks in one process, here = W: tests, the REPL, `halo check`; lockstep
 *   mpi    W processes, here = 1
 * Buffers of collectives are given per rank here, as arrays of `here` pointers. All ranks call in
 * the same order. Host memory only; a device transport copies by its own means. */
typedef struct halo_comm halo_comm;

HALO_API halo_status halo_comm_self(halo_comm **out);
HALO_API halo_status halo_comm_local(halo_comm **out, int32_t world);
/* The MPI world; initialises MPI on first use. HALO_ESTATE if the launcher's rank count (OMPI,
 * SLURM variables) disagrees with MPI's, which means that every process thinks it is alone. */
HALO_API halo_status halo_comm_world(halo_comm **out);
/* Ranks with the same color (0 or more) form a new communicator, ordered by key. Collective. The
 * ranks of self and local always form one: they give a copy of themselves. */
HALO_API halo_status halo_comm_split(halo_comm **out, halo_comm *c, int32_t color, int32_t key);
HALO_API void halo_comm_free(halo_comm *c);
/* Finalise MPI if this library initialised it. */
HALO_API void halo_comm_shutdown(void);
/* End every rank of the job at once, with this exit code; the last resort after an error. Returns
 * for transports that cannot (self, local). */
HALO_API void halo_comm_abort(halo_comm *c, int32_t exit_code);

HALO_API int32_t halo_comm_rank(const halo_comm *c);  /* of the first rank here */
HALO_API int32_t halo_comm_size(const halo_comm *c);  /* W */
HALO_API int32_t halo_comm_here(const halo_comm *c);  /* ranks in this process */
HALO_API const char *halo_comm_name(const halo_comm *c); /* "self", "local", "mpi" */
HALO_API halo_status halo_comm_barrier(halo_comm *c);
/* In-place sum over ranks, rank order fixed, so that runs repeat bit for bit; dtype f32, f64, i64. */
HALO_API halo_status halo_comm_all_reduce(halo_comm *c, void *const *buffers, int64_t count,
                                          int32_t dtype);
/* In-place maximum over ranks. */
HALO_API halo_status halo_comm_all_reduce_max(halo_comm *c, void *const *buffers, int64_t count,
                                              int32_t dtype);
HALO_API halo_status halo_comm_broadcast(halo_comm *c, void *const *buffers, int64_t bytes,
                                         int32_t root);
/* out[i] gets W pieces of `bytes` each, in rank order. */
HALO_API halo_status halo_comm_all_gather(halo_comm *c, void *const *out, const void *const *in,
                                          int64_t bytes);
/* Like all_gather with bytes[r] from rank r. */
HALO_API halo_status halo_comm_all_gatherv(halo_comm *c, void *const *out, const void *const *in,
                                           const int64_t *bytes);
/* Piece r of in[i] (bytes each) goes to rank r; out[i] gets one piece from each rank, in rank order. */
HALO_API halo_status halo_comm_all_to_all(halo_comm *c, void *const *out, const void *const *in,
                                          int64_t bytes);
/* In-place sum of a tensor over processes: ranks of one process (local) share one tensor, which holds
 * their sum already. */
HALO_API halo_status halo_comm_all_reduce_tensor(halo_comm *c, halo_tensor *t);
/* Compare a 64-bit value over ranks: HALO_ESTATE naming the first rank that differs. */
HALO_API halo_status halo_comm_same(halo_comm *c, uint64_t value, const char *what);
/* Seconds spent waiting in communication since the last reset: the exposed part. */
HALO_API double halo_comm_exposed_seconds(halo_comm *c);
HALO_API void halo_comm_reset_timer(halo_comm *c);

/* Ranks named by axes: world rank = (data * outer + o) * inner + i. The ring is outer x inner; `data`
 * repeats it over other sequences. See core/mesh.c. */
typedef struct halo_mesh halo_mesh;
typedef enum halo_axis { HALO_AXIS_DATA = 0, HALO_AXIS_OUTER = 1, HALO_AXIS_INNER = 2 } halo_axis;

/* data * outer * inner must be the size of `world`. Collective. Virtual ranks form one ring. */
HALO_API halo_status halo_mesh_new(halo_mesh **out, halo_comm *world, int32_t data, int32_t outer,
                                   int32_t inner);
HALO_API void halo_mesh_free(halo_mesh *m);
/* Ranks along an axis, and this rank's place on it; -1 for an unknown axis. */
HALO_API int32_t halo_mesh_size(const halo_mesh *m, int32_t axis);
HALO_API int32_t halo_mesh_place(const halo_mesh *m, int32_t axis);
/* Ranks that share this rank's sequences; ranks that hold the same part of other sequences. Borrowed. */
HALO_API halo_comm *halo_mesh_ring(const halo_mesh *m);
HALO_API halo_comm *halo_mesh_data(const halo_mesh *m);

/* ---- Layout --------------------------------------------------------------------------------- */

/* Which rank holds which token, for any N and any number of ranks. Tokens are dealt in blocks of
 * `block` tokens; the sequence is padded at its global end to a whole number of blocks per rank.
 * Local order follows increasing global position. */
typedef struct halo_layout halo_layout;

typedef enum halo_layout_kind {
  HALO_LAYOUT_CONTIGUOUS = 0, /* rank r holds the r-th run of blocks */
  HALO_LAYOUT_ZIGZAG = 1,     /* runs r and 2W-1-r of 2W */
  HALO_LAYOUT_STRIPED = 2     /* block b on rank b mod W */
} halo_layout_kind;

HALO_API halo_status halo_layout_new(halo_layout **out, int32_t kind, int64_t n_tokens,
                                     int32_t world, int64_t block);
HALO_API void halo_layout_free(halo_layout *l);
HALO_API int32_t halo_layout_kind_of(const halo_layout *l);
HALO_API int64_t halo_layout_tokens(const halo_layout *l);       /* N, without padding */
HALO_API int64_t halo_layout_padded_tokens(const halo_layout *l);
HALO_API int64_t halo_layout_local_tokens(const halo_layout *l); /* T per rank, padding included */
HALO_API int64_t halo_layout_block(const halo_layout *l);        /* G */
HALO_API int32_t halo_layout_world(const halo_layout *l);
/* Global token of (rank, local index); >= N for padding. */
HALO_API int64_t halo_layout_global(const halo_layout *l, int32_t rank, int64_t local);
/* Rank and local index of a global token (< padded N). */
HALO_API halo_status halo_layout_locate(const halo_layout *l, int64_t token, int32_t *rank_out,
                                        int64_t *local_out);
/* map[0..T) <- global tokens of a rank: the loader's gather index. */
HALO_API halo_status halo_layout_map(const halo_layout *l, int32_t rank, int64_t *map);

/* ---- Plan ----------------------------------------------------------------------------------- */

/* Which keys each query sees, for B sequences and H query heads: a global, rank-independent value.
 * Key j is visible to query i when j <= i, both are in the same document, and
 *   the tile (i/G, j/G) is selected (by a diagonal, a tile, or a force rule), or
 *   j is a selected column of this head (or forced as a sink).
 * It is a set: a key selected twice counts once. See core/plan.c. */
typedef struct halo_plan halo_plan;

HALO_API halo_status halo_plan_new(halo_plan **out, const halo_layout *layout, int64_t n_batch,
                                   int64_t n_heads);
HALO_API void halo_plan_free(halo_plan *p);
HALO_API halo_status halo_plan_retain(halo_plan **out, halo_plan *p);
/* Builders; head -1 or batch -1 means all. Only before halo_plan_finish. */
HALO_API halo_status halo_plan_add_all(halo_plan *p, int64_t batch, int64_t head);
/* Block distances (i/G - j/G), 0 is the diagonal. */
HALO_API halo_status halo_plan_add_diagonals(halo_plan *p, int64_t batch, int64_t head,
                                             const int64_t *distances, int64_t n);
/* Global token indices. */
HALO_API halo_status halo_plan_add_columns(halo_plan *p, int64_t batch, int64_t head,
                                           const int64_t *tokens, int64_t n);
/* Pairs (query block, key block). */
HALO_API halo_status halo_plan_add_tiles(halo_plan *p, int64_t batch, int64_t head,
                                         const int64_t *query_blocks, const int64_t *key_blocks,
                                         int64_t n);
/* Force rules, kept apart from what was selected and counted: the first `sink` tokens of every
 * document as columns; every tile that holds a pair closer than `window` tokens; the diagonal tile. */
HALO_API halo_status halo_plan_force(halo_plan *p, int64_t sink, int64_t window, int32_t diagonal);
/* Document id of each token, [B, N] int32 in global order; attention never crosses documents. */
HALO_API halo_status halo_plan_set_documents(halo_plan *p, const int32_t *documents);
/* Canonicalise (sort, deduplicate, clip) and freeze. From here on a plan is a value, free to share
 * between layers; what a rank executes of it is made on first use, by one thread at a time. */
HALO_API halo_status halo_plan_finish(halo_plan *p);

/* The same selection for other documents: a frozen plan on the next batch. `p` is finished; sequence b
 * of the new plan takes what sequence b mod B of `p` chose; force rules are applied anew. documents
 * [n_batch, N] as in halo_plan_set_documents, or NULL. The new plan is finished. */
HALO_API halo_status halo_plan_with_documents(halo_plan **out, const halo_plan *p, int64_t n_batch,
                                              const int32_t *documents);
/* The layout the plan was made for: borrowed, lives as long as the plan. */
HALO_API const halo_layout *halo_plan_layout(const halo_plan *p);
HALO_API int64_t halo_plan_batch(const halo_plan *p);
HALO_API int64_t halo_plan_heads(const halo_plan *p);
HALO_API int32_t halo_plan_is_dense(const halo_plan *p);
/* The definition, token by token: 1 if key j is visible to query i. Slow; the tests' oracle. */
HALO_API int32_t halo_plan_visible(const halo_plan *p, int64_t batch, int64_t head, int64_t i,
                                   int64_t j);
HALO_API uint64_t halo_plan_hash(const halo_plan *p);
/* Visible pairs over causal same-document pairs, 0..1, of one head (-1: all), an exact count; and
 * the share of the visible pairs that only the force rules brought in. Either may be NULL. */
HALO_API halo_status halo_plan_density(const halo_plan *p, int64_t batch, int64_t head,
                                       double *density_out, double *forced_share_out);
/* Forward work in flops (4*D per computed pair, after rounding to tiles) of each (rank, step) of the
 * flat schedule (step t: keys of rank r - t), [W, steps] row-major with steps = W + 1; the columns'
 * work is the last step. work_out may be NULL to ask for steps. */
HALO_API halo_status halo_plan_work(halo_plan *p, int64_t head_size, double *work_out,
                                    int64_t capacity, int32_t *steps_out);
/* Imbalance as mtraining.md 2.3 defines it: worker max/mean, mean step max/mean, critical path. */
HALO_API halo_status halo_plan_balance(halo_plan *p, double *worker_out, double *step_out,
                                       double *critical_out);
/* Far coverage of one sequence: reached[j] |= 1 for every token j that some query at distance >= far
 * sees under this head (-1: any head); far_out counts tokens that have such a query at all in their
 * document, missed_out those not reached in this plan. reached [N] bytes may be NULL. */
HALO_API halo_status halo_plan_far_coverage(const halo_plan *p, int64_t batch, int64_t head,
                                            int64_t far, uint8_t *reached, int64_t *far_out,
                                            int64_t *missed_out);
/* Text for people: density, force rules, diagonals as runs, first columns, a small map (batch or
 * head -1: the whole plan in a few lines). Writes at most `capacity` bytes with a final 0, returns
 * the length it wanted. */
HALO_API int64_t halo_plan_explain(halo_plan *p, int64_t batch, int64_t head, char *text,
                                   int64_t capacity);
/* Lists of a finished plan for one head: distances, columns. Fills up to capacity, sets the count. */
HALO_API halo_status halo_plan_diagonals(const halo_plan *p, int64_t batch, int64_t head,
                                         int64_t *out, int64_t capacity, int64_t *n_out);
HALO_API halo_status halo_plan_columns(const halo_plan *p, int64_t batch, int64_t head,
                                       int64_t *out, int64_t capacity, int64_t *n_out);

/* ---- Ring ----------------------------------------------------------------------------------- */

/* Where and in which order queries meet keys: a schedule over a transport. */
typedef struct halo_ring halo_ring;

typedef enum halo_schedule {
  HALO_SCHEDULE_FLAT = 0,         /* W steps, one hop each */
  HALO_SCHEDULE_HIERARCHICAL = 1, /* inner ring of `inner` ranks inside an outer ring of W/inner */
  HALO_SCHEDULE_GATHER = 2        /* all keys at once */
} halo_schedule;

/* inner: ranks of the inner ring (hierarchical only; must divide W). The communicator is borrowed
 * and must outlive the ring. Checks the schedule table (each source once, sends match receives, no
 * slot overwritten while read, gradients end at their owner). */
HALO_API halo_status halo_ring_new(halo_ring **out, halo_comm *c, int32_t schedule, int32_t inner);
HALO_API void halo_ring_free(halo_ring *r);
HALO_API int32_t halo_ring_world(const halo_ring *r);
HALO_API int32_t halo_ring_here(const halo_ring *r);
HALO_API int32_t halo_ring_rank(const halo_ring *r);
HALO_API int32_t halo_ring_steps(const halo_ring *r);
/* Source rank whose keys rank r computes with at a step; -1 if none. */
HALO_API int32_t halo_ring_source(const halo_ring *r, int32_t rank, int32_t step);
/* The table as text. Same rule as halo_plan_explain. */
HALO_API int64_t halo_ring_explain(const halo_ring *r, char *text, int64_t capacity);
/* Check a schedule for any (W, inner) without a transport. */
HALO_API halo_status halo_ring_check(int32_t schedule, int32_t world, int32_t inner);

/* ---- Attention ------------------------------------------------------------------------------ */

/* Causal attention under a plan, over a ring; recorded on the tape.
 *   s_ij = scale * q_i . k_j for visible (i, j);  l_i = log sum_j exp(s_ij);  o_i = sum_j e^(s_ij-l_i) v_j
 * shapes   q, o [B, T, H, D]; k, v [B, T, Hk, D]; lse [B, H, T] fp32 (fp64 for fp64 input), natural
 *          log. T is here * local tokens of the layout: ranks of this process stacked in rank order.
 *          Positions, documents and padding come from the plan and its layout.
 * effect   a row without a visible key gives o = 0, lse = -inf, and no gradient
 * numbers  running maximum, partial o and l, dQ and travelling dK, dV in fp32 (fp64 for fp64 input)
 * gradient of o only; lse is a constant
 * lse_out  may be NULL
 * source   online softmax (Milakov and Gimelshein 2018; FlashAttention-2, arXiv 2307.08691) */
HALO_API halo_status halo_attention(halo_tensor **out, halo_tensor **lse_out, halo_tensor *q,
                                    halo_tensor *k, halo_tensor *v, halo_plan *plan,
                                    halo_ring *ring, double scale);
/* Merge two partial results over disjoint key sets, in place in (o, lse); o in any float dtype.
 * shapes   o, o_part [B,T,H,D]; lse, lse_part [B,H,T]
 * effect   (0, -inf) is the identity */
HALO_API halo_status halo_attention_merge(halo_tensor *o, halo_tensor *lse,
                                          const halo_tensor *o_part, const halo_tensor *lse_part);
/* One decoding step against a cache, no tape: q [B,Tq,H,D], k, v [B,Tcap,Hk,D] of which the first
 * `length` keys count; key_positions [Tcap] i64 and query_positions [Tq] i64 give global positions
 * (key j visible to query i when its position is not greater). Partial over this rank's keys. */
HALO_API halo_status halo_attention_cached(halo_tensor **out, halo_tensor **lse_out,
                                           const halo_tensor *q, const halo_tensor *k,
                                           const halo_tensor *v, int64_t length,
                                           const halo_tensor *key_positions,
                                           const halo_tensor *query_positions, double scale);

/* Vertical-slash selection from the last `probe` queries of the sequence (mtraining.md 1; MInference,
 * arXiv 2407.02490): softmax of the probe rows over all keys of their document, summed down columns
 * (verticals) and along diagonals i - j (slashes, offsets of tokens; each then selects the block
 * distances it crosses). Logits and exponentials are fp32 (fp64 for fp64 input), sums in a fixed order
 * that does not depend on W, ties to the lower index, heads shared out over ranks: every rank gets the
 * plan that one rank would make. Fixed budgets: the best `verticals` columns and `slashes` offsets.
 * Top-p: the smallest prefix of the sorted scores whose sum reaches mass_vertical / mass_slash of the
 * total, the crossing entry included, at most `verticals` / `slashes` of them; a mass of 0 means fixed
 * budgets. Adds diagonals and columns to `plan` (unfinished, documents already set) for all B, H.
 * q [B,T,H,D], k [B,T,Hk,D] as in halo_attention. Collective over the ring. No gradient.
 * errors   HALO_ENUMERIC on every rank when a row is not finite */
HALO_API halo_status halo_select_vertical_slash(halo_plan *plan, const halo_tensor *q,
                                                const halo_tensor *k, halo_ring *ring, double scale,
                                                int64_t probe, int64_t verticals, int64_t slashes,
                                                double mass_vertical, double mass_slash);
/* Sampled recall: for `samples` query rows per head drawn from (seed, stream), the share of dense
 * attention mass that the plan keeps. recall_out [H] means over the batch and samples. Collective. */
HALO_API halo_status halo_attention_recall(double *recall_out, const halo_tensor *q,
                                           const halo_tensor *k, halo_plan *plan, halo_ring *ring,
                                           double scale, int64_t samples, uint64_t seed,
                                           uint64_t stream);

/* ---- Safetensors ---------------------------------------------------------------------------- */

/* Weights in Hugging Face's safetensors format. Files are taken to be hostile: see safetensors.c for
 * what is refused, and how much stricter than the reference that is. */
typedef struct halo_safetensors halo_safetensors;

/* A tensor of a file. Strings are borrowed from the handle. */
typedef struct halo_safetensors_info {
  const char *name;
  const char *code;            /* the file's dtype: "F32", "BF16", "F8_E4M3", ... */
  const char *file;            /* path of the file or shard that holds it */
  int32_t dtype;               /* halo_dtype with the same bytes, -1 if there is none */
  int32_t ndim;
  int64_t shape[HALO_MAX_DIMS];
  int64_t count, bytes;
  int64_t offset;              /* of its first byte in the file */
} halo_safetensors_info;

/* Open one file, an index (*.index.json), or a folder with model.safetensors or
 * model.safetensors.index.json; headers of all shards are read and checked now.
 * follow_links: allow symbolic links (snapshots of the Hugging Face cache are links); default no.
 * errors   HALO_ECORRUPT for content that contradicts the format or itself; HALO_EARG for what is not
 *          a regular file, and for pickles; HALO_EIO when it cannot be read
 * The handle holds memory only, no open files. */
HALO_API halo_status halo_safetensors_open(halo_safetensors **out, const char *path,
                                           int32_t follow_links);
HALO_API void halo_safetensors_free(halo_safetensors *s);
/* Tensors of all shards, sorted by name. */
HALO_API int64_t halo_safetensors_count(const halo_safetensors *s);
HALO_API int64_t halo_safetensors_find(const halo_safetensors *s, const char *name); /* -1: absent */
HALO_API halo_status halo_safetensors_describe(halo_safetensors_info *out, const halo_safetensors *s,
                                               int64_t index);
/* __metadata__ of the (first) file, sorted by key; NULL when absent. Borrowed. */
HALO_API int64_t halo_safetensors_metadata_count(const halo_safetensors *s);
HALO_API const char *halo_safetensors_metadata_key(const halo_safetensors *s, int64_t i);
HALO_API const char *halo_safetensors_metadata(const halo_safetensors *s, const char *key);
/* Elements [first, first+count) in row-major order into host memory, converted to dtype: floats
 * (F64, F32, F16, BF16, F8_E4M3, F8_E5M2) to floats, integers and BOOL to anything that holds their
 * values (HALO_EARG if one does not fit).
 * errors   HALO_EIO if the file is no longer the one that was opened */
HALO_API halo_status halo_safetensors_read(const halo_safetensors *s, int64_t index, int64_t first,
                                           int64_t count, void *to, int32_t dtype);
/* The file's own bytes of a tensor, any dtype. */
HALO_API halo_status halo_safetensors_read_raw(const halo_safetensors *s, int64_t index,
                                               int64_t first_byte, int64_t bytes, void *to);
/* A whole tensor into one of the same shape, any dtype, device and strides. */
HALO_API halo_status halo_safetensors_load(halo_tensor *to, const halo_safetensors *s, int64_t index);

/* Writing: collect tensors (they are retained, not copied), then save. */
typedef struct halo_safetensors_writer halo_safetensors_writer;
HALO_API halo_status halo_safetensors_writer_new(halo_safetensors_writer **out);
HALO_API void halo_safetensors_writer_free(halo_safetensors_writer *w);
/* __metadata__; {"format":"pt"} is there from the start, because Transformers asks for it. */
HALO_API halo_status halo_safetensors_writer_metadata(halo_safetensors_writer *w, const char *key,
                                                      const char *value);
/* code: dtype in the file ("F32", "BF16", "F16", ...), NULL for the tensor's own. */
HALO_API halo_status halo_safetensors_writer_add(halo_safetensors_writer *w, const char *name,
                                                 halo_tensor *tensor, const char *code);
/* A path ending in .safetensors is one file; anything else is a folder (made if missing) that gets
 * model.safetensors, or shards of at most max_shard_bytes (0: no limit) and their index; weight files
 * of an earlier save there are removed. The name appears when the content is on the device. */
HALO_API halo_status halo_safetensors_writer_save(halo_safetensors_writer *w, const char *path,
                                                  int64_t max_shard_bytes);

/* ---- Checkpoint ----------------------------------------------------------------------------- */

/* A checkpoint is a folder DIR/step-NNNNNNNN that Transformers can load weights from, with optimizer
 * state, the caller's files and a sealed manifest; it appears whole or not at all (checkpoint.c).
 *
 * Saving. All processes of `comm` (NULL: one) call begin and commit together; in between each puts its
 * part. A failure of any put is remembered, later puts do nothing, and commit returns it on all ranks:
 * then nothing was saved, the older checkpoints are untouched, and the run can go on. */
typedef struct halo_checkpoint_writer halo_checkpoint_writer;

/* DIR is made if only its last part is missing. expected_bytes: about what this process will put; the
 * sum must fit the disk with a tenth to spare. Removes what an earlier attempt left behind. */
HALO_API halo_status halo_checkpoint_begin(halo_checkpoint_writer **out, const char *dir, int64_t step,
                                           halo_comm *comm, int64_t expected_bytes);
/* Does not undo: an attempt that was not committed is cleared by the next begin. */
HALO_API void halo_checkpoint_writer_free(halo_checkpoint_writer *w);
/* A file of the caller's (config.json, data.json); plain names only. From one rank. */
HALO_API halo_status halo_checkpoint_put_file(halo_checkpoint_writer *w, const char *name,
                                              const void *bytes, int64_t n);
/* Weights, from one rank; `weights` stays the caller's. */
HALO_API halo_status halo_checkpoint_put_weights(halo_checkpoint_writer *w,
                                                 halo_safetensors_writer *weights,
                                                 int64_t max_shard_bytes);
/* State that all ranks hold alike as one flat tensor (first moments: kind "moment1"), parameter i at
 * elements [offsets[i], offsets[i]+counts[i]). From all ranks: each writes an even share. The tensor
 * must not change before commit. */
HALO_API halo_status halo_checkpoint_put_flat(halo_checkpoint_writer *w, const char *kind,
                                              halo_tensor *flat, int32_t n, const char *const *names,
                                              const int64_t *offsets, const int64_t *counts);
/* Give up from this rank, with a status and a reason: commit fails with them on all. */
HALO_API halo_status halo_checkpoint_fail(halo_checkpoint_writer *w, int32_t status,
                                          const char *why);
/* Publish. state_json: one JSON value, what the caller wants back (NULL: {}); rank 0's counts. */
HALO_API halo_status halo_checkpoint_commit(halo_checkpoint_writer *w, const char *state_json);
/* Remove all but the newest `keep` (at least 2) whole checkpoints and those whose step is a multiple of
 * `major` (0: none); damaged ones are left alone. One process. removed_out may be NULL. */
HALO_API halo_status halo_checkpoint_prune(const char *dir, int32_t keep, int64_t major,
                                           int32_t *removed_out);

/* Loading. A handle is a checkpoint whose files were checked against its manifest. */
typedef struct halo_checkpoint halo_checkpoint;

/* How much is read to be sure: the manifest with names and sizes (milliseconds), all files against their
 * chunk hashes (before loading), their SHA-256 as well. */
enum { HALO_VERIFY_SIZES = 0, HALO_VERIFY_CHUNKS = 1, HALO_VERIFY_ALL = 2 };
/* Check and open one folder. Processes of comm share the work and agree.
 * errors   HALO_ECORRUPT for anything that is not as it was written; HALO_EVERSION */
HALO_API halo_status halo_checkpoint_open(halo_checkpoint **out, const char *path, halo_comm *comm,
                                          int32_t level);
/* The newest checkpoint of DIR that passes; *out is NULL when there is none at all. When there are
 * some and none passes, that is an error, whose message lists them. */
HALO_API halo_status halo_checkpoint_latest(halo_checkpoint **out, const char *dir, halo_comm *comm,
                                            int32_t level);
HALO_API void halo_checkpoint_free(halo_checkpoint *c);
HALO_API const char *halo_checkpoint_path(const halo_checkpoint *c);
HALO_API int64_t halo_checkpoint_step(const halo_checkpoint *c);
HALO_API int32_t halo_checkpoint_world(const halo_checkpoint *c); /* processes that wrote it */
HALO_API const char *halo_checkpoint_state(const halo_checkpoint *c); /* JSON text as saved */
/* Newer checkpoints that were skipped and why, a line each; "" if none was. */
HALO_API const char *halo_checkpoint_report(const halo_checkpoint *c);
HALO_API int32_t halo_checkpoint_files(const halo_checkpoint *c);
HALO_API const char *halo_checkpoint_file(const halo_checkpoint *c, int32_t i); /* sorted by name */
/* Content of a file, hash checked again; returns its length without the NUL, or a negative status.
 * Nothing is written when capacity is not larger than the length. */
HALO_API int64_t halo_checkpoint_read_file(const halo_checkpoint *c, const char *name, char *text,
                                           int64_t capacity);
/* Whether there is state of a kind for a parameter; how many (kind, parameter) there are. */
HALO_API int32_t halo_checkpoint_has(const halo_checkpoint *c, const char *kind, const char *parameter);
HALO_API int64_t halo_checkpoint_parameters(const halo_checkpoint *c);
/* All of a parameter's state into elements [offset, offset+count) of a flat tensor, whatever number of
 * ranks wrote it. */
HALO_API halo_status halo_checkpoint_read_flat(const halo_checkpoint *c, const char *kind,
                                               const char *parameter, halo_tensor *flat,
                                               int64_t offset, int64_t count);

/* For failure tests: let the n-th call from now that changes the file system (0: the next) fail. */
enum { HALO_FAULT_NONE = 0, HALO_FAULT_ONCE = 1, HALO_FAULT_FOREVER = 2, HALO_FAULT_KILL = 3 };
HALO_API halo_status halo_checkpoint_fail_after(int64_t n, int32_t kind);

/* ---- Tokenizer ------------------------------------------------------------------------------ */

/* Memory that a call below handed out (ids, text). */
HALO_API void halo_buffer_free(void *p);

/* Byte-level BPE. Built token by token (Lua reads the files), then frozen; encoding and decoding are
 * safe from several threads. decode(encode(x)) = x for every sequence of bytes, except that valid
 * UTF-8 comes back in NFC where the model asks for NFC. */
typedef struct halo_tokenizer halo_tokenizer;

/* The split patterns that exist; foreign ones are never run. */
typedef enum halo_split {
  HALO_SPLIT_NONE = 0, /* the text is one piece */
  HALO_SPLIT_GPT2 = 1,
  HALO_SPLIT_QWEN2 = 2,
  HALO_SPLIT_LLAMA3 = 3
} halo_split;

enum {
  HALO_TOKENIZER_NFC = 1,          /* normalise valid UTF-8 before splitting (Qwen) */
  HALO_TOKENIZER_WHOLE_PIECES = 2, /* a piece that is a token is that token, whatever the merges say */
  HALO_TOKENIZER_RANKS = 4         /* no merge list: two tokens merge when their joint bytes are a
                                      token, whose id is the rank (tiktoken) */
};

enum {
  HALO_TOKEN_PRINTABLE = 1, /* the text is in GPT-2's printable alphabet, one character per byte */
  HALO_TOKEN_SPECIAL = 2    /* never made by merging; recognised in text only when asked */
};

/* For a vocabulary of n_tokens ids, 0 to n_tokens-1. */
HALO_API halo_status halo_tokenizer_new(halo_tokenizer **out, int64_t n_tokens, int32_t split,
                                        int32_t flags);
HALO_API void halo_tokenizer_free(halo_tokenizer *t);
/* Add a token, or mark one that is there with the same bytes as special. */
HALO_API halo_status halo_tokenizer_add(halo_tokenizer *t, int32_t id, const char *text, size_t n,
                                        int32_t flags);
/* Add the next merge: rank is the number of the call. Both parts and the result must be tokens. */
HALO_API halo_status halo_tokenizer_add_merge(halo_tokenizer *t, const char *left, size_t n_left,
                                              const char *right, size_t n_right, int32_t flags);
/* Check (no id missing, every byte a token) and freeze. */
HALO_API halo_status halo_tokenizer_finish(halo_tokenizer *t);

HALO_API int64_t halo_tokenizer_vocab(const halo_tokenizer *t);
/* Hash of all that decides ids: split, flags, tokens, merges. */
HALO_API uint64_t halo_tokenizer_hash(const halo_tokenizer *t);
/* Bytes of a token, borrowed; NULL if there is none. */
HALO_API const char *halo_tokenizer_token(const halo_tokenizer *t, int32_t id, size_t *n_out,
                                          int32_t *is_special_out);
/* The id of exactly these bytes; -1 if there is none. */
HALO_API int32_t halo_tokenizer_find(const halo_tokenizer *t, const char *bytes, size_t n);
/* Text to ids.
 * parse_special  1: special tokens written in the text become their ids; 0: they are text like any
 *                other, as data from strangers must be
 * ownership      *ids_out is yours, halo_buffer_free */
HALO_API halo_status halo_tokenizer_encode(int32_t **ids_out, int64_t *n_out,
                                           const halo_tokenizer *t, const char *text, size_t n,
                                           int32_t parse_special);
/* Ids to bytes, not 0-terminated; HALO_EARG naming the first id outside the vocabulary.
 * ownership  *text_out is yours, halo_buffer_free */
HALO_API halo_status halo_tokenizer_decode(char **text_out, size_t *n_out, const halo_tokenizer *t,
                                           const int32_t *ids, int64_t n);
/* GPT-2's printable alphabet and back: one character per byte, so that any bytes make a JSON string.
 * ownership  *out is yours, halo_buffer_free */
HALO_API halo_status halo_tokenizer_printable(char **out, size_t *n_out, const char *bytes, size_t n,
                                              int32_t reverse);

/* ---- Data ----------------------------------------------------------------------------------- */

/* XXH3 64-bit hash of bytes, and of a file's content. Chain by passing the last result as the seed. */
HALO_API uint64_t halo_hash_bytes(const void *data, size_t n, uint64_t seed);
HALO_API halo_status halo_hash_file(const char *path, uint64_t *out);
/* Value at `index` of permutation (seed, stream) of 0..n-1: a Feistel network walked until it falls
 * below n, so that any element of an epoch's order is known without the others. -1 if out of range. */
HALO_API int64_t halo_random_permute(int64_t n, uint64_t seed, uint64_t stream, int64_t index);

/* A sequence of documents of token ids: an opened token file, a choice of documents, or several joined.
 * Memory-mapped, read-only, safe to share between threads. Format: core/data.c. */
typedef struct halo_tokens halo_tokens;

/* Open Halo's token file or llm.c's .bin (magic 20240520 with 16-bit, 20240801 with 32-bit tokens).
 * separator  llm.c has no table of documents: one starts at every such token (-1: one document)
 * verify     read everything and compare the checksum and each id with the vocabulary; without it ids
 *            are checked when read
 * errors     HALO_ECORRUPT with the reason, HALO_EVERSION, HALO_EIO */
HALO_API halo_status halo_tokens_open(halo_tokens **out, const char *path, int32_t separator,
                                      int32_t verify);
HALO_API void halo_tokens_free(halo_tokens *t);
HALO_API int64_t halo_tokens_count(const halo_tokens *t);
HALO_API int64_t halo_tokens_documents(const halo_tokens *t);
HALO_API int64_t halo_tokens_vocab(const halo_tokens *t);           /* 0: unknown (llm.c) */
HALO_API uint64_t halo_tokens_tokenizer_hash(const halo_tokens *t); /* 0: unknown (llm.c) */
/* Fingerprint of the content: tokens, documents, tokenizer, and the choice. */
HALO_API uint64_t halo_tokens_hash(const halo_tokens *t);
/* First token and length of a document. */
HALO_API halo_status halo_tokens_document(const halo_tokens *t, int64_t document, int64_t *first_out,
                                          int64_t *n_out);
/* The document that holds a token; -1 if out of range. */
HALO_API int64_t halo_tokens_find_document(const halo_tokens *t, int64_t token);
/* Hash of a document's ids, the same for every width, file and choice. */
HALO_API halo_status halo_tokens_document_hash(const halo_tokens *t, int64_t document,
                                               uint64_t *out);
/* tokens[0..n) and documents[0..n) from token `first` on; past the end tokens are `pad` and documents
 * -1. documents may be NULL. HALO_ECORRUPT for an id outside the vocabulary. */
HALO_API halo_status halo_tokens_read(int32_t *tokens, int32_t *documents, const halo_tokens *t,
                                      int64_t first, int64_t n, int32_t pad);
/* The given documents in the given order, and a range of tokens (documents are cut at its ends). */
HALO_API halo_status halo_tokens_select(halo_tokens **out, halo_tokens *t, const int64_t *documents,
                                        int64_t n);
HALO_API halo_status halo_tokens_slice(halo_tokens **out, halo_tokens *t, int64_t first, int64_t n);
/* Several sequences one after the other, as for a corpus in shards; of one vocabulary and tokenizer. */
HALO_API halo_status halo_tokens_join(halo_tokens **out, halo_tokens *const *parts, int64_t n);
/* Hold out documents: document d goes to valid when its hash, mixed with the seed, falls below
 * `share`; equal documents never end on both sides. HALO_EARG if a side would be empty. */
HALO_API halo_status halo_tokens_split(halo_tokens **train_out, halo_tokens **valid_out,
                                       halo_tokens *t, double share, uint64_t seed);

/* Writes a token file beside its place, and moves it there when complete. */
typedef struct halo_token_writer halo_token_writer;

HALO_API halo_status halo_token_writer_new(halo_token_writer **out, const char *path,
                                           int64_t vocab, uint64_t tokenizer_hash);
/* Drops what was not committed. */
HALO_API void halo_token_writer_free(halo_token_writer *w);
/* Add one document; an empty one leaves no trace. */
HALO_API halo_status halo_token_writer_add(halo_token_writer *w, const int32_t *ids, int64_t n);
/* Encode text as one document; `first` and `last` are put before and behind it (-1: nothing). Special
 * tokens in the text are text. */
HALO_API halo_status halo_token_writer_add_text(halo_token_writer *w, const halo_tokenizer *t,
                                                const char *text, size_t n, int32_t first,
                                                int32_t last);
/* The same for a file's content. A file with a zero byte in its first 8192 is not text: it is left out
 * and *is_text_out is 0. */
HALO_API halo_status halo_token_writer_add_file(halo_token_writer *w, const halo_tokenizer *t,
                                                const char *path, int32_t first, int32_t last,
                                                int32_t *is_text_out);
HALO_API int64_t halo_token_writer_count(const halo_token_writer *w);
HALO_API int64_t halo_token_writer_documents(const halo_token_writer *w);
/* fsync, rename, fsync the folder; the writer accepts nothing after it. */
HALO_API halo_status halo_token_writer_commit(halo_token_writer *w);

/* Label of a position that is no target (PyTorch's convention). */
enum { HALO_NO_TARGET = -100 };

typedef enum halo_sample_flags {
  HALO_SAMPLE_DOCUMENTS = 1, /* documents do not see each other: no target across a boundary */
  HALO_SAMPLE_RESTART = 2    /* positions count from the start of each document */
} halo_sample_flags;

/* n+1 tokens in a row become a training sample of n, labels shifted here, before any layout.
 * given      tokens, documents [n+1] (document -1 is padding); loss [n+1], 0 where a token is no
 *            target, or NULL
 * out        ids[i] = tokens[i]; labels[i] = tokens[i+1], or HALO_NO_TARGET when that is padding, no
 *            target, or of another document (HALO_SAMPLE_DOCUMENTS); positions[i]; segments[i] = 0, 1,
 *            ... counting documents within the sample, padding being its own (all 0 without
 *            HALO_SAMPLE_DOCUMENTS); targets_out = number of targets */
HALO_API halo_status halo_sample_finish(int32_t *ids, int32_t *labels, int32_t *positions,
                                        int32_t *segments, int64_t *targets_out,
                                        const int32_t *tokens, const int32_t *documents,
                                        const uint8_t *loss, int64_t n, int32_t flags);
/* out[b,i] = rows[b, map[i]] where map[i] < n, else fill: a rank's part of global rows. */
HALO_API halo_status halo_rows_gather(int32_t *out, const int32_t *rows, int64_t n_rows, int64_t n,
                                      const int64_t *map, int64_t n_map, int32_t fill);

/* ---- Trace ---------------------------------------------------------------------------------- */

/* Named spans with totals: always on by default, a branch when off. Times are of the host; device
 * work is asynchronous and counted where somebody waits for it, unless halo_trace_device is on. */
enum { HALO_TRACE_OFF = 0, HALO_TRACE_TOTALS = 1, HALO_TRACE_EVENTS = 2 };

typedef struct halo_trace_row {
  const char *name;
  int64_t calls;
  double seconds;      /* from begin to end; a name nested in itself counts twice */
  double self_seconds; /* less what other spans inside took: these add up to the time traced */
  double bytes, flops; /* as reported by halo_trace_work; flops as executed */
  double device_seconds, device_self_seconds; /* the same on a device's clock; 0 unless asked for */
} halo_trace_row;

/* Number of a name, made on first use; keep it. -1 when the name is empty or the table is full; the
 * calls below ignore it. Names are cut at 63 bytes. */
HALO_API int32_t halo_trace_id(const char *name);
/* Open a span on this thread; give the token to halo_trace_end, which also closes what was left
 * open inside. 0: not traced. */
HALO_API int32_t halo_trace_begin(int32_t id);
HALO_API void halo_trace_end(int32_t token);
/* Add work to the innermost open span of this thread. */
HALO_API void halo_trace_work(double bytes, double flops);
/* Count something that takes no time of its own: one more call, and its work. */
HALO_API void halo_trace_count(int32_t id, double bytes, double flops);
/* Returns the old level. HALO_TRACE_EVENTS is entered by halo_trace_record. */
HALO_API int32_t halo_trace_set_level(int32_t level);
/* Time the spans of this thread on a device as well, by a mark in its queue at both ends (HALO_CUDA;
 * HALO_CPU: no longer). Nothing waits for a mark before the totals are read, or 4096 spans are open
 * questions; products become spans of their own ("product"). Off by default: two marks cost some
 * microseconds. */
HALO_API halo_status halo_trace_device(int32_t device);
HALO_API int32_t halo_trace_names(void);
HALO_API halo_status halo_trace_read(halo_trace_row *out, int32_t id);
/* All totals to zero; names stay. */
HALO_API void halo_trace_reset(void);
/* Keep single spans from now on (at most 2^18, the rest is counted only) until halo_trace_stop. */
HALO_API halo_status halo_trace_record(void);
HALO_API void halo_trace_stop(void);
/* Stop, and write the recorded window as Chrome trace JSON; ranks become processes. */
HALO_API halo_status halo_trace_export(const char *path, int32_t rank);

/* Flight recorder: the last 4096 collectives of this process. Where we are is stored with each. */
HALO_API void halo_trace_where(int64_t step, int32_t layer);
/* Sequence numbers of the last collective begun and the last finished, and how long the last one
 * has been waiting (0 when none is). What a watchdog polls; any pointer may be NULL. */
HALO_API void halo_trace_flight(int64_t *begun_out, int64_t *done_out,
                                double *waiting_seconds_out);
/* One JSON object per line, oldest first. */
HALO_API halo_status halo_trace_flight_dump(const char *path);

/* Signals: handlers set bits, the training loop polls at step boundaries. */
enum { HALO_SIGNAL_USR1 = 1, HALO_SIGNAL_TERM = 2, HALO_SIGNAL_INT = 4 };
/* Catch SIGUSR1, SIGTERM and SIGINT (a second TERM or INT gets the default action), ignore SIGPIPE;
 * with a crash_file, write the flight recorder there on SIGSEGV, SIGBUS, SIGFPE and SIGABRT. */
HALO_API halo_status halo_signals_install(const char *crash_file);
HALO_API void halo_signals_restore(void);
/* Bits of HALO_SIGNAL_*; 0 when nobody asked for anything. */
HALO_API int32_t halo_signal_pending(void);
HALO_API void halo_signal_clear(int32_t mask);

#endif
