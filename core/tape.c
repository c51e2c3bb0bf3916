/* tape.c: autograd by a tape of nodes, walked backward by a loop that the caller polls.
 *
 * A node is the record of one op call: where its inputs came from (edges), what its backward needs
 * (saved tensors, extra), and the gradients that arrived for its outputs. Results own a reference to
 * their node and nodes to the nodes of their inputs, so a forward pass that nobody keeps disappears
 * by itself.
 *
 *      leaf w ----------.                     edges point from a node to its inputs;
 *      leaf x --> [mul] --> y --> [sum] --> loss      gradients flow along them
 *
 * Order. Nodes are numbered as they are made, and inputs always have smaller numbers than their
 * consumers, so "largest number first" is a valid backward order: a max-heap of ready nodes is all
 * the scheduling there is, and it is the same on every run.
 *
 * Recompute. A checkpoint node has no backward of its own: halo_backward_next reports it, the caller
 * runs the function again with the tape on, and a nested frame walks the new nodes before the outer
 * walk goes on. C never calls Lua (DESIGN D4).
 *
 *      frame 0:  ... <- [block 2] <- [block 3] <- loss
 *                            |  RECOMPUTE(token)
 *      frame 1:     leaf' <- [a] <- [b] <- block 2's output        (fresh leaves at the inputs)
 *
 * Gradients. A leaf's gradient is added to (+=), a node's pending gradient likewise; the first
 * arrival is taken over without a copy when nobody else holds it. An op may add into a leaf's buffer
 * itself (accumulate_into), which saves a pass over every weight gradient; leaves that are parts of one
 * packed weight, joined by `cat` as a view, count as one leaf for this.
 *
 * A node is emptied as soon as it has run, so peak memory falls while backward proceeds; walking it
 * twice is an error that says so.
 */
#include "internal.h"
#include "kernels.h"

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

typedef struct edge {
  halo__node *node;  /* producer, or NULL */
  int32_t output;    /* which of its outputs */
  halo_tensor *leaf; /* a leaf that wants a gradient, or NULL */
} edge;

struct halo__node {
  int64_t id;
  int32_t references;
  struct halo__node *next_dead; /* list of nodes about to be freed */
  bool queued, used;
  bool is_checkpoint;
  int64_t token;
  halo_offload **offload;             /* checkpoint: [HALO_MAX_INPUTS], inputs that wait elsewhere */
  halo__node *older, *newer;          /* list of nodes with such inputs, by age */
  const char *name;
  halo__call_fn backward;
  halo__call call;
  edge edges[HALO_MAX_INPUTS];
  int32_t n_out;
  halo_tensor *meta_out[HALO_MAX_OUTPUTS]; /* shape and dtype of outputs, no data */
  halo_tensor *grads[HALO_MAX_OUTPUTS];
};

static _Thread_local bool recording = true;
static int64_t next_id, live_nodes;

/* What runs now: the innermost op of this thread. */
typedef struct running {
  const char *name; /* NULL: none */
  int32_t op;
  bool is_backward;
} running;
static _Thread_local running now = {.op = -1};

const char *halo__op_now(bool *is_backward) {
  if (is_backward != NULL) *is_backward = now.is_backward;
  return now.name;
}

int32_t halo__op_number_now(void) { return now.op; }

/* Tokens of checkpoints that died unused; finalizers of other threads may drop nodes as well. */
static pthread_mutex_t dropped_lock = PTHREAD_MUTEX_INITIALIZER;
static int64_t *dropped;
static int32_t n_dropped, dropped_capacity;

int32_t halo_tape_set_enabled(int32_t on) {
  const int32_t old = recording;
  recording = on != 0;
  return old;
}

int32_t halo_tape_enabled(void) { return recording; }
int64_t halo_tape_live_nodes(void) { return __atomic_load_n(&live_nodes, __ATOMIC_RELAXED); }

/* ---- nodes ---- */

