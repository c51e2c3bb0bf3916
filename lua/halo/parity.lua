--- Proof on this machine: a ring of W ranks computes what one rank computes.
--
-- Ring attention can drift silently: the loss looks fine while gradients of deep models go wrong with the
-- number of ranks. Two proofs, both of attention forward and backward over virtual ranks (all code of the
-- ring but the wires), both comparing out, lse, dQ, dK and dV each:
--
--    parity.run      W ranks against one in the same precision, over every layout and schedule, dense,
--                    sparse and packed, and sparse attention that selects everything against dense:
--                    what `halo doctor --parity` shows
--    parity.drift    the error against one fp64 rank as W grows: partial results that lose digits at
--                    every hop show here (distributed.md 3)
--    parity.device   attention on a device against one fp64 rank on the CPU, for head sizes of the fast
--                    kernels and the general one, dense, sparse and packed, on one rank and over a ring
--
-- `parity.compute` is the run itself, over any communicator; tests compare processes with virtual ranks.
-- Lengths do not divide: padding is part of what is proven. An error is the largest difference over the
-- largest reference value.
local args = require "halo.args"
local attention = require "halo.attention"
local comms = require "halo.comm"
local errors = require "halo.errors"
local halo_ffi = require "halo.ffi"
local layouts = require "halo.layout"
local plans = require "halo.plan"
local rings = require "halo.ring"
local tensor = require "halo.tensor"

local ffi, C = halo_ffi.ffi, halo_ffi.C

local M = {}

--- What is compared, in the order of tables.
M.parts = { "out", "lse", "dq", "dk", "dv" }

--- Largest error that passes: the order of summation differs between W ranks and one, nothing else may.
M.limits = { f64 = 1e-12, f32 = 1e-5 }

--- The same on a device: tensor cores round what they multiply to bf16, 2^-9 of it, at three places of the
-- backward pass.
M.device_limits = { f32 = 1e-5, bf16 = 1.5e-2 }

local shape_fields = {
  tokens = { "int", 1000 }, batch = { "int", 1 }, heads = { "int", 4 }, kv_heads = { "int", 2 },
  head_dim = { "int", 64 }, block = { "int", 32 }, layout = { "string", "striped" },
  schedule = { "string", "flat" }, inner = "int?", plan = { "string", "sparse" }, documents = { "boolean", false },
  seed = { "int", 1 },
}

local function with(fields)
  local all = {}
  for name, kind in pairs(shape_fields) do all[name] = kind end
  for name, kind in pairs(fields) do all[name] = kind end
  return all
end

local function dice(o, stream, index, n)
  return math.floor(C.halo_random_uniform(o.seed, stream, index) * n)
end

