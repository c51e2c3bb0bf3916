--- Checkpoints: save a run so that it continues bit for bit, on any number of ranks.
-- A checkpoint is a folder that Transformers loads as it is, with optimizer state, data cursor and a
-- sealed manifest beside the weights; it appears whole or not at all (core/checkpoint.c tells how).
--
--    local checkpoint = require "halo.checkpoint"
--    local path, why = checkpoint.save { dir = "runs/a/ckpt", step = 500, model = model.parameters,
--      optimizer = opt, state = { guards = { ... } } }
--    if not path then print("not saved: " .. why) end       -- the run goes on; older ones are untouched
--    local state, from = checkpoint.load { dir = "runs/a/ckpt", model = model.parameters, optimizer = opt }
--
-- `save`, `load` and the two for jobs are collective: every process of the communicator calls them.
-- Whether a save succeeded is the same answer on every rank.
local ffi = require "ffi"
local args = require "halo.args"
local errors = require "halo.errors"
local fs = require "halo.fs"
local halo_ffi = require "halo.ffi"
local json = require "halo.json"
local safetensors = require "halo.safetensors"
local tensor = require "halo.tensor"

local C, check = halo_ffi.C, halo_ffi.check

local M = {}

-- ---- state as JSON, exactly ---------------------------------------------------------------------

