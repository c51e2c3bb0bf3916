--- Globals on purpose only.
-- Reading a global that was never set is nearly always a misspelt name, and setting one inside a function
-- a forgotten `local`. "error" raises on both (scripts, tests); "warn" tells once per name when a
-- function sets one and raises on reading (the prompt, where `x = 1` at the top is how people work).
local args = require "halo.args"

local M = {}

local function names_of(env)
  local names = {}
  for name in pairs(env) do
    if type(name) == "string" then names[#names + 1] = name end
  end
  return names
end

--- Guard a table of globals.
-- @tparam string mode "error" or "warn"
-- @tparam[opt] table o `env` (default `_G`), `fallback` (function(name) -> value, asked before complaining),
-- `warn` (function(text), default to standard error)
function M.enable(mode, o)
  o = o or {}
  local env = o.env or _G
  local declared, told = {}, {}
  local warn = o.warn or function(text) io.stderr:write(text, "\n") end
  -- A chunk may define globals; only what happens inside a function is suspicious.
  local function in_function(level)
    local info = debug.getinfo(level + 1, "S")
    return info and info.what == "Lua"
  end
  return setmetatable(env, {
    __index = function(_, name)
      if o.fallback then
        local value = o.fallback(name)
        if value ~= nil then return value end
      end
      if declared[name] then return nil end -- set to nil on purpose
      error(('unknown name "%s"%s'):format(tostring(name), args.did_you_mean(name, names_of(env))), 2)
    end,
    __newindex = function(t, name, value)
      if in_function(2) and not declared[name] then
        local text = ('a function sets the global "%s"; is a `local` missing?'):format(tostring(name))
        if mode == "error" then error(text, 2) end
        if not told[name] then warn("warning: " .. text) end
        told[name] = true
      end
      declared[name] = true
      rawset(t, name, value)
    end,
  })
end

--- Take the guard away.
function M.disable(env) return setmetatable(env or _G, nil) end

return M
