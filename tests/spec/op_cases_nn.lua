--- Cases of the training ops, in the form of op_cases.lua, which loads this file.
local arrays = require "arrays"

local exp, log, sqrt = math.exp, math.log, math.sqrt

local M = {}

-- A function of the last dim's runs, one result for each.
local function rows(x, f)
  return arrays.along(x, -1, f)
end

-- x [..., I] times weight [O, I] transposed.
local function times_transposed(x, w)
  local n_out = w.shape[1]
  return rows(x, function(run)
    local y = {}
    for o = 1, n_out do
      y[o] = 0
      for i = 1, #run do y[o] = y[o] + run[i] * w[(o - 1) * #run + i] end
    end
    return y
  end)
end

M.embedding = { reference = function(_, w, ids)
  local shape = { unpack(ids.shape) }
  shape[#shape + 1] = w.shape[2]
  return arrays.build(shape, function(position)
    return w[arrays.at(ids, arrays.with(position, #position)) * w.shape[2] + position[#position]]
  end)
end,
  { inputs = { { shape = { 5, 3 } }, { shape = { 4 }, kind = "index", n = 5 } } },
  { inputs = { { shape = { 5, 3 } }, { shape = { 2, 7 }, kind = "index", n = 5 } } },
  { inputs = { { shape = { 1, 1 } }, { shape = {}, kind = "index", n = 1 } } },
  { inputs = { { shape = { 5, 3 } }, { shape = { 0 }, kind = "index", n = 5 } } },
}

local function plus(u, v) return u + v end

M.linear = { reference = function(_, x, w, b, add)
  local y = times_transposed(x, w)
  if b then y = arrays.zip(plus, y, b) end
  return add and arrays.zip(plus, y, add) or y
end,
  { inputs = { { shape = { 3, 4 } }, { shape = { 5, 4 } }, { shape = { 5 } }, { shape = { 3, 5 } } } },
  { inputs = { { shape = { 2, 3, 4 } }, { shape = { 5, 4 } }, { shape = { 5 } }, { shape = { 2, 3, 5 } } } },
  { inputs = { { shape = { 3, 4 } }, { shape = { 5, 4 } } } },
  { inputs = { { shape = { 3, 4 } }, { shape = { 5, 4 } }, { shape = { 5 } } } },
  { inputs = { { shape = { 2, 3, 4 } }, { shape = { 7, 4 } }, { shape = { 7 } } } },
  { inputs = { { shape = { 4 } }, { shape = { 2, 4 } } } },
  { inputs = { { shape = { 0, 4 } }, { shape = { 2, 4 } }, { shape = { 2 } } } },
  { inputs = { { shape = { 33, 17 } }, { shape = { 19, 17 } } } },
}

M.gated_mlp = { reference = function(_, x, gate, up, down, residual)
  local g, u = times_transposed(x, gate), times_transposed(x, up)
  local h = arrays.zip(function(a, b) return a / (1 + exp(-a)) * b end, g, u)
  local y = times_transposed(h, down)
  return residual and arrays.zip(function(a, b) return a + b end, y, residual) or y
end,
  bounds = { bf16 = { relative = 2 ^ -6, absolute = 0.5 } }, -- g, u and h (to 30) are rounded, too
  { inputs = { { shape = { 3, 4 } }, { shape = { 6, 4 } }, { shape = { 6, 4 } }, { shape = { 4, 6 } } } },
  { inputs = { { shape = { 3, 4 } }, { shape = { 6, 4 } }, { shape = { 6, 4 } }, { shape = { 4, 6 } },
    { shape = { 3, 4 } } } },
  { inputs = { { shape = { 2, 5, 4 } }, { shape = { 7, 4 } }, { shape = { 7, 4 } }, { shape = { 4, 7 } },
    { shape = { 2, 5, 4 } } }, params = { chunk = 4 } },
  { inputs = { { shape = { 7, 3 } }, { shape = { 5, 3 } }, { shape = { 5, 3 } }, { shape = { 3, 5 } },
    { shape = { 7, 3 } } }, params = { chunk = 3, save = 1 } },
  { inputs = { { shape = { 0, 4 } }, { shape = { 6, 4 } }, { shape = { 6, 4 } }, { shape = { 4, 6 } } } },
}

M.rmsnorm = { reference = function(p, x, w)
  return rows(x, function(run)
    local s, y = 0, {}
    for _, v in ipairs(run) do s = s + v * v end
    local r = 1 / sqrt(s / #run + (p.eps or 1e-6))
    for i, v in ipairs(run) do y[i] = w[i] * v * r end
    return y
  end)
end,
  { inputs = { { shape = { 3, 4 } }, { shape = { 4 } } } },
  { inputs = { { shape = { 2, 3, 5 } }, { shape = { 5 } } }, params = { eps = 0.1 } },
  { inputs = { { shape = { 7 } }, { shape = { 7 } } } },
  { inputs = { { shape = { 0, 4 } }, { shape = { 4 } } } },
  { inputs = { { shape = { 4, 65 } }, { shape = { 65 } } } },
}

-- exact = 1: without it angles are rounded to fp32, which is what fixtures of other programs check.
M.rope_table = { dtypes = { "f64" }, reference = function(p, positions, inv_freq)
  local shape = { unpack(positions.shape) }
  shape[#shape + 1] = inv_freq.shape[1]
  local function tabulate(f)
    return arrays.build(shape, function(position)
      local angle = arrays.at(positions, arrays.with(position, #position)) * inv_freq[position[#position]]
      return f(angle) * (p.scale or 1)
    end)
  end
  return tabulate(math.cos), tabulate(math.sin)
end,
  { inputs = { { shape = { 5 }, kind = "index", n = 1000 }, { shape = { 4 }, lo = 0, hi = 1 } },
    params = { exact = 1, dtype = "f64" } },
  { inputs = { { shape = { 2, 3 }, kind = "index", n = 100 }, { shape = { 2 }, lo = 0, hi = 1 } },
    params = { exact = 1, dtype = "f64", scale = 1.5 } },
}

local function constant(shape) return { shape = shape, grad = false } end

M.rope = { fixed = true, reference = function(_, x, cos, sin)
  local half = cos.shape[#cos.shape]
  local function at(t, position, pair)
    local batch = #t.shape == 3 and { t.shape[1] == 1 and 1 or position[1], position[2], pair } or { position[2], pair }
    return arrays.at(t, batch)
  end
  return arrays.build(x.shape, function(position, i)
    local c = position[4]
    if c > 2 * half then return x[i] end
    local pair = c <= half and c or c - half
    local other = arrays.at(x, { position[1], position[2], position[3], c <= half and c + half or c - half })
    return x[i] * at(cos, position, pair) + (c <= half and -1 or 1) * other * at(sin, position, pair)
  end)
end,
  { inputs = { { shape = { 2, 3, 2, 8 } }, constant { 3, 4 }, constant { 3, 4 } } },
  { inputs = { { shape = { 2, 3, 1, 8 } }, constant { 1, 3, 2 }, constant { 1, 3, 2 } } },
  { inputs = { { shape = { 2, 3, 2, 6 } }, constant { 2, 3, 3 }, constant { 2, 3, 3 } } },
  { inputs = { { shape = { 1, 0, 2, 4 } }, constant { 0, 2 }, constant { 0, 2 } } },
}

local function silu(x) return x / (1 + exp(-x)) end

M.swiglu = { reference = function(_, gate, up)
  return arrays.zip(function(g, u) return silu(g) * u end, gate, up)
end }
M.swiglu_packed = { reference = function(_, x)
  return rows(x, function(run)
    local half, y = #run / 2, {}
    for i = 1, half do y[i] = silu(run[i]) * run[half + i] end
    return y
  end)
end, fixed = true }
M.split_qkv = { fixed = true, reference = function(p, x)
  local heads, kv = p.heads or 1, p.kv_heads or 1
  local size = x.shape[#x.shape] / (heads + 2 * kv)
  local function part(first, n)
    local shape = { unpack(x.shape) }
    shape[#shape], shape[#shape + 1] = n, size
    return arrays.build(shape, function(position)
      local at = { unpack(position) }
      local d = table.remove(at)
      at[#at] = (first + at[#at] - 1) * size + d
      return arrays.at(x, at)
    end)
  end
  return part(0, heads), part(heads, kv), part(heads + kv, kv)
end,
  { inputs = { { shape = { 3, 12 } } }, params = { heads = 2, kv_heads = 1 } },
  { inputs = { { shape = { 2, 3, 16 } } }, params = { heads = 4, kv_heads = 2 } },
  { inputs = { { shape = { 2, 0, 3 } } } },
}

for _, shape in ipairs { { 6 }, { 3, 4 }, { 2, 3, 2 }, { 0, 4 }, { 5, 66 } } do
  table.insert(M.swiglu, { inputs = { { shape = shape }, { shape = shape } } })
  table.insert(M.swiglu_packed, { inputs = { { shape = shape } } })
end

-- -log softmax(run)[label] of each row of logits.
local function token_losses(logits, labels)
  local n_vocab = logits.shape[#logits.shape]
  local losses = { shape = labels.shape }
  for i = 1, arrays.count(labels.shape) do
    local first, greatest, sum = (i - 1) * n_vocab, -math.huge, 0
    for v = 1, n_vocab do greatest = math.max(greatest, logits[first + v]) end
    for v = 1, n_vocab do sum = sum + exp(logits[first + v] - greatest) end
    losses[i] = greatest + log(sum) - logits[first + labels[i] + 1]
  end
  return losses
end

-- Sum over kept rows, and what to divide by.
local function total(p, logits, labels, weights)
  local sum, number = 0, 0
  local ignore = p.ignore or -100
  local losses = token_losses(logits, labels)
  for i, label in ipairs(labels) do
    local weight = label == ignore and 0 or weights and weights[i] or 1
    sum = sum + weight * losses[i]
    number = number + weight
  end
  return { shape = {}, sum }, { shape = {}, number }
end

local function labels(shape, n) return { shape = shape, kind = "index", n = n } end
local function weights(shape) return { shape = shape, lo = 0, hi = 2, grad = false } end

M.cross_entropy = { reference = total,
  { inputs = { { shape = { 3, 5 } }, labels({ 3 }, 5) } },
  { inputs = { { shape = { 2, 4, 7 } }, labels({ 2, 4 }, 7) } },
  { inputs = { { shape = { 6, 3 } }, labels({ 6 }, 3) }, params = { ignore = 1 } },
  { inputs = { { shape = { 3, 5 } }, labels({ 3 }, 5), weights { 3 } } },
  { inputs = { { shape = { 0, 5 } }, labels({ 0 }, 5) } },
}

-- Logits of bf16 inputs are fp32 on the CPU and bf16 on a device (core/nn_loss.c).
local bf16_logits = { bf16 = { relative = 2 ^ -6, of_largest = 2 ^ -6 } }

M.linear_cross_entropy = { reference = function(p, x, w, targets, row_weights)
  return total(p, times_transposed(x, w), targets, row_weights)
end, device_bounds = bf16_logits,
  { inputs = { { shape = { 3, 4 } }, { shape = { 5, 4 } }, labels({ 3 }, 5) } },
  { inputs = { { shape = { 2, 4, 3 } }, { shape = { 7, 3 } }, labels({ 2, 4 }, 7) }, params = { chunk = 3 } },
  { inputs = { { shape = { 9, 4 } }, { shape = { 3, 4 } }, labels({ 9 }, 3) }, params = { ignore = 1, save = 0 } },
  { inputs = { { shape = { 5, 4 } }, { shape = { 3, 4 } }, labels({ 5 }, 3), weights { 5 } }, params = { chunk = 2 } },
}

M.linear_token_loss = { reference = function(_, x, w, targets)
  return token_losses(times_transposed(x, w), targets)
end, device_bounds = bf16_logits,
  { inputs = { { shape = { 3, 4 } }, { shape = { 5, 4 } }, labels({ 3 }, 5) } },
  { inputs = { { shape = { 2, 4, 3 } }, { shape = { 7, 3 } }, labels({ 2, 4 }, 7) }, params = { chunk = 3 } },
}

return M
