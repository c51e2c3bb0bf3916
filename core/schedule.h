/* schedule.h: a ring schedule as a table of rows, its generators and its checker. Internal to
 * core/. */
#ifndef HALO_SCHEDULE_H
#define HALO_SCHEDULE_H

#include "comm.h"

typedef enum halo__row_kind {
  HALO__ROW_FETCH_COLUMNS, /* start gathering the columns' keys and values */
  HALO__ROW_COLUMNS, /* end that; queries here meet them; backward: start returning gradients */
  HALO__ROW_RETURN_COLUMNS, /* backward: end that */
  HALO__ROW_POST,    /* start sending slot `slot` to `to` and receiving `slot_in` from `from` */
  HALO__ROW_WAIT,    /* end the exchange `event` */
  HALO__ROW_COMPUTE, /* queries here meet `source`, whose keys are in KV slot `slot`; backward
                      * writes (=) their gradients to dKV slot `slot_in` */
  HALO__ROW_COPY,    /* dKV slot `slot_in` = slot `slot` */
  HALO__ROW_ADD      /* dKV slot `slot_in` += slot `slot` */
} halo__row_kind;

typedef struct halo__schedule_row {
  int16_t kind;      /* halo__row_kind */
  int16_t channel;   /* POST, WAIT: halo__channel */
  int32_t step;      /* COMPUTE */
  int32_t source;    /* COMPUTE */
  int32_t to, from;  /* POST: ranks */
  int32_t slot;
  int32_t slot_in;
  int32_t event;     /* POST, WAIT: which exchange; counted from 0 in posting order */
} halo__schedule_row;

/* What one rank does in one pass. Its own keys are in KV slot 0 at the start. */
typedef struct halo__schedule {
  bool is_backward;
  int32_t world, rank, n_steps;
  int32_t n_kv_slots, n_dkv_slots, n_events;
  int32_t home; /* backward: dKV slot that holds the gradient of this rank's keys at the end */
  int32_t n_rows;
  halo__schedule_row *rows;
} halo__schedule;

/* Channels whose slots are dKV slots. */
static inline bool halo__channel_is_gradient(int32_t channel) {
  return channel == HALO__CHANNEL_INNER_DKV || channel == HALO__CHANNEL_OUTER_DKV;
}

/* The table of one rank. `inner` counts for hierarchical only. */
halo_status halo__schedule_new(halo__schedule **out, int32_t schedule, int32_t world, int32_t inner,
                               int32_t rank, bool is_backward);
void halo__schedule_free(halo__schedule *s);
/* Whether the tables of all ranks, tables[0..world), fit together; see schedule.c. */
halo_status halo__schedule_check(halo__schedule *const *tables, int32_t world);
/* The table as text; writes at most `capacity` bytes with a final 0, returns the length it wanted.
 * */
int64_t halo__schedule_explain(const halo__schedule *s, char *text, int64_t capacity);

#endif
