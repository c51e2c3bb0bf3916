--- Tensors: strided windows on shared storage, with autograd.
-- A tensor is a handle from the engine with methods. Dims and slices count from 1 and include both
-- ends; negative dims count from the end. Indices that are data (token ids, positions, results of
-- `argmax` and `topk`) count from 0 everywhere.
--
--    local tensor = require "halo.tensor"
--    local a = tensor { { 1, 2 }, { 3, 4 } }       -- f32 [2,2]
--    local b = tensor.normal { 2, 2, seed = 7, requires_grad = true }
--    local loss = (a:matmul(b) + 1):square():mean()
--    loss:backward()
--    print(b.grad)
--
-- Fields: `shape` (a table), `ndim`, `count`, `dtype`, `device`, `strides`, `is_contiguous`,
-- `requires_grad` (also set), `grad` (also set). Methods: those below and every op of `halo.ops` whose
-- first input is a tensor.
--
-- Constructors (`tensor.zeros` and so on) are in halo/create.lua. This is the only file that gives handles
-- their finalizer.
local ffi = require "ffi"
local halo_ffi = require "halo.ffi"
local args = require "halo.args"
local errors = require "halo.errors"
local devices = require "halo.device"
local memory = require "halo.memory"

local C, call_at = halo_ffi.C, halo_ffi.call_at
local handle_type = ffi.typeof "halo_tensor *"

local M = {}

-- ---- dtypes and devices -------------------------------------------------------------------------

--- Names of dtypes in the order of `halo_dtype`.
M.dtypes = {}
local dtype_numbers, dtype_bytes = {}, {}
for i = 0, C.HALO_DTYPE_COUNT - 1 do
  local name = ffi.string(C.halo_dtype_name(i))
  M.dtypes[i + 1] = name
  dtype_numbers[name] = i
  dtype_bytes[name] = tonumber(C.halo_dtype_bytes(i))
end

--- Constructors of host arrays, by dtype.
M.host_types = {
  f32 = ffi.typeof "float[?]", f64 = ffi.typeof "double[?]", bf16 = ffi.typeof "uint16_t[?]",
  i32 = ffi.typeof "int32_t[?]", i64 = ffi.typeof "int64_t[?]", u8 = ffi.typeof "uint8_t[?]",
}
local host_pointers = {
  f32 = ffi.typeof "float *", f64 = ffi.typeof "double *", bf16 = ffi.typeof "uint16_t *",
  i32 = ffi.typeof "int32_t *", i64 = ffi.typeof "int64_t *", u8 = ffi.typeof "uint8_t *",
}
local device_names = { [0] = "cpu", [1] = "cuda" }

--- Number of a dtype for the C API; raises for an unknown name.
-- @tparam string name "f32", "f64", "bf16", "i32", "i64", "u8"
-- @tparam[opt=1] int level frame to blame above the caller
function M.dtype_number(name, level)
  local number = dtype_numbers[name]
  if number == nil then
    errors.raise("usage", ("unknown dtype %s%s"):format(args.describe(name), args.did_you_mean(tostring(name),
      M.dtypes)), (level or 1) + 1)
  end
  return number
end

--- Number of a device for the C API; raises for an unknown name.
-- @tparam ?string name nil: the default device
function M.device_number(name, level)
  local number = devices.number(name or devices.default)
  if number == nil then
    errors.raise("usage", ("unknown device %s (there is: cpu, cuda)"):format(args.describe(name)), (level or 1) + 1)
  end
  return number
end

--- Bytes of one element.
function M.dtype_bytes(name) return dtype_bytes[name] end

-- ---- handles ------------------------------------------------------------------------------------

local released = setmetatable({}, { __mode = "k" })

--- Take over a handle that the C API handed out: from now on Lua frees it.
-- @param pointer a `halo_tensor *` that is ours
-- @treturn Tensor
function M.own(pointer)
  local t = ffi.gc(pointer, C.halo_tensor_free)
  memory.register(t)
  memory.pace()
  return t
end

local slot = ffi.new "halo_tensor *[1]"

--- A handle of our own on a tensor that something else owns (`halo_adamw_flat_grad` and the like).
function M.borrow(pointer)
  call_at(2, C.halo_tensor_retain, slot, pointer)
  return M.own(slot[0])
end

--- True for tensors, freed ones too.
function M.is_tensor(v) return type(v) == "cdata" and ffi.istype(handle_type, v) end
local is_tensor = M.is_tensor

