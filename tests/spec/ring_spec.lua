require "tests.helper"
local comms = require "halo.comm"
local mesh = require "halo.mesh"
local ring = require "halo.ring"
local tensor = require "halo.tensor"

describe("comm", function()
  it("is one rank, or several in this process", function()
    local one, four = comms.self(), comms.virtual(4)
    assert.same({ "self", 1, 1, 0 }, { one:name(), one:size(), one:here(), one:rank() })
    assert.same({ "local", 4, 4, 0 }, { four:name(), four:size(), four:here(), four:rank() })
    assert.is_false(four:is_spread())
    assert.equal(4, four:local_size())
    assert.is_true(comms.is(four))
    assert.is_false(comms.is {})
    four:close()
    four:close()
    assert.equal("communicator (closed)", tostring(four))
    assert.error_matches(function() four:size() end, "the communicator was closed")
    assert.error_matches(function() comms.virtual(0) end, "world is 0")
    assert.error_matches(function() comms.virtual "two" end, "whole number")
  end)

  it("counts what ranks of one process share once", function()
    local c = comms.virtual(3)
    assert.same({ 1, 2 }, c:all_reduce { 1, 2 })
    assert.equal(7, c:all_reduce(7))
    assert.equal(7, c:all_reduce_max(7))
    local t = tensor { 1, 2 }
    assert.same({ 1, 2 }, c:all_reduce_tensor(t):totable())
    assert.equal(1, #c:all_gather_tensor(t))
    assert.same({ "x" }, c:all_gather_text "x")
    assert.equal("y", c:broadcast_text "y")
    c:same(3, "a number")
    c:barrier()
  end)
end)

describe("ring", function()
  it("knows whose keys are met when", function()
    local r = ring.new { comm = comms.virtual(4) }
    assert.same({ { 0, 3, 2, 1 }, { 1, 0, 3, 2 }, { 2, 1, 0, 3 }, { 3, 2, 1, 0 } }, r:sources())
    assert.is_nil(r:source(0, 4))
    assert.equal(4, r:steps())
    local h = ring.new { comm = comms.virtual(4), schedule = "hierarchical", inner = 2 }
    assert.same({ 0, 1, 2, 3 }, h:sources()[1])
    assert.matches("outer KV", h:explain())
    assert.equal("ring hierarchical (inner 2): 4 ranks over local, rank 0", tostring(h))
  end)

  it("refuses what cannot be", function()
    local c = comms.virtual(4)
    assert.error_matches(function() ring.new { comm = c, schedule = "flt" } end, 'did you mean "flat"')
    assert.error_matches(function() ring.new { comm = c, shedule = "flat" } end, 'did you mean "schedule"')
    assert.error_matches(function() ring.new { comm = c, schedule = "hierarchical", inner = 3 } end, "inner ring of 3")
    ring.check("hierarchical", 32, 8)
    assert.error_matches(function() ring.check("hierarchical", 32, 5) end, "inner ring of 5")
  end)
end)

describe("mesh", function()
  it("names ranks by axes", function()
    local m = mesh.new { world = comms.virtual(6), outer = 2 }
    assert.same({ 1, 2, 3 }, { m:size "data", m:size "outer", m:size "inner" })
    assert.same({ 0, 0, 0 }, { m:place "data", m:place "outer", m:place "inner" })
    assert.equal(6, m.ring:size())
    assert.equal(1, m.data:size())
    m:close()
    assert.equal("mesh (closed)", tostring(m))
    assert.error_matches(function() mesh.new { world = comms.virtual(6), data = 2 } end, "data must be 1")
    assert.error_matches(function() mesh.new { world = comms.virtual(6), inner = 4 } end, "is 4 ranks, the job has 6")
  end)
end)
