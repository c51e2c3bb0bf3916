/* ops.c: the op table made from ops.def, and the one way to run an op.
 *
 * A row of ops.def becomes an enum value (internal.h), a name, a list of inputs and parameters, and
 * two functions halo__<name>_fwd and halo__<name>_bwd. Adding an op touches the row, the functions and
 * the kernels; names, Lua functions, tests and benchmarks follow from the row.
 */
#include "internal.h"

#include <string.h>

#define YES(name) halo__##name##_bwd
#define NO(name) NULL

#define HALO_OP(name, inputs, params, outputs, gradient, doc)                             \
  halo_status halo__##name##_fwd(halo__call *c);                                          \
  halo_status halo__##name##_bwd(halo__call *c);
#include "ops.def"
#undef HALO_OP

typedef struct op_row {
  const char *name, *inputs, *params, *doc;
  int32_t outputs;
  halo__call_fn forward, backward;
} op_row;

/* The last row keeps the table non-empty and is not counted. */
static const op_row rows[] = {
#define HALO_OP(name, inputs, params, outputs, gradient, doc)                             \
  {#name, inputs, params, doc, outputs, halo__##name##_fwd, gradient(name)},
#include "ops.def"
#undef HALO_OP
    {NULL, NULL, NULL, NULL, 0, NULL, NULL},
};

static const op_row *row_of(int32_t op) {
  return op >= 0 && op < HALO_OP__COUNT ? &rows[op] : NULL;
}

int32_t halo_op_count(void) { return HALO_OP__COUNT; }
const char *halo_op_name(int32_t op) { return row_of(op) ? rows[op].name : NULL; }
const char *halo_op_inputs(int32_t op) { return row_of(op) ? rows[op].inputs : NULL; }
const char *halo_op_params(int32_t op) { return row_of(op) ? rows[op].params : NULL; }
const char *halo_op_doc(int32_t op) { return row_of(op) ? rows[op].doc : NULL; }
int32_t halo_op_outputs(int32_t op) { return row_of(op) ? rows[op].outputs : 0; }
int32_t halo_op_has_gradient(int32_t op) { return row_of(op) && rows[op].backward != NULL; }

int32_t halo_op_find(const char *name) {
  for (int32_t i = 0; name != NULL && i < HALO_OP__COUNT; i++) {
    if (strcmp(rows[i].name, name) == 0) return i;
  }
  return -1;
}

/* Number of entries in "a,b=1,c"; 0 for "". */
static int32_t count_entries(const char *list) {
  int32_t n = *list != 0;
  for (; *list != 0; list++) n += *list == ',';
  return n;
}

/* NULL is allowed for inputs marked with '?'. */
static halo_status check_inputs(const op_row *row, halo_tensor *const *in, int32_t n_in) {
  if (strcmp(row->inputs, "...") == 0) {
    HALO_CHECK(n_in >= 1 && n_in <= HALO_MAX_INPUTS, HALO_EARG, "%s: %d inputs, 1 to %d wanted",
               row->name, n_in, HALO_MAX_INPUTS);
    for (int32_t i = 0; i < n_in; i++) {
      HALO_CHECK(in[i] != NULL, HALO_EARG, "%s: input %d is nil", row->name, i + 1);
    }
    return HALO_OK;
  }
  HALO_CHECK(n_in == count_entries(row->inputs), HALO_EARG, "%s(%s): got %d inputs", row->name,
             row->inputs, n_in);
  const char *p = row->inputs;
  for (int32_t i = 0; i < n_in; i++) {
    const size_t length = strcspn(p, ",");
    HALO_CHECK(in[i] != NULL || p[length - 1] == '?', HALO_EARG, "%s: input %.*s is nil", row->name,
               (int)length, p);
    p += length + (p[length] == ',');
  }
  return HALO_OK;
}

static halo_status check_devices(const op_row *row, halo_tensor *const *in, int32_t n_in) {
  int32_t first = -1;
  for (int32_t i = 0; i < n_in; i++) {
    if (in[i] == NULL) continue;
    if (first < 0) first = i;
    HALO_CHECK(halo__device(in[i]) == halo__device(in[first]), HALO_EARG,
               "%s(%s): input %d is on %s, input %d on %s; move one of them", row->name, row->inputs,
               first + 1, halo__device_name(halo__device(in[first])), i + 1,
               halo__device_name(halo__device(in[i])));
  }
  return HALO_OK;
}

halo_status halo_op(halo_tensor **out, int32_t op, halo_tensor *const *in, int32_t n_in,
                    const double *params, int32_t n_params) {
  const op_row *row = row_of(op);
  HALO_CHECK(row != NULL, HALO_EARG, "op: unknown op %d", op);
  HALO_CHECK(out != NULL && (in != NULL || n_in == 0), HALO_EARG, "%s: NULL argument", row->name);
  HALO_TRY(check_inputs(row, in, n_in));
  HALO_CHECK(n_params == count_entries(row->params), HALO_EARG, "%s: %d parameters, wants \"%s\"",
             row->name, n_params, row->params);
  HALO_TRY(check_devices(row, in, n_in));
  halo__call c = {.op = op, .n_in = n_in, .n_out = row->outputs, .n_param = n_params};
  if (n_in > 0) memcpy(c.in, in, (size_t)n_in * sizeof *in);
  if (n_params > 0) memcpy(c.param, params, (size_t)n_params * sizeof *params);
  HALO_TRY(halo__run(&c, row->name, row->forward, row->backward));
  memcpy(out, c.out, (size_t)row->outputs * sizeof *out);
  return HALO_OK;
}

halo_status halo__op1(halo_tensor **out, int32_t op, halo_tensor *x, const double *params,
                      int32_t n_params) {
  return halo_op(out, op, &x, 1, params, n_params);
}

halo_status halo__op2(halo_tensor **out, int32_t op, halo_tensor *a, halo_tensor *b,
                      const double *params, int32_t n_params) {
  halo_tensor *in[2] = {a, b};
  return halo_op(out, op, in, 2, params, n_params);
}
