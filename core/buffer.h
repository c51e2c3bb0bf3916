/* buffer.h: a growing array of bytes on the counted allocator.
 *
 * For results whose size is known only at the end: token ids of a text, a normalised text, a table of
 * documents. Growth doubles, so appending is linear; the bytes are counted under HALO_TAG_DATA.
 * A zeroed struct is an empty buffer. `data` may be handed over (halo__free frees it).
 */
#ifndef HALO_BUFFER_H
#define HALO_BUFFER_H

#include <string.h>

#include "internal.h"

typedef struct halo__buffer {
  void *data;
  int64_t bytes;    /* in use */
  int64_t capacity; /* allocated */
} halo__buffer;

/* halo__alloc under HALO_TAG_DATA. */
halo_status halo__data_alloc(void **out, int64_t bytes);
/* Make room for `extra` more bytes behind the ones in use. */
halo_status halo__buffer_grow(halo__buffer *b, int64_t extra);
/* Give the bytes to the caller in a block of just their size when much would be wasted. */
halo_status halo__buffer_release(halo__buffer *b, void **out);
void halo__buffer_free(halo__buffer *b);

static inline halo_status halo__buffer_reserve(halo__buffer *b, int64_t extra) {
  return b->capacity - b->bytes >= extra ? HALO_OK : halo__buffer_grow(b, extra);
}
static inline halo_status halo__buffer_append(halo__buffer *b, const void *data, int64_t bytes) {
  HALO_TRY(halo__buffer_reserve(b, bytes));
  if (bytes > 0) memcpy((char *)b->data + b->bytes, data, (size_t)bytes);
  b->bytes += bytes;
  return HALO_OK;
}

#endif
