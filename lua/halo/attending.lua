--- Where a model's attention meets pattern, plan and ring.
--
-- One object per (model, communicator): it owns the ring, the layout of the current context and the
-- plans of the current micro-batch. The model calls `attend(layer, q, k, v)`; which keys a query sees
-- and where they come from is decided here and nowhere else.
--
--   set_context(N, B)   layout of N tokens; positions and the loader's gather index follow from it
--   begin { ... }       a new micro-batch: documents of it, plans of the last one are dropped
--   attend(layer, ...)  first call of a layer makes its plan; the recomputed forward finds it made
--                       (never selected twice: DESIGN D6)
--   measure             sampled recall of attention mass, in the first forward only
local args = require "halo.args"
local devices = require "halo.device"
local errors = require "halo.errors"
local halo_ffi = require "halo.ffi"
local sparsity = require "halo.sparsity"
local tensor = require "halo.tensor"

local ffi, C, check = halo_ffi.ffi, halo_ffi.C, halo_ffi.check

local Attending = {}
Attending.__index = Attending

local M = {}

--- Make one.
-- @tparam table o named arguments
-- @tparam table o.config model config (heads, kv_heads, head_dim, layers)
-- @tparam Comm o.comm ranks of the ring
-- @tparam table o.pattern resolved attention of the recipe: `{ type = "vertical_slash", ..., ring = {...} }`
-- @tparam[opt] int o.inner ranks of the inner ring, when the pattern's ring is hierarchical over nodes
function M.new(o)
  o = args.named("attending.new", o, { config = "table", comm = "any", pattern = "table", inner = "int?" })
  local self = setmetatable({}, Attending)
  self.config, self.comm = o.config, o.comm
  self.scale = 1 / math.sqrt(o.config.head_dim)
  self.inner = o.inner
  self.plans, self.frozen, self.recall = {}, {}, {}
  self:set_pattern(o.pattern)
  return self
end

--- Dense causal attention on one rank: for generation, probes and small scripts.
-- @tparam table config sizes of the model
-- @tparam[opt] int block tokens per block; default: what the device likes best
-- @tparam[opt="cpu"] string device
function M.dense(config, block, device)
  local comm = require("halo.comm").self()
  block = block or devices.block[device or "cpu"]
  return M.new { config = config, comm = comm,
    pattern = { type = "dense", ring = { type = "flat", layout = "contiguous", block = block } } }
end

--- Change the pattern (a stage of a recipe does). A new ring is made only when its words changed.
function Attending:set_pattern(pattern)
  local ring = pattern.ring
  local inner = ring.inner
  if inner == "node" then inner = self.inner end
  local key = table.concat({ ring.type, tostring(inner), ring.layout, ring.block }, " ")
  if key ~= self.ring_key then
    self.ring = require("halo.ring").new { comm = self.comm, schedule = ring.type, inner = inner }
    self.ring_key, self.layout_kind, self.block = key, ring.layout, ring.block
    self.context = nil
  end
  self.pattern = pattern
  self.frozen = {}
end

--- Lay out sequences of N tokens, B of them.
function Attending:set_context(n_tokens, batch)
  if self.context ~= n_tokens then
    self.layout = require("halo.layout").new {
      kind = self.layout_kind, tokens = n_tokens, world = self.comm:size(), block = self.block,
    }
    self.context = n_tokens
  end
  self.batch = batch or 1
  self:begin {}
end

--- A new micro-batch.
-- @tparam[opt] table o `documents` (int32 pointer `[B,N]`, global order), `step` (for the samples of
-- recall), `plans` (chosen before on other text: used with these documents instead of selecting)
function Attending:begin(o)
  self.documents = o.documents
  self.step = o.step or 0
  self.plans, self.recall, self.shared = {}, {}, nil
  for layer, plan in pairs(o.plans or {}) do
    self.plans[layer] = plan:with_documents(self.documents, self.batch)
  end
end

--- Tokens of this process per sequence: ranks here times local tokens.
function Attending:local_tokens() return self.layout:local_tokens() * self.comm:here() end

--- Global position of a row of the local tensors (ranks here stacked in rank order).
function Attending:global_of(row)
  local t = self.layout:local_tokens()
  return self.layout:global(self.comm:rank() + math.floor(row / t), row % t)
end

--- Row of a global token in the tensors of this process, or nil when it lives elsewhere.
function Attending:local_row(token)
  local rank, index = self.layout:locate(token)
  local slot = rank - self.comm:rank()
  if slot < 0 or slot >= self.comm:here() then return nil end
  return slot * self.layout:local_tokens() + index
end

--- Whether other processes hold part of the sequence.
function Attending:is_spread() return self.comm:here() < self.comm:size() end

--- Whether this process keeps the key and value of the n-th generated token.
function Attending:keeps_new(n)
  local slot = n % self.comm:size() - self.comm:rank()
  return slot >= 0 and slot < self.comm:here()
end

