--- Learning rate over steps: a linear rise to a peak, then constant, cosine or linear.
--
--    rate
--    peak |      .----.___  constant: stays
--         |    .´      `._  cosine: to + (peak - to) (1 + cos(pi x)) / 2     (SGDR, arXiv 1608.03983)
--      to |  .´           `-  linear: peak + (to - peak) x
--       0 +-´------------------------------- step
--           1 .. steps   | over |           x = share of the decay that lies behind
--
-- Steps count from 1, as everywhere in Halo. The rise gives peak * step/steps, so the first step already
-- moves and step number `steps` has the peak; the decay begins with the step after it and its last step
-- has exactly `to`. A rate is a function of the step number alone, so that a resumed run needs no state.
local args = require "halo.args"
local errors = require "halo.errors"

local M = {}

-- x in [0,1]: how far the decay is.
local shapes = {
  constant = function(peak) return peak end,
  cosine = function(peak, to, x) return to + (peak - to) * (1 + math.cos(math.pi * x)) / 2 end,
  linear = function(peak, to, x) return peak + (to - peak) * x end,
}

--- The rate of a step.
-- @tparam number|table rate a constant, or `{ peak =, steps = 0, decay = "constant", to = 0, over = nil }`
-- (what the recipe words `warmup` and its `:cosine`, `:linear`, `:constant` resolve to)
-- @tparam int step counts from 1
-- @tparam int last step at which the decay ends, unless the rate says `over` how many steps it goes
-- @treturn number
-- @usage schedule.value({ peak = 1e-3, steps = 10, decay = "cosine", to = 1e-4 }, 1, 100) --> 1e-4
function M.value(rate, step, last)
  if type(rate) == "number" then return rate end
  if type(rate) ~= "table" or type(rate.peak) ~= "number" then
    errors.raise("usage", "schedule.value: a rate is a number or a table with a peak, got " .. args.describe(rate), 2)
  end
  local rise = rate.steps or 0
  if step <= rise then return rate.peak * step / rise end
  local name = rate.decay or "constant"
  local shape = shapes[name]
  if not shape then
    errors.raise("usage", ('schedule.value: no decay "%s"%s'):format(tostring(name),
      args.did_you_mean(name, args.keys(shapes))), 2)
  end
  local over = rate.over or (last or step) - rise
  local x = over > 0 and math.min(1, (step - rise) / over) or 1
  return shape(rate.peak, rate.to or 0, x)
end

--- Rates of all steps, for a plot or for the prompt.
-- @tparam number|table rate as in `value`
-- @tparam int last
-- @treturn {number,...}
function M.all(rate, last)
  local out = {}
  for step = 1, last do out[step] = M.value(rate, step, last) end
  return out
end

return M
