--- Backward, recompute, and switching the tape off.
-- The engine records every op on a tensor that wants a gradient (core/tape.c). Backward is a loop that
-- polls the engine: when it meets a recompute node it hands the function back to Lua, which runs it
-- again with the tape on, so that C never calls into Lua.
--
--    local y = autograd.checkpoint(function(x) return block(x) end, x)   -- keeps only x
--    loss:backward()
local ffi = require "ffi"
local halo_ffi = require "halo.ffi"
local errors = require "halo.errors"
local memory = require "halo.memory"
local tensor = require "halo.tensor"

local C, call, call_at = halo_ffi.C, halo_ffi.call, halo_ffi.call_at
local is_tensor = tensor.is_tensor

local M = {}

local function restore(was, ok, ...)
  C.halo_tape_set_enabled(was)
  if not ok then error((...), 0) end
  return ...
end

local function with_tape(on, fn, ...) return restore(C.halo_tape_set_enabled(on), pcall(fn, ...)) end

--- Run `fn(...)` without recording; returns what it returns. On an error the tape is on again, too.
function M.no_grad(fn, ...) return with_tape(0, fn, ...) end

--- Run `fn(...)` with recording, inside `no_grad` for instance.
function M.enable_grad(fn, ...) return with_tape(1, fn, ...) end

--- Is the tape recording?
function M.is_enabled() return C.halo_tape_enabled() ~= 0 end

--- Nodes of the tape that are alive: 0 when nothing is left to differentiate.
function M.live_nodes() return tonumber(C.halo_tape_live_nodes()) end

-- ---- recompute ----------------------------------------------------------------------------------

-- What to run again, by token. An entry goes when it has been used, or when the engine says that the
-- forward pass was dropped.
local pending, next_token = {}, 0
local dropped = ffi.new "int64_t[64]"

local function forget_dropped()
  repeat
    local n = C.halo_tape_dropped(dropped, 64)
    for i = 0, n - 1 do pending[tonumber(dropped[i])] = nil end
  until n < 64
end

local function counted(...) return { n = select("#", ...), ... } end

-- Run fn; results that are not its own fresh tensors (an argument handed through, a weight) get a handle
-- of their own, because a node will be bound to it.
local function fresh_results(fn, ...)
  local results = counted(fn(...))
  if results.n > C.HALO_MAX_OUTPUTS then
    errors.raise("usage", ("checkpoint: the function returned %d values, at most %d"):format(results.n,
      C.HALO_MAX_OUTPUTS), 0)
  end
  for i = 1, results.n do
    if is_tensor(results[i]) and not memory.is_local(results[i]) then results[i] = results[i]:detach() end
  end
  return results
end

