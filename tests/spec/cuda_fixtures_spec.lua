--- Parity with Hugging Face Transformers on the device: the four golden models, fp32 at the tolerances of
-- fixtures_spec.lua, bf16 at those of bf16.
--
-- fp32 products are true fp32 there (HALO_TF32 off). In bf16 every result is rounded to 2^-9 of itself and a
-- layer has about ten in a row: 1 % of the logits' size is what is left of that, and 0.5 % of the loss.
local helper = require "tests.helper"
local shared = helper.shared()
local is_there = require("halo.device").count "cuda" > 0

describe("golden models of Transformers on the device #gpu", function()
  if not is_there or not shared then
    pending "needs a CUDA device and the shared fixtures (HALO_SHARED or ../shared)"
    return
  end

  local attending = require "halo.attending"
  local autograd = require "halo.autograd"
  local ffi = require "ffi"
  local fs = require "halo.fs"
  local generate = require "halo.generate"
  local json = require "halo.json"
  local memory = require "halo.memory"
  local model = require "halo.model"
  local optim = require "halo.optim"
  local safetensors = require "halo.safetensors"
  local tensor = require "halo.tensor"

  -- 96 tokens are 6 blocks of 16.
  local function dense(config)
    return attending.new { config = config, comm = require("halo.comm").self(),
      pattern = { type = "dense", ring = { type = "flat", layout = "contiguous", block = 16 } } }
  end

  -- All values as doubles, from either device.
  local function values(t) return t:to("cpu"):detach():cast("f64"):contiguous():host(), t.count end

  -- Largest difference, and ||a - b|| / ||b||.
  local function differences(a, b)
    local x, n = values(a)
    local y, m = values(b)
    assert.equal(m, n)
    local worst, diff, norm = 0, 0, 0
    for i = 0, n - 1 do
      worst = math.max(worst, math.abs(x[i] - y[i]))
      diff, norm = diff + (x[i] - y[i]) ^ 2, norm + y[i] ^ 2
    end
    return worst, math.sqrt(diff) / math.max(math.sqrt(norm), 1e-30)
  end

  -- Ids and shifted labels [B,N] on the device.
  local function batch_of(ids, labels)
    local rows, n = ids:size(1), ids:size(2)
    local label, out = values(labels), ffi.new("int32_t[?]", rows * n)
    for b = 0, rows - 1 do
      for p = 0, n - 1 do out[b * n + p] = p + 1 < n and label[b * n + p + 1] or -100 end
    end
    local shape = { rows, n }
    return { ids = ids:to("cuda"):cast "i32", rows = rows, n = n,
      labels = tensor.from_pointer(out, { shape = shape, dtype = "i32", device = "cuda" }),
      positions = tensor.arange { count = n, dtype = "i32", device = "cuda" }:reshape { 1, n } }
  end

  local function run_of(m, attend, batch)
    attend:set_context(batch.n, batch.rows)
    local run = { attend = function(l, q, k, v) return attend:attend(l, q, k, v) end }
    run.cos, run.sin = m:positions(batch.positions)
    return run
  end

  for _, name in ipairs { "tiny-qwen2", "tiny-llama", "tiny-qwen3", "tiny-qwen2-yarn" } do
    describe(name, function()
      local dir = shared .. "/fixtures/" .. name
      local golden = safetensors.open(dir .. "/golden.safetensors")
      local settings = json.decode(fs.read(dir .. "/golden.json")).adamw
      local function fresh(dtype) return model.from_hf(dir, { dtype = dtype, device = "cuda" }) end

      it("gives logits, loss and gradients in f32", function()
        local m = fresh "f32"
        local attend = dense(m.config)
        local batch = batch_of(golden:read "input_ids", golden:read "labels")
        local logits = autograd.no_grad(function() return m:logits(batch.ids, run_of(m, attend, batch)) end)
        local worst = differences(logits, golden:read "logits")
        assert.is_true(worst < 2e-5, ("logits differ by %.2e"):format(worst))
        local loss, labels = m:loss(batch.ids, batch.labels, run_of(m, attend, batch))
        local n = labels:item()
        local difference = math.abs(loss:item() / n - golden:read("loss"):item())
        assert.is_true(difference < 2e-6, ("loss differs by %.2e"):format(difference))
        local scaled = loss * (1 / n)
        scaled:backward()
        for _, p in ipairs(m.parameters) do
          local _, relative = differences(p.tensor.grad, golden:read("grad." .. p.name))
          assert.is_true(relative < 1e-4, ("gradient of %s differs by %.2e"):format(p.name, relative))
        end
      end)

      it("gives logits and loss in bf16", function()
        local m = fresh "bf16"
        local attend = dense(m.config)
        local batch = batch_of(golden:read "input_ids", golden:read "labels")
        local logits = autograd.no_grad(function() return m:logits(batch.ids, run_of(m, attend, batch)) end)
        local _, relative = differences(logits, golden:read "logits")
        assert.is_true(relative < 2e-2, ("logits differ by %.2e"):format(relative))
        local loss, labels = m:loss(batch.ids, batch.labels, run_of(m, attend, batch))
        local want = golden:read("loss"):item()
        local difference = math.abs(loss:item() / labels:item() - want) / want
        assert.is_true(difference < 5e-3, ("loss differs by %.2e"):format(difference))
      end)

      it("trains ten AdamW steps and generates as Transformers does", function()
        local m = fresh "f32"
        local attend = dense(m.config)
        local opt = optim.adamw(m.parameters, { betas = settings.betas, eps = settings.eps,
          decay = settings.weight_decay })
        local losses = values(golden:read "train_losses")
        for step = 1, 10 do
          local ids = golden:read("train_ids." .. step - 1)
          opt:zero_grad()
          memory.scope(function()
            local batch = batch_of(ids, ids)
            local loss, labels = m:loss(batch.ids, batch.labels, run_of(m, attend, batch))
            local n = labels:item()
            local difference = math.abs(loss:item() / n - losses[step - 1])
            assert.is_true(difference < 1e-5, ("step %d: loss differs by %.2e"):format(step, difference))
            loss:backward()
            opt:step { step = step, lr = settings.lr, scale = 1 / n, clip = settings.clip }
          end)
        end
        local prompt, expected = {}, {}
        local p, n = values(golden:read "greedy_prompt")
        for i = 1, n do prompt[i] = p[i - 1] end
        local g, total = values(golden:read "greedy_output")
        for i = n + 1, total do expected[i - n] = g[i - 1] end
        assert.same(expected, generate.run { model = m, ids = prompt, tokens = #expected,
          attending = dense(m.config) })
      end)
    end)
  end
end)
