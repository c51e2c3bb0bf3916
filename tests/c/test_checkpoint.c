/* Saving and loading: ranks without MPI (the phases are called rank by rank), crashes at every system
 * call, lost power, damage at every byte. HALO_TEST_ALL=1 leaves nothing out of the damage test. */
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoint.h"
#include "internal.h"
#include "safetensors.h"

static char folder[64] = "/dev/shm/halo-checkpoint-XXXXXX";

/* A path in the test folder; the string stays. */
static const char *at(const char *name) {
  static char paths[64][512];
  static int n;
  char path[512];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  for (int i = 0; i < n; i++) {
    if (strcmp(paths[i], path) == 0) return paths[i];
  }
  if (n == 64) abort();
  return strcpy(paths[n++], path);
}

/* ---- a small model -------------------------------------------------------------------------- */

enum { PARAMETERS = 5, ELEMENTS = 63 };
static const char *const names[PARAMETERS] = {"embed.weight", "a.b", "empty", "norm", "lm_head.weight"};
static const int64_t offsets[PARAMETERS] = {0, 20, 33, 33, 34}, counts[PARAMETERS] = {20, 13, 0, 1, 29};

typedef struct model {
  halo_tensor *weight[2], *m1, *m2;
} model;

/* Contents are a function of `version`; -1: rubbish, to be overwritten. */
static model make_model(int version) {
  model m;
  float w0[6], w1[4], m1[ELEMENTS], m2[ELEMENTS];
  for (int i = 0; i < 6; i++) w0[i] = (float)(100 * version + i);
  for (int i = 0; i < 4; i++) w1[i] = (float)(-100 * version - i);
  for (int i = 0; i < ELEMENTS; i++) m1[i] = (float)version + 0.001f * (float)i;
  for (int i = 0; i < ELEMENTS; i++) m2[i] = (float)version * (float)i;
  CHECK_OK(halo_tensor_from(&m.weight[0], HALO_F32, HALO_CPU, 2, (int64_t[]){2, 3}, w0));
  CHECK_OK(halo_tensor_from(&m.weight[1], HALO_F32, HALO_CPU, 1, (int64_t[]){4}, w1));
  CHECK_OK(halo_tensor_from(&m.m1, HALO_F32, HALO_CPU, 1, (int64_t[]){ELEMENTS}, m1));
  CHECK_OK(halo_tensor_from(&m.m2, HALO_F32, HALO_CPU, 1, (int64_t[]){ELEMENTS}, m2));
  return m;
}

static void free_model(model *m) {
  halo_tensor_free(m->weight[0]);
  halo_tensor_free(m->weight[1]);
  halo_tensor_free(m->m1);
  halo_tensor_free(m->m2);
}

static bool same(const halo_tensor *a, const halo_tensor *b) {
  return memcmp(halo_tensor_data(a), halo_tensor_data(b),
                (size_t)(halo_tensor_count(a) * halo_dtype_bytes(halo_tensor_dtype(a)))) == 0;
}

static halo_status put(halo_checkpoint_writer *w, const model *m, int32_t rank) {
  halo_checkpoint_put_flat(w, "moment1", m->m1, PARAMETERS, names, offsets, counts);
  halo_checkpoint_put_flat(w, "moment2", m->m2, PARAMETERS, names, offsets, counts);
  if (rank != 0) return HALO_OK;
  halo_safetensors_writer *weights = NULL;
  halo_status status = halo_safetensors_writer_new(&weights);
  if (status == HALO_OK) status = halo_safetensors_writer_add(weights, "w0", m->weight[0], NULL);
  if (status == HALO_OK) status = halo_safetensors_writer_add(weights, "w1", m->weight[1], NULL);
  if (status == HALO_OK) status = halo_checkpoint_put_weights(w, weights, 20);
  halo_safetensors_writer_free(weights);
  if (status != HALO_OK) return halo_checkpoint_fail(w, status, "no weights");
  return halo_checkpoint_put_file(w, "config.json", "{\"model_type\":\"qwen2\"}\n", 23);
}

/* All ranks of a save, one after the other. */
static halo_status save(const char *dir, int64_t step, int version, int32_t world) {
  halo_checkpoint_writer *w[8] = {0};
  model m = make_model(version);
  char state[64];
  halo_status status = HALO_OK;
  snprintf(state, sizeof state, "{\"version\": %d, \"s\": \"\\u00e9\"}", version);
  const uint64_t attempt = 0x1000 + (uint64_t)version;
  for (int32_t r = 0; r < world && status == HALO_OK; r++) {
    status = halo__checkpoint_start(&w[r], dir, step, r, world, attempt, 1000);
  }
  for (int32_t r = 0; r < world && status == HALO_OK; r++) status = put(w[r], &m, r);
  for (int32_t r = 0; r < world && status == HALO_OK; r++) status = halo__checkpoint_finish(w[r]);
  if (status == HALO_OK) status = halo__checkpoint_publish(w[0], state);
  for (int32_t r = 0; r < world; r++) halo_checkpoint_writer_free(w[r]);
  free_model(&m);
  return status;
}

