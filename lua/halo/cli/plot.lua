--- `halo plot RUN...`: charts of runs, from their logs.
local errors = require "halo.errors"
local fs = require "halo.fs"
local term = require "halo.term"

local M = {
  name = "plot",
  summary = "Draw a run: report.html with all charts, or one kind of chart.",
  example = "halo plot runs/2026-01-31-120000-tiny --what loss",
}

local kinds = { "loss", "niah", "ppl", "sparsity", "ring" }

function M.define(command)
  command:argument("run", "run folders"):args "+"
  command:option("--what -w", "only these charts: " .. table.concat(kinds, ", ")):choices(kinds):argname "KIND"
end

-- A first look in the terminal; the charts are in the files.
local function preview(run, what)
  if what and what ~= "loss" then return end
  local losses, heights = {}, {}
  for i, step in ipairs(run.steps) do losses[i] = step.loss end
  if #losses == 0 then return end
  local low = math.min(unpack(losses, 1, math.min(#losses, 5000)))
  for i, loss in ipairs(losses) do heights[i] = loss - low end
  print(("loss  %.4f %s %.4f  (%d steps)"):format(losses[1], term.sparkline(heights, 60), losses[#losses], #losses))
end

function M.run(options)
  local report = require "halo.report"
  for _, target in ipairs(options.run) do
    local folder = require("halo.checkpoint").run_folder(target)
    if not fs.is_file(folder .. "/train.jsonl") then
      errors.raise("usage", ("%s is no run folder (no train.jsonl in it)"):format(target), 0)
    end
    local run = report.read(folder)
    preview(run, options.what)
    if options.what then
      local charts = report.charts(run, options.what)
      if #charts == 0 then print(("%s: this run has nothing to draw for %s"):format(folder, options.what)) end
      fs.mkdir(folder .. "/plots")
      for _, chart in ipairs(charts) do
        local path = ("%s/plots/%s.svg"):format(folder, chart.name)
        fs.write(path, chart.svg)
        print(path)
      end
    else
      print(report.write(folder))
    end
  end
end

return M
