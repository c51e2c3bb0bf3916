/* checkpoint_load.c: finding, checking and reading checkpoints.
 *
 * Nothing is believed: the manifest by its seal, then every file by name, size and hashes. The newest
 * folder that passes is taken, and what was skipped is said with the reason. With several processes
 * each hashes its share of the files and they agree after each candidate, so all take the same one.
 *
 * Optimizer state was cut by the number of ranks that wrote it. A read puts a parameter together from
 * its runs, wherever they are; they must cover it exactly once (Megatron checks the same of its
 * shards), so a missing, doubled or foreign rank file cannot pass.
 */
#include "checkpoint.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const char who[] = "checkpoint_open";

typedef struct run {
  const char *name; /* "moment1/lm_head.weight@4096" in the shard's header */
  size_t key_length; /* up to the @ */
  int64_t begin, count;
  int32_t shard;
  int64_t index;
} run;

struct halo_checkpoint {
  char path[HALO__PATH];
  halo__manifest manifest;
  halo_safetensors **shards; /* optim/ files */
  int32_t n_shards;
  run *runs; /* by key, then begin */
  int64_t n_runs;
  halo__text report;
};

/* ---- checking a folder ---------------------------------------------------------------------- */

/* Files that a reader would pick up, but the manifest does not know. */
static halo_status refuse_strangers(const halo__manifest *m, const char *folder, const char *prefix) {
  halo__names names = {0};
  HALO_TRY(halo__file_list(&names, who, folder));
  halo_status status = HALO_OK;
  for (int32_t i = 0; i < names.n && status == HALO_OK; i++) {
    const char *name = names.name[i];
    const size_t n = strlen(name);
    const bool is_weights = (n > 12 && strcmp(name + n - 12, ".safetensors") == 0) ||
                            (n > 11 && strcmp(name + n - 11, ".index.json") == 0);
    if (prefix[0] == 0 && !is_weights) continue; // a README beside the weights harms nobody
    bool is_known = false;
    for (int32_t k = 0; k < m->n && !is_known; k++) {
      const char *known = m->file[k].name;
      is_known = strncmp(known, prefix, strlen(prefix)) == 0 && strcmp(known + strlen(prefix), name) == 0;
    }
    if (!is_known) {
      status = halo__error(HALO_ECORRUPT, "%s: %s holds %s, which its manifest does not name", who, folder, name);
    }
  }
  halo__names_free(&names);
  return status;
}

halo_status halo__checkpoint_glance(halo__manifest *out, const char *name_of, const char *path) {
  char file[HALO__PATH];
  halo_status status = HALO_OK;
  *out = (halo__manifest){0};
  HALO_TRY(halo__file_join(file, name_of, path, HALO__MANIFEST_NAME));
  HALO_TRY(halo__manifest_read(out, name_of, file));
  HALO_CHECK_GOTO(out->state != NULL, HALO_ECORRUPT, "%s: %s holds no state", name_of, file);
  for (int32_t i = 0; i < out->n; i++) {
    struct stat s;
    HALO_TRY_GOTO(halo__file_join(file, name_of, path, out->file[i].name));
    HALO_CHECK_GOTO(lstat(file, &s) == 0, HALO_ECORRUPT, "%s: %s is missing", name_of, file);
    HALO_CHECK_GOTO(S_ISREG(s.st_mode), HALO_ECORRUPT, "%s: %s is not a regular file", name_of, file);
    HALO_CHECK_GOTO(s.st_size == out->file[i].digest.bytes, HALO_ECORRUPT,
                    "%s: %s has %lld bytes, the manifest says %lld", name_of, file, (long long)s.st_size,
                    (long long)out->file[i].digest.bytes);
  }
  HALO_TRY_GOTO(refuse_strangers(out, path, ""));
  HALO_TRY_GOTO(halo__file_join(file, name_of, path, "optim"));
  HALO_TRY_GOTO(refuse_strangers(out, file, "optim/"));
done:
  if (status != HALO_OK) halo__manifest_free(out);
  return status;
}

/* Which tensor a damaged chunk belongs to, for the message; the header itself may be what is damaged.
 * Overwrites the error message. */
