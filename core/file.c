/* file.c: files that may be hostile, and files that must not be lost.
 *
 * Reading. What is opened here may come from a stranger: it must be a regular file (a FIFO would
 * block, /dev/zero would never end), links are not followed unless asked, reads go through pread into
 * our own memory (a mapped file that shrinks is a SIGBUS), and a reader that opens a file again can
 * tell whether it is still the same one.
 *
 * Writing. A sink takes bytes, cuts them into chunks of 4 MiB, hashes each chunk (XXH3) and the whole
 * file (SHA-256) on the way, writes, asks for fsync, drops the page cache, reads everything back and
 * compares. A file that came out of halo__sink_close was therefore on the device once, whole. A failed
 * fsync is final: the kernel may already have marked the lost pages clean, so asking again proves
 * nothing (PostgreSQL's "fsyncgate", 2018).
 *
 * Every call that changes the file system goes through a `sys_` function below, and those ask
 * halo__file_hook first. Tests use it to fail, shorten, interrupt or end the world at the n-th call;
 * without a hook it costs one comparison.
 */
#include "internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

int (*halo__file_hook)(halo__file_call call, const char *path, const char *to);

/* ---- system calls, hooked ------------------------------------------------------------------- */

/* 0: go on. Otherwise errno is set, or *cap is lowered for a short write. */
static int ask(halo__file_call call, const char *path, const char *to, size_t *cap) {
  if (halo__file_hook == NULL) return 0;
  const int answer = halo__file_hook(call, path, to);
  if (answer < 0) {
    if (cap != NULL && *cap > (size_t)-answer) *cap = (size_t)-answer;
    return 0;
  }
  errno = answer;
  return answer;
}

static int sys_create(const char *path) {
  if (ask(HALO__FILE_CREATE, path, NULL, NULL) != 0) return -1;
  return open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0666);
}

static ssize_t sys_write(int fd, const char *path, const void *data, size_t n) {
  if (ask(HALO__FILE_WRITE, path, NULL, &n) != 0) return -1;
  return write(fd, data, n);
}

static int sys_allocate(int fd, const char *path, int64_t bytes) {
  if (ask(HALO__FILE_ALLOCATE, path, NULL, NULL) != 0) return -1;
  return fallocate(fd, 0, 0, bytes);
}

static int sys_sync(int fd, const char *path) {
  if (ask(HALO__FILE_SYNC, path, NULL, NULL) != 0) return -1;
  return fsync(fd);
}

static int sys_remove(const char *path, bool is_folder) {
  if (ask(HALO__FILE_REMOVE, path, NULL, NULL) != 0) return -1;
  return is_folder ? rmdir(path) : unlink(path);
}

halo_status halo__file_mkdir(const char *who, const char *path) {
  const int done = ask(HALO__FILE_MKDIR, path, NULL, NULL) != 0 ? -1 : mkdir(path, 0777);
  if (done != 0 && errno == EEXIST) {
    struct stat s;
    HALO_CHECK(lstat(path, &s) == 0 && S_ISDIR(s.st_mode), HALO_EIO,
               "%s: %s is in the way: not a folder", who, path);
    return HALO_OK;
  }
  HALO_CHECK(done == 0, HALO_EIO, "%s: cannot make the folder %s: %s", who, path, strerror(errno));
  return HALO_OK;
}

halo_status halo__file_rename(const char *who, const char *from, const char *to) {
  const int done = ask(HALO__FILE_RENAME, from, to, NULL) != 0 ? -1 : rename(from, to);
  HALO_CHECK(done == 0, HALO_EIO, "%s: cannot rename %s to %s: %s", who, from, to, strerror(errno));
  return HALO_OK;
}

halo_status halo__file_exchange(const char *who, const char *a, const char *b) {
  const int done = ask(HALO__FILE_EXCHANGE, a, b, NULL) != 0
                       ? -1
                       : renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE);
  HALO_CHECK(done == 0, HALO_EIO, "%s: cannot exchange %s and %s: %s", who, a, b, strerror(errno));
  return HALO_OK;
}

