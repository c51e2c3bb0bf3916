--- Tokenizers: text to ids and back.
-- `tokenizer.load(folder)` reads what Hugging Face folders hold (GPT-2, Qwen2/2.5/3, Llama 3 families;
-- `tokenizer/files.lua` knows the formats), `tokenizer.byte {}` makes the one that needs no file: a
-- token per byte and a few special ones. All of the work is in the engine (core/tokenizer.c).
--
--    local tok = tokenizer.load "models/Qwen2.5-3B"
--    local ids = tok:encode "Hello world"        --> { 9707, 1879 }
--    tok:decode(ids)                             --> "Hello world"
--    tok:special "<|endoftext|>"                 --> 151643
--
-- Special tokens in a text are recognised only with `{ special = true }`. The default is what training
-- data needs: a document that quotes "<|endoftext|>" must not end itself.
-- `decode(encode(x)) == x` for every string, except that a model whose tokenizer.json asks for NFC (Qwen)
-- gets valid UTF-8 in NFC; a string with any invalid byte is never normalised.
local args = require "halo.args"
local errors = require "halo.errors"
local ffi = require "ffi"
local files = require "halo.tokenizer.files"
local fs = require "halo.fs"
local halo_ffi = require "halo.ffi"

local C, check = halo_ffi.C, halo_ffi.check

local M = {}

local Tokenizer = {}
Tokenizer.__index = Tokenizer

local splits = {
  none = C.HALO_SPLIT_NONE,
  gpt2 = C.HALO_SPLIT_GPT2,
  qwen2 = C.HALO_SPLIT_QWEN2,
  llama3 = C.HALO_SPLIT_LLAMA3,
}

local function count(t)
  local n = 0
  for _ in pairs(t) do n = n + 1 end
  return n
end

-- An id as the engine takes it. What a file gives may be any number.
local function id_of(id, text)
  if type(id) ~= "number" or id ~= math.floor(id) or id < 0 or id >= 2 ^ 31 then
    errors.raise("data", ("tokenizer: id of %q is %s, want a whole number from 0"):format(text, tostring(id)), 0)
  end
  return id
end

