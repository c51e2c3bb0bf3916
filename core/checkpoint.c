/* checkpoint.c: saving a run so that it can be continued, or not at all.
 *
 *   DIR/step-00000400/            one folder is one checkpoint
 *     model-00001-of-00002.safetensors, ...  model.safetensors.index.json      weights, as Transformers
 *     config.json tokenizer.json ...         and whatever the caller adds      loads them
 *     optim/rank-00003-of-00004.safetensors  moments: "moment1/lm_head.weight@4096" is a run of
 *                                            elements of that parameter, from element 4096
 *     data.json rng.json recipe.resolved.json
 *     manifest.json                          names, sizes, hashes, state: see manifest.c
 *   DIR/LATEST                    a hint for people; loading looks for itself
 *   DIR/tmp-400-1f0c...           an attempt that is running, or was cut off
 *
 * What must never happen: a folder that looks whole and is not. So (reliability.md 1.1):
 *
 *   1  rank 0 clears the litter of an earlier attempt, asks for room, makes tmp-STEP-ATTEMPT
 *   2  every rank writes its files there: hash on the way, fsync, read back, compare (file.c), and
 *      leaves a sealed list of them (rank-R.part.json)
 *   3  the ranks agree; one failure and everybody drops the attempt, the run goes on without it
 *   4  rank 0 reads all lists, looks at every file, writes the manifest, fsyncs files and folders
 *   5  rename(tmp, step-N) and fsync(DIR): the commit. Before it nothing is there, after it all is
 *   6  LATEST, then pruning, which first renames a folder out of sight and only then empties it
 *
 * Saving is synchronous: nothing changes the tensors meanwhile, so they are not copied first.
 * A step that is there already is exchanged in one system call, so there is no moment without it.
 * Optimizer state is cut evenly over the ranks that write it and named by parameter and element, so
 * any number of ranks can read it back; the same state gives the same bytes.
 */
#include "checkpoint.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

static const char who[] = "checkpoint";

struct halo_checkpoint_writer {
  char dir[HALO__PATH], temporary[HALO__PATH];
  int64_t step;
  int32_t rank, world; /* processes that write */
  halo_comm *comm;     /* borrowed; NULL: alone */
  halo__manifest own;  /* files this rank wrote, later all of them */
  halo_safetensors_writer *pieces;
  halo_status failed; /* the first failure here; later calls do nothing */
  char message[512];
  bool is_committed;
};

/* ---- agreement ------------------------------------------------------------------------------ */

static int32_t processes(halo_comm *c) {
  return c == NULL ? 1 : halo_comm_size(c) / halo_comm_here(c);
}

static int32_t process_rank(halo_comm *c) {
  return c == NULL ? 0 : halo_comm_rank(c) / halo_comm_here(c);
}

halo_status halo__agree(halo_comm *c, halo_status mine) {
  enum { TEXT = 400 };
  typedef struct verdict {
    int64_t status;
    char text[TEXT];
  } verdict;
  const int32_t n = processes(c);
  if (n == 1) return mine;
  verdict own = {.status = mine}, *all = NULL;
  if (mine != HALO_OK) snprintf(own.text, TEXT, "%s", halo_error_message());
  HALO_TRY(halo__scratch((void **)&all, n, sizeof *all));
  void *out[1] = {all};
  const void *in[1] = {&own};
  halo_status status = halo_comm_all_gather(c, out, in, sizeof own);
  for (int32_t r = 0; r < n && status == HALO_OK; r++) {
    if (all[r].status == HALO_OK) continue;
    all[r].text[TEXT - 1] = 0;
    status = halo__error((halo_status)all[r].status, "%s (rank %d)", all[r].text, r);
  }
  halo__free(all);
  return status;
}

/* ---- names ---------------------------------------------------------------------------------- */

halo_status halo__checkpoint_folder(char out[HALO__PATH], const char *name_of, const char *dir,
                                    int64_t step) {
  char name[40];
  snprintf(name, sizeof name, "step-%08lld", (long long)step);
  return halo__file_join(out, name_of, dir, name);
}

