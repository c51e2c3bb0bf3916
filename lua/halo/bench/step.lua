--- One training step: where the time goes, and how near it is to the time that its products alone would
-- take. On the CPU beside plain BLAS, as below; on a device beside a large product of its own, with times
-- from the device's clock (halo.device_step).
--
--    bound = sum over all products of (calls x best sgemm time of that shape), measured between steps
--          + flops of attention / best sgemm rate seen
--    share = bound / best step
--
-- On a machine that others use, the best of a product (a tenth of a second) finds a quiet moment sooner
-- than the best of a step does; the same ratio of means is printed beside it.
--
-- Shapes: gpt2-124m is GPT-2 small's (12 layers, width 768, 12 heads, vocabulary 50257, T = 1024, B = 4; on a
-- device B = 64 and a vocabulary of 50304, a multiple of 64 as llm.c pads it) with a gated MLP of 2048, which
-- has as many weights as GPT-2's of 3072. qwen2.5-3b is that model with random weights, blocks recomputed.
--
-- halo bench step                                        124 M parameters on the CPU
-- halo bench step device=cuda model=qwen2.5-3b tokens=32768
-- halo bench step device=cuda deterministic=true         sums in a fixed order, as recipes have them by default
local args = require "halo.args"
local attending = require "halo.attending"
local bench = require "halo.bench"
local devices = require "halo.device"
local errors = require "halo.errors"
local ffi = require "ffi"
local memory = require "halo.memory"
local model = require "halo.model"
local optim = require "halo.optim"
local tensor = require "halo.tensor"
local term = require "halo.term"
local trace = require "halo.trace"

local M = {
  name = "step",
  summary = "one training step: tokens/s, share of each op, peak memory",
  options = { model = { "string", "gpt2-124m" }, device = { "string", "cpu" }, layers = "int?", width = "int?",
    heads = "int?", kv_heads = "int?", head_dim = "int?", ffn = "int?", vocab = "int?", batch = "int?",
    tokens = "int?", steps = { "int", 3 }, recompute = "boolean?", offload = { "boolean", false },
    dtype = "string?", lr = { "number", 3e-4 }, deterministic = { "boolean", false } },
}

local shapes = {
  ["gpt2-124m"] = { family = "llama", layers = 12, width = 768, heads = 12, ffn = 2048, vocab = 50257, batch = 4,
    tokens = 1024, recompute = false, on_device = { batch = 64, vocab = 50304 } },
  ["qwen2.5-3b"] = { family = "qwen2", layers = 36, width = 2048, heads = 16, kv_heads = 2, head_dim = 128,
    ffn = 11008, vocab = 151936, batch = 1, tokens = 32768, recompute = true },
}

-- Options with what the shape and the device say where the user does not.
local function complete(o)
  local shape = shapes[o.model]
  if not shape then
    errors.raise("usage", ("bench step: no shape %q%s"):format(o.model, args.did_you_mean(o.model, args.keys(shapes))),
      0)
  end
  local out = { on_device = nil }
  for name, value in pairs(shape) do out[name] = value end
  for name, value in pairs(o.device ~= "cpu" and shape.on_device or {}) do out[name] = value end
  for name, value in pairs(o) do out[name] = value end
  out.dtype = out.dtype or (o.device == "cpu" and "f32" or "bf16")
  return out
end

local function build(o)
  local config = model.config { family = o.family, layers = o.layers, width = o.width, heads = o.heads,
    kv_heads = o.kv_heads, head_dim = o.head_dim, ffn = o.ffn, vocab = o.vocab, context = o.tokens, tie = true }
  return memory.with_tag("weights", model.build, config, { dtype = o.dtype, device = o.device })
end

-- A batch of random tokens; content does not matter for time.
local function batch_of(o)
  local function random(seed)
    return tensor.uniform { o.batch, o.tokens, lo = 0, hi = o.vocab, seed = seed, device = "cpu" }:cast("i32")
      :to(o.device)
  end
  local positions = tensor.arange { count = o.tokens, dtype = "i32", device = o.device }:reshape { 1, o.tokens }
  return random(1), random(2), positions
end

