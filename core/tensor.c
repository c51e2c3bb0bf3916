/* tensor.c: storage, views, shapes, reference counts.
 *
 * A tensor is a strided window on reference-counted storage. The handle itself is counted too:
 * halo_tensor_retain gives the same object back, so that the tape, Lua and C can hold one leaf and
 * see one gradient. Views are new handles on the same storage.
 *
 * Nothing here records on the tape; what does is an op (ops.c).
 */
#include "internal.h"
#include "kernels.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

/* ---- dtypes ---- */

static const struct {
  const char *name;
  int64_t bytes;
} dtypes[HALO_DTYPE_COUNT] = {
    [HALO_F32] = {"f32", 4}, [HALO_F64] = {"f64", 8}, [HALO_BF16] = {"bf16", 2},
    [HALO_I32] = {"i32", 4}, [HALO_I64] = {"i64", 8}, [HALO_U8] = {"u8", 1},
};

enum { STAGE_BYTES = 32 << 20 }; /* host memory that device bytes pass through, piece by piece */

static bool is_dtype(int32_t t) { return t >= 0 && t < HALO_DTYPE_COUNT; }

int64_t halo_dtype_bytes(int32_t dtype) { return is_dtype(dtype) ? dtypes[dtype].bytes : -1; }
const char *halo_dtype_name(int32_t dtype) { return is_dtype(dtype) ? dtypes[dtype].name : "?"; }

/* ---- storage ---- */

static void storage_release(halo__storage *s) {
  if (s == NULL || __atomic_sub_fetch(&s->references, 1, __ATOMIC_ACQ_REL) > 0) return;
  if (s->release != NULL) {
    s->release(s->data, s->owner);
  } else {
    halo__free(s->data);
  }
  free(s);
}

static halo_status storage_new(halo__storage **out, void *data, int64_t bytes, halo_device device) {
  halo__storage *s = malloc(sizeof *s);
  HALO_CHECK(s != NULL, HALO_ENOMEM, "tensor: no memory for a handle");
  *s = (halo__storage){.data = data, .bytes = bytes, .device = device, .references = 1};
  *out = s;
  return HALO_OK;
}

/* ---- handles ---- */

static halo_status check_shape(int32_t dtype, int32_t ndim, const int64_t *shape,
                               int64_t *count_out) {
  HALO_CHECK(is_dtype(dtype), HALO_EARG, "tensor: unknown dtype %d", dtype);
  HALO_CHECK(ndim >= 0 && ndim <= HALO_MAX_DIMS, HALO_EARG, "tensor: %d dims, at most %d", ndim,
             HALO_MAX_DIMS);
  int64_t count = 1, bytes = 0;
  for (int32_t i = 0; i < ndim; i++) {
    HALO_CHECK(halo__mul(count, shape[i], &count), HALO_EARG,
               "tensor: dim %d has size %lld, or the product is too large", i,
               (long long)shape[i]);
  }
  HALO_CHECK(halo__mul(count, dtypes[dtype].bytes, &bytes), HALO_EARG,
             "tensor: %lld elements are too many", (long long)count);
  *count_out = count;
  return HALO_OK;
}

/* Takes over the reference to storage; frees it on failure. */
static halo_status handle_new(halo_tensor **out, halo__storage *storage, halo_dtype dtype,
                              int32_t ndim, const int64_t *shape, const int64_t *stride,
                              int64_t offset) {
  halo_tensor *t = calloc(1, sizeof *t);
  if (t == NULL) {
    storage_release(storage);
    return halo__error(HALO_ENOMEM, "tensor: no memory for a handle");
  }
  t->storage = storage;
  t->offset = offset;
  t->references = 1;
  t->dtype = dtype;
  t->ndim = ndim;
  int64_t step = 1;
  for (int32_t i = ndim - 1; i >= 0; i--) {
    t->shape[i] = shape[i];
    t->stride[i] = stride != NULL ? stride[i] : step;
    step *= shape[i];
  }
  *out = t;
  return HALO_OK;
}