/* The step of "step-00000400"; -1 for any other name, also for one this program would not write. */
static int64_t step_of(const char *name) {
  char again[40];
  if (strncmp(name, "step-", 5) != 0 || strlen(name) < 13 || strlen(name) > 24) return -1;
  for (const char *c = name + 5; *c; c++) {
    if (*c < '0' || *c > '9') return -1;
  }
  errno = 0;
  const long long step = strtoll(name + 5, NULL, 10);
  if (errno != 0) return -1;
  snprintf(again, sizeof again, "step-%08lld", step);
  return strcmp(again, name) == 0 ? step : -1;
}

/* "tmp-400-0123456789abcdef" or "trash-...": ours to delete. */
static bool is_litter(const char *name) {
  const size_t head = strncmp(name, "tmp-", 4) == 0 ? 4 : strncmp(name, "trash-", 6) == 0 ? 6 : 0;
  if (head == 0) return false;
  const size_t digits = strspn(name + head, "0123456789");
  const char *rest = name + head + digits;
  return digits > 0 && rest[0] == '-' && strspn(rest + 1, "0123456789abcdef") == 16 && rest[17] == 0;
}

static int newest_first(const void *a, const void *b) {
  const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x < y) - (x > y);
}

halo_status halo__checkpoint_steps(int64_t **steps_out, int32_t *n_out, const char *name_of,
                                   const char *dir) {
  halo__names names = {0};
  *steps_out = NULL;
  *n_out = 0;
  HALO_TRY(halo__file_list(&names, name_of, dir));
  int64_t *steps = NULL;
  int32_t n = 0;
  const halo_status status = halo__scratch((void **)&steps, names.n + 1, sizeof *steps);
  for (int32_t i = 0; i < names.n && status == HALO_OK; i++) {
    const int64_t step = step_of(names.name[i]);
    if (step >= 0) steps[n++] = step;
  }
  halo__names_free(&names);
  HALO_TRY(status);
  if (n > 1) qsort(steps, (size_t)n, sizeof *steps, newest_first);
  *steps_out = steps;
  *n_out = n;
  return HALO_OK;
}

static uint64_t random_id(void) {
  uint64_t id = 0;
  if (getrandom(&id, sizeof id, 0) != sizeof id) id = (uint64_t)getpid() * 0x9e3779b97f4a7c15u;
  return id;
}

/* ---- start ---------------------------------------------------------------------------------- */

static halo_status clear_litter(const char *dir) {
  halo__names names;
  HALO_TRY(halo__file_list(&names, who, dir));
  halo_status status = HALO_OK;
  for (int32_t i = 0; i < names.n && status == HALO_OK; i++) {
    char path[HALO__PATH];
    if (!is_litter(names.name[i])) continue;
    status = halo__file_join(path, who, dir, names.name[i]);
    if (status == HALO_OK) status = halo__file_remove_tree(who, path, 2);
  }
  halo__names_free(&names);
  return status;
}

static halo_status ask_for_room(const char *dir, int64_t total_bytes) {
  struct statvfs fs;
  HALO_CHECK(statvfs(dir, &fs) == 0, HALO_EIO, "%s: cannot ask for the free space of %s: %s", who, dir,
             strerror(errno));
  const double free_bytes = (double)fs.f_bavail * (double)fs.f_frsize;
  const double needed = 1.1 * (double)total_bytes + 1048576;
  HALO_CHECK(free_bytes >= needed, HALO_EIO,
             "%s: %s has %.2f GiB free, and a save needs %.2f GiB (a tenth to spare)", who, dir,
             free_bytes / 1073741824.0, needed / 1073741824.0);
  return HALO_OK;
}

