--- What Tab offers at the prompt.
-- Names in scope, fields of nested tables and objects (through `__index`, at any depth; nothing is
-- called), fields and methods of recipe objects, file names inside quotes, and help words after `?`.
local args = require "halo.args"
local ffi = require "ffi"
local fs = require "halo.fs"
local schema = require "halo.schema"
local term = require "halo.term"

local M = {}

local keywords = { "and", "break", "do", "else", "elseif", "end", "false", "for", "function", "if", "in", "local",
  "nil", "not", "or", "repeat", "return", "then", "true", "until", "while" }

-- C types cannot be asked for their fields: the module that makes a metatype knows them.
local owners = { ["ctype<struct halo_tensor *>"] = "halo.tensor" }

local function add_names(set, t)
  for name in pairs(t) do
    if type(name) == "string" and name:match "^[%a_][%w_]*$" then set[name] = true end
  end
end

-- Names that `value.` or `value:` may be followed by.
local function fields_of(value)
  local set = {}
  if schema.is_node(value) then
    local t = schema.type_of(value)
    for _, name in ipairs(t.names) do set[name] = true end
    add_names(set, t.methods or {})
    return set
  end
  if type(value) == "cdata" then
    local owner = owners[tostring(ffi.typeof(value))]
    for _, name in ipairs(owner and require(owner).names() or {}) do set[name] = true end
    return set
  end
  for _ = 1, 8 do -- a chain of __index longer than this is a circle
    if type(value) == "table" then add_names(set, value) end
    local mt = getmetatable(value)
    local index = type(mt) == "table" and rawget(mt, "__index")
    if type(mt) == "table" and rawget(mt, "__names") then
      for _, name in ipairs(mt.__names(value)) do set[name] = true end
    end
    if type(index) ~= "table" then break end
    value = index
  end
  for name in pairs(set) do
    if name:sub(1, 2) == "__" then set[name] = nil end
  end
  return set
end

-- Value of a chain such as `R.model.rope`, or nil.
local function value_of(chain, env)
  local value
  for name in chain:gmatch "[^.:]+" do
    local ok, next_value = pcall(function()
      if value == nil then return env[name] end
      local key = tonumber(name) or name
      return value[key]
    end)
    if not ok or next_value == nil then return nil end
    value = next_value
  end
  return value
end

local function file_candidates(prefix)
  local folder, start = prefix:match "^(.*/)([^/]*)$"
  if not folder then folder, start = "", prefix end
  local out = {}
  for _, name in ipairs(fs.list(folder == "" and "." or folder) or {}) do
    if name:sub(1, #start) == start and (start ~= "" or name:sub(1, 1) ~= ".") then
      out[#out + 1] = fs.is_dir(folder .. name) and name .. "/" or name
    end
  end
  return start, out
end

-- The string that the line ends inside of, or nil.
local function open_string(line)
  local quote, from
  local i = 1
  while i <= #line do
    local c = line:sub(i, i)
    if quote then
      if c == "\\" then i = i + 1 elseif c == quote then quote = nil end
    elseif c == '"' or c == "'" then
      quote, from = c, i + 1
    elseif c == "-" and line:sub(i, i + 1) == "--" then
      return nil
    end
    i = i + 1
  end
  return quote and line:sub(from) or nil
end

--- Candidates for the end of a line.
-- @tparam string line text up to the cursor
-- @tparam table env names in scope
-- @treturn string the part of the line that the candidates complete
-- @treturn table candidates, sorted
function M.candidates(line, env)
  local topic = line:match "^%s*%?%s*(.*)$"
  local set, start = {}, topic
  if topic then
    for _, word in ipairs(require("halo.help").words()) do set[word] = true end
  else
    local text = open_string(line) or line:match "^%s*%$.-(%S*)$"
    if text then
      local files
      start, files = file_candidates(text)
      return start, files
    end
    local chain, name = line:match "([%a_][%w_.:]*)[.:]([%w_]*)$"
    if chain then
      start = name
      local value = value_of(chain, env)
      if value ~= nil then set = fields_of(value) end
    else
      start = line:match "([%a_][%w_]*)$" or ""
      set = fields_of(env)
      for _, word in ipairs(keywords) do set[word] = true end
    end
  end
  local out = {}
  for _, word in ipairs(args.keys(set)) do
    if word:sub(1, #start) == start then out[#out + 1] = word end
  end
  return start, out
end

local function common_prefix(words)
  local prefix = words[1] or ""
  for _, word in ipairs(words) do
    while word:sub(1, #prefix) ~= prefix do prefix = prefix:sub(1, -2) end
  end
  return prefix
end

local function in_columns(words)
  local widest = 0
  for _, word in ipairs(words) do widest = math.max(widest, #word) end
  local per_line = math.max(1, math.floor(term.width(1) / (widest + 2)))
  local lines = {}
  for i = 1, #words, per_line do
    local cells = {}
    for j = i, math.min(#words, i + per_line - 1) do cells[#cells + 1] = term.pad(words[j], widest) end
    lines[#lines + 1] = (table.concat(cells, "  "):gsub("%s+$", ""))
  end
  return table.concat(lines, "\n")
end

--- What the line editor wants: text to insert at the cursor, and a list to show when that is not enough.
function M.complete(line, env)
  local start, words = M.candidates(line, env)
  if #words == 0 then return "" end
  local insert = common_prefix(words):sub(#start + 1)
  if insert ~= "" or #words == 1 then return insert end
  if #words > 100 then
    return "", ("%d names; type more of the word"):format(#words)
  end
  return "", in_columns(words)
end

return M
