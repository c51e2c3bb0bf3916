--- The only `ffi.load` and the only `ffi.cdef` of the engine.
-- The declarations are the text of `core/halo.h` without its preprocessor lines, made by the build
-- (`halo_cdef.h`) and kept beside the library, so that a header and a library of different builds
-- cannot meet; `halo_version()` is compared as well.
--
-- Where the library is looked for: `HALO_LIB` (path of the shared object), beside the running
-- program, `build/` beside the Lua tree, and the places an installation uses.
--
-- Use:
--    local halo_ffi = require "halo.ffi"
--    local C, check = halo_ffi.C, halo_ffi.check
--    check(C.halo_tensor_new(out, C.HALO_F32, C.HALO_CPU, 2, shape))
-- Cache the namespace `C`, never single functions (LuaJIT's ext_ffi_tutorial says why).
local ffi = require "ffi"
local errors = require "halo.errors"

local M = { ffi = ffi }

--- What `halo_version()` must return: major*10000 + minor*100 + patch.
M.version = 100

local function readable(path)
  local file = io.open(path, "rb")
  if file then
    file:close()
    return true
  end
end

-- .../lua/halo/ffi.lua -> .../ (the root of a checkout, or share/halo of an installation)
local root = debug.getinfo(1, "S").source:sub(2):gsub("[^/]*$", "") .. "../../"

local function library_folders()
  local folders = {}
  local host = rawget(_G, "halo_host") -- set by the `halo` program (lua/host.c)
  if host then folders[1] = host.dir .. "/" end
  for _, f in ipairs { root .. "build/", root .. "../../lib/", root .. "../../lib/halo/" } do
    folders[#folders + 1] = f
  end
  return folders
end

local function find_library()
  local forced = os.getenv "HALO_LIB"
  if forced and forced ~= "" then
    if readable(forced) then return forced end
    errors.raise("environment", ("HALO_LIB names %s, which cannot be read"):format(forced), 0)
  end
  local tried = {}
  for _, folder in ipairs(library_folders()) do
    if readable(folder .. "libhalo.so") then return folder .. "libhalo.so" end
    tried[#tried + 1] = folder
  end
  errors.raise("environment", "libhalo.so was not found in " .. table.concat(tried, ", ")
    .. "; build it with tools/build, or set HALO_LIB to its path", 0)
end

local function declare(library)
  -- A type can be declared once per process, but this module may be loaded again (busted does).
  if pcall(ffi.typeof, "halo_tensor *") then return end
  local folder = library:gsub("[^/]*$", "")
  local text
  for _, path in ipairs { folder .. "halo_cdef.h", root .. "halo_cdef.h" } do
    local file = io.open(path, "rb")
    if file then
      text = file:read "*a"
      file:close()
      break
    end
  end
  if not text then
    errors.raise("environment", "halo_cdef.h is missing beside " .. library .. "; build with tools/build", 0)
  end
  ffi.cdef(text)
end

if type(rawget(_G, "jit")) ~= "table" then
  error("halo needs LuaJIT (found " .. _VERSION .. "); run it with `halo exec` or `luajit`", 0)
end

-- Debian 12's LuaJIT (2.1.0-beta3, March 2022) goes on at a wrong place after a trace that was stitched
-- around a call of a C function value through call_at: a loop of 2000 tensor operations ends in a
-- corrupted stack, with -Ominstitch out of reach it does not (tests/spec/tensor_spec.lua has the loop).
-- Stitching only matters for Lua code that mixes hot arithmetic with uncompiled built-ins.
require("jit.opt").start "minstitch=1000000"

--- Path of the shared object in use.
M.path = find_library()
declare(M.path)

-- When a Lua state closes it unloads its libraries, and a worker thread of OpenMP that still spins then runs
-- into unmapped code. So the library stays until the process ends.
local RTLD_NOW, RTLD_NODELETE = 2, 0x1000
ffi.cdef [[
void *dlopen(const char *path, int mode);
int setenv(const char *name, const char *value, int overwrite);
]]
-- OpenMP threads that wait spin first, by default for about a millisecond; where other processes want the
-- cores (ranks, a shared machine) the spinning thread holds up the one it waits for. 36 small attention
-- cases on two cores with a load of 6: 9.4 s with libgomp's default, 1.0 s with 4000 turns, 0.5 s without
-- spinning; alone on the machine the difference is microseconds per loop. libgomp reads this when loaded.
if not os.getenv "OMP_WAIT_POLICY" and not os.getenv "GOMP_SPINCOUNT" then
  ffi.C.setenv("GOMP_SPINCOUNT", "4000", 1)
end
ffi.C.dlopen(M.path, RTLD_NOW + RTLD_NODELETE)

--- The C namespace: every `halo_*` function and `HALO_*` constant.
M.C = ffi.load(M.path)
local C = M.C

if C.halo_version() ~= M.version then
  errors.raise("environment", ("%s has version %d, but these Lua files want %d; rebuild with tools/build")
    :format(M.path, C.halo_version(), M.version), 0)
end

--- Raise unless `status` is HALO_OK. The error value carries `code`, `name`, `class` and `message`.
-- @param status what a `halo_*` function returned
-- @tparam[opt=1] int level frame to blame above the caller of `check`, as in `error`; 0: no position
function M.check(status, level)
  local code = tonumber(status)
  if code == 0 then return end
  level = level or 1
  local where
  if level > 0 then
    local info = debug.getinfo(level + 1, "Sl")
    if info and info.currentline > 0 then where = info.short_src .. ":" .. info.currentline .. ":" end
  end
  local message = ffi.string(C.halo_error_message())
  if code == C.HALO_ENOMEM then message = message .. "\n" .. require("halo.memory").report() end
  error(errors.new {
    code = code,
    name = ffi.string(C.halo_status_name(code)),
    class = errors.status_classes[code] or "internal",
    message = message,
    where = where,
  }, 0)
end

--- Call `f(...)` and check; when memory is short, collect garbage and try once more, because the
-- collector cannot see the bytes that Lua handles keep alive.
-- @tparam int level frame to blame above the caller of `call_at`, as in `check`
function M.call_at(level, f, ...)
  local status = f(...)
  if status == C.HALO_OK then return end
  if status == C.HALO_ENOMEM then
    collectgarbage()
    collectgarbage() -- finalizers run in the first cycle free what the second can see
    status = f(...)
    if status == C.HALO_OK then return end
  end
  M.check(status, level > 0 and level + 1 or 0)
end

--- `call_at(1, f, ...)`: blame the caller of `call`.
-- @usage halo_ffi.call(C.halo_tensor_new, out, dtype, device, ndim, shape)
function M.call(f, ...) M.call_at(2, f, ...) end

--- Text from functions of the form `int64_t f(..., char *text, int64_t capacity)` that return the
-- length they wanted (halo_plan_explain and friends).
-- @tparam function f receives `(buffer, capacity)` and returns the wanted length
function M.text(f)
  local capacity = 1024
  while true do
    local buffer = ffi.new("char[?]", capacity)
    local wanted = tonumber(f(buffer, capacity))
    if wanted < 0 then M.check(wanted, 2) end
    if wanted < capacity then return ffi.string(buffer) end
    capacity = wanted + 1
  end
end

return M
