--- Layouts: which rank holds which token (core/layout.c draws the three kinds).
--
--    local l = layout.new { kind = "striped", tokens = 1000, world = 4, block = 64 }
--    print(l:locate(777))         -- rank and index there, both from 0, as all positions
--
-- Sequences that do not fill every block are padded at the global end: tokens >= N.
local args = require "halo.args"
local errors = require "halo.errors"
local ffi = require "ffi"
local halo_ffi = require "halo.ffi"

local C = halo_ffi.C

local Layout = {}
Layout.__index = Layout

local M = {}

local kinds = {
  contiguous = C.HALO_LAYOUT_CONTIGUOUS, zigzag = C.HALO_LAYOUT_ZIGZAG, striped = C.HALO_LAYOUT_STRIPED,
}
local kind_names = {}
for name, number in pairs(kinds) do kind_names[tonumber(number)] = name end

--- Make a layout.
-- @tparam table o named arguments
-- @tparam int o.tokens length of the sequence, N
-- @tparam[opt=1] int o.world ranks, W
-- @tparam[opt=64] int o.block tokens of a block, G
-- @tparam[opt="striped"] string o.kind "contiguous", "zigzag" or "striped"
-- @treturn Layout
-- @usage local l = layout.new { tokens = 32768, world = 8 }
function M.new(o)
  o = args.named("layout.new", o, { kind = { "string", "striped" }, tokens = "int", world = { "int", 1 },
    block = { "int", 64 } })
  local kind = kinds[o.kind]
  if not kind then
    errors.raise("usage", ('layout.new: no kind "%s"%s'):format(o.kind, args.did_you_mean(o.kind, args.keys(kinds))), 2)
  end
  local slot = ffi.new "halo_layout *[1]"
  halo_ffi.call_at(2, C.halo_layout_new, slot, kind, o.tokens, o.world, o.block)
  return setmetatable({ handle = ffi.gc(slot[0], C.halo_layout_free) }, Layout)
end

--- True for layouts.
function M.is(v) return getmetatable(v) == Layout end

--- "contiguous", "zigzag" or "striped".
function Layout:kind() return kind_names[C.halo_layout_kind_of(self.handle)] end
--- N, without padding.
function Layout:tokens() return tonumber(C.halo_layout_tokens(self.handle)) end
--- Tokens of all ranks together, padding included.
function Layout:padded_tokens() return tonumber(C.halo_layout_padded_tokens(self.handle)) end
--- Tokens of one rank, padding included; the same on every rank.
function Layout:local_tokens() return tonumber(C.halo_layout_local_tokens(self.handle)) end
--- Tokens of a block, G.
function Layout:block() return tonumber(C.halo_layout_block(self.handle)) end
--- Ranks, W.
function Layout:world() return C.halo_layout_world(self.handle) end
--- Blocks that hold a token.
function Layout:blocks() return math.ceil(self:tokens() / self:block()) end

--- Global token of a rank's local index, both from 0; >= `tokens()` for padding.
function Layout:global(rank, index)
  local token = tonumber(C.halo_layout_global(self.handle, rank, index))
  if token < 0 then
    errors.raise("usage", ("layout:global: no rank %s, index %s in %s"):format(tostring(rank), tostring(index),
      tostring(self)), 2)
  end
  return token
end

local rank_slot, index_slot = ffi.new "int32_t[1]", ffi.new "int64_t[1]"

--- Rank that holds a global token, and its local index there.
function Layout:locate(token)
  halo_ffi.call_at(2, C.halo_layout_locate, self.handle, token, rank_slot, index_slot)
  return rank_slot[0], tonumber(index_slot[0])
end

--- Global tokens of a rank in local order: `int64_t` memory of `local_tokens()` entries.
function Layout:map(rank)
  local map = ffi.new("int64_t[?]", self:local_tokens())
  halo_ffi.call_at(2, C.halo_layout_map, self.handle, rank, map)
  return map
end

function Layout.__eq(a, b)
  return a:kind() == b:kind() and a:tokens() == b:tokens() and a:world() == b:world() and a:block() == b:block()
end

function Layout:__tostring()
  local padding = self:padded_tokens() - self:tokens()
  return ("layout %s: %d tokens in blocks of %d over %d rank%s, %d each%s"):format(self:kind(), self:tokens(),
    self:block(), self:world(), self:world() == 1 and "" or "s", self:local_tokens(),
    padding > 0 and (" (%d padding)"):format(padding) or "")
end

return M
