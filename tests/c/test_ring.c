/* Schedules: every generator passes the checker for all ring sizes, and the checker sees planted
 * faults. The executor: what a pass delivers, over local ranks. */
#include "check.h"

#include "ring.h"
#include "schedule.h"

static void every_schedule_is_sound(void) {
  for (int W = 1; W <= 33; W++) {
    CHECK_OK(halo_ring_check(HALO_SCHEDULE_FLAT, W, 0));
    CHECK_OK(halo_ring_check(HALO_SCHEDULE_GATHER, W, 0));
    for (int L = 1; L <= W; L++) {
      if (W % L == 0) CHECK_OK(halo_ring_check(HALO_SCHEDULE_HIERARCHICAL, W, L));
    }
  }
  CHECK_OK(halo_ring_check(HALO_SCHEDULE_HIERARCHICAL, 96, 8));
  CHECK_OK(halo_ring_check(HALO_SCHEDULE_FLAT, 130, 0)); // more ranks than bits in a word
}

static void bad_schedules_are_refused(void) {
  CHECK_STATUS(halo_ring_check(HALO_SCHEDULE_HIERARCHICAL, 6, 4), HALO_EARG);
  CHECK(strstr(halo_error_message(), "inner ring of 4") != NULL);
  CHECK_STATUS(halo_ring_check(HALO_SCHEDULE_HIERARCHICAL, 6, 0), HALO_EARG);
  CHECK_STATUS(halo_ring_check(HALO_SCHEDULE_FLAT, 0, 0), HALO_EARG);
  CHECK_STATUS(halo_ring_check(7, 4, 0), HALO_EARG);
}

enum { MAX_WORLD = 6 };

/* Change one field of one row of one rank's table in every way; the checker must object each time.
 * A change that leaves a sound table would be a hole in the checker or a row without a purpose. */
static int64_t undetected(int schedule, int W, int L, bool is_backward, int64_t *tried) {
  halo__schedule *tables[MAX_WORLD];
  int64_t missed = 0;
  for (int r = 0; r < W; r++) {
    CHECK_OK(halo__schedule_new(&tables[r], schedule, W, L, r, is_backward));
  }
  CHECK_OK(halo__schedule_check(tables, W));
  for (int r = 0; r < W; r++) {
    for (int k = 0; k < tables[r]->n_rows; k++) {
      halo__schedule_row *row = &tables[r]->rows[k], saved = *row;
      int32_t *fields[] = {&row->source, &row->to,      &row->from,
                           &row->slot,   &row->slot_in, &row->event};
      for (int f = 0; f < 6; f++) {
        int32_t value = *fields[f];
        if (value < 0) continue; // not used by this kind of row
        for (int32_t other = -1; other <= value + 1; other++) {
          if (other == value) continue;
          *fields[f] = other;
          (*tried)++;
          if (halo__schedule_check(tables, W) == HALO_OK) missed++;
          *row = saved;
        }
      }
    }
  }
  for (int r = 0; r < W; r++) halo__schedule_free(tables[r]);
  return missed;
}

/* A row dropped on all ranks alike: a skipped hop, wait, sum or step. */
static int64_t undetected_drops(int schedule, int W, int L, bool is_backward, int64_t *tried) {
  int64_t missed = 0;
  for (int k = 0;; k++) {
    halo__schedule *tables[MAX_WORLD];
    for (int r = 0; r < W; r++) {
      CHECK_OK(halo__schedule_new(&tables[r], schedule, W, L, r, is_backward));
    }
    bool is_done = k >= tables[0]->n_rows;
    bool is_columns = !is_done && tables[0]->rows[k].kind <= HALO__ROW_RETURN_COLUMNS;
    for (int r = 0; r < W && !is_done; r++) {
      halo__schedule *s = tables[r];
      memmove(&s->rows[k], &s->rows[k + 1], (size_t)(s->n_rows - k - 1) * sizeof *s->rows);
      s->n_rows--;
    }
    if (!is_done && !is_columns) {
      (*tried)++;
      if (halo__schedule_check(tables, W) == HALO_OK) missed++;
    }
    for (int r = 0; r < W; r++) halo__schedule_free(tables[r]);
    if (is_done) return missed;
  }
}

static void the_checker_sees_every_fault(void) {
  struct { int schedule, W, L; } cases[] = {
      {HALO_SCHEDULE_FLAT, 2, 0},         {HALO_SCHEDULE_FLAT, 4, 0},
      {HALO_SCHEDULE_HIERARCHICAL, 4, 2}, {HALO_SCHEDULE_HIERARCHICAL, 6, 3},
      {HALO_SCHEDULE_HIERARCHICAL, 3, 1}, {HALO_SCHEDULE_GATHER, 4, 0},
  };
  int64_t tried = 0;
  for (int i = 0; i < 6; i++) {
    for (int backward = 0; backward < 2; backward++) {
      CHECK(undetected(cases[i].schedule, cases[i].W, cases[i].L, backward, &tried) == 0);
      CHECK(undetected_drops(cases[i].schedule, cases[i].W, cases[i].L, backward, &tried) == 0);
    }
  }
  CHECK(tried > 5000);
  fprintf(stderr, "  %lld faults planted\n", (long long)tried);
}

/* ---- the executor --------------------------------------------------------------------------- */

/* Keys of rank r are {r + 1}; a step's gradient of source s is 10^s * (rank + 1)-like, so that the
 * sum at the end tells which parts arrived. */
