--- What a recipe will cost, before it runs: parameters, memory per rank, flops, bytes on the wire.
--
-- `halo check` prints it; no device and no memory is needed, so a 32-rank job can be checked on a laptop.
-- The formulas follow reference "memory model" of long-context training (bytes per rank, T = tokens of
-- one sequence on this rank, Bm = sequences of a micro-batch here, b = bytes of an element):
--
--    weights      b P               gradients  4 P (8 P in f64)     moments  8 P (16 P), + 4 P master in bf16
--    block input  b E T Bm per layer with recompute = "block"; otherwise the whole working set per layer
--    working set  what one block keeps between its forward and its backward, see `block_bytes`
--    loss         one chunk of logits (16 MiB or one row at least) and its product's operands
--    ring         W > 1: three slots of keys and values (b) and of their gradients (4 bytes), 2 Hk D T each
--
-- A spec holds the total to the peak that the allocator counts in a real step. flops follow the console
-- line's definition, 6 N + 6 L H D S rho per token: rho is the share of the causal triangle that is
-- computed, known before the run only for dense attention, so the forecast says "at most" for the others.
local M = {}

local dtype_bytes = { f32 = 4, f64 = 8, bf16 = 2 }

-- Config of halo.model for a resolved recipe.
local function config_of(model)
  local family = require("halo.model").family(model.family)
  return { family = model.family, qkv_bias = family.qkv_bias, qk_norm = family.qk_norm, layers = model.layers,
    width = model.width, heads = model.heads, kv_heads = model.kv_heads, head_dim = model.head_dim,
    ffn = model.ffn, vocab = model.vocab, tie = model.tie }
end

--- Number of parameters of a resolved recipe's model.
function M.parameters(model) return require("halo.model.decoder").count(config_of(model)) end

-- Bytes that one block keeps for its backward, per token, and the gradients that live beside them at the
-- worst moment (inside the MLP: those of gate and up, and of the hidden state).
local function block_bytes(m, b)
  local q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
  local attention = m.width -- normed input
    + 2 * (q + kv) + kv -- q and k before and after rope, v
    + q + m.heads * 4 / b -- attention's output, log-sum-exp in f32
    + 2 * m.width -- output product, residual sum
  local mlp = m.width + 3 * m.ffn + 2 * m.width -- normed input; gate, up and their product; output, residual
  local gradients = 2 * m.ffn + 3 * m.width
  return { kept = (attention + mlp) * b, gradients = gradients * b }
end

local function memory_of(resolved, stage, parameters)
  local m, mesh = resolved.model, resolved.mesh
  local b = dtype_bytes[resolved.dtype]
  local wide = resolved.dtype == "f64" and 8 or 4 -- gradients and moments
  local block = stage.attention.ring.block
  local per_rank = math.ceil(stage.context / (mesh.cp * block)) * block
  local tokens = per_rank * stage.batch / (mesh.dp * stage.accumulate)
  local set = block_bytes(m, b)
  local keeps_blocks = m.recompute ~= "block"
  local hidden = m.width * b * tokens
  local activations = keeps_blocks and set.kept * tokens * m.layers or hidden * m.layers + set.kept * tokens
  local chunk = math.max(16 * 2 ^ 20, m.vocab * wide)
  local kv = 2 * m.kv_heads * m.head_dim * tokens
  local out = {
    weights = b * parameters,
    gradients = wide * parameters,
    optimizer = 2 * wide * parameters + (resolved.dtype == "bf16" and 4 * parameters or 0),
    activations = activations + set.gradients * tokens + 3 * hidden + math.min(chunk, m.vocab * wide * tokens),
    ring = mesh.cp > 1 and 3 * kv * b + 3 * kv * wide + m.heads * m.head_dim * tokens * wide or 0,
  }
  out.total = 0
  for _, name in ipairs { "weights", "gradients", "optimizer", "activations", "ring" } do
    out.total = out.total + out[name]
  end
  return out, per_rank
end

-- Share of the causal triangle that is computed: exact for dense, an upper bound for windows and budgets,
-- nil when only the data can tell.
local function density_bound(stage)
  local a, n = stage.attention, stage.context
  if a.type == "dense" or (a.dense and a.dense.below > n) then return 1 end
  local pairs_all = n * (n + 1) / 2
  local function of(diagonals, columns)
    local g = a.ring.block
    -- A diagonal touches at most two block diagonals; a column costs itself.
    return math.min(1, (math.min(diagonals * 2 * g, n) * n + columns * n) / pairs_all)
  end
  if a.type == "window" then return of(math.ceil(a.window / a.ring.block) / 2 + 1, a.sink) end
  if a.keep and a.keep.type == "budget" then return of(a.keep.slashes, a.keep.verticals + a.sink) end
end

local function flops_of(resolved, stage, parameters)
  local m = resolved.model
  local products = parameters - (m.tie and 0 or m.vocab * m.width) -- looking up an embedding costs nothing
  local tokens = stage.batch * stage.context
  local dense = (6 * products + 6 * m.layers * m.heads * m.head_dim * stage.context) * tokens
  local bound = density_bound(stage)
  local executed = bound and (6 * products + 6 * m.layers * m.heads * m.head_dim * stage.context * bound) * tokens
  return { dense = dense, at_most = executed or dense, density_at_most = bound }
end

-- Bytes that one rank sends in a step.
local function traffic_of(resolved, stage, parameters, per_rank)
  local m, mesh = resolved.model, resolved.mesh
  local ranks, b = mesh.dp * mesh.cp, dtype_bytes[resolved.dtype]
  local wide = resolved.dtype == "f64" and 8 or 4
  local kv = 2 * m.kv_heads * m.head_dim * per_rank * stage.batch / mesh.dp
  local forwards = m.recompute == "block" and 2 or 1
  local ring = mesh.cp > 1 and m.layers * (mesh.cp - 1) * kv * (b * (forwards + 1) + wide) or 0
  local reduce = ranks > 1 and 2 * (ranks - 1) / ranks * wide * parameters or 0
  return { ring = ring, gradients = reduce, total = ring + reduce }
end

--- Forecast of a resolved recipe.
-- @tparam table resolved from halo.recipe
-- @treturn table `parameters`, `ranks`, `stages` (list of { name, memory, flops, traffic, tokens_per_rank }),
-- `peak` (the memory of the stage that needs most), `flops` (of the whole run, at most)
function M.of(resolved)
  local parameters = M.parameters(resolved.model)
  local out = { parameters = parameters, ranks = resolved.mesh.dp * resolved.mesh.cp, stages = {}, flops = 0 }
  for i, stage in ipairs(resolved.stages) do
    local memory, per_rank = memory_of(resolved, stage, parameters)
    local row = { name = stage.name, memory = memory, flops = flops_of(resolved, stage, parameters),
      traffic = traffic_of(resolved, stage, parameters, per_rank), tokens_per_rank = per_rank }
    out.stages[i] = row
    out.flops = out.flops + row.flops.at_most * stage.steps
    if not out.peak or memory.total > out.peak.total then out.peak, out.peak_stage = memory, i end
  end
  return out
end

return M
