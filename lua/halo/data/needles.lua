--- Needles: documents that hide numbers in filler text and ask for them.
-- One generator makes training documents (each token with a weight in the loss) and evaluation tasks (a
-- prompt and the answer wanted), in the same words, so a model is tested on what it was trained on, at
-- lengths and depths it was not. The task is the digits variant of needle-in-a-haystack that MInference
-- uses ("the special magic CITY number", 7 digits, scored by finding the digits in the response;
-- reference: microsoft/MInference experiments/needle_in_a_haystack). Wording and cities here are our own.
--
--    <start>filler filler. The special magic Oslo number is 4820175. filler filler
--    filler. What is the special magic Oslo number? The special magic Oslo number is 4820175.
--    filler filler filler ... filler
--    filler. What is the special magic Oslo number? The special magic Oslo number is 4820175.
--
--    weight   text_weight     filler and wording                       1 in the tiny recipe
--             0               digits of the needle itself: nobody can predict them
--             answer_weight   digits of an answer                      5 to 100 there
--
-- Of the questions the last stands at the very end, as in the evaluation; each other one with the
-- probability `inside` somewhere behind its needle, else also at the end. Questions at many distances are
-- what makes the look-up learnable in the first place: a step with one answer at one distance has little
-- to go by. Answers weigh more the longer the document, for seven digits among 8K tokens of text would
-- otherwise be 0.1 % of the loss.
--
-- A needle goes to the token at `depth` percent of the filler and then back to the end of a sentence,
-- as the original does. The original walks until it meets a token that is "." alone and may walk far
-- where "." is merged with what follows; here any token that ends a sentence or a line counts, the walk is
-- bounded, and the place it came to is reported.
local args = require "halo.args"
local errors = require "halo.errors"
local ffi = require "ffi"
local random = require "halo.data.random"

local M = {}

local VERSION = 3 -- part of fingerprints: raise it when the same settings make other documents
local WALK = 256 -- tokens a needle may move back to a sentence's end

--- Cities, all different, in one word or two; a key of the needle.
M.cities = {
  "Aberdeen", "Accra", "Adelaide", "Ankara", "Antwerp", "Arequipa", "Asmara", "Auckland", "Bamako",
  "Basel", "Bergen", "Bilbao", "Bogota", "Bologna", "Bordeaux", "Brasilia", "Bremen", "Brisbane",
  "Cadiz", "Calgary", "Cardiff", "Casablanca", "Cologne", "Cordoba", "Cork", "Darwin", "Denver",
  "Dhaka", "Dresden", "Dublin", "Durban", "Edinburgh", "Florence", "Fukuoka", "Galway", "Gdansk",
  "Geneva", "Genoa", "Ghent", "Glasgow", "Granada", "Graz", "Hamburg", "Hanoi", "Havana", "Hobart",
  "Honolulu", "Houston", "Izmir", "Jaipur", "Kathmandu", "Kobe", "Krakow", "Kyoto", "La Paz",
  "Lausanne", "Leipzig", "Lille", "Limerick", "Lucerne", "Lyon", "Malmo", "Manila", "Marseille",
  "Medellin", "Milan", "Montreal", "Munich", "Muscat", "Nagoya", "Nantes", "Naples", "Nashville",
  "Odense", "Oporto", "Osaka", "Ottawa", "Oxford", "Palermo", "Perth", "Porto Alegre", "Potsdam",
  "Quebec", "Quito", "Recife", "Riga", "Rotterdam", "Salvador", "Sapporo", "Seville", "Siena",
  "Split", "Stuttgart", "Tampere", "Tartu", "Toledo", "Turin", "Utrecht", "Valencia", "Zagreb",
}

--- Wordings. `{city}` and `{number}` are replaced; the question must end where the answer begins.
M.templates = {
  magic = {
    needle = " The special magic {city} number is {number}.",
    question = " What is the special magic {city} number? The special magic {city} number is",
    answer = " {number}.",
  },
  lines = {
    needle = "\nThe special magic {city} number is {number}.\n",
    question = "\nQuestion: What is the special magic {city} number?\nAnswer: The special magic {city} number is",
    answer = " {number}.\n",
  },
}

local Needles = {}
Needles.__index = Needles

