--- Data: text to token files, token files to batches.
--
--    files ──pack──► token file ──► Tokens ─┐
--                                           ├──► corpus ──loader──► batches, per rank
--    needles, any Lua function ──► source ──┘
--
-- `data.open` does all of it from the `data` part of a resolved recipe; the pieces are for scripts and
-- the prompt:
--
--    local tok    = halo.tokenizer.byte {}
--    local text   = data.prepare { from = "books", tokenizer = tok }        -- packs once, then maps
--    local train, valid = text:split { share = 0.05 }
--    local loader = data.loader { sources = { books = { tokens = train } }, context = 512, seed = 1 }
--    local batch  = loader:batch { rows = 4 }        -- ids, labels, positions: tensors [4,512]
--
-- What a run reads is a pure function of (seed, sample index): see core/sample.c and data/loader.lua.
local args = require "halo.args"
local errors = require "halo.errors"
local json = require "halo.json"
local loader = require "halo.data.loader"
local needles = require "halo.data.needles"
local pack = require "halo.data.pack"
local tokens = require "halo.data.tokens"

local M = {
  needles = needles,
  --- Open a token file. See data/tokens.lua.
  tokens = tokens.open,
  --- Text files to one token file. See data/pack.lua.
  pack = pack.pack,
  --- The same through a cache: packed once per content. See data/pack.lua.
  prepare = pack.prepare,
  --- Batches. See data/loader.lua.
  loader = loader.new,
  --- A source made by a function. See data/loader.lua.
  generate = loader.generate,
}

-- Below this many documents a held-out share of documents would be none or one; the end of the text
-- is held out instead.
local FEW_DOCUMENTS = 64

---- From a recipe ------------------------------------------------------------------------------

local function separator_of(tok) return tok.document_end or -1 end

-- Tokens of a text, jsonl or tokens node.
local function tokens_of(node, o)
  if node.type == "tokens" then
    local t = tokens.open(node.file, { separator = separator_of(o.tokenizer) })
    t:check_tokenizer(o.tokenizer)
    return t
  end
  return pack.prepare {
    from = node.from, format = node.type, field = node.field, extensions = node.extensions,
    tokenizer = o.tokenizer, cache = o.cache, log = o.log,
  }
end

-- Hold out a share for validation; which way is written in the description.
local function hold_out(t, share, seed)
  if share == 0 then return t, nil, "nothing held out" end
  if t.documents >= FEW_DOCUMENTS then
    local train, valid = t:split { share = share, seed = seed }
    return train, valid, ("%d of %d documents held out"):format(valid.documents, t.documents)
  end
  local n = math.max(1, math.floor(t.count * share))
  if n >= t.count then errors.raise("data", "data: too little text to hold some out", 0) end
  return t:slice(0, t.count - n), t:slice(t.count - n, n),
    ("the last %d of %d tokens held out, since there are only %d documents"):format(n, t.count, t.documents)
end

-- Names of a mix's parts in a fixed order.
local function parts_of(node)
  if node.type ~= "mix" then return { { name = node.type, node = node, weight = 1 } } end
  local parts = {}
  if node.from then
    for _, name in ipairs(args.keys(node.weights or {})) do
      parts[#parts + 1] = { name = name, weight = node.weights[name],
        node = { type = "text", from = node.from .. "/" .. name, holdout = node.holdout } }
    end
    if #parts == 0 then errors.raise("usage", "mix: with `from`, weights names the parts", 0) end
    return parts
  end
  for _, name in ipairs(args.keys(node.sources or {})) do
    parts[#parts + 1] = { name = name, node = node.sources[name],
      weight = node.weights and (node.weights[name] or 0) or 1 }
  end
  for name in pairs(node.weights or {}) do
    if not (node.sources and node.sources[name]) then
      errors.raise("usage", ("mix: weights names %q, which is no source%s"):format(name,
        args.did_you_mean(name, args.keys(node.sources or {}))), 0)
    end
  end
  return parts
end

local Corpus = {}
Corpus.__index = Corpus

