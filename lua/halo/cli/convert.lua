--- `halo convert IN OUT`: weights to a Hugging Face folder, text to tokens.
local errors = require "halo.errors"
local fs = require "halo.fs"
local term = require "halo.term"

local M = {
  name = "convert",
  summary = "Write a checkpoint or model as a Hugging Face folder, or pack text into a token file.",
  example = "halo convert runs/2026-01-31-120000-tiny out/model --dtype bf16 --verify",
}

function M.define(command)
  command:argument("input", "a run, a checkpoint, a model folder; or text: a .txt or .jsonl file, a folder")
  command:argument("output", "the folder to write; for text, the token file")
  command:option("--dtype", "of the weights in the output"):choices { "f32", "bf16", "f16" }
  command:option("--tokenizer -t", "for text: folder of the tokenizer, or byte"):argname "DIR"
  command:option("--field", "for .jsonl: the member that holds the text"):default "text":argname "NAME"
  command:flag("--verify", "read the output back and compare: logits of a fixed prompt, or all tokens' hash")
end

local function pack_text(options)
  if not options.tokenizer then
    errors.raise("usage", "text needs a tokenizer: --tokenizer DIR, or --tokenizer byte", 0)
  end
  local tokenizer = require "halo.tokenizer"
  local tok = options.tokenizer == "byte" and tokenizer.byte {} or tokenizer.load(options.tokenizer)
  local stats = require("halo.data.pack").pack { from = options.input, to = options.output, tokenizer = tok,
    format = options.input:match "%.jsonl$" and "jsonl" or "text", field = options.field }
  if options.verify then
    local t = require("halo.data.tokens").open(options.output, { verify = true })
    t:check_tokenizer(tok)
    if t.count ~= stats.tokens then
      errors.raise("data", ("%s holds %d tokens, %d were written"):format(options.output, t.count, stats.tokens), 0)
    end
  end
  print(("%s: %s tokens in %d documents, %s"):format(options.output, term.count(stats.tokens), stats.documents,
    term.bytes(fs.stat(options.output).size)))
end

-- Logits of a fixed prompt as numbers, for comparing two models.
local function logits_of(m, attending)
  local autograd, memory = require "halo.autograd", require "halo.memory"
  local ids = {}
  for i = 1, 32 do ids[i] = (i * 7919) % m.config.vocab end
  return autograd.no_grad(function()
    return memory.scope(function()
      attending:set_context(#ids, 1)
      local local_ids, positions = attending:cut(ids)
      local run = { attend = function(l, q, k, v) return attending:attend(l, q, k, v) end }
      run.cos, run.sin = m:positions(positions, #ids)
      return m:logits(local_ids, run):cast("f64"):host()
    end)
  end), #ids * m.config.vocab
end

local function largest_difference(a, b, n)
  local worst, scale = 0, 0
  for i = 0, n - 1 do
    worst, scale = math.max(worst, math.abs(a[i] - b[i])), math.max(scale, math.abs(a[i]))
  end
  return worst, scale
end

-- Files that make the folder usable elsewhere: those of the tokenizer.
local function tokenizer_of(folder, output)
  for _, name in ipairs { "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "generation_config.json" } do
    local text = fs.read(fs.join(folder, name))
    if text then fs.write(fs.join(output, name), text) end
  end
end

local function convert_model(options)
  local model = require "halo.model"
  local folder = options.input
  if not fs.is_file(folder .. "/config.json") then
    folder = require("halo.checkpoint").latest(options.input)
    if not folder then errors.raise("data", options.input .. " holds no checkpoint yet", 0) end
  end
  local m = model.from_hf(folder, { dtype = "f32" })
  model.save_hf(m, options.output, { dtype = options.dtype })
  tokenizer_of(folder, options.output)
  local bytes = 0
  for _, name in ipairs(fs.list(options.output)) do bytes = bytes + fs.stat(fs.join(options.output, name)).size end
  print(("%s: %s parameters, %s"):format(options.output, term.count(m:count()), term.bytes(bytes)))
  if options.verify then
    local attending = require("halo.attending").dense(m.config)
    local again = model.from_hf(options.output, { dtype = "f32" })
    local a, n = logits_of(m, attending)
    local worst, scale = largest_difference(a, (logits_of(again, attending)), n)
    print(("largest logit difference %.2e (largest logit %.2e)"):format(worst, scale))
    -- Eight bits of mantissa through all layers; fp32 comes back as it was.
    local limit = (options.dtype == "bf16" or options.dtype == "f16") and 0.05 * scale or 1e-6 * scale
    if worst > limit then
      errors.raise("data", ("the output differs from the input by more than %.1e"):format(limit), 0)
    end
  end
end

function M.run(options)
  if not fs.exists(options.input) then errors.raise("usage", "there is no " .. options.input, 0) end
  local is_model = fs.is_dir(options.input) and (fs.is_file(options.input .. "/config.json")
    or fs.is_dir(options.input .. "/ckpt") or fs.is_file(options.input .. "/manifest.json"))
  if is_model then return convert_model(options) end
  return pack_text(options)
end

return M
