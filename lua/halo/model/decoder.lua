--- The decoder that Qwen2, Llama 3 and Qwen3 share: a pre-norm transformer with grouped-query
-- attention, rotary positions and a gated MLP. A family file (qwen2.lua, ...) says which of the few
-- switches it sets and how its config.json spells the sizes; weight names are those of Hugging Face.
--
--    x = embed(ids)
--    per layer:  x += o(attend(rope(q(norm x)), rope(k(norm x)), v(norm x)))
--                x += down(swiglu(gate(norm x), up(norm x)))
--    logits = head(norm x)
--
-- q, k and v are one product, and so are gate and up: rows of `parameter_list` that share a `pack` are
-- made as rows of one tensor. The parameters are views of it, with the names of Hugging Face; `ops.cat`
-- of them is the packed tensor again, without a copy (`gated_mlp` looks itself), and so are their
-- gradients in the optimizer's buffer, since packed rows are neighbours in the list.
--
-- The model does not know what attention is: `run.attend(layer, q, k, v)` is given by whoever owns the
-- ring and the pattern (halo.attending), so the same file trains dense on one rank and sparse over a
-- ring. Nothing larger than the hidden state outlives a layer: the MLP runs in chunks of tokens, the
-- loss in chunks of rows, and with `recompute` each layer keeps its input only.
local autograd = require "halo.autograd"
local errors = require "halo.errors"
local halo_ffi = require "halo.ffi"
local init_weights = require "halo.model.init_weights"
local memory = require "halo.memory"
local ops = require "halo.ops"
local rope = require "halo.rope"
local tensor = require "halo.tensor"

local ffi = halo_ffi.ffi

local Model = {}
Model.__index = Model

local M = {}

--- Rows of the MLP at hand at once, by device: the least that costs no speed. A chunk adds to every weight
-- gradient once, so a GPU wants some thousand rows (core/nn_mlp.c).
M.mlp_chunk = { cpu = 4096, cuda = 16384 }

local function fail(...) errors.raise("usage", "model: " .. string.format(...), 3) end

--- Sizes that every family needs, checked where a wrong one would otherwise show up as a shape error
-- deep inside a layer.
function M.check(c)
  for _, name in ipairs { "layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab" } do
    local v = c[name]
    if type(v) ~= "number" or v < 1 or v % 1 ~= 0 or v > 2 ^ 31 then
      fail("%s must be a positive whole number, got %s", name, tostring(v))
    end
  end
  if c.heads % c.kv_heads ~= 0 then
    fail("heads (%d) must be a multiple of kv_heads (%d)", c.heads, c.kv_heads)
  end
  if c.head_dim % 2 ~= 0 then fail("head_dim must be even for rotary positions, got %d", c.head_dim) end
  if c.init and (c.init.previous_token or 0) > 0 and not c.qkv_bias then
    fail("init: previous_token lives in the biases of q and k, which %s does not have", c.family)
  end
  if not (c.eps > 0 and c.eps < 1) then fail("eps must be in (0,1), got %s", tostring(c.eps)) end
  return c
end