static halo_status make_folders(const halo_checkpoint_writer *w, int64_t total_bytes) {
  char inner[HALO__PATH];
  const bool was_there = access(w->dir, F_OK) == 0;
  HALO_TRY(halo__file_mkdir(who, w->dir));
  if (!was_there) {
    halo__file_parent(inner, sizeof inner, w->dir);
    HALO_TRY(halo__file_sync_folder(who, inner));
  }
  HALO_TRY(clear_litter(w->dir));
  HALO_TRY(ask_for_room(w->dir, total_bytes));
  HALO_TRY(halo__file_mkdir(who, w->temporary));
  HALO_TRY(halo__file_join(inner, who, w->temporary, "optim"));
  return halo__file_mkdir(who, inner);
}

halo_status halo__checkpoint_start(halo_checkpoint_writer **out, const char *dir, int64_t step,
                                   int32_t rank, int32_t world, uint64_t attempt, int64_t total_bytes) {
  HALO_CHECK(out != NULL && dir != NULL && dir[0] != 0, HALO_EARG, "%s: the folder is missing", who);
  HALO_CHECK(strlen(dir) < HALO__PATH - 512, HALO_EARG, "%s: the folder's path is too long", who);
  HALO_CHECK(step >= 0, HALO_EARG, "%s: step is %lld", who, (long long)step);
  halo_checkpoint_writer *w = NULL;
  HALO_TRY(halo__alloc_zero((void **)&w, sizeof *w, HALO_CPU));
  w->step = w->own.step = step;
  w->rank = rank;
  w->world = w->own.world = world;
  snprintf(w->dir, sizeof w->dir, "%s", dir);
  halo_status status = HALO_OK;
  char name[64];
  snprintf(name, sizeof name, "tmp-%lld-%016llx", (long long)step, (unsigned long long)attempt);
  HALO_TRY_GOTO(halo__file_join(w->temporary, who, dir, name));
  HALO_TRY_GOTO(halo_safetensors_writer_new(&w->pieces));
  if (rank == 0) {
    HALO_TRY_GOTO(make_folders(w, total_bytes));
  } else {
    HALO_CHECK_GOTO(access(w->temporary, W_OK) == 0, HALO_EIO,
                    "%s: rank %d does not see %s, which rank 0 made: the folder must be on a file system "
                    "that all nodes share", who, rank, w->temporary);
  }
  *out = w;
done:
  if (status != HALO_OK) halo_checkpoint_writer_free(w);
  return status;
}

halo_status halo_checkpoint_begin(halo_checkpoint_writer **out, const char *dir, int64_t step,
                                  halo_comm *comm, int64_t expected_bytes) {
  const int32_t rank = process_rank(comm), world = processes(comm);
  uint64_t attempt = rank == 0 ? random_id() : 0;
  int64_t total = expected_bytes;
  if (world > 1) {
    void *id[1] = {&attempt}, *bytes[1] = {&total};
    HALO_TRY(halo_comm_broadcast(comm, id, sizeof attempt, 0));
    HALO_TRY(halo_comm_all_reduce(comm, bytes, 1, HALO_I64));
  }
  halo_checkpoint_writer *w = NULL;
  halo_status mine = HALO_OK;
  if (rank == 0) mine = halo__checkpoint_start(&w, dir, step, rank, world, attempt, total);
  halo_status status = halo__agree(comm, mine);
  if (status == HALO_OK && world > 1) {
    if (rank != 0) mine = halo__checkpoint_start(&w, dir, step, rank, world, attempt, total);
    status = halo__agree(comm, mine);
  }
  if (status != HALO_OK) {
    halo_checkpoint_writer_free(w);
    return status;
  }
  w->comm = comm;
  *out = w;
  return HALO_OK;
}

void halo_checkpoint_writer_free(halo_checkpoint_writer *w) {
  if (w == NULL) return;
  halo__manifest_free(&w->own);
  halo_safetensors_writer_free(w->pieces);
  halo__free(w);
}

/* ---- what goes in --------------------------------------------------------------------------- */

/* Remember the first failure; all later calls return it, so that only commit needs to be looked at. */
static halo_status remember(halo_checkpoint_writer *w, halo_status status) {
  if (status != HALO_OK && w->failed == HALO_OK) {
    w->failed = status;
    snprintf(w->message, sizeof w->message, "%s", halo_error_message());
  }
  return status;
}

