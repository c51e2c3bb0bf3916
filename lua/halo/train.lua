--- The training loop.
--
-- What a step is stands in halo.job, what happens between steps in halo.actions, what may stop a run in
-- halo.guards. This file is the order of things, meant to be read from top to bottom:
--
--    build the job -> resume, if asked -> for every step: step, log, actions, signals -> finally
--
-- All ranks run the same loop and take the same decisions: everything that decides is a number that was
-- summed over ranks, and requests that reach one rank only (signals) are exchanged before they count.
local actions = require "halo.actions"
local args = require "halo.args"
local checkpoint = require "halo.checkpoint"
local errors = require "halo.errors"
local fs = require "halo.fs"
local guards = require "halo.guards"
local halo_ffi = require "halo.ffi"
local job_module = require "halo.job"
local json = require "halo.json"
local log_module = require "halo.log"
local recipe_module = require "halo.recipe"

local C = halo_ffi.C

local M = {}

--- Exit code when a checkpoint was saved because a signal asked to stop: start me again.
M.REQUEUE = 75

-- runs/2026-11-22-143005-tiny; rank 0 names it, the others are told.
local function choose_folder(recipe, world, out)
  local name = out
  if not name then
    local safe = recipe.name:gsub("[^%w._-]+", "-")
    name = ("%s/%s-%s"):format(recipe.out, os.date "%Y-%m-%d-%H%M%S", safe)
  end
  name = world:broadcast_text(name)
  if world:rank() == 0 then fs.mkdir(name) end
  world:barrier()
  return name
end

-- The newest run folder of this recipe that holds a checkpoint.
local function newest_run(recipe)
  local best
  for _, entry in ipairs(fs.exists(recipe.out) and fs.list(recipe.out) or {}) do
    local folder = recipe.out .. "/" .. entry
    local tail = "-" .. recipe.name:gsub("[^%w._-]+", "-")
    if entry:sub(-#tail) == tail and checkpoint.latest(folder .. "/ckpt") then best = folder end
  end
  return best
end

local function write_run_files(folder, recipe)
  recipe_module.save(recipe, folder)
  local found, doctor = pcall(require, "halo.doctor")
  if found then fs.write(folder .. "/env.json", json.encode(doctor.environment(), { pretty = true }) .. "\n") end
end

-- Requests that signals left on any rank, as this step's common answer.
local function stop_requested(world)
  return world:all_reduce_max(C.halo_signal_pending()) ~= 0
end

--- Everything between build and finish of a run that is not a step: kept in one object so that actions
-- and user functions see the same thing.
local Run = {}
Run.__index = Run

--- Save a checkpoint now.
-- @tparam[opt] table o `keep`, `major` (see the recipe word `save`)
function Run:save(o)
  o = o or {}
  self.log:flush()
  local ok, why = checkpoint.save_job(self.job, self.folder .. "/ckpt", {
    keep = o.keep, major = o.major, state = { guards = self.guards:state() },
  })
  if ok then
    self.log:event { kind = "save", step = self.job.step_index, path = ok }
  else
    self.log:warn(("step %d: no checkpoint was saved: %s; training goes on"):format(self.job.step_index, why))
  end
  return ok
end

--- Train a resolved recipe.
-- @tparam table recipe resolved table (halo.recipe)
-- @tparam[opt] table o `resume` ("auto", a run folder or a checkpoint folder), `out` (run folder),
--   `verbose`, `virtual_ranks`, `comm`, `quiet`
-- @treturn table the finished run: `folder`, `job`, `results`
-- @treturn int exit code: 0, or 75 after a checkpoint that a signal asked for
function M.run(recipe, o)
  o = args.named("train.run", o or {}, { resume = "string?", out = "string?", verbose = "boolean?",
    virtual_ranks = "boolean?", comm = "any?", quiet = "boolean?" })
  local job = job_module.new(recipe, { virtual_ranks = o.virtual_ranks, comm = o.comm })
  local world = job.comm
  local resume = o.resume
  if resume == "auto" then resume = newest_run(recipe) end
  local folder = choose_folder(recipe, world, o.out or (resume and checkpoint.run_folder(resume)))
  local run = setmetatable({ job = job, folder = folder, recipe = recipe, results = {} }, Run)
  halo_ffi.check(C.halo_signals_install(("%s/logs/crash-%d.txt"):format(folder, world:rank())))
  run.log = log_module.open { dir = folder, rank = world:rank(), name = recipe.name,
    total_steps = job.total_steps, resumed = resume ~= nil, quiet = o.quiet }
  run.guards = guards.new(recipe.guard, run)
  run.actions = actions.new(recipe, run)
  job.hooks.judge = function(record) return run.guards:judge(record) end
  if world:rank() == 0 and not resume then write_run_files(folder, recipe) end

  local finished, code = xpcall(function()
    if resume then
      local state, from = checkpoint.restore_job(job, resume)
      run.guards:restore(state.guards)
      run.log:rewind(job.step_index)
      run.log:note(("resumed from %s at step %d"):format(from, job.step_index))
    end
    run.log:header(job)
    if job.step_index == 0 then run.actions:initially() end
    while job.step_index < job.total_steps do
      run.actions:before_step(job.step_index + 1)
      local record = job:step()
      run.actions:extend(record)
      run.log:step(record)
      run.actions:after_step(job.step_index)
      if stop_requested(world) then
        run:save()
        run.log:note(("stopped by a signal at step %d; `halo run ... --resume auto` goes on"):format(job.step_index))
        return M.REQUEUE
      end
    end
    run.actions:finally()
    -- What a run came to, in one number: equal runs end with equal weights.
    run.log:event { kind = "end", step = job.step_index, weights = bit.tohex(job:weights_hash(), 16) }
    return 0
  end, function(e) return errors.wrap(e, 2) end)
  run.log:close()
  if not finished then
    job:close()
    error(code, 0)
  end
  if code == 0 and world:rank() == 0 then run.actions:report() end
  job:close()
  return run, code
end

return M
