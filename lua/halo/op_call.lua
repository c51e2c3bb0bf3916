--- Calling the engine's ops from Lua: the op table, and how arguments become inputs and parameters.
-- `halo.ops` makes the functions that users call of this. Every function here takes a `level`: the frame
-- above it to blame for wrong arguments, as `error` counts them.
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

--- Rows of the op table by name: `op`, `name`, `inputs`, `params` ({ name, default, is_dim }), `names`,
-- `n_out`, `has_gradient`, `doc`, `takes_list`.
M.rows = {}
local rows = M.rows

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
  if param.name == "device" then return (tensor.device_number(value, level + 1)) end
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
function M.call(row, level, ...)
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
function M.call_list(row, level, list, params)
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

return M
