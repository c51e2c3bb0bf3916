--- Values as people want to see them at the prompt.
-- Short values on one line, tables as a tree of limited depth and length, objects as they describe
-- themselves (`__tostring`). Data is never dumped: what is long is counted.
local schema = require "halo.schema"
local term = require "halo.term"

local M = {}

local MAX_ENTRIES, MAX_DEPTH, MAX_STRING, MAX_TEXT = 24, 3, 200, 10000

local function is_word(s) return type(s) == "string" and s:match "^[%a_][%w_]*$" ~= nil end

local function number(v)
  local text = ("%.14g"):format(v)
  -- 0.1 + 0.2 is 0.3 to a reader; a number that needs more digits shows them.
  return text
end

local function string_text(s)
  if #s > MAX_STRING then
    return ("%q"):format(s:sub(1, MAX_STRING)):gsub("\\\n", "\\n") .. (" ... (%d bytes)"):format(#s)
  end
  return (("%q"):format(s):gsub("\\\n", "\\n"))
end

local function function_text(f)
  local info = debug.getinfo(f, "S")
  if info.what == "C" then return "function (built in)" end
  return ("function (%s:%d)"):format(info.short_src:gsub("^.*/lua/halo/", "lua/halo/"), info.linedefined)
end

local function describes_itself(v)
  local mt = getmetatable(v)
  return type(mt) == "table" and mt.__tostring ~= nil
end

-- Keys: the sequence first, then numbers, then words in order.
local function sorted_keys(t)
  local keys, n = {}, #t
  for key in pairs(t) do
    if not (type(key) == "number" and key >= 1 and key <= n and key % 1 == 0) then keys[#keys + 1] = key end
  end
  table.sort(keys, function(a, b)
    if type(a) == type(b) and (type(a) == "number" or type(a) == "string") then return a < b end
    return type(a) < type(b)
  end)
  return keys, n
end

local render

local function key_text(key)
  if is_word(key) then return key end
  return "[" .. (type(key) == "string" and string_text(key) or tostring(key)) .. "]"
end

local function render_table(t, depth, seen, width)
  if seen[t] then return "{ itself }" end
  local keys, n = sorted_keys(t)
  if n == 0 and #keys == 0 then return "{}" end
  if depth >= MAX_DEPTH then return ("{ %d entries }"):format(n + #keys) end
  seen[t] = true
  local parts, is_short = {}, true
  for i = 1, math.min(n, MAX_ENTRIES) do parts[#parts + 1] = render(t[i], depth + 1, seen, width) end
  if n > MAX_ENTRIES then parts[#parts + 1] = ("... %d more"):format(n - MAX_ENTRIES) end
  for i = 1, math.min(#keys, MAX_ENTRIES) do
    parts[#parts + 1] = key_text(keys[i]) .. " = " .. render(t[keys[i]], depth + 1, seen, width)
  end
  if #keys > MAX_ENTRIES then parts[#parts + 1] = ("... %d more"):format(#keys - MAX_ENTRIES) end
  seen[t] = nil
  for _, part in ipairs(parts) do is_short = is_short and not part:find "\n" end
  local line = "{ " .. table.concat(parts, ", ") .. " }"
  if is_short and #line <= width - 2 * depth then return line end
  local indent = ("  "):rep(depth + 1)
  return "{\n" .. indent .. table.concat(parts, ",\n" .. indent) .. "\n" .. ("  "):rep(depth) .. "}"
end

function render(v, depth, seen, width)
  local kind = type(v)
  if kind == "string" then return string_text(v) end
  if kind == "number" then return number(v) end
  if kind == "function" then return function_text(v) end
  if kind == "table" and not describes_itself(v) then return render_table(v, depth, seen, width) end
  return tostring(v)
end

-- A recipe node with one field per line, nested nodes on their own line: as a recipe is written.
local function node_lines(node)
  local t, values = schema.type_of(node), schema.values_of(node)
  local lines = {}
  for _, name in ipairs(t.names) do
    if values[name] ~= nil then
      local text = schema.show(values[name])
      if #text > 100 then text = text:sub(1, 97) .. "..." end
      lines[#lines + 1] = ("  %s = %s"):format(name, text)
    end
  end
  return t.path .. " {\n" .. table.concat(lines, "\n") .. "\n}"
end

--- Text of a value for the prompt.
-- @tparam any v
-- @tparam[opt] int width columns at hand
-- @treturn string one or more lines
function M.value(v, width)
  width = width or term.width(1)
  if schema.is_node(v) then
    local text = schema.show(v)
    return #text <= width and text or node_lines(v)
  end
  -- Text of several lines is meant to be read, not to be quoted.
  if type(v) == "string" and v:find "\n" and #v <= MAX_TEXT then return (v:gsub("\n$", "")) end
  return render(v, 0, {}, width)
end

return M
