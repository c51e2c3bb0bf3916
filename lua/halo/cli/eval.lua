--- `halo eval TASK TARGET`: measure what a model can do.
local args = require "halo.args"
local cli = require "halo.cli"
local errors = require "halo.errors"
local launch = require "halo.launch"

local M = {
  name = "eval",
  summary = "Evaluate a run, a checkpoint or a model folder.",
  example = "halo eval niah runs/2026-01-31-120000-tiny --lengths 1K,2K,4K",
}

function M.define(command)
  command:argument("task", "what to measure: " .. table.concat(require("halo.evaluate").tasks(), ", "))
  command:argument("target", "a run's folder (newest checkpoint), a checkpoint, or a Hugging Face folder")
  command:argument("settings", "settings of the task, as depths=5; `halo help eval.niah` lists them"):args "*"
  command:option("--lengths -l", "context lengths, as 1K,4K,16K"):convert(cli.lengths):argname "LIST"
  command:flag("--dense", "dense attention, whatever the recipe says")
  command:option("--data", "text to use instead of the recipe's (needed for a model folder)"):argname "DIR"
  command:option("--ranks -n", "spread sequences over N processes"):convert(cli.count):argname "N"
  command:option("--out", "folder for the results (default: eval/ in the run's folder)"):argname "DIR"
  command:flag("--json", "the result as JSON")
end

-- Settings of the command line, as fields of the task's word.
local function fields_of(options, word)
  local schema, recipe = require "halo.schema", require "halo.recipe"
  local overrides, others = cli.split_overrides(options.settings)
  if #others > 0 then
    errors.raise("usage", ('"%s" is no setting; write name=value, as depths=5'):format(others[1]), 0)
  end
  local node = schema.construct(word, {})
  for _, text in ipairs(overrides) do
    local path, value = text:match "^([%w_.%-]+)=(.*)$"
    schema.override(node, path, value, recipe.evaluate)
  end
  if options.lengths then
    if not schema.type(word).by_name.lengths then
      errors.raise("usage", ("%s has no lengths%s"):format(word,
        args.did_you_mean("lengths", schema.type(word).names)), 0)
    end
    node.lengths = options.lengths
  end
  return schema.values_of(node)
end

function M.run(options)
  local evaluate, fs = require "halo.evaluate", require "halo.fs"
  evaluate.suite(options.task)
  require("halo.recipe").environment()
  local fields = fields_of(options, "eval." .. options.task)
  local ranks = options.ranks or 1
  launch.ensure(ranks, options.argv, { origin = "--ranks" })
  local opened = evaluate.open(options.target, { dense = options.dense or false, data = options.data, ranks = ranks,
    context = fields.lengths and math.max(unpack(fields.lengths)) })
  local result, settings, text = evaluate.run(opened, options.task, fields)
  if not launch.is_first() then return end
  if options.json then
    print(require("halo.json").encode({ task = options.task, target = opened.from, step = opened.step,
      attention = opened.label, settings = settings, result = result }, { pretty = true }))
  else
    print(("%s of %s, %s attention"):format(options.task, opened.from, opened.label))
    print(text)
  end
  local folder = options.out
  if not folder and opened.folder then
    folder = ("%s/eval/%s-step-%08d-%s"):format(opened.folder, options.task, opened.step, opened.label)
  end
  if folder then
    local paths = evaluate.write(fs.mkdir(folder) and folder, { task = options.task, target = opened.from,
      step = opened.step, attention = opened.label, settings = settings, result = result, text = text })
    io.stderr:write("written: ", table.concat(paths, " "), "\n")
  end
end

return M
