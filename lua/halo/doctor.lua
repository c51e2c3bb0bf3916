--- What this machine is, whether everything Halo wants is here, and proof that the engine works on it.
--
-- A check is `{ name, status, text, fix }`: status "ok", "warn" (works, but something is lost) or "FAIL";
-- `fix` is the command that helps. `halo doctor` prints them, a run stores `environment()` beside its
-- results so that numbers can be told apart later.
local fs = require "halo.fs"
local process = require "halo.process"
local term = require "halo.term"

local M = {}

local function ok(name, text) return { name = name, status = "ok", text = text } end
local function warn(name, text, fix) return { name = name, status = "warn", text = text, fix = fix } end
local function fail(name, text, fix) return { name = name, status = "FAIL", text = text, fix = fix } end

---- Facts -----------------------------------------------------------------------------------------

local function processor()
  local text = fs.read "/proc/cpuinfo" or ""
  local flags = text:match "\nflags%s*:%s*([^\n]*)" or text:match "\nFeatures%s*:%s*([^\n]*)" or ""
  local units = {}
  for _, name in ipairs { "avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "asimd" } do
    if (" " .. flags .. " "):find(" " .. name .. " ", 1, true) then units[#units + 1] = name end
  end
  return { name = text:match "model name%s*:%s*([^\n]*)" or "unknown", units = units }
end

local function memory()
  local text = fs.read "/proc/meminfo" or ""
  local function kib(name) return (tonumber(text:match(name .. ":%s+(%d+)")) or 0) * 1024 end
  local total, free = kib "MemTotal", kib "MemAvailable"
  -- A container may allow less than the machine has.
  local limit = tonumber((fs.read "/sys/fs/cgroup/memory.max" or ""):match "%d+")
  if limit and limit < total then total, free = limit, math.min(free, limit) end
  return { total = total, available = free }
end

local function system()
  local release = fs.read "/etc/os-release" or ""
  return { name = release:match 'PRETTY_NAME="([^"]*)"' or "unknown",
    kernel = (fs.read "/proc/sys/kernel/osrelease" or "unknown"):gsub("%s+$", "") }
end

-- OpenBLAS is a dependency of the library, so its functions are found through it.
local function blas()
  local halo_ffi = require "halo.ffi"
  local ffi, C = halo_ffi.ffi, halo_ffi.C
  ffi.cdef [[
  char *openblas_get_config(void);
  char *openblas_get_corename(void);
  int openblas_get_parallel(void);
  ]]
  local found, config = pcall(function() return ffi.string(C.openblas_get_config()) end)
  if not found then return nil end
  local threading = ({ [0] = "none", [1] = "pthreads", [2] = "OpenMP" })[tonumber(C.openblas_get_parallel())]
  return { config = config:match "^OpenBLAS%s+[%d.]+" or config, core = ffi.string(C.openblas_get_corename()),
    threading = threading or "unknown" }
end

-- fp32 product rate, GFLOP/s, best of three.
local function product_rate()
  local tensor, progress = require "halo.tensor", require "halo.progress"
  local n, best = 1024, 0
  local a = tensor.normal { shape = { n, n }, seed = 1 }
  for _ = 1, 4 do -- the first starts the threads
    local start = progress.clock()
    a:matmul(a):free()
    best = math.max(best, 2 * n ^ 3 / (progress.clock() - start) / 1e9)
  end
  a:free()
  return best
end

-- "13.0" of 13000; nil of 0.
local function cuda_version(number)
  return number > 0 and ("%d.%d"):format(math.floor(number / 1000), math.floor(number % 1000 / 10)) or nil
end

-- What CUDA code this build has, the versions around it, and the devices.
local function cuda()
  local halo_ffi = require "halo.ffi"
  local ffi, C = halo_ffi.ffi, halo_ffi.C
  local versions = ffi.new "int32_t[2]"
  C.halo_cuda_versions(versions, versions + 1)
  local facts = { targets = ffi.string(C.halo_cuda_targets()), driver = cuda_version(versions[0]),
    runtime = cuda_version(versions[1]), reason = ffi.string(C.halo_device_reason(C.HALO_CUDA)), devices = {} }
  local row = ffi.new "halo_device_row"
  for i = 0, C.halo_device_count(C.HALO_CUDA) - 1 do
    if C.halo_device_read(row, C.HALO_CUDA, i) == 0 then
      facts.devices[i + 1] = { name = ffi.string(row.name), major = row.major, minor = row.minor,
        total = tonumber(row.total_bytes), free = tonumber(row.free_bytes), processors = row.processors }
    end
  end
  return facts
end

--- Facts of this machine and build as a plain table, stored with every run.
function M.environment()
  local halo = require "halo"
  local halo_ffi = require "halo.ffi"
  local git = fs.exists(M.root() .. ".git") and process.which "git"
    and process.capture("git -C " .. process.quote(M.root()) .. " rev-parse HEAD 2>/dev/null")
  return {
    halo = halo.version, library = halo_ffi.path, luajit = jit.version, git = git and git:match "%x+" or nil,
    system = system(), processor = processor(), cores = process.cores(), memory = memory(), blas = blas(),
    threads = halo_ffi.C.halo_threads(), cuda = cuda(),
    cuda_devices = halo_ffi.C.halo_device_count(halo_ffi.C.HALO_CUDA),
    date = os.date "!%Y-%m-%dT%H:%M:%SZ", host = (fs.read "/proc/sys/kernel/hostname" or ""):gsub("%s+$", ""),
  }
end

--- Root of the checkout or installation, with a slash.
function M.root()
  return debug.getinfo(1, "S").source:sub(2):gsub("[^/]*$", "") .. "../../"
end

---- Checks ----------------------------------------------------------------------------------------

local checks = {}

function checks.program()
  local halo = require "halo"
  local is_wide = require("ffi").abi "gc64"
  local text = ("Halo %s, %s%s"):format(halo.version, jit.version, is_wide and " GC64" or "")
  if not is_wide then return warn("program", text .. ": Lua memory ends at 2 GB", "install Debian's luajit") end
  return ok("program", text)
end

function checks.library()
  local halo_ffi = require "halo.ffi"
  return ok("library", ("%s, %d ops"):format(fs.realpath(halo_ffi.path) or halo_ffi.path, halo_ffi.C.halo_op_count()))
end

function checks.system()
  local s = system()
  return ok("system", ("%s, Linux %s"):format(s.name, s.kernel))
end

function checks.processor()
  local p = processor()
  local text = ("%s, %d cores, %s"):format(p.name, process.cores(), table.concat(p.units, " "))
  if p.name ~= "unknown" and #p.units == 0 then
    return warn("processor", text .. "no vector units that Halo knows")
  end
  return ok("processor", text)
end

function checks.memory()
  local m = memory()
  local text = ("%s, %s available"):format(term.bytes(m.total), term.bytes(m.available))
  if m.available < 2 * 2 ^ 30 then
    return warn("memory", text .. "; recipes/tiny.lua wants 2 GiB", "close other programs")
  end
  return ok("memory", text)
end

function checks.threads()
  local C = require("halo.ffi").C
  local n, cores = C.halo_threads(), process.cores()
  local forced = os.getenv "OMP_NUM_THREADS"
  local text = ("%d of %d cores%s"):format(n, cores, forced and ", OMP_NUM_THREADS=" .. forced or "")
  if n > cores then return warn("threads", text .. ": more threads than cores", "unset OMP_NUM_THREADS") end
  return ok("threads", text)
end

function checks.blas()
  local b = blas()
  if not b then return fail("blas", "OpenBLAS does not answer", "tools/install-deps && tools/build") end
  local text = ("%s for %s, %s threads, %.0f GFLOP/s (fp32, 1024)"):format(b.config, b.core, b.threading,
    product_rate())
  if b.threading ~= "OpenMP" then
    return warn("blas", text .. ": two thread pools will fight over the cores",
      "apt-get install libopenblas-openmp-dev")
  end
  return ok("blas", text)
end

function checks.mpi()
  local path = process.which "mpirun"
  if not path then
    return warn("mpi", "no mpirun: one rank only", "apt-get install openmpi-bin")
  end
  local version = (process.capture "mpirun --version 2>/dev/null" or ""):match "[^\n]+" or "unknown version"
  local ranks = require("halo.launch").job()
  return ok("mpi", version .. (ranks > 1 and (", this is a job of %d ranks"):format(ranks) or ""))
end

function checks.cuda()
  local facts = cuda()
  if facts.targets == "" then return ok("cuda", "not in this build, which found no nvcc; optional") end
  local text = ("built for %s with CUDA %s, driver %s"):format(facts.targets, facts.runtime or "?",
    facts.driver and "for CUDA " .. facts.driver or "absent")
  if #facts.devices == 0 then
    text = text .. "; " .. facts.reason
    -- Without a driver there is nothing to expect; with one, a device was.
    return facts.driver and warn("cuda", text, "nvidia-smi") or ok("cuda", text)
  end
  local is_fit = true
  for _, d in ipairs(facts.devices) do
    text = text .. ("; %s (%d.%d, %s, %s free)"):format(d.name, d.major, d.minor, term.bytes(d.total),
      term.bytes(d.free))
    is_fit = is_fit and (d.major >= 8 or facts.targets == "shadow")
  end
  if is_fit then return ok("cuda", text) end
  return warn("cuda", text .. "; devices before 8.0 (Ampere) cannot be used", "CUDA_VISIBLE_DEVICES")
end

function checks.packages()
  local missing = {}
  for _, name in ipairs { "cjson", "argparse", "string.buffer" } do
    if not pcall(require, name) then missing[#missing + 1] = name end
  end
  if #missing > 0 then return fail("packages", "Lua cannot load " .. table.concat(missing, ", "),
    "tools/install-deps") end
  return ok("packages", "lua-cjson, lua-argparse")
end

function checks.folder()
  local path = fs.is_dir "runs" and "runs" or "."
  local probe = ("%s/.halo-probe-%d"):format(path, math.random(1e9))
  if not pcall(fs.write, probe, "x") then
    return warn("folder", ("%s cannot be written"):format(fs.realpath(path) or path), "start halo where it may write")
  end
  fs.remove(probe)
  return ok("folder", ("%s can be written"):format(fs.realpath(path) or path))
end

local order = { "program", "library", "system", "processor", "memory", "threads", "blas", "mpi", "cuda", "packages",
  "folder" }

-- Without the library these have nothing to look at.
local needs_library = { threads = true, blas = true, cuda = true }

--- Run all checks. A check that raises has failed.
-- @treturn table list of { name, status, text, fix }
function M.run()
  local out, has_library = {}, true
  for _, name in ipairs(order) do
    if has_library or not needs_library[name] then
      local fine, result = pcall(checks[name])
      out[#out + 1] = fine and result or fail(name, tostring(result), "tools/install-deps && tools/build")
      if name == "library" then has_library = fine end
    end
  end
  return out
end

--- The parity proof as checks: one per (dtype, number of ranks).
-- @tparam[opt] table o as for `halo.parity.run`
function M.parity(o)
  local out, device = {}, require "halo.device"
  for _, row in ipairs(require("halo.parity").run(o)) do
    local parts = {}
    for i, part in ipairs(require("halo.parity").parts) do parts[i] = ("%s %.0e"):format(part, row[part]) end
    local text = ("%d ranks = 1 rank, %d cases, limit %.0e: %s"):format(row.ranks, row.cases, row.limit,
      table.concat(parts, "  "))
    out[#out + 1] = row.ok and ok("ring " .. row.dtype, text)
      or fail("ring " .. row.dtype, text .. "; worst: " .. row.worst,
        "this build computes wrong results: do not train with it")
  end
  if device.count "cuda" == 0 then return out end
  for _, row in ipairs(require("halo.parity").device()) do
    local parts = {}
    for i, part in ipairs(require("halo.parity").parts) do parts[i] = ("%s %.0e"):format(part, row[part]) end
    local text = ("attention on 1 to %d ranks = fp64 on the cpu, %d cases, limit %.0e: %s"):format(row.ranks, row.cases,
      row.limit, table.concat(parts, "  "))
    out[#out + 1] = row.ok and ok("cuda " .. row.dtype, text)
      or fail("cuda " .. row.dtype, text .. "; worst: " .. row.worst,
        "this build computes wrong results on this device: do not train with it")
  end
  return out
end

return M
