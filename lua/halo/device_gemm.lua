--- Products of a training step on a device, timed: the part of `halo bench gemm` behind device=cuda.
--
-- The products of one layer and of one chunk of the loss, forward, backward to the input (dx) and to the
-- weight (dw, added to an fp32 gradient), as ops and tape ask for them; times are spans of op.linear on the
-- device's clock. The yardstick is a square product of 8192, measured first and last: a device that is hot
-- from its own work runs slower than one that has rested, so a share of 100 % can be passed.
--
--    halo bench gemm device=cuda                            both models, 32K and 64K tokens
--    halo bench gemm device=cuda model=qwen2.5-3b tokens=131072 chunk=16384
local args = require "halo.args"
local autograd = require "halo.autograd"
local bench = require "halo.bench"
local device_step = require "halo.device_step"
local errors = require "halo.errors"
local memory = require "halo.memory"
local ops = require "halo.ops"
local tensor = require "halo.tensor"
local trace = require "halo.trace"

local M = {}

-- tokens, and a row per product: what, rows of the input (default: tokens), outputs, inputs
local models = {
  { name = "gpt2-124m", tokens = 65536, list = { { "q, k, v", 2304, 768 }, { "o", 768, 768, add = true },
    { "gate, up", 4096, 768 }, { "down", 768, 2048, add = true }, { "head, a chunk", 50304, 768, rows = 2048 } } },
  { name = "qwen2.5-3b", tokens = 32768, list = { { "q, k, v", 2560, 2048, bias = true },
      { "o", 2048, 2048, add = true },
    { "gate, up", 22016, 2048, inner = true }, { "down", 2048, 11008, inner = true, add = true },
    { "head, a chunk", 151936, 2048, rows = 2048 } } },
}

-- Seconds of the span `name` inside f, on the device's clock: the mean of some calls, after one that may
-- choose an algorithm.
local function span_seconds(name, device, repeats, f)
  f()
  trace.reset()
  trace.device(device)
  local ok, problem = pcall(function() for _ = 1, repeats do f() end end)
  local total = trace.total(name)
  trace.device "cpu"
  if not ok then error(problem, 0) end
  return total.device_seconds / total.calls
end

-- Seconds of forward, dx and dw of y [rows,n] = x [rows,k] w^T.
local function measure(p, o)
  return memory.scope(function()
    local function normal(seed, ...)
      return tensor.normal { shape = { ... }, dtype = o.dtype, device = o.device, std = 1, seed = seed }
    end
    local x, w, seed = normal(1, p.rows, p.k), normal(2, p.n, p.k), normal(3, p.rows, p.n)
    local bias, add = p.bias and normal(4, p.n) or nil, p.add and normal(5, p.rows, p.n) or nil
    local out = {}
    out.forward = span_seconds("op.linear", o.device, o.repeats, function()
      autograd.no_grad(function() ops.linear(x, w, bias, add):free() end)
    end)
    -- One leaf wants a gradient, so its backward is one product.
    local function backward(leaf)
      leaf:require_grad(true)
      if leaf == w then w.grad = tensor.zeros { shape = w.shape, dtype = "f32", device = o.device } end
      local seconds = span_seconds("op.linear.backward", o.device, o.repeats, function()
        local y = ops.linear(x, w)
        y:backward(seed)
        y:free()
        x:drop_grad()
      end)
      leaf:drop_grad()
      leaf:require_grad(false)
      return seconds
    end
    out.dx, out.dw = backward(x), backward(w)
    return out
  end)
end

local function shapes_of(o)
  local list = {}
  for _, m in ipairs(models) do
    if not o.model or o.model == m.name then
      local tokens = o.tokens or m.tokens
      for _, row in ipairs(m.list) do
        list[#list + 1] = { model = m.name, what = row[1], n = row[2], k = row[3], bias = row.bias, add = row.add,
          rows = math.min(tokens, row.rows or row.inner and o.chunk or tokens) }
      end
    end
  end
  if #list == 0 then
    local names = {}
    for i, m in ipairs(models) do names[i] = m.name end
    errors.raise("usage", ("bench gemm: no model %q%s"):format(o.model, args.did_you_mean(o.model, names)), 0)
  end
  return list
end

--- The benchmark. @tparam table o `device`, `model` (nil: all), `tokens`, `chunk` (rows of the MLP at a time),
-- `square` (edge of the yardstick), `dtype`, `repeats`
function M.run(o)
  local square = { device_step.product_rate(o.device, o.dtype, o.square) }
  local rows, lines, flops_all, seconds_all = {}, {}, 0, 0
  for _, p in ipairs(shapes_of(o)) do
    local seconds, flops = measure(p, o), 2 * p.rows * p.n * p.k
    for _, pass in ipairs { "forward", "dx", "dw" } do
      rows[#rows + 1] = { model = p.model, what = p.what, pass = pass, rows = p.rows, n = p.n, k = p.k,
        seconds = seconds[pass], flops = flops, share = flops / seconds[pass] / square[1] }
      flops_all, seconds_all = flops_all + flops, seconds_all + seconds[pass]
    end
  end
  square[2] = device_step.product_rate(o.device, o.dtype, o.square)
  for i, r in ipairs(rows) do
    lines[i] = { r.model, r.what, r.pass, ("%d x %d x %d"):format(r.rows, r.n, r.k), ("%.3f"):format(1e3 * r.seconds),
      ("%.1f"):format(1e-12 * r.flops / r.seconds), ("%.0f%%"):format(100 * r.share) }
  end
  return bench.result({ rows = rows, square_flops_per_second = square, flops_per_second = flops_all / seconds_all }, {
    title = ("Products of a training step on %s, %s, dw in fp32"):format(o.device, o.dtype),
    columns = { "model", "product", "pass", "rows x outputs x inputs", "ms", "TFLOP/s", "of square" }, rows = lines,
    notes = { ("a square product of %d: %.1f TFLOP/s before, %.1f after"):format(o.square, 1e-12 * square[1],
      1e-12 * square[2]),
      ("all products above together: %.1f TFLOP/s"):format(1e-12 * flops_all / seconds_all) },
  })
end

return M
