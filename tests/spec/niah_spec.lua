--- Needle in a haystack: tasks, scores, files; generation itself is tested elsewhere.
local attending = require "halo.attending"
local data = require "halo.data"
local fs = require "halo.fs"
local json = require "halo.json"
local model = require "halo.model"
local niah = require "halo.eval.niah"
local tokenizer = require "halo.tokenizer"

describe("niah", function()
  local dir, tok, text, m, needles
  setup(function()
    dir = fs.temp_dir()
    tok = tokenizer.byte {}
    local line = {}
    for i = 1, 300 do line[i] = ("Line %d has nothing to hide. "):format(i) end
    fs.write(dir .. "/text.txt", table.concat(line))
    text = data.prepare { from = dir .. "/text.txt", tokenizer = tok, cache = dir .. "/cache" }
    needles = data.needles.new { tokenizer = tok, filler = text, digits = 3 }
    m = model.build(model.config { family = "qwen2", layers = 1, width = 32, heads = 2, vocab = tok.vocab_size,
      context = 512 }, { seed = 1 })
  end)
  teardown(function() fs.remove_tree(dir) end)

  local function measure(o)
    local all = { model = m, tokenizer = tok, needles = needles, attending = attending.dense(m.config),
      lengths = { 200, 333 }, depths = 3, samples = 2 }
    for k, v in pairs(o or {}) do all[k] = v end
    return all
  end

  -- A model that is right where `knows(task)` says so, in the place of generation.
  local function with_oracle(knows, f)
    local generate = require "halo.generate"
    local real = generate.run
    local calls = 0
    generate.run = function(o)
      calls = calls + 1
      local prompt = tok:decode(o.ids)
      local number = prompt:match "number is (%d+)%."
      return tok:encode(knows(prompt, #o.ids) and (" %s. And"):format(number) or " nobody knows")
    end
    local ok, why = pcall(f, function() return calls end)
    generate.run = real
    assert(ok, why)
  end

  it("asks at every depth of every length and counts what is right", function()
    with_oracle(function(_, n) return n > 300 end, function()
      local r = niah.run(measure())
      assert.equal(0.5, r.score)
      assert.same({ 0, 50, 100 }, r.depths)
      assert.equal(6, #r.cells)
      assert.equal(12, #r.rows)
      for _, cell in ipairs(r.cells) do
        assert.equal(2, cell.n)
        assert.equal(cell.length == 333 and 1 or 0, cell.score)
      end
      local seen = {}
      for _, row in ipairs(r.rows) do
        assert.is_truthy(row.answer:find "^%d%d%d$")
        assert.equal(row.correct == 1, row.response:find(row.answer, 1, true) ~= nil)
        assert.is_true(row.depth_realised <= row.depth_percent)
        seen[row.answer .. row.city] = true
      end
      assert.is_true(#require("halo.args").keys(seen) >= 11) -- twelve tasks, all different but for chance
      assert.is_truthy(niah.text(r):find("needle score 50 %", 1, true))
    end)
  end)

  it("takes depths as a count or a list", function()
    assert.same({ 50 }, niah.depths(1))
    assert.same({ 0, 25, 50, 75, 100 }, niah.depths(5))
    assert.same({ 10, 90 }, niah.depths { 10, 90 })
  end)

  it("generates with the real model, the same at every call", function()
    local a, b = niah.run(measure { samples = 1, depths = 2 }), niah.run(measure { samples = 1, depths = 2 })
    assert.equal(0, a.score) -- fresh weights
    for i, row in ipairs(a.rows) do
      assert.equal(row.response, b.rows[i].response)
      assert.equal(0, row.correct)
    end
  end)

  it("keeps samples and takes them up again", function()
    local folder = dir .. "/eval/niah-step-00000007-dense"
    local function kept(o)
      o = o or {}
      o.folder, o.model_name, o.is_first = folder, "test", true
      return niah.run_in(measure(o))
    end
    with_oracle(function(_, n) return n > 300 end, function(calls)
      local first = kept()
      assert.equal(12, calls())
      assert.equal(0, first.reused)
      local again = kept()
      assert.equal(12, calls())
      assert.equal(12, again.reused)
      assert.same(first.rows, again.rows)
      -- more of the same goes on from there; half a line is no sample
      local path = folder .. "/samples_niah_digits.jsonl"
      local lines = fs.read(path)
      fs.write(path, lines:sub(1, -20))
      local more = kept { samples = 3 }
      assert.equal(11, more.reused)
      assert.equal(12 + 7, calls())
      assert.equal(18, #more.rows)
      -- other tasks, another attention and other weights are other samples
      assert.equal(0, kept({ seed = 2 }).reused)
      local dense = attending.dense(m.config, 32)
      assert.equal(0, kept({ attending = dense }).reused)
      local weight = m.weight["model.norm.weight"]
      weight:fill(2)
      assert.equal(0, kept().reused)
      weight:fill(1)
    end)
  end)

  it("writes what readers of lm-evaluation-harness look for", function()
    local folder = dir .. "/eval/shape"
    with_oracle(function(_, n) return n > 300 end, function()
      niah.run_in(measure { folder = folder, model_name = "test", is_first = true })
    end)
    local r = json.decode(fs.read(folder .. "/results_niah_digits.json"))
    assert.equal(1, r.results.niah_digits["333,none"])
    assert.equal(0, r.results.niah_digits["200,none"])
    assert.equal(0.5, r.results.niah_digits["score,none"])
    assert.equal(12, r["n-samples"].niah_digits.effective)
    local n = 0
    for line in fs.read(folder .. "/samples_niah_digits.jsonl"):gmatch "[^\n]+" do
      local s = json.decode(line)
      assert.equal(n, s.doc_id)
      assert.equal(s.doc.answer, s.target)
      assert.equal(s.contains, s.resps[1][1]:find(s.target, 1, true) and 1 or 0)
      n = n + 1
    end
    assert.equal(12, n)
  end)
end)
