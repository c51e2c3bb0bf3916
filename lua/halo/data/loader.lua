--- Loader: which tokens every rank gets at every step.
--
-- The unit is the sample: `context` tokens and their targets. Sample i of a run is a pure function of
-- (seed, i). Nothing else enters: not the number of ranks, not the batch size, not what was read
-- before. So a run can stop at any sample and go on at another world size, and all the state there is
-- to save is the index of the next sample, with a fingerprint that refuses other data.
--
--    sample i ─► source s     drawn by weight from (seed, "mix", i)
--             ─► draw k of s  how often s was drawn before i
--      text      epoch k div n, window permute(k mod n): every window once per epoch, in new order
--      generator make(rng(seed, s, k), context + 1): documents made on the spot
--
-- A window is context+1 tokens, so that each token but the first of the text is a target once per
-- epoch; the last window is padded, not dropped.
--
-- Batches are cut in the order of a layout: labels are made from the whole row first, then ids, labels
-- and positions are gathered by the rank's map (core/sample.c says why in this order).
local args = require "halo.args"
local errors = require "halo.errors"
local ffi = require "ffi"
local halo_ffi = require "halo.ffi"
local random = require "halo.data.random"
local tensor = require "halo.tensor"

local C = halo_ffi.C

local M = {}

---- Sources -----------------------------------------------------------------------------------

-- A source answers `fill(k, into)`: put draw k of it into the buffers (tokens, documents, loss of
-- n+1), and `describe()`: what belongs to the fingerprint.

local TextSource = {}
TextSource.__index = TextSource

local function text_source(t, seed, context, pad)
  if t.count < 2 then errors.raise("data", "data.loader: a source has fewer than two tokens", 0) end
  return setmetatable({ tokens = t, seed = seed, context = context, pad = pad,
    windows = math.max(1, math.ceil((t.count - 1) / context)) }, TextSource)
end

--- The window that draw k reads.
function TextSource:window(k)
  local epoch = math.floor(k / self.windows)
  return tonumber(C.halo_random_permute(self.windows, self.seed, epoch, k - epoch * self.windows))
end

function TextSource:fill(k, into)
  local first = self:window(k) * self.context
  halo_ffi.call(C.halo_tokens_read, into.tokens, into.documents, self.tokens.handle, first,
    self.context + 1, self.pad)
  ffi.fill(into.loss, self.context + 1, 1)
end

function TextSource:describe() return "text " .. self.tokens:hash() end

local Generator = {}
Generator.__index = Generator

--- A source made by a function.
-- `make(rng, length)` returns a list of documents that together have at most `length` tokens (longer ones
-- are cut, the rest is padding); a document is `{ ids = array or int32_t memory, n = length of memory,
-- loss = nil or array or uint8_t memory of 0 to 255 }`, loss saying what each token weighs as a target (0: it
-- is none; nil: all weigh 1). The function must use no other source of chance than `rng` (data/random.lua).
-- @tparam table o
-- @tparam function o.make
-- @tparam string o.name what it is and every setting that changes what it makes: part of the fingerprint
-- @usage data.generate { name = "count to n, v1", make = function(rng, length) ... end }
function M.generate(o)
  return setmetatable(args.named("data.generate", o, { make = "callable", name = "string" }), Generator)
end

local function bound(generator, seed, context, pad)
  return setmetatable({ make = generator.make, name = generator.name, seed = seed, context = context,
    pad = pad }, Generator)
end