-- A plan with a bit of everything: diagonals, columns and tiles that differ by head, and force rules.
local function make_plan(o, layout)
  local p = plans.new { layout = layout, heads = o.heads, batch = o.batch }
  local blocks = math.ceil(o.tokens / o.block)
  if o.plan == "dense" then
    p:add_all()
  elseif o.plan == "all tiles" then
    local tiles = {}
    for query = 0, blocks - 1 do
      for key = 0, query do tiles[#tiles + 1] = { query, key } end
    end
    p:add_tiles(tiles)
  elseif o.plan == "sparse" then
    for head = 1, o.heads do
      local where, diagonals, columns, tiles = { head = head }, {}, {}, {}
      for i = 1, 3 do diagonals[i] = dice(o, 100 + head, i, blocks) end
      for i = 1, 24 do columns[i] = dice(o, 200 + head, i, o.tokens) end
      for i = 1, blocks do
        local query = dice(o, 300 + head, i, blocks)
        tiles[i] = { query, dice(o, 400 + head, i, query + 1) }
      end
      p:add_diagonals(diagonals, where):add_columns(columns, where):add_tiles(tiles, where)
    end
    p:force { sink = 4, window = o.block }
  else
    errors.raise("usage", ('parity: no plan "%s" (there is: all tiles, dense, sparse)'):format(o.plan), 3)
  end
  if o.documents then
    local documents = ffi.new("int32_t[?]", o.batch * o.tokens)
    for b = 0, o.batch - 1 do
      local id = 0
      for t = 0, o.tokens - 1 do
        if dice(o, 500 + b, t, 200) == 0 then id = id + 1 end
        documents[b * o.tokens + t] = id
      end
    end
    p:set_documents(documents)
  end
  return p:finish()
end

-- Value `what` (1 q, 2 k, 3 v, 4 gradient) of all tokens, fp32 values, `[B,N,heads,D]`.
local function global_values(o, what, heads)
  local t = tensor.normal { o.batch, o.tokens, heads, o.head_dim, seed = o.seed, stream = what, device = "cpu" }
  return o.rounded and t:cast(o.rounded):cast "f32" or t
end

-- The tokens that live in this process, padding zero.
local function deal(o, global, layout, comm, dtype)
  local heads = global.shape[3]
  local row, T, here = heads * o.head_dim, layout:local_tokens(), comm:here()
  local from = global:host()
  local to = ffi.new("float[?]", o.batch * here * T * row)
  for b = 0, o.batch - 1 do
    for i = 0, here * T - 1 do
      local token = layout:global(comm:rank() + math.floor(i / T), i % T)
      if token < o.tokens then
        ffi.copy(to + (b * here * T + i) * row, from + (b * o.tokens + token) * row, row * 4)
      end
    end
  end
  local t = tensor.from_pointer(to, { shape = { o.batch, here * T, heads, o.head_dim }, device = "cpu" })
  return (dtype == "f32" and t or t:cast(dtype)):to(o.device or "cpu"):detach()
end

-- All tokens in global order as doubles, from the parts of all processes. `rows` is what a token holds,
-- `outer` the dims before the tokens.
local function collect(o, t, layout, comm, outer, row)
  local out = ffi.new("double[?]", outer * o.tokens * row)
  local T = layout:local_tokens()
  for process, part in ipairs(comm:all_gather_tensor(t)) do
    local host = part:host()
    local here = part.count / (outer * T * row)
    for a = 0, outer - 1 do
      for i = 0, here * T - 1 do
        local token = layout:global((process - 1) * here + math.floor(i / T), i % T)
        if token < o.tokens then
          for x = 0, row - 1 do out[(a * o.tokens + token) * row + x] = host[(a * here * T + i) * row + x] end
        end
      end
    end
  end
  return { values = out, count = outer * o.tokens * row }
end

--- Attention and its gradients over the ranks of a communicator, from inputs that depend on the seed
-- alone; every process gets the whole result. Collective.
-- @tparam table o sizes as in `parity.drift`, and:
-- @tparam Comm o.comm
-- @tparam[opt="f32"] string o.dtype
-- @tparam[opt="cpu"] string o.device
-- @tparam[opt] string o.rounded dtype that the inputs are rounded to first
-- @treturn table out, lse, dq, dk, dv: `{ values = double[], count }` in global order
function M.compute(o)
  o = args.named("parity.compute", o, with { comm = "table", dtype = { "string", "f32" },
    device = { "string", "cpu" }, rounded = "string?" })
  local layout = layouts.new { kind = o.layout, tokens = o.tokens, world = o.comm:size(), block = o.block }
  local ring = rings.new { comm = o.comm, schedule = o.schedule, inner = o.inner }
  local plan = make_plan(o, layout)
  local q = deal(o, global_values(o, 1, o.heads), layout, o.comm, o.dtype):require_grad()
  local k = deal(o, global_values(o, 2, o.kv_heads), layout, o.comm, o.dtype):require_grad()
  local v = deal(o, global_values(o, 3, o.kv_heads), layout, o.comm, o.dtype):require_grad()
  local out, lse = attention.attend { q = q, k = k, v = v, plan = plan, ring = ring }
  out:backward(deal(o, global_values(o, 4, o.heads), layout, o.comm, o.dtype))
  local row, kv_row = o.heads * o.head_dim, o.kv_heads * o.head_dim
  return {
    out = collect(o, out, layout, o.comm, o.batch, row),
    lse = collect(o, lse, layout, o.comm, o.batch * o.heads, 1),
    dq = collect(o, q.grad, layout, o.comm, o.batch, row),
    dk = collect(o, k.grad, layout, o.comm, o.batch, kv_row),
    dv = collect(o, v.grad, layout, o.comm, o.batch, kv_row),
  }
end

--- Largest difference relative to the largest value of `want`; inf when one is not a number.
function M.difference(got, want)
  local worst, largest = 0, 0
  for i = 0, want.count - 1 do
    local a, b = got.values[i], want.values[i]
    if a ~= b then
      local d = math.abs(a - b)
      if d ~= d or d == math.huge then return math.huge end
      worst = math.max(worst, d)
    end
    if math.abs(b) < math.huge then largest = math.max(largest, math.abs(b)) end
  end
  return largest > 0 and worst / largest or worst
end

-- `compute` on virtual ranks of this process.
local function compute_on(ranks, o)
  local comm = comms.virtual(ranks)
  local of = { comm = comm }
  for name, value in pairs(o) do of[name] = value end
  local result = M.compute(of)
  comm:close()
  return result
end

local patterns = {
  { name = "dense", plan = "dense" },
  { name = "sparse", plan = "sparse" },
  { name = "packed", plan = "sparse", documents = true },
  { name = "all tiles", plan = "all tiles", reference = "dense" },
}

-- One number of ranks in one precision: the largest errors over layouts, schedules and patterns.
local function run_row(ranks, dtype, references)
  local row = { ranks = ranks, dtype = dtype, cases = 0, limit = M.limits[dtype], ok = true, largest = -1 }
  for _, part in ipairs(M.parts) do row[part] = 0 end
  for _, layout in ipairs { "contiguous", "striped", "zigzag" } do
    for _, schedule in ipairs(rings.schedules) do
      for _, pattern in ipairs(patterns) do
        local result = compute_on(ranks, { tokens = 331, head_dim = 16, block = 16, dtype = dtype, layout = layout,
          schedule = schedule, inner = ranks % 2 == 0 and ranks / 2 or 1, plan = pattern.plan,
          documents = pattern.documents })
        row.cases = row.cases + 1
        for _, part in ipairs(M.parts) do
          local e = M.difference(result[part], references[pattern.reference or pattern.name][part])
          row[part] = math.max(row[part], e)
          row.ok = row.ok and e <= row.limit
          if e > row.largest then
            row.largest, row.worst = e, ("%s, %s ring, %s layout, %s"):format(part, schedule, layout, pattern.name)
          end
        end
      end
    end
  end
  return row
end

--- Compare rings of several sizes with one rank.
-- @tparam[opt] table o `ranks` (list, default { 2, 3, 4, 8 }), `dtypes` ({ "f64", "f32" }), `progress`
--   (function(done, all))
-- @treturn table rows of { ranks, dtype, cases, limit, ok, worst, largest, out, lse, dq, dk, dv }; the errors are
--   the largest over layouts, schedules and patterns, `worst` names the case of the largest
function M.run(o)
  o = args.named("parity.run", o or {}, { ranks = { "table", { 2, 3, 4, 8 } }, dtypes = { "table", { "f64", "f32" } },
    progress = "callable?" })
  local rows = {}
  for _, dtype in ipairs(o.dtypes) do
    local references = {}
    for _, pattern in ipairs(patterns) do
      if not pattern.reference then
        references[pattern.name] = compute_on(1, { tokens = 331, head_dim = 16, block = 16, dtype = dtype,
          layout = "contiguous", plan = pattern.plan, documents = pattern.documents })
      end
    end
    for _, ranks in ipairs(o.ranks) do
      rows[#rows + 1] = run_row(ranks, dtype, references)
      if o.progress then o.progress(#rows, #o.ranks * #o.dtypes) end
    end
  end
  return rows
end

--- Compare attention on a device with one fp64 rank on the CPU.
-- @tparam[opt] table o `device` ("cuda"), `ranks` ({ 1, 4 }), `dtypes` ({ "f32", "bf16" }), `head_dims`
--   ({ 64, 128, 80 }), `tokens` (601), `progress`
-- @treturn table rows as `run` gives them, with `device`
function M.device(o)
  o = args.named("parity.device", o or {}, { device = { "string", "cuda" }, ranks = { "table", { 1, 4 } },
    dtypes = { "table", { "f32", "bf16" } }, head_dims = { "table", { 64, 128, 80 } }, tokens = { "int", 601 },
    progress = "callable?" })
  local rows = {}
  for _, dtype in ipairs(o.dtypes) do
    local row = { device = o.device, dtype = dtype, ranks = math.max(unpack(o.ranks)), cases = 0,
      limit = M.device_limits[dtype], ok = true, largest = -1 }
    for _, part in ipairs(M.parts) do row[part] = 0 end
    for _, head_dim in ipairs(o.head_dims) do
      for _, pattern in ipairs(patterns) do
        local case = { tokens = o.tokens, head_dim = head_dim, block = 64, plan = pattern.plan,
          documents = pattern.documents, rounded = dtype, layout = "contiguous", dtype = "f64" }
        local truth = compute_on(1, case)
        case.dtype, case.device, case.layout = dtype, o.device, "striped"
        for _, ranks in ipairs(o.ranks) do
          local result = compute_on(ranks, case)
          row.cases = row.cases + 1
          for _, part in ipairs(M.parts) do
            local e = M.difference(result[part], truth[part])
            row[part] = math.max(row[part], e)
            row.ok = row.ok and e <= row.limit
            if e > row.largest then
              row.largest, row.worst = e, ("%s, %d ranks, heads of %d, %s"):format(part, ranks, head_dim, pattern.name)
            end
          end
        end
      end
    end
    rows[#rows + 1] = row
    if o.progress then o.progress(#rows, #o.dtypes) end
  end
  return rows
end

local Result = {}
Result.__index = Result

--- The error of fp32 rings against one fp64 rank, by number of ranks.
-- @tparam[opt] table o named arguments
-- @tparam[opt={1;2;4;8}] table o.ranks ring sizes, virtual ranks of this process
-- @tparam[opt=1000] int o.tokens
-- @tparam[opt=1] int o.batch
-- @tparam[opt=4] int o.heads
-- @tparam[opt=2] int o.kv_heads
-- @tparam[opt=64] int o.head_dim
-- @tparam[opt=32] int o.block
-- @tparam[opt="striped"] string o.layout
-- @tparam[opt="flat"] string o.schedule
-- @tparam[opt] int o.inner
-- @tparam[opt="sparse"] string o.plan "sparse", "dense" or "all tiles"
-- @tparam[opt=false] boolean o.documents packed documents
-- @tparam[opt=1] int o.seed
-- @tparam[opt=1e-5] number o.limit largest error that passes
-- @treturn table `rows` (ranks, out, lse, dq, dk, dv), `ok`, `limit`; prints as a table
function M.drift(o)
  o = args.named("parity.drift", o or {}, with { ranks = { "table", { 1, 2, 4, 8 } },
    limit = { "number", M.limits.f32 } })
  local result = setmetatable({ rows = {}, ok = true, limit = o.limit, options = o }, Result)
  local function of(ranks, dtype)
    local case = { dtype = dtype }
    for name in pairs(shape_fields) do case[name] = o[name] end
    if ranks == 1 then case.schedule, case.inner = "flat", nil end
    return compute_on(ranks, case)
  end
  local truth = of(1, "f64")
  for i, ranks in ipairs(o.ranks) do
    local got, row = of(ranks, "f32"), { ranks = ranks }
    for _, part in ipairs(M.parts) do
      row[part] = M.difference(got[part], truth[part])
      result.ok = result.ok and row[part] <= o.limit
    end
    result.rows[i] = row
  end
  return result
end

Result.__tostring = function(self)
  local o = self.options
  local lines = {
    ("%s attention, %d tokens, %d/%d heads of %d, %s layout, %s ring; fp32 against one fp64 rank"):format(o.plan,
      o.tokens, o.heads, o.kv_heads, o.head_dim, o.layout, o.schedule),
    ("%6s %9s %9s %9s %9s %9s"):format("ranks", unpack(M.parts)),
  }
  for _, row in ipairs(self.rows) do
    local cells = {}
    for i, name in ipairs(M.parts) do cells[i] = ("%9.1e"):format(row[name]) end
    lines[#lines + 1] = ("%6d %s"):format(row.ranks, table.concat(cells, " "))
  end
  lines[#lines + 1] = ("%s: largest error allowed %.0e"):format(self.ok and "passed" or "FAILED", self.limit)
  return table.concat(lines, "\n")
end

return M
