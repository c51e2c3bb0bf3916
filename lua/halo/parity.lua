--- Proof on this machine: a ring of W ranks computes what one rank computes.
--
-- Ring attention can drift silently: the loss looks fine while gradients of deep models go wrong with the
-- number of ranks. So `halo doctor --parity` takes the engine as it is built here, runs attention forward
-- and backward on W virtual ranks (all code of the ring but the wires), and compares out, lse, dQ, dK and
-- dV each with one rank, for every layout and schedule, dense, sparse and packed; and sparse attention
-- that selects everything with dense attention. Lengths do not divide: padding is part of what is proven.
--
-- Error: largest difference over the largest reference value. Limits: fp64 1e-12, fp32 1e-5, because
-- the order of summation differs between W ranks and one, and nothing else may.
local halo_ffi = require "halo.ffi"

local ffi, C, check = halo_ffi.ffi, halo_ffi.C, halo_ffi.check

local M = {}

M.limits = { f64 = 1e-12, f32 = 1e-5 }

local N, B, H, Hk, D, G = 331, 1, 4, 2, 16, 16
local layouts = { contiguous = "HALO_LAYOUT_CONTIGUOUS", zigzag = "HALO_LAYOUT_ZIGZAG", striped = "HALO_LAYOUT_STRIPED" }
local schedules = { flat = "HALO_SCHEDULE_FLAT", hierarchical = "HALO_SCHEDULE_HIERARCHICAL",
  gather = "HALO_SCHEDULE_GATHER" }

-- out[0] of a constructor, freed when collected.
local function make(kind, free, f, ...)
  local slot = ffi.new(kind .. " *[1]")
  check(f(slot, ...), 2)
  return ffi.gc(slot[0], free)
end

-- Fixed random global tensors as plain host arrays: [B,N,heads,D].
local function global_values(stream, heads)
  local n = B * N * heads * D
  local out = ffi.new("double[?]", n)
  for i = 0, n - 1 do out[i] = 2 * C.halo_random_uniform(7, stream, i) - 1 end
  return out
end

local patterns = {}

function patterns.dense(plan) check(C.halo_plan_add_all(plan, -1, -1)) end

function patterns.sparse(plan)
  for h = 0, H - 1 do
    check(C.halo_plan_add_diagonals(plan, -1, h, ffi.new("int64_t[3]", { 0, 2 + h, 9 }), 3))
    check(C.halo_plan_add_columns(plan, -1, h, ffi.new("int64_t[4]", { 3, 40 + h, 100, 250 }), 4))
  end
  check(C.halo_plan_force(plan, 4, 24, 1))
end

function patterns.packed(plan)
  patterns.sparse(plan)
  local documents = ffi.new("int32_t[?]", B * N)
  for i = 0, B * N - 1 do documents[i] = math.floor(i / 97) end
  check(C.halo_plan_set_documents(plan, documents))
end

-- Everything selected, tile by tile: must be dense attention.
patterns["all tiles"] = function(plan)
  local blocks = math.ceil(N / G)
  local count = blocks * (blocks + 1) / 2
  local queries, keys, n = ffi.new("int64_t[?]", count), ffi.new("int64_t[?]", count), 0
  for i = 0, blocks - 1 do
    for j = 0, i do
      queries[n], keys[n] = i, j
      n = n + 1
    end
  end
  check(C.halo_plan_add_tiles(plan, -1, -1, queries, keys, n))
end

-- Global token of every row of the stacked local tensors; >= N is padding.
local function row_map(layout, ranks)
  local rows = tonumber(C.halo_layout_local_tokens(layout))
  local map = ffi.new("int64_t[?]", rows * ranks)
  for r = 0, ranks - 1 do check(C.halo_layout_map(layout, r, map + r * rows)) end
  return map, rows * ranks
end

-- A tensor of the rows in `map` of a global array, padding zero.
local function scatter(values, map, rows, heads, dtype)
  local width = heads * D
  local host = ffi.new(dtype == "f64" and "double[?]" or "float[?]", rows * width)
  for row = 0, rows - 1 do
    local token = tonumber(map[row])
    if token < N then
      for i = 0, width - 1 do host[row * width + i] = values[token * width + i] end
    end
  end
  return make("halo_tensor", C.halo_tensor_free, C.halo_tensor_from, dtype == "f64" and C.HALO_F64 or C.HALO_F32,
    C.HALO_CPU, 4, ffi.new("int64_t[4]", { B, rows, heads, D }), host)
end

-- Rows of a tensor back in global order, as doubles; the last dims have `width` elements per token.
local function gather(tensor, map, rows, width, dtype)
  local host = ffi.new(dtype == "f64" and "double[?]" or "float[?]", rows * width)
  check(C.halo_tensor_read(tensor, host))
  local out = ffi.new("double[?]", N * width)
  for row = 0, rows - 1 do
    local token = tonumber(map[row])
    if token < N then
      for i = 0, width - 1 do out[token * width + i] = host[row * width + i] end
    end
  end
  return { values = out, count = N * width }
end

-- lse is [B,H,T]: tokens are the last dim.
local function gather_lse(tensor, map, rows, dtype)
  local host = ffi.new(dtype == "f64" and "double[?]" or "float[?]", H * rows)
  check(C.halo_tensor_read(tensor, host))
  local out = ffi.new("double[?]", N * H)
  for row = 0, rows - 1 do
    local token = tonumber(map[row])
    if token < N then
      for h = 0, H - 1 do out[token * H + h] = host[h * rows + row] end
    end
  end
  return { values = out, count = N * H }
