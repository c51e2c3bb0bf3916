-- Attention from Lua: the C tests hold it to its definition; here are the calls, the tape and parity.
require "tests.helper"
local attention = require "halo.attention"
local comms = require "halo.comm"
local layouts = require "halo.layout"
local parity = require "halo.parity"
local plans = require "halo.plan"
local rings = require "halo.ring"
local tensor = require "halo.tensor"

local function parts(tokens, heads)
  local comm = comms.self()
  local layout = layouts.new { kind = "contiguous", tokens = tokens, block = 4 }
  local plan = plans.new { layout = layout, heads = heads }:add_all():finish()
  return plan, rings.new { comm = comm }
end

local function near(expected, got, tolerance)
  assert.is_true(math.abs(expected - got) <= (tolerance or 1e-6), ("%.9g is not %.9g"):format(got, expected))
end

describe("attention", function()
  it("averages what a query sees", function()
    local plan, ring = parts(4, 1)
    local q = tensor.zeros { 1, 4, 1, 2 }
    local v = tensor { { { { 1, 0 } }, { { 3, 0 } }, { { 5, 0 } }, { { 7, 4 } } } }
    local out, lse = attention.attend { q = q, k = q, v = v, plan = plan, ring = ring }
    assert.same({ 1, 4, 1, 2 }, out.shape)
    assert.same({ 1, 1, 4 }, lse.shape)
    for i, want in ipairs { 1, 2, 3, 4 } do
      near(want, out:get(1, i, 1, 1))
      near(math.log(i), lse:get(1, 1, i))
    end
    near(1, out:get(1, 4, 1, 2))
  end)

  it("is on the tape, and keeps its plan and ring alive", function()
    local plan, ring = parts(8, 2)
    local q = tensor.normal { 1, 8, 2, 4, seed = 1, requires_grad = true }
    local k = tensor.normal { 1, 8, 1, 4, seed = 2, requires_grad = true }
    local w = tensor.normal { 1, 8, 1, 4, seed = 3, requires_grad = true }
    local out = attention.attend { q = q, k = k, v = w, plan = plan, ring = ring }
    plan, ring = nil, nil -- luacheck: ignore
    collectgarbage()
    collectgarbage()
    out:sum():backward()
    -- A row of weights sums to one: as values, v gets 8 rows x 2 heads per column of the head.
    near(16, w.grad:sum():item() / 4, 1e-5)
    assert.is_true(q.grad:square():sum():item() > 0 and k.grad:square():sum():item() > 0)
  end)

  it("names the argument that is wrong", function()
    local plan, ring = parts(4, 1)
    local q = tensor.zeros { 1, 4, 1, 2 }
    assert.error_matches(function() attention.attend { q = q, k = q, v = q, plan = plan } end, "ring is missing")
    assert.error_matches(function()
      local k = tensor.zeros { 1, 4, 1, 3 }
      attention.attend { q = q, k = k, v = k, plan = plan, ring = ring }
    end, "k has head size 3, q has 2")
  end)

  it("continues from a cache", function()
    local plan, ring = parts(5, 2)
    local q = tensor.normal { 1, 5, 2, 4, seed = 3 }
    local k = tensor.normal { 1, 5, 1, 4, seed = 4 }
    local v = tensor.normal { 1, 5, 1, 4, seed = 5 }
    -- the plan's layout pads 5 tokens to 8
    local function padded(t, heads)
      local p = tensor.zeros { 1, 8, heads, 4 }
      for i = 1, 5 do
        for h = 1, heads do
          for d = 1, 4 do p:set({ 1, i, h, d }, t:get(1, i, h, d)) end
        end
      end
      return p
    end
    local whole, lse = attention.attend { q = padded(q, 2), k = padded(k, 1), v = padded(v, 1), plan = plan,
      ring = ring }
    local last = tensor.new { 1, 1, 2, 4 }
    for h = 1, 2 do
      for d = 1, 4 do last:set({ 1, 1, h, d }, q:get(1, 5, h, d)) end
    end
    local function cached(first, length)
      local kc, vc = tensor.zeros { 1, 6, 1, 4 }, tensor.zeros { 1, 6, 1, 4 }
      for i = 1, length do
        for d = 1, 4 do
          kc:set({ 1, i, 1, d }, k:get(1, first + i - 1, 1, d))
          vc:set({ 1, i, 1, d }, v:get(1, first + i - 1, 1, d))
        end
      end
      return attention.cached { q = last, k = kc, v = vc, length = length,
        key_positions = tensor.arange { count = 6, from = first - 1, dtype = "i64" },
        query_positions = tensor.full { 1, value = 4, dtype = "i64" } }
    end
    local o, l = cached(1, 2)
    local o2, l2 = cached(3, 3)
    attention.merge(o, l, o2, l2)
    for h = 1, 2 do
      near(lse:get(1, h, 5), l:get(1, h, 1))
      for d = 1, 4 do near(whole:get(1, 5, h, d), o:get(1, 1, h, d)) end
    end
  end)
end)

describe("parity", function()
  it("holds for every ring, and its errors do not grow with the ranks", function()
    local small = { tokens = 203, head_dim = 8, block = 8 }
    for _, schedule in ipairs(rings.schedules) do
      small.schedule, small.inner = schedule, 2
      small.ranks = { 2, 4, 8 }
      local result = parity.drift(small)
      assert.is_true(result.ok, tostring(result))
      for _, name in ipairs(parity.parts) do
        assert.is_true(result.rows[3][name] <= 3 * result.rows[1][name] + 1e-7, tostring(result))
      end
    end
  end)

  it("holds for packed documents, in every layout", function()
    for _, layout in ipairs { "contiguous", "zigzag", "striped" } do
      for _, plan in ipairs { "dense", "sparse" } do
        local result = parity.drift { tokens = 101, head_dim = 8, block = 8, batch = 2, documents = true,
          layout = layout, plan = plan, ranks = { 3 } }
        assert.is_true(result.ok, tostring(result))
      end
    end
  end)

  it("fails when the limit is below what fp32 can do", function()
    local result = parity.drift { tokens = 100, ranks = { 2 }, limit = 1e-9 }
    assert.is_false(result.ok)
    assert.matches("FAILED", tostring(result))
  end)
end)
