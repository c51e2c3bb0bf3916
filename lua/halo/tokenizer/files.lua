--- The file formats of tokenizers, read into one plain description.
-- `read(dir)` returns a table that tokenizer.lua builds from:
--    kind          "byte", "gpt2", "qwen2", "llama3"
--    split         name of the split pattern: "none", "gpt2", "qwen2", "llama3"
--    vocab         text -> id; text_flags says whether texts are in GPT-2's printable alphabet
--    added         special tokens, text -> id (plain text, may also be in vocab under the same id)
--    merges        array of "left right" or { left, right }; nil: ids are ranks (tiktoken)
--    whole_pieces, nfc, adds_bos     booleans
--    bos, eos, pad texts
--    files         name -> content, what `save` writes
--
-- A tokenizer.json is a program in disguise: normalizers, regular expressions, templates. Halo runs none
-- of it. What a known family writes is recognised, literally, and the engine's own form is used;
-- anything else is refused by name rather than approximated.
local errors = require "halo.errors"
local ffi = require "ffi"
local fs = require "halo.fs"
local halo_ffi = require "halo.ffi"
local json = require "halo.json"

local C = halo_ffi.C

local M = {}

local function malformed(...) errors.raise("data", string.format(...), 0) end
local function unsupported(...)
  errors.raise("environment", string.format(...) .. "; Halo reads byte-level BPE of the GPT-2, Qwen2 and"
    .. " Llama 3 families", 0)
end

