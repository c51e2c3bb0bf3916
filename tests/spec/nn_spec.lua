local nn = require "halo.nn"
local ops = require "halo.ops"
local optim = require "halo.optim"
local tensor = require "halo.tensor"

describe("nn", function()
  local function names(module)
    local out = {}
    for i, p in ipairs(module:parameters()) do out[i] = p.name end
    return out
  end

  local function gate()
    return nn.module {
      down = nn.linear { inputs = 6, outputs = 4 },
      norm = nn.rmsnorm { size = 4 },
      up = nn.linear { inputs = 4, outputs = 1, bias = true },
      not_a_parameter = tensor.zeros { 3 },
      forward = function(self, x) return self.up(self.norm(self.down(x))) end,
    }
  end

  it("lists parameters by name, numbers first", function()
    assert.same({ "down.weight", "norm.weight", "up.bias", "up.weight" }, names(gate()))
    local stack = nn.module { nn.linear { inputs = 2, outputs = 2 }, nn.rmsnorm { size = 2 }, head = gate() }
    assert.same({ "1.weight", "2.weight", "head.down.weight", "head.norm.weight", "head.up.bias", "head.up.weight" },
      names(stack))
    assert.equal(6 * 4 + 4 + 1 + 4, gate():count())
  end)

  it("fills from the seed and the full name alone", function()
    local function hashes(module)
      local out = {}
      for _, p in ipairs(module:parameters()) do out[p.name] = p.tensor:hash() end
      return out
    end
    local a, b = gate():init { seed = 7 }, gate():init { seed = 7 }
    assert.same(hashes(a), hashes(b))
    b.extra = nn.linear { inputs = 3, outputs = 3 }
    b:init { seed = 7 }
    local after = hashes(b)
    for name, h in pairs(hashes(a)) do assert.equal(h, after[name]) end
    assert.are_not.equal(hashes(a)["down.weight"], hashes(gate():init { seed = 8 })["down.weight"])
    local wide = nn.module { w = nn.linear { inputs = 300, outputs = 300, std = 0.5 } }:init()
    assert.near(0.5, (wide.w.weight * wide.w.weight):mean():item() ^ 0.5, 0.01)
    assert.same({ 0 }, a.up.bias:totable())
    assert.same({ 1, 1, 1, 1 }, a.norm.weight:totable())
  end)

  it("computes what its layers are", function()
    local g = gate():init()
    local x = tensor.normal { 2, 3, 6, seed = 5 }
    local y = g(x)
    assert.same({ 2, 3, 1 }, y.shape)
    local by_hand = ops.linear(ops.rmsnorm(ops.linear(x, g.down.weight), g.norm.weight), g.up.weight, g.up.bias)
    assert.same(by_hand:totable(), y:totable())
    local e = nn.embedding { vocab = 5, size = 3 }
    assert.same(e.weight:totable()[3], e(tensor({ 2 }, { dtype = "i64" })):totable()[1])
    assert.matches("no forward", tostring(select(2, pcall(nn.module {}, x))))
  end)

  it("learns", function()
    local g = gate():init { seed = 1 }
    local opt = optim.adamw(g:parameters(), { lr = 0.05, decay = 0 })
    local x = tensor.normal { 64, 6, seed = 2 }
    local target = ops.sum(x, { dim = 2, keepdim = true }):tanh()
    local function loss()
      local d = g(x) - target
      return (d * d):mean()
    end
    local first = loss():item()
    for _ = 1, 60 do
      opt:zero_grad()
      loss():backward()
      opt:step()
    end
    assert.is_true(loss():item() < first / 4)
  end)

  it("hashes names as FNV-1a does", function()
    assert.equal(0x811c9dc5, nn.stream_of "")
    assert.equal(0xe40c292c, nn.stream_of "a")
    assert.equal(0xbf9cf968, nn.stream_of "foobar")
  end)
end)
