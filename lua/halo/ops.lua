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
local ffi = require "ffi"
local halo_ffi = require "halo.ffi"
local args = require "halo.args"
local errors = require "halo.errors"
local tensor = require "halo.tensor"

local C, call_at = halo_ffi.C, halo_ffi.call_at
local is_tensor, check, own = tensor.is_tensor, tensor.check, tensor.own

local M = {}

-- ---- the table ----------------------------------------------------------------------------------

local inputs = ffi.new("halo_tensor *[?]", C.HALO_MAX_INPUTS)
local outputs = ffi.new("halo_tensor *[?]", C.HALO_MAX_OUTPUTS)
local numbers = ffi.new("double[?]", C.HALO_MAX_PARAMS)

local rows = {} -- by name

local function split(text)
  local parts = {}
  for part in text:gmatch "[^,]+" do parts[#parts + 1] = part end
  return parts
end

for op = 0, C.halo_op_count() - 1 do
  local row = {
    op = op,
    name = ffi.string(C.halo_op_name(op)),
    inputs = split(ffi.string(C.halo_op_inputs(op))),
    params = {},
    names = {},
    n_out = C.halo_op_outputs(op),
    has_gradient = C.halo_op_has_gradient(op) ~= 0,
    doc = ffi.string(C.halo_op_doc(op)),
  }
  row.takes_list = row.inputs[1] == "..."
  for i, text in ipairs(split(ffi.string(C.halo_op_params(op)))) do
    local name, default = text:match "^([^=]+)=(.*)$"
    row.params[i] = { name = name, default = tonumber(default), is_dim = name:match "^dim" ~= nil }
    row.names[i] = name
  end
  rows[row.name] = row
end

-- ---- calling ------------------------------------------------------------------------------------

-- One parameter as the number that C wants.
local function number_of(row, param, value, first, level)
  if param.name == "dtype" then return (tensor.dtype_number(value, level + 1)) end
  if type(value) == "boolean" then return value and 1 or 0 end
  if type(value) ~= "number" then
    errors.raise("usage", ("%s: %s must be a number, got %s"):format(row.name, param.name, args.describe(value)),
      level + 1)
  end
  if param.is_dim then
    return (tensor.dim_number(first, value, row.name, level + 1, row.name == "unsqueeze" and 1 or 0))
  end
  return value
end

-- Parameters into `numbers`: from a table of names, or in order, the rest by default.
local function write_params(row, first, level, given, ...)
  local params = row.params
  for i = 1, #params do numbers[i - 1] = params[i].default end
  if type(given) == "table" then
    for name in pairs(given) do
      local known = false
      for i = 1, #params do known = known or params[i].name == name end
      if not known then
        errors.raise("usage", ('%s has no parameter "%s"%s'):format(row.name, tostring(name),
          args.did_you_mean(name, row.names)), level + 1)
      end
    end
    for i = 1, #params do
      local value = given[params[i].name]
      if value ~= nil then numbers[i - 1] = number_of(row, params[i], value, first, level + 1) end
    end
  elseif given ~= nil then
    local n = select("#", ...) + 1
    if n > #params then
      errors.raise("usage", ("%s takes %d parameter%s, got %d"):format(row.name, #params, #params == 1 and "" or "s",
        n), level + 1)
    end
    for i = 1, n do
      local value
      if i == 1 then value = given else value = (select(i - 1, ...)) end
      if value ~= nil then numbers[i - 1] = number_of(row, params[i], value, first, level + 1) end
    end
  end
end

-- Inputs into `inputs`; numbers become scalars, which are returned so that the call can free them.
-- Returns the first tensor, how many arguments were inputs, and the scalars.
local function write_inputs(row, level, ...)
  local n = #row.inputs
  local used, first, last, scalars = n, nil, nil, nil
  for i = 1, n do inputs[i - 1] = nil end
  for i = 1, n do
    local value, name = (select(i, ...)), row.inputs[i]
    local is_optional = name:sub(-1) == "?"
    if is_tensor(value) then
      inputs[i - 1] = check(value, row.name .. ": " .. name, level + 1)
      first, last = first or value, value
    elseif type(value) == "number" then
      scalars = scalars or {}
      scalars[i] = value
    elseif is_optional and type(value) == "table" then -- parameters; the optional inputs were left out
      used = i - 1
      break
    elseif not (is_optional and value == nil) then
      errors.raise("usage", ("%s: %s must be a tensor, got %s"):format(row.name, name, args.describe(value)),
        level + 1)
    end
  end
  if not first then
    errors.raise("usage", ("%s: at least one input must be a tensor"):format(row.name), level + 1)
  end
  if scalars then
    for i, value in pairs(scalars) do
      scalars[i] = tensor.scalar_like(last, value)
      inputs[i - 1] = scalars[i]
    end
  end
  return first, used, scalars
end

-- Run what is written; the results become ours.
local function run(row, n_in, level)
  call_at(level + 1, C.halo_op, outputs, row.op, inputs, n_in, numbers, #row.params)
  if row.n_out == 1 then return own(outputs[0]) end
  local list = {}
  for i = 1, row.n_out do list[i] = own(outputs[i - 1]) end
  return unpack(list, 1, row.n_out)
end

-- `inputs` holds bare pointers: what they belong to must stay on Lua's stack while the engine runs, also
-- when it runs out of memory and the collector is called for help. So `run` is never a tail call.
local function pass(...) return ... end

-- An op with named inputs: `op(inputs..., params)`.
local function call(row, level, ...)
  local first, used, scalars = write_inputs(row, level + 1, ...)
  if select("#", ...) > used then
    write_params(row, first, level + 1, select(used + 1, ...))
  else
    write_params(row, first, level + 1)
  end
  if not scalars then return pass(run(row, #row.inputs, level + 1)) end
  return (function(...)
    for _, t in pairs(scalars) do tensor.free(t) end
    return ...
  end)(run(row, #row.inputs, level + 1))
end

-- An op over a list: `op { a, b, c, param = ... }`, or `op({ a, b, c }, params)`; a number is the first
-- parameter.
local function call_list(row, level, list, params)
  local what = row.name
  if type(list) ~= "table" then
    errors.raise("usage", ("%s wants a list of tensors, got %s"):format(what, args.describe(list)), level + 1)
  end
  local given = {}
  if type(params) == "number" then
    given[row.names[1]] = params
  else
    for k, v in pairs(params or {}) do given[k] = v end
  end
  for k, v in pairs(list) do
    if type(k) ~= "number" then given[k] = v end
  end
  if #list == 0 or #list > C.HALO_MAX_INPUTS then
    errors.raise("usage", ("%s: %d tensors, 1 to %d wanted"):format(what, #list, C.HALO_MAX_INPUTS), level + 1)
  end
  for i, t in ipairs(list) do inputs[i - 1] = check(t, ("%s: input %d"):format(what, i), level + 1) end
  write_params(row, list[1], level + 1, given)
  return pass(run(row, #list, level + 1))
end

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

--- x in another dtype: `x:to "f64"`; x itself when it has it.
function M.to(x, dtype)
  if check(x, "to: x", 2).dtype == dtype then return x end
  return (call(rows.cast, 2, x, { dtype = dtype }))
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

--- Run a row as it stands: inputs as a list (nil for absent ones), all parameters by their C names and
-- values. What the tests of the table use.
function M.raw(name, list, params)
  local row = rows[name]
  for i = 1, tonumber(C.HALO_MAX_INPUTS) do inputs[i - 1] = list[i] end
  for i, param in ipairs(row.params) do
    local value = params and params[param.name]
    numbers[i - 1] = value == nil and param.default or value
  end
  return pass(run(row, row.takes_list and #list or #row.inputs, 2))
end

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
