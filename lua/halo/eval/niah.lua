--- Needle in a haystack: is a number found again, hidden at any depth of any length?
--
-- The digits variant of MInference (evaluation.md 3): one sentence with a random number is put into
-- held-out text, the question stands at the end, and an answer is right when its digits are in what the
-- model generates. Prompts are made by the generator that trains (data/needles.lua), so wording and cities
-- are those of the training documents; filler, numbers and places are not. Generation is greedy, under
-- the attention and the ring in use.
--
--   depth     percent of the filler before the needle; the needle then moves back to the end of a sentence,
--             and where it came to is reported (`depth_realised`)
--   length    prompt and answer together, exactly
--   cell      mean over `samples` tasks of one length and depth
--   score     mean over all cells
--
-- Every sample is one line of RUN/eval/niah-step-N-ATTENTION/samples_niah_digits.jsonl, in
-- lm-evaluation-harness's shape and naming, written as soon as it is known; results_niah_digits.json beside
-- it has the scores. A rerun that asks for the same model under the same attention takes what is there and
-- generates the rest.
local args = require "halo.args"
local fs = require "halo.fs"
local generate = require "halo.generate"
local heatmap = require "halo.heatmap"
local json = require "halo.json"
local needles = require "halo.data.needles"

local C = require("halo.ffi").C

local M = {
  name = "niah",
  doc = "Needle in a haystack: a number hidden in held-out text, asked for at the end, by depth and length.",
  fields = function(kind)
    return {
      { "lengths", kind.list(kind.tokens), doc = "prompt and answer together, tokens (default: those of the stages)" },
      { "depths", kind.either(kind.count, kind.list(kind.range { min = 0, max = 100 })), default = 5,
        doc = "how many, evenly from 0 to 100 percent, or a list of percents" },
      { "samples", kind.count, default = 2, doc = "tasks per length and depth" },
      { "digits", kind.range { int = true, min = 1, max = 15 }, doc = "of a number (default: the data's needles)" },
      { "needles", kind.count, default = 1, doc = "numbers hidden per task; one of them is asked for" },
      { "dense", kind.bool, default = false, doc = "read the prompt with dense attention, whatever the stage says" },
      { "seed", kind.index, default = 1, doc = "of the tasks" },
    }
  end,
  example = "finally = eval.niah { lengths = { 512, 8*K }, depths = 10, samples = 4 }",
}

local SPARE = 2 -- tokens generated beyond those of the answer

--- Depths from a count or a list.
function M.depths(d)
  if type(d) == "table" then return d end
  if d == 1 then return { 50 } end
  local out = {}
  for i = 0, d - 1 do out[i + 1] = 100 * i / (d - 1) end
  return out
end

-- Prompt in engine memory to the array that generate wants.
local function array_of(memory, n)
  local out = {}
  for i = 1, n do out[i] = memory[i - 1] end
  return out
end

local function answer_task(o, task, extra)
  local ids = generate.run { model = o.model, ids = array_of(task.prompt, task.n), attending = o.attending,
    tokens = o.tokens or task.answer_n + SPARE, stop = o.tokenizer.eos, rope_length = task.context }
  local response = o.tokenizer:decode(ids)
  return {
    context_length = task.context, depth_percent = task.depth, depth_realised = task.realised, sample = extra.sample,
    seed = extra.seed, position = task.position, city = task.city, answer = task.answer, response = response,
    correct = needles.correct(task, response) and 1 or 0,
  }
end

