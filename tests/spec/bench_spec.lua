--- Benchmarks run, count what they should, and print; how fast is not tested.
local bench = require "halo.bench"
local json = require "halo.json"

describe("bench", function()
  it("knows its files", function()
    assert.same({ "attention", "gemm", "ops", "step" }, bench.names())
    for _, name in ipairs(bench.names()) do
      local b = bench.get(name)
      assert.is_string(b.summary)
      assert.is_table(b.options)
    end
    assert.matches('did you mean "step"', tostring(select(2, pcall(bench.run, "stepp"))))
    assert.matches('did you mean "tokens"', tostring(select(2, pcall(bench.run, "gemm", { token = 3 }))))
  end)

  it("measures products beside plain BLAS", function()
    local r = bench.run("gemm", { tokens = 24, width = 16, ffn = 32, vocab = 50, repeats = 1, threads = 1 })
    assert.equal(8, #r.rows)
    assert.equal(2 * 24 * 16 * 16, r.rows[1].flops)
    assert.equal(4 * 8 * 50 * 16, r.rows[8].flops)
    for _, row in ipairs(r.rows) do assert.is_true(row.seconds > 0 and row.blas_seconds > 0) end
    assert.equal(1, r.machine.threads)
    assert.matches("gate, up, backward", tostring(r))
    assert.equal("gemm", json.decode(bench.json("gemm", r)).benchmark)
  end)

  it("uses the same products as BLAS does", function()
    -- The yardstick itself: c = op(a) op(b) for the three forms of a linear layer.
    local ffi = require "ffi"
    local tensor = require "halo.tensor"
    local a, b, c = tensor { { 1, 2, 3 }, { 4, 5, 6 } }, tensor { { 1, 0, 2 }, { 0, 1, 1 } }, tensor.ones { 3, 3 }
    local function p(t) return ffi.cast("float *", t:pointer()) end
    local y = tensor.zeros { 2, 2 }
    bench.sgemm { c = p(y), a = p(a), b = p(b), m = 2, n = 2, k = 3, tb = true }
    assert.same({ { 7, 5 }, { 16, 11 } }, y:totable())
    bench.sgemm { c = p(c), a = p(a), b = p(b), m = 3, n = 3, k = 2, ta = true, beta = 1 }
    assert.same({ { 2, 5, 7 }, { 3, 6, 10 }, { 4, 7, 13 } }, c:totable())
  end)

  it("measures ops beside a copy", function()
    local r = bench.run("ops", { batch = 1, tokens = 8, width = 16, heads = 2, ffn = 8, vocab = 20, adamw = 1000,
      repeats = 1 })
    local seen = {}
    for _, row in ipairs(r.rows) do
      seen[row.name] = true
      assert.is_true(row.seconds > 0 and row.bytes > 0 and row.share > 0)
    end
    for _, name in ipairs { "embedding, backward", "rmsnorm", "rope, backward", "swiglu", "cross_entropy, backward",
      "adamw", "gradient norm" } do assert.is_true(seen[name], name) end
  end)

  it("measures ops on a device #gpu", function()
    if require("halo.device").count "cuda" == 0 then return pending(require("halo.device").reason "cuda") end
    local r = bench.run("ops", { device = "cuda", tokens = 64, width = 32, heads = 2, ffn = 16, vocab = 40,
      adamw = 1000, chunk = 16, copy = 4096, repeats = 2 })
    local seen = {}
    for _, row in ipairs(r.rows) do
      seen[row.name] = true
      assert.is_true(row.seconds > 0 and row.bytes > 0 and row.share > 0)
    end
    for _, name in ipairs { "embedding, backward", "rmsnorm", "rope, backward", "swiglu_packed", "cross_entropy",
      "adamw", "gradient norm" } do assert.is_true(seen[name], name) end
  end)

  it("accounts for a whole step", function()
    local r = bench.run("step", { layers = 2, width = 32, heads = 2, ffn = 48, vocab = 60, batch = 2, tokens = 64,
      steps = 1 })
    -- 3 passes of 2 flops per weight and token; embedding tied to the head, one product
    local weights = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 60 * 32
    assert.equal(6 * weights * 128, r.product_flops)
    assert.equal(weights + 5 * 32, r.parameters)
    local share = 0
    for _, row in ipairs(r.rows) do share = share + row.share end
    assert.near(1, share, 1e-9)
    assert.is_true(r.tokens_per_second > 0 and r.peak_bytes.all > 0 and r.share > 0 and r.mean_share > 0)
    assert.is_true(r.mean_share < 100 and r.bound_seconds > 0)
    assert.matches("tokens/s", tostring(r))
  end)
end)
