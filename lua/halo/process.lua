--- This process: its place in the machine, its environment, and becoming another program.
local errors = require "halo.errors"
local ffi = require "ffi"
local fs = require "halo.fs"

-- Declaring the same function twice is harmless, so reloading this module is.
ffi.cdef [[
int execvp(const char *file, char *const argv[]);
int setenv(const char *name, const char *value, int overwrite);
int unsetenv(const char *name);
int get_nprocs(void);
int gethostname(char *name, size_t length);
unsigned int geteuid(void);
int dup2(int from, int to);
int getpgrp(void);
int tcsetpgrp(int fd, int group);
void (*signal(int number, void (*handler)(int)))(int);
]]
local C = ffi.C

local M = {}

--- Processors this process may use.
function M.cores() return C.get_nprocs() end
function M.is_root() return C.geteuid() == 0 end
function M.setenv(name, value) C.setenv(name, tostring(value), 1) end
function M.unsetenv(name) C.unsetenv(name) end

--- Name of this machine.
function M.hostname()
  local name = ffi.new "char[256]"
  C.gethostname(name, 255)
  return ffi.string(name)
end

--- Full path of a program on PATH, or nil.
function M.which(name)
  for folder in (os.getenv "PATH" or ""):gmatch "[^:]+" do
    local path = folder .. "/" .. name
    if fs.is_file(path) then return path end
  end
end

--- Path of the `halo` program: the running one, or the one the build leaves beside the library.
function M.halo()
  local host = rawget(_G, "halo_host")
  return host and host.exe or fs.dirname(require("halo.ffi").path) .. "/halo"
end

--- Replace this process by another program; does not return.
function M.exec(argv)
  local array = ffi.new("const char *[?]", #argv + 1)
  for i, word in ipairs(argv) do array[i - 1] = word end
  io.stdout:flush()
  io.stderr:flush()
  C.execvp(argv[1], ffi.cast("char *const *", array))
  errors.raise("environment", ("cannot start %s: %s"):format(argv[1], ffi.string(C.strerror(ffi.errno()))), 0)
end

--- Standard output of a shell command, or nil when it failed.
function M.capture(command)
  local pipe = io.popen(command, "r")
  local text = pipe:read "*a"
  local ok = pipe:close()
  return ok and text or nil
end

--- A word quoted for the shell.
function M.quote(word) return "'" .. word:gsub("'", "'\\''") .. "'" end

--- Send a descriptor's output to a file (appending), as ranks other than 0 do with their prints.
function M.redirect(fd, path)
  local O_WRONLY, O_CREAT, O_APPEND = 1, 64, 1024
  io.stdout:flush()
  local opened = C.open(path, O_WRONLY + O_CREAT + O_APPEND, ffi.cast("unsigned int", 438))
  if opened < 0 then
    errors.raise("data", ("cannot open %s: %s"):format(path, ffi.string(C.strerror(ffi.errno()))), 0)
  end
  C.dup2(opened, fd)
  C.close(opened)
end

--- Make the controlling terminal our input and output, and us its foreground job, although a launcher
-- between us and the terminal took our standard files away. False when there is no terminal.
function M.take_terminal()
  local O_RDWR = 2
  local fd = C.open("/dev/tty", O_RDWR)
  if fd < 0 then return false end
  local SIGTTOU, SIG_IGN = 22, ffi.cast("void (*)(int)", 1)
  local old = C.signal(SIGTTOU, SIG_IGN) -- a background job that asks for the terminal is stopped by it
  local ok = C.tcsetpgrp(fd, C.getpgrp()) == 0
  C.signal(SIGTTOU, old)
  if ok then
    for target = 0, 2 do C.dup2(fd, target) end
  end
  C.close(fd)
  return ok
end

return M
