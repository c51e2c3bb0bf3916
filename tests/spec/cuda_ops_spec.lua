--- Every op of the table on the device against the same op on the CPU: f32 and bf16, every case and layout of
-- op_cases.lua, results and gradients. In tools/check the device is a shadow (kernels/shadow), which proves
-- that core keeps host and device apart; on a GPU the same spec proves the kernels.
-- HALO_TEST_OPS=softmax,linear looks at some ops only.
local here = debug.getinfo(1, "S").source:sub(2):gsub("[^/]*$", "")
package.path = here .. "?.lua;" .. package.path

local halo = require "halo"
local cases = require "op_cases"
local inputs = require "op_inputs"
local tensor, ops = halo.tensor, halo.ops

local is_there = require("halo.device").count "cuda" > 0
-- A shadow's kernels are the CPU's: what is tested is where memory lies, and fewer cases show that.
local is_shadow = halo.ffi.ffi.string(halo.ffi.C.halo_cuda_targets()) == "shadow"

-- Sums are taken in another order on a device, in the same arithmetic: fp32 differs by some roundings of
-- the largest element, bf16 by one rounding of the result, and by one of an intermediate gradient.
local bounds = {
  f32 = { relative = 1e-5, of_largest = 4e-6 },
  f64 = { relative = 1e-12, of_largest = 1e-13 },
  bf16 = { relative = 2 ^ -7, of_largest = 2 ^ -8 },
}

local function wanted()
  local only = os.getenv "HALO_TEST_OPS"
  if not only or only == "" then return ops.list() end
  local list = {}
  for name in only:gmatch "[^,]+" do list[#list + 1] = name end
  return list
end

local abs, max = math.abs, math.max

-- `own`: bounds of an op that rounds more in between on a device.
local function compare(what, got, want, own)
  assert(got.device == "cuda", what .. " is on " .. got.device)
  assert(got.dtype == want.dtype, ("%s is %s, not %s"):format(what, got.dtype, want.dtype))
  assert.same(want.shape, got.shape)
  local a, b, bound, largest = got:values(), want:values(), own or bounds[want.dtype], 0
  for _, v in ipairs(b) do
    if abs(v) < math.huge then largest = max(largest, abs(v)) end
  end
  for i, v in ipairs(a) do
    local w = b[i]
    local allowed = bound and bound.relative * abs(w) + bound.of_largest * largest or 0
    if not (v == w or v ~= v and w ~= w or abs(v - w) <= allowed) then
      error(("%s: element %d is %.9g on cuda, %.9g on cpu"):format(what, i, v, w))
    end
  end
end

local function is_differentiable(spec) return inputs.is_data(spec) and spec.grad ~= false end

-- Parameters that name a device mean the one the inputs are on.
local function here_of(case, device)
  if not (case.params and case.params.device) then return case end
  local copy = { inputs = case.inputs, params = {} }
  for k, v in pairs(case.params) do copy.params[k] = v end
  copy.params.device = device
  return copy
end

-- Results, and gradients of the leaves under fixed seeds, on one device.
local function evaluate(name, entry, case, leaves, layout, device)
  local own, has_grad = {}, false
  for i, leaf in ipairs(leaves) do
    own[i] = leaf:clone(device)
    if ops.row(name).has_gradient and is_differentiable(case.inputs[i]) and own[i].dtype:match "f" then
      own[i]:require_grad()
      has_grad = true
    end
  end
  local results = { inputs.call(name, entry, here_of(case, device), inputs.views(case, own, layout)) }
  local grads = {}
  if has_grad then
    for k, y in ipairs(results) do
      if y.requires_grad then
        local seed = tensor.uniform { shape = y.shape, dtype = "f32", seed = 3, stream = k, lo = 0.5, hi = 1.5,
          device = "cpu" }
        y:backward(seed:to(y.dtype):to(device))
        break
      end
    end
    for i, leaf in ipairs(own) do grads[i] = leaf.grad end
  end
  return results, grads, own
end

local function check(name, entry, case, layout, dtype)
  halo.scope(function()
    local leaves = inputs.leaves(case, dtype, layout, 1)
    local what = inputs.describe(name, case, layout) .. " " .. dtype
    local want, want_grad, cpu = evaluate(name, entry, case, leaves, layout, "cpu")
    local got, got_grad, gpu = evaluate(name, entry, case, leaves, layout, "cuda")
    local own = entry.device_bounds and entry.device_bounds[dtype]
    for k in ipairs(want) do compare(("%s, result %d"):format(what, k), got[k], want[k], own) end
    for i in ipairs(cpu) do
      local has = want_grad[i] ~= nil
      assert((got_grad[i] ~= nil) == has, ("%s: gradient %d is there on one device only"):format(what, i))
      if has then compare(("%s, gradient %d"):format(what, i), got_grad[i], want_grad[i], own) end
      compare(("%s, input %d afterwards"):format(what, i), gpu[i], cpu[i])
    end
  end)
end

local function allowed(entry, dtype)
  for _, d in ipairs(entry.dtypes or { dtype }) do
    if d == dtype then return true end
  end
  return false
end

describe("ops on the device #gpu", function()
  for _, name in ipairs(wanted()) do
    local entry = cases[name]
    it(name, function()
      if not is_there then return pending "no CUDA device" end
      for _, dtype in ipairs { "f32", "bf16" } do
        if allowed(entry, dtype) then
          for n, case in ipairs(entry) do
            for l, layout in ipairs(inputs.layouts) do
              local is_plain = l == 1 and dtype == "f32"
              if not is_shadow or inputs.largest(case) < 2000 and (n == #entry or is_plain) then
                check(name, entry, case, layout, dtype)
              end
            end
          end
        end
      end
      for _, dtype in ipairs(entry.integers and { "i64", "i32" } or {}) do
        check(name, entry, entry[#entry], inputs.layouts[1], dtype)
      end
    end)
  end
end)