static void call_clear(halo__call *c) {
  for (int32_t i = 0; i < HALO_MAX_INPUTS; i++) {
    halo_tensor_free(c->grad_in[i]);
    c->grad_in[i] = NULL;
  }
  for (size_t i = 0; i < sizeof c->saved / sizeof *c->saved; i++) {
    halo_tensor_free(c->saved[i]);
    c->saved[i] = NULL;
  }
  if (c->free_extra != NULL && c->extra != NULL) c->free_extra(c->extra);
  c->extra = NULL;
}

/* Nodes with offloaded inputs, newest first: backward meets them in this order. */
static pthread_mutex_t offloaded_lock = PTHREAD_MUTEX_INITIALIZER;
static halo__node *newest_offloaded;

static void offload_empty(halo__node *n) {
  if (n->offload == NULL) return;
  pthread_mutex_lock(&offloaded_lock);
  if (n->newer != NULL) n->newer->older = n->older;
  if (n->older != NULL) n->older->newer = n->newer;
  if (newest_offloaded == n) newest_offloaded = n->older;
  n->older = n->newer = NULL;
  pthread_mutex_unlock(&offloaded_lock);
  for (int32_t i = 0; i < HALO_MAX_INPUTS; i++) halo_offload_free(n->offload[i]);
  free(n->offload);
  n->offload = NULL;
}

/* Begin to bring the inputs of n back. What fails here fails again, and is told, when they are fetched. */
static void prefetch(halo__node *n) {
  for (int32_t i = 0; n != NULL && n->offload != NULL && i < HALO_MAX_INPUTS; i++) {
    if (n->offload[i] != NULL) halo_offload_prefetch(n->offload[i]);
  }
}

/* Drop one reference; a node that dies is put on the list `dead`. */
static void node_unref(halo__node *n, halo__node **dead) {
  if (n == NULL || --n->references > 0) return;
  n->next_dead = *dead;
  *dead = n;
}

/* Let go of everything but the shell. Producers that die with it go on the list `dead` instead of
 * being freed by recursion: a tape of a million nodes must not overflow the C stack. */
static void node_empty(halo__node *n, halo__node **dead) {
  call_clear(&n->call);
  offload_empty(n);
  for (int32_t i = 0; i < HALO_MAX_INPUTS; i++) {
    halo_tensor *in = n->call.in[i];
    if (in != NULL && in->references == 1) {
      halo__node *producer = in->node;
      in->node = NULL;
      node_unref(producer, dead);
    }
    halo_tensor_free(in);
    halo_tensor_free(n->edges[i].leaf);
    node_unref(n->edges[i].node, dead);
    n->call.in[i] = NULL;
    n->edges[i] = (edge){0};
  }
  for (int32_t i = 0; i < HALO_MAX_OUTPUTS; i++) {
    halo_tensor_free(n->grads[i]);
    halo_tensor_free(n->meta_out[i]);
    n->grads[i] = n->meta_out[i] = NULL;
  }
}

/* Remember that the caller will not be asked to recompute this. Losing a token for want of memory
 * only means that the caller keeps a function longer. */
static void report_dropped(int64_t token) {
  pthread_mutex_lock(&dropped_lock);
  if (n_dropped == dropped_capacity) {
    const int32_t capacity = dropped_capacity > 0 ? 2 * dropped_capacity : 64;
    int64_t *tokens = realloc(dropped, (size_t)capacity * sizeof *tokens);
    if (tokens != NULL) {
      dropped = tokens;
      dropped_capacity = capacity;
    }
  }
  if (n_dropped < dropped_capacity) dropped[n_dropped++] = token;
  pthread_mutex_unlock(&dropped_lock);
}

int32_t halo_tape_dropped(int64_t *tokens, int32_t capacity) {
  int32_t n = 0;
  pthread_mutex_lock(&dropped_lock);
  while (n < capacity && n_dropped > 0) tokens[n++] = dropped[--n_dropped];
  pthread_mutex_unlock(&dropped_lock);
  return n;
}