static void name_the_tensor(const char *path, int64_t offset, char out[160]) {
  out[0] = 0;
  const size_t n = strlen(path);
  if (offset < 0 || n < 12 || strcmp(path + n - 12, ".safetensors") != 0) return;
  halo_safetensors *s = NULL;
  if (halo_safetensors_open(&s, path, 0) != HALO_OK) {
    snprintf(out, 160, " (its header is damaged)");
    return;
  }
  for (int64_t i = 0; i < halo_safetensors_count(s); i++) {
    halo_safetensors_info info;
    if (halo_safetensors_describe(&info, s, i) != HALO_OK) break;
    if (info.offset < offset + HALO__CHUNK && info.offset + info.bytes > offset) {
      snprintf(out, 160, " (tensor \"%s\" or one stored near it)",
               halo__printable(info.name, strlen(info.name)));
      break;
    }
  }
  halo_safetensors_free(s);
}

static halo_status check_content(const halo__manifest *m, const char *path, int32_t part, int32_t parts,
                                 int32_t level) {
  for (int32_t i = part; level >= HALO_VERIFY_CHUNKS && i < m->n; i += parts) {
    char file[HALO__PATH], tensor[160];
    HALO_TRY(halo__file_join(file, who, path, m->file[i].name));
    int64_t bad = -1;
    const halo_status status = halo__file_verify(&bad, who, file, &m->file[i].digest, level == HALO_VERIFY_ALL);
    if (status == HALO_OK) continue;
    char message[700];
    snprintf(message, sizeof message, "%s", halo_error_message());
    name_the_tensor(file, bad, tensor);
    return halo__error(status, "%s%s", message, tensor);
  }
  return HALO_OK;
}

/* ---- runs of optimizer state ---------------------------------------------------------------- */

static int compare_keys(const char *a, size_t na, const char *b, size_t nb) {
  const int order = memcmp(a, b, na < nb ? na : nb);
  return order != 0 ? order : (na > nb) - (na < nb);
}

static int by_key_and_begin(const void *a, const void *b) {
  const run *x = a, *y = b;
  const int order = compare_keys(x->name, x->key_length, y->name, y->key_length);
  if (order != 0) return order;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  return (x->count > y->count) - (x->count < y->count); // an empty one before its namesake
}

static halo_status understand_run(run *r, const halo_safetensors_info *info) {
  const char *mark = strrchr(info->name, '@');
  const size_t digits = mark != NULL ? strspn(mark + 1, "0123456789") : 0;
  HALO_CHECK(mark != NULL && digits > 0 && digits < 19 && mark[1 + digits] == 0 && info->ndim == 1 &&
                 memchr(info->name, '/', (size_t)(mark - info->name)) != NULL,
             HALO_ECORRUPT, "%s: %s: \"%s\" is not a run of optimizer state", who, info->file,
             halo__printable(info->name, strlen(info->name)));
  r->name = info->name;
  r->key_length = (size_t)(mark - info->name);
  r->begin = strtoll(mark + 1, NULL, 10);
  r->count = info->count;
  return HALO_OK;
}

static halo_status collect_runs(halo_checkpoint *c) {
  HALO_TRY(halo__scratch((void **)&c->shards, c->manifest.n + 1, sizeof *c->shards));
  for (int32_t i = 0; i < c->manifest.n; i++) {
    char file[HALO__PATH];
    if (strncmp(c->manifest.file[i].name, "optim/", 6) != 0) continue;
    HALO_TRY(halo__file_join(file, who, c->path, c->manifest.file[i].name));
    HALO_TRY(halo_safetensors_open(&c->shards[c->n_shards], file, 0));
    c->n_runs += halo_safetensors_count(c->shards[c->n_shards++]);
  }
  HALO_TRY(halo__scratch((void **)&c->runs, c->n_runs + 1, sizeof *c->runs));
  int64_t n = 0;
  for (int32_t s = 0; s < c->n_shards; s++) {
    for (int64_t i = 0; i < halo_safetensors_count(c->shards[s]); i++) {
      halo_safetensors_info info;
      HALO_TRY(halo_safetensors_describe(&info, c->shards[s], i));
      c->runs[n] = (run){.shard = s, .index = i};
      HALO_TRY(understand_run(&c->runs[n++], &info));
    }
  }
  if (n > 1) qsort(c->runs, (size_t)n, sizeof *c->runs, by_key_and_begin);
  for (int64_t i = 1; i < n; i++) {
    const run *a = &c->runs[i - 1], *b = &c->runs[i];
    if (compare_keys(a->name, a->key_length, b->name, b->key_length) != 0) continue;
    HALO_CHECK(a->begin + a->count <= b->begin && a->count > 0, HALO_ECORRUPT,
               "%s: %s: runs of %.*s overlap at element %lld", who, c->path, (int)b->key_length, b->name,
               (long long)b->begin);
  }
  return HALO_OK;
}

