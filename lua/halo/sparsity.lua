--- Sparsity patterns: who chooses the keys.
-- A pattern is one file in `sparsity/`, or a table given to `register`. It returns a plan and touches
-- neither kernel nor socket; what it chooses trains over every ring.
--
--    return {
--      name = "checker",                       -- recipes say sparse.checker { ... }
--      doc = "Every other block.",
--      fields = function(kind) return { { "stride", kind.count, default = 2, doc = "blocks" } } end,
--      is_static = true,                       -- does not look at q and k: one plan for all layers
--      build = function(o, words)              -- words: the recipe's fields, defaults filled in
--        local distances = {}
--        for d = 0, o.layout:blocks() - 1, words.stride do distances[#distances + 1] = d end
--        return o.new_plan():add_diagonals(distances):force {}:finish()
--      end,
--    }
--
-- `build` gets `o.q`, `o.k` (tensors `[B,T,H,D]`, `[B,T,Hk,D]`; nil for static patterns), `o.layout`,
-- `o.ring`, `o.documents`, `o.scale`, `o.batch`, `o.heads`, `o.layer`, `o.step` (from 1), and
-- `o.new_plan()`: a plan for all that, documents set, ready for `add_*`.
--
-- At the prompt a pattern is a function: `sparsity.vertical_slash { q = q, k = k, ..., keep = 0.9 }`.
local args = require "halo.args"
local errors = require "halo.errors"
local fs = require "halo.fs"
local plan = require "halo.plan"

local M = {}

local here = debug.getinfo(1, "S").source:sub(2):gsub("[^/]*$", "")
local registered = {}
local shipped

local function shipped_names()
  if not shipped then
    shipped = {}
    for _, file in ipairs(fs.list(here .. "sparsity") or {}) do
      local name = file:match "^([%w_]+)%.lua$"
      if name then shipped[name] = true end
    end
  end
  return shipped
end

--- Names of all patterns, sorted.
function M.names()
  local all = {}
  for name in pairs(shipped_names()) do all[name] = true end
  for name in pairs(registered) do all[name] = true end
  return args.keys(all)
end

local function find(name)
  return registered[name] or (shipped_names()[name] and require("halo.sparsity." .. name)) or nil
end

--- The pattern of a name.
-- @raise with the nearest name when there is none
function M.pattern(name, level)
  local p = find(name)
  if not p then
    errors.raise("usage", ("no sparsity pattern %s%s"):format(args.describe(name), args.did_you_mean(tostring(name),
      M.names())), (level or 1) + 1)
  end
  return p
end

--- Add a pattern that is not a file here: from a recipe, a script or the prompt. Recipes know its words
-- from then on.
-- @tparam table p as a file of `sparsity/` returns it
function M.register(p)
  p = args.named("sparsity.register", p, { name = "string", doc = { "string", "" }, fields = { "table|function", {} },
    path = "string?", example = "string?", check = "function?", is_static = { "boolean", false }, build = "function" })
  if find(p.name) then
    errors.raise("usage", ("sparsity.register: there is a pattern %q already"):format(p.name), 2)
  end
  require("halo.vocabulary").load_modules()
  require("halo.vocabulary").pattern(p)
  registered[p.name] = p
  return p
end

--- Whether a pattern never looks at q and k, so that one plan serves all layers.
function M.is_static(name) return M.pattern(name, 2).is_static or false end

local context = { q = "cdata?", k = "cdata?", layout = "table", ring = "table?", documents = "cdata|table?",
  scale = "number?", batch = { "int", 1 }, heads = "int", layer = "int?", step = "int?" }

--- Build the plan of a resolved pattern.
-- @tparam table words what a recipe resolves to: `{ type = "vertical_slash", keep = {...}, ... }`
-- @tparam table o context, see above
-- @treturn Plan finished
function M.build(words, o)
  local p = M.pattern(words.type, 2)
  o = args.named("sparsity.build", o, context)
  if not p.is_static and not (o.q and o.k and o.ring) then
    errors.raise("usage", ("the pattern %s chooses from q and k over a ring; one of them is missing"):format(p.name), 2)
  end
  o.new_plan = function()
    return plan.new { layout = o.layout, heads = o.heads, batch = o.batch, documents = o.documents }
  end
  local made = p.build(o, words)
  if not plan.is(made) or not made.finished then
    errors.raise("usage", ("the pattern %s must return a finished plan, got %s"):format(p.name, args.describe(made)), 2)
  end
  return made
end

-- sparsity.NAME { context and words in one table }
local function by_hand(name)
  return function(o)
    local schema = require "halo.schema"
    require("halo.vocabulary").load_modules()
    if type(o) ~= "table" then
      errors.raise("usage", ("sparsity.%s wants a table of named arguments, got %s"):format(name, args.describe(o)), 2)
    end
    local at, words = {}, {}
    for k, v in pairs(o) do
      local is_context = context[k] ~= nil
      (is_context and at or words)[k] = v
    end
    if at.q then
      local C = require("halo.ffi").C
      at.batch = at.batch or tonumber(C.halo_tensor_size(at.q, 0))
      at.heads = at.heads or tonumber(C.halo_tensor_size(at.q, 2))
    end
    local p = M.pattern(name)
    return M.build(schema.resolve(schema.construct(p.path or "sparse." .. name, words)), at)
  end
end

return setmetatable(M, {
  __index = function(_, name)
    if type(name) ~= "string" or not find(name) then return nil end
    return by_hand(name)
  end,
})
