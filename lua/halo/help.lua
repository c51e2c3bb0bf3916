--- What `? name` and `halo help name` say.
-- Nothing is written twice: recipe words come from the schema, ops from the op table's own text, Lua
-- functions from the LDoc comments in the sources of this tree, topics from the end of this file.
local args = require "halo.args"
local errors = require "halo.errors"
local fs = require "halo.fs"
local schema = require "halo.schema"

local M = {}

local here = debug.getinfo(1, "S").source:sub(2):gsub("[^/]*$", "")

---- Doc comments of the Lua sources --------------------------------------------------------------

-- One LDoc comment as text: the words first, then parameters, results and usage.
local function format_doc(lines)
  local text, tags, current = {}, {}, nil
  for _, line in ipairs(lines) do
    local tag, rest = line:match "^@(%S+)%s*(.*)$"
    if tag then
      current = { tag = tag:gsub("%[.*", ""), option = tag:match "%[(.-)%]", text = rest }
      tags[#tags + 1] = current
    elseif current then
      current.text = current.text .. (current.tag == "usage" and "\n" or " ") .. line
    else
      text[#text + 1] = line
    end
  end
  for _, t in ipairs(tags) do
    if t.tag == "tparam" then
      local kind, name, words = t.text:match "^(%S+)%s+(%S+)%s*(.*)$"
      if kind then
        local default = t.option and t.option:match "^opt=(.*)" and ", default " .. t.option:match "^opt=(.*)"
        text[#text + 1] = ("  %s (%s%s)  %s"):format(name, kind, default or (t.option and ", optional" or ""), words)
      end
    elseif t.tag == "param" then
      text[#text + 1] = "  " .. t.text:gsub("^(%S+)", "%1 ")
    elseif t.tag == "treturn" or t.tag == "return" then
      text[#text + 1] = "  returns " .. t.text
    elseif t.tag == "raise" then
      text[#text + 1] = "  raises " .. t.text
    elseif t.tag == "usage" then
      text[#text + 1] = "  example: " .. t.text:gsub("\n", "\n           ")
    elseif t.tag == "see" then
      text[#text + 1] = "  see " .. t.text
    end
  end
  return (table.concat(text, "\n"):gsub("%s+$", ""))
end

-- What a line of code defines, for readers: name and argument list.
local function definition(line, exported)
  local owner, mark, name, params = line:match "^function ([%w_]+)([.:])([%w_]+)(%b())"
  if owner then
    return owner == exported and name or owner .. mark .. name, params
  end
  owner, name, params = line:match "^([%w_]+)%.([%w_]+)%s*=%s*function%s*(%b())"
  if owner then return owner == exported and name or owner .. "." .. name, params end
  owner, name = line:match "^([%w_]+)%.([%w_]+)%s*="
  if owner and owner == exported then return name end
end

-- Documented functions and the essay of one source file.
local function scan(path, module, index)
  local text = fs.read(path)
  if not text then return end
  local exported = text:match "return ([%w_]+)%s*$" or "M"
  local block, number, seen_code
  for line in (text .. "\n"):gmatch "(.-)\n" do
    number = (number or 0) + 1
    local start, more = line:match "^%-%-%-%s?([^-].*)$", line:match "^%-%-%s?(.*)$"
    if start then
      block = { start }
    elseif block and more and line:sub(1, 3) ~= "---" then
      block[#block + 1] = more
    elseif block then
      local name, params = definition(line, exported)
      if name then
        index[module .. "." .. name:gsub(":", ".")] = {
          title = module .. "." .. name .. (params or ""), doc = format_doc(block), path = path, line = number,
        }
      elseif not seen_code then
        index[module] = { title = "halo." .. module, doc = format_doc(block), path = path, line = 1 }
      end
      block, seen_code = nil, true
    end
  end
end

local index

--- Documented names of this tree: "fs.write" -> { title, doc, path, line }.
function M.index()
  if not index then
    index = {}
    for path, relative in fs.walk(here) do
      local module = relative:match "^(.*)%.lua$"
      if module and not module:find "^cli/" then scan(path, (module:gsub("/init$", ""):gsub("/", ".")), index) end
    end
  end
  return index
end

---- Finding ---------------------------------------------------------------------------------------

local function op_text(name)
  local ok, ops = pcall(require, "halo.ops")
  return ok and ops.row(name) and "ops." .. ops.help(name) or nil
end

local function verb_text(name)
  if not fs.is_file(here .. "cli/" .. name .. ".lua") then return nil end
  local verb = require("halo.cli." .. name)
  return ("halo %s: %s\n  example: %s\n  options: halo %s --help"):format(name, verb.summary, verb.example, name)
end

-- Functions whose last part is the word, for people who do not know the module.
local function endings(word)
  local found = {}
  for name in pairs(M.index()) do
    if name:match("[.]" .. word:gsub("%W", "%%%0") .. "$") then found[#found + 1] = name end
  end
  table.sort(found)
  return found
end

local function entry_text(name)
  local e = M.index()[name]
  return e and ("%s\n%s\n  (%s:%d)"):format(e.title, e.doc, e.path:gsub("^.*/lua/halo/", "lua/halo/"), e.line)
end

local topics

--- Help text for a word.
-- @tparam string word recipe word, group, op, function, module, verb or topic
-- @treturn string|nil text, or nil and a line with the nearest names
function M.find(word)
  require("halo.vocabulary").load_modules()
  word = word:gsub("^halo%.", ""):gsub(":", "."):gsub("^%s+", ""):gsub("%s+$", "")
  local parts = {}
  local function add(text)
    if text then parts[#parts + 1] = text end
  end
  add(topics[word] and topics[word]())
  add(schema.help(word))
  add(op_text((word:gsub("^ops%.", ""))))
  add(entry_text(word))
  if #parts == 0 then
    local found = endings(word)
    if #found == 1 then
      add(entry_text(found[1]))
    elseif #found > 1 then
      add(word .. ": " .. table.concat(found, ", "))
    end
  end
  if #parts == 0 then add(verb_text(word)) end
  if #parts > 0 then return table.concat(parts, "\n\n") end
  return nil, ('no help for "%s"%s'):format(word, args.did_you_mean(word, M.words()))
end

--- Every word that `find` knows, sorted.
function M.words()
  require("halo.vocabulary").load_modules()
  local set = {}
  for path in pairs(schema.types()) do set[path] = true end
  for group in pairs(schema.groups()) do set[group] = true end
  for name in pairs(M.index()) do set[name] = true end
  for name in pairs(topics) do set[name] = true end
  local ok, ops = pcall(require, "halo.ops") -- absent when the library is not built
  for _, name in ipairs(ok and ops.list() or {}) do set[name] = true end
  return args.keys(set)
end

---- Topics ----------------------------------------------------------------------------------------

topics = {
  ["exit-codes"] = function()
    local lines = { "exit codes:", "    0  done" }
    local words = {
      usage = "the command line or the recipe is wrong", environment = "this machine lacks something (halo doctor)",
      memory = "out of memory", data = "a file cannot be read or contradicts itself",
      communication = "a rank or a link failed", numerics = "a result is not finite",
      internal = "a bug of ours", preempted = "saved a checkpoint on request; start again with --resume auto",
    }
    local list = {}
    for class, code in pairs(errors.exit_codes) do list[#list + 1] = { code, class } end
    table.sort(list, function(a, b) return a[1] < b[1] end)
    for _, row in ipairs(list) do lines[#lines + 1] = ("  %3d  %s: %s"):format(row[1], row[2], words[row[2]]) end
    return table.concat(lines, "\n")
  end,
  environment = function()
    return [[environment: variables that change what Halo does
  HALO_CACHE             folder of packed text (else halo/ in XDG_CACHE_HOME or ~/.cache)
  HALO_HISTORY           file of the prompt's history; empty: none
  HALO_LIB, HALO_LUA     libhalo.so and the folder of the Lua files, where they are not found beside the program
  HALO_TF32=1            fp32 products of a GPU may round their operands to tf32
  HALO_MATH_FIXED=1      products by the library's first choice, not the fastest in a race: equal bits in every run
  HALO_DEBUG_SYNC=1      wait after every op of a GPU, so that an error names the op that made it
  HALO_ATTENTION         kernels of a GPU's attention: auto, hopper, portable or general
  HALO_ATTENTION_SHARED  KiB of shared memory they may take a block: what a smaller GPU would get (99: sm_86, sm_89)
  HALO_WORLD             ranks that must have come together, where Open MPI, MPICH or Slurm did not start them
  OMP_NUM_THREADS        threads of each rank
  NO_COLOR, FORCE_COLOR  never, always colour]]
  end,
  overrides = function()
    return [[overrides: halo run RECIPE name=value ...
  A name is a path through the recipe: optim.lr, stages.2.tokens, model.rope, every.100.layers.
  A value is read as the field wants it: 2e9, 32K, 0.5B, true, a word, a list 1,2,3, or a recipe
  expression in quotes: 'stages.2.rope=yarn { to = 32*K }'.
  optim.lr=1e-4     the peak; the shape of the schedule stays
  data=DIR          this text instead; other sources of a mix stay
  stages=1          the first stage only
  steps=20          stop after 20 steps in all]]
  end,
}

--- The list of topics and words that `halo help` prints without a word.
function M.overview()
  require("halo.vocabulary").load_modules()
  local lines = { "recipe words, by what they are (halo help WORD):" }
  for _, name in ipairs(args.keys(schema.groups())) do
    local group, words = schema.groups()[name], {}
    for i, path in ipairs(group.types) do words[i] = path end
    lines[#lines + 1] = ("  %-12s %s"):format(name, table.concat(words, "  "))
  end
  lines[#lines + 1] = "topics: " .. table.concat(args.keys(topics), ", ")
  lines[#lines + 1] = "functions: halo help fs.write; ops: halo help matmul; verbs: halo --help"
  return table.concat(lines, "\n")
end

return M
