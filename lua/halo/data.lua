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

--- Open what a recipe's `data` names.
-- Text is packed into the cache when it is not there yet; every rank may call this at once (the cache is
-- written atomically), though it is kinder to let one go first.
-- @tparam table o
-- @tparam table o.spec the resolved `data` of a recipe: `{ type = "text"|"jsonl"|"tokens"|"needles"|"mix", ... }`
-- @tparam Tokenizer o.tokenizer
-- @tparam[opt=1] int o.seed of the held-out choice
-- @tparam[opt] string o.cache folder of packed text (default: see pack.prepare)
-- @tparam[opt] function o.log called with a line of text for each slow step
-- @treturn Corpus `sources`, `valid` (Tokens or nil), `mask`, `notes` (list of lines for people),
-- method `loader`
function M.open(o)
  o = args.named("data.open", o, { spec = "table", tokenizer = "table", seed = { "int", 1 },
    cache = "string?", log = "callable?" })
  local self = setmetatable({ sources = {}, notes = {}, mask = o.spec.mask or "document",
    tokenizer = o.tokenizer }, Corpus)
  local generated, valids, trains = {}, {}, {}
  for _, part in ipairs(parts_of(o.spec)) do
    local node, name = part.node, part.name
    if node.type == "needles" then
      generated[#generated + 1] = part
    else
      local holdout = node.holdout or o.spec.holdout or 0
      local train, valid, note = hold_out(tokens_of(node, o), holdout, o.seed)
      self.sources[name] = { tokens = train, weight = part.weight }
      trains[#trains + 1] = train
      if valid then valids[#valids + 1] = valid end
      self.notes[#self.notes + 1] = ("%s: %s; %s"):format(name, tostring(train), note)
    end
  end
  --- Held-out text of the first source that has some: what perplexity and needles are measured on.
  self.valid = valids[1]
  for _, part in ipairs(generated) do
    local node = part.node
    local filler = node.filler and tokens_of(node.filler, o) or trains[1]
    if not filler then
      errors.raise("usage", "needles: no filler text; give `filler`, or another source in the mix", 0)
    end
    local source = needles.new { tokenizer = o.tokenizer, filler = filler, digits = node.digits,
      needles = node.needles, length = node.length }
    self.sources[part.name] = { generator = source:generator(), weight = part.weight }
    self.notes[#self.notes + 1] = ("%s: %s"):format(part.name, tostring(source))
    --- The needle generator of the recipe, for evaluation with the same settings.
    self.needles = self.needles or source
  end
  return self
end

--- A loader over the corpus.
-- @tparam table o `context`, `seed`, and optionally `stream`, `positions` as in data.loader
function Corpus:loader(o)
  local copy = {}
  for key, value in pairs(o) do copy[key] = value end
  copy.sources, copy.mask, copy.pad = self.sources, copy.mask or self.mask, self.tokenizer.pad
  return loader.new(copy)
end

function Corpus:__tostring() return table.concat(self.notes, "\n") end

return M
