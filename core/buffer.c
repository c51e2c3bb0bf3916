/* buffer.c: see buffer.h. */
#include "buffer.h"

enum { FIRST_BYTES = 1024 };

halo_status halo__data_alloc(void **out, int64_t bytes) {
  halo_memory_push_tag(HALO_TAG_DATA);
  const halo_status status = halo__alloc(out, bytes, HALO_CPU);
  halo_memory_pop_tag();
  return status;
}

halo_status halo__buffer_grow(halo__buffer *b, int64_t extra) {
  int64_t need, capacity;
  HALO_CHECK(halo__add(b->bytes, extra, &need), HALO_ENOMEM, "buffer: %lld more bytes overflow",
             (long long)extra);
  if (!halo__mul(b->capacity, 2, &capacity) || capacity < need) capacity = need;
  if (capacity < FIRST_BYTES) capacity = FIRST_BYTES;
  void *data;
  HALO_TRY(halo__data_alloc(&data, capacity));
  if (b->bytes > 0) memcpy(data, b->data, (size_t)b->bytes);
  halo__free(b->data);
  b->data = data;
  b->capacity = capacity;
  return HALO_OK;
}

halo_status halo__buffer_release(halo__buffer *b, void **out) {
  if (b->data == NULL) HALO_TRY(halo__buffer_grow(b, 1));
  if (b->capacity > 4 * FIRST_BYTES && b->bytes < b->capacity / 2) {
    void *tight;
    HALO_TRY(halo__data_alloc(&tight, b->bytes > 0 ? b->bytes : 1));
    if (b->bytes > 0) memcpy(tight, b->data, (size_t)b->bytes);
    halo__free(b->data);
    b->data = tight;
  }
  *out = b->data;
  *b = (halo__buffer){0};
  return HALO_OK;
}

void halo__buffer_free(halo__buffer *b) {
  halo__free(b->data);
  *b = (halo__buffer){0};
}
