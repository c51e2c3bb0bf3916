--- Rings: a schedule over a communicator (core/ring.c has the tables and their drawing).
--
--    local r = ring.new { comm = comm.virtual(4), schedule = "hierarchical", inner = 2 }
--    print(r)                                  -- who computes with whose keys, step by step
local args = require "halo.args"
local ffi = require "ffi"
local halo_ffi = require "halo.ffi"

local C, check = halo_ffi.C, halo_ffi.check

local Ring = {}
Ring.__index = Ring

local M = {}

local schedules = {
  flat = C.HALO_SCHEDULE_FLAT, hierarchical = C.HALO_SCHEDULE_HIERARCHICAL, gather = C.HALO_SCHEDULE_GATHER,
}

local function number_of(schedule)
  return schedules[schedule] or error(('ring: no schedule "%s"%s'):format(tostring(schedule),
    args.did_you_mean(schedule, args.keys(schedules))), 3)
end

--- Make a ring.
-- @tparam table o
-- @tparam Comm o.comm its ranks
-- @tparam[opt="flat"] string o.schedule "flat", "hierarchical" or "gather"
-- @tparam[opt] int o.inner ranks of the inner ring (hierarchical); must divide the number of ranks
function M.new(o)
  o = args.named("ring.new", o, { comm = "table", schedule = { "string", "flat" }, inner = "int?" })
  local slot = ffi.new "halo_ring *[1]"
  local inner = o.schedule == "hierarchical" and (o.inner or o.comm:size()) or 0
  check(C.halo_ring_new(slot, o.comm.handle, number_of(o.schedule), inner))
  return setmetatable({ handle = ffi.gc(slot[0], C.halo_ring_free), comm = o.comm, schedule = o.schedule,
    inner = inner }, Ring)
end

--- Check a schedule's table for any number of ranks, without a transport.
-- @raise with the first rule that is broken
function M.check(schedule, world, inner) check(C.halo_ring_check(number_of(schedule), world, inner or 1)) end

function Ring:world() return C.halo_ring_world(self.handle) end
function Ring:steps() return C.halo_ring_steps(self.handle) end

--- Rank whose keys a rank computes with at a step (both from 0); nil when there are none.
function Ring:source(rank, step)
  local s = C.halo_ring_source(self.handle, rank, step)
  return s >= 0 and s or nil
end

--- The schedule's table as text.
function Ring:explain()
  local length = tonumber(C.halo_ring_explain(self.handle, nil, 0))
  local buffer = ffi.new("char[?]", length + 1)
  C.halo_ring_explain(self.handle, buffer, length + 1)
  return ffi.string(buffer)
end

Ring.__tostring = Ring.explain

return M
