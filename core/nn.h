/* nn.h: what nn.c and nn_loss.c share: tensors seen as matrices, and where gradients go. */
#ifndef HALO_NN_H
#define HALO_NN_H

#include "internal.h"
#include "kernels.h"

/* A tensor [..., cols] seen as rows `ld` elements apart; `tensor` keeps the memory alive. */
typedef struct halo__matrix {
  halo_tensor *tensor;
  void *data;
  int64_t rows, cols, ld;
} halo__matrix;

/* View t as a matrix: t itself where the leading dims have one common stride, else a contiguous
 * copy. Free with halo__matrix_free. */
halo_status halo__matrix_of(halo__matrix *out, halo_tensor *t);
void halo__matrix_free(halo__matrix *m);

/* Where the gradient of input i of a call is to be added: the leaf's own buffer, when the tape has
 * one of the input's dtype or of its arithmetic dtype, else a new tensor of `dtype` that becomes
 * grad_in[i]. beta_out, if given, is 1 for the leaf's buffer and 0 for the new tensor, whose
 * contents are then undefined; without beta_out the new tensor is zero. Borrowed. */
halo_status halo__grad_target(halo__call *c, int32_t i, halo_dtype dtype, halo_tensor **out,
                              double *beta_out);

/* Give grad_in[i] the input's own dtype, where it was summed in a wider one. */
halo_status halo__narrow_grad(halo__call *c, int32_t i);

/* One product, counted in the trace. */
halo_status halo__gemm(halo_device device, const halo_gemm *g);

/* Rows and columns of a contiguous operand of a product. */
static inline halo_operand halo__operand(void *data, halo_dtype dtype, int64_t ld,
                                         bool is_transposed) {
  return (halo_operand){.data = data, .dtype = dtype, .ld = ld > 0 ? ld : 1,
                        .transposed = is_transposed};
}

#endif