halo_status halo__file_sync_folder(const char *who, const char *path) {
  const int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  HALO_CHECK(fd >= 0, HALO_EIO, "%s: cannot open the folder %s: %s", who, path, strerror(errno));
  int done = sys_sync(fd, path);
  if (done != 0 && errno == EINVAL) done = 0; // file systems without it (some network ones) say so
  const int code = errno;
  close(fd);
  HALO_CHECK(done == 0, HALO_EIO, "%s: cannot sync the folder %s: %s", who, path, strerror(code));
  return HALO_OK;
}

void halo__file_parent(char *out, size_t capacity, const char *path) {
  const char *slash = strrchr(path, '/');
  if (slash == NULL) {
    snprintf(out, capacity, ".");
  } else {
    snprintf(out, capacity, "%.*s", slash == path ? 1 : (int)(slash - path), path);
  }
}

halo_status halo__file_remove_tree(const char *who, const char *path, int32_t max_depth) {
  if (sys_remove(path, false) == 0 || errno == ENOENT) return HALO_OK;
  // A link was removed above, not followed; what is left is a folder, or not ours to delete.
  HALO_CHECK(max_depth > 0 && (errno == EISDIR || errno == EPERM), HALO_EIO,
             "%s: cannot delete %s: %s", who, path, strerror(errno));
  halo__names names = {0};
  halo_status status = HALO_OK;
  HALO_TRY_GOTO(halo__file_list(&names, who, path));
  for (int32_t i = 0; i < names.n; i++) {
    char inner[HALO__PATH];
    HALO_TRY_GOTO(halo__file_join(inner, who, path, names.name[i]));
    HALO_TRY_GOTO(halo__file_remove_tree(who, inner, max_depth - 1));
  }
  HALO_CHECK_GOTO(sys_remove(path, true) == 0, HALO_EIO, "%s: cannot delete %s: %s", who, path,
                  strerror(errno));
done:
  halo__names_free(&names);
  return status;
}

/* ---- names ---------------------------------------------------------------------------------- */

halo_status halo__file_join(char out[HALO__PATH], const char *who, const char *folder,
                            const char *name) {
  const int n = snprintf(out, HALO__PATH, "%s/%s", folder, name);
  HALO_CHECK(n > 0 && n < HALO__PATH, HALO_EARG, "%s: the path %.60s.../%.60s is longer than %d bytes",
             who, folder, name, HALO__PATH - 1);
  return HALO_OK;
}

bool halo__file_is_plain_name(const char *name, size_t length) {
  if (length < 1 || length > 255 || name[0] == '.') return false;
  for (size_t i = 0; i < length; i++) {
    const char c = name[i];
    const bool fine = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                      c == '.' || c == '_' || c == '-';
    if (!fine) return false;
  }
  return true;
}

static int by_bytes(const void *a, const void *b) {
  return strcmp(*(char *const *)a, *(char *const *)b);
}

halo_status halo__file_list(halo__names *out, const char *who, const char *folder) {
  *out = (halo__names){0};
  DIR *dir = opendir(folder);
  HALO_CHECK(dir != NULL, HALO_EIO, "%s: cannot list %s: %s", who, folder, strerror(errno));
  halo_status status = HALO_OK;
  int32_t capacity = 0;
  for (struct dirent *entry = readdir(dir); entry != NULL; entry = readdir(dir)) {
    if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
    if (out->n == capacity) {
      capacity = capacity == 0 ? 16 : 2 * capacity;
      char **more = realloc(out->name, (size_t)capacity * sizeof *more);
      HALO_CHECK_GOTO(more != NULL, HALO_ENOMEM, "%s: no memory for the names in %s", who, folder);
      out->name = more;
    }
    out->name[out->n] = strdup(entry->d_name);
    HALO_CHECK_GOTO(out->name[out->n] != NULL, HALO_ENOMEM, "%s: no memory for the names in %s", who,
                    folder);
    out->n++;
  }
  if (out->n > 0) qsort(out->name, (size_t)out->n, sizeof *out->name, by_bytes);
done:
  closedir(dir);
  if (status != HALO_OK) halo__names_free(out);
  return status;
}

void halo__names_free(halo__names *names) {
  for (int32_t i = 0; i < names->n; i++) free(names->name[i]);
  free(names->name);
  *names = (halo__names){0};
}

