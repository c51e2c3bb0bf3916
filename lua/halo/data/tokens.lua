--- Tokens: a sequence of documents of token ids, memory-mapped.
-- `tokens.open(path)` opens Halo's token files and llm.c's `.bin`; `split`, `slice` and `select` make
-- choices that share the file. Token positions and document numbers count from 0, as in the files.
local args = require "halo.args"
local errors = require "halo.errors"
local ffi = require "ffi"
local fs = require "halo.fs"
local halo_ffi = require "halo.ffi"

local C = halo_ffi.C

local M = {}

local Tokens = {}
Tokens.__index = Tokens

local function wrap(handle, path)
  return setmetatable({
    handle = ffi.gc(handle, C.halo_tokens_free),
    path = path,
    --- Number of tokens.
    count = tonumber(C.halo_tokens_count(handle)),
    --- Number of documents.
    documents = tonumber(C.halo_tokens_documents(handle)),
    --- Size of the vocabulary; 0 when the file does not say (llm.c).
    vocab = tonumber(C.halo_tokens_vocab(handle)),
  }, Tokens)
end

--- Several sequences one after the other.
-- @tparam {Tokens,...} parts of one tokenizer
function M.join(parts)
  local handles = ffi.new("halo_tokens *[?]", math.max(#parts, 1))
  for i, part in ipairs(parts) do handles[i - 1] = part.handle end
  local out = ffi.new "halo_tokens *[1]"
  halo_ffi.call(C.halo_tokens_join, out, handles, #parts)
  return wrap(out[0], #parts > 0 and parts[1].path or nil)
end

-- Token files of a folder, in byte order of their names.
local function shards(folder, o)
  local parts = {}
  for _, name in ipairs(fs.list(folder) or {}) do
    if name:find "%.tokens$" or name:find "%.bin$" then
      local part = M.open(fs.join(folder, name), o)
      local first = parts[1] or part
      if part.vocab ~= first.vocab
        or C.halo_tokens_tokenizer_hash(part.handle) ~= C.halo_tokens_tokenizer_hash(first.handle) then
        errors.raise("data", ("data.tokens: %s and %s were made with different tokenizers"):format(first.path,
          part.path), 0)
      end
      parts[#parts + 1] = part
    end
  end
  if #parts == 0 then
    errors.raise("data", ("data.tokens: no .tokens or .bin file in %s"):format(folder), 0)
  end
  return M.join(parts)
end

--- Open a token file, or a folder of them (shards, joined in the order of their names).
-- @tparam string path
-- @tparam[opt] table o
-- @tparam[opt=-1] int o.separator for llm.c's `.bin`: the id every document begins with; -1: one document
-- @tparam[opt=true] boolean o.verify read the whole file and compare its checksum
-- @raise class data: malformed, other version, unreadable
-- @usage local t = data.tokens "pg19.tokens"; print(t.count, t.documents)
function M.open(path, o)
  o = args.named("data.tokens", o or {}, { separator = { "int", -1 }, verify = { "boolean", true } })
  if fs.is_dir(path) then return shards(path, o) end
  local out = ffi.new "halo_tokens *[1]"
  halo_ffi.call(C.halo_tokens_open, out, path, o.separator, o.verify and 1 or 0)
  return wrap(out[0], path)
end

--- True for what `open` and its methods return.
function M.is(v) return getmetatable(v) == Tokens end

--- Refuse unless the tokens were made by this tokenizer (or, for llm.c files, could have been).
function Tokens:check_tokenizer(tok)
  local made_by = C.halo_tokens_tokenizer_hash(self.handle)
  if made_by ~= 0 and made_by ~= tok:hash64() then
    errors.raise("data", ("%s was made with another tokenizer (hash %s, this one has %s)"):format(
      tostring(self.path), bit.tohex(made_by, 16), tok:hash()), 0)
  end
  if self.vocab > tok.vocab_size then
    errors.raise("data", ("%s has ids below %d, the tokenizer has %d"):format(tostring(self.path),
      self.vocab, tok.vocab_size), 0)
  end
end

--- Ids from a position on; past the end they are `pad`.
-- @treturn cdata `int32_t[n]`
function Tokens:read(first, n, pad)
  local ids = ffi.new("int32_t[?]", math.max(n, 1))
  halo_ffi.call(C.halo_tokens_read, ids, nil, self.handle, first, n, pad or 0)
  return ids
end

--- First token and length of a document.
function Tokens:document(d)
  local first, n = ffi.new "int64_t[1]", ffi.new "int64_t[1]"
  halo_ffi.call(C.halo_tokens_document, self.handle, d, first, n)
  return tonumber(first[0]), tonumber(n[0])
end

--- Number of the document that holds a token, or nil.
function Tokens:find_document(token)
  local d = tonumber(C.halo_tokens_find_document(self.handle, token))
  return d >= 0 and d or nil
end

--- Hash of a document's ids as 16 hexadecimal digits; equal documents have equal ones.
function Tokens:document_hash(d)
  local h = ffi.new "uint64_t[1]"
  halo_ffi.call(C.halo_tokens_document_hash, self.handle, d, h)
  return (bit.tohex(h[0], 16))
end

--- Fingerprint of the content as 16 hexadecimal digits.
function Tokens:hash() return (bit.tohex(C.halo_tokens_hash(self.handle), 16)) end

--- The documents of a list, in its order.
function Tokens:select(list)
  local numbers = ffi.new("int64_t[?]", math.max(#list, 1))
  for i, d in ipairs(list) do numbers[i - 1] = d end
  local out = ffi.new "halo_tokens *[1]"
  halo_ffi.call(C.halo_tokens_select, out, self.handle, numbers, #list)
  return wrap(out[0], self.path)
end

--- n tokens from a position on; documents are cut at the ends.
function Tokens:slice(first, n)
  local out = ffi.new "halo_tokens *[1]"
  halo_ffi.call(C.halo_tokens_slice, out, self.handle, first, n)
  return wrap(out[0], self.path)
end

--- Hold out documents by their hash; equal documents stay together.
-- @tparam table o
-- @tparam number o.share of documents held out, between 0 and 1
-- @tparam[opt=1] int o.seed
-- @treturn Tokens training documents
-- @treturn Tokens held-out documents
function Tokens:split(o)
  o = args.named("tokens.split", o, { share = "number", seed = { "int", 1 } })
  local train, valid = ffi.new "halo_tokens *[1]", ffi.new "halo_tokens *[1]"
  halo_ffi.call(C.halo_tokens_split, train, valid, self.handle, o.share, o.seed)
  return wrap(train[0], self.path), wrap(valid[0], self.path)
end

--- How many documents repeat an earlier one. Reads everything.
function Tokens:duplicates()
  local seen, n = {}, 0
  for d = 0, self.documents - 1 do
    local h = self:document_hash(d)
    if seen[h] then n = n + 1 end
    seen[h] = true
  end
  return n
end

function Tokens:__tostring()
  return ("%d tokens in %d documents"):format(self.count, self.documents)
end

return M
