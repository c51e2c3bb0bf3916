--- `halo bench attention`: dense and sparse attention, forward and backward, side by side.
--
-- One rank, N(0,1) inputs. Flops are those of the tiles and columns that are computed, 4 D a pair forward
-- and 10 D backward; kept is the share of causal pairs. The yardstick is a product, plain BLAS on 1024^3 in
-- fp32 or, on a GPU, `ops.matmul` on 8192^3 in the dtype measured, the three cases and it taking turns. On a
-- GPU `path=portable` (hopper, general) measures one family of kernels instead of the device's own choice, and
-- `deterministic=true` what recipes get unless they say otherwise: sums in a fixed order.
local attention = require "halo.attention"
local bench = require "halo.bench"
local comms = require "halo.comm"
local device = require "halo.device"
local halo_ffi = require "halo.ffi"
local layouts = require "halo.layout"
local ops = require "halo.ops"
local plans = require "halo.plan"
local process = require "halo.process"
local rings = require "halo.ring"
local tensor = require "halo.tensor"

local C = halo_ffi.C

local M = {
  name = "attention",
  summary = "dense and sparse attention, forward and backward",
  options = { tokens = { "int", 8192 }, heads = { "int", 12 }, kv_heads = { "int", 12 }, head_dim = { "int", 64 },
    block = { "int", 64 }, kept = { "number", 0.1 }, repeats = { "int", 5 }, dtype = { "string", "f32" },
    device = { "string", "cpu" }, path = { "string", "auto" },
    deterministic = { "boolean", false } },
}

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

-- Flops of one forward pass of a plan, counted after rounding to tiles.
local function flops_of(plan, head_dim)
  local flops = 0
  for _, row in ipairs(plan:work(head_dim)) do
    for _, f in ipairs(row) do flops = flops + f end
  end
  return flops
end

-- The yardstick: a function to time, its flops, and its name.
local function product(o)
  if o.device ~= "cpu" then
    local n = 8192
    local function square(seed) return tensor.normal { n, n, seed = seed, dtype = o.dtype, device = o.device } end
    local a, b = square(1), square(2)
    local function multiply()
      ops.matmul(a, b):free()
      device.synchronize(o.device)
    end
    return multiply, 2 * n ^ 3, ("%s product of 8192^3"):format(o.dtype)
  end
  local n = 1024
  local a, b, c = tensor.normal { n, n, seed = 1 }, tensor.normal { n, n, seed = 2 }, tensor.new { n, n }
  local p = { a = a:pointer(), b = b:pointer(), c = c:pointer(), m = n, n = n, k = n, keep = { a, b, c } }
  return function() bench.sgemm(p) end, 2 * n ^ 3, "sgemm 1024^3"
end

--- Run; `options` has the arguments.
-- @treturn table `rows` (name, kept, forward_ms, backward_ms, forward_gflops, backward_gflops, speedup),
--   `product_gflops` and the sizes
-- @usage print(require("halo.bench").run("attention", { tokens = 4096 }))
function M.run(o)
  -- Which family of kernels: auto, hopper, portable, general.
  if o.path ~= "auto" then process.setenv("HALO_ATTENTION", o.path) end
  C.halo_set_deterministic(o.deterministic and 1 or 0)
  local comm = comms.self()
  local ring = rings.new { comm = comm }
  local layout = layouts.new { kind = "contiguous", tokens = o.tokens, block = o.block }
  local T = layout:local_tokens()
  local function random(heads, seed, requires_grad)
    return tensor.normal { 1, T, heads, o.head_dim, seed = seed, requires_grad = requires_grad, dtype = o.dtype,
      device = o.device }
  end
  local q, k, v = random(o.heads, 1, true), random(o.kv_heads, 2, true), random(o.kv_heads, 3, true)
  local grad = random(o.heads, 4)
  local cases = {}
  for i, kind in ipairs(kinds) do
    local plan = plans.new { layout = layout, heads = o.heads }
    kind.fill(plan, o)
    cases[i] = { name = kind.name, plan = plan:finish(), forwards = {}, backwards = {} }
  end
  local function now()
    device.synchronize(o.device)
    return bench.clock()
  end
  local multiply, product_flops, product_name = product(o)
  local product_seconds = math.huge
  for r = 0, o.repeats do
    for _, c in ipairs(cases) do
      local t0 = now()
      local out, lse = attention.attend { q = q, k = k, v = v, plan = c.plan, ring = ring }
      local t1 = now()
      out:backward(grad)
      local t2 = now()
      out:free()
      lse:free()
      if r > 0 then c.forwards[r], c.backwards[r] = t1 - t0, t2 - t1 end
    end
    product_seconds = math.min(product_seconds, bench.fastest(2, multiply))
  end
  comm:close()
  -- A device runs alone, and its peers tell medians; other programs share a CPU, so there the best counts.
  for _, c in ipairs(cases) do
    local of = o.device == "cpu" and function(list) return math.min(unpack(list)) end or bench.median
    c.forward, c.backward = of(c.forwards), of(c.backwards)
  end
  local data = { rows = {}, product_gflops = product_flops / product_seconds / 1e9 }
  for name, value in pairs(o) do data[name] = value end
  local lines = {}
  local dense = cases[1].forward + cases[1].backward
  for i, c in ipairs(cases) do
    local flops = flops_of(c.plan, o.head_dim)
    local row = { name = c.name, kept = c.plan:density(), gflop_forward = flops / 1e9, forward_ms = 1e3 * c.forward,
      backward_ms = 1e3 * c.backward, forward_gflops = flops / c.forward / 1e9,
      backward_gflops = 2.5 * flops / c.backward / 1e9, speedup = dense / (c.forward + c.backward) }
    data.rows[i] = row
    lines[i] = { row.name, ("%.1f %%"):format(100 * row.kept), ("%.1f"):format(row.forward_ms),
      ("%.1f"):format(row.forward_gflops), ("%.1f"):format(row.backward_ms), ("%.1f"):format(row.backward_gflops),
      ("%.2f x"):format(row.speedup) }
  end
  return bench.result(data, {
    title = ("attention, %s on %s, %d tokens, %d/%d heads of %d, blocks of %d%s%s"):format(o.dtype, o.device,
      o.tokens, o.heads, o.kv_heads, o.head_dim, o.block, o.path == "auto" and "" or ", " .. o.path,
      o.deterministic and ", deterministic" or ""),
    columns = { "plan", "kept", "forward ms", "GFLOP/s", "backward ms", "GFLOP/s", "speed-up" },
    rows = lines,
    notes = { ("%s in the same run: %.1f GFLOP/s"):format(product_name, data.product_gflops) },
  })
end

return M
