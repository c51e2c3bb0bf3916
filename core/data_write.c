/* data_write.c: writes token files (data.h).
 *
 * The file grows beside its place under a temporary name, is synced and renamed when complete, and the
 * folder is synced after it: a reader sees the old file, the new file, or none, after a crash too. Two
 * processes that pack the same corpus at once do not disturb each other; the last rename wins and both
 * files are equal.
 *
 * Tokens are hashed as they pass, so nothing is read twice.
 */
#include "data.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

enum { BLOCK_BYTES = 1 << 18, SNIFF_BYTES = 8192 };

struct halo_token_writer {
  char *path, *temporary; /* one block of memory */
  int fd;                 /* -1: committed or failed */
  halo__token_file header;
  halo__buffer starts; /* int64_t: first token of each document */
  uint8_t *block;
  int64_t block_used;
  XXH3_state_t *tokens_hash;
};

static halo_status write_all(int fd, const void *data, size_t n, const char *path) {
  const char *at = data;
  while (n > 0) {
    const ssize_t wrote = write(fd, at, n);
    if (wrote < 0 && errno == EINTR) continue;
    HALO_CHECK(wrote > 0, HALO_EIO, "token_writer: cannot write %s: %s", path, strerror(errno));
    at += wrote;
    n -= (size_t)wrote;
  }
  return HALO_OK;
}

static halo_status open_temporary(halo_token_writer *w, const char *path) {
  static int32_t counter;
  const size_t n = strlen(path) + 1, room = n + 40;
  void *p;
  HALO_TRY(halo__data_alloc(&p, (int64_t)(n + room)));
  w->path = memcpy(p, path, n);
  w->temporary = w->path + n;
  snprintf(w->temporary, room, "%s.%ld-%d.tmp", path, (long)getpid(),
           __atomic_add_fetch(&counter, 1, __ATOMIC_RELAXED));
  w->fd = open(w->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0666);
  HALO_CHECK(w->fd >= 0, HALO_EIO, "token_writer: cannot create %s: %s", w->temporary, strerror(errno));
  return HALO_OK;
}

halo_status halo_token_writer_new(halo_token_writer **out, const char *path, int64_t vocab,
                                  uint64_t tokenizer_hash) {
  HALO_CHECK(out != NULL && path != NULL, HALO_EARG, "token_writer_new: NULL argument");
  HALO_CHECK(vocab > 0 && vocab <= INT32_MAX, HALO_EARG, "token_writer_new: a vocabulary of %lld",
             (long long)vocab);
  halo_status status = HALO_OK;
  void *p;
  HALO_TRY(halo__data_alloc(&p, sizeof(halo_token_writer)));
  halo_token_writer *w = p;
  *w = (halo_token_writer){.fd = -1};
  memcpy(w->header.magic, HALO__TOKEN_FILE_MAGIC, sizeof w->header.magic);
  w->header.version = HALO__TOKEN_FILE_VERSION;
  w->header.width = halo__token_width(vocab);
  w->header.vocab = vocab;
  w->header.tokenizer_hash = tokenizer_hash;
  HALO_TRY_GOTO(halo__data_alloc(&p, BLOCK_BYTES));
  w->block = p;
  w->tokens_hash = XXH3_createState();
  HALO_CHECK_GOTO(w->tokens_hash != NULL, HALO_ENOMEM, "token_writer_new: no memory for a hash");
  XXH3_64bits_reset(w->tokens_hash);
  HALO_TRY_GOTO(open_temporary(w, path));
  HALO_TRY_GOTO(write_all(w->fd, &w->header, sizeof w->header, w->temporary)); // room; rewritten last
  *out = w;
  return HALO_OK;
done:
  halo_token_writer_free(w);
  return status;
}

/* Give up the unfinished file. */
static void abandon(halo_token_writer *w) {
  if (w->fd < 0) return;
  close(w->fd);
  unlink(w->temporary);
  w->fd = -1;
}

