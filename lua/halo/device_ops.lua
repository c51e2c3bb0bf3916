--- Ops bound by memory on a device, timed: the part of `halo bench ops` behind device=cuda.
--
-- Forward and backward of the ops of a decoder, the optimizer's step and the gradient norm, at the sizes of
-- Qwen2.5-3B and 32K tokens unless told otherwise; times are spans on the device's clock, medians of some
-- calls. The yardstick is a copy of 1 GiB in the same run, bytes read plus bytes written; bytes of an op are
-- those that must move, so what stays in the second-level cache can give more than 100 %.
--
--    halo bench ops device=cuda
--    halo bench ops device=cuda tokens=131072 width=3584 ffn=18944 heads=28
local bench = require "halo.bench"
local memory = require "halo.memory"
local ops = require "halo.ops"
local optim = require "halo.optim"
local tensor = require "halo.tensor"
local trace = require "halo.trace"

local M = {}

-- name -> { seconds, bytes } of the spans `names` inside f, on the device's clock.
local function spans(names, o, f)
  local seconds, bytes = {}, {}
  f()
  trace.device(o.device)
  local ok, problem = pcall(function()
    for _ = 1, o.repeats do
      trace.reset()
      f()
      for _, row in ipairs(trace.totals()) do
        if names[row.name] then
          seconds[row.name] = seconds[row.name] or {}
          table.insert(seconds[row.name], row.device_seconds)
          bytes[row.name] = row.bytes
        end
      end
    end
  end)
  trace.device "cpu"
  if not ok then error(problem, 0) end
  local out = {}
  for name, list in pairs(seconds) do out[name] = { seconds = bench.median(list), bytes = bytes[name] } end
  return out
end

-- Bytes per second of a copy of `count` bf16 numbers.
local function copy_rate(o, count)
  return memory.scope(function()
    local from = tensor.normal { count, dtype = "bf16", device = o.device, seed = 1 }
    local to = tensor.zeros { count, dtype = "bf16", device = o.device }
    local best = spans({ ["bench.copy"] = true }, o, function()
      trace.span("bench.copy", function() to:copy_from(from) end)
    end)
    return 4 * count / best["bench.copy"].seconds
  end)
end

-- Cases: op, what it is run on, a function that makes its tensors and gives forward (nil result: no backward).
local function cases(o)
  local rows, few, size = o.tokens, math.min(o.chunk, o.tokens), o.width / o.heads
  local function normal(...)
    return tensor.normal { dtype = o.dtype, device = o.device, requires_grad = true, seed = 1, ... }
  end
  local function ids(n)
    return tensor.uniform { n, lo = 0, hi = o.vocab, device = o.device, seed = 2 }:cast "i64"
  end
  return {
    { "embedding", ("[%d,%d], %d ids"):format(o.vocab, o.width, rows), function()
      local scattered = {} -- all different (7919 is prime) while there are no more than rows of the table
      for i = 1, rows do scattered[i] = i * 7919 % o.vocab end
      local w, list = normal(o.vocab, o.width), tensor.from_table(scattered, { dtype = "i64", device = o.device })
      w.grad = tensor.zeros { o.vocab, o.width, device = o.device }
      return function() return ops.embedding(w, list) end
    end },
    { "rmsnorm", ("[%d,%d]"):format(rows, o.width), function()
      local x, w = normal(rows, o.width), normal(o.width)
      w.grad = tensor.zeros { o.width, device = o.device }
      return function() return ops.rmsnorm(x, w) end
    end },
    { "rope", ("[1,%d,%d,%d]"):format(rows, o.heads, size), function()
      local x = normal(1, rows, o.heads, size)
      local cos, sin = ops.rope_table(tensor.arange { count = rows, dtype = "i32", device = o.device },
        tensor.full { size / 2, value = 0.01, device = o.device })
      return function() return ops.rope(x, cos, sin) end
    end },
    { "swiglu_packed", ("[%d,2 x %d]"):format(rows, o.ffn), function()
      local x = normal(rows, 2 * o.ffn)
      return function() return ops.swiglu_packed(x) end
    end },
    { "add", ("[%d,%d]"):format(rows, o.width), function()
      local x, y = normal(rows, o.width), normal(rows, o.width)
      return function() return ops.add(x, y) end
    end },
    { "cross_entropy", ("[%d,%d]"):format(few, o.vocab), function()
      local logits, labels = normal(few, o.vocab), ids(few)
      return function() return (ops.cross_entropy(logits, labels)) end
    end },
  }
end

-- One case: rows { name, shape, seconds, bytes } of forward and backward.
local function measure(case, o)
  return memory.scope(function()
    local name, shape, run = case[1], case[2], case[3]()
    local forward, backward = "op." .. name, "op." .. name .. ".backward"
    local best = spans({ [forward] = true, [backward] = true }, o, function()
      local y = run()
      local seed = tensor.ones { shape = y.shape, dtype = y.dtype, device = o.device }
      y:backward(seed)
      y:free()
      seed:free()
    end)
    local out = {}
    for i, span in ipairs { forward, backward } do
      local b = best[span]
      if b and b.bytes > 0 then -- a backward may move nothing
        out[#out + 1] = { name = name .. (i == 2 and ", backward" or ""), shape = shape, seconds = b.seconds,
          bytes = b.bytes }
      end
    end
    return out
  end)
end

local function optimizer(o)
  return memory.scope(function()
    local w = tensor.normal { o.adamw, dtype = o.dtype, device = o.device, requires_grad = true, seed = 1 }
    local opt = optim.adamw({ w }, { lr = 1e-3 })
    local best = spans({ ["optim.adamw"] = true, ["bench.norm"] = true }, o, function()
      trace.span("bench.norm", function() opt:grad_norm() end)
      opt:step()
    end)
    local shape = ("[%d]"):format(o.adamw)
    local step = best["optim.adamw"]
    return { { name = "adamw", shape = shape, seconds = step.seconds, bytes = step.bytes },
      { name = "gradient norm", shape = shape, seconds = best["bench.norm"].seconds, bytes = 4 * o.adamw } }
  end)
end

--- The benchmark. @tparam table o `device`, `tokens`, `width`, `heads`, `ffn`, `vocab`, `chunk` (rows of
-- logits), `adamw` (parameters), `dtype`, `repeats`, `copy` (numbers of the yardstick)
function M.run(o)
  local copies = { copy_rate(o, o.copy) }
  local measured = {}
  for _, case in ipairs(cases(o)) do
    for _, row in ipairs(measure(case, o)) do measured[#measured + 1] = row end
    collectgarbage()
  end
  for _, row in ipairs(optimizer(o)) do measured[#measured + 1] = row end
  copies[2] = copy_rate(o, o.copy)
  local best, lines = math.max(copies[1], copies[2]), {}
  for i, m in ipairs(measured) do
    m.share = m.bytes / m.seconds / best
    lines[i] = { m.name, m.shape, ("%.3f"):format(1e3 * m.seconds), ("%.0f"):format(1e-9 * m.bytes / m.seconds),
      ("%.0f%%"):format(100 * m.share) }
  end
  return bench.result({ rows = measured, copy_bytes_per_second = best }, {
    title = ("Ops bound by memory on %s, %s"):format(o.device, o.dtype),
    columns = { "op", "shape", "ms", "GB/s", "of copy" }, rows = lines,
    notes = { ("copy: %.0f GB/s before, %.0f after, read and written"):format(1e-9 * copies[1], 1e-9 * copies[2]) },
  })
end

return M