static void free_dead(halo__node *dead) {
  while (dead != NULL) {
    halo__node *n = dead;
    dead = n->next_dead;
    if (n->is_checkpoint && !n->used) report_dropped(n->token);
    node_empty(n, &dead);
    free(n);
    __atomic_sub_fetch(&live_nodes, 1, __ATOMIC_RELAXED);
  }
}

void halo__node_release(halo__node *node) {
  halo__node *dead = NULL;
  node_unref(node, &dead);
  free_dead(dead);
}

static halo__node *node_new(void) {
  halo__node *n = calloc(1, sizeof *n);
  if (n == NULL) return NULL;
  n->id = next_id++;
  n->references = 1;
  __atomic_add_fetch(&live_nodes, 1, __ATOMIC_RELAXED);
  return n;
}

static bool wants_grad(const halo_tensor *t) {
  return t != NULL && t->requires_grad && halo__is_float(t->dtype);
}

static void set_edge(edge *e, halo_tensor *t) {
  if (!wants_grad(t)) return;
  if (t->node != NULL) {
    e->node = t->node;
    e->node->references++;
    e->output = t->node_output;
  } else {
    halo_tensor *leaf = NULL;
    halo_tensor_retain(&leaf, t);
    e->leaf = leaf;
  }
}

/* Make `t` output i of node n. */
static halo_status bind_output(halo__node *n, int32_t i, halo_tensor *t) {
  HALO_TRY(halo__meta_like(&n->meta_out[i], t));
  if (!halo__is_float(t->dtype)) return HALO_OK;
  n->references++;
  t->node = n;
  t->node_output = i;
  t->requires_grad = true;
  return HALO_OK;
}

/* ---- recording ---- */

/* A result that is an input itself, or shared, gets a handle of its own: binding it to a node must
 * not change what others hold. */
static halo_status unshare_outputs(halo__call *c) {
  for (int32_t i = 0; i < c->n_out; i++) {
    halo_tensor *t = c->out[i];
    if (t == NULL || (t->references == 1 && t->node == NULL)) continue;
    halo_tensor *view = NULL;
    HALO_TRY(halo__view(&view, t, t->ndim, t->shape, t->stride, 0));
    halo_tensor_free(t);
    c->out[i] = view;
  }
  return HALO_OK;
}

static halo_status record(halo__call *c, const char *name, halo__call_fn backward) {
  halo__node *n = node_new();
  HALO_CHECK(n != NULL, HALO_ENOMEM, "%s: no memory for a tape node", name);
  n->name = name;
  n->backward = backward;
  n->n_out = c->n_out;
  halo_status status = HALO_OK;
  for (int32_t i = 0; i < c->n_in && status == HALO_OK; i++) {
    if (c->in[i] == NULL) continue;
    if (c->drop_in[i]) {
      status = halo__meta_like(&n->call.in[i], c->in[i]);
    } else {
      status = halo_tensor_retain(&n->call.in[i], c->in[i]);
    }
    set_edge(&n->edges[i], c->in[i]);
  }
  for (int32_t i = 0; i < c->n_out && status == HALO_OK; i++) {
    if (c->out[i] != NULL) status = bind_output(n, i, c->out[i]);
  }
  if (status == HALO_OK) {
    halo_tensor *in[HALO_MAX_INPUTS];
    memcpy(in, n->call.in, sizeof in);
    n->call = *c;
    memcpy(n->call.in, in, sizeof in);
    memset(n->call.out, 0, sizeof n->call.out);
    memset(c->saved, 0, sizeof c->saved);
    c->extra = NULL;
  }
  halo__node_release(n); // the outputs hold it now
  return status;
}

