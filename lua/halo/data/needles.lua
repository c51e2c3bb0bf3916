--- Needles: documents that hide numbers in filler text and ask for them at the end.
-- One generator makes training documents (with a loss mask) and evaluation tasks (a prompt and the
-- answer wanted), so a model is tested on what it was trained on, at lengths and depths it was not.
-- The task is the digits variant of needle-in-a-haystack that MInference uses ("the special magic CITY
-- number", 7 digits, scored by finding the digits in the response; reference: microsoft/MInference
-- experiments/needle_in_a_haystack). Wording and cities here are our own.
--
--    filler filler. The special magic Oslo number is 4820175. filler filler filler ... filler
--    Question: What is the special magic Oslo number?
--    Answer: The special magic Oslo number is 4820175.
--                                            ^^^^^^^^ the only targets, with loss = "answers"
--
-- A needle goes to the token at `depth` percent of the filler and then back to the end of a sentence,
-- as the original does. The original walks until it meets a token that is "." alone and may walk far
-- where "." is merged with what follows; here any token that ends a sentence counts, the walk is bounded,
-- and the place it came to is reported.
local args = require "halo.args"
local errors = require "halo.errors"
local ffi = require "ffi"
local random = require "halo.data.random"

local M = {}

local VERSION = 1 -- part of fingerprints: raise it when the same settings make other documents
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
    needle = "\nThe special magic {city} number is {number}.\n",
    question = "\nQuestion: What is the special magic {city} number?\nAnswer: The special magic {city} number is",
    answer = " {number}.\n",
  },
  short = {
    needle = "\nThe special magic {city} number is {number}.\n",
    question = "\nThe special magic {city} number is",
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

-- What a token says about sentences: LINE after a line break, STOP after . ! ? (maybe quoted), which ends
-- one only if white space follows, BLANK when it begins with white space.
local LINE, STOP, BLANK = 1, 2, 4

local function marks_of(tok)
  local marks = ffi.new("uint8_t[?]", tok.vocab_size)
  for id = 0, tok.vocab_size - 1 do
    local text = tok:token(id)
    marks[id] = (text:find "\n%s*$" and LINE or 0) + (text:find "[.!?][\"')%]]*$" and STOP or 0)
      + (text:find "^%s" and BLANK or 0)
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
-- @tparam[opt="all"] int|string o.questions how many of a training document's needles are asked for
-- @tparam[opt="answers"] string o.loss "answers": only answers are targets; "all": every token is
-- @tparam[opt="magic"] string|table o.template a name of `needles.templates`, or `{ needle, question, answer }`
-- @tparam[opt] table o.cities default `needles.cities`
-- @usage local n = data.needles.new { tokenizer = tok, filler = text, digits = 4, needles = { 1, 4 } }
function M.new(o)
  o = args.named("needles.new", o, { tokenizer = "table", filler = "table", digits = { "int", 7 },
    needles = { "int|table", 1 }, length = "int|table?", questions = { "int|string", "all" },
    loss = { "string", "answers" }, template = { "string|table", "magic" }, cities = { "table", M.cities } })
  if o.digits < 1 or o.digits > 15 then errors.raise("usage", "needles: digits must be 1 to 15", 2) end
  if o.loss ~= "answers" and o.loss ~= "all" then
    errors.raise("usage", ('needles: loss = "%s"%s'):format(o.loss, args.did_you_mean(o.loss, { "answers", "all" })), 2)
  end
  if type(o.questions) == "string" and o.questions ~= "all" then
    errors.raise("usage", 'needles: questions must be a number or "all"', 2)
  end
  local template = o.template
  if type(template) == "string" then
    template = M.templates[o.template]
    if not template then
      errors.raise("usage", ('needles: no template "%s"%s'):format(o.template,
        args.did_you_mean(o.template, args.keys(M.templates))), 2)
    end
  end
  template = args.named("needles: template", template, { needle = "string", question = "string", answer = "string" })
  local self = setmetatable({ tokenizer = o.tokenizer, filler = o.filler, digits = o.digits, loss = o.loss,
    template = template, cities = o.cities, questions = o.questions }, Needles)
  self.least, self.most = range_of(o.needles, "needles", 1)
  if o.length then self.shortest, self.longest = range_of(o.length, "length", 2) end
  if self.most > #self.cities then
    errors.raise("usage", ("needles: %d needles, but only %d cities"):format(self.most, #self.cities), 2)
  end
  o.filler:check_tokenizer(o.tokenizer)
  if o.filler.count < 2 then errors.raise("data", "needles: the filler is empty", 2) end
  self.marks = marks_of(o.tokenizer)
  return self
end

local function fill_in(text, city, number)
  return (text:gsub("{(%w+)}", { city = city, number = number }))
end

local function concat(parts)
  local n = 0
  for _, p in ipairs(parts) do n = n + p.n end
  local ids, loss, at = ffi.new("int32_t[?]", math.max(n, 1)), ffi.new("uint8_t[?]", math.max(n, 1)), 0
  for _, p in ipairs(parts) do
    ffi.copy(ids + at, p.ids, p.n * 4)
    ffi.fill(loss + at, p.n, p.loss)
    at = at + p.n
  end
  return ids, n, loss
end

-- Needles of one document: city, number, and their three texts encoded.
local function draw_needles(self, rng, n)
  local list = {}
  for i, city in ipairs(rng:sample(self.cities, n)) do
    local low = self.digits == 1 and 0 or 10 ^ (self.digits - 1)
    local number = ("%d"):format(rng:int(low, 10 ^ self.digits - 1))
    local needle = { city = city, number = number }
    for _, part in ipairs { "needle", "question", "answer" } do
      local ids, count = self.tokenizer:encode_buffer(fill_in(self.template[part], city, number))
      needle[part] = { ids = ids, n = count }
    end
    list[i] = needle
  end
  return list
end

-- n tokens of filler, beginning after a sentence's end where one is near; wraps around when it is short.
local function read_filler(self, rng, n)
  local count = self.filler.count
  local ids = ffi.new("int32_t[?]", math.max(n, 1))
  local from = count > n and rng:int(0, count - n - 1) or 0
  local near = math.min(WALK, count - from)
  local before = self.filler:read(from, near)
  for i = 0, near - 2 do
    if is_end(self.marks, before[i], before[i + 1]) and from + i + 1 + n <= count then
      from = from + i + 1
      break
    end
  end
  local at = 0
  while at < n do
    local m = math.min(n - at, count - from)
    ffi.copy(ids + at, self.filler:read(from, m), m * 4)
    at, from = at + m, 0
  end
  return ids
end

-- The token before which a needle of this depth goes: back to a sentence's end, no further than WALK.
local function place(self, ids, n, depth)
  local at = math.min(n, math.floor(n * depth / 100))
  if at == n then return n end
  for back = 0, math.min(WALK, at) do
    local p = at - back
    if p == 0 or is_end(self.marks, ids[p - 1], ids[p]) then return p end
  end
  return at
end

-- Filler with the needles put in at their depths: list of parts, and per needle the realised percent.
local function lay_out(self, filler, n, list)
  for _, needle in ipairs(list) do needle.at = place(self, filler, n, needle.depth) end
  local order = {}
  for i, needle in ipairs(list) do order[i] = needle end
  table.sort(order, function(a, b)
    if a.at ~= b.at then return a.at < b.at end
    return a.city < b.city
  end)
  local plain = self.loss == "all" and 1 or 0
  local parts, done, position = {}, 0, 0
  for _, needle in ipairs(order) do
    parts[#parts + 1] = { ids = filler + done, n = needle.at - done, loss = plain }
    parts[#parts + 1] = { ids = needle.needle.ids, n = needle.needle.n, loss = plain }
    position = position + needle.at - done
    needle.position, needle.realised = position, n > 0 and 100 * needle.at / n or 0
    position, done = position + needle.needle.n, needle.at
  end
  parts[#parts + 1] = { ids = filler + done, n = n - done, loss = plain }
  return parts
end

local function tokens_in(list, part)
  local n = 0
  for _, needle in ipairs(list) do n = n + needle[part].n end
  return n
end

--- One training document of exactly `length` tokens, or nil if needles and questions leave no room.
-- @tparam Random rng
-- @tparam int length
-- @treturn table|nil `ids`, `n`, `loss`, and `needles` (each `city`, `number`, `depth`, `position`, `realised`)
function Needles:document(rng, length)
  local list = draw_needles(self, rng, rng:int(self.least, self.most))
  local asked = rng:sample(list, self.questions == "all" and #list or math.min(self.questions, #list))
  local room = length - tokens_in(list, "needle") - tokens_in(asked, "question") - tokens_in(asked, "answer")
  if room < 0 then return nil end
  for _, needle in ipairs(list) do needle.depth = 100 * rng:uniform() end
  local parts = lay_out(self, read_filler(self, rng, room), room, list)
  for _, needle in ipairs(asked) do
    parts[#parts + 1] = { ids = needle.question.ids, n = needle.question.n, loss = self.loss == "all" and 1 or 0 }
    parts[#parts + 1] = { ids = needle.answer.ids, n = needle.answer.n, loss = 1 }
  end
  local ids, n, loss = concat(parts)
  return { ids = ids, n = n, loss = loss, needles = list, asked = asked }
end

--- A generated source for data.loader.
function Needles:generator()
  local function make(rng, length)
    local documents, left = {}, length
    while left > 0 do
      local want = self.shortest and math.min(left, rng:int(self.shortest, self.longest)) or left
      local d = self:document(rng, want)
      if not d then
        if #documents == 0 then
          errors.raise("usage", ("needles: %d needles and their questions do not fit %d tokens"):format(
            self.most, want), 0)
        end
        -- what is left is too short for a task: plain filler, no targets unless all tokens are
        d = { ids = read_filler(self, rng, left), n = left, loss = ffi.new("uint8_t[?]", left,
          self.loss == "all" and 1 or 0) }
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
  local room = o.context - tokens_in(list, "needle") - asked.question.n - asked.answer.n
  if room < 0 then
    errors.raise("usage", ("needles:task: needles and question have %d tokens, the context %d"):format(
      o.context - room, o.context), 2)
  end
  asked.depth = o.depth
  for i = 2, #list do list[i].depth = 100 * rng:uniform() end
  local parts = lay_out(self, read_filler(self, rng, room), room, list)
  parts[#parts + 1] = { ids = asked.question.ids, n = asked.question.n, loss = 0 }
  local prompt, n = concat(parts)
  return { prompt = prompt, n = n, answer = asked.number, answer_ids = asked.answer.ids, answer_n = asked.answer.n,
    city = asked.city, context = o.context, depth = o.depth, realised = asked.realised, position = asked.position }
end

--- Whether a response names the number: its digits are in it (MInference's rule).
function M.correct(task, response) return response:find(task.answer, 1, true) ~= nil end

--- Everything that decides the documents, for fingerprints.
function Needles:describe()
  return ("needles v%d %s %d digits, %d to %d, length %s to %s, questions %s, loss %s, %s, %s, filler %s, tokenizer %s")
    :format(VERSION, table.concat({ self.template.needle, self.template.question, self.template.answer }, "|"),
    self.digits, self.least, self.most, tostring(self.shortest), tostring(self.longest), tostring(self.questions),
    self.loss, table.concat(self.cities, ","), "walk " .. WALK, self.filler:hash(), self.tokenizer:hash())
end

function Needles:__tostring()
  return ("needles of %d digits, %s per document, answers %s"):format(self.digits,
    self.least == self.most and self.least or self.least .. " to " .. self.most,
    self.loss == "all" and "and text are targets" or "are the only targets")
end

return M