static halo_status failed_before(const halo_checkpoint_writer *w) {
  return w->failed == HALO_OK ? HALO_OK : halo__error(w->failed, "%s", w->message);
}

halo_status halo_checkpoint_fail(halo_checkpoint_writer *w, int32_t status, const char *why) {
  const halo_status kept = status < 0 && status >= HALO_EINTERRUPTED ? (halo_status)status : HALO_ESTATE;
  char text[400]; // `why` may be the message that is about to be overwritten
  snprintf(text, sizeof text, "%s", why != NULL ? why : "the caller gave up");
  return remember(w, halo__error(kept, "%s: %s", who, text));
}

static halo_status put_file(halo_checkpoint_writer *w, const char *name, const void *bytes, int64_t n) {
  char path[HALO__PATH];
  halo__digest digest = {0};
  HALO_CHECK(name != NULL && halo__file_is_plain_name(name, strlen(name)), HALO_EARG,
             "%s: \"%s\" is not a plain file name", who,
             name != NULL ? halo__printable(name, strlen(name)) : "");
  HALO_CHECK(strcmp(name, HALO__MANIFEST_NAME) != 0 && strcmp(name, "optim") != 0, HALO_EARG,
             "%s: the name %s is taken", who, name);
  HALO_TRY(halo__file_join(path, who, w->temporary, name));
  HALO_TRY(halo__file_write(who, path, bytes, n, &digest));
  const halo_status status = halo__manifest_add(&w->own, name, &digest);
  halo__digest_free(&digest);
  return status;
}

halo_status halo_checkpoint_put_file(halo_checkpoint_writer *w, const char *name, const void *bytes,
                                     int64_t n) {
  HALO_TRY(failed_before(w));
  return remember(w, put_file(w, name, bytes, n));
}

/* Move what a safetensors save wrote below `folder` into the list. */
static halo_status list_written(halo_checkpoint_writer *w, halo__written *written, const char *folder) {
  for (int32_t i = 0; i < written->n; i++) {
    char name[128];
    snprintf(name, sizeof name, "%s%s", folder, written->file[i].name);
    HALO_TRY(halo__manifest_add(&w->own, name, &written->file[i].digest));
  }
  return HALO_OK;
}

halo_status halo_checkpoint_put_weights(halo_checkpoint_writer *w, halo_safetensors_writer *weights,
                                        int64_t max_shard_bytes) {
  HALO_TRY(failed_before(w));
  halo__written written = {0};
  halo_status status =
      halo__safetensors_write(&written, weights, who, w->temporary, "model", max_shard_bytes, true);
  if (status == HALO_OK) status = list_written(w, &written, "");
  halo__written_free(&written);
  return remember(w, status);
}

/* The run of parameter [offset, offset+count) that lies in [from, to) of the flat tensor. */
static halo_status put_run(halo_checkpoint_writer *w, const char *kind, const char *parameter,
                           halo_tensor *flat, int64_t offset, int64_t count, int64_t from, int64_t to) {
  const int64_t first = offset > from ? offset : from;
  const int64_t last = offset + count < to ? offset + count : to;
  if (first >= last && !(count == 0 && from == 0)) return HALO_OK; // an empty parameter: rank 0 has it
  char name[1100];
  const int n = snprintf(name, sizeof name, "%s/%s@%lld", kind, parameter, (long long)(first - offset));
  HALO_CHECK(n > 0 && n < (int)sizeof name, HALO_EARG, "%s: the name of parameter %.80s... is too long",
             who, parameter);
  halo_tensor *view = NULL;
  const int64_t shape[1] = {count == 0 ? 0 : last - first}, stride[1] = {1};
  HALO_TRY(halo__view(&view, flat, 1, shape, stride, count == 0 ? 0 : first));
  const halo_status status = halo_safetensors_writer_add(w->pieces, name, view, NULL);
  halo_tensor_free(view);
  return status;
}