halo_status halo__run(halo__call *c, const char *name, halo__call_fn forward,
                      halo__call_fn backward) {
  const bool was_recording = recording;
  c->wants_grad = false;
  for (int32_t i = 0; i < c->n_in; i++) {
    c->need_grad[i] = was_recording && backward != NULL && wants_grad(c->in[i]);
    c->wants_grad |= c->need_grad[i];
  }
  recording = false; // ops that a forward uses inside are not nodes of their own
  const int32_t span = halo__trace_op_begin(c->op, false);
  const running outer = now;
  now = (running){.name = name, .op = c->op};
  halo_status status = forward(c);
  now = outer;
  halo_trace_end(span);
  recording = was_recording;
  if (status == HALO_OK && c->wants_grad) {
    status = unshare_outputs(c);
    if (status == HALO_OK) status = record(c, name, backward);
  }
  call_clear(c);
  if (status != HALO_OK) {
    for (int32_t i = 0; i < HALO_MAX_OUTPUTS; i++) {
      halo_tensor_free(c->out[i]);
      c->out[i] = NULL;
    }
  }
  return status;
}

halo_status halo_tape_checkpoint(halo_tensor *const *outputs, int32_t n_out,
                                 halo_tensor *const *inputs, int32_t n_in, int64_t token) {
  return halo_tape_checkpoint_offload(outputs, n_out, inputs, n_in, token, 0);
}

/* Input i of node n waits elsewhere: the node keeps its shape only. */
static halo_status offload_input(halo__node *n, int32_t i, halo_tensor *t) {
  if (n->offload == NULL) {
    n->offload = calloc(HALO_MAX_INPUTS, sizeof *n->offload);
    HALO_CHECK(n->offload != NULL, HALO_ENOMEM, "tape_checkpoint: no memory for a node");
    pthread_mutex_lock(&offloaded_lock);
    n->older = newest_offloaded;
    if (n->older != NULL) n->older->newer = n;
    newest_offloaded = n;
    pthread_mutex_unlock(&offloaded_lock);
  }
  HALO_TRY(halo_offload_new(&n->offload[i], t));
  return halo__meta_like(&n->call.in[i], t);
}

halo_status halo_tape_checkpoint_offload(halo_tensor *const *outputs, int32_t n_out,
                                         halo_tensor *const *inputs, int32_t n_in, int64_t token,
                                         uint32_t offload) {
  HALO_CHECK(n_out > 0 && n_out <= HALO_MAX_OUTPUTS && n_in >= 0 && n_in <= HALO_MAX_INPUTS,
             HALO_EARG, "tape_checkpoint: %d inputs and %d outputs, at most %d and %d", n_in, n_out,
             HALO_MAX_INPUTS, HALO_MAX_OUTPUTS);
  for (int32_t i = 0; i < n_out; i++) {
    HALO_CHECK(outputs[i] == NULL || outputs[i]->node == NULL, HALO_ESTATE,
               "tape_checkpoint: output %d is on the tape already; run the function with the tape "
               "off first", i);
  }
  halo__node *n = node_new();
  HALO_CHECK(n != NULL, HALO_ENOMEM, "tape_checkpoint: no memory for a node");
  n->name = "checkpoint";
  n->is_checkpoint = true;
  n->token = token;
  n->n_out = n_out;
  n->call.n_in = n_in;
  halo_status status = HALO_OK;
  for (int32_t i = 0; i < n_in && status == HALO_OK; i++) {
    if (inputs[i] == NULL) continue;
    // A leaf stays where it is: the edge holds it.
    const bool waits = (offload >> i & 1) != 0 && (inputs[i]->node != NULL || !wants_grad(inputs[i]));
    status = waits ? offload_input(n, i, inputs[i]) : halo_tensor_retain(&n->call.in[i], inputs[i]);
    set_edge(&n->edges[i], inputs[i]);
  }
  for (int32_t i = 0; i < n_out && status == HALO_OK; i++) {
    if (outputs[i] != NULL) status = bind_output(n, i, outputs[i]);
  }
  halo__node_release(n);
  return status;
}

/* ---- leaves ---- */

