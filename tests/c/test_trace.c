#include "check.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "internal.h"

static char folder[] = "/tmp/halo-trace-XXXXXX";

static char *read_text(const char *path) {
  static char text[1 << 20];
  FILE *file = fopen(path, "rb");
  if (file == NULL) return NULL;
  const size_t n = fread(text, 1, sizeof text - 1, file);
  text[n] = 0;
  fclose(file);
  return text;
}

static const char *in_folder(const char *name) {
  static char path[256];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return path;
}

static int count_of(const char *text, const char *word) {
  int n = 0;
  for (const char *p = text; (p = strstr(p, word)) != NULL; p += strlen(word)) n++;
  return n;
}

static halo_trace_row row_of(const char *name) {
  halo_trace_row row = {0};
  CHECK_OK(halo_trace_read(&row, halo_trace_id(name)));
  return row;
}

static void spin_ms(int ms) { usleep((unsigned)ms * 1000); }

static void names_are_interned(void) {
  const int32_t a = halo_trace_id("alpha"), b = halo_trace_id("beta");
  CHECK(a >= 0 && b >= 0 && a != b);
  CHECK(halo_trace_id("alpha") == a);
  CHECK(halo_trace_id("") == -1 && halo_trace_id(NULL) == -1);
  halo_trace_row row;
  CHECK_STATUS(halo_trace_read(&row, halo_trace_names()), HALO_EARG);
  CHECK_STATUS(halo_trace_read(&row, -1), HALO_EARG);
  CHECK(strcmp(row_of("beta").name, "beta") == 0);
}

static void inner_time_is_taken_off(void) {
  halo_trace_reset();
  const int32_t outer = halo_trace_begin(halo_trace_id("outer"));
  spin_ms(10);
  const int32_t inner = halo_trace_begin(halo_trace_id("inner"));
  halo_trace_work(100, 7);
  spin_ms(20);
  halo_trace_end(inner);
  halo_trace_end(outer);
  const halo_trace_row o = row_of("outer"), i = row_of("inner");
  CHECK(o.calls == 1 && i.calls == 1);
  CHECK(i.bytes == 100 && i.flops == 7 && o.bytes == 0);
  CHECK(i.seconds >= 0.019 && o.seconds >= i.seconds + 0.009);
  CHECK(fabs(o.self_seconds - (o.seconds - i.seconds)) < 1e-9);
  CHECK(i.self_seconds == i.seconds);
}

static void an_outer_end_closes_what_is_open_inside(void) {
  halo_trace_reset();
  const int32_t outer = halo_trace_begin(halo_trace_id("outer"));
  halo_trace_begin(halo_trace_id("inner")); // as after an early return
  halo_trace_end(outer);
  CHECK(row_of("inner").calls == 1 && row_of("outer").calls == 1);
  halo_trace_end(outer); // closed already
  halo_trace_end(0);
  CHECK(row_of("outer").calls == 1);
  // Deeper than the stack holds: not traced, and nothing breaks.
  int32_t tokens[80];
  for (int i = 0; i < 80; i++) tokens[i] = halo_trace_begin(halo_trace_id("deep"));
  CHECK(tokens[79] == 0 && tokens[0] == 1);
  for (int i = 79; i >= 0; i--) halo_trace_end(tokens[i]);
  CHECK(row_of("deep").calls == 64);
}

static void off_is_off(void) {
  halo_trace_reset();
  CHECK(halo_trace_set_level(HALO_TRACE_OFF) == HALO_TRACE_TOTALS);
  const int32_t t = halo_trace_begin(halo_trace_id("alpha"));
  halo_trace_count(halo_trace_id("alpha"), 1, 1);
  CHECK(t == 0);
  CHECK(halo_trace_set_level(HALO_TRACE_TOTALS) == HALO_TRACE_OFF);
  halo_trace_end(t);
  CHECK(row_of("alpha").calls == 0);
  halo_trace_count(halo_trace_id("alpha"), 3, 4);
  CHECK(row_of("alpha").calls == 1 && row_of("alpha").bytes == 3 && row_of("alpha").flops == 4);
}

static void *many_spans(void *unused) {
  (void)unused;
  const int32_t id = halo_trace_id("threads");
  for (int i = 0; i < 20000; i++) {
    const int32_t t = halo_trace_begin(id);
    halo_trace_work(1, 2);
    halo_trace_end(t);
  }
  return NULL;
}

static void threads_add_up(void) {
  halo_trace_reset();
  pthread_t threads[4];
  for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, many_spans, NULL);
  for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
  const halo_trace_row r = row_of("threads");
  CHECK(r.calls == 80000 && r.bytes == 80000 && r.flops == 160000);
}

