--- Named arguments, checked: the one place that says "did you mean".
-- Functions with more than two arguments take one table with named fields. A wrong name is the most
-- common mistake in such a table and Lua would ignore it, so `args.named` refuses it, with the nearest
-- right name, at the line of the caller.
--
--    function M.vertical_slash(o)
--      o = args.named("sparsity.vertical_slash", o, {
--        q = "cdata", k = "cdata",                 -- required
--        budget = { "number", 0.05 },              -- with a default
--        probe = { "int", 64 },
--        documents = "table?",                     -- optional
--      })
local errors = require "halo.errors"

local M = {}

--- Edit distance with transpositions of neighbours (optimal string alignment); case counts half.
function M.distance(a, b)
  local la, lb = #a, #b
  local before, last = {}, {}
  for j = 0, lb do last[j] = j end
  for i = 1, la do
    local row = { [0] = i }
    local ca = a:sub(i, i)
    for j = 1, lb do
      local cb = b:sub(j, j)
      local cost = ca == cb and 0 or (ca:lower() == cb:lower() and 0.5 or 1)
      local best = math.min(last[j] + 1, row[j - 1] + 1, last[j - 1] + cost)
      if i > 1 and j > 1 and ca == b:sub(j - 1, j - 1) and a:sub(i - 1, i - 1) == cb then
        best = math.min(best, before[j - 2] + 1)
      end
      row[j] = best
    end
    before, last = last, row
  end
  return last[lb]
end

--- The nearest of `names` to `name`, or nil when none is near (more than a third of it wrong) and none
-- starts with it or is its start.
function M.nearest(name, names)
  name = tostring(name)
  local best, best_distance
  for _, candidate in ipairs(names) do
    candidate = tostring(candidate)
    local d = M.distance(name, candidate)
    local is_prefix = #name >= 3 and candidate:sub(1, #name):lower() == name:lower()
      or #candidate >= 3 and name:sub(1, #candidate):lower() == candidate:lower()
    if is_prefix then d = math.min(d, 1.5) end
    if d <= math.max(1, math.floor(#name / 3)) + (is_prefix and 1 or 0) and d < math.max(#name, #candidate) / 2 + 0.3
      and (not best or d < best_distance) then
      best, best_distance = candidate, d
    end
  end
  return best
end

--- ` (did you mean "x"?)`, or, when nothing is near, the names there are; "" for an empty list.
function M.did_you_mean(name, names)
  local near = M.nearest(name, names)
  if near then return (' (did you mean "%s"?)'):format(near) end
  if #names == 0 or #names > 24 then return "" end
  return " (there is: " .. table.concat(names, ", ") .. ")"
end

--- Sorted keys of a table, as text.
function M.keys(t)
  local names = {}
  for name in pairs(t) do names[#names + 1] = tostring(name) end
  table.sort(names)
  return names
end

--- A short word for a value in messages: `"abc"`, `3`, `table`, `boolean true`.
function M.describe(v)
  local kind = type(v)
  if kind == "string" then return ("%q"):format(#v > 40 and v:sub(1, 37) .. "..." or v) end
  if kind == "number" then return ("%.14g"):format(v) end
  if kind == "boolean" or kind == "nil" then return tostring(v) end
  return kind
end

local function is_kind(v, kind)
  if kind == "any" then return true end
  if kind == "int" then return type(v) == "number" and v == math.floor(v) end
  if kind == "callable" then
    local mt = getmetatable(v)
    return type(v) == "function" or (type(mt) == "table" and mt.__call ~= nil)
  end
  return type(v) == kind
end

--- Check a table of named arguments; returns a copy with defaults filled in.
-- @tparam string what name of the function, for messages
-- @tparam table o the arguments
-- @tparam table fields name -> "type" (required), "type?" (optional) or { "type", default }; a type
-- is what `type()` says, or "int", "callable", "any", or several with bars: "string|table"
-- @tparam[opt=1] int level frame to blame above the caller
-- @raise unknown or missing names, wrong types
function M.named(what, o, fields, level)
  level = (level or 1) + 2
  if type(o) ~= "table" then
    errors.raise("usage", ("%s wants a table of named arguments, got %s"):format(what, M.describe(o)), level)
  end
  local out = {}
  for name, value in pairs(o) do
    local field = fields[name]
    if field == nil then
      errors.raise("usage", ('%s has no argument "%s"%s'):format(what, tostring(name),
        M.did_you_mean(name, M.keys(fields))), level)
    end
    local kinds = (type(field) == "table" and field[1] or field):gsub("%?$", "")
    local fits = false
    for kind in kinds:gmatch "[^|]+" do fits = fits or is_kind(value, kind) end
    if not fits then
      errors.raise("usage", ("%s: %s must be %s, got %s"):format(what, name, kinds:gsub("|", " or "),
        M.describe(value)), level)
    end
    out[name] = value
  end
  for name, field in pairs(fields) do
    if out[name] == nil then
      if type(field) == "table" then
        out[name] = field[2]
      elseif field:sub(-1) ~= "?" then
        errors.raise("usage", ("%s: %s is missing"):format(what, name), level)
      end
    end
  end
  return out
end

return M
