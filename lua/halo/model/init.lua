--- Models: from sizes, from a Hugging Face folder, and back to one.
--
-- A config is a plain table:
--    family, layers, width, heads, kv_heads, head_dim, ffn, vocab, context, eps, tie, rope, init, qkv_bias,
--    qk_norm
-- A family file (this folder) holds what differs between families; adding one is adding a file.
local args = require "halo.args"
local decoder = require "halo.model.decoder"
local errors = require "halo.errors"
local fs = require "halo.fs"
local json = require "halo.json"
local rope = require "halo.rope"

local M = { decoder = decoder }

local here = debug.getinfo(1, "S").source:sub(2):gsub("[^/]*$", "")

local function fail(class, ...) errors.raise(class, "model: " .. string.format(...), 3) end

--- Names of the families, from the files of this folder.
function M.families()
  local names = {}
  for _, file in ipairs(fs.list(here)) do
    local name = file:match "^([%w_]+)%.lua$"
    if name and name ~= "init" and require("halo.model." .. name).architecture then names[#names + 1] = name end
  end
  table.sort(names)
  return names
end

function M.family(name)
  for _, known in ipairs(M.families()) do
    if known == name then return require("halo.model." .. name) end
  end
  fail("usage", 'no family "%s"%s', tostring(name), args.did_you_mean(name, M.families()))
end

--- A config from a recipe's sizes; what is left out follows the family.
-- @tparam table s family, layers, width, heads, vocab and optionally kv_heads (heads), head_dim
--   (width/heads), ffn (8/3 width rounded up to 32), context, rope_theta, rope, eps, tie, init (see
--   model/init_weights.lua)
function M.config(s)
  local family = M.family(s.family)
  local d = family.defaults
  local function pick(a, b) if a ~= nil then return a end return b end
  local c = {
    family = family.name, qkv_bias = family.qkv_bias, qk_norm = family.qk_norm,
    layers = s.layers, width = s.width, heads = s.heads, kv_heads = s.kv_heads or s.heads,
    head_dim = s.head_dim or (s.width and s.heads and s.width / s.heads),
    ffn = s.ffn or (s.width and math.ceil(s.width * 8 / 3 / 32) * 32),
    vocab = s.vocab, context = s.context or 32768,
    eps = s.eps or d.eps, tie = pick(s.tie, d.tie), init = s.init,
  }
  c.rope = {}
  for k, v in pairs(s.rope or {}) do c.rope[k] = v end
  c.rope.theta = c.rope.theta or s.rope_theta or d.rope_theta
  return decoder.check(c)
end

--- A fresh model.
-- @tparam table config from `config` or `read_config`
-- @tparam[opt] table o `{ seed=, dtype=, device= }`
function M.build(config, o) return decoder.build(config, o) end

--- The config of an HF folder.
-- @raise `data` when the file is missing or says something that this engine does not do
function M.read_config(dir)
  local path = dir .. "/config.json"
  local text = fs.read(path)
  if not text then fail("data", "%s cannot be read; is %s a Hugging Face model folder?", path, dir) end
  local h = json.decode(text, { what = path })
  local family
  for _, name in ipairs(M.families()) do
    if name == h.model_type then family = M.family(name) end
  end
  if not family then
    fail("data", "%s: model_type %s is not one of %s", path, tostring(h.model_type),
      table.concat(M.families(), ", "))
  end
  if h.hidden_act ~= nil and h.hidden_act ~= "silu" then
    fail("data", "%s: hidden_act %s; only silu is offered", path, tostring(h.hidden_act))
  end
  if h.use_sliding_window == true then
    fail("data", "%s: use_sliding_window is on; use a window pattern in the recipe instead", path)
  end
  if h.mlp_bias == true or (h.attention_bias == true and not family.qkv_bias) then
    fail("data", "%s: biases on %s are not part of %s here", path,
      h.mlp_bias and "the MLP" or "attention", family.name)
  end
  local c = {
    family = family.name, qkv_bias = family.qkv_bias, qk_norm = family.qk_norm,
    layers = h.num_hidden_layers, width = h.hidden_size, heads = h.num_attention_heads,
    kv_heads = h.num_key_value_heads or h.num_attention_heads,
    head_dim = h.head_dim or (h.hidden_size and h.num_attention_heads
      and h.hidden_size / h.num_attention_heads),
    ffn = h.intermediate_size, vocab = h.vocab_size, context = h.max_position_embeddings,
    eps = h.rms_norm_eps, tie = h.tie_word_embeddings == true,
    init = h.initializer_range and { type = "normal", std = h.initializer_range },
    rope = rope.from_hf(h), hf = h,
  }
  return decoder.check(c)
end

--- config.json text for a config; fields that came from an HF folder and that we do not know are kept.
function M.hf_config(c)
  local family = M.family(c.family)
  local h = {}
  for k, v in pairs(c.hf or {}) do h[k] = v end
  h.architectures = json.array { family.architecture }
  h.model_type = family.name
  h.num_hidden_layers, h.hidden_size = c.layers, c.width
  h.num_attention_heads, h.num_key_value_heads = c.heads, c.kv_heads
  h.head_dim, h.intermediate_size, h.vocab_size = c.head_dim, c.ffn, c.vocab
  h.max_position_embeddings, h.rms_norm_eps = c.context, c.eps
  h.tie_word_embeddings, h.hidden_act = c.tie, "silu"
  h.initializer_range = c.init and c.init.std or h.initializer_range or 0.02
  h.attention_bias = family.name ~= "qwen2" and false or nil
  -- Both spellings, so that Transformers 4 and 5 read the same model.
  local r = rope.to_hf(c.rope, c.head_dim)
  h.rope_parameters = r
  h.rope_theta = r.rope_theta
  h.rope_scaling = nil
  if r.rope_type ~= "default" then
    h.rope_scaling = {}
    for k, v in pairs(r) do if k ~= "rope_theta" then h.rope_scaling[k] = v end end
  end
  return json.encode(h, { pretty = true }) .. "\n"
end

--- Load weights from an HF folder or a single safetensors file into a model; every name and shape is
-- compared before the first byte is copied.
function M.load_weights(model, path)
  local file = require("halo.safetensors").open(path)
  local wanted = {}
  for _, p in ipairs(model.parameters) do
    wanted[p.name] = true
    local info = file:info(p.name)
    if not info then fail("data", "%s has no tensor %s", path, p.name) end
    local shape = p.tensor.shape
    local same = #info.shape == #shape
    for i = 1, #shape do same = same and info.shape[i] == shape[i] end
    if not same then
      fail("data", "%s: %s has shape [%s], the config wants [%s]", path, p.name,
        table.concat(info.shape, ","), table.concat(shape, ","))
    end
  end
  for _, name in ipairs(file:names()) do
    local tied = name == "lm_head.weight" and model.config.tie
    if not wanted[name] and not tied and not name:match "rotary_emb%.inv_freq$" then
      fail("data", "%s: tensor %s is not part of a %s", path, name, model.config.family)
    end
  end
  for _, p in ipairs(model.parameters) do file:read(p.name, { into = p.tensor }) end
  file:close()
  return model
end

--- A model from an HF folder. Weights go straight to the device, one tensor at a time.
-- @tparam string dir
-- @tparam[opt] table o `{ dtype=, device=, rope= }`
-- @usage local m = require("halo.model").from_hf("models/Qwen2.5-0.5B", { dtype = "bf16", device = "cuda" })
function M.from_hf(dir, o)
  o = o or {}
  local config = M.read_config(dir)
  if o.rope then
    local theta = config.rope.theta
    config.rope = o.rope
    config.rope.theta = config.rope.theta or theta
  end
  local model = decoder.build(config, { dtype = o.dtype, device = o.device, values = false })
  return M.load_weights(model, dir)
end

--- Write a folder that Transformers loads as it is.
-- @tparam[opt] table o `{ dtype = "f32"|"bf16", max_shard_bytes =, files = {name = text} }`
function M.save_hf(model, dir, o)
  o = o or {}
  fs.mkdir(dir)
  local tensors = {}
  for _, p in ipairs(model.parameters) do tensors[p.name] = p.tensor end
  require("halo.safetensors").save(dir, tensors, {
    dtype = o.dtype, max_shard_bytes = o.max_shard_bytes, metadata = { format = "pt" },
  })
  fs.write(dir .. "/config.json", M.hf_config(model.config))
  for name, text in pairs(o.files or {}) do fs.write(dir .. "/" .. name, text) end
end

return M
