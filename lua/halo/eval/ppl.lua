--- Perplexity, with the protocol said aloud.
--
-- Published perplexities differ mostly by bookkeeping (reference: YaRN averages per-window means,
-- LongLoRA scores all tokens of overlapping windows, others average perplexities over documents). Here
-- the sum of negative log-likelihoods is divided by the number of scored tokens, over all documents:
--
--   prefix    the first L tokens of every document that has as many; only the last `last` of them are
--             scored, with L - last tokens of context: the fair way to compare lengths, since every
--             length scores the same number of tokens and none is scored without context
--   sliding   windows of L tokens every `stride`; each token scored once (the first window scores all)
--
-- Reported: nll, tokens, words, bytes, perplexity per token and per word, bits per byte, and the curve
-- of perplexity by position. Documents shorter than L are skipped and counted.
local args = require "halo.args"
local autograd = require "halo.autograd"
local decoder = require "halo.model.decoder"
local ffi = require "ffi"
local memory = require "halo.memory"
local tensor = require "halo.tensor"

local M = {
  name = "ppl",
  doc = "Perplexity of held-out documents by context length and by position.",
  positional = nil,
  fields = function(kind)
    return {
      { "lengths", kind.list(kind.tokens), doc = "context lengths (default: those of the stages)" },
      { "mode", kind.enum { "prefix", "sliding" }, default = "prefix",
        doc = "which tokens are scored; see eval/ppl.lua" },
      { "last", kind.count, default = 256, doc = "prefix: tokens scored at the end of each length" },
      { "stride", kind.count, default = 256, doc = "sliding: tokens between windows (YaRN's setting)" },
      { "documents", kind.count, default = 8, doc = "at most so many documents per length" },
    }
  end,
  example = 'finally = eval.ppl { lengths = { 2*K, 8*K }, last = 512 }',
}

local IGNORE = -100

-- Sums of nll and token counts over position buckets of doubling width: [0,1), [1,2), [2,4), ...
local function bucket_of(position)
  return position == 0 and 0 or math.floor(math.log(position) / math.log(2) + 1e-9) + 1
end

--- Score tokens `from`..`to` (0-based, tokens not labels) of one sequence under the model.
-- @treturn {number,...} per bucket: nll sums, and counts
local function score(model, attend, ids, from, to)
  local n = #ids
  attend:set_context(n, 1)
  local nll, count = {}, {}
  for b = 1, 48 do nll[b], count[b] = 0, 0 end
  autograd.no_grad(function()
    memory.scope(function()
      local local_ids, positions = attend:cut(ids, model.device)
      local t = attend:local_tokens()
      local labels = ffi.new("int32_t[?]", t)
      for row = 0, t - 1 do
        local target = attend:global_of(row) + 1 -- position p predicts token p + 1
        labels[row] = target >= math.max(from, 1) and target <= to and target < n and ids[target + 1] or IGNORE
      end
      local run = { mlp_chunk = decoder.mlp_chunk[model.device],
        attend = function(l, q, k, v) return attend:attend(l, q, k, v) end }
      run.cos, run.sin = model:positions(positions, n)
      local per_token = model:token_loss(local_ids,
        tensor.from_pointer(labels, { shape = { 1, t }, dtype = "i32", device = model.device }), run)
      local values = ffi.new("double[?]", t)
      local halo_ffi = require "halo.ffi"
      halo_ffi.check(halo_ffi.C.halo_tensor_read(per_token:cast "f64":contiguous(), values))
      for row = 0, t - 1 do
        if labels[row] ~= IGNORE then
          local b = bucket_of(attend:global_of(row) + 1) + 1
          nll[b], count[b] = nll[b] + values[row], count[b] + 1
        end
      end
    end)
  end)
  return nll, count
end

