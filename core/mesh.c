/* mesh.c: ranks named by axes, and the groups that follow from the names.
 *
 *   world rank = (data * outer_size + outer) * inner_size + inner
 *
 * `inner` ranks are neighbours (one node, when the launcher fills nodes in order), `outer` joins
 * nodes to one ring, `data` repeats that ring over other sequences. The ring, all ranks that share
 * a sequence, is outer x inner in rank order; the data group joins the ranks that hold the same
 * part of their sequences. Everything that talks asks the mesh for its group; the arithmetic of
 * ranks is in place_of and nowhere else.
 *
 *   data = 2, outer = 2, inner = 2:     world rank    0 1 2 3 | 4 5 6 7
 *                                       ring          0 1 2 3 | 0 1 2 3      inner  0 1 0 1 | ...
 *                                       data groups   {0,4} {1,5} {2,6} {3,7}
 */
#include "internal.h"

struct halo_mesh {
  int32_t size[3]; /* by halo_axis */
  int32_t place[3];
  halo_comm *ring, *data;
};

static const char *const axis_names[3] = {"data", "outer", "inner"};

static void place_of(int32_t place[3], const int32_t size[3], int32_t rank) {
  place[HALO_AXIS_INNER] = rank % size[HALO_AXIS_INNER];
  place[HALO_AXIS_OUTER] = rank / size[HALO_AXIS_INNER] % size[HALO_AXIS_OUTER];
  place[HALO_AXIS_DATA] = rank / size[HALO_AXIS_INNER] / size[HALO_AXIS_OUTER];
}

halo_status halo_mesh_new(halo_mesh **out, halo_comm *world, int32_t data, int32_t outer,
                          int32_t inner) {
  HALO_CHECK(world != NULL, HALO_EARG, "mesh_new: the communicator is NULL");
  const int32_t size[3] = {data, outer, inner};
  int64_t ranks = 1;
  for (int32_t i = 0; i < 3; i++) {
    HALO_CHECK(size[i] >= 1, HALO_EARG, "mesh_new: %s is %d; it must be 1 or more", axis_names[i],
               size[i]);
    HALO_CHECK(halo__mul(ranks, size[i], &ranks), HALO_EARG, "mesh_new: sizes overflow");
  }
  HALO_CHECK(ranks == halo_comm_size(world), HALO_EARG,
             "mesh_new: data %d x outer %d x inner %d is %lld ranks, the job has %d", data, outer,
             inner, (long long)ranks, halo_comm_size(world));
  HALO_CHECK(data == 1 || halo_comm_here(world) == 1, HALO_EUNSUPPORTED,
             "mesh_new: %d ranks of one process form one ring; data must be 1, is %d",
             halo_comm_here(world), data);
  halo_mesh *m;
  HALO_TRY(halo__alloc_zero((void **)&m, (int64_t)sizeof *m, HALO_CPU));
  const int32_t rank = halo_comm_rank(world);
  for (int32_t i = 0; i < 3; i++) m->size[i] = size[i];
  place_of(m->place, size, rank);
  halo_status status = halo_comm_split(&m->ring, world, m->place[HALO_AXIS_DATA], rank);
  if (status == HALO_OK) {
    // Ranks of one process share everything: nothing is left for a data group to sum.
    status = halo_comm_here(world) > 1
                 ? halo_comm_self(&m->data)
                 : halo_comm_split(&m->data, world, rank % (outer * inner), rank);
  }
  if (status != HALO_OK) {
    halo_mesh_free(m);
    return status;
  }
  *out = m;
  return HALO_OK;
}

void halo_mesh_free(halo_mesh *m) {
  if (m == NULL) return;
  halo_comm_free(m->ring);
  halo_comm_free(m->data);
  halo__free(m);
}

int32_t halo_mesh_size(const halo_mesh *m, int32_t axis) {
  return axis >= HALO_AXIS_DATA && axis <= HALO_AXIS_INNER ? m->size[axis] : -1;
}

int32_t halo_mesh_place(const halo_mesh *m, int32_t axis) {
  return axis >= HALO_AXIS_DATA && axis <= HALO_AXIS_INNER ? m->place[axis] : -1;
}

halo_comm *halo_mesh_ring(const halo_mesh *m) { return m->ring; }
halo_comm *halo_mesh_data(const halo_mesh *m) { return m->data; }