/* Everything in c is version `version`, to the last bit. */
static bool holds(const halo_checkpoint *c, int version) {
  model want = make_model(version), got = make_model(-1);
  halo_safetensors *s = NULL;
  char state[64];
  snprintf(state, sizeof state, "{\"version\": %d, \"s\": \"\\u00e9\"}", version);
  bool good = strcmp(halo_checkpoint_state(c), state) == 0;
  good = good && halo_safetensors_open(&s, halo_checkpoint_path(c), 0) == HALO_OK;
  good = good && halo_safetensors_load(got.weight[0], s, 0) == HALO_OK;
  good = good && halo_safetensors_load(got.weight[1], s, 1) == HALO_OK;
  for (int i = 0; i < PARAMETERS && good; i++) {
    good = halo_checkpoint_read_flat(c, "moment1", names[i], got.m1, offsets[i], counts[i]) == HALO_OK &&
           halo_checkpoint_read_flat(c, "moment2", names[i], got.m2, offsets[i], counts[i]) == HALO_OK;
  }
  good = good && same(want.weight[0], got.weight[0]) && same(want.weight[1], got.weight[1]) &&
         same(want.m1, got.m1) && same(want.m2, got.m2);
  halo_safetensors_free(s);
  free_model(&want);
  free_model(&got);
  return good;
}

/* Which version the newest usable checkpoint holds; -1 none, -2 a failure or a mix. */
static int newest(const char *dir) {
  halo_checkpoint *c = NULL;
  int version = -2;
  if (halo_checkpoint_latest(&c, dir, NULL, HALO_VERIFY_ALL) != HALO_OK) return -2;
  if (c == NULL) return -1;
  if (sscanf(halo_checkpoint_state(c), "{\"version\": %d", &version) != 1 || !holds(c, version)) version = -2;
  halo_checkpoint_free(c);
  return version;
}

static int count_names(const char *dir, const char *start) {
  halo__names list;
  int n = 0;
  if (halo__file_list(&list, "test", dir) != HALO_OK) return -1;
  for (int i = 0; i < list.n; i++) n += strncmp(list.name[i], start, strlen(start)) == 0;
  halo__names_free(&list);
  return n;
}

static void clear(const char *dir) { CHECK_OK(halo__file_remove_tree("test", dir, 4)); }

/* ---- plain use ------------------------------------------------------------------------------ */

static void hashes_are_right(void) {
  static const struct {
    const char *text, *hex;
  } vectors[] = {// FIPS 180-4 examples
                 {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
                 {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
                 {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
                  "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"}};
  char hex[65], other[65];
  halo__sha256 s;
  for (int portable = 0; portable < 2; portable++) {
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) {
      halo__sha256_init(&s, portable);
      halo__sha256_add(&s, vectors[i].text, strlen(vectors[i].text));
      halo__sha256_end(&s, hex);
      CHECK(strcmp(hex, vectors[i].hex) == 0);
    }
  }
  // The fast way equals the plain one for all lengths around blocks, in pieces of all sizes.
  static uint8_t data[700];
  for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)(halo_random_u64(1, 2, i) >> 8);
  for (size_t n = 0; n < sizeof data; n += 1 + n / 50) {
    halo__sha256_init(&s, true);
    halo__sha256_add(&s, data, n);
    halo__sha256_end(&s, hex);
    halo__sha256_init(&s, false);
    for (size_t from = 0, piece = 1; from < n; from += piece, piece = piece * 3 % 101 + 1) {
      halo__sha256_add(&s, data + from, piece < n - from ? piece : n - from);
    }
    halo__sha256_end(&s, other);
    CHECK(strcmp(hex, other) == 0);
  }
}

static void a_checkpoint_comes_back(void) {
  const char *dir = at("plain");
  halo_checkpoint *c = NULL;
  CHECK_OK(halo_checkpoint_latest(&c, dir, NULL, HALO_VERIFY_CHUNKS)); // no folder yet: nothing to resume
  CHECK(c == NULL);
  CHECK_OK(save(dir, 400, 7, 1));
  CHECK_OK(halo_checkpoint_latest(&c, dir, NULL, HALO_VERIFY_ALL));
  CHECK(c != NULL && holds(c, 7));
  CHECK(halo_checkpoint_step(c) == 400 && halo_checkpoint_world(c) == 1);
  CHECK(halo_checkpoint_report(c)[0] == 0);
  CHECK(halo_checkpoint_files(c) == 5 && strcmp(halo_checkpoint_file(c, 0), "config.json") == 0);
  CHECK(strcmp(halo_checkpoint_file(c, 4), "optim/rank-00000-of-00001.safetensors") == 0);
  CHECK(halo_checkpoint_file(c, 5) == NULL);
  char text[64];
  CHECK(halo_checkpoint_read_file(c, "config.json", text, 5) == 23);
  CHECK(halo_checkpoint_read_file(c, "config.json", text, sizeof text) == 23);
  CHECK(strcmp(text, "{\"model_type\":\"qwen2\"}\n") == 0);
  CHECK(halo_checkpoint_read_file(c, "absent", text, sizeof text) == HALO_EARG);
  CHECK(halo_checkpoint_parameters(c) == 2 * PARAMETERS);
  CHECK(halo_checkpoint_has(c, "moment1", "norm") && !halo_checkpoint_has(c, "moment3", "norm"));
  model m = make_model(0);
  CHECK_STATUS(halo_checkpoint_read_flat(c, "moment1", "absent", m.m1, 0, 1), HALO_EARG);
  CHECK_STATUS(halo_checkpoint_read_flat(c, "moment1", "norm", m.m1, 0, 2), HALO_EARG);
  CHECK_STATUS(halo_checkpoint_read_flat(c, "moment1", "norm", m.m1, ELEMENTS, 1), HALO_EARG);
  CHECK_STATUS(halo_checkpoint_read_flat(c, "moment1", "norm", m.weight[0], 0, 1), HALO_EARG);
  free_model(&m);
  halo_checkpoint_free(c);
  CHECK(access(at("plain/LATEST"), F_OK) == 0);
  CHECK(count_names(dir, "tmp-") == 0);
  // The same step again replaces it.
  CHECK_OK(save(dir, 400, 8, 2));
  CHECK(newest(dir) == 8 && count_names(dir, "step-") == 1 && count_names(dir, "tmp-") == 0);
  clear(dir);
}