local function words_and_bytes(tokenizer, ids, from, to)
  local piece = {}
  for i = math.max(from, 1) + 1, to + 1 do piece[#piece + 1] = ids[i] end
  local text = tokenizer:decode(piece)
  local words = 0
  for _ in text:gmatch "%S+" do words = words + 1 end
  return words, #text
end

-- Windows of a document: list of { ids, from, to } with token ranges inside the window.
local function windows(ids, length, o)
  local list = {}
  local function cut(first)
    local w = {}
    for i = 1, length do w[i] = ids[first + i] end
    return w
  end
  if o.mode == "prefix" then
    return { { ids = cut(0), from = math.max(1, length - o.last), to = length - 1 } }
  end
  local scored = 1
  for first = 0, #ids - length, o.stride do
    list[#list + 1] = { ids = cut(first), from = scored - first, to = length - 1 }
    scored = first + length
  end
  return list
end

--- Measure.
-- @tparam table o named arguments
-- @tparam Model o.model
-- @tparam Tokenizer o.tokenizer
-- @tparam {{int,...},...} o.documents token ids per document
-- @tparam {int,...} o.lengths context lengths, tokens
-- @tparam Attending o.attending pattern and ring
-- @tparam[opt="prefix"] string o.mode
-- @tparam[opt=256] int o.last
-- @tparam[opt=256] int o.stride
-- @tparam[opt=8] int o.max_documents per length
-- @treturn table `{ mode =, rows = { { length, nll, tokens, words, bytes, ppl, word_ppl, bits_per_byte,
--   documents, skipped, curve = { { from, to, ppl, tokens } } } } }`
function M.run(o)
  o = args.named("ppl.run", o, { model = "table", tokenizer = "any", documents = "table", lengths = "table",
    attending = "table", mode = { "string", "prefix" }, last = { "int", 256 }, stride = { "int", 256 },
    max_documents = { "int", 8 } })
  local result = { mode = o.mode, last = o.last, stride = o.stride, rows = {} }
  for _, length in ipairs(o.lengths) do
    local row = { length = length, nll = 0, tokens = 0, words = 0, bytes = 0, documents = 0, skipped = 0, curve = {} }
    local nll, count = {}, {}
    for _, ids in ipairs(o.documents) do
      if #ids < length then
        row.skipped = row.skipped + 1
      elseif row.documents < o.max_documents then
        row.documents = row.documents + 1
        for _, w in ipairs(windows(ids, length, o)) do
          local a, c = score(o.model, o.attending, w.ids, w.from, w.to)
          for b = 1, #a do nll[b], count[b] = (nll[b] or 0) + a[b], (count[b] or 0) + c[b] end
          local words, bytes = words_and_bytes(o.tokenizer, w.ids, w.from, w.to)
          row.words, row.bytes = row.words + words, row.bytes + bytes
        end
      end
    end
    if o.attending:is_spread() and row.documents > 0 then
      nll, count = o.attending.comm:all_reduce(nll), o.attending.comm:all_reduce(count)
    end
    for b = 1, #nll do
      row.nll, row.tokens = row.nll + nll[b], row.tokens + count[b]
      if count[b] > 0 then
        local from = b == 1 and 0 or 2 ^ (b - 2)
        row.curve[#row.curve + 1] = { from = from, to = b == 1 and 0 or 2 ^ (b - 1) - 1,
          ppl = math.exp(nll[b] / count[b]), tokens = count[b] }
      end
    end
    if row.tokens > 0 then
      row.ppl = math.exp(row.nll / row.tokens)
      row.word_ppl = row.words > 0 and math.exp(row.nll / row.words) or nil
      row.bits_per_byte = row.bytes > 0 and row.nll / math.log(2) / row.bytes or nil
    end
    result.rows[#result.rows + 1] = row
  end
  return result
end

--- The action `eval.ppl` of a recipe.
function M.action(run, a)
  local job = run.job
  local lengths = a.lengths or job:contexts()
  local longest = math.max(unpack(lengths))
  return M.run { model = job.model, tokenizer = job.tokenizer, attending = job.attending, lengths = lengths,
    documents = job.data:validation_documents { tokens = longest, max = a.documents },
    mode = a.mode, last = a.last, stride = a.stride, max_documents = a.documents }
end

--- A table for the terminal.
function M.text(result)
  local lines = { ("%8s %10s %10s %12s %10s %s"):format("length", "ppl", "bits/byte", "tokens", "documents",
    "skipped") }
  for _, r in ipairs(result.rows) do
    lines[#lines + 1] = ("%8d %10s %10s %12d %10d %d"):format(r.length, r.ppl and ("%.3f"):format(r.ppl) or "-",
      r.bits_per_byte and ("%.3f"):format(r.bits_per_byte) or "-", r.tokens, r.documents, r.skipped)
  end
  return table.concat(lines, "\n")
end

return M
