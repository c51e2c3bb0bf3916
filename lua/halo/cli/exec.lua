--- `halo exec script.lua [args]`: plain Lua with Halo on its path.
local errors = require "halo.errors"
local fs = require "halo.fs"

local M = {
  name = "exec",
  summary = "Run a Lua script with `halo` loaded.",
  example = "halo exec analyse.lua runs/tiny --verbose",
}

function M.define(command)
  command:argument("script", "a Lua file; the words after it are its own"):args(1)
end

function M.run(options)
  local path = options.script
  local text, why = fs.read(path)
  if not text then errors.raise("usage", why, 0) end
  local chunk, syntax = loadstring((text:gsub("^#[^\n]*", "")), "@" .. path)
  if not chunk then errors.raise("usage", syntax, 0) end
  -- `arg` as lua(1) sets it: the script at 0.
  local words = { [0] = path, unpack(options.rest or {}) }
  rawset(_G, "arg", words)
  rawset(_G, "halo", require "halo")
  require("halo.strict").enable "error"
  local result
  local ok, e = xpcall(function() result = chunk(unpack(words)) end, function(e)
    -- A plain error of the script is the script's affair, not a fault inside Halo.
    local wrapped = errors.is(e) and e or errors.new { message = tostring(e), class = "usage" }
    wrapped.traceback = debug.traceback("", 2):gsub("^%s+", "")
    return wrapped
  end)
  if not ok then error(e, 0) end
  return type(result) == "number" and result or 0
end

return M