void halo_token_writer_free(halo_token_writer *w) {
  if (w == NULL) return;
  abandon(w);
  XXH3_freeState(w->tokens_hash);
  halo__buffer_free(&w->starts);
  halo__free(w->block);
  halo__free(w->path);
  halo__free(w);
}

static halo_status flush(halo_token_writer *w) {
  XXH3_64bits_update(w->tokens_hash, w->block, (size_t)w->block_used);
  HALO_TRY(write_all(w->fd, w->block, (size_t)w->block_used, w->temporary));
  w->block_used = 0;
  return HALO_OK;
}

static halo_status put(halo_token_writer *w, const int32_t *ids, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    if (w->block_used == BLOCK_BYTES) HALO_TRY(flush(w));
    uint8_t *at = w->block + w->block_used;
    if (w->header.width == 2) memcpy(at, &(uint16_t){(uint16_t)ids[i]}, 2);
    else memcpy(at, &ids[i], 4);
    w->block_used += w->header.width;
  }
  w->header.n_tokens += n;
  return HALO_OK;
}

static halo_status check_ids(const halo_token_writer *w, const int32_t *ids, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    HALO_CHECK(ids[i] >= 0 && ids[i] < w->header.vocab, HALO_EARG,
               "token_writer: id %d at index %lld, the vocabulary has %lld", ids[i], (long long)i,
               (long long)w->header.vocab);
  }
  return HALO_OK;
}

static halo_status add_document(halo_token_writer *w, int32_t first, const int32_t *ids, int64_t n,
                                int32_t last) {
  HALO_CHECK(w->fd >= 0, HALO_ESTATE, "token_writer: it is committed, or an earlier call failed");
  HALO_TRY(check_ids(w, ids, n));
  if (first >= 0) HALO_TRY(check_ids(w, &first, 1));
  if (last >= 0) HALO_TRY(check_ids(w, &last, 1));
  if (n == 0) return HALO_OK;
  HALO_TRY(halo__buffer_append(&w->starts, &w->header.n_tokens, 8));
  halo_status status = first >= 0 ? put(w, &first, 1) : HALO_OK;
  if (status == HALO_OK) status = put(w, ids, n);
  if (status == HALO_OK && last >= 0) status = put(w, &last, 1);
  if (status != HALO_OK) {
    abandon(w); // part of a document is in the file
    return status;
  }
  w->header.n_documents++;
  return HALO_OK;
}

halo_status halo_token_writer_add(halo_token_writer *w, const int32_t *ids, int64_t n) {
  HALO_CHECK(w != NULL && n >= 0 && (ids != NULL || n == 0), HALO_EARG,
             "token_writer_add: NULL argument or a negative length");
  return add_document(w, -1, ids, n, -1);
}

halo_status halo_token_writer_add_text(halo_token_writer *w, const halo_tokenizer *t,
                                       const char *text, size_t n, int32_t first, int32_t last) {
  HALO_CHECK(w != NULL && t != NULL && (text != NULL || n == 0), HALO_EARG,
             "token_writer_add_text: NULL argument");
  HALO_CHECK(halo_tokenizer_hash(t) == w->header.tokenizer_hash, HALO_EARG,
             "token_writer_add_text: the file was begun for another tokenizer");
  int32_t *ids;
  int64_t count;
  HALO_TRY(halo_tokenizer_encode(&ids, &count, t, text, n, 0));
  const halo_status status = add_document(w, first, ids, count, last);
  halo_buffer_free(ids);
  return status;
}