end

local function backward(out, seed)
  local b = make("halo_backward", C.halo_backward_free, C.halo_backward_begin, out, seed)
  local event, token = ffi.new "int32_t[1]", ffi.new "int64_t[1]"
  repeat check(C.halo_backward_next(b, event, token)) until event[0] == C.HALO_BACKWARD_DONE
end

--- Forward and backward of one case; results in global order.
-- @tparam table o `ranks`, `layout`, `schedule`, `pattern`, `dtype`
local function compute(o)
  local comm = o.ranks == 1 and make("halo_comm", C.halo_comm_free, C.halo_comm_self)
    or make("halo_comm", C.halo_comm_free, C.halo_comm_local, o.ranks)
  local inner = o.schedule == "hierarchical" and o.ranks % 2 == 0 and o.ranks / 2 or 1
  local ring = make("halo_ring", C.halo_ring_free, C.halo_ring_new, comm, C[schedules[o.schedule]], inner)
  local layout = make("halo_layout", C.halo_layout_free, C.halo_layout_new, C[layouts[o.layout]], N, o.ranks, G)
  local plan = make("halo_plan", C.halo_plan_free, C.halo_plan_new, layout, B, H)
  patterns[o.pattern](plan)
  check(C.halo_plan_finish(plan))
  local map, rows = row_map(layout, o.ranks)
  local inputs = {}
  for i, heads in ipairs { H, Hk, Hk } do
    inputs[i] = scatter(global_values(i, heads), map, rows, heads, o.dtype)
    check(C.halo_tensor_require_grad(inputs[i], 1))
  end
  local out, lse = ffi.new "halo_tensor *[1]", ffi.new "halo_tensor *[1]"
  check(C.halo_attention(out, lse, inputs[1], inputs[2], inputs[3], plan, ring, 1 / math.sqrt(D)))
  local o_tensor, lse_tensor = ffi.gc(out[0], C.halo_tensor_free), ffi.gc(lse[0], C.halo_tensor_free)
  local result = { out = gather(o_tensor, map, rows, H * D, o.dtype), lse = gather_lse(lse_tensor, map, rows, o.dtype) }
  backward(o_tensor, scatter(global_values(9, H), map, rows, H, o.dtype))
  for i, name in ipairs { "dq", "dk", "dv" } do
    result[name] = gather(C.halo_tensor_grad(inputs[i]), map, rows, (i == 1 and H or Hk) * D, o.dtype)
  end
  -- In this order: a ring borrows its communicator.
  C.halo_ring_free(ffi.gc(ring, nil))
  C.halo_comm_free(ffi.gc(comm, nil))
  return result
end

local function difference(a, b)
  local worst, scale = 0, 0
  for i = 0, a.count - 1 do
    local x, y = a.values[i], b.values[i]
    if x ~= y then
      local d = math.abs(x - y)
      if d ~= d then return math.huge end -- NaN, or an infinity on one side only
      worst = math.max(worst, d)
    end
    if math.abs(y) < math.huge then scale = math.max(scale, math.abs(y)) end
  end
  return scale > 0 and worst / scale or worst
end

--- The names of what is compared.
M.parts = { "out", "lse", "dq", "dk", "dv" }

--- Compare rings of several sizes with one rank.
-- @tparam[opt] table o `ranks` (list, default { 2, 3, 4, 8 }), `dtypes`, `progress` (function(done, all))
-- @treturn table rows of { ranks, dtype, cases, limit, ok, worst, out, lse, dq, dk, dv }; the errors are the
-- largest over layouts, schedules and patterns, `worst` names the case of the largest
function M.run(o)
  o = o or {}
  local sizes, dtypes = o.ranks or { 2, 3, 4, 8 }, o.dtypes or { "f64", "f32" }
  local references, rows, done = {}, {}, 0
  for _, dtype in ipairs(dtypes) do
    references[dtype] = {}
    for pattern in pairs(patterns) do
      -- The reference of "all tiles" is dense attention.
      references[dtype][pattern] = compute { ranks = 1, layout = "contiguous", schedule = "flat",
        pattern = pattern == "all tiles" and "dense" or pattern, dtype = dtype }
    end
  end
  for _, dtype in ipairs(dtypes) do
    for _, ranks in ipairs(sizes) do
      local row = { ranks = ranks, dtype = dtype, cases = 0, limit = M.limits[dtype], ok = true, largest = -1 }
      for _, part in ipairs(M.parts) do row[part] = 0 end
      for layout in pairs(layouts) do
        for schedule in pairs(schedules) do
          for pattern in pairs(patterns) do
            local result = compute { ranks = ranks, layout = layout, schedule = schedule, pattern = pattern, dtype = dtype }
            row.cases = row.cases + 1
            for _, part in ipairs(M.parts) do
              local e = difference(result[part], references[dtype][pattern][part])
              row[part] = math.max(row[part], e)
              row.ok = row.ok and e <= row.limit
              if e > row.largest then
                row.largest, row.worst = e, ("%s, %s ring, %s layout, %s"):format(part, schedule, layout, pattern)
              end
            end
          end
        end
      end
      rows[#rows + 1] = row
      done = done + 1
      if o.progress then o.progress(done, #sizes * #dtypes) end
    end
  end
  return rows
end

return M