--- Names, shapes and kinds of all parameters, in the order in which they are made and saved.
-- kind: "embedding", "linear", "bias" or "norm"; `out` marks products whose result is added to the
-- residual stream; rows with the same `pack` follow each other and are views of one tensor.
function M.parameter_list(c)
  local list = {}
  local function add(name, shape, kind, o)
    local row = { name = name, shape = shape, kind = kind }
    for k, v in pairs(o or {}) do row[k] = v end
    list[#list + 1] = row
  end
  local q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
  add("model.embed_tokens.weight", { c.vocab, c.width }, "embedding")
  for layer = 0, c.layers - 1 do
    local p = ("model.layers.%d."):format(layer)
    add(p .. "input_layernorm.weight", { c.width }, "norm")
    local heads = { { "q", q }, { "k", kv }, { "v", kv } }
    for _, row in ipairs(heads) do
      add(p .. "self_attn." .. row[1] .. "_proj.weight", { row[2], c.width }, "linear", { pack = p .. "qkv.weight" })
    end
    for _, row in ipairs(c.qkv_bias and heads or {}) do
      add(p .. "self_attn." .. row[1] .. "_proj.bias", { row[2] }, "bias", { pack = p .. "qkv.bias" })
    end
    if c.qk_norm then
      add(p .. "self_attn.q_norm.weight", { c.head_dim }, "norm")
      add(p .. "self_attn.k_norm.weight", { c.head_dim }, "norm")
    end
    add(p .. "self_attn.o_proj.weight", { c.width, q }, "linear", { out = true })
    add(p .. "post_attention_layernorm.weight", { c.width }, "norm")
    add(p .. "mlp.gate_proj.weight", { c.ffn, c.width }, "linear", { pack = p .. "gate_up.weight" })
    add(p .. "mlp.up_proj.weight", { c.ffn, c.width }, "linear", { pack = p .. "gate_up.weight" })
    add(p .. "mlp.down_proj.weight", { c.width, c.ffn }, "linear", { out = true })
  end
  add("model.norm.weight", { c.width }, "norm")
  if not c.tie then add("lm_head.weight", { c.vocab, c.width }, "linear") end
  return list
end

--- Number of parameters of a config.
function M.count(c)
  local n = 0
  for _, p in ipairs(M.parameter_list(c)) do n = n + p.shape[1] * (p.shape[2] or 1) end
  return n
end

-- The tensors that packed rows share: pack name -> { take = function(self, t) -> the next rows, with the
-- values of t, which is freed }.
function M.packs(list)
  local packs = {}
  for _, p in ipairs(list) do
    if p.pack then
      local pack = packs[p.pack] or { rows = 0, filled = 0 }
      pack.rows = pack.rows + p.shape[1]
      packs[p.pack] = pack
    end
  end
  local function take(self, t)
    local shape, n = t.shape, t:size(1)
    shape[1] = self.rows
    self.tensor = self.tensor or tensor.zeros { shape = shape, dtype = t.dtype, device = t.device }
    local part = self.tensor:slice { dim = 1, from = self.filled + 1, to = self.filled + n }
    part:copy_from(t)
    t:free()
    self.filled = self.filled + n
    if self.filled == self.rows then self.tensor = nil end -- the parts hold the memory
    return part
  end
  for _, pack in pairs(packs) do pack.take = take end
  return packs
end

--- Build a model with fresh weights (model/init_weights.lua).
-- @tparam table c config (see `halo.model`)
-- @tparam[opt] table o `{ seed = 0, dtype = "f32", device = "cpu", values = true }`; values = false leaves
-- weights unset
function M.build(c, o)
  o = o or {}
  M.check(c)
  local self = setmetatable({ config = c, parameters = {}, weight = {}, dtype = o.dtype or "f32",
    device = o.device or "cpu" }, Model)
  local make = init_weights.maker(c, { seed = o.seed, dtype = self.dtype, device = self.device, values = o.values })
  local list = M.parameter_list(c)
  local packs = M.packs(list)
  for _, p in ipairs(list) do
    local t = make(p)
    if p.pack then t = packs[p.pack]:take(t) end
    t:require_grad(true)
    self.parameters[#self.parameters + 1] = { name = p.name, tensor = t, kind = p.kind }
    self.weight[p.name] = t
  end
  self:set_rope(c.rope)
  return self
end

--- Change the position scheme; takes effect with the next batch. (A stage of a recipe does this.)
function Model:set_rope(scheme)
  rope.frequencies(scheme, self.config.head_dim, self.config.context)
  self.config.rope = scheme
end

--- cos and sin for a batch's positions, made once and used by every layer.
-- @tparam Tensor positions i32 `[B,T]`, global; on any device
-- @tparam[opt] int length longest position plus one, for schemes that depend on it
function Model:positions(positions, length)
  local inv, factor = rope.frequencies(self.config.rope, self.config.head_dim, length)
  local dtype = self.dtype == "f64" and "f64" or "f32"
  local frequencies = tensor.from_table(inv, { dtype = "f32", device = self.device })
  local cos, sin = ops.rope_table(positions:to(self.device), frequencies, { scale = factor })
  if dtype == "f64" then cos, sin = cos:cast "f64", sin:cast "f64" end
  return cos, sin
end

-- Packed weight of several parameters of a layer, "<prefix><name>_proj.<kind>".
local function packed(self, prefix, names, kind)
  local list = { dim = 1 }
  for i, name in ipairs(names) do list[i] = self.weight[prefix .. name .. "_proj." .. kind] end
  return list[1] and ops.cat(list) or nil
end

local function attention_block(self, layer, x, run)
  local c, w = self.config, self.weight
  local p = ("model.layers.%d."):format(layer - 1)
  local a = p .. "self_attn."
  local batch, tokens = x:size(1), x:size(2)
  local h = ops.rmsnorm(x, w[p .. "input_layernorm.weight"], { eps = c.eps })
  local qkv = ops.linear(h, packed(self, a, { "q", "k", "v" }, "weight"), packed(self, a, { "q", "k", "v" }, "bias"))
  local q, k, v = ops.split_qkv(qkv, { heads = c.heads, kv_heads = c.kv_heads })
  if c.qk_norm then
    q = ops.rmsnorm(q, w[a .. "q_norm.weight"], { eps = c.eps })
    k = ops.rmsnorm(k, w[a .. "k_norm.weight"], { eps = c.eps })
  end
  q, k = ops.rope(q, run.cos, run.sin), ops.rope(k, run.cos, run.sin)
  local o = run.attend(layer, q, k, v)
  o = o:reshape { batch, tokens, c.heads * c.head_dim }
  return ops.linear(o, w[a .. "o_proj.weight"], nil, x)
end

-- The MLP's inner activations are ffn/width times the hidden state: one op makes them for a chunk of tokens
-- at a time (DESIGN D5). Where the layer is run again for backward its own last result is not needed, so
-- that call is dry.
local function mlp_block(self, layer, x, run, is_again)
  local p, w = ("model.layers.%d."):format(layer - 1), self.weight
  local h = ops.rmsnorm(x, w[p .. "post_attention_layernorm.weight"], { eps = self.config.eps })
  return ops.gated_mlp(h, w[p .. "mlp.gate_proj.weight"], w[p .. "mlp.up_proj.weight"],
    w[p .. "mlp.down_proj.weight"], x, { chunk = run.mlp_chunk or 0, dry = is_again,
      save = not run.recompute })
end

--- One layer, from hidden state to hidden state.
-- @tparam[opt] boolean is_again only the tape of the result is wanted: no data in it
function Model:layer(layer, x, run, is_again)
  local between = memory.scope(attention_block, self, layer, x, run) -- q, k, v and their like end here
  return mlp_block(self, layer, between, run, is_again or false)
end

--- Final hidden states `[B,T,E]` (after the last norm).
-- @tparam Tensor ids i32 `[B,T]`
-- @tparam table run `cos`, `sin` (from `positions`), `attend(layer, q, k, v) -> o`,
--   `recompute` (run each layer again in backward), `offload` (its input waits in host memory meanwhile),
--   `mlp_chunk` (rows of the MLP at hand, 0 = all; without `recompute` its inner activations of all rows are
--   kept for backward),
--   `each_layer(layer, x)` (called with every layer's output; for probes)
function Model:hidden(ids, run)
  local x = ops.embedding(self.weight["model.embed_tokens.weight"], ids)
  for layer = 1, self.config.layers do
    local before = x
    if run.recompute and autograd.is_enabled() then
      local checkpoint = run.offload and autograd.checkpoint_offloaded or autograd.checkpoint
      x = checkpoint(function(y) return self:layer(layer, y, run, autograd.is_recomputing()) end, x)
    else
      x = memory.scope(self.layer, self, layer, x, run)
    end
    -- What backward needs of it the tape holds; a probe may want to keep it.
    if run.each_layer then run.each_layer(layer, x) else before:free() end
  end
  return ops.rmsnorm(x, self.weight["model.norm.weight"], { eps = self.config.eps })
end

--- The output matrix `[V,E]`; the embedding itself when tied.
function Model:head()
  return self.weight["lm_head.weight"] or self.weight["model.embed_tokens.weight"]
end

--- Sum of the losses of all labelled tokens here and their number; with weights the weighted sum, and
-- the sum of weights. Divide by the *global* number, once (distributed.md 3, loss normalisation).
-- @tparam Tensor labels i32 `[B,T]`, shifted already, -100 where there is none
-- @tparam table run see `hidden`; also `loss_chunk` (rows of logits at hand, 0 = automatic), `weights`
--   (Tensor `[B,T]`, what each label counts; nil: 1)
function Model:loss(ids, labels, run)
  local x = self:hidden(ids, run)
  local rows = x:size(1) * x:size(2)
  return ops.linear_cross_entropy(x:reshape { rows, self.config.width }, self:head(),
    labels:reshape { rows }, run.weights and run.weights:reshape { rows }, { chunk = run.loss_chunk or 0 })
end

--- Negative log-likelihood of every label, `[B,T]` (0 where there is none); no gradient.
function Model:token_loss(ids, labels, run)
  local x = self:hidden(ids, run)
  local batch, tokens = x:size(1), x:size(2)
  local nll = ops.linear_token_loss(x:reshape { batch * tokens, self.config.width }, self:head(),
    labels:reshape { batch * tokens })
  return nll:reshape { batch, tokens }
end

--- Logits `[B,T,V]`. For generation slice the hidden states first: a long context's logits are large.
function Model:logits(ids, run)
  return ops.linear(self:hidden(ids, run), self:head(), nil)
end

--- Flops of one token, forward and backward, at a context and an executed share of the causal
-- triangle: 6 N + 6 L H D S rho (halo's definition of work, see README "Numbers").
function Model:flops_per_token(context, density)
  local c = self.config
  local n = M.count(c)
  if not c.tie then n = n - c.vocab * c.width end -- looking up an embedding costs nothing
  return 6 * n + 6 * c.layers * c.heads * c.head_dim * context * (density or 1)
end

--- A 64-bit number that differs when any weight differs.
function Model:hash()
  local h, one = 0ULL, ffi.new "uint64_t[1]"
  for _, p in ipairs(self.parameters) do
    halo_ffi.check(halo_ffi.C.halo_tensor_hash(p.tensor, one))
    h = bit.bxor(bit.rol(h, 7), one[0])
  end
  return h
end

--- Number of parameters.
function Model:count() return M.count(self.config) end

Model.__tostring = function(self)
  local c = self.config
  return ("%s: %d layers, width %d, %d/%d heads of %d, ffn %d, vocabulary %d, %.2f M parameters, %s%s")
    :format(c.family, c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.ffn, c.vocab,
      self:count() / 1e6, self.dtype, self.device ~= "cpu" and " on " .. self.device or "")
end

M.Model = Model
return M
