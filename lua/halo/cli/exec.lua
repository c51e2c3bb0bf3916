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
  local result = chunk(unpack(words))
  return type(result) == "number" and result or 0
end

return M
