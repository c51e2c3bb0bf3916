--- Rotary position schemes: from a recipe's or a config's words to inverse frequencies.
--
-- A scheme gives, for a head size and a length, the inverse frequencies of the D/2 pairs and one
-- factor that multiplies cos and sin:
--
--    angle(p, i) = p * inv_freq[i]        cos(angle) * factor, sin(angle) * factor
--
-- Numbers follow what the models were trained with, Hugging Face Transformers
-- (modeling_rope_utils.py): powers, frequencies and angles are rounded to fp32 at the same points,
-- because at position 2000 one fp32 unit in a frequency is already 1e-4 in the angle.
--
-- | scheme      | source                                                              |
-- |-------------|---------------------------------------------------------------------|
-- | default     | Su et al., arXiv 2104.09864                                         |
-- | linear      | position interpolation, Chen et al., arXiv 2306.15595               |
-- | ntk         | base theta * factor^(D/(D-2)) ("NTK-aware", also Code Llama's idea) |
-- | dynamic_ntk | the same with the factor grown by the length at hand                |
-- | yarn        | Peng et al., arXiv 2309.00071, eq. 23 (ramp) and 22 (temperature)   |
-- | llama3      | Llama 3 report's frequency bands                                    |
-- | longrope    | Ding et al., arXiv 2402.13753, per-pair factors                     |
local ffi = require "ffi"
local args = require "halo.args"
local errors = require "halo.errors"

local M = {}

local function fail(format, ...) errors.raise("usage", "rope: " .. format:format(...), 3) end

local single = ffi.new "float[1]"
local function f32(x)
  single[0] = x
  return tonumber(single[0])
end

--- theta^(2i/D) for i = 0 .. D/2-1, in fp32 steps.
local function powers(theta, dim)
  local out = {}
  for i = 0, dim / 2 - 1 do
    out[i + 1] = f32(theta ^ f32(2 * i / dim))
  end
  return out
end

local function inverse(pow)
  local out = {}
  for i = 1, #pow do out[i] = f32(1 / pow[i]) end
  return out
end

--- The pair index at which a wave makes `rotations` turns over `original` tokens (YaRN, eq. 17-18).
local function correction_dim(rotations, dim, theta, original)
  return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))
end

--- YaRN's temperature: 0.1 ln(s) + 1 (arXiv 2309.00071, eq. 22 as its code has it).
local function mscale(factor, weight)
  if factor <= 1 then return 1 end
  return 0.1 * (weight or 1) * math.log(factor) + 1
end

local schemes = {}

function schemes.default(s, dim)
  return inverse(powers(s.theta, dim)), 1
end

function schemes.linear(s, dim)
  local inv = inverse(powers(s.theta, dim))
  for i = 1, #inv do inv[i] = f32(inv[i] / s.factor) end
  return inv, 1
end

function schemes.ntk(s, dim)
  return inverse(powers(s.theta * s.factor ^ (dim / (dim - 2)), dim)), 1
end

function schemes.dynamic_ntk(s, dim, length)
  local original = s.original
  length = math.max(length or original, original)
  local grown = s.factor * length / original - (s.factor - 1)
  return inverse(powers(s.theta * grown ^ (dim / (dim - 2)), dim)), 1
end

function schemes.yarn(s, dim)
  local fast, slow = s.beta_fast or 32, s.beta_slow or 1
  local low = correction_dim(fast, dim, s.theta, s.original)
  local high = correction_dim(slow, dim, s.theta, s.original)
  if s.truncate ~= false then low, high = math.floor(low), math.ceil(high) end
  low, high = math.max(low, 0), math.min(high, dim - 1)
  if low == high then high = high + 0.001 end
  local pow, inv = powers(s.theta, dim), {}
  for i = 1, #pow do
    local ramp = f32(math.min(math.max(f32((i - 1 - low) / (high - low)), 0), 1))
    local keep = f32(1 - ramp) -- share of the original frequency
    local interpolated, original = f32(1 / f32(s.factor * pow[i])), f32(1 / pow[i])
    inv[i] = f32(f32(interpolated * f32(1 - keep)) + f32(original * keep))
  end
  local factor = s.attention_factor
  if not factor then
    if s.mscale and s.mscale_all_dim then
      factor = mscale(s.factor, s.mscale) / mscale(s.factor, s.mscale_all_dim)
    else
      factor = mscale(s.factor)
    end
  end
  return inv, factor
end

function schemes.llama3(s, dim)
  local inv = inverse(powers(s.theta, dim))
  local long_wave = s.original / s.low_freq_factor
  local short_wave = s.original / s.high_freq_factor
  for i = 1, #inv do
    local wave = f32(2 * math.pi / inv[i])
    if wave > long_wave then
      inv[i] = f32(inv[i] / s.factor)
    elseif wave >= short_wave then
      local smooth = f32((s.original / wave - s.low_freq_factor)
        / (s.high_freq_factor - s.low_freq_factor))
      inv[i] = f32(f32((1 - smooth) * f32(inv[i] / s.factor)) + f32(smooth * inv[i]))
    end
  end
  return inv, 1
