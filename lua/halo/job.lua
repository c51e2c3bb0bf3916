--- A job: everything a resolved recipe names, built and ready to step.
--
-- `halo run` makes one and lets halo.train drive it; the REPL makes one and steps it by hand; scripts do
-- what they like. What a step means is written in `Job:step`, once.
--
-- Ranks. World rank = data index * cp + ring index: the ranks of a ring are neighbours. Each ring takes
-- its own sequences of the global batch; which ones depends on the step and the batch alone, never on
-- the number of ranks.
--
-- The gradient that a step applies is d(sum of losses)/d(number of labels), both summed over all ranks
-- and micro-batches before the one division (distributed.md 3, "loss normalisation").
local args = require "halo.args"
local attending = require "halo.attending"
local autograd = require "halo.autograd"
local comm = require "halo.comm"
local data = require "halo.data"
local devices = require "halo.device"
local errors = require "halo.errors"
local halo_ffi = require "halo.ffi"
local model = require "halo.model"
local ops = require "halo.ops"
local optim = require "halo.optim"
local progress = require "halo.progress"
local rate = require "halo.schedule"
local memory = require "halo.memory"
local tensor = require "halo.tensor"
local tokenizer = require "halo.tokenizer"

local C = halo_ffi.C

local Job = {}
Job.__index = Job

local M = {}

local function fail(class, ...) errors.raise(class, string.format(...), 3) end

---- Building -------------------------------------------------------------------------------------

-- The world this process belongs to, checked against the mesh the recipe asks for.
local function open_world(recipe, o)
  local wanted = recipe.mesh.dp * recipe.mesh.cp
  if o.comm then return o.comm end
  local world = comm.world()
  if world:size() == wanted then return world end
  if world:size() == 1 and o.virtual_ranks then
    if recipe.mesh.dp ~= 1 then fail("usage", "virtual ranks form one ring; mesh.dp must be 1, is %d",
      recipe.mesh.dp) end
    return comm.virtual(wanted)
  end
  fail("usage", "the recipe's mesh needs %d ranks (dp = %d, cp = %d), this job has %d; start it with "
    .. "`halo run`, which starts the ranks, or set mesh.cp=%d", wanted, recipe.mesh.dp, recipe.mesh.cp,
    world:size(), math.max(1, math.floor(world:size() / recipe.mesh.dp)))
end

local function open_tokenizer(recipe)
  local t = recipe.tokenizer
  if t and t.type == "bpe" then return tokenizer.load(t.from) end
  if recipe.model.type == "hf" and not t then return tokenizer.load(recipe.model.from) end
  return tokenizer.byte {}
end

local function build_model(recipe, vocab)
  local m = recipe.model
  if m.type == "hf" then
    return model.from_hf(m.from, { dtype = recipe.dtype, device = recipe.device, rope = m.rope })
  end
  local config = model.config {
    family = m.family, layers = m.layers, width = m.width, heads = m.heads, kv_heads = m.kv_heads,
    head_dim = m.head_dim, ffn = m.ffn, vocab = m.vocab, context = m.context, rope = m.rope, tie = m.tie,
    eps = m.eps, init = m.init,
  }
  if config.vocab < vocab then
    fail("usage", "model: vocab = %d, but the tokenizer has %d tokens", config.vocab, vocab)
  end
  return model.build(config, { seed = recipe.seed, dtype = recipe.dtype, device = recipe.device })
end

-- Stages with what the steps need to know: index and the first sample of the data's order.
local function lay_out_stages(recipe)
  local stages, sample = {}, 0
  for i, s in ipairs(recipe.stages) do
    stages[i] = setmetatable({ index = i, first_sample = sample }, { __index = s })
    sample = sample + s.steps * s.batch
  end
  return stages
end

-- Flops per second that matrix products of this model reach here, on all processes at once: what `mfu`
-- is a share of. The best of a few, some milliseconds in all. Random numbers: a GPU draws less power for
-- zeros and runs faster. On a device several are queued between two looks at the clock.
local function product_rate(self)
  local c, device = self.model.config, self.model.device
  local rows, queued = device == "cpu" and 512 or 8192, device == "cpu" and 1 or 8
  return autograd.no_grad(memory.scope, function()
    local x = tensor.normal { shape = { rows, c.width }, dtype = self.model.dtype, device = device, seed = 1 }
    local w = tensor.normal { shape = { c.ffn, c.width }, dtype = self.model.dtype, device = device, seed = 2 }
    local best = math.huge
    for _ = 1, 8 do
      devices.synchronize(device)
      local started = progress.clock()
      for _ = 1, queued do ops.linear(x, w, nil):free() end
      devices.synchronize(device)
      best = math.min(best, (progress.clock() - started) / queued)
    end
    return self.comm:all_reduce({ 2 * rows * c.width * c.ffn / best })[1]
  end)