static void the_collective_calls_work_alone(void) {
  const char *dir = at("alone");
  halo_comm *comms[3] = {NULL, NULL, NULL};
  CHECK_OK(halo_comm_self(&comms[1]));
  CHECK_OK(halo_comm_local(&comms[2], 4));
  for (int i = 0; i < 3; i++) {
    halo_checkpoint_writer *w = NULL;
    halo_checkpoint *c = NULL;
    model m = make_model(i);
    char state[64];
    snprintf(state, sizeof state, "{\"version\": %d, \"s\": \"\\u00e9\"}", i);
    CHECK_OK(halo_checkpoint_begin(&w, dir, 10 * i, comms[i], 1000));
    CHECK_OK(put(w, &m, 0));
    CHECK_OK(halo_checkpoint_commit(w, state));
    CHECK_STATUS(halo_checkpoint_commit(w, state), HALO_ESTATE);
    halo_checkpoint_writer_free(w);
    CHECK_OK(halo_checkpoint_latest(&c, dir, comms[i], HALO_VERIFY_CHUNKS));
    CHECK(c != NULL && holds(c, i) && halo_checkpoint_world(c) == 1);
    halo_checkpoint_free(c);
    free_model(&m);
  }
  // Failures are kept for commit, and leave what there was.
  halo_checkpoint_writer *w = NULL;
  CHECK_STATUS(halo_checkpoint_begin(&w, dir, 99, NULL, (int64_t)1 << 60), HALO_EIO); // no such disk
  CHECK(strstr(halo_error_message(), "GiB") != NULL);
  CHECK_STATUS(halo_checkpoint_begin(&w, at("no/such"), 99, NULL, 1), HALO_EIO);
  CHECK_STATUS(halo_checkpoint_begin(&w, dir, -1, NULL, 1), HALO_EARG);
  static const char *const wrong[] = {"../x", "", ".hidden", "a/b", "manifest.json", "optim", "a b"};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    CHECK_OK(halo_checkpoint_begin(&w, dir, 99, NULL, 1));
    CHECK_STATUS(halo_checkpoint_put_file(w, wrong[i], "x", 1), HALO_EARG);
    CHECK_STATUS(halo_checkpoint_put_file(w, "fine", "x", 1), HALO_EARG); // the first failure stays
    CHECK_STATUS(halo_checkpoint_commit(w, NULL), HALO_EARG);
    halo_checkpoint_writer_free(w);
  }
  CHECK_OK(halo_checkpoint_begin(&w, dir, 99, NULL, 1));
  CHECK_STATUS(halo_checkpoint_fail(w, HALO_ESTATE, "the state cannot be encoded"), HALO_ESTATE);
  CHECK_STATUS(halo_checkpoint_commit(w, NULL), HALO_ESTATE);
  CHECK(strstr(halo_error_message(), "cannot be encoded") != NULL);
  halo_checkpoint_writer_free(w);
  static const char *const states[] = {"", "{", "nul", "{\"a\":1}}", "{\"a\":\"\xff\"}"};
  for (size_t i = 0; i < sizeof states / sizeof *states; i++) {
    CHECK_OK(halo_checkpoint_begin(&w, dir, 99, NULL, 1));
    CHECK_STATUS(halo_checkpoint_commit(w, states[i]), HALO_ECORRUPT); // not JSON
    halo_checkpoint_writer_free(w);
  }
  CHECK(newest(dir) == 2 && count_names(dir, "tmp-") == 0);
  for (int i = 1; i < 3; i++) halo_comm_free(comms[i]);
  clear(dir);
}

/* Read by as many ranks as asked and save again as them. */
static void ranks_can_change(void) {
  static const int32_t worlds[][2] = {{4, 2}, {2, 4}, {4, 1}, {1, 4}, {3, 2}, {8, 3}, {1, 8}};
  const char *dir = at("ranks"), *again = at("again");
  for (size_t i = 0; i < sizeof worlds / sizeof *worlds; i++) {
    halo_checkpoint *c = NULL;
    CHECK_OK(save(dir, 1, 5, worlds[i][0]));
    CHECK_OK(halo_checkpoint_latest(&c, dir, NULL, HALO_VERIFY_CHUNKS));
    CHECK(c != NULL && holds(c, 5) && halo_checkpoint_world(c) == worlds[i][0]);
    halo_checkpoint_free(c);
    for (int32_t part = 0; part < worlds[i][1]; part++) { // each checks its share
      CHECK_OK(halo__checkpoint_open_part(&c, at("ranks/step-00000001"), part, worlds[i][1], HALO_VERIFY_ALL));
      halo_checkpoint_free(c);
    }
    // What W ranks save does not depend on how many loaded it: the same files again.
    CHECK_OK(save(again, 1, 5, worlds[i][0]));
    char command[1200];
    snprintf(command, sizeof command, "diff -r %s %s", dir, again);
    CHECK(system(command) == 0);
    clear(dir);
    clear(again);
  }
}

