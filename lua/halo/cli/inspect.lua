--- `halo inspect PATH`: what is in a file or folder.
local errors = require "halo.errors"
local fs = require "halo.fs"
local term = require "halo.term"

local M = {
  name = "inspect",
  summary = "Show what is in a model folder, a checkpoint, a run or a token file.",
  example = "halo inspect models/Qwen2.5-3B",
}

function M.define(command)
  command:argument("path", "a folder with config.json, *.safetensors, a checkpoint, a run, or a token file")
  command:option("--limit", "rows to show (default 20)"):default "20":convert(tonumber):argname "N"
  command:option("--tokenizer -t", "folder of the tokenizer, to show a token file's text"):argname "DIR"
end

local function weights(path, limit)
  local file = require("halo.safetensors").open(path)
  local rows, count, elements = { { "tensor", "dtype", "shape" } }, 0, 0
  for _, name in ipairs(file:names()) do
    local info = file:info(name)
    local n = 1
    for _, size in ipairs(info.shape) do n = n * size end
    count, elements = count + 1, elements + n
    if count <= limit then rows[#rows + 1] = { name, info.code, table.concat(info.shape, " x ") } end
  end
  print(("%s: %d tensors, %s elements"):format(path, count, term.count(elements)))
  print(term.table(rows))
  if count > limit then print(("... %d more (--limit)"):format(count - limit)) end
  file:close()
end

local function model(path, limit)
  local c = require("halo.model").read_config(path)
  print(("%s: %d layers, width %d, %d/%d heads of %d, ffn %d, vocabulary %d, context %s, positions %s%s"):format(
    c.family, c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.ffn, c.vocab, term.context(c.context),
    c.rope.scheme, c.rope.factor and (" x%g"):format(c.rope.factor) or ""))
  weights(path, limit)
end

local function tokens(path, options)
  local t = require("halo.data.tokens").open(path)
  print(("%s: %s tokens in %d documents, vocabulary %d"):format(path, term.count(t.count), t.documents, t.vocab))
  local rows = { { "document", "first token", "tokens", options.tokenizer and "begins" or nil } }
  local tok = options.tokenizer and (options.tokenizer == "byte" and require("halo.tokenizer").byte {}
    or require("halo.tokenizer").load(options.tokenizer))
  for d = 0, math.min(options.limit, t.documents) - 1 do
    local first, n = t:document(d)
    local text = tok and ("%q"):format(tok:decode(t:read(first, math.min(n, 16)), math.min(n, 16)):gsub("%s+", " "))
    rows[#rows + 1] = { d, tonumber(first), tonumber(n), text }
  end
  print(term.table(rows))
end

local function saved(path)
  local found = require("halo.checkpoint").verify(path)
  print(("%s: step %d, written by %d process%s, every file as it was written"):format(found.path, found.step,
    found.world, found.world == 1 and "" or "es"))
  for _, name in ipairs(found.files) do
    local stat = fs.stat(fs.join(found.path, name))
    print(("  %-44s %s"):format(name, stat and term.bytes(stat.size) or ""))
  end
  for _, line in ipairs(found.skipped) do print("  skipped: " .. line) end
end

local function run(path)
  local report = require "halo.report"
  local r = report.read(path)
  local last = r.steps[#r.steps]
  print(("%s: %s"):format(path, r.recipe.name or "run"))
  if last then
    print(("  step %d of %d, loss %.4f, %s tokens"):format(last.step, last.steps, last.loss, term.count(last.tokens)))
  end
  for _, e in ipairs(r.evals) do
    print(("  step %d: %s%s"):format(e.step, e.name, e.result.score and (" %.1f %%"):format(100 * e.result.score)
      or ""))
  end
  if fs.is_dir(path .. "/ckpt") then saved(path) end
end

function M.run(options)
  local path = options.path
  if fs.is_dir(path) then
    if fs.is_file(path .. "/train.jsonl") then return run(path) end
    if fs.is_file(path .. "/manifest.json") then return saved(path) end
    if fs.is_file(path .. "/config.json") then return model(path, options.limit) end
    errors.raise("usage", path .. " is neither a run, nor a checkpoint, nor a model folder", 0)
  end
  if not fs.is_file(path) then errors.raise("usage", "there is no file " .. path, 0) end
  if path:match "%.safetensors$" or path:match "%.index%.json$" then return weights(path, options.limit) end
  return tokens(path, options)
end

return M
