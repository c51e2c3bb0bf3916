/* shadow.h: what the generated twins of a shadow build use; see memory.c here. */
#ifndef HALO_SHADOW_H
#define HALO_SHADOW_H

#include "internal.h"
#include "kernels.h"

/* Let the host at the arena, and shut it again. Calls nest and may come from several threads. */
void halo__shadow_open(void);
void halo__shadow_close(void);
/* The argument must be (must not be) in the arena; NULL is fine. */
halo_status halo__shadow_device(const char *kernel, const char *argument, const void *p);
halo_status halo__shadow_host(const char *kernel, const char *argument, const void *p);
/* What a kernel says of bad input is kept until somebody synchronises; other failures pass. */
halo_status halo__shadow_done(const char *kernel, halo_status status);

/* Arguments that are structs: the pointers in them. */
halo_status halo__shadow_halo_gemm(const char *kernel, const halo_gemm *g);
halo_status halo__shadow_halo_adamw_step_args(const char *kernel, const halo_adamw_step_args *s);
halo_status halo__shadow_halo_attention_queries(const char *kernel, const halo_attention_queries *a);
halo_status halo__shadow_halo_attention_tiles(const char *kernel, const halo_attention_tiles *keys);
halo_status halo__shadow_halo_attention_columns(const char *kernel, const halo_attention_columns *keys);
halo_status halo__shadow_halo_probe(const char *kernel, const halo_probe *p);

#endif
