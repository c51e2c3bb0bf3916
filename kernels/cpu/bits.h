/* bits.h: elements of which only the size matters, for kernels that move them. May alias any dtype. */
#ifndef HALO_CPU_BITS_H
#define HALO_CPU_BITS_H

#include <stdint.h>

typedef uint8_t bits_8;
typedef uint16_t __attribute__((may_alias)) bits_16;
typedef uint32_t __attribute__((may_alias)) bits_32;
typedef uint64_t __attribute__((may_alias)) bits_64;

#endif