end

--- Build a job.
-- @tparam table recipe resolved (halo.recipe)
-- @tparam[opt] table o `comm` (a communicator to use), `virtual_ranks` (run a ring of cp ranks inside this
--   process when no launcher started several)
-- @raise when ranks, sizes or files do not fit, before any work is done
function M.new(recipe, o)
  o = args.named("job.new", o or {}, { comm = "any?", virtual_ranks = "boolean?" })
  local self = setmetatable({ recipe = recipe, step_index = 0, tokens_seen = 0, hooks = {} }, Job)
  self.stages, self.total_steps = lay_out_stages(recipe), recipe.total.steps
  self.device = devices.require(recipe.device or "cpu", 0)
  C.halo_set_deterministic(recipe.deterministic ~= false and 1 or 0)
  self.comm = open_world(recipe, o)
  self.rank, self.dp, self.cp = self.comm:rank(), recipe.mesh.dp, recipe.mesh.cp
  self.data_index = math.floor(self.rank / self.cp)
  self.ring_comm = self.dp == 1 and self.comm or self.comm:split(self.data_index, self.rank)
  self.tokenizer = open_tokenizer(recipe)
  memory.with_tag("weights", function() self.model = build_model(recipe, self.tokenizer.vocab_size) end)
  self.attending = attending.new { config = self.model.config, comm = self.ring_comm,
    pattern = recipe.attention, inner = self.comm:local_size() }
  local a = recipe.optim
  self.optim = optim.adamw(self.model.parameters, { betas = a.betas, eps = a.eps, decay = a.decay, clip = a.clip,
    moments = a.moments })
  self.data = data.open(recipe.data, { tokenizer = self.tokenizer, seed = recipe.seed, stages = recipe.stages,
    comm = self.comm })
  self.comm:same(self:weights_hash(), "initial weights")
  self.peak_flops = product_rate(self)
  self.totals = tensor.zeros { 2, dtype = "f64", device = self.device }
  return self
end

--- A 64-bit number that differs when any weight differs; equal on all ranks of a healthy job.
function Job:weights_hash() return self.model:hash() end

---- Stages ---------------------------------------------------------------------------------------

