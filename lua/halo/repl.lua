--- `halo repl`: the engine at a prompt.
--
-- A line is an expression, whose value is shown, or statements. The names in scope are recipe words
-- (`yarn`, `stage`, ...), modules of Halo (`tensor`, `ops`, `data`, ...), plain Lua, and what the user
-- defines. Ending a line with `;` hushes it; `_` is the last value and `_1`, `_2`, ... the values of
-- one line. `? name` explains, `$ command` asks the shell. Errors show the line and the session goes on;
-- Ctrl-C stops a running line, because lines are interpreted, not compiled (`:jit on` compiles).
--
-- On several ranks, rank 0 reads the line and sends it to all; every rank runs the same text, so that
-- collective calls meet; values are shown by rank 0, errors of any rank are told, and `ranks(value)`
-- shows a value on each. Ctrl-C cannot stop one rank alone without losing the others: it asks again
-- and then ends the session.
--
-- Input that is not a terminal is read line by line without a prompt: tests and scripts drive the same
-- code.
local args = require "halo.args"
local errors = require "halo.errors"
local fs = require "halo.fs"
local launch = require "halo.launch"
local show = require "halo.show"
local term = require "halo.term"

local M = {}

local Session = {}
Session.__index = Session

---- Names in scope --------------------------------------------------------------------------------