static halo_status put_flat(halo_checkpoint_writer *w, const char *kind, halo_tensor *flat, int32_t n,
                            const char *const *names, const int64_t *offsets, const int64_t *counts) {
  HALO_CHECK(kind != NULL && halo__file_is_plain_name(kind, strlen(kind)), HALO_EARG,
             "%s: \"%s\" is not a kind of state", who, kind != NULL ? kind : "");
  HALO_CHECK(flat != NULL && flat->ndim == 1 && halo_tensor_is_contiguous(flat), HALO_EARG,
             "%s: the %s must be one flat tensor, got %s", who, kind, flat ? halo__describe(flat) : "nothing");
  const int64_t total = halo_tensor_count(flat);
  const int64_t from = (int64_t)((__int128)total * w->rank / w->world);
  const int64_t to = (int64_t)((__int128)total * (w->rank + 1) / w->world);
  for (int32_t i = 0; i < n; i++) {
    int64_t end;
    HALO_CHECK(halo__add(offsets[i], counts[i], &end) && end <= total, HALO_EARG,
               "%s: parameter %s at [%lld,+%lld) is not inside the %s of %lld elements", who, names[i],
               (long long)offsets[i], (long long)counts[i], kind, (long long)total);
    HALO_TRY(put_run(w, kind, names[i], flat, offsets[i], counts[i], from, to));
  }
  return HALO_OK;
}

halo_status halo_checkpoint_put_flat(halo_checkpoint_writer *w, const char *kind, halo_tensor *flat,
                                     int32_t n, const char *const *names, const int64_t *offsets,
                                     const int64_t *counts) {
  HALO_TRY(failed_before(w));
  return remember(w, put_flat(w, kind, flat, n, names, offsets, counts));
}

/* ---- the commit ----------------------------------------------------------------------------- */

static halo_status part_path(char out[HALO__PATH], const halo_checkpoint_writer *w, int32_t rank) {
  char name[32];
  snprintf(name, sizeof name, "rank-%05d.part.json", rank);
  return halo__file_join(out, who, w->temporary, name);
}

halo_status halo__checkpoint_finish(halo_checkpoint_writer *w) {
  halo_status status = HALO_OK;
  halo__written written = {0};
  halo__text text = {0};
  char path[HALO__PATH], stem[64];
  HALO_TRY(failed_before(w));
  HALO_TRY_GOTO(halo__file_join(path, who, w->temporary, "optim"));
  snprintf(stem, sizeof stem, "rank-%05d-of-%05d", w->rank, w->world);
  HALO_TRY_GOTO(halo__safetensors_write(&written, w->pieces, who, path, stem, 0, true));
  HALO_TRY_GOTO(list_written(w, &written, "optim/"));
  HALO_TRY_GOTO(halo__file_sync_folder(who, path));
  HALO_TRY_GOTO(halo__manifest_write(&text, &w->own));
  HALO_TRY_GOTO(part_path(path, w, w->rank));
  halo__digest digest;
  HALO_TRY_GOTO(halo__file_write(who, path, text.text, (int64_t)text.n, &digest));
  halo__digest_free(&digest);
  HALO_TRY_GOTO(halo__file_sync_folder(who, w->temporary));
done:
  halo__written_free(&written);
  halo__text_free(&text);
  return remember(w, status);
}

/* Add the files of one rank's list to ours, and see that they are there. */
static halo_status merge_part(halo_checkpoint_writer *w, int32_t rank) {
  char path[HALO__PATH];
  halo__manifest part = {0};
  halo_status status = HALO_OK;
  HALO_TRY(part_path(path, w, rank));
  HALO_TRY(halo__manifest_read(&part, who, path));
  HALO_CHECK_GOTO(part.step == w->step && part.world == w->world, HALO_ESTATE,
                  "%s: %s is of step %lld and %d ranks", who, path, (long long)part.step, part.world);
  for (int32_t i = 0; i < part.n; i++) {
    struct stat s;
    HALO_TRY_GOTO(halo__file_join(path, who, w->temporary, part.file[i].name));
    HALO_CHECK_GOTO(lstat(path, &s) == 0 && S_ISREG(s.st_mode) && s.st_size == part.file[i].digest.bytes,
                    HALO_EIO, "%s: rank 0 does not see %s as rank %d wrote it", who, path, rank);
    if (rank != w->rank) {
      HALO_TRY_GOTO(halo__manifest_add(&w->own, part.file[i].name, &part.file[i].digest));
    }
  }
done:
  halo__manifest_free(&part);
  return status;
}

