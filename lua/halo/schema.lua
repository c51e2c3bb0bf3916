--- One description per recipe word; constructor, check, default, help and override all come from it.
--
-- A *type* is what a recipe constructs: `stage { ... }`, `yarn { to = 512*K }`, `mass(0.9)`. It is
-- defined once, by a table of fields with kinds, and this file derives the rest:
--
--    schema.define {
--      name = "stage", group = "stage", doc = "A stretch of training with one context length.",
--      fields = {
--        { "context", kind.tokens, required = true, doc = "length of a sequence" },
--        { "batch", kind.count, default = 1, doc = "sequences per step" },
--      },
--    }
--
-- A *group* is what a field asks for: the field `rope` takes any type of the group "rope". A group with
-- one type may be written as a plain table (`mesh = { cp = 8 }`).
--
-- A *node* is an instance: a small object that knows its type and the line it was written on, refuses
-- unknown fields and wrong kinds with the nearest right name, can be called with a table to fill more
-- fields (`model.hf "dir" { rope = ... }`), copied, merged and overridden. Constructing does no work
-- and touches no device. `schema.resolve` turns a node into a plain table with defaults filled in,
-- which is what the rest of Halo reads and what is saved as JSON.
--
-- Modules that bring their own words (a sparsity pattern, an evaluation) hand over `fields` as a
-- function of `kind`, so they need not require this file.
local args = require "halo.args"
local errors = require "halo.errors"
local json = require "halo.json"

local M = {}

local types = {} -- name -> type
local groups = {} -- name -> { name, types = { names in order }, coerce, assign }
-- Node -> { type, values, file, line }; weak, so that nodes are ordinary garbage.
local records = setmetatable({}, { __mode = "k" })

---- Where the user wrote it ----------------------------------------------------------------------

-- Chunk names ("@recipes/x.lua") of recipe files and prompt lines: errors blame the innermost frame
-- that runs one of these.
local user_sources = {}

--- Tell that a chunk was written by the user.
-- @tparam string chunkname as given to `loadstring`
-- @tparam string text its source, to find the line of a field inside a multi-line table
function M.register_source(chunkname, text) user_sources[chunkname] = text end

--- File and line of the innermost user frame, or of the first frame outside this module.
function M.caller()
  local outside
  for level = 2, 40 do
    local info = debug.getinfo(level, "Sl")
    if not info then break end
    if info.currentline > 0 then
      if user_sources[info.source] then
        return { source = info.source, file = info.short_src, line = info.currentline }
      end
      if not outside and not info.source:match "/halo/schema%.lua$" then
        outside = { source = info.source, file = info.short_src, line = info.currentline }
      end
    end
  end
  return outside
end

-- Default of a field as a recipe would have written it, or nil.
local function default_of(field, place)
  local value = field.default
  if type(value) == "function" then return value() end
  if type(value) == "table" then return assert(field.kind.check(value, place)) end
  return value
end

-- The line at or below `place` where `word` is assigned, so that an error inside a long constructor
-- points at the field and not at the opening brace.
local function line_of(place, word)
  local text = place and user_sources[place.source]
  if not text or not word then return place and place.line end
  local number = 0
  local pattern = "%f[%w_]" .. tostring(word):gsub("%W", "%%%0") .. "%s*%]?%s*="
  for line in (text .. "\n"):gmatch "(.-)\n" do
    number = number + 1
    if number >= place.line and number <= place.line + 200 and line:gsub("%-%-.*", ""):find(pattern) then
      return number
    end
  end
  return place.line
end

--- Raise a recipe error.
-- @tparam table|nil place what `M.caller` returned, or a node
-- @tparam string message one line
-- @tparam[opt] string word field whose line is meant
function M.complain(place, message, word)
  if records[place] then place = records[place].place end
  local where = place and ("%s:%d:"):format(place.file, line_of(place, word)) or nil
  error(errors.new { class = "usage", message = message, where = where }, 0)
end

---- Kinds -----------------------------------------------------------------------------------------

