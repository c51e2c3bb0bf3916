/* safetensors.h: what the reader, the writer and the checkpoints share about the file format. */
#ifndef HALO_SAFETENSORS_H
#define HALO_SAFETENSORS_H

#include "internal.h"

enum { HALO__FILE_DTYPES = 22 };

/* An element type of the format. `kind`: 'f' and 'i' convert to Halo's dtypes, 0 is only known by its
 * size. */
typedef struct halo__file_dtype {
  const char *code;
  int32_t bits;
  int32_t halo; /* the halo_dtype with the same bytes, or -1 */
  char kind;
} halo__file_dtype;
extern const halo__file_dtype halo__file_dtypes[HALO__FILE_DTYPES];
int32_t halo__file_dtype_find(const char *code, size_t length); /* -1 if unknown */
int32_t halo__file_dtype_of(int32_t halo_dtype);

/* Text from outside, shortened and without control characters; one of four buffers of the thread. */
const char *halo__printable(const char *text, size_t length);

typedef struct halo__tensor_entry {
  const char *name; /* in the header, NUL behind it */
  uint32_t name_length;
  int32_t dtype, ndim, file;
  int64_t begin, end; /* bytes from the start of the data */
  int64_t count;
  int64_t shape[HALO_MAX_DIMS];
} halo__tensor_entry;

typedef struct halo__metadata_pair {
  const char *key, *value;
  size_t key_length, value_length;
} halo__metadata_pair;

/* One file's header, understood. Entries and metadata are sorted by name. */
typedef struct halo__safetensors_table {
  char *header;
  halo__tensor_entry *entries;
  halo__metadata_pair *metadata;
  int64_t n, n_metadata;
  int64_t data_offset;
} halo__safetensors_table;

/* Understand a header in memory; the table takes `header` (from halo__scratch, one byte longer than
 * header_bytes), also on failure. */
halo_status halo__safetensors_parse(halo__safetensors_table *out, const char *path, char *header,
                                    int64_t header_bytes, int64_t data_bytes);
halo_status halo__safetensors_read_file(halo__safetensors_table *out, halo__input *identity_out,
                                        const char *path, bool follow_links);
void halo__safetensors_table_free(halo__safetensors_table *t);

/* model.safetensors.index.json: which shard holds which tensor; names sorted. */
typedef struct halo__index_name {
  const char *name; /* in the text */
  size_t length;
  int32_t shard;
} halo__index_name;

typedef struct halo__safetensors_index {
  char *text;
  halo__index_name *names;
  int64_t n;
  char **shards; /* plain file names, in the text */
  int32_t n_shards;
} halo__safetensors_index;

/* Takes `text` (one byte longer than `bytes`), also on failure. */
halo_status halo__safetensors_index_parse(halo__safetensors_index *out, const char *path, char *text,
                                          int64_t bytes);
void halo__safetensors_index_free(halo__safetensors_index *x);

/* Files that a save made, in order of writing. */
typedef struct halo__written_file {
  char name[64];
  halo__digest digest;
} halo__written_file;
typedef struct halo__written {
  halo__written_file *file;
  int32_t n;
} halo__written;
void halo__written_free(halo__written *out);
/* <stem>.safetensors, or shards and index, into an existing folder. */
halo_status halo__safetensors_write(halo__written *out, halo_safetensors_writer *w, const char *who,
                                    const char *folder, const char *stem, int64_t max_shard_bytes,
                                    bool wants_digest);
/* About the bytes the files will have, from above. */
int64_t halo__safetensors_writer_bytes(const halo_safetensors_writer *w);

#endif