static void a_window_becomes_chrome_json(void) {
  CHECK_OK(halo_trace_record());
  for (int i = 0; i < 3; i++) {
    const int32_t t = halo_trace_begin(halo_trace_id("a \"quoted\"\nname"));
    halo_trace_work(8, 16);
    halo_trace_end(t);
  }
  CHECK_OK(halo_trace_export(in_folder("trace.json"), 5));
  const int32_t after = halo_trace_begin(halo_trace_id("alpha"));
  halo_trace_end(after);
  const char *text = read_text(in_folder("trace.json"));
  CHECK(text != NULL && count_of(text, "\"ph\":\"X\"") == 3);
  CHECK(count_of(text, "a \\\"quoted\\\"\\u000aname") == 3);
  CHECK(count_of(text, "\"pid\":5") == 4);
  CHECK(strstr(text, "\"dropped\":false") != NULL && strstr(text, "\"flops\":16") != NULL);
  CHECK_STATUS(halo_trace_export("/nowhere/trace.json", 0), HALO_EIO);
  CHECK_STATUS(halo_trace_export(NULL, 0), HALO_EARG);
  // A window that is too long is cut and says so.
  CHECK_OK(halo_trace_record());
  const int32_t id = halo_trace_id("many");
  for (int i = 0; i < (1 << 18) + 10; i++) halo_trace_end(halo_trace_begin(id));
  CHECK_OK(halo_trace_export(in_folder("trace.json"), 0));
  text = read_text(in_folder("trace.json"));
  CHECK(text != NULL && strstr(text, "\"dropped\":true") != NULL);
}

static void the_recorder_keeps_the_last_collectives(void) {
  halo_trace_where(41, 12);
  int64_t begun0, done0, begun, done;
  double waiting;
  halo_trace_flight(&begun0, &done0, NULL);
  for (int i = 0; i < 5000; i++) {
    const int64_t seq = halo__trace_comm_begin("all_reduce", "world", 4096 + i, -1);
    halo__trace_comm_end(seq);
  }
  const int64_t open = halo__trace_comm_begin("send_recv", "ring", 77, 3);
  spin_ms(5);
  halo_trace_flight(&begun, &done, &waiting);
  CHECK(begun == begun0 + 5001 && done == begun - 1 && open == begun);
  CHECK(waiting >= 0.004 && waiting < 10);
  CHECK_OK(halo_trace_flight_dump(in_folder("flight.jsonl")));
  char *text = read_text(in_folder("flight.jsonl"));
  CHECK(text != NULL && count_of(text, "\n") == 4096);
  CHECK(count_of(text, "\"done\":false") == 1);
  char *last = strstr(text, "\"op\":\"send_recv\",\"comm\":\"ring\",\"bytes\":77,\"peer\":3,"
                            "\"step\":41,\"layer\":12,");
  CHECK(last != NULL);
  halo__trace_comm_end(open);
  halo_trace_flight(&begun, &done, &waiting);
  CHECK(begun == done && waiting == 0);
  CHECK_STATUS(halo_trace_flight_dump("/nowhere/flight"), HALO_EIO);
}

static void signals_set_bits(void) {
  CHECK_OK(halo_signals_install(NULL));
  CHECK_STATUS(halo_signals_install(NULL), HALO_ESTATE);
  CHECK(halo_signal_pending() == 0);
  raise(SIGUSR1);
  CHECK(halo_signal_pending() == HALO_SIGNAL_USR1);
  raise(SIGUSR1); // twice is still only a request
  raise(SIGTERM);
  raise(SIGPIPE);
  CHECK(halo_signal_pending() == (HALO_SIGNAL_USR1 | HALO_SIGNAL_TERM));
  halo_signal_clear(HALO_SIGNAL_TERM);
  CHECK(halo_signal_pending() == HALO_SIGNAL_USR1);
  raise(SIGTERM); // after the first one was handled, again only a request
  CHECK(halo_signal_pending() == (HALO_SIGNAL_USR1 | HALO_SIGNAL_TERM));
  halo_signals_restore();
  halo_signals_restore();
}

/* Run `act` in a child; returns its wait status. */
static int in_child(void (*act)(void)) {
  fflush(NULL);
  const pid_t child = fork();
  if (child == 0) {
    act();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

static void term_twice(void) {
  halo_signals_install(NULL);
  raise(SIGTERM);
  raise(SIGTERM);
}

static void crash(void) {
  if (freopen("/dev/null", "w", stderr) == NULL) return; // a sanitizer would report what is meant here
  halo_signals_install(in_folder("crash.jsonl"));
  halo__trace_comm_begin("broadcast", "world", 9, 0);
  raise(SIGSEGV);
}

static void a_second_term_ends_the_process(void) {
  const int status = in_child(term_twice);
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM);
}

static void a_crash_leaves_the_recorder(void) {
  const int status = in_child(crash);
  CHECK(status != 0); // the signal itself, or a sanitizer's exit code
#if !defined(__SANITIZE_ADDRESS__)
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
#endif
  const char *text = read_text(in_folder("crash.jsonl"));
  CHECK(text != NULL && strstr(text, "\"op\":\"broadcast\"") != NULL);
}

int main(void) {
  if (mkdtemp(folder) == NULL) return 1;
  RUN(names_are_interned);
  RUN(inner_time_is_taken_off);
  RUN(an_outer_end_closes_what_is_open_inside);
  RUN(off_is_off);
  RUN(threads_add_up);
  RUN(a_window_becomes_chrome_json);
  RUN(the_recorder_keeps_the_last_collectives);
  RUN(signals_set_bits);
  RUN(a_second_term_ends_the_process);
  RUN(a_crash_leaves_the_recorder);
  unlink(in_folder("trace.json"));
  unlink(in_folder("flight.jsonl"));
  unlink(in_folder("crash.jsonl"));
  rmdir(folder);
  return check_report();
}
