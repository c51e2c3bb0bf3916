--- Files and folders, through libc.
-- Questions answer `nil, reason` when the answer is "not there"; changes raise class `data` with the
-- path and what the system said. `write` is atomic: a reader sees the old file or the new one, also
-- after a crash. Struct layouts used here (statx, dirent64) are fixed by the Linux kernel's interface
-- on every 64-bit machine.
local errors = require "halo.errors"
local ffi = require "ffi"

-- Declared once per process even if this module is loaded again.
if not pcall(ffi.typeof, "struct halo_statx") then
  ffi.cdef [[
  struct halo_statx_time { int64_t sec; uint32_t nsec; int32_t pad; };
  struct halo_statx {
    uint32_t mask, blksize; uint64_t attributes;
    uint32_t nlink, uid, gid; uint16_t mode, pad0;
    uint64_t ino, size, blocks, attributes_mask;
    struct halo_statx_time atime, btime, ctime, mtime;
    uint32_t rdev_major, rdev_minor, dev_major, dev_minor;
    uint64_t spare[14];
  };
  struct halo_dirent { uint64_t ino; int64_t off; uint16_t reclen; uint8_t type; char name[256]; };
  int statx(int dirfd, const char *path, int flags, unsigned int mask, struct halo_statx *out);
  void *opendir(const char *path);
  struct halo_dirent *readdir64(void *dir);
  int closedir(void *dir);
  int mkdir(const char *path, unsigned int mode);
  int rmdir(const char *path);
  int unlink(const char *path);
  int rename(const char *from, const char *to);
  int open(const char *path, int flags, ...);
  int close(int fd);
  int64_t write(int fd, const void *bytes, size_t count);
  int fsync(int fd);
  char *realpath(const char *path, char *resolved);
  char *getcwd(char *buffer, size_t size);
  char *mkdtemp(char *template_path);
  int getpid(void);
  void free(void *p);
  char *strerror(int code);
  ]]
end
local C = ffi.C

local M = {}

local AT_FDCWD, STATX_BASIC = -100, 0x7ff
local O_WRONLY, O_CREAT, O_EXCL, O_CLOEXEC = 1, 64, 128, 524288
local EEXIST, EINTR = 17, 4

local function reason(verb, path)
  return ("cannot %s %s: %s"):format(verb, path, ffi.string(C.strerror(ffi.errno())))
end
local function fail(verb, path) errors.raise("data", reason(verb, path), 0) end

local kinds = { [0x4000] = "directory", [0x8000] = "file", [0xa000] = "link" }

--- What a path is. @treturn table|nil `kind` ("file", "directory", "other"), `size` in bytes, `mtime` in
-- seconds, `mode` (permission bits), `inode`; links are followed
function M.stat(path)
  local s = ffi.new "struct halo_statx"
  if C.statx(AT_FDCWD, path, 0, STATX_BASIC, s) ~= 0 then return nil, reason("stat", path) end
  return {
    kind = kinds[bit.band(s.mode, 0xf000)] or "other",
    mode = bit.band(s.mode, 0xfff),
    size = tonumber(s.size),
    mtime = tonumber(s.mtime.sec) + tonumber(s.mtime.nsec) * 1e-9,
    inode = tonumber(s.ino),
  }
end

--- True if something is there.
function M.exists(path) return M.stat(path) ~= nil end
function M.is_file(path)
  local s = M.stat(path)
  return s ~= nil and s.kind == "file"
end
function M.is_dir(path)
  local s = M.stat(path)
  return s ~= nil and s.kind == "directory"
end