static halo_status new_tensor(halo_tensor **out, int32_t dtype, int32_t device, int32_t ndim,
                              const int64_t *shape, bool zero) {
  HALO_CHECK(out != NULL, HALO_EARG, "tensor: out is NULL");
  HALO_CHECK(device == HALO_CPU || device == HALO_CUDA, HALO_EARG, "tensor: unknown device %d",
             device);
  int64_t count = 0;
  HALO_TRY(check_shape(dtype, ndim, shape, &count));
  const int64_t bytes = count * dtypes[dtype].bytes;
  void *data = NULL;
  HALO_TRY(zero ? halo__alloc_zero(&data, bytes, device) : halo__alloc(&data, bytes, device));
  halo__storage *storage = NULL;
  halo_status status = storage_new(&storage, data, bytes, device);
  if (status != HALO_OK) {
    halo__free(data);
    return status;
  }
  return handle_new(out, storage, dtype, ndim, shape, NULL, 0);
}

halo_status halo_tensor_new(halo_tensor **out, int32_t dtype, int32_t device, int32_t ndim,
                            const int64_t *shape) {
  return new_tensor(out, dtype, device, ndim, shape, false);
}

halo_status halo_tensor_zeros(halo_tensor **out, int32_t dtype, int32_t device, int32_t ndim,
                              const int64_t *shape) {
  return new_tensor(out, dtype, device, ndim, shape, true);
}

halo_status halo_tensor_from(halo_tensor **out, int32_t dtype, int32_t device, int32_t ndim,
                             const int64_t *shape, const void *host) {
  halo_tensor *t = NULL;
  HALO_TRY(halo_tensor_new(&t, dtype, device, ndim, shape));
  halo_status status = halo_tensor_write(t, host);
  if (status != HALO_OK) {
    halo_tensor_free(t);
    return status;
  }
  *out = t;
  return HALO_OK;
}

halo_status halo__wrap(halo_tensor **out, void *data, int64_t bytes, halo_dtype dtype,
                       halo_device device, int32_t ndim, const int64_t *shape,
                       void (*release)(void *data, void *owner), void *owner) {
  int64_t count = 0;
  HALO_TRY(check_shape(dtype, ndim, shape, &count));
  HALO_CHECK(count * dtypes[dtype].bytes <= bytes, HALO_EARG,
             "tensor: shape needs %lld bytes, %lld are there",
             (long long)(count * dtypes[dtype].bytes), (long long)bytes);
  halo__storage *storage = NULL;
  HALO_TRY(storage_new(&storage, data, bytes, device));
  halo_tensor *t = NULL;
  storage->release = NULL;
  halo_status status = handle_new(&t, storage, dtype, ndim, shape, NULL, 0);
  if (status != HALO_OK) return status;
  storage->release = release;
  storage->owner = owner;
  *out = t;
  return HALO_OK;
}

halo_status halo__view(halo_tensor **out, halo_tensor *t, int32_t ndim, const int64_t *shape,
                       const int64_t *stride, int64_t offset) {
  __atomic_add_fetch(&t->storage->references, 1, __ATOMIC_ACQ_REL);
  return handle_new(out, t->storage, t->dtype, ndim, shape, stride, t->offset + offset);
}

halo_status halo__joined(halo_tensor **out, halo_tensor *const *parts, int32_t n) {
  halo_tensor *first = parts[0];
  int64_t shape[HALO_MAX_DIMS], stride[HALO_MAX_DIMS], end = first->offset, step = 1;
  if (n == 0 || first->ndim == 0) return HALO_OK;
  memcpy(shape, first->shape, sizeof shape);
  shape[0] = 0;
  for (int32_t i = 0; i < n; i++) {
    const halo_tensor *t = parts[i];
    const bool fits = t->storage == first->storage && t->dtype == first->dtype && t->ndim == first->ndim &&
                      t->offset == end && halo_tensor_is_contiguous(t) &&
                      memcmp(t->shape + 1, first->shape + 1, (size_t)(t->ndim - 1) * sizeof *shape) == 0;
    if (!fits) return HALO_OK;
    shape[0] += t->shape[0];
    end += halo_tensor_count(t);
  }
  for (int32_t d = first->ndim - 1; d >= 0; d--) {
    stride[d] = step;
    step *= shape[d];
  }
  return halo__view(out, first, first->ndim, shape, stride, 0);
}

halo_status halo__meta_new(halo_tensor **out, halo_dtype dtype, halo_device device, int32_t ndim,
                           const int64_t *shape) {
  halo__storage *storage = NULL;
  HALO_TRY(storage_new(&storage, NULL, 0, device));
  return handle_new(out, storage, dtype, ndim, shape, NULL, 0);
}

