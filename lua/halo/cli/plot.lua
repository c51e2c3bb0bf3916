--- `halo plot RUN`: charts of a run, from its log.
local fs = require "halo.fs"
local heatmap = require "halo.heatmap"
local report = require "halo.report"

local M = {
  name = "plot",
  summary = "Draw a run: loss, needle maps, sparsity, ring, perplexity.",
  example = "halo plot runs/2026-11-22-143005-tiny --what niah",
}

function M.define(command)
  command:argument("run", "a run folder")
  command:option("--what -w", "only these charts"):choices { "loss", "niah", "ppl", "sparsity", "ring" }
  command:option("--out -o", "folder for the SVG files (default: RUN/plots)"):argname "DIR"
  command:flag("--text", "needle maps in the terminal instead of files")
end

function M.run(options)
  local run = report.read(options.run)
  if options.text then
    for _, e in ipairs(run.evals) do
      if e.name == "niah" then
        io.stdout:write(heatmap.text(e.result, ("%s step %d: %.0f %%"):format(e.moment, e.step, 100 * e.result.score)), "\n")
      end
    end
    return 0
  end
  local charts = report.charts(run, options.what)
  local folder = options.out or options.run .. "/plots"
  fs.mkdir(folder)
  for _, c in ipairs(charts) do
    local path = ("%s/%s.svg"):format(folder, c.name)
    fs.write(path, c.svg)
    io.stdout:write(path, "\n")
  end
  if #charts == 0 then
    io.stderr:write(("halo: %s has nothing to draw%s yet\n"):format(options.run,
      options.what and " for " .. options.what or ""))
    return 0
  end
  if not options.what and not options.out then io.stdout:write(report.write(options.run), "\n") end
  return 0
end

return M
