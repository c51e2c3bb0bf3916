--- Generation with a key/value cache, on one rank or over the ring.
--
-- The prompt runs through the model once, in the ring's layout and under any pattern; every rank keeps
-- the keys and values of its own tokens. From then on each new token is computed by all ranks alike;
-- its key and value go to one rank's cache in turn (token n to rank n mod W), each rank attends to what
-- it holds, and the partial results are merged in rank order, so that every rank sees the same bits and
-- draws the same next token.
--
--     prefill   rank 0: tokens 0..63, 128..191, ...    rank 1: 64..127, ...    (striped, W = 2)
--     decode    q on all ranks -> (o, lse) per rank -> merged o
local args = require "halo.args"
local attending = require "halo.attending"
local autograd = require "halo.autograd"
local decoder = require "halo.model.decoder"
local halo_ffi = require "halo.ffi"
local ops = require "halo.ops"
local memory = require "halo.memory"
local tensor = require "halo.tensor"

local ffi, C, check = halo_ffi.ffi, halo_ffi.C, halo_ffi.check

local M = {}

local NEVER = 2 ^ 31 - 1 -- a position that no query reaches: padding and unused cache rows

local Cache = {}
Cache.__index = Cache

-- One rank's cache: per layer k and v [1, capacity, Hk, D]; positions [capacity] i64.
local function new_cache(model, capacity)
  local c = model.config
  local self = setmetatable({ k = {}, v = {}, length = 0, capacity = capacity }, Cache)
  local o = { shape = { 1, capacity, c.kv_heads, c.head_dim }, dtype = model.dtype, device = model.device }
  for layer = 1, c.layers do
    self.k[layer], self.v[layer] = tensor.zeros(o), tensor.zeros(o)
  end
  self.positions = tensor.full { shape = { capacity }, dtype = "i64", device = model.device, value = NEVER }
  return self
end

--- Copy keys and values of `n` tokens of a layer behind what is there.
function Cache:put(layer, k, v, n)
  local function into(whole, part)
    local window = whole:slice { dim = 2, from = self.length + 1, to = self.length + n }
    check(C.halo_tensor_copy(window, part))
  end
  into(self.k[layer], k)
  into(self.v[layer], v)
end

function Cache:set_position(row, position)
  check(C.halo_tensor_set(self.positions, row, position))
end

-- The last token's hidden state [1,1,E], on every rank. It lives at one (rank, local index).
local function last_hidden(hidden, attend, n_tokens)
  local row = attend:local_row(n_tokens - 1)
  local width = hidden:size(3)
  local out
  if row then
    out = hidden:slice { dim = 2, from = row + 1, to = row + 1 }:contiguous()
  else
    out = tensor.zeros { shape = { 1, 1, width }, dtype = hidden.dtype, device = hidden.device }
  end
  if attend:is_spread() then attend.comm:all_reduce_tensor(out) end
  return out
end

-- Merge this rank's partial (o, lse) with the others', in rank order.
local function merge_over_ranks(attend, o, lse)
  if not attend:is_spread() then return o end
  local parts_o, parts_lse = attend.comm:all_gather_tensor(o), attend.comm:all_gather_tensor(lse)
  local sum_o, sum_lse = parts_o[1], parts_lse[1]
  for r = 2, #parts_o do
    check(C.halo_attention_merge(sum_o, sum_lse, parts_o[r], parts_lse[r]))
  end
  return sum_o
end

--- Pick a token from logits `[V]`: the best one, or a draw from the nucleus.
-- Ties go to the lower id; the draw is a function of (seed, position).
-- @source nucleus sampling: Holtzman et al., arXiv 1904.09751
function M.pick(logits, o)
  local n = logits.count
  local values = ffi.new("double[?]", n)
  local wide = logits:cast "f64"
  check(C.halo_tensor_read(wide, values))
  local best = 0
  for i = 1, n - 1 do
    if values[i] > values[best] then best = i end
  end
  local temperature = o.temperature or 0
  if temperature <= 0 then return best end
  local order, sum = {}, 0
  for i = 0, n - 1 do
    local p = math.exp((values[i] - values[best]) / temperature)
    values[i] = p
    sum = sum + p
    order[i + 1] = i
  end
  table.sort(order, function(a, b)
    if values[a] ~= values[b] then return values[a] > values[b] end
    return a < b
  end)
  local kept, mass = 0, 0
  repeat
    kept = kept + 1
    mass = mass + values[order[kept]] / sum
  until mass >= (o.top_p or 1) or kept == n
  local draw = C.halo_random_uniform(o.seed or 0, 0x67656e, o.position or 0) * mass
  for i = 1, kept do
    draw = draw - values[order[i]] / sum
    if draw < 0 then return order[i] end
  end
  return order[kept]
