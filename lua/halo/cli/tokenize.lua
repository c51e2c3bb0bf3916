--- `halo tokenize --tokenizer DIR FILE`: text to ids and back.
local errors = require "halo.errors"
local fs = require "halo.fs"

local M = {
  name = "tokenize",
  summary = "Turn text into token ids, or ids into text.",
  example = "halo tokenize --tokenizer models/Qwen2.5-3B book.txt > book.ids",
}

function M.define(command)
  command:argument("file", "a text file (with --decode: ids, parted by spaces, commas or lines); "
    .. "- reads standard input")
  command:option("--tokenizer -t", "a folder with tokenizer.json, vocab.json and merges.txt, or tokenizer.model; "
    .. '"byte" for the byte tokenizer'):argname "DIR":count(1)
  command:flag("--decode -d", "ids to text")
  command:flag("--special", "special tokens written in the text become their ids")
  command:flag("--count -c", "only say how many ids")
end

local function read(path)
  if path == "-" then return io.stdin:read "*a" end
  local text, why = fs.read(path)
  if not text then errors.raise("data", why, 0) end
  return text
end

local function decode(tok, text, path)
  local ids = {}
  for word in text:gmatch "[^%s,%[%]]+" do
    local id = tonumber(word)
    if not id or id < 0 or id >= tok.vocab_size or id % 1 ~= 0 then
      errors.raise("data", ('%s: "%s" is no id of this tokenizer (0 to %d)'):format(path, word,
        tok.vocab_size - 1), 0)
    end
    ids[#ids + 1] = id
  end
  io.stdout:write(tok:decode(ids))
end

local function encode(tok, text, options)
  local ids, n = tok:encode_buffer(text, { special = options.special or false })
  if options.count then
    print(n)
    return
  end
  local out = require("string.buffer").new()
  for i = 0, n - 1 do
    if i > 0 then out:put " " end
    out:put(ids[i])
    if i % 65536 == 65535 then io.stdout:write(out:get()) end
  end
  io.stdout:write(out:get(), "\n")
end

function M.run(options)
  local tokenizer = require "halo.tokenizer"
  local tok = options.tokenizer == "byte" and tokenizer.byte {} or tokenizer.load(options.tokenizer)
  local text = read(options.file)
  if options.decode then
    decode(tok, text, options.file)
  else
    encode(tok, text, options)
  end
end

return M
