--- Guards: what a recipe watches, and what happens then.
--
-- A guard sees the record of a step after its numbers are summed over ranks and before the optimizer
-- moves a weight, so all ranks judge alike. A loss or gradient norm that is not finite always stops the
-- run, guard or no guard (reliability.md 4.7): nothing after it would mean anything.
local errors = require "halo.errors"

local Guards = {}
Guards.__index = Guards

local M = {}

--- Watch what a recipe asks for.
-- @tparam table list resolved `guard` entries
-- @tparam table run the run (log, job)
function M.new(list, run)
  local self = setmetatable({ list = list or {}, run = run, recent = { loss = {}, gnorm = {} }, skipped = 0 }, Guards)
  return self
end

-- Mean and standard deviation of a list.
local function moments(list)
  local mean, var = 0, 0
  for _, v in ipairs(list) do mean = mean + v end
  mean = mean / #list
  for _, v in ipairs(list) do var = var + (v - mean) ^ 2 end
  return mean, math.sqrt(var / math.max(1, #list - 1))
end

--- How many standard deviations a value lies above the mean of its recent ones; nil before 16 are known.
function Guards:z(name, value)
  local list = self.recent[name]
  if #list < 16 then return nil end
  local mean, std = moments(list)
  return (value - mean) / math.max(std, 1e-12)
end

function Guards:remember(name, value, window)
  local list = self.recent[name]
  list[#list + 1] = value
  while #list > window do table.remove(list, 1) end
end

local function act(self, guard, record, text)
  if guard.act == "stop" then
    errors.raise("numerics", ("step %d: %s; the guard says stop. The last checkpoint is unharmed")
      :format(record.step, text), 0)
  end
  self.run.log:warn(("step %d: %s%s"):format(record.step, text,
    guard.act == "skip" and "; update skipped" or guard.act == "widen" and "; budget widened" or ""))
  return guard.act
end

local checks = {}

function checks.loss_spike(self, g, record)
  for _, name in ipairs { "loss", "gnorm" } do
    local z = self:z(name, record[name])
    if z and z > g.z then
      local what = act(self, g, record, ("%s %.4g is %.1f standard deviations above its mean"):format(name,
        record[name], z))
      if what == "skip" then return "skip" end
    end
  end
end

function checks.recall(self, g, record)
  if not record.recall or record.recall >= g.below then return end
  if act(self, g, record, ("recall %.1f %% is below %.1f %%"):format(100 * record.recall,
    100 * g.below)) == "widen" then
    self.run.job.attending:widen()
  end
end

function checks.imbalance(self, g, record)
  if record.balance and record.balance > g.above then
    act(self, g, record, ("the slowest rank has %.2f times the mean attention work"):format(record.balance))
  end
end

--- Judge a step before its update: "go", or "skip".
function Guards:judge(record)
  for _, name in ipairs { "loss", "gnorm" } do
    local v = record[name]
    if v ~= v or math.abs(v) == math.huge then
      errors.raise("numerics", ("step %d: the %s is %s on at least one rank; weights were not changed. Resume from "
        .. "the last checkpoint with a lower rate, or look at the batch (stage %d, context %d)")
        :format(record.step, name == "loss" and "loss" or "gradient norm", tostring(v), record.stage,
          record.context), 0)
    end
  end
  record.z = self:z("loss", record.loss)
  local verdict, window = "go", 128
  for _, g in ipairs(self.list) do
    if checks[g.type](self, g, record) == "skip" then verdict = "skip" end
    window = g.window or window
  end
  if verdict == "skip" then
    self.skipped = self.skipped + 1
  else
    self:remember("loss", record.loss, window)
    self:remember("gnorm", record.gnorm, window)
  end
  return verdict
end

--- State for checkpoints: a resumed run judges as the uninterrupted one would.
function Guards:state() return { loss = self.recent.loss, gnorm = self.recent.gnorm, skipped = self.skipped } end

function Guards:restore(state)
  if not state then return end
  self.recent = { loss = state.loss or {}, gnorm = state.gnorm or {} }
  self.skipped = state.skipped or 0
end

return M
