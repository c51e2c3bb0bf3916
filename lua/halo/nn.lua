--- Small modules: parameters with names, for gates, probes and models of one's own.
-- A module is a table whose fields are tensors that want a gradient (its parameters), modules, or
-- anything else. Parameters are listed in the order of their names (numbers first), so the order is the
-- same on every rank and in every run. `init` fills each one from random numbers that depend on the
-- seed and on its full name alone: adding a layer does not change the others.
--
--    local gate = nn.module {
--      down = nn.linear { inputs = 768, outputs = 16 },
--      norm = nn.rmsnorm { size = 16 },
--      up = nn.linear { inputs = 16, outputs = 1, bias = true },
--      forward = function(self, x) return self.up(self.norm(self.down(x))) end,
--    }
--    gate:init { seed = 7 }
--    local opt = optim.adamw(gate:parameters())
--    local y = gate(x)
local args = require "halo.args"
local bit = require "bit"
local errors = require "halo.errors"
local ops = require "halo.ops"
local tensor = require "halo.tensor"

local M = {}

local Module = {}

-- Initial values live beside the tensors, by tensor, because a cdata handle has no fields of its own.
local rules = setmetatable({}, { __mode = "k" })

--- Stream number of a name: FNV-1a, 32 bits. Random numbers of (seed, stream_of(name)) belong to it.
function M.stream_of(name)
  local h = 2166136261
  for i = 1, #name do
    h = bit.bxor(h, name:byte(i)) % 4294967296
    -- h * 16777619 mod 2^32, in parts that a double holds exactly
    h = (h % 65536 * 16777619 + math.floor(h / 65536) * 16777619 % 65536 * 65536) % 4294967296
  end
  return h
end

local function is_module(v) return type(v) == "table" and getmetatable(v) == Module end

--- Make a module of a table; `forward` (optional) is what calling it does.
function M.module(t) return setmetatable(t, Module) end

--- A parameter: a leaf that wants a gradient and knows how it is filled.
-- @tparam table o sizes, `dtype` ("f32"), `device`, and `std` (normal) or `value` (constant)
function M.parameter(o)
  o = args.named("nn.parameter", o, { shape = "table", dtype = { "string", "f32" }, device = "string?",
    std = "number?", value = "number?" })
  local t = tensor.full { shape = o.shape, dtype = o.dtype, device = o.device, value = o.value or 0 }
  t:require_grad()
  rules[t] = { std = o.std, value = o.value or 0 }
  return t
end

-- Names of the fields that are parameters or modules: numbers first, then words.
local function field_names(module)
  local names = {}
  for name, v in pairs(module) do
    local is_parameter = tensor.is_tensor(v) and v.requires_grad
    if is_parameter or is_module(v) then names[#names + 1] = name end
  end
  table.sort(names, function(a, b)
    if type(a) == type(b) then return a < b end
    return type(a) == "number"
  end)
  return names
end

local function collect(module, prefix, out)
  for _, name in ipairs(field_names(module)) do
    local v, full = module[name], prefix .. tostring(name)
    if is_module(v) then
      collect(v, full .. ".", out)
    else
      out[#out + 1] = { name = full, tensor = v }
    end
  end
  return out
end

local methods = {}

--- All parameters as a list of `{ name =, tensor = }`; names are paths such as "layers.1.up.weight".
function methods:parameters() return collect(self, "", {}) end

--- Fill all parameters anew. What was not made by `nn.parameter` keeps its values.
-- @tparam[opt] table o `seed` (0)
-- @return the module
function methods:init(o)
  o = args.named("init", o or {}, { seed = { "number", 0 } })
  for _, p in ipairs(self:parameters()) do
    local rule = rules[p.tensor]
    if rule and rule.std then
      local values = tensor.normal { shape = p.tensor.shape, seed = o.seed, stream = M.stream_of(p.name),
        std = rule.std }
      p.tensor:copy_from(values)
      values:free()
    elseif rule then
      p.tensor:fill(rule.value)
    end
  end
  return self
end

--- Number of numbers in all parameters.
function methods:count()
  local n = 0
  for _, p in ipairs(self:parameters()) do n = n + p.tensor.count end
  return n
end

Module.__index = methods
Module.__call = function(self, ...)
  local forward = rawget(self, "forward")
  if not forward then errors.raise("usage", "this module has no forward function", 2) end
  return forward(self, ...)
end
Module.__tostring = function(self)
  local lines = {}
  for i, p in ipairs(self:parameters()) do
    lines[i] = ("  %-32s %s"):format(p.name, tensor.describe(p.tensor))
  end
  return ("module, %d parameters, %d numbers\n%s"):format(#lines, self:count(), table.concat(lines, "\n"))
end

--- `x weight^T + bias`, weight normal(0, std).
-- @tparam table o `inputs`, `outputs`, `bias` (false), `std` (0.02, GPT-2's), `dtype`, `device`
function M.linear(o)
  o = args.named("nn.linear", o, { inputs = "int", outputs = "int", bias = { "boolean", false },
    std = { "number", 0.02 }, dtype = { "string", "f32" }, device = "string?" })
  local bias = o.bias and M.parameter { shape = { o.outputs }, value = 0, dtype = o.dtype, device = o.device }
  return M.module {
    weight = M.parameter { shape = { o.outputs, o.inputs }, std = o.std, dtype = o.dtype, device = o.device },
    bias = bias or nil,
    forward = function(self, x) return ops.linear(x, self.weight, self.bias) end,
  }:init()
end

--- Root mean square norm over the last dim, weight 1.
-- @tparam table o `size`, `eps` (1e-6), `dtype`, `device`
function M.rmsnorm(o)
  o = args.named("nn.rmsnorm", o, { size = "int", eps = { "number", 1e-6 }, dtype = { "string", "f32" },
    device = "string?" })
  return M.module {
    weight = M.parameter { shape = { o.size }, value = 1, dtype = o.dtype, device = o.device },
    forward = function(self, x) return ops.rmsnorm(x, self.weight, { eps = o.eps }) end,
  }
end

--- Rows by token id, normal(0, std).
-- @tparam table o `vocab`, `size`, `std` (0.02), `dtype`, `device`
function M.embedding(o)
  o = args.named("nn.embedding", o, { vocab = "int", size = "int", std = { "number", 0.02 },
    dtype = { "string", "f32" }, device = "string?" })
  return M.module {
    weight = M.parameter { shape = { o.vocab, o.size }, std = o.std, dtype = o.dtype, device = o.device },
    forward = function(self, ids) return ops.embedding(self.weight, ids) end,
  }:init()
end

return M
