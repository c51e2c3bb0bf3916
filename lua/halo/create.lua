--- Making tensors: from numbers, constants, counters, random streams and host memory.
-- Everything here is found in `halo.tensor`: `tensor.zeros { 2, 3 }`, `tensor { 1, 2, 3 }`. The table of a
-- constructor holds the sizes one after the other (or `shape = {...}`) and named options.
local ffi = require "ffi"
local halo_ffi = require "halo.ffi"
local args = require "halo.args"
local errors = require "halo.errors"
local tensor = require "halo.tensor"

local C, call_at = halo_ffi.C, halo_ffi.call_at

local M = {}

local slot = ffi.new "halo_tensor *[1]"

-- Options of a constructor: the array part, or `shape`, is the shape; the rest is named.
local common = { shape = "table?", dtype = { "string", "f32" }, device = "string?",
  requires_grad = { "boolean", false } }

local function options(what, o, more)
  if type(o) ~= "table" then
    errors.raise("usage", ("%s wants a table { sizes..., dtype = ... }, got %s"):format(what, args.describe(o)), 3)
  end
  local known, named, sizes = {}, {}, {}
  for k, v in pairs(common) do known[k] = v end
  for k, v in pairs(more or {}) do known[k] = v end
  for k, v in pairs(o) do
    if type(k) == "number" then sizes[k] = v else named[k] = v end
  end
  local out = args.named(what, named, known, 2)
  out.shape = out.shape or sizes
  return out
end

-- Leaves ask for gradients last, when they are filled.
local function finished(t, o)
  if o.requires_grad then call_at(3, C.halo_tensor_require_grad, t, 1) end
  return t
end

--- A tensor whose contents are undefined. With two arguments: `tensor.from_table`.
-- @tparam table o sizes, or `shape`; `dtype` ("f32"), `device` (default: `halo.device()`), `requires_grad`
-- @usage local t = tensor.new { 2, 3, dtype = "bf16" }
-- @usage local ids = tensor.new({ { 5, 7 } }, { dtype = "i32" })
function M.new(o, more)
  if more ~= nil then return M.from_table(o, more) end
  o = options("tensor.new", o)
  return finished(tensor.allocate("tensor.new", o, false, 2), o)
end

--- Zeros. Same arguments as `tensor.new`.
function M.zeros(o)
  o = options("tensor.zeros", o)
  return finished(tensor.allocate("tensor.zeros", o, true, 2), o)
end

local function filled(what, o, value)
  local t = tensor.allocate(what, o, false, 3)
  call_at(3, C.halo_tensor_fill, t, value)
  return finished(t, o)
end

--- Ones. Same arguments as `tensor.new`.
function M.ones(o) return filled("tensor.ones", options("tensor.ones", o), 1) end

--- One value everywhere: `value`, and the arguments of `tensor.new`.
function M.full(o)
  o = options("tensor.full", o, { value = "number" })
  return filled("tensor.full", o, o.value)
end

--- Normal random numbers; element i depends on (seed, stream, i) only.
-- @tparam table o `seed` (0), `stream` (0), `mean` (0), `std` (1), and the arguments of `tensor.new`
function M.normal(o)
  o = options("tensor.normal", o, { seed = { "number", 0 }, stream = { "number", 0 }, mean = { "number", 0 },
    std = { "number", 1 } })
  local t = tensor.allocate("tensor.normal", o, false, 2)
  call_at(2, C.halo_tensor_normal, t, o.seed, o.stream, o.mean, o.std)
  return finished(t, o)
end

--- Uniform random numbers in [lo,hi); element i depends on (seed, stream, i) only.
-- @tparam table o `seed` (0), `stream` (0), `lo` (0), `hi` (1), and the arguments of `tensor.new`
function M.uniform(o)
  o = options("tensor.uniform", o, { seed = { "number", 0 }, stream = { "number", 0 }, lo = { "number", 0 },
    hi = { "number", 1 } })
  local t = tensor.allocate("tensor.uniform", o, false, 2)
  call_at(2, C.halo_tensor_uniform, t, o.seed, o.stream, o.lo, o.hi)
  return finished(t, o)
end

-- A new tensor from a host buffer of its dtype.
local function from_host(what, o, host, level)
  local dtype, device = tensor.dtype_number(o.dtype, level + 1), tensor.device_number(o.device, level + 1)
  local shape, ndim = tensor.c_shape(what, o.shape, level + 1)
  call_at(level + 1, C.halo_tensor_from, slot, dtype, device, ndim, shape, ffi.cast("const void *", host))
  return finished(tensor.own(slot[0]), o)
