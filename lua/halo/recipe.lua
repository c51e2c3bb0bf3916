--- Recipes: read, derive, override, check, save.
--
-- A recipe is a Lua file that returns `recipe "name" { ... }` built from constructors
-- (halo.vocabulary). It runs in a small environment: constructors, arithmetic, strings, no files, no
-- clock, no random numbers, so that the same file means the same run everywhere. That is for
-- reproducibility; it is no wall against hostile code. Text only (bytecode is refused), with a limit
-- on instructions, so that a loop without end is an error with a line and not a hang.
--
-- Life of a recipe:
--    load      text -> a tree of nodes (halo.schema), errors carry file:line
--    override  `stages.2.tokens=2e9` typed by the schema
--    resolve   tree -> the plain table below, defaults filled in, stages made complete
--    save      the table as JSON with the run; functions as source and hash
--
-- The resolved table, which training, evaluation and reports read:
--    name, about, seed, dtype, device, deterministic, out, file (where it was read)
--    model      { type, family, layers, width, heads, kv_heads, head_dim, ffn, vocab, context, tie, eps,
--                 init, recompute, offload, rope }, a config of halo.model; type = "hf" has `from` (a folder)
--                 too, and its sizes come from config.json. rope = { scheme, theta, factor, ... } of
--                 halo.rope
--    tokenizer  { type = "byte" } or { type = "bpe", from }
--    mesh       { dp, cp }
--    data       { type, ... }, see `halo help data`
--    optim      { lr = { peak, steps, decay, to, over }, betas, decay, clip, eps }
--    stages     list of { name, context, tokens, steps, batch, accumulate, first_step, last_step,
--                 rope, attention, offload, lr, data }; every field in full, but data is nil where the stage does
--                 not change it. lr has `first_step` and `last_step`, the
--                 steps (counted from 1 over the run) that its shape spans
--    attention  { type, ..., dense = { layers, below }, ring = { type, layout, block, inner }, frozen }
--    every      list of { steps = n, actions = { { type, ... }, ... } }, n ascending
--    initially, finally   lists of actions
--    guard      list of { type, ..., act }
--    total      { steps, tokens }
-- An action written as a function is { type = "function", source, hash, line, call }.
local args = require "halo.args"
local devices = require "halo.device"
local errors = require "halo.errors"
local fs = require "halo.fs"
local json = require "halo.json"
local schema = require "halo.schema"
local vocabulary = require "halo.vocabulary"

local M = {}

-- A recipe that has run this many VM instructions without returning is taken to be in a loop without
-- end: about two seconds of the interpreter.
local INSTRUCTION_LIMIT = 2e8

---- The environment -------------------------------------------------------------------------------

local function copy_without(t, ...)
  local out = {}
  for key, value in pairs(t) do out[key] = value end
  for _, key in ipairs { ... } do out[key] = nil end
  return out
end

