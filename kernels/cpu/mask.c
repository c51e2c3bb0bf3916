/* mask: triangles of matrices, and dropout.
 *
 *   triangle  y[o,r,c] = x[o,r,c] where c <= r + diagonal (lower) or c >= r + diagonal (upper), else 0
 *   dropout   y_i = x_i / (1 - p) where u_i >= p, else 0; u_i from 32 bits of counter i of (seed, stream)
 *
 * Both are linear with a mask that can be made again, so they are their own gradients.
 * twin      kernels/cuda/mask.cu
 */
#include <string.h>

#include "kernels.h"
#include "philox.h"
#include "tile.h"

static int64_t clamp(int64_t v, int64_t lo, int64_t hi) { return v < lo ? lo : v > hi ? hi : v; }

halo_status halo_cpu_triangle(int64_t bytes, void *y, const void *x, int64_t outer, int64_t rows,
                              int64_t cols, int64_t diagonal, int32_t is_upper) {
#pragma omp parallel for schedule(static) if (outer * rows * cols >= PARALLEL_MIN)
  for (int64_t k = 0; k < outer * rows; k++) {
    const int64_t r = k % rows;
    const int64_t begin = is_upper ? clamp(r + diagonal, 0, cols) : 0;
    const int64_t end = is_upper ? cols : clamp(r + diagonal + 1, 0, cols);
    char *to = (char *)y + k * cols * bytes;
    const char *from = (const char *)x + k * cols * bytes;
    memset(to, 0, (size_t)(begin * bytes));
    memcpy(to + begin * bytes, from + begin * bytes, (size_t)((end - begin) * bytes));
    memset(to + end * bytes, 0, (size_t)((cols - end) * bytes));
  }
  return HALO_OK;
}

halo_status halo_cpu_dropout(halo_dtype t, void *y, const void *x, int64_t n, double p,
                             uint64_t seed, uint64_t stream) {
  const uint64_t threshold = (uint64_t)(p * 4294967296.0); // u >= p in 32-bit fixed point
  const double scale = p < 1 ? 1 / (1 - p) : 0;
#pragma omp parallel for schedule(static) if (n >= PARALLEL_MIN / 8)
  for (int64_t k = 0; k < tile_count(n); k++) {
    const int64_t first = k * TILE, m = tile_length(n, first);
    double factor[TILE];
    for (int64_t i = 0; i < m; i += 4) {
      uint32_t r[4];
      halo__philox(seed, stream, (uint64_t)(first + i) / 4, r);
      for (int64_t j = 0; j < 4; j++) factor[i + j] = r[j] >= threshold ? scale : 0;
    }
    tile in, out;
    const void *px = tile_load(&in, t, x, first, 1, m);
    void *py = tile_target(&out, t, y, first);
    if (t == HALO_F64) {
      for (int64_t i = 0; i < m; i++) ((double *)py)[i] = ((const double *)px)[i] * factor[i];
    } else {
      for (int64_t i = 0; i < m; i++) {
        ((float *)py)[i] = ((const float *)px)[i] * (float)factor[i];
      }
    }
    if (t == HALO_BF16) narrow(element_at(t, y, first), HALO_BF16, 1, &out, m);
  }
  return HALO_OK;
}