--- The tensor, or an error if it is none or has been freed.
-- @param t what came
-- @tparam string what name of the argument, for the message
-- @tparam[opt=1] int level frame to blame above the caller
function M.check(t, what, level)
  if not is_tensor(t) then
    errors.raise("usage", ("%s must be a tensor, got %s"):format(what, args.describe(t)), (level or 1) + 1)
  end
  if released[t] then
    errors.raise("usage", ("%s was freed: its scope ended, or free() was called"):format(what), (level or 1) + 1)
  end
  return t
end
local check = M.check

--- Give the memory back now instead of when the collector finds it. Harmless when done twice; the tape
-- and views keep what they need.
function M.free(t)
  if released[t] then return end
  released[t] = true
  ffi.gc(t, nil)
  C.halo_tensor_free(t)
end

-- ---- reading shapes -----------------------------------------------------------------------------

local function shape_of(t)
  local shape = {}
  for d = 1, C.halo_tensor_ndim(t) do shape[d] = tonumber(C.halo_tensor_size(t, d - 1)) end
  return shape
end

--- A dim as C counts it. `extra` is 1 where the place after the last dim is meant as well.
-- @tparam Tensor t
-- @tparam int dim from 1, or from -1 backward
function M.dim_number(t, dim, what, level, extra)
  local n = C.halo_tensor_ndim(t) + (extra or 0)
  if type(dim) ~= "number" or dim ~= math.floor(dim) or dim == 0 or dim > n or dim < -n then
    errors.raise("usage", ("%s: dim %s of a tensor with %d dim%s; dims count from 1, or from -1 backward")
      :format(what, args.describe(dim), n, n == 1 and "" or "s"), (level or 1) + 1)
  end
  return dim > 0 and dim - 1 or dim
end

local fields = {
  shape = shape_of,
  ndim = function(t) return C.halo_tensor_ndim(t) end,
  count = function(t) return tonumber(C.halo_tensor_count(t)) end,
  dtype = function(t) return M.dtypes[C.halo_tensor_dtype(t) + 1] end,
  device = function(t) return device_names[C.halo_tensor_device(t)] end,
  strides = function(t)
    local strides = {}
    for d = 1, C.halo_tensor_ndim(t) do strides[d] = tonumber(C.halo_tensor_stride(t, d - 1)) end
    return strides
  end,
  is_contiguous = function(t) return C.halo_tensor_is_contiguous(t) ~= 0 end,
  requires_grad = function(t) return C.halo_tensor_requires_grad(t) ~= 0 end,
  grad = function(t)
    local grad = C.halo_tensor_grad(t)
    if grad ~= nil then return M.borrow(grad) end
  end,
}

local setters = {
  requires_grad = function(t, on) call_at(3, C.halo_tensor_require_grad, t, on and 1 or 0) end,
  grad = function(t, grad)
    call_at(3, C.halo_tensor_set_grad, t, grad ~= nil and check(grad, "grad", 3) or nil)
  end,
}

-- ---- allocation ---------------------------------------------------------------------------------

local shape_buffer = ffi.new("int64_t[?]", C.HALO_MAX_DIMS)

