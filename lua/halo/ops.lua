--- Every op of the engine as a Lua function, made from the op table when this file loads.
-- `ops.name(inputs..., { params })`; the first input's type makes it a method as well:
--
--    ops.softmax(x, { dim = -1 })     x:softmax { dim = -1 }     x:softmax(-1)
--    ops.where(mask, x, 0)            ops.cat { a, b, dim = 1 }
--
-- A number in the place of an input becomes a scalar of the dtype of the last tensor among the inputs.
-- Parameters can be named, or given in order. Dims count from 1, or from -1 backward; parameters that
-- are data (`index` tensors, `classes`) are not shifted. `ops.list()` names all, `ops.help(name)` says
-- what one does.
local halo_ffi = require "halo.ffi"
local args = require "halo.args"
local devices = require "halo.device"
local errors = require "halo.errors"
local op_call = require "halo.op_call"
local tensor = require "halo.tensor"

local C = halo_ffi.C
local check = tensor.check
local call, call_list, rows = op_call.call, op_call.call_list, op_call.rows

local M = {}

for name, row in pairs(rows) do
  if row.takes_list then
    M[name] = function(list, params) return (call_list(row, 2, list, params)) end
  else
    M[name] = function(...) return call(row, 1, ...) end -- a tail call: `call` takes our frame
  end
end

-- ---- shapes in Lua's way ------------------------------------------------------------------------

-- Sizes or dims given one by one or as a table.
local function listed(...)
  local first = ...
  if type(first) == "table" then return first end
  return { ... }
end

