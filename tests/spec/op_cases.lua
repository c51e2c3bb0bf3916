--- The cases of every op: what specs check, what benchmarks time. One table per op:
--
--    cases.add = {
--      reference = function(params, a, b) return array end,   -- plain Lua, see arrays.lua
--      { inputs = { { shape = { 2, 3 } }, { shape = { 3 } } }, params = { ... } },
--      ...
--    }
--
-- An input is `{ shape, kind, lo, hi, avoid, n }`:
--   kind "real" (default)  uniform in [lo,hi) ([-2,2)), at least 0.05 away from the points in `avoid`
--                          (kinks, where a difference quotient means nothing)
--        "distinct"        no two elements closer than 0.06: for what sorts
--        "index"           i64 in 0 .. n-1
--        "mask"            u8, 0 or 1
--   grad = false           never asked for a gradient
-- `dtypes` limits the dtypes of the forward test; `floor` is handed to checkgrad.
-- Sizes above 1 are varied at random, the same size in the same way; `fixed = true` forbids it where
-- parameters depend on sizes.
-- `call` replaces `ops.name(inputs..., params)` where the Lua form differs. `integers = true` runs the
-- forward in i32, i64 and u8 too.
local arrays = require "arrays"

local map, zip, reduce, along = arrays.map, arrays.zip, arrays.reduce, arrays.along
local inf = math.huge
local exp, log, abs, sqrt = math.exp, math.log, math.abs, math.sqrt

local M = {}

-- ---- shapes ---------------------------------------------------------------------------------

-- Scalar, empty, one, odd, several dims, a tile and a bit.
local shapes = { {}, { 0 }, { 1 }, { 5 }, { 3, 4 }, { 2, 3, 5 }, { 7, 1, 3 }, { 2, 0, 3 }, { 3, 171 } }

-- Pairs that broadcast: same, row, column, scalar, both ways, empty, longer than a tile.
local pairs_of_shapes = {
  { { 3, 4 }, { 3, 4 } }, { { 3, 4 }, { 4 } }, { { 3, 4 }, { 3, 1 } }, { { 3, 4 }, {} }, { {}, { 5 } },
  { { 4, 1, 3 }, { 2, 1 } }, { { 2, 0 }, { 1 } }, { { 2, 3, 1, 2 }, { 3, 5, 1 } }, { { 2, 520 }, { 520 } },
  { { 1, 1 }, { 2, 3 } },
}

local function with_shape(spec, shape)
  local copy = { shape = shape }
  for k, v in pairs(spec or {}) do copy[k] = v end
  return copy
end