halo_status halo__meta_like(halo_tensor **out, const halo_tensor *t) {
  halo__storage *storage = NULL;
  HALO_TRY(storage_new(&storage, NULL, 0, halo__device(t)));
  return handle_new(out, storage, t->dtype, t->ndim, t->shape, t->stride, 0);
}

halo_status halo_tensor_retain(halo_tensor **out, halo_tensor *t) {
  HALO_CHECK(t != NULL, HALO_EARG, "tensor_retain: tensor is NULL");
  __atomic_add_fetch(&t->references, 1, __ATOMIC_ACQ_REL);
  *out = t;
  return HALO_OK;
}

void halo_tensor_free(halo_tensor *t) {
  if (t == NULL || __atomic_sub_fetch(&t->references, 1, __ATOMIC_ACQ_REL) > 0) return;
  halo_tensor_free(t->grad);
  halo__node_release(t->node);
  storage_release(t->storage);
  free(t);
}

/* ---- getters ---- */

int32_t halo_tensor_dtype(const halo_tensor *t) { return (int32_t)t->dtype; }
int32_t halo_tensor_device(const halo_tensor *t) { return (int32_t)t->storage->device; }
int32_t halo_tensor_ndim(const halo_tensor *t) { return t->ndim; }

int64_t halo_tensor_size(const halo_tensor *t, int32_t dim) {
  if (dim < 0) dim += t->ndim;
  return dim >= 0 && dim < t->ndim ? t->shape[dim] : -1;
}

int64_t halo_tensor_stride(const halo_tensor *t, int32_t dim) {
  if (dim < 0) dim += t->ndim;
  return dim >= 0 && dim < t->ndim ? t->stride[dim] : -1;
}

int64_t halo_tensor_count(const halo_tensor *t) {
  int64_t n = 1;
  for (int32_t i = 0; i < t->ndim; i++) n *= t->shape[i];
  return n;
}

int32_t halo_tensor_is_contiguous(const halo_tensor *t) {
  int64_t step = 1;
  for (int32_t i = t->ndim - 1; i >= 0; i--) {
    if (t->shape[i] == 0) return 1;
    if (t->shape[i] != 1 && t->stride[i] != step) return 0;
    step *= t->shape[i];
  }
  return 1;
}

void *halo_tensor_data(const halo_tensor *t) {
  if (t->storage->data == NULL) return NULL;
  return (char *)t->storage->data + t->offset * dtypes[t->dtype].bytes;
}

bool halo__same_shape(const halo_tensor *a, const halo_tensor *b) {
  return a->ndim == b->ndim && memcmp(a->shape, b->shape, (size_t)a->ndim * sizeof *a->shape) == 0;
}

const char *halo__describe(const halo_tensor *t) {
  static _Thread_local char ring[8][128];
  static _Thread_local uint32_t next;
  char *text = ring[next++ % 8];
  if (t == NULL) return "NULL";
  int n = snprintf(text, sizeof ring[0], "%s [", dtypes[t->dtype].name);
  for (int32_t i = 0; i < t->ndim && n < (int)sizeof ring[0] - 24; i++) {
    n += snprintf(text + n, sizeof ring[0] - (size_t)n, "%s%lld", i > 0 ? "," : "",
                  (long long)t->shape[i]);
  }
  snprintf(text + n, sizeof ring[0] - (size_t)n, "]");
  return text;
}

/* ---- copies ---- */

halo_status halo__new_like(halo_tensor **out, const halo_tensor *t) {
  return halo_tensor_new(out, (int32_t)t->dtype, halo_tensor_device(t), t->ndim, t->shape);
}

halo_status halo__zeros_like(halo_tensor **out, const halo_tensor *t) {
  return halo_tensor_zeros(out, (int32_t)t->dtype, halo_tensor_device(t), t->ndim, t->shape);
}

/* Contiguous y of the same dtype and device <- t. */
static halo_status pack(void *y, const halo_tensor *t) {
  const halo_kernels *k = halo__kernels(halo__device(t));
  if (halo_tensor_is_contiguous(t)) {
    if (halo__device(t) != HALO_CPU) {
      return k->copy(y, halo__data(t), halo_tensor_count(t) * dtypes[t->dtype].bytes);
    }
    return k->convert(y, t->dtype, halo__data(t), t->dtype, halo_tensor_count(t));
  }
  return k->pack(y, halo__data(t), dtypes[t->dtype].bytes, t->ndim, t->shape, t->stride);
}