-- Parameters { ndim = n, <prefix>0 = ..., ... } of reshape, expand and permute.
local function numbered(what, prefix, list)
  if #list > C.HALO_MAX_DIMS then
    errors.raise("usage", ("%s: %d dims, at most %d"):format(what, #list, C.HALO_MAX_DIMS), 3)
  end
  local params = { ndim = #list }
  for i, value in ipairs(list) do params[prefix .. (i - 1)] = value end
  return params
end

--- The same elements in another shape; one size may be -1. `x:reshape(2, -1)` or `x:reshape { 2, -1 }`.
function M.reshape(x, ...)
  return (call(rows.reshape, 2, x, numbered("reshape", "size", listed(...))))
end

--- A view that repeats dims of size 1; -1 keeps a size. `x:expand(4, -1)`.
function M.expand(x, ...)
  return (call(rows.expand, 2, x, numbered("expand", "size", listed(...))))
end

--- A view with the dims in the given order. `x:permute(2, 1, 3)`.
function M.permute(x, ...)
  return (call(rows.permute, 2, x, numbered("permute", "dim", listed(...))))
end

--- A view with the last two dims exchanged.
function M.t(x) return (call(rows.transpose, 2, x)) end

-- A 1-based position as C counts it; negative ones count from the end.
local function position(what, name, value, size, least, most)
  if type(value) ~= "number" or value ~= math.floor(value) then
    errors.raise("usage", ("%s: %s is %s, a whole number is wanted"):format(what, name, args.describe(value)), 3)
  end
  local i = value < 0 and value + size + 1 or value
  if i < least or i > (most or size) then
    errors.raise("usage", ("%s: %s is %d, the dim has 1..%d"):format(what, name, value, size), 3)
  end
  return i
end

--- A view of a range of one dim, both ends included.
-- @tparam Tensor x
-- @tparam table o `dim` (-1), `from` (1), `to` (-1), `step` (1); `to = from - 1` is an empty range
-- @usage x:slice { dim = 1, from = 2, to = 4 }
function M.slice(x, o)
  check(x, "slice: x", 2)
  o = args.named("slice", o, { dim = { "int", -1 }, from = { "int", 1 }, to = { "int", -1 }, step = { "int", 1 } })
  local size = tonumber(C.halo_tensor_size(x, tensor.dim_number(x, o.dim, "slice", 2)))
  local from = size == 0 and 1 or position("slice", "from", o.from, size, 1, size + 1)
  local to = size == 0 and 0 or position("slice", "to", o.to, size, 0)
  return (call(rows.slice, 2, x, { dim = o.dim, from = from - 1, to = to, step = o.step }))
end

--- A view of one index of one dim, without the dim.
-- @tparam Tensor x
-- @tparam table o `dim` (1), `index` (from 1, or from -1 backward)
function M.select(x, o)
  check(x, "select: x", 2)
  o = args.named("select", o, { dim = { "int", 1 }, index = "int" })
  local size = tonumber(C.halo_tensor_size(x, tensor.dim_number(x, o.dim, "select", 2)))
  return (call(rows.select, 2, x, { dim = o.dim, index = position("select", "index", o.index, size, 1) - 1 }))
end

--- Tensors one after the other along a dim, any number of them.
-- @tparam table list tensors, and `dim` (-1)
-- @usage ops.cat { a, b, c, dim = 1 }
function M.cat(list, params)
  local most = tonumber(C.HALO_MAX_INPUTS)
  if type(list) ~= "table" or #list <= most then return (call_list(rows.cat, 2, list, params)) end
  local dim = list.dim or type(params) == "table" and params.dim or params
  local parts = {}
  for first = 1, #list, most do
    local group = { dim = dim }
    for i = first, math.min(first + most - 1, #list) do group[#group + 1] = list[i] end
    parts[#parts + 1] = call_list(rows.cat, 2, group)
  end
  parts.dim = dim
  return M.cat(parts)
end

--- Tensors of one shape side by side along a new dim.
-- @tparam table list tensors, and `dim` (1)
function M.stack(list, params)
  if type(list) ~= "table" then
    errors.raise("usage", ("stack wants a list of tensors, got %s"):format(args.describe(list)), 2)
  end
  local rows_of, dim = {}, list.dim or type(params) == "table" and params.dim or params or 1
  for i, t in ipairs(list) do
    rows_of[i] = call(rows.unsqueeze, 2, check(t, ("stack: input %d"):format(i), 2), dim)
  end
  rows_of.dim = dim
  return M.cat(rows_of)
end

--- Views of consecutive ranges of one dim.
-- @tparam Tensor x
-- @tparam table o `dim` (-1) and `size` (the last one may be smaller) or `sizes` (a list that adds up)
-- @return one tensor for each range
-- @usage local q, k, v = x:split { sizes = { 64, 16, 16 } }
function M.split(x, o)
  check(x, "split: x", 2)
  o = args.named("split", o, { dim = { "int", -1 }, size = "int?", sizes = "table?" })
  local total = tonumber(C.halo_tensor_size(x, tensor.dim_number(x, o.dim, "split", 2)))
  local sizes = o.sizes
  if not sizes then
    if not o.size or o.size < 1 then errors.raise("usage", "split wants size (at least 1) or sizes", 2) end
    sizes = {}
    for first = 1, total, o.size do sizes[#sizes + 1] = math.min(o.size, total - first + 1) end
  end
  local parts, first = {}, 0
  for i, size in ipairs(sizes) do
    if first + size > total then break end
    parts[i] = call(rows.slice, 2, x, { dim = o.dim, from = first, to = first + size })
    first = first + size
  end
  if first ~= total or #parts ~= #sizes then
    errors.raise("usage", ("split: sizes %s do not add up to %d"):format(table.concat(sizes, "+"), total), 2)
  end
  return unpack(parts)
end

--- The whole tensor repeated along each dim: `x:tile(2, 1)`; one count for each dim of x.
function M.tile(x, ...)
  local counts, shape = listed(...), check(x, "tile: x", 2).shape
  if #counts ~= #shape then
    errors.raise("usage", ("tile: %d counts for %s"):format(#counts, tensor.describe(x)), 2)
  end
  for d, count in ipairs(counts) do
    if count ~= 1 then
      local parts = { dim = d }
      for i = 1, count do parts[i] = x end
      x = count > 0 and M.cat(parts) or M.slice(x, { dim = d, from = 1, to = 0 })
    end
  end
  return x
end

--- Every element of a dim `count` times in a row: heads of grouped queries, for instance.
-- @tparam Tensor x
-- @tparam table o `dim`, `count`
function M.repeat_each(x, o)
  check(x, "repeat_each: x", 2)
  o = args.named("repeat_each", o, { dim = "int", count = "int" })
  local d = tensor.dim_number(x, o.dim, "repeat_each", 2)
  if d < 0 then d = d + x.ndim end
  local wide, merged = {}, {}
  for i, size in ipairs(x.shape) do
    wide[#wide + 1] = size
    merged[i] = size
    if i == d + 1 then
      wide[#wide + 1] = o.count
      merged[i] = size * o.count
    end
  end
  return M.reshape(M.expand(call(rows.unsqueeze, 2, x, d + 2), wide), merged)
end

--- Elements moved `shift` places along a dim, round the end.
-- @tparam Tensor x
-- @tparam table o `dim` (-1), `shift`
function M.roll(x, o)
  check(x, "roll: x", 2)
  o = args.named("roll", o, { dim = { "int", -1 }, shift = "int" })
  local size = tonumber(C.halo_tensor_size(x, tensor.dim_number(x, o.dim, "roll", 2)))
  local shift = size > 0 and o.shift % size or 0
  if shift == 0 then return M.contiguous(x) end
  return M.cat {
    M.slice(x, { dim = o.dim, from = size - shift + 1 }),
    M.slice(x, { dim = o.dim, to = size - shift }),
    dim = o.dim,
  }
end

--- x in another dtype, on another device, or both: `x:to "f64"`, `x:to "cuda"`, `x:to("cuda", "bf16")`;
-- x itself when it is so already. What crosses between devices is the narrower dtype.
function M.to(x, ...)
  check(x, "to: x", 2)
  local dtype, device
  for _, word in ipairs { ... } do
    if devices.number(word) then device = word else dtype = word end
  end
  if dtype == nil and device == nil then errors.raise("usage", "to wants a dtype, a device, or both", 2) end
  local moves, casts = device and x.device ~= device, dtype and x.dtype ~= dtype
  if casts then tensor.dtype_number(dtype, 2) end
  local narrows = casts and tensor.dtype_bytes(dtype) < tensor.dtype_bytes(x.dtype)
  if narrows then x = call(rows.cast, 2, x, { dtype = dtype }) end
  if moves then x = call(rows.to_device, 2, x, { device = device }) end
  if casts and not narrows then x = call(rows.cast, 2, x, { dtype = dtype }) end
  return x
end

--- x on the CUDA device; x itself when it is there.
function M.cuda(x)
  if check(x, "cuda: x", 2).device == "cuda" then return x end
  return (call(rows.to_device, 2, x, { device = "cuda" }))
end

--- x in host memory; x itself when it is there.
function M.cpu(x)
  if check(x, "cpu: x", 2).device == "cpu" then return x end
  return (call(rows.to_device, 2, x, { device = "cpu" }))
end

-- ---- operators ----------------------------------------------------------------------------------

--- What `+ - * / ^` and unary minus do. A number beside a tensor costs no tensor where an op for it
-- exists; division keeps its own rounding, so it is not turned into a product.
M.operators = {
  neg = function(a) return (call(rows.neg, 2, a)) end,
  add = function(a, b)
    if type(a) == "number" then a, b = b, a end
    if type(b) == "number" then return (call(rows.add_scalar, 2, a, b)) end
    return (call(rows.add, 2, a, b))
  end,
  sub = function(a, b)
    if type(b) == "number" then return (call(rows.add_scalar, 2, a, -b)) end
    return (call(rows.sub, 2, a, b))
  end,
  mul = function(a, b)
    if type(a) == "number" then a, b = b, a end
    if type(b) == "number" then return (call(rows.mul_scalar, 2, a, b)) end
    return (call(rows.mul, 2, a, b))
  end,
  div = function(a, b) return (call(rows.div, 2, a, b)) end,
  pow = function(a, b)
    if type(b) == "number" then return (call(rows.pow_scalar, 2, a, b)) end
    return (call(rows.pow, 2, a, b))
  end,
}
M.add, M.sub, M.mul, M.pow = M.operators.add, M.operators.sub, M.operators.mul, M.operators.pow

-- ---- methods and help ---------------------------------------------------------------------------

for name, f in pairs(M) do
  local row = rows[name]
  if type(f) == "function" and not (row and row.takes_list) and not tensor.methods[name] then
    tensor.methods[name] = f
  end
end
tensor.methods.stack = nil -- takes a list

--- Names of all ops of the engine, sorted.
function M.list()
  local names = {}
  for name in pairs(rows) do names[#names + 1] = name end
  table.sort(names)
  return names
end

--- The row of an op: `op`, `name`, `inputs`, `params` ({ name, default }), `n_out`, `has_gradient`,
-- `doc`; nil if there is none.
function M.row(name) return rows[name] end

--- What an op does, as text.
function M.help(name)
  local row = rows[name]
  if not row then
    errors.raise("usage", ("there is no op %s%s"):format(args.describe(name), args.did_you_mean(name, M.list())), 2)
  end
  local params = {}
  for i, p in ipairs(row.params) do
    params[i] = p.default == p.default and ("%s = %.14g"):format(p.name, p.default) or p.name
  end
  return ("%s(%s)%s\n%s%s"):format(name, table.concat(row.inputs, ", "),
    #params > 0 and " { " .. table.concat(params, ", ") .. " }" or "", row.doc,
    row.has_gradient and "" or " No gradient.")
end

return setmetatable(M, {
  __index = function(_, name)
    errors.raise("usage", ("there is no op %s%s"):format(args.describe(name), args.did_you_mean(tostring(name),
      args.keys(M))), 2)
  end,
})
