/* host.c: the `halo` program, a small host around LuaJIT.
 *
 * Everything a user sees is decided in Lua (halo.cli). The host exists for what Lua cannot do well:
 *   - find the Lua tree from the place of the executable, so that a checkout, a copy of it and an
 *     installation work without environment variables
 *   - line editing with history and completion (libedit). Completion calls back into Lua while the
 *     user types; here that is an ordinary lua_pcall from C, which an FFI callback could not be
 *   - SIGINT: at the prompt it drops the line, in a running chunk it raises a Lua error at the next
 *     instruction (the way luajit.c does it), and the session goes on
 *
 * Lua sees one table, `halo_host`:
 *   exe, dir             path and folder of this executable
 *   readline(prompt)     a line; nil at the end of input; false when Ctrl-C dropped the line
 *   history(path)        read and keep the history in this file
 *   remember(line)       add a line to the history, and to its file
 *   completer(f)         f(text up to the cursor) -> text to insert, text to show below (or nil)
 *   catch_interrupts(on) install the handler, or put the old one back
 *   supervise(argv)      run a program and give its exit code (128 + signal when one ended it); SIGTERM
 *                        and SIGINT that reach us reach it as SIGUSR1, "save and stop", the first time
 *   running(mode)        what Ctrl-C does: "no": drop the line; "stoppable": stop Lua; "together":
 *                        several ranks run the same line: ask again, then end
 */
#include <errno.h>
#include <histedit.h>
#include <langinfo.h>
#include <lauxlib.h>
#include <limits.h>
#include <locale.h>
#include <lua.h>
#include <lualib.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_ENVIRONMENT = 3, EXIT_INTERNAL = 70, HISTORY_LINES = 2000 };
enum { RUN_NO, RUN_STOPPABLE, RUN_TOGETHER };

/* One session per process, as signal handlers and libedit's callbacks want. */
static struct {
  lua_State *lua;
  EditLine *edit;
  History *history;
  char history_path[PATH_MAX];
  char prompt[256];
  int completer; /* registry reference, LUA_NOREF when there is none */
  struct sigaction old_action;
  int catching;
  volatile sig_atomic_t running;
  volatile sig_atomic_t interrupted;
} session = {.completer = LUA_NOREF};

/* ---- Interrupts ---------------------------------------------------------------------------- */

static void stop_hook(lua_State *L, lua_Debug *ar) {
  (void)ar;
  lua_sethook(L, NULL, 0, 0);
  luaL_error(L, "interrupted");
}

static void on_interrupt(int signal_number) {
  (void)signal_number;
  session.interrupted = 1;
  // lua_sethook only sets flags and is meant to be called from here (LuaJIT's own luajit.c does).
  int mask = LUA_MASKCALL | LUA_MASKRET | LUA_MASKCOUNT;
  if (session.running == RUN_STOPPABLE) lua_sethook(session.lua, stop_hook, mask, 1);
  if (session.running == RUN_TOGETHER) {
    // Stopping this rank alone would leave the others waiting for it.
    static const char text[] = "\n(several ranks run this line; Ctrl-C again ends the session)\n";
    ssize_t ignored = write(STDOUT_FILENO, text, sizeof text - 1);
    (void)ignored;
    signal(SIGINT, SIG_DFL);
  }
}

static void install(void) {
  struct sigaction action = {.sa_handler = on_interrupt};
  sigemptyset(&action.sa_mask);
  // No SA_RESTART: a read at the prompt must return when the line is dropped.
  session.catching = sigaction(SIGINT, &action, session.catching ? NULL : &session.old_action) == 0;
}

static int host_catch_interrupts(lua_State *L) {
  int on = lua_toboolean(L, 1);
  if (on && !session.catching) {
    install();
  } else if (!on && session.catching) {
    sigaction(SIGINT, &session.old_action, NULL);
    session.catching = 0;
  }
  return 0;
}

static int host_running(lua_State *L) {
  static const char *const modes[] = {"no", "stoppable", "together", NULL};
  session.running = luaL_checkoption(L, 1, NULL, modes);
  session.interrupted = 0;
  if (session.running == RUN_NO) {
    lua_sethook(L, NULL, 0, 0);
    if (session.catching) install(); // a first Ctrl-C on several ranks took the handler away
  }
  return 0;
}

/* ---- Supervising ---------------------------------------------------------------------------- */

static volatile sig_atomic_t child_pid, asked_to_stop;

/* mpirun 4.1 answers SIGTERM and SIGINT by killing its ranks and loses their exit code; SIGUSR1 it
 * passes on untouched, so that is how ranks hear of "save and stop". A second request goes through
 * as it is. */
