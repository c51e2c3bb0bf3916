--- What the prompt offers around a recipe or a run: step it, undo, generate, look into attention.
--
--    halo> step(3)                          three training steps, here and now
--    halo> undo()                           back to before them, to the last bit
--    halo> generate("The ring", { tokens = 20 })
--    halo> p = probe(2)                     attention of layer 2 on a batch: density, recall by head
--    halo> p.plan:explain(1, 3)             what head 3 sees
--
-- The job is built when first needed, from the recipe as it stands then. Ranks that no launcher started
-- become virtual ranks of this process, so a ring can be tried without MPI. After `R` was changed, `rebuild()`
-- makes a new job of it.
local args = require "halo.args"
local errors = require "halo.errors"
local fs = require "halo.fs"
local term = require "halo.term"

local M = {}

local Bench = {}
Bench.__index = Bench

--- A workbench.
-- @tparam table o `recipe` (node) or `target` (a run, a checkpoint or a model folder); `say` (function(text))
function M.new(o)
  return setmetatable({ recipe = o.recipe, target = o.target, say = o.say or print }, Bench)
end

local function is_run(target)
  return fs.is_file(require("halo.checkpoint").run_folder(target) .. "/recipe.resolved.json")
end

-- A job from a run's newest (or the named) checkpoint, ready to go on.
local function job_of_run(target, resolved)
  local checkpoint = require "halo.checkpoint"
  local job = require("halo.job").new(resolved, { virtual_ranks = true })
  local _, from = checkpoint.restore_job(job, target)
  return job, from
end

--- The resolved recipe of a run, as it was saved with it; nil for anything else.
function Bench:saved_recipe()
  if not (self.target and is_run(self.target)) then return nil end
  return require("halo.json").read(require("halo.checkpoint").run_folder(self.target) .. "/recipe.resolved.json")
end

--- The job, built on first use.
function Bench:job()
  if self.built then return self.built end
  if self.recipe then
    self.built = require("halo.job").new(require("halo.recipe").resolve(self.recipe), { virtual_ranks = true })
  elseif self.target and is_run(self.target) then
    local job, from = job_of_run(self.target, self:saved_recipe())
    self.built = job
    self.say(("%s, step %d"):format(from, job.step_index))
  elseif self.target then
    errors.raise("usage", ("%s is a model without a recipe: there is no job; `model` and `generate` work"):format(
      self.target), 0)
  else
    errors.raise("usage", "there is no job: start with `halo repl RECIPE`, or `halo repl RUN`", 0)
  end
  local job = self.built
  job:enter(job:stage_of(math.max(1, job.step_index)))
  return job
end

--- Forget the job: the next use builds it anew, from the recipe as it is now.
function Bench:rebuild()
  if self.built then self.built:close() end
  self.built, self.before = nil, nil
  collectgarbage()
end

---- Steps -----------------------------------------------------------------------------------------

-- Everything that a step changes.
local function snapshot(job)
  local weights = {}
  for i, p in ipairs(job.model.parameters) do weights[i] = p.tensor:detach():clone() end
  local moments = {}
  for name, value in pairs(job.optim:state()) do
    moments[name] = type(value) == "cdata" and value:clone() or value
  end
  return { weights = weights, moments = moments, step = job.step_index, tokens = job.tokens_seen,
    steps = job.optim.steps }
end

local function restore(job, kept)
  for i, p in ipairs(job.model.parameters) do p.tensor:detach():copy_from(kept.weights[i]) end
  job.optim:set_state(kept.moments)
  job.step_index, job.tokens_seen, job.optim.steps = kept.step, kept.tokens, kept.steps
  job:enter(job:stage_of(math.max(1, job.step_index)))
end

local Record = {
  __tostring = function(r) return ("record of step %d: %s"):format(r.step, table.concat(args.keys(r), " ")) end,
}

--- Train n steps (default 1).
-- @treturn table the record of the last one
function Bench:step(n)
  n = n or 1
  if type(n) ~= "number" or n < 1 or n ~= math.floor(n) then
    errors.raise("usage", "step wants a count of steps, got " .. args.describe(n), 0)
  end
  local job = self:job()
  if job.step_index + n > job.total_steps then
    errors.raise("usage", ("the recipe has %d steps, %d are done"):format(job.total_steps, job.step_index), 0)
  end
  self.before = snapshot(job)
  local record
  for _ = 1, n do
    record = job:step()
    self.say(("step %d  loss %.4f  gnorm %.3f  lr %.2e  ctx %s  density %.1f%%  %s"):format(record.step, record.loss,
      record.gnorm, record.lr, term.context(record.context), 100 * record.density, term.duration(record.dt)))
  end
  return setmetatable(record, Record)
