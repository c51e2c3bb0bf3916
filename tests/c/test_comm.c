/* Collectives over self and local ranks; over MPI ranks when a launcher started several (tests/spec
 * runs this program under mpirun). Each test makes per-rank data from the rank alone, so that every
 * rank knows what all others hold and checks its own result. */
#include "check.h"

#include "comm.h"

enum { MAX_HERE = 9 };

static halo_comm *comm; /* the communicator at hand */

typedef struct buffers {
  void *p[MAX_HERE];
} buffers;

static buffers make(size_t bytes) {
  buffers b = {{0}};
  for (int i = 0; i < halo_comm_here(comm); i++) b.p[i] = calloc(1, bytes + 1);
  return b;
}

static void drop(buffers b) {
  for (int i = 0; i < MAX_HERE; i++) free(b.p[i]);
}

static int rank_of(int i) { return halo_comm_rank(comm) + i; }

/* A value with many mantissa bits, so that the order of additions shows. */
static float sample(int rank, int64_t i) {
  return sinf((float)(rank + 1) * 1.7f + (float)(i % 4099) * 0.37f);
}

static void sums_in_rank_order(void) {
  int64_t counts[] = {0, 1, 2, 7, 1000, 5000003};
  for (int k = 0; k < 6; k++) {
    int64_t n = counts[k];
    if (n > 1000 && halo_comm_size(comm) > 4) continue; // slicing needs one run with many elements
    buffers b = make((size_t)n * sizeof(float));
    for (int i = 0; i < halo_comm_here(comm); i++) {
      for (int64_t j = 0; j < n; j++) ((float *)b.p[i])[j] = sample(rank_of(i), j);
    }
    CHECK_OK(halo_comm_all_reduce(comm, b.p, n, HALO_F32));
    int64_t wrong = 0;
    for (int64_t j = 0; j < n; j++) {
      float sum = sample(0, j);
      for (int r = 1; r < halo_comm_size(comm); r++) sum += sample(r, j);
      for (int i = 0; i < halo_comm_here(comm); i++) wrong += ((float *)b.p[i])[j] != sum;
    }
    CHECK(wrong == 0);
    drop(b);
  }
}

static void sums_and_maxima_of_other_types(void) {
  enum { N = 11 };
  int W = halo_comm_size(comm);
  buffers b = make(N * 8);
  for (int i = 0; i < halo_comm_here(comm); i++) {
    for (int j = 0; j < N; j++) ((int64_t *)b.p[i])[j] = (int64_t)rank_of(i) * 1000003 - j;
  }
  CHECK_OK(halo_comm_all_reduce(comm, b.p, N, HALO_I64));
  for (int i = 0; i < halo_comm_here(comm); i++) {
    for (int j = 0; j < N; j++) {
      CHECK(((int64_t *)b.p[i])[j] == (int64_t)W * (W - 1) / 2 * 1000003 - (int64_t)j * W);
    }
    for (int j = 0; j < N; j++) ((double *)b.p[i])[j] = (rank_of(i) + j) % W - 0.5;
  }
  CHECK_OK(halo_comm_all_reduce_max(comm, b.p, N, HALO_F64));
  for (int i = 0; i < halo_comm_here(comm); i++) {
    for (int j = 0; j < N; j++) CHECK(((double *)b.p[i])[j] == W - 1.5);
    for (int j = 0; j < N; j++) ((float *)b.p[i])[j] = rank_of(i) == W / 2 ? NAN : 1;
  }
  CHECK_OK(halo_comm_all_reduce_max(comm, b.p, N, HALO_F32));
  for (int i = 0; i < halo_comm_here(comm); i++) CHECK(isnan(((float *)b.p[i])[N - 1]));
  CHECK_STATUS(halo_comm_all_reduce(comm, b.p, N, HALO_BF16), HALO_EARG);
  drop(b);
}

