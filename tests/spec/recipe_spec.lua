--- Recipes: constructors, errors with file and line, derivation, overrides, resolution.
local fs = require "halo.fs"
local json = require "halo.json"
local recipe = require "halo.recipe"
local schema = require "halo.schema"

local small = [[
return recipe "small" {
  model = model.qwen2 { layers = 2, width = 64, heads = 4, kv_heads = 2, vocab = 300, context = 512 },
  data = text ".",
  optim = adamw { lr = warmup(1e-3, { steps = 5 }) :cosine { to = 1e-4 } },
  attention = sparse.vertical_slash { keep = mass(0.9), dense = { layers = { 1 } } },
  stages = {
    stage { context = 512, tokens = 5000, batch = 2 },
    stage { context = 2*K, steps = 7, rope = yarn { to = 2*K },
            attention = { keep = mass(0.95) } },
  },
  every = { [10] = log {}, [3] = { log {}, save { keep = 2 } }, [5] = function(run) return run.step end },
}
]]

local function text_error(text, name)
  local ok, e = pcall(function() return recipe.resolve(recipe.load_text(text, name or "r.lua")) end)
  assert.is_false(ok)
  assert.equal("usage", e.class)
  return tostring(e)
end

local function has(part, text) assert.truthy(text:find(part, 1, true), ("%q lacks %q"):format(text, part)) end

-- The small recipe with one piece of text replaced.
local function broken(from, to)
  local at, stop = small:find(from, 1, true)
  assert(at, "the test names text that is not in the recipe: " .. from)
  return text_error(small:sub(1, at - 1) .. to .. small:sub(stop + 1))
end

local function overridden(...)
  return recipe.resolve(recipe.override(recipe.load_text(small, "r.lua"), { ... }))
end

local function override_error(...)
  local ok, e = pcall(overridden, ...)
  assert.is_false(ok)
  assert.equal("usage", e.class)
  return tostring(e)
end

describe("data of a stage", function()
  local mixed = [[
return recipe "mixed" {
  model = model.qwen2 { layers = 1, width = 64, heads = 2 },
  data = mix { sources = { books = text ".", hidden = needles { digits = 5 } }, weights = { books = 1, hidden = 3 } },
  optim = adamw { lr = 1e-3 },
  stages = {
    stage { context = 64, steps = 1 },
    stage { context = 64, steps = 1,
      data = { sources = { hidden = { length = { 32, 64 }, questions = { 1, 3 } } }, weights = { books = 0 } } },
    stage { context = 64, steps = 1, data = needles { filler = text "." } },
  },
}
]]
  it("is the recipe's with some fields changed, or another", function()
    local r = recipe.resolve(recipe.load_text(mixed, "m.lua"))
    assert.is_nil(r.stages[1].data)
    local own = r.stages[2].data
    assert.same({ books = 0, hidden = 3 }, own.weights)
    assert.same({ 32, 64 }, own.sources.hidden.length)
    assert.same({ 1, 3 }, own.sources.hidden.questions)
    assert.equal(5, own.sources.hidden.digits)
    assert.equal(".", own.sources.books.from)
    assert.is_nil(r.data.sources.hidden.length) -- the recipe's own is as it was
    assert.same({ books = 1, hidden = 3 }, r.data.weights)
    assert.equal("needles", r.stages[3].data.type)
  end)

  it("follows data=DIR", function()
    local r = recipe.resolve(recipe.override(recipe.load_text(mixed, "m.lua"), { "data=lua" }))
    assert.equal("lua", r.data.sources.books.from)
    assert.equal("lua", r.stages[2].data.sources.books.from)
  end)

  it("says what it does not know", function()
    has('did you mean "hidden"', text_error(mixed:gsub("hidden = { length", "hiden = { length"), "m.lua"))
    has('did you mean "length"', text_error(mixed:gsub("{ length", "{ lenght"), "m.lua"))
    has('weights names "boks"', text_error(mixed:gsub("books = 0", "boks = 0"), "m.lua"))
    has("length must be", text_error(mixed:gsub("length = { 32, 64 }", "length = { 32 }"), "m.lua"))
  end)
end)

