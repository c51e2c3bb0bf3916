--- Training on the device: a job beside the same job on the CPU, checkpoints to the last bit, evaluation,
-- export, and the forecast held to what the allocator counts. On a shadow (kernels/shadow) this proves that
-- nothing on the way touches device memory from the host; on a GPU it also proves the numbers. #gpu
local fs = require "halo.fs"
local halo = require "halo"
local process = require "halo.process"
local recipe = require "halo.recipe"

local is_there = require("halo.device").count "cuda" > 0
local is_shadow = halo.ffi.ffi.string(halo.ffi.C.halo_cuda_targets()) == "shadow"

describe("training on a device #gpu", function()
  if not is_there then
    pending "needs a CUDA device"
    return
  end

  local checkpoint = require "halo.checkpoint"
  local generate = require "halo.generate"
  local job_module = require "halo.job"
  local memory = require "halo.memory"
  local model = require "halo.model"
  local dir
  setup(function()
    dir = fs.temp_dir()
    fs.mkdir(dir .. "/text")
    for i = 1, 6 do
      fs.write(("%s/text/%d.txt"):format(dir, i), ("All happy families are alike %d; "):rep(900):gsub("%%d", i))
    end
    process.setenv("HALO_CACHE", dir .. "/cache")
  end)
  teardown(function() fs.remove_tree(dir) end)

  local function resolved(o)
    local text = ([[return recipe "d" {
      model = model.%s { layers = %d, width = %d, heads = 4, kv_heads = 2, vocab = 300, ffn = %d, recompute = "%s",
        offload = %s },
      data = text %q, optim = adamw { lr = 1e-3 }, attention = %s, device = "%s", dtype = "%s", seed = 3,
      stages = { stage { context = %d, steps = %d, batch = %d, accumulate = %d } } }]]):format(o.family or "qwen2",
      o.layers or 2, o.width or 128, o.ffn or 192, o.recompute or "block", tostring(o.offload or false),
      dir .. "/text", o.attention or "dense { }", o.device or "cuda", o.dtype or "f32", o.context or 256,
      o.steps or 3, o.batch or 2, o.accumulate or 1)
    return recipe.resolve(recipe.load_text(text, "d.lua"))
  end

  -- Losses, norms and the job after some steps.
  local function train(o)
    local job = job_module.new(resolved(o))
    local losses, norms = {}, {}
    for i = 1, o.steps or 3 do
      local record = job:step()
      losses[i], norms[i] = record.loss, record.gnorm
    end
    return losses, norms, job
  end

  local function near(a, b, bound, what)
    for i = 1, #a do
      assert(math.abs(a[i] - b[i]) <= bound * math.abs(b[i]), ("%s %d: %.8g on the device, %.8g beside it"):format(
        what, i, a[i], b[i]))
    end
  end

  for _, family in ipairs { "qwen2", "llama", "qwen3" } do
    it("gives the losses of the CPU: " .. family, function()
      local losses, norms, job = train { family = family, accumulate = 2 }
      assert.equal("cuda", job.model.parameters[1].tensor.device)
      local expected, expected_norms = train { family = family, device = "cpu", accumulate = 2 }
      near(losses, expected, 1e-5, "loss")
      near(norms, expected_norms, 1e-4, "norm")
    end)
  end

  it("computes in bf16 with fp32 masters", function()
    local losses, _, job = train { dtype = "bf16", steps = 4 }
    assert.equal("bf16", job.model.parameters[1].tensor.dtype)
    assert.equal("f32", job.optim:state().master.dtype)
    near(losses, (train { dtype = "f32", steps = 4 }), 1e-2, "loss")
    near(losses, (train { dtype = "bf16", device = "cpu", steps = 4 }), 1e-2, "loss")
  end)

  it("makes the same weights with blocks recomputed and their inputs in host memory", function()
    local _, _, one = train { dtype = "bf16" }
    local _, _, two = train { dtype = "bf16", offload = true }
    assert.equal(bit.tohex(one:weights_hash(), 16), bit.tohex(two:weights_hash(), 16))
  end)

  it("waits for the device once per step, and counts its memory", function()
    local _, _, job = train { steps = 1 }
    local record = job_module.Job.step
    assert.is_function(record)
    assert.is_true(memory.peak(nil, "cuda") > memory.live(nil, "cuda") / 2)
    assert.is_true(memory.live("weights", "cuda") > 0)
    assert.equal(0, memory.live("gradients", "cpu"))
    assert.is_true(job.peak_flops > 0)
  end)

  it("goes on from a checkpoint to the last bit", function()
    local r = resolved { dtype = "bf16", steps = 4 }
    local whole = job_module.new(r)
    for _ = 1, 4 do whole:step() end
    local first = job_module.new(r)
    for _ = 1, 2 do first:step() end
    assert(checkpoint.save_job(first, dir .. "/ckpt"))
    local second = job_module.new(r)
    local _, from = checkpoint.restore_job(second, dir .. "/ckpt")
    assert.matches("step%-00000002", from)
    assert.equal(first:weights_hash(), second:weights_hash())
    for _ = 1, 2 do second:step() end
    assert.equal(bit.tohex(whole:weights_hash(), 16), bit.tohex(second:weights_hash(), 16))
  end)

  it("writes a model folder and reads it onto either device", function()
    local m = model.build(model.config { family = "qwen2", layers = 1, width = 64, heads = 2, vocab = 100 },
      { seed = 5, dtype = "bf16", device = "cuda" })
    model.save_hf(m, dir .. "/hf")
    for _, device in ipairs { "cpu", "cuda" } do
      local again = model.from_hf(dir .. "/hf", { dtype = "bf16", device = device })
      assert.equal(device, again.parameters[1].tensor.device)
      assert.equal(m:hash(), again:hash())
    end
  end)

  it("generates what the CPU generates", function()
    local c = model.config { family = "qwen2", layers = 2, width = 64, heads = 4, kv_heads = 2, vocab = 100,
      init = { type = "fan_in", embedding = 1, previous_token = 0 } }
    local ids = {}
    for i = 1, 40 do ids[i] = (i * 37) % 100 end
    local out = {}
    for _, device in ipairs { "cpu", "cuda" } do
      out[device] = generate.run { model = model.build(c, { seed = 9, device = device }), ids = ids, tokens = 12 }
    end
    assert.same(out.cpu, out.cuda)
  end)

  it("evaluates, measures and compares", function()
    local _, _, job = train { steps = 1, attention = "window { window = 64, sink = 8 }" }
    local run = { job = job }
    local ppl = require("halo.eval.ppl").action(run, { lengths = { 256 }, last = 64, documents = 1, mode = "prefix",
      stride = 64 })
    assert.is_true(ppl.rows[1].ppl > 1)
    local niah = require("halo.eval.niah").action(run, { depths = 1, samples = 1, seed = 1, needles = 1,
      lengths = { 512 }, digits = 2 })
    assert.equal(1, #niah.rows)
    job.stage = nil -- the evaluation laid out its own length
    job:enter(job.stages[1])
    local loss = job:loss_on(job:validation_batch(job.attending.batch))
    assert.is_true(loss > 0 and loss < 20)
  end)

  it("selects and measures vertical-slash attention as on the CPU", function()
    local attention = "sparse.vertical_slash { keep = mass(0.8), dense = { below = 0 } }"
    local losses = train { attention = attention, steps = 2 }
    near(losses, (train { attention = attention, steps = 2, device = "cpu" }), 1e-4, "loss")
  end)

  it("makes tensors where the prompt says", function()
    local before = halo.device()
    halo.device "cuda"
    local t = halo.tensor.ones { 2, 3 }
    halo.device(before)
    assert.equal("cuda", t.device)
    assert.equal("cpu", halo.tensor.ones({ 2, 3 }).device)
    assert.matches("%[2,3%] cuda", tostring(t))
    assert.equal("cpu", t:to("cpu").device)
  end)

  it("times spans on the device's clock when asked", function()
    local trace = halo.trace
    local _, _, job = train { steps = 1 }
    trace.device "cuda"
    trace.reset()
    job.recipe.total.steps, job.total_steps = 2, 2
    job:step()
    local by_name, sum = {}, 0
    for _, r in ipairs(trace.totals()) do
      by_name[r.name] = r
      sum = sum + r.device_self_seconds
    end
    trace.device "cpu"
    assert.is_true(by_name.product.device_seconds > 0 and by_name.product.calls > 0)
    assert.is_true(by_name["op.attention.backward"].device_seconds > 0)
    assert.is_true(sum > 0)
    trace.reset()
    job.step_index = 1
    assert.equal(0, trace.total "product" and trace.total("product").device_seconds or 0)
  end)

  it("is forecast within 5 percent", function()
    for _, o in ipairs {
      { layers = 4, width = 256, ffn = 704, context = 2048, batch = 1, dtype = "bf16" },
      { layers = 3, width = 256, ffn = 512, context = 1024, batch = 2, dtype = "bf16", recompute = "none" },
      { layers = 6, width = 128, ffn = 384, context = 4096, batch = 1, dtype = "bf16" },
    } do
      o.steps = 2
      if is_shadow then o.context = o.context / 2 end
      collectgarbage()
      collectgarbage()
      local before = memory.live(nil, "cuda")
      local _, _, job = train(o)
      memory.reset_peak "cuda"
      job.total_steps = 3
      job:step()
      local was = memory.peak(nil, "cuda") - before
      local said = require("halo.forecast").of(job.recipe).peak.total
      assert.is_true(math.abs(said / was - 1) < 0.05, ("said %.2f MiB, was %.2f MiB (layers %d, width %d, context %d)")
        :format(said / 2 ^ 20, was / 2 ^ 20, o.layers, o.width, o.context))
    end
  end)
end)

describe("without a device", function()
  it("says what is missing", function()
    if is_there then return end
    local ok, e = pcall(require("halo.device").require, "cuda")
    assert.is_false(ok)
    assert.equal("environment", e.class)
    assert.matches('device = "cuda" cannot be used here: no CUDA device', tostring(e))
  end)
end)