static void broadcast_from_every_root(void) {
  int64_t sizes[] = {0, 1, 5, 4099};
  for (int root = 0; root < halo_comm_size(comm); root++) {
    for (int k = 0; k < 4; k++) {
      int64_t n = sizes[k], wrong = 0;
      buffers b = make((size_t)n);
      for (int i = 0; i < halo_comm_here(comm); i++) {
        for (int64_t j = 0; j < n; j++) ((uint8_t *)b.p[i])[j] = (uint8_t)(j * 7 + rank_of(i));
      }
      CHECK_OK(halo_comm_broadcast(comm, b.p, n, root));
      for (int i = 0; i < halo_comm_here(comm); i++) {
        for (int64_t j = 0; j < n; j++) {
          wrong += ((uint8_t *)b.p[i])[j] != (uint8_t)(j * 7 + root);
        }
      }
      CHECK(wrong == 0);
      drop(b);
    }
  }
  buffers none = make(1);
  CHECK_STATUS(halo_comm_broadcast(comm, none.p, 1, halo_comm_size(comm)), HALO_EARG);
  drop(none);
}

static void gathers_and_exchanges(void) {
  int W = halo_comm_size(comm);
  enum { N = 5 };
  buffers in = make((size_t)(N * W)), out = make((size_t)(N * W) + (size_t)(W * W));
  int64_t bytes[MAX_HERE + 8];
  for (int r = 0; r < W; r++) bytes[r] = r % 3; // some rank sends nothing
  for (int i = 0; i < halo_comm_here(comm); i++) memset(in.p[i], 10 + rank_of(i), (size_t)(N * W));
  CHECK_OK(halo_comm_all_gather(comm, out.p, (const void *const *)in.p, N));
  for (int i = 0; i < halo_comm_here(comm); i++) {
    for (int j = 0; j < N * W; j++) CHECK(((uint8_t *)out.p[i])[j] == 10 + j / N);
  }
  CHECK_OK(halo_comm_all_gatherv(comm, out.p, (const void *const *)in.p, bytes));
  for (int i = 0; i < halo_comm_here(comm); i++) {
    for (int r = 0, at = 0; r < W; r++) {
      for (int j = 0; j < bytes[r]; j++, at++) CHECK(((uint8_t *)out.p[i])[at] == 10 + r);
    }
    for (int j = 0; j < N * W; j++) ((uint8_t *)in.p[i])[j] = (uint8_t)(rank_of(i) * 16 + j / N);
  }
  CHECK_OK(halo_comm_all_to_all(comm, out.p, (const void *const *)in.p, N));
  for (int i = 0; i < halo_comm_here(comm); i++) {
    for (int j = 0; j < N * W; j++) {
      CHECK(((uint8_t *)out.p[i])[j] == (uint8_t)(j / N * 16 + rank_of(i)));
    }
  }
  drop(in);
  drop(out);
}

/* Two messages between one pair, on one channel and on two: order within, independence between. In
 * a ring of two, next and previous are the same peer, where a mixed-up pair would show. */
static void transfers_pair_in_order(void) {
  int W = halo_comm_size(comm), here = halo_comm_here(comm);
  buffers send = make(8), recv = make(8);
  halo__transfer t[4 * MAX_HERE];
  halo__pending *kv = NULL, *dkv = NULL;
  for (int i = 0; i < here; i++) {
    for (int j = 0; j < 4; j++) ((uint8_t *)send.p[i])[j] = (uint8_t)(rank_of(i) * 4 + j);
  }
  for (int channel = 0; channel < 2; channel++) {
    int n = 0;
    for (int i = 0; i < here; i++) {
      int next = (rank_of(i) + 1) % W, previous = (rank_of(i) + W - 1) % W;
      for (int j = 0; j < 2; j++) {
        uint8_t *from = (uint8_t *)send.p[i] + 2 * channel + j;
        uint8_t *to = (uint8_t *)recv.p[i] + 2 * channel + j;
        t[n++] = (halo__transfer){from, 1, i, next, true, HALO_CPU};
        t[n++] = (halo__transfer){to, 1, i, previous, false, HALO_CPU};
      }
    }
    CHECK_OK(halo__comm_post(channel ? &dkv : &kv, comm,
                             channel ? HALO__CHANNEL_INNER_DKV : HALO__CHANNEL_INNER_KV, t, n));
  }
  halo__comm_progress(comm);
  CHECK_OK(halo__comm_wait(comm, &dkv)); // the other order than posted
  CHECK_OK(halo__comm_wait(comm, &kv));
  CHECK(kv == NULL);
  CHECK_OK(halo__comm_wait(comm, &kv));
  for (int i = 0; i < here; i++) {
    int previous = (rank_of(i) + W - 1) % W;
    for (int j = 0; j < 4; j++) CHECK(((uint8_t *)recv.p[i])[j] == (uint8_t)(previous * 4 + j));
  }
  drop(send);
  drop(recv);
}