local function make_environment(session)
  local halo = require "halo"
  local words = require("halo.recipe").environment()
  setmetatable(words, nil)
  local env = { halo = halo, _G = _G }
  for name, value in pairs(words) do
    -- Recipe words, but plain Lua's own libraries: at the prompt string.dump harms nobody.
    if rawget(_G, name) == nil then env[name] = value end
  end
  env.K, env.M, env.B = halo.K, halo.M, halo.B
  env._values = function(...) return ... end
  env.ranks = function(value) session:show_ranks(value) end
  env.who = function() session:who() end
  for name, value in pairs(require("halo.workbench").names(session.bench)) do env[name] = value end
  local own = {}
  for name in pairs(env) do own[name] = true end
  session.own_names = own
  local modules = {}
  for _, name in ipairs(halo.modules()) do modules[name] = true end
  local function fallback(name)
    local value = rawget(_G, name)
    if value ~= nil then return value end
    if name == "job" and session.has_job then return session.bench:job() end
    if modules[name] then return halo[name] end
  end
  require("halo.strict").enable("warn", { env = env, fallback = fallback,
    warn = function(text) session:note("yellow", text) end })
  local mt = getmetatable(env)
  -- `_` and `_1` are nil before the first value; that is no misspelling.
  local strict_index = mt.__index
  mt.__index = function(t, name)
    if type(name) == "string" and name:match "^_%d*$" then return nil end
    return strict_index(t, name)
  end
  mt.__names = function()
    local names = args.keys(modules)
    for name in pairs(_G) do names[#names + 1] = name end
    return names
  end
  return env
end

---- Output ----------------------------------------------------------------------------------------

function Session:print(text)
  if self.is_first then io.stdout:write(text, "\n") end
end

function Session:note(style, text)
  if self.is_first then io.stdout:write(term.paint(style, text), "\n") end
end

-- The source line that an error message points at, from the prompt's text or from a file.
local function source_line(message, chunk_text)
  local file, number = message:match "^([^:\n]+):(%d+):"
  if not file then return nil end
  local text = file == "prompt" and chunk_text or fs.read(file)
  if not text then return nil end
  local at = 0
  for line in (text .. "\n"):gmatch "(.-)\n" do
    at = at + 1
    if at == tonumber(number) then return line:match "^%s*(.-)%s*$" end
  end
end

function Session:report(e, chunk_text)
  e = errors.wrap(e)
  local message = tostring(e):gsub("^[^\n]-/lua/halo/", "lua/halo/")
  self:note("red", "error: " .. message:gsub("^prompt:1: ", ""))
  local line = source_line(tostring(e), chunk_text)
  if line and (chunk_text:find "\n" or not message:find "^prompt:") then self:print("  > " .. line) end
  if e.traceback then
    for frame in e.traceback:gmatch "[^\n]+" do
      local file = frame:match "^%s*([^:]+):%d+"
      -- Frames of recipes and scripts say something to their author; ours do not.
      if file and not file:find("lua/halo/", 1, true) and not file:find "^prompt" and not file:find "^%[" then
        self:print("    " .. frame:gsub("^%s+", ""))
      end
    end
  end
end

--- Variables that the user made.
function Session:who()
  local rows = { { "name", "value" } }
  for _, name in ipairs(args.keys(self.env)) do
    if not self.own_names[name] and not name:match "^_%d*$" then
      local text = show.value(self.env[name], 60):gsub("\n%s*", " ")
      rows[#rows + 1] = { name, #text > 60 and text:sub(1, 57) .. "..." or text }
    end
  end
  self:print(#rows > 1 and term.table(rows) or "nothing yet")
end

---- Ranks -----------------------------------------------------------------------------------------

-- Rank 0's text to all; nil (the end) included.
function Session:broadcast(text)
  if self.ranks == 1 then return text end
  local sent = self.world:broadcast_text(text and "+" .. text or "-")
  return sent:sub(1, 1) == "+" and sent:sub(2) or nil
end

--- Show a value on every rank, and whether it differs.
function Session:show_ranks(value)
  local text = show.value(value, 100):gsub("\n%s*", " ")
  if self.ranks == 1 then return self:print(text) end
  local all = self.world:all_gather_text(text)
  local same = true
  for r, other in ipairs(all) do
    self:print(("rank %d  %s"):format(r - 1, other))
    same = same and other == all[1]
  end
  self:note(same and "green" or "yellow", same and "all ranks agree" or "ranks differ")
end

-- After a line: did any rank fail that rank 0 does not know of?
function Session:agree(failure)
  if self.ranks == 1 then return end
  local all = self.world:all_gather_text(failure and tostring(failure) or "")
  for r, text in ipairs(all) do
    if text ~= "" and r > 1 and text ~= all[1] then self:note("red", ("error on rank %d: %s"):format(r - 1, text)) end
  end
end

---- Running a line --------------------------------------------------------------------------------

-- Compile as an expression, else as statements. Returns chunk, or nil, message, is_incomplete.
-- The expression is an argument and not returned itself, because a tail call would leave no frame of the
-- prompt for errors to point at. (With a line break only where a comment would swallow the parenthesis.)
local function compile(text)
  local chunk = loadstring("return _values(" .. text .. ")", "=prompt")
    or loadstring("return _values(" .. text .. "\n)", "=prompt")
  if chunk then return chunk end
  local why, why_not_expression, _
  chunk, why = loadstring(text, "=prompt")
  if chunk then return chunk end
  _, why_not_expression = loadstring("return " .. text, "=prompt")
  return nil, why, why:find "near '<eof>'$" ~= nil or why_not_expression:find "near '<eof>'$" ~= nil
end

local function pack(...) return { n = select("#", ...), ... } end

function Session:keep_values(results)
  for i = 1, math.max(results.n, self.kept or 0) do rawset(self.env, "_" .. i, results[i]) end
  self.kept = results.n
  if results[1] ~= nil then rawset(self.env, "_", results[1]) end
end

--- Run one complete chunk of text: show values or the error.
-- @treturn boolean false when it failed
function Session:run(text)
  local hushed = text:match ";%s*$" ~= nil
  local chunk, why = compile((text:gsub(";%s*$", "")))
  if not chunk then chunk, why = compile(text) end
  if not chunk then
    self:report(errors.new { message = why, class = "usage" }, text)
    self:agree(why)
    return false
  end
  require("halo.schema").register_source("=prompt", text)
  setfenv(chunk, self.env)
  if not self.use_jit then jit.off(chunk, true) end -- so that Ctrl-C reaches it
  local clock = require("halo.progress").clock
  local host = rawget(_G, "halo_host")
  local start = clock()
  if host then host.running(self.ranks == 1 and "stoppable" or "together") end
  local results = pack(xpcall(chunk, function(e)
    e = errors.wrap(e)
    e.traceback = debug.traceback("", 2):gsub("^%s*stack traceback:%s*", "")
    return e
  end))
  if host then host.running "no" end
  local seconds = clock() - start
  local failure
  if results[1] then
    table.remove(results, 1)
    results.n = results.n - 1
    self:keep_values(results)
    if not hushed then self:echo(results) end
  else
    failure = results[2]
    self:report(failure, text)
  end
  if seconds >= 0.05 and not hushed then self:note("dim", term.duration(seconds)) end
  self:agree(failure)
  return failure == nil
end

function Session:echo(results)
  for i = 1, results.n do
    local ok, text = pcall(show.value, results[i])
    self:print(ok and text or "(cannot show this value: " .. tostring(text) .. ")")
  end
end

---- Commands --------------------------------------------------------------------------------------

local welcome = [[
A line is a Lua expression, whose value is shown, or statements.
  ? name     explain a word of the recipe language, an op, a function, a module
  x;         a semicolon hushes the value        _  _1 _2    the last values
  $ command  ask the shell                       who()       your variables
  ranks(x)   x on every rank                     :jit on     compile lines (Ctrl-C then waits)
  With a recipe (in R) or a run: step(n)  undo()  generate(text)  probe(layer)  job
  Tab        complete names, fields, files       Ctrl-D      leave]]

-- Lines that are not Lua. Returns true when the line was one.
function Session:command(line)
  local word = line:match "^%s*%?%s*(.-)%s*$"
  if word == "" then
    self:print(welcome)
    return true
  elseif word then
    local value = word:match "^[%w_.]+$" and rawget(self.env, word:match "^[%w_]+") and select(2,
      pcall(setfenv(loadstring("return " .. word, "=prompt"), self.env)))
    local schema = require "halo.schema"
    local help = require "halo.help"
    local text, why = help.find(schema.is_node(value) and schema.type_of(value).path or word)
    self:print(text or why)
    return true
  end
  local shell = line:match "^%s*%$%s*(.*)$"
  if shell then
    io.stdout:flush()
    if self.is_first then os.execute(shell) end
    return true
  end
  local jit_mode = line:match "^%s*:jit%s+(%w+)%s*$"
  if jit_mode then
    self.use_jit = jit_mode == "on"
    self:print("lines are " .. (self.use_jit and "compiled" or "interpreted"))
    return true
  end
  return false
end

---- The loop --------------------------------------------------------------------------------------

local function history_path()
  local forced = os.getenv "HALO_HISTORY"
  if forced then return forced ~= "" and forced or nil end
  local home = os.getenv "HOME"
  if not home then return nil end
  local folder = (os.getenv "XDG_STATE_HOME" or home .. "/.local/state") .. "/halo"
  return pcall(fs.mkdir, folder) and folder .. "/history" or nil
end

-- Lines until they make a complete chunk. Returns text; nil at the end of input; false when dropped.
function Session:read()
  if not self.is_first then return nil end
  local text
  while true do
    local line = self.host.readline(text and "   .. " or "halo> ")
    if line == false then
      if self.is_tty then io.stdout:write "\n" end
      return false
    end
    if line == nil then return text end
    text = text and text .. "\n" .. line or line
    local is_command = not text:find "\n" and text:match "^%s*[?$:]"
    if is_command or text:match "^%s*$" then break end
    local hushless = text:gsub(";%s*$", "")
    local _, _, incomplete = compile(hushless)
    if not incomplete then break end
  end
  if text:match "%S" then self.host.remember(text) end
  return text
end

-- Reading and talking to the terminal need the host program; plain LuaJIT has io.read.
local plain_host = {
  readline = function(prompt)
    if term.is_tty(0) then io.stdout:write(prompt) io.stdout:flush() end
    return io.read "*l"
  end,
  remember = function() end, history = function() end, completer = function() end,
  catch_interrupts = function() end, running = function() end,
}

--- A session.
-- @tparam[opt] table o `recipe` (node, becomes R), or `target` (a run, checkpoint or model folder)
function M.new(o)
  o = o or {}
  local ranks, rank = launch.job()
  local session = setmetatable({
    ranks = ranks, rank = rank, is_first = rank == 0, host = rawget(_G, "halo_host") or plain_host,
    is_tty = term.is_tty(0) and term.is_tty(1),
  }, Session)
  if ranks > 1 then session.world = require("halo.comm").world() end
  session.bench = require("halo.workbench").new { recipe = o.recipe, target = o.target,
    say = function(text) session:print(text) end }
  session.has_job = o.recipe ~= nil or o.target ~= nil
  session.env = make_environment(session)
  local R = o.recipe or session.bench:saved_recipe()
  if R then
    rawset(session.env, "R", R)
    session.own_names.R = true
  end
  return session
end

local function banner(session, o)
  local halo = require "halo"
  local memory = fs.read "/proc/meminfo"
  local total = memory and tonumber(memory:match "MemTotal:%s+(%d+)")
  local parts = { ("Halo %s"):format(halo.version), jit.version:gsub("%-beta.*", "") .. " GC64",
    ("%d core%s %s"):format(require("halo.process").cores(), require("halo.process").cores() == 1 and "" or "s",
      total and term.bytes(total * 1024) or "") }
  if session.ranks > 1 then parts[#parts + 1] = ("%d ranks"):format(session.ranks) end
  if o.recipe then parts[#parts + 1] = ('recipe "%s" in R'):format(o.recipe.name) end
  if o.target then parts[#parts + 1] = o.target end
  session:print(table.concat(parts, " · ") .. "      ? help · ? name · Ctrl-D leaves")
end

-- One turn. Returns false at the end.
function Session:turn()
  local text = self:read()
  if text == false then -- dropped line: nothing to send
    return true
  end
  text = self:broadcast(text)
  if text == nil or text:match "^%s*exit%s*$" or text:match "^%s*quit%s*$" then return false end
  if not text:match "%S" then return true end
  if not self:command(text) then
    local ok = self:run(text)
    self.failed = self.failed or not ok
  end
  io.stdout:flush()
  return true
end

--- Run a session until the end of input.
-- @treturn int exit code: 0; for piped input 2 when a line failed, so that scripts notice
function M.run(o)
  o = o or {}
  local session = M.new(o)
  local host = session.host
  if session.is_first and session.is_tty then
    local path = history_path()
    if path then host.history(path) end
    host.completer(function(line) return require("halo.complete").complete(line, session.env) end)
    banner(session, o)
  end
  if session.is_first then host.catch_interrupts(true) end
  while session:turn() do end
  host.catch_interrupts(false)
  if session.is_tty and session.is_first then io.stdout:write "\n" end
  return (session.failed and not session.is_tty) and errors.exit_codes.usage or 0
end

return M
