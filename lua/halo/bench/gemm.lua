--- Products of a training step at the rate of the engine and of plain BLAS.
-- Forward is `ops.linear`, backward its two products (dx, dw added into a gradient buffer) through the
-- tape; the yardstick is the same product by cblas_sgemm on the same memory. With device=cuda the products
-- of two models beside a large one (halo.device_gemm).
local bench = require "halo.bench"
local ffi = require "ffi"
local ops = require "halo.ops"
local tensor = require "halo.tensor"
local trace = require "halo.trace"

local M = {
  name = "gemm",
  summary = "matrix products against plain BLAS",
  options = { device = { "string", "cpu" }, model = "string?", tokens = "int?", chunk = { "int", 8192 },
    square = { "int", 8192 }, width = { "int", 768 }, ffn = { "int", 2048 }, vocab = { "int", 50257 },
    repeats = { "int", 5 },
    dtype = "string?" },
}

-- Seconds that the backward of linear takes, as the tape counts them: without seed and bookkeeping.
local function backward_seconds(x, w, seed)
  local y = ops.linear(x, w)
  local before = trace.total "op.linear.backward"
  y:backward(seed)
  local after = trace.total "op.linear.backward"
  y:free()
  return after.self_seconds - (before and before.self_seconds or 0)
end

local function float_pointer(t) return ffi.cast("float *", ffi.cast("void *", t:pointer())) end

-- One shape: best times of forward and backward, ours and BLAS's, taking turns.
local function measure(rows, o)
  local m, n, k = rows.m, rows.n, rows.k
  local x = tensor.normal { m, k, dtype = o.dtype, std = 0.1, requires_grad = true }
  local w = tensor.normal { n, k, dtype = o.dtype, std = 0.1, requires_grad = true }
  local seed = tensor.normal { m, n, dtype = o.dtype, std = 0.1 }
  w.grad = tensor.zeros { n, k }
  -- The yardstick is fp32 also where the subject is bf16: that is what there is on a CPU.
  local fx, fw = x:cast "f32", w:cast "f32"
  local fy, fdx, fdw = tensor.zeros { m, n }, tensor.zeros { m, k }, tensor.zeros { n, k }
  local px, pw, py, pdx, pdw = float_pointer(fx), float_pointer(fw), float_pointer(fy), float_pointer(fdx),
    float_pointer(fdw)
  local best = { forward = math.huge, backward = math.huge, blas_forward = math.huge, blas_backward = math.huge }
  local function keep(name, seconds) best[name] = math.min(best[name], seconds) end
  local function timed(f)
    local start = bench.clock()
    f()
    return bench.clock() - start
  end
  local frozen_x, frozen_w = x:detach(), w:detach()
  for r = 0, o.repeats do
    local forward = timed(function() ops.linear(frozen_x, frozen_w):free() end)
    local blas_forward = timed(function() bench.sgemm { c = py, a = px, b = pw, m = m, n = n, k = k, tb = true } end)
    local backward = backward_seconds(x, w, seed)
    x:drop_grad()
    local blas_backward = timed(function()
      bench.sgemm { c = pdx, a = py, b = pw, m = m, n = k, k = n }
      bench.sgemm { c = pdw, a = py, b = px, m = n, n = k, k = m, ta = true, beta = 1 }
    end)
    if r > 0 then -- the first turn touches memory
      keep("forward", forward)
      keep("blas_forward", blas_forward)
      keep("backward", backward)
      keep("blas_backward", blas_backward)
    end
  end
  for _, t in ipairs { x, w, seed, fx, fw, fy, fdx, fdw, frozen_x, frozen_w } do t:free() end
  collectgarbage()
  return best
end

function M.run(o)
  if require("halo.device").require(o.device, 0) ~= "cpu" then
    o.dtype = o.dtype or "bf16"
    return require("halo.device_gemm").run(o)
  end
  o.dtype, o.tokens = o.dtype or "f32", o.tokens or 4096
  local shapes = {
    { what = "q, k, v, o", m = o.tokens, n = o.width, k = o.width },
    { what = "gate, up", m = o.tokens, n = o.ffn, k = o.width },
    { what = "down", m = o.tokens, n = o.width, k = o.ffn },
    { what = "vocabulary, a chunk", m = math.min(o.tokens, math.ceil(o.width / 2)), n = o.vocab, k = o.width },
  }
  local rows, data, ours, blas = {}, {}, 0, 0
  for _, s in ipairs(shapes) do
    local best = measure(s, o)
    for _, pass in ipairs { "forward", "backward" } do
      local flops = (pass == "forward" and 2 or 4) * s.m * s.n * s.k
      local seconds, yardstick = best[pass], best["blas_" .. pass]
      rows[#rows + 1] = { s.what .. ", " .. pass, ("%d x %d x %d"):format(s.m, s.n, s.k),
        ("%.2f"):format(1e3 * seconds), ("%.1f"):format(1e-9 * flops / seconds),
        ("%.1f"):format(1e-9 * flops / yardstick), ("%.0f%%"):format(100 * yardstick / seconds) }
      data[#data + 1] = { what = s.what, pass = pass, m = s.m, n = s.n, k = s.k, seconds = seconds,
        blas_seconds = yardstick, flops = flops, share = yardstick / seconds }
      ours, blas = ours + seconds, blas + yardstick
    end
  end
  return bench.result({ rows = data, share = blas / ours }, {
    title = ("Products of one layer and of one chunk of the loss, %s"):format(o.dtype),
    columns = { "product", "m x n x k", "ms", "GFLOP/s", "BLAS", "of BLAS" }, rows = rows,
    notes = { ("all together: %.1f ms, %.0f%% of OpenBLAS's sgemm on the same shapes in this run")
      :format(1e3 * ours, 100 * blas / ours) },
  })
end

return M
