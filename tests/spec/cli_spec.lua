--- The program as a user meets it: verbs, one-line complaints, exit codes.
local fs = require "halo.fs"
local json = require "halo.json"
local process = require "halo.process"

local halo = process.halo()

-- Run the program. Returns exit code, standard output, standard error.
local function run(words, input)
  local dir = fs.temp_dir()
  fs.write(dir .. "/in", input or "")
  local quoted = {}
  for i, word in ipairs(words) do quoted[i] = process.quote(word) end
  local status = os.execute(("%s %s < %s/in > %s/out 2> %s/err"):format(process.quote(halo),
    table.concat(quoted, " "), dir, dir, dir))
  local out, err = fs.read(dir .. "/out"), fs.read(dir .. "/err")
  fs.remove_tree(dir)
  return math.floor(status / 256), out, err
end

local function has(part, text) assert.truthy(text:find(part, 1, true), ("%q lacks %q"):format(text, part)) end

-- Bad usage: exit code 2 and one helpful line.
local function complains(part, words)
  local code, out, err = run(words)
  assert.equal(2, code)
  assert.equal("", out)
  has(part, err)
  assert.equal(1, select(2, err:gsub("\n", "")), err)
end

local recipe = [[
return recipe "small" {
  model = model.qwen2 { layers = 2, width = 32, heads = 4, kv_heads = 2 },
  data = text { from = FOLDER },
  optim = adamw { lr = 1e-3 },
  attention = sparse.vertical_slash { keep = mass(0.9), ring = flat { block = 16 } },
  mesh = { cp = 2 },
  stages = { stage { context = 128, steps = 3, batch = 2 } },
}
]]

local dir
setup(function()
  dir = fs.temp_dir()
  fs.mkdir(dir .. "/text")
  fs.write(dir .. "/text/a.txt", ("All happy families are alike; "):rep(200))
  fs.write(dir .. "/small.lua", (recipe:gsub("FOLDER", ("%q"):format(dir .. "/text"))))
  process.setenv("HALO_CACHE", dir .. "/cache")
  process.setenv("NO_COLOR", "1")
end)
teardown(function() fs.remove_tree(dir) end)