end

--- Back to before the last `step`.
function Bench:undo()
  if not self.before then errors.raise("usage", "nothing to undo: no step was made here", 0) end
  local job = self:job()
  restore(job, self.before)
  self.before = nil
  self.say(("back at step %d"):format(job.step_index))
end

---- Looking ---------------------------------------------------------------------------------------

-- Model, tokenizer and attention to generate with: the job's, or those of a bare model folder.
function Bench:parts()
  if self.target and not is_run(self.target) then
    if not self.bare then
      local device = require("halo.device")()
      local model = require("halo.model").from_hf(self.target, { device = device,
        dtype = device == "cuda" and "bf16" or nil })
      self.bare = { model = model, tokenizer = require("halo.tokenizer").load(self.target),
        attending = require("halo.attending").dense(model.config, nil, model.device) }
    end
    return self.bare
  end
  return self:job()
end

--- Continue a text.
-- @tparam string prompt
-- @tparam[opt] table o `tokens` (64), `temperature` (0: greedy), `top_p` (1), `seed` (0)
-- @treturn string the new text
function Bench:generate(prompt, o)
  o = args.named("generate", o or {}, { tokens = { "int", 64 }, temperature = { "number", 0 }, top_p = { "number", 1 },
    seed = { "int", 0 } })
  local parts = self:parts()
  local tok = parts.tokenizer
  local ids = tok:encode(prompt)
  if #ids == 0 then ids = { tok.bos or tok.eos } end
  local out = require("halo.generate").run { model = parts.model, ids = ids, tokens = o.tokens,
    temperature = o.temperature, top_p = o.top_p, seed = o.seed, stop = tok.document_end,
    attending = parts.attending }
  parts.stage = nil -- a job lays its context out again at its next step
  return tok:decode(out)
end

local Probe = {}
Probe.__index = Probe

Probe.__tostring = function(p)
  local sorted, worst = { unpack(p.recall) }, 1
  table.sort(sorted)
  for h, r in ipairs(p.recall) do
    if r < p.recall[worst] then worst = h end
  end
  return ("attention of layer %d: %s, %s tokens, density %.1f%%\n"
    .. "  recall  min %.1f%%  median %.1f%%  (worst head %d)  %s")
    :format(p.layer, p.pattern, term.context(p.context), 100 * p.plan:density(), 100 * sorted[1],
      100 * sorted[math.ceil(#sorted / 2)], worst, term.sparkline(p.recall))
end

--- What a layer's attention chose on the coming batch, and how much of the attention mass that keeps.
-- @tparam int layer counted from 1
-- @tparam[opt] table o `samples` (query rows per head for the recall, default 64)
-- @treturn table `plan`, `recall` (by head), `layer`, `context`
function Bench:probe(layer, o)
  o = args.named("probe", o or {}, { samples = { "int", 64 } })
  local job = self:job()
  local layers = job.model.config.layers
  if type(layer) ~= "number" or layer < 1 or layer > layers or layer ~= math.floor(layer) then
    errors.raise("usage", ("probe wants a layer from 1 to %d, got %s"):format(layers, args.describe(layer)), 0)
  end
  local step = math.min(job.step_index + 1, job.total_steps)
  job:enter(job:stage_of(step))
  local attending = job.attending
  local old = attending.measure
  attending.measure = function(l) return l == layer and o.samples or 0 end
  local ok, e = pcall(job.loss_on, job, job:batch(step, 1))
  attending.measure = old
  if not ok then error(e, 0) end
  return setmetatable({ layer = layer, plan = attending.plans[layer], recall = attending.recall[layer],
    context = attending.context, pattern = attending.pattern.type }, Probe)
end

--- Names for the prompt: functions bound to this workbench, and `job` when asked for.
function M.names(bench)
  return {
    step = function(n) return bench:step(n) end,
    undo = function() return bench:undo() end,
    rebuild = function() return bench:rebuild() end,
    generate = function(prompt, o) return bench:generate(prompt, o) end,
    probe = function(layer, o) return bench:probe(layer, o) end,
  }
end

return M
