--- Communicators: the ranks that work together, and what they tell each other.
--
-- A communicator has `size()` ranks, of which `here()` live in this process, from `rank()` on:
--
--    comm.self()       one rank
--    comm.virtual(n)   n ranks in this process, in lockstep: tests, `halo check`, the prompt
--    comm.world()      the ranks a launcher started (MPI), else one
--
-- Reductions and gathers of values are over *processes*: ranks of one process share one value, which
-- holds their part already. So the same code runs on 4 virtual ranks and on 4 processes. All processes
-- must call the same things in the same order.
--
-- A communicator is closed by hand: closing is something all ranks do together, which a collector
-- cannot promise.
local args = require "halo.args"
local errors = require "halo.errors"
local halo_ffi = require "halo.ffi"

local ffi, C, check = halo_ffi.ffi, halo_ffi.C, halo_ffi.check

local M = {}

local Comm = {}
Comm.__index = Comm

local slot = ffi.new "halo_comm *[1]"

-- `owned`: close() gives the handle back.
local function wrap(handle, owned) return setmetatable({ handle = handle, owned = owned }, Comm) end

--- One rank: this process.
function M.self()
  check(C.halo_comm_self(slot))
  return wrap(slot[0], true)
end

--- n ranks in this process.
function M.virtual(n)
  if type(n) ~= "number" or n ~= math.floor(n) then
    errors.raise("usage", "comm.virtual: the number of ranks must be a whole number, is " .. args.describe(n), 2)
  end
  check(C.halo_comm_local(slot, n))
  return wrap(slot[0], true)
end

--- The ranks of the job; one when no launcher started us. `halo.launch` owns and ends it.
-- @raise communication when the launcher's count and MPI's differ
function M.world() return wrap(require("halo.launch").world(), false) end

--- True for communicators.
function M.is(v) return getmetatable(v) == Comm end

--- An object for a handle that something else owns (a mesh); closing it only lets go.
function M.borrow(handle) return wrap(handle, false) end

local function handle_of(self)
  return self.handle or errors.raise("usage", "the communicator was closed", 3)
end

--- Number of the first rank here, from 0.
function Comm:rank() return C.halo_comm_rank(handle_of(self)) end
--- Ranks in all.
function Comm:size() return C.halo_comm_size(handle_of(self)) end
--- Ranks in this process.
function Comm:here() return C.halo_comm_here(handle_of(self)) end
--- "self", "local" or "mpi".
function Comm:name() return ffi.string(C.halo_comm_name(handle_of(self))) end
--- True when other processes take part.
function Comm:is_spread() return self:here() < self:size() end

--- Wait until all ranks are here.
function Comm:barrier() check(C.halo_comm_barrier(handle_of(self))) end

--- Ranks of the same color become a communicator of their own, in the order of their keys. Collective.
function Comm:split(color, key)
  check(C.halo_comm_split(slot, handle_of(self), color, key or self:rank()))
  return wrap(slot[0], true)
end

-- One number or a list of numbers through a reduction of doubles.
local function reduce(self, f, values)
  local list = type(values) == "table" and values or { values }
  local n = #list
  local buffer = ffi.new("double[?]", math.max(n, 1))
  for i = 1, n do buffer[i - 1] = list[i] end
  if self:is_spread() then check(f(handle_of(self), ffi.new("void *[1]", buffer), n, C.HALO_F64), 2) end
  if type(values) ~= "table" then return buffer[0] end
  local out = {}
  for i = 1, n do out[i] = buffer[i - 1] end
  return out
end

--- Sums over processes, in rank order.
-- @tparam number|table values a number, or a list of numbers of the same length everywhere
-- @return the same shape as came
-- @usage local loss, labels = unpack(comm:all_reduce { loss, labels })
function Comm:all_reduce(values) return reduce(self, C.halo_comm_all_reduce, values) end

--- Maxima over processes; same arguments as `all_reduce`.
function Comm:all_reduce_max(values) return reduce(self, C.halo_comm_all_reduce_max, values) end

--- Sum a tensor (f32, f64 or i64, contiguous) over processes, in place; returns it.
function Comm:all_reduce_tensor(t)
  check(C.halo_comm_all_reduce_tensor(handle_of(self), t))
  return t