-- Spellings of the split patterns as published. Several write the same language.
local tail = [[| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+]]
local words = [[(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|]]
local known_patterns = {
  -- openai/gpt-2 src/encoder.py; openai/tiktoken tiktoken_ext/openai_public.py
  [ [['s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+]] ] = "gpt2",
  [ [['(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+]] ] = "gpt2",
  -- Qwen2, Qwen2.5, Qwen3: tokenizer.json
  [words .. [[\p{N}]] .. tail] = "qwen2",
  -- Llama 3: tokenizer.json, meta-llama/llama3 llama/tokenizer.py
  [words .. [[\p{N}{1,3}]] .. tail] = "llama3",
}

local function read_file(dir, name, files)
  local path = fs.join(dir, name)
  if not fs.is_file(path) then return nil end
  local text, why = fs.read(path)
  if not text then errors.raise("data", why, 0) end
  files[name] = text
  return text
end

local function read_json(dir, name, files)
  local text = read_file(dir, name, files)
  if not text then return nil end
  local value = json.decode(text, { what = name })
  if type(value) ~= "table" then malformed("%s is not an object", name) end
  return value
end

-- What a file holds may be of any type; these two say what is wanted of it. nil passes.
local function object(v, what)
  if v ~= nil and type(v) ~= "table" then malformed("%s is a %s, not an object", what, type(v)) end
  return v
end

local function list(v, what)
  object(v, what)
  local n = 0
  for _ in pairs(v or {}) do n = n + 1 end
  if v and n ~= #v then malformed("%s is not a list", what) end
  return v
end

-- text -> id; the ids are checked where they are used.
local function vocabulary(v, what)
  object(v, what)
  for text in pairs(v or {}) do
    if type(text) ~= "string" then malformed("%s is a list, not an object", what) end
  end
  return v
end

-- "text", or { content = "text" } as AddedToken objects are written.
local function token_text(v)
  if type(v) == "table" then v = v.content end
  return type(v) == "string" and v or nil
end

-- Options of an added token that change what it matches; none of the families uses them.
local function check_added(entry, what)
  for _, option in ipairs { "single_word", "lstrip", "rstrip" } do
    if entry[option] then unsupported("%s: the added token %q has %s", what, tostring(entry.content), option) end
  end
end

-- tokenizer_config.json and special_tokens_map.json: roles, family, and for formats without a list of
-- added tokens, that list.
local function read_config(dir, spec)
  local config = read_json(dir, "tokenizer_config.json", spec.files) or {}
  local map = read_json(dir, "special_tokens_map.json", spec.files) or {}
  for _, role in ipairs { "bos", "eos", "pad" } do
    spec[role] = token_text(config[role .. "_token"]) or token_text(map[role .. "_token"])
  end
  if type(config.add_bos_token) == "boolean" then spec.adds_bos = config.add_bos_token end
  local decoder = object(config.added_tokens_decoder, "tokenizer_config.json: added_tokens_decoder")
  if decoder then
    spec.listed = {}
    for id, entry in pairs(decoder) do
      local text = type(entry) == "table" and token_text(entry)
      if not text or not tonumber(id) then malformed "tokenizer_config.json: added_tokens_decoder is malformed" end
      check_added(entry, "tokenizer_config.json")
      spec.listed[text] = tonumber(id)
    end
  end
  return config
end

local classes = { -- tokenizer_class in tokenizer_config.json
  GPT2Tokenizer = "gpt2", GPT2TokenizerFast = "gpt2",
  Qwen2Tokenizer = "qwen2", Qwen2TokenizerFast = "qwen2",
}

---- tokenizer.json ------------------------------------------------------------------------------

local function pattern_of(entry)
  local pattern = type(entry.pattern) == "table" and entry.pattern.Regex
  local isolates = entry.behavior == "Isolated" and not entry.invert
    or entry.behavior == "Removed" and entry.invert == true
  local name = type(pattern) == "string" and known_patterns[pattern]
  if not name or not isolates then
    unsupported("tokenizer.json: its split pattern is not a known one (%s)",
      tostring(pattern):sub(1, 100):gsub("%c", "?"))
  end
  return name
end

local function byte_level(entry, what)
  if type(entry) ~= "table" or entry.type ~= "ByteLevel" then
    unsupported("tokenizer.json: its %s is %s, not ByteLevel", what,
      type(entry) == "table" and tostring(entry.type) or "absent")
  end
  if entry.add_prefix_space and what == "pre_tokenizer" then
    unsupported "tokenizer.json: its pre_tokenizer puts a space before the text"
  end
  return entry
end

local function split_of(pre)
  if type(pre) == "table" and pre.type == "Sequence" then
    local parts = list(pre.pretokenizers, "tokenizer.json: pretokenizers") or {}
    local first = object(parts[1], "tokenizer.json: a pre_tokenizer")
    if #parts ~= 2 or first.type ~= "Split" then
      unsupported "tokenizer.json: its pre_tokenizer is not Split followed by ByteLevel"
    end
    if byte_level(parts[2], "pre_tokenizer").use_regex ~= false then
      unsupported "tokenizer.json: its pre_tokenizer splits twice"
    end
    return pattern_of(first)
  end
  return byte_level(pre, "pre_tokenizer").use_regex == false and "none" or "gpt2"
end

local function wants_nfc(normalizer)
  if object(normalizer, "tokenizer.json: normalizer") == nil then return false end
  local steps = { normalizer }
  if normalizer.type == "Sequence" then steps = list(normalizer.normalizers, "tokenizer.json: normalizers") or {} end
  for _, step in ipairs(steps) do
    if object(step, "tokenizer.json: a normalizer").type ~= "NFC" then
      unsupported("tokenizer.json: its normalizer is %s, not NFC", tostring(step.type))
    end
  end
  return #steps > 0
end

-- Whether the model's own library begins every text with a special token.
local function template_adds_bos(post)
  if object(post, "tokenizer.json: post_processor") == nil then return false end
  local processors = { post }
  if post.type == "Sequence" then processors = list(post.processors, "tokenizer.json: processors") or {} end
  for _, entry in ipairs(processors) do
    object(entry, "tokenizer.json: a post_processor")
    local single = entry.type == "TemplateProcessing" and list(entry.single, "tokenizer.json: single") or {}
    if type(single[1]) == "table" and single[1].SpecialToken then return true end
  end
  return false
end

local function read_tokenizer_json(dir, spec)
  local root = read_json(dir, "tokenizer.json", spec.files)
  local model = root.model
  if type(model) ~= "table" or type(model.vocab) ~= "table" or type(model.merges) ~= "table"
    or (model.type ~= nil and model.type ~= "BPE") then
    unsupported("tokenizer.json: its model is %s, not BPE",
      type(model) == "table" and tostring(model.type) or "absent")
  end
  for option, neutral in pairs { dropout = 0, byte_fallback = false, continuing_subword_prefix = "",
    end_of_word_suffix = "" } do
    local value = model[option]
    if value ~= nil and value ~= neutral then
      unsupported("tokenizer.json: its model has %s = %s", option, tostring(value))
    end
  end
  byte_level(root.decoder, "decoder")
  spec.split = split_of(root.pre_tokenizer)
  spec.nfc = wants_nfc(root.normalizer)
  spec.whole_pieces = model.ignore_merges == true
  spec.vocab, spec.text_flags = vocabulary(model.vocab, "tokenizer.json: vocab"), C.HALO_TOKEN_PRINTABLE
  spec.merges = list(model.merges, "tokenizer.json: merges")
  spec.added = {}
  for _, entry in ipairs(list(root.added_tokens, "tokenizer.json: added_tokens") or {}) do
    local text = type(entry) == "table" and token_text(entry)
    if not text then malformed "tokenizer.json: an added token has no content" end
    check_added(entry, "tokenizer.json")
    if spec.added[text] ~= nil then malformed("tokenizer.json: the added token %q is there twice", text) end
    if entry.id == nil then malformed("tokenizer.json: the added token %q has no id", text) end
    spec.added[text] = entry.id
  end
  local config_says = spec.adds_bos
  if config_says == nil then spec.adds_bos = template_adds_bos(root.post_processor) end
  spec.kind = spec.split == "none" and "byte" or spec.split
end

---- vocab.json and merges.txt --------------------------------------------------------------------

local function read_vocab_and_merges(dir, spec, config, kind)
  spec.vocab = vocabulary(read_json(dir, "vocab.json", spec.files), "vocab.json")
  local merges = read_file(dir, "merges.txt", spec.files)
  if not merges then malformed "vocab.json without merges.txt" end
  spec.added = spec.listed or vocabulary(read_json(dir, "added_tokens.json", spec.files), "added_tokens.json") or {}
  -- The files do not say which pattern they were made with; the class does. Without one, GPT-2's own
  -- release is known by its end-of-text token, which later families keep outside vocab.json.
  kind = kind or classes[config.tokenizer_class]
    or (config.tokenizer_class == nil and spec.vocab["<|endoftext|>"] and "gpt2")
  if kind ~= "gpt2" and kind ~= "qwen2" then
    unsupported("vocab.json: cannot tell its family (tokenizer_class is %s); name it with kind = \"gpt2\""
      .. " or \"qwen2\"", tostring(config.tokenizer_class))
  end
  -- No normalizer is written in these files, so none is applied (a Qwen folder says NFC in its
  -- tokenizer.json); tokenizer.load { nfc = true } asks for it.
  spec.kind, spec.split = kind, kind
  if kind == "gpt2" and spec.vocab["<|endoftext|>"] then
    spec.added["<|endoftext|>"] = spec.vocab["<|endoftext|>"]
    spec.bos, spec.eos = spec.bos or "<|endoftext|>", spec.eos or "<|endoftext|>"
  end
  spec.text_flags = C.HALO_TOKEN_PRINTABLE
  spec.merges = {}
  for line in merges:gmatch "[^\r\n]+" do
    -- Only a first line is a comment: "# #" is a merge.
    if not (#spec.merges == 0 and line:find "^#version") then spec.merges[#spec.merges + 1] = line end
  end
end

---- tokenizer.model (tiktoken) -------------------------------------------------------------------

local digits = {}
for i = 1, 64 do
  digits[("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"):byte(i)] = i - 1
end

--- Bytes of a base64 text, nil if it is none.
local function base64(text)
  local out, n, word = {}, 0, 0
  for i = 1, #text do
    local b = text:byte(i)
    if b == 61 then -- "=": padding ends it
      if not text:find("^=+$", i) then return nil end
      break
    end
    local d = digits[b]
    if not d then return nil end
    word, n = word * 64 + d, n + 1
    if n == 4 then
      out[#out + 1] = string.char(math.floor(word / 65536), math.floor(word / 256) % 256, word % 256)
      word, n = 0, 0
    end
  end
  if n == 1 then return nil end
  if n == 2 then out[#out + 1] = string.char(math.floor(word / 16)) end
  if n == 3 then out[#out + 1] = string.char(math.floor(word / 1024), math.floor(word / 4) % 256) end
  return table.concat(out)
end

-- Names of the 256 ids behind Llama 3's ranks (meta-llama/llama3 llama/tokenizer.py), for a folder
-- without tokenizer_config.json.
local function llama3_special(first)
  local names = { "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
    "reserved_special_token_2", "reserved_special_token_3", "start_header_id", "end_header_id",
    "reserved_special_token_4", "eot_id" }
  for i = 5, 250 do names[#names + 1] = "reserved_special_token_" .. i end
  local added = {}
  for i, name in ipairs(names) do added["<|" .. name .. "|>"] = first + i - 1 end
  return added
end

local function read_tiktoken(dir, spec, kind)
  local text = read_file(dir, "tokenizer.model", spec.files)
  if kind ~= nil and kind ~= "llama3" then unsupported("tokenizer.model as %s", kind) end
  spec.vocab = {}
  local n = 0
  for line in text:gmatch "[^\r\n]+" do
    local word, rank = line:match "^(%S+) (%d+)$"
    local bytes = word and base64(word)
    if not bytes then
      if n == 0 then unsupported "tokenizer.model is not tiktoken's text form (SentencePiece?)" end
      malformed("tokenizer.model: line %d is not base64 and a rank", n + 1)
    end
    if spec.vocab[bytes] then malformed("tokenizer.model: line %d repeats a token", n + 1) end
    spec.vocab[bytes] = tonumber(rank)
    n = n + 1
  end
  spec.kind, spec.split, spec.whole_pieces, spec.text_flags = "llama3", "llama3", true, 0
  spec.added = spec.listed or llama3_special(n)
  spec.bos = spec.bos or "<|begin_of_text|>"
  spec.eos = spec.eos or "<|end_of_text|>"
  if spec.adds_bos == nil then spec.adds_bos = true end
end

--- Read a folder. @tparam string dir @tparam[opt] string kind see tokenizer.load
function M.read(dir, kind)
  local spec = { files = {} }
  local config = read_config(dir, spec)
  if fs.is_file(fs.join(dir, "tokenizer.json")) then
    read_tokenizer_json(dir, spec)
  elseif fs.is_file(fs.join(dir, "vocab.json")) then
    read_vocab_and_merges(dir, spec, config, kind)
  elseif fs.is_file(fs.join(dir, "tokenizer.model")) then
    read_tiktoken(dir, spec, kind)
  else
    errors.raise("data", "no tokenizer here: none of tokenizer.json, vocab.json, tokenizer.model", 0)
  end
  return spec
end

---- the byte tokenizer ---------------------------------------------------------------------------

local function printable(bytes)
  local out, n = ffi.new "char *[1]", ffi.new "size_t[1]"
  halo_ffi.call(C.halo_tokenizer_printable, out, n, bytes, #bytes, 0)
  local text = ffi.string(out[0], n[0])
  C.halo_buffer_free(out[0])
  return text
end

--- The byte tokenizer, with the files that `save` writes for it: a byte-level BPE without merges, which
-- Hugging Face's library loads as is.
-- @tparam table special texts of the special tokens, ids from 256 on
function M.byte(special)
  local vocab, added, entries, roles = {}, {}, json.array {}, {}
  for b = 0, 255 do vocab[printable(string.char(b))] = b end
  for i, text in ipairs(special) do
    if type(text) ~= "string" or #text < 2 then
      errors.raise("usage", "tokenizer.byte: a special token is a text of at least two bytes", 0)
    end
    if added[text] then errors.raise("usage", ("tokenizer.byte: %q is there twice"):format(text), 0) end
    added[text] = 255 + i
    entries[i] = { id = 255 + i, content = text, special = true, normalized = false,
      single_word = false, lstrip = false, rstrip = false }
    local role = text:match "^<|(%l+)|>$"
    if role == "bos" or role == "eos" or role == "pad" then roles[role .. "_token"] = text end
  end
  local level = { type = "ByteLevel", add_prefix_space = false, trim_offsets = false, use_regex = false }
  local root = {
    version = "1.0", truncation = json.null, padding = json.null, added_tokens = entries,
    normalizer = json.null, pre_tokenizer = level, post_processor = json.null, decoder = level,
    model = { type = "BPE", dropout = json.null, unk_token = json.null,
      continuing_subword_prefix = json.null, end_of_word_suffix = json.null, fuse_unk = false,
      byte_fallback = false, vocab = vocab, merges = json.array {} },
  }
  roles.tokenizer_class = "PreTrainedTokenizerFast"
  return {
    kind = "byte", split = "none", vocab = vocab, text_flags = C.HALO_TOKEN_PRINTABLE, added = added,
    merges = {}, bos = roles.bos_token, eos = roles.eos_token, pad = roles.pad_token,
    files = {
      ["tokenizer.json"] = json.encode(root, { pretty = true }) .. "\n",
      ["tokenizer_config.json"] = json.encode(roles, { pretty = true }) .. "\n",
    },
  }
end

return M