/* ---- reading -------------------------------------------------------------------------------- */

halo_status halo__input_open(halo__input *out, const char *who, const char *path, bool follow_links) {
  // O_NONBLOCK: opening a FIFO without a writer must not wait; it means nothing for regular files.
  const int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | (follow_links ? 0 : O_NOFOLLOW);
  const int fd = open(path, flags);
  if (fd < 0) {
    HALO_CHECK(errno != ELOOP, HALO_EARG, "%s: %s is a symbolic link%s", who, path,
               follow_links ? " that leads nowhere"
                            : "; links are not followed here: copy the folder with `cp -rL`, or allow them "
                              "(follow_links)");
    HALO_CHECK(errno != ENXIO, HALO_EARG, "%s: %s is not a regular file", who, path);
    return halo__error(HALO_EIO, "%s: cannot open %s: %s", who, path, strerror(errno));
  }
  struct stat s;
  const bool known = fstat(fd, &s) == 0;
  if (!known || !S_ISREG(s.st_mode)) {
    close(fd);
    HALO_CHECK(known, HALO_EIO, "%s: cannot look at %s", who, path);
    return halo__error(HALO_EARG, "%s: %s is %s, not a regular file", who, path,
                       S_ISDIR(s.st_mode) ? "a folder" : "a device, pipe or socket");
  }
  *out = (halo__input){.fd = fd,
                       .size = s.st_size,
                       .device = s.st_dev,
                       .inode = s.st_ino,
                       .mtime_ns = (int64_t)s.st_mtim.tv_sec * 1000000000 + s.st_mtim.tv_nsec};
  return HALO_OK;
}

void halo__input_close(halo__input *in) {
  if (in->fd >= 0) close(in->fd);
  in->fd = -1;
}

bool halo__input_same(const halo__input *a, const halo__input *b) {
  return a->size == b->size && a->device == b->device && a->inode == b->inode &&
         a->mtime_ns == b->mtime_ns;
}

halo_status halo__input_read(const halo__input *in, const char *who, const char *path, void *to,
                             int64_t n, int64_t offset) {
  char *at = to;
  while (n > 0) {
    const size_t want = n > (int64_t)1 << 30 ? (size_t)1 << 30 : (size_t)n; // one read's limit is 2 GiB
    const ssize_t got = pread(in->fd, at, want, offset);
    if (got < 0 && errno == EINTR) continue;
    HALO_CHECK(got >= 0, HALO_EIO, "%s: cannot read %s at byte %lld: %s", who, path,
               (long long)offset, strerror(errno));
    HALO_CHECK(got > 0, HALO_EIO, "%s: %s ends at byte %lld; it shrank while it was read", who, path,
               (long long)offset);
    at += got;
    n -= got;
    offset += got;
  }
  return HALO_OK;
}

halo_status halo__file_slurp(char **text_out, int64_t *bytes_out, const char *who, const char *path,
                             int64_t max_bytes, bool follow_links) {
  halo__input in = {.fd = -1};
  HALO_TRY(halo__input_open(&in, who, path, follow_links));
  halo_status status = HALO_OK;
  char *text = NULL;
  HALO_CHECK_GOTO(in.size <= max_bytes, HALO_ECORRUPT, "%s: %s has %lld bytes; at most %lld are allowed",
                  who, path, (long long)in.size, (long long)max_bytes);
  HALO_TRY_GOTO(halo__scratch((void **)&text, in.size + 1, 1));
  HALO_TRY_GOTO(halo__input_read(&in, who, path, text, in.size, 0));
  text[in.size] = 0;
  *text_out = text;
  *bytes_out = in.size;
  text = NULL;
done:
  halo__free(text);
  halo__input_close(&in);
  return status;
}

/* ---- writing -------------------------------------------------------------------------------- */

struct halo__sink {
  int fd;
  bool wants_digest;
  const char *who;
  char path[HALO__PATH];
  char *chunk; /* HALO__CHUNK bytes, or all that will come when that is less */
  int64_t fill, bytes, expected;
  int64_t n_chunks, capacity;
  uint64_t *chunks;
  halo__sha256 sha;
};

