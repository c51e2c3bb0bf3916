--- Evaluate a model that lies on disk: a run, one of its checkpoints, or a Hugging Face folder.
--
-- The tasks are the modules of eval/, the same that recipes name (`finally = eval.niah { }`): here a job is
-- rebuilt around the weights and the task is run on it. A run brings its recipe, so tokenizer, held-out
-- text and attention are those it was trained with; a bare model folder needs text to be told.
--
-- Results are files too: `eval/TASK-step-N[-dense]/results.json` in the run's folder (task, settings,
-- result, environment), the table as text, and a heat map where the task has one.
local args = require "halo.args"
local errors = require "halo.errors"
local fs = require "halo.fs"
local json = require "halo.json"
local schema = require "halo.schema"

local M = {}

local here = debug.getinfo(1, "S").source:sub(2):gsub("[^/]*$", "")

--- Names of the tasks, from the files of eval/.
function M.tasks()
  local names = {}
  for _, file in ipairs(fs.list(here .. "eval") or {}) do names[#names + 1] = file:match "^([%w_]+)%.lua$" end
  return names
end

-- Resolved recipe around a model folder: just enough for a job.
local function recipe_around(folder, o)
  if not o.data then
    errors.raise("usage", ("%s is a model without a recipe; say where text is, with --data DIR"):format(folder), 0)
  end
  local recipe = require "halo.recipe"
  recipe.environment()
  local function new(path, value) return schema.construct(path, value) end
  return recipe.resolve(new("recipe", {
    name = fs.basename(fs.realpath(folder)), model = new("model.hf", { from = folder, recompute = "none" }),
    data = o.data, optim = new("adamw", { lr = 0 }), attention = new("dense", {}),
    stages = { new("stage", { context = o.context or 1024, steps = 1 }) },
  }))
end

-- What a path is: resolved recipe, run folder (nil for a bare model), and where weights are.
local function find(target, o)
  if not fs.is_dir(target) then errors.raise("usage", ("there is no folder %s"):format(target), 0) end
  local checkpoint = require "halo.checkpoint"
  local folder = checkpoint.run_folder(target)
  if fs.is_file(folder .. "/recipe.resolved.json") then
    local resolved = json.read(folder .. "/recipe.resolved.json")
    if o.data then resolved.data = require("halo.recipe").resolve_data(o.data, resolved.data) end
    return resolved, folder, target
  end
  if fs.is_file(target .. "/config.json") then return recipe_around(target, o), nil, target end
  errors.raise("usage", ("%s is neither a run, nor a checkpoint, nor a model folder (config.json)"):format(target), 0)
end

-- The model and nothing of the optimizer: loading moments to throw them away would triple the memory.
local function load_weights(job, target)
  local from, step = require("halo.checkpoint").latest(target)
  if not from then errors.raise("data", target .. " holds no checkpoint yet", 0) end
  require("halo.model").load_weights(job.model, from)
  return from, step
end

--- Open a run, checkpoint or model folder for evaluation.
-- @tparam string target folder
-- @tparam[opt] table o `dense` (dense attention instead of the recipe's), `data` (text instead of the
-- recipe's), `context` (longest length that will be asked for), `ranks` (of the ring; default 1)
-- @treturn table `job`, `recipe`, `folder` (run folder or nil), `from` (checkpoint or model), `step`, `label`
function M.open(target, o)
  o = args.named("evaluate.open", o or {}, { dense = { "boolean", false }, data = "string?", context = "int?",
    ranks = { "int", 1 } })
  local resolved, folder, path = find(target, o)
  resolved.mesh = { dp = 1, cp = o.ranks }
  local last = resolved.stages[#resolved.stages]
  if o.dense then last.attention = { type = "dense", ring = last.attention.ring } end
  -- A job checks that its batch can be shared by the mesh; an evaluation has no batch.
  last.batch, last.accumulate = 1, 1
  local job = require("halo.job").new(resolved)
  local from, step = path, 0
  if folder then from, step = load_weights(job, path) end
  job.step_index = step
  job:enter(job.stages[#job.stages])
  return { job = job, recipe = resolved, folder = folder, from = from, step = step,
    label = last.attention.type }
end

--- Run a task on what `open` returned.
-- @tparam table opened
-- @tparam string task name of a file of eval/
-- @tparam[opt] table fields settings, as a recipe would write them
-- @treturn table result of the task
-- @treturn table the settings with defaults
-- @treturn string table for people
function M.run(opened, task, fields)
  local suite = M.suite(task)
  require("halo.vocabulary").load_modules()
  local action = schema.resolve(schema.construct("eval." .. task, fields or {}))
  local result = suite.action(opened, action, "after")
  return result, action, suite.text(result)
end

--- The module of a task. @raise with the nearest name
function M.suite(task)
  for _, name in ipairs(M.tasks()) do
    if name == task then return require("halo.eval." .. name) end
  end
  errors.raise("usage", ('there is no evaluation "%s"%s'):format(tostring(task), args.did_you_mean(task, M.tasks())), 0)
end

--- Write a result's files.
-- @tparam string folder made if missing
-- @tparam table o `task`, `target`, `step`, `attention`, `settings`, `result`, `text`
-- @treturn {string,...} paths
function M.write(folder, o)
  fs.mkdir(folder)
  local paths = { folder .. "/results.json", folder .. "/table.txt" }
  json.write(paths[1], { task = o.task, target = o.target, step = o.step, attention = o.attention,
    settings = o.settings, result = o.result, environment = require("halo.doctor").environment() })
  fs.write(paths[2], o.text .. "\n")
  if o.result.cells then
    paths[3] = folder .. "/heatmap.svg"
    fs.write(paths[3], require("halo.heatmap").svg(o.result, o.task .. ", " .. o.attention))
  end
  return paths
end

return M