local function range_of(value, name, low)
  local lo, hi = value, value
  if type(value) == "table" then lo, hi = value[1], value[2] end
  if type(lo) ~= "number" or type(hi) ~= "number" or lo < low or hi < lo or lo % 1 ~= 0 or hi % 1 ~= 0 then
    errors.raise("usage", ("needles: %s must be a whole number from %d, or { from, to }"):format(name, low), 3)
  end
  return lo, hi
end

-- What a token says: LINE after a line break, STOP after . ! ? (maybe quoted), which ends a sentence only
-- if white space follows, BLANK when it begins with white space, DIGIT when a digit is in it.
local LINE, STOP, BLANK, DIGIT = 1, 2, 4, 8

local function marks_of(tok)
  local marks = ffi.new("uint8_t[?]", tok.vocab_size)
  for id = 0, tok.vocab_size - 1 do
    local text = tok:token(id)
    marks[id] = (text:find "\n%s*$" and LINE or 0) + (text:find "[.!?][\"')%]]*$" and STOP or 0)
      + (text:find "^%s" and BLANK or 0) + (text:find "%d" and DIGIT or 0)
  end
  return marks
end

-- Whether a sentence ends between two neighbouring tokens.
local function is_end(marks, left, right)
  return bit.band(marks[left], LINE) ~= 0
    or bit.band(marks[left], STOP) ~= 0 and bit.band(marks[right], BLANK) ~= 0
end