-- What JSON cannot say is wrapped in a table with one key that begins with a dollar sign: numbers that
-- are not finite or are minus zero, 64-bit integers, and tables whose keys are not all strings.
local function pack_value(v)
  local kind = type(v)
  if kind == "number" then
    if v ~= v then return { ["$number"] = "nan" } end
    if v == math.huge or v == -math.huge then return { ["$number"] = v > 0 and "inf" or "-inf" } end
    if v == 0 and 1 / v < 0 then return { ["$number"] = "-0" } end
    return v
  elseif kind == "cdata" then
    if ffi.istype("uint64_t", v) then return { ["$u64"] = tostring(v):match "%d+" } end
    if ffi.istype("int64_t", v) then return { ["$i64"] = tostring(v):match "-?%d+" } end
  elseif kind == "table" then
    local out = {}
    if json.is_array(v) then
      for i = 1, #v do out[i] = pack_value(v[i]) end
      return json.array(out)
    end
    local is_plain = true
    for k in pairs(v) do is_plain = is_plain and type(k) == "string" and k:sub(1, 1) ~= "$" end
    if is_plain then
      for k, item in pairs(v) do out[k] = pack_value(item) end
      return out
    end
    for k, item in pairs(v) do out[#out + 1] = json.array { pack_value(k), pack_value(item) } end
    table.sort(out, function(a, b) return json.encode(a[1]) < json.encode(b[1]) end)
    return { ["$pairs"] = json.array(out) }
  end
  return v
end

local numbers = { nan = 0 / 0, inf = math.huge, ["-inf"] = -math.huge, ["-0"] = -0.0 }
local function integer64(text)
  local negative, v = text:sub(1, 1) == "-", 0ULL
  for digit in text:gmatch "%d" do v = v * 10 + tonumber(digit) end
  return ffi.cast("int64_t", negative and -ffi.cast("int64_t", v) or v), v
end

local function unpack_value(v)
  if type(v) ~= "table" then return v end
  if v["$number"] then return numbers[v["$number"]] end
  if v["$i64"] then return (integer64(v["$i64"])) end
  if v["$u64"] then return (select(2, integer64(v["$u64"]))) end
  local out = {}
  for _, pair in ipairs(v["$pairs"] or {}) do out[unpack_value(pair[1])] = unpack_value(pair[2]) end
  if v["$pairs"] then return out end
  for k, item in pairs(v) do out[k] = unpack_value(item) end
  return out
end

--- JSON text of a Lua value that reads back as the same value: numbers to the last bit, NaN and infinities,
-- 64-bit integers, tables with number keys. Functions and the like raise.
function M.encode_state(value) return json.encode(pack_value(value)) end
function M.decode_state(text, what) return unpack_value(json.decode(text, { what = what })) end

-- ---- saving -------------------------------------------------------------------------------------

local function handle_of(communicator) return communicator and communicator.handle or nil end
local function is_first(communicator) return not communicator or communicator:rank() == 0 end

local function named_tensors(list, what)
  local out = {}
  for i, p in ipairs(list) do
    if type(p) ~= "table" or type(p.name) ~= "string" then
      errors.raise("usage", ("%s: entry %d of the model has no name"):format(what, i), 3)
    end
    if out[p.name] then errors.raise("usage", ("%s: parameter %s comes twice"):format(what, p.name), 3) end
    out[p.name] = tensor.check(p.tensor, p.name, 3)
  end
  return out
end

-- The flat tensors of an optimizer (halo.optim) with their kinds, and where each parameter lies in them.
local kinds = { "moment1", "moment2", "master" }
local function flat_state(optimizer)
  local state, list = optimizer:state(), {}
  for _, kind in ipairs(kinds) do
    if state[kind] then list[#list + 1] = { kind = kind, tensor = state[kind] } end
  end
  return list, optimizer:layout()
end

local function tensor_bytes(t) return t.count * tensor.dtype_bytes(t.dtype) end

-- About what this process will write, for the question whether the disk has room.
local function expected_bytes(o)
  local bytes = 1e6
  if is_first(o.comm) then
    for _, p in ipairs(o.model) do bytes = bytes + tensor_bytes(p.tensor) + 1000 end
  end
  if o.optimizer then
    local writers = o.comm and o.comm:size() / o.comm:here() or 1
    for _, s in ipairs((flat_state(o.optimizer))) do bytes = bytes + tensor_bytes(s.tensor) / writers end
  end
  return bytes
end

local function put_optimizer(writer, optimizer)
  local list, layout = flat_state(optimizer)
  local n = #layout
  local names, offsets, counts = ffi.new("const char *[?]", n), ffi.new("int64_t[?]", n), ffi.new("int64_t[?]", n)
  for i, p in ipairs(layout) do
    names[i - 1], offsets[i - 1], counts[i - 1] = p.name, p.first, p.count
  end
  for _, s in ipairs(list) do
    check(C.halo_checkpoint_put_flat(writer, s.kind, s.tensor, n, names, offsets, counts))
  end
end

-- Parts of the state that are files of their own, so that people find them.
local state_files = { data = "data.json", rng = "rng.json" }

local function put_everything(writer, o, tensors, state_text)
  if o.optimizer then put_optimizer(writer, o.optimizer) end
  if not is_first(o.comm) then return end
  local weights = safetensors.writer(tensors, { dtype = o.dtype })
  local status = C.halo_checkpoint_put_weights(writer, weights, o.max_shard_bytes)
  C.halo_safetensors_writer_free(ffi.gc(weights, nil)) -- it holds the tensors
  check(status)
  for _, name in ipairs(args.keys(o.files)) do
    check(C.halo_checkpoint_put_file(writer, name, o.files[name], #o.files[name]))
  end
  for part, name in pairs(state_files) do
    local text = state_text[part]
    if text then check(C.halo_checkpoint_put_file(writer, name, text, #text)) end
  end
end

-- The state as texts: `rest` for the manifest, others for files.
local function state_texts(state)
  local rest, texts = {}, {}
  for k, v in pairs(state) do
    if state_files[k] then
      texts[k] = json.encode(pack_value(v), { pretty = true }) .. "\n"
    else
      rest[k] = v
    end
  end
  texts.rest = M.encode_state(rest)
  return texts
end

local writer_slot = ffi.new "halo_checkpoint_writer *[1]"

local function reason() return ffi.string(C.halo_error_message()) end

-- A lost rank cannot be trained around; every other failure costs this checkpoint only.
local function failed(status)
  if status == C.HALO_ECOMM then check(status, 3) end
  return nil, ("%s (%s)"):format(reason(), ffi.string(C.halo_status_name(status)))
end

local save_fields = {
  dir = "string", step = "int", model = "table", comm = "table?", optimizer = "table?",
  state = { "table", {} }, files = { "table", {} }, dtype = "string?",
  max_shard_bytes = { "number", safetensors.max_shard_bytes }, keep = "int?", major = "int?",
}

--- Save a checkpoint `DIR/step-NNNNNNNN`. Collective.
-- @tparam table o
-- @tparam string o.dir folder of the run's checkpoints; made if missing
-- @tparam int o.step
-- @tparam table o.model list of `{ name =, tensor = }`; written by the first rank
-- @tparam[opt] Comm o.comm communicator of all ranks (default: this process alone)
-- @tparam[opt] Optimizer o.optimizer its flat state is shared out over the ranks
-- @tparam[opt] table o.state plain values that `load` gives back exactly; `data` and `rng` become files
-- @tparam[opt] table o.files name -> content: config.json, tokenizer files, the recipe
-- @tparam[opt] string o.dtype of the weights in the file (default: their own; needed for a bitwise resume)
-- @tparam[opt] number o.max_shard_bytes
-- @tparam[opt] int o.keep remove all but the newest so many afterwards (at least 2 stay)
-- @tparam[opt] int o.major except those whose step is a multiple of this
-- @treturn ?string the new folder; nil when nothing was saved
-- @treturn ?string the reason; beside a folder: why old ones could not be removed
function M.save(o)
  o = args.named("checkpoint.save", o, save_fields)
  local tensors = named_tensors(o.model, "checkpoint.save")
  -- What can go wrong in Lua on one rank must not leave the others waiting: it becomes part of the vote.
  local prepared, texts = pcall(state_texts, o.state)
  if is_first(o.comm) then pcall(fs.mkdir, o.dir) end -- begin says what is wrong with the folder
  local status = C.halo_checkpoint_begin(writer_slot, o.dir, o.step, handle_of(o.comm), expected_bytes(o))
  if status ~= C.HALO_OK then return failed(status) end
  local writer = ffi.gc(writer_slot[0], C.halo_checkpoint_writer_free)
  local ok, why = prepared, texts
  if ok then ok, why = pcall(put_everything, writer, o, tensors, texts) end
  if not ok then C.halo_checkpoint_fail(writer, C.HALO_ESTATE, tostring(why)) end
  status = C.halo_checkpoint_commit(writer, prepared and texts.rest or "{}")
  C.halo_checkpoint_writer_free(ffi.gc(writer, nil))
  if status ~= C.HALO_OK then return failed(status) end
  local warning
  if o.keep and is_first(o.comm) then
    local pruned, why_not = pcall(M.prune, o.dir, math.max(o.keep, 2), o.major)
    if not pruned then warning = tostring(why_not) end -- the checkpoint is there: no reason to stop one rank
  end
  return ("%s/step-%08d"):format(o.dir, o.step), warning
end

-- ---- finding ------------------------------------------------------------------------------------

local function is_checkpoint(path) return fs.is_file(path .. "/manifest.json") end

-- "checkpoint", path of one; or "dir", path of a folder of them.
local function locate(path)
  path = path:gsub("(.)/+$", "%1")
  if is_checkpoint(path) then return "checkpoint", path end
  if fs.is_dir(path .. "/ckpt") then return "dir", path .. "/ckpt" end
  return "dir", path
end

--- Folder of the run that a checkpoint, its parent or the run's folder itself belongs to.
function M.run_folder(path)
  local kind, found = locate(path)
  if kind == "checkpoint" then found = fs.dirname(found) end
  return fs.basename(found) == "ckpt" and fs.dirname(found) or found
end

local checkpoint_slot = ffi.new "halo_checkpoint *[1]"

-- An open checkpoint, checked as far as `level` says, or nil when there is none.
local function open(path, communicator, level)
  local kind, found = locate(path)
  local f = kind == "checkpoint" and C.halo_checkpoint_open or C.halo_checkpoint_latest
  check(f(checkpoint_slot, found, handle_of(communicator), level), 2)
  if checkpoint_slot[0] == nil then return nil end
  return ffi.gc(checkpoint_slot[0], C.halo_checkpoint_free)
end

local function close(handle) C.halo_checkpoint_free(ffi.gc(handle, nil)) end

local function lines_of(text)
  local lines = {}
  for line in text:gmatch "[^\n]+" do lines[#lines + 1] = line end
  return lines
end

--- The newest checkpoint whose manifest and files belong together. Quick: contents are compared by `load`
-- and `verify`, not here.
-- @tparam string dir a run's folder, or its folder of checkpoints
-- @treturn ?string path; nil when there is none at all
-- @treturn int step @treturn {string,...} newer ones that were skipped, and why
-- @raise class data when there are checkpoints and none can be used
function M.latest(dir)
  local handle = open(dir, nil, C.HALO_VERIFY_SIZES)
  if not handle then return nil end
  local path, step = ffi.string(C.halo_checkpoint_path(handle)), tonumber(C.halo_checkpoint_step(handle))
  local skipped = lines_of(ffi.string(C.halo_checkpoint_report(handle)))
  close(handle)
  return path, step, skipped
end

--- Check a checkpoint thoroughly: sizes, chunk hashes, SHA-256 of every file.
-- @tparam string path a checkpoint, or a folder of them (then the newest usable one)
-- @treturn table `path`, `step`, `world` (processes that wrote it), `files`, `skipped`
-- @raise class data, naming the file, the bytes and the tensor
function M.verify(path)
  local handle = open(path, nil, C.HALO_VERIFY_ALL)
  if not handle then errors.raise("data", path .. " holds no checkpoint", 2) end
  local out = { path = ffi.string(C.halo_checkpoint_path(handle)), step = tonumber(C.halo_checkpoint_step(handle)),
    world = C.halo_checkpoint_world(handle), files = {},
    skipped = lines_of(ffi.string(C.halo_checkpoint_report(handle))) }
  for i = 1, C.halo_checkpoint_files(handle) do
    out.files[i] = ffi.string(C.halo_checkpoint_file(handle, i - 1))
  end
  close(handle)
  return out
end

local removed = ffi.new "int32_t[1]"

--- Remove all but the newest `keep` (at least 2) and those whose step is a multiple of `major`.
-- @treturn int how many were removed
function M.prune(dir, keep, major)
  check(C.halo_checkpoint_prune(dir, keep, major or 0, removed))
  return removed[0]
end

-- ---- loading ------------------------------------------------------------------------------------

local function same_shape(a, b)
  local same = #a == #b
  for d = 1, #a do same = same and a[d] == b[d] end
  return same
end

-- Names, shapes and dtypes of all weights are compared before the first byte is copied.
local function load_weights(path, model)
  local file = safetensors.open(path)
  local wanted = named_tensors(model, "checkpoint.load")
  for _, name in ipairs(args.keys(wanted)) do
    local info, t = file:info(name), wanted[name]
    if not info then errors.raise("data", ("%s holds no tensor %s"):format(path, name), 0) end
    if not same_shape(info.shape, t.shape) or info.dtype ~= t.dtype then
      errors.raise("data", ("%s: %s is %s [%s], the model has %s [%s]"):format(path, name, info.code,
        table.concat(info.shape, ","), t.dtype, table.concat(t.shape, ",")), 0)
    end
  end
  for _, name in ipairs(file:names()) do
    if not wanted[name] then errors.raise("data", ("%s: the model has no tensor %s"):format(path, name), 0) end
  end
  for _, p in ipairs(model) do file:read(p.name, { into = p.tensor }) end
  file:close()
end

local function load_optimizer(handle, path, optimizer)
  local list, layout = flat_state(optimizer)
  for _, s in ipairs(list) do
    for _, p in ipairs(layout) do
      if C.halo_checkpoint_has(handle, s.kind, p.name) == 0 then
        errors.raise("data", ("%s holds no %s of %s"):format(path, s.kind, p.name), 0)
      end
    end
  end
  if tonumber(C.halo_checkpoint_parameters(handle)) ~= #list * #layout then
    errors.raise("data", ("%s holds optimizer state that this model has no place for"):format(path), 0)
  end
  for _, s in ipairs(list) do
    for _, p in ipairs(layout) do
      check(C.halo_checkpoint_read_flat(handle, s.kind, p.name, s.tensor, p.first, p.count))
    end
  end
end

local function read_file(handle, name)
  return halo_ffi.text(function(buffer, capacity)
    return C.halo_checkpoint_read_file(handle, name, buffer, capacity)
  end)
end

local function load_state(handle, path)
  local state = M.decode_state(ffi.string(C.halo_checkpoint_state(handle)), path .. "/manifest.json")
  for i = 1, C.halo_checkpoint_files(handle) do
    local name = ffi.string(C.halo_checkpoint_file(handle, i - 1))
    for part, file in pairs(state_files) do
      if name == file then state[part] = M.decode_state(read_file(handle, name), path .. "/" .. name) end
    end
  end
  return state
end

--- Load a checkpoint into a model and an optimizer. Collective: ranks share the checking of files and take
-- the same one.
-- @tparam table o
-- @tparam string o.dir a checkpoint, a folder of them, or a run's folder; the newest usable one is taken
-- @tparam[opt] Comm o.comm
-- @tparam[opt] table o.model list of `{ name =, tensor = }`: names, shapes and dtypes must be those saved
-- @tparam[opt] Optimizer o.optimizer
-- @tparam[opt=false] boolean o.deep compare SHA-256 as well
-- @treturn ?table the state that was saved; nil when there is no checkpoint
-- @treturn string path @treturn int step @treturn {string,...} newer ones that were skipped, and why
-- @raise class data when there are checkpoints and none can be used, or it does not fit the model
function M.load(o)
  o = args.named("checkpoint.load", o, { dir = "string", comm = "table?", model = "table?", optimizer = "table?",
    deep = { "boolean", false } })
  local handle = open(o.dir, o.comm, o.deep and C.HALO_VERIFY_ALL or C.HALO_VERIFY_CHUNKS)
  if not handle then return nil, o.dir .. " holds no checkpoint" end
  local path, step = ffi.string(C.halo_checkpoint_path(handle)), tonumber(C.halo_checkpoint_step(handle))
  local state = load_state(handle, path)
  if o.model then load_weights(path, o.model) end
  if o.optimizer then load_optimizer(handle, path, o.optimizer) end
  local skipped = lines_of(ffi.string(C.halo_checkpoint_report(handle)))
  close(handle)
  return state, path, step, skipped
end

-- ---- jobs ---------------------------------------------------------------------------------------

local function resolved_json(recipe) return require("halo.recipe").to_json(recipe) end

local function hash_of(text)
  return (bit.tohex(C.halo_hash_bytes(text, #text, 0), 16))
end

-- Everything of a job that the next step depends on, besides weights and moments.
local function job_state(job, more)
  local state = {
    step = job.step_index, tokens = job.tokens_seen, optimizer_steps = job.optim.steps,
    data = job.data.state and job.data:state(job.step_index) or {},
    rng = { seed = job.recipe.seed }, -- numbers are functions of (seed, stream, index): no state beyond it
    recipe_hash = hash_of(resolved_json(job.recipe)),
    layout = { ranks = job.comm:size(), dp = job.dp, cp = job.cp },
    engine = C.halo_version(), tokenizer = job.tokenizer:hash(),
  }
  for k, v in pairs(more or {}) do
    if state[k] ~= nil then errors.raise("internal", "save_job: the state has its own field " .. k, 0) end
    state[k] = v
  end
  return state
end

local function job_files(job)
  local files = { ["config.json"] = require("halo.model").hf_config(job.model.config),
    ["recipe.resolved.json"] = resolved_json(job.recipe) }
  for name, text in pairs(job.tokenizer.files or {}) do files[name] = text end
  return files
end

--- Save a job (halo.job). Collective.
-- @tparam Job job
-- @tparam string dir folder of the run's checkpoints
-- @tparam[opt] table o `keep`, `major` as in `save`; `state`: further values for `restore_job` to return
-- @treturn ?string the new folder; nil and the reason when nothing was saved
function M.save_job(job, dir, o)
  o = args.named("checkpoint.save_job", o or {}, { keep = "int?", major = "int?", state = "table?" })
  return M.save { dir = dir, step = job.step_index, comm = job.comm, model = job.model.parameters,
    optimizer = job.optim, state = job_state(job, o.state), files = job_files(job), keep = o.keep, major = o.major }
end

--- Bring a freshly built job to where a checkpoint left off. Collective.
-- @tparam Job job
-- @tparam string path a checkpoint, a folder of them, or a run's folder
-- @treturn table the state that was saved; `recipe_changed` says whether the recipe is another one
-- @treturn string the checkpoint that was taken @treturn {string,...} newer ones skipped, and why
-- @raise class data when there is none, or it was made with another tokenizer or other data
function M.restore_job(job, path)
  local state, from, _, skipped = M.load { dir = path, comm = job.comm, model = job.model.parameters,
    optimizer = job.optim }
  if not state then errors.raise("data", from .. ": nothing to resume from", 2) end
  if state.tokenizer ~= job.tokenizer:hash() then
    errors.raise("data", ("%s was trained with another tokenizer (%s, this one is %s)"):format(from,
      tostring(state.tokenizer), job.tokenizer:hash()), 2)
  end
  if job.data.check_state then job.data:check_state(state.data) end
  if state.rng.seed ~= job.recipe.seed then
    errors.raise("data", ("%s was trained with seed %s, the recipe has %s"):format(from, tostring(state.rng.seed),
      tostring(job.recipe.seed)), 2)
  end
  job.step_index, job.tokens_seen, job.optim.steps = state.step, state.tokens, state.optimizer_steps
  job.stage = nil -- entered anew by the next step
  state.recipe_changed = state.recipe_hash ~= hash_of(resolved_json(job.recipe))
  return state, from, skipped
end

return M