-- Products of a step as { m, n, k, form, count }: every linear has one forward and two backward.
local function products(c, o)
  local rows, list = o.batch * o.tokens, {}
  local function linear(n, k, count, tokens)
    local chunks = math.ceil(rows / (tokens or rows))
    local m = math.ceil(rows / chunks)
    list[#list + 1] = { m = m, n = n, k = k, tb = true, count = count * chunks, forward = true }
    list[#list + 1] = { m = m, n = k, k = n, count = count * chunks }
    list[#list + 1] = { m = n, n = k, k = m, ta = true, beta = 1, count = count * chunks }
  end
  linear(c.heads * c.head_dim, c.width, o.layers)
  linear(c.kv_heads * c.head_dim, c.width, 2 * o.layers)
  linear(c.width, c.heads * c.head_dim, o.layers)
  linear(c.ffn, c.width, 2 * o.layers)
  linear(c.width, c.ffn, o.layers)
  linear(c.vocab, c.width, 1, math.max(1, math.floor(c.width / 2)))
  return list
end

-- Keeps the best sgemm time of each product in p.seconds, and all of them in p.sum and p.times. Products of
-- the same shape are timed once.
local function time_products(list, buffers)
  local done = {}
  for _, p in ipairs(list) do
    local key = ("%d %d %d %s %s"):format(p.m, p.n, p.k, tostring(p.ta), tostring(p.tb))
    if not done[key] then
      local start = bench.clock()
      bench.sgemm { c = buffers.c, a = buffers.a, b = buffers.b, m = p.m, n = p.n, k = p.k, ta = p.ta, tb = p.tb,
        beta = p.beta }
      done[key] = bench.clock() - start
    end
    p.seconds = math.min(p.seconds or math.huge, done[key])
    p.sum, p.times = (p.sum or 0) + done[key], (p.times or 0) + 1
  end
end

-- Room for the largest operands.
local function yardstick_buffers(list)
  local a, b, c = 1, 1, 1
  for _, p in ipairs(list) do
    a, b, c = math.max(a, p.m * p.k), math.max(b, p.k * p.n), math.max(c, p.m * p.n)
  end
  local held = { tensor.normal { a, std = 0.1 }, tensor.normal { b, std = 0.1 }, tensor.zeros { c } }
  return { held = held, a = ffi.cast("float *", held[1]:pointer()), b = ffi.cast("float *", held[2]:pointer()),
    c = ffi.cast("float *", held[3]:pointer()) }
end

local function step_once(self)
  local o, m, opt = self.o, self.model, self.optimizer
  opt:zero_grad()
  self.attend:begin {}
  local loss = memory.with_tag("activations", memory.scope, function()
    local run = { recompute = o.recompute, offload = o.offload, mlp_chunk = model.decoder.mlp_chunk[o.device] }
    function run.attend(layer, q, k, v) return self.attend:attend(layer, q, k, v) end
    run.cos, run.sin = m:positions(self.positions, o.tokens)
    local sum, count = m:loss(self.ids, self.labels, run)
    sum:backward()
    return sum:item() / count:item()
  end)
  opt:step { lr = o.lr, scale = 1 / (o.batch * o.tokens), clip = 1 }
  return loss
end

-- Rows of the table from the totals of the trace, per step.
local function rows_of(totals, steps, step_seconds)
  local rows, data, traced = {}, {}, 0
  for _, r in ipairs(totals) do
    local seconds = r.self_seconds / steps
    traced = traced + seconds
    if seconds / step_seconds >= 0.001 then
      rows[#rows + 1] = { r.name, ("%d"):format(r.calls / steps), ("%.1f"):format(1e3 * seconds),
        ("%.1f%%"):format(100 * seconds / step_seconds),
        r.flops > 0 and ("%.1f"):format(1e-9 * r.flops / r.self_seconds) or "",
        r.bytes > 0 and ("%.1f"):format(1e-9 * r.bytes / r.self_seconds) or "" }
    end
    data[#data + 1] = { name = r.name, calls = r.calls / steps, seconds = seconds, share = seconds / step_seconds,
      flops = r.flops / steps, bytes = r.bytes / steps }
  end
  local rest = step_seconds - traced
  rows[#rows + 1] = { "everything else", "", ("%.1f"):format(1e3 * rest),
    ("%.1f%%"):format(100 * rest / step_seconds), "", "" }
  data[#data + 1] = { name = "everything else", seconds = rest, share = rest / step_seconds }
  return rows, data
end

--- A model, its optimizer and a batch, ready to step: `self:step()` returns the loss.
-- @tparam table o options as of the benchmark
function M.prepare(o)
  o = complete(o)
  devices.require(o.device, 0)
  memory.reset_peak(o.device)
  require("halo.ffi").C.halo_set_deterministic(o.deterministic and 1 or 0)
  local self = { o = o, step = step_once, model = build(o) }
  self.optimizer = optim.adamw(self.model.parameters, { decay = 0.1 })
  self.attend = attending.dense(self.model.config, nil, o.device)
  self.attend:set_context(o.tokens, o.batch)
  if self.attend:local_tokens() ~= o.tokens then
    errors.raise("usage", ("bench step: tokens=%d is no multiple of %d, the block of attention on %s"):format(o.tokens,
      self.attend.block, o.device), 0)
  end
  self.ids, self.labels, self.positions = batch_of(o)
  return self
end

function M.run(o)
  local self = M.prepare(o)
  o = self.o
  if o.device ~= "cpu" then return require("halo.device_step").run(self) end
  local c = self.model.config
  local list = products(c, o)

  step_once(self) -- memory, threads, code
  local peak = { all = memory.peak() }
  for _, tag in ipairs(memory.tags) do peak[tag] = memory.peak(tag) end
  local buffers = yardstick_buffers(list)
  time_products(list, buffers)
  trace.reset()
  local best, total, loss = math.huge, 0, nil
  for _ = 1, o.steps do
    local start = bench.clock()
    loss = step_once(self)
    local seconds = bench.clock() - start
    best, total = math.min(best, seconds), total + seconds
    time_products(list, buffers)
  end
  local rows, data = rows_of(trace.totals(), o.steps, total / o.steps)

  -- Recomputing repeats each layer's forward products.
  local bound, mean_bound, flops, rate = 0, 0, 0, 0
  for _, p in ipairs(list) do
    local count = p.count * (o.recompute and p.forward and p.n ~= c.vocab and 2 or 1)
    bound, flops = bound + count * p.seconds, flops + count * 2 * p.m * p.n * p.k
    mean_bound = mean_bound + count * p.sum / p.times
    rate = math.max(rate, 2 * p.m * p.n * p.k / p.seconds)
  end
  -- Two products forward, five backward (one of them the scores again), half of the square.
  local attention = (o.recompute and 9 or 7) * o.batch * o.tokens ^ 2 * c.heads * c.head_dim * o.layers
  mean_bound = mean_bound * (1 + attention / rate / bound)
  bound = bound + attention / rate
  local tokens = o.batch * o.tokens
  local result = { parameters = self.model:count(), tokens = tokens, best_seconds = best,
    mean_seconds = total / o.steps, tokens_per_second = tokens / best, product_flops = flops,
    attention_flops = attention, bound_seconds = bound, share = bound / best,
    mean_share = mean_bound * o.steps / total, peak_bytes = peak, loss = loss,
    rows = data }
  local by_tag = {}
  for _, tag in ipairs(memory.tags) do
    if peak[tag] > 2 ^ 20 then by_tag[#by_tag + 1] = tag .. " " .. term.bytes(peak[tag]) end
  end
  return bench.result(result, {
    title = ("Training step: %s, T = %d, B = %d%s"):format(tostring(self.model), o.tokens, o.batch,
      o.recompute and ", recompute" or ""),
    columns = { "op", "calls", "ms", "share", "GFLOP/s", "GB/s" }, rows = rows,
    notes = {
      ("step: best %.2f s, mean %.2f s; %.0f tokens/s; loss %.4f"):format(best, total / o.steps, tokens / best, loss),
      ("products of a step: %.2f TFLOP, %.2f s by OpenBLAS in this run; with attention (%.2f TFLOP) %.2f s")
        :format(flops * 1e-12, bound - attention / rate, attention * 1e-12, bound),
      ("the step runs at %.0f%% of that bound (mean step beside mean products: %.0f%%)"):format(100 * bound / best,
        100 * mean_bound * o.steps / total),
      ("peak memory %s (each tag's own peak: %s)"):format(term.bytes(peak.all), table.concat(by_tag, ", ")),
    },
  })
end

return M
