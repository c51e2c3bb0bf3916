/* tokenizer_bpe.c: byte-pair merging of one piece.
 *
 * A piece starts as one id per byte. Of all neighbours that may merge, the pair of lowest rank goes
 * first, the leftmost among equals, until no pair is left (Sennrich et al. 2016, arXiv 1508.07909;
 * byte level as in GPT-2).
 *
 * Two ways with one result:
 *   short  n <= SHORT: an array of ranks, its minimum searched anew after every merge. Quadratic, and
 *          the fastest there is for the five-byte words of ordinary text.
 *   long   a doubly linked list over positions and a heap of (rank, position). A merge makes at most
 *          two new pairs, so the heap sees at most 3n entries: O(n log n). Ten megabytes without a
 *          space must not take an hour: whoever feeds text must not be able to stop the job.
 *
 * Entries of the heap are never deleted: one is stale when its position died or when the pair that
 * stands there now has another rank, and is dropped when it comes up. A rank names the pair (or, for
 * rank-ordered vocabularies, the merged token), so an entry of equal rank is as good as a fresh one.
 *
 *   a b c d e      heap: (rank of pair, position of its left part)
 *   | | | | |      take (r,1): "b"+"c" -> one id at 1, position 2 dies, 1's neighbour becomes 3,
 *   0 1 2 3 4      push the pairs (0,1) and (1,3)
 */
#include "tokenizer.h"

#include <assert.h>

enum { SHORT = 48 };

#define NONE UINT32_MAX

halo_status halo__merges_reserve(halo__merges *m, int64_t count) {
  assert(m->slots == NULL);
  int64_t n = 16;
  while (n < 2 * count) n *= 2; // at most half full: short probes
  void *slots;
  HALO_TRY(halo__data_alloc(&slots, n * (int64_t)sizeof(halo__pair)));
  m->slots = slots;
  for (int64_t i = 0; i < n; i++) m->slots[i].key = HALO__NO_PAIR;
  m->mask = (uint64_t)n - 1;
  m->count = 0;
  return HALO_OK;
}

halo_status halo__merges_add(halo__merges *m, int32_t left, int32_t right, uint32_t rank,
                             int32_t id) {
  assert(2 * m->count <= (int64_t)m->mask);
  const uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
  uint64_t i = halo__pair_hash(key) & m->mask;
  while (m->slots[i].key != HALO__NO_PAIR) {
    if (m->slots[i].key == key) return HALO_ESTATE;
    i = (i + 1) & m->mask;
  }
  m->slots[i] = (halo__pair){.key = key, .rank = rank, .id = id};
  m->count++;
  return HALO_OK;
}

void halo__merges_free(halo__merges *m) {
  halo__free(m->slots);
  *m = (halo__merges){0};
}

static int64_t merge_short(const halo__merges *m, int32_t *ids, int64_t n) {
  uint32_t rank[SHORT];
  int32_t merged[SHORT];
  for (int64_t i = 0; i + 1 < n; i++) {
    const halo__pair *p = halo__merges_find(m, ids[i], ids[i + 1]);
    rank[i] = p ? p->rank : NONE;
    merged[i] = p ? p->id : 0;
  }
  while (n > 1) {
    int64_t best = 0;
    for (int64_t i = 1; i + 1 < n; i++) {
      if (rank[i] < rank[best]) best = i;
    }
    if (rank[best] == NONE) break;
    ids[best] = merged[best];
    n--;
    for (int64_t i = best + 1; i < n; i++) ids[i] = ids[i + 1];
    for (int64_t i = best; i + 1 < n; i++) rank[i] = rank[i + 1], merged[i] = merged[i + 1];
    for (int64_t i = best > 0 ? best - 1 : 0; i <= best && i + 1 < n; i++) {
      const halo__pair *p = halo__merges_find(m, ids[i], ids[i + 1]);
      rank[i] = p ? p->rank : NONE;
      merged[i] = p ? p->id : 0;
    }
  }
  return n;
}

/* The heap: entries rank << 40 | position, a four-way min-heap (half the levels of a binary one, and
 * four children share a cache line half of the time). */
typedef struct queue {
  halo__buffer store;
} queue;

static inline uint64_t entry(uint32_t rank, uint32_t at) { return (uint64_t)rank << 40 | at; }