typedef struct probe {
  int W, computed[MAX_WORLD][MAX_WORLD], columns[3];
  int fail_at_source;
  double gradient[MAX_WORLD];
} probe;

static halo_status probe_load(void *context, int32_t here, void *kv) {
  (void)context;
  *(int32_t *)kv = here + 1;
  return HALO_OK;
}

static halo_status probe_compute(void *context, int32_t here, int32_t source, const void *kv,
                                 void *dkv) {
  probe *p = context;
  p->computed[here][source] += *(const int32_t *)kv == source + 1;
  if (dkv != NULL) *(double *)dkv = 100.0 * (source + 1) + (1 << here);
  return source == p->fail_at_source ? halo__error(HALO_ENOMEM, "probe") : HALO_OK;
}

static halo_status probe_store(void *context, int32_t here, void *dkv) {
  ((probe *)context)->gradient[here] = *(const double *)dkv;
  return HALO_OK;
}

static halo_status probe_fetch(void *context) { return ((probe *)context)->columns[0]++, HALO_OK; }
static halo_status probe_columns(void *context) {
  return ((probe *)context)->columns[1]++, HALO_OK;
}
static halo_status probe_return(void *context) { return ((probe *)context)->columns[2]++, HALO_OK; }

static void a_pass_delivers(void) {
  struct { int schedule, W, L; } cases[] = {
      {HALO_SCHEDULE_FLAT, 1, 0},         {HALO_SCHEDULE_FLAT, 5, 0},
      {HALO_SCHEDULE_HIERARCHICAL, 6, 2}, {HALO_SCHEDULE_HIERARCHICAL, 6, 3},
      {HALO_SCHEDULE_GATHER, 5, 0},
  };
  for (int i = 0; i < 5; i++) {
    int W = cases[i].W;
    halo_comm *comm;
    halo_ring *ring;
    CHECK_OK(halo_comm_local(&comm, W));
    CHECK_OK(halo_ring_new(&ring, comm, cases[i].schedule, cases[i].L));
    CHECK(halo_ring_world(ring) == W && halo_ring_here(ring) == W && halo_ring_steps(ring) == W);
    for (int backward = 0; backward < 2; backward++) {
      probe p = {.W = W, .fail_at_source = -1};
      halo__ring_pass pass = {.is_backward = backward == 1, .kv_bytes = 4, .dkv_count = 1,
                              .dkv_dtype = HALO_F64, .context = &p, .load = probe_load,
                              .compute = probe_compute, .store = probe_store,
                              .fetch_columns = probe_fetch, .compute_columns = probe_columns,
                              .return_columns = probe_return};
      CHECK_OK(halo__ring_run(ring, &pass));
      for (int r = 0; r < W; r++) {
        for (int s = 0; s < W; s++) CHECK(p.computed[r][s] == 1);
        if (backward) CHECK(p.gradient[r] == 100.0 * (r + 1) * W + (1 << W) - 1);
      }
      CHECK(p.columns[0] == 1 && p.columns[1] == 1 && p.columns[2] == backward);
      p.fail_at_source = W - 1; // an error comes out, and local ranks can go on
      CHECK_STATUS(halo__ring_run(ring, &pass), HALO_ENOMEM);
      p.fail_at_source = -1;
      CHECK_OK(halo__ring_run(ring, &pass));
    }
    halo_ring_free(ring);
    halo_comm_free(comm);
  }
  halo_ring_free(NULL);
}

/* The public view of the table agrees with the table. */
static void sources_and_text(void) {
  struct { int schedule, W, L; } cases[] = {
      {HALO_SCHEDULE_FLAT, 4, 0}, {HALO_SCHEDULE_HIERARCHICAL, 6, 3}, {HALO_SCHEDULE_GATHER, 3, 0}};
  for (int i = 0; i < 3; i++) {
    int W = cases[i].W;
    halo_comm *comm;
    halo_ring *ring;
    CHECK_OK(halo_comm_local(&comm, W));
    CHECK_OK(halo_ring_new(&ring, comm, cases[i].schedule, cases[i].L));
    for (int r = 0; r < W; r++) {
      halo__schedule *s;
      CHECK_OK(halo__schedule_new(&s, cases[i].schedule, W, cases[i].L, r, true));
      for (int k = 0; k < s->n_rows; k++) {
        if (s->rows[k].kind != HALO__ROW_COMPUTE) continue;
        CHECK(halo_ring_source(ring, r, s->rows[k].step) == s->rows[k].source);
      }
      halo__schedule_free(s);
    }
    CHECK(halo_ring_source(ring, W, 0) == -1 && halo_ring_source(ring, 0, W) == -1);
    char text[8192], small[16];
    int64_t length = halo_ring_explain(ring, text, sizeof text);
    CHECK(length == (int64_t)strlen(text));
    CHECK(strstr(text, "backward, rank 0 of") != NULL);
    CHECK(halo_ring_explain(ring, small, sizeof small) == length);
    CHECK(strlen(small) == sizeof small - 1 && strncmp(small, text, sizeof small - 1) == 0);
    halo_ring_free(ring);
    halo_comm_free(comm);
  }
}

int main(void) {
  RUN(every_schedule_is_sound);
  RUN(bad_schedules_are_refused);
  RUN(the_checker_sees_every_fault);
  RUN(a_pass_delivers);
  RUN(sources_and_text);
  return check_report();
}