--- A fresh environment with every constructor.
-- @tparam[opt] string folder where `extend` and `require` look; absent at the prompt
function M.environment(folder)
  vocabulary.load_modules()
  local env = {
    K = 1024, M = 1e6, B = 1e9,
    math = copy_without(math, "random", "randomseed"),
    string = copy_without(string, "dump"),
    table = copy_without(table),
    ipairs = ipairs, pairs = pairs, tonumber = tonumber, tostring = tostring, type = type,
    select = select, unpack = unpack, assert = assert, error = error, print = print,
    here = folder,
  }
  local names = args.keys(env)
  local function no_global(_, name)
    schema.complain(schema.caller(), ('unknown name "%s"%s'):format(tostring(name), args.did_you_mean(name, names)))
  end
  for path in pairs(schema.types()) do
    local space, word = path:match "^(%w+)%.([%w_]+)$"
    if space then
      if not rawget(env, space) then
        env[space] = setmetatable({}, {
          __index = function(t, name)
            schema.complain(schema.caller(), ("%s.%s does not exist%s"):format(space, tostring(name),
              args.did_you_mean(name, args.keys(t))))
          end,
        })
        names[#names + 1] = space
      end
      rawset(env[space], word, schema.constructor(path))
    else
      env[path] = schema.constructor(path)
      names[#names + 1] = path
    end
  end
  if folder then
    names[#names + 1], names[#names + 2] = "extend", "require"
    function env.extend(path) return M.extend(fs.join(folder, path)) end
    function env.require(name) return M.require(folder, name) end
  end
  table.sort(names)
  return setmetatable(env, {
    __index = no_global,
    __newindex = function(t, name, value)
      -- Assigning a global is nearly always a forgotten `local`; say so rather than leak it.
      if folder then
        schema.complain(schema.caller(), ('assigns the global "%s"; write local %s = ...'):format(tostring(name),
          tostring(name)))
      end
      rawset(t, name, value)
    end,
  })
end

-- Run a chunk with the instruction limit. The hook is not called in compiled code, so the chunk and
-- the functions inside it stay interpreted.
local function run_limited(chunk, what)
  jit.off(chunk, true)
  local count = 0
  local old, mask, every = debug.gethook()
  debug.sethook(function()
    count = count + 1e6
    if count > INSTRUCTION_LIMIT then
      debug.sethook()
      schema.complain(schema.caller(), what .. " runs too long; is there a loop without end?")
    end
  end, "", 1e6)
  local results = { pcall(chunk) }
  debug.sethook(old, mask, every)
  if not results[1] then error(results[2], 0) end
  return results[2]
end

local function compile(text, chunkname, env)
  if text:byte(1) == 27 then
    errors.raise("usage", chunkname:sub(2) .. ": is bytecode; a recipe is Lua text", 0)
  end
  local chunk, why = loadstring(text, chunkname)
  if not chunk then error(errors.new { class = "usage", message = why }, 0) end
  schema.register_source(chunkname, text)
  return setfenv(chunk, env)
end

-- Recipes being loaded, to refuse circles.
local loading = {}

-- Whatever the file returns.
local function run_file(path)
  local text, why = fs.read(path)
  if not text then errors.raise("usage", why, 0) end
  local key = fs.realpath(path) or path
  if loading[key] then errors.raise("usage", path .. ": extends or requires itself", 0) end
  loading[key] = true
  local ok, result = pcall(function()
    return run_limited(compile(text, "@" .. path, M.environment(fs.dirname(path))), path)
  end)
  loading[key] = nil
  if not ok then
    -- A plain Lua error in the recipe ("attempt to index a nil value") already names file and line.
    error(errors.is(result) and result or errors.new { class = "usage", message = tostring(result) }, 0)
  end
  return result
end

local function is_recipe(v) return schema.is_node(v) and schema.type_of(v).name == "recipe" end

--- Read a recipe file.
-- @tparam string path file
-- @treturn node the recipe, not yet resolved
-- @raise class usage, with file and line
function M.load(path)
  local result = run_file(path)
  if not is_recipe(result) then
    errors.raise("usage", ('%s: must return recipe "name" { ... }, returned %s'):format(path,
      schema.is_node(result) and schema.signature(schema.type_of(result)) or args.describe(result)), 0)
  end
  return result
end

--- Read a recipe from text (tests, the prompt).
function M.load_text(text, name)
  local chunkname = "@" .. (name or "recipe")
  local ok, result = pcall(function()
    return run_limited(compile(text, chunkname, M.environment "."), name or "recipe")
  end)
  if not ok then
    error(errors.is(result) and result or errors.new { class = "usage", message = tostring(result) }, 0)
  end
  if not is_recipe(result) then
    errors.raise("usage", ('%s: must return recipe "name" { ... }'):format(name or "recipe"), 0)
  end
  return result
end

--- `extend("base.lua") { ... }`: the base recipe with some fields changed; maps and nodes are merged,
-- lists replaced.
function M.extend(path)
  local base = M.load(path)
  local place = schema.caller()
  return function(changes)
    if type(changes) ~= "table" then
      schema.complain(place, "extend wants a table { ... }, got " .. args.describe(changes))
    end
    return schema.merge(schema.copy(base), changes, place)
  end
end

--- `require "recipes.x"` inside a recipe: a Lua file beside it or below its parent folder, run in the
-- same kind of environment.
function M.require(folder, name)
  local relative = name:gsub("%.", "/") .. ".lua"
  for _, root in ipairs { folder, fs.join(folder, "..") } do
    local path = fs.join(root, relative)
    if fs.is_file(path) then return run_file(path) end
  end
  schema.complain(schema.caller(), ('require "%s": no %s beside this recipe or in the folder above'):format(name,
    relative))
end

---- Overrides -------------------------------------------------------------------------------------

--- Value of a recipe expression: `yarn { to = 32*K }`, `mass(0.9)`, `2e9`.
function M.evaluate(text)
  local chunk, why = loadstring("return " .. text, "=command line")
  schema.register_source("=command line", text)
  if not chunk then
    error(errors.new { class = "usage", message = ("cannot read %s: %s"):format(text, why:gsub("^.-:%d+: ", "")) }, 0)
  end
  local ok, result = pcall(run_limited, setfenv(chunk, M.environment()), text)
  if not ok then
    error(errors.new { class = "usage", message = ("cannot read %s: %s"):format(text,
      tostring(result):gsub("^command line:%d+: ", "")) }, 0)
  end
  return result
end

--- Apply `path=value` texts to a recipe, in order; changes and returns it.
function M.override(recipe, overrides)
  for _, text in ipairs(overrides or {}) do
    local path, value = text:match "^([%w_.%-]+)=(.*)$"
    if not path then
      errors.raise("usage", ('"%s" is no override; write name=value, as stages.1.steps=20'):format(text), 0)
    end
    if path == "stages" and tonumber(value) then
      -- `stages=1` keeps the first stages only.
      local stages = recipe.stages or {}
      local n = tonumber(value)
      if n < 1 or n > #stages or n ~= math.floor(n) then
        errors.raise("usage", ("stages=%s: the recipe has %d stages"):format(value, #stages), 0)
      end
      local kept = {}
      for i = 1, n do kept[i] = stages[i] end
      recipe.stages = kept
    else
      schema.override(recipe, path, value, M.evaluate)
    end
  end
  return recipe
end

---- Resolving -------------------------------------------------------------------------------------

-- FNV-1a, 64 bits: names a function's text in the resolved recipe.
local function hash_text(text)
  local h = 0xcbf29ce484222325ULL
  for i = 1, #text do h = bit.bxor(h, text:byte(i)) * 0x100000001b3ULL end
  return bit.tohex(h)
end

-- A function action: its own lines of the recipe file and their hash.
local function describe_function(f)
  local info = debug.getinfo(f, "S")
  local source
  local text = info.source:sub(1, 1) == "@" and fs.read(info.source:sub(2))
  if text then
    local lines, number = {}, 0
    for line in (text .. "\n"):gmatch "(.-)\n" do
      number = number + 1
      if number >= info.linedefined and number <= info.lastlinedefined then lines[#lines + 1] = line end
    end
    source = table.concat(lines, "\n")
  end
  return { type = "function", source = source, hash = source and hash_text(source), line = info.linedefined, call = f }
end

local function as_list(v)
  if v == nil then return {} end
  if schema.is_node(v) or type(v) == "function" then return { v } end
  return v
end

local function resolve_actions(v)
  local out = json.array {}
  for i, action in ipairs(as_list(v)) do out[i] = schema.resolve_value(action, describe_function) end
  return out
end

-- The sizes of an HF folder, in the words of halo.model's configs.
local function read_hf(model, place)
  local from = model.from
  if not fs.is_dir(from) then
    schema.complain(place, ("model.hf: no folder %s (paths start where halo was started)"):format(from), "from")
  end
  local rope = model.rope
  for key, value in pairs(require("halo.model").read_config(from)) do
    if key ~= "hf" then model[key] = value end
  end
  model.own_rope = model.rope
  model.rope = rope or model.rope
end

-- A position scheme in the words of halo.rope: scheme, theta, factor, original and the rest.
local function finish_rope(rope, model, place)
  local own = model.own_rope
  rope.scheme, rope.type = rope.scheme or rope.type, nil
  rope.theta = rope.theta or (own and own.theta) or model.rope_theta
  if rope.scheme == "default" or rope == own then return rope end
  rope.original = rope.original or (own and own.scheme == rope.scheme and own.original) or model.context
  if rope.to then
    if rope.to < rope.original then
      schema.complain(place, ("%s: to = %d is shorter than the original context, %d"):format(rope.scheme, rope.to,
        rope.original), "to")
    end
    rope.factor = rope.to / rope.original
  end
  if not rope.factor then schema.complain(place, rope.scheme .. " needs factor or to", "rope") end
  return rope
end

-- Node of a field that a stage may replace or change in part.
local function staged(base, changes, group, place)
  if changes == nil then return base end
  if schema.is_node(changes) then return changes end
  if not base then schema.complain(place, group .. ": nothing to change here; name a scheme", group) end
  return schema.merge(schema.copy(base), changes, place)
end

-- One stage in full, with its first and last step; `before` is the stage before it.
local function resolve_stage(recipe, out, node, i, before)
  local place, set = schema.place_of(node), schema.values_of(node)
  local stage = schema.resolve(node)
  local per_step = stage.batch * stage.context
  stage.name = stage.name or tostring(i)
  stage.steps = stage.steps or math.ceil(stage.tokens / per_step)
  stage.tokens = stage.steps * per_step
  stage.first_step = before and before.last_step + 1 or 1
  stage.last_step = stage.first_step + stage.steps - 1
  stage.attention = schema.resolve(staged(recipe.attention, set.attention, "attention", place))
  if stage.offload == nil then stage.offload = out.model.offload end
  stage.data = set.data and schema.resolve(staged(recipe.data, set.data, "data", place))
  -- Each stage's scheme stays until another stage changes it.
  local rope = staged(before and before.rope_node or recipe.model.rope, set.rope, "rope", place)
  stage.rope_node = rope
  stage.rope = rope and finish_rope(schema.resolve(rope), out.model, place) or out.model.rope
  return stage
end

-- The rate of a stage: its own over its own steps, or the optimizer's over the whole run.
local function resolve_rate(recipe, out, stage, last_step)
  local own = stage.lr ~= nil
  local lr = stage.lr or schema.resolve_value(out.optim.lr)
  lr.first_step = own and stage.first_step or 1
  lr.last_step = own and stage.last_step or last_step
  local span = lr.last_step - lr.first_step + 1
  if lr.steps > span then
    schema.complain(recipe, ("stage %s: the rate rises for %d steps, but the %s has only %d"):format(stage.name,
      lr.steps, own and "stage" or "run", span), "lr")
  end
  stage.lr, stage.rope_node = lr, nil
end

local function resolve_stages(recipe, out)
  local stages = {}
  for i, node in ipairs(schema.values_of(recipe).stages or {}) do
    stages[i] = resolve_stage(recipe, out, node, i, stages[i - 1])
  end
  if #stages == 0 then schema.complain(recipe, "recipe needs at least one stage", "stages") end
  local last_step = stages[#stages].last_step
  for _, stage in ipairs(stages) do resolve_rate(recipe, out, stage, last_step) end
  -- A trial of a few steps is the beginning of the run, with the rates of the whole.
  local tokens, kept = 0, {}
  last_step = math.min(last_step, out.steps or last_step)
  for i, stage in ipairs(stages) do
    if stage.first_step > last_step then break end
    stage.last_step = math.min(stage.last_step, last_step)
    stage.steps = stage.last_step - stage.first_step + 1
    stage.tokens = stage.steps * stage.batch * stage.context
    tokens = tokens + stage.tokens
    kept[i] = stage
  end
  out.stages = kept
  out.total = { steps = last_step, tokens = tokens }
end

-- A mix names its sources once.
local function check_mix(data, complain)
  if data.type ~= "mix" then return end
  if (data.sources ~= nil) == (data.from ~= nil) then complain("mix needs sources or from, and not both", "mix") end
  local names = args.keys(data.sources or {})
  for name in pairs(data.sources and data.weights or {}) do
    if not data.sources[name] then
      complain(('mix: weights names "%s"%s'):format(name, args.did_you_mean(name, names)), name)
    end
  end
end

-- Rules between parts of the recipe.
local function check_whole(recipe, out)
  local function complain(message, word) schema.complain(recipe, message, word) end
  for _, stage in ipairs(out.stages) do
    local attention = stage.attention
    local inner = attention.ring.inner
    if type(inner) == "number" and out.mesh.cp % inner ~= 0 then
      complain(("stage %s: inner = %d must divide mesh.cp = %d"):format(stage.name, inner, out.mesh.cp), "inner")
    end
    for _, layer in ipairs(attention.dense and attention.dense.layers or {}) do
      if out.model.layers and layer > out.model.layers then
        complain(("attention.dense.layers names layer %d, the model has %d"):format(layer, out.model.layers), "layers")
      end
    end
    if (stage.batch / stage.accumulate) % out.mesh.dp ~= 0 then
      complain(("stage %s: batch / accumulate = %g sequences cannot be shared by mesh.dp = %d"):format(stage.name,
        stage.batch / stage.accumulate, out.mesh.dp), "batch")
    end
  end
  for _, stage in ipairs(out.stages) do
    if stage.offload and out.model.recompute ~= "block" then
      complain(('stage %s: offload moves block inputs, and with recompute = "none" all else stays; use '
        .. 'recompute = "block"'):format(stage.name), "offload")
    end
  end
  check_mix(out.data, complain)
  for _, stage in ipairs(out.stages) do
    if stage.data then check_mix(stage.data, complain) end
  end
end

local function drop_functions(v)
  if type(v) ~= "table" then return v end
  local out = setmetatable({}, getmetatable(v))
  for key, item in pairs(v) do
    if type(item) ~= "function" then out[key] = drop_functions(item) end
  end
  return out
end

--- The plain table of a recipe (see the top of this file).
-- @param recipe node from `M.load`
-- @raise class usage when a field is missing or parts do not fit, class data when a model folder is broken
function M.resolve(recipe)
  local values = schema.values_of(recipe)
  local shell = schema.copy(recipe)
  for _, part in ipairs { "stages", "every", "initially", "finally" } do schema.values_of(shell)[part] = nil end
  schema.values_of(shell).stages = {}
  local out = schema.resolve(shell)
  out.dtype = out.dtype or (out.device == "cuda" and "bf16" or "f32")
  local model_place = schema.place_of(values.model)
  if out.model.type == "hf" then
    read_hf(out.model, model_place)
  else
    out.model.family = out.model.type
    out.model.ffn = out.model.ffn or math.ceil(out.model.width * 8 / 3 / 32) * 32
    out.model.context = out.model.context or (values.stages and values.stages[1] and values.stages[1].context)
  end
  out.tokenizer = out.tokenizer
    or (out.model.type == "hf" and { type = "bpe", from = out.model.from } or { type = "byte" })
  if out.model.type ~= "hf" then
    out.model.vocab = out.model.vocab or vocabulary.tokenizer_size(out.tokenizer)
  end
  out.model.rope = finish_rope(out.model.rope, out.model, model_place)
  resolve_stages(recipe, out)
  for _, s in ipairs(out.stages) do s.attention.ring.block = s.attention.ring.block or devices.block[out.device] end
  if out.attention then out.attention.ring.block = out.attention.ring.block or devices.block[out.device] end
  out.model.own_rope = nil
  out.initially, out.finally = resolve_actions(values.initially), resolve_actions(values.finally)
  local cadences = {}
  for steps in pairs(values.every or {}) do cadences[#cadences + 1] = steps end
  table.sort(cadences)
  out.every = json.array {}
  for i, steps in ipairs(cadences) do
    out.every[i] = { steps = steps, actions = resolve_actions(values.every[steps]) }
  end
  check_whole(recipe, out)
  out.file = schema.place_of(recipe).file
  return out
end

--- Resolved data for a path that stands in for a run's own, keeping what is said about it.
function M.resolve_data(path, old)
  local data = schema.resolve(schema.construct("text", { from = path }))
  data.holdout = old and old.holdout or data.holdout
  return data
end

--- Load, override and resolve in one go.
function M.read(path, overrides) return M.resolve(M.override(M.load(path), overrides)) end

--- JSON text of a resolved recipe; functions are left out, their source and hash stay.
function M.to_json(resolved) return json.encode(drop_functions(resolved), { pretty = true }) .. "\n" end

--- Write `recipe.lua` (as written) and `recipe.resolved.json` into a run's folder.
function M.save(resolved, folder)
  local text = fs.read(resolved.file)
  if text then fs.write(fs.join(folder, "recipe.lua"), text) end
  fs.write(fs.join(folder, "recipe.resolved.json"), M.to_json(resolved))
end

return M
