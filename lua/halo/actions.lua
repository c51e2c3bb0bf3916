--- What happens between steps: the entries of a recipe's `initially`, `every` and `finally`.
--
-- An action is a word of the recipe (`save { }`, `eval.niah { }`, a Lua function). Order: ascending step
-- count, then list order. Every action runs on all ranks; only rank 0 prints and writes files.
local errors = require "halo.errors"
local generate = require "halo.generate"
local measure = require "halo.measure"

local Actions = {}
Actions.__index = Actions

local M = {}

function M.new(recipe, run)
  local self = setmetatable({ recipe = recipe, run = run, job = run.job, cadences = recipe.every }, Actions)
  self.measure = measure.new(run)
  return self
end

local handlers = {}

function handlers.log(self) self.run.log:console() end

function handlers.save(self, a) self.run:save { keep = a.keep, major = a.major } end

function handlers.sparsity(self, a) self.measure:report(a) end

function handlers.sample_text(self, a)
  local job = self.job
  local tok = job.tokenizer
  local ids = tok:encode(a.prompt)
  if #ids == 0 then ids = { tok.bos or tok.eos } end
  local out = generate.run { model = job.model, ids = ids, tokens = a.tokens, temperature = a.temperature,
    top_p = a.top_p, seed = self.recipe.seed, attending = job.attending, stop = tok.eos }
  self.run.log:note(('step %d: "%s%s"'):format(job.step_index, a.prompt, tok:decode(out)))
  job.stage = nil -- the context changed; the next step lays it out again
end

--- Run one action.
function Actions:perform(a, moment)
  if a.type == "function" then return a.call(self.run) end
  local handler = handlers[a.type]
  if handler then return handler(self, a) end
  local found, suite = pcall(require, "halo.eval." .. a.type)
  if not found then
    errors.raise("usage", ("action %s: %s"):format(tostring(a.type), tostring(suite)), 0)
  end
  local result = suite.action(self.run, a, moment)
  self.job.stage = nil
  self.run.results[#self.run.results + 1] = { step = self.job.step_index, moment = moment, name = a.type,
    result = result }
  self.run.log:result(a.type, self.job.step_index, moment, result)
  return result
end

local function each(self, list, moment)
  for _, a in ipairs(list) do self:perform(a, moment) end
end

function Actions:initially() each(self, self.recipe.initially, "before") end
function Actions:finally() each(self, self.recipe.finally, "after") end

--- Switch on what must be measured inside the coming step.
function Actions:before_step(step) self.measure:before_step(step, self.cadences) end

--- Add what was measured to the step's record.
function Actions:extend(record) self.measure:extend(record) end

function Actions:after_step(step)
  for _, c in ipairs(self.cadences) do
    if step % c.steps == 0 then each(self, c.actions, "step") end
  end
end


--- The closing page: maps before and after, curves, the HTML report, what to try next.
function Actions:report() require("halo.report").finish(self.run) end

return M
