/* checkpoint.h: what manifest.c, checkpoint.c and checkpoint_load.c share. */
#ifndef HALO_CHECKPOINT_H
#define HALO_CHECKPOINT_H

#include "internal.h"
#include "safetensors.h"

/* ---- manifest.c ----------------------------------------------------------------------------- */

enum { HALO__MANIFEST_VERSION = 1, HALO__MANIFEST_BYTES = 256 << 20 };

typedef struct halo__manifest_file {
  char *name; /* "config.json", "optim/rank-00000-of-00004.safetensors"; owned */
  halo__digest digest;
} halo__manifest_file;

typedef struct halo__manifest {
  int64_t step;
  int32_t world;                     /* processes that wrote it */
  char *state;                       /* JSON value of the caller; owned */
  halo__manifest_file *file;         /* sorted by name when parsed */
  int32_t n, capacity;
} halo__manifest;

void halo__manifest_free(halo__manifest *m);
/* Takes the digest's chunks on success. */
halo_status halo__manifest_add(halo__manifest *m, const char *name, halo__digest *digest);
/* Text of a sealed manifest; state NULL: a part, as each rank leaves for rank 0. */
halo_status halo__manifest_write(halo__text *out, const halo__manifest *m);
/* Check the seal, then understand the text (which is overwritten). `what` names it in messages. */
halo_status halo__manifest_parse(halo__manifest *out, const char *what, char *text, int64_t bytes);
/* The second half alone, for a text whose seal is known to be right (fuzzing goes in here). */
halo_status halo__manifest_parse_unsealed(halo__manifest *out, const char *what, char *text,
                                          int64_t bytes);
halo_status halo__manifest_read(halo__manifest *out, const char *who, const char *path);

/* ---- checkpoint.c --------------------------------------------------------------------------- */

#define HALO__MANIFEST_NAME "manifest.json"

/* Folder of a step inside the checkpoint folder; the name sorts by step. */
halo_status halo__checkpoint_folder(char out[HALO__PATH], const char *who, const char *dir, int64_t step);
/* Steps of all folders that look like checkpoints, newest first; halo__free(*steps). */
halo_status halo__checkpoint_steps(int64_t **steps_out, int32_t *n_out, const char *who, const char *dir);

/* The phases of a save for process `rank` of `world`, without communication; the public functions
 * put agreement between them. Every rank: start (rank 0 first), put, finish; then rank 0: publish. */
halo_status halo__checkpoint_start(halo_checkpoint_writer **out, const char *dir, int64_t step,
                                   int32_t rank, int32_t world, uint64_t attempt, int64_t total_bytes);
halo_status halo__checkpoint_finish(halo_checkpoint_writer *w);
halo_status halo__checkpoint_publish(halo_checkpoint_writer *w, const char *state_json);

/* ---- checkpoint_load.c ---------------------------------------------------------------------- */

/* Open one folder; checks the content of files i with i % parts == part, of all: name and size. */
halo_status halo__checkpoint_open_part(halo_checkpoint **out, const char *path, int32_t part,
                                       int32_t parts, int32_t level);
/* Manifest, names and sizes only. */
halo_status halo__checkpoint_glance(halo__manifest *out, const char *who, const char *path);

/* Make statuses agree over the processes of c (NULL: alone): every rank returns the status of the
 * lowest rank that failed, with its message. */
halo_status halo__agree(halo_comm *c, halo_status mine);

#endif