halo_status halo__contiguous(halo_tensor **out, halo_tensor *t) {
  if (halo_tensor_is_contiguous(t)) return halo_tensor_retain(out, t);
  halo_tensor *y = NULL;
  HALO_TRY(halo__new_like(&y, t));
  halo_status status = pack(halo__data(y), t);
  if (status != HALO_OK) {
    halo_tensor_free(y);
    return status;
  }
  *out = y;
  return HALO_OK;
}

/* Bytes of a contiguous tensor. */
static int64_t byte_count(const halo_tensor *t) { return halo_tensor_count(t) * dtypes[t->dtype].bytes; }

halo_status halo_tensor_read(const halo_tensor *t, void *host) {
  HALO_CHECK(t != NULL && host != NULL, HALO_EARG, "tensor_read: NULL argument");
  if (halo_tensor_count(t) == 0) return HALO_OK;
  const halo_device device = halo__device(t);
  if (device == HALO_CPU) return pack(host, t);
  const halo_kernels *k = halo__kernels(device);
  if (halo_tensor_is_contiguous(t)) return k->copy_out(host, halo__data(t), byte_count(t));
  void *packed = NULL;
  HALO_TRY(halo__alloc(&packed, byte_count(t), device));
  halo_status status = pack(packed, t);
  if (status == HALO_OK) status = k->copy_out(host, packed, byte_count(t));
  halo__free(packed);
  return status;
}

/* t <- contiguous elements of its dtype, on its device. */
static halo_status unpack(halo_tensor *t, const void *x) {
  const halo_kernels *k = halo__kernels(halo__device(t));
  if (!halo_tensor_is_contiguous(t)) {
    return k->unpack(halo__data(t), x, dtypes[t->dtype].bytes, t->ndim, t->shape, t->stride);
  }
  if (halo__device(t) != HALO_CPU) return k->copy(halo__data(t), x, byte_count(t));
  return k->convert(halo__data(t), t->dtype, x, t->dtype, halo_tensor_count(t));
}

halo_status halo_tensor_write(halo_tensor *t, const void *host) {
  HALO_CHECK(t != NULL && host != NULL, HALO_EARG, "tensor_write: NULL argument");
  if (halo_tensor_count(t) == 0) return HALO_OK;
  const halo_device device = halo__device(t);
  if (device == HALO_CPU) return unpack(t, host);
  const halo_kernels *k = halo__kernels(device);
  if (halo_tensor_is_contiguous(t)) return k->copy_in(halo__data(t), host, byte_count(t));
  void *packed = NULL;
  HALO_TRY(halo__alloc(&packed, byte_count(t), device));
  halo_status status = k->copy_in(packed, host, byte_count(t));
  if (status == HALO_OK) status = unpack(t, packed);
  halo__free(packed);
  return status;
}

/* dst <- src on one device. */
static halo_status copy_here(halo_tensor *dst, const halo_tensor *src) {
  const int64_t n = halo_tensor_count(src);
  const halo_device device = halo__device(dst);
  const halo_kernels *k = halo__kernels(device);
  const bool dst_dense = halo_tensor_is_contiguous(dst), src_dense = halo_tensor_is_contiguous(src);
  if (src_dense && dst->dtype == src->dtype) return unpack(dst, halo__data(src));
  if (dst_dense && src_dense) {
    return k->convert(halo__data(dst), dst->dtype, halo__data(src), src->dtype, n);
  }
  if (dst_dense && dst->dtype == src->dtype) return pack(halo__data(dst), src);
  // The general case: pack, convert, unpack.
  void *packed = NULL, *converted = NULL;
  halo_status status = halo__alloc(&packed, n * dtypes[src->dtype].bytes, device);
  if (status == HALO_OK) status = pack(packed, src);
  if (status == HALO_OK && src->dtype != dst->dtype) {
    status = halo__alloc(&converted, n * dtypes[dst->dtype].bytes, device);
    if (status == HALO_OK) status = k->convert(converted, dst->dtype, packed, src->dtype, n);
  }
  if (status == HALO_OK) status = unpack(dst, converted != NULL ? converted : packed);
  halo__free(packed);
  halo__free(converted);
  return status;
}