end

function schemes.longrope(s, dim, length)
  local factors = (length or 0) > s.original and s.long_factor or s.short_factor
  if #factors ~= dim / 2 then
    fail("longrope needs %d factors, got %d", dim / 2, #factors)
  end
  local pow, inv = powers(s.theta, dim), {}
  for i = 1, #pow do inv[i] = f32(1 / f32(factors[i] * pow[i])) end
  local factor = s.attention_factor
  if not factor then
    factor = s.factor > 1 and math.sqrt(1 + math.log(s.factor) / math.log(s.original)) or 1
  end
  return inv, factor
end

--- What each scheme needs beside theta.
local needs = {
  default = {},
  linear = { "factor" },
  ntk = { "factor" },
  dynamic_ntk = { "factor", "original" },
  yarn = { "factor", "original" },
  llama3 = { "factor", "original", "low_freq_factor", "high_freq_factor" },
  longrope = { "factor", "original", "short_factor", "long_factor" },
}

--- Names of all schemes, sorted.
function M.schemes() return args.keys(schemes) end

--- Inverse frequencies of a scheme.
-- @tparam table s `{ scheme=, theta=, factor=, original=, ... }`; scheme "default" if absent
-- @tparam int dim rotated part of the head size (even)
-- @tparam[opt] int length longest position in use plus one, for dynamic and longrope
-- @treturn {number,...} D/2 inverse frequencies, fp32 values
-- @treturn number factor on cos and sin
-- @raise on an unknown scheme or a missing number
-- @usage local inv, factor = rope.frequencies({ scheme = "yarn", theta = 1e6, factor = 4, original = 1024 }, 64)
function M.frequencies(s, dim, length)
  local name = s.scheme or "default"
  local fn = schemes[name]
  if not fn then
    fail('no scheme "%s"%s', tostring(name), args.did_you_mean(name, M.schemes()))
  end
  if dim < 2 or dim % 2 ~= 0 then
    fail("the rotated head size must be even, got %s", tostring(dim))
  end
  if type(s.theta) ~= "number" or s.theta <= 1 or s.theta ~= s.theta then
    fail("theta must be a number above 1, got %s", tostring(s.theta))
  end
  for _, field in ipairs(needs[name]) do
    if s[field] == nil then fail('scheme "%s" needs %s', name, field) end
  end
  return fn(s, dim, length)
end

--- A scheme from an HF config.json, in either spelling: `rope_parameters = {rope_type, rope_theta, ...}`
-- (Transformers 5) or `rope_theta` plus `rope_scaling = {rope_type | type, ...}` (4 and before).
function M.from_hf(config)
  local p = config.rope_parameters or config.rope_scaling or {}
  if type(p) ~= "table" then p = {} end
  local kind = p.rope_type or p.type or "default"
  kind = ({ su = "longrope", dynamic = "dynamic_ntk" })[kind] or kind
  local limit = config.max_position_embeddings
  local s = {
    scheme = kind,
    theta = p.rope_theta or config.rope_theta or 10000,
    factor = p.factor,
    original = p.original_max_position_embeddings or config.original_max_position_embeddings,
    attention_factor = p.attention_factor,
    beta_fast = p.beta_fast, beta_slow = p.beta_slow, truncate = p.truncate,
    mscale = p.mscale, mscale_all_dim = p.mscale_all_dim,
    low_freq_factor = p.low_freq_factor, high_freq_factor = p.high_freq_factor,
    short_factor = p.short_factor, long_factor = p.long_factor,
  }
  if s.scheme == "dynamic_ntk" or s.scheme == "yarn" then s.original = s.original or limit end
  if s.scheme == "longrope" then
    s.original = s.original or limit
    s.factor = s.factor or limit / s.original
  end
  return s
end

--- The reverse of `from_hf`, in the spelling that both Transformers 4 and 5 read.
-- Static NTK has no name there: it is the default scheme with a larger base.
function M.to_hf(s, dim)
  local scheme = s.scheme or "default"
  if scheme == "ntk" then
    return { rope_type = "default", rope_theta = s.theta * s.factor ^ (dim / (dim - 2)) }
  end
  return {
    rope_type = scheme == "dynamic_ntk" and "dynamic" or scheme, rope_theta = s.theta, factor = s.factor,
    original_max_position_embeddings = s.original, attention_factor = s.attention_factor,
    beta_fast = s.beta_fast, beta_slow = s.beta_slow, truncate = s.truncate,
    mscale = s.mscale, mscale_all_dim = s.mscale_all_dim,
    low_freq_factor = s.low_freq_factor, high_freq_factor = s.high_freq_factor,
    short_factor = s.short_factor, long_factor = s.long_factor,
  }
end

return M
