--- JSON with the corners filed off: lua-cjson reads, this file writes.
-- What cjson alone would get wrong here:
--   * `[]` comes back as an empty table that is written as `{}`; here it decodes to a marked array and
--     `json.array {}` marks one by hand
--   * NaN and infinities raise; here they are written as null (a diverged loss must still be logged)
--   * integers beyond 2^53 lose digits; 64-bit cdata integers are written in full, as a string when
--     a reader that uses doubles would round them
--   * keys come in hash order; here they are sorted, so equal values give equal text
--   * null decodes to a truthy userdata; here a null member of an object is absent (`nil`), and stays
--     `json.null` only inside arrays, or everywhere with `{ keep_null = true }`
local cjson = require "cjson"
local errors = require "halo.errors"
local ffi = require "ffi"

local M = { null = cjson.null }

local array_mt = { __halo_json = "array" }

--- Mark a table as an array, so that `{}` is written as `[]`. Returns the table.
function M.array(t) return setmetatable(t or {}, array_mt) end

--- True for tables that are written as arrays: marked ones and non-empty sequences.
function M.is_array(t)
  if getmetatable(t) == array_mt then return true end
  local n = #t
  if n == 0 then return false end
  local count = 0
  for _ in pairs(t) do count = count + 1 end
  return count == n
end

local escapes = { ['"'] = '\\"', ["\\"] = "\\\\", ["\b"] = "\\b", ["\f"] = "\\f", ["\n"] = "\\n",
  ["\r"] = "\\r", ["\t"] = "\\t" }

-- Shapes of valid UTF-8 sequences by first byte: byte count, and the range of the second byte (RFC 3629).
local function sequence(byte)
  if byte < 0xc2 then return nil end
  if byte < 0xe0 then return 2, 0x80, 0xbf end
  if byte < 0xf0 then return 3, byte == 0xe0 and 0xa0 or 0x80, byte == 0xed and 0x9f or 0xbf end
  if byte < 0xf5 then return 4, byte == 0xf0 and 0x90 or 0x80, byte == 0xf4 and 0x8f or 0xbf end
end

