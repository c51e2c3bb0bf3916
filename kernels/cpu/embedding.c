/* embedding: rows of a table by token id.
 *
 *   y_i = w[id_i]              dw[id_i] += dy_i
 *
 * shapes    w, dw [V,E]; ids [n]; y, dy [n,E]; all contiguous
 * gradient  dw is added to (+=), in dw's own dtype (fp32 for a bf16 table)
 * order     tokens in order for every element of dw, since threads share out columns, never tokens:
 *           equal bits for any number of threads, without atomics
 * errors    an id outside [0,V) is found before anything is written; the gradient leaves it out
 * twin      kernels/cuda/embedding.cu
 */
#define HALO_EACH_REAL_FILE "cpu/embedding.c"
#ifndef HALO_REAL_PASS
#include "internal.h"

/* Columns a thread takes at a time in the gradient: one cache line of fp32 four times over. */
enum { COLUMNS = 64 };

static int64_t id_at(halo_dtype ti, const void *ids, int64_t i) {
  return ti == HALO_I64 ? ((const int64_t *)ids)[i] : ((const int32_t *)ids)[i];
}

#include "cpu/each_real.h"

halo_status halo_cpu_embedding_fwd(halo_dtype t, void *y, const void *w, halo_dtype ti,
                                   const void *ids, int64_t n, int64_t vocab, int64_t cols) {
  for (int64_t i = 0; i < n; i++) {
    const int64_t id = id_at(ti, ids, i);
    HALO_CHECK(id >= 0 && id < vocab, HALO_EARG,
               "embedding: id %lld at position %lld is outside the vocabulary of %lld",
               (long long)id, (long long)i, (long long)vocab);
  }
  const int64_t bytes = cols * halo_dtype_bytes(t);
#pragma omp parallel for schedule(static) if (n * cols > 1 << 15)
  for (int64_t i = 0; i < n; i++) {
    memcpy((char *)y + i * bytes, (const char *)w + id_at(ti, ids, i) * bytes, (size_t)bytes);
  }
  return HALO_OK;
}

halo_status halo_cpu_embedding_bwd(halo_dtype tw, void *dw, halo_dtype t, const void *dy,
                                   halo_dtype ti, const void *ids, int64_t n, int64_t vocab,
                                   int64_t cols) {
  HALO_REAL_SWITCH(t, embedding_bwd, (tw, dw, dy, ti, ids, n, vocab, cols));
}

#else

static halo_status REAL(embedding_bwd)(halo_dtype tw, void *dw, const real *restrict dy,
                                       halo_dtype ti, const void *ids, int64_t n, int64_t vocab,
                                       int64_t cols) {
  const bool is_wide = tw == (sizeof(acc) == 8 ? HALO_F64 : HALO_F32);
#pragma omp parallel for schedule(static) if (n * cols > 1 << 15)
  for (int64_t c0 = 0; c0 < cols; c0 += COLUMNS) {
    const int64_t c1 = c0 + COLUMNS < cols ? c0 + COLUMNS : cols;
    for (int64_t i = 0; i < n; i++) {
      const int64_t id = id_at(ti, ids, i), row = id * cols;
      if (id < 0 || id >= vocab) continue;
      if (is_wide) {
        acc *restrict target = (acc *)dw + row;
        for (int64_t c = c0; c < c1; c++) target[c] += LOAD(dy[i * cols + c]);
      } else {
        real *restrict target = (real *)dw + row;
        for (int64_t c = c0; c < c1; c++) {
          target[c] = STORE(LOAD(target[c]) + LOAD(dy[i * cols + c]));
        }
      }
    }
  }
  return HALO_OK;
}

#endif
