--- The log of a run: one console line people read, one JSON object a step for programs, TensorBoard
-- events, and notes.
--
-- Files in the run folder: train.jsonl (every step and event, rank 0), tb/ (scalars), and for each rank
-- logs/rank-NN.jsonl (what that rank measured itself). Writers buffer; files are flushed at most once a
-- second and at every event, off the step's path.
--
-- Console line, fixed order, colour only on a terminal:
--   step 120/2000 6% | loss 2.1234 (z -0.4) | gnorm 0.81 | lr 3.0e-4 | ctx 8K | 0.52 s | 15.8K tok/s |
--   mfu 41 % | density 6.1% recall 97.8% | ring bal 1.04 comm 3% | mem 0.4 GiB | eta 3m
local json = require "halo.json"
local fs = require "halo.fs"
local progress = require "halo.progress"
local term = require "halo.term"
local tensorboard = require "halo.tensorboard"

local Log = {}
Log.__index = Log

local M = {}

--- Open (or reopen, when resumed) the log of a run.
-- @tparam table o `dir` run folder, `rank`, `name`, `total_steps`, `resumed`, `quiet` (no console)
function M.open(o)
  local self = setmetatable({ dir = o.dir, rank = o.rank, name = o.name, total_steps = o.total_steps,
    quiet = o.quiet or o.rank ~= 0, started = progress.clock(), last_flush = 0, last_line = 0,
    line_every = term.is_tty(2) and 1 or 5, first_step = nil }, Log)
  fs.mkdir(o.dir .. "/logs")
  self.rank_file = assert(io.open(("%s/logs/rank-%02d.jsonl"):format(o.dir, o.rank), "ab"))
  if o.rank == 0 then
    self.path = o.dir .. "/train.jsonl"
    self.file = assert(io.open(self.path, "ab"))
    self.board = tensorboard.open(o.dir .. "/tb")
  end
  return self
end