end

--- Continue a prompt.
-- @tparam table o named arguments
-- @tparam Model o.model
-- @tparam {int,...} o.ids prompt, token ids (at least one)
-- @tparam[opt=64] int o.tokens how many to generate
-- @tparam[opt=0] number o.temperature 0 is greedy
-- @tparam[opt=1] number o.top_p nucleus, share of probability
-- @tparam[opt=0] int o.seed of the draw
-- @tparam[opt] int|table o.stop id, or ids, that end generation (not returned)
-- @tparam[opt] Attending o.attending pattern and ring of the prompt (default: dense, one rank)
-- @tparam[opt] function o.on_token called with each new id
-- @treturn {int,...} the new ids
-- @usage local ids = generate.run { model = m, ids = tok:encode "The ring", tokens = 20 }
function M.run(o)
  o = args.named("generate.run", o, {
    model = "table", ids = "table", tokens = { "int", 64 }, temperature = { "number", 0 },
    top_p = { "number", 1 }, seed = { "int", 0 }, stop = "any?", attending = "table?",
    on_token = "function?", rope_length = "int?",
  })
  local model, n = o.model, #o.ids
  if n == 0 then error("generate: the prompt has no tokens; give at least one (a begin-of-text id)", 2) end
  local stop = {}
  if type(o.stop) == "table" then
    for _, id in ipairs(o.stop) do stop[id] = true end
  elseif o.stop then
    stop[o.stop] = true
  end
  local attend = o.attending or attending.dense(model.config, nil, model.device)
  return autograd.no_grad(function()
    local out = {}
    attend:set_context(n, 1)
    local length = n + o.tokens
    local cache = new_cache(model, attend:local_tokens() + o.tokens)
    local ids, positions = attend:cut(o.ids, model.device)
    local run = { mlp_chunk = decoder.mlp_chunk[model.device] }
    run.cos, run.sin = model:positions(positions, o.rope_length or length)
    local here = attend:local_tokens()
    function run.attend(layer, q, k, v)
      cache:put(layer, k, v, here)
      return attend:attend(layer, q, k, v)
    end
    local logits
    memory.scope(function()
      local hidden = last_hidden(model:hidden(ids, run), attend, n)
      logits = memory.keep(ops.linear(hidden, model:head(), nil):reshape { model.config.vocab })
    end)
    for row = 0, here - 1 do
      local position = attend:global_of(row)
      cache:set_position(row, position < n and position or NEVER)
    end
    cache.length = here
    for step = 1, o.tokens do
      local id = M.pick(logits, { temperature = o.temperature, top_p = o.top_p, seed = o.seed, position = n + step })
      if stop[id] then break end
      out[#out + 1] = id
      if o.on_token then o.on_token(id) end
      if step == o.tokens then break end
      local position = n + step - 1
      local mine = attend:keeps_new(step)
      memory.scope(function()
        local one = tensor.from_table({ { id } }, { dtype = "i32", device = model.device })
        local where = tensor.from_table({ { position } }, { dtype = "i32", device = model.device })
        local q_position = tensor.from_table({ position }, { dtype = "i64", device = model.device })
        local decode = {}
        decode.cos, decode.sin = model:positions(where, o.rope_length or length)
        if mine then cache:set_position(cache.length, position) end
        function decode.attend(layer, q, k, v)
          if mine then cache:put(layer, k, v, 1) end
          local out_o, out_lse = ffi.new "halo_tensor *[1]", ffi.new "halo_tensor *[1]"
          check(C.halo_attention_cached(out_o, out_lse, q, cache.k[layer], cache.v[layer],
            cache.length + (mine and 1 or 0), cache.positions, q_position, attend.scale))
          return merge_over_ranks(attend, tensor.own(out_o[0]), tensor.own(out_lse[0]))
        end
        local hidden = model:hidden(one, decode)
        local next_logits = ops.linear(hidden, model:head(), nil):reshape { model.config.vocab }
        check(C.halo_tensor_copy(logits, next_logits))
      end)
      if mine then cache.length = cache.length + 1 end
    end
    return out
  end)
end

return M
