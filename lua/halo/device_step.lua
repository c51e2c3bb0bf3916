--- A training step on a device, timed: the part of `halo bench step` behind device=cuda.
--
-- Three measurements in one run: steps as they are (tokens per second), the same steps with spans on the
-- device's clock (shares of ops; the marks cost a little), and one large product, which is what the device
-- can do at best. Products inside other ops (the MLP, the loss) are counted as products.
--
--    products     what cuBLASLt does               attention    op.attention and its backward
--    other        everything else, the time in which the device waits for the host included
local autograd = require "halo.autograd"
local bench = require "halo.bench"
local devices = require "halo.device"
local memory = require "halo.memory"
local ops = require "halo.ops"
local tensor = require "halo.tensor"
local term = require "halo.term"
local trace = require "halo.trace"

local M = {}

--- Flops per second of a square product on a device, best of some runs of four.
-- @tparam string device @tparam string dtype @tparam[opt] int n edge (8192, on a device)
function M.product_rate(device, dtype, n)
  n = n or 8192
  return autograd.no_grad(memory.scope, function()
    local a = tensor.normal { n, n, dtype = dtype, device = device, seed = 1 }
    local b = tensor.normal { n, n, dtype = dtype, device = device, seed = 2 }
    local best = math.huge
    for _ = 1, 6 do
      devices.synchronize(device)
      local start = bench.clock()
      for _ = 1, 4 do ops.linear(a, b, nil):free() end
      devices.synchronize(device)
      best = math.min(best, (bench.clock() - start) / 4)
    end
    return 2 * n ^ 3 / best
  end)
end

-- Seconds of each of n steps, and the last loss.
local function time_steps(self, n)
  local list, loss = {}, nil
  for i = 1, n do
    devices.synchronize(self.o.device)
    local start = bench.clock()
    loss = self:step()
    devices.synchronize(self.o.device)
    list[i] = bench.clock() - start
  end
  return list, loss
end

-- Seconds per step of products, attention and the rest, and a row per name.
local function split_of(totals, steps, step_seconds)
  local split, rows = { products = 0, attention = 0 }, {}
  for _, r in ipairs(totals) do
    local seconds = r.device_self_seconds / steps
    if r.name == "product" then
      split.products = split.products + seconds
    elseif r.name:match "^op%.attention" then
      split.attention = split.attention + seconds
    end
    rows[#rows + 1] = { name = r.name, calls = r.calls / steps, seconds = seconds, share = seconds / step_seconds,
      flops = r.flops / steps, bytes = r.bytes / steps }
  end
  table.sort(rows, function(a, b) return a.seconds > b.seconds end)
  split.other = step_seconds - split.products - split.attention
  return split, rows
end

local function rate(amount, seconds, scale)
  return amount > 0 and seconds > 0 and ("%.1f"):format(amount / seconds * scale) or ""
end

-- Lines of the table: ops above a thousandth of the step.
local function lines_of(rows)
  local lines = {}
  for _, r in ipairs(rows) do
    if r.share >= 0.001 then
      lines[#lines + 1] = { r.name, ("%d"):format(r.calls), ("%.2f"):format(1e3 * r.seconds),
        ("%.1f%%"):format(100 * r.share), rate(r.flops, r.seconds, 1e-12), rate(r.bytes, r.seconds, 1e-9) }
    end
  end
  return lines
end

--- Measure.
-- @tparam table self what `prepare` of bench/step.lua made
function M.run(self)
  local o, device = self.o, self.o.device
  self:step() -- memory, code, the choice of algorithms
  local peak = { all = memory.peak(nil, device) }
  for _, tag in ipairs(memory.tags) do peak[tag] = memory.peak(tag, device) end
  self:step()
  local seconds, loss = time_steps(self, o.steps)
  trace.device(device)
  trace.reset()
  local traced = time_steps(self, o.steps)
  local traced_mean = 0
  for _, s in ipairs(traced) do traced_mean = traced_mean + s / o.steps end
  local split, rows = split_of(trace.totals(), o.steps, traced_mean)
  trace.device "cpu"
  local step, tokens = bench.median(seconds), o.batch * o.tokens
  local flops = self.model:flops_per_token(o.tokens) * tokens
  local best_rate = M.product_rate(device, o.dtype)
  local result = { model = o.model, device = device, dtype = o.dtype, parameters = self.model:count(),
    batch = o.batch, tokens = o.tokens, recompute = o.recompute, offload = o.offload, seconds = seconds,
    median_seconds = step, tokens_per_second = tokens / step, model_flops = flops, product_rate = best_rate,
    mfu = flops / step / best_rate, traced_seconds = traced_mean, split = split, peak_bytes = peak, loss = loss,
    rows = rows }
  local by_tag = {}
  for _, tag in ipairs(memory.tags) do
    if peak[tag] > 2 ^ 20 then by_tag[#by_tag + 1] = tag .. " " .. term.bytes(peak[tag]) end
  end
  local function share(name)
    return ("%s %.1f ms (%.1f%%)"):format(name, 1e3 * split[name], 100 * split[name] / traced_mean)
  end
  return bench.result(result, {
    title = ("Training step: %s, T = %d, B = %d%s%s%s"):format(tostring(self.model), o.tokens, o.batch,
      o.recompute and ", blocks recomputed" or "", o.offload and ", block inputs in host memory" or "",
      o.deterministic and ", deterministic" or ""),
    columns = { "op", "calls", "ms", "share", "TFLOP/s", "GB/s" }, rows = lines_of(rows),
    notes = {
      ("step: median of %d %.1f ms (%.1f with spans timed); %.0f tokens/s; loss %.4f"):format(o.steps, 1e3 * step,
        1e3 * traced_mean, tokens / step, loss),
      ("device time: %s, %s, %s"):format(share "products", share "attention", share "other"),
      ("model flops %.2f TFLOP a step: %.0f TFLOP/s, %.0f%% of a product of 8192^3 in this run (%.0f TFLOP/s)")
        :format(flops * 1e-12, flops / step * 1e-12, 100 * result.mfu, best_rate * 1e-12),
      ("peak memory %s (each tag's own peak: %s)"):format(term.bytes(peak.all), table.concat(by_tag, ", ")),
    },
  })
end

return M
