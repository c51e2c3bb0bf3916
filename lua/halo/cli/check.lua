--- `halo check RECIPE`: read, resolve and price a recipe without running it.
local cli = require "halo.cli"
local term = require "halo.term"

local M = {
  name = "check",
  summary = "Check a recipe and say what it will cost, without running it.",
  example = "halo check recipes/tiny.lua --ranks 32",
}

function M.define(command)
  command:argument("recipe", "a recipe file, or the name of one in recipes/")
  command:argument("overrides", "changes to it, as optim.lr=1e-4"):args "*"
  command:option("--ranks -n", "as if there were N ranks; sets mesh.cp"):convert(cli.count):argname "N"
  command:flag("--json", "the resolved recipe and the forecast as JSON")
end

local function attention_text(a, context)
  if a.dense and a.dense.below > context then return "dense (below " .. term.context(a.dense.below) .. ")" end
  local text = a.type
  if a.keep then
    text = text .. (a.keep.type == "mass" and (" mass %g"):format(a.keep.share)
      or (" %d columns, %d diagonals"):format(a.keep.verticals, a.keep.slashes))
  elseif a.window then
    text = text .. " " .. a.window
  end
  if a.dense and #a.dense.layers > 0 then text = text .. ", dense layers " .. table.concat(a.dense.layers, ",") end
  return text .. (a.frozen and ", frozen" or "")
end

local function rate_text(lr)
  local text = ("%g"):format(lr.peak)
  if lr.steps > 0 then text = ("0 > %s in %d"):format(text, lr.steps) end
  if lr.decay ~= "constant" then text = ("%s, %s to %g"):format(text, lr.decay, lr.to) end
  return text
end

local function rope_text(rope)
  return rope.scheme .. (rope.factor and (" x%g"):format(rope.factor) or "")
end

local function stage_table(resolved)
  local rows = { { "stage", "context", "batch", "steps", "tokens", "positions", "rate", "attention" } }
  for _, s in ipairs(resolved.stages) do
    rows[#rows + 1] = { s.name, term.context(s.context), s.batch, s.steps, term.count(s.tokens), rope_text(s.rope),
      rate_text(s.lr), attention_text(s.attention, s.context) }
  end
  return term.table(rows)
end

local function cost_table(resolved, forecast)
  local rows = { { "stage", "weights", "gradients", "optimizer", "activations", "ring", "total", "flops/step",
    "sent/step" } }
  for i, s in ipairs(resolved.stages) do
    local f = forecast.stages[i]
    local function bytes(name) return term.bytes(f.memory[name]) end
    local exact = f.flops.density_at_most == 1
    rows[#rows + 1] = { s.name, bytes "weights", bytes "gradients", bytes "optimizer", bytes "activations",
      bytes "ring", bytes "total", (exact and "" or "< ") .. term.count(f.flops.at_most),
      f.traffic.total > 0 and term.bytes(f.traffic.total) or "-" }
  end
  return term.table(rows)
end

-- Actions that only running can check.
local function unchecked(resolved)
  local lines = {}
  for _, cadence in ipairs(resolved.every) do
    for _, action in ipairs(cadence.actions) do
      if action.type == "function" then
        lines[#lines + 1] = ("every %d steps a function of line %d runs; nobody can check it before"):format(
          cadence.steps, action.line)
      end
    end
  end
  return lines
end

local function machine_memory()
  local text = require("halo.fs").read "/proc/meminfo"
  local kib = text and tonumber(text:match "MemTotal:%s+(%d+)")
  return kib and kib * 1024
end

function M.run(options)
  local resolved = cli.read_recipe(options)
  local forecast = require("halo.forecast").of(resolved)
  if options.json then
    local json, recipe = require "halo.json", require "halo.recipe"
    print(json.encode({ recipe = json.decode(recipe.to_json(resolved)), forecast = forecast }, { pretty = true }))
    return
  end
  local m, mesh, ring = resolved.model, resolved.mesh, resolved.attention.ring
  print(term.paint("bold", resolved.name) .. "  " .. resolved.file)
  print(("model   %s%s: %d layers, width %d, %d/%d heads of %d, ffn %d, vocabulary %d, %s parameters, %s"):format(
    m.family, m.from and " from " .. m.from or "", m.layers, m.width, m.heads, m.kv_heads, m.head_dim, m.ffn,
    m.vocab, term.count(forecast.parameters), resolved.dtype))
  print(("ranks   %d = dp %d x cp %d, %s ring, %s, blocks of %d tokens"):format(forecast.ranks, mesh.dp, mesh.cp,
    ring.type, ring.layout, ring.block))
  print(("run     %d steps, %s tokens, at most %s flops"):format(resolved.total.steps,
    term.count(resolved.total.tokens),
    term.count(forecast.flops)))
  print()
  print(stage_table(resolved))
  print()
  print "forecast, per rank:"
  print(cost_table(resolved, forecast))
  for _, line in ipairs(unchecked(resolved)) do print("note: " .. line) end
  for i, s in ipairs(resolved.stages) do
    local host = forecast.stages[i].memory.host
    if host > 0 then
      print(("note: stage %s keeps %s of block inputs in pinned host memory"):format(s.name, term.bytes(host)))
    end
  end
  local device = require "halo.device"
  if resolved.device ~= "cpu" and device.count(resolved.device) > 0 then
    local facts = device.facts(resolved.device)
    print(("device  %s, %s%s"):format(facts.name, term.bytes(facts.total),
      forecast.peak.total > facts.total and ": less than this needs" or ""))
  end
  local memory = machine_memory()
  if memory and forecast.peak.total * forecast.ranks > memory and resolved.device == "cpu" then
    print(("note: %d ranks on this machine would need %s, it has %s"):format(forecast.ranks,
      term.bytes(forecast.peak.total * forecast.ranks), term.bytes(memory)))
  end
end

return M