/* dst <- src between devices. What crosses is contiguous and of the narrower of the two dtypes. */
static halo_status copy_across(halo_tensor *dst, const halo_tensor *src) {
  const halo_dtype dtype = dtypes[src->dtype].bytes <= dtypes[dst->dtype].bytes ? src->dtype : dst->dtype;
  const halo_tensor *from = src;
  halo_tensor *sent = NULL, *landed = NULL, *to = dst;
  halo_status status = HALO_OK;
  if (src->dtype != dtype || !halo_tensor_is_contiguous(src)) {
    HALO_TRY_GOTO(halo_tensor_new(&sent, (int32_t)dtype, (int32_t)halo__device(src), src->ndim, src->shape));
    HALO_TRY_GOTO(copy_here(sent, src));
    from = sent;
  }
  if (dst->dtype != dtype || !halo_tensor_is_contiguous(dst)) {
    HALO_TRY_GOTO(halo_tensor_new(&landed, (int32_t)dtype, (int32_t)halo__device(dst), dst->ndim, dst->shape));
    to = landed;
  }
  if (halo__device(src) == HALO_CPU) {
    status = halo__kernels(halo__device(dst))->copy_in(halo__data(to), halo__data(from), byte_count(from));
  } else {
    status = halo__kernels(halo__device(src))->copy_out(halo__data(to), halo__data(from), byte_count(from));
  }
  if (status == HALO_OK && to != dst) status = copy_here(dst, to);
done:
  halo_tensor_free(sent);
  halo_tensor_free(landed);
  return status;
}

halo_status halo_tensor_copy(halo_tensor *dst, const halo_tensor *src) {
  HALO_CHECK(dst != NULL && src != NULL, HALO_EARG, "tensor_copy: NULL argument");
  HALO_CHECK(halo__same_shape(dst, src), HALO_EARG, "tensor_copy: shapes differ: %s <- %s",
             halo__describe(dst), halo__describe(src));
  if (halo_tensor_count(src) == 0) return HALO_OK;
  return halo__device(dst) == halo__device(src) ? copy_here(dst, src) : copy_across(dst, src);
}

/* ---- single elements and small arithmetic outside the tape ---- */

static int64_t element_offset(const halo_tensor *t, int64_t flat) {
  int64_t offset = 0;
  for (int32_t i = t->ndim - 1; i >= 0; i--) {
    offset += flat % t->shape[i] * t->stride[i];
    flat /= t->shape[i];
  }
  return offset;
}

static halo_status check_flat(const char *name, const halo_tensor *t, int64_t flat) {
  HALO_CHECK(t != NULL, HALO_EARG, "%s: tensor is NULL", name);
  HALO_CHECK(flat >= 0 && flat < halo_tensor_count(t), HALO_EARG,
             "%s: index %lld is outside %s", name, (long long)flat, halo__describe(t));
  return HALO_OK;
}

halo_status halo_tensor_get(const halo_tensor *t, int64_t flat, double *out) {
  HALO_TRY(check_flat("tensor_get", t, flat));
  const char *p = (const char *)halo__data(t) + element_offset(t, flat) * dtypes[t->dtype].bytes;
  uint64_t element = 0;
  HALO_TRY(halo__kernels(halo__device(t))->copy_out(&element, p, dtypes[t->dtype].bytes));
  return halo__kernels(HALO_CPU)->convert(out, HALO_F64, &element, t->dtype, 1);
}

halo_status halo_tensor_set(halo_tensor *t, int64_t flat, double value) {
  HALO_TRY(check_flat("tensor_set", t, flat));
  char *p = (char *)halo__data(t) + element_offset(t, flat) * dtypes[t->dtype].bytes;
  uint64_t element = 0;
  HALO_TRY(halo__kernels(HALO_CPU)->convert(&element, t->dtype, &value, HALO_F64, 1));
  return halo__kernels(halo__device(t))->copy_in(p, &element, dtypes[t->dtype].bytes);
}

