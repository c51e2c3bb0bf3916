--- What a recipe will cost, before it runs: parameters, memory per rank, flops, bytes on the wire.
--
-- `halo check` prints it; no device and no memory is needed, so a 32-rank job can be checked on a laptop.
-- Bytes per rank, with T tokens here (sequences of a micro-batch stacked), b bytes of an element:
--
--    weights      b P           gradients  4 P (8 P in f64)       moments  8 P (16 P; 4 P kept in
--                                                                    bf16), + 4 P master in bf16
--    activations  block inputs, L E T, and the largest of three moments of the backward pass
--       MLP         what a block keeps (below), gradients of its output and input, and for one chunk of rows
--                   gate, up, their product, and the gradients of these: 6 F
--       attention   what attention keeps, gradients of o, q, k, v, and the kernel's fp32 sums
--       loss        final hidden states, their gradient, one chunk of logits, the output matrix' gradient
--    ring         on a device the keys and values and their gradients once (fp32); W > 1: three slots of keys
--                 and values (b) and of their gradients (fp32), 2 Hk D T each
--    host         offload: the block inputs, in pinned host memory; not part of the total
--
-- What a block keeps for its backward, columns of T elements: its two normed inputs and the residual
-- between them (3 E), q and o (2 H D), k, the packed projection that v is a part of (H D + 3 Hk D),
-- log-sum-exp (H); with recompute = "none" also gate,
-- up and their product (3 F), where all rows are one chunk (halo.model.decoder, core/nn_mlp.c). With
-- recompute = "none" every block keeps that; with "block" only the one at hand.
--
-- Buffers are counted as the allocator hands them out, in eighths of a power of two on the host, in 512 bytes
-- on a device (core/alloc.c). A spec holds the total to the peak of a real step, within 15 % on the host and
-- 5 % on a device. flops follow the console line's definition,
-- 6 N + 6 L H D S rho per token: rho is the share of the causal triangle that is computed, known before the
-- run only for dense attention, so the forecast says "at most" for the others.
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

-- Size that the allocator hands out for a request: eighths of a power of two on the host, 512 bytes on a
-- device (core/alloc.c).
local function handed_out(bytes, device)
  if device ~= "cpu" then return math.ceil(bytes / 512) * 512 end
  if bytes <= 256 then return 256 end
  local base = 2 ^ math.floor(math.log(bytes) / math.log(2) + 1e-9)
  return base + math.ceil((bytes - base) / (base / 8)) * base / 8
end

local LOSS_CHUNK_BYTES = 16 * 2 ^ 20 -- core/nn_loss.c
local GPU_LOSS_ROWS = 2048 -- the same

-- Bytes of logits at hand at once in training: core/nn_loss.c, chunk_rows. On a device bf16 logits stay so, in
-- rows of a multiple of 64.
local function logit_bytes(m, device, b, wide, tokens)
  local element = device == "cpu" and wide or b
  local row = (device == "cpu" and m.vocab or math.ceil(m.vocab / 64) * 64) * element
  local bytes = math.max(LOSS_CHUNK_BYTES, device == "cpu" and row * m.width / 2 or row * GPU_LOSS_ROWS)
  local most = math.min(tokens, math.max(1, math.floor(bytes / row)))
  return handed_out(math.ceil(tokens / math.ceil(tokens / most)) * row, device)
end

-- Activations of one step on one rank that holds `tokens` tokens.
local function activation_bytes(m, device, b, wide, tokens, offload)
  local q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
  local function bytes(count, size) return handed_out(count * (size or b), device) end
  local function columns(n, count, size) return n * bytes(count * tokens, size) end
  local chunk = require("halo.model.decoder").mlp_chunk[device]
  local chunks = math.ceil(tokens / chunk)
  local rows = math.ceil(tokens / chunks)
  -- gate beside up, and their product, of some rows
  local function inner_of(n) return bytes(n * 2 * m.ffn) + bytes(n * m.ffn) end
  local inner = inner_of(rows)
  local is_saved = m.recompute == "none"
  local qkv = columns(1, q + 2 * kv)
  local attention = columns(2, q) + columns(1, kv) + qkv + columns(1, m.heads, wide)
  local kept = attention + columns(3, m.width) + columns(2, 1, wide) + (is_saved and inner_of(tokens) or 0)
  -- Of offloaded inputs two are on the device: one leaving or coming, one in use (core/offload.c).
  local inputs = columns(offload and device ~= "cpu" and math.min(2, m.layers) or m.layers, m.width)
    + columns(2, m.head_dim / 2, wide)
  local moments = {
    mlp = kept + columns(2, m.width) + (is_saved and 1 or 2) * inner,
    attention = attention + columns(2, m.width) + columns(1, q) + columns(1, q + 2 * kv) + columns(1, q, wide)
      + columns(2, m.heads, wide) + (device == "cpu" and columns(2, kv, wide) + columns(2, kv) or columns(2, kv)),
    loss = columns(3, m.width) + logit_bytes(m, device, b, wide, tokens) + bytes(m.vocab * m.width, wide),
  }
  local largest = math.max(moments.mlp, moments.attention, moments.loss)
  if m.recompute == "block" then return inputs + largest, moments end
  return inputs + kept * (m.layers - 1) + math.max(largest, kept + moments.loss), moments
end

local function memory_of(resolved, stage, parameters)
  local m, mesh = resolved.model, resolved.mesh
  local b = dtype_bytes[resolved.dtype]
  local wide = resolved.dtype == "f64" and 8 or 4 -- gradients, moments, sums
  local moment = resolved.optim and resolved.optim.moments == "bf16" and 2 or wide
  local block = stage.attention.ring.block
  local per_rank = math.ceil(stage.context / (mesh.cp * block)) * block
  local tokens = per_rank * stage.batch / (mesh.dp * stage.accumulate)
  local device = resolved.device or "cpu"
  local kv, q = 2 * m.kv_heads * m.head_dim * tokens, m.heads * m.head_dim * tokens
  local out = {
    weights = b * parameters,
    gradients = wide * parameters,
    optimizer = 2 * moment * parameters + (resolved.dtype == "bf16" and 4 * parameters or 0),
    activations = activation_bytes(m, device, b, wide, tokens, stage.offload),
    host = stage.offload and device ~= "cpu" and b * m.layers * m.width * tokens or 0,
    ring = mesh.cp > 1 and 3 * kv * b + 3 * kv * wide + q * wide or device ~= "cpu" and kv * (b + wide) or 0,
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
