local comm = require "halo.comm"
local layout = require "halo.layout"
local plan = require "halo.plan"
local ring = require "halo.ring"
local sparsity = require "halo.sparsity"
local tensor = require "halo.tensor"

local function error_of(f, ...)
  local ok, err = pcall(f, ...)
  assert.is_false(ok)
  return tostring(err)
end

-- q and k of W virtual ranks, stacked in rank order, from values that depend on the token alone.
local function world(w, kind, n, heads, kv_heads)
  local l = layout.new { kind = kind, tokens = n, world = w, block = 8 }
  local c = comm.virtual(w)
  local function stack(h, seed)
    local whole = tensor.normal { 1, n, h, 16, seed = seed }
    local rows = {}
    for rank = 0, w - 1 do
      for i = 0, l:local_tokens() - 1 do rows[#rows + 1] = math.min(l:global(rank, i), n - 1) end
    end
    return whole:index_select(tensor(rows, { dtype = "i64" }), { dim = 2 })
  end
  return { layout = l, ring = ring.new { comm = c }, q = stack(heads, 5), k = stack(kv_heads, 6) }
end

describe("sparsity", function()
  local l = layout.new { tokens = 200, block = 8 }

  it("knows its patterns", function()
    local names = sparsity.names()
    for _, name in ipairs { "dense", "vertical_slash", "window" } do
      local found = false
      for _, n in ipairs(names) do found = found or n == name end
      assert.is_true(found, name)
    end
    assert.is_true(sparsity.is_static "dense")
    assert.is_true(sparsity.is_static "window")
    assert.is_false(sparsity.is_static "vertical_slash")
    assert.matches('did you mean "window"', error_of(sparsity.build, { type = "windo" }, { layout = l, heads = 1 }))
  end)

  it("dense sees everything, a window what is near", function()
    local dense = sparsity.build({ type = "dense" }, { layout = l, heads = 2, batch = 3 })
    assert.is_true(dense:is_dense())
    assert.equal(3, dense:batch())
    local p = sparsity.window { layout = l, heads = 1, window = 20 }
    for i = 0, 199 do
      for j = 0, i do
        local near = i - j < 20 or j < 4
        if near then assert.is_true(p:visible(1, 1, i, j)) end
        -- no more than the rounding to blocks explains
        if not near and i - j >= 20 + 2 * 8 then assert.is_false(p:visible(1, 1, i, j)) end
      end
    end
  end)

  it("vertical-slash: W ranks choose what one rank chooses", function()
    local hashes = {}
    for _, words in ipairs { { keep = 0.1 }, { keep = 0.1, estimate = 7 }, { keep = 0.1, sink = 0, window = 0 } } do
      local first
      for _, case in ipairs { { 1, "contiguous" }, { 2, "striped" }, { 3, "zigzag" }, { 4, "striped" } } do
        local o = world(case[1], case[2], 203, 4, 2)
        for name, value in pairs(words) do o[name] = value end
        local p = sparsity.vertical_slash(o)
        first = first or p
        assert.equal(first:hash(), p:hash())
      end
      hashes[first:hash()] = true
      assert.is_true(first:density() < 1)
    end
    local n = 0
    for _ in pairs(hashes) do n = n + 1 end
    assert.equal(3, n)
  end)

  it("vertical-slash: a fixed budget is exact, and force rules stand apart", function()
    local o = world(2, "striped", 203, 4, 4)
    local words = { type = "vertical_slash", keep = { type = "budget", verticals = 5, slashes = 0 },
      estimate = { type = "last_queries", count = 16 }, sink = 3, window = 4 }
    local p = sparsity.build(words, { q = o.q, k = o.k, ring = o.ring, layout = o.layout, heads = 4 })
    for h = 1, 4 do
      assert.equal(5, #p:columns(1, h))
      assert.same({}, p:diagonals(1, h))
      assert.is_true(p:visible(1, h, 200, 2))
      assert.is_true(p:visible(1, h, 200, 197))
    end
    local recall = p:recall { q = o.q, k = o.k, ring = o.ring, samples = 8 }
    assert.equal(4, #recall)
    for _, r in ipairs(recall) do assert.is_true(r > 0 and r < 1) end
    local all = sparsity.dense { layout = o.layout, heads = 4 }
    assert.same({ 1, 1, 1, 1 }, all:recall { q = o.q, k = o.k, ring = o.ring, samples = 8 })
  end)

  it("takes a pattern from anywhere", function()
    local seen
    sparsity.register {
      name = "checker",
      doc = "Every other block.",
      fields = function(kind) return { { "stride", kind.count, default = 2, doc = "blocks" } } end,
      is_static = true,
      build = function(o, words)
        seen = o
        local distances = {}
        for d = 0, o.layout:blocks() - 1, words.stride do distances[#distances + 1] = d end
        return o.new_plan():add_diagonals(distances):finish()
      end,
    }
    local p = sparsity.checker { layout = l, heads = 2, stride = 3 }
    assert.same({ 0, 3, 6, 9, 12, 15, 18, 21, 24 }, p:diagonals(1, 2))
    assert.equal(2, seen.heads)
    assert.same({ 0, 2 }, { unpack(sparsity.checker { layout = l, heads = 1 }:diagonals(1, 1), 1, 2) })
    assert.matches("there is a pattern", error_of(sparsity.register, { name = "window", build = print }))
    assert.matches('did you mean "build"', error_of(sparsity.register, { name = "x", bild = print }))
    sparsity.register { name = "broken", is_static = true, build = function(o) return o.new_plan() end }
    assert.matches("must return a finished plan",
      error_of(sparsity.build, { type = "broken" }, { layout = l, heads = 1 }))
  end)

  it("says what is missing", function()
    assert.matches("chooses from q and k", error_of(sparsity.vertical_slash, { layout = l, heads = 1 }))
    assert.matches("window", error_of(sparsity.window, { layout = l, heads = 1, windw = 3 }))
    assert.is_true(plan.is(sparsity.dense { layout = l, heads = 1 }))
    assert.is_nil(sparsity.no_such_pattern)
  end)
end)
