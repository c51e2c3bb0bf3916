--- The prompt, driven as a script drives it (lines in, text out), and what Tab offers.
local complete = require "halo.complete"
local fs = require "halo.fs"
local process = require "halo.process"
local recipe = require "halo.recipe"
local show = require "halo.show"

local dir
setup(function() dir = fs.temp_dir() end)
teardown(function() fs.remove_tree(dir) end)

-- Run lines through `halo repl`; returns output and exit code.
local function session(lines, words)
  fs.write(dir .. "/in", table.concat(lines, "\n") .. "\n")
  local status = os.execute(("NO_COLOR=1 HALO_CACHE=%s/cache HALO_HISTORY= %s repl %s < %s/in > %s/out 2> %s/err")
    :format(dir, process.quote(process.halo()), words or "", dir, dir, dir))
  return fs.read(dir .. "/out"), math.floor(status / 256), fs.read(dir .. "/err")
end

local function says(expected, ...)
  assert.equal(expected, (session { ... }))
end

describe("the prompt", function()
  it("shows values of expressions and keeps them", function()
    says("2\n", "1 + 1")
    says('"a"\n2\n"a"\n2\n', '"a", 2', "_1, _2")
    says("6\n", "x = 3", "x * 2")
    says("3\n", "1 + 2;", "_")
    says("", "local a = 1", "-- nothing", "   ")
    says("nil\n", "nil")
  end)

  it("reads statements over several lines", function()
    says("7\n", "function f()", "  return 7", "end", "f()")
    says("{ 1, 2 }\n", "{ 1,", "2 }")
  end)

  it("shows the error and goes on; a script notices by the exit code", function()
    local out, code = session { 'error "boo"', "1" }
    assert.equal("error: boo\n1\n", out)
    assert.equal(2, code)
    says('error: unknown name "fooo"\n', "fooo")
    says('error: yarn has no field "too" (did you mean "to"?)\n', "yarn { too = 3 }")
  end)

  it("shows the line that an error points at", function()
    local out = session { "do", "  local t = nil", "  t.x = 1", "end" }
    assert.truthy(out:find("> t.x = 1", 1, true), out)
    fs.write(dir .. "/lib.lua", "local M = {}\nfunction M.f()\n  return nil + 1\nend\nreturn M\n")
    out = session { ("package.path = %q .. package.path"):format(dir .. "/?.lua;"), 'require("lib").f()' }
    assert.truthy(out:find("> return nil + 1", 1, true), out)
  end)

  it("warns once of a global that a function sets", function()
    local out = session { "function f() zed = 1 end", "f()", "f()", "zed" }
    assert.equal(1, select(2, out:gsub("is a `local` missing", "")))
    assert.truthy(out:find("1\n$"))
  end)

  it("has recipe words, modules, help, and the shell", function()
    says("stage { context = 2048, steps = 3 }\n", "stage { context = 2*K, steps = 3 }")
    says("f32 [2] cpu: 0 0\n", "tensor.zeros { 2 }")
    assert.truthy(session({ "? yarn" }):find("arXiv 2309.00071", 1, true))
    assert.truthy(session({ "? fs.write" }):find("atomically", 1, true))
    assert.truthy(session({ "?" }):find("semicolon", 1, true))
    says("hi\n", "$ echo hi")
    assert.truthy(session({ "alpha = 1", "who()" }):find("alpha +1\n"))
  end)

  it("runs a line on every rank, and tells what fails on one of them", function()
    local out, code = session({
      "ranks(halo.launch.is_first())", "1 + 1", 'if not halo.launch.is_first() then error("only there") end',
      "ranks(5)" }, "--ranks 2")
    assert.equal("rank 0  true\nrank 1  false\nranks differ\n2\nerror on rank 1: prompt:1: only there\n"
      .. "rank 0  5\nrank 1  5\nall ranks agree\n", out)
    assert.equal(2, code)
  end)
end)