static int by_file_name(const void *a, const void *b) {
  return strcmp(((const halo__manifest_file *)a)->name, ((const halo__manifest_file *)b)->name);
}

static halo_status write_manifest(halo_checkpoint_writer *w, const char *state_json) {
  halo_status status = HALO_OK;
  halo__text text = {0};
  halo__digest digest;
  halo__manifest check = {0};
  char path[HALO__PATH];
  const char *const state = state_json != NULL ? state_json : "{}";
  const size_t n = strlen(state) + 1;
  HALO_TRY(halo__scratch((void **)&w->own.state, (int64_t)n, 1));
  memcpy(w->own.state, state, n);
  qsort(w->own.file, (size_t)w->own.n, sizeof *w->own.file, by_file_name);
  HALO_TRY_GOTO(halo__manifest_write(&text, &w->own));
  HALO_TRY_GOTO(halo__file_join(path, who, w->temporary, HALO__MANIFEST_NAME));
  HALO_TRY_GOTO(halo__file_write(who, path, text.text, (int64_t)text.n, &digest));
  halo__digest_free(&digest);
  // What cannot be read now will not be readable when it is needed: a state that is not JSON, above all.
  HALO_TRY_GOTO(halo__manifest_read(&check, who, path));
done:
  halo__manifest_free(&check);
  halo__text_free(&text);
  return status;
}

static halo_status write_hint(const halo_checkpoint_writer *w) {
  char path[HALO__PATH], temporary[HALO__PATH], text[64];
  const int n = snprintf(text, sizeof text, "step-%08lld\n", (long long)w->step);
  HALO_TRY(halo__file_join(path, who, w->dir, "LATEST"));
  HALO_TRY(halo__file_join(temporary, who, w->dir, "LATEST.tmp"));
  HALO_TRY(halo__file_remove_tree(who, temporary, 0));
  HALO_TRY(halo__file_write(who, temporary, text, n, NULL));
  HALO_TRY(halo__file_rename(who, temporary, path));
  return halo__file_sync_folder(who, w->dir);
}

halo_status halo__checkpoint_publish(halo_checkpoint_writer *w, const char *state_json) {
  char path[HALO__PATH], target[HALO__PATH];
  struct stat s;
  HALO_TRY(failed_before(w));
  for (int32_t rank = 0; rank < w->world; rank++) HALO_TRY(merge_part(w, rank));
  HALO_TRY(write_manifest(w, state_json));
  for (int32_t rank = 0; rank < w->world; rank++) {
    HALO_TRY(part_path(path, w, rank));
    HALO_TRY(halo__file_remove_tree(who, path, 0));
  }
  HALO_TRY(halo__file_join(path, who, w->temporary, "optim"));
  HALO_TRY(halo__file_sync_folder(who, path));
  HALO_TRY(halo__file_sync_folder(who, w->temporary));
  HALO_TRY(halo__checkpoint_folder(target, who, w->dir, w->step));
  const bool was_there = lstat(target, &s) == 0;
  if (was_there) {
    HALO_TRY(halo__file_exchange(who, w->temporary, target));
  } else {
    HALO_TRY(halo__file_rename(who, w->temporary, target));
  }
  w->is_committed = true;
  HALO_TRY(halo__file_sync_folder(who, w->dir));
  HALO_TRY(write_hint(w));
  return was_there ? halo__file_remove_tree(who, w->temporary, 2) : HALO_OK;
}