local function add_tokens(handle, spec)
  for text, id in pairs(spec.vocab) do
    if not (spec.added[text] and spec.added[text] == id) then
      check(C.halo_tokenizer_add(handle, id_of(id, text), text, #text, spec.text_flags), 0)
    end
  end
  for text, id in pairs(spec.added) do
    check(C.halo_tokenizer_add(handle, id_of(id, text), text, #text, C.HALO_TOKEN_SPECIAL), 0)
  end
end

local function add_merges(handle, spec)
  for i, merge in ipairs(spec.merges) do
    local left, right
    if type(merge) == "table" then
      left, right = merge[1], merge[2]
    else
      left, right = tostring(merge):match "^([^ ]+) ([^ ]+)$"
    end
    if type(left) ~= "string" or type(right) ~= "string" then
      errors.raise("data", ("tokenizer: merge %d is not a pair of tokens"):format(i - 1), 0)
    end
    check(C.halo_tokenizer_add_merge(handle, left, #left, right, #right, spec.text_flags), 0)
  end
end

-- spec: what files.lua read. See there for its fields.
local function build(spec)
  local n = count(spec.vocab)
  for text in pairs(spec.added) do
    if spec.vocab[text] == nil then n = n + 1 end
  end
  local flags = (spec.nfc and C.HALO_TOKENIZER_NFC or 0)
    + (spec.whole_pieces and C.HALO_TOKENIZER_WHOLE_PIECES or 0)
    + (spec.merges and 0 or C.HALO_TOKENIZER_RANKS)
  if n == 0 then errors.raise("data", "tokenizer: the vocabulary is empty", 0) end
  local out = ffi.new "halo_tokenizer *[1]"
  halo_ffi.call(C.halo_tokenizer_new, out, n, splits[spec.split], flags)
  local handle = ffi.gc(out[0], C.halo_tokenizer_free)
  add_tokens(handle, spec)
  if spec.merges then add_merges(handle, spec) end
  check(C.halo_tokenizer_finish(handle), 0)

  local self = setmetatable({
    handle = handle,
    --- Name of the family: "byte", "gpt2", "qwen2", "llama3".
    kind = spec.kind,
    --- Number of ids, special ones included; ids are 0 to vocab_size-1.
    vocab_size = tonumber(C.halo_tokenizer_vocab(handle)),
    --- Whether the model's own library puts `bos` before every text. Halo never does it unasked.
    adds_bos = spec.adds_bos or false,
    --- Whether valid UTF-8 is normalised before encoding.
    nfc = spec.nfc or false,
    files = spec.files,
    added = spec.added,
  }, Tokenizer)
  for _, role in ipairs { "bos", "eos", "pad" } do
    local text = spec[role]
    if text then
      local id = C.halo_tokenizer_find(handle, text, #text)
      if id < 0 then
        errors.raise("data", ("tokenizer: %s token %q is not in the vocabulary"):format(role, text), 0)
      end
      self[role] = id
    end
  end
  --- The id that ends a document in pre-training: `<|endoftext|>` or `<|end_of_text|>` where they exist
  -- (an instruction-tuned model's `eos` ends a turn), else `eos`.
  for _, text in ipairs { "<|endoftext|>", "<|end_of_text|>" } do
    if not self.document_end and spec.added[text] then self.document_end = spec.added[text] end
  end
  self.document_end = self.document_end or self.eos
  return self
end

--- Load a tokenizer from a folder.
-- Looks for `tokenizer.json`, then `vocab.json` with `merges.txt`, then `tokenizer.model` (tiktoken's
-- text form, Llama 3). `tokenizer_config.json` names special tokens and the family.
-- @tparam string dir the folder, or one of these files in it
-- @tparam[opt] table o
-- @tparam[opt] string o.kind "gpt2", "qwen2" or "llama3": overrides the family where the files do not
-- name it
-- @tparam[opt] boolean o.nfc normalise text, or not, whatever the files say
-- @treturn Tokenizer
-- @raise class data for a malformed file, environment for a kind of tokenizer Halo does not have
-- @usage local tok = tokenizer.load "models/Qwen2.5-3B"
function M.load(dir, o)
  o = args.named("tokenizer.load", o or {}, { kind = "string?", nfc = "boolean?" })
  if o.kind and not (splits[o.kind] and o.kind ~= "none") then
    errors.raise("usage", ('tokenizer.load: no kind "%s"%s'):format(o.kind,
      args.did_you_mean(o.kind, { "gpt2", "qwen2", "llama3" })), 2)
  end
  if fs.is_file(dir) then dir = fs.dirname(dir) end
  if not fs.is_dir(dir) then
    errors.raise("data", ("tokenizer.load: there is no folder %s"):format(tostring(dir)), 2)
  end
  local ok, result = pcall(function()
    local spec = files.read(dir, o.kind)
    if o.nfc ~= nil then spec.nfc = o.nfc end
    return build(spec)
  end)
  if ok then return result end
  local e = errors.wrap(result)
  error(errors.new { class = e.class, code = e.code, name = e.name,
    message = ("%s: %s"):format(dir, e.message) }, 0)
end

--- The tokenizer that needs no file: id = byte, then special tokens from 256 on.
-- @tparam[opt] table o
-- @tparam[opt] table o.special texts of the special tokens; default `<|bos|>`, `<|eos|>`, `<|pad|>`
-- @usage local tok = tokenizer.byte {}
function M.byte(o)
  o = args.named("tokenizer.byte", o or {}, { special = { "table", { "<|bos|>", "<|eos|>", "<|pad|>" } } })
  return build(files.byte(o.special))
end

--- True for what `load` and `byte` return.
function M.is(v) return getmetatable(v) == Tokenizer end

local encode_options = { special = { "boolean", false } }

--- Ids of a text in memory of the engine.
-- @tparam string text any bytes
-- @tparam[opt] table o `special = true` recognises special tokens written in the text
-- @treturn cdata `int32_t *`, freed when collected
-- @treturn int how many
function Tokenizer:encode_buffer(text, o)
  local special = o and args.named("tokenizer.encode", o, encode_options).special
  local ids, n = ffi.new "int32_t *[1]", ffi.new "int64_t[1]"
  halo_ffi.call(C.halo_tokenizer_encode, ids, n, self.handle, text, #text, special and 1 or 0)
  return ffi.gc(ids[0], C.halo_buffer_free), tonumber(n[0])
end

--- Ids of a text as a Lua array.
-- @usage tok:encode("Hello", { special = false })
function Tokenizer:encode(text, o)
  local ids, n = self:encode_buffer(text, o)
  local out = {}
  for i = 1, n do out[i] = ids[i - 1] end
  return out
end

--- Ids of a text as an i32 tensor `[1,N]`, what a model takes.
function Tokenizer:encode_tensor(text, o)
  local ids, n = self:encode_buffer(text, o)
  return require("halo.tensor").from_pointer(ids, { shape = { 1, n }, dtype = "i32" })
end

--- Number of ids of a text.
function Tokenizer:count(text, o)
  local _, n = self:encode_buffer(text, o)
  return n
end

--- Text of ids.
-- @tparam table|cdata ids a Lua array, or `int32_t *` memory with its length
-- @tparam[opt] int n how many of them (needed for memory)
-- @treturn string bytes; not necessarily whole characters when ids were cut out of a longer text
function Tokenizer:decode(ids, n)
  local memory = ids
  if type(ids) == "table" then
    n = n or #ids
    memory = ffi.new("int32_t[?]", math.max(n, 1))
    for i = 1, n do memory[i - 1] = id_of(ids[i], "decode") end
  elseif type(ids) ~= "cdata" or type(n) ~= "number" then
    errors.raise("usage", "tokenizer.decode: want an array of ids, or int32_t memory and its length", 2)
  end
  local text, bytes = ffi.new "char *[1]", ffi.new "size_t[1]"
  halo_ffi.call(C.halo_tokenizer_decode, text, bytes, self.handle, memory, n)
  local result = ffi.string(text[0], bytes[0])
  C.halo_buffer_free(text[0])
  return result
end

--- Id of a special token. @raise if there is none, with the nearest
function Tokenizer:special(text)
  local id = self.added[text]
  if id == nil then
    errors.raise("usage", ("tokenizer: no special token %q%s"):format(text,
      args.did_you_mean(text, args.keys(self.added))), 2)
  end
  return id
end

--- Bytes of one token, and whether it is special; nil for an id outside the vocabulary.
function Tokenizer:token(id)
  local n, is_special = ffi.new "size_t[1]", ffi.new "int32_t[1]"
  local text = C.halo_tokenizer_token(self.handle, id, n, is_special)
  if text == nil then return nil end
  return ffi.string(text, n[0]), is_special[0] ~= 0
end

--- Id of the token with exactly these bytes, or nil.
function Tokenizer:id(bytes)
  local id = C.halo_tokenizer_find(self.handle, bytes, #bytes)
  return id >= 0 and id or nil
end

--- Fingerprint of everything that decides ids, 64 bits as cdata.
function Tokenizer:hash64() return C.halo_tokenizer_hash(self.handle) end

--- The same as 16 hexadecimal digits: for file names and manifests.
function Tokenizer:hash() return (bit.tohex(self:hash64(), 16)) end

--- Write the tokenizer's files into a folder: those it was loaded from, byte for byte, or for a byte
-- tokenizer a `tokenizer.json` that Hugging Face's library reads too.
function Tokenizer:save(dir)
  fs.mkdir(dir)
  for _, name in ipairs(args.keys(self.files)) do fs.write(fs.join(dir, name), self.files[name]) end
end

function Tokenizer:__tostring()
  return ("tokenizer %s: %d tokens, %d of them special, hash %s"):format(self.kind, self.vocab_size,
    count(self.added), self:hash())
end

return M