void halo__digest_free(halo__digest *d) {
  halo__free(d->chunks);
  *d = (halo__digest){0};
}

static int64_t chunk_bytes(int64_t bytes) { return bytes < HALO__CHUNK ? bytes + 1 : HALO__CHUNK; }

halo_status halo__sink_open(halo__sink **out, const char *who, const char *path,
                            int64_t expected_bytes, bool wants_digest) {
  halo_status status = HALO_OK;
  halo__sink *s = NULL;
  HALO_TRY(halo__alloc_zero((void **)&s, sizeof *s, HALO_CPU));
  s->fd = -1;
  s->who = who;
  s->wants_digest = wants_digest;
  s->expected = expected_bytes;
  HALO_CHECK_GOTO(strlen(path) < HALO__PATH, HALO_EARG, "%s: the path %.80s... is too long", who, path);
  snprintf(s->path, sizeof s->path, "%s", path);
  HALO_TRY_GOTO(halo__scratch((void **)&s->chunk, chunk_bytes(expected_bytes), 1));
  s->capacity = expected_bytes / HALO__CHUNK + 1;
  HALO_TRY_GOTO(halo__scratch((void **)&s->chunks, s->capacity, sizeof *s->chunks));
  halo__sha256_init(&s->sha, false);
  s->fd = sys_create(path);
  HALO_CHECK_GOTO(s->fd >= 0, HALO_EIO, "%s: cannot create %s: %s", who, path, strerror(errno));
  if (expected_bytes > 0 && sys_allocate(s->fd, path, expected_bytes) != 0) {
    // A full disk is told now, not at 95 %. File systems without fallocate just go on.
    HALO_CHECK_GOTO(errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL, HALO_EIO,
                    "%s: cannot reserve %.1f MiB for %s: %s", who,
                    (double)expected_bytes / 1048576.0, path, strerror(errno));
  }
  *out = s;
done:
  if (status != HALO_OK) halo__sink_abandon(s);
  return status;
}

void halo__sink_abandon(halo__sink *s) {
  if (s == NULL) return;
  if (s->fd >= 0) {
    close(s->fd);
    sys_remove(s->path, false);
  }
  halo__free(s->chunk);
  halo__free(s->chunks);
  halo__free(s);
}

static halo_status flush(halo__sink *s) {
  if (s->fill == 0) return HALO_OK;
  if (s->wants_digest) {
    s->chunks[s->n_chunks++] = XXH3_64bits(s->chunk, (size_t)s->fill);
    halo__sha256_add(&s->sha, s->chunk, (size_t)s->fill);
  }
  int64_t at = 0;
  while (at < s->fill) {
    const ssize_t n = sys_write(s->fd, s->path, s->chunk + at, (size_t)(s->fill - at));
    if (n < 0 && errno == EINTR) continue;
    HALO_CHECK(n > 0, HALO_EIO, "%s: cannot write %s at byte %lld: %s", s->who, s->path,
               (long long)(s->bytes + at), n == 0 ? "nothing was taken" : strerror(errno));
    at += n;
  }
  s->bytes += s->fill;
  s->fill = 0;
  return HALO_OK;
}

halo_status halo__sink_write(halo__sink *s, const void *data, int64_t n) {
  const char *from = data;
  HALO_CHECK(n <= s->expected - s->bytes - s->fill, HALO_ESTATE, "%s: %s: more than the %lld bytes announced",
             s->who, s->path, (long long)s->expected);
  while (n > 0) {
    const int64_t room = HALO__CHUNK - s->fill, take = n < room ? n : room;
    memcpy(s->chunk + s->fill, from, (size_t)take);
    s->fill += take;
    from += take;
    n -= take;
    if (s->fill == HALO__CHUNK) HALO_TRY(flush(s));
  }
  return HALO_OK;
}

