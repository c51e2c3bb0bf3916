--- The machine report, the parity proof, and the forecast held to what the allocator counts.
local doctor = require "halo.doctor"
local forecast = require "halo.forecast"
local fs = require "halo.fs"
local halo_ffi = require "halo.ffi"
local json = require "halo.json"
local memory = require "halo.memory"
local parity = require "halo.parity"
local process = require "halo.process"
local recipe = require "halo.recipe"

local C = halo_ffi.C

describe("halo doctor", function()
  it("finds nothing broken where the tests run, and says what is there", function()
    local names = {}
    for _, check in ipairs(doctor.run()) do
      names[check.name] = check
      assert.is_true(check.status == "ok" or check.status == "warn", check.name .. ": " .. check.text)
    end
    assert.truthy(names.blas.text:find("GFLOP/s", 1, true))
    assert.truthy(names.program.text:find("GC64", 1, true))
    for _, name in ipairs { "library", "processor", "memory", "threads", "mpi", "cuda", "packages", "folder" } do
      assert.truthy(names[name], name)
    end
  end)

  it("gives facts that can be stored", function()
    local e = doctor.environment()
    assert.is_true(e.cores >= 1)
    assert.is_true(e.memory.total > 2 ^ 28)
    assert.equal(json.encode(e), json.encode(json.decode(json.encode(e))))
  end)

  it("names a failure and its fix, and exits 3", function()
    local dir = fs.temp_dir()
    -- A PATH without mpirun: a warning, not a failure.
    local status = os.execute(("PATH=/nowhere %s doctor --json > %s/out"):format(process.halo(), dir))
    local report = json.read(dir .. "/out")
    local mpi
    for _, check in ipairs(report.checks) do
      if check.name == "mpi" then mpi = check end
    end
    assert.equal(0, status)
    assert.equal("warn", mpi.status)
    assert.equal("apt-get install openmpi-bin", mpi.fix)
    fs.remove_tree(dir)
  end)
end)

describe("parity", function()
  local threads
  setup(function()
    threads = C.halo_threads()
    C.halo_set_threads(1) -- the cases are tiny
  end)
  teardown(function() C.halo_set_threads(threads) end)

  it("holds for 2 and 3 ranks in both precisions", function()
    for _, row in ipairs(parity.run { ranks = { 2, 3 } }) do
      assert.equal(36, row.cases)
      assert.is_true(row.ok, ("%d ranks %s: %g, %s"):format(row.ranks, row.dtype, row.largest, row.worst))
      for _, part in ipairs(parity.parts) do
        assert.is_true(row[part] >= 0 and row[part] <= parity.limits[row.dtype])
      end
    end
  end)

  it("would see a wrong result", function()
    local limit = parity.limits.f64
    parity.limits.f64 = 1e-18 -- below rounding: the same numbers must fail now
    local rows = parity.run { ranks = { 2 }, dtypes = { "f64" } }
    parity.limits.f64 = limit
    assert.is_false(rows[1].ok)
  end)
end)

describe("the forecast", function()
  local dir
  setup(function()
    dir = fs.temp_dir()
    fs.mkdir(dir .. "/text")
    fs.write(dir .. "/text/a.txt", ("All happy families are alike; "):rep(3000))
    process.setenv("HALO_CACHE", dir .. "/cache")
  end)
  teardown(function() fs.remove_tree(dir) end)

  local function resolved(o)
    local text = ([[return recipe "f" {
      model = model.%s { layers = %d, width = %d, heads = 4, kv_heads = 2, vocab = %d, recompute = "%s" },
      data = text %q, optim = adamw { lr = 1e-3 }, attention = dense { ring = flat { block = 16 } },
      mesh = { cp = %d }, stages = { stage { context = %d, steps = 2, batch = %d } } }]]):format(o.family or "qwen2",
      o.layers, o.width, o.vocab or 300, o.recompute or "block", dir .. "/text", o.cp or 1, o.context, o.batch or 1)
    return recipe.resolve(recipe.load_text(text, "f.lua"))
  end

  it("counts the parameters that the model has", function()
    for _, family in ipairs { "qwen2", "llama", "qwen3" } do
      local r = resolved { family = family, layers = 2, width = 64, context = 64 }
      local m = require("halo.model").build(require("halo.model").config(r.model))
      assert.equal(m:count(), forecast.parameters(r.model))
    end
  end)

  -- The peak of a real step, over what was there before the job; packed text is not part of it.
  local function measured(r)
    collectgarbage()
    collectgarbage()
    local before = memory.live() - memory.live "data"
    local job = require("halo.job").new(r, { virtual_ranks = true })
    job:step()
    collectgarbage()
    memory.reset_peak()
    job:step()
    local peak = memory.peak() - memory.live "data" - before
    job:close()
    return peak
  end

  it("is near the measured peak of a step", function()
    for _, o in ipairs {
      { layers = 4, width = 128, context = 1024 },
      { layers = 2, width = 64, context = 2048, batch = 2 },
      { layers = 6, width = 64, context = 512, batch = 4 },
      { layers = 3, width = 128, context = 1024, recompute = "none" },
      { layers = 2, width = 256, context = 128 },
      { layers = 1, width = 64, context = 1024, vocab = 8000 },
    } do
      local r = resolved(o)
      local said, was = forecast.of(r).peak.total, measured(r)
      assert.is_true(math.abs(said / was - 1) < 0.15, ("said %.2f MiB, was %.2f MiB (layers %d, width %d, context %d)")
        :format(said / 2 ^ 20, was / 2 ^ 20, o.layers, o.width, o.context))
    end
  end)

  it("scales with ranks: each holds its share of the activations, all hold the weights", function()
    local one = forecast.of(resolved { layers = 4, width = 128, context = 4096 }).peak
    local four = forecast.of(resolved { layers = 4, width = 128, context = 4096, cp = 4 }).peak
    assert.equal(one.weights, four.weights)
    assert.is_true(four.activations < one.activations / 2)
    assert.equal(0, one.ring)
    assert.is_true(four.ring > 0)
  end)
end)
