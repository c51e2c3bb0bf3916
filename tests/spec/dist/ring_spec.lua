-- Run on every rank of 2 and of 4 processes (tools/check). Processes must give, bit for bit, what as many
-- virtual ranks in one process give: the C tests hold those to the definition.
require "tests.helper"
local attention = require "halo.attention"
local comms = require "halo.comm"
local layouts = require "halo.layout"
local mesh = require "halo.mesh"
local parity = require "halo.parity"
local plans = require "halo.plan"
local rings = require "halo.ring"
local tensor = require "halo.tensor"

local world = comms.world()
local W, rank = world:size(), world:rank()

local function same_bits(a, b)
  for _, name in ipairs(parity.parts) do
    local x, y = a[name], b[name]
    assert.equal(x.count, y.count)
    for i = 0, x.count - 1 do
      if x.values[i] ~= y.values[i] then
        error(("%s[%d] is %.17g on processes, %.17g on virtual ranks"):format(name, i, x.values[i], y.values[i]))
      end
    end
  end
end

-- mpirun calls a rank that ends without leaving MPI a failure.
teardown(function() require("halo.launch").close() end)

describe("processes", function()
  it("are several", function()
    assert.is_true(W > 1)
    assert.equal("mpi", world:name())
    assert.is_true(world:is_spread())
    assert.equal(1, world:here())
    assert.equal(W, world:local_size()) -- this test starts all of them on one machine
  end)

  it("add numbers and tensors in rank order", function()
    local sums = world:all_reduce { rank + 1, 0.1 * rank }
    local tenths = 0
    for r = 0, W - 1 do tenths = tenths + 0.1 * r end
    assert.same({ W * (W + 1) / 2, tenths }, sums)
    assert.equal(W - 1, world:all_reduce_max(rank))
    local t = world:all_reduce_tensor(tensor.full { 1000, value = rank })
    assert.equal(W * (W - 1) / 2, t:get(1000))
    local all = world:all_gather_tensor(tensor { rank, -rank })
    for r = 1, W do assert.same({ r - 1, 1 - r }, all[r]:totable()) end
  end)

  it("share text", function()
    local want = {}
    for r = 0, W - 1 do want[r + 1] = ("r"):rep(r) end
    assert.same(want, world:all_gather_text(("r"):rep(rank)))
    assert.equal("from " .. W - 1, world:broadcast_text(rank == W - 1 and "from " .. rank or nil, W - 1))
    assert.equal("", world:broadcast_text(rank == 0 and "" or nil))
  end)

  it("notice that they differ", function()
    world:same(7, "seven")
    assert.error_matches(function() world:same(rank == 1 and 8 or 7, "the plan") end, "the plan differs.*rank 1 has")
  end)

  it("form meshes", function()
    local m = mesh.new { world = world, data = 2 }
    assert.equal(W / 2, m.ring:size())
    assert.equal(2, m.data:size())
    assert.equal(rank, m:place "data" * (W / 2) + m.ring:rank())
    m:close()
    local half = world:split(rank % 2, -rank)
    assert.equal(W / 2, half:size())
    half:close()
  end)
end)

describe("a ring of processes", function()
  local function compare(o)
    local virtual = comms.virtual(W)
    o.comm = world
    local got = parity.compute(o)
    o.comm = virtual
    local want = parity.compute(o)
    virtual:close()
    same_bits(got, want)
  end

  for _, schedule in ipairs(rings.schedules) do
    for _, layout in ipairs { "contiguous", "zigzag", "striped" } do
      it(("equals virtual ranks: %s, %s"):format(schedule, layout), function()
        compare { tokens = 203, head_dim = 16, block = 8, batch = 2, documents = true, schedule = schedule,
          inner = schedule == "hierarchical" and 2 or nil, layout = layout }
      end)
    end
  end

  it("equals virtual ranks when messages are large", function()
    compare { tokens = 2000, heads = 2, kv_heads = 2, head_dim = 64, block = 32, plan = "dense" }
  end)

  it("refuses plans and shapes that differ, on every rank, and goes on", function()
    local layout = layouts.new { tokens = 64, world = W, block = 8 }
    local ring = rings.new { comm = world }
    local T = layout:local_tokens()
    local function attend(columns, kv_heads)
      local q = tensor.normal { 1, T, 2, 4, seed = 1 }
      local k = tensor.normal { 1, T, kv_heads, 4, seed = 2 }
      local plan = plans.new { layout = layout, heads = 2 }:add_columns(columns):force { diagonal = true }:finish()
      return attention.attend { q = q, k = k, v = k, plan = plan, ring = ring }
    end
    assert.error_matches(function() attend({ rank == 1 and 9 or 8 }, 2) end, "plan or shape differs.*rank 1 has")
    assert.error_matches(function() attend({ 8 }, rank == 1 and 1 or 2) end, "plan or shape differs.*rank 1 has")
    assert.same({ 1, T, 2, 4 }, attend({ 8 }, 2).shape)
  end)

  it("tells how long it waited", function()
    world:reset_timer()
    assert.equal(0, world:exposed_seconds())
    world:barrier()
    assert.is_true(world:exposed_seconds() > 0)
  end)
end)