halo_status halo_tensor_fill(halo_tensor *t, double value) {
  HALO_CHECK(t != NULL, HALO_EARG, "tensor_fill: tensor is NULL");
  const halo_kernels *k = halo__kernels(halo__device(t));
  if (halo_tensor_is_contiguous(t)) {
    return k->fill(t->dtype, halo__data(t), halo_tensor_count(t), value);
  }
  halo_tensor *y = NULL;
  HALO_TRY(halo__new_like(&y, t));
  halo_status status = k->fill(t->dtype, halo__data(y), halo_tensor_count(t), value);
  if (status == HALO_OK) status = halo_tensor_copy(t, y);
  halo_tensor_free(y);
  return status;
}

halo_status halo_tensor_add_scaled(halo_tensor *dst, const halo_tensor *src, double scale) {
  HALO_CHECK(dst != NULL && src != NULL, HALO_EARG, "tensor_add_scaled: NULL argument");
  HALO_CHECK(halo__is_float(dst->dtype) && halo__same_shape(dst, src), HALO_EARG,
             "tensor_add_scaled: %s += %s", halo__describe(dst), halo__describe(src));
  halo_tensor *x = NULL, *y = NULL;
  halo_status status = HALO_OK;
  if (src->dtype != dst->dtype || halo__device(src) != halo__device(dst) ||
      !halo_tensor_is_contiguous(src)) {
    HALO_TRY_GOTO(halo__new_like(&x, dst));
    HALO_TRY_GOTO(halo_tensor_copy(x, src));
  }
  HALO_TRY_GOTO(halo__contiguous(&y, dst));
  HALO_TRY_GOTO(halo__kernels(halo__device(dst))
                    ->axpy(dst->dtype, halo__data(y), halo__data(x != NULL ? x : src),
                           halo_tensor_count(dst), scale));
  if (y != dst) status = halo_tensor_copy(dst, y);
done:
  halo_tensor_free(x);
  halo_tensor_free(y);
  return status;
}

halo_status halo_tensor_scale(halo_tensor *t, double scale) {
  HALO_CHECK(t != NULL && halo__is_float(t->dtype), HALO_EARG,
             "tensor_scale: needs a floating tensor, got %s", halo__describe(t));
  halo_tensor *y = NULL;
  HALO_TRY(halo__contiguous(&y, t));
  halo_status status =
      halo__kernels(halo__device(t))->scale(t->dtype, halo__data(y), halo_tensor_count(t), scale);
  if (status == HALO_OK && y != t) status = halo_tensor_copy(t, y);
  halo_tensor_free(y);
  return status;
}

halo_status halo_tensor_hash(const halo_tensor *t, uint64_t *out) {
  HALO_CHECK(t != NULL && out != NULL, HALO_EARG, "tensor_hash: NULL argument");
  XXH3_state_t *state = XXH3_createState();
  HALO_CHECK(state != NULL, HALO_ENOMEM, "tensor_hash: no memory");
  const int64_t bytes = byte_count(t);
  const halo_kernels *k = halo__kernels(halo__device(t));
  const char *data = halo__data(t);
  void *packed = NULL, *stage = NULL;
  halo_status status = HALO_OK;
  if (!halo_tensor_is_contiguous(t)) {
    HALO_TRY_GOTO(halo__alloc(&packed, bytes, halo__device(t)));
    HALO_TRY_GOTO(pack(packed, t));
    data = packed;
  }
  XXH3_64bits_reset(state);
  const int64_t head[2] = {(int64_t)t->dtype, t->ndim};
  XXH3_64bits_update(state, head, sizeof head);
  XXH3_64bits_update(state, t->shape, (size_t)t->ndim * sizeof *t->shape);
  if (halo__device(t) == HALO_CPU) {
    XXH3_64bits_update(state, data, (size_t)bytes);
  } else if (bytes > 0) {
    const int64_t most = bytes < STAGE_BYTES ? bytes : STAGE_BYTES;
    HALO_TRY_GOTO(halo__alloc(&stage, most, HALO_CPU));
    for (int64_t at = 0; at < bytes; at += most) {
      const int64_t n = bytes - at < most ? bytes - at : most;
      HALO_TRY_GOTO(k->copy_out(stage, data + at, n));
      XXH3_64bits_update(state, stage, (size_t)n);
    }
  }
  *out = XXH3_64bits_digest(state);
done:
  halo__free(packed);
  halo__free(stage);
  XXH3_freeState(state);
  return status;
}
