local optim = require "halo.optim"
local tensor = require "halo.tensor"
local memory = require "halo.memory"

describe("optim.adamw", function()
  local function leaf(values, dtype)
    return tensor(values, { dtype = dtype or "f32" }):require_grad()
  end

  -- PyTorch's AdamW, one number at a time.
  local function reference(p, grads, o)
    local m, v = 0, 0
    for step, g in ipairs(grads) do
      p = p - o.lr * o.decay * p
      m = o.b1 * m + (1 - o.b1) * g
      v = o.b2 * v + (1 - o.b2) * g * g
      p = p - o.lr * (m / (1 - o.b1 ^ step)) / (math.sqrt(v / (1 - o.b2 ^ step)) + o.eps)
    end
    return p
  end

  it("steps as the definition says, decaying matrices only", function()
    local w, b = leaf({ { 1, -2 }, { 3, 4 } }, "f64"), leaf({ 0.5, 6 }, "f64")
    local opt = optim.adamw({ { name = "w", tensor = w }, { name = "b", tensor = b } },
      { lr = 0.1, betas = { 0.8, 0.9 }, eps = 1e-6, decay = 0.5 })
    local grads = { 1, -0.25, 2 }
    for _, g in ipairs(grads) do
      opt:zero_grad()
      opt:flat_grad():fill(g)
      assert.is_nil(opt:step())
    end
    local o = { lr = 0.1, b1 = 0.8, b2 = 0.9, eps = 1e-6, decay = 0.5 }
    assert.near(reference(-2, grads, o), w:get(1, 2), 1e-14)
    o.decay = 0
    assert.near(reference(6, grads, o), b:get(2), 1e-14)
    assert.equal(3, opt.steps)
  end)

  it("adds gradients of several backward passes in the flat buffer", function()
    local w = leaf { 2, 3 }
    local opt = optim.adamw({ w }, { lr = 0.1 })
    for _ = 1, 3 do (w * w):sum():backward() end
    assert.same({ 12, 18 }, opt:flat_grad():totable())
    assert.same({ 12, 18 }, w.grad:totable())
    assert.near(math.sqrt(12 ^ 2 + 18 ^ 2), opt:grad_norm(), 1e-12)
    opt:zero_grad()
    assert.same({ 0, 0 }, w.grad:totable())
  end)

  it("clips the scaled norm as torch does", function()
    local function after(o)
      local w = leaf({ 1, 1 }, "f64")
      local opt = optim.adamw({ w }, { lr = 0.1, betas = { 0, 0 }, eps = 1 })
      opt:flat_grad():copy_from(tensor({ 3, 4 }, { dtype = "f64" }))
      local norm = opt:step(o)
      return w:get(1), norm
    end
    -- betas 0: p = 1 - 0.1 g / (|g| + 1)
    local function moved(g) return 1 - 0.1 * g / (math.abs(g) + 1) end
    local w, norm = after { clip = 1 }
    assert.near(5, norm, 1e-12)
    assert.near(moved(3 * 1 / (5 + 1e-6)), w, 1e-12)
    w, norm = after { clip = 1, scale = 0.1 } -- below the limit after scaling
    assert.near(0.5, norm, 1e-12)
    assert.near(moved(0.3), w, 1e-12)
    w, norm = after { clip = 1, norm = 10 } -- a norm that others know, over ranks for instance
    assert.near(10, norm, 1e-12)
    assert.near(moved(3 / (10 + 1e-6)), w, 1e-12)
    w, norm = after {}
    assert.near(moved(3), w, 1e-12)
    assert.is_nil(norm)
  end)

  it("stops before a step on a norm that is no number", function()
    local w = leaf { 1, 2 }
    local opt = optim.adamw({ w }, { lr = 0.1, clip = 1 })
    opt:flat_grad():fill(0 / 0)
    local ok, err = pcall(opt.step, opt)
    assert.is_false(ok)
    assert.equal("numerics", err.class)
    assert.same({ 1, 2 }, w:totable())
    assert.equal(0, opt.steps)
  end)

  it("goes on from a saved state to the last bit", function()
    for _, dtype in ipairs { "f32", "bf16", "f64" } do
      local function fresh()
        local w = tensor.normal { 40, 3, seed = 1, dtype = dtype }
        return w:require_grad(), optim.adamw({ { name = "w", tensor = w } }, { lr = 0.05, clip = 1 })
      end
      local function step(w, opt, i)
        opt:flat_grad():copy_from(tensor.normal { 120, seed = 2, stream = i, dtype = "f64" })
        opt:step()
        return w:hash()
      end
      local a, opt_a = fresh()
      for i = 1, 3 do step(a, opt_a, i) end
      local state, saved = opt_a:state(), {}
      for name, v in pairs(state) do saved[name] = tensor.is_tensor(v) and v:clone() or v end
      assert.equal(dtype == "bf16", saved.master ~= nil)
      local weights = a:clone()
      local last
      for i = 4, 6 do last = step(a, opt_a, i) end
      local b, opt_b = fresh()
      b:copy_from(weights)
      opt_b:set_state(saved)
      local again
      for i = 4, 6 do again = step(b, opt_b, i) end
      assert.equal(last, again)
    end
  end)

  it("says where each parameter lies", function()
    local a, b = leaf { { 1, 2 }, { 3, 4 } }, leaf { 5 }
    local opt = optim.adamw { { name = "a", tensor = a }, { name = "b", tensor = b } }
    assert.same({ { name = "a", first = 0, count = 4, shape = { 2, 2 } },
      { name = "b", first = 4, count = 1, shape = { 1 } } }, opt:layout())
    assert.matches("AdamW over 2 parameters", tostring(opt))
  end)

  it("refuses wrong lists and missing rates", function()
    assert.matches("empty", tostring(select(2, pcall(optim.adamw, {}))))
    assert.matches("parameter 1 must be a tensor", tostring(select(2, pcall(optim.adamw, { { name = "x" } }))))
    assert.matches("not a leaf", tostring(select(2, pcall(optim.adamw, { tensor { 1 } }))))
    local w = leaf { 1 }
    assert.matches("share memory", tostring(select(2, pcall(optim.adamw, { w, w }))))
    assert.matches('did you mean "betas"', tostring(select(2, pcall(optim.adamw, { w }, { beta = { 0, 0 } }))))
    local opt = optim.adamw { w }
    assert.matches("no lr", tostring(select(2, pcall(opt.step, opt))))
    assert.matches("moment1 is missing", tostring(select(2, pcall(opt.set_state, opt, { steps = 1 }))))
  end)

  it("keeps moments in bf16 when asked", function()
    local function fresh() return leaf { 1, 2, 3 } end
    local w = fresh()
    local opt = optim.adamw({ w }, { lr = 0.1, moments = "bf16" })
    opt:flat_grad():fill(1)
    opt:step()
    local state = opt:state()
    assert.equal("bf16", state.moment1.dtype)
    assert.equal("bf16", state.moment2.dtype)
    assert.equal("f32", opt:flat_grad().dtype)
    assert.near(0.1, state.moment1:totable()[2], 0.1 / 128)
    assert.near(0.9, w:totable()[1], 0.02) -- the first step is lr against the gradient
    local other = optim.adamw({ fresh() }, { lr = 0.1, moments = "bf16" })
    other:set_state(state)
    assert.same(state.moment2:totable(), other:state().moment2:totable())
    assert.matches('moments = "f16"', tostring(select(2, pcall(optim.adamw, { fresh() }, { moments = "f16" }))))
  end)

  it("frees its buffers", function()
    collectgarbage()
    collectgarbage()
    local before = memory.live()
    do
      local w = leaf { 1, 2, 3 }
      local opt = optim.adamw({ w }, { lr = 1 })
      opt:flat_grad():fill(1)
      opt:step()
    end
    for _ = 1, 4 do collectgarbage() end
    assert.is_true(memory.live() <= before)
  end)
end)
