--- Data: packing, choices, the order of samples, batches over ranks, needles.
local data = require "halo.data"
local ffi = require "ffi"
local fs = require "halo.fs"
local halo_ffi = require "halo.ffi"
local random = require "halo.data.random"
local tokenizer = require "halo.tokenizer"

local C, check = halo_ffi.C, halo_ffi.check

local function fails(class, words, f, ...)
  local ok, e = pcall(f, ...)
  assert.is_false(ok, "no error")
  assert.equal(class, e.class, tostring(e))
  assert.is_truthy(tostring(e):find(words, 1, true), tostring(e))
end

local function array(memory, n)
  local out = {}
  for i = 1, n do out[i] = memory[i - 1] end
  return out
end

local function values(t)
  local memory = ffi.new("int32_t[?]", t.count)
  check(C.halo_tensor_read(t, memory))
  return array(memory, t.count)
end

local function new_layout(kind, n, world, block)
  local out = ffi.new "halo_layout *[1]"
  check(C.halo_layout_new(out, kind, n, world, block))
  return ffi.gc(out[0], C.halo_layout_free)
end

describe("data", function()
  local tok, dir

  -- 40 documents of growing length, all different: document d is d+3 times the letter, and its number.
  local function write_corpus(folder, n)
    fs.mkdir(folder .. "/deep/er")
    for d = 0, n - 1 do
      local text = ("%s%03d"):format(string.char(97 + d % 26):rep(d % 17 + 3), d)
      fs.write(("%s/%s%03d.txt"):format(folder, d % 2 == 0 and "" or "deep/er/", d), text)
    end
  end

  setup(function()
    tok = tokenizer.byte {}
    dir = fs.temp_dir()
    write_corpus(dir .. "/text", 40)
    fs.write(dir .. "/text/picture.bin", "\137PNG\0\1\2")
    fs.write(dir .. "/text/.hidden.txt", "secret")
    fs.write(dir .. "/text/notes.md", "# notes")
  end)
  teardown(function() fs.remove_tree(dir) end)

  local function prepare(more)
    local o = { from = dir .. "/text", extensions = { "txt" }, tokenizer = tok, cache = dir .. "/cache" }
    for k, v in pairs(more or {}) do o[k] = v end
    return data.prepare(o)
  end

  describe("pack", function()
    it("takes a document per file, in the order of paths, without binary and hidden files", function()
      local stats = data.pack { from = dir .. "/text", to = dir .. "/all.tokens", tokenizer = tok }
      assert.same({ files = 41, binary = 1, documents = 41 },
        { files = stats.files, binary = stats.binary, documents = stats.documents })
      local t = data.tokens(dir .. "/all.tokens")
      assert.equal(stats.tokens, t.count)
      local paths, at = {}, 0
      for path in fs.walk(dir .. "/text") do
        if not path:find "picture" then paths[#paths + 1] = path end
      end
      for d, path in ipairs(paths) do
        local first, n = t:document(d - 1)
        assert.equal(at, first)
        at = at + n
        local ids = array(t:read(first, n), n)
        assert.equal(tok.eos, ids[n])
        ids[n] = nil
        assert.equal(fs.read(path), tok:decode(ids))
      end
      assert.equal(at, t.count)
      t:check_tokenizer(tok)
      local other = tokenizer.byte { special = { "<|eos|>" } }
      fails("data", "another tokenizer", function() t:check_tokenizer(other) end)
    end)

    it("keeps the extensions asked for", function()
      local stats = data.pack { from = dir .. "/text", to = dir .. "/md.tokens", tokenizer = tok,
        extensions = { ".md" } }
      assert.equal(1, stats.documents)
      fails("data", "no text", function()
        data.pack { from = dir .. "/text", to = dir .. "/no.tokens", tokenizer = tok, extensions = { "pdf" } }
      end)
      assert.is_false(fs.exists(dir .. "/no.tokens"))
      fails("data", "no file or folder", data.pack, { from = dir .. "/x", to = dir .. "/y", tokenizer = tok })
      fails("usage", "did you mean \"tokenizer\"", function() data.pack { from = "a", to = "b", tokeniser = tok } end)
    end)

    it("reads jsonl line by line, also lines longer than a block", function()
      local long = ("x"):rep(3 * 2 ^ 20)
      fs.write(dir .. "/a.jsonl", '{"text":"one"}\n\n{"text":"two\\n","id":2}\n{"text":"' .. long
        .. '"}\n{"text":"last"}')
      local stats = data.pack { from = dir .. "/a.jsonl", to = dir .. "/j.tokens", tokenizer = tok, format = "jsonl" }
      assert.equal(4, stats.documents)
      local t = data.tokens(dir .. "/j.tokens")
      assert.same(tok:encode("one<|eos|>two\n<|eos|>", { special = true }), array(t:read(0, 9), 9))
      assert.same(tok:encode("x<|eos|>last<|eos|>", { special = true }), array(t:read(t.count - 7, 7), 7))
      fs.write(dir .. "/b.jsonl", '{"text":"one"}\n{"body":"two"}\n')
      local bad = { from = dir .. "/b.jsonl", to = dir .. "/k", tokenizer = tok, format = "jsonl" }
      fails("data", "b.jsonl:2:", data.pack, bad)
      fs.write(dir .. "/b.jsonl", '{"text":"one"}\nnot json\n')
      fails("data", "not valid JSON", data.pack, bad)
      assert.is_false(fs.exists(dir .. "/k"))
    end)

    it("packs once per content", function()
      local lines = {}
      local function log(line) lines[#lines + 1] = line end
      local cache = dir .. "/cache2"
      local a = prepare { cache = cache, log = log }
      assert.equal(1, #lines)
      local b = prepare { cache = cache, log = log }
      assert.equal(1, #lines)
      assert.equal(a:hash(), b:hash())
      fs.write(dir .. "/text/000.txt", "aaa000 and more")
      local c = prepare { cache = cache, log = log }
      assert.equal(2, #lines)
      assert.are_not.equal(a:hash(), c:hash())
      fs.write(dir .. "/text/000.txt", "aaa000")
      assert.equal(a:hash(), prepare { cache = cache, log = log }:hash())
      assert.equal(2, #lines)
      local other = tokenizer.byte { special = { "<|eos|>" } }
      prepare { cache = cache, log = log, tokenizer = other }
      assert.equal(3, #lines)
    end)

    it("opens a folder of shards as one text", function()
      local shards = dir .. "/shards"
      fs.mkdir(shards)
      data.pack { from = dir .. "/text", to = shards .. "/b.tokens", tokenizer = tok, extensions = { "txt" } }
      data.pack { from = dir .. "/text", to = shards .. "/a.tokens", tokenizer = tok, extensions = { "md" } }
      fs.write(shards .. "/readme", "not tokens")
      local a, b, all = data.tokens(shards .. "/a.tokens"), data.tokens(shards .. "/b.tokens"), data.tokens(shards)
      assert.same({ a.count + b.count, a.documents + b.documents }, { all.count, all.documents })
      assert.equal(a:document_hash(0), all:document_hash(0))
      assert.equal(b:document_hash(5), all:document_hash(a.documents + 5))
      all:check_tokenizer(tok)
      fails("data", "no .tokens or .bin file", data.tokens, fs.mkdir(dir .. "/nothing"))
      local other = tokenizer.byte { special = { "<|x|>" } }
      data.pack { from = dir .. "/text", to = shards .. "/c.tokens", tokenizer = other }
      fails("data", "different tokenizers", data.tokens, shards)
    end)

    it("does not follow a folder into itself", function()
      os.execute(("ln -sfn .. '%s/text/deep/up'"):format(dir))
      local stats = data.pack { from = dir .. "/text", to = dir .. "/loop.tokens", tokenizer = tok }
      os.execute(("rm '%s/text/deep/up'"):format(dir))
      assert.equal(41, stats.documents)
    end)
  end)

  describe("loader", function()
    local text
    setup(function() text = prepare() end)

    local function loader(more)
      local o = { sources = { text = { tokens = text } }, context = 16, seed = 3, pad = tok.pad }
      for k, v in pairs(more or {}) do o[k] = v end
      return data.loader(o)
    end

    it("makes every token but the first of a document a target, once per epoch", function()
      local l = loader()
      local windows = math.ceil((text.count - 1) / 16)
      for epoch = 0, 2 do
        local seen, targets = {}, 0
        for i = epoch * windows, (epoch + 1) * windows - 1 do
          local name, k, window = l:locate(i)
          assert.same({ "text", i }, { name, k })
          seen[window] = true
          targets = targets + l:batch({ rows = 1, first = i }).targets
        end
        local n = 0
        for _ in pairs(seen) do n = n + 1 end
        assert.equal(windows, n)
        assert.equal(text.count - text.documents, targets)
      end
    end)

    it("agrees with the text, shift, boundaries and positions", function()
      local l = loader()
      for i = 0, 20 do
        local b = l:batch { rows = 1, first = i }
        local _, _, window = l:locate(i)
        local ids, labels, positions = values(b.ids), values(b.labels), values(b.positions)
        local start = 0
        for p = 1, 16 do
          local at = window * 16 + p - 1
          local d, e = text:find_document(at), text:find_document(at + 1)
          if p > 1 and d ~= text:find_document(at - 1) then start = p - 1 end
          assert.equal(d and text:read(at, 1)[0] or tok.pad, ids[p])
          assert.equal(d and d == e and text:read(at + 1, 1)[0] or -100, labels[p])
          assert.equal(p - 1 - start, positions[p])
          if p > 1 then
            assert.equal(d ~= text:find_document(at - 1), b.documents[p - 1] ~= b.documents[p - 2])
          end
        end
      end
      local stream = loader { mask = "none" }:batch { rows = 2, first = 0 }
      assert.is_nil(stream.documents)
      assert.same({ 0, 1, 2, 3 }, { unpack(values(stream.positions), 1, 4) })
      assert.is_true(stream.targets > loader():batch({ rows = 2, first = 0 }).targets)
    end)

    it("gives the same samples in any batch, and other ones for another seed or stream", function()
      local l = loader()
      local whole = values(l:batch({ rows = 6, first = 10 }).ids)
      for r = 0, 5 do
        local alone = loader():batch { rows = 1, first = 10 + r }
        assert.same({ unpack(whole, r * 16 + 1, r * 16 + 16) }, values(alone.ids))
      end
      assert.are_not.same(whole, values(loader({ seed = 4 }):batch({ rows = 6, first = 10 }).ids))
      assert.are_not.same(whole, values(loader({ stream = "2" }):batch({ rows = 6, first = 10 }).ids))
      assert.equal(0, l.next)
      l:batch { rows = 6 }
      assert.equal(6, l.next)
    end)

    it("cuts rows so that the ranks together hold the batch, for every layout", function()
      local l = loader { context = 50 }
      local rows = l:batch { rows = 2, first = 0 }
      local want = { ids = values(rows.ids), labels = values(rows.labels), positions = values(rows.positions) }
      for _, kind in ipairs { C.HALO_LAYOUT_CONTIGUOUS, C.HALO_LAYOUT_ZIGZAG, C.HALO_LAYOUT_STRIPED } do
        for _, world in ipairs { 1, 2, 3, 5 } do
          local layout = new_layout(kind, 50, world, 8)
          local t = tonumber(C.halo_layout_local_tokens(layout))
          local stacked = l:batch { rows = 2, first = 0, layout = layout, here = world }
          local all, seen = values(stacked.ids), 0
          for rank = 0, world - 1 do
            local b = l:batch { rows = 2, first = 0, layout = layout, rank = rank }
            assert.same({ 2, t }, b.ids.shape)
            assert.equal(rows.targets, b.targets)
            local got = { ids = values(b.ids), labels = values(b.labels), positions = values(b.positions) }
            for row = 0, 1 do
              for i = 0, t - 1 do
                local g = tonumber(C.halo_layout_global(layout, rank, i))
                assert.equal(all[row * t * world + rank * t + i + 1], got.ids[row * t + i + 1])
                for name, padding in pairs { ids = tok.pad, labels = -100, positions = 0 } do
                  assert.equal(g < 50 and want[name][row * 50 + g + 1] or padding, got[name][row * t + i + 1])
                end
                if g < 50 then seen = seen + 1 end
              end
            end
          end
          assert.equal(100, seen)
        end
      end
      fails("usage", "the layout is for 64 tokens", function()
        l:batch { rows = 1, layout = new_layout(C.HALO_LAYOUT_STRIPED, 64, 1, 8) }
      end)
    end)

    it("draws sources by weight, each without repeats within an epoch", function()
      local half = text:slice(0, math.floor(text.count / 2))
      local function make()
        return loader { context = 4, sources = { a = { tokens = text, weight = 3 },
          b = { tokens = half, weight = 1 }, c = { tokens = half, weight = 0 } } }
      end
      local l = make()
      local report = l:audit { samples = 400 }
      assert.is_true(math.abs(report.sources[1].share - 0.75) < 0.07)
      assert.equal(0, report.sources[3].draws)
      for _, s in ipairs(report.sources) do
        assert.equal(math.min(s.draws, s.windows), s.seen)
        assert.equal(s.draws - s.seen, s.repeats)
      end
      assert.is_truthy(tostring(report):find("400 samples", 1, true))
      -- the draw number is a count from the start, wherever one looks first
      assert.same({ make():locate(9000) }, { l:locate(9000) })
      local count = { a = 0, b = 0 }
      for i = 0, 600 do
        local name, k = l:locate(i)
        assert.equal(count[name], k)
        count[name] = count[name] + 1
      end
    end)

    it("keeps one number as state and refuses other data, saying why", function()
      local l = loader()
      l:batch { rows = 5 }
      local state = require("halo.json").decode(require("halo.json").encode(l:state()))
      local again = loader()
      again:resume(state)
      assert.equal(5, again.next)
      assert.same(values(l:batch({ rows = 3 }).ids), values(again:batch({ rows = 3 }).ids))
      fails("data", "seed was 3, is 4", function() loader({ seed = 4 }):resume(state) end)
      fails("data", "context was 16, is 17", function() loader({ context = 17 }):resume(state) end)
      fails("data", "source text was", function()
        loader({ sources = { text = { tokens = text:slice(0, 50) } } }):resume(state)
      end)
      fails("data", "weight of more is new", function()
        loader({ sources = { text = { tokens = text }, more = { tokens = text } } }):resume(state)
      end)
      fails("data", "malformed", function() l:resume {} end)
    end)

    it("runs generated sources on their own chance", function()
      local calls = 0
      local source = data.generate { name = "count v1", make = function(rng, length)
        calls = calls + 1
        local n = rng:int(1, 9)
        return { { ids = { n, n + 1, n + 2 }, loss = { 0, 0, 1 } }, { ids = ffi.new("int32_t[2]", 7, 8), n = 2 },
          { ids = { 1, 2, 3, 4, 5, 6, length } } }
      end }
      local function make(pad) return loader { sources = { g = { generator = source } }, context = 9, pad = pad } end
      local b = make(0):batch { rows = 2, first = 4 }
      assert.equal(2, calls)
      local ids, labels = values(b.ids), values(b.labels)
      local n = ids[1]
      assert.same({ n, n + 1, n + 2, 7, 8, 1, 2, 3, 4 }, { unpack(ids, 1, 9) })
      assert.same({ -100, n + 2, -100, 8, -100, 2, 3, 4, 5 }, { unpack(labels, 1, 9) })
      assert.same({ 0, 0, 0, 1, 1, 2, 2, 2, 2 }, array(b.documents, 9))
      assert.same(ids, values(make(0):batch({ rows = 2, first = 4 }).ids))
      local short = loader { sources = { g = { generator = source } }, context = 14, pad = 77 }:batch { rows = 1 }
      assert.same({ 77, 77 }, { unpack(values(short.ids), 13, 14) })
      assert.same({ -100, -100, -100 }, { unpack(values(short.labels), 12, 14) })
      assert.are_not.equal(make(0):fingerprint(), loader { sources = { g = { generator =
        data.generate { name = "count v2", make = source.make } } }, context = 9, pad = 0 }:fingerprint())
    end)

    it("says what is wrong with its arguments", function()
      fails("usage", "positions restart only", loader, { mask = "none", positions = "restart" })
      fails("usage", 'did you mean "document"', loader, { mask = "documents" })
      fails("usage", "no sources", loader, { sources = {} })
      fails("usage", "all weights are 0", loader, { sources = { a = { tokens = text, weight = 0 } } })
      fails("usage", "needs tokens or generator", loader, { sources = { a = {} } })
      fails("usage", "context must be", loader, { context = 0 })
      fails("usage", "rows is 0", function() loader():batch { rows = 0 } end)
    end)
  end)

  describe("needles", function()
    local text
    setup(function()
      local sentence = {}
      for i = 1, 400 do sentence[i] = ("Line %d says little, and says it slowly. "):format(i) end
      fs.write(dir .. "/filler.txt", table.concat(sentence))
      text = data.prepare { from = dir .. "/filler.txt", tokenizer = tok, cache = dir .. "/cache" }
    end)

    local function needles(more)
      local o = { tokenizer = tok, filler = text }
      for k, v in pairs(more or {}) do o[k] = v end
      return data.needles.new(o)
    end

    -- The document's text, its start token left out, and the weight of each of its bytes.
    local function read(d)
      assert.equal(tok.bos, d.ids[0])
      local weights = {}
      for i = 1, d.n - 1 do weights[i] = d.loss[i] end
      return tok:decode(d.ids + 1, d.n - 1), weights
    end

    it("hides numbers and asks for them; only answers are targets", function()
      local n = needles { needles = { 2, 4 }, digits = 5 }
      for s = 1, 20 do
        local d = n:document(random.new(1, s), 900)
        assert.equal(900, d.n)
        local all, weights = read(d)
        local targets, answers = {}, {}
        for i = 1, #all do
          assert.is_true(weights[i] <= 1)
          if weights[i] == 1 then targets[#targets + 1] = all:sub(i, i) end
        end
        for _, a in ipairs(d.asked) do answers[#answers + 1] = (" %s."):format(a.number) end
        assert.equal(table.concat(answers), table.concat(targets))
        assert.equal(#d.needles, #d.asked)
        for _, needle in ipairs(d.needles) do
          assert.is_truthy(needle.number:find "^%d%d%d%d%d$")
          local planted = (" The special magic %s number is %s."):format(needle.city, needle.number)
          assert.equal(planted, tok:decode(d.ids + needle.position, #planted))
          -- behind the end of a sentence, as in the original
          assert.is_truthy(needle.position == 1 or all:sub(1, needle.position - 1):find "[.\n]$", all)
        end
        assert.same(array(d.ids, d.n), array(n:document(random.new(1, s), 900).ids, d.n))
      end
      assert.is_nil(needles():document(random.new(1, 1), 60))
    end)

    it("weighs text and answers, and never the hidden digits", function()
      local n = needles { questions = { 2, 5 }, inside = 0.5, text_weight = 1, answer_weight = 20 }
      local places = 0
      for s = 1, 30 do
        local d = n:document(random.new(2, s), 1500)
        local all, weights = read(d)
        local needle = d.needles[1]
        local hidden = assert(all:find(needle.number, 1, true))
        assert.is_true(hidden > needle.position and hidden < needle.position + 45)
        local at, found = hidden + 7, 0
        local is_answer = {}
        while true do
          at = all:find(needle.number, at, true)
          if not at then break end
          found = found + 1
          for i = at, at + 6 do is_answer[i] = true end
          local question = (" What is the special magic %s number? The special magic %s number is "):format(
            needle.city, needle.city)
          assert.equal(question, all:sub(at - #question, at - 1))
          if at < #all - 500 then places = places + 1 end
          at = at + 7
        end
        assert.equal(#d.asked, found)
        assert.is_true(found >= 2 and found <= 5)
        assert.equal(needle.number .. ".", all:sub(-8)) -- the last question comes last
        for i = 1, #all do
          local wanted = is_answer[i] and 20 or (i >= hidden and i < hidden + 7) and 0 or 1
          assert.equal(wanted, weights[i], ("byte %d"):format(i))
        end
      end
      assert.is_true(places > 15 and places < 70) -- half of 30 times 1 to 4, where far enough from the end
    end)

    it("asks as often as there is room, and for every needle before one again", function()
      local n = needles { needles = 3, questions = { 4, 4 } }
      local d = n:document(random.new(3, 1), 1000)
      assert.equal(4, #d.asked)
      for i = 1, 3 do assert.equal(d.needles[i], d.asked[i]) end
      local short = n:document(random.new(3, 1), 260)
      assert.is_true(#short.asked < 4 and #short.asked >= 1 and #short.needles >= 1)
      assert.equal(260, short.n)
    end)

    it("makes tasks of exactly a context, at depths, with the answer", function()
      local n = needles()
      for _, context in ipairs { 256, 1024, 5000, 40000 } do -- the last is longer than the text
        for _, depth in ipairs { 0, 11, 50, 89, 100 } do
          local task = n:task { context = context, depth = depth }
          assert.equal(context, task.n + task.answer_n)
          local prompt = tok:decode(task.prompt + 1, task.n - 1)
          assert.is_truthy(task.answer:find "^%d%d%d%d%d%d%d$")
          local _, times = prompt:gsub(task.answer, "")
          assert.equal(1, times)
          assert.is_truthy(prompt:find("number is$"))
          local planted = (" The special magic %s number is %s."):format(task.city, task.answer)
          assert.equal(planted, tok:decode(task.prompt + task.position, #planted))
          assert.is_true(task.realised <= depth and depth - task.realised < 100 * 60 / (context - 200) + 1e-9
            or context < 300)
          assert.is_true(data.needles.correct(task, "I think it is " .. task.answer .. "!"))
          assert.is_false(data.needles.correct(task, "0"))
        end
      end
      local a, b = n:task { context = 512, depth = 30 }, n:task { context = 512, depth = 30 }
      assert.same(array(a.prompt, a.n), array(b.prompt, b.n))
      assert.are_not.equal(a.answer, n:task({ context = 512, depth = 30, round = 1 }).answer)
      assert.are_not.equal(a.answer, n:task({ context = 512, depth = 30, seed = 2 }).answer)
      local many = n:task { context = 2048, depth = 30, needles = 8 }
      local _, planted = tok:decode(many.prompt, many.n):gsub(" The special magic %u[%a ]+ number is %d+", "")
      assert.equal(8, planted)
      fails("usage", "the context 50", function() n:task { context = 50, depth = 0 } end)
      fails("usage", "want 0 to 100", function() n:task { context = 500, depth = 101 } end)
    end)

    it("asks in the words it was trained on", function()
      for _, template in ipairs { "magic", "lines" } do
        local n = needles { template = template }
        local task = n:task { context = 700, depth = 40 }
        local whole = tok:decode(task.prompt, task.n) .. tok:decode(task.answer_ids, task.answer_n)
        local d = n:document(random.new(1, 1), 700)
        local function shape(words) -- the last two sentences, city and number left out
          return (words:sub(-100):gsub(d.needles[1].city, "X"):gsub(task.city, "X"):gsub("%d+", "N"):match "X.*$")
        end
        assert.equal(shape(tok:decode(d.ids, d.n)), shape(whole))
      end
    end)

    it("has a hundred cities, all different", function()
      local seen, n = {}, 0
      for _, city in ipairs(data.needles.cities) do
        assert.is_nil(seen[city])
        seen[city], n = true, n + 1
      end
      assert.equal(100, n)
    end)

    it("fills samples as a source", function()
      local source = needles({ length = { 200, 300 }, needles = 1 }):generator()
      local l = data.loader { sources = { n = { generator = source } }, context = 1000, pad = tok.pad }
      local b = l:batch { rows = 3 }
      -- three or four documents a sample (what is left and too short goes to the last), nine bytes of
      -- answer each, seven of them its number
      assert.is_true(b.targets >= 3 * 3 * 9 and b.targets <= 3 * 5 * 9)
      assert.is_nil(b.weights)
      local heavy = needles { length = { 200, 300 }, answer_weight = 9 }
      local function heavy_loader()
        return data.loader { sources = { n = { generator = heavy:generator() } }, context = 1000, pad = tok.pad }
      end
      local weighted = heavy_loader():batch { rows = 3 }
      assert.equal(weighted.targets / 9 * (7 * 9 + 2), weighted.weights:sum():item())
      local labels, weights = values(weighted.labels), weighted.weights:values()
      for i = 1, #labels do assert.equal(labels[i] == -100, weights[i] == 0) end
      -- cut for a ring they go where their labels go
      local layout = new_layout(C.HALO_LAYOUT_STRIPED, 1000, 2, 64)
      local cut = heavy_loader():batch { rows = 3, layout = layout, rank = 1 }
      local part, t = cut.weights:values(), cut.labels.shape[2]
      for row = 0, 2 do
        for i = 0, t - 1 do
          local g = tonumber(C.halo_layout_global(layout, 1, i))
          assert.equal(g < 1000 and weights[row * 1000 + g + 1] or 0, part[row * t + i + 1])
        end
      end
      fails("usage", "do not fit", function()
        data.loader({ sources = { n = { generator = needles():generator() } }, context = 40 }):batch { rows = 1 }
      end)
    end)

    it("checks its settings", function()
      fails("usage", "digits", needles, { digits = 0 })
      fails("usage", "needles must be", needles, { needles = { 3, 2 } })
      fails("usage", 'did you mean "magic"', needles, { template = "magik" })
      fails("usage", 'did you mean "answer_weight"', needles, { answers_weight = 2 })
      fails("usage", "answer_weight is 0", needles, { answer_weight = 0 })
      fails("usage", "text_weight is 256", needles, { text_weight = 256 })
      fails("usage", "inside is 2", needles, { inside = 2 })
      fails("usage", "length from 140, but a needle of 7 digits", needles, { length = { 140, 300 } })
      fails("usage", "questions must be", needles, { questions = "some" })
      fails("usage", "questions must be", needles, { questions = { 0, 2 } })
      fails("usage", "cities", needles, { needles = 101 })
      data.pack { from = dir .. "/text", to = dir .. "/w.tokens", tokenizer = tok, extensions = { "md" } }
      local ends = data.tokens(dir .. "/w.tokens")
      ends = ends:slice(ends.count - 1, 1)
      fails("data", "filler is empty", needles, { filler = ends })
      ends = ends:select { 0, 0, 0 }
      fails("data", "nothing but ends", function() needles({ filler = ends }):task { context = 512, depth = 5 } end)
      fails("data", "another tokenizer", needles, { tokenizer = tokenizer.byte { special = { "<|eos|>" } } })
    end)
  end)

  describe("open", function()
    local function open(spec) return data.open(spec, { tokenizer = tok, seed = 1, cache = dir .. "/cache" }) end

    it("builds a mix, holds text out, and cuts batches for a run", function()
      local c = open { type = "mix", holdout = 0.2, weights = { text = 3, hidden = 1 }, sources = {
        text = { type = "text", from = dir .. "/text", holdout = 0.2 },
        hidden = { type = "needles", digits = 3, needles = 1 },
      } }
      assert.is_truthy(tostring(c):find("held out", 1, true))
      assert.is_true(c.valid.count > 0)
      local seen = {}
      for first = 0, 40, 4 do
        local b = c:batch { first = first, batch = 4, context = 256 }
        assert.same({ 4, 256 }, b.ids.shape)
        for _, name in ipairs(b.sources) do seen[name] = true end
      end
      assert.same({ text = true, hidden = true }, seen)
      assert.equal(3, c:niah().digits)
      assert.equal(2048, (function(t) return t.n + t.answer_n end)(c:niah():task { context = 2048, depth = 10 }))
      local documents = c:validation_documents { tokens = 12, max = 3 }
      assert.equal(12, #documents[1])
      assert.same({ 1, 32 }, c:validation_batch({ context = 32 }).ids.shape)
      local state = c:state()
      c:check_state(state)
      local other = open { type = "text", from = dir .. "/text", holdout = 0.2 }
      fails("data", "the data is not what the checkpoint was trained on", function() other:check_state(state) end)
    end)

    it("gives a stage its own settings over the same text", function()
      local function mix(hidden, weights)
        return { type = "mix", holdout = 0.2, weights = weights, sources = {
          text = { type = "text", from = dir .. "/text", holdout = 0.2 }, hidden = hidden } }
      end
      local short = { type = "needles", digits = 3, needles = 1, length = { 150, 160 } }
      local long = { type = "needles", digits = 3, needles = 1, answer_weight = 9 }
      local function run(stages)
        return data.open(mix(short), { tokenizer = tok, seed = 1, cache = dir .. "/cache", stages = stages })
      end
      local c = run { {}, { data = mix(long, { text = 0, hidden = 1 }) } }
      assert.equal(c:loader(256), c:loader(256, 1)) -- stage 1 reads the recipe's
      local first, second = c:batch { first = 0, batch = 8, context = 256, stage = 1 },
        c:batch { first = 0, batch = 8, context = 256, stage = 2 }
      local drawn = {}
      for _, name in ipairs(first.sources) do drawn[name] = true end
      assert.same({ text = true, hidden = true }, drawn)
      for _, name in ipairs(second.sources) do assert.equal("hidden", name) end
      assert.is_nil(first.weights)
      assert.equal(9, second.weights:max():item())
      local state = c:state()
      run({ {}, { data = mix(long, { text = 0, hidden = 1 }) } }):check_state(state)
      fails("data", "source hidden was", function()
        run({ {}, { data = mix(short, { text = 0, hidden = 1 }) } }):check_state(state)
      end)
      fails("data", "stage", function() run({}):check_state(state) end)
      fails("data", "stage 2 has data of its own now", function()
        c:check_state(run({}):state())
      end)
    end)

    it("reads token files of the same tokenizer", function()
      data.pack { from = dir .. "/text", to = dir .. "/t.tokens", tokenizer = tok }
      local c = open { type = "tokens", file = dir .. "/t.tokens" }
      assert.is_nil(c.valid)
      fails("data", "nothing is held out", function() c:validation_batch { context = 8 } end)
      assert.same({ 2, 8 }, c:batch({ first = 0, batch = 2, context = 8 }).ids.shape)
    end)

    it("names what is missing", function()
      fails("usage", "no filler text", open, { type = "needles" })
      fails("usage", 'did you mean "text"', open, { type = "mix", weights = { txet = 1 },
        sources = { text = { type = "text", from = dir .. "/text" } } })
    end)
  end)
end)
