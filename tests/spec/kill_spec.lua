--- A run that is killed and resumed is the run that was not killed, to the last bit.
--
-- A short version of the tiny run (2 MPI ranks, three contexts, sparse ring attention) is done once in
-- one go. Then it is started again and again; each time one rank is killed with SIGKILL at a random
-- moment, until it gets through; every step's loss and gradient norm and the hash of the final weights
-- must equal those of the undisturbed run. HALO_KILLS sets how many kills (default 4; the project's own
-- bar is 20).
local helper = require "tests.helper"
local fs = require "halo.fs"
local json = require "halo.json"
local process = require "halo.process"

local RECIPE = [[
return recipe "kill" {
  model = model.qwen2 { layers = 2, width = 64, heads = 4, kv_heads = 2, ffn = 160, tie = true },
  attention = sparse.vertical_slash { keep = mass(0.9), sink = 8, window = 32 },
  mesh = { cp = 2 },
  data = mix { sources = { text = text "%s", needles = needles { digits = 3 } } },
  optim = adamw { lr = warmup(1e-3, { steps = 4 }) :cosine { to = 1e-4 } },
  stages = {
    stage { context = 256, steps = 12, batch = 2 },
    stage { context = 512, steps = 8, batch = 2, accumulate = 2, rope = yarn { factor = 2 } },
    stage { context = 1024, steps = 6, batch = 1, rope = yarn { factor = 4 } },
  },
  every = { [3] = save { keep = 2 } },
}
]]

local function sleep(seconds) os.execute(("sleep %.2f"):format(seconds)) end

describe("kill -9 of a rank #slow", function()
  local dir = os.tmpname()
  os.remove(dir)
  fs.mkdir(dir)
  local recipe = dir .. "/kill.lua"
  fs.write(recipe, RECIPE:format(helper.root .. "README.md"))
  teardown(function() fs.remove_tree(dir) end)

  -- Start the run in the background; returns the file that gets its exit code.
  local function start(out, resume)
    local log, done = out .. ".log", out .. ".done"
    os.remove(done)
    os.execute(("{ %s run %s --out %s %s; echo $? >%s; } >>%s 2>&1 </dev/null &"):format(
      process.quote(process.halo()), process.quote(recipe), process.quote(out),
      resume and "--resume " .. process.quote(out) or "", process.quote(done), process.quote(log)))
    return done
  end

  -- Process ids of programs whose command line names the run's folder and begins with a word.
  local function processes_of(out, word)
    local list = {}
    for _, entry in ipairs(fs.list "/proc") do
      local pid = entry:match "^%d+$"
      local command = pid and fs.read("/proc/" .. pid .. "/cmdline")
      if command and command:find(out, 1, true) and command:match "^[^%z]*":find(word, 1, true) then
        list[#list + 1] = pid
      end
    end
    return list
  end

  -- Process ids of the run's ranks: those whose environment says that a launcher started them.
  local function ranks_of(out)
    local list = {}
    for _, pid in ipairs(processes_of(out, "halo")) do
      local environment = fs.read("/proc/" .. pid .. "/environ")
      if environment and environment:find("OMPI_COMM_WORLD_RANK=", 1, true) then list[#list + 1] = pid end
    end
    return list
  end

  local function wait_for(done, seconds)
    for _ = 1, seconds * 20 do
      if fs.exists(done) then return tonumber(fs.read(done)) end
      sleep(0.05)
    end
    return nil
  end

  -- Loss and norm of every step, and the hash of the final weights.
  local function history(out)
    local steps, final = {}, nil
    for line in fs.read(out .. "/train.jsonl"):gmatch "[^\n]+" do
      local r = json.decode(line)
      if r.kind == "step" then steps[r.step] = ("%a %a"):format(r.loss, r.gnorm) end
      if r.kind == "end" then final = r.weights end
    end
    return steps, final
  end

  it("leaves the same losses and weights", function()
    local whole = dir .. "/whole"
    local started = os.time()
    local done = start(whole)
    assert.are.equal(0, wait_for(done, 120), fs.read(whole .. ".log"))
    local length = math.max(1, os.difftime(os.time(), started))
    local expected, weights = history(whole)
    assert.are.equal(26, #expected)
    assert.is_truthy(weights)

    local kills, wanted, runs = 0, tonumber(os.getenv "HALO_KILLS" or "4"), 0
    math.randomseed(20)
    while kills < wanted do
      runs = runs + 1
      local out, killed_here = dir .. "/killed" .. runs, 0
      local finished
      repeat
        -- A kill before the first checkpoint leaves nothing to resume: the run begins again.
        local resume = fs.exists(out .. "/ckpt/LATEST")
        if not resume then fs.remove_tree(out) end
        local mark = start(out, resume)
        -- Early kills come before the first checkpoint, late ones in the last stage.
        local moment = math.random() * length * 0.9
        local code = wait_for(mark, math.max(0.2, moment))
        if code == nil and kills < wanted and killed_here < 5 then
          local ranks = ranks_of(out)
          if #ranks > 0 then
            os.execute("kill -9 " .. ranks[math.random(#ranks)])
            kills, killed_here = kills + 1, killed_here + 1
          end
        end
        code = code or wait_for(mark, 15)
        if code == nil and #ranks_of(out) == 0 then
          -- Open MPI 4.1.4 now and then stays although its ranks are gone (seen once in about thirty
          -- kills on a loaded machine): what is tested is the run, so let the launcher go, too.
          for _, pid in ipairs(processes_of(out, "mpirun")) do os.execute("kill -9 " .. pid) end
        end
        code = code or wait_for(mark, 120)
        assert.is_truthy(code, "a run neither ended nor died: " .. (fs.read(out .. ".log") or ""))
        finished = code == 0
      until finished
      local steps, final = history(out)
      assert.are.same(expected, steps)
      assert.are.equal(weights, final)
      fs.remove_tree(out)
    end
    print(("%d kills over %d runs, all as the undisturbed one"):format(kills, runs))
  end)
end)
