--- JSON, files, named arguments and terminal text: the base that other modules stand on.
local args = require "halo.args"
local errors = require "halo.errors"
local fs = require "halo.fs"
local json = require "halo.json"
local term = require "halo.term"

describe("json", function()
  it("writes text only: bytes that are no UTF-8 become U+FFFD", function()
    local r = "\239\191\189"
    assert.equal('"a' .. r .. 'b"', json.encode "a\180b")
    assert.equal('"' .. r .. '"', json.encode "\195") -- cut short
    assert.equal('"' .. r .. r .. r .. '"', json.encode "\237\160\128") -- a surrogate
    assert.equal('"' .. r .. r .. '"', json.encode "\192\175") -- overlong
    for _, good in ipairs { "\195\164", "\226\130\172", "\240\159\152\128", "plain" } do
      assert.equal('"' .. good .. '"', json.encode(good))
    end
  end)

  it("writes sorted keys, so equal values give equal text", function()
    local a, b = {}, {}
    for i = 1, 40 do a["k" .. i] = i end
    for i = 40, 1, -1 do b["k" .. i] = i end
    assert.equal(json.encode(a), json.encode(b))
    assert.equal('{"a":1,"b":[1,2],"c":{}}', json.encode { c = {}, b = { 1, 2 }, a = 1 })
  end)

  it("keeps empty arrays and objects apart on a round trip", function()
    for _, text in ipairs { "[]", "{}", '{"a":[],"b":{},"c":[[],{}]}', '["[]",[]]', '{"[]":"[ ]"}' } do
      assert.equal(text, json.encode(json.decode(text)))
    end
    assert.equal("[]", json.encode(json.array {}))
    assert.equal("[]", json.encode(json.decode "[ \n ]"))
  end)

  it("writes numbers that read back as the same bits", function()
    for _, v in ipairs { 0.1, 1 / 3, 1e300, -2.5e-310, 2 ^ 53, 2 ^ 60, 123456789, 5e-324, -1 } do
      assert.equal(v, json.decode(json.encode(v)))
    end
    assert.equal("3", json.encode(3))
    assert.equal("0.1", json.encode(0.1))
  end)

  it("writes what JSON has no number for as null, and long integers in full", function()
    assert.equal('[null,null,null]', json.encode { 0 / 0, math.huge, -math.huge })
    assert.equal('"123456789012345678"', json.encode(123456789012345678LL))
    assert.equal("42", json.encode(42ULL))
  end)

  it("drops null members unless asked to keep them, and keeps nulls of arrays", function()
    assert.is_nil(json.decode('{"a":null}').a)
    assert.equal(json.null, json.decode('{"a":null}', { keep_null = true }).a)
    assert.equal("[null,1]", json.encode(json.decode "[null,1]"))
  end)

  it("escapes every byte that needs it", function()
    local all = {}
    for i = 0, 127 do all[#all + 1] = string.char(i) end
    local text = table.concat(all)
    assert.equal(text, json.decode(json.encode(text)))
    assert.equal('"\\n\\"\\\\\\u0001"', json.encode '\n"\\\1')
  end)

  it("refuses what is not JSON with class data, and values without a form with their path", function()
    local ok, e = pcall(json.decode, '{"a":', { what = "config.json" })
    assert.is_false(ok)
    assert.equal("data", e.class)
    assert.truthy(e.message:find("config.json is not valid JSON", 1, true))
    for _, text in ipairs { "", "[1,]", '"abc', "[", "nul", '{"a" 1}', "[1] 2" } do
      assert.has_error(function() json.decode(text) end)
    end
    ok, e = pcall(json.encode, { a = { b = print } })
    assert.is_false(ok)
    assert.truthy(e.message:find("value.a.b is a function", 1, true))
    local circle = {}
    circle.a = circle
    assert.has_error(function() json.encode(circle) end)
  end)

  it("writes pretty text with plain arrays on one line", function()
    assert.equal('{\n  "a": [1, 2],\n  "b": {\n    "c": true\n  }\n}',
      json.encode({ a = { 1, 2 }, b = { c = true } }, { pretty = true }))
  end)
end)

describe("fs", function()
  local dir
  before_each(function() dir = fs.temp_dir() end)
  after_each(function() fs.remove_tree(dir) end)

  it("writes atomically: no temporary file stays, the old content goes at once", function()
    fs.write(dir .. "/a", "one")
    fs.write(dir .. "/a", ("x"):rep(100000))
    assert.equal(100000, fs.stat(dir .. "/a").size)
    assert.same({ "a" }, fs.list(dir))
  end)

  it("makes folders with parents, lists sorted, walks to the bottom without hidden files", function()
    fs.mkdir(dir .. "/b/c/d")
    fs.mkdir(dir .. "/b/c/d") -- again is fine
    fs.write(dir .. "/b/z", "")
    fs.write(dir .. "/b/c/y", "")
    fs.write(dir .. "/b/.hidden", "")
    local seen = {}
    for _, relative in fs.walk(dir) do seen[#seen + 1] = relative end
    assert.same({ "b/c/y", "b/z" }, seen)
    assert.same({ ".hidden", "c", "z" }, fs.list(dir .. "/b"))
  end)

  it("answers nil and why for what is not there, and raises class data when it cannot change", function()
    local text, why = fs.read(dir .. "/none")
    assert.is_nil(text)
    assert.truthy(why:find("No such file", 1, true))
    assert.is_nil((fs.list(dir .. "/none")))
    assert.is_nil((fs.read(dir))) -- a folder
    local ok, e = pcall(fs.write, dir .. "/none/x", "1")
    assert.is_false(ok)
    assert.equal("data", e.class)
    assert.has_error(function() fs.mkdir(dir .. "/none/../f") fs.write(dir .. "/f2", "") fs.mkdir(dir .. "/f2/x") end)
  end)

  it("removes links, not what they point to", function()
    fs.mkdir(dir .. "/keep")
    fs.write(dir .. "/keep/file", "1")
    fs.mkdir(dir .. "/tree")
    os.execute(("ln -s '%s/keep' '%s/tree/link'"):format(dir, dir))
    fs.remove_tree(dir .. "/tree")
    assert.is_false(fs.exists(dir .. "/tree"))
    assert.equal("1", fs.read(dir .. "/keep/file"))
  end)

  it("takes paths apart and together", function()
    assert.equal("/a", fs.dirname "/a/b")
    assert.equal("/", fs.dirname "/a")
    assert.equal(".", fs.dirname "a")
    assert.equal("b", fs.basename "/a/b")
    assert.equal("a/b", fs.join("a/", "b"))
    assert.equal("/b", fs.join("a", "/b"))
  end)
end)

describe("named arguments", function()
  local fields = { q = "table", budget = { "number", 0.5 }, count = { "int", 3 }, f = "callable?", x = "string|table?" }

  it("fill in defaults and pass what fits", function()
    local o = args.named("f", { q = {}, x = "a" }, fields)
    assert.equal(0.5, o.budget)
    assert.equal("a", o.x)
    assert.is_nil(o.f)
  end)

  it("refuse unknown names with the nearest, wrong types, missing ones, at the caller's line", function()
    local function called(o)
      o = args.named("sparsity.pick", o, fields) -- no tail call: that would leave no frame to name
      return o
    end
    local function message(o)
      local ok, e = pcall(function() called(o) return true end)
      assert.is_false(ok)
      assert.truthy(tostring(e):find("json_spec.lua:%d+:"))
      assert.equal("usage", e.class)
      return e.message
    end
    assert.equal('sparsity.pick has no argument "buget" (did you mean "budget"?)', message { q = {}, buget = 1 })
    assert.equal('sparsity.pick: budget must be number, got "x"', message { q = {}, budget = "x" })
    assert.equal("sparsity.pick: count must be int, got 1.5", message { q = {}, count = 1.5 })
    assert.equal("sparsity.pick: q is missing", message {})
    assert.truthy(message(3):find("wants a table of named arguments, got 3", 1, true))
  end)

  it("suggest only what is near", function()
    assert.equal("run", args.nearest("rnu", { "run", "repl", "eval" }))
    assert.equal("tokenize", args.nearest("tok", { "run", "tokenize" }))
    assert.is_nil(args.nearest("x", { "B", "K" }))
    assert.is_nil(args.nearest("completely", { "different" }))
    assert.equal(1, args.distance("ab", "ba"))
    assert.equal(3, args.distance("kitten", "sitting"))
  end)
end)

describe("errors", function()
  it("print as text, carry class and exit code, and answer to string methods", function()
    local ok, e = pcall(errors.raise, "data", "broken file", 0)
    assert.is_false(ok)
    assert.equal("broken file", tostring(e))
    assert.equal("x: broken file", "x: " .. e)
    assert.truthy(e:find "broken")
    assert.equal(5, errors.exit_code(e))
    assert.equal(70, errors.exit_code "plain text")
    assert.equal(4, errors.exit_code "not enough memory")
  end)
end)

describe("term", function()
  it("writes numbers as people read them", function()
    assert.equal("1.5 KiB", term.bytes(1536))
    assert.equal("999 B", term.bytes(999))
    assert.equal("1.23M", term.count(1234567))
    assert.equal("128K", term.context(131072))
    assert.equal("1000", term.context(1000))
    assert.equal("1M", term.context(2 ^ 20))
    assert.equal("1m15s", term.duration(75))
    assert.equal("2h05m", term.duration(7500))
  end)

  it("aligns tables by columns of characters, numbers to the right", function()
    assert.equal("name   n\nä      5\nbb    12", term.table { { "name", "n" }, { "ä", 5 }, { "bb", 12 } })
  end)

  it("counts characters, not bytes or colour codes", function()
    assert.equal(3, term.length "\27[31mäöü\27[0m")
    assert.equal("ä  ", term.pad("ä", 3))
    assert.equal("  ä", term.pad("ä", -3))
  end)

  it("draws one bar per value and survives values that are not numbers", function()
    assert.equal("▁▅█", term.sparkline { 0, 4, 7 })
    assert.equal("", term.sparkline {})
    assert.equal(2, term.length(term.sparkline { 1, 0 / 0 }))
  end)
end)