halo_status halo_tensor_require_grad(halo_tensor *t, int32_t on) {
  HALO_CHECK(t != NULL && halo__is_float(t->dtype), HALO_EARG,
             "require_grad: needs a floating tensor, got %s", halo__describe(t));
  HALO_CHECK(t->node == NULL, HALO_ESTATE,
             "require_grad: the tensor is a result of %s; detach it first", t->node->name);
  t->requires_grad = on != 0;
  return HALO_OK;
}

int32_t halo_tensor_requires_grad(const halo_tensor *t) { return t->requires_grad; }
halo_tensor *halo_tensor_grad(const halo_tensor *t) { return t->grad; }

halo_status halo_tensor_set_grad(halo_tensor *t, halo_tensor *grad) {
  HALO_CHECK(t != NULL, HALO_EARG, "set_grad: tensor is NULL");
  HALO_CHECK(grad == NULL || (halo__same_shape(t, grad) && halo__is_float(grad->dtype)), HALO_EARG,
             "set_grad: gradient %s for tensor %s", halo__describe(grad), halo__describe(t));
  HALO_CHECK(grad == NULL || halo__device(grad) == halo__device(t), HALO_EARG,
             "set_grad: the gradient is on %s, the tensor on %s",
             halo__device_name(halo__device(grad)), halo__device_name(halo__device(t)));
  if (grad != NULL) HALO_TRY(halo_tensor_retain(&grad, grad));
  halo_tensor_free(t->grad);
  t->grad = grad;
  return HALO_OK;
}

halo_status halo_tensor_detach(halo_tensor **out, halo_tensor *t) {
  HALO_CHECK(t != NULL, HALO_EARG, "detach: tensor is NULL");
  return halo__view(out, t, t->ndim, t->shape, t->stride, 0);
}

/* ---- backward ---- */

typedef struct frame {
  halo__node **heap; /* max-heap by id; owns a reference to each */
  int32_t count, capacity;
  halo__node *checkpoint; /* the node this frame recomputes; NULL for the outermost */
  halo_tensor *leaves[HALO_MAX_INPUTS];
  struct frame *outer;
} frame;

struct halo_backward {
  frame *top;
  halo__node *waiting; /* checkpoint node reported and not yet answered; owned */
  halo_tensor *leaves[HALO_MAX_INPUTS];
};

static halo_status heap_push(frame *f, halo__node *n) {
  if (f->count == f->capacity) {
    const int32_t capacity = f->capacity > 0 ? 2 * f->capacity : 64;
    halo__node **heap = realloc(f->heap, (size_t)capacity * sizeof *heap);
    HALO_CHECK(heap != NULL, HALO_ENOMEM, "backward: no memory for the node queue");
    f->heap = heap;
    f->capacity = capacity;
  }
  int32_t i = f->count++;
  n->references++;
  n->queued = true;
  while (i > 0 && f->heap[(i - 1) / 2]->id < n->id) {
    f->heap[i] = f->heap[(i - 1) / 2];
    i = (i - 1) / 2;
  }
  f->heap[i] = n;
  return HALO_OK;
}

static halo__node *heap_pop(frame *f) {
  halo__node *top = f->heap[0], *last = f->heap[--f->count];
  int32_t i = 0;
  for (;;) {
    int32_t child = 2 * i + 1;
    if (child >= f->count) break;
    if (child + 1 < f->count && f->heap[child + 1]->id > f->heap[child]->id) child++;
    if (f->heap[child]->id <= last->id) break;
    f->heap[i] = f->heap[child];
    i = child;
  }
  f->heap[i] = last;
  top->queued = false;
  return top;
}

static bool is_private(const halo_tensor *t) {
  return t->references == 1 && t->storage->references == 1 && halo_tensor_is_contiguous(t);
}

