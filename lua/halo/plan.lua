--- Plans: which keys each query sees, for B sequences and H heads (core/plan.c).
-- A plan is built, finished, and from then on a value: held, shared between layers, compared, printed.
--
--    local p = plan.new { layout = layout.new { tokens = 4096 }, heads = 8 }
--    p:add_diagonals { 0, 1, 2 }                          -- block distances, all heads
--    p:add_columns({ 0, 17, 900 }, { head = 3 })          -- tokens, one head
--    p:force { sink = 4, window = 128 }:finish()
--    print(p)                                             -- one line
--    print(p:explain(1, 3))                               -- a page with a map
--
-- Batch and head count from 1, as dims do; tokens, blocks and distances are data and count from 0.
local args = require "halo.args"
local errors = require "halo.errors"
local ffi = require "ffi"
local halo_ffi = require "halo.ffi"

local C, call_at = halo_ffi.C, halo_ffi.call_at

local Plan = {}
Plan.__index = Plan

local M = {}

local function own(slot, layout)
  return setmetatable({ handle = ffi.gc(slot[0], C.halo_plan_free), layout = layout }, Plan)
end

--- True for plans.
function M.is(v) return getmetatable(v) == Plan end

-- 0-based number for C, -1 for nil (all).
local function index(i) return i and i - 1 or -1 end

-- ---- building -----------------------------------------------------------------------------------

--- Start a plan.
-- @tparam table o named arguments
-- @tparam Layout o.layout length, blocks and ranks
-- @tparam int o.heads query heads, H
-- @tparam[opt=1] int o.batch sequences, B
-- @param[opt] o.documents see `Plan:set_documents`
-- @treturn Plan not finished
function M.new(o)
  o = args.named("plan.new", o, { layout = "table", heads = "int", batch = { "int", 1 }, documents = "cdata|table?" })
  local slot = ffi.new "halo_plan *[1]"
  call_at(2, C.halo_plan_new, slot, o.layout.handle, o.batch, o.heads)
  local plan = own(slot, o.layout)
  return o.documents and plan:set_documents(o.documents) or plan
end