--- The stage that a step (from 1) belongs to.
function Job:stage_of(step)
  for _, s in ipairs(self.stages) do
    if step <= s.last_step then return s end
  end
  return self.stages[#self.stages]
end

--- Context lengths of the stages, each once, in order.
function Job:contexts()
  local list, seen = {}, {}
  for _, s in ipairs(self.stages) do
    if not seen[s.context] then list[#list + 1] = s.context end
    seen[s.context] = true
  end
  return list
end

--- Take a stage's context, positions and attention into use. Done when its first step begins, and after
-- a resume.
function Job:enter(stage)
  if self.stage == stage then return end
  self.stage = stage
  self.model:set_rope(stage.rope)
  self.attending:set_pattern(stage.attention)
  self.attending:set_context(stage.context, stage.batch / (self.dp * stage.accumulate))
  for _, name in ipairs(devices.names) do C.halo_memory_trim(devices.number(name)) end
end

---- One step -------------------------------------------------------------------------------------

-- A batch with its tensors on the model's device: one copy each, before anything computes with them.
local function to_device(batch, device)
  local here = setmetatable({}, { __index = batch })
  for _, name in ipairs { "ids", "labels", "positions", "weights" } do
    if batch[name] then here[name] = batch[name]:to(device) end
  end
  return here
end

-- What a forward pass needs besides ids: positions and the attention of this micro-batch.
function Job:run_of(batch)
  local run = {
    recompute = self.recipe.model.recompute == "block", offload = self.stage.offload,
    mlp_chunk = model.decoder.mlp_chunk[self.device], weights = batch.weights,
    attend = function(layer, q, k, v) return self.attending:attend(layer, q, k, v) end,
  }
  run.cos, run.sin = self.model:positions(batch.positions, self.stage.context)
  return run
end

--- This ring's micro-batch `micro` (from 1) of a step.
function Job:batch(step, micro)
  local s = self.stage
  local share = s.batch / (self.dp * s.accumulate)
  local first = s.first_sample + (step - s.first_step) * s.batch + ((micro - 1) * self.dp + self.data_index) * share
  local cut = self:cut(first, share)
  cut.stage = s.index
  return self.data:batch(cut)
end

-- Which samples, and the part of them that belongs to this process.
function Job:cut(first, rows)
  return { first = first, batch = rows, context = self.stage.context, layout = self.attending.layout.handle,
    rank = self.ring_comm:rank(), here = self.ring_comm:here() }
end

--- A batch of held-out text at the stage's context; the same one every time for the same `first`.
function Job:validation_batch(rows, first) return self.data:validation_batch(self:cut(first or 0, rows)) end

-- Forward and backward of one micro-batch. The sum of losses and the number of labels here, both weighted
-- where the data weighs its labels, are added to `totals` (f64 [2]) on the device, and nobody waits for them
-- (the loss itself reads its labels and the losses of its rows on the host).
function Job:micro_step(step, micro, totals)
  local asked = progress.clock()
  local batch = self:batch(step, micro)
  self.data_seconds = self.data_seconds + progress.clock() - asked
  self.attending:begin { documents = batch.documents, step = step }
  memory.scope(function()
    local here = to_device(batch, self.device)
    local loss, count = self.model:loss(here.ids, here.labels, self:run_of(here))
    totals:select { index = 1 }:add_scaled(loss)
    totals:select { index = 2 }:add_scaled(count)
    loss:backward() -- also where this rank has no label: its keys serve the queries of others
  end)
end

--- The learning rate of a step.
function Job:rate_of(step)
  local lr = self:stage_of(step).lr
  return rate.value(lr, step - lr.first_step + 1, lr.last_step - lr.first_step + 1)
end

--- One optimizer step.
-- @treturn table record: step, stage, loss, gnorm, lr, tokens, labels, dt, comm_s, density, recall, balance, ...
function Job:step()
  local step = self.step_index + 1
  self:enter(self:stage_of(step))
  local s, clock = self.stage, progress.clock
  local started = clock()
  self.ring_comm:reset_timer()
  self.comm:reset_timer()
  if self.hooks.before_step then self.hooks.before_step(step) end
  self.optim:zero_grad()
  self.data_seconds = 0
  self.totals:fill(0)
  for micro = 1, s.accumulate do self:micro_step(step, micro, self.totals) end
  local summary = self.attending:summary()
  -- The one place of a step that waits for the device. One exchange for numbers, one for gradients.
  local sum, labels = unpack(self.comm:all_reduce(self.totals:values()))
  if labels == 0 then
    fail("data", "step %d: none of the %d tokens of the batch has a label", step, s.batch * s.context)
  end
  self.comm:all_reduce_tensor(self.optim:flat_grad())
  local loss = sum / labels
  local norm = self.optim:grad_norm()
  local record = {
    step = step, steps = self.total_steps, stage = s.index, context = s.context, loss = loss, gnorm = norm / labels,
    lr = self:rate_of(step), labels = labels, data_s = self.data_seconds,
    density = summary.density, recall = summary.recall, balance = summary.balance, critical = summary.critical,
  }
  local verdict = self.hooks.judge and self.hooks.judge(record) or "go"
  if verdict == "go" then
    self.optim:step { step = step, lr = record.lr, scale = 1 / labels, norm = norm }
  end
  record.skipped = verdict ~= "go" or nil
  self.step_index = step
  self.tokens_seen = self.tokens_seen + s.batch * s.context
  record.tokens = self.tokens_seen
  record.dt = clock() - started
  record.comm_s = self.comm:exposed_seconds()
  if self.ring_comm ~= self.comm then record.comm_s = record.comm_s + self.ring_comm:exposed_seconds() end
  record.tok_s = s.batch * s.context / record.dt
  record.flops = self.model:flops_per_token(s.context, record.density) * s.batch * s.context
  record.mem = memory.peak(nil, self.device)
  return record
end

--- Loss (mean over labels) on a batch without training on it, under the attention in use.
-- @tparam table batch from `Job:batch` or `Job:validation_batch`
-- @tparam[opt] {Plan,...} plans per layer, instead of selecting: a frozen choice on other text
function Job:loss_on(batch, plans)
  local attend = self.attending
  return autograd.no_grad(function()
    attend:begin { documents = batch.documents, step = self.step_index, plans = plans }
    local run = { mlp_chunk = model.decoder.mlp_chunk[self.device],
      attend = function(l, q, k, v) return attend:attend(l, q, k, v) end }
    local sum, n
    memory.scope(function()
      local here = to_device(batch, self.device)
      run.cos, run.sin = self.model:positions(here.positions, attend.context)
      local loss, count = self.model:loss(here.ids, here.labels, run)
      sum, n = loss:item(), count:item()
    end)
    local totals = self.comm:all_reduce { sum, n }
    return totals[1] / totals[2], totals[2]
  end)
end

--- Close communicators and files. A job is not used after that.
function Job:close()
  if self.data and self.data.close then self.data:close() end
end

Job.__tostring = function(self)
  return ("job %s: step %d of %d, %d rank%s (dp %d x cp %d)\n%s"):format(self.recipe.name, self.step_index,
    self.total_steps, self.comm:size(), self.comm:size() == 1 and "" or "s", self.dp, self.cp, tostring(self.model))
end

M.Job = Job
return M