--- Names in a folder, sorted by byte value (so every machine sees the same order), without `.` and `..`.
-- @treturn table|nil names, or nil and why
function M.list(path)
  local dir = C.opendir(path)
  if dir == nil then return nil, reason("list", path) end
  local names = {}
  while true do
    local entry = C.readdir64(dir)
    if entry == nil then break end
    local name = ffi.string(entry.name)
    if name ~= "." and name ~= ".." then names[#names + 1] = name end
  end
  C.closedir(dir)
  table.sort(names)
  return names
end

--- Every file below a folder, depth first in sorted order: `for path, relative in fs.walk(dir)`.
-- Hidden names (leading dot) are skipped; a folder met again through a link is not entered twice.
function M.walk(path)
  local entered = {}
  local function visit(folder, prefix)
    local real = M.realpath(folder)
    if not real or entered[real] then return end
    entered[real] = true
    for _, name in ipairs(M.list(folder) or {}) do
      if name:sub(1, 1) ~= "." then
        local full = M.join(folder, name)
        if M.is_dir(full) then
          visit(full, prefix .. name .. "/")
        else
          coroutine.yield(full, prefix .. name)
        end
      end
    end
  end
  return coroutine.wrap(function() visit(path, "") end)
end

--- Make a folder and its parents; no complaint if it is there.
function M.mkdir(path)
  local done = path:sub(1, 1) == "/" and "" or nil
  for part in path:gmatch "[^/]+" do
    done = done and done .. "/" .. part or part
    if C.mkdir(done, 511) ~= 0 then -- 0777, less the umask
      local made = ffi.errno() == EEXIST and M.is_dir(done)
      if not made then fail("make the folder", done) end
    end
  end
  return path
end

--- Whole content. @treturn string|nil content, or nil and why
function M.read(path)
  if M.is_dir(path) then return nil, ("cannot read %s: it is a folder"):format(path) end
  local file = io.open(path, "rb")
  if not file then return nil, reason("read", path) end
  local text = file:read "*a"
  file:close()
  if not text then return nil, reason("read", path) end
  return text
end

local function write_all(fd, bytes)
  local at, n = ffi.cast("const char *", bytes), #bytes
  while n > 0 do
    local wrote = tonumber(C.write(fd, at, n))
    if wrote < 0 then
      if ffi.errno() ~= EINTR then return false end
    else
      at, n = at + wrote, n - wrote
    end
  end
  return true
end

local function sync_folder(path)
  local fd = C.open(M.dirname(path), O_CLOEXEC)
  if fd >= 0 then
    C.fsync(fd)
    C.close(fd)
  end
end

local counter = 0

--- Replace a file's content atomically and durably: temporary file in the same folder, fsync, rename.
function M.write(path, bytes)
  counter = counter + 1
  local temporary = ("%s.%d-%d.tmp"):format(path, C.getpid(), counter)
  local fd = C.open(temporary, O_WRONLY + O_CREAT + O_EXCL + O_CLOEXEC, ffi.cast("unsigned int", 438)) -- 0666
  if fd < 0 then fail("write", path) end
  local ok = write_all(fd, bytes) and C.fsync(fd) == 0
  local code = ffi.errno()
  C.close(fd)
  if not ok or C.rename(temporary, path) ~= 0 then
    if ok then code = ffi.errno() end
    C.unlink(temporary)
    ffi.errno(code)
    fail("write", path)
  end
  sync_folder(path)
end

--- Rename, replacing what is there.
function M.rename(from, to)
  if C.rename(from, to) ~= 0 then fail("rename to " .. to, from) end
end

--- Delete a file; absent is fine.
function M.remove(path)
  if C.unlink(path) ~= 0 and ffi.errno() ~= 2 then fail("delete", path) end
end

--- Delete a folder and all in it; links are removed, not followed. Absent is fine.
function M.remove_tree(path)
  if C.unlink(path) == 0 or ffi.errno() == 2 then return end
  for _, name in ipairs(M.list(path) or {}) do M.remove_tree(path .. "/" .. name) end
  if C.rmdir(path) ~= 0 then fail("delete", path) end
end

--- Absolute path without links and dots. @treturn string|nil path, or nil and why
function M.realpath(path)
  local p = C.realpath(path, nil)
  if p == nil then return nil, reason("resolve", path) end
  local text = ffi.string(p)
  C.free(p)
  return text
end

function M.cwd()
  local buffer = ffi.new "char[4096]"
  if C.getcwd(buffer, 4096) == nil then fail("find", "the current folder") end
  return ffi.string(buffer)
end

--- A new empty folder under $TMPDIR (or /tmp); the caller deletes it.
function M.temp_dir()
  local template = (os.getenv "TMPDIR" or "/tmp") .. "/halo-XXXXXX"
  local buffer = ffi.new("char[?]", #template + 1, template)
  if C.mkdtemp(buffer) == nil then fail("make a folder from", template) end
  return ffi.string(buffer)
end

function M.dirname(path)
  local dir = path:match "^(.*)/[^/]*$"
  if dir == "" then return "/" end
  return dir or "."
end
function M.basename(path) return (path:match "([^/]*)$") end
--- "b/c" inside "a" -> "a/b/c"; an absolute second part wins.
function M.join(a, b)
  if b:sub(1, 1) == "/" then return b end
  return a:sub(-1) == "/" and a .. b or a .. "/" .. b
end

return M