describe("halo", function()
  it("explains itself and every verb, with an example", function()
    local code, out = run { "--help" }
    assert.equal(0, code)
    for _, verb in ipairs(require("halo.cli").verbs()) do
      has(verb.name, out)
      local verb_code, text = run { verb.name, "--help" }
      assert.equal(0, verb_code)
      has("example: halo " .. verb.name, text)
    end
  end)

  it("says its version", function()
    local code, out = run { "version" }
    assert.equal(0, code)
    assert.truthy(out:match "^halo %d+%.%d+%.%d+ ")
    assert.equal(out, select(2, run { "--version" }))
  end)

  it("complains about bad usage in one line that helps", function()
    complains("unknown command 'rnu' (did you mean 'run'?)", { "rnu" })
    complains("a command is required", {})
    complains("missing argument 'recipe'; see halo run --help", { "run" })
    complains("unknown option '--bogus'", { "check", "x.lua", "--bogus" })
    complains("'x' is not a count", { "check", "x.lua", "--ranks", "x" })
    complains("no recipe nowhere.lua", { "check", "nowhere.lua" })
    complains("missing option '--tokenizer'", { "tokenize", "file" })
    complains('there is no evaluation "pl" (did you mean "ppl"?)', { "eval", "pl", dir })
    complains("is neither a run, nor a checkpoint, nor a model folder", { "eval", "ppl", dir })
    complains("is no run folder", { "plot", dir })
    complains('no help for "stge" (did you mean "stage"?)', { "help", "stge" })
    complains("cannot read /no/such.lua", { "exec", "/no/such.lua" })
  end)

  it("says what is missing on this machine, with exit code 3", function()
    process.setenv("HALO_LUA", "/no/such/tree")
    local code, _, err = run { "version" }
    process.unsetenv "HALO_LUA"
    assert.equal(3, code)
    has("no Lua files at /no/such/tree", err)
    local old = os.getenv "HALO_LIB"
    process.setenv("HALO_LIB", "/no/such/library.so")
    local doctor_code, out = run { "doctor" }
    if old then process.setenv("HALO_LIB", old) else process.unsetenv "HALO_LIB" end
    assert.equal(3, doctor_code)
    has("FAIL library", out)
    has("fix: ", out)
  end)

  it("tells memory from data by the exit code", function()
    fs.write(dir .. "/oom.lua", "halo.tensor.zeros { 100000, 100000, 1000 }")
    local code, _, err = run { "exec", dir .. "/oom.lua" }
    assert.equal(4, code)
    has("out of memory", err)
    fs.mkdir(dir .. "/broken")
    fs.write(dir .. "/broken/config.json", "{")
    code, _, err = run { "inspect", dir .. "/broken" }
    assert.equal(5, code)
    has("config.json is not valid JSON", err)
  end)

  it("has help for words, groups, functions, ops and topics", function()
    has("length of a sequence", select(2, run { "help", "stage" }))
    has("yarn", select(2, run { "help", "rope" }))
    has("atomically", select(2, run { "help", "fs.write" }))
    has("matmul", select(2, run { "help", "matmul" }))
    has("75", select(2, run { "help", "exit-codes" }))
  end)

  it("names every variable that is for users", function()
    local internal = { HALO_TTY = true, HALO_REPL_TTY = true, HALO_SHADOW_BYTES = true }
    local text = select(2, run { "help", "environment" })
    local found = 0
    local lines = assert(io.popen("grep -rhE '\"HALO_[A-Z0-9_]+\"' --include='*.c' --include='*.cu' --include='*.lua' "
      .. "core kernels lua", "r"))
    for line in lines:lines() do
      for name in line:gmatch '"(HALO_[A-Z0-9_]+)"' do
        if not internal[name] and not line:find "case HALO_" then -- names of status codes
          found = found + 1
          assert(text:find("%f[%w_]" .. name .. "%f[^%w_]"), name .. " is not in `halo help environment`")
        end
      end
    end
    lines:close()
    assert.is_true(found >= 10)
  end)
end)

describe("halo check", function()
  local function check(...) return run { "check", dir .. "/small.lua", ... } end

  it("prints stages, sizes and the forecast", function()
    local code, out = check()
    assert.equal(0, code)
    has("2 layers, width 32, 4/2 heads of 8", out)
    has("2 = dp 1 x cp 2", out)
    has("forecast, per rank", out)
  end)

  it("takes overrides and ranks, and refuses wrong ones", function()
    local code, out = check("stages.1.steps=7", "--ranks", "4")
    assert.equal(0, code)
    has("4 = dp 1 x cp 4", out)
    has("run     7 steps", out)
    complains('has no "stpes" (did you mean "steps"?)', { "check", dir .. "/small.lua", "stages.1.stpes=7" })
    complains("batch / accumulate = 2", { "check", dir .. "/small.lua", "mesh.dp=3" })
  end)

  it("points at the line of a wrong field", function()
    fs.write(dir .. "/wrong.lua", (fs.read(dir .. "/small.lua"):gsub("mesh =", "mash =")))
    complains('wrong.lua:6: recipe has no field "mash" (did you mean "mesh"?)', { "check", dir .. "/wrong.lua" })
  end)

  it("gives the resolved recipe and the forecast as JSON", function()
    local code, out = check "--json"
    assert.equal(0, code)
    local value = json.decode(out)
    assert.equal(3, value.recipe.total.steps)
    assert.is_true(value.forecast.peak.total > 0)
    assert.equal(2, value.forecast.ranks)
  end)
end)

