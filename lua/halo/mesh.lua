--- The mesh: ranks named by what they share.
--
--    world rank = (data * outer + o) * inner + i
--
-- Ranks of one ring (outer x inner) share a sequence; ranks of one data group hold the same part of
-- different sequences.
local args = require "halo.args"
local comm = require "halo.comm"
local halo_ffi = require "halo.ffi"

local ffi, C, check = halo_ffi.ffi, halo_ffi.C, halo_ffi.check

local M = {}

local axes = { data = C.HALO_AXIS_DATA, outer = C.HALO_AXIS_OUTER, inner = C.HALO_AXIS_INNER }

local Mesh = {}
Mesh.__index = Mesh

--- Make one; all ranks of `world` do so together.
-- @tparam table o named arguments
-- @tparam Comm o.world all ranks
-- @tparam[opt=1] int o.data rings side by side
-- @tparam[opt=1] int o.outer nodes of a ring
-- @tparam[opt] int o.inner ranks of a node (default: all that remain)
-- @usage local m = mesh.new { world = comm.world(), data = 2 }; local r = ring.new { comm = m.ring }
function M.new(o)
  o = args.named("mesh.new", o, { world = "table", data = { "int", 1 }, outer = { "int", 1 }, inner = "int?" })
  local inner = o.inner or math.max(1, math.floor(o.world:size() / math.max(1, o.data * o.outer)))
  local slot = ffi.new "halo_mesh *[1]"
  check(C.halo_mesh_new(slot, o.world.handle, o.data, o.outer, inner), 2)
  return setmetatable({ handle = slot[0], ring = comm.borrow(C.halo_mesh_ring(slot[0])),
    data = comm.borrow(C.halo_mesh_data(slot[0])) }, Mesh)
end

--- Ranks along "data", "outer" or "inner".
function Mesh:size(axis) return C.halo_mesh_size(self.handle, axes[axis] or -1) end
--- This rank's place along an axis, from 0.
function Mesh:place(axis) return C.halo_mesh_place(self.handle, axes[axis] or -1) end

--- Give the groups back; all ranks do so together.
function Mesh:close()
  if not self.handle then return end
  self.ring:close()
  self.data:close()
  C.halo_mesh_free(self.handle)
  self.handle = nil
end

Mesh.__tostring = function(self)
  if not self.handle then return "mesh (closed)" end
  return ("mesh: data %d/%d, outer %d/%d, inner %d/%d"):format(self:place "data", self:size "data", self:place "outer",
    self:size "outer", self:place "inner", self:size "inner")
end

return M