/* *slot += grad; takes over the reference to grad. `shape_of` has the shape and dtype wanted. */
static halo_status accumulate(halo_tensor **slot, halo_tensor *grad, const halo_tensor *shape_of,
                              bool own) {
  halo_status status = HALO_OK;
  halo_tensor *sum = NULL;
  assert(halo__same_shape(grad, shape_of));
  if (*slot == NULL) {
    if (!own || (is_private(grad) && grad->dtype == shape_of->dtype)) {
      *slot = grad;
      return HALO_OK;
    }
    HALO_TRY_GOTO(halo__new_like(&sum, shape_of));
    HALO_TRY_GOTO(halo_tensor_copy(sum, grad));
    *slot = sum;
    sum = NULL;
  } else if (own || is_private(*slot)) {
    status = halo_tensor_add_scaled(*slot, grad, 1.0);
  } else {
    HALO_TRY_GOTO(halo__new_like(&sum, shape_of));
    HALO_TRY_GOTO(halo_tensor_copy(sum, *slot));
    HALO_TRY_GOTO(halo_tensor_add_scaled(sum, grad, 1.0));
    halo_tensor_free(*slot);
    *slot = sum;
    sum = NULL;
  }
done:
  halo_tensor_free(sum);
  halo_tensor_free(grad);
  return status;
}

/* Send a gradient along an edge; takes over the reference. */
static halo_status deliver(frame *f, edge *e, halo_tensor *grad) {
  if (e->leaf != NULL) return accumulate(&e->leaf->grad, grad, e->leaf, true);
  if (e->node == NULL) {
    halo_tensor_free(grad);
    return HALO_OK;
  }
  halo__node *n = e->node;
  if (n->used) {
    halo_tensor_free(grad);
    return halo__error(HALO_ESTATE,
                       "backward: the tape of %s was already used; run the forward again", n->name);
  }
  HALO_TRY(accumulate(&n->grads[e->output], grad, n->meta_out[e->output], false));
  return n->queued ? HALO_OK : heap_push(f, n);
}

static frame *frame_new(frame *outer) {
  frame *f = calloc(1, sizeof *f);
  if (f != NULL) f->outer = outer;
  return f;
}

static frame *frame_free(frame *f) {
  frame *outer = f->outer;
  while (f->count > 0) halo__node_release(heap_pop(f));
  for (int32_t i = 0; i < HALO_MAX_INPUTS; i++) halo_tensor_free(f->leaves[i]);
  halo__node_release(f->checkpoint);
  free(f->heap);
  free(f);
  return outer;
}

halo_status halo_backward_begin(halo_backward **out, halo_tensor *root, halo_tensor *seed) {
  HALO_CHECK(out != NULL && root != NULL, HALO_EARG, "backward: NULL argument");
  HALO_CHECK(wants_grad(root), HALO_ESTATE,
             "backward: %s does not depend on a tensor that requires a gradient",
             halo__describe(root));
  HALO_CHECK(seed == NULL || halo__same_shape(seed, root), HALO_EARG,
             "backward: seed %s for root %s", halo__describe(seed), halo__describe(root));
  halo_backward *b = calloc(1, sizeof *b);
  HALO_CHECK(b != NULL, HALO_ENOMEM, "backward: no memory");
  halo_status status = HALO_OK;
  halo_tensor *grad = NULL;
  b->top = frame_new(NULL);
  HALO_CHECK_GOTO(b->top != NULL, HALO_ENOMEM, "backward: no memory");
  HALO_TRY_GOTO(halo__new_like(&grad, root));
  HALO_TRY_GOTO(seed != NULL ? halo_tensor_copy(grad, seed) : halo_tensor_fill(grad, 1.0));
  edge e = {0};
  if (root->node != NULL) {
    e.node = root->node;
    e.output = root->node_output;
  } else {
    e.leaf = root;
  }
  halo_tensor *given = grad;
  grad = NULL; // deliver takes it over, also when it fails
  HALO_TRY_GOTO(deliver(b->top, &e, given));
  *out = b;
  return HALO_OK;
done:
  halo_tensor_free(grad);
  halo_backward_free(b);
  return status;
}

/* The gradients of leaves that `cat` put one after the other, as one tensor, where they lie so too: a
 * product may then add to a packed weight's gradient in one go. *out stays NULL otherwise. */