static void old_ones_are_pruned(void) {
  const char *dir = at("prune");
  int32_t removed = -1;
  for (int step = 1; step <= 9; step++) CHECK_OK(save(dir, step, step, 1));
  CHECK_STATUS(halo_checkpoint_prune(dir, 1, 0, NULL), HALO_EARG);
  CHECK_STATUS(halo_checkpoint_prune(dir, 2, -1, NULL), HALO_EARG);
  CHECK(truncate(at("prune/step-00000008/config.json"), 3) == 0); // damaged: neither kept nor removed
  CHECK_OK(halo_checkpoint_prune(dir, 2, 4, &removed));
  CHECK(removed == 5); // 7 and 9 are the newest whole ones, 4 is major, 8 is left for a look
  CHECK(count_names(dir, "step-") == 4 && access(at("prune/step-00000004"), F_OK) == 0);
  CHECK(access(at("prune/step-00000007"), F_OK) == 0 && access(at("prune/step-00000008"), F_OK) == 0);
  CHECK(newest(dir) == 9);
  clear(dir);
}

/* ---- crashes -------------------------------------------------------------------------------- */

static int64_t left;
static int die(halo__file_call call, const char *path, const char *to) {
  (void)call;
  (void)path;
  (void)to;
  return left-- > 0 ? 0 : EIO; // as seen from the disk, a dead process is one whose calls do nothing
}

static void a_crash_leaves_old_or_new(void) {
  // One rank or three; a new step or one that is there already; a clean folder or one with litter.
  for (int variant = 0; variant < 8; variant++) {
    const int32_t world = (variant & 1) != 0 ? 3 : 1;
    const int64_t step = (variant & 2) != 0 ? 1 : 2;
    const char *dir = at("crash");
    int n = 0, old = 0, new = 0;
    halo_status status = HALO_EIO;
    for (; status != HALO_OK && n < 2000; n++) {
      CHECK_OK(save(dir, 1, 1, world));
      halo__file_hook = die;
      left = 30;
      if ((variant & 4) != 0) CHECK_STATUS(save(dir, step, 2, world), HALO_EIO);
      left = n;
      status = save(dir, step, 2, world);
      halo__file_hook = NULL;
      const int now = newest(dir);
      CHECK(now == 1 || now == 2);
      CHECK(status != HALO_OK || now == 2);
      old += now == 1;
      new += now == 2;
      CHECK(count_names(dir, "tmp-") <= 1);
      clear(dir);
    }
    CHECK(status == HALO_OK && old > 30 && new >= 8); // among the new: cut off after the commit
  }
}

/* A disk that loses what was not synced when the power goes: data of files, names in folders. */
enum { JOURNAL = 512 };
static struct change {
  halo__file_call call;
  char path[256], to[256];
} journal[JOURNAL];
static int n_journal;

static void forget(int i) { memmove(&journal[i], &journal[i + 1], (size_t)(--n_journal - i) * sizeof *journal); }

static bool is_in(const char *path, const char *dir) {
  const size_t n = strlen(dir);
  return strncmp(path, dir, n) == 0 && path[n] == '/' && strchr(path + n + 1, '/') == NULL;
}

static int remember_changes(halo__file_call call, const char *path, const char *to) {
  if (left-- <= 0) return EIO;
  if (call == HALO__FILE_SYNC) {
    for (int i = n_journal - 1; i >= 0; i--) {
      const struct change *c = &journal[i];
      const bool is_data = c->call == HALO__FILE_WRITE && strcmp(c->path, path) == 0;
      const bool is_name = c->call != HALO__FILE_WRITE && is_in(c->path, path);
      if (is_data || is_name) forget(i);
    }
  } else if (call == HALO__FILE_MKDIR && access(path, F_OK) == 0) {
    return 0;
  } else if (call == HALO__FILE_WRITE || call == HALO__FILE_CREATE || call == HALO__FILE_MKDIR ||
             call == HALO__FILE_RENAME || call == HALO__FILE_EXCHANGE) {
    CHECK(n_journal < JOURNAL);
    struct change *c = &journal[n_journal++];
    c->call = call;
    snprintf(c->path, sizeof c->path, "%s", path);
    snprintf(c->to, sizeof c->to, "%s", to != NULL ? to : "");
    if (call == HALO__FILE_RENAME) { // what is pending inside a folder moves with it
      for (int i = 0; i < n_journal - 1; i++) {
        const size_t n = strlen(path);
        char moved[512];
        if (strncmp(journal[i].path, path, n) != 0 || journal[i].path[n] != '/') continue;
        snprintf(moved, sizeof moved, "%s%s", to, journal[i].path + n);
        snprintf(journal[i].path, sizeof journal[i].path, "%.255s", moved);
      }
    }
  }
  return 0;
}

static void lose_power(void) {
  for (int i = n_journal - 1; i >= 0; i--) {
    const struct change *c = &journal[i];
    struct stat s;
    if (c->call == HALO__FILE_WRITE && stat(c->path, &s) == 0) {
      CHECK(truncate(c->path, s.st_size / 2) == 0);
    } else if (c->call == HALO__FILE_RENAME) {
      rename(c->to, c->path);
    } else if (c->call == HALO__FILE_EXCHANGE) {
      renameat2(AT_FDCWD, c->path, AT_FDCWD, c->to, RENAME_EXCHANGE);
    } else if (c->call == HALO__FILE_CREATE || c->call == HALO__FILE_MKDIR) {
      halo__file_remove_tree("test", c->path, 3);
    }
  }
  n_journal = 0;
}

