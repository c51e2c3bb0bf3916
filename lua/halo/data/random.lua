--- Chance for generators: a counter-based stream per sample.
-- Values depend on (seed, stream) and on how many were drawn, on nothing else: the same sample is made
-- on every rank, at every world size, in every order.
local errors = require "halo.errors"
local halo_ffi = require "halo.ffi"

local C = halo_ffi.C

local M = {}

local Random = {}
Random.__index = Random

--- A seed of its own for a purpose: 64 bits as cdata.
-- @tparam number|cdata seed
-- @tparam string purpose
function M.derive(seed, purpose) return C.halo_hash_bytes(purpose, #purpose, seed) end

--- A stream. @tparam number|cdata seed @tparam[opt=0] int stream
function M.new(seed, stream) return setmetatable({ seed = seed, stream = stream or 0, drawn = 0 }, Random) end

--- A number in [0, 1).
function Random:uniform()
  local value = C.halo_random_uniform(self.seed, self.stream, self.drawn)
  self.drawn = self.drawn + 1
  return value
end

--- A whole number from `low` to `high`, both included; the span at most 2^53.
function Random:int(low, high)
  if high < low then errors.raise("internal", ("random:int: from %g to %g"):format(low, high), 2) end
  return low + math.floor(self:uniform() * (high - low + 1))
end

--- An element of a list.
function Random:choice(list) return list[self:int(1, #list)] end

--- n different elements of a list, in random order. The list is not changed.
function Random:sample(list, n)
  local copy = {}
  for i, v in ipairs(list) do copy[i] = v end
  for i = 1, n do
    local j = self:int(i, #copy)
    copy[i], copy[j] = copy[j], copy[i]
  end
  for i = #copy, n + 1, -1 do copy[i] = nil end
  return copy
end

return M
