--- Communicators: who takes part, and the few collectives that training needs.
--
--    local world = comm.world()              -- all ranks that mpirun started; alone it is one rank
--    local world = comm.virtual(4)           -- four ranks inside this process, in lockstep
--    local totals = world:all_reduce { loss, labels }
--
-- A virtual communicator holds W ranks in one process (`here` = W). Tensors of a model then carry the
-- tokens of all of them, stacked in rank order, so there is one copy of weights and gradients and a sum
-- over "ranks" of a per-process value has nothing to add: `all_reduce` and its kin work on processes.
-- The engine's per-rank collectives are for the ring, in C.
local ffi = require "ffi"
local halo_ffi = require "halo.ffi"
local launch = require "halo.launch"
local tensor = require "halo.tensor"

local C, check = halo_ffi.C, halo_ffi.check

local Comm = {}
Comm.__index = Comm

local M = {}

local function own(slot)
  return setmetatable({ handle = ffi.gc(slot[0], C.halo_comm_free) }, Comm)
end

local function make(fn, ...)
  local slot = ffi.new "halo_comm *[1]"
  check(fn(slot, ...))
  return own(slot)
end

--- One rank: every collective is a copy.
function M.self() return make(C.halo_comm_self) end

--- W ranks inside this process: for tests, `halo check` and the prompt.
function M.virtual(world) return make(C.halo_comm_local, world) end

--- The ranks the launcher started; one rank when there was none. `halo.launch` owns and ends it.
-- @raise communication when the launcher's count and MPI's differ
function M.world() return setmetatable({ handle = launch.world() }, Comm) end

--- True for communicators.
function M.is(v) return getmetatable(v) == Comm end

--- Rank of this process (of its first rank, when it holds several).
function Comm:rank() return C.halo_comm_rank(self.handle) end
--- W.
function Comm:size() return C.halo_comm_size(self.handle) end
--- Ranks in this process.
function Comm:here() return C.halo_comm_here(self.handle) end
--- "self", "local" or "mpi".
function Comm:name() return ffi.string(C.halo_comm_name(self.handle)) end

-- Whether other processes take part.
local function is_alone(self) return self:here() == self:size() end

--- Ranks of this communicator with the same color, ordered by key. Collective.
function Comm:split(color, key)
  if is_alone(self) then return self end
  return make(C.halo_comm_split, self.handle, color, key)
end

function Comm:barrier() check(C.halo_comm_barrier(self.handle)) end

local function reduce(self, fn, values, n)
  local buffer = ffi.new("double[?]", math.max(n, 1))
  for i = 1, n do buffer[i - 1] = values[i] end
  local slot = ffi.new("void *[1]", buffer)
  check(fn(self.handle, slot, n, C.HALO_F64))
  local out = {}
  for i = 1, n do out[i] = tonumber(buffer[i - 1]) end
  return out
end

--- Sums over processes of a list of numbers, in rank order.
-- @tparam {number,...} values the same count everywhere
-- @treturn {number,...}
function Comm:all_reduce(values)
  if is_alone(self) then return values end
  return reduce(self, C.halo_comm_all_reduce, values, #values)
end

--- The largest of one number per process.
function Comm:all_reduce_max(value)
  if is_alone(self) then return value end
  return reduce(self, C.halo_comm_all_reduce_max, { value }, 1)[1]
end

--- In-place sum of a tensor over processes, in rank order.
function Comm:all_reduce_tensor(t)
  if not is_alone(self) then check(C.halo_comm_all_reduce_tensor(self.handle, t)) end
  return t
end

--- One tensor of every process, in rank order; all of one shape.
function Comm:all_gather_tensor(t)
  t = t:contiguous()
  if is_alone(self) then return { t } end
  local n, bytes = self:size(), t.count * tensor.dtype_bytes(t.dtype)
  local buffer = ffi.new("uint8_t[?]", n * bytes)
  local out, input = ffi.new("void *[1]", buffer), ffi.new("const void *[1]", ffi.cast("const void *", C.halo_tensor_data(t)))
  check(C.halo_comm_all_gather(self.handle, out, input, bytes))
  local list = {}
  for r = 1, n do
    list[r] = tensor.from_pointer(buffer + (r - 1) * bytes, { shape = t.shape, dtype = t.dtype })
  end
  return list
end

--- The text that the root process holds, on every process.
function Comm:broadcast_text(text, root)
  if is_alone(self) then return text end
  local length = self:all_reduce { self:rank() == (root or 0) and #text or 0 }[1]
  local buffer = ffi.new("char[?]", length + 1)
  if self:rank() == (root or 0) then ffi.copy(buffer, text, #text) end
  local slot = ffi.new("void *[1]", buffer)
  check(C.halo_comm_broadcast(self.handle, slot, length, root or 0))
  return ffi.string(buffer, length)
end

--- A short text of every process, in rank order; longer ones are cut at `limit` bytes (default 512).
function Comm:all_gather_text(text, limit)
  if is_alone(self) then return { text } end
  limit = limit or 512
  local mine, all = ffi.new("char[?]", limit + 1), ffi.new("char[?]", (limit + 1) * self:size())
  ffi.copy(mine, text:sub(1, limit))
  local out, input = ffi.new("void *[1]", all), ffi.new("const void *[1]", mine)
  check(C.halo_comm_all_gather(self.handle, out, input, limit + 1))
  local list = {}
  for r = 1, self:size() do list[r] = ffi.string(all + (r - 1) * (limit + 1)) end
  return list
end

--- Raise, naming the first rank that differs, unless a 64-bit value is the same everywhere.
function Comm:same(value, what)
  if not is_alone(self) then check(C.halo_comm_same(self.handle, ffi.cast("uint64_t", value), what)) end
end

--- Seconds spent waiting for others since the timer was reset: communication that compute did not hide.
function Comm:exposed_seconds() return C.halo_comm_exposed_seconds(self.handle) end
function Comm:reset_timer() C.halo_comm_reset_timer(self.handle) end

--- Ranks that share this machine, as the launcher says (1 when nobody does).
function Comm:local_size()
  return tonumber(os.getenv "OMPI_COMM_WORLD_LOCAL_SIZE" or os.getenv "SLURM_NTASKS_PER_NODE" or "") or self:size()
end

--- End every rank of the job at once; the last resort after an error.
function Comm:abort(code) C.halo_comm_abort(self.handle, code or 70) end

Comm.__tostring = function(self)
  return ("%s communicator: rank %d of %d, %d here"):format(self:name(), self:rank(), self:size(), self:here())
end

return M