--- A C array of sizes, and their number; valid until the next call.
-- @tparam string what the function, for messages
-- @tparam table shape
-- @tparam int level frame to blame above the caller
function M.c_shape(what, shape, level)
  if #shape > C.HALO_MAX_DIMS then
    errors.raise("usage", ("%s: %d dims, at most %d"):format(what, #shape, C.HALO_MAX_DIMS), level + 1)
  end
  for d, size in ipairs(shape) do
    if type(size) ~= "number" or size < 0 or size ~= math.floor(size) then
      errors.raise("usage", ("%s: size %d of the shape is %s"):format(what, d, args.describe(size)), level + 1)
    end
    shape_buffer[d - 1] = size
  end
  return shape_buffer, #shape
end

--- A new tensor, contents undefined or zero.
-- @tparam string what the function, for messages
-- @tparam table o `shape`, `dtype`, `device`
-- @tparam boolean zero
-- @tparam int level frame to blame above the caller
function M.allocate(what, o, zero, level)
  local dtype, device = M.dtype_number(o.dtype, level + 1), M.device_number(o.device, level + 1)
  local shape, ndim = M.c_shape(what, o.shape, level + 1)
  call_at(level + 1, zero and C.halo_tensor_zeros or C.halo_tensor_new, slot, dtype, device, ndim, shape)
  return M.own(slot[0])
end
local allocate = M.allocate

--- A scalar of the dtype and device of another tensor: how ops take numbers.
function M.scalar_like(t, value)
  call_at(3, C.halo_tensor_new, slot, C.halo_tensor_dtype(t), C.halo_tensor_device(t), 0, nil)
  local s = M.own(slot[0])
  call_at(3, C.halo_tensor_fill, s, value)
  return s
end

-- ---- methods ------------------------------------------------------------------------------------

--- Methods of tensors; `halo.ops` adds one for each op.
M.methods = {}
local methods = M.methods

--- Size of one dim.
function methods.size(t, dim) return tonumber(C.halo_tensor_size(t, M.dim_number(t, dim, "size", 2))) end

methods.free = M.free

--- Contiguous host copy as cdata, in the tensor's dtype (bf16 as f32); the second result is the dtype.
function methods.host(t)
  local dtype, count = fields.dtype(t), fields.count(t)
  local source = t
  if dtype == "bf16" then
    dtype = "f32"
    source = allocate("host", { shape = shape_of(t), dtype = "f32", device = fields.device(t) }, false, 2)
    call_at(2, C.halo_tensor_copy, source, t)
  end
  local host = M.host_types[dtype](math.max(count, 1))
  call_at(2, C.halo_tensor_read, source, host)
  if source ~= t then M.free(source) end
  return host, dtype
end

--- Pointer to the first element in the tensor's C type; the tensor must outlive its use and be in host
-- memory. Writing through it is not seen by the tape. Strides apply: ask `is_contiguous`.
function methods.pointer(t)
  if fields.device(t) ~= "cpu" then
    errors.raise("usage", ("pointer: %s is on %s, where the host cannot follow; host() copies"):format(M.describe(t),
      fields.device(t)), 2)
  end
  return ffi.cast(host_pointers[fields.dtype(t)], C.halo_tensor_data(t))
end

local number = ffi.new "double[1]"

--- The value of a tensor with one element.
function methods.item(t)
  if fields.count(t) ~= 1 then
    errors.raise("usage", ("item: %s has %d elements, one is wanted"):format(M.describe(t), fields.count(t)), 2)
  end
  call_at(2, C.halo_tensor_get, t, 0, number)
  return number[0]
end

-- Flat index, from 0, of 1-based positions.
local function flat_index(t, what, ...)
  local ndim = C.halo_tensor_ndim(t)
  if select("#", ...) ~= ndim then
    errors.raise("usage", ("%s: %d positions for %s"):format(what, select("#", ...), M.describe(t)), 3)
  end
  local flat = 0
  for d = 1, ndim do
    local i, size = select(d, ...), tonumber(C.halo_tensor_size(t, d - 1))
    if type(i) == "number" and i < 0 then i = i + size + 1 end
    if type(i) ~= "number" or i < 1 or i > size then
      errors.raise("usage", ("%s: position %s of dim %d, %s has 1..%d"):format(what, args.describe((select(d, ...))),
        d, M.describe(t), size), 3)
    end
    flat = flat * size + i - 1
  end
  return flat
end

--- One element: `t:get(1, 3)`. Slow; for the prompt and tests.
function methods.get(t, ...)
  call_at(2, C.halo_tensor_get, t, flat_index(t, "get", ...), number)
  return number[0]
end

--- Set one element: `t:set({1, 3}, 0.5)`. Not seen by the tape.
function methods.set(t, positions, value)
  call_at(2, C.halo_tensor_set, t, flat_index(t, "set", unpack(positions)), value)
  return t
end

--- All elements as nested tables; a number for a scalar.
function methods.totable(t)
  local host, shape, at = methods.host(t), shape_of(t), 0
  local function read(depth)
    if depth > #shape then
      at = at + 1
      return tonumber(host[at - 1])
    end
    local row = {}
    for i = 1, shape[depth] do row[i] = read(depth + 1) end
    return row
  end
  return read(1)
end

--- All elements in row-major order as one table.
function methods.values(t)
  local host, values = methods.host(t), {}
  for i = 1, fields.count(t) do values[i] = tonumber(host[i - 1]) end
  return values
end

--- Fill in place; not seen by the tape. Returns the tensor.
function methods.fill(t, value)
  call_at(2, C.halo_tensor_fill, t, value)
  return t
end

--- Copy from another tensor of the same shape, converting dtype and device; not seen by the tape.
function methods.copy_from(t, source)
  call_at(2, C.halo_tensor_copy, t, check(source, "copy_from: source", 2))
  return t
end

--- t += scale * other, in place; not seen by the tape.
function methods.add_scaled(t, other, scale)
  call_at(2, C.halo_tensor_add_scaled, t, check(other, "add_scaled: other", 2), scale or 1)
  return t
end

--- t *= scale, in place; not seen by the tape.
function methods.scale(t, scale)
  call_at(2, C.halo_tensor_scale, t, scale)
  return t
end

--- Another view of the same data that the tape does not follow.
function methods.detach(t)
  call_at(2, C.halo_tensor_detach, slot, t)
  return M.own(slot[0])
end

--- A contiguous copy that the tape does not follow.
-- @tparam[opt] string device where the copy goes (default: where the tensor is)
function methods.clone(t, device)
  local o = { shape = shape_of(t), dtype = fields.dtype(t), device = device or fields.device(t) }
  local copy = allocate("clone", o, false, 2)
  call_at(2, C.halo_tensor_copy, copy, t)
  return copy
end

--- Ask for a gradient (or not, with false). Returns the tensor.
function methods.require_grad(t, on)
  call_at(2, C.halo_tensor_require_grad, t, on == false and 0 or 1)
  return t
end

--- Set the gradient to nil.
function methods.drop_grad(t)
  call_at(2, C.halo_tensor_set_grad, t, nil)
  return t
end

--- Gradients of this tensor with respect to all leaves; see `halo.autograd.backward`.
function methods.backward(t, seed) return require("halo.autograd").backward(t, seed) end

local hash = ffi.new "uint64_t[1]"

--- 64-bit hash of dtype, shape and contents, a `uint64_t`; equal on every rank for equal tensors.
-- `bit.tohex` prints it.
function methods.hash(t)
  call_at(2, C.halo_tensor_hash, t, hash)
  return hash[0]
end

-- ---- printing -----------------------------------------------------------------------------------

--- "f32 [2,96,64]".
function M.describe(t)
  return ("%s [%s]"):format(fields.dtype(t), table.concat(shape_of(t), ","))
end

local shown = 6 -- elements in a summary

local function summary(t)
  if released[t] then return "tensor (freed)" end
  local parts, count = {}, fields.count(t)
  for i = 0, math.min(count, shown) - 1 do
    call_at(2, C.halo_tensor_get, t, i, number)
    parts[#parts + 1] = ("%.5g"):format(number[0])
  end
  return ("%s %s%s: %s%s"):format(M.describe(t), fields.device(t), fields.requires_grad(t) and " grad" or "",
    #parts > 0 and table.concat(parts, " ") or "(no elements)", count > shown and " ..." or "")
end

-- ---- the metatype -------------------------------------------------------------------------------

-- halo.ops needs this file, so it is loaded at the first method that is not ours.
local function op_method(name)
  require "halo.ops"
  return methods[name]
end

--- Names of all fields and methods of tensors: what Tab offers at the prompt.
function M.names()
  require "halo.ops"
  local names = args.keys(fields)
  for name in pairs(methods) do names[#names + 1] = name end
  table.sort(names)
  return names
end

local function unknown_field(t, name, level)
  errors.raise("usage", ("%s has no field or method %s%s"):format(M.describe(t), args.describe(name),
    args.did_you_mean(name, M.names())), level + 1)
end

local function arithmetic(name)
  return function(a, b) return require("halo.ops").operators[name](a, b) end
end

ffi.metatype("halo_tensor", {
  __index = function(t, name)
    if released[t] and name ~= "free" then check(t, "the tensor", 2) end
    local get = fields[name]
    if get then return get(t) end
    return methods[name] or op_method(name) or unknown_field(t, name, 2)
  end,
  __newindex = function(t, name, value)
    check(t, "the tensor", 2)
    local set = setters[name]
    if not set then unknown_field(t, name, 2) end
    set(t, value)
  end,
  __add = arithmetic "add",
  __sub = arithmetic "sub",
  __mul = arithmetic "mul",
  __div = arithmetic "div",
  __pow = arithmetic "pow",
  __unm = arithmetic "neg",
  __len = function(t) return methods.size(t, 1) end,
  __tostring = summary,
  __concat = function(a, b)
    return (is_tensor(a) and summary(a) or tostring(a)) .. (is_tensor(b) and summary(b) or tostring(b))
  end,
})

M.scope, M.keep, M.with_tag = memory.scope, memory.keep, memory.with_tag

-- The constructors need this file, and belong to it.
package.loaded["halo.tensor"] = M
for name, f in pairs(require "halo.create") do M[name] = f end

return setmetatable(M, {
  __call = function(_, value, o) return (M.from_table(value, o, 3)) end,
  -- tensor.cat is ops.cat, and so on.
  __index = function(_, name) return require("halo.ops")[name] end,
})