/* Read back what was written and compare chunk by chunk; `buffer` holds HALO__CHUNK bytes. */
static halo_status compare_chunks(const halo__input *in, const char *who, const char *path,
                                  const halo__digest *d, char *buffer, halo__sha256 *sha,
                                  int64_t *bad_out) {
  for (int64_t i = 0; i < d->n_chunks; i++) {
    const int64_t from = i * HALO__CHUNK;
    if (bad_out != NULL) *bad_out = from;
    const int64_t n = d->bytes - from < HALO__CHUNK ? d->bytes - from : HALO__CHUNK;
    HALO_TRY(halo__input_read(in, who, path, buffer, n, from));
    HALO_CHECK(XXH3_64bits(buffer, (size_t)n) == d->chunks[i], HALO_ECORRUPT,
               "%s: %s: bytes %lld to %lld are not what was written", who, path, (long long)from,
               (long long)(from + n - 1));
    if (sha != NULL) halo__sha256_add(sha, buffer, (size_t)n);
  }
  if (bad_out != NULL) *bad_out = -1;
  return HALO_OK;
}

halo_status halo__sink_close(halo__sink *s, halo__digest *digest_out) {
  halo_status status = HALO_OK;
  halo__digest d = {0};
  HALO_TRY_GOTO(flush(s));
  HALO_CHECK_GOTO(s->bytes == s->expected, HALO_ESTATE, "%s: %s: %lld bytes of the %lld announced", s->who,
                  s->path, (long long)s->bytes, (long long)s->expected);
  HALO_CHECK_GOTO(sys_sync(s->fd, s->path) == 0, HALO_EIO, "%s: cannot sync %s: %s", s->who, s->path,
                  strerror(errno));
  struct stat now;
  HALO_CHECK_GOTO(fstat(s->fd, &now) == 0 && now.st_size == s->bytes, HALO_EIO,
                  "%s: %s has %lld bytes after %lld were written", s->who, s->path,
                  (long long)now.st_size, (long long)s->bytes);
  if (s->wants_digest) {
    d = (halo__digest){.bytes = s->bytes, .n_chunks = s->n_chunks, .chunks = s->chunks};
    halo__sha256_end(&s->sha, d.sha256);
    // Without its cached pages the next read comes from the device (as far as the system lets us).
    posix_fadvise(s->fd, 0, 0, POSIX_FADV_DONTNEED);
    const halo__input in = {.fd = s->fd};
    HALO_TRY_GOTO(compare_chunks(&in, s->who, s->path, &d, s->chunk, NULL, NULL));
  }
  close(s->fd);
  s->fd = -1;
  if (digest_out != NULL) {
    *digest_out = d;
    s->chunks = NULL;
  }
done:
  halo__sink_abandon(s);
  return status;
}

halo_status halo__file_write(const char *who, const char *path, const void *data, int64_t bytes,
                             halo__digest *digest_out) {
  halo__sink *sink = NULL;
  HALO_TRY(halo__sink_open(&sink, who, path, bytes, digest_out != NULL));
  const halo_status status = halo__sink_write(sink, data, bytes);
  if (status != HALO_OK) {
    halo__sink_abandon(sink);
    return status;
  }
  return halo__sink_close(sink, digest_out);
}

halo_status halo__file_verify(int64_t *bad_out, const char *who, const char *path, const halo__digest *d,
                              bool deep) {
  halo__input in = {.fd = -1};
  *bad_out = -1;
  HALO_TRY(halo__input_open(&in, who, path, false));
  halo_status status = HALO_OK;
  char *buffer = NULL;
  halo__sha256 sha;
  halo__sha256_init(&sha, false);
  HALO_CHECK_GOTO(in.size == d->bytes, HALO_ECORRUPT, "%s: %s has %lld bytes, not %lld", who, path,
                  (long long)in.size, (long long)d->bytes);
  HALO_TRY_GOTO(halo__scratch((void **)&buffer, chunk_bytes(d->bytes), 1));
  HALO_TRY_GOTO(compare_chunks(&in, who, path, d, buffer, deep ? &sha : NULL, bad_out));
  if (deep) {
    char hex[65];
    halo__sha256_end(&sha, hex);
    HALO_CHECK_GOTO(strcmp(hex, d->sha256) == 0, HALO_ECORRUPT,
                    "%s: %s has the SHA-256 %s, not %s", who, path, hex, d->sha256);
  }
done:
  halo__free(buffer);
  halo__input_close(&in);
  return status;
}
