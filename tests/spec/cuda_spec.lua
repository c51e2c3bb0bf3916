--- The device as Lua sees it: moving tensors, errors, memory, files, training. #gpu specs want a device, or the
-- shadow of one that tools/check builds (kernels/shadow).
local halo = require "halo"
local fs = require "halo.fs"
local process = require "halo.process"
local st = require "halo.safetensors"
local tensor, ops, autograd, memory = halo.tensor, halo.ops, halo.autograd, halo.memory
local devices = require "halo.device"
local C = halo.ffi.C

local is_there = devices.count "cuda" > 0

local function message(f, ...)
  local ok, e = pcall(f, ...)
  assert.is_false(ok)
  return tostring(e)
end

describe("without a device", function()
  it("says why, and the rest goes on", function()
    if is_there then return pending "there is a device" end
    assert.truthy(message(tensor.zeros, { 2, device = "cuda" }):find("no CUDA device: ", 1, true))
    assert.truthy(message(function() return tensor.ones({ 2 }):cuda() end):find("no CUDA device: ", 1, true))
    assert.equal(0, devices.count "cuda")
    assert.equal(3, tensor.ones({ 3 }):sum():item())
  end)

  it("is described by doctor", function()
    local facts = halo.doctor.environment().cuda
    assert.is_string(facts.targets)
    assert.equal(devices.count "cuda", #facts.devices)
    for _, d in ipairs(facts.devices) do assert.is_true(#d.name > 0 and d.total > 0 and d.free > 0) end
  end)
end)

describe("the device #gpu", function()
  local function here(name, f)
    it(name, function()
      if not is_there then return pending "no CUDA device" end
      f()
    end)
  end

  here("takes tensors and gives them back", function()
    for _, dtype in ipairs { "f32", "f64", "bf16", "i32", "i64", "u8" } do
      local x = tensor({ { 1, 2, 3 }, { 4, 5, 6 } }, { dtype = dtype })
      local y = x:cuda()
      assert.equal("cuda", y.device)
      assert.equal(dtype, y.dtype)
      assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, y:totable())
      assert.same({ { 1, 4 }, { 2, 5 }, { 3, 6 } }, y:t():cpu():totable())
      assert.equal(y, y:to "cuda")
      assert.equal(5, y:get(2, 2))
      assert.equal(bit.tohex(x:hash()), bit.tohex(y:hash()))
      assert.truthy(tostring(y):find("cuda", 1, true))
    end
    local narrow = tensor({ 1.5, 2.5 }):to("cuda", "bf16")
    assert.equal("bf16", narrow.dtype)
    assert.same({ 1.5, 2.5 }, narrow:to("cpu", "f32"):totable())
  end)

  here("lets gradients through between devices", function()
    local x = tensor({ 1, 2, 3 }):require_grad()
    local y = (x:cuda() * 2):cpu() * 3
    y:sum():backward()
    assert.equal("cpu", x.grad.device)
    assert.same({ 6, 6, 6 }, x.grad:totable())
  end)

  here("does not mix with the host", function()
    local e = message(function() return tensor.ones { 2, device = "cuda" } + tensor.ones { 2, device = "cpu" } end)
    assert.truthy(e:find("input 1 is on cuda, input 2 on cpu", 1, true))
    local refused = message(function() return tensor.ones({ 2, device = "cuda" }):pointer() end)
    assert.truthy(refused:find("host() copies", 1, true))
  end)

  here("names the op that met a bad token id", function()
    local weight, ids = tensor.zeros { 4, 2, device = "cuda" }, tensor({ 1, 7 }, { dtype = "i64" }):cuda()
    local e = message(function()
      ops.embedding(weight, ids)
      devices.synchronize "cuda"
    end)
    assert.truthy(e:find("embedding", 1, true) and e:find("7", 1, true))
    devices.synchronize "cuda"
  end)

  here("collects garbage and tries again before it is out of memory", function()
    collectgarbage()
    local before = memory.live(nil, "cuda")
    C.halo_memory_limit(C.HALO_CUDA, before + 10 * 2 ^ 20)
    for _ = 1, 100 do tensor.new { 2 ^ 20, device = "cuda" } end -- 4 MiB each, forgotten
    local held = {}
    local e = message(function()
      memory.with_tag("activations", function()
        for i = 1, 5 do held[i] = tensor.new { 2 ^ 20, device = "cuda" } end
      end)
    end)
    C.halo_memory_limit(C.HALO_CUDA, 0)
    assert.truthy(e:find("out of memory on cuda", 1, true) and e:find("activations 8.0", 1, true))
    for _, t in ipairs(held) do t:free() end
    assert.is_true(memory.peak(nil, "cuda") <= before + 10 * 2 ^ 20 or memory.peak(nil, "cuda") > 0)
  end)

  here("fails an allocation when asked to, everywhere in a step", function()
    local w = tensor.ones { 8, 8, device = "cuda", requires_grad = true }
    local x = tensor.ones { 4, 8, device = "cuda" }
    local function step()
      halo.scope(function() ops.linear(x, w):tanh():sum():backward() end)
    end
    step()
    for n = 0, 12 do
      C.halo_memory_fail_after(n)
      local ok, e = pcall(step)
      C.halo_memory_fail_after(-1)
      assert(ok or tostring(e):find("memory", 1, true), tostring(e))
    end
    w:drop_grad()
    step()
    assert.is_true(w.grad:sum():item() == w.grad:sum():item())
  end)

  here("recomputes from inputs that waited on the host", function()
    local w = tensor.normal { 16, 16, seed = 3, std = 0.3, device = "cuda", requires_grad = true }
    local x = tensor.normal { 8, 16, seed = 4, device = "cuda" }
    local function gradient(how)
      w:drop_grad()
      local h = ops.linear(x, w)
      for _ = 1, 5 do h = autograd[how](function(v) return ops.linear(v, w):tanh() end, h) end
      h:sum():backward()
      return bit.tohex(w.grad:hash())
    end
    local expected = gradient "checkpoint"
    assert.equal(expected, gradient "checkpoint_offloaded")
    assert.is_true(tonumber(C.halo_offload_host_bytes()) > 0)
    C.halo_memory_trim(C.HALO_CUDA)
    assert.equal(0, tonumber(C.halo_offload_host_bytes()))
    assert.equal(0, autograd.pending())
  end)

  here("reads and writes files", function()
    local dir = fs.temp_dir()
    local w = tensor.normal { 33, 17, seed = 1, device = "cuda" }
    st.save(dir .. "/w.safetensors", { w = w, half = w:to "bf16", turned = w:t() })
    local file = st.open(dir .. "/w.safetensors")
    local into = tensor.zeros { 33, 17, device = "cuda" }
    file:read("w", { into = into })
    assert.equal(bit.tohex(w:hash()), bit.tohex(into:hash()))
    local wide = tensor.zeros { 17, 33, dtype = "f64", device = "cuda" }
    file:read("turned", { into = wide })
    assert.same(w:t():totable(), wide:totable())
    file:close()
    fs.remove_tree(dir)
  end)

  here("trains as the host does", function()
    local function train(device)
      local w = tensor.normal({ 12, 8, seed = 1, device = "cpu" }):to(device):require_grad()
      local b = tensor.zeros { 12, device = device, requires_grad = true }
      local opt = halo.optim.adamw({ { name = "w", tensor = w }, { name = "b", tensor = b } }, { lr = 0.05 })
      local x = tensor.normal({ 32, 8, seed = 2, device = "cpu" }):to(device)
      local labels = tensor.arange({ count = 32, dtype = "i64", device = "cpu" }):values()
      for i, v in ipairs(labels) do labels[i] = v % 12 end
      labels = tensor(labels, { dtype = "i64", device = device })
      local losses = {}
      for step = 1, 6 do
        opt:zero_grad()
        local loss, count = ops.cross_entropy(ops.linear(x, w, b), labels)
        loss:backward()
        opt:step { clip = 1 }
        losses[step] = loss:item() / count:item()
      end
      return losses
    end
    local want, got = train "cpu", train "cuda"
    for i, v in ipairs(want) do assert.near(v, got[i], 1e-5 * math.abs(v)) end
    assert.is_true(got[6] < got[1])
  end)

  here("ends a process that still holds tensors", function()
    local path = os.tmpname()
    fs.write(path, [[
      local t = halo.tensor
      held = { t.ones { 64, 64, device = "cuda" }, t.ones { 64, device = "cuda", requires_grad = true } }
      held[3] = (held[1] * held[2]):sum()
      held[3]:backward()
      print("value " .. held[3]:item())
    ]])
    local program = process.halo()
    if not fs.is_file(program) then program = require("tests.helper").root .. "build/halo" end -- beside a shadow
    local text = process.capture(process.quote(program) ..  " exec " .. process.quote(path) .. " 2>&1; echo rc=$?")
    os.remove(path)
    assert.truthy(text:find("value 4096", 1, true))
    assert.truthy(text:find("rc=0", 1, true), text)
  end)
end)