end

-- A new tensor from n doubles, through f64 when the dtype is not a plain C type.
local function from_numbers(what, o, n, write, level)
  local dtype = o.dtype
  tensor.dtype_number(dtype, level + 1)
  local is_direct = dtype ~= "bf16"
  local host = tensor.host_types[is_direct and dtype or "f32"](math.max(n, 1))
  write(host)
  if is_direct then return from_host(what, o, host, level + 1) end
  local wide = from_host(what, { shape = o.shape, dtype = "f32", device = o.device }, host, level + 1)
  local t = tensor.allocate(what, o, false, level + 1)
  call_at(level + 1, C.halo_tensor_copy, t, wide)
  tensor.free(wide)
  return finished(t, o)
end

--- Numbers from, from + step, ...
-- @param o how many, or a table: `count`, `from` (0), `step` (1), `dtype` ("i64"), `device`
-- @usage tensor.arange(4) --> i64 [4] cpu: 0 1 2 3
function M.arange(o)
  if type(o) == "number" then o = { count = o } end
  o = args.named("tensor.arange", o, { count = "int", from = { "number", 0 }, step = { "number", 1 },
    dtype = { "string", "i64" }, device = "string?", requires_grad = { "boolean", false } }, 1)
  o.shape = { o.count }
  return from_numbers("tensor.arange", o, o.count, function(host)
    for i = 0, o.count - 1 do host[i] = o.from + i * o.step end
  end, 2)
end

-- Shape of nested tables, as the first row of each depth has it.
local function nested_shape(value)
  local shape, v = {}, value
  while type(v) == "table" do
    shape[#shape + 1] = #v
    v = v[1]
  end
  return shape
end

-- What is wrong with nested tables that should have this shape; nil if nothing.
local function nested_problem(value, shape, depth)
  if depth > #shape then
    if type(value) ~= "number" then return ("an element is %s, a number is wanted"):format(args.describe(value)) end
  elseif type(value) ~= "table" or #value ~= shape[depth] then
    return ("a row at depth %d has %s elements, the first one has %d"):format(depth,
      type(value) == "table" and #value or "no", shape[depth])
  else
    for i = 1, shape[depth] do
      local problem = nested_problem(value[i], shape, depth + 1)
      if problem then return problem end
    end
  end
end

local function write_nested(host, value, shape, depth, at)
  if depth > #shape then
    host[at] = value
    return at + 1
  end
  for i = 1, shape[depth] do at = write_nested(host, value[i], shape, depth + 1, at) end
  return at
end

--- A tensor from numbers: a number (a scalar), or tables nested as deep as there are dims.
-- @param value a number or a table
-- @tparam[opt] table o `dtype` ("f32"), `device`, `requires_grad`; `shape` for a flat table
-- @usage local t = tensor({ 1, 2, 3, 4 }, { shape = { 2, 2 }, dtype = "f64" })
-- @tparam[opt=2] int level frame to blame for wrong numbers, as in `error`
function M.from_table(value, o, level)
  level = level or 2
  o = args.named("tensor", o or {}, common, level - 1)
  if type(value) ~= "number" and type(value) ~= "table" then
    errors.raise("usage", ("tensor wants a number or a table, got %s"):format(args.describe(value)), level)
  end
  local nested = nested_shape(value)
  local problem = nested_problem(value, nested, 1)
  if problem then errors.raise("usage", "tensor: " .. problem, level) end
  local n = 1
  for _, size in ipairs(nested) do n = n * size end
  if o.shape then
    local wanted = 1
    for _, size in ipairs(o.shape) do wanted = wanted * size end
    if wanted ~= n then
      errors.raise("usage", ("tensor: %d numbers for a shape of %d elements"):format(n, wanted), level)
    end
  end
  o.shape = o.shape or nested
  return from_numbers("tensor", o, n, function(host) write_nested(host, value, nested, 1, 0) end, level)
end

--- A copy of contiguous host memory of the dtype.
-- @param pointer cdata pointer or array
-- @tparam table o `shape`, `dtype` ("f32"), `device`, `requires_grad`
function M.from_pointer(pointer, o)
  o = args.named("tensor.from_pointer", o, common, 1)
  if not o.shape then errors.raise("usage", "tensor.from_pointer: shape is missing", 2) end
  return from_host("tensor.from_pointer", o, pointer, 2)
end

return M
