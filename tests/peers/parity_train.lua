--- Halo's side of tests/peers/parity_train.py: train a model folder on given batches, write the losses.
--    halo exec tests/peers/parity_train.lua settings.json
local attending = require "halo.attending"
local decoder = require "halo.model.decoder"
local ffi = require "ffi"
local fs = require "halo.fs"
local json = require "halo.json"
local memory = require "halo.memory"
local model = require "halo.model"
local optim = require "halo.optim"
local progress = require "halo.progress"
local tensor = require "halo.tensor"

local o = json.read((...))
local m = model.from_hf(o.model, { dtype = o.dtype, device = o.device })
local opt = optim.adamw(m.parameters, { betas = { 0.9, 0.95 }, eps = 1e-8, decay = 0.1, clip = 1.0 })
local attend = attending.dense(m.config, nil, o.device)
attend:set_context(o.tokens, o.batch)

local text = fs.read(o.batches)
local all = ffi.cast("const int32_t *", text)
local per_step = o.batch * o.tokens
assert(#text == 4 * per_step * o.steps, "batches have another size")

local function on_device(values) -- int32_t[batch * tokens]
  return tensor.from_pointer(values, { shape = { o.batch, o.tokens }, dtype = "i32", device = o.device })
end

-- Ids of a step, and each position's next id as its label; the last one has none.
local function batch_of(step)
  local ids, labels = all + (step - 1) * per_step, ffi.new("int32_t[?]", per_step)
  for i = 0, per_step - 1 do labels[i] = i % o.tokens < o.tokens - 1 and ids[i + 1] or -100 end
  return on_device(ids), on_device(labels)
end

local positions = tensor.arange { count = o.tokens, dtype = "i32", device = o.device }:reshape { 1, o.tokens }
local out = { losses = {}, norms = {}, seconds = {} }
for step = 1, o.steps do
  local started = progress.clock()
  opt:zero_grad()
  attend:begin {}
  memory.scope(function()
    local ids, labels = batch_of(step)
    local run = { recompute = o.recompute, mlp_chunk = decoder.mlp_chunk[o.device] }
    function run.attend(layer, q, k, v) return attend:attend(layer, q, k, v) end
    run.cos, run.sin = m:positions(positions, o.tokens)
    local sum, count = m:loss(ids, labels, run)
    sum:backward()
    local n = count:item()
    out.losses[step] = sum:item() / n
    out.norms[step] = opt:step { step = step, lr = o.lr, scale = 1 / n }
  end)
  out.seconds[step] = progress.clock() - started
end
out.peak_bytes = memory.peak(nil, o.device)
json.write(o.out, out)