end

--- Every process's tensor, in rank order; all must have one shape and dtype. Outside the tape.
-- @treturn {Tensor,...} copies; of one process: the tensor itself
function Comm:all_gather_tensor(t)
  if not self:is_spread() then return { t } end
  local tensor = require "halo.tensor"
  local source = t:to("cpu"):contiguous()
  local bytes = t.count * tensor.dtype_bytes(t.dtype)
  local buffer = ffi.new("uint8_t[?]", math.max(bytes * self:size(), 1))
  check(C.halo_comm_all_gather(handle_of(self), ffi.new("void *[1]", buffer),
    ffi.new("const void *[1]", C.halo_tensor_data(source)), bytes))
  local out = {}
  for r = 1, self:size() do
    out[r] = tensor.from_pointer(buffer + (r - 1) * bytes, { shape = t.shape, dtype = t.dtype, device = t.device })
  end
  return out
end

--- Every process's text, in rank order.
function Comm:all_gather_text(text)
  if not self:is_spread() then return { text } end
  local size = self:size()
  local lengths = ffi.new("int64_t[?]", size)
  check(C.halo_comm_all_gather(handle_of(self), ffi.new("void *[1]", lengths),
    ffi.new("const void *[1]", ffi.new("int64_t[1]", #text)), 8))
  local total = 0
  for r = 0, size - 1 do total = total + tonumber(lengths[r]) end
  local buffer = ffi.new("char[?]", math.max(total, 1))
  local own = ffi.new("char[?]", #text + 1, text)
  check(C.halo_comm_all_gatherv(handle_of(self), ffi.new("void *[1]", buffer), ffi.new("const void *[1]", own),
    lengths))
  local out, at = {}, 0
  for r = 0, size - 1 do
    out[r + 1] = ffi.string(buffer + at, tonumber(lengths[r]))
    at = at + tonumber(lengths[r])
  end
  return out
end

--- The root's text on every process.
-- @tparam string text read on the process that holds rank `root`
-- @tparam[opt=0] int root
function Comm:broadcast_text(text, root)
  root = root or 0
  if not self:is_spread() then return text end
  local is_root = self:rank() == root
  local length = ffi.new("int64_t[1]", is_root and #text or 0)
  check(C.halo_comm_broadcast(handle_of(self), ffi.new("void *[1]", length), 8, root))
  local n = tonumber(length[0])
  local buffer = is_root and ffi.new("char[?]", n + 1, text) or ffi.new("char[?]", n + 1)
  check(C.halo_comm_broadcast(handle_of(self), ffi.new("void *[1]", buffer), n, root))
  return ffi.string(buffer, n)
end

--- Raise, naming the first rank that differs, unless all processes hold the same 64-bit value.
function Comm:same(value, what)
  check(C.halo_comm_same(handle_of(self), ffi.cast("uint64_t", value), what), 2)
end

--- Ranks of this communicator on this machine; ranks of one process are on one machine.
function Comm:local_size()
  if not self:is_spread() then return self:size() end
  local name = require("halo.process").hostname()
  local n = 0
  for _, other in ipairs(self:all_gather_text(name)) do
    if other == name then n = n + 1 end
  end
  return n
end

--- Seconds spent waiting for other ranks since the last `reset_timer`: communication that computing
-- did not hide.
function Comm:exposed_seconds() return tonumber(C.halo_comm_exposed_seconds(handle_of(self))) end
function Comm:reset_timer() C.halo_comm_reset_timer(handle_of(self)) end

--- End every rank of the job with this exit code: the last resort after an error that other ranks do
-- not know of.
function Comm:abort(code) C.halo_comm_abort(handle_of(self), code or 70) end

--- Give it back; all ranks do so together. Rings made on it must be gone. Harmless when done twice.
function Comm:close()
  if self.handle and self.owned then C.halo_comm_free(self.handle) end
  self.handle = nil
end

Comm.__tostring = function(self)
  if not self.handle then return "communicator (closed)" end
  return ("communicator %s: rank %d of %d, %d here"):format(self:name(), self:rank(), self:size(), self:here())
end

return M