/* ---- opening -------------------------------------------------------------------------------- */

void halo_checkpoint_free(halo_checkpoint *c) {
  if (c == NULL) return;
  for (int32_t i = 0; i < c->n_shards; i++) halo_safetensors_free(c->shards[i]);
  halo__free(c->shards);
  halo__free(c->runs);
  halo__manifest_free(&c->manifest);
  halo__text_free(&c->report);
  halo__free(c);
}

halo_status halo__checkpoint_open_part(halo_checkpoint **out, const char *path, int32_t part,
                                       int32_t parts, int32_t level) {
  HALO_CHECK(strlen(path) < HALO__PATH - 300, HALO_EARG, "%s: the path is too long", who);
  HALO_CHECK(level >= HALO_VERIFY_SIZES && level <= HALO_VERIFY_ALL, HALO_EARG, "%s: level is %d", who, level);
  halo_checkpoint *c = NULL;
  halo_status status = HALO_OK;
  HALO_TRY(halo__alloc_zero((void **)&c, sizeof *c, HALO_CPU));
  snprintf(c->path, sizeof c->path, "%s", path);
  HALO_TRY_GOTO(halo__checkpoint_glance(&c->manifest, who, path));
  HALO_TRY_GOTO(check_content(&c->manifest, path, part, parts, level));
  HALO_TRY_GOTO(collect_runs(c));
  *out = c;
done:
  if (status != HALO_OK) halo_checkpoint_free(c);
  return status;
}

static halo_status open_together(halo_checkpoint **out, const char *path, halo_comm *comm, int32_t level) {
  const int32_t here = comm != NULL ? halo_comm_here(comm) : 1;
  const int32_t parts = comm != NULL ? halo_comm_size(comm) / here : 1;
  const int32_t part = comm != NULL ? halo_comm_rank(comm) / here : 0;
  halo_checkpoint *c = NULL;
  const halo_status status = halo__agree(comm, halo__checkpoint_open_part(&c, path, part, parts, level));
  if (status != HALO_OK) {
    halo_checkpoint_free(c);
    return status;
  }
  *out = c;
  return HALO_OK;
}

halo_status halo_checkpoint_open(halo_checkpoint **out, const char *path, halo_comm *comm, int32_t level) {
  HALO_CHECK(out != NULL && path != NULL && path[0] != 0, HALO_EARG, "%s: out or path is missing", who);
  return open_together(out, path, comm, level);
}

/* Rank 0's list of candidates, on every rank. */
static halo_status share_steps(int64_t **steps_out, int32_t *n_out, const char *dir, halo_comm *comm) {
  const bool is_alone = comm == NULL || halo_comm_size(comm) == halo_comm_here(comm);
  struct stat s;
  halo_status status = HALO_OK;
  *steps_out = NULL;
  *n_out = 0;
  if (is_alone || halo_comm_rank(comm) == 0) {
    if (stat(dir, &s) == 0) status = halo__checkpoint_steps(steps_out, n_out, who, dir);
  }
  if (is_alone) return status;
  HALO_TRY(halo__agree(comm, status));
  int64_t n = *n_out;
  void *count[1] = {&n};
  HALO_TRY_GOTO(halo_comm_broadcast(comm, count, sizeof n, 0));
  if (*steps_out == NULL) HALO_TRY_GOTO(halo__scratch((void **)steps_out, n + 1, sizeof **steps_out));
  void *list[1] = {*steps_out};
  if (n > 0) HALO_TRY_GOTO(halo_comm_broadcast(comm, list, n * (int64_t)sizeof **steps_out, 0));
  *n_out = (int32_t)n;
done:
  if (status != HALO_OK) {
    halo__free(*steps_out);
    *steps_out = NULL;
  }
  return status;
}

