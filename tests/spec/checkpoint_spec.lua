local helper = require "tests.helper"
local C = require("halo.ffi").C
local checkpoint = require "halo.checkpoint"
local comm = require "halo.comm"
local fs = require "halo.fs"
local optim = require "halo.optim"
local st = require "halo.safetensors"
local tensor = require "halo.tensor"

-- A small model whose training is a few lines: enough to tell whether a resume is bitwise.
local function make(dtype)
  local parameters = {}
  for i, shape in ipairs { { 5, 7 }, { 7 }, { 3, 2, 2 } } do
    parameters[i] = { name = "layer." .. i .. ".weight",
      tensor = tensor.normal { shape = shape, seed = 1, stream = i, dtype = dtype or "f32", requires_grad = true } }
  end
  return parameters, optim.adamw(parameters, { lr = 1e-2, decay = 0.1 })
end

local function train(parameters, opt, from, to)
  local losses = {}
  for step = from, to do
    opt:zero_grad()
    local loss
    for i, p in ipairs(parameters) do
      local target = tensor.normal { shape = p.tensor.shape, seed = step, stream = i, dtype = p.tensor.dtype }
      local part = (p.tensor - target):square():sum()
      loss = loss and loss + part or part
    end
    loss:backward()
    opt:step {}
    losses[#losses + 1] = ("%a"):format(loss:item())
  end
  return losses
end

local function bytes_of(t)
  local host, dtype = t:detach():host()
  return require("ffi").string(host, t.count * tensor.dtype_bytes(dtype))
end

describe("checkpoint", function()
  local dir, count = nil, 0
  before_each(function()
    -- In memory where that exists: hundreds of saves, each with its fsync calls.
    count = count + 1
    local name = ("halo-checkpoint-%d-%d"):format(require("ffi").C.getpid(), count)
    dir = fs.is_dir "/dev/shm" and fs.mkdir("/dev/shm/" .. name) or fs.temp_dir()
  end)
  after_each(function()
    C.halo_checkpoint_fail_after(0, C.HALO_FAULT_NONE)
    fs.remove_tree(dir)
  end)

  local function message(f, ...)
    local ok, e = pcall(f, ...)
    assert.is_false(ok)
    return tostring(e)
  end

  for _, dtype in ipairs { "f32", "f64", "bf16" } do
    it("continues bitwise, " .. dtype, function()
      local a, opt_a = make(dtype)
      train(a, opt_a, 1, 5)
      local ckpt = dir .. "/x/ckpt"
      local path = checkpoint.save { dir = ckpt, step = 5, model = a, optimizer = opt_a,
        state = { steps = opt_a.steps, data = { next = 40 } } }
      assert.equal(dir .. "/x/ckpt/step-00000005", path)
      local expected = train(a, opt_a, 6, 10)
      local b, opt_b = make(dtype)
      for _, p in ipairs(b) do p.tensor:fill(-1) end -- nothing may survive from before
      local state, from, step, skipped = checkpoint.load { dir = dir .. "/x", model = b, optimizer = opt_b,
        deep = true }
      assert.equal(path, from)
      assert.equal(5, step)
      assert.same({}, skipped)
      assert.equal(40, state.data.next)
      opt_b.steps = state.steps
      assert.same(expected, train(b, opt_b, 6, 10))
      for i = 1, #a do assert.is_true(bytes_of(a[i].tensor) == bytes_of(b[i].tensor)) end
    end)
  end

  it("gives state back exactly", function()
    local state = { pi = math.pi, tiny = 5e-324, big = 1.7976931348623157e308, third = 1 / 3, inf = math.huge,
      minus = -math.huge, text = 'a "q"\n\0b \195\169', list = { 1, 2.5, { "x" } }, flag = false,
      sparse = { [3] = "c", [500] = { 1 }, x = 1 }, seed = 0xfedcba9876543210ULL, low = -0x7fffffffffffffffLL - 1,
      ["$odd"] = "key", rng = { a = 0.1 }, empty = {} }
    local p = make()
    assert.truthy(checkpoint.save { dir = dir, step = 1, model = p, state = state })
    local back = checkpoint.load { dir = dir }
    assert.same(state.sparse, back.sparse)
    for _, k in ipairs { "pi", "tiny", "big", "third", "inf", "minus", "text", "flag", "$odd" } do
      assert.equal(state[k], back[k])
    end
    assert.same(state.list, back.list)
    assert.equal(0.1, back.rng.a)
    assert.is_true(back.seed == state.seed and back.low == state.low)
    local nan = checkpoint.decode_state(checkpoint.encode_state { v = 0 / 0, z = -0.0 })
    assert.is_true(nan.v ~= nan.v and 1 / nan.z == -math.huge)
    assert.is_true(fs.is_file(dir .. "/step-00000001/rng.json"))
  end)

  it("can be read as weights, with the files it was given", function()
    local p, opt = make()
    local path = checkpoint.save { dir = dir, step = 3, model = p, optimizer = opt, max_shard_bytes = 100,
      files = { ["config.json"] = "{}\n" } }
    local file = st.open(path)
    assert.same({ "layer.1.weight", "layer.2.weight", "layer.3.weight" }, file:names())
    assert.is_true(bytes_of(file:read "layer.1.weight") == bytes_of(p[1].tensor))
    assert.equal("{}\n", fs.read(path .. "/config.json"))
    local v = checkpoint.verify(path)
    assert.equal(3, v.step)
    assert.equal(5, #v.files)
    assert.equal(dir .. "/x", checkpoint.run_folder(dir .. "/x/ckpt/"))
    assert.equal(dir .. "/x", checkpoint.run_folder(dir .. "/x"))
  end)

  it("says when there is nothing, and never takes a damaged one", function()
    assert.is_nil(checkpoint.latest(dir .. "/absent"))
    assert.is_nil((checkpoint.load { dir = dir }))
    assert.truthy(message(checkpoint.verify, dir):find "no checkpoint")
    local p, opt = make()
    for step = 1, 3 do assert.truthy(checkpoint.save { dir = dir, step = step, model = p, optimizer = opt }) end
    local optim_file = dir .. "/step-00000003/optim/rank-00000-of-00001.safetensors"
    local text = fs.read(optim_file)
    fs.write(optim_file, text:sub(1, -2) .. string.char((text:byte(-1) + 1) % 256))
    assert.equal(dir .. "/step-00000003", (checkpoint.latest(dir))) -- a glance does not read contents
    local _, path, step, skipped = checkpoint.load { dir = dir }
    assert.equal(dir .. "/step-00000002", path)
    assert.equal(2, step)
    assert.equal(dir .. "/step-00000002", checkpoint.verify(dir).path)
    assert.truthy(skipped[1]:find("step 3", 1, true) and skipped[1]:find("tensor", 1, true))
    assert.truthy(message(checkpoint.verify, dir .. "/step-00000003"):find "optim/rank%-00000")
    for i = 1, 2 do fs.remove(dir .. "/step-0000000" .. i .. "/manifest.json") end
    assert.truthy(message(checkpoint.verify, dir):find "none of the 3 checkpoints")
  end)

  it("compares everything with the model first", function()
    local p, opt = make()
    assert.truthy(checkpoint.save { dir = dir, step = 1, model = p, optimizer = opt })
    local other = { { name = "layer.1.weight", tensor = tensor.zeros { 5, 7 } } }
    assert.truthy(message(checkpoint.load, { dir = dir, model = other }):find "the model has no tensor layer.2.weight")
    other = make "f64"
    assert.truthy(message(checkpoint.load, { dir = dir, model = other }):find "F32")
    other = make()
    other[4] = { name = "layer.4.weight", tensor = tensor.zeros { 1 } }
    assert.truthy(message(checkpoint.load, { dir = dir, model = other }):find "holds no tensor layer.4.weight")
    local bf, opt_bf = make "bf16" -- its master copies were not saved
    assert.truthy(message(checkpoint.load, { dir = dir, optimizer = opt_bf }):find "master")
    assert.equal(3, #bf)
    local opt_few = optim.adamw({ p[1] }, {})
    assert.truthy(message(checkpoint.load, { dir = dir, optimizer = opt_few }):find "no place")
  end)

  it("survives failing disks and keeps what it had", function()
    local p, opt = make()
    assert.truthy(checkpoint.save { dir = dir, step = 1, model = p, optimizer = opt })
    for n = 0, 200 do
      C.halo_checkpoint_fail_after(n, C.HALO_FAULT_ONCE)
      local path, why = checkpoint.save { dir = dir, step = 2, model = p, optimizer = opt }
      C.halo_checkpoint_fail_after(0, C.HALO_FAULT_NONE)
      if path then
        assert.is_true(n > 20)
        break
      end
      assert.truthy(why:find("Input/output error", 1, true) and why:find("HALO_EIO", 1, true))
      local found = checkpoint.verify(dir).path
      assert.truthy(found == dir .. "/step-00000001" or found == dir .. "/step-00000002")
      fs.remove_tree(dir .. "/step-00000002")
      assert.is_true(n < 200)
    end
  end)

  it("reports what it cannot encode instead of raising on one rank", function()
    local p = make()
    local path, why = checkpoint.save { dir = dir, step = 1, model = p, state = { f = print } }
    assert.is_nil(path)
    assert.truthy(why:find "function")
    assert.is_nil(checkpoint.latest(dir))
    assert.truthy(message(checkpoint.save, { dir = dir, step = 1, modle = p }):find 'did you mean "model"')
  end)

  it("prunes", function()
    local p = make()
    for step = 1, 6 do assert.truthy(checkpoint.save { dir = dir, step = step, model = p, keep = 2, major = 3 }) end
    assert.same({ "LATEST", "step-00000003", "step-00000005", "step-00000006" }, fs.list(dir))
    assert.equal("step-00000006\n", fs.read(dir .. "/LATEST"))
    assert.equal(0, checkpoint.prune(dir, 3))
  end)

  it("works for virtual ranks", function()
    local p, opt = make()
    local four = comm.virtual(4)
    assert.truthy(checkpoint.save { dir = dir, step = 1, model = p, optimizer = opt, comm = four })
    local q, opt_q = make()
    q[1].tensor:fill(0)
    assert.truthy(checkpoint.load { dir = dir, model = q, optimizer = opt_q, comm = four })
    assert.is_true(bytes_of(p[1].tensor) == bytes_of(q[1].tensor))
  end)

  -- W processes write, V processes read; fixtures/checkpoint_ranks.lua is what each of them runs.
  it("changes the number of processes #dist", function()
    if os.execute "command -v mpirun > /dev/null 2>&1" ~= 0 then return pending "mpirun is not installed" end
    local function ranks(n, mode)
      local command = ("OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1 timeout 120 mpirun "
        .. "--oversubscribe --bind-to none -n %d luajit %stests/fixtures/checkpoint_ranks.lua %s %s 2>&1")
        :format(n, helper.root, mode, dir)
      local pipe = io.popen(command)
      local out = pipe:read "*a"
      pipe:close()
      return out
    end
    for _, case in ipairs { { 4, 2 }, { 2, 3 }, { 1, 4 }, { 3, 1 } } do
      local wrote = ranks(case[1], "save")
      assert.equal(case[1], select(2, wrote:gsub("saved step%-00000005", "")), wrote)
      local read = ranks(case[2], "load")
      assert.equal(case[2], select(2, read:gsub("same", "")), read)
      assert.equal(case[1], #fs.list(dir .. "/step-00000005/optim"))
      fs.remove_tree(dir .. "/step-00000005")
    end
    -- One rank fails: all say so, and the older checkpoint is what they load.
    assert.truthy(ranks(2, "save"):find("saved", 1, true))
    local out = ranks(3, "fail")
    assert.equal(3, select(2, out:gsub("not saved: .-rank 1", "")), out)
    out = ranks(2, "damage")
    assert.equal(2, select(2, out:gsub("took step%-00000005 after skipping 1", "")), out)
  end)
end)