static void same_names_the_culprit(void) {
  CHECK_OK(halo_comm_same(comm, 42, "plan"));
  CHECK_OK(halo_comm_barrier(comm));
  if (halo_comm_size(comm) == halo_comm_here(comm)) return;
  CHECK_STATUS(halo_comm_same(comm, (uint64_t)halo_comm_rank(comm) / 2 * 2, "plan of layer 3"),
               halo_comm_size(comm) > 2 ? HALO_ESTATE : HALO_OK);
  CHECK_STATUS(halo_comm_same(comm, halo_comm_rank(comm) == 1, "plan of layer 3"), HALO_ESTATE);
  CHECK(strstr(halo_error_message(), "plan of layer 3") != NULL);
  CHECK(strstr(halo_error_message(), "rank 1 has") != NULL);
}

static void splits(void) {
  halo_comm *part;
  CHECK_STATUS(halo_comm_split(&part, comm, -1, 0), HALO_EARG);
  int rank = halo_comm_rank(comm), W = halo_comm_size(comm);
  CHECK_OK(halo_comm_split(&part, comm, rank % 2, -rank));
  if (W == halo_comm_here(comm)) {
    CHECK(halo_comm_size(part) == W);
  } else {
    int members = (W + 1 - rank % 2) / 2;
    CHECK(halo_comm_size(part) == members);
    CHECK(halo_comm_rank(part) == members - 1 - rank / 2); // keys run backwards
    int64_t sum = rank;
    void *p = &sum;
    CHECK_OK(halo_comm_all_reduce(part, &p, 1, HALO_I64));
    CHECK(sum == members * (members - 1) + rank % 2 * members);
  }
  halo_comm_free(part);
}

/* All meshes of the ranks at hand: places follow the rank, groups hold whom they must. */
static void meshes(void) {
  int W = halo_comm_size(comm), rank = halo_comm_rank(comm), here = halo_comm_here(comm);
  halo_mesh *mesh;
  CHECK_STATUS(halo_mesh_new(&mesh, comm, 1, W, 2), HALO_EARG);
  CHECK_STATUS(halo_mesh_new(&mesh, comm, 1, 0, W), HALO_EARG);
  if (here > 1) CHECK_STATUS(halo_mesh_new(&mesh, comm, W, 1, 1), HALO_EUNSUPPORTED);
  for (int data = 1; data <= (here > 1 ? 1 : W); data++) {
    for (int outer = 1; outer <= W; outer++) {
      if (W % (data * outer) != 0) continue;
      int inner = W / data / outer;
      CHECK_OK(halo_mesh_new(&mesh, comm, data, outer, inner));
      int d = halo_mesh_place(mesh, HALO_AXIS_DATA), o = halo_mesh_place(mesh, HALO_AXIS_OUTER);
      int i = halo_mesh_place(mesh, HALO_AXIS_INNER);
      CHECK((d * outer + o) * inner + i == rank);
      CHECK(d < data && o < outer && i < inner && halo_mesh_place(mesh, 3) == -1);
      CHECK(halo_mesh_size(mesh, HALO_AXIS_DATA) == data && halo_mesh_size(mesh, -1) == -1);
      CHECK(halo_comm_size(halo_mesh_ring(mesh)) == outer * inner);
      CHECK(halo_comm_rank(halo_mesh_ring(mesh)) == o * inner + i);
      CHECK(halo_comm_size(halo_mesh_data(mesh)) == data);
      CHECK(halo_comm_rank(halo_mesh_data(mesh)) == d);
      if (here == 1) { // the sums of world ranks of both groups
        int64_t ring = rank, across = rank;
        void *p[2] = {&ring, &across};
        CHECK_OK(halo_comm_all_reduce(halo_mesh_ring(mesh), &p[0], 1, HALO_I64));
        CHECK_OK(halo_comm_all_reduce(halo_mesh_data(mesh), &p[1], 1, HALO_I64));
        int n = outer * inner;
        CHECK(ring == (int64_t)d * n * n + n * (n - 1) / 2);
        CHECK(across == (int64_t)data * (rank % n) + (int64_t)n * data * (data - 1) / 2);
      }
      halo_mesh_free(mesh);
    }
  }
  halo_mesh_free(NULL);
}