-- Called as the last thing of the public functions, so that it stands in their frame.
local function keep_arguments(is_offloaded, fn, ...)
  if not M.is_enabled() then return fn(...) end
  forget_dropped()
  local given, n_given = { ... }, select("#", ...)
  local inputs, places = ffi.new("halo_tensor *[?]", C.HALO_MAX_INPUTS), {}
  local offload = 0
  for i = 1, n_given do
    if is_tensor(given[i]) then
      if #places == C.HALO_MAX_INPUTS then
        errors.raise("usage", ("checkpoint: more than %d tensors among the arguments")
          :format(tonumber(C.HALO_MAX_INPUTS)), 2)
      end
      inputs[#places] = tensor.check(given[i], ("checkpoint: argument %d"):format(i), 2)
      if is_offloaded and given[i].requires_grad then offload = offload + 2 ^ #places end
      places[#places + 1] = i
    end
  end
  local results = memory.scope(M.no_grad, fresh_results, fn, ...)
  local outputs, has_output = ffi.new("halo_tensor *[?]", C.HALO_MAX_OUTPUTS), false
  for i = 1, results.n do
    if is_tensor(results[i]) then
      outputs[i - 1] = results[i]
      has_output = true
    end
  end
  if has_output then
    next_token = next_token + 1
    call_at(2, C.halo_tape_checkpoint_offload, outputs, results.n, inputs, #places, next_token, offload)
    for _, place in ipairs(places) do given[place] = false end -- the tape holds them
    pending[next_token] = { fn = fn, given = given, n_given = n_given, places = places }
  end
  return unpack(results, 1, results.n)
end

--- Run `fn(...)` and keep only its arguments: in backward it is run again to rebuild what was dropped.
-- It must be a function of its arguments and of leaves (weights), and give the same results again:
-- random numbers come from counters, plans from the caller. Tensors made inside are freed when it ends,
-- as in `memory.scope`.
-- @tparam function fn
-- @param ... tensors (at most 8) and other values, handed over as they are
-- @return what `fn` returns: at most 4 values, those that are tensors can be differentiated
-- @usage x = autograd.checkpoint(function(h) return block:forward(h, plan) end, x)
function M.checkpoint(fn, ...) return keep_arguments(false, fn, ...) end

--- The same, and arguments that want a gradient (the hidden state that a block gets) wait in pinned host
-- memory until backward needs them; the copies run beside the computation. Host memory is kept as it is.
-- @see autograd.checkpoint
function M.checkpoint_offloaded(fn, ...) return keep_arguments(true, fn, ...) end

local n_inputs = ffi.new "int32_t[1]"

local is_recomputing = false

--- Is a function running again, to rebuild what backward needs? What it returns then only carries the tape.
function M.is_recomputing() return is_recomputing end

local function again(fn, ...)
  is_recomputing = true
  local results = { pcall(fn, ...) }
  is_recomputing = false
  if not results[1] then error(results[2], 0) end
  return unpack(results, 2, table.maxn(results))
end

-- Answer HALO_BACKWARD_RECOMPUTE: run the function again, on the fresh leaves that the engine gives.
local function recompute(backward, token)
  local entry = pending[token]
  pending[token] = nil
  if not entry then
    errors.raise("internal", ("backward: recompute token %d is not known"):format(token), 0)
  end
  local leaves = ffi.new("halo_tensor *[?]", C.HALO_MAX_INPUTS)
  call(C.halo_backward_inputs, backward, leaves, C.HALO_MAX_INPUTS, n_inputs)
  local given = {}
  for i = 1, entry.n_given do given[i] = entry.given[i] end
  for i, place in ipairs(entry.places) do given[place] = tensor.borrow(leaves[i - 1]) end
  local results = counted(M.enable_grad(again, entry.fn, unpack(given, 1, entry.n_given)))
  local outputs = ffi.new("halo_tensor *[?]", C.HALO_MAX_OUTPUTS)
  for i = 1, results.n do
    if is_tensor(results[i]) then outputs[i - 1] = results[i] end
  end
  call(C.halo_backward_recomputed, backward, outputs, results.n)
end

-- ---- backward -----------------------------------------------------------------------------------

local event, token = ffi.new "int32_t[1]", ffi.new "int64_t[1]"

local function poll(backward)
  while true do
    call(C.halo_backward_next, backward, event, token)
    if event[0] == C.HALO_BACKWARD_DONE then return end
    memory.scope(recompute, backward, tonumber(token[0]))
  end
end

local slot = ffi.new "halo_backward *[1]"

--- Add the gradients of `root` to all leaves below it. The tape below is used up.
-- @tparam Tensor root usually a scalar loss
-- @tparam[opt] Tensor seed gradient of the root, of its shape; ones without
-- @raise what a recomputed function raises, as it is; the tape is released then, too
function M.backward(root, seed)
  tensor.check(root, "backward: root", 2)
  if seed ~= nil then tensor.check(seed, "backward: seed", 2) end
  call_at(2, C.halo_backward_begin, slot, root, seed)
  local backward = slot[0]
  local ok, err = pcall(poll, backward)
  C.halo_backward_free(backward)
  forget_dropped()
  if not ok then error(err, 0) end
end

--- Recompute functions that wait for a backward: 0 when nothing is pending. For leak tests.
function M.pending()
  forget_dropped()
  local n = 0
  for _ in pairs(pending) do n = n + 1 end
  return n
end

return M
