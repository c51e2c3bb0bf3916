local ffi = require "ffi"
local layout = require "halo.layout"
local plan = require "halo.plan"

local function error_of(f, ...)
  local ok, err = pcall(f, ...)
  assert.is_false(ok)
  return tostring(err)
end

describe("layout", function()
  it("deals every token once, and finds it again", function()
    for _, kind in ipairs { "contiguous", "zigzag", "striped" } do
      local l = layout.new { kind = kind, tokens = 37, world = 3, block = 4 }
      local seen = {}
      for rank = 0, 2 do
        local map = l:map(rank)
        for i = 0, l:local_tokens() - 1 do
          local token = tonumber(map[i])
          assert.is_nil(seen[token])
          seen[token] = true
          assert.equal(token, l:global(rank, i))
          local r, j = l:locate(token)
          assert.same({ rank, i }, { r, j })
        end
      end
      assert.equal(l:padded_tokens(), #seen + 1)
    end
  end)

  it("stripes blocks by default", function()
    local l = layout.new { tokens = 1000, world = 4 }
    assert.same({ "striped", 64, 16, 256 }, { l:kind(), l:block(), l:blocks(), l:local_tokens() })
    assert.same({ 1, 64 }, { l:locate(5 * 64) })
    assert.equal("layout striped: 1000 tokens in blocks of 64 over 4 ranks, 256 each (24 padding)", tostring(l))
    assert.is_true(l == layout.new { tokens = 1000, world = 4 })
    assert.is_false(l == layout.new { tokens = 1000, world = 2 })
  end)

  it("says what is wrong", function()
    assert.matches('did you mean "striped"', error_of(layout.new, { kind = "stripe", tokens = 8 }))
    assert.matches("tokens is missing", error_of(layout.new, {}))
    assert.matches("n_tokens is 0", error_of(layout.new, { tokens = 0 }))
    local l = layout.new { tokens = 8, block = 4 }
    assert.matches("token is 8, wanted 0 to 7", error_of(l.locate, l, 8))
    assert.matches("no rank 1", error_of(l.global, l, 1, 0))
  end)
end)

describe("plan", function()
  local l = layout.new { tokens = 64, world = 2, block = 8 }

  local function small()
    return plan.new { layout = l, heads = 2, batch = 2 }
      :add_diagonals({ 0, 2 })
      :add_columns({ 3, 17 }, { head = 2 })
      :add_tiles({ { 7, 1 } }, { batch = 1, head = 1 })
  end

  it("shows what was selected, token by token", function()
    local p = small():finish()
    local function wanted(b, h, i, j)
      if j > i then return false end
      local d = math.floor(i / 8) - math.floor(j / 8)
      if d == 0 or d == 2 then return true end
      if h == 2 and (j == 3 or j == 17) then return true end
      return b == 1 and h == 1 and i >= 56 and j >= 8 and j < 16
    end
    local visible = { 0, 0 }
    for b = 1, 2 do
      for h = 1, 2 do
        for i = 0, 63 do
          for j = 0, 63 do
            local expected = wanted(b, h, i, j)
            assert.equal(expected, p:visible(b, h, i, j))
            if b == 1 and expected then visible[h] = visible[h] + 1 end
          end
        end
      end
    end
    assert.equal(visible[1] / (64 * 65 / 2), (p:density(1, 1)))
    assert.equal(visible[2] / (64 * 65 / 2), (p:density(1, 2)))
    assert.same({ 0, 2 }, p:diagonals(2, 1))
    assert.same({ 3, 17 }, p:columns(2, 2))
    assert.same({}, p:columns(2, 1))
  end)

  it("counts what only force rules bring in", function()
    local p = plan.new { layout = l, heads = 1 }:add_diagonals({ 1 }):force { sink = 2 }:finish()
    local density, forced = p:density()
    local diagonal, sub = 8 * 36, 7 * 64
    local sinks = 2 * (64 - 8 - 8) -- in rows where neither tile covers them
    assert.equal((diagonal + sub + sinks) / 2080, density)
    assert.is_true(math.abs(forced - (diagonal + sinks) / (diagonal + sub + sinks)) < 1e-12)
  end)

  it("keeps attention inside documents", function()
    local ids = {}
    for i = 1, 64 do ids[i] = i <= 20 and 5 or i <= 60 and 9 or -1 end
    local p = plan.new { layout = l, heads = 1, documents = ids }:add_all():finish()
    assert.is_true(p:is_dense())
    assert.is_true(p:visible(1, 1, 19, 0))
    assert.is_false(p:visible(1, 1, 20, 19))
    assert.is_false(p:visible(1, 1, 63, 63))
    assert.equal(1, (p:density()))
    local memory = ffi.new("int32_t[64]")
    for i = 0, 63 do memory[i] = i < 20 and 0 or i < 60 and 1 or -7 end
    local q = plan.new { layout = l, heads = 1, documents = memory }:add_all():finish()
    assert.equal(p:hash(), q:hash())
    assert.matches("has 3 document ids, wanted 64",
      error_of(function() plan.new { layout = l, heads = 1, documents = { 1, 2, 3 } } end))
  end)

  it("is a value: compared, kept, moved to other documents", function()
    local p, q = small():finish(), small():finish()
    assert.is_true(p == q)
    assert.equal(16, #p:hash())
    assert.is_false(p == small():add_columns({ 20 }):finish())
    local other = layout.new { kind = "zigzag", tokens = 64, world = 4, block = 8 }
    local on_other = plan.new { layout = other, heads = 1 }:add_diagonals({ 3, 0 }):finish()
    assert.is_true(on_other == plan.new { layout = l, heads = 1 }:add_diagonals({ 0, 3, 3 }):finish())
    local ids = {}
    for i = 1, 64 do ids[i] = i <= 30 and 1 or 2 end
    local moved = p:with_documents({ ids, ids, ids }, 3)
    assert.equal(3, moved:batch())
    assert.is_false(moved:visible(1, 2, 40, 3))
    assert.is_true(moved:visible(1, 2, 20, 3))
    assert.is_true(moved:visible(3, 1, 63, 62))
    assert.is_true(p == moved:with_documents(nil, 2))
  end)

  it("measures balance, work and far coverage", function()
    local p = plan.new { layout = l, heads = 3 }:add_all():finish()
    local balance = p:balance()
    -- rank 0 has rows 0 2 4 6, rank 1 rows 1 3 5 7: own keys 1+2+3+4 tiles each, others' 6 and 10
    assert.equal(20 / 18, balance.worker)
    assert.equal((1 + 10 / 8) / 2, balance.step)
    assert.equal(20 / 18, balance.critical)
    assert.same({ { 10 * 64 * 4 * 16 * 3, 6 * 64 * 4 * 16 * 3, 0 }, { 10 * 64 * 4 * 16 * 3, 10 * 64 * 4 * 16 * 3, 0 } },
      p:work(16))
    assert.same({ 48, 0 }, { p:far_coverage { far = 16 } })
    local near = plan.new { layout = l, heads = 3 }:add_columns({ 5 }, { head = 2 }):force { window = 9 }:finish()
    local reached = ffi.new("uint8_t[64]")
    assert.same({ 48, 47 }, { near:far_coverage { far = 16, reached = reached } })
    assert.same({ 48, 48 }, { near:far_coverage { far = 16, head = 1 } })
    assert.equal(1, reached[5])
    assert.equal(0, reached[4])
  end)

  it("prints itself", function()
    local p = small():force { window = 12 }:finish()
    local line = "^plan 2 x 2 heads, 64 tokens in blocks of 8: density %d+%.%d%d %% "
      .. "%(%d+%.%d %% of it forced%), hash %x+$"
    assert.matches(line, tostring(p))
    assert.matches("not finished", tostring(small()))
    local text = p:explain(1, 2)
    assert.matches("chosen: 2 of 8 diagonals: 0 2; 2 columns: 3 17; 0 tiles", text, 1, true)
    assert.matches("sink 0, window 12 tokens, diagonal yes", text, 1, true)
    assert.matches("\n    |-|###\n", text, 1, true) -- row of block 5: column 3, nothing, column 17, tiles
    assert.matches("all heads", p:explain())
  end)

  it("says what is wrong", function()
    assert.matches("heads is missing", error_of(plan.new, { layout = l }))
    local p = plan.new { layout = l, heads = 2 }
    assert.matches("head is 2, wanted %-1 to 1", error_of(p.add_all, p, { head = 3 }))
    assert.matches('did you mean "head"', error_of(p.add_all, p, { haed = 1 }))
    assert.matches("block distance 8 %(entry 1%), wanted 0 to 7", error_of(p.add_diagonals, p, { 0, 8 }))
    assert.matches("not finished", error_of(p.density, p))
    p:finish()
    assert.matches("finished", error_of(p.add_all, p))
  end)
end)