static halo_status packed_grad(halo_tensor **out, const halo__node *n) {
  if (n == NULL || n->used || n->call.op != HALO_OP_cat) return HALO_OK;
  halo_tensor *parts[HALO_MAX_INPUTS];
  for (int32_t i = 0; i < n->call.n_in; i++) {
    const halo_tensor *leaf = n->edges[i].leaf;
    if (leaf == NULL || leaf->grad == NULL) return HALO_OK;
    parts[i] = leaf->grad;
  }
  HALO_TRY(halo__joined(out, parts, n->call.n_in));
  if (*out != NULL && !halo__same_shape(*out, n->meta_out[0])) { // along another dim
    halo_tensor_free(*out);
    *out = NULL;
  }
  return HALO_OK;
}

/* Run one op node: its backward, then its gradients to its edges. */
static halo_status run_node(frame *f, halo__node *n) {
  halo__call *c = &n->call;
  halo_tensor *packed[HALO_MAX_INPUTS] = {NULL};
  halo_status status = HALO_OK;
  for (int32_t i = 0; i < c->n_in && status == HALO_OK; i++) {
    const edge *e = &n->edges[i];
    c->need_grad[i] = e->node != NULL || e->leaf != NULL;
    status = packed_grad(&packed[i], e->node);
    halo_tensor *into = e->leaf != NULL ? e->leaf->grad : packed[i];
    c->accumulate_into[i] = into != NULL && halo_tensor_is_contiguous(into) ? into : NULL;
    c->accumulated[i] = false;
  }
  memcpy(c->grad_out, n->grads, sizeof c->grad_out);
  const bool was_recording = recording;
  recording = false;
  const int32_t span = halo__trace_op_begin(c->op, true);
  const running outer = now;
  now = (running){.name = n->name, .op = c->op, .is_backward = true};
  if (status == HALO_OK) status = n->backward(c);
  now = outer;
  halo_trace_end(span);
  recording = was_recording;
  for (int32_t i = 0; i < c->n_in; i++) {
    halo_tensor *grad = c->grad_in[i];
    c->grad_in[i] = NULL;
    if (status != HALO_OK || !c->need_grad[i]) {
      halo_tensor_free(grad);
    } else if (grad != NULL) {
      status = deliver(f, &n->edges[i], grad);
    }
  }
  memset(c->grad_out, 0, sizeof c->grad_out);
  memset(c->accumulate_into, 0, sizeof c->accumulate_into);
  for (int32_t i = 0; i < HALO_MAX_INPUTS; i++) halo_tensor_free(packed[i]);
  return status;
}

static void finish_node(halo__node *n) {
  halo__node *dead = NULL;
  n->used = true;
  node_empty(n, &dead);
  free_dead(dead);
  halo__node_release(n);
}

/* The nested frame is done: hand the gradients of its fresh leaves to the checkpoint's edges. */
static halo_status finish_frame(halo_backward *b) {
  frame *f = b->top;
  halo__node *n = f->checkpoint;
  halo_status status = HALO_OK;
  for (int32_t i = 0; i < n->call.n_in && status == HALO_OK; i++) {
    halo_tensor *leaf = f->leaves[i];
    if (leaf == NULL || leaf->grad == NULL) continue;
    halo_tensor *grad = leaf->grad;
    leaf->grad = NULL;
    status = deliver(f->outer, &n->edges[i], grad);
  }
  f->checkpoint = NULL;
  finish_node(n);
  b->top = frame_free(f);
  return status;
}