-- Training and held-out tokens of a text node; the same node again is the same tokens.
local function open_text(self, name, node, o)
  local key = json.encode { node, o.spec.holdout or false }
  local text = self.texts[key]
  if not text then
    local train, valid, note = hold_out(tokens_of(node, o), node.holdout or o.spec.holdout or 0, o.seed)
    text = { train = train, valid = valid }
    self.texts[key] = text
    self.notes[#self.notes + 1] = ("%s: %s; %s"):format(name, tostring(train), note)
  end
  self.valid = self.valid or text.valid
  return text.train
end

local function open_needles(self, part, first, o)
  local node = part.node
  local filler = node.filler and tokens_of(node.filler, o) or first
  if not filler then
    errors.raise("usage", "needles: no filler text; give `filler`, or another source in the mix", 0)
  end
  local settings = { tokenizer = o.tokenizer, filler = filler }
  for _, name in ipairs { "digits", "needles", "length", "questions", "inside", "text_weight", "answer_weight",
    "template" } do
    settings[name] = node[name]
  end
  local source = needles.new(settings)
  self.needles = self.needles or source
  self.notes[#self.notes + 1] = ("%s: %s"):format(part.name, tostring(source))
  return source:generator()
end

-- Sources of a loader. Texts come first: generators take their filler from them, also from one that is
-- never drawn itself (weight 0).
local function open_sources(self, spec, o)
  local parts, sources, first = parts_of(spec), {}, nil
  local function add(part, source)
    source.weight = part.weight
    if part.weight > 0 then sources[part.name] = source end
  end
  for _, part in ipairs(parts) do
    if part.node.type ~= "needles" then
      local train = open_text(self, part.name, part.node, o)
      first = first or train
      add(part, { tokens = train })
    end
  end
  for _, part in ipairs(parts) do
    if part.node.type == "needles" then add(part, { generator = open_needles(self, part, first, o) }) end
  end
  if next(sources) == nil then errors.raise("usage", "data: all weights are 0", 0) end
  return sources
end

--- Open what a recipe's `data` names.
-- Text is packed into the cache when it is not there yet. With a communicator rank 0 does that while the
-- others wait.
-- @tparam table spec the resolved `data` of a recipe: `{ type = "text"|"jsonl"|"tokens"|"needles"|"mix", ... }`
-- @tparam table o
-- @tparam Tokenizer o.tokenizer
-- @tparam[opt=1] int o.seed of the order and of the held-out choice
-- @tparam[opt] table o.stages resolved stages of the recipe; those with a `data` of their own read that
-- @tparam[opt] Comm o.comm all ranks that open this data
-- @tparam[opt] string o.cache folder of packed text (default: see pack.cache_dir)
-- @tparam[opt] function o.log called with a line of text for each slow step
-- @treturn Corpus fields `sources`, `valid` (held-out Tokens or nil), `needles` (the recipe's generator or
-- nil), `notes` (lines for people); methods below
-- @usage local corpus = data.open({ type = "text", from = "books" }, { tokenizer = tok })
function M.open(spec, o)
  o = args.named("data.open", o, { tokenizer = "table", seed = { "int", 1 }, stages = { "table", {} }, comm = "any?",
    cache = "string?", log = "callable?" })
  o.spec = spec
  local self = setmetatable({ notes = {}, texts = {}, of_stage = {}, loaders = {}, mask = spec.mask or "document",
    seed = o.seed, tokenizer = o.tokenizer }, Corpus)
  local waits = o.comm and o.comm:size() > 1
  if waits and o.comm:rank() > 0 then o.comm:barrier() end
  self.sources = open_sources(self, spec, o)
  for i, stage in ipairs(o.stages) do
    if stage.data then
      o.spec = stage.data
      self.of_stage[i] = { sources = open_sources(self, stage.data, o), mask = stage.data.mask or "document" }
    end
  end
  if waits and o.comm:rank() == 0 then o.comm:barrier() end
  return self
end

--- The loader for a context length.
-- @tparam int context
-- @tparam[opt] int stage whose data it reads (default: the recipe's)
function Corpus:loader(context, stage)
  local own = stage and self.of_stage[stage]
  local key = ("%d %d"):format(own and stage or 0, context)
  own = own or self
  if not self.loaders[key] then
    self.loaders[key] = loader.new { sources = own.sources, context = context, seed = self.seed,
      mask = own.mask, pad = self.tokenizer.pad or 0 }
  end
  return self.loaders[key]
end

--- A batch of training samples.
-- @tparam table o `first` (sample index over the whole run), `batch` (sequences), `context`, `stage` (its
-- number), and `layout`, `rank`, `here` as in loader:batch
-- @treturn table see loader:batch
function Corpus:batch(o)
  o = args.named("data:batch", o, { first = "int", batch = "int", context = "int", stage = "int?",
    layout = "table|cdata?", rank = { "int", 0 }, here = { "int", 1 } })
  return self:loader(o.context, o.stage):batch { first = o.first, rows = o.batch, layout = o.layout, rank = o.rank,
    here = o.here }
end

--- A batch of held-out text, windows in a fixed order; arguments as in `batch`, `first` from 0.
-- @raise class data when nothing was held out
function Corpus:validation_batch(o)
  o = args.named("data:validation_batch", o, { first = { "int", 0 }, batch = { "int", 1 }, context = "int",
    layout = "table|cdata?", rank = { "int", 0 }, here = { "int", 1 } })
  if not self.valid then errors.raise("data", "data: nothing is held out for validation (holdout = 0)", 2) end
  self.valid_loaders = self.valid_loaders or {}
  local l = self.valid_loaders[o.context]
  if not l then
    l = loader.new { sources = { valid = { tokens = self.valid } }, context = o.context, seed = self.seed,
      mask = self.mask, pad = self.tokenizer.pad or 0 }
    self.valid_loaders[o.context] = l
  end
  return l:batch { first = o.first, rows = o.batch, layout = o.layout, rank = o.rank, here = o.here }
end

--- Held-out documents as Lua arrays of ids, for evaluation: those that have `tokens` tokens, in order,
-- then the longest of the others; each cut to `tokens`.
-- @tparam table o
-- @tparam int o.tokens
-- @tparam int o.max number of documents
function Corpus:validation_documents(o)
  o = args.named("data:validation_documents", o, { tokens = "int", max = "int" })
  if not self.valid then errors.raise("data", "data: nothing is held out for validation (holdout = 0)", 2) end
  local list = {}
  for d = 0, self.valid.documents - 1 do
    local first, n = self.valid:document(d)
    list[#list + 1] = { first = first, n = math.min(n, o.tokens), index = d }
  end
  table.sort(list, function(a, b)
    if a.n ~= b.n then return a.n > b.n end
    return a.index < b.index
  end)
  local out = {}
  for i = 1, math.min(o.max, #list) do
    local ids, array = self.valid:read(list[i].first, list[i].n), {}
    for k = 1, list[i].n do array[k] = ids[k - 1] end
    out[i] = array
  end
  return out
end

--- A needle generator over held-out text with the recipe's settings, for evaluation; `o` overrides
-- settings of needles.new.
-- @usage local task = corpus:niah { digits = 4 }:task { context = 2048, depth = 30 }
function Corpus:niah(o)
  local settings = { tokenizer = self.tokenizer, filler = self.valid or (self.needles and self.needles.filler) }
  if self.needles then
    settings.digits, settings.template, settings.cities = self.needles.digits, self.needles.template,
      self.needles.cities
  end
  for name, value in pairs(o or {}) do settings[name] = value end
  if not settings.filler then
    errors.raise("data", "data:niah: no filler text (nothing is held out); give `filler`", 2)
  end
  return needles.new(settings)
end

-- Loaders of one token per sample: what they are made of does not depend on the context. The recipe's
-- own, then those of stages, in order.
local function witnesses(self)
  local list = { { stage = 0, loader = self:loader(1) } }
  for stage = 1, table.maxn(self.of_stage) do
    if self.of_stage[stage] then list[#list + 1] = { stage = stage, loader = self:loader(1, stage) } end
  end
  return list
end

--- What a checkpoint keeps of the data: it is the same for every context and step.
function Corpus:state()
  local out = {}
  for i, w in ipairs(witnesses(self)) do
    local state = w.loader:state(0)
    out[i] = { stage = w.stage, fingerprint = state.fingerprint, identity = state.identity }
  end
  return { stages = out }
end

--- Refuse to go on with data that is not what a saved state saw.
-- @raise class data, saying what differs
function Corpus:check_state(state)
  if type(state) ~= "table" or type(state.stages) ~= "table" then
    errors.raise("data", "data:check_state: the state is malformed", 2)
  end
  local saved, now = {}, witnesses(self)
  for _, s in ipairs(state.stages) do saved[s.stage] = s end
  for _, w in ipairs(now) do
    local s = saved[w.stage]
    if not s then
      errors.raise("data", ("the data is not what the checkpoint was trained on: stage %d has data of its own now")
        :format(w.stage), 2)
    end
    w.loader:resume { next = 0, fingerprint = s.fingerprint, identity = s.identity }
  end
  if #state.stages ~= #now then
    errors.raise("data", "the data is not what the checkpoint was trained on: a stage had data of its own", 2)
  end
end

function Corpus:__tostring() return table.concat(self.notes, "\n") end

return M
