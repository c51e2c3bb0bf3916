/* elementwise.h: numbers for the formulas of elementwise.def. */
#ifndef HALO_ELEMENTWISE_H
#define HALO_ELEMENTWISE_H

typedef enum halo_unary {
#define HALO_UNARY(name, dtypes, saves, y, dx) HALO_UNARY_##name,
#include "elementwise.def"
  HALO_UNARY_COUNT
} halo_unary;

typedef enum halo_binary {
#define HALO_BINARY(name, dtypes, y, da, db) HALO_BINARY_##name,
#include "elementwise.def"
  HALO_BINARY_COUNT
} halo_binary;

typedef enum halo_compare {
#define HALO_COMPARE(name, y) HALO_COMPARE_##name,
#include "elementwise.def"
  HALO_COMPARE_COUNT
} halo_compare;

#endif
