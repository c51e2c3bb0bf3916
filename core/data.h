/* data.h: the token file, shared by its reader (data.c) and its writer (data_write.c).
 *
 *     0  magic "HALOTOKS"          8  version = 1          12  bytes per token, 2 or 4
 *    16  tokens                   24  documents            32  vocabulary size
 *    40  tokenizer hash           48  hash of the tokens   56  hash of the table of documents
 *    64  zeros                   120  hash of bytes 0 to 119
 *   128  tokens, then zeros up to a multiple of 8
 *     .  documents + 1 numbers: first token of each document, and the number of tokens
 *
 * Little-endian throughout; hashes are XXH3, 64 bits. A file is exactly as long as the header says. No
 * document is empty. Tokens are 2 bytes wide when the vocabulary allows it.
 */
#ifndef HALO_DATA_H
#define HALO_DATA_H

#include "buffer.h"

enum { HALO__TOKEN_FILE_VERSION = 1 };

#define HALO__TOKEN_FILE_MAGIC "HALOTOKS"

typedef struct halo__token_file {
  char magic[8];
  uint32_t version;
  uint32_t width;
  int64_t n_tokens;
  int64_t n_documents;
  int64_t vocab;
  uint64_t tokenizer_hash;
  uint64_t tokens_hash;
  uint64_t documents_hash;
  uint8_t zeros[56];
  uint64_t header_hash;
} halo__token_file;

_Static_assert(sizeof(halo__token_file) == 128, "the header has no holes");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "token files are read in place");

static inline uint32_t halo__token_width(int64_t vocab) { return vocab <= 65536 ? 2 : 4; }

#endif