halo_status halo_checkpoint_commit(halo_checkpoint_writer *w, const char *state_json) {
  HALO_CHECK(w != NULL, HALO_EARG, "%s: the writer is NULL", who);
  HALO_CHECK(!w->is_committed, HALO_ESTATE, "%s: step %lld is committed already", who, (long long)w->step);
  halo_status status = halo__agree(w->comm, halo__checkpoint_finish(w));
  if (status == HALO_OK) {
    status = halo__agree(w->comm, w->rank == 0 ? halo__checkpoint_publish(w, state_json) : HALO_OK);
  }
  if (status == HALO_OK) {
    w->is_committed = true;
    return HALO_OK;
  }
  char message[512];
  snprintf(message, sizeof message, "%s", halo_error_message());
  // Best effort: what cannot be removed now is removed when the next attempt begins.
  if (w->rank == 0 && !w->is_committed) halo__file_remove_tree(who, w->temporary, 2);
  return halo__error(status, "%s", message);
}

/* ---- pruning -------------------------------------------------------------------------------- */

/* Out of sight in one rename, then emptied: a crash in between leaves litter, no half checkpoint. */
static halo_status remove_checkpoint(const char *dir, int64_t step) {
  char path[HALO__PATH], trash[HALO__PATH], name[64];
  HALO_TRY(halo__checkpoint_folder(path, who, dir, step));
  snprintf(name, sizeof name, "trash-%lld-%016llx", (long long)step, (unsigned long long)random_id());
  HALO_TRY(halo__file_join(trash, who, dir, name));
  HALO_TRY(halo__file_rename(who, path, trash));
  return halo__file_remove_tree(who, trash, 2);
}

halo_status halo_checkpoint_prune(const char *dir, int32_t keep, int64_t major, int32_t *removed_out) {
  HALO_CHECK(dir != NULL, HALO_EARG, "checkpoint_prune: the folder is missing");
  HALO_CHECK(keep >= 2, HALO_EARG,
             "checkpoint_prune: keep is %d; at least 2 stay, so that a damaged newest one has something to "
             "fall back to", keep);
  HALO_CHECK(major >= 0, HALO_EARG, "checkpoint_prune: major is %lld", (long long)major);
  int64_t *steps = NULL;
  int32_t n = 0, removed = 0, whole = 0;
  HALO_TRY(halo__checkpoint_steps(&steps, &n, who, dir));
  halo_status status = HALO_OK;
  for (int32_t i = 0; i < n; i++) {
    char path[HALO__PATH];
    halo__manifest m = {0};
    HALO_TRY_GOTO(halo__checkpoint_folder(path, who, dir, steps[i]));
    // A damaged one neither counts as kept nor is removed: somebody should look at it.
    if (halo__checkpoint_glance(&m, who, path) != HALO_OK) continue;
    halo__manifest_free(&m);
    if (++whole <= keep || (major > 0 && steps[i] % major == 0)) continue;
    HALO_TRY_GOTO(remove_checkpoint(dir, steps[i]));
    removed++;
  }
done:
  halo__free(steps);
  if (removed_out != NULL) *removed_out = removed;
  return status;
}

/* ---- faults on purpose ---------------------------------------------------------------------- */

static int64_t fault_in;
static int32_t fault_kind;

static int inject(halo__file_call call, const char *path, const char *to) {
  (void)call;
  (void)path;
  (void)to;
  if (fault_in < 0) return fault_kind == HALO_FAULT_FOREVER ? EIO : 0;
  if (fault_in-- > 0) return 0;
  if (fault_kind == HALO_FAULT_KILL) raise(SIGKILL);
  return EIO;
}

halo_status halo_checkpoint_fail_after(int64_t n, int32_t kind) {
  HALO_CHECK(kind >= HALO_FAULT_NONE && kind <= HALO_FAULT_KILL, HALO_EARG,
             "checkpoint_fail_after: kind is %d", kind);
  HALO_CHECK(n >= 0, HALO_EARG, "checkpoint_fail_after: n is %lld", (long long)n);
  fault_in = n;
  fault_kind = kind;
  halo__file_hook = kind == HALO_FAULT_NONE ? NULL : inject;
  return HALO_OK;
}
