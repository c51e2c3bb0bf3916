/* strides.h: walking several strided operands of one shape, row by row.
 *
 * A row is a run along the innermost dim. Core has already merged dims where it could, so rows are
 * as long as the layout allows; a stride of 0 repeats (broadcasting).
 */
#ifndef HALO_CPU_STRIDES_H
#define HALO_CPU_STRIDES_H

#include <stdint.h>

/* Number of rows, and their length. ndim 0 is one row of one element. */
static inline int64_t row_count(int32_t ndim, const int64_t *shape) {
  int64_t rows = 1;
  for (int32_t i = 0; i < ndim - 1; i++) rows *= shape[i];
  return rows;
}
static inline int64_t row_length(int32_t ndim, const int64_t *shape) {
  return ndim > 0 ? shape[ndim - 1] : 1;
}
static inline int64_t row_step(int32_t ndim, const int64_t *stride) {
  return ndim > 0 ? stride[ndim - 1] : 0;
}

/* Offset of row number `row` in an operand. */
static inline int64_t row_offset(int32_t ndim, const int64_t *shape, const int64_t *stride,
                                 int64_t row) {
  int64_t offset = 0;
  for (int32_t i = ndim - 2; i >= 0; i--) {
    offset += row % shape[i] * stride[i];
    row /= shape[i];
  }
  return offset;
}

#endif
