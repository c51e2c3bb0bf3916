--- What sparsity does to a model, measured while it trains (DESIGN, promise 2).
--
-- Per layer and head:
--   density    visible pairs over causal pairs of the same document, as executed (exact count)
--   recall     share of dense attention mass that the plan keeps, over sampled query rows
--   missed     share of *far* tokens, those some query at distance >= `far` could see, that no such
--              query sees in this step: they get no long-range gradient here
--   starved    the same over the last `over` steps: tokens that have been missed ever since
-- and per layer the balance between ranks: worker, step and critical path (mtraining.md 2.3).
--
-- A little recall is always on: every step samples one layer (in turn), so the console line has a figure
-- without a cost that shows. Everything else is measured when a `measure.sparsity` action is due;
-- coverage is followed on every step once a recipe asks for it.
local halo_ffi = require "halo.ffi"

local ffi, C, check = halo_ffi.ffi, halo_ffi.C, halo_ffi.check

local Measure = {}
Measure.__index = Measure

local M = {}

-- Query rows per head of the always-on sample: 4 rows of one layer cost 4/N of that layer's attention.
local LIGHT_SAMPLES = 4

--- The `measure.sparsity` entry of a list of actions, or nil.
function M.word_in(actions)
  for _, a in ipairs(actions) do
    if a.type == "sparsity" then return a end
  end
end

function M.new(run)
  local self = setmetatable({ run = run, job = run.job, last_reached = {} }, Measure)
  for _, c in ipairs(run.recipe.every) do self.word = M.word_in(c.actions) or self.word end
  return self
end

local function is_due(word, layer)
  if not word.layers then return true end
  for _, l in ipairs(word.layers) do
    if l == layer then return true end
  end
  return false
end

--- Decide what the coming step samples.
function Measure:before_step(step, cadences)
  local due
  for _, c in ipairs(cadences) do
    if step % c.steps == 0 then due = M.word_in(c.actions) or due end
  end
  local layers = self.job.model.config.layers
  local light = (step - 1) % layers + 1
  self.job.attending.measure = function(layer)
    if due and is_due(due, layer) then return due.samples end
    return layer == light and LIGHT_SAMPLES or 0
  end
end

-- Distance from which a token counts as far.
function Measure:far() return self.word.far or math.max(1, math.floor(self.job.stage.context / 4)) end

-- Follow which far tokens each head reached: last_reached[layer][head][token] = step.
function Measure:follow(step)
  local attending = self.job.attending
  local n, far = self.job.stage.context, self:far()
  if self.context ~= n then self.context, self.last_reached, self.since = n, {}, step end
  local reached = ffi.new("uint8_t[?]", n)
  local far_count, missed = ffi.new "int64_t[1]", ffi.new "int64_t[1]"
  self.coverage = {}
  for layer, plan in pairs(attending.plans) do
    if is_due(self.word, layer) then
      local rows = {}
      self.last_reached[layer] = self.last_reached[layer] or {}
      for h = 1, self.job.model.config.heads do
        local last = self.last_reached[layer][h]
        if not last then
          last = ffi.new("int32_t[?]", n, 0)
          self.last_reached[layer][h] = last
        end
        local total, none = 0, 0
        ffi.fill(reached, n)
        for b = 0, attending.batch - 1 do
          check(C.halo_plan_far_coverage(plan.handle or plan, b, h - 1, far, reached, far_count, missed))
          total, none = total + tonumber(far_count[0]), none + tonumber(missed[0])
        end
        for j = 0, n - 1 do
          if reached[j] ~= 0 then last[j] = step end
        end
        rows[h] = { missed = total > 0 and none / total or 0 }
      end
      self.coverage[layer] = rows
    end
  end
end

--- Called with every step's record.
function Measure:extend(record)
  if self.word and next(self.job.attending.plans) then
    self:follow(record.step)
    local sum, n = 0, 0
    for _, rows in pairs(self.coverage) do
      for _, row in ipairs(rows) do sum, n = sum + row.missed, n + 1 end
    end
    record.missed = n > 0 and sum / n or nil
  end
end

-- Share of far tokens not reached in the last `over` steps (of the steps seen at this context).
function Measure:starved(layer, head, over)
  local last = self.last_reached[layer] and self.last_reached[layer][head]
  if not last then return nil end
  local step, far, n = self.job.step_index, self:far(), self.context
  local total, none = 0, 0
  for j = 0, n - far - 1 do -- token j has a query at distance >= far
    total = total + 1
    if last[j] <= step - over then none = none + 1 end
  end
  return total > 0 and none / total or 0
end

-- An evaluation took the place of the last step's plans: choose anew, on held-out text.
function Measure:look_again(word)
  local job = self.job
  job:enter(job:stage_of(math.max(job.step_index, 1)))
  job.attending.measure = function(layer) return is_due(word, layer) and word.samples or 0 end
  job:loss_on(job:validation_batch(job.attending.batch, job.attending.batch))
end

--- The full table of a `measure.sparsity` action: one row per layer and head, written as an event and
-- shown as a short table.
function Measure:report(word)
  local job = self.job
  self.word = self.word or word
  if not job.stage then self:look_again(word) end
  local attending, heads = job.attending, job.model.config.heads
  local rows, balances = {}, {}
  local over = math.min(word.over, job.step_index - (self.since or job.step_index) + 1)
  for layer = 1, job.model.config.layers do
    local plan = attending.plans[layer]
    if plan and is_due(word, layer) then
      local balance = plan:balance()
      balances[#balances + 1] = { layer = layer, worker = balance.worker, step = balance.step,
        critical = balance.critical }
      for h = 1, heads do
        local density = 0
        for b = 1, attending.batch do density = density + plan:density(b, h) / attending.batch end
        rows[#rows + 1] = {
          layer = layer, head = h, density = density,
          recall = attending.recall[layer] and attending.recall[layer][h],
          missed = self.coverage and self.coverage[layer] and self.coverage[layer][h].missed,
          starved = self:starved(layer, h, over),
        }
      end
    end
  end
  local event = { kind = "sparsity", step = job.step_index, context = job.stage.context, far = self:far(),
    over = over, heads = rows, balance = balances }
  if word.compare and #word.compare > 0 then event.compare = self:compare(word.compare) end
  self.run.log:sparsity(event)
  self.run.results[#self.run.results + 1] = { step = job.step_index, name = "sparsity", result = event }
  return event
end

--- Loss on one held-out batch under the job's attention and under others: "dense", or "frozen" (the
-- plans of the job's last step on another batch, kept).
function Measure:compare(kinds)
  local job = self.job
  local attending = job.attending
  local batch = job:validation_batch(attending.batch)
  local out = { labels = 0 }
  local pattern, kept = attending.pattern, attending.plans
  out.sparse, out.labels = job:loss_on(batch)
  for _, kind in ipairs(kinds) do
    if kind == "dense" then
      local dense = { type = "dense", ring = pattern.ring }
      attending.pattern = dense
      out.dense = job:loss_on(batch)
      attending.pattern = pattern
    elseif kind == "frozen" then
      out.frozen = job:loss_on(batch, kept)
    end
  end
  attending.plans = kept
  return out
end

return M