local function int64_list(list)
  local out = ffi.new("int64_t[?]", math.max(#list, 1))
  for i, v in ipairs(list) do out[i - 1] = v end
  return out, #list
end

-- { batch = b, head = h } or nil -> two C indices
local function place(what, where)
  where = where and args.named(what, where, { batch = "int?", head = "int?" }, 2) or {}
  return index(where.batch), index(where.head)
end

--- Everything earlier, for all heads or `{ batch =, head = }`.
function Plan:add_all(where)
  local b, h = place("plan:add_all", where)
  call_at(2, C.halo_plan_add_all, self.handle, b, h)
  return self
end

--- Block distances; 0 is the diagonal.
function Plan:add_diagonals(distances, where)
  local b, h = place("plan:add_diagonals", where)
  call_at(2, C.halo_plan_add_diagonals, self.handle, b, h, int64_list(distances))
  return self
end

--- Tokens that every later query of their document sees.
function Plan:add_columns(tokens, where)
  local b, h = place("plan:add_columns", where)
  call_at(2, C.halo_plan_add_columns, self.handle, b, h, int64_list(tokens))
  return self
end

--- Single tiles: a list of `{ query block, key block }`.
function Plan:add_tiles(tiles, where)
  local b, h = place("plan:add_tiles", where)
  local queries, keys = {}, {}
  for i, tile in ipairs(tiles) do queries[i], keys[i] = tile[1], tile[2] end
  local q, n = int64_list(queries)
  call_at(2, C.halo_plan_add_tiles, self.handle, b, h, q, (int64_list(keys)), n)
  return self
end

--- Rules that hold whatever was selected, and are counted apart.
-- @tparam table o named arguments
-- @tparam[opt=0] int o.sink first tokens of every document, seen by all
-- @tparam[opt=0] int o.window tokens: distances below this are seen
-- @tparam[opt=true] boolean o.diagonal a query sees its own block
function Plan:force(o)
  o = args.named("plan:force", o, { sink = { "int", 0 }, window = { "int", 0 }, diagonal = { "boolean", true } })
  call_at(2, C.halo_plan_force, self.handle, o.sink, o.window, o.diagonal and 1 or 0)
  return self
end

-- int32_t memory of B*N ids from memory, a list of B lists, or one list.
local function documents_of(documents, batch, tokens, what)
  if type(documents) ~= "table" then return documents end
  local rows = type(documents[1]) == "table" and documents or { documents }
  local out = ffi.new("int32_t[?]", batch * tokens)
  for b = 1, batch do
    local row = rows[b]
    if not row or #row ~= tokens then
      errors.raise("usage", ("%s: sequence %d has %s document ids, wanted %d"):format(what, b,
        row and #row or "no", tokens), 3)
    end
    for i = 1, tokens do out[(b - 1) * tokens + i - 1] = row[i] end
  end
  return out
end

--- Document of every token: attention never crosses. Ids are runs; a negative id is in no document.
-- @param documents `int32_t` memory `[B*N]` in global order (copied), or a list per sequence
function Plan:set_documents(documents)
  local memory = documents_of(documents, self:batch(), self.layout:tokens(), "plan:set_documents")
  call_at(2, C.halo_plan_set_documents, self.handle, memory)
  return self
end

--- Add what the last queries look at: the vertical-slash choice (core/select.c). Collective.
-- @tparam table o named arguments
-- @tparam Tensor o.q `[B,T,H,D]`
-- @tparam Tensor o.k `[B,T,Hk,D]`
-- @tparam Ring o.ring
-- @tparam[opt] number o.scale of logits (default 1/sqrt(D))
-- @tparam[opt=64] int o.probe last queries that vote
-- @tparam int o.verticals columns at most
-- @tparam int o.slashes token distances at most
-- @tparam[opt=0] number o.mass share of probability to hold; 0: exactly the budgets
function Plan:select_vertical_slash(o)
  o = args.named("plan:select_vertical_slash", o, { q = "cdata", k = "cdata", ring = "table", scale = "number?",
    probe = { "int", 64 }, verticals = "int", slashes = "int", mass = { "number", 0 } })
  local scale = o.scale or 1 / math.sqrt(tonumber(C.halo_tensor_size(o.q, -1)))
  call_at(2, C.halo_select_vertical_slash, self.handle, o.q, o.k, o.ring.handle, scale, o.probe, o.verticals,
    o.slashes, o.mass, o.mass)
  return self
end

--- Put in canonical form and freeze.
function Plan:finish()
  call_at(2, C.halo_plan_finish, self.handle)
  self.finished = true
  return self
end

--- The same selection for other documents (nil: one document) and another number of sequences, which
-- take the choices of this plan's in turn. What a frozen plan becomes on the next batch.
function Plan:with_documents(documents, batch)
  batch = batch or self:batch()
  local memory = documents_of(documents, batch, self.layout:tokens(), "plan:with_documents")
  local slot = ffi.new "halo_plan *[1]"
  call_at(2, C.halo_plan_with_documents, slot, self.handle, batch, memory)
  local plan = own(slot, self.layout)
  plan.finished = true
  return plan
end

-- ---- reading ------------------------------------------------------------------------------------

--- Sequences, B.
function Plan:batch() return tonumber(C.halo_plan_batch(self.handle)) end
--- Query heads, H.
function Plan:heads() return tonumber(C.halo_plan_heads(self.handle)) end
--- Whether every query sees all of its document's past.
function Plan:is_dense() return C.halo_plan_is_dense(self.handle) ~= 0 end

--- Whether key j is visible to query i (tokens, from 0). Slow: for looking and for tests.
function Plan:visible(batch, head, i, j)
  return C.halo_plan_visible(self.handle, batch - 1, head - 1, i, j) ~= 0
end

--- Visible pairs over causal pairs of the same document; nil batch or head means all.
-- @treturn number 0..1
-- @treturn number share of the visible pairs that only force rules brought in
function Plan:density(batch, head)
  local density, forced = ffi.new "double[1]", ffi.new "double[1]"
  call_at(2, C.halo_plan_density, self.handle, index(batch), index(head), density, forced)
  return density[0], forced[0]
end

--- Sixteen hexadecimal digits that name the visible set: equal on every rank, in every layout.
function Plan:hash() return bit.tohex(C.halo_plan_hash(self.handle)) end

--- Raise unless every rank of a communicator holds this plan.
function Plan:check_same(comm) comm:same(C.halo_plan_hash(self.handle), "the plan") end

--- Plans are equal when their visible sets are.
function Plan.__eq(a, b) return a:hash() == b:hash() end

--- Imbalance between ranks on the flat ring, 1 is perfect.
-- @treturn table `worker`, `step`, `critical` (reference: mtraining.md 2.3)
function Plan:balance()
  local worker, step, critical = ffi.new "double[1]", ffi.new "double[1]", ffi.new "double[1]"
  call_at(2, C.halo_plan_balance, self.handle, worker, step, critical)
  return { worker = worker[0], step = step[0], critical = critical[0] }
end

--- Forward flops by rank and step of the flat ring, columns last: a list of lists.
function Plan:work(head_size)
  local steps, world = ffi.new "int32_t[1]", self.layout:world()
  local size = world * (world + 1)
  local work = ffi.new("double[?]", size)
  call_at(2, C.halo_plan_work, self.handle, head_size, work, size, steps)
  local out = {}
  for r = 1, world do
    out[r] = {}
    for t = 1, steps[0] do out[r][t] = work[(r - 1) * steps[0] + t - 1] end
  end
  return out
end

--- Far tokens: those that some query at distance `far` or more could see, and how many no such query
-- does see under this plan.
-- @tparam table o named arguments
-- @tparam int o.far distance, tokens
-- @tparam[opt=1] int o.batch sequence
-- @tparam[opt] int o.head (default: seen by any head counts)
-- @tparam[opt] cdata o.reached `uint8_t` memory `[N]`, set to 1 where reached and else left alone: give
-- the same memory step after step to follow coverage over time
-- @treturn int far tokens
-- @treturn int missed ones
function Plan:far_coverage(o)
  o = args.named("plan:far_coverage", o, { far = "int", batch = { "int", 1 }, head = "int?", reached = "cdata?" })
  local far, missed = ffi.new "int64_t[1]", ffi.new "int64_t[1]"
  call_at(2, C.halo_plan_far_coverage, self.handle, o.batch - 1, index(o.head), o.far, o.reached, far, missed)
  return tonumber(far[0]), tonumber(missed[0])
end

local function read_list(fn, plan, batch, head)
  local n = ffi.new "int64_t[1]"
  call_at(3, fn, plan.handle, batch - 1, head - 1, nil, 0, n)
  local capacity = tonumber(n[0])
  local memory, out = ffi.new("int64_t[?]", math.max(capacity, 1)), {}
  call_at(3, fn, plan.handle, batch - 1, head - 1, memory, capacity, n)
  for i = 1, capacity do out[i] = tonumber(memory[i - 1]) end
  return out
end

--- Selected block distances of a head, ascending (force rules not among them).
function Plan:diagonals(batch, head) return read_list(C.halo_plan_diagonals, self, batch, head) end
--- Selected columns of a head, tokens, ascending.
function Plan:columns(batch, head) return read_list(C.halo_plan_columns, self, batch, head) end

--- Sampled recall per head: the share of dense attention that the plan keeps. Collective.
-- @tparam table o named arguments
-- @tparam Tensor o.q `[B,T,H,D]`
-- @tparam Tensor o.k `[B,T,Hk,D]`
-- @tparam Ring o.ring
-- @tparam[opt] number o.scale of logits (default 1/sqrt(D))
-- @tparam[opt=32] int o.samples query rows per head and sequence
-- @tparam[opt=1] int o.seed
-- @tparam[opt=0] int o.stream another stream draws other rows
-- @treturn {number,...} one per head
function Plan:recall(o)
  o = args.named("plan:recall", o, { q = "cdata", k = "cdata", ring = "table", scale = "number?",
    samples = { "int", 32 }, seed = { "int", 1 }, stream = { "int", 0 } })
  local scale = o.scale or 1 / math.sqrt(tonumber(C.halo_tensor_size(o.q, -1)))
  local memory, out = ffi.new("double[?]", self:heads()), {}
  call_at(2, C.halo_attention_recall, memory, o.q, o.k, self.handle, o.ring.handle, scale, o.samples, o.seed, o.stream)
  for h = 1, self:heads() do out[h] = memory[h - 1] end
  return out
end

--- Text for people; with batch and head, that head's lists and a map.
function Plan:explain(batch, head)
  return halo_ffi.text(function(text, capacity)
    return C.halo_plan_explain(self.handle, index(batch), index(head), text, capacity)
  end)
end

function Plan:__tostring()
  local l = self.layout
  local head = ("plan %d x %d heads, %d tokens in blocks of %d"):format(self:batch(), self:heads(), l:tokens(),
    l:block())
  if not self.finished then return head .. ", not finished" end
  local density, forced = self:density()
  return ("%s: %s %.2f %%%s, hash %s"):format(head, self:is_dense() and "dense," or "density", 100 * density,
    forced > 0 and (" (%.1f %% of it forced)"):format(100 * forced) or "", self:hash())
end

return M
