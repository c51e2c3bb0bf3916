--- Tokenizers: reference vectors, file formats, round trips, special tokens, malformed files.
local fs = require "halo.fs"
local json = require "halo.json"
local tokenizer = require "halo.tokenizer"
local helper = require "tests.helper"

local QWEN2 = [[(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}]]
  .. [[| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+]]
local LLAMA3 = QWEN2:gsub("\\p{N}|", "\\p{N}{1,3}|", 1)

local function shared(path)
  local root = helper.shared()
  if not root then pending "shared data is absent (set HALO_SHARED)" end
  return root and root .. "/" .. path
end

local loaded = {}
local function reference(name)
  loaded[name] = loaded[name] or tokenizer.load(shared("data/tokenizers/" .. name))
  return loaded[name]
end

local function gunzip(path)
  local pipe = io.popen(("gzip -dc '%s'"):format(path))
  local text = pipe:read "*a"
  pipe:close()
  return text
end

-- Texts joined by newline, mark, newline; a line of ids each.
local function vectors(folder, name)
  local input, output = fs.read(folder .. "/" .. name .. ".inp"), fs.read(folder .. "/" .. name .. ".out")
  local list, at, mark = {}, 1, "\n__ggml_vocab_test__\n"
  while true do
    local from, to = input:find(mark, at, true)
    list[#list + 1] = { text = input:sub(at, (from or 0) - 1) }
    if not from then break end
    at = to + 1
  end
  local i = 0
  for line in (output .. "\n"):gmatch "(.-)\n" do
    i = i + 1
    if list[i] then list[i].ids = line:match "^%s*(.-)%s*$" end
  end
  return list
end

-- A small byte-level BPE as tokenizer.json; `change` edits the parsed form.
local function small(change)
  local root = json.decode(tokenizer.byte({ special = { "<|end|>" } }).files["tokenizer.json"], { keep_null = true })
  root.model.vocab["ab"], root.model.vocab["\196\160a"] = 257, 258 -- "Ġa" is " a"
  root.model.merges = json.array { "a b", "\196\160 a" }
  if change then change(root) end
  return json.encode(root)
end

local folders = {}
local function folder_with(files)
  local dir = fs.temp_dir()
  folders[#folders + 1] = dir
  for name, text in pairs(files) do fs.write(dir .. "/" .. name, text) end
  return dir
end

local function random_bytes(n)
  local out = {}
  for i = 1, n do out[i] = string.char(math.random(0, 255)) end
  return table.concat(out)
end

describe("tokenizer", function()
  teardown(function()
    for _, dir in ipairs(folders) do fs.remove_tree(dir) end
  end)

  for _, case in ipairs { { "qwen2.5", "llamacpp_qwen2", 151665 }, { "gpt2", "llamacpp_gpt-2", 50257 } } do
    local name, file, size = case[1], case[2], case[3]
    describe(name, function()
      local dir, tok
      setup(function()
        dir = helper.shared() and helper.shared() .. "/data/tokenizers/" .. name
        tok = dir and reference(name)
      end)

      it("gives the reference ids for all 47 texts", function()
        if not shared("") then return end
        local good, list = 0, vectors(dir, file)
        for _, v in ipairs(list) do
          local ids = tok:encode(v.text)
          assert.equal(v.ids, table.concat(ids, " "))
          assert.equal(v.text, tok:decode(ids))
          good = good + 1
        end
        assert.equal(47, good)
        assert.equal(size, tok.vocab_size)
      end)

      it("brings back random bytes", function()
        if not shared("") then return end
        math.randomseed(17)
        for trial = 1, 200 do
          local text = random_bytes(math.random(0, 300))
          assert.equal(text, tok:decode(tok:encode(text)), trial)
          assert.equal(text, tok:decode(tok:encode(text, { special = true })), trial)
        end
        local long = random_bytes(300000)
        assert.is_true(tok:decode(tok:encode(long)) == long)
      end)

      it("brings back every book", function()
        if not shared("") then return end
        local books = helper.shared() .. "/data/books/"
        local n = 0
        for _, part in ipairs { "train", "valid" } do
          for _, book in ipairs(fs.list(books .. part)) do
            local text = gunzip(books .. part .. "/" .. book)
            local ids, count = tok:encode_buffer(text)
            assert.is_true(tok:decode(ids, count) == text, book)
            n = n + 1
          end
        end
        assert.equal(29, n)
      end)
    end)
  end

  it("counts the tokens that the books' manifest states", function()
    if not shared("") then return end
    local tok = reference "qwen2.5"
    for _, book in ipairs(json.read(shared "data/books/manifest.json").valid) do
      assert.equal(book.qwen2_tokens, tok:count(gunzip(shared("data/books/valid/" .. book.file))), book.file)
    end
  end)

  it("knows the roles of special tokens", function()
    if not shared("") then return end
    local qwen = reference "qwen2.5"
    assert.equal(151643, qwen:special "<|endoftext|>")
    assert.same({ 151645, 151643, 151643 }, { qwen.eos, qwen.pad, qwen.document_end })
    assert.is_nil(qwen.bos)
    assert.same({ 151644, 872, 198 }, qwen:encode("<|im_start|>user\n", { special = true }))
    assert.same({ 27, 91, 318, 4906, 91, 29 }, qwen:encode "<|im_start|>")
    local text, is_special = qwen:token(151644)
    assert.equal("<|im_start|>", text)
    assert.is_true(is_special)
    assert.has_error(function() qwen:special "<|im_strat|>" end)
    local gpt2 = reference "gpt2"
    assert.same({ 50256, 50256 }, { gpt2.bos, gpt2.eos })
  end)

  describe("tokenizer.json", function()
    it("is read, special tokens only when asked", function()
      local tok = tokenizer.load(folder_with { ["tokenizer.json"] = small() })
      assert.same({ 257, 258 }, tok:encode "ab a")
      assert.same({ 257, 256, 97 }, tok:encode("ab<|end|>a", { special = true }))
      assert.equal(256, tok:special "<|end|>")
      assert.equal(8, #tok:encode("<|end|>a"))
    end)

    it("may write merges as pairs, and a pattern", function()
      for _, pattern in ipairs { QWEN2, LLAMA3 } do
        local tok = tokenizer.load(folder_with { ["tokenizer.json"] = small(function(root)
          root.model.merges = json.array { { "a", "b" }, { "\196\160", "a" } }
          root.pre_tokenizer = { type = "Sequence", pretokenizers = {
            { type = "Split", pattern = { Regex = pattern }, behavior = "Isolated", invert = false },
            { type = "ByteLevel", add_prefix_space = false, trim_offsets = false, use_regex = false } } }
        end) })
        assert.same({ 257, 258 }, tok:encode "ab a")
        assert.equal(pattern == QWEN2 and "qwen2" or "llama3", tok.kind)
      end
    end)

    it("may ask for NFC, and then valid text is normalised, other bytes are not", function()
      local dir = folder_with { ["tokenizer.json"] = small(function(root) root.normalizer = { type = "NFC" } end) }
      local tok = tokenizer.load(dir)
      assert.is_true(tok.nfc)
      assert.equal("\195\169", tok:decode(tok:encode "e\204\129"))
      assert.equal("e\204\129\255", tok:decode(tok:encode "e\204\129\255"))
      local raw = tokenizer.load(dir, { nfc = false })
      assert.equal("e\204\129", raw:decode(raw:encode "e\204\129"))
      assert.are_not.equal(tok:hash(), raw:hash())
    end)

    it("is refused when it asks for what Halo does not do, by name", function()
      local function refused(change, words)
        local dir = folder_with { ["tokenizer.json"] = small(change) }
        local ok, e = pcall(tokenizer.load, dir)
        assert.is_false(ok)
        assert.equal("environment", e.class)
        assert.is_truthy(tostring(e):find(words, 1, true), tostring(e))
      end
      refused(function(r) r.model.type = "Unigram" end, "Unigram")
      refused(function(r) r.model.byte_fallback = true end, "byte_fallback")
      refused(function(r) r.model.dropout = 0.1 end, "dropout")
      refused(function(r) r.normalizer = { type = "NFKC" } end, "NFKC")
      refused(function(r) r.decoder = { type = "Metaspace" } end, "Metaspace")
      refused(function(r) r.pre_tokenizer = { type = "Whitespace" } end, "Whitespace")
      refused(function(r) r.pre_tokenizer.add_prefix_space = true end, "space before")
      refused(function(r) r.added_tokens[1].lstrip = true end, "lstrip")
      -- a pattern of one's own is never compiled, whatever it is
      for _, pattern in ipairs { "(a+)+$", QWEN2 .. "|x", "", "(" } do
        refused(function(r)
          r.pre_tokenizer = { type = "Sequence", pretokenizers = {
            { type = "Split", pattern = { Regex = pattern }, behavior = "Isolated", invert = false },
            { type = "ByteLevel", use_regex = false } } }
        end, "split pattern is not a known one")
      end
    end)

    it("is refused when malformed, with the reason", function()
      local function refused(text, words)
        local ok, e = pcall(tokenizer.load, folder_with { ["tokenizer.json"] = text })
        assert.is_false(ok)
        assert.equal("data", e.class, tostring(e))
        assert.is_truthy(tostring(e):find(words, 1, true), tostring(e))
      end
      refused("{", "not valid JSON")
      refused("1", "not an object")
      refused(("["):rep(100000), "not valid JSON")
      refused(small(function(r) r.model.vocab["x y"] = 259 end), "not in GPT-2's byte alphabet")
      refused(small(function(r) r.model.vocab["zz"] = 300 end), "without holes")
      refused(small(function(r) r.model.vocab["zz"] = -1 end), "whole number")
      refused(small(function(r) r.model.vocab["zz"] = 1.5 end), "whole number")
      refused(small(function(r) r.model.vocab["zz"] = "7" end), "whole number")
      refused(small(function(r) r.model.vocab["zz"] = 257 end), "")
      refused(small(function(r) r.model.vocab["a"] = nil end), "")
      refused(small(function(r) r.model.merges[3] = "q q" end), "merge 2")
      refused(small(function(r) r.model.merges[3] = "a b" end), "twice")
      refused(small(function(r) r.model.merges[3] = "ab" end), "merge 2")
      refused(small(function(r) r.model.merges[3] = { "a" } end), "merge 2")
      refused(small(function(r) r.model.merges[3] = 5 end), "merge 2")
      refused(small(function(r) r.added_tokens[1].content = 5 end), "no content")
      refused(small(function(r) r.added_tokens[2] = r.added_tokens[1] end), "twice")
    end)
  end)

  it("takes any wrong value anywhere in its files as an error in a file", function()
    local values = { 5, -1, "x", true, json.null, {}, { "a", "b" }, { a = 1 }, { { {} } } }
    -- every place of the tree, as a list of keys; of long tables only a few
    local function places(node, path, out)
      local n = 0
      for _, key in ipairs(require("halo.args").keys(node)) do
        key = node[key] == nil and tonumber(key) or key
        n = n + 1
        if n > 16 or n > 3 and node["z"] ~= nil then break end -- "z": of a vocabulary
        local longer = { unpack(path) }
        longer[#longer + 1] = key
        out[#out + 1] = longer
        if type(node[key]) == "table" then places(node[key], longer, out) end
      end
      return out
    end
    local whole = small(function(root)
      root.normalizer = { type = "Sequence", normalizers = { { type = "NFC" } } }
      root.post_processor = { type = "Sequence", processors = { { type = "TemplateProcessing",
        single = { { SpecialToken = { id = "<|end|>" } }, { Sequence = { id = "A" } } } } } }
      root.pre_tokenizer = { type = "Sequence", pretokenizers = {
        { type = "Split", pattern = { Regex = QWEN2 }, behavior = "Isolated", invert = false },
        { type = "ByteLevel", add_prefix_space = false, use_regex = false } } }
    end)
    local function rich() return json.decode(whole, { keep_null = true }) end
    local config = { eos_token = { content = "<|end|>" }, bos_token = "<|end|>", tokenizer_class = "x",
      add_bos_token = true, added_tokens_decoder = { ["256"] = { content = "<|end|>", lstrip = false } } }
    local dir = folder_with { ["tokenizer.json"] = whole,
      ["tokenizer_config.json"] = json.encode(config) }
    assert.equal(256, tokenizer.load(dir).eos)
    local function try(name, make)
      for _, path in ipairs(places(make(), {}, {})) do
        for _, value in ipairs(values) do
          local root = make()
          local node = root
          for i = 1, #path - 1 do node = node[path[i]] end
          node[path[#path]] = value
          local file = io.open(dir .. "/" .. name, "wb")
          file:write(json.encode(root))
          file:close()
          local ok, e = pcall(tokenizer.load, dir)
          if not ok and not (e.class == "data" or e.class == "environment") then
            error(("%s %s = %s: %s"):format(name, table.concat(path, "."), json.encode(value), tostring(e)))
          end
        end
      end
      fs.write(dir .. "/" .. name, json.encode(make()))
    end
    try("tokenizer.json", rich)
    try("tokenizer_config.json", function() return json.decode(json.encode(config)) end)
  end)

  describe("tokenizer.model", function()
    local alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    local function base64(s)
      local out = {}
      for i = 1, #s, 3 do
        local a, b, c = s:byte(i, i + 2)
        local n = a * 65536 + (b or 0) * 256 + (c or 0)
        for k = 3, 0, -1 do
          local d = math.floor(n / 64 ^ k) % 64 + 1
          out[#out + 1] = alphabet:sub(d, d)
        end
        if not b then out[#out - 1] = "=" end
        if not c then out[#out] = "=" end
      end
      return table.concat(out)
    end
    local function ranks(more)
      local lines = {}
      for b = 0, 255 do lines[#lines + 1] = base64(string.char(b)) .. " " .. b end
      for i, text in ipairs(more) do lines[#lines + 1] = base64(text) .. " " .. 255 + i end
      return table.concat(lines, "\n") .. "\n"
    end

    it("is tiktoken's: ranks merge, whole pieces win, Llama 3's names behind the ranks", function()
      local tok = tokenizer.load(folder_with { ["tokenizer.model"] = ranks { "ab", "cd", "abcd", "xyz" } })
      assert.equal("llama3", tok.kind)
      assert.equal(260 + 256, tok.vocab_size)
      assert.same({ 258 }, tok:encode "abcd")
      assert.same({ 259 }, tok:encode "xyz")
      assert.same({ 119, 120, 121, 122 }, tok:encode "wxyz")
      assert.same({ 49, 50, 51, 52 }, tok:encode "1234")
      assert.equal(260, tok:special "<|begin_of_text|>")
      assert.equal(269, tok:special "<|eot_id|>")
      assert.equal(515, tok:special "<|reserved_special_token_250|>")
      assert.same({ 260, 261, 261 }, { tok.bos, tok.eos, tok.document_end })
      assert.is_true(tok.adds_bos)
    end)

    it("is refused when it is something else", function()
      local function class_of(text)
        local ok, e = pcall(tokenizer.load, folder_with { ["tokenizer.model"] = text })
        return not ok and e.class
      end
      assert.equal("environment", class_of "\10\14\10\5<unk>") -- SentencePiece
      assert.equal("data", class_of(ranks { "ab" } .. "!!!! 257\n"))
      assert.equal("data", class_of(ranks { "ab", "ab" }))
      assert.equal("data", class_of "YWI= 0\n") -- no bytes
    end)
  end)

  it("tells a folder without a tokenizer, and a family it cannot tell", function()
    local ok, e = pcall(tokenizer.load, folder_with {})
    assert.is_false(ok)
    assert.is_truthy(tostring(e):find("no tokenizer here", 1, true))
    local vocab = json.decode(small()).model.vocab
    local files = { ["vocab.json"] = json.encode(vocab), ["merges.txt"] = "#version: 0.2\na b\n\196\160 a\n" }
    vocab["<|end|>"] = 256
    files["vocab.json"] = json.encode(vocab)
    ok, e = pcall(tokenizer.load, folder_with(files))
    assert.is_false(ok)
    assert.is_truthy(tostring(e):find("cannot tell its family", 1, true))
    assert.same({ 257, 258 }, tokenizer.load(folder_with(files), { kind = "gpt2" }):encode "ab a")
    assert.has_error(function() tokenizer.load(folder_with(files), { kind = "gtp2" }) end)
    assert.has_error(function() tokenizer.load "/no/such/folder" end)
  end)

  describe("byte", function()
    it("is a token per byte and some names", function()
      local tok = tokenizer.byte {}
      assert.equal(259, tok.vocab_size)
      assert.same({ 104, 195, 169, 0, 255 }, tok:encode "h\195\169\0\255")
      assert.same({ 256, 257, 258 }, { tok.bos, tok.eos, tok.pad })
      local t = tok:encode_tensor "abc"
      assert.same({ { 1, 3 }, "i32", { 97, 98, 99 } }, { t.shape, t.dtype, t:values() })
      assert.equal(3, tok:count "abc")
      assert.same({ "b", false }, { tok:token(98) })
      assert.same({ 98, nil, nil }, { tok:id "b", tok:id "bb", (tok:token(259)) })
      assert.same({ 97, 257 }, tok:encode("a<|eos|>", { special = true }))
      assert.equal("", tok:decode(tok:encode ""))
      assert.has_error(function() tok:decode { 259 } end)
      assert.has_error(function() tok:decode { 1.5 } end)
      assert.has_error(function() tok:encode("a", { specail = true }) end)
    end)

    it("is saved in a form that loads, here and elsewhere", function()
      local tok, dir = tokenizer.byte { special = { "<|eos|>", "<|x|>" } }, folder_with {}
      tok:save(dir)
      local again = tokenizer.load(dir)
      assert.equal(tok:hash(), again:hash())
      assert.same({ 256, 257, "byte" }, { again.eos, again:special "<|x|>", again.kind })
      local second = folder_with {}
      again:save(second)
      assert.equal(fs.read(dir .. "/tokenizer.json"), fs.read(second .. "/tokenizer.json"))
    end)
  end)

  it("handles one piece of a megabyte", function()
    if not shared("") then return end
    local tok = reference "gpt2"
    local text = ("ab"):rep(500000)
    local started = os.clock()
    local ids, n = tok:encode_buffer(text)
    assert.is_true(tok:decode(ids, n) == text)
    assert.is_true(os.clock() - started < 60) -- seconds here; a quadratic merge takes hours
  end)
end)
