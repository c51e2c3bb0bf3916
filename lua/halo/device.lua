--- Devices: where tensors live and ops run.
--
--    halo.device "cuda"            -- constructors without a device make tensors there from now on
--    halo.device()                 --> "cuda"
--    halo.tensor.zeros { 2, 3 }    --> f32 [2,3] cuda
--
-- Inputs of an op must be on one device; `t:to "cuda"` copies. Modules of Halo that know where their
-- tensors belong (a model, a job) say so and do not follow the setting. "cuda" is the first device that
-- CUDA shows this process (CUDA_VISIBLE_DEVICES chooses among several).
local ffi = require "ffi"
local args = require "halo.args"
local errors = require "halo.errors"
local halo_ffi = require "halo.ffi"

local C = halo_ffi.C

local M = {
  --- Names of the devices, in the order of `halo_device`.
  names = { "cpu", "cuda" },
  --- Device of constructors that name none.
  default = "cpu",
  --- Edge of a plan's tiles, in tokens, where nobody says: the Hopper kernels take blocks of 128, on the
  -- CPU 64 keep more of a sparse plan's choice.
  block = { cpu = 64, cuda = 128 },
}

local numbers = { cpu = C.HALO_CPU, cuda = C.HALO_CUDA }

--- Number of a device for the C API; nil for an unknown name.
function M.number(name) return numbers[name] end

--- How many devices of a kind there are.
function M.count(name) return C.halo_device_count(numbers[name] or -1) end

--- Why there is no device of a kind; "" when there is one.
function M.reason(name) return ffi.string(C.halo_device_reason(numbers[name])) end

local device_row = ffi.new "halo_device_row[1]"

--- Facts about a device.
-- @tparam string name
-- @tparam[opt=1] int index which one, from 1
-- @treturn table `name`, `total` and `free` (bytes), `major`, `minor` (compute capability), `processors`
function M.facts(name, index)
  halo_ffi.check(C.halo_device_read(device_row, numbers[name], (index or 1) - 1))
  local r = device_row[0]
  return { name = ffi.string(r.name), total = tonumber(r.total_bytes), free = tonumber(r.free_bytes), major = r.major,
    minor = r.minor, processors = r.processors }
end

--- The name, when such a device is there.
-- @tparam string name "cpu" or "cuda"
-- @tparam[opt=1] int level frame to blame above the caller; 0: none
-- @raise class usage for an unknown name, class environment when there is no such device
function M.require(name, level)
  level = level or 1
  if not numbers[name] then
    errors.raise("usage", ("unknown device %s%s"):format(args.describe(name), args.did_you_mean(tostring(name),
      M.names)), level > 0 and level + 1 or 0)
  end
  if M.count(name) < 1 then
    errors.raise("environment", ("device = %q cannot be used here: %s; `halo doctor` says more, and "
      .. 'device = "cpu" works everywhere'):format(name, M.reason(name)), level > 0 and level + 1 or 0)
  end
  return name
end

--- Wait until a device has done all that was asked of it, and report what failed meanwhile.
-- @tparam[opt] string name default: the default device
function M.synchronize(name) halo_ffi.check(C.halo_synchronize(numbers[name or M.default])) end

-- halo.device "cuda"; halo.device()
return setmetatable(M, {
  __call = function(_, name)
    if name ~= nil then M.default = M.require(name, 2) end
    return M.default
  end,
  __tostring = function() return "device " .. M.default end,
})
