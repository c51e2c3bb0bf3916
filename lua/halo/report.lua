--- The report of a run: one HTML file with its charts inside, and the closing page in the terminal.
--
-- Everything comes from the run folder (train.jsonl, recipe.resolved.json), never from memory of the
-- process, so `halo plot RUN` gives the same report tomorrow. Charts are SVG files under plots/ and are
-- pasted into the HTML: no script, no network, one file to send around.
local fs = require "halo.fs"
local heatmap = require "halo.heatmap"
local json = require "halo.json"
local svg = require "halo.svg"
local term = require "halo.term"

local M = {}

--- Read a run's log.
-- @tparam string folder run folder
-- @treturn table `steps`, `evals`, `sparsity`, `notes`, `recipe`
function M.read(folder)
  local text = fs.read(folder .. "/train.jsonl")
  if not text then
    require("halo.errors").raise("data", folder .. "/train.jsonl cannot be read; is this a run folder?", 2)
  end
  local run = { folder = folder, steps = {}, evals = {}, sparsity = {}, notes = {} }
  for line in text:gmatch "[^\n]+" do
    local ok, r = pcall(json.decode, line)
    if ok then
      if r.kind == "step" then
        run.steps[#run.steps + 1] = r
      elseif r.kind == "eval" then
        run.evals[#run.evals + 1] = r
      elseif r.kind == "sparsity" then
        run.sparsity[#run.sparsity + 1] = r
      else
        run.notes[#run.notes + 1] = r
      end
    end
  end
  local resolved = fs.read(folder .. "/recipe.resolved.json")
  run.recipe = resolved and json.decode(resolved) or {}
  return run
end

---- Charts ---------------------------------------------------------------------------------------

-- Exponential moving average over points, weight 0.1 for the newest.
local function smooth(points)
  local out, mean = {}, nil
  for i, p in ipairs(points) do
    mean = mean and mean * 0.9 + p[2] * 0.1 or p[2]
    out[i] = { p[1], mean }
  end
  return out
end

local function series(run, name, scale)
  local points = {}
  for _, r in ipairs(run.steps) do
    if type(r[name]) == "number" then points[#points + 1] = { r.step, r[name] * (scale or 1) } end
  end
  return points
end

-- Where the context changes: marks for the time axis.
local function stage_marks(run)
  local marks, last = {}, nil
  for _, r in ipairs(run.steps) do
    if r.context ~= last then
      marks[#marks + 1] = { r.step, term.context(r.context) }
      last = r.context
    end
  end
  return marks
end

local function needle_evals(run)
  local list = {}
  for _, e in ipairs(run.evals) do
    if e.name == "niah" then list[#list + 1] = e end
  end
  return list
end

local function head_map(event, name, title, stops)
  local rows, columns, values = {}, {}, {}
  local index = {}
  for _, h in ipairs(event.heads) do
    if type(h[name]) == "number" then
      if not index[h.layer] then
        rows[#rows + 1] = "layer " .. h.layer
        index[h.layer] = #rows
        values[#rows] = {}
      end
      columns[h.head] = tostring(h.head)
      values[index[h.layer]][h.head] = h[name]
    end
  end
  if #rows == 0 then return nil end
  for i = 1, table.maxn(columns) do columns[i] = columns[i] or tostring(i) end
  return svg.heatmap { title = title, x_label = "head", y_label = "", columns = columns, rows = rows,
    values = values, stops = stops, cell = { 52, 30 }, format = function(v) return ("%.1f"):format(100 * v) end }
end

--- All charts of a run.
-- @tparam table run from `read`
-- @tparam[opt] string what "loss", "niah", "sparsity", "ring", "ppl": only those
-- @treturn {{name=,svg=,caption=},...}
function M.charts(run, what)
  local list = {}
  local function wanted(kind) return not what or what == kind end
  local function add(name, text, caption)
    if text then list[#list + 1] = { name = name, svg = text, caption = caption } end
  end
  local marks = stage_marks(run)
  if wanted "niah" then
    for _, e in ipairs(needle_evals(run)) do
      local title = ("Needle score %s step %d"):format(e.moment == "step" and "at" or e.moment, e.step)
      add(("niah-%06d-%s"):format(e.step, e.moment), heatmap.svg(e.result, title),
        ("%d-digit numbers, %d samples per cell, exact match"):format(e.result.digits or 0, e.result.samples or 1))
    end
  end
  if wanted "loss" and #run.steps > 0 then
    local points = series(run, "loss")
    add("loss", svg.lines { title = "Loss", x_label = "step", y_label = "nats per token", marks = marks,
      series = { { name = "per step", points = points, faint = true },
        { name = "moving mean", points = smooth(points) } } },
      "mean over labelled tokens of the step; dashed lines mark a change of context")
    add("gnorm", svg.lines { title = "Gradient norm", x_label = "step", y_label = "before clipping", marks = marks,
      log_y = true,
      series = { { points = series(run, "gnorm") } } }, "")
  end
  if wanted "ppl" then
    local curves = {}
    for _, e in ipairs(run.evals) do
      if e.name == "ppl" then
        for _, row in ipairs(e.result.rows) do
          local points = {}
          for _, b in ipairs(row.curve or {}) do points[#points + 1] = { math.max(1, b.from), b.ppl } end
          if #points > 1 then
            curves[#curves + 1] = { name = ("%s, %s"):format(term.context(row.length), e.moment), points = points }
          end
        end
      end
    end
    if #curves > 0 then
      add("ppl", svg.lines { title = "Validation perplexity by position", x_label = "position in the document (log)",
        y_label = "perplexity", log_x = true, log_y = true, series = curves }, "positions in buckets of doubling width")
    end
  end
  if wanted "sparsity" then
    local shown = { { name = "density", points = series(run, "density", 100) } }
    if #series(run, "recall") > 0 then shown[2] = { name = "recall (sampled)",
      points = smooth(series(run, "recall", 100)) } end
    if #series(run, "missed") > 0 then shown[#shown + 1] = { name = "far tokens without gradient",
      points = series(run, "missed", 100) } end
    if #run.steps > 0 then
      add("sparsity", svg.lines { title = "Density and recall of attention", x_label = "step", y_label = "%",
        marks = marks,
        y_min = 0, y_max = 100, series = shown },
        "density: computed pairs / causal pairs; recall: sampled share of dense attention mass kept")
    end
    local last = run.sparsity[#run.sparsity]
    if last then
      add("density-heads", head_map(last, "density", ("Density per head, step %d (%%)"):format(last.step),
        svg.blue_stops), "")
      add("recall-heads", head_map(last, "recall", ("Recall per head, step %d (%%)"):format(last.step),
        svg.needle_stops), "")
      add("starved-heads", head_map(last, "starved",
        ("Far tokens without gradient in %d steps (%%)"):format(last.over), svg.blue_stops),
        ("far: %d tokens or more from the query"):format(last.far))
    end
  end
  if wanted "ring" and #run.steps > 0 then
    local comm = {}
    for _, r in ipairs(run.steps) do comm[#comm + 1] = { r.step, 100 * (r.comm_s or 0) / r.dt } end
    add("ring", svg.lines { title = "Ring", x_label = "step", y_label = "", marks = marks, series = {
      { name = "exposed communication, % of step", points = smooth(comm) },
      { name = "slowest rank / mean, x 10", points = series(run, "balance", 10) },
    } }, "balance 1.0 means that every rank has the same attention work")
    add("speed", svg.lines { title = "Tokens per second", x_label = "step", y_label = "", marks = marks,
      series = { { points = series(run, "tok_s") } } }, "")
  end
  return list
end

---- HTML -----------------------------------------------------------------------------------------

local style = [[
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1080px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}table{border-collapse:collapse;font-size:.92em}
td,th{padding:.25em .8em;border-bottom:1px solid #e3e3e3;text-align:left}td.n{text-align:right}
.charts{display:flex;flex-wrap:wrap;gap:18px;align-items:flex-start}figure{margin:0;max-width:100%}
figure svg{max-width:100%;height:auto}figcaption{color:#666;font-size:.85em;max-width:640px}
pre{background:#f6f6f6;padding:1em;overflow:auto;font-size:.85em}
]]

local function html_table(rows)
  local out = { "<table>" }
  for r, row in ipairs(rows) do
    local cells = {}
    for c, cell in ipairs(row) do
      local tag = r == 1 and "th" or "td"
      cells[c] = ("<%s%s>%s</%s>"):format(tag, r > 1 and c > 1 and ' class="n"' or "", svg.escape(cell), tag)
    end
    out[#out + 1] = "<tr>" .. table.concat(cells) .. "</tr>"
  end
  out[#out + 1] = "</table>"
  return table.concat(out, "\n")
end

-- Rows of figures at the end of each stage.
local function stage_rows(run)
  local rows = { { "stage", "context", "steps", "last loss", "tokens/s", "density", "recall", "balance",
    "exposed comm" } }
  local i = 1
  while i <= #run.steps do
    local j = i
    while run.steps[j + 1] and run.steps[j + 1].stage == run.steps[i].stage do j = j + 1 end
    local function mean(name, f)
      local sum, n = 0, 0
      for k = i, j do
        local v = f and f(run.steps[k]) or run.steps[k][name]
        if type(v) == "number" then sum, n = sum + v, n + 1 end
      end
      return n > 0 and sum / n or nil
    end
    local function percent(v) return v and ("%.1f %%"):format(100 * v) or "-" end
    rows[#rows + 1] = { tostring(run.steps[i].stage), term.context(run.steps[i].context), tostring(j - i + 1),
      ("%.4f"):format(run.steps[j].loss), term.count(mean "tok_s"), percent(mean "density"), percent(mean "recall"),
      ("%.3f"):format(mean "balance" or 1), percent(mean(nil, function(r) return (r.comm_s or 0) / r.dt end)) }
    i = j + 1
  end
  return rows
end

--- Write plots/*.svg and report.html.
-- @treturn string path of the report
function M.write(folder)
  local run = M.read(folder)
  local charts = M.charts(run)
  fs.mkdir(folder .. "/plots")
  local parts = { "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>",
    svg.escape(run.recipe.name or folder),
    "</title><style>", style, "</style></head><body><h1>", svg.escape(run.recipe.name or folder), "</h1>" }
  if run.recipe.about then parts[#parts + 1] = "<p>" .. svg.escape(run.recipe.about) .. "</p>" end
  local needles = needle_evals(run)
  if #needles > 1 then
    parts[#parts + 1] = ("<p>Needle score: <b>%.1f %%</b> before, <b>%.1f %%</b> after.</p>")
      :format(100 * needles[1].result.score, 100 * needles[#needles].result.score)
  end
  parts[#parts + 1] = "<h2>Stages</h2>" .. html_table(stage_rows(run))
  parts[#parts + 1] = '<h2>Charts</h2><div class="charts">'
  for _, c in ipairs(charts) do
    fs.write(("%s/plots/%s.svg"):format(folder, c.name), c.svg)
    parts[#parts + 1] = ("<figure>%s<figcaption>%s</figcaption></figure>"):format(c.svg, svg.escape(c.caption or ""))
  end
  parts[#parts + 1] = "</div>"
  local last = run.sparsity[#run.sparsity]
  if last and last.compare then
    local rows = { { "attention", "loss on one held-out batch", "difference" } }
    for _, kind in ipairs { "sparse", "dense", "frozen" } do
      local v = last.compare[kind]
      if v then rows[#rows + 1] = { kind, ("%.4f"):format(v), ("%+.4f"):format(v - last.compare.sparse) } end
    end
    parts[#parts + 1] = "<h2>The same batch under other attention</h2>" .. html_table(rows)
  end
  local source = fs.read(folder .. "/recipe.lua")
  if source then parts[#parts + 1] = "<h2>Recipe</h2><pre>" .. svg.escape(source) .. "</pre>" end
  parts[#parts + 1] = "</body></html>\n"
  local path = folder .. "/report.html"
  fs.write(path, table.concat(parts))
  return path
end

---- The closing page -----------------------------------------------------------------------------

--- Print what a run has shown, write its report, and say what to try next. (Standard output: results.)
function M.finish(run)
  local folder = run.folder
  local path = M.write(folder)
  local data = M.read(folder)
  local out = { "" }
  local function say(...) out[#out + 1] = string.format(...) end
  local needles = needle_evals(data)
  if #needles > 0 then
    local first, last = needles[1], needles[#needles]
    local blocks = { heatmap.text(last.result, ("after: %.0f %%"):format(100 * last.result.score)) }
    if first ~= last then
      table.insert(blocks, 1, heatmap.text(first.result, ("before: %.0f %%"):format(100 * first.result.score)))
    end
    say("%s", term.paint("bold",
      ("Needle in a haystack, %d digits, exact match, depth x length"):format(last.result.digits or 0)))
    say("%s", heatmap.beside(blocks))
    say("")
  end
  for i = #data.evals, 1, -1 do
    if data.evals[i].name == "ppl" then
      say("%s", term.paint("bold", "Validation perplexity by position"))
      local rows, columns = { { "context" } }, {}
      for _, row in ipairs(data.evals[i].result.rows) do
        local line = { term.context(row.length) }
        for _, b in ipairs(row.curve or {}) do
          local label = term.context(math.max(1, b.from)) .. "+"
          if not columns[label] then
            columns[label] = #rows[1] + 1
            rows[1][#rows[1] + 1] = label
          end
          line[columns[label]] = ("%.2f"):format(b.ppl)
        end
        for c = 1, #rows[1] do line[c] = line[c] or "" end
        rows[#rows + 1] = line
      end
      for _, row in ipairs(rows) do
        for c = 1, #rows[1] do row[c] = row[c] or "" end
      end
      say("%s", term.table(rows))
      say("")
      break
    end
  end
  say("%s", term.paint("bold", "Stages"))
  say("%s", term.table(stage_rows(data)))
  local last = data.sparsity[#data.sparsity]
  if last and last.compare and last.compare.dense then
    say("")
    say("dense against sparse on one held-out batch: %.4f and %.4f (difference %+.4f)", last.compare.dense,
      last.compare.sparse, last.compare.sparse - last.compare.dense)
  end
  say("")
  say("report  %s   (charts as SVG in %s/plots)", path, folder)
  local checkpoint = require("halo.checkpoint").latest(folder .. "/ckpt")
  say("next    halo repl %s", checkpoint or folder)
  say("        halo eval niah %s --lengths 1K,4K,8K", checkpoint or folder)
  say("        halo plot %s --what sparsity", folder)
  io.stdout:write(table.concat(out, "\n"), "\n")
  io.stdout:flush()
end

return M