describe("a recipe", function()
  it("resolves to a plain table with defaults and derived quantities", function()
    local r = recipe.resolve(recipe.load_text(small, "r.lua"))
    assert.equal("small", r.name)
    assert.equal(16, r.model.head_dim)
    assert.equal(192, r.model.ffn) -- 8/3 * 64 = 170.7, up to a multiple of 32
    assert.equal("byte", r.tokenizer.type)
    assert.same({ dp = 1, cp = 1 }, r.mesh)
    -- 5000 tokens in steps of 2 * 512 are 5 steps, rounded up
    assert.equal(5, r.stages[1].steps)
    assert.equal(5120, r.stages[1].tokens)
    assert.equal(6, r.stages[2].first_step)
    assert.equal(12, r.stages[2].last_step)
    assert.same({ steps = 12, tokens = 5120 + 7 * 2048 }, r.total)
  end)

  it("gives every stage its position scheme, attention and rate in full", function()
    local r = recipe.resolve(recipe.load_text(small, "r.lua"))
    assert.equal("default", r.stages[1].rope.scheme)
    assert.equal(1e6, r.stages[1].rope.theta)
    assert.equal("yarn", r.stages[2].rope.scheme)
    assert.equal(4, r.stages[2].rope.factor)
    assert.equal(512, r.stages[2].rope.original)
    assert.equal(0.9, r.stages[1].attention.keep.share)
    assert.equal(0.95, r.stages[2].attention.keep.share)
    assert.same({ 1 }, r.stages[2].attention.dense.layers)
    assert.equal("flat", r.stages[2].attention.ring.type)
    assert.equal("cosine", r.stages[2].lr.decay)
    assert.equal(1, r.stages[2].lr.first_step)
    assert.equal(12, r.stages[2].lr.last_step)
  end)

  it("keeps a stage's scheme until another stage changes it", function()
    local r = overridden("stages.1.rope=linear{factor=2}", "stages.2.rope=ntk{factor=4}")
    assert.equal("linear", r.stages[1].rope.scheme)
    assert.equal("ntk", r.stages[2].rope.scheme)
    r = recipe.resolve(recipe.load_text(small:gsub("rope = yarn { to = 2%*K },", "")
      :gsub("batch = 2", "batch = 2, rope = linear { factor = 2 }"), "r.lua"))
    assert.equal("linear", r.stages[2].rope.scheme)
  end)

  it("orders actions by step count and keeps functions as source and hash", function()
    local r = recipe.resolve(recipe.load_text(small, "r.lua"))
    assert.same({ 3, 5, 10 }, { r.every[1].steps, r.every[2].steps, r.every[3].steps })
    assert.equal("save", r.every[1].actions[2].type)
    local f = r.every[2].actions[1]
    assert.equal("function", f.type)
    assert.equal(4, f.call { step = 4 })
  end)

  it("saves itself as JSON that reads back the same, without functions", function()
    local dir = fs.temp_dir()
    fs.write(dir .. "/r.lua", small)
    local r = recipe.read(dir .. "/r.lua")
    recipe.save(r, dir)
    assert.equal(small, fs.read(dir .. "/recipe.lua"))
    local back = json.read(dir .. "/recipe.resolved.json")
    assert.equal(recipe.to_json(r), recipe.to_json(back))
    local f = back.every[2].actions[1]
    has("function(run)", f.source)
    assert.equal(16, #f.hash)
    assert.is_nil(f.call)
    fs.remove_tree(dir)
  end)

  it("reads like the published sketch, number keys, chains and nested tables included", function()
    local r = recipe.resolve(recipe.load_text([[
      local lengths = { 32*K, 128*K, 512*K }
      return recipe "sketch" {
        model = model.qwen2 { layers = 36, width = 2048, heads = 16, kv_heads = 2, ffn = 11008, vocab = 151936,
          context = 32*K, rope = yarn { to = 512*K }, recompute = "block" },
        attention = sparse.vertical_slash {
          keep = mass(0.90), estimate = last_queries(64), dense = { layers = { 1, 2 }, below = 32*K },
          ring = hierarchical { layout = "striped", stripe = 64, inner = "node" } },
        mesh = { dp = 1, cp = 32 },
        data = mix { from = "data/prolong-qwen", weights = { books = 30, code = 30, web = 20, short = 20 },
          mask = "document" },
        optim = adamw { lr = warmup(1e-5, { steps = 20 }) :cosine { to = 1e-6 }, betas = { 0.9, 0.95 },
          decay = 0.1, clip = 1.0 },
        stages = { stage { context = 128*K, tokens = 0.5*B, attention = { keep = mass(0.95) } },
          stage { context = lengths[3], tokens = 1.0*B } },
        every = { [10] = log {}, [100] = measure.sparsity { layers = { 1, 18, 36 } },
          [500] = save { keep = 3, major = 2000 } },
        guard = { loss_spike { z = 6, act = "skip" }, recall { below = 0.90, act = "widen" },
          imbalance { above = 1.25, act = "warn" } },
      }]], "sketch.lua"))
    assert.equal(16, r.stages[2].rope.factor)
    assert.equal(64, r.attention.ring.block)
    assert.equal(3815, r.stages[1].steps) -- ceil(5e8 / 131072)
    assert.equal("widen", r.guard[2].act)
  end)
end)

describe("a wrong recipe says where and what", function()
  it("unknown fields, at the field's own line", function()
    assert.equal('r.lua:9: stage has no field "atention" (did you mean "attention"?)',
      broken("attention = { keep", "atention = { keep"))
    assert.equal('r.lua:3: recipe has no field "dta" (did you mean "data"?)', broken("data =", "dta ="))
  end)

  it("unknown words", function()
    assert.equal('r.lua:5: unknown name "mas" (did you mean "mass"?)', broken("mass(0.9)", "mas(0.9)"))
    assert.equal('r.lua:2: model.qwen does not exist (did you mean "qwen2"?)', broken("model.qwen2", "model.qwen"))
  end)

  it("wrong kinds and values", function()
    assert.equal("r.lua:2: model.qwen2: layers must be an integer at least 1, got 0",
      broken("layers = 2", "layers = 0"))
    assert.equal('r.lua:7: stage: context must be a whole number of tokens, at least 1, got "512"',
      broken("stage { context = 512", 'stage { context = "512"'))
    has("data must be one of text", broken('text "."', "adamw { lr = 1 }"))
    has("share must be a number above 0 and at most 1, got 1.5", broken("mass(0.9)", "mass(1.5)"))
  end)

  it("parts that do not fit together", function()
    has("heads (4) must be a multiple of kv_heads (3)", broken("kv_heads = 2", "kv_heads = 3"))
    has("give tokens or steps, not both", broken("tokens = 5000", "tokens = 5000, steps = 2"))
    has("needs tokens or steps", broken("tokens = 5000, ", ""))
    has("names layer 3, the model has 2", broken("layers = { 1 }", "layers = { 3 }"))
    has("shorter than the original context, 512", broken("to = 2*K }", "to = 100 }"))
    has("rises for 50 steps, but the run has only 12", broken("steps = 5 }", "steps = 50 }"))
  end)

  it("missing fields", function()
    has("recipe needs data", broken('  data = text ".",\n', ""))
    has("r.lua:2: model.qwen2 needs layers", broken("layers = 2, ", ""))
  end)

  it("files that are no recipes", function()
    has("must return recipe", text_error "return 1")
    has("must return recipe", text_error "return recipe")
    has('assigns the global "x"; write local x', text_error "x = 1 return 2")
    has("r.lua:1:", text_error 'return recipe "x" {')
    has("bytecode", text_error(string.dump(loadstring "return 1")))
  end)

  it("reaching for what a recipe must not have", function()
    for _, name in ipairs { "io", "os", "ffi", "debug", "loadstring", "setfenv", "getfenv", "rawset", "dofile" } do
      has('unknown name "' .. name .. '"', text_error(("return %s.x"):format(name)))
    end
    has("dump", text_error "return string.dump(print)")
    has("random", text_error "return math.random()")
  end)

  it("loops without end", function()
    has("runs too long", text_error "while true do end")
    has("runs too long", text_error "local function f() while true do local x = 1 end end f()")
  end)
end)

describe("overrides", function()
  it("are typed by the field", function()
    local r = overridden("stages.2.steps=3", "optim.lr=2e-3", "model.width=128", "out=/tmp/x", "seed=7",
      "deterministic=false", "stages.1.context=1K", "optim.betas=0.8,0.9", "attention.dense.layers=1,2")
    assert.equal(3, r.stages[2].steps)
    assert.equal(0.002, r.stages[2].lr.peak)
    assert.equal("cosine", r.stages[2].lr.decay) -- the shape stays
    assert.equal(32, r.model.head_dim)
    assert.equal("/tmp/x", r.out)
    assert.equal(7, r.seed)
    assert.is_false(r.deterministic)
    assert.equal(1024, r.stages[1].context)
    assert.same({ 0.8, 0.9 }, { unpack(r.optim.betas) })
    assert.same({ 1, 2 }, { unpack(r.attention.dense.layers) })
  end)

  it("take recipe expressions", function()
    local r = overridden("stages.2.rope=linear { factor = 8 }",
      "attention.keep=budget { verticals = 10, slashes = 20 }")
    assert.equal(8, r.stages[2].rope.factor)
    assert.equal("budget", r.stages[1].attention.keep.type)
  end)

  it("reach into what a stage changes", function()
    local r = overridden("stages.2.attention.ring.layout=zigzag", "stages.1.attention.keep=mass(0.5)")
    assert.equal("zigzag", r.stages[2].attention.ring.layout)
    assert.equal("striped", r.stages[1].attention.ring.layout)
    assert.equal(0.5, r.stages[1].attention.keep.share)
  end)

  it("replace the other way of saying it", function()
    assert.equal(2, overridden("stages.1.steps=2").stages[1].steps)
    assert.equal(8, overridden("stages.2.rope.factor=8").stages[2].rope.factor)
  end)

  it("cut a run short, and leave the rates as they are", function()
    local whole, r = overridden(), overridden "steps=3"
    assert.equal(1, #r.stages)
    assert.equal(3, r.total.steps)
    assert.equal(3 * 2 * 512, r.total.tokens)
    assert.same(whole.stages[1].lr, r.stages[1].lr)
    r = overridden "steps=7"
    assert.equal(2, #r.stages)
    assert.equal(2, r.stages[2].steps)
    assert.equal(1, #overridden("stages=1").stages)
  end)

  it("swap the text of a mix and keep its other sources", function()
    local text = small:gsub('data = text "%."',
      'data = mix { sources = { t = text "x", n = needles {} }, weights = { t = 3 } }')
    local r = recipe.resolve(recipe.override(recipe.load_text(text, "r.lua"), { "data=." }))
    assert.equal(".", r.data.sources.t.from)
    assert.equal("needles", r.data.sources.n.type)
    assert.equal(".", overridden("data=.").data.from)
    has("no such file or folder", override_error "data=no-such-folder")
  end)

  it("that miss suggest the nearest name", function()
    assert.equal('stagez.1.steps: recipe has no "stagez" (did you mean "stages"?)', override_error "stagez.1.steps=3")
    assert.equal('stages.1.stepz: stage has no "stepz" (did you mean "steps"?)', override_error "stages.1.stepz=3")
    has("the list has 2", override_error "stages.3.steps=3")
    has("unknown name", override_error "model.layers=two")
    has("layers must be an integer", override_error "model.layers=2.5")
    has("write name=value", override_error "steps")
    has('did you mean "striped"', override_error "attention.ring.layout=strip")
  end)
end)

describe("derived recipes", function()
  local dir

  before_each(function()
    dir = fs.temp_dir()
    fs.mkdir(dir .. "/recipes/parts")
    fs.write(dir .. "/recipes/base.lua", small)
  end)
  after_each(function() fs.remove_tree(dir) end)

  local function read(text)
    fs.write(dir .. "/recipes/child.lua", text)
    return recipe.read(dir .. "/recipes/child.lua")
  end

  it("extend a base: nodes and maps merged, lists replaced", function()
    local r = read [[return extend("base.lua") { name = "child", mesh = { cp = 2 }, model = { width = 128 },
      stages = { stage { context = 4*K, steps = 6 } }, every = { [7] = log {} } }]]
    assert.equal("child", r.name)
    assert.equal(2, r.mesh.cp)
    assert.equal(128, r.model.width)
    assert.equal(2, r.model.layers)
    assert.equal(1, #r.stages)
    assert.equal(4, #r.every)
  end)

  it("leave the base alone", function()
    local r = read [[local a = extend("base.lua") { mesh = { cp = 2 } }
      return extend("base.lua") { name = "b" .. a.mesh.cp }]]
    assert.equal("b2", r.name)
    assert.equal(1, r.mesh.cp)
  end)

  it("report mistakes at their own line", function()
    local ok, e = pcall(read, '\nreturn extend("base.lua") {\n  name = "x",\n  msh = { cp = 2 },\n}')
    assert.is_false(ok)
    has('child.lua:4: recipe has no field "msh" (did you mean "mesh"?)', tostring(e))
  end)

  it("require other files of the tree, in the same environment", function()
    fs.write(dir .. "/recipes/parts/sizes.lua", "return { width = 32*K / 256, tag = 'parts' }")
    local r = read [[local sizes = require "recipes.parts.sizes"
      return extend("base.lua") { name = sizes.tag, model = { width = sizes.width } }]]
    assert.equal("parts", r.name)
    assert.equal(128, r.model.width)
    assert.has_error(function() read 'return require "os"' end)
  end)

  it("refuse circles", function()
    fs.write(dir .. "/recipes/a.lua", 'return extend("b.lua") {}')
    fs.write(dir .. "/recipes/b.lua", 'return extend("a.lua") {}')
    local ok, e = pcall(recipe.read, dir .. "/recipes/a.lua")
    assert.is_false(ok)
    has("extends or requires itself", tostring(e))
  end)
end)

describe("the schema", function()
  it("has help, and an example that is valid, for every word", function()
    recipe.environment() -- loads the words of patterns, models and evaluations
    local count = 0
    for path, t in pairs(schema.types()) do
      count = count + 1
      local help = schema.help(path)
      has(t.doc, help)
      for _, field in ipairs(t.fields) do
        assert.truthy(field.doc, path .. "." .. field.name .. " has no doc")
      end
      if t.example and not t.example:find "^%[" then
        local expression = t.example:gsub("^[%w_]+ = ", "")
        local value = recipe.evaluate(expression)
        assert.is_true(schema.is_node(value) or type(value) == "table", t.example)
      end
    end
    assert.is_true(count > 30)
    for name in pairs(schema.groups()) do assert.truthy(schema.help(name), name) end
  end)

  it("prints nodes as recipe text that builds the same node", function()
    for _, text in ipairs { "mass(0.5)", "yarn { to = 4096 }", 'text "books"', "flat {}",
      "stage { context = 512, steps = 3, lr = warmup(0.001), attention = { keep = mass(0.5) } }" } do
      local value = recipe.evaluate(text)
      local again = recipe.evaluate(tostring(value))
      assert.equal(tostring(value), tostring(again))
    end
  end)

  it("checks assignments to nodes", function()
    local value = recipe.evaluate "yarn { to = 4096 }"
    value.to = 8192
    assert.equal(8192, value.to)
    assert.has_error(function() value.too = 1 end)
    assert.has_error(function() value.to = "far" end)
  end)
end)

describe("README", function()
  it("shows recipes that are valid", function()
    local text = assert(fs.read(require("tests.helper").root .. "README.md"))
    local count = 0
    for block in text:gmatch "```lua\n(.-)```" do
      if block:find "recipe \"" then
        count = count + 1
        recipe.resolve(recipe.load_text(block, "README.md"))
      end
    end
    assert.is_true(count > 0)
  end)

  it("names verbs that exist", function()
    local text = assert(fs.read(require("tests.helper").root .. "README.md"))
    local verbs = {}
    for _, verb in ipairs(require("halo.cli").verbs()) do verbs[verb.name] = true end
    local count = 0
    for name in text:gmatch "`halo ([%a]+)" do
      count = count + 1
      assert.is_true(verbs[name], name)
    end
    assert.is_true(count > 5)
  end)
end)

describe("recipes for a device", function()
  local path = require("tests.helper").root .. "recipes/qwen2.5-3b.lua"
  local dir
  setup(function()
    dir = fs.temp_dir()
    fs.write(dir .. "/config.json", json.encode { model_type = "qwen2", hidden_act = "silu", hidden_size = 2048,
      intermediate_size = 11008, max_position_embeddings = 32768, num_attention_heads = 16, num_hidden_layers = 36,
      num_key_value_heads = 2, rms_norm_eps = 1e-6, rope_theta = 1e6, tie_word_embeddings = true, vocab_size = 151936 })
  end)
  teardown(function() fs.remove_tree(dir) end)

  it("resolve and are forecast without one", function()
    local r = recipe.read(path, { "model.from=" .. dir })
    assert.equal("cuda", r.device)
    assert.equal("bf16", r.dtype)
    assert.same({ 32768, 131072, 524288 }, { r.stages[1].context, r.stages[2].context, r.stages[3].context })
    assert.same({ false, false, true }, { r.stages[1].offload, r.stages[2].offload, r.stages[3].offload })
    local f = require("halo.forecast").of(r)
    for i, gib in ipairs { 62, 85, 100 } do -- a step at 128K has to fit into 85 GiB
      assert.is_true(f.stages[i].memory.total < gib * 2 ^ 30, ("stage %d: %.1f GiB"):format(i,
        f.stages[i].memory.total / 2 ^ 30))
    end
    assert.equal(36 * 2048 * 524288 * 2, f.stages[3].memory.host)
  end)

  it("compute in bf16 unless told otherwise, and move inputs only where blocks are recomputed", function()
    assert.equal("f32", recipe.read(path, { "model.from=" .. dir, "dtype=f32" }).dtype)
    assert.equal("f32", recipe.read(path, { "model.from=" .. dir, "device=cpu" }).dtype)
    local ok, e = pcall(recipe.read, path, { "model.from=" .. dir, "model.recompute=none" })
    assert.is_false(ok)
    assert.matches("offload moves block inputs", tostring(e))
  end)
end)
