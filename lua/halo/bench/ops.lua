--- Ops bound by memory, at the rate of a plain copy.
-- Times and bytes are what the engine counts for each op, forward and backward apart; the yardstick is
-- `tensor:copy_from`, which reads and writes as fast as the machine can with all threads. With device=cuda
-- the sizes are those of a large model (halo.device_ops).
local bench = require "halo.bench"
local ops = require "halo.ops"
local optim = require "halo.optim"
local tensor = require "halo.tensor"
local trace = require "halo.trace"

local M = {
  name = "ops",
  summary = "memory-bound ops against the copy rate",
  options = { device = { "string", "cpu" }, batch = "int?", tokens = "int?", width = "int?", heads = "int?",
    ffn = "int?", vocab = "int?", adamw = "int?", chunk = "int?", copy = "int?", repeats = { "int", 7 },
    dtype = "string?" },
}

local defaults = {
  cpu = { batch = 4, tokens = 1024, width = 768, heads = 12, ffn = 2048, vocab = 50257, adamw = 20000000,
    dtype = "f32" },
  -- Qwen2.5-3B
  cuda = { batch = 1, tokens = 32768, width = 2048, heads = 16, ffn = 11008, vocab = 151936, adamw = 200000000,
    chunk = 4096, copy = 512 * 2 ^ 20, dtype = "bf16" },
}

-- Cases: name -> function that runs forward and gives the result to differentiate (nil: no backward).
local function cases(o)
  local rows, dtype = o.batch * o.tokens, o.dtype
  local function leaf(...) return tensor.normal { dtype = dtype, requires_grad = true, ... } end
  local x, y, gate, up = leaf(rows, o.width), leaf(rows, o.width), leaf(rows, o.ffn), leaf(rows, o.ffn)
  local scale = tensor.ones { o.width, dtype = dtype, requires_grad = true }
  local table_ = leaf(o.vocab, o.width)
  table_.grad = tensor.zeros { o.vocab, o.width }
  local ids = tensor.uniform { o.batch, o.tokens, lo = 0, hi = o.vocab }:cast "i64"
  local size = o.width / o.heads
  local q = leaf(o.batch, o.tokens, o.heads, size)
  local positions = tensor.arange { count = o.tokens, dtype = "i32" }
  local inv_freq = tensor.full { size / 2, value = 0.01 }
  local cos, sin = ops.rope_table(positions, inv_freq)
  local few = math.min(rows, 512)
  local logits, labels = leaf(few, o.vocab), ids:reshape(rows):slice { to = few }
  return {
    { "embedding", ("[%d,%d], %d ids"):format(o.vocab, o.width, rows),
      function() return ops.embedding(table_, ids) end },
    { "rmsnorm", ("[%d,%d]"):format(rows, o.width), function() return ops.rmsnorm(x, scale) end },
    { "rope", ("[%d,%d,%d,%d]"):format(o.batch, o.tokens, o.heads, size), function() return ops.rope(q, cos, sin) end },
    { "swiglu", ("[%d,%d]"):format(rows, o.ffn), function() return ops.swiglu(gate, up) end },
    { "cross_entropy", ("[%d,%d]"):format(few, o.vocab), function() return (ops.cross_entropy(logits, labels)) end },
    { "add", ("[%d,%d]"):format(rows, o.width), function() return ops.add(x, y) end },
    { "softmax", ("[%d,%d]"):format(few, o.vocab), function() return ops.softmax(logits) end },
  }
end

-- Best seconds and the bytes of a traced name over repeated runs.
local function fastest(names, repeats, f)
  local best = {}
  for r = 0, repeats do
    trace.reset()
    f()
    for _, row in ipairs(trace.totals()) do
      if names[row.name] and r > 0 then
        local b = best[row.name]
        if not b or row.self_seconds < b.seconds then
          best[row.name] = { seconds = row.self_seconds, bytes = row.bytes }
        end
      end
    end
  end
  return best
end

function M.run(o)
  local device = require("halo.device").require(o.device, 0)
  for name, value in pairs(defaults[device]) do
    if o[name] == nil then o[name] = value end
  end
  if device ~= "cpu" then return require("halo.device_ops").run(o) end
  local rows = {}
  local source = tensor.normal { o.batch * o.tokens, o.ffn, dtype = o.dtype }
  local target = tensor.zeros { o.batch * o.tokens, o.ffn, dtype = o.dtype }
  local bytes = 2 * source.count * tensor.dtype_bytes(o.dtype)
  local copy_rate = 0
  local function copy()
    local seconds = bench.fastest(3, function() target:copy_from(source) end)
    copy_rate = math.max(copy_rate, bytes / seconds)
  end

  local measured = {}
  local function note(name, shape, best)
    if not best or best.bytes == 0 then return end -- a backward that moves nothing
    measured[#measured + 1] = { name = name, shape = shape, seconds = best.seconds, bytes = best.bytes }
  end
  for _, case in ipairs(cases(o)) do
    local name, shape, run = unpack(case)
    local forward, backward = "op." .. name, "op." .. name .. ".backward"
    copy()
    local best = fastest({ [forward] = true, [backward] = true }, o.repeats, function()
      local y = run()
      local seed = tensor.ones { shape = y.shape, dtype = y.dtype }
      y:backward(seed)
      y:free()
      seed:free()
    end)
    note(name, shape, best[forward])
    note(name .. ", backward", shape, best[backward])
    collectgarbage()
  end
  local w = tensor.normal { o.adamw, dtype = o.dtype, requires_grad = true }
  local opt = optim.adamw({ w }, { lr = 1e-3 })
  copy()
  local step = fastest({ ["optim.adamw"] = true }, o.repeats, function() opt:step() end)
  note("adamw", ("[%d]"):format(w.count), step["optim.adamw"])
  local norm = bench.fastest(o.repeats, function() opt:grad_norm() end)
  note("gradient norm", ("[%d]"):format(w.count), { seconds = norm, bytes = opt:flat_grad().count * 4 })
  copy()

  for _, m in ipairs(measured) do
    local rate = m.bytes / m.seconds
    rows[#rows + 1] = { m.name, m.shape, ("%.2f"):format(1e3 * m.seconds), ("%.1f"):format(1e-9 * rate),
      ("%.0f%%"):format(100 * rate / copy_rate) }
    m.share = rate / copy_rate
  end
  return bench.result({ rows = measured, copy_bytes_per_second = copy_rate }, {
    title = ("Ops bound by memory, %s"):format(o.dtype),
    columns = { "op", "shape", "ms", "GB/s", "of copy" }, rows = rows,
    notes = { ("copy: %.1f GB/s read and written; bytes are those that must move, so caches may give more than 100 %%")
      :format(1e-9 * copy_rate) },
  })
end

return M