static void pass_on(int signal_number) {
  const int is_stop = signal_number == SIGTERM || signal_number == SIGINT;
  if (child_pid > 0) kill(child_pid, is_stop && !asked_to_stop ? SIGUSR1 : signal_number);
  if (is_stop) asked_to_stop = 1;
}

/* How many children of a process are alive, zombies not counted; -1 when the system does not say. */
static int live_children(pid_t pid) {
  char path[64], list[4096];
  snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)pid, (int)pid);
  FILE *f = fopen(path, "r");
  if (f == NULL) return -1;
  const size_t n = fread(list, 1, sizeof list - 1, f);
  fclose(f);
  list[n] = 0;
  int alive = 0;
  for (char *at = list, *end; *at != 0; at = end) {
    const long child = strtol(at, &end, 10);
    if (end == at) break;
    while (*end == ' ') end++;
    char stat[512];
    snprintf(path, sizeof path, "/proc/%ld/stat", child);
    if ((f = fopen(path, "r")) == NULL) continue;
    const size_t length = fread(stat, 1, sizeof stat - 1, f);
    fclose(f);
    stat[length] = 0;
    const char *name_end = strrchr(stat, ')'); // "pid (name) state ..."
    if (name_end != NULL && name_end[1] == ' ' && name_end[2] != 'Z') alive++;
  }
  return alive;
}

/* The status of a launcher that ends, or that is ended: Open MPI 4.1.4's mpirun now and then misses the
 * death of its ranks and stays for ever (seen once in about thirty kill -9 of a rank). */
static int wait_for(pid_t pid) {
  enum { POLL_MS = 50, GRACE_MS = 10000 };
  int status = 0, alone_ms = 0;
  bool had_children = false;
  for (;;) {
    const pid_t done = waitpid(pid, &status, WNOHANG);
    if (done == pid || (done < 0 && errno != EINTR)) return status;
    const int children = live_children(pid);
    had_children |= children > 0;
    alone_ms = had_children && children == 0 ? alone_ms + POLL_MS : 0;
    if (alone_ms == GRACE_MS) {
      fprintf(stderr, "halo: all ranks are gone, but the launcher (process %d) stays; ending it\n", (int)pid);
      kill(pid, SIGKILL);
    }
    nanosleep(&(struct timespec){.tv_nsec = POLL_MS * 1000000L}, NULL);
  }
}

