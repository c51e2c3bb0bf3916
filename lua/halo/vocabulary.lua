--- The words of a recipe: every constructor, with its fields, defaults and help.
-- Adding a word here is all it takes: the constructor, its checks, `halo help WORD`, command-line
-- overrides and the resolved table follow from it (halo.schema). Sparsity patterns and evaluations
-- bring their own words: `halo.vocabulary.pattern` and `.evaluation` are called for every module in
-- sparsity/ and eval/ that has `fields`.
--
-- Defaults name their source. Where none is named the value is a plain choice of ours.
local errors = require "halo.errors"
local fs = require "halo.fs"
local schema = require "halo.schema"

local M = {}

local kind, define = schema.kind, schema.define
local node = kind.node

-- A default that is a node: a function, so that every use gets its own.
local function new(path, value)
  return function() return schema.construct(path, value or {}) end
end

-- Fields of a module's word: a list, or a function of (schema.kind, new) that returns one.
local function own_fields(word)
  return type(word.fields) == "function" and word.fields(kind, new) or word.fields
end

---- Position schemes ------------------------------------------------------------------------------

-- Every scheme that stretches takes `factor`, or `to` = the context wanted, from which the factor
-- follows once the model's own context is known (halo.recipe).
local function rope(name, doc, fields, example)
  local all = {}
  if name ~= "default" then
    all[1] = { "factor", kind.range { min = 1 }, excludes = "to",
      doc = "how many times longer than the original context" }
    all[2] = { "to", kind.tokens, excludes = "factor", doc = "context wanted, instead of factor" }
    all[3] = { "original", kind.tokens, doc = "context the model was trained on (from the model when absent)" }
  end
  for _, field in ipairs(fields or {}) do all[#all + 1] = field end
  define { name = name, group = "rope", doc = doc, fields = all, example = example,
    check = function(v, complain)
      if v.factor and v.to then complain("give factor or to, not both", "to") end
    end }
end

rope("default", "Rotary positions as the model was trained, nothing changed. RoFormer, arXiv 2104.09864.")
rope("linear", "Position interpolation: every position divided by factor. arXiv 2306.15595.", nil,
  "rope = linear { factor = 4 }")
rope("ntk", "NTK-aware: the base grows so that high frequencies stay and low ones stretch.", nil,
  "rope = ntk { to = 32*K }")
rope("dynamic_ntk", "NTK-aware with the base following the length at hand, beyond the original context.", nil,
  "rope = dynamic_ntk { factor = 2 }")
rope("yarn", "NTK-by-parts with an attention temperature. arXiv 2309.00071; defaults are the paper's.", {
  { "beta_fast", kind.positive, default = 32, doc = "rotations above which a frequency is left alone" },
  { "beta_slow", kind.positive, default = 1, doc = "rotations below which a frequency is fully stretched" },
  { "attention_factor", kind.positive, doc = "scale of cos and sin (default 0.1 ln(factor) + 1)" },
}, "rope = yarn { to = 512*K }")
rope("llama3", "Llama 3.1's: long waves stretched, short kept, smooth between. Defaults: its config.json.", {
  { "low_freq_factor", kind.positive, default = 1, doc = "original / this is the longest wavelength kept" },
  { "high_freq_factor", kind.positive, default = 4, doc = "original / this is where smoothing ends" },
}, "rope = llama3 { factor = 8, original = 8*K }")
rope("longrope", "A factor per frequency, one list up to the original context and one beyond. arXiv 2402.13753.", {
  { "short_factor", kind.list(kind.positive), required = true,
    doc = "one number per rotary pair, within the original context" },
  { "long_factor", kind.list(kind.positive), required = true, doc = "one number per rotary pair, beyond it" },
  { "attention_factor", kind.positive, doc = "scale of cos and sin (default from factor, as in the paper)" },
})

---- Models ----------------------------------------------------------------------------------------

local recompute_field = { "recompute", kind.enum { "none", "block" }, default = "block",
  doc = "block: keep block inputs only and run blocks again in backward" }
local offload_field = { "offload", kind.bool, default = false,
  doc = "block inputs wait in host memory between forward and backward (with recompute, on a device)" }

-- Formulas and reasons: model/init_weights.lua.
define { name = "normal", group = "init", positional = "std",
  doc = "Initial weights normal(0, std), residual outputs divided by sqrt(2 layers). GPT-2.",
  fields = { { "std", kind.positive, default = 0.02, doc = "standard deviation" } }, example = "init = normal(0.02)" }
define { name = "fan_in", group = "init",
  doc = "Initial weights normal(0, 1/columns): products keep their input's size. For small models.",
  fields = {
    { "embedding", kind.positive, default = 0.2, doc = "standard deviation of the embedding" },
    { "previous_token", kind.range { min = 0 }, default = 0,
      doc = "strength of heads in layer 1 that begin by looking 1 to 4 tokens back (0: none; 3 is a good one)" },
  }, example = "init = fan_in { embedding = 0.2, previous_token = 3 }" }
schema.coerce("init", function(v, place) return type(v) == "number" and schema.construct("normal", v, place) or nil end)

-- One constructor per family file (model/<family>.lua), with the family's own defaults.
local function model(family)
  local d = family.defaults
  define { name = family.name, group = "model", path = "model." .. family.name,
    doc = ("A new %s model of these sizes, with fresh weights."):format(family.architecture),
    fields = {
      { "layers", kind.count, required = true, doc = "transformer blocks" },
      { "width", kind.count, required = true, doc = "model size E" },
      { "heads", kind.count, required = true, doc = "query heads H" },
      { "kv_heads", kind.count, doc = "key and value heads Hk (default: heads)" },
      { "head_dim", kind.count, doc = "head size D (default: width / heads)" },
      { "ffn", kind.count, doc = "feed-forward size F (default: 8/3 width, rounded up to 32)" },
      { "vocab", kind.count, doc = "vocabulary size V (default: the tokenizer's)" },
      { "context", kind.tokens, doc = "context the positions are made for (default: the first stage's)" },
      { "rope_theta", kind.positive, default = d.rope_theta, doc = "rotary base" },
      { "tie", kind.bool, default = d.tie, doc = "output layer shares the embedding" },
      { "eps", kind.positive, default = d.eps, doc = "epsilon of RMSNorm" },
      { "init", node "init", default = new "normal", shown_default = "default normal(0.02)",
        doc = "how weights begin: a standard deviation, normal { }, or fan_in { }" },
      { "rope", node "rope", default = new "default",
        shown_default = "default default { }", doc = "position scheme" },
      recompute_field,
      offload_field,
    },
    example = ("model = model.%s { layers = 4, width = 256, heads = 8, kv_heads = 2 }"):format(family.name),
    check = function(v, complain)
      v.kv_heads = v.kv_heads or v.heads
      if v.heads % v.kv_heads ~= 0 then
        complain(("heads (%d) must be a multiple of kv_heads (%d)"):format(v.heads, v.kv_heads), "kv_heads")
      end
      if not v.head_dim then
        if v.width % v.heads ~= 0 then
          complain(("width (%d) is not a multiple of heads (%d); give head_dim"):format(v.width, v.heads), "width")
        end
        v.head_dim = v.width / v.heads
      end
      if (v.init.previous_token or 0) > 0 and not family.qkv_bias then
        complain(("previous_token lives in the biases of q and k, which %s does not have"):format(family.name), "init")
      end
      if v.head_dim % 2 ~= 0 then
        complain(("head_dim (%d) must be even, rotary positions turn pairs"):format(v.head_dim), "head_dim")
      end
    end }
end
define { name = "hf", group = "model", path = "model.hf", positional = "from",
  doc = "A Hugging Face folder: config.json and safetensors of the Qwen2, Llama or Qwen3 family.",
  fields = {
    { "from", kind.path, required = true, doc = "folder" },
    { "rope", node "rope", doc = "position scheme (default: the folder's own)" },
    recompute_field,
    offload_field,
  },
  example = 'model = model.hf "models/Qwen2.5-3B" { rope = yarn { to = 512*K } }' }

---- Attention: rings, budgets, patterns -----------------------------------------------------------

local layouts = { "striped", "zigzag", "contiguous" }
local function ring(name, doc, fields, example)
  fields[#fields + 1] = { "layout", kind.enum(layouts), default = "striped",
    doc = "which rank holds which block of tokens" }
  fields[#fields + 1] = { "block", kind.enum_number { 16, 32, 64, 128 }, alias = "stripe",
    doc = "tokens per block G, also the edge of the plan's tiles (also written stripe); 64 on cpu, 128 on cuda" }
  define { name = name, group = "ring", doc = doc, fields = fields, example = example }
end
ring("flat", "One ring over all ranks: each step sends the keys at hand to the next rank.", {},
  'ring = flat { layout = "striped", block = 64 }')
ring("hierarchical", "Rings inside rings: an inner one of near ranks, an outer one between groups. MTraining 4.3.", {
  { "inner", kind.either(kind.count, kind.enum { "node" }), default = "node",
    doc = 'ranks of the inner ring; "node": the ranks of one machine' },
}, 'ring = hierarchical { inner = "node" }')
ring("gather", "Every rank gathers all keys once; simple, and cheap with few kv heads.", {}, "ring = gather { }")

define { name = "mass", group = "keep", positional = "share",
  doc = "Keep the fewest verticals and slashes that hold this share of attention mass (top-p).",
  fields = {
    { "share", kind.range { above = 0, max = 1 }, required = true, doc = "share of the estimated mass, 0..1" },
    { "verticals", kind.count, default = 4096, doc = "at most so many columns (MTraining's released configs)" },
    { "slashes", kind.count, default = 4096, doc = "at most so many diagonals (same source)" },
  }, example = "keep = mass(0.95)" }
define { name = "budget", group = "keep", doc = "Keep a fixed number of the best verticals and slashes.",
  fields = {
    { "verticals", kind.index, required = true, doc = "columns, tokens" },
    { "slashes", kind.index, required = true, doc = "diagonals, token distances" },
  }, example = "keep = budget { verticals = 1000, slashes = 6096 }" }
define { name = "last_queries", group = "estimate", positional = "count",
  doc = "Estimate from the last queries of the sequence (64 in MInference and MTraining).",
  fields = { { "count", kind.count, default = 64, doc = "queries" } }, example = "estimate = last_queries(64)" }
-- `keep = 0.9` and `estimate = 64` are unmistakable.
schema.coerce("keep", function(v, place) return type(v) == "number" and schema.construct("mass", v, place) or nil end)
schema.coerce("estimate", function(v, place)
  return type(v) == "number" and schema.construct("last_queries", v, place) or nil
end)
define { name = "dense_where", group = "dense_where", doc = "Where attention stays dense.",
  fields = {
    { "layers", kind.list(kind.count), default = {}, doc = "layers, counted from 1" },
    { "below", kind.index, default = 0, doc = "contexts shorter than this, tokens" },
  } }

--- Define a pattern: its own fields, then those that all patterns share.
-- @tparam table p `name`, `doc`, `fields` (a list, or a function of (`schema.kind`, `new`) returning one,
-- where `new(path, value)` makes a default that is a node), `path` (default "sparse.NAME"), `check`
function M.pattern(p)
  local fields = {}
  for _, field in ipairs(own_fields(p)) do fields[#fields + 1] = field end
  if p.name ~= "dense" then
    fields[#fields + 1] = { "dense", node "dense_where", default = new "dense_where",
      shown_default = "default: nowhere", doc = "where attention stays dense: { layers = { 1, 2 }, below = 32*K }" }
    fields[#fields + 1] = { "frozen", kind.bool, default = false,
      doc = "true: keep each layer's first plan instead of choosing one per step" }
  end
  fields[#fields + 1] = { "ring", node "ring", default = new "flat",
    shown_default = "default flat { }", doc = "how keys travel between ranks" }
  define { name = p.name, group = "attention", path = p.path or "sparse." .. p.name, doc = p.doc, fields = fields,
    example = p.example, check = p.check }
end

---- Parallelism -----------------------------------------------------------------------------------

define { name = "mesh", group = "mesh", doc = "How ranks share the work; dp * cp ranks in all.",
  fields = {
    { "dp", kind.count, default = 1, doc = "data parallel: groups that take different sequences" },
    { "cp", kind.count, default = 1, doc = "context parallel: ranks that share a sequence (the ring)" },
  }, example = "mesh = { dp = 1, cp = 8 }" }

---- Tokenizers and data ---------------------------------------------------------------------------

define { name = "byte", group = "tokenizer", path = "tokenizer.byte",
  doc = "Bytes are tokens, special tokens follow them.", fields = {} }
define { name = "bpe", group = "tokenizer", path = "tokenizer.bpe", positional = "from",
  doc = "Byte-level BPE from tokenizer.json, vocab.json + merges.txt, or tokenizer.model.",
  fields = { { "from", kind.path, required = true, doc = "folder or file" } },
  example = 'tokenizer = tokenizer.bpe "models/Qwen2.5-3B"' }

local mask_field = { "mask", kind.enum { "document", "none" }, default = "document",
  doc = "document: attention stays within a document; none: packed text is one stream" }
local holdout_field = { "holdout", kind.range { min = 0, below = 1 }, default = 0.05,
  doc = "share of documents kept for validation, never trained on" }
local function data(name, doc, fields, positional, example)
  fields[#fields + 1] = mask_field
  fields[#fields + 1] = holdout_field
  define { name = name, group = "data", positional = positional, doc = doc, fields = fields, example = example }
end
local paths = kind.either(kind.path, kind.list(kind.path))
data("text", "Plain text: files, or folders read to the bottom; one document per file.", {
  { "from", paths, required = true, doc = "file, folder, or a list of them" },
  { "extensions", kind.list(kind.text),
    doc = 'only files that end so, as { "md", "txt" } (default: all that are text)' },
}, "from", 'data = text "books"')
data("jsonl", "One JSON object per line, one document each.", {
  { "from", paths, required = true, doc = "file, folder, or a list of them" },
  { "field", kind.text, default = "text", doc = "member that holds the text" },
}, "from", 'data = jsonl { from = "pile.jsonl", field = "text" }')
data("tokens", "Tokens made before: a Halo token file, or llm.c's .bin.", {
  { "file", kind.path, required = true, doc = "file or folder" },
}, "file", 'data = tokens "data/pg19.tok"')
data("needles", "Generated documents that hide numbers in filler text and ask for one at the end; "
  .. "the digits variant of needle in a haystack. See data/needles.lua.", {
  { "digits", kind.range { int = true, min = 1, max = 15 }, default = 7,
    doc = "digits of a hidden number (MInference)" },
  { "needles", kind.either(kind.count, kind.list(kind.count, 2)), default = 1,
    doc = "hidden numbers per document, or { from, to }" },
  { "questions", kind.either(kind.count, kind.list(kind.count, 2), kind.enum { "all" }), default = "all",
    doc = "questions per document, or { from, to }; all: one per hidden number. Fewer where they do not fit" },
  { "inside", kind.share, default = 0,
    doc = "share of questions, the last apart, that stand inside the document behind their number" },
  { "length", kind.either(kind.tokens, kind.list(kind.tokens, 2)),
    doc = "tokens of a document, or { from, to } (default: the stage's context)" },
  { "text_weight", kind.range { int = true, min = 0, max = 255 }, default = 0,
    doc = "what a token of filler or wording counts in the loss; 0: it is no target" },
  { "answer_weight", kind.range { int = true, min = 1, max = 255 }, default = 1,
    doc = "what a digit of an answer counts; hidden digits themselves never count" },
  { "filler", node "data", doc = "where filler text comes from (default: the other sources of the mix)" },
}, nil, "data = needles { digits = 4 }")
data("mix", "Several sources, drawn by weight.", {
  { "sources", kind.map(kind.text, node "data"), doc = "name = source" },
  { "from", kind.path, doc = "instead of sources: a folder with one token file or folder per name of weights" },
  { "weights", kind.map(kind.text, kind.range { min = 0 }), doc = "name = share, any scale (default: equal)" },
}, nil, 'data = mix { sources = { books = text "books", hidden = needles {} }, weights = { books = 4, hidden = 1 } }')

-- `data=DIR` on the command line means "the same, with this text": a mix keeps its other sources.
schema.coerce("data", function(v, place)
  if type(v) == "string" then return schema.construct("text", v, place) end
end)
schema.assign("data", function(current, text)
  if text:find "[{(]" then return nil end -- an expression
  if not fs.exists(text) then
    errors.raise("usage", ("data=%s: there is no such file or folder"):format(text), 0)
  end
  local sources = current and schema.type_of(current).name == "mix" and schema.values_of(current).sources
  if not sources then return schema.construct("text", { from = text }) end
  local found
  for name, source in pairs(sources) do
    if schema.type_of(source).name == "text" then
      if found then
        errors.raise("usage", ("data=%s: the mix has several text sources; say which, as data.sources.%s.from=%s")
          :format(text, found < name and found or name, text), 0)
      end
      found = name
    end
  end
  if not found then return schema.construct("text", { from = text }) end
  schema.values_of(sources[found]).from = text
  return current
end)

---- Optimizer -------------------------------------------------------------------------------------

local function decaying(shape)
  return function(self, o)
    local out = schema.copy(self)
    schema.merge(out, { decay = shape })
    return o and schema.merge(out, o) or out
  end
end
define { name = "rate", group = "rate", path = "warmup", positional = "peak",
  doc = "Learning rate: rises linearly to its peak, then stays or decays.",
  fields = {
    { "peak", kind.range { min = 0 }, required = true, doc = "highest rate" },
    { "steps", kind.index, default = 0, doc = "steps of the linear rise" },
    { "decay", kind.enum { "constant", "cosine", "linear" }, default = "constant", doc = "shape after the rise" },
    { "to", kind.range { min = 0 }, default = 0, doc = "rate at the end of the decay" },
    { "over", kind.count,
      doc = "steps of the decay (default: to the end of the run, or of the stage that set the rate)" },
  },
  methods = { cosine = decaying "cosine", linear = decaying "linear", constant = decaying "constant" },
  method_docs = { cosine = "{ to = rate, over = steps }", linear = "{ to = rate, over = steps }", constant = "()" },
  check = function(v, complain)
    if v.decay ~= "constant" and v.to > v.peak then
      complain(("decays from %g up to %g; to must not exceed the peak"):format(v.peak, v.to), "to")
    end
  end,
  example = "lr = warmup(1e-5, { steps = 20 }) :cosine { to = 1e-6 }" }
schema.coerce("rate", function(v, place)
  if type(v) == "number" then return schema.construct("warmup", v, place) end
end)
-- `optim.lr=1e-4` changes the peak and keeps the shape.
schema.assign("rate", function(current, text)
  local peak = tonumber(text)
  if not (peak and current) then return nil end
  return schema.merge(schema.copy(current), { peak = peak })
end)

local beta = kind.range { min = 0, below = 1 }
define { name = "adamw", group = "optim", doc = "AdamW. arXiv 1711.05101, in PyTorch's order of operations.",
  fields = {
    { "lr", node "rate", required = true,
      doc = "learning rate: a number, or warmup(peak, { steps = n }) :cosine { to = low }" },
    { "betas", kind.list(beta, 2), default = { 0.9, 0.95 },
      doc = "decay of the two moments (GPT-3, arXiv 2005.14165)" },
    { "decay", kind.range { min = 0 }, default = 0.1,
      doc = "weight decay of matrices; norms and biases have none (same source)" },
    { "clip", kind.range { min = 0 }, default = 1.0, doc = "largest gradient norm; 0: no clipping (same source)" },
    { "eps", kind.positive, default = 1e-8, doc = "added to the root of the second moment" },
    { "moments", kind.enum { "f32", "bf16" }, default = "f32",
      doc = "dtype of the two moments; bf16 takes half the memory and is rounded stochastically" },
  }, example = "optim = adamw { lr = warmup(1e-5, { steps = 20 }) :cosine { to = 1e-6 }, clip = 1.0 }" }

---- Stages, actions, guards -----------------------------------------------------------------------

define { name = "stage", group = "stage", doc = "A stretch of training with one context length.",
  fields = {
    { "name", kind.text, doc = "for logs (default: its number)" },
    { "context", kind.tokens, required = true, doc = "length of a sequence, tokens" },
    { "tokens", kind.tokens, excludes = "steps", doc = "how long: tokens in all, rounded up to whole steps" },
    { "steps", kind.count, excludes = "tokens", doc = "how long: optimizer steps, instead of tokens" },
    { "batch", kind.count, default = 1, doc = "sequences per step, over all ranks" },
    { "accumulate", kind.count, default = 1, doc = "micro-batches that share a step; the batch is divided" },
    { "rope", kind.changes "rope", doc = "position scheme from here on" },
    { "attention", kind.changes "attention", doc = "attention here: a pattern, or { some fields of the recipe's }" },
    { "lr", node "rate", doc = "learning rate of this stage alone" },
    { "offload", kind.bool, doc = "block inputs in host memory here (default: the model's)" },
    { "data", kind.changes "data",
      doc = "what to read here: a source, or some fields of the recipe's, as { sources = { x = { length = 4*K } } }" },
  },
  check = function(v, complain)
    if v.tokens and v.steps then complain("give tokens or steps, not both", "steps") end
    if not v.tokens and not v.steps then complain("needs tokens or steps", "context") end
    if v.batch % v.accumulate ~= 0 then
      complain(("batch (%d) must be a multiple of accumulate (%d)"):format(v.batch, v.accumulate), "accumulate")
    end
  end,
  example = "stage { context = 128*K, tokens = 0.5*B, attention = { keep = mass(0.95) } }" }

define { name = "log", group = "action", doc = "Write the console line and a line of train.jsonl.", fields = {},
  example = "[10] = log { }" }
define { name = "save", group = "action", doc = "Save a checkpoint.",
  fields = {
    { "keep", kind.count, default = 3, doc = "newest checkpoints that stay" },
    { "major", kind.count, doc = "steps whose multiples stay for good" },
  }, example = "[500] = save { keep = 3, major = 2000 }" }
define { name = "sample_text", group = "action", path = "sample_text", positional = "prompt",
  doc = "Generate a little text and print it.",
  fields = {
    { "prompt", kind.text, default = "", doc = "text to go on from" },
    { "tokens", kind.count, default = 64, doc = "tokens to generate" },
    { "temperature", kind.range { min = 0 }, default = 0, doc = "0: greedy" },
    { "top_p", kind.range { above = 0, max = 1 }, default = 1, doc = "nucleus, share of probability" },
  }, example = '[200] = sample_text { prompt = "The ring" }' }
define { name = "sparsity", group = "action", path = "measure.sparsity",
  doc = "Measure per layer and head: density, recall of attention mass, tokens without gradient, balance.",
  fields = {
    { "layers", kind.list(kind.count), doc = "layers, counted from 1 (default: all)" },
    { "samples", kind.count, default = 32, doc = "query rows per head for the sampled recall" },
    { "far", kind.tokens, doc = "distance from which a token counts as far (default: a quarter of the context)" },
    { "over", kind.count, default = 16, doc = "steps over which unreached far tokens are followed" },
    { "compare", kind.list(kind.enum { "dense", "frozen" }), default = {},
      doc = "also the loss of one held-out batch under these: dense attention, or this step's plans frozen" },
  }, example = "[100] = measure.sparsity { layers = { 1, 18, 36 } }" }

--- Define an evaluation action `eval.NAME` (see `M.pattern` for the shape of `e`).
function M.evaluation(e)
  define { name = e.name, group = "action", path = "eval." .. e.name, positional = e.positional, doc = e.doc,
    fields = own_fields(e), example = e.example, check = e.check }
end

local function guard(name, acts, doc, fields, example)
  fields[#fields + 1] = { "act", kind.enum(acts), default = acts[1], doc = "what to do then" }
  define { name = name, group = "guard", doc = doc, fields = fields, example = example }
end
guard("loss_spike", { "warn", "skip", "stop" }, "A loss or gradient norm far above its recent mean.", {
  { "z", kind.positive, default = 6, doc = "standard deviations (OLMo's setting, arXiv 2402.00838)" },
  { "window", kind.count, default = 128, doc = "steps the mean is taken over (same source)" },
}, 'loss_spike { z = 6, act = "skip" }')
guard("recall", { "warn", "widen", "stop" }, "Sampled recall of attention mass has fallen.", {
  { "below", kind.share, required = true, doc = "recall, 0..1" },
}, 'recall { below = 0.90, act = "widen" }')
guard("imbalance", { "warn", "stop" }, "One rank has much more attention work than the mean.", {
  { "above", kind.range { min = 1 }, required = true, doc = "slowest rank / mean" },
}, "imbalance { above = 1.25 }")

---- The recipe ------------------------------------------------------------------------------------

local action = kind.either(node "action", kind.lua_function)
local actions = kind.either(action, kind.list(action))

define { name = "recipe", group = "recipe", positional = "name", doc = "What to train, on what, how long.",
  fields = {
    { "name", kind.text, required = true, doc = "name of the run's folder and of its logs" },
    { "about", kind.text, doc = "a sentence for the report" },
    { "model", node "model", required = true, doc = "which model" },
    { "tokenizer", node "tokenizer", doc = "default: the model folder's, or tokenizer.byte" },
    { "attention", node "attention", default = new "dense",
      shown_default = "default dense { }", doc = "which keys each query sees, and how they meet" },
    { "mesh", node "mesh", default = new "mesh",
      shown_default = "default one rank", doc = "how ranks share the work" },
    { "data", node "data", required = true, doc = "what to read" },
    { "optim", node "optim", required = true, doc = "optimizer" },
    { "stages", kind.list(node "stage"), required = true, doc = "one or more stages, in order" },
    { "every", kind.map(kind.count, actions), default = {},
      doc = "[n] = what to do every n steps: an action, or a list" },
    { "initially", actions, default = {}, doc = "what to do before the first step" },
    { "finally", actions, default = {}, doc = "what to do at the end" },
    { "guard", kind.list(node "guard"), default = {}, doc = "what to watch" },
    { "seed", kind.index, default = 1, doc = "of weights, data order and sampling" },
    { "dtype", kind.enum { "f32", "bf16", "f64" },
      shown_default = "default: bf16 on cuda, f32 on the cpu",
      doc = "of weights and activations; the optimizer keeps fp32 masters of bf16 weights" },
    { "device", kind.enum { "cpu", "cuda" }, default = "cpu", doc = "where it runs" },
    { "deterministic", kind.bool, default = true, doc = "the same bits from run to run" },
    { "out", kind.path, default = "runs", doc = "folder that run folders are made in" },
    { "steps", kind.count, doc = "stop after so many steps in all, for a short trial" },
  } }
---- Words of other modules ------------------------------------------------------------------------

local here = debug.getinfo(1, "S").source:sub(2):gsub("[^/]*$", "")
local loaded = false

-- Every module of a folder of this tree, except `init` and one more.
local function modules_of(folder, except)
  local out = {}
  for _, file in ipairs(fs.list(here .. folder) or {}) do
    local name = file:match "^([%w_]+)%.lua$"
    if name and name ~= "init" and name ~= except then out[#out + 1] = require("halo." .. folder .. "." .. name) end
  end
  return out
end

--- Size of a resolved tokenizer's vocabulary.
function M.tokenizer_size(spec)
  local tokenizer = require "halo.tokenizer"
  return (spec.type == "byte" and tokenizer.byte {} or tokenizer.load(spec.from)).vocab_size
end

--- Define the words of model families, sparsity patterns and evaluations; once.
function M.load_modules()
  if loaded then return end
  loaded = true
  for _, family in ipairs(modules_of("model", "decoder")) do
    if family.defaults then model(family) end
  end
  for _, pattern in ipairs(modules_of("sparsity")) do
    if pattern.fields then M.pattern(pattern) end
  end
  for _, evaluation in ipairs(modules_of("eval")) do
    if evaluation.fields then M.evaluation(evaluation) end
  end
end

return M
