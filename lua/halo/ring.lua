--- The ring: in which order queries meet the keys of other ranks, and over which links keys travel.
--
--    flat           W steps, one hop each
--    hierarchical   an inner ring of `inner` ranks (a node) inside an outer ring of nodes
--    gather         all keys at once; the same result to the last bit as flat
--
-- Any of them gives the same attention; they differ in messages, memory and what they hide.
local args = require "halo.args"
local errors = require "halo.errors"
local halo_ffi = require "halo.ffi"

local ffi, C, check = halo_ffi.ffi, halo_ffi.C, halo_ffi.check

local M = {}

--- Names of the schedules.
M.schedules = { "flat", "gather", "hierarchical" }

local numbers = {
  flat = C.HALO_SCHEDULE_FLAT,
  hierarchical = C.HALO_SCHEDULE_HIERARCHICAL,
  gather = C.HALO_SCHEDULE_GATHER,
}

local function schedule_number(what, name, level)
  return numbers[name] or errors.raise("usage", ("%s: there is no schedule %s%s"):format(what, args.describe(name),
    args.did_you_mean(tostring(name), M.schedules)), level + 1)
end

local Ring = {}
Ring.__index = Ring

--- Make a ring over a communicator, which must outlive it. The schedule is proved sound first.
-- @tparam table o named arguments
-- @tparam Comm o.comm the ranks that share a sequence
-- @tparam[opt="flat"] string o.schedule one of `ring.schedules`
-- @tparam[opt] int o.inner ranks of the inner ring (hierarchical); must divide the ranks. Default: those
--   of one machine
-- @usage local r = ring.new { comm = comm.virtual(4), schedule = "hierarchical", inner = 2 }
function M.new(o)
  o = args.named("ring.new", o, { comm = "table", schedule = { "string", "flat" }, inner = "int?" })
  local schedule = schedule_number("ring.new", o.schedule, 2)
  if o.schedule == "hierarchical" then o.inner = o.inner or o.comm:local_size() end
  local slot = ffi.new "halo_ring *[1]"
  check(C.halo_ring_new(slot, o.comm.handle, schedule, o.inner or 0), 2)
  -- The object keeps the communicator, and the tape keeps the ring's memory: freeing is a decrement.
  return setmetatable({ handle = ffi.gc(slot[0], C.halo_ring_free), comm = o.comm, schedule = o.schedule,
    inner = o.inner }, Ring)
end

--- Prove a schedule for any number of ranks, without any.
-- @raise with the first rule that is broken
function M.check(schedule, world, inner)
  check(C.halo_ring_check(schedule_number("ring.check", schedule, 2), world, inner or 0), 2)
end

--- Ranks in all, ranks here, first rank here, steps of a pass.
function Ring:world() return C.halo_ring_world(self.handle) end
function Ring:here() return C.halo_ring_here(self.handle) end
function Ring:rank() return C.halo_ring_rank(self.handle) end
function Ring:steps() return C.halo_ring_steps(self.handle) end

--- The rank whose keys `rank` meets at `step`, both from 0; nil when there is none.
function Ring:source(rank, step)
  local source = C.halo_ring_source(self.handle, rank, step)
  return source >= 0 and source or nil
end

--- The tables of this rank, forward and backward, as text.
function Ring:explain()
  return halo_ffi.text(function(text, capacity) return C.halo_ring_explain(self.handle, text, capacity) end)
end

--- Who meets whose keys when, as a table of ranks x steps.
function Ring:sources()
  local out = {}
  for rank = 0, self:world() - 1 do
    out[rank + 1] = {}
    for step = 0, self:steps() - 1 do out[rank + 1][step + 1] = self:source(rank, step) end
  end
  return out
end

Ring.__tostring = function(self)
  return ("ring %s%s: %d ranks over %s, rank %d"):format(self.schedule,
    self.inner and self.schedule == "hierarchical" and (" (inner %d)"):format(self.inner) or "", self:world(),
    self.comm:name(), self:rank())
end

return M