--- This process's part of one sequence: ids and positions as i32 `[1,T]` tensors. Padding has id 0 and
-- its own position.
-- @tparam {int,...} ids
-- @tparam[opt="cpu"] string device
function Attending:cut(ids, device)
  local t = self:local_tokens()
  local local_ids, positions = ffi.new("int32_t[?]", t), ffi.new("int32_t[?]", t)
  for row = 0, t - 1 do
    local position = self:global_of(row)
    positions[row] = position
    local_ids[row] = ids[position + 1] or 0
  end
  local o = { shape = { 1, t }, dtype = "i32", device = device or "cpu" }
  return tensor.from_pointer(local_ids, o), tensor.from_pointer(positions, o)
end

-- Whether a layer stays dense here by the pattern's own rule.
function Attending:is_dense(layer)
  local where = self.pattern.dense
  if self.pattern.type == "dense" then return true end
  if type(where) ~= "table" then return false end
  if (where.below or 0) > self.context then return true end
  for _, l in ipairs(where.layers or {}) do
    if l == layer then return true end
  end
  return false
end

--- Build the plan of a layer from its queries and keys, by any pattern.
function Attending:build(pattern, layer, q, k)
  return sparsity.build(pattern, {
    q = q, k = k, layer = layer, step = self.step, layout = self.layout, ring = self.ring,
    documents = self.documents, scale = self.scale, batch = self.batch, heads = self.config.heads,
  })
end

-- Patterns that do not look at q and k give one plan for all layers.
function Attending:plan_for(layer, q, k)
  local dense = self:is_dense(layer)
  local pattern = dense and { type = "dense" } or self.pattern
  if dense or sparsity.is_static(pattern.type) then
    local key = dense and "dense" or "static"
    self.shared = self.shared or {}
    self.shared[key] = self.shared[key] or self:build(pattern, layer, q, k)
    return self.shared[key]
  end
  if pattern.frozen then
    local kept = self.frozen[layer]
    if kept and kept.context == self.context then return kept.plan:with_documents(self.documents, self.batch) end
    local plan = self:build(pattern, layer, q, k)
    self.frozen[layer] = { plan = plan, context = self.context }
    return plan
  end
  return self:build(pattern, layer, q, k)
end

--- Attention of one layer; what the model calls.
-- @tparam int layer counted from 1
-- @tparam Tensor q `[B,T,H,D]`, after rope
-- @tparam Tensor k `[B,T,Hk,D]`, after rope
-- @tparam Tensor v `[B,T,Hk,D]`
-- @treturn Tensor o `[B,T,H,D]`
function Attending:attend(layer, q, k, v)
  local plan = self.plans[layer]
  if not plan then
    plan = self:plan_for(layer, q, k)
    self.plans[layer] = plan
    local samples = self.measure and self.measure(layer) or 0
    if samples > 0 then self.recall[layer] = self:recall_of(plan, layer, q, k, samples) end
    if self.probe then self.probe(layer, q, k, v, plan) end
  end
  local out = ffi.new "halo_tensor *[1]"
  local status = C.halo_attention(out, nil, q, k, v, plan.handle or plan, self.ring.handle or self.ring, self.scale)
  if status ~= 0 then
    errors.raise("internal", ("layer %d: %s"):format(layer, ffi.string(C.halo_error_message())), 2)
  end
  return tensor.own(out[0])
end

--- Sampled recall per head of a plan: the share of dense attention mass that it keeps.
function Attending:recall_of(plan, layer, q, k, samples)
  local heads, list = self.config.heads, {}
  if C.halo_plan_is_dense(plan.handle or plan) ~= 0 then
    for h = 1, heads do list[h] = 1 end -- nothing to sample
    return list
  end
  local out = ffi.new("double[?]", heads)
  check(C.halo_attention_recall(out, q, k, plan.handle or plan, self.ring.handle or self.ring, self.scale,
    samples, 0x726563, self.step * 4096 + layer))
  for h = 1, heads do list[h] = tonumber(out[h - 1]) end
  return list
end

--- Summary over the layers of the current micro-batch: mean density, mean measured recall (nil when
-- none was sampled), worst balance.
function Attending:summary()
  local density, n, recall, m, worker, critical = 0, 0, 0, 0, 1, 1
  local seen = {}
  for layer = 1, self.config.layers do
    local plan = self.plans[layer]
    if plan then
      if not seen[plan] then
        local balance = plan:balance()
        seen[plan] = { density = plan:density(), worker = balance.worker, critical = balance.critical }
      end
      density, n = density + seen[plan].density, n + 1
      worker, critical = math.max(worker, seen[plan].worker), math.max(critical, seen[plan].critical)
    end
    for _, r in ipairs(self.recall[layer] or {}) do recall, m = recall + r, m + 1 end
  end
  return {
    density = n > 0 and density / n or 1, recall = m > 0 and recall / m or nil,
    balance = worker, critical = critical,
  }
end

return M