static void lost_power_leaves_old_or_new(void) {
  for (int again = 0; again < 2; again++) {
    const char *dir = at("power");
    halo_status status = HALO_EIO;
    int n = 0, old = 0;
    for (; status != HALO_OK && n < 2000; n++) {
      CHECK_OK(save(dir, 1, 1, 2));
      left = n;
      n_journal = 0;
      halo__file_hook = remember_changes;
      status = save(dir, again ? 1 : 2, 2, 2);
      halo__file_hook = NULL;
      lose_power();
      const int now = newest(dir);
      CHECK(now == 1 || now == 2);
      CHECK(status != HALO_OK || now == 2); // what was reported as saved is saved
      old += now == 1;
      clear(dir);
    }
    CHECK(status == HALO_OK && old > 40);
  }
}

/* One failing call is told, leaves the old checkpoint, and the next attempt works. */
static int fail_once_with;
static int fail_once(halo__file_call call, const char *path, const char *to) {
  (void)call;
  (void)path;
  (void)to;
  return left-- == 0 ? fail_once_with : 0;
}

static void a_failing_call_costs_one_attempt(void) {
  static const int codes[] = {EIO, ENOSPC, EDQUOT, EROFS};
  const char *dir = at("fail");
  CHECK_OK(save(dir, 1, 1, 2));
  const int64_t live = halo_memory_live_bytes(HALO_CPU, -1);
  int n = 0, failures = 0;
  for (left = 0; left <= 0 && n < 2000; n++) {
    left = n;
    fail_once_with = codes[n % 4];
    halo__file_hook = fail_once;
    const halo_status status = save(dir, 2, 2, 2);
    halo__file_hook = NULL;
    CHECK(status == HALO_OK || status == HALO_EIO);
    CHECK(halo_memory_live_bytes(HALO_CPU, -1) == live);
    failures += status != HALO_OK;
    CHECK(newest(dir) == 1 || newest(dir) == 2);
    CHECK(count_names(dir, "tmp-") <= 1);
    if (n % 8 == 0) {
      CHECK_OK(save(dir, 3, 3, 2)); // the attempt after it
      CHECK(newest(dir) == 3 && count_names(dir, "tmp-") == 0);
      clear(at("fail/step-00000003"));
    }
    clear(at("fail/step-00000002"));
  }
  CHECK(failures > 30);
  clear(dir);
}

static void the_injector_counts(void) {
  const char *dir = at("inject");
  CHECK_OK(save(dir, 1, 1, 1));
  CHECK_STATUS(halo_checkpoint_fail_after(-1, HALO_FAULT_ONCE), HALO_EARG);
  CHECK_STATUS(halo_checkpoint_fail_after(0, 9), HALO_EARG);
  CHECK_OK(halo_checkpoint_fail_after(4, HALO_FAULT_ONCE));
  CHECK_STATUS(save(dir, 2, 2, 1), HALO_EIO);
  CHECK_OK(save(dir, 2, 2, 1));
  CHECK_OK(halo_checkpoint_fail_after(4, HALO_FAULT_FOREVER));
  CHECK_STATUS(save(dir, 3, 3, 1), HALO_EIO);
  CHECK_STATUS(save(dir, 3, 3, 1), HALO_EIO);
  CHECK_OK(halo_checkpoint_fail_after(0, HALO_FAULT_NONE));
  CHECK(newest(dir) == 2);
  CHECK_OK(save(dir, 3, 3, 1));
  CHECK(newest(dir) == 3);
  clear(dir);
}

static void failing_allocations_leak_nothing(void) {
  const char *dir = at("memory");
  CHECK_OK(save(dir, 1, 1, 1));
  model m = make_model(2);
  const int64_t live = halo_memory_live_bytes(HALO_CPU, -1);
  halo_status status = HALO_ENOMEM;
  int64_t n = 0;
  for (; status != HALO_OK && n < 2000; n++) {
    halo_checkpoint_writer *w = NULL;
    halo_checkpoint *c = NULL;
    halo_memory_fail_after(n);
    status = halo_checkpoint_begin(&w, dir, 2, NULL, 1000);
    if (status == HALO_OK) {
      put(w, &m, 0);
      status = halo_checkpoint_commit(w, "{\"version\": 2, \"s\": \"\\u00e9\"}");
    }
    if (status == HALO_OK) status = halo_checkpoint_latest(&c, dir, NULL, HALO_VERIFY_ALL);
    halo_memory_fail_after(-1);
    CHECK(status == HALO_OK || status == HALO_ENOMEM);
    halo_checkpoint_writer_free(w);
    halo_checkpoint_free(c);
    CHECK(halo_memory_live_bytes(HALO_CPU, -1) == live);
  }
  CHECK(status == HALO_OK && n > 40);
  CHECK(newest(dir) == 2);
  free_model(&m);
  clear(dir);
}

/* ---- damage --------------------------------------------------------------------------------- */

static char *read_all(const char *path, int64_t *n) {
  char *text = NULL;
  CHECK_OK(halo__file_slurp(&text, n, "test", path, 1 << 30, false));
  return text;
}

static void write_all(const char *path, const char *bytes, int64_t n) {
  const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  CHECK(fd >= 0 && write(fd, bytes, (size_t)n) == n);
  close(fd);
}

