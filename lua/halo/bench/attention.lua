--- `halo bench attention`: dense and sparse attention, forward and backward, side by side.
--
-- One rank, fp32, N(0,1) inputs; the median of the repeats after one warm-up. Flops are those of the
-- tiles and columns that are computed, 4 D a pair forward and 10 D backward; kept is the share of causal
-- pairs. The rate of the matrix product in the same run is the bound to compare with.
local args = require "halo.args"
local attention = require "halo.attention"
local comms = require "halo.comm"
local halo_ffi = require "halo.ffi"
local layouts = require "halo.layout"
local plans = require "halo.plan"
local progress = require "halo.progress"
local rings = require "halo.ring"
local tensor = require "halo.tensor"

local C = halo_ffi.C

local M = {
  name = "attention",
  summary = "dense and sparse attention, forward and backward",
  options = { tokens = { "int", 8192 }, heads = { "int", 12 }, kv_heads = { "int", 12 }, head_dim = { "int", 64 },
    block = { "int", 64 }, kept = { "number", 0.1 }, repeats = { "int", 3 } },
}

local function median(list)
  table.sort(list)
  return list[math.floor(#list / 2) + 1]
end

local function dice(stream, index, n) return math.floor(C.halo_random_uniform(1, stream, index) * n) end

local kinds = {}

kinds[1] = { name = "dense", fill = function(p) p:add_all() end }

-- Random tiles: nothing for a kernel to lean on.
kinds[2] = { name = "random tiles", fill = function(p, o)
  local blocks = math.floor(o.tokens / o.block)
  local share = math.max(0, (o.kept * (blocks + 1) - 2) / (blocks - 1)) -- the diagonal is forced
  for head = 1, o.heads do
    local tiles, n = {}, 0
    for query = 1, blocks - 1 do
      for key = 0, query - 1 do
        if C.halo_random_uniform(1, 10 + head, query * blocks + key) < share then
          n = n + 1
          tiles[n] = { query, key }
        end
      end
    end
    p:add_tiles(tiles, { head = head })
  end
  p:force { diagonal = true }
end }

-- What vertical-slash selection gives: most of the budget in diagonals, the rest in columns.
kinds[3] = { name = "vertical-slash", fill = function(p, o)
  local blocks = math.floor(o.tokens / o.block)
  for head = 1, o.heads do
    local diagonals, columns = {}, {}
    for i = 1, math.max(1, math.floor(0.6 * o.kept * blocks)) do diagonals[i] = dice(40 + head, i, blocks) end
    for i = 1, math.floor(0.25 * o.kept * o.tokens) do columns[i] = dice(80 + head, i, o.tokens) end
    p:add_diagonals(diagonals, { head = head }):add_columns(columns, { head = head })
  end
  p:force { sink = 16, window = 2 * o.block }
end }

-- GFLOP/s of an n^3 product in this run.
local function product_rate(n, repeats)
  local a, b = tensor.normal { n, n, seed = 1 }, tensor.normal { n, n, seed = 2 }
  local seconds = {}
  for i = 0, repeats do
    local started = progress.clock()
    a:matmul(b):free()
    if i > 0 then seconds[i] = progress.clock() - started end
  end
  return 2 * n ^ 3 / median(seconds) / 1e9
end

local Result = {}
Result.__index = Result

--- Run.
-- @tparam[opt] table o named arguments
-- @tparam[opt=8192] int o.tokens
-- @tparam[opt=12] int o.heads
-- @tparam[opt=12] int o.kv_heads
-- @tparam[opt=64] int o.head_dim
-- @tparam[opt=64] int o.block
-- @tparam[opt=0.1] number o.kept share of causal pairs that the sparse cases aim at
-- @tparam[opt=3] int o.repeats
-- @treturn table `rows` (name, kept, forward_ms, backward_ms, forward_gflops, backward_gflops, speedup),
--   `product_gflops` and the sizes; prints as a table, and is plain data for JSON
-- @usage print(require("halo.bench.attention").run { tokens = 4096 })
function M.run(o)
  o = args.named("bench.attention", o or {}, M.options)
  local comm = comms.self()
  local ring = rings.new { comm = comm }
  local layout = layouts.new { kind = "contiguous", tokens = o.tokens, block = o.block }
  local T = layout:local_tokens()
  local function random(heads, seed, requires_grad)
    return tensor.normal { 1, T, heads, o.head_dim, seed = seed, requires_grad = requires_grad }
  end
  local q, k, v = random(o.heads, 1, true), random(o.kv_heads, 2, true), random(o.kv_heads, 3, true)
  local grad = random(o.heads, 4)
  local result = setmetatable({ rows = {}, threads = C.halo_threads() }, Result)
  for name, value in pairs(o) do result[name] = value end
  for i, kind in ipairs(kinds) do
    local plan = plans.new { layout = layout, heads = o.heads }
    kind.fill(plan, o)
    plan:finish()
    local forward, backward = {}, {}
    for r = 0, o.repeats do
      local t0 = progress.clock()
      local out, lse = attention.attend { q = q, k = k, v = v, plan = plan, ring = ring }
      local t1 = progress.clock()
      out:backward(grad)
      local t2 = progress.clock()
      out:free()
      lse:free()
      if r > 0 then forward[r], backward[r] = t1 - t0, t2 - t1 end
    end
    local flops = 0
    for _, row in ipairs(plan:work(o.head_dim)) do
      for _, f in ipairs(row) do flops = flops + f end
    end
    local f, b = median(forward), median(backward)
    local row = { name = kind.name, kept = plan:density(), gflop_forward = flops / 1e9, forward_ms = 1e3 * f,
      backward_ms = 1e3 * b, forward_gflops = flops / f / 1e9, backward_gflops = 2.5 * flops / b / 1e9 }
    local dense = result.rows[1] or row
    row.speedup = (dense.forward_ms + dense.backward_ms) / (row.forward_ms + row.backward_ms)
    result.rows[i] = row
  end
  comm:close()
  result.product_gflops = product_rate(2048, o.repeats)
  return result
end

Result.__tostring = function(self)
  local lines = {
    ("attention fp32, %d tokens, %d/%d heads of %d, blocks of %d, %d thread%s"):format(self.tokens, self.heads,
      self.kv_heads, self.head_dim, self.block, self.threads, self.threads == 1 and "" or "s"),
    ("%-16s %7s %11s %9s %11s %9s %9s"):format("", "kept", "forward ms", "GFLOP/s", "backward ms", "GFLOP/s",
      "speed-up"),
  }
  for _, r in ipairs(self.rows) do
    lines[#lines + 1] = ("%-16s %6.1f%% %11.1f %9.1f %11.1f %9.1f %8.2fx"):format(r.name, 100 * r.kept, r.forward_ms,
      r.forward_gflops, r.backward_ms, r.backward_gflops, r.speedup)
  end
  lines[#lines + 1] = ("matrix product 2048^3: %.1f GFLOP/s in the same run"):format(self.product_gflops)
  return table.concat(lines, "\n")
end

return M