--- After a resume: drop records of steps that will be done again, so that the file holds each step once.
function Log:rewind(step)
  if self.rank ~= 0 then return end
  self.file:close()
  local kept = {}
  for line in (fs.read(self.path) or ""):gmatch "[^\n]+" do
    local ok, record = pcall(json.decode, line)
    if ok and not (record.step and record.step > step) then kept[#kept + 1] = line .. "\n" end
  end
  fs.write(self.path, table.concat(kept))
  self.file = assert(io.open(self.path, "ab"))
end

local function say(self, text)
  if not self.quiet then io.stderr:write(text, "\n") end
end

local function append(self, record)
  if self.file then self.file:write(json.encode(record), "\n") end
end

local function flush(self, force)
  local now = progress.clock()
  if not force and now - self.last_flush < 1 then return end
  self.last_flush = now
  if self.file then self.file:flush() end
  if self.board then self.board:flush() end
  self.rank_file:flush()
end

--- What is about to run: model, ranks, stages.
function Log:header(job)
  self.total_tokens = job.recipe.total.tokens
  self.peak_flops = job.peak_flops
  if self.quiet then return end
  local rows = { { "stage", "context", "batch", "steps", "tokens", "attention" } }
  for _, s in ipairs(job.stages) do
    local a = s.attention
    rows[#rows + 1] = { s.name, term.context(s.context), s.batch, s.steps,
      term.count(s.steps * s.batch * s.context), a.type .. ", " .. a.ring.type .. " " .. a.ring.layout }
  end
  say(self, term.paint("bold", "halo run " .. self.name, 2) .. "  " .. self.dir)
  say(self, tostring(job.model))
  say(self, ("%d rank%s: dp %d x cp %d, %s"):format(job.comm:size(), job.comm:size() == 1 and "" or "s",
    job.dp, job.cp, job.comm:name()))
  say(self, term.table(rows))
end

local function percent(x) return x and ("%.1f%%"):format(100 * x) or "-" end

-- On a terminal that is too narrow for all of them, parts go in this order; a wrapped line reads worse.
local least_needed = { "data", "mem", "mfu", "gnorm", "lr", "ring bal", "ctx", "density" }

local function fit(parts, columns)
  local function width() return term.length(table.concat(parts, " | ")) end
  for _, word in ipairs(least_needed) do
    for i = #parts, 1, -1 do
      if width() > columns and parts[i]:sub(1, #word + 1) == word .. " " then table.remove(parts, i) end
    end
  end
  return table.concat(parts, " | ")
end

-- The line of a record.
local function line(self, r)
  -- Tokens to go at the pace of the last steps: stages differ in steps but little in tokens per second.
  local eta = self.total_tokens and (self.total_tokens - r.tokens) / self.pace or 0
  local parts = {
    ("step %d/%d %.0f%%"):format(r.step, self.total_steps, 100 * r.step / self.total_steps),
    ("loss %.4f%s"):format(r.loss, r.z and (" (z %+.1f)"):format(r.z) or ""),
    ("gnorm %.2f"):format(r.gnorm), ("lr %.1e"):format(r.lr), "ctx " .. term.context(r.context),
    ("%.2f s"):format(r.dt), term.count(r.tok_s) .. " tok/s",
  }
  if self.peak_flops then
    parts[#parts + 1] = ("mfu %.0f%%"):format(100 * r.flops / r.dt / self.peak_flops)
  end
  parts[#parts + 1] = ("density %s%s"):format(percent(r.density), r.recall and " recall " .. percent(r.recall) or "")
  parts[#parts + 1] = ("ring bal %.2f comm %.0f%%"):format(r.balance or 1, 100 * (r.comm_s or 0) / r.dt)
  parts[#parts + 1] = ("data %.1f%%"):format(100 * (r.data_s or 0) / r.dt)
  parts[#parts + 1] = "mem " .. term.bytes(r.mem or 0)
  parts[#parts + 1] = "eta " .. term.duration(eta)
  return term.is_tty(2) and fit(parts, term.width(2)) or table.concat(parts, " | ")
end

--- Write the console line of the last step.
function Log:console()
  if self.last and not self.quiet and self.printed ~= self.last.step then
    say(self, line(self, self.last))
    self.printed = self.last.step
  end
end

--- Record a step. The console shows a line now and then: once a second on a terminal, every five
-- seconds in a file, and whenever the recipe's `log` action says so.
function Log:step(r)
  self.first_step = self.first_step or r.step
  self.pace = self.pace and 0.9 * self.pace + 0.1 * r.tok_s or r.tok_s
  r.kind = "step"
  if self.peak_flops then r.mfu = r.flops / r.dt / self.peak_flops end
  append(self, r)
  self.rank_file:write(json.encode { step = r.step, dt = r.dt, comm_s = r.comm_s, data_s = r.data_s, mem = r.mem },
    "\n")
  if self.board then
    local scalars = {}
    for _, name in ipairs { "loss", "gnorm", "lr", "tok_s", "density", "recall", "balance", "dt", "mem", "missed",
      "mfu", "context" } do
      local v = r[name]
      if type(v) == "number" and v == v then scalars["train/" .. name] = v end
    end
    self.board:scalars(r.step, scalars)
  end
  self.last = r
  local now = progress.clock()
  if r.step == self.first_step or now - self.last_line >= self.line_every then
    self.last_line = now
    self:console()
  end
  flush(self)
end

--- Hand everything to the system. Before a checkpoint: a run resumed from it does not write these steps
-- again.
function Log:flush() flush(self, true) end

--- Record something that is not a step: `kind` names it.
function Log:event(e)
  e.time = os.time()
  append(self, e)
  flush(self, true)
end

--- Per-layer, per-head sparsity: an event, scalars, and a short table of the layers.
function Log:sparsity(e)
  self:event(e)
  if self.board then
    for _, h in ipairs(e.heads) do
      local scalars = {}
      for _, name in ipairs { "density", "recall", "missed", "starved" } do
        if h[name] then scalars[("sparsity/%s/layer%02d.head%02d"):format(name, h.layer, h.head)] = h[name] end
      end
      self.board:scalars(e.step, scalars)
    end
  end
  if self.quiet then return end
  local by_layer, order = {}, {}
  for _, h in ipairs(e.heads) do
    if not by_layer[h.layer] then
      by_layer[h.layer] = {}
      order[#order + 1] = h.layer
    end
    table.insert(by_layer[h.layer], h)
  end
  local rows = { { "layer", "density", "recall min", "recall mean", "no far gradient", ("in %d steps"):format(e.over),
    "worker", "critical" } }
  for i, layer in ipairs(order) do
    local list, b = by_layer[layer], e.balance[i] or {}
    local function mean(name)
      local sum, n = 0, 0
      for _, h in ipairs(list) do
        if h[name] then sum, n = sum + h[name], n + 1 end
      end
      return n > 0 and sum / n or nil
    end
    local worst
    for _, h in ipairs(list) do
      if h.recall and (not worst or h.recall < worst) then worst = h.recall end
    end
    rows[#rows + 1] = { layer, percent(mean "density"), percent(worst), percent(mean "recall"), percent(mean "missed"),
      percent(mean "starved"), b.worker and ("%.2f"):format(b.worker) or "-", b.critical
        and ("%.2f"):format(b.critical) or "-" }
  end
  say(self, ("sparsity at step %d, context %s, far = %s tokens"):format(e.step, term.context(e.context),
    term.count(e.far)))
  say(self, term.table(rows))
  if e.compare then
    local text = { ("sparse %.4f"):format(e.compare.sparse) }
    for _, kind in ipairs { "dense", "frozen" } do
      if e.compare[kind] then
        text[#text + 1] = ("%s %.4f (%+.4f)"):format(kind, e.compare[kind], e.compare[kind] - e.compare.sparse)
      end
    end
    say(self, "loss on one held-out batch: " .. table.concat(text, ", "))
  end
end

--- A result of an evaluation.
function Log:result(name, step, moment, result)
  self:event { kind = "eval", name = name, step = step, moment = moment, result = result }
  local found, suite = pcall(require, "halo.eval." .. name)
  if found and suite.text and not self.quiet then
    say(self, ("%s, %s step %d"):format(name, moment, step))
    say(self, suite.text(result))
  end
end

function Log:note(text)
  append(self, { kind = "note", text = text, time = os.time() })
  say(self, text)
end

function Log:warn(text)
  append(self, { kind = "warning", text = text, time = os.time() })
  say(self, term.paint("yellow", "warning: ", 2) .. text)
end

function Log:close()
  flush(self, true)
  if self.file then self.file:close() end
  if self.board then self.board:close() end
  self.rank_file:close()
  self.file, self.board = nil, nil
end

return M
