require "tests.helper"
local fs = require "halo.fs"
local json = require "halo.json"
local tensor = require "halo.tensor"
local trace = require "halo.trace"

describe("trace", function()
  it("counts ops and spans", function()
    trace.reset()
    local out = trace.span("outer", function()
      local a = tensor.normal { 64, 64 }
      return (a:matmul(a)).ndim
    end)
    assert.equal(2, out)
    assert.equal(1, trace.total("outer").calls)
    assert.equal(1, trace.total("op.matmul").calls)
    assert.is_true(trace.total("outer").seconds >= trace.total("op.matmul").seconds)
    local sum = 0
    for _, r in ipairs(trace.totals()) do sum = sum + r.share end
    assert.near(1, sum, 1e-9)
    assert.truthy(trace.table(3):find("op.matmul", 1, true))
    trace.count("tokens", 128)
    assert.equal(128, trace.total("tokens").bytes)
    assert.is_nil(trace.total "never used")
  end)

  it("passes errors through and closes the span", function()
    trace.reset()
    assert.has_error(function() trace.span("fails", error, "no") end, "no")
    assert.equal(1, trace.total("fails").calls)
  end)

  it("can be switched off", function()
    trace.reset()
    assert.equal("totals", trace.set "off")
    trace.span("silent", function() end)
    assert.equal("off", trace.set "totals")
    assert.is_nil(trace.total "silent")
  end)

  it("writes Chrome's format", function()
    local dir = fs.temp_dir()
    trace.record()
    trace.span("step", function() tensor.ones({ 4 }):exp() end)
    trace.export(dir .. "/t.json", 3)
    local t = json.read(dir .. "/t.json")
    local names = {}
    for _, e in ipairs(t.traceEvents) do
      names[e.name] = e.pid
      if e.ph == "X" then assert.is_true(e.dur >= 0 and e.ts > 0) end
    end
    assert.equal(3, names.step)
    assert.equal(3, names["op.exp"])
    fs.remove_tree(dir)
  end)

  it("hears signals", function()
    local ffi = require "ffi"
    pcall(ffi.cdef, "int raise(int signal);")
    trace.catch_signals()
    assert.is_nil(trace.signals())
    ffi.C.raise(10)
    assert.same({ usr1 = true }, trace.signals())
    trace.clear_signals()
    assert.is_nil(trace.signals())
    trace.release_signals()
  end)

  it("keeps the last collectives", function()
    local dir = fs.temp_dir()
    local begun, done, waiting = trace.flight()
    assert.is_true(begun >= done and waiting >= 0)
    trace.where(7, 2)
    trace.flight_dump(dir .. "/flight.jsonl")
    assert.is_true(fs.is_file(dir .. "/flight.jsonl"))
    fs.remove_tree(dir)
  end)
end)