local function copy_document(d, number, into, at, room)
  local ids, loss = d.ids, d.loss
  local is_table = type(ids) == "table"
  local n = math.min(d.n or #ids, room)
  local shift = is_table and 1 or 0
  local loss_shift = type(loss) == "table" and 1 or 0
  for i = 0, n - 1 do
    into.tokens[at + i] = ids[i + shift]
    into.documents[at + i] = number
    into.loss[at + i] = loss and loss[i + loss_shift] or 1
  end
  return n
end

function Generator:fill(k, into)
  local length, at = self.context + 1, 0
  local documents = self.make(random.new(self.seed, k), length)
  for number, d in ipairs(documents) do
    if at == length then break end
    at = at + copy_document(d, number - 1, into, at, length - at)
  end
  for i = at, length - 1 do
    into.tokens[i], into.documents[i], into.loss[i] = self.pad, -1, 0
  end
end

function Generator:describe() return "generator " .. self.name end

---- Loader ------------------------------------------------------------------------------------

local Loader = {}
Loader.__index = Loader

local CHECKPOINT = 4096 -- samples between remembered counts

--- Make a loader.
-- @tparam table o
-- @tparam table o.sources name -> `{ tokens = Tokens or generator = data.generate{}, weight = number }`
-- @tparam int o.context tokens of a sample, N
-- @tparam[opt=1] int o.seed
-- @tparam[opt=""] string o.stream name of a stage: other streams of one seed are in other orders
-- @tparam[opt="document"] string o.mask "document": no target across a document's end, and `batch.documents`
-- tells attention where documents end; "none": packed text is one stream
-- @tparam[opt] string o.positions "restart": count from the start of each document (default with mask
-- "document": it is what Hugging Face's and ProLong's packed training do, and inference sees it);
-- "continue": 0 to N-1 (default with mask "none"). Inside a document rotary attention is the same.
-- @tparam[opt=0] int o.pad id of padding
-- @usage data.loader { sources = { books = { tokens = t } }, context = 8192, seed = 1 }
function M.new(o)
  o = args.named("data.loader", o, { sources = "table", context = "int", seed = { "int", 1 },
    stream = { "string", "" }, mask = { "string", "document" }, positions = "string?", pad = { "int", 0 } })
  local function choice(name, value, choices)
    for _, c in ipairs(choices) do if value == c then return end end
    errors.raise("usage", ('data.loader: %s = "%s"%s'):format(name, value, args.did_you_mean(value, choices)), 3)
  end
  o.positions = o.positions or (o.mask == "document" and "restart" or "continue")
  choice("mask", o.mask, { "document", "none" })
  choice("positions", o.positions, { "restart", "continue" })
  if o.positions == "restart" and o.mask == "none" then
    errors.raise("usage", 'data.loader: positions restart only where mask = "document"', 2)
  end
  if o.context < 1 then errors.raise("usage", "data.loader: context must be at least 1", 2) end
  local self = setmetatable({ context = o.context, mask = o.mask, positions = o.positions, pad = o.pad,
    seed = o.seed, stream = o.stream, names = args.keys(o.sources), sources = {}, bounds = {},
    next = 0, remembered = {} }, Loader)
  if #self.names == 0 then errors.raise("usage", "data.loader: no sources", 2) end
  self.mix_seed = random.derive(o.seed, "mix/" .. o.stream)
  local total = 0
  for _, name in ipairs(self.names) do
    local s = args.named("data.loader: source " .. name, o.sources[name],
      { tokens = "table?", generator = "table?", weight = { "number", 1 } })
    if (s.tokens == nil) == (s.generator == nil) then
      errors.raise("usage", ("data.loader: source %s needs tokens or generator"):format(name), 2)
    end
    if not (s.weight >= 0 and s.weight < math.huge) then
      errors.raise("usage", ("data.loader: source %s has weight %s"):format(name, tostring(s.weight)), 2)
    end
    total = total + s.weight
    local seed = random.derive(o.seed, "source/" .. o.stream .. "/" .. name)
    self.sources[#self.sources + 1] = s.tokens and text_source(s.tokens, seed, o.context, o.pad)
      or bound(s.generator, seed, o.context, o.pad)
    self.bounds[#self.bounds + 1] = s.weight
  end
  if total == 0 then errors.raise("usage", "data.loader: all weights are 0", 2) end
  local sum = 0
  for i, weight in ipairs(self.bounds) do
    sum = sum + weight / total
    self.bounds[i] = sum
  end
  self.bounds[#self.bounds] = 1 -- whatever rounding left
  self.weights = {}
  for i, name in ipairs(self.names) do
    self.weights[name] = self.bounds[i] - (self.bounds[i - 1] or 0)
  end
  return self
end

-- Index of the source of sample i.
local function source_of(self, i)
  if #self.bounds == 1 then return 1 end
  local u = C.halo_random_uniform(self.mix_seed, 0, i)
  for s, bound_ in ipairs(self.bounds) do
    if u < bound_ then return s end
  end
end

-- How often each source was drawn before sample i: counted once, remembered every so often. A resumed
-- run counts up to where it is, which takes milliseconds per 10^5 samples.
local function counts_before(self, i)
  local slot = math.floor(i / CHECKPOINT)
  local from = slot
  while from > 0 and not self.remembered[from] do from = from - 1 end
  local counts = {}
  for s = 1, #self.sources do counts[s] = from > 0 and self.remembered[from][s] or 0 end
  for j = from * CHECKPOINT, i - 1 do
    if j % CHECKPOINT == 0 and j > from * CHECKPOINT then
      local copy = {}
      for s = 1, #counts do copy[s] = counts[s] end
      self.remembered[j / CHECKPOINT] = copy
    end
    local s = source_of(self, j)
    counts[s] = counts[s] + 1
  end
  return counts
end

--- What sample i is: name of its source, draw number within the source, and for text the window.
function Loader:locate(i)
  local s = source_of(self, i)
  local k = #self.sources == 1 and i or counts_before(self, i)[s]
  return self.names[s], k, self.sources[s].window and self.sources[s]:window(k)
end

local function buffers(self, rows)
  local n = self.context
  if not self.into then
    self.into = { tokens = ffi.new("int32_t[?]", n + 1), documents = ffi.new("int32_t[?]", n + 1),
      loss = ffi.new("uint8_t[?]", n + 1) }
  end
  local out = {}
  for _, name in ipairs { "ids", "labels", "positions", "documents", "weights" } do
    out[name] = ffi.new("int32_t[?]", rows * n)
  end
  return out
end

-- Weights of n labels from those of n+1 tokens, shifted as the labels are; whether one is above 1.
local function weigh(weights, labels, loss, n)
  local is_weighted = false
  for i = 0, n - 1 do
    local w = labels[i] == C.HALO_NO_TARGET and 0 or loss[i + 1]
    weights[i] = w
    is_weighted = is_weighted or w > 1
  end
  return is_weighted
end

-- Rows of samples first .. first+count-1, the number of targets in them, and their sources.
local function read_rows(self, first, count)
  local n = self.context
  local rows = buffers(self, count)
  local flags = (self.mask == "document" and C.HALO_SAMPLE_DOCUMENTS or 0)
    + (self.positions == "restart" and C.HALO_SAMPLE_RESTART or 0)
  local targets, one, names = 0, ffi.new "int64_t[1]", {}
  local counts, is_weighted = counts_before(self, first), false
  for r = 0, count - 1 do
    local s, at = source_of(self, first + r), r * n
    self.sources[s]:fill(counts[s], self.into)
    counts[s] = counts[s] + 1
    names[r + 1] = self.names[s]
    halo_ffi.call(C.halo_sample_finish, rows.ids + at, rows.labels + at, rows.positions + at,
      rows.documents + at, one, self.into.tokens, self.into.documents, self.into.loss, n, flags)
    targets = targets + tonumber(one[0])
    is_weighted = weigh(rows.weights + at, rows.labels + at, self.into.loss, n) or is_weighted
  end
  if not is_weighted then rows.weights = nil end
  return rows, targets, names
end

local function to_tensor(memory, rows, n)
  return tensor.from_pointer(memory, { shape = { rows, n }, dtype = "i32", device = "cpu" })
end

-- Global tokens of `here` ranks from `rank` on, stacked.
local function layout_map(layout, rank, here)
  local local_tokens = tonumber(C.halo_layout_local_tokens(layout))
  local map = ffi.new("int64_t[?]", here * local_tokens)
  for r = 0, here - 1 do
    halo_ffi.call(C.halo_layout_map, layout, rank + r, map + r * local_tokens)
  end
  return map, here * local_tokens
end

--- A batch, cut for this process.
-- With data parallelism every group of ranks asks for its own `first`: samples do not know who reads them.
-- @tparam table o
-- @tparam int o.rows sequences, B
-- @tparam[opt] int o.first first sample (default: `loader.next`, which moves on by `rows`)
-- @tparam[opt] Layout o.layout gather these ranks' tokens (default: rows as they are)
-- @tparam[opt=0] int o.rank first rank of the layout held by this process
-- @tparam[opt=1] int o.here ranks held by this process, stacked in rank order
-- @treturn table `ids`, `labels`, `positions` (tensors [B,T], i32), `documents` (int32_t memory [B*N] in
-- global order; nil with mask "none"), `weights` (tensor [B,T], f32, what each label counts; nil when all
-- count 1), `targets` (labels of whole rows, all ranks of the layout together), `rows`, `context`, `first`,
-- `sources` (a name per row)
-- @usage for step = 1, 100 do local batch = loader:batch { rows = 8 } end
function Loader:batch(o)
  o = args.named("loader:batch", o, { rows = "int", first = "int?", layout = "table|cdata?", rank = { "int", 0 },
    here = { "int", 1 } })
  if o.rows < 1 then errors.raise("usage", ("loader:batch: rows is %d"):format(o.rows), 2) end
  local first, n = o.first, self.context
  if not first then
    first = self.next
    self.next = first + o.rows
  end
  local rows, targets, names = read_rows(self, first, o.rows)
  local batch = { first = first, rows = o.rows, context = n, targets = targets, sources = names,
    documents = self.mask == "document" and rows.documents or nil }
  if not o.layout then
    for _, name in ipairs { "ids", "labels", "positions" } do batch[name] = to_tensor(rows[name], o.rows, n) end
    if rows.weights then batch.weights = to_tensor(rows.weights, o.rows, n):cast "f32" end
    return batch
  end
  local layout = type(o.layout) == "table" and o.layout.handle or o.layout
  if tonumber(C.halo_layout_tokens(layout)) ~= n then
    errors.raise("usage", ("loader:batch: the layout is for %d tokens, samples have %d"):format(
      tonumber(C.halo_layout_tokens(layout)), n), 2)
  end
  local map, n_map = layout_map(layout, o.rank, o.here)
  local part = ffi.new("int32_t[?]", o.rows * n_map)
  local function gathered(name, fill)
    halo_ffi.call(C.halo_rows_gather, part, rows[name], o.rows, n, map, n_map, fill)
    return to_tensor(part, o.rows, n_map)
  end
  batch.ids, batch.labels = gathered("ids", self.pad), gathered("labels", C.HALO_NO_TARGET)
  batch.positions = gathered("positions", 0)
  if rows.weights then batch.weights = gathered("weights", 0):cast "f32" end
  return batch
end

---- State and fingerprint ---------------------------------------------------------------------

-- What decides the samples, as a list of { what, value }, all text.
local function identity(self)
  local list = { { "seed", ("%.0f"):format(self.seed) }, { "stream", self.stream },
    { "context", ("%d"):format(self.context) }, { "mask", self.mask }, { "positions", self.positions },
    { "padding", ("%d"):format(self.pad) } }
  for i, name in ipairs(self.names) do
    list[#list + 1] = { "source " .. name, self.sources[i]:describe() }
    list[#list + 1] = { "weight of " .. name, ("%.12g"):format(self.weights[name]) }
  end
  return list
end

local function fingerprint(list)
  local h = C.halo_hash_bytes("", 0, 1)
  for _, item in ipairs(list) do
    local line = item[1] .. "\0" .. item[2] .. "\0"
    h = C.halo_hash_bytes(line, #line, h)
  end
  return (bit.tohex(h, 16))
end

--- 16 hexadecimal digits that are equal when all samples are.
function Loader:fingerprint() return fingerprint(identity(self)) end

--- What a checkpoint keeps: a table of text and numbers.
-- @tparam[opt] int next index of the next sample, default `loader.next`
function Loader:state(next)
  local list = identity(self)
  return { next = next or self.next, fingerprint = fingerprint(list), identity = list }
end

--- Go on from a saved state.
-- @raise class data when the state belongs to other data, saying what differs
function Loader:resume(state)
  if type(state) ~= "table" or type(state.next) ~= "number" or type(state.fingerprint) ~= "string" then
    errors.raise("data", "loader:resume: the state is malformed", 2)
  end
  local list = identity(self)
  if state.fingerprint ~= fingerprint(list) then
    local now, why = {}, {}
    for _, item in ipairs(list) do now[item[1]] = item[2] end
    for _, item in ipairs(type(state.identity) == "table" and state.identity or {}) do
      if now[item[1]] ~= item[2] then
        why[#why + 1] = ("%s was %s, is %s"):format(item[1], tostring(item[2]), now[item[1]] or "absent")
      end
      now[item[1]] = nil
    end
    for _, what in ipairs(args.keys(now)) do why[#why + 1] = what .. " is new" end
    errors.raise("data", "the data is not what the checkpoint was trained on: " .. table.concat(why, "; "), 2)
  end
  self.next = state.next
end

---- Audit -------------------------------------------------------------------------------------

--- Count what a run over the first samples would see.
-- @tparam table o
-- @tparam int o.samples how many
-- @tparam[opt=0] int o.first
-- @treturn table per source: `draws`, `share`, `weight`, for text `windows`, `seen`, `repeats`, `epochs`;
-- and `targets`, `tokens`, `documents` in all; prints as a table
-- @usage print(loader:audit { samples = 1000 })
function Loader:audit(o)
  o = args.named("loader:audit", o, { samples = "int", first = { "int", 0 } })
  local report = setmetatable({ samples = o.samples, sources = {}, targets = 0, documents = 0,
    tokens = o.samples * self.context }, M.Report)
  local seen = {}
  for i, name in ipairs(self.names) do
    report.sources[i] = { name = name, draws = 0, weight = self.weights[name], windows = self.sources[i].windows,
      seen = 0, repeats = 0 }
    seen[i] = {}
  end
  for first = o.first, o.first + o.samples - 1 do
    local rows, targets = read_rows(self, first, 1)
    report.targets = report.targets + targets
    local padded = self.mask == "document" and self.into.documents[self.context - 1] < 0
    report.documents = report.documents + rows.documents[self.context - 1] + (padded and 0 or 1)
    local s = source_of(self, first)
    local r = report.sources[s]
    r.draws = r.draws + 1
    if r.windows then
      local _, _, window = self:locate(first)
      r.repeats = r.repeats + (seen[s][window] and 1 or 0)
      r.seen = r.seen + (seen[s][window] and 0 or 1)
      seen[s][window] = true
    end
  end
  for _, r in ipairs(report.sources) do
    r.share = r.draws / math.max(o.samples, 1)
    if r.windows then r.epochs = r.draws / r.windows end
  end
  return report
end

M.Report = {
  __tostring = function(self)
    local lines = { ("%d samples, %d tokens, %.1f %% of them targets, %.2f documents per sample"):format(
      self.samples, self.tokens, 100 * self.targets / math.max(self.tokens, 1),
      self.documents / math.max(self.samples, 1)) }
    for _, r in ipairs(self.sources) do
      local text = ("  %-16s %6d draws  %5.1f %% (weight %5.1f %%)"):format(r.name, r.draws, 100 * r.share,
        100 * r.weight)
      if r.windows then
        text = text .. ("  %d of %d windows seen, %d repeats, %.2f epochs"):format(r.seen, r.windows, r.repeats,
          r.epochs)
      end
      lines[#lines + 1] = text
    end
    return table.concat(lines, "\n")
  end,
}

return M