describe("the workbench", function()
  local text = [[
return recipe "bench" {
  model = model.qwen2 { layers = 2, width = 32, heads = 4, kv_heads = 2 },
  data = text { from = FOLDER },
  optim = adamw { lr = 1e-3 },
  attention = sparse.vertical_slash { keep = budget { verticals = 8, slashes = 16 }, sink = 2, window = 8,
    ring = flat { block = 16 } },
  stages = { stage { context = 256, steps = 5 } },
}]]
  setup(function()
    fs.mkdir(dir .. "/text")
    fs.write(dir .. "/text/a.txt", ("All happy families are alike; "):rep(300))
    fs.write(dir .. "/r.lua", (text:gsub("FOLDER", ("%q"):format(dir .. "/text"))))
  end)

  it("steps, undoes to the last bit, and generates", function()
    local out = session({ "h = job.weights_hash and tostring(job:weights_hash())", "a = step(2).loss",
      "b = step(1).loss", "undo()", "c = step(1).loss", "print(b == c, a > b)", "undo()",
      '#generate("All ", { tokens = 5 }) >= 0', "job.step_index", "step(9)" }, dir .. "/r.lua")
    assert.truthy(out:find("true\ttrue\n", 1, true), out)
    assert.truthy(out:find("back at step 2\n", 1, true), out)
    assert.truthy(out:find("the recipe has 5 steps, 2 are done", 1, true), out)
  end)

  it("probes a layer, over virtual ranks too", function()
    for _, words in ipairs { "", " mesh.cp=2" } do
      local out = session({ "p = probe(2)", "p", "#p.recall", "p.plan:density() < 1" }, dir .. "/r.lua" .. words)
      assert.truthy(out:find("attention of layer 2: vertical_slash, 256 tokens, density", 1, true), out)
      assert.truthy(out:find("4\ntrue\n$"), out)
    end
    assert.truthy(session({ "probe(3)" }, dir .. "/r.lua"):find("a layer from 1 to 2, got 3", 1, true))
  end)

  it("lets a recipe be changed and built anew", function()
    local out = session({ "R.model.layers", "R.model.layers = 3", "rebuild()", "#job.model.parameters > 30",
      "R.model.layrs = 1" }, dir .. "/r.lua")
    assert.truthy(out:find("2\ntrue\n", 1, true), out)
    assert.truthy(out:find('did you mean "layers"', 1, true), out)
  end)
end)

describe("Tab", function()
  local function offers(line, env) return select(2, complete.candidates(line, env or {})) end

  it("completes names, nested fields, methods and keywords", function()
    local env = { alpha = { beta = { gamma = 1, ["not a word"] = 2 } }, list = { 10, { x = 1 } } }
    assert.same({ "alpha" }, offers("print(al", env))
    assert.same({ "beta" }, offers("alpha.", env))
    assert.same({ "gamma" }, offers("y = alpha.beta.g", env))
    assert.same({ "while" }, offers("whi", env))
    local class = { __index = { method = print } }
    assert.same({ "method" }, offers("o:me", { o = setmetatable({}, class) }))
    assert.same({}, offers("nothing.here.", env))
  end)

  it("knows recipe objects and tensors", function()
    local env = { R = recipe.evaluate "stage { context = 512, steps = 1 }", t = require("halo.tensor").zeros { 2 } }
    assert.same({ "context" }, offers("R.cont", env))
    assert.same({ "reshape" }, offers("t:resha", env))
    assert.same({ "cosine" }, offers("w:cos", { w = recipe.evaluate "warmup(1)" }))
  end)

  it("completes files in quotes and help words after a question mark", function()
    fs.mkdir(dir .. "/files/sub")
    fs.write(dir .. "/files/one.txt", "")
    assert.same({ "one.txt" }, offers(('f("%s/files/o'):format(dir)))
    assert.same({ "one.txt", "sub/" }, offers(('f("%s/files/'):format(dir)))
    assert.same({ "yarn" }, offers "? yar")
  end)

  it("inserts what all candidates share, and lists them when that is nothing", function()
    local env = { zeebar = 1, zeebaz = 2 }
    assert.equal("eba", (complete.complete("ze", env)))
    local insert, list = complete.complete("zeeba", env)
    assert.equal("", insert)
    assert.truthy(list:find("zeebar  zeebaz", 1, true))
  end)
end)

describe("show", function()
  it("counts what is long instead of dumping it", function()
    local long = {}
    for i = 1, 1000 do long[i] = i end
    local text = show.value(long, 80)
    assert.truthy(text:find("... 976 more", 1, true))
    assert.is_true(#text < 1000)
    assert.truthy(show.value(("x"):rep(1000), 80):find "1000 bytes")
  end)

  it("survives tables that contain themselves, and errors of __tostring are the prompt's affair", function()
    local t = { a = 1 }
    t.self = t
    assert.equal("{ a = 1, self = { itself } }", show.value(t, 80))
  end)

  it("shows text of several lines as text", function()
    assert.equal("a\nb", show.value("a\nb\n", 80))
    assert.equal('"a"', show.value("a", 80))
  end)
end)
