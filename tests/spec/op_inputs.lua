--- Inputs for op cases: numbers from counters, in several memory layouts, and the call itself.
local tensor = require "halo.tensor"
local ops = require "halo.ops"
local C = require("halo.ffi").C

local M = {}

local function uniform(stream, i) return C.halo_random_uniform(20251121, stream, i) end

--- Layouts of a tensor: how a contiguous leaf of another shape becomes it. Every view is
-- differentiable.
M.layouts = {
  { name = "plain", leaf = function(shape) return shape end, view = function(leaf) return leaf end },
  {
    name = "transposed",
    leaf = function(shape)
      local reversed = {}
      for d = #shape, 1, -1 do reversed[#reversed + 1] = shape[d] end
      return reversed
    end,
    view = function(leaf)
      local order = {}
      for d = leaf.ndim, 1, -1 do order[#order + 1] = d end
      return leaf:permute(order)
    end,
  },
  {
    name = "sliced", -- every second element of the last dim, from the second on
    leaf = function(shape)
      if #shape == 0 or shape[#shape] == 0 then return shape end -- nothing to slice
      local wide = { unpack(shape) }
      wide[#wide] = 2 * wide[#wide] + 1
      return wide
    end,
    view = function(leaf, shape)
      if #shape == 0 or shape[#shape] == 0 then return leaf end
      return leaf:slice { dim = -1, from = 2, to = -2, step = 2 }
    end,
  },
}

local function away(x, points)
  for _, p in ipairs(points or {}) do
    if math.abs(x - p) < 0.05 then return p + (x < p and -0.1 or 0.1) end
  end
  return x
end

local kinds = {}

function kinds.real(spec, n, stream)
  local lo, hi, values = spec.lo or -2, spec.hi or 2, {}
  for i = 1, n do values[i] = away(lo + (hi - lo) * uniform(stream, i), spec.avoid) end
  return values
end

function kinds.distinct(_, n, stream)
  local values = {}
  for i = 1, n do values[i] = (i - n / 2) * 0.1 + 0.02 * uniform(stream, i) end
  for i = n, 2, -1 do
    local j = math.floor(uniform(stream + 1000, i) * i) + 1
    values[i], values[j] = values[j], values[i]
  end
  return values
end

function kinds.index(spec, n, stream)
  local values = {}
  for i = 1, n do values[i] = math.floor(uniform(stream, i) * spec.n) end
  return values
end

function kinds.mask(_, n, stream)
  local values = {}
  for i = 1, n do values[i] = uniform(stream, i) < 0.5 and 0 or 1 end
  return values
end

local fixed_dtypes = { index = "i64", mask = "u8" }

--- Is this input of the dtype under test (and not positions or a mask)?
function M.is_data(spec) return fixed_dtypes[spec.kind] == nil end

-- What a dtype does to test values: integers are whole, and small enough for u8 arithmetic.
local function fit(values, dtype)
  if dtype == "u8" then
    for i, v in ipairs(values) do values[i] = math.floor(math.abs(v) * 3) end
  elseif dtype == "i32" or dtype == "i64" then
    for i, v in ipairs(values) do values[i] = math.floor(v * 3) end
  end
  return values
end

--- Leaves for the inputs of a case.
-- @tparam table case
-- @tparam string dtype of the data inputs
-- @tparam table layout one of `M.layouts`
-- @tparam[opt] int stream of the random numbers
function M.leaves(case, dtype, layout, stream)
  local leaves = {}
  for i, spec in ipairs(case.inputs) do
    local shape = layout.leaf(spec.shape)
    local n = 1
    for _, size in ipairs(shape) do n = n * size end
    local values = kinds[spec.kind or "real"](spec, n, (stream or 0) * 10 + i)
    local own = fixed_dtypes[spec.kind] or dtype
    if M.is_data(spec) then values = fit(values, own) end
    leaves[i] = tensor.from_table(#shape == 0 and values[1] or values, { shape = shape, dtype = own })
  end
  return leaves
end

--- The inputs themselves, seen through the layout.
function M.views(case, leaves, layout)
  local views = {}
  for i, leaf in ipairs(leaves) do views[i] = layout.view(leaf, case.inputs[i].shape) end
  return views
end

--- Call an op as a case says.
function M.call(name, entry, case, views)
  local params = case.params or {}
  if entry.call then return entry.call(ops, views, params) end
  local list, n = { unpack(views) }, #views
  list[n + 1] = params
  return ops[name](unpack(list, 1, n + 1))
end

--- A tensor as an array of `arrays.lua`.
function M.array(t)
  local values = t:values()
  values.shape = t.shape
  return values
end

--- The case with other sizes: each size above 1 becomes a random one in 2..7.
function M.resized(case, seed)
  local map = {}
  local function size_of(size)
    if size <= 1 then return size end
    map[size] = map[size] or 2 + math.floor(uniform(seed + 5000, size) * 6)
    return map[size]
  end
  local copy = { params = case.params, inputs = {} }
  for i, spec in ipairs(case.inputs) do
    local shape = {}
    for d, size in ipairs(spec.shape) do shape[d] = size_of(size) end
    local new = { shape = shape }
    for k, v in pairs(spec) do
      if k ~= "shape" then new[k] = v end
    end
    if spec.n then new.n = size_of(spec.n) end
    copy.inputs[i] = new
  end
  return copy
end

--- Text of a case for messages.
function M.describe(name, case, layout)
  local parts = {}
  for i, spec in ipairs(case.inputs) do parts[i] = "[" .. table.concat(spec.shape, ",") .. "]" end
  local params = {}
  for k, v in pairs(case.params or {}) do
    params[#params + 1] = k .. "=" .. (type(v) == "table" and "{" .. table.concat(v, ",") .. "}" or tostring(v))
  end
  table.sort(params)
  return ("%s(%s %s) %s"):format(name, table.concat(parts, " "), table.concat(params, " "),
    layout and layout.name or "")
end

--- Number of elements of the largest input.
function M.largest(case)
  local most = 0
  for _, spec in ipairs(case.inputs) do
    local n = 1
    for _, size in ipairs(spec.shape) do n = n * size end
    most = math.max(most, n)
  end
  return most
end

return M