--- Make a generator.
-- @tparam table o
-- @tparam Tokenizer o.tokenizer
-- @tparam Tokens o.filler text between needles, made with the same tokenizer
-- @tparam[opt=7] int o.digits of a number (MInference), 1 to 15
-- @tparam[opt=1] int|table o.needles per document, or `{ from, to }` drawn per document
-- @tparam[opt] int|table o.length tokens of a training document, or `{ from, to }` (default: all of a sample)
-- @tparam[opt="all"] int|table|string o.questions per training document, or `{ from, to }`: the first asks
--   for the first needle and so on, more than there are needles for one of them again; "all": each once.
--   A document too short for what was drawn gets what fits, one needle and one question at least.
-- @tparam[opt=0] number o.inside share of the questions but the last that stand inside the document
-- @tparam[opt=0] int o.text_weight of filler and wording in the loss, 0 (no targets) to 255
-- @tparam[opt=1] int o.answer_weight of the digits of answers, 1 to 255
-- @tparam[opt="magic"] string|table o.template a name of `needles.templates`, or `{ needle, question, answer }`
-- @tparam[opt] table o.cities default `needles.cities`
-- @usage local n = data.needles.new { tokenizer = tok, filler = text, digits = 4, needles = { 1, 4 } }
function M.new(o)
  o = args.named("needles.new", o, { tokenizer = "table", filler = "table", digits = { "int", 7 },
    needles = { "int|table", 1 }, length = "int|table?", questions = { "int|table|string", "all" },
    inside = { "number", 0 }, text_weight = { "int", 0 }, answer_weight = { "int", 1 },
    template = { "string|table", "magic" }, cities = { "table", M.cities } })
  local function within(name, low, high)
    if not (o[name] >= low and o[name] <= high) then
      errors.raise("usage", ("needles: %s is %g, wanted %g to %g"):format(name, o[name], low, high), 3)
    end
  end
  within("digits", 1, 15)
  within("inside", 0, 1)
  within("text_weight", 0, 255)
  within("answer_weight", 1, 255)
  local template = o.template
  if type(template) == "string" then
    template = M.templates[o.template]
    if not template then
      errors.raise("usage", ('needles: no template "%s"%s'):format(o.template,
        args.did_you_mean(o.template, args.keys(M.templates))), 2)
    end
  end
  template = args.named("needles: template", template, { needle = "string", question = "string", answer = "string" })
  local self = setmetatable({ tokenizer = o.tokenizer, filler = o.filler, digits = o.digits, inside = o.inside,
    text_weight = o.text_weight, answer_weight = o.answer_weight, template = template, cities = o.cities }, Needles)
  self.least, self.most = range_of(o.needles, "needles", 1)
  if o.questions ~= "all" then
    if type(o.questions) == "string" then
      errors.raise("usage", 'needles: questions must be a number, { from, to } or "all"', 2)
    end
    self.fewest, self.many = range_of(o.questions, "questions", 1)
  end
  if o.length then self.shortest, self.longest = range_of(o.length, "length", 2) end
  if self.most > #self.cities then
    errors.raise("usage", ("needles: %d needles, but only %d cities"):format(self.most, #self.cities), 2)
  end
  o.filler:check_tokenizer(o.tokenizer)
  if o.filler.count < 2 then errors.raise("data", "needles: the filler is empty", 2) end
  self.marks = marks_of(o.tokenizer)
  -- What a document begins with: the first token takes the attention of whoever looks for nothing.
  local start = o.tokenizer.bos or o.tokenizer.document_end
  self.start = { ids = ffi.new("int32_t[1]", start or 0), n = start and 1 or 0, weight = o.text_weight }
  if self.shortest then
    local least = self:shortest_document()
    if self.shortest < least then
      errors.raise("usage", ("needles: length from %d, but a needle of %d digits and its question take up to %d tokens")
        :format(self.shortest, self.digits, least), 2)
    end
  end
  return self
end

local function fill_in(text, city, number)
  return (text:gsub("{(%w+)}", { city = city, number = number }))
end

--- Tokens that any one needle with its question and answer fits into.
function Needles:shortest_document()
  local longest, number = 0, ("8"):rep(self.digits)
  for _, city in ipairs(self.cities) do
    local n = 0
    for _, name in ipairs { "needle", "question", "answer" } do
      n = n + self.tokenizer:count(fill_in(self.template[name], city, number))
    end
    longest = math.max(longest, n)
  end
  return self.start.n + longest
end

-- Parts to one piece: n ids of memory from `from` on (not a pointer into it: that would not keep it
-- alive), weight a number or memory of n.
local function concat(parts)
  local n = 0
  for _, p in ipairs(parts) do n = n + p.n end
  local ids, weight, at = ffi.new("int32_t[?]", math.max(n, 1)), ffi.new("uint8_t[?]", math.max(n, 1)), 0
  for _, p in ipairs(parts) do
    ffi.copy(ids + at, p.ids + (p.from or 0), p.n * 4)
    if type(p.weight) == "number" then
      ffi.fill(weight + at, p.n, p.weight)
    else
      ffi.copy(weight + at, p.weight, p.n)
    end
    at = at + p.n
  end
  return ids, n, weight
end

-- One of a needle's texts, encoded; tokens with a digit in them weigh `digits`, the others `rest`.
local function part_of(self, text, rest, digits)
  local ids, n = self.tokenizer:encode_buffer(text)
  local weight = ffi.new("uint8_t[?]", math.max(n, 1))
  for i = 0, n - 1 do weight[i] = bit.band(self.marks[ids[i]], DIGIT) ~= 0 and digits or rest end
  return { ids = ids, n = n, weight = weight }
end

-- Needles of one document: city, number, and their three texts.
local function draw_needles(self, rng, n)
  local list = {}
  for i, city in ipairs(rng:sample(self.cities, n)) do
    local low = self.digits == 1 and 0 or 10 ^ (self.digits - 1)
    local number = ("%d"):format(rng:int(low, 10 ^ self.digits - 1))
    local function part(name, rest, digits)
      return part_of(self, fill_in(self.template[name], city, number), rest, digits)
    end
    list[i] = {
      city = city, number = number,
      needle = part("needle", self.text_weight, 0),
      question = part("question", self.text_weight, self.text_weight),
      -- what is around the number belongs to the answer: it is said again and again
      answer = part("answer", math.max(self.text_weight, 1), self.answer_weight),
    }
  end
  return list
end

-- Where filler of n tokens begins: anywhere, then on to a sentence's end where one is near.
local function filler_start(self, rng, n)
  local count = self.filler.count
  local from = count > n and rng:int(0, count - n - 1) or 0
  local near = math.min(WALK, count - from)
  local ids = self.filler:read(from, near)
  for i = 0, near - 2 do
    if is_end(self.marks, ids[i], ids[i + 1]) then return from + i + 1 end
  end
  return from
end

-- n tokens of filler, going around when the text is short; ends of documents are left out.
local function read_filler(self, rng, n)
  local count, stop = self.filler.count, self.tokenizer.document_end
  local ids = ffi.new("int32_t[?]", math.max(n, 1))
  local from, at, idle = filler_start(self, rng, n), 0, 0
  while at < n do
    local m, before = math.min(n - at, count - from), at
    local piece = self.filler:read(from, m)
    for i = 0, m - 1 do
      if piece[i] ~= stop then
        ids[at] = piece[i]
        at = at + 1
      end
    end
    from = (from + m) % count
    idle = at == before and idle + m or 0
    if idle > count then errors.raise("data", "needles: the filler has nothing but ends of documents", 0) end
  end
  return ids
end

-- The place for a needle near token `at` of n: back to a sentence's end, no further than WALK.
local function place(self, ids, n, at)
  if at >= n then return n end
  for back = 0, math.min(WALK, at) do
    local p = at - back
    if p == 0 or is_end(self.marks, ids[p - 1], ids[p]) then return p end
  end
  return at
end

local function tokens_in(list, ...)
  local n = 0
  for _, needle in ipairs(list) do
    for _, part in ipairs { ... } do n = n + needle[part].n end
  end
  return n
end

-- Put things into filler. events: list of { at (token of the filler), order (among those of one place),
-- parts (names), needle }. Needles learn their `position` in the whole and the percent `realised`.
local function lay_out(self, filler, n, events)
  table.sort(events, function(a, b)
    if a.at ~= b.at then return a.at < b.at end
    return a.order < b.order
  end)
  local parts, done, position = { self.start }, 0, self.start.n
  for _, event in ipairs(events) do
    parts[#parts + 1] = { ids = filler, from = done, n = event.at - done, weight = self.text_weight }
    position, done = position + event.at - done, event.at
    for _, name in ipairs(event.parts) do
      if name == "needle" then
        event.needle.position, event.needle.realised = position, n > 0 and 100 * event.at / n or 0
      end
      parts[#parts + 1] = event.needle[name]
      position = position + event.needle[name].n
    end
  end
  parts[#parts + 1] = { ids = filler, from = done, n = n - done, weight = self.text_weight }
  return parts
end

local asking = { "question", "answer" }

-- Needles and the needle of each question, as many as `length` tokens hold; nil if not even one does.
local function draw_task(self, rng, length)
  local list = draw_needles(self, rng, rng:int(self.least, self.most))
  local asked = {}
  for q = 1, self.many and rng:int(self.fewest, self.many) or #list do asked[q] = list[q] or rng:choice(list) end
  while true do
    local room = length - self.start.n - tokens_in(list, "needle") - tokens_in(asked, "question", "answer")
    if room >= 0 then return list, asked, room end
    if #asked > 1 then
      asked[#asked] = nil
    elseif #list > 1 then
      list[#list] = nil
    else
      return nil
    end
  end
end

--- One training document of exactly `length` tokens, or nil if needle and question leave no room.
-- @tparam Random rng
-- @tparam int length
-- @treturn table|nil `ids`, `n`, `loss` (weights), `needles` (each `city`, `number`, `position`,
-- `realised`), `asked` (the needle of each question)
function Needles:document(rng, length)
  local list, asked, room = draw_task(self, rng, length)
  if not list then return nil end
  local filler, events = read_filler(self, rng, room), {}
  for i, needle in ipairs(list) do
    needle.at = place(self, filler, room, math.floor(rng:uniform() * (room + 1)))
    events[i] = { at = needle.at, order = i, needle = needle, parts = { "needle" } }
  end
  for q, needle in ipairs(asked) do
    local at = room
    if q < #asked and rng:uniform() < self.inside then
      at = math.max(needle.at, place(self, filler, room, rng:int(needle.at, room)))
    end
    -- the last question comes last of all
    events[#events + 1] = { at = at, order = #list + q, needle = needle, parts = asking }
  end
  local ids, n, weight = concat(lay_out(self, filler, room, events))
  return { ids = ids, n = n, loss = weight, needles = list, asked = asked }
end

--- A generated source for data.loader: documents one after the other. What would be left at the end and
-- is shorter than the shortest belongs to the document before it.
function Needles:generator()
  local function make(rng, length)
    local documents, left = {}, length
    while left > 0 do
      local want = self.shortest and math.min(left, rng:int(self.shortest, self.longest)) or left
      if self.shortest and left - want < self.shortest then want = left end
      local d = self:document(rng, want)
      if not d then
        errors.raise("usage", ("needles: a needle of %d digits and its question do not fit %d tokens"):format(
          self.digits, want), 0)
      end
      documents[#documents + 1] = d
      left = left - d.n
    end
    return documents
  end
  return require("halo.data.loader").generate { make = make, name = self:describe() }
end

--- One evaluation task: prompt and answer together have exactly `context` tokens.
-- @tparam table o
-- @tparam int o.context
-- @tparam number o.depth percent of the filler before the needle that is asked for, 0 to 100
-- @tparam[opt=1] int o.seed
-- @tparam[opt=0] int o.round another task of the same cell
-- @tparam[opt=1] int o.needles numbers hidden; the others lie at random depths
-- @treturn table `prompt` (int32_t memory), `n`, `answer` (the digits), `answer_ids`, `answer_n`, `city`,
-- `context`, `depth`, `realised` (percent, after walking back), `position` (token of the needle)
-- @usage local task = n:task { context = 8192, depth = 50 }
function Needles:task(o)
  o = args.named("needles:task", o, { context = "int", depth = "number", seed = { "int", 1 }, round = { "int", 0 },
    needles = { "int", 1 } })
  if o.depth < 0 or o.depth > 100 then
    errors.raise("usage", ("needles:task: depth is %g, want 0 to 100"):format(o.depth), 2)
  end
  if o.needles < 1 or o.needles > #self.cities then
    errors.raise("usage", ("needles:task: %d needles, want 1 to %d"):format(o.needles, #self.cities), 2)
  end
  local purpose = ("niah/%d/%.6f/%d/%d"):format(o.context, o.depth, o.round, o.needles)
  local rng = random.new(random.derive(o.seed, purpose))
  local list = draw_needles(self, rng, o.needles)
  local asked = list[1]
  local room = o.context - self.start.n - tokens_in(list, "needle") - asked.question.n - asked.answer.n
  if room < 0 then
    errors.raise("usage", ("needles:task: needles and question have %d tokens, the context %d"):format(
      o.context - room, o.context), 2)
  end
  local filler, events = read_filler(self, rng, room), {}
  for i, needle in ipairs(list) do
    local depth = i == 1 and o.depth or 100 * rng:uniform()
    events[i] = { at = place(self, filler, room, math.floor(room * depth / 100)), order = i, needle = needle,
      parts = { "needle" } }
  end
  events[#events + 1] = { at = room, order = #list + 1, needle = asked, parts = { "question" } }
  local prompt, n = concat(lay_out(self, filler, room, events))
  return { prompt = prompt, n = n, answer = asked.number, answer_ids = asked.answer.ids, answer_n = asked.answer.n,
    city = asked.city, context = o.context, depth = o.depth, realised = asked.realised, position = asked.position }
end

--- Whether a response names the number: its digits are in it (MInference's rule).
function M.correct(task, response) return response:find(task.answer, 1, true) ~= nil end

--- Everything that decides the documents, for fingerprints.
function Needles:describe()
  return ("needles v%d %s %d digits, %d to %d, length %s to %s, questions %s to %s, inside %.17g, weights %d %d, "
    .. "%s, walk %d, start %d, filler %s, tokenizer %s"):format(VERSION,
    table.concat({ self.template.needle, self.template.question, self.template.answer }, "|"), self.digits,
    self.least, self.most, tostring(self.shortest), tostring(self.longest), tostring(self.fewest),
    tostring(self.many), self.inside, self.text_weight, self.answer_weight, table.concat(self.cities, ","), WALK,
    self.start.n > 0 and self.start.ids[0] or -1, self.filler:hash(), self.tokenizer:hash())
end

function Needles:__tostring()
  return ("needles of %d digits, %s per document, answers weigh %d, text %d"):format(self.digits,
    self.least == self.most and self.least or self.least .. " to " .. self.most, self.answer_weight,
    self.text_weight)
end

return M
