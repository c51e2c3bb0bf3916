--- Every op of the table against plain Lua, in every dtype and layout, and every gradient against
-- central differences (reference: reliability N1: error <= 1e-6 in fp64, planted faults are refused).
-- HALO_TEST_SHAPES sets how many random shapes each op gets (default 10; N1 asks for 200 before a release).
local here = debug.getinfo(1, "S").source:sub(2):gsub("[^/]*$", "")
package.path = here .. "?.lua;" .. package.path

local halo = require "halo"
local cases = require "op_cases"
local inputs = require "op_inputs"
local ops, tensor, checkgrad = halo.ops, halo.tensor, halo.checkgrad

local random_shapes = tonumber(os.getenv "HALO_TEST_SHAPES") or 10

local names = ops.list()

-- Cases of an op: those written down, then random sizes of them.
local function all_cases(entry, n_random)
  local list = { unpack(entry) }
  if entry.fixed then return list end
  local small = {}
  for _, case in ipairs(entry) do
    if inputs.largest(case) <= 600 then small[#small + 1] = case end
  end
  for i = 1, n_random do list[#list + 1] = inputs.resized(small[i % #small + 1], i) end
  return list
end

-- Bound on |y - reference| for results of a dtype. fp64: sums of up to 1e4 terms. fp32: a few roundings
-- of 6e-8. bf16: one rounding of the result (2^-9), computed in fp32 from inputs that are exact.
local bounds = {
  f64 = { relative = 1e-12, absolute = 1e-12 },
  f32 = { relative = 4e-6, absolute = 4e-6 },
  bf16 = { relative = 2 ^ -8, absolute = 1e-5 },
}

local function same_shape(a, b)
  if #a ~= #b then return false end
  for d = 1, #a do
    if a[d] ~= b[d] then return false end
  end
  return true
end

-- Compare results with reference arrays; integers exactly. `own`: bounds of an op that rounds in between.
local function compare(what, results, expected, own)
  for k, want in ipairs(expected) do
    local y = results[k]
    assert(y ~= nil, what .. ": result " .. k .. " is missing")
    assert(same_shape(y.shape, want.shape), ("%s: result %d has shape %s, not %s"):format(what, k,
      table.concat(y.shape, ","), table.concat(want.shape, ",")))
    local bound = own and own[y.dtype] or bounds[y.dtype] or { relative = 0, absolute = 0 }
    for i, v in ipairs(y:values()) do
      local w = want[i]
      local is_equal = v == w or math.abs(v - w) <= bound.absolute + bound.relative * math.abs(w)
      assert(is_equal, ("%s: result %d, element %d is %.17g, not %.17g"):format(what, k, i, v, w))
    end
  end
end

local function expected_of(entry, case, views)
  local list = {}
  for i, view in ipairs(views) do list[i] = inputs.array(view) end
  return { entry.reference(case.params or {}, unpack(list)) }
end

local function check_forward(name, entry, dtype, layouts)
  local is_wanted = not entry.dtypes
  for _, allowed in ipairs(entry.dtypes or {}) do is_wanted = is_wanted or allowed == dtype end
  if not is_wanted then return end
  local list = all_cases(entry, math.min(random_shapes, 10))
  for n, case in ipairs(list) do
    for _, layout in ipairs(layouts) do
      halo.scope(function()
        local views = inputs.views(case, inputs.leaves(case, dtype, layout, n), layout)
        local results = { inputs.call(name, entry, case, views) }
        compare(inputs.describe(name, case, layout) .. " " .. dtype, results, expected_of(entry, case, views),
          entry.bounds)
      end)
    end
  end
end

describe("the op table", function()
  it("has a case for every op", function()
    for _, name in ipairs(names) do
      assert(cases[name] and #cases[name] > 0, name .. " has no case in tests/spec/op_cases.lua")
    end
  end)

  it("has an op for every case", function()
    for name in pairs(cases) do assert(ops.row(name), "there is no op " .. name) end
  end)

  it("has names, documents and defaults that parse", function()
    for _, name in ipairs(names) do
      local row = ops.row(name)
      assert(#row.doc > 0 and #row.inputs > 0 and row.n_out >= 1)
      for _, p in ipairs(row.params) do assert.is_number(p.default, name .. "." .. p.name) end
      assert.is_string(ops.help(name))
    end
  end)
end)

describe("forward", function()
  for _, name in ipairs(names) do
    local entry = cases[name]
    if entry then
      it(name .. " in f64", function() check_forward(name, entry, "f64", inputs.layouts) end)
      it(name .. " in f32 and bf16", function()
        check_forward(name, entry, "f32", { inputs.layouts[1] })
        check_forward(name, entry, "bf16", { inputs.layouts[1] })
      end)
      if entry.integers then
        it(name .. " on integers", function()
          for _, dtype in ipairs { "i64", "i32" } do check_forward(name, entry, dtype, { inputs.layouts[1] }) end
        end)
      end
    end
  end
end)

-- ---- gradients ----------------------------------------------------------------------------------

local function is_differentiable(spec) return inputs.is_data(spec) and spec.grad ~= false end

-- The report of one case and layout; nil where no input is differentiable.
local function check_gradient(name, entry, case, layout, stream)
  return halo.scope(function()
    local leaves = inputs.leaves(case, "f64", layout, stream)
    local differentiable = {}
    for i, leaf in ipairs(leaves) do
      if is_differentiable(case.inputs[i]) then differentiable[#differentiable + 1] = leaf:require_grad() end
    end
    if #differentiable == 0 then return nil end
    return checkgrad {
      fn = function() return inputs.call(name, entry, case, inputs.views(case, leaves, layout)) end,
      inputs = differentiable,
      samples = 12,
      floor = case.floor,
    }
  end)
end

-- Planted faults in a gradient. A fault that changes nothing (a gradient of zeros) does not count.
local mutants = {
  { "times 1.01", function(g) return g * 1.01 end },
  { "wrong sign", function(g) return -g end },
  { "missing", function() return 0 end },
  { "doubled", function(g) return 2 * g end },
}

local function check_mutants(what, report)
  local planted = 0
  for input, numeric in ipairs(report.numeric) do
    local greatest = 0
    for _, g in pairs(numeric) do greatest = math.max(greatest, math.abs(g)) end
    if greatest > 0.02 then -- below, 1 % is less than the absolute floor of the checker
      for _, mutant in ipairs(mutants) do
        local wrong = {}
        for i, g in pairs(report.analytic[input]) do wrong[i] = mutant[2](g) end
        local e = checkgrad.compare(wrong, numeric)
        planted = planted + 1
        assert(e > checkgrad.tolerance, ("%s: a gradient that is %s passes"):format(what, mutant[1]))
      end
    end
  end
  return planted
end

describe("gradient", function()
  for _, name in ipairs(names) do
    local entry = cases[name]
    if entry and ops.row(name).has_gradient then
      it("of " .. name, function()
        local all, planted = {}, 0
        for n, case in ipairs(all_cases(entry, random_shapes)) do
          for l, layout in ipairs(inputs.layouts) do
            if l == 1 or inputs.largest(case) < 2000 then
              local report = check_gradient(name, entry, case, layout, n)
              if report then
                local what = inputs.describe(name, case, layout)
                assert(report.ok, ("%s: input %s, element %s: error %.3g"):format(what, report.input, report.index,
                  report.error))
                all[#all + 1] = report.error
                planted = planted + check_mutants(what, report)
              end
            end
          end
        end
        assert(#all > 0, "no gradient was checked")
        table.sort(all)
        assert(all[math.ceil(#all / 2)] <= 1e-8, ("median error %.3g"):format(all[math.ceil(#all / 2)]))
        assert(planted >= 4, "no fault could be planted")
      end)
    end
  end
end)

-- Gradients in a dtype for fixed seeds, as flat tables.
local function gradients(name, entry, case, dtype, stream)
  local layout = inputs.layouts[1]
  return halo.scope(function()
    -- Numbers that every dtype holds exactly.
    local leaves = inputs.leaves(case, "bf16", layout, stream)
    local list = {}
    for i, leaf in ipairs(leaves) do
      if inputs.is_data(case.inputs[i]) then leaves[i] = leaf:to(dtype):detach() end
      if is_differentiable(case.inputs[i]) then leaves[i]:require_grad() end
    end
    local results = { inputs.call(name, entry, case, leaves) }
    local y = results[1]
    if not y.requires_grad then return nil end
    local seed = tensor.uniform { shape = y.shape, dtype = "bf16", seed = 3, stream = stream, lo = 0.5, hi = 1.5 }
    y:backward(seed:to(y.dtype))
    for i, leaf in ipairs(leaves) do
      if is_differentiable(case.inputs[i]) then list[#list + 1] = leaf.grad and leaf.grad:values() or {} end
    end
    return list
  end)
end

-- Largest difference over the largest value, per input; a largest value below 1/4 counts as that, since
-- the seeds are about 1 and it is their terms that were rounded and then cancelled.
local function worst_difference(got, want)
  local worst = 0
  for k, values in ipairs(want) do
    local greatest, difference = 0, 0
    for i, v in ipairs(values) do
      greatest = math.max(greatest, math.abs(v))
      difference = math.max(difference, math.abs(v - (got[k][i] or math.huge)))
    end
    worst = math.max(worst, difference / math.max(greatest, 0.25))
  end
  return worst
end

describe("gradient in low precision", function()
  -- fp32: rounding of a few terms. bf16: results that backward reads (softmax, tanh) were rounded to
  -- 2^-9 themselves, and 1 - y^2 near 1 magnifies that.
  local limits = { f32 = 1e-5, bf16 = 2 ^ -5 }
  for _, name in ipairs(names) do
    local entry = cases[name]
    if entry and ops.row(name).has_gradient then
      it("of " .. name, function()
        for n, case in ipairs(entry) do
          local truth = gradients(name, entry, case, "f64", n)
          if truth then
            for dtype, limit in pairs(limits) do
              local e = worst_difference(gradients(name, entry, case, dtype, n), truth)
              assert(e <= limit, ("%s: %s gradient is off by %.3g of its largest"):format(
                inputs.describe(name, case), dtype, e))
            end
          end
        end
      end)
    end
  end
end)

-- ---- what tables of cases do not say --------------------------------------------------------------

describe("kinks and special values", function()
  local nan, inf = 0 / 0, math.huge

  local function gradient(f, values)
    local x = tensor(values, { dtype = "f64", requires_grad = true })
    f(x):sum():backward()
    return x.grad:values()
  end

  it("take the flat side's gradient 0", function()
    assert.same({ 0, 0, 1 }, gradient(ops.relu, { -1, 0, 1 }))
    assert.same({ -1, 0, 1 }, gradient(ops.abs, { -1, 0, 1 }))
    assert.same({ 0, 0, 1, 0, 0 }, gradient(function(x) return x:clamp { min = -1, max = 1 } end, { -2, -1, 0, 1, 2 }))
  end)

  it("give ties to the first", function()
    local a = tensor({ 1, 2, 3 }, { dtype = "f64", requires_grad = true })
    local b = tensor({ 1, 3, 2 }, { dtype = "f64", requires_grad = true })
    ops.maximum(a, b):sum():backward()
    assert.same({ 1, 0, 1 }, a.grad:values())
    assert.same({ 0, 1, 0 }, b.grad:values())
    local v, i = tensor({ 3, 1, 3, 3 }):max()
    assert.equal(3, v:item())
    assert.equal(0, i:item())
    assert.same({ 1, 0, 0 }, gradient(function(x) return (x:max()) end, { 5, 5, 5 }))
    local values, index = tensor({ 2, 7, 2, 7, 7 }):topk { k = 4 }
    assert.same({ 7, 7, 7, 2 }, values:values())
    assert.same({ 1, 3, 4, 0 }, index:values())
    local _, order = tensor({ 0, -0.0, 0, -1 }):sort()
    assert.same({ 3, 0, 1, 2 }, order:values())
  end)

  it("keep ties to the lower index over many random ties", function()
    for trial = 1, 50 do
      local x = tensor.uniform { 4, 200, seed = trial, lo = 0, hi = 8 }:floor()
      local values, index = x:topk { k = 37 }
      local v, i = values:totable(), index:totable()
      local all = x:totable()
      for row = 1, 4 do
        for j = 1, 37 do
          assert.equal(all[row][i[row][j] + 1], v[row][j])
          if j > 1 then
            assert(v[row][j - 1] > v[row][j] or (v[row][j - 1] == v[row][j] and i[row][j - 1] < i[row][j]))
          end
        end
      end
      local sorted = x:sort { descending = true }
      assert.equal(0, (sorted:slice { to = 37 } - values):abs():sum():item())
    end
  end)

  it("let NaN through", function()
    for _, name in ipairs { "relu", "exp", "neg", "abs", "clamp", "floor" } do
      local y = ops[name](tensor { nan, 1 }):values()
      assert(y[1] ~= y[1], name)
      assert(y[2] == y[2], name)
    end
    local y = ops.maximum(tensor { nan, 1 }, tensor { 1, nan }):values()
    assert(y[1] ~= y[1] and y[2] ~= y[2])
    y = ops.minimum(tensor { nan, 1 }, tensor { 1, nan }):values()
    assert(y[1] ~= y[1] and y[2] ~= y[2])
    local v, i = tensor({ 1, nan, 7, nan }):max()
    assert(v:item() ~= v:item())
    assert.equal(1, i:item())
    local _, order = tensor({ 1, nan, inf }):sort()
    assert.same({ 0, 2, 1 }, order:values())
  end)

  it("make an empty softmax row 0, and its gradient 0", function()
    for _, dtype in ipairs { "f32", "f64", "bf16" } do
      local x = tensor({ { -inf, -inf }, { 1, -inf } }, { dtype = dtype, requires_grad = true })
      local y = x:softmax()
      assert.same({ { 0, 0 }, { 1, 0 } }, y:totable())
      y:sum():backward()
      assert.same({ { 0, 0 }, { 0, 0 } }, x.grad:totable())
      local l = x:detach():require_grad():logsumexp { dim = 2 }
      assert.equal(-inf, l:get(1))
    end
    local y = tensor({ -inf, nan }):softmax():values()
    assert(y[1] ~= y[1] and y[2] ~= y[2])
  end)

  it("do not overflow", function()
    assert.same({ 1000, 0 }, tensor({ 1000, -1000 }, { dtype = "f64" }):softplus():values())
    assert.equal(1000, tensor({ 1000, -1000 }, { dtype = "f64" }):logsumexp():item())
    assert.same({ 0, 1 }, tensor({ -1000, 1000 }):sigmoid():values())
  end)

  it("wrap integers", function()
    assert.same({ 0, 4 }, (tensor({ 255, 3 }, { dtype = "u8" }) + 1):values())
    assert.same({ -2147483648 }, (tensor({ 2147483647 }, { dtype = "i32" }) + 1):values())
  end)

  it("make prod's gradient exact at zeros", function()
    assert.same({ 12, 0, 0 }, gradient(function(x) return x:prod() end, { 0, 3, 4 }))
    assert.same({ 0, 0, 0 }, gradient(function(x) return x:prod() end, { 0, 0, 4 }))
  end)

  it("sum long fp32 rows without drift", function()
    local n = 2 ^ 20
    local x = tensor.full { n, value = 0.1 }
    assert(math.abs(x:sum():item() / (n * x:get(1)) - 1) < 1e-6)
    assert(math.abs(x:reshape(n, 1):sum { dim = 1 }:item() / (n * x:get(1)) - 1) < 1e-6)
  end)

  it("add many bf16 gradients in fp32", function()
    local table_ = tensor.zeros { 2, 3, dtype = "bf16", requires_grad = true }
    table_:index_select(tensor.zeros { 4096, dtype = "i64" }):sum():backward()
    assert.equal(4096, table_.grad:get(1, 1)) -- bf16 sums would stop at 256
  end)
end)

describe("results do not depend on", function()
  local C = require("halo.ffi").C

  it("the number of threads", function()
    local x = tensor.normal { 700, 900, seed = 4 }
    local index = tensor.uniform { 3000, seed = 5, hi = 700 }:floor():to "i64"
    local function run()
      local w = x:detach():require_grad()
      local y = w:index_select(index):softmax():matmul(x:t()):sum { dim = 1 }
      y:sum():backward()
      return { y:hash(), w.grad:hash(), x:sum():hash(), x:sum { dim = 1 }:hash(), x:var { dim = 1 }:hash(),
        x:dropout { p = 0.5, seed = 1 }:hash() }
    end
    local was = C.halo_threads()
    C.halo_set_threads(1)
    local one = run()
    C.halo_set_threads(2)
    local two = run()
    C.halo_set_threads(was)
    for i = 1, #one do
      -- BLAS may split a product differently; the first two go through one.
      if i > 2 then assert(one[i] == two[i], "result " .. i) end
    end
  end)

  it("chance: twice the same", function()
    local x = tensor.normal { 300, 257, seed = 6, requires_grad = true }
    local function run()
      x:drop_grad()
      local y = (x:softmax() * x):cumsum { dim = 1 }:topk { k = 20, dim = 1 }
      y:sum():backward()
      return x.grad:hash()
    end
    assert(run() == run())
  end)
end)

describe("wrong arguments", function()
  local function message(f)
    local ok, e = pcall(f)
    assert(not ok, "no error")
    return tostring(e)
  end
  local a = tensor.zeros { 2, 3 }

  it("name the op, what came and what was wanted", function()
    local function has(text, f) assert.matches(text, message(f), 1, true) end
    has("f32 [2,3] and f32 [2,3] do not fit", function() return a:matmul(a) end)
    has("shapes do not fit: f32 [2,3] and f32 [2]", function() return a + tensor.zeros { 2 } end)
    has("dtypes differ", function() return a + tensor.zeros { 2, 3, dtype = "f64" } end)
    has("needs a floating tensor, got i64 [3]", function() return tensor.arange(3):exp() end)
    has('did you mean "keepdim"', function() return a:sum { keepdims = true } end)
    has("dims count from 1", function() return a:sum { dim = 3 } end)
    has("dims count from 1", function() return a:sum { dim = 0 } end)
    has("index 5 (element 1) is outside 0..2", function()
      return a:gather(tensor({ { 0, 5 }, { 0, 0 } }, { dtype = "i64" }))
    end)
    has("index -1 (element 0) is outside 0..1", function()
      return a:index_select(tensor({ -1 }, { dtype = "i32" }))
    end)
    has("k is 4", function() return a:topk { k = 4 } end)
    has("no element", function() return tensor.zeros({ 0 }):max() end)
    has("the mask must be u8", function() return ops.where(a, a, a) end)
    has("at least one input", function() return ops.add(1, 2) end)
    has('did you mean "softmax"', function() return a:softmx() end)
    has('did you mean "softmax"', function() return ops.softmx(a) end)
    has("0.5 is not a whole number", function() return tensor.arange(3) + 0.5 end)
    has("p is 2", function() return a:dropout { p = 2 } end)
    has("does not fit", function() return ops.cat { a, tensor.zeros { 3, 2 } } end)
    has("only one size may be -1", function() return a:reshape(-1, -1) end)
    has("given twice", function() return a:permute(1, 1) end)
    has("cannot repeat", function() return a:expand(4, 3) end)
  end)

  it("leave inputs unchanged and leak nothing", function()
    collectgarbage()
    collectgarbage()
    local before = halo.memory.live()
    for _ = 1, 10 do
      pcall(function() return a:matmul(a) end)
      pcall(function() return a:gather(tensor({ { 0, 5 }, { 0, 0 } }, { dtype = "i64" })) end)
    end
    collectgarbage()
    collectgarbage()
    assert.equal(before, halo.memory.live())
  end)
end)

describe("an allocation that fails", function()
  local C = require("halo.ffi").C

  local function settle()
    collectgarbage()
    collectgarbage()
    return halo.memory.live(), halo.autograd.live_nodes()
  end

  -- The first small case of an op as a function to run again and again, forward and backward.
  local function small_run(name)
    local entry, case = cases[name], nil
    for _, candidate in ipairs(entry or {}) do
      local n = inputs.largest(candidate)
      if not case and n > 1 and n < 600 then case = candidate end
    end
    if not case then return nil end
    local layout = inputs.layouts[2]
    local leaves = inputs.leaves(case, "f64", layout, 1)
    local function drop()
      for _, leaf in ipairs(leaves) do
        if leaf.requires_grad then leaf:drop_grad() end
      end
    end
    for i, leaf in ipairs(leaves) do
      if is_differentiable(case.inputs[i]) and ops.row(name).has_gradient then leaf:require_grad() end
    end
    return function()
      halo.scope(function()
        local y = inputs.call(name, entry, case, inputs.views(case, leaves, layout))
        if y.requires_grad then y:backward() end
      end)
      drop()
    end, drop
  end

  -- Each allocation fails once, in turn. The Lua layer collects and tries again, so the run succeeds;
  -- what the engine had begun must be gone.
  it("once is survived by every op", function()
    for _, name in ipairs(names) do
      local run, drop = small_run(name)
      if run then
        run()
        local live, nodes = settle()
        for nth = 0, 60 do
          C.halo_memory_fail_after(nth)
          local ok = pcall(run)
          C.halo_memory_fail_after(-1)
          drop()
          -- Backward uses its tape up, so it is not tried again.
          assert(ok or ops.row(name).has_gradient, name .. " failed at allocation " .. nth)
        end
        local live_after, nodes_after = settle()
        assert.equal(live, live_after, name .. " leaks after failures")
        assert.equal(nodes, nodes_after, name .. " leaks nodes after failures")
      end
    end
  end)

  -- Nothing more can be had beyond a limit: an error of class memory that shows the owners.
  it("for good is an error that tells the owners", function()
    for _, name in ipairs(names) do
      local run, drop = small_run(name)
      if run then
        run()
        local live, nodes = settle()
        local failures, done = 0, false
        for room = 0, 2 ^ 17, 1024 do
          C.halo_memory_limit(0, live + room)
          local ok, e = pcall(run)
          C.halo_memory_limit(0, 0)
          drop()
          if not ok then
            failures = failures + 1
            assert.equal("memory", e.class, tostring(e))
            assert.matches("memory on cpu, MiB: ", tostring(e), 1, true)
          else
            done = true
            break
          end
        end
        assert(done, name .. " never succeeded")
        assert(failures > 0 or not ops.row(name).has_gradient, name .. " needed no memory at all")
        local live_after, nodes_after = settle()
        assert.equal(live, live_after, name .. " leaks after failures")
        assert.equal(nodes, nodes_after, name .. " leaks nodes after failures")
      end
    end
  end)
end)
