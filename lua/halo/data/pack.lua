--- Packing: text files, jsonl files and folders of them become one token file.
-- One document per file (text) or per line (jsonl), each ended by the tokenizer's `document_end`. Order
-- is the byte order of paths, so every machine packs the same bytes. Binary files (a zero byte early on)
-- and hidden ones are left out and counted.
local args = require "halo.args"
local cjson = require "cjson"
local errors = require "halo.errors"
local ffi = require "ffi"
local fs = require "halo.fs"
local halo_ffi = require "halo.ffi"
local tokens = require "halo.data.tokens"

local C = halo_ffi.C

local M = {}

local LINE_LIMIT = 256 * 2 ^ 20 -- bytes of one jsonl line: no honest document is longer
local READ_BYTES = 2 ^ 20
local FORMAT_VERSION = 1 -- part of cache keys: raise it when the same input packs to other tokens

local function has_extension(path, extensions)
  if not extensions then return true end
  for _, e in ipairs(extensions) do
    e = "." .. e:gsub("^%.", "")
    if path:sub(-#e):lower() == e:lower() then return true end
  end
  return false
end

-- { { path, name } }: files to read and the names that go into fingerprints.
local function list_files(from, extensions)
  local files = {}
  for _, path in ipairs(type(from) == "table" and from or { from }) do
    if fs.is_dir(path) then
      for full, relative in fs.walk(path) do
        if has_extension(full, extensions) and fs.is_file(full) then files[#files + 1] = { full, relative } end
      end
    elseif fs.is_file(path) then
      files[#files + 1] = { path, fs.basename(path) }
    else
      errors.raise("data", ("data: there is no file or folder %s"):format(tostring(path)), 0)
    end
  end
  return files
end

-- Lines of a file with their numbers, block by block: never more than LINE_LIMIT of one is held.
local function lines_of(path)
  local file = io.open(path, "rb")
  if not file then errors.raise("data", "data: cannot read " .. path, 0) end
  local block, at, number = "", 1, 0
  local parts, size = {}, 0 -- of a line that crosses blocks
  local function add(part)
    parts[#parts + 1], size = part, size + #part
    if size > LINE_LIMIT then
      file:close()
      errors.raise("data", ("%s:%d: a line of more than %d MiB"):format(path, number + 1, LINE_LIMIT / 2 ^ 20), 0)
    end
  end
  local function finish()
    local line = table.concat(parts)
    parts, size, number = {}, 0, number + 1
    return line, number
  end
  return function()
    while block do
      local stop = block:find("\n", at, true)
      if stop then
        add(block:sub(at, stop - 1))
        at = stop + 1
        return finish()
      end
      add(block:sub(at))
      block, at = file:read(READ_BYTES), 1
    end
    if size > 0 then return finish() end
    if io.type(file) == "file" then file:close() end
  end
end

local function add_jsonl(writer, path, o)
  for line, number in lines_of(path) do
    if line:find "%S" then
      local ok, value = pcall(cjson.decode, line)
      local text = ok and type(value) == "table" and value[o.field]
      if type(text) ~= "string" then
        errors.raise("data", ("%s:%d: %s"):format(path, number, not ok and "not valid JSON"
          or ('no text in the member "%s"'):format(o.field)), 0)
      end
      halo_ffi.call(C.halo_token_writer_add_text, writer, o.tokenizer.handle, text, #text, -1, o.last)
    end
  end
end

local pack_fields = { from = "string|table", to = "string", tokenizer = "table",
  format = { "string", "text" }, field = { "string", "text" }, extensions = "table?", log = "callable?" }

local function check_format(what, o)
  if o.format ~= "text" and o.format ~= "jsonl" then
    errors.raise("usage", ('%s: no format "%s"%s'):format(what, o.format,
      args.did_you_mean(o.format, { "text", "jsonl" })), 3)
  end
end

-- Write o.to from a list of files; returns counts.
local function write(files, o)
  o.last = o.tokenizer.document_end or -1
  local out = ffi.new "halo_token_writer *[1]"
  halo_ffi.call(C.halo_token_writer_new, out, o.to, o.tokenizer.vocab_size, o.tokenizer:hash64())
  local writer = ffi.gc(out[0], C.halo_token_writer_free)
  local binary, is_text = 0, ffi.new "int32_t[1]"
  for _, file in ipairs(files) do
    if o.format == "jsonl" then
      add_jsonl(writer, file[1], o)
    else
      halo_ffi.call(C.halo_token_writer_add_file, writer, o.tokenizer.handle, file[1], -1, o.last, is_text)
      if is_text[0] == 0 then binary = binary + 1 end
    end
  end
  local stats = { files = #files - binary, binary = binary,
    documents = tonumber(C.halo_token_writer_documents(writer)),
    tokens = tonumber(C.halo_token_writer_count(writer)) }
  if stats.tokens == 0 then
    errors.raise("data", ("data: no text in %s (%d files, %d of them binary)"):format(
      type(o.from) == "table" and table.concat(o.from, ", ") or o.from, #files, binary), 0)
  end
  halo_ffi.call(C.halo_token_writer_commit, writer)
  if o.log then
    o.log(("packed %d tokens of %d documents from %d files (%d binary files left out)"):format(
      stats.tokens, stats.documents, stats.files, binary))
  end
  return stats
end

--- Pack text into a token file.
-- @tparam table o
-- @tparam string|table o.from a file, a folder (read to the bottom), or a list of them
-- @tparam string o.to the token file; replaced atomically
-- @tparam Tokenizer o.tokenizer
-- @tparam[opt="text"] string o.format "text": a document per file; "jsonl": one per line
-- @tparam[opt="text"] string o.field of jsonl: the member that holds the text
-- @tparam[opt] table o.extensions only files that end so, as `{ "txt", "md" }`
-- @tparam[opt] function o.log called with a line when done
-- @treturn table `tokens`, `documents`, `files`, `binary` (left out)
-- @usage data.pack { from = "books", to = "books.tokens", tokenizer = tok }
function M.pack(o)
  o = args.named("data.pack", o, pack_fields)
  check_format("data.pack", o)
  return write(list_files(o.from, o.extensions), o)
end

-- Everything that decides the tokens: rules, tokenizer, names and contents of files.
local function key_of(files, o)
  local h = ffi.new "uint64_t[1]"
  local key = C.halo_hash_bytes("", 0, FORMAT_VERSION)
  local function mix(text) key = C.halo_hash_bytes(text, #text, key) end
  mix(o.format)
  mix(o.format == "jsonl" and o.field or "")
  mix(o.tokenizer:hash() .. tostring(o.tokenizer.document_end))
  for _, file in ipairs(files) do
    halo_ffi.call(C.halo_hash_file, file[1], h)
    mix(file[2] .. "\0" .. bit.tohex(h[0], 16))
  end
  return (bit.tohex(key, 16))
end

--- Folder of packed text: HALO_CACHE, or halo/ in XDG_CACHE_HOME, or ~/.cache/halo.
function M.cache_dir()
  local explicit = os.getenv "HALO_CACHE"
  if explicit and explicit ~= "" then return explicit end
  local xdg, home = os.getenv "XDG_CACHE_HOME", os.getenv "HOME"
  if xdg and xdg ~= "" then return xdg .. "/halo" end
  if home and home ~= "" then return home .. "/.cache/halo" end
  errors.raise("environment", "data: no place for packed text; set HALO_CACHE to a folder", 0)
end

--- Tokens of text, packed on first use and mapped from the cache after.
-- The cache key is the content of the files and the tokenizer, so an edited file is packed anew and
-- renamed copies are not. Arguments as in `pack`, with `cache` (a folder) for `to`.
-- @treturn Tokens
function M.prepare(o)
  local fields = {}
  for name, field in pairs(pack_fields) do fields[name] = field end
  fields.to, fields.cache = nil, "string?"
  o = args.named("data.prepare", o, fields)
  check_format("data.prepare", o)
  local files = list_files(o.from, o.extensions)
  local folder = o.cache or M.cache_dir()
  o.to = ("%s/%s.tokens"):format(folder, key_of(files, o))
  if not fs.is_file(o.to) then
    fs.mkdir(folder)
    write(files, o)
  end
  return tokens.open(o.to)
end

return M