static void every_damaged_byte_is_seen(void) {
  const char *dir = at("damage"), *all = getenv("HALO_TEST_ALL");
  const bool is_full = all != NULL && all[0] == '1';
  halo_checkpoint *c = NULL;
  int64_t cases = 0, missed = 0, wrong_code = 0;
  CHECK_OK(save(dir, 1, 1, 1)); // to fall back to
  CHECK_OK(save(dir, 2, 2, 2));
  CHECK_OK(halo_checkpoint_latest(&c, dir, NULL, HALO_VERIFY_CHUNKS));
  const int32_t n_files = halo_checkpoint_files(c) + 1;
  char paths[16][512];
  for (int32_t f = 0; f < n_files; f++) {
    snprintf(paths[f], sizeof paths[f], "%s/step-00000002/%s", dir,
             f + 1 < n_files ? halo_checkpoint_file(c, f) : "manifest.json");
  }
  halo_checkpoint_free(c);
  for (int32_t f = 0; f < n_files; f++) {
    int64_t n = 0;
    char *bytes = read_all(paths[f], &n);
    for (int64_t i = 0; i < n; i += is_full ? 1 : 1 + (int64_t)(halo_random_u64(3, (uint64_t)f, (uint64_t)i) % 5)) {
      for (int kind = 0; kind < 4; kind++) {
        char *copy = malloc((size_t)n);
        memcpy(copy, bytes, (size_t)n);
        int64_t length = n;
        if (kind == 0) length = i;
        if (kind == 1) copy[i] ^= (char)(1 << (i % 8));
        if (kind == 2) copy[i] = 0;
        if (kind == 3) copy[i] = (char)0xff;
        if (length != n || memcmp(copy, bytes, (size_t)n) != 0) {
          write_all(paths[f], copy, length);
          const halo_status status = halo__checkpoint_open_part(&c, at("damage/step-00000002"), 0, 1, HALO_VERIFY_CHUNKS);
          missed += status == HALO_OK;
          wrong_code += status != HALO_ECORRUPT && status != HALO_OK;
          if (status == HALO_OK) halo_checkpoint_free(c);
          cases++;
        }
        free(copy);
      }
    }
    if (f % 3 == 0) CHECK(newest(dir) == 1); // the last damage is still there
    write_all(paths[f], bytes, n);
    halo__free(bytes);
    CHECK(newest(dir) == 2);
  }
  fprintf(stderr, "  %lld damaged checkpoints, %lld passed\n", (long long)cases, (long long)missed);
  CHECK(cases > 3000 && missed == 0 && wrong_code == 0);
  clear(dir);
}

static void exchange(const char *a, const char *b) {
  CHECK(renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE) == 0);
}

static void foreign_files_are_seen(void) {
  const char *dir = at("foreign"), *two = at("foreign/step-00000002");
  halo_checkpoint *c = NULL;
  char optim[2][512];
  CHECK_OK(save(dir, 1, 1, 2));
  CHECK_OK(save(dir, 2, 2, 2));
  snprintf(optim[0], sizeof optim[0], "%s/optim/rank-00000-of-00002.safetensors", two);
  snprintf(optim[1], sizeof optim[1], "%s/optim/rank-00001-of-00002.safetensors", two);
  exchange(optim[0], optim[1]); // swapped ranks
  CHECK_STATUS(halo_checkpoint_open(&c, two, NULL, HALO_VERIFY_CHUNKS), HALO_ECORRUPT);
  exchange(optim[0], optim[1]);
  // The same rank and the same length, of another step.
  exchange(optim[0], at("foreign/step-00000001/optim/rank-00000-of-00002.safetensors"));
  CHECK_STATUS(halo_checkpoint_open(&c, two, NULL, HALO_VERIFY_CHUNKS), HALO_ECORRUPT);
  CHECK(strstr(halo_error_message(), "moment") != NULL); // says which tensor
  exchange(optim[0], at("foreign/step-00000001/optim/rank-00000-of-00002.safetensors"));
  CHECK(newest(dir) == 2);
  exchange(at("foreign/step-00000002/manifest.json"), at("foreign/step-00000001/manifest.json"));
  CHECK_STATUS(halo_checkpoint_open(&c, two, NULL, HALO_VERIFY_CHUNKS), HALO_ECORRUPT);
  exchange(at("foreign/step-00000002/manifest.json"), at("foreign/step-00000001/manifest.json"));
  CHECK(link(optim[0], at("foreign/step-00000002/optim/rank-00002-of-00003.safetensors")) == 0); // one more
  CHECK_STATUS(halo_checkpoint_open(&c, two, NULL, HALO_VERIFY_CHUNKS), HALO_ECORRUPT);
  CHECK(unlink(at("foreign/step-00000002/optim/rank-00002-of-00003.safetensors")) == 0);
  write_all(at("foreign/step-00000002/model.safetensors"), "x", 1); // Transformers would take this one
  CHECK_STATUS(halo_checkpoint_open(&c, two, NULL, HALO_VERIFY_CHUNKS), HALO_ECORRUPT);
  CHECK(unlink(at("foreign/step-00000002/model.safetensors")) == 0);
  write_all(at("foreign/step-00000002/README.md"), "x", 1); // harmless
  CHECK_OK(halo_checkpoint_open(&c, two, NULL, HALO_VERIFY_CHUNKS));
  halo_checkpoint_free(c);
  CHECK(rename(optim[1], at("foreign/away")) == 0);
  CHECK_STATUS(halo_checkpoint_open(&c, two, NULL, HALO_VERIFY_CHUNKS), HALO_ECORRUPT);
  CHECK(symlink(at("foreign/away"), optim[1]) == 0);
  CHECK_STATUS(halo_checkpoint_open(&c, two, NULL, HALO_VERIFY_CHUNKS), HALO_ECORRUPT);
  CHECK_OK(halo_checkpoint_latest(&c, dir, NULL, HALO_VERIFY_CHUNKS));
  CHECK(c != NULL && holds(c, 1) && strstr(halo_checkpoint_report(c), "skipped step 2 (HALO_ECORRUPT)") != NULL);
  halo_checkpoint_free(c);
  CHECK_OK(halo_checkpoint_open(&c, at("foreign/step-00000001"), NULL, HALO_VERIFY_SIZES));
  halo_checkpoint_free(c);
  CHECK_STATUS(halo_checkpoint_open(&c, two, NULL, HALO_VERIFY_SIZES), HALO_ECORRUPT);
  CHECK_STATUS(halo_checkpoint_open(&c, two, NULL, 3), HALO_EARG);
  // Nothing usable at all is an error that says so, not "nothing to resume".
  CHECK(unlink(at("foreign/step-00000001/manifest.json")) == 0);
  CHECK_STATUS(halo_checkpoint_latest(&c, dir, NULL, HALO_VERIFY_CHUNKS), HALO_EIO);
  CHECK(strstr(halo_error_message(), "none of the 2 checkpoints") != NULL);
  clear(dir);
}