static int host_supervise(lua_State *L) {
  luaL_checktype(L, 1, LUA_TTABLE);
  const int n = (int)lua_objlen(L, 1);
  const char **argv = lua_newuserdata(L, (size_t)(n + 1) * sizeof *argv);
  for (int i = 0; i < n; i++) {
    lua_rawgeti(L, 1, i + 1);
    argv[i] = luaL_checkstring(L, -1); // the table keeps it alive
    lua_pop(L, 1);
  }
  argv[n] = NULL;
  fflush(NULL);
  enum { SIGNALS = 5 };
  static const int signals[SIGNALS] = {SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGHUP};
  struct sigaction action = {.sa_handler = pass_on, .sa_flags = SA_RESTART}, old[SIGNALS];
  sigset_t all, before;
  sigfillset(&all);
  sigprocmask(SIG_SETMASK, &all, &before); // nothing is lost between fork and the handlers
  const pid_t pid = fork();
  if (pid < 0) {
    sigprocmask(SIG_SETMASK, &before, NULL);
    return luaL_error(L, "cannot start %s: %s", argv[0], strerror(errno));
  }
  if (pid == 0) {
    setpgid(0, 0); // Ctrl-C at the terminal is for us, who pass it on
    prctl(PR_SET_PDEATHSIG, SIGTERM); // no ranks without anybody who waits for them
    sigprocmask(SIG_SETMASK, &before, NULL);
    execvp(argv[0], (char *const *)argv);
    fprintf(stderr, "halo: cannot start %s: %s\n", argv[0], strerror(errno));
    _exit(127);
  }
  child_pid = pid;
  asked_to_stop = 0;
  sigemptyset(&action.sa_mask);
  for (int i = 0; i < SIGNALS; i++) sigaction(signals[i], &action, &old[i]);
  sigprocmask(SIG_SETMASK, &before, NULL);
  const int status = wait_for(pid);
  child_pid = 0;
  for (int i = 0; i < SIGNALS; i++) sigaction(signals[i], &old[i], NULL);
  lua_pushinteger(L, WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  return 1;
}

/* ---- Line editing -------------------------------------------------------------------------- */

static char *current_prompt(EditLine *edit) {
  (void)edit;
  return session.prompt;
}

/* Tab: what the Lua completer says about the text before the cursor. */
static unsigned char complete(EditLine *edit, int key) {
  (void)key;
  lua_State *L = session.lua;
  if (session.completer == LUA_NOREF) return CC_ERROR;
  const LineInfo *line = el_line(edit);
  int top = lua_gettop(L);
  lua_rawgeti(L, LUA_REGISTRYINDEX, session.completer);
  lua_pushlstring(L, line->buffer, (size_t)(line->cursor - line->buffer));
  unsigned char result = CC_ERROR;
  if (lua_pcall(L, 1, 2, 0) == 0) {
    const char *insert = lua_tostring(L, -2), *list = lua_tostring(L, -1);
    if (list != NULL) {
      fprintf(stdout, "\n%s\n", list);
      result = CC_REDISPLAY;
    }
    if (insert != NULL && insert[0] != '\0' && el_insertstr(edit, insert) == 0 && list == NULL) {
      result = CC_REFRESH;
    }
  }
  lua_settop(L, top);
  return result;
}

static int start_editing(void) {
  if (session.edit != NULL) return 1;
  // libedit counts columns, so it must know that bytes are UTF-8. LC_NUMERIC stays "C".
  setlocale(LC_CTYPE, "");
  if (strcmp(nl_langinfo(CODESET), "UTF-8") != 0) setlocale(LC_CTYPE, "C.UTF-8");
  session.edit = el_init("halo", stdin, stdout, stderr);
  if (session.edit == NULL) return 0;
  el_set(session.edit, EL_PROMPT_ESC, current_prompt, '\1');
  el_set(session.edit, EL_EDITOR, "emacs");
  el_set(session.edit, EL_ADDFN, "halo-complete", "complete the word", complete);
  el_set(session.edit, EL_BIND, "^I", "halo-complete", NULL);
  el_set(session.edit, EL_BIND, "^R", "em-inc-search-prev", NULL);
  if (session.history != NULL) el_set(session.edit, EL_HIST, history, session.history);
  el_source(session.edit, NULL); // the user's ~/.editrc
  return 1;
}

static int start_history(void) {
  if (session.history != NULL) return 1;
  HistEvent event;
  session.history = history_init();
  if (session.history == NULL) return 0;
  history(session.history, &event, H_SETSIZE, HISTORY_LINES);
  history(session.history, &event, H_SETUNIQUE, 1);
  if (session.edit != NULL) el_set(session.edit, EL_HIST, history, session.history);
  return 1;
}

static int host_history(lua_State *L) {
  const char *path = luaL_checkstring(L, 1);
  if (!start_history() || strlen(path) >= sizeof session.history_path) return 0;
  strcpy(session.history_path, path);
  HistEvent event;
  history(session.history, &event, H_LOAD, path); // an absent file is an empty history
  return 0;
}

static int host_remember(lua_State *L) {
  const char *line = luaL_checkstring(L, 1);
  HistEvent event;
  if (!start_history()) return 0;
  history(session.history, &event, H_ENTER, line);
  if (session.history_path[0] == '\0') return 0;
  history(session.history, &event, H_SAVE, session.history_path);
  return 0;
}

static int host_completer(lua_State *L) {
  luaL_checktype(L, 1, LUA_TFUNCTION);
  luaL_unref(L, LUA_REGISTRYINDEX, session.completer);
  lua_pushvalue(L, 1);
  session.completer = luaL_ref(L, LUA_REGISTRYINDEX);
  return 0;
}

static void push_line(lua_State *L, const char *text, size_t length) {
  while (length > 0 && (text[length - 1] == '\n' || text[length - 1] == '\r')) length--;
  lua_pushlstring(L, text, length);
}

static int host_readline(lua_State *L) {
  const char *prompt = luaL_optstring(L, 1, "");
  session.interrupted = 0;
  if (isatty(STDIN_FILENO) && isatty(STDOUT_FILENO) && start_editing()) {
    snprintf(session.prompt, sizeof session.prompt, "%s", prompt);
    int length = 0;
    const char *text = el_gets(session.edit, &length);
    if (text == NULL || length <= 0) {
      if (session.interrupted || (length < 0 && errno == EINTR)) {
        el_reset(session.edit);
        lua_pushboolean(L, 0);
      } else {
        lua_pushnil(L);
      }
      return 1;
    }
    push_line(L, text, (size_t)length);
    return 1;
  }
  char *text = NULL;
  size_t capacity = 0;
  ssize_t length = getline(&text, &capacity, stdin);
  if (length < 0) {
    if (session.interrupted) {
      clearerr(stdin);
      lua_pushboolean(L, 0);
    } else {
      lua_pushnil(L);
    }
  } else {
    push_line(L, text, (size_t)length);
  }
  free(text);
  return 1;
}

static void stop_session(void) {
  if (session.edit != NULL) el_end(session.edit);
  if (session.history != NULL) history_end(session.history);
}

/* ---- Start --------------------------------------------------------------------------------- */

/* Folder of the executable; "." if the system does not say. */
static void find_executable(char *exe, char *dir) {
  ssize_t n = readlink("/proc/self/exe", exe, PATH_MAX - 1);
  exe[n > 0 ? n : 0] = '\0';
  strcpy(dir, n > 0 ? exe : "./halo");
  char *slash = strrchr(dir, '/');
  *slash = '\0';
}

/* First of: HALO_LUA, ../lua and ../share/halo/lua from the executable, the sources it was built
 * from. Pushes the path. */
static void push_lua_tree(lua_State *L, const char *dir) {
  const char *forced = getenv("HALO_LUA");
  if (forced != NULL && forced[0] != '\0') {
    lua_pushstring(L, forced);
    return;
  }
  const char *beside[] = {"../lua", "../share/halo/lua"};
  for (size_t i = 0; i < sizeof beside / sizeof beside[0]; i++) {
    const char *tree = lua_pushfstring(L, "%s/%s", dir, beside[i]);
    const char *probe = lua_pushfstring(L, "%s/halo/init.lua", tree);
    int found = access(probe, R_OK) == 0;
    lua_pop(L, 1);
    if (found) return;
    lua_pop(L, 1);
  }
  lua_pushstring(L, HALO_SOURCE_DIR "/lua");
}

/* False when the tree is not there. */
static int set_package_path(lua_State *L, const char *dir) {
  push_lua_tree(L, dir);
  const char *tree = lua_tostring(L, -1);
  const char *probe = lua_pushfstring(L, "%s/halo/init.lua", tree);
  if (access(probe, R_OK) != 0) {
    fprintf(stderr, "halo: no Lua files at %s; set HALO_LUA to the folder that holds halo/\n", tree);
    return 0;
  }
  lua_pop(L, 1);
  lua_getglobal(L, "package");
  lua_getfield(L, -1, "path");
  lua_pushfstring(L, "%s/?.lua;%s/?/init.lua;%s", tree, tree, lua_tostring(L, -1));
  lua_setfield(L, -3, "path");
  lua_settop(L, 0);
  return 1;
}

static void set_host_table(lua_State *L, const char *exe, const char *dir) {
  static const luaL_Reg functions[] = {
      {"readline", host_readline},     {"history", host_history},
      {"remember", host_remember},     {"completer", host_completer},
      {"running", host_running},       {"catch_interrupts", host_catch_interrupts},
      {"supervise", host_supervise},
      {NULL, NULL},
  };
  lua_newtable(L);
  for (const luaL_Reg *f = functions; f->name != NULL; f++) {
    lua_pushcfunction(L, f->func);
    lua_setfield(L, -2, f->name);
  }
  lua_pushstring(L, exe);
  lua_setfield(L, -2, "exe");
  lua_pushstring(L, dir);
  lua_setfield(L, -2, "dir");
  lua_setglobal(L, "halo_host");
}

int main(int argc, char **argv) {
  char exe[PATH_MAX], dir[PATH_MAX];
  find_executable(exe, dir);
  lua_State *L = session.lua = luaL_newstate();
  if (L == NULL) {
    fprintf(stderr, "halo: cannot create a Lua state\n");
    return EXIT_INTERNAL;
  }
  luaL_openlibs(L);
  if (!set_package_path(L, dir)) {
    lua_close(L);
    return EXIT_ENVIRONMENT;
  }
  set_host_table(L, exe, dir);
  lua_createtable(L, argc, 0);
  for (int i = 0; i < argc; i++) {
    lua_pushstring(L, argv[i]);
    lua_rawseti(L, -2, i);
  }
  lua_setglobal(L, "arg");
  int code = EXIT_INTERNAL;
  if (luaL_dostring(L, "return require('halo.cli').main(arg)") != 0) {
    // halo.cli reports its own errors: what arrives here is a broken tree.
    const char *why = lua_tostring(L, -1);
    fprintf(stderr, "halo: %s\n", why ? why : "the Lua files cannot be loaded");
  } else {
    code = (int)lua_tointeger(L, -1);
  }
  stop_session();
  lua_close(L);
  return code;
}
