--- Attention under a plan over a ring.
--
--    o_i = sum_j exp(s_ij - l_i) v_j     s_ij = scale * q_i . k_j, over the keys j that query i sees
--
-- `q` is `[B,T,H,D]`, `k` and `v` are `[B,T,Hk,D]` with Hk dividing H; T counts the tokens of the
-- ranks here, stacked in rank order. Which keys a query sees is the plan's affair, where they are the
-- ring's. Recorded on the tape.
local args = require "halo.args"
local halo_ffi = require "halo.ffi"
local tensor = require "halo.tensor"

local ffi, C, check = halo_ffi.ffi, halo_ffi.C, halo_ffi.check

local M = {}

local function handle_of(o) return type(o) == "table" and o.handle or o end

--- Attention, forward; backward follows from the tape.
-- @tparam table o named arguments
-- @tparam Tensor o.q
-- @tparam Tensor o.k
-- @tparam Tensor o.v
-- @tparam Plan o.plan finished, for these batches and heads
-- @tparam Ring o.ring
-- @tparam[opt] number o.scale default 1/sqrt(D)
-- @treturn Tensor `[B,T,H,D]`
-- @treturn Tensor log of the sum of exponentials, `[B,H,T]`, fp32 (fp64 for f64); -inf where a query sees no
--   key. A constant: no gradient flows through it.
function M.attend(o)
  o = args.named("attention.attend", o, { q = "cdata", k = "cdata", v = "cdata", plan = "any", ring = "any",
    scale = "number?" })
  local out, lse = ffi.new "halo_tensor *[1]", ffi.new "halo_tensor *[1]"
  local scale = o.scale or 1 / math.sqrt(o.q:size(-1))
  halo_ffi.call_at(2, C.halo_attention, out, lse, o.q, o.k, o.v, handle_of(o.plan), handle_of(o.ring), scale)
  return tensor.own(out[0]), tensor.own(lse[0])
end

--- Merge a partial result over other keys into (o, lse), in place.
function M.merge(o, lse, o_part, lse_part) check(C.halo_attention_merge(o, lse, o_part, lse_part)) end

--- Queries against the first `length` keys of a cache, outside the tape; partial over the keys here.
-- @tparam table o named arguments
-- @tparam Tensor o.q `[B,Tq,H,D]`
-- @tparam Tensor o.k `[B,capacity,Hk,D]`
-- @tparam Tensor o.v like k
-- @tparam int o.length keys that count
-- @tparam Tensor o.key_positions global positions, i64 `[capacity]`
-- @tparam Tensor o.query_positions global positions, i64 `[Tq]`
-- @tparam[opt] number o.scale default 1/sqrt(D)
-- @treturn Tensor `[B,Tq,H,D]`
-- @treturn Tensor lse `[B,H,Tq]`
function M.cached(o)
  o = args.named("attention.cached", o, { q = "cdata", k = "cdata", v = "cdata", length = "int",
    key_positions = "cdata", query_positions = "cdata", scale = "number?" })
  local out, lse = ffi.new "halo_tensor *[1]", ffi.new "halo_tensor *[1]"
  local scale = o.scale or 1 / math.sqrt(o.q:size(-1))
  halo_ffi.call_at(2, C.halo_attention_cached, out, lse, o.q, o.k, o.v, o.length, o.key_positions,
    o.query_positions, scale)
  return tensor.own(out[0]), tensor.own(lse[0])
end

return M
