--- `halo convert IN OUT`: a model folder to another dtype, sharding or place, checked on request.
-- Checkpoints of Halo and folders of Hugging Face are the same kind of folder, so converting is reading
-- one and writing one: names, shapes and the config are compared on the way in, and OUT is what
-- Transformers loads.
local cli = require "halo.cli"
local fs = require "halo.fs"
local term = require "halo.term"

local M = {
  name = "convert",
  summary = "Write a model folder that Transformers loads, from a checkpoint or another folder.",
  example = "halo convert runs/tiny/ckpt/step-200 models/tiny --dtype bf16 --verify",
}

function M.define(command)
  command:argument("from", "a checkpoint or Hugging Face folder")
  command:argument("to", "the folder to write; must not exist")
  command:option("--dtype -d", "of the weights"):choices { "f32", "bf16" }
  command:option("--shard", "largest shard, GiB"):convert(cli.count):argname "N"
  command:flag("--verify", "load both and compare their logits")
end

-- Files beside the weights that belong to the model: its tokenizer and generation settings.
local beside = { "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model",
  "special_tokens_map.json", "generation_config.json" }

-- Largest difference of logits on a fixed run of ids.
local function compare(a, b)
  local attending = require "halo.attending"
  local autograd = require "halo.autograd"
  local n = math.min(256, a.config.context)
  local ids = {}
  for i = 1, n do ids[i] = (i * 7919) % a.config.vocab end
  local function logits(m)
    return autograd.no_grad(function()
      local attend = attending.dense(m.config)
      attend:set_context(n, 1)
      local local_ids, positions = attend:cut(ids)
      local run = { attend = function(l, q, k, v) return attend:attend(l, q, k, v) end }
      run.cos, run.sin = m:positions(positions)
      return m:logits(local_ids, run):cast "f32"
    end)
  end
  return (logits(a) - logits(b)):abs():max():item()
end

function M.run(options)
  local model = require "halo.model"
  if fs.exists(options.to) then
    io.stderr:write(("halo: %s exists; convert writes a new folder\n"):format(options.to))
    return 2
  end
  local source = model.from_hf(options.from, { dtype = "f32" })
  local files = {}
  for _, name in ipairs(beside) do files[name] = fs.read(options.from .. "/" .. name) end
  local stem = options.to .. ".part"
  model.save_hf(source, stem, { dtype = options.dtype, files = files,
    max_shard_bytes = options.shard and options.shard * 2 ^ 30 or nil })
  fs.rename(stem, options.to)
  io.stdout:write(("%s: %d tensors, %s parameters\n"):format(options.to, #source.parameters, term.count(source:count())))
  if options.verify then
    local difference = compare(source, model.from_hf(options.to, { dtype = "f32" }))
    io.stdout:write(("largest difference of logits on 256 tokens: %.3g\n"):format(difference))
  end
  return 0
end

return M