halo_status halo_token_writer_add_file(halo_token_writer *w, const halo_tokenizer *t,
                                       const char *path, int32_t first, int32_t last,
                                       int32_t *is_text_out) {
  HALO_CHECK(w != NULL && t != NULL && path != NULL && is_text_out != NULL, HALO_EARG,
             "token_writer_add_file: NULL argument");
  halo_status status = HALO_OK;
  struct stat info;
  void *text = MAP_FAILED;
  size_t n = 0;
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  HALO_CHECK(fd >= 0, HALO_EIO, "token_writer: cannot open %s: %s", path, strerror(errno));
  HALO_CHECK_GOTO(fstat(fd, &info) == 0 && S_ISREG(info.st_mode), HALO_EIO,
                  "token_writer: %s is not a regular file", path);
  n = (size_t)info.st_size;
  if (n > 0) {
    text = mmap(NULL, n, PROT_READ, MAP_PRIVATE, fd, 0);
    HALO_CHECK_GOTO(text != MAP_FAILED, HALO_EIO, "token_writer: cannot map %s: %s", path,
                    strerror(errno));
    *is_text_out = memchr(text, 0, n < SNIFF_BYTES ? n : SNIFF_BYTES) == NULL;
    if (*is_text_out) HALO_TRY_GOTO(halo_token_writer_add_text(w, t, text, n, first, last));
  } else {
    *is_text_out = 1;
  }
done:
  if (text != MAP_FAILED) munmap(text, n);
  close(fd);
  return status;
}

int64_t halo_token_writer_count(const halo_token_writer *w) { return w->header.n_tokens; }
int64_t halo_token_writer_documents(const halo_token_writer *w) { return w->header.n_documents; }

static halo_status finish_file(halo_token_writer *w) {
  static const uint8_t zeros[8];
  halo__token_file *h = &w->header;
  HALO_TRY(flush(w));
  const int64_t bytes = h->n_tokens * (int64_t)h->width;
  HALO_TRY(write_all(w->fd, zeros, (size_t)(-bytes & 7), w->temporary));
  HALO_TRY(halo__buffer_append(&w->starts, &h->n_tokens, 8));
  HALO_TRY(write_all(w->fd, w->starts.data, (size_t)w->starts.bytes, w->temporary));
  h->tokens_hash = XXH3_64bits_digest(w->tokens_hash);
  h->documents_hash = XXH3_64bits(w->starts.data, (size_t)w->starts.bytes);
  h->header_hash = XXH3_64bits(h, offsetof(halo__token_file, header_hash));
  HALO_CHECK(lseek(w->fd, 0, SEEK_SET) == 0, HALO_EIO, "token_writer: cannot seek in %s: %s",
             w->temporary, strerror(errno));
  HALO_TRY(write_all(w->fd, h, sizeof *h, w->temporary));
  HALO_CHECK(fsync(w->fd) == 0, HALO_EIO, "token_writer: cannot sync %s: %s", w->temporary,
             strerror(errno));
  return HALO_OK;
}

static halo_status sync_folder(halo_token_writer *w) {
  char *slash = strrchr(w->path, '/');
  if (slash != NULL) *slash = 0;
  const int fd = open(slash == NULL ? "." : slash == w->path ? "/" : w->path, O_RDONLY | O_CLOEXEC);
  const bool synced = fd >= 0 && fsync(fd) == 0;
  const int code = errno;
  if (fd >= 0) close(fd);
  if (slash != NULL) *slash = '/';
  HALO_CHECK(synced, HALO_EIO, "token_writer: cannot sync the folder of %s: %s", w->path,
             strerror(code));
  return HALO_OK;
}

halo_status halo_token_writer_commit(halo_token_writer *w) {
  HALO_CHECK(w != NULL, HALO_EARG, "token_writer_commit: NULL argument");
  HALO_CHECK(w->fd >= 0, HALO_ESTATE, "token_writer: it is committed, or an earlier call failed");
  halo_status status = finish_file(w);
  if (status == HALO_OK && rename(w->temporary, w->path) != 0)
    status = halo__error(HALO_EIO, "token_writer: cannot move %s to its place: %s", w->temporary,
                         strerror(errno));
  if (status != HALO_OK) {
    abandon(w);
    return status;
  }
  close(w->fd);
  w->fd = -1;
  return sync_folder(w);
}
