--- Backward from Lua: accumulation, switching off, recompute, errors, leaks; and the gradient checker.
local halo = require "halo"
local tensor, ops, autograd, checkgrad = halo.tensor, halo.ops, halo.autograd, halo.checkgrad

local function settle()
  collectgarbage()
  collectgarbage()
end

local function leaf(shape, seed)
  return tensor.normal { shape = shape, seed = seed, dtype = "f64", requires_grad = true }
end

describe("backward", function()
  it("adds to the gradients of leaves", function()
    local x = tensor({ 1, 2 }, { requires_grad = true })
    assert.is_nil(x.grad)
    x:square():sum():backward()
    assert.same({ 2, 4 }, x.grad:values())
    x:square():sum():backward()
    assert.same({ 4, 8 }, x.grad:values())
    x:drop_grad()
    assert.is_nil(x.grad)
    x.grad = tensor { 10, 10 }
    x:sum():backward()
    assert.same({ 11, 11 }, x.grad:values())
    x.grad = nil
    assert.is_nil(x.grad)
  end)

  it("starts from a given gradient", function()
    local x = tensor({ 1, 2 }, { requires_grad = true })
    x:square():backward(tensor { 1, 10 })
    assert.same({ 2, 40 }, x.grad:values())
  end)

  it("stops at detach and under no_grad", function()
    local x = tensor({ 3 }, { requires_grad = true })
    local y = x * x:detach()
    y:backward()
    assert.same({ 3 }, x.grad:values())
    local z = autograd.no_grad(function() return x * 2 end)
    assert.is_false(z.requires_grad)
    assert.is_true((x * 2).requires_grad)
    local inside = autograd.no_grad(function() return (autograd.enable_grad(function() return x * 2 end)) end)
    assert.is_true(inside.requires_grad)
    assert.has_error(function() autograd.no_grad(function() error("boom", 0) end) end, "boom")
    assert.is_true(autograd.is_enabled())
  end)

  it("frees the tape as it goes", function()
    settle()
    local nodes = autograd.live_nodes()
    local x = leaf({ 3 }, 1)
    local y = x
    for _ = 1, 50 do y = y:tanh() end
    y:sum():backward()
    y = nil
    settle()
    assert.equal(nodes, autograd.live_nodes())
    assert.is_nil(y)
  end)

  it("says when there is nothing to do, or nothing left", function()
    local ok, e = pcall(function() tensor({ 1 }):backward() end)
    assert(not ok)
    assert.matches("does not depend on a tensor that requires a gradient", tostring(e), 1, true)
    local x = tensor({ 1 }, { requires_grad = true })
    local y = x * 2
    y:backward()
    ok, e = pcall(function() y:backward() end)
    assert(not ok)
    assert.matches("already used", tostring(e), 1, true)
  end)
end)

