--- Tensors as Lua objects: making, reading, views, scopes, memory, messages.
local ffi = require "ffi"
local halo = require "halo"
local tensor, ops, memory = halo.tensor, halo.ops, halo.memory
local C = require("halo.ffi").C

local function settle()
  collectgarbage()
  collectgarbage()
  return memory.live()
end

local function message(f)
  local ok, e = pcall(f)
  assert(not ok, "no error")
  return tostring(e)
end

describe("making tensors", function()
  it("from numbers and nested tables", function()
    local t = tensor { { 1, 2, 3 }, { 4, 5, 6 } }
    assert.same({ 2, 3 }, t.shape)
    assert.equal("f32", t.dtype)
    assert.equal("cpu", t.device)
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, t:totable())
    assert.equal(7, tensor(7):item())
    assert.same({}, tensor(7).shape)
    assert.same({ 0 }, tensor({}).shape)
    assert.same({ { 1, 2 }, { 3, 4 } }, tensor({ 1, 2, 3, 4 }, { shape = { 2, 2 }, dtype = "f64" }):totable())
    assert.same({ { 5, 7 } }, tensor.new({ { 5, 7 } }, { dtype = "i32" }):totable())
  end)

  it("in every dtype, there and back", function()
    for _, dtype in ipairs(tensor.dtypes) do
      local t = tensor({ 1, 0, 3, 200 }, { dtype = dtype })
      assert.equal(dtype, t.dtype)
      assert.same({ 1, 0, 3, 200 }, t:values())
      for _, other in ipairs(tensor.dtypes) do
        assert.same({ 1, 0, 3, 200 }, t:to(other):values(), dtype .. " -> " .. other)
        assert.equal(other, t:to(other).dtype)
      end
    end
    assert.same({ 1.0078125 }, tensor({ 1.007 }, { dtype = "bf16" }):values())
    assert.same({ 3, -3, 0 }, tensor({ 3.9, -3.9, 0 / 0 }):to("i32"):values())
    assert.same({ 255, 0 }, tensor({ 300, -5 }):to("u8"):values())
  end)

  it("by constructors", function()
    assert.same({ { 0, 0 }, { 0, 0 } }, tensor.zeros({ 2, 2 }):totable())
    assert.same({ 1, 1 }, tensor.ones({ shape = { 2 }, dtype = "bf16" }):values())
    assert.same({ 2.5, 2.5 }, tensor.full({ 2, value = 2.5 }):values())
    assert.same({ 0, 1, 2 }, tensor.arange(3):values())
    assert.equal("i64", tensor.arange(3).dtype)
    assert.same({ 1, 1.5, 2 }, tensor.arange({ count = 3, from = 1, step = 0.5, dtype = "bf16" }):values())
    assert.same({ 2, 0, 3 }, tensor.new({ 2, 0, 3 }).shape)
    local host = ffi.new("int32_t[4]", { 4, 3, 2, 1 })
    assert.same({ { 4, 3 }, { 2, 1 } }, tensor.from_pointer(host, { shape = { 2, 2 }, dtype = "i32" }):totable())
    assert.is_true(tensor.zeros({ 2, requires_grad = true }).requires_grad)
  end)

  it("at random from counters", function()
    local a = tensor.normal { 4, 1000, seed = 3, stream = 2, mean = 1, std = 2, dtype = "f64" }
    local b = tensor.normal { 4000, seed = 3, stream = 2, mean = 1, std = 2, dtype = "f64" }
    assert.same(a:values(), b:values())
    assert.is_true(math.abs(a:mean():item() - 1) < 0.15)
    assert.is_true(math.abs(a:var():sqrt():item() - 2) < 0.1)
    local u = tensor.uniform { 4000, seed = 3, lo = -1, hi = 3 }
    assert.is_true(u:min():item() >= -1 and u:max():item() < 3 and math.abs(u:mean():item() - 1) < 0.1)
    assert(tensor.normal({ 9, seed = 1 }):hash() ~= tensor.normal({ 9, seed = 2 }):hash())
  end)

  it("refuses nonsense with the right name beside it", function()
    local function has(text, f) assert.matches(text, message(f), 1, true) end
    has('did you mean "dtype"', function() return tensor.zeros { 2, dtpe = "f32" } end)
    has('did you mean "bf16"', function() return tensor.zeros { 2, dtype = "bf6" } end)
    has("a row at depth 2 has 1 elements, the first one has 2", function() return tensor { { 1, 2 }, { 3 } } end)
    has('an element is "x"', function() return tensor { "x" } end)
    has("3 numbers for a shape of 4", function() return tensor({ 1, 2, 3 }, { shape = { 2, 2 } }) end)
    has("size 1 of the shape is -1", function() return tensor.zeros { -1 } end)
    has("size 1 of the shape is 1.5", function() return tensor.zeros { 1.5 } end)
    has("9 dims, at most 8", function() return tensor.zeros { 1, 1, 1, 1, 1, 1, 1, 1, 1 } end)
    has("or the product is too large", function() return tensor.zeros { 2 ^ 40, 2 ^ 40 } end)
    has("count is missing", function() return tensor.arange {} end)
    has("unknown device", function() return tensor.zeros { 2, device = "gpu" } end)
  end)