/* A checkpoint with right seals and hashes whose optimizer file holds runs of these names and lengths. */
static halo_status forge(const char *dir, const char *const *run, const int64_t *length, int n) {
  char path[512];
  halo_safetensors_writer *w = NULL;
  halo__written written;
  halo__manifest m = {.step = 1, .world = 1};
  halo__text text = {0};
  halo__digest digest = {0};
  CHECK_OK(halo__file_mkdir("test", dir));
  snprintf(path, sizeof path, "%s/optim", dir);
  CHECK_OK(halo__file_mkdir("test", path));
  CHECK_OK(halo_safetensors_writer_new(&w));
  for (int i = 0; i < n; i++) {
    halo_tensor *t = NULL;
    CHECK_OK(halo_tensor_zeros(&t, HALO_F32, HALO_CPU, 1, &length[i]));
    CHECK_OK(halo_safetensors_writer_add(w, run[i], t, NULL));
    halo_tensor_free(t);
  }
  CHECK_OK(halo__safetensors_write(&written, w, "test", path, "rank-00000-of-00001", 0, true));
  CHECK_OK(halo__manifest_add(&m, "optim/rank-00000-of-00001.safetensors", &written.file[0].digest));
  CHECK_OK(halo__scratch((void **)&m.state, 3, 1));
  strcpy(m.state, "{}");
  CHECK_OK(halo__manifest_write(&text, &m));
  snprintf(path, sizeof path, "%s/manifest.json", dir);
  CHECK_OK(halo__file_write("test", path, text.text, (int64_t)text.n, &digest));
  halo__digest_free(&digest);
  halo__text_free(&text);
  halo__manifest_free(&m);
  halo__written_free(&written);
  halo_safetensors_writer_free(w);
  halo_checkpoint *c = NULL;
  halo_tensor *flat = NULL;
  halo_status status = halo_checkpoint_open(&c, dir, NULL, HALO_VERIFY_ALL);
  CHECK_OK(halo_tensor_zeros(&flat, HALO_F32, HALO_CPU, 1, (int64_t[]){10}));
  if (status == HALO_OK) status = halo_checkpoint_read_flat(c, "m", "p", flat, 0, 10);
  halo_tensor_free(flat);
  halo_checkpoint_free(c);
  clear(dir);
  return status;
}

static void runs_must_cover_once(void) {
  static const struct {
    const char *family, *run[3];
    int64_t length[3];
    int n;
    halo_status wanted;
  } cases[] = {
      {"whole", {"m/p@0"}, {10}, 1, HALO_OK},
      {"three runs", {"m/p@7", "m/p@0", "m/p@3"}, {3, 3, 4}, 3, HALO_OK},
      {"a slash in the name", {"m/p@0", "m/p/q@0"}, {10, 1}, 2, HALO_OK},
      {"gap", {"m/p@0", "m/p@6"}, {5, 4}, 2, HALO_ECORRUPT},
      {"start missing", {"m/p@1"}, {9}, 1, HALO_ECORRUPT},
      {"end missing", {"m/p@0"}, {9}, 1, HALO_EARG},
      {"too long", {"m/p@0"}, {11}, 1, HALO_EARG},
      {"overlap", {"m/p@0", "m/p@4"}, {5, 6}, 2, HALO_ECORRUPT},
      {"doubled", {"m/p@0", "m/p@00"}, {10, 10}, 2, HALO_ECORRUPT},
      {"absent", {"m/q@0"}, {10}, 1, HALO_EARG},
      {"no position", {"m/p"}, {10}, 1, HALO_ECORRUPT},
      {"no kind", {"p@0"}, {10}, 1, HALO_ECORRUPT},
      {"negative position", {"m/p@-1"}, {10}, 1, HALO_ECORRUPT},
      {"huge position", {"m/p@9999999999999999999"}, {10}, 1, HALO_ECORRUPT},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const halo_status got = forge(at("forged"), cases[i].run, cases[i].length, cases[i].n);
    if (got != cases[i].wanted) fprintf(stderr, "  %s: got %s\n", cases[i].family, halo_status_name(got));
    CHECK(got == cases[i].wanted);
  }
}

/* Seal a manifest's text anew, as an attacker or a later version would. */
static halo_status parse_sealed(const char *body) {
  halo__manifest m = {0};
  halo__sha256 s;
  char hex[65], *text = malloc(strlen(body) + 200);
  halo__sha256_init(&s, false);
  halo__sha256_add(&s, body, strlen(body));
  halo__sha256_end(&s, hex);
  const int n = sprintf(text, "%s  \"manifest_sha256\": \"%s\"\n}\n", body, hex);
  const halo_status status = halo__manifest_parse(&m, "text", text, n);
  if (status == HALO_OK) halo__manifest_free(&m);
  free(text);
  return status;
}