describe("checkpoint", function()
  local w = leaf({ 4, 4 }, 1)
  local function block(x, scale) return (x:matmul(w):tanh() * (scale or 1) + x):softmax() end

  local function gradients(f)
    local x = leaf({ 3, 4 }, 2)
    w:drop_grad()
    local y = f(x)
    y:square():sum():backward()
    local g = { w.grad:values(), x.grad:values(), y:values() }
    w:drop_grad()
    return g
  end

  it("gives the same gradients to the last bit", function()
    local plain = gradients(function(x) return block(block(block(x, 2))) end)
    assert.same(plain, gradients(function(x)
      local function run(...) return autograd.checkpoint(block, ...) end
      return run(run(run(x, 2)))
    end))
    assert.equal(0, autograd.pending())
  end)

  it("nests", function()
    local plain = gradients(function(x) return block(block(x)) end)
    assert.same(plain, gradients(function(x)
      return (autograd.checkpoint(function(outer)
        return autograd.checkpoint(block, (autograd.checkpoint(block, outer)))
      end, x))
    end))
    assert.equal(0, autograd.pending())
  end)

  it("takes and gives several values, tensors or not", function()
    local x, ids = leaf({ 5, 3 }, 3), tensor({ 4, 0, 4 }, { dtype = "i64" })
    local function f(a, index, text, k)
      local rows = a:index_select(index)
      local v, i = rows:topk { k = k }
      return v * k, text, i, rows
    end
    local v, text, i, rows = autograd.checkpoint(f, x, ids, "label", 2)
    assert.equal("label", text)
    assert.equal("i64", i.dtype)
    ops.cat({ v, rows * 3 }):sum():backward()
    local got = x.grad:values()
    x:drop_grad()
    local v2, _, _, rows2 = f(x, ids, "label", 2)
    ops.cat({ v2, rows2 * 3 }):sum():backward()
    assert.same(x.grad:values(), got)
  end)

  it("may hand an argument or a weight through", function()
    local x = leaf({ 4, 4 }, 4)
    w:drop_grad()
    local a, b, y = autograd.checkpoint(function(t) return t, w, t:matmul(w) end, x)
    ops.cat({ a * 2, b * 3, y }):sum():backward()
    local gx, gw = x.grad:values(), w.grad:values()
    x:drop_grad()
    w:drop_grad()
    ops.cat({ x * 2, w * 3, x:matmul(w) }):sum():backward()
    for i = 1, 16 do
      assert.is_true(math.abs(gx[i] - x.grad:values()[i]) < 1e-13 and math.abs(gw[i] - w.grad:values()[i]) < 1e-13)
    end
    w:drop_grad()
  end)

  it("keeps only its arguments", function()
    settle()
    local x = tensor.normal { 256, 256, seed = 5, requires_grad = true }
    local function deep(t)
      for _ = 1, 10 do t = t:tanh() end
      return t
    end
    local bytes = 256 * 256 * 4
    local before = halo.memory.live()
    local y = deep(x)
    assert.is_true(halo.memory.live() - before > 9 * bytes)
    y:free()
    settle()
    before = halo.memory.live()
    local z = autograd.checkpoint(deep, x)
    assert.is_true(halo.memory.live() - before < 1.3 * bytes, "temporaries are freed at once")
    z:sum():backward()
    assert.is_true(halo.memory.live() - before < 3.9 * bytes) -- z, its sum, the gradient of x
  end)

  it("repeats random numbers, which come from counters", function()
    local x = leaf({ 100 }, 6)
    local function noisy(t) return t:dropout { p = 0.5, seed = 1, stream = 2 } end
    autograd.checkpoint(noisy, x):sum():backward()
    local g = x.grad:values()
    local y = noisy(tensor.ones { 100, dtype = "f64" }):values()
    assert.same(y, g)
  end)

  it("hands errors of the function over as they are, and lets go of everything", function()
    settle()
    local nodes, live = autograd.live_nodes(), halo.memory.live()
    local x = leaf({ 50 }, 7)
    local problem = { code = 42 }
    for _ = 1, 3 do
      local ok, e = pcall(function()
        local y = autograd.checkpoint(function(t)
          if autograd.is_enabled() then error(problem) end
          return t:tanh()
        end, x:exp())
        y:sum():backward()
      end)
      assert.is_false(ok)
      assert(rawequal(e, problem))
      ok, e = pcall(autograd.checkpoint, function() error(problem) end, x)
      assert.is_false(ok)
      assert(rawequal(e, problem))
    end
    assert.is_true(autograd.is_enabled())
    assert.equal(0, halo.memory.depth())
    x = nil
    settle()
    assert.is_nil(x)
    assert.equal(0, autograd.pending())
    assert.equal(nodes, autograd.live_nodes())
    assert.equal(live, halo.memory.live())
  end)

  it("says when the second run differs from the first", function()
    local x = leaf({ 4 }, 8)
    local ok, e = pcall(function()
      autograd.checkpoint(function(t)
        if autograd.is_enabled() then return t:reshape(2, 2) end
        return t * 1
      end, x):sum():backward()
    end)
    assert.is_false(ok)
    assert.matches("it was f64 [4] the first time", tostring(e), 1, true)
  end)

  it("forgets functions of forward passes that were dropped", function()
    local x = leaf({ 4 }, 9)
    for _ = 1, 10 do local _ = autograd.checkpoint(function(t) return t * 2 end, x) end
    settle()
    assert.equal(0, autograd.pending())
  end)

  it("is a plain call when the tape is off", function()
    local x = leaf({ 4 }, 10)
    local y = autograd.no_grad(function() return (autograd.checkpoint(function(t) return t * 2 end, x)) end)
    assert.is_false(y.requires_grad)
    assert.equal(0, autograd.pending())
  end)
end)