end)

describe("reading and writing", function()
  local t = tensor { { 1, 2, 3 }, { 4, 5, 6 } }

  it("single elements, from 1 and from the end", function()
    assert.equal(6, t:get(2, 3))
    assert.equal(4, t:get(-1, 1))
    local c = t:clone():set({ 1, -1 }, 9)
    assert.equal(9, c:get(1, 3))
    assert.equal(3, t:get(1, 3))
    assert.matches("position 3 of dim 1", message(function() return t:get(3, 1) end), 1, true)
    assert.matches("1 positions for f32 [2,3]", message(function() return t:get(1) end), 1, true)
    assert.matches("one is wanted", message(function() return t:item() end), 1, true)
  end)

  it("sizes", function()
    assert.equal(2, #t)
    assert.equal(3, t:size(2))
    assert.equal(3, t:size(-1))
    assert.equal(2, t.ndim)
    assert.equal(6, t.count)
    assert.same({ 3, 1 }, t.strides)
    assert.is_true(t.is_contiguous)
    assert.is_false(t:t().is_contiguous)
    assert.matches("dims count from 1", message(function() return t:size(3) end), 1, true)
    assert.matches("dims count from 1", message(function() return t:size(0) end), 1, true)
  end)

  it("whole tensors in place", function()
    local a = tensor.zeros { 2, 2 }
    assert.same({ { 3, 3 }, { 3, 3 } }, a:fill(3):totable())
    a:select({ dim = 2, index = 1 }):fill(7)
    assert.same({ { 7, 3 }, { 7, 3 } }, a:totable())
    a:t():copy_from(tensor { { 1, 2 }, { 3, 4 } })
    assert.same({ { 1, 3 }, { 2, 4 } }, a:totable())
    a:add_scaled(tensor.ones { 2, 2 }, 10):scale(2)
    assert.same({ { 22, 26 }, { 24, 28 } }, a:totable())
    local p = a:pointer()
    p[3] = -1
    assert.equal(-1, a:get(2, 2))
  end)

  it("hashes contents, shape and dtype", function()
    local a = tensor { 1, 2 }
    assert(a:hash() == tensor({ 1, 2 }):hash())
    assert(a:hash() ~= tensor({ 2, 1 }):hash())
    assert(a:hash() ~= a:reshape(2, 1):hash())
    assert(tensor({ { 1, 3 }, { 2, 4 } }):t():hash() == tensor({ { 1, 2 }, { 3, 4 } }):hash())
  end)

  it("prints shape, dtype, device and the first values", function()
    assert.equal("f32 [2,3] cpu: 1 2 3 4 5 6", tostring(t))
    assert.equal("f32 [7] cpu: 0 0 0 0 0 0 ...", tostring(tensor.zeros { 7 }))
    assert.equal("f64 [] cpu grad: 1.5", tostring(tensor(1.5, { dtype = "f64", requires_grad = true })))
    assert.equal("f32 [0,2] cpu: (no elements)", tostring(tensor.zeros { 0, 2 }))
    assert.equal("t = i64 [1] cpu: 4", "t = " .. tensor({ 4 }, { dtype = "i64" }))
  end)
end)

describe("operators and views", function()
  local a = tensor { { 1, 2 }, { 3, 4 } }

  it("take tensors and numbers on either side", function()
    assert.same({ { 2, 4 }, { 6, 8 } }, (a + a):totable())
    assert.same({ { 3, 4 }, { 5, 6 } }, (a + 2):totable())
    assert.same({ { 3, 4 }, { 5, 6 } }, (2 + a):totable())
    assert.same({ { 0, 1 }, { 2, 3 } }, (a - 1):totable())
    assert.same({ { 0, -1 }, { -2, -3 } }, (1 - a):totable())
    assert.same({ { 2, 4 }, { 6, 8 } }, (2 * a):totable())
    assert.same({ { 2, 1 }, { 2 / 3, 0.5 } }, (2 / a:to "f64"):totable())
    assert.same({ { 1 / 3, 2 / 3 }, { 1, 4 / 3 } }, (a:to "f64" / 3):totable()) -- rounded once
    assert.same({ { 1, 4 }, { 9, 16 } }, (a ^ 2):totable())
    assert.same({ { 1, 4 }, { 27, 256 } }, (a ^ a):totable())
    assert.same({ { -1, -2 }, { -3, -4 } }, (-a):totable())
  end)

  it("share storage with what they are views of", function()
    local base = tensor.zeros { 3, 4 }
    for _, view in ipairs {
      base:t(), base:reshape(12), base:slice { dim = 1, from = 2 }, base:select { dim = 2, index = 3 },
      base:unsqueeze(1), base:permute(2, 1), base:expand(2, 3, 4), base:detach(), base:reshape(2, 6),
    } do
      base:fill(0)
      view:fill(1)
      assert.is_true(base:sum():item() > 0)
    end
    base:fill(0)
    base:t():reshape(12):fill(1) -- no strides fit: a copy
    assert.equal(0, base:sum():item())
    base:clone():fill(1)
    assert.equal(0, base:sum():item())
  end)

  it("slice with both ends included", function()
    local v = tensor.arange(5)
    assert.same({ 1, 2, 3 }, v:slice({ from = 2, to = 4 }):values())
    assert.same({ 3, 4 }, v:slice({ from = -2 }):values())
    assert.same({ 0, 2, 4 }, v:slice({ step = 2 }):values())
    assert.same({}, v:slice({ from = 3, to = 2 }):values())
    assert.same({}, v:slice({ from = 6 }):values())
    assert.matches("to is 6, the dim has 1..5", message(function() return v:slice { to = 6 } end), 1, true)
    assert.matches("index is 0", message(function() return v:select { dim = 1, index = 0 } end), 1, true)
  end)

  it("join, cut and repeat", function()
    local list = {}
    for i = 1, 20 do list[i] = tensor { i } end -- more than one op takes
    assert.equal(210, ops.cat(list, 1):sum():item())
    assert.same({ 20 }, ops.cat(list).shape)
    assert.same({ { { 1, 2 }, { 3, 4 } }, { { 1, 2 }, { 3, 4 } } }, ops.stack({ a, a }):totable())
    assert.same({ { { 1, 2 }, { 1, 2 } }, { { 3, 4 }, { 3, 4 } } }, ops.stack({ a, a, dim = 2 }):totable())
    assert.same({ { { 1, 1 }, { 2, 2 } }, { { 3, 3 }, { 4, 4 } } }, ops.stack({ a, a }, -1):totable())
    local x, y, z = tensor.arange(5):split { size = 2 }
    assert.same({ { 0, 1 }, { 2, 3 }, { 4 } }, { x:values(), y:values(), z:values() })
    x, y = tensor.arange(5):split { sizes = { 1, 4 } }
    assert.same({ { 0 }, { 1, 2, 3, 4 } }, { x:values(), y:values() })
    for _, sizes in ipairs { { 1, 5 }, { 1, 1 } } do
      local text = message(function() return tensor.arange(5):split { sizes = sizes } end)
      assert.matches("do not add up to 5", text, 1, true)
    end
    assert.same({ { 1, 2, 1, 2 }, { 3, 4, 3, 4 } }, a:tile(1, 2):totable())
    assert.same({ { 1, 2 }, { 1, 2 }, { 3, 4 }, { 3, 4 } }, a:repeat_each({ dim = 1, count = 2 }):totable())
    assert.same({ { 1, 1, 2, 2 }, { 3, 3, 4, 4 } }, a:repeat_each({ dim = -1, count = 2 }):totable())
    assert.same({ 3, 4, 0, 1, 2 }, tensor.arange(5):roll({ shift = 2 }):values())
    assert.same({ 1, 2, 3, 4, 0 }, tensor.arange(5):roll({ shift = -1 }):values())
  end)

  it("carry gradients through every composed form", function()
    local x = tensor.normal { 3, 4, dtype = "f64", seed = 1, requires_grad = true }
    for name, f in pairs {
      stack = function(t) return ops.stack { t, t * 2 } end,
      split = function(t)
        local p, q = t:split { size = 3 }
        return ops.cat { q, p * p }
      end,
      tile = function(t) return t:tile(2, 3) end,
      repeat_each = function(t) return t:repeat_each { dim = 1, count = 3 } * t:repeat_each { dim = 1, count = 3 } end,
      roll = function(t) return t:roll { dim = 1, shift = 1 } * t end,
      operators = function(t) return (2 - t) / (t ^ 2 + 1) * 3 - -t / 2 end,
    } do
      local report = halo.checkgrad { fn = f, inputs = { x } }
      assert(report.ok, name .. ": " .. report.error)
    end
  end)

  it("take parameters by name, in order, or not at all", function()
    local want = { 4, 6 }
    assert.same(want, a:sum({ dim = 1 }):values())
    assert.same(want, a:sum(1):values())
    assert.same({ { 4, 6 } }, a:sum(1, true):totable())
    assert.same(want, ops.sum(a, { dim = -2 }):values())
    assert.equal(10, a:sum():item())
    assert.same({ 2, 2, 3, 3 }, a:clamp(2, 3):values())
    assert.same({ 0, 0, 3, 4 }, ops.where(a:gt(2), a, 0):values())
    assert.same({ 1, 2, 1, 1 }, ops.where(a:gt(2), 1, a):values())
    assert.matches("takes 2 parameters, got 3", message(function() return (a:sum(1, true, 3)) end), 1, true)
    assert.matches("keepdim must be a number", message(function() return (a:sum { keepdim = "yes" }) end), 1, true)
  end)

  it("have help made from the op table", function()
    assert.equal("softmax(x) { dim = -1 }\ne^x over its sum along dim; 0 where all of x is -inf.", ops.help "softmax")
    assert.matches("No gradient", ops.help "argmax", 1, true)
    assert.is_true(#ops.list() > 80)
    assert.matches('did you mean "softmax"', message(function() return ops.help "sotfmax" end), 1, true)
  end)
end)

describe("errors", function()
  it("blame the line that asked", function()
    local a = tensor.zeros { 2, 2 }
    local line = debug.getinfo(1, "l").currentline + 1
    for i, f in ipairs {
      function() local _ = a:matmul(tensor.zeros { 3, 3 }) end,
      function() local _ = a + tensor.zeros { 3 } end,
      function() local _ = a:softmax(3) end,
      function() local _ = a:reshape(3) end,
      function() local _ = ops.cat { a, tensor.zeros { 3 } } end,
      function() local _ = a:slice { from = 4 } end,
      function() local _ = a.shpae end,
      function() a.shape = 1 end,
      function() local _ = a:get(3, 3) end,
      function() local _ = tensor.zeros { 2, dtype = "f31" } end,
      function() local _ = tensor { { 1 }, 2 } end,
      function() local _ = tensor.arange { cuont = 3 } end,
      function() a.requires_grad = nil tensor.arange(2).requires_grad = true end,
      function() tensor.backward(a) end,
    } do
      if i < 14 then
        local text = message(f)
        assert.matches("tensor_spec.lua:" .. line + i .. ":", text, 1, true)
      end
    end
  end)
end)

describe("memory", function()
  it("is freed by a scope, but for what it returns or keeps", function()
    local before = settle()
    local kept, gone
    local returned, nested = halo.scope(function()
      local a = tensor.zeros { 1000 }
      gone = a + 1
      kept = halo.keep(a * 2)
      local b = a + 3
      return b, { deep = { a + 4 } }
    end)
    assert.same({ 3 }, { returned:get(1) })
    assert.equal(4, nested.deep[1]:get(1))
    assert.equal(0, kept:get(1))
    assert.matches("was freed: its scope ended", message(function() return gone.shape end), 1, true)
    assert.matches("was freed", message(function() return ops.add(returned, gone) end), 1, true)
    assert.equal("tensor (freed)", tostring(gone))
    local three = memory.live() - before
    assert.is_true(three >= 3 * 4000 and three < 3 * 4000 * 1.3) -- nothing else, without the collector
  end)

  it("is freed by a scope that fails", function()
    local before = settle()
    local inner
    assert.matches("boom", message(function()
      halo.scope(function()
        inner = tensor.zeros { 1000 }
        error "boom"
      end)
    end), 1, true)
    assert.equal(before, memory.live())
    assert.equal(0, memory.depth())
    assert.equal("tensor (freed)", tostring(inner))
  end)

  it("moves from an inner scope to the outer one", function()
    local before = settle()
    local escaped
    local result = halo.scope(function()
      local inner = halo.scope(function() return tensor.zeros { 1000 } end)
      escaped = halo.scope(function() return halo.keep(tensor.ones { 1000 }) end)
      return (inner + 1)
    end)
    assert.is_true(memory.live() - before < 2 * 4000 * 1.3)
    assert.equal(1, result:get(1))
    assert.equal(1, escaped:get(1))
  end)

  it("can be freed by hand, twice", function()
    local before = settle()
    local a = tensor.zeros { 1000 }
    local view = a:reshape(10, 100)
    a:free()
    a:free()
    assert.equal(0, view:get(1, 1)) -- storage is shared
    view:free()
    assert.equal(before, memory.live())
  end)

  it("of forgotten temporaries is bounded in a plain loop", function()
    settle()
    local before = memory.live()
    memory.reset_peak()
    for _ = 1, 2000 do
      local a = tensor.zeros { 2 ^ 16 } -- 256 KiB; 500 MiB in all
      local _ = a + 1
    end
    assert.is_true(memory.peak() - before < 200 * 2 ^ 20, ("peak %.0f MiB"):format((memory.peak() - before) / 2 ^ 20))
    settle()
    assert.equal(before, memory.live())
  end)

  it("that is short makes the engine collect and try again", function()
    settle()
    C.halo_memory_limit(0, memory.live() + 2 ^ 20)
    local ok, e = pcall(function()
      for _ = 1, 100 do local _ = tensor.zeros { 2 ^ 16 } end -- 256 KiB each, all forgotten
    end)
    local failed, failure = pcall(function()
      local all = {}
      for i = 1, 100 do all[i] = tensor.zeros { 2 ^ 16 } end
      return all
    end)
    C.halo_memory_limit(0, 0)
    assert(ok, e)
    assert.is_false(failed)
    assert.equal("memory", failure.class)
    assert.equal("HALO_ENOMEM", failure.name)
    assert.matches("memory on cpu, MiB: .*other %d", tostring(failure))
  end)

  it("is counted under tags", function()
    settle()
    local before = memory.live "weights"
    local w = memory.with_tag("weights", function() return tensor.zeros { 1000 } end)
    assert.is_true(memory.live "weights" - before >= 4000)
    assert.equal(0, w:get(1))
    assert.matches("boom", message(function() memory.with_tag("data", function() error "boom" end) end), 1, true)
    local other = memory.live "other"
    local _ = tensor.zeros { 1000 }
    assert.is_true(memory.live "other" > other) -- the tag is popped after an error, too
    assert.matches('did you mean "weights"', message(function() memory.live "wieghts" end), 1, true)
  end)
end)