-- Cells and score of rows.
local function summarise(result)
  local by_key, sum, total = {}, 0, 0
  result.cells = {}
  for _, row in ipairs(result.rows) do
    local key = row.context_length .. "/" .. row.depth_percent
    local cell = by_key[key]
    if not cell then
      cell = { length = row.context_length, depth = row.depth_percent, n = 0, right = 0 }
      by_key[key] = cell
      result.cells[#result.cells + 1] = cell
    end
    cell.n, cell.right = cell.n + 1, cell.right + row.correct
  end
  for _, cell in ipairs(result.cells) do
    cell.score, cell.right = cell.right / cell.n, nil
    sum, total = sum + cell.score, total + 1
  end
  result.score = total > 0 and sum / total or 0
  return result
end

--- Measure. Collective over the ring of `attending`: every rank generates, and all get the same result.
-- @tparam table o named arguments
-- @tparam Model o.model
-- @tparam Tokenizer o.tokenizer
-- @tparam Needles o.needles generator over held-out text (data.needles.new, or `corpus:niah {}`)
-- @tparam Attending o.attending pattern and ring of the prompt
-- @tparam {int,...} o.lengths
-- @tparam[opt=5] int|{number,...} o.depths
-- @tparam[opt=2] int o.samples
-- @tparam[opt=1] int o.seed
-- @tparam[opt=1] int o.hidden numbers per task
-- @tparam[opt] int o.tokens to generate (default: those of the answer and two more)
-- @tparam[opt] table o.known rows of an earlier run by `M.key`; those are not generated again
-- @tparam[opt] function o.on_row called with each row and whether it is new
-- @treturn table `{ score, digits, samples, lengths, depths, cells = { { length, depth, score, n } }, rows = {
--   { context_length, depth_percent, depth_realised, sample, seed, position, city, answer, response, correct } } }`
-- @usage local r = niah.run { model = m, tokenizer = tok, needles = corpus:niah {}, attending = a, lengths = { 512 } }
function M.run(o)
  o = args.named("niah.run", o, { model = "table", tokenizer = "table", needles = "table", attending = "table",
    lengths = "table", depths = { "int|table", 5 }, samples = { "int", 2 }, seed = { "int", 1 }, hidden = { "int", 1 },
    tokens = "int?", known = { "table", {} }, on_row = "callable?" })
  local result = { digits = o.needles.digits, samples = o.samples, lengths = o.lengths, depths = M.depths(o.depths),
    seed = o.seed, hidden = o.hidden, rows = {} }
  for _, length in ipairs(o.lengths) do
    for _, depth in ipairs(result.depths) do
      for sample = 1, o.samples do
        local extra = { sample = sample, seed = o.seed, hidden = o.hidden, digits = result.digits }
        local row = o.known[M.key(length, depth, extra)]
        local is_new = not row
        if is_new then
          row = answer_task(o, o.needles:task { context = length, depth = depth, seed = o.seed, round = sample - 1,
            needles = o.hidden }, extra)
        end
        row.depth_percent = depth -- exactly as asked, also when it was read from a file
        result.rows[#result.rows + 1] = row
        if o.on_row then o.on_row(row, is_new) end
      end
    end
  end
  return summarise(result)
end

---- Files ----------------------------------------------------------------------------------------

--- What names a task among those of one model, attention and text.
function M.key(length, depth, extra)
  return ("%d tokens, %.6f %%, sample %d, seed %d, %d hidden, %d digits"):format(length, depth, extra.sample,
    extra.seed, extra.hidden, extra.digits)
end

-- A sample as lm-evaluation-harness writes it; `doc` is our row without what the model said.
local function harness_row(row, id, head)
  local doc = { key = M.key(row.context_length, row.depth_percent, { sample = row.sample, seed = row.seed,
    hidden = head.hidden, digits = head.digits }) }
  for k, v in pairs(row) do
    if k ~= "response" and k ~= "correct" then doc[k] = v end
  end
  return { doc_id = id, doc = doc, target = row.answer, resps = json.array { json.array { row.response } },
    filtered_resps = json.array { row.response }, filter = "none", metrics = json.array { "contains" },
    contains = row.correct, source = head.source }
end

local function row_of(sample)
  local row = {}
  for k, v in pairs(sample.doc) do row[k] = v end
  row.key = nil
  row.response, row.correct = sample.filtered_resps[1], sample.contains
  return row
end

-- Rows of an earlier run that had the same source, from the text of its samples. A torn last line is no row.
local function known_rows(text, source)
  local known, n = {}, 0
  for line in text:gmatch "([^\n]*)\n" do
    local ok, sample = pcall(json.decode, line)
    if ok and type(sample) == "table" and sample.source == source and type(sample.doc) == "table" then
      known[sample.doc.key] = row_of(sample)
      n = n + 1
    end
  end
  return known, n
end

-- Standard error of a mean of n numbers that are 0 or 1.
local function standard_error(score, n) return n > 1 and math.sqrt(score * (1 - score) / (n - 1)) or json.null end

-- Scores, with the keys that readers of lm-evaluation-harness look for.
local function results_text(result, o)
  local task = { alias = "niah_digits", name = "niah_digits", sample_len = #result.rows }
  for _, length in ipairs(result.lengths) do
    local right, n = 0, 0
    for _, row in ipairs(result.rows) do
      if row.context_length == length then right, n = right + row.correct, n + 1 end
    end
    task[length .. ",none"], task[length .. "_stderr,none"] = right / n, standard_error(right / n, n)
  end
  task["score,none"], task["score_stderr,none"] = result.score, standard_error(result.score, #result.rows)
  return json.encode({
    results = { niah_digits = task }, group_subtasks = { niah_digits = json.array {} }, versions = { niah_digits = 1 },
    configs = { niah_digits = { task = "niah_digits", output_type = "generate_until", num_fewshot = 0,
      generation_kwargs = { do_sample = false, ["until"] = json.array {} },
      metadata = { lengths = result.lengths, depths = result.depths, samples = result.samples, digits = result.digits,
        hidden = result.hidden, seed = result.seed } } },
    ["n-shot"] = { niah_digits = 0 }, higher_is_better = { niah_digits = { score = true } },
    ["n-samples"] = { niah_digits = { original = #result.rows, effective = #result.rows } },
    config = { model = "halo", model_args = o.model_name, batch_size = 1, device = "cpu", limit = json.null,
      random_seed = result.seed },
    model_source = "halo", model_name = o.model_name, date = os.time(), source = o.source,
    cells = result.cells, score = result.score,
  }, { pretty = true }) .. "\n"
end

--- What decides the answers beside the tasks: weights, positions, attention, and how tasks are made.
-- 16 hexadecimal digits.
function M.source(o)
  local text = json.encode { bit.tohex(o.model:hash(), 16), o.model.config.rope, o.attending.pattern,
    o.needles:describe() }
  return bit.tohex(C.halo_hash_bytes(text, #text, 0), 16)
end

--- `run` with its samples and results kept in a folder, and taken from there when they are there already.
-- @tparam table o arguments of `run`, and `folder`, `model_name` (for readers of the files), `is_first` (this
--   process writes)
-- @treturn table as `run`; also `folder`, and `reused` (samples that were there)
function M.run_in(o)
  local inner = {}
  for k, v in pairs(o) do inner[k] = v end
  inner.folder, inner.model_name, inner.is_first = nil, nil, nil
  local path = o.folder .. "/samples_niah_digits.jsonl"
  local head = { source = M.source(o), hidden = o.hidden or 1, digits = o.needles.digits }
  if o.is_first then fs.mkdir(o.folder) end
  -- All ranks must agree on what is left to do: the first one of the ring reads, the others are told.
  local comm = o.attending.comm
  local text = comm:rank() == 0 and fs.is_file(path) and fs.read(path) or ""
  local known, reused = known_rows(comm:broadcast_text(text), head.source)
  inner.known = known
  local file = o.is_first and assert(io.open(path, reused > 0 and "ab" or "wb")) or nil
  local taken, id = 0, reused
  function inner.on_row(row, is_new)
    if not is_new then
      taken = taken + 1
    elseif file then
      file:write(json.encode(harness_row(row, id, head)), "\n")
      file:flush()
      id = id + 1
    end
    if o.on_row then o.on_row(row, is_new) end
  end
  local result = M.run(inner)
  if file then
    file:close()
    fs.write(o.folder .. "/results_niah_digits.json", results_text(result, { model_name = o.model_name,
      source = head.source }))
  end
  result.folder, result.reused = o.folder, taken
  return result
end

---- Recipes and the terminal ---------------------------------------------------------------------

--- The action `eval.niah` of a recipe.
-- @tparam table run `job`, and `folder` of the run (nil: keep no files)
-- @tparam table a the action's fields
function M.action(run, a)
  local job = run.job
  local attend = job.attending
  local pattern = attend.pattern
  if a.dense then attend:set_pattern { type = "dense", ring = pattern.ring } end
  local o = { model = job.model, tokenizer = job.tokenizer, attending = attend,
    needles = job.data:niah { digits = a.digits }, lengths = a.lengths or job:contexts(), depths = a.depths,
    samples = a.samples, seed = a.seed, hidden = a.needles }
  local result
  if run.folder then
    o.model_name, o.is_first = job.recipe.name, job.comm:rank() == 0
    o.folder = ("%s/eval/niah-step-%08d-%s"):format(run.folder, job.step_index, attend.pattern.type)
    result = M.run_in(o)
  else
    result = M.run(o)
  end
  if a.dense then attend:set_pattern(pattern) end
  return result
end

--- The map for the terminal.
function M.text(result)
  return heatmap.text(result, ("needle score %.0f %%: %d digits, %d sample%s per cell, depth x length"):format(
    100 * result.score, result.digits, result.samples, result.samples == 1 and "" or "s"))
end

return M
