--- AdamW over a list of parameters, with one flat buffer of gradients.
-- The optimizer makes the gradient buffer; backward adds into it, so accumulating over micro-batches
-- is running backward several times before `step`. What ranks exchange, what is clipped and what a
-- checkpoint holds are flat tensors in parameter order (core/optim.c).
--
--    local opt = optim.adamw(model:parameters(), { lr = 1e-3, decay = 0.1, clip = 1.0 })
--    for step = 1, 100 do
--      opt:zero_grad()
--      loss(batch(step)):backward()
--      local norm = opt:step { lr = schedule.value(rate, step, 100) }
--    end
--
-- Decay applies to parameters of two or more dims: norms and biases are scales and offsets, which decay
-- would pull to zero for no gain (GPT-3, arXiv 2005.14165, appendix B; Transformers' default grouping).
local ffi = require "ffi"
local halo_ffi = require "halo.ffi"
local args = require "halo.args"
local errors = require "halo.errors"
local tensor = require "halo.tensor"

local C, call, check = halo_ffi.C, halo_ffi.call, halo_ffi.check

local Optimizer = {}
Optimizer.__index = Optimizer

local M = {}

-- { name =, tensor = } of every entry, which may also be a plain tensor.
local function named_parameters(parameters)
  if type(parameters) ~= "table" or #parameters == 0 then
    errors.raise("usage", "optim.adamw wants a list of parameters, got "
      .. (type(parameters) == "table" and "an empty one" or args.describe(parameters)), 3)
  end
  local list = {}
  for i, p in ipairs(parameters) do
    local is_plain = tensor.is_tensor(p)
    list[i] = { name = not is_plain and p.name or tostring(i),
      tensor = tensor.check(is_plain and p or p.tensor, ("optim.adamw: parameter %d"):format(i), 3) }
  end
  return list
end

local slot = ffi.new "halo_adamw *[1]"
local number = ffi.new "double[1]"

--- An AdamW optimizer (Loshchilov and Hutter, arXiv 1711.05101, in PyTorch's order of operations).
-- @tparam table parameters list of tensors, or of `{ name =, tensor = }` as `model.parameters` has them;
-- each a leaf that requires a gradient, each once
-- @tparam[opt] table o `lr` (a number: used by `step` when it is given none), `betas` ({ 0.9, 0.95 }),
-- `eps` (1e-8), `decay` (0.1), `clip` (0: none), `moments` ("f32", or "bf16" for half the memory of both
-- moments, rounded stochastically); a recipe's `adamw { ... }` may be handed over as it is
-- @treturn Optimizer
function M.adamw(parameters, o)
  o = args.named("optim.adamw", o or {}, { type = "string?", lr = "number|table?", betas = { "table", { 0.9, 0.95 } },
    eps = { "number", 1e-8 }, decay = { "number", 0.1 }, clip = { "number", 0 },
    moments = { "string", "f32" } })
  if o.moments ~= "f32" and o.moments ~= "bf16" then
    errors.raise("usage", ('optim.adamw: moments = "%s"; "f32" or "bf16"'):format(o.moments), 2)
  end
  local list = named_parameters(parameters)
  local n = #list
  local handles, decay = ffi.new("halo_tensor *[?]", n), ffi.new("double[?]", n)
  for i, p in ipairs(list) do
    handles[i - 1] = p.tensor
    decay[i - 1] = p.tensor.ndim >= 2 and 1 or 0
  end
  call(C.halo_adamw_new, slot, handles, decay, n, o.moments == "bf16" and C.HALO_BF16 or C.HALO_F32)
  local self = setmetatable({
    handle = ffi.gc(slot[0], C.halo_adamw_free),
    parameters = list,
    lr = type(o.lr) == "number" and o.lr or nil,
    betas = { o.betas[1], o.betas[2] }, eps = o.eps, decay = o.decay, clip = o.clip,
    steps = 0, -- steps taken; part of the state
  }, Optimizer)
  return self
end

--- Set all gradients to zero: at the start of every step, before the first backward.
function Optimizer:zero_grad() check(C.halo_adamw_zero_grad(self.handle)) end

--- All gradients as one flat tensor: what ranks sum.
function Optimizer:flat_grad() return tensor.borrow(C.halo_adamw_flat_grad(self.handle)) end

--- Euclidean norm of all gradients, summed in fp64 in a fixed order.
function Optimizer:grad_norm()
  check(C.halo_adamw_grad_norm2(self.handle, number))
  return math.sqrt(number[0])
end

--- The factor that brings a norm down to `limit` (torch.nn.utils.clip_grad_norm_); 1 for a limit of 0.
function M.clip_factor(norm, limit)
  if limit <= 0 then return 1 end
  return math.min(1, limit / (norm + 1e-6))
end

--- Update all parameters from the gradients at hand.
-- @tparam[opt] table o `lr` (default: the optimizer's), `scale` (1; gradients are multiplied by it, for
-- instance by one over the number of labels), `clip` (largest norm after scaling; default: the
-- optimizer's), `step` (for the bias correction; default: one more than the last), `norm` (of the
-- gradients before scaling, when it is known already)
-- @treturn ?number norm after scaling and before clipping, when there was something to clip
-- @usage local norm = opt:step { lr = 3e-4, scale = 1 / labels, clip = 1.0 }
function Optimizer:step(o)
  o = args.named("step", o or {}, { lr = "number?", scale = { "number", 1 }, clip = { "number", self.clip },
    step = "int?", norm = "number?" })
  local lr = o.lr or self.lr
  if not lr then errors.raise("usage", "step: no lr, neither here nor in optim.adamw", 2) end
  local step = o.step or self.steps + 1
  local factor, norm = o.scale, nil
  if o.clip > 0 then
    norm = (o.norm or self:grad_norm()) * math.abs(o.scale)
    if norm ~= norm or norm == math.huge then
      errors.raise("numerics", ("step %d: the gradient norm is %g; nothing was updated"):format(step, norm), 2)
    end
    factor = factor * M.clip_factor(norm, o.clip)
  end
  check(C.halo_adamw_step(self.handle, step, lr, self.betas[1], self.betas[2], self.eps, self.decay, factor))
  self.steps = step
  return norm
end

--- Everything that the next step depends on, besides the parameters: flat tensors that are the
-- optimizer's own memory, not copies.
-- @treturn table `steps`, `moment1`, `moment2`, and `master` (fp32 copies) when a parameter is bf16
function Optimizer:state()
  local master = C.halo_adamw_master(self.handle)
  return {
    steps = self.steps,
    moment1 = tensor.borrow(C.halo_adamw_moment1(self.handle)),
    moment2 = tensor.borrow(C.halo_adamw_moment2(self.handle)),
    master = master ~= nil and tensor.borrow(master) or nil,
  }
end

--- Take over a state: the tensors are copied into place.
-- @tparam table state as `state()` gives it, from an optimizer over the same parameters
function Optimizer:set_state(state)
  local own = self:state()
  for _, name in ipairs { "moment1", "moment2", "master" } do
    if (own[name] == nil) ~= (state[name] == nil) then
      errors.raise("usage", ("set_state: %s is %s"):format(name,
        own[name] and "missing" or "not part of this optimizer"), 2)
    end
  end
  for _, name in ipairs { "moment1", "moment2", "master" } do
    if own[name] then own[name]:copy_from(state[name]) end
  end
  self.steps = state.steps
end

--- Where each parameter lies in the flat tensors.
-- @treturn {table,...} `name`, `first` (from 0), `count`, `shape`
function Optimizer:layout()
  local out = {}
  for i, p in ipairs(self.parameters) do
    local first = tonumber(C.halo_adamw_offset(self.handle, i - 1))
    out[i] = { name = p.name, first = first, count = p.tensor.count, shape = p.tensor.shape }
  end
  return out
end

Optimizer.__tostring = function(self)
  local n = tonumber(C.halo_adamw_offset(self.handle, #self.parameters))
  return ("AdamW over %d parameters (%.2f M numbers), step %d"):format(#self.parameters, n / 1e6, self.steps)
end

M.Optimizer = Optimizer
return M