halo_status halo_checkpoint_latest(halo_checkpoint **out, const char *dir, halo_comm *comm, int32_t level) {
  HALO_CHECK(out != NULL && dir != NULL && dir[0] != 0, HALO_EARG, "checkpoint_latest: out or dir is missing");
  int64_t *steps = NULL;
  int32_t n = 0;
  halo_checkpoint *c = NULL;
  halo__text report = {0};
  halo_status status = HALO_OK, last = HALO_OK;
  HALO_TRY(share_steps(&steps, &n, dir, comm));
  for (int32_t i = 0; i < n && c == NULL; i++) {
    char path[HALO__PATH];
    HALO_TRY_GOTO(halo__checkpoint_folder(path, who, dir, steps[i]));
    const halo_status tried = open_together(&c, path, comm, level);
    if (tried == HALO_OK) break;
    if (tried == HALO_ENOMEM || tried == HALO_ECOMM) { // says nothing about the checkpoint
      status = tried;
      goto done;
    }
    last = tried;
    const char *why = halo_error_message();
    HALO_TRY_GOTO(halo__text_print(&report, "skipped step %lld (%s): ", (long long)steps[i],
                                   halo_status_name(tried)));
    HALO_TRY_GOTO(halo__text_add(&report, why, strlen(why)));
    HALO_TRY_GOTO(halo__text_add(&report, "\n", 1));
  }
  HALO_CHECK_GOTO(c != NULL || n == 0, last, "checkpoint_latest: none of the %d checkpoints in %s can be used:\n%s",
                  n, dir, report.text);
  if (c != NULL) {
    c->report = report;
    report = (halo__text){0};
  }
  *out = c;
done:
  if (status != HALO_OK) halo_checkpoint_free(c);
  halo__text_free(&report);
  halo__free(steps);
  return status;
}

const char *halo_checkpoint_path(const halo_checkpoint *c) { return c->path; }
int64_t halo_checkpoint_step(const halo_checkpoint *c) { return c->manifest.step; }
int32_t halo_checkpoint_world(const halo_checkpoint *c) { return c->manifest.world; }
const char *halo_checkpoint_state(const halo_checkpoint *c) { return c->manifest.state; }
const char *halo_checkpoint_report(const halo_checkpoint *c) {
  return c->report.text != NULL ? c->report.text : "";
}
int32_t halo_checkpoint_files(const halo_checkpoint *c) { return c->manifest.n; }
const char *halo_checkpoint_file(const halo_checkpoint *c, int32_t i) {
  return i >= 0 && i < c->manifest.n ? c->manifest.file[i].name : NULL;
}

/* ---- reading -------------------------------------------------------------------------------- */

int64_t halo_checkpoint_read_file(const halo_checkpoint *c, const char *name, char *text, int64_t capacity) {
  int32_t i = 0;
  while (name != NULL && i < c->manifest.n && strcmp(c->manifest.file[i].name, name) != 0) i++;
  HALO_CHECK(name != NULL && i < c->manifest.n, HALO_EARG, "checkpoint_read_file: %s holds no file %s", c->path,
             name != NULL ? name : "(NULL)");
  const halo__digest *d = &c->manifest.file[i].digest;
  if (capacity <= d->bytes) return d->bytes;
  char path[HALO__PATH];
  halo__input in = {.fd = -1};
  HALO_TRY(halo__file_join(path, who, c->path, name));
  HALO_TRY(halo__input_open(&in, who, path, false));
  halo_status status = HALO_OK;
  halo__sha256 sha;
  char hex[65];
  HALO_TRY_GOTO(halo__input_read(&in, who, path, text, d->bytes, 0));
  text[d->bytes] = 0;
  halo__sha256_init(&sha, false);
  halo__sha256_add(&sha, text, (size_t)d->bytes);
  halo__sha256_end(&sha, hex);
  HALO_CHECK_GOTO(strcmp(hex, d->sha256) == 0, HALO_ECORRUPT, "checkpoint_read_file: %s was changed", path);
done:
  halo__input_close(&in);
  return status == HALO_OK ? d->bytes : status;
}

