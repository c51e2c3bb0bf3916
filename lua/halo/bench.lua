--- Benchmarks: how long things take here, beside the best that this machine can do.
-- Every benchmark is a file in bench/ that returns `{ name, summary, options, run }`: `options` are the
-- named arguments of `run` in the form of `halo.args`, and what `run(o)` gives back is plain data (for
-- JSON) that prints as a table.
--
-- A figure counts only beside its yardstick measured in the same run: the machine may be shared, and its
-- clock rate depends on what the other core does. So yardstick and subject take turns, and the best time
-- of each counts (interference only ever adds time).
local args = require "halo.args"
local errors = require "halo.errors"
local ffi = require "ffi"
local fs = require "halo.fs"
local halo_ffi = require "halo.ffi"
local json = require "halo.json"
local progress = require "halo.progress"
local term = require "halo.term"

local C = halo_ffi.C

local M = { clock = progress.clock }

local here = debug.getinfo(1, "S").source:sub(2):gsub("[^/]*$", "") .. "bench/"

--- Names of all benchmarks, sorted.
function M.names()
  local names = {}
  for _, file in ipairs(fs.list(here)) do
    local name = file:match "^([%w_]+)%.lua$"
    if name then names[#names + 1] = name end
  end
  table.sort(names)
  return names
end

--- A benchmark's module.
function M.get(name)
  if not fs.is_file(here .. tostring(name) .. ".lua") then
    errors.raise("usage", ('no benchmark "%s"%s'):format(tostring(name), args.did_you_mean(name, M.names())), 2)
  end
  return require("halo.bench." .. name)
end

--- The middle one of some numbers; of an even count the lower of the two.
-- @tparam table list @treturn number
function M.median(list)
  local sorted = { unpack(list) }
  table.sort(sorted)
  return sorted[math.ceil(#sorted / 2)]
end

--- Best seconds of a function, after one call that touches memory and starts threads.
function M.fastest(repeats, f)
  local best = math.huge
  for r = 0, repeats do
    local start = M.clock()
    f()
    if r > 0 then best = math.min(best, M.clock() - start) end
  end
  return best
end

local is_declared
--- Plain BLAS on fp32 tensors, the yardstick of products: `c = op(a) op(b)`, row-major.
-- The engine is linked with it, so its symbol is found through the engine's library.
-- @tparam table o `c`, `a`, `b` (pointers to contiguous fp32), `m`, `n`, `k`, `ta`, `tb` (transposed?), `beta` (0)
function M.sgemm(o)
  if not is_declared then
    pcall(ffi.cdef, [[void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a,
      int lda, const float *b, int ldb, float beta, float *c, int ldc);]])
    is_declared = true
  end
  C.cblas_sgemm(101, o.ta and 112 or 111, o.tb and 112 or 111, o.m, o.n, o.k, 1, o.a, o.ta and o.m or o.k,
    o.b, o.tb and o.k or o.n, o.beta or 0, o.c, o.n)
end

--- What the numbers are measured on: processor, threads, and how many others want it.
function M.machine()
  local model = (fs.read "/proc/cpuinfo" or ""):match "model name%s*:%s*([^\n]+)" or "unknown processor"
  return { cpu = model, threads = C.halo_threads(), load = tonumber((fs.read "/proc/loadavg" or ""):match "^[%d.]+") }
end

--- Make plain data print as a title, a table and notes.
-- @tparam table data
-- @tparam table text `title`, `columns`, `rows` (lists of strings and numbers), `notes`
-- @treturn table data
function M.result(data, text)
  return setmetatable(data, { __tostring = function()
    local rows = { text.columns }
    for i, row in ipairs(text.rows) do rows[i + 1] = row end
    local lines = { text.title, "", term.table(rows), "" }
    for _, note in ipairs(text.notes) do lines[#lines + 1] = note end
    return table.concat(lines, "\n")
  end })
end

--- Run a benchmark.
-- @tparam string name
-- @tparam[opt] table o its options, and `threads`
-- @treturn table what it measured; `machine` says on what
function M.run(name, o)
  local bench = M.get(name)
  local fields, own = { threads = "int?" }, {}
  for option, spec in pairs(bench.options) do fields[option] = spec end
  o = args.named("bench." .. name, o or {}, fields)
  for option in pairs(bench.options) do own[option] = o[option] end
  local threads = C.halo_threads()
  if o.threads then C.halo_set_threads(o.threads) end
  local machine = M.machine()
  local ok, result = pcall(bench.run, own)
  C.halo_set_threads(threads)
  if not ok then error(result, 0) end
  result.machine = machine
  return result
end

--- A result as JSON text.
function M.json(name, result)
  return json.encode({ benchmark = name, halo = require("halo").version, data = result }, { pretty = true }) .. "\n"
end

return M