-- A kind: `name` for help, `check(value, place) -> value | nil, message`, and `parse(text, evaluate)`
-- for the command line, where `evaluate` runs a text as a recipe expression.
local kind = {}
M.kind = kind

local suffixes = { K = 1024, M = 1e6, B = 1e9 }

local function parse_number(text, evaluate)
  local digits, unit = text:match "^%s*([%d.eE+-]+)%s*([KMB]?)%s*$"
  local n = digits and tonumber(digits)
  if n then return n * (suffixes[unit] or 1) end
  return evaluate(text)
end

local function number_kind(name, test, wanted)
  return {
    name = name,
    check = function(v)
      if type(v) == "number" and v == v and test(v) then return v end
      return nil, ("must be %s, got %s"):format(wanted, args.describe(v))
    end,
    parse = parse_number,
  }
end

--- A number between `min` and `max` (inclusive), or strictly `above` and `below` limits.
function kind.range(o)
  local words = {}
  if o.min then words[#words + 1] = ("at least %g"):format(o.min) end
  if o.above then words[#words + 1] = ("above %g"):format(o.above) end
  if o.max then words[#words + 1] = ("at most %g"):format(o.max) end
  if o.below then words[#words + 1] = ("below %g"):format(o.below) end
  local noun = o.int and "an integer" or "a number"
  local wanted = #words > 0 and noun .. " " .. table.concat(words, " and ") or noun
  return number_kind(wanted, function(v)
    return not (o.int and v ~= math.floor(v)) and not (o.min and v < o.min) and not (o.max and v > o.max)
      and not (o.above and v <= o.above) and not (o.below and v >= o.below) and math.abs(v) < math.huge
  end, wanted)
end

kind.number = kind.range {}
kind.positive = kind.range { above = 0 }
kind.share = kind.range { min = 0, max = 1 } -- a part of one
kind.int = kind.range { int = true }
kind.count = kind.range { int = true, min = 1 } -- how many, at least one
kind.index = kind.range { int = true, min = 0 } -- how many or which, zero allowed
kind.tokens = number_kind("tokens", function(v) return v >= 1 and v == math.floor(v) and v < 2 ^ 53 end,
  "a whole number of tokens, at least 1")

kind.bool = {
  name = "true or false",
  check = function(v)
    if type(v) == "boolean" then return v end
    return nil, "must be true or false, got " .. args.describe(v)
  end,
  parse = function(text)
    if text == "true" then return true end
    if text == "false" then return false end
    return text
  end,
}

kind.text = {
  name = "text",
  check = function(v)
    if type(v) == "string" then return v end
    return nil, "must be text in quotes, got " .. args.describe(v)
  end,
  parse = function(text) return text end,
}

--- A file or folder; relative to the folder halo was started in.
kind.path = setmetatable({ name = "path" }, { __index = kind.text })

--- One of some words.
function kind.enum(words)
  return {
    name = '"' .. table.concat(words, '" or "') .. '"',
    words = words,
    check = function(v)
      for _, word in ipairs(words) do
        if v == word then return v end
      end
      return nil, ("must be %s, got %s%s"):format('"' .. table.concat(words, '" or "') .. '"', args.describe(v),
        type(v) == "string" and args.nearest(v, words)
          and (' (did you mean "%s"?)'):format(args.nearest(v, words)) or "")
    end,
    parse = function(text) return text end,
  }
end

--- One of some numbers.
function kind.enum_number(numbers)
  local wanted = "one of " .. table.concat(numbers, ", ")
  return number_kind(wanted, function(v)
    for _, n in ipairs(numbers) do
      if v == n then return true end
    end
    return false
  end, wanted)
end

--- A list of one kind; `length` fixes how many.
function kind.list(of, length)
  return {
    name = "list of " .. of.name,
    of = of,
    check = function(v, place)
      if type(v) ~= "table" or records[v] then return nil, "must be a list { ... }, got " .. args.describe(v) end
      if length and #v ~= length then return nil, ("must have %d entries, got %d"):format(length, #v) end
      local out = json.array {}
      for key in pairs(v) do
        if type(key) ~= "number" or key < 1 or key > #v or key ~= math.floor(key) then
          return nil, ('must be a list { ... }, but has the named entry "%s"'):format(tostring(key))
        end
      end
      for i = 1, #v do
        local item, why = of.check(v[i], place)
        if item == nil then return nil, ("entry %d %s"):format(i, why) end
        out[i] = item
      end
      return out
    end,
    parse = function(text, evaluate)
      if text:find "^%s*{" then return evaluate(text) end
      local out = {} -- "1,2,3" is enough on a command line
      for part in text:gmatch "[^,]+" do out[#out + 1] = of.parse(part, evaluate) end
      return out
    end,
  }
end

--- A table from keys of one kind to values of another: `{ [100] = save {} }`, `{ books = 30 }`.
function kind.map(key_kind, of)
  return {
    name = "table of " .. of.name .. " by " .. key_kind.name,
    key = key_kind,
    of = of,
    check = function(v, place)
      if type(v) ~= "table" or records[v] then return nil, "must be a table, got " .. args.describe(v) end
      local out = {}
      for key, value in pairs(v) do
        local k, why = key_kind.check(key, place)
        if k == nil then return nil, ("key %s"):format(why) end
        local item
        item, why = of.check(value, place)
        if item == nil then return nil, ("[%s] %s"):format(tostring(key), why) end
        out[k] = item
      end
      return out
    end,
    parse = function(text, evaluate) return evaluate(text) end,
  }
end

--- The first of several kinds that fits.
function kind.either(...)
  local kinds, names = { ... }, {}
  for i, k in ipairs(kinds) do names[i] = k.name end
  return {
    name = table.concat(names, ", or "),
    kinds = kinds,
    check = function(v, place)
      local reasons = {}
      for i, k in ipairs(kinds) do
        local item, why = k.check(v, place)
        if item ~= nil then return item end
        reasons[i] = why:gsub("^must be ", ""):gsub(", got .*", "")
      end
      return nil, ("must be %s, got %s"):format(table.concat(reasons, ", or "), args.describe(v))
    end,
    parse = function(text, evaluate)
      for _, k in ipairs(kinds) do
        local ok, v = pcall(k.parse, text, evaluate)
        if ok and v ~= nil and k.check(v) ~= nil then return v end
      end
      return text
    end,
  }
end

--- A Lua function written in the recipe; kept with its source text and hash.
kind.lua_function = {
  name = "function(run)",
  check = function(v)
    if type(v) == "function" then return v end
    return nil, "must be a function, got " .. args.describe(v)
  end,
  parse = function() return nil end,
}

local function group_of(name)
  groups[name] = groups[name] or { name = name, types = {} }
  return groups[name]
end

local function choices(group)
  local words = {}
  for i, name in ipairs(group.types) do words[i] = M.signature(types[name]) end
  return table.concat(words, ", ")
end

--- A node of a group.
function kind.node(group_name)
  local group = group_of(group_name)
  return {
    name = group_name,
    group = group,
    check = function(v, place)
      if records[v] then
        if records[v].type.group == group_name then return v end
        return nil, ("must be one of %s, got %s"):format(choices(group), M.signature(records[v].type))
      end
      if group.coerce then
        local node = group.coerce(v, place)
        if node ~= nil then return node end
      end
      if type(v) == "table" and #group.types == 1 then return M.construct(group.types[1], v, place) end
      return nil, ("must be %s%s, got %s"):format(#group.types == 1 and "" or "one of ", choices(group),
        args.describe(v))
    end,
    parse = function(text, evaluate) return evaluate(text) end,
  }
end

-- What is inside such a table is checked when it is laid over its node.
local inside_changes = {
  changes = true,
  check = function(v) return v end,
  parse = function(text, evaluate)
    if text == "true" or text == "false" then return text == "true" end
    if text:find "^%a[%w_-]*$" then return text end -- a word: "zigzag"
    return parse_number(text, evaluate)
  end,
}
inside_changes.inside = inside_changes

--- A node of a group, or a plain table with some of its fields, to be laid over a node chosen
-- elsewhere: a stage's `attention = { keep = mass(0.95) }`.
function kind.changes(group_name)
  local node = kind.node(group_name)
  return {
    name = node.name .. ", or { some of its fields }",
    group = node.group,
    changes = true,
    inside = inside_changes,
    check = function(v, place)
      if type(v) == "table" and not records[v] then return v end
      return node.check(v, place)
    end,
    parse = node.parse,
  }
end

---- Types -----------------------------------------------------------------------------------------

local Node = {}

--- Define a type.
-- @tparam table t `name` (type in the resolved table), `group`, `path` (how a recipe spells it;
-- default: the name), `doc`, `fields` (list of { name, kind, default=, required=, doc=, alias=,
-- excludes= (a field that a change of this one clears), shown_default= }),
-- `positional` (field that `X "value"` or `X(3)` sets), `methods` (chained calls), `check(values,
-- complain)` (rules between fields, on resolved values; returns nothing), `derive(values)` (fills
-- derived values in), `example`
function M.define(t)
  t.path = t.path or t.name
  t.by_name, t.names = {}, {}
  for i, field in ipairs(t.fields) do
    field.name, field.kind = field[1], field[2]
    assert(field.kind, "schema: " .. t.name .. "." .. field.name .. " has no kind")
    t.by_name[field.name] = field
    t.names[i] = field.name
    if field.alias then t.by_name[field.alias] = field end
  end
  assert(not t.positional or t.by_name[t.positional], "schema: " .. t.name .. " has no positional field")
  local group = group_of(t.group)
  if not types[t.path] then group.types[#group.types + 1] = t.path end
  types[t.path] = t
  return t
end

--- Values that are not nodes but may stand for one: `coerce(group, function(value, place) -> node|nil)`.
function M.coerce(group, f) group_of(group).coerce = f end

--- What `path=text` on the command line does when the field holds a node: `assign(group,
-- function(current, text, evaluate) -> node|nil)`; nil falls back to evaluating the text.
function M.assign(group, f) group_of(group).assign = f end

function M.type(path) return types[path] end
function M.types() return types end
function M.groups() return groups end

--- `stage { }`, `mass(share)`, `model.hf "from" { }`: how a type is written.
function M.signature(t)
  if not t.positional then return t.path .. " { }" end
  local k = t.by_name[t.positional].kind
  local word = (k == kind.text or k == kind.path) and (' "%s"'):format(t.positional) or "(" .. t.positional .. ")"
  return t.path .. word .. (#t.fields > 1 and " { }" or "")
end

local function set_field(record, name, value, place)
  local field = record.type.by_name[name]
  if not field then
    M.complain(place, ('%s has no field "%s"%s'):format(record.type.path, tostring(name),
      args.did_you_mean(name, record.type.names)), name)
  end
  if value == nil then
    record.values[field.name] = nil
    return
  end
  local item, why = field.kind.check(value, place)
  if item == nil then
    M.complain(place, ("%s: %s %s"):format(record.type.path, field.name, why), name)
  end
  record.values[field.name] = item
end

local function fill(node, t, place)
  local record = records[node]
  for key, value in pairs(t) do
    if type(key) == "number" then
      M.complain(place, ("%s has only named fields, got an unnamed %s (fields: %s)"):format(record.type.path,
        args.describe(value), table.concat(record.type.names, ", ")))
    end
    set_field(record, key, value, place)
  end
  return node
end

--- Make a node. `value` is a table of fields, or the positional value.
function M.construct(path, value, place)
  local t = types[path]
  place = place or M.caller()
  local node = setmetatable({}, Node)
  records[node] = { type = t, values = {}, place = place }
  if type(value) == "table" and not records[value]
    and not (t.positional and #value > 0 and t.by_name[t.positional].kind.of) then
    return fill(node, value, place)
  end
  if value == nil then return node end
  if not t.positional then
    M.complain(place, ("%s wants a table { ... }, got %s"):format(t.path, args.describe(value)))
  end
  set_field(records[node], t.positional, value, place)
  return node
end

--- The function a recipe calls. A second argument fills fields: `warmup(1e-5, { steps = 20 })`.
function M.constructor(path)
  return function(value, more)
    local place = M.caller()
    local node = M.construct(path, value, place)
    if more ~= nil then
      if type(more) ~= "table" then
        M.complain(place, ("%s wants a table { ... } last, got %s"):format(path, args.describe(more)))
      end
      fill(node, more, place)
    end
    return node
  end
end

---- Nodes -----------------------------------------------------------------------------------------

function M.is_node(v) return type(v) == "table" and records[v] ~= nil end
--- Type of a node: the table given to `define`.
function M.type_of(node) return records[node].type end
function M.place_of(node) return records[node].place end
--- Values a recipe set, by field name (no defaults). Read only.
function M.values_of(node) return records[node].values end

Node.__index = function(node, name)
  local record = records[node]
  local field = record.type.by_name[name]
  if field then
    local value = record.values[field.name]
    if value == nil then
      value = default_of(field, record.place)
      -- Tables are kept, so that `R.attention.ring.layout = "zigzag"` changes R.
      if type(value) == "table" then record.values[field.name] = value end
    end
    return value
  end
  local method = record.type.methods and record.type.methods[name]
  if method then return method end
  M.complain(M.caller(), ('%s has no field "%s"%s'):format(record.type.path, tostring(name),
    args.did_you_mean(name, record.type.names)))
end

Node.__newindex = function(node, name, value) set_field(records[node], name, value, M.caller()) end

-- `return recipe "name" { ... }` is a tail call, which leaves no frame to ask for a line: the place of
-- the name stands for the table.
Node.__call = function(node, more)
  local place = records[node].place
  if type(more) ~= "table" or records[more] then
    M.complain(place, ("%s wants a table { ... }, got %s"):format(records[node].type.path, args.describe(more)))
  end
  return fill(node, more, place)
end

local function show(v, depth)
  if M.is_node(v) then
    local record = records[v]
    local t, parts = record.type, {}
    local set = 0
    for _ in pairs(record.values) do set = set + 1 end
    if t.positional and set == 1 and record.values[t.positional] ~= nil and #t.fields <= 2 then
      return t.path .. "(" .. show(record.values[t.positional], depth) .. ")"
    end
    if depth > 3 then return t.path .. " { ... }" end
    for _, name in ipairs(t.names) do
      if record.values[name] ~= nil then parts[#parts + 1] = name .. " = " .. show(record.values[name], depth + 1) end
    end
    return t.path .. (#parts > 0 and " { " .. table.concat(parts, ", ") .. " }" or " {}")
  end
  if type(v) == "string" then return ("%q"):format(v) end
  if type(v) == "function" then return "function" end
  if type(v) ~= "table" then return args.describe(v) end
  local parts = {}
  if #v > 0 then
    for i, item in ipairs(v) do parts[i] = show(item, depth + 1) end
  else
    local keys = {}
    for key in pairs(v) do keys[#keys + 1] = key end
    table.sort(keys, function(a, b)
      if type(a) == type(b) then return a < b end
      return type(a) == "number"
    end)
    for i, key in ipairs(keys) do
      parts[i] = (type(key) == "number" and "[%s] = " or "%s = "):format(tostring(key)) .. show(v[key], depth + 1)
    end
  end
  return #parts > 0 and "{ " .. table.concat(parts, ", ") .. " }" or "{}"
end

--- Recipe text of a value, on one line.
function M.show(v) return show(v, 0) end
Node.__tostring = M.show

--- A deep copy: nodes, lists and maps are new, other values shared.
function M.copy(v)
  if type(v) ~= "table" then return v end
  local record = records[v]
  if record then
    local node = setmetatable({}, Node)
    records[node] = { type = record.type, values = M.copy(record.values), place = record.place }
    return node
  end
  local out = setmetatable({}, getmetatable(v)) -- json.array's mark
  for key, item in pairs(v) do out[key] = M.copy(item) end
  return out
end

--- Lay a plain table over a node: fields (and entries of maps) that hold a node and get a plain table are
-- merged in turn, maps are merged by key, lists and everything else replaced. Changes and returns the node.
function M.merge(node, changes, place)
  local record = records[node]
  place = place or M.caller()
  for key, value in pairs(changes) do
    local field = record.type.by_name[key]
    local is_plain = type(value) == "table" and not records[value]
    local current = field and record.values[field.name]
    if field and field.excludes then record.values[field.excludes] = nil end
    if is_plain and current == nil and field and field.kind.group and type(field.default) == "function" then
      current = default_of(field, place)
      record.values[field.name] = current
    end
    if is_plain and M.is_node(current) then
      M.merge(current, value, place)
    elseif is_plain and type(current) == "table" and field.kind.key then
      local merged = M.copy(current)
      for k, v in pairs(value) do
        local is_change = type(v) == "table" and not records[v]
        if is_change and M.is_node(merged[k]) then
          M.merge(merged[k], v, place)
        elseif is_change and field.kind.of.group and merged[k] == nil then
          M.complain(place, ('%s has no "%s"%s'):format(key, tostring(k), args.did_you_mean(k, args.keys(current))), k)
        else
          merged[k] = v
        end
      end
      set_field(record, key, merged, place)
    else
      set_field(record, key, value, place)
    end
  end
  return node
end

---- Resolving -------------------------------------------------------------------------------------

local resolve_value

--- Plain table of a node: `type` when its group has several, every field with its default.
-- @raise when a required field is missing or the type's own check complains
function M.resolve(node, functions)
  local record = records[node]
  local t, out = record.type, {}
  if #groups[t.group].types > 1 then out.type = t.name end
  for _, field in ipairs(t.fields) do
    local value = record.values[field.name]
    if value == nil then value = default_of(field, record.place) end
    if value == nil and field.required then
      M.complain(record.place, ("%s needs %s (%s)"):format(t.path, field.name, field.doc or field.kind.name))
    end
    out[field.name] = resolve_value(value, functions)
  end
  if t.check then
    t.check(out, function(message, word) M.complain(record.place, t.path .. ": " .. message, word) end)
  end
  if t.derive then t.derive(out) end
  return out
end

function resolve_value(v, functions)
  if type(v) == "function" then return functions and functions(v) or v end
  if type(v) ~= "table" then return v end
  if records[v] then return M.resolve(v, functions) end
  local out = setmetatable({}, getmetatable(v))
  for key, item in pairs(v) do out[key] = resolve_value(item, functions) end
  return out
end
M.resolve_value = resolve_value

---- Overrides -------------------------------------------------------------------------------------

-- One step of a path through nodes, lists and maps. Returns the field's kind and value there.
local function descend(container, container_kind, word, whole)
  local function no(names, what)
    error(errors.new { class = "usage", message = ('%s: %s has no "%s"%s'):format(whole, what, word,
      args.did_you_mean(word, names)) }, 0)
  end
  if M.is_node(container) then
    local record = records[container]
    local field = record.type.by_name[word]
    if not field then no(record.type.names, record.type.path) end
    local value = record.values[field.name]
    if value == nil then value = default_of(field, record.place) end
    return field.kind, value, field.name
  end
  local index = tonumber(word)
  if container_kind and container_kind.changes then
    local key = index or word
    return container_kind.inside, container[key], key
  end
  if container_kind and container_kind.key then
    local key = index or word
    if container[key] == nil then no(args.keys(container), "it") end
    return container_kind.of, container[key], key
  end
  if type(container) == "table" and #container > 0 then
    if not index or not container[index] then
      error(errors.new { class = "usage", message = ('%s: there is no entry "%s", the list has %d (counted from 1)')
        :format(whole, word, #container) }, 0)
    end
    local of = container_kind
    while of and not of.of and of.kinds do -- kind.either: the one that is a list
      local found
      for _, k in ipairs(of.kinds) do found = found or (k.of and k) end
      of = found
    end
    return of and of.of, container[index], index
  end
  error(errors.new { class = "usage", message = ('%s: nothing to set inside %s'):format(whole,
    container == nil and "an empty field" or args.describe(container)) }, 0)
end

--- Set one value by path.
-- @param root the recipe node; changed in place
-- @tparam string path "stages.2.tokens"
-- @tparam string text the value as typed; the field's kind says how to read it
-- @tparam function evaluate runs a text as a recipe expression (class usage errors)
function M.override(root, path, text, evaluate)
  local words = {}
  for word in path:gmatch "[^.]+" do words[#words + 1] = word end
  if #words == 0 then error(errors.new { class = "usage", message = "an override needs a name before =" }, 0) end

  -- Rebuild on the way back: lists and maps are checked copies, so a change must be set in its node.
  local function apply(container, container_kind, i, so_far)
    local word = words[i]
    local field_kind, current, key = descend(container, container_kind, word, path)
    so_far = so_far and so_far .. "." .. word or word
    local value
    if i < #words then
      value = current
      if value == nil and field_kind and field_kind.changes then
        value = {}
        container[key] = value
      end
      if value == nil and field_kind and field_kind.group and #field_kind.group.types == 1 then
        value = M.construct(field_kind.group.types[1], {})
      end
      apply(value, field_kind, i + 1, so_far)
    elseif field_kind then
      local group = field_kind.group
      value = group and group.assign and group.assign(current, text, evaluate)
      if value == nil then value = field_kind.parse(text, evaluate) end
    else
      value = parse_number(text, evaluate)
    end
    if M.is_node(container) then
      local item, why = field_kind.check(value, records[container].place)
      if item == nil then
        error(errors.new { class = "usage", message = ("%s=%s: %s %s"):format(path, text, word, why) }, 0)
      end
      local excluded = records[container].type.by_name[key].excludes
      if excluded then records[container].values[excluded] = nil end
      records[container].values[key] = item
    else
      if field_kind then
        local item, why = field_kind.check(value)
        if item == nil then
          error(errors.new { class = "usage", message = ("%s=%s: %s %s"):format(path, text, word, why) }, 0)
        end
        value = item
      end
      container[key] = value
    end
  end
  apply(root, nil, 1)
  return root
end

---- Help ------------------------------------------------------------------------------------------

local function default_text(field)
  if field.required then return "required" end
  if field.shown_default then return field.shown_default end
  if field.default == nil then return "optional" end
  if type(field.default) == "function" then return "default: see above" end
  return "default " .. M.show(field.default)
end

--- Help text for a type ("stage", "model.qwen2") or a group ("rope"), or nil.
function M.help(name)
  local t = types[name]
  if t then
    local lines = { M.signature(t), "  " .. t.doc, "" }
    local width = 0
    for _, field in ipairs(t.fields) do width = math.max(width, #field.name) end
    for _, field in ipairs(t.fields) do
      lines[#lines + 1] = ("  %-" .. width .. "s  %s [%s; %s]"):format(field.name, field.doc or "", field.kind.name,
        default_text(field))
    end
    if t.methods then
      lines[#lines + 1] = ""
      for _, method in ipairs(args.keys(t.methods)) do
        lines[#lines + 1] = "  :" .. method .. (t.method_docs and " " .. t.method_docs[method] or "")
      end
    end
    if t.example then
      lines[#lines + 1] = ""
      lines[#lines + 1] = "  example: " .. t.example
    end
    return table.concat(lines, "\n")
  end
  local group = groups[name]
  if group and #group.types > 0 then
    local lines = { name .. ": one of" }
    for _, path in ipairs(group.types) do
      local doc = types[path].doc
      lines[#lines + 1] = ("  %-34s %s"):format(M.signature(types[path]), doc:match "^(.-)%.%s" or doc)
    end
    return table.concat(lines, "\n")
  end
end

return M