/* First run of a key, or n_runs. */
static int64_t find_run(const halo_checkpoint *c, const char *key) {
  const size_t length = strlen(key);
  int64_t low = 0, high = c->n_runs;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const run *r = &c->runs[middle];
    if (compare_keys(r->name, r->key_length, key, length) < 0) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const bool found = low < c->n_runs &&
                     compare_keys(c->runs[low].name, c->runs[low].key_length, key, length) == 0;
  return found ? low : c->n_runs;
}

int32_t halo_checkpoint_has(const halo_checkpoint *c, const char *kind, const char *parameter) {
  char key[1100];
  const int n = snprintf(key, sizeof key, "%s/%s", kind, parameter);
  return n > 0 && n < (int)sizeof key && find_run(c, key) < c->n_runs;
}

int64_t halo_checkpoint_parameters(const halo_checkpoint *c) {
  int64_t n = 0;
  for (int64_t i = 0; i < c->n_runs; i++) {
    n += i == 0 || compare_keys(c->runs[i - 1].name, c->runs[i - 1].key_length, c->runs[i].name,
                                c->runs[i].key_length) != 0;
  }
  return n;
}

static halo_status check_flat(const halo_tensor *flat, int64_t offset, int64_t count) {
  int64_t end;
  HALO_CHECK(flat != NULL && flat->ndim == 1 && halo_tensor_is_contiguous(flat), HALO_EARG,
             "checkpoint_read_flat: the target must be one flat tensor");
  HALO_CHECK(halo__add(offset, count, &end) && end <= halo_tensor_count(flat), HALO_EARG,
             "checkpoint_read_flat: [%lld,+%lld) is not inside %s", (long long)offset, (long long)count,
             halo__describe(flat));
  return HALO_OK;
}

/* One run into its place, converting dtype and device on the way. */
static halo_status read_run(const halo_checkpoint *c, const run *r, halo_tensor *flat, int64_t at) {
  halo_tensor *view = NULL;
  const int64_t shape[1] = {r->count}, stride[1] = {1};
  HALO_TRY(halo__view(&view, flat, 1, shape, stride, at));
  const halo_status status = halo_safetensors_load(view, c->shards[r->shard], r->index);
  halo_tensor_free(view);
  return status;
}

halo_status halo_checkpoint_read_flat(const halo_checkpoint *c, const char *kind, const char *parameter,
                                      halo_tensor *flat, int64_t offset, int64_t count) {
  char key[1100];
  HALO_TRY(check_flat(flat, offset, count));
  const int n = snprintf(key, sizeof key, "%s/%s", kind, parameter);
  HALO_CHECK(n > 0 && n < (int)sizeof key, HALO_EARG, "checkpoint_read_flat: the name %.80s... is too long",
             parameter);
  int64_t i = find_run(c, key), at = 0;
  HALO_CHECK(i < c->n_runs, HALO_EARG, "checkpoint_read_flat: %s holds no %s of parameter %s", c->path, kind,
             parameter);
  // All of it is judged before any of it is copied.
  for (int64_t k = i; k < c->n_runs && compare_keys(c->runs[k].name, c->runs[k].key_length, key, (size_t)n) == 0;
       k++) {
    HALO_CHECK(c->runs[k].begin == at, HALO_ECORRUPT, "checkpoint_read_flat: %s: %s lacks elements from %lld on",
               c->path, key, (long long)at);
    at += c->runs[k].count;
  }
  HALO_CHECK(at == count, HALO_EARG, "checkpoint_read_flat: %s of %s has %lld elements in %s, the model has %lld",
             kind, parameter, (long long)at, c->path, (long long)count);
  for (at = 0; at < count; i++) {
    HALO_TRY(read_run(c, &c->runs[i], flat, offset + at));
    at += c->runs[i].count;
  }
  return HALO_OK;
}