describe("parts of a packed weight", function()
  local optim = halo.optim
  -- Rows of one tensor as two parameters, and copies of them that lie apart.
  local function weights()
    local packed = tensor.normal { 5, 4, dtype = "f64", seed = 3 }
    local a, b = packed:slice { dim = 1, from = 1, to = 2 }, packed:slice { dim = 1, from = 3, to = 5 }
    local c, d = a:clone(), b:clone()
    for _, t in ipairs { a, b, c, d } do t:require_grad() end
    return a, b, c, d
  end
  local x = tensor.normal { 3, 4, dtype = "f64", seed = 5 }

  local function loss(p, q) return (ops.linear(x, ops.cat { p, q, dim = 1 }):square()):sum() end

  -- Do both begin at the same place in memory? Asked by a write, which works on every device.
  local function begin_together(p, q)
    local before = p:get(1, 1)
    p:set({ 1, 1 }, before + 1)
    local is_seen = q:get(1, 1) == before + 1
    p:set({ 1, 1 }, before)
    return is_seen
  end

  it("are joined without a copy, and give the gradients of separate ones", function()
    local a, b, c, d = weights()
    local joined = autograd.no_grad(function() return ops.cat { a, b, dim = 1 } end)
    local apart = autograd.no_grad(function() return ops.cat { c, d, dim = 1 } end)
    assert.is_true(begin_together(a, joined))
    assert.is_false(begin_together(c, apart))
    local one, two = optim.adamw({ a, b }), optim.adamw({ c, d }) -- gradients side by side in both
    for _ = 1, 2 do -- the second time adds
      loss(a, b):backward()
      loss(c, d):backward()
    end
    assert.same(c.grad:values(), a.grad:values())
    assert.same(d.grad:values(), b.grad:values())
    assert.same(two:flat_grad():values(), one:flat_grad():values())
    assert.is_true(one:grad_norm() > 0)
  end)

  it("do so without an optimizer, and where gradients lie apart", function()
    local a, b, c, d = weights()
    loss(a, b):backward()
    c.grad, d.grad = tensor.zeros { 2, 4, dtype = "f64" }, tensor.zeros { 3, 4, dtype = "f64" }
    loss(c, d):backward()
    assert.same(c.grad:values(), a.grad:values())
    assert.same(d.grad:values(), b.grad:values())
  end)

  it("keep a copy along other dims", function()
    local a = weights()
    local joined = autograd.no_grad(function() return ops.cat { a, a, dim = 2 } end)
    assert.is_false(begin_together(a, joined))
    assert.same({ 2, 8 }, joined.shape)
  end)
end)

describe("checkgrad", function()
  local x = leaf({ 3, 4 }, 11)

  it("accepts right gradients and tells how right they are", function()
    local report = checkgrad { fn = function(t) return t:tanh() * t, t:exp() end, inputs = { x } }
    assert.is_true(report.ok)
    assert.equal(12, report.checked)
    assert.is_true(report.error < 1e-8)
    assert.is_nil(x.grad)
  end)

  -- A wrong gradient made by hand: the forward sees t * k, the tape only t * 1.
  local function wrong(k) return function(t) return t:sin() + (t * k - t):detach() end end

  it("refuses gradients that are wrong by one percent, by sign, or missing", function()
    for _, k in ipairs { 1.01, 0.99, 3, -1 } do
      local report = checkgrad { fn = wrong(k), inputs = { x } }
      assert.is_false(report.ok, "k = " .. k)
      assert.is_true(report.error > 1e-4)
      assert.equal(1, report.input)
      assert.is_number(report.index)
    end
    assert.is_false(checkgrad { fn = function(t) return t:detach():exp() + t * 0 end, inputs = { x } }.ok)
    assert.is_false(checkgrad { fn = function(t) return t:detach():exp() end, inputs = { x } }.ok)
  end)

  it("counts NaN as wrong", function()
    assert.equal(math.huge, (checkgrad.compare({ 0 / 0 }, { 1 })))
    assert.equal(math.huge, (checkgrad.compare({ 1 }, { 0 / 0 })))
  end)

  it("wants fp64 leaves", function()
    local ok, e = pcall(function() return checkgrad { fn = ops.exp, inputs = { tensor { 1 } } } end)
    assert.is_false(ok)
    assert.matches("contiguous f64 leaf", tostring(e), 1, true)
  end)
end)
