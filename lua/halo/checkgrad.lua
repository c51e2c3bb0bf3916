--- Is a gradient right? Compare it with central differences in fp64.
--
--    halo.checkgrad {
--      fn = function(x, w) return x:matmul(w):tanh() end,
--      inputs = { x, w },                -- f64 leaves
--    }
--
-- The scalar that is differentiated is the sum of all results times fixed random weights, so that no
-- error can hide in a symmetric sum. Step h = 6e-6 * max(1, |x|), near the cube root of the fp64
-- epsilon, where the truncation error h^2 and the rounding error eps/h are of one size (about 4e-11).
--
-- The error of an element is |analytic - numeric| over the larger of both, where "larger" is not less
-- than a share `floor` (a hundredth) of the greatest gradient of that input, nor than 1e-4: below that,
-- rounding of the results decides. A gradient that is wrong by 1 % has an error of 1e-2; the bound is 1e-6.
local args = require "halo.args"
local errors = require "halo.errors"
local halo_ffi = require "halo.ffi"
local tensor = require "halo.tensor"

local ffi, C, check = halo_ffi.ffi, halo_ffi.C, halo_ffi.check

local M = {}

--- The bound on the error of an element.
M.tolerance = 1e-6

local relative_floor, absolute_floor = 1e-2, 1e-4 -- defaults

--- Largest error between two gradients given as flat tables. Elements without a number in `numeric`
-- (not sampled) are skipped. NaN counts as infinitely wrong.
-- @tparam table analytic
-- @tparam table numeric
-- @tparam[opt=0.01] number share the floor
-- @treturn number the largest error
-- @treturn int its place, or nil
function M.compare(analytic, numeric, share)
  local greatest = 0
  for _, n in pairs(numeric) do greatest = math.max(greatest, math.abs(n)) end
  local floor = math.max((share or relative_floor) * greatest, absolute_floor)
  local worst, at = 0, nil
  for i, n in pairs(numeric) do
    local a = analytic[i]
    local e = math.abs(a - n) / math.max(math.abs(a), math.abs(n), floor)
    if e ~= e then e = math.huge end
    if e > worst then worst, at = e, i end
  end
  return worst, at
end

local function listed(...)
  local list = {}
  for i = 1, select("#", ...) do
    local y = (select(i, ...))
    if tensor.is_tensor(y) and (y.dtype == "f64" or y.dtype == "f32") then list[#list + 1] = y end
  end
  return list
end

-- Random weights of the results, the same whenever asked.
local function weights_of(results, seed)
  local weights = {}
  for i, y in ipairs(results) do
    weights[i] = tensor.uniform { shape = y.shape, dtype = y.dtype, seed = seed, stream = i, lo = 0.5, hi = 1.5 }
  end
  return weights
end

-- Gradients of all inputs as flat tables. Each result is walked back on its own tape, because a tape is
-- used up by its walk; gradients of leaves add.
local function analytic_gradients(o, weights)
  for _, x in ipairs(o.inputs) do x:drop_grad() end
  for i = 1, #weights do
    tensor.scope(function()
      local y = listed(o.fn(unpack(o.inputs)))[i]
      if y.requires_grad then y:backward(weights[i]) end
    end)
  end
  local gradients = {}
  for i, x in ipairs(o.inputs) do
    local values = {}
    if x.grad then
      values = x.grad:values()
    else
      for j = 1, x.count do values[j] = 0 end
    end
    gradients[i] = values
    x:drop_grad()
  end
  return gradients
end

-- Results as flat tables, off the tape.
local function evaluate(o)
  return require("halo.autograd").no_grad(function()
    return tensor.scope(function()
      local values = {}
      for i, y in ipairs(listed(o.fn(unpack(o.inputs)))) do values[i] = y:values() end
      return values
    end)
  end)
end

local number = ffi.new "double[1]"

-- d(weighted sum)/d(element i of the input). Differences are summed, not sums subtracted: what the element
-- does not reach cancels exactly.
local function difference(o, weights, input, i)
  check(C.halo_tensor_get(input, i, number))
  local x = number[0]
  local h = 6e-6 * math.max(1, math.abs(x))
  local up, down = x + h, x - h
  check(C.halo_tensor_set(input, i, up))
  local above = evaluate(o)
  check(C.halo_tensor_set(input, i, down))
  local below = evaluate(o)
  check(C.halo_tensor_set(input, i, x))
  local sum = 0
  for k, values in ipairs(above) do
    for j, v in ipairs(values) do sum = sum + weights[k][j] * (v - below[k][j]) end
  end
  return sum / (up - down)
end

-- Up to `samples` places among n, spread by a fixed rule.
local function places(n, samples, seed)
  local list = {}
  if n <= samples then
    for i = 1, n do list[i] = i end
    return list
  end
  local seen = {}
  local k = 0
  while #list < samples do
    local i = math.floor(C.halo_random_uniform(seed, 77, k) * n) + 1
    k = k + 1
    if not seen[i] then
      seen[i] = true
      list[#list + 1] = i
    end
  end
  return list
end

--- Compare analytic and numeric gradients of a function.
-- @tparam table o
-- @tparam function o.fn of the inputs; returns tensors. It must be deterministic
-- @tparam table o.inputs contiguous f64 leaves with `requires_grad`
-- @tparam[opt=1e-6] number o.tolerance
-- @tparam[opt=64] int o.samples elements checked per input
-- @tparam[opt=0.01] number o.floor share of the greatest gradient below which errors are absolute
-- @tparam[opt=0] int o.seed of the weights and the choice of elements
-- @treturn table `ok`, `error` (largest), `checked` (elements), `analytic` and `numeric` (one table per
-- input), and for the worst element `input`, `index`
-- @usage assert(halo.checkgrad { fn = f, inputs = { x } }.ok)
function M.run(o)
  o = args.named("checkgrad", o, { fn = "callable", inputs = "table", tolerance = { "number", M.tolerance },
    samples = { "int", 64 }, floor = { "number", relative_floor }, seed = { "int", 0 } })
  for i, x in ipairs(o.inputs) do
    tensor.check(x, ("checkgrad: input %d"):format(i), 3)
    if x.dtype ~= "f64" or not x.requires_grad or not x.is_contiguous then
      errors.raise("usage", ("checkgrad: input %d must be a contiguous f64 leaf that requires a gradient, got %s")
        :format(i, tostring(x)), 3)
    end
  end
  local weights = tensor.scope(function() return weights_of(listed(o.fn(unpack(o.inputs))), o.seed) end)
  local report = { error = 0, checked = 0, numeric = {}, analytic = analytic_gradients(o, weights) }
  local flat = {}
  for k, w in ipairs(weights) do
    flat[k] = w:values()
    w:free()
  end
  for i, x in ipairs(o.inputs) do
    local numeric = {}
    for _, j in ipairs(places(x.count, o.samples, o.seed)) do
      numeric[j] = difference(o, flat, x, j - 1)
      report.checked = report.checked + 1
    end
    report.numeric[i] = numeric
    local e, at = M.compare(report.analytic[i], numeric, o.floor)
    if e > report.error then report.error, report.input, report.index = e, i, at end
  end
  report.ok = report.error <= o.tolerance
  return report
end

return setmetatable(M, { __call = function(_, o) return (M.run(o)) end })
