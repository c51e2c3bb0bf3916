--- Memory of tensors: who owns the bytes, scopes that free at once, and a collector that hurries.
-- Lua's collector sees a tensor as a small object, whatever it holds (reference: LuaJIT
-- ext_ffi_semantics, garbage collection of cdata). Three things make up for that:
--
--  * `memory.scope(fn)` frees every tensor made inside `fn`, but for what it returns or keeps;
--  * the collector is stepped as live bytes grow, one full cycle per doubling, so forgotten
--    temporaries in a plain loop go too;
--  * when an allocation fails, everything is collected and the call is tried once more
--    (`halo.ffi`), and the error then says which tag holds how much.
--
-- A handle that a scope has freed stays harmless: using it raises, see `halo.tensor`.
local halo_ffi = require "halo.ffi"
local C = halo_ffi.C

local M = {}

--- Tags of allocations, in the order of `halo_tag`.
M.tags = { "other", "weights", "gradients", "optimizer", "activations", "ring", "plan", "data" }

local devices = require "halo.device"

local function number_of(device) return devices.number(device or devices.default) end

--- Bytes handed out now.
-- @tparam[opt] string tag one of `memory.tags`; all of them without
-- @tparam[opt] string device default: `halo.device()`
function M.live(tag, device)
  return tonumber(C.halo_memory_live_bytes(number_of(device), M.tag_number(tag)))
end

--- Most bytes handed out at once so far, or since `memory.reset_peak`.
function M.peak(tag, device)
  return tonumber(C.halo_memory_peak_bytes(number_of(device), M.tag_number(tag)))
end

--- Start a new peak at what is live now.
function M.reset_peak(device) C.halo_memory_reset_peak(number_of(device)) end

--- Number of a tag; -1 (all) for nil.
function M.tag_number(tag)
  if tag == nil then return -1 end
  for i, name in ipairs(M.tags) do
    if name == tag then return i - 1 end
  end
  error(("memory has no tag %q%s"):format(tag, require("halo.args").did_you_mean(tag, M.tags)), 3)
end

local function untag(ok, ...)
  C.halo_memory_pop_tag()
  if not ok then error((...), 0) end
  return ...
end

--- Run `fn(...)` with new allocations counted under a tag.
-- @usage memory.with_tag("weights", function() model = build() end)
function M.with_tag(tag, fn, ...)
  C.halo_memory_push_tag(M.tag_number(tag))
  return untag(pcall(fn, ...))
end

local function mib(bytes) return ("%.1f"):format(bytes / 1048576) end

--- One line per device in use: live and peak MiB by tag.
function M.report()
  local lines = {}
  for _, device in ipairs { "cpu", "cuda" } do
    if M.peak(nil, device) > 0 then
      local parts = {}
      for _, tag in ipairs(M.tags) do
        if M.peak(tag, device) > 0 then
          parts[#parts + 1] = ("%s %s (peak %s)"):format(tag, mib(M.live(tag, device)), mib(M.peak(tag, device)))
        end
      end
      lines[#lines + 1] = ("memory on %s, MiB: %s; all %s (peak %s)"):format(device,
        table.concat(parts, ", "), mib(M.live(nil, device)), mib(M.peak(nil, device)))
    end
  end
  return #lines > 0 and table.concat(lines, "\n") or "no memory in use"
end

-- ---- pacing -------------------------------------------------------------------------------------

local least_budget = 64 * 2 ^ 20 -- do not hurry below this growth
local floor = 0 -- live bytes of all devices when the collector was last stepped, or less

--- Called for every new tensor: step the collector in proportion to the growth of live bytes, one
-- full cycle per doubling.
function M.pace()
  local live = tonumber(C.halo_memory_live_bytes(C.HALO_CPU, -1) + C.halo_memory_live_bytes(C.HALO_CUDA, -1))
  if live < floor then floor = live end
  local budget = math.max(least_budget, floor)
  local grown = live - floor
  if grown < budget / 16 then return end
  collectgarbage("step", math.ceil(collectgarbage "count" * grown / budget))
  floor = live
end

-- ---- scopes -------------------------------------------------------------------------------------

-- Stack of open scopes. A scope holds its tensors weakly: what the program drops meanwhile may go
-- before the scope ends.
local scopes = {}
local weak = { __mode = "v" }

--- Called for every new tensor.
function M.register(t)
  local scope = scopes[#scopes]
  if scope then
    scope.n = scope.n + 1
    scope.tensors[scope.n] = t
  end
end

--- Was this tensor made in the innermost scope?
function M.is_local(t)
  local scope = scopes[#scopes]
  for i = scope and scope.n or 0, 1, -1 do
    if rawequal(scope.tensors[i], t) then return true end
  end
  return false
end

--- Let a tensor outlive all open scopes; it goes when the program drops it.
-- @return the tensor
function M.keep(t)
  for _, scope in ipairs(scopes) do scope.kept[t] = true end
  return t
end

-- Mark the tensors in a result: itself, or in tables at any depth.
local function mark(value, is_tensor, marked, seen)
  if is_tensor(value) then
    marked[value] = true
  elseif type(value) == "table" and not seen[value] then
    seen[value] = true
    for k, v in pairs(value) do
      mark(k, is_tensor, marked, seen)
      mark(v, is_tensor, marked, seen)
    end
  end
end

-- Close the innermost scope: free what is neither marked nor kept; what is marked belongs to the scope
-- around it.
local function close(marked)
  local scope = table.remove(scopes)
  local free = require("halo.tensor").free
  for i = 1, scope.n do
    local t = scope.tensors[i]
    if t ~= nil and not scope.kept[t] then
      if marked[t] then
        M.register(t)
      else
        free(t)
      end
    end
  end
end

local function finish(ok, ...)
  local marked, seen = {}, {}
  if ok then
    local is_tensor = require("halo.tensor").is_tensor
    for i = 1, select("#", ...) do mark(select(i, ...), is_tensor, marked, seen) end
  end
  close(marked)
  if not ok then error((...), 0) end
  return ...
end

--- Run `fn(...)` and free every tensor made inside it, on error too. What `fn` returns survives, also
-- inside returned tables, and belongs to the scope around; `memory.keep(t)` saves any other.
-- Do not yield from inside.
-- @return what `fn` returns
-- @usage local loss = halo.scope(function() return model:loss(batch):item() end)
function M.scope(fn, ...)
  scopes[#scopes + 1] = { n = 0, tensors = setmetatable({}, weak), kept = {} }
  return finish(pcall(fn, ...))
end

--- Number of open scopes.
function M.depth() return #scopes end

return M