-- Cases of an op on one tensor.
local function unary(f, spec, params, options)
  local entry = { reference = function(p, x) return map(x, function(v) return f(v, p) end) end }
  for _, shape in ipairs(shapes) do
    entry[#entry + 1] = { inputs = { with_shape(spec, shape) }, params = params }
  end
  for k, v in pairs(options or {}) do entry[k] = v end
  return entry
end

-- Cases of an op on two tensors.
local function binary(f, spec_a, spec_b, options)
  local entry = { reference = function(_, a, b) return zip(f, a, b) end }
  for _, pair in ipairs(pairs_of_shapes) do
    entry[#entry + 1] = { inputs = { with_shape(spec_a, pair[1]), with_shape(spec_b, pair[2]) } }
  end
  for k, v in pairs(options or {}) do entry[k] = v end
  return entry
end

-- ---- elementwise ----------------------------------------------------------------------------

local function sigmoid(x) return 1 / (1 + exp(-x)) end

-- Error function by its power series; 40 terms are exact to fp64 for |x| < 2.
local function erf(x)
  local sum, term = 0, x
  for n = 0, 60 do
    sum = sum + term / (2 * n + 1)
    term = -term * x * x / (n + 1)
  end
  return 2 / sqrt(math.pi) * sum
end

local positive = { lo = 0.3, hi = 3 }
local whole = { integers = true }

-- Halves to the even number.
local function round(x)
  local below = math.floor(x)
  local rest = x - below
  if rest < 0.5 then return below end
  if rest > 0.5 then return below + 1 end
  return below % 2 == 0 and below or below + 1
end

M.neg = unary(function(x) return -x end, nil, nil, whole)
M.abs = unary(abs, { avoid = { 0 } }, nil, whole)
M.sign = unary(function(x) return x > 0 and 1 or x < 0 and -1 or 0 end, nil, nil, whole)
M.square = unary(function(x) return x * x end, nil, nil, whole)
M.sqrt = unary(sqrt, positive)
M.rsqrt = unary(function(x) return 1 / sqrt(x) end, positive)
M.reciprocal = unary(function(x) return 1 / x end, positive)
M.exp = unary(exp)
M.log = unary(function(x) return log(x) end, positive)
M.sin = unary(math.sin)
M.cos = unary(math.cos)
M.tanh = unary(math.tanh)
M.sigmoid = unary(sigmoid)
M.relu = unary(function(x) return math.max(x, 0) end, { avoid = { 0 } }, nil, whole)
M.silu = unary(function(x) return x * sigmoid(x) end)
M.gelu = unary(function(x) return 0.5 * x * (1 + erf(x / sqrt(2))) end)
M.gelu_tanh = unary(function(x)
  return 0.5 * x * (1 + math.tanh(sqrt(2 / math.pi) * (x + 0.044715 * x ^ 3)))
end)
M.softplus = unary(function(x) return log(1 + exp(x)) end)
M.floor = unary(math.floor, { avoid = { -1, 0, 1 } })
M.ceil = unary(math.ceil, { avoid = { -1, 0, 1 } })
M.round = unary(round, { avoid = { -1.5, -0.5, 0.5, 1.5 } })
M.add_scalar = unary(function(x, p) return x + p.value end, nil, { value = 3 }, whole)
M.mul_scalar = unary(function(x, p) return x * p.value end, nil, { value = -2 }, whole)
M.pow_scalar = unary(function(x, p) return x ^ p.exponent end, positive, { exponent = -1.5 })
table.insert(M.pow_scalar, { inputs = { { shape = { 4 } } }, params = { exponent = 3 } })
table.insert(M.pow_scalar, { inputs = { { shape = { 4 } } }, params = { exponent = 0 } })
M.clamp = unary(function(x, p) return math.max(p.min, math.min(p.max, x)) end, { avoid = { -1, 1 } },
  { min = -1, max = 1 }, whole)
M.cast = unary(function(x) return x end, nil, { dtype = "f64" })
M.to_device = unary(function(x) return x end, nil, { device = "cpu" }, whole)
M.contiguous = unary(function(x) return x end, nil, nil, whole)

-- The mask is a function of (seed, stream, element): the reference reads it off a tensor of ones.
M.dropout = unary(nil, nil, { p = 0.3, seed = 5, stream = 9 })
M.dropout.reference = function(p, x)
  local tensor = require "halo.tensor"
  local shape = x.shape
  local mask = tensor.ones { shape = shape, dtype = "f64" }:dropout(p):values()
  local kept = 0
  for i = 1, #mask do
    kept = kept + (mask[i] ~= 0 and 1 or 0)
    assert(mask[i] == 0 or abs(mask[i] - 1 / (1 - p.p)) < 1e-12)
  end
  if #mask > 500 then assert(abs(kept / #mask - (1 - p.p)) < 0.08) end
  return arrays.build(shape, function(_, i) return x[i] * mask[i] end)
end

M.add = binary(function(a, b) return a + b end, nil, nil, whole)
M.sub = binary(function(a, b) return a - b end, nil, nil, whole)
M.mul = binary(function(a, b) return a * b end, nil, nil, whole)
M.div = binary(function(a, b) return a / b end, nil, positive)
M.pow = binary(function(a, b) return a ^ b end, positive)
M.maximum = binary(math.max, { lo = -2, hi = 2 }, { lo = 2.1, hi = 4 }, whole)
M.minimum = binary(math.min, { lo = -2, hi = 2 }, { lo = -6, hi = -2.1 }, whole)
for name, f in pairs {
  eq = function(a, b) return a == b end, ne = function(a, b) return a ~= b end,
  lt = function(a, b) return a < b end, le = function(a, b) return a <= b end,
  gt = function(a, b) return a > b end, ge = function(a, b) return a >= b end,
} do
  M[name] = binary(function(a, b) return f(a, b) and 1 or 0 end, { lo = -3, hi = 3 }, { lo = -3, hi = 3 }, whole)
end

M.where = { integers = true, reference = function(_, mask, a, b)
  return zip(function(m, x, y) return m ~= 0 and x or y end, mask, a, b)
end }
M.masked_fill = { integers = true, reference = function(p, x, mask)
  return zip(function(v, m) return m ~= 0 and p.value or v end, x, mask)
end }
for _, pair in ipairs(pairs_of_shapes) do
  table.insert(M.where, { inputs = { { shape = pair[1], kind = "mask" }, { shape = pair[2] }, { shape = pair[1] } } })
  table.insert(M.where, { inputs = { { shape = pair[2], kind = "mask" }, { shape = pair[1] }, { shape = {} } } })
  table.insert(M.masked_fill, { inputs = { { shape = pair[1] }, { shape = pair[2], kind = "mask" } },
    params = { value = 7 } })
end

-- ---- along a dim ------------------------------------------------------------------------------

local function sum(run)
  local s = 0
  for _, v in ipairs(run) do s = s + v end
  return s
end

local function product(run)
  local s = 1
  for _, v in ipairs(run) do s = s * v end
  return s
end

local function extreme(run, better)
  local best, at = run[1], 1
  for i, v in ipairs(run) do
    if better(v, best) then best, at = v, i end
  end
  return best, at - 1
end
local function larger(a, b) return a > b end
local function smaller(a, b) return a < b end

local function logsumexp(run)
  local m = extreme(run, larger)
  if #run == 0 or m == -inf then return -inf end
  local s = 0
  for _, v in ipairs(run) do s = s + exp(v - m) end
  return m + log(s)
end

local function variance(run, correction)
  local mean, s = sum(run) / #run, 0
  for _, v in ipairs(run) do s = s + (v - mean) ^ 2 end
  return s / (#run - correction)
end

-- Cases of a reduction: all dims, each dim, keepdim, long enough to be cut into blocks.
local function reduction(f, spec, options)
  options = options or {}
  local entry = { reference = function(p, x)
    return reduce(x, p.dim, p.keepdim, function(run) return f(run, p) end)
  end }
  local function case(shape, params) entry[#entry + 1] = { inputs = { with_shape(spec, shape) }, params = params } end
  for _, shape in ipairs { { 1 }, { 5 }, { 3, 4 }, { 2, 3, 5 }, { 3, 1, 2 } } do
    case(shape)
    case(shape, { keepdim = true })
    for d = 1, #shape do
      case(shape, { dim = d })
      case(shape, { dim = d - #shape - 1, keepdim = true })
    end
  end
  case {}
  if not options.nonempty then
    case { 0 }
    case({ 0, 3 }, { dim = 1 })
  end
  case({ 2, 0 }, { dim = 1 })
  for k, v in pairs(options) do entry[k] = v end
  return entry
end

local function long(entry, spec)
  table.insert(entry, { inputs = { with_shape(spec, { 9001 }) } })
  table.insert(entry, { inputs = { with_shape(spec, { 2, 9001 }) }, params = { dim = 2 } })
  table.insert(entry, { inputs = { with_shape(spec, { 600, 3 }) }, params = { dim = 1 } })
  table.insert(entry, { inputs = { with_shape(spec, { 300, 520 }) }, params = { dim = 1 } })
  return entry
end

M.sum = long(reduction(sum, nil, { integers = true }))
M.mean = long(reduction(function(run) return sum(run) / #run end, nil, { nonempty = true }))
M.prod = reduction(product)
M.logsumexp = long(reduction(logsumexp))
M.var = long(reduction(function(run, p) return variance(run, p.correction or 1) end, nil, { nonempty = true }))
for i = #M.var, 1, -1 do -- of one element it is 0/0
  local case = M.var[i]
  local shape, dim = case.inputs[1].shape, case.params and case.params.dim
  local n = dim and shape[dim < 0 and dim + #shape + 1 or dim] or arrays.count(shape)
  if n == 1 then case.params = { dim = dim, keepdim = case.params and case.params.keepdim, correction = 0 } end
end

local distinct = { kind = "distinct" }

local function extremes(better)
  local entry = reduction(nil, distinct, { nonempty = true, integers = true })
  entry.reference = function(p, x)
    return reduce(x, p.dim, p.keepdim, function(run) return (extreme(run, better)) end),
      reduce(x, p.dim, p.keepdim, function(run) return (select(2, extreme(run, better))) end)
  end
  table.insert(entry, { inputs = { { shape = { 2, 700 }, kind = "distinct" } }, params = { dim = 2 } })
  return entry
end
M.max, M.min = extremes(larger), extremes(smaller)
M.argmax = reduction(function(run) return (select(2, extreme(run, larger))) end, distinct,
  { nonempty = true, integers = true })
M.argmin = reduction(function(run) return (select(2, extreme(run, smaller))) end, distinct,
  { nonempty = true, integers = true })

-- Cases of an op that keeps the shape.
local function shape_keeping(f, spec, more)
  local entry = { reference = function(p, x)
    return along(x, p.dim or -1, function(run) return f(run, p) end)
  end }
  for _, shape in ipairs { { 1 }, { 5 }, { 0 }, { 3, 4 }, { 2, 3, 5 }, { 3, 1, 2 }, { 2, 0 }, { 2, 600 } } do
    for d = 1, #shape do
      local params = { dim = d }
      for k, v in pairs(more or {}) do params[k] = v end
      entry[#entry + 1] = { inputs = { with_shape(spec, shape) }, params = params }
    end
    entry[#entry + 1] = { inputs = { with_shape(spec, shape) }, params = more }
  end
  -- A run longer than a tile. Every result hangs on every element there, through one rounded sum, so a
  -- difference quotient is good to 1e-7 of the largest gradient only.
  for _, case in ipairs(entry) do
    if arrays.count(case.inputs[1].shape) > 1000 then case.floor = 0.5 end
  end
  return entry
end

local function running(run, p)
  local y, s = {}, 0
  local reverse = p.reverse
  for i = reverse and #run or 1, reverse and 1 or #run, reverse and -1 or 1 do
    s = s + run[i]
    y[i] = s
  end
  return y
end
M.cumsum = shape_keeping(running)
for _, case in ipairs(shape_keeping(running, nil, { reverse = true })) do table.insert(M.cumsum, case) end
M.cumsum.integers = true

M.softmax = shape_keeping(function(run)
  local l, y = logsumexp(run), {}
  for i, v in ipairs(run) do y[i] = exp(v - l) end
  return y
end)
-- The gradient is y (dy - sum dy y) of the saved, rounded y: where dy is near the sum, a rounding that
-- falls the other way counts many times over.
M.softmax.device_bounds = { bf16 = { relative = 2 ^ -6, of_largest = 2 ^ -5 } }
M.log_softmax = shape_keeping(function(run)
  local l, y = logsumexp(run), {}
  for i, v in ipairs(run) do y[i] = v - l end
  return y
end)

-- ---- matmul ---------------------------------------------------------------------------------

M.matmul = { reference = function(_, a, b) return arrays.matmul(a, b) end }
for _, pair in ipairs {
  { { 2, 3 }, { 3, 4 } }, { { 1, 1 }, { 1, 1 } }, { { 1, 5 }, { 5, 1 } }, { { 5, 1 }, { 1, 3 } },
  { { 0, 3 }, { 3, 2 } }, { { 2, 0 }, { 0, 3 } }, { { 2, 3 }, { 3, 0 } }, { { 17, 9 }, { 9, 33 } },
  { { 4, 2, 3 }, { 4, 3, 2 } }, { { 4, 2, 3 }, { 3, 2 } }, { { 2, 3 }, { 4, 3, 2 } }, { { 4, 1, 3 }, { 3, 2 } },
  { { 2, 1, 2, 3 }, { 3, 3, 2 } }, { { 2, 3, 2, 3 }, { 2, 1, 3, 2 } }, { { 1, 2, 3 }, { 5, 3, 2 } },
  { { 0, 2, 3 }, { 3, 2 } }, { { 3, 1, 2, 2 }, { 1, 4, 2, 2 } },
} do
  table.insert(M.matmul, { inputs = { { shape = pair[1] }, { shape = pair[2] } } })
end

-- ---- shapes ---------------------------------------------------------------------------------

local function values_in(shape, x) return arrays.build(shape, function(_, i) return x[i] end) end

-- An op whose Lua form takes a list instead of a table of parameters.
local function listed(name, reference, list)
  local entry = { integers = true, fixed = true, reference = reference }
  entry.call = function(ops, inputs, params) return ops[name](inputs[1], params.list) end
  for _, item in ipairs(list) do
    entry[#entry + 1] = { inputs = { { shape = item[1] } }, params = { list = item[2] } }
  end
  return entry
end

M.reshape = listed("reshape", function(p, x)
  local shape, known, open = {}, 1, nil
  for d, size in ipairs(p.list) do
    shape[d] = size
    if size == -1 then open = d else known = known * size end
  end
  if open then shape[open] = known > 0 and arrays.count(x.shape) / known or 0 end
  return values_in(shape, x)
end, {
  { { 3, 4 }, { 4, 3 } }, { { 3, 4 }, { -1 } }, { { 3, 4 }, { 2, -1, 2 } }, { { 12 }, { 2, 1, 6 } },
  { {}, { 1, 1 } },
  { { 1 }, {} }, { { 0, 3 }, { 3, 0 } }, { { 2, 3, 4 }, { 6, 4 } }, { { 2, 3, 4 }, { 2, 12 } },
})
M.expand = listed("expand", function(p, x)
  local shape, shift = {}, #p.list - #x.shape
  for d, size in ipairs(p.list) do shape[d] = size == -1 and x.shape[d - shift] or size end
  return arrays.build(shape, function(position) return arrays.repeated_at(x, position) end)
end, {
  { { 3, 1 }, { 3, 4 } }, { { 1, 3 }, { 2, -1 } }, { { 3 }, { 2, 3 } }, { {}, { 2, 2 } },
  { { 2, 1, 3 }, { 4, 2, 5, 3 } },
  { { 3, 4 }, { 3, 4 } }, { { 1 }, { 0 } },
})
M.permute = listed("permute", function(p, x)
  local shape = {}
  for d, from in ipairs(p.list) do shape[d] = x.shape[arrays.dim(x, from)] end
  return arrays.build(shape, function(position)
    local own = {}
    for d, from in ipairs(p.list) do own[arrays.dim(x, from)] = position[d] end
    return arrays.at(x, own)
  end)
end, {
  { { 3, 4 }, { 2, 1 } }, { { 2, 3, 4 }, { 3, 1, 2 } }, { { 2, 3, 4 }, { 1, -1, 2 } }, { {}, {} },
  { { 2, 0, 1 }, { 2, 3, 1 } },
})

M.transpose = { integers = true, reference = function(p, x)
  local a, b = arrays.dim(x, p.dim_a or -2), arrays.dim(x, p.dim_b or -1)
  local function swapped(list)
    local copy = { unpack(list) }
    copy[a], copy[b] = list[b], list[a]
    return copy
  end
  return arrays.build(swapped(x.shape), function(position) return arrays.at(x, swapped(position)) end)
end,
  { inputs = { { shape = { 3, 4 } } } },
  { inputs = { { shape = { 2, 3, 4 } } }, params = { dim_a = 1, dim_b = 3 } },
  { inputs = { { shape = { 2, 3, 4 } } }, params = { dim_a = -1, dim_b = -1 } },
  { inputs = { { shape = { 2, 0 } } } },
}
M.squeeze = { integers = true, reference = function(p, x)
  return values_in(arrays.with(x.shape, arrays.dim(x, p.dim or -1)), x)
end,
  { inputs = { { shape = { 3, 1 } } } },
  { inputs = { { shape = { 1 } } }, params = { dim = 1 } },
  { inputs = { { shape = { 2, 1, 3 } } }, params = { dim = 2 } },
}
M.unsqueeze = { integers = true, reference = function(p, x)
  local dim = p.dim or -1
  return values_in(arrays.inserted(x.shape, dim < 0 and dim + #x.shape + 2 or dim, 1), x)
end,
  { inputs = { { shape = { 3 } } } },
  { inputs = { { shape = {} } }, params = { dim = 1 } },
  { inputs = { { shape = { 2, 3 } } }, params = { dim = 2 } },
  { inputs = { { shape = { 2, 3 } } }, params = { dim = 3 } },
  { inputs = { { shape = { 2, 0 } } }, params = { dim = 1 } },
}
M.slice = { integers = true, fixed = true, reference = function(p, x)
  local dim = arrays.dim(x, p.dim or -1)
  local size = x.shape[dim]
  local function from_start(i) return i < 0 and i + size + 1 or i end
  local from, to, step = from_start(p.from or 1), from_start(p.to or -1), p.step or 1
  return along(x, dim, function(run)
    local y = {}
    for i = from, to, step do y[#y + 1] = run[i] end
    return y
  end)
end,
  { inputs = { { shape = { 5 } } }, params = { from = 2, to = 4 } },
  { inputs = { { shape = { 5 } } }, params = { from = -3 } },
  { inputs = { { shape = { 3, 7 } } }, params = { dim = 2, from = 2, to = -1, step = 2 } },
  { inputs = { { shape = { 3, 7 } } }, params = { dim = 1, from = 3, to = 3 } },
  { inputs = { { shape = { 3, 7 } } }, params = { dim = 1, from = 3, to = 2 } },
  { inputs = { { shape = { 2, 3, 4 } } }, params = { dim = 2, from = 1, to = 2 } },
  { inputs = { { shape = { 4, 2 } } }, params = {} },
}
M.select = { integers = true, fixed = true, reference = function(p, x)
  local dim = p.dim or 1
  dim = arrays.dim(x, dim)
  return reduce(x, dim, false, function(run) return run[p.index < 0 and p.index + #run + 1 or p.index] end)
end,
  { inputs = { { shape = { 5 } } }, params = { index = 2 } },
  { inputs = { { shape = { 3, 4 } } }, params = { dim = 2, index = -1 } },
  { inputs = { { shape = { 2, 3, 4 } } }, params = { dim = 2, index = 3 } },
  { inputs = { { shape = { 2, 0 } } }, params = { dim = 1, index = 1 } },
}
M.cat = { integers = true, reference = function(p, ...)
  local list = { ... }
  local dim, total, shape = arrays.dim(list[1], p.dim or -1), 0, { unpack(list[1].shape) }
  for _, x in ipairs(list) do total = total + x.shape[dim] end
  shape[dim] = total
  return arrays.build(shape, function(position)
    local at = position[dim]
    for _, x in ipairs(list) do
      if at <= x.shape[dim] then return arrays.at(x, arrays.with(position, dim, at)) end
      at = at - x.shape[dim]
    end
  end)
end, call = function(ops, inputs, params) return ops.cat(inputs, params) end,
  { inputs = { { shape = { 2 } }, { shape = { 3 } } } },
  { inputs = { { shape = { 2, 3 } }, { shape = { 2, 1 } }, { shape = { 2, 0 } } }, params = { dim = 2 } },
  { inputs = { { shape = { 1, 3 } }, { shape = { 2, 3 } } }, params = { dim = 1 } },
  { inputs = { { shape = { 2, 1, 2 } }, { shape = { 2, 3, 2 } } }, params = { dim = 2 } },
  { inputs = { { shape = { 4 } } } },
}
M.flip = { integers = true, reference = function(p, x)
  return along(x, p.dim or -1, function(run)
    local y = {}
    for i = 1, #run do y[i] = run[#run + 1 - i] end
    return y
  end)
end,
  { inputs = { { shape = { 5 } } } },
  { inputs = { { shape = { 3, 4 } } }, params = { dim = 1 } },
  { inputs = { { shape = { 2, 3, 4 } } }, params = { dim = 2 } },
  { inputs = { { shape = { 2, 0 } } } },
}

local function triangle(keep)
  local entry = { integers = true, reference = function(p, x)
    return arrays.build(x.shape, function(position, i)
      local row, col = position[#position - 1], position[#position]
      return keep(col, row + (p.diagonal or 0)) and x[i] or 0
    end)
  end }
  for _, shape in ipairs { { 3, 3 }, { 2, 5 }, { 5, 2 }, { 2, 3, 4 }, { 0, 3 }, { 3, 0 } } do
    for _, diagonal in ipairs { 0, 1, -1, 9, -9 } do
      entry[#entry + 1] = { inputs = { { shape = shape } }, params = { diagonal = diagonal } }
    end
  end
  return entry
end
M.tril = triangle(function(col, limit) return col <= limit end)
M.triu = triangle(function(col, limit) return col >= limit end)

-- ---- positions ------------------------------------------------------------------------------

M.gather = { integers = true, reference = function(p, x, index)
  local dim = arrays.dim(x, p.dim or -1)
  return arrays.build(index.shape, function(position, i)
    return arrays.at(x, arrays.with(position, dim, index[i] + 1))
  end)
end,
  { inputs = { { shape = { 5 } }, { shape = { 7 }, kind = "index", n = 5 } } },
  { inputs = { { shape = { 3, 4 } }, { shape = { 3, 2 }, kind = "index", n = 4 } } },
  { inputs = { { shape = { 3, 4 } }, { shape = { 5, 4 }, kind = "index", n = 3 } }, params = { dim = 1 } },
  { inputs = { { shape = { 2, 3, 4 } }, { shape = { 2, 6, 4 }, kind = "index", n = 3 } }, params = { dim = 2 } },
  { inputs = { { shape = { 3, 4 } }, { shape = { 3, 0 }, kind = "index", n = 4 } } },
}
M.scatter_add = { integers = true, reference = function(p, x, index, source)
  local dim = arrays.dim(x, p.dim or -1)
  local y = map(x, function(v) return v end)
  arrays.build(source.shape, function(position, i)
    local to, flat = arrays.with(position, dim, index[i] + 1), 0
    for d = 1, #x.shape do flat = flat * x.shape[d] + to[d] - 1 end
    y[flat + 1] = y[flat + 1] + source[i]
    return 0
  end)
  return y
end,
  { inputs = { { shape = { 5 } }, { shape = { 9 }, kind = "index", n = 5 }, { shape = { 9 } } } },
  { inputs = { { shape = { 3, 4 } }, { shape = { 3, 2 }, kind = "index", n = 4 }, { shape = { 3, 2 } } } },
  { inputs = { { shape = { 3, 4 } }, { shape = { 5, 4 }, kind = "index", n = 3 }, { shape = { 5, 4 } } },
    params = { dim = 1 } },
  { inputs = { { shape = { 2, 3, 2 } }, { shape = { 2, 6, 2 }, kind = "index", n = 3 }, { shape = { 2, 6, 2 } } },
    params = { dim = 2 } },
  { inputs = { { shape = { 3 } }, { shape = { 0 }, kind = "index", n = 3 }, { shape = { 0 } } } },
}
M.index_select = { integers = true, reference = function(p, x, index)
  return along(x, p.dim or 1, function(run)
    local y = {}
    for i = 1, #index do y[i] = run[index[i] + 1] end
    return y
  end)
end,
  { inputs = { { shape = { 5 } }, { shape = { 7 }, kind = "index", n = 5 } } },
  { inputs = { { shape = { 4, 3 } }, { shape = { 9 }, kind = "index", n = 4 } } },
  { inputs = { { shape = { 2, 4, 3 } }, { shape = { 5 }, kind = "index", n = 4 } }, params = { dim = 2 } },
  { inputs = { { shape = { 2, 4 } }, { shape = { 3 }, kind = "index", n = 4 } }, params = { dim = -1 } },
  { inputs = { { shape = { 4, 3 } }, { shape = { 0 }, kind = "index", n = 4 } } },
}
M.one_hot = { fixed = true, reference = function(p, index)
  local shape = { unpack(index.shape) }
  shape[#shape + 1] = p.classes
  return arrays.build(shape, function(position)
    return arrays.at(index, arrays.with(position, #position)) == position[#position] - 1 and 1 or 0
  end)
end,
  { inputs = { { shape = { 5 }, kind = "index", n = 3 } }, params = { classes = 3, dtype = "f64" } },
  { inputs = { { shape = { 2, 3 }, kind = "index", n = 4 } }, params = { classes = 4, dtype = "f64" } },
  { inputs = { { shape = { 0 }, kind = "index", n = 4 } }, params = { classes = 4, dtype = "f64" } },
}

local function sorted(run, descending, k)
  local list = {}
  for i, v in ipairs(run) do list[i] = { v, i - 1 } end
  table.sort(list, function(a, b)
    if a[1] ~= b[1] then return descending == (a[1] > b[1]) end
    return a[2] < b[2]
  end)
  local values, index = {}, {}
  for i = 1, k do values[i], index[i] = list[i][1], list[i][2] end
  return values, index
end

local function sorting(k_of, descending_of)
  return function(p, x)
    local dim = p.dim or -1
    local function part(which)
      return along(x, dim, function(run) return (select(which, sorted(run, descending_of(p), k_of(p, #run)))) end)
    end
    return part(1), part(2)
  end
end
M.topk = { integers = true, fixed = true,
  reference = sorting(function(p) return p.k or 1 end, function(p) return p.largest ~= false end),
  { inputs = { { shape = { 6 }, kind = "distinct" } }, params = { k = 3 } },
  { inputs = { { shape = { 3, 5 }, kind = "distinct" } }, params = { k = 2, dim = 2 } },
  { inputs = { { shape = { 5, 3 }, kind = "distinct" } }, params = { k = 2, dim = 1, largest = false } },
  { inputs = { { shape = { 2, 4, 3 }, kind = "distinct" } }, params = { k = 4, dim = 2 } },
  { inputs = { { shape = { 2, 300 }, kind = "distinct" } }, params = { k = 17 } },
  { inputs = { { shape = { 0, 4 }, kind = "distinct" } }, params = { k = 2 } },
}
M.sort = { integers = true,
  reference = sorting(function(_, n) return n end, function(p) return p.descending == true end),
  { inputs = { { shape = { 6 }, kind = "distinct" } } },
  { inputs = { { shape = { 3, 5 }, kind = "distinct" } }, params = { descending = true } },
  { inputs = { { shape = { 5, 3 }, kind = "distinct" } }, params = { dim = 1 } },
  { inputs = { { shape = { 1 }, kind = "distinct" } } },
  { inputs = { { shape = { 2, 0 }, kind = "distinct" } } },
}

for name, entry in pairs(require "op_cases_nn") do M[name] = entry end

return M