#define HASH "\"sha256\":\"0000000000000000000000000000000000000000000000000000000000000000\""
#define FILE_OF(name) "{\"name\":\"" name "\",\"bytes\":1," HASH ",\"chunks\":\"0123456789abcdef\"}"
#define BODY(version, step, world, files)                                                 \
  "{\"format\":\"halo-checkpoint\",\"version\":" version ",\"step\":" step ",\"world\":" world \
  ",\"files\":[" files "],\"state\":{},\n"

static void manifests_are_judged_rightly(void) {
  static const struct {
    const char *family, *body;
    halo_status wanted;
  } cases[] = {
      {"plain", BODY("1", "4", "2", FILE_OF("a") "," FILE_OF("optim/b")), HALO_OK},
      {"no files", BODY("1", "0", "1", ""), HALO_OK},
      {"a newer version", "{\"format\":\"halo-checkpoint\",\"version\":2,\"unheard\":[],\n", HALO_EVERSION},
      {"version 0", BODY("0", "4", "2", ""), HALO_ECORRUPT},
      {"another format", "{\"format\":\"x\",\"version\":1,\"step\":1,\"world\":1,\"files\":[],\n", HALO_ECORRUPT},
      {"version last", "{\"format\":\"halo-checkpoint\",\"step\":1,\"version\":1,\n", HALO_ECORRUPT},
      {"step missing", "{\"format\":\"halo-checkpoint\",\"version\":1,\"world\":1,\"files\":[],\n", HALO_ECORRUPT},
      {"negative step", BODY("1", "-4", "2", ""), HALO_ECORRUPT},
      {"huge world", BODY("1", "4", "2147483648", ""), HALO_ECORRUPT},
      {"world 0", BODY("1", "4", "0", ""), HALO_ECORRUPT},
      {"float step", BODY("1", "4.0", "1", ""), HALO_ECORRUPT},
      {"traversal", BODY("1", "4", "2", FILE_OF("../a")), HALO_ECORRUPT},
      {"absolute", BODY("1", "4", "2", FILE_OF("/a")), HALO_ECORRUPT},
      {"deep", BODY("1", "4", "2", FILE_OF("a/b/c")), HALO_ECORRUPT},
      {"dots inside", BODY("1", "4", "2", FILE_OF("optim/..")), HALO_ECORRUPT},
      {"NUL", BODY("1", "4", "2", FILE_OF("a\\u0000b")), HALO_ECORRUPT},
      {"file twice", BODY("1", "4", "2", FILE_OF("a") "," FILE_OF("a")), HALO_ECORRUPT},
      {"field twice", BODY("1", "4", "2", "{\"name\":\"a\",\"name\":\"b\",\"bytes\":1," HASH ",\"chunks\":\"\"}"),
       HALO_ECORRUPT},
      {"too few chunks", BODY("1", "4", "2", "{\"name\":\"a\",\"bytes\":1," HASH ",\"chunks\":\"\"}"), HALO_ECORRUPT},
      {"too many chunks", BODY("1", "4", "2", "{\"name\":\"a\",\"bytes\":0," HASH ",\"chunks\":\"0123456789abcdef\"}"),
       HALO_ECORRUPT},
      {"chunks in capitals", BODY("1", "4", "2", "{\"name\":\"a\",\"bytes\":1," HASH ",\"chunks\":\"0123456789ABCDEF\"}"),
       HALO_ECORRUPT},
      {"short hash", BODY("1", "4", "2", "{\"name\":\"a\",\"bytes\":0,\"sha256\":\"00\",\"chunks\":\"\"}"), HALO_ECORRUPT},
      {"huge file", BODY("1", "4", "2", "{\"name\":\"a\",\"bytes\":9223372036854775807," HASH ",\"chunks\":\"\"}"),
       HALO_ECORRUPT},
      {"unknown field", BODY("1", "4", "2", "{\"x\":1}"), HALO_ECORRUPT},
      {"file is a string", BODY("1", "4", "2", "\"a\""), HALO_ECORRUPT},
      {"empty file", BODY("1", "4", "2", "{}"), HALO_ECORRUPT},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const halo_status got = parse_sealed(cases[i].body);
    if (got != cases[i].wanted) fprintf(stderr, "  %s: got %s\n", cases[i].family, halo_status_name(got));
    CHECK(got == cases[i].wanted);
  }
  halo__manifest m;
  char text[] = "{}";
  CHECK_STATUS(halo__manifest_parse(&m, "text", text, 2), HALO_ECORRUPT);
}

int main(void) {
  if (mkdtemp(folder) == NULL) {
    snprintf(folder, sizeof folder, "/tmp/halo-checkpoint-XXXXXX");
    if (mkdtemp(folder) == NULL) return 1;
  }
  RUN(hashes_are_right);
  RUN(a_checkpoint_comes_back);
  RUN(the_collective_calls_work_alone);
  RUN(ranks_can_change);
  RUN(old_ones_are_pruned);
  RUN(a_crash_leaves_old_or_new);
  RUN(lost_power_leaves_old_or_new);
  RUN(a_failing_call_costs_one_attempt);
  RUN(the_injector_counts);
  RUN(failing_allocations_leak_nothing);
  RUN(every_damaged_byte_is_seen);
  RUN(foreign_files_are_seen);
  RUN(runs_must_cover_once);
  RUN(manifests_are_judged_rightly);
  clear(folder);
  return check_report();
}