static void sift_down(uint64_t *heap, int64_t n, int64_t i) {
  const uint64_t e = heap[i];
  for (;;) {
    int64_t child = 4 * i + 1;
    if (child >= n) break;
    int64_t least = child;
    const int64_t end = child + 4 < n ? child + 4 : n;
    for (child++; child < end; child++) {
      if (heap[child] < heap[least]) least = child;
    }
    if (heap[least] >= e) break;
    heap[i] = heap[least];
    i = least;
  }
  heap[i] = e;
}

static halo_status queue_push(queue *q, uint64_t e) {
  HALO_TRY(halo__buffer_reserve(&q->store, 8));
  uint64_t *heap = q->store.data;
  int64_t i = q->store.bytes / 8;
  q->store.bytes += 8;
  while (i > 0 && heap[(i - 1) / 4] > e) {
    heap[i] = heap[(i - 1) / 4];
    i = (i - 1) / 4;
  }
  heap[i] = e;
  return HALO_OK;
}

static uint64_t queue_pop(queue *q) {
  uint64_t *heap = q->store.data;
  const uint64_t top = heap[0];
  const int64_t n = q->store.bytes / 8 - 1;
  q->store.bytes -= 8;
  heap[0] = heap[n];
  if (n > 1) sift_down(heap, n, 0);
  return top;
}

static halo_status fill_queue(queue *q, const halo__merges *m, const int32_t *ids, int64_t n) {
  for (int64_t i = 0; i + 1 < n; i++) {
    const halo__pair *p = halo__merges_find(m, ids[i], ids[i + 1]);
    if (p == NULL) continue;
    const uint64_t e = entry(p->rank, (uint32_t)i);
    HALO_TRY(halo__buffer_append(&q->store, &e, 8));
  }
  const int64_t count = q->store.bytes / 8;
  for (int64_t i = count / 4; i >= 0 && count > 1; i--) sift_down(q->store.data, count, i);
  return HALO_OK;
}

static halo_status merge_long(const halo__merges *m, int32_t *ids, int64_t n, int64_t *n_out) {
  halo_status status = HALO_OK;
  queue q = {0};
  uint32_t *next = NULL;
  void *links = NULL;
  HALO_TRY_GOTO(halo__data_alloc(&links, 2 * n * (int64_t)sizeof(uint32_t)));
  next = links;
  uint32_t *prev = next + n;
  for (int64_t i = 0; i < n; i++) {
    next[i] = i + 1 < n ? (uint32_t)(i + 1) : NONE;
    prev[i] = i > 0 ? (uint32_t)(i - 1) : NONE;
  }
  HALO_TRY_GOTO(fill_queue(&q, m, ids, n));
  while (q.store.bytes > 0) {
    const uint64_t e = queue_pop(&q);
    const uint32_t at = (uint32_t)e, right = ids[at] < 0 ? NONE : next[at];
    if (right == NONE) continue; // died, or last: stale
    const halo__pair *p = halo__merges_find(m, ids[at], ids[right]);
    if (p == NULL || p->rank != e >> 40) continue; // another pair stands here now
    ids[at] = p->id;
    ids[right] = -1;
    const uint32_t after = next[right], before = prev[at];
    next[at] = after;
    if (after != NONE) {
      prev[after] = at;
      if ((p = halo__merges_find(m, ids[at], ids[after])) != NULL)
        HALO_TRY_GOTO(queue_push(&q, entry(p->rank, at)));
    }
    if (before != NONE && (p = halo__merges_find(m, ids[before], ids[at])) != NULL)
      HALO_TRY_GOTO(queue_push(&q, entry(p->rank, before)));
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i++) {
    if (ids[i] >= 0) ids[kept++] = ids[i];
  }
  *n_out = kept;
done:
  halo__buffer_free(&q.store);
  halo__free(links);
  return status;
}

halo_status halo__bpe(const halo__merges *m, int32_t *ids, int64_t n, int64_t *n_out) {
  assert(n >= 0);
  if (m->count == 0 || n < 2) {
    *n_out = n;
    return HALO_OK;
  }
  if (n <= SHORT) {
    *n_out = merge_short(m, ids, n);
    return HALO_OK;
  }
  HALO_CHECK(n < (int64_t)NONE, HALO_EUNSUPPORTED,
             "tokenizer: one piece of %lld bytes, at most 4294967294 are supported", (long long)n);
  return merge_long(m, ids, n, n_out);
}
