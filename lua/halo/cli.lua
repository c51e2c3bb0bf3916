--- The `halo` program: verbs, options, exit codes, and how errors are told.
--
-- Each verb is a file in cli/ that returns `{ name, summary, example, define(command), run(options) }`;
-- adding a verb is adding a file. `run` does the work through the modules that anybody can use from Lua,
-- and returns an exit code or nothing (0).
--
-- Rules that hold for all verbs: results go to standard output, progress and complaints to standard
-- error; bad usage is one line and exit code 2; no traceback unless `--trace`; rank 0 alone writes to the
-- terminal. Exit codes are in halo.errors and under `halo help exit-codes`.
local args = require "halo.args"
local errors = require "halo.errors"
local fs = require "halo.fs"

local M = {}

local here = debug.getinfo(1, "S").source:sub(2):gsub("[^/]*$", "") .. "cli/"

-- The order of `halo --help`: the way of a user through the program.
local order = { "run", "check", "eval", "plot", "repl", "exec", "inspect", "convert", "tokenize", "bench", "doctor",
  "help", "version" }

--- All verbs, in the order of the help text; files that the list does not know come last.
function M.verbs()
  local known, out = {}, {}
  for _, name in ipairs(order) do known[name] = true end
  local names = { unpack(order) }
  for _, file in ipairs(fs.list(here)) do
    local name = file:match "^(%w+)%.lua$"
    if name and not known[name] then names[#names + 1] = name end
  end
  for _, name in ipairs(names) do
    if fs.is_file(here .. name .. ".lua") then out[#out + 1] = require("halo.cli." .. name) end
  end
  return out
end

local function parser_of(verbs)
  local argparse = require "argparse"
  local parser = argparse("halo", "Halo trains language models on very long contexts with sparse ring attention.")
    :command_target "verb"
    :require_command(true)
    :epilog "Start with: halo run recipes/tiny.lua       Each verb explains itself: halo run --help"
  -- Taken out of the command line before parsing, so that it may stand anywhere; named here for the help.
  parser:flag("--trace", "Show a Lua traceback with errors.")
  for _, verb in ipairs(verbs) do
    local command = parser:command(verb.name, verb.summary):epilog("example: " .. verb.example)
    verb.define(command)
  end
  return parser
end

-- argparse's message on one line, with where to look.
local function usage_error(message, verb)
  message = message:gsub("%s*\nDid you mean (.-)%?", " (did you mean %1?)"):gsub("%s+$", "")
  io.stderr:write(("halo: %s; see halo %s--help\n"):format(message, verb and verb .. " " or ""))
  return errors.exit_codes.usage
end

local function report(e, trace)
  local launch = require "halo.launch"
  local ranks, rank = launch.job()
  -- A place in a recipe or script helps its author; a place in Halo itself is for --trace.
  local is_ours = e.where and e.where:find("lua/halo/", 1, true) and not trace
  local who = ranks > 1 and ("rank %d: "):format(rank) or ""
  local lines = { "error: " .. who .. (is_ours and e.message or tostring(e)) }
  if e.hint then lines[#lines + 1] = "  try: " .. e.hint end
  if trace and e.traceback then
    lines[#lines + 1] = e.traceback
  elseif e.class == "internal" and (is_ours or not tostring(e):find "^[^\n:]+%.lua:%d+:") then
    lines[#lines + 1] = "  (--trace shows where)"
  end
  -- Usage errors are the same on every rank; any other error may be one rank's alone.
  if rank == 0 or e.class ~= "usage" then io.stderr:write(table.concat(lines, "\n"), "\n") end
end

--- Run a verb; every error ends here.
-- @tparam function f returns an exit code or nothing
-- @tparam[opt] boolean trace show tracebacks
-- @treturn int exit code
function M.guarded(f, trace)
  local ok, result = xpcall(f, function(e)
    e = errors.wrap(e)
    e.traceback = e.traceback or debug.traceback("", 2):gsub("^%s+", "")
    return e
  end)
  local launch = require "halo.launch"
  local code
  if not ok then
    report(result, trace)
    code = errors.exit_code(result)
    io.stdout:flush()
    -- The other ranks may be waiting for us in a collective: end them too. Errors of usage are found by
    -- every rank alike, before any communication.
    if result.class ~= "usage" then launch.abort(code) end
  else
    code = result or 0
    launch.close()
  end
  io.stdout:flush()
  return code
end

-- The verb named on the command line, for the hint after an error.
local function named_verb(argv, verbs)
  for _, word in ipairs(argv) do
    if word:sub(1, 1) ~= "-" then
      for _, verb in ipairs(verbs) do
        if verb.name == word then return word end
      end
      return nil
    end
  end
end

--- The program. @tparam table argv words after the program's name @treturn int exit code
function M.main(argv)
  local verbs = M.verbs()
  -- What follows a script belongs to the script, options included.
  local command_line, rest, trace = {}, nil, false
  for i, word in ipairs(argv) do
    if word == "--trace" then
      trace = true
    else
      command_line[#command_line + 1] = word
    end
    if i >= 2 and argv[1] == "exec" and word:sub(1, 1) ~= "-" then
      rest = { unpack(argv, i + 1) }
      break
    end
  end
  if command_line[1] == "--version" then command_line[1] = "version" end
  local verb_name = named_verb(command_line, verbs)
  local ok, options = parser_of(verbs):pparse(command_line)
  if not ok then return usage_error(options, verb_name) end
  options.rest = rest
  options.argv = { argv[0], unpack(argv) }
  for _, verb in ipairs(verbs) do
    if verb.name == options.verb then
      return M.guarded(function() return verb.run(options) end, trace)
    end
  end
end

--- Split words into `name=value` overrides and others.
function M.split_overrides(words)
  local overrides, others = {}, {}
  for _, word in ipairs(words) do
    local list = word:match "^[%w_.]+=" and overrides or others
    list[#list + 1] = word
  end
  return overrides, others
end

--- A recipe's path from what was typed: a file, or the name of one of Halo's own recipes.
function M.find_recipe(name)
  if fs.is_file(name) then return name end
  local folder = fs.realpath(here .. "../../../recipes")
  if folder and not name:find "/" then
    local own = folder .. "/" .. name:gsub("%.lua$", "") .. ".lua"
    if fs.is_file(own) then return own end
  end
  local names = {}
  for _, file in ipairs(folder and fs.list(folder) or {}) do names[#names + 1] = file:match "^(.*)%.lua$" end
  local word = fs.basename(name):gsub("%.lua$", "")
  errors.raise("usage", ("no recipe %s%s"):format(name, args.did_you_mean(word, names)), 0)
end

--- Read a recipe as verbs want it: found, overridden, with `--ranks`, resolved.
-- @treturn table resolved
-- @treturn node the recipe
function M.read_recipe(options)
  local recipe = require "halo.recipe"
  local overrides, others = M.split_overrides(options.overrides or {})
  if #others > 0 then
    errors.raise("usage", ('"%s" is no override; write name=value, as stages.1.steps=20'):format(others[1]), 0)
  end
  local node = recipe.override(recipe.load(M.find_recipe(options.recipe)), overrides)
  if options.ranks then
    local dp = node.mesh.dp
    if options.ranks % dp ~= 0 then
      errors.raise("usage", ("--ranks %d is not a multiple of mesh.dp = %d"):format(options.ranks, dp), 0)
    end
    node.mesh.cp = options.ranks / dp
  end
  return recipe.resolve(node), node
end

--- Converter for argparse: a count, or a message.
function M.count(text)
  local n = tonumber(text)
  if n and n >= 1 and n == math.floor(n) then return n end
  return nil, ("'%s' is not a count"):format(text)
end

--- A number with an optional unit, as recipes write them: 4096, 32K, 2e9, 0.5B; nil for anything else.
function M.number(text)
  local digits, unit = text:match "^([%d.eE+-]+)([KMB]?)$"
  local n = digits and tonumber(digits)
  return n and n * (({ K = 1024, M = 1e6, B = 1e9 })[unit] or 1)
end

--- Converter for argparse: lengths such as 512, 32K or 1M, with commas between them.
function M.lengths(text)
  local out = {}
  for part in text:gmatch "[^,]+" do
    local digits, unit = part:match "^%s*([%d.]+)([KMkm]?)%s*$"
    local n = tonumber(digits)
    if not n then return nil, ("'%s' is no length; write 512, 32K or 1M"):format(part) end
    out[#out + 1] = n * (({ K = 1024, M = 1024 ^ 2 })[unit:upper()] or 1)
  end
  return out
end

return M