-- JSON is text: bytes that are no UTF-8 (a byte-level model may say anything) become U+FFFD.
local function valid_text(s)
  if not s:find "[\128-\255]" then return s end
  local out, i, n = {}, 1, #s
  while i <= n do
    local byte = s:byte(i)
    local length, low, high = 1, nil, nil
    if byte >= 0x80 then length, low, high = sequence(byte) end
    local good = length ~= nil and i + length - 1 <= n
    for k = 1, good and length - 1 or 0 do
      local b = s:byte(i + k)
      good = good and b >= (k == 1 and low or 0x80) and b <= (k == 1 and high or 0xbf)
    end
    out[#out + 1] = good and s:sub(i, i + length - 1) or "\239\191\189"
    i = i + (good and length or 1)
  end
  return table.concat(out)
end

local function quote(s)
  s = valid_text(s)
  return '"' .. s:gsub('[%z\1-\31"\\\127]', function(c)
    return escapes[c] or ("\\u%04x"):format(c:byte())
  end) .. '"'
end

-- Shortest text that reads back as the same double.
local function number(v)
  if v ~= v or v == math.huge or v == -math.huge then return "null" end
  if v == math.floor(v) and math.abs(v) < 2 ^ 53 then return ("%d"):format(v) end
  for digits = 15, 16 do
    local text = ("%." .. digits .. "g"):format(v)
    if tonumber(text) == v then return text end
  end
  return ("%.17g"):format(v)
end

local function integer64(v)
  local text = tostring(v):gsub("U?LL$", "")
  local as_double = tonumber(v)
  if math.abs(as_double) <= 2 ^ 53 then return text end
  return '"' .. text .. '"'
end

local write

local function write_array(out, t, indent, step, path)
  if #t == 0 then
    out[#out + 1] = "[]"
    return
  end
  -- Arrays of plain values stay on one line even when pretty: shapes and schedules read better.
  local is_flat = true
  for i = 1, #t do is_flat = is_flat and type(t[i]) ~= "table" end
  local inner = step and not is_flat and indent .. step
  out[#out + 1] = "["
  for i = 1, #t do
    if i > 1 then out[#out + 1] = (step and is_flat) and ", " or "," end
    if inner then out[#out + 1] = "\n" .. inner end
    write(out, t[i], inner or indent, step, path)
  end
  if inner then out[#out + 1] = "\n" .. indent end
  out[#out + 1] = "]"
end

local function write_object(out, t, indent, step, path)
  local keys, text_of = {}, {}
  for k in pairs(t) do
    if type(k) ~= "string" and type(k) ~= "number" then
      errors.raise("internal", ("json.encode: a key of %s is a %s"):format(path, type(k)), 0)
    end
    local text = type(k) == "number" and number(k) or k
    keys[#keys + 1], text_of[k] = k, text
  end
  table.sort(keys, function(a, b)
    if type(a) == "number" and type(b) == "number" then return a < b end
    return text_of[a] < text_of[b]
  end)
  if #keys == 0 then
    out[#out + 1] = "{}"
    return
  end
  local inner = step and indent .. step
  out[#out + 1] = "{"
  for i, k in ipairs(keys) do
    if i > 1 then out[#out + 1] = "," end
    if inner then out[#out + 1] = "\n" .. inner end
    out[#out + 1] = quote(text_of[k]) .. (step and ": " or ":")
    write(out, t[k], inner or indent, step, path .. "." .. text_of[k])
  end
  if inner then out[#out + 1] = "\n" .. indent end
  out[#out + 1] = "}"
end

function write(out, v, indent, step, path)
  local kind = type(v)
  if kind == "table" then
    if #path > 4000 then errors.raise("internal", "json.encode: the value contains itself", 0) end
    if M.is_array(v) then
      write_array(out, v, indent, step, path .. "[]")
    else
      write_object(out, v, indent, step, path)
    end
  elseif kind == "string" then
    out[#out + 1] = quote(v)
  elseif kind == "number" then
    out[#out + 1] = number(v)
  elseif kind == "boolean" then
    out[#out + 1] = tostring(v)
  elseif v == nil or v == M.null then
    out[#out + 1] = "null"
  elseif kind == "cdata" and (ffi.istype("int64_t", v) or ffi.istype("uint64_t", v)) then
    out[#out + 1] = integer64(v)
  else
    errors.raise("internal", ("json.encode: %s is a %s"):format(path, kind), 0)
  end
end

--- Text of a value, keys sorted.
-- @param value nil, boolean, number, string, 64-bit cdata integer, or tables of them
-- @tparam[opt] table o `pretty = true` indents by two spaces
function M.encode(value, o)
  local out = {}
  write(out, value, "", o and o.pretty and "  " or nil, "value")
  return table.concat(out)
end

-- cjson cannot say whether `{}` was `[]`: put a word that no file contains into empty arrays first.
local empty_mark = "\239\191\191halo-empty-array"

local function mark_empty_arrays(text)
  if not text:find "%[%s*%]" then return text, false end
  local out, from, at, found = {}, 1, 1, false
  while true do
    local next_at = text:find('["[]', at)
    if not next_at then break end
    if text:byte(next_at) == 34 then -- skip a string
      local stop = next_at + 1
      while true do
        stop = text:find('["\\]', stop)
        if not stop then return text, false end -- unterminated: let cjson say so
        if text:byte(stop) == 34 then break end
        stop = stop + 2
      end
      at = stop + 1
    else
      local close = text:match("^%[%s*()%]", next_at)
      if close then
        out[#out + 1] = text:sub(from, next_at) .. '"' .. empty_mark .. '"'
        from, found = close, true
      end
      at = next_at + 1
    end
  end
  out[#out + 1] = text:sub(from)
  return table.concat(out), found
end

local function tidy(v, keep_null)
  local n = #v
  if n > 0 then
    if n == 1 and v[1] == empty_mark then return M.array {} end
    for i = 1, n do
      if type(v[i]) == "table" then v[i] = tidy(v[i], keep_null) end
    end
    return v
  end
  for k, item in pairs(v) do
    if type(item) == "table" then
      v[k] = tidy(item, keep_null)
    elseif item == M.null and not keep_null then
      v[k] = nil
    end
  end
  return v
end

local decoder = cjson.new()
decoder.decode_max_depth(200)

--- Value of a text.
-- @tparam string text one JSON value
-- @tparam[opt] table o `keep_null = true` keeps null members as `json.null`; `what` names the source in
-- the error
-- @raise class `data` when the text is not JSON
function M.decode(text, o)
  o = o or {}
  local ok, value = pcall(decoder.decode, (mark_empty_arrays(text)))
  if not ok then
    errors.raise("data", ("%s is not valid JSON: %s"):format(o.what or "the text",
      tostring(value):gsub("^.-: ", "")), 0)
  end
  if type(value) == "table" then return tidy(value, o.keep_null) end
  if value == M.null and not o.keep_null then return nil end
  return value
end

--- Decode a file. @raise class `data` when it cannot be read or is not JSON
function M.read(path, o)
  local text, why = require("halo.fs").read(path)
  if not text then errors.raise("data", why, 0) end
  o = o or {}
  return M.decode(text, { keep_null = o.keep_null, what = path })
end

--- Encode into a file, pretty, atomically.
function M.write(path, value)
  require("halo.fs").write(path, M.encode(value, { pretty = true }) .. "\n")
end

return M
