--- Weights of a new model: spreads, and heads that begin by looking back.
local init_weights = require "halo.model.init_weights"
local memory = require "halo.memory"
local model = require "halo.model"
local recipe = require "halo.recipe"
local tensor = require "halo.tensor"

local function build(init, seed, more)
  local sizes = { family = "qwen2", layers = 3, width = 128, heads = 8, kv_heads = 2, head_dim = 32, ffn = 384,
    vocab = 260, context = 512, rope_theta = 1e5, init = init }
  for k, v in pairs(more or {}) do sizes[k] = v end
  return model.build(model.config(sizes), { seed = seed or 1 })
end

local function std_of(m, name) return m.weight[name]:square():mean():sqrt():item() end

-- Mean attention of each head of layer 1 by distance, over random text: profile[head][distance + 1].
local function profiles(m, n)
  local c, result = m.config, {}
  memory.scope(function()
    local positions = tensor.arange { count = n, dtype = "i32" }:reshape { 1, n }
    local ids = (tensor.uniform { 1, n, lo = 0, hi = 256, seed = 3 }):cast "i32"
    local run = {}
    run.cos, run.sin = m:positions(positions, n)
    function run.attend(layer, q, k)
      if layer == 1 then
        for head = 1, c.heads do
          local group = math.floor((head - 1) / (c.heads / c.kv_heads))
          local qh, kh = q:select { dim = 3, index = head }:reshape { n, c.head_dim },
            k:select { dim = 3, index = group + 1 }:reshape { n, c.head_dim }
          local score = qh:matmul(kh:transpose()) * (1 / math.sqrt(c.head_dim))
          local hidden = tensor.full { n, n, value = -1e9 }:triu { diagonal = 1 }
          local p = (score:tril() + hidden):softmax(-1):contiguous()
          local values = p:pointer()
          local profile = {}
          for distance = 0, 15 do
            local sum = 0
            for t = 64, n - 1 do sum = sum + values[t * n + t - distance] end
            profile[distance + 1] = sum / (n - 64)
          end
          result[head] = profile
        end
      end
      return q
    end
    m:hidden(ids, run)
  end)
  return result
end

local function largest(list)
  local best = 1
  for i, v in ipairs(list) do
    if v > list[best] then best = i end
  end
  return best
end

describe("initial weights", function()
  it("are normal(0, 0.02) by default, with smaller residual outputs", function()
    local m = build(nil)
    assert.near(0.02, std_of(m, "model.embed_tokens.weight"), 4e-4)
    assert.near(0.02, std_of(m, "model.layers.1.self_attn.q_proj.weight"), 4e-4)
    assert.near(0.02 / math.sqrt(6), std_of(m, "model.layers.1.mlp.down_proj.weight"), 2e-4)
    assert.equal(0, m.weight["model.layers.0.self_attn.q_proj.bias"]:abs():max():item())
    assert.equal(1, m.weight["model.norm.weight"]:min():item())
    assert.near(0.01, std_of(build { type = "normal", std = 0.01 }, "model.embed_tokens.weight"), 2e-4)
  end)

  it("with fan_in keep the size of what goes in", function()
    local m = build { type = "fan_in", embedding = 0.2, previous_token = 0 }
    assert.near(0.2, std_of(m, "model.embed_tokens.weight"), 4e-3)
    assert.near(1 / math.sqrt(128), std_of(m, "model.layers.1.self_attn.q_proj.weight"), 2e-3)
    assert.near(1 / math.sqrt(256), std_of(m, "model.layers.1.self_attn.o_proj.weight"), 2e-3)
    assert.near(1 / math.sqrt(384), std_of(m, "model.layers.1.mlp.down_proj.weight"), 1e-3)
    assert.equal(0, m.weight["model.layers.0.self_attn.q_proj.bias"]:abs():max():item())
  end)

  it("make heads of layer 1 look 1 to 4 tokens back, on any text", function()
    for seed = 1, 3 do
      local m = build({ type = "fan_in", embedding = 0.2, previous_token = 3 }, seed)
      for head, profile in ipairs(profiles(m, 160)) do
        local d = init_weights.offset_of(head)
        assert.equal((head - 1) % 4 + 1, d)
        assert.equal(d, largest(profile) - 1, ("seed %d, head %d"):format(seed, head))
        assert.is_true(profile[d] + profile[d + 1] + profile[d + 2] > 0.6)
      end
      -- other layers and v begin without a bias
      assert.equal(0, m.weight["model.layers.1.self_attn.q_proj.bias"]:abs():max():item())
      assert.equal(0, m.weight["model.layers.0.self_attn.v_proj.bias"]:abs():max():item())
    end
    local flat = profiles(build { type = "fan_in", embedding = 0.2, previous_token = 0 }, 160)
    assert.is_true(flat[1][2] < 0.1)
  end)

  it("look back exactly as the formula says where the text has no say", function()
    local n, strength = 160, 3
    local m = build { type = "fan_in", embedding = 0.2, previous_token = strength }
    for _, name in ipairs { "q", "k" } do m.weight["model.layers.0.self_attn." .. name .. "_proj.weight"]:fill(0) end
    local measured = profiles(m, n)
    for head, profile in ipairs(measured) do
      local d = init_weights.offset_of(head)
      local wanted = {}
      for distance = 0, n - 1 do
        local score = 0
        for i = 0, 5 do score = score + math.cos((distance - d) * 1e5 ^ (-i / 16)) end -- six pairs of sixteen
        wanted[distance] = math.exp(strength ^ 2 / math.sqrt(32) * score)
      end
      local sum = 0 -- over t as `profiles` does it
      for t = 64, n - 1 do
        local total = 0
        for distance = 0, t do total = total + wanted[distance] end
        sum = sum + wanted[d] / total
      end
      assert.near(sum / (n - 64), profile[d + 1], 1e-4)
      assert.is_true(profile[d + 1] > 0.5 and profile[d + 2] > 0.18 and profile[d] > 0.18)
    end
  end)

  it("are words of a recipe", function()
    local function resolved(init, family)
      return recipe.resolve(recipe.load_text(([[return recipe "r" { model = model.%s { layers = 1, width = 64,
        heads = 2, init = %s }, data = text ".", optim = adamw { lr = 1e-3 }, stages = { stage { context = 64,
        steps = 1 } } }]]):format(family or "qwen2", init), "r.lua")).model.init
    end
    assert.same({ type = "normal", std = 0.02 }, resolved "nil")
    assert.same({ type = "normal", std = 0.1 }, resolved "0.1")
    assert.same({ type = "fan_in", embedding = 0.2, previous_token = 3 }, resolved "fan_in { previous_token = 3 }")
    local ok, e = pcall(resolved, "fan_in { previous_token = 3 }", "llama")
    assert.is_false(ok)
    assert.truthy(tostring(e):find("previous_token lives in the biases", 1, true))
    ok, e = pcall(build, { type = "fan_in", embedding = 0.2, previous_token = 3 }, 1, { family = "llama" })
    assert.is_false(ok)
    assert.truthy(tostring(e):find("llama does not have", 1, true))
  end)

  it("do not depend on the parameters before them", function()
    local a, b = build(nil, 5), build(nil, 5, { layers = 1, vocab = 300 })
    local name = "model.layers.0.mlp.up_proj.weight"
    assert.equal(0, (a.weight[name] - b.weight[name]):abs():max():item())
    assert.is_true((a.weight[name] - build(nil, 6).weight[name]):abs():max():item() > 0)
  end)
end)