/* Only ranks in lockstep can notice an unmatched message before it hangs. */
static void unmatched_transfers_are_refused(void) {
  if (halo_comm_size(comm) != halo_comm_here(comm)) return;
  char byte[2] = {1, 2};
  halo__pending *p = NULL;
  int peer = halo_comm_size(comm) - 1;
  halo__transfer send = {byte, 1, 0, peer, true, HALO_CPU};
  CHECK_STATUS(halo__comm_post(&p, comm, HALO__CHANNEL_COLLECTIVE, &send, 1), HALO_ECOMM);
  halo__transfer recv = {byte, 1, 0, peer, false, HALO_CPU};
  CHECK_STATUS(halo__comm_post(&p, comm, HALO__CHANNEL_COLLECTIVE, &recv, 1), HALO_ECOMM);
  halo__transfer two[2] = {{byte, 1, 0, peer, true, HALO_CPU}, {byte + 1, 2, peer, 0, false, HALO_CPU}};
  CHECK_STATUS(halo__comm_post(&p, comm, HALO__CHANNEL_COLLECTIVE, two, 2), HALO_ECOMM);
  two[1].bytes = 1; // and the communicator still works
  CHECK_OK(halo__comm_post(&p, comm, HALO__CHANNEL_COLLECTIVE, two, 2));
  CHECK(byte[1] == 2);
  CHECK_OK(halo__comm_wait(comm, &p));
  CHECK(byte[1] == 1);
}

static void all_tests(void) {
  fprintf(stderr, "%s, rank %d of %d\n", halo_comm_name(comm), halo_comm_rank(comm),
          halo_comm_size(comm));
  RUN(sums_in_rank_order);
  RUN(sums_and_maxima_of_other_types);
  RUN(broadcast_from_every_root);
  RUN(gathers_and_exchanges);
  RUN(transfers_pair_in_order);
  RUN(same_names_the_culprit);
  RUN(splits);
  RUN(meshes);
  RUN(unmatched_transfers_are_refused);
  halo_comm_free(comm);
}

int main(void) {
  if (getenv("OMPI_COMM_WORLD_SIZE") != NULL || getenv("PMI_SIZE") != NULL) {
    CHECK_OK(halo_comm_world(&comm));
    if (check_failed == 0) all_tests();
    int failed = check_report();
    halo_comm_shutdown();
    return failed;
  }
  CHECK_OK(halo_comm_self(&comm));
  CHECK(strcmp(halo_comm_name(comm), "self") == 0);
  all_tests();
  for (int W = 2; W <= MAX_HERE; W = W < 4 ? W + 1 : W + 5) {
    CHECK_OK(halo_comm_local(&comm, W));
    CHECK(strcmp(halo_comm_name(comm), "local") == 0);
    CHECK(halo_comm_here(comm) == W);
    all_tests();
  }
  CHECK_STATUS(halo_comm_local(&comm, 0), HALO_EARG);
  halo_comm_free(NULL);
  return check_report();
}