halo_status halo_backward_next(halo_backward *b, int32_t *event_out, int64_t *token_out) {
  HALO_CHECK(b != NULL && event_out != NULL && token_out != NULL, HALO_EARG,
             "backward_next: NULL argument");
  HALO_CHECK(b->waiting == NULL, HALO_ESTATE,
             "backward_next: a recompute is waiting for halo_backward_recomputed");
  for (;;) {
    frame *f = b->top;
    if (f->count == 0) {
      if (f->outer == NULL) {
        *event_out = HALO_BACKWARD_DONE;
        *token_out = 0;
        return HALO_OK;
      }
      HALO_TRY(finish_frame(b));
      continue;
    }
    halo__node *n = heap_pop(f);
    if (n->is_checkpoint) {
      b->waiting = n;
      prefetch(n);
      prefetch(n->older);
      *event_out = HALO_BACKWARD_RECOMPUTE;
      *token_out = n->token;
      return HALO_OK;
    }
    halo_status status = run_node(f, n);
    finish_node(n);
    HALO_TRY(status);
  }
}

halo_status halo_backward_inputs(halo_backward *b, halo_tensor **out, int32_t capacity,
                                 int32_t *n_out) {
  HALO_CHECK(b != NULL && out != NULL && n_out != NULL, HALO_EARG,
             "backward_inputs: NULL argument");
  HALO_CHECK(b->waiting != NULL, HALO_ESTATE, "backward_inputs: no recompute is waiting");
  halo__node *n = b->waiting;
  HALO_CHECK(capacity >= n->call.n_in, HALO_EARG, "backward_inputs: room for %d, needs %d",
             capacity, n->call.n_in);
  for (int32_t i = 0; i < n->call.n_in; i++) {
    if (b->leaves[i] == NULL && n->call.in[i] != NULL) {
      if (n->offload != NULL && n->offload[i] != NULL) {
        HALO_TRY(halo_offload_fetch(&b->leaves[i], n->offload[i]));
      } else {
        HALO_TRY(halo_tensor_detach(&b->leaves[i], n->call.in[i]));
      }
      b->leaves[i]->requires_grad = n->edges[i].node != NULL || n->edges[i].leaf != NULL;
    }
    out[i] = b->leaves[i];
  }
  *n_out = n->call.n_in;
  return HALO_OK;
}

halo_status halo_backward_recomputed(halo_backward *b, halo_tensor *const *outputs,
                                     int32_t n_out) {
  HALO_CHECK(b != NULL && outputs != NULL, HALO_EARG, "backward_recomputed: NULL argument");
  HALO_CHECK(b->waiting != NULL, HALO_ESTATE, "backward_recomputed: no recompute is waiting");
  halo__node *n = b->waiting;
  HALO_CHECK(n_out == n->n_out, HALO_ESTATE,
             "backward_recomputed: the function gave %d results, %d the first time", n_out,
             n->n_out);
  for (int32_t i = 0; i < n_out; i++) {
    HALO_CHECK(n->grads[i] == NULL ||
                   (outputs[i] != NULL && halo__same_shape(outputs[i], n->meta_out[i])),
               HALO_ESTATE, "backward_recomputed: result %d is %s, it was %s the first time",
               i + 1, halo__describe(outputs[i]), halo__describe(n->meta_out[i]));
  }
  frame *f = frame_new(b->top);
  HALO_CHECK(f != NULL, HALO_ENOMEM, "backward_recomputed: no memory");
  f->checkpoint = n;
  memcpy(f->leaves, b->leaves, sizeof f->leaves);
  memset(b->leaves, 0, sizeof b->leaves);
  b->waiting = NULL;
  b->top = f;
  for (int32_t i = 0; i < n_out; i++) {
    halo_tensor *grad = n->grads[i], *t = outputs[i];
    if (grad == NULL || !wants_grad(t)) continue;
    n->grads[i] = NULL;
    edge e = {.node = t->node, .output = t->node_output, .leaf = t->node == NULL ? t : NULL};
    HALO_TRY(deliver(f, &e, grad));
  }
  return HALO_OK;
}

void halo_backward_free(halo_backward *b) {
  if (b == NULL) return;
  while (b->top != NULL) b->top = frame_free(b->top);
  for (int32_t i = 0; i < HALO_MAX_INPUTS; i++) halo_tensor_free(b->leaves[i]);
  halo__node_release(b->waiting);
  free(b);
}