describe("halo tokenize", function()
  it("prints ids on one line, and gives the text back", function()
    fs.write(dir .. "/t.txt", "naïve 1\n")
    local code, out = run { "tokenize", "--tokenizer", "byte", dir .. "/t.txt" }
    assert.equal(0, code)
    assert.equal("110 97 195 175 118 101 32 49 10\n", out)
    local _, text = run({ "tokenize", "-t", "byte", "--decode", "-" }, out)
    assert.equal("naïve 1\n", text)
  end)

  it("refuses ids that the tokenizer does not have, with class data", function()
    local code, _, err = run({ "tokenize", "-t", "byte", "-d", "-" }, "1 99999")
    assert.equal(5, code)
    has('"99999" is no id of this tokenizer', err)
  end)
end)

describe("halo exec", function()
  it("runs plain Lua with halo, arg and an exit code", function()
    fs.write(dir .. "/s.lua", "print(arg[1], ..., halo.K, tensor == nil) return 3")
    fs.write(dir .. "/t.lua", "print(arg[0]:match 't.lua', arg[1], halo.tensor.zeros { 2 }.count, ...) return 3")
    local code, out = run { "exec", dir .. "/t.lua", "--flag", "x" }
    assert.equal(3, code)
    assert.equal("t.lua\t--flag\t2\t--flag\tx\n", out)
    local bad, _, err = run { "exec", dir .. "/s.lua" }
    assert.equal(2, bad)
    has('s.lua:1: unknown name "tensor"', err)
  end)

  it("shows a traceback only with --trace", function()
    fs.write(dir .. "/e.lua", "local function f() error 'no' end f()")
    local _, _, short = run { "exec", dir .. "/e.lua" }
    local _, _, long = run { "--trace", "exec", dir .. "/e.lua" }
    assert.falsy(short:find "traceback")
    has("stack traceback", long)
  end)
end)

describe("halo convert and inspect", function()
  it("pack text into a token file that says what it holds", function()
    local code, out = run { "convert", dir .. "/text", dir .. "/t.tokens", "-t", "byte", "--verify" }
    assert.equal(0, code)
    has("1 documents", out)
    local _, text = run { "inspect", dir .. "/t.tokens", "-t", "byte" }
    has("6K tokens in 1 documents", text)
    has("All happy", text)
  end)

  it("need a tokenizer for text", function()
    complains("text needs a tokenizer", { "convert", dir .. "/text", dir .. "/x" })
  end)
end)

describe("halo run", function()
  local folder

  it("starts the ranks itself, trains, and leaves a run folder", function()
    folder = dir .. "/run"
    local code, out, err = run { "run", dir .. "/small.lua", "--out", folder }
    assert.equal(0, code, err)
    has("2 ranks", err)
    has("report", out)
    local resolved = json.read(folder .. "/recipe.resolved.json")
    assert.equal(2, resolved.mesh.cp)
    local losses = {}
    for line in fs.read(folder .. "/train.jsonl"):gmatch "[^\n]+" do
      local record = json.decode(line)
      if record.kind == "step" then losses[#losses + 1] = record.loss end
    end
    assert.equal(3, #losses)
    assert.is_true(losses[3] < losses[1])
  end)

  it("refuses a job of another size than the mesh", function()
    process.setenv("OMPI_COMM_WORLD_SIZE", 4)
    local code, _, err = run { "run", dir .. "/small.lua" }
    process.unsetenv "OMPI_COMM_WORLD_SIZE"
    assert.equal(2, code)
    has("wants 2 ranks, this job has 4; try mesh.cp=4", err)
  end)

  it("ends all ranks when one of them fails, and says which", function()
    local text = fs.read(dir .. "/small.lua"):gsub("stages =",
      'every = { [2] = function(run) if run.job.rank == 1 then error "planted" end end },\n  stages =')
    fs.write(dir .. "/planted.lua", text)
    local code, _, err = run { "run", dir .. "/planted.lua", "--out", dir .. "/planted" }
    assert.equal(70, code)
    has("error: rank 1: ", err)
    has("planted.lua:7: planted", err)
  end)

  it("is drawn by plot and shown by inspect", function()
    local code, out = run { "plot", folder }
    assert.equal(0, code)
    has("report.html", out)
    has("<svg", fs.read(folder .. "/report.html"))
    has("step 3 of 3", select(2, run { "inspect", folder }))
  end)
end)
