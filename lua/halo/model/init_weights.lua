--- Weights of a new model.
--
--   normal { std = 0.02 }    every matrix normal(0, std), those whose result is added to the residual
--                            stream divided by sqrt(2 layers) (GPT-2, Radford et al. 2019, section 2.3)
--   fan_in { ... }           every matrix normal(0, 1/columns), so that each product keeps the size of
--                            what goes in, and the embedding normal(0, embedding^2)
--
-- Biases are 0 and norms 1. The first is for large models. A small one that must learn to look things
-- up within a million tokens needs the second: with std 0.02 and a width of 128 a layer adds almost
-- nothing to the stream, and attention starts too flat to be anything but an average.
--
-- Previous-token heads. To find what followed an earlier mention of a word, a model first needs a layer
-- that tells each token which tokens came before it (the lower half of an induction head: Olsson et al.,
-- arXiv 2209.11895). `fan_in { previous_token = c }` starts with such heads: query head a (from 0) of
-- layer 1 looks back by D = 1 + a mod 4 tokens. It takes nothing but biases:
--
--    A rotary pair turns (x_i, x_{i+R}) at position p by the angle p f_i (R = head_dim / 2, f_i the
--    inverse frequencies). As a complex number z that is z e^{i p f_i}. Give every key the same
--    component c, and every query c e^{-i D f_i}, by their biases:
--        bk_i = c            bk_{i+R} = 0
--        bq_i = c cos(D f_i) bq_{i+R} = -c sin(D f_i)
--    Rotated to positions s and t their product is c^2 cos((t - D - s) f_i), and the score of key s is
--        c^2 / sqrt(head_dim) * sum over i of cos((t - D - s) f_i)
--    which is largest where s = t - D, for every t: a constant that rotation turns into "D tokens ago".
--
-- Only pairs that turn within 256 tokens get it: slower ones cannot tell neighbours apart, and it is
-- those that position schemes stretch. With head_dim 32, theta 1e5 and c = 3 that is 6 pairs, a peak of
-- 9.5, and a softmax of 0.52 on t - D and 0.20 on each of its neighbours. All of it trains.
-- source  our own study: byte-level models of 0.6 to 2.4 M parameters, 7-digit needles; with these heads
--         the answers' loss falls at 0.4 to 0.8 M tokens, without them at 1.1 to 1.4 M or not at all
local ffi = require "ffi"
local halo_ffi = require "halo.ffi"
local nn = require "halo.nn"
local rope = require "halo.rope"
local tensor = require "halo.tensor"

local C, check = halo_ffi.C, halo_ffi.check

local M = {}

local OFFSETS = 4 -- heads look back 1 to 4 tokens
local SLOWEST = 256 -- wavelength in tokens of the slowest pair that takes part

--- What a config without `init` gets, and GPT-2's.
M.default = { type = "normal", std = 0.02 }

-- Standard deviation of a matrix.
local function std_of(init, config, p)
  if init.type == "normal" then return p.out and init.std / math.sqrt(2 * config.layers) or init.std end
  return p.kind == "embedding" and init.embedding or 1 / math.sqrt(p.shape[2])
end

-- How far query head `head` (from 1) of layer 1 looks back.
function M.offset_of(head) return (head - 1) % OFFSETS + 1 end

-- Biases of layer 1 that make its heads look back, by parameter name: arrays of numbers.
local function previous_token_biases(c, strength)
  local size, half = c.head_dim, c.head_dim / 2
  local frequency = rope.frequencies(c.rope, size, c.context)
  local q, k = {}, {}
  for i = 1, c.heads * size do q[i] = 0 end
  for i = 1, c.kv_heads * size do k[i] = 0 end
  for i = 1, half do
    if 2 * math.pi / frequency[i] <= SLOWEST then
      for head = 1, c.heads do
        local first, angle = (head - 1) * size, M.offset_of(head) * frequency[i]
        q[first + i], q[first + half + i] = strength * math.cos(angle), -strength * math.sin(angle)
      end
      for head = 1, c.kv_heads do k[(head - 1) * size + i] = strength end
    end
  end
  local prefix = "model.layers.0.self_attn."
  return { [prefix .. "q_proj.bias"] = q, [prefix .. "k_proj.bias"] = k }
end

local function write(t, values)
  local wide = tensor.from_pointer(ffi.new("double[?]", #values, values), { shape = { #values }, dtype = "f64",
    device = t.device })
  check(C.halo_tensor_copy(t, wide))
end

--- A parameter's maker: a function of one row of `decoder.parameter_list` that returns its tensor.
-- @tparam table c config; `c.init` says how (default `M.default`)
-- @tparam table o `seed`, `dtype`, `device`, and `values` (false: leave matrices at zero, they will be loaded)
function M.maker(c, o)
  local init = c.init or M.default
  local biases = {}
  if init.type == "fan_in" and init.previous_token > 0 and o.values ~= false then
    biases = previous_token_biases(c, init.previous_token)
  end
  return function(p)
    if p.kind == "norm" then return tensor.ones { shape = p.shape, dtype = o.dtype, device = o.device } end
    if p.kind == "bias" or o.values == false then
      local t = tensor.zeros { shape = p.shape, dtype = o.dtype, device = o.device }
      if biases[p.name] then write(t, biases[p.name]) end
      return t
    end
    return tensor.normal { shape = p.shape, dtype = o.dtype, device = o.device, seed = o.seed or 0,
      stream = nn.stream_of(p.name), std = std_of(init, c, p) }
  end
end

return M
